import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import attack
import data
import landscape
import models
from lib import fast, record, rng
from lib.classifier import flat, unflat

DIGITS = data.DATASETS['mnist5k']


class Tiny(nn.Module):
    """A network from outside, with BatchNorm and ReLUs of all kinds."""

    def __init__(self, width, channels, size, n_classes):
        super().__init__()
        self.scale, self.relu = nn.Parameter(torch.ones(())), nn.ReLU(inplace=True)
        self.conv, self.bn = nn.Conv2d(channels, 3 * width, 5, 4), nn.BatchNorm2d(3 * width)
        self.linear, self.last = nn.Linear(3 * width, 5 * width), nn.Linear(5 * width, n_classes)

    def forward(self, x):
        x = self.bn(self.conv(self.scale * x.relu()))  # before any layer
        x = torch.relu(self.relu(x).mean((2, 3)))  # two in a row
        return self.last(F.relu_(self.linear(x)))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models.MODELS, 'tiny', Tiny)


def digits(n):
    x, y = data.load('mnist5k')[:2]
    index = data.subset(len(x), n)
    return x[index], y[index], index


@functools.cache
def trained(model, width, seed):
    """The state of a network after some steps on 40 digits."""
    torch.manual_seed(seed)
    network, (x, y, _) = models.build(model, DIGITS, width), digits(40)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.state_dict()


def make_run(folder, seed=0, model='lenet', width=2, **config):
    """A finished run."""
    settings = {'dataset': 'mnist5k', 'model': model, 'width': width, 'eps': 0.1, 'step_size': 0.1}
    settings |= {'n_iter': 2, 'periods': [1], 'n_train': 200, 'augment': False, 'provenance': []}
    record.save(folder / 'config.json', settings | config)
    record.save(folder / 'period1.pt', trained(model, width, seed))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / 'one')


def save_eigenvectors(run, seed=0):
    """Leaves two orthonormal vectors, (2, dim), where hessian.py leaves eigenvectors."""
    dim = sum(p.numel() for p in record.load(run / 'period1.pt').values())
    random = torch.randn(dim, 2, generator=torch.Generator().manual_seed(seed))
    digest, eigen = record.digest(run / 'period1.pt'), {'values': [2, 1], 'converged': [True, True]}
    record.save(run / 'hessian.json', {'digest': digest, 'eps': 0.1, 'n': 40, 'eigen': eigen})
    vectors = torch.linalg.qr(random).Q.T.contiguous()
    record.save(run / 'hessian.pt', {'digest': digest, 'vectors': vectors, 'values': [2, 1]})
    return vectors


def call(command, *words):
    """Runs the command on 40 images; its result."""
    words = [str(word) for word in (command, *words, '--device', 'cpu', '--n-examples', 40)]
    return record.load(landscape.main(words))


def measured(run, delta=0, seed=0):
    """What the run's attack does at theta + delta: perturbations, (40, 784), loss, robust error."""
    model = record.load_model(run / 'period1.pt')[0].eval()
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(theta + delta, model.parameters())
    x, y, index = digits(40)
    x_adv = attack.pgd(model, x, y, 0.1, 0.1, 2, index=index, seed=seed)
    logits = model(x_adv)
    error = (logits.argmax(1) != y).double().mean().item()
    return (x_adv - x).flatten(1), F.cross_entropy(logits, y).item(), error


def test_parameters_are_restored_bit_for_bit_also_after_an_exception():
    model = models.build('tiny', DIGITS, 1)
    theta = flat(model.parameters())
    run = mock.Mock(model=model, pgd=mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        landscape.attacked(run, fast.Folded(model, []), torch.randn(len(theta)), 0)
    assert torch.equal(flat(model.parameters()), theta)


def test_similarity_is_that_of_attacks_by_hand(run):
    v = save_eigenvectors(run)[0]
    point = call('similarity', run, '--a', 0.3)['points'][0]
    cosines, errors = [], []
    for i in range(4):
        ends = [measured(run, delta, rng.fold_in(0, i, 0)) for delta in (0.3 * v, -0.3 * v)]
        perturbations, _, robust_errors = zip(*ends)
        cosines.append(F.cosine_similarity(*perturbations).mean().item())
        errors += robust_errors
    assert point['cosine'] == pytest.approx(sum(cosines) / 4, abs=1e-4)
    assert point['robust_error'] == pytest.approx(sum(errors) / 8, abs=1e-6)


def test_without_a_budget_similarity_is_refused(run):
    with pytest.raises(ValueError, match='nothing is perturbed'):
        call('similarity', run, '--eps', 0)


def test_points_along_other_eigenvectors_are_replaced(run, capsys):
    for seed in 0, 1:
        save_eigenvectors(run, seed)
        assert len(call('similarity', run, '--a', 0.5)['points']) == 2
    assert 'it is replaced' in capsys.readouterr().out


def test_points_of_another_sweep_are_replaced(run, capsys):
    make_run(run.with_name('two'), 1)
    save_eigenvectors(run)
    for words, first, second in (
        ('similarity one --a 0', 3, 0.1),
        ('surface one --grid 2 --radius', 0.5, 5),
        ('surface one --grid', 2, 3),
        ('connect one two --epochs 1 --n-control 3 --points', 2, 3),
    ):
        words = words.split()
        call(*words, first)
        result = call(*words, second)
        assert 'it is replaced' in capsys.readouterr().out
        assert call(*words, second) == result
        again = capsys.readouterr().out
        assert ': 0 of ' in again and 'replaced' not in again
        next(run.glob(f'{words[0]}*.json')).unlink()
        assert call(*words, second)['points'] == result['points']


def test_a_surface_is_the_loss_at_shifted_parameters(run):
    v, ticks = save_eigenvectors(run), (-2, 0, 2)
    points = call('surface', run, '--grid', 3, '--radius', 2)['points']
    assert [(point['a'], point['b']) for point in points] == [(a, b) for a in ticks for b in ticks]
    for point in points[1:6:4]:
        _, loss, error = measured(run, point['a'] * v[0] + point['b'] * v[1])
        assert point['loss'] == pytest.approx(loss, rel=1e-3)
        assert point['robust_error'] == pytest.approx(error)


def test_a_bezier_curve_is_de_casteljaus():
    points = torch.randn(5, 42)
    for t in 0, 0.1, 0.5, 0.8, 1:
        expected = points
        while len(expected) > 1:
            expected = (1 - t) * expected[:-1] + t * expected[1:]
        assert torch.allclose(landscape.bezier(t, points)[0], expected[0], atol=1e-6)


def test_a_step_on_a_curve_is_that_of_autograd_through_it(run, tmp_path):
    make_run(tmp_path / 'two', 1)
    call('connect', run, tmp_path / 'two', '--n-control', 3, '--epochs', 1, '--points', 2)
    model, other = (record.load_model(end / 'period1.pt')[0] for end in (run, tmp_path / 'two'))
    first, last = (flat(end.parameters()) for end in (model, other))
    middle, generator = ((first + last) / 2).requires_grad_(), rng.generator(0, 0)
    x, y = next(data.batches(*digits(40)[:2], 128, generator))
    t = torch.rand((), generator=generator).item()
    theta = (1 - t) ** 2 * first + 2 * t * (1 - t) * middle + t**2 * last
    nn.utils.vector_to_parameters(theta.detach(), other.parameters())
    x_adv = attack.pgd(other, x, y, 0.1, 0.1, 2, seed=rng.fold_in(0, 0, 0))
    names, like = zip(*model.named_parameters())
    logits = functional_call(model, dict(zip(names, unflat(theta, like))), (x_adv,))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), middle)
    expected = middle - 0.1 * (gradient + 1e-6 * middle)
    assert not torch.allclose(expected, middle, atol=1e-3)
    found = record.load(*run.glob('connect*.pt'))['tensors'][0][0]
    assert torch.allclose(found, expected, atol=1e-6)


def test_training_lowers_a_curve_between_its_ends(run, tmp_path):
    make_run(tmp_path / 'two', 1)
    flags = '--points 3 --epochs 8 --lr 0.05 --n-control 3 --train-batch-size 20'.split()
    result = call('connect', run, tmp_path / 'two', *flags)
    losses = [point['loss'] for point in result['points']]
    ends = [measured(end)[1] for end in (run, tmp_path / 'two')]
    assert [*losses[:3:2], *losses[3::2]] == pytest.approx(2 * ends, rel=1e-4)
    barriers = [max(losses[i] - max(ends), 0) for i in (1, 4)]
    assert [*result['barriers'].values()] == pytest.approx(barriers[::-1], rel=1e-3)
    assert losses[4] < 0.9 * losses[1] and len(result['train_losses']) == 8


def test_a_curve_killed_in_training_and_in_measuring_ends_in_the_same_bits(tmp_path, monkeypatch):
    one, two = make_run(tmp_path / 'one', 0, 'tiny'), make_run(tmp_path / 'two', 1, 'tiny')
    whole = make_run(tmp_path / 'whole', 0, 'tiny')
    flags = '--points 2 --epochs 3 --n-control 3 --train-batch-size 20'.split()
    expected, save = call('connect', whole, two, *flags)['points'], record.save

    def save_then_stop(path, state):
        save(path, state)
        if len(state.get('losses', [])) == 2 or len(state.get('points', [])) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(record, 'save', save_then_stop)
    for saved in '*.pt', '*.json':
        with pytest.raises(KeyboardInterrupt):
            call('connect', one, two, *flags)
        assert len(list(one.glob(f'connect{saved}'))) == 1
    monkeypatch.setattr(record, 'save', save)
    assert record.load(*one.glob('connect*.json'))['points'] == expected[:2]
    assert call('connect', one, two, *flags)['points'] == expected
    a, b = (record.load(*run.glob('connect*.pt')) for run in (one, whole))
    assert all(torch.equal(*pair) for pair in zip(a['tensors'], b['tensors']))
    assert a['losses'] == b['losses'] and len(a['losses']) == 3
    next(one.glob('connect*.pt')).unlink()
    monkeypatch.setattr(landscape, 'train_curve', None)  # a complete result needs no curve
    assert call('connect', one, two, *flags)['points'] == expected


@pytest.mark.parametrize('config', [{'width': 1}, {'eps': 0.2}, {'seed': 0}])
def test_the_same_network_and_other_shapes_and_budgets_are_not_connected(run, tmp_path, config):
    make_run(tmp_path / 'two', **{'seed': 1} | config)
    with pytest.raises(ValueError, match='one, .*two: no two networks of one shape'):
        call('connect', run, tmp_path / 'two')


def test_a_unit_that_one_image_activates_is_alive():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    model[1].weight.data.copy_(torch.tensor([[1.0, -1], [-1, -1]]))
    x = torch.tensor([[0.0, 1], [0, 0.5], [0.5, 0.4], [0, 0]]).view(4, 1, 1, 2)
    assert landscape.dead_units(model, x, 1)[1]['1'].tolist() == [False, True]


def test_every_relu_is_seen_whatever_the_model():
    _, found = landscape.dead_units(models.build('tiny', DIGITS, 1), torch.rand(9, 1, 28, 28), 4)
    sizes = {name: len(units) for name, units in found.items()}
    assert sizes == {'input': 1, 'bn': 3, "bn'": 3, 'linear': 5}


def test_dead_channels_a_dead_layer_and_a_constant_classifier_are_written(run, capsys):
    state = record.load(run / 'period1.pt')
    state['conv1.bias'][[0, 3]] = -100  # two dead channels of four
    state['fc1.bias'].fill_(-1e4)
    record.save(run / 'period1.pt', state)
    result = call('dead', run)
    rows = [[layer[key] for key in ('layer', 'units', 'dead')] for layer in result['layers']]
    assert [rows[0], rows[2]] == [['conv1', 4, 2], ['fc1', 128, 128]] and rows[1][0] == 'conv2'
    assert [layer['all'] for layer in result['layers']] == [False, False, True]
    assert result['layers'][0]['share'] == 0.5 and result['predicted_classes'] == 1
    assert 'predicts 1 class' in capsys.readouterr().out

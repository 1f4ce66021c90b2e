import functools
import itertools
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis
import attack
import hessian
import landscape
import models
import record
import train


@pytest.fixture
def pair(runs, tmp_path):
    """Copies of a finished run, 'one', and of its twin with other parameters, 'two'."""
    for name in 'one', 'two':
        shutil.copytree(runs / 'single', tmp_path / name)
    torch.manual_seed(5)
    record.save(tmp_path / 'two/period1.pt', models.build('lenet', 'mnist5k', 2).state_dict())
    return tmp_path


@pytest.fixture
def run(pair, data_dir):
    """A finished run with two eigenvectors."""
    hessian.main([str(pair / 'one'), *flags(data_dir), '--k', '2', '--draws', '1'])
    return pair / 'one'


def flags(data_dir, n=40):
    return ['--data-dir', str(data_dir), '--device', 'cpu', '--n-examples', str(n)]


def only(folder, pattern):
    """What lies in the one file of this name in the folder."""
    path, = folder.glob(pattern)
    return record.load(path)


def subject(path, data_dir, *more):
    return analysis.subject(path, landscape.parse(['dead', str(path), *flags(data_dir), *more]))


# moving the parameters

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(12, 10))


def test_shifted_moves_the_parameters_and_gives_them_back_bit_for_bit():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    theta = analysis.flat(model.parameters())
    delta = torch.randn(len(theta))
    with landscape.shifted(model, delta):
        assert torch.equal(analysis.flat(model.parameters()), theta + delta)
        model(torch.rand(5, 1, 4, 4))  # in train mode, moves BatchNorm's statistics
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shifted_gives_the_parameters_back_after_an_exception():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        with landscape.shifted(model, 1e30 * torch.ones(len(analysis.flat(model.parameters())))):
            model[1].running_mean.fill_(math.nan)
            raise KeyboardInterrupt
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_vector_is_cut_as_the_parameters_lie():
    model = network().to(memory_format=torch.channels_last)
    theta = list(model.parameters())
    parts = analysis.unflat(analysis.flat(theta), theta)
    assert all(torch.equal(part, p) for part, p in zip(parts, theta))


def test_a_random_direction_is_of_norm_one_and_hangs_on_its_words():
    v = analysis.random_unit(1000, torch.zeros(()), 3, 4)
    assert v.norm().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(v, analysis.random_unit(1000, torch.zeros(()), 3, 4))
    assert abs(v @ analysis.random_unit(1000, torch.zeros(()), 4, 3)) < .2


def test_filter_normalised_directions_have_the_norms_of_the_filters():
    model = network()
    theta = list(model.parameters())
    parts = analysis.unflat(landscape.filter_normalised(model, 0), theta)
    for part, p in zip(parts, theta):
        if p.dim() == 1:  # a bias, or BatchNorm
            assert torch.equal(part, torch.zeros_like(p))
        else:
            for moved, own in zip(part, p):
                assert moved.norm().item() == pytest.approx(own.norm().item(), rel=1e-5)


# similarity

def test_cosines_are_those_of_the_perturbations():
    x = torch.zeros(5, 1, 1, 2)
    one = torch.tensor([[3., 4], [1, 0], [1, 0], [0, 0], [0, 0]]).view_as(x)
    two = torch.tensor([[6., 8], [-1, 0], [0, 1], [1, 1], [0, 0]]).view_as(x)
    found = landscape.cosines(x, one, two)
    assert torch.allclose(found[:3], torch.tensor([1., -1, 0]).double())
    assert found[3:].isnan().all()  # a perturbation of zero has no direction


def test_similarity_is_that_of_attacks_by_hand(run, data_dir):
    landscape.main(['similarity', str(run), *flags(data_dir), '--a', '0', '0.3', '--runs', '2'])
    result = only(run, 'similarity*.json')
    points = {(point['direction'], point['a']): point for point in result['points']}
    for direction in 'eigenvector', 'random':
        assert points[direction, 0]['cosine'] == pytest.approx(1) and len(points) == 4
        assert points[direction, 0]['variance'] == pytest.approx(0)
    s = subject(run, data_dir)
    v = record.load(run / 'hessian_n40.pt')['vectors'][0]
    state, found, errors = s.model.state_dict(), [], []
    for seed in 0, 1:
        moved = []
        for sign in 1, -1:
            model = models.build('lenet', 'mnist5k', 2)
            model.load_state_dict(state)
            start = 0
            with torch.no_grad():
                for p in model.parameters():
                    p += sign * .3 * v[start:start + p.numel()].view(p.shape)
                    start += p.numel()
            x_adv = attack.pgd(model, s.x, s.y, .1, .1, 2, index=s.index,
                               seed=attack.derive(0, seed, False))
            errors.append((model(x_adv).argmax(1) != s.y).float().mean().item())
            moved.append((x_adv - s.x).flatten(1))
        found.append(F.cosine_similarity(*moved).mean().item())
    point = points['eigenvector', .3]
    assert point['cosine'] == pytest.approx(sum(found) / 2, abs=1e-4)
    assert point['variance'] == pytest.approx((found[0] - found[1]) ** 2 / 2, rel=.05)
    assert point['robust_error'] == pytest.approx(sum(errors) / 4, abs=1e-6)
    assert point['cosine'] < points['random', .3]['cosine'] < 1
    assert (run / 'similarity_runs2_n40.png').stat().st_size > 5000


def test_independent_starts_differ_at_a_0(run, data_dir):
    landscape.main(['similarity', str(run), *flags(data_dir), '--a', '0', '--runs', '2', '--starts',
                    'independent'])
    for point in only(run, 'similarity*.json')['points']:
        assert .1 < point['cosine'] < .999 and point['variance'] > 0


def test_without_a_budget_similarity_is_undefined_not_nan(pair, data_dir):
    run = pair / 'one'
    hessian.main([str(run), *flags(data_dir), '--k', '1', '--draws', '1', '--eps', '0'])
    landscape.main(['similarity', str(run), *flags(data_dir), '--a', '0.1', '--eps', '0'])
    for point in record.load(run / 'similarity_n40_eps0.json')['points']:
        assert point['cosine'] is point['variance'] is None and point['undefined'] == 1
        assert 0 <= point['robust_error'] <= 1


def test_without_eigenvectors_the_way_to_them_is_told(pair, data_dir):
    for command in 'similarity', 'surface':
        with pytest.raises(ValueError, match='python hessian.py .*/one --n-examples 40$'):
            landscape.main([command, str(pair / 'one'), *flags(data_dir)])


def test_eigenvectors_of_another_checkpoint_are_not_taken(run, data_dir):
    shutil.copy(run.parent / 'two/period1.pt', run / 'period1.pt')
    with pytest.raises(ValueError, match='no top 1 eigenvectors'):
        landscape.main(['similarity', str(run), *flags(data_dir)])


# surface

def test_a_surface_is_the_loss_at_shifted_parameters(run, data_dir):
    landscape.main(['surface', str(run), *flags(data_dir), '--grid', '3', '2', '--radius', '0.2'])
    points = record.load(run / 'surface_n40.json')['points']
    assert [(point['a'], point['b']) for point in points] == [
        (a, b) for a in (-.2, 0, .2) for b in (-.2, .2)]
    s, vectors = subject(run, data_dir), record.load(run / 'hessian_n40.pt')['vectors']
    theta = analysis.flat(s.model.parameters())
    for point in points[1:4:2]:
        moved = theta + point['a'] * vectors[0] + point['b'] * vectors[1]
        nn.utils.vector_to_parameters(moved, s.model.parameters())
        x_adv = s.pgd(s.model, s.x, s.y, seed=0)
        assert point['loss'] == pytest.approx(F.cross_entropy(s.model(x_adv), s.y).item(), rel=1e-4)
    assert (run / 'surface_n40.png').stat().st_size > 5000


def test_along_eigenvectors_the_loss_curves_as_the_eigenvalues_say(run, data_dir):
    flag = ['--grid', '3', '1', '--radius', '1e-2', '--adversarial', 'fixed', '--float64']
    hessian.main([str(run), *flags(data_dir), '--k', '2', '--draws', '1', '--float64', '--tol',
                  '1e-6'])
    landscape.main(['surface', str(run), *flags(data_dir), *flag])
    low, middle, high = (point['loss'] for point in only(
        run, 'surface*.json')['points'])
    value = record.load(run / 'hessian_n40_float64.json')['eigen']['values'][0]
    assert (low - 2 * middle + high) / 1e-4 == pytest.approx(value, rel=.1)


def test_fixed_adversarial_examples_are_weaker_than_new_ones(run, data_dir):
    mean = {}
    for kind in 'fixed', 'regenerate':
        landscape.main(['surface', str(run), *flags(data_dir), '--grid', '3', '--radius', '1',
                        '--directions', 'filter', '--adversarial', kind])
        tag = 'fixed_' if kind == 'fixed' else ''
        points = only(run, f'surface_filter_{tag}n40.json')['points']
        mean[kind] = sum(point['loss'] for point in points) / 9
        assert points[4]['a'] == points[4]['b'] == 0
    assert mean['fixed'] < mean['regenerate']


def test_a_killed_surface_keeps_its_points(run, data_dir, monkeypatch):
    command = ['surface', str(run), *flags(data_dir), '--grid', '3', '2']
    landscape.main(command)
    whole = record.load(run / 'surface_n40.json')
    (run / 'surface_n40.json').unlink()
    mean_loss, calls = attack.mean_loss, []

    def kill(*args):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return mean_loss(*args)

    monkeypatch.setattr(attack, 'mean_loss', kill)
    with pytest.raises(KeyboardInterrupt):
        landscape.main(command)
    assert len(record.load(run / 'surface_n40.json')['points']) == 4
    monkeypatch.setattr(attack, 'mean_loss', lambda *a: calls.append(1) or mean_loss(*a))
    landscape.main(command)
    assert len(calls) == 6
    resumed = record.load(run / 'surface_n40.json')
    for a, b in zip(resumed['points'], whole['points'], strict=True):
        assert a | {'seconds': 0} == b | {'seconds': 0}


# curves

@pytest.mark.parametrize('kind', ['bezier', 'polygon'])
def test_the_ends_of_a_curve_are_the_two_networks(kind):
    first, last = network().eval(), network().eval()
    with torch.no_grad():
        for p in last.parameters():
            p.add_(torch.randn_like(p))
    ends = [analysis.flat(model.parameters()) for model in (first, last)]
    curve = landscape.Curve(network(), *ends, 4, kind).eval()
    with torch.no_grad():
        curve.inner.normal_()
    x = torch.rand(3, 1, 4, 4)
    for curve.t, model, end in zip((0, 1), (first, last), ends):
        assert torch.equal(curve.theta(curve.t), end)
        assert torch.allclose(curve(x), model(x))


def test_a_bezier_curve_is_de_casteljaus():
    ends = torch.randn(2, 42)
    curve = landscape.Curve(nn.Linear(20, 2), *ends, 5, 'bezier')
    with torch.no_grad():
        curve.inner.normal_()
    for t in .1, .5, .8:
        points = torch.cat([ends[:1], curve.inner.detach(), ends[1:]])
        while len(points) > 1:
            points = (1 - t) * points[:-1] + t * points[1:]
        assert torch.allclose(curve.theta(t), points[0], atol=1e-6)


def test_a_polygon_passes_through_its_points_on_straight_lines():
    ends = torch.randn(2, 42)
    curve = landscape.Curve(nn.Linear(20, 2), *ends, 4, 'polygon')
    with torch.no_grad():
        curve.inner.normal_()
    one, two = curve.inner.detach()
    assert torch.allclose(curve.theta(1 / 3), one, atol=1e-6)
    assert torch.allclose(curve.theta(.5), (one + two) / 2, atol=1e-6)


@pytest.mark.parametrize('kind', ['bezier', 'polygon'])
def test_a_new_curve_is_the_straight_line(kind):
    ends = torch.randn(2, 42)
    curve = landscape.Curve(nn.Linear(20, 2), *ends, 5, kind)
    for t in .2, .7:
        assert torch.allclose(curve.theta(t), (1 - t) * ends[0] + t * ends[1], atol=1e-6)


def test_training_lowers_a_curve_and_leaves_its_ends(pair, data_dir):
    command = ['connect', str(pair / 'one'), str(pair / 'two'), *flags(data_dir, 100), '--points',
               '5', '--epochs', '8', '--lr', '0.05', '--n-control', '3', '--train-batch-size', '20']
    landscape.main(command)
    result = only(pair / 'one', 'connect_two_*.json')
    rows = {path: [point for point in result['points'] if point['path'] == path]
            for path in ('line', 'bezier')}
    middle = {path: sum(point['loss'] for point in points[1:4]) for path, points in rows.items()}
    assert middle['bezier'] < .9 * middle['line']
    for i, name in ((0, 'one'), (4, 'two')):
        s = subject(pair / name, data_dir, '--n-examples', '100')
        loss = F.cross_entropy(s.model(s.pgd(s.model, s.x, s.y, seed=0)), s.y).item()
        for points in rows.values():
            assert points[i]['t'] == i / 4 and points[i]['loss'] == pytest.approx(loss, rel=1e-4)
    for path, points in rows.items():
        barrier = max(point['loss'] for point in points) - max(points[0]['loss'], points[4]['loss'])
        assert result['barriers'][path] == pytest.approx(barrier)
    assert len(result['train_losses']) == 8
    assert len(list((pair / 'one').glob('connect_two*.png'))) == 1


def test_a_killed_curve_goes_on_to_the_same_curve(pair, data_dir, monkeypatch):
    command = ['connect', str(pair / 'one'), str(pair / 'two'), *flags(data_dir), '--points', '2',
               '--epochs', '4', '--n-control', '4', '--curve', 'polygon', '--lr', '0.01']
    landscape.main(command)
    whole = only(pair / 'one', 'connect_two*.pt')
    for path in (pair / 'one').glob('connect*'):
        path.unlink()
    lr_at, calls = landscape.schedule.lr_at, []

    def kill(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return lr_at(*args)

    monkeypatch.setattr(landscape.schedule, 'lr_at', kill)
    with pytest.raises(KeyboardInterrupt):
        landscape.main(command)
    monkeypatch.undo()
    landscape.main(command)
    resumed = only(pair / 'one', 'connect_two*.pt')
    assert torch.equal(resumed['inner'], whole['inner']) and resumed['losses'] == whole['losses']


@pytest.fixture(scope='module')
def resnets(data_dir, tmp_path_factory):
    """Two runs of a network with BatchNorm, 'r0' and 'r1'."""
    folder = tmp_path_factory.mktemp('resnets')
    for seed in '0', '1':
        train.main(['--data-dir', str(data_dir), '--model', 'resnet18', '--width', '1', '--n-train',
                    '40', '--n-eval', '0', '--eps', '0.1', '--step-size', '0.1', '--n-iter', '1',
                    '--epochs', '2', '--batch-size', '20', '--lr', '1e-2', '--seed', seed,
                    '--out', str(folder / f'r{seed}')])
    return folder


def test_a_killed_curve_of_networks_with_batchnorm_goes_on_to_the_same_curve(resnets, data_dir,
                                                                             monkeypatch):
    command = ['connect', str(resnets / 'r0'), str(resnets / 'r1'), *flags(data_dir), '--points',
               '2', '--epochs', '3', '--n-control', '3', '--train-batch-size', '20']
    landscape.main(command)
    whole, points = (only(resnets / 'r0', f'connect_r1*.{kind}') for kind in ('pt', 'json'))
    for path in (resnets / 'r0').glob('connect*'):
        path.unlink()
    save, files = record.save, []

    def kill(path, content):
        save(path, content)
        files.append(path)
        if len(files) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(record, 'save', kill)
    with pytest.raises(KeyboardInterrupt):
        landscape.main(command)
    landscape.main(command)
    resumed = only(resnets / 'r0', 'connect_r1*.pt')
    assert torch.equal(resumed['inner'], whole['inner']) and resumed['losses'] == whole['losses']
    for a, b in zip(only(resnets / 'r0', 'connect_r1*.json')['points'], points['points']):
        assert a | {'seconds': 0} == b | {'seconds': 0}


def test_batchnorm_is_recomputed_where_asked(resnets, data_dir, monkeypatch):
    calls, recompute = [], analysis.recompute_bn
    monkeypatch.setattr(analysis, 'recompute_bn',
                        lambda *a, **kw: calls.append(1) or recompute(*a, **kw))
    for more in [], ['--recompute-bn']:
        landscape.main(['surface', str(resnets / 'r0'), *flags(data_dir), '--directions', 'filter',
                        '--grid', '2', '1', '--radius', '0.3', *more])
    assert len(calls) == 2
    own, afresh = (only(resnets / 'r0', f'surface_filter_{tag}n40.json')['points']
                   for tag in ('', 'bn_'))
    assert own[0]['loss'] != pytest.approx(afresh[0]['loss'], rel=1e-3)
    s = subject(resnets / 'r0', data_dir)
    v = landscape.filter_normalised(s.model, 0, 5)
    nn.utils.vector_to_parameters(analysis.flat(s.model.parameters()) - .3 * v,
                                  s.model.parameters())
    for module in s.model.modules():  # by hand: one batch, clean and then adversarial
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1
    s.model.train()(s.x)
    x_adv = s.pgd(s.model, s.x, s.y, seed=0)
    s.model.train()(x_adv)
    x_adv = s.pgd(s.model.eval(), s.x, s.y, seed=0)
    assert afresh[0]['loss'] == pytest.approx(F.cross_entropy(s.model(x_adv), s.y).item(), rel=1e-3)


def test_what_was_computed_is_not_lost_to_other_settings(run, data_dir):
    for more in [], ['--adversarial', 'fixed'], ['--directions', 'filter']:
        landscape.main(['surface', str(run), *flags(data_dir), '--grid', '1', *more])
    assert len(list(run.glob('surface*.json'))) == 3
    for more in [], ['--runs', '1'], ['--starts', 'independent']:
        landscape.main(['similarity', str(run), *flags(data_dir), '--a', '0.1', *more])
    assert len(list(run.glob('similarity*.json'))) == 3


def test_points_along_other_eigenvectors_are_replaced(run, data_dir, capsys):
    command = ['similarity', str(run), *flags(data_dir), '--runs', '1', '--a', '0.5']
    landscape.main(command)
    kept = record.load(run / 'hessian_n40.pt')
    result = record.load(run / 'hessian_n40.json')
    kept['vectors'] = kept['vectors'].flip(0)
    record.save(run / 'hessian_n40.pt', kept)
    landscape.main(command)
    assert 'it is replaced' in capsys.readouterr().out
    record.save(run / 'hessian_n40.pt', kept | {'digest': 'of another network'})
    with pytest.raises(ValueError, match='no top 1 eigenvectors'):
        landscape.main(command)
    hessian.main([str(run), *flags(data_dir), '--k', '2', '--draws', '1'])  # the way out
    landscape.main(command)
    assert record.load(run / 'hessian_n40.json')['eigen']['values'] == result['eigen']['values']


@pytest.mark.parametrize('content', [
    [], {'sessions': 5}, {'points': 5}, {'points': [5]}, {'points': [{'a': 1}]},
    {'points': [{'direction': 'random', 'a': .5, 'cosine': 'x'}]}])
def test_a_damaged_result_is_a_clear_error(run, data_dir, content):
    command = ['similarity', str(run), *flags(data_dir), '--runs', '1', '--a', '0.5']
    landscape.main(command)
    path = run / 'similarity_runs1_n40.json'
    record.save(path, record.load(path) | content if isinstance(content, dict) else content)
    with pytest.raises(ValueError, match='similarity_runs1_n40.json is damaged'):
        landscape.main(command)


@pytest.mark.parametrize('command, message', [
    (['surface', 'RUN', '--grid', '2', '3', '4'], 'one or two numbers, got 3'),
    (['connect', 'RUN', 'RUN'], 'one and the same network')])
def test_bad_input_is_refused(run, data_dir, command, message):
    command = [str(run) if word == 'RUN' else word for word in command]
    with pytest.raises(ValueError, match=message):
        landscape.main([*command, *flags(data_dir)])


def test_batchnorm_is_recomputed_from_adversarial_examples():
    model = network()
    x = torch.rand(50, 1, 4, 4)
    y = torch.randint(10, (50,))
    calls = []

    def pgd(model, x, y, **kwargs):
        calls.append(model[1].running_mean.clone())
        return (x + .5).clamp(max=1)

    pgd.keywords = {'batch_size': 50}
    s = type('Subject', (), {'model': model, 'x': x, 'y': y, 'pgd': staticmethod(pgd)})
    analysis.recompute_bn(s)
    clean, moved = (model[0](part).transpose(0, 1).flatten(1).mean(1).detach()
                    for part in (x, (x + .5).clamp(max=1)))
    assert len(calls) == 1 and torch.allclose(calls[0], clean, atol=1e-5)
    assert torch.allclose(model[1].running_mean, moved, atol=1e-5)


def test_runs_of_different_shapes_or_budgets_are_not_connected(pair, data_dir):
    record.save(pair / 'two/config.json',
                record.load(pair / 'two/config.json') | {'eps': .2})
    command = ['connect', str(pair / 'one'), str(pair / 'two'), *flags(data_dir)]
    with pytest.raises(ValueError, match='at eps 0.1, .* at 0.2; --eps says at which'):
        landscape.main(command)
    record.save(pair / 'two/config.json', record.load(pair / 'two/config.json') | {'width': 1})
    record.save(pair / 'two/period1.pt', models.build('lenet', 'mnist5k', 1).state_dict())
    with pytest.raises(ValueError, match='different shapes'):
        landscape.main(command)


# dead units

def test_dead_units_are_found_by_name_in_a_lenet():
    torch.manual_seed(0)
    model = models.build('lenet', 'mnist', 2)
    with torch.no_grad():
        model.conv1.bias[[0, 3]] = -100  # two dead channels of four
        model.fc1.bias.fill_(-1e4)  # a whole dead layer
    units = landscape.dead_units(model, torch.rand(30, 1, 28, 28), 7)
    assert list(units) == ['conv1', 'conv2', 'fc1']
    assert units['conv1'].tolist() == [True, False, False, True] and units['fc1'].all()
    assert not units['conv2'].all()


def test_a_unit_that_one_image_activates_is_alive():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1., -1], [-1, -1]]))
    x = torch.tensor([[0., 1], [0, .5], [.5, .4], [0, 0]]).view(4, 1, 1, 2)
    assert landscape.dead_units(model, x, 1)['1'].tolist() == [False, True]


@pytest.mark.parametrize('name, layers, first', [('vgg', 13, 'feature_extractor.1'),
                                                 ('resnet18', 17, 'bn1')])
def test_every_relu_of_the_large_networks_is_seen(name, layers, first):
    torch.manual_seed(0)
    units = landscape.dead_units(models.build(name, 'cifar10', 1), torch.rand(3, 3, 32, 32))
    assert len(units) == layers and list(units)[0] == first
    assert [len(gone) for gone in units.values()][:2] == [4, 4]


def test_the_dead_of_several_runs_are_one_table(pair, data_dir, capsys):
    model = record.rebuild(pair / 'two/period1.pt')
    with torch.no_grad():
        model.conv2.bias.fill_(-1e4)
    record.save(pair / 'two/period1.pt', model.state_dict())
    landscape.main(['dead', str(pair / 'one'), str(pair / 'two'), *flags(data_dir)])
    lines = capsys.readouterr().out.splitlines()
    assert 'conv2 DEAD' in lines[-1] and 'constant classifier' in lines[-1]
    assert 'DEAD' not in lines[-2]
    result = record.load(pair / 'two/dead_n40.json')
    layer = result['layers'][1]
    assert layer == {'layer': 'conv2', 'units': 8, 'dead': 8, 'share': 1., 'all': True}
    assert result['predicted_classes'] == 1 and (pair / 'two/dead_n40.png').exists()


# theory

def corners(x, eps):
    """All corners of the l_inf ball around x, (2^m, m): a convex function is largest at one."""
    signs = torch.tensor(list(itertools.product((-1., 1.), repeat=len(x)))).double()
    return x + eps * signs


def worst_loss(x, y, W, eps):
    """g_eps by brute force over the corners."""
    logits = corners(x, eps) @ W.T
    return (logits.logsumexp(1) - logits[:, y]).max()


@pytest.mark.parametrize('seed', range(20))
def test_theorem_1_by_brute_force(seed):
    torch.manual_seed(seed)
    x, W, y = torch.rand(6).double(), torch.randn(4, 6).double(), seed % 4
    eps = landscape.constant_eps(x[None], torch.tensor(y), W)
    assert 0 <= eps <= x.abs().max()
    for factor, constant in ((.99, False), (1.01, True)):
        zero = worst_loss(x, y, 0 * W, factor * eps)
        least = min(worst_loss(x, y, gamma * W, factor * eps)
                    for size in (1e-6, 1e-4, 1e-3, 1e-2, .1, 1) for gamma in (-size, size))
        assert (least >= zero - 1e-15) == constant


def test_theorem_1_over_a_dataset_by_brute_force():
    torch.manual_seed(0)
    x, W, y = torch.rand(3, 5).double(), torch.randn(3, 5).double(), torch.tensor([0, 2, 2])
    eps = landscape.constant_eps(x, y, W)
    for factor, constant in ((.98, False), (1.02, True)):
        def loss(gamma):
            return sum(worst_loss(x_i, y_i, gamma * W, factor * eps) for x_i, y_i in zip(x, y))
        least = min(loss(sign * size) for size in (1e-6, 1e-4, 1e-3, 1e-2) for sign in (-1, 1))
        assert (least >= loss(0) - 1e-14) == constant


@pytest.mark.parametrize('seed', range(20))
def test_proposition_1_by_brute_force(seed):
    torch.manual_seed(seed)
    x, W = torch.rand(6).double(), torch.randn(3, 6).double()
    y = int((W @ x).argmax())
    eps = landscape.version_space_eps(x, y, W)
    for factor, robust in ((.5, True), (.99, True), (1.01, False), (2, False)):
        logits = corners(x, factor * eps) @ W.T
        assert (logits - logits[:, y:y + 1]).le(1e-12).all() == robust
    assert landscape.version_space_eps(x, (y + 1) % 3, W) == -math.inf


def test_figure_1_is_the_worst_case_of_its_loss():
    theta = torch.linspace(-2, 2, 41).double()
    z = torch.linspace(-.2, 2.2, 1001).double()
    found, slope = landscape.adversarial_log_loss(theta, 1., 1.2)
    expected = torch.log(1 + torch.exp(theta[:, None] * z)).max(1).values
    assert torch.allclose(found, expected)
    assert found[20].item() == pytest.approx(math.log(2))
    numeric = (found[2:] - found[:-2]) / .2
    smooth = [i for i in range(39) if i not in (18, 19, 20)]
    assert torch.allclose(slope[1:-1][smooth], numeric[smooth], atol=1e-2)


def test_theorem_2_holds_and_its_share_is_that_of_a_plain_loop():
    points = landscape.large_gradients(.1, [2, 3], 0, n_runs=3, n_steps=400)
    assert points[0]['bound'] == 1 and points[1]['bound'] == pytest.approx(4 / 7)
    generator = torch.Generator().manual_seed(attack.derive(0, 7))
    z = .5 + torch.randn(100, generator=generator, dtype=torch.float64)
    draws = torch.randint(100, (400, 3), generator=generator)
    large = 0
    for run, theta in enumerate((-5., 0., 5.)):
        for t in range(400):
            p = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
            worst = z + .1 * (1 if theta >= 0 else -1)
            loss = torch.log(1 + torch.exp(p * worst))
            gradient, = torch.autograd.grad(loss.mean(), p, retain_graph=True)
            large += abs(gradient.item()) > 2 * .1 * 1.0998391
            step, = torch.autograd.grad(loss[draws[t, run]], p)
            theta -= 4 / ((z.abs().max().item() + .1) ** 2 * 20) * step.item()
    assert points[0]['share'] == pytest.approx(large / 1200, abs=1e-9) and large > 0


def test_theory_writes_shares_that_reach_one(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(landscape, 'large_gradients',
                        functools.partial(landscape.large_gradients, n_steps=2000))
    landscape.main(['theory', '--data-dir', str(data_dir), '--out', str(tmp_path), '--draws', '20'])
    result = record.load(tmp_path / 'theory.json')
    for row in result['theorem_1']:
        shares = row['share_in_T']
        assert shares == sorted(shares) and shares[-1] == 1
        assert row['all_in_T_from'] <= row['sufficient']
        if row['share_in_V']:
            assert row['share_in_V'] == sorted(row['share_in_V'], reverse=True)
    for row in result['theorem_2']:
        assert all(point['share'] < point['bound'] for point in row['points'])
    assert (tmp_path / 'theory.png').stat().st_size > 5000

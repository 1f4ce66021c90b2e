import hashlib
import itertools
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import analysis
import attack
import data
import hessian
import models
import record


def dense(model, x, y):
    """The Hessian of the mean cross-entropy by torch.func, (dim, dim)."""
    names, like = zip(*model.named_parameters())

    def loss(theta):
        parts = theta.split([p.numel() for p in like])
        parameters = {name: part.view(p.shape) for name, part, p in zip(names, parts, like)}
        return F.cross_entropy(functional_call(model, parameters, (x,)), y)

    return torch.func.hessian(loss)(torch.cat([p.detach().flatten() for p in like]))


def tiny_network(seed=0, activation=nn.Tanh):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), activation(), nn.Flatten(),
                          nn.Linear(8, 4)).double()
    model[1].running_mean.uniform_()
    model[1].running_var.uniform_(.5, 2)
    return model, torch.rand(11, 1, 4, 4).double(), torch.randint(4, (11,))


def symmetric(spectrum, seed=0):
    """A matrix with this spectrum and its eigenvectors as rows."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator).double())
    spectrum = torch.as_tensor(spectrum).double()
    return Q * spectrum @ Q.T, Q.T


F64 = torch.zeros(()).double()


def test_the_hessian_of_softmax_regression_is_its_closed_form():
    torch.manual_seed(0)
    x, y = torch.rand(6, 1, 2, 2).double(), torch.randint(3, (6,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).double()
    p = model(x).softmax(1).detach()
    expected = torch.zeros(12, 12).double()  # mean of (diag p - p p') kron x x'
    for x_i, p_i in zip(x.flatten(1), p):
        expected += torch.kron(torch.diag(p_i) - torch.outer(p_i, p_i), torch.outer(x_i, x_i)) / 6
    found = torch.stack([hessian.hvp(model, x, y, v) for v in torch.eye(12).double()])
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize('activation', [nn.Tanh, nn.ReLU])
def test_products_are_those_of_the_dense_hessian(activation):
    model, x, y = tiny_network(activation=activation)
    H = dense(model.eval(), x, y)
    v = torch.randn(len(H)).double()
    assert torch.allclose(hessian.hvp(model, x, y, v), H @ v, atol=1e-12)


@pytest.mark.parametrize('batch_size', [1, 3, 10, 11, 100])
def test_chunks_change_no_product(batch_size):
    model, x, y = tiny_network()
    v = torch.randn(sum(p.numel() for p in model.parameters())).double()
    whole = hessian.hvp(model, x, y, v, batch_size=11)
    assert torch.allclose(hessian.hvp(model, x, y, v, batch_size), whole, atol=1e-13)


def test_as_many_graphs_are_kept_as_the_memory_holds_and_they_change_no_product():
    model, x, y = tiny_network()
    v, w = torch.randn(2, sum(p.numel() for p in model.parameters())).double()
    graph = hessian.Hessian(model, x[:3], y[:3]).gradient(x[:3], y[:3])[2]
    for memory, kept in (0, 0), (2.5 * graph, 2), (1e9, 4):
        H = hessian.Hessian(model, x, y, 3, memory=memory)
        for u in v, w, v:
            assert torch.equal(H(u), hessian.hvp(model, x, y, u, 3))
            assert len(H.kept) == kept


def test_a_graph_counts_at_least_the_activations_it_holds():
    model, x, y = models.LeNet(2), torch.rand(10, 1, 28, 28), torch.zeros(10, dtype=torch.long)
    size = hessian.Hessian(model, x, y).gradient(x, y)[2]
    assert 4 * 10 * (4 * 28 * 28 + 2 * 4 * 14 * 14) < size < 100 * 4 * 10 * 4 * 28 * 28


def test_a_chunk_is_as_large_as_memory_and_the_flag_allow(monkeypatch):
    model, x, y = models.LeNet(2), torch.rand(99, 1, 28, 28), torch.zeros(99, dtype=torch.long)
    H = hessian.Hessian(model, x, y)
    for memory, most, expected in (1, 250, 1), (1e12, 250, 250), (1e12, 30, 30):
        monkeypatch.setattr(models, 'memory', lambda device: (0, memory))
        assert hessian.fitting_chunk(model, x, y, most) == expected
    memory = 2 ** 25
    monkeypatch.setattr(models, 'memory', lambda device: (0, memory))
    found = hessian.fitting_chunk(model, x, y)
    assert 1 < found < 99
    assert .3 * memory / 8 < H.gradient(x[:found], y[:found])[2] <= memory / 8


@pytest.mark.parametrize('change', [
    lambda model: next(model.parameters()).data.mul_(2),
    lambda model: model[1].running_mean.add_(1),
    lambda model: model[1].running_var.mul_(2)], ids=['parameter', 'mean', 'variance'])
def test_products_follow_parameters_and_statistics_that_change(change):
    model, x, y = tiny_network()
    v = torch.randn(sum(p.numel() for p in model.parameters())).double()
    H = hessian.Hessian(model, x, y)
    before = H(v)
    change(model)
    assert torch.equal(H(v), hessian.hvp(model, x, y, v)) and not torch.allclose(H(v), before)


@pytest.mark.parametrize('name, dataset', [('lenet', 'mnist'), ('vgg', 'cifar10'),
                                           ('resnet18', 'cifar10')])
def test_products_are_symmetric_and_linear(name, dataset):
    torch.manual_seed(1)
    model = models.build(name, dataset, 1).double()
    channels, size = models.SHAPES[dataset]
    x, y = torch.rand(3, channels, size, size).double(), torch.tensor([0, 5, 9])
    dim = sum(p.numel() for p in model.parameters())
    u, v = torch.randn(2, dim).double()
    Hu, Hv = (hessian.hvp(model, x, y, w, 2) for w in (u, v))
    assert torch.isclose(u @ Hv, v @ Hu, rtol=1e-9)
    assert torch.allclose(hessian.hvp(model, x, y, 2 * u - v), 2 * Hu - Hv, atol=1e-9)


def test_a_product_leaves_the_model_as_it_was():
    model, x, y = tiny_network()
    model.train()
    model[0].weight.requires_grad_(False)
    model[4].bias.grad = torch.ones(4).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hessian.hvp(model, x, y, torch.ones(sum(p.numel() for p in model.parameters())).double())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert [p.grad is None for p in model.parameters()] == [True] * 5 + [False]
    assert torch.equal(model[4].bias.grad, torch.ones(4).double())


def test_a_network_that_is_not_finite_is_refused():
    model, x, y = tiny_network()
    with torch.no_grad():
        model[4].weight.fill_(math.inf)
    with pytest.raises(ValueError, match='not finite'):
        hessian.hvp(model, x, y, torch.ones(sum(p.numel() for p in model.parameters())).double())


SPECTRA = {
    'falling': [.8 ** i for i in range(60)],
    'negative': [(-.8) ** i for i in range(60)],
    'close': [10, 9.9, 9.8, 5, 4.95] + [.8 ** i for i in range(40)],
    'double': [7, 7, 3, 3, 2, 1] + [.5 * .8 ** i for i in range(40)],
    'triple': [7, 7, 7, 3, 2, 1] + [.5 * .8 ** i for i in range(40)],
    'nine': [.1] * 9 + [0] * 40,
    'nine above a tail': [.1] * 9 + [.05 * .9 ** i for i in range(60)],
    'small and close': [1, 1e-4, .99e-4, .98e-4, .97e-4] + [.5e-4 * .8 ** i for i in range(40)],
    'low rank': [5, -4, 3] + [0] * 40,
    'zero': [0] * 12,
    'identity': [1] * 12,
    'all of it': [3, -2, 1, .5, .1],
}


@pytest.mark.parametrize('solver', list(hessian.SOLVERS))
@pytest.mark.parametrize('case', list(SPECTRA))
def test_solvers_find_a_known_spectrum(solver, case):
    spectrum = torch.tensor(SPECTRA[case]).double()
    H, _ = symmetric(spectrum)
    k = min(5, len(spectrum))
    values, vectors, residuals = hessian.SOLVERS[solver](
        lambda v: H @ v, len(H), k, tol=1e-6, max_products=50000, like=F64)
    expected = spectrum[spectrum.abs().argsort(descending=True, stable=True)[:k]]
    assert torch.allclose(values, expected, atol=1e-8, rtol=1e-6)
    assert torch.allclose(vectors @ vectors.T, torch.eye(k).double(), atol=1e-8)
    true = (H @ vectors.T - vectors.T * values).norm(dim=0)
    assert torch.allclose(residuals * values.abs(), true, atol=1e-10, rtol=.01)
    assert all(v[v.abs().argmax()] > 0 for v in vectors)
    assert hessian.converged(values, residuals, 2e-6, torch.float64).all()


def test_eigenvectors_are_those_of_the_matrix():
    H, expected = symmetric(SPECTRA['negative'])
    _, vectors, _ = hessian.lanczos(lambda v: H @ v, 60, 5, tol=1e-9, max_products=60, like=F64)
    assert torch.allclose((vectors * expected[:5]).sum(1).abs(), torch.ones(5).double(), atol=1e-9)


@pytest.mark.parametrize('solver', list(hessian.SOLVERS))
def test_pairs_that_have_not_converged_are_told(solver):
    H, _ = symmetric(SPECTRA['falling'])
    calls = []

    def matvec(v):
        calls.append(1)
        return H @ v

    values, vectors, residuals = hessian.SOLVERS[solver](matvec, 60, 5, tol=1e-6, max_products=10,
                                                         like=F64)
    good = hessian.converged(values, residuals, 1e-6, torch.float64)
    true = (H @ vectors.T - vectors.T * values).norm(dim=0) / values.abs()
    assert len(calls) == 10 and not good.all()
    assert torch.equal(good, true <= 1e-6) and torch.allclose(residuals, true, atol=1e-9)


@pytest.mark.parametrize('solver', list(hessian.SOLVERS))
@pytest.mark.parametrize('copies, k', [(9, 5), (9, 10), (9, 20)])
def test_no_copy_of_a_multiple_eigenvalue_is_missed_in_float32(solver, copies, k):
    d = torch.cat([torch.full((copies,), .1), torch.zeros(3000)])  # a network with a dead layer
    values, _, residuals = hessian.SOLVERS[solver](lambda v: d * v, len(d), k)
    expected = torch.tensor([.1] * min(copies, k) + [0] * (k - copies)).double()
    assert torch.allclose(values, expected, atol=1e-5)
    assert hessian.converged(values, residuals, 1e-3, torch.float32).all()


@pytest.mark.parametrize('solver', list(hessian.SOLVERS))
def test_eigenvalues_of_a_matrix_of_millions_are_right_to_six_digits(solver):
    d = torch.cat([torch.tensor([3., -2, 1]), torch.full((1_000_000,), .01)])
    values, vectors, _ = hessian.SOLVERS[solver](lambda v: d * v, len(d), 3, tol=1e-4)
    assert torch.allclose(values, torch.tensor([3., -2, 1]).double(), rtol=2e-6)
    assert torch.allclose((vectors.double() ** 2).sum(1), torch.ones(3).double(), atol=2e-6)


@pytest.mark.parametrize('block', [1, 3])
def test_eigenvalues_are_right_though_the_basis_is_orthonormal_only_to_rounding(block):
    expected = torch.linspace(36, 7, 20)
    d = torch.cat([expected, torch.linspace(0, 1e-4, 100_000)])
    values, _, residuals = hessian.lanczos(lambda v: d * v, len(d), 20, tol=1e-4, block=block)
    assert (residuals <= 1e-4).all() and (values - expected).abs().max() < 36e-6


def test_small_pairs_that_are_not_zero_must_converge_too():
    d = torch.cat([torch.ones(1), torch.linspace(1e-4, .3e-4, 999)])
    values, vectors, residuals = hessian.lanczos(lambda v: d * v, 1000, 6, max_products=40)
    good = hessian.converged(values, residuals, 1e-3, torch.float32)
    true = (vectors * d - vectors * values.float()[:, None]).norm(dim=1) / values.abs()
    assert not good.all() and torch.all(true[good] <= 1.1e-3)


@pytest.mark.parametrize('solver', list(hessian.SOLVERS))
def test_a_solver_goes_on_from_its_state(solver, tmp_path):
    H, _ = symmetric(SPECTRA['negative'])
    calls = []

    def matvec(v):
        calls.append(1)
        return H @ v

    def watch(state, values, residuals):
        if len(calls) == 12:
            record.save(tmp_path / 'state.pt', state())
    run = hessian.SOLVERS[solver]
    whole = run(matvec, 60, 5, max_products=5000, like=F64, watch=watch)
    n = len(calls)
    state = record.load(tmp_path / 'state.pt')
    resumed = run(matvec, 60, 5, max_products=5000, like=F64, state=state)
    assert len(calls) - n == n - 12 and all(torch.equal(a, b) for a, b in zip(whole, resumed))


def test_lanczos_takes_an_eighth_of_the_products_of_power_iteration():
    H, _ = symmetric([1 / (1 + i / 3) ** 1.5 for i in range(400)])
    calls = {}
    for name, solver in hessian.SOLVERS.items():
        calls[name] = 0

        def matvec(v):
            calls[name] += 1
            return H @ v

        _, _, residuals = solver(matvec, 400, 20, max_products=10000, like=F64)
        assert residuals.max() <= 1.01e-3
    assert calls['lanczos'] <= calls['power'] / 8


@pytest.mark.parametrize('k', [0, 6])
def test_more_pairs_than_there_are_is_refused(k):
    for solver in hessian.SOLVERS.values():
        with pytest.raises(ValueError, match='k must be 1..5'):
            solver(lambda v: v, 5, k)


def test_fewer_products_than_pairs_is_refused():
    for solver in hessian.SOLVERS.values():
        with pytest.raises(ValueError, match='at least 5 products'):
            solver(lambda v: v, 50, 5, max_products=4)


def test_the_density_has_mass_one_and_the_moments_of_the_spectrum():
    spectrum = torch.cat([torch.linspace(-1, 1, 200), torch.tensor([5., 8])]).double()
    H, _ = symmetric(spectrum)
    probes = [hessian.quadrature(lambda v: H @ v, 202, 10, like=F64, seed=i) for i in range(400)]
    nodes, weights = (torch.stack(parts) for parts in zip(*probes))
    assert torch.allclose(weights.sum(1), torch.ones(400).double())
    for power in 1, 2, 3:
        moments = (weights * nodes ** power).sum(1)
        error = moments.std() / 20
        assert (moments.mean() - (spectrum ** power).mean()).abs() < 4 * error
    grid, density = hessian.smooth(nodes, weights)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-3)


def test_a_probe_of_the_density_integrates_polynomials_exactly():
    H, _ = symmetric(SPECTRA['negative'])
    nodes, weights = hessian.quadrature(lambda v: H @ v, 60, 4, like=F64, seed=3)
    z = hessian.rademacher(60, F64, 3) / 60 ** .5
    for power in range(8):  # below 2 x 4
        exact = z @ torch.linalg.matrix_power(H, power) @ z
        assert (weights * nodes ** power).sum().item() == pytest.approx(exact.item(), abs=1e-12)


def test_the_density_of_a_matrix_of_low_rank_has_its_zeros():
    H, _ = symmetric([2.] * 10 + [0.] * 30)
    parts = [hessian.quadrature(lambda v: H @ v, 40, 20, like=F64, seed=i) for i in range(100)]
    zero = sum(weights[nodes.abs() < 1e-9].sum() for nodes, weights in parts) / 100
    assert zero.item() == pytest.approx(.75, abs=.05)


def test_the_trace_is_within_its_standard_error():
    torch.manual_seed(0)
    H = torch.randn(50, 50).double()
    H = H + H.T
    probes = [hessian.rademacher(50, F64, i) for i in range(400)]
    value, error = hessian.mean([(z @ H @ z).item() for z in probes])
    variance = 2 * ((H ** 2).sum() - (H.diag() ** 2).sum())  # of Hutchinson's estimate
    assert abs(value - H.trace()) < 4 * error
    assert error == pytest.approx((variance / 400).sqrt().item(), rel=.15)


def test_top_eigenvalues_on_real_adversarial_digits_are_those_of_the_dense_hessian(data_dir):
    x, y = (part[:200] for part in data.load('mnist5k', data_dir)[:2])
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 8), nn.ReLU(),
                          nn.Linear(8, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(attack.pgd(model, x, y, .1, .05, 3)), y).backward()
        optimizer.step()
    x_adv = attack.pgd(model, x, y, .1, .05, 3).double()
    spectrum = torch.linalg.eigvalsh(dense(model.double(), x_adv, y))
    expected = spectrum[spectrum.abs().argsort(descending=True)[:20]]
    values, _, residuals = hessian.lanczos(lambda v: hessian.hvp(model, x_adv, y, v), len(spectrum),
                                           20, tol=1e-8, like=F64)
    assert residuals.max() <= 1e-8 and torch.allclose(values, expected, rtol=1e-8)
    value, error = hessian.mean([(z @ hessian.hvp(model, x_adv, y, z)).item() for z in (
        hessian.rademacher(len(spectrum), F64, i) for i in range(100))])
    assert abs(value - spectrum.sum()) < 4 * error


@pytest.fixture
def run(runs, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(runs / 'single', tmp_path / 'run')


def flags_of(run, data_dir, *more):
    return [str(run), '--data-dir', str(data_dir), '--device', 'cpu', '--n-examples', '60', '--k',
            '3', '--draws', '2', *more]


def test_the_command_writes_what_it_found(run, data_dir, capsys):
    flags = flags_of(run, data_dir, '--trace', '3', '--density', '1')
    hessian.main(flags)
    result, kept = record.load(run / 'hessian_n60.json'), record.load(run / 'hessian_n60.pt')
    s = analysis.subject(run, hessian.parse(flags))
    x_adv = s.pgd(s.model, s.x, s.y, seed=0)
    eigen = result['eigen']
    for v, value, residual in zip(kept['vectors'], eigen['values'], eigen['residuals']):
        error = (hessian.hvp(s.model, x_adv, s.y, v) - value * v).norm() / abs(value)
        assert error.item() == pytest.approx(residual, rel=.05, abs=1e-5) and residual <= 1e-3
    loss = F.cross_entropy(s.model(x_adv), s.y).item()
    assert result['loss'] == pytest.approx(loss, rel=1e-5)
    assert all(eigen['converged']) and eigen['products'] > 3
    assert len(result['trace']['estimates']) == 3 and len(result['density']['nodes'][0]) == 50
    assert len(result['scale']['losses']) == 2
    assert result['scale']['mean'] == pytest.approx(math.log(10), abs=.2)
    assert (run / 'hessian_n60.png').stat().st_size > 5000
    assert result['digest'] == hashlib.sha256((run / 'period1.pt').read_bytes()).hexdigest()
    assert 'not converged' not in capsys.readouterr().out


def test_given_again_only_what_is_new_is_computed(run, data_dir, monkeypatch):
    hessian.main(flags_of(run, data_dir, '--trace', '2'))
    before = record.load(run / 'hessian_n60.json')
    product, calls = hessian.Hessian.__call__, []
    monkeypatch.setattr(hessian.Hessian, '__call__', lambda *a: calls.append(1) or product(*a))
    hessian.main(flags_of(run, data_dir, '--trace', '5'))
    after = record.load(run / 'hessian_n60.json')
    assert len(calls) == 3 and after['eigen'] == before['eigen']
    assert after['trace']['estimates'][:2] == before['trace']['estimates']


def test_one_probe_has_no_error_and_less_asked_for_later_loses_nothing(run, data_dir, capsys):
    hessian.main(flags_of(run, data_dir, '--trace', '1'))
    assert 'trace' in capsys.readouterr().out
    hessian.main(flags_of(run, data_dir, '--k', '2', '--density', '1'))
    result = record.load(run / 'hessian_n60.json')
    assert len(result['eigen']['values']) == 3 and len(result['density']['nodes']) == 1


def test_the_state_of_a_solver_is_as_large_as_what_it_computed(tmp_path):
    d, sizes = torch.linspace(0, 1, 5000), []

    def watch(state, values, residuals):
        record.save(tmp_path / 'state.pt', state())
        sizes.append((tmp_path / 'state.pt').stat().st_size)

    hessian.lanczos(lambda v: d * v, 5000, 2, max_products=8, watch=watch)
    assert sizes[0] < 4 * 5000 * 5 and sizes[-1] < 4 * 5000 * 13


@pytest.mark.parametrize('part', [
    {'eigen': 5}, {'eigen': {'values': 5}}, {'scale': 5}, {'trace': [1]},
    {'trace': {'estimates': ['x']}}, {'density': {'nodes': 1}}, {'robust_error': None},
    {'scale': {'mean': 0, 'n_draws': 1}}, {'density': {'nodes': [[1]], 'weights': []}}], ids=str)
def test_a_result_with_damaged_parts_is_a_clear_error(run, data_dir, part):
    hessian.main(flags_of(run, data_dir))
    path = run / 'hessian_n60.json'
    record.save(path, record.load(path) | part)
    with pytest.raises(ValueError, match='hessian_n60.json is damaged'):
        hessian.main(flags_of(run, data_dir))


def test_damaged_eigenvectors_are_computed_again(run, data_dir):
    hessian.main(flags_of(run, data_dir))
    whole = (run / 'hessian_n60.pt').read_bytes()
    for content in whole[:1000], b'':
        (run / 'hessian_n60.pt').write_bytes(content)
        hessian.main(flags_of(run, data_dir))
        assert record.load(run / 'hessian_n60.pt')['vectors'].shape[0] == 3


def test_a_result_of_another_checkpoint_is_replaced(run, data_dir, capsys):
    hessian.main(flags_of(run, data_dir))
    first = record.load(run / 'hessian_n60.json')
    state = record.load(run / 'period1.pt')
    record.save(run / 'period1.pt', {key: 1.1 * value for key, value in state.items()})
    hessian.main(flags_of(run, data_dir))
    assert 'it is replaced' in capsys.readouterr().out
    assert record.load(run / 'hessian_n60.json')['eigen']['values'] != first['eigen']['values']


def test_unconverged_pairs_are_marked_on_the_terminal(run, data_dir, capsys):
    hessian.main(flags_of(run, data_dir, '--max-products', '4'))
    out = capsys.readouterr().out
    eigen = record.load(run / 'hessian_n60.json')['eigen']
    bad = 3 - sum(eigen['converged'])
    assert eigen['products'] == 4 and out.count('  not converged') == bad > 0


@pytest.mark.parametrize('solver', list(hessian.SOLVERS))
def test_a_killed_computation_goes_on_to_the_same_pairs(run, data_dir, solver, monkeypatch):
    flags = flags_of(run, data_dir, '--solver', solver, '--max-products', '36')
    name = 'hessian_n60' if solver == 'lanczos' else 'hessian_power_n60'
    hessian.main(flags)
    whole = record.load(run / f'{name}.json')['eigen']
    (run / f'{name}.json').unlink()
    clock = itertools.count(0, 100)  # a minute has passed whenever the time is asked for
    monkeypatch.setattr(hessian.time, 'monotonic', lambda: next(clock))
    product, calls = hessian.Hessian.__call__, []

    def kill(*args):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        return product(*args)

    monkeypatch.setattr(hessian.Hessian, '__call__', kill)
    with pytest.raises(KeyboardInterrupt):
        hessian.main(flags)
    assert (run / f'{name}.state.pt').exists()
    monkeypatch.setattr(hessian.Hessian, '__call__', lambda *a: calls.append(1) or product(*a))
    hessian.main(flags)
    resumed = record.load(run / f'{name}.json')['eigen']
    assert not (run / f'{name}.state.pt').exists()
    assert len(calls) < whole['products'] + 5  # what was kept is not computed again
    assert resumed | {'seconds': 0} == whole | {'seconds': 0}


def test_draws_of_theta_follow_the_initialiser_and_leave_the_model(run, data_dir):
    s = analysis.subject(run, hessian.parse(flags_of(run, data_dir)))
    before = analysis.flat(s.model.parameters())
    found = hessian.scale(s, 2, 0)
    assert torch.equal(analysis.flat(s.model.parameters()), before)
    torch.manual_seed(attack.derive(0, 1))
    model = models.build('lenet', 'mnist5k', 2)
    x_adv = s.pgd(model, s.x, s.y, seed=0)
    assert found['losses'][1] == pytest.approx(F.cross_entropy(model(x_adv), s.y).item(), rel=1e-5)


@pytest.mark.parametrize('flags, message', [
    (['--n-examples', '2000'], 'trained on 1000 images'),
    (['--k', '99999999'], 'k must be 1..'),
    (['--max-products', '2'], 'at least 3 products'),
    (['--dataset', 'mnist'], 'is of mnist5k'),
])
def test_bad_input_is_refused(run, data_dir, flags, message):
    with pytest.raises(ValueError, match=message):
        hessian.main([*flags_of(run, data_dir), *flags])


def test_a_folder_that_is_no_run_is_refused(tmp_path, data_dir):
    with pytest.raises(ValueError, match='no config.json'):
        hessian.main(flags_of(tmp_path, data_dir))


def test_a_damaged_result_is_named(run, data_dir):
    (run / 'hessian_n60.json').write_text('{"n":')
    with pytest.raises(ValueError, match='hessian_n60.json is truncated'):
        hessian.main(flags_of(run, data_dir))


def test_a_checkpoint_outside_of_a_run_is_taken_by_its_shapes(run, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(run / 'period1.pt', 'released.pt')
    hessian.main([*flags_of('released.pt', data_dir, '--dataset', 'mnist5k', '--eps', '0.1')])
    result, = (record.load(path) for path in tmp_path.glob('evals/checkpoint_*/hessian*.json'))
    assert result['attack'] == {'name': 'pgd', 'step_size': .01, 'n_iter': 20}


def test_a_result_does_not_depend_on_the_batch_size(run, data_dir):
    found = []
    for batch_size in '7', '60':
        hessian.main(flags_of(run, data_dir, '--batch-size', batch_size, '--seed', '3',
                              '--float64'))
        path = run / 'hessian_n60_seed3_float64.json'
        found.append(torch.tensor(record.load(path)['eigen']['values']))
        path.unlink()
    assert torch.allclose(*found, rtol=1e-9)

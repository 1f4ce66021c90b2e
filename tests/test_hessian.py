import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import printed
from torch import nn
from torch.func import functional_call

import data
import hessian
import models
from lib import analysis, record, rng
from lib.classifier import flat, unflat

F64 = torch.zeros(()).double()


def dense(model, x, y):
    """The Hessian of the mean cross-entropy by torch.func, (dim, dim)."""
    names, like = zip(*model.named_parameters())

    def loss(theta):
        parameters = dict(zip(names, unflat(theta, like)))
        return F.cross_entropy(functional_call(model, parameters, (x,)), y)

    return torch.func.hessian(loss)(torch.cat([p.detach().flatten() for p in like]))


def tiny_network(activation=nn.Tanh):
    """A network with BatchNorm, images, labels and a random direction."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), activation(), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(*layers).double()
    model[1].running_mean.uniform_()
    model[1].running_var.uniform_(0.5, 2)
    x, y = torch.rand(11, 1, 4, 4).double(), torch.randint(4, (11,))
    return model, x, y, torch.randn(sum(p.numel() for p in model.parameters())).double()


def symmetric(spectrum):
    """A matrix with this spectrum."""
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum)).double())
    return Q * torch.as_tensor(spectrum).double() @ Q.T


@pytest.mark.parametrize('batch_size', [1, 3, 11, 100])
@pytest.mark.parametrize('activation', [nn.Tanh, nn.ReLU])
def test_products_are_those_of_the_dense_hessian(activation, batch_size):
    model, x, y, v = tiny_network(activation)
    H = dense(model.eval(), x, y)
    assert torch.allclose(hessian.hvp(model, x, y, v, batch_size), H @ v, atol=1e-12)


def test_as_many_graphs_are_kept_as_fit_and_they_change_no_product():
    model, x, y, v = tiny_network()
    size = hessian.Hessian(model, x[:3], y[:3]).gradient(x[:3], y[:3])[2]
    for keep, kept in (0, 0), (2.5 * size, 2), (1e9, 4):
        H = hessian.Hessian(model, x, y, 3, keep)
        for u in v, v.flip(0), v:
            assert torch.equal(H(u), hessian.hvp(model, x, y, u, 3))
            assert len(H.graphs) == kept


def test_memory_does_not_grow_with_the_number_of_images():
    code = """
import torch, hessian, models
model = models.LeNet(4, 1, 28, 10)
x, y, v = torch.rand(400, 1, 28, 28), torch.zeros(400).long(), torch.ones(206954)
hessian.hvp(model, x[:80], y[:80], v, 40)
before = peak()
hessian.hvp(model, x, y, v, 40)
print(peak() - before)
"""
    assert printed(code) < 20e6  # the graphs of all take 63 MB


def test_a_product_that_is_not_finite_or_would_be_wrong_is_refused():
    model, x, y, v = tiny_network()
    model[4].weight.data.fill_(math.inf)
    with pytest.raises(ValueError, match='not finite'):
        hessian.hvp(model, x, y, v)
    model[2].forward = lambda h: torch.sigmoid(h).mul_(2)
    with pytest.raises(ValueError, match='changes in place what its gradient'):
        hessian.hvp(model, x, y, v)


def test_a_product_leaves_the_model_as_it_was():
    model, x, y, v = tiny_network()
    model.train()[0].weight.requires_grad_(False)
    model[4].bias.grad = torch.ones(4).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hessian.hvp(model, x, y, v)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    *others, last = (p.grad for p in model.parameters())
    assert others == [None] * 5 and torch.equal(last, torch.ones(4).double())


SPECTRA = {
    'negative': [(-0.8) ** i for i in range(60)],
    'triple': [7, 7, 7, 3, 2, 1] + [0.5 * 0.8**i for i in range(40)],
    'nine above a tail': [0.1] * 9 + [0.05 * 0.9**i for i in range(60)],
    'small and close': [1, 1e-4, 0.99e-4, 0.98e-4, 0.97e-4] + [0.5e-4 * 0.8**i for i in range(40)],
    'low rank': [5, -4, 3] + [0] * 40,
    'zero': [0] * 12,
    'all of it': [3, -2, 1, 0.5, 0.1],
}
each_solver = pytest.mark.parametrize('solver', hessian.SOLVERS.values())


@each_solver
@pytest.mark.parametrize('case', SPECTRA)
def test_solvers_find_a_known_spectrum(solver, case):
    spectrum = torch.tensor(SPECTRA[case]).double()
    H = symmetric(spectrum)
    options = {'tol': 1e-6, 'max_products': 50000, 'like': F64}
    values, vectors, residuals, good = solver(lambda v: H @ v, len(H), 5, **options)
    expected = spectrum[spectrum.abs().argsort(descending=True, stable=True)[:5]]
    assert torch.allclose(values, expected, atol=1e-8, rtol=1e-6)
    assert torch.allclose(vectors @ vectors.T, torch.eye(5).double(), atol=1e-8)
    true = (H @ vectors.T - vectors.T * values).norm(dim=0)
    assert (true <= 1.01 * residuals * values.abs() + 1e-10).all()
    assert all(v[v.abs().argmax()] > 0 for v in vectors)
    assert good.all() or solver is hessian.power_iteration  # Rayleigh-Ritz may end just above tol


@pytest.mark.parametrize('solver, n', [('lanczos', 10), ('power', 10), ('lanczos', 17)])
def test_which_pairs_have_converged_is_told_also_after_the_last_product(solver, n):
    H, calls = symmetric(SPECTRA['negative']), []
    options = {'tol': 1e-6, 'max_products': n, 'like': F64}
    find = hessian.SOLVERS[solver]
    values, vectors, residuals, good = find(lambda v: calls.append(1) or H @ v, 60, 5, **options)
    true = (H @ vectors.T - vectors.T * values).norm(dim=0) / values.abs()
    assert len(calls) == n and good.all() == (n == 17)
    assert torch.equal(good, true <= 1e-6) and torch.allclose(residuals, true, atol=1e-9)


@each_solver
@pytest.mark.parametrize('k', [5, 10, 20])
def test_no_copy_of_a_multiple_eigenvalue_is_missed_in_float32(solver, k):
    d = torch.cat([torch.full((9,), 0.1), torch.zeros(3000)])  # a network with a dead layer
    values, _, _, good = solver(lambda v: d * v, len(d), k)
    expected = torch.tensor([0.1] * min(9, k) + [0] * (k - 9)).double()
    assert torch.allclose(values, expected, atol=1e-5) and good.all()


def test_eigenvalues_of_a_matrix_of_millions_are_right_to_six_digits():
    expected = torch.linspace(36, 7, 20)
    d = torch.cat([expected, torch.linspace(0, 1e-4, 1_000_000)])
    values, vectors, residuals, _ = hessian.top_eigenpairs(lambda v: d * v, len(d), 20, tol=1e-4)
    true = (vectors * d - vectors * values.float()[:, None]).norm(dim=1) / values.abs()
    assert (true <= residuals).all() and (residuals <= 1e-4).all()
    assert (values - expected).abs().max() < 36e-6


def test_small_pairs_that_are_not_zero_must_converge_too():
    d = torch.cat([torch.ones(1), torch.linspace(1e-4, 0.3e-4, 999)])
    values, vectors, _, good = hessian.top_eigenpairs(lambda v: d * v, 1000, 6, max_products=40)
    true = (vectors * d - vectors * values.float()[:, None]).norm(dim=1) / values.abs()
    assert not good.all() and torch.all(true[good] <= 1.1e-3)


def test_parameters_that_the_loss_does_not_use_have_zero_rows():
    model, x, y, v = tiny_network()
    expected = hessian.hvp(model, x, y, v)
    model[3].unused = nn.Parameter(torch.ones(2, 3).double())  # before those of the linear layer
    first = sum(p.numel() for p in model[:3].parameters())
    found = hessian.hvp(model, x, y, torch.cat([v[:first], torch.ones(6), v[first:]]))
    assert torch.allclose(torch.cat([found[:first], found[first + 6 :]]), expected, atol=1e-12)
    assert not found[first : first + 6].any()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    assert not hessian.hvp(linear, x, torch.zeros_like(y), torch.ones(17).double()).any()


def test_a_probe_of_the_density_integrates_polynomials_exactly():
    H = symmetric(SPECTRA['negative'])
    density = hessian.density(lambda v: H @ v, 60, 4, like=F64, seed=3)
    nodes, weights = torch.tensor(density, dtype=torch.float64)
    z = rng.rademacher(60, F64, 3) / 60**0.5
    for power in range(8):  # below 2 x 4
        exact = z @ torch.linalg.matrix_power(H, power) @ z
        assert (weights * nodes**power).sum().item() == pytest.approx(exact.item(), abs=1e-12)


def test_estimates_of_the_trace_have_its_mean_and_hutchinsons_variance():
    torch.manual_seed(0)
    H = torch.randn(50, 50).double()
    H = H + H.T
    probes = [hessian.trace(lambda v: H @ v, 50, like=F64, seed=i) for i in range(400)]
    mean, std = torch.tensor(probes).mean(), torch.tensor(probes).std()
    deviation = (2 * ((H**2).sum() - (H.diag() ** 2).sum())).sqrt()
    assert abs(mean - H.trace()) < 4 * deviation / 20
    assert std.item() == pytest.approx(deviation.item(), rel=0.15)


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs / 'single', tmp_path / 'run')


FLAGS = '--device cpu --n-examples 60 --k 3 --draws 2'.split()


def compute(run, *flags):
    """The result of the command with these flags."""
    return record.load(hessian.main([str(run), *FLAGS, *flags]))


def test_bad_input_is_refused(run, tmp_path):
    (run / 'hessian_n20.json').write_text('{"n":')
    for path, flags, message in (
        (run, '--n-examples 2000', 'trained on 1000 images'),
        (run, '--k 99999999', '--k 99999999'),
        (run, '--max-products 2', '2 products at most'),
        (run, '--n-examples 20', 'hessian_n20.json cannot be read'),
        (tmp_path, '--k 3', 'no config.json'),
    ):
        with pytest.raises(ValueError, match=message):
            compute(path, *flags.split())


def test_the_command_writes_what_it_found(run):
    result = compute(run, '--trace', '3', '--density', '1')
    s = analysis.load_run(run, hessian.parse([str(run), *FLAGS]))
    x_adv, found = s.pgd(s.model, s.x, s.y, seed=0), result['eigen']
    vectors = record.load(run / 'hessian_n60.pt')['vectors']
    for v, value, residual in zip(vectors, found['values'], found['residuals']):
        error = (hessian.hvp(s.model, x_adv, s.y, v) - value * v).norm() / abs(value)
        assert error.item() == pytest.approx(residual, rel=0.05, abs=1e-5) and residual <= 1e-3
    assert result['loss'] == pytest.approx(F.cross_entropy(s.model(x_adv), s.y).item(), rel=1e-5)
    assert all(found['converged']) and found['products'] > 3
    ((nodes, weights),) = result['densities']
    assert len(result['traces']) == 3 and len(nodes) == len(weights) == 50
    assert len(set(result['random_losses'])) == 2


def test_only_what_is_missing_is_computed_and_less_loses_nothing(run, monkeypatch, capsys):
    first = compute(run, '--max-products', '4')['eigen']
    assert first['products'] == 4 and not all(first['converged'])
    assert 'raise --max-products' in capsys.readouterr().out
    before = compute(run, '--trace', '2', '--density', '1')
    assert all(before['eigen']['converged'])
    product, calls = hessian.Hessian.__call__, []
    monkeypatch.setattr(hessian.Hessian, '__call__', lambda *a: calls.append(1) or product(*a))
    after = compute(run, '--trace', '5', '--k', '2', '--draws', '1')
    assert len(calls) == 3
    assert all(after[part] == before[part] for part in ('eigen', 'random_losses', 'densities'))
    assert after['traces'][:2] == before['traces']
    monkeypatch.setattr(hessian, 'mean_loss', None)
    assert compute(run) == after  # nothing is attacked


def test_lost_eigenvectors_are_made_again(run):
    path = run / 'hessian_n60.pt'
    compute(run)
    before = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match='--k 2 would replace 3 pairs in .*hessian_n60.json'):
        compute(run, '--k', '2')
    compute(run)
    assert path.read_bytes() == before


def test_draws_of_theta_follow_the_initialiser_and_leave_the_model(run):
    s = analysis.load_run(run, hessian.parse([str(run), *FLAGS]))
    before = flat(s.model.parameters())
    found = hessian.loss_normalizer(s, 7)
    assert torch.equal(flat(s.model.parameters()), before)
    torch.manual_seed(7)
    model = models.build('lenet', data.DATASETS['mnist5k'], 2)
    x_adv = s.pgd(model, s.x, s.y, seed=7)
    assert found == pytest.approx(F.cross_entropy(model(x_adv), s.y).item(), rel=1e-5)


def test_a_checkpoint_outside_of_a_run_is_taken_by_its_shapes(run):
    shutil.copy(run / 'period1.pt', 'released.pt')
    result = compute('released.pt', '--dataset', 'mnist5k', '--eps', '0.1')
    assert result['attack'] == {'name': 'pgd', 'step_size': 0.01, 'n_iter': 20}

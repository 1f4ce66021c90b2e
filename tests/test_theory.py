import functools
import itertools
import math

import pytest
import torch

import theory
from lib import record, rng


def logits_at_corners(x, W, eps):
    """(2^m, K): a convex function is largest over the ball around x, (m,), at a corner."""
    corners = itertools.product((-eps, eps), repeat=len(x))
    return (x + torch.tensor(list(corners)).double()) @ W.T


@pytest.mark.parametrize('seed', range(9))
def test_constant_eps_by_brute_force(seed):
    torch.manual_seed(seed)
    x, W, y = torch.rand(6).double(), torch.randn(4, 6).double(), seed % 4
    eps = theory.constant_eps(x, y, W)
    assert 0 <= eps <= x.abs().max()
    for factor in 0.98, 1.02:  # the best multiple of W beats the constant classifier below eps
        losses = []
        for gamma in (sign * 10.0**i for i in range(-6, 1) for sign in (-1, 1)):
            logits = logits_at_corners(x, gamma * W, factor * eps)
            losses.append((logits.logsumexp(1) - logits[:, y]).max().item() - math.log(4))
        assert min(losses) < -1e-12 if factor < 1 else min(losses) > -1e-14


@pytest.mark.parametrize('seed', range(10))
def test_proposition_1_by_brute_force(seed):
    torch.manual_seed(seed)
    x, W = torch.rand(6).double(), torch.randn(3, 6).double()
    y = int((W @ x).argmax())
    eps = theory.version_space_eps(x, y, W)
    for factor, robust in ((0.5, True), (0.99, True), (1.01, False), (2, False)):
        logits = logits_at_corners(x, W, factor * eps)
        assert (logits - logits[:, y : y + 1]).le(1e-12).all() == robust
    assert theory.version_space_eps(x, (y + 1) % 3, W) == -math.inf


@pytest.mark.parametrize('factor', [0.9, 1, 1.1])
def test_the_checks_can_fail(monkeypatch, factor):
    torch.manual_seed(0)
    x, draws = torch.rand(6).double(), torch.randn(30, 3, 6).double()
    for closed_form in theory.constant_eps, theory.version_space_eps:
        wrong = functools.partial(lambda form, *args: factor * form(*args), closed_form)
        monkeypatch.setattr(theory, closed_form.__name__, wrong)
    gains = theory.theorem_1(x, 1, draws)
    assert (gains['largest_violation'] > 0) == (factor < 1)
    assert (gains['smallest_improvement'] > 0) == (factor <= 1)
    assert (theory.proposition_1(x, 1, draws) == 1) == (factor == 1)


def test_figure_1_is_the_worst_case_of_its_loss():
    theta, z = torch.linspace(-2, 2, 41).double(), torch.linspace(-0.2, 2.2, 1001).double()
    found, _ = theory.adversarial_log_loss(theta, 1.0, 1.2)
    assert torch.allclose(found, torch.log(1 + torch.exp(theta[:, None] * z)).max(1).values)


def test_the_share_of_large_gradients_is_that_of_a_plain_loop():
    points = theory.theorem_2(0.05, [2, 3], 0, n_runs=3, n_steps=100)
    assert [point['bound'] for point in points] == pytest.approx([1, 4 / 7])
    generator = rng.generator(0, 7)
    z = 0.5 + torch.randn(100, generator=generator, dtype=torch.float64)
    draws, large = torch.randint(100, (100, 3), generator=generator), 0
    for run, theta in enumerate((-5.0, 0.0, 5.0)):
        for t in range(100):
            p = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
            loss = torch.log(1 + torch.exp(p * (z + 0.05 * (1 if theta >= 0 else -1))))
            (gradient,) = torch.autograd.grad(loss.mean(), p, retain_graph=True)
            large += abs(gradient.item()) > 2 * 0.05 * 1.0998391
            (step,) = torch.autograd.grad(loss[draws[t, run]], p)
            theta -= 4 / ((z.abs().max().item() + 0.05) ** 2 * 10) * step.item()
    assert points[0]['share'] == pytest.approx(large / 300, abs=1e-9) and large > 0


def test_theory_finds_that_proposition_and_theorem_hold(monkeypatch):
    fewer = functools.partial(theory.theorem_2, n_steps=2000)
    monkeypatch.setattr(theory, 'theorem_2', fewer)
    theory.main(['--draws', '20'])
    result = record.load('evals/theory.json')
    assert result['proposition_1'] == 1
    gains = result['theorem_1']
    assert gains['largest_violation'] <= 0 < gains['smallest_improvement']

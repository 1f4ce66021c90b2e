"""The l_inf attacks: PGD and APGD, and the tables of attacks with Square and FAB.

An attack is a pure function (model, x, y, eps, ...) -> x_adv of images x in [0, 1], (N, C, H, W) of
any float type, and labels y, (N,) of any integer type. It searches the box
{x_adv : |x_adv - x| <= eps, 0 <= x_adv <= 1}; eps and step sizes are in the unit of x. The model, a
module or a function, returns logits, (N, K). It runs in eval mode with frozen parameters and is
afterwards as it was, even after an error. At most `batch_size` images pass through it at a time.

The random numbers of an image depend only on the attack, `seed` and the image's entry in `index`
(its position in x unless given): not on the batch size, the order, the device or other images.

All raise ValueError for bad arguments, for a model that does not return logits, and for nan in its
logits or gradients.
"""

import functools
import math
from types import SimpleNamespace

import torch

from classifier import (
    LOSSES,
    correct,
    flag,
    has_nan,
    loss_and_gradient,
    refuse_nan,
    targeted_dlr,
    wrong_classes,
)
from fab import fab
from perturb import attack, box, per_image, run_in_full_batches
from rng import uniform
from square import square


@attack
def pgd(model, x, y, eps, step_size, n_iter, *, start=None, seed=0, index=None, batch_size=250):
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018).

    It starts uniformly within +-`start` of x (step_size unless given, as in the paper's code; often
    eps elsewhere) and returns the last of `n_iter` signed steps.
    """
    x_adv = x.clone()
    start = step_size if start is None else start
    nan = flag(x)
    for i in range(0, len(x), batch_size):
        rows = slice(i, i + batch_size)
        noise = uniform('pgd', seed, index[rows], x.shape[1:], x)
        nan |= pgd_loop(model, x[rows], y[rows], noise, x_adv[rows], eps, step_size, n_iter, start)
    refuse_nan(nan)
    return x_adv


def pgd_loop(model, x, y, noise, x_adv, eps, step_size, n_iter, start):
    """The loop of `pgd`: writes its result into `x_adv`, for a start drawn with `noise` in [0, 1).

    eps, step_size and start may be tensors, (). Returns whether a loss or gradient was nan, ().
    Nothing here waits for the device.
    """
    low, high = box(x, eps)
    nan = flag(x)
    x_adv.copy_(x).add_((2 * noise - 1).mul_(start)).clamp_(low, high)
    for _ in range(n_iter):
        loss, _, grad = loss_and_gradient(model, x_adv, y, LOSSES['ce'])
        x_adv.add_(grad.sign().mul_(step_size)).clamp_(low, high)
        nan |= has_nan(loss, grad)
    return nan


@attack
def apgd(
    model,
    x,
    y,
    eps,
    n_iter=100,
    n_restarts=1,
    loss='ce',
    *,
    n_targets=None,
    rho=0.75,
    best_loss=False,
    seed=0,
    index=None,
    batch_size=250,
):
    """Auto-PGD (Croce & Hein 2020): momentum, and a step size halved where the loss stops rising.

    `loss` is 'ce' or 'dlr'. With n_targets it is the targeted DLR, and the restarts aim at the
    n_targets most likely wrong classes of the image, one each (APGD-T).

    Returns the first misclassified point found for each image, at which its search ends, or else
    the point of highest loss. Images that are misclassified from the start stay as they are. With
    best_loss=True no search ends before the last restart, and the point of highest loss is
    returned: an estimate of the maximum inside L_eps.
    """
    if loss not in LOSSES:
        raise ValueError(f'apgd: loss must be one of {", ".join(LOSSES)}, got {loss!r}')
    x_adv = x.clone()
    best = x.new_full((len(x),), -math.inf)  # inf: a misclassified point is found
    if not best_loss:
        best[~correct(model, x, y, batch_size)] = math.inf
    restarts = torch.zeros_like(y)
    checkpoints = y.new_tensor(apgd_checkpoints(n_iter))
    if n_targets:
        targets = wrong_classes(model, x, y, n_targets, batch_size)
        n_restarts = targets.shape[1]

    def start(rows):
        noise = uniform(f'apgd {loss}', seed, index[rows], x.shape[1:], x, restarts[rows])
        s = apgd_start(x[rows], y[rows], rows, noise, eps)
        if n_targets:
            s.target = targets[rows, restarts[rows]]
        return s

    def advance(s):
        criterion = functools.partial(targeted_dlr, target=s.target) if n_targets else LOSSES[loss]
        nan = flag(x)
        for _ in range(min(4, n_iter + 1 - int(s.k.max()))):  # then looks at which are done
            nan |= apgd_step(s, model, criterion, checkpoints, rho, best_loss)
        return (s.k > n_iter) | (s.loss_best == math.inf), nan

    def finish(s):
        better = s.loss_best > best[s.rows]
        x_adv[s.rows] = torch.where(per_image(better), s.x_best, x_adv[s.rows])
        best[s.rows] = torch.maximum(s.loss_best, best[s.rows])
        restarts[s.rows] += 1
        return s.rows[(restarts[s.rows] < n_restarts) & (best[s.rows] < math.inf)]

    run_in_full_batches((best < math.inf).nonzero().squeeze(1), batch_size, start, advance, finish)
    return x_adv


def apgd_start(x, y, rows, noise, eps):
    """The state of APGD for the images x at `rows`, at a start drawn with `noise` in [0, 1)."""
    low, high = box(x, eps)
    noise = 2 * noise - 1
    x_k = torch.clamp(x + eps * noise / noise.abs().amax((1, 2, 3), keepdim=True), low, high)
    zeros = x.new_zeros(len(x))
    s = SimpleNamespace(rows=rows, y=y, low=low, high=high, x_k=x_k, x_prev=x_k, x_best=x_k)
    s.k = torch.zeros_like(y)
    s.eta = zeros + 2 * eps
    s.loss = zeros + math.inf  # the first step is no rise
    s.loss_best, s.grad_best = zeros - math.inf, torch.zeros_like(x)
    s.rises = zeros  # of the loss since the last checkpoint
    s.checked_k, s.checked_loss, s.halved = zeros, zeros - math.inf, zeros.bool()  # at it
    return s


def apgd_step(s, model, criterion, checkpoints, rho, best_loss):
    """One iteration of Algorithm 1 for each image, whose k may differ: evaluates x_k and moves it.
    Returns whether a loss or gradient was nan, ()."""
    loss, logits, grad = loss_and_gradient(model, s.x_k, s.y, criterion)
    nan = has_nan(loss, grad)
    if not best_loss:
        loss = loss.masked_fill(logits.argmax(1) != s.y, math.inf)
    s.rises = s.rises + (loss > s.loss)
    better = loss > s.loss_best
    s.loss_best = torch.where(better, loss, s.loss_best)
    s.x_best = torch.where(per_image(better), s.x_k, s.x_best)
    s.grad_best = torch.where(per_image(better), grad, s.grad_best)
    # at a checkpoint, under condition 1 or 2, eta is halved and x_k returns to the best point
    check = torch.isin(s.k, checkpoints)
    few_rises = s.rises < rho * (s.k - s.checked_k)
    stagnant = ~s.halved & (s.loss_best <= s.checked_loss)
    halve = check & (few_rises | stagnant)
    s.eta = torch.where(halve, s.eta / 2, s.eta)
    s.loss = torch.where(halve, s.loss_best, loss)
    x_k = torch.where(per_image(halve), s.x_best, s.x_k)
    grad = torch.where(per_image(halve), s.grad_best, grad)
    s.halved = torch.where(check, halve, s.halved)
    s.checked_loss = torch.where(check, s.loss_best, s.checked_loss)
    s.checked_k = torch.where(check, s.k, s.checked_k)
    s.rises = s.rises.masked_fill(check, 0)
    # z = P(x_k + eta sign(grad)), then x_k+1 = P(x_k + a (z - x_k) + (1 - a) (x_k - x_k-1))
    z = torch.addcmul(x_k, per_image(s.eta), grad.sign()).clamp_(s.low, s.high)
    a = per_image(1 - 0.25 * (s.k > 0).to(x_k))
    x_next = x_k.lerp(z, a).addcmul_(1 - a, x_k - s.x_prev).clamp_(s.low, s.high)
    s.x_prev, s.x_k, s.k = x_k, x_next, s.k + 1
    return nan


def apgd_checkpoints(n_iter):
    """Iterations ceil(p_j N) where APGD may halve its step; 22 41 57 70 80 87 93 99 for N = 100."""
    checkpoints = []
    p, step = 22, 22  # in hundredths, so that ceil sees no rounding error
    while p <= 100:
        checkpoints.append(-(-p * n_iter // 100))
        step = max(step - 3, 6)
        p += step
    return sorted(set(checkpoints))


# The attacks of Table 1. What is left open, eps and the steps of PGD, comes from the run.
ATTACKS = {
    'pgd': pgd,
    'pgd100': functools.partial(pgd, n_iter=100),
    'apgd100_ce': functools.partial(apgd, n_iter=100, n_restarts=5, loss='ce'),
    'apgd100_dlr': functools.partial(apgd, n_iter=100, n_restarts=5, loss='dlr'),
    'square5k': functools.partial(square, n_queries=5000, p_init=0.8),
}

# AutoAttack's standard evaluation: each attack gets the images that those before it did not fool.
STANDARD = {
    'apgd_ce': functools.partial(apgd, n_iter=100),
    'apgd_t': functools.partial(apgd, n_iter=100, loss='dlr', n_targets=9),
    'fab_t': functools.partial(fab, n_iter=100, n_targets=9),
    'square': functools.partial(square, n_queries=5000, p_init=0.8),
}


def title(key):
    """The title of a column as the paper writes it, such as APGD100-CE."""
    others = {'clean': 'clean', 'worst': 'worst case', 'standard': 'AutoAttack'}
    return others.get(key) or key.replace('_', '-').upper().replace('SQUARE', 'Square')

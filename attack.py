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

from lib.classifier import (
    correct,
    cross_entropy,
    flag,
    has_nan,
    logits_of,
    loss_and_gradient,
    refuse_nan,
    wrong_classes,
)
from lib.rng import uniform
from lib.search import attack, box, per_image, run_in_full_batches


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


@attack
def square(model, x, y, eps, n_queries=5000, p_init=0.8, *, seed=0, index=None, batch_size=250):
    """Square attack (Andriushchenko et al. 2019): random search with squares, needing no gradient.

    The first query is vertical stripes of +-eps. Each further one sets a window at a random place,
    of a size that shrinks on a schedule (`square_side`), to +-eps in each channel, and is kept if
    the margin falls. The search for an image ends once it is misclassified, possibly at once.
    """
    if not 0 < p_init <= 1:
        raise ValueError(f'square: p_init must be above 0 and at most 1, got {p_init}')
    channels, height, width = x.shape[1:]
    x_adv = x.clone()
    nan = flag(x)
    sides = [square_side(query, p_init, height, width) for query in range(n_queries + 1)]
    sides = torch.tensor(sides, device=x.device)

    def measure(x_adv, y):
        logits = logits_of(model, x_adv)
        margins = margin(logits, y)
        nan.logical_or_(has_nan(logits, margins))
        return margins.masked_fill(logits.argmax(1) != y, -math.inf)

    def start(rows):
        low, high = box(x[rows], eps)
        stripes = uniform('square', seed, index[rows], (channels, 1, width), x, 1) < 0.5
        s = SimpleNamespace(rows=rows, y=y[rows], low=low, high=high)
        s.query = torch.full_like(rows, 2)
        s.x_adv = torch.where(stripes, low, high)
        s.best = measure(s.x_adv, s.y) if len(rows) else x.new_zeros(0)
        return s

    def advance(s):
        n = min(20, n_queries + 1 - int(s.query.max()))  # then looks at which are done
        queries = s.query + torch.arange(n, device=x.device)[:, None]
        draws = uniform('square', seed, index[s.rows], (2 + channels,), x, queries)
        for u, side in zip(draws, sides[queries]):
            rows = window_mask(u[:, 0], side, height)[:, None, :, None]
            columns = window_mask(u[:, 1], side, width)[:, None, None, :]
            signed = torch.where(per_image(u[:, 2:] < 0.5), s.low, s.high)
            x_new = torch.where(rows & columns, signed, s.x_adv)
            new = measure(x_new, s.y)
            s.x_adv = torch.where(per_image(new < s.best), x_new, s.x_adv)
            s.best = torch.minimum(new, s.best)
        s.query = s.query + len(queries)
        return (s.query > n_queries) | (s.best == -math.inf), nan

    def finish(s):
        x_adv[s.rows] = s.x_adv
        return s.rows[:0]

    standing = correct(model, x, y, batch_size).nonzero().squeeze(1)
    run_in_full_batches(standing, batch_size, start, advance, finish)
    return x_adv


def square_side(query, p_init, height, width):
    """Side of the window at `query`: sqrt(p h w), p halved after queries 10, 50, 200, ..."""
    halvings = sum(query > q for q in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return min(max(round(math.sqrt(p_init / 2**halvings * height * width)), 1), height, width)


def window_mask(u, side, size):
    """(N, size) mask of `side`, (N,), neighbours, at a place drawn with u in [0, 1), (N,)."""
    first = (u * (size - side + 1)).long()
    offset = torch.arange(size, device=u.device) - first[:, None]
    return (offset >= 0) & (offset < side[:, None])


@attack
def fab(
    model,
    x,
    y,
    eps,
    n_iter=100,
    n_targets=9,
    *,
    alpha_max=0.1,
    eta=1.05,
    beta=0.9,
    seed=0,
    index=None,
    batch_size=250,
):
    """FAB-T: seeks the nearest misclassified point, towards each of the n_targets most likely wrong
    classes of the image in turn, for n_iter iterations each.

    Returns a misclassified point within eps of each image where it finds one, else the image.
    Nothing is random.
    """
    settings = n_iter, n_targets, alpha_max, eta, beta, batch_size
    x_adv, distance = nearest_points(model, x, y, eps, *settings)
    return torch.where(per_image(distance <= eps), x_adv, x)


def nearest_points(model, x, y, enough, n_iter, n_targets, alpha_max, eta, beta, batch_size):
    """The nearest misclassified points found and their l_inf distances, (N,), infinite where there
    is none. The search for an image ends at a distance of `enough`."""
    x_adv = x.clone()
    tried = torch.zeros_like(y)  # targets of each image
    distance = x.new_zeros(len(x)).masked_fill(correct(model, x, y, batch_size), math.inf)
    targets = wrong_classes(model, x, y, n_targets, batch_size)

    def start(rows):
        s = SimpleNamespace(rows=rows, x=x[rows], y=y[rows], k=torch.zeros_like(rows))
        s.target, s.distance = targets[rows, tried[rows]], distance[rows]
        s.x_k, s.x_best = s.x, x_adv[rows]
        return s

    def advance(s):
        nan = fab_step(s, model, alpha_max, eta, beta)
        return (s.k == n_iter) | (s.distance <= enough), nan

    def finish(s):
        x_adv[s.rows], distance[s.rows] = s.x_best, s.distance
        tried[s.rows] += 1
        return s.rows[(tried[s.rows] < targets.shape[1]) & (s.distance > enough)]

    waiting = (distance == math.inf).nonzero().squeeze(1)
    run_in_full_batches(waiting, batch_size, start, advance, finish)
    return x_adv, distance


def fab_step(s, model, alpha_max, eta, beta):
    """One iteration: projects x_k and the image onto the boundary between label and target,
    linearised at x_k, and moves to a point between both projections, a little beyond it. Returns
    whether a logit or gradient was nan, ()."""

    def difference(logits, y):
        both = logits.gather(1, torch.stack([y, s.target], 1))
        return both[:, 0] - both[:, 1]

    gap, _, w = loss_and_gradient(model, s.x_k, s.y, difference)
    d_k = to_plane(s.x_k, w, gap)
    d_0 = to_plane(s.x, w, gap + ((s.x - s.x_k) * w).flatten(1).sum(1))
    a_k, a_0 = (per_image(length(d).clamp(min=1e-8)) for d in (d_k, d_0))
    alpha = (a_k / (a_k + a_0)).clamp(max=alpha_max)
    x_k = ((1 - alpha) * (s.x_k + eta * d_k) + alpha * (s.x + eta * d_0)).clamp_(0, 1)
    logits = logits_of(model, x_k)
    fooled = logits.argmax(1) != s.y
    moved = length(x_k - s.x)
    better = fooled & (moved < s.distance)
    s.distance = torch.where(better, moved, s.distance)
    s.x_best = torch.where(per_image(better), x_k, s.x_best)
    # a misclassified point moves back towards the image, so that it crosses the boundary again
    s.x_k = torch.where(per_image(fooled), s.x + beta * (x_k - s.x), x_k)
    s.k = s.k + 1
    return has_nan(gap, w, logits)


def to_plane(x, w, r):
    """The smallest d in l_inf with r + w d = 0 and x + d in [0, 1], exactly: (N, C, H, W).

    r is the value at x, (N,), of a linear function of slope w. All coordinates move equally far and
    stop at 0 and 1; where the plane is out of reach, all move as far as they can.
    """
    sign = -per_image(r.sign()) * w.sign()  # the direction
    room = torch.where(sign > 0, 1 - x, x).masked_fill(sign == 0, 0).flatten(1)
    slopes = w.abs().flatten(1)
    # Newton's method on |r| = sum |w_i| min(room_i, d), piecewise linear and concave in d: from
    # below it reaches the exact d in a few steps
    d, d_next = r * 0 - 1, r * 0
    while (d_next > d).any():
        d = d_next
        spent = (room <= d[:, None]).to(w)
        d_next = (r.abs() - (spent * room * slopes).sum(1)) / (slopes - spent * slopes).sum(1)
        d_next = d_next.nan_to_num(0).clamp(max=1)  # 0 / 0: there is no plane; 1: out of reach
        d_next = torch.maximum(d, d_next)  # else rounding may move d back and forth for ever
    return torch.minimum(room, d[:, None]).view_as(x) * sign


def length(d):
    """l_inf norm of each perturbation, (N,)."""
    return d.abs().flatten(1).amax(1)


def margin(logits, y):
    """z_y - max_{i != y} z_i, (N,): at most 0 where the image is misclassified."""
    z_y = logits.gather(1, y[:, None]).squeeze(1)
    return z_y - logits.scatter(1, y[:, None], -math.inf).amax(1)


def dlr(logits, y):
    """Difference of logits ratio of at least 3 classes, (N,) (Croce & Hein 2020):
    -(z_y - max_{i != y} z_i) / (z_(1) - z_(3) + 1e-12), invariant to shifts and scalings."""
    if logits.shape[1] < 3:
        raise ValueError(f'dlr needs at least 3 classes, got {logits.shape[1]}')
    top = logits.topk(3, 1).values
    return -margin(logits, y) / finite(top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits, y, target):
    """Targeted DLR of at least 4 classes, (N,) (Croce & Hein 2020):
    -(z_y - z_target) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)."""
    if logits.shape[1] < 4:
        raise ValueError(f'targeted dlr needs at least 4 classes, got {logits.shape[1]}')
    top = logits.topk(4, 1).values
    z_y, z_target = (logits.gather(1, classes[:, None]).squeeze(1) for classes in (y, target))
    return -(z_y - z_target) / finite(top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def finite(scale):
    """`scale`, nan where it is infinite: a loss divided by it, and its gradient, would be 0."""
    return scale.masked_fill(scale.isinf(), math.nan)


# What APGD maximises, by name
LOSSES = {'ce': cross_entropy, 'dlr': dlr}

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

"""The l_inf attacks PGD, APGD, Square and FAB, and the tables of attacks.

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

import math
from functools import partial
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
from lib.search import attack, box, check_counts, per_image, run_in_full_batches


@attack
def pgd(model, x, y, eps, step_size, n_iter, *, start=None, seed=0, index=None, batch_size=250):
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018).

    It starts uniformly within +-`start` of x (step_size unless given, as in the paper's code; often
    eps elsewhere) and returns the last of `n_iter` signed steps.
    """
    check_counts(n_iter=n_iter)
    if not step_size > 0:
        raise ValueError(f'step_size must be above 0, got {step_size}')
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
    """PGD of a batch, for a start drawn with `noise` in [0, 1); its result is written into `x_adv`.

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

    Returns the first misclassified point of each image, possibly the image itself, or else the
    point of highest loss; with best_loss=True always that, an estimate of the maximum in L_eps.
    """
    check_counts(n_iter=n_iter, n_restarts=n_restarts, n_targets=n_targets)
    if loss not in LOSSES:
        raise ValueError(f'loss must be one of {", ".join(LOSSES)}, got {loss!r}')
    x_adv = x.clone()
    best = x.new_full((len(x),), -math.inf)  # inf: a misclassified point is found
    if not best_loss:
        best[~correct(model, x, y, batch_size)] = math.inf
    restarts = torch.zeros_like(y)  # of each image, so far
    checkpoints = y.new_tensor(apgd_checkpoints(n_iter))
    if n_targets:
        targets = wrong_classes(model, x, y, n_targets, batch_size)
        n_restarts = targets.shape[1]

    def start(rows):
        noise = uniform(f'apgd {loss}', seed, index[rows], x.shape[1:], x, restarts[rows])
        return apgd_start(x[rows], y[rows], rows, noise, eps)

    def advance(state):
        criterion = LOSSES[loss]
        if n_targets:
            criterion = partial(targeted_dlr, target=targets[state.rows, restarts[state.rows]])
        nan = flag(x)
        for _ in range(min(4, n_iter + 1 - int(state.k.max()))):  # steps per check for done images
            nan |= apgd_step(state, model, criterion, checkpoints, rho, best_loss)
        return (state.k > n_iter) | (state.loss_best == math.inf), nan

    def finish(state):
        rows = state.rows
        better = state.loss_best > best[rows]
        x_adv[rows] = torch.where(per_image(better), state.x_best, x_adv[rows])
        best[rows] = torch.maximum(state.loss_best, best[rows])
        restarts[rows] += 1
        return rows[(restarts[rows] < n_restarts) & (best[rows] < math.inf)]

    run_in_full_batches((best < math.inf).nonzero().squeeze(1), batch_size, start, advance, finish)
    return x_adv


def apgd_start(x, y, rows, noise, eps):
    """The state of APGD for the images x at `rows`, at a start drawn with `noise` in [0, 1)."""
    low, high = box(x, eps)
    noise = 2 * noise - 1
    x_0 = torch.clamp(x + eps * noise / noise.abs().amax((1, 2, 3), keepdim=True), low, high)
    zeros = x.new_zeros(len(x))
    state = SimpleNamespace(rows=rows, y=y, low=low, high=high, k=torch.zeros_like(y))
    state.x_k = state.x_prev = state.x_best = x_0
    state.eta = zeros + 2 * eps
    state.loss = zeros + math.inf  # at x_prev; the first step is no rise
    state.loss_best, state.grad_best = zeros - math.inf, torch.zeros_like(x)
    state.rises = zeros  # of the loss since the last checkpoint
    # at the last checkpoint: k, loss_best, and whether eta was halved
    state.checked_k, state.checked_loss, state.halved = zeros, zeros - math.inf, zeros.bool()
    return state


def apgd_step(state, model, criterion, checkpoints, rho, best_loss):
    """One iteration of Algorithm 1 for each image, whose k may differ: judges x_k, then moves it.
    Returns whether a loss or gradient was nan, ()."""
    x_k, k = state.x_k, state.k
    loss, logits, grad = loss_and_gradient(model, x_k, state.y, criterion)
    nan = has_nan(loss, grad)
    if not best_loss:
        loss = loss.masked_fill(logits.argmax(1) != state.y, math.inf)
    state.rises = state.rises + (loss > state.loss)
    better = loss > state.loss_best
    state.loss_best = torch.where(better, loss, state.loss_best)
    state.x_best = torch.where(per_image(better), x_k, state.x_best)
    state.grad_best = torch.where(per_image(better), grad, state.grad_best)

    # at a checkpoint, under condition 1 or 2, eta is halved and x_k returns to the best point
    check = torch.isin(k, checkpoints)
    condition_1 = state.rises < rho * (k - state.checked_k)
    condition_2 = ~state.halved & (state.loss_best <= state.checked_loss)
    halve = check & (condition_1 | condition_2)
    state.eta = torch.where(halve, state.eta / 2, state.eta)
    state.loss = torch.where(halve, state.loss_best, loss)
    x_k = torch.where(per_image(halve), state.x_best, x_k)
    grad = torch.where(per_image(halve), state.grad_best, grad)
    state.halved = torch.where(check, halve, state.halved)
    state.checked_loss = torch.where(check, state.loss_best, state.checked_loss)
    state.checked_k = torch.where(check, k, state.checked_k)
    state.rises = state.rises.masked_fill(check, 0)

    # z = P(x_k + eta sign(grad)), then x_k+1 = P(x_k + a (z - x_k) + (1 - a) (x_k - x_k-1))
    low, high = state.low, state.high
    z = torch.addcmul(x_k, per_image(state.eta), grad.sign()).clamp_(low, high)
    a = per_image(1 - 0.25 * (k > 0).to(x_k))
    state.x_k = x_k.lerp(z, a).addcmul_(1 - a, x_k - state.x_prev).clamp_(low, high)
    state.x_prev = x_k
    state.k = k + 1
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
    check_counts(n_queries=n_queries)
    if not 0 < p_init <= 1:
        raise ValueError(f'p_init must be above 0 and at most 1, got {p_init}')
    channels, height, width = x.shape[1:]
    x_adv = x.clone()
    sides = [square_side(query, p_init, height, width) for query in range(n_queries + 1)]
    sides = torch.tensor(sides, device=x.device)

    def start(rows):
        state = SimpleNamespace(rows=rows, y=y[rows])
        state.low, state.high = box(x[rows], eps)
        stripes = uniform('square', seed, index[rows], (channels, 1, width), x, 1) < 0.5
        state.x_adv = torch.where(stripes, state.low, state.high)
        state.query = torch.full_like(rows, 2)  # the next one
        state.margin = x.new_zeros(0)
        if len(rows):
            state.margin, nan = square_margin(model, state.x_adv, state.y)
            refuse_nan(nan)
        return state

    def advance(state):
        nan = flag(x)
        n = min(20, n_queries + 1 - int(state.query.max()))  # queries per check for done images
        queries = state.query + torch.arange(n, device=x.device)[:, None]
        draws = uniform('square', seed, index[state.rows], (2 + channels,), x, queries)
        for side, noise in zip(sides[queries], draws):
            nan |= square_step(state, model, side, noise)
        return (state.query > n_queries) | (state.margin == -math.inf), nan

    def finish(state):
        x_adv[state.rows] = state.x_adv
        return state.rows[:0]

    standing = correct(model, x, y, batch_size).nonzero().squeeze(1)
    run_in_full_batches(standing, batch_size, start, advance, finish)
    return x_adv


def square_step(state, model, side, noise):
    """One iteration of Algorithm 1, with Algorithm 2's window of `side`, (N,), at a place and with
    signs that are drawn with `noise` in [0, 1), (N, 2 + C). Returns whether a logit was nan, ()."""
    height, width = state.x_adv.shape[2:]
    window_rows = window_mask(noise[:, 0], side, height)[:, None, :, None]
    window_columns = window_mask(noise[:, 1], side, width)[:, None, None, :]
    signed = torch.where(per_image(noise[:, 2:] < 0.5), state.low, state.high)
    x_new = torch.where(window_rows & window_columns, signed, state.x_adv)
    new_margin, nan = square_margin(model, x_new, state.y)
    state.x_adv = torch.where(per_image(new_margin < state.margin), x_new, state.x_adv)
    state.margin = torch.minimum(new_margin, state.margin)
    state.query = state.query + 1
    return nan


def square_margin(model, x, y):
    """The margins of images, (N,), -inf where they are misclassified; and whether one was nan."""
    logits = logits_of(model, x)
    margins = margin(logits, y)  # nan if any logit is
    return margins.masked_fill(logits.argmax(1) != y, -math.inf), has_nan(margins)


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
    """FAB-T (Croce & Hein 2020): seeks the nearest misclassified point, towards each of the
    n_targets most likely wrong classes of the image in turn, for n_iter iterations each.

    Returns a misclassified point within eps of each image where it finds one, else the image.
    Nothing is random.
    """
    check_counts(n_iter=n_iter, n_targets=n_targets)
    settings = n_iter, n_targets, alpha_max, eta, beta, batch_size
    x_adv, distance = nearest_points(model, x, y, eps, *settings)
    return torch.where(per_image(distance <= eps), x_adv, x)


def nearest_points(model, x, y, enough, n_iter, n_targets, alpha_max, eta, beta, batch_size):
    """The nearest misclassified points found and their l_inf distances, (N,), infinite where there
    is none. The search for an image ends at a distance of `enough`."""
    x_adv = x.clone()
    tried = torch.zeros_like(y)  # targets of each image, so far
    distance = x.new_zeros(len(x)).masked_fill(correct(model, x, y, batch_size), math.inf)
    targets = wrong_classes(model, x, y, n_targets, batch_size)

    def start(rows):
        state = SimpleNamespace(rows=rows, x=x[rows], y=y[rows], k=torch.zeros_like(rows))
        state.target, state.x_k = targets[rows, tried[rows]], state.x
        state.x_best, state.distance = x_adv[rows], distance[rows]
        return state

    def advance(state):
        nan = fab_step(state, model, alpha_max, eta, beta)
        return (state.k == n_iter) | (state.distance <= enough), nan

    def finish(state):
        rows = state.rows
        x_adv[rows], distance[rows] = state.x_best, state.distance
        tried[rows] += 1
        return rows[(tried[rows] < targets.shape[1]) & (state.distance > enough)]

    standing = (distance == math.inf).nonzero().squeeze(1)
    run_in_full_batches(standing, batch_size, start, advance, finish)
    return x_adv, distance


def fab_step(state, model, alpha_max, eta, beta):
    """One iteration of Algorithm 1's inner loop: projects x_k and the image onto the boundary
    between label and target, linearised at x_k, and moves to a point between both projections, a
    little beyond it. Returns whether a logit or gradient was nan, ()."""

    def difference(logits, y):
        both = logits.gather(1, torch.stack([y, state.target], 1))
        return both[:, 0] - both[:, 1]

    x, x_k = state.x, state.x_k
    gap, _, w = loss_and_gradient(model, x_k, state.y, difference)
    d_k = to_plane(x_k, w, gap)
    d_0 = to_plane(x, w, gap + ((x - x_k) * w).flatten(1).sum(1))
    length_k, length_0 = (per_image(length(d).clamp(min=1e-8)) for d in (d_k, d_0))
    alpha = (length_k / (length_k + length_0)).clamp(max=alpha_max)
    x_k = ((1 - alpha) * (x_k + eta * d_k) + alpha * (x + eta * d_0)).clamp_(0, 1)
    logits = logits_of(model, x_k)
    misclassified = logits.argmax(1) != state.y
    distance = length(x_k - x)
    better = misclassified & (distance < state.distance)
    state.distance = torch.where(better, distance, state.distance)
    state.x_best = torch.where(per_image(better), x_k, state.x_best)
    # a misclassified point moves back towards the image, so that it crosses the boundary again
    state.x_k = torch.where(per_image(misclassified), x + beta * (x_k - x), x_k)
    state.k = state.k + 1
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
    'pgd100': partial(pgd, n_iter=100),
    'apgd100_ce': partial(apgd, n_iter=100, n_restarts=5, loss='ce'),
    'apgd100_dlr': partial(apgd, n_iter=100, n_restarts=5, loss='dlr'),
    'square5k': partial(square, n_queries=5000, p_init=0.8),
}

# AutoAttack's standard evaluation: each attack gets the images that those before it did not fool.
STANDARD = {
    'apgd_ce': partial(apgd, n_iter=100),
    'apgd_t': partial(apgd, n_iter=100, loss='dlr', n_targets=9),
    'fab_t': partial(fab, n_iter=100, n_targets=9),
    'square': partial(square, n_queries=5000, p_init=0.8),
}


def title(key):
    """The title of a column as the paper writes it, such as APGD100-CE."""
    others = {'clean': 'clean', 'worst': 'worst case', 'standard': 'AutoAttack'}
    return others.get(key) or key.replace('_', '-').upper().replace('SQUARE', 'Square')

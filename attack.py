"""Everything that perturbs an input: PGD, APGD and Square, l_inf, from scratch.

An attack is a pure function (model, x, y, eps, ...) -> x_adv of images x in [0, 1], (N, C, H, W),
and labels y, (N,). It maximises a loss over the box {x_adv : |x_adv - x| <= eps, 0 <= x_adv <= 1};
eps and step sizes are in the unit of x. The model runs in eval mode with frozen parameters and is
left as it was found, whatever happens. Any N will do: `batch_size` images pass through the model at
a time.

The random numbers of an image depend on the attack, on `seed` and on its entry in `index` (its
position in x unless given) and on nothing else: not on the batch size, the order, the device or the
fate of other images.

All raise ValueError for images outside [0, 1], eps < 0, counts < 1 and logits that are nan.
"""

import functools
import inspect
import math
from types import SimpleNamespace

import torch

from classifier import LOSSES, check_not_nan, correct, frozen, loss_and_gradient, margin
from rng import uniform


def attack(run):
    """Makes `run` an attack as defined above: checks arguments and freezes the model around it."""
    signature, name = inspect.signature(run), run.__name__

    @functools.wraps(run)
    def checked(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        a = call.arguments
        x, y, eps, index = a['x'], a['y'], a['eps'], a['index']
        index = torch.arange(len(x)) if index is None else index
        if not len(x) == len(y) == len(index):
            raise ValueError(f'{name}: {len(x)} images, {len(y)} labels, {len(index)} of index')
        if not eps >= 0:
            raise ValueError(f'{name}: eps must be at least 0, got {eps}')
        for count in ('n_iter', 'n_restarts', 'n_queries', 'batch_size'):
            if a.get(count, 1) < 1:
                raise ValueError(f'{name}: {count} must be at least 1, got {a[count]}')
        low, high = (bound.item() for bound in x.aminmax()) if len(x) else (0, 1)
        if not 0 <= low <= high <= 1:
            raise ValueError(f'{name}: images must lie in [0, 1], got {low:.6g} to {high:.6g}')
        if eps == 0 or len(x) == 0:
            return x.clone()
        if not a.get('step_size', 1) > 0:
            raise ValueError(f'{name}: step_size must be above 0, got {a["step_size"]}')
        a['index'] = index.to(x.device)
        with frozen(a['model']), torch.no_grad():
            return run(*call.args, **call.kwargs)

    return checked


@attack
def pgd(model, x, y, eps, step_size, n_iter, *, start=None, seed=0, index=None, batch_size=250):
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018).

    It starts uniformly in +-`start` (step_size unless given, as the paper's code does; eps is the
    other usual choice) around x and returns the last of `n_iter` signed steps.
    """
    width, total, x_adv = step_size if start is None else start, x.new_zeros(()), x.clone()
    for i in range(0, len(x), batch_size):
        rows = slice(i, i + batch_size)
        noise = uniform('pgd', seed, index[rows], x.shape[1:], x)
        total += pgd_loop(
            model, x[rows], y[rows], noise, x_adv[rows], eps, step_size, n_iter, width
        )
    check_not_nan(total)
    return x_adv


def pgd_loop(model, x, y, noise, x_adv, eps, step_size, n_iter, width):
    """The loop of `pgd`: turns `x_adv` into its result for a start drawn with `noise` in [0, 1).

    eps, step_size and width, the start's, may be tensors, (). Returns the sum of all losses, ().
    Nothing here waits for the device.
    """
    (low, high), total = box(x, eps), x.new_zeros(())
    x_adv.copy_(x).add_((2 * noise - 1).mul_(width)).clamp_(low, high)
    for _ in range(n_iter):
        loss, _, grad = loss_and_gradient(model, x_adv, y, LOSSES['ce'])
        x_adv.add_(grad.sign_().mul_(step_size)).clamp_(low, high)
        total.add_(loss.sum())
    return total


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
    rho=0.75,
    best_loss=False,
    seed=0,
    index=None,
    batch_size=250,
):
    """Auto-PGD (Croce & Hein 2020): momentum, and a step size halved where the loss stops rising.

    `loss` is 'ce' or 'dlr'. Returns each image's first misclassified point or else its point of
    highest loss: images misclassified from the start stay as they are, a misclassified point ends
    the search for its image, and a restart is spent only on images that still stand. With
    best_loss=True all images run to the end of all restarts and the point of highest loss is
    returned: the maximum inside L_eps as APGD sees it.
    """
    if loss not in LOSSES:
        raise ValueError(f'apgd: loss must be one of {", ".join(LOSSES)}, got {loss!r}')
    # a misclassified point counts as an infinite loss
    x_adv, best, total = x.clone(), x.new_full((len(x),), -math.inf), x.new_zeros(())
    if not best_loss:
        best[~correct(model, x, y, batch_size)] = math.inf
    restarts, checkpoints = torch.zeros_like(y), y.new_tensor(apgd_checkpoints(n_iter))

    def start(rows):
        noise = uniform(f'apgd {loss}', seed, index[rows], x.shape[1:], x, restarts[rows])
        return apgd_start(x[rows], y[rows], rows, noise, eps)

    def advance(s):
        for _ in range(min(4, n_iter + 1 - int(s.k.max()))):
            total.add_(apgd_step(s, model, LOSSES[loss], checkpoints, rho, best_loss))
        return (s.k > n_iter) | (s.loss_best == math.inf)

    def finish(s):
        better = s.loss_best > best[s.rows]
        x_adv[s.rows] = torch.where(per_image(better), s.x_best, x_adv[s.rows])
        best[s.rows] = torch.maximum(s.loss_best, best[s.rows])
        restarts[s.rows] += 1
        return s.rows[(restarts[s.rows] < n_restarts) & (best[s.rows] < math.inf)]

    run_in_full_batches((best < math.inf).nonzero().squeeze(1), batch_size, start, advance, finish)
    check_not_nan(total)
    return x_adv


def run_in_full_batches(waiting, batch_size, start, advance, finish):
    """Searches for many images, in batches that are kept full: those that are done make room.

    `waiting` are the places of the images, (N,). start(rows) is the state of the search for these
    images, a namespace of tensors, one entry per image. advance(state) takes some steps and says
    which images are done, (n,) bool. finish(state) of these returns the rows that start anew.
    """
    state = start(waiting[:0])
    while len(waiting) + len(state.rows):
        new, waiting = waiting.tensor_split([batch_size - len(state.rows)])
        if len(new):
            begun = vars(start(new))
            state = SimpleNamespace(
                **{name: torch.cat([values, begun[name]]) for name, values in vars(state).items()}
            )
        done = advance(state)
        if done.any():
            waiting = torch.cat([waiting, finish(take(state, done))])
            state = take(state, ~done)


def take(state, mask):
    """The entries of a namespace of tensors where `mask`, (n,) bool."""
    rows = mask.nonzero().squeeze(1)
    return SimpleNamespace(**{name: values[rows] for name, values in vars(state).items()})


def apgd_start(x, y, rows, noise, eps):
    """The state of APGD of each image at its start, drawn with `noise` in [0, 1).

    `rows` are the places of the images. The last loss is +inf, so that the first step counts as no
    rise, and the best is -inf, so that any loss replaces it.
    """
    low, high = box(x, eps)
    noise = 2 * noise - 1
    x_k = torch.clamp(x + eps * noise / noise.abs().amax((1, 2, 3), keepdim=True), low, high)
    zeros = x.new_zeros(len(x))
    s = SimpleNamespace(rows=rows, y=y, low=low, high=high, x_k=x_k, x_prev=x_k, x_best=x_k)
    s.loss, s.loss_best, s.grad_best = zeros + math.inf, zeros - math.inf, torch.zeros_like(x)
    s.k, s.eta = torch.zeros_like(y), zeros + 2 * eps
    s.rises, s.checked_k = zeros, zeros  # since the last checkpoint, which was at checked_k
    s.checked_loss, s.halved = zeros - math.inf, zeros.bool()
    return s


def apgd_step(s, model, criterion, checkpoints, rho, best_loss):
    """One iteration of Algorithm 1: evaluates x_k of each image, each at a k of its own, and moves.

    Returns the sum of the losses, ().
    """
    loss, logits, grad = loss_and_gradient(model, s.x_k, s.y, criterion)
    total = loss.sum()
    if not best_loss:
        loss = loss.masked_fill(logits.argmax(1) != s.y, math.inf)
    s.rises = s.rises + (loss > s.loss)
    better = loss > s.loss_best
    s.loss_best = torch.where(better, loss, s.loss_best)
    s.x_best = torch.where(per_image(better), s.x_k, s.x_best)
    s.grad_best = torch.where(per_image(better), grad, s.grad_best)
    # at a checkpoint: under condition 1 or 2 eta is halved, and x_k is the best point again
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
    return total


@functools.cache
def apgd_checkpoints(n_iter):
    """Iterations ceil(p_j N) where APGD may halve its step; 22 41 57 70 80 87 93 99 for N = 100."""
    p, step, checkpoints = 22, 22, []  # p_j in hundredths, so that ceil sees no rounding error
    while p <= 100:
        checkpoints.append(-(-p * n_iter // 100))
        step = max(step - 3, 6)
        p += step
    return sorted(set(checkpoints))


@attack
def square(model, x, y, eps, n_queries=5000, p_init=0.8, *, seed=0, index=None, batch_size=250):
    """Square attack (Andriushchenko et al. 2019): random search with squares, needing no gradient.

    It starts from vertical stripes of +-eps (the first query). Each further query sets a window, at
    a random place and of a size that shrinks on a schedule (`square_side`), to +-eps in each
    channel, and is kept if the margin falls. An image that is misclassified from the start stays as
    it is; one that becomes misclassified is finished.
    """
    if not 0 < p_init <= 1:
        raise ValueError(f'square: p_init must be above 0 and at most 1, got {p_init}')
    channels, height, width = x.shape[1:]
    x_adv, total, block = x.clone(), x.new_zeros(()), torch.arange(20, device=x.device)
    sides = [square_side(query, p_init, height, width) for query in range(n_queries + 1)]
    sides = torch.tensor(sides, device=x.device)

    def measure(x_adv, y):
        logits = model(x_adv)
        margins = margin(logits, y)
        total.add_(margins.sum())
        return margins.masked_fill(logits.argmax(1) != y, -math.inf)  # a misclassified one is done

    def start(rows):
        low, high = box(x[rows], eps)
        stripes = uniform('square', seed, index[rows], (channels, 1, width), x, 1) < 0.5
        s = SimpleNamespace(rows=rows, y=y[rows], low=low, high=high)
        s.query = torch.full_like(rows, 2)
        s.x_adv = torch.where(stripes, low, high)
        s.best = measure(s.x_adv, s.y) if len(rows) else x.new_zeros(0)
        return s

    def advance(s):
        queries = s.query + block[: n_queries + 1 - int(s.query.max()), None]
        draws = uniform('square', seed, index[s.rows], (2 + channels,), x, queries)
        for u, side in zip(draws, sides[queries]):
            window = (
                window_mask(u[:, 0], side, height)[:, None, :, None]
                & window_mask(u[:, 1], side, width)[:, None, None]
            )
            signed = torch.where(per_image(u[:, 2:] < 0.5), s.low, s.high)
            x_new = torch.where(window, signed, s.x_adv)
            new = measure(x_new, s.y)
            s.x_adv = torch.where(per_image(new < s.best), x_new, s.x_adv)
            s.best = torch.minimum(new, s.best)
        s.query = s.query + len(queries)
        return (s.query > n_queries) | (s.best == -math.inf)

    def finish(s):
        x_adv[s.rows] = s.x_adv
        return s.rows[:0]

    standing = correct(model, x, y, batch_size).nonzero().squeeze(1)
    run_in_full_batches(standing, batch_size, start, advance, finish)
    check_not_nan(total)
    return x_adv


def square_side(query, p_init, height, width):
    """Side of Square's window at `query`: sqrt(p h w), p halved after queries 10, 50, 200, ..."""
    halvings = sum(query > q for q in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return min(max(round(math.sqrt(p_init / 2**halvings * height * width)), 1), height, width)


def window_mask(u, side, size):
    """(N, size) mask of `side` places, (N,), from one in 0 .. size - side; u in [0, 1), (N,)."""
    place = torch.arange(size, device=u.device) - (u * (size - side + 1)).long()[:, None]
    return (place >= 0) & (place < side[:, None])


# The attacks of Table 1. Parameters left open come from the run: eps, and the steps of PGD.
ATTACKS = {
    'pgd': pgd,
    'pgd100': functools.partial(pgd, n_iter=100),
    'apgd100_ce': functools.partial(apgd, n_iter=100, n_restarts=5, loss='ce'),
    'apgd100_dlr': functools.partial(apgd, n_iter=100, n_restarts=5, loss='dlr'),
    'square5k': functools.partial(square, n_queries=5000, p_init=0.8),
}


def title(key):
    """The column of an attack as the paper writes it, APGD100-CE; or of clean and worst."""
    if key in ('clean', 'worst'):
        return 'worst case' if key == 'worst' else key
    return key.replace('_', '-').upper().replace('SQUARE', 'Square')


def box(x, eps):
    """Corners of the l_inf eps-ball around x, cut to [0, 1]: one box, so one clamp projects."""
    return (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)


def per_image(values):
    """(N,) or (N, C) values, shaped to broadcast over images (N, C, H, W)."""
    return values.reshape(values.shape + (1,) * (4 - values.dim()))

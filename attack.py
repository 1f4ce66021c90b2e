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
import contextlib
import functools
import inspect
import math
import zlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F


class NotFiniteError(ValueError):
    """A model returned nan, or its loss is nan or infinite."""


@contextlib.contextmanager
def frozen(model):
    """Inside, `model` is in eval mode, its parameters need no gradient; after, all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)


def attack(run):
    """Makes `run` an attack as defined above: checks arguments and freezes the model around it."""
    signature = inspect.signature(run)

    @functools.wraps(run)
    def checked(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        a = call.arguments
        x, y, eps = a['x'], a['y'], a['eps']
        if len(x) != len(y):
            raise ValueError(f'{run.__name__}: {len(x)} images but {len(y)} labels')
        if not eps >= 0:
            raise ValueError(f'{run.__name__}: eps must be at least 0, got {eps}')
        for name in ('n_iter', 'n_restarts', 'n_queries', 'batch_size'):
            if a.get(name, 1) < 1:
                raise ValueError(f'{run.__name__}: {name} must be at least 1, got {a[name]}')
        if len(x) == 0:
            return x.clone()
        low, high = (bound.item() for bound in x.aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f'{run.__name__}: images must lie in [0, 1], '
                             f'got values from {low:.6g} to {high:.6g}')
        if eps == 0:
            return x.clone()
        if not a.get('step_size', 1) > 0:
            raise ValueError(f'{run.__name__}: step_size must be above 0, got {a["step_size"]}')
        a['index'] = torch.arange(len(x)) if a['index'] is None else a['index']
        if len(a['index']) != len(x):
            raise ValueError(f'{run.__name__}: {len(x)} images '
                             f'but {len(a["index"])} entries of index')
        a['index'] = a['index'].to(x.device)
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
        z = x_adv[rows]  # a view: steps in place are steps of x_adv
        low, high = box(x[rows], eps)
        noise = uniform('pgd', seed, index[rows], x.shape[1:], x).mul_(2).sub_(1)
        z.add_(noise, alpha=width).clamp_(low, high)
        for _ in range(n_iter):
            loss, _, grad = loss_and_gradient(model, z, y[rows], cross_entropy)
            z.add_(grad.sign_(), alpha=step_size).clamp_(low, high)
            total.add_(loss.sum())
    refuse_nan(total)
    return x_adv


@attack
def apgd(model, x, y, eps, n_iter=100, n_restarts=1, loss='ce', *, rho=.75, best_loss=False,
         seed=0, index=None, batch_size=250):
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
    x_adv, best = x.clone(), x.new_full((len(x),), -math.inf)
    if not best_loss:
        best[~correct(model, x, y, batch_size)] = math.inf
    for restart in range(n_restarts):
        for rows in (best < math.inf).nonzero().squeeze(1).split(batch_size):
            noise = uniform(f'apgd {loss}', seed, index[rows], x.shape[1:], x, restart)
            x_run, best_run = _apgd_run(model, x[rows], y[rows], eps, n_iter, LOSSES[loss], rho,
                                        best_loss, noise)
            better = best_run > best[rows]
            x_adv[rows[better]], best[rows[better]] = x_run[better], best_run[better]
    return x_adv


def _apgd_run(model, x, y, eps, n_iter, criterion, rho, best_loss, noise):
    """One run of APGD from a start drawn with `noise` in [0, 1): best points and their losses."""
    def measure(x_adv, y):
        loss, logits, grad = loss_and_gradient(model, x_adv, y, criterion)
        total.add_(loss.sum())
        return loss if best_loss else loss.masked_fill(logits.argmax(1) != y, math.inf), grad

    total = x.new_zeros(())
    low, high = box(x, eps)
    noise = 2 * noise - 1
    x_adv = torch.clamp(x + eps * noise / noise.abs().amax((1, 2, 3), keepdim=True), low, high)
    loss, grad = measure(x_adv, y)
    s = SimpleNamespace(  # the state of each image
        rows=torch.arange(len(x), device=x.device), y=y, low=low, high=high, x_adv=x_adv,
        x_prev=x_adv, loss=loss, grad=grad, x_best=x_adv, loss_best=loss, grad_best=grad,
        eta=torch.full_like(loss, 2 * eps), rises=torch.zeros_like(loss), loss_mark=loss,
        halved=torch.ones_like(loss, dtype=torch.bool))
    x_out, loss_out, mark = x_adv.clone(), loss.clone(), 0
    for k in range(1, n_iter + 1):
        if k % 4 == 1 and not best_loss:  # images that are done leave the batch
            x_out[s.rows], loss_out[s.rows] = s.x_best, s.loss_best
            standing = s.loss_best < math.inf
            s = SimpleNamespace(**{name: state[standing] for name, state in vars(s).items()})
            if len(s.rows) == 0:
                break
        step = torch.clamp(s.x_adv + per_image(s.eta) * s.grad.sign(), s.low, s.high) - s.x_adv
        if k > 1:
            step = .75 * step + .25 * (s.x_adv - s.x_prev)
        s.x_prev, s.x_adv, loss_prev = s.x_adv, torch.clamp(s.x_adv + step, s.low, s.high), s.loss
        s.loss, s.grad = measure(s.x_adv, s.y)
        s.rises = s.rises + (s.loss > loss_prev)
        better = s.loss > s.loss_best
        s.loss_best = torch.where(better, s.loss, s.loss_best)
        s.x_best = torch.where(per_image(better), s.x_adv, s.x_best)
        s.grad_best = torch.where(per_image(better), s.grad, s.grad_best)
        if k in apgd_checkpoints(n_iter):
            halve = (s.rises < rho * (k - mark)) | ~s.halved & (s.loss_best <= s.loss_mark)
            s.eta = torch.where(halve, s.eta / 2, s.eta)
            s.loss = torch.where(halve, s.loss_best, s.loss)
            s.x_adv = torch.where(per_image(halve), s.x_best, s.x_adv)
            s.grad = torch.where(per_image(halve), s.grad_best, s.grad)
            s.halved, s.loss_mark, s.rises, mark = halve, s.loss_best, torch.zeros_like(s.rises), k
    x_out[s.rows], loss_out[s.rows] = s.x_best, s.loss_best
    refuse_nan(total)
    return x_out, loss_out


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
def square(model, x, y, eps, n_queries=5000, p_init=.8, *, seed=0, index=None, batch_size=250):
    """Square attack (Andriushchenko et al. 2019): random search with squares, needing no gradient.

    It starts from vertical stripes of +-eps (the first query). Each further query sets a window, at
    a random place and of a size that shrinks on a schedule (`square_side`), to +-eps in each
    channel, and is kept if the margin falls. An image misclassified from the start stays as it is;
    one that comes to be is done.
    """
    if not 0 < p_init <= 1:
        raise ValueError(f'square: p_init must be above 0 and at most 1, got {p_init}')
    def measure(x_adv, y):
        logits = model(x_adv)
        margins = margin(logits, y)
        total.add_(margins.sum())
        return margins.masked_fill(logits.argmax(1) != y, -math.inf)  # a misclassified one is done

    channels, height, width = x.shape[1:]
    x_adv, best, total = x.clone(), x.new_full((len(x),), -math.inf), x.new_zeros(())
    for rows in correct(model, x, y, batch_size).nonzero().squeeze(1).split(batch_size):
        stripes = uniform('square', seed, index[rows], (channels, 1, width), x, 1) < .5
        x_adv[rows] = torch.where(stripes, *box(x[rows], eps))
        best[rows] = measure(x_adv[rows], y[rows])
    for start in range(2, n_queries + 1, 20):  # images that are done leave between blocks of 20
        block = range(start, min(start + 20, n_queries + 1))
        for rows in (best > -math.inf).nonzero().squeeze(1).split(batch_size):
            x_rows, y_rows, best_rows, corners = x_adv[rows], y[rows], best[rows], box(x[rows], eps)
            draws = uniform('square', seed, index[rows], (2 + channels,), x,
                            torch.tensor(block, device=x.device)[:, None])
            for query, u in zip(block, draws):
                side = square_side(query, p_init, height, width)
                window = (inside(u[:, 0], side, height)[:, None, :, None]
                          & inside(u[:, 1], side, width)[:, None, None])
                signed = torch.where(per_image(u[:, 2:] < .5), *corners)
                x_new = torch.where(window, signed, x_rows)
                new = measure(x_new, y_rows)
                x_rows = torch.where(per_image(new < best_rows), x_new, x_rows)
                best_rows = torch.minimum(new, best_rows)
            x_adv[rows], best[rows] = x_rows, best_rows
    refuse_nan(total)
    return x_adv


def square_side(query, p_init, height, width):
    """Side of Square's window at `query`: sqrt(p h w), p halved after queries 10, 50, 200, ..."""
    halvings = sum(query > q for q in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return min(max(round(math.sqrt(p_init / 2 ** halvings * height * width)), 1), height, width)


def inside(u, side, size):
    """(N, size) mask of `side` places from a start uniform in 0..size - side; u in [0, 1), (N,)."""
    place = torch.arange(size, device=u.device) - (u * (size - side + 1)).long()[:, None]
    return (place >= 0) & (place < side)


# The attacks of Table 1. What is open in them (eps, and the steps of PGD) belongs to the run.
ATTACKS = {
    'pgd': pgd,
    'pgd100': functools.partial(pgd, n_iter=100),
    'apgd100_ce': functools.partial(apgd, n_iter=100, n_restarts=5, loss='ce'),
    'apgd100_dlr': functools.partial(apgd, n_iter=100, n_restarts=5, loss='dlr'),
    'square5k': functools.partial(square, n_queries=5000, p_init=.8),
}
TITLES = {'pgd': 'PGD', 'pgd100': 'PGD100', 'apgd100_ce': 'APGD100-CE',
          'apgd100_dlr': 'APGD100-DLR', 'square5k': 'Square5K'}


def predict(model, x, batch_size=250):
    """The classes that the model, in eval mode, predicts for x: (N,) int64."""
    classes = torch.empty(len(x), dtype=torch.long, device=x.device)
    with frozen(model), torch.no_grad():
        for i in range(0, len(x), batch_size):
            logits = model(x[i:i + batch_size])
            refuse_nan(logits.sum())
            classes[i:i + batch_size] = logits.argmax(1)
    return classes


def correct(model, x, y, batch_size=250):
    """Whether the model predicts y: (N,) bool. 1 - its mean is the clean (x_adv: robust) error."""
    return predict(model, x, batch_size) == y


def mean_loss(model, x, y, batch_size=250):
    """Mean cross-entropy and error of the model, in eval mode, on x: two floats.

    Of adversarial examples they are L_eps (Eq. 1) and the robust error, as the attack sees them.
    """
    loss, errors = x.new_zeros((), dtype=torch.float64), 0
    with frozen(model), torch.no_grad():
        for i in range(0, len(x), batch_size):
            logits, labels = model(x[i:i + batch_size]), y[i:i + batch_size]
            refuse_nan(logits.sum())
            loss += cross_entropy(logits, labels).sum()
            errors += (logits.argmax(1) != labels).sum()
    return loss.item() / len(x), errors.item() / len(x)


def loss_and_gradient(model, x, y, criterion):
    """Losses, (N,), logits and gradient of each loss with respect to its image; nothing else."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        loss = criterion(logits, y)
        gradient, = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), logits.detach(), gradient


def cross_entropy(logits, y):
    """Cross-entropy of each image, (N,)."""
    return F.cross_entropy(logits, y, reduction='none')


def margin(logits, y):
    """z_y - max_{i != y} z_i, (N,): at most 0 where the image is misclassified."""
    z_y = logits.gather(1, y[:, None])
    return (z_y - logits.scatter(1, y[:, None], -math.inf).amax(1, keepdim=True)).squeeze(1)


def dlr(logits, y):
    """Difference of logits ratio, -(z_y - max_{i != y} z_i) / (z_(1) - z_(3) + 1e-12), (N,)
    (Croce & Hein 2020).

    It needs at least 3 classes and is invariant to shifts and positive scalings of the logits.
    """
    if logits.shape[1] < 3:
        raise ValueError(f'dlr needs at least 3 classes, got {logits.shape[1]}')
    top = logits.topk(3, 1).values
    return -margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES = {'ce': cross_entropy, 'dlr': dlr}


def box(x, eps):
    """Corners of the l_inf eps-ball around x, cut to [0, 1]: one box, so one clamp projects."""
    return (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)


def per_image(values):
    """(N,) or (N, C) values, shaped to broadcast over images (N, C, H, W)."""
    return values.reshape(values.shape + (1,) * (4 - values.dim()))


def refuse_nan(total):
    """NotFiniteError if `total`, a sum over what the model returned, is nan."""
    if total.isnan():
        raise NotFiniteError('the logits of the model are nan')


def uniform(name, seed, index, shape, like, stream=0):
    """Uniform numbers in [0, 1), (*index.shape, *shape), in the dtype and on the device of `like`.

    Counter-based (Salmon et al. 2011): they are a pure function of the name of who draws, the seed,
    the image's index and the stream (these two may broadcast), so they are the same in any batch,
    order and device. They are those of SplitMix64 (Steele et al. 2014), seeded by the four.
    """
    key = torch.tensor(derive(zlib.crc32(name.encode()), seed), device=like.device)
    for word in index, stream:
        key = splitmix64(key + word)
    counter = torch.arange(1, math.prod(shape) + 1, device=like.device)
    bits = splitmix64(key[..., None] + counter * -0x61C8864680B583EB)
    return ((bits >> 40) & 0xFFFFFF).to(like.dtype).mul_(2 ** -24).reshape(*key.shape, *shape)


def derive(*words):
    """One seed, 0..2^63 - 1, from several whole numbers such as seed, epoch and batch."""
    key = torch.tensor(0)
    for word in words:
        key = splitmix64(key + word % 2 ** 63) + 1
    return key.item() % 2 ** 63


def splitmix64(z):
    """SplitMix64's output function on int64 words; products wrap, and masks make shifts logical."""
    z = (z ^ (z >> 30) & (1 << 34) - 1) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27) & (1 << 37) - 1) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31) & (1 << 33) - 1

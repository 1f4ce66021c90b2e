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
import zlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import models


class NotFiniteError(ValueError):
    """A model returned nan, or its loss is nan or infinite."""


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
        with models.frozen(a['model']), torch.no_grad():
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
        total += ascend(model, x[rows], y[rows], noise, x_adv[rows], eps, step_size, n_iter, width)
    refuse_nan(total)
    return x_adv


def ascend(model, x, y, noise, x_adv, eps, step_size, n_iter, width):
    """The loop of `pgd`: turns `x_adv` into its result for a start drawn with `noise` in [0, 1).

    eps, step_size and width, the start's, may be tensors, (). Returns the sum of all losses, ().
    Nothing here waits for the device.
    """
    (low, high), total = box(x, eps), x.new_zeros(())
    x_adv.copy_(x).add_((2 * noise - 1).mul_(width)).clamp_(low, high)
    for _ in range(n_iter):
        loss, _, grad = loss_and_gradient(model, x_adv, y, cross_entropy)
        x_adv.add_(grad.sign_().mul_(step_size)).clamp_(low, high)
        total.add_(loss.sum())
    return total


class Adversary:
    """The attacker of a model in training: `pgd`, set up once for all batches.

    adversary(x, y, eps, step_size, start=..., seed=...) is pgd(model, x, y, eps, step_size, n_iter,
    ...) but for rounding: the attacked network is `models.folded`, as the parameters are at the
    call. On cuda the whole loop, folding included, is captured as a CUDA graph at the first batch
    of each shape; budgets are tensors in it, so that a schedule needs no other. Nothing waits for
    the device; hence no value is checked: logits that are nan make `total`, the sum of all losses
    so far, nan.

    Folding is checked on the images x, a few, if given.

    `compiled` is applied to the network (torch.compile); `captured` to the loop, a function without
    arguments, unless None: `captured` of this module on cuda, nothing elsewhere.
    """

    def __init__(self, model, n_iter, *, x=None, compiled=None, captured=None):
        self.model, self.n_iter, self.captured, self.loops = model, n_iter, captured, {}
        self.folded, self.total = models.folded(model, x), next(model.parameters()).new_zeros(())
        self.network = compiled(self.folded) if compiled else self.folded

    def __call__(self, x, y, eps, step_size, *, start=None, seed=0):
        if x.shape not in self.loops:
            self.loops[x.shape] = self.loop(x, y)
        s, replay = self.loops[x.shape]
        noise = uniform('pgd', seed, s.index, x.shape[1:], x)
        width = step_size if start is None else start
        for fixed, new in (s.x, x), (s.y, y), (s.noise, noise):
            fixed.copy_(new)
        for fixed, new in (s.eps, eps), (s.step_size, step_size), (s.width, width):
            fixed.fill_(new)
        replay()
        return s.x_adv.clone()

    def loop(self, x, y):
        """Tensors for the arguments and the result of one shape of batches, and what fills them."""
        s = SimpleNamespace(
            x=x.clone(), y=y.clone(), noise=torch.zeros_like(x), x_adv=torch.empty_like(x),
            index=torch.arange(len(x), device=x.device),
            **{name: x.new_zeros(()) for name in ('eps', 'step_size', 'width')})

        def run():
            with models.frozen(self.model), torch.no_grad():
                self.folded.refold()
                self.total += ascend(self.network, s.x, s.y, s.noise, s.x_adv, s.eps, s.step_size,
                                     self.n_iter, s.width)

        capture = self.captured or (captured if x.is_cuda else None)
        return s, capture(run) if capture else run


def captured(run):
    """run(), which reads and writes fixed tensors of a cuda device, as a CUDA graph to replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries and compilers set themselves up
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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
    x_adv, best, total = x.clone(), x.new_full((len(x),), -math.inf), x.new_zeros(())
    if not best_loss:
        best[~correct(model, x, y, batch_size)] = math.inf
    waiting = (best < math.inf).nonzero().squeeze(1)
    restarts, checkpoints = torch.zeros_like(y), y.new_tensor(apgd_checkpoints(n_iter))
    s = apgd_begin(x[:0], y[:0], waiting[:0], x[:0], eps)
    while len(waiting) + len(s.rows):
        new, waiting = waiting.tensor_split([batch_size - len(s.rows)])
        if len(new):
            noise = uniform(f'apgd {loss}', seed, index[new], x.shape[1:], x, restarts[new])
            begun = apgd_begin(x[new], y[new], new, noise, eps)
            s = SimpleNamespace(**{name: torch.cat([state, getattr(begun, name)])
                                   for name, state in vars(s).items()})
        for _ in range(min(4, n_iter + 1 - int(s.k.max()))):  # then images may leave and join
            total += apgd_step(s, model, LOSSES[loss], checkpoints, rho, best_loss)
        done = (s.k > n_iter) | (s.loss_best == math.inf)
        ended = done.nonzero().squeeze(1)
        if len(ended):
            rows = s.rows[ended]
            better = s.loss_best[ended] > best[rows]
            x_adv[rows] = torch.where(per_image(better), s.x_best[ended], x_adv[rows])
            best[rows] = torch.maximum(s.loss_best[ended], best[rows])
            restarts[rows] += 1
            again = (restarts[rows] < n_restarts) & (best[rows] < math.inf)
            waiting = torch.cat([waiting, rows[again]])
            going = (~done).nonzero().squeeze(1)
            s = SimpleNamespace(**{name: state[going] for name, state in vars(s).items()})
    refuse_nan(total)
    return x_adv


def apgd_begin(x, y, rows, noise, eps):
    """The state of APGD of each image at its start, drawn with `noise` in [0, 1).

    `rows` are the places of the images. x_k is to be evaluated, x_j the best so far; all losses are
    yet unknown: none rises above infinity, none is as low as -infinity.
    """
    low, high = box(x, eps)
    noise = 2 * noise - 1
    x_k = torch.clamp(x + eps * noise / noise.abs().amax((1, 2, 3), keepdim=True), low, high)
    zeros = x.new_zeros(len(x))
    return SimpleNamespace(
        rows=rows, y=y, low=low, high=high, k=torch.zeros_like(y), x_k=x_k, x_prev=x_k,
        loss=zeros + math.inf, x_best=x_k, loss_best=zeros - math.inf,
        grad_best=torch.zeros_like(x), eta=zeros + 2 * eps, rises=zeros, mark=zeros,
        loss_mark=zeros - math.inf, halved=zeros.bool())


def apgd_step(s, model, criterion, checkpoints, rho, best_loss):
    """Evaluates the k-th point of each image, each at a k of its own, and moves to the next.

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
    # at a checkpoint the step may be halved, and the search goes back to the best point
    check = torch.isin(s.k, checkpoints)
    halve = check & ((s.rises < rho * (s.k - s.mark)) | ~s.halved & (s.loss_best <= s.loss_mark))
    s.eta = torch.where(halve, s.eta / 2, s.eta)
    s.loss = torch.where(halve, s.loss_best, loss)
    x_k = torch.where(per_image(halve), s.x_best, s.x_k)
    grad = torch.where(per_image(halve), s.grad_best, grad)
    s.halved = torch.where(check, halve, s.halved)
    s.loss_mark = torch.where(check, s.loss_best, s.loss_mark)
    s.rises = s.rises.masked_fill(check, 0)
    s.mark = torch.where(check, s.k, s.mark)
    # z, then the step towards it with momentum but in the first one
    z = torch.addcmul(x_k, per_image(s.eta), grad.sign()).clamp_(s.low, s.high)
    a = per_image(1 - .25 * (s.k > 0).to(x_k))
    x_next = x_k.lerp(z, a).addcmul_(1 - a, x_k - s.x_prev).clamp_(s.low, s.high)
    s.x_prev, s.x_k = x_k, x_next
    s.k = s.k + 1
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


def fitting_batch(model, x, y):
    """How many of the images x should pass through `model` at a time: as many as memory allows.

    At most 250 on a CPU, where more are no faster, else 4,096. What an image takes is measured on
    the graph of 16.
    """
    with models.frozen(model), models.saved_bytes() as saved:
        loss_and_gradient(model, x[:16], y[:16], cross_entropy)
    size = sum(saved.values()) / len(x[:16])
    return min(models.fitting(size, x.device), 4096 if x.is_cuda else 250)


def predict(model, x, batch_size=250):
    """The classes that the model, in eval mode, predicts for x: (N,) int64."""
    classes = torch.empty(len(x), dtype=torch.long, device=x.device)
    with models.frozen(model), torch.no_grad():
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
    with models.frozen(model), torch.no_grad():
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
    key = index + derive(zlib.crc32(name.encode()), seed)
    key = splitmix64(splitmix64(key) + stream)
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

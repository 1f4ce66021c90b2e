"""What all attacks share: checked arguments, the box that they search, batches that stay full."""

import functools
import math
from types import SimpleNamespace

import torch

from lib import distributed
from lib.classifier import NotFiniteError, frozen, has_nan, logits_of, refuse_nan


def attack(search):
    """Makes a function that searches an attack as attack.py describes it.

    Its errors name it. The model is frozen during the search. Images in half precision are searched
    in float32 and rounded for the model alone.
    """

    @functools.wraps(search)
    def checked(model, x, y, eps, *args, index=None, seed=0, batch_size=250, **kwargs):
        index = torch.arange(len(x)) if index is None else index
        network, dtype = model, x.dtype
        try:
            with torch.inference_mode(False), torch.no_grad(), frozen(model):
                check_arguments(x, y, eps, index)
                check_counts(batch_size=batch_size)
                x = usable(x)
                y, index = (usable(values.to(x.device, torch.int64)) for values in (y, index))
                if len(x):
                    check_model(model, x[:1], y)
                if eps == 0:
                    return x.clone()
                if dtype.itemsize < 4:
                    x, network = x.float(), lambda x: model(x.to(dtype))
                kwargs |= {'index': index, 'seed': int(seed), 'batch_size': batch_size}
                x_adv = search(network, x, y, eps, *args, **kwargs)
                check_result(x_adv, x, eps)
                return x_adv.to(dtype)
        except ValueError as error:
            error.args = (f'{search.__name__}: {error}',)
            raise

    return checked


def check_arguments(x, y, eps, index):
    """ValueError that says which argument of an attack is wrong, and what would be right."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f'images must be floats, (N, C, H, W), got {x.dtype} {tuple(x.shape)}')
    if y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f'labels must be integers, (N,), got {y.dtype} {tuple(y.shape)}')
    if not len(x) == len(y) == len(index):
        raise ValueError(f'{len(x)} images, {len(y)} labels, {len(index)} of index')
    if not 0 <= eps <= 1:
        hint = f': did you mean {eps:g}/255?' if 1 < eps <= 255 else ''
        raise ValueError(f'eps must lie in [0, 1], got {eps:g}{hint}')
    low, high = (bound.item() for bound in x.aminmax()) if len(x) else (0, 1)
    if not 0 <= low <= high <= 1:
        values = f'{low:.9g} to {high:.9g}'
        raise ValueError(f'images must lie in [0, 1], got {values}; normalise inside the model')


def check_counts(**counts):
    """ValueError unless each count that is given, such as n_iter=100, is at least 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f'{name} must be at least 1, got {count}')


def check_model(model, x, y):
    """ValueError unless the model returns logits of x, (1, C, H, W), and has all classes in y."""
    logits = logits_of(model, x.clone())
    if logits.dim() != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape)
        raise ValueError(f'the model must return logits, (N, K), K at least 2, got {got}')
    refuse_nan(has_nan(logits))
    first, last, n_classes = y.min().item(), y.max().item(), logits.shape[1]
    if not 0 <= first <= last < n_classes:
        classes = f'0 .. {n_classes - 1}, the classes of the model'
        raise ValueError(f'labels must be {classes}, got {first} .. {last}')


def check_result(x_adv, x, eps):
    """ValueError unless a search has returned images in the box around x."""
    if x_adv.shape != x.shape:
        raise ValueError(f'returned {tuple(x_adv.shape)} for images {tuple(x.shape)}')
    low, high = box(x, eps)
    if ((x_adv < low - 1e-6) | (x_adv > high + 1e-6)).any():
        raise ValueError('returned images outside of the l_inf ball or of [0, 1]')


def usable(tensor):
    """The tensor, detached, and copied if it is of torch.inference_mode, which autograd refuses."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def shared(attack):
    """`attack`, a function (model, x, y, index=..., ...) -> x_adv, by all processes together: each
    attacks its share of the images, and all get the whole result, or NotFiniteError if one does."""

    def run(model, x, y, *, index=None, **options):
        index = torch.arange(len(x)) if index is None else index
        rows, x_adv = distributed.own(), torch.zeros_like(x)
        try:
            x_adv[rows] = attack(model, x[rows], y[rows], index=index[rows], **options)
        except NotFiniteError:
            x_adv[:] = math.nan
        distributed.total(x_adv)
        refuse_nan(has_nan(x_adv))
        return x_adv

    return run if distributed.SIZE > 1 else attack


def run_in_full_batches(waiting, batch_size, start, advance, finish):
    """Runs a search on many images in batches that stay full: the next replaces each that is done.

    `waiting` are the rows of the images, (N,). start(rows) returns the state of the search for some
    of them, a namespace of tensors with an entry per image. advance(state) takes some steps and
    returns which images are done, (n,) bool, and whether a loss or gradient was nan, ().
    finish(state) stores the results of those that are done and returns the rows to search again.
    """
    state = start(waiting[:0])
    while len(waiting) + len(state.rows):
        new, waiting = waiting.tensor_split([batch_size - len(state.rows)])
        if len(new):
            state = join(state, start(new))
        done, nan = advance(state)
        refuse_nan(nan)
        if done.any():
            waiting = torch.cat([waiting, finish(take(state, done))])
            state = take(state, ~done)


def join(first, second):
    """Two namespaces of tensors with the same names as one."""
    names = vars(first)
    joined = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    return SimpleNamespace(**joined)


def take(state, mask):
    """The entries of a namespace of tensors where `mask`, (n,) bool."""
    rows = mask.nonzero().squeeze(1)
    return SimpleNamespace(**{name: values[rows] for name, values in vars(state).items()})


def box(x, eps):
    """Lowest and highest corner of the l_inf eps-ball around x within [0, 1]; a clamp projects."""
    return (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)


def per_image(values):
    """Values, (N,) or (N, C), shaped to broadcast over images, (N, C, H, W)."""
    return values.reshape(values.shape + (1,) * (4 - values.dim()))

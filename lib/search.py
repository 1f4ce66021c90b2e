"""What all attacks share: checked arguments, the box that they search, batches that stay full."""

import functools
import inspect
from types import SimpleNamespace

import torch

from lib.classifier import frozen, has_nan, logits_of, refuse_nan


def attack(search):
    """Makes a function that searches an attack as attack.py describes it.

    ValueError, naming the attack, for arguments that `prepare` refuses. The model is frozen during
    the search. Images in half precision are searched in float32 and rounded for the model alone.
    """
    signature = inspect.signature(search)

    @functools.wraps(search)
    def checked(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        a = call.arguments
        model, dtype = a['model'], a['x'].dtype
        with torch.inference_mode(False), torch.no_grad(), frozen(model):
            try:
                prepare(a)
            except ValueError as error:
                raise type(error)(f'{search.__name__}: {error}') from None
            if a['eps'] == 0:
                return a['x'].clone()
            if dtype.itemsize < 4:
                a['x'], a['model'] = a['x'].float(), lambda x: model(x.to(dtype))
            return search(*call.args, **call.kwargs).to(dtype)

    return checked


def prepare(a):
    """Checks the arguments `a` of an attack, name -> value, and turns labels and index into int64.

    ValueError says which value is wrong, and what would be right.
    """
    x, y, eps, index = a['x'], a['y'], a['eps'], a['index']
    index = torch.arange(len(x)) if index is None else index
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f'images must be floats, (N, C, H, W), got {x.dtype} {tuple(x.shape)}')
    if y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f'labels must be integers, (N,), got {y.dtype} {tuple(y.shape)}')
    if not len(x) == len(y) == len(index):
        raise ValueError(f'{len(x)} images, {len(y)} labels, {len(index)} of index')
    if not 0 <= eps <= 1:
        hint = f': did you mean {eps:g}/255?' if 1 < eps <= 255 else ''
        raise ValueError(f'eps must lie in [0, 1], got {eps:g}{hint}')
    for count in ('n_iter', 'n_restarts', 'n_targets', 'n_queries', 'batch_size'):
        if a.get(count) is not None and a[count] < 1:
            raise ValueError(f'{count} must be at least 1, got {a[count]}')
    if not (a.get('step_size', 1) > 0 or eps == 0):
        raise ValueError(f'step_size must be above 0, got {a["step_size"]}')
    y, index = (values.to(x.device, torch.int64) for values in (y, index))
    for name, tensor in ('x', x), ('y', y), ('index', index):
        # autograd refuses tensors of torch.inference_mode
        a[name] = tensor.clone() if tensor.is_inference() else tensor.detach()
    a['seed'] = int(a['seed'])
    if len(x):
        low, high = (bound.item() for bound in x.aminmax())
        if not 0 <= low <= high <= 1:
            found = f'{low:.9g} to {high:.9g}'
            raise ValueError(f'images must lie in [0, 1], got {found}; normalise inside the model')
        check_model(a['model'], a['x'][:1], a['y'])


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
            begun = vars(start(new))
            joined = {name: torch.cat([old, begun[name]]) for name, old in vars(state).items()}
            state = SimpleNamespace(**joined)
        done, nan = advance(state)
        refuse_nan(nan)
        if done.any():
            waiting = torch.cat([waiting, finish(take(state, done))])
            state = take(state, ~done)


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

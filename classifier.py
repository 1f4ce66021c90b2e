"""Predictions, losses and gradients of a classifier.

A model maps images, (N, C, H, W), to logits, (N, n_classes). It runs in eval mode with frozen
parameters and is left as it was found.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F

cross_entropy = functools.partial(F.cross_entropy, reduction='none')  # of each image, (N,)


class NotFiniteError(ValueError):
    """A model returned nan, or its loss is nan or infinite."""


@contextlib.contextmanager
def frozen(model):
    """Inside, `model` is in eval mode, its parameters need no gradient; after, all is as it was."""
    if not isinstance(model, torch.nn.Module):  # a plain function, taken as it is
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in grads:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)


def logits_of(model, x):
    """The logits of x, (N, K), in the precision of x, but never in half precision.

    ValueError if the model changes x, which is the caller's, or returns anything else.
    """
    version = None if x.is_inference() else x._version
    logits = model(x)
    if version is not None and x._version != version:
        raise ValueError('the model changes its input in place; let it work on a copy')
    if not isinstance(logits, torch.Tensor):
        got = type(logits).__name__
        raise ValueError(f'the model must return the logits alone, not a {got}')
    return logits.to(torch.promote_types(x.dtype, torch.float32))


def checked_logits(model, x):
    """`logits_of` the model, and NotFiniteError if one is nan."""
    logits = logits_of(model, x)
    refuse_nan(has_nan(logits))
    return logits


def predict(model, x, batch_size=250):
    """The classes that the model, in eval mode, predicts for x: (N,) int64."""
    classes = torch.empty(len(x), dtype=torch.long, device=x.device)
    with frozen(model), torch.no_grad():
        for i in range(0, len(x), batch_size):
            classes[i : i + batch_size] = checked_logits(model, x[i : i + batch_size]).argmax(1)
    return classes


def wrong_classes(model, x, y, k, batch_size=250):
    """The k most likely wrong classes of each image, the likeliest first: (N, k) int64; all where
    there are fewer. The model is in eval mode."""
    found = []
    for images, labels in zip(x.split(batch_size), y.split(batch_size)):
        logits = checked_logits(model, images).scatter(1, labels[:, None], -math.inf)
        found.append(logits.topk(min(k, logits.shape[1] - 1)).indices)
    return torch.cat(found) if found else y.new_zeros(0, k)


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
            logits, labels = checked_logits(model, x[i : i + batch_size]), y[i : i + batch_size]
            loss += cross_entropy(logits, labels).sum()
            errors += (logits.argmax(1) != labels).sum()
    return loss.item() / len(x), errors.item() / len(x)


def loss_and_gradient(model, x, y, criterion):
    """Losses, (N,), logits and gradient of each loss with respect to its image; nothing else."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model, x)
        loss = criterion(logits, y)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), logits.detach(), gradient


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
    return -margin(logits, y) / finite(top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits, y, target):
    """Targeted DLR, -(z_y - z_target) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12), (N,)
    (Croce & Hein 2020); at least 4 classes."""
    if logits.shape[1] < 4:
        raise ValueError(f'targeted dlr needs at least 4 classes, got {logits.shape[1]}')
    top = logits.topk(4, 1).values
    z_y, z_target = (logits.gather(1, classes[:, None]).squeeze(1) for classes in (y, target))
    return -(z_y - z_target) / finite(top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def finite(scale):
    """nan for what is infinite, since a loss divided by it, and its gradient, would be 0."""
    return scale.masked_fill(scale.isinf(), math.nan)


LOSSES = {'ce': cross_entropy, 'dlr': dlr}


def flag(x):
    """A bool, (), on the device of x, to be raised by `has_nan`."""
    return torch.zeros((), dtype=torch.bool, device=x.device)


def has_nan(*tensors):
    """Whether one of them holds a nan: (), bool, for which nothing waits."""
    return torch.stack([tensor.isnan().any() for tensor in tensors]).any()


def refuse_nan(found):
    """NotFiniteError if `found`, what `has_nan` said of logits, losses or gradients. A gradient
    that is nan has sign 0, so that a broken model would look robust."""
    if found:
        raise NotFiniteError('the logits of the model, or the gradients of its loss, are nan')

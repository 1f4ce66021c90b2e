"""Predictions, losses and gradients of a classifier.

A model maps images, (N, C, H, W), to logits, (N, n_classes).
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
    """Inside, `model` is in eval mode and its parameters need no gradient; then all is restored."""
    if not isinstance(model, torch.nn.Module):  # a plain function has no modes
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
    """The logits of x, (N, K), in the precision of x, at least float32. ValueError if the model
    changes x in place or returns anything but a tensor."""
    version = None if x.is_inference() else x._version
    logits = model(x)
    if version is not None and x._version != version:
        raise ValueError('the model changes its input in place; let it work on a copy')
    if not isinstance(logits, torch.Tensor):
        got = type(logits).__name__
        raise ValueError(f'the model must return the logits alone, not a {got}')
    return logits.to(torch.promote_types(x.dtype, torch.float32))


def all_logits(model, x, batch_size=250):
    """The logits of x, (N, K), of the model in eval mode. NotFiniteError if one is nan."""
    with frozen(model), torch.no_grad():
        parts = [logits_of(model, part) for part in x.split(batch_size) if len(part)]
    logits = torch.cat(parts) if parts else x.new_zeros(0, 1)
    refuse_nan(has_nan(logits))
    return logits


def predict(model, x, batch_size=250):
    """The classes that the model, in eval mode, predicts for x: (N,) int64."""
    return all_logits(model, x, batch_size).argmax(1)


def correct(model, x, y, batch_size=250):
    """Whether the model predicts y: (N,) bool. One minus its mean is the error on x."""
    return predict(model, x, batch_size) == y


def wrong_classes(model, x, y, k, batch_size=250):
    """The k most likely wrong classes of each image (all if there are fewer), the likeliest first:
    (N, k) int64."""
    logits = all_logits(model, x, batch_size).scatter(1, y[:, None], -math.inf)
    return logits.topk(min(k, logits.shape[1] - 1)).indices


def mean_loss(model, x, y, batch_size=250):
    """Mean cross-entropy and error of the model, in eval mode, on x: two floats. On adversarial
    examples they are L_eps (Eq. 1) and the robust error."""
    logits = all_logits(model, x, batch_size)
    loss = cross_entropy(logits, y).double().mean().item()
    return loss, (logits.argmax(1) != y).double().mean().item()


def loss_and_gradient(model, x, y, criterion):
    """Losses, (N,), logits, (N, K), and the gradient of each loss with respect to its image."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model, x)
        loss = criterion(logits, y)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), logits.detach(), gradient


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


LOSSES = {'ce': cross_entropy, 'dlr': dlr}


def flag(x):
    """A bool, (), False, on the device of x, to be raised by `has_nan`."""
    return torch.zeros((), dtype=torch.bool, device=x.device)


def has_nan(*tensors):
    """Whether one of the tensors holds a nan: (), bool, without waiting for the device."""
    return torch.stack([tensor.isnan().any() for tensor in tensors]).any()


def refuse_nan(found):
    """NotFiniteError if `found`, the `has_nan` of logits, losses or gradients: steps along the sign
    of nan, which is 0, would make a broken model look robust."""
    if found:
        raise NotFiniteError('the logits of the model, or the gradients of its loss, are nan')

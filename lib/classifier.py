"""Predictions, losses and gradients of a classifier, and its parameters as one vector.

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
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in trainable:
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


def flag(x):
    """False as a tensor, (), on the device of x: no nan so far."""
    return torch.zeros((), dtype=torch.bool, device=x.device)


def has_nan(*tensors):
    """Whether one of the tensors holds a nan: (), bool, without waiting for the device."""
    return torch.stack([tensor.isnan().any() for tensor in tensors]).any()


def refuse_nan(nan):
    """NotFiniteError if `nan`, the `has_nan` of logits, losses or gradients: steps along the sign
    of nan, which is 0, would make a broken model look robust."""
    if nan:
        raise NotFiniteError('the logits of the model, or the gradients of its loss, are nan')


def flat(tensors):
    """Tensors such as a model's parameters as one vector, (dim,)."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflat(vector, like):
    """The vector, (dim,), cut into views of the shapes of `like`."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like)]


def norm(*tensors):
    """The norm of all tensors as one vector, (); torch's is off by 1e-4 on millions of floats."""
    return torch.stack([(tensor * tensor).sum() for tensor in tensors]).sum().sqrt()

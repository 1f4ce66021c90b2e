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


def predict(model, x, batch_size=250):
    """The classes that the model, in eval mode, predicts for x: (N,) int64."""
    classes = torch.empty(len(x), dtype=torch.long, device=x.device)
    with frozen(model), torch.no_grad():
        for i in range(0, len(x), batch_size):
            logits = model(x[i : i + batch_size])
            check_not_nan(logits.sum())
            classes[i : i + batch_size] = logits.argmax(1)
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
            logits, labels = model(x[i : i + batch_size]), y[i : i + batch_size]
            check_not_nan(logits.sum())
            loss += cross_entropy(logits, labels).sum()
            errors += (logits.argmax(1) != labels).sum()
    return loss.item() / len(x), errors.item() / len(x)


def loss_and_gradient(model, x, y, criterion):
    """Losses, (N,), logits and gradient of each loss with respect to its image; nothing else."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
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
    return -margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES = {'ce': cross_entropy, 'dlr': dlr}


def check_not_nan(total):
    """NotFiniteError if `total`, a sum over what the model returned, is nan."""
    if total.isnan():
        raise NotFiniteError('the logits of the model are nan')

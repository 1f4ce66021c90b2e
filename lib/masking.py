"""Signs that robust errors are too small, because a model hides its gradients or its logits mislead
an attack (Athalye et al. 2018, Carlini et al. 2019)."""

import numpy as np
import torch

from lib.classifier import cross_entropy, frozen, loss_and_gradient


def signs(model, x, y, robust, batch_size=250):
    """{name: sentence} of the signs that an evaluation shows, each with a number and a remedy.

    robust[key], (N,), says which of the images x, (N, C, H, W), with labels y withstood an attack.
    """
    found = {}
    n, still = len(x), 0
    with frozen(model), torch.no_grad():
        once, again = model(x[:batch_size]), model(x[:batch_size])
        for images, labels in zip(x.split(batch_size), y.split(batch_size)):
            _, _, gradient = loss_and_gradient(model, images, labels, cross_entropy)
            still += (gradient.flatten(1) == 0).all(1).sum().item()
    if still > 0.01 * n:
        found['zero gradient'] = (
            f'the gradient is exactly zero at {still} of {n} images: a constant classifier, or one '
            'that is saturated or masked; PGD does not move them: read the columns DLR and Square'
        )
    difference = (once - again).abs().max().item()
    if difference > 1e-3 * once.abs().max().item():
        found['random'] = (
            f'two passes of the same images differ by up to {difference:.3g}: the verdict on a '
            'random model is luck; fix its seed, or average its logits over many passes'
        )
    if once.min() >= 0 and once.max() <= 1 and (once.sum(1) - 1).abs().max() < 1e-3:
        found['probabilities'] = (
            f'the outputs lie in [0, 1] and have sum 1, as in {once[0].tolist()[:3]} ...: their '
            'cross-entropy is flat; return the logits, before the softmax'
        )
    if {'pgd', 'pgd100'} <= robust.keys():
        more = (robust['pgd100'] & ~robust['pgd']).sum()
        less = (robust['pgd'] & ~robust['pgd100']).sum()
        if more - less > 2 * (more + less) ** 0.5:  # beyond chance
            found['more steps'] = (
                f'PGD100 leaves {more - less} of {n} images more than PGD of fewer steps: its loss '
                'misleads it; read the columns of APGD and Square'
            )
    fell_to_square, fell_to_gradients = np.zeros(n, bool), np.zeros(n, bool)
    for key in robust.keys() - {'clean'}:
        fell = fell_to_square if key.startswith('square') else fell_to_gradients
        fell |= ~robust[key]
    only = (fell_to_square & ~fell_to_gradients).sum()
    if only > 2 + 0.01 * n and len(robust) > 2:
        found['only square'] = (
            f'Square breaks {only} of {n} images that no attack with gradients broke, as gradients '
            'that are masked do not lead anywhere; more restarts or another loss may find more'
        )
    return found

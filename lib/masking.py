"""Signs that robust errors are too small, because a model hides its gradients or its logits mislead
an attack (Athalye et al. 2018, Carlini et al. 2019)."""

import numpy as np
import torch

from lib.classifier import cross_entropy, frozen, loss_and_gradient


def signs(model, x, y, robust, batch_size=250):
    """{name: sentence} of the signs that an evaluation shows, each with a number and a remedy.

    robust[key], (N,), says which of the images x, (N, C, H, W), with labels y withstood an attack.
    """
    sentences = {}
    n, n_zero = len(x), 0
    with frozen(model), torch.no_grad():
        logits, logits_again = model(x[:batch_size]), model(x[:batch_size])
        for images, labels in zip(x.split(batch_size), y.split(batch_size)):
            _, _, gradient = loss_and_gradient(model, images, labels, cross_entropy)
            n_zero += (gradient.flatten(1) == 0).all(1).sum().item()
    if n_zero > 0.01 * n:
        sentences['zero gradient'] = (
            f'the gradient is exactly zero at {n_zero} of {n} images: a constant classifier, or '
            'one that is saturated or masked; PGD does not move them: read the columns DLR and '
            'Square'
        )
    difference = (logits - logits_again).abs().max().item()
    if difference > 1e-3 * logits.abs().max().item():
        sentences['random'] = (
            f'two passes of the same images differ by up to {difference:.3g}: the verdict on a '
            'random model is luck; fix its seed, or average its logits over many passes'
        )
    if logits.min() >= 0 and logits.max() <= 1 and (logits.sum(1) - 1).abs().max() < 1e-3:
        sentences['probabilities'] = (
            f'the outputs lie in [0, 1] and have sum 1, as in {logits[0].tolist()[:3]} ...: their '
            'cross-entropy is flat; return the logits, before the softmax'
        )
    if {'pgd', 'pgd100'} <= robust.keys():
        only_pgd = (robust['pgd100'] & ~robust['pgd']).sum()  # images that PGD alone broke
        only_pgd100 = (robust['pgd'] & ~robust['pgd100']).sum()
        n_more = only_pgd - only_pgd100
        if n_more > 2 * (only_pgd + only_pgd100) ** 0.5:  # beyond chance
            sentences['more steps'] = (
                f'PGD100 leaves {n_more} of {n} images more than PGD of fewer steps: its loss '
                'misleads it; read the columns of APGD and Square'
            )
    withstood_square, withstood_gradients = np.ones(n, bool), np.ones(n, bool)
    for key in robust.keys() - {'clean'}:
        withstood = withstood_square if key.startswith('square') else withstood_gradients
        withstood &= robust[key]
    only_square = (withstood_gradients & ~withstood_square).sum()
    if only_square > 2 + 0.01 * n and len(robust) > 2:
        sentences['only square'] = (
            f'Square breaks {only_square} of {n} images that no attack with gradients broke, as '
            'gradients that are masked do not lead anywhere; more restarts or another loss may '
            'find more'
        )
    return sentences

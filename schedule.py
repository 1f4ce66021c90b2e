"""Learning rate and adversarial budget as pure functions of progress through the period (Eq. 5).

One clock drives both: t in [0, 1), the share of the current period that is over. A new period sets
it back to 0, and with it the learning rate and the budget.
"""
import math

EPS_SCHEDS = 'constant', 'linear', 'cosine'
LR_SCHEDS = 'constant', 'step', 'cosine', 'exponential'


def progress(epoch, periods):
    """t in [0, 1): how much of its period `epoch` (counted from 0, maybe fractional) has behind it.

    `periods` are the lengths of the periods in epochs. ValueError for an epoch outside of them.
    """
    start = 0
    for length in periods:
        if start <= epoch < start + length:
            return (epoch - start) / length
        start += length
    raise ValueError(f'epoch {epoch} is outside of the periods {list(periods)}')


def thirds(epochs):
    """The paper's three periods: a half, then two quarters of the epochs; 200 -> [100, 50, 50]."""
    if epochs < 4:
        raise ValueError(f'three periods need at least 4 epochs, got {epochs}')
    return [epochs - 2 * (epochs // 4), epochs // 4, epochs // 4]


def eps_at(t, kind, eps, eps_min=0., eps_max=None):
    """The budget at progress t, in the unit of `eps` (Eq. 5), clipped to [0, eps].

    'constant' is eps; 'linear' and 'cosine' rise from eps_min towards eps_max (twice eps unless
    given).
    """
    eps_max = 2 * eps if eps_max is None else eps_max
    if kind == 'constant':
        return eps
    if kind == 'linear':
        ramp = t
    elif kind == 'cosine':
        ramp = (1 - math.cos(math.pi * t)) / 2
    else:
        raise ValueError(f'eps schedule {kind!r} is unknown; choose from {", ".join(EPS_SCHEDS)}')
    return min(max(eps_min + (eps_max - eps_min) * ramp, 0.), eps)


def lr_at(t, kind, lr, warmup=0.):
    """The learning rate at progress t.

    'constant' is lr; 'step' a tenth of it from t = 1/2 and a hundredth from t = 3/4; 'cosine' falls
    to 0 and 'exponential' to a hundredth at t = 1. During the first `warmup` of the period it is
    multiplied by t / warmup, the learning rate's counterpart of a linear budget (appendix C.2.3).
    """
    if kind == 'constant':
        decay = 1.
    elif kind == 'step':
        decay = 1. if t < 1 / 2 else .1 if t < 3 / 4 else .01
    elif kind == 'cosine':
        decay = (1 + math.cos(math.pi * t)) / 2
    elif kind == 'exponential':
        decay = .01 ** t
    else:
        raise ValueError(f'lr schedule {kind!r} is unknown; choose from {", ".join(LR_SCHEDS)}')
    return lr * decay * (t / warmup if t < warmup else 1.)

"""Learning rate and adversarial budget as pure functions of progress through the period (Eq. 5).

One clock drives both: t in [0, 1), the share of the current period that is over. A new period
resets it to 0, and with it the learning rate and the budget.
"""

import math

# the ramp of the budget from eps_min (0) to eps_max (1)
EPS_SCHEDS = {
    'constant': lambda t: 1.0,
    'linear': lambda t: t,
    'cosine': lambda t: (1 - math.cos(math.pi * t)) / 2,
}

# the share of the learning rate that is left
LR_SCHEDS = {
    'constant': lambda t: 1.0,
    'step': lambda t: 1.0 if t < 1 / 2 else 0.1 if t < 3 / 4 else 0.01,
    'cosine': lambda t: (1 + math.cos(math.pi * t)) / 2,
    'exponential': lambda t: 0.01**t,
}


def progress(epoch, periods, ahead=0.0):
    """t in [0, 1): how much of its period `epoch` (counted from 0, maybe fractional) has behind it.

    `periods` are the lengths of the periods in epochs. With `ahead`, t that many epochs later, at
    most 1: the period does not change. ValueError for an epoch outside of the periods.
    """
    start = 0
    for length in periods:
        if start <= epoch < start + length:
            return (epoch + ahead - start) / length
        start += length
    raise ValueError(f'epoch {epoch} is outside of the periods {list(periods)}')


def thirds(epochs):
    """The paper's three periods: a half, then two quarters of the epochs; 200 -> [100, 50, 50]."""
    if epochs < 4:
        raise ValueError(f'three periods need at least 4 epochs, got {epochs}')
    return [epochs - 2 * (epochs // 4), epochs // 4, epochs // 4]


def eps_at(t, kind, eps, eps_min, eps_max):
    """The budget at progress t, in the unit of `eps`: from eps_min to eps_max along the ramp
    EPS_SCHEDS[kind], clipped to [0, eps] (Eq. 5)."""
    return min(max(eps_min + (eps_max - eps_min) * EPS_SCHEDS[kind](t), 0.0), eps)


def lr_at(t, kind, lr):
    """The learning rate at progress t, decayed from `lr` as LR_SCHEDS[kind] says."""
    return lr * LR_SCHEDS[kind](t)


def warmup_at(t, share):
    """The factor of the learning rate while it warms up linearly in the first `share` of a period,
    the counterpart of a linear budget (appendix C.2.3); t is taken at the end of an update, so that
    none is lost to a factor of 0."""
    return min(t / share, 1.0) if share else 1.0

"""Learning rate and adversarial budget as pure functions of progress through the period (Eq. 5).

Both follow t in [0, 1), the share of the current period that is over. Each new period starts again
at t = 0, and so do the learning rate and the budget.
"""

import math

# the ramp of the budget: 0 is eps_min, 1 is eps_max
EPS_SCHEDS = {
    'constant': lambda t: 1.0,
    'linear': lambda t: t,
    'cosine': lambda t: (1 - math.cos(math.pi * t)) / 2,
}

# the factor of the learning rate
LR_SCHEDS = {
    'constant': lambda t: 1.0,
    'step': lambda t: 1.0 if t < 1 / 2 else 0.1 if t < 3 / 4 else 0.01,
    'cosine': lambda t: (1 + math.cos(math.pi * t)) / 2,
    'exponential': lambda t: 0.01**t,
}


def progress(epoch, periods, ahead=0.0):
    """Progress t in [0, 1) through the period that holds `epoch` (may be fractional); `periods` are
    lengths. `ahead` adds epochs within that period. ValueError for an epoch outside of all."""
    start = 0
    for length in periods:
        if start <= epoch < start + length:
            return (epoch + ahead - start) / length
        start += length
    raise ValueError(f'epoch {epoch} is outside of the periods {list(periods)}')


def three_periods(epochs):
    """The paper's three periods: a half, then two quarters of the epochs; 200 -> [100, 50, 50]."""
    if epochs < 4:
        raise ValueError(f'three periods need at least 4 epochs, got {epochs}')
    return [epochs - 2 * (epochs // 4), epochs // 4, epochs // 4]


def eps_at(t, kind, eps, eps_min, eps_max):
    """The budget at progress t, in the unit of `eps`: from eps_min to eps_max along the ramp
    EPS_SCHEDS[kind], clipped to [0, eps] (Eq. 5)."""
    budget = eps_min + (eps_max - eps_min) * EPS_SCHEDS[kind](t)
    return min(max(budget, 0.0), eps)


def lr_at(t, kind, lr):
    """The learning rate at progress t, decayed from `lr` along LR_SCHEDS[kind]."""
    return lr * LR_SCHEDS[kind](t)


def warmup_at(t, share):
    """The factor of the learning rate that rises linearly from 0 to 1 over the first `share` of a
    period (C.2.3). t is taken at the end of a step of the clock, so that no step has rate 0."""
    return min(t / share, 1.0) if share else 1.0

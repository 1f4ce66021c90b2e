"""Square attack (Andriushchenko et al. 2019), l_inf."""

import math
from types import SimpleNamespace

import torch

from classifier import correct, flag, has_nan, logits_of, margin
from perturb import attack, box, per_image, run_in_full_batches
from rng import uniform


@attack
def square(model, x, y, eps, n_queries=5000, p_init=0.8, *, seed=0, index=None, batch_size=250):
    """Square attack (Andriushchenko et al. 2019): random search with squares, needing no gradient.

    The first query is vertical stripes of +-eps. Each further one sets a window at a random place,
    of a size that shrinks on a schedule (`square_side`), to +-eps in each channel, and is kept if
    the margin falls. The search for an image ends once it is misclassified, possibly at once.
    """
    if not 0 < p_init <= 1:
        raise ValueError(f'square: p_init must be above 0 and at most 1, got {p_init}')
    channels, height, width = x.shape[1:]
    x_adv = x.clone()
    nan = flag(x)
    sides = [square_side(query, p_init, height, width) for query in range(n_queries + 1)]
    sides = torch.tensor(sides, device=x.device)

    def measure(x_adv, y):
        logits = logits_of(model, x_adv)
        margins = margin(logits, y)
        nan.logical_or_(has_nan(logits, margins))
        return margins.masked_fill(logits.argmax(1) != y, -math.inf)

    def start(rows):
        low, high = box(x[rows], eps)
        stripes = uniform('square', seed, index[rows], (channels, 1, width), x, 1) < 0.5
        s = SimpleNamespace(rows=rows, y=y[rows], low=low, high=high)
        s.query = torch.full_like(rows, 2)
        s.x_adv = torch.where(stripes, low, high)
        s.best = measure(s.x_adv, s.y) if len(rows) else x.new_zeros(0)
        return s

    def advance(s):
        n = min(20, n_queries + 1 - int(s.query.max()))  # then looks at which are done
        queries = s.query + torch.arange(n, device=x.device)[:, None]
        draws = uniform('square', seed, index[s.rows], (2 + channels,), x, queries)
        for u, side in zip(draws, sides[queries]):
            rows = window_mask(u[:, 0], side, height)[:, None, :, None]
            columns = window_mask(u[:, 1], side, width)[:, None, None, :]
            signed = torch.where(per_image(u[:, 2:] < 0.5), s.low, s.high)
            x_new = torch.where(rows & columns, signed, s.x_adv)
            new = measure(x_new, s.y)
            s.x_adv = torch.where(per_image(new < s.best), x_new, s.x_adv)
            s.best = torch.minimum(new, s.best)
        s.query = s.query + len(queries)
        return (s.query > n_queries) | (s.best == -math.inf), nan

    def finish(s):
        x_adv[s.rows] = s.x_adv
        return s.rows[:0]

    standing = correct(model, x, y, batch_size).nonzero().squeeze(1)
    run_in_full_batches(standing, batch_size, start, advance, finish)
    return x_adv


def square_side(query, p_init, height, width):
    """Side of the window at `query`: sqrt(p h w), p halved after queries 10, 50, 200, ..."""
    halvings = sum(query > q for q in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return min(max(round(math.sqrt(p_init / 2**halvings * height * width)), 1), height, width)


def window_mask(u, side, size):
    """(N, size) mask of `side`, (N,), neighbours, at a place drawn with u in [0, 1), (N,)."""
    first = (u * (size - side + 1)).long()
    offset = torch.arange(size, device=u.device) - first[:, None]
    return (offset >= 0) & (offset < side[:, None])

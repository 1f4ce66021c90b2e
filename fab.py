"""Fast adaptive boundary attack (Croce & Hein 2020), targeted, l_inf."""

import math
from types import SimpleNamespace

import torch

from classifier import correct, has_nan, logits_of, loss_and_gradient, wrong_classes
from perturb import attack, per_image, run_in_full_batches


@attack
def fab(
    model,
    x,
    y,
    eps,
    n_iter=100,
    n_targets=9,
    *,
    alpha_max=0.1,
    eta=1.05,
    beta=0.9,
    seed=0,
    index=None,
    batch_size=250,
):
    """FAB-T: seeks the nearest misclassified point, towards each of the n_targets most likely wrong
    classes of the image in turn, for n_iter iterations each.

    Returns a misclassified point within eps of each image where it finds one, else the image.
    Nothing is random.
    """
    settings = n_iter, n_targets, alpha_max, eta, beta, batch_size
    x_adv, distance = nearest_points(model, x, y, eps, *settings)
    return torch.where(per_image(distance <= eps), x_adv, x)


def nearest_points(model, x, y, enough, n_iter, n_targets, alpha_max, eta, beta, batch_size):
    """The nearest misclassified points found and their l_inf distances, (N,), infinite where there
    is none. The search for an image ends at a distance of `enough`."""
    x_adv = x.clone()
    tried = torch.zeros_like(y)  # targets of each image
    distance = x.new_zeros(len(x)).masked_fill(correct(model, x, y, batch_size), math.inf)
    targets = wrong_classes(model, x, y, n_targets, batch_size)

    def start(rows):
        s = SimpleNamespace(rows=rows, x=x[rows], y=y[rows], k=torch.zeros_like(rows))
        s.target, s.distance = targets[rows, tried[rows]], distance[rows]
        s.x_k, s.x_best = s.x, x_adv[rows]
        return s

    def advance(s):
        nan = fab_step(s, model, alpha_max, eta, beta)
        return (s.k == n_iter) | (s.distance <= enough), nan

    def finish(s):
        x_adv[s.rows], distance[s.rows] = s.x_best, s.distance
        tried[s.rows] += 1
        return s.rows[(tried[s.rows] < targets.shape[1]) & (s.distance > enough)]

    waiting = (distance == math.inf).nonzero().squeeze(1)
    run_in_full_batches(waiting, batch_size, start, advance, finish)
    return x_adv, distance


def fab_step(s, model, alpha_max, eta, beta):
    """One iteration: projects x_k and the image onto the boundary between label and target,
    linearised at x_k, and moves to a point between both projections, a little beyond it. Returns
    whether a logit or gradient was nan, ()."""

    def difference(logits, y):
        both = logits.gather(1, torch.stack([y, s.target], 1))
        return both[:, 0] - both[:, 1]

    gap, _, w = loss_and_gradient(model, s.x_k, s.y, difference)
    d_k = to_plane(s.x_k, w, gap)
    d_0 = to_plane(s.x, w, gap + ((s.x - s.x_k) * w).flatten(1).sum(1))
    a_k, a_0 = (per_image(length(d).clamp(min=1e-8)) for d in (d_k, d_0))
    alpha = (a_k / (a_k + a_0)).clamp(max=alpha_max)
    x_k = ((1 - alpha) * (s.x_k + eta * d_k) + alpha * (s.x + eta * d_0)).clamp_(0, 1)
    logits = logits_of(model, x_k)
    fooled = logits.argmax(1) != s.y
    moved = length(x_k - s.x)
    better = fooled & (moved < s.distance)
    s.distance = torch.where(better, moved, s.distance)
    s.x_best = torch.where(per_image(better), x_k, s.x_best)
    # a misclassified point moves back towards the image, so that it crosses the boundary again
    s.x_k = torch.where(per_image(fooled), s.x + beta * (x_k - s.x), x_k)
    s.k = s.k + 1
    return has_nan(gap, w, logits)


def to_plane(x, w, r):
    """The smallest d in l_inf with r + w d = 0 and x + d in [0, 1], exactly: (N, C, H, W).

    r is the value at x, (N,), of a linear function of slope w. All coordinates move equally far and
    stop at 0 and 1; where the plane is out of reach, all move as far as they can.
    """
    sign = -per_image(r.sign()) * w.sign()  # the direction
    room = torch.where(sign > 0, 1 - x, x).masked_fill(sign == 0, 0).flatten(1)
    slopes = w.abs().flatten(1)
    # Newton's method on |r| = sum |w_i| min(room_i, d), piecewise linear and concave in d: from
    # below it reaches the exact d in a few steps
    d, d_next = r * 0 - 1, r * 0
    while (d_next > d).any():
        d = d_next
        spent = (room <= d[:, None]).to(w)
        d_next = (r.abs() - (spent * room * slopes).sum(1)) / (slopes - spent * slopes).sum(1)
        d_next = d_next.nan_to_num(0).clamp(max=1)  # 0 / 0: there is no plane; 1: out of reach
        d_next = torch.maximum(d, d_next)  # else rounding may move d back and forth for ever
    return torch.minimum(room, d[:, None]).view_as(x) * sign


def length(d):
    """l_inf norm of each perturbation, (N,)."""
    return d.abs().flatten(1).amax(1)

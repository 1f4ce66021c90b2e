import math

import numpy as np
import pytest
import scipy.optimize
import torch
from test_attack import at_half, images, lenet
from torch import nn

import attack
from attack import nearest_points, to_plane
from lib import classifier

PUBLISHED = 0.1, 1.05, 0.9, 250  # alpha_max, eta, beta, batch_size


def nearest(x, w, r):
    """The least t with r + w d = 0 and |d| <= t for a d with x + d in [0, 1]; None without any."""
    dim = len(x)
    below, above = np.eye(dim), np.ones((dim, 1))
    slack = np.hstack([below, -above]), np.hstack([-below, -above])
    found = scipy.optimize.linprog(
        [0] * dim + [1],
        A_ub=np.vstack(slack),
        b_ub=np.zeros(2 * dim),
        A_eq=[[*w, 0]],
        b_eq=[-r],
        bounds=[(-value, 1 - value) for value in x] + [(0, None)],
    )
    return found.fun if found.status == 0 else None


@pytest.mark.parametrize('seed', range(5))
def test_the_projection_on_a_plane_is_the_linear_programs(seed):
    torch.manual_seed(seed)
    n, dim = 30, 6
    x, w, r = torch.rand(n, dim).double(), torch.randn(n, dim).double(), torch.randn(n).double()
    x[:10, :3] = torch.randint(2, (10, 3)).double()  # at the border of the box
    w[5:15, 2:4], w[3], r[4] = 0, 0, 0  # a plane along an axis, no plane, a point on its plane
    x[20:22], r[20], r[21] = 0, w[20].clamp(min=0).sum(), 9  # not to be reached
    d = to_plane(x.view(n, 1, 2, 3), w.view(n, 1, 2, 3), r).flatten(1)
    assert (x + d).min() >= -1e-12 and (x + d).max() <= 1 + 1e-12
    reached = (r + (w * d).sum(1)).abs() < 1e-9
    for i in range(n):
        least = nearest(x[i].numpy(), w[i].numpy(), r[i].item())
        assert (least is not None) == reached[i] and (w[i] != 0).logical_or(d[i] == 0).all()
        if least is None:  # all that helps is used
            far = torch.where(r[i] * w[i] > 0, -x[i], 1 - x[i])
            assert ((d[i] - far) * w[i]).abs().max() < 1e-12
        else:
            assert d[i].abs().max().item() == pytest.approx(least, abs=1e-9)
    assert reached.any() and not reached.all() and (d[4] == 0).all()


@pytest.mark.parametrize('classes', [2, 3, 5])
def test_the_distance_to_a_linear_boundary_is_the_closed_form(classes):
    model, x, y, eps, _ = at_half(classes)
    w, z = model[1].weight, model(x)
    distances = (z.gather(1, y[:, None]) - z) / (w[y][:, None] - w[None]).abs().sum(2)
    least = distances.nan_to_num(math.inf).amin(1)
    x_adv, distance = nearest_points(model, x, y, -1, 100, 4, *PUBLISHED)
    inside = least < 0.3  # the pixel range is not in the way
    assert torch.allclose(distance[inside], least[inside], rtol=0.01) and inside.sum() > 70
    assert (distance >= least - 1e-9).all()
    assert torch.allclose((x_adv - x).abs().flatten(1).amax(1), distance)
    assert not classifier.correct(model, x_adv, y).any()
    fooled = ~classifier.correct(model, attack.fab(model, x, y, eps, n_targets=4), y)
    clear = (least / eps - 1).abs() > 0.01
    assert torch.equal(fooled[clear], (least < eps)[clear]) and 50 < fooled.sum() < 150


def test_with_the_pixel_range_in_the_way_it_is_the_linear_programs():
    model = at_half(3)[0]
    x = images(20, (1, 4, 4)).round()  # every pixel at its border
    y, w, z = model(x).argmax(1), model[1].weight, model(x)
    _, distance = nearest_points(model, x, y, -1, 100, 2, *PUBLISHED)
    for i in range(20):
        targets = [t for t in range(3) if t != y[i]]
        planes = [((w[y[i]] - w[t]).numpy(), (z[i, y[i]] - z[i, t]).item()) for t in targets]
        least = [nearest(x[i].flatten().numpy(), *plane) for plane in planes]
        least = min((t for t in least if t is not None), default=math.inf)
        assert least <= distance[i].item() + 1e-9 and distance[i].item() <= 1.02 * least


def fab_of_one_image(f, x, n_iter, alpha_max, eta, beta):
    """The least distance by Algorithm 1 of Croce & Hein 2020 for one image and one target; f gives
    z_y - z_t, its gradient, and whether the point is misclassified."""

    def project(point, w, r):  # by bisection
        move = -np.sign(r * w)
        room = np.where(move > 0, 1 - point, point) * (move != 0)
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            enough = (abs(w) * np.minimum(middle, room)).sum() >= abs(r)
            low, high = (low, middle) if enough else (middle, high)
        return move * np.minimum(high, room)

    z, least = x, math.inf
    for _ in range(n_iter):
        gap, w, _ = f(z)
        d, d_0 = project(z, w, gap), project(x, w, gap + (w * (x - z)).sum())
        length, length_0 = abs(d).max(), abs(d_0).max()
        alpha = min(length / (length + length_0), alpha_max)
        z = np.clip((1 - alpha) * (z + eta * d) + alpha * (x + eta * d_0), 0, 1)
        if f(z)[2]:
            least = min(least, abs(z - x).max())
            z = x + beta * (z - x)
    return least


@pytest.mark.parametrize('settings', [(0.1, 1.05, 0.9), (0.5, 1.3, 0.6)])
def test_fab_follows_algorithm_1_of_its_paper(settings):
    model, x, y = lenet(4)
    target = model(x).argsort(1)[:, -2]
    _, found = nearest_points(model, x, y, -1, 12, 1, *settings, 250)
    for i in range(4):

        def f(z, i=i):
            z = torch.from_numpy(z)[None].requires_grad_()
            logits = model(z)[0]
            gap = logits[y[i]] - logits[target[i]]
            (w,) = torch.autograd.grad(gap, z)
            return gap.item(), w[0].numpy(), logits.argmax() != y[i]

        expected = fab_of_one_image(f, x[i].numpy(), 12, *settings)
        assert found[i].item() == pytest.approx(expected, rel=1e-9) and expected < 1


def test_targeted_attacks_find_all_that_falls_to_the_closed_form():
    model, x, y, eps, least = at_half(5)
    x_adv = attack.apgd(model, x, y, eps, n_iter=20, loss='dlr', n_targets=4)
    fooled = ~classifier.correct(model, x_adv, y)
    assert torch.equal(fooled, least < 0) and 50 < fooled.sum() < 150


def test_targets_are_the_likeliest_wrong_classes_of_the_image_in_their_order():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double(), images(7)
    y = model(x).argsort(1)[:, -3]  # not the likeliest
    found = classifier.wrong_classes(model, x, y, 4, batch_size=3)
    order = model(x).argsort(1, descending=True)
    assert torch.equal(found, order[:, [0, 1, 3, 4]])
    assert classifier.wrong_classes(model, x, y, 99).shape == (7, 9)


def test_targeted_dlr_is_its_formula():
    torch.manual_seed(0)
    z, y = torch.randn(50, 10).double(), torch.arange(50) % 10
    target = (y + 3) % 10
    top, rows = z.sort(1, descending=True).values, torch.arange(50)
    by_hand = (z[rows, target] - z[rows, y]) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]))
    assert torch.allclose(attack.targeted_dlr(z, y, target), by_hand, atol=1e-9)
    with pytest.raises(ValueError, match='at least 4 classes, got 3'):
        attack.targeted_dlr(z[:, :3], y.clamp(max=2), y.clamp(max=2))


def test_the_projection_does_not_depend_on_the_scale_of_the_plane():
    torch.manual_seed(0)
    x, w, r = torch.rand(9, 1, 2, 3), torch.randn(9, 1, 2, 3), torch.randn(9)
    w[:2], r[:1] = 0, 0  # no plane, with the point on it or not
    d = to_plane(x, w, r)
    assert torch.allclose(to_plane(x, 1e-25 * w, 1e-25 * r), d, atol=1e-6) and not d[:2].any()


def test_the_projection_ends_where_rounding_could_move_it_back_and_forth():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (200, 1, 28, 28), generator=generator) / 255
    w = torch.randn(x.shape, generator=generator)
    most = torch.randint(1, 80, (200, 1, 1, 1), generator=generator) / 255  # some pixels' room
    room = torch.where(w < 0, 1 - x, x)
    d = to_plane(x, w, (torch.minimum(room, most) * w.abs()).flatten(1).sum(1))
    assert torch.allclose(d.abs().flatten(1).amax(1), most.flatten(), atol=1e-6)

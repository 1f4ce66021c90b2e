import contextlib
import math
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import nn

import attack
import data
import models
from lib import classifier, rng
from lib.search import run_in_full_batches

ALL = {  # every attack, short
    'pgd': partial(attack.pgd, step_size=0.02, n_iter=20),
    'apgd_ce': partial(attack.apgd, n_iter=20, n_restarts=2),
    'apgd_dlr': partial(attack.apgd, n_iter=20, n_restarts=2, loss='dlr'),
    'apgd_best': partial(attack.apgd, n_iter=20, n_restarts=2, best_loss=True),
    'apgd_t': partial(attack.apgd, n_iter=20, loss='dlr', n_targets=3),
    'fab_t': partial(attack.fab, n_iter=20, n_targets=3),
    'square': partial(attack.square, n_queries=60),
}
LINEAR = [('pgd', 2, 0), ('apgd_best', 2, 0), ('square', 2, 0), ('apgd_t', 5, 0)]
LINEAR += [('pgd', 5, 4), ('apgd_best', 5, 4), ('square', 5, 4)]
PUBLISHED = 0.1, 1.05, 0.9, 250  # alpha_max, eta, beta, batch_size
ZEROS = torch.zeros(100, dtype=torch.long)  # labels
each = pytest.mark.parametrize('run', ALL.values(), ids=ALL)


def images(n, shape=(1, 28, 28)):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def lenet(n):
    """A LeNet, n images and the classes that it sees in them."""
    torch.manual_seed(0)
    model, x = models.build('lenet', data.DATASETS['mnist'], 1).double(), images(n)
    return model, x, model(x).argmax(1)


class Model(nn.Module):  # notes how many images pass at a time
    def __init__(self, logits):
        super().__init__()
        self.logits, self.passes = logits, []

    def forward(self, x):
        self.passes.append(len(x))
        return self.logits(x)


def steady(x):  # logits that no attack gets away from class 0
    return 5 * F.one_hot(ZEROS[: len(x)], 10) + x.flatten(1)[:, :10] / 10


def at_half(classes):
    """A linear classifier, images, labels, a budget eps at which about half of them are robust, the
    least margins there, min_i (w_y - w_i).x + b_y - b_i - eps ||w_y - w_i||_1, and the distances to
    the decision boundary."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).double().requires_grad_(False)
    model[1].weight *= 30  # sure of itself: the strongest wrong class leads the cross-entropy
    x = 0.3 + 0.4 * images(200, (1, 4, 4))  # the pixel range does not bind
    y, w = model(x).argmax(1), model[1].weight
    gaps = model(x).gather(1, y[:, None]) - model(x)
    slopes = (w[y][:, None] - w[None]).abs().sum(2)
    distances = (gaps / slopes).nan_to_num(math.inf).amin(1)
    eps = min(distances.median().item() + 1e-4, 0.299)
    least = (gaps - eps * slopes).scatter(1, y[:, None], math.inf).amin(1)
    return model, x, y, eps, least, distances


@pytest.mark.parametrize('name, classes, missed', LINEAR)
def test_linear_classifiers_fall_to_the_closed_form(name, classes, missed):
    model, x, y, eps, least, _ = at_half(classes)
    settings = {'square': {'n_queries': 900}, 'apgd_t': {'n_targets': 4}}.get(name, {})
    reached = attack.margin(model(ALL[name](model, x, y, eps, **settings)), y)
    robust = least > 0
    assert 50 < robust.sum() < 150 and (reached >= least - 1e-9).all()  # the bound is kept,
    assert (reached[~robust] > 0).sum() <= missed
    assert classes > 2 or torch.allclose(reached[robust], least[robust])  # and reached


def test_the_pixel_range_bounds_the_closed_form_too():
    model, x = at_half(2)[0], images(100, (1, 4, 4))
    y, w = model(x).argmax(1), model[1].weight
    slope = (w[y] - w[1 - y]).view(-1, 1, 4, 4)
    worst = torch.where(slope > 0, (x - 0.5).clamp(0), (x + 0.5).clamp(max=1))
    least = attack.margin(model(worst), y)
    for run in ALL['apgd_best'], partial(attack.pgd, step_size=0.1, n_iter=20):
        assert torch.allclose(attack.margin(model(run(model, x, y, 0.5)), y), least)


@each
def test_the_result_stays_in_the_ball_and_in_the_pixel_range(run):
    model, x, _ = lenet(30)
    x_adv = run(model, x, torch.arange(30) % 10, 0.1)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
    assert (x_adv - x).abs().max() <= 0.1 + 1e-12 and x_adv.min() >= 0 and x_adv.max() <= 1


@each
def test_the_result_of_an_image_depends_neither_on_batch_size_nor_on_order(run):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double(), images(15)
    y = torch.where(torch.arange(15) % 5 > 0, model(x).argmax(1), 3)
    whole = run(model, x, y, 0.015)
    stands = classifier.correct(model, whole, y)
    assert stands.any() and not stands.all()
    for batch_size in 1, 6:
        assert torch.allclose(run(model, x, y, 0.015, batch_size=batch_size), whole, atol=1e-9)
    order = torch.randperm(15)
    shuffled = run(model, x[order], y[order], 0.015, index=order, batch_size=9)
    assert torch.allclose(shuffled, whole[order], atol=1e-9)


@each
def test_no_more_images_than_batch_size_pass_at_a_time(run):
    model = Model(steady)
    run(model, images(9), ZEROS[:9], 0.1, batch_size=4)
    assert max(model.passes) == 4


@each
def test_the_seed_decides(run):
    model, x, y = lenet(5)
    one, same, other = (run(model, x, y, 0.01, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and torch.equal(one, other) == (run is ALL['fab_t'])


@each
@pytest.mark.parametrize('n', [0, 1, 7])
def test_any_number_of_images_is_attacked_all_wrong_or_none(run, n):
    net, x, y = lenet(n)
    model = Model(net)
    assert run(model, x, y, 0.01, batch_size=3).shape == x.shape
    x_adv = run(model, x, (y + 1) % 10, 0.01, batch_size=3)
    assert n or not model.passes  # x.view(len(x), -1) in a model would fail
    assert not classifier.correct(model, x_adv, (y + 1) % 10).any()
    assert torch.equal(run(model, x, y, 0.0), x)


@each
@pytest.mark.parametrize('fail', [False, True])
def test_the_model_is_attacked_in_eval_mode_and_left_as_found_even_if_it_fails(run, fail):
    def spy(logits):
        assert not any(module.training for module in model.modules())
        return logits if not fail else {}['broken']

    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(1352, 10), Model(spy)
    model = nn.Sequential(*layers).double()
    model[0].bias.requires_grad_(False)
    model[1].eval()
    model[3].weight.grad = torch.ones_like(model[3].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyError, match='broken') if fail else contextlib.nullcontext():
        run(model, images(6), ZEROS[:6], 0.1)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ['0.bias']
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ['3.weight']
    assert (model[3].weight.grad == 1).all()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@each
@pytest.mark.parametrize('nan_pass', [1, 2, 7])
def test_logits_that_are_nan_in_any_pass_are_refused(run, nan_pass):
    model = Model(lambda x: steady(x) * (math.nan if len(model.passes) == nan_pass else 1))
    with pytest.raises(classifier.NotFiniteError, match='nan'):
        run(model, images(4), ZEROS[:4], 0.1)


def test_bad_settings_are_refused_with_their_value():
    bad = ('pgd', 'step_size', 0.0), ('apgd_ce', 'n_restarts', -1), ('apgd_ce', 'loss', 'cw')
    for name, setting, value in *bad, ('square', 'p_init', 1.5), ('square', 'n_queries', 0):
        with pytest.raises(ValueError, match=f'{setting} .*{value}'):
            ALL[name](*lenet(2), 0.1, **{setting: value})


@pytest.mark.parametrize('start, width', [(None, 0.03), (0.08, 0.08)])
def test_pgd_is_signed_ascent_from_within_its_step_or_what_is_asked_for(start, width):
    model, x, y = lenet(3)
    noise = 2 * rng.uniform('pgd', 5, torch.arange(3), (1, 28, 28), x) - 1
    z = (x + width * noise).clamp(0, 1)
    for _ in range(4):
        z.requires_grad_()
        F.cross_entropy(model(z), y).backward()
        z = (x + (z + 0.03 * z.grad.sign() - x).clamp(-0.08, 0.08)).clamp(0, 1).detach()
    assert torch.allclose(attack.pgd(model, x, y, 0.08, 0.03, 4, start=start, seed=5), z)


def in_numpy(model, value_of):
    """z -> value_of(logits) of one image z, its gradient, and the class of z."""

    def f(z):
        z = torch.from_numpy(z)[None].requires_grad_()
        logits = model(z)
        value = value_of(logits)
        return value.item(), torch.autograd.grad(value, z)[0][0].numpy(), logits.argmax().item()

    return f


def apgd_of_one_image(f, x, start, eps, n_iter, rho):
    """The best point by Algorithm 1 of Croce & Hein 2020, in its indices, and how often the step
    was halved, for one image; f gives loss and gradient."""
    box = np.maximum(x - eps, 0), np.minimum(x + eps, 1)
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(round(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06), 10))
    w = [math.ceil(round(q * n_iter, 8)) for q in p]
    eta, halvings, rises = 2 * eps, 0, 0
    points, values = [start], [f(start)]  # (loss, gradient)
    x_max, f_max = start, values[0]
    at = [(eta, f_max[0])]  # on arrival at the checkpoints w
    for k in range(n_iter):
        if k in w[1:]:
            j = w.index(k)
            at.append((eta, f_max[0]))
            first = rises < rho * (w[j] - w[j - 1])
            second = j > 1 and at[j] == at[j - 1]
            if first or second:
                eta, halvings = eta / 2, halvings + 1
                points[k], values[k] = x_max, f_max
            rises = 0
        z = np.clip(points[k] + eta * np.sign(values[k][1]), *box)
        if k > 0:
            momentum = 0.75 * (z - points[k]) + 0.25 * (points[k] - points[k - 1])
            z = np.clip(points[k] + momentum, *box)
        points.append(z)
        values.append(f(z))
        rises += values[k + 1][0] > values[k][0]
        if values[k + 1][0] > f_max[0]:
            x_max, f_max = z, values[k + 1]
    return x_max, halvings


@pytest.mark.parametrize('loss, rho', [('ce', 0.75), ('dlr', 0.5)])
def test_apgd_follows_algorithm_1_of_its_paper(loss, rho):
    model, x, y = lenet(6)
    eps, halvings = 0.2, 0
    noise = 2 * rng.uniform(f'apgd {loss}', 5, torch.arange(6), (1, 28, 28), x) - 1
    settings = {'loss': loss, 'rho': rho, 'best_loss': True, 'seed': 5, 'batch_size': 4}
    ours = attack.apgd(model, x, y, eps, 100, **settings)
    for i in range(6):
        start = (x[i] + eps * noise[i] / noise[i].abs().max()).clamp(0, 1).numpy()
        f = in_numpy(model, lambda z, i=i: attack.LOSSES[loss](z, y[i : i + 1]))
        x_max, halved = apgd_of_one_image(f, x[i].numpy(), start, eps, 100, rho)
        assert np.allclose(ours[i].numpy(), x_max, atol=1e-9)
        halvings += halved
    assert halvings > 6  # the rule was put to work


def test_a_step_of_apgd_that_brings_no_rise_is_halved_at_every_second_checkpoint():
    flat, etas = Model(lambda x: 0 * x.flatten(1)[:, :10]), []
    s = attack.apgd_start(images(1), ZEROS[:1], ZEROS[:1], images(1), 0.1)
    checkpoints = torch.tensor(attack.apgd_checkpoints(100))
    for _ in range(100):
        attack.apgd_step(s, flat, classifier.cross_entropy, checkpoints, 0.0, True)
        etas.append(s.eta.item())
    assert [k for k in range(1, 100) if etas[k] == etas[k - 1] / 2] == [41, 70, 87, 99]


def test_apgd_keeps_the_best_loss_of_all_restarts():
    model, x, y = lenet(8)
    one, four = (attack.apgd(model, x, y, 0.1, 10, n, best_loss=True) for n in (1, 4))
    losses = [classifier.cross_entropy(model(x_adv), y) for x_adv in (one, four)]
    assert (losses[1] >= losses[0]).all() and (losses[1] > losses[0]).any()


def test_apgd_spends_a_restart_only_on_images_that_still_stand():
    def logits(x):
        hard = (x[:, :1, 0, 0] > 0.5) * torch.tensor([100.0, 0.0, 0.0])
        return x.flatten(1)[:, 1:4] * torch.tensor([-1.0, 1.0, 1.0]) + hard

    model, x = Model(logits), 0 * images(10)
    x[:4, 0, 0, 0] = 1  # four stand, three fall in a step, three are wrong from the start
    x[7:, 0, 0, 1:4] = torch.tensor([0.5, 0.9, 0.9])
    x_adv = attack.apgd(model, x, ZEROS[:10], 0.3, 20, 3)
    assert model.passes[:2] == [1, 10] and max(model.passes[2:]) == 7
    assert sum(model.passes) <= 10 + 3 * 5 + 4 * 21 * 3  # those that fall leave after 4 steps
    assert torch.equal(x_adv[7:], x[7:])
    assert classifier.correct(model, x_adv, ZEROS[:10]).tolist() == [True] * 4 + [False] * 6


def test_square_windows_shrink_as_published_for_mnist_and_fit_into_any_image():
    # sqrt(0.8 / 2^i * 28 * 28) rounded: 25.04 17.71 12.52 8.85 6.26 4.43 3.13 2.21 1.57 1.11
    queries = 2, 10, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001
    sides = [attack.square_side(query, 0.8, 28, 28) for query in queries]
    assert sides == [25, 25, 18, 13, 9, 6, 4, 3, 2, 2, 1]
    assert attack.square_side(1, 1.0, 4, 9) == 4 and attack.square_side(9999, 0.01, 4, 4) == 1


@pytest.mark.parametrize('side', [1, 3, 8])
def test_square_windows_take_every_place_equally_often_the_last_one_included(side):
    u = (torch.arange(6000) + 0.5) / 6000
    windows = attack.window_mask(u, torch.tensor([side]), 8)
    assert (windows.sum(1) == side).all() and windows[0, 0] and windows[-1, -1]
    places = windows.to(torch.int8).argmax(1).bincount(minlength=8)
    assert (places[: 8 - side + 1] - 6000 / (8 - side + 1)).abs().max() <= 1


def test_square_starts_from_vertical_stripes():
    x = 0.5 + 0 * images(6, (3, 8, 8))
    noise = attack.square(steady, x, ZEROS[:6], 0.1, n_queries=1) - x
    assert torch.allclose(noise.abs(), torch.tensor(0.1).double())
    assert torch.equal(noise, noise[:, :, :1].expand_as(noise))
    assert (noise > 0).double().mean() == pytest.approx(0.5, abs=0.2)


def test_square_spends_just_its_queries_and_none_on_images_that_are_done():
    model, x = Model(lambda x: F.one_hot((x[:, 0, 0, 0] < 0.5).long(), 10).double()), images(9)
    x[:, 0, 0, 0] = torch.tensor([0.9] * 4 + [0.1] * 5)  # four stand, five are wrong from the start
    x_adv = attack.square(model, x, ZEROS[:9], 0.1, n_queries=47)
    assert model.passes == [1, 9] + [4] * 47 and torch.equal(x_adv[4:], x[4:])


def test_square_carries_on_where_a_tie_still_counts_as_correct():
    def member(bias):  # two that disagree tie, and argmax then takes the first class
        z = torch.tensor([[-25.0, 25.0]])
        return Model(lambda x: torch.sign(x.mean((1, 2, 3)) - bias)[:, None] * z)

    model = models.Ensemble([member(0.5), member(0.55)])
    x, y = 0.49 + 0 * images(60).float(), ZEROS[:60]
    assert classifier.correct(model, x, y).all() and not classifier.correct(model, x + 0.1, y).any()
    assert not classifier.correct(model, attack.square(model, x, y, 0.1, 300), y).any()


def test_attacks_are_titled_as_the_columns_of_table_1():
    titles = 'PGD PGD100 APGD100-CE APGD100-DLR Square5K'
    assert [attack.title(key) for key in attack.ATTACKS][:5] == titles.split()


def test_batches_are_kept_full_and_the_search_for_an_image_does_not_depend_on_others():
    results, searches, pending = {}, torch.zeros(40), set(range(5, 40))

    def start(rows):
        searches[rows] += 1
        return SimpleNamespace(rows=rows, steps=0 * rows, sum=0 * rows)

    def advance(s):  # a search for image i takes i % 7 + 1 steps, each of which adds i
        assert len(s.rows) == min(8, len(pending))
        s.steps, s.sum = s.steps + 1, s.sum + s.rows
        return s.steps > s.rows % 7, torch.tensor(False)

    def finish(s):  # every third starts anew, once
        results.update(zip(s.rows.tolist(), s.sum.tolist()))
        again = (s.rows % 3 == 0) & (searches[s.rows] == 1)
        pending.difference_update(s.rows[~again].tolist())
        return s.rows[again]

    run_in_full_batches(torch.arange(5, 40), 8, start, advance, finish)
    assert results == {i: i * (i % 7 + 1) for i in range(5, 40)} and not pending


def test_losses_by_hand():
    z, y = torch.tensor([[3.0, 1.0, 0.0, 2.0], [0.0, 4.0, 2.0, 1.0]]), torch.tensor([0, 2])
    assert attack.margin(z, y).tolist() == [1.0, -2.0]
    # (y 0) -(3 - 2) / (3 - 1) and (y 2) -(2 - 4) / (4 - 1)
    assert attack.dlr(z, y).tolist() == pytest.approx([-1 / 2, 2 / 3])
    with pytest.raises(ValueError, match='got 2'):
        attack.dlr(torch.zeros(1, 2), ZEROS[:1])


def test_predictions_and_mean_loss_do_not_depend_on_batches():
    model, x, y = lenet(11)
    y[4:] = (y[4:] + 1) % 10
    assert classifier.correct(model, x, y, batch_size=3).tolist() == [True] * 4 + [False] * 7
    loss = F.cross_entropy(model(x), y).item()
    assert classifier.mean_loss(model, x, y, batch_size=3) == pytest.approx((loss, 7 / 11))


def nearest(x, w, r):
    """The least t with r + w d = 0 and |d| <= t for a d with x + d in [0, 1]; None without any."""
    eye, t = np.eye(len(x)), np.ones((len(x), 1))
    found = scipy.optimize.linprog(
        [0] * len(x) + [1],
        A_ub=np.block([[eye, -t], [-eye, -t]]),
        b_ub=np.zeros(2 * len(x)),
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
    d = attack.to_plane(x.view(n, 1, 2, 3), w.view(n, 1, 2, 3), r).flatten(1)
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
    model, x, y, eps, _, least = at_half(classes)
    x_adv, distance = attack.nearest_points(model, x, y, -1, 100, 4, *PUBLISHED)
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
    _, distance = attack.nearest_points(model, x, y, -1, 100, 2, *PUBLISHED)
    for i in range(20):
        targets = [t for t in range(3) if t != y[i]]
        planes = [((w[y[i]] - w[t]).numpy(), (z[i, y[i]] - z[i, t]).item()) for t in targets]
        least = [nearest(x[i].flatten().numpy(), *plane) for plane in planes]
        least = min((t for t in least if t is not None), default=math.inf)
        assert least <= distance[i].item() + 1e-9 and distance[i].item() <= 1.02 * least


def fab_of_one_image(f, x, y, n_iter, alpha_max, eta, beta):
    """The least distance by Algorithm 1 of Croce & Hein 2020 for one image and one target; f gives
    z_y - z_t, its gradient, and the class."""

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
        if f(z)[2] != y:
            least = min(least, abs(z - x).max())
            z = x + beta * (z - x)
    return least


@pytest.mark.parametrize('settings', [(0.1, 1.05, 0.9), (0.5, 1.3, 0.6)])
def test_fab_follows_algorithm_1_of_its_paper(settings):
    model, x, y = lenet(4)
    target = model(x).argsort(1)[:, -2]
    _, found = attack.nearest_points(model, x, y, -1, 12, 1, *settings, 250)
    for i in range(4):
        f = in_numpy(model, lambda z, i=i: z[0, y[i]] - z[0, target[i]])
        expected = fab_of_one_image(f, x[i].numpy(), y[i], 12, *settings)
        assert found[i].item() == pytest.approx(expected, rel=1e-9) and expected < 1


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
    d, d_small = attack.to_plane(x, w, r), attack.to_plane(x, 1e-25 * w, 1e-25 * r)
    assert torch.allclose(d_small, d, atol=1e-6) and not d[:2].any()


def test_the_projection_ends_where_rounding_could_move_it_back_and_forth():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (200, 1, 28, 28), generator=generator) / 255
    w = torch.randn(x.shape, generator=generator)
    most = torch.randint(1, 80, (200, 1, 1, 1), generator=generator) / 255  # some pixels' room
    room = torch.where(w < 0, 1 - x, x)
    d = attack.to_plane(x, w, (torch.minimum(room, most) * w.abs()).flatten(1).sum(1))
    assert torch.allclose(d.abs().flatten(1).amax(1), most.flatten(), atol=1e-6)


# Any model, or a reason why not

REFUSED = [
    ({'x': images(4) + 1e-7 + (1 - images(4).max())}, r'\[0, 1\], got .* 1.0000001; normalise'),
    ({'x': images(4) * math.nan}, 'got nan to nan'),
    ({'x': images(4)[:, 0]}, r'images must be floats, \(N, C, H, W\), got torch.float64 \(4, 28'),
    ({'x': (255 * images(4)).byte()}, 'images must be floats.* got torch.uint8'),
    ({'eps': 8}, r'eps must lie in \[0, 1\], got 8: did you mean 8/255'),
    ({'eps': -0.25}, 'got -0.25'),
    ({'eps': math.nan}, 'got nan'),
    ({'batch_size': 0}, 'batch_size must be at least 1, got 0'),
    ({'index': torch.arange(5)}, '4 images, 4 labels, 5 of index'),
    ({'y': ZEROS[:3]}, '4 images, 3 labels'),
    ({'y': ZEROS[:4, None]}, r'labels must be integers, \(N,\), got torch.int64 \(4, 1\)'),
    ({'y': ZEROS[:4].float()}, 'labels must be integers, .* torch.float32'),
    ({'y': ZEROS[:4] + 10}, '0 .. 9, the classes of the model, got 10 .. 10'),
    ({'y': ZEROS[:4] - 1}, 'got -1 .. -1'),
    ({'model': lambda x: (steady(x), 0)}, 'return the logits alone, not a tuple'),
    ({'model': lambda x: steady(x)[:, 0]}, r'\(N, K\), K at least 2, got \(1,\)'),
    ({'model': lambda x: steady(x)[:, :1]}, r'K at least 2, got \(1, 1\)'),
]


@each
@pytest.mark.parametrize('change, message', REFUSED)
def test_what_makes_no_sense_is_refused_in_a_sentence(run, change, message):
    name = run.func.__name__
    with pytest.raises(ValueError, match=f'^{name}: .*{message}'):
        run(**({'model': steady, 'x': images(4), 'y': ZEROS[:4], 'eps': 0.1} | change))


@pytest.mark.parametrize(
    'result, message',
    [(lambda x: x + 0.2, 'outside of the l_inf ball'), (lambda x: x[1:], '(3, 1, ')],
)
def test_an_attack_that_returns_anything_but_images_in_the_box_is_refused(result, message):
    @attack.attack
    def mine(model, x, y, eps, *, seed, index, batch_size):
        return result(x)

    with pytest.raises(ValueError, match=f'^mine: returned .*{re.escape(message)}'):
        mine(steady, images(4), ZEROS[:4], 0.1)


def with_gradient(change):
    """A model whose gradient is what `change` makes of it."""

    def model(x):
        x = x.clone()
        if x.requires_grad:
            x.register_hook(change)
        return steady(x)

    return model


@pytest.mark.parametrize('name', [name for name in ALL if name != 'square'])
def test_a_gradient_that_is_nan_at_one_pixel_is_refused(name):
    pixel = torch.zeros(1, 1, 28, 28).double()
    pixel[0, 0, 14, 14] = math.nan
    model = with_gradient(lambda gradient: gradient + pixel)
    with pytest.raises(classifier.NotFiniteError, match='gradients of its loss, are nan'):
        ALL[name](model, images(4), ZEROS[:4], 0.1)


@each
@pytest.mark.parametrize('shape', [(4, 1, 28, 28), (1, 1, 1, 1)])
def test_a_gradient_that_is_the_models_own_is_not_changed(run, shape):
    own = torch.full(shape, 0.25).double()
    run(with_gradient(lambda gradient: own.expand(gradient.shape)), images(4), ZEROS[:4], 0.1)
    assert (own == 0.25).all()


@each
def test_types_of_labels_seeds_and_index_change_nothing(run):
    model, x, y = lenet(5)
    index = torch.arange(40, 45)
    expected = run(model, x, y, 0.02, seed=3, index=index)
    for dtype in torch.uint8, torch.int32, torch.int16:
        found = run(model, x, y.to(dtype), 0.02, seed=np.int32(3), index=index.to(dtype))
        assert torch.equal(found, expected)


@each
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode_and_a_plain_function_give_the_same(run, mode):
    model, x, y = lenet(5)
    expected = run(model, x, y, 0.02)
    before = torch.random.get_rng_state()
    with mode():
        found = run(lambda x: model(x), x.clone(), y.clone(), 0.02)
    assert torch.equal(found.clone(), expected)
    assert torch.equal(torch.random.get_rng_state(), before)


@each
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_searched_in_float32(run, dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).to(dtype), images(20).to(dtype)
    y = model(x).argmax(1)
    x_adv = run(model, x, y, 0.03)
    assert x_adv.dtype == dtype and x_adv.isfinite().all()
    assert (x_adv - x).abs().max() <= 0.03 + torch.finfo(dtype).eps  # rounded
    assert not classifier.correct(model, x_adv, y).all()
    single = nn.Sequential(*model).float()
    fooled = ~classifier.correct(single, run(single, x.float(), y, 0.03), y)
    assert abs(fooled.sum() - (~classifier.correct(model.to(dtype), x_adv, y)).sum()) <= 2


def test_logits_in_half_precision_become_float32_where_dlr_is_guarded():
    x, y = torch.ones(2, 3), ZEROS[:2]
    logits = classifier.logits_of(lambda x: 0 * x.half(), x)
    assert logits.dtype == torch.float32 and (attack.dlr(logits, y) == 0).all()


def test_infinite_logits_are_refused_where_they_hide_the_loss():
    x, y = images(4), ZEROS[:4]
    two = torch.tensor([0, 0] + 8 * [-math.inf])  # DLR divides by infinity
    for run in ALL['apgd_dlr'], ALL['apgd_t']:
        with pytest.raises(classifier.NotFiniteError):
            run(lambda x: steady(x) + two, x, y, 0.1)
    model = Model(lambda x: steady(x) if len(model.passes) < 3 else steady(x) * math.inf)
    with pytest.raises(classifier.NotFiniteError):  # margins of inf - inf
        ALL['square'](model, x, y, 0.1)


@each
def test_a_model_that_changes_its_input_is_refused_and_the_images_stay(run):
    x = images(4)
    with pytest.raises(ValueError, match='changes its input in place'):
        run(lambda x: steady(x.mul_(0.5)), x, ZEROS[:4], 0.1)
    assert torch.equal(x, images(4))
    with pytest.raises(ValueError, match='changes its input in place'):
        classifier.correct(lambda x: steady(x.mul_(0.5)), images(4), ZEROS[:4])


@each
def test_a_traced_or_scripted_model_falls_like_itself(run):
    model, x, y = lenet(4)
    for other in torch.jit.trace(model, x), torch.jit.script(model):
        assert torch.allclose(run(other, x, y, 0.02), run(model, x, y, 0.02), atol=1e-9)

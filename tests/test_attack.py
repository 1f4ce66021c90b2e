import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import attack
import models
from conftest import printed
from test_train import replayed

ALL = {  # every attack, short
    'pgd': functools.partial(attack.pgd, step_size=.02, n_iter=10),
    'apgd_ce': functools.partial(attack.apgd, n_iter=20, n_restarts=2),
    'apgd_dlr': functools.partial(attack.apgd, n_iter=20, n_restarts=2, loss='dlr'),
    'apgd_best': functools.partial(attack.apgd, n_iter=20, n_restarts=2, best_loss=True),
    'square': functools.partial(attack.square, n_queries=60),
}
each = pytest.mark.parametrize('run', ALL.values(), ids=ALL)


def lenet(seed=0):
    torch.manual_seed(seed)
    return models.build('lenet', 'mnist', 1).double()


def images(n, seed=1, shape=(1, 28, 28)):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def linear(classes, shape=(1, 4, 4), seed=0):
    """A linear classifier, and images well inside [0, 1] with the labels it gives them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))
    model.double().requires_grad_(False)
    # sure of itself, so that the cross-entropy is led by the strongest wrong class
    model[1].weight *= 30
    x = .3 + .4 * images(200, shape=shape)
    return model, x, model(x).argmax(1)


def worst_margin(model, x, y, eps):
    """min z_y - z_i over the ball and i != y: (w_y - w_i).x + b_y - b_i - eps ||w_y - w_i||_1."""
    w, b = model[1].weight, model[1].bias
    difference = w[y][:, None] - w[None]
    least = ((difference * x.flatten(1)[:, None]).sum(2) + b[y][:, None] - b[None]
             - eps * difference.abs().sum(2))
    return least.scatter(1, y[:, None], math.inf).min(1).values


# Random numbers

def test_splitmix64_gives_the_published_numbers_of_seed_1234567():
    state = torch.tensor([1234567]) + torch.arange(1, 6) * -0x61C8864680B583EB
    assert [n % 2 ** 64 for n in attack.splitmix64(state).tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821]


def test_random_numbers_of_an_image_depend_on_nothing_but_seed_index_and_stream():
    like, index = torch.zeros(1), torch.arange(50)
    u = attack.uniform('pgd', 3, index, (1, 2, 5), like, 7)
    some = torch.tensor([41, 3, 17])
    assert torch.equal(attack.uniform('pgd', 3, some, (1, 2, 5), like, 7), u[some])
    both = attack.uniform('pgd', 3, index, (1, 2, 5), like, torch.tensor([[6], [7]]))
    assert torch.equal(both[1], u) and not torch.equal(both[0], u)


def test_random_numbers_are_uniform_and_uncorrelated():
    u = attack.uniform('pgd', 0, torch.arange(300), (1000,), torch.zeros(1, dtype=torch.double))
    assert 0 <= u.min() and u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    # chi-squared with 99 degrees of freedom: 150 is p < 0.001
    assert ((counts - 3000) ** 2 / 3000).sum() < 150
    z = (u - .5) * math.sqrt(12)
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1])):  # between neighbouring images and numbers
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())


def test_attacks_losses_seeds_and_restarts_share_no_random_numbers():
    draws = [attack.uniform(name, seed, torch.arange(20), (500,), torch.zeros(1), stream).flatten()
             for name in ('pgd', 'apgd ce', 'apgd dlr', 'square')
             for seed in (0, 1, 2, 1 << 20, 1 << 40) for stream in (0, 1, 2)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 6 / 100  # six deviations of 1 / sqrt(20 * 500)


def test_derived_seeds_are_distinct_down_to_their_32_bits():
    seeds = {attack.derive(*words) % 2 ** 32 for words in itertools.product(
        (0, 1, 2, 4096, 2 ** 32 - 1), range(20), range(20))}
    assert len(seeds) == 5 * 20 * 20


# Closed forms on linear classifiers

def at_half(classes):
    """A linear classifier, images, labels, and a budget at which about half of them are robust."""
    model, x, y = linear(classes)
    low, high = 0., .299
    for _ in range(40):
        eps = (low + high) / 2
        low, high = (eps, high) if (worst_margin(model, x, y, eps) > 0).sum() > 100 else (low, eps)
    return model, x, y, 1.001 * eps  # not at the very edge of an image


@pytest.mark.parametrize('run', [
    functools.partial(attack.pgd, n_iter=20, step_size=.02), attack.apgd,
    functools.partial(attack.square, n_queries=900)], ids=['pgd', 'apgd', 'square'])
def test_two_classes_fall_to_the_closed_form(run):
    model, x, y, eps = at_half(2)
    least = worst_margin(model, x, y, eps)
    reached = attack.margin(model(run(model, x, y, eps)), y)
    robust = least > 0
    assert 50 < robust.sum() < 150
    assert (reached >= least - 1e-9).all()  # bounded by eps ||w_i - w_y||_1
    assert torch.allclose(reached[robust], least[robust])  # and reached
    assert torch.equal(reached > 0, robust)


@pytest.mark.parametrize('run', [
    functools.partial(attack.pgd, n_iter=20, step_size=.02),
    functools.partial(attack.apgd, n_restarts=3),
    functools.partial(attack.apgd, n_restarts=3, loss='dlr'),
    functools.partial(attack.square, n_queries=400)], ids=['pgd', 'apgd_ce', 'apgd_dlr', 'square'])
def test_five_classes_are_bounded_by_the_closed_form_and_nearly_all_fall_to_it(run):
    model, x, y, eps = at_half(5)
    robust = worst_margin(model, x, y, eps) > 0
    stands = attack.correct(model, run(model, x, y, eps), y)
    assert 50 < robust.sum() < 150
    assert stands[robust].all()
    assert (stands & ~robust).sum() <= 4


def test_the_pixel_range_bounds_the_closed_form_too():
    model, _, _ = linear(2)
    x = images(100, shape=(1, 4, 4))
    y, w = model(x).argmax(1), model[1].weight
    slope = (w[y] - w[1 - y]).view(-1, 1, 4, 4)
    worst = torch.where(slope > 0, (x - .5).clamp(0), (x + .5).clamp(max=1))
    least = attack.margin(model(worst), y)
    for run in (functools.partial(attack.pgd, step_size=.1, n_iter=20),
                functools.partial(attack.apgd, best_loss=True)):
        assert torch.allclose(attack.margin(model(run(model, x, y, .5)), y), least)


# Contracts of every attack

@each
def test_the_result_stays_in_the_ball_and_in_the_pixel_range(run):
    x = images(30)
    x_adv = run(lenet(), x, torch.arange(30) % 10, .1)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
    assert (x_adv - x).abs().max() <= .1 + 1e-12 and x_adv.min() >= 0 and x_adv.max() <= 1


@each
def test_the_result_is_the_same_for_any_batch_size_and_order(run):
    model, x = lenet(), images(37)
    y = torch.where(torch.arange(37) % 5 > 0, model(x).argmax(1), 3)
    whole = run(model, x, y, .1, batch_size=100)
    assert not attack.correct(model, whole, y).all()
    for batch_size in (1, 8, 37):
        assert torch.allclose(run(model, x, y, .1, batch_size=batch_size), whole, atol=1e-9)
    order = torch.randperm(37)
    shuffled = run(model, x[order], y[order], .1, index=order, batch_size=9)
    assert torch.allclose(shuffled, whole[order], atol=1e-9)


@each
def test_the_seed_decides(run):
    model, x = lenet(), images(5)
    y = model(x).argmax(1)
    assert torch.equal(run(model, x, y, .01, seed=1), run(model, x, y, .01, seed=1))
    assert not torch.equal(run(model, x, y, .01, seed=1), run(model, x, y, .01, seed=2))


@each
def test_a_budget_of_0_gives_the_images_back(run):
    x = images(4)
    assert torch.equal(run(lenet(), x, torch.zeros(4, dtype=torch.long), 0.), x)


@each
@pytest.mark.parametrize('n', [0, 1, 7])
def test_any_number_of_images_all_wrong_or_none(run, n):
    model, x = lenet(), images(n)
    y = model(x).argmax(1)
    right = run(model, x, y, .01, batch_size=3)
    wrong = run(model, x, (y + 1) % 10, .01, batch_size=3)
    assert right.shape == wrong.shape == x.shape
    assert not attack.correct(model, wrong, (y + 1) % 10).any()


@pytest.mark.parametrize('name', ['apgd_ce', 'apgd_dlr', 'square'])
def test_images_that_are_wrong_when_clean_stay_as_they_are(name):
    model, x = lenet(), images(12)
    y = torch.where(torch.arange(12) % 2 > 0, model(x).argmax(1), (model(x).argmax(1) + 1) % 10)
    unchanged = (ALL[name](model, x, y, .05) == x).flatten(1).all(1)
    assert torch.equal(unchanged, torch.arange(12) % 2 == 0)


class Stateful(nn.Module):
    """BatchNorm, a frozen parameter and a part in eval mode inside of a model in train mode."""

    def __init__(self, fail=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.fc, self.fail = nn.Linear(2 * 26 * 26, 10), fail
        self.double().train()
        self.conv.bias.requires_grad_(False)
        self.norm.eval()
        self.fc.weight.grad = torch.ones_like(self.fc.weight)

    def forward(self, x):
        if self.fail:
            raise KeyError('broken')
        return self.fc(self.norm(self.conv(x)).flatten(1))


@each
@pytest.mark.parametrize('fail', [False, True])
def test_the_model_is_left_as_it_was_found_also_after_an_exception(run, fail):
    model = Stateful(fail)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        run(model, images(6), torch.zeros(6, dtype=torch.long), .1)
        assert not fail
    except KeyError:
        assert fail
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ['conv.bias']
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (model.fc.weight.grad == 1).all()
    assert all(p.grad is None for name, p in model.named_parameters() if name != 'fc.weight')


@each
def test_the_model_is_attacked_in_eval_mode(run):
    class Spy(nn.Flatten):
        def forward(self, x):
            assert not self.training
            return super().forward(x)[:, :10] * 9

    run(Spy().train(), images(4), torch.zeros(4, dtype=torch.long), .1)


@each
def test_attacks_work_without_gradients_around_them(run):
    x, y = images(3), torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        inside = run(lenet(), x, y, .1)
    assert torch.equal(inside, run(lenet(), x, y, .1)) and not inside.requires_grad


class Nan(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10] * math.nan


class NanOnce(nn.Module):
    """Returns nan in its `when`-th pass only."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def forward(self, x):
        self.when -= 1
        logits = x.flatten(1)[:, :10] + 5 * F.one_hot(torch.zeros(len(x), dtype=torch.long), 10)
        return logits * math.nan if self.when == 0 else logits


@each
def test_nan_logits_are_refused(run):
    x, y = images(4), torch.zeros(4, dtype=torch.long)
    for model in (Nan(), NanOnce(1), NanOnce(2), NanOnce(7)):
        with pytest.raises(ValueError, match='nan'):
            run(model, x, y, .1)


@each
@pytest.mark.parametrize('change, message', [
    ({'x': -.5}, '-0.5'), ({'x': 1.5}, '1.5'), ({'x': math.nan}, 'nan'), ({'eps': -.25}, '-0.25'),
    ({'eps': math.nan}, 'nan'), ({'batch_size': 0}, 'batch_size .* 0'),
    ({'y': torch.zeros(3, dtype=torch.long)}, '4 images but 3 labels'),
    ({'index': torch.arange(5)}, '5')])
def test_bad_input_is_refused_with_its_value(run, change, message):
    arguments = {'x': images(4), 'y': torch.zeros(4, dtype=torch.long), 'eps': .1} | change
    if not isinstance(arguments['x'], torch.Tensor):
        arguments['x'] = images(4).index_fill(0, torch.tensor(2), arguments['x'])
    with pytest.raises(ValueError, match=message):
        run(lenet(), **arguments)


@pytest.mark.parametrize('call, message', [
    (functools.partial(attack.pgd, step_size=.1, n_iter=0), 'n_iter .* 0'),
    (functools.partial(attack.pgd, step_size=0., n_iter=3), 'step_size .* 0'),
    (functools.partial(attack.apgd, n_iter=0), 'n_iter .* 0'),
    (functools.partial(attack.apgd, n_restarts=-1), 'n_restarts .* -1'),
    (functools.partial(attack.apgd, loss='cw'), "'cw'"),
    (functools.partial(attack.square, n_queries=0), 'n_queries .* 0'),
    (functools.partial(attack.square, p_init=1.5), 'p_init .* 1.5')])
def test_bad_settings_are_refused_with_their_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(lenet(), images(2), torch.zeros(2, dtype=torch.long), .1)


# PGD

class Flat(nn.Module):
    """A model whose loss has no slope, so that an attack stays where it started."""

    def forward(self, x):
        return x.flatten(1)[:, :10] * 0


@pytest.mark.parametrize('start, width', [(None, .01), (.1, .1)])
def test_pgd_starts_uniformly_within_its_step_or_within_what_is_asked_for(start, width):
    x = .5 + 0 * images(50)
    noise = attack.pgd(Flat(), x, torch.zeros(50, dtype=torch.long), .1, .01, 3, start=start) - x
    assert noise.abs().max() <= width
    # of a uniform law on +-width
    assert noise.std() == pytest.approx(width / math.sqrt(3), rel=.02)


def test_pgd_is_signed_ascent_step_by_step():
    model, x = lenet(), images(3)
    y = torch.tensor([1, 2, 3])
    z = x.clone()
    for _ in range(4):
        z.requires_grad_()
        F.cross_entropy(model(z), y).backward()
        z = (x + (z + .03 * z.grad.sign() - x).clamp(-.08, .08)).clamp(0, 1).detach()
    assert torch.allclose(attack.pgd(model, x, y, .08, .03, 4, start=0.), z)


# APGD

def test_apgd_checkpoints_of_100_iterations():
    assert attack.apgd_checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize('n_iter', [1, 5, 10, 1000])
def test_apgd_checkpoints_are_distinct_and_within_the_run(n_iter):
    checkpoints = attack.apgd_checkpoints(n_iter)
    assert checkpoints == sorted(set(checkpoints))
    assert 1 <= checkpoints[0] and checkpoints[-1] <= n_iter


def apgd_of_one_image(f, x, start, eps, n_iter, rho=.75):
    """Algorithm 1 of Croce & Hein 2020 for one image, in its indices; f gives loss and gradient."""
    def project(z):
        return np.clip(np.clip(z, x - eps, x + eps), 0, 1)

    p = [0., .22]
    while p[-1] < 1:
        p.append(round(p[-1] + max(p[-1] - p[-2] - .03, .06), 10))
    w = [math.ceil(round(q * n_iter, 8)) for q in p]
    points, losses = [start], [f(start)[0]]
    eta, halvings = 2 * eps, 0
    points.append(project(start + eta * np.sign(f(start)[1])))
    losses.append(f(points[1])[0])
    best = max((0, 1), key=lambda i: losses[i])
    x_max, f_max = points[best], losses[best]
    rises, eta_at, f_max_at = int(losses[1] > losses[0]), [eta], [losses[0]]
    for k in range(1, n_iter + 1):
        if k in w:
            j = w.index(k)
            first = rises < rho * (w[j] - w[j - 1])
            second = j > 1 and eta_at[-1] == eta_before and f_max_at[-1] == f_max
            eta_before = eta
            f_max_at.append(f_max)
            if first or second:
                eta /= 2
                halvings += 1
                points[k], losses[k] = x_max, f_max
            eta_at.append(eta)
            rises = 0
        if k == n_iter:
            break
        z = project(points[k] + eta * np.sign(f(points[k])[1]))
        points.append(project(points[k] + .75 * (z - points[k])
                              + .25 * (points[k] - points[k - 1])))
        losses.append(f(points[k + 1])[0])
        rises += losses[k + 1] > losses[k]
        if losses[k + 1] > f_max:
            x_max, f_max = points[k + 1], losses[k + 1]
    return x_max, f_max, halvings


def ratio_by_sorting(logits, y):
    """DLR of one image by sorting in plain Python."""
    z = logits[0].tolist()
    first, _, third = sorted(z, reverse=True)[:3]
    others = max(value for i, value in enumerate(z) if i != y)
    return (others - z[y]) / (first - third)


@pytest.mark.parametrize('loss', ['ce', 'dlr'])
def test_apgd_follows_algorithm_1_of_its_paper(loss):
    model, x, eps, n_iter = lenet(), images(12), .2, 100
    y = model(x).argmax(1)
    noise = 2 * attack.uniform(f'apgd {loss}', 5, torch.arange(12), (1, 28, 28), x) - 1
    ours = attack.apgd(model, x, y, eps, n_iter, loss=loss, best_loss=True, seed=5, batch_size=5)
    halvings = 0
    for i in range(12):
        def f(z):
            z = torch.from_numpy(z)[None].requires_grad_()
            logits = model(z)
            if loss == 'ce':
                value = F.cross_entropy(logits, y[i:i + 1])
            else:
                a, b, c = logits[0].topk(3).indices
                best_other = b if a == y[i] else a
                gap = logits[0, a] - logits[0, c] + 1e-12
                value = (logits[0, best_other] - logits[0, y[i]]) / gap
                assert value.item() == pytest.approx(ratio_by_sorting(logits, y[i]))
            return value.item(), torch.autograd.grad(value, z)[0][0].numpy()

        start = (x[i] + eps * noise[i] / noise[i].abs().max()).clamp(0, 1).numpy()
        x_max, f_max, halved = apgd_of_one_image(f, x[i].numpy(), start, eps, n_iter)
        assert np.allclose(ours[i].numpy(), x_max, atol=1e-9)
        assert f(ours[i].numpy())[0] == pytest.approx(f_max)
        halvings += halved
    assert halvings > 12  # the rule was put to work


def test_apgd_spends_a_restart_only_on_images_that_still_stand():
    passes = []

    class Counting(nn.Module):
        def forward(self, x):
            passes.append(len(x))
            hard = (x[:, 0, 0, 0] > .5).double()[:, None] * torch.tensor([100., 0., 0.])
            return x.flatten(1)[:, 1:4] * torch.tensor([-1., 1., 1.]) + hard

    x = images(10)
    x[:, 0, 0, 0] = torch.tensor([1.] * 4 + [0.] * 6)
    x[:, 0, 0, 1:4] = torch.tensor([0., .05, .05])  # one step and they fall
    x[7:, 0, 0, 1:4] = torch.tensor([.5, .9, .9])
    x[4:7, 0, 0, 1:4] = torch.tensor([0., 0., 0.])
    y = torch.zeros(10, dtype=torch.long)
    x_adv = attack.apgd(Counting(), x, y, .3, 20, 3)
    assert passes[0] == 10 and max(passes[1:]) == 7
    # those that fall leave after 4 steps at the latest
    assert sum(passes) <= 10 + 7 * 5 + 4 * (21 * 3 - 5)
    assert torch.equal(attack.correct(Counting(), x_adv, y)[:4], torch.ones(4, dtype=torch.bool))
    assert not attack.correct(Counting(), x_adv, y)[4:].any()


def test_apgd_keeps_the_best_loss_of_all_restarts():
    model, x = lenet(), images(8)
    y = model(x).argmax(1)

    def loss(n_restarts):
        x_adv = attack.apgd(model, x, y, .1, 10, n_restarts, best_loss=True)
        return attack.cross_entropy(model(x_adv), y)

    one, four = loss(1), loss(4)
    assert (four >= one).all() and (four > one).any()


def test_dlr_by_hand():
    z, y = torch.tensor([[3., 1., 0., 2.], [0., 4., 2., 1.]]), torch.tensor([0, 2])
    # (y 0) -(3 - 2) / (3 - 1) and (y 2) -(2 - 4) / (4 - 1)
    assert attack.dlr(z, y).tolist() == pytest.approx([-1 / 2, 2 / 3])
    assert torch.allclose(attack.dlr(5 * z + 7, y), attack.dlr(z, y))


def test_dlr_needs_three_classes():
    with pytest.raises(ValueError, match='got 2'):
        attack.dlr(torch.zeros(1, 2), torch.tensor([0]))


def test_margin_by_hand():
    z = torch.tensor([[3., 1., 2.], [0., 4., 2.]])
    assert attack.margin(z, torch.tensor([0, 2])).tolist() == [1., -2.]


def test_losses_of_an_ensemble_of_one_are_those_of_the_model():
    model, x, y = lenet(), images(6), torch.arange(6)
    ensemble = models.Ensemble([model])
    for loss in (attack.cross_entropy, attack.dlr, attack.margin):
        assert torch.allclose(loss(ensemble(x), y), loss(model(x), y))


# Square

def test_square_windows_shrink_as_published_for_mnist():
    # sqrt(0.8 / 2^i * 28 * 28) rounded: 25.04 17.71 12.52 8.85 6.26 4.43 3.13 2.21 1.57 1.11
    sides = [attack.square_side(q, .8, 28, 28)
             for q in (2, 10, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]
    assert sides == [25, 25, 18, 13, 9, 6, 4, 3, 2, 2, 1]


def test_square_windows_fit_into_any_image():
    assert attack.square_side(1, 1., 4, 9) == 4 and attack.square_side(9999, .01, 4, 4) == 1


@pytest.mark.parametrize('side', [1, 3, 8])
def test_square_windows_take_every_place_equally_often(side):
    u = (torch.arange(60000) + .5) / 60000
    windows = attack.inside(u, side, 8)
    assert (windows.sum(1) == side).all()
    places = windows.to(torch.int8).argmax(1).bincount(minlength=8)
    assert (places[:8 - side + 1] - 60000 / (8 - side + 1)).abs().max() <= 1
    assert windows[0, 0] and windows[-1, -1]  # the first and the last row included


def test_square_starts_from_vertical_stripes():
    class Unbreakable(nn.Module):
        def forward(self, x):
            return F.one_hot(torch.zeros(len(x), dtype=torch.long), 10).double()

    x = .5 + 0 * images(6, shape=(3, 8, 8))
    noise = attack.square(Unbreakable(), x, torch.zeros(6, dtype=torch.long), .1, n_queries=1) - x
    assert torch.allclose(noise.abs(), torch.tensor(.1).double())
    assert torch.equal(noise, noise[:, :, :1].expand_as(noise))
    assert (noise > 0).double().mean() == pytest.approx(.5, abs=.2)


def test_square_spends_just_its_queries_and_none_on_images_that_are_done():
    passes = []

    class Counting(nn.Module):
        def forward(self, x):
            passes.append(len(x))
            return F.one_hot((x[:, 0, 0, 0] < .5).long(), 10).double()

    x = .2 + 0 * images(9)
    x[:, 0, 0, 0] = torch.tensor([.9] * 4 + [.1] * 5)  # four that stand, five wrong from the start
    attack.square(Counting(), x, torch.zeros(9, dtype=torch.long), .1, n_queries=47)
    assert passes == [9] + [4] * 47


def test_square_never_raises_the_margin():
    model, x = lenet(), images(10)
    y = model(x).argmax(1)
    margins = [attack.margin(model(attack.square(model, x, y, .02, n)), y) for n in (1, 10, 100)]
    assert (margins[1] <= margins[0]).all() and (margins[2] <= margins[1]).all()
    assert (margins[2] < margins[0]).any()


def test_square_goes_on_where_a_tie_still_counts_as_correct():
    """Saturated members that disagree tie, and argmax then takes the first class, the right one."""
    class Member(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.bias = bias

        def forward(self, x):
            z = 25 * torch.sign(x.mean((1, 2, 3)) - self.bias)
            return torch.stack([-z, z], 1)

    model, x = models.Ensemble([Member(.5), Member(.51), Member(.55)]), .49 + 0 * images(60).float()
    y = torch.zeros(60, dtype=torch.long)
    assert attack.correct(model, x, y).all() and not attack.correct(model, x + .1, y).any()
    assert not attack.correct(model, attack.square(model, x, y, .1, 500), y).any()


def test_square_needs_no_gradient():
    class Hard(nn.Module):
        def forward(self, x):
            return F.one_hot((x.flatten(1).sum(1) * 50).long() % 10, 10).double()

    x, y = images(5), torch.zeros(5, dtype=torch.long)
    y = Hard()(x).argmax(1)
    assert not attack.correct(Hard(), attack.square(Hard(), x, y, .1, 50), y).any()


# The columns of Table 1

def test_the_columns_of_table_1_have_the_settings_of_the_paper():
    settings = {key: getattr(run, 'keywords', {}) for key, run in attack.ATTACKS.items()}
    assert settings == {'pgd': {}, 'pgd100': {'n_iter': 100},
                        'apgd100_ce': {'n_iter': 100, 'n_restarts': 5, 'loss': 'ce'},
                        'apgd100_dlr': {'n_iter': 100, 'n_restarts': 5, 'loss': 'dlr'},
                        'square5k': {'n_queries': 5000, 'p_init': .8}}


def test_predict_and_correct_do_not_care_for_batches():
    model, x = lenet(), images(11)
    y = torch.where(torch.arange(11) < 4, model(x).argmax(1), 99)
    assert attack.correct(model, x, y, batch_size=3).tolist() == [True] * 4 + [False] * 7
    assert torch.equal(attack.predict(model, x, 2), model(x).argmax(1))


# Gathering

class Steady(nn.Module):
    """Never fooled; notes how many images pass at a time."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def forward(self, x):
        self.passes.append(len(x))
        return F.one_hot(torch.zeros(len(x), dtype=torch.long), 10) + x.flatten(1)[:, :10] / 10


def test_apgd_fills_its_batches_across_restarts():
    model, x = Steady(), images(25)
    attack.apgd(model, x, torch.zeros(25, dtype=torch.long), .1, n_iter=12, n_restarts=4,
                batch_size=10)
    assert model.passes[:3] == [10, 10, 5]  # which images stand
    counts = model.passes[3:]
    assert sum(counts) == 25 * 4 * 13 and counts == 10 * 13 * [10]


def test_images_that_join_at_different_times_are_attacked_as_if_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    x, index = images(30), torch.arange(100, 130)
    y = model(x).argmax(1)
    whole = attack.apgd(model, x, y, .02, 11, 3, 'dlr', index=index, batch_size=7)
    alone = torch.cat([attack.apgd(model, x[i:i + 1], y[i:i + 1], .02, 11, 3, 'dlr',
                                   index=index[i:i + 1]) for i in range(30)])
    assert torch.allclose(whole, alone, atol=1e-12)
    fooled = ~attack.correct(model, whole, y)
    assert fooled.any() and not fooled.all()


def test_what_an_attack_keeps_does_not_grow_with_the_number_of_images():
    grown = printed("""
import torch
import attack
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
for n in 500, 40000:
    x, before = torch.rand(n, 1, 28, 28), peak()
    y = attack.predict(model, x)
    attack.apgd(model, x, y, 1e-6, 2)
    attack.square(model, x, y, 1e-6, 2)
print((peak() - before) / (4 * x.numel()))
""")
    assert grown < 4  # in sizes of x: the result, and what the allocator keeps of the one before


def test_the_batch_that_fits_follows_the_memory(monkeypatch):
    model, sizes = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), []
    x, y = images(80).float(), torch.arange(80) % 10
    for memory in 1, 10 ** 6, 10 ** 7, 10 ** 12:
        monkeypatch.setattr(models, 'memory', lambda device: (0, memory))
        sizes.append(attack.fitting_batch(model, x, y))
    assert sizes[0] == 1 and 1 < sizes[1] < sizes[2] <= 250 and sizes[3] == 250
    with models.frozen(model), models.saved_bytes() as saved:
        attack.loss_and_gradient(model, x[:sizes[1]], y[:sizes[1]], attack.cross_entropy)
    assert sum(saved.values()) <= 10 ** 6 / 8


# The attacker in training

class NoWaiting(TorchFunctionMode):
    """Inside, whatever would make the host wait for a device is an error."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (
            torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__,
            torch.Tensor.__index__, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy,
            torch.Tensor.nonzero, torch.nonzero, torch.masked_select, torch.tensor), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', ['lenet', 'resnet18'])
def test_the_adversary_is_pgd_while_parameters_and_budgets_change_and_waits_for_nothing(
        name, monkeypatch):
    monkeypatch.setattr(attack, 'derive', lambda *words: hash(words) % 2 ** 63)  # of host tensors
    torch.manual_seed(0)
    model = models.build(name, {'lenet': 'mnist'}.get(name, 'cifar10'), 1).double()
    x, y = images(6, shape=(3, 32, 32) if name == 'resnet18' else (1, 28, 28)), torch.arange(6)
    adversary = attack.Adversary(model, 3)
    for seed, (eps, start, n) in enumerate([(.1, None, 6), (.05, .05, 6), (.1, None, 4)]):
        expected = attack.pgd(model, x[:n], y[:n], eps, eps / 4, 3, start=start, seed=seed)
        with NoWaiting():
            found = adversary(x[:n], y[:n], eps, eps / 4, start=start, seed=seed)
        assert torch.allclose(found, expected, atol=1e-12)
        assert model.training and all(p.requires_grad and p.grad is None
                                      for p in model.parameters())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.2)
        model(x)  # new statistics


def test_a_loop_is_captured_once_for_each_shape_whatever_the_budget():
    model, x, y = lenet(), images(6), torch.arange(6)
    captures, replays = [], []

    def captured(run):  # as a CUDA graph would: run() fixes which tensors it reads and writes
        captures.append(1)
        return lambda: replays.append(1) or run()

    adversary = attack.Adversary(model, 2, captured=captured)
    for n, eps in (6, .1), (6, .2), (4, .2), (6, .05), (4, .3):
        found = adversary(x[:n], y[:n], eps, eps / 4, seed=n)
        assert torch.allclose(found, attack.pgd(model, x[:n], y[:n], eps, eps / 4, 2, seed=n))
    assert len(captures) == 2 and len(replays) == 5


def test_what_a_capture_tries_out_is_finite():
    torch.use_deterministic_algorithms(True)  # fresh memory is then full of nan
    try:
        adversary = attack.Adversary(lenet(), 2, captured=replayed)
        adversary(images(6), torch.arange(6), .1, .05)
    finally:
        torch.use_deterministic_algorithms(False)
    assert adversary.total.isfinite()


def test_logits_that_are_nan_show_in_the_total_of_an_adversary():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(2704, 10))
    adversary, x, y = attack.Adversary(model, 2), images(6).float(), torch.arange(6)
    adversary(x, y, .1, .05)
    assert adversary.total.isfinite() and adversary.total > 0
    model[1].running_var.fill_(-1)
    adversary(x, y, .1, .05)
    assert adversary.total.isnan()


def test_what_an_adversary_returns_is_not_overwritten_by_the_next_batch():
    adversary, x, y = attack.Adversary(lenet(), 2), images(6), torch.arange(6)
    first = adversary(x, y, .1, .05)
    kept = first.clone()
    adversary(1 - x, y, .1, .05)
    assert torch.equal(first, kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a cuda device')
@pytest.mark.parametrize('name, dataset', [('lenet', 'mnist'), ('resnet18', 'cifar10')])
def test_a_captured_loop_on_cuda_is_pgd(name, dataset):
    torch.manual_seed(0)
    model = models.build(name, dataset, 2).to('cuda', memory_format=torch.channels_last)
    channels, size = models.SHAPES[dataset]
    x = torch.rand(32, channels, size, size, device='cuda')
    y = torch.arange(32, device='cuda') % 10
    adversary = attack.Adversary(model, 5)
    for n, eps in (32, .1), (32, .2), (20, .1):
        found = adversary(x[:n], y[:n], eps, eps / 4, seed=1)
        expected = attack.pgd(model, x[:n], y[:n], eps, eps / 4, 5, seed=1)
        losses = [attack.mean_loss(model, z, y[:n])[0] for z in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.05)

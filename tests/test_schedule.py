import pytest

import schedule


def test_linear_budget_is_eq_5_by_hand():
    assert [schedule.eps_at(t, 'linear', .4, 0., .8) for t in (0., .125, .25, .5, .75)] \
        == pytest.approx([0., .1, .2, .4, .4])


def test_cosine_budget_is_eq_5_by_hand():
    # 1 - cos at 0, 60, 90 and 120 degrees is 0, 1/2, 1 and 3/2
    assert [schedule.eps_at(t, 'cosine', 8., 0., 16.) for t in (0., 1 / 3, 1 / 2, 2 / 3)] \
        == pytest.approx([0., 4., 8., 8.])


def test_mnist_cosine_reaches_the_target_at_60_8_percent():
    assert schedule.eps_at(.607, 'cosine', .4, 0., .6) < .4 \
        == schedule.eps_at(.609, 'cosine', .4, 0., .6)


def test_budget_is_clipped_to_0_and_the_target():
    assert schedule.eps_at(0., 'linear', .4, -.4, .8) == 0.
    assert schedule.eps_at(1 / 3, 'linear', .4, -.4, .8) == pytest.approx(0.)
    assert schedule.eps_at(.99, 'linear', .4, .1, 9.) == .4


def test_constant_budget_is_constant():
    assert {schedule.eps_at(t / 10, 'constant', .3) for t in range(10)} == {.3}


def test_progress_restarts_with_each_period():
    periods = [100, 50, 50]
    assert [schedule.progress(e, periods) for e in (0, 50, 99, 100, 125, 150, 199)] \
        == [0, .5, .99, 0, .5, 0, .98]
    assert schedule.progress(99.5, periods) == .995


@pytest.mark.parametrize('epoch', [-1, 200])
def test_progress_refuses_epochs_outside_of_the_periods(epoch):
    with pytest.raises(ValueError, match=str(epoch)):
        schedule.progress(epoch, [100, 100])


def test_three_periods_are_a_half_and_two_quarters():
    assert schedule.thirds(200) == [100, 50, 50]
    assert all(sum(schedule.thirds(n)) == n and min(schedule.thirds(n)) >= 1 for n in range(4, 60))
    with pytest.raises(ValueError, match='3'):
        schedule.thirds(3)


def test_step_decays_at_half_and_three_quarters_of_200_epochs():
    rates = [schedule.lr_at(schedule.progress(e, [200]), 'step', .1)
             for e in (0, 99, 100, 149, 150, 199)]
    assert rates == pytest.approx([.1, .1, .01, .01, .001, .001])


def test_cosine_and_exponential_learning_rates():
    assert [schedule.lr_at(t, 'cosine', .2) for t in (0, 1 / 3, 1 / 2)] \
        == pytest.approx([.2, .15, .1])
    assert [schedule.lr_at(t, 'exponential', .2) for t in (0, 1 / 2)] == pytest.approx([.2, .02])


def test_warmup_raises_the_learning_rate_linearly_then_leaves_it():
    assert [schedule.lr_at(t, 'constant', .4, .2) for t in (0, .05, .1, .2, .9)] \
        == pytest.approx([0, .1, .2, .4, .4])


def test_unknown_schedules_are_named():
    with pytest.raises(ValueError, match="'cosin'"):
        schedule.eps_at(.5, 'cosin', .4)
    with pytest.raises(ValueError, match="'cosin'"):
        schedule.lr_at(.5, 'cosin', .4)

import pytest

import schedule


def test_budget_is_eq_5_by_hand():
    for kind, eps_max, ts, expected in (
        ('constant', 0.4, (0.0, 0.5, 0.9), (0.4, 0.4, 0.4)),
        ('linear', 0.8, (0.0, 0.125, 0.25, 0.5, 0.75), (0.0, 0.1, 0.2, 0.4, 0.4)),
        # 1 - cos at 0, 60, 90 and 120 degrees is 0, 1/2, 1 and 3/2
        ('cosine', 0.8, (0.0, 1 / 3, 1 / 2, 2 / 3), (0.0, 0.2, 0.4, 0.4)),
        ('cosine', 0.6, (0.607, 0.609), (0.398957, 0.4)),  # on MNIST it arrives at 60.8 %
    ):
        found = [schedule.eps_at(t, kind, 0.4, 0.0, eps_max) for t in ts]
        assert found == pytest.approx(expected, abs=1e-5), kind


def test_budget_is_clipped_to_0_and_the_target():
    assert schedule.eps_at(0.3, 'linear', 0.4, -0.4, 0.8) == 0
    assert schedule.eps_at(0.9, 'linear', 0.4, 0.1, 9.0) == 0.4


def test_progress_restarts_with_each_period():
    assert [schedule.progress(e, [4, 2]) for e in (0, 3, 3.5, 4, 5)] == [0, 0.75, 0.875, 0, 0.5]


def test_progress_ahead_stays_in_its_period():
    assert [schedule.progress(e, [10, 5], ahead=1) for e in (0, 9, 10, 14)] == [0.1, 1, 0.2, 1]


def test_progress_refuses_epochs_outside_of_the_periods():
    for epoch in -1, 200:
        with pytest.raises(ValueError, match=str(epoch)):
            schedule.progress(epoch, [100, 100])


def test_three_periods_are_a_half_and_two_quarters():
    assert schedule.three_periods(200) == [100, 50, 50]
    for n in range(4, 60):
        periods = schedule.three_periods(n)
        assert sum(periods) == n and min(periods) >= 1
    with pytest.raises(ValueError, match='3'):
        schedule.three_periods(3)


def test_learning_rates_by_hand():
    for kind, ts, expected in (
        ('step', (0, 0.495, 0.5, 0.745, 0.75, 0.99), (0.2, 0.2, 0.02, 0.02, 0.002, 0.002)),
        ('cosine', (0, 1 / 3, 1 / 2), (0.2, 0.15, 0.1)),
    ):
        assert [schedule.lr_at(t, kind, 0.2) for t in ts] == pytest.approx(expected)


def test_a_warm_up_rises_linearly_to_1_and_is_1_without_a_share():
    assert [schedule.warmup_at(t, 0.4) for t in (0.1, 0.2, 0.4, 0.9)] == [0.25, 0.5, 1, 1]
    assert schedule.warmup_at(0.0, 0.0) == 1

import itertools
import pathlib
from unittest import mock

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from test_report import FEW, analyse, connect, make_run, read_tables

import report
from lib import record
from paper import claims, figures

SMALL = '--n-train 100 --trace 20'


def judged(*arguments):
    """The rows of claims.md: key of CLAIMS -> [{column: cell} of each experiment]."""
    with mock.patch.object(figures, 'draw', return_value={}):
        report.main([*map(str, arguments), '--out', 'out'])
    (rows,) = read_tables(pathlib.Path('out/claims.md'))
    keys, found = iter(claims.CLAIMS), {}
    for row in rows:
        if row['claim']:  # said once for all of its experiments
            found[next(keys)] = own = []
        own.append(row)
    return found


@pytest.mark.parametrize('n', [2, 6])
def test_the_interval_holds_the_truth_19_times_of_20(n):
    draws = torch.randn(2000, n, generator=torch.Generator().manual_seed(0)).numpy()
    said = [claims.finding('', True, '', values)[3] for values in draws]
    assert said.count('inconclusive') / 2000 == pytest.approx(0.95, abs=0.02)


HOLDS = {'holds': [[5, 5.1], [2, 2.5, 3]], 'does not hold': [[-5, -5.1]]}
# equal ones, of few images, deceive
HOLDS |= {'inconclusive': [[5], [5, -5], [5, 5], [0.1 + 0.2, 0.3], [1, 2, 3]]}
COUNTS = {'holds': [[1, 2, 1]], 'does not hold': [[0, 0, -1]], 'inconclusive': [[1, 2], [1, 0, 1]]}


@pytest.mark.parametrize('count, verdicts', [(False, HOLDS), (True, COUNTS)])
def test_the_verdict_follows_the_rule(count, verdicts):
    for verdict, examples in verdicts.items():
        for values in examples:
            assert claims.finding('', True, '', values, count=count)[3] == verdict


def table_runs(folder, constant=10):
    """Three seeds: a constant eps is 2 points worse than a linear one when clean, 5 attacked."""
    for seed in range(3):
        run, robust = f'--seed {seed}', 10 + 0.2 * seed
        make_run(folder / f'c{seed}', run, errors=[3, *[robust + 5] * 6], classes=constant)
        errors = [1.1 - 0.1 * seed, *[robust] * 6]
        make_run(folder / f'l{seed}', f'{run} --eps-sched linear', errors=errors)
    return folder


def test_schedules_are_compared_seed_by_seed(tmp_path):
    rows = judged(table_runs(tmp_path / 'runs'))
    assert rows['linear clean'] == [
        {
            'claim': 'A linear eps beats a constant one: points of clean error',
            'in the paper': 'Table 1: 0.07 to 6.45',
            'verdict': 'holds',
            'ours': '2 (1.75 to 2.25)',  # 4.3027 * 0.1 / sqrt(3) = 0.248
            'n': '3 seeds',
            'experiment': 'mnist lenet',
            'size': "the paper's",
        }
    ]
    assert rows['linear robust'][0]['ours'] == '5' and rows['cosine clean'][0]['verdict'] == '—'


def test_a_gap_to_a_constant_classifier_proves_nothing(tmp_path):
    (row,) = judged(table_runs(tmp_path / 'runs', constant=1))['linear clean']
    assert (row['verdict'], row['size']) == ('baseline untrained', "the paper's")


@pytest.mark.parametrize('change', [{'lr': 0.5}, {'n': 500}, {'settings': FEW}])
def test_runs_that_differ_in_more_are_not_compared(tmp_path, change):
    for seed in range(2):
        make_run(tmp_path / f'{seed}', f'--seed {seed}')
        make_run(tmp_path / f'{seed}l', f'--seed {seed} --eps-sched linear', **change)
    assert judged(tmp_path)['linear clean'][0]['ours'] == '—'


def test_an_ensemble_is_compared_with_the_last_model_of_its_schedule(tmp_path):
    for seed, robust in enumerate((7, 7.1)):
        make_run(tmp_path / f'{seed}', f'--seed {seed} {SMALL}', errors=[1, *[10] * 6])
        flags = f'--periodic --seed {seed} {SMALL}'
        make_run(tmp_path / f'{seed}p', flags, errors=[1, *[robust] * 6])
    (row,) = judged(tmp_path)['yes robust']
    assert row['experiment'] == 'mnist lenet of width 16, eps 0.4, constant eps'
    assert row['ours'].startswith('2.95 (') and row['size'] == 'smaller'


def test_networks_are_compared_under_one_schedule(tmp_path):
    for seed, (model, robust) in itertools.product(range(2), (('vgg', 54), ('resnet18', 50))):
        for sched in 'constant', 'linear':
            flags = f'--dataset cifar10 --model {model} --eps-sched {sched} --periodic'
            errors = [25, *[robust + seed * (model == 'vgg')] * 6]
            make_run(tmp_path / f'{model}{seed}{sched}', f'{flags} --seed {seed}', errors=errors)
    rows = judged(tmp_path)['resnet18 robust']
    for row, sched in zip(rows, ('constant', 'linear'), strict=True):
        assert row['experiment'] == f'cifar10 resnet18, {sched} eps, periodic'
        assert row['ours'].startswith('4.5 (') and row['n'] == '2 seeds'
        assert (row['verdict'], row['size']) == ('inconclusive', "the paper's")


def test_an_ensemble_is_not_compared_with_a_model_of_fewer_epochs(tmp_path):
    for seed, name, flags in itertools.product((0, 1), 'ab', ('--periodic', '--epochs 50')):
        make_run(tmp_path / f'{seed}{name}{flags}', f'--seed {seed} {SMALL} {flags}')
    assert judged(tmp_path)['yes robust'][0]['ours'] == '—'


def test_ramps_of_one_name_are_told_apart(tmp_path):
    table_runs(tmp_path / 'runs')
    for seed, eps_max in itertools.product(range(3), (0.5, 0.6)):
        flags = f'--seed {seed} --eps-sched linear --eps-max {eps_max}'
        make_run(tmp_path / f'runs/{eps_max}{seed}', flags)
    paper, *others = judged(tmp_path / 'runs')['linear clean']
    assert (paper['experiment'], paper['n']) == ('mnist lenet', '3 seeds')
    for row, eps_max in zip(others, (0.5, 0.6), strict=True):
        assert row['experiment'] == f'mnist lenet of width 16, eps 0.4, eps_max {eps_max}'


def rate_runs(folder, pgd, classes=10):
    """Runs of (kind, seed) -> their PGD errors at three learning rates, None for a diverged run."""
    flags = {'warm': '--lr-warmup 0.5', 'constant': '', 'linear': '--eps-sched linear'}
    for (kind, seed), errors in pgd.items():
        for lr, error in zip((1e-4, 1e-3, 1e-2), errors):
            run, own = folder / f'{kind}{seed}_{lr}', f'{flags[kind]} --lr {lr} --seed {seed}'
            make_run(run, own, errors=[1, error or 90], classes=classes if error == 90 else 10)
            if error is None:
                record.save(run / 'log.jsonl', [])
                record.save(run / 'diverged.json', {'epoch': 2})
    return folder


PGD = {('constant', seed): [90, 10, None] for seed in range(3)}
PGD |= {('linear', seed): [40, 10, 20] for seed in range(3)}
PGD |= {('warm', 0): [90, 30, 90], ('warm', 1): [90, 90, 90]}


def test_usable_learning_rates_are_counted_for_each_seed(tmp_path):
    rows = judged('--rate', rate_runs(tmp_path / 'runs', PGD))
    (rates,), (warm_up,) = rows['rates'], rows['warm-up']
    assert rates['experiment'] == 'mnist lenet (linear eps 0.4, rates: 3)'
    assert (rates['verdict'], rates['ours']) == ('holds', '2, 2, 2')  # a diverged run errs
    # seed 0: (50 + 20 + 70) / 3, seed 1: (50 + 80 + 70) / 3
    assert warm_up['ours'].startswith('56.7 (') and warm_up['n'] == '2 seeds'


def test_a_baseline_that_never_trains_has_no_usable_rates_to_compare(tmp_path):
    rate_runs(tmp_path, {('constant', 0): [90, 90], ('linear', 0): [40, 40]}, classes=1)
    assert judged('--rate', tmp_path)['rates'][0]['verdict'] == 'baseline untrained'


def budget_runs(folder, flags=SMALL, n=50):
    """Two seeds: what grows with eps grows by one decade, what falls by two, give or take 5 %."""
    for eps, seed in itertools.product((0, 0.1, 0.2), (0, 1)):
        share = (1 + 0.05 * seed) * eps / 0.2
        run = make_run(folder / f'{eps}{seed}', f'--eps {eps} --seed {seed} {flags}')
        gradients, cosine = (100**-share, 10**share), (0.4 - 0.1 * seed, 0.8)
        first = {'fallen': 0.1 + 0.3 * share, 'distance': 100**-share}
        for row in (log := record.load(f'{run}/log.jsonl')):
            row['loss'] = 2.0
        log[-1]['loss'] = 0.02 * 10**share
        record.save(f'{run}/log.jsonl', log)
        analyse(run, gradients, 10**share, n, cosine, risen=(0.8 + 0.1 * seed, 0.6), **first)
    return folder


def test_what_changes_with_eps_is_measured_in_decades(tmp_path):
    runs = budget_runs(tmp_path / 'runs')
    for eps in 0, 0.2:
        connect(runs / f'{eps}0', runs / f'{eps}1', 0.5 + eps)
    rows = judged('--budget', runs)
    # (2 + 2.1) / 2, (1 + 1.05) / 2, 0.8 - (0.4 + 0.3) / 2; 15 (1 + 1.05) / 2, (30 + 40) / 2 - 10
    expected = {'first': '2.05', 'last': '1.02', 'sharper': '1.02', 'similar': '0.45'}
    expected |= {'slower': '15.4', 'nearer': '2.05', 'loss': '1.02', 'steeper': '25'}
    for claim, value in expected.items():
        (row,) = rows[claim]
        assert row['ours'].startswith(f'{value} (') and row['n'] == '2 seeds'
    (first,), (pair,) = rows['first'], rows['connected']
    assert first['verdict'] == 'holds' and first['size'] == 'smaller'
    assert first['experiment'] == pair['experiment'] == 'mnist lenet of width 16 to eps 0.2'
    assert (pair['ours'], pair['n'], pair['in the paper']) == ('0.2', '1 pair', 'C.2.5')


def test_constant_classifiers_and_saddles_are_no_minima(tmp_path):
    runs = budget_runs(tmp_path / 'runs')
    analyse(make_run(runs / '0.30', f'--eps 0.3 {SMALL}', classes=1), top=1000)
    analyse(make_run(runs / '0.31', f'--eps 0.3 --seed 1 {SMALL}'), top=-1000)
    rows = judged('--budget', runs)
    assert rows['sharper'][0]['experiment'].endswith('to eps 0.2')
    assert rows['first'][0]['experiment'].endswith('to eps 0.3')


def test_analyses_of_fewer_images_are_not_mixed_in(tmp_path):
    analyse(budget_runs(tmp_path / 'runs') / '0.20', top=1e9, n=40)
    (row,) = judged('--budget', tmp_path / 'runs')['sharper']
    assert row['experiment'].endswith('to eps 0.1')


@pytest.mark.parametrize('n', [60000, 50])
def test_a_hessian_of_few_images_is_not_of_the_papers_size(tmp_path, n):
    rows = judged('--budget', budget_runs(tmp_path / 'runs', '--trace 20', n))
    (first,), (sharper,) = rows['first'], rows['sharper']
    assert sharper['size'] == ("the paper's" if n > 50 else 'smaller')
    assert sharper['verdict'] == first['verdict'] == 'holds' and first['size'] == "the paper's"
    assert sharper['experiment'] == first['experiment'] == 'mnist lenet to eps 0.2'


def test_pairs_with_a_run_in_common_are_not_two(tmp_path):
    for eps, seed in itertools.product((0, 0.1), range(4)):
        analyse(make_run(tmp_path / f'{eps}{seed}', f'--eps {eps} --seed {seed} {SMALL}'))
    for eps, (first, barrier) in itertools.product((0, 0.1), enumerate((1, 9, 2))):
        ends = tmp_path / f'{eps}{first}', tmp_path / f'{eps}{first + 1}'
        connect(*ends, barrier * (1 + 10 * eps))
    (row,) = judged('--budget', tmp_path)['connected']  # 0-1: 1, 2-3: 2
    assert row['n'] == '2 pairs' and row['ours'].startswith('1.5 (')


def test_a_dead_layer_of_narrow_models_is_counted_at_the_largest_eps(tmp_path):
    for width, eps, seed in itertools.product((1, 4), (0, 0.3), range(3)):
        flags = f'--width {width} --eps {eps} --seed {seed} {SMALL}'
        run = make_run(tmp_path / f'{width}{eps}{seed}', flags)
        analyse(run, dead=(width, eps) == (1, 0.3))
    (row,) = judged('--width', tmp_path)['dead']
    assert (row['verdict'], row['ours'], row['size']) == ('holds', '1, 1, 1', 'smaller')


THEORY = {'case': 'x', 'draws': 9, 'proposition_1': 1.0}
THEORY |= {'theorem_1': {'largest_violation': 0.0, 'smallest_improvement': 1e-9}}
THEORY |= {'theorem_2': [{'points': [{'share': 0.1, 'bound': bound} for bound in (0.2, 0.5)]}]}
CURVES = dict.fromkeys(('0', '0.6', '1.2'), [1, 0, 1])
THEORY |= {'figure_1': {'theta': [-1, 0, 1], 'curves': CURVES}}


@pytest.mark.parametrize(
    'key, worse',
    [
        ('proposition_1', 0.999),
        ('theorem_1', {'largest_violation': 1e-12, 'smallest_improvement': 1e-9}),
        ('theorem_1', {'largest_violation': 0.0, 'smallest_improvement': 0.0}),
        ('theorem_2', [{'points': [{'share': 0.1, 'bound': 0.2}, {'share': 0.6, 'bound': 0.5}]}]),
    ],
)
def test_what_is_proved_holds_unless_a_case_contradicts(key, worse):
    verdicts = [found[3] for found in claims.of_theory(THEORY)]
    assert verdicts == ['holds'] * 3 and not list(claims.of_theory({}))
    found = {found[0]: found[3] for found in claims.of_theory(THEORY | {key: worse})}
    assert found.pop(key.replace('_', ' ')) == 'does not hold'
    assert list(found.values()) == ['holds'] * 2


def test_every_figure_is_drawn_in_spite_of_the_users_matplotlibrc(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, 'text.usetex', True)
    monkeypatch.setitem(figures.STYLE, 'savefig.dpi', 50)
    runs, rates = budget_runs(tmp_path / 'runs'), rate_runs(tmp_path / 'rates', PGD)
    connect(runs / '0.10', runs / '0.11', 1)
    analyse(make_run(runs / '0.22', f'--eps 0.2 --seed 2 {SMALL}'))
    record.save('evals/theory.json', THEORY)
    studies = ['--budget', str(runs), '--width', str(runs), '--rate', str(rates)]
    report.main([*studies, '--out', 'out'])
    names = 'fig8', 'fig3', 'fig4', 'fig11', 'fig12', 'c24', 'c25'
    names = {f'{name}_mnist_lenet_constant.png' for name in names} | {'fig1.png'}
    names |= {'fig5_mnist_lenet.png', 'c23_mnist_lenet.png'}
    assert {path.name for path in pathlib.Path('out').glob('*.png')} == names
    index = pathlib.Path('out/index.md').read_text()
    assert all(f'({name})' in index for name in names)


@pytest.mark.parametrize('kind', report.STUDIES)
def test_a_study_of_runs_that_are_only_trained_has_no_claims(tmp_path, kind):
    report.main([f'--{kind}', make_run(tmp_path / 'run', errors=[1]), '--out', 'out'])
    (rows,) = read_tables(pathlib.Path('out/claims.md'))
    assert {row['verdict'] for row in rows} == {'—'}


def test_three_seeds_are_a_mean_in_a_band_and_two_are_two_curves():
    runs = [pd.Series([1.0, scale]) for scale in (1.0, 10.0, 100.0)]
    panel = 'x', 'y', 'log', lambda run: run
    (ax,) = figures.curves([('three', 'C0', runs)], [panel]).axes
    assert ax.lines[0].get_ydata() == pytest.approx([1, 10])  # the geometric mean
    low, high = ax.collections[0].get_datalim(ax.transData).intervaly
    assert (low, high) == pytest.approx((1, 100))  # a decade to either side
    (ax,) = figures.curves([('two', 'C0', runs[:2])], [panel]).axes
    assert np.ravel([line.get_ydata() for line in ax.lines]) == pytest.approx([1, 1, 1, 10])
    assert not ax.collections


def test_what_was_not_measured_has_no_dot_but_0_has_one():
    numbers = {'budget': ['a', 'a', 'b'], 'width': [1, 4, 4], 'dead': [0.0, 0.5, 0.0]}
    groups = figures.by_column(pd.DataFrame({'seed': 0} | numbers), 'budget', 'width', 'dead')
    (ax,) = figures.curves(groups, [('width', 'dead', 'linear', lambda rows: rows['dead'])]).axes
    assert [list(line.get_xydata().ravel()) for line in ax.lines] == [[1, 0, 4, 0.5], [4, 0]]
    assert all(line.get_marker() == 'o' for line in ax.lines)

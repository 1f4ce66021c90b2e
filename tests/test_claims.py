import itertools
import pathlib
import shutil
from unittest import mock

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from test_report import FEW, STANDARD, analyse, connect, diverge, evaluate, make_run, reported

import models
import report
from lib import record
from paper import claims, figures, results

SMALL = '--n-train 100 --trace 20'
LINEAR = 'A linear eps beats a constant one'
RATES = 'A warm-up of eps makes more learning rates usable'
WARM_UP = 'A warm-up of lr does not replace that of eps'


def judged(*folders):
    """The rows of all claims in a report: claim -> [{column: cell} of each group of runs]."""
    rows = {}
    for heading, table in reported(*folders).items():
        for row in table if heading.startswith('Claims') else ():
            rows.setdefault(row['claim'].split(':')[0], []).append(row)
    return rows


@pytest.mark.parametrize('n', [2, 6])
def test_the_interval_holds_the_truth_19_times_of_20(n):
    draws = torch.randn(2000, n, generator=torch.Generator().manual_seed(0)).numpy()
    verdicts = [claims.judge(values, full=True)[0] for values in draws]
    assert verdicts.count('inconclusive') / 2000 == pytest.approx(0.95, abs=0.02)


HOLDS = {'holds': [[5, 5.1], [2, 2.5, 3]], 'does not hold': [[-5, -5.1]]}
# equal ones, of few images, deceive
HOLDS |= {'inconclusive': [[5], [5, -5], [5, 5], [0.1 + 0.2, 0.3], [1, 2, 3]]}
COUNTS = {'holds': [[1, 2, 1]], 'does not hold': [[0, 0, -1]], 'inconclusive': [[1, 2], [1, 0, 1]]}


@pytest.mark.parametrize('count, verdicts', [(False, HOLDS), (True, COUNTS)])
def test_the_verdict_follows_the_rule(count, verdicts):
    for verdict, examples in verdicts.items():
        for values in examples:
            assert claims.judge(values, True, count=count)[0] == verdict
            assert claims.judge(values, False, count=count)[0] == f'{verdict} at a small size'


def test_holm_rejects_what_every_set_of_hypotheses_around_it_rejects():
    example = np.array([0.01, 0.04, np.nan, 0.03, 0.005])  # 0.005 < 0.05 / 4, 0.01 < 0.05 / 3
    assert list(claims.holm(example)) == [True, False, False, False, True]
    sets = [set(s) for n in range(1, 6) for s in itertools.combinations(range(5), n)]
    for p in np.random.default_rng(0).uniform(0, 0.06, (100, 5)):
        kept = [s for s in sets if p[list(s)].min() > 0.05 / len(s)]  # by Bonferroni
        assert list(claims.holm(p)) == [not any(i in s for s in kept) for i in range(5)]


@pytest.mark.parametrize('clean, stands', [((2, 3, 4), ', uncorrected'), ((19, 20, 21), '')])
def test_verdicts_are_corrected_for_the_number_of_intervals(tmp_path, clean, stands):
    for seed, gain in enumerate((2, 3, 4)):  # p is 0.0351 of these, 0.0008 of 19, 20, 21
        make_run(tmp_path / f'c_s{seed}', f'--seed {seed}', [30 + clean[seed], *[50 + gain] * 6])
        make_run(tmp_path / f'l_s{seed}', f'--seed {seed} --eps-sched linear', [30, *[50] * 6])
    (row,) = reported(tmp_path)['Claims of Table 1 (2 intervals)']
    assert row['robust'] == row['clean'] == f'holds{stands}'


@pytest.mark.parametrize(
    'column, baseline, changed',
    [
        (3, 'constant', 'linear'),
        (3, 'constant', 'cosine'),
        (2, 'no', 'yes'),
        (1, 'vgg', 'resnet18'),
    ],
)
def test_the_papers_gains_are_those_of_its_table(column, baseline, changed):
    cells = {}
    for line in (pathlib.Path(claims.__file__).parent / 'table1.txt').read_text().splitlines()[1:]:
        *row, clean, a, b, c, d, e = (cell.split('(')[0] for cell in line.split())
        cells[tuple(row)] = float(clean), sum(map(float, (a, b, c, d, e))) / 5
    pairs = [(row, (*row[:column], changed, *row[column + 1 :])) for row in cells]
    pairs = [pair for pair in pairs if pair[0][column] == baseline and pair[1] in cells]
    gains = zip(*(np.subtract(cells[before], cells[after]) for before, after in pairs))
    clean, robust = (f'{min(points):.2f} to {max(points):.2f}' for points in gains)
    _, typed, typed_clean = claims.TABLE_1[results.ROW[column], changed]
    assert typed.split(',')[0] == robust and typed_clean in (clean, '—')


def table_runs(folder, **baseline):
    """Three seeds: a constant eps is 2 points worse than a linear one when clean, 5 attacked."""
    for seed in range(3):
        run, robust = f'--seed {seed}', 10 + 0.2 * seed
        make_run(folder / f'c_s{seed}', run, [3, *[robust + 5] * 6], **baseline)
        errors = [1.1 - 0.1 * seed, *[robust] * 6]
        make_run(folder / f'l_s{seed}', f'{run} --eps-sched linear', errors)
    return folder


def test_schedules_are_compared_seed_by_seed(tmp_path):
    rows = judged(table_runs(tmp_path / 'runs'))
    names = 'runs', 'evaluated', 'seeds', 'robust', 'points', 'clean', 'clean points'
    shown = 'l', '10000 images', '3', 'inconclusive', '5', 'holds', '2 [1.75, 2.25]'
    assert [tuple(row[name] for name in names) for row in rows.pop(LINEAR)] == [shown]
    assert not rows  # 4.3027 * 0.1 / sqrt(3) = 0.248


def test_the_headline_is_autoattacks_if_all_have_it_and_else_the_worst_case(tmp_path):
    for seed, gain in enumerate((1, 2, 3)):
        before = make_run(tmp_path / f'c{seed}', f'--seed {seed}', [4, *[20] * 5, 22 + gain])
        errors = [2, *[20 - 5 * (i == seed) for i in range(5)], 22]
        after = make_run(tmp_path / f'l{seed}', f'--seed {seed} --eps-sched linear', errors)
        evaluate(before, [4, *[50 + 3 * gain] * 5], **STANDARD)
        evaluate(after, [4, *[50] * 5], **STANDARD)
    names = 'by', 'points', 'mean of five'  # 4.303 / sqrt(3) = 2.484
    (row,) = judged(tmp_path)[LINEAR]
    assert [row[name] for name in names] == ['AutoAttack', '6 [-1.45, 13.5]', '1']
    (after / STANDARD['file']).unlink()
    (row,) = judged(tmp_path)[LINEAR]
    assert [row[name] for name in names] == ['worst case', '2 [-0.484, 4.48]', '1']


STATES = [('no', {}, {}), ('yes', {'classes': 1}, {}), ('unknown', {'classes': None}, {})]
STATES += [('no', {'classes': None}, {'predicted_classes': 10})]
STATES += [('yes', {'classes': None}, {'predicted_classes': 1})]
STATES += [('yes', {'classes': 10}, {'members_predicted_classes': [10, 1]})]


@pytest.mark.parametrize('constant, change, counted', STATES)
def test_a_gap_to_a_constant_classifier_proves_nothing(tmp_path, constant, change, counted):
    table_runs(tmp_path / 'runs', **change)
    for seed in range(3):  # counted in another evaluation of the same models
        evaluate(tmp_path / f'runs/c_s{seed}', [3], 'evaluate_n9.json', n=9, **counted)
    (row,) = judged(tmp_path / 'runs')[LINEAR]
    verdicts = {'no': 'holds', 'yes': 'baseline untrained: 3 of 3', 'unknown': 'unknown'}
    assert row['clean'] == verdicts[constant] and row['clean points'] == '2 [1.75, 2.25]'


def test_a_baseline_that_diverged_is_untrained(tmp_path):
    diverge(table_runs(tmp_path / 'runs') / 'c_s1')
    (row,) = judged(tmp_path / 'runs')[LINEAR]
    assert (row['seeds'], row['robust']) == ('3', 'baseline untrained: 1 of 3')
    assert row['points'].startswith('33.3 [')  # 5, 100 - 10.2 and 5


@pytest.mark.parametrize('change', [{'lr': 0.5}, {'n': 500}, {'settings': FEW}, {'data': 'x'}])
def test_runs_that_differ_in_more_are_not_compared(tmp_path, change):
    for seed in range(2):
        make_run(tmp_path / f'{seed}', f'--seed {seed}', data='y')
        make_run(
            tmp_path / f'{seed}l', f'--seed {seed} --eps-sched linear', **{'data': 'y'} | change
        )
    assert judged(tmp_path) == {}


def test_models_chosen_otherwise_are_compared_among_themselves(tmp_path):
    for seed, gain in enumerate((1, 2, 3)):
        flags = f'--n-val 9 --seed {seed}'
        run = make_run(tmp_path / f'c_s{seed}', flags, [10 + gain, *[50] * 6])
        evaluate(run, [20 + 2 * gain, *[60] * 6], 'evaluate_best.json', weights='best')
        run = make_run(tmp_path / f'l_s{seed}', f'{flags} --eps-sched linear', [10, *[50] * 6])
        evaluate(run, [20, *[60] * 6], 'evaluate_best.json', weights='best')
    clean = {row['evaluated']: row['clean points'] for row in judged(tmp_path)[LINEAR]}
    best = '4 [-0.968, 8.97]'
    assert clean == {'10000 images': '2 [-0.484, 4.48]', '10000 images, weights best': best}


def test_an_ensemble_is_compared_with_the_last_model_of_its_schedule(tmp_path):
    for seed, robust in enumerate((7, 7.1)):
        make_run(tmp_path / f'{seed}', f'--seed {seed} {SMALL}', [1, *[10] * 6])
        make_run(tmp_path / f'{seed}half', f'--seed {seed} {SMALL} --epochs 50')
        make_run(tmp_path / f'{seed}p', f'--periodic --seed {seed} {SMALL}', [1, *[robust] * 6])
    (row,) = judged(tmp_path)['An ensemble of periods beats one model']
    assert row['points'].startswith('2.95 [') and row['robust'] == 'holds at a small size'


def test_networks_are_compared_under_one_schedule(tmp_path, monkeypatch):
    for seed, (model, robust) in itertools.product(range(2), (('vgg', 54), ('resnet18', 50))):
        for sched in 'constant', 'linear':
            flags = f'--dataset cifar10 --model {model} --eps-sched {sched} --periodic'
            errors = [25, *[robust + seed * (model == 'vgg')] * 6]
            make_run(tmp_path / f'{model}_{sched}_s{seed}', f'{flags} --seed {seed}', errors)
    monkeypatch.setitem(models.MODELS, 'linear', models.VGG)  # the name of a schedule
    mine = shutil.copytree(tmp_path / 'vgg_constant_s0', tmp_path / 'mine_s0')
    record.save(mine / 'config.json', record.load_config(mine) | {'model': 'linear'})
    tables = judged(tmp_path)
    assert [row['runs'] for row in tables['model vgg to linear']] == ['mine']
    assert {row['runs'] for row in tables[LINEAR]} == {'vgg_linear', 'resnet18_linear'}
    rows = tables['ResNet18 beats VGG']
    assert {row['runs'] for row in rows} == {'resnet18_constant', 'resnet18_linear'}
    shown = [(row['points'][:5], row['seeds'], row['robust']) for row in rows]
    assert shown == [('4.5 [', '2', 'inconclusive')] * 2


def test_ramps_are_told_apart(tmp_path):
    table_runs(tmp_path / 'runs')
    for seed, eps_max in itertools.product(range(3), (0.5, 0.6)):
        flags = f'--seed {seed} --eps-sched linear --eps-max {eps_max}'
        make_run(tmp_path / f'runs/{eps_max}_s{seed}', flags)
    rows = judged(tmp_path / 'runs')[LINEAR]
    verdicts = {(row['runs'], row['seeds'], 'small' in row['robust']) for row in rows}
    assert verdicts == {('0.5', '3', True), ('0.6', '3', True), ('l', '3', False)}


FLAGS = {'warm': '--lr-warmup 0.5', 'constant': '', 'linear': '--eps-sched linear'}
PGD = {('constant', seed): [90, 10, None] for seed in range(3)}
PGD |= {('linear', seed): [40, 10, 20] for seed in range(3)}
PGD |= {('warm', 0): [90, 30, 90], ('warm', 1): [90, 90, 90]}


def rate_runs(folder, pgd, classes=10):
    """Runs of (kind, seed) -> their PGD errors at three learning rates, None for a diverged run."""
    for (kind, seed), errors in pgd.items():
        for lr, error in zip((1e-4, 1e-3, 1e-2), errors):
            run = folder / f'rate_{kind}_lr{lr}_s{seed}'
            flags = f'{FLAGS[kind]} --lr {lr} --seed {seed}'
            make_run(run, flags, [1, error or 90], classes=classes if error == 90 else 10)
            if error is None:
                diverge(run)
    return folder


def test_usable_learning_rates_are_counted_for_each_seed(tmp_path):
    rows = judged(rate_runs(tmp_path / 'runs', PGD))
    (rates,), (warm_up,) = rows[RATES], rows[WARM_UP]
    assert (rates['verdict'], rates['ours']) == ('holds', '2, 2, 2')  # a diverged run errs
    # seed 0: (50 + 20 + 70) / 3, seed 1: (50 + 80 + 70) / 3
    assert warm_up['ours'].startswith('56.7 [') and warm_up['n'] == '2'
    make_run(tmp_path / 'runs/steep', '--eps-sched linear --eps-max 0.9 --lr 1e-3', [1, 90])
    assert judged(tmp_path / 'runs')[RATES] == [rates]  # that is another ramp


@pytest.mark.parametrize('classes, verdict', [(1, 'baseline untrained: 1 of 1'), (None, 'unknown')])
def test_a_baseline_that_never_trains_has_no_usable_rates_to_compare(tmp_path, classes, verdict):
    rate_runs(tmp_path, {('constant', 0): [90, 90], ('linear', 0): [40, 40]}, classes)
    assert judged(tmp_path)[RATES][0]['verdict'] == verdict


AT_FIRST = {  # (2 + 2.1) / 2; 15 (1 + 1.05) / 2; (2 + 2.1) / 2; (1 + 1.05) / 2
    'Larger eps, smaller gradients at first': '2.05',
    'Larger eps, slower first updates': '15.4',
    'Larger eps, nearer to the initial point at first': '2.05',
    'Larger eps, more training loss left in the end': '1.02',
}
MINIMA = {  # (1 + 1.05) / 2 twice; 0.7 - 0.5; 0.8 - (0.4 + 0.3) / 2; (30 + 40) / 2 - 10
    'Larger eps, larger gradients in the end': '1.02',
    'Larger eps, sharper minima': '1.02',
    'Larger eps, minima less connected': '0.2',
    'Perturbations differ most along the top eigenvector': '0.45',
    'Robust error rises most along the top eigenvector': '25',
}
FIRST, SLOWER, *_ = AT_FIRST
_, SHARPER, CONNECTED, SIMILAR, _ = MINIMA


def budget_runs(folder, flags=SMALL, n=50, classes=10):
    """Two seeds: what grows with eps grows by one decade, what falls by two, give or take 5 %."""
    for eps, seed in itertools.product((0, 0.1, 0.2), (0, 1)):
        share = (1 + 0.05 * seed) * eps / 0.2
        run = folder / f'mnist_eps{eps}_s{seed}'
        make_run(run, f'--eps {eps} --seed {seed} {flags}', classes=classes)
        log = record.load(run / 'log.jsonl')
        log[0]['loss'], log[-1]['loss'] = 2.0, 0.02 * 10**share
        record.save(run / 'log.jsonl', log)
        first, gradients = (0.1 + 0.3 * share, 100**-share), (100**-share, 10**share)
        analyse(run, gradients, 10**share, n, 0.4 - 0.1 * seed, 0.8 + 0.1 * seed, first)
    return folder


def test_what_changes_with_eps_is_measured_in_decades(tmp_path):
    runs = budget_runs(tmp_path / 'runs')
    for eps in 0, 0.2:
        connect(runs / f'mnist_eps{eps}_s0', runs / f'mnist_eps{eps}_s1', 0.5 + eps)
    rows = {claim: row for claim, (row,) in judged(runs).items()}
    assert {claim: row['ours'].split(' [')[0] for claim, row in rows.items()} == AT_FIRST | MINIMA
    assert rows[CONNECTED]['n'] == '1' and rows[FIRST]['n'] == '2'
    assert rows[FIRST]['verdict'] == 'holds at a small size, uncorrected'


def test_constant_classifiers_and_saddles_are_no_minima(tmp_path):
    runs = budget_runs(tmp_path / 'runs')
    analyse(make_run(runs / '0.30', f'--eps 0.3 {SMALL}', classes=1), top=1000)
    analyse(make_run(runs / '0.31', f'--eps 0.3 --seed 1 {SMALL}'), top=-1000)
    rows = judged(runs)
    assert rows[SHARPER][0]['ours'].startswith('1.02 [')  # up to eps 0.2
    assert rows[FIRST][0]['ours'] == '0'  # up to eps 0.3


def test_whether_it_is_a_minimum_is_unknown_if_nobody_counted_classes(tmp_path):
    runs = budget_runs(tmp_path / 'runs', classes=None)
    for path in runs.glob('*/dead.json'):  # which counts them
        path.unlink()
    verdicts = {claim: row['verdict'].split()[0] for claim, (row,) in judged(runs).items()}
    unknown = dict.fromkeys([*MINIMA], 'unknown')
    del unknown[CONNECTED]
    assert verdicts == dict.fromkeys(AT_FIRST, 'holds') | unknown


def test_what_was_measured_otherwise_is_not_mixed_in(tmp_path):
    runs = budget_runs(tmp_path / 'runs')
    run, other = runs / 'mnist_eps0.2_s0', runs / 'mnist_eps0.1_s1'
    record.save(other / 'config.json', record.load_config(other) | {'trace': 10})
    record.save(run / 'hessian.json', record.load(run / 'hessian.json') | {'n': 40})
    similarity = record.load(run / 'similarity.json')
    points = similarity['points']
    far = [point | {'a': 3.0, 'cosine': 0.0} for point in points[1::2]]
    record.save(run / 'similarity.json', similarity | {'points': [*points, *far]})
    rows = judged(runs)
    assert rows[SLOWER][0]['ours'] == '0'  # of the first 10 updates, which are alike
    assert (rows[SHARPER][0]['n'], rows[SHARPER][0]['ours']) == ('1', '1.05')  # seed 1
    assert rows[SIMILAR][0]['ours'].startswith('0.45 [')  # at a = 0.1 only
    record.save(run / 'similarity.json', similarity | {'points': [*points[::2], *far]})
    assert SIMILAR not in judged(runs)  # only a = 0 is common to all
    analyse(make_run(runs / 'other', f'--eps 0.2 --n-iter 3 {SMALL}'))
    (row,) = judged(runs)[FIRST]
    assert (row['n'], row['ours']) == ('1', '2.1')  # which run of seed 0 belongs to the others?


@pytest.mark.parametrize('n, size', [(60000, ''), (50, ' at a small size')])
def test_a_hessian_of_few_images_is_not_of_the_papers_size(tmp_path, n, size):
    rows = judged(budget_runs(tmp_path / 'runs', '--trace 20', n))
    assert rows[FIRST][0]['verdict'] == 'holds, uncorrected'
    assert rows[SHARPER][0]['verdict'] == f'holds{size}, uncorrected'


def test_pairs_with_a_run_in_common_are_not_two(tmp_path):
    for eps, seed in itertools.product((0, 0.1, 0.2), range(4)):
        make_run(tmp_path / f'{eps}{seed}', f'--eps {eps} --seed {seed} {SMALL}')
    for eps, (first, barrier) in itertools.product((0, 0.2), enumerate((1, 9, 2))):
        ends = tmp_path / f'{eps}{first}', tmp_path / f'{eps}{first + 1}'
        connect(*ends, barrier * (1 + 5 * eps))
    (row,) = judged(tmp_path)[CONNECTED]  # 0-1: 1, 2-3: 2
    assert row['n'] == '2' and row['ours'].startswith('1.5 [')


def test_a_dead_layer_of_narrow_models_is_counted_at_each_eps(tmp_path):
    for width, eps, seed in itertools.product((1, 4), (0, 0.3), range(3)):
        flags = f'--width {width} --eps {eps} --seed {seed} {SMALL}'
        run = analyse(make_run(tmp_path / f'{width}{eps}{seed}', flags))
        dead = record.load(run / 'dead.json')
        dead['layers'][0]['all'] = (width, eps) == (1, 0.3)
        record.save(run / 'dead.json', dead)
    (row,) = judged(tmp_path)['A layer dies in the narrowest models, not in the widest']
    assert (row['verdict'], row['ours']) == ('holds at a small size', '1, 1, 1')


CASES = [{'share': 0.1, 'bound': bound} for bound in (0.2, 0.5)]
THEORY = {'case': 'x', 'draws': 9, 'proposition_1': 1.0, 'theorem_2': [{'points': CASES}]}
THEORY |= {'theorem_1': {'largest_violation': 0.0, 'smallest_improvement': 1e-9}}
CURVES = dict.fromkeys(('0', '0.6', '1.2'), [1, 0, 1])
THEORY |= {'figure_1': {'theta': [-1, 0, 1], 'curves': CURVES}}
WORSE = [
    ('proposition_1', 0.999),
    ('theorem_1', {'largest_violation': 1e-12, 'smallest_improvement': 1e-9}),
    ('theorem_1', {'largest_violation': 0.0, 'smallest_improvement': 0.0}),
    ('theorem_2', [{'points': [*CASES, {'share': 0.6, 'bound': 0.5}]}]),
]


@pytest.mark.parametrize('key, worse', WORSE)
def test_what_is_proved_holds_unless_a_case_contradicts(key, worse):
    record.save('evals/theory.json', THEORY)  # alone it makes a report
    assert [row['verdict'] for (row,) in judged().values()] == ['holds'] * 3
    record.save('evals/theory.json', THEORY | {key: worse})
    verdicts = {row['in the paper']: row['verdict'] for (row,) in judged().values()}
    assert verdicts.pop(key.replace('_', ' ').capitalize()) == 'does not hold'
    assert list(verdicts.values()) == ['holds'] * 2


def runs_of_all_figures(folder):
    runs = rate_runs(budget_runs(folder), PGD)
    connect(runs / 'mnist_eps0.1_s0', runs / 'mnist_eps0.1_s1', 1)
    analyse(make_run(runs / 'mnist_w4_s0', f'--eps 0.2 --width 4 {SMALL}'))
    for seed in range(3):
        make_run(runs / f'one{seed}', f'--seed {seed} --n-train 9')
        make_run(runs / f'three{seed}', f'--seed {seed} --n-train 9 --periodic')
    diverge(runs / 'three2')
    return runs


def test_every_figure_is_drawn_in_spite_of_the_users_matplotlibrc(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, 'text.usetex', True)
    monkeypatch.setitem(figures.STYLE, 'savefig.dpi', 30)
    record.save('evals/theory.json', THEORY)
    report.main([str(runs_of_all_figures(tmp_path / 'runs')), '--out', 'out'])
    names = {f'{name}_mnist.png' for name in 'fig8 fig3 fig4 fig11 fig12 c24 c25'.split()}
    names |= {'periods.png', 'fig5_rate.png', 'curves_mnist_lenet.png', 'fig1.png'}
    assert {path.name for path in pathlib.Path('out').glob('*.png')} == names
    page = pathlib.Path('out/README.md').read_text()
    assert all(f'({name})' in page for name in names)


def test_lines_are_named_and_of_all_seeds(tmp_path):
    found = results.collect([runs_of_all_figures(tmp_path / 'runs')])
    drawn = {name: figure for name, _, figure in figures.figures(found, None)}
    for name, lines in ('fig4', ('random', 'top eigenvector')), ('c25', ('curve', 'straight line')):
        texts = {text.get_text() for text in drawn[f'{name}_mnist'].legends[0].get_texts()}
        n = {'fig4': 2, 'c25': 1}[name]
        assert {f'eps 0.1, {line}, n = {n}' for line in lines} <= texts
    top = drawn['periods'].axes[0]
    bands, curves = len(top.collections), [line.get_label() for line in top.lines]
    assert top.get_title() == 'one0, n = 3' and bands == 2  # of one run; one of three diverged
    assert curves.count('one run, test images') == curves.count('periods, test images') == 1


def test_figures_of_one_name_do_not_replace_each_other():
    twins = [('fig3', shows, Figure()) for shows in ('one', 'other')]
    with mock.patch.object(figures, 'figures', return_value=twins):
        drawn = figures.draw(None, None)
    assert [(file, shows) for file, (shows, _) in drawn.items()] == [
        ('fig3.png', 'one'),
        ('fig3_2.png', 'other'),
    ]


def test_runs_that_are_only_trained_have_no_claims(tmp_path):
    runs = [make_run(tmp_path / f'{eps}', f'--eps {eps} --width 1', [1]) for eps in (0, 0.1)]
    assert judged(*runs) == {}


def plotted(table, ylabel, yscale='linear'):
    """The axes, and both ends of the band if there is one, of the columns of a table."""
    ax = Figure().subplots()
    ax.set(ylabel=ylabel, yscale=yscale)
    figures.plot(ax, pd.DataFrame(table), 'label', color='C0')
    bands = [tuple(band.get_datalim(ax.transData).intervaly) for band in ax.collections]
    return ax, bands


def test_three_seeds_are_a_mean_in_a_band_and_two_are_two_curves():
    seeds = {0: [1.0, 1.0], 1: [1.0, 10.0], 2: [1.0, 100.0]}
    ax, bands = plotted(seeds, 'y', 'log')
    assert ax.lines[0].get_ydata() == pytest.approx([1, 10])  # the geometric mean
    assert bands == [pytest.approx((1, 100))]  # a decade to either side
    ax, bands = plotted({seed: seeds[seed] for seed in (0, 1)}, 'y', 'log')
    assert np.ravel([line.get_ydata() for line in ax.lines]) == pytest.approx([1, 1, 1, 10])
    assert not bands


ENDS = {'robust error': (0, 1), 'dead in conv1': (0, 1), 'cosine': (-0.22, 1)}


@pytest.mark.parametrize('ylabel, ends', [*ENDS.items(), (figures.LOSS, (-0.22, 1.22))])
def test_bands_of_errors_and_shares_end_at_0_and_1(ylabel, ends):
    _, bands = plotted({0: [0.0, 1.0], 1: [0.0, 1.0], 2: [0.9, 0.1]}, ylabel)
    assert bands == [pytest.approx(ends, abs=0.01)]  # 0.3 - 0.52, 0.7 + 0.52


def test_what_was_not_measured_has_no_dot_but_0_has_one(tmp_path):
    for width, eps, share in (1, 0, 0.0), (4, 0, 0.5), (4, 0.3, 0.0):
        run = analyse(make_run(tmp_path / f'{width}{eps}', f'--width {width} --eps {eps} {SMALL}'))
        dead = record.load(run / 'dead.json')
        dead['layers'][0]['share'] = share
        record.save(run / 'dead.json', dead)
    (ax,) = figures.dead_units(results.collect([tmp_path]).runs).axes
    assert [list(line.get_xydata().ravel()) for line in ax.lines] == [[1, 0, 4, 0.5], [4, 0]]
    assert all(line.get_marker() == 'o' for line in ax.lines)

"""The claims of the paper: what was measured of each, its interval over seeds, and a verdict."""

import pathlib

import numpy as np
import pandas as pd
from scipy import stats

from paper.results import (
    CONDITIONS,
    FIVE,
    FOLLOW,
    UNKNOWN,
    alike,
    comparable,
    first_and_last,
    how_evaluated,
)

RULE = """A claim is that a number is above 0: points of error less, or decades. Seeds are paired.
An interval [low, high] is Student's, of 95 %, over training seeds; all seeds are tested on the same
images. A claim *holds* if its interval is above 0, *does not hold* if it is below, and is
*inconclusive* otherwise, also if all values are equal. A count has no interval: all seeds of at
least 3 must agree. *Uncorrected* is a verdict that does not stand after Holm's correction for the
number of intervals in its table. *Baseline untrained*: what the claim compares with is a constant
classifier or diverged; *unknown*: nobody looked. A run that diverged counts as wrong on every
image. A larger eps or width is the largest one *compared* with the smallest. Where two runs of a
seed differ in the attack of training alone, neither is compared. A dash: not measured.

"""
TEXT = pathlib.Path(__file__).with_name('claims.txt').read_text()
CLAIMS = [[cell.strip() for cell in line.split('|')] for line in TEXT.splitlines()[1:]]
OF_MINIMA = 'last', 'sharper', 'barrier', 'similar', 'steeper'  # numbers of trained models
BASELINES = {'eps_sched': 'constant', 'periodic': 'no', 'model': 'vgg'}
TABLE_1 = {  # a change of the baseline: the claim, the paper's gains by the five attacks, and clean
    ('eps_sched', 'linear'): ('A linear eps beats a constant one', '0.37 to 1.86', '0.07 to 6.45'),
    ('eps_sched', 'cosine'): ('A cosine eps beats a constant one', '0.18 to 1.84', '0.19 to 4.42'),
    ('periodic', 'yes'): (
        'An ensemble of periods beats one model',
        '2.07 to 5.69, CIFAR10',
        UNKNOWN,
    ),
    ('model', 'resnet18'): ('ResNet18 beats VGG', '1.84 to 5.46', UNKNOWN),
}
RATES = 'A warm-up of eps makes more learning rates usable: how many more', 'Figure 5'
WARM_UP = 'A warm-up of lr does not replace that of eps: points of PGD error', 'C.2.3'


def make(results, theory):
    """{heading: table} of all claims on which there are numbers."""
    on_runs = [*on_rates(results.runs, results.settings), *on_numbers(results)]
    tables = {
        'Claims of Table 1': pd.DataFrame(on_table_1(results)),
        'Claims on learning rates and the landscape': pd.DataFrame(on_runs),
    }
    corrected = {}
    for heading, table in tables.items():
        if len(table):
            n_verdicts = correct_for_number(table)
            corrected[f'{heading} ({n_verdicts} intervals)'] = table
    return corrected | {'Claims of Section 3': pd.DataFrame(on_theory(theory) if theory else [])}


def judge(values, full, baselines=(), count=False):
    """The verdict of the RULE on the claim that `values` are above 0, the values as text, and p of
    the t-test, nan without one. `baselines` say for each whether it is a constant classifier."""
    n, untrained = len(values), list(baselines).count('yes')
    if count:
        text, p = ', '.join(f'{value:g}' for value in values), np.nan
        low, high = (min(values), max(values) - 1) if n >= 3 else (-np.inf, np.inf)
    else:
        mean, low, high, p = interval(values)
        text = f'{mean:.3g}' + (f' [{low:.3g}, {high:.3g}]' if low < high < np.inf else '')
    verdict = 'holds' if low > 0 else 'does not hold' if high < 0 else 'inconclusive'
    if untrained:
        return f'baseline untrained: {untrained} of {n}', text, np.nan
    if 'unknown' in list(baselines):
        return 'unknown', text, np.nan
    return verdict if full else f'{verdict} at a small size', text, p


def interval(values):
    """The mean, both ends of Student's interval of 95 %, and p of the test that the mean is 0. One
    value, or equal ones, prove nothing: their interval is infinite."""
    n, mean = len(values), np.round(np.mean(values), 9) + 0.0  # 0 where they cancel
    if n < 2 or np.allclose(values, mean):
        return mean, -np.inf, np.inf, np.nan
    deviation = stats.sem(values)
    low, high = stats.t.interval(0.95, n - 1, mean, deviation)
    return mean, low, high, 2 * stats.t.sf(abs(mean) / deviation, n - 1)


def correct_for_number(table):
    """Marks the verdicts of a table of claims that do not stand after Holm's correction for all of
    its p values, which it takes out of the table. Returns their number."""
    columns = [name for name in table if name.startswith('p ')]
    p = table[columns].to_numpy()
    stands = holm(p.ravel()).reshape(p.shape)
    for column, name in enumerate(columns):
        verdict = name.removeprefix('p ')
        decided = table[verdict].str.match('holds|does not hold') & ~np.isnan(p[:, column])
        table.loc[decided & ~stands[:, column], verdict] += ', uncorrected'
    for name in columns:
        del table[name]
    return int((~np.isnan(p)).sum())


def holm(p):
    """Which of the p values, (n,), are significant at 5 % after Holm's correction; nan are none."""
    stands = np.zeros(len(p), bool)
    order = np.argsort(p)[: np.sum(~np.isnan(p))]  # nan come last
    for i, smallest in enumerate(order):
        if p[smallest] > 0.05 / (len(order) - i):
            break
        stands[smallest] = True
    return stands


def comparisons(results):
    """Runs that differ in one setting of BASELINES from one of its value there: the setting, and a
    frame with a row for each seed, in which ' before' ends the columns of the baseline."""
    frame = results.evaluations
    frame = frame.assign(five=frame[FIVE].mean(axis=1, skipna=False)).dropna(subset='five')
    conditions = [*results.settings, *CONDITIONS]
    for setting, baseline in BASELINES.items():
        changed = setting, *FOLLOW[setting]
        for group in alike(frame, conditions, changed):
            is_before = group[setting] == baseline
            before, others = group[is_before], group[~is_before]
            for after in alike(others, changed):
                pairs = after.merge(before, on='seed', suffixes=('', ' before'))
                if len(pairs):
                    yield setting, pairs


def points_of(pairs, error):
    """What each run of a comparison gains over its baseline, in points of an error, (n,)."""
    return pairs[f'{error} before'] - pairs[error]


def headline(pairs):
    """The error by which runs are judged: AutoAttack's, or where it was not run the worst case."""
    return 'AutoAttack' if points_of(pairs, 'AutoAttack').notna().all() else 'worst case'


def on_table_1(results):
    """The verdicts on Table 1: what a change of one setting gains, in points of error."""
    rows = [gain(setting, pairs) for setting, pairs in comparisons(results)]
    return sorted(rows, key=lambda row: row['claim'])


def gain(setting, pairs):
    """A row of that table, on runs and their baselines of all seeds."""
    after, error = pairs[setting].iloc[0], headline(pairs)
    other = f'{setting} {BASELINES[setting]} to {after}', UNKNOWN, UNKNOWN
    claim, paper, paper_clean = TABLE_1.get((setting, after), other)
    full = (pairs['full'] & pairs['full before']).all()
    constant = pairs['constant before']
    verdict, robust, p = judge(points_of(pairs, error), full, constant)
    clean_verdict, clean, p_clean = judge(points_of(pairs, 'clean'), full, constant)
    return {
        'claim': claim,
        'runs': pairs['name'].iloc[0],
        'evaluated': how_evaluated(pairs.iloc[0]),
        'seeds': len(pairs),
        'robust': verdict,
        'points': robust,
        'by': error,
        'mean of five': judge(points_of(pairs, 'five'), full)[1],
        'of the paper': paper,
        'clean': clean_verdict,
        'clean points': clean,
        'of the paper, clean': paper_clean,
        'p robust': p,
        'p clean': p_clean,
    }


def on_numbers(results):
    """The verdicts on CLAIMS, under a constant eps: on a number at the largest value of a setting
    less that at the smallest, without a setting on that of each run."""
    runs = results.runs[results.runs['eps_sched'] == 'constant']
    for number, sign, setting, source, where, claim in CLAIMS:
        varied = setting or 'eps'
        for group in alike(runs, results.settings, (varied, *FOLLOW[varied])):
            if group[varied].nunique() < (3 if varied == 'eps' else 2):  # two make no trend
                continue
            group = comparable(group, varied)
            group[number] = [numbers(run).get(number) for run in group.to_dict('records')]
            table = group.astype({number: float}).pivot_table(number, 'seed', varied)
            if not setting:
                values, compared = table.dropna().mean(axis=1), f'mean of {table.shape[1]} eps'
            elif table.shape[1] > 1:
                values = int(sign) * (table.iloc[:, -1] - table.iloc[:, 0]).dropna() + 0.0
                compared = f'{varied} {table.columns[-1]:g}, {table.columns[0]:g}'
            else:
                continue
            if len(values):
                full, count = of_full_size(group, source), setting == 'width'
                unknown = number in OF_MINIMA and 'unknown' in set(group['constant'])
                yield finding(
                    (claim, where), compared, values, group, full, count, ['unknown'] * unknown
                )


def of_full_size(group, source):
    """Whether runs are of the paper's size, and what was measured on them too."""
    results = [result for result in group[source] if result] if source != 'updates' else []
    return group['of the paper'].all() and all(result['n'] >= 10000 for result in results)


def numbers(run):
    """What claims compare of a run, name -> number. A constant classifier is at no minimum."""
    found = {}
    trained = run['constant'] != 'yes'
    if run['updates']:
        first, last = first_and_last(run)
        found['first'] = decades(first['grad_norm'][: max(1, len(first) // 10)].mean())
        found['slower'] = 100 * first['robust_error'].mean()
        found['distance'] = decades(first['distance'].iloc[-1])
        found['loss left'] = decades(run['log'][-1]['loss'] / run['log'][0]['loss'])
        if trained:
            found['last'] = decades(last['grad_norm'].mean())
    if run['hessian'] and run['hessian']['eigen']['converged'][0] and trained:
        scale = np.mean(run['hessian']['random_losses'])
        found['sharper'] = decades(run['hessian']['eigen']['values'][0] / scale)
    if run['similarity'] and trained:
        points = pd.DataFrame(run['similarity']['points'])
        points['moved'] = points['a'] > 0
        means = points.groupby(['moved', 'direction'])[['cosine', 'robust_error']].mean()
        cosine, error = means['cosine'].unstack(), 100 * means['robust_error'].unstack()
        found['similar'] = cosine.loc[True, 'random'] - cosine.loc[True, 'eigenvector']
        rise = error.loc[True] - error.loc[False]
        found['steeper'] = rise['eigenvector'] - rise['random']
    if run['connect'] and trained:
        found['barrier'] = run['connect']['barriers'][run['connect']['curve']]
    if run['dead'] and run['eps'] > 0:
        found['dead layer'] = float(any(layer['all'] for layer in run['dead']['layers']))
    return found


def decades(value):
    """log10, or nan for values that are not above 0."""
    return np.log10(value) if value > 0 else np.nan


def on_rates(runs, settings):
    """The verdicts on Figure 5 and C.2.3, at the learning rates that both schedules have."""
    for group in alike(runs, settings, ('lr', *FOLLOW['lr'])):
        group = comparable(group, 'lr', *FOLLOW['lr'])
        group['error'] = [run and run['error'] for run in group['pgd']]
        constant = group[group['eps_sched'] == 'constant']
        growing = group[(group['eps_sched'] != 'constant') & (group['lr_warmup'] == 0)]
        for lr_warmup, baseline in constant.groupby('lr_warmup'):
            for _, ours in growing.groupby(['eps_sched', 'eps_min', 'eps_max']):
                before, after = (
                    frame.astype({'error': float}).pivot_table('error', 'seed', 'lr')
                    for frame in (baseline, ours)
                )
                before, after = before.align(after, join='inner')
                both = (before.notna() & after.notna()).all(axis=1)  # seeds with all rates
                before, after = before[both], after[both]
                if before.empty or before.shape[1] < 2:
                    continue
                states = set(baseline['constant'])
                stuck = 'yes' if states == {'yes'} else 'no' if 'no' in states else 'unknown'
                states = [stuck] * len(before)
                full = of_full_size(pd.concat([baseline, ours]), 'pgd')
                compared = f'{before.shape[1]} rates'
                if lr_warmup:
                    points = 100 * (before - after).mean(axis=1)
                    yield finding(WARM_UP, compared, points, ours, full, baselines=states)
                else:  # a rate is usable if fewer than half of the images are misclassified
                    more = (after < 0.5).sum(axis=1) - (before < 0.5).sum(axis=1)
                    yield finding(RATES, compared, more, ours, full, count=True, baselines=states)


def finding(claim, compared, values, group, full, count=False, baselines=()):
    """A verdict as a row of the second table, on a `group` of runs, a value for each seed."""
    verdict, text, p = judge(values, full, baselines, count)
    return {
        'claim': claim[0],
        'in the paper': claim[1],
        'compared': compared,
        'verdict': verdict,
        'ours': text,
        'n': len(values),
        'runs': common_name(group),
        'p verdict': p,
    }


def common_name(group):
    """The parts that the names of all runs of a group have in common."""
    names = [name.split('_') for name in group['name'].unique()]
    common = '_'.join(part for part in names[0] if all(part in name for name in names))
    return common or '_'.join(group[['dataset', 'model']].iloc[0])


def on_theory(theory):
    """The verdicts on Section 3, which must hold in all cases."""
    share, gains = theory['proposition_1'], theory['theorem_1']
    points = [point for case in theory['theorem_2'] for point in case['points']]
    most = max(point['share'] / point['bound'] for point in points)
    best = gains['largest_violation']
    optimal = best <= 0 < gains['smallest_improvement']
    models, case = f'{theory["draws"]} models', theory['case']
    for claim, where, holds, ours in (
        (
            'A linear model is robust up to one eps, and to no larger',
            'Proposition 1',
            share == 1,
            f'so for {share:.1%} of {models}, {case}',
        ),
        (
            'From eps = max abs(x) on, 0 is the best multiple of linear models',
            'Theorem 1',
            optimal,
            f'the best multiple of {models}, {case}, gains {best:.2g}',
        ),
        (
            'Large gradients are rarer than their bound',
            'Theorem 2',
            most < 1,
            f'at most {most:.0%} of it in {len(points)} cases of logistic regression',
        ),
    ):
        verdict = 'holds' if holds else 'does not hold'
        yield {'claim': claim, 'in the paper': where, 'verdict': verdict, 'ours': ours}

"""The claims of the paper: what was measured, its interval over seeds, and a verdict.

A Finding is on one claim in one experiment, at the paper's size (full) or not.
"""

import collections
import pathlib

import numpy as np
import pandas as pd
from scipy import stats

import data

RULE = """Seeds are paired. With n >= 2 of them a claim holds if the 95 % t-interval of its value,
in brackets, is above 0, does not hold if it is below, and is inconclusive if it contains 0 or if
all values are equal. A count has no interval: all seeds of at least 3 must agree. *Baseline
untrained*: what the claim compares with is a constant classifier. A dash: not measured. Robust
error: the mean of the five attacks."""

# the paper's settings of each attack that are not those of training
APGD = {'n_iter': 100, 'n_restarts': 5}
ATTACKS = {'pgd': {}, 'pgd100': {'n_iter': 100}, 'apgd100_ce': APGD, 'apgd100_dlr': APGD}
ATTACKS |= {'square5k': {'n_queries': 5000}}
# a baseline, the setting whose value it is, and those that go along with it
BASELINES = [('constant', 'eps_sched', 'eps_min', 'eps_max'), ('no', 'periodic', 'periods')]
BASELINES += [('vgg', 'model')]
Gain = collections.namedtuple('Gain', 'change other full experiment untrained values')
Finding = collections.namedtuple('Finding', 'claim full experiment verdict ours n')
COLUMNS = ['claim', 'in the paper', 'verdict', 'ours', 'n', 'experiment', 'size']  # of claims.md
ROW = ['dataset', 'model', 'periodic', 'eps_sched']
PAPER = pd.read_csv(pathlib.Path(__file__).with_name('table1.txt'), sep=r'\s+', index_col=ROW)
TITLES = [title for title in PAPER if title != 'clean']

# a claim, with the unit of a value that is above 0 if it holds, and where the paper makes it
CLAIMS = {
    'linear clean': ('A linear eps beats a constant one: points of clean error', 'Table 1'),
    'linear robust': ('A linear eps beats a constant one: points of robust error', 'Table 1'),
    'cosine clean': ('A cosine eps beats a constant one: points of clean error', 'Table 1'),
    'cosine robust': ('A cosine eps beats a constant one: points of robust error', 'Table 1'),
    'yes robust': (
        'An ensemble of periods beats one model: points of robust error',
        'Table 1, CIFAR10',
    ),
    'resnet18 robust': ('ResNet18 beats VGG: points of robust error', 'Table 1'),
    'rates': ('A warm-up of eps makes more learning rates usable: how many more', 'Figure 5'),
    'warm-up': ('A warm-up of lr does not replace that of eps: points of PGD error', 'C.2.3'),
    'first': ('Larger eps, smaller gradients at first: decades', 'Figures 2a, 8'),
    'slower': ('Larger eps, slower first updates: points of robust training error', 'Figure 2b'),
    'nearer': ('Larger eps, nearer to the initial point at first: decades', 'Figure 2c'),
    'last': ('Larger eps, larger gradients in the end: decades', 'Figures 2d, 8'),
    'loss': ('Larger eps, more training loss left in the end: decades', 'Figure 11 (4.2: similar)'),
    'sharper': ('Larger eps, sharper minima: decades of the top eigenvalue', 'Figure 3'),
    'similar': ('Perturbations differ most along the top eigenvector: cosine', 'Figure 4'),
    'steeper': ('Robust error rises most along the top eigenvector: points', 'Section 4.2'),
    'connected': ('Adversarial minima are less connected: barrier of L_eps', 'C.2.5'),
    'dead': ('A layer dies in the narrowest models, not in the widest: 1 or 0', 'C.2.4'),
    'proposition 1': ('A linear model is robust up to one eps, and to no larger', 'Section 3.1'),
    'theorem 1': ('From eps = max abs(x) on, 0 is the best multiple of linear models', 'Theorem 1'),
    'theorem 2': ('Large gradients are rarer than their bound', 'Theorem 2'),
}


def finding(claim, full, experiment, values, unit='seed', untrained=0, count=False):
    """A Finding on a claim, from independent `values`, one for each `unit`; the baseline of
    `untrained` of them is a constant classifier. A `count` has no interval."""
    n, holds, fails = len(values), False, False
    if count:
        ours = ', '.join(f'{value:g}' for value in values)
        if n >= 3:
            holds, fails = min(values) > 0, max(values) <= 0
    else:
        mean = np.round(np.mean(values), 9) + 0.0  # 0 where they cancel but for rounding
        ours = f'{mean:.3g}'
        if n >= 2 and not np.allclose(values, mean):  # equal ones: an interval of width 0
            low, high = stats.t.interval(0.95, n - 1, mean, stats.sem(values))
            holds, fails = low > 0, high < 0
            ours += f' ({low:.3g} to {high:.3g})'
    verdict = 'inconclusive'
    if untrained:
        verdict = 'baseline untrained'
        if untrained < n:
            verdict += f': {untrained} of {n}'
    elif holds:
        verdict = 'holds'
    elif fails:
        verdict = 'does not hold'
    n = f'{n} {unit}' if n == 1 else f'{n} {unit}s'
    return Finding(claim, full, experiment, verdict, ours, n)


def gains(frame, settings):
    """What any other value of a setting gains over its baseline, if nothing else differs: Gains,
    whose `values` have a row for each seed and a column for each error, in points; `robust` is the
    mean of the five attacks.

    frame: a row for each evaluation, with `settings`, errors in percent, seed, full, experiment,
    untrained and periodic.
    """
    frame = frame.assign(robust=frame.reindex(columns=TITLES).mean(axis=1, skipna=False))
    frame = frame.dropna(subset='robust')
    errors = [name for name in ('robust', 'worst case', 'AutoAttack', 'clean') if name in frame]
    for baseline, setting, *along in BASELINES:
        same = [name for name in settings if name not in (setting, *along)]
        before, after = frame[frame[setting] == baseline], frame[frame[setting] != baseline]
        pairs = after.merge(before, on=[*same, 'seed'], suffixes=('', ' before'))
        pairs['where'] = [', '.join(notes(row, setting)) for _, row in pairs.iterrows()]
        for name in (*same, *along):  # what would distinguish two experiments of one name
            several = pairs.groupby([setting, 'where'])[name].transform('nunique', dropna=False) > 1
            pairs.loc[several, 'where'] += ', ' + name + ' ' + pairs[name].astype(str)
        for (other, where), rows in pairs.groupby([setting, 'where'], sort=False):
            full = rows['full'].all() and rows['full before'].all()
            untrained = int(rows['untrained before'].sum())
            values = pd.DataFrame({name: rows[f'{name} before'] - rows[name] for name in errors})
            yield Gain(f'{setting} {baseline} to {other}', other, full, where, untrained, values)


def notes(pair, setting):
    """The experiment of a pair that differs in a `setting`, and what else to know of it."""
    yield pair['experiment']
    if not (pair['full'] and pair['full before']):
        yield f'eps {pair["eps"]}'
    if setting != 'eps_sched':
        yield f'{pair["eps_sched"]} eps'
    if setting != 'periodic' and pair['periodic'] == 'yes':
        yield 'periodic'


def of_table(gains):
    """Findings on Table 1, from Gains."""
    for gain in gains:
        for error, values in gain.values.items():
            claim = f'{gain.other} {error}'
            if claim in CLAIMS:
                yield finding(claim, gain.full, gain.experiment, values, untrained=gain.untrained)


def measures(run):
    """The measurements of a run that studies compare, name -> value."""
    config = run.config
    schedule = f'{config["eps_sched"]} eps'
    if config['lr_warmup']:
        warm_up = f'lr warm-up {config["lr_warmup"]:g}'
        schedule = warm_up if schedule == 'constant eps' else f'{warm_up}, {schedule}'
    found = {'untrained': float(run.untrained), 'schedule': schedule}
    if run.trace:
        n, rows = run.trace['n'], pd.DataFrame(run.trace['rows'])
        first, tenth = rows[:n], max(1, n // 10)
        found['gradient, first tenth'] = decades(first['grad_norm'][:tenth].mean())
        found['gradient, last'] = decades(rows['grad_norm'][-n:].mean())
        found['error at first'] = 100 * first['robust_error'].mean()
        found['distance'] = decades(first['distance'].iloc[-1])
    if run.log:
        found['loss left'] = decades(run.log[-1]['loss'] / run.log[0]['loss'])
    if run.hessian:
        eigen, scale = run.hessian['eigen'], np.mean(run.hessian['random_losses'])
        top = eigen['values'][0] if eigen['converged'][0] else np.nan
        found['top eigenvalue'] = decades(top / scale)  # nan if negative: at a saddle
    if run.similarity:
        points = pd.DataFrame(run.similarity['points'])
        away, here = (points.query(a).groupby('direction').mean() for a in ('a > 0', 'a == 0'))
        found |= away['cosine'].add_prefix('cosine, ').to_dict()
        found |= (100 * (away - here)['robust_error']).add_prefix('rise, ').to_dict()
    if run.connect:
        found['barrier'] = run.connect['barriers'][run.connect['curve']]
    if run.dead:
        found['layers dead'] = sum(layer['all'] for layer in run.dead['layers'])
        found |= {f'dead {layer["layer"]}': layer['share'] for layer in run.dead['layers']}
    found['pgd'] = 1.0 if run.diverged else np.nan  # a diverged run is always wrong
    if run.pgd:
        found['pgd'] = run.pgd['error']
    return found


def decades(value):
    """log10, or nan for values that are not above 0."""
    return np.log10(value) if value > 0 else np.nan


def experiment(config, full):
    """Dataset and model of a run as a string, with the width if it is not at the paper's size."""
    text = f'{config["dataset"]} {config["model"]}'
    return text if full else f'{text} of width {config["width"]}'


def by_seed(frame, column, value):
    """The numbers `value` as a frame: a row per seed, a column per value of `column` that all seeds
    have. If they share fewer than two, only the seeds with the most are taken."""
    rows = frame.reindex(columns=['seed', column, value]).dropna()
    table = rows.pivot(index='seed', columns=column, values=value)
    n = table.count(axis=1)
    common, most = table.dropna(axis=1), table[n == n.max()].dropna(axis=1)
    return common if common.shape[1] > 1 else most


def of_budget(study):
    """Findings on Section 4, under a constant eps. A constant classifier is at no minimum."""
    frame = study.frame[study.frame['eps_sched'] == 'constant']
    trained = frame[frame['untrained'] == 0]
    for claim, analysis, rows, name, sign in (
        ('first', 'trace', frame, 'gradient, first tenth', -1),
        ('slower', 'trace', frame, 'error at first', 1),
        ('nearer', 'trace', frame, 'distance', -1),
        ('last', 'trace', trained, 'gradient, last', 1),
        ('loss', 'trace', frame, 'loss left', 1),
        ('sharper', 'hessian', trained, 'top eigenvalue', 1),
        ('connected', 'connect', trained, 'barrier', 1),
    ):
        table = by_seed(rows, 'eps', name)
        if table.shape[1] > 1:
            largest = data.show_eps(table.columns[-1], study.dataset)
            rise = sign * (table.iloc[:, -1] - table.iloc[:, 0])
            unit = 'pair' if claim == 'connected' else 'seed'
            where = f'{study.experiment} to eps {largest}'
            yield finding(claim, study.full[analysis], where, rise, unit)
    for claim, name, sign in ('similar', 'cosine', -1), ('steeper', 'rise', 1):
        along, random = (
            trained.get(f'{name}, {direction}', np.nan) for direction in ('eigenvector', 'random')
        )
        table = by_seed(trained.assign(more=sign * (along - random)), 'eps', 'more')
        if table.size:
            yield finding(claim, study.full['similarity'], study.experiment, table.mean(axis=1))


def of_rate(study):
    """Findings on Figure 5 and C.2.3, at the seeds and learning rates that both schedules have."""
    frame, full = study.frame, study.full['pgd']
    eps = data.show_eps(frame['eps'].iloc[0], study.dataset)
    constant = frame[frame['eps_sched'] == 'constant']
    for lr_warmup, rows in constant.groupby('lr_warmup'):
        for sched in 'linear', 'cosine':
            growing = frame[(frame['eps_sched'] == sched) & (frame['lr_warmup'] == 0)]
            a, b = by_seed(rows, 'lr', 'pgd').align(by_seed(growing, 'lr', 'pgd'), join='inner')
            if not a.size:
                continue
            where = f'{study.experiment} ({sched} eps {eps}, rates: {a.shape[1]})'
            stuck = len(a) if rows['untrained'].all() else 0
            if lr_warmup:
                more = 100 * (a - b).mean(axis=1)
                yield finding('warm-up', full, where, more, untrained=stuck)
            else:  # a rate is usable if fewer than half of the images are misclassified
                more = (b < 0.5).sum(axis=1) - (a < 0.5).sum(axis=1)
                yield finding('rates', full, where, more, untrained=stuck, count=True)


def of_width(study):
    """Findings on C.2.4, at the largest eps."""
    frame = study.frame[study.frame['eps'] == study.frame['eps'].max()]
    dead = (by_seed(frame, 'width', 'layers dead') > 0).astype(int)
    if dead.shape[1] > 1:
        more = dead.iloc[:, 0] - dead.iloc[:, -1]
        yield finding('dead', study.full['dead'], study.experiment, more, count=True)


def of_theory(theory):
    """Findings on Section 3, which must hold in all cases."""
    if theory:
        gain, share = theory['theorem_1'], theory['proposition_1']
        points = [point for case in theory['theorem_2'] for point in case['points']]
        most = max(point['share'] / point['bound'] for point in points)
        case, models, cases = theory['case'], f'{theory["draws"]} models', f'{len(points)} cases'
        best = gain['largest_violation']
        optimal = best <= 0 < gain['smallest_improvement']
        for claim, experiment, holds, ours, n in (
            ('proposition 1', case, share == 1, f'so for {share:.1%}', models),
            ('theorem 1', case, optimal, f'the best multiple gains {best:.2g}', models),
            ('theorem 2', 'logistic regression', most < 1, f'at most {most:.0%} of it', cases),
        ):
            verdict = 'holds' if holds else 'does not hold'
            yield Finding(claim, True, experiment, verdict, ours, n)


def table(findings):
    """The table of claims.md: a row for each finding, or one for a claim without any."""
    paper = PAPER.map(lambda cell: float(cell.split('(')[0])).reset_index()
    paper = paper.assign(experiment='', seed=0, full=True, untrained=0)
    paper[['eps_min', 'eps_max', 'periods']] = ''
    papers = pd.DataFrame(of_table(gains(paper, ROW)), columns=Finding._fields)
    theirs = papers['ours'].astype(float).groupby(papers['claim']).agg(['min', 'max'])
    rows = []
    for claim, (sentence, where) in CLAIMS.items():
        if claim in theirs.index:
            where = '{}: {} to {}'.format(where, *theirs.loc[claim])
        own = [found for found in findings if found.claim == claim]
        for _, full, experiment, verdict, ours, n in sorted(own, key=lambda found: not found.full):
            size = "the paper's" if full else 'smaller'
            rows.append((sentence, where, verdict, ours, n, experiment, size))
        if not own:
            rows.append((sentence, where, *[None] * 5))
    return pd.DataFrame(rows, columns=COLUMNS)

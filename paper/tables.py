"""The tables of evaluated runs: Table 1 beside the paper's numbers, other runs, ensembles."""

import pathlib

import numpy as np
import pandas as pd

import attack
import data
import train
from lib import record
from paper import claims

FREE = {'seed', 'trace', 'n_eval', 'provenance'}  # logging, and the luck of the draw
NOTES = """Errors are percent; 8.58(89) is 8.58 +- 0.89 over seeds; a dash: not measured.
Overfitting: the robust error on test images less that on training images, by training's PGD, in
points, over those of the last five epochs that were trained at the target budget.

"""
GAINS = """Gains over a baseline: points of error less, with 95 % intervals over paired seeds; bold
is a verdict by the rule of claims.md; robust is the mean of the five attacks"""
NO_ATTACKS = 'clean', 'worst', 'standard'  # columns that are not of one attack
# columns about each run
MORE = 'seed', 'full', 'untrained', 'experiment', 'periodic', 'overfitting', 'minutes', 'gib'


def make(frame, settings, errors, gains):
    """The tables of table1.md, {heading: frame}; `gains` are claims.gains(frame, settings)."""
    full, others, found = frame[frame['full']], frame[~frame['full']], {}
    kinds = {('fp32', 'fp32', '0'): full[:0]}
    kinds |= dict(list(full.groupby(['precision', 'attack precision', 'attack seed'])))
    for (precision, search, seed), runs in kinds.items():
        heading = f"Table 1 at the paper's size, {precision}"
        if (search, seed) != ('fp32', '0'):
            heading += f' (attacks in {search}, seed {seed})'
        found[f"{heading}: ours / the paper's / deviations between"] = table_1(runs, errors)
    for _, runs in others.groupby(['model', 'dataset'], sort=False):
        heading, table = other_runs(runs, settings, errors)
        found[heading] = table
    return found | {GAINS: gained(gains), 'Ensembles': ensembles()}


def table_1(runs, errors):
    """The paper's Table 1, with those of its rows that are among `runs`."""
    groups, rows = dict(list(runs.groupby(claims.ROW))), []
    for row, paper in claims.PAPER.iterrows():
        own = cells(groups.get(row, runs[:0]), errors, paper)
        rows.append(dict(zip(claims.ROW, row)) | own)
    return pd.DataFrame(rows)


def other_runs(runs, settings, errors):
    """`runs` of one model and dataset: a heading with the settings that they share and that are no
    defaults, and a table with a row for each combination of the others."""
    model, dataset = runs.iloc[0][['model', 'dataset']]
    # an attack that was not run does not make a difference in its settings
    same = [k for k in settings if runs[k].nunique(dropna=k.endswith(' by')) < 2]
    defaults = train.config_of(['--dataset', dataset])
    defaults = {name: data.show(name, defaults[name], dataset) for name in defaults}
    defaults |= {'model': model, 'width': ''}  # another model has another default
    defaults |= {'periods': 'one', 'attack precision': 'fp32', 'attack seed': '0'}
    common = []
    for name in same:
        value = ''.join(runs[name].dropna().unique())
        if value != defaults.get(name, '') and not name.endswith(' by'):  # attack.py says these
            common.append(f'{name} {value}')
    groups = runs.groupby(settings, sort=False, dropna=False)
    rows = [dict(own.iloc[0][settings].drop(same)) | cells(own, errors) for _, own in groups]
    heading = f'Other runs of {model} on {dataset}: defaults, but for {", ".join(common)}'
    return heading, pd.DataFrame(rows)


def gained(gains):
    """The Gains as a frame, with the errors that all seeds have."""
    rows = []
    for gain in gains:
        n, row = len(gain.values), {'change': gain.change, 'experiment': gain.experiment}
        for name, values in gain.values.dropna(axis=1).items():
            found = claims.finding(name, gain.full, '', values, untrained=gain.untrained)
            decided = found.verdict in ('holds', 'does not hold')
            row[name] = f'**{found.ours}**' if decided else found.ours
        note = f'{gain.untrained} of {n} baselines untrained' if gain.untrained else ''
        rows.append(row | {'seeds': n, 'note': note})
    return pd.DataFrame(rows)


def evaluated(runs):
    """A frame with a row for each evaluation, and the names of its settings and of its errors."""
    rows, errors = {}, dict.fromkeys(claims.PAPER)
    settings = ['dataset', 'model', 'eps_sched', 'eps_min', 'eps_max', 'periods', 'precision']
    settings = dict.fromkeys([*settings, 'attack precision', 'attack seed'])
    for run in runs:
        for result in run.evaluations:
            typed, found, more = row_of(run, result)
            rows.setdefault(str((typed, more['seed'])), more | typed | found)  # a copy counts once
            settings, errors = settings | typed, errors | found
    frame = pd.DataFrame(rows.values(), columns=[*MORE, *settings, *errors])
    frame = frame.astype(dict.fromkeys(errors, float) | {'full': bool})
    last = 'worst case', 'AutoAttack'
    return frame, list(settings), sorted(errors, key=lambda name: name in last)


def row_of(run, result):
    """The settings of a run and its evaluation as they are typed, the errors in percent, MORE."""
    config, columns = run.config, result['columns']
    attacks = {key: columns[key]['settings'] for key in columns if key not in NO_ATTACKS}
    typed = {name: config[name] for name in config if name not in FREE}
    typed |= {'test images': result['n'], 'attack seed': result['seed']}
    typed['attack precision'] = result.get('precision', 'fp32')
    training = data.pgd_settings(config, config['eps'])
    for key, by in attacks.items():
        typed[f'{attack.title(key)} by'] = 'training' if by == training else by
    typed = {name: data.show(name, typed[name], config['dataset']) for name in typed}
    if periodic(config) == 'no':
        typed['periods'] = 'one'
    names = ['clean', *attacks]
    if claims.ATTACKS.keys() <= attacks.keys():
        names.append('worst')
    if 'standard' in columns:
        names.append('standard')
    errors = {attack.title(key): 100 * columns[key]['error'] for key in names}
    full = of_paper(config) and result['n'] == result['n_test']
    for key in claims.ATTACKS.keys() & attacks:
        full = full and claims.ATTACKS[key].items() <= attacks[key].items()
    # the error on training images is one at the target budget in some epochs alone
    ends = [epoch for epoch in run.log[-5:] if epoch['eps'] == config['eps']]
    ends = pd.DataFrame(ends, columns=['train_robust_error', 'robust_error'], dtype=float).mean()
    more = {
        'seed': config['seed'],
        'full': full,
        'untrained': run.untrained,
        'experiment': claims.experiment(config, full),
        'periodic': periodic(config),
        'overfitting': 100 * (ends['robust_error'] - ends['train_robust_error']),
        'minutes': sum(epoch['seconds'] for epoch in run.log) / 60,
        'gib': max((epoch.get('gib', np.nan) for epoch in run.log), default=np.nan),
    }
    return typed, errors, more


def of_paper(config, varied=frozenset()):
    """Whether a config is, whole, that of a row of Table 1, but for precision and `varied`."""
    dataset, model, sched = config['dataset'], config['model'], config['eps_sched']
    if (dataset, model, periodic(config), sched) not in claims.PAPER.index:
        return False
    flags = ['--dataset', dataset, '--model', model, '--eps-sched', sched]
    if periodic(config) == 'yes':
        flags.append('--periodic')
    if 'eps' in varied:
        flags += ['--eps', repr(config['eps'])]  # which brings its steps along
    paper = train.config_of(flags)
    free = FREE | {'precision'} | (varied & {'lr', 'lr_warmup', 'width'})
    config = paper | config  # what an older one lacks counts as its default
    return all(name in paper and config[name] == paper[name] for name in config.keys() - free)


def periodic(config):
    """Whether a run has several periods, as table1.txt writes it."""
    return 'yes' if len(config['periods']) > 1 else 'no'


def notation(values):
    """Percent as the paper prints them: 8.58(89) is 8.58 +- 0.89 over the runs."""
    mean, deviation = values.mean(), values.std()
    spread = '' if np.isnan(deviation) else f'({round(100 * deviation)})'
    return '—' if np.isnan(mean) else f'{mean:.2f}{spread}'


def beside(values, theirs):
    """A cell of Table 1: ours / the paper's / the difference in standard deviations, of both
    together, or the paper's alone for a single run."""
    if not values.count():
        return f'— / {theirs}'
    paper, spread = theirs.rstrip(')').split('(')
    deviation = np.hypot(np.nan_to_num(values.std()), int(spread) / 100)
    return f'{notation(values)} / {theirs} / {(values.mean() - float(paper)) / deviation:+.1f}'


def cells(own, errors, paper=()):
    """A row of a table that shows the evaluations `own`."""
    row = {n: beside(own[n], paper[n]) if n in paper else notation(own[n]) for n in errors}
    n, untrained = len(own), int(own['untrained'].sum())
    more = {'overfitting': own['overfitting'].mean(), 'minutes': own['minutes'].mean()}
    more['GiB'] = own['gib'].max()
    row |= {'runs': n} | {k: '—' if np.isnan(more[k]) else f'{more[k]:.1f}' for k in more}
    return row | {'note': f'{untrained} of {n} constant classifiers' if untrained else ''}


def ensembles():
    """The evaluated ensembles as a frame."""
    rows = []
    for result in map(record.load, sorted(pathlib.Path('evals').glob('ensemble*/evaluate*.json'))):
        eps = data.show_eps(result['eps'], result['dataset'])
        row = {'members': ' + '.join(result['members']), 'dataset': result['dataset'], 'eps': eps}
        columns = sorted(columns_of(result).items(), key=lambda item: item[0] == 'worst')
        errors = {attack.title(key): f'{100 * column["error"]:.2f}' for key, column in columns}
        rows.append(row | {'test images': result['n']} | errors)
    return pd.DataFrame(rows)


def columns_of(result):
    """The columns of an evaluation; those of a standard one are, if complete, one beside clean."""
    columns = result['columns']
    if result.get('standard'):
        done = attack.STANDARD.keys() <= columns.keys()
        return {'clean': columns['clean']} | ({'standard': columns['worst']} if done else {})
    return columns


def markdown(heading, frame):
    """A frame as a table of Markdown, nothing without rows."""
    if not len(frame):
        return ''
    rows = [frame.columns, ['---'] * len(frame.columns), *frame.fillna('—').values]
    lines = [f'| {" | ".join(map(str, row))} |\n' for row in rows]
    return f'{heading}\n\n{"".join(lines)}\n'

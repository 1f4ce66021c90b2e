"""The tables of errors: Table 1 beside the paper's numbers, controls, other runs, ensembles."""

import numpy as np
import pandas as pd

import data
from paper.claims import judge
from paper.results import CONDITIONS, PAPER, ROW, UNKNOWN, alike, how_evaluated

NOTES = """Errors are percent; 8.58(89) is 8.58 +- 0.89 over seeds; a dash: not measured. *Two
attacks*: the first two of AutoAttack, APGD-CE and APGD-T, one after the other. *Overfitting*: the
robust error on test images less that on training images, by training's PGD, in points, over those
of the last five epochs that were trained at the target budget. Runs are named by their folders, and
by the flags in which they differ from the paper's.

"""
CONTROLS = [  # what restarts, weights, member: what it is, epochs of training, models at test time
    ('none', 'last', 3, 'A: one run, last epoch', 1, 1),
    ('none', 'best', 3, 'B: the same, epoch chosen on held-out images', 1, 1),
    ('none', 'ema', 3, 'C: average of its weights', 1, 1),
    ('none', 'last', 'all', "D: its snapshots at the ends of PAS's periods", 1, 3),
    ('eps lr', 'last', 1, 'F: PAS, first member alone', 1 / 2, 1),
    ('eps lr', 'last', 3, 'L: PAS, last member alone', 1, 1),
    ('eps lr', 'last', 'all', 'G: PAS', 1, 3),
    ('eps lr', 'best', 'all', 'H: PAS, each member chosen on held-out images', 1, 3),
    ('eps lr', 'ema', 'all', 'I: PAS, average of the weights of each period', 1, 3),
    ('lr', 'last', 'all', 'P: only the learning rate restarts', 1, 3),
    ('eps', 'last', 'all', 'Q: only eps restarts', 1, 3),
]


def make(results):
    """{heading: table} of all that was evaluated."""
    frame, errors = results.evaluations, results.errors
    usual = (frame['attack seed'] == 0) & (frame['attack precision'] == 'fp32')
    full, others = frame[frame['full'] & usual], frame[~(frame['full'] & usual)]
    tables = {}
    for first, rows in control_groups(results):
        heading = f'Controls: {first["model"]} on {first["dataset"]}, {first["eps_sched"]} eps'
        tables[heading] = controls(first, rows)
    for precision in sorted({'fp32', *full['precision']}, reverse=True):
        heading = (
            f"Table 1 at the paper's size, {precision}: ours / the paper's / deviations between"
        )
        tables[heading] = table_1(full[full['precision'] == precision], errors)
    for (dataset, model), runs in others.groupby(['dataset', 'model'], sort=False):
        tables[f'Other runs of {model} on {dataset}'] = other_runs(runs, results.settings, errors)
    return tables | {'Ensembles': results.ensembles}


def control_groups(results):
    """What one run, its snapshots or independent runs reach at the same cost as PAS: for each group
    of runs that differ in what restarts the first of them, and {label: (share of the epochs, models
    at test time, evaluations by seed)}."""
    conditions = ['test images', 'attack seed', 'attack precision', 'test data']
    frame = results.evaluations
    frame = frame[(frame['n_val'] > 0) & frame['two attacks'].notna()]
    for group in alike(frame, [*results.settings, *conditions], ['restart']):
        first, rows = group.iloc[0], {}
        for restart, weights, member, label, share, n_models in CONTROLS:
            names = ['restart', 'weights', 'member']
            ours = group[(group[names] == [restart, weights, member]).all(axis=1)]
            rows[label] = share, n_models, ours.set_index('seed')
        rows['N: independent runs of as many epochs'] = 1, 3, independent(results, first)
        rows = {label: row for label, row in rows.items() if len(row[-1])}
        if len(rows) > 1:
            yield first, rows


def controls(first, rows):
    """The table of such a group: errors, and what PAS (G) gains over each by two attacks; and what
    it gains if both choose their epochs (H over B)."""
    errors = {label[0]: evaluations['two attacks'] for label, (*_, evaluations) in rows.items()}
    table = []
    for label, (share, n_models, evaluations) in rows.items():
        row = {
            'what': label,
            'clean': notation(evaluations['clean']),
            'two attacks': notation(evaluations['two attacks']),
            'AutoAttack': notation(evaluations['AutoAttack']),
            'seeds': len(evaluations),
            'epochs': f'{share * first["epochs"]:g}',
            'models': n_models,
        }
        for pas in ['G', 'H'] if label[0] == 'B' else ['G']:
            if pas in errors and pas != label[0]:
                points = (errors[label[0]] - errors[pas]).dropna()
                verdict, text, _ = judge(points, full=True)
                row[f'{pas} gains'] = f'{text}: {verdict}'
        table.append(row)
    return pd.DataFrame(table)


def independent(results, first):
    """The errors of ensembles of independent runs that are as long as the periods of the evaluation
    `first` and else trained like it, by the seed of the longest."""
    free = 'restart', 'periods', 'periodic', 'epochs', 'n_val', 'ema'
    alike_in = [name for name in results.settings if name not in free]
    runs = results.runs[results.runs['periodic'] == 'no']
    runs = runs[(runs[alike_in] == first[alike_in]).all(axis=1)]
    run_of = {str(run['path'] / 'period1.pt'): run for run in runs.to_dict('records')}
    rows = []
    for ensemble in results.ensembles.to_dict('records'):
        members = [run_of.get(member) for member in ensemble['members'].split(' + ')]
        alike_too = 'test images', 'attack seed', 'attack precision'
        same = all(ensemble[name] == first[name] for name in alike_too)
        same = same and ensemble['eps'] == data.show_eps(first['eps'], first['dataset'])
        if same and all(members):
            members.sort(key=lambda run: -run['epochs'])
            if ' '.join(str(run['epochs']) for run in members) == first['periods']:
                rows.append(ensemble | {'seed': members[0]['seed']})
    columns = ['seed', 'clean', 'two attacks', 'AutoAttack']
    return pd.DataFrame(rows, columns=columns).dropna(subset='two attacks').set_index('seed')


def table_1(runs, errors):
    """The rows of the paper's Table 1, each with those of `runs` that are of it."""
    rows = []
    for row, paper in PAPER.iterrows():
        ours = runs[(runs[ROW] == list(row)).all(axis=1)]
        rows.append(dict(zip(ROW, row)) | cells(ours, errors, paper))
    return pd.DataFrame(rows)


def other_runs(runs, settings, errors):
    """A row for each experiment and way to evaluate it."""
    rows = []
    for ours in alike(runs, [*settings, *CONDITIONS]):
        first = ours.iloc[0]
        row = {'runs': first['name'], 'flags': first['differs'], 'evaluated': how_evaluated(first)}
        rows.append(row | cells(ours, errors))
    return pd.DataFrame(rows)


def cells(ours, errors, paper=()):
    """A row on the evaluations `ours`, beside the paper's errors."""
    row = {}
    for name in errors:
        row[name] = beside(ours[name], paper[name]) if name in paper else notation(ours[name])
    row['seeds'] = len(ours)
    for name in 'overfitting', 'minutes', 'gib':
        row[name] = f'{ours[name].mean():.1f}' if ours[name].count() else UNKNOWN
    diverged = int(ours['diverged'].sum())
    constant = int((ours['constant'] == 'yes').sum()) - diverged
    counts = {'diverged': diverged, 'constant classifiers': constant}
    row['note'] = ', '.join(f'{n} of {len(ours)} {what}' for what, n in counts.items() if n)
    return row


def notation(errors):
    """Percent as the paper prints them: 8.58(89) is 8.58 +- 0.89 over the runs."""
    if not errors.count():
        return UNKNOWN
    spread = f'({round(100 * errors.std())})' if errors.count() > 1 else ''
    return f'{errors.mean():.2f}{spread}'


def beside(errors, theirs):
    """A cell of Table 1: ours / the paper's / the difference in standard deviations, of both
    together, or of the paper's alone for a single run."""
    if not errors.count():
        return f'{UNKNOWN} / {theirs}'
    paper, spread = theirs.rstrip(')').split('(')
    deviation = np.hypot(np.nan_to_num(errors.std()), int(spread) / 100)
    return f'{notation(errors)} / {theirs} / {(errors.mean() - float(paper)) / deviation:+.1f}'


def markdown(heading, table):
    """A frame as a table of Markdown, nothing if it has no rows."""
    if not len(table):
        return ''
    cells = table.map(lambda cell: f'{cell:.2f}' if isinstance(cell, float) else str(cell))
    cells = cells.where(table.notna(), UNKNOWN)
    rows = [table.columns, ['---'] * len(table.columns), *cells.values]
    lines = [f'| {" | ".join(row)} |\n' for row in rows]
    return f'## {heading}\n\n{"".join(lines)}\n'

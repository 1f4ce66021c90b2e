"""The tables of errors: Table 1 beside the paper's numbers, controls, other runs, ensembles."""

import re

import numpy as np
import pandas as pd

from paper.claims import correct_for_number, judge
from paper.controls import control_groups
from paper.results import CONDITIONS, PAPER, ROW, UNKNOWN, alike, how_evaluated

NOTES = """Errors are percent; 8.58(89) is 8.58 +- 0.89 over seeds; a dash: not measured. *Two
attacks*: the first two of AutoAttack, APGD-CE and APGD-T, one after the other. *Overfitting*: the
robust error on test images less that on training images, by training's PGD, in points, over those
of the last five epochs that were trained at the target budget. Runs are named by their folders, and
by the flags in which they differ from the paper's.

"""


def make(results):
    """{heading: table} of all that was evaluated."""
    frame, errors = results.evaluations, results.errors
    usual = (frame['attack seed'] == 0) & (frame['attack precision'] == 'fp32')
    full, others = frame[frame['full'] & usual], frame[~(frame['full'] & usual)]
    tables = {}
    for first, rows in control_groups(results):
        heading = f'Controls: {first["model"]} on {first["dataset"]}, {first["eps_sched"]} eps'
        flags = re.sub(r'--restart( \w+)+ ', '', first['differs'])  # in which the rows differ
        tables[f'{heading}, {flags}'] = controls(first, rows)
    for precision in sorted({'fp32', *full['precision']}, reverse=True):
        heading = (
            f"Table 1 at the paper's size, {precision}: ours / the paper's / deviations between"
        )
        tables[heading] = table_1(full[full['precision'] == precision], errors)
    for (dataset, model), runs in others.groupby(['dataset', 'model'], sort=False):
        tables[f'Other runs of {model} on {dataset}'] = other_runs(runs, results.settings, errors)
    return tables | {'Ensembles': results.ensembles.drop(columns='digests')}


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
                verdict, text, p = judge(points, full=True)
                row |= {f'{pas} gains': f'{verdict}, {text}', f'p {pas} gains': p}
        table.append(row)
    table = pd.DataFrame(table)
    correct_for_number(table)
    return table


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
        row = {
            'runs': first['name'],
            'eps_sched': first['eps_sched'],
            'periodic': first['periodic'],
        }
        row |= {'flags': first['differs'], 'evaluated': how_evaluated(first)}
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

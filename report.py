"""Claims, tables and figures of runs, beside the paper's: `python report.py [FOLDER...]`.

It reads all runs in the folders, by default in ckpts/, and evaluations of their ensembles, which
are in evals/. Into --out go README.md, a page with all of it, the numbers as table1.csv, and a
picture for each figure.
"""

import argparse
import pathlib

from lib import cli, record
from paper import claims, figures, results, tables

# columns of tables that are printed, too
SHOWN = 'dataset', 'model', 'periodic', 'eps_sched', 'runs', 'evaluated', 'clean', 'PGD'
SHOWN += 'worst case', 'two attacks', 'AutoAttack', 'seeds', 'note', 'what', 'G gains', 'H gains'
SHOWN += 'claim', 'robust', 'points', 'compared', 'verdict', 'ours', 'n', 'members'


def page(judged, measured, drawn, sessions):
    """README.md: claims first, then tables of errors, and each figure under its sentence."""
    texts = ['# Results\n\n', claims.RULE]
    texts += map(tables.markdown, judged, judged.values())
    texts += [tables.NOTES, *map(tables.markdown, measured, measured.values())]
    texts += ['## Figures\n\nA band is one standard deviation over three seeds or more.\n\n']
    texts += [f'{shows}\n\n![{file}]({file})\n\n' for file, (shows, _) in drawn.items()]
    made = {f'- commit {s["commit"]}, torch {s["torch"]}, {s["device"]}\n' for s in sessions}
    return ''.join([*texts, '## Made with\n\n', *sorted(made)])


def show(heading, table):
    """Prints the columns of a table that fit on a terminal; README.md has all. Rows of Table 1 on
    which there are no runs are left out."""
    if {'seeds', 'eps_sched'} <= set(table):
        table = table[table['seeds'] > 0]
    if len(table):
        table = table[[name for name in table if name in SHOWN]]
        text = table.to_string(index=False, na_rep='—')
        print(f'{heading}\n{text}\n')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add('folders', nargs='*', default=['ckpts'], help='runs, or folders that hold some')
    add('--out', default='results', type=pathlib.Path, help='folder to write to')
    args = parser.parse_args(argv)
    path = pathlib.Path('evals/theory.json')
    theory = record.load(path) if path.exists() else None
    found = results.collect(args.folders)
    if not len(found.runs) and not theory:
        folders = ' '.join(map(str, args.folders))
        raise ValueError(f'{folders}: no finished run is there; {args.out} stays as it is')
    judged, measured = claims.make(found, theory), tables.make(found)
    drawn = figures.draw(found, theory)
    files = {
        'README.md': page(judged, measured, drawn, found.sessions).encode(),
        'table1.csv': found.evaluations.to_csv(index=False).encode(),
        **{file: picture for file, (_, picture) in drawn.items()},
    }
    with record.lock(args.out):
        for file, content in files.items():
            record.replace(args.out / file, content)
    for heading, table in (measured | judged).items():
        show(heading, table)
    for sentence in found.left_out:
        print(f'left out: {sentence}')
    print(f'written to {args.out}: {", ".join(files)}')


if __name__ == '__main__':
    cli.run(main)

"""Tables, figures and claims of runs, beside the paper's: `python report.py [RUN...]`.

Without RUN, of all runs below ckpts/. --budget, --rate and --width name the runs of a study each,
which may differ only in what it varies; each may be given several times. Into --out go index.md,
which says what each picture shows, table1.md and .csv, and claims.md.
"""

import argparse
import copy
import pathlib
from types import SimpleNamespace

import pandas as pd

import data
import train
from lib import cli, record
from paper import claims, figures, tables

STUDIES = {  # what varies in a study
    'budget': {'eps', 'eps_max', 'step_size', 'n_iter'},
    'rate': {'lr', 'lr_warmup', 'eps_sched', 'eps_max'},
    'width': {'width', 'eps', 'eps_max', 'step_size', 'n_iter'},
}
VARIED = 'eps', 'eps_sched', 'lr', 'lr_warmup', 'width'  # the point of a study where a run lies
ANALYSES = 'hessian', 'similarity', 'surface', 'connect', 'dead'


def read(folder, defaults):
    """The run in `folder` and of each analysis the result on the most images for its last model
    and its eps, None or [] where there is none. ValueError where a file is damaged."""
    config = defaults | record.load_config(folder)
    log = record.load(folder / 'log.jsonl') if (folder / 'log.jsonl').exists() else []
    digests = [row['digest'] for row in log if 'digest' in row]
    finished = len(digests) == len(config['periods'])  # a report needs no weights
    own = {'eps': config['eps'], 'digest': (digests or [None])[-1], 'complete': True}

    def load(name):
        return [record.load(path) for path in sorted(folder.glob(f'{name}*.json*')) if finished]

    def largest(results):
        return max(results, key=lambda result: result['n'], default=None)

    run = SimpleNamespace(path=folder, config=config, digest=own['digest'])
    run.diverged = (folder / 'diverged.json').exists()
    run.log = log if finished else []
    rows = [row for trace in load('trace') for row in trace]
    run.trace = {'n': min(config['trace'], max(1, len(rows) // 2)), 'rows': rows} if rows else None
    for name in ANALYSES:
        results = [result for result in load(name) if own.items() <= result.items()]
        setattr(run, name, largest(results))
    run.untrained = 1 in [row['predicted_classes'] for row in (*run.log[-1:], run.dead) if row]
    run.similarity = None if run.untrained else run.similarity  # it has no adversarial examples
    found = {}  # images, seed and precision -> an evaluation; the standard one is a column of it
    for result in load('evaluate'):
        if sorted(result['digests']) == sorted(digests) and result['eps'] == config['eps']:
            key = result['n'], result['seed'], result.get('precision')
            one = found.setdefault(key, result | {'columns': {}})
            one['columns'] = tables.columns_of(result) | one['columns']
    run.evaluations = list(found.values())
    pgd = [r['columns']['pgd'] | {'n': r['n']} for r in run.evaluations if 'pgd' in r['columns']]
    run.pgd = largest(pgd)
    return run


def make_study(kind, runs):
    """`runs` as a study; analyses of fewer images than those of other runs are left out.

    ValueError names two runs that differ in what the study does not vary, or in nothing.
    """
    runs = sorted(map(copy.copy, runs), key=lambda run: (run.config['eps'], run.config['seed']))
    check_alike(kind, runs)
    first = runs[0]
    unpaired = {run.digest for run in runs if not run.untrained}
    for run in runs:  # pairs that share a run are not independent
        if not run.connect:
            continue
        pair = {run.digest, run.connect['other']}
        if pair <= unpaired:
            unpaired -= pair
        else:
            run.connect = None
    study = SimpleNamespace(kind=kind, runs=runs, dataset=first.config['dataset'], full={})
    paper = all(tables.of_paper(run.config, STUDIES[kind]) for run in runs)
    for name in (*ANALYSES, 'pgd', 'trace'):
        results = [getattr(run, name) for run in runs]
        n = max((result['n'] for result in results if result), default=0)
        study.full[name] = paper and (n >= 10000 or name == 'trace')
        for run, result in zip(runs, results):
            if result and result['n'] < n:
                setattr(run, name, None)
    study.frame = pd.DataFrame([run.config | claims.measures(run) for run in runs])
    study.experiment = claims.experiment(first.config, paper or kind == 'width')
    return study


def check_alike(kind, runs):
    """ValueError unless `runs` differ in what a study varies, and in nothing else."""
    first, seen = runs[0], {}
    for run in runs:
        for name in sorted({*first.config, *run.config} - tables.FREE - STUDIES[kind]):
            ours, theirs = run.config.get(name), first.config.get(name)
            if ours != theirs:
                raise ValueError(f'--{kind}: {run.path} has {name} {ours}, {first.path} {theirs}')
        alike = data.show_settings(('seed', *VARIED), run.config)
        if alike in seen:
            raise ValueError(f'--{kind}: {seen[alike]} and {run.path} both have {alike}; name one')
        seen[alike] = run.path


def write(args, runs, studies):
    """Writes all that `runs` and `studies` suffice for, and shows the tables and the verdicts."""
    path = pathlib.Path('evals/theory.json')
    theory = record.load(path) if path.exists() else {}
    frame, settings, errors = tables.evaluated(runs)
    gains = list(claims.gains(frame, settings))
    found = [*claims.of_table(gains), *claims.of_theory(theory)]
    for study in studies:
        found += getattr(claims, f'of_{study.kind}')(study)
    judged, numbers = claims.table(found), tables.make(frame, settings, errors, gains)
    said_once = judged.copy()
    said_once.loc[judged['claim'].duplicated(), ['claim', 'in the paper']] = ''
    results = [result for run in runs for result in (run.config, *run.evaluations)]
    sessions = [session for result in results for session in result['provenance']]
    made = {f'- commit {s["commit"]}, torch {s["torch"]}, {s["device"]}\n' for s in sessions}
    written = [tables.markdown(heading, table) for heading, table in numbers.items()]
    with record.lock(args.out):
        shown = figures.draw(studies, theory, args.out)
        texts = {
            'table1.md': ''.join([tables.NOTES, *written, *sorted(made)]),
            'table1.csv': frame.to_csv(index=False),
            'claims.md': f'{claims.RULE}\n\n' + tables.markdown('# Claims', said_once),
            'index.md': ''.join(f'- {shown[name]}\n\n  ![{name}]({name})\n' for name in shown),
        }
        for name, text in texts.items():
            record.replace(args.out / name, lambda file, text=text: file.write(text.encode()))
    for heading, table in numbers.items():
        if 'runs' in table:  # rows of Table 1 without any are not printed
            table = table[table['runs'] > 0]
        if len(table):
            print(f'{heading}\n{table.to_string(index=False)}\n')
    for claim, _, verdict, ours, n, experiment, _ in judged.dropna().values:
        print(f'{verdict:<28}{claim}: {ours}, {n}, {experiment}')
    print(f'written to {args.out}: {", ".join([*texts, *shown])}')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add('runs', nargs='*', metavar='RUN', help='runs, or folders that hold some; all in ckpts/')
    for kind, varied in STUDIES.items():
        text = f'runs that differ in {", ".join(sorted(varied))} and seed'
        add(f'--{kind}', nargs='+', action='append', default=[], metavar='RUN', help=text)
    add('--out', default='results', type=pathlib.Path, help='folder to write to')
    args = parser.parse_args(argv)
    defaults, runs = train.config_of([]), {}

    def load(paths):
        found = {path.resolve(): path for path in record.find_runs(paths)}
        for key, path in found.items():
            runs[key] = runs.get(key) or read(path, defaults)
        return [runs[key] for key in found]

    load(args.runs or pathlib.Path().glob('ckpts'))
    groups = [(kind, load(paths)) for kind in STUDIES for paths in getattr(args, kind)]
    studies = [make_study(kind, group) for kind, group in groups if group]
    if not runs and (args.out / 'table1.md').exists():
        raise ValueError(f'there is no run to report on; {args.out} stays as it is')
    write(args, list(runs.values()), studies)
    left_out = {'not finished': [], 'trained, but not evaluated': []}
    for run in runs.values():
        if not run.log and not run.diverged:
            left_out['not finished'].append(str(run.path))
        elif not run.evaluations and not any(getattr(run, name) for name in ANALYSES):
            left_out['trained, but not evaluated'].append(str(run.path))
    for state, paths in left_out.items():
        if paths:
            print(f'{state}: {", ".join(paths)}')


if __name__ == '__main__':
    cli.run(main)

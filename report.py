"""Tables, figures and claims of runs, beside the paper's: `python report.py [RUN...]`.

Without RUN, of all runs below ckpts/. --budget, --rate and --width name the runs of a study each,
which may differ only in what it varies; each may be given several times. Into --out go index.md,
which says what each picture shows, table1.md and .csv, and claims.md. Over seeds a number is mean
and deviation: 8.58(89) is 8.58 +- 0.89.
"""

import argparse
import copy
import itertools
import pathlib
from types import SimpleNamespace

import numpy as np
import pandas as pd

import attack
import claims
import cli
import data
import figures
import record
import train

FREE = {'seed', 'trace', 'n_eval', 'provenance'}  # logging, and the luck of the draw
STUDIES = {  # what varies in a study
    'budget': {'eps', 'eps_max', 'step_size', 'n_iter'},
    'rate': {'lr', 'lr_warmup', 'eps_sched', 'eps_max'},
    'width': {'width', 'eps', 'eps_max', 'step_size', 'n_iter'},
}
ANALYSES = 'hessian', 'similarity', 'surface', 'connect', 'dead'
NO_ATTACKS = 'clean', 'worst', 'standard'  # columns that are not of one attack
MORE = 'seed', 'full', 'constant', 'place', 'periodic', 'minutes', 'gib'  # about an evaluated run


def read(folder, defaults):
    """The run in `folder` and of each analysis the result on the most images for its last model
    and its eps, None or [] where there is none. ValueError where a file is damaged."""
    config = defaults | record.load_config(folder)
    log = record.load(folder / 'log.jsonl') if (folder / 'log.jsonl').exists() else []
    digests = [row['digest'] for row in log if 'digest' in row]
    finished = len(digests) == len(config['periods'])
    own = {'eps': config['eps'], 'digest': (digests or [None])[-1], 'complete': True}

    def load(name):
        return [record.load(path) for path in sorted(folder.glob(f'{name}*.json*')) if finished]

    def largest(results):
        return max(results, key=lambda result: result['n'], default=None)

    run = SimpleNamespace(path=folder, config=config, digest=own['digest'])
    run.diverged = (folder / 'diverged.json').exists()
    run.log, rows = log * finished, sum(load('trace'), [])
    run.trace = {'n': min(config['trace'], max(1, len(rows) // 2)), 'rows': rows} if rows else None
    for name in ANALYSES:
        results = [result for result in load(name) if own.items() <= result.items()]
        setattr(run, name, largest(results))
    run.constant = 1 in [row['predicted_classes'] for row in (*run.log[-1:], run.dead) if row]
    run.similarity = None if run.constant else run.similarity  # it has no adversarial examples
    found = {}  # images, seed and precision -> an evaluation; the standard one is a column of it
    for result in load('evaluate'):
        if sorted(result['digests']) == sorted(digests) and result['eps'] == config['eps']:
            key = result['n'], result['seed'], result.get('precision')
            one = found.setdefault(key, result | {'columns': {}})
            one['columns'] = columns_of(result) | one['columns']
    run.evaluations = list(found.values())
    pgd = [r['columns']['pgd'] | {'n': r['n']} for r in run.evaluations if 'pgd' in r['columns']]
    run.pgd = largest(pgd)
    return run


def columns_of(result):
    """The columns of an evaluation; those of a standard one are, if complete, one beside clean."""
    columns = result['columns']
    if result.get('standard'):
        done = attack.STANDARD.keys() <= columns.keys()
        return {'clean': columns['clean']} | ({'standard': columns['worst']} if done else {})
    return columns


def make_study(kind, runs):
    """`runs` as a study; analyses of fewer images than those of other runs are left out.

    ValueError names two runs that differ in what the study does not vary, or in nothing.
    """
    runs = sorted(map(copy.copy, runs), key=lambda run: (run.config['eps'], run.config['seed']))
    first, twins, ends = runs[0], {}, {run.digest for run in runs if not run.constant}
    place = 'seed', 'eps', 'eps_sched', 'lr', 'lr_warmup', 'width'
    for run in runs:
        for name in sorted({*first.config, *run.config} - FREE - STUDIES[kind]):
            ours, theirs = run.config.get(name), first.config.get(name)
            if ours != theirs:
                raise ValueError(f'--{kind}: {run.path} has {name} {ours}, {first.path} {theirs}')
        twin = twins.setdefault(str([run.config[name] for name in place]), run)
        if twin is not run:
            alike = data.show_settings(place, run.config)
            raise ValueError(f'--{kind}: {twin.path} and {run.path} both have {alike}')
        pair = {run.digest, run.connect['other']} if run.connect else set()
        if not pair <= ends:
            run.connect, pair = None, set()
        ends -= pair  # pairs that share a run are not independent
    study = SimpleNamespace(kind=kind, runs=runs, dataset=first.config['dataset'], full={})
    paper = all(of_paper(run.config, STUDIES[kind]) for run in runs)
    for name in (*ANALYSES, 'pgd', 'trace'):
        n = max((getattr(run, name) or {'n': 0})['n'] for run in runs)
        study.full[name] = paper and (n >= 10000 or name == 'trace')
        for run in runs:
            if (getattr(run, name) or {'n': n})['n'] < n:
                setattr(run, name, None)
    study.frame = pd.DataFrame([run.config | claims.measures(run) for run in runs])
    study.place = claims.place(first.config, paper or kind == 'width')
    return study


def of_paper(config, varied=frozenset()):
    """Whether a config is, whole, that of a row of Table 1, but for precision and `varied`."""
    periodic = 'yes' if len(config['periods']) > 1 else 'no'
    row = config['dataset'], config['model'], periodic, config['eps_sched']
    if row not in claims.PAPER.index:
        return False
    flags = ['--dataset', row[0], '--model', row[1], '--eps-sched', row[3]]
    flags += ['--periodic'] * (periodic == 'yes')
    flags += ['--eps', repr(config['eps'])] * ('eps' in varied)  # which brings its steps along
    paper = train.config_of(flags)
    free = FREE | {'precision'} | varied & {'lr', 'lr_warmup', 'width'}
    config = paper | config  # what an older one lacks counts as its default
    return all(config[name] == paper.get(name, ...) for name in config.keys() - free)


def evaluated(runs):
    """A frame with a row an evaluation, what `row_of` says of it; the names of the settings; and
    those of the errors."""
    rows, errors = {}, dict.fromkeys(claims.PAPER)
    settings = dict.fromkeys(['dataset', 'model', 'eps_sched', 'eps_max', 'periods', 'precision'])
    for run in runs:
        for result in run.evaluations:
            typed, found, more = row_of(run, result)
            rows.setdefault(str((typed, more['seed'])), more | typed | found)  # a copy counts once
            settings, errors = settings | typed, errors | found
    frame = pd.DataFrame(rows.values(), columns=[*MORE, *settings, *errors])
    frame = frame.astype(dict.fromkeys(errors, float) | {'full': bool})
    last = [name for name in errors if name in ('worst case', 'AutoAttack')]
    return frame, list(settings), [*(name for name in errors if name not in last), *last]


def row_of(run, result):
    """An evaluation of a run: the settings of both as they are typed, the errors in percent, and
    MORE."""
    config, columns = run.config, result['columns']
    attacks = {key: columns[key]['settings'] for key in columns if key not in NO_ATTACKS}
    typed = {name: config[name] for name in config if name not in FREE}
    typed |= {'test images': result['n'], 'attack seed': result['seed']}
    typed |= {'attack precision': result['precision']} if 'precision' in result else {}
    typed |= {f'{attack.title(key)} by': attacks[key] for key in attacks}
    typed = {name: data.show(name, typed[name], config['dataset']) for name in typed}
    complete = claims.ATTACKS.keys() <= attacks.keys()
    names = ['clean', *attacks] + ['worst'] * complete + ['standard'] * ('standard' in columns)
    errors = {attack.title(key): 100 * columns[key]['error'] for key in names}
    full = of_paper(config) and result['n'] == result['n_test']
    for key in claims.ATTACKS.keys() & attacks:
        full = full and claims.ATTACKS[key].items() <= attacks[key].items()
    more = {
        'seed': config['seed'],
        'full': full,
        'constant': run.constant,
        'place': claims.place(config, full),
        'periodic': 'yes' if len(config['periods']) > 1 else 'no',
        'minutes': sum(epoch['seconds'] for epoch in run.log) / 60,
        'gib': max((epoch.get('gib', np.nan) for epoch in run.log), default=np.nan),
    }
    return typed, errors, more


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
    n, constant = len(own), int(own['constant'].sum())
    cost = {'minutes': own['minutes'].mean(), 'GiB': own['gib'].max()}
    row |= {'runs': n} | {k: '—' if np.isnan(cost[k]) else f'{cost[k]:.1f}' for k in cost}
    return row | {'note': f'{constant} of {n} constant classifiers' * bool(constant)}


def tables(frame, settings, errors):
    """The tables of table1.md, {heading: frame}: Table 1 for each precision of training, and all
    other runs, with what they have in common, but for defaults, in the heading."""
    full, other, found = frame[frame['full']], frame[~frame['full']], {}
    groups = dict(list(full.groupby(['precision', *claims.ROW])))
    for precision in sorted({'fp32', *full['precision']}, reverse=True):
        rows = [
            dict(zip(claims.ROW, row))
            | cells(groups.get((precision, *row), full[:0]), errors, paper)
            for row, paper in claims.PAPER.iterrows()
        ]
        found[f"Table 1 at the paper's size, {precision}"] = pd.DataFrame(rows)
    for (model, dataset), runs in other.groupby(['model', 'dataset'], sort=False):
        # an attack that was not run does not make a difference in its settings
        same = [k for k in settings if runs[k].nunique(dropna=k.endswith(' by')) < 2]
        paper = train.config_of(['--dataset', dataset])
        usual = {name: data.show(name, paper[name], dataset) for name in paper}
        usual |= {'model': model, 'width': ''}  # another model has another default
        shared = {name: ''.join(runs[name].dropna().unique()) for name in same}
        common = [f'{name} {shared[name]}' for name in same if shared[name] != usual.get(name, '')]
        groups = runs.groupby(settings, sort=False, dropna=False)
        rows = [dict(own.iloc[0][settings].drop(same)) | cells(own, errors) for _, own in groups]
        heading = f'Other runs of {model} on {dataset}: defaults, but for {", ".join(common)}'
        found[heading] = pd.DataFrame(rows)
    return found | {'Ensembles': ensembles()}


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


def markdown(heading, frame):
    """A frame as a table of Markdown."""
    rows = [frame.columns, ['---'] * len(frame.columns), *frame.fillna('—').values]
    lines = [f'| {" | ".join(map(str, row))} |\n' for row in rows]
    return f'{heading}\n\n{"".join(lines)}\n' * (len(frame) > 0)


def write(args, runs, studies):
    """Writes all that `runs` and `studies` suffice for, and shows the tables and the verdicts."""
    theory = record.load(args.theory) if args.theory.exists() else {}
    frame, settings, errors = evaluated(runs)
    found = [*claims.of_table(frame, settings), *claims.of_theory(theory)]
    for study in studies:
        found += getattr(claims, f'of_{study.kind}')(study)
    judged, numbers = claims.table(found), tables(frame, settings, errors)
    sessions = [
        s for run in runs for made in (run.config, *run.evaluations) for s in made['provenance']
    ]
    made = {f'- commit {s["commit"]}, torch {s["torch"]}, {s["device"]}\n' for s in sessions}
    with record.lock(args.out):
        shown = figures.draw(studies, theory, args.out)
        texts = {
            'table1.md': ''.join(itertools.starmap(markdown, numbers.items()))
            + ''.join(sorted(made)),
            'table1.csv': frame.to_csv(index=False),
            'claims.md': f'{claims.RULE}\n\n' + markdown('# Claims', judged),
            'index.md': ''.join(f'- {shown[name]}\n\n  ![{name}]({name})\n' for name in shown),
        }
        for name, text in texts.items():
            record.replace(args.out / name, lambda file, text=text: file.write(text.encode()))
    for heading, table in numbers.items():
        if len(table := table[table['runs'] > 0] if 'runs' in table else table):
            print(f'{heading}\n{table.to_string(index=False)}\n')
    for claim, paper, smaller, *_ in judged.values:
        if paper != smaller:  # else neither was measured
            print(f"{claim:<70} the paper's size: {paper}; smaller: {smaller}")
    print(f'written to {args.out}: {", ".join([*texts, *shown])}')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add('runs', nargs='*', metavar='RUN', help='runs, or folders that hold some; all in ckpts/')
    for kind, varied in STUDIES.items():
        text = f'runs that differ in {", ".join(sorted(varied))} and seed'
        add(f'--{kind}', nargs='+', action='append', default=[], metavar='RUN', help=text)
    add('--theory', default='evals/theory.json', type=pathlib.Path, help='what theory.py wrote')
    add('--out', default='results', type=pathlib.Path, help='folder to write to')
    args = parser.parse_args(argv)
    defaults, runs = train.config_of([]), {}

    def load(paths):
        paths = {path.resolve(): path for path in record.find_runs(paths)}
        for key in paths:
            runs[key] = runs.get(key) or read(paths[key], defaults)
        return [runs[key] for key in paths]

    load(args.runs or pathlib.Path().glob('ckpts'))
    groups = [(kind, load(paths)) for kind in STUDIES for paths in getattr(args, kind)]
    studies = [make_study(kind, group) for kind, group in groups if group]
    if not runs and (args.out / 'table1.md').exists():
        raise ValueError(f'there is no run to report on; {args.out} stays as it is')
    write(args, list(runs.values()), studies)
    idle = [
        str(run.path)
        for run in runs.values()
        if not run.evaluations and not any(getattr(run, name) for name in ANALYSES)
    ]
    if idle:
        print(f'trained, but not evaluated: {", ".join(idle)}')


if __name__ == '__main__':
    cli.run(main)

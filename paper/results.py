"""What was measured, as two frames: a row for each run, and a row for each evaluation."""

import pathlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

import attack
import data
import train
from lib import record

ROW = ['dataset', 'model', 'periodic', 'eps_sched']  # what names a row of Table 1
PAPER = pd.read_csv(pathlib.Path(__file__).with_name('table1.txt'), sep=r'\s+', index_col=ROW)
FIVE = [title for title in PAPER if title != 'clean']  # its attacks
ATTACKS = {  # and their settings that are not those of training
    'pgd': {},
    'pgd100': {'n_iter': 100},
    'apgd100_ce': {'n_iter': 100, 'n_restarts': 5},
    'apgd100_dlr': {'n_iter': 100, 'n_restarts': 5},
    'square5k': {'n_queries': 5000},
}
ANALYSES = 'hessian', 'similarity', 'surface', 'connect', 'dead'
NO_SETTINGS = {'seed', 'trace', 'n_eval', 'provenance'}  # the luck of the draw, and logging
STUDIED = {'eps', 'eps_max', 'step_size', 'n_iter', 'lr', 'lr_warmup', 'width', 'precision'}
# the settings that change along with one
FOLLOW = {
    'eps_sched': ['eps_min', 'eps_max'],
    'periodic': ['periods'],
    'model': [],
    'eps': ['eps_max', 'step_size', 'n_iter'],
    'lr': ['lr_warmup', 'eps_sched', 'eps_min', 'eps_max'],
    'width': [],
}
# how an evaluation was made
CONDITIONS = ['weights', 'member', 'test images', 'attack seed', 'attack precision']
CONDITIONS += ['attacks', 'test data']
USUAL = {'weights': 'last', 'member': 'all', 'attack seed': 0, 'attack precision': 'fp32'}
UNKNOWN = '—'


@dataclass
class Results:
    """All that a report is made from."""

    runs: pd.DataFrame  # a row for each run: its settings, log, and results of analyses
    evaluations: pd.DataFrame  # settings of the run, CONDITIONS and errors, in percent
    ensembles: pd.DataFrame  # a row for each ensemble in evals/
    settings: list  # the columns that say how a run was trained
    errors: list  # the columns of errors
    left_out: list  # sentences about what is in no table
    sessions: list  # the provenance of all of it


def collect(paths):
    """The Results of the runs in `paths`. ValueError, naming the file, where one is damaged."""
    defaults, folders = train.config_of([]), record.find_runs(paths)
    left_out = [f'{path} is no folder' for path in folders if not path.is_dir()]
    runs = [read(folder, defaults, left_out) for folder in folders if folder.is_dir()]
    sessions = [session for run in runs for session in run['sessions']]
    settings = dict.fromkeys(
        name for config in (defaults, *(r['config'] for r in runs)) for name in config
    )
    settings = ['periodic', *(name for name in settings if name not in NO_SETTINGS)]
    for run in runs:
        run |= {name: run.get(name, UNKNOWN) for name in settings}
    runs = [run for run in runs if run['finished'] or run['diverged']]
    same_data(runs, 'data')
    runs = distinct(runs, settings)
    evaluations = [run | row for run in runs for row in run['evaluations']]
    same_data(evaluations, 'test data')
    evaluations += diverged(runs, evaluations, settings, left_out)
    of_members = ensembles(runs, left_out)
    titles = dict.fromkeys(name for row in evaluations for name in row['errors'])
    last = ['worst case', 'two attacks', 'AutoAttack']
    errors = [*dict.fromkeys([*PAPER, *(name for name in titles if name not in last)]), *last]
    about = ['name', 'seed', 'typed eps', 'differs', 'constant', 'diverged', 'full']
    columns = [*about, 'minutes', 'gib', 'overfitting', *settings, *CONDITIONS, *errors]
    evaluations = pd.DataFrame([row | row['errors'] for row in evaluations], columns=columns)
    evaluations = evaluations.astype(dict.fromkeys(errors, float) | {'full': bool})
    runs = pd.DataFrame(runs, columns=None if runs else [*settings, 'name', 'seed', 'log'])
    return Results(runs, evaluations, of_members, settings, errors, left_out, sessions)


def alike(frame, settings, but=()):
    """The groups of rows that agree in all `settings` but those in `but`."""
    same = [name for name in settings if name not in but]
    return [group for _, group in frame.groupby(same, dropna=False, sort=False)]


def comparable(group, *point):
    """A group of runs with what can be compared of them. Of two runs of a seed with the same values
    of the settings `point` there is neither: either may be the odd one."""
    group = group[~group.duplicated(['seed', *point], keep=False)]
    runs = [dict(run) for run in group.to_dict('records')]
    n_updates = min((run['n_updates'] for run in runs if run['updates']), default=0)
    for run in runs:  # as many first and last updates of each
        run['n_updates'] = n_updates
    on_most_images(runs)
    at_shared_points(runs)
    independent_pairs(runs)
    return pd.DataFrame(runs, index=group.index)


def on_most_images(runs):
    """Leaves out results on fewer images than another run has. A diverged run is always wrong."""
    for name in ('pgd', *ANALYSES):
        most = max((run[name]['n'] for run in runs if run[name]), default=0)
        for run in runs:
            if run[name] and run[name]['n'] < most:
                run[name] = None
            if name == 'pgd' and run['diverged']:
                run['pgd'] = {'n': most, 'error': 1.0}


def at_shared_points(runs):
    """Takes similarities at the displacements that all runs have, 0 and some above it, or none."""
    runs = [run for run in runs if run['similarity']]
    displacements = [{point['a'] for point in run['similarity']['points']} for run in runs]
    shared = set.intersection(*displacements) if runs else set()
    enough = min(shared, default=1) <= 0 < max(shared, default=0)
    for run in runs:
        points = [point for point in run['similarity']['points'] if point['a'] in shared]
        run['similarity'] = {**run['similarity'], 'points': points} if enough else None


def independent_pairs(runs):
    """Leaves out curves from or to a run that an earlier curve has: they are not independent."""
    connected = set()
    for run in runs:
        if run['connect']:
            ends = {run['connect']['digest'], run['connect']['other']}
            if ends & connected:
                run['connect'] = None
            else:
                connected |= ends


def how_evaluated(row):
    """How an evaluation was made, in words."""
    unusual = [f'{name} {row[name]}' for name in USUAL if row[name] != USUAL[name]]
    return ', '.join([f'{row["test images"]} images', *unusual])


def first_and_last(run):
    """The first and the last updates that a run has logged, two frames."""
    updates = pd.DataFrame(run['updates'])
    return updates[: run['n_updates']], updates[-run['n_updates'] :]


def read(folder, defaults, left_out):
    """What was measured on the run in `folder`, name -> value, None where nothing was."""

    def load(pattern):
        return [(path, record.load(path)) for path in sorted(folder.glob(pattern))]

    config = defaults | record.load_config(folder)
    log = [row for _, rows in load('log.jsonl') for row in rows]
    digests = {  # of the models at the ends of periods
        weights: [row[key] for row in log if key in row]
        for weights, key in (('last', 'digest'), ('best', 'best_digest'), ('ema', 'ema_digest'))
    }
    run = {name: rounded(value) for name, value in config.items() if value is not None}
    run |= {name: data.show(name, run[name], '') for name in run if isinstance(run[name], list)}
    run |= {
        'path': folder,
        'name': folder.name.removesuffix(f'_s{config["seed"]}'),  # of all seeds
        'config': config,
        'sessions': list(config.get('provenance', [])),
        'digests': digests,
        'periodic': 'yes' if len(config['periods']) > 1 else 'no',
        'typed eps': data.show_eps(config['eps'], config['dataset']),
        'diverged': (folder / 'diverged.json').exists(),
        'finished': len(digests['last']) == len(config['periods']),
        'evaluations': [],
        'constant': 'yes',  # a diverged run is as bad as a constant classifier
        'minutes': sum(epoch['seconds'] for epoch in log) / 60,
        'gib': max((epoch.get('gib') or np.nan for epoch in log), default=np.nan),
        'overfitting': np.nan,
        'n_updates': 0,
        **dict.fromkeys(('updates', 'pgd', *ANALYSES)),
    }
    differs = differences(config, run['periodic'])
    row = config['dataset'], config['model'], run['periodic'], config['eps_sched']
    run['differs'] = data.show_settings(differs, config)
    run['of the paper'] = row in PAPER.index and STUDIED.issuperset(differs)
    run['log'] = log if run['finished'] else []
    if not run['finished']:
        if not run['diverged']:
            left_out.append(f'{folder} is not finished')
        return run
    run['updates'] = [row for _, rows in load('trace.jsonl') for row in rows]
    run['n_updates'] = min(config['trace'] or 0, max(1, len(run['updates']) // 2))
    for name in ANALYSES:  # of the last model, at the run's eps, on the most images
        wanted = {'digest': digests['last'][-1], 'eps': config['eps'], 'complete': True}
        analyses = [result for _, result in load(f'{name}*.json')]
        analyses = [result for result in analyses if wanted.items() <= result.items()]
        run[name] = max(analyses, key=lambda result: result['n'], default=None)
    run['overfitting'] = overfitting(log, config['eps'])
    in_table_1 = row in PAPER.index and set(differs) <= {'precision'}
    run['evaluations'] = evaluate(load('evaluate*.json'), run, in_table_1, left_out)
    find_constant(run)
    pgd = [
        {'n': row['test images'], 'error': row['errors']['PGD'] / 100}
        for row in run['evaluations']
        if 'PGD' in row['errors'] and (row['weights'], row['member']) == ('last', 'all')
    ]
    run['pgd'] = max(pgd, key=lambda result: result['n'], default=None)
    if not run['evaluations'] and not any(run[name] for name in ('updates', *ANALYSES)):
        left_out.append(f'{folder} is trained, but not evaluated')
    return run


def find_constant(run):
    """Sets whether a run, and what each evaluation is of, is a constant classifier, or one of its
    models is: yes, no, or unknown, where nobody counted the classes that they predict."""
    counts = [row.get('predicted_classes') for row in run['log'] if 'digest' in row]
    counts += [run['dead']['predicted_classes']] if run['dead'] else []
    for row in run['evaluations']:
        if row['weights'] == 'last':
            counts += row['classes']

    def state(counts):
        return 'yes' if 1 in counts else 'no' if any(counts) else 'unknown'

    run['constant'] = state(counts)
    for row in run['evaluations']:
        row['constant'] = state(counts if row['weights'] == 'last' else row['classes'])


def differences(config, periodic):
    """The settings in which a run is not the paper's for its dataset, network and schedule, but for
    those that follow from its eps and epochs."""
    flags = ['--dataset', config['dataset'], '--model', config['model']]
    flags += ['--eps-sched', config['eps_sched'], *['--periodic'] * (periodic == 'yes')]
    paper = train.config_of(flags)
    epochs = max(config['epochs'], 4)  # fewer are no three periods
    given = ['--eps', repr(config['eps']), '--epochs', str(epochs)]
    expected = train.config_of([*flags, *given])
    expected |= {name: paper[name] for name in ('eps', 'epochs')}
    names = [name for name in config if name not in NO_SETTINGS | {'data'}]
    return [name for name in names if rounded(config[name]) != rounded(expected.get(name))]


def rounded(value):
    """A float to nine digits, so that 1.5 * 0.2 and 0.3 are one setting."""
    return float(f'{value:.9g}') if isinstance(value, float) else value


def overfitting(log, eps):
    """The robust error on test images less that on training images, in points, by the last five
    epochs that were trained at the target budget; nan if none was."""
    last = [epoch for epoch in log[-5:] if epoch['eps'] == eps]
    last = pd.DataFrame(last, columns=['robust_error', 'train_robust_error'], dtype=float).mean()
    return 100 * (last['robust_error'] - last['train_robust_error'])


def evaluate(files, run, in_table_1, left_out):
    """Rows of the evaluations of a run: CONDITIONS, errors in percent, with AutoAttack's as one of
    them, and whether all is as in the paper's Table 1 (full)."""
    rows = {}
    same_data([result for _, result in files], 'data')
    for path, result in files:
        weights, member = result.get('weights', 'last'), result.get('member')
        digests = run['digests'][weights]
        if sorted(result['digests']) != sorted(digests[member - 1 : member] if member else digests):
            left_out.append(f'{path} is of weights that the run no longer has')
            continue
        if result['eps'] != run['config']['eps']:
            left_out.append(f'{path} is at another eps than the run')
            continue
        key = weights, member or 'all', result['n'], result['seed']
        key += result.get('precision', 'fp32'), UNKNOWN, str(result.get('data', UNKNOWN))
        row = dict(zip(CONDITIONS, key))
        row |= {'attacks': {}, 'errors': {}, 'classes': [], 'full': False}
        row = rows.setdefault(key, row)
        columns = result['columns']
        searched = () if result.get('standard') else columns.keys() - {'clean', 'worst'}
        attacks = {key: columns[key]['settings'] for key in searched}
        if any(row['attacks'].get(key, attacks[key]) != attacks[key] for key in attacks):
            left_out.append(f'{path} has other settings of an attack than a file before it')
            continue
        row['classes'] += [result.get('predicted_classes')]
        row['classes'] += result.get('members_predicted_classes', [])
        run['sessions'] += result['provenance']
        if result.get('standard'):
            row['errors'] |= standard_errors(columns)
            continue
        row['errors'] |= errors_of(path, columns)
        row['attacks'] |= attacks
        if ATTACKS.keys() <= attacks.keys():
            same = [ATTACKS[key].items() <= attacks[key].items() for key in ATTACKS]
            whole = result['n'] == result['n_test'] and (weights, member) == ('last', None)
            row['full'] = in_table_1 and whole and all(same)
    for row in rows.values():
        papers = [(key, row['attacks'][key]) for key in ATTACKS if key in row['attacks']]
        row['attacks'] = str(papers)
    return list(rows.values())


def errors_of(path, columns):
    """Errors of the evaluation at `path`, in percent. The worst case is that of the paper's five
    attacks, whatever others there are."""
    errors = {attack.title(key): 100 * column['error'] for key, column in columns.items()}
    if not ATTACKS.keys() <= columns.keys():
        errors.pop('worst case')
    elif columns.keys() - ATTACKS - {'clean', 'worst'}:
        robust = record.load(path.with_suffix('.npz'))
        withstood = np.logical_and.reduce([robust[key] for key in ('clean', *ATTACKS)])
        errors['worst case'] = 100 * (1 - withstood.mean())
    return errors


def standard_errors(columns):
    """Errors of AutoAttack's standard evaluation, in percent, as far as it has come: of its first
    two attacks, and of all four."""
    errors = {'clean': 100 * columns['clean']['error']}
    if 'apgd_t' in columns:  # columns are cumulative
        errors['two attacks'] = 100 * columns['apgd_t']['error']
    if attack.STANDARD.keys() <= columns.keys():
        errors['AutoAttack'] = 100 * columns['worst']['error']
    return errors


def distinct(runs, settings):
    """The runs without copies. ValueError for different models of the same settings and seed."""
    found = {}
    for run in runs:
        key = tuple(str(run[name]) for name in ('seed', *settings))
        first = found.setdefault(key, run)
        if first['digests'] != run['digests']:
            both = f'{first["path"]} and {run["path"]}'
            raise ValueError(
                f'{both} are different models of the same settings and seed: report on one of them'
            )
    return list(found.values())


def same_data(rows, name):
    """Older results do not say on which images they were made: it counts as the same as that of the
    others on their dataset, if these agree."""
    known = {}
    for row in rows:
        known.setdefault(row['dataset'], set()).add(row.get(name, UNKNOWN))
    for row in rows:
        digests = known[row['dataset']] - {UNKNOWN}
        if row.get(name, UNKNOWN) == UNKNOWN and len(digests) == 1:
            (row[name],) = digests


def diverged(runs, evaluations, settings, left_out):
    """Evaluations of the runs that diverged: always wrong, wherever another seed was evaluated."""
    rows = []
    for run in [run for run in runs if run['diverged']]:
        others = [row for row in evaluations if all(row[k] == run[k] for k in settings)]
        conditions = {tuple(row[name] for name in CONDITIONS): row for row in others}
        if not others:
            left_out.append(f'{run["path"]} diverged, and no other seed was evaluated')
        for row in conditions.values():
            rows.append(row | run | {'errors': dict.fromkeys(row['errors'], 100.0)})
    return rows


def ensembles(runs, left_out):
    """The evaluations in evals/ of ensembles of models of these `runs`."""
    known = {digest for run in runs for digests in run['digests'].values() for digest in digests}
    rows = []
    for path in sorted(pathlib.Path('evals').glob('ensemble*/evaluate*.json')):
        result = record.load(path)
        if not known.issuperset(result['digests']):
            left_out.append(f'{path} has a member that is no model of these runs')
            continue
        columns = result['columns']
        standard = result.get('standard')
        errors = standard_errors(columns) if standard else errors_of(path, columns)
        row = {
            'members': ' + '.join(result['members']),
            'digests': result['digests'],
            'dataset': result['dataset'],
            'eps': data.show_eps(result['eps'], result['dataset']),
            'test images': result['n'],
            'attack seed': result['seed'],
            'attack precision': result.get('precision', 'fp32'),
            'date': result['provenance'][-1]['date'],
        }
        rows.append(row | errors)
    return pd.DataFrame(rows, columns=None if rows else ['digests'])

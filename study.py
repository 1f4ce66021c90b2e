"""What has been measured: runs with their results, and which of them may be put side by side."""
import math
import os
import pathlib
from types import SimpleNamespace

import analysis
import data
import models
import record
import schedule

ANALYSES = 'hessian', 'similarity', 'surface', 'dead'
WATCHED = 'seed', 'sessions', 'trace', 'n_eval'  # change what is seen of a run, or its luck
SCHEDULE = 'eps_sched', 'eps_min', 'eps_max'


def read(folder):
    """The run in `folder`: its config, and None or [] for what it does not have.

    trace and log are lists of rows, evaluations and curves lists of results of evaluate.py and
    `landscape.py connect` (`find` adds the runs at the other end), the others, by the name of the
    analysis, the result of most images of the run's last model at its own eps; constant says
    whether it ended as a constant classifier, diverged whether its loss became infinite.
    """
    folder = pathlib.Path(folder)
    config, trace = record.config_of(folder), folder / 'trace.jsonl'
    with analysis.sound(f'a result in {folder}'):
        done = record.finished(folder)
        digests = list(map(record.digest, record.period_files(folder, config))
                       ) if done else [None]
        digest = digests[-1]
        log = record.load(folder / 'log.jsonl') if (folder / 'log.jsonl').exists() else []
        run = SimpleNamespace(
            name=folder.resolve().name, config=config, seed=config['seed'], eps=config['eps'],
            digest=digest, diverged=not done and (folder / 'diverged.json').exists(),
            log=log if done else [], trace=record.load(trace) if done and trace.exists() else [],
            evaluations=[result for result in results(folder, 'evaluate') if (
                result['eps'], result['dataset']) == (config['eps'], config['dataset'])
                and sorted(result['digests']) == sorted(map(str, digests))],
            curves=[result for result in results(folder, 'connect') if 'barriers' in result
                    and (result['eps'], result['digest']) == (config['eps'], digest)],
            **{name: largest(folder, name, config['eps'], digest) for name in ANALYSES})
        run.constant = bool(done and log and log[-1].get('predicted_classes') == 1
                            or run.dead and run.dead['predicted_classes'] == 1)
        look(run)
    return run


def look(run):
    """Raises some error where a result of the run is not of the shape that its script writes."""
    config = run.config
    dict.fromkeys(schedule.EPS_SCHEDS)[config['eps_sched']], models.MODELS[config['model']]
    sum([config[name] for name in ('lr', 'eps_max', 'batch_size', 'width', 'epochs')])
    config['optimizer'] + config['lr_sched'], [s['torch'] + s['device'] for s in config['sessions']]
    numbers = [epoch['loss'] + epoch['seconds'] for epoch in run.log]
    numbers += [step['grad_norm'] + step['distance'] + step['robust_error'] for step in run.trace]
    for result in run.evaluations:
        numbers += [column['error'] for column in result['columns'].values()]
        numbers += [result['n'] / result['n_test'], result['seed']]
        [column['settings'].get('n_queries') or column['settings']['n_iter'] for key, column in
         result['columns'].items() if key not in ('clean', 'worst')]
    if run.hessian:
        numbers += run.hessian['eigen']['values'] + [run.hessian['scale']['mean']]
        numbers += [run.hessian['eigen']['values'][0]]
        numbers += [run.hessian['loss'], run.hessian['robust_error']]
    if run.dead:
        numbers += [layer['share'] + layer['all'] for layer in run.dead['layers'] if layer['layer']]
    for result in filter(None, [run.similarity, run.surface, *run.curves]):
        numbers += [point['robust_error'] for point in result['points']] + [result['n']]
    numbers += [barrier + len(curve['other']) for curve in run.curves
                for barrier in curve['barriers'].values()]
    for result in filter(None, [*run.evaluations, *(getattr(run, name) for name in ANALYSES)]):
        numbers += [0 * len(s['commit'] or '') for s in result['sessions'] if s['device']]
    sum(numbers)


def find(folders):
    """The runs in these folders, each once; all in ckpts/ if none is named."""
    if not folders:
        folders = [path.parent for path in sorted(pathlib.Path('ckpts').glob('*/config.json'))]
    runs = [read(folder) for folder in dict.fromkeys(map(os.path.realpath, folders))]
    by_digest = {run.digest: run for run in runs if run.digest}
    for run in runs:
        run.curves = [(curve, by_digest[curve['other']]) for curve in run.curves
                      if curve['other'] in by_digest]
    return runs


def results(folder, name):
    """What scripts left in `folder` as <name>*.json."""
    try:
        return [record.load(path) for path in sorted(folder.glob(f'{name}*.json'))]
    except ValueError as error:
        raise ValueError(f'{error}; delete it, and its command makes it again') from None


def largest(folder, name, eps, digest):
    """The result <name>*.json in `folder` of the last model at this eps of the most images."""
    usual = {'starts': 'equal', 'directions': 'eigen', 'adversarial': 'regenerate',
             'recompute_bn': False}
    return max((result for result in results(folder, name)
                if (result['eps'], result['digest']) == (eps, digest)
                and all(result.get(key, value) == value for key, value in usual.items())
                and (name != 'hessian' or 'scale' in result)),
               key=lambda result: (name != 'hessian' or all(result['eigen']['converged']),
                                   result['n'], result.get('runs'), len(result.get('points', []))),
               default=None)


def evaluation(run, *columns):
    """The evaluation of most images that has all these columns; None without one."""
    return max((result for result in run.evaluations if set(columns) <= set(result['columns'])),
               key=lambda result: result['n'], default=None)


def alike(runs, *own):
    """Groups of runs that differ in nothing but the settings `own` and the seed.

    With eps may change what the paper ties to it, the steps of PGD and the end of the schedule; a
    run of eps 0 attacks nothing and has no schedule, so it belongs to every group that it fits
    otherwise. ValueError where two runs of a group differ in nothing at all.
    """
    groups, clean = {}, []
    for run in runs:
        free = {*own, *WATCHED} | ({'n_iter', 'step_size', *SCHEDULE} if 'eps' in own else set())
        base = str(sorted((name, value) for name, value in run.config.items() if name not in free))
        if 'eps' not in own:
            groups.setdefault((base, None), []).append(run)
        elif run.eps > 0:
            groups.setdefault((base, tied(run.config)), []).append(run)
        else:
            clean.append((base, run))
    for base, run in clean:
        fitting = [key for key in groups if key[0] == base and key[1]]
        for key in fitting or [(base, '')]:
            groups.setdefault(key, []).append(run)
    for group in groups.values():
        seen = {}
        for run in group:
            key = str([run.seed] + [run.config.get(name) for name in own])
            other = seen.setdefault(key, run)
            if other is not run:
                raise ValueError(f'{other.name} and {run.name} are one and the same run, of seed '
                                 f'{run.seed}; name it once')
        group.sort(key=lambda run: (run.eps, run.seed))
    return [groups[key] for key in sorted(groups, key=str)]


def tied(config):
    """Schedule and steps of a run in a form that does not depend on eps, to which they are tied."""
    usual, eps = data.paper(config['dataset'], config['eps']), config['eps']
    steps = config['n_iter'], round(config['step_size'] / eps, 6)
    if (config['n_iter'], config['step_size']) == (usual['n_iter'], usual['step_size']):
        steps = 'the paper'
    ends = [round(config.get(name, 0) / eps, 6) for name in ('eps_min', 'eps_max')]
    return str((steps, config['eps_sched'], ends if config['eps_sched'] != 'constant' else None))


def departures(config):
    """The names of settings of a run in which it is not the paper's: none for those of Table 1."""
    dataset, model, eps = config['dataset'], config['model'], config['eps']
    usual = data.paper(dataset, eps)
    usual |= {'dataset': 'mnist' if dataset == 'mnist5k' else dataset,
              'model': 'vgg' if dataset == 'cifar10' and model == 'vgg' else usual['model'],
              'eps': data.paper(dataset)['eps'], 'width': 16 if model == 'lenet' else 8,
              'eps_min': 0, 'eps_max': usual['eps_max'].get(config['eps_sched']), 'start': 'step',
              'lr_warmup': 0, 'clock': 'epoch', 'n_train': None, 'precision': 'fp32'}
    unread = {'pgd100_step_size'} | ({'eps_min', 'eps_max'} if config['eps_sched'] == 'constant'
                                     else set())
    names = {name for name, value in usual.items()
             if name not in unread and not equal(config.get(name, value), value)}
    if config['periods'] not in ([config['epochs']], schedule.thirds(max(4, config['epochs']))):
        names.add('periods')
    if dataset == 'mnist' and len(config['periods']) > 1:
        names.add('periodic')
    return names


def usual(runs):
    """Those of the runs whose eps follows its schedule, and their periods, as in the paper."""
    return [run for run in runs
            if not departures(run.config) & {'eps_min', 'eps_max', 'periods'}]


def whole(runs):
    """The runs without Hessians of a part of the training images, and without similarities of fewer
    than 10,000, which are not of the paper's size."""
    def kept(result, least):
        return result if result and result['n'] >= least else None

    return [SimpleNamespace(**vars(run) | {
        'hessian': kept(run.hessian, data.SPLITS[run.config['dataset']]['train'][0]),
        'similarity': kept(run.similarity, 10000)}) for run in runs]


def equal(one, other):
    """Whether two settings are the same, numbers up to rounding."""
    if isinstance(one, float) or isinstance(other, float):
        return None not in (one, other) and math.isclose(one, other)
    return one == other

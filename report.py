"""Tables and figures of runs: `python report.py RUN... --out FOLDER`.

Evaluated runs give table1.md and .csv; analysed ones landscape.md and, for runs that differ in eps,
Figures 2 (trace), 3 (Hessian) and 4 (similarity) as PNG. Runs are put side by side only where they
differ in nothing but schedule, periods and seed (or eps and seed); other sizes get a table of their
own, with its sizes in the head. Over several seeds a number is mean and deviation, 8.58(89) for
8.58 +- 0.89.
"""
import argparse
import csv
import hashlib
import io
import os
import pathlib
import statistics
from types import SimpleNamespace

import numpy as np

import analysis
import attack
import data
import record
import schedule

COLUMNS = {'clean': 'clean', **attack.TITLES, 'worst': 'worst case'}
ANALYSES = 'hessian', 'similarity', 'dead'
MODELS = {'lenet': 'LeNet', 'vgg': 'VGG', 'resnet18': 'ResNet18'}


def collect(folder):
    """Config, log and most complete evaluation (None if there is none) of the run in `folder`."""
    folder = pathlib.Path(folder)
    config = record.config_of(folder)
    results = [record.load(path) for path in folder.glob('evaluate*.json')]
    results = [result for result in results
               if (result['eps'], result['dataset']) == (config['eps'], config['dataset'])]
    log = record.load(folder / 'log.jsonl') if (folder / 'log.jsonl').exists() else []
    best = max(results, key=lambda result: (len(result['columns']), result['n']), default=None)
    return config, log, best


def notation(values):
    """Percent of fractions as the paper prints them: 8.58(89) is 8.58 +- 0.89 over the runs."""
    mean = f'{100 * statistics.mean(values):.2f}'
    return mean if len(values) == 1 else f'{mean}({round(1e4 * statistics.stdev(values))})'


def head(config, result):
    """What the runs of one table have in common, as a sentence."""
    n_train = config['n_train'] or data.SPLITS[config['dataset']]['train'][0]
    attacks = ', '.join(f'{COLUMNS[key]} {describe(column["settings"])}'
                        for key, column in result['columns'].items()
                        if key not in ('clean', 'worst'))
    return (f'{MODELS[config["model"]]} of width {config["width"]} on {n_train:,} images of '
            f'{config["dataset"]}, {config["epochs"]} epochs, batch {config["batch_size"]}, '
            f'{config["optimizer"]} at lr {config["lr"]:g} ({config["lr_sched"]}), '
            f'eps {config["eps"]:.4g}, trained with PGD of {config["n_iter"]} steps of '
            f'{config["step_size"]:.4g}. Errors in percent on {result["n"]:,} of '
            f'{result["n_test"]:,} test images ({attacks}). An image wrong when clean counts as '
            f'not robust; worst case: by any of the attacks.')


def describe(settings):
    """The settings of an attack in a few words."""
    if 'n_queries' in settings:
        return f'{settings["n_queries"]} queries'
    if 'n_restarts' in settings:
        return f'{settings["n_iter"]} iterations x {settings["n_restarts"]} restarts'
    return f'{settings["n_iter"]} x {settings["step_size"]:.3g}'


def tables(folders, quiet=False):
    """(config, result, rows) of each table; a row: label and its runs, (config, log, result)."""
    groups, seen = {}, {}
    for folder in folders:
        config, log, result = collect(folder)
        if result is None:
            if not quiet:
                print(f'{folder} is not evaluated yet, so it is left out')
            continue
        own = ('seed', 'eps_sched', 'eps_min', 'eps_max', 'periods', 'sessions')
        shared = {key: value for key, value in config.items() if key not in own}
        attacks = {key: column.get('settings') for key, column in sorted(result['columns'].items())
                   if key != 'worst'}
        size = str((shared, attacks, result['n'], result['seed']))
        rows = groups.setdefault(size, (config, result, {}))[2]
        rows.setdefault(label(config), []).append((config, log, result))
        other = seen.setdefault((size, label(config), config['seed']), folder)
        if other is not folder:
            raise ValueError(f'{other} and {folder} are one and the same run, of seed '
                             f'{config["seed"]}; name it once')
    for config, result, rows in groups.values():
        order = sorted(rows.items(), key=lambda item: (
            len(item[1][0][0]['periods']), schedule.EPS_SCHEDS.index(item[1][0][0]['eps_sched'])))
        yield config, result, order


def label(config):
    """What tells the runs of a table apart but for the seed: schedule and periods."""
    text, sched, periods = config['eps_sched'], config['eps_sched'], config['periods']
    usual = data.paper(config['dataset'], config['eps'])['eps_max'].get(sched)
    if sched != 'constant' and (config['eps_min'], config['eps_max']) != (0, usual):
        text += f' {config["eps_min"]:.4g} to {config["eps_max"]:.4g}'
    if len(periods) > 1:
        text += f', {" + ".join(map(str, periods))} epochs, ensemble of {len(periods)}'
    return text


def numbers(runs):
    """Errors of each column, (runs,), minutes of training per run, and what else is to be said."""
    errors = {key: [result['columns'][key]['error'] for _, _, result in runs] for key in COLUMNS
              if key in runs[0][2]['columns']}
    minutes = sum(row['seconds'] for _, log, _ in runs for row in log) / 60 / len(runs)
    collapsed = sum(log[-1]['predicted_classes'] == 1 for _, log, _ in runs if log)
    note = f'{collapsed} of {len(runs)} ended as a constant classifier' if collapsed else ''
    return errors, minutes, note


def families(folders):
    """(config, {eps: runs}) of analysed runs that differ in nothing but eps and seed.

    What the paper ties to eps may differ with it: the steps of PGD and the end of the schedule. A
    run: its config, and its trace and analyses as far as they are there, else None.
    """
    found, own = [], ('seed', 'eps', 'sessions', 'trace', 'eps_max')
    for folder in map(pathlib.Path, dict.fromkeys(map(os.path.realpath, folders))):
        config, trace = record.config_of(folder), folder / 'trace.jsonl'
        with analysis.sound(f'a result in {folder}'):
            done = record.finished(folder)
            digest = hashlib.sha256(record.period_files(folder, config)[-1].read_bytes()
                                    ).hexdigest() if done else None
            run = SimpleNamespace(config=config, **{
                name: largest(folder, name, config['eps'], digest) for name in ANALYSES},
                trace=record.load(trace) if done and trace.exists() else None)
            log = record.load(folder / 'log.jsonl') if (folder / 'log.jsonl').exists() else []
            run.constant = (log and log[-1]['predicted_classes'] == 1
                            or run.dead and run.dead['predicted_classes'] == 1)
        if not (run.trace or run.hessian or run.similarity or run.dead):
            continue
        usual = data.paper(config['dataset'], config['eps'])
        steps = config['n_iter'], round(config['step_size'] / (config['eps'] or 1), 6)
        if config['eps'] == 0:
            steps = None  # no attack: such a run goes with any
        elif (config['n_iter'], config['step_size']) == (usual['n_iter'], usual['step_size']):
            steps = 'the paper'
        shared = {name: value for name, value in config.items()
                  if name not in (*own, 'n_iter', 'step_size')}
        ends = round(config['eps_max'] / config['eps'], 6) if config['eps'] else None
        for family in found:
            if family['shared'] == shared and all(
                    None in (mine, its) or mine == its for mine, its in (
                        (steps, family['steps']), (ends, family['ends']))):
                break
        else:
            family = {'shared': shared, 'steps': None, 'ends': None, 'runs': {}}
            found.append(family)
        family['steps'] = family['steps'] or steps
        family['ends'] = family['ends'] or ends
        seeds = family['runs'].setdefault(config['eps'], {})
        if config['seed'] in seeds:
            raise ValueError(f'{folder} is one and the same run as another, of seed '
                             f'{config["seed"]}; name it once')
        seeds[config['seed']] = run
    for family in sorted(found, key=lambda family: str(family['shared'])):
        by_eps = {eps: list(seeds.values()) for eps, seeds in sorted(family['runs'].items())}
        yield max(by_eps.items())[1][0].config, by_eps


def largest(folder, name, eps, digest):
    """The result <name>*.json in `folder` of the last model at this eps of the most images."""
    results = [record.load(path) for path in sorted(folder.glob(f'{name}*.json'))]
    return max((result for result in results if result['eps'] == eps and result['digest'] == digest
                and result.get('starts', 'equal') == 'equal'
                and (name != 'hessian' or 'scale' in result)),
               key=lambda result: (name != 'hessian' or all(result['eigen']['converged']),
                                   result['n'], result.get('runs'), len(result.get('points', []))),
               default=None)


def spread(values, digits=3):
    """Mean and deviation over seeds of what is there: 1.23 +- 0.04."""
    values = [value for value in values if value not in (None, [])]
    if not values:
        return ''
    deviation = f' ± {statistics.stdev(values):.2g}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}g}{deviation}'


def measured(run, a):
    """The numbers of one run in landscape.md, column -> value or None."""
    trace, hessian, points = run.trace, run.hessian, (run.similarity or {}).get('points', [])
    gradient = [row['grad_norm'] for row in trace or []]
    part = min(run.config.get('trace') or 0, max(1, len(gradient) // 2))
    cosine = {point['direction']: point['cosine'] for point in points if point['a'] == a}
    values = trusted(hessian) if hessian else [None]
    if run.constant:  # without gradients PGD stays where it starts
        cosine = {}
    return {
        'L_eps': hessian and hessian['loss'],
        'robust error': hessian and hessian['robust_error'],
        'top eigenvalue': values[0],
        'normalised': values[0] and values[0] / hessian['scale']['mean'],
        f'eigenvalue {len(values)}, magnitude': values[-1] and abs(values[-1]),
        f'cosine, top, a = {a:g}': cosine.get('eigenvector'),
        f'cosine, random, a = {a:g}': cosine.get('random'),
        'gradient, first tenth': gradient and statistics.mean(gradient[:max(1, part // 10)]),
        'gradient, last': gradient and statistics.mean(gradient[-part:]),
        'distance': gradient and trace[part - 1]['distance'],
        'constant': float(bool(run.constant)),
    } | {f'dead {row["layer"]}': row['share'] for row in (run.dead or {}).get('layers', [])}


def trusted(hessian):
    """The eigenvalues of a result, None for those that have not converged."""
    return [value if good else None for value, good in
            zip(hessian['eigen']['values'], hessian['eigen']['converged'])]


def landscape(folders, out, a):
    """Draws the figures of analysed runs; returns the text of landscape.md, '' without any."""
    text, stems = '', []
    for head, by_eps in families(folders):
        out.mkdir(parents=True, exist_ok=True)
        runs = [run for group in by_eps.values() for run in group]
        sizes = {name: sorted({getattr(run, name)['n'] for run in runs if getattr(run, name)})
                 for name in ANALYSES}
        traced = head.get('trace')
        n_train = head['n_train'] or data.SPLITS[head['dataset']]['train'][0]
        title = (f'{MODELS[head["model"]]} of width {head["width"]}, {head["eps_sched"]} schedule, '
                 f'{n_train:,} images of {head["dataset"]}')
        text += (f'{title}, {head["epochs"]} epochs, batch {head["batch_size"]}, '
                 f'{head["optimizer"]} at lr {head["lr"]:g} ({head["lr_sched"]}), PGD of '
                 f'{head["n_iter"]} steps of '
                 f'{head["step_size"]:.4g} at eps {head["eps"]:.4g}. Of the training images, '
                 + ', '.join(f'{" or ".join(map(str, size))} for {name}'
                             for name, size in sizes.items() if size)
                 + '. Mean ± deviation over seeds.'
                 + ' Gradient norms are means over the first tenth of the updates traced at the '
                   'start, {0}, and over the last {0}; the distance is that from theta_0 at '
                   'update {0}. Constant is the share of constant classifiers, whose cosines mean '
                   'nothing and are left out.'.format(traced) * bool(traced) + '\n\n')
        with analysis.sound('a result of one of these runs'):
            rows = {eps: [measured(run, a) for run in group] for eps, group in by_eps.items()}
        columns = list(dict.fromkeys(
            name for group in rows.values() for row in group for name, value in row.items()
            if value not in (None, [])))
        text += '| eps | seeds | ' + ' | '.join(columns) + ' |\n'
        text += '|---' * (len(columns) + 2) + '|\n'
        for eps, group in rows.items():
            cells = [spread([row.get(name) for row in group]) for name in columns]
            text += f'| {eps:.4g} | {len(group)} | ' + ' | '.join(cells) + ' |\n'
        made = {(name, s['commit'], s['torch'], s['device']) for run in runs for name in ANALYSES
                for s in (getattr(run, name) or {'sessions': []})['sessions']}
        text += ''.join(f'\n{name}: commit {commit}, torch {torch}, {device}'
                        for name, commit, torch, device in sorted(made, key=str)) + '\n\n'
        if len(by_eps) == 1:
            print(f'no figures of {title} at eps {head["eps"]:.4g} alone: runs are put together if '
                  'they differ in eps and seed only, and --step-size in proportion to eps')
        else:
            stem = '_'.join(str(head[key]) for key in ('dataset', 'model', 'width', 'eps_sched'))
            stems.append(stem)
            stem += f'_{stems.count(stem)}' * (stems.count(stem) > 1)
            for name, draw in (('fig2', figure_2), ('fig3', figure_3), ('fig4', figure_4)):
                draw(by_eps, out / f'{name}_{stem}.png', title)
    return text


def connections(folders):
    """The table of C.2.5: how high the loss rises between two runs; '' without such a study."""
    text = ''
    for path in (path for folder in folders
                 for path in sorted(pathlib.Path(folder).glob('connect*.json'))):
        result = record.load(path)
        with analysis.sound(path):
            cells = [f'{result["eps"]:.4g}', path.parent.resolve().name, result['n'],
                     f'{result["curve"]}, {result["n_control"]} points, {result["epochs"]} epochs']
            for kind in 'line', result['curve']:
                points = [point for point in result['points'] if point['path'] == kind]
                if 'barriers' not in result or len(points) < 3:
                    break
                cells += [f'{max(point["loss"] for point in points):.3g}',
                          f'{result["barriers"][kind]:.3g}',
                          f'{max(point["robust_error"] for point in points):.1%}']
            else:
                text += '| ' + ' | '.join(map(str, cells)) + ' |\n'
    head = ('eps', 'run', 'images', 'curve', 'line: L_eps', 'barrier', 'error', 'curve: L_eps',
            'barrier', 'error')
    return text and ('Between two runs, the highest values along the path (barrier: L_eps above '
                     'that of the higher end):\n\n| ' + ' | '.join(head) + ' |\n'
                     + '|---' * len(head) + f'|\n{text}\n')


def band(ax, x, curves, label, **style):
    """The mean of the curves of all seeds, (seeds, len(x)), in a band of one deviation."""
    curves = np.array(curves)
    line, = ax.plot(x, curves.mean(0), label=label, **style)
    if len(curves) > 1:
        half = curves.std(0, ddof=1).clip(max=.9 * np.abs(curves.mean(0)))  # for log axes
        ax.fill_between(x, curves.mean(0) - half, curves.mean(0) + half, alpha=.2,
                        color=line.get_color(), lw=0)


def figure_2(by_eps, path, title):
    """Gradient norm, robust training error and distance over the first and last updates."""
    by_eps = {eps: [run for run in runs if run.trace] for eps, runs in by_eps.items()}
    if not any(by_eps.values()):
        return
    with analysis.figure(path, 2, title, rows=2) as axes:
        panels = (('grad_norm', 'norm of the stochastic gradient', slice(None, 1)),
                  ('robust_error', 'robust training error of the batch', slice(None, 1)),
                  ('distance', '$||\\theta - \\theta_0||$', slice(None, 1)),
                  ('grad_norm', 'norm of the stochastic gradient', slice(-1, None)))
        for ax, (key, label, side) in zip(axes, panels):
            for eps, runs in by_eps.items():
                if not runs:
                    continue
                n = min(min(run.config['trace'], max(1, len(run.trace) // 2)) for run in runs)
                rows = [run.trace[:n] if side.stop else run.trace[-n:] for run in runs]
                window = max(1, n // 40)  # means of so many updates: batches differ
                cut = [np.array([row[key] for row in part])[:n // window * window]
                       .reshape(-1, window).mean(1) for part in rows]
                steps = rows[0][0]['step'] + window * (np.arange(len(cut[0])) + .5)
                band(ax, steps, cut, f'eps {eps:.4g}')
            ax.set(xlabel='update', ylabel=label, title='the end' if side.start else 'the start')
            if key == 'grad_norm':
                ax.set_yscale('log')
            else:
                ax.set_ylim(0, 1 if key == 'robust_error' else None)
        axes[0].legend(loc='lower right', fontsize=8)


def figure_3(by_eps, path, title):
    """Top eigenvalues of the Hessian, as they are (dashed) and normalised (solid)."""
    by_eps = {eps: [run.hessian for run in runs if run.hessian] for eps, runs in by_eps.items()}
    if not any(by_eps.values()):
        return
    with analysis.figure(path, 2, title) as axes:
        for eps, results in by_eps.items():
            if not results:
                continue
            k = min(len(result['eigen']['values']) for result in results)
            values = [np.abs(np.array(trusted(result)[:k], float)) for result in results]
            scaled = [value / result['scale']['mean'] for value, result in zip(values, results)]
            band(axes[0], range(1, k + 1), scaled, f'eps {eps:.4g}', marker='o', ms=3)
            band(axes[1], range(1, k + 1), values, f'eps {eps:.4g}', marker='o', ms=3, ls='--')
        axes[0].set(title='divided by the mean $L_\\epsilon$ of random $\\theta$')
        axes[1].set(title='as they are')
        for ax in axes:
            ax.set(xlabel='number, by magnitude')
            ax.locator_params(axis='x', integer=True)
            ax.set_yscale('log')
        axes[0].set(ylabel='|eigenvalue| / mean $L_\\epsilon$')
        axes[1].set(ylabel='|eigenvalue of the Hessian|')
        axes[0].legend()


def figure_4(by_eps, path, title):
    """Cosine similarity of perturbations along the top eigenvector (dashed) and at random."""
    by_eps = {eps: [run.similarity for run in runs if run.similarity and not run.constant]
              for eps, runs in by_eps.items() if eps > 0}
    if not any(by_eps.values()):
        return
    with analysis.figure(path, 2, title) as axes:
        for ax, key in zip(axes, ('cosine', 'robust_error')):
            for i, (eps, results) in enumerate(by_eps.items()):
                for direction, style in (('eigenvector', '--'), ('random', '-')):
                    curves = [{point['a']: point[key] for point in result['points']
                               if point['direction'] == direction} for result in results]
                    a = sorted(set.intersection(*map(set, curves))) if curves else []
                    a = [x for x in a if all(curve[x] is not None for curve in curves)]
                    if a:
                        band(ax, a, [[curve[x] for x in a] for curve in curves],
                             f'eps {eps:.4g}, {direction}', ls=style, color=f'C{i}')
            ax.set(xlabel='$a$')
        axes[0].set(ylabel='cosine similarity', title='perturbations at $\\theta \\pm av$')
        axes[1].set(ylabel='robust error', title='at $\\theta \\pm av$', ylim=(0, 1))
        axes[0].legend(fontsize=7, handlelength=4)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folders')
    parser.add_argument('--out', default='results', help='folder to write to; default: results')
    parser.add_argument('--a', type=record.number(float, 0), default=.1,
                        help='displacement whose similarities landscape.md shows; default: 0.1')
    args = parser.parse_args(argv)
    out, table = pathlib.Path(args.out), io.StringIO()
    analysed = landscape(args.runs, out, args.a) + connections(args.runs)
    if analysed:
        out.mkdir(parents=True, exist_ok=True)
        record.replace(out / 'landscape.md', lambda file: file.write(analysed.encode()))
        print(f'{analysed}written to {out}/landscape.md')
    text, cells = '', [['dataset', 'model', 'width', 'eps', 'epochs', 'n', 'schedule', 'runs',
                        *COLUMNS, 'train_minutes', 'notes']]
    for config, result, rows in tables(args.runs, quiet=bool(analysed)):
        text += head(config, result) + '\n\n'
        text += '| schedule | ' + ' | '.join(COLUMNS.values()) + ' | minutes | |\n'
        text += '|---' * (len(COLUMNS) + 3) + '|\n'
        for name, runs in rows:
            errors, minutes, note = numbers(runs)
            shown = [notation(errors[key]) if key in errors else 'missing' for key in COLUMNS]
            text += f'| {name} | ' + ' | '.join(shown) + f' | {minutes:.1f} | {note} |\n'
            means = [round(100 * statistics.mean(errors[key]), 4) if key in errors else ''
                     for key in COLUMNS]
            cells.append([config['dataset'], config['model'], config['width'], config['eps'],
                          config['epochs'], result['n'], name, len(runs), *means,
                          round(minutes, 2), note])
        sessions = {(s['commit'], s['torch'], s['device']) for s in result['sessions']}
        text += ''.join(f'\ncommit {commit}, torch {torch}, {device}'
                        for commit, torch, device in sorted(sessions, key=str)) + '\n\n'
    if not text:
        if analysed:
            return
        raise ValueError('none of these runs is evaluated yet: python evaluate.py RUN...')
    csv.writer(table, lineterminator='\n').writerows(cells)
    out.mkdir(parents=True, exist_ok=True)
    record.replace(out / 'table1.md', lambda file: file.write(text.encode()))
    record.replace(out / 'table1.csv', lambda file: file.write(table.getvalue().encode()))
    print(text + f'written to {out}/table1.md and {out}/table1.csv')


if __name__ == '__main__':
    record.run(main)

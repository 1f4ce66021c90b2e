"""Tables of evaluated runs: `python report.py RUN... --out FOLDER` writes FOLDER/table1.{md,csv}.

Runs are put side by side only where they differ in nothing but schedule, periods and seed; other
sizes get a table of their own, with its sizes in the head. Over several seeds a number is mean and
deviation, 8.58(89) for 8.58 +- 0.89.
"""
import argparse
import csv
import io
import pathlib
import statistics

import attack
import data
import record
import schedule

COLUMNS = {'clean': 'clean', **attack.TITLES, 'worst': 'worst case'}
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


def tables(folders):
    """(config, result, rows) of each table; a row: label and its runs, (config, log, result)."""
    groups, seen = {}, {}
    for folder in folders:
        config, log, result = collect(folder)
        if result is None:
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folders')
    parser.add_argument('--out', default='results', help='folder to write to; default: results')
    args = parser.parse_args(argv)
    text, cells = '', [['dataset', 'model', 'width', 'eps', 'epochs', 'n', 'schedule', 'runs',
                        *COLUMNS, 'train_minutes', 'notes']]
    for config, result, rows in tables(args.runs):
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
        raise ValueError('none of these runs is evaluated yet: python evaluate.py RUN...')
    out, table = pathlib.Path(args.out), io.StringIO()
    csv.writer(table, lineterminator='\n').writerows(cells)
    out.mkdir(parents=True, exist_ok=True)
    record.replace(out / 'table1.md', lambda file: file.write(text.encode()))
    record.replace(out / 'table1.csv', lambda file: file.write(table.getvalue().encode()))
    print(text + f'written to {out}/table1.md and {out}/table1.csv')


if __name__ == '__main__':
    record.run(main)

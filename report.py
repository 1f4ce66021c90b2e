"""Tables, figures and claims of runs, beside the paper's: `python report.py [RUN...]`.

Without RUN, of all runs in ckpts/. Into --out go table1.md and .csv, landscape.md with the numbers
behind Figures 2 to 4, the figures as PNG, and claims.md, which says of each claim of the paper
whether it holds. What is not measured yet is called missing. Runs are put side by side only where
they differ in nothing but schedule, periods and seed (or eps and seed); those that are not of the
paper's size get tables of their own. Over several seeds a number is mean and deviation, 8.58(89)
for 8.58 +- 0.89.
"""
import argparse
import csv
import io
import pathlib
import statistics

import analysis
import attack
import claims
import data
import figures
import record
import schedule
import study

COLUMNS = {'clean': 'clean', **attack.TITLES, 'worst': 'worst case'}

# Table 1 of the paper: dataset, model, periodic, schedule; clean and the five attacks, percent
PAPER = '''
mnist   lenet    no  constant  1.56(17)  8.58(89) 10.86(143) 15.18(155) 14.70(136) 19.58(45)
mnist   lenet    no  cosine    1.08(2)   6.64(70)  8.46(82)  14.36(134) 13.46(129) 16.78(25)
mnist   lenet    no  linear    1.06(6)   6.69(59)  8.79(116) 13.91(150) 13.17(120) 17.05(47)
cifar10 vgg      no  constant 28.25(47) 56.22(43) 56.19(32)  58.18(46)  58.65(69)  54.37(29)
cifar10 vgg      no  cosine   25.06(19) 56.06(48) 56.00(42)  57.83(45)  58.88(16)  53.95(15)
cifar10 vgg      no  linear   23.56(95) 56.09(14) 55.88(5)   57.74(16)  58.39(18)  53.66(24)
cifar10 vgg      yes constant 28.33(81) 54.24(28) 54.16(26)  55.45(26)  56.56(4)   52.85(18)
cifar10 vgg      yes cosine   23.91(21) 53.18(21) 53.10(18)  54.44(16)  55.80(24)  51.41(37)
cifar10 vgg      yes linear   21.88(33) 53.03(14) 52.97(17)  54.32(17)  55.63(17)  51.28(4)
cifar10 resnet18 no  constant 18.62(6)  55.00(8)  54.97(9)   57.26(13)  56.60(25)  50.59(19)
cifar10 resnet18 no  cosine   18.43(26) 53.95(23) 53.85(21)  56.16(18)  55.77(24)  49.60(18)
cifar10 resnet18 no  linear   18.55(14) 53.46(20) 53.41(10)  55.69(17)  55.45(22)  49.66(28)
cifar10 resnet18 yes constant 21.00(5)  48.98(25) 48.87(25)  50.29(27)  50.98(6)   46.84(9)
cifar10 resnet18 yes cosine   19.90(18) 48.57(25) 48.49(27)  49.71(22)  50.54(9)   46.19(11)
cifar10 resnet18 yes linear   20.26(28) 48.60(13) 48.52(13)  49.73(9)   50.68(11)  46.47(26)
'''


def paper():
    """(dataset, model) -> (periodic, schedule, column) -> the paper's mean and deviation."""
    table = {}
    for dataset, model, periodic, sched, *cells in map(str.split, PAPER.strip().splitlines()):
        for column, cell in zip(COLUMNS, cells):
            mean, deviation = cell.rstrip(')').split('(')
            table.setdefault((dataset, model), {})[periodic == 'yes', sched, column] = (
                float(mean), int(deviation) / 100)
    return table


def notation(values):
    """Percent of fractions as the paper prints them: 8.58(89) is 8.58 +- 0.89 over the runs."""
    mean = f'{100 * statistics.mean(values):.2f}'
    return mean if len(values) == 1 else f'{mean}({round(1e4 * statistics.stdev(values))})'


def beside(values, mean, deviation):
    """A cell of the table at the paper's size: ours / the paper's / difference in deviations.

    These are the deviations of both, sqrt(s^2 + s'^2), or the paper's alone for a single run.
    """
    theirs = f'{mean:.2f}({round(100 * deviation)})'
    if not values:
        return f'missing / {theirs}'
    own = 100 * statistics.stdev(values) if len(values) > 1 else 0.
    apart = (100 * statistics.mean(values) - mean) / (own ** 2 + deviation ** 2) ** .5
    return f'{notation(values)} / {theirs} / {apart:+.1f}'


def evaluated(runs):
    """(run, its result of most columns and images) of the runs that are evaluated."""
    return [(run, max(run.evaluations, key=lambda result: (len(result['columns']), result['n'])))
            for run in runs if run.evaluations]


def at_full_size(run, result):
    """Whether a run and its evaluation are what Table 1 of the paper has, in whatever precision."""
    return result['n'] == result['n_test'] and not study.departures(run.config) - {'precision'}


def full_table(pairs):
    """Table 1 as the paper has it; `pairs` are runs at full size and their results."""
    sessions = {session for run, result in pairs for session in made(run, result)}
    text = ("Percent on 10,000 test images, 8.58(89) for 8.58 ± 0.89 over seeds: ours / the paper's "
            "/ the difference in standard deviations, of ours and the paper's together. Worst "
            'case: by any of the attacks; the paper has no such column.\n\n'
            '| task | periodic | eps | ' + ' | '.join(COLUMNS.values()) + ' | runs | minutes |\n'
            + '|---' * (len(COLUMNS) + 5) + '|\n')
    for (dataset, model), cells in paper().items():
        for periodic, sched in dict.fromkeys((key[:2] for key in cells)):
            row = [(run, result) for run, result in pairs if (
                run.config['dataset'], run.config['model'], len(run.config['periods']) > 1,
                run.config['eps_sched']) == (dataset, model, periodic, sched)]
            shown = []
            for column, values in columns(row).items():
                shown.append(beside(values, *cells[periodic, sched, column])
                             if (periodic, sched, column) in cells
                             else notation(values) if values else 'missing')
            text += (f'| {claims.TASKS[dataset, model]} | {"yes" if periodic else "no"} | {sched} '
                     '| ' + ' | '.join(shown) + f' | {counted(row)} | {minutes(row)} |\n')
    return text + signed(sessions)


def made(run, result):
    """Who computed a run and its evaluation: (what, commit, torch, device)."""
    return {(what, s['commit'], s['torch'], s['device']) for what, sessions in (
        ('trained', run.config['sessions']), ('evaluated', result['sessions'])) for s in sessions}


def signed(sessions):
    """What a table says of who made it."""
    return ''.join(f'\n{what}: commit {commit}, torch {torch}, {device}'
                   for what, commit, torch, device in sorted(sessions, key=str)) + '\n\n'


def minutes(row):
    """Mean minutes of training of (run, result)s, '' without any."""
    seconds = [sum(epoch['seconds'] for epoch in run.log) for run, _ in row if run.log]
    return f'{statistics.mean(seconds) / 60:.1f}' if seconds else ''


def small_tables(pairs):
    """(head, sessions, [(label, pairs)]) of runs that are not at full size, by what they share."""
    by_size = {}
    for run, result in pairs:
        attacks = {key: column.get('settings') for key, column in sorted(result['columns'].items())
                   if key != 'worst'}
        by_size.setdefault(str((attacks, result['n'], result['seed'])), []).append((run, result))
    for group in by_size.values():
        results = {id(run): result for run, result in group}
        for runs in study.alike([run for run, _ in group], 'periods', 'lr', 'lr_warmup',
                                *study.SCHEDULE):
            rows, rates = {}, {run.config['lr'] for run in runs}
            for run in sorted(runs, key=lambda run: (
                    run.config['lr'], len(run.config['periods']),
                    schedule.EPS_SCHEDS.index(run.config['eps_sched']), run.seed)):
                rate = f', lr {run.config["lr"]:g}' * (len(rates) > 1)
                rows.setdefault(label(run.config) + rate, []).append((run, results[id(run)]))
            pairs = [pair for row in rows.values() for pair in row]
            yield (head(*pairs[0], len(rates)), {s for pair in pairs for s in made(*pair)}, rows)


def head(run, result, rates):
    """What the runs of a table with so many learning rates have in common, as a sentence."""
    config = run.config
    n_train = config.get('n_train') or data.SPLITS[config['dataset']]['train'][0]
    attacks = ', '.join(f'{COLUMNS[key]} {describe(column["settings"])}'
                        for key, column in result['columns'].items()
                        if key not in ('clean', 'worst'))
    return (f'{figures.MODELS[config["model"]]} of width {config["width"]} on {n_train:,} images '
            f'of {config["dataset"]}, {config["epochs"]} epochs, batch {config["batch_size"]}, '
            f'{config["optimizer"]}' + f' at lr {config["lr"]:g}' * (rates == 1)
            + f' ({config["lr_sched"]})'
            + f', {config.get("precision")}' * (config.get('precision', 'fp32') != 'fp32')
            + f', eps {config["eps"]:.4g}, trained with PGD of {config["n_iter"]} steps of '
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


def label(config):
    """What tells the runs of a table apart but for the seed: schedule and periods."""
    text, sched, periods = config['eps_sched'], config['eps_sched'], config['periods']
    usual = data.paper(config['dataset'], config['eps'])['eps_max'].get(sched)
    if sched != 'constant' and (config['eps_min'], config['eps_max']) != (0, usual):
        text += f' {config["eps_min"]:.4g} to {config["eps_max"]:.4g}'
    if config.get('lr_warmup'):
        text += f', lr warm-up {config["lr_warmup"]:g}'
    if len(periods) > 1:
        text += f', {" + ".join(map(str, periods))} epochs, ensemble of {len(periods)}'
    return text


def table_1(runs):
    """The texts of table1.md, what there is of the paper's size first, and of table1.csv."""
    pairs, table = evaluated(runs), io.StringIO()
    whole = [pair for pair in pairs if at_full_size(*pair)]
    rows = [[*SETTINGS, 'n', 'schedule', 'runs', *COLUMNS,
             *(f'{column}_deviation' for column in COLUMNS), 'train_minutes', 'notes']]
    small = ''
    for title, sessions, labelled in small_tables([p for p in pairs if not at_full_size(*p)]):
        small += (f'{title}\n\n| schedule | ' + ' | '.join(COLUMNS.values())
                  + ' | runs | minutes | |\n' + '|---' * (len(COLUMNS) + 4) + '|\n')
        for name, row in labelled.items():
            errors = columns(row)
            cells = [notation(errors[key]) if errors[key] else 'missing' for key in COLUMNS]
            small += (f'| {name} | ' + ' | '.join(cells)
                      + f' | {len(row)} | {minutes(row)} | {note(row)} |\n')
            rows.append(numbers(name, row))
        small += signed(sessions)
    for periodic in False, True:
        by_kind = {}
        for pair in whole:
            if (len(pair[0].config['periods']) > 1) == periodic:
                config = pair[0].config
                by_kind.setdefault((config['dataset'], config['model'], config.get('precision'),
                                    label(config)), []).append(pair)
        rows += [numbers(kind[-1], row) for kind, row in by_kind.items()]
    csv.writer(table, lineterminator='\n').writerows(rows)
    by_precision = {}
    for run, result in whole:
        by_precision.setdefault(run.config.get('precision', 'fp32'), []).append((run, result))
    parts = [f"## Table 1 at the paper's size{f', trained in {p}' * (p != 'fp32')}\n\n"
             + full_table(by_precision[p]) for p in sorted(by_precision)[::-1]]
    parts = parts or ["## Table 1 at the paper's size\n\n" + full_table([])]
    parts.insert(len(parts) if whole else 0, small and '## Other sizes and settings\n\n' + small)
    return '# Table 1\n\n' + ''.join(parts), table.getvalue()


def columns(row):
    """Errors of the runs of a row, fractions, by column; the worst of some attacks is no worst."""
    full = any(complete(result) for _, result in row)
    return {key: [result['columns'][key]['error'] for _, result in row if key in result['columns']
                  and (key != 'worst' or complete(result) == full)] for key in COLUMNS}


def complete(result):
    """Whether a result has all attacks."""
    return set(claims.ATTACKS) <= set(result['columns'])


def counted(row):
    """How many runs a row has."""
    n = sum(complete(result) for _, result in row)
    return f'{len(row)}' + f', {n} with all attacks' * (n < len(row))


def note(row):
    """What else is to be said of the runs of a row."""
    collapsed = sum(run.constant for run, _ in row)
    return f'{collapsed} of {len(row)} ended as a constant classifier' * bool(collapsed)


SETTINGS = ('dataset', 'n_train', 'model', 'width', 'eps', 'epochs', 'batch_size', 'optimizer',
            'lr', 'lr_sched', 'lr_warmup', 'clock', 'step_size', 'n_iter', 'precision')


def numbers(name, row):
    """A line of table1.csv: means and deviations in percent."""
    config, errors = row[0][0].config, columns(row)
    means = [round(100 * statistics.mean(values), 4) if values else '' for values in
             errors.values()]
    deviations = [round(100 * statistics.stdev(values), 4) if len(values) > 1 else ''
                  for values in errors.values()]
    return [*(config.get(key) for key in SETTINGS), row[0][1]['n'], name, len(row), *means,
            *deviations, minutes(row), note(row)]


def spread(values, digits=3):
    """Mean and deviation of what is there: 1.23 ± 0.04; of how many seeds, if not of all."""
    n, values = len(values), [value for value in values if value not in (None, [])]
    if not values:
        return ''
    deviation = f' ± {statistics.stdev(values):.2g}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}g}{deviation}' + f' ({len(values)})' * (
        len(values) < n)


def measured(run, a):
    """The numbers of one run in landscape.md, column -> value or None."""
    trace, hessian, points = run.trace, run.hessian, (run.similarity or {}).get('points', [])
    cosine = {point['direction']: point['cosine'] for point in points if point['a'] == a}
    values = figures.trusted(hessian) if hessian else [None]
    if run.constant:  # without gradients PGD stays where it starts
        cosine = {}
    return {
        'L_eps': hessian and hessian['loss'],
        'robust error': hessian and hessian['robust_error'],
        'top eigenvalue': values[0],
        'normalised': claims.sharpness(run),
        f'eigenvalue {len(values)}, magnitude': values[-1] and abs(values[-1]),
        f'cosine, top, a = {a:g}': cosine.get('eigenvector'),
        f'cosine, random, a = {a:g}': cosine.get('random'),
        'gradient, first tenth': claims.gradient(run, end=False) if trace else None,
        'gradient, last': claims.gradient(run, end=True) if trace else None,
        'distance': trace[claims.traced(run) - 1]['distance'] if trace else None,
        'constant': float(run.constant),
    } | {f'dead {row["layer"]}': row['share'] for row in (run.dead or {}).get('layers', [])}


def landscape(runs, a):
    """The text of landscape.md, '' without any analysed run."""
    text = ''
    for group in study.alike([run for run in runs if run.trace or any(
            getattr(run, name) for name in study.ANALYSES)], 'eps'):
        sizes = {name: sorted({getattr(run, name)['n'] for run in group if getattr(run, name)})
                 for name in study.ANALYSES}
        config = group[-1].config
        traced = ' or '.join(map(str, sorted({claims.traced(run) for run in group if run.trace})))
        text += (figures.title(group).replace('\n', ', ') + f', batch {config["batch_size"]}, PGD '
                 f'of {config["n_iter"]} steps of {config["step_size"]:.4g} at eps '
                 f'{config["eps"]:.4g}. '
                 + ('Of the training images, ' + ', '.join(
                     f'{" or ".join(map(str, size))} for {name}'
                     for name, size in sizes.items() if size) + '. ') * any(sizes.values())
                 + 'Mean ± deviation over seeds.'
                 + ' Gradient norms are means over the first tenth of the updates traced at the '
                   'start, {0}, and over the last {0}; the distance is that from theta_0 at '
                   'update {0}.'.format(traced) * bool(traced)
                 + ' Constant is the share of constant classifiers, whose cosines mean nothing and '
                   'are left out.\n\n')
        rows = {}
        with analysis.sound('a result of one of these runs'):
            for run in group:
                rows.setdefault(run.eps, []).append(measured(run, a))
        names = list(dict.fromkeys(name for found in rows.values() for row in found
                                   for name, value in row.items() if value not in (None, [])))
        text += '| eps | seeds | ' + ' | '.join(names) + ' |\n' + '|---' * (len(names) + 2) + '|\n'
        for eps, found in rows.items():
            cells = [spread([row.get(name) for row in found]) for name in names]
            text += f'| {eps:.4g} | {len(found)} | ' + ' | '.join(cells) + ' |\n'
        text += signed({(name, s['commit'], s['torch'], s['device']) for run in group
                        for name in study.ANALYSES
                        for s in (getattr(run, name) or {'sessions': []})['sessions']})
    return text


def connections(runs):
    """The table of C.2.5: how high the loss rises between two runs; '' without such a study."""
    text = ''
    for run, curve in ((run, curve) for run in runs for curve, _ in run.curves):
        with analysis.sound(f'a curve of {run.name}'):
            cells = [f'{run.eps:.4g}', run.name, curve['n'],
                     f'{curve["curve"]}, {curve["n_control"]} points, {curve["epochs"]} epochs']
            for kind in 'line', curve['curve']:
                points = [point for point in curve['points'] if point['path'] == kind]
                cells += [f'{max(point["loss"] for point in points):.3g}',
                          f'{curve["barriers"][kind]:.3g}',
                          f'{max(point["robust_error"] for point in points):.1%}']
            text += '| ' + ' | '.join(map(str, cells)) + ' |\n'
    head = ('eps', 'run', 'images', 'curve', 'line: L_eps', 'barrier', 'error', 'curve: L_eps',
            'barrier', 'error')
    return text and ('Between two runs, the highest values along the path (barrier: L_eps above '
                     'that of the higher end):\n\n| ' + ' | '.join(head) + ' |\n'
                     + '|---' * len(head) + f'|\n{text}\n')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('runs', nargs='*', metavar='RUN', help='run folders; default: all in ckpts/')
    add('--empty', action='store_true', help='no run at all, not even those in ckpts/')
    add('--out', default='results', help='folder to write to; default: results')
    add('--theory', default='evals/theory.json',
        help='what landscape.py theory wrote; default: evals/theory.json')
    add('--a', type=record.number(float, 0), default=.1,
        help='displacement whose similarities landscape.md shows; default: 0.1')
    add('--wait', action='store_true',
        help='wait for another report.py; default: end with an error')
    args = parser.parse_args(argv)
    out = pathlib.Path(args.out)
    with record.lock(out, args.wait):
        runs = [] if args.empty else study.find(args.runs)
        theory = record.load(args.theory) if pathlib.Path(args.theory).exists() else {}
        with analysis.sound(f'one of these runs, or {args.theory},'):
            table, cells = table_1(runs)
            checked = claims.check(runs, theory, paper())
            texts = {'table1.md': table, 'table1.csv': cells,
                     'landscape.md': landscape(runs, args.a) + connections(runs),
                     'claims.md': claims.text(checked)}
            written = figures.draw(runs, theory, out)
        for name, text in texts.items():
            if text:
                record.replace(out / name, lambda file: file.write(text.encode()))
                written.append(name)
        older = sorted({path.name for path in out.iterdir() if path.is_file()}
                       - {*written, '.lock'})
    waiting = [run.name for run in runs if not run.evaluations]
    if waiting:
        print(f'{len(waiting)} of {len(runs)} runs are not evaluated, so not in table1.md: '
              + ', '.join(waiting))
    shown = table.split('## ')[1] if any(run.evaluations for run in runs) else ''
    print(f'{shown}{claims.summary(checked)}written to {out}: {", ".join(sorted(written))}'
          + f'\nnot of these runs, or older: {", ".join(older)}' * bool(older))


if __name__ == '__main__':
    record.run(main)

"""The claims of the paper, each with what was measured, an interval over seeds, and a verdict.

Every quantity is turned so that the claim says it is above 0. Runs are compared only within groups
that differ in nothing but what the claim is about; the paper's size and smaller ones stay apart.
"""
import math
import statistics
from types import SimpleNamespace

import attack
import figures
import study

RULE = ('of 2 seeds or more that differ: holds if the whole interval is above 0, does not if none '
        'of it is, else not enough data')
EACH = 'holds if each value is above 0, else does not'
COUNT = ('of 3 seeds or more: holds if each value is above 0, does not if none is, else not enough '
         'data')
ATTACKS = tuple(attack.TITLES)
TASKS = {('mnist', 'lenet'): 'MNIST LeNet', ('cifar10', 'vgg'): 'CIFAR10 VGG',
         ('cifar10', 'resnet18'): 'CIFAR10 ResNet18'}
# 97.5 % quantile of Student's t, by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
     10: 2.228, 15: 2.131, 20: 2.086, 30: 2.042}


def interval(values):
    """Mean and 95 % t interval of independent values, (mean, low, high); None of fewer than 2."""
    if len(values) < 2:
        return None
    mean, freedom = statistics.mean(values), len(values) - 1
    half = T[max(df for df in T if df <= freedom)] * statistics.stdev(values) / len(values) ** .5
    return mean, mean - half, mean + half


def verdict(values, rule=RULE):
    """What the rule says: RULE for numbers, COUNT for counts, of which no interval is known."""
    if rule == COUNT and len(values) >= 3:
        low, high = min(values), max(values)
    elif rule == RULE and len(set(values)) >= 2:  # equal ones, of few images, deceive
        _, low, high = interval(values)
    else:
        return 'not enough data'
    return 'holds' if low > 0 else 'does not' if high <= 0 else 'not enough data'


def row(claim, where, measured, values=(), of_paper='', note='', unit='seed', rule=RULE):
    """A row of claims.md; `values`, one a seed, are in the unit that `measured` says."""
    found = interval(values)
    ours = '' if not values else f'{values[0]:.3g}' if not found else (
        '{:.3g} ({:.3g} to {:.3g})'.format(*found) if rule == RULE else
        ', '.join(f'{value:g}' for value in values))
    return SimpleNamespace(
        claim=claim, where=where, measured=measured, ours=ours, of_paper=of_paper, values=values,
        n=f'{len(values)} {unit}{"s" * (len(values) != 1)}' + f', {note}' * bool(note),
        verdict=verdict(values, rule), rule=rule)


def exact(claim, measured, values, of_paper):
    """A row whose values are no sample but all there is, so that each must agree."""
    verdict = 'holds' if values and min(values) > 0 else 'does not' if values else 'not enough data'
    return SimpleNamespace(
        claim=claim, where='', measured=measured, of_paper=of_paper, values=values,
        ours=f'at least {min(values):.3g}' if values else '', n=f'{len(values)} cases',
        verdict=verdict, rule=EACH)


def images(n):
    """So many test images, '' if there is no measurement."""
    return f'{n:,} test images' if n else ''


def of_table(group, paper):
    """Table 1: a warm-up of eps beats a constant one; the ensemble of periods beats the last model.

    group: runs that differ in schedule, periods and seed, with evaluations of all columns alike;
    paper: (periodic, schedule, column) -> the paper's mean and deviation, in percent.
    """
    errors, n = {}, None
    for run in study.usual(group):
        result = study.evaluation(run, 'clean', *ATTACKS)
        columns, n = result['columns'], result['n']
        key = len(run.config['periods']) > 1, run.config['eps_sched']
        errors.setdefault(key, {})[run.seed] = {
            'clean': 100 * columns['clean']['error'],
            'robust': 100 * statistics.mean(columns[name]['error'] for name in ATTACKS)}

    def difference(worse, better, kind):
        a, b = errors.get(worse, {}), errors.get(better, {})
        return [a[seed][kind] - b[seed][kind] for seed in sorted(set(a) & set(b))]

    def of_paper(worse, better, kind):
        names = ATTACKS if kind == 'robust' else ('clean',)
        means = [[paper[(*key, name)][0] for name in names] for key in (worse, better)
                 if (*key, names[0]) in paper]
        return f'{statistics.mean(means[0]) - statistics.mean(means[1]):.2f}' if means[1:] else ''

    for sched in 'linear', 'cosine':
        for kind in 'clean', 'robust':
            for periodic in False, True:
                keys = (periodic, 'constant'), (periodic, sched)
                yield row(f'a {sched} eps beats a constant eps, {kind} error', periodic
                          and 'periodic' or '', f'constant - {sched}, points of {kind} error'
                          + ' (mean of the five attacks)' * (kind == 'robust'),
                          difference(*keys, kind), of_paper(*keys, kind), images(n))
    for sched in 'constant', 'linear', 'cosine':
        keys = (False, sched), (True, sched)
        yield row('an ensemble of periods beats the last model', f'{sched} eps',
                  'last model - ensemble, points of robust error (mean of the five attacks)',
                  difference(*keys, 'robust'), of_paper(*keys, 'robust'), images(n))


def of_rates(group, _=None, usable=.5):
    """Figure 5 and C.2.3: the learning rates at which training works, by schedule."""
    found, _ = figures.by_rate(group)

    def paired(first, second, quantity):  # by seed, at the learning rates that all seeds have
        a, b = found.get(first, {}), found.get(second, {})
        at = {}
        for lr in sorted(set(a) & set(b)):
            for seed in sorted(set(a[lr]) & set(b[lr])):
                at.setdefault(seed, {})[lr] = quantity(a[lr][seed], b[lr][seed])
        at, rates = shared(at)
        return [list(values.values()) for values in at], len(rates)

    for sched in 'linear', 'cosine':
        values, n = paired(f'{sched} eps', 'constant eps',
                           lambda a, b: float(a < usable) - float(b < usable))
        yield row('a warm-up of eps widens the range of usable learning rates', f'{sched} eps',
                  f'more learning rates with a PGD error below {usable:.0%} than constant eps',
                  list(map(sum, values)) if n > 1 else [], 'Figure 5',
                  f'{n} rates' if n > 1 else '', rule=COUNT)
    for sched in 'linear', 'cosine':
        values, n = paired('lr warm-up', f'{sched} eps', lambda a, b: 100 * (a - b))
        yield row('a warm-up of the learning rate does not replace that of eps', f'{sched} eps',
                  f'lr warm-up with constant eps - {sched} eps, points of PGD error, mean over '
                  'learning rates', list(map(statistics.mean, values)), 'C.2.3',
                  f'{n} rate{"s" * (n > 1)}' if n else '')


def shared(by_seed, least=1):
    """[{key: value} of each seed] at the keys that all seeds have, and these keys.

    Where they are fewer than `least`, at the keys of the seed that has most, for those that have
    them, too.
    """
    sets = sorted(map(set, by_seed.values()), key=len)
    keys = sorted(set.intersection(*sets)) if sets else []
    if len(keys) < least:
        keys = sorted(sets[-1]) if sets and len(sets[-1]) >= least else []
    return [{key: at[key] for key in keys} for at in by_seed.values()
            if keys and set(keys) <= set(at)], keys


def slope(points):
    """How many decades y changes from the smallest x to the largest, by least squares of log y."""
    x, y = zip(*((x, math.log10(y)) for x, y in points))
    fit = statistics.linear_regression(x, y)
    return fit.slope * (max(x) - min(x))


def gradient(run, end):
    """Mean norm of the stochastic gradient over the first tenth of what was traced at the start,
    or over all traced at the end."""
    norms, part = [step['grad_norm'] for step in run.trace], traced(run)
    return statistics.mean(norms[-part:] if end else norms[:max(1, part // 10)])


def traced(run):
    """How many updates were traced at the start, and as many at the end."""
    return min(run.config['trace'], max(1, len(run.trace) // 2))


def sharpness(run):
    """The top eigenvalue over the mean L_eps of random theta; None if not measured."""
    value = run.hessian and figures.trusted(run.hessian)[0]
    return value and value / run.hessian['scale']['mean']


def apart(run):
    """a -> cosine along a random direction less that along the top eigenvector, for a > 0."""
    cosine = {(point['direction'], point['a']): point['cosine'] for point in
              run.similarity['points'] if point['a'] > 0 and point['cosine'] is not None}
    return {a: cosine['random', a] - cosine['eigenvector', a] for direction, a in cosine
            if direction == 'random' and ('eigenvector', a) in cosine}


def largest(runs, size):
    """Those of the runs of the largest size, so that no two sizes are mixed; and that size."""
    sizes = [size(run) or 0 for run in runs]
    return [run for run, n in zip(runs, sizes) if n and n == max(sizes)], max(sizes, default=0)


def of_budgets(group, _=None):
    """Section 4: what changes with a constant eps. A constant classifier has reached no minimum."""
    if group and group[-1].config['eps_sched'] != 'constant':
        return
    trained = [run for run in group if not run.constant]
    stuck = f', constant classifiers left out: {len(group) - len(trained)}'
    stuck *= len(group) > len(trained)
    updates = (lambda run: run.trace and traced(run)), 'updates'
    examples = (lambda run: run.hessian and run.hessian['n']), 'images'
    for claim, measure, runs, (size, unit), sign, measured, figure in (
            ('a larger eps gives smaller gradients at first', lambda run: gradient(run, False),
             group, updates, -1,
             'fall of the mean gradient norm, first tenth of the traced start', 'Figures 2a, 8'),
            ('a larger eps gives larger gradients in the end', lambda run: gradient(run, True),
             trained, updates, 1, 'rise of the mean gradient norm, traced end',
             'Figures 2d, 8'),
            ('a larger eps gives sharper minima', sharpness, trained, examples, 1,
             'rise of the normalised top eigenvalue', 'Figure 3')):
        left_out = stuck * (runs is trained)
        runs, n = largest(runs, size)
        at = {}
        for run in runs:
            if (value := measure(run) or 0) > 0:
                at.setdefault(run.seed, {})[run.eps] = value
        points, budgets = shared(at, least=2)
        note = f'{len(budgets)} budgets to {max(budgets):.3g}, {n} {unit}' if points else ''
        yield row(claim, '', f'{measured}, decades from the smallest eps to the largest',
                  [sign * slope(found.items()) for found in points], figure,
                  note + left_out * bool(points))
    runs, n = largest([run for run in trained if run.eps > 0],
                      lambda run: run.similarity and run.similarity['n'])
    at = {}
    for run in runs:
        at.setdefault(run.seed, {}).update(
            {(run.eps, a): value for a, value in apart(run).items()})
    points, keys = shared(at)
    yield row('perturbations are less similar along the top eigenvector', '',
              'cosine, random direction - top eigenvector, mean over a > 0 and eps',
              [statistics.mean(found.values()) for found in points], 'Figure 4',
              f'eps {", ".join(sorted({f"{eps:.3g}" for eps, _ in keys}))}, {n} images' if points
              else '')
    curves, ends = {}, {run.digest for run in trained}
    for run in trained:
        for curve, other in run.curves:
            if other.digest in ends and other.eps == run.eps:
                key = *sorted((run.seed, other.seed)), *(curve.get(name) for name in CURVE)
                curves.setdefault(run.eps, {})[key] = curve['barriers'][curve['curve']]
    eps = max(curves, default=0)
    pairs, ends = [], set()
    for key in sorted(set(curves.get(0, {})) & set(curves[eps] if eps else ()), key=str):
        if not ends & set(key[:2]):  # pairs with a run in common are not independent
            pairs.append(key)
            ends |= set(key[:2])
    yield row('adversarial minima are less connected', '', 'barrier of L_eps along the curve, '
              f'{f"eps {eps:.3g}" if eps else "largest eps"} - eps 0',
              [curves[eps][key] - curves[0][key] for key in pairs], 'C.2.5', unit='pair')


CURVE = 'curve', 'n_control', 'epochs', 'lr', 'train_batch_size', 'n', 'seed'


def of_widths(group, _=None):
    """C.2.4: narrow models get dead layers under a constant large eps."""
    group = [run for run in group if run.config['eps_sched'] == 'constant']
    group, n = largest(group, lambda run: run.dead and run.dead['n'])
    dead = {(run.config['width'], run.eps, run.seed): float(any(
        layer['all'] for layer in run.dead['layers'])) for run in group}
    budgets = [eps for eps in {eps for _, eps, _ in dead} if eps > 0 and len(
        {width for width, other, _ in dead if other == eps}) > 1]
    eps = max(budgets, default=0)
    widths = sorted({width for width, other, _ in dead if other == eps and eps})
    values = [dead[widths[0], eps, seed] - dead[widths[-1], eps, seed]
              for seed in sorted({seed for *_, seed in dead}) if widths and all(
                  (width, eps, seed) in dead for width in (widths[0], widths[-1]))]
    yield row('narrow models get dead layers', '', 'a layer all dead (1 or 0), '
              + (f'width {widths[0]} - width {widths[-1]}, eps {eps:.3g}' if values
                 else 'narrowest - widest'), values, 'C.2.4', f'{n} images' if values else '',
              rule=COUNT)


def of_theory(theory):
    """Section 3, checked in numbers by `landscape.py theory`."""
    yield exact('Theorem 2: the probability of large gradients is below its bound',
                'bound - measured share, gamma in 2 .. 6', [
                    point['bound'] - point['share'] for case in theory.get('theorem_2', [])
                    for point in case['points']], 'Eq. 4')
    yield exact('Theorem 1: from ||x||_inf on, 0 is the best multiple of every linear model',
                '||x||_inf - least eps at which that is so of all random models', [
                    case['sufficient'] - case['all_in_T_from']
                    for case in theory.get('theorem_1', [])], 'Theorem 1')


# what is compared, the settings in which its runs may differ, and where the paper has it
STUDIES = (
    (of_table, ('periods', *study.SCHEDULE), list(TASKS)),
    (of_budgets, ('eps',), [('cifar10', 'resnet18'), ('mnist', 'lenet')]),
    (of_rates, ('lr', 'lr_warmup', *study.SCHEDULE), [('mnist', 'lenet')]),
    (of_widths, ('eps', 'width'), [('mnist', 'lenet')]),
)


def grouped(compare, runs, own):
    """(share of the test images that are evaluated, runs) of groups that may be compared."""
    columns, by_share = {of_table: ('clean', *ATTACKS), of_rates: ('pgd',)}.get(compare), {}
    for run in runs:
        if not columns:
            by_share.setdefault(1, []).append(run)
        elif (result := study.evaluation(run, *columns)):
            by_share.setdefault(result['n'] / result['n_test'], []).append(run)
    diverged = [run for run in runs if run.diverged and compare is of_rates]
    return [(share, group) for share, found in sorted(by_share.items())
            for group in study.alike(found + diverged, *own)]


WHOLE = "At the paper's size"


def check(runs, theory, paper):
    """{heading: rows}: what the paper claims, at its size; and what smaller runs say of it.

    theory: the result of `landscape.py theory` or {}; paper: (dataset, model) -> what `of_table`
    takes. A row of the paper's size is there even if nothing is measured.
    """
    whole, small, seen = [], {}, set()
    for compare, own, tasks in STUDIES:
        found = {task: [] for task in tasks}
        for share, group in grouped(compare, runs, own):
            config = group[-1].config
            task = config['dataset'], config['model']
            free = {*own} & {'eps', 'lr', 'lr_warmup', 'width'} | {'precision'}
            full = task in tasks and share == 1 and not any(
                study.departures(run.config) - free for run in study.usual(group))
            rows = [row for row in compare(study.whole(group) if full else group,
                                           paper.get(task, {})) if row.values]
            if full:
                precision = config.get('precision', 'fp32')
                for row in rows if precision != 'fp32' else []:
                    row.where = f'{row.where}, {precision}'.lstrip(', ')
                found[task] += rows
            elif rows:
                title = figures.title(group).replace('\n', ', ') + f', batch {config["batch_size"]}'
                while (compare, title) in seen:
                    title += ', in other settings'
                seen.add((compare, title))
                small.setdefault(title, []).extend(rows)
        for task, rows in found.items():
            known = {(row.claim, row.where) for row in rows}
            rows += [row for row in compare([], paper.get(task, {})) if row.of_paper and
                     (row.claim, row.where) not in known]
            for row in rows:
                row.where = ', '.join(filter(None, (TASKS[task], row.where)))
            whole += rows
    measured = any(row.values for row in whole)
    tables = {**small, 'Section 3, in numbers': list(of_theory(theory))}
    return {WHOLE: whole, **tables} if measured else {**tables, WHOLE: whole}


def summary(tables):
    """How many rows hold, by size, a line each."""
    text = ''
    for heading, rows in tables.items():
        count = {verdict: sum(row.verdict == verdict for row in rows)
                 for verdict in ('holds', 'does not', 'not enough data')}
        none = sum(not row.values for row in rows)
        text += (f'- {heading}: ' + ', '.join(f'{n} {verdict}' for verdict, n in count.items())
                 + f' ({none} of these not measured at all)' * (none > 0) + f', of {len(rows)}\n')
    return text


def text(tables):
    """claims.md."""
    head = ('claim', 'where', 'measured', 'ours (95 % interval)', "the paper's", 'n', 'verdict',
            'rule')
    text = f'# Does it hold?\n\n{summary(tables)}\n'
    for heading, rows in tables.items():
        text += f'## {heading}\n\n| ' + ' | '.join(head) + ' |\n' + '|---' * len(head) + '|\n'
        for row in rows:
            text += '| ' + ' | '.join((row.claim, row.where, row.measured, row.ours, row.of_paper,
                                       row.n, f'**{row.verdict}**', row.rule)) + ' |\n'
        text += '\n'
    return text

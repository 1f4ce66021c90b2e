"""The figures of the paper, from the runs of a study (see `pictures`).

Three seeds or more are a mean in a band of one standard deviation (of the logarithm on a log axis),
fewer are a curve each. A user's matplotlibrc has no effect.
"""

import operator
import textwrap
from functools import partial

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

import data
from lib import record

STYLE = {'figure.constrained_layout.use': True, 'legend.frameon': False, 'font.size': 9}
STYLE |= {'axes.spines.top': False, 'axes.spines.right': False, 'savefig.dpi': 150}
LOSS, NORM = r'$L_\epsilon$', 'norm of the stochastic gradient'


def draw(studies, theory, out):
    """Draws all figures that the studies and theory.json suffice for; {file: what it shows}."""
    shown = {}

    def save(figure, stem, sentence, about):
        while f'{stem}.png' in shown:  # of another study
            stem += '_2'
        shown[f'{stem}.png'] = f'{sentence} {about}.'
        handles = figure.axes[0].get_legend_handles_labels()[0]
        if handles:
            figure.legend(handles=handles, loc='outside right center')
        figure.suptitle(textwrap.fill(about, int(9 * figure.get_figwidth())), fontsize=10)
        record.replace(out / f'{stem}.png', lambda file: figure.savefig(file, format='png'))

    with matplotlib.style.context(['default', STYLE]):
        for study in studies:
            common = study.frame[['dataset', 'model', 'eps_sched']]
            common = '_'.join(common.iloc[0][common.nunique() < 2])
            for name, seen, groups, panels in pictures(study):
                if groups:
                    figure = planes(groups) if name == 'fig12' else curves(groups, panels)
                    if name == 'fig2' and study.dataset != 'cifar10':
                        name = 'fig8'
                    save(figure, f'{name}_{common}', seen, title(study.runs))
        if theory:
            save(figure_1(theory), 'fig1', figure_1.__doc__, 'Figure 1')
    return shown


def title(runs):
    """The settings that all `runs` share, as a line."""
    formats = {'model': '{}', 'width': 'width {}', 'n_train': '{} images', 'dataset': '{}'}
    formats |= {'epochs': '{} epochs', 'optimizer': '{}', 'lr': 'lr {}', 'eps_sched': '{} eps'}
    formats |= {'eps': 'eps {}'}
    config, texts = runs[0].config, []
    for k in formats:
        if config.get(k) is not None and all(run.config[k] == config[k] for run in runs):
            texts.append(formats[k].format(data.show(k, config[k], config['dataset'])))
    return ', '.join(texts)


def by_eps(runs, name):
    """[(label, colour, runs)] for each eps at which runs have the result `name`."""
    budgets = sorted({run.config['eps'] for run in runs})
    groups = []
    for i, eps in enumerate(budgets):
        own = [run for run in runs if run.config['eps'] == eps and getattr(run, name)]
        untrained = sum(run.untrained for run in own)
        label = f'eps {data.show_eps(eps, runs[0].config["dataset"])}'
        if untrained:
            label += f'\n({untrained} of {len(own)} constant)'
        if own:
            groups.append((label, colormaps['viridis'](0.9 * i / len(budgets)), own))
    return groups


def by_column(frame, group, x, *needed):
    """[(label, colour, rows over x of each seed)] for each value in the column `group`."""
    groups = []
    for i, (label, rows) in enumerate(frame.dropna(subset=needed).groupby(group)):
        groups.append((label, f'C{i}', [own.set_index(x) for _, own in rows.groupby('seed')]))
    return groups


def curves(groups, panels):
    """A figure with the curves of `groups`, (label, colour, runs), in each panel.

    A panel: x label, y label, y scale and functions, run -> Series over x, the second dashed.
    """
    figure = Figure(figsize=(3.6 * len(panels) + 1.8, 3.4))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (xlabel, ylabel, yscale, *lines) in zip(axes, panels):
        ax.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
        ax.set_xscale('log' if xlabel in ('learning rate', 'width') else 'linear')
        for style, line in zip(('-', '--'), lines):
            for i, (label, color, runs) in enumerate(groups):
                label += f', n = {len(runs)}' + (', dashed' if style == '--' else '')
                table = pd.concat(map(line, runs), axis=1).sort_index()
                look = {'color': color, 'ls': style, 'label': label}
                if len(table) < 25:
                    look |= {'marker': 'o', 'ms': 3}
                if xlabel == 'width':  # equal values are rings around each other
                    look['ms'] = 3 + 3 * (len(groups) - i)
                    ax.set_xticks(table.index, table.index)
                    ax.minorticks_off()
                plot(ax, table, look)
    return figure


def plot(ax, table, look):
    """The columns of `table`: one or two as a curve each, more as a mean in a band of one standard
    deviation, of the logarithm on a log axis."""
    if len(table.columns) < 3:
        for _, series in table.items():
            ax.plot(series.dropna(), **look)
            look['label'] = None  # the legend has it already
        return
    values, back = (np.log(table), np.exp) if ax.get_yscale() == 'log' else (table, np.array)
    mean, half = values.mean(axis=1), values.std(axis=1)
    ax.plot(table.index, back(mean), **look)
    ends = back(mean - half), back(mean + half)
    ax.fill_between(table.index, *ends, color=look['color'], alpha=0.2, lw=0)


def planes(groups):
    """Figure 12: the loss of the first run at each eps in the plane of two directions, on one
    scale. Planes of several runs have no mean."""
    figure = Figure(figsize=(3.4 * len(groups) + 1, 3.4))
    points = [pd.DataFrame(own[0].surface['points']) for *_, own in groups]
    levels = np.linspace(0, max(table['loss'].max() for table in points), 25)
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for ax, (label, *_), table in zip(axes, groups, points):
        filled = ax.tricontourf(table['a'], table['b'], table['loss'], levels=levels)
        ax.set(xlabel='a', ylabel='b', title=label.split('\n')[0])
    figure.colorbar(filled, ax=figure.axes, label=LOSS)
    return figure


def column(rows, index, key, **where):
    """The values at `key` over those at `index`, as a Series, of the dicts `rows` with `where`."""
    rows = [row for row in rows if where.items() <= row.items()]
    return pd.DataFrame(rows, columns=[index, key]).set_index(index)[key].astype(float)


def trace(key, last=False):
    """The first or the last updates as a running mean, since batches differ."""

    def curve(run):
        n, rows = run.trace['n'], run.trace['rows']
        series = column(rows[-n:] if last else rows[:n], 'step', key)
        return series.rolling(max(1, n // 40), center=True).mean().dropna()

    return curve


def eigenvalues(run, scaled=False):
    """Magnitudes of the eigenvalues that have converged, as they are or `scaled` by L_eps."""
    eigen = run.hessian['eigen']
    scale = np.mean(run.hessian['random_losses']) if scaled else 1
    values = pd.Series(eigen['values'], range(1, len(eigen['values']) + 1)).abs() / scale
    return values.where(eigen['converged'])


def similarity(key):
    directions = 'random', 'eigenvector'
    return [
        lambda run, d=d: column(run.similarity['points'], 'a', key, direction=d) for d in directions
    ]


def path(key):
    """On the curve between two runs, and on the straight line."""
    return [
        lambda run: column(run.connect['points'], 't', key, path=run.connect['curve']),
        lambda run: column(run.connect['points'], 't', key, path='line'),
    ]


# picture: what is to be seen, the result that it needs, and its panels
BUDGET = {
    'fig2': (
        'The first and last updates at each eps.',
        'trace',
        ('first updates', NORM, 'log', trace('grad_norm')),
        ('first updates', 'robust training error', 'linear', trace('robust_error')),
        ('first updates', r'$||\theta - \theta_0||$', 'linear', trace('distance')),
        ('last updates', NORM, 'log', trace('grad_norm', last=True)),
    ),
    'fig3': (
        'Eigenvalues of the Hessian at each eps, the largest first.',
        'hessian',
        ('rank', '|eigenvalue| / mean random loss', 'log', partial(eigenvalues, scaled=True)),
        ('rank', '|eigenvalue|', 'log', eigenvalues),
    ),
    'fig4': (
        'Perturbations at theta + a v and theta - a v, and robust errors there; v is the top '
        'eigenvector (dashed) or random.',
        'similarity',
        ('a', 'cosine', 'linear', *similarity('cosine')),
        ('a', 'robust error', 'linear', *similarity('robust_error')),
    ),
    'fig11': (
        'The loss on the training set.',
        'log',
        ('epoch', LOSS, 'linear', lambda run: column(run.log, 'epoch', 'loss')),
    ),
    'c25': (
        'The loss between two runs, on a trained curve and on the straight line (dashed).',
        'connect',
        ('t', LOSS, 'linear', *path('loss')),
        ('t', 'robust error', 'linear', *path('robust_error')),
    ),
    'fig12': ('The loss in the plane of the top two eigenvectors.', 'surface'),
}


def pictures(study):
    """(name, what is to be seen, groups, panels) of each picture of a study."""
    frame = study.frame
    if study.kind == 'budget':
        for name, (seen, result, *panels) in BUDGET.items():
            yield name, seen, by_eps(study.runs, result), panels
    elif study.kind == 'rate':
        line = operator.itemgetter('pgd')
        panels = [('learning rate', 'robust test error (PGD)', 'linear', line)]
        warm = frame['schedule'].str.startswith('lr')
        groups = by_column(frame[~warm], 'schedule', 'lr', 'pgd')
        yield 'fig5', 'Robust errors of schedules of eps over the learning rate.', groups, panels
        groups = by_column(frame, 'schedule', 'lr', 'pgd') if warm.any() else []
        yield 'c23', 'The same, with warm-ups of the learning rate.', groups, panels
    else:
        dead = [name for name in frame if name.startswith('dead ')]
        panels = [('width', name, 'linear', operator.itemgetter(name)) for name in dead]
        budgets = [f'eps {data.show_eps(eps, study.dataset)}' for eps in frame['eps']]
        frame = frame.assign(budget=budgets)
        groups = by_column(frame, 'budget', 'width', *dead) if dead else []
        seen = 'Shares of units that no training image activates. No dot: not measured.'
        yield 'c24', seen, groups, panels


def figure_1(theory):
    """The larger eps, the sharper the kink of the adversarial loss g_eps at 0."""
    figure = Figure(figsize=(9, 3))
    theta, curves = np.array(theory['figure_1']['theta']), theory['figure_1']['curves']
    for ax, eps in zip(figure.subplots(1, 2), ('0.6', '1.2')):
        least = np.logaddexp(0, theta * (1 - float(eps) * np.sign(theta)))
        ax.fill_between(theta, least, curves[eps], alpha=0.3, label=r"$g(x', \theta)$")
        ax.plot(theta, curves['0'], '--', label=r'$g(x, \theta)$')
        ax.plot(theta, curves[eps], label=r'$g_\epsilon(x, \theta)$')
        ax.set(xlabel=r'$\theta$', ylabel='loss', title=f'eps {eps}')
    return figure

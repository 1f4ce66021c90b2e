"""The figures of the paper, each for every group of runs that differ in eps, rate or width alone.

Three seeds or more are a mean in a band of one standard deviation (of the logarithm on a log axis),
fewer are a curve each. A user's matplotlibrc has no effect.
"""

import io

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from paper.claims import common_name, comparisons, headline, interval, points_of
from paper.controls import control_groups
from paper.results import FIVE, FOLLOW, PAPER, alike, comparable, first_and_last

STYLE = {
    'figure.constrained_layout.use': True,
    'legend.frameon': False,
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'savefig.dpi': 150,
}
LOSS, GRADIENT, DISTANCE = r'$L_\epsilon$', 'gradient norm', r'$||\theta - \theta_0||$'
NORMALIZED = '|eigenvalue| / mean random loss'
RAMP = ['eps_min', 'eps_max']
BOUNDS = {'error': (0, 1), 'dead': (0, 1), 'cosine': (-1, 1)}  # of y, by a word in its label
LOG = GRADIENT, '|eigenvalue|', NORMALIZED, 'learning rate', 'width'


def updates(end):
    """The first (0) or last (1) updates of a run as a running mean, since batches differ."""

    def rows(run):
        window = max(1, run['n_updates'] // 40)
        return first_and_last(run)[end].rolling(window, center=True).mean()

    return rows


def eigenvalues(run):
    """The eigenvalues that have converged, the largest first."""
    eigen, scale = run['hessian']['eigen'], np.mean(run['hessian']['random_losses'])
    values = pd.Series(eigen['values']).abs().where(eigen['converged'])
    return pd.DataFrame({'rank': values.index + 1, 'value': values, 'normalized': values / scale})


def points(result, **where):
    """The points of a result that have the values in `where`."""
    return lambda run: [point for point in run[result]['points'] if where.items() <= point.items()]


# a curve: the title of its x, the name of x, the rows of a run, and what tells it from another
FIRST = 'first updates', 'step', updates(0), ''
LAST = 'last updates', 'step', updates(1), ''
RANK = 'rank', 'rank', eigenvalues, ''
RANDOM = 'a', 'a', points('similarity', direction='random'), ', random'
TOP = 'a', 'a', points('similarity', direction='eigenvector'), ', top eigenvector'
EPOCHS = 'epoch', 'epoch', lambda run: run['log'], ''
CURVE = 't', 't', points('connect', path='bezier'), ', curve'
LINE = 't', 't', points('connect', path='line'), ', straight line'

# a figure of runs that differ in eps: what it shows, the result that it needs, and its panels:
# title of y, its name, and one curve or two
OF_EPS = {
    'fig2': (
        'The first and last updates at each eps (Figure 8 for MNIST).',
        'updates',
        (GRADIENT, 'grad_norm', FIRST),
        ('robust training error', 'robust_error', FIRST),
        (DISTANCE, 'distance', FIRST),
        (GRADIENT, 'grad_norm', LAST),
    ),
    'fig3': (
        'Eigenvalues of the Hessian at each eps, the largest first.',
        'hessian',
        (NORMALIZED, 'normalized', RANK),
        ('|eigenvalue|', 'value', RANK),
    ),
    'fig4': (
        'How alike perturbations at theta + a v and theta - a v are, and robust errors there; v, '
        'of length 1, is the top eigenvector or a random direction.',
        'similarity',
        ('cosine', 'cosine', RANDOM, TOP),
        ('robust error', 'robust_error', RANDOM, TOP),
    ),
    'fig11': ('The loss on the training set.', 'log', ('training loss', 'loss', EPOCHS)),
    'c25': (
        'The loss between two runs, on a trained curve and on the straight line.',
        'connect',
        (LOSS, 'loss', CURVE, LINE),
        ('robust error', 'robust_error', CURVE, LINE),
    ),
}
FIG_12 = 'The loss in the plane of the top two eigenvectors, of the first seed.'
FIG_5 = 'Robust errors over the learning rate, of schedules of eps and of the learning rate.'
C24 = 'Shares of units that no training image activates. No dot: not measured.'
PERIODS = (
    'Periods restart eps and the learning rate. Left: robust errors of one run and of a periodic '
    'one, and their ensemble. Right: points of robust error that are gained over the last epoch '
    'of one run, with 95 % intervals over seeds; hollow: in the paper, by the mean of five attacks.'
)
CURVES = (
    'Learning curves: robust errors on training images at the scheduled eps, on test images at '
    'the target eps, and clean ones.'
)
FIG_1 = 'The larger eps, the sharper the kink of the loss at theta = 0.'


def draw(results, theory):
    """Draws what there are runs for: {name of the file: (what it shows, its bytes)}."""
    drawn = {}
    with matplotlib.style.context(['default', STYLE]):
        for name, shows, figure in figures(results, theory):
            while f'{name}.png' in drawn:  # of other runs
                name += '_2'
            buffer = io.BytesIO()
            figure.savefig(buffer, format='png')
            drawn[f'{name}.png'] = shows, buffer.getvalue()
    return drawn


def figures(results, theory):
    """Name, what it shows, and the figure itself, of each figure that there are runs for."""
    runs, settings = results.runs, results.settings
    trained = runs[runs['log'].map(bool).astype(bool)]
    periods = [pairs for setting, pairs in comparisons(results) if setting == 'periodic']
    if periods:
        yield 'periods', PERIODS, figure_of_periods(results, periods)
    for group in alike(trained, settings, ('eps', *FOLLOW['eps'])):
        if group['eps'].nunique() >= 3:  # two make no trend
            yield from figures_of_eps(comparable(group, 'eps'), common_name(group))
    for group in alike(runs, settings, ('lr', *FOLLOW['lr'])):
        group = comparable(group, 'lr', *FOLLOW['lr'])
        group = group[group['pgd'].notna()]
        group = group.assign(
            error=[result['error'] for result in group['pgd']],
            schedule=group['eps_sched'] + np.where(group['lr_warmup'] > 0, ', lr warm-up', ''),
        )
        if group.duplicated(['seed', 'lr', 'schedule']).any():  # several ramps
            group['schedule'] += [f' {low:g}, {high:g}' for low, high in group[RAMP].values]
        if group['lr'].nunique() > 1:
            panel = 'robust test error (PGD)', 'error', ('learning rate', 'lr', None, '')
            yield f'fig5_{common_name(group)}', FIG_5, panels(group, 'schedule', [panel])
    for group in alike(trained, settings, ('width', 'eps', *FOLLOW['eps'])):
        group = comparable(group, 'width', 'eps')
        group = group[group['dead'].notna()]
        if group['width'].nunique() > 1:
            yield f'c24_{common_name(group)}', C24, dead_units(group)
    for group in alike(trained, ['dataset', 'model']):
        name = f'curves_{group["dataset"].iloc[0]}_{group["model"].iloc[0]}'
        yield name, CURVES, learning_curves(alike(group, settings))
    if theory:
        yield 'fig1', FIG_1, figure_1(theory)


def figures_of_eps(group, title):
    """The figures of Section 4, of runs that differ in eps."""
    for name, (shows, result, *panel_list) in OF_EPS.items():
        measured = group[group[result].map(bool)]
        if len(measured):
            is_fig_8 = name == 'fig2' and measured['dataset'].iloc[0] != 'cifar10'
            yield (
                f'{"fig8" if is_fig_8 else name}_{title}',
                shows,
                panels(measured, 'eps', panel_list),
            )
    measured = group[group['surface'].map(bool)]
    if len(measured):
        yield f'fig12_{title}', FIG_12, planes(measured)


def panels(runs, column, panel_list):
    """A figure with panels, in which each value of a column of the runs has its colour."""
    figure = Figure(figsize=(3.6 * len(panel_list) + 2.4, 3.4))
    axes = figure.subplots(1, len(panel_list), squeeze=False)[0]
    values = sorted(runs[column].unique())
    for ax, (ylabel, y, *curves) in zip(axes, panel_list):
        ax.set(xlabel=curves[0][0], ylabel=ylabel)
        ax.set_xscale('log' if curves[0][0] in LOG else 'linear')
        ax.set_yscale('log' if ylabel in LOG else 'linear')
        for (_, x, rows, kind), style in zip(curves, ('-', '--')):
            for i, value in enumerate(values):
                ours = runs[runs[column] == value]
                look = {'color': colormaps['viridis'](0.9 * i / len(values)), 'ls': style}
                look['ms'] = len(values) - i + 2  # rings where values are equal
                plot(ax, over(ours, x, y, rows), label(value, ours, kind), **look)
        if curves[0][0] in LOG:
            ticks = sorted(runs[curves[0][1]].unique())
            ax.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
            ax.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center')
    figure.suptitle(common_name(runs))
    return figure


def over(runs, x, y, rows=None):
    """y over x with a column for each seed: of the rows(run) of each run, or of the runs."""
    if rows is None:
        return runs.pivot_table(y, x, 'seed')
    frames = [pd.DataFrame(rows(run)).set_index(x)[y] for run in runs.to_dict('records')]
    return pd.concat(frames, axis=1).sort_index()


def label(value, runs, kind=''):
    """A value of eps or of the schedule in the legend, with the number of runs."""
    text = value if isinstance(value, str) else f'eps {runs["typed eps"].iloc[0]}'
    constant = int((runs['constant'] == 'yes').sum())
    n = runs['seed'].nunique()
    return f'{text}{kind}, n = {n}' + (f'\n({constant} runs constant)' if constant else '')


def plot(ax, table, label, **look):
    """The columns of a table: one or two as a curve each, more as a mean in a band. Bands
    stay within BOUNDS."""
    if len(table) < 25:
        look = {'marker': 'o', 'ms': 3} | look
    if table.shape[1] < 3:
        for _, column in table.items():
            ax.plot(column.dropna(), label=label, **look)
            label = None  # the legend has it already
        return
    values, back = (np.log(table), np.exp) if ax.get_yscale() == 'log' else (table, np.array)
    mean, half = values.mean(axis=1), values.std(axis=1)
    low, high = back(mean - half), back(mean + half)
    for word, ends in BOUNDS.items():
        if word in ax.get_ylabel():
            low, high = np.clip(low, *ends), np.clip(high, *ends)
    ax.plot(table.index, back(mean), label=label, **look)
    ax.fill_between(table.index, low, high, color=look['color'], alpha=0.2, lw=0)


def dead_units(runs):
    """C.2.4: the share of dead units in each layer over the width."""
    shares = [
        {f'dead in {layer["layer"]}': layer['share'] for layer in result['layers']}
        for result in runs['dead']
    ]
    shares = pd.DataFrame(shares, index=runs.index)
    panel_list = [(layer, layer, ('width', 'width', None, '')) for layer in shares]
    return panels(runs.join(shares), 'eps', panel_list)


def learning_curves(groups):
    """A panel for each group of runs that differ in the seed alone."""
    n_columns = min(3, len(groups))
    n_rows = -(-len(groups) // n_columns)
    figure = Figure(figsize=(3.4 * n_columns + 1.6, 2.3 * n_rows + 0.6))
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).ravel()
    for ax, runs in zip(axes, groups):
        errors_over_epochs(ax, runs)
        ax.set_title(f'{runs["name"].iloc[0]}\n{label("", runs)[2:]}', fontsize=7)
    for ax in axes[len(groups) :]:
        ax.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center')
    return figure


def errors_over_epochs(ax, runs):
    """Robust errors on training and test images, and clean ones, over the epochs."""
    ax.set(xlabel='epoch', ylabel='error', ylim=(0, 1))
    kinds = {
        'train_robust_error': 'robust, training',
        'robust_error': 'robust, test',
        'clean_error': 'clean, test',
    }
    for i, (name, text) in enumerate(kinds.items()):
        table = over(runs, 'epoch', name, lambda run: run['log']).astype(float).dropna(how='all')
        plot(ax, table, text, color=f'C{i}', marker='')


def figure_of_periods(results, periods):
    """What periods do to one cell, that of the most seeds, and what they gain in all."""
    rows = gains_of_periods(periods) + gains_of_controls(results)
    figure = Figure(figsize=(11, 0.2 * len(rows) + 3.6))
    axes = figure.subplot_mosaic('AC;BC', height_ratios=(3, 1))
    pairs, runs = max(periods, key=len), results.runs
    runs = runs[runs['log'].map(bool) & runs['seed'].isin(pairs['seed'])]  # none that diverged
    for suffix, color, run, end in (
        (' before', 'C0', 'one run', 'one run at the end'),
        ('', 'C1', 'periods', 'the ensemble of periods'),
    ):
        settings = [pairs[f'{name}{suffix}'].iloc[0] for name in results.settings]
        ours = runs[(runs[results.settings] == settings).all(axis=1)]
        over_epochs(axes['A'], axes['B'], ours, run, color)
        error, n = pairs[f'PGD{suffix}'].mean() / 100, pairs['test images'].iloc[0]
        axes['A'].axhline(error, color=color, ls='-.', lw=1, label=f'{end}, {n} images')
    title = f'{pairs["name before"].iloc[0]}, n = {len(pairs)}'
    axes['A'].set(ylabel='robust error (PGD)', title=title)
    axes['A'].tick_params(labelbottom=False)
    axes['A'].legend(fontsize=6, ncols=2, loc='upper center', bbox_to_anchor=(0.5, -0.02))
    axes['B'].set(xlabel='epoch', ylabel='share of largest', yscale='linear')
    axes['B'].plot([], [], 'k', label='eps')
    axes['B'].plot([], [], 'k--', label='lr')
    axes['B'].legend(fontsize=7)
    forest(axes['C'], rows)
    return figure


def over_epochs(errors, clock, runs, kind, color):
    """Robust errors of runs over the epochs, and below eps and lr as shares of the largest."""
    for name, text, style in (
        ('train_robust_error', 'training images', ':'),
        ('robust_error', 'test images', '-'),
    ):
        table = over(runs, 'epoch', name, lambda run: run['log']).astype(float)
        plot(errors, table, f'{kind}, {text}', color=color, ls=style, marker='')
    log = pd.DataFrame(runs.iloc[0]['log']).set_index('epoch')
    for name, style in ('eps', '-'), ('lr', '--'):
        clock.step(log.index, log[name] / log[name].max(), color, ls=style, where='mid')


def gains_of_periods(periods):
    """(label, points gained for each seed, the paper's gain or None) in each cell."""
    rows = []
    paper = PAPER[FIVE].map(lambda cell: float(cell.split('(')[0])).mean(axis=1)
    for pairs in periods:
        dataset, model, sched = pairs[['dataset', 'model', 'eps_sched']].iloc[0]
        cell = [(dataset, model, periodic, sched) for periodic in ('no', 'yes')]
        in_paper = paper[cell[0]] - paper[cell[1]] if set(cell) <= set(paper.index) else None
        label = f'PAS: {dataset} {model}, {sched} eps'
        rows.append((label, points_of(pairs, headline(pairs)), in_paper))
    return rows


def gains_of_controls(results):
    """The same of the controls, over the last epoch of one run."""
    rows = []
    for first, controls in control_groups(results):
        errors = {
            label: evaluations['two attacks'] for label, (*_, evaluations) in controls.items()
        }
        plain = [error for label, error in errors.items() if label.startswith('A')]
        for label, error in errors.items():
            points = (plain[0] - error).dropna() if plain else ()
            if len(points) and not label.startswith('A'):
                rows.append((f'{label} ({first["model"]}, {first["eps_sched"]})', points, None))
    return rows


def forest(ax, rows):
    """A line for each of `rows`, (label, values, the paper's value or None), the first on top."""
    ax.axvline(0, color='0.7', lw=1)
    for y, (_, values, in_paper) in enumerate(rows):
        mean, low, high, _ = interval(values)
        ax.plot(mean, y, 'o', color='C1', ms=4)
        if np.isfinite(low):
            ax.plot([low, high], [y, y], color='C1')
        if in_paper is not None:
            ax.plot(in_paper, y, 'o', color='0.3', mfc='none')
    labels = [f'{label}, n = {len(values)}' for label, values, _ in rows]
    ax.set_yticks(range(len(rows)), labels, fontsize=7)
    ax.invert_yaxis()
    ax.set(xlabel='points of robust error gained')


def planes(runs):
    """The loss of the first run at each eps in the plane of two directions, on one scale."""
    firsts = runs.sort_values(['eps', 'seed']).drop_duplicates('eps').to_dict('records')
    tables = [pd.DataFrame(run['surface']['points']) for run in firsts]
    losses = pd.concat(tables)['loss']
    least = max(losses.min(), losses.max() / 1000)
    levels = np.geomspace(least, losses.max(), 19)  # close in the valley, wide on the slopes
    figure = Figure(figsize=(3.4 * len(firsts) + 1, 3.4))
    axes = figure.subplots(1, len(firsts), squeeze=False, sharey=True)[0]
    for ax, run, table in zip(axes, firsts, tables):
        heights = table['loss'].clip(lower=least)
        filled = ax.tricontourf(table['a'], table['b'], heights, levels=levels, norm=LogNorm())
        ax.set(xlabel='a', ylabel='b', title=f'eps {run["typed eps"]}')
    ticks = levels[::3]
    bar = figure.colorbar(filled, ax=figure.axes, label=LOSS, ticks=ticks)
    bar.ax.set_yticklabels([f'{tick:.2g}' for tick in ticks])
    bar.ax.minorticks_off()
    figure.suptitle(common_name(runs))
    return figure


def figure_1(theory):
    """The loss g(x, theta) of a point and the largest loss in the ball around it, over theta."""
    figure = Figure(figsize=(9, 3))
    theta, curves = np.array(theory['figure_1']['theta']), theory['figure_1']['curves']
    axes = figure.subplots(1, 2)
    for ax, eps in zip(axes, ('0.6', '1.2')):
        least = np.logaddexp(0, theta * (1 - float(eps) * np.sign(theta)))
        ax.fill_between(theta, least, curves[eps], alpha=0.3, label=r"$g(x', \theta)$")
        ax.plot(theta, curves['0'], '--', label=r'$g(x, \theta)$')
        ax.plot(theta, curves[eps], label=r'$g_\epsilon(x, \theta)$')
        ax.set(xlabel=r'$\theta$', ylabel='loss', title=f'eps {eps}')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center')
    return figure

"""The figures of the paper, from runs: mean over the seeds, in a band of one standard deviation."""
import numpy as np
from matplotlib import colormaps

import analysis
import data
import study

MODELS = {'lenet': 'LeNet', 'vgg': 'VGG', 'resnet18': 'ResNet18'}


def draw(runs, theory, out):
    """Draws into the folder `out` what `runs`, and the result `theory` of section 3, suffice for.

    Each function below draws one group of runs into a PNG and says whether they suffice for it;
    several groups get a file each, named after what they are of. Returns the names of the files.
    """
    if theory:
        figure_1(theory, out / 'fig1.png')
    drawn, names = [], ['fig1.png'] * bool(theory)
    for figure, name, own in FIGURES:
        for group in study.alike(runs, *own):
            config = group[-1].config
            stem = '_'.join([name, config['dataset']] + (own == ('eps',)) * [
                config['model'], str(config['width']), config['eps_sched']])
            if name == 'fig2' and config['dataset'] != 'cifar10':
                stem = stem.replace('fig2', 'fig8')
            file = stem + f'_{drawn.count(stem) + 1}' * (stem in drawn) + '.png'
            if figure(group, out / file):
                drawn.append(stem)
                names.append(file)
    return names


def title(group):
    """What the runs of a group have in common, in two lines."""
    config, n_seeds = group[-1].config, len({run.seed for run in group})
    n = config.get('n_train') or data.SPLITS[config['dataset']]['train'][0]
    sched = {run.config['eps_sched'] for run in group if run.eps > 0 or group[-1].eps == 0}
    lr = {run.config['lr'] for run in group}
    width = {run.config['width'] for run in group}
    warm = {run.config.get('lr_warmup', 0) for run in group}
    periods = {' + '.join(map(str, run.config['periods'])) for run in group}
    return (f'{MODELS[config["model"]]}' + f' of width {config["width"]}' * (len(width) == 1)
            + f', {n:,} images of {config["dataset"]}, {config["epochs"]} epochs\n'
            + f'{config["optimizer"]}' + f' at lr {config["lr"]:g}' * (len(lr) == 1)
            + ', lr warm-up' * (len(warm) == 1 and warm != {0})
            + f', {config["eps_sched"]} eps' * (len(sched) == 1)
            + f', periods {"".join(periods)}' * (len(periods) == 1 and len(config['periods']) > 1)
            + f', {n_seeds} seed{"s" * (n_seeds != 1)}')


def by_eps(group, name, some=lambda run: True):
    """{(label, colour): runs} of those, of some runs in a group, that have the result `name`."""
    found, budgets = {}, sorted({run.eps for run in group})
    for run in group:
        if getattr(run, name) and some(run):
            stuck = [other.constant for other in group if other.eps == run.eps]
            note = f' ({sum(stuck)} of {len(stuck)} constant classifiers)' * any(stuck)
            key = (f'eps {data.budget(run.eps, run.config["dataset"])}{note}',
                   colormaps['viridis'](budgets.index(run.eps) / len(budgets)))
            found.setdefault(key, []).append(run)
    return found


def band(ax, x, curves, label, **style):
    """The mean of the curves of all seeds, (seeds, len(x)), in a band of one deviation."""
    curves = np.array(curves, float)
    line, = ax.plot(x, curves.mean(0), label=label, **style)
    if len(curves) > 1:
        half = curves.std(0, ddof=1).clip(max=.9 * np.abs(curves.mean(0)))  # for log axes
        ax.fill_between(x, curves.mean(0) - half, curves.mean(0) + half, alpha=.2,
                        color=line.get_color(), lw=0)


def figure_1(theory, path):
    """g and g_eps of a one-dimensional logistic loss, at two budgets."""
    theta = np.array(theory['figure_1']['theta'])
    curves = theory['figure_1']['curves']
    with analysis.figure(path, 2, 'g(x, theta) = log(1 + exp(theta x)) at x = 1') as axes:
        for ax, eps in zip(axes, ('0.6', '1.2')):
            least = np.logaddexp(0, theta * (1 - float(eps) * np.sign(theta)))
            ax.fill_between(theta, least, curves[eps], alpha=.3,
                            label="$g(x', \\theta)$, $|x' - x| \\leq \\epsilon$")
            ax.plot(theta, curves['0'], '--', label='$g(x, \\theta)$')
            ax.plot(theta, curves[eps], label='$g_\\epsilon(x, \\theta)$')
            ax.set(xlabel='$\\theta$', ylabel='loss', title=f'eps {eps}')
            ax.legend()


def figure_2(group, path):
    """Gradient norm, robust training error and distance over the first and last updates."""
    found = by_eps(group, 'trace')
    if len(found) < 2:
        return False
    with analysis.figure(path, 2, title(group), rows=2) as axes:
        panels = (('grad_norm', 'norm of the stochastic gradient', slice(None, 1)),
                  ('robust_error', 'robust training error of the batch', slice(None, 1)),
                  ('distance', '$||\\theta - \\theta_0||$', slice(None, 1)),
                  ('grad_norm', 'norm of the stochastic gradient', slice(-1, None)))
        for ax, (key, label, side) in zip(axes, panels):
            for (eps, color), runs in found.items():
                n = min(min(run.config['trace'], max(1, len(run.trace) // 2)) for run in runs)
                rows = [run.trace[:n] if side.stop else run.trace[-n:] for run in runs]
                window = max(1, n // 40)  # means of so many updates: batches differ
                cut = [np.array([row[key] for row in part])[:n // window * window]
                       .reshape(-1, window).mean(1) for part in rows]
                steps = rows[0][0]['step'] + window * (np.arange(len(cut[0])) + .5)
                band(ax, steps, cut, eps, color=color)
            ax.set(xlabel='update', ylabel=label,
                   title=f'{"last" if side.start else "first"} updates')
            if key == 'grad_norm':
                ax.set_yscale('log')
            else:
                ax.set_ylim(0, 1 if key == 'robust_error' else None)
        axes[1].legend(fontsize=8)
    return True


def trusted(hessian):
    """The eigenvalues of a result, None for those that have not converged."""
    return [value if good else None for value, good in
            zip(hessian['eigen']['values'], hessian['eigen']['converged'])]


def figure_3(group, path):
    """Top eigenvalues of the Hessian, normalised (solid) and as they are (dashed)."""
    found = by_eps(group, 'hessian')
    if len(found) < 2:
        return False
    with analysis.figure(path, 2, title(group)) as axes:
        for (eps, color), runs in found.items():
            style = {'color': color, 'marker': 'o', 'ms': 3}
            k = min(len(run.hessian['eigen']['values']) for run in runs)
            values = [np.abs(np.array(trusted(run.hessian)[:k], float)) for run in runs]
            scaled = [value / run.hessian['scale']['mean'] for value, run in zip(values, runs)]
            band(axes[0], range(1, k + 1), scaled, eps, **style)
            band(axes[1], range(1, k + 1), values, eps, ls='--', **style)
        axes[0].set(title='divided by the mean $L_\\epsilon$ of random $\\theta$',
                    ylabel='|eigenvalue| / mean $L_\\epsilon$')
        axes[1].set(title='as they are', ylabel='|eigenvalue of the Hessian|')
        for ax in axes:
            ax.set(xlabel='number, by magnitude', yscale='log')
            ax.xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend(loc='upper right', fontsize=8)
    return True


def figure_4(group, path):
    """Cosine similarity of perturbations along the top eigenvector (dashed) and at random."""
    found = by_eps(group, 'similarity', lambda run: run.eps > 0 and not run.constant)
    if not found:
        return False
    with analysis.figure(path, 2, title(group)) as axes:
        for ax, key in zip(axes, ('cosine', 'robust_error')):
            for (eps, color), runs in found.items():
                for direction, style in (('eigenvector', '--'), ('random', '-')):
                    curves = [{point['a']: point[key] for point in run.similarity['points']
                               if point['direction'] == direction} for run in runs]
                    a = [x for x in sorted(set.intersection(*map(set, curves)))
                         if all(curve[x] is not None for curve in curves)]
                    if a:
                        band(ax, a, [[curve[x] for x in a] for curve in curves],
                             f'{eps}, {direction}', ls=style, color=color)
            ax.set(xlabel='$a$')
        axes[0].set(ylabel='cosine similarity', title='perturbations at $\\theta \\pm av$')
        axes[1].set(ylabel='robust error', title='at $\\theta \\pm av$', ylim=(0, 1))
        axes[0].legend(fontsize=7, handlelength=4)
    return True


def figure_11(group, path):
    """Learning curves of L_eps on the training set."""
    found = by_eps(group, 'log')
    if len(found) < 2:
        return False
    with analysis.figure(path, 1, title(group)) as (ax,):
        for (eps, color), runs in found.items():
            curves = [[row['loss'] for row in run.log] for run in runs]
            band(ax, range(1, len(curves[0]) + 1), curves, eps, color=color)
        ax.set(xlabel='epoch', ylabel='$L_\\epsilon$ on the training set', ylim=(0, None))
        ax.legend()
    return True


def figure_12(group, path):
    """L_eps in the plane of the top two eigenvectors, of the first seed at each eps."""
    first = {eps: runs[0] for (eps, _), runs in by_eps(group, 'surface').items()}
    grids = {}
    for eps, surface in ((eps, run.surface) for eps, run in first.items()):
        a, b = (sorted({point[axis] for point in surface['points']}) for axis in 'ab')
        points = {(point['a'], point['b']): point['loss'] for point in surface['points']}
        if len(points) == len(a) * len(b) and min(len(a), len(b)) > 1:
            grids[eps] = a, b, np.array([[points[x, y] for y in b] for x in a])
    if len(grids) < 2:
        return False
    losses = [loss for *_, loss in grids.values()]
    lowest, highest = min(map(np.min, losses)), max(map(np.max, losses))
    columns, rows = min(3, len(grids)), -(-len(grids) // 3)
    with analysis.figure(path, columns, title(list(first.values())), rows) as axes:
        figure = axes[0].figure
        for ax in axes:
            ax.remove()
        for i, (eps, (a, b, loss)) in enumerate(grids.items()):
            ax = figure.add_subplot(rows, columns, i + 1, projection='3d')
            ax.plot_surface(*np.meshgrid(a, b, indexing='ij'), loss, cmap='cividis',
                            vmin=lowest, vmax=highest)
            ax.set_box_aspect(None, zoom=.85)
            ax.set(xlabel='$a$', ylabel='$b$', zlim=(lowest, highest),
                   title=f'$L_\\epsilon$, {eps}')
            ax.locator_params(nbins=4)
    return True


def errors(run):
    """The PGD error of a run on the most test images it was measured on, and their number."""
    result = study.evaluation(run, 'pgd')
    return (result['columns']['pgd']['error'], result['n']) if result else (None, 0)


def by_rate(group):
    """Schedule -> learning rate -> seed -> PGD error, of the runs measured on most images.

    Where the learning rate is warmed up and eps is constant, the schedule is called lr warm-up. A
    run whose loss became infinite errs always.
    """
    most = max((errors(run)[1] for run in group), default=0)
    found = {}
    for run in study.usual(group):
        error, n = (1., most) if run.diverged else errors(run)
        kind = run.config['eps_sched'] + ' eps'
        if run.config.get('lr_warmup'):
            kind = 'lr warm-up' if kind == 'constant eps' else kind + ', lr warm-up'
        if n == most > 0:
            found.setdefault(kind, {}).setdefault(run.config['lr'], {})[run.seed] = error
    return found, most


def figure_5(group, path):
    """Robust test error against the learning rate, for each schedule of eps."""
    found, most = by_rate(group)
    if sum(len(rates) > 1 for rates in found.values()) < 2:
        return False
    with analysis.figure(path, 1, title(group)) as (ax,):
        looks = {'constant eps': dict(color='C0', marker='o', lw=4, ms=9),  # others may cover it
                 'cosine eps': dict(color='C1', marker='^'), 'lr warm-up': dict(
                     color='C4', marker='D', ls=':', mec='k'),
                 'linear eps': dict(color='k', marker='s')}
        for kind, rates in sorted(found.items()):
            lrs = sorted(rates)
            values = [[100 * error for error in rates[lr].values()] for lr in lrs]
            mean, half = np.array([[np.mean(v), np.std(v, ddof=1) if len(v) > 1 else 0]
                                   for v in values]).T
            line, = ax.plot(lrs, mean, label=kind, **looks.get(kind, {'marker': 'v'}))
            ax.fill_between(lrs, mean - half, mean + half, alpha=.2, color=line.get_color(), lw=0)
        ax.set(xscale='log', xlabel=f'learning rate of {group[0].config["optimizer"]}',
               ylabel=f'robust test error, %, PGD, n = {most:,}', ylim=(0, 100))
        ax.legend()
    return True


def figure_c23(group, path):
    """Figure 5 with the runs whose learning rate, not eps, is warmed up."""
    return any(run.config.get('lr_warmup') for run in group) and figure_5(group, path)


def figure_c24(group, path):
    """The share of units that no training image activates, by layer and width."""
    group = [run for run in group if run.dead]
    widths = sorted({run.config['width'] for run in group})
    if all(len({run.config['width'] for run in group if run.eps == eps}) < 2
           for eps in {run.eps for run in group} if eps > 0):
        return False
    budgets = sorted({run.eps for run in group})
    layers = [row['layer'] for row in group[0].dead['layers']]
    with analysis.figure(path, len(layers), title(group)) as axes:
        for ax, layer in zip(axes, layers):
            for i, eps in enumerate(budgets):
                color = colormaps['viridis'](i / len(budgets))
                for j, width in enumerate(widths):
                    shares = [row['share'] for run in group for row in run.dead['layers'] if (
                        run.eps, run.config['width'], row['layer']) == (eps, width, layer)]
                    if shares:
                        x = j + (i - (len(budgets) - 1) / 2) * .8 / len(budgets)
                        ax.bar(x, np.mean(shares), .7 / len(budgets), color=color, alpha=.7)
                        ax.plot([x] * len(shares), shares, 'k.', ms=4)
                ax.bar(0, 0, color=color, alpha=.7,
                       label=f'eps {data.budget(eps, group[0].config["dataset"])}')
            ax.set(xticks=range(len(widths)), xticklabels=widths, xlabel='width', title=layer,
                   ylim=(0, 1.02), ylabel='dead units (a dot a seed)')
        axes[0].legend()
    return True


def figure_c25(group, path):
    """L_eps along the straight line (dashed) and the trained curve between two runs."""
    found, ends = {}, {run.digest for run in group}
    for run in group:
        for curve, other in sorted(run.curves, key=lambda pair: pair[0]['n']):  # most images last
            if other.digest in ends and other.eps == run.eps:
                found[run.seed, other.seed, run.eps] = run, curve
    if not found or max(eps for *_, eps in found) == 0 < group[-1].eps:
        return False  # runs of eps 0 are drawn where they came from
    found = list(found.values())
    with analysis.figure(path, 2, title([run for run, _ in found])) as axes:
        budgets = sorted({run.eps for run, _ in found})
        for ax, key, label in zip(axes, ('loss', 'robust_error'), (
                '$L_\\epsilon$', 'robust error')):
            for i, eps in enumerate(budgets):
                color = colormaps['viridis'](i / len(budgets))
                for kind, style in (('line', '--'), (None, '-')):
                    paths = {}
                    for _, curve in (pair for pair in found if pair[0].eps == eps):
                        points = [point for point in curve['points']
                                  if point['path'] == (kind or curve['curve'])]
                        t = tuple(point['t'] for point in points)
                        paths.setdefault((kind or curve['curve'], t), []).append(
                            [point[key] for point in points])
                    for (name, t), curves in paths.items():
                        of = f'eps {data.budget(eps, group[0].config["dataset"])}, {name}'
                        band(ax, t, curves, of, ls=style, color=color)
            ax.set(xlabel='$t$ along the path', ylabel=label + ' on training images',
                   ylim=(0, None))
        axes[0].legend(fontsize=8)
    return True


# what is drawn, its name (Figure 2 on MNIST is Figure 8), and the settings in which its runs differ
FIGURES = (
    (figure_2, 'fig2', ('eps',)), (figure_3, 'fig3', ('eps',)), (figure_4, 'fig4', ('eps',)),
    (figure_5, 'fig5', ('lr', *study.SCHEDULE)), (figure_11, 'fig11', ('eps',)),
    (figure_12, 'fig12', ('eps',)), (figure_c23, 'c23', ('lr', 'lr_warmup', *study.SCHEDULE)),
    (figure_c24, 'c24', ('eps', 'width')), (figure_c25, 'c25', ('eps',)),
)

"""How loss and adversarial examples change as the parameters move.

    python landscape.py similarity RUN     perturbations found at theta + a v and - a v (Figure 4)
    python landscape.py surface RUN        L_eps and robust error in a plane at theta (Figure 12)
    python landscape.py connect RUN OTHER  a curve of low loss between two runs (C.2.5)
    python landscape.py dead RUN...        units that no training image activates (C.2.4)
    python landscape.py theory             section 3 checked in numbers (Figure 1)

Each writes its numbers, <name>.json, and a figure, <name>.png, into the folder of the (first) run.
Eigenvectors come from `python hessian.py RUN`. An interrupted computation goes on.
"""
import argparse
import contextlib
import hashlib
import math
import pathlib
import statistics
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

import analysis
import attack
import data
import models
import record
import schedule


@contextlib.contextmanager
def shifted(model, delta):
    """Inside, the parameters of `model` are theta + delta, (dim,), in the order of parameters().

    After, parameters and buffers (BatchNorm's statistics) are as they were, bit for bit, whatever
    happens.
    """
    tensors = [*model.parameters(), *model.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    theta = list(model.parameters())
    try:
        with torch.no_grad():
            for tensor, part in zip(theta, analysis.unflat(delta, theta)):
                tensor += part
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved):
                tensor.copy_(value)


def cosines(x, x_1, x_2):
    """Cosine similarity of the perturbations x_1 - x and x_2 - x of each image, (N,).

    It is nan where one of the two is zero and hence has no direction.
    """
    d_1, d_2 = ((x_adv - x).flatten(1).double() for x_adv in (x_1, x_2))
    return (d_1 * d_2).sum(1) / (d_1.norm(dim=1) * d_2.norm(dim=1))


def fill(out, head, names, keys, compute, args):
    """The result at OUT.json with a point compute(*key) for each of `keys`, named by `names`.

    Points are kept one by one, so those there are not computed again.
    """
    path = record.suffixed(out, '.json')
    with record.lock(out.parent, args.wait):
        result = analysis.resume(path, head, args.device)
        points = result.setdefault('points', [])
        with analysis.sound(path):
            done = {tuple(point[name] for name in names) for point in points}
            for point in points:  # numbers, but for the names
                sum(value or 0 for name, value in point.items() if name not in names)
        missing = [key for key in dict.fromkeys(keys) if key not in done]
        print(f'{path}: {len(missing)} of {len(keys)} points to compute', flush=True)
        with analysis.bar('points', len(missing)) as bar:
            for key in missing:
                began = time.monotonic()
                points.append(dict(zip(names, key)) | compute(*key))
                points[-1]['seconds'] = round(time.monotonic() - began, 2)
                record.save(path, result)
                bar.update()
    points.sort(key=lambda point: [point[name] for name in names])
    asked = [point for point in points if tuple(point[name] for name in names) in set(keys)]
    return result | {'points': asked}


def eigenvectors(subject, k):
    """The top k eigenvectors of the subject's Hessian, (k, dim), and the file they are from.

    Of several files that hessian.py left at this eps one whose pairs have converged is taken, and
    of these the one of most images.
    """
    s, found = subject, []
    for path in sorted(s.folder.glob('hessian*.json')):
        result = record.load(path)
        with analysis.sound(path):
            if (result['digest'], result['eps']) == (s.head['digest'], s.eps) \
                    and 'eigen' in result and len(result['eigen']['values']) >= k:
                good = all(result['eigen']['converged'][:k])
                found.append((good, result['n'], path, result))
    vectors = None
    if found:
        good, n, path, result = max(found)
        vectors = analysis.vectors(path.with_suffix('.pt'), result)
    if vectors is None or vectors.shape[1] != sum(p.numel() for p in s.model.parameters()):
        raise ValueError(f'{s.folder} has no top {k} eigenvectors at eps {s.eps:g}; first: '
                         f'python hessian.py {" ".join(s.again)}')
    if not good:
        print(f'{path}: not all of the top {k} eigenvectors have converged')
    vectors = vectors[:k]
    print(f'along eigenvectors of {path}, from {n} images')
    digest = hashlib.sha256(vectors.contiguous().numpy().tobytes()).hexdigest()
    return vectors.to(s.x), f'{path.stem}, {n} images, {digest[:10]}'


def similarity(args):
    """Figure 4: PGD at theta + a v and at theta - a v, v the top eigenvector or a random one."""
    s = analysis.subject(args.run, args)
    top, source = eigenvectors(s, 1)
    directions = {'eigenvector': top[0],
                  'random': analysis.random_unit(top.shape[1], top, args.seed, 4)}

    def compute(direction, a):
        rows, errors = [], {+1: [], -1: []}
        for run in range(args.runs):
            x_adv = {}
            for sign in errors:
                own = args.starts == 'independent' and sign < 0
                with shifted(s.model, sign * a * directions[direction]):
                    model = models.folded(s.model)
                    x_adv[sign] = s.pgd(model, s.x, s.y, seed=attack.derive(args.seed, run, own))
                    errors[sign].append(attack.mean_loss(model, x_adv[sign], s.y)[1])
            rows.append(cosines(s.x, x_adv[+1], x_adv[-1]))
        means = [row.nanmean().item() for row in rows if not row.isnan().all()]
        return {'cosine': statistics.mean(means) if means else None,
                'variance': statistics.variance(means) if len(means) > 1 else None,
                'undefined': torch.stack(rows).isnan().double().mean().item(),
                'robust_error': statistics.mean(errors[+1] + errors[-1])}

    out = analysis.outputs(s, 'similarity', args, runs=args.runs if args.runs != 4 else None,
                           starts_=args.starts if args.starts != 'equal' else None)
    head = s.head | {'eigenvectors': source, 'runs': args.runs, 'starts': args.starts}
    keys = [(direction, a) for direction in directions for a in args.a]
    result = fill(out, head, ('direction', 'a'), keys, compute, args)
    print(f'  {"v":<12}{"a":>8}{"cosine":>9}{"variance":>10}{"robust error":>14}')
    for point in result['points']:
        cosine = 'none' if point['cosine'] is None else f'{point["cosine"]:.3f}'
        print(f'  {point["direction"]:<12}{point["a"]:>8.3g}{cosine:>9}'
              f'{point["variance"] or 0:>10.1e}{point["robust_error"]:>14.1%}')
    with analysis.figure(record.suffixed(out, '.png'), 2, analysis.title(s.head)) as axes:
        for direction, style in (('eigenvector', 'o--'), ('random', 'o-')):
            points = [point for point in result['points'] if point['direction'] == direction]
            for ax, key in zip(axes, ('cosine', 'robust_error')):
                ax.plot([point['a'] for point in points], [
                    math.nan if point[key] is None else point[key] for point in points], style,
                    label=f'v: {"top eigenvector" if direction != "random" else "random unit"}')
        axes[0].set(xlabel='$a$', ylabel='cosine similarity', ylim=(None, 1.02), title=(
            f'perturbations at $\\theta + av$ and $\\theta - av$, mean of {args.runs} runs'))
        axes[1].set(xlabel='$a$', ylabel='robust error', ylim=(0, 1),
                    title='at $\\theta \\pm av$')
        for ax in axes:
            ax.legend()


def filter_normalised(model, *words):
    """A random direction, (dim,), each filter of the norm of the model's (Li et al. 2018).

    A filter is a row of a weight, for a convolution or a linear layer; biases and BatchNorm's
    parameters do not move.
    """
    theta = list(model.parameters())
    direction = analysis.unflat(analysis.random_unit(
        sum(p.numel() for p in theta), theta[0], *words), theta)
    for part, p in zip(direction, theta):
        if p.dim() < 2:
            part.zero_()
        else:
            rows = part.flatten(1)  # a view: the direction changes in place
            rows *= p.detach().flatten(1).norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
    return analysis.flat(direction)


def surface(args):
    """Figure 12: L_eps and robust error on a grid theta + a v_1 + b v_2, and its middle slices."""
    if len(args.grid) > 2:
        raise ValueError(f'--grid takes one or two numbers, got {len(args.grid)}')
    s = analysis.subject(args.run, args)
    if args.directions == 'eigen':
        directions, source = eigenvectors(s, 2)
    else:
        directions, source = [filter_normalised(s.model, args.seed, i) for i in (5, 6)], None
    x_fixed = None
    if args.adversarial == 'fixed':
        x_fixed = s.pgd(models.folded(s.model), s.x, s.y, seed=args.seed)

    def compute(a, b):
        with shifted(s.model, a * directions[0] + b * directions[1]):
            if args.recompute_bn:
                analysis.recompute_bn(s, x_fixed, seed=args.seed)
            model = models.folded(s.model)
            x_adv = s.pgd(model, s.x, s.y, seed=args.seed) if x_fixed is None else x_fixed
            loss, error = attack.mean_loss(model, x_adv, s.y)
        return {'loss': loss, 'robust_error': error}

    out = analysis.outputs(s, 'surface', args, filter='' if args.directions == 'filter' else None,
                           fixed='' if args.adversarial == 'fixed' else None,
                           bn='' if args.recompute_bn else None)
    head = s.head | {'eigenvectors': source, 'directions': args.directions,
                     'adversarial': args.adversarial, 'recompute_bn': args.recompute_bn}
    ticks = [[args.radius * (2 * i / (n - 1) - 1) if n > 1 else 0. for i in range(n)]
             for n in args.grid[:1] + args.grid[-1:]]
    keys = [(a, b) for a in ticks[0] for b in ticks[1]]
    result = fill(out, head, ('a', 'b'), keys, compute, args)
    points = {(point['a'], point['b']): point for point in result['points']}
    loss, error = (torch.tensor([[points[a, b][name] for b in ticks[1]] for a in ticks[0]])
                   for name in ('loss', 'robust_error'))
    print(f'  L_eps {loss.min():.4g} .. {loss.max():.4g}, robust error {error.min():.1%} .. '
          f'{error.max():.1%} on {len(ticks[0])} x {len(ticks[1])} points')
    axis = '${}$ along the {} ' + ('eigenvector' if source else 'filter-normalised direction')
    labels = axis.format('a', 'top' if source else 'first'), axis.format('b', 'second')
    if len(keys) == 1:
        return
    flat = min(map(len, ticks)) == 1  # a line, no plane
    with analysis.figure(record.suffixed(out, '_line.png' if flat else '.png'), 1 if flat else 3,
                         analysis.title(s.head) + (
            '' if x_fixed is None else ', adversarial examples of the centre')) as axes:
        errors = axes[-1].twinx()
        for k, name in enumerate(('a', 'b')):
            if len(ticks[k]) > 1:
                middle = len(ticks[1 - k]) // 2
                line, wrong = (values.select(1 - k, middle) for values in (loss, error))
                color = axes[-1].plot(ticks[k], line, 'o-', ms=3,
                                      label=f'$L_\\epsilon$ along ${name}$')[0].get_color()
                errors.plot(ticks[k], wrong, '--', color=color)
                axes[-1].plot([], [], '--', color=color, label=f'robust error along ${name}$')
        axes[-1].set(ylabel='$L_\\epsilon$', title='' if flat else 'slices through the middle',
                     xlabel=labels[len(ticks[0]) == 1] if flat else 'displacement')
        axes[-1].set_ylim(0, None)
        errors.set(ylabel='robust error', ylim=(0, 1.02))
        axes[-1].legend()
        if not flat:
            grid = torch.meshgrid(*map(torch.tensor, ticks), indexing='ij')
            solid = axes[0].figure.add_subplot(1, 3, 1, projection='3d')
            axes[0].remove()
            solid.plot_surface(*grid, loss, cmap='cividis')
            solid.set_box_aspect(None, zoom=.8)
            solid.set(xlabel='$a$', ylabel='$b$', title='$L_\\epsilon$')
            solid.locator_params(nbins=4)
            mesh = axes[1].pcolormesh(*ticks, error.T, cmap='cividis', vmin=0, vmax=1)
            axes[1].figure.colorbar(mesh, label='robust error')
            axes[1].set(xlabel=labels[0], ylabel=labels[1], title='robust error')


class Curve(nn.Module):
    """The network `model` with parameters on a curve between two ends (Garipov et al. 2018).

    theta(t), t in [0, 1], is a Bezier curve or a polygonal chain of `n_control` points; the ends
    are fixed, (dim,) each, those between are the parameter `inner`, at first on the straight line.
    forward computes at self.t. The model lends its structure and its BatchNorm statistics.
    """

    def __init__(self, model, first, last, n_control=2, kind='bezier'):
        super().__init__()
        self.model, self.n, self.kind, self.t = model, n_control, kind, .5
        self.first, self.last = first, last
        share = torch.arange(1, n_control - 1).to(first)[:, None] / (n_control - 1)
        self.inner = nn.Parameter((1 - share) * first + share * last)

    def weights(self, t):
        """The weight of each control point at t, (n_control,): Bernstein polynomials or hats."""
        n = self.n - 1
        if self.kind == 'bezier':
            return [math.comb(n, i) * t ** i * (1 - t) ** (n - i) for i in range(self.n)]
        return [max(0., 1 - abs(t * n - i)) for i in range(self.n)]

    def theta(self, t):
        """The parameters at t, (dim,)."""
        weights = self.weights(t)
        inner = self.inner.new_tensor(weights[1:-1]) @ self.inner
        return weights[0] * self.first + inner + weights[-1] * self.last

    def forward(self, x):
        names, like = zip(*self.model.named_parameters())
        theta = dict(zip(names, analysis.unflat(self.theta(self.t), like)))
        return functional_call(self.model, theta, (x,))


def train_curve(curve, s, args, made, path):
    """Trains the inner points on the mean L_eps over t uniform in [0, 1]; goes on from `path`."""
    optimizer = torch.optim.SGD([curve.inner], args.lr, momentum=.9, weight_decay=1e-6)
    made = {name: value for name, value in made.items() if name != 'checkpoint'}
    kept = analysis.kept(path, made) or {'made': made, 'losses': []}
    if kept['losses']:
        curve.inner.data.copy_(kept['inner'])
        for buffer, value in zip(curve.model.buffers(), kept['buffers']):  # BatchNorm's statistics
            buffer.copy_(value)
        optimizer.load_state_dict(kept['optimizer'])
    augment = bool(s.config and s.config.get('augment'))
    with analysis.bar('epochs', args.epochs, len(kept['losses'])) as bar:
        while (epoch := len(kept['losses'])) < args.epochs:
            generator = torch.Generator().manual_seed(attack.derive(args.seed, epoch))
            total = 0.
            for group in optimizer.param_groups:
                group['lr'] = schedule.lr_at(epoch / args.epochs, 'step', args.lr)
            for i, (x, y) in enumerate(data.batches(s.x, s.y, args.train_batch_size, generator,
                                                    augment)):
                curve.t = torch.rand((), generator=generator).item()
                x = s.pgd(curve, x, y, seed=attack.derive(args.seed, epoch, i), index=None)
                curve.train()
                loss = F.cross_entropy(curve(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(y) / len(s.x)
            if not math.isfinite(total):
                raise attack.NotFiniteError(f'the loss on the curve became {total} in epoch '
                                            f'{epoch + 1}; try a smaller --lr than {args.lr:g}')
            kept['losses'].append(total)
            bar.set_postfix_str(f'loss {total:.4f}', refresh=False)
            bar.update()
            record.save(path, kept | {'inner': curve.inner.detach().cpu(),
                                      'buffers': list(curve.model.buffers()),
                                      'optimizer': optimizer.state_dict()})
    return kept['losses']


def connect(args):
    """C.2.5: a curve between two runs, trained to be low, and the straight line, under L_eps."""
    s, other = (analysis.subject(path, args) for path in (args.run, args.other))
    if s.head['digest'] == other.head['digest']:
        raise ValueError(f'{args.run} and {args.other} are one and the same network')
    if [p.shape for p in s.model.parameters()] != [p.shape for p in other.model.parameters()]:
        raise ValueError(f'{args.run} and {args.other} are networks of different shapes')
    if s.head['dataset'] != other.head['dataset'] or s.eps != other.eps:
        raise ValueError(f'{args.run} is of {s.head["dataset"]} at eps {s.eps:g}, {args.other} of '
                         f'{other.head["dataset"]} at {other.eps:g}; --eps says at which')
    ends = [analysis.flat(model.parameters()) for model in (s.model, other.model)]
    x_test, y_test = (part[:len(s.x)] for part in data.load_once(
        s.head['dataset'], args.data_dir, args.device)[2:])
    x_test = x_test.to(s.x.dtype)
    made = {name: getattr(args, name) for name in ('curve', 'n_control', 'epochs', 'lr',
                                                   'train_batch_size')}
    usual = vars(parse(['connect', '', '']))
    out = analysis.outputs(s, f'connect_{other.name}', args, **{
        f'{name}_': value for name, value in made.items() if value != usual[name]})
    head = s.head | {'other': other.head['digest']} | made
    curves = {'line': Curve(s.model, *ends),
              args.curve: Curve(s.model, *ends, args.n_control, args.curve)}
    with record.lock(s.folder, args.wait):
        losses = train_curve(curves[args.curve], s, args, head, record.suffixed(out, '.pt'))

    def compute(path, t):
        curve = curves[path]
        curve.t = t
        at_t = SimpleNamespace(model=curve, x=s.x, y=s.y, pgd=s.pgd)
        analysis.recompute_bn(at_t, seed=args.seed)
        loss, error = attack.mean_loss(curve, s.pgd(curve, s.x, s.y, seed=args.seed), s.y)
        x_adv = s.pgd(curve, x_test, y_test, seed=args.seed, index=None)
        test_loss, test_error = attack.mean_loss(curve, x_adv, y_test)
        return {'loss': loss, 'robust_error': error, 'test_loss': test_loss,
                'test_robust_error': test_error}

    keys = [(path, i / (args.points - 1)) for path in curves for i in range(args.points)]
    result = fill(out, head, ('path', 't'), keys, compute, args)
    rows = {path: [point for point in result['points'] if point['path'] == path] for path in curves}
    result['barriers'] = {path: max(point['loss'] for point in points)
                          - max(points[0]['loss'], points[-1]['loss'])
                          for path, points in rows.items()}
    result['train_losses'] = losses
    record.save(record.suffixed(out, '.json'), result)
    for path, points in rows.items():
        highest = max(points, key=lambda point: point['loss'])
        print(f'  {path:<8} L_eps {points[0]["loss"]:.4g} and {points[-1]["loss"]:.4g} at the ends,'
              f' at most {highest["loss"]:.4g}, at t = {highest["t"]:.2f}: a barrier of '
              f'{result["barriers"][path]:.4g}; robust error there {highest["robust_error"]:.1%}')
    with analysis.figure(record.suffixed(out, '.png'), 2,
                         f'{analysis.title(s.head)}\nto {other.name}') as axes:
        for (path, points), style in zip(rows.items(), ('--', '-')):
            for ax, key in zip(axes, ('loss', 'robust_error')):
                t = [point['t'] for point in points]
                color = ax.plot(t, [point[key] for point in points], 'o' + style, ms=3,
                                label=f'{path}, training images')[0].get_color()
                ax.plot(t, [point[f'test_{key}'] for point in points], style, lw=1, alpha=.5,
                        color=color, label=f'{path}, {len(x_test):,} test images')
                ax.set(xlabel='$t$ along the path',
                       ylabel='$L_\\epsilon$' if key == 'loss' else 'robust error')
        for ax in axes:
            ax.set_ylim(0, None)
        axes[0].legend()


class Units(TorchFunctionMode):
    """Inside, each relu that the model computes is noted: which of its units were ever active.

    A unit is a channel of a convolution, active if it is anywhere in an image, or a neuron of a
    linear layer. A layer is named after the last module with parameters before its relu.
    `active` maps these names to (units,) bool.
    """

    def __init__(self, model):
        super().__init__()
        self.active, self.model, self.hooks = {}, model, []

    def __enter__(self):
        def note(name):
            def hook(module, inputs, output):  # returns None: the output stays as it is
                self.last = name
            return hook

        self.hooks = [module.register_forward_hook(note(name))
                      for name, module in self.model.named_modules()
                      if next(module.parameters(recurse=False), None) is not None]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_):
            other = [i for i in range(output.dim()) if i != 1]
            active = (output > 0).amax(other)
            self.active[self.last] = self.active.get(self.last, False) | active
        return output


def dead_units(model, x, batch_size=250):
    """Layer -> which of its units no image of x activates, (units,) bool (C.2.4)."""
    with Units(model) as units, models.frozen(model), torch.no_grad():
        for part in x.split(batch_size):
            model(part)
    return {name: ~active.cpu() for name, active in units.active.items()}


def dead(args):
    """C.2.4: the share of units in each layer that no training image activates, for each run."""
    for path in args.runs:
        record.members(path)  # what is wrong with one is said before the table begins
    table = [f'  {"run":<32}{"eps":>6}{"width":>6}  dead units by layer (a layer all dead: DEAD)']
    for path in args.runs:
        s = analysis.subject(path, args)
        out = analysis.outputs(s, 'dead', args)
        with record.lock(s.folder, args.wait):
            result = analysis.resume(record.suffixed(out, '.json'), s.head, args.device)
            began = time.monotonic()
            units = dead_units(s.model, s.x, args.batch_size)
            result |= {
                'layers': [{'layer': name, 'units': len(gone), 'dead': int(gone.sum()),
                            'share': gone.double().mean().item(), 'all': bool(gone.all())}
                           for name, gone in units.items()],
                'predicted_classes': len(attack.predict(s.model, s.x, args.batch_size).unique()),
                'seconds': round(time.monotonic() - began, 2)}
            record.save(record.suffixed(out, '.json'), result)
            text = '  '.join(f'{row["layer"]} ' + ('DEAD' if row['all'] else f'{row["share"]:.0%}')
                             for row in result['layers'])
            width = s.config['width'] if s.config else ''
            table.append(f'  {s.name:<32}{s.eps:>6.4g}{width:>6}  {text}'
                         + '  (a constant classifier)' * (result['predicted_classes'] == 1))
            with analysis.figure(record.suffixed(out, '.png'), 1, analysis.title(s.head)) as (ax,):
                names = [row['layer'] for row in result['layers']]
                bars = ax.barh(names, [row['share'] for row in result['layers']])
                ax.bar_label(bars, [f'{row["dead"]} of {row["units"]}' for row in result['layers']],
                             padding=3)
                ax.set(xlim=(0, 1.25), xticks=[0, .25, .5, .75, 1],
                       xlabel='share of units that no training image activates')
                ax.invert_yaxis()
    print(*table, sep='\n')


def version_space_eps(x, y, W):
    """The largest eps at which W, (K, m), is in V_eps of (x, y): Proposition 1, closed form.

    -inf where it is at none. W is robust on S_eps(x), the l_inf ball without a pixel box, if
    (w_i - w_y) x + eps ||w_i - w_y||_1 <= 0 for all i, so V_eps shrinks as eps grows.
    """
    difference = torch.cat([W[:y], W[y + 1:]]) - W[y]
    slack = -(difference @ x)
    return (slack / difference.abs().sum(1)).min().item() if (slack >= 0).all() else -math.inf


def constant_eps(x, y, W):
    """The smallest eps at which W, (K, m), is in T_eps of (x, y): Theorem 1, closed form.

    The loss along gamma W is convex, so gamma = 0 is optimal if neither side falls there, that is
    if |v x| <= eps ||v||_1 with v = sum_j (w_j - w_y). Hence eps >= ||x||_inf suffices for all W.
    x, (N, m), and y, (N,), may be a dataset: L_eps then has means on both sides.
    """
    v = W.sum(0) - len(W) * W[y]
    return ((v * x).sum(-1).mean().abs() / v.abs().sum(-1).mean()).item()


def adversarial_log_loss(theta, z, eps):
    """g_eps(z, theta) = max log(1 + exp(theta z')) over |z' - z| <= eps, and its slope in theta.

    Figure 1 draws it at z = 1. At the kink theta = 0 the slope is that of theta > 0.
    """
    side = torch.where(theta < 0, -1., 1.)
    worst = z + eps * side
    return F.softplus(theta * worst), torch.sigmoid(theta * worst) * worst


def large_gradients(eps, gammas, seed, n=100, n_runs=20, n_steps=10000):
    """Theorem 2 on logistic regression in one dimension: for each gamma of `gammas` the share of
    the iterates of SGD at which |gradient of L_eps| > gamma eps L_theta_x, and the bound on it.

    g(z, theta) = log(1 + exp(theta z)) meets Assumption 1 with L_theta_theta = max |z'|^2 / 4 and
    L_theta_x = max_u |sigmoid(u) + u sigmoid'(u)|, and its inner maximum is exact. z, (n,), is
    Gaussian about 0.5; `n_runs` start in [-5, 5] and draw one z a step, of size
    1 / (L_theta_theta sqrt(n_steps)).
    """
    generator = torch.Generator().manual_seed(attack.derive(seed, 7))
    z = .5 + torch.randn(n, generator=generator, dtype=torch.float64)
    u = torch.linspace(0, 10, 100001, dtype=torch.float64)
    mixed = (torch.sigmoid(u) + u * torch.sigmoid(u) * torch.sigmoid(-u)).max().item()
    step = 4 / ((z.abs().max().item() + eps) ** 2 * math.sqrt(n_steps))
    theta = torch.linspace(-5, 5, n_runs, dtype=torch.float64)
    draws = torch.randint(n, (n_steps, n_runs), generator=generator)
    norms = torch.empty(n_steps, n_runs, dtype=torch.float64)
    for t in range(n_steps):
        norms[t] = adversarial_log_loss(theta[:, None], z, eps)[1].mean(1).abs()
        theta = theta - step * adversarial_log_loss(theta, z[draws[t]], eps)[1]
    return [{'gamma': gamma, 'share': (norms > gamma * eps * mixed).double().mean().item(),
             'bound': 4 / (gamma ** 2 - 2 * gamma + 4)} for gamma in gammas]


def theory(args):
    """Section 3 in numbers: Proposition 1 and Theorem 1 on linear models, Theorem 2, Figure 1."""
    began, out = time.monotonic(), pathlib.Path(args.out, 'theory')
    out.parent.mkdir(parents=True, exist_ok=True)
    x, y = data.load_once('mnist5k', args.data_dir, 'cpu')[:2]
    rows = data.subset(len(x), 500)
    x, y = x[rows].flatten(1).double(), y[rows]
    generator = torch.Generator().manual_seed(attack.derive(args.seed, 8))
    cases = {f'a digit, m = {x.shape[1]}, K = 10': (10, x[:1], y[0]),
             f'{len(x):,} digits, m = {x.shape[1]}, K = 10': (10, x, y),
             'a random x, m = 10, K = 3': (3, torch.rand(1, 10, generator=generator).double(),
                                           torch.tensor(0))}
    eps = [10 ** (i / 10 - 4) for i in range(41)]
    theorem_1 = []
    for name, (n_classes, points, label) in cases.items():
        draws = [torch.randn(n_classes, points.shape[1], generator=generator, dtype=torch.float64)
                 for _ in range(args.draws)]
        needed = torch.tensor([constant_eps(points, label, W) for W in draws])
        kept = torch.tensor([version_space_eps(points[0], int(label), W) for W in draws]
                            if len(points) == 1 else [])
        theorem_1.append({
            'case': name, 'draws': args.draws, 'eps': eps,
            'share_in_T': [(needed <= value).double().mean().item() for value in eps],
            'share_in_V': [(kept >= value).double().mean().item() for value in eps]
            if len(kept) else None,
            'all_in_T_from': needed.max().item(), 'sufficient': points.abs().max().item()})
        print(f'  Theorem 1, {name}: all of {args.draws} random W are in T_eps from eps '
              f'{needed.max():.4g}; eps = ||x||_inf = {points.abs().max():.4g} suffices for any')
    gammas = [2 + i / 4 for i in range(17)]
    theorem_2 = [{'eps': value, 'points': large_gradients(value, gammas, args.seed)}
                 for value in (.05, .1, .2)]
    for row in theorem_2:
        holds = all(point['share'] < point['bound'] for point in row['points'])
        print(f'  Theorem 2, eps {row["eps"]}: P(gradient > 4 eps L) = '
              f'{row["points"][8]["share"]:.4f}, bound {row["points"][8]["bound"]:.4f}; '
              f'{"holds" if holds else "does NOT hold"} for gamma in [2, 6]')
    theta = torch.linspace(-2, 2, 401, dtype=torch.float64)
    figure_1 = {'theta': theta.tolist(), 'curves': {
        str(value): adversarial_log_loss(theta, 1., value)[0].tolist() for value in (0, .6, 1.2)}}
    record.save(record.suffixed(out, '.json'), {
        'seed': args.seed, 'theorem_1': theorem_1, 'theorem_2': theorem_2, 'figure_1': figure_1,
        'seconds': round(time.monotonic() - began, 1), 'sessions': [record.describe('cpu')]})
    with analysis.figure(record.suffixed(out, '.png'), 2, 'Section 3 in numbers', 2) as axes:
        for ax, value in zip(axes, (.6, 1.2)):
            least = F.softplus(theta * (1 - value * theta.sign()))
            ax.fill_between(theta, least, figure_1['curves'][str(value)], alpha=.3,
                            label='$g(x\', \\theta)$, $|x\' - x| \\leq \\epsilon$')
            ax.plot(theta, figure_1['curves']['0'], '--', label='$g(x, \\theta)$')
            ax.plot(theta, figure_1['curves'][str(value)], label='$g_\\epsilon(x, \\theta)$')
            ax.set(xlabel='$\\theta$', ylabel='loss', title=f'Figure 1: eps {value}, x = 1')
            ax.legend()
        for row in theorem_1:
            line, = axes[2].semilogx(eps, row['share_in_T'], label=f'T: {row["case"]}')
            if row['share_in_V']:
                axes[2].semilogx(eps, row['share_in_V'], '--', color=line.get_color(),
                                 label=f'V: {row["case"]}')
        axes[2].set(xlabel='eps', ylabel='share of random W', ylim=(0, 1.02), title=(
            f'T grows (Theorem 1), V shrinks (Proposition 1)\n{args.draws} draws'))
        axes[2].legend(fontsize=7, loc='upper left')
        for row in theorem_2:
            axes[3].plot(gammas, [point['share'] for point in row['points']], 'o-', ms=3,
                         label=f'measured, eps {row["eps"]}')
        axes[3].plot(gammas, [4 / (gamma ** 2 - 2 * gamma + 4) for gamma in gammas], 'k--',
                     label='bound of Theorem 2')
        axes[3].set(xlabel='$\\gamma$', ylim=(0, None), title='Theorem 2: logistic regression, '
                    '20 runs of SGD', ylabel='P(gradient $> \\gamma \\epsilon L_{\\theta x}$)')
        axes[3].legend()


def parse(argv):
    """The command line."""
    number, count = record.number, record.number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(run, *names, nargs=None):
        text = run.__doc__
        sub = commands.add_parser(run.__name__, help=text.splitlines()[0], description=text)
        sub.set_defaults(run_command=run)
        for name in names:
            sub.add_argument(name, metavar=name.rstrip('s').upper(), nargs=nargs,
                             help='run folder (its last model) or checkpoint')
        return sub.add_argument

    add = command(similarity, 'run')
    add('--a', type=number(float, 0), nargs='+', default=[0., .1, .2, .4, .6, .8, 1.],
        help='displacements along the unit vector v; default: 0 0.1 0.2 0.4 0.6 0.8 1')
    add('--runs', type=number(int, 1, 1000), default=4,
        help='of PGD, from other starts; default: 4')
    add('--starts', choices=('equal', 'independent'), default='equal',
        help='whether PGD starts alike at theta + a v and theta - a v; default: equal')
    add = command(surface, 'run')
    add('--directions', choices=('eigen', 'filter'), default='eigen',
        help='top two eigenvectors, or two random filter-normalised directions; default: eigen')
    add('--grid', type=number(int, 1, 1000), nargs='+', metavar='N', default=[21],
        help='points a side; 41 1 is a line along the first direction; default: 21')
    add('--radius', type=number(float, 0), default=.5, help='largest displacement; default: 0.5')
    add('--adversarial', choices=('regenerate', 'fixed'), default='regenerate',
        help='make adversarial examples at every point or keep those of theta; '
        'default: regenerate')
    add('--recompute-bn', action='store_true', help="BatchNorm's statistics afresh at every point")
    add = command(connect, 'run', 'other')
    add('--curve', choices=('bezier', 'polygon'), default='bezier', help='default: bezier')
    add('--n-control', type=number(int, 3, 100), default=5,
        help='control points, with the two ends; default: 5')
    add('--epochs', type=count, default=200, help='default: 200')
    add('--lr', type=number(float, 0), default=.1,
        help='of SGD, a tenth at half and a hundredth at three quarters; default: 0.1')
    add('--train-batch-size', type=count, default=128, help='default: 128')
    add('--points', type=number(int, 2, 10000), default=21,
        help='measured along a path; default: 21')
    command(dead, 'runs', nargs='+')
    for name in 'similarity', 'surface', 'connect', 'dead':
        analysis.add_flags(commands.choices[name])
    add = command(theory)
    add('--draws', type=count, default=1000, help='random linear models; default: 1000')
    add('--seed', type=number(int, 0, 2 ** 32 - 1), default=0, help='default: 0')
    add('--out', default='evals', help='folder; default: evals')
    add('--data-dir', default='data', help='folder of mnist5k.npz; default: data')
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    with models.tf32(False):
        args.run_command(args)


if __name__ == '__main__':
    record.run(main)

"""How loss and adversarial examples change as the parameters move.

Each command writes RUN/<command>*.json; given again, it resumes, but for `dead`, which is quick.
Eigenvectors are hessian.py's.
"""

import argparse
import functools
import math
import statistics

import torch
import torch.nn.functional as F
from torch.nn.utils import vector_to_parameters

import data
import schedule
from lib import analysis, cli, fast, record, rng
from lib.classifier import flat, frozen, mean_loss, predict


def measure(result, path, keys, compute):
    """Adds key | compute(**key) to result['points'] for each of `keys`, and saves after each; the
    points that are there already are those of the first keys."""
    points = result.setdefault('points', [])
    print(f'{path}: {len(keys) - len(points)} of {len(keys)} points to compute', flush=True)
    with cli.bar(' points', len(keys), len(points)) as bar:
        for key in keys[len(points) :]:
            points.append(key | compute(**key))
            record.save(path, result)
            bar.update()


def attacked(run, model, delta, seed):
    """Adversarial examples, L_eps and robust error of `model`, the folded run.model, at parameters
    theta + delta, (dim,); theta is restored bit for bit."""
    parameters = list(run.model.parameters())
    theta = flat(parameters)
    try:
        vector_to_parameters(theta + delta, parameters)
        model.refold()
        x_adv = run.pgd(model, run.x, run.y, seed=seed)
        return x_adv, *mean_loss(model, x_adv, run.y)
    finally:
        vector_to_parameters(theta, parameters)


def similarity(run, args):
    """Figure 4: PGD at theta + a v and at theta - a v, v the top eigenvector or a random one."""
    if not run.eps:
        raise ValueError(f'{args.run}: at eps 0 nothing is perturbed; name another --eps')
    (top,), source = analysis.eigenvectors(run, 1)
    directions = {'eigenvector': top, 'random': rng.unit_vector(len(top), top, args.seed, 4)}
    model = fast.folded(run.model, run.x[:8])

    def compute(direction, a):
        delta = a * directions[direction]
        cosines, errors = [], []
        for i in range(4):
            seed = rng.fold_in(args.seed, i, 0)
            ends = [attacked(run, model, shift, seed) for shift in (delta, -delta)]
            moved = [(x_adv - run.x).flatten(1).double() for x_adv, _, _ in ends]
            cosines.append(F.cosine_similarity(*moved).mean().item())
            errors += [error for _, _, error in ends]
        return {'cosine': statistics.mean(cosines), 'robust_error': statistics.mean(errors)}

    path = record.output(run.folder, 'similarity', args, run.defaults)
    sweep = {'eigenvectors': source, 'a': args.a}
    result = record.resume(path, run.metadata | sweep, args.device)
    keys = [{'direction': direction, 'a': a} for direction in directions for a in args.a]
    measure(result, path, keys, compute)
    record.save(path, result | {'complete': True})
    line = '{direction:11}  a {a:5.3g}  cosine {cosine:7.4f}  robust error {robust_error:.4f}'
    for point in result['points']:
        print(line.format(**point))
    return path


def surface(run, args):
    """Figure 12: L_eps and robust error at theta + a v_1 + b v_2, a and b on a grid."""
    (v_1, v_2), source = analysis.eigenvectors(run, 2)
    model = fast.folded(run.model, run.x[:8])

    def compute(a, b):
        _, loss, error = attacked(run, model, a * v_1 + b * v_2, args.seed)
        return {'loss': loss, 'robust_error': error}

    path = record.output(run.folder, 'surface', args, run.defaults)
    sweep = {'eigenvectors': source, 'grid': args.grid, 'radius': args.radius}
    result = record.resume(path, run.metadata | sweep, args.device)
    ticks = [args.radius * (2 * i / max(1, args.grid - 1) - 1) for i in range(args.grid)]
    measure(result, path, [{'a': a, 'b': b} for a in ticks for b in ticks], compute)
    record.save(path, result | {'complete': True})
    for name in 'loss', 'robust_error':
        values = [point[name] for point in result['points']]
        print(f'{name}: {min(values):.4g} to {max(values):.4g}')
    return path


def bezier(t, points):
    """theta(t), (dim,), on the Bezier curve with control `points`, (n, dim), and their weights in
    it, (n,) (Garipov et al. 2018); a straight line if n = 2."""
    n = len(points) - 1
    weights = [math.comb(n, i) * t**i * (1 - t) ** (n - i) for i in range(n + 1)]
    weights = points.new_tensor(weights)
    return weights @ points, weights


def train_curve(points, run, args, metadata, path):
    """Trains points[1:-1] in place to lower the mean L_eps over t uniform in [0, 1], resuming from
    the state at `path`. Returns the loss of each epoch."""
    inner = points[1:-1]
    parameters = list(run.model.parameters())
    tensors = [inner, *run.model.buffers()]
    losses = []
    settings = metadata | {'checkpoint': None}  # its path does not matter
    optimizer = torch.optim.SGD([inner], args.lr, momentum=0.9, weight_decay=1e-6)
    state = record.load(path) if path.exists() else {'settings': None}
    if state['settings'] == settings:
        losses = state['losses']
        for tensor, value in zip(tensors, state['tensors']):
            tensor.copy_(value)
        optimizer.load_state_dict(state['optimizer'])
    with cli.bar(' epochs', args.epochs, len(losses)) as bar:
        for epoch in range(len(losses), args.epochs):
            losses.append(0.0)
            generator = rng.generator(args.seed, epoch)
            optimizer.param_groups[0]['lr'] = schedule.lr_at(epoch / args.epochs, 'step', args.lr)
            batches = data.batches(run.x, run.y, args.train_batch_size, generator, run.augment)
            for i, (x, y) in enumerate(batches):
                theta, weights = bezier(torch.rand((), generator=generator).item(), points)
                vector_to_parameters(theta, parameters)
                x_adv = run.pgd(run.model, x, y, seed=rng.fold_in(args.seed, epoch, i), index=None)
                loss = F.cross_entropy(run.model.train()(x_adv), y)
                gradient = flat(torch.autograd.grad(loss, parameters))
                inner.grad = weights[1:-1, None] * gradient  # the chain rule
                optimizer.step()
                losses[-1] += loss.item() * len(y) / len(run.x)
            state = {'settings': settings, 'losses': losses, 'tensors': tensors}
            record.save(path, state | {'optimizer': optimizer.state_dict()})
            bar.update()
    return losses


def connect(run, args):
    """C.2.5: L_eps along a trained curve of low loss between two runs, and the straight line."""
    other = analysis.load_run(args.other, args)
    ends = run, other
    alike = [(e.metadata['dataset'], e.eps, [p.shape for p in e.model.parameters()]) for e in ends]
    if run.metadata['digest'] == other.metadata['digest'] or alike[0] != alike[1]:
        raise ValueError(f'{args.run}, {args.other}: no two networks of one shape, dataset and eps')
    stem = f'connect_{other.folder.resolve().name}'
    file = record.output(run.folder, stem, args, run.defaults)
    settings = run.metadata | {'curve': 'bezier', 'other': other.metadata['digest']}
    for name in 'n_control', 'epochs', 'lr', 'train_batch_size':
        settings[name] = vars(args)[name]
    result = record.resume(file, settings | {'n_points': args.points}, args.device)
    line = torch.stack([flat(end.model.parameters()) for end in ends])
    share = torch.arange(args.n_control).to(line)[:, None] / (args.n_control - 1)
    curves = {'line': line, 'bezier': (1 - share) * line[0] + share * line[1]}
    if not result.get('complete'):
        state = file.with_suffix('.pt')
        result['train_losses'] = train_curve(curves['bezier'], run, args, settings, state)
    pgd = functools.partial(run.pgd, seed=args.seed)

    def compute(path, t):
        vector_to_parameters(bezier(t, curves[path])[0], run.model.parameters())
        analysis.recompute_bn(run.model, run.x, run.y, pgd)
        x_adv = pgd(run.model, run.x, run.y)
        loss, error = mean_loss(run.model, x_adv, run.y)
        return {'loss': loss, 'robust_error': error}

    ticks = [i / max(1, args.points - 1) for i in range(args.points)]
    measure(result, file, [{'path': path, 't': t} for path in curves for t in ticks], compute)
    barriers = {}
    for path in curves:
        losses = [point['loss'] for point in result['points'] if point['path'] == path]
        barriers[path] = max(losses) - max(losses[0], losses[-1])
        ends = f'{losses[0]:.4g} and {losses[-1]:.4g}'
        print(f'{path:6}  ends {ends}, maximum {max(losses):.4g}, barrier {barriers[path]:.4g}')
    record.save(file, result | {'barriers': barriers, 'complete': True})
    return file


def dead_units(model, x, batch_size):
    """The model's predictions on x, and which units of each ReLU (channels or neurons) no image
    activates, (units,) bool. A ReLU has the name of the last layer with parameters before it, with
    one ' for each ReLU between them."""
    layers = {p: name.rpartition('.')[0] for name, p in model.named_parameters()}
    active = {}

    class Watch(torch.overrides.TorchFunctionMode):
        relu = 'input'

        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            output = function(*args, **kwargs)
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.nn.Parameter):
                    self.relu = layers.get(value) or self.relu
            if function.__name__ in ('relu', 'relu_'):
                units = (output > 0).transpose(0, 1).flatten(1).any(1)
                active[self.relu] = active.get(self.relu, False) | units
                self.relu += "'"
            return output

    def watched(batch):
        with Watch():
            return model(batch)

    with frozen(model):
        classes = predict(watched, x, batch_size)
    return classes, {relu: ~units.cpu() for relu, units in active.items()}


def dead(run, args):
    """C.2.4: the share of units in each layer that no training image activates."""
    path = record.output(run.folder, 'dead', args, run.defaults)
    classes, units = dead_units(run.model, run.x, args.batch_size)
    n_classes, layers = len(classes.unique()), []
    print(f'{args.run} predicts {n_classes} class(es)')
    for layer, is_dead in units.items():
        n, n_dead = len(is_dead), is_dead.sum().item()
        row = {'layer': layer, 'units': n, 'dead': n_dead, 'share': n_dead / n, 'all': n_dead == n}
        layers.append(row)
        print(f'{layer:20} {n_dead:5} of {n:5} units are dead, {n_dead / n:6.1%}')
    result = run.metadata | {'predicted_classes': n_classes, 'layers': layers, 'complete': True}
    record.add_provenance(result, args.device)
    record.save(path, result)
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def command(function):
        name, text = function.__name__, function.__doc__
        sub = commands.add_parser(name, help=text, formatter_class=cli.HelpFormatter)
        sub.set_defaults(command=function)
        sub.add_argument('run', help='run folder (its last model) or checkpoint')
        cli.add_flags(sub)
        return sub.add_argument

    add = command(similarity)
    steps = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
    add(
        '--a',
        type=cli.number(-1e9),
        nargs='+',
        default=steps,
        help='displacements along the unit vector v',
    )
    add = command(surface)
    add('--grid', type=cli.count, default=21, help='points a side')
    add('--radius', type=cli.number(0), default=0.5, help='largest displacement')
    add = command(connect)
    add('other', help='the other end of the curve, a run folder or checkpoint')
    add('--n-control', type=cli.whole(2), default=5, help='control points, with the two ends')
    add('--epochs', type=cli.count, default=200, help='of training the curve')
    add(
        '--lr',
        type=cli.number(0),
        default=0.1,
        help='of SGD, divided by 10 at half and at three quarters',
    )
    add('--train-batch-size', type=cli.count, default=128, help='images a step')
    add('--points', type=cli.count, default=21, help='measured along a path')
    command(dead)
    args = parser.parse_args(argv)
    run = analysis.load_run(args.run, args)
    with fast.tf32(False), record.lock(run.folder):
        return args.command(run, args)


if __name__ == '__main__':
    cli.run(main)

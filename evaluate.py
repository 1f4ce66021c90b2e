"""The Table 1 row of a run or of an ensemble: clean error and robust error under each attack, and the worst case.

`python evaluate.py RUN...` evaluates each run as the paper does, its last model or the ensemble of its periods;
`python evaluate.py --ensemble PATH...` one ensemble of all the checkpoints and runs named. Each finished attack is
kept, so a killed evaluation goes on. An image that is misclassified when clean counts as not robust.
"""
import argparse
import contextlib
import functools
import hashlib
import inspect
import math
import pathlib
import time

import numpy as np
import torch
from tqdm import tqdm

import attack
import data
import models
import record

TITLES = {'clean': 'clean', 'pgd': 'PGD', 'pgd100': 'PGD100', 'apgd100_ce': 'APGD100-CE', 'apgd100_dlr': 'APGD100-DLR',
          'square5k': 'Square5K', 'worst': 'worst case'}


def attacks_of(run, eps):
    """key -> attack of Table 1 with all its settings; those of PGD are the ones that the run was trained with."""
    paper, scale = data.paper(run['dataset'], eps), eps / run['eps'] if run['eps'] else 1.
    steps = {'pgd': {'step_size': run['step_size'] * scale, 'n_iter': run['n_iter']},
             'pgd100': {'step_size': paper['pgd100_step_size']}}
    return {key: functools.partial(run_attack, eps=eps, **steps.get(key, {})) for key, run_attack in attack.ATTACKS.items()}


def settings_of(run_attack):
    """All settings of an attack, those it was not given included, but for the ones that change no result."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(run_attack).parameters.items()}
    return {name: value for name, value in defaults.items() if value not in (None, inspect.Parameter.empty)
            and name not in ('eps', 'seed', 'batch_size', 'best_loss')}


def wilson(errors, n, z=1.959964):
    """95 % confidence interval of an error rate, `errors` of n (Wilson 1927): its ends as fractions."""
    p, shrink = errors / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return [(p + z * z / (2 * n) - half) / shrink, (p + z * z / (2 * n) + half) / shrink]


def summary(right, **made):
    """A column of the result: the error, its 95 % interval, and what made it."""
    errors = int((~right).sum())
    return {'error': errors / len(right), 'interval': wilson(errors, len(right)), **made}


def row(key, column):
    """One line of the table on the terminal."""
    low, high = column['interval']
    settings = ', '.join(f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}'
                         for name, value in column.get('settings', {}).items())
    return (f'  {TITLES[key]:<12}{100 * column["error"]:>8.2f}   {100 * low:>5.1f} .. {100 * high:<5.1f}'
            f'{column.get("seconds", 0):>9.1f}   {settings}')


def evaluate(model, x, y, index, attacks, seed, out, result, right, batch_size):
    """Adds to `result` and `right` the columns that they lack, and writes both, the pair out.json and out.npz, after each.

    x, (N, C, H, W), and y are the images, `index` the numbers that their randomness hangs on; right[key] is an (N,) bool
    array, result['columns'][key] its summary.
    """
    def keep(key, correct, began, **made):
        right[key] = correct.cpu().numpy()
        columns[key] = summary(right[key], **made, seconds=round(time.monotonic() - began, 1))
        of = [name for name in right if name != 'worst']
        right['worst'] = np.logical_and.reduce([right[name] for name in of])
        columns['worst'] = summary(right['worst'], settings={'of': '+'.join(of)})
        record.replace(out.with_name(out.name + '.npz'), lambda file: np.savez(file, index=index.numpy(), **right))
        record.save(out.with_name(out.name + '.json'), result)

    columns = result['columns']
    if 'clean' not in columns:
        keep('clean', attack.correct(model, x, y, batch_size), time.monotonic())
    print(row('clean', columns['clean']))
    standing = torch.from_numpy(right['clean']).nonzero().squeeze(1)
    for key, run_attack in attacks.items():
        settings, began = settings_of(run_attack), time.monotonic()
        if columns.get(key, {}).get('settings') != settings:
            passes = settings.get('n_queries') or settings['n_iter'] * settings.get('n_restarts', 1)
            with tqdm(desc=f'  {TITLES[key]}', total=passes * len(standing), unit=' images', unit_scale=True, leave=False,
                      disable=None) as bar, watched(model, bar):
                x_adv = run_attack(model, x[standing], y[standing], seed=seed, index=index[standing], batch_size=batch_size)
            correct = torch.zeros(len(x), dtype=torch.bool)
            correct[standing] = attack.correct(model, x_adv, y[standing], batch_size).cpu()
            keep(key, correct, began, settings=settings)
        print(row(key, columns[key]))
    print(row('worst', columns['worst']), flush=True)


@contextlib.contextmanager
def watched(model, bar):
    """Inside, each image that passes through `model` moves `bar`, whose total is what an attack can need at most."""
    hook = model.register_forward_hook(lambda module, inputs, output: bar.update(len(output)))
    try:
        yield
    finally:
        hook.remove()


def plan(paths, args):
    """The evaluation of one ensemble, `paths` its checkpoints and run folders, before anything is computed.

    Returns the model, its attacks, what the result says of them, and the result's place without suffix. ValueError where
    the members do not belong together.
    """
    found = [(file, config) for path in paths for files, config in [record.members(path)] for file in files]
    members = [record.rebuild(file, config) for file, config in found]
    datasets = [config['dataset'] if config else {1: 'mnist', 3: 'cifar10'}[next(member.parameters()).shape[1]]
                for member, (_, config) in zip(members, found)]
    if len(set(datasets)) > 1:
        raise ValueError('members of different datasets: ' + ', '.join(
            f'{found[datasets.index(name)][0]} of {name}' for name in sorted(set(datasets))))
    dataset = args.dataset or datasets[0]
    if models.SHAPES[dataset] != models.SHAPES[datasets[0]]:
        raise ValueError(f'{found[0][0]} takes the images of {datasets[0]}, not of {dataset}')
    runs = [config for _, config in found if config] or [data.paper(dataset)]
    if args.eps is None and len({run['eps'] for run in runs}) > 1:
        raise ValueError('members trained for different budgets; say with --eps at which one to attack')
    eps = runs[0]['eps'] if args.eps is None else args.eps
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file, _ in found]
    folder = pathlib.Path(paths[0])
    if len(paths) > 1 or folder.is_file():
        name = hashlib.sha256(''.join(digests).encode()).hexdigest()[:10]
        folder = pathlib.Path('evals', f'{"ensemble" if len(found) > 1 else "checkpoint"}_{name}')
    tags = {'n': args.n_examples, 'eps': args.eps, 'on': args.dataset, 'seed': args.seed or None}
    out = folder / '_'.join(['evaluate'] + [f'{tag}{value}' for tag, value in tags.items() if value is not None])
    head = {'members': [str(file) for file, _ in found], 'digests': digests, 'dataset': dataset, 'eps': eps,
            'seed': args.seed}
    model = members[0] if len(members) == 1 else models.Ensemble(members)
    return model, attacks_of(runs[0] | {'dataset': dataset}, eps), head, out


def kept(out, head):
    """The result and the per-image arrays at `out` as far as they are of the same checkpoints and images; else empty ones."""
    path = out.with_name(out.name + '.json')
    if path.exists():
        result = record.load(path)
        if all(result[key] == head[key] for key in head if key != 'members'):
            with np.load(path.with_suffix('.npz')) as arrays:
                return result, {key: arrays[key] for key in result['columns']}
        print(f'{path} is of other checkpoints; it is replaced')
    return head | {'sessions': [], 'columns': {}}, {}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('runs', nargs='*', metavar='RUN', help='run folders or checkpoints, each evaluated by itself')
    add('--ensemble', nargs='+', metavar='PATH', help='checkpoints and run folders, evaluated as one ensemble')
    add('--attacks', nargs='+', choices=list(attack.ATTACKS), default=list(attack.ATTACKS), help='default: all of Table 1')
    add('--n-examples', type=record.number(int, 1), help='so many test images, drawn once and for all; default: all')
    add('--eps', type=record.budget, help='default: the budget of the run, of the paper for a checkpoint without one')
    add('--dataset', choices=data.SPLITS, help='default: that of the run; by the shape of a checkpoint without one')
    add('--seed', type=record.number(int, 0), default=0, help='of the attacks; default: 0')
    add('--batch-size', type=record.number(int, 1), default=250, help='images in the model at a time; default: 250')
    record.add_machine_flags(parser)
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.ensemble):
        parser.error('name either runs or --ensemble PATH...')
    torch.backends.cudnn.deterministic = True
    for model, attacks, head, out in [plan(paths, args) for paths in ([args.ensemble] if args.ensemble else
                                                                    [[run] for run in args.runs])]:
        _, _, x, y = data.load(head['dataset'], args.data_dir, args.device)
        index = data.subset(len(x), args.n_examples)
        head |= {'n': len(index), 'n_test': len(x)}
        print(f'{out}.json: {" + ".join(head["members"])}\n{len(index)} of {len(x)} test images of {head["dataset"]}, '
              f'eps {head["eps"]:.4g}, seed {args.seed}\n  {"":<12}{"error %":>8}   {"95 % interval":<15}{"s":>6}')
        with record.lock(out.parent), models.precision('fp32', args.device):
            result, right = kept(out, head)
            session = record.describe(args.device)
            result['sessions'] += [session] * (session not in result['sessions'])
            evaluate(model.to(args.device, memory_format=torch.channels_last), x[index], y[index], index,
                     {key: attacks[key] for key in args.attacks}, args.seed, out, result, right, args.batch_size)


if __name__ == '__main__':
    record.run(main)

"""The Table 1 row of a run or of an ensemble: the clean error and the robust ones, by attack.

`python evaluate.py RUN...` evaluates each run as the paper does: its last model, or the ensemble of
its periods. `python evaluate.py --ensemble PATH...` makes one ensemble of all checkpoints and runs
named. Each finished attack is kept, so a killed evaluation goes on. The row of a run lies in its
folder, any other under evals/. An image that is misclassified when clean counts as not robust.
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

TITLES = attack.TITLES | {'clean': 'clean', 'worst': 'worst case'}


def evaluate(model, x, y, index, attacks, seed, out, result, right, batch_size, in_turn=False):
    """Adds to `result` and `right` the columns they lack; writes OUT.json and OUT.npz after each.

    x, (N, C, H, W), and y are the images and labels, `index` the numbers their randomness hangs on.
    right[key] is an (N,) bool array, result['columns'][key] its summary. With `in_turn` an attack
    gets only what stands after those before it, and its column is the error after all of them.
    """
    def keep(key, correct, began, **made):
        right[key] = correct.cpu().numpy()
        columns[key] = summary(right[key], seconds=round(time.monotonic() - began, 1), **made)
        worst = np.logical_and.reduce(list(right.values()))
        columns['worst'] = summary(worst, settings={'of': '+'.join(right)})
        record.replace(record.suffixed(out, '.npz'), lambda file: np.savez(
            file, index=index, worst=worst, **right))
        record.save(record.suffixed(out, '.json'), result)

    columns, began = result['columns'], time.monotonic()
    if 'clean' not in columns:
        keep('clean', attack.correct(model, x, y, batch_size), began)
    print(row('clean', columns['clean']))
    for key, run_attack in attacks.items():
        settings, began = settings_of(run_attack), time.monotonic()
        if not settings.items() <= columns.get(key, {}).get('settings', {}).items():
            right.pop(key, None)
            before = list(right) if in_turn else ['clean']
            standing = np.logical_and.reduce([right[name] for name in before]).nonzero()[0]
            standing = torch.from_numpy(standing)
            if in_turn:
                settings |= {'after': '+'.join(before), 'attacked': len(standing)}
            x_standing, y_standing = x[standing], y[standing]
            with progress(model, TITLES[key], settings, len(standing)):
                x_adv = run_attack(model, x_standing, y_standing, seed=seed, index=index[standing],
                                   batch_size=batch_size)
            correct = torch.zeros(len(x), dtype=torch.bool)
            correct[standing] = attack.correct(model, x_adv, y_standing, batch_size).cpu()
            keep(key, correct, began, settings=settings)
        print(row(key, columns[key]), flush=True)
    print(row('worst', columns['worst']), flush=True)


@contextlib.contextmanager
def progress(model, title, settings, n):
    """Inside, images that pass through `model` move a bar; its end is the most an attack needs."""
    passes = settings.get('n_queries') or settings['n_iter'] * settings.get('n_restarts', 1)
    with tqdm(desc=f'  {title}, at most', total=passes * n, unit=' images', unit_scale=True,
              leave=False, disable=None) as bar:
        def count(module, inputs, output):  # returns None: anything else would replace the output
            bar.update(len(output))

        hook = model.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def attacks_of(run, eps):
    """key -> attack of Table 1 with all its settings.

    PGD is the attack of training; at a budget other than the run's it is the paper's for that one.
    """
    steps = {'pgd': data.pgd_of(run, run['dataset'], eps),
             'pgd100': {'step_size': data.paper(run['dataset'], eps)['pgd100_step_size']}}
    return {key: functools.partial(run_attack, eps=eps, **steps.get(key, {}))
            for key, run_attack in attack.ATTACKS.items()}


def settings_of(run_attack):
    """All settings of an attack, defaults included, but for those that change no result."""
    parameters = inspect.signature(run_attack).parameters
    return {name: parameter.default for name, parameter in parameters.items()
            if parameter.default not in (None, inspect.Parameter.empty)
            and name not in ('eps', 'seed', 'batch_size', 'best_loss')}


def wilson(errors, n, z=1.959964):
    """95 % confidence interval of an error rate, `errors` of n, as fractions (Wilson 1927)."""
    p, shrink = errors / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    middle = p + z * z / (2 * n)
    return [max(0., (middle - half) / shrink), min(1., (middle + half) / shrink)]


def summary(right, **made):
    """A column of the result: the error, its 95 % interval, and what made it."""
    errors = int((~right).sum())
    return {'error': errors / len(right), 'interval': wilson(errors, len(right)), **made}


def row(key, column):
    """A column of the result as a line on the terminal."""
    low, high = (100 * end for end in column['interval'])
    settings = ', '.join(f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}'
                         for name, value in column.get('settings', {}).items())
    return (f'  {TITLES[key]:<12}{100 * column["error"]:>8.2f}   {low:>5.1f} .. {high:<5.1f}'
            f'{column.get("seconds", 0):>9.1f}   {settings}')


def plan(paths, args):
    """The evaluation of one ensemble, `paths` its checkpoints and run folders; computes nothing.

    Returns the model, its attacks, what the result says of them, and the result's path without
    suffix. ValueError where the members do not belong together.
    """
    members = [(file, config) for path in paths for file, config in record.members(path)]
    nets = [record.rebuild(file, config) for file, config in members]
    datasets = [config['dataset'] if config else models.dataset_of(net)
                for net, (_, config) in zip(nets, members)]
    if args.dataset:  # then a checkpoint outside of a run is of that dataset if its images fit
        datasets = [name if config or models.SHAPES[name] != models.SHAPES[args.dataset]
                    else args.dataset for name, (_, config) in zip(datasets, members)]
    if len(set(datasets)) > 1:
        raise ValueError('members of different datasets: ' + ', '.join(
            f'{members[datasets.index(name)][0]} of {name}' for name in sorted(set(datasets))))
    dataset = args.dataset or datasets[0]
    if models.SHAPES[dataset] != models.SHAPES[datasets[0]]:
        raise ValueError(f'{members[0][0]} takes the images of {datasets[0]}, not of {dataset}')
    runs = [config for _, config in members if config] or [data.paper(dataset, args.eps)]
    for name in ('eps', 'step_size', 'n_iter'):
        if args.eps is None and len({run[name] for run in runs}) > 1:
            raise ValueError(f'members trained with different {name}: '
                             f'{", ".join(str(run[name]) for run in runs)}; '
                             'say with --eps at which budget to attack')
    eps = runs[0]['eps'] if args.eps is None else args.eps
    digests = [record.digest(file) for file, _ in members]
    folder = pathlib.Path(paths[0])
    if len(paths) > 1 or folder.is_file():
        name = hashlib.sha256(f'{sorted(digests)} {dataset} {eps}'.encode()).hexdigest()[:10]
        kind = 'ensemble' if len(members) > 1 else 'checkpoint'
        folder = pathlib.Path('evals', f'{kind}_{name}')
    tags = {'n': args.n_examples, 'eps': None if args.eps is None else f'{eps:.6g}',
            'on': args.dataset, 'seed': args.seed or None}
    tags = [f'{tag}{value}' for tag, value in tags.items() if value is not None]
    head = {'members': [str(file) for file, _ in members], 'digests': digests, 'dataset': dataset,
            'eps': eps, 'seed': args.seed}
    model = nets[0] if len(nets) == 1 else models.Ensemble(nets)
    attacks = attacks_of(runs[0] | {'dataset': dataset}, eps)
    return model, attacks, head, folder / '_'.join(['worst' if args.worst else 'evaluate', *tags])


def kept(out, head, index):
    """Result and arrays at `out`, if of the same checkpoints and images; else empty ones.

    ValueError where the files are damaged or do not belong together.
    """
    path, reason = record.suffixed(out, '.json'), ''
    if not path.exists():
        return head | {'sessions': [], 'columns': {}}, {}
    result = record.load(path)
    try:
        if any(result[key] != head[key] for key in head if key not in ('members', 'digests')) or (
                sorted(result['digests']) != sorted(head['digests'])):
            print(f'{path} is of other checkpoints; it is replaced')
            return head | {'sessions': [], 'columns': {}}, {}
        with np.load(record.suffixed(out, '.npz')) as arrays:
            right = {key: arrays[key] for key in result['columns'] if key != 'worst'}
            sound = np.array_equal(arrays['index'], index.numpy()) and all(
                summary(right[key])['error'] == result['columns'][key]['error'] for key in right)
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        sound, reason = False, f' ({type(error).__name__}: {error})'
    if not sound:
        raise ValueError(f'{path} or its .npz is damaged{reason}; delete the two, '
                         'and the attacks are run again')
    return result, right


def main(argv=None):
    args = parse(argv)
    groups = [args.ensemble] if args.ensemble else [[run] for run in args.runs]
    for model, attacks, head, out in [plan(paths, args) for paths in groups]:
        _, _, x, y = data.load_once(head['dataset'], args.data_dir, args.device)
        index = data.subset(len(x), args.n_examples)
        head |= {'n': len(index), 'n_test': len(x)}
        title = 'so far %' if args.worst else 'error %'
        print(f'{record.suffixed(out, ".json")}: {" + ".join(head["members"])}\n'
              f'{len(index)} of {len(x)} test images of {head["dataset"]}, eps {head["eps"]:.4g}, '
              f'seed {args.seed}\n  {"":<12}{title:>8}   {"95 % interval":<15}{"s":>6}')
        with record.lock(out.parent, args.wait), models.tf32(False):
            result, right = kept(out, head, index)
            record.sign(result, args.device)
            x, y = x[index], y[index]
            model = models.folded(model.to(args.device, memory_format=torch.channels_last), x[:2])
            evaluate(model, x, y, index, {key: attacks[key] for key in args.attacks}, args.seed,
                     out, result, right, args.batch_size or attack.fitting_batch(model, x, y),
                     args.worst)


def parse(argv):
    """The command line."""
    count = record.number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('runs', nargs='*', metavar='RUN',
        help='run folders or checkpoints, each evaluated by itself')
    add('--ensemble', nargs='+', metavar='PATH',
        help='checkpoints and run folders, evaluated as one ensemble')
    add('--attacks', nargs='+', choices=list(attack.ATTACKS), default=list(attack.ATTACKS),
        metavar='ATTACK', help=f'of {" ".join(attack.ATTACKS)}; default: all, as in Table 1')
    add('--worst', action='store_true',
        help='only the worst case, at less cost: an attack gets just what stands after those '
        'before it, and its error is that after all of them; into worst.json')
    add('--n-examples', type=count,
        help='so many test images, drawn once and for all; default: all')
    add('--eps', type=record.budget,
        help="default: the run's; the paper's for a checkpoint outside of a run")
    add('--dataset', choices=data.SPLITS,
        help="default: the run's; mnist or cifar10, by shape, for a checkpoint outside of a run")
    add('--seed', type=record.number(int, 0, 2 ** 32 - 1), default=0,
        help='of the attacks; default: 0')
    add('--batch-size', type=count,
        help='images in the model at a time; default: as many as fit and pay, 250 on a CPU')
    record.add_machine_flags(parser)
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.ensemble):
        parser.error('name either runs or --ensemble PATH...')
    return args


if __name__ == '__main__':
    record.run(main)

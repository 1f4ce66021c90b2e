"""The Table 1 row of a run or of an ensemble: its clean error and its robust error by attack.

`python evaluate.py RUN...` evaluates each run as the paper does: its last model, or the ensemble of
its periods. `python evaluate.py --ensemble PATH...` makes one ensemble for each dataset and budget
of the checkpoints and runs named and of the runs below other folders. Each attack is saved when it
is finished, and the same command resumes a killed evaluation. The result of a run is written to its
folder, any other to evals/. An image that is misclassified when clean counts as not robust.
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import math
import pathlib
import time
from types import SimpleNamespace

import numpy as np
import scipy.stats
import torch

import attack
import data
import models
from lib import analysis, cli, distributed, fast, masking, record, search
from lib.classifier import correct


def evaluate(model, x, y, e, args):
    """Adds the columns that are missing to e.result and e.robust, and writes both after each.

    x, (N, C, H, W), and y are images and labels, e.index their indices in the dataset, for random
    numbers. e.robust[key] is an (N,) bool array, e.result['columns'][key] its summary. With
    --standard each attack gets the images that withstood all before it: errors are cumulative.
    """
    columns, dataset = e.result['columns'], e.result['dataset']
    if 'clean' not in columns:
        began = time.monotonic()
        add_column(e, 'clean', correct(model, x, y, args.batch_size), began)
    print(format_row('clean', columns['clean'], dataset))
    for key, run_attack in e.attacks.items():
        settings = run_attack.keywords.items()
        if key not in columns or not settings <= columns[key]['settings'].items():
            attack_images(model, x, y, e, key, args)
        print(format_row(key, columns[key], dataset))
    print(format_row('worst', columns['worst'], dataset))
    if args.standard:
        print(f"AutoAttack's robust accuracy: {100 * (1 - columns['worst']['error']):.2f} %")
    warnings = masking.signs(model, x, y, e.robust, args.batch_size)
    for sentence in warnings.values():
        print(f'warning: {sentence}')
    if warnings != e.result.get('warnings'):
        e.result['warnings'] = warnings
        record.save(e.json, e.result)


def attack_images(model, x, y, e, key, args):
    """Runs the attack `key` on the images that are right when clean, with --standard on those that
    withstood all attacks before it, and adds its column."""
    began = time.monotonic()
    settings = dict(e.attacks[key].keywords)
    e.robust.pop(key, None)
    before = list(e.robust) if args.standard else ['clean']
    standing = np.logical_and.reduce([e.robust[name] for name in before])
    standing = torch.from_numpy(standing.nonzero()[0])
    if args.standard:
        settings |= {'after': '+'.join(before), 'attacked': len(standing)}
    options = {'eps': e.result['eps'], 'seed': args.seed, 'index': e.index[standing]}
    options['batch_size'] = args.batch_size
    run_attack = search.shared(e.attacks[key])
    n = math.ceil(len(standing) / distributed.SIZE)
    with fast.tf32(args.precision == 'tf32'), progress(model, settings, n):
        x_adv = run_attack(model, x[standing], y[standing], **options)
    robust = torch.zeros(len(x), dtype=torch.bool)
    robust[standing] = correct(model, x_adv, y[standing], args.batch_size).cpu()
    add_column(e, key, robust, began, settings=settings)


def add_column(e, key, robust, began, **more):
    """Adds a column and the worst case of all columns so far, and writes the result."""
    e.robust[key] = robust.cpu().numpy()
    columns = e.result['columns']
    seconds = round(time.monotonic() - began, 1)
    columns[key] = summary(e.robust[key], seconds=seconds, **more)
    worst = np.logical_and.reduce(list(e.robust.values()))
    columns['worst'] = summary(worst, settings={'of': '+'.join(e.robust)})
    record.save(e.npz, {'index': e.index, 'worst': worst, **e.robust})
    record.save(e.json, e.result)


@contextlib.contextmanager
def progress(model, settings, n):
    """A progress bar of the images that pass through `model`, up to the most that n images need."""
    passes = settings.get('n_queries') or settings.get('n_iter', 1) * settings.get('n_restarts', 1)
    if 'n_targets' in settings:
        passes *= 2 * settings['n_targets']  # an iteration of FAB is two passes
    with cli.bar(' images at most', passes * n) as bar:

        def count(module, x, output):
            bar.update(len(output))

        hook = model.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def attacks_of(table, config, eps):
    """A `table` of attacks as partials whose keywords are all settings but eps. One without n_iter
    becomes the attack of training (data.pgd_settings); one without step_size takes the paper's."""
    training = data.pgd_settings(config, eps)
    paper = {'step_size': data.DATASETS[config['dataset']].settings(eps)['pgd100_step_size']}
    attacks = {}
    for key, run_attack in table.items():
        parameters = inspect.signature(run_attack).parameters.values()
        unset = [p.name for p in parameters if p.default is p.empty]
        steps = {}
        if 'n_iter' in unset:
            steps = training
        elif 'step_size' in unset:
            steps = paper
        attacks[key] = functools.partial(run_attack, **steps)
    return attacks


def summary(robust, **more):
    """A column of the result: the error, its 95 % interval (Wilson 1927), and `more`."""
    found = scipy.stats.binomtest(int((~robust).sum()), len(robust))
    interval = list(found.proportion_ci(method='wilson'))
    return {'error': found.statistic, 'interval': interval, **more}


def format_row(key, column, dataset):
    """A column of the result as a line on the terminal."""
    low, high = (100 * end for end in column['interval'])
    settings = data.show('', column.get('settings', {}), dataset)
    return (
        f'  {attack.title(key):<12}{100 * column["error"]:>8.2f}   {low:>5.1f} .. {high:<5.1f}'
        f'{column.get("seconds", 0):>9.1f}   {settings}'
    )


def load_groups(paths, args, lenient):
    """{(dataset, eps): {checkpoint: (settings, network)}} of checkpoints and runs. It leaves out
    runs that diverged and, if `lenient`, those that are not finished, and says so."""
    groups = {}
    left_out = (record.Diverged, record.Unfinished) if lenient else record.Diverged
    for path in paths:
        try:
            files = record.members(path)
        except left_out as error:
            print(f'left out: {error}')
            continue
        for file in files:
            net, config = record.load_model(file, args.dataset)
            eps = config['eps'] if args.eps is None else args.eps
            groups.setdefault((config['dataset'], eps), {})[file] = config, net
    return groups


def evaluate_group(paths, dataset, eps, members, args):
    """Evaluates the ensemble of `members`, a group of load_groups(paths, ...), or resumes this. The
    column PGD is the members' attack of training, or the paper's if they differ in it."""
    files = list(members)
    configs, nets = zip(*members.values())
    digests = sorted(map(record.digest, files))
    folder = analysis.folder_of(paths[0], digests[0])
    if args.ensemble:
        name = hashlib.sha256(f'{digests} {dataset} {eps}'.encode()).hexdigest()[:10]
        folder = pathlib.Path('evals', f'ensemble_{name}')
    _, _, x, y = data.load(dataset, args.data_dir, args.device)
    index = data.subset(len(x), args.n_examples)
    metadata = {'members': list(map(str, files)), 'digests': digests, 'dataset': dataset}
    metadata |= {'eps': eps, 'seed': args.seed, 'n': len(index), 'n_test': len(x)}
    stem, table = 'evaluate', {key: attack.ATTACKS[key] for key in args.attacks}
    if args.standard:
        stem, table = 'evaluate_standard', attack.STANDARD
        metadata['standard'] = True
    if args.precision == 'tf32':
        stem += '_tf32'
        metadata['precision'] = 'tf32'
    model = nets[0] if len(nets) == 1 else models.Ensemble(nets)
    layout = fast.memory_format(args.device, args.precision)
    model = model.to(args.device, memory_format=layout)
    config = configs[0]
    if len({str(data.pgd_settings(config, eps)) for config in configs}) > 1:
        config = data.DATASETS[dataset].settings(eps) | {'dataset': dataset}
    e = SimpleNamespace(folder=folder, index=index, attacks=attacks_of(table, config, eps))
    e.json = analysis.output(folder, stem, args)
    e.npz = e.json.with_suffix('.npz')
    print(
        f'{e.json}: {" + ".join(metadata["members"])}\n{len(index)} of {len(x)} test images of '
        f'{dataset}, eps {data.show_eps(eps, dataset)}, seed {args.seed}\n'
        f'  {"":<12}{"so far %" if args.standard else "error %":>8}   {"95 % interval":<15}{"s":>6}'
    )
    with record.lock(folder), fast.tf32(False):
        e.result = analysis.resume(e.json, metadata, args.device)
        columns = e.result.setdefault('columns', {})
        arrays = record.load(e.npz) if columns else {}
        e.robust = {key: arrays[key] for key in columns if key != 'worst'}
        images = x[index].contiguous(memory_format=layout)
        evaluate(fast.folded(model, x[:2]), images, y[index], e, args)


def parse(argv):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = p.add_argument
    add('runs', nargs='*', metavar='RUN', help='runs, folders of them, checkpoints: each by itself')
    add('--ensemble', nargs='+', metavar='PATH', help='runs and checkpoints, as one ensemble')
    keys = list(attack.ATTACKS)
    add('--attacks', nargs='+', choices=keys, default=keys, help='columns of Table 1')
    text = "AutoAttack's instead, cumulative: APGD-CE, APGD-T, FAB-T, Square"
    add('--standard', action='store_true', help=text)
    text = 'of the search on a GPU; an image has fallen only if a float32 pass says so'
    add('--precision', choices=('fp32', 'tf32'), default='fp32', help=text)
    analysis.add_flags(p)
    args = p.parse_args(argv)
    if bool(args.runs) == bool(args.ensemble):
        p.error('name either runs or --ensemble PATH...')
    if args.standard and args.attacks != keys:
        p.error('--standard has attacks of its own: leave out --attacks')
    return args


def main(argv=None):
    args = parse(argv)
    named = args.ensemble or args.runs
    runs = record.find_runs(named)
    if not runs:
        raise ValueError(f'{" ".join(named)}: no run is below, no folder with a config.json')
    together = [runs] if args.ensemble else [[run] for run in runs]
    found = [(paths, load_groups(paths, args, len(runs) > 1)) for paths in together]
    for paths, groups in found:
        for (dataset, eps), members in groups.items():
            evaluate_group(paths, dataset, eps, members, args)


if __name__ == '__main__':
    cli.run(main)

"""The Table 1 row of a run or of an ensemble: its clean error and its robust error by attack.

`python evaluate.py RUN...` evaluates each run as the paper does: its last model, or the ensemble of
its periods. `python evaluate.py --ensemble PATH...` makes one ensemble for each dataset and budget
of the checkpoints and runs named and of the runs below other folders. Each attack is saved when it
is finished, and the same command resumes a killed evaluation. The result of a run is written to its
folder, any other to evals/. An image that is misclassified when clean counts as not robust.
"""

import argparse
import hashlib
import inspect
import math
import pathlib
import time
from dataclasses import dataclass

import numpy as np
import torch

import attack
import data
import models
from lib import cli, fast, masking, record, search
from lib.classifier import predict


@dataclass
class Evaluation:
    """An evaluation as far as it has come; a change of its columns is written to both files."""

    path: pathlib.Path  # of `result`; `robust` is in the .npz beside it
    index: torch.Tensor  # of the images in their dataset, (N,)
    result: dict  # what was evaluated, and result['columns'], each the summary of an attack
    robust: dict  # name of a column -> which images withstood the attack, (N,) bool

    def add(self, key, robust, began, **settings):
        """Adds a column, measured since `began`."""
        self.robust[key] = robust.cpu().numpy()
        seconds = round(time.monotonic() - began, 1)
        self.result['columns'][key] = summary(self.robust[key], seconds=seconds, **settings)
        self.save()

    def drop(self, keys):
        """Removes those columns among `keys` that there are."""
        stale = keys & self.robust.keys()
        for key in stale:
            del self.robust[key], self.result['columns'][key]
        if stale:
            self.save()

    def save(self):
        """Writes both files, with the worst case of all columns."""
        worst = np.logical_and.reduce(list(self.robust.values()))
        self.result['columns']['worst'] = summary(worst, settings={'of': '+'.join(self.robust)})
        arrays = {'index': self.index, 'worst': worst, **self.robust}
        record.save(self.path.with_suffix('.npz'), arrays)
        record.save(self.path, self.result)


def evaluate(model, networks, x, y, evaluation, attacks, args):
    """Adds the columns that are missing, and prints all.

    x, (N, C, H, W), and y are images and labels; `model` is the ensemble of `networks`; `attacks`
    are those of attacks_of. With --standard each attack gets the images that withstood all before
    it: errors are cumulative, and where an attack has changed, what came after it is dropped.
    """
    result, robust = evaluation.result, evaluation.robust
    columns, dataset = result['columns'], result['dataset']
    if 'clean' not in columns or 'predicted_classes' not in result:
        began = time.monotonic()
        classes = predict(model, x, args.batch_size)
        result['predicted_classes'] = len(classes.unique())
        if len(networks) > 1:
            each = [predict(network, x, args.batch_size) for network in networks]
            result['members_predicted_classes'] = [len(classes.unique()) for classes in each]
        evaluation.add('clean', classes == y, began)
    print(format_row('clean', columns['clean'], dataset))
    before = ['clean']
    if args.standard:
        evaluation.drop(robust.keys() - {'clean', *attack.STANDARD})
    for key, (run_attack, settings) in attacks.items():
        standing = np.logical_and.reduce([robust[name] for name in before])
        standing = torch.from_numpy(standing.nonzero()[0])
        shown = dict(settings)
        if args.standard:
            shown |= {'after': '+'.join(before), 'attacked': len(standing)}
        if key not in columns or columns[key]['settings'] != shown:
            stale = robust.keys() - set(before) if args.standard else {key}
            evaluation.drop(stale)
            began = time.monotonic()
            options = {'eps': result['eps'], 'seed': args.seed, 'batch_size': args.batch_size}
            options |= {'index': evaluation.index[standing], **settings}
            with fast.tf32(args.precision == 'tf32'):
                x_adv = attacked(run_attack, model, x[standing], y[standing], **options)
            withstood = torch.zeros(len(x), dtype=torch.bool)
            classes = predict(model, x_adv, args.batch_size)
            withstood[standing] = (classes == y[standing]).cpu()
            evaluation.add(key, withstood, began, settings=shown)
        if args.standard:
            before.append(key)
        print(format_row(key, columns[key], dataset))
    print(format_row('worst', columns['worst'], dataset))
    if args.standard and attacks.keys() == attack.STANDARD.keys():
        print(f"AutoAttack's robust accuracy: {100 * (1 - columns['worst']['error']):.2f} %")
    warnings = masking.signs(model, x, y, robust, args.batch_size)
    for sentence in warnings.values():
        print(f'warning: {sentence}')
    if warnings != result.get('warnings'):
        result['warnings'] = warnings
        record.save(evaluation.path, result)


def attacked(run_attack, model, x, y, **options):
    """Adversarial examples, by all processes; a bar counts the images that pass `model`."""
    with cli.bar(' images') as bar:

        def count(module, x, logits):
            bar.update(len(logits))  # a value returned would replace the logits

        hook = model.register_forward_hook(count)
        x_adv = search.shared(run_attack)(model, x, y, **options)
        hook.remove()
    return x_adv


def attacks_of(table, config, eps):
    """{key: (attack, settings)} of a `table` of attacks, with all settings but eps. PGD is the
    attack of training (data.pgd_settings) or, where n_iter is set, has the paper's step size. DLR
    is left out for datasets of too few classes."""
    attacks, n_classes = {}, data.DATASETS[config['dataset']].n_classes
    for key, run_attack in table.items():
        function = getattr(run_attack, 'func', run_attack)  # of a partial
        settings = dict(getattr(run_attack, 'keywords', None) or defaults_of(function))
        is_pgd = function is attack.pgd
        if is_pgd and 'n_iter' not in settings:
            settings |= data.pgd_settings(config, eps)
        elif is_pgd:
            paper = data.DATASETS[config['dataset']].settings(eps)
            settings = {'step_size': paper['pgd100_step_size']} | settings
        needed = 4 if 'n_targets' in settings else 3
        if settings.get('loss') == 'dlr' and n_classes < needed:
            print(f'left out: {attack.title(key)}, which needs {needed} classes')
            continue
        attacks[key] = run_attack, settings
    return attacks


def defaults_of(function):
    """The defaults of an attack, name -> value, but for those that all attacks share."""
    shared = 'start', 'seed', 'index', 'batch_size'
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {name: defaults[name] for name in defaults if name not in shared}


def summary(robust, **details):
    """A column of the result: the error, its 95 % interval (Wilson 1927), and `details`."""
    k, n, z = int((~robust).sum()), len(robust), 1.959963984540054
    error, scale = k / n, 2 * (n + z**2)
    center = (2 * n * error + z**2) / scale
    radius = z / scale * math.sqrt(4 * n * error * (1 - error) + z**2)
    interval = [center - radius if k else 0.0, center + radius if k < n else 1.0]
    return {'error': error, 'interval': interval, **details}


def format_row(key, column, dataset):
    """A column of the result as a line on the terminal."""
    low, high = (100 * end for end in column['interval'])
    settings = data.show('', column.get('settings', {}), dataset)
    return (
        f'  {attack.title(key):<12}{100 * column["error"]:>8.2f}   {low:>5.1f} .. {high:<5.1f}'
        f'{column.get("seconds", 0):>9.1f}   {settings}'
    )


def load_groups(paths, args, lenient):
    """{(dataset, eps): {digest: (checkpoint, settings, network)}} of checkpoints and runs. It
    leaves out runs that diverged and, if `lenient`, those without the models asked for, and says
    so. What is named twice, also by a link or copy, is there once."""
    groups = {}
    left_out = (cli.Diverged, record.NoModel) if lenient else cli.Diverged
    for path in paths:
        try:
            files = record.members(path, args.weights, args.member)
        except left_out as error:
            print(f'left out: {error}')
            continue
        for file in files:
            network, config = record.load_model(file, args.dataset)
            eps = config['eps'] if args.eps is None else args.eps
            members = groups.setdefault((config['dataset'], eps), {})
            members.setdefault(record.digest(file), (file, config, network))
    return groups


def evaluate_group(paths, dataset, eps, members, args):
    """Evaluates the ensemble of `members`, a group of load_groups(paths, ...), or resumes this. The
    column PGD is the members' attack of training, or the paper's if they differ in it."""
    files, configs, networks = zip(*members.values())
    config, digests = configs[0], sorted(members)
    if any(data.pgd_settings(other, eps) != data.pgd_settings(config, eps) for other in configs):
        config = data.DATASETS[dataset].settings(eps) | {'dataset': dataset}
    table = attack.STANDARD if args.standard else attack.STANDARD | attack.ATTACKS
    attacks = attacks_of({key: table[key] for key in args.attacks}, config, eps)

    _, _, x, y = data.load(dataset, args.data_dir, args.device)
    index = data.subset(len(x), args.n_examples)
    metadata = {'members': list(map(str, files)), 'digests': digests, 'dataset': dataset}
    metadata |= {'data': data.digest(x, y), 'n': len(index), 'n_test': len(x)}
    metadata |= {'eps': eps, 'seed': args.seed}
    stem, variant = variant_of(args, len(configs[0].get('periods', [])))
    if args.ensemble:  # a folder of its own for these members at this eps
        name = hashlib.sha256(f'{digests} {dataset} {eps}'.encode()).hexdigest()[:10]
        folder, usual_eps = pathlib.Path('evals', f'ensemble_{name}'), eps
    else:
        folder, usual_eps = record.folder_of(paths[0], digests[0]), configs[0]['eps']
    path = record.output(folder, stem, args, {'eps': usual_eps, 'n_examples': len(x)})

    layout = fast.memory_format(args.device, args.precision)
    model = networks[0] if len(networks) == 1 else models.Ensemble(networks)
    model = model.to(args.device, memory_format=layout)
    images = x[index].contiguous(memory_format=layout)
    print(
        f'{path}: {" + ".join(metadata["members"])}\n{len(index)} of {len(x)} test images of '
        f'{dataset}, eps {data.show_eps(eps, dataset)}, seed {args.seed}\n'
        f'  {"":<12}{"so far %" if args.standard else "error %":>8}   {"95 % interval":<15}{"s":>6}'
    )
    with record.lock(folder), fast.tf32(False):
        evaluation = resume(path, index, metadata | variant, args.device)
        model = fast.folded(model, x[:2])
        evaluate(model, networks, images, y[index], evaluation, attacks, args)


def variant_of(args, n_periods):
    """What is not evaluated as by default: the name of the result for it, and name -> value."""
    variant = {'standard': True} if args.standard else {}
    if args.precision != 'fp32':
        variant['precision'] = args.precision
    if args.weights != 'last':
        variant['weights'] = args.weights
    if args.member and n_periods > 1:
        variant['member'] = args.member
    tags = variant | {'standard': 'standard', 'member': f'member{args.member}'}
    return '_'.join(['evaluate', *(tags[name] for name in variant)]), variant


def resume(path, index, metadata, device):
    """The evaluation at `path`, begun or new; a column without its array is measured again."""
    result, file = record.resume(path, metadata, device), path.with_suffix('.npz')
    arrays = record.load(file) if file.exists() else {}
    columns = result.get('columns', {})
    result['columns'] = {key: columns[key] for key in columns if key in arrays}
    robust = {key: arrays[key] for key in result['columns'] if key != 'worst'}
    return Evaluation(path, index, result, robust)


def parse(argv):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = p.add_argument
    add('runs', nargs='*', metavar='RUN', help='runs, folders of them, checkpoints: each by itself')
    add('--ensemble', nargs='+', metavar='PATH', help='runs and checkpoints, as one ensemble')
    choices = [*attack.ATTACKS, *attack.STANDARD]
    add('--attacks', nargs='+', choices=choices, metavar='ATTACK', help="columns; Table 1's")
    text = "AutoAttack's instead, cumulative: apgd_ce apgd_t fab_t square, or the first of them"
    add('--standard', action='store_true', help=text)
    text = "of a run: a period's last (the paper's), its best on held-out images, or its average"
    add('--weights', choices=('last', 'best', 'ema'), default='last', help=text)
    add('--member', type=cli.count, help="of a run: this period's model alone; all, an ensemble")
    text = 'of the search on a GPU; an image has fallen only if a float32 pass says so'
    add('--precision', choices=('fp32', 'tf32'), default='fp32', help=text)
    cli.add_flags(p)
    args = p.parse_args(argv)
    if bool(args.runs) == bool(args.ensemble):
        p.error('name either runs or --ensemble PATH...')
    keys = list(attack.STANDARD if args.standard else attack.ATTACKS)
    args.attacks = args.attacks or keys
    if args.standard and args.attacks != keys[: len(args.attacks)]:
        p.error(f'--standard takes its attacks in their order: {" ".join(keys)}')
    return args


def main(argv=None):
    args = parse(argv)
    named = args.ensemble or args.runs
    runs = record.find_runs(named)
    if not runs:
        raise ValueError(f'{" ".join(named)}: no run is below, no config.json of train.py')
    together = [runs] if args.ensemble else [[run] for run in runs]
    found = [(paths, load_groups(paths, args, len(runs) > 1)) for paths in together]
    for paths, groups in found:
        for (dataset, eps), members in groups.items():
            evaluate_group(paths, dataset, eps, members, args)


if __name__ == '__main__':
    cli.run(main)

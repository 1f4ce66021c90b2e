"""What evaluate.py, hessian.py and landscape.py share: a run to analyse, flags, names of results.

Training images are neither shuffled nor augmented and the network is in eval mode, except while a
curve is trained.
"""

import functools
import hashlib
import math
import pathlib
from types import SimpleNamespace

import torch
from torch.optim.swa_utils import update_bn

import attack
import data
from lib import cli, distributed, fast, record, search


def load_run(path, args):
    """The run or checkpoint at `path` for the analyses with the flags `args`.

    Returns model (that of the last period), x, y and index (the training images of the run, or
    --n-examples of them), eps, pgd (the attack of training at eps, of model, x and y), augment,
    folder (for results) and metadata (what each result says of all this).
    """
    file = record.members(path)[-1]
    layout = fast.memory_format(args.device)
    model, config = record.load_model(file, args.dataset)
    run = SimpleNamespace(path=path, model=model.to(args.device))
    dataset, run.augment = config['dataset'], config['augment']
    run.eps = config['eps'] if args.eps is None else args.eps
    x, y = data.load(dataset, args.data_dir, args.device)[:2]
    n_train = len(data.split(len(x), config.get('n_train'), config.get('n_val', 0))[0])
    n = args.n_examples or n_train
    if n > n_train:
        raise ValueError(f'--n-examples {n}: {path} was trained on {n_train} images')
    run.index = data.subset(len(x), n)
    run.x, run.y = x[run.index].contiguous(memory_format=layout), y[run.index]
    pgd = data.pgd_settings(config, run.eps)
    options = {'eps': run.eps, 'index': run.index, 'batch_size': args.batch_size}
    run.pgd = functools.partial(search.shared(attack.pgd), **pgd, **options)
    digest = record.digest(file)
    run.folder = folder_of(path, digest)
    run.metadata = {'checkpoint': str(file), 'digest': digest, 'dataset': dataset, 'eps': run.eps}
    run.metadata |= {'n': len(run.x), 'attack': {'name': 'pgd', **pgd}, 'seed': args.seed}
    return run


def folder_of(path, digest):
    """Where results on a run go: into its folder; on a checkpoint of this digest: into evals/."""
    path = pathlib.Path(path)
    return path if path.is_dir() else pathlib.Path('evals', f'checkpoint_{digest[:10]}')


def add_flags(parser):
    """Adds the flags that all analyses share."""
    add = parser.add_argument
    add('--n-examples', type=cli.count, help='number of images, a fixed random subset; all')
    add('--eps', type=cli.budget, help="the run's; the paper's for a checkpoint outside of a run")
    add('--dataset', choices=data.DATASETS, help='of a checkpoint outside of a run; by its shape')
    add('--seed', type=int, default=0, help='of attacks and random vectors')
    add('--batch-size', type=cli.count, default=250, help='images in the model at a time')
    cli.add_machine_flags(parser)


def recompute_bn(model, x, y, pgd):
    """Gives the model the BatchNorm statistics of pgd(model, x, y), as in training: means over
    batches of about 250 images. The attack itself sees the statistics of the clean images x."""
    n_parts = math.ceil(len(x) / 250)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        update_bn(x.tensor_split(n_parts), model)
        update_bn(pgd(model, x, y).tensor_split(n_parts), model)


def output(folder, stem, args):
    """The path of the result `stem` in a folder; the flags that are given are in its name."""
    tags = {'n': args.n_examples, 'eps': None if args.eps is None else f'{args.eps:.6g}'}
    tags |= {'seed': args.seed or None}
    named = [f'{tag}{value}' for tag, value in tags.items() if value is not None]
    return folder / f'{"_".join([stem, *named])}.json'


def resume(path, metadata, device):
    """The result at `path` if it has the same `metadata`, else a new one."""
    distributed.agree(f'{path} {metadata}')
    result = record.load(path) if path.exists() else dict(metadata)
    if any(result.get(key) != metadata[key] for key in metadata.keys() - {'checkpoint', 'members'}):
        print(f'{path} is of another checkpoint or of other settings; it is replaced')
        result = dict(metadata)
    record.add_provenance(result, device)
    return result


def eigenvectors(run, k):
    """The top k eigenvectors of the run's Hessian, (k, dim), and their source as a string. Of the
    results of hessian.py at this eps a converged one is taken first, then the one on the most
    images; ValueError if there is none."""
    found = []
    for path in run.folder.glob('hessian*.json'):
        result = record.load(path)
        same = all(result[key] == run.metadata[key] for key in ('digest', 'eps'))
        if same and len(result['eigen']['values']) >= k:
            found.append((all(result['eigen']['converged'][:k]), result['n'], path))
    if not found:
        eps = data.show_eps(run.eps, run.metadata['dataset'])
        raise ValueError(
            f'{run.path} has no top {k} eigenvectors at eps {eps}; first: '
            f'python hessian.py {run.path}, with --eps and --n-examples as here'
        )
    converged, n, path = max(found)
    vectors = record.load(path.with_suffix('.pt'))['vectors'][:k]
    print(f'along eigenvectors of {path}, from {n} images, {"" if converged else "not "}converged')
    digest = hashlib.sha256(vectors.numpy().tobytes()).hexdigest()
    return vectors.to(run.x), f'{path.stem}, {n} images, {digest[:10]}'

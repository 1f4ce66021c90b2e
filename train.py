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
import sys
import time

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data
import models
import schedule
from attack import pgd, pgd_loop
from lib import cli, distributed, fast, record, rng, search
from lib.classifier import NotFiniteError, correct, norm, predict, refuse_nan

try:
    import resource
except ImportError:  # on Windows
    resource = None

OPTIMIZERS = {'adam': torch.optim.Adam, 'sgd': torch.optim.SGD}


def training_loss(net, x_adv, x, y, config):
    """The loss to be minimised, (), of adversarial examples x_adv of x, and their logits.

    Here it is the mean cross-entropy of x_adv (Eq. 1), which does not need x.
    """
    logits = net(x_adv)
    return F.cross_entropy(logits, y), logits


def train_epoch(net, adversary, optimizer, x, y, config, epoch, theta_0, bar):
    """One epoch of min_theta max_{x'} loss (Eq. 1) on images x and labels y.

    Returns t, eps and lr of its last batch with the mean loss and error on adversarial examples;
    and rows of trace.jsonl (Figures 2 and 8) on the first and last config.trace updates of the run.
    """
    net.train()
    n_batches = math.ceil(len(x) / config.batch_size)
    generator = rng.generator(config.seed, epoch)
    batches = data.batches(x, y, config.batch_size, generator, config.augment)
    layout = fast.memory_format(x.device, config.precision)
    bf16 = config.precision == 'bf16'  # no cache: a CUDA graph must not capture it
    autocast = torch.autocast(x.device.type, torch.bfloat16, bf16, cache_enabled=False)
    loss_sum, errors, seen, trace = 0.0, 0, 0, []
    for i, (x_batch, y_batch) in enumerate(batches):
        t, eps, lr = clock(config, epoch, i, n_batches)
        for group in optimizer.param_groups:
            group['lr'] = lr
        n = len(y_batch)
        rows, counted = distributed.share(n)
        x_batch, y_batch = x_batch[rows].contiguous(memory_format=layout), y_batch[rows]
        with autocast:
            seed = rng.fold_in(config.seed, epoch, i)
            x_adv = perturbed(adversary, x_batch, y_batch, eps, seed, config)
            loss, logits = training_loss(net, x_adv, x_batch, y_batch, config)
        optimizer.zero_grad()
        (loss * (counted / n)).backward()
        gradients = [theta.grad for theta in net.parameters() if theta.grad is not None]
        distributed.total(*gradients)
        wrong = (logits.argmax(1) != y_batch)[:counted].sum()
        loss_sum += loss.detach() * counted
        errors += wrong
        seen += n
        update, n_updates = epoch * n_batches + i, config.epochs * n_batches
        if config.trace and min(update, n_updates - 1 - update) < config.trace:
            distributed.total(wrong)
            moved = [theta.detach() - start for theta, start in zip(net.parameters(), theta_0)]
            trace.append((update, norm(*gradients), wrong / n, norm(*moved)))
        optimizer.step()
        if i % 50 == 0 or i == n_batches - 1:  # rarely, since it waits for the device
            mean_loss, error = finite_means(loss_sum, errors, adversary.nan, seen)
            bar.set_postfix_str(
                f'epoch {epoch + 1}/{config.epochs} loss {mean_loss:.2f}', refresh=False
            )
        bar.update(n)
    row = {'t': t, 'eps': eps, 'lr': lr, 'loss': mean_loss, 'train_robust_error': error}
    names = 'step', 'grad_norm', 'robust_error', 'distance'
    return row, [dict(zip(names, (step, *map(float, numbers)))) for step, *numbers in trace]


def perturbed(adversary, x, y, eps, seed, config):
    """Adversarial examples of a batch at the scheduled budget eps, to which the step size is
    proportional. Below 1e-6 training is clean, as in the paper's code."""
    if eps < 1e-6:
        return x
    step_size = config.step_size * eps / config.eps
    start = eps if config.start == 'eps' else step_size
    return adversary(x, y, eps, step_size, start=start, seed=seed)


def finite_means(loss_sum, errors, nan, seen):
    """Loss and error as means over the images seen in all processes. NotFiniteError if the loss, or
    a gradient of the attack, is not finite."""
    sums = torch.stack([loss_sum, errors.to(loss_sum), nan.to(loss_sum)])
    distributed.total(sums)
    total_loss, total_errors, any_nan = sums.tolist()
    refuse_nan(any_nan)
    if not math.isfinite(total_loss):
        raise NotFiniteError(f'the loss became {total_loss}')
    return total_loss / seen, total_errors / seen


def clock(config, epoch, batch, n_batches):
    """t of the budget, eps and lr of a batch. What does not restart follows the whole run."""
    now, tick = epoch, 1
    if config.clock == 'batch':
        now, tick = epoch + batch / n_batches, 1 / n_batches
    whole = [config.epochs]
    eps_periods = config.periods if 'eps' in config.restart else whole
    lr_periods = config.periods if 'lr' in config.restart else whole
    t = schedule.progress(now, eps_periods)
    eps = schedule.eps_at(t, config.eps_sched, config.eps, config.eps_min, config.eps_max)
    lr = schedule.lr_at(schedule.progress(now, lr_periods), config.lr_sched, config.lr)
    t_end = schedule.progress(now, lr_periods, ahead=tick)
    return t, eps, lr * schedule.warmup_at(t_end, config.lr_warmup)


def validate(model, x, y, index, config):
    """Clean and robust error of a `fast.folded` at the *target* eps, whatever the schedule's."""
    if len(x) == 0:
        return {'clean_error': None, 'robust_error': None, 'predicted_classes': None}
    model.refold()
    predicted = predict(model, x)
    attack = search.shared(pgd)
    settings = data.pgd_settings(vars(config), config.eps)
    x_adv = attack(model, x, y, eps=config.eps, index=index, **settings)
    fooled = (predicted != y) | ~correct(model, x_adv, y)
    return {
        'clean_error': (predicted != y).sum().item() / len(y),
        'robust_error': fooled.sum().item() / len(y),
        'predicted_classes': len(predicted.unique()) if len(y) >= 50 else None,
    }


def train(config, state, folder, args):
    """Trains the run in `folder`, from the `state` that record.start returned, to the end or for
    args.minutes. If the loss becomes infinite or nan, training ends with a diverged.json."""
    began = time.monotonic()
    device = args.device
    x, y, test, held_out = images(config, args)
    torch.manual_seed(config.seed)
    model = models.build(config.model, data.DATASETS[config.dataset], config.width)
    model = model.to(device, memory_format=fast.memory_format(device, config.precision))
    model = distributed.synchronized(model, device)
    theta_0 = [theta.detach().clone() for theta in model.parameters()] if config.trace else []
    optimizer = build_optimizer(model, config)
    averaged = average_updates(model, optimizer, config.ema)
    log, trace = resume(state, model, optimizer, averaged, folder)
    net, adversary = attacked_network(model, x, config, args.compile)
    folded = fast.folded(model, x[:2])
    with cli.bar(' images', config.epochs * len(x), len(log) * len(x)) as bar:
        for epoch in range(len(log), config.epochs):
            start = time.monotonic()
            try:
                with fast.tf32(config.precision != 'fp32'):
                    row, updates = train_epoch(
                        net, adversary, optimizer, x, y, config, epoch, theta_0, bar
                    )
                distributed.average(*model.buffers(), *(averaged.buffers() if averaged else ()))
                with fast.tf32(False):
                    row |= validate(folded, *test, config)
                    if config.n_val:
                        row['val_robust_error'] = validate(folded, *held_out, config)[
                            'robust_error'
                        ]
            except NotFiniteError as error:
                record.save(folder / 'diverged.json', {'epoch': epoch + 1, 'reason': str(error)})
                return
            cost = {'seconds': round(time.monotonic() - start, 2), 'gib': peak_memory(device)}
            log.append({'epoch': epoch + 1} | row | cost)
            trace += updates
            bar.write(format_epoch(log[-1], config))
            save_checkpoint(folder, config, model, optimizer, averaged, log, trace)
            late = torch.tensor(float(time.monotonic() - began > 60 * args.minutes))
            distributed.total(late)
            if late:  # for one process, so all stop
                break
    if len(log) == config.epochs and distributed.RANK == 0:
        (folder / 'last.pt').unlink(missing_ok=True)  # the run counts as finished
    distributed.wait()


def images(config, args):
    """Training images and labels; images, labels and index of the test set's part and of those that
    are held out from training."""
    x, y, x_test, y_test = data.load(config.dataset, args.data_dir, args.device)
    index = data.subset(len(x_test), config.n_eval)
    rows, others = data.split(len(x), config.n_train, config.n_val)
    test = x_test[index], y_test[index], index
    return x[rows], y[rows], test, (x[others], y[others], others)


def build_optimizer(model, config):
    """The optimizer for the parameters of `model`; on cuda a fused one."""
    parameters = list(model.parameters())
    options = {'weight_decay': config.weight_decay, 'fused': parameters[0].is_cuda}
    if config.optimizer == 'sgd':
        options['momentum'] = config.momentum
    return OPTIMIZERS[config.optimizer](parameters, config.lr, **options)


def average_updates(model, optimizer, decay):
    """A model with the exponential moving average of the parameters and buffers of `model` after
    each update, None without a decay."""
    if decay is None:
        return None
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))
    return averaged


def resume(state, model, optimizer, averaged, folder):
    """Restores an interrupted run from its state, if any. Returns its log and trace so far."""
    if not state:
        return [], []
    model.load_state_dict(state['model'])
    for group in state['optimizer']['param_groups']:  # it may come from another device
        group['fused'] = optimizer.defaults['fused']
    optimizer.load_state_dict(state['optimizer'])
    if averaged:
        averaged.load_state_dict(state['averaged'])
    log, trace = state['log'], state['trace']
    save_logs(folder, log, trace)  # a kill may have come between last.pt and these
    print(f'resuming after epoch {len(log)}')
    return log, trace


def attacked_network(model, x, config, compiled):
    """The network for updates, and its `fast.Adversary`; both by torch.compile if `compiled`."""
    dtype = torch.bfloat16 if config.precision == 'bf16' else torch.float32
    if not compiled:
        return model, fast.Adversary(pgd_loop, model, config.n_iter, x[:2], dtype=dtype)
    # static shapes: torch would turn to dynamic ones after some batches, a resumed run after others
    static = functools.partial(torch.compile, dynamic=False)
    net = static(model, mode='reduce-overhead')  # CUDA graphs
    return net, fast.Adversary(pgd_loop, model, config.n_iter, x[:2], compiled=static, dtype=dtype)


def peak_memory(device):
    """The most memory held at once so far, in GiB: of the device, or on a CPU of this process."""
    if torch.device(device).type == 'cuda':
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    if resource is None:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return round(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30, 2)


def save_checkpoint(folder, config, model, optimizer, averaged, log, trace):
    """Writes what the run leaves after an epoch; a kill at any moment loses at most that epoch."""
    ends = list(itertools.accumulate(config.periods))
    period = sum(end < len(log) for end in ends)
    best, ema = folder / f'best{period + 1}.pt', folder / f'ema{period + 1}.pt'
    if config.n_val:
        save_best(folder, config, period, model, log)
    if len(log) == ends[period]:
        last = record.period_files(folder, vars(config))[period]
        record.save(last, model.state_dict())
        log[-1]['digest'] = record.digest(last)  # names the model in other results
        if config.n_val:
            log[-1]['best_digest'] = record.digest(best)
        if averaged:
            record.save(ema, averaged.module.state_dict())
            log[-1]['ema_digest'] = record.digest(ema)
            averaged.n_averaged.zero_()  # the next update begins the average of a new period
    state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict()}
    if averaged:
        state['averaged'] = averaged.state_dict()
    record.save(folder / 'last.pt', state | {'log': log, 'trace': trace})
    save_logs(folder, log, trace)


def save_best(folder, config, period, model, log):
    """Keeps `model` if its error on held-out images is the least of its period, or without restarts
    of the run so far."""
    first = sum(config.periods[:period])  # epoch of the period
    compared = log if config.restart == ['none'] else log[first:]
    *before, error = (row['val_robust_error'] for row in compared)
    best = folder / f'best{period + 1}.pt'
    if error < min(before, default=math.inf):
        record.save(best, model.state_dict())
    elif len(log) - 1 == first:  # the best so far is that of the period before
        record.save(best, record.load(folder / f'best{period}.pt'))


def save_logs(folder, log, trace):
    record.save(folder / 'log.jsonl', log)
    if trace:
        record.save(folder / 'trace.jsonl', trace)


def format_epoch(row, config):
    """An epoch of the log as a line on the terminal."""
    eps, target = (data.show_eps(budget, config.dataset) for budget in (row['eps'], config.eps))
    text = f'epoch {row["epoch"]}/{config.epochs}  lr {row["lr"]:.2g}  loss {row["loss"]:.4f}'
    text += f'  robust error: train {row["train_robust_error"]:.1%} at eps {eps}'
    if row['robust_error'] is not None:
        text += (
            f', test {row["robust_error"]:.1%} at {target}  clean error {row["clean_error"]:.1%}'
        )
    text += f'  {row["seconds"]:.0f} s'
    if row['predicted_classes'] == 1:
        text += '  a constant classifier: one class for every clean test image'
    return text


# flags that config.json does not hold: they change no result, or set others (periodic)
NO_SETTINGS = 'device', 'data_dir', 'out', 'minutes', 'compile', 'periodic'


def settings(args):
    """The config of the run that `args` ask for: all its settings, the paper's where they are None.
    ValueError if they contradict each other or are out of range."""
    dataset = data.DATASETS[args.dataset]
    paper = dataset.settings() if args.eps is None else dataset.settings(args.eps)
    eps_max = {'constant': paper['eps']} | paper['eps_max']
    paper['eps_max'] = eps_max.get(args.eps_sched, 2 * paper['eps'])
    given = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    config = argparse.Namespace(**{k: paper.get(k) if v is None else v for k, v in given.items()})
    if isinstance(config.step_size, str):
        config.step_size = config.eps / int(config.step_size.removeprefix('eps/'))
    if config.width is None:
        config.width = models.MODELS[config.model].default_width
    if not config.periods:
        three = args.periodic
        config.periods = schedule.three_periods(config.epochs) if three else [config.epochs]
    elif args.periodic or args.epochs not in (None, sum(config.periods)):
        raise ValueError('--periods already sets the epochs; leave out --periodic and --epochs')
    config.epochs = sum(config.periods)
    config.restart = sorted(set(config.restart))
    if 'none' in config.restart and config.restart != ['none']:
        raise ValueError('--restart none stands alone')
    if config.step_size == 0 < config.eps:
        raise ValueError('--step-size 0 attacks nothing: name one above 0')
    if config.eps_min > config.eps_max:
        budgets = data.show_settings(['eps_min', 'eps_max'], vars(config))
        raise ValueError(f'{budgets}: the ramp must not fall')
    if config.eps_sched == 'constant' and (config.eps_min, config.eps_max) != (0, config.eps):
        raise ValueError('a constant eps is that of --eps: leave out --eps-min and --eps-max')
    return config


def periods_without_eps(config):
    """The lengths of the periods in which eps stays 0 although its target is not."""
    ends = list(itertools.accumulate(config.periods))
    largest = [
        max(clock(config, epoch, 0, 1)[1] for epoch in range(end - length, end))
        for end, length in zip(ends, config.periods)
    ]
    return [n for n, eps in zip(config.periods, largest) if eps == 0 < config.eps]


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
    add('--eps', type=cli.budget(), help='target budget; 0.4 for MNIST, 8/255 for CIFAR10')
    add('--eps-sched', choices=schedule.EPS_SCHEDS, default='constant', help='ramp (Eq. 5)')
    add('--eps-min', type=cli.budget(-2, 2), default=0.0, help='start of the ramp')
    add(
        '--eps-max',
        type=cli.budget(-2, 2),
        help='its end; 2 eps, 1.5 eps for cosine on MNIST; eps is clipped',
    )
    add('--epochs', type=cli.count, help='100 for MNIST, 200 for CIFAR10')
    add('--periodic', action='store_true', help='three periods: 1/2, 1/4 and 1/4 of the epochs')
    add('--periods', type=cli.count, nargs='+', metavar='EPOCHS', help='all periods: 100 50 50')
    text = 'what begins anew with each period; the rest follows the whole run'
    add('--restart', nargs='+', choices=('eps', 'lr', 'none'), default=['eps', 'lr'], help=text)
    add('--clock', choices=('epoch', 'batch'), default='epoch', help='how often lr and eps move')
    add('--batch-size', type=cli.count, default=128, help='images an update, of all processes')
    add('--optimizer', choices=OPTIMIZERS, help='adam for MNIST, sgd for CIFAR10')
    add('--lr', type=cli.number(0), help='learning rate; 1e-4 for MNIST, 0.1 for CIFAR10')
    add('--lr-sched', choices=schedule.LR_SCHEDS, help='constant for MNIST, step for CIFAR10')
    add('--lr-warmup', type=cli.number(0, 1), default=0.0, help='share of a period of rising lr')
    add('--momentum', type=cli.number(0), default=0.9, help='of sgd')
    add('--weight-decay', type=cli.number(0), help='0 for MNIST, 1e-3 for CIFAR10')
    add('--step-size', type=cli.step, help='of PGD at eps; 0.01 for MNIST, eps/4 for CIFAR10')
    add('--n-iter', type=cli.count, help='of PGD; eps/0.01 + 10 for MNIST, 10 for CIFAR10')
    add('--start', choices=('step', 'eps'), default='step', help='PGD starts in +-step_size or eps')
    add('--augment', action=argparse.BooleanOptionalAction, help='crop and flip; for CIFAR10')
    add('--n-train', type=cli.count, help='number of training images; all')
    add('--n-eval', type=cli.whole(0), default=1000, help='test images after each epoch')
    add('--n-val', type=cli.whole(0), default=0, help='held-out images that choose best1.pt ...')
    add('--ema', type=cli.number(0, 1), metavar='DECAY', help='averages weights in ema1.pt ...')
    add('--trace', type=cli.count, metavar='N', help='log the first and last N updates')
    add('--precision', choices=('fp32', 'tf32', 'bf16'), default='fp32', help='of training alone')
    add('--seed', type=cli.whole(0), default=0, help='of initialisation, data order and attacks')
    add('--minutes', type=float, default=math.inf, help='stop after the epoch in which they pass')
    add('--compile', action='store_true', help='torch.compile the network')
    add('--out', help='folder of the run; ckpts/DATASET_MODEL_SCHED[_periodic]_sSEED')
    cli.add_machine_flags(p)
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    config = settings(args)
    name = f'{config.dataset}_{config.model}_{config.eps_sched}'
    if len(config.periods) > 1:
        name += '_periodic'
    folder = pathlib.Path(args.out or f'ckpts/{name}_s{config.seed}')
    names = 'dataset', 'model', 'width', 'eps', 'eps_sched', 'periods'
    print(f'{folder} on {args.device}: {data.show_settings(names, vars(config))}')
    for n in periods_without_eps(config) if config.clock == 'epoch' else ():
        print(
            f'warning: eps stays 0 in a period of {n} epoch(s); longer ones or --clock batch help'
        )
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # a resumed run is bit-identical
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    x, y, *_ = data.load(config.dataset, args.data_dir, args.device)
    config.data = data.digest(x, y)
    defaults = config_of([])
    diverged = folder / 'diverged.json'
    with record.lock(folder):
        state = record.start(folder, vars(config), defaults, args.device)
        if not diverged.exists() and not record.finished(folder):
            train(config, state, folder, args)
        if diverged.exists():
            epoch = record.load(diverged)['epoch']
            print(f'{folder} diverged in epoch {epoch}, which is its result; try a smaller --lr')
        elif record.finished(folder):
            print(f'{folder} is finished. Next: python evaluate.py {folder}')
        else:
            print(f'{folder} stopped for --minutes {args.minutes:g}; the same command resumes it')


if __name__ == '__main__':
    cli.run(main)

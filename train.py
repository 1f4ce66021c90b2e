"""Adversarial training under a scheduled budget; an interrupted run goes on where it stopped.

`python train.py --dataset cifar10 --eps-sched linear --periodic` is a row of the paper's Table 1:
the defaults are the paper's for the dataset. The same command continues an interrupted run and ends
bit-identical to an uninterrupted one: every random number is a function of seed, epoch and batch.
Budgets are typed as fractions of the pixel range, 8/255 or 0.4.
"""
import argparse
import contextlib
import functools
import itertools
import math
import os
import pathlib
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import attack
import data
import models
import record
import schedule


# of the update from theta_t: t, ||gradient of the loss||, error on the batch, ||theta_t - theta_0||
TRACED = 'step', 'grad_norm', 'robust_error', 'distance'


def train_epoch(net, adversary, optimizer, x, y, c, epoch, theta_0, bar):
    """One epoch of min_theta max_{x'} loss (Eq. 1) on images x and labels y under the settings c.

    Returns t, eps and lr of its last batch, the mean loss and error on the adversarial examples;
    and the rows of trace.jsonl (Figures 2 and 8), on the first and last c.trace updates of the run.
    """
    net.train()
    trace = []
    loss_sum, errors, seen, n_batches = 0., 0, 0, math.ceil(len(x) / c.batch_size)
    generator = torch.Generator().manual_seed(attack.derive(c.seed, epoch))
    for i, (x_batch, y_batch) in enumerate(data.batches(x, y, c.batch_size, generator, c.augment)):
        t = schedule.progress(epoch + (i / n_batches if c.clock == 'batch' else 0), c.periods)
        eps = schedule.eps_at(t, c.eps_sched, c.eps, c.eps_min, c.eps_max)
        lr = schedule.lr_at(t, c.lr_sched, c.lr, c.lr_warmup)
        for group in optimizer.param_groups:
            group['lr'] = lr
        with torch.autocast(x.device.type, torch.bfloat16, enabled=c.precision == 'bf16'):
            if eps >= 1e-6:  # below is clean training, as in the paper's code
                x_batch = adversary(x_batch, y_batch, eps, c.step_size * eps / c.eps,
                                    start=eps if c.start == 'eps' else None,
                                    seed=attack.derive(c.seed, epoch, i))
            logits = net(x_batch)
            loss = F.cross_entropy(logits, y_batch)
        optimizer.zero_grad()
        loss.backward()
        wrong = (logits.argmax(1) != y_batch).sum()
        step = epoch * n_batches + i
        if c.trace and (step < c.trace or step >= c.epochs * n_batches - c.trace):
            moved = [theta.detach() - start for theta, start in zip(net.parameters(), theta_0)]
            trace.append((step, models.norm(*(theta.grad for theta in net.parameters())),
                          wrong / len(y_batch), models.norm(*moved)))
        optimizer.step()
        loss_sum += loss.detach() * len(y_batch)
        errors += wrong
        seen += len(y_batch)
        if i % 50 == 0 or i == n_batches - 1:  # else nothing waits for the device
            attack.refuse_nan(adversary.total)
            if not loss_sum.isfinite():
                raise attack.NotFiniteError(f'the loss became {loss_sum.item()}')
            bar.set_postfix_str(f'eps {eps:.3f} lr {lr:.2g} loss {loss_sum.item() / seen:.2f} '
                                f'robust error {errors.item() / seen:.0%}', refresh=False)
        bar.update(len(y_batch))
    return ({'t': t, 'eps': eps, 'lr': lr, 'loss': loss_sum.item() / len(x),
             'train_robust_error': errors.item() / len(x)},
            [dict(zip(TRACED, (row[0], *map(float, row[1:])))) for row in trace])


def test(model, x, y, index, c):
    """Clean and robust error of a `models.folded` at the *target* eps: never used to select."""
    if len(x) == 0:
        return {'clean_error': None, 'robust_error': None, 'predicted_classes': None}
    model.refold()
    predicted = attack.predict(model, x)
    x_adv = attack.pgd(model, x, y, c.eps, c.step_size, c.n_iter, index=index,
                       start=c.eps if c.start == 'eps' else None)
    wrong = predicted != y
    fooled = wrong | ~attack.correct(model, x_adv, y)
    return {'clean_error': wrong.sum().item() / len(y),
            'robust_error': fooled.sum().item() / len(y),
            'predicted_classes': len(predicted.unique()) if len(y) >= 50 else None}


def main(argv=None):
    args, began = parse(argv), time.monotonic()
    c, device = settings(args), args.device
    name = [c.dataset, c.model, c.eps_sched] + ['periodic'] * (len(c.periods) > 1) + [f's{c.seed}']
    folder = pathlib.Path(args.out or 'ckpts/' + '_'.join(name))
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # a continued run is bit-identical
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    x, y, x_test, y_test = data.load(c.dataset, args.data_dir, device)
    if c.n_train:
        rows = data.subset(len(x), c.n_train)
        x, y = x[rows], y[rows]
    index = data.subset(len(x_test), c.n_eval)
    x_test, y_test = x_test[index], y_test[index]
    torch.manual_seed(c.seed)
    model = models.build(c.model, c.dataset, c.width)
    model = model.to(device, memory_format=torch.channels_last)
    theta_0 = [theta.detach().clone() for theta in model.parameters() if c.trace]
    optimizer = optimizer_of(model, c)
    with record.lock(folder, args.wait):
        state = record.start(folder, vars(c), device)
        if record.finished(folder):
            print(f'{folder} is finished, all {c.epochs} epochs: nothing to do. '
                  f'Next: python evaluate.py {folder}')
            return
        log, trace = [], []
        if state:
            try:
                model.load_state_dict(state['model'])
                optimizer.load_state_dict(state['optimizer'])
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(f'{folder / "last.pt"} does not fit this run; delete it, and the '
                                 'run begins again') from None
            log, trace = state['log'], state.get('trace') or []
        print(f'{folder}: {len(x)} images of {c.dataset} on {device}, {c.model} of width {c.width} '
              f'({sum(p.numel() for p in model.parameters()):,} parameters), eps {c.eps:.4g} '
              f'{c.eps_sched}, epochs {" + ".join(map(str, c.periods))}'
              + (f', going on after epoch {len(log)}' if log else ''))
        compiled = torch.compile if args.compile else None
        net = compiled(model) if compiled else model
        adversary = attack.Adversary(model, c.n_iter, x=x[:2], compiled=compiled)
        with tqdm(total=c.epochs * len(x), initial=len(log) * len(x), unit=' images',
                  unit_scale=True, disable=None, bar_format='{percentage:3.0f}%  {rate_fmt}  '
                  '{remaining} left{postfix}') as bar:
            while len(log) < c.epochs:
                epoch, start = len(log), time.monotonic()
                with explained(folder, epoch, c, args.compile):
                    with models.tf32(c.precision != 'fp32'):
                        row, traced = train_epoch(net, adversary, optimizer, x, y, c, epoch,
                                                  theta_0, bar)
                    with models.tf32(False):
                        row |= test(adversary.folded, x_test, y_test, index, c)
                seconds = round(time.monotonic() - start, 2)
                log.append({'epoch': epoch + 1} | row | {'seconds': seconds})
                bar.write(line(log[-1], c))
                trace += traced
                keep(folder, c, model, optimizer, log, trace)
                if args.minutes is not None and time.monotonic() - began > 60 * args.minutes:
                    break
    if len(log) < c.epochs:
        print(f'{folder}: stopped after epoch {len(log)} of {c.epochs} for --minutes '
              f'{args.minutes:g}; the same command goes on')
    else:
        print(f'{folder} is finished. Next: python evaluate.py {folder}')


@contextlib.contextmanager
def explained(folder, epoch, c, compiled):
    """Inside, a loss that is not finite and a failing --compile become ValueErrors with a way out.
    """
    try:
        yield
    except attack.NotFiniteError as error:
        record.save(folder / 'diverged.json', {'epoch': epoch + 1})
        raise ValueError(f'{folder}, epoch {epoch + 1}: {error}. The {epoch} epochs before are '
                         f'kept. Try a smaller --lr than {c.lr:g} or a warm-up, with a new --out'
                         ) from None
    except RuntimeError as error:
        if not compiled or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = ' '.join(str(error).split()[:30])
        raise ValueError(f'--compile failed: {reason} ... The same command without it '
                         'goes on') from None


def keep(folder, c, model, optimizer, log, trace):
    """Writes what the run leaves after an epoch; it is finished the moment last.pt is gone."""
    record.save(folder / 'log.jsonl', log)
    if c.trace:
        record.save(folder / 'trace.jsonl', trace)
    ends = dict(zip(itertools.accumulate(c.periods), record.period_files(folder, vars(c))))
    if len(log) in ends:
        record.save(ends[len(log)], model.state_dict())
    if len(log) == c.epochs:
        (folder / 'last.pt').unlink(missing_ok=True)
    else:
        record.save(folder / 'last.pt', {
            'config': vars(c), 'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
            'log': log, 'trace': trace})


def line(row, c):
    """One epoch of the log, for people."""
    text = (f'epoch {row["epoch"]}/{c.epochs}  eps {row["eps"]:.4f}  lr {row["lr"]:.2g}  '
            f'loss {row["loss"]:.4f}  robust error: train {row["train_robust_error"]:.1%}')
    if row['robust_error'] is not None:
        text += f', test {row["robust_error"]:.1%}  clean error {row["clean_error"]:.1%}'
    text += f'  {row["seconds"]:.0f} s'
    if row['predicted_classes'] == 1:
        text += '  collapsed: a constant classifier, one class for every test image'
    return text


OPTIMIZERS = {'adam': torch.optim.Adam, 'sgd': torch.optim.SGD}


def optimizer_of(model, c):
    """The optimizer of the settings c for the parameters of `model`; one kernel a step on cuda."""
    parameters = list(model.parameters())
    own = {'momentum': c.momentum} if c.optimizer == 'sgd' else {}
    return OPTIMIZERS[c.optimizer](parameters, c.lr, weight_decay=c.weight_decay,
                                   fused=parameters[0].is_cuda, **own)


def settings(args):
    """The settings of the run that `args` ask for, the paper's where they are silent."""
    def given(name, default):
        return default if getattr(args, name) is None else getattr(args, name)

    paper = data.paper(args.dataset, args.eps)
    model = given('model', paper['model'])
    if args.periods:
        if args.periodic or args.epochs not in (None, sum(args.periods)):
            raise ValueError(f'--periods {" ".join(map(str, args.periods))} says all about the '
                             'epochs; leave out --periodic and --epochs')
        periods = args.periods
    else:
        epochs = given('epochs', paper['epochs'])
        periods = schedule.thirds(epochs) if args.periodic else [epochs]
    if paper['eps'] > 0 and args.step_size == 0:
        raise ValueError('--step-size must be above 0')
    eps_max = paper['eps'] if args.eps_sched == 'constant' else paper['eps_max'][args.eps_sched]
    if given('eps_max', eps_max) < args.eps_min:
        raise ValueError(f'--eps-min {args.eps_min:g} is above --eps-max '
                         f'{given("eps_max", eps_max):g}')
    of_the_paper = {name: given(name, paper[name]) for name in (
        'batch_size', 'optimizer', 'lr', 'lr_sched', 'momentum', 'weight_decay', 'augment',
        'step_size', 'n_iter')}
    return SimpleNamespace(
        dataset=args.dataset, model=model, width=given('width', {'lenet': 16}.get(model, 8)),
        eps=paper['eps'], eps_sched=args.eps_sched, eps_min=args.eps_min,
        eps_max=given('eps_max', eps_max), epochs=sum(periods), periods=periods, clock=args.clock,
        **of_the_paper, lr_warmup=args.lr_warmup, start=args.start, n_train=args.n_train,
        n_eval=args.n_eval, trace=args.trace, precision=args.precision, seed=args.seed)


def parse(argv):
    """The command line."""
    number, budget = record.number, record.budget
    count, rate, share = number(int, 1), number(float, 0), number(float, 0, 1)
    ramp = functools.partial(budget, least=-2, most=2)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--dataset', choices=data.SPLITS, default='mnist5k',
        help='default: mnist5k, which needs no download')
    add('--model', choices=models.MODELS, help='default: lenet for MNIST, resnet18 for CIFAR10')
    add('--width', type=number(int, 1, 1024),
        help='width factor of the model; default: 16 for lenet, 8 for vgg and resnet18')
    add('--eps', type=budget, help='target budget; default: 0.4 for MNIST, 8/255 for CIFAR10')
    add('--eps-sched', choices=schedule.EPS_SCHEDS, default='constant',
        help='budget over a period (Eq. 5); default: constant')
    add('--eps-min', type=ramp, default=0.,
        help='where linear and cosine begin, clipped to [0, eps]; default: 0')
    add('--eps-max', type=ramp, help='where they would end, clipped likewise; default: 2 eps, '
        'but 1.5 eps for cosine on MNIST')
    add('--epochs', type=count, help='default: 100 for MNIST, 200 for CIFAR10')
    add('--periodic', action='store_true',
        help="the paper's three periods: 1/2, 1/4 and 1/4 of the epochs")
    add('--periods', type=count, nargs='+', metavar='EPOCHS',
        help='the lengths of the periods outright: 100 50 50')
    add('--clock', choices=('epoch', 'batch'), default='epoch',
        help='how often lr and eps move; default: epoch')
    add('--batch-size', type=count, help='default: 128')
    add('--optimizer', choices=OPTIMIZERS, help='default: adam for MNIST, sgd for CIFAR10')
    add('--lr', type=rate, help='learning rate; default: 1e-4 for MNIST, 0.1 for CIFAR10')
    add('--lr-sched', choices=schedule.LR_SCHEDS,
        help='learning rate over a period; default: constant for MNIST, step for CIFAR10')
    add('--lr-warmup', type=share, default=0.,
        help='share of a period in which lr rises from 0, best with --clock batch; default: 0')
    add('--momentum', type=share, help='of sgd; default: 0.9')
    add('--weight-decay', type=rate, help='default: 0 for MNIST, 1e-3 for CIFAR10')
    add('--step-size', type=budget, help='of PGD at the target budget, scaled with it; '
        'default: 0.01 for MNIST, eps/4 for CIFAR10')
    add('--n-iter', type=count,
        help='iterations of PGD; default: eps/0.01 + 10 for MNIST, 10 for CIFAR10')
    add('--start', choices=('step', 'eps'), default='step',
        help='PGD starts anywhere within +-step-size or within +-eps; default: step')
    add('--augment', action=argparse.BooleanOptionalAction,
        help='random crop and flip; default: for CIFAR10 only')
    add('--n-train', type=count, help='train on so many of the images; default: all')
    add('--n-eval', type=number(int, 0), default=1000,
        help='so many test images for the errors after each epoch; default: 1000')
    add('--trace', type=count, metavar='N', help='gradient norm, error and distance from the start '
        'of the first and last N updates, into trace.jsonl; the paper: 2000; default: none')
    add('--precision', choices=('fp32', 'tf32', 'bf16'), default='fp32',
        help='of the training step, its attack included; errors are always measured in fp32; '
        'default: fp32')
    add('--seed', type=number(int, 0, 2 ** 32 - 1), default=0,
        help='of initialisation, data order and attacks; default: 0')
    add('--minutes', type=rate,
        help='stop cleanly after the epoch that passes so many minutes, to be continued later')
    add('--compile', action='store_true',
        help='torch.compile the network; takes a minute to begin with')
    add('--out', help='folder of the run; default: ckpts/DATASET_MODEL_SCHED[_periodic]_sSEED')
    record.add_machine_flags(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    record.run(main)

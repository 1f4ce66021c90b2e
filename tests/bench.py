"""How fast this is, beside what one would use instead; not a test, and not run by pytest.

    python tests/bench.py --release DIR        a checkout of the authors' release, for comparison

torchattacks, AutoAttack and PyHessian take part if they can be imported. Ours and its peers
alternate in one run. A row shows the median seconds over the rounds; that of a peer also the median
ratio (above 1: ours is faster) with its range, if both computed the same. All parts with all peers
take half an hour or more on two cores that do nothing else.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import pathlib
import statistics
import sys
import time
import warnings
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import attack
import data
import hessian
import models
import train
from lib import cli, fast, record, rng
from lib.classifier import correct, mean_loss, unflat

RELEASED = {'lenet': 'MNIST_LeNet', 'vgg': 'CIFAR10_VGG', 'resnet18': 'CIFAR10_ResNet'}
criterion = torch.nn.CrossEntropyLoss()


def compare(args, what, runs, check=None):
    """Times `runs`, name -> function of the number of the round, and prints a row for each peer.

    check(name, results) of a peer says whether it computed the same as 'ours', and in words what;
    `results` maps names to what their runs returned. All run once before, as a warm-up.
    """
    wait = torch.cuda.synchronize if 'cuda' in args.device else lambda: None
    seconds, results = ({name: [] for name in runs} for _ in range(2))
    for i in range(-1, args.rounds):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            result = run(max(i, 0))
            wait()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
                results[name].append(result)
    ours = seconds.pop('ours')
    show(f'{what:<40}{statistics.median(ours):>9.4g} s')
    for name, times in seconds.items():
        ratios = sorted(other / own for own, other in zip(ours, times))
        ratio = f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'
        same, words = check(name, results)
        ratio = f'{ratio if same else "NOT THE SAME":<22}{words}'
        show(f'    {name:<36}{statistics.median(times):>9.4g} s  {ratio}')


def show(text):
    print(text, file=sys.__stdout__, flush=True)  # all else that is printed is left out


def step(args, name):
    """A PGD training step on 128 images, as train.py makes it: attack, then update."""
    dataset = 'mnist5k' if name == 'lenet' else 'cifar10'
    flags = ['--dataset', dataset, '--model', name, '--no-augment']
    c = train.settings(train.parser().parse_args(flags))
    x, y = (tensor[:128] for tensor in data.load(dataset, args.data_dir, args.device)[:2])
    torch.manual_seed(0)
    model = models.build(name, data.DATASETS[dataset], c.width)
    model = model.to(args.device, memory_format=torch.channels_last)
    update_bn([x], model)  # so that the logits move with x
    optimizer, bar = train.build_optimizer(model, c), tqdm(disable=True)
    adversary = fast.Adversary(attack.pgd_loop, model, c.n_iter, x[:2])
    runs = {'ours': lambda i: train.train_epoch(model, adversary, optimizer, x, y, c, 0, [], bar)}
    check = None
    if args.release:
        net = released(args, name, c.width, model)
        runs['release'], their_pgd = their_step(args, net, x.contiguous(), y, c)
        noise = rng.uniform('pgd', 1, torch.arange(len(x), device=x.device), x.shape[1:], x)
        with mock.patch('torch.rand', lambda *shape, **options: noise):  # the same start for both
            x_theirs = their_pgd()
        x_ours = adversary(x, y, c.eps, c.step_size, seed=1)
        clean, ours, theirs = (mean_loss(net, images, y)[0] for images in (x, x_ours, x_theirs))
        same = abs(ours - theirs) <= 0.01 * (theirs - clean) > 1e-4
        check = same, f'loss {clean:.4f}, after PGD {ours:.5f} {theirs:.5f}'
    compare(args, f'step of {name}', runs, lambda *_: check)


def import_release(folder):
    """The modules of the authors' release that take part."""
    sys.path.insert(1, folder)
    # torch has dropped what one of its imports names and nothing here uses
    sys.modules['torch.autograd.gradcheck'].zero_gradients = None
    names = 'models', 'attack', 'hessian'
    return SimpleNamespace(**{name: importlib.import_module(f'util.{name}') for name in names})


def released(args, name, width, model):
    """The network `name` as the release writes it, with the parameters of `model`."""
    net = getattr(args.release.models, RELEASED[name])(width=width).to(args.device)
    net.load_state_dict(model.state_dict())
    return net.eval()


def their_step(args, net, x, y, c):
    """Two functions: a training step of the release, and its attack alone, which returns x_adv."""
    optimizer = train.build_optimizer(net, c)
    pgd = args.release.attack.PGD(c.step_size, c.eps, c.n_iter)

    def attacked():
        return pgd.attack(net.eval(), optimizer, x, y, criterion)[0]

    def run(i):
        x_adv = attacked()
        loss = criterion(net.train()(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run, attacked


STANDARD = 'fab_t', 'standard'
PACKAGE = {'apgd100_ce': 'apgd-ce', 'apgd100_dlr': 'apgd-dlr', 'square5k': 'square'}


def attacks(args, keys=('apgd100_ce', 'apgd100_dlr', 'square5k')):
    """Attacks on --n test digits and a LeNet that PGD fools on some half of them."""
    flags = '--width 4 --eps-sched linear --epochs 15 --step-size 0.05 --n-iter 10 --lr 3e-3'
    machine = ['--device', args.device, '--data-dir', args.data_dir]
    train.main([*flags.split(), '--n-eval', '100', '--out', 'evals/bench', *machine])
    model, config = record.load_model(record.members('evals/bench')[-1])
    net, eps = copy.deepcopy(model.to(args.device)).eval(), config['eps']
    if args.release:
        net = released(args, 'lenet', config['width'], model)
    _, _, x, y = (t[: args.n] for t in data.load('mnist5k', args.data_dir, args.device))
    network = fast.folded(model, x[:2])
    attackers = {'ours': functools.partial(run_ours, network, eps)} | find_peers(args, net, eps)
    if keys == STANDARD:
        attackers.pop('torchattacks', None)  # its FAB and its AutoAttack are others
    for key in keys:
        compare_attack(args, key, net, attackers, x, y, eps)


def run_ours(model, eps, key, x, y):
    """An attack of Table 1 or of AutoAttack's standard evaluation, or the latter whole."""
    x_adv, left, table = x.clone(), correct(model, x, y), attack.ATTACKS | attack.STANDARD
    for run in attack.STANDARD.values() if key == 'standard' else [table[key]]:
        rows = left.nonzero().squeeze(1)
        x_adv[rows] = run(model, x[rows], y[rows], eps=eps, index=rows.cpu())
        left[rows] = correct(model, x_adv[rows], y[rows])
    return x_adv


def compare_attack(args, key, net, attackers, x, y, eps):
    """Rows of one attack: all images in each round, but for Square, by far the slowest, a part."""
    n_parts = args.rounds if key == 'square5k' else 1
    parts = list(zip(x.tensor_split(n_parts), y.tensor_split(n_parts))) * args.rounds

    def errors(name, i):
        """Which images are misclassified after the attack: 0 or 1; nan if one left its box."""
        x, y = parts[i]
        x_adv = attackers[name](key, x, y)
        inside = (x_adv - x).abs().max() <= eps + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
        return torch.where(correct(net, x_adv, y), 0.0, 1.0 if inside else torch.nan)

    def check(name, results):
        ours, theirs = (100 * torch.cat(results[who]).mean().item() for who in ('ours', name))
        same = -max(0.5, 100 / len(x)) <= ours - theirs <= 2
        return same, f'robust error {ours:.2f} % {theirs:.2f} %'

    runs = {name: functools.partial(errors, name) for name in attackers}
    compare(args, f'{key}, {len(parts[0][0])} images', runs, check)


def find_peers(args, model, eps):
    """name -> (key, x, y) -> x_adv of the peers at hand; what is not said is their default."""
    peers = {}
    with contextlib.suppress(ImportError):
        from autoattack import AutoAttack

        def auto_attack(key, x, y):
            version = 'standard' if key in STANDARD else 'custom'
            options = {'version': version, 'device': args.device, 'verbose': False, 'seed': 0}
            attacker = AutoAttack(model, norm='Linf', eps=eps, **options)
            if key != 'standard':
                attacker.attacks_to_run = [PACKAGE.get(key, 'fab-t')]
            return attacker.run_standard_evaluation(x, y, bs=250)

        peers['AutoAttack'] = auto_attack
    with contextlib.suppress(ImportError):
        import torchattacks

        def torch_attacks(key, x, y):
            if key == 'square5k':
                attacker = torchattacks.Square(model, eps=eps, resc_schedule=False)
            else:
                options = {'n_restarts': 5, 'loss': key.removeprefix('apgd100_')}
                attacker = torchattacks.APGD(model, eps=eps, steps=100, **options)
            return torch.cat([attacker(*part) for part in zip(x.split(250), y.split(250))])

        peers['torchattacks'] = torch_attacks
    return peers


def curvature(args):
    """Hessian products, and the top 20, of a LeNet of width 16 on --n-hessian digits, a batch."""
    x, y = (t[: args.n_hessian] for t in data.load('mnist5k', args.data_dir, args.device)[:2])
    torch.manual_seed(0)
    model = models.build('lenet', data.DATASETS['mnist5k'], 16).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(20):  # away from the initialiser; any point will do
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    x = attack.pgd(fast.folded(model, x[:2]), x, y, 0.1, 0.02, 10)
    H, dim = hessian.Hessian(model, x, y, len(x)), sum(p.numel() for p in model.parameters())
    v = rng.unit_vector(dim, x.new_zeros(()), 0)
    peers = find_products(args, model, x, y, v)
    runs = {'ours': lambda i: v @ H(v)} | {name: product for name, (product, _) in peers.items()}

    def check(name, results):
        u = peers[name][1]
        ours, theirs = float(u @ H(u)), float(results[name][-1])
        return abs(ours - theirs) <= 1e-3 * abs(theirs), f"v'Hv {ours:.5g} {theirs:.5g}"

    compare(args, f'a further Hessian product, {len(x)} images', runs, check)
    runs = {'ours': lambda i: hessian.top_eigenpairs(H, dim, 20, like=v[0])}
    compare(args, f'its top 20 eigenpairs, {len(x)} images', runs)


def find_products(args, model, x, y, v):
    """name -> a function of the number of the round, v' H v of a direction v; and that v."""
    found = {}
    warnings.filterwarnings('ignore', 'Using backward')  # a leak of both peers
    if args.release:
        net = released(args, 'lenet', 16, model)
        power = args.release.hessian.calc_hessian_eigen_full_dataset
        torch.manual_seed(0)  # the direction of its first product
        u = torch.cat([torch.randn(p.shape).flatten() for p in model.parameters()]).to(x)

        def product(i):
            torch.manual_seed(0)
            return power(net, [(x, y)], criterion, {}, None, x.is_cuda, topk=1, max_iter=1)[0][0]

        found['release'] = product, u / u.double().norm()
    with contextlib.suppress(ImportError):
        from pyhessian import hessian as PyHessian

        parts = unflat(v, list(model.parameters()))
        peer = PyHessian(copy.deepcopy(model), criterion, dataloader=[(x, y)], cuda=x.is_cuda)
        found['PyHessian'] = lambda i: peer.dataloader_hv_product(parts)[0], v
    return found


PARTS = {name: functools.partial(step, name=name) for name in RELEASED}
PARTS |= {'attacks': attacks, 'standard': functools.partial(attacks, keys=STANDARD)}
PARTS['hessian'] = curvature


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add('--release', metavar='DIR', type=import_release, help="a checkout of the authors' release")
    add('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='what to measure')
    add('--rounds', type=cli.count, default=5, help='how often everything runs')
    add('--n', type=cli.count, default=1000, help='test images for the attacks, at most 1000')
    add('--n-hessian', type=cli.count, default=100, help='images of the Hessian')
    cli.add_machine_flags(parser)
    args = parser.parse_args(argv)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False  # as train.py
    record.add_provenance(made := {}, args.device)
    show(', '.join(f'{name} {value}' for name, value in made['provenance'][0].items()))
    with fast.tf32(False), contextlib.redirect_stdout(io.StringIO()):
        for part in args.parts:
            PARTS[part](args)


if __name__ == '__main__':
    cli.run(main)

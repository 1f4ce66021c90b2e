"""How fast this is, beside what one would use instead; not a test, and not run by pytest.

    python tests/bench.py --release DIR        a checkout of the authors' release, for comparison

torchattacks, AutoAttack and PyHessian take part if they can be imported. Ours and a peer alternate
in one run; a row shows the median over rounds, the median ratio (above 1: ours is faster) and its
range, and the check that both computed the same. Where the check fails no ratio is given. The last
line is the table as JSON. All parts with all peers take half an hour or more on two cores.
Leave the machine alone meanwhile: times are of use only beside each other.
"""
import argparse
import contextlib
import copy
import importlib
import io
import json
import math
import pathlib
import platform
import statistics
import sys
import time
import warnings
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import attack
import data
import hessian
import models
import record
import train

MODELS = {'lenet': 'mnist', 'vgg': 'cifar10', 'resnet18': 'cifar10'}
CLASSES = {'lenet': 'MNIST_LeNet', 'vgg': 'CIFAR10_VGG', 'resnet18': 'CIFAR10_ResNet'}


def main(argv=None):
    args = parse(argv)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False  # as train.py
    b = SimpleNamespace(rows=[], args=args, device=torch.device(args.device),
                        release=release(args.release))
    print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch '
          f'{torch.__version__}, {args.device}; {args.rounds} rounds\n'
          f'{"":<38}{"ours":>10}  {"":<24}{"theirs":>10}  {"ratio":>6} {"range":^13}  check')
    try:
        with models.tf32(False):
            for part in args.parts:
                PARTS[part](b)
    finally:
        print(json.dumps({'torch': torch.__version__, 'threads': torch.get_num_threads(),
                          'device': str(args.device), 'rounds': args.rounds, 'rows': b.rows}))


def release(path):
    """The modules of the authors' release that take part, or None."""
    if path is None:
        return None
    sys.path.insert(1, str(path))
    # torch has dropped what one of its imports names and none of these parts uses
    sys.modules['torch.autograd.gradcheck'].zero_gradients = None
    warnings.filterwarnings('ignore', 'Using backward')  # a leak of its Hessian
    try:
        found = SimpleNamespace(**{name: importlib.import_module(f'util.{name}')
                                   for name in ('models', 'attack', 'hessian')})
        found.attack.PGD, found.hessian.calc_hessian_eigen_full_dataset  # some other util has none
        [getattr(found.models, name) for name in CLASSES.values()]
        return found
    except (ImportError, AttributeError) as error:
        raise ValueError(f'--release {path} is no whole checkout of '
                         f'liuchen11/AdversaryLossLandscape: {error}') from None


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def clock(run, device):
    """Seconds and result of run()."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def alternate(b, runs, warm=True):
    """name -> its seconds in each round; `runs` maps names to functions of the number of the round.

    Also name -> its results. With `warm`, all run once before.
    """
    seconds, results = ({name: [] for name in runs} for _ in range(2))
    for i in range(-1 if warm else 0, b.args.rounds):
        for name, run in runs.items():
            took, result = clock(lambda: run(max(i, 0)), b.device)
            if i >= 0:
                seconds[name].append(took)
                results[name].append(result)
    return seconds, results


def row(b, what, unit, seconds, amount=None, peer='', theirs=None, same=None, check='', **more):
    """Adds a row to the table: seconds, or amount / seconds, of ours and of a peer, by rounds."""
    def number(times):
        if times is not None:
            middle = statistics.median(times)
            return amount / middle if amount else middle

    r = {'what': what, 'unit': unit, 'ours': number(seconds), 'peer': peer,
         'theirs': number(theirs), 'same': same if theirs else None, 'check': check, **more}
    if theirs and same:
        ratios = sorted(other / own for own, other in zip(seconds, theirs))
        r |= {'ratio': statistics.median(ratios), 'range': [ratios[0], ratios[-1]]}
    elif theirs:
        r['check'] = f'FAILED: {check}'
    b.rows.append(r)
    low, high = r.get('range', (math.nan, math.nan))
    print(f'{what + ", " + unit:<38}{r["ours"]:>10.4g}  {peer:<24}'
          + (f'{r["theirs"]:>10.4g}' if theirs else f'{"":>10}')
          + (f'  {r["ratio"]:>6.2f} {low:>5.2f} .. {high:<5.2f}' if 'ratio' in r else f'{"":>22}')
          + f'  {r["check"]}', flush=True)


def peak(b):
    """GFLOP/s of large float32 products and convolutions, the best of a few."""
    x = torch.randn(2048, 2048, device=b.device)
    runs = {('matrix', 2048): (lambda: x @ x, 2 * 2048 ** 3)}
    for channels, size in (64, 32), (128, 16), (256, 14):
        image = torch.randn(128, channels, size, size, device=b.device).to(
            memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=b.device)
        runs['convolution', channels] = (
            lambda image=image, weight=weight: F.conv2d(image, weight, padding=1),
            2 * 9 * 128 * (channels * size) ** 2)

    def best(i):
        return max(flops / clock(run, b.device)[0] for run, flops in runs.values()) / 1e9
    return best


def measure_peak(b):
    best = alternate(b, {'peak': peak(b)})[1]['peak']
    row(b, 'peak', 'GFLOP/s', [1 / value for value in best], 1, check='products and convolutions')


def settings(name, dataset, device):
    """The paper's settings for a step of this model, as train.py has them, without augmentation."""
    args = train.parse(['--dataset', dataset, '--model', name, '--no-augment',
                        '--device', str(device)])
    return train.settings(args)


def step(b):
    """One PGD training step on 128 images, as train.py makes it: attack, then update."""
    for name, dataset in MODELS.items():
        c = settings(name, dataset, b.device)
        x, y = (tensor[:128] for tensor in data.load_once(dataset, b.args.data_dir, b.device)[:2])
        torch.manual_seed(0)
        model = models.build(name, dataset, c.width).to(
            b.device, memory_format=torch.channels_last)
        optimizer = train.optimizer_of(model, c)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for module in norms:  # to take the statistics of these images, so that logits move with x
            module.momentum = 1.
        with torch.no_grad():
            model(x)
        for module in norms:
            module.momentum = .1
        adversary, bar = attack.Adversary(model, c.n_iter), tqdm(disable=True)
        before = copy.deepcopy(model.state_dict())
        noise = attack.uniform('pgd', 1, torch.arange(128, device=x.device), x.shape[1:], x)

        runs = {
            'ours': lambda i: train.train_epoch(model, adversary, optimizer, x, y, c, 0, [], bar),
            'attack': lambda i: adversary(x, y, c.eps, c.step_size, seed=1), 'peak': peak(b)}
        if b.release:
            theirs = released(b, name, c.width, before)
            with quiet():
                pgd = b.release.attack.PGD(c.step_size, c.eps, c.n_iter)
            their_optimizer = train.optimizer_of(theirs, c)
            loss = torch.nn.CrossEntropyLoss()
            images = x.contiguous()

            def their_step(i):
                theirs.eval()
                x_adv, labels = pgd.attack(theirs, their_optimizer, images, y, loss)
                theirs.train()
                value = loss(theirs(x_adv), labels)
                their_optimizer.zero_grad()
                value.backward()
                their_optimizer.step()
                their_optimizer.zero_grad()
                return value.item()
            runs['theirs'] = their_step
            # the same start for both: then PGD must end at the same loss
            with mock.patch('torch.rand', lambda *shape, **rest: noise):
                x_theirs = pgd.attack(theirs.eval(), their_optimizer, images, y, loss)[0]
            x_ours = adversary(x, y, c.eps, c.step_size, seed=1)
            clean, a, z = (attack.mean_loss(net, images, y)[0] for net, images in (
                (model, x), (model, x_ours), (theirs, x_theirs)))
        seconds, results = alternate(b, runs)
        shared = dict(amount=128)
        if b.release:
            shared |= dict(peer='release', theirs=seconds['theirs'],
                           same=abs(a - z) <= .01 * (z - clean) > 1e-4,
                           check=f'loss {clean:.4f}, PGD {a:.5f} {z:.5f}')
        row(b, f'step of {name}', 'images/s', seconds['ours'], **shared)
        with FlopCounterMode(display=False) as counter, models.frozen(model):
            model(x)
        flops = 2 * c.n_iter * counter.get_total_flops() / 1e9  # forward and gradient for x
        shares = [flops / t / best for t, best in zip(seconds['attack'], results['peak'])]
        row(b, f'attack of {name}', 'GFLOP/s', seconds['attack'], flops,
            share=statistics.median(shares),
            check=f'{statistics.median(shares):.0%} of the peak '
                  f'{statistics.median(results["peak"]):.0f}')


def trained(b):
    """A LeNet, which some half of the images fool, and its settings; trained if there is none yet.

    Also the network that peers attack: the same, as the release writes it, where that is at hand.
    """
    folder = pathlib.Path(b.args.run)
    if not (folder / 'config.json').exists() or not record.finished(folder):
        print(f'training {folder} ...', flush=True)
        with quiet():
            train.main(['--dataset', 'mnist5k', '--data-dir', b.args.data_dir, '--width', '4',
                        '--eps-sched', 'linear', '--epochs', '15', '--step-size', '0.05',
                        '--n-iter', '10', '--lr', '3e-3', '--n-eval', '100', '--device',
                        str(b.device), '--out', str(folder)] + ['--wait'] * b.args.wait)
    path, config = record.members(folder)[-1]
    model = record.rebuild(path, config).to(b.device)
    theirs = copy.deepcopy(model).eval()
    if b.release and config['model'] == 'lenet':
        theirs = released(b, 'lenet', config['width'], model.state_dict())
    return model, theirs, config


def released(b, name, width, parameters):
    """The network `name` as the release writes it, with these parameters, a state_dict."""
    with quiet():
        net = getattr(b.release.models, CLASSES[name])(width=width).to(b.device)
    net.load_state_dict(parameters)
    return net.eval()


def attacks(b):
    """Seconds to evaluate --n test images with each attack: all in each round, Square some of them.

    Square, the longest by far, makes as many queries of an image whatever it is batched with.
    """
    model, theirs, config = trained(b)
    network, eps = models.folded(model), config['eps']
    _, _, x, y = data.load_once(config['dataset'], b.args.data_dir, b.device)
    images = x[:b.args.n], y[:b.args.n], torch.arange(b.args.n)
    others = peers(b, theirs, eps)

    def errors_of(who, network, run, part):
        standing = attack.correct(network, *part[:2])
        if not standing.any():
            return len(standing)
        x, y, index = (tensor[standing.to(tensor.device)] for tensor in part)
        x_adv = run(x, y, index)
        off = (x_adv - x).abs().max().item(), x_adv.min().item(), x_adv.max().item()
        inside[who] = inside.get(who, True) and (
            off[0] <= eps + 1e-6 and off[1] >= 0 and off[2] <= 1)
        return len(standing) - attack.correct(network, x_adv, y).sum().item()

    for key in b.args.attacks:
        inside, rounds = {}, b.args.rounds
        n_parts = rounds if key == 'square5k' else 1
        parts = rounds // n_parts * list(zip(*(t.tensor_split(n_parts) for t in images)))

        def ours(x, y, index):
            return OURS[key](network, x, y, eps, index=index)

        def of(who, peer):
            return lambda i: errors_of(who, theirs, lambda x, y, _: peer(key, x, y), parts[i])

        runs = {'ours': lambda i: errors_of('ours', network, ours, parts[i])}
        runs |= {name: of(name, peer) for name, peer in others.items()}
        seconds, errors = alternate(b, runs, warm=False)
        total = sum(len(part[1]) for part in parts)
        errors = {name: 100 * sum(found) / total for name, found in errors.items()}
        for name in others or ['']:
            row(b, key, f's per {b.args.n} images', [n_parts * t for t in seconds['ours']],
                peer=name, theirs=[n_parts * t for t in seconds[name]] if name else None,
                same=not name or inside['ours'] and inside[name] and (
                    -max(.5, 100 / b.args.n) <= errors['ours'] - errors[name] <= 2),
                check='robust error ' + ' '.join(
                    f'{errors[who]:.2f} %' for who in ('ours', name) if who))


OURS = {key: attack.ATTACKS[key] for key in ('apgd100_ce', 'apgd100_dlr', 'square5k')}


def peers(b, model, eps):
    """name -> (key, x, y) -> x_adv of the peers at hand, at the settings of Table 1."""
    found = {}
    with contextlib.suppress(ImportError):
        from autoattack import AutoAttack

        def autoattack(key, x, y):
            kind = {'apgd100_ce': 'apgd-ce', 'apgd100_dlr': 'apgd-dlr', 'square5k': 'square'}[key]
            attacker = AutoAttack(model, norm='Linf', eps=eps, version='custom', seed=0,
                                  attacks_to_run=[kind], device=str(b.device), verbose=False)
            attacker.apgd.n_restarts, attacker.apgd.n_iter = 5, 100
            attacker.square.n_queries, attacker.square.p_init = 5000, .8
            attacker.square.n_restarts, attacker.square.resc_schedule = 1, False
            with quiet():
                return attacker.run_standard_evaluation(x, y, bs=250)
        found['AutoAttack'] = autoattack
    with contextlib.suppress(ImportError):
        import torchattacks

        def torch_attacks(key, x, y):
            if key == 'square5k':
                attacker = torchattacks.Square(model, eps=eps, n_queries=5000, n_restarts=1,
                                               p_init=.8, loss='margin', resc_schedule=False)
            else:
                attacker = torchattacks.APGD(model, eps=eps, steps=100, n_restarts=5, rho=.75,
                                             loss=key.removeprefix('apgd100_'))
            return torch.cat([attacker(*part) for part in zip(x.split(250), y.split(250))])
        found['torchattacks'] = torch_attacks
    return found


def curvature(b):
    """Hessian products, and the top 20, of a LeNet of width 16 on adversarial digits."""
    n, k = b.args.hessian_n, 20
    torch.manual_seed(0)
    x, y = (tensor[:n] for tensor in
            data.load_once(b.args.hessian_data, b.args.data_dir, b.device)[:2])
    if len(x) < n:
        raise ValueError(f'--hessian-n {n}: {b.args.hessian_data} has {len(x)} training images')
    model = models.build('lenet', 'mnist', 16).to(b.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(60):  # away from the initialiser; any point will do
        rows = torch.randint(n, (128,), device=b.device)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    x = attack.pgd(models.folded(model), x, y, .1, .02, 10)
    dim = sum(p.numel() for p in model.parameters())
    chunk = max(size for size in range(1, 251) if n % size == 0)  # the release drops a rest
    H = hessian.Hessian(model, x, y, chunk)
    chunks, loss = list(zip(x.split(chunk), y.split(chunk))), torch.nn.CrossEntropyLoss()
    v = hessian.analysis.random_unit(dim, x.new_zeros(()), 0)
    runs, theirs = {'ours': lambda i: v @ H(v)}, {}
    if b.release:
        net = released(b, 'lenet', 16, model.state_dict())

        def power(topk, iterations):
            with quiet():
                return b.release.hessian.calc_hessian_eigen_full_dataset(
                    net, chunks, loss, {}, None, b.device.type == 'cuda', topk=topk,
                    max_iter=iterations, tol=1e-3)

        def product(i):
            torch.manual_seed(0)
            return power(1, 1)[0][0]
        torch.manual_seed(0)  # its direction
        u = torch.cat([torch.randn(p.shape).flatten() for p in model.parameters()]).to(x)
        u /= u.double().norm()
        theirs['release'] = product, lambda: u @ H(u)
    with contextlib.suppress(ImportError):
        from pyhessian import hessian as PyHessian
        parts = hessian.analysis.unflat(v, list(model.parameters()))
        peer = PyHessian(copy.deepcopy(model), loss, dataloader=chunks,
                         cuda=b.device.type == 'cuda')
        theirs['PyHessian'] = lambda i: peer.dataloader_hv_product(parts)[0], lambda: v @ H(v)
    seconds, results = alternate(b, runs | {name: run for name, (run, _) in theirs.items()})
    for name in theirs or ['']:
        a, z = (theirs[name][1]().item(), float(results[name][-1])) if name else (0, 0)
        row(b, 'Hessian', f'further products/s, n {n}', seconds['ours'], 1, peer=name,
            theirs=seconds[name] if name else None, same=abs(a - z) <= 1e-3 * abs(z),
            check=f"v'Hv {a:.5g} {z:.5g}" if name else '')

    def top(solver):
        calls = []

        def run(i):
            calls.clear()
            fresh = hessian.Hessian(model, x, y, chunk)
            return hessian.SOLVERS[solver](lambda v: calls.append(1) or fresh(v), dim, k,
                                           like=x.new_zeros(()), max_products=5000 if (
                                               solver == 'power') else None), len(calls)
        return run

    def their_top(i):
        values, vectors = power(k, 50)
        vectors = [hessian.analysis.flat([torch.from_numpy(p) for p in vector]).to(x)
                   if not torch.is_tensor(vector[0]) else hessian.analysis.flat(vector)
                   for vector in vectors]
        return values, vectors

    seconds, results = alternate(b, {'ours': top('lanczos')}, warm=False)
    (values, _, residuals), products = results['ours'][0]
    made = f'{products} products, residuals <= {residuals.max():.0e}'
    row(b, f'top {k}', f's, n {n}', seconds['ours'], check=made)
    if b.release and b.args.slow:
        took, (found, vectors) = clock(lambda: their_top(0), b.device)
        left = max(((H(w) - value * w).norm() / abs(value)).item()
                   for value, w in zip(found, vectors))
        apart = max(abs(a - z) / abs(a) for a, z in zip(values.tolist()[:5], found))
        row(b, f'top {k}', f's, n {n}', seconds['ours'], peer='release, once',
            theirs=[took] * len(seconds['ours']),
            same=apart < .01,
            check=f'top 5 within {apart:.1%}; residuals <= {residuals.max():.0e}, {left:.0e}')
    if b.args.slow:
        took, ((found, _, left), products) = clock(lambda: top('power')(0), b.device)
        apart = ((found - values).abs() / values.abs()).max().item()
        row(b, f'top {k}', f's, n {n}', seconds['ours'], peer=f'power, {products} products, once',
            theirs=[took] * len(seconds['ours']), same=apart < .01,
            check=f'all {k} within {apart:.1%}; residuals <= {left.max():.0e}')


PARTS = {'peak': measure_peak, 'step': step, 'attacks': attacks, 'hessian': curvature}


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, record.number(int, 1)
    add('--release', metavar='DIR', help="a checkout of the authors' release; default: without it")
    add('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='default: all')
    add('--rounds', type=record.number(int, 5), default=5, help='at least 5; default: 5')
    add('--n', type=record.number(int, 50, 1000), default=1000,
        help='test images for the attacks; default: 1000')
    add('--attacks', nargs='+', choices=OURS, default=list(OURS), help='default: all')
    add('--run', default='evals/bench',
        help='the run whose last model is attacked, trained if there is none; default: evals/bench')
    add('--hessian-n', type=count, default=100, help='images of the Hessian; default: 100')
    add('--hessian-data', choices=('mnist', 'mnist5k'), default='mnist5k',
        help='where they are from; default: mnist5k')
    add('--slow', action='store_true', help="the top 20 by the release's command, and by power "
        'iteration to 1e-3, once each: some 3,000 products')
    record.add_machine_flags(parser)
    args = parser.parse_args(argv)
    if args.rounds > args.n:
        parser.error(f'--rounds {args.rounds} leaves some without an image of --n {args.n}')
    return args


if __name__ == '__main__':
    record.run(main, 'what was measured stands above')

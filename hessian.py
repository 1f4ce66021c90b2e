"""Top eigenpairs of the Hessian of the adversarial loss (Figure 3), its trace and its spectrum.

`python hessian.py RUN --k 20` makes adversarial examples of the run's training images once, holds
them fixed and takes the Hessian of their mean cross-entropy with respect to all parameters. It
writes RUN/hessian*.json and, with the eigenvectors, RUN/hessian*.pt. Re-running it resumes it.
"""

import argparse
import copy
import functools
import statistics
import time

import pandas as pd
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

import analysis
import cli
import data
import distributed
import fast
import record
import rng
from classifier import NotFiniteError, frozen, logits_of, mean_loss
from eigen import density, power_iteration, top_eigenpairs, trace


def hvp(model, x, y, v, batch_size=250):
    """H v, (dim,): H is the Hessian of the mean cross-entropy of `model`, in eval mode, on (x, y).

    v, (dim,), is in the order of model.parameters(). `batch_size` images are differentiated at a
    time, so that memory does not depend on their number. The model is left as it was.
    """
    return Hessian(model, x, y, batch_size, keep=0)(v)


class Hessian:
    """`hvp` for many products: hessian(v) is H v, bit for bit.

    A product differentiates the gradient, whose graph does not depend on v. Graphs are kept for as
    many batches as fit into `keep` bytes, which saves 2/5 of the time of further products; the
    model, x and y must not change between them.
    """

    def __init__(self, model, x, y, batch_size=250, keep=4 * 2**30):
        self.model, self.n = model, len(x)
        self.graphs = {}
        self.room = keep // distributed.SIZE
        x, y = (tensor[distributed.own()] for tensor in (x, y))
        self.batches = list(zip(x.split(batch_size), y.split(batch_size)))

    def __call__(self, v):
        total = torch.zeros_like(v)
        for i, batch in enumerate(self.batches):
            gradient, theta, size = self.graphs.get(i) or self.gradient(*batch)
            if i not in self.graphs and size <= self.room:
                self.graphs[i] = gradient, theta, size
                self.room -= size
            # of a parameter that the loss does not use, or is linear in, the gradient is constant
            pairs = zip(gradient, analysis.unflat(v, theta))
            pairs = [(output, part) for output, part in pairs if output.requires_grad]
            if pairs:
                outputs, parts = zip(*pairs)
                options = {'retain_graph': i in self.graphs, 'materialize_grads': True}
                total += analysis.flat(torch.autograd.grad(outputs, theta, parts, **options))
        distributed.total(total)
        if not total.isfinite().all():
            raise NotFiniteError('the Hessian of the loss is not finite')
        return total

    def gradient(self, x, y):
        """A batch's part of the gradient, the parameters, and the bytes that its graph holds."""
        theta = {name: p.detach().requires_grad_() for name, p in self.model.named_parameters()}
        saved, versions = {}, []

        def note(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            versions.append((tensor, tensor._version))
            return tensor

        with frozen(self.model), saved_tensors_hooks(note, lambda tensor: tensor):
            logits = logits_of(lambda x: functional_call(self.model, theta, (x,)), x)
            loss = F.cross_entropy(logits, y, reduction='sum') / self.n
            theta = list(theta.values())
            gradient = torch.autograd.grad(loss, theta, create_graph=True, materialize_grads=True)
        # autograd does not check this where there are hooks
        if any(tensor._version != version for tensor, version in versions):
            raise ValueError('the model changes in place what its gradient is computed from')
        return gradient, theta, sum(saved.values())


SOLVERS = {'lanczos': top_eigenpairs, 'power': power_iteration}


def loss_normalizer(run, seed):
    """L_eps of a freshly initialised network, on at most 500 of the images and with BatchNorm
    statistics recomputed; the paper normalises by its mean over seeds."""
    rows = data.subset(len(run.x), min(len(run.x), 500))
    x, y = run.x[rows], run.y[rows]
    pgd = functools.partial(run.pgd, index=run.index[rows], seed=seed)
    model = copy.deepcopy(run.model).cpu()  # the same draws on any device
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
    model.to(x)
    analysis.recompute_bn(model, x, y, pgd)
    x_adv = pgd(fast.folded(model, x[:8]), x, y)
    return mean_loss(model, x_adv, y)[0]


def analyze(run, args):
    """Computes the missing parts of the run's result, prints it and returns its path."""
    stem = 'hessian_power' if args.solver == 'power' else 'hessian'
    path = analysis.output(run.folder, stem, args)
    dim, like = sum(p.numel() for p in run.model.parameters()), run.x.new_zeros(())
    if args.k > min(dim, args.max_products):
        raise ValueError(f'--k {args.k}: {dim:,} parameters, {args.max_products} products at most')
    eps = data.show_eps(run.eps, run.metadata['dataset'])
    print(f'{path}: {dim:,} parameters, {len(run.x):,} images, eps {eps}', flush=True)
    total = args.max_products + args.trace + 50 * args.density
    with record.lock(run.folder), cli.bar(' products at most', total) as bar:
        result = analysis.resume(path, run.metadata | {'dim': dim}, args.device)

        @functools.cache
        def H():  # made once, and only if a part is missing
            x_adv = run.pgd(fast.folded(run.model, run.x[:8]), run.x, run.y, seed=args.seed)
            loss, error = mean_loss(run.model, x_adv, run.y, args.batch_size)
            result.update(loss=loss, robust_error=error)
            return Hessian(run.model, x_adv, run.y, args.batch_size)

        def matvec(v):
            bar.update()
            return H()(v)

        if not has_pairs(result, args):
            H()  # its time is not the solver's
            began = time.monotonic()
            options = {'tol': args.tol, 'max_products': args.max_products}
            found = SOLVERS[args.solver](matvec, dim, args.k, like=like, seed=args.seed, **options)
            values, vectors, residuals, converged = found
            eigen = {'values': values.tolist(), 'residuals': residuals.tolist()}
            eigen |= {'converged': converged.tolist(), 'solver': args.solver, 'k': args.k}
            eigen |= options | {'products': bar.n, 'seconds': round(time.monotonic() - began, 1)}
            result['eigen'] = eigen
            record.save(path.with_suffix('.pt'), {'vectors': vectors.cpu()})
            record.save(path, result)
        for part, n, draw in (
            ('random_losses', args.draws, functools.partial(loss_normalizer, run)),
            ('traces', args.trace, functools.partial(trace, matvec, dim, like=like)),
            ('densities', args.density, functools.partial(density, matvec, dim, like=like)),
        ):
            drawn = result.setdefault(part, [])
            for i in range(len(drawn), n):
                drawn.append(draw(seed=rng.fold_in(args.seed, i)))
                record.save(path, result)
        result['complete'] = True
        record.save(path, result)
    show(result)
    return path


def has_pairs(result, args):
    """Whether the result has the eigenpairs that are asked for, or has looked for them long enough:
    with as many products."""
    eigen = result.get('eigen', {'k': 0})
    if eigen['k'] < args.k or eigen['tol'] > args.tol:
        return False
    return all(eigen['converged']) or eigen['max_products'] >= args.max_products


def show(result):
    """Prints the result."""
    eigen, scale = result['eigen'], statistics.mean(result['random_losses'])
    table = pd.DataFrame({key: eigen[key] for key in ('values', 'residuals', 'converged')})
    print(table.assign(normalized=table['values'] / scale).to_string(float_format='{:.4g}'.format))
    print(f'{eigen["products"]} products; L_eps {result["loss"]:.4g}, of random thetas {scale:.4g}')
    if result['traces']:
        traces = pd.Series(result['traces'])
        print(f'trace {traces.mean():.5g} +- {traces.sem():.2g}')
    if not table['converged'].all():
        print('pairs that have not converged are not eigenpairs; raise --max-products')


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add('run', help='run folder (its last model) or checkpoint')
    add('--k', type=cli.count, default=20, help='number of eigenpairs')
    add('--solver', choices=SOLVERS, default='lanczos', help="power: the paper's, 15 x the cost")
    add('--tol', type=float, default=1e-3, help='relative residual at which a pair has converged')
    add('--max-products', type=cli.count, help='lanczos keeps a vector for each; 15 k, power: 50 k')
    add('--draws', type=cli.count, default=10, help='random thetas whose mean L_eps normalises')
    add('--trace', type=int, default=0, metavar='PROBES', help='of Hutchinson, a product each')
    add('--density', type=int, default=0, metavar='PROBES', help='of Lanczos, 50 products each')
    analysis.add_flags(parser)
    args = parser.parse_args(argv)
    args.max_products = args.max_products or (50 if args.solver == 'power' else 15) * args.k
    return args


def main(argv=None):
    args = parse(argv)
    with fast.tf32(False):
        return analyze(analysis.load_run(args.run, args), args)


if __name__ == '__main__':
    cli.run(main)

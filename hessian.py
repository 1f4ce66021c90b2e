"""Top eigenpairs of the Hessian of the adversarial loss (Figure 3), its trace and its spectrum.

`python hessian.py RUN --k 20` makes adversarial examples of the run's training images once, holds
them fixed and takes the Hessian of their mean cross-entropy with respect to all parameters. It
writes RUN/hessian*.json and, with the eigenvectors, RUN/hessian*.pt. Re-running it resumes it.
"""

import argparse
import copy
import functools
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

import data
from lib import analysis, cli, distributed, fast, record, rng
from lib.classifier import NotFiniteError, flat, frozen, logits_of, mean_loss, norm, unflat

F32 = torch.zeros(())


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
            pairs = zip(gradient, unflat(v, theta))
            pairs = [(output, part) for output, part in pairs if output.requires_grad]
            if pairs:
                outputs, parts = zip(*pairs)
                options = {'retain_graph': i in self.graphs, 'materialize_grads': True}
                total += flat(torch.autograd.grad(outputs, theta, parts, **options))
        distributed.total(total)
        if not total.isfinite().all():
            raise NotFiniteError('the Hessian of the loss is not finite')
        return total

    def gradient(self, x, y):
        """A batch's part of the gradient, the parameters, and the bytes that its graph holds."""
        theta = {name: p.detach().requires_grad_() for name, p in self.model.named_parameters()}
        saved, versions = {}, []

        def measure(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            versions.append((tensor, tensor._version))
            return tensor

        with frozen(self.model), saved_tensors_hooks(measure, lambda tensor: tensor):
            logits = logits_of(lambda x: functional_call(self.model, theta, (x,)), x)
            loss = F.cross_entropy(logits, y, reduction='sum') / self.n
            theta = list(theta.values())
            gradient = torch.autograd.grad(loss, theta, create_graph=True, materialize_grads=True)
        # autograd does not check this where there are hooks
        if any(tensor._version != version for tensor, version in versions):
            raise ValueError('the model changes in place what its gradient is computed from')
        return gradient, theta, sum(saved.values())


def top_eigenpairs(matvec, dim, k, *, tol=1e-3, max_products=None, like=F32, seed=0):
    """The k eigenpairs largest in magnitude of the symmetric matrix v -> matvec(v), (dim,).

    Returns eigenvalues, (k,), largest magnitude first; orthonormal eigenvectors, (k, dim), whose
    largest entries are positive; bounds on the residuals ||H v - lambda v|| / |lambda|, (k,); and
    which pairs have converged, (k,): those with a bound of at most `tol`, or a zero eigenvalue but
    for rounding. It ends when all have, or after `max_products`, 15 k unless given, all in memory.

    Lanczos' method may miss copies of a multiple eigenvalue. Hence when all pairs have converged,
    six products start from a new random direction: if a copy appears, the search goes on.
    """
    steps = min(dim, max_products or 15 * k)
    space = Krylov(matvec, rng.unit_vector(dim, like, seed, 0), steps, seed)
    while space.size < steps:
        space.step()
        values, S, norms = space.ritz(k)
        if space.size == steps or converged(values, norms, tol, like.dtype).sum() < k:
            continue
        before = values
        space.remainders.append((0, torch.zeros_like(space.V[0])))  # a random direction follows
        for _ in range(min(6, steps - space.size)):
            space.step(-1)
        values, S, norms = space.ritz(k)
        all_found = torch.allclose(values, before, tol, rounding(values, like.dtype))
        if all_found and converged(values, norms, tol, like.dtype).all():
            break
    return summary(values, S.to(like) @ space.V[: space.size], norms, tol)


def power_iteration(matvec, dim, k, *, tol=1e-3, max_products=None, like=F32, seed=0):
    """As `top_eigenpairs`, by the paper's method: power iteration with deflation, pair by pair.

    A pair takes at most max_products / k products, 50 unless given, as in the paper's code. At the
    end the best approximations within the span of all are returned (Rayleigh-Ritz).
    """
    n_iter = (max_products or 50 * k) // k
    V, HV = like.new_empty(2, k, dim)
    values, norms = torch.zeros(2, k).double()
    for i in range(k):
        q = rng.unit_vector(dim, like, seed, i)
        for _ in range(n_iter):
            for _ in range(2):  # the second time removes rounding errors
                q, _ = project_out(q, V[:i])
                q = q / norm(q)
            V[i] = q
            HV[i] = q = matvec(q)
            residual, coefficients = project_out(q, V[: i + 1])
            values[i], norms[i] = coefficients[i], norm(residual)
            if converged(values[: i + 1], norms[: i + 1], tol, like.dtype)[i]:
                break
    T = torch.stack([project_out(row, V)[1] for row in HV])
    values, S = torch.linalg.eigh((T + T.T) / 2)
    order = values.abs().argsort(descending=True)
    values, S = values[order], S[:, order].T.to(like)
    residuals = S @ HV - values.to(like)[:, None] * (S @ V)
    norms = residuals.norm(dim=1, dtype=torch.float64).cpu()
    return summary(values, S @ V, norms, tol)


def trace(matvec, dim, *, like=F32, seed=0):
    """Hutchinson's estimate z' H z of the trace, by one random vector z of +-1 and one product."""
    z = rng.rademacher(dim, like, seed)
    return (z * matvec(z)).double().sum().item()


def density(matvec, dim, steps=50, *, like=F32, seed=0):
    """An estimate of the spectral density by stochastic Lanczos quadrature (Ghorbani et al. 2019).

    Returns nodes and weights, (steps,) each, the weights of sum 1: sum_i w_i f(node_i) estimates
    the mean of f over the eigenvalues, without bias for polynomials f of degree below 2 steps.
    """
    start = rng.rademacher(dim, like, seed)
    space = Krylov(matvec, start, min(dim, steps), seed)
    while space.size < len(space.V):
        space.step()
    nodes, S = torch.linalg.eigh(space.T)
    return nodes.tolist(), (S[0] ** 2).tolist()


class Krylov:
    """An orthonormal basis V, (steps, dim), of a Krylov space of a symmetric matrix H; T = V H V'.

    Lanczos' method with full orthogonalisation, one product a step. `remainders` are pairs (index
    of a basis vector, the part of its product outside of the basis). They become the next basis
    vectors; the residuals of Ritz pairs follow from them without further products.
    """

    def __init__(self, matvec, start, steps, seed):
        self.matvec, self.seed = matvec, seed
        self.V = start.new_empty(steps, len(start))
        self.T = torch.zeros(steps, steps).double()
        self.size, self.remainders = 0, [(0, start)]

    def step(self, which=0):
        """Adds a remainder, the oldest unless said, to the basis; if it is 0, a random direction
        outside of the basis."""
        _, q = self.remainders.pop(which)
        if norm(q) <= rounding(self.T, q.dtype):
            q, _ = self.orthogonalize(rng.unit_vector(len(q), q, self.seed, 1, self.size))
        v = self.V[self.size] = q / norm(q)
        self.remainders = [(i, r - (v * r).sum() * v) for i, r in self.remainders]
        self.size += 1
        q, t = self.orthogonalize(self.matvec(v), max(0, self.size - len(self.remainders) - 2))
        self.T[self.size - 1, : self.size] = self.T[: self.size, self.size - 1] = t
        self.remainders.append((self.size - 1, q))

    def orthogonalize(self, q, first=0):
        """q without its part in the basis, and the coefficients of that part, (size,). Where only
        those from `first` on exceed rounding errors, these are taken off first: then one pass over
        the whole basis mostly suffices."""
        coefficients = torch.zeros(self.size).double()
        if first > 0:
            q, coefficients[first:] = project_out(q, self.V[first : self.size])
        for _ in range(3):
            before = norm(q)
            q, part = project_out(q, self.V[: self.size])
            coefficients += part
            if norm(q) > 0.7 * before:  # else rounding errors of what was taken off may matter
                break
        return q, coefficients

    def ritz(self, k):
        """The k Ritz values largest in magnitude, (k,), their vectors in the basis, (k, size), and
        bounds on the norms of their residuals, (k,), exact if there is one remainder."""
        values, S = torch.linalg.eigh(self.T[: self.size, : self.size])
        order = values.abs().argsort(descending=True)[:k]
        norms = sum(S[i, order].abs() * norm(q).item() for i, q in self.remainders)
        return values[order], S[:, order].T, norms.clamp(min=rounding(values, self.V.dtype))


def summary(values, vectors, norms, tol):
    """What a solver returns, from eigenpairs and the norms of their residuals."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    residuals = norms / values.abs().clamp(min=1e-30)
    good = converged(values, norms, tol, vectors.dtype)
    return values, torch.where(largest < 0, -vectors, vectors), residuals, good


def converged(values, norms, tol, dtype):
    """Which eigenpairs have residuals of at most `tol`, or are zero within rounding."""
    floor, magnitudes = rounding(values, dtype), values.abs()
    return norms <= torch.where(magnitudes <= floor, floor, tol * magnitudes)


def rounding(values, dtype):
    """A bound on the error of products of a matrix with these eigenvalues; measured: 40 eps."""
    return 64 * torch.finfo(dtype).eps * values.abs().max().item()


def project_out(q, V, part=2**14):
    """q without its part in the span of the orthonormal V, (rows, dim), and the coefficients of
    that part, V q, (rows,), double: float32 sums of millions of products would be off by 2e-4."""
    products = [V[:, i : i + part] @ q[i : i + part] for i in range(0, len(q), part)]
    coefficients = sum(product.double() for product in products)
    return q - V.T @ coefficients.to(q), coefficients.cpu()


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
    """Computes what the run's result lacks, prints it and returns its path."""
    stem = 'hessian_power' if args.solver == 'power' else 'hessian'
    path = record.output(run.folder, stem, args, run.defaults)
    dim = sum(p.numel() for p in run.model.parameters())
    if args.k > min(dim, args.max_products):
        raise ValueError(f'--k {args.k}: {dim:,} parameters, {args.max_products} products at most')
    eps = data.show_eps(run.eps, run.metadata['dataset'])
    print(f'{path}: {dim:,} parameters, {len(run.x):,} images, eps {eps}', flush=True)
    with record.lock(run.folder):
        result = {'random_losses': [], 'traces': [], 'densities': []}
        result |= record.resume(path, run.metadata | {'dim': dim}, args.device)
        n_pairs = result.get('eigen', {'k': 0})['k']
        if args.k < n_pairs and not has_pairs(result, path, args):
            raise ValueError(f'--k {args.k} would replace {n_pairs} pairs in {path}; raise --k')
        if not has_pairs(result, path, args) or missing(result, args):
            complete(result, path, run, args)
    show(result)
    return path


def has_pairs(result, path, args):
    """Whether the result has the eigenpairs that are asked for, and the .pt file their vectors.
    Pairs that have not converged count if they were allowed as many products."""
    eigen = result.get('eigen', {'k': 0})
    if eigen['k'] < args.k or eigen['tol'] > args.tol or not path.with_suffix('.pt').exists():
        return False
    return all(eigen['converged']) or eigen['max_products'] >= args.max_products


def missing(result, args):
    """The draws that are asked for and not in the result: pairs (list in the result, seed)."""
    wanted = {'random_losses': args.draws, 'traces': args.trace, 'densities': args.density}
    draws = [(name, i) for name, n in wanted.items() for i in range(len(result[name]), n)]
    return [(name, rng.fold_in(args.seed, i)) for name, i in draws]


def complete(result, path, run, args):
    """Adds to the result, part by part, what it lacks of what is asked for, and saves it."""
    x_adv = run.pgd(fast.folded(run.model, run.x[:8]), run.x, run.y, seed=args.seed)
    result['loss'], result['robust_error'] = mean_loss(run.model, x_adv, run.y, args.batch_size)
    H = Hessian(run.model, x_adv, run.y, args.batch_size)
    dim, like = result['dim'], run.x.new_zeros(())
    with cli.bar(' products at most', args.max_products + args.trace + 50 * args.density) as bar:

        def matvec(v):
            bar.update()
            return H(v)

        if not has_pairs(result, path, args):
            result['eigen'], vectors = solve(matvec, dim, like, args)
            result['eigen']['products'] = bar.n
            record.save(path.with_suffix('.pt'), {'vectors': vectors.cpu()})
            record.save(path, result)
        draw = {
            'random_losses': functools.partial(loss_normalizer, run),
            'traces': functools.partial(trace, matvec, dim, like=like),
            'densities': functools.partial(density, matvec, dim, like=like),
        }
        for name, seed in missing(result, args):
            result[name].append(draw[name](seed=seed))
            record.save(path, result)
    result['complete'] = True
    record.save(path, result)


def solve(matvec, dim, like, args):
    """What the result says of the eigenpairs that are asked for, and the eigenvectors."""
    began = time.monotonic()
    options = {'tol': args.tol, 'max_products': args.max_products}
    solver = functools.partial(SOLVERS[args.solver], like=like, seed=args.seed, **options)
    values, vectors, residuals, good = solver(matvec, dim, args.k)
    pairs = {'values': values.tolist(), 'residuals': residuals.tolist(), 'converged': good.tolist()}
    seconds = round(time.monotonic() - began, 1)
    return pairs | options | {'solver': args.solver, 'k': args.k, 'seconds': seconds}, vectors


def show(result):
    """Prints the result."""
    eigen, scale = result['eigen'], statistics.mean(result['random_losses'])
    print('eigenvalue  normalized  residual  converged')
    for value, residual, good in zip(eigen['values'], eigen['residuals'], eigen['converged']):
        print(f'{value:10.4g}  {value / scale:10.4g}  {residual:8.2g}  {"yes" if good else "no"}')
    print(f'{eigen["products"]} products; L_eps {result["loss"]:.4g}, of random thetas {scale:.4g}')
    if traces := result['traces']:
        error = statistics.stdev(traces) / len(traces) ** 0.5 if len(traces) > 1 else math.nan
        print(f'trace {statistics.mean(traces):.5g} +- {error:.2g}')
    if not all(eigen['converged']):
        print('pairs that have not converged are not eigenpairs; raise --max-products')


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add('run', help='run folder (its last model) or checkpoint')
    add('--k', type=cli.count, default=20, help='number of eigenpairs')
    add('--solver', choices=SOLVERS, default='lanczos', help="power: the paper's, 15 x the cost")
    add(
        '--tol',
        type=cli.number(0),
        default=1e-3,
        help='relative residual at which a pair has converged',
    )
    add('--max-products', type=cli.count, help='lanczos keeps a vector for each; 15 k, power: 50 k')
    add('--draws', type=cli.count, default=10, help='random thetas whose mean L_eps normalises')
    add(
        '--trace',
        type=cli.whole(0),
        default=0,
        metavar='PROBES',
        help='of Hutchinson, a product each',
    )
    add(
        '--density',
        type=cli.whole(0),
        default=0,
        metavar='PROBES',
        help='of Lanczos, 50 products each',
    )
    cli.add_flags(parser)
    args = parser.parse_args(argv)
    args.max_products = args.max_products or (50 if args.solver == 'power' else 15) * args.k
    return args


def main(argv=None):
    args = parse(argv)
    with fast.tf32(False):
        return analyze(analysis.load_run(args.run, args), args)


if __name__ == '__main__':
    cli.run(main)

"""Top eigenpairs of the Hessian of the adversarial loss (Figure 3), its trace and its spectrum.

`python hessian.py RUN --k 20` makes adversarial examples of the run's training images once, holds
them fixed and takes the Hessian of their mean cross-entropy with respect to all parameters. It
writes RUN/hessian.json, a figure, and the eigenvectors into RUN/hessian.pt. An interrupted
computation goes on from what it kept last.
"""
import argparse
import copy
import functools
import math
import statistics
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.func import functional_call

import analysis
import attack
import data
import models
import record


def hvp(model, x, y, v, batch_size=250):
    """H v, (dim,): H is the Hessian of the mean cross-entropy of `model`, in eval mode, on (x, y).

    v, (dim,), follows model.parameters(). Chunks of `batch_size` images are summed, so memory does
    not depend on the number of images, nor the result, but for rounding, on the chunks. The model
    is left as found: modes, statistics and gradients.
    """
    return Hessian(model, x, y, batch_size, memory=0)(v)


class Hessian:
    """The matrix of `hvp` for many products: hessian(v) is H v.

    A product differentiates the gradient, whose graph does not depend on v. So these graphs are
    kept from the first product on, for as many chunks as `memory` bytes hold (unless given, half of
    what is free, at most 4 GiB on a CPU): a further product takes some 3/5 of the time, and has the
    same result. Where parameters or statistics of the model change, graphs are made anew; x and y
    must stay as they are.
    """

    def __init__(self, model, x, y, batch_size=250, memory=None):
        self.model, self.n, self.made_of = model, len(x), None
        self.chunks = list(zip(x.split(batch_size), y.split(batch_size)))
        if memory is None:
            memory = min(models.memory(x.device)[0] // 2, math.inf if x.is_cuda else 4 * 2 ** 30)
        self.memory = memory

    def __call__(self, v):
        total, state = torch.zeros_like(v), self.state()
        if state != self.made_of:
            self.made_of, self.kept, self.room = state, [], self.memory
        for i, chunk in enumerate(self.chunks):
            if i < len(self.kept):
                gradient, theta = self.kept[i]
            else:
                gradient, theta, size = self.gradient(*chunk)
                if i == len(self.kept) and size <= self.room:
                    self.kept.append((gradient, theta))
                    self.room -= size
            total += analysis.flat(torch.autograd.grad(
                gradient, theta, analysis.unflat(v, gradient), retain_graph=i < len(self.kept),
                materialize_grads=True))
        if not total.isfinite().all():
            raise attack.NotFiniteError('the Hessian of the loss is not finite')
        return total

    def state(self):
        """Sums by which parameters and buffers are known; versions miss fused optimizers."""
        tensors = [t.detach().double() for t in (*self.model.parameters(), *self.model.buffers())]
        return torch.stack([f(t) for t in tensors for f in (torch.sum, torch.norm)]).tolist()

    def gradient(self, x, y):
        """A chunk's part of the gradient, the parameters, and the bytes that its graph holds."""
        theta = {name: p.detach().requires_grad_() for name, p in self.model.named_parameters()}
        with models.frozen(self.model), models.saved_bytes() as saved:
            logits = functional_call(self.model, theta, (x,))
            loss = F.cross_entropy(logits, y, reduction='sum') / self.n
            gradient = torch.autograd.grad(loss, theta.values(), create_graph=True)
        return gradient, list(theta.values()), sum(saved.values())


def fitting_chunk(model, x, y, most=250):
    """How many of the images x, at most `most`, memory allows in a chunk of a `Hessian`.

    What an image takes is measured on the graph of 16.
    """
    x, y = x[:16], y[:16]
    size = Hessian(model, x, y).gradient(x, y)[2] / len(x)
    return min(most, models.fitting(size, x.device))


CHECKS = 6


def products(V, q, part=2 ** 14):
    """V q, (rows,) in double precision, of float32 products of some thousands of entries each."""
    return sum((V[:, i:i + part] @ q[i:i + part]).double() for i in range(0, len(q), part))


class Krylov:
    """An orthonormal basis V of a block Krylov space of a symmetric matrix, and T = V H V'.

    Band Lanczos (Ruhe 1979) with full re-orthogonalisation: one product a step, from `block` random
    starts, which lets it find eigenvalues of a multiplicity up to `block`. What a product leaves
    outside of the basis waits in `queue` to become a direction: the residuals of Ritz pairs follow
    from it without further products. Directions that are spent are replaced by random ones.
    """

    def __init__(self, matvec, like, starts, steps, seed):
        self.matvec, self.seed = matvec, seed
        try:
            self.V = like.new_empty(steps, starts.shape[1])
        except RuntimeError:
            raise ValueError(f'{steps} vectors of {starts.shape[1]:,} parameters are too many for '
                             'the memory; ask for fewer with --max-products') from None
        self.T = torch.zeros(steps, steps).double()
        self.queue, self.owners, self.size = list(starts), [-1] * len(starts), 0
        self.checking, self.reference, self.done = 0, starts.new_zeros(0), False  # of lanczos

    def state(self):
        """All that is needed to go on, as plain tensors; `restore` takes it."""
        n = self.size
        return {'V': self.V[:n].clone(), 'T': self.T[:n, :n].clone(),
                'queue': torch.stack(self.queue), 'done': self.done,
                'owners': self.owners, 'checking': self.checking, 'reference': self.reference}

    def restore(self, state):
        self.size = len(state['V'])
        self.V[:self.size] = state['V']
        self.T[:self.size, :self.size] = state['T']
        self.queue = [q.to(self.V) for q in state['queue']]
        self.owners = list(state['owners'])
        self.checking, self.reference = state['checking'], state['reference']
        self.done = state['done']

    def split(self, q):
        """q less its part in the basis, and that part's coefficients, (size,)."""
        V = self.V[:self.size]
        t = products(V, q)
        return q - V.T @ t.to(q), t

    def random(self):
        """A random direction outside of the basis."""
        like = self.V[0]
        return self.split(analysis.random_unit(len(like), like, self.seed, 1, self.size))[0]

    def step(self):
        """Adds a direction to the basis at the cost of one product: the one that waits longest, or
        while checking the latest. It was split off when it began to wait: twice is enough, and
        the second time corrects T, too, as V is orthonormal only to rounding."""
        place = -1 if self.checking else 0
        (q, again), owner = self.split(self.queue.pop(place)), self.owners.pop(place)
        if owner >= 0:
            again = again[:owner + 1].cpu()
            self.T[owner, :owner + 1] += again
            self.T[:owner, owner] += again[:owner]
            if models.norm(q) <= rounding(self.T, q.dtype):
                q = self.split(self.random())[0]
        v = self.V[self.size] = q / models.norm(q)
        self.queue = [other - (v * other).sum() * v for other in self.queue]
        self.size += 1
        residual, t = self.split(self.matvec(v))
        self.T[self.size - 1, :self.size] = self.T[:self.size, self.size - 1] = t.cpu()
        self.queue.append(residual)
        self.owners.append(self.size - 1)

    def ritz(self, k):
        """The k Ritz values largest in magnitude, (k,), their vectors in the basis, (size, k), and
        the norms of their residuals, (k,), which rounding keeps from being smaller than itself."""
        values, S = torch.linalg.eigh(self.T[:self.size, :self.size])
        top = values.abs().argsort(descending=True)[:k]
        left = torch.stack([q for q, owner in zip(self.queue, self.owners) if owner >= 0])
        rows = S[[owner for owner in self.owners if owner >= 0]][:, top]
        gram = torch.stack([products(left, q) for q in left]).cpu()
        norms = ((gram @ rows) * rows).sum(0).clamp(min=0).sqrt()
        return values[top], S[:, top], norms.clamp(min=rounding(values, left.dtype))

    def check(self, values, good, tol):
        """Are these Ritz values, if all are `good`, the top ones and none is missing? Then `done`.

        A Krylov space may miss copies of a multiple eigenvalue. So CHECKS steps go to a new random
        direction: what is missing appears there, and the search goes on.
        """
        if not good:
            self.checking = 0
        elif not self.checking:
            self.checking, self.reference = CHECKS, values
            self.queue.append(self.random())
            self.owners.append(-1)
        elif not torch.allclose(values, self.reference, rtol=tol,
                                atol=rounding(values, self.V.dtype).item()):
            self.checking = 0
        else:
            self.checking -= 1
            self.done = self.checking == 0


def lanczos(matvec, dim, k, *, tol=1e-3, max_products=None, block=2, like=None, seed=0, state=None,
            watch=None):
    """The k eigenpairs largest in magnitude of the symmetric matrix v -> matvec(v), (dim,).

    Returns eigenvalues, (k,), by falling magnitude and with their signs, orthonormal eigenvectors,
    (k, dim), and relative residuals ||H v - lambda v|| / |lambda|, (k,). It ends when all are at
    most `tol` and a random direction shows no other, or after `max_products` products (15 k unless
    given), whose vectors it keeps. The largest entry of an eigenvector is positive.

    Vectors are of the dtype and on the device of `like` (float32, CPU). After each product
    watch(state, values, residuals) is told where it stands; what its state() returns, handed in as
    `state`, goes on from there.
    """
    like = torch.zeros(()) if like is None else like
    steps = min(dim, most(dim, k, 15 * k if max_products is None else max_products))
    starts = torch.stack([analysis.random_unit(dim, like, seed, 0, i) for i in range(block)])
    space = Krylov(matvec, like, starts, steps, seed)
    if state:
        space.restore(state)
    while space.size < steps and not space.done:
        space.step()
        values, _, residuals = space.ritz(k)
        good = converged(values, relative(values, residuals), tol, like.dtype)
        space.check(values, len(good) == k and good.all(), tol)
        if watch:
            watch(space.state, values, relative(values, residuals))
    values, S, residuals = space.ritz(k)
    return values, upright(S.T.to(space.V) @ space.V[:space.size]), relative(values, residuals)


def power_iteration(matvec, dim, k, *, tol=1e-3, max_products=None, block=None, like=None, seed=0,
                    state=None, watch=None):
    """As `lanczos`, by power iteration with deflation: the paper's method, one pair after another.

    A pair takes at most max_products / k products, 50 unless given, as in the paper's code. In the
    end the pairs are rotated within their span to fit the matrix best (Rayleigh-Ritz).
    """
    like = torch.zeros(()) if like is None else like
    budget = most(dim, k, 50 * k if max_products is None else max_products) // k
    none = like.new_zeros(0, dim)
    s = state or {'V': none, 'HV': none, 'v': analysis.random_unit(dim, like, seed, 0), 'spent': 0,
                  'values': [], 'residuals': []}
    s |= {name: s[name].to(like) for name in ('V', 'HV', 'v')}  # a state comes from the disk
    while len(s['V']) < k:
        V, v = s['V'], s['v']
        for _ in range(2):
            v = v - V.T @ products(V, v).to(v)
            v = v / models.norm(v)
        w = matvec(v)
        value = products(v[None], w).item()
        values = torch.tensor(s['values'] + [value]).double()
        left = models.norm(w - V.T @ products(V, w).to(w) - value * v).double()
        residuals = torch.tensor(s['residuals'] + [relative(values[-1:], left).item()]).double()
        s = s | {'v': w, 'spent': s['spent'] + 1}
        if s['spent'] == budget or converged(values, residuals, tol, like.dtype)[-1]:
            s = {'V': torch.cat([V, v[None]]), 'HV': torch.cat([s['HV'], w[None]]), 'spent': 0,
                 'v': analysis.random_unit(dim, like, seed, len(values)),
                 'values': values.tolist(), 'residuals': residuals.tolist()}
        if watch:
            watch(lambda: s, values, residuals)
    T = torch.stack([products(s['V'], w) for w in s['HV']]).cpu()
    values, S = torch.linalg.eigh((T + T.T) / 2)
    order = values.abs().argsort(descending=True)
    values, S = values[order], S[:, order].T.to(like)
    vectors = S @ s['V']
    left = S @ s['HV'] - values.to(like)[:, None] * vectors
    norms = torch.stack([models.norm(row) for row in left]).double().cpu()
    return values, upright(vectors), relative(values, norms)


def quadrature(matvec, dim, steps=50, *, like=None, seed=0):
    """One probe of the spectral density by stochastic Lanczos quadrature (Ghorbani et al. 2019).

    Returns nodes and weights, (steps,) each, weights of sum 1: sum_i w_i f(node_i) estimates the
    mean of f over the eigenvalues, exactly so in expectation over seeds for polynomials f of degree
    below 2 steps.
    """
    like = torch.zeros(()) if like is None else like
    start = rademacher(dim, like, seed) / dim ** .5
    space = Krylov(matvec, like, start[None], min(dim, steps), seed)
    while space.size < min(dim, steps):
        space.step()
    nodes, S = torch.linalg.eigh(space.T)
    return nodes, S[0] ** 2


def rademacher(dim, like, seed):
    """A random vector of +-1, (dim,), the same on any device."""
    generator = torch.Generator().manual_seed(attack.derive(seed))
    return (2 * torch.randint(2, (dim,), generator=generator) - 1).to(like)


SOLVERS = {'lanczos': lanczos, 'power': power_iteration}


def most(dim, k, max_products):
    """max_products; ValueError where k pairs are not to be had of it or of a matrix (dim, dim)."""
    if not 1 <= k <= dim:
        raise ValueError(f'k must be 1..{dim}, the number of parameters, got {k}')
    if max_products < k:
        raise ValueError(f'{k} pairs take at least {k} products, got max_products {max_products}')
    return max_products


def relative(values, norms):
    """Residuals ||H v - lambda v|| / |lambda| from eigenvalues and norms."""
    return norms / values.abs().clamp(min=1e-30)


def rounding(values, dtype):
    """What products of a matrix with these eigenvalues may be off by: some 40 eps were measured."""
    return 64 * torch.finfo(dtype).eps * values.abs().max()


def converged(values, residuals, tol, dtype):
    """Which pairs have relative residuals of at most `tol`, or are zero within rounding."""
    zero = values.abs().maximum(residuals * values.abs().clamp(min=1e-30))
    return (residuals <= tol) | (zero <= 1.01 * rounding(values, dtype))


def upright(vectors):
    """The vectors, (k, dim), with signs such that the entry of largest magnitude is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def eigenpairs(matvec, dim, like, made, path):
    """The part 'eigen' of the result, made as `made` says, and the eigenvectors, (k, dim).

    Shows progress. The state of the solver is kept at `path`, once a minute or in a twentieth of
    the time where keeping it is slow, and what is found there goes on.
    """
    kept = analysis.kept(path, made) or {'made': made, 'state': None, 'products': 0, 'seconds': 0.}
    began, due = time.monotonic() - kept['seconds'], time.monotonic() + 60

    def watch(state, values, residuals):
        nonlocal due
        kept['products'] += 1
        good = converged(values, residuals, made['tol'], like.dtype).sum()
        progress = (f'{good} of {made["k"]} pairs converged, lambda {values[0]:.4g} .. '
                    f'{values[-1]:.2g}, residual {residuals.max():.0e}')
        bar.set_postfix_str(progress, refresh=False)
        bar.update()
        if time.monotonic() > due:
            start = time.monotonic()
            if bar.disable:
                print(f'  {kept["products"]} products, {progress}', flush=True)
            record.save(path, kept | {'state': state(), 'seconds': start - began})
            due = time.monotonic() + max(60, 20 * (time.monotonic() - start))

    with analysis.bar('products', initial=kept['products']) as bar:
        values, vectors, residuals = SOLVERS[made['solver']](
            matvec, dim, made['k'], tol=made['tol'], max_products=made['max_products'], like=like,
            seed=made['seed'], state=kept['state'], watch=watch)
    good = converged(values, residuals, made['tol'], like.dtype)
    return {**{key: made[key] for key in ('solver', 'k', 'tol', 'max_products')},
            'values': values.tolist(), 'residuals': residuals.tolist(), 'converged': good.tolist(),
            'products': kept['products'], 'seconds': round(time.monotonic() - began, 1)}, vectors


def scale(subject, n_draws, seed):
    """The paper's normaliser: the mean of L_eps over networks as PyTorch initialises them.

    A draw is measured on at most 500 of the images, with BatchNorm statistics of its own.
    """
    rows = data.subset(len(subject.x), min(len(subject.x), 500))
    s = SimpleNamespace(model=copy.deepcopy(subject.model), x=subject.x[rows], y=subject.y[rows],
                        pgd=functools.partial(subject.pgd, index=subject.index[rows], seed=seed))
    losses = []
    with analysis.bar('draws of theta', n_draws) as bar:
        for draw in range(n_draws):
            torch.manual_seed(attack.derive(seed, draw))
            s.model.cpu()  # the same draws on any device
            for module in s.model.modules():
                if hasattr(module, 'reset_parameters'):
                    module.reset_parameters()
            s.model.to(s.x)
            analysis.recompute_bn(s)
            model = models.folded(s.model)
            losses.append(attack.mean_loss(model, s.pgd(model, s.x, s.y), s.y)[0])
            bar.update()
    return {'mean': statistics.mean(losses), 'losses': losses, 'n_draws': n_draws, 'n': len(rows),
            'law': 'PyTorch initialiser'}


def main(argv=None):
    args = parse(argv)
    for path in args.runs:
        record.members(path)  # what is wrong with a later one is said before hours go to the first
    for path in args.runs:
        with models.tf32(False):
            analyse(analysis.subject(path, args), args)


def analyse(s, args):
    """Computes what the result of the subject `s` lacks, writes it part by part, and shows it."""
    out = analysis.outputs(s, 'hessian', args, power='' if args.solver == 'power' else None)
    paths = {kind: record.suffixed(out, kind) for kind in ('.json', '.pt', '.png', '.state.pt')}
    dim = sum(theta.numel() for theta in s.model.parameters())
    like = s.x.new_zeros(())
    with record.lock(s.folder, args.wait):
        result = analysis.resume(paths['.json'], s.head | {'dim': dim}, args.device)
        with analysis.sound(paths['.json']):
            check(result)
        print(f'{paths[".json"]}: Hessian of {dim:,} parameters on {len(s.x):,} adversarial '
              f'examples of {s.head["dataset"]}, eps {s.eps:.4g}')

        @functools.cache
        def x_adv():  # made once, then held fixed
            return s.pgd(models.folded(s.model), s.x, s.y, seed=args.seed)

        @functools.cache
        def matrix():
            chunk = fitting_chunk(s.model, x_adv(), s.y, args.batch_size)
            return Hessian(s.model, x_adv(), s.y, chunk)

        def matvec(v):
            return matrix()(v)

        if 'loss' not in result:
            result['loss'], result['robust_error'] = attack.mean_loss(s.model, x_adv(), s.y,
                                                                      args.batch_size)

        if not satisfies(result.get('eigen'), args) or (
                analysis.vectors(paths['.pt'], result) is None):
            made = {name: value for name, value in s.head.items() if name != 'checkpoint'} | {
                'k': args.k, 'tol': args.tol, 'max_products': args.max_products,
                'solver': args.solver}
            result['eigen'], vectors = eigenpairs(matvec, dim, like, made, paths['.state.pt'])
            record.save(paths['.pt'], {'digest': s.head['digest'], 'vectors': vectors.float().cpu(),
                                       'values': result['eigen']['values']})
            record.save(paths['.json'], result)
            paths['.state.pt'].unlink(missing_ok=True)
        if result.get('scale', {}).get('n_draws') != args.draws:
            result['scale'] = scale(s, args.draws, args.seed)
            record.save(paths['.json'], result)
        seeds = [attack.derive(args.seed, i) for i in range(max(args.trace, args.density))]
        estimates = result.setdefault('trace', {'estimates': []})['estimates']
        with analysis.bar('probes of the trace', args.trace, len(estimates)) as bar:
            for seed in seeds[len(estimates):args.trace]:
                z = rademacher(dim, like, seed)
                estimates.append((z @ matvec(z)).item())
                bar.update()
                record.save(paths['.json'], result)
        probes = result.setdefault('density', {'nodes': [], 'weights': []})
        with analysis.bar('probes of the density', args.density, len(probes['nodes'])) as bar:
            for seed in seeds[len(probes['nodes']):args.density]:
                nodes, weights = quadrature(matvec, dim, like=like, seed=seed)
                probes['nodes'].append(nodes.tolist())
                probes['weights'].append(weights.tolist())
                bar.update()
                record.save(paths['.json'], result)
        show(result)
        draw(result, paths['.png'])


def check(result):
    """Raises some error where a part of the result is not of the types that `analyse` writes."""
    eigen, density = result.get('eigen'), result.get('density', {'nodes': [], 'weights': []})
    numbers = [result.get('loss', 0), result.get('robust_error', 0),
               1 / result.get('scale', {'mean': 1})['mean'],
               *result.get('trace', {'estimates': []})['estimates'],
               *sum(density['nodes'], []), *sum(density['weights'], [])]
    if eigen:
        numbers += eigen['values'] + eigen['residuals'] + [eigen['k'], eigen['tol']]
        all(eigen['converged']), eigen['solver'], eigen['max_products'], eigen['products'] + 0.
    sum(numbers)
    nodes, weights = ([len(row) for row in density[key]] for key in ('nodes', 'weights'))
    if nodes != weights or len(set(nodes)) > 1:
        raise TypeError('nodes and weights of the density differ in number')


def satisfies(eigen, args):
    """Whether the eigenpairs at hand are those asked for, or more, or more exact."""
    return bool(eigen) and eigen['k'] >= args.k and eigen['tol'] <= args.tol and (
        all(eigen['converged']) or eigen['max_products'] == args.max_products)


def mean(estimates):
    """Mean of independent estimates and its standard error (None of a single one)."""
    n = len(estimates)
    return statistics.mean(estimates), statistics.stdev(estimates) / n ** .5 if n > 1 else None


def show(result):
    """The result on the terminal."""
    eigen, scale = result['eigen'], result['scale']['mean']
    print(f'  L_eps {result["loss"]:.4g}, robust error {result["robust_error"]:.1%}; '
          f'L_eps of {result["scale"]["n_draws"]} random thetas {scale:.4g}\n'
          f'  {"":>5}{"eigenvalue":>12}{"normalised":>12}{"residual":>10}')
    for i, (value, residual, good) in enumerate(
            zip(eigen['values'], eigen['residuals'], eigen['converged'])):
        print(f'  {i + 1:>5}{value:>12.5g}{value / scale:>12.5g}{residual:>10.0e}'
              + '  not converged' * (not good))
    print(f'  {eigen["products"]} products of {eigen["solver"]}, {eigen["seconds"]:.0f} s')
    if not all(eigen['converged']):
        print('  Pairs that have not converged are no eigenpairs yet: more --max-products')
    if result['trace']['estimates']:
        value, error = mean(result['trace']['estimates'])
        error = '' if error is None else f' +- {error:.2g}, one standard error'
        print(f'  trace {value:.5g}{error}, {len(result["trace"]["estimates"])} probes')


def draw(result, path):
    """Figure 3 for one run: eigenvalues as they are and normalised; the density if computed."""
    eigen, density = result['eigen'], result['density']
    with analysis.figure(path, 1 + bool(density['nodes']), analysis.title(result)) as axes:
        index = range(1, len(eigen['values']) + 1)
        axes[0].plot(index, eigen['values'], 'o--', label='as it is')
        axes[0].plot(index, [value / result['scale']['mean'] for value in eigen['values']], 'o-',
                     label='divided by the mean $L_\\epsilon$ of random $\\theta$')
        doubtful = [(i, value) for i, value, good in
                    zip(index, eigen['values'], eigen['converged']) if not good]
        if doubtful:
            axes[0].plot(*zip(*doubtful), 'kx', label='not converged')
        axes[0].set(xlabel='number, by magnitude', ylabel='eigenvalue of the Hessian')
        axes[0].locator_params(axis='x', integer=True)
        axes[0].legend()
        if density['nodes']:
            grid, values = smooth(torch.tensor(density['nodes']), torch.tensor(density['weights']))
            axes[1].semilogy(grid.numpy(), values.numpy())
            axes[1].set(xlabel='eigenvalue of the Hessian', ylabel='density',
                        ylim=(1e-7 * values.max().item(), None),
                        title=f'{len(density["nodes"])} probes of Lanczos quadrature')


def smooth(nodes, weights, points=1000):
    """The density of eigenvalues on a grid: the nodes of all probes, each a narrow Gaussian."""
    low, high = nodes.min(), nodes.max()
    width = .01 * (high - low) or 1e-12
    grid = torch.linspace(low - 5 * width, high + 5 * width, points)
    bells = torch.exp(-((grid[:, None] - nodes.flatten()) / width) ** 2 / 2)
    return grid, bells @ weights.flatten() / (len(nodes) * width * (2 * torch.pi) ** .5)


def parse(argv):
    """The command line."""
    count = record.number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='run folders (their last model) or checkpoints')
    add('--k', type=count, default=20, help='so many eigenpairs; default: 20')
    add('--solver', choices=SOLVERS, default='lanczos',
        help="power is the paper's method, at some 15 times the cost; default: lanczos")
    add('--tol', type=record.number(float, 1e-12, 1), default=1e-3,
        help='relative residual at which a pair has converged; default: 1e-3')
    add('--max-products', type=record.number(int, 1, 100000),
        help='Hessian-vector products at most; lanczos keeps a vector for each; '
        'default: 15 k for lanczos, 50 k for power')
    add('--draws', type=count, default=10,
        help='random thetas whose mean L_eps normalises the eigenvalues; default: 10')
    add('--trace', type=record.number(int, 0), default=0, metavar='PROBES',
        help="Hutchinson's estimate of the trace, a product for each probe; default: none")
    add('--density', type=record.number(int, 0), default=0, metavar='PROBES',
        help='density of the spectrum by Lanczos quadrature, 50 products a probe; default: none')
    analysis.add_flags(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    record.run(main)

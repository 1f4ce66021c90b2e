"""Eigenpairs, trace and spectral density of a symmetric matrix H, given as a function v -> H v.

Vectors, (dim,), have the dtype and device of `like`; dim may be millions.
"""

import torch

import rng

F32 = torch.zeros(())


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
        space.rest.append((0, space.random()))
        for _ in range(min(6, steps - space.size)):
            space.step(latest=True)
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
                q = q - V[:i].T @ matvec_double(V[:i], q).to(q)
                q = q / norm(q)
            V[i] = q
            HV[i] = q = matvec(q)
            t = matvec_double(V[: i + 1], q)
            values[i], norms[i] = t[i], norm(q - V[: i + 1].T @ t.to(q))
            if converged(values[: i + 1], norms[: i + 1], tol, like.dtype)[i]:
                break
    T = torch.stack([matvec_double(V, row) for row in HV]).cpu()
    values, S = torch.linalg.eigh((T + T.T) / 2)
    order = values.abs().argsort(descending=True)
    values, S = values[order], S[:, order].T.to(like)
    rest = S @ HV - values.to(like)[:, None] * (S @ V)
    norms = rest.norm(dim=1, dtype=torch.float64).cpu()
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

    Lanczos' method with full orthogonalisation, one product a step. `rest` holds (index of a basis
    vector, part of its product outside of the basis). These remainders become the next basis
    vectors; the residuals of Ritz pairs follow from them without further products.
    """

    def __init__(self, matvec, start, steps, seed):
        self.matvec, self.seed = matvec, seed
        self.V = start.new_empty(steps, len(start))
        self.T = torch.zeros(steps, steps).double()
        self.size, self.rest = 0, [(0, start)]

    def random(self):
        """A random direction outside of the basis."""
        like = self.V[0]
        return self.orthogonalize(rng.unit_vector(len(like), like, self.seed, 1, self.size))[0]

    def step(self, latest=False):
        """Adds the oldest (or latest) remainder to the basis, or if it is 0 a random direction."""
        _, q = self.rest.pop(-1 if latest else 0)
        if norm(q) <= rounding(self.T, q.dtype):
            q = self.random()
        v = self.V[self.size] = q / norm(q)
        self.rest = [(i, r - (v * r).sum() * v) for i, r in self.rest]
        self.size += 1
        q, t = self.orthogonalize(self.matvec(v), max(0, self.size - len(self.rest) - 2))
        self.T[self.size - 1, : self.size] = self.T[: self.size, self.size - 1] = t
        self.rest.append((self.size - 1, q))

    def orthogonalize(self, q, first=0):
        """q without its part in the basis, and the coefficients of that part, (size,).

        Of a product only the coefficients from `first` on exceed rounding errors. With these taken
        off first, one pass over the whole basis mostly suffices; else there is a second.
        """
        coefficients = torch.zeros(self.size).double()
        for i in (first, 0, 0):
            V, before = self.V[i : self.size], norm(q)
            t = matvec_double(V, q)
            q = q - V.T @ t.to(q)
            coefficients[i:] += t.cpu()
            if i == 0 and norm(q) > 0.7 * before:
                break
        return q, coefficients

    def ritz(self, k):
        """The k Ritz values largest in magnitude, (k,), their vectors in the basis, (k, size), and
        bounds on the norms of their residuals, (k,), exact if there is one remainder."""
        values, S = torch.linalg.eigh(self.T[: self.size, : self.size])
        order = values.abs().argsort(descending=True)[:k]
        norms = sum(S[i, order].abs() * norm(q).item() for i, q in self.rest)
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


def matvec_double(V, q, part=2**14):
    """V q, (rows,), double: float32 sums of millions of products would be off by 2e-4."""
    return sum((V[:, i : i + part] @ q[i : i + part]).double() for i in range(0, len(q), part))


def norm(*tensors):
    """The norm of all tensors as one vector, (); torch's is off by 1e-4 on millions of floats."""
    return torch.stack([(tensor * tensor).sum() for tensor in tensors]).sum().sqrt()

"""Eigenpairs, trace and spectral density of a symmetric matrix H, given as a function v -> H v.

Vectors, (dim,), are of the dtype and on the device of `like`; dim may be millions.
"""

import torch

import rng

F32 = torch.zeros(())


def top_eigenpairs(matvec, dim, k, *, tol=1e-3, max_products=None, like=F32, seed=0, checks=6):
    """The k eigenpairs largest in magnitude of the symmetric matrix v -> matvec(v), (dim,).

    Returns eigenvalues, (k,), by falling magnitude and with their signs; orthonormal eigenvectors,
    (k, dim), their largest entries positive, of the dtype and on the device of `like`; relative
    residuals ||H v - lambda v|| / |lambda|, (k,); and which pairs have converged, (k,): residuals
    are at most `tol`, or the eigenvalue is zero but for rounding. It ends when all have, or after
    `max_products` (15 k unless given), whose vectors it keeps.

    Lanczos' method may miss copies of a multiple eigenvalue. So when all have converged, `checks`
    products go to a new random direction: what is missing appears there, and the search resumes.
    scipy's eigsh, with such a check, takes 85 to 91 products for a LeNet where this takes 77 to 80,
    and 48 for one that predicts a constant where this takes 26.
    """
    steps = min(dim, max_products or 15 * k)
    space = Krylov(matvec, rng.unit_vector(dim, like, seed, 0), steps, seed)
    while space.size < steps:
        space.step()
        values, S, norms = space.ritz(k)
        if converged(values, norms, tol, like.dtype).sum() < k:
            continue
        before = values  # what is missing among them shows in a new random direction
        space.rest.append((0, space.random()))
        for _ in range(min(checks, steps - space.size)):
            space.step(latest=True)
        values, S, norms = space.ritz(k)
        all_found = torch.allclose(values, before, tol, rounding(values, like.dtype))
        if all_found and converged(values, norms, tol, like.dtype).all():
            break
    return summary(values, S.to(like) @ space.V[: space.size], norms, tol)


def power_iteration(matvec, dim, k, *, tol=1e-3, max_products=None, like=F32, seed=0):
    """As `top_eigenpairs`, by power iteration with deflation: the paper's method, pair by pair.

    A pair takes at most max_products / k products, 50 unless given, as in the paper's code. In the
    end the pairs are rotated within their span to fit the matrix best (Rayleigh-Ritz).
    """
    n_iter = (max_products or 50 * k) // k
    (V, HV), values, norms = like.new_empty(2, k, dim), *torch.zeros(2, k).double()
    for i in range(k):
        q = rng.unit_vector(dim, like, seed, i)
        for _ in range(n_iter):
            for _ in range(2):  # the second time for rounding
                q = q - V[:i].T @ matvec_double(V[:i], q).to(q)
                q = q / norm(q)
            V[i], q = q, matvec(q)
            HV[i], t = q, matvec_double(V[: i + 1], q)
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
    """Hutchinson's estimate of the trace by one probe z of +-1: z' H z, one product."""
    z = rng.signs(dim, like, seed)
    return (z * matvec(z)).double().sum().item()


def density(matvec, dim, steps=50, *, like=F32, seed=0):
    """One probe of the spectral density by stochastic Lanczos quadrature (Ghorbani et al. 2019).

    Returns nodes and weights, (steps,) each, weights of sum 1: sum_i w_i f(node_i) estimates the
    mean of f over the eigenvalues, exactly so in expectation over seeds for polynomials f of degree
    below 2 steps.
    """
    start = rng.signs(dim, like, seed)
    space = Krylov(matvec, start, min(dim, steps), seed)
    while space.size < len(space.V):
        space.step()
    nodes, S = torch.linalg.eigh(space.T)
    return nodes.tolist(), (S[0] ** 2).tolist()


class Krylov:
    """An orthonormal basis V, (steps, dim), of a Krylov space of a symmetric matrix H; T = V H V'.

    Lanczos' method with full orthogonalisation, a product a step. `rest` holds (index of a basis
    vector, remainder of its product outside of the basis); remainders become the next basis
    vectors, and the residuals of Ritz pairs follow from them without further products.
    """

    def __init__(self, matvec, start, steps, seed):
        self.matvec, self.seed, self.size, self.rest = matvec, seed, 0, [(0, start)]
        self.V, self.T = start.new_empty(steps, len(start)), torch.zeros(steps, steps).double()

    def random(self):
        """A random direction outside of the basis."""
        like = self.V[0]
        return self.orthogonalize(rng.unit_vector(len(like), like, self.seed, 1, self.size))[0]

    def step(self, latest=False):
        """Adds the oldest (or latest) remainder to the basis, or a random direction where it is
        only rounding error."""
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
        """q less its part in the basis, and that part's coefficients, (size,).

        But for rounding a product lies in the directions from `first` on. These are split off
        first; then one pass over the basis is mostly enough, and there are more where it is not.
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
        bounds on the norms of their residuals, (k,), tight where one direction waits."""
        values, S = torch.linalg.eigh(self.T[: self.size, : self.size])
        order = values.abs().argsort(descending=True)[:k]
        norms = sum(S[i, order].abs() * norm(q).item() for i, q in self.rest)
        return values[order], S[:, order].T, norms.clamp(min=rounding(values, self.V.dtype))


def summary(values, vectors, norms, tol):
    """What a solver returns, of eigenpairs and the norms of their residuals."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    residuals = norms / values.abs().clamp(min=1e-30)
    good = converged(values, norms, tol, vectors.dtype)
    return values, torch.where(largest < 0, -vectors, vectors), residuals, good


def converged(values, norms, tol, dtype):
    """Which eigenpairs have residuals of at most `tol`, or are zero within rounding."""
    floor, magnitudes = rounding(values, dtype), values.abs()
    return norms <= torch.where(magnitudes <= floor, floor, tol * magnitudes)


def rounding(values, dtype):
    """What products of a matrix with these eigenvalues may be off by: we measured about 40 eps."""
    return 64 * torch.finfo(dtype).eps * values.abs().max().item()


def matvec_double(V, q, part=2**14):
    """V q, (rows,) in double precision: float32 sums of millions of products are off by 2e-4."""
    return sum((V[:, i : i + part] @ q[i : i + part]).double() for i in range(0, len(q), part))


def norm(*tensors):
    """Their norm as one vector, (); torch's own is off by 1e-4 on millions of floats."""
    return torch.stack([(tensor * tensor).sum() for tensor in tensors]).sum().sqrt()

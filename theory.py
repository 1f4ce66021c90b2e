"""Section 3 in numbers: Proposition 1, Theorems 1 and 2, and Figure 1, into evals/theory.json."""

import argparse
import math

import torch
import torch.nn.functional as F

from lib import cli, record, rng


def version_space_eps(x, y, W):
    """The largest eps at which W, (K, m), is in V_eps of (x, y), or -inf (Proposition 1), where
    (w_i - w_y) x + eps ||w_i - w_y||_1 <= 0 for all i. The l_inf ball is not cut to [0, 1]."""
    difference = torch.cat([W[:y], W[y + 1 :]]) - W[y]
    slack = -(difference @ x)
    if (slack < 0).any():
        return -math.inf
    return (slack / difference.abs().sum(1)).min().item()


def constant_eps(x, y, W):
    """The smallest eps at which W, (K, m), is in T_eps of (x, y): no multiple of W has a lower loss
    g_eps than 0 (Theorem 1). It is |v x| / ||v||_1, v = sum_j (w_j - w_y), at most ||x||_inf."""
    v = W.sum(0) - len(W) * W[y]
    return ((v @ x).abs() / v.abs().sum()).item()


def corners(x, eps):
    """The corners of the l_inf ball around x, (m,), at which convex functions peak: (2^m, m)."""
    return x + eps * torch.cartesian_prod(*torch.tensor([[-1.0, 1.0]] * len(x))).to(x)


def proposition_1(x, y, draws):
    """The share of the models `draws` for which version_space_eps is right: the whole ball around
    x, (m,), is classified as y just below that eps, and not just above."""

    def robust(W, eps):
        return bool((corners(x, eps) @ (W - W[y]).T <= 0).all())

    def agrees(W):
        eps = version_space_eps(x, y, W)
        if eps <= 0:
            return not robust(W, 0)
        return robust(W, 0.99 * eps) and not robust(W, 1.01 * eps)

    return sum(map(agrees, draws)) / len(draws)


def theorem_1(x, y, draws):
    """By how much the best multiple gamma W of a model lowers the adversarial loss at x, (m,), from
    that of gamma = 0: the most among the models `draws` at budgets where the theorem allows nothing
    (from 1.01 constant_eps on), and the least just below constant_eps."""
    gammas = [sign * 10.0**i for i in range(-8, 1) for sign in (-1, 1)]

    def gain(W, eps):
        margins = corners(x, eps) @ (W - W[y]).T
        # expm1 and log1p keep the digits of small gammas
        return -min(torch.log1p(torch.expm1(g * margins).mean(1)).max().item() for g in gammas)

    norm = x.abs().max().item()
    above, below = [], []  # of constant_eps
    for W in draws:
        needed = constant_eps(x, y, W)
        above += [gain(W, eps) for eps in (norm, 1.5 * norm, 1.01 * needed)]
        below.append(gain(W, 0.99 * needed))
    return {'largest_violation': max(above), 'smallest_improvement': min(below)}


def adversarial_log_loss(theta, z, eps):
    """g_eps = max log(1 + exp(theta z')) for |z' - z| <= eps, and its right derivative in theta."""
    worst = z + eps * torch.where(theta < 0, -1.0, 1.0)
    return F.softplus(theta * worst), torch.sigmoid(theta * worst) * worst


def theorem_2(eps, gammas, seed, n_runs=20, n_steps=10000):
    """For each gamma the share of SGD's iterates with |gradient of L_eps| > gamma eps L_theta_x and
    its bound (Eq. 4), in logistic regression on 100 Gaussian z. L_theta_theta is max |z'|^2 / 4,
    L_theta_x max_u |sigmoid(u) + u sigmoid'(u)|, the step 1 / (L_theta_theta sqrt(n_steps))."""
    generator = rng.generator(seed, 7)
    z = 0.5 + torch.randn(100, generator=generator, dtype=torch.float64)
    u = torch.linspace(0, 10, 100001, dtype=torch.float64)
    mixed = (torch.sigmoid(u) + u * torch.sigmoid(u) * torch.sigmoid(-u)).max().item()
    step = 4 / ((z.abs().max().item() + eps) ** 2 * math.sqrt(n_steps))
    theta = torch.linspace(-5, 5, n_runs, dtype=torch.float64)
    norms = torch.empty(n_steps, n_runs, dtype=torch.float64)
    for norm, drawn in zip(norms, torch.randint(100, (n_steps, n_runs), generator=generator)):
        norm[:] = adversarial_log_loss(theta[:, None], z, eps)[1].mean(1).abs()
        theta = theta - step * adversarial_log_loss(theta, z[drawn], eps)[1]
    points = []
    for gamma in gammas:
        share = (norms > gamma * eps * mixed).double().mean().item()
        points.append({'gamma': gamma, 'share': share, 'bound': 4 / (gamma**2 - 2 * gamma + 4)})
    return points


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument('--draws', type=cli.count, default=1000, help='linear models')
    parser.add_argument('--seed', type=cli.whole(0), default=0, help='of all random numbers')
    args = parser.parse_args(argv)
    m, k = 10, 3  # 2^m corners
    generator = rng.generator(args.seed, 8)
    x = torch.rand(m, generator=generator).double()
    draws = [torch.randn(k, m, generator=generator).double() for _ in range(args.draws)]
    result = {'seed': args.seed, 'case': f'm = {m}, K = {k}', 'draws': args.draws}
    result |= {'proposition_1': proposition_1(x, 0, draws), 'theorem_1': theorem_1(x, 0, draws)}
    print(f'Proposition 1 is right about {result["proposition_1"]:.1%} of {args.draws} models')
    gains = [f'{gain:.2g}' for gain in result['theorem_1'].values()]
    print(f'Theorem 1: a multiple of a model gains at most {gains[0]} over 0 where none should,')
    print(f'and at least {gains[1]} just below that eps')
    result['theorem_2'] = []
    for eps in 0.05, 0.1, 0.2:
        points = theorem_2(eps, [2 + i / 4 for i in range(17)], args.seed)
        result['theorem_2'].append({'eps': eps, 'points': points})
        most = max(point['share'] / point['bound'] for point in points)
        print(f'Theorem 2, eps {eps}: at most {most:.0%} of the bound')
    theta = torch.linspace(-2, 2, 401, dtype=torch.float64)
    curves = {str(eps): adversarial_log_loss(theta, 1.0, eps)[0].tolist() for eps in (0, 0.6, 1.2)}
    result['figure_1'] = {'theta': theta.tolist(), 'curves': curves}
    record.add_provenance(result, 'cpu')
    with record.lock('evals'):
        record.save('evals/theory.json', result)


if __name__ == '__main__':
    cli.run(main)

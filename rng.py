"""Random numbers as a function of purpose, seed and image, not of batch, order or device.

They are counter-based (Salmon et al. 2011): hashes of keys by SplitMix64 (Steele et al. 2014).
"""

import math
import zlib

import torch


def uniform(name, seed, index, shape, like, stream=0):
    """Uniform numbers in [0, 1), (*index.shape, *shape), in the dtype and on the device of `like`.

    They depend only on an attack's name, the seed, the image's index and the stream (broadcast).
    """
    key = index + fold_in(zlib.crc32(name.encode()), seed)
    key = splitmix64(splitmix64(key) + stream)
    counter = torch.arange(1, math.prod(shape) + 1, device=like.device)
    bits = splitmix64(key[..., None] + counter * -0x61C8864680B583EB)
    return shift(bits, 40).to(like.dtype).mul_(2**-24).reshape(*key.shape, *shape)


def fold_in(*words):
    """A seed, 0 .. 2^63 - 1, made of several integers such as seed, epoch and batch."""
    key = torch.tensor(0)
    for word in words:
        key = splitmix64(key + word % 2**63) + 1
    return key.item() % 2**63


def generator(*words):
    """A CPU generator, seeded by `fold_in(*words)`."""
    return torch.Generator().manual_seed(fold_in(*words))


def unit_vector(dim, like, *words):
    """A random direction: a Gaussian vector of norm 1, (dim,), the same on any device."""
    vector = torch.randn(dim, generator=generator(*words), dtype=torch.float64)
    return (vector / vector.norm()).to(like)


def signs(dim, like, *words):
    """A random vector of +-1, (dim,), the same on any device."""
    return (2 * torch.randint(2, (dim,), generator=generator(*words)) - 1).to(like)


def splitmix64(z):
    """SplitMix64's output function on int64 words, whose products wrap."""
    z = (z ^ shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shift(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ shift(z, 31)


def shift(z, n):
    """int64 words, as unsigned ones, shifted right by n bits."""
    return (z >> n) & (2 ** (64 - n) - 1)

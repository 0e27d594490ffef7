"""What the tests of the deep factorization share: small targets and models, and their weights."""

import torch

from lowrank_kernels.factorization import DeepFactorization, SquaredLoss
from lowrank_kernels.reference.compression import haar

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def target(d=12, r=2, seed=0, n=None):
    """Singular values from 1 down to 0.5."""
    g = generator(seed)
    u, v = (haar(size, r, generator=g, dtype=F64) for size in (d, n or d))
    return u * torch.linspace(1, 0.5, r, dtype=F64) @ v.t()


def masked(d=12, r=2, seed=0, share=0.6, **kwargs):
    return SquaredLoss(target(d, r, seed), torch.rand(d, d, generator=generator(seed + 1)) < share, **kwargs)


def model(d=12, depth=3, scale=0.3, seed=5, **kwargs):
    return DeepFactorization(depth, d, init_scale=scale, generator=generator(seed), **kwargs)


def weights(m):
    return [factor.detach().clone() for factor in m.factors()]


def multiply(factors):
    x = factors[0]
    for factor in factors[1:]:
        x = factor @ x
    return x


def relative(a, b):
    return float((a - b).norm() / b.norm())

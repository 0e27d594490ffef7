"""The paper's compression at full width, in the three equivalent forms: specification and oracle of the initializer.

A deep factorization ``X = W_L ... W_1`` starts at ``W_l(0) = eps_l Q_l`` with orthogonal ``Q_l``. With ``D = dl/dX`` at
``X = 0`` and ``Psi = W_{L:2}(0)^T D`` all learning happens in a subspace of 2 r directions, ``V`` on the right and
``U = W_{L:1}(0) V / prod eps_l`` on the left (r = rank of D). Nothing here is meant to be fast.

Source: Yaras et al., ICML 2024, arXiv:2406.04112, Theorem 2.1, equation (7) and appendix E.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonal_factors(
    depth: int, width: int, init_scale: float, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """``[W_1, ..., W_L]`` of equation (3): Haar orthogonal ``(width, width)`` matrices times ``init_scale``."""
    return [init_scale * haar(width, width, generator=generator, dtype=dtype) for _ in range(depth)]


def haar(rows: int, columns: int, *, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """A Haar-distributed ``(rows, columns)`` matrix with orthonormal columns, rows >= columns."""
    device = "cpu" if generator is None else generator.device  # whatever torch's default device is
    return orthonormal(torch.randn(rows, columns, generator=generator, dtype=dtype, device=device))


def orthonormal(x: Tensor) -> Tensor:
    """Q of the thin QR with a positive diagonal of R: the canonical basis of the columns' span."""
    q, r = torch.linalg.qr(x)
    signs = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q.dtype)
    return q * signs


def product(factors: list[Tensor]) -> Tensor:
    """``W_L ... W_1`` of ``[W_1, ..., W_L]``."""
    result = factors[0]
    for factor in factors[1:]:
        result = factor @ result
    return result


def _psi(factors: list[Tensor], gradient: Tensor) -> Tensor:
    return product(factors[1:]).t() @ gradient if len(factors) > 1 else gradient


def _scales(factors: list[Tensor]) -> list[float]:
    return [float(torch.linalg.matrix_norm(w, 2)) for w in factors]


def _with_left(factors: list[Tensor], right: Tensor) -> tuple[Tensor, Tensor]:
    left = product(factors) @ right / math.prod(_scales(factors))
    return left, right.t()


def direct_form(factors: list[Tensor], gradient: Tensor, gradient_rank: int) -> tuple[Tensor, Tensor]:
    """``V = orth([V_r(Psi), W_1^T U_r(Psi) / eps_1])``; returns left ``(d, 2 r)`` and right ``(2 r, d)``."""
    u, _, vh = torch.linalg.svd(_psi(factors, gradient))
    v, w = vh[:gradient_rank].t(), factors[0].t() @ u[:, :gradient_rank] / _scales(factors)[0]
    return _with_left(factors, orthonormal(torch.cat([v, w], 1)))


def nullspace_form(factors: list[Tensor], gradient: Tensor, gradient_rank: int) -> tuple[Tensor, Tensor]:
    """The paper's construction: the complement of ``N(Psi) n N(Psi^T W_1)``, the subspace in which nothing is learnt."""
    psi = _psi(factors, gradient)
    u, _, vh = torch.linalg.svd(psi)
    kernel = vh[gradient_rank:].t()  # N(Psi)
    images = factors[0].t() @ u[:, gradient_rank:] / _scales(factors)[0]  # W_1^{-1} N(Psi^T): W_1^T = eps^2 W_1^{-1}
    # x = kernel a = images b: (a, b) in the nullspace of [kernel, -images]
    frozen = psi.shape[1] - 2 * gradient_rank  # dimensions in which nothing is learnt
    coefficients = torch.linalg.svd(torch.cat([kernel, -images], 1)).Vh[-frozen:].t()[: kernel.shape[1]]
    still = torch.linalg.svd(kernel @ coefficients).U[:, :frozen]
    moving = torch.linalg.svd(still).U[:, frozen:]
    return _with_left(factors, moving)


def implicit_form(orthogonal: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """From ``P = Q_L ... Q_1`` acting on the singular vectors of ``D`` only: ``V = orth([V_r, P^T U_r])``, ``U = P V``.

    Args:
        orthogonal: ``(m, n)`` P, with orthonormal rows and columns where square.
        u, v: ``(m, r)`` and ``(n, r)`` top singular vectors of D.
    """
    right = orthonormal(torch.cat([v, orthogonal.t() @ u], 1))
    return orthogonal @ right, right.t()

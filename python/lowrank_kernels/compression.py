"""The paper's compression as an initializer: from a gradient to ``(left, core, right)``, without anything of full width.

With ``D`` the gradient of the loss at ``X = 0`` and ``U, V`` its top r singular vectors, a deep factorization with Haar
orthogonal starts moves only in ``span[V, P^T U]`` on the right and ``P span[V, P^T U]`` on the left, P being the product
of the orthogonal factors (:mod:`lowrank_kernels.reference.compression`). P acts on r vectors each way only, so it need
not exist: random frames with the same Gram matrix have the same distribution. That works for rectangular matrices too and
gives orthonormal factors on both sides.

Source: Yaras et al., ICML 2024, arXiv:2406.04112, sections 2 and 3; range finder: Halko, Martinsson, Tropp, 2011.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .entries import ObservedEntries
from .ops import completion_loss_and_gradients
from .processes import Team
from .reference.compression import haar, implicit_form, orthonormal
from .row_shards import RowShard


class CompressedFactors(NamedTuple):
    """``left @ core[L-1] @ ... @ core[0] @ right``, with orthonormal outer factors and cores ``init_scale * I``."""

    left: Tensor  # (m, k)
    core: Tensor  # (L, k, k)
    right: Tensor  # (k, n)


class LinearOperator(NamedTuple):
    """A matrix known by its products only; where its rows are shared out, products take and give the rows that are here."""

    shape: tuple[int, int]  # of the whole matrix
    matmul: Callable[[Tensor], Tensor]  # (n, s) -> (m, s)
    rmatmul: Callable[[Tensor], Tensor]  # (m, s) -> (n, s)
    device: torch.device
    rows: RowShard | None = None


def masked_gradient(
    entries: ObservedEntries,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    offset: float = 0.0,
    rows: RowShard | None = None,
) -> LinearOperator:
    """The gradient ``D_ij = w_ij (b_i + c_j + mu - m_ij)`` of the completion loss at ``X = 0``, as an operator.

    It never becomes a matrix: a product with D is a pass of the completion kernel with the own factor set to zero. With
    ``rows``, ``entries`` are those of the rows that are here, and all processes of the team multiply together.
    """
    m, n = entries.shape
    biases = {"row_bias": row_bias, "col_bias": col_bias, "offset": offset}

    def matmul(x: Tensor) -> Tensor:
        x = x.to(entries.dtype)
        grads = completion_loss_and_gradients(x.new_zeros(m, x.shape[1]), None, x.t(), entries, wanted=("left",), **biases)[1]  # type: ignore[arg-type]
        assert grads.left is not None
        return grads.left.double()

    def rmatmul(x: Tensor) -> Tensor:
        x = x.to(entries.dtype)
        grads = completion_loss_and_gradients(x, None, x.new_zeros(x.shape[1], n), entries, wanted=("right",), **biases)[1]  # type: ignore[arg-type]
        assert grads.right is not None
        product = grads.right.t().double()
        return product if rows is None else rows.sum(product)[0]

    return LinearOperator((m if rows is None else rows.total, n), matmul, rmatmul, entries.device, rows)


def top_singular_vectors(
    matrix: Tensor | LinearOperator,
    rank: int,
    *,
    oversampling: int = 8,
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(u, s, v)``: the top singular vectors ``(m, rank)``, ``(n, rank)`` and values ``(rank,)`` in float64.

    Randomized range finder with ``iterations`` power steps, orthonormalised after each product; seeded by ``generator``
    (a CPU generator, so that a seed means the same on every device). Canonical signs: in each column of u the entry of
    largest magnitude is positive.

    Raises:
        ValueError: rank below 1 or above ``min(m, n)``.
    """
    if isinstance(matrix, Tensor):
        dense = matrix.double()
        matrix = LinearOperator((dense.shape[0], dense.shape[1]), dense.matmul, dense.t().matmul, dense.device)
    m, n = matrix.shape
    rows = matrix.rows or RowShard.of(Team(), m)
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"top_singular_vectors: rank must be from 1 to min{(m, n)} = {min(m, n)}, got {rank}")
    samples = min(rank + oversampling, m, n)
    x = torch.randn(n, samples, generator=generator, dtype=torch.float64, device="cpu").to(matrix.device)
    y, _ = rows.qr(matrix.matmul(x))
    for _ in range(iterations):
        y, _ = rows.qr(matrix.matmul(torch.linalg.qr(matrix.rmatmul(y)).Q))
    q, r = torch.linalg.qr(matrix.rmatmul(y))  # D^T y = q r, so y y^T D = y r^T q^T
    small_u, s, small_vh = torch.linalg.svd(r.t())
    u, v = y @ small_u[:, :rank], q @ small_vh[:rank].t()
    signs = torch.where(rows.largest(u) < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, s[:rank], v * signs


def matched_frames(
    u: Tensor, v: Tensor, *, generator: torch.Generator | None = None, rows: RowShard | None = None
) -> tuple[Tensor, Tensor]:
    """Orthonormal ``left`` (m, 2 r) and ``right`` (2 r, n) distributed as those of a Haar orthogonal P, without P.

    B stands for ``P^T u`` and C for ``P v``: B is a random frame, ``K = B^T v``, and
    ``C = u K + Z (I - K^T K)^{1/2}`` with Z a random frame orthogonal to u, so that ``[v, B]`` and ``[C, u]`` have the
    same Gram matrix. Needs ``2 r <= min(m, n)``. With ``rows``, u and left are the rows that are here.
    """
    m, r = u.shape
    rows = rows or RowShard.of(Team(), m)
    b = haar(v.shape[0], r, generator=generator, dtype=torch.float64).to(v.device)
    k = b.t() @ v
    z = rows.normal(r, generator).to(u.device)
    z = z - u @ rows.sum(u.t() @ z)[0]
    z = rows.orthonormal(z - u @ rows.sum(u.t() @ z)[0])  # twice: orthogonal to rounding even where m is barely 2 r
    values, vectors = torch.linalg.eigh(torch.eye(r, dtype=k.dtype, device=k.device) - k.t() @ k)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    c = u @ k + z @ root
    basis, triangle = torch.linalg.qr(torch.cat([v, b], 1))
    signs = torch.where(torch.diagonal(triangle) < 0, -1.0, 1.0).to(basis.dtype)
    left = torch.linalg.solve_triangular(triangle, torch.cat([c, u], 1), upper=True, left=False)
    return left * signs, (basis * signs).t()


def aligned_frames(
    u: Tensor, s: Tensor, v: Tensor, *, tol: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``left = -u`` (m, k) and ``right = v^T`` (k, n): where the loss falls fastest as ``left diag(c) right`` grows from zero.

    Singular vectors of values up to ``tol`` times the largest are rounding; they make room for random ones.
    """
    known = int((s > tol * s[0]).sum())
    return -_completed(u, known, generator), _completed(v, known, generator).t()


def _completed(q: Tensor, known: int, generator: torch.Generator | None) -> Tensor:
    """The first ``known`` orthonormal columns, and random ones orthogonal to them in place of the others."""
    if known == q.shape[1]:
        return q
    kept = q[:, :known]
    fill = torch.randn(q.shape[0], q.shape[1] - known, generator=generator, dtype=torch.float64, device="cpu").to(q.device)
    fill = fill - kept @ (kept.t() @ fill)
    return torch.cat([kept, orthonormal(fill - kept @ (kept.t() @ fill))], 1)


def compress(
    gradient: Tensor | LinearOperator,
    rank: int,
    *,
    depth: int = 3,
    init_scale: float = 1e-3,
    form: str = "sampled",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> CompressedFactors:
    r"""Compress a deep factorization at its start, from the gradient ``D`` of the loss at ``X = 0``.

    .. math:: \hat X = left \cdot core_{L-1} \cdots core_0 \cdot right, \qquad core_l = \epsilon I

    Args:
        gradient: ``(m, n)`` tensor, or an operator such as :func:`masked_gradient`; its sign does not matter.
        rank: the inner width k, even: k / 2 singular directions of the gradient and their k / 2 images.
        depth: number L of cores, at least 1.
        init_scale: epsilon of every layer; the product starts with all singular values epsilon^L.
        form: ``"sampled"`` never forms the m x n orthogonal product P; ``"exact"`` draws it (square gradients only).
        generator: a CPU ``torch.Generator``; the same seed gives the same factors on every device.
        dtype: of the factors; default float32, or float64 for a float64 gradient tensor.

    Returns:
        ``CompressedFactors(left (m, k), core (L, k, k), right (k, n))``; left and right orthonormal.

    Raises:
        ValueError: an odd rank, a rank above ``min(m, n)``, a depth below 1, a non-finite gradient, an unknown form.

    Note:
        The basis is canonical (QR with a positive diagonal, signed singular vectors): gradient descent does not depend on
        the basis, Adam does. All algebra is float64 with O((m + n) k^2) work after the products with D.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> target = torch.outer(torch.arange(1.0, 7.0), torch.ones(5))
        >>> left, core, right = lrk.compress(-target, rank=2, generator=torch.Generator().manual_seed(0))
        >>> left.shape, core.shape, right.shape
        (torch.Size([6, 2]), torch.Size([3, 2, 2]), torch.Size([2, 5]))

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, Theorem 2.1 and section 3.
    """
    m, n = gradient.shape
    if rank < 2 or rank % 2:
        raise ValueError(
            f"compress: rank must be even and at least 2 (half of it are directions of the gradient), got {rank}; "
            f"use {max(2, rank + rank % 2)}"
        )
    if rank > min(m, n):
        raise ValueError(f"compress: rank must be at most min(m, n) = {min(m, n)} for a gradient of shape {(m, n)}, got {rank}")
    if depth < 1:
        raise ValueError(f"compress: depth must be at least 1, got {depth}")
    if form not in ("sampled", "exact"):
        raise ValueError(f"compress: form must be 'sampled' or 'exact', got {form!r}")
    if isinstance(gradient, Tensor) and not bool(torch.isfinite(gradient).all()):
        raise ValueError("compress: gradient must be finite, got NaN or infinity; check the loss and the data")
    rows = None if isinstance(gradient, Tensor) else gradient.rows
    if form == "exact" and rows is not None and not rows.alone:
        raise ValueError("compress: form='exact' needs the whole gradient in one process; use form='sampled'")
    if form == "exact" and m != n:
        raise ValueError(f"compress: form='exact' needs a square gradient, got shape {(m, n)}; use form='sampled'")
    if dtype is None:
        dtype = torch.float64 if isinstance(gradient, Tensor) and gradient.dtype == torch.float64 else torch.float32
    u, _, v = top_singular_vectors(gradient, rank // 2, generator=generator)
    if not bool(torch.isfinite(v).all()):  # v, and not u: every process has the whole of it
        raise ValueError("compress: the gradient's products are not finite; check the loss and the data")
    if form == "exact":
        orthogonal = haar(m, m, generator=generator, dtype=torch.float64).to(u.device)
        left, right = implicit_form(orthogonal, u, v)
    else:
        left, right = matched_frames(u, v, generator=generator, rows=rows)
    core = init_scale * torch.eye(rank, dtype=dtype, device=u.device).repeat(depth, 1, 1)
    return CompressedFactors(left.to(dtype).contiguous(), core, right.t().to(dtype).contiguous().t())

"""Reference of the completion op, in plain PyTorch: specification, test oracle, bench baseline and fallback.

    E_ij = <left_i, (core[L-1] ... core[0]) right_:,j> + b_i + c_j + mu - m_ij      (i, j) observed
    loss = 1/2 sum w_ij E_ij^2

Source: Yaras et al., ICML 2024, arXiv:2406.04112, equations (10) and (11); biases and weights are the usual extension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..entries import ObservedEntries, SortedEntries
from .core import core_product


def completion_loss(
    left: Tensor,  # (m, k)
    core: Tensor | None,  # (L, k, k)
    right: Tensor,  # (k, n)
    entries: ObservedEntries,
    *,
    row_bias: Tensor | None = None,  # (m,)
    col_bias: Tensor | None = None,  # (n,)
    offset: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """Half the weighted squared error over the observed entries; see :func:`lowrank_kernels.ops.completion_loss`."""
    row, col, values, weights = entries.coo()
    product = core_product(core)
    p = left if product is None else left @ product  # (m, k)
    error = (p[row] * right.t()[col]).sum(1) + offset - values  # (Z,)
    if row_bias is not None:
        error = error + row_bias[row]
    if col_bias is not None:
        error = error + col_bias[col]
    squared = error.square() if weights is None else weights * error.square()
    loss = squared.sum() / 2
    return loss / len(entries) if reduction == "mean" else loss


def completion_pass(
    side: SortedEntries,
    own: Tensor,  # (M, K)
    other: Tensor,  # (N, K)
    own_bias: Tensor | None,
    other_bias: Tensor | None,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, ``own_grad`` (M, K), ``own_bias_grad`` (M,) and ``own_loss`` (M,) of one side, formulas in csrc/completion.h."""
    own_index = torch.repeat_interleave(
        torch.arange(own.shape[0], device=own.device), side.offsets.diff(), output_size=side.indices.shape[0]
    )
    other_index = side.indices.to(torch.int64)
    gathered = other[other_index]  # (Z, K)
    error = (own[own_index] * gathered).sum(1) + offset - side.values
    if own_bias is not None:
        error = error + own_bias[own_index]
    if other_bias is not None:
        error = error + other_bias[other_index]
    weighted = error if side.weights is None else side.weights * error
    loss = (weighted.double() * error.double()).sum() / 2
    own_grad = torch.zeros_like(own).index_add_(0, own_index, weighted[:, None] * gathered)
    own_bias_grad = own.new_zeros(own.shape[0]).index_add_(0, own_index, weighted)
    own_loss = own.new_zeros(own.shape[0]).index_add_(0, own_index, weighted * error)
    return loss.to(own.dtype), own_grad, own_bias_grad, own_loss

"""Masked completion: loss and all gradients on the observed entries only, in two passes over them.

The loss is a scalar, so its gradients are computed together with it (each pass reads an entry once for both) and backward
only scales them. The private op ``_completion`` works on ``P = left @ core[L-1] ... core[0]`` and ``V = right^T``; the
products with the small cores stay with torch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native, reference
from ..entries import MAX_WIDTH, ObservedEntries, SortedEntries
from ..reference.completion import completion_pass as reference_pass
from ..reference.core import core_gradients, core_product
from .registry import define, eager, forward_ad_active, functorch_active, library, no_autocast, same, shaped

_SIDE = "Tensor {0}_offsets, Tensor {0}_index, Tensor {0}_values, Tensor? {0}_weights, Tensor {0}_plan, int {0}_long"
define(
    "_completion(Tensor p, Tensor v, Tensor? row_bias, Tensor? col_bias, float offset, "
    f"{_SIDE.format('row')}, {_SIDE.format('col')}, bool by_row, bool by_col) "
    "-> (Tensor loss, Tensor grad_p, Tensor grad_row_bias, Tensor row_loss, "
    "Tensor grad_v, Tensor grad_col_bias, Tensor col_loss)"
)
_op = torch.ops.lowrank_kernels._completion.default

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class CompletionGradients(NamedTuple):
    """Gradients of the completion loss, each of its argument's shape; None where not wanted."""

    left: Tensor | None
    core: Tensor | None
    right: Tensor | None
    row_bias: Tensor | None
    col_bias: Tensor | None


# ---------------------------------------------------------------------- the op's kernels


def _composite(p: Tensor, v: Tensor, row_bias: Tensor | None, col_bias: Tensor | None, offset: float, *rest: Any) -> Outputs:
    by_row, by_col, want_row, want_col = SortedEntries(*rest[:6]), SortedEntries(*rest[6:12]), rest[12], rest[13]

    def empty() -> tuple[Tensor, Tensor, Tensor]:
        return p.new_empty(0), p.new_empty(0), p.new_empty(0)

    loss, *rows = reference_pass(by_row, p, v, row_bias, col_bias, offset)
    cols = reference_pass(by_col, v, p, col_bias, row_bias, offset)[1:] if want_col else empty()
    return (loss, *(rows if want_row else empty()), *cols)


def _native_passes(
    p: Tensor, v: Tensor, row_bias: Tensor | None, col_bias: Tensor | None, offset: float, *rest: Any
) -> Outputs:
    if not _native.serves(p.device):  # a GPU older than the kernels
        return _composite(p, v, row_bias, col_bias, offset, *rest)
    by_row, by_col, want_row, want_col = SortedEntries(*rest[:6]), SortedEntries(*rest[6:12]), rest[12], rest[13]
    k = p.shape[1]
    extra = -k % _native.factor_lanes(p.dtype, p.device)
    if extra:  # a program exported on a processor with shorter vectors
        p, v = F.pad(p, (0, extra)), F.pad(v, (0, extra))
    rows = want_row or not want_col  # the loss comes from the rows pass, or from the only one that runs
    loss: Tensor | None = None
    row_sums = col_sums = None
    if rows:
        loss, *row_sums = _native.completion_pass(by_row, p, v, row_bias, col_bias, offset, want_grad=want_row)
    if want_col:
        col_loss, *col_sums = _native.completion_pass(by_col, v, p, col_bias, row_bias, offset, want_loss=not rows)
        loss = col_loss if loss is None else loss
    row_sums, col_sums = ([p.new_empty(0) for _ in range(3)] if sums is None else sums for sums in (row_sums, col_sums))
    if extra:
        row_sums[0], col_sums[0] = (x[:, :k].contiguous() if x.ndim == 2 else x for x in (row_sums[0], col_sums[0]))
    return (loss, *row_sums, *col_sums)  # type: ignore[return-value]


def _fake(p: Tensor, v: Tensor, row_bias: Tensor | None, col_bias: Tensor | None, offset: float, *rest: Any) -> Outputs:
    m, n = (p.shape[0] if rest[12] else 0), (v.shape[0] if rest[13] else 0)
    return (
        p.new_empty(()),
        p.new_empty(p.shape if rest[12] else 0),
        p.new_empty(m),
        p.new_empty(m),
        p.new_empty(v.shape if rest[13] else 0),
        p.new_empty(n),
        p.new_empty(n),
    )


library.impl("_completion", _composite, "CompositeExplicitAutograd")
if _native.has_cpu():
    library.impl("_completion", _native_passes, "CPU")
if _native.has_cuda():
    library.impl("_completion", _native_passes, "CUDA")
torch.library.register_fake("lowrank_kernels::_completion", _fake, lib=library)


def _run(p: Tensor, v: Tensor, *rest: Any) -> Outputs:
    """The op; without the dispatcher where nothing needs it."""
    return (_native_passes if eager(p, v) and _native.serves(p.device) else _op)(p, v, *rest)


# ---------------------------------------------------------------------- loss and gradients


def _loss_and_gradients(
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    offset: float,
    entries: ObservedEntries,
    wanted: tuple[bool, bool, bool, bool, bool],  # left, core, right, row_bias, col_bias
) -> tuple[Tensor, CompletionGradients]:
    k = left.shape[1]
    lanes = _native.factor_lanes(left.dtype, left.device)
    extra = (lanes - k % lanes) % lanes  # -k % lanes, in a form whose sign torch.compile of 2.4 sees for a symbolic k
    product = core_product(core)
    # Padding the k x k product pads P for free.
    padded = None if product is None else F.pad(product, (0, extra)) if extra else product
    p = left @ padded if padded is not None else F.pad(left, (0, extra)) if extra else left
    v = F.pad(right.t(), (0, extra)) if extra else right.t()
    by_row, by_col = wanted[0] or wanted[1] or wanted[3], wanted[2] or wanted[4]
    loss, grad_p, grad_row_bias, _, grad_v, grad_col_bias, _ = _run(
        p.contiguous(), v.contiguous(), row_bias, col_bias, offset, *entries.by_row, *entries.by_col, by_row, by_col
    )
    grad_left = grad_core = None
    if wanted[0]:
        grad_left = grad_p @ padded.t() if padded is not None else grad_p[:, :k]
    if wanted[1] and core is not None:
        grad_core = torch.zeros_like(core) if padded is None else core_gradients(core, (left.t() @ grad_p)[:, :k])
    return loss, CompletionGradients(
        grad_left,
        grad_core,
        grad_v[:, :k].t() if wanted[2] else None,
        grad_row_bias if wanted[3] and row_bias is not None else None,
        grad_col_bias if wanted[4] and col_bias is not None else None,
    )


class _CompletionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        core: Tensor | None,
        right: Tensor,
        row_bias: Tensor | None,
        col_bias: Tensor | None,
        offset: float,
        entries: ObservedEntries,
    ) -> Tensor:
        loss, grads = _loss_and_gradients(
            left, core, right, row_bias, col_bias, offset, entries, tuple(ctx.needs_input_grad[:5])
        )
        ctx.save_for_backward(left, core, right, row_bias, col_bias, *grads)
        ctx.offset, ctx.entries = offset, entries
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: by formulas autograd can differentiate again
            # Views: where one factor depends on another (right = left.t()) grad() would else count that path twice.
            inputs: list[Any] = [None if x is None else x.view_as(x) for x in saved[:5]]
            left, core, right, row_bias, col_bias = inputs
            with torch.autocast(left.device.type, enabled=False):
                loss = reference.completion_loss(
                    left, core, right, ctx.entries, row_bias=row_bias, col_bias=col_bias, offset=ctx.offset
                )
                needed = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
                grads = iter(torch.autograd.grad(loss, needed, grad, create_graph=True, materialize_grads=True))
            return (*(next(grads) if need else None for need in ctx.needs_input_grad[:5]), None, None)
        return (*(None if g is None else g * grad for g in saved[5:]), None, None)


def _check(
    op: str,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    entries: ObservedEntries,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    offset: float,
    reduction: str,
) -> None:
    if not isinstance(entries, ObservedEntries):
        raise TypeError(f"{op}: entries must be ObservedEntries, got {type(entries).__name__}; build one with from_coo()")
    factors = {"left": left, "core": core, "right": right, "row_bias": row_bias, "col_bias": col_bias}
    for name, given in factors.items():
        if not isinstance(given, Tensor) and (given is not None or name in ("left", "right")):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(given).__name__}")
    if isinstance(offset, Tensor):
        raise TypeError(f"{op}: offset must be a number, got a tensor; it has no gradient: add it to row_bias or use .item()")
    for name, tensor in (("left", left), ("right", right)):
        if tensor.ndim != 2:
            raise ValueError(f"{op}: {name} must have 2 dimensions, got shape {tuple(tensor.shape)}")
    m, n = entries.shape
    k = left.shape[1]
    if not 1 <= k <= MAX_WIDTH:
        raise ValueError(f"{op}: left must be (rows, rank) with rank from 1 to {MAX_WIDTH}, got {tuple(left.shape)}")
    shaped(op, "left", left, "(rows, rank)", (m, k))
    shaped(op, "right", right, "(rank, columns)", (k, n))
    if core is not None:
        if core.ndim != 3:
            raise ValueError(f"{op}: core must be (depth, rank, rank) or None, got shape {tuple(core.shape)}")
        shaped(op, "core", core, "(depth, rank, rank)", (core.shape[0], k, k))
    if row_bias is not None:
        shaped(op, "row_bias", row_bias, "(rows,)", (m,))
    if col_bias is not None:
        shaped(op, "col_bias", col_bias, "(columns,)", (n,))
    same(op, **factors, entries=entries.values)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"{op}: reduction must be 'sum' or 'mean', got {reduction!r}")


def completion_loss(
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    entries: ObservedEntries,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    offset: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    r"""Half the weighted squared error of a deep low-rank matrix on the observed entries.

    .. math::
        \ell = \tfrac12 \sum_{(i,j) \in \Omega} w_{ij} E_{ij}^2, \qquad
        E_{ij} = \langle left_i, C\, right_{:,j} \rangle + b_i + c_j + \mu - m_{ij}, \qquad
        C = core_{L-1} \cdots core_0

    Args:
        left: ``(m, k)`` float32 or float64, k from 1 to 1024.
        core: ``(L, k, k)``, L >= 0, or None for the two-factor model ``left @ right``.
        right: ``(k, n)``.
        entries: observed entries of shape ``(m, n)``, in the dtype and on the device of the factors.
        row_bias: ``(m,)`` biases b, or None.
        col_bias: ``(n,)`` biases c, or None.
        offset: the constant mu.
        reduction: ``"sum"``, or ``"mean"``: divided by the number of entries.

    Returns:
        The loss, a scalar tensor; differentiable in both outer factors, every core factor and both biases.

    Raises:
        ValueError: shapes that do not chain, devices that differ, an unknown reduction.
        TypeError: dtypes that differ or are not float32/float64.

    Note:
        Gradients are computed together with the loss, in two passes over the entries; nothing of size entries x k is
        stored. Gradients sum over a row in the dtype of the factors; the loss sums runs of 256 entries in it and the runs
        in float64. The result is bitwise the same from run to run and for any number of threads
        (``torch.set_num_threads`` is obeyed). Second derivatives, forward mode and ``torch.func`` transforms go through
        :func:`lowrank_kernels.reference.completion_loss`. Under autocast it computes in the dtype of the factors.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> entries = lrk.ObservedEntries.from_coo([0, 1, 1], [0, 0, 2], [1.0, 2.0, 3.0], shape=(2, 3))
        >>> left, core, right = torch.ones(2, 2), torch.eye(2).repeat(3, 1, 1), torch.ones(2, 3, requires_grad=True)
        >>> loss = lrk.ops.completion_loss(left, core, right, entries)
        >>> loss.item()
        1.0
        >>> loss.backward(); right.grad
        tensor([[ 1.,  0., -1.],
                [ 1.,  0., -1.]])

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, equations (10) and (11).
    """
    _check("completion_loss", left, core, right, entries, row_bias, col_bias, offset, reduction)
    if functorch_active() or forward_ad_active():
        with torch.autocast(left.device.type, enabled=False):
            return reference.completion_loss(
                left, core, right, entries, row_bias=row_bias, col_bias=col_bias, offset=offset, reduction=reduction
            )
    factors = (left, core, right, row_bias, col_bias)
    with no_autocast(left.device.type):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in factors):
            loss = _CompletionLoss.apply(*factors, offset, entries)
        else:
            loss, _ = _loss_and_gradients(*factors, offset, entries, (False,) * 5)
    return loss / len(entries) if reduction == "mean" else loss


@torch.no_grad()
def completion_loss_and_gradients(
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    entries: ObservedEntries,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    offset: float = 0.0,
    wanted: Collection[str] = CompletionGradients._fields,
) -> tuple[Tensor, CompletionGradients]:
    """The loss of :func:`completion_loss` (``reduction="sum"``) and its gradients, without autograd.

    For solvers: the same kernels and the same numbers, less about 0.1 ms of graph bookkeeping a step. The gradient of
    ``right`` is a transposed view, so a solver that keeps ``right.t()`` contiguous copies nothing. ``wanted`` names the
    gradients to compute, of ``left``, ``core``, ``right``, ``row_bias`` and ``col_bias``; the others are None.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> entries = lrk.ObservedEntries.from_coo([0, 1, 1], [0, 0, 2], [1.0, 2.0, 3.0], shape=(2, 3))
        >>> loss, grads = lrk.ops.completion_loss_and_gradients(torch.ones(2, 2), None, torch.ones(2, 3), entries)
        >>> grads.left
        tensor([[ 1.,  1.],
                [-1., -1.]])
    """
    _check("completion_loss_and_gradients", left, core, right, entries, row_bias, col_bias, offset, "sum")
    flags = ("left" in wanted, "core" in wanted, "right" in wanted, "row_bias" in wanted, "col_bias" in wanted)
    return _loss_and_gradients(left, core, right, row_bias, col_bias, offset, entries, flags)


class SideSums(NamedTuple):
    """What one side's pass gives: ``grad`` (M, k), ``bias_grad`` (M,) and ``loss`` (M,), the sums of w E^2."""

    grad: Tensor
    bias_grad: Tensor
    loss: Tensor


@torch.no_grad()
def completion_sides(
    p: Tensor,  # (m, k): left @ core[L-1] ... core[0]
    v: Tensor,  # (n, k): right^T
    entries: ObservedEntries,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    offset: float = 0.0,
    by_row: bool = True,
    by_col: bool = True,
) -> tuple[Tensor, SideSums, SideSums]:
    """Loss and the sums of both sides, for solvers; the sums of a side that is not asked for are empty."""
    k = p.shape[1]
    extra = -k % _native.factor_lanes(p.dtype, p.device)
    if extra:
        p, v = F.pad(p, (0, extra)), F.pad(v, (0, extra))
    loss, *sums = _run(
        p.contiguous(), v.contiguous(), row_bias, col_bias, offset, *entries.by_row, *entries.by_col, by_row, by_col
    )
    rows, cols = SideSums(*sums[:3]), SideSums(*sums[3:])
    if extra:
        rows, cols = (side._replace(grad=side.grad[:, :k]) if side.grad.ndim == 2 else side for side in (rows, cols))
    return loss, rows, cols


def entry_sums(entries: ObservedEntries, other: Tensor, *, by: str) -> tuple[Tensor, Tensor]:
    """``sum_j w_ij other_j`` (M, k) and ``sum_j w_ij`` (M,) over the observed entries of every row or column.

    A completion pass whose errors are all 1: values 0, own factor 0, offset 1.
    """
    own = other.new_zeros(entries.shape[0 if by == "row" else 1], other.shape[1])
    zeros = torch.zeros_like(entries.values)
    ones = ObservedEntries(entries.shape, entries.by_row._replace(values=zeros), entries.by_col._replace(values=zeros))
    p, v = (own, other) if by == "row" else (other, own)
    _, rows, cols = completion_sides(p, v, ones, offset=1.0, by_row=by == "row", by_col=by == "col")
    side = rows if by == "row" else cols
    return side.grad, side.bias_grad

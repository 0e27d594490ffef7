"""Observed entries of a matrix, sorted once by rows and once by columns: what the completion op reads every step.

Each side is a compressed-sparse list (``offsets``, ``index``, ``values``); keeping both costs 16 bytes an entry in float32
and lets each gradient be written by a single owner, without atomics and without a permutation gather.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
MAX_WIDTH = 1024  # widest factor of the native kernels; offsets row * width must fit in int64
UNIT_ENTRIES = 4096  # entries in a CPU unit of work: about 5 us, against 0.1 us to hand one out
LONG_ROW = 1024  # CUDA: longer rows are split into segments of this many entries


class SortedEntries(NamedTuple):
    """The entries sorted by one side, rows or columns."""

    offsets: Tensor  # (own + 1,) int64: the entries of row i are [offsets[i], offsets[i + 1])
    indices: Tensor  # (Z,) int32 or int64: the other side's index, ascending inside a row
    values: Tensor  # (Z,)
    weights: Tensor | None  # (Z,)
    plan: Tensor  # int64: how a kernel divides the rows, see _plan()
    long_count: int  # CUDA: rows longer than LONG_ROW


class ObservedEntries:
    r"""Observed entries :math:`m_{ij}, (i, j) \in \Omega` of a matrix, ready for :func:`lowrank_kernels.ops.completion_loss`.

    Build it once with :meth:`from_coo`, :meth:`from_scipy` or :meth:`from_dense`. It is immutable and holds the entries
    sorted by rows (``by_row``) and by columns (``by_col``), with 32-bit indices where the shape allows.

    Example:
        >>> import lowrank_kernels as lrk
        >>> entries = lrk.ObservedEntries.from_coo([0, 0, 2], [1, 3, 0], [5.0, 3.0, 4.0], shape=(3, 4))
        >>> entries
        ObservedEntries(shape=(3, 4), entries=3, density=25%, dtype=float32, index=int32, device=cpu)
    """

    shape: tuple[int, int]
    by_row: SortedEntries
    by_col: SortedEntries

    def __init__(self, shape: tuple[int, int], by_row: SortedEntries, by_col: SortedEntries) -> None:
        self.shape = shape
        self.by_row = by_row
        self.by_col = by_col

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_coo(
        cls,
        row: ArrayLike | Tensor,  # (Z,) integers
        col: ArrayLike | Tensor,  # (Z,) integers
        values: ArrayLike | Tensor,  # (Z,)
        *,
        shape: tuple[int, int] | None = None,
        weights: ArrayLike | Tensor | None = None,
        duplicates: str = "error",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ObservedEntries:
        """Build from coordinate triplets, in any order.

        Args:
            row, col: ``(Z,)`` integer indices, zero-based.
            values: ``(Z,)`` finite numbers.
            shape: ``(rows, columns)``; by default the largest indices plus one. Rows and columns without entries are fine.
            weights: ``(Z,)`` finite, non-negative weights ``w_ij`` of the squared errors; by default all 1.
            duplicates: what a pair given twice means: ``"error"``; ``"mean"`` (weighted mean of the values; weights add);
                ``"last"`` (the one given last counts).
            dtype: float32 or float64; by default that of ``values``, or torch's default for integers and lists.
            device: where the entries live; by default that of ``values``.

        Raises:
            ValueError: no entries, lengths that differ, an index out of range, a non-finite value, a negative weight,
                duplicates under ``"error"``; the message names the first offending position.
            TypeError: indices that are not integers, values that are not real numbers.
        """
        row_t, col_t = _indices("row", row), _indices("col", col)
        values_t = _reals("values", values, dtype)
        weights_t = None if weights is None else _reals("weights", weights, values_t.dtype)
        target = torch.device(device) if device is not None else values_t.device
        count = values_t.numel()
        for name, given in (("row", row_t), ("col", col_t), ("weights", weights_t)):
            if given is not None and given.numel() != count:
                raise ValueError(f"ObservedEntries: {name} must have as many elements as values, {count}, got {given.numel()}")
        if count == 0:
            raise ValueError("ObservedEntries: values is empty; at least one observed entry is needed")
        if duplicates not in ("error", "mean", "last"):
            raise ValueError(f"ObservedEntries: duplicates must be 'error', 'mean' or 'last', got {duplicates!r}")
        row_t, col_t, values_t = row_t.to(target), col_t.to(target), values_t.to(target)
        if weights_t is not None:
            weights_t = weights_t.to(target)
            _refuse(~torch.isfinite(weights_t) | (weights_t < 0), "weights", "finite and not negative", weights_t)
        shape = _shape(shape, row_t, col_t)
        _refuse((row_t < 0) | (row_t >= shape[0]), "row", f"in [0, {shape[0]})", row_t)
        _refuse((col_t < 0) | (col_t >= shape[1]), "col", f"in [0, {shape[1]})", col_t)
        _refuse(~torch.isfinite(values_t), "values", "finite", values_t)

        order = _row_major_order(row_t, col_t, shape)
        if order is not None:
            row_t, col_t, values_t = row_t[order], col_t[order], values_t[order]
            weights_t = None if weights_t is None else weights_t[order]
        else:  # copies: a later change of the caller's tensors would reach the rows and not the columns
            values_t = values_t.clone(memory_format=torch.contiguous_format)
            weights_t = None if weights_t is None else weights_t.clone(memory_format=torch.contiguous_format)
        repeated = (row_t[1:] == row_t[:-1]) & (col_t[1:] == col_t[:-1])
        if bool(repeated.any()):
            if duplicates == "error":
                first = int(repeated.nonzero()[0])
                raise ValueError(
                    f"ObservedEntries: {int(repeated.sum())} duplicate entries, the first at (row, col) = "
                    f"({int(row_t[first])}, {int(col_t[first])}); pass duplicates='mean' or duplicates='last' to merge them"
                )
            row_t, col_t, values_t, weights_t = _merge(row_t, col_t, values_t, weights_t, repeated, duplicates)
        return cls._from_sorted(row_t, col_t, values_t, weights_t, shape)

    @classmethod
    def from_scipy(cls, matrix: Any, *, duplicates: str = "error", **kwargs: Any) -> ObservedEntries:
        """Build from any ``scipy.sparse`` matrix or array: what is stored is observed, explicit zeros included.

        Repeated coordinates of a COO matrix are duplicates here (scipy would add them up); see :meth:`from_coo`.
        """
        if not hasattr(matrix, "tocoo"):
            raise TypeError(f"ObservedEntries.from_scipy: matrix must be a scipy.sparse matrix, got {type(matrix).__name__}")
        coo = matrix.tocoo()
        return cls.from_coo(coo.row, coo.col, coo.data, shape=tuple(coo.shape), duplicates=duplicates, **kwargs)

    @classmethod
    def from_dense(cls, matrix: ArrayLike | Tensor, mask: ArrayLike | Tensor | None = None, **kwargs: Any) -> ObservedEntries:
        """Build from a dense matrix whose missing cells are NaN, or from values and a boolean mask (True: observed).

        The masked cells of a ``numpy.ma.MaskedArray`` are missing.
        """
        if mask is None and isinstance(matrix, np.ma.MaskedArray):
            matrix, mask = matrix.filled(0), ~np.ma.getmaskarray(matrix)
        dense = _tensor("matrix", matrix)
        if dense.ndim != 2:
            raise ValueError(f"ObservedEntries.from_dense: matrix must have 2 dimensions, got shape {tuple(dense.shape)}")
        if mask is None:
            observed = ~torch.isnan(dense) if dense.is_floating_point() else torch.ones_like(dense, dtype=torch.bool)
        else:
            observed = _tensor("mask", mask).to(dense.device)
            if observed.dtype != torch.bool:
                raise TypeError(f"ObservedEntries.from_dense: mask must be boolean (True: observed), got {observed.dtype}")
            if observed.shape != dense.shape:
                raise ValueError(
                    f"ObservedEntries.from_dense: mask must have the shape of matrix, {tuple(dense.shape)}, "
                    f"got {tuple(observed.shape)}"
                )
        row, col = observed.nonzero(as_tuple=True)
        if not hasattr(matrix, "dtype"):
            kwargs = {"dtype": torch.get_default_dtype(), **kwargs}
        return cls.from_coo(row, col, dense[row, col], shape=(dense.shape[0], dense.shape[1]), **kwargs)

    @classmethod
    def _from_sorted(
        cls, row: Tensor, col: Tensor, values: Tensor, weights: Tensor | None, shape: tuple[int, int]
    ) -> ObservedEntries:
        """From checked triplets in row-major order without duplicates."""
        index_dtype = torch.int32 if max(shape) <= INT32_MAX else torch.int64
        row, col = row.to(index_dtype), col.to(index_dtype, copy=True)  # kept: not the caller's storage
        order = torch.sort(col, stable=True).indices  # stable: rows ascend inside a column
        by_row = _sorted_side(row, col, values, weights, shape[0])
        by_col = _sorted_side(col[order], row[order], values[order], None if weights is None else weights[order], shape[1])
        return cls(shape, by_row, by_col)

    @classmethod
    def from_sorted_csr(cls, matrix: Any) -> ObservedEntries:
        """From a canonical ``scipy.sparse.csr_array`` (sorted, no duplicates): not checked, its arrays are shared.

        Needs no memory beside its result: for entries that just fit.
        """
        shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        index = np.int32 if max(shape) <= INT32_MAX else np.int64

        def side(compressed: Any) -> SortedEntries:
            offsets = torch.from_numpy(compressed.indptr.astype(np.int64))
            indices = torch.from_numpy(compressed.indices.astype(index, copy=False))
            return SortedEntries(offsets, indices, torch.from_numpy(compressed.data), None, *_plan(offsets))

        return cls(shape, side(matrix), side(matrix.tocsc()))

    @classmethod
    def none(
        cls,
        shape: tuple[int, int],
        *,
        weighted: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> ObservedEntries:
        """No entry, for a process that has none of a matrix that several share; rows may be 0 too."""
        index, values = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=dtype, device=device)
        return cls._from_sorted(index, index, values, values.clone() if weighted else None, shape)

    # ------------------------------------------------------------------ views

    @property
    def T(self) -> ObservedEntries:
        """The transposed entries; shares all storage."""
        return ObservedEntries((self.shape[1], self.shape[0]), self.by_col, self.by_row)

    @property
    def values(self) -> Tensor:
        """``(Z,)`` values in row-major order."""
        return self.by_row.values

    @property
    def weights(self) -> Tensor | None:
        """``(Z,)`` weights in row-major order, or None."""
        return self.by_row.weights

    @property
    def dtype(self) -> torch.dtype:
        return self.by_row.values.dtype

    @property
    def device(self) -> torch.device:
        return self.by_row.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: 16 an entry plus 8 a row and column (float32, 32-bit indices, no weights)."""
        sides = (t for side in (self.by_row, self.by_col) for t in side if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in sides)

    def __len__(self) -> int:
        return self.by_row.values.numel()

    def __repr__(self) -> str:
        m, n = self.shape
        return (
            f"ObservedEntries(shape=({m}, {n}), entries={len(self)}, density={100 * len(self) / max(m * n, 1):.3g}%, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, index={str(self.by_row.indices.dtype).removeprefix('torch.')}, "
            f"device={self.device}{', weighted' if self.weights is not None else ''})"
        )

    def row_counts(self) -> Tensor:
        """``(rows,)`` int64: observed entries of each row."""
        return self.by_row.offsets.diff()

    def col_counts(self) -> Tensor:
        """``(columns,)`` int64: observed entries of each column."""
        return self.by_col.offsets.diff()

    def coo(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``(row, col, values, weights)`` in row-major order, indices as int64."""
        rows = torch.arange(self.shape[0], device=self.device)
        row = torch.repeat_interleave(rows, self.row_counts(), output_size=len(self))
        return row, self.by_row.indices.to(torch.int64), self.values, self.weights

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ObservedEntries:
        """The same entries on another device or in another dtype; returns self where nothing changes."""
        device = self.device if device is None else torch.device(device)
        dtype = self.dtype if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"ObservedEntries: dtype must be float32 or float64, got {dtype}")
        if device == self.device and dtype == self.dtype:
            return self

        def move(side: SortedEntries) -> SortedEntries:
            offsets = side.offsets.to(device)
            values, weights = side.values.to(device, dtype), None if side.weights is None else side.weights.to(device, dtype)
            for name, given in (("values", values), ("weights", weights)):
                if given is not None and dtype == torch.float32 != self.dtype:
                    _refuse(~torch.isfinite(given), name, "finite in float32", given)
            return SortedEntries(offsets, side.indices.to(device), values, weights, *_plan(offsets))

        return ObservedEntries(self.shape, move(self.by_row), move(self.by_col))

    def select(self, keep: Tensor) -> ObservedEntries:
        """The entries where ``keep`` is True; ``keep`` is a ``(Z,)`` boolean tensor in row-major order."""
        if not isinstance(keep, Tensor):
            raise TypeError(f"ObservedEntries.select: keep must be a boolean tensor, got {type(keep).__name__}")
        if keep.dtype != torch.bool or keep.shape != self.values.shape:
            raise ValueError(
                f"ObservedEntries.select: keep must be a boolean tensor of shape ({len(self)},), "
                f"got {keep.dtype} of shape {tuple(keep.shape)}"
            )
        if not bool(keep.any()):
            raise ValueError("ObservedEntries.select: keep selects no entry; at least one is needed")
        return self._kept(keep)

    def _kept(self, keep: Tensor) -> ObservedEntries:
        """:meth:`select`, of no entry too: a process may have none."""
        row, col, values, weights = self.coo()
        weights = None if weights is None else weights[keep]
        return self._from_sorted(row[keep], col[keep], values[keep], weights, self.shape)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.csr_array`` of the values (weights are dropped); needs scipy."""
        from scipy.sparse import csr_array

        arrays = (self.values.cpu().numpy(), self.by_row.indices.cpu().numpy(), self.by_row.offsets.cpu().numpy())
        return csr_array(arrays, shape=self.shape)


# ---------------------------------------------------------------------- helpers


def _tensor(name: str, data: ArrayLike | Tensor) -> Tensor:
    if isinstance(data, Tensor):
        return data.detach()
    array = np.asarray(data)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"ObservedEntries: {name} must hold numbers, got an array of dtype {array.dtype}")
    if array.dtype.kind == "u":
        if array.size and int(array.max()) > INT64_MAX:
            raise ValueError(f"ObservedEntries: {name} must fit in 64-bit signed integers, got {int(array.max())}")
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).copy())


def _indices(name: str, data: ArrayLike | Tensor) -> Tensor:
    t = _tensor(name, data)
    if t.ndim != 1:
        raise ValueError(f"ObservedEntries: {name} must have 1 dimension, got shape {tuple(t.shape)}")
    if t.is_floating_point() and t.numel() == 0:
        return t.to(torch.int64)
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"ObservedEntries: {name} must hold integers, got {t.dtype}")
    return t.to(torch.int64)


def _reals(name: str, data: ArrayLike | Tensor, dtype: torch.dtype | None) -> Tensor:
    t = _tensor(name, data)
    if t.ndim != 1:
        raise ValueError(f"ObservedEntries: {name} must have 1 dimension, got shape {tuple(t.shape)}")
    if t.is_complex():
        raise TypeError(f"ObservedEntries: {name} must hold real numbers, got {t.dtype}")
    if dtype is None:
        sized = hasattr(data, "dtype") and t.dtype in (torch.float32, torch.float64)  # Python numbers have no dtype
        dtype = t.dtype if sized else torch.get_default_dtype()
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"ObservedEntries: dtype must be float32 or float64, got {dtype}")
    return t.to(dtype)


def _shape(shape: tuple[int, int] | None, row: Tensor, col: Tensor) -> tuple[int, int]:
    if shape is None:
        return int(row.max()) + 1, int(col.max()) + 1
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"ObservedEntries: shape must be two integers (rows, columns), got {shape!r}") from None
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"ObservedEntries: shape must be two positive sizes (rows, columns), got {sizes}")
    for name, size in zip(("rows", "columns"), sizes, strict=True):
        if size > INT64_MAX // MAX_WIDTH:
            raise ValueError(
                f"ObservedEntries: shape has {size} {name}; times a factor width of {MAX_WIDTH} this overflows 64-bit "
                f"offsets, at most {INT64_MAX // MAX_WIDTH} fit: relabel the {name} to 0..count-1"
            )
    return sizes[0], sizes[1]


def _refuse(bad: Tensor, name: str, wanted: str, given: Tensor) -> None:
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"ObservedEntries: {name} must be {wanted}, got {given[first].item()} at position {first} "
            f"({int(bad.sum())} such positions)"
        )


def _row_major_order(row: Tensor, col: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """The stable permutation that sorts by (row, col); None when already sorted."""
    if shape[0] <= INT64_MAX // shape[1]:
        key = row * shape[1] + col
        return None if bool((key[1:] >= key[:-1]).all()) else torch.sort(key, stable=True).indices
    by_col = torch.sort(col, stable=True).indices
    return by_col[torch.sort(row[by_col], stable=True).indices]


def _merge(
    row: Tensor, col: Tensor, values: Tensor, weights: Tensor | None, repeated: Tensor, policy: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One entry a pair from sorted triplets; ``repeated[e]``: entry e + 1 has the pair of entry e."""
    edge = torch.ones(1, dtype=torch.bool, device=row.device)
    if policy == "last":  # the sort was stable: the last of a run was given last
        keep = torch.cat([~repeated, edge])
        return row[keep], col[keep], values[keep], None if weights is None else weights[keep]
    first = torch.cat([edge, ~repeated])
    group = first.cumsum(0) - 1
    groups = int(group[-1]) + 1
    ones = torch.ones_like(values, dtype=torch.float64) if weights is None else weights.double()

    def total(x: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64, device=row.device).index_add_(0, group, x)

    weight = total(ones)
    if bool((weight == 0).any()):  # all weights of a group 0: its plain mean
        ones = ones + (weight == 0)[group]
    mean = (total(ones * values.double()) / total(ones)).to(values.dtype)
    return row[first], col[first], mean, None if weights is None else weight.to(weights.dtype)


def _sorted_side(own: Tensor, other: Tensor, values: Tensor, weights: Tensor | None, size: int) -> SortedEntries:
    offsets = torch.zeros(size + 1, dtype=torch.int64, device=own.device)
    counts = torch.bincount(own, minlength=size)
    torch.cumsum(counts, 0, out=offsets[1:])
    return SortedEntries(offsets, other.contiguous(), values.contiguous(), weights, *_plan(offsets))


def _plan(offsets: Tensor) -> tuple[Tensor, int]:
    """How a kernel divides the rows; depends on the entries only, so results do not depend on the number of threads.

    CPU: the row boundaries of units of about UNIT_ENTRIES entries. CUDA: for the L rows longer than LONG_ROW their
    numbers (L), their first segments (L + 1) and each segment's place in the list (S), concatenated; and L.
    """
    size = offsets.numel() - 1
    if offsets.device.type == "cuda":
        counts = offsets.diff()
        rows = (counts > LONG_ROW).nonzero()[:, 0]
        segments = (counts[rows] + LONG_ROW - 1) // LONG_ROW
        first = torch.cat([torch.zeros(1, dtype=torch.int64, device=offsets.device), segments.cumsum(0)])
        owner = torch.repeat_interleave(torch.arange(rows.numel(), device=offsets.device), segments)
        return torch.cat([rows, first, owner]), rows.numel()
    if size == 0:
        return torch.zeros(2, dtype=torch.int64, device=offsets.device), 0
    work = offsets + 8 * torch.arange(size + 1, device=offsets.device)  # a row costs about 8 entries by itself
    units = int(work[-1]) // UNIT_ENTRIES
    cuts = torch.searchsorted(work, torch.arange(1, units + 1, device=offsets.device) * UNIT_ENTRIES)
    ends = torch.tensor([0, size], dtype=torch.int64, device=offsets.device)
    return torch.unique(torch.cat([ends, cuts])), 0

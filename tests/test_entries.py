"""ObservedEntries: every way to build it, what it refuses, and what it holds afterwards."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_kernels import ObservedEntries
from lowrank_kernels.entries import INT64_MAX, MAX_WIDTH, UNIT_ENTRIES, SortedEntries, _row_major_order
from lowrank_kernels.testing import skewed_entries

# A 4 x 5 matrix whose row 1 and columns 0, 4 have no entry; given in no order.
ROW, COL, VALUES, WEIGHTS = [3, 0, 2, 0, 3], [1, 3, 2, 1, 2], [5.0, 1.0, 4.0, 2.0, 3.0], [0.5, 1.0, 0.0, 2.0, 1.5]
SHAPE = (4, 5)
ORDER = [3, 1, 2, 0, 4]  # row-major


def small(**keywords: Any) -> ObservedEntries:
    return ObservedEntries.from_coo(ROW, COL, VALUES, **{"shape": SHAPE, "weights": WEIGHTS, **keywords})


def dense(entries: ObservedEntries) -> Tensor:
    matrix = torch.full(entries.shape, math.nan, dtype=entries.dtype)
    row, col, values, _ = entries.coo()
    matrix[row, col] = values
    return matrix


def well_formed(entries: ObservedEntries) -> None:
    """Both sides hold the same entries, sorted, in contiguous tensors that a kernel may read by pointer."""
    count = len(entries)
    triplets = []
    for side, size, other_size in ((entries.by_row, *entries.shape), (entries.by_col, *reversed(entries.shape))):
        assert side.offsets.dtype == torch.int64
        assert side.offsets.shape == (size + 1,)
        assert side.offsets[0] == 0
        assert side.offsets[-1] == count
        assert (side.offsets.diff() >= 0).all()
        own = torch.repeat_interleave(torch.arange(size), side.offsets.diff())
        key = own * other_size + side.indices
        assert (key.diff() > 0).all(), "not ascending inside a row, or a duplicate"
        assert side.plan[0] == 0
        assert side.plan[-1] == size
        assert (side.plan.diff() > 0).all()
        for tensor in (side.offsets, side.indices, side.values, side.plan, *([] if side.weights is None else [side.weights])):
            assert tensor.is_contiguous()
            assert not tensor.requires_grad
        weights = torch.ones_like(side.values) if side.weights is None else side.weights
        triplets.append((own, side.indices.long(), side.values, weights))
    row, col, values, weights = triplets[0]
    order = torch.sort(col, stable=True).indices
    for by_row, by_col in zip((col, row, values, weights), triplets[1], strict=True):
        assert torch.equal(by_row[order], by_col)


# ---------------------------------------------------------------------- from_coo


def test_from_coo_sorts_both_sides() -> None:
    entries = small(dtype=torch.float64)
    well_formed(entries)
    row, col, values, weights = entries.coo()
    assert row.tolist() == [ROW[i] for i in ORDER]
    assert col.tolist() == [COL[i] for i in ORDER]
    assert values.tolist() == [VALUES[i] for i in ORDER]
    assert weights is not None
    assert weights.tolist() == [WEIGHTS[i] for i in ORDER]
    assert entries.by_col.indices.tolist() == [0, 3, 2, 3, 0]
    assert entries.by_col.values.tolist() == [2, 5, 4, 3, 1]
    assert entries.row_counts().tolist() == [2, 0, 1, 2]
    assert entries.col_counts().tolist() == [0, 2, 2, 1, 0]
    assert (len(entries), entries.shape, entries.device.type) == (5, SHAPE, "cpu")


def as_tensor(x: list[Any]) -> Tensor:
    return torch.tensor(x)


def strided_tensor(x: list[Any]) -> Tensor:
    return torch.tensor(x).repeat_interleave(2)[::2]


def strided_array(x: list[Any]) -> np.ndarray:
    return np.array(x).repeat(3)[::3]


def reversed_array(x: list[Any]) -> np.ndarray:
    return np.array(x[::-1])[::-1]


def read_only_array(x: list[Any]) -> np.ndarray:
    array = np.array(x)
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    "make", [list, tuple, np.array, as_tensor, strided_tensor, strided_array, reversed_array, read_only_array]
)
@pytest.mark.parametrize("already_sorted", [False, True], ids=["any_order", "sorted"])
def test_kinds_of_input(make: Any, already_sorted: bool) -> None:
    order = ORDER if already_sorted else range(5)
    row, col, values, weights = (make([x[i] for i in order]) for x in (ROW, COL, VALUES, WEIGHTS))
    entries = ObservedEntries.from_coo(row, col, values, shape=SHAPE, weights=weights)
    well_formed(entries)
    wanted = small(dtype=entries.dtype)
    assert torch.equal(entries.values, wanted.values)
    assert torch.equal(entries.weights, wanted.weights)  # type: ignore[arg-type]
    assert torch.equal(entries.by_col.indices, wanted.by_col.indices)


@pytest.mark.parametrize("code", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">i4", ">i8", ">u2", ">u8", "<i4"])
def test_index_dtypes(code: str) -> None:
    entries = ObservedEntries.from_coo(np.array(ROW, code), np.array(COL, code), VALUES, shape=SHAPE)
    well_formed(entries)
    assert torch.equal(entries.by_row.indices, small().by_row.indices)
    assert entries.by_row.indices.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32])
def test_index_dtypes_of_tensors(dtype: torch.dtype) -> None:
    entries = ObservedEntries.from_coo(torch.tensor(ROW).to(dtype), torch.tensor(COL).to(dtype), VALUES, shape=SHAPE)
    assert torch.equal(entries.by_row.indices, small().by_row.indices)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array(VALUES, "f4"), torch.float32),
        (np.array(VALUES, "f8"), torch.float64),
        (np.array(VALUES, ">f8"), torch.float64),
        (np.array(VALUES, ">f4"), torch.float32),
        (np.array(VALUES, "f2"), torch.float32),
        (np.array(VALUES, "i8"), torch.float32),
        (np.array(VALUES, "u1"), torch.float32),
        (VALUES, torch.float32),
        ([5, 1, 4, 2, 3], torch.float32),
        (torch.tensor(VALUES, dtype=torch.float64), torch.float64),
        (torch.tensor(VALUES, dtype=torch.bfloat16), torch.float32),
        (torch.tensor(VALUES, dtype=torch.int32), torch.float32),
    ],
    ids=lambda x: x.dtype if isinstance(x, (np.ndarray, Tensor)) else str(x),
)
def test_value_dtypes(values: Any, wanted: torch.dtype) -> None:
    entries = ObservedEntries.from_coo(ROW, COL, values, shape=SHAPE)
    assert entries.dtype == wanted
    assert entries.values.tolist() == [VALUES[i] for i in ORDER]


def test_default_dtype_and_dtype_argument() -> None:
    torch.set_default_dtype(torch.float64)
    assert ObservedEntries.from_coo(ROW, COL, VALUES).dtype == torch.float64
    assert ObservedEntries.from_coo(ROW, COL, VALUES, dtype=torch.float32).dtype == torch.float32
    torch.set_default_dtype(torch.float32)
    exact = ObservedEntries.from_coo([0], [0], [0.1], weights=[0.3], dtype=torch.float64)
    assert exact.values.item() == 0.1, "rounded to float32 on the way"
    assert exact.weights is not None
    assert exact.weights.item() == 0.3


def test_shape_defaults_to_the_largest_indices() -> None:
    assert ObservedEntries.from_coo(ROW, COL, VALUES).shape == (4, 4)
    assert ObservedEntries.from_coo(ROW, COL, VALUES, shape=np.array([9, 8])).shape == (9, 8)  # type: ignore[arg-type]
    assert ObservedEntries.from_coo([0], [0], [1.0]).shape == (1, 1)


def test_values_that_require_grad_are_detached() -> None:
    entries = ObservedEntries.from_coo(
        ROW, COL, torch.tensor(VALUES, requires_grad=True), weights=torch.ones(5, requires_grad=True)
    )
    well_formed(entries)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_the_callers_tensors_are_copied(index_dtype: torch.dtype) -> None:
    """Already sorted input needs no permutation; kept as it is, a later change of it would reach one side only."""
    order = torch.tensor(ORDER)
    row, col = torch.tensor(ROW, dtype=index_dtype)[order], torch.tensor(COL, dtype=index_dtype)[order]
    values, weights = torch.tensor(VALUES)[order], torch.tensor(WEIGHTS)[order]
    entries = ObservedEntries.from_coo(row, col, values, shape=SHAPE, weights=weights)
    for tensor in (row, col, values, weights):
        tensor.fill_(0)
    well_formed(entries)
    assert entries.values.tolist() == [VALUES[i] for i in ORDER]


def test_arrays_are_copied() -> None:
    values = np.array(VALUES)[ORDER]
    entries = ObservedEntries.from_coo(np.array(ROW)[ORDER], np.array(COL)[ORDER], values, shape=SHAPE)
    values[:] = 0
    assert entries.values.tolist() == [VALUES[i] for i in ORDER]


def test_expanded_weights_are_written_out() -> None:
    row, col, values = (torch.tensor(x)[torch.tensor(ORDER)] for x in (ROW, COL, VALUES))
    entries = ObservedEntries.from_coo(row, col, values, shape=SHAPE, weights=torch.tensor(2.0).expand(5))
    well_formed(entries)
    assert entries.weights is not None
    assert entries.weights.untyped_storage().nbytes() == 20


# ---------------------------------------------------------------------- duplicates

# (0, 1) three times, (2, 0) twice, (1, 1) once; row-major: (0, 1), (1, 1), (2, 0)
TWICE = ([0, 2, 0, 1, 2, 0], [1, 0, 1, 1, 0, 1], [1.0, 4.0, 2.0, 7.0, 8.0, 6.0])


def test_duplicates_are_an_error() -> None:
    message = "3 duplicate entries, the first at (row, col) = (0, 1); pass duplicates='mean' or duplicates='last' to merge them"
    with pytest.raises(ValueError, match=re.escape(message)):
        ObservedEntries.from_coo(*TWICE)


def test_duplicates_last() -> None:
    entries = ObservedEntries.from_coo(*TWICE, weights=[1, 2, 3, 4, 5, 6], duplicates="last")
    well_formed(entries)
    assert entries.values.tolist() == [6, 7, 8]
    assert entries.weights is not None
    assert entries.weights.tolist() == [6, 4, 5]


def test_duplicates_mean() -> None:
    entries = ObservedEntries.from_coo(*TWICE, duplicates="mean")
    well_formed(entries)
    assert entries.values.tolist() == [3, 7, 6]
    assert entries.weights is None


def test_duplicates_weighted_mean() -> None:
    entries = ObservedEntries.from_coo(*TWICE, weights=[1, 0, 2, 3, 0, 1], duplicates="mean")
    well_formed(entries)
    assert entries.values.tolist() == [(1 + 4 + 6) / 4, 7, 6]  # (2, 0): all weights 0, the plain mean
    assert entries.weights is not None
    assert entries.weights.tolist() == [4, 3, 0]


def test_mean_is_taken_in_double() -> None:
    big = 2.0**24
    entries = ObservedEntries.from_coo([0] * 4, [0] * 4, np.array([big, 1, 1, 2], "f4"), duplicates="mean")
    assert entries.values.item() == np.float32((big + 4) / 4)


@pytest.mark.parametrize("duplicates", ["last", "mean"])
def test_no_duplicates_are_left_alone(duplicates: str) -> None:
    entries, wanted = small(duplicates=duplicates), small()
    assert torch.equal(entries.values, wanted.values)
    assert torch.equal(entries.weights, wanted.weights)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- from_scipy, from_dense


@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "lil", "dok", "dia", "bsr"])
@pytest.mark.parametrize("interface", ["array", "matrix"])
def test_from_scipy(kind: str, interface: str) -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="sparse matrices need scipy")
    if kind in ("dia", "bsr"):  # they store zeros of their own
        matrix = getattr(sparse, f"{kind}_{interface}")(np.arange(1.0, 7).reshape(2, 3))
        assert len(ObservedEntries.from_scipy(matrix)) >= 6
        return
    matrix = getattr(sparse, f"{kind}_{interface}")(sparse.coo_array((VALUES, (ROW, COL)), shape=SHAPE))
    entries = ObservedEntries.from_scipy(matrix, weights=None)
    well_formed(entries)
    assert (entries.shape, entries.dtype) == (SHAPE, torch.float64)
    assert entries.values.tolist() == [VALUES[i] for i in ORDER]


def test_from_scipy_keeps_explicit_zeros_and_sees_duplicates() -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="sparse matrices need scipy")
    entries = ObservedEntries.from_scipy(sparse.csr_array(([0.0, 1.0], [2, 0], [0, 1, 2]), shape=(2, 3)))
    assert entries.values.tolist() == [0, 1]
    repeated = sparse.coo_array(([1.0, 2.0], ([0, 0], [1, 1])), shape=(1, 2))
    with pytest.raises(ValueError, match="1 duplicate entries"):
        ObservedEntries.from_scipy(repeated)
    assert ObservedEntries.from_scipy(repeated, duplicates="mean", dtype=torch.float32).values.tolist() == [1.5]


def test_to_scipy_and_back() -> None:
    pytest.importorskip("scipy.sparse", reason="sparse matrices need scipy")
    entries = small(weights=None)
    matrix = entries.to_scipy()
    assert matrix.shape == SHAPE
    assert matrix.dtype == np.float32
    again = ObservedEntries.from_scipy(matrix)
    assert torch.equal(dense(again).nan_to_num(-1), dense(entries).nan_to_num(-1))


def test_masked_cells_are_missing() -> None:
    matrix = np.ma.masked_equal([[1.0, -99.0, 3.0], [4.0, 5.0, -99.0]], -99.0)
    entries = ObservedEntries.from_dense(matrix)
    row, col, values, _ = entries.coo()
    assert [row.tolist(), col.tolist(), values.tolist()] == [[0, 0, 1, 1], [0, 2, 0, 1], [1.0, 3.0, 4.0, 5.0]]
    assert len(ObservedEntries.from_dense(np.ma.array([[1.0, 2.0]]))) == 2  # nothing masked


def test_from_dense_with_nan() -> None:
    matrix = dense(small())
    for given in (matrix, matrix.numpy(), matrix.t().contiguous().t(), matrix.double()):
        entries = ObservedEntries.from_dense(given)
        well_formed(entries)
        assert entries.shape == SHAPE
        assert entries.values.tolist() == [VALUES[i] for i in ORDER]
    assert ObservedEntries.from_dense(matrix.double()).dtype == torch.float64
    assert ObservedEntries.from_dense(matrix.tolist()).dtype == torch.float32
    assert ObservedEntries.from_dense(matrix.tolist(), dtype=torch.float64).dtype == torch.float64


def test_from_dense_with_mask() -> None:
    matrix = torch.arange(6.0).view(2, 3)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    for given in (mask, mask.numpy(), mask.tolist()):
        assert ObservedEntries.from_dense(matrix, given).values.tolist() == [0, 2, 4]
    assert len(ObservedEntries.from_dense(matrix.long())) == 6, "integers have no NaN: all observed"
    matrix[0, 1] = math.nan  # hidden by the mask
    assert len(ObservedEntries.from_dense(matrix, mask)) == 3


# ---------------------------------------------------------------------- errors

NAN, INF = math.nan, math.inf
# (arguments that differ from a good call, exception, message)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "empty": ({"row": [], "col": [], "values": []}, ValueError, "values is empty; at least one observed entry is needed"),
    "row_length": ({"row": [0]}, ValueError, "row must have as many elements as values, 2, got 1"),
    "col_length": ({"col": [0, 1, 2]}, ValueError, "col must have as many elements as values, 2, got 3"),
    "weights_length": ({"weights": [1.0]}, ValueError, "weights must have as many elements as values, 2, got 1"),
    "row_negative": ({"row": [0, -1]}, ValueError, "row must be in [0, 3), got -1 at position 1 (1 such positions)"),
    "col_negative": ({"col": [-2, -1]}, ValueError, "col must be in [0, 4), got -2 at position 0 (2 such positions)"),
    "row_negative_no_shape": ({"row": [0, -1], "shape": None}, ValueError, "row must be in [0, 1), got -1 at position 1"),
    "row_range": ({"row": [3, 0]}, ValueError, "row must be in [0, 3), got 3 at position 0"),
    "col_range": ({"col": [0, 4]}, ValueError, "col must be in [0, 4), got 4 at position 1"),
    "row_float": ({"row": [0.0, 1.0]}, TypeError, "row must hold integers, got torch.float64"),
    "row_bool": ({"row": [True, False]}, TypeError, "row must hold integers, got torch.bool"),
    "row_strings": ({"row": ["a", "b"]}, TypeError, "row must hold numbers, got an array of dtype <U1"),
    "row_dims": ({"row": [[0, 1]]}, ValueError, "row must have 1 dimension, got shape (1, 2)"),
    "col_uint64": ({"col": np.array([0, 2**63], np.uint64)}, ValueError, "col must fit in 64-bit signed integers, got 9223"),
    "values_nan": ({"values": [1.0, NAN]}, ValueError, "values must be finite, got nan at position 1"),
    "values_inf": ({"values": [-INF, 1.0]}, ValueError, "values must be finite, got -inf at position 0"),
    "values_overflow": (
        {"values": np.array([1e300, 1.0]), "dtype": torch.float32},
        ValueError,
        "values must be finite, got inf at position 0",
    ),
    "values_complex": ({"values": [1j, 2j]}, TypeError, "values must hold numbers, got an array of dtype complex128"),
    "values_complex_tensor": (
        {"values": torch.tensor([1j, 2j])},
        TypeError,
        "values must hold real numbers, got torch.complex64",
    ),
    "values_objects": ({"values": [None, 1]}, TypeError, "values must hold numbers, got an array of dtype object"),
    "values_dims": ({"values": [[1.0], [2.0]]}, ValueError, "values must have 1 dimension, got shape (2, 1)"),
    "values_uint64": ({"values": np.array([0, 2**64 - 1], np.uint64)}, ValueError, "values must fit in 64-bit signed"),
    "weights_negative": (
        {"weights": [1.0, -0.5]},
        ValueError,
        "weights must be finite and not negative, got -0.5 at position 1",
    ),
    "weights_nan": ({"weights": [NAN, 1.0]}, ValueError, "weights must be finite and not negative, got nan at position 0"),
    "weights_inf": ({"weights": [1.0, INF]}, ValueError, "weights must be finite and not negative, got inf at position 1"),
    "weights_dims": ({"weights": [[1.0], [2.0]]}, ValueError, "weights must have 1 dimension, got shape (2, 1)"),
    "duplicates_word": ({"duplicates": "sum"}, ValueError, "duplicates must be 'error', 'mean' or 'last', got 'sum'"),
    "duplicate": ({"row": [1, 1], "col": [2, 2]}, ValueError, "1 duplicate entries, the first at (row, col) = (1, 2)"),
    "dtype": ({"dtype": torch.float16}, TypeError, "dtype must be float32 or float64, got torch.float16"),
    "shape_one": ({"shape": (3,)}, ValueError, "shape must be two positive sizes (rows, columns), got (3,)"),
    "shape_three": ({"shape": (3, 4, 5)}, ValueError, "shape must be two positive sizes (rows, columns), got (3, 4, 5)"),
    "shape_zero": ({"shape": (3, 0)}, ValueError, "shape must be two positive sizes (rows, columns), got (3, 0)"),
    "shape_negative": ({"shape": (-3, 4)}, ValueError, "shape must be two positive sizes (rows, columns), got (-3, 4)"),
    "shape_number": ({"shape": 3}, TypeError, "shape must be two integers (rows, columns), got 3"),
    "shape_float": ({"shape": (3.5, 4)}, TypeError, "shape must be two integers (rows, columns), got (3.5, 4)"),
    "shape_huge": (
        {"shape": (3, INT64_MAX // MAX_WIDTH + 1)},
        ValueError,
        "shape has 9007199254740992 columns; times a factor width of 1024 this overflows 64-bit offsets, at most "
        "9007199254740991 fit: relabel the columns to 0..count-1",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_from_coo(name: str) -> None:
    changes, exception, message = ERRORS[name]
    good: dict[str, Any] = {"row": [0, 1], "col": [1, 3], "values": [1.0, 2.0], "shape": (3, 4), "weights": [1.0, 2.0]}
    assert len(ObservedEntries.from_coo(**good)) == 2
    arguments = {**good, **changes}
    if name == "empty":
        arguments["weights"] = None
    with pytest.raises(exception, match="^ObservedEntries: " + re.escape(message)):
        ObservedEntries.from_coo(**arguments)


def test_the_first_offending_position_is_that_of_the_input() -> None:
    """Checked before sorting: positions are those the caller knows."""
    with pytest.raises(ValueError, match=re.escape("values must be finite, got nan at position 0 (2 such positions)")):
        ObservedEntries.from_coo([5, 0, 3], [0, 0, 0], [NAN, 1.0, NAN])


@pytest.mark.parametrize(
    ("matrix", "mask", "exception", "message"),
    [
        ([1.0, 2.0], None, ValueError, "matrix must have 2 dimensions, got shape (2,)"),
        ([[1.0]], [[1]], TypeError, "mask must be boolean (True: observed), got torch.int64"),
        ([[1.0, 2.0]], [[True]], ValueError, "mask must have the shape of matrix, (1, 2), got (1, 1)"),
        ([[NAN, NAN]], None, ValueError, "values is empty"),
        ([[1.0, 2.0]], [[False, False]], ValueError, "values is empty"),
        ([[1.0, INF]], None, ValueError, "values must be finite, got inf"),
        ([[1.0, NAN]], [[True, True]], ValueError, "values must be finite, got nan"),
        ([["a"]], None, TypeError, "matrix must hold numbers"),
    ],
)
def test_errors_of_from_dense(matrix: Any, mask: Any, exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=r"^ObservedEntries.*" + re.escape(message)):
        ObservedEntries.from_dense(matrix, mask)


def test_errors_of_from_scipy() -> None:
    with pytest.raises(TypeError, match=r"matrix must be a scipy.sparse matrix, got list"):
        ObservedEntries.from_scipy([[1.0]])


# ---------------------------------------------------------------------- huge shapes


@pytest.mark.parametrize("shape", [(2**40, 2**30), (2**53 - 1, 2**53 - 1), (2**32, 2**31 - 1)], ids=str)
def test_order_of_a_huge_shape(shape: tuple[int, int]) -> None:
    """Where row * columns + col would overflow, two stable sorts give the same order."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(shape[0] - 5, shape[0], (200,), generator=generator)
    col = torch.randint(shape[1] - 7, shape[1], (200,), generator=generator)
    order = _row_major_order(row, col, shape)
    wanted = sorted(range(200), key=lambda e: (int(row[e]), int(col[e]), e))
    assert (torch.arange(200) if order is None else order).tolist() == wanted
    assert torch.equal(_row_major_order(row - row.min(), col - col.min(), (5, 7)), order)  # type: ignore[arg-type]


def test_indices_are_64_bit_where_32_do_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_kernels.entries.INT32_MAX", 4)
    entries = small()
    assert entries.by_row.indices.dtype == entries.by_col.indices.dtype == torch.int64
    well_formed(entries)
    assert "index=int64" in repr(entries)
    monkeypatch.undo()
    assert small().by_row.indices.dtype == torch.int32


def test_the_callers_int64_indices_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_kernels.entries.INT32_MAX", 4)
    row, col = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 4])
    entries = ObservedEntries.from_coo(row, col, [1.0, 2.0, 3.0], shape=(3, 5))
    col.fill_(0)
    row.fill_(0)
    assert entries.by_row.indices.tolist() == [3, 2, 4]
    well_formed(entries)


# ---------------------------------------------------------------------- views


def test_transposed_shares_all_storage() -> None:
    entries = small()
    other = entries.T
    assert other.shape == (5, 4)
    well_formed(other)
    assert other.by_row is entries.by_col
    assert other.by_col is entries.by_row
    assert torch.equal(dense(other).nan_to_num(-1), dense(entries).t().nan_to_num(-1))
    assert other.T.by_row is entries.by_row


def test_to() -> None:
    entries = small()
    assert entries.to() is entries
    assert entries.to("cpu", torch.float32) is entries
    double = entries.to(dtype=torch.float64)
    well_formed(double)
    assert double.dtype == torch.float64
    assert double.weights is not None
    assert double.weights.dtype == torch.float64
    assert torch.equal(double.to(dtype=torch.float32).values, entries.values)
    assert entries.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_to_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"dtype must be float32 or float64, got {dtype}"):
        small().to(dtype=dtype)


def test_to_a_dtype_that_overflows_is_refused() -> None:
    large = ObservedEntries.from_coo([0, 1], [0, 0], np.array([1.0, 1e300]))
    with pytest.raises(ValueError, match="values must be finite in float32, got inf at position 1"):
        large.to(dtype=torch.float32)
    heavy = ObservedEntries.from_coo([0], [0], np.array([1.0]), weights=[1e300])
    with pytest.raises(ValueError, match="weights must be finite in float32, got inf at position 0"):
        heavy.to(dtype=torch.float32)


def test_select() -> None:
    entries = small()
    keep = torch.tensor([True, False, True, True, False])
    chosen = entries.select(keep)
    well_formed(chosen)
    assert chosen.shape == SHAPE
    assert torch.equal(chosen.values, entries.values[keep])
    assert torch.equal(chosen.weights, entries.weights[keep])  # type: ignore[index, arg-type]
    assert len(entries) == 5
    rest = entries.select(~keep)
    assert len(rest) + len(chosen) == len(entries)
    assert small(weights=None).select(keep).weights is None


@pytest.mark.parametrize(
    ("keep", "exception", "message"),
    [
        (torch.ones(5), ValueError, "keep must be a boolean tensor of shape (5,), got torch.float32 of shape (5,)"),
        (torch.ones(4, dtype=torch.bool), ValueError, "of shape (5,), got torch.bool of shape (4,)"),
        (torch.zeros(5, dtype=torch.bool), ValueError, "keep selects no entry; at least one is needed"),
        ([True] * 5, TypeError, "keep must be a boolean tensor, got list"),
        (np.ones(5, bool), TypeError, "keep must be a boolean tensor, got ndarray"),
    ],
    ids=["float", "length", "none", "list", "array"],
)
def test_errors_of_select(keep: Any, exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=r"^ObservedEntries.select: .*" + re.escape(message)):
        small().select(keep)


def test_repr() -> None:
    assert repr(small(weights=None)) == (
        "ObservedEntries(shape=(4, 5), entries=5, density=25%, dtype=float32, index=int32, device=cpu)"
    )
    assert repr(small(dtype=torch.float64)).endswith("dtype=float64, index=int32, device=cpu, weighted)")


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_round_trips(how: str, tmp_path: Any) -> None:
    entries = small()
    if how == "pickle":
        again = pickle.loads(pickle.dumps(entries))
    elif how == "deepcopy":
        again = copy.deepcopy(entries)
    else:
        torch.save(entries, tmp_path / "entries.pt")
        again = torch.load(tmp_path / "entries.pt", weights_only=False)
    well_formed(again)
    assert again.shape == entries.shape
    assert isinstance(again.by_row, SortedEntries)
    for side, other in ((entries.by_row, again.by_row), (entries.by_col, again.by_col)):
        for x, y in zip(side, other, strict=True):
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


def test_memory_per_entry() -> None:
    row, col = skewed_entries(20_000, 10_000, 1_000_000)
    values = torch.ones(1_000_000)
    entries = ObservedEntries.from_coo(row, col, values, shape=(20_000, 10_000))
    assert 16 <= entries.nbytes / len(entries) <= 17  # 16, and 8 a row and column
    sides = [x for side in (entries.by_row, entries.by_col) for x in side if isinstance(x, Tensor)]
    assert sum(x.untyped_storage().nbytes() for x in sides) <= 24 * len(entries), "a tensor keeps a larger storage alive"
    weighted = ObservedEntries.from_coo(row, col, values, shape=(20_000, 10_000), weights=values)
    assert 24 <= weighted.nbytes / len(entries) <= 25


def test_units_of_work_are_even() -> None:
    row, col = skewed_entries(5000, 3000, 200_000)
    entries = ObservedEntries.from_coo(row, col, torch.ones(200_000), shape=(5000, 3000))
    for side in (entries.by_row, entries.by_col):
        work = (side.offsets + 8 * torch.arange(side.offsets.numel()))[side.plan].diff()
        longest = int(side.offsets.diff().max()) + 8
        assert work.max() <= UNIT_ENTRIES + longest
        assert side.plan.numel() > 40


# ---------------------------------------------------------------------- skewed entries, for benches and tests


@pytest.mark.parametrize(
    ("m", "n", "count"),
    [(1000, 800, 50_000), (1000, 800, 400_000), (30, 20, 600), (1, 1, 1), (5, 7, 0), (1, 50, 20), (3000, 1, 99)],
)
def test_skewed_entries(m: int, n: int, count: int) -> None:
    row, col = skewed_entries(m, n, count, seed=3)
    assert row.shape == col.shape == (count,)
    assert row.dtype == col.dtype == torch.int64
    assert torch.unique(row * n + col).numel() == count
    if count:
        assert 0 <= int(row.min()) <= int(row.max()) < m
        assert 0 <= int(col.min()) <= int(col.max()) < n
    assert torch.equal(skewed_entries(m, n, count, seed=3)[0], row)
    if 0 < count < m * n and m > 1:
        assert not torch.equal(skewed_entries(m, n, count, seed=4)[0], row)


@pytest.mark.parametrize("count", [20_000, 150_000], ids=["sparse", "dense"])
def test_skewed_entries_are_skewed_and_shuffled(count: int) -> None:
    row, col = skewed_entries(1500, 600, count)
    columns, rows = (x.bincount(minlength=size).sort(descending=True).values for x, size in ((col, 600), (row, 1500)))
    assert columns[:60].sum() > 0.2 * count  # a tenth of the columns
    assert columns[:60].sum() / count > rows[:150].sum() / count, "rows are milder"
    assert rows[:150].sum() > 0.13 * count
    busiest = col.bincount(minlength=600).argmax()
    assert busiest > 20, "columns in order of popularity"
    first = col[: count // 2].bincount(minlength=600)[busiest] / col.bincount(minlength=600)[busiest]
    assert 0.3 < float(first) < 0.7, "entries in order"


def test_skewed_entries_refuses_too_many() -> None:
    with pytest.raises(ValueError, match=r"count must be from 0 to m \* n = 6, got 7"):
        skewed_entries(2, 3, 7)

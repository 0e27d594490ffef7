"""The completion op against plain PyTorch and against formulas by hand, on every SIMD level of this machine."""

from __future__ import annotations

import itertools
import math
import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from completion_checks import (
    LEVELS,
    MANY_UNITS,
    NAMES,
    SMALL,
    SMALL64,
    close,
    flat_arguments,
    fused,
    native,
    oracles,
    raw_op,
    same_bits,
)
from torch import Tensor

from lowrank_kernels import ObservedEntries, _native, ops, reference
from lowrank_kernels.entries import SortedEntries
from lowrank_kernels.ops.completion import completion_sides, entry_sums
from lowrank_kernels.testing import COMPLETION_CASES, CompletionCase, CompletionProblem, check

# ---------------------------------------------------------------------- values


def test_value_by_hand() -> None:
    entries = ObservedEntries.from_coo([0, 1, 1], [2, 0, 2], [5.0, 1.0, 2.0], shape=(2, 3), weights=[1.0, 2.0, 0.5])
    left, right = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    core = torch.stack([torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])])
    # core[1] @ core[0] = [[0, 2], [1, 0]]; left @ that = [[2, 2], [4, 6]]
    # predictions (0,2): 4 + 2 = 6, (1,0): 4, (1,2): 8 + 6 = 14; plus biases 10 + 1, 20 + 0, 20 + 1; minus 30
    loss = ops.completion_loss(
        left, core, right, entries, row_bias=torch.tensor([10.0, 20.0]), col_bias=torch.tensor([0.0, 0.0, 1.0]), offset=-30.0
    )
    errors = (6 + 11 - 30 - 5, 4 + 20 - 30 - 1, 14 + 21 - 30 - 2)
    assert loss.item() == 0.5 * (errors[0] ** 2 + 2 * errors[1] ** 2 + 0.5 * errors[2] ** 2)


def test_the_two_oracles_agree() -> None:
    for case in (SMALL64, CompletionCase(11, 5, 4, 20, depth=None, dtype=torch.float64)):
        _, plain, exact = oracles(case)
        close(plain, exact)


@pytest.mark.parametrize("case", COMPLETION_CASES, ids=str)
def test_loss_without_gradients(case: CompletionCase) -> None:
    problem, plain, exact = oracles(case)
    with torch.no_grad():
        loss = problem.run(ops.completion_loss)
    check(case, {"loss": loss}, {"loss": plain["loss"]}, {"loss": exact["loss"]})


@pytest.mark.parametrize("case", [SMALL, SMALL64, MANY_UNITS], ids=str)
def test_mean_reduction(case: CompletionCase) -> None:
    problem = case.problem()
    count = len(problem.entries)
    mean, total = fused(problem, reduction="mean"), fused(problem)
    close(mean, {name: x / count for name, x in total.items()})


@pytest.mark.parametrize("offset", [0, -7, 2.5, 1e4, np.float32(0.1)], ids=str)
def test_offset(offset: float) -> None:
    problem = SMALL.problem()._replace(offset=offset)
    check(SMALL, fused(problem), problem.loss_and_gradients(reference.completion_loss), problem.exact())


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("level", LEVELS or [None])
@pytest.mark.parametrize("case", COMPLETION_CASES, ids=str)
def test_gradients(case: CompletionCase, level: str | None) -> None:
    problem, plain, exact = oracles(case)
    if level:
        _native._C.set_simd_level(level)
    check(f"{case} at {level}", fused(problem), plain, exact)


@pytest.mark.parametrize("case", COMPLETION_CASES[::5], ids=str)
def test_loss_and_gradients_function(case: CompletionCase) -> None:
    problem = case.problem()
    loss, gradients = problem.run(ops.completion_loss_and_gradients)  # type: ignore[arg-type]
    given = problem.factors()
    assert [name for name in NAMES if getattr(gradients, name) is not None] == list(given)
    same_bits({"loss": loss, **{name: getattr(gradients, name) for name in given}}, fused(problem))


def test_gradient_scales_with_the_incoming_one() -> None:
    problem = SMALL.problem()
    left = problem.left.clone().requires_grad_()
    (ops.completion_loss(left, problem.core, problem.right, problem.entries) * -8).backward()
    (wanted,) = torch.autograd.grad(ops.completion_loss(left, problem.core, problem.right, problem.entries), left)
    assert torch.equal(left.grad, wanted * -8)


@pytest.mark.parametrize(
    "names",
    [*itertools.combinations(NAMES, 1), *itertools.combinations(NAMES, 2), *itertools.combinations(NAMES, 4)],
    ids=lambda names: "+".join(names),
)
def test_only_the_wanted_gradients(names: tuple[str, ...]) -> None:
    problem = SMALL.problem()
    full = fused(problem)
    leaves = {name: problem.factors()[name].clone().requires_grad_(name in names) for name in NAMES}
    loss = problem._replace(**leaves).run(ops.completion_loss)
    loss.backward()
    torch.testing.assert_close(loss.detach(), full["loss"], rtol=1e-6, atol=0)
    for name in NAMES:
        if name in names:
            assert torch.equal(leaves[name].grad, full[name]), name
        else:
            assert leaves[name].grad is None, name


def test_no_gradient_wanted_leaves_no_graph() -> None:
    loss = SMALL.problem().run(ops.completion_loss)
    assert not loss.requires_grad
    assert loss.grad_fn is None


def test_passes_that_nobody_wants_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if not LEVELS:
        pytest.skip(_native.unavailable)
    problem, sides = SMALL.problem(), []
    run = _native.completion_pass

    def spy(side: SortedEntries, *rest: Any, **wants: bool) -> tuple[Tensor, ...]:
        sides.append("rows" if side is not None and side.offsets is problem.entries.by_row.offsets else "columns")
        return run(side, *rest, **wants)

    monkeypatch.setattr(_native, "completion_pass", spy)
    for name, wanted in (("left", ["rows"]), ("row_bias", ["rows"]), ("right", ["columns"]), ("col_bias", ["columns"])):
        sides.clear()
        leaf = problem.factors()[name].clone().requires_grad_()
        problem._replace(**{name: leaf}).run(ops.completion_loss)
        assert sides == wanted, name
    sides.clear()
    problem.run(ops.completion_loss)
    assert sides == ["rows"]


def test_backward_twice_with_retain_graph() -> None:
    problem = SMALL.problem()
    left = problem.left.clone().requires_grad_()
    loss = problem._replace(left=left).run(ops.completion_loss)
    loss.backward(retain_graph=True)
    once = left.grad.clone()
    loss.backward()
    assert torch.equal(left.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("wanted", [("left",), ("core", "col_bias"), ("right", "row_bias"), ()], ids="+".join)
def test_loss_and_gradients_function_computes_the_wanted(wanted: tuple[str, ...]) -> None:
    problem = SMALL.problem()
    full = fused(problem)
    loss, gradients = problem.run(ops.completion_loss_and_gradients, wanted=wanted)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, full["loss"], rtol=1e-6, atol=0)
    for name in NAMES:
        if name in wanted:
            assert torch.equal(getattr(gradients, name), full[name]), name
        else:
            assert getattr(gradients, name) is None, name


@pytest.mark.parametrize("case", [SMALL, SMALL64, CompletionCase(60, 70, 16, 300, depth=None, pattern="gaps")], ids=str)
def test_sums_of_each_side(case: CompletionCase) -> None:
    """completion_sides: gradients of P and V, and the squared errors of every row and column."""
    problem = case.problem()
    p, v = flat_arguments(problem)[:2]
    one = problem._replace(left=p, core=None)
    loss, rows, cols = completion_sides(
        p, v, problem.entries, row_bias=problem.row_bias, col_bias=problem.col_bias, offset=problem.offset
    )
    got = {"loss": loss, "left": rows.grad, "right": cols.grad.t(), "row_bias": rows.bias_grad, "col_bias": cols.bias_grad}
    wanted = one.exact()
    got = {name: x for name, x in got.items() if name in wanted}
    check(case, got, one.loss_and_gradients(reference.completion_loss), wanted)
    row, col, values, weights = (None if x is None else x.double() for x in problem.entries.coo())
    row, col = row.long(), col.long()
    error = (p.double()[row] * v.double()[col]).sum(1) + problem.offset - values
    for bias, index in ((problem.row_bias, row), (problem.col_bias, col)):
        error = error if bias is None else error + bias.double()[index]
    squared = error.square() if weights is None else weights * error.square()
    for side, index in ((rows, row), (cols, col)):
        sums = torch.zeros(side.loss.numel(), dtype=torch.float64).index_add_(0, index, squared)
        close({"loss": side.loss}, {"loss": sums.to(case.dtype)})


@pytest.mark.parametrize("by", ["row", "col"])
@pytest.mark.parametrize("case", [SMALL, CompletionCase(60, 70, 12, 300, depth=None, pattern="gaps")], ids=str)
def test_entry_sums(case: CompletionCase, by: str) -> None:
    problem = case.problem()
    row, col, _, weights = problem.entries.coo()
    weights = torch.ones(len(row)) if weights is None else weights
    own, index, other = (row, col, problem.right.t()) if by == "row" else (col, row, problem.left)
    size = problem.entries.shape[0 if by == "row" else 1]
    sums, totals = entry_sums(problem.entries, other, by=by)
    wanted = torch.zeros(size, case.k).index_add_(0, own, weights[:, None] * other[index])
    close({"sums": sums, "totals": totals}, {"sums": wanted, "totals": torch.zeros(size).index_add_(0, own, weights)})


# ---------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize(
    "case",
    [
        CompletionCase(4, 5, 3, 11, depth=2, weights=True, biases=True, dtype=torch.float64),
        CompletionCase(5, 3, 2, 9, depth=None, biases=True, dtype=torch.float64),
        CompletionCase(3, 4, 5, 8, depth=0, weights=True, dtype=torch.float64),
        CompletionCase(7, 6, 2, 9, depth=4, dtype=torch.float64, pattern="gaps"),
    ],
    ids=str,
)
def test_gradcheck_and_gradgradcheck(case: CompletionCase) -> None:
    problem = case.problem()
    leaves = {name: x.clone().requires_grad_() for name, x in problem.factors().items()}

    def loss(*factors: Tensor) -> Tensor:
        return problem._replace(**dict(zip(leaves, factors, strict=True))).run(ops.completion_loss, reduction="mean")

    inputs = tuple(leaves.values())
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True, check_undefined_grad=False)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)  # projected; double backward has tests of its own


# ---------------------------------------------------------------------- layouts


def strided(x: Tensor) -> Tensor:
    """The same numbers, every second one of a larger tensor whose others are NaN."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x.flip(0).contiguous().flip(0)


def offset_by_one(x: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of a vector."""
    return torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("layout", [strided, transposed, offset_by_one], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [*NAMES, "all"])
@pytest.mark.parametrize("k", [3, 16])
def test_layouts(layout: Any, name: str, k: int) -> None:
    case = CompletionCase(21, 34, k, 200, depth=2, weights=True, biases=True)
    problem, plain, exact = oracles(case)
    leaves = {n: x.clone() for n, x in problem.factors().items()}
    for n in leaves:
        if name in (n, "all"):
            leaves[n] = layout(leaves[n])
            assert torch.equal(leaves[n], problem.factors()[n])
        leaves[n].requires_grad_()
    loss = problem._replace(**leaves).run(ops.completion_loss)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    check(f"{case} with {name}", {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}, plain, exact)


def test_expanded_inputs() -> None:
    problem = SMALL64.problem()
    m, n, k = SMALL64.m, SMALL64.n, SMALL64.k
    small = {
        "left": torch.ones(1, k, dtype=torch.float64),
        "core": torch.eye(k, dtype=torch.float64),
        "right": torch.ones(k, 1, dtype=torch.float64),
        "row_bias": torch.tensor(0.5, dtype=torch.float64),
        "col_bias": torch.tensor(-0.5, dtype=torch.float64),
    }
    shapes = {"left": (m, k), "core": (4, k, k), "right": (k, n), "row_bias": (m,), "col_bias": (n,)}

    def gradients(function: Any, expand: bool) -> dict[str, Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in small.items()}
        wide = {name: x.expand(shapes[name]) if expand else x.expand(shapes[name]).clone() for name, x in leaves.items()}
        loss = problem._replace(**wide).run(function)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    close(gradients(ops.completion_loss, True), gradients(reference.completion_loss, False), scale=10)


def test_expanded_gradient() -> None:
    problem = SMALL64.problem()
    left = problem.left.clone().requires_grad_()
    weights = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    loss = problem._replace(left=left).run(ops.completion_loss)
    (got,) = torch.autograd.grad((loss.expand(2, 3) * weights).sum(), left)
    close({"left": got}, {"left": 15 * fused(problem)["left"]})
    loss = problem._replace(left=left).run(ops.completion_loss)
    (got,) = torch.autograd.grad(loss, left, grad_outputs=torch.ones(1, dtype=torch.float64).expand(4)[0])
    assert torch.equal(got, fused(problem)["left"])


def test_contiguous_right_transposed_is_not_copied() -> None:
    problem = CompletionCase(30, 40, 16, 100, depth=None).problem()
    v = problem.right.t().contiguous()
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is raw_op.default:
                seen.append(args[1])
            return func(*args, **(kwargs or {}))

    with Spy():
        _, gradients = ops.completion_loss_and_gradients(problem.left, None, v.t(), problem.entries)
    if LEVELS:
        assert seen[0].data_ptr() == v.data_ptr()
    assert gradients.right.t().is_contiguous()


# ---------------------------------------------------------------------- odd shapes


def test_rows_and_columns_without_entries_get_zero_gradients() -> None:
    entries = ObservedEntries.from_coo([2, 2], [1, 3], [1.0, 2.0], shape=(5, 6))
    case = CompletionCase(5, 6, 7, 2, biases=True)
    got = fused(case.problem()._replace(entries=entries))
    for name in ("left", "row_bias"):
        assert got[name][[0, 1, 3, 4]].eq(0).all(), name
        assert got[name][2].abs().sum() > 0, name
    assert got["right"][:, [0, 2, 4, 5]].eq(0).all()
    assert got["col_bias"][[0, 2, 4, 5]].eq(0).all()


@pytest.mark.parametrize("depth", [None, 0, 1], ids=["none", "empty", "one"])
def test_depths_of_the_identity_agree(depth: int | None) -> None:
    problem = SMALL64.problem()
    k = SMALL64.k
    core = None if depth is None else torch.eye(k, dtype=torch.float64).expand(depth, k, k)
    base = fused(problem._replace(core=None))
    got = fused(problem._replace(core=core))
    if depth == 0:
        assert got["core"].shape == (0, k, k)
    got.pop("core", None)
    close(got, base)


# Rows of every length around the groups of four and the runs of 256 that the kernel sums at once.
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 256, 257, 258, 259, 260, 511, 513])
def test_row_lengths(length: int) -> None:
    case = CompletionCase(5, max(length, 20), 9, length, depth=None, weights=True, biases=True, pattern="row")
    problem, plain, exact = oracles(case)
    for level in LEVELS or [None]:
        if level:
            _native._C.set_simd_level(level)
        check(f"{case} at {level}", fused(problem), plain, exact)


# ---------------------------------------------------------------------- extreme numbers


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("level", LEVELS or [None])
def test_an_overflow_is_infinite_and_not_nan(level: str | None, length: int) -> None:
    if level:
        _native._C.set_simd_level(level)
    entries = ObservedEntries.from_coo([0] * length, list(range(length)), torch.full((length,), 3e38), shape=(1, length))
    problem = CompletionProblem(torch.full((1, 1), -3e38), None, torch.ones(1, length), entries, torch.zeros(1), None, 0.0)
    got = fused(problem)
    wanted = problem.loss_and_gradients(reference.completion_loss)
    assert wanted["loss"] == math.inf
    same_bits(got, wanted)


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("position", ["first", "last"])
def test_extreme_values_and_weights(length: int, position: str) -> None:
    at = 0 if position == "first" else length - 1
    values, weights = torch.linspace(-1, 1, length), torch.ones(length)
    values[at], weights[at] = 1e17, 1e-17
    problem = SMALL.problem()
    for extra in (0.0, 1e18):  # a weight 0 switches off even the largest value
        if extra:
            values[at], weights[at] = 3e38, 0.0
        entries = ObservedEntries.from_coo([3] * length, list(range(length)), values, shape=(SMALL.m, SMALL.n), weights=weights)
        one = problem._replace(entries=entries)
        exact = one.exact()  # squaring first, as the reference does, overflows
        plain = {name: x.float() for name, x in exact.items()}
        if extra and length > 1:  # without that entry the reference overflows no more: its error is what is allowed
            rest = entries.select(weights > 0)
            plain = problem._replace(entries=rest).loss_and_gradients(reference.completion_loss)
        check(f"{length} entries, {position}", fused(one), plain, exact)


def test_all_weights_zero() -> None:
    problem = SMALL.problem()
    row, col, values, _ = problem.entries.coo()
    entries = ObservedEntries.from_coo(row, col, values, shape=(SMALL.m, SMALL.n), weights=torch.zeros(len(values)))
    assert all(x.eq(0).all() for x in fused(problem._replace(entries=entries)).values())


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_a_factor_reaches_the_loss(name: str) -> None:
    problem = SMALL.problem()
    factor = problem.factors()[name].clone()
    row, col, _, _ = problem.entries.coo()
    touched = {"left": (int(row[0]), 0), "right": (0, int(col[0])), "row_bias": (int(row[0]),), "col_bias": (int(col[0]),)}
    factor[touched.get(name, (0, 0, 0))] = math.nan
    got = fused(problem._replace(**{name: factor}))
    assert all(x.isnan().any() for x in got.values())


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64, torch.bool], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    problem = SMALL.problem()
    problem = problem._replace(**{name: problem.factors()[name].to(dtype)})
    with pytest.raises(TypeError, match=f"completion_loss: {name} must be float32 or float64, got {dtype}"):
        problem.run(ops.completion_loss)


def test_result_has_the_dtype_of_the_factors() -> None:
    for case in (SMALL, SMALL64):
        assert {x.dtype for x in fused(case.problem()).values()} == {case.dtype}


# ---------------------------------------------------------------------- errors


def changed(**changes: Any) -> dict[str, Any]:
    problem = SMALL.problem()
    return {**problem._asdict(), "reduction": "sum", **changes}


# (changed arguments, exception, what the message says: argument, wanted, got)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "entries_type": ({"entries": [1, 2]}, TypeError, "entries must be ObservedEntries, got list; build one with from_coo()"),
    "left_type": ({"left": [[1.0]]}, TypeError, "left must be a tensor, got list"),
    "left_none": ({"left": None}, TypeError, "left must be a tensor, got NoneType"),
    "right_numpy": ({"right": np.ones((3, 9), np.float32)}, TypeError, "right must be a tensor, got ndarray"),
    "core_type": ({"core": [torch.eye(3)]}, TypeError, "core must be a tensor, got list"),
    "row_bias_type": ({"row_bias": 1.0}, TypeError, "row_bias must be a tensor, got float"),
    "col_bias_type": ({"col_bias": 1.0}, TypeError, "col_bias must be a tensor, got float"),
    "offset_tensor": ({"offset": torch.ones(())}, TypeError, "offset must be a number, got a tensor"),
    "left_dims": ({"left": torch.ones(7)}, ValueError, "left must have 2 dimensions, got shape (7,)"),
    "right_dims": ({"right": torch.ones(1, 3, 9)}, ValueError, "right must have 2 dimensions, got shape (1, 3, 9)"),
    "left_rows": ({"left": torch.ones(8, 3)}, ValueError, "left must be (rows, rank) = (7, 3), got (8, 3)"),
    "rank_zero": ({"left": torch.ones(7, 0)}, ValueError, "left must be (rows, rank) with rank from 1 to 1024, got (7, 0)"),
    "rank_wide": ({"left": torch.ones(7, 1025)}, ValueError, "with rank from 1 to 1024, got (7, 1025)"),
    "right_rank": ({"right": torch.ones(4, 9)}, ValueError, "right must be (rank, columns) = (3, 9), got (4, 9)"),
    "right_columns": ({"right": torch.ones(3, 8)}, ValueError, "right must be (rank, columns) = (3, 9), got (3, 8)"),
    "core_dims": ({"core": torch.ones(3, 3)}, ValueError, "core must be (depth, rank, rank) or None, got shape (3, 3)"),
    "core_rank": ({"core": torch.ones(2, 3, 4)}, ValueError, "core must be (depth, rank, rank) = (2, 3, 3), got (2, 3, 4)"),
    "row_bias_shape": ({"row_bias": torch.ones(9)}, ValueError, "row_bias must be (rows,) = (7,), got (9,)"),
    "row_bias_2d": ({"row_bias": torch.ones(7, 1)}, ValueError, "row_bias must be (rows,) = (7,), got (7, 1)"),
    "col_bias_shape": ({"col_bias": torch.ones(7)}, ValueError, "col_bias must be (columns,) = (9,), got (7,)"),
    "core_dtype": (
        {"core": torch.ones(2, 3, 3, dtype=torch.float64)},
        TypeError,
        "core must have the dtype of left, torch.float32, got torch.float64",
    ),
    "left_half": (
        {"left": torch.ones(7, 3, dtype=torch.float16)},
        TypeError,
        "left must be float32 or float64, got torch.float16; convert it with .to(torch.float32)",
    ),
    "right_device": (
        {"right": torch.ones(3, 9, device="meta")},
        ValueError,
        "right must be on the device of left, cpu, got meta",
    ),
    "reduction": ({"reduction": "none"}, ValueError, "reduction must be 'sum' or 'mean', got 'none'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    changes, exception, message = ERRORS[name]
    with pytest.raises(exception, match="^" + re.escape("completion_loss: ") + ".*" + re.escape(message)):
        ops.completion_loss(**changed(**changes))
    if name != "reduction":
        arguments = changed(**changes)
        del arguments["reduction"]
        with pytest.raises(exception, match="^completion_loss_and_gradients: .*" + re.escape(message)):
            ops.completion_loss_and_gradients(**arguments)


def test_entries_of_another_dtype_are_refused() -> None:
    with pytest.raises(TypeError, match=r"entries must have the dtype of left, torch\.float32, got torch\.float64"):
        ops.completion_loss(**changed(entries=SMALL64.problem().entries))


# ---------------------------------------------------------------------- repeatability


@native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_bitwise_the_same_for_any_number_of_threads_and_from_run_to_run(level: str, dtype: torch.dtype) -> None:
    _native._C.set_simd_level(level)
    problem = MANY_UNITS.problem().to(dtype)
    assert problem.entries.by_row.plan.numel() > 5, "too few units of work to tell threads apart"
    arguments = flat_arguments(problem)  # the raw op: products with the core are torch's

    def run(threads: int) -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        return dict(enumerate(x.clone() for x in raw_op(*arguments)))  # type: ignore[misc]

    one = run(1)
    for threads in (1, 2, 3, 2, 5):
        same_bits(run(threads), one)


def test_python_threads_at_the_same_time() -> None:
    problems = [MANY_UNITS.problem()._replace(offset=0.1 * number) for number in range(4)]
    wanted = [problem.run(ops.completion_loss_and_gradients) for problem in problems]  # type: ignore[arg-type]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            loss, gradients = problems[number].run(ops.completion_loss_and_gradients)  # type: ignore[arg-type, misc]
            if not (torch.equal(loss, wanted[number][0]) and torch.equal(gradients.left, wanted[number][1].left)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---------------------------------------------------------------------- 64-bit indices


@pytest.mark.parametrize("level", LEVELS or [None])
@pytest.mark.parametrize("case", [SMALL, SMALL64, MANY_UNITS], ids=str)
def test_int64_indices(case: CompletionCase, level: str | None) -> None:
    if level:
        _native._C.set_simd_level(level)
    problem = case.problem()
    entries = problem.entries
    assert entries.by_row.indices.dtype == torch.int32
    sides = [side._replace(indices=side.indices.to(torch.int64)) for side in (entries.by_row, entries.by_col)]
    same_bits(fused(problem._replace(entries=ObservedEntries(entries.shape, *sides))), fused(problem))


# ---------------------------------------------------------------------- SIMD levels (test_gradients runs at each)


@native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12])
def test_every_number_of_vectors(vectors: int, dtype: torch.dtype, level: str) -> None:
    """Widths a lower level would not get from ops: there they are padded for the best one."""
    _native._C.set_simd_level(level)
    k = vectors * _native._C.simd_bytes() // dtype.itemsize
    case = CompletionCase(29, 31, k, 400, depth=None, weights=True, biases=True, dtype=dtype)
    problem, plain, exact = oracles(case)
    entries, v = problem.entries, problem.right.t().contiguous()
    row_bias, col_bias = problem.row_bias, problem.col_bias
    got: dict[str, Tensor] = {}
    for side, own, other, own_bias, other_bias, names in (
        (entries.by_row, problem.left, v, row_bias, col_bias, ("left", "row_bias")),
        (entries.by_col, v, problem.left, col_bias, row_bias, ("right", "col_bias")),
    ):
        loss, grad, bias_grad, row_loss = _native.completion_pass(side, own, other, own_bias, other_bias, problem.offset)
        torch.testing.assert_close(row_loss.double().sum() / 2, loss.double(), rtol=4 * torch.finfo(dtype).eps, atol=0)
        check(f"{case} at {level}", {"loss": loss}, {"loss": plain["loss"]}, {"loss": exact["loss"]})
        got |= {names[0]: grad if names[0] == "left" else grad.t(), names[1]: bias_grad}
    check(f"{case} at {level}", got, {name: plain[name] for name in got}, {name: exact[name] for name in got})


@native
def test_unaligned_width_is_refused() -> None:
    problem = SMALL.problem()
    side, own, other = problem.entries.by_row, problem.left, problem.right.t().contiguous()
    with pytest.raises(ValueError, match=r"width must be a multiple of \d+, got 3"):
        _native.completion_pass(side, own, other, None, None, 0.0)


@native
def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="simd level must be 'portable', 'avx2' or 'avx512', got 'sse9'"):
        _native._C.set_simd_level("sse9")

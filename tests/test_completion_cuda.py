"""The completion op on a GPU: values, gradients, layouts, repeatability, CUDA graphs and streams; skipped without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lrk
from lowrank_kernels import _native
from lowrank_kernels.entries import LONG_ROW
from lowrank_kernels.testing import COMPLETION_CASES, CompletionCase, CompletionProblem, check

if not _native.has_cuda():
    _REASON = "the native module was built without CUDA"
elif not torch.cuda.is_available():
    _REASON = f"no GPU that torch can use: {_native.cuda_info()['reason'] or 'torch was built without CUDA'}"
else:
    _REASON = ""
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON)

DEVICE = "cuda"
WIDTHS = [1, 3, 8, 10, 16, 31, 64, 100, 130, 1024]
ROWS, COLS = 37, 2 * LONG_ROW + 300


def _problem(
    k: int,
    dtype: torch.dtype = torch.float32,
    *,
    transpose: bool = False,
    weights: bool = False,
    biases: bool = False,
    core: bool = False,
    wide_index: bool = False,
) -> CompletionProblem:
    """On the CPU. Row 3 has every column but 11, rows 5 and 6 LONG_ROW and one more entry, row 9 and column 11 none."""
    g = torch.Generator().manual_seed(k)
    observed = torch.rand(ROWS, COLS, generator=g) < 0.03
    observed[3], observed[5], observed[6], observed[9] = True, False, False, False
    observed[5, 20 : 20 + LONG_ROW] = True
    observed[6, 20 : 21 + LONG_ROW] = True
    observed[:, 11] = False
    if transpose:
        observed = observed.t()
    m, n = observed.shape
    row, col = observed.nonzero(as_tuple=True)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    entries = lrk.ObservedEntries.from_coo(
        row, col, normal(len(row)), shape=(m, n), weights=normal(len(row)).abs() if weights else None
    )
    if wide_index:
        sides = (side._replace(indices=side.indices.to(torch.int64)) for side in (entries.by_row, entries.by_col))
        entries = lrk.ObservedEntries((m, n), *sides)
    return CompletionProblem(
        normal(m, k) / k**0.5,
        normal(2, k, k) / k**0.5 if core else None,
        normal(k, n),
        entries,
        normal(m) if biases else None,
        normal(n) if biases else None,
        0.5,
    )


def _on_gpu(problem: CompletionProblem) -> CompletionProblem:
    return problem.to(problem.left.dtype, DEVICE)


def _results(problem: CompletionProblem) -> dict[str, Tensor]:
    """Loss and gradients of the op, without autograd."""
    loss, grads = problem.run(lrk.ops.completion_loss_and_gradients)
    return {"loss": loss, **{name: grad for name, grad in grads._asdict().items() if grad is not None}}


def _check(case: object, problem: CompletionProblem) -> None:
    got = {name: x.cpu() for name, x in _results(_on_gpu(problem)).items()}
    check(case, got, problem.loss_and_gradients(lrk.reference.completion_loss), problem.exact())


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("case", COMPLETION_CASES, ids=str)
def test_case(case: CompletionCase) -> None:
    _check(case, case.problem())


@pytest.mark.parametrize("transpose", [False, True], ids=["long-rows", "long-columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("k", WIDTHS)
def test_long_and_empty_rows(k: int, dtype: torch.dtype, transpose: bool) -> None:
    problem = _problem(k, dtype, transpose=transpose, weights=k % 2 == 0, biases=k % 3 != 0)
    _check(f"K{k}-{dtype}-transpose={transpose}", problem)


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
def test_options(weights: bool, biases: bool) -> None:
    _check(f"weights={weights}-biases={biases}", _problem(10, weights=weights, biases=biases, core=True))


@pytest.mark.parametrize("k", [3, 130])
def test_wide_index(k: int) -> None:
    _check(f"K{k}-int64", _problem(k, biases=True, wide_index=True))


def test_rows_and_columns_without_entries_have_zero_gradients() -> None:
    got = _results(_on_gpu(_problem(10, biases=True)))
    assert not got["left"][9].any()
    assert not got["row_bias"][9].any()
    assert not got["right"][:, 11].any()
    assert not got["col_bias"][11].any()


@pytest.mark.parametrize("k", [10, 130])
def test_row_losses_add_up(k: int) -> None:
    problem = _on_gpu(_problem(k, torch.float64, weights=True))
    p = torch.nn.functional.pad(problem.left, (0, -k % 2))
    v = torch.nn.functional.pad(problem.right.t(), (0, -k % 2))
    loss, _, _, row_loss = _native.completion_pass(problem.entries.by_row, p, v, None, None, problem.offset)
    assert row_loss[9] == 0
    assert torch.allclose(row_loss.sum() / 2, loss, rtol=1e-12)


@pytest.mark.parametrize("wanted", ["left", "core", "right"])
def test_gradient_of_one_factor(wanted: str) -> None:
    problem = _on_gpu(_problem(10, core=True))
    whole = _results(problem)
    leaf = getattr(problem, wanted).clone().requires_grad_()
    loss = problem._replace(**{wanted: leaf}).run(lrk.ops.completion_loss)
    loss.backward()
    assert torch.allclose(loss.detach(), whole["loss"])  # of the columns pass where only right is wanted
    assert torch.equal(leaf.grad, whole[wanted])


def test_factor_at_an_odd_address() -> None:
    problem = _on_gpu(_problem(16))
    flat = torch.cat([problem.left.new_zeros(1), problem.left.flatten()])
    assert _same(_results(problem._replace(left=flat[1:].view_as(problem.left))), _results(problem))


# ---------------------------------------------------------------------- repeatability


@pytest.mark.parametrize("k", [10, 130])
def test_results_repeat_bit_by_bit(k: int) -> None:
    problem = _on_gpu(_problem(k, weights=True, biases=True))
    first = _results(problem)
    for _ in range(5):
        assert _same(first, _results(problem))


# ---------------------------------------------------------------------- graphs, streams, devices


@pytest.mark.parametrize("core", [False, True], ids=["", "core"])
def test_graph_capture_and_replay(core: bool) -> None:
    problem = _on_gpu(_problem(10, core=core, biases=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for: libraries make their handles outside the capture
        _results(problem)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _results(problem)
    for step in range(3):
        problem.left.add_(0.125 * step)
        graph.replay()
        assert _same(captured, _results(problem))


def test_current_stream_is_used() -> None:
    problem = _on_gpu(_problem(16))
    wanted = problem.run(lrk.ops.completion_loss)
    late = torch.zeros_like(problem.left)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds: a pass on another stream would read zeros
        late.copy_(problem.left)
        loss = problem._replace(left=late).run(lrk.ops.completion_loss)
    stream.synchronize()
    assert torch.equal(loss, wanted)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    problem = _problem(16)
    results = []
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        moved = _results(problem.to(torch.float32, device))
        results.append({name: x.cpu() for name, x in moved.items()})
    assert _same(results[0], results[1])
    assert _same(results[0], results[2])
    assert torch.cuda.current_device() == 0

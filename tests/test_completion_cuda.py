"""The completion op on a GPU: values, gradients, layouts, repeatability, graphs, streams, memory; skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lrk
from lowrank_kernels import _native
from lowrank_kernels.entries import LONG_ROW
from lowrank_kernels.testing import COMPLETION_CASES, CompletionCase, CompletionProblem, check

pytestmark = pytest.mark.gpu

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
def test_results_repeat_bit_by_bit(k: int, churn: Any) -> None:
    problem = _on_gpu(_problem(k, weights=True, biases=True))
    first = _results(problem)
    for seed in range(12):
        churn(DEVICE, seed)
        assert _same(first, _results(problem))


# ---------------------------------------------------------------------- layouts, autocast


def test_layouts() -> None:
    problem = _on_gpu(_problem(10, biases=True))
    wide = torch.nn.functional.pad(problem.left, (2, 3), value=float("nan"))[:, 2:-3]
    for left in (problem.left.t().contiguous().t(), wide):
        moved = problem._replace(left=left, right=problem.right.t().contiguous().t())
        assert not moved.left.is_contiguous()
        assert _same(_results(moved), _results(problem))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast_keeps_the_dtype_of_the_factors(dtype: torch.dtype) -> None:
    problem = _on_gpu(_problem(10, core=True))
    wanted = problem.loss_and_gradients(lrk.ops.completion_loss)
    with torch.autocast(DEVICE, dtype=dtype):
        got = problem.loss_and_gradients(lrk.ops.completion_loss)
    assert _same(got, wanted)


# ---------------------------------------------------------------------- graphs, streams, devices, memory


@pytest.mark.parametrize("core", [False, True], ids=["", "core"])
def test_graph_capture_and_replay(core: bool, capture: Any) -> None:
    problem = _on_gpu(_problem(10, core=core, biases=True))
    graph, captured = capture(lambda: _results(problem))
    for step in range(3):
        problem.left.add_(0.125 * step)
        graph.replay()
        assert _same(captured, _results(problem))


@pytest.mark.parametrize("k", [10, 130])
def test_graph_with_backward(k: int, capture: Any) -> None:
    problem = _on_gpu(_problem(k, core=True, biases=True, weights=True))
    graph, captured = capture(lambda: problem.loss_and_gradients(lrk.ops.completion_loss))
    for step in range(3):
        problem.right.mul_(1 + 0.125 * step)
        graph.replay()
        assert _same(captured, problem.loss_and_gradients(lrk.ops.completion_loss))


def test_captured_training_step_is_the_eager_one(capture: Any) -> None:
    problem = _on_gpu(_problem(10, core=True, biases=True))
    leaves: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in problem.factors().items()}
    trained = problem._replace(**leaves)

    def step() -> Tensor:
        loss = trained.run(lrk.ops.completion_loss, reduction="mean")
        for leaf, grad in zip(leaves.values(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
            leaf.detach().sub_(grad)
        return loss.detach()

    def train(once: Any) -> dict[str, Tensor]:
        for name, start in problem.factors().items():
            leaves[name].detach().copy_(start)
        losses = torch.stack([once().clone() for _ in range(4)])
        return {"losses": losses, **{name: leaf.detach().clone() for name, leaf in leaves.items()}}

    wanted = train(step)
    graph, loss = capture(step)

    def replay() -> Tensor:
        graph.replay()
        return loss

    assert _same(train(replay), wanted)
    assert len(wanted["losses"].unique()) == 4


def test_compile_with_cuda_graphs() -> None:
    pytest.importorskip("triton", reason="torch.compile on a GPU needs triton")
    from torch._dynamo.utils import counters

    problem = _on_gpu(_problem(10, core=True))
    leaves: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in problem.factors().items()}

    def gradients(function: Any) -> dict[str, Tensor]:
        loss = function(*leaves.values())
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss.detach().clone(), **{name: grad.clone() for name, grad in zip(leaves, grads, strict=True)}}

    def loss(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
        return lrk.ops.completion_loss(left, core, right, problem.entries, offset=problem.offset)

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        got, wanted = gradients(compiled), gradients(loss)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}")
        leaves["left"].detach().mul_(0.75)
    assert counters["inductor"]["cudagraph_skips"] == 0


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


def test_streams_do_not_share_workspace() -> None:
    problems = [_on_gpu(_problem(16, biases=True)), _on_gpu(_problem(130, transpose=True))]
    wanted = [_results(problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    got: list[list[dict[str, Tensor]]] = [[], []]
    for _ in range(10):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[which].append(_results(problems[which]))
    torch.cuda.synchronize()
    assert all(_same(one, wanted[which]) for which in (0, 1) for one in got[which])


def test_out_of_memory_is_the_error_of_torch_and_the_next_call_works(spare_memory: Any) -> None:
    problem = _on_gpu(_problem(16))
    wanted = _results(problem)
    rows = 1 << 19
    entries = lrk.ObservedEntries.from_coo([0, 1], [0, 1], [1.0, 1.0], shape=(rows, 8)).to(DEVICE)
    large = CompletionProblem(
        torch.ones(rows, 64, device=DEVICE), None, torch.ones(64, 8, device=DEVICE), entries, None, None, 0.0
    )
    with spare_memory(64 << 20):
        with pytest.raises(torch.cuda.OutOfMemoryError):  # the gradient of left is 128 MiB
            _results(large)
        assert _same(_results(problem), wanted)
    assert _results(large)["loss"] == 63.0**2


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

"""The completion op on a GPU: values, gradients, layouts, repeatability, CUDA graphs and streams; skipped without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lrk
from lowrank_kernels import _native
from lowrank_kernels.entries import LONG_ROW
from lowrank_kernels.ops.completion import CompletionGradients

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
NAMES = ("left", "core", "right", "row_bias", "col_bias")


def _problem(
    k: int,
    dtype: torch.dtype = torch.float32,
    *,
    transpose: bool = False,
    weights: bool = False,
    biases: bool = False,
    core: bool = False,
    wide_index: bool = False,
) -> tuple[dict[str, Tensor | None], lrk.ObservedEntries]:
    """Factors and entries on the CPU. Row 3 has every column, rows 5 and 6 LONG_ROW and one more entry, row 9 none."""
    g = torch.Generator().manual_seed(k)
    observed = torch.rand(ROWS, COLS, generator=g) < 0.03
    observed[3] = True
    observed[5], observed[6], observed[9] = False, False, False
    observed[5, 7 : 7 + LONG_ROW] = True
    observed[6, 2 : 3 + LONG_ROW] = True
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
    factors: dict[str, Tensor | None] = {
        "left": normal(m, k) / k**0.5,
        "core": normal(2, k, k) / k**0.5 if core else None,
        "right": normal(k, n),
        "row_bias": normal(m) if biases else None,
        "col_bias": normal(n) if biases else None,
    }
    return factors, entries


def _named(loss: Tensor, grads: CompletionGradients) -> dict[str, Tensor]:
    return {"loss": loss, **{name: grad for name, grad in grads._asdict().items() if grad is not None}}


def _run(factors: dict[str, Tensor | None], entries: lrk.ObservedEntries) -> dict[str, Tensor]:
    """The op on the GPU; entries are moved there, so planned for it."""
    moved = {name: None if x is None else x.to(DEVICE) for name, x in factors.items()}
    left, core, right = moved.pop("left"), moved.pop("core"), moved.pop("right")
    return _named(*lrk.ops.completion_loss_and_gradients(left, core, right, entries.to(DEVICE), offset=0.5, **moved))


def _plain(factors: dict[str, Tensor | None], entries: lrk.ObservedEntries, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference on the CPU, its gradients by autograd."""
    leaves = {name: None if x is None else x.to(dtype).requires_grad_() for name, x in factors.items()}
    left, core, right = leaves["left"], leaves["core"], leaves["right"]
    biases = {"row_bias": leaves["row_bias"], "col_bias": leaves["col_bias"]}
    loss = lrk.reference.completion_loss(left, core, right, entries.to(dtype=dtype), offset=0.5, **biases)
    given = {name: x for name, x in leaves.items() if x is not None}
    return {"loss": loss.detach(), **dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))}


def _check(case: str, factors: dict[str, Tensor | None], entries: lrk.ObservedEntries) -> None:
    """At most twice the error of plain PyTorch in the same dtype, against float64 (itself a few units off)."""
    got = _run(factors, entries)
    exact = _plain(factors, entries, torch.float64)
    left = factors["left"]
    assert left is not None
    plain = _plain(factors, entries, left.dtype)
    for name, wanted in exact.items():
        if name not in got:
            continue
        result = got[name].cpu()
        assert result.dtype == left.dtype
        assert bool(torch.isfinite(result).all()), f"{case}: {name} has elements that are not finite"
        error = float((result.double() - wanted).abs().max())
        unit = torch.finfo(left.dtype).eps * float(wanted.abs().max())
        limit = 2 * float((plain[name].double() - wanted).abs().max()) + 4 * unit
        if left.dtype == torch.float64:
            limit = 64 * unit
        assert error <= limit, f"{case}: {name} is off by {error:.3g}, allowed {limit:.3g}"


# ---------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("transpose", [False, True], ids=["long-rows", "long-columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("k", WIDTHS)
def test_values_and_gradients(k: int, dtype: torch.dtype, transpose: bool) -> None:
    factors, entries = _problem(k, dtype, transpose=transpose, weights=k % 2 == 0, biases=k % 3 != 0)
    _check(f"k{k}-{dtype}-{transpose}", factors, entries)


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
def test_options(weights: bool, biases: bool) -> None:
    _check(f"{weights}-{biases}", *_problem(10, weights=weights, biases=biases, core=True))


@pytest.mark.parametrize("k", [3, 130])
def test_wide_index(k: int) -> None:
    _check(f"k{k}-int64", *_problem(k, biases=True, wide_index=True))


def test_rows_and_columns_without_entries_have_zero_gradients() -> None:
    got = _run(*_problem(10, biases=True))
    assert not got["left"][9].any()
    assert not got["row_bias"][9].any()
    assert not got["right"][:, 11].any()
    assert not got["col_bias"][11].any()


def test_autograd_and_single_gradients() -> None:
    factors, entries = _problem(10, core=True)
    moved = [x.to(DEVICE) for x in (factors["left"], factors["core"], factors["right"]) if x is not None]
    on_gpu = entries.to(DEVICE)
    whole = _run({**factors}, entries)
    for wanted in range(3):
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(moved)]
        loss = lrk.ops.completion_loss(*leaves, on_gpu, offset=0.5)
        loss.backward()
        assert torch.allclose(loss.detach(), whole["loss"])  # of the columns pass where only right is wanted
        assert torch.equal(leaves[wanted].grad, whole[NAMES[wanted]])
    assert torch.equal(lrk.ops.completion_loss(*moved, on_gpu, offset=0.5), whole["loss"])


def test_factor_at_an_odd_address() -> None:
    factors, entries = _problem(16)
    left = factors["left"]
    assert left is not None
    flat = torch.cat([left.new_zeros(1), left.flatten()]).to(DEVICE)
    right = factors["right"].to(DEVICE)  # type: ignore[union-attr]
    shifted = lrk.ops.completion_loss(flat[1:].view_as(left), None, right, entries.to(DEVICE), offset=0.5)
    assert torch.equal(shifted, _run(factors, entries)["loss"])


# ---------------------------------------------------------------------- repeatability


@pytest.mark.parametrize("k", [10, 130])
def test_results_repeat_bit_by_bit(k: int) -> None:
    factors, entries = _problem(k, weights=True, biases=True)
    first = _run(factors, entries)
    for _ in range(5):
        again = _run(factors, entries)
        assert all(torch.equal(first[name], again[name]) for name in first)


# ---------------------------------------------------------------------- graphs, streams, devices


@pytest.mark.parametrize("core", [False, True], ids=["", "core"])
def test_graph_capture_and_replay(core: bool) -> None:
    factors, entries = _problem(10, core=core)
    left, right = factors["left"].to(DEVICE), factors["right"].to(DEVICE)  # type: ignore[union-attr]
    cores = None if factors["core"] is None else factors["core"].to(DEVICE)
    on_gpu = entries.to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for: libraries make their handles outside the capture
        lrk.ops.completion_loss_and_gradients(left, cores, right, on_gpu)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _named(*lrk.ops.completion_loss_and_gradients(left, cores, right, on_gpu))
    for step in range(3):
        left.add_(0.125 * step)
        graph.replay()
        eager = _named(*lrk.ops.completion_loss_and_gradients(left, cores, right, on_gpu))
        assert all(torch.equal(captured[name], eager[name]) for name in eager)


def test_current_stream_is_used() -> None:
    factors, entries = _problem(16)
    left, right = factors["left"].to(DEVICE), factors["right"].to(DEVICE)  # type: ignore[union-attr]
    on_gpu = entries.to(DEVICE)
    wanted = lrk.ops.completion_loss(left, None, right, on_gpu)
    late = torch.zeros_like(left)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds: a pass on another stream would read zeros
        late.copy_(left)
        loss = lrk.ops.completion_loss(late, None, right, on_gpu)
    stream.synchronize()
    assert torch.equal(loss, wanted)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    factors, entries = _problem(16)
    losses = []
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        left, right = factors["left"].to(device), factors["right"].to(device)  # type: ignore[union-attr]
        losses.append(lrk.ops.completion_loss(left, None, right, entries.to(device)).cpu())
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    assert torch.cuda.current_device() == 0

"""The three-factor linear op on a GPU: values, gradients, masks, layouts, repeatability, graphs, streams; else skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_kernels import _native, reference
from lowrank_kernels.ops.three_factor import three_factor_linear
from lowrank_kernels.reference.three_factor import dropout_mask
from lowrank_kernels.testing import DTYPES, SHORT, THREE_FACTOR_CASES, ThreeFactorCase, check

if not _native.has_cuda():
    _REASON = "the native module was built without CUDA"
elif not torch.cuda.is_available():
    _REASON = f"no GPU that torch can use: {_native.cuda_info()['reason'] or 'torch was built without CUDA'}"
else:
    _REASON = ""
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON)

DEVICE = "cuda"
HALVES = [dtypes for dtypes in DTYPES if dtypes["dtype"].itemsize == 2]
dtypes_of_cases = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(SHORT[v] for v in d.values() if v))
# Tensor cores take 16-bit types whose sizes are multiples of 8; a dy above 32 MiB is read once for 16 ranks.
TENSOR_CORES = [
    ThreeFactorCase(tokens, n, m, k, depth=depth, dropout_p=dropout_p, **dtypes)
    for dtypes in HALVES
    for tokens, n, m, k, depth, dropout_p in (
        (1, 64, 64, 16, 3, 0.0),
        (130, 264, 136, 8, 1, 0.1),
        (2000, 72, 768, 32, 3, 0.0),
        (300, 768, 72, 64, 2, 0.1),
        (129, 512, 520, 100, None, 0.0),
        (65, 256, 64, 256, 1, 0.1),
    )
] + [ThreeFactorCase(4100, 64, 4104, 16, dtype=torch.bfloat16, factor_dtype=torch.float32)]


def _on_gpu(case: ThreeFactorCase) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """x, weight, left, core, right, bias on the GPU, wanting gradients, and dy."""
    problem = case.problem()
    tensors = {name: tensor.to(DEVICE).requires_grad_() for name, tensor in problem.tensors().items()}
    return tuple(tensors.get(name) for name in ("x", "weight", "left", "core", "right", "bias")), problem.dy.to(DEVICE)


def _results(case: ThreeFactorCase, function: Any = three_factor_linear, seed: int = 0) -> dict[str, Tensor]:
    (x, weight, left, core, right, bias), dy = _on_gpu(case)
    torch.manual_seed(seed)
    y = function(x, weight, left, core, right, bias=bias, scale=case.scale, dropout_p=case.dropout_p)
    named = {"x": x, "weight": weight, "left": left, "core": core, "right": right, "bias": bias}
    wanted = {name: tensor for name, tensor in named.items() if tensor is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def _check(case: ThreeFactorCase) -> None:
    """By the rule, against the reference on the same GPU in float64; masks follow from the seed that torch draws there."""
    got, plain = _results(case), _results(case, reference.three_factor_linear)
    (x, weight, left, core, right, bias), dy = _on_gpu(case)
    longer: list[Any] = [
        None if t is None else t.detach().double().requires_grad_() for t in (x, weight, left, core, right, bias)
    ]
    torch.manual_seed(0)
    seed = torch.randint(0, 2**62, (1,), device=DEVICE) if case.dropout_p else None
    seeded = reference.three_factor.seeded_three_factor_linear
    y = seeded(*longer[:5], longer[5], case.scale, case.dropout_p, seed)
    named = dict(zip(("x", "weight", "left", "core", "right", "bias"), longer, strict=True))
    wanted = {name: tensor for name, tensor in named.items() if tensor is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.double(), allow_unused=True, materialize_grads=True)
    exact = {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}
    rest = [name for name in exact if name != "core" or case.k > 1]
    check(case, *({name: results[name].cpu() for name in rest} for results in (got, plain, exact)))


@pytest.mark.parametrize("case", [case for case in THREE_FACTOR_CASES if case.dtype != torch.float64], ids=str)
def test_case(case: ThreeFactorCase) -> None:
    _check(case)


@pytest.mark.parametrize("case", TENSOR_CORES, ids=str)
def test_tensor_cores(case: ThreeFactorCase) -> None:
    _check(case)


@dtypes_of_cases
@pytest.mark.parametrize("n", [104, 101])
def test_mask_is_that_of_the_rule(n: int, dtypes: dict[str, Any]) -> None:
    dtype, factors = dtypes["dtype"], dtypes.get("factor_dtype") or dtypes["dtype"]
    eye, seed = torch.eye(n, dtype=factors, device=DEVICE), torch.tensor([0x0123456789ABCDEF], device=DEVICE)
    x = torch.ones(70, n, dtype=dtype, device=DEVICE)
    y, z = torch.ops.lowrank_kernels._three_factor_forward(x, None, None, eye, None, eye, 1.0, 0.3, seed)
    arguments = (x, x, None, eye, None, eye, z, 1.0, 0.3, seed, [True, False, False, False])
    dx = torch.ops.lowrank_kernels._three_factor_backward(*arguments)[0]
    mask = dropout_mask(seed.cpu(), x.cpu(), 0.3)
    torch.testing.assert_close(y.cpu(), mask)
    torch.testing.assert_close(dx.cpu(), mask)


@pytest.mark.parametrize("case", [TENSOR_CORES[1], TENSOR_CORES[3], ThreeFactorCase(777, 200, 150, 17, dropout_p=0.1)], ids=str)
def test_results_repeat_bit_by_bit(case: ThreeFactorCase) -> None:
    first, second = _results(case), _results(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("offset", [1, 3])
def test_pointers_at_odd_addresses_and_rows_with_a_pitch(offset: int) -> None:
    case = ThreeFactorCase(65, 64, 72, 16, dtype=torch.bfloat16, factor_dtype=torch.float32)
    (x, weight, left, core, right, bias), _ = _on_gpu(case)
    assert x is not None
    wide = torch.zeros(65, 64 + 2 * offset, dtype=x.dtype, device=DEVICE)
    wide[:, offset : offset + 64] = x.detach()
    with torch.no_grad():
        moved = three_factor_linear(wide[:, offset : offset + 64], weight, left, core, right, bias=bias)
        plain = three_factor_linear(x, weight, left, core, right, bias=bias)
    torch.testing.assert_close(moved, plain)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_graph_capture_and_replay(dropout_p: float) -> None:
    (x, weight, left, core, right, bias), _ = _on_gpu(ThreeFactorCase(130, 256, 264, 16, **HALVES[1]))
    tensors = [t.detach() for t in (x, weight, left, core, right, bias) if t is not None]

    def run() -> Tensor:
        return three_factor_linear(*tensors[:5], bias=tensors[5], dropout_p=dropout_p)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    graph.replay()
    first = y.clone()
    graph.replay()
    assert torch.equal(first, y) == (dropout_p == 0.0)  # every replay draws a new mask
    tensors[0].zero_()
    graph.replay()
    assert bias is not None
    torch.testing.assert_close(y, bias.detach().expand_as(y))


def test_current_stream_is_used() -> None:
    case = ThreeFactorCase(2000, 768, 768, 16, **HALVES[1])
    wanted = _results(case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = _results(case)
    stream.synchronize()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, left, right = (torch.ones(8, 8, device="cuda:1") for _ in range(3))
    assert torch.cuda.current_device() == 0
    y = three_factor_linear(x, None, left, None, right)
    assert y.device.index == 1
    assert torch.equal(y.cpu(), torch.full((8, 8), 64.0))
    assert torch.cuda.current_device() == 0

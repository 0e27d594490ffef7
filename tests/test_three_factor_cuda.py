"""The three-factor linear op on a GPU: values, masks, layouts, repeatability, graphs, streams, memory; else skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_kernels import reference
from lowrank_kernels.ops.three_factor import three_factor_linear
from lowrank_kernels.reference.three_factor import dropout_mask
from lowrank_kernels.testing import DTYPES, SHORT, THREE_FACTOR_CASES, ThreeFactorCase, check

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
Results = dict[str, Tensor]
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


NAMES = ("x", "weight", "left", "core", "right", "bias")


def _run(tensors: tuple[Tensor | None, ...], dy: Tensor, case: ThreeFactorCase, function: Any = three_factor_linear) -> Results:
    x, weight, left, core, right, bias = tensors
    y = function(x, weight, left, core, right, bias=bias, scale=case.scale, shift=case.shift, dropout_p=case.dropout_p)
    wanted = {name: tensor for name, tensor in zip(NAMES, tensors, strict=True) if tensor is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def _results(case: ThreeFactorCase, function: Any = three_factor_linear, seed: int = 0) -> Results:
    tensors, dy = _on_gpu(case)
    torch.manual_seed(seed)
    return _run(tensors, dy, case, function)


def _same(one: Results, other: Results) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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
    y = seeded(*longer[:5], longer[5], case.scale, case.shift, case.dropout_p, seed)
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
    y, z = torch.ops.lowrank_kernels._three_factor_forward(x, None, None, eye, None, eye, 1.0, 0.0, 0.3, seed)
    arguments = (x, x, None, eye, None, eye, z, 1.0, 0.0, 0.3, seed, [True, False, False, False])
    dx = torch.ops.lowrank_kernels._three_factor_backward(*arguments)[0]
    mask = dropout_mask(seed.cpu(), x.cpu(), 0.3)
    torch.testing.assert_close(y.cpu(), mask)
    torch.testing.assert_close(dx.cpu(), mask)


@pytest.mark.parametrize("case", [TENSOR_CORES[1], TENSOR_CORES[3], ThreeFactorCase(777, 200, 150, 17, dropout_p=0.1)], ids=str)
def test_results_repeat_bit_by_bit(case: ThreeFactorCase, churn: Any) -> None:
    first = _results(case)
    for seed in range(12):
        churn(DEVICE, seed)
        assert _same(first, _results(case))


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


@pytest.mark.parametrize("kind", ["x transposed", "x every other feature", "dy expanded", "dy transposed", "dy with a pitch"])
def test_layouts(kind: str) -> None:
    case = ThreeFactorCase(65, 64, 72, 16, dtype=torch.bfloat16, factor_dtype=torch.float32)
    tensors, dy = _on_gpu(case)
    x = tensors[0]
    assert x is not None
    if kind == "dy expanded":
        dy = dy[:1].expand(65, 72)
    wanted = _run(tensors, dy.contiguous(), case)
    if kind == "x transposed":
        x = x.detach().t().contiguous().t().requires_grad_()
    elif kind == "x every other feature":
        x = torch.stack([x.detach(), torch.full_like(x, float("nan"))], -1)[..., 0].requires_grad_()
    elif kind == "dy transposed":
        dy = dy.t().contiguous().t()
    elif kind == "dy with a pitch":
        dy = torch.nn.functional.pad(dy, (3, 5), value=float("nan"))[:, 3:-5]
    assert not (x.is_contiguous() and dy.is_contiguous())
    got = _run((x, *tensors[1:]), dy, case)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(dtype: torch.dtype) -> None:
    case = ThreeFactorCase(130, 64, 72, 16)
    tensors, dy = _on_gpu(case)

    def cast(x: Tensor, weight: Tensor, *factors: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return three_factor_linear(x.to(dtype), weight.to(dtype), *factors, bias=bias.to(dtype), **options)

    def automatic(*arguments: Any, **options: Any) -> Tensor:
        with torch.autocast(DEVICE, dtype=dtype):
            return three_factor_linear(*arguments, **options)

    got, wanted = (_run(tensors, dy.to(dtype), case, function) for function in (automatic, cast))
    assert got["y"].dtype == dtype
    assert all(got[name].dtype == torch.float32 for name in NAMES)
    assert _same(got, wanted)


# ---------------------------------------------------------------------- graphs, streams, devices, memory


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_graph_capture_and_replay(dropout_p: float, capture: Any) -> None:
    (x, weight, left, core, right, bias), _ = _on_gpu(ThreeFactorCase(130, 256, 264, 16, **HALVES[1]))
    tensors = [t.detach() for t in (x, weight, left, core, right, bias) if t is not None]
    graph, y = capture(lambda: three_factor_linear(*tensors[:5], bias=tensors[5], dropout_p=dropout_p))
    graph.replay()
    first = y.clone()
    graph.replay()
    assert torch.equal(first, y) == (dropout_p == 0.0)  # every replay draws a new mask
    tensors[0].zero_()
    graph.replay()
    assert bias is not None
    torch.testing.assert_close(y, bias.detach().expand_as(y))


GRAPHED = [TENSOR_CORES[2], ThreeFactorCase(130, 200, 150, 17), ThreeFactorCase(4, 264, 256, 16, depth=1, **HALVES[1])]


@pytest.mark.parametrize("case", GRAPHED, ids=str)
def test_graph_with_backward(case: ThreeFactorCase, capture: Any) -> None:
    tensors, dy = _on_gpu(case)
    graph, captured = capture(lambda: _run(tensors, dy, case))
    for step in range(3):
        for tensor in (*tensors, dy):
            if tensor is not None:
                tensor.detach().mul_(1 + 0.125 * step)
        graph.replay()
        assert _same(captured, _run(tensors, dy, case))


def test_graph_with_dropout_uses_one_mask_forward_and_backward(capture: Any) -> None:
    eye, x = torch.eye(64, device=DEVICE), torch.ones(33, 64, device=DEVICE, requires_grad=True)
    dy = torch.ones(33, 64, device=DEVICE)
    case = ThreeFactorCase(33, 64, 64, 64, scale=1.0, dropout_p=0.3)
    graph, captured = capture(lambda: _run((x, None, eye.requires_grad_(), None, eye, None), dy, case))
    masks = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured["y"], captured["x"])  # both are the mask
        masks.append(captured["y"].clone())
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("case", GRAPHED, ids=str)
def test_captured_training_step_is_the_eager_one(case: ThreeFactorCase, capture: Any) -> None:
    tensors, target = _on_gpu(case)
    factors = [tensor for tensor in tensors[2:5] if tensor is not None]
    beginning = [factor.detach().clone() for factor in factors]

    def step() -> Tensor:
        x, weight, left, core, right, bias = tensors
        y = three_factor_linear(x, weight, left, core, right, bias=bias, scale=case.scale)
        loss = (y - target).float().square().mean()
        for factor, grad in zip(factors, torch.autograd.grad(loss, factors), strict=True):
            factor.detach().sub_(grad)
        return loss.detach()

    def train(once: Any) -> list[Tensor]:
        for factor, start in zip(factors, beginning, strict=True):
            factor.detach().copy_(start)
        losses = [once().clone() for _ in range(4)]
        return [*losses, *(factor.detach().clone() for factor in factors)]

    wanted = train(step)
    graph, loss = capture(step)

    def replay() -> Tensor:
        graph.replay()
        return loss

    got = train(replay)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert not torch.equal(wanted[0], wanted[3])


def test_graphed_callable() -> None:
    case = GRAPHED[0]
    tensors, dy = _on_gpu(case)
    given = tuple(tensor for tensor in tensors if tensor is not None)

    def layer(x: Tensor, weight: Tensor, left: Tensor, core: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        return three_factor_linear(x, weight, left, core, right, bias=bias, scale=case.scale)

    samples = tuple(tensor.detach().clone().requires_grad_() for tensor in given)
    y = torch.cuda.make_graphed_callables(layer, samples)(*given)
    grads = torch.autograd.grad(y, given, dy)
    assert _same({"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}, _run(tensors, dy, case))


def test_compile_with_cuda_graphs() -> None:
    pytest.importorskip("triton", reason="torch.compile on a GPU needs triton")
    from torch._dynamo.utils import counters

    case = GRAPHED[0]
    tensors, dy = _on_gpu(case)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(three_factor_linear, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        got = {name: tensor.clone() for name, tensor in _run(tensors, dy, case, compiled).items()}
        for name, wanted in _run(tensors, dy, case).items():
            torch.testing.assert_close(got[name], wanted, msg=lambda text, name=name: f"{name}: {text}")
        assert tensors[0] is not None
        tensors[0].detach().mul_(0.75)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_current_stream_is_used() -> None:
    case = ThreeFactorCase(2000, 768, 768, 16, **HALVES[1])
    tensors, dy = _on_gpu(case)
    wanted = _run(tensors, dy, case)
    x = tensors[0]
    assert x is not None
    late_x, late_dy = torch.zeros_like(x).requires_grad_(), torch.zeros_like(dy)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds: a kernel on another stream would read zeros
        late_x.detach().copy_(x.detach())
        late_dy.copy_(dy)
        got = _run((late_x, *tensors[1:]), late_dy, case)
    stream.synchronize()
    assert _same(got, wanted)


def test_streams_do_not_share_workspace() -> None:
    cases = [ThreeFactorCase(2000, 768, 768, 16, **HALVES[1]), ThreeFactorCase(1500, 512, 1024, 32, **HALVES[0])]
    problems = [_on_gpu(case) for case in cases]
    wanted = [_run(*problem, case) for problem, case in zip(problems, cases, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    got: list[list[Results]] = [[], []]
    for _ in range(10):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[which].append(_run(*problems[which], cases[which]))
    torch.cuda.synchronize()
    assert all(_same(one, wanted[which]) for which in (0, 1) for one in got[which])


def test_out_of_memory_is_the_error_of_torch_and_the_next_call_works(spare_memory: Any) -> None:
    case = ThreeFactorCase(130, 64, 72, 16, **HALVES[1])
    wanted = _results(case)
    x, left, right = (torch.ones(*shape, dtype=torch.float16, device=DEVICE) for shape in ((1 << 16, 64), (4096, 16), (16, 64)))
    with spare_memory(64 << 20):
        with pytest.raises(torch.cuda.OutOfMemoryError):  # y alone is 512 MiB
            three_factor_linear(x, None, left, None, right)
        assert _same(_results(case), wanted)
    assert bool((three_factor_linear(x, None, left, None, right) == 1024).all())


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, left, right = (torch.ones(8, 8, device="cuda:1") for _ in range(3))
    assert torch.cuda.current_device() == 0
    y = three_factor_linear(x, None, left, None, right)
    assert y.device.index == 1
    assert torch.equal(y.cpu(), torch.full((8, 8), 64.0))
    assert torch.cuda.current_device() == 0

"""The three-factor linear op inside compiled and exported programs, several threads and a bounded memory.

Most checks with dropout use that the update u is linear in x and in every factor, whatever the mask:
<dy, u> = <dx, x> = <dL, L> = <dcore_l, core_l> = <dR, R>. It fails as soon as backward takes another mask than forward.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from workers import in_subprocess

from lowrank_kernels import _native, reference
from lowrank_kernels.ops.three_factor import three_factor_linear
from lowrank_kernels.testing import (
    DTYPES,
    FEATURES,
    RANKS,
    SHORT,
    THREE_FACTOR_CASES,
    THREE_FACTOR_PATHS,
    TOKENS,
    ThreeFactorCase,
    check,
    philox4x32,
    three_factor_path,
)

DROPPED = ThreeFactorCase((2, 9), 20, 11, 4, weight=False, bias=False, dropout_p=0.4)
KINDS = [
    ThreeFactorCase(7, 9, 11, 3),
    ThreeFactorCase((2, 3), 9, 11, 3, depth=None, bias=False),
    ThreeFactorCase(7, 9, 11, 3, depth=0, weight=False),
    ThreeFactorCase(0, 9, 11, 3, weight=False, bias=False),
    ThreeFactorCase(9, 16, 24, 8, dropout_p=0.3, dtype=torch.bfloat16, factor_dtype=torch.float32),
    ThreeFactorCase(9, 16, 24, 8, depth=1, dropout_p=0.3, dtype=torch.float64),
]
raw = torch.ops.lowrank_kernels
native = pytest.mark.skipif(len(THREE_FACTOR_PATHS) == 1, reason=f"no native module: {_native.unavailable}")
paths = pytest.mark.parametrize("path", THREE_FACTOR_PATHS)


def layer(case: ThreeFactorCase) -> Callable[..., Tensor]:
    """The op as a function of the tensors that the case has; its dropout draws from torch's generator as it stands."""
    names = list(case.problem().tensors())

    def function(*tensors: Tensor) -> Tensor:
        given: dict[str, Any] = {"weight": None, "core": None} | dict(zip(names, tensors, strict=True))
        return three_factor_linear(**given, scale=case.scale, shift=case.shift, dropout_p=case.dropout_p)

    return function


def leaves(case: ThreeFactorCase) -> tuple[dict[str, Tensor], Tensor]:
    problem = case.problem()
    return {name: tensor.requires_grad_() for name, tensor in problem.tensors().items()}, problem.dy


def one_mask(function: Callable[..., Tensor]) -> Tensor:
    """Check the identity above on DROPPED, and return u."""
    tensors, dy = leaves(DROPPED)
    u = function(*tensors.values())
    grads = dict(zip(tensors, torch.autograd.grad(u, list(tensors.values()), dy), strict=True))
    inner = [(grads[name] * tensors[name]).sum() for name in ("x", "left", "right")]
    inner += list((grads["core"] * tensors["core"]).sum((1, 2)))
    wanted = (dy * u).sum()
    assert wanted.abs() > 1e-3  # else it would hold for two masks, too
    torch.testing.assert_close(torch.stack(inner), wanted.expand(len(inner)), rtol=1e-4, atol=1e-5)
    return u.detach()


# ---------------------------------------------------------------------- the cases and their oracle


def test_cases_cover_every_size_and_dtype() -> None:
    cases = THREE_FACTOR_CASES
    for dtypes in DTYPES:
        own = [c for c in cases if (c.dtype, c.factor_dtype) == (dtypes["dtype"], dtypes.get("factor_dtype"))]
        assert {c.k for c in own} >= set(RANKS)
    assert {case.lead for case in cases} >= {(tokens,) for tokens in TOKENS} | {(), (2, 3), (3, 0, 2)}
    assert {case.n for case in cases} >= {0, *FEATURES}
    assert {case.m for case in cases} >= {0, *FEATURES}
    assert {case.depth for case in cases} == {None, 0, 1, 2, 3, 4}
    assert len({str(case) for case in cases}) == len(set(cases))


def test_philox_of_the_oracle_gives_the_known_answers() -> None:
    """Random123's known-answer test of Philox4x32-10."""
    import numpy as np

    pi = np.array([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]], dtype=np.uint64)
    for counter, key, answer in (
        (0 * pi, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0 * pi + np.uint64(0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        assert " ".join(f"{int(word):08x}" for word in philox4x32(counter, key)[0]) == answer


@paths
def test_backward_uses_the_mask_of_forward(path: str) -> None:
    with three_factor_path(path):
        torch.manual_seed(0)
        one_mask(layer(DROPPED))


# ---------------------------------------------------------------------- opcheck of every kind of argument


@paths
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_fake_tensors_and_schema_are_right_for_every_kind(case: ThreeFactorCase, path: str) -> None:
    problem = case.problem()
    x, dy = (t.flatten(0, -2).repeat(1, 2)[:, : t.shape[-1]] for t in (problem.x, problem.dy))  # rows with a pitch
    _, weight, left, core, right, bias = problem[:6]
    seed = torch.tensor([5]) if case.dropout_p else None
    utils = ("test_schema", "test_faketensor")
    with three_factor_path(path):
        arguments = (x, weight, bias, left, core, right, case.scale, case.shift, case.dropout_p, seed)
        torch.library.opcheck(raw._three_factor_forward, arguments, test_utils=utils)
        z = raw._three_factor_forward(*arguments)[1]
        for wanted in ([True] * 4, [True, False, False, False], [False, True, False, True]):
            arguments = (dy, x, weight, left, core, right, z, case.scale, case.shift, case.dropout_p, seed, wanted)
            torch.library.opcheck(raw._three_factor_backward, arguments, test_utils=utils)


# ---------------------------------------------------------------------- compile


def compiled_targets() -> tuple[list[str], Any]:
    """A backend that runs graphs as they are and keeps the names of the operators in them."""
    from torch._dynamo.backends.common import aot_autograd

    names: list[str] = []

    def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return torch._functorch.aot_autograd.make_boxed_func(module.forward)

    return names, aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_compiled_graphs_hold_the_op_and_nothing_else(case: ThreeFactorCase) -> None:
    torch._dynamo.reset()
    names, backend = compiled_targets()
    tensors, dy = leaves(case)
    y = torch.compile(layer(case), fullgraph=True, backend=backend)(*tensors.values())
    torch.autograd.grad(y, list(tensors.values()), dy)
    assert names.count("lowrank_kernels._three_factor_forward.default") == 1
    assert names.count("lowrank_kernels._three_factor_backward.default") == 1
    products = [name for name in names if name.startswith(("aten.mm", "aten.addmm", "aten.bmm"))]
    assert len(products) == case.weight, "only the gradient of the weight is left to torch"


def test_one_dynamic_graph_serves_every_number_of_tokens() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    case = KINDS[0]
    compiled = torch.compile(layer(case), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for tokens in (7, 2, 33):
        tensors, _ = leaves(ThreeFactorCase(tokens, case.n, case.m, case.k))
        torch.testing.assert_close(compiled(*tensors.values()), layer(case)(*tensors.values()))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts  # torch may have started over for the first


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_backward_uses_the_mask_of_forward(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer(DROPPED), fullgraph=True, dynamic=dynamic, backend=backend)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(one_mask(compiled))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_compile_without_gradients_under_autocast() -> None:
    torch._dynamo.reset()
    case = KINDS[0]
    tensors = case.problem().tensors().values()
    compiled = torch.compile(layer(case), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = compiled(*tensors), layer(case)(*tensors)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)


def test_compiled_checkpoint_uses_the_mask_again() -> None:
    torch._dynamo.reset()
    function = layer(DROPPED)

    def recomputed(*tensors: Tensor) -> Tensor:
        return checkpoint(function, *tensors, use_reentrant=False)

    torch.manual_seed(0)
    one_mask(torch.compile(recomputed, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpoint_uses_the_mask_again_whatever_was_drawn_since(reentrant: bool) -> None:
    tensors, dy = leaves(DROPPED)
    torch.manual_seed(0)
    wanted = torch.autograd.grad(layer(DROPPED)(*tensors.values()), list(tensors.values()), dy)
    torch.manual_seed(0)
    y = checkpoint(layer(DROPPED), *tensors.values(), use_reentrant=reentrant)
    torch.rand(100)
    y.backward(dy)
    assert all(torch.equal(t.grad, want) for t, want in zip(tensors.values(), wanted, strict=True))


# ---------------------------------------------------------------------- export


class Layer(torch.nn.Module):
    def __init__(self, case: ThreeFactorCase) -> None:
        super().__init__()
        self.function = layer(case)
        self.rest = torch.nn.ParameterList(list(case.problem().tensors().values())[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.rest)


def test_export_for_any_number_of_tokens() -> None:
    case = KINDS[0]
    module = Layer(case)
    shapes = {"x": {0: torch.export.Dim("tokens", min=2)}}
    program = torch.export.export(module, (case.problem().x,), dynamic_shapes=shapes)
    for tokens in (2, 7, 50):
        x = ThreeFactorCase(tokens, case.n, case.m, case.k).problem().x
        torch.testing.assert_close(program.module()(x), module(x))


def test_an_exported_program_draws_a_new_mask_at_every_call() -> None:
    module, x = Layer(DROPPED), DROPPED.problem().x
    program = torch.export.export(module, (x,)).module()
    torch.manual_seed(0)
    first, second = program(x), program(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(program(x), first)
    torch.manual_seed(0)
    assert torch.equal(module(x), first)


# ---------------------------------------------------------------------- what a user may do with the output


@paths
def test_the_output_may_be_changed_in_place(path: str) -> None:
    case = KINDS[0]
    tensors, dy = leaves(case)
    with three_factor_path(path):
        wanted = torch.autograd.grad(layer(case)(*tensors.values()) * 3, list(tensors.values()), dy)
        y = layer(case)(*tensors.values())
        y.mul_(3)
        grads = torch.autograd.grad(y, list(tensors.values()), dy)
    assert all(torch.equal(got, want) for got, want in zip(grads, wanted, strict=True))


@paths
@pytest.mark.parametrize("tokens", [(), (1,), (1, 4), (3, 1, 2)], ids=str)
def test_the_output_is_a_tensor_of_its_own(tokens: tuple[int, ...], path: str) -> None:
    """No alias of an argument, contiguous, whatever the scale leaves to do."""
    for scale in (0.0, 1.0):
        case = ThreeFactorCase(tokens, 5, 4, 2, weight=False, scale=scale)
        problem = case.problem()
        with three_factor_path(path):
            y = problem.run(three_factor_linear)
        assert y.is_contiguous()
        own = {t.untyped_storage().data_ptr() for t in problem.tensors().values()}
        assert y.untyped_storage().data_ptr() not in own


@paths
def test_a_nan_stays_in_its_row(path: str) -> None:
    case = ThreeFactorCase(130, 40, 24, 16)
    problem = case.problem()
    with three_factor_path(path):
        clean = problem.run(three_factor_linear)
        problem.x[67, 3] = torch.nan
        y = problem.run(three_factor_linear)
    assert y[67].isnan().all()
    others = [row for row in range(130) if row != 67]
    assert torch.equal(y[others], clean[others])


# ---------------------------------------------------------------------- threads and memory


def test_python_threads_at_the_same_time() -> None:
    problems = [ThreeFactorCase(100 + number, 65, 40, 9, dtype=torch.float64).problem() for number in range(4)]
    wanted = [problem.output_and_gradients(three_factor_linear) for problem in problems]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            got = problems[number].output_and_gradients(three_factor_linear)
            if not all(torch.equal(got[name], tensor) for name, tensor in wanted[number].items()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_the_native_module(tmp_path: Any) -> None:
    case = ThreeFactorCase(9, 20, 11, 4, dropout_p=0.3)
    said = in_subprocess(
        f"""
        import torch
        from lowrank_kernels import _native
        from lowrank_kernels.ops.three_factor import three_factor_linear
        from lowrank_kernels.testing import THREE_FACTOR_PATHS, ThreeFactorCase
        assert THREE_FACTOR_PATHS == ("chain",)
        torch.save({case!r}.problem().output_and_gradients(three_factor_linear), {str(tmp_path / "got.pt")!r})
        print(_native.unavailable)
        """,
        LOWRANK_KERNELS_NATIVE="0",
    )
    assert said.strip() == "switched off by LOWRANK_KERNELS_NATIVE=0"
    problem = case.problem()
    plain = problem.output_and_gradients(reference.three_factor_linear)
    check(case, torch.load(tmp_path / "got.pt"), plain, problem.exact())


@native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_no_copy_of_x_and_no_mask_is_made(dropout_p: float) -> None:
    """bfloat16 x with float32 factors: beside outputs and gradients less than a quarter of x, in both directions."""
    said = in_subprocess(
        f"""
        import gc, torch
        from lowrank_kernels.ops.three_factor import three_factor_linear

        def memory(name):
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024

        def extra(run):
            gc.collect()
            open("/proc/self/clear_refs", "w").write("5")
            before = memory("VmRSS")
            result = run()
            return result, memory("VmHWM") - before

        tokens, n, m, k = 8192, 2048, 64, 8
        x = torch.ones(tokens, n, dtype=torch.bfloat16, requires_grad=True)
        factors = [torch.ones(shape, requires_grad=True) for shape in ((m, k), (2, k, k), (k, n))]
        dy = torch.ones(tokens, m, dtype=torch.bfloat16)

        def forward():
            return three_factor_linear(x, None, *factors, dropout_p={dropout_p})

        torch.autograd.grad(forward(), [x, *factors], dy)  # the first call loads libraries
        y, used_forward = extra(forward)
        grads, used_backward = extra(lambda: torch.autograd.grad(y, [x, *factors], dy))
        _, control = extra(lambda: x.detach().float())  # the measure sees what it should
        print(used_forward - y.nbytes / 2**20, used_backward - grads[0].nbytes / 2**20, control, x.nbytes / 2**20)
        """,
        MALLOC_TRIM_THRESHOLD_="0",
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    in_forward, in_backward, control, size = map(float, said.split())
    assert control > 1.8 * size
    assert max(in_forward, in_backward) < size / 4, f"{in_forward:.1f} and {in_backward:.1f} MiB, x is {size:.0f} MiB"


# ---------------------------------------------------------------------- second derivatives through a mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=SHORT.get)
def test_a_gradient_penalty_keeps_the_mask(dtype: torch.dtype) -> None:
    """The gradient with create_graph=True is the one without, and so is its mask."""
    case = ThreeFactorCase(9, 20, 11, 4, dropout_p=0.5, dtype=dtype)
    tensors, dy = leaves(case)
    inputs = list(tensors.values())
    torch.manual_seed(0)
    y = layer(case)(*inputs)
    plain = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    graph = torch.autograd.grad(y, inputs, dy, create_graph=True)
    for got, want in zip(graph, plain, strict=True):
        torch.testing.assert_close(got, want)
    penalty = torch.autograd.grad(graph[0].square().sum(), inputs[2])[0]
    assert penalty.abs().sum() > 0

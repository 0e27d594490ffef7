"""The completion op inside compiled, exported and transformed programs; higher derivatives, a bounded memory."""

from __future__ import annotations

import copy
import sys
from typing import Any

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
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from workers import in_subprocess

import lowrank_kernels as lrk
from lowrank_kernels import ObservedEntries, _native, ops, reference
from lowrank_kernels.entries import SortedEntries
from lowrank_kernels.testing import CompletionCase, CompletionProblem, check

# ---------------------------------------------------------------------- opcheck


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        CompletionCase(9, 11, 16, 40, depth=1, weights=True, biases=True),
        CompletionCase(9, 11, 3, 40, depth=None),  # a width that is no multiple of the vectors': the op pads by itself
        CompletionCase(9, 11, 5, 40, depth=1, biases=True, dtype=torch.float64),
    ],
    ids=str,
)
def test_opcheck(case: CompletionCase, wanted: tuple[bool, bool]) -> None:
    torch.library.opcheck(raw_op.default, flat_arguments(case.problem(), *wanted))


def test_raw_op_pads_by_itself() -> None:
    for k in (1, 3, 8, 17):
        case = CompletionCase(12, 13, k, 60, depth=None, biases=True)
        problem, plain, exact = oracles(case)
        loss, grad_p, grad_row_bias, _, grad_v, grad_col_bias, _ = raw_op(*flat_arguments(problem))
        got = {"loss": loss, "left": grad_p, "right": grad_v.t(), "row_bias": grad_row_bias, "col_bias": grad_col_bias}
        check(case, got, plain, exact)


def test_raw_op_warns_where_it_would_drop_gradients() -> None:
    arguments = list(flat_arguments(SMALL.problem()))
    arguments[0] = arguments[0].clone().requires_grad_()
    with pytest.raises(UserWarning, match="autograd kernel was not registered"):  # an error by pyproject.toml
        raw_op(*arguments)[0].backward()


# ---------------------------------------------------------------------- compile


def compiled_targets() -> tuple[list[list[str]], Any]:
    """A backend that runs graphs as they are and keeps the names of the operators in them."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[list[str]] = []

    def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return torch._functorch.aot_autograd.make_boxed_func(module.forward)

    return graphs, aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("closed", [True, False], ids=["entries_closed_over", "entries_as_argument"])
def test_compile(dynamic: bool, closed: bool) -> None:
    torch._dynamo.reset()
    graphs, backend = compiled_targets()
    fixed = SMALL.problem()

    def loss(left: Tensor, core: Tensor, right: Tensor, row_bias: Tensor, entries: ObservedEntries) -> Tensor:
        entries = fixed.entries if closed else entries
        return ops.completion_loss(left, core, right, entries, row_bias=row_bias) * 3

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=backend)
    others = [] if closed else [CompletionCase(23, 10, 5, 61, depth=2, weights=True, biases=True)]
    for case in (SMALL, *others):
        problem = case.problem()
        leaves = [problem.factors()[name].clone().requires_grad_() for name in ("left", "core", "right", "row_bias")]
        got = torch.autograd.grad(compiled(*leaves, problem.entries), leaves)
        wanted = torch.autograd.grad(loss(*leaves, problem.entries), leaves)
        close(dict(enumerate(got)), dict(enumerate(wanted)))  # type: ignore[arg-type]
    names = [name for graph in graphs for name in graph]
    if LEVELS:
        one_for_both = dynamic and torch.__version__ >= "2.13"  # 2.4 and 2.6 compile again
        assert names.count("lowrank_kernels._completion.default") == (1 if one_for_both else 1 + len(others))
        assert not any("index" in name for name in names), "the reference was compiled instead of the op"


def test_compile_by_the_default_backend() -> None:
    torch._dynamo.reset()
    problem = SMALL.problem()
    counter = CompileCounterWithBackend("inductor")
    leaves = [x.clone().requires_grad_() for x in (problem.left, problem.core, problem.right)]

    def loss(*factors: Tensor) -> Tensor:
        return ops.completion_loss(*factors, problem.entries)

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=counter)(*leaves), leaves)
    close(dict(enumerate(got)), dict(enumerate(torch.autograd.grad(loss(*leaves), leaves))))  # type: ignore[arg-type]
    assert counter.frame_count == 1


def test_compile_without_gradients() -> None:
    torch._dynamo.reset()
    problem = SMALL.problem()
    keywords = {"row_bias": problem.row_bias, "col_bias": problem.col_bias, "offset": problem.offset}

    def loss(left: Tensor) -> Tensor:
        return ops.completion_loss(left, problem.core, problem.right, problem.entries, **keywords)  # type: ignore[arg-type]

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(problem.left), problem.run(ops.completion_loss))


def test_compiled_func_grad_is_not_zero() -> None:
    torch._dynamo.reset()
    problem = SMALL.problem()

    def loss(left: Tensor) -> Tensor:
        return ops.completion_loss(left, problem.core, problem.right, problem.entries)

    got = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(problem.left)
    left = problem.left.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(left), left)
    assert got.abs().max() > 0.1
    close({"left": got}, {"left": wanted})


# ---------------------------------------------------------------------- export


class Completion(torch.nn.Module):
    def __init__(self, problem: CompletionProblem) -> None:
        super().__init__()
        self.entries = problem.entries
        self.left = torch.nn.Parameter(problem.left.clone())

    def forward(self, right: Tensor) -> Tensor:
        return ops.completion_loss(self.left, None, right, self.entries)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict: bool) -> None:
    problem = SMALL.problem()
    module = Completion(problem)
    program = torch.export.export(module, (problem.right,), strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert "lowrank_kernels._completion.default" in [str(node.target) for graph in graphs for node in graph.nodes]
    other = torch.randn(problem.right.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(program.module()(other), module(other))


def test_a_program_exported_for_shorter_vectors_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SMALL.problem()
    module = Completion(problem)
    with monkeypatch.context() as patch:
        patch.setattr(_native, "factor_lanes", lambda dtype, device: 1)
        program = torch.export.export(module, (problem.right,))
    close({"loss": program.module()(problem.right).detach()}, {"loss": module(problem.right).detach()})


# ---------------------------------------------------------------------- meta and fake tensors


def test_meta_tensors() -> None:
    arguments = flat_arguments(SMALL.problem())
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    for got, wanted in zip(raw_op(*meta), raw_op(*arguments), strict=True):
        assert got.device.type == "meta"
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


def test_fake_tensors() -> None:
    problem = SMALL.problem()
    with FakeTensorMode() as mode:

        def fake(x: Any) -> Any:
            return mode.from_tensor(x) if isinstance(x, Tensor) else x

        sides = [SortedEntries(*map(fake, side)) for side in (problem.entries.by_row, problem.entries.by_col)]
        faked = CompletionProblem(*map(fake, problem))._replace(entries=ObservedEntries(problem.entries.shape, *sides))
        got = fused(faked)
    assert {name: tuple(x.shape) for name, x in got.items()} == {name: tuple(x.shape) for name, x in fused(problem).items()}


@native
def test_null_pointers_are_refused() -> None:
    problem = SMALL.problem()
    own, other = problem.left.to("meta"), problem.right.t().contiguous()
    lanes = _native.factor_lanes(torch.float32, torch.device("cpu"))
    own, other = own.new_empty(SMALL.m, lanes), other.new_zeros(SMALL.n, lanes)
    with pytest.raises(ValueError, match=r"own has a null data pointer \(a meta or fake tensor"):
        _native.completion_pass(problem.entries.by_row, own, other, None, None, 0.0)


# ---------------------------------------------------------------------- double backward


def hessian_products(function: Any, problem: CompletionProblem, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradient of |gradient|^2 + loss^2."""
    leaves = {name: problem.factors()[name].clone().requires_grad_() for name in names}
    loss = problem._replace(**leaves).run(function)
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, **options)
    total = sum(g.square().sum() for g in gradients) + loss.square()
    second = torch.autograd.grad(total, list(leaves.values()), **options)
    return dict(zip(leaves, second, strict=True))


@pytest.mark.parametrize("names", [NAMES, ("left",), ("core",), ("right", "col_bias"), ("row_bias",)], ids="+".join)
@pytest.mark.parametrize("case", [SMALL64, CompletionCase(21, 13, 17, 90, weights=True, biases=True)], ids=str)
def test_double_backward(case: CompletionCase, names: tuple[str, ...]) -> None:
    problem = case.problem()
    close(
        hessian_products(ops.completion_loss, problem, names), hessian_products(reference.completion_loss, problem, names), 10
    )


def test_double_backward_without_a_core_layer() -> None:
    problem = CompletionCase(6, 5, 3, 14, depth=0, biases=True, dtype=torch.float64).problem()
    got = hessian_products(ops.completion_loss, problem, NAMES)
    assert got["core"].shape == (0, 3, 3)
    close(got, hessian_products(reference.completion_loss, problem, NAMES), 10)


@pytest.mark.parametrize("create_graph", [False, True])
def test_factors_that_depend_on_each_other(create_graph: bool) -> None:
    """right = left.t() and a core made of left: each path counts once."""
    entries = CompletionCase(8, 8, 4, 30, dtype=torch.float64).problem().entries
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8, 4, generator=generator, dtype=torch.float64)

    def gradients(function: Any) -> dict[str, Tensor]:
        left = start.clone().requires_grad_()
        core = (left.t() @ left)[None] / 8
        loss = function(left, core, left.t(), entries, row_bias=left[:, 0])
        (first,) = torch.autograd.grad(loss, left, create_graph=create_graph)
        if not create_graph:
            return {"first": first}
        return {"first": first.detach(), "second": torch.autograd.grad(first.square().sum(), left)[0]}

    close(gradients(ops.completion_loss), gradients(reference.completion_loss), 10)


def test_a_second_order_term_is_not_dropped_beside_another() -> None:
    problem = SMALL64.problem()

    def second(function: Any) -> Tensor:
        left = problem.left.clone().requires_grad_()
        loss = function(left, problem.core, problem.right, problem.entries) + left.pow(4).sum()
        (first,) = torch.autograd.grad(loss, left, create_graph=True)
        return torch.autograd.grad(first.sum(), left)[0]

    close({"left": second(ops.completion_loss)}, {"left": second(reference.completion_loss)}, 10)


# ---------------------------------------------------------------------- function transforms


def test_func_grad() -> None:
    problem = SMALL64.problem()
    names = list(problem.factors())

    def loss(*factors: Tensor) -> Tensor:
        return problem._replace(**dict(zip(names, factors, strict=True))).run(ops.completion_loss)

    got = torch.func.grad(loss, argnums=tuple(range(len(names))))(*problem.factors().values())
    wanted = fused(problem)
    close(dict(zip(names, got, strict=True)), {name: wanted[name] for name in names})


def test_func_hessian_of_a_bias() -> None:
    problem = SMALL64.problem()
    hessian = torch.func.hessian(lambda b: problem._replace(row_bias=b).run(ops.completion_loss))(problem.row_bias)
    row, _, _, weights = problem.entries.coo()
    wanted = torch.zeros(SMALL64.m, dtype=torch.float64).index_add_(0, row, weights).diag()
    close({"hessian": hessian}, {"hessian": wanted})


def test_vmap() -> None:
    problem = SMALL64.problem()
    lefts = torch.stack([problem.left, 2 * problem.left, -problem.left])

    def loss(left: Tensor) -> Tensor:
        return problem._replace(left=left).run(ops.completion_loss)

    wanted = {"loss": torch.stack([loss(left) for left in lefts])}
    close({"loss": torch.func.vmap(loss)(lefts)}, wanted)
    gradients = torch.func.vmap(torch.func.grad(loss))(lefts)
    close({"left": gradients[1]}, {"left": fused(problem._replace(left=lefts[1]))["left"]})


@pytest.mark.parametrize("mode", ["func.jvp", "dual_level"])
def test_forward_mode(mode: str) -> None:
    problem = SMALL64.problem()
    tangent = torch.linspace(-1, 1, problem.right.numel(), dtype=torch.float64).view_as(problem.right)

    def loss(right: Tensor) -> Tensor:
        return problem._replace(right=right).run(ops.completion_loss)

    if mode == "func.jvp":
        value, derivative = torch.func.jvp(loss, (problem.right,), (tangent,))
    else:
        with forward_ad.dual_level():
            value, derivative = forward_ad.unpack_dual(loss(forward_ad.make_dual(problem.right, tangent)))
    wanted = fused(problem)
    close({"value": value, "slope": derivative}, {"value": wanted["loss"], "slope": (wanted["right"] * tangent).sum()})


# ---------------------------------------------------------------------- modes of torch


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpoint(reentrant: bool) -> None:
    problem = SMALL.problem()
    left, right = problem.left.clone().requires_grad_(), problem.right.clone().requires_grad_()

    def loss(left: Tensor, right: Tensor) -> Tensor:
        return problem._replace(left=left, right=right).run(ops.completion_loss)

    checkpoint(loss, left, right, use_reentrant=reentrant).backward()
    wanted = fused(problem)
    assert torch.equal(left.grad, wanted["left"])
    assert torch.equal(right.grad, wanted["right"])


def test_inference_mode() -> None:
    with torch.inference_mode():
        problem = SMALL.problem()
        inside = problem.run(ops.completion_loss)
        _, gradients = problem.run(ops.completion_loss_and_gradients)  # type: ignore[arg-type, misc]
    assert inside.is_inference()
    outside = fused(SMALL.problem())
    assert torch.equal(inside, outside["loss"])
    assert torch.equal(gradients.core, outside["core"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_of_the_factors(dtype: torch.dtype) -> None:
    problem = CompletionCase(21, 13, 16, 90, weights=True, biases=True).problem()
    wanted, second = fused(problem), hessian_products(ops.completion_loss, problem, ("row_bias",))
    with torch.autocast("cpu", dtype=dtype):
        same_bits(fused(problem), wanted)
        left = problem.left.clone().requires_grad_()
        (graph,) = torch.autograd.grad(problem._replace(left=left).run(ops.completion_loss), left, create_graph=True)
        value = torch.func.vmap(lambda left: problem._replace(left=left).run(ops.completion_loss))(problem.left[None])[0]
    close({"left": graph.detach()}, {"left": wanted["left"]})
    close({"value": value}, {"value": wanted["loss"]})
    assert second["row_bias"].dtype == torch.float32


def test_deepcopy_and_a_changed_factor() -> None:
    """The loss reads its arguments at every call: nothing is cached by address."""
    problem = SMALL.problem()
    left = problem.left.clone()
    before = problem._replace(left=left).run(ops.completion_loss)
    left.mul_(2)
    after = problem._replace(left=left).run(ops.completion_loss)
    assert before != after
    assert torch.equal(after, copy.deepcopy(problem)._replace(left=2 * problem.left).run(ops.completion_loss))


def test_a_factor_changed_before_backward_is_noticed() -> None:
    problem = SMALL.problem()
    left = problem.left.clone().requires_grad_()
    loss = problem._replace(left=left).run(ops.completion_loss)
    with torch.no_grad():
        left.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------- fallback


def test_without_the_native_module(tmp_path: Any) -> None:
    said = in_subprocess(
        f"""
        import torch
        from lowrank_kernels import _native, ops
        from lowrank_kernels.testing import CompletionCase
        assert not _native.has_cpu() and not _native.has_cuda() and _native._C is None
        problem = {SMALL!r}.problem()
        torch.save(problem.loss_and_gradients(ops.completion_loss), {str(tmp_path / "got.pt")!r})
        loss, gradients = problem.run(ops.completion_loss_and_gradients)
        assert gradients.right.shape == problem.right.shape
        p, v = problem.left @ problem.core[1] @ problem.core[0], problem.right.t().contiguous()
        sides = (*problem.entries.by_row, *problem.entries.by_col)
        for wanted in ((True, True), (True, False), (False, True), (False, False)):
            arguments = (p, v, problem.row_bias, problem.col_bias, 0.25, *sides, *wanted)
            torch.library.opcheck(torch.ops.lowrank_kernels._completion.default, arguments)
        print(_native.unavailable)
        """,
        LOWRANK_KERNELS_NATIVE="0",
    )
    assert said.strip() == "switched off by LOWRANK_KERNELS_NATIVE=0"
    _, plain, exact = oracles(SMALL)
    check(SMALL, torch.load(tmp_path / "got.pt"), plain, exact)


def test_why_the_native_module_did_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWRANK_KERNELS_NATIVE", raising=False)
    monkeypatch.delattr(lrk, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "lowrank_kernels._C", None)
    module, reason = _native._load()
    assert module is None
    assert reason.startswith("the compiled module lowrank_kernels._C did not load: ")


# ---------------------------------------------------------------------- threads and memory


@native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_that_obeys_torch() -> None:
    said = in_subprocess(
        f"""
        import os, re
        import lowrank_kernels, torch
        from lowrank_kernels import _native
        from lowrank_kernels.testing import CompletionCase
        problem = {MANY_UNITS!r}.problem()
        lanes = _native.factor_lanes(torch.float32, torch.device("cpu"))
        own, other = torch.ones(700, lanes), torch.ones(400, lanes)

        def threads_made(wanted):
            torch.set_num_threads(wanted)  # older torch makes threads here, in another pool
            before = len(os.listdir("/proc/self/task"))
            for _ in range(20):
                _native.completion_pass(problem.entries.by_row, own, other, None, None, 0.0)
            return len(os.listdir("/proc/self/task")) - before

        print(*(threads_made(n) for n in (1, 2, 4)))
        with open("/proc/self/maps") as maps:
            print(*{{line.split()[-1] for line in maps if re.search(r"lib[gi]?omp", line)}})
        """,
        OMP_NUM_THREADS="1",
    )
    counts, runtimes = said.strip().split("\n")
    one, two, four = map(int, counts.split())
    if _native._C.openmp:
        assert (one, two, four) == (0, 1, 2)
    assert len(runtimes.split()) == 1, runtimes


@native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_of_size_entries_times_rank_is_allocated() -> None:
    said = in_subprocess(
        """
        import torch, lowrank_kernels as lrk

        def peak():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024

        count, size, k = 2_000_000, 4000, 64
        cells = torch.arange(count) * 7
        entries = lrk.ObservedEntries.from_coo(cells // size, cells % size, torch.ones(count), shape=(size, size))
        left, right = torch.ones(size, k, requires_grad=True), torch.ones(k, size, requires_grad=True)
        core = torch.eye(k).repeat(3, 1, 1).requires_grad_()
        bias = torch.zeros(size, requires_grad=True)
        start = peak()
        lrk.ops.completion_loss(left, core, right, entries, row_bias=bias, col_bias=bias).backward()
        lrk.ops.completion_loss_and_gradients(left, core, right, entries)
        fused = peak()
        torch.ones(count, k)  # the measure sees what it should
        print(fused - start, peak() - start, count * k * 4 // 2**20)
        """
    )
    fused_mib, control_mib, whole_mib = map(int, said.split())
    assert control_mib > whole_mib // 2
    assert fused_mib < whole_mib // 8, f"{fused_mib} MiB more; entries x rank would be {whole_mib} MiB"

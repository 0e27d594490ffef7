"""Loss and all gradients of masked completion against plain PyTorch.

    E_ij = <left_i, (core[2] core[1] core[0]) right_:,j> (+ b_i + c_j) - m_ij,     loss = 1/2 sum E_ij^2

Useful work: 6 Z k flops for the entries (a dot product and two updates each) and 6 m k^2 for P = left C, dP C^T, left^T dP;
compulsory traffic: index and value of each entry, each factor read and its gradient written once. The same numbers are
used for every contender, so GFLOP/s compare directly. All contenders keep ``right.t()`` contiguous, the layout they all
gather from, and have their indices ready.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lowrank_kernels as lrk
from lowrank_kernels import _native
from lowrank_kernels.reference.core import core_gradients, core_product
from lowrank_kernels.testing import skewed_entries

from .harness import Bar, Contender, Outputs, Session, Skipped

DEPTH = 3
AUTOGRAD, AUTOGRAD_SELECT = "autograd COO", "autograd COO, index_select"
COMPILED, COO, CSR, DENSE = "compiled autograd COO", "hand-written COO", "hand-written CSR", "dense"
OP, SOLVER, KERNEL = "lowrank_kernels, autograd", "lowrank_kernels, no autograd", "lowrank_kernels, bare passes"


@dataclass
class Case:
    """Factors, entries and what the contenders share; everything random, from one seed."""

    m: int
    n: int
    count: int
    k: int
    biases: bool = False
    dtype: torch.dtype = torch.float32
    full: bool = False  # every entry observed
    device: str = "cpu"
    seed: int = 0
    drawn: bool = False  # cells by drawn_cells(): on a GPU, where the host would take minutes

    def __post_init__(self) -> None:
        g = torch.Generator(self.device).manual_seed(self.seed)
        if self.drawn:
            self.row, self.col = drawn_cells(self.m, self.n, self.count, g)
        elif self.full:
            self.row, self.col = torch.cartesian_prod(torch.arange(self.m), torch.arange(self.n)).t().contiguous().unbind()
        else:
            row, col = skewed_entries(self.m, self.n, self.count, seed=0)
            order = torch.argsort(row * self.n + col)
            self.row, self.col = row[order], col[order]  # sorted by rows: the order that suits every contender

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=self.dtype, device=self.device)

        self.values = normal(self.row.numel())
        self.left, self.columns = normal(self.m, self.k) / self.k**0.5, normal(self.n, self.k)
        self.core = torch.eye(self.k, dtype=self.dtype, device=self.device) + 0.1 * normal(DEPTH, self.k, self.k) / self.k**0.5
        self.row_bias, self.col_bias = (normal(self.m), normal(self.n)) if self.biases else (None, None)

    @property
    def name(self) -> str:
        size = f"{self.m} x {self.n}, k={self.k}"
        what = "fully observed" if self.full else f"{self.row.numel():.3g} entries".replace("e+0", "e")
        return f"{what}, {size}" + (", biases" if self.biases else "") + (", float64" if self.dtype == torch.float64 else "")

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """left, core, right and the biases where there are any."""
        biases = (self.row_bias, self.col_bias) if self.row_bias is not None and self.col_bias is not None else ()
        return (self.left, self.core, self.columns.t(), *biases)

    @property
    def flops(self) -> float:
        return 6.0 * self.row.numel() * self.k + 6.0 * self.m * self.k**2

    @property
    def bytes_moved(self) -> float:
        element = self.values.element_size()
        return self.row.numel() * (8.0 + element) + 2.0 * element * self.k * (self.m + self.n)


def drawn_cells(m: int, n: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` distinct cells in row-major order on the generator's device, about as skewed as those of skewed_entries."""
    device = generator.device

    def power_law(size: int, exponent: float, wanted: int) -> Tensor:
        low, high = 10.0 ** (1 - exponent), (size + 10.0) ** (1 - exponent)
        draws = torch.rand(wanted, generator=generator, dtype=torch.float64, device=device)
        draws.mul_(high - low).add_(low).pow_(1 / (1 - exponent)).sub_(10)
        places = torch.randperm(size, generator=generator, device=device)
        return places[draws.to(torch.int64).clamp_(0, size - 1)]

    if not 0 < count <= m * n // 4:
        raise ValueError(f"drawn_cells: count must be from 1 to a quarter of {m} x {n}, got {count}")
    # Shuffled anew in every round: with one order the popular cells run out and the last rounds give next to nothing.
    cells = torch.empty(0, dtype=torch.int64, device=device)
    while cells.numel() < count:
        wanted = count - cells.numel() + (count - cells.numel()) // 4 + 64
        cells = torch.unique(torch.cat([cells, power_law(m, 0.5, wanted).mul_(n).add_(power_law(n, 0.9, wanted))]))
    kept = torch.randperm(cells.numel(), generator=generator, device=device)[:count].sort().values
    cells = cells[kept]
    return cells // n, cells % n


def named(result: Sequence[Tensor]) -> Outputs:
    return dict(zip(("loss", "left", "core", "right", "row_bias", "col_bias"), result, strict=False))


def chain(left: Tensor, core: Tensor, grad_p: Tensor, grad_v: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradients of P = left C and V = right^T to those of left, core and right."""
    return grad_p @ product.t(), core_gradients(core, left.t() @ grad_p), grad_v.t()


@torch.no_grad()
def oracle(case: Case) -> Outputs:
    """Float64, by the formulas, a million entries at a time; ``p`` and ``v`` are the gradients of the bare passes."""
    left, core, v = case.left.double(), case.core.double(), case.columns.double()
    product = core_product(core)
    assert product is not None
    p = left @ product
    loss = torch.zeros((), dtype=torch.float64, device=left.device)
    grad_p, grad_v = torch.zeros_like(p), torch.zeros_like(v)
    grad_b, grad_c = p.new_zeros(case.m), p.new_zeros(case.n)
    for row, col, values in zip(*(x.split(1_000_000) for x in (case.row, case.col, case.values)), strict=True):
        p_rows, v_rows = p[row], v[col]
        error = (p_rows * v_rows).sum(1) - values.double()
        if case.row_bias is not None and case.col_bias is not None:
            error = error + case.row_bias.double()[row] + case.col_bias.double()[col]
        loss += error.square().sum() / 2
        grad_p.index_add_(0, row, error[:, None] * v_rows)
        grad_v.index_add_(0, col, error[:, None] * p_rows)
        grad_b.index_add_(0, row, error)
        grad_c.index_add_(0, col, error)
    return named((loss, *chain(left, core, grad_p, grad_v, product), grad_b, grad_c)) | {"p": grad_p, "v": grad_v}


# ---------------------------------------------------------------------- contenders: plain PyTorch


def coo_loss(
    row: Tensor, col: Tensor, values: Tensor, select: bool, left: Tensor, core: Tensor, right: Tensor, *biases: Tensor
) -> Tensor:
    product = core_product(core)
    assert product is not None
    p, v = left @ product, right.t()
    error = ((p.index_select(0, row) * v.index_select(0, col)) if select else (p[row] * v[col])).sum(1) - values
    if biases:
        error = error + biases[0][row] + biases[1][col]
    return error.square().sum() / 2


def autograd_coo(case: Case, select: bool = False, compiled: bool = False) -> Callable[[int], Callable[[], Any]]:
    def make(threads: int) -> Callable[[], Any]:
        function: Callable[..., Tensor] = coo_loss
        if compiled:
            from torch._inductor import config

            torch._dynamo.reset()
            config.cpp.threads = threads  # part of the cache key: code for 1 thread is not used for 2
            function = torch.compile(coo_loss, dynamic=False)
        leaves = [x.detach().requires_grad_() for x in case.factors]

        def run() -> Any:
            loss = function(case.row, case.col, case.values, select, *leaves)
            return (loss, *torch.autograd.grad(loss, leaves))

        return run

    return make


def hand_written_coo(case: Case) -> Callable[[int], Callable[[], Any]]:
    def make(threads: int) -> Callable[[], Any]:
        @torch.no_grad()
        def run() -> Any:
            product = core_product(case.core)
            assert product is not None
            p, v = case.left @ product, case.columns
            p_rows, v_rows = p.index_select(0, case.row), v.index_select(0, case.col)
            error = (p_rows * v_rows).sum(1).sub_(case.values)
            biases = add_biases(case, error)
            grad_p = torch.zeros_like(p).index_add_(0, case.row, v_rows.mul_(error[:, None]))
            grad_v = torch.zeros_like(v).index_add_(0, case.col, p_rows.mul_(error[:, None]))
            return (error.square().sum() / 2, *chain(case.left, case.core, grad_p, grad_v, product), *biases)

        return run

    return make


def add_biases(case: Case, error: Tensor) -> tuple[Tensor, ...]:
    """Add the biases to the errors in place; their gradients, or nothing where the case has none."""
    if case.row_bias is None or case.col_bias is None:
        return ()
    error.add_(case.row_bias[case.row]).add_(case.col_bias[case.col])
    return (
        torch.zeros_like(case.row_bias).index_add_(0, case.row, error),
        torch.zeros_like(case.col_bias).index_add_(0, case.col, error),
    )


def hand_written_csr(case: Case) -> Callable[[int], Callable[[], Any]]:
    """The best we know in plain PyTorch: ``sampled_addmm`` for E (an SDDMM), sparse times dense for its products."""

    def make(threads: int) -> Callable[[], Any]:
        def offsets(index: Tensor, size: int) -> Tensor:
            return torch.cat([index.new_zeros(1), torch.bincount(index, minlength=size).cumsum(0)]).int()

        order = torch.argsort(case.col, stable=True)
        row_offsets, row_index = offsets(case.row, case.m), case.col.int()
        col_offsets, col_index = offsets(case.col, case.n), case.row[order].int()

        def sparse(crow: Tensor, index: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
            return torch.sparse_csr_tensor(crow, index, values, shape, check_invariants=False)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "CSR support is in beta state"
            negative = sparse(row_offsets, row_index, -case.values, (case.m, case.n))

        @torch.no_grad()
        def run() -> Any:
            product = core_product(case.core)
            assert product is not None
            p, v = case.left @ product, case.columns
            e = torch.sparse.sampled_addmm(negative, p, v.t())
            error = e.values()
            biases = add_biases(case, error)
            e_t = sparse(col_offsets, col_index, error[order], (case.n, case.m))
            return (error.square().sum() / 2, *chain(case.left, case.core, e @ v, e_t @ p, product), *biases)

        return run

    return make


def dense(case: Case) -> Callable[[int], Callable[[], Any]]:
    """The whole matrix: three dense products and a mask; without the mask where everything is observed."""

    def make(threads: int) -> Callable[[], Any]:
        matrix, mask = case.values.new_zeros(case.m, case.n), case.values.new_zeros(case.m, case.n)
        matrix[case.row, case.col], mask[case.row, case.col] = case.values, 1.0
        error = torch.empty_like(matrix)

        @torch.no_grad()
        def run() -> Any:
            product = core_product(case.core)
            assert product is not None
            p, v = case.left @ product, case.columns
            torch.addmm(matrix, p, v.t(), beta=-1, out=error)
            if not case.full:
                error.mul_(mask)
            flat = error.view(-1)
            return (flat.dot(flat) / 2, *chain(case.left, case.core, error @ v, error.t() @ p, product))

        return run

    return make


# ---------------------------------------------------------------------- contenders: ours


def entries_of(case: Case) -> lrk.ObservedEntries:
    return lrk.ObservedEntries.from_coo(case.row, case.col, case.values, shape=(case.m, case.n))


def our_op(case: Case, entries: lrk.ObservedEntries) -> Callable[[int], Callable[[], Any]]:
    def make(threads: int) -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_() for x in case.factors]
        biases = dict(zip(("row_bias", "col_bias"), leaves[3:], strict=False))

        def run() -> Any:
            loss = lrk.ops.completion_loss(leaves[0], leaves[1], leaves[2], entries, **biases)
            return (loss, *torch.autograd.grad(loss, leaves))

        return run

    return make


def our_solver_step(case: Case, entries: lrk.ObservedEntries) -> Callable[[int], Callable[[], Any]]:
    def make(threads: int) -> Callable[[], Any]:
        def run() -> Any:
            return lrk.ops.completion_loss_and_gradients(
                case.left, case.core, case.columns.t(), entries, row_bias=case.row_bias, col_bias=case.col_bias
            )

        return run

    return make


def our_kernel(case: Case, entries: lrk.ObservedEntries) -> Callable[[int], Callable[[], Any]]:
    """The two passes of the native kernel on P and V: what the op cannot be faster than."""

    def make(threads: int) -> Callable[[], Any]:
        if not _native.serves(case.left.device):
            raise Skipped(f"no native kernel for {case.left.device}: {_native.unavailable or 'built without CUDA'}")
        product = core_product(case.core)
        assert product is not None
        extra = -case.k % _native.factor_lanes(case.values.dtype, case.values.device)
        p, v = (torch.nn.functional.pad(x, (0, extra)).contiguous() for x in (case.left @ product, case.columns))
        b, c = case.row_bias, case.col_bias

        def run() -> Any:
            _, grad_p, grad_b, _ = _native.completion_pass(entries.by_row, p, v, b, c, 0.0)
            _, grad_v, grad_c, _ = _native.completion_pass(entries.by_col, v, p, c, b, 0.0, want_loss=False)
            result = {"p": grad_p[:, : case.k], "v": grad_v[:, : case.k]}
            return result | ({"row_bias": grad_b, "col_bias": grad_c} if case.biases else {})

        return run

    return make


def flatten(result: Any) -> Outputs:
    loss, grads = result
    return named((loss, grads.left, grads.core, grads.right)) | {
        name: grad for name, grad in (("row_bias", grads.row_bias), ("col_bias", grads.col_bias)) if grad is not None
    }


def contenders(case: Case, entries: lrk.ObservedEntries, wanted: Sequence[str], peak: Sequence[str] = ()) -> list[Contender]:
    # Memory: gathered factor rows of Z x k numbers; autograd keeps and makes about twice as many as the hand-written form.
    rows_gb = case.row.numel() * case.k * case.values.element_size() / 1e9
    makers: dict[str, Contender] = {
        AUTOGRAD: Contender(AUTOGRAD, autograd_coo(case), named, plain=True, needs_gb=7 * rows_gb),
        AUTOGRAD_SELECT: Contender(AUTOGRAD_SELECT, autograd_coo(case, select=True), named, plain=True, needs_gb=7 * rows_gb),
        COMPILED: Contender(
            COMPILED, autograd_coo(case, select=True, compiled=True), named, optional=True, needs_gb=5 * rows_gb
        ),
        COO: Contender(COO, hand_written_coo(case), named, plain=True, needs_gb=5 * rows_gb),
        CSR: Contender(CSR, hand_written_csr(case), named, needs_gb=1.0 * (case.row.numel() > 1e7)),
        DENSE: Contender(DENSE, dense(case), named, plain=True, needs_gb=4e-9 * 4 * case.m * case.n),
        OP: Contender(OP, our_op(case, entries), named, ours=True),
        SOLVER: Contender(SOLVER, our_solver_step(case, entries), flatten, ours=True),
        KERNEL: Contender(KERNEL, our_kernel(case, entries), ours=True),
    }
    for name in peak:
        arguments = (str(case.m), str(case.n), str(case.count), str(case.k))
        makers[name].peak = ("bench.bench_completion", "memory_probe", name, *arguments)
    return [makers[name] for name in wanted]


def memory_probe(name: str, m: str, n: str, count: str, k: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """For harness.peak_memory: a tiny step of the contender, and the step to measure."""
    torch.set_num_threads(1)

    def step(case: Case) -> Callable[[], Any]:
        return contenders(case, entries_of(case), [name])[0].make(1)

    return step(Case(30, 20, 100, int(k))), step(Case(int(m), int(n), int(count), int(k)))


# ---------------------------------------------------------------------- the bench

BASELINES = (AUTOGRAD, AUTOGRAD_SELECT, COO, CSR)
OURS = (OP, SOLVER, KERNEL)


def bars_for(names: Sequence[str], *bars: tuple[int, Bar]) -> list[tuple[str, int, Bar]]:
    return [(name, threads, bar) for name in names for threads, bar in bars]


def compare(session: Session, case: Case, wanted: Sequence[str], peak: Sequence[str] = (), **options: Any) -> None:
    entries = entries_of(case)
    session.compare(
        "completion",
        case.name,
        contenders(case, entries, wanted, peak),
        oracle=oracle(case),
        dtype=str(case.dtype).removeprefix("torch."),
        flops=case.flops,
        bytes_moved=case.bytes_moved,
        **options,
    )


def run_sizes(session: Session) -> None:
    """The three sizes with a bar."""
    if session.quick:
        small = Case(60, 50, 600, 16)
        options = {"bars": bars_for([OP], (1, Bar("ratio", 1.0, True)))}
        return compare(session, small, (AUTOGRAD, AUTOGRAD_SELECT, COO, CSR, DENSE, *OURS), **options)
    everything = (*BASELINES, COMPILED, DENSE, *OURS)
    measured = (*BASELINES, DENSE, OP, SOLVER)
    compare(
        session,
        Case(943, 1682, 100_000, 16),
        everything,
        measured,
        against=(AUTOGRAD, AUTOGRAD_SELECT, COO, DENSE),
        bars=bars_for((OP, SOLVER), (1, Bar("ratio", 20, True)), (2, Bar("ratio", 10, True))),
    )
    compare(
        session,
        Case(6040, 3706, 1_000_000, 16),
        everything,
        measured,
        against=(AUTOGRAD, AUTOGRAD_SELECT),
        bars=bars_for((OP, SOLVER), (1, Bar("ratio", 50, True)), (2, Bar("ratio", 80, True))),
        seconds=6.0,
    )
    return None


def run_large(session: Session) -> None:
    """2e7 entries: the step, and the memory of the index."""
    case = Case(300, 200, 5000, 16) if session.quick else Case(138_493, 26_744, 20_000_000, 16)
    entries = entries_of(case)
    session.record(
        "completion",
        case.name,
        "ObservedEntries",
        dtype="float32",
        metric="index bytes/entry",
        value=entries.nbytes / len(entries),
        bars=() if session.quick else [Bar("index bytes/entry", 24)],
        note="both orders, values included",
    )
    del entries
    compare(
        session,
        case,
        (AUTOGRAD, COO, CSR, *OURS),
        against=(AUTOGRAD,),
        bars=[] if session.quick else bars_for((OP, SOLVER), (1, Bar("ms", 120))),
        seconds=8.0,
        min_repeats=3,
    )


def run_shapes(session: Session) -> None:
    """No bars: biases, float64, other widths, and shapes where we may lose."""
    if session.quick:
        return compare(session, Case(30, 20, 50, 3, biases=True, dtype=torch.float64), (AUTOGRAD, COO, CSR, *OURS))
    compare(session, Case(6040, 3706, 1_000_000, 16, biases=True), (*BASELINES, *OURS))
    compare(session, Case(943, 1682, 100_000, 16, dtype=torch.float64), (*BASELINES, DENSE, *OURS))
    for k in (1, 64, 256):
        compare(session, Case(943, 1682, 100_000, k), (*BASELINES, DENSE, *OURS))
    compare(session, Case(1000, 1000, 1_000_000, 16, full=True), (*BASELINES, DENSE, *OURS))
    compare(session, Case(30, 20, 50, 16), (*BASELINES, COMPILED, DENSE, *OURS))
    return None


PARTS = {"sizes": run_sizes, "large": run_large, "shapes": run_shapes}

"""Loss and all gradients of masked completion on a GPU, against eager PyTorch and torch.sparse; contenders of bench_completion.

Cells are drawn on the GPU, as skewed as ratings are. Training sees the same entries in every step, so *hot* is what a small
problem meets in use; *cold* takes several problems in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .bench_completion import (
    AUTOGRAD,
    AUTOGRAD_SELECT,
    COO,
    CSR,
    KERNEL,
    OP,
    SOLVER,
    Case,
    contenders,
    entries_of,
    oracle,
)
from .cuda import MAX_SETS, GpuSession, on_gpu
from .harness import Bar, Contender

BENCH = "completion_cuda"
EAGER = (AUTOGRAD, AUTOGRAD_SELECT)
EVERYTHING = (AUTOGRAD, AUTOGRAD_SELECT, COO, CSR, OP, SOLVER, KERNEL)
FASTER = Bar("ratio", 8, at_least=True)  # than eager autograd, at 2e7 entries
LAUNCH_BOUND = 3_000_000  # entries up to which graphs are measured


def measure(session: GpuSession, m: int, n: int, count: int, k: int, bars: Sequence[tuple[str, Bar]] = ()) -> None:
    what = f"{BENCH}: {count:.3g} entries, k={k}"
    # The gathers of eager autograd are about 20 passes over entries x k numbers, and its scatter is slower than they are.
    if not session.time_for(what, 4.0 + count * k * 1.5e-8):
        return

    def case(seed: int) -> Case:
        return Case(m, n, count, k, device=session.device, seed=seed, drawn=True)

    with session.guarded(what):
        first = case(0)
        if count > LAUNCH_BOUND:
            compare(session, [first], False, "cold", bars)
            return
        wanted = session.sets(16 * count + 4 * k * (m + n))
        cases = [first, *(case(seed) for seed in range(1, min(wanted, MAX_SETS)))]
        compare(session, cases[:1], True, "hot", bars, repeats=8)
        compare(session, cases, True, "cold" if len(cases) >= wanted else "warm")
        compare(session, cases[:1], False, "hot")


def compare(
    session: GpuSession,
    cases: Sequence[Case],
    graph: bool,
    temperature: str,
    bars: Sequence[tuple[str, Bar]] = (),
    repeats: int = 1,
) -> None:
    case = cases[0]
    large = case.count > LAUNCH_BOUND

    def versions(case: Case) -> list[Contender]:
        found = contenders(case, entries_of(case), EVERYTHING)
        # What cuSPARSE or an older torch cannot do, in a graph or at all, is skipped with its reason.
        return [replace(c, optional=c.name == CSR, peak=()) for c in found]

    session.compare_sets(
        BENCH,
        case.name,
        [versions(case) for case in cases],
        oracle=lambda: oracle(case),
        graph=graph,
        repeats=repeats,
        temperature=temperature,
        against=EAGER,
        bars=bars,
        dtype="float32",
        flops=case.flops,
        bytes_moved=case.bytes_moved,
        seconds=2.0 if large else 0.25,
        min_repeats=3 if large else 7,
    )


@on_gpu
def sizes(session: GpuSession) -> None:
    """2e7 and 1e6 entries, k=16."""
    if session.quick:
        return measure(session, 60, 50, 600, 16, [(OP, Bar("ratio", 1e-3, at_least=True))])
    measure(session, 138_493, 26_744, 20_000_000, 16, [(OP, FASTER), (SOLVER, FASTER)])
    measure(session, 6040, 3706, 1_000_000, 16)
    return None


@on_gpu
def extremes(session: GpuSession) -> None:
    """1e8 and 1e5 entries, and k=32."""
    if session.quick:
        return measure(session, 30, 40, 200, 5)
    measure(session, 943, 1682, 100_000, 16)
    measure(session, 480_189, 17_770, 100_000_000, 16)
    measure(session, 138_493, 26_744, 20_000_000, 32)
    return None


PARTS = {"sizes": sizes, "extremes": extremes}

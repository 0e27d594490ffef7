"""The frozen linear layer plus a three-factor update on a GPU: bfloat16 x and weight, float32 factors, three cores.

The ways to do it are those of bench_three_factor, and so is the measure: the time over the frozen linear layer alone, which
makes y, and dx where the others make gradients. Float32 products are float32 (TF32 is off, torch's default), PEFT's adapters
float32 as PEFT makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .bench_three_factor import CHAIN, FROZEN, NOT_SLOWER, OURS, Case, contenders, eager, over
from .cuda import MAX_SETS, GpuSession, on_gpu
from .harness import Bar, Contender

BENCH = "three_factor_cuda"
LIMITS = {  # over the frozen linear layer, of forward and backward: (T, N, M, k, dropout)
    (8192, 4096, 4096, 16, 0.0): 1.16,
    (8192, 4096, 4096, 16, 0.1): 1.20,
    (8192, 4096, 11008, 32, 0.0): 1.11,
    (2048, 768, 768, 16, 0.0): 2.10,  # in a graph
}
SHAPES = (
    (2048, 768, 3072, 16),
    (8192, 4096, 4096, 32),
    (8192, 4096, 4096, 64),
    (16384, 8192, 8192, 64),
)
LAYERS = ((4096, 4096, 16), (4096, 11008, 32), (8192, 8192, 64))  # of the decode rows
DECODE_LIMIT = 1.26  # T = 1, 4096 -> 4096
COMPILE_SECONDS = 25.0
LARGE = 1 << 37  # T N M from which y and dx are compared by rows and projections
LAUNCH_BOUND = 1 << 34


def measure(session: GpuSession, *shape: int, dropout_p: float = 0.0, training: bool = True, **options: Any) -> None:
    """One layer: in a graph with cold inputs; with hot ones where they fit in L2; without a graph where launches matter."""
    tokens, n, m, k = shape
    work = tokens * n * m
    about = 3.0 + 2e-13 * work * (4 if training else 2)
    small = work < LAUNCH_BOUND
    name = f"T={tokens}, {n} -> {m}, k={k}" + ("" if training else ", forward")
    if not session.time_for(f"{BENCH}: {name}", about):
        return
    sampled = (work > LARGE or session.quick) and not dropout_p

    def case(seed: int) -> Case:
        return Case(
            *shape,
            dropout_p=dropout_p,
            dtype=torch.bfloat16,
            training=training,
            device=session.device,
            seed=seed,
            sampled=sampled,
        )

    with session.guarded(f"{BENCH}: {name}"):
        first = case(0)
        wanted = session.sets(first.nbytes)
        cases = [first, *(case(seed) for seed in range(1, min(wanted, MAX_SETS)))]
        compare(session, cases, True, "cold" if len(cases) >= wanted else "warm", **options)
        options.pop("compile_too", None)
        if first.nbytes <= session.l2_bytes:
            compare(session, cases[:1], True, "hot", repeats=min(len(cases), 16))
        if small:
            compare(session, cases, False, "cold" if len(cases) >= wanted else "warm")


def compare(
    session: GpuSession,
    cases: Sequence[Case],
    graph: bool,
    temperature: str,
    *,
    limit: float | None = None,
    compile_too: bool = False,
    repeats: int = 1,
) -> None:
    case, compiled_by = cases[0], None
    if compile_too and not session.rehearsal and session.time_for(f"{BENCH}: {case.name}: compiled chain", COMPILE_SECONDS):
        torch._dynamo.reset()
        compiled_by = torch.compile(eager, dynamic=False)
    # What cannot be slower than another way to do the same work is judged where the GPU's time is measured.
    bars: list[tuple[str, Bar]] = [(OURS, NOT_SLOWER)]
    if limit:
        bars.append((OURS, over(limit)))

    def versions(case: Case) -> list[Contender]:
        return contenders(case, compile_too=compiled_by is not None, compiled_by=compiled_by, peft_too=True)

    session.compare_sets(
        BENCH,
        case.name,
        [versions(case) for case in cases],
        oracle=lambda: case.exact,
        graph=graph,
        repeats=repeats,
        temperature=temperature,
        against=(CHAIN,),
        over=FROZEN,
        bars=bars,
        dtype="bfloat16",
        flops=case.flops,
    )
    vars(case).pop("exact", None)


@on_gpu
def barred(session: GpuSession) -> None:
    """Forward and backward of the layers with a bar of their own."""
    if session.quick:
        measure(session, 33, 48, 40, 16, limit=100.0)
        measure(session, 33, 48, 40, 16, dropout_p=0.1)
        return
    for (*shape, dropout_p), limit in LIMITS.items():
        compile_too = not dropout_p and shape[2] != 11008
        measure(session, *map(int, shape), dropout_p=dropout_p, limit=limit, compile_too=compile_too)


@on_gpu
def decode(session: GpuSession) -> None:
    """Inference with a few tokens, bound by reading the weight."""
    layers = ((48, 40, 16),) if session.quick else LAYERS
    first = [(1, *layers[0])]
    rest = [(tokens, *layer) for tokens in (1, 8, 16, 2, 4) for layer in layers]
    for shape in [*first, *(shape for shape in rest if shape not in first)]:
        limit = DECODE_LIMIT if shape == (1, *LAYERS[0]) else None
        measure(session, *shape, training=False, limit=limit, compile_too=shape in first)
        if session.quick:
            return


@on_gpu
def shapes(session: GpuSession) -> None:
    """The other layers, and forward alone of all of them."""
    if session.quick:
        measure(session, 33, 40, 48, 8, training=False)
        return
    known = [(t, n, m, k) for t, n, m, k, dropout_p in LIMITS if not dropout_p]
    for shape in SHAPES:
        measure(session, *shape)
    for shape in (*known, *SHAPES):
        measure(session, *shape, training=False)


barred.share = 3.0  # it compiles, and has most of the bars
PARTS = {"barred": barred, "decode": decode, "shapes": shapes}

"""Step times of several runs in one process, interleaved: round by round every run makes a step, on the same batch.

What disturbs the machine disturbs all of them, so the ratio of two runs is taken within each round, and its median is what
counts. The order turns from round to round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from .training import Bench, Run, Trainee

WARM_UP = 2


def compare_steps(
    bench: Bench, runs: Sequence[Run], rounds: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Median seconds of a step (wall and CPU time) of every run, and its median ratio to the last run."""
    trainees = [Trainee(bench, run) for run in runs]
    wall: list[list[float]] = [[] for _ in runs]
    cpu: list[list[float]] = [[] for _ in runs]
    for turn in range(WARM_UP + rounds):
        places = list(range(len(runs)))
        places = places[turn % len(runs) :] + places[: turn % len(runs)]
        for place in places:
            started, started_cpu = time.perf_counter(), time.process_time()
            trainees[place].step(turn % runs[place].steps)
            if turn >= WARM_UP:
                cpu[place].append(time.process_time() - started_cpu)
                wall[place].append(time.perf_counter() - started)
        if progress is not None:
            progress(turn + 1, WARM_UP + rounds)
    return {
        "base_dtype": bench.settings.base_dtype,
        "rounds": rounds,
        "runs": [
            {
                "run": run.to_dict(),
                "seconds": statistics.median(wall[i]),
                "cpu_seconds": statistics.median(cpu[i]),
                "ratio": statistics.median(a / b for a, b in zip(wall[i], wall[-1], strict=True)),
                "cpu_ratio": statistics.median(a / b for a, b in zip(cpu[i], cpu[-1], strict=True)),
            }
            for i, run in enumerate(runs)
        ],
    }

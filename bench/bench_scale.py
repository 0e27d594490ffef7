"""Completion beyond one process: strong scaling, the cost model against a run it has not seen, and Netflix's size.

A run is this file started as one process or by torchrun as two, of one thread each, on synthetic parts (bench.synthetic); it
prints one JSON line. The constants are fitted to runs of one process, and to sums of arrays over two; what they predict for two
processes is compared with what was measured.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import synthetic
from .harness import ROOT, Bar, Session, Timing

RANK = 32
ONE, TWO = "one process", "two processes"
GIB = 1 << 30


# ---------------------------------------------------------------------- one run, in processes of its own


def main() -> None:
    """Fit the parts in a folder for some steps; the first process prints what it took."""
    folder, steps = sys.argv[1], int(sys.argv[2])
    import torch
    import torch.distributed as dist

    from lowrank_kernels import ObservedEntries, compress, masked_gradient, solver
    from lowrank_kernels.parts import needed_memory, read_parts
    from lowrank_kernels.processes import Team, team_of

    torch.set_num_threads(1)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        dist.init_process_group("gloo")
    team = team_of("bench") if several else Team()
    warm = ObservedEntries.from_coo([0, 1, 2], [0, 1, 2], [1.0, 2.0, 3.0])
    compress(masked_gradient(warm), 2)
    sums = _time_sums(team) if several else []
    before, started = _peak(), time.perf_counter()
    found = read_parts(folder, rank=RANK, team=team)
    entries, read, built = found.entries, time.perf_counter() - started, _peak() - before
    started = time.perf_counter()
    model = solver.start(entries, RANK, generator=torch.Generator().manual_seed(0), shard=found.shard)
    began, marks, bytes_at = time.perf_counter() - started, [], []

    def mark(step: int, record: dict[str, float]) -> None:
        marks.append(time.perf_counter())
        bytes_at.append(team.summed)

    result = solver.train(model, entries, solver.TrainOptions(max_steps=steps), callback=mark, shard=found.shard)
    m, n = entries.shape
    need = needed_memory(len(entries), m, n, rank=RANK)
    own = {
        "entries": len(entries),
        "rows": m,
        "columns": n,
        "read_seconds": read,
        "start_seconds": began,
        "step_seconds": [float(x) / 10 for x in np.diff(marks)],
        "step_bytes": [int(x) / 10 for x in np.diff(bytes_at)],
        "building_bytes": built,
        "peak_bytes": _peak() - before,
        "resident_bytes": _peak(),
        "needed_bytes": need.peak,
        "index_bytes": need.held,
        "losses": [record["train_rmse"] for record in result.history],
        "sums": sums,
    }
    everything = team.meet(own)
    if team.rank == 0:
        print(json.dumps(everything))
    if several:
        dist.destroy_process_group()


def _peak() -> int:
    """The process's high-water mark of memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _time_sums(team: Any) -> list[tuple[int, float]]:
    """Numbers and median seconds of sums over the processes."""
    import torch

    found = []
    for count in (1 << 10, 1 << 16, 1 << 19, 1 << 21):
        x, seconds = torch.ones(count), []
        for _ in range(15):
            team.meet(None)
            started = time.perf_counter()
            team.sum(x.fill_(1.0))
            seconds.append(time.perf_counter() - started)
        found.append((count, statistics.median(seconds)))
    return found


def run_in(processes: int, folder: Path, steps: int) -> list[dict[str, Any]]:
    """What every process of a run says of itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*start, "-m", "bench.bench_scale", str(folder), str(steps)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run of {processes} processes failed:\n{done.stderr[-3000:]}")
    said: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return said


def step_seconds(said: list[dict[str, Any]]) -> float:
    """The median over blocks of ten steps (nine plain ones, one with a re-estimation) of the slowest process."""
    return max(statistics.median(each["step_seconds"]) for each in said)


@contextmanager
def parts_of(session: Session, entries: int, rows: int, columns: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lowrank-parts-") as folder:
        session.say(f"scale: writing {entries:,} entries of {rows:,} x {columns:,}")
        synthetic.write_parts(Path(folder), entries, parts=4, rows=rows, columns=columns)
        yield Path(folder)


# ---------------------------------------------------------------------- strong scaling, and the model that predicts it


def run_scaling(session: Session) -> None:
    if session.quick:
        sizes, steps, repeats = [(20_000, 900, 300), (9_000, 900, 300), (9_000, 300, 100)], 20, 1
    else:
        n = synthetic.COLUMNS
        sizes, steps, repeats = (
            [(20_000_000, synthetic.ROWS, n), (5_000_000, synthetic.ROWS, n), (5_000_000, 120_000, n)],
            30,
            3,
        )
    runs: dict[tuple[int, int, int], list[list[dict[str, Any]]]] = {}
    pairs: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = []
    for size in sizes:
        with parts_of(session, *size) as folder:
            for _ in range(repeats):
                session.say(f"scale: one process, {size[0]:,} entries")
                runs.setdefault(size, []).append(run_in(1, folder, steps))
                if size == sizes[0]:
                    session.say("scale: two processes")
                    pairs.append((runs[size][-1], run_in(2, folder, steps)))
    alone, shared = [step_seconds(one) for one, _ in pairs], [step_seconds(two) for _, two in pairs]
    count, rows, columns = sizes[0]
    case = f"strong scaling: {count:,} entries, {rows:,} x {columns:,}, k={RANK}"
    ratio = statistics.median(a / b for a, b in zip(alone, shared, strict=True))
    losses = [np.array(said[0]["losses"]) for said in pairs[-1]]
    drift = float(np.abs(losses[0] / losses[1] - 1).max())
    if drift > 1e-4:
        session.fail(f"scale: the losses of two processes differ from those of one by {drift:.2g}")
    session.record("scale", case, ONE, threads=1, **Timing(alone).columns(), note="a step, one thread")
    session.record(
        "scale",
        case,
        TWO,
        threads=2,
        **Timing(shared).columns(),
        baseline=ONE,
        ratio=ratio,
        error=drift,
        bars=() if session.quick else (Bar("ratio", 1.6, at_least=True),),
        note="a step, one thread each; error: of the losses, relative to one process",
    )
    two = pairs[-1][1]
    formula = 4 * (columns * RANK + columns + RANK**2 + 1) + 4 * (columns * (2 * RANK + 2) + RANK + 6) / 10
    measured = statistics.mean(two[0]["step_bytes"])
    session.record(
        "scale",
        case,
        "bytes summed in a step",
        metric="over the formula",
        value=measured / formula,
        bars=[Bar("over the formula", 1.0001)],
        note=f"{measured:.0f} bytes a process, a tenth of a re-estimation included; formula {formula:.0f}",
    )
    # seconds = a entries + b (rows + columns) + c numbers summed
    table = np.array([[size[0], size[1] + size[2]] for size in sizes], float)
    times = np.array([statistics.median(step_seconds(said) for said in runs[size]) for size in sizes])
    weights = 1 / times
    (an_entry, a_row), *_ = np.linalg.lstsq(table * weights[:, None], times * weights, rcond=None)
    counts, seconds = np.array([each for _, said in pairs for each in said[0]["sums"]]).T
    a_number = float((counts * seconds).sum() / (counts * counts).sum())
    for name, value, unit in (
        ("an entry", 1e9 * an_entry, "ns a step"),
        ("a factor row", 1e9 * a_row, "ns a step"),
        ("a summed number", 1e9 * a_number, "ns"),
    ):
        session.record("scale", f"cost model, k={RANK}", name, metric=unit, value=float(value))
    busiest = max(two, key=lambda each: each["entries"] * an_entry + each["rows"] * a_row)
    predicted = busiest["entries"] * an_entry + (busiest["rows"] + columns) * a_row + formula / 4 * a_number
    session.record(
        "scale",
        case,
        "the model's prediction",
        threads=2,
        median_ms=1e3 * predicted,
        metric="measured over predicted",
        value=statistics.median(shared) / predicted,
        bars=()
        if session.quick
        else [Bar("measured over predicted", 1.25), Bar("measured over predicted", 0.75, at_least=True)],
        note="constants from runs of one process and from sums alone",
    )


# ---------------------------------------------------------------------- Netflix's size


def run_netflix(session: Session) -> None:
    count, rows, columns = (30_000, 900, 300) if session.quick else (100_000_000, synthetic.ROWS, synthetic.COLUMNS)
    given = os.environ.get("LOWRANK_PARTS")
    with parts_of(session, count, rows, columns) if given is None else _given(given) as folder:
        session.say("scale: two processes, 20 steps")
        started = time.perf_counter()
        said = run_in(2, folder, 20)
        seconds = time.perf_counter() - started
    case = f"{sum(each['entries'] for each in said):,} entries, {rows:,} x {columns:,}, k={RANK}, two processes, 20 steps"
    resident = sum(each["resident_bytes"] for each in said)
    limit = () if session.quick else (Bar("GiB", 16.0),)
    session.record(
        "scale", case, "peak memory of both", metric="GiB", value=resident / GIB, bars=limit, note="resident, all of it"
    )
    worst = max(each["building_bytes"] / each["index_bytes"] for each in said)
    session.record(
        "scale",
        case,
        "peak while the index is built",
        metric="over the index",
        value=worst,
        bars=() if session.quick else (Bar("over the index", 2.0),),
        note="the index included; what the libraries take at their import is not",
    )
    over = max(each["peak_bytes"] / each["needed_bytes"] for each in said)
    session.record("scale", case, "peak over what was foretold", metric="ratio of bytes", value=over)
    for name, value in (
        ("read and index", max(each["read_seconds"] for each in said)),
        ("start", max(each["start_seconds"] for each in said)),
        ("a step", step_seconds(said)),
        ("whole run", seconds),
    ):
        session.record("scale", case, name, threads=2, median_ms=1e3 * value, repeats=1)


@contextmanager
def _given(folder: str) -> Iterator[Path]:
    """Parts written before: python -m bench.synthetic FOLDER."""
    yield Path(folder)


PARTS = {"scaling": run_scaling, "netflix": run_netflix}

if __name__ == "__main__":
    main()

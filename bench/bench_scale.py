"""Completion beyond one process: strong scaling, the cost model against a run it has not seen, and Netflix's size.

A run is this file started as one process or by torchrun as two, of one thread each, on synthetic parts (bench.synthetic); it
prints one JSON line. Two processes that share a memory, or a core, slow each other down: what the machine gives two strangers,
with half of the entries each and nothing exchanged, is measured too. The constants are fitted to strangers of other sizes and
to sums of arrays; what they predict for two processes is compared with what was measured.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import synthetic
from .harness import ROOT, Bar, Session, Timing

RANK = 32
ONE, TWO, APART = "one process", "two processes", "two strangers"
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


def run_apart(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Two runs of one process at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return [said[0] for said in pool.map(lambda _: run_in(1, folder, steps), range(2))]


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
    n = 300 if session.quick else synthetic.COLUMNS
    whole, half = ((20_000, 900), (10_000, 450)) if session.quick else ((20_000_000, synthetic.ROWS), (10_000_000, 240_094))
    others = (
        [(9_000, 450), (20_000, 450), (9_000, 200)]
        if session.quick
        else [(5_000_000, 240_094), (15_000_000, 240_094), (5_000_000, 120_000)]
    )
    steps, repeats = (20, 1) if session.quick else (30, 3)
    ones, twos = [], []
    with parts_of(session, *whole, n) as folder:
        for _ in range(repeats):
            session.say("scale: one process, then two")
            ones.append(run_in(1, folder, steps))
            twos.append(run_in(2, folder, steps))
    apart: dict[tuple[int, int], list[list[dict[str, Any]]]] = {}
    for size in (half, *others):
        with parts_of(session, *size, n) as folder:
            session.say("scale: two strangers")
            apart[size] = [run_apart(folder, steps) for _ in range(repeats)]
    alone, shared, strangers = ([step_seconds(said) for said in runs] for runs in (ones, twos, apart[half]))
    case = f"strong scaling: {whole[0]:,} entries, {whole[1]:,} x {n:,}, k={RANK}"
    losses = [np.array(runs[-1][0]["losses"]) for runs in (ones, twos)]
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
        ratio=statistics.median(a / b for a, b in zip(alone, shared, strict=True)),
        error=drift,
        bars=() if session.quick else (Bar("ratio", 1.6, at_least=True),),
        note="a step, one thread each; error: of the losses, relative to one process",
    )
    session.record(
        "scale",
        case,
        APART,
        threads=2,
        **Timing(strangers).columns(),
        baseline=ONE,
        ratio=statistics.median(alone) / statistics.median(strangers),
        note="half of the entries and rows each, nothing exchanged: what the machine gives two processes",
    )
    formula = 4 * (n * RANK + n + RANK**2 + 1) + 4 * (n * (2 * RANK + 2) + RANK + 6) / 10
    measured = statistics.mean(twos[-1][0]["step_bytes"])
    session.record(
        "scale",
        case,
        "bytes summed in a step",
        metric="over the formula",
        value=measured / formula,
        bars=[Bar("over the formula", 1.0001)],
        note=f"{measured:.0f} bytes a process, a tenth of a re-estimation included; formula {formula:.0f}",
    )
    # seconds = a entries + b (rows + columns) + c numbers summed, two processes at work
    table = np.array([[count, rows + n] for count, rows in others], float)
    times = np.array([statistics.median(step_seconds(said) for said in apart[size]) for size in others])
    (an_entry, a_row), *_ = np.linalg.lstsq(table / times[:, None], np.ones(len(others)), rcond=None)
    counts, seconds = np.array([each for said in twos for each in said[0]["sums"]]).T
    a_number = float((counts * seconds).sum() / (counts * counts).sum())
    for name, value, unit in (
        ("an entry", 1e9 * an_entry, "ns a step"),
        ("a factor row", 1e9 * a_row, "ns a step"),
        ("a summed number", 1e9 * a_number, "ns"),
    ):
        session.record("scale", f"cost model, k={RANK}", name, metric=unit, value=float(value), note="two processes at work")
    busiest = max(twos[-1], key=lambda each: each["entries"] * an_entry + each["rows"] * a_row)
    predicted = busiest["entries"] * an_entry + (busiest["rows"] + n) * a_row + formula / 4 * a_number
    over = "measured over predicted"
    session.record(
        "scale",
        case,
        "the model's prediction",
        threads=2,
        median_ms=1e3 * predicted,
        metric=over,
        value=statistics.median(shared) / predicted,
        bars=() if session.quick else (Bar(over, 1.25), Bar(over, 0.75, at_least=True)),
        note="constants from strangers of other sizes and from sums alone",
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

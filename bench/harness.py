"""What every bench shares: contenders checked against float64, interleaved timing, rows appended to a CSV file.

A *contender* is one way to compute a thing. All contenders of a case run in one process, round-robin, once per thread
count, so that a slow second of the machine hits all of them. A contender whose result is wrong gets no row: its error is
printed and the run ends with a non-zero status. A *bar* is a limit set beforehand; rows that miss it stay, marked "no".
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowrank_kernels
from lowrank_kernels import _native
from lowrank_kernels.testing import error_and_limit

from .rows import COLUMNS, append_rows

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "bench" / "data"

Outputs = dict[str, Tensor]


class Skipped(Exception):
    """Raised by a bench or a contender that cannot run here; the text is the reason."""


@dataclass(frozen=True)
class Bar:
    """A limit on ``"ratio"`` (times faster than the baseline), on ``"ms"``, on ``"peak MB"`` or on the row's metric."""

    quantity: str
    limit: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{self.quantity} {'>=' if self.at_least else '<='} {self.limit:g}"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass
class Contender:
    """One way to compute a case. ``make(threads)`` prepares it and returns what is timed."""

    name: str
    make: Callable[[int], Callable[[], Any]]
    outputs: Callable[[Any], Outputs] = dict  # from the raw result, outside the timing
    ours: bool = False
    plain: bool = False  # plain PyTorch in the same dtype: ours may have twice its error
    optional: bool = False  # may fail where its tools are missing (a compiler); others that fail are errors
    needs_gb: float = 0.0  # memory; skipped where less is free
    peak: tuple[str, ...] = ()  # arguments of peak_memory(), where memory matters


@dataclass
class Timing:
    seconds: list[float]
    inner: int = 1

    def columns(self) -> dict[str, Any]:
        ms = sorted(1e3 * s for s in self.seconds)
        quartiles = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else [ms[0]] * 3
        return {
            "median_ms": statistics.median(ms),
            "min_ms": ms[0],
            "q25_ms": quartiles[0],
            "q75_ms": quartiles[2],
            "repeats": len(ms),
        }


@dataclass
class Session:
    """One run of the benches: where rows go, what was skipped, what was wrong."""

    out: Path
    quick: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ceilings: dict[int, tuple[float, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    deadline: float = math.inf  # of the part that runs, on time.monotonic()
    gpu: Any = None  # the session on the GPU, once a bench has asked for one (bench.cuda)
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)

    def __post_init__(self) -> None:
        self.facts = self.facts or machine_facts()

    @property
    def threads(self) -> tuple[int, ...]:
        return (1, 2) if (os.cpu_count() or 1) > 1 and not self.quick else (1,)

    def ceiling(self, threads: int) -> tuple[float, float]:
        """Measured (sgemm GFLOP/s, copy GB/s) of this machine; the call must be inside use_threads(threads)."""
        if threads not in self.ceilings:
            self.ceilings[threads] = measure_ceilings(self.quick)
        return self.ceilings[threads]

    def skip(self, what: str, reason: str) -> None:
        self.skipped.append((what, reason))
        self.say(f"  skipped: {what}: {reason}")

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether a case of about this length still fits; one that does not is among the skipped."""
        left = self.deadline - time.monotonic()
        if left >= seconds:
            return True
        self.skip(what, f"left out: it takes about {seconds:.0f} s, and {max(left, 0):.0f} s of the time budget are left")
        return False

    def free_gb(self) -> float:
        return free_gb()

    def fail(self, what: str) -> None:
        self.errors.append(what)
        self.say(f"  WRONG: {what}")

    def record(self, bench: str, case: str, contender: str, *, bars: Sequence[Bar] = (), **values: Any) -> dict[str, Any]:
        """Append one row; ``bars`` are judged on the row's own ratio, median_ms or metric."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
        row |= self.facts | {"date": _now(), "load": load, "bench": bench, "case": case, "contender": contender}
        unknown = set(values) - set(COLUMNS)
        if unknown:
            raise KeyError(f"a row has no column {sorted(unknown)}")
        row |= {name: "" if value is None else value for name, value in values.items()}
        if bars:
            measured = {"ratio": row["ratio"], "ms": row["median_ms"], "peak MB": row["peak_mb"], row["metric"]: row["value"]}
            row["bar"] = "; ".join(map(str, bars))
            # A bar whose quantity could not be measured is not met.
            good = [isinstance(measured.get(b.quantity), (int, float)) and b.met(measured[b.quantity]) for b in bars]
            row["met"] = "yes" if all(good) else "no"
        self.rows.append(row)
        append_rows(self.out, [row])
        return row

    def compare(
        self,
        bench: str,
        case: str,
        contenders: Sequence[Contender],
        *,
        oracle: Outputs,  # float64; a contender's outputs are looked up by name
        against: Sequence[str] = (),  # the baseline is the fastest of these; default: of all that are not ours
        over: str = "",  # rows tell their time over this contender's as the metric "over NAME"
        bars: Sequence[tuple[str, int, Bar]] = (),  # (contender, threads, bar)
        dtype: str = "float32",
        flops: float | None = None,  # useful work and compulsory traffic of one call, the same for every contender
        bytes_moved: float | None = None,
        seconds: float = 3.0,  # timing budget of a contender
        max_repeats: int = 31,
        min_repeats: int = 5,
    ) -> None:
        """Check, then time every contender at every thread count, and record the rows."""
        self.say(f"{bench}: {case}")
        if self.quick:
            seconds, max_repeats, min_repeats = 0.02, 3, 2
        peaks: dict[str, float] = {}
        for threads in self.threads:
            with use_threads(threads):
                ready, wrong = self._prepare(case, contenders, threads, oracle, dtype)
                sgemm, copy = self.ceiling(threads)
                timings = interleave({c.name: run for c, run in ready}, seconds, min_repeats, max_repeats)
            if not self.quick:
                for c, _ in ready:
                    if c.peak and c.name not in peaks:
                        peaks[c.name] = peak_memory(*c.peak)
            self._record_timings(
                bench,
                case,
                [c for c, _ in ready],
                timings,
                wrong,
                threads=threads,
                ceilings=(sgemm, copy),
                peaks=peaks,
                against=against,
                over=over,
                bars=[(name, bar) for name, at, bar in bars if at == threads],
                dtype=dtype,
                flops=flops,
                bytes_moved=bytes_moved,
            )
            ready.clear()

    def _record_timings(
        self,
        bench: str,
        case: str,
        contenders: Sequence[Contender],
        timings: dict[str, Timing],
        wrong: dict[str, float],
        *,
        threads: int | str,
        ceilings: tuple[float, float],  # GFLOP/s and GB/s
        peaks: dict[str, float],
        against: Sequence[str],
        over: str,
        bars: Sequence[tuple[str, Bar]],  # (contender, bar)
        dtype: str,
        flops: float | None,
        bytes_moved: float | None,
        note: str = "",
    ) -> None:
        medians = {name: t.columns()["median_ms"] for name, t in timings.items()}
        others = {c.name: medians[c.name] for c in contenders if not c.ours and c.name != over}
        allowed = against or [c.name for c in contenders if not c.ours]
        candidates = {name: medians[name] for name in allowed if name in medians}
        baseline = min(candidates, key=candidates.__getitem__) if candidates else None
        fastest = min(others, key=others.__getitem__) if others else None
        for c in contenders:
            columns = timings[c.name].columns()
            per_second = 1e-6 / columns["median_ms"]  # to giga-units a second
            rate = {}
            if flops:
                rate |= {"gflops": flops * per_second, "share_sgemm": flops * per_second / ceilings[0]}
            if bytes_moved:
                rate |= {"gbs": bytes_moved * per_second, "share_copy": bytes_moved * per_second / ceilings[1]}
            notes = [note] if note else []
            if c.ours and fastest and fastest != baseline:
                notes.append(f"fastest other: {fastest}, ratio {others[fastest] / columns['median_ms']:.3g}")
            self.record(
                bench,
                case,
                c.name,
                threads=threads,
                dtype=dtype,
                **columns,
                **rate,
                peak_mb=peaks.get(c.name),
                error=wrong[c.name],
                metric=f"over {over}" if over in medians else "",
                value=columns["median_ms"] / medians[over] if over in medians else None,
                baseline=baseline,
                ratio=candidates[baseline] / columns["median_ms"] if baseline else None,
                bars=[bar for name, bar in bars if name == c.name],
                note="; ".join(notes),
            )

    def _prepare(
        self, case: str, contenders: Sequence[Contender], threads: int, oracle: Outputs, dtype: str
    ) -> tuple[list[tuple[Contender, Callable[[], Any]]], dict[str, float]]:
        """Contenders that gave the right result, with what is timed, and their relative errors."""
        ready: list[tuple[Contender, Callable[[], Any]]] = []
        errors: dict[str, float] = {}
        limits: dict[str, float] = {}  # output -> the error that plain PyTorch's own allows
        # Plain PyTorch first; last what may fail to be captured as a graph, which can leave torch in disorder.
        for c in sorted(contenders, key=lambda c: 0 if c.plain else 1 if not c.optional and not c.ours else 2 if c.ours else 3):
            if c.needs_gb > self.free_gb():
                free = self.free_gb()
                self.skip(f"{case}, {c.name}", f"needs about {c.needs_gb:.1f} GB of memory, {free:.1f} GB are free")
                continue
            try:
                run = c.make(threads)
                got = {name: tensor.detach() for name, tensor in c.outputs(run()).items()}
            except Skipped as reason:
                self.skip(f"{case}, {c.name}", str(reason))
                continue
            except torch.cuda.OutOfMemoryError as error:
                self.skip(f"{case}, {c.name}", f"out of memory: {str(error).splitlines()[0][:160]}")
                continue
            except Exception as error:
                complaint = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
                if c.optional:
                    self.skip(f"{case}, {c.name}", complaint)
                else:
                    self.fail(f"{case}, {c.name}, {threads} threads: {complaint}")
                continue
            errors[c.name], complaint = judge(got, oracle, dtype, limits if c.ours else {})
            if complaint:
                self.fail(f"{case}, {c.name}, {threads} threads: {complaint}")
                continue
            if c.plain:
                for name, tensor in got.items():
                    limit = error_and_limit(tensor, tensor, oracle[name])[1]
                    limits[name] = max(limits.get(name, 0.0), limit)
            ready.append((c, run))
        places = {c.name: place for place, c in enumerate(contenders)}
        ready.sort(key=lambda found: (found[0].ours, not found[0].plain, places[found[0].name]))
        return ready, errors


# ---------------------------------------------------------------------- correctness


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """``|got - wanted| / |wanted|`` in the Frobenius norm, in float64."""
    if got.shape != wanted.shape:
        return math.inf
    scale = float(wanted.norm()) or 1.0
    error = float((got.double() - wanted).norm()) / scale
    return math.inf if math.isnan(error) else error


RIGHT = {"float64": 1e-12, "float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}


def judge(got: Outputs, oracle: Outputs, dtype: str, limits: dict[str, float]) -> tuple[float, str]:
    """The largest relative error, and a complaint or "".

    Anyone's relative error may be what RIGHT says of the dtype: no contender is refused for its rounding. Where
    ``limits`` has the largest errors that the rule of lowrank_kernels.testing allows, they hold as well.
    """
    if not got:
        return math.inf, "no output to check"
    worst = 0.0
    right = RIGHT[dtype]
    for name, tensor in got.items():
        relative = relative_error(tensor, oracle[name])
        worst = max(worst, relative)
        if not relative <= right:
            return relative, f"{name} has relative error {relative:.2e} against float64, at most {right:.0e} is right"
        if name in limits:
            error = error_and_limit(tensor, tensor, oracle[name])[0]
            if not error <= limits[name]:
                return relative, f"{name} is off by {error:.2e}, plain PyTorch's rounding allows {limits[name]:.2e}"
    return worst, ""


# ---------------------------------------------------------------------- time


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Torch, BLAS and OpenMP pools at ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):  # comes with scikit-learn
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(count))
        try:
            yield
        finally:
            torch.set_num_threads(before)


def host_seconds(run: Callable[[], Any], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        run()
    return time.perf_counter() - start


def interleave(
    runs: dict[str, Callable[[], Any]],
    seconds: float,
    min_repeats: int,
    max_repeats: int,
    clock: Callable[[Callable[[], Any], int], float] = host_seconds,  # the seconds that so many calls take
) -> dict[str, Timing]:
    """Round-robin medians: in each round every contender is sampled once; slow ones sit out some rounds.

    A sample of a fast contender is a loop of about 5 ms after one untimed call, so that it runs as in a training loop and
    not on the caches its predecessor left.
    """
    once: dict[str, float] = {}
    for name, run in runs.items():
        run()  # warm-up
        once[name] = clock(run, 1)
    inner = {name: max(1, min(2000, math.ceil(5e-3 / max(t, 1e-7)))) if t < 5e-3 else 1 for name, t in once.items()}
    count = {
        name: max(min_repeats, min(max_repeats, int(seconds / max(once[name] * (inner[name] + 1), 1e-9)))) for name in runs
    }
    timings = {name: Timing([], inner[name]) for name in runs}
    rounds = max(count.values(), default=0)
    names = list(runs)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(rounds):
            for i in range(len(names)):
                name = names[(i + r) % len(names)]
                if (r + 1) * count[name] // rounds == r * count[name] // rounds:
                    continue
                run, loops = runs[name], inner[name]
                if once[name] < 0.05:
                    run()
                timings[name].seconds.append(clock(run, loops) / loops)
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return timings


def once_per_round(runs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Whole fits: every contender ``repeats`` times, interleaved, no warm-up beyond the first; and the last results."""
    timings = {name: Timing([]) for name in runs}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            start = time.perf_counter()
            results[name] = run()
            timings[name].seconds.append(time.perf_counter() - start)
    return timings, results


def measure_ceilings(quick: bool) -> tuple[float, float]:
    """(sgemm GFLOP/s, copy GB/s, read plus write), the best of a few runs at the current thread count."""
    size, count = (128, 1 << 18) if quick else (2048, 1 << 25)
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty_like(a)
    source, target = torch.ones(count), torch.empty(count)

    def best(run: Callable[[], Any]) -> float:
        run()
        samples = []
        for _ in range(7):
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        return min(samples)

    return 2e-9 * size**3 / best(lambda: torch.mm(a, b, out=out)), 8e-9 * count / best(lambda: target.copy_(source))


# ---------------------------------------------------------------------- memory


def free_gb() -> float:
    """Memory available without swapping; infinite where the system does not say."""
    with contextlib.suppress(OSError):
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if match:
            return int(match[1]) / 1e6
    return math.inf


def peak_memory(module: str, function: str, *arguments: str) -> float:
    """Extra megabytes at the peak of one call, measured in a fresh process; NaN where the system does not tell.

    ``module.function(*arguments)`` returns ``(warm, run)``: warm() touches the libraries on a tiny case, run() is
    measured. Torch's allocator is malloc, so tracemalloc sees nothing; the kernel's high-water mark does.
    """
    # Freed blocks go back to the system at once: what an earlier step left must not hide the peak.
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.harness", module, function, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])


def _memory_child(module: str, function: str, *arguments: str) -> None:
    warm, run = getattr(importlib.import_module(module), function)(*arguments)
    warm()
    gc.collect()
    before = _status_kb("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts at the present size
    run()
    print(json.dumps({"peak_mb": (_status_kb("VmHWM") - before) / 1e3}))


def _status_kb(name: str) -> float:
    with contextlib.suppress(OSError):
        match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if match:
            return float(match[1])
    return math.nan


# ---------------------------------------------------------------------- machine


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def machine_slug() -> str:
    """CPU model and cores, such as ``intel-core-i7-9750h-12-cores``."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = match[1] if match else model
    model = re.sub(r"\((R|TM)\)|CPU|Processor|@.*|\d+-Core", "", model, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {os.cpu_count()} cores".lower()).strip("-")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine_facts() -> dict[str, Any]:
    # What benches write themselves does not make a revision dirty.
    changed = _git("status", "--porcelain", "--", ".", ":!bench/data", ":!docs/figures", ":!README.md", ":!bench/README.md")
    return {
        # A copy of the tree without its history is told by whoever copied it.
        "revision": _git("rev-parse", "--short", "HEAD") or os.environ.get("LRK_REVISION", "")[:7] or "unknown",
        "dirty": "yes" if changed else "no",
        "machine": machine_slug(),
        "simd": _native._C.simd_level() if _native.has_cpu() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "package": lowrank_kernels.__version__,
    }


def warn_if_busy(say: Callable[[str], None]) -> bool:
    """Timings of a busy machine say nothing; the load at the time stands in every row."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.3:
        say(f"warning: the load average is {load:.1f}: others are running, and the timings will show it")
        return True
    return False


if __name__ == "__main__":
    _memory_child(*sys.argv[1:])

"""Measuring on a GPU: events instead of the host's clock, CUDA graphs, inputs beyond the L2 cache, ceilings.

A case comes as several input sets with contenders for each. One *call* of a contender goes over every set in turn: *cold*
means that the sets together are at least three times the L2 cache, *hot* that it is the same set again and again.
*graph*: the whole call is captured once and replayed, so that launches cost what the GPU makes of them; *launched*: the
host launches every kernel, as in a program without graphs. Before a contender is timed its outputs are filled with NaN, its
graph is replayed, and the result is compared with float64.

Without a GPU a quick run rehearses all this on the CPU: tiny sizes, the host's clock, plain calls; the rows say so.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .harness import (
    DATA,
    Bar,
    Contender,
    Outputs,
    Session,
    Skipped,
    Timing,
    host_seconds,
    interleave,
    machine_facts,
    use_threads,
)

BENCH = "ceilings_cuda"
MAX_SETS = 128
WARM_UP = 3  # calls before a capture: libraries make their handles and workspaces, compilers compile


def gpu_slug(index: int = 0) -> str:
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(index).lower()).strip("-")


def why_no_gpu() -> str:
    """Why nothing can be measured here, or ""."""
    if torch.version.hip is not None:
        return "torch was built for ROCm; these benches measure CUDA"
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", and it was built without CUDA"
        return f"no GPU that torch {torch.__version__} can use{built}"
    return ""


def event_seconds(run: Callable[[], Any], loops: int) -> float:
    """Time between two events around the calls, on the GPU's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(loops):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# ---------------------------------------------------------------------- calls


class Calls:
    """A contender over its input sets. Calling it makes the result of the first set anew, to be checked.

    ``enqueue()`` is what is timed: ``count`` calls, one a set.
    """

    def __init__(self, runs: Sequence[Callable[[], Any]], graph: bool, repeats: int = 1) -> None:
        order = [*runs[1:], runs[0]] * repeats  # the first set last: what it gave is still there after a replay
        self.count = len(order)
        self._order, self._graph, self._result = order, None, None
        if graph:
            self._capture()

    def _capture(self) -> None:
        for _ in range(WARM_UP):
            for run in dict.fromkeys(self._order):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # The stream of the warm-up: autograd's nodes remember theirs, and another would have to be waited for.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for run in self._order:
                    result = run()
        except Exception:
            # A capture that fails can leave torch's generator as if it still ran: every later random number would fail.
            with contextlib.suppress(Exception):
                index = torch.cuda.current_device()
                fresh = torch.Generator(f"cuda:{index}").manual_seed(0)
                torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())
            raise
        self._graph, self._result = graph, result

    def __call__(self) -> Any:
        if self._graph is None:
            return self._order[-1]()
        poison(self._result)
        self._graph.replay()
        torch.cuda.synchronize()
        return self._result

    def enqueue(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for run in self._order:
            run()


@torch.no_grad()
def poison(result: Any) -> None:
    """NaN into every tensor of a result: what a replay does not write is then seen."""
    if isinstance(result, Tensor):
        result.detach().fill_(math.nan)
    elif isinstance(result, dict):
        poison(list(result.values()))
    elif isinstance(result, (list, tuple)):
        for part in result:
            poison(part)


# ---------------------------------------------------------------------- the session


@dataclass
class GpuSession(Session):
    """A session whose rows are measured on a GPU; shares rows, errors and skipped cases with the one it came from."""

    device: str = "cuda"
    l2_bytes: int = 0
    rates: dict[str, float] = field(default_factory=dict)  # measured ceilings: "copy" in GB/s, a dtype in GFLOP/s

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    def free_gb(self) -> float:
        if self.rehearsal:
            return super().free_gb()
        free, _ = torch.cuda.mem_get_info()
        return (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / 1e9

    def sets(self, nbytes: int) -> int:
        """How many input sets of this size are together beyond the L2 cache."""
        return 2 if self.quick else max(1, math.ceil(3 * self.l2_bytes / nbytes))

    def suffix(self, graph: bool, temperature: str = "") -> str:
        words = ", ".join(filter(None, ("graph" if graph else "launched", temperature)))
        return f", CPU rehearsal of {words}" if self.rehearsal else f", {words}"

    def compare_sets(
        self,
        bench: str,
        case: str,
        sets: Sequence[Sequence[Contender]],  # the contenders of every input set, in the same order
        *,
        oracle: Callable[[], Outputs],  # of the first set; what it returns is kept no longer than it is needed
        graph: bool,
        repeats: int = 1,  # calls of every set in one graph
        temperature: str = "cold",
        against: Sequence[str] = (),
        over: str = "",
        bars: Sequence[tuple[str, Bar]] = (),
        dtype: str = "float32",
        flops: float | None = None,
        bytes_moved: float | None = None,
        seconds: float = 0.25,
        max_repeats: int = 31,
        min_repeats: int = 7,
        peaks: dict[str, float] | None = None,  # where peak memory is something else than the growth over a call
        memory: tuple[str, str] | None = None,  # (contender, the one whose peak memory it may not exceed)
        note: str = "",
    ) -> None:
        """Check, then time every contender, and record the rows; the counterpart of Session.compare on a GPU."""
        name = case + self.suffix(graph, temperature)
        self.say(f"{bench}: {name}")
        if self.quick:
            seconds, max_repeats, min_repeats = 0.02, 3, 2
        grown: dict[str, float] | None = {} if peaks is None else None
        wrapped = [
            replace(versions[0], make=self._make(versions, graph, repeats, grown)) for versions in zip(*sets, strict=True)
        ]
        ready, wrong, timings = [], {}, {}
        with self.guarded(name):
            ready, wrong = self._prepare(name, wrapped, 1, oracle(), dtype)
            clock = host_seconds if self.rehearsal else event_seconds
            timings = interleave({c.name: calls.enqueue for c, calls in ready}, seconds, min_repeats, max_repeats, clock)
        if not timings:
            return
        peaks = peaks if grown is None else grown
        if memory and memory[1] in peaks:
            bars = [*bars, (memory[0], Bar("peak MB", peaks[memory[1]]))]
        for c, calls in ready:
            timings[c.name] = Timing([s / calls.count for s in timings[c.name].seconds], timings[c.name].inner)
        self._record_timings(
            bench,
            name,
            [c for c, _ in ready],
            timings,
            wrong,
            threads="",
            ceilings=(self.rates.get(dtype, math.nan), self.rates.get("copy", math.nan)),
            peaks=peaks,
            against=against,
            over=over,
            bars=bars,
            dtype=dtype,
            flops=flops,
            bytes_moved=bytes_moved,
            note=note,
        )
        ready.clear()
        self.release()

    def _make(
        self, versions: Sequence[Contender], graph: bool, repeats: int, grown: dict[str, float] | None
    ) -> Callable[[int], Callable[[], Any]]:
        def make(threads: int) -> Callable[[], Any]:
            try:
                runs = [c.make(threads) for c in versions]
                if not self.rehearsal and grown is not None:
                    runs[0]()
                    grown[versions[0].name] = growth(runs[0])
                return Calls(runs, graph and not self.rehearsal, repeats)
            except torch.cuda.OutOfMemoryError:
                self.release()
                raise

        return make

    def release(self) -> None:
        """Give back the memory of what is no longer used."""
        if not self.rehearsal:
            gc.collect()
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ clocks and ceilings

    def clocks(self, when: str) -> None:
        """A row with the clocks, as the driver tells them."""
        if self.rehearsal:
            return
        fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
        try:
            uuid = str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
            which = [f"--id=GPU-{uuid}"] if uuid else []
            command = ["nvidia-smi", *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            values = [text.strip() for text in done.stdout.splitlines()[0].split(",")]
            clock = float(values[0])
        except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
            self.skip(f"clocks {when}", f"nvidia-smi does not tell them: {error}")
            return
        units = ("MHz", "MHz", "C", "W")
        note = ", ".join(f"{name} {value} {unit}" for name, value, unit in zip(fields, values, units, strict=False))
        self.record(BENCH, f"clocks {when}", "nvidia-smi", metric="SM clock in MHz", value=clock, note=note)

    def measure_ceilings(self) -> None:
        """What this GPU reaches in this run: a copy, the vendor's matrix products, random rows of 64 bytes."""
        self.say(f"{BENCH}: copy, matrix products, random rows")
        count = 1 << 12 if self.quick else 1 << 27
        with self.guarded("ceiling: copy"):
            source = torch.randn(count, device=self.device)
            target = torch.empty_like(source)
            found = self._best(lambda: target.copy_(source))
            self.rates["copy"] = 8e-9 * count / found.columns()["median_ms"] * 1e3
            case = f"copy of {4 * count / 2**20:.3g} MiB, read and written"
            self._record_ceiling(case, "torch copy_", found, gbs=self.rates["copy"])
        size = 64 if self.quick else 8192
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            with self.guarded(f"ceiling: {name} product"):
                a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
                out = torch.empty_like(a)
                found = self._best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
                self.rates[name] = 2e-9 * size**3 / found.columns()["median_ms"] * 1e3
                values = {"dtype": name, "gflops": self.rates[name]}
                self._record_ceiling(f"matrix product of {size} x {size}, {name}", "torch mm", found, **values)
        for place, share in (("inside L2", 0.25), ("larger than L2", 4.0)):
            with self.guarded(f"ceiling: table {place}"):
                rows = 64 if self.quick else max(1, int(share * self.l2_bytes / 64))
                reads = 256 if self.quick else 1 << 23
                table = torch.randn(rows, 16, device=self.device)
                index = torch.randint(0, rows, (reads,), device=self.device, dtype=torch.int32)
                out = torch.empty(reads, 16, device=self.device)
                found = self._best(lambda table=table, index=index, out=out: torch.index_select(table, 0, index, out=out))
                rate = 64e-9 * reads / found.columns()["median_ms"] * 1e3
                note = "of the rows read; as many bytes are written, and 4 of index read a row"
                case = f"random rows of 64 bytes from a table of {64 * rows / 2**20:.3g} MiB, {place}"
                self._record_ceiling(case, "torch index_select", found, gbs=rate, note=note)
        self.release()

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Inside, running out of memory is a reason to skip and no error."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            self.skip(what, f"out of memory: {str(error).splitlines()[0][:160]}")
            error.__traceback__ = None  # its frames hold tensors
            self.release()

    def _best(self, run: Callable[[], Any]) -> Timing:
        clock = host_seconds if self.rehearsal else event_seconds
        return interleave({"": run}, 0.02 if self.quick else 0.3, 3, 15, clock)[""]

    def _record_ceiling(self, case: str, contender: str, timing: Timing, note: str = "", **values: Any) -> None:
        case += ", CPU rehearsal" if self.rehearsal else ""
        self.record(BENCH, case, contender, note=note, **{"dtype": "float32"} | timing.columns() | values)


def growth(run: Callable[[], Any]) -> float:
    """Megabytes of GPU memory at the peak of one call beyond what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def gpu_session(session: Session) -> GpuSession:
    """The session on the GPU that belongs to ``session``; the first call measures the ceilings."""
    if session.gpu is None:
        reason = why_no_gpu()
        if reason and not session.quick:
            raise Skipped(reason)
        shared: dict[str, Any] = {
            "quick": session.quick,
            "rows": session.rows,
            "errors": session.errors,
            "skipped": session.skipped,
            "say": session.say,
        }
        if reason:
            session.say(f"rehearsal on the CPU: {reason}")
            gpu = GpuSession(session.out, facts=session.facts, device="cpu", l2_bytes=1 << 20, **shared)
        else:
            properties = torch.cuda.get_device_properties(0)
            facts = machine_facts() | {"machine": gpu_slug(), "simd": f"sm_{properties.major}{properties.minor}"}
            out: Path = DATA / f"{gpu_slug()}.csv" if session.out.parent == DATA else session.out
            gpu = GpuSession(out, facts=facts, l2_bytes=int(getattr(properties, "L2_cache_size", 0)) or 64 << 20, **shared)
        session.gpu = gpu
        with _own_stream(gpu):
            gpu.clocks("before")
            gpu.measure_ceilings()
            gpu.clocks("after the ceilings")
    session.gpu.deadline = session.deadline
    return session.gpu


def on_gpu(part: Callable[[GpuSession], None]) -> Callable[[Session], None]:
    """A part of a bench that gets the session on the GPU, on a stream of its own, which captures need.

    An attribute ``share`` of the part is its share of a time budget, beside 1 of any other.
    """

    @functools.wraps(part)
    def run(session: Session) -> None:
        gpu = gpu_session(session)
        gc.collect()
        gc.freeze()  # modules and the like: release() need not look at them every time
        with _own_stream(gpu):
            try:
                part(gpu)
            finally:
                gpu.clocks(f"after {part.__module__.removeprefix('bench.bench_')}.{part.__name__}")

    return run


@contextlib.contextmanager
def _own_stream(gpu: GpuSession) -> Iterator[None]:
    if gpu.rehearsal:
        with use_threads(1):
            yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()

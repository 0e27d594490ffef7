"""Child processes for ``make gpu``: stopped whole, with limits and logs; and the test suite as a queue of files.

The standard library only, and no threads: a fork that runs code before exec is then safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST_LOG = 8 << 20
LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
# What takes longest comes first; the files of the GPU come before it.
SLOW = (
    "cuda_on_cpu", "completion_op", "completion_graphs", "simd_widths", "cuda_build", "three_factor_op", "three_factor_graphs",
    "bench", "nn",
)  # fmt: skip


class Failed(Exception):
    """A part went wrong; the text says how, in one line."""


class Unavailable(Exception):
    """A part cannot run here; the text says why, in one line."""


# ---------------------------------------------------------------------- processes

RUNNING: dict[int, subprocess.Popen[bytes]] = {}


def _child_setup() -> None:
    """A process group of its own, so that it is stopped whole; and it stops when this process is killed."""
    os.setpgid(0, 0)
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_child_setup,
        )
    RUNNING[process.pid] = process
    return process


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to the groups, SIGKILL to what is left three seconds later."""

    def signal_all(number: int) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)

    signal_all(signal.SIGTERM)
    end = time.monotonic() + 3
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    signal_all(signal.SIGKILL)
    for process in processes:
        process.wait()
        RUNNING.pop(process.pid, None)


def run(command: list[str], log: Path, environment: dict[str, str], limit: float) -> int | None:
    """The exit status, or None where the limit came first."""
    process = start(command, log, environment)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, limit))
    late = process.poll() is None
    stop([process])  # a child that ended may have left some of its own
    return None if late else process.returncode


def output_of(command: list[str], limit: float = 20.0, environment: dict[str, str] | None = None) -> tuple[str, str]:
    """What a command prints, and a reason where it did not succeed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "output"
        try:
            code = run(command, log, environment or dict(os.environ), limit)
        except OSError as error:
            return "", f"{command[0]}: {error.strerror}"
        text = log.read_text(encoding="utf-8", errors="replace").strip()
    if code is None:
        return text, f"{Path(command[0]).name} did not answer within {limit:.0f} s"
    return text, f"{Path(command[0]).name}: {last_line(text) or f'exit status {code}'}" if code else ""


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def ended(code: int | None, limit: float, log: Path) -> None:
    """Raise Failed unless the status is 0."""
    if code is None:
        raise Failed(f"not done after {limit:.0f} s")
    if code:
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise Failed(f"{how}: {last_line(log.read_text(encoding='utf-8', errors='replace'))}")


def write(path: Path, text: str) -> None:
    """In one move: a reader finds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def shorten(path: Path, largest: int = LARGEST_LOG) -> None:
    """Head and tail of a log that grew too large."""
    if path.exists() and path.stat().st_size > largest:
        data = path.read_bytes()
        middle = f"\n... {len(data) - largest} bytes left out ...\n".encode()
        path.write_bytes(data[: largest // 4] + middle + data[-(largest - largest // 4) :])


# ---------------------------------------------------------------------- the test suite, a process a file


@dataclass
class SuiteFile:
    path: Path
    log: Path
    junit: Path
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    seconds: float = 0.0
    complaint: str = "not started"  # empty: it passed
    counts: dict[str, int] = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)  # reason -> tests

    def read(self) -> None:
        """Counts and reasons from the report, which a file that crashed has not written."""
        assert self.process is not None
        code = self.process.returncode
        try:
            tree = ElementTree.parse(self.junit)
        except (OSError, ElementTree.ParseError):
            self.complaint = f"ended with {signal.Signals(-code).name if code < 0 else f'status {code}'} and no report"
            return
        total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        for suite in tree.iter("testsuite"):
            for name in total:
                total[name] += int(suite.get(name, 0))
        failed, skipped = total["failures"] + total["errors"], total["skipped"]
        self.counts = {"passed": total["tests"] - failed - skipped, "failed": failed, "skipped": skipped}
        for skip in tree.iter("skipped"):
            reason = skip.get("message", "")[:200]
            self.skips[reason] = self.skips.get(reason, 0) + 1
        # Status 5: nothing was collected, as where the module skips itself.
        self.complaint = "" if code in (0, 5) and not failed else f"{failed} failed" if failed else f"status {code}"

    def line(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        reasons = "".join(f"\n    skipped {count}: {reason}" for reason, count in self.skips.items())
        return f"{self.path.name}: {'FAILED: ' * bool(self.complaint)}{counts or self.complaint}, {self.seconds:.1f} s{reasons}"


def ordered(paths: list[Path]) -> list[Path]:
    """The files of the GPU, then the slow ones, then the others."""

    def key(path: Path) -> tuple[int, str]:
        stem = path.stem.removeprefix("test_")
        place = SLOW.index(stem) if stem in SLOW else len(SLOW)
        return (-1 if stem.endswith("_cuda") else place, stem)

    return sorted(paths, key=key)


def stop_files(files: list[SuiteFile]) -> None:
    stop([file.process for file in files if file.process is not None])


def run_queue(
    files: list[SuiteFile],
    command: list[str],
    environment: dict[str, str],
    workers: int,
    limit: float,
    ended_one: Callable[[SuiteFile], None],
) -> None:
    """As many processes as workers, a file each, until all are done or the limit comes."""
    end = time.monotonic() + limit
    waiting, active = list(files), list[SuiteFile]()
    try:
        while (waiting or active) and time.monotonic() < end:
            while waiting and len(active) < workers:
                file = waiting.pop(0)
                arguments = [str(file.path), f"--junitxml={file.junit}"]
                file.process, file.began = start([*command, *arguments], file.log, environment), time.monotonic()
                file.complaint = "not finished"
                active.append(file)
            time.sleep(0.05)
            for file in [file for file in active if file.process is not None and file.process.poll() is not None]:
                active.remove(file)
                stop_files([file])
                file.seconds = time.monotonic() - file.began
                file.read()
                ended_one(file)
    finally:
        stop_files(active)
        for file in active:
            file.seconds = time.monotonic() - file.began

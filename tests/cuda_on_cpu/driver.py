"""Builds the driver (driver.cpp with the unchanged kernels of csrc/) and runs calls through it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_cpu"
KERNELS = ("completion_cuda.cu", "three_factor_cuda.cu")
FUSED_BYTES = 16384  # of dy, above which three_factor reads it once for few ranks: both ways are seen with small numbers
SCHEDULES = ("random", "forward", "reverse", "ahead")
COMPILER = shutil.which("g++")

_COMMON = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DLRK_CUDA_ON_CPU"]
FLAVOURS = {
    "plain": ["-O2"],
    "quick": ["-O1"],  # for kernels that are compiled for a few small calls
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread", "-DLRK_TSAN"],
}
_SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0",
}


# ---------------------------------------------------------------------- building


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[:4000]}")


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


def _forget_old_files() -> None:
    """The cache keeps what was used within a week."""
    for path in CACHE.glob("*"):
        if time.time() - path.stat().st_mtime > 7 * 86400:
            path.unlink(missing_ok=True)


def _cached(name: str, command: list[str | Path], contents: Iterable[bytes]) -> Path:
    """The output of a compiler command, from the cache where nothing it reads has changed.

    Paths in the command do not count, only what lies there: changed copies of csrc/ are made in folders of any name.
    """
    path = CACHE / f"{name}-{_digest([*(part.encode() for part in command if isinstance(part, str)), *contents])}"
    if path.exists():
        path.touch()
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:  # whoever else builds never sees half a file
        _run([*command, "-o", Path(folder) / name])
        os.replace(Path(folder) / name, path)
    return path


def _version() -> bytes:
    return subprocess.run([str(COMPILER), "--version"], capture_output=True, check=True).stdout


def _object(source: Path, flavour: str, csrc: Path) -> Path:
    flags = FLAVOURS[flavour]
    if source.name == "scheduler.cpp":  # ThreadSanitizer may not see the scheduler, see scheduler.h
        flags = [flag for flag in flags if flag != "-fsanitize=thread"] + ["-fno-tree-loop-distribute-patterns"]
    kernel = source.suffix == ".cu"
    command: list[str | Path] = [str(COMPILER), *_COMMON, *flags, f"-DLRK_FUSED_BYTES={FUSED_BYTES}", "-I", csrc, "-I", HERE]
    command += ["-x", "c++", "-include", HERE / "ptx.h"] if kernel else []
    read = [source, *sorted(HERE.glob("*.h")), *sorted(csrc.glob("*.h")), *(sorted(csrc.glob("*.cuh")) if kernel else ())]
    contents = [_version(), *(path.read_bytes() for path in read)]
    return _cached(f"{source.stem}-{flavour}.o", [*command, "-c", source], contents)


def build(flavour: str, csrc: Path = CSRC, changed: str | None = None, jobs: int = 2) -> Path:
    """The driver. ``csrc`` may be a changed copy; only its file ``changed`` is then compiled anew."""
    sources = [(HERE / "scheduler.cpp", CSRC), (HERE / "driver.cpp", CSRC)]
    sources += [(folder / name, folder) for name in KERNELS for folder in [csrc if changed in (None, name) else CSRC]]
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda pair: _object(pair[0], flavour, pair[1]), sources))
    return _link("driver", flavour, objects)


def build_self_test(flavour: str) -> Path:
    """self_test.cu, which needs the scheduler alone."""
    return _link(
        "self_test", flavour, [_object(path, flavour, CSRC) for path in (HERE / "self_test.cu", HERE / "scheduler.cpp")]
    )


def _link(name: str, flavour: str, objects: list[Path]) -> Path:
    sanitizers = [flag for flag in FLAVOURS[flavour] if flag.startswith("-fsanitize")]
    _forget_old_files()
    return _cached(
        f"{name}-{flavour}", [str(COMPILER), *sanitizers, *objects], [_version(), *(path.name.encode() for path in objects)]
    )


# ---------------------------------------------------------------------- calls


@dataclass
class Call:
    """Arguments of one run of an op; see driver.cpp."""

    op: str
    name: str
    integers: dict[str, int] = field(default_factory=dict)
    reals: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)  # with their strides: gaps between rows travel along
    shifts: dict[str, int] = field(default_factory=dict)  # of an input, elements after a 16-byte boundary
    outputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)

    def encode(self) -> bytes:
        parts = [f"call {self.op} {self.name}\n".encode()]
        parts += [f"integer {name} {value}\n".encode() for name, value in self.integers.items()]
        parts += [f"real {name} {value.hex()}\n".encode() for name, value in self.reals.items()]
        for name, tensor in self.inputs.items():
            data = _memory(tensor)
            shift = self.shifts.get(name, 0) * tensor.element_size()
            parts += [f"input {name} {len(data)} {shift}\n".encode(), data, b"\n"]
        parts += [f"output {name} {_bytes(*output)}\n".encode() for name, output in self.outputs.items()]
        return b"".join([*parts, b"run\n"])


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _memory(tensor: Tensor) -> bytes:
    """What lies between the tensor's first element and its last one."""
    if tensor.numel() == 0:
        return b""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.as_strided(tensor, (span,), (1,)).view(torch.uint8).numpy().tobytes()


@dataclass
class Results:
    outputs: dict[str, dict[str, Tensor]]  # by call
    kernels: dict[str, int]  # launches of every kernel that the launch code can pick


class Failure(AssertionError):
    """The driver ended before its calls did."""

    def __init__(self, call: str, returncode: int, stderr: str) -> None:
        super().__init__(f"{call}: the driver ended with status {returncode}\n{stderr[-6000:]}")
        self.call, self.returncode, self.stderr = call, returncode, stderr


def run(
    binary: Path | Sequence[str | Path],
    calls: Sequence[Call],
    schedule: str = "random",
    seed: int = 1,
    poison: int = 0xFF,
    timeout: float = 300,
) -> Results:
    """All calls in one process; raises :class:`Failure` where one stops it."""
    command = [binary] if isinstance(binary, Path) else list(binary)
    command += ["--schedule", schedule, "--seed", str(seed), "--poison", str(poison)]
    with tempfile.TemporaryFile() as sent, tempfile.TemporaryFile() as answer:
        for call in calls:
            sent.write(call.encode())
        sent.seek(0)
        done = subprocess.run(
            [str(part) for part in command],
            stdin=sent,
            stdout=answer,
            stderr=subprocess.PIPE,
            env={**os.environ, **_SANITIZER_OPTIONS},
            timeout=timeout,
            check=False,
        )
        answer.seek(0)
        results, finished = _decode(answer, calls)
    if done.returncode != 0 or len(finished) != len(calls):
        name = calls[len(finished)].name if len(finished) < len(calls) else "after the last call"
        raise Failure(name, done.returncode, done.stderr.decode(errors="replace"))
    return results


def _decode(answer: Iterable[bytes], calls: Sequence[Call]) -> tuple[Results, list[str]]:
    results = Results({}, {})
    finished: list[str] = []
    outputs: dict[str, Tensor] = {}
    stream = answer
    for line in iter(stream.readline, b""):  # type: ignore[attr-defined]
        word, *rest = line.decode().split(" ", 2)
        if word == "output":
            call = calls[len(finished)]
            shape, dtype = call.outputs[rest[0]]
            data = bytearray(stream.read(int(rest[1])))  # type: ignore[attr-defined]
            if len(data) < int(rest[1]):
                break
            outputs[rest[0]] = torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
        elif word == "done\n":
            results.outputs[calls[len(finished)].name] = outputs
            finished.append(calls[len(finished)].name)
            outputs = {}
        elif word == "kernel":
            results.kernels[_kernel_name(rest[1])] = int(rest[0])
    return results, finished


def differences(one: Results, other: Results) -> list[str]:
    """Which outputs have not the same bits."""
    return [
        f"{call}: {name}"
        for call, outputs in one.outputs.items()
        for name, tensor in outputs.items()
        if _memory(tensor.contiguous()) != _memory(other.outputs[call][name].contiguous())
    ]


def _kernel_name(pretty: str) -> str:
    found = re.search(r"kKernel = (.*)\]$", pretty.strip())
    return re.sub(r"lrk::|\{anonymous\}::|\(anonymous namespace\)::", "", found.group(1)) if found else pretty

"""``make gpu OUT=folder``: everything a machine with a GPU can tell, in one command that ends within nine minutes.

``python -m bench.gpu`` runs before anything is built: the standard library only, torch and the package live in child
processes. The parts, one after the other, each with its own limit and what the earlier ones left over:

    environment  what machine this is, and what it lacks             environment.json
    build        the native module for this GPU, in build/gpu        build.log
    tests        the whole suite, a queue of files                   tests.log
    kernels      tests/cuda_on_cpu/on_gpu.py: compute-sanitizer      kernels.log
    benches      the GPU benches of ``python -m bench``              bench.log, <gpu>.csv
    summary      one short table, the last thing printed             summary.txt

A part that fails does not stop the others. Exit status: 0 every part passed, 1 a part failed, 2 wrong arguments, 3 this
machine lacks what a part needs and that part was skipped, 130 or 143 interrupted. ``--rehearse`` goes the same way on a
machine without a GPU, with a few test files and tiny benches; parts that need the GPU are then skipped with status 0.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .children import (
    ROOT,
    RUNNING,
    Failed,
    SuiteFile,
    Unavailable,
    ended,
    last_line,
    ordered,
    output_of,
    run,
    run_queue,
    shorten,
    stop,
    write,
)

WORK = ROOT / "build" / "gpu"
SECONDS = 540.0
OLDEST_NVCC = (11, 8)
OLDEST_GPU = (8, 0)
NO_SANITIZER = 5  # of on_gpu.py: all is well, but compute-sanitizer is not installed
BENCHES = ("three_factor_cuda", "completion_cuda", "encoder_cuda")
REHEARSED = ("test_doctor.py", "test_entries.py", "test_three_factor_cuda.py", "test_completion_cuda.py")


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived."""


# ---------------------------------------------------------------------- the run


@dataclass
class Result:
    name: str
    status: str  # passed, failed or skipped
    seconds: float
    detail: str


class Problem(NamedTuple):
    """Something that this machine lacks."""

    short: str  # for the table
    text: str  # with what to do about it
    parts: tuple[str, ...] = ("build", "tests", "kernels", "benches")  # those that cannot run


@dataclass
class Machine:
    """What the environment part found."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    has_gpu: bool = False
    architecture: str = ""  # as CMake names it
    slug: str = "rehearsal"


@dataclass
class Run:
    out: Path
    seconds: float = SECONDS
    rehearse: bool = False
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    machine: Machine = field(default_factory=Machine)
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # below the table
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def log(self, name: str) -> Path:
        path = self.out / f"{name}.log"
        path.unlink(missing_ok=True)
        return path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, *arguments]

    def save(self) -> None:
        parts = [result.__dict__ for result in self.results]
        problems = [problem.text for problem in self.machine.problems]
        facts = {**self.machine.facts, "problems": problems, "parts": parts}
        write(self.out / "environment.json", json.dumps(facts, indent=1) + "\n")
        write(self.out / "summary.txt", self.summary())

    def summary(self) -> str:
        facts = self.machine.facts
        revision = f"{facts.get('revision', 'unknown')[:12]}{'+' if facts.get('dirty') else ''}"
        title = f"{facts.get('gpu', 'no GPU')}, {facts.get('date', '')}, revision {revision}"
        lines = [title + (", rehearsal" if self.rehearse else "")]
        for result in self.results:
            lines.append(f"  {result.name:<12} {result.status:<8} {result.seconds:4.0f} s  {result.detail}".rstrip())
        return "\n".join([*lines, *self.notes]) + "\n"


@dataclass(frozen=True)
class Part:
    name: str
    work: Callable[[Run, float], str]  # run, limit in seconds -> one line for the table
    at_most: float  # seconds of SECONDS
    keeps: float  # seconds of SECONDS kept for what comes after it


def run_part(part: Part, state: Run) -> Result:
    begin = time.monotonic()
    share = state.seconds / SECONDS
    limit = min(part.at_most * share, state.left() - part.keeps * share)
    reasons = [problem.short for problem in state.machine.problems if part.name in problem.parts]
    failed = [r.name for r in state.results if r.name == "build" and r.status != "passed"]
    status, detail = "skipped", ""
    try:
        if reasons:
            raise Unavailable(", ".join(reasons))
        if failed and part.name in ("tests", "benches"):
            raise Unavailable("there is no build to test")
        if limit < 1:
            raise Failed("no time is left")
        status, detail = "passed", part.work(state, limit)
    except Unavailable as reason:
        status, detail = "skipped", str(reason)
    except Failed as reason:
        status, detail = "failed", str(reason)
    except Exception as error:  # a mistake in a part, or a full disk: the others go on
        traceback.print_exc()
        status, detail = "failed", f"{type(error).__name__}: {error}"
    return Result(part.name, status, time.monotonic() - begin, detail)


# ---------------------------------------------------------------------- environment

SMI_FIELDS = (
    *("name", "uuid", "driver_version", "memory.total", "memory.used", "utilization.gpu", "pstate", "temperature.gpu"),
    *("power.draw", "power.limit", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)

# In a child: importing torch may crash, hang or print.
PROBE = """
import ctypes, importlib.metadata, importlib.util, json
facts = {"modules": {}, "driver_cuda": 0}
names = {"torch": "torch", "numpy": "numpy", "safetensors": "safetensors", "pytest": "pytest", "pybind11": "pybind11",
         "scikit_build_core": "scikit-build-core", "cmake": "cmake", "ninja": "ninja", "triton": "triton", "peft": "peft",
         "transformers": "transformers", "sklearn": "scikit-learn", "scipy": "scipy", "rich": "rich"}
for module, name in names.items():
    if importlib.util.find_spec(module):
        try:
            facts["modules"][module] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts["modules"][module] = "unknown"
try:
    version = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
        facts["driver_cuda"] = version.value
except OSError:
    pass
print(json.dumps(facts), flush=True)
try:
    import torch
    facts["torch"], facts["torch_cuda"] = torch.__version__, torch.version.cuda
    try:
        torch.cuda.init()
        p = torch.cuda.get_device_properties(0)
        facts["device"] = {"name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory,
                           "multiprocessors": p.multi_processor_count, "l2_bytes": getattr(p, "L2_cache_size", 0)}
        facts["devices"] = torch.cuda.device_count()
        torch.ones(1, device="cuda").item()
    except Exception as error:
        facts["torch_error"] = str(error).strip().splitlines()[0]
except Exception as error:
    facts["torch_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(facts))
"""


def smi(fields: tuple[str, ...] = SMI_FIELDS) -> tuple[list[dict[str, str]], str]:
    """One dictionary a GPU, or the reason why there is none."""
    if shutil.which("nvidia-smi") is None:
        return [], "nvidia-smi is not installed"
    text, reason = output_of(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    if reason:
        return [], reason
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    gpus = [dict(zip(fields, row)) for row in rows if len(row) == len(fields)]  # noqa: B905  Python 3.9 has no strict
    return gpus, "" if gpus else "nvidia-smi lists no GPU"


def version_of(text: str, pattern: str) -> tuple[int, ...]:
    match = re.search(pattern, text)
    return tuple(int(number) for number in match[1].split(".")) if match else ()


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version)) or "of unknown version"


def find_nvcc(environment: dict[str, str]) -> str:
    """The path of nvcc, looked for where CMakeLists.txt does."""
    folders = [str(Path(environment[name], "bin")) for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    path = os.pathsep.join([environment.get("PATH", ""), *folders, "/usr/local/cuda/bin"])
    return shutil.which(environment.get("CUDACXX") or "nvcc", path=path) or ""


def processor() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        return match[1] if match else platform.machine()
    return platform.machine()


def probe(state: Run, limit: float) -> dict[str, Any]:
    """What the child of PROBE says; without torch's part where that crashed."""
    text, reason = output_of(state.command("-c", PROBE), limit, state.environment)
    lines = [line for line in text.splitlines() if line.startswith('{"modules"')]
    facts = json.loads(lines[-1]) if lines else {"modules": {}, "driver_cuda": 0}
    if reason and "torch_error" not in facts:
        facts["torch_error"] = reason
    return facts


def toolkit(state: Run) -> None:
    """nvcc, its version against the sources and the driver; the children find it on their PATH."""
    machine, environment = state.machine, state.environment
    nvcc = find_nvcc(environment)
    machine.facts["nvcc"], machine.facts["nvcc_version"] = nvcc, ""
    if not nvcc:
        text = "nvcc is not installed: install the CUDA toolkit, or set CUDACXX or CUDA_HOME"
        machine.problems.append(Problem("no nvcc", text))
        return
    text, reason = output_of([nvcc, "--version"])
    version = version_of(text, r"release (\d+\.\d+)")
    machine.facts["nvcc_version"] = dotted(version)
    driver = machine.facts.get("driver_cuda", 0) // 1000
    if not version:
        machine.problems.append(Problem("nvcc does not run", f"nvcc does not tell its version: {reason or last_line(text)}"))
    elif version < OLDEST_NVCC:
        text = f"nvcc {dotted(version)} ({nvcc}) is older than {dotted(OLDEST_NVCC)}, which the sources need"
        machine.problems.append(Problem("nvcc is too old", text))
    elif driver and driver < version[0]:
        text = f"the driver is older than the toolkit: it serves CUDA {driver}, nvcc is {dotted(version)}"
        text += "; update the driver or set CUDACXX to an older nvcc"
        machine.problems.append(Problem("the driver is too old", text))
    environment["CUDACXX"] = nvcc
    # Its folder may hold links to the tools one by one: those without a link are where the links lead.
    folders = [str(Path(nvcc).parent), environment["PATH"], str(Path(nvcc).resolve().parent)]
    environment["PATH"] = os.pathsep.join(folders)


def gpu(state: Run, found: list[dict[str, str]], reason: str, probed: dict[str, Any]) -> None:
    """The GPU as torch sees it, else as nvidia-smi does."""
    machine = state.machine
    device, complaint = probed.get("device"), probed.get("torch_error", "")
    machine.has_gpu = bool(device or found)
    if not machine.has_gpu:
        if not state.rehearse:
            text = f"no GPU: {reason}" + (f"; torch: {complaint}" if complaint else "")
            machine.problems.append(Problem("no GPU", text))
        machine.architecture = "90a-real"
        return
    if complaint and "torch" in probed["modules"]:
        text = f"torch cannot use the GPU: {complaint}"
        machine.problems.append(Problem("torch cannot use the GPU", text, ("tests", "benches")))
    capability = tuple(device["capability"]) if device else ()
    if not capability:
        rows, _ = smi(("compute_cap",))
        capability = version_of(rows[0]["compute_cap"], r"(\d+\.\d+)") if rows else ()
    name = device["name"] if device else found[0]["name"]
    machine.facts["gpu"], machine.facts["capability"] = name, dotted(capability)
    machine.slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"
    if capability < OLDEST_GPU:
        text = f"{name} has compute capability {dotted(capability)}, the kernels need {dotted(OLDEST_GPU)}"
        machine.problems.append(Problem("the GPU is too old", text))
    else:
        machine.architecture = "90a-real" if capability == (9, 0) else f"{capability[0]}{capability[1]}-real"


TO_RUN, TO_BUILD = {"torch", "numpy", "safetensors"}, {"pybind11", "scikit_build_core", "cmake", "ninja"}


def packages(state: Run, modules: dict[str, str]) -> None:
    """One line for all that is missing."""
    machine, path = state.machine, state.environment["PATH"]
    names = (state.environment.get("CXX"), "c++", "g++", "clang++")
    compiler = next((name for name in names if name and shutil.which(name, path=path)), "")
    for name, tool in (("compiler", compiler), ("cmake", "cmake")):
        text = output_of([tool, "--version"], environment=state.environment)[0] if tool else ""
        machine.facts[name] = text.partition("\n")[0]
    if not compiler:
        machine.problems.append(Problem("no C++ compiler", "no C++ compiler: install g++, or set CXX"))
    missing = {name for name in TO_RUN | TO_BUILD | {"pytest"} if name not in modules}
    missing -= {name for name in ("cmake", "ninja") if shutil.which(name, path=path)}
    if missing:
        parts = ["build"] if missing & TO_BUILD else []
        parts += ["tests", "benches"] if missing & (TO_BUILD | TO_RUN) else ["tests"]
        listed = sorted(name.replace("_", "-") for name in missing)
        text = f"these packages are missing: {', '.join(listed)} (python -m pip install {' '.join(listed)})"
        machine.problems.append(Problem(f"no {', '.join(listed)}", text, tuple(parts)))


def environment_part(state: Run, limit: float) -> str:
    end = time.monotonic() + limit
    machine, environment = state.machine, state.environment
    # The tools of this Python, which may be called by its path alone; git where another user owns the folder.
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment.get("PATH", os.defpath)])
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "GIT_CONFIG_COUNT": "1"}
    environment |= {"GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": str(ROOT)}
    environment.pop("LOWRANK_KERNELS_NATIVE", None)
    facts = machine.facts
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts["revision"], reason = output_of(["git", "rev-parse", "HEAD"], environment=environment)
    facts["dirty"] = bool(output_of(["git", "status", "--porcelain"], environment=environment)[0])
    if reason:  # a copy without its history: whoever made it may say of what
        facts["revision"], facts["dirty"] = environment.get("LRK_REVISION", "unknown"), None
    facts |= {"python": sys.version.split()[0], "executable": sys.executable, "system": platform.platform()}
    facts |= {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    found, reason = smi()
    facts["before"] = found or reason
    probed = probe(state, end - time.monotonic() - 5)
    facts |= {name: value for name, value in probed.items() if name not in ("device", "torch_error")}
    facts["device"] = probed.get("device") or probed.get("torch_error", "torch is not installed")
    gpu(state, found, reason, probed)
    toolkit(state)
    packages(state, probed["modules"])
    facts["compute_sanitizer"] = shutil.which("compute-sanitizer", path=environment["PATH"]) or "not installed"
    for problem in machine.problems:
        state.notes.append(f"  {problem.text}")
        print(f"  {problem.text}", flush=True)
    seen = f"{facts['gpu']}, compute capability {facts['capability']}" if machine.has_gpu else "no GPU"
    return f"{seen}, torch {probed.get('torch', 'missing')}, nvcc {facts['nvcc_version'] or 'missing'}"


# ---------------------------------------------------------------------- build

BUILD = "import json, sys; from scikit_build_core import build; build.build_wheel(sys.argv[1], json.loads(sys.argv[2]))"
CHECK = (
    "import json; from lowrank_kernels import _native; c = _native._C; print(json.dumps([_native.__file__, "
    "_native.unavailable, _native.has_cuda(), getattr(c, 'cuda_architectures', ''), _native.cuda_info()['reason']]))"
)


def build_part(state: Run, limit: float) -> str:
    """The wheel by the build backend itself, which needs no pip, unpacked into build/gpu/site; .venv stays as it is."""
    end = time.monotonic() + limit
    log, site = state.log("build"), WORK / "site"
    architecture = state.machine.architecture
    settings = {"build-dir": "build/gpu/{wheel_tag}", "cmake.define.CMAKE_CUDA_ARCHITECTURES": architecture}
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        command = state.command("-c", BUILD, folder, json.dumps(settings))
        ended(run(command, log, state.environment | {"LRK_CUDA": "ON"}, limit), limit, log)
        (wheel,) = Path(folder).glob("*.whl")
        fresh = Path(folder) / "site"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(fresh)
        # An editable install in this Python would come first: an empty module takes the place of its finder.
        (fresh / "_editable_skbc_lowrank_kernels.py").touch()
        shutil.rmtree(site, ignore_errors=True)
        fresh.rename(site)
    paths = [str(site), state.environment.get("PYTHONPATH", "")]
    state.environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if "torch" not in state.machine.facts["modules"] and state.rehearse:
        return f"built for {architecture}; not imported: torch is missing"
    text, reason = output_of(state.command("-c", CHECK), max(10.0, end - time.monotonic()), state.environment)
    if reason:
        raise Failed(f"the built package does not import: {reason}")
    path, unavailable, has_cuda, built, no_gpu = json.loads(last_line(text))
    if not path.startswith(str(site)):
        raise Failed(f"another lowrank_kernels comes before the built one: {path}; uninstall it, or use another Python")
    if unavailable or not has_cuda:
        raise Failed(f"the built module has no CUDA kernels: {unavailable or 'see build.log'}")
    if no_gpu and state.machine.has_gpu:
        raise Failed(f"the built module cannot use the GPU: {no_gpu}")
    return f"for {built}"


# ---------------------------------------------------------------------- tests


def tests_part(state: Run, limit: float) -> str:
    log = state.log("tests")
    paths = ordered(list((ROOT / "tests").glob("test_*.py")))
    if state.rehearse:
        paths = [path for path in paths if path.name in REHEARSED]
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, 8)
    environment = state.environment | {"OMP_NUM_THREADS": str(max(2, cores // workers))}
    command = state.command("-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60")
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        files = [SuiteFile(path, Path(folder) / f"{path.stem}.log", Path(folder) / f"{path.stem}.xml") for path in paths]

        def save(_: SuiteFile | None = None) -> None:
            lines = [file.line() for file in files]
            logs = [file.log for file in files if file.complaint and file.log.exists()]
            outputs = [f"==== {path.stem}\n{path.read_text(encoding='utf-8', errors='replace')}" for path in logs]
            write(log, "\n".join([*lines, "", *outputs]))

        try:
            run_queue(files, command, environment, workers, limit, save)
        finally:
            save()
    shorten(log)
    total = {name: sum(file.counts.get(name, 0) for file in files) for name in ("passed", "failed", "skipped")}
    counted = ", ".join(f"{count} {name}" for name, count in total.items() if count) or "nothing ran"
    wrong = [f"{file.path.name} ({file.complaint})" for file in files if file.complaint]
    if state.machine.has_gpu:  # a GPU that the tests do not see would pass unnoticed
        idle = [f for f in files if f.path.stem.endswith("_cuda") and not f.complaint and not f.counts.get("passed")]
        wrong += [f"{file.path.name} (no test ran)" for file in idle]
    if wrong:
        raise Failed(f"{counted}; {', '.join(wrong)}")
    return f"{counted}, {len(files)} files"


# ---------------------------------------------------------------------- kernels, benches


def kernels_part(state: Run, limit: float) -> str:
    if not state.machine.has_gpu:
        raise Unavailable("no GPU")
    log = state.log("kernels")
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        command = state.command("tests/cuda_on_cpu/on_gpu.py", folder)
        try:
            code = run(command, log, state.environment, limit)
            ended(0 if code == NO_SANITIZER else code, limit, log)
            return last_line(log.read_text(encoding="utf-8", errors="replace"))
        finally:
            logs = [log, *sorted(Path(folder).glob("*.log"))]  # its own, the compiler's, compute-sanitizer's
            texts = [path.read_text(encoding="utf-8", errors="replace") for path in logs if path.exists()]
            write(log, "\n".join(texts))
            shorten(log)


def benches_part(state: Run, limit: float) -> str:
    log, rows = state.log("bench"), state.out / f"{state.machine.slug}.csv"
    before = rows.read_text(encoding="utf-8").count("\n") if rows.exists() else 0
    command = state.command("-m", "bench", "--only", *BENCHES, "--out", str(rows))
    if state.rehearse:
        command.append("--quick")
    command += ["--seconds", str(max(1, int(limit - 10)))]
    state.machine.facts["before_benches"] = smi()[0]
    try:
        code = run(command, log, state.environment, limit)
    finally:
        state.machine.facts["after_benches"] = smi()[0]
        shorten(log)
    new = (rows.read_text(encoding="utf-8").count("\n") if rows.exists() else 0) - before - (before == 0 and rows.exists())
    if new:
        text, reason = output_of(state.command("-m", "bench.plot", "--short", str(rows)), 60.0, state.environment)
        state.notes += [f"  {line}" for line in (text.splitlines() if not reason else [reason])[:40]]
    try:
        ended(code, limit, log)
    except Failed as reason:
        raise Failed(f"{new} rows; {reason}") from None
    if not new and state.machine.has_gpu:
        raise Failed("no row was measured")
    return f"{new} rows in {rows.name}" if new else "no row: no GPU"


# ---------------------------------------------------------------------- command

PARTS = (
    Part("environment", environment_part, 75, 420),
    Part("build", build_part, 200, 310),
    Part("tests", tests_part, 330, 265),
    Part("kernels", kernels_part, 130, 170),
    Part("benches", benches_part, 400, 20),
)


def terminate(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Terminated


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="everything ends within so many (default: %(default)g)")
    parser.add_argument("--rehearse", action="store_true", help="on a machine without a GPU: all the way, with little work")
    options = parser.parse_args(arguments)
    if sys.version_info < (3, 10):  # noqa: UP036  make takes whatever python3 is there
        print(f"Python >= 3.10 is needed, {sys.version.split()[0]} found: make gpu PYTHON=python3.11", file=sys.stderr)
        return 3
    if options.seconds <= 0:
        parser.error(f"--seconds must be positive, got {options.seconds:g}")
    options.out.mkdir(parents=True, exist_ok=True)
    state = Run(options.out.resolve(), options.seconds, options.rehearse)
    handlers = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGHUP)}
    interrupted = 0
    try:
        for part in PARTS:
            print(f"{part.name} ...", flush=True)
            begin = time.monotonic()
            try:
                result = run_part(part, state)
            except (KeyboardInterrupt, Terminated) as stopped:
                interrupted = 130 if isinstance(stopped, KeyboardInterrupt) else 143
                state.results.append(Result(part.name, "failed", time.monotonic() - begin, "interrupted"))
                break
            state.results.append(result)
            print(f"  {result.status}, {result.seconds:.0f} s: {result.detail}", flush=True)
            state.machine.facts["after"] = smi()[0]
            state.save()
    finally:
        stop(list(RUNNING.values()))
        state.save()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print(f"\n{state.summary()}", end="", flush=True)
    statuses = [result.status for result in state.results]
    if interrupted or "failed" in statuses:
        return interrupted or 1
    return 3 if "skipped" in statuses and not options.rehearse else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the calls of test_cuda_on_cpu.py on a GPU, by the same driver built with nvcc: `python tests/cuda_on_cpu/on_gpu.py OUT`.

The outputs obey the same checks; then a few calls run under compute-sanitizer's memcheck and racecheck. One line a step, logs
in OUT, nothing is downloaded. Exit status: 0 all is well, 1 something is wrong, 3 there is no nvcc, 4 there is no GPU, 5 all is
well but compute-sanitizer is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cuda_on_cpu import driver  # noqa: E402
from cuda_on_cpu.bugs import RUNS as FEW  # noqa: E402
from cuda_on_cpu.calls import RUNS, CompletionRun, ThreeFactorRun  # noqa: E402

RIGHT, WRONG, NO_COMPILER, NO_GPU, NO_SANITIZER = 0, 1, 3, 4, 5
SANITIZER_SECONDS = 100  # a tool that takes longer is stopped, and that is an error


def say(step: str, what: str) -> None:
    print(f"{step:22} {what}", flush=True)


def find(tool: str) -> str | None:
    """A tool of the CUDA toolkit: on the PATH, beside the compiler that CUDACXX names, or where toolkits are installed."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + ["/usr/local/cuda"]
    places = [Path(folder) / "bin" for folder in folders] + [Path(folder) / "compute-sanitizer" for folder in folders]
    if os.environ.get("CUDACXX"):
        places.insert(0, Path(os.environ["CUDACXX"]).parent)
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(map(str, places)))


def architecture() -> tuple[str, str]:
    """The first GPU's compute capability as nvcc names it, or empty and why there is none."""
    command = [find("nvidia-smi") or "nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi did not run: {error}"
    if done.returncode != 0 or not done.stdout.strip():
        return "", f"nvidia-smi lists none: {(done.stdout + done.stderr).strip().splitlines()[0:1]}"
    capability, _, name = done.stdout.strip().splitlines()[0].partition(",")
    return capability.strip().replace(".", ""), name.strip()


def build(nvcc: str, target: str, out: Path) -> tuple[Path, Path]:
    """The driver and the self test for one architecture, with source lines for compute-sanitizer."""
    flags = ["-std=c++17", "-O3", "-lineinfo", f"-DLRK_FUSED_BYTES={driver.FUSED_BYTES}", f"-I{driver.CSRC}", f"-I{HERE}"]
    flags += [f"-gencode=arch=compute_{target},code=sm_{target}", "-Werror=all-warnings", "-x=cu"]
    binaries = out / "driver", out / "self_test"
    kernels = [driver.CSRC / name for name in driver.KERNELS]
    for binary, sources in zip(binaries, ([HERE / "driver.cpp", *kernels], [HERE / "self_test.cu"]), strict=True):
        command = [nvcc, *flags, *map(str, sources), "-o", str(binary)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (out / f"build-{binary.name}.log").write_text(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed, see {out / f'build-{binary.name}.log'}")
    return binaries


def check(runs: Sequence[CompletionRun | ThreeFactorRun], results: driver.Results) -> list[str]:
    wrong = []
    for run in runs:
        try:
            run.check(results.outputs[str(run)])
        except AssertionError as error:
            wrong.append(str(error))
    return wrong


def run_calls(binary: Path, out: Path) -> list[str]:
    """What is wrong with the outputs of all calls; they run twice, in memory that held other numbers."""
    calls = [run.call() for run in RUNS]
    first, second = (driver.run(binary, calls, poison=poison) for poison in (0xFF, 0x3B))
    wrong = check(RUNS, first) + [f"{name} differs from run to run" for name in driver.differences(first, second)]
    (out / "calls.log").write_text("\n".join(wrong) + "\n")
    return wrong


def sanitize(tool: str, kind: str, binary: Path, out: Path) -> str:
    """What is wrong under one of compute-sanitizer's tools, or empty."""
    runs = [run for few in FEW.values() for run in few]
    log = out / f"{kind}.log"
    command = [tool, "--tool", kind, "--error-exitcode", "9", "--log-file", str(log), str(binary)]
    try:
        results = driver.run(command, [run.call() for run in runs], timeout=SANITIZER_SECONDS)
    except driver.Failure as failure:
        with log.open("a") as file:
            file.write(failure.stderr)
        return f"status {failure.returncode} in {failure.call}, see {log}"
    except subprocess.TimeoutExpired:
        return f"did not end within {SANITIZER_SECONDS} s, see {log}"
    return "; ".join(check(runs, results))


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(__doc__)
        return 2
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    nvcc = find("nvcc")
    if nvcc is None:
        say("kernels: nvcc", "not found on the PATH, in CUDA_HOME or in /usr/local/cuda: nothing was run")
        return NO_COMPILER
    target, device = architecture()
    if not target:
        say("kernels: GPU", f"none: {device}; nothing was run")
        return NO_GPU
    start = time.monotonic()
    try:
        binary, self_test = build(nvcc, target, out)
    except RuntimeError as error:
        say("kernels: build", str(error))
        return WRONG
    say("kernels: build", f"sm_{target}, {device}, {time.monotonic() - start:.0f} s")

    status = RIGHT
    done = subprocess.run([self_test], capture_output=True, text=True, timeout=100, check=False)
    say("kernels: self test", (done.stdout + done.stderr).strip().replace("\n", "; "))
    status = WRONG if done.returncode else status
    try:
        wrong = run_calls(binary, out)
    except driver.Failure as failure:
        (out / "calls.log").write_text(str(failure))
        wrong = [str(failure).replace("\n", " ")]
    say("kernels: calls", f"{len(RUNS)}, twice: {len(wrong)} wrong{': ' + wrong[0][:200] if wrong else ''}")
    status = WRONG if wrong else status

    tool = find("compute-sanitizer")
    if tool is None:
        say("kernels: sanitizer", "compute-sanitizer is not installed: memcheck and racecheck were not run")
        return NO_SANITIZER if status == RIGHT else status
    for kind in ("memcheck", "racecheck"):
        start = time.monotonic()
        wrong_here = sanitize(tool, kind, binary, out)
        say(f"kernels: {kind}", wrong_here or f"nothing found, {time.monotonic() - start:.0f} s")
        status = WRONG if wrong_here else status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

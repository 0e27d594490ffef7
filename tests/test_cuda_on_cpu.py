"""The CUDA kernels on a CPU: their unchanged source under adversarial schedules and sanitizers, and seeded bugs."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # tests/ is no package

from cuda_on_cpu import bugs, driver
from cuda_on_cpu.calls import COMPLETION_RUNS, RUNS, THREE_FACTOR_RUNS, CompletionRun, ThreeFactorRun

pytestmark = [
    pytest.mark.skipif(driver.COMPILER is None, reason="g++ is not installed: nothing to compile the kernels with"),
    pytest.mark.skipif(sys.platform != "linux", reason="guard pages and fibers are written for Linux"),
]
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="the sanitizers' fibers were tried on x86-64 only")

# Memory holds NaN before it is written, or ordinary numbers: nobody's results may depend on it.
POISONS = dict(zip(driver.SCHEDULES, (0xFF, 0x3B, 0xFF, 0x3B), strict=True))


def _pairs() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)


# ---------------------------------------------------------------------- the layer


@pytest.mark.parametrize("flavour", ["plain", pytest.param("asan", marks=x86_only)])
def test_primitives_obey_the_formulas(flavour: str) -> None:
    binary = driver.build_self_test(flavour)
    for schedule in driver.SCHEDULES if flavour == "plain" else ("ahead",):
        done = subprocess.run([binary, "--schedule", schedule], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stdout + done.stderr


MISTAKES = {
    "barrier-missed": r"deadlock, of 96 threads: 48 ended, 48 wait for the block at self_test\.cu:\d+",
    "barriers-mixed": r"__syncthreads under a condition: thread \d+ waits at self_test\.cu:\d+, thread \d+ at self_test",
    "warp-mixed": r"lanes \d+ and \d+ of a warp meet in different operations",
    "lane-outside-mask": r"lane \d+ reads lane 20, which the mask leaves out",
    "caller-outside-mask": r"whose mask leaves out the caller",
    "copy-misaligned": r"misaligned cp\.async \(global\): the address is 4 bytes after a multiple of 16",
    "matrix-misaligned": r"misaligned ldmatrix: the address is 4 bytes after a multiple of 16",
    "past-the-end": r"past the end of numbers \(380 bytes\)",
    "before-the-start": r"before the start of numbers \(380 bytes\)",
    "input-written": r"inside numbers \(384 bytes\)",
    "past-shared": r"past the end of shared memory \(380 bytes\)",
    "slack-written": r"overwrote a byte 0 past the end of numbers \(380 bytes\)",
    "shared-slack-written": r"overwrote a byte 0 past the end of shared memory \(380 bytes\)",
    "shared-not-allowed": r"50176 bytes of shared memory were not allowed",
    "shared-too-large": r"102400 bytes of shared memory are more than every GPU has",
    "block-too-large": r"invalid block of 1025 threads",
    "grid-empty": r"invalid grid 0 x 1 x 1",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported(mistake: str) -> None:
    binary = driver.build_self_test("plain")
    for schedule in ("random", "ahead"):
        done = subprocess.run([binary, "--schedule", schedule, mistake], capture_output=True, text=True, check=False)
        assert done.returncode == 3
        assert re.search(MISTAKES[mistake], done.stderr), done.stderr


# ---------------------------------------------------------------------- every kernel, every case, every schedule


@pytest.fixture(scope="module")
def results() -> dict[str, driver.Results]:
    """Of every schedule, two processes side by side."""
    binary = driver.build("plain")
    calls = [run.call() for run in RUNS]

    def one(schedule: str) -> driver.Results:
        return driver.run(binary, calls, schedule, seed=len(schedule), poison=POISONS[schedule])

    with _pairs() as pool:
        return dict(zip(driver.SCHEDULES, pool.map(one, driver.SCHEDULES), strict=True))


def test_all_kernels_ran(results: dict[str, driver.Results]) -> None:
    for schedule, result in results.items():
        assert not [name for name, launches in result.kernels.items() if launches == 0], schedule
    names = results["forward"].kernels
    assert {re.sub("<.*", "", name) for name in names} == {
        re.sub(r".*\b(\w+_kernel)\(.*", r"\1", line)
        for source in (*driver.CSRC.glob("*.cu"), *driver.CSRC.glob("*.cuh"))
        for line in re.findall(r"\b\w+_kernel\((?:const|Prologue)[^;{]*\{", source.read_text())
    }
    for kernel in ("shrink", "expand", "outer"):
        ranks = {int(rank) for name in names for rank in re.findall(rf"{kernel}_kernel<[^,]*, (\d+)", name)}
        assert ranks == {16, 32, 64, 128, 256}, kernel


def test_results_do_not_depend_on_the_schedule(results: dict[str, driver.Results]) -> None:
    first = results["random"]
    different = {schedule: driver.differences(first, other) for schedule, other in results.items()}
    assert different == {schedule: [] for schedule in driver.SCHEDULES}


@pytest.mark.parametrize("run", COMPLETION_RUNS, ids=str)
def test_completion(run: CompletionRun, results: dict[str, driver.Results]) -> None:
    run.check(results["random"].outputs[str(run)])


@pytest.mark.parametrize("run", THREE_FACTOR_RUNS, ids=str)
def test_three_factor(run: ThreeFactorRun, results: dict[str, driver.Results]) -> None:
    run.check(results["random"].outputs[str(run)])


# ---------------------------------------------------------------------- sanitizers


def _few() -> list[CompletionRun | ThreeFactorRun]:
    """The cheapest run, by what a fiber costs, of every width of completion, type, padded rank and way through three_factor."""
    groups: dict[object, list[tuple[int, CompletionRun | ThreeFactorRun]]] = {}
    for run in RUNS:
        case = run.case
        if case.dtype == torch.float16:  # the templates of bfloat16
            continue
        if isinstance(run, CompletionRun):
            size = case.count * case.k + 50 * (case.m + case.n)
            segments = run.long_row < 100 and case.pattern != "uniform"
            key: object = (case.dtype, segments, min(max(case.k - 1, 0) // 16, 3), case.k > 128)
        else:
            tensor = case.dtype.itemsize == 2 and case.n % 8 == case.m % 8 == 0 and run.x_gap % 8 == run.shift == 0
            if min(case.n, case.m, run.tokens) < 2 or run.wanted != (True, True, True, True):
                continue
            width = max(16, 1 << (case.k - 1).bit_length()) if tensor else 0
            fused = tensor and 2 * run.tokens * case.m > driver.FUSED_BYTES
            depth = case.depth or 0
            size = (case.k + 32) * (case.n + case.m + 16) * max(run.tokens, 64) + depth * case.k**3 // 8
            key = (case.dtype, width, fused and width == 16, depth > 0 and width <= 64)
        groups.setdefault(key, []).append((size, run))
    return [min(group, key=lambda pair: pair[0])[1] for group in groups.values()]


@pytest.fixture(scope="module")
def sanitized() -> dict[str, Path]:
    with _pairs() as pool:
        return dict(
            zip(("asan", "tsan"), pool.map(lambda flavour: driver.build(flavour, jobs=1), ("asan", "tsan")), strict=True)
        )


@x86_only
def test_address_sanitizer_finds_nothing(sanitized: dict[str, Path]) -> None:
    binary = sanitized["asan"]
    calls = [run.call() for run in _few()]
    with _pairs() as pool:
        list(pool.map(lambda part: driver.run(binary, part[0], part[1]), ((calls[::2], "ahead"), (calls[1::2], "reverse"))))


@x86_only
def test_thread_sanitizer_finds_nothing(sanitized: dict[str, Path]) -> None:
    binary = sanitized["tsan"]
    calls = [run.call() for run in _few() if run.case.dtype != torch.float64]
    with _pairs() as pool:
        list(pool.map(lambda part: driver.run(binary, part[0], part[1]), ((calls[::2], "ahead"), (calls[1::2], "forward"))))


# ---------------------------------------------------------------------- seeded bugs


@pytest.fixture(scope="module")
def caught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[set[str], str]]:
    """What sees each bug; the reduced kernels without a bug are right."""
    folder = tmp_path_factory.mktemp("bugs")

    def one(bug: bugs.Bug | None) -> tuple[set[str], str]:
        if bug is None:
            binary = bugs.build(None, folder)
            return bugs.catch(binary, [run for runs in bugs.RUNS.values() for run in runs], "quick")
        return bugs.catch(bugs.build(bug, folder), bugs.runs_of(bug), bug.flavour, bug.means)

    listed = [None, *bugs.BUGS]
    driver.build("plain")  # the parts that no bug is in, once
    with _pairs() as pool:
        return dict(zip(map(str, listed), pool.map(one, listed), strict=True))


def test_reduced_kernels_without_a_bug_are_right(caught: dict[str, tuple[set[str], str]]) -> None:
    assert caught["None"] == (set(), "")


@x86_only
@pytest.mark.parametrize("bug", bugs.BUGS, ids=str)
def test_bug_is_caught(bug: bugs.Bug, caught: dict[str, tuple[set[str], str]]) -> None:
    seen, messages = caught[str(bug)]
    assert bug.means in seen, f"seen by {sorted(seen) or 'nothing'}\n{messages}"

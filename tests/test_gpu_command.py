"""``make gpu``: what it says of a machine, its limits, its queue of test files, and that one failing part stops no other."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="bench/ is not at hand: not a source checkout")

H200 = {"name": "NVIDIA H200", "capability": [9, 0], "memory": 150_000_000_000, "multiprocessors": 132, "l2_bytes": 62_914_560}
MODULES = dict.fromkeys(("torch", "numpy", "safetensors", "pytest", "pybind11", "scikit_build_core", "cmake", "ninja"), "1.0")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("bench.gpu")


@pytest.fixture
def children(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("bench.children")


def tool(path: Path, output: str, status: int = 0) -> Path:
    """A program that prints this and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return path


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.02)


def fake(gpu: ModuleType, name: str, work: Callable[..., str], at_most: float = 60, keeps: float = 0) -> Any:
    return gpu.Part(name, work, at_most, keeps)


# ---------------------------------------------------------------------- the command


def test_standard_library_only() -> None:
    """It runs on a machine where nothing is built."""
    for name in ("gpu", "children", "__init__"):
        tree = ast.parse((ROOT / "bench" / f"{name}.py").read_text())
        found = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        found += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
        assert {module.split(".")[0] for module in found} <= sys.stdlib_module_names | {"__future__"}


def test_no_gpu_is_said_and_everything_ends(tmp_path: Path) -> None:
    """The whole command, where torch sees no GPU and nvidia-smi is a program that finds none."""
    smi = tool(tmp_path / "bin" / "nvidia-smi", "No devices were found", 6)
    environment = os.environ | {"PATH": f"{smi.parent}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "no GPU: nvidia-smi: No devices were found; torch: " in done.stdout
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.stdout.endswith(summary), "the table is the last thing printed"
    for part in ("build", "tests", "kernels", "benches"):
        assert f"  {part:<12} skipped" in summary
    facts = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert facts["problems"]
    assert facts["revision"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"environment.json", "summary.txt"}


def test_a_failing_part_stops_no_other(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def wrong(state: Any, limit: float) -> str:
        raise gpu.Failed("exit status 7: it broke")

    def mistaken(state: Any, limit: float) -> str:
        raise KeyError("oops")

    def absent(state: Any, limit: float) -> str:
        raise gpu.Unavailable("no such tool")

    works = {"one": wrong, "two": mistaken, "three": absent, "four": lambda state, limit: "all well"}
    monkeypatch.setattr(gpu, "PARTS", tuple(fake(gpu, name, work) for name, work in works.items()))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["one", "failed"],
        ["two", "failed"],
        ["three", "skipped"],
        ["four", "passed"],
    ]
    assert "it broke" in lines[1]
    assert "KeyError: 'oops'" in lines[2]
    assert "no such tool" in lines[3]
    assert capsys.readouterr().out.endswith("\n".join(lines) + "\n")
    monkeypatch.setattr(gpu, "PARTS", gpu.PARTS[2:])
    assert gpu.main(["--out", str(tmp_path)]) == 3
    assert gpu.main(["--out", str(tmp_path), "--rehearse"]) == 0
    monkeypatch.setattr(gpu, "PARTS", gpu.PARTS[1:])
    assert gpu.main(["--out", str(tmp_path)]) == 0


def test_without_a_build_there_is_nothing_to_test(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(state: Any, limit: float) -> str:
        raise gpu.Failed("a compiler error")

    names = ("build", "tests", "kernels", "benches")
    works = [wrong] + [lambda state, limit: "ran"] * 3
    monkeypatch.setattr(gpu, "PARTS", tuple(fake(gpu, name, work) for name, work in zip(names, works, strict=True)))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "environment.json").read_text())["parts"]
    assert [part["status"] for part in parts] == ["failed", "skipped", "passed", "skipped"]


def test_every_part_leaves_the_later_ones_their_time(gpu: ModuleType, tmp_path: Path) -> None:
    given: dict[str, float] = {}

    def work(name: str) -> Callable[..., str]:
        def note(state: Any, limit: float) -> str:
            given[name] = limit
            state.began -= limit  # all of it is used up
            return ""

        return note

    state = gpu.Run(tmp_path)
    for part in gpu.PARTS:
        assert gpu.run_part(gpu.Part(part.name, work(part.name), part.at_most, part.keeps), state).status == "passed"
    assert given["benches"] > 149
    assert given["tests"] > 30
    assert sum(given.values()) < gpu.SECONDS - 15
    late = gpu.Run(tmp_path, seconds=0.001)
    assert gpu.run_part(gpu.PARTS[0], late).detail == "no time is left"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"])
def test_an_interrupted_run_keeps_what_it_has_and_stops_its_children(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    child = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(60)"
    script = f"""
import sys
from bench import gpu
def slow(state, limit):
    gpu.run([sys.executable, "-c", {child!r}], state.log("slow"), state.environment, limit)
    return ""
gpu.PARTS = (gpu.Part("first", lambda state, limit: "done", 60, 0), gpu.Part("second", slow, 60, 0))
sys.exit(gpu.main(["--out", {str(tmp_path / "out")!r}]))
"""
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(tmp_path / "pid")
    run.send_signal(number)
    output, _ = run.communicate(timeout=30)
    assert run.returncode == status, output
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "first        passed" in summary
    assert "second       failed" in summary
    assert "interrupted" in summary
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# ---------------------------------------------------------------------- what it says of a machine


def refusals(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, nvcc: str = "13.0", **probed: Any
) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """The environment part on a machine with an H200 but for what is given: problem -> parts that cannot run."""
    facts = {"modules": MODULES, "driver_cuda": 13000, "torch": "2.11", "torch_cuda": "13.0", "device": H200} | probed
    monkeypatch.setattr(gpu, "probe", lambda state, limit: facts)
    compiler = tool(tmp_path / "bin" / "nvcc", f"Cuda compilation tools, release {nvcc}, V{nvcc}.88") if nvcc else ""
    monkeypatch.setattr(gpu, "find_nvcc", lambda environment: str(compiler))
    state = gpu.Run(tmp_path)
    gpu.environment_part(state, 30.0)
    return state, {problem.text: problem.parts for problem in state.machine.problems}


ALL = ("build", "tests", "kernels", "benches")


def test_a_machine_that_has_everything(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state, problems = refusals(gpu, monkeypatch, tmp_path)
    assert not problems
    assert state.machine.architecture == "90a-real"
    assert state.machine.slug == "nvidia-h200"
    assert state.machine.facts["nvcc_version"] == "13.0"
    assert state.environment["CUDACXX"].endswith("nvcc")
    assert str(tmp_path / "bin") in state.environment["PATH"].split(os.pathsep)


@pytest.mark.parametrize(
    ("machine", "complaint", "parts"),
    [
        ({"nvcc": ""}, "nvcc is not installed: install the CUDA toolkit", ALL),
        ({"nvcc": "11.5"}, "nvcc 11.5 (", ALL),
        ({"driver_cuda": 12040}, "the driver is older than the toolkit: it serves CUDA 12, nvcc is 13.0", ALL),
        ({"device": H200 | {"name": "T4", "capability": [7, 5]}}, "T4 has compute capability 7.5, the kernels need 8.0", ALL),
        ({"torch_error": "CUDA error 803"}, "torch cannot use the GPU: CUDA error 803", ("tests", "benches")),
    ],
    ids=["no nvcc", "old nvcc", "old driver", "old GPU", "torch"],
)
def test_a_machine_that_lacks_something(
    gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    machine: dict[str, Any],
    complaint: str,
    parts: tuple[str, ...],
) -> None:
    _, problems = refusals(gpu, monkeypatch, tmp_path, **machine)
    assert len(problems) == 1
    ((text, stopped),) = problems.items()
    assert text.startswith(complaint)
    assert stopped == parts


@pytest.mark.parametrize(
    ("missing", "listed", "parts"),
    [
        ({"pytest"}, "pytest", ("tests",)),
        ({"numpy", "pytest"}, "numpy, pytest", ("tests", "benches")),
        ({"pybind11", "scikit_build_core"}, "pybind11, scikit-build-core", ("build", "tests", "benches")),
    ],
    ids=["pytest", "numpy", "pybind11"],
)
def test_missing_packages_are_named_at_once(
    gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    missing: set[str],
    listed: str,
    parts: tuple[str, ...],
) -> None:
    modules = {name: version for name, version in MODULES.items() if name not in missing}
    _, problems = refusals(gpu, monkeypatch, tmp_path, modules=modules)
    command = f"python -m pip install {listed.replace(',', '')}"
    assert problems == {f"these packages are missing: {listed} ({command})": parts}


def test_a_gpu_is_built_for_by_its_own_architecture(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for capability, wanted in (([8, 6], "86-real"), ([9, 0], "90a-real"), ([12, 0], "120-real")):
        state, _ = refusals(gpu, monkeypatch, tmp_path, device=H200 | {"capability": capability})
        assert state.machine.architecture == wanted


def test_a_torch_that_crashes_is_a_reason(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    state = gpu.Run(tmp_path, environment=os.environ | {"PYTHONPATH": str(tmp_path)})
    facts = gpu.probe(state, 30.0)
    assert "torch" in facts["modules"]
    assert facts["torch_error"]


def test_nvidia_smi_is_read_by_its_columns(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = [f"value of {name}" for name in gpu.SMI_FIELDS]
    tool(tmp_path / "nvidia-smi", ", ".join(cells))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpus, reason = gpu.smi()
    assert not reason
    assert gpus == [dict(zip(gpu.SMI_FIELDS, cells, strict=True))]
    tool(tmp_path / "nvidia-smi", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver", 9)
    assert gpu.smi()[1].startswith("nvidia-smi: NVIDIA-SMI has failed")


# ---------------------------------------------------------------------- processes and the queue of test files


def test_a_child_that_will_not_end_is_stopped_with_its_own_children(children: ModuleType, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    command = ["sh", "-c", f"trap '' TERM; sh -c 'trap \"\" TERM; echo $$ > {pid}; sleep 60' & sleep 60"]
    process = children.start(command, tmp_path / "log", dict(os.environ))
    wait_for(pid)
    begin = time.monotonic()
    children.stop([process])
    assert 2 < time.monotonic() - begin < 30

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{int(pid.read_text())}/stat").read_text().split()[2] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    end = time.monotonic() + 10  # a killed grandchild is not ours to wait for
    while not is_gone() and time.monotonic() < end:
        time.sleep(0.02)
    assert is_gone()


def test_a_limit_is_kept_and_a_status_told(children: ModuleType, tmp_path: Path) -> None:
    log, environment = tmp_path / "log", dict(os.environ)
    assert children.run(["sleep", "60"], log, environment, 0.2) is None
    assert children.run(["sh", "-c", "echo said; exit 7"], log, environment, 60.0) == 7
    with pytest.raises(children.Failed, match=r"^exit status 7: said$"):
        children.ended(7, 60.0, log)
    with pytest.raises(children.Failed, match=r"^not done after 3 s$"):
        children.ended(None, 3.0, log)


def test_a_long_log_keeps_its_head_and_tail(children: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("head" + "x" * 5000 + "tail")
    children.shorten(log, 1000)
    text = log.read_text()
    assert text.startswith("head")
    assert text.endswith("tail")
    assert len(text) < 1100


def test_order_of_the_files(children: ModuleType) -> None:
    names = ["test_a.py", "test_completion_op.py", "test_three_factor_cuda.py", "test_completion_cuda.py", "test_nn.py"]
    ordered = [path.name for path in children.ordered([Path(name) for name in names])]
    assert ordered == [names[3], names[2], names[1], names[4], names[0]]


FILES = {
    "test_good.py": "import pytest\ndef test_one(): pass\n@pytest.mark.skip(reason='not today')\ndef test_two(): pass\n",
    "test_bad.py": "def test_one(): assert 1 == 2\n",
    "test_broken.py": "import no_such_module_anywhere\n",
    "test_crash.py": "import os\ndef test_one(): os.abort()\n",
    "test_optional.py": "import pytest\npytest.importorskip('no_such_module_anywhere')\n",
    "test_some_cuda.py": "import pytest\npytest.importorskip('no_such_module_anywhere')\n",
    "test_slow.py": "import time\ndef test_one(): time.sleep(60)\n",
}


@pytest.mark.parametrize(("status", "passes"), [(0, True), (5, True), (1, False)], ids=["right", "no-sanitizer", "wrong"])
def test_kernels_pass_without_a_sanitizer_and_bring_their_logs(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, passes: bool
) -> None:
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    script = tmp_path / "on_gpu"
    script.write_text(f"#!/bin/sh\necho details > $1/memcheck.log\necho kernels: the last step\nexit {status}\n")
    script.chmod(0o755)
    state = gpu.Run(tmp_path)
    state.machine.has_gpu = True
    monkeypatch.setattr(state, "command", lambda _, folder: [str(script), folder])
    if passes:
        assert gpu.kernels_part(state, 20.0) == "kernels: the last step"
    else:
        with pytest.raises(importlib.import_module("bench.children").Failed, match="exit status 1: kernels: the last step"):
            gpu.kernels_part(state, 20.0)
    assert (tmp_path / "kernels.log").read_text().split("\n") == ["kernels: the last step", "", "details", ""]


@pytest.fixture
def suite(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """A project whose test files are those named of FILES."""

    def build(*names: str) -> Any:
        (tmp_path / "tests").mkdir()
        for name in names:
            (tmp_path / "tests" / name).write_text(FILES[name])
        monkeypatch.setattr(gpu, "ROOT", tmp_path)
        monkeypatch.setattr(gpu, "WORK", tmp_path)
        return gpu.Run(tmp_path)

    return build


def test_the_suite_as_a_queue_of_files(gpu: ModuleType, suite: Callable[..., Any], tmp_path: Path) -> None:
    state = suite("test_good.py", "test_bad.py", "test_broken.py", "test_crash.py", "test_optional.py")
    with pytest.raises(gpu.Failed) as failed:
        gpu.tests_part(state, 120.0)
    text = str(failed.value)
    assert text.startswith("1 passed, 2 failed, 2 skipped; ")
    assert "test_bad.py (1 failed)" in text
    assert "test_broken.py (1 failed)" in text
    assert "test_crash.py (ended with SIGABRT and no report)" in text
    assert "good" not in text
    assert "optional" not in text
    log = (tmp_path / "tests.log").read_text()
    assert "test_good.py: 1 passed, 1 skipped, " in log
    assert "skipped 1: not today" in log
    assert "assert 1 == 2" in log
    assert "No module named 'no_such_module_anywhere'" in log


def test_files_that_are_not_finished_are_named(gpu: ModuleType, suite: Callable[..., Any], tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(gpu.Failed, match=r"^nothing ran; test_slow.py \(not finished\)$"):
        gpu.tests_part(suite("test_slow.py"), 1.0)
    assert time.monotonic() - begin < 30
    assert "test_slow.py: FAILED: not finished" in (tmp_path / "tests.log").read_text()


def test_gpu_files_that_skip_everything_on_a_gpu_fail(gpu: ModuleType, suite: Callable[..., Any]) -> None:
    state = suite("test_some_cuda.py")
    assert gpu.tests_part(state, 60.0) == "1 skipped, 1 files"
    state.machine.has_gpu = True
    with pytest.raises(gpu.Failed, match=r"test_some_cuda.py \(no test ran\)"):
        gpu.tests_part(state, 60.0)

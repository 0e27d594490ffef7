"""``make wheel`` and ``make sdist``.

    python -m release.wheel           build, repair, audit; then test in a clean environment outside the sources; into dist/
    python -m release.wheel --sdist   the sdist into dist/, which must build back into the same CPU wheel where there is no nvcc

``LRK_CUDA=OFF`` builds without CUDA, ``ON`` insists on it. Build folders stay in build/release and the tree is built with the
pinned tools that are here, so a second run compiles what changed only; the sdist is built as pip would, in isolation. The
environment of the tests is made anew each time.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from . import audit

ROOT = audit.ROOT
WORK, DIST = ROOT / "build" / "release", ROOT / "dist"
BIN = Path(sys.executable).parent
# The tests of an installed package: they read no source and cover what meets torch's internals: kernels, ops, layers,
# optimizers. What is built on those (estimators, solvers, whole models) takes far longer and is tested in the checkout.
SUITE = (
    "test_doctor", "test_nn", "test_optim", "test_entries", "test_completion_op", "test_completion_graphs",
    "test_three_factor_op",
)  # fmt: skip
# What they import, and pytest's settings.
SHARED = "tests/conftest.py", "tests/completion_checks.py", "tests/workers.py", "pyproject.toml"
TEST_REQUIREMENTS = "scipy", "scikit-learn", "pytest"
# Where other programs run beside the tests, threads that wait by spinning double their time.
TEST_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "LRK_EXPECT_NATIVE": "1"}


def run(*command: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> None:
    """Run a command, shown; the tools of this environment come first on the PATH, and pins hold for what builds install."""
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    pins = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    status = subprocess.run(words, cwd=cwd, env={**os.environ, **path, **pins, **(environment or {})}, check=False).returncode
    if status:
        sys.exit(f"release: {' '.join(words[:4])} ... ended with status {status}")


def build(source: Path, kind: str, folder: Path, environment: dict[str, str] | None = None, isolated: bool = False) -> Path:
    """The wheel of a source tree; ``kind`` names its build folder, one for each way to configure."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    place = f"-Cbuild-dir={WORK / kind / sys.implementation.cache_tag}"
    how = [] if isolated else ["--no-isolation"]
    run(sys.executable, "-m", "build", "--wheel", *how, "--outdir", folder, place, source, environment=environment)
    return next(folder.glob("*.whl"))


def repair(wheel: Path) -> Path:
    """Give the wheel its platform tag; libgomp stays outside: torch has one, and two would be two pools of threads."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", folder, wheel)
        made = next(Path(folder).glob("*.whl"))
        DIST.mkdir(exist_ok=True)
        for old in DIST.glob(f"{made.name.partition('-manylinux')[0]}-*.whl"):
            old.unlink()
        return Path(shutil.move(made, DIST))


def audited(wheel: Path) -> None:
    if wrong := audit.complaints(wheel):
        sys.exit("\n".join(wrong))
    cuda = "with" if audit.Wheel.read(wheel).has_cuda else "without"
    print(f"audit of {wheel.name}: good, {wheel.stat().st_size:,} bytes, {cuda} CUDA", flush=True)


def test_files() -> list[Path]:
    return [ROOT / "tests" / f"{name}.py" for name in SUITE] + [ROOT / "release" / "test_installed.py"]


def copy_tests(folder: Path) -> list[str]:
    """The suite and what it needs into a folder outside the sources; the names of its files."""
    files = test_files()
    for path in (*files, *(ROOT / name for name in SHARED)):
        shutil.copy(path, folder)
    return [path.name for path in files]


def test(wheel: Path) -> None:
    """Install into a new environment, as pip does for users, and run the suite there."""
    with tempfile.TemporaryDirectory(prefix="lowrank-wheel-") as name:
        folder = Path(name)
        run(sys.executable, "-m", "venv", folder / "env")
        python = folder / "env" / "bin" / "python"
        run(
            python, "-m", "pip", "install", "-q", "torch"
        )  # first and alone: the pinned one, which is a CPU build where it exists
        run(python, "-m", "pip", "install", "-q", wheel, *TEST_REQUIREMENTS)
        files = copy_tests(folder)
        expected = {"LRK_EXPECT_CUDA": str(int(audit.Wheel.read(wheel).has_cuda)), **TEST_ENVIRONMENT}
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=folder, environment=expected)


def digests(wheel: Path) -> dict[str, str]:
    """Name -> hash; the native module, which may hold paths of its build, and RECORD, which has its hash, by name only."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: "" if name.endswith((".so", "/RECORD")) else hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
        }


def without_nvcc() -> dict[str, str]:
    """An environment with no nvcc anywhere: of the PATH, only the folders that have none."""
    entries = os.environ["PATH"].split(os.pathsep)
    path = [str(BIN), *(entry for entry in entries if not (Path(entry) / "nvcc").exists())]
    return {"PATH": os.pathsep.join(path), "LRK_CUDA": "OFF"}


def sdist() -> None:
    for old in DIST.glob("*.tar.gz"):
        old.unlink()
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, ROOT)
    archive = next(DIST.glob("*.tar.gz"))
    with tempfile.TemporaryDirectory(prefix="lowrank-sdist-") as name:
        folder = Path(name)
        with tarfile.open(archive) as content:
            content.extractall(folder / "source", filter="data")
        tree = next((folder / "source").iterdir())
        plain = without_nvcc()
        here = digests(build(ROOT, "cpu", folder / "here", {"LRK_CUDA": "OFF"}))
        back = digests(build(tree, "sdist", folder / "back", plain, isolated=True))
    differing = sorted(name for name in {*here, *back} if here.get(name) != back.get(name))
    if differing:
        sys.exit(f"{archive.name}: wanted the same wheel as from the tree, got a difference in {', '.join(differing)}")
    print(f"{archive.name}: good, {archive.stat().st_size:,} bytes, builds back into the same {len(here)} files without nvcc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", action="store_true", help="the sdist, and a wheel back from it")
    parser.add_argument("--list", action="store_true", help="the tests of an installed package, as arguments for pytest")
    parser.add_argument("--no-tests", action="store_true", help="stop after the audit")
    arguments = parser.parse_args()
    if arguments.list:
        print(*(path.relative_to(ROOT) for path in test_files()))
        return
    if arguments.sdist:
        sdist()
        return
    start = time.monotonic()
    kind = "cpu" if os.environ.get("LRK_CUDA") == "OFF" else "cuda"
    wheel = repair(build(ROOT, kind, WORK / "wheels" / kind))
    audited(wheel)
    if not arguments.no_tests:
        test(wheel)
    print(f"{wheel.relative_to(ROOT)} is good ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()

"""``make torch-matrix``: one wheel beside several versions of torch, each in its own environment, with the CPU tests.

    python -m release.torch_matrix [VERSION ...]     all of VERSIONS without arguments; rewrites docs/torch_versions.md

The wheel is that of `make wheel` in dist/. The first version is the floor of pyproject.toml, in an environment that has the
floor of every requirement. Environments stay in build/torch-matrix: CUDA builds of torch are gigabytes. A version that
cannot be installed gets a row with pip's reason; rows of versions that are not run stay as they are.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from . import audit
from .wheel import DIST, ROOT, TEST_ENVIRONMENT, copy_tests

PAGE = ROOT / "docs" / "torch_versions.md"
ENVIRONMENTS = ROOT / "build" / "torch-matrix"
VERSIONS = "2.4.0", "2.6.0", "2.13.0", "2.14.1", "2.15.0"
# The floors of pyproject.toml, and those of its extra [estimators], which the tests need.
FLOORS = "numpy==1.24.0", "safetensors==0.4.0", "scipy==1.10.0", "scikit-learn==1.4.0"
HEADER = "| torch | build | Python | numpy | wheel | OpenMP runtimes | tests | on |"
FACTS = """
import json, platform, sys, numpy, torch, lowrank_kernels
from lowrank_kernels import _native
maps = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}
own = sorted("torch's" if "/torch/" in path or "/torch.libs/" in path else "the system's" for path in maps)
build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
print(json.dumps([torch.__version__.split("+")[0], build, platform.python_version(), numpy.__version__, " and ".join(own)]))
"""


def run(*command: str | Path, cwd: Path = ROOT) -> tuple[int, str]:
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    environment = {**os.environ, **TEST_ENVIRONMENT}
    done = subprocess.run(
        words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def reason(said: str) -> str:
    """pip's first error, in one line of a table."""
    errors = [line for line in said.splitlines() if line.startswith("ERROR: ")]
    return (errors or said.splitlines()[-1:] or ["no reason given"])[0].removeprefix("ERROR: ").replace("|", "/")


def row(version: str, wheel: Path) -> str:
    """Install and run; a line of the table."""
    today = datetime.date.today().isoformat()
    folder = ENVIRONMENTS / version
    python = folder / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder)
    status, said = run(python, "-m", "pip", "install", "-q", f"torch=={version}")
    if status:
        return f"| {version} | | | | | | not installed: {reason(said)} | {today} |"
    others = FLOORS if version == VERSIONS[0] else ("numpy", "safetensors", "scipy", "scikit-learn")
    status, said = run(python, "-m", "pip", "install", "-q", *others, "pytest", f"torch=={version}")
    if not status:
        status, said = run(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", wheel)
    if not status:
        status, said = run(python, "-m", "pip", "check")
    if status:
        return f"| {version} | | | | | | not installed: {reason(said)} | {today} |"
    with tempfile.TemporaryDirectory(prefix="lowrank-torch-") as name:
        files = copy_tests(Path(name))
        _, log = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=Path(name))
        status, facts = run(python, "-W", "ignore", "-c", FACTS, cwd=Path(name))
    (ENVIRONMENTS / f"{version}.log").write_text(log)
    print(outcome(log), flush=True)
    if status:
        return f"| {version} | | | | {wheel.name} | | failed: {reason(facts)} | {today} |"
    torch, build, interpreter, numpy, openmp = json.loads(facts.splitlines()[-1])
    return f"| {torch} | {build} | {interpreter} | {numpy} | {wheel.name} | {openmp} | {outcome(log)} | {today} |"


def outcome(log: str) -> str:
    """pytest's last line without the time, and the names of what failed."""
    last = (log.splitlines() or ["no output"])[-1].strip("= ")
    failed = re.findall(r"^FAILED (\S+)", log, re.MULTILINE)
    return re.sub(r",? *\d+ warnings?| in [\d.]+s.*", "", last) + (f": {', '.join(failed)}" if failed else "")


def rows(text: str) -> dict[str, str]:
    """Version -> line of the table on the page."""
    return {match[1]: match[0] for match in re.finditer(r"^\| (\d+\.\d+\.\d+) \|.*$", text, re.MULTILINE)}


def floor() -> str:
    """The version of torch that pyproject.toml asks for at least."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return found[1] if found else ""


def main() -> None:
    if not (VERSIONS[0] + ".").startswith(floor() + "."):
        sys.exit(f"wanted the floor of pyproject.toml, torch {floor()}, as first of VERSIONS, got {VERSIONS[0]}")
    wheels = sorted(DIST.glob(f"lowrank_kernels-*-{sys.implementation.cache_tag.replace('cpython-', 'cp')}-*.whl"))
    if len(wheels) != 1 or audit.complaints(wheels[0]):
        sys.exit(f"wanted one good wheel for this Python in dist/, got {len(wheels)}: make wheel")
    before, _, after = PAGE.read_text().partition(HEADER)
    found = rows(after)
    for version in sys.argv[1:] or VERSIONS:
        found[version] = row(version, wheels[0])
        table = [found[key] for key in sorted(found, key=lambda key: tuple(map(int, key.split("."))))]
        PAGE.write_text("\n".join([before + HEADER, re.sub(r"[^|]+", "---", HEADER), *table]) + "\n")


if __name__ == "__main__":
    main()

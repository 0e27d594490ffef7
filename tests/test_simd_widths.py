"""The CPU kernels at every vector width, also those this processor has no instructions for (tests/native/)."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-ffp-contract=fast", "-fopenmp", "-Wno-psabi", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++ or clang++) to build the check with")
@pytest.mark.parametrize(
    ("stem", "width", "wanted"),
    [
        *(("completion", width, "160 passed, 0 failed") for width in (16, 32, 64)),
        # The shorter vectors of the three-factor op run in its own tests, on every processor.
        ("three_factor", 64, "260 passed, 0 failed, 0 conversions wrong"),
    ],
    ids=lambda value: str(value).split()[0],
)
def test_kernel_at_every_vector_width(stem: str, width: int, wanted: str, tmp_path: Path) -> None:
    binary = tmp_path / "widths"
    levels = ["-DLRK_SIMD_LEVEL=checked", f"-DLRK_VECTOR_BYTES={width}"]
    source = ROOT / "tests" / "native" / f"{stem}_widths.cpp"
    # The blocks of the three-factor kernel read past what they use: the sanitizer sees whether past the end of their memory.
    checks = ["-O1", *SANITIZERS] if stem == "three_factor" else ["-O2"]
    subprocess.run([str(COMPILER), *FLAGS, *checks, *levels, str(source), "-o", str(binary)], check=True)
    done = subprocess.run([str(binary)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{width}-byte vectors: {wanted}" in done.stdout

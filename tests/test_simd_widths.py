"""The CPU kernel at every vector width, also those this processor has no instructions for (tests/native/)."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++ or clang++) to build the check with")
@pytest.mark.parametrize("width", [16, 32, 64])
def test_completion_pass_at_every_vector_width(width, tmp_path):
    binary = tmp_path / "widths"
    flags = ["-std=c++17", "-O2", "-ffp-contract=fast", "-fopenmp", "-Wno-psabi", "-Wall", "-Wextra", "-Werror"]
    levels = ["-DLRK_SIMD_LEVEL=checked", f"-DLRK_VECTOR_BYTES={width}"]
    source = ROOT / "tests" / "native" / "completion_widths.cpp"
    subprocess.run([COMPILER, *flags, *levels, str(source), "-o", str(binary)], check=True)
    done = subprocess.run([str(binary)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{width}-byte vectors: 160 passed, 0 failed" in done.stdout

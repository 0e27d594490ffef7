"""The installed package as a user has it: no sources, no compiler, no network, an old processor.

Run in a clean environment by `make wheel`, `make torch-matrix` and the release, from outside the sources.
``LRK_EXPECT_NATIVE=1`` and ``LRK_EXPECT_CUDA=1`` or ``0`` say what the wheel must have.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowrank_kernels
from lowrank_kernels import _native

PACKAGE = Path(lowrank_kernels.__file__).parent
COMPLETION = """
import torch, lowrank_kernels as lrk
torch.manual_seed(0)
left, core, right = (torch.randn(*s, dtype=torch.float64) for s in ((9, 4), (1, 4, 4), (4, 7)))
entries = lrk.ObservedEntries.from_coo([0, 3, 8], [1, 6, 0], [1.0, -2.0, 0.5], shape=(9, 7), dtype=torch.float64)
native = lrk.ops.completion_loss(left, core, right, entries)
torch.testing.assert_close(native, lrk.reference.completion_loss(left, core, right, entries))
x, w = torch.randn(5, 7), (torch.randn(9, 4), torch.randn(1, 4, 4), torch.randn(4, 7))
torch.testing.assert_close(lrk.ops.three_factor_linear(x, None, *w), lrk.reference.three_factor_linear(x, None, *w))
"""


def output(*command: str, **environment: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def test_what_is_imported_is_what_was_installed() -> None:
    assert "site-packages" in PACKAGE.parts
    assert importlib.metadata.version("lowrank-kernels") == lowrank_kernels.__version__
    assert not [path for path in PACKAGE.rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh")]
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()


def test_the_native_module_is_there_and_of_this_version() -> None:
    assert _native.has_cpu() or os.environ.get("LRK_EXPECT_NATIVE") != "1", _native.unavailable
    if not _native.has_cpu():
        pytest.skip(_native.unavailable)
    assert _native._C.version == lowrank_kernels.__version__
    if expected := os.environ.get("LRK_EXPECT_CUDA"):
        assert _native._C.has_cuda == (expected == "1"), _native.cuda_reason()


def test_licences_are_installed() -> None:
    names = [path.name for path in importlib.metadata.files("lowrank-kernels") or [] if "licenses" in path.parts]
    assert {"LICENSE", "README.md", "pybind11.txt", "nvidia-cuda.txt", "gcc-runtime.txt"} <= set(names)


def test_one_pool_of_threads() -> None:
    """Every libgomp that is mapped belongs to torch or to the system; the native module brings none."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    paths = set(re.findall(r"(/\S*libgomp\S*)", maps.read_text()))
    assert not [path for path in paths if "lowrank" in path.lower().replace("lowrank-wheel-", "")]


def test_import_needs_neither_compiler_nor_network() -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('the import used the network')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        f"{COMPLETION}\nfrom lowrank_kernels import _native\nprint('native' if _native.has_cpu() else _native.unavailable)"
    )
    said = output(sys.executable, "-W", "error::UserWarning:lowrank_kernels", "-c", code, PATH="", CC="none", CXX="none")
    assert _native.has_cpu() == (said.splitlines()[-1] == "native"), said


def test_doctor_says_what_is_used() -> None:
    said = output(sys.executable, "-m", "lowrank_kernels", "doctor")
    assert re.search(r"lowrank_kernels +" + re.escape(lowrank_kernels.__version__), said), said
    assert re.search(rf"torch +{re.escape(torch.__version__)}", said), said
    if _native.has_cpu():
        assert re.search(rf"SIMD level +{_native._C.simd_level()} ", said), said
        assert re.search(rf"completion on cpu +native \({_native._C.simd_level()}\)", said), said
    script = Path(sys.executable).with_name("lowrank-kernels")
    assert script.exists()
    assert "completion on cpu" in output(str(script), "doctor")


@pytest.mark.parametrize(
    ("processor", "level"),
    [("Nehalem", "portable"), ("Haswell", "avx2")],  # neither AVX nor FMA; both, but no AVX-512
)
def test_an_older_processor(processor: str, level: str) -> None:
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("needs qemu-x86_64 (Debian's qemu-user)")
    if not _native.has_cpu():
        pytest.skip(_native.unavailable)
    code = f"{COMPLETION}\nfrom lowrank_kernels.doctor import print_report\nprint_report()"
    said = output(emulator, "-cpu", processor, sys.executable, "-c", code, OMP_NUM_THREADS="1")
    assert re.search(rf"SIMD level +{level} ", said), said
    assert re.search(rf"completion on cpu +native \({level}\)", said), said

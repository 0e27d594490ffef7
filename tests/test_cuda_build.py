"""The compiled module: what it links, that it loads without a CUDA driver, and that every kernel keeps to its registers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_kernels import _native

ROOT = Path(__file__).resolve().parent.parent

native = pytest.mark.skipif(not _native.has_cpu(), reason=f"no native module: {_native.unavailable}")
cuda_built = pytest.mark.skipif(not _native.has_cuda(), reason="the native module was built without CUDA")


def _needs(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return path


def _output(*command: str | Path) -> str:
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{' '.join(map(str, command))}\n{run.stdout}{run.stderr}"
    return run.stdout + run.stderr


# ---------------------------------------------------------------------- linking


@native
def test_module_needs_neither_torch_nor_cuda_libraries() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", _output(_needs("readelf"), "-d", _native._C.__file__))
    assert needed
    assert not [name for name in needed if re.match(r"lib(cuda|cudart|c10|torch)", name)], needed


@native
def test_module_uses_no_torch_symbol() -> None:
    symbols = _output(_needs("nm"), "-D", "-u", _native._C.__file__)
    assert not re.findall(r".*(?:c10|torch|at6Tensor|_ZN2at).*", symbols)


@native
def test_simd_objects_export_their_kernels_only() -> None:
    # A template of the standard library instantiated in an AVX-512 object is a weak symbol: the linker may choose that copy
    # for everybody, and an older processor then stops at an instruction it does not know.
    objects = sorted(ROOT.glob("build/*/CMakeFiles/lrk_cpu_avx*.dir/csrc/*.o"))
    if not objects:
        pytest.skip("the objects of the build are not in build/")
    for path in objects:
        symbols = re.findall(r"^\S+ ([VWu]) (\S+)$", _output(_needs("nm"), path), re.MULTILINE)
        assert not [name for _, name in symbols if not name.startswith("DW.ref.")], path


# ---------------------------------------------------------------------- loading


def _in_new_process(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@native
def test_import_without_a_gpu_reports_the_reason() -> None:
    code = "import json; from lowrank_kernels import _native; print(json.dumps(_native.cuda_info()))"
    info = json.loads(_in_new_process(code, CUDA_VISIBLE_DEVICES=""))
    assert info["device_count"] == 0
    assert info["reason"]
    assert (info["runtime_version"] > 0) == _native.has_cuda()


def test_cuda_info_without_the_native_module() -> None:
    code = "from lowrank_kernels import _native; print(_native.cuda_info()['reason'])"
    assert "LOWRANK_KERNELS_NATIVE=0" in _in_new_process(code, LOWRANK_KERNELS_NATIVE="0")


@native
def test_cuda_info_has_a_reason_exactly_where_there_is_no_gpu() -> None:
    info = _native.cuda_info()
    assert bool(info["reason"]) == (info["device_count"] == 0), info


@cuda_built
def test_pass_refuses_misaligned_rows_and_foreign_plans() -> None:
    def arguments(own: int, plan_size: int) -> object:  # addresses are not read: the checks come first
        return _native._C.CompletionArguments(
            1, 1, 1, 16, 16, 16, 16, 0, own, 16, 0, 0, 0.0, 16, plan_size, 0, 1024, 0, 16, 16, 16
        )

    with pytest.raises(ValueError, match="16-byte aligned"):
        _native._C.completion_cuda(False, False, arguments(own=20, plan_size=1), 0, 0, 0, 0)
    with pytest.raises(ValueError, match="planned for the CPU"):
        _native._C.completion_cuda(False, False, arguments(own=16, plan_size=3), 0, 0, 0, 0)
    with pytest.raises(ValueError, match="planned for CUDA"):
        _native._C.completion_cpu(False, False, arguments(own=16, plan_size=1), 0, 1)


@cuda_built
def test_launch_without_a_gpu_raises() -> None:
    if _native.cuda_info()["device_count"]:
        pytest.skip("there is a GPU: launches succeed")
    arguments = _native._C.CompletionArguments(1, 1, 1, 4, 16, 16, 16, 0, 16, 16, 0, 0, 0.0, 16, 1, 0, 1024, 0, 16, 16, 16)
    with pytest.raises(RuntimeError, match="completion_pass"):
        _native._C.completion_cuda(False, False, arguments, 16, 16, 0, 0)


# ---------------------------------------------------------------------- the machine code


def _cuobjdump() -> str:
    """The disassembler of the pip package nvidia-cuda-cuobjdump, or one on the PATH."""
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return next((str(file.locate()) for file in files if file.name == "cuobjdump"), "") or _needs("cuobjdump")


@cuda_built
def test_kernels_of_every_architecture_use_neither_stack_nor_local_memory() -> None:
    log = _output(_cuobjdump(), "--dump-resource-usage", _native._C.__file__)
    code = re.split(r"^arch = (sm_\d+a?)$", log, flags=re.MULTILINE)[1:]
    wanted = {f"sm_{name.removesuffix('-real')}" for name in _native._C.cuda_architectures.split(",") if "virtual" not in name}
    assert wanted
    assert wanted <= set(code[::2])
    for architecture, usage in zip(code[::2], code[1::2], strict=True):
        kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if architecture in wanted and "Function" in usage:
            assert kernels
        spilling = [name for name, _, stack, local in kernels if int(stack) or int(local)]
        assert not spilling, f"{architecture}: {spilling}"

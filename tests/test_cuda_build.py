"""The compiled module: what the build takes and refuses, what it links, that it loads without a CUDA driver, and that the
machine code of every kernel is what it was written for.

``python tests/test_cuda_build.py > tests/cuda_registers.txt`` writes the budget of registers anew.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from lowrank_kernels import _native

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = {"80", "86", "89", "90a", "100", "120"}

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


# ---------------------------------------------------------------------- configuring


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One build folder for all cases: the compiler is looked at once, and an answer of the last case must not stay."""
    return tmp_path_factory.mktemp("configure")


def _configure(folder: Path, cuda: str, nvcc: str | None) -> tuple[bool, str]:
    """Configure with an nvcc that only tells its version, or with none; success, and what was said, in one line."""
    cmake, pybind11 = _needs("cmake"), pytest.importorskip("pybind11", reason="the build needs pybind11")
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n[ $# = 1 ] && echo '{nvcc}'\n")
    path.chmod(0o755)
    run = subprocess.run(
        [
            *(cmake, "-G", "Unix Makefiles", "-S", ROOT, "-B", folder / "build"),
            *(f"-DLRK_CUDA={cuda}", f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={_needs('make')}"),
            *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DSKBUILD_PROJECT_VERSION=1", "-DSKBUILD_PROJECT_VERSION_FULL=1"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDACXX": str(folder / "no" if nvcc is None else path)},
        check=False,
    )
    return run.returncode == 0, " ".join((run.stdout + run.stderr).split())


def _release(version: str) -> str:
    return f"Cuda compilation tools, release {version.rpartition('.')[0]}, V{version}"


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        (None, "no CUDA compiler (nvcc) was found"),
        (_release("11.4.48"), "nvcc 11.4.48 is older than the 11.8 that the CUDA sources need"),
        ("clang version 18.1.3", "the CUDA compiler that was found does not tell its version"),
        (_release("12.4.131"), "nvcc 12.4.131 failed to compile a test program"),
    ],
)
def test_without_a_usable_nvcc_on_is_an_error_and_auto_remembers_why(folder: Path, nvcc: str | None, reason: str) -> None:
    success, said = _configure(folder, "ON", nvcc)
    assert not success
    assert f"LRK_CUDA=ON but {reason}" in said, said
    assert "Install CUDA 11.8 or newer and set CUDACXX to its nvcc" in said
    assert "LRK_CUDA=OFF" in said
    success, said = _configure(folder, "AUTO", nvcc)
    assert success, said
    assert f"CUDA OFF (built without CUDA: {reason}" in said, said
    assert ("CMake Warning" in said) == (nvcc is not None)
    assert nvcc is None or str(folder / "nvcc") in said
    rules = (folder / "build" / "CMakeFiles" / "_C.dir" / "flags.make").read_text()
    assert f"built without CUDA: {reason.partition(' (')[0]}" in rules


@pytest.mark.parametrize(
    ("version", "architectures"),
    [
        ("11.8.89", "80-real;86-real;89-real;90a-real;90-virtual"),
        ("12.6.85", "80-real;86-real;89-real;90a-real;90-virtual"),
        ("12.8.61", "80-real;86-real;89-real;90a-real;100-real;120-real;120-virtual"),
        ("13.0.88", "80-real;86-real;89-real;90a-real;100-real;120-real;120-virtual"),
    ],
)
def test_every_architecture_that_nvcc_knows_is_built(folder: Path, version: str, architectures: str) -> None:
    said = _configure(folder, "ON", _release(version))[1]
    assert f"nvcc {version} ({folder / 'nvcc'}) for {architectures} " in said, said


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


def _cuda_tool(name: str) -> str:
    """The tool of the pip package nvidia-cuda-<name>, or the one on the PATH."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return next((str(file.locate()) for file in files if file.name == name), "") or _needs(name)


def _built() -> set[str]:
    """The architectures the module has machine code for, as it says itself."""
    return {name.removesuffix("-real") for name in _native._C.cuda_architectures.split(",") if "virtual" not in name}


@cache
def _resources() -> list[tuple[str, str, int, int, int, int]]:
    """Architecture, mangled kernel, registers, stack, static shared and local memory, by the assembler's report."""
    log = _output(_cuda_tool("cuobjdump"), "--dump-resource-usage", _native._C.__file__)
    code = re.split(r"^arch = sm_(\d+[af]?)$", log, flags=re.MULTILINE)[1:]
    usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [
        (architecture, name, int(registers), int(stack), int(shared), int(local))
        for architecture, text in zip(code[::2], code[1::2], strict=True)
        for name, registers, stack, shared, local in re.findall(usage, text)
    ]


@cache
def _names() -> dict[str, str]:
    """Mangled -> what a reader wants to know: without the types of indices, which change little; both 16-bit types alike."""
    mangled = sorted({row[1] for row in _resources()})
    names = {}
    for raw, name in zip(mangled, _output(_needs("c++filt"), *mangled).splitlines(), strict=True):
        kernel = re.search(r"(\w+_kernel)<([^(]*)>\(", name)
        assert kernel, f"a kernel's name ends in _kernel: {name}"
        arguments = [a for a in kernel[2].split(", ") if a not in ("int", "long")]
        types = {"__half": "16-bit", "__nv_bfloat16": "16-bit"}
        names[raw] = f"{kernel[1]}<{', '.join(types.get(a, a) for a in arguments)}>"
    return names


@cuda_built
def test_every_source_is_compiled_for_every_architecture_with_warnings_as_errors() -> None:
    sources = sorted(path.name for path in (ROOT / "csrc").glob("*.cu"))
    names = [row[:2] for row in _resources()]
    for architecture in _built():
        for source in sources:  # a kernel without a name outside its file has the file's in it
            assert any(a == architecture and source.replace(".", "_") in name for a, name in names), (architecture, source)
    folders = [path for path in ROOT.glob("build/cp*/build.ninja") if "CUDA_COMPILER" in path.read_text()]
    for path in folders:
        flags = re.findall(r"build \S+: CUDA_COMPILER\S* \S*/(\S+).*\n(?: .*\n)*?  FLAGS = (.*)", path.read_text())
        assert sorted(name for name, _ in flags) == sources
        assert all("-Werror=all-warnings" in text for _, text in flags)
    if "virtual" not in _native._C.cuda_architectures:
        pytest.skip(f"built for chosen architectures: {_native._C.cuda_architectures}")
    version = tuple(map(int, _native._C.cuda_version.split(".")[:2]))
    wanted = ARCHITECTURES if version >= (12, 8) else ARCHITECTURES - {"100", "120"}
    assert _built() == wanted, "an old build folder remembers other ones: rm -r build, then install again"


@cuda_built
def test_kernels_of_every_architecture_use_neither_stack_nor_local_memory() -> None:
    assert {row[0] for row in _resources()} >= _built()
    for architecture, name, _, stack, shared, local in _resources():
        where = f"{architecture}: {_names()[name]}"
        assert stack == local == 0, where
        assert shared <= 1024, f"{where}: only what sm_90 and newer reserve; kernels take theirs at the launch"


# ---- registers

BUDGET = Path(__file__).with_name("cuda_registers.txt")
UPDATE = "if that is meant: python tests/test_cuda_build.py > tests/cuda_registers.txt"


def _registers() -> dict[str, int]:
    """Kernel -> registers of a thread, the most over architectures and over the types that its name leaves out."""
    most: dict[str, int] = {}
    for _, mangled, registers, *_ in _resources():
        name = _names()[mangled]
        most[name] = max(most.get(name, 0), registers)
    return most


def _complaints(found: dict[str, int], budget: dict[str, int], complete: bool) -> Iterator[str]:
    """What differs; where not all architectures were built, fewer registers than the budget's are no difference."""
    for name in sorted({*found, *budget}):
        if name not in budget:
            yield f"{name} has no line"
        elif name not in found:
            yield f"{name} is no kernel any more"
        elif found[name] > budget[name]:
            yield f"{name} needs {found[name]} registers, {budget[name]} are granted"
        elif found[name] < budget[name] and complete:
            yield f"{name} needs {found[name]} registers only, {budget[name]} are granted"


def _written_budget() -> tuple[str, dict[str, int]]:
    header, *lines = BUDGET.read_text().splitlines()
    release = re.search(r"nvcc (\d+\.\d+)", header)
    assert release
    budget = {name: int(number) for number, name in (line.split(maxsplit=1) for line in lines)}
    assert len(budget) == len(lines)
    return release[1], budget


@cuda_built
def test_kernels_keep_to_their_registers() -> None:
    release, budget = _written_budget()
    if not _native._C.cuda_version.startswith(f"{release}."):
        pytest.skip(f"the budget is that of nvcc {release}, the module was built by {_native._C.cuda_version}")
    complaints = list(_complaints(_registers(), budget, _built() == ARCHITECTURES))
    assert not complaints, "\n".join([*complaints, UPDATE])


def test_a_difference_from_the_budget_is_seen() -> None:
    found, budget = {"a": 40, "b": 32, "c": 64, "new": 8}, {"a": 40, "b": 40, "c": 56, "gone": 8}
    assert [line.split()[0] for line in _complaints(found, budget, True)] == ["b", "c", "gone", "new"]
    assert [line.split()[0] for line in _complaints(found, budget, False)] == ["c", "gone", "new"]


# ---- instructions

HMMA, LDSM, LDSM_T, COPY = "HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"
WRITTEN_FOR = {  # beginning of a kernel's name -> instructions (beginnings) it was written for
    "shrink_kernel": (HMMA, LDSM, LDSM_T, COPY),
    "expand_kernel": (HMMA, LDSM, COPY),
    "outer_kernel": (HMMA, LDSM_T, COPY),
    "outer_kernel<16-bit, 16, true>": (HMMA, LDSM, LDSM_T, COPY),
    "entries_kernel": ("LDG.E.128", "STG.E.128"),
    "prologue_kernel": ("STG.E.128",),
}
ISSUED = {"80", "90a", "120"}  # 86 and 89 have the instructions of 80, 100 those of 120
DOUBLE_SUMS = ("entries_kernel<float", "loss_kernel<float")  # the loss of float entries, summed in double


@pytest.fixture(scope="module")
def instructions() -> dict[tuple[str, str], set[str]]:
    """Architecture and mangled kernel -> the instructions of its machine code, for one architecture an instruction set."""
    extract, disassemble = _cuda_tool("cuobjdump"), _cuda_tool("nvdisasm")
    found = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        subprocess.run([extract, "-xelf", "all", _native._C.__file__], cwd=folder, check=True, capture_output=True)
        every = sorted(Path(folder).glob("*.cubin"), key=lambda path: -path.stat().st_size)
        cubins = [path for path in every if path.suffixes[-2].removeprefix(".sm_") in (ISSUED & _built() or _built())]
        for path, text in zip(cubins, pool.map(lambda path: _output(disassemble, "-c", path), cubins), strict=True):
            architecture = path.suffixes[-2].removeprefix(".sm_")
            sections = re.split(r"^//-+ \.text\.(\S+) -+$", text, flags=re.MULTILINE)[1:]
            for name, code in zip(sections[::2], sections[1::2], strict=True):
                found[architecture, name] = set(re.findall(r"\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", code))
    return found


@cuda_built
def test_kernels_hold_the_instructions_they_were_written_for(instructions: dict[tuple[str, str], set[str]]) -> None:
    disassembled = {architecture for architecture, _ in instructions}
    assert set(instructions) == {row[:2] for row in _resources() if row[0] in disassembled}
    checked = set()
    for (architecture, mangled), code in instructions.items():
        name = _names()[mangled]
        for kernel in (kernel for kernel in WRITTEN_FOR if name.startswith(kernel)):
            checked.add(kernel)
            missing = [wanted for wanted in WRITTEN_FOR[kernel] if not any(x.startswith(wanted) for x in code)]
            assert not missing, f"sm_{architecture}: {name} without {missing}"
    assert checked == set(WRITTEN_FOR)


@cuda_built
def test_machine_code_has_no_local_memory_and_doubles_only_where_meant(
    instructions: dict[tuple[str, str], set[str]],
) -> None:
    meant = set()
    for (architecture, mangled), code in instructions.items():
        name = _names()[mangled]
        assert not {x for x in code if re.match(r"(LDL|STL)\b", x)}, f"sm_{architecture}: {name}"
        doubles = sorted(x for x in code if re.match(r"(DADD|DMUL|DFMA|DMMA|DSETP|DMNMX|MUFU\.\w+64H)\b", x))
        if name.startswith(DOUBLE_SUMS):
            if doubles:
                meant.add((architecture, name.split(",")[0].rstrip(">")))
        elif "double" not in name:
            assert not doubles, f"sm_{architecture}: {name} computes in double: {doubles}"
    disassembled = {architecture for architecture, _ in instructions}
    assert meant == {(architecture, name) for architecture in disassembled for name in DOUBLE_SUMS}, "a double sum is not one"


if __name__ == "__main__":
    if _built() != ARCHITECTURES:
        sys.exit(f"the module was built for {_native._C.cuda_architectures}, a budget is of sm_{', sm_'.join(ARCHITECTURES)}")
    release = ".".join(_native._C.cuda_version.split(".")[:2])
    print(f"# Registers of a thread, the most over all architectures, by nvcc {release}; written by tests/test_cuda_build.py")
    for name, registers in sorted(_registers().items()):
        print(f"{registers:3} {name}")

"""The native module: its types agree with it, one that is missing or broken never stops the import, and an older processor
meets no instruction it does not know."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_kernels import _native

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "lowrank_kernels"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files, those of Linux")
native = pytest.mark.skipif(not _native.has_cpu(), reason=f"no native module: {_native.unavailable}")

# ---------------------------------------------------------------------- types of the native module


def parameters(arguments: ast.arguments) -> list[str]:
    names = [*arguments.posonlyargs, *arguments.args]
    assert not arguments.args or [a.arg for a in names] == ["self"], "the native module takes arguments by position"
    return [ast.unparse(a.annotation) for a in names if a.annotation]


def declared() -> dict[str, list[str] | str]:
    """Name -> types of the parameters of a function or of a class's construction, or the type of a constant."""
    found: dict[str, list[str] | str] = {}
    for node in ast.parse((PACKAGE / "_C.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [*parameters(node.args), ast.unparse(node.returns or ast.Constant(None))]
        elif isinstance(node, ast.ClassDef):
            (method,) = node.body
            assert isinstance(method, ast.FunctionDef)
            found[node.name] = [*parameters(method.args), "None"]
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = ast.unparse(node.annotation)
    return found


def described(docstring: str) -> list[str]:
    """Types of the parameters and of the result, as pybind11 writes them into the first line of a docstring."""
    match = re.match(r"\w+\((.*)\) -> (\S+)", docstring)
    assert match, docstring
    plain = re.sub(r"lowrank_kernels\._C\.", "", match[1])
    accepted = r"typing\.Supports(Int|Float)(?: \| typing\.SupportsIndex)?"
    plain = re.sub(accepted, lambda m: m[1].lower(), plain)
    return [p.partition(": ")[2] for p in plain.split(", ") if p and not p.startswith("self")] + [match[2]]


@native
def test_types_agree_with_the_native_module() -> None:
    module = _native._C
    stub = declared()
    only_cuda = {name for name in stub if "cuda_workspace" in name or name.endswith("_cuda")}
    there = {name for name in vars(module) if not name.startswith("__")}
    assert there == set(stub) - (set() if module.has_cuda else only_cuda)
    for name in sorted(there):
        value, wanted = getattr(module, name), stub[name]
        if isinstance(wanted, str):
            assert type(value).__name__ == wanted, name
            continue
        found = described((value.__init__ if isinstance(value, type) else value).__doc__)
        assert found[:-1] == wanted[:-1], name
        assert wanted[-1].partition("[")[0] == found[-1].partition("[")[0], name


# ---------------------------------------------------------------------- a native module that is missing or broken


# Prints a report and runs an op on the package of each folder, in a process of its own that has torch already.
RUN_BROKEN = """
import os, sys, traceback, torch, numpy, torch.autograd.forward_ad
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]  # an editable install would come first
for folder in sys.argv[1:]:
    child = os.fork()
    if not child:
        os.dup2(os.open(folder + "/out", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(folder + "/err", os.O_WRONLY | os.O_CREAT), 2)
        status = 1
        try:
            sys.path.insert(0, folder)
            import lowrank_kernels as lrk
            from lowrank_kernels import doctor
            doctor.print_report()
            lrk.ops.three_factor_linear(torch.randn(2, 3), None, torch.randn(4, 2), None, torch.randn(2, 3))
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    open(folder + "/status", "w").write(str(status))
"""


def _other_python(folder: Path) -> None:
    (folder / "_C.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")


def _content(make: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / f"_C{SUFFIX}").write_bytes(make(Path(_native._C.__file__).read_bytes()))

    return write


def _compiled(source: str, needs: str = "") -> Callable[[Path], None]:
    """A module of a C source, linked to a library that is gone afterwards."""

    def write(folder: Path) -> None:
        if shutil.which("cc") is None:
            pytest.skip("needs a C compiler")
        gone = ["-Wl,--no-as-needed", str(folder / needs)] if needs else []
        if gone:
            subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", f"-Wl,-soname,{needs}", "-o", gone[1]], check=True)
        include, target = sysconfig.get_path("include"), str(folder / f"_C{SUFFIX}")
        options = [f"-I{include}", "-shared", "-fPIC", "-Wl,-z,now", "-o", target, "-x", "c", "-", "-x", "none", *gone]
        subprocess.run(["cc", *options], input=source, text=True, check=True)
        for path in gone[1:]:
            os.unlink(path)

    return write


UNDEFINED = "void missing_symbol(void); void* PyInit__C(void) { missing_symbol(); return 0; }"
OLDER = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", 0, -1, 0};
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
"""


BROKEN = {
    "missing": (lambda folder: None, "did not load: it is missing;"),
    "other-python": (_other_python, r"there is none for cpython-3\d+ on \w+, only _C\.cpython-39-x86_64-linux-gnu\.so;"),
    "empty": (_content(lambda content: b""), "file too short"),
    "text": (_content(lambda content: b"not a library" * 100), "invalid ELF header"),
    "cut-off": (_content(lambda content: content[: len(content) // 2]), "is cut off;"),
    "undefined-symbol": (_compiled(UNDEFINED), "undefined symbol: missing_symbol"),
    "older-module": (_compiled(OLDER), "has no attribute 'simd_level'"),
    "no-libgomp": (_compiled("int nothing;", "libgomp-gone.so.1"), "libgomp-gone.so.1: cannot open.*; install libgomp"),
    "no-entry": (_compiled("int nothing;"), "does not define module export function"),
}


@pytest.fixture(scope="module")
def broken_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a case, with what it printed and its status."""
    top = tmp_path_factory.mktemp("broken")
    for name, (damage, _) in BROKEN.items():
        shutil.copytree(PACKAGE, top / name / "lowrank_kernels", ignore=shutil.ignore_patterns("__pycache__", "_C*.so"))
        damage(top / name / "lowrank_kernels")
    environment = {name: value for name, value in os.environ.items() if name != "LOWRANK_KERNELS_NATIVE"}
    folders = [str(top / name) for name in BROKEN]
    subprocess.run([sys.executable, "-c", RUN_BROKEN, *folders], env=environment, check=True)
    return top


@linux
@native
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_native_module_is_one_line(broken_runs: Path, case: str) -> None:
    out, err = ((broken_runs / case / name).read_text() for name in ("out", "err"))
    assert (broken_runs / case / "status").read_text() == "0", err
    lines = [line for line in err.splitlines() if "Warning: " in line]
    assert len(lines) == 1, err
    assert "lowrank_kernels: everything runs on the PyTorch reference, the compiled module lowrank_kernels._C" in lines[0]
    assert re.search(BROKEN[case][1], lines[0]), lines[0]
    assert lines[0].endswith("; pip install --force-reinstall --no-deps lowrank-kernels") or case == "no-libgomp"
    assert re.search(r"module +not loaded .*everything runs on the PyTorch reference", out)
    assert re.search(r"three_factor\w* on cpu +PyTorch reference", out)


# ---------------------------------------------------------------------- old processors

VECTOR_EXTENSION = r"\t\s*(v[a-z]\w+)\s.*%[xyz]mm|%[yz]mm"


@linux
def test_only_the_objects_of_a_level_hold_avx() -> None:
    """What runs before the level is chosen, and the portable level itself, run on any x86-64 processor."""
    objects = [p for p in ROOT.glob("build/cp*/CMakeFiles/*/csrc/*.o") if p.name.endswith(".cpp.o")]
    if not objects or shutil.which("objdump") is None:
        pytest.skip("needs the objects of the build in build/, and objdump")
    wide = set()
    for path in objects:
        code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True).stdout
        if re.search(VECTOR_EXTENSION, code):
            wide.add(path.parent.parent.name)
    assert wide <= {"lrk_cpu_avx2.dir", "lrk_cpu_avx512.dir"}
    if os.uname().machine == "x86_64":
        assert wide, "the test would find AVX where it is"

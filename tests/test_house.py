"""The rules of the house: imports go downward, the native core knows no torch, every op is complete."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank_kernels
from lowrank_kernels import _native, ops, reference

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "lowrank_kernels"
STEMS = sorted(path.stem for path in (PACKAGE / "ops").glob("*.py") if path.stem not in ("__init__", "registry"))
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FLOORS = {
    "entries": 1,
    "files": 1,
    "delimited": 1,
    "tables": 1,
    "pictures": 1,
    "processes": 1,
    "row_shards": 1,
    "checkpoints": 1,
    "batches": 1,
    "parts": 1,
    "_native": 1,
    "reference": 2,
    "ops": 3,
    "compression": 4,
    "factorization": 4,
    "solver": 4,
    "strengths": 4,
    "nn": 4,
    "labels": 1,
    "estimators": 5,
    "completion": 5,
    "imputer": 5,
    "adapters": 5,
    "adapter_files": 5,
    "heads": 5,
    "initialization": 5,
    "optim": 5,
    "analysis": 5,
    "invariants": 5,
    "finetuning": 6,
    "integrations": 6,
    "problems": 6,
    "tasks": 6,
    "figures": 6,
    "cli_figures": 7,
    "cli_fit": 7,
    "cli_verify": 7,
    "cli": 7,
    "doctor": 7,
    "__main__": 7,
    "": 7,  # the package itself: its names are for users and for the top floor
}
OUTSIDE = {"testing"}  # for tests and benches: may import anything, nothing imports it


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """The package's modules that a module imports, at run time, anywhere in the file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lowrank_kernels":
                    yield alias.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = MODULES.get(module, Path()).name == "__init__.py"
                parts = module.split(".") if module else []
                up = node.level - is_package
                base = ".".join([*(parts[: len(parts) - up] if up else parts), *([base] if base else [])])
            elif base.split(".")[0] == "lowrank_kernels":
                base = base.partition(".")[2]
            else:
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES or inner == "_C" else base
        else:
            yield from imports(module, node)


IMPORTS = {name: sorted(set(imports(name, ast.parse(path.read_text())))) for name, path in MODULES.items()}


def floor(module: str) -> int:
    return FLOORS[module.split(".")[0]]


# ---------------------------------------------------------------------- the reader of imports itself


@pytest.mark.parametrize(
    ("module", "source", "wanted"),
    [
        ("entries", "import torch\nfrom numpy.typing import ArrayLike", []),
        ("_native", "from .entries import SortedEntries\nfrom . import _C", ["_C", "entries"]),
        (
            "ops.completion",
            "from .. import _native, reference\nfrom .registry import same",
            ["_native", "ops.registry", "reference"],
        ),
        ("ops", "from .completion import completion_loss", ["ops.completion"]),
        ("solver", "def f():\n    from lowrank_kernels.ops.completion import completion_loss", ["ops.completion"]),
        ("solver", "import lowrank_kernels.ops.completion\nimport lowrank_kernels", ["", "ops.completion"]),
        ("solver", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import ops", []),
        ("cli", "from . import __version__", [""]),
    ],
)
def test_imports_are_read(module: str, source: str, wanted: list[str]) -> None:
    assert sorted(set(imports(module, ast.parse(source)))) == wanted


# ---------------------------------------------------------------------- floors


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "lowrank_kernels")
def test_imports_go_downward(module: str) -> None:
    if module in OUTSIDE:
        pytest.skip("outside the floors")
    top = module.split(".")[0]
    assert top in FLOORS, f"{module} has no floor: give it one in tests/test_house.py"
    for imported in IMPORTS[module]:
        if imported == "_C":
            continue
        assert imported.split(".")[0] not in OUTSIDE, f"{module} imports {imported}, which is for tests and benches"
        assert floor(imported) <= floor(module), (
            f"{module} (floor {floor(module)}) imports {imported} (floor {floor(imported)})"
        )


def test_imports_have_no_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for imported in IMPORTS.get(module, ()):
            if imported != "":  # everything may be reached from the package itself
                visit(imported, (*path, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


def test_only_native_imports_the_compiled_module() -> None:
    assert [module for module, names in IMPORTS.items() if "_C" in names] == ["_native"]


# ---------------------------------------------------------------------- every op is complete


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(
    "pattern",
    [
        "csrc/{}.h",
        "csrc/{}_cpu.cpp",
        "csrc/{}_cuda.cu",
        "python/lowrank_kernels/reference/{}.py",
        "tests/test_{}_op.py",
        "bench/bench_{}.py",
    ],
)
def test_op_has(stem: str, pattern: str) -> None:
    path = pattern.format(stem)
    assert (ROOT / path).is_file(), f"the op {stem} lacks {path}"


def test_ops_are_found() -> None:
    assert "completion" in STEMS


def test_signatures_of_ops_and_reference_are_the_same() -> None:
    assert set(reference.__all__) <= set(ops.__all__)
    for name in reference.__all__:
        assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(ops, name)), name


@pytest.mark.parametrize("module", [lowrank_kernels, ops, reference], ids=lambda module: module.__name__)
def test_exports(module: object) -> None:
    names = module.__all__  # type: ignore[attr-defined]
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(module, name, None) is not None, name
        if callable(getattr(module, name)):
            assert inspect.getdoc(getattr(module, name)), f"{name} has no docstring"


# ---------------------------------------------------------------------- the native core knows no torch


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").iterdir()), ids=lambda path: path.name)
def test_no_torch_in_csrc(path: Path) -> None:
    includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
    assert not [name for name in includes if re.match(r"(torch|ATen|c10|caffe2)\b", name)]


def project() -> dict[str, dict[str, object]]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_torch_is_no_build_requirement() -> None:
    requires = project()["build-system"]["requires"]
    assert requires
    assert not [r for r in requires if re.match(r"torch\b", r)]  # type: ignore[attr-defined]


def test_torch_is_not_pinned() -> None:
    table = project()["project"]
    extras = [r for group in table.get("optional-dependencies", {}).values() for r in group]  # type: ignore[attr-defined]
    torch_requirements = [r for r in [*table["dependencies"], *extras] if re.match(r"torch\b", r)]  # type: ignore[misc]
    assert torch_requirements
    assert not [r for r in torch_requirements if "==" in r or "<" in r]


def native_library() -> str:
    if not _native.has_cpu():
        pytest.skip(f"no native module: {_native.unavailable}")
    return str(_native._C.__file__)


def tool_output(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files, those of Linux")
def test_the_compiled_module_links_neither_torch_nor_a_driver() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", tool_output("readelf", "-d", native_library()))
    assert any(name.startswith("libc.so") for name in needed)
    assert not [name for name in needed if re.match(r"lib(torch|c10|cuda|cudart|nv)", name)]
    undefined = tool_output("nm", "-D", "-u", native_library())
    assert "Py" in undefined
    assert not re.findall(r".*(?:c10|torch|aten|at\d).*", undefined)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files, those of Linux")
def test_simd_objects_define_no_shared_symbol() -> None:
    """An inline function emitted in the AVX-512 object could replace the portable one and crash an older processor."""
    objects = [path for path in (ROOT / "build").glob("**/lrk_cpu_*.dir/**/*.o") if (ROOT / "csrc" / path.stem).exists()]
    if not objects:
        pytest.skip("no build folder here")
    kinds = {}
    for path in objects:
        for line in tool_output("nm", "--defined-only", str(path)).splitlines():
            if line.split()[-1].startswith("DW.ref."):  # a pointer to the exception personality, the same in all
                continue
            kinds.setdefault(line.split()[-2], []).append((path.name, line.split()[-1]))
    assert "T" in kinds, "the entry points"
    assert not [symbol for kind in "WVuvwiBDCG" for symbol in kinds.get(kind, [])]

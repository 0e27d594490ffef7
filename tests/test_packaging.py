"""What is released: the audit of wheels refuses what it must, pip refuses foreign wheels, and version, changelog, licences
and the declared floors are of one mind."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import lowrank_kernels
from lowrank_kernels import _native

pytest.importorskip("elftools", reason="the audit reads ELF files with pyelftools")
from release import audit, changelog, torch_matrix, wheel

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "lowrank_kernels"

# ---------------------------------------------------------------------- the audit

INFO = "lowrank_kernels-0.1.0.dist-info"
NAME = "lowrank_kernels-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl"
ENTRY = "void* PyInit__C(void) { return 0; }"
FAT = ENTRY + ' __attribute__((section(".nv_fatbin"), used)) static const char fat[] = "%s";'
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """A shared library of a C source; linked to an empty library of the given name."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler that makes ELF files")
    folder = tmp_path_factory.mktemp("libraries")

    def compiled(source: str = ENTRY, *, needs: str = "", options: tuple[str, ...] = ()) -> bytes:
        (folder / "module.c").write_text(source)
        if needs:
            (folder / "empty.c").write_text("int empty_;")
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{needs}", "-o", "libempty.so", "empty.c"]
            subprocess.run(command, cwd=folder, check=True)
            options = ("-Wl,--no-as-needed", "-L.", "-lempty", *options)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", "module.so", "module.c", *options], cwd=folder, check=True)
        return (folder / "module.so").read_bytes()

    return compiled


@pytest.fixture
def good(library: Callable[..., bytes]) -> Files:
    """The files of a wheel that has nothing wrong, RECORD left out."""
    licences = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "LICENSE", *(ROOT / "LICENSES").iterdir()]}
    metadata = ["Metadata-Version: 2.4", "Name: lowrank-kernels", "Version: 0.1.0"]
    metadata += [f"License-File: {name}" for name in licences]
    metadata += [f"Requires-Dist: {r}" for r in ("torch>=2.4", "numpy>=1.24", "safetensors>=0.4")]
    files = {f"lowrank_kernels/{p.relative_to(PACKAGE).as_posix()}": b"" for p in PACKAGE.rglob("*.py")}
    files |= {"lowrank_kernels/py.typed": b"", "lowrank_kernels/_C.pyi": b""}
    files["lowrank_kernels/_C.cpython-311-x86_64-linux-gnu.so"] = library()
    files[f"{INFO}/METADATA"] = "\n".join(metadata).encode()
    files[f"{INFO}/WHEEL"] = b"Wheel-Version: 1.0\nTag: cp311-cp311-manylinux_2_34_x86_64"
    return files | {f"{INFO}/licenses/{name}": path.read_bytes() for name, path in licences.items()}


MODULE = "lowrank_kernels/_C.cpython-311-x86_64-linux-gnu.so"


def complaints(
    folder: Path, files: Files, name: str = NAME, record: bytes | None = None, platform: str = "manylinux"
) -> list[str]:
    def line(path: str, content: bytes) -> str:
        return (
            f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()},{len(content)}"
        )

    whole = "\n".join([*(line(*item) for item in files.items()), f"{INFO}/RECORD,,"]).encode() if record is None else record
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in [*files.items(), (f"{INFO}/RECORD", whole)]:
            archive.writestr(path, content)
    return audit.complaints(folder / name, platform=platform)


def test_a_good_wheel_has_no_complaint(tmp_path: Path, good: Files) -> None:
    assert complaints(tmp_path, good) == []


@pytest.mark.parametrize(
    ("strange", "content"),
    [
        ("lowrank_kernels/completion_cpu.cpp", b""),
        ("csrc/completion.h", b""),
        ("tests/test_solver.py", b""),
        ("lowrank_kernels.libs/libgomp-a34b3233.so.1.0.0", b""),
        ("lowrank_kernels/libcudart.so.13", b""),
    ],
)
def test_audit_refuses_strange_files(tmp_path: Path, good: Files, strange: str, content: bytes) -> None:
    found = complaints(tmp_path, good | {strange: content})
    assert found == [f"{NAME}: wanted modules, types and metadata only, got {strange}"]


@pytest.mark.parametrize(
    ("missing", "wanted"),
    [
        ("lowrank_kernels/py.typed", "wanted lowrank_kernels/py.typed, got none"),
        ("lowrank_kernels/_C.pyi", "wanted lowrank_kernels/_C.pyi, got none"),
        ("lowrank_kernels/solver.py", "wanted every module of the sources, got none of lowrank_kernels/solver.py"),
        (MODULE, "wanted one native module lowrank_kernels/_C.*.so, got none"),
        (f"{INFO}/licenses/LICENSES/pybind11.txt", "wanted the licence file LICENSES/pybind11.txt, got "),
        (f"{INFO}/licenses/LICENSE", "wanted the licence file LICENSE, got "),
    ],
)
def test_audit_misses_what_must_be_there(tmp_path: Path, good: Files, missing: str, wanted: str) -> None:
    del good[missing]
    assert any(wanted in line for line in complaints(tmp_path, good))


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("torch>=2.4", "torch==2.13.0", "wanted floors only in Requires-Dist, got torch==2.13.0"),
        ("torch>=2.4", "torch>=2.4,<3", "wanted floors only in Requires-Dist, got torch>=2.4,<3"),
        ("numpy>=1.24", "numpy", "wanted numpy>=... in Requires-Dist, got numpy"),
        ("torch>=2.4", "torch@ https://example.org/torch.whl", "wanted floors only"),
        ("safetensors>=0.4", "rich>=13", "wanted safetensors>=... in Requires-Dist, got none"),
    ],
)
def test_audit_reads_requirements(tmp_path: Path, good: Files, old: str, new: str, wanted: str) -> None:
    good[f"{INFO}/METADATA"] = good[f"{INFO}/METADATA"].replace(old.encode(), new.encode())
    assert any(wanted in line for line in complaints(tmp_path, good))


@pytest.mark.parametrize(
    ("source", "arguments", "wanted"),
    [
        (ENTRY, {"needs": "libcudart.so.13"}, "wanted a module that needs the system's libraries only, got libcudart.so.13"),
        (ENTRY, {"needs": "libcuda.so.1"}, "the system's libraries only, got libcuda.so.1"),
        (ENTRY, {"needs": "libtorch_cpu.so"}, "the system's libraries only, got libtorch_cpu.so"),
        (ENTRY, {"needs": "libc10.so"}, "the system's libraries only, got libc10.so"),
        (ENTRY, {"needs": "libgomp-a34b3233.so.1"}, "the system's libraries only, got libgomp-a34b3233.so.1"),
        (ENTRY, {"options": ("-Wl,-rpath,/opt/torch/lib",)}, "wanted no search path for libraries, got DT_R"),
        (
            "extern void _ZN3c105ErrorD1Ev(void); void* PyInit__C(void) { _ZN3c105ErrorD1Ev(); return 0; }",
            {},
            "wanted no undefined symbol of torch, got _ZN3c105ErrorD1Ev",
        ),
        (ENTRY + " void helper(void) {}", {}, "wanted PyInit__C exported alone, got helper"),
        ("void* PyInit_other(void) { return 0; }", {}, "wanted PyInit__C exported, got none"),
    ],
)
def test_audit_reads_the_native_module(
    tmp_path: Path, good: Files, library: Callable[..., bytes], source: str, arguments: dict[str, object], wanted: str
) -> None:
    good[MODULE] = library(source, **arguments)
    found = complaints(tmp_path, good)
    assert any(wanted in line for line in found), found


def test_audit_refuses_what_is_no_library(tmp_path: Path, good: Files) -> None:
    assert f"{NAME}: wanted an ELF file as native module, got none" in complaints(tmp_path, good | {MODULE: b"text"})


def test_audit_bounds_the_size(tmp_path: Path, good: Files, library: Callable[..., bytes]) -> None:
    found = complaints(tmp_path, good | {"lowrank_kernels/solver.py": os.urandom(1_000_001)})
    assert any("wanted at most 1,000,000 bytes without CUDA, got 1," in line for line in found), found
    good[MODULE] = library(FAT % audit.ARCHITECTURES)
    assert complaints(tmp_path, good | {"lowrank_kernels/py.typed": os.urandom(7_000_000)}) == []
    found = complaints(tmp_path, good | {"lowrank_kernels/py.typed": os.urandom(8_000_001)})
    assert any("wanted at most 8,000,000 bytes with CUDA, got 8," in line for line in found), found


def test_audit_wants_every_architecture(tmp_path: Path, good: Files, library: Callable[..., bytes]) -> None:
    good[MODULE] = library(FAT % "80-real,90a-real")
    assert f"{NAME}: wanted the architectures {audit.ARCHITECTURES}, got 80-real,90a-real" in complaints(tmp_path, good)


@pytest.mark.parametrize(
    ("name", "platform", "wanted"),
    [
        (
            NAME.replace("manylinux_2_34", "linux"),
            "manylinux",
            "wanted the tag cp3x-cp3x-manylinux..., got cp311-cp311-linux_x86_64",
        ),
        (NAME.replace("cp311-cp311", "py3-none"), "manylinux", "got py3-none-manylinux_2_34_x86_64"),
        (NAME, "manylinux_2_28", "wanted the tag cp3x-cp3x-manylinux_2_28..., got cp311-cp311-manylinux_2_34_x86_64"),
        (NAME.replace("2_34", "2_28"), "manylinux", "wanted WHEEL to name the tags of the file name, got"),
        ("wheel.whl", "manylinux", "wanted a wheel's file name, got"),
    ],
)
def test_audit_reads_the_tag(tmp_path: Path, good: Files, name: str, platform: str, wanted: str) -> None:
    found = complaints(tmp_path, good, name, platform=platform)
    assert any(wanted in line for line in found), found


def test_audit_compares_the_tag_with_the_glibc_it_needs(tmp_path: Path, good: Files, library: Callable[..., bytes]) -> None:
    good[MODULE] = library(f"#include <unistd.h>\n{ENTRY} int old(void) {{ return getpid(); }}")
    found = complaints(tmp_path, good, NAME.replace("2_34", "2_1"))
    assert any(re.search(r"wanted no glibc newer than 2\.1, got symbols of 2\.\d+", line) for line in found), found


def test_audit_compares_record(tmp_path: Path, good: Files) -> None:
    found = complaints(
        tmp_path, good, record=f"lowrank_kernels/py.typed,sha256=abc,0\ngone.py,sha256=abc,0\n{INFO}/RECORD,,".encode()
    )
    assert f"{NAME}: wanted RECORD to hold the hash of lowrank_kernels/py.typed, got sha256=abc" in found
    assert f"{NAME}: wanted RECORD to list what is there, got gone.py" in found


def test_audit_of_what_is_no_wheel(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"no zip")
    assert audit.complaints(tmp_path / NAME)[0].startswith(f"{NAME}: wanted a readable wheel, got ")
    assert audit.complaints(tmp_path / "gone.whl")[0].startswith("gone.whl: wanted a readable wheel, got ")


# ---------------------------------------------------------------------- version and changelog


def test_version_has_one_source() -> None:
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    if _native.has_cpu():
        assert _native._C.version == lowrank_kernels.__version__


@pytest.mark.parametrize(
    ("tag", "log", "wanted"),
    [
        ("v0.1.0", "# Changelog\n\n## 0.1.0 (2026-12-01)\n\n- New.\n\n## 0.0.1\n\n- Old.\n", []),
        ("v0.2.0", "## 0.1.0\n", ["x-0.1.0.tar.gz: wanted the git tag v0.1.0, got v0.2.0"]),
        ("v0.1.0", "## Unreleased\n", ["x-0.1.0.tar.gz: wanted 0.1.0 as the first heading of CHANGELOG.md, got Unreleased"]),
        ("v0.1.0", "", ["x-0.1.0.tar.gz: wanted 0.1.0 as the first heading of CHANGELOG.md, got none"]),
    ],
)
def test_a_release_has_one_version(tmp_path: Path, tag: str, log: str, wanted: list[str]) -> None:
    (tmp_path / "CHANGELOG.md").write_text(log)
    assert audit.release(tmp_path / "x-0.1.0.tar.gz", tag, tmp_path) == wanted


def test_notes_of_a_release_are_its_part_of_the_changelog() -> None:
    assert changelog.top("# Changelog\n\n## 0.2.0 (today)\n\n- New.\n\n## 0.1.0\n\n- Old.\n") == ("0.2.0", "- New.")
    assert changelog.top((ROOT / "CHANGELOG.md").read_text())[0] in ("Unreleased", lowrank_kernels.__version__)


# ---------------------------------------------------------------------- licences, sdist, floors


def test_every_licence_is_named_in_the_list() -> None:
    listed = (ROOT / "LICENSES" / "README.md").read_text()
    assert all(path.name in listed for path in (ROOT / "LICENSES").iterdir() if path.name != "README.md")


def test_floors_are_those_that_were_run() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in (f"torch=={torch_matrix.VERSIONS[0]}", *torch_matrix.FLOORS):
        name, _, version = requirement.partition("==")
        declared = re.search(rf'"{name}>=([\d.]+)', text)
        assert declared, name
        assert f"{version}.".startswith(f"{declared[1]}."), f"{requirement} is run, {declared[0]} is declared"
    rows = torch_matrix.rows(torch_matrix.PAGE.read_text())
    assert " passed" in rows[torch_matrix.VERSIONS[0]], "the floor is a version that was run: make torch-matrix"
    assert set(torch_matrix.VERSIONS) <= set(rows)


def test_the_suite_of_the_wheel_reads_no_source() -> None:
    for name in wheel.SUITE:
        text = (ROOT / "tests" / f"{name}.py").read_text()
        assert not re.search(r"\bROOT\b|from (tests|bench|release)", text), name


def test_sdist_is_compared_without_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "nvcc").touch()
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "cuda"), str(tmp_path)]))
    environment = wheel.without_nvcc()
    assert environment["LRK_CUDA"] == "OFF"
    assert str(tmp_path / "cuda") not in environment["PATH"].split(os.pathsep)
    assert str(tmp_path) in environment["PATH"].split(os.pathsep)


# ---------------------------------------------------------------------- pip's word on foreign wheels


@pytest.mark.parametrize(
    "tag",
    [
        "cp39-cp39-manylinux_2_28_x86_64",
        "cp311-cp311-win_amd64",
        "cp311-cp311-manylinux_2_28_s390x",
        "cp311-cp311-macosx_11_0_arm64",
    ],
)
def test_pip_refuses_a_foreign_wheel(tmp_path: Path, tag: str) -> None:
    name = f"lowrank_kernels-0.1.0-{tag}.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: lowrank-kernels\nVersion: 0.1.0\n")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--dry-run", "--target", str(tmp_path / "to")]
    run = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"ERROR: {name} is not a supported wheel on this platform." in run.stderr
    assert not (tmp_path / "to").exists()

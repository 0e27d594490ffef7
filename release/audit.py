"""What a wheel of this project must be and must not be.

    python -m release.audit dist/*.whl [--platform manylinux_2_28] [--tag v1.0.0]

A wheel is read once; every check yields lines that name what was wanted and what came. The wheel is good where there is none.
"""

from __future__ import annotations

import argparse
import base64
import csv
import email
import hashlib
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from functools import cached_property
from io import BytesIO
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from . import changelog

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lowrank_kernels"
ARCHITECTURES = "80-real,86-real,89-real,90a-real,100-real,120-real,120-virtual"
MAX_BYTES = {True: 8_000_000, False: 1_000_000}  # with CUDA, without
FLOORS = "torch", "numpy", "safetensors"
# What every glibc system has, and libgomp: torch brings its own, and a second copy would be a second pool of threads.
SYSTEM_LIBRARIES = r"lib(c|m|dl|rt|pthread|gcc_s)\.so\.\d|libstdc\+\+\.so\.6|libgomp\.so\.1|ld-linux[-\w]*\.so\.\d"
EXPORTED = r"PyInit__C|__bss_start|_edata|_end|_init|_fini|_Z(T[ISV]|ZN?K?|NK?)?St.+"  # and what std:: marks visible
TORCH_SYMBOL = r"c10|torch|aten|_ZNK?2at"
ALLOWED = (
    rf"{PACKAGE}/([a-z_]+/)*\w+\.py|{PACKAGE}/(_C\.pyi|py\.typed|_C\.[-\w]+\.so)"
    rf"|{PACKAGE}-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/.+|sboms/.+)"
)


@dataclass
class Wheel:
    """The parts of a wheel that the checks look at."""

    path: Path
    files: dict[str, bytes]

    @classmethod
    def read(cls, path: Path) -> Wheel:
        with zipfile.ZipFile(path) as archive:
            return cls(path, {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")})

    def named(self, pattern: str) -> list[str]:
        return [name for name in self.files if re.fullmatch(pattern, name)]

    def message(self, name: str) -> Message:
        """METADATA or WHEEL; empty where it is missing."""
        return email.message_from_bytes(b"".join(self.files[n] for n in self.named(rf"[^/]+\.dist-info/{name}")))

    @cached_property
    def module(self) -> bytes:
        """The native module, empty where there is not exactly one ELF file."""
        found = self.named(rf"{PACKAGE}/_C\.[^/]+\.so")
        content = self.files[found[0]] if len(found) == 1 else b""
        return content if content.startswith(b"\x7fELF") else b""

    @property
    def has_cuda(self) -> bool:
        return b".nv_fatbin" in self.module


def complaints(path: Path, *, platform: str = "manylinux", root: Path = ROOT) -> list[str]:
    """Everything that is wrong with the wheel; ``platform`` is the beginning of the tag it must have."""
    try:
        wheel = Wheel.read(path)
    except (OSError, zipfile.BadZipFile) as error:
        return [f"{path.name}: wanted a readable wheel, got {error}"]
    checks = (tag(wheel, platform), contents(wheel, root), record(wheel), metadata(wheel, root), size(wheel), native(wheel))
    return [f"{path.name}: {line}" for check in checks for line in check]


def tag(wheel: Wheel, platform: str) -> Iterator[str]:
    try:
        tags = {str(tag) for tag in parse_wheel_filename(wheel.path.name)[3]}
    except InvalidWheelFilename as error:
        yield f"wanted a wheel's file name, got {error}"
        return
    native = all(re.fullmatch(r"(cp3\d+)-\1-manylinux\w*", tag) for tag in tags)
    if not native or not any(tag.split("-")[2].startswith(platform) for tag in tags):
        yield f"wanted the tag cp3x-cp3x-{platform}..., got {', '.join(sorted(tags))}"
    inside = set(wheel.message("WHEEL").get_all("Tag", []))
    if inside != tags:
        yield f"wanted WHEEL to name the tags of the file name, got {', '.join(sorted(inside)) or 'none'}"


def contents(wheel: Wheel, root: Path) -> Iterator[str]:
    """The package's modules, the native module, its types and the metadata; no sources, no tests, no vendored library."""
    for name in wheel.files:
        if not re.fullmatch(ALLOWED, name):
            yield f"wanted modules, types and metadata only, got {name}"
    for wanted in (f"{PACKAGE}/py.typed", f"{PACKAGE}/_C.pyi"):
        if wanted not in wheel.files:
            yield f"wanted {wanted}, got none"
    if len(modules := wheel.named(rf"{PACKAGE}/_C\.[^/]+\.so")) != 1:
        yield f"wanted one native module {PACKAGE}/_C.*.so, got {', '.join(modules) or 'none'}"
    source = root / "python"
    there = {path.relative_to(source).as_posix() for path in (source / PACKAGE).rglob("*.py")}
    here = set(wheel.named(rf"{PACKAGE}/.+\.py"))
    if missing := sorted(there - here):
        yield f"wanted every module of the sources, got none of {', '.join(missing)}"
    if strange := sorted(here - there):
        yield f"wanted the modules of the sources only, got {', '.join(strange)}"


def record(wheel: Wheel) -> Iterator[str]:
    listed = {row[0]: row[1] for name in wheel.named(r"[^/]+\.dist-info/RECORD") for row in _rows(wheel.files[name]) if row}
    for name, content in wheel.files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        if not name.endswith(".dist-info/RECORD") and listed.get(name) != f"sha256={digest}":
            yield f"wanted RECORD to hold the hash of {name}, got {listed.get(name, 'none')}"
    if strange := sorted(set(listed) - set(wheel.files)):
        yield f"wanted RECORD to list what is there, got {', '.join(strange)}"


def _rows(content: bytes) -> Iterator[list[str]]:
    return csv.reader(content.decode().splitlines())


def metadata(wheel: Wheel, root: Path) -> Iterator[str]:
    """Floors only, and a licence file for everything that is compiled in."""
    found = wheel.message("METADATA")
    required = [r for r in found.get_all("Requires-Dist", []) if "extra ==" not in r]
    for name in FLOORS:
        if not any(re.fullmatch(rf"{name}(>=[\d.]+)", r.replace(" ", "")) for r in required):
            yield f"wanted {name}>=... in Requires-Dist, got {', '.join(r for r in required if r.startswith(name)) or 'none'}"
    for requirement in found.get_all("Requires-Dist", []):
        if re.search(r"[<~@]|[!=]=", requirement.partition(";")[0]):
            yield f"wanted floors only in Requires-Dist, got {requirement}"
    licences = ["LICENSE", *sorted(f"LICENSES/{path.name}" for path in (root / "LICENSES").iterdir())]
    listed = found.get_all("License-File", [])
    for name in licences:
        if name not in listed or not wheel.named(rf"[^/]+\.dist-info/licenses/{re.escape(name)}"):
            yield f"wanted the licence file {name}, got {', '.join(listed) or 'none'}"


def size(wheel: Wheel) -> Iterator[str]:
    most, found = MAX_BYTES[wheel.has_cuda], wheel.path.stat().st_size
    if found > most:
        yield f"wanted at most {most:,} bytes {'with' if wheel.has_cuda else 'without'} CUDA, got {found:,}"


def native(wheel: Wheel) -> Iterator[str]:
    """Links nothing but the system, exports nothing but its entry, and needs no glibc newer than the tag says."""
    if not wheel.module:
        yield "wanted an ELF file as native module, got none"
        return
    elf = ELFFile(BytesIO(wheel.module))
    dynamic = [entry for section in elf.iter_sections() if isinstance(section, DynamicSection) for entry in section.iter_tags()]
    needed = [str(getattr(entry, "needed", "")) for entry in dynamic if entry.entry.d_tag == "DT_NEEDED"]
    for library in needed:
        if not re.fullmatch(SYSTEM_LIBRARIES, library):
            yield f"wanted a module that needs the system's libraries only, got {library}"
    if paths := [str(e.entry.d_tag) for e in dynamic if e.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]:
        yield f"wanted no search path for libraries, got {', '.join(paths)}"
    table = elf.get_section_by_name(".dynsym")
    symbols = list(table.iter_symbols()) if isinstance(table, SymbolTableSection) else []
    for symbol in symbols:
        if symbol["st_shndx"] == "SHN_UNDEF" and re.search(TORCH_SYMBOL, symbol.name):
            yield f"wanted no undefined symbol of torch, got {symbol.name}"
    exported = [s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF" and s["st_info"]["bind"] != "STB_LOCAL"]
    if strange := sorted(name for name in exported if not re.fullmatch(EXPORTED, name)):
        yield f"wanted PyInit__C exported alone, got {', '.join(strange[:5])}"
    if "PyInit__C" not in exported:
        yield "wanted PyInit__C exported, got none"
    if promised := min((tuple(map(int, v)) for v in re.findall(r"manylinux_(\d+)_(\d+)", wheel.path.name)), default=()):
        versions = elf.get_section_by_name(".gnu.version_r")
        names = (
            [a.name for _, many in versions.iter_versions() for a in many] if isinstance(versions, GNUVerNeedSection) else []
        )
        glibc = max((tuple(map(int, n[6:].split("."))) for n in names if re.fullmatch(r"GLIBC_[\d.]+", n)), default=(0,))
        if glibc > promised:
            yield f"wanted no glibc newer than {'.'.join(map(str, promised))}, got symbols of {'.'.join(map(str, glibc))}"
    if wheel.has_cuda and ARCHITECTURES.encode() not in wheel.module:
        built = re.search(rb"\d\d+a?-(?:real|virtual)[-\w,]*", wheel.module)
        yield f"wanted the architectures {ARCHITECTURES}, got {built[0].decode() if built else 'none'}"


def release(path: Path, name: str, root: Path = ROOT) -> list[str]:
    """What speaks against releasing a wheel or an sdist under the git tag ``name``: not one version everywhere."""
    version = path.name.split("-")[1].removesuffix(".tar.gz")
    top = changelog.top((root / "CHANGELOG.md").read_text())[0]
    lines = []
    if name != f"v{version}":
        lines.append(f"{path.name}: wanted the git tag v{version}, got {name}")
    if top != version:
        lines.append(f"{path.name}: wanted {version} as the first heading of CHANGELOG.md, got {top}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Audit wheels: a line for everything wrong; status 1 where there is any.")
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--platform", default="manylinux", help="beginning of the platform tag")
    parser.add_argument("--tag", help="the git tag to release under: the version and the changelog must agree with it")
    arguments = parser.parse_args()
    wrong = []
    for path in arguments.wheels:
        if path.suffix == ".whl":
            wrong += complaints(path, platform=arguments.platform)
        if arguments.tag:
            wrong += release(path, arguments.tag)
        if path.suffix == ".whl" and not wrong:
            cuda = "with" if Wheel.read(path).has_cuda else "without"
            print(f"{path.name}: good, {path.stat().st_size:,} bytes, {cuda} CUDA")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()

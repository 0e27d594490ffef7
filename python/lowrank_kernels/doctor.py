"""What this installation can do and why not more: ``python -m lowrank_kernels doctor``.

The report is data, a list of :class:`Line`; it never fails: what cannot be found out is a line that says so. Nothing
beyond torch is needed to make or print it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

EXTRAS = {  # distribution -> (extra, what it is for)
    "scipy": ("estimators", "sparse input, Matrix Market files"),
    "scikit-learn": ("estimators", "estimators inside pipelines"),
    "click": ("cli", "command line"),
    "rich": ("cli", "tables and progress bars"),
    "polars": ("cli", "CSV and Parquet files"),
    "pillow": ("cli", "pictures"),
    "matplotlib": ("plot", "plots"),
}


class Line(NamedTuple):
    """One line of the report."""

    section: str
    name: str
    value: str
    note: str = ""


def report() -> list[Line]:
    """The whole report; a section that fails becomes one line with the reason."""
    lines: list[Line] = []
    sections: dict[str, Callable[[], Iterator[Line]]] = {
        "versions": _versions,
        "native": _native_module,
        "threads": _threads,
        "cuda": _cuda,
        "ops": _ops,
    }
    for name, section in sections.items():
        try:
            lines.extend(section())
        except Exception as error:
            lines.append(Line(name, "failed", type(error).__name__, str(error)))
    return lines


def _versions() -> Iterator[Line]:
    import numpy
    import torch

    from . import __file__ as package_file
    from . import __version__
    from .files import pip_install

    yield Line("versions", "lowrank_kernels", __version__, os.path.dirname(package_file or ""))
    yield Line("versions", "python", platform.python_version(), sys.executable)
    yield Line("versions", "torch", str(torch.__version__))
    yield Line("versions", "numpy", numpy.__version__)
    yield Line("versions", "system", f"{platform.system()} {platform.machine()}", " ".join(platform.libc_ver()).strip())
    for name, (extra, purpose) in EXTRAS.items():
        try:
            yield Line("versions", name, importlib.metadata.version(name), purpose)
        except importlib.metadata.PackageNotFoundError:
            yield Line("versions", name, "not installed", f"{purpose}: {pip_install(extra)}")


def _native_module() -> Iterator[Line]:
    from . import _native

    native = _native._C
    if native is None:
        yield Line("native", "module", "not loaded", f"{_native.unavailable}; everything runs on the PyTorch reference")
        return
    yield Line("native", "module", "loaded", str(getattr(native, "__file__", "")))
    yield Line("native", "compiler", _ask(native, "compiler"))
    openmp = bool(getattr(native, "openmp", False))
    yield Line("native", "OpenMP", "yes" if openmp else "no", "" if openmp else "kernels run on one thread")
    levels = _ask(native, "simd_levels")
    yield Line("native", "SIMD level", _ask(native, "simd_level"), f"this processor can run: {levels}")


def _ask(native: Any, name: str) -> str:
    """An attribute, or the answer of a function without arguments, as text; 'unknown' where an older module lacks it."""
    value = getattr(native, name, "unknown")
    try:
        value = value() if callable(value) else value
    except Exception as error:
        return f"unknown ({error})"
    return ", ".join(str(x) for x in value) if isinstance(value, (list, tuple)) else str(value)


def _threads() -> Iterator[Line]:
    import torch

    yield Line("threads", "torch threads", str(torch.get_num_threads()), "kernels use as many; torch.set_num_threads(n)")
    yield Line("threads", "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Line("threads", "processors", str(os.cpu_count()), f"{usable} usable by this process")


def _cuda() -> Iterator[Line]:
    import torch

    from . import _native

    native: Any = _native._C
    if getattr(native, "has_cuda", False):
        built = f"CUDA {_ask(native, 'cuda_version')}"
        yield Line("cuda", "kernels", "built", f"{built}, architectures {_ask(native, 'cuda_architectures')}")
        if hasattr(native, "cuda_info"):
            try:
                info = native.cuda_info()
            except Exception as error:
                info = f"unknown ({error})"
            for name, value in info.items() if isinstance(info, dict) else [("runtime", info)]:
                yield Line("cuda", str(name).replace("_", " "), str(value))
    else:
        yield Line("cuda", "kernels", "not built", _native.cuda_reason())
    yield Line("cuda", "torch's CUDA", str(torch.version.cuda or "none"), "" if torch.version.cuda else "a CPU build of torch")
    if not torch.cuda.is_available():
        yield Line("cuda", "GPU", "none usable", _why_no_gpu())
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        yield Line("cuda", f"GPU {index}", properties.name, f"{capability}, {properties.total_memory / 2**30:.1f} GiB")
        reason = _native.gpu_reason(index)
        yield Line("cuda", f"kernels on GPU {index}", "not run" if reason else "run", reason)
    driver = _driver()
    if driver:
        yield Line("cuda", "driver", driver)


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as handle:
            return handle.readline().strip()
    except OSError:
        return ""


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "torch was installed without CUDA: https://pytorch.org/get-started/locally"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1"):
        return "hidden by CUDA_VISIBLE_DEVICES"
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return "torch sees no device"


def _ops() -> Iterator[Line]:
    """Which implementation every op takes on each device: what is registered with torch's dispatcher."""
    import torch

    from . import _native, ops

    registered = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
    names = sorted(
        {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("lowrank_kernels::")}
    )
    if not names or registered is None:
        yield Line("ops", "ops", ", ".join(ops.__all__), "this torch does not tell which kernels are registered")
        return
    for name in names:
        overload = next(x for x in torch._C._dispatch_get_all_op_names() if x.split(".")[0] == name)
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            short = name.removeprefix("lowrank_kernels::").lstrip("_")
            reasons = _reasons(device)
            if not registered(overload, key):
                built = _native.has_cpu() if device == "cpu" else _native.has_cuda()
                why = "no native kernel for this op" if built else reasons[0]
                yield Line("ops", f"{short} on {device}", "PyTorch reference", why)
            elif reasons and all(reasons):
                yield Line("ops", f"{short} on {device}", "PyTorch reference", reasons[0])
            else:
                level = _ask(_native._C, "simd_level" if device == "cpu" else "cuda_architectures")
                limit = f"ranks up to {_native.MAX_RANK}; larger ones: matrix products" if "three_factor" in short else ""
                yield Line("ops", f"{short} on {device}", f"native ({level})", limit if reasons else _why_no_gpu())


def _reasons(device: str) -> list[str]:
    """Why the kernels do not run, for the CPU or for each GPU: empty strings where they do, no entry without a GPU."""
    import torch

    from . import _native

    if device == "cpu":
        return [_native.unavailable]
    if reason := _native.cuda_reason():
        return [reason]
    return [_native.gpu_reason(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def print_report(lines: list[Line] | None = None) -> None:
    """Print the report; tables where rich is installed, aligned text otherwise."""
    lines = report() if lines is None else lines
    sections: dict[str, list[Line]] = {}
    for line in lines:
        sections.setdefault(line.section, []).append(line)
    if importlib.util.find_spec("rich") is not None and sys.stdout.isatty():
        _print_rich(sections)
        return
    width = max((len(line.name) for line in lines), default=0)
    for section, members in sections.items():
        print(section)
        for line in members:
            print(f"  {line.name:<{width}}  {line.value}{f'  ({line.note})' if line.note else ''}")


def _print_rich(sections: dict[str, list[Line]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for section, members in sections.items():
        table.add_row(Text(section, style="bold"))
        for line in members:
            bad = line.value.startswith(("not ", "none", "failed", "no"))
            table.add_row(
                Text("  " + line.name), Text(line.value, style="yellow" if bad else "green"), Text(line.note, style="dim")
            )
    Console().print(table)

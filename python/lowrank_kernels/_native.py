"""The only caller of the native module ``_C``: loads it, says why when it cannot, and turns tensors into pointers.

``LOWRANK_KERNELS_NATIVE=0`` in the environment skips loading; everything then runs on the PyTorch reference. So it does, with
one warning at import, where the module is missing or broken.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .entries import LONG_ROW, SortedEntries


def _cut_off(path: Path) -> bool:
    """True for an ELF file that ends before its own table of sections does: loading it would stop the process."""
    head = path.read_bytes()[:64]
    if len(head) < 64 or not head.startswith(b"\x7fELF\x02\x01"):
        return False  # other systems, and what the loader refuses by itself
    start, entry, count = (int.from_bytes(head[a:b], "little") for a, b in ((0x28, 0x30), (0x3A, 0x3C), (0x3C, 0x3E)))
    return path.stat().st_size < start + entry * count


def _load() -> tuple[ModuleType | None, str]:
    """The native module, or why it is not there. Whatever is wrong with it, the import of the package goes on."""
    if os.environ.get("LOWRANK_KERNELS_NATIVE", "1") == "0":
        return None, "switched off by LOWRANK_KERNELS_NATIVE=0"
    wrong = ""
    try:
        found = find_spec(f"{__package__}._C")
        if found is None:
            others = sorted(path.name for path in Path(__file__).parent.glob("_C.*[!i]"))
            here = f"{sys.implementation.cache_tag} on {platform.machine()}"
            wrong = f"there is none for {here}, only {', '.join(others)}" if others else "it is missing"
        elif _cut_off(Path(found.origin or "")):
            wrong = f"{found.origin} is cut off"
        else:
            from . import _C

            _C.simd_level(), _C.simd_bytes(), _C.max_rank, _C.has_cuda, _C.cuda_architectures
            return _C, ""
    except Exception as error:
        wrong = " ".join(str(error).split())
    reason = f"the compiled module {__package__}._C did not load: {wrong}"
    step = "pip install --force-reinstall --no-deps lowrank-kernels"
    if "libgomp" in wrong:  # a torch without it: one built against another OpenMP
        step = "install libgomp (Debian: libgomp1, Fedora: libgomp)"
    warnings.warn(f"lowrank_kernels: everything runs on the PyTorch reference, {reason}; {step}", stacklevel=2)
    return None, reason


if TYPE_CHECKING:
    from . import _C

    unavailable = ""
else:
    _C, unavailable = _load()  # `unavailable` is the reason, empty when the module is there
_SIMD_BYTES = 0 if _C is None else int(_C.simd_bytes())  # constants: torch.compile reads them, it cannot call into _C
MIN_CAPABILITY = (8, 0)  # the oldest GPU architecture the CUDA kernels are compiled for
_HAS_CUDA = _C is not None and bool(_C.has_cuda) and torch.version.hip is None


def has_cpu() -> bool:
    """True where the native module is loaded."""
    return _C is not None


def has_cuda() -> bool:
    """True where the CUDA kernels were built; "cuda" devices of a ROCm torch are not for them."""
    return _HAS_CUDA


def _has_code(capability: tuple[int, int], architecture: str) -> bool:
    """True where the code of an architecture, as CMake writes it, runs on a GPU of this compute capability."""
    number, _, kind = architecture.partition("-")
    digits = number.rstrip("af")
    if not digits.isdecimal():
        return True  # a word as "all": the launch will tell
    built = divmod(int(digits), 10)
    if number.endswith("a"):  # specific to that one architecture
        return capability == built
    if kind == "real" or number.endswith("f"):  # machine code
        return capability[0] == built[0] and capability[1] >= built[1]
    return capability >= built  # PTX: the driver compiles it


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_reason() -> str:
    """Why the CUDA kernels run on no GPU whatsoever, and what to do; empty where they may."""
    if _C is None:
        return unavailable
    if torch.version.hip is not None:
        return "this torch is built for ROCm, the kernels for CUDA; they need an NVIDIA GPU and a CUDA build of torch"
    if not _C.has_cuda:
        why = getattr(_C, "no_cuda", "built without CUDA")
        return f"{why}; reinstall from source where nvcc is: LRK_CUDA=ON pip install ."
    return ""


@cache
def gpu_reason(index: int) -> str:
    """Why the CUDA kernels do not run on this GPU, and what to do; empty where they do."""
    if reason := cuda_reason():
        return reason
    capability = torch.cuda.get_device_capability(index)
    name = ".".join(map(str, capability))
    if capability < MIN_CAPABILITY:
        return f"compute capability {name}, the kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}; use a newer GPU"
    fitting = [code for code in _C.cuda_architectures.split(",") if _has_code(capability, code)]
    if not fitting:
        return (
            f"compute capability {name}, the module has code for {_C.cuda_architectures} only; reinstall from source with "
            f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={name.replace('.', '')}"
        )
    info = cuda_info()
    driver, toolkit = info["driver_version"], info["runtime_version"]
    # Within a major version an older driver runs the machine code of a newer toolkit, but does not compile its PTX.
    machine_code = any(code.endswith("-real") for code in fitting)
    if driver and (driver // 1000 < toolkit // 1000 or (driver < toolkit and not machine_code)):
        return (
            f"the driver supports CUDA {_version(driver)}, the module was built with {_version(toolkit)}; update the driver, "
            f"or reinstall from source with a toolkit not newer than {_version(driver)}"
        )
    return str(info["reason"])


@cache
def _gpu_serves(index: int) -> bool:
    reason = gpu_reason(index)
    if reason and _C is not None:  # a module that is not there was told of at import
        warnings.warn(
            f"lowrank_kernels: the PyTorch reference takes the place of the CUDA kernels on GPU {index}: {reason}", stacklevel=4
        )
    return not reason


def serves(device: torch.device) -> bool:
    """True where a native kernel runs on the device: the CPU, or a GPU the kernels run on; once for each GPU where they do
    not, a warning says why. Not for code that torch.compile traces."""
    if device.type == "cpu":
        return _C is not None
    return device.type == "cuda" and _gpu_serves(torch.cuda.current_device() if device.index is None else device.index)


def factor_lanes(dtype: torch.dtype, device: torch.device) -> int:
    """Kernels read factor rows in whole vectors: their width is zero-padded to a multiple of this.

    On the CPU that of the best SIMD level, which the lower ones divide.
    """
    element = 8 if dtype == torch.float64 else 4
    if device.type == "cpu" and has_cpu():
        return _SIMD_BYTES // element
    return 16 // element if device.type == "cuda" and has_cuda() else 1


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def cuda_info() -> dict[str, Any]:
    """Device count, driver and runtime version of CUDA, and the reason when its kernels cannot run (else empty)."""
    if _C is None:
        return {"device_count": 0, "driver_version": 0, "runtime_version": 0, "reason": unavailable}
    return dict(_C.cuda_info())


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor or a copy of it: contiguous, and on a GPU 16-byte aligned, which a slice of a flat buffer may not be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.device.type == "cuda" and tensor.data_ptr() % 16 else tensor


def completion_pass(
    side: SortedEntries,
    own: Tensor,  # (M, K), K a multiple of factor_lanes()
    other: Tensor,  # (N, K)
    own_bias: Tensor | None,  # (M,)
    other_bias: Tensor | None,  # (N,)
    offset: float,
    want_loss: bool = True,
    want_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, ``own_grad`` (M, K), ``own_bias_grad`` (M,) and ``own_loss`` (M,) of one pass; see csrc/completion.h.

    Without ``want_loss`` the first is empty, without ``want_grad`` the other three.
    """
    own, other = _aligned(own), _aligned(other)
    own_bias = None if own_bias is None else own_bias.contiguous()
    other_bias = None if other_bias is None else other_bias.contiguous()
    on_cuda = own.device.type == "cuda"
    own_grad = torch.empty_like(own) if want_grad else own.new_empty(0)
    own_bias_grad, own_loss = (own.new_empty(own.shape[0] if want_grad else 0) for _ in range(2))
    parts = own.new_empty(side.plan.shape[0] - 1 if want_loss and not on_cuda else 0, dtype=torch.float64)
    arguments = _C.CompletionArguments(
        own.shape[0],
        other.shape[0],
        side.values.shape[0],
        own.shape[1],
        side.offsets.data_ptr(),
        side.indices.data_ptr(),
        side.values.data_ptr(),
        _pointer(side.weights),
        own.data_ptr(),
        other.data_ptr(),
        _pointer(own_bias),
        _pointer(other_bias),
        offset,
        side.plan.data_ptr(),
        side.plan.shape[0],
        side.long_count,
        LONG_ROW,
        parts.data_ptr(),
        own_grad.data_ptr(),
        own_bias_grad.data_ptr(),
        own_loss.data_ptr(),
    )
    types = own.dtype == torch.float64, side.indices.dtype == torch.int64
    loss = own.new_empty(() if want_loss else 0)
    if not on_cuda:
        _C.completion_cpu(*types, arguments, loss.data_ptr(), torch.get_num_threads())
        return loss, own_grad, own_bias_grad, own_loss
    # Workspace and outputs come from torch, on the stream that uses them: its allocator may reuse them as soon as we return.
    workspace = own.new_empty(_C.completion_cuda_workspace(*types, arguments, want_loss), dtype=torch.uint8)
    device = own.device.index
    with _device_guard(device):
        stream = torch._C._cuda_getCurrentRawStream(device)  # absent in CPU builds of torch
        _C.completion_cuda(*types, arguments, workspace.data_ptr(), loss.data_ptr(), device, stream)
    return loss, own_grad, own_bias_grad, own_loss


def _device_guard(index: int) -> AbstractContextManager[Any]:
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/three_factor.h
MAX_RANK = 0 if _C is None else int(_C.max_rank)


def three_factor_serves(x: Tensor, left: Tensor) -> bool:
    """True where the native kernels take the three-factor op, False where the chain of matrix products is as fast."""
    return left.shape[1] <= MAX_RANK and serves(x.device)


def _rows(x: Tensor) -> Tensor:
    """x ``(T, N)`` or a copy of it: unit stride inside a row, any pitch between rows that no two rows share."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _three_factor_arguments(
    x: Tensor, left: Tensor, core: Tensor | None, right: Tensor, scale: float, shift: float, threshold: int, seed: Tensor | None
) -> Any:
    return _C.ThreeFactorArguments(
        x.shape[0],
        x.shape[1],
        left.shape[0],
        left.shape[1],
        0 if core is None else core.shape[0],
        _DTYPES[x.dtype],
        _DTYPES[left.dtype],
        x.data_ptr(),
        x.stride(0),
        left.data_ptr(),
        _pointer(core),
        right.data_ptr(),
        scale,
        shift,
        threshold,
        _pointer(seed),
    )


def three_factor_forward(
    x: Tensor,  # (T, N)
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    bias: Tensor | None,
    scale: float,
    shift: float,
    threshold: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``y0`` (T, M) and ``z`` (2, T, K) of csrc/three_factor.h."""
    x, left, right = _rows(x), left.contiguous(), right.contiguous()
    core, bias = None if core is None else core.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(x.shape[0], left.shape[0])
    z = x.new_empty(2, x.shape[0], left.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    arguments = _three_factor_arguments(x, left, core, right, scale, shift, threshold, seed)
    pointers = (_pointer(bias), y.data_ptr(), z.data_ptr())
    if x.device.type == "cuda":
        _three_factor_cuda(_C.three_factor_forward_cuda, x, arguments, False, *pointers)
    else:
        _C.three_factor_forward_cpu(arguments, *pointers, torch.get_num_threads())
    return y, z


def three_factor_backward(
    dy: Tensor,  # (T, M)
    x: Tensor,  # (T, N)
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    z: Tensor,
    scale: float,
    shift: float,
    threshold: int,
    seed: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dx0`` (T, N), ``dleft``, ``dcore`` and ``dright`` of csrc/three_factor.h; empty where not wanted."""
    x, dy, left, right = _rows(x), _rows(dy), left.contiguous(), right.contiguous()
    core, z = None if core is None else core.contiguous(), z.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else x.new_empty(0)
    dleft = torch.empty_like(left) if wanted[1] else left.new_empty(0)
    dcore = torch.empty_like(core) if wanted[2] and core is not None else left.new_empty(0)
    dright = torch.empty_like(right) if wanted[3] else left.new_empty(0)
    arguments = _three_factor_arguments(x, left, core, right, scale, shift, threshold, seed)
    outputs = (dx.data_ptr(), dleft.data_ptr(), dcore.data_ptr(), dright.data_ptr())
    pointers = (dy.data_ptr(), dy.stride(0), z.data_ptr(), *outputs)
    if x.device.type == "cuda":
        _three_factor_cuda(_C.three_factor_backward_cuda, x, arguments, True, *pointers)
    else:
        _C.three_factor_backward_cpu(arguments, *pointers, torch.get_num_threads())
    return dx, dleft, dcore, dright


def _three_factor_cuda(run: Any, x: Tensor, arguments: Any, backward: bool, *pointers: int) -> None:
    """Queue one direction on x's device; workspace from torch's allocator, on the stream that uses it."""
    workspace = x.new_empty(_C.three_factor_cuda_workspace(arguments, backward), dtype=torch.uint8)
    device = x.device.index
    with _device_guard(device):
        run(arguments, *pointers, workspace.data_ptr(), device, torch._C._cuda_getCurrentRawStream(device))

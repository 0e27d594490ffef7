"""The only caller of the native module ``_C``: loads it, says why when it cannot, and turns tensors into pointers.

``LOWRANK_KERNELS_NATIVE=0`` in the environment skips loading; everything then runs on the PyTorch reference.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .entries import SortedEntries


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("LOWRANK_KERNELS_NATIVE", "1") == "0":
        return None, "switched off by LOWRANK_KERNELS_NATIVE=0"
    try:
        from . import _C
    except ImportError as error:
        return None, f"the compiled module lowrank_kernels._C did not load: {error}"
    return _C, ""


_C: Any
_C, unavailable = _load()  # `unavailable` is the reason, empty when the module is there
_SIMD_BYTES = 0 if _C is None else int(_C.simd_bytes())  # constants: torch.compile reads them, it cannot call into _C
_HAS_CUDA = _C is not None and bool(_C.has_cuda)


def has_cpu() -> bool:
    """True where the native module is loaded."""
    return _C is not None


def has_cuda() -> bool:
    """True where the CUDA kernels were built."""
    return _HAS_CUDA


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


def completion_pass(
    side: SortedEntries,
    own: Tensor,  # (M, K), contiguous, K a multiple of factor_lanes()
    other: Tensor,  # (N, K), contiguous
    own_bias: Tensor | None,  # (M,)
    other_bias: Tensor | None,  # (N,)
    offset: float,
    loss_parts: Tensor | None,  # float64
    own_grad: Tensor | None,  # (M, K)
    own_bias_grad: Tensor | None,  # (M,)
    own_loss: Tensor | None,  # (M,)
) -> None:
    """One pass of csrc/completion.h over ``side``; outputs are written in place."""
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
        _pointer(loss_parts),
        _pointer(own_grad),
        _pointer(own_bias_grad),
        _pointer(own_loss),
    )
    is_double, wide_index = own.dtype == torch.float64, side.indices.dtype == torch.int64
    _C.completion_cpu(is_double, wide_index, arguments, torch.get_num_threads())

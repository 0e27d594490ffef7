"""The one ``torch.library`` of the package, and what its ops share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

# Ops die with their Library object, so it lives as long as the module.
library = torch.library.Library("lowrank_kernels", "DEF")

# Under vmap, grad and the other function transforms tensors are wrappers that look like plain tensors and have no data;
# a private name of torch, so its absence must not break the import. Always ask it first: behind any other condition
# torch.compile(torch.func.grad(f)) returned zeros.
functorch_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
if torch.__version__ < "2.6":  # torch.compile of 2.4 cannot trace the question: it is asked while tracing

    def _asked_while_tracing(ask: Callable[[], bool] = functorch_active) -> bool:
        return ask()

    _asked_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch._dynamo.assume_constant_result
    functorch_active = _asked_while_tracing


def forward_ad_active() -> bool:
    """True inside ``forward_ad.dual_level``: a private op would drop the tangents of its arguments without a word."""
    return getattr(forward_ad, "_current_level", -1) >= 0


_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def eager(*tensors: torch.Tensor) -> bool:
    """True where a kernel may be called without the dispatcher (20 us a call): plain tensors, nothing traces or intercepts."""
    if torch.compiler.is_compiling() or _dispatch_modes() or torch._C._is_tracing():
        return False
    return all(type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter for tensor in tensors)


# One question for all devices, 3 us less a call; a private name, so its absence must not break the import.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def autocast_enabled(device_type: str) -> bool:
    return any_autocast() and device_type != "meta" and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else nullcontext()


def define(schema: str) -> None:
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def same(op: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors share one dtype, float32 or float64, and one device; else an error names the one that does not."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} must be float32 or float64, got {tensor.dtype}; convert it with .to(torch.float32)")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def shaped(op: str, name: str, tensor: torch.Tensor, words: str, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{op}: {name} must be {words} = {wanted}, got {tuple(tensor.shape)}")

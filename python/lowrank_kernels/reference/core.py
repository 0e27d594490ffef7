"""The inner factors of every deep low-rank model here: their product and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def core_product(core: Tensor | None, shift: float = 0.0) -> Tensor | None:
    """``core[L-1] @ ... @ core[0] - shift I`` of a ``(L, k, k)`` core; None (the identity) for no core or L = 0."""
    if core is None or core.shape[0] == 0:
        return None
    first, *others = core.unbind()
    for layer in others:
        first = layer @ first
    return first if shift == 0 else first - shift * torch.eye(len(first), dtype=first.dtype, device=first.device)


def core_gradients(core: Tensor, grad_product: Tensor) -> Tensor:
    """``dC_l = (C_L ... C_{l+1})^T dC (C_{l-1} ... C_1)^T`` for every l, stacked as ``core``; 3 L - 4 small products.

    Source: Yaras et al., ICML 2024, equation (14) on the compressed factors.
    """
    depth = core.shape[0]
    if depth == 0:
        return torch.zeros_like(core)  # not core itself: an op must not return its argument
    layers = core.unbind()
    prefixes = [layers[0]]  # prefixes[l] = core[l] @ ... @ core[0]
    for layer in layers[1:-1]:
        prefixes.append(layer @ prefixes[-1])
    grads = []  # from the last layer on; torch.compile of 2.6 with dynamic shapes cannot write into a list by index
    for index in range(depth - 1, 0, -1):
        grads.append(grad_product @ prefixes[index - 1].t())
        grad_product = layers[index].t() @ grad_product
    return torch.stack([grad_product, *reversed(grads)])

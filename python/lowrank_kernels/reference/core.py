"""The inner factors of every deep low-rank model here: their product and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def core_product(core: Tensor | None) -> Tensor | None:
    """``core[L-1] @ ... @ core[0]`` of a ``(L, k, k)`` core; None (the identity) for no core or L = 0."""
    if core is None or core.shape[0] == 0:
        return None
    product = core[0]
    for layer in core[1:]:
        product = layer @ product
    return product


def core_gradients(core: Tensor, grad_product: Tensor) -> Tensor:
    """``dC_l = (C_L ... C_{l+1})^T dC (C_{l-1} ... C_1)^T`` for every l, stacked as ``core``; 2 L small products.

    Source: Yaras et al., ICML 2024, equation (14) on the compressed factors.
    """
    prefixes: list[Tensor | None] = [None]  # prefixes[l] = core[l-1] @ ... @ core[0]
    for layer in core[:-1]:
        before = prefixes[-1]
        prefixes.append(layer if before is None else layer @ before)
    grads = []
    for layer, prefix in zip(reversed(core.unbind()), reversed(prefixes), strict=True):
        grads.append(grad_product if prefix is None else grad_product @ prefix.t())
        grad_product = layer.t() @ grad_product
    return torch.stack(grads[::-1])

"""Reference of the three-factor linear layer, in plain PyTorch: specification, test oracle, bench baseline and fallback.

    y = x W^T + b + s * (((drop(x) R^T) C^T) L^T),    C = core[L-1] @ ... @ core[0] - shift I

Source: Yaras et al., ICML 2024, arXiv:2406.04112, section 4; without a core it is LoRA (Hu et al., arXiv:2106.09685).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .core import core_product

_WORD = 0xFFFFFFFF


def three_factor_linear(
    x: Tensor,  # (*, N)
    weight: Tensor | None,  # (M, N)
    left: Tensor,  # (M, k)
    core: Tensor | None,  # (L, k, k)
    right: Tensor,  # (k, N)
    *,
    bias: Tensor | None = None,  # (M,)
    scale: float = 1.0,
    shift: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """A linear layer plus a low-rank three-factor update; see :func:`lowrank_kernels.ops.three_factor_linear`."""
    seed = dropout_seed(x.device) if drop_threshold(dropout_p) > 0 else None
    return seeded_three_factor_linear(x, weight, left, core, right, bias, scale, shift, dropout_p, seed)


def seeded_three_factor_linear(
    x: Tensor,
    weight: Tensor | None,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    bias: Tensor | None,
    scale: float,
    shift: float,
    dropout_p: float,
    seed: Tensor | None,  # (1,) int64; None without dropout
) -> Tensor:
    """:func:`three_factor_linear` with the dropout mask of a given seed. Factors are used in the dtype of x."""
    dropped = x if seed is None else x * dropout_mask(seed, x, dropout_p)
    z = F.linear(dropped, right.to(x.dtype))  # (*, k)
    product = core_product(core, shift)
    if product is not None:
        z = F.linear(z, product.to(x.dtype))
    y = scale * F.linear(z, left.to(x.dtype))  # (*, M)
    if weight is not None:
        return F.linear(x, weight, bias) + y
    return y if bias is None else y + bias


def dropout_seed(device: torch.device) -> Tensor:
    """A seed drawn from torch's generator of the device, ``(1,)`` int64; it stays there, so CUDA graphs can replay it."""
    return torch.randint(0, 2**62, (1,), device=device)


def drop_threshold(dropout_p: float) -> int:
    """An element is dropped where its 16 random bits are below this; its probability is this / 65536."""
    return min(max(round(65536 * dropout_p), 0), 65536)


def dropout_mask(seed: Tensor, x: Tensor, dropout_p: float) -> Tensor:
    """0 or ``1 / (1 - p)`` for every element of x ``(*, N)``, from Philox4x32-10 as csrc/three_factor.h says."""
    threshold = drop_threshold(dropout_p)
    if threshold == 65536:
        return torch.zeros_like(x)
    n = x.shape[-1]
    groups = (n + 7) // 8
    rows = torch.arange(x[..., 0].numel() if n else 0, device=x.device)[:, None]
    c0 = torch.arange(groups, device=x.device).expand(rows.shape[0], groups)
    words = philox((c0, rows & _WORD, rows >> 32, torch.zeros_like(c0)), (seed & _WORD, (seed >> 32) & _WORD))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)  # (T, groups, 8)
    kept = (halves >= threshold).reshape(rows.shape[0], 8 * groups)[:, :n].reshape(x.shape)
    return kept.to(x.dtype) * (65536 / (65536 - threshold))


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 random bits, as int64, for every counter. Salmon et al., SC 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for number in range(10):
        if number:
            k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
        low = 0xD2511F53 * c0  # int64 wraps around; its bits are those of the unsigned product
        high = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((high >> 32) & _WORD) ^ c1 ^ k0, high & _WORD, ((low >> 32) & _WORD) ^ c3 ^ k1, low & _WORD
    return c0, c1, c2, c3

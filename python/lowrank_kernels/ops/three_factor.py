"""A linear layer plus a low-rank three-factor update, ``y = x W^T + b + s * ((drop(x) R^T) C^T) L^T``.

The private ops ``_three_factor_forward`` and ``_three_factor_backward`` write the update first (csrc/three_factor.h) and let
the vendor's BLAS add the base product in place, so nothing of the size of y or x is written twice. Backward keeps x and the
two (T, k) products; the dropout mask is made again from its seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.core import core_gradients, core_product
from ..reference.three_factor import (
    drop_threshold,
    dropout_mask,
    dropout_seed,
    seeded_three_factor_linear,
)
from .registry import autocast_enabled, define, eager, forward_ad_active, functorch_active, library, no_autocast

FACTOR_TYPES = {  # dtype of x -> dtypes of the factors
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}

define(
    "_three_factor_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor left, Tensor? core, Tensor right, "
    "float scale, float shift, float dropout_p, Tensor? seed) -> (Tensor y, Tensor z)"
)
define(
    "_three_factor_backward(Tensor dy, Tensor x, Tensor? weight, Tensor left, Tensor? core, Tensor right, Tensor z, "
    "float scale, float shift, float dropout_p, Tensor? seed, bool[4] wanted) "
    "-> (Tensor dx, Tensor dleft, Tensor dcore, Tensor dright)"
)
_forward_op = torch.ops.lowrank_kernels._three_factor_forward.default
_backward_op = torch.ops.lowrank_kernels._three_factor_backward.default

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
Wanted = tuple[bool, bool, bool, bool]  # dx, dleft, dcore, dright


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------- the ops' kernels


def _forward_chain(
    x: Tensor,  # (T, N)
    weight: Tensor | None,
    bias: Tensor | None,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    scale: float,
    shift: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The addmm chain: matrix products of the vendor's BLAS, factors rounded to the dtype of x, never x to theirs."""
    dtype = x.dtype
    dropped = x if seed is None else x * dropout_mask(seed, x, dropout_p)
    z1 = dropped @ right.to(dtype).t()
    product = core_product(core, shift)
    z2 = (z1 if product is None else z1 @ product.to(dtype).t()) * scale
    y = z2 @ left.to(dtype).t() if bias is None else torch.addmm(bias, z2, left.to(dtype).t())
    if weight is not None:
        y.addmm_(x, weight.t())
    return y, torch.stack([z1, z2]).to(_wide(dtype))


def _backward_chain(
    dy: Tensor,  # (T, M)
    x: Tensor,  # (T, N)
    weight: Tensor | None,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    z: Tensor,  # (2, T, k)
    scale: float,
    shift: float,
    dropout_p: float,
    seed: Tensor | None,
    wanted: list[bool],
) -> Gradients:
    dtype = x.dtype
    want_dx, want_dleft, want_dcore, want_dright = wanted
    dx, dleft, dcore, dright = x.new_empty(0), left.new_empty(0), left.new_empty(0), right.new_empty(0)
    mask = dropout_mask(seed, x, dropout_p) if seed is not None and (want_dx or want_dright) else None
    z1, z2 = z.to(dtype)
    if want_dleft:
        dleft = (dy.t() @ z2).to(left.dtype)
    if want_dx or want_dcore or want_dright:
        g2 = dy @ left.to(dtype) * scale
        product = core_product(core, shift)
        g1 = g2 if product is None else g2 @ product.to(dtype)
        if want_dcore and core is not None:
            dcore = core_gradients(core, (g2.t() @ z1).to(core.dtype))
        if want_dright:
            dright = (g1.t() @ (x if mask is None else x * mask)).to(right.dtype)
        if want_dx:
            dx = g1 @ right.to(dtype)
            if mask is not None:
                dx = dx * mask
            if weight is not None:
                dx.addmm_(dy, weight)
    return dx, dleft, dcore, dright


def _forward_native(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    scale: float,
    shift: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not _native.three_factor_serves(x, left):
        return _forward_chain(x, weight, bias, left, core, right, scale, shift, dropout_p, seed)
    threshold = 0 if seed is None else drop_threshold(dropout_p)
    y, z = _native.three_factor_forward(x, left, core, right, bias, scale, shift, threshold, seed)
    if weight is not None:
        y.addmm_(x, weight.t())
    return y, z


def _backward_native(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    z: Tensor,
    scale: float,
    shift: float,
    dropout_p: float,
    seed: Tensor | None,
    wanted: list[bool],
) -> Gradients:
    if not _native.three_factor_serves(x, left):
        return _backward_chain(dy, x, weight, left, core, right, z, scale, shift, dropout_p, seed, wanted)
    threshold = 0 if seed is None else drop_threshold(dropout_p)
    grads = _native.three_factor_backward(dy, x, left, core, right, z, scale, shift, threshold, seed, wanted)
    if wanted[0] and weight is not None:
        grads[0].addmm_(dy, weight)
    return grads


def _fake_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, left: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, (out_features, rank) = x.shape[0], left.shape
    return x.new_empty(tokens, out_features), x.new_empty(2, tokens, rank, dtype=_wide(x.dtype))


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    *rest: Any,
) -> Gradients:
    dx, dleft, dcore, dright = rest[-1]
    return (
        x.new_empty(x.shape if dx else 0),
        left.new_empty(left.shape if dleft else 0),
        left.new_empty(core.shape if dcore and core is not None else 0),
        right.new_empty(right.shape if dright else 0),
    )


library.impl("_three_factor_forward", _forward_chain, "CompositeExplicitAutograd")
library.impl("_three_factor_backward", _backward_chain, "CompositeExplicitAutograd")
for _device, _built in (("CPU", _native.has_cpu()), ("CUDA", _native.has_cuda())):
    if _built:
        library.impl("_three_factor_forward", _forward_native, _device)
        library.impl("_three_factor_backward", _backward_native, _device)
torch.library.register_fake("lowrank_kernels::_three_factor_forward", _fake_forward, lib=library)
torch.library.register_fake("lowrank_kernels::_three_factor_backward", _fake_backward, lib=library)


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])  # -1 is ambiguous for empty x


def _forward(
    x: Tensor,  # (*, N)
    weight: Tensor | None,
    bias: Tensor | None,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    scale: float,
    shift: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y with x's leading dimensions, and z ``(2, T, k)``."""
    flat = _flat(x)
    run = _forward_native if eager(flat, left) and _native.serves(x.device) else _forward_op
    y, z = run(flat, weight, bias, left, core, right, scale, shift, dropout_p, seed)
    if x.ndim == 2:
        return y, z
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if torch.compiler.is_compiling() else y.data, z  # no view for autograd: what follows may work in place


class _ThreeFactorLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        left: Tensor,
        core: Tensor | None,
        right: Tensor,
        scale: float,
        shift: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        y, z = _forward(x, weight, bias, left, core, right, scale, shift, dropout_p, seed)
        ctx.save_for_backward(x, weight, left, core, right, z, seed)
        ctx.scale, ctx.shift, ctx.dropout_p = scale, shift, dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, core, right, z, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with no_autocast(dy.device.type):
            if torch.is_grad_enabled():  # create_graph=True: by formulas autograd can differentiate again
                return _differentiable_gradients(ctx, dy, x, weight, left, core, right, seed)
            flat_dy, flat_x = _flat(dy), _flat(x)
            dx, dleft, dcore, dright = None, None, None, None
            wanted = [needs[0], needs[3], needs[4], needs[5]]
            if any(wanted):
                run = _backward_native if eager(flat_dy, flat_x, left) and _native.serves(x.device) else _backward_op
                dx, dleft, dcore, dright = run(
                    flat_dy, flat_x, weight, left, core, right, z, ctx.scale, ctx.shift, ctx.dropout_p, seed, wanted
                )
            return (
                dx.view(x.shape) if needs[0] else None,  # type: ignore[union-attr]
                flat_dy.t() @ flat_x if needs[1] else None,
                flat_dy.sum(0) if needs[2] else None,
                dleft if needs[3] else None,
                dcore if needs[4] else None,
                dright if needs[5] else None,
                *(None,) * 4,
            )


def _differentiable_gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    seed: Tensor | None,
) -> tuple[Tensor | None, ...]:
    # Views: where one argument depends on another, grad() would else count that path twice.
    views: list[Any] = [None if v is None else v.view_as(v) for v in (x, weight, left, core, right)]
    x_, weight_, left_, core_, right_ = views
    y = seeded_three_factor_linear(x_, weight_, left_, core_, right_, None, ctx.scale, ctx.shift, ctx.dropout_p, seed)
    needs = ctx.needs_input_grad
    order = (needs[0], needs[1], needs[3], needs[4], needs[5])
    inputs: list[Any] = [v for v, need in zip(views, order, strict=True) if need]
    found = torch.autograd.grad(y, inputs, dy, create_graph=True, materialize_grads=True) if inputs else ()
    grads = iter(found)
    dx, dweight, dleft, dcore, dright = (next(grads) if need else None for need in order)
    return (
        dx,
        dweight,
        _flat(dy).sum(0) if needs[2] else None,
        dleft,
        dcore,
        dright,
        *(None,) * 4,
    )


# ---------------------------------------------------------------------- checks


def _check(
    x: Tensor,
    weight: Tensor | None,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    bias: Tensor | None,
    scale: float,
    shift: float,
    dropout_p: float,
) -> None:
    op = "three_factor_linear"
    given = {"x": x, "left": left, "right": right, "weight": weight, "core": core, "bias": bias}
    for name, value in given.items():
        if not isinstance(value, Tensor) and (value is not None or name in ("x", "left", "right")):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if x.ndim == 0 or left.ndim != 2 or right.ndim != 2:
        name, wanted = ("x", "(*, in_features)") if x.ndim == 0 else ("left", "(out_features, rank)")
        name, wanted = (name, wanted) if x.ndim == 0 or left.ndim != 2 else ("right", "(rank, in_features)")
        raise ValueError(f"{op}: {name} must be {wanted}, got shape {tuple(given[name].shape)}")  # type: ignore[union-attr]
    (m, k), n = left.shape, x.shape[-1]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "right": ("(rank, in_features)", (k, n)),
        "weight": ("(out_features, in_features)", (m, n)),
        "bias": ("(out_features,)", (m,)),
    }
    if core is not None:
        depth = core.shape[0] if core.ndim else 0
        shapes["core"] = ("(depth, rank, rank)", (depth, k, k))
    for name, (words, wanted_shape) in shapes.items():
        tensor = given[name]
        if tensor is not None and tensor.shape != wanted_shape:
            hint = f" (x has {n} features, left is {tuple(left.shape)})"
            raise ValueError(f"{op}: {name} must be {words} = {wanted_shape}, got {tuple(tensor.shape)}{hint}")
    if k < 1:
        raise ValueError(f"{op}: left must be (out_features, rank) with a rank of at least 1, got {tuple(left.shape)}")
    if x.dtype not in FACTOR_TYPES:
        raise TypeError(f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    allowed = FACTOR_TYPES[x.dtype]
    for name in ("weight", "bias", "left", "core", "right"):
        tensor = given[name]
        if tensor is None:
            continue
        if name in ("weight", "bias"):
            if tensor.dtype != x.dtype:
                raise TypeError(f"{op}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
        elif tensor.dtype != left.dtype or tensor.dtype not in allowed:
            words = " or ".join(str(dtype) for dtype in allowed)
            raise TypeError(
                f"{op}: {name} must be {words} for x of {x.dtype}, the same as left ({left.dtype}), got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}; move it with .to()")
    if isinstance(scale, Tensor):
        raise TypeError(f"{op}: scale must be a number, got a tensor; it has no gradient: multiply left by it")
    if isinstance(shift, Tensor):
        raise TypeError(f"{op}: shift must be a number, got a tensor; it has no gradient")
    if shift and (core is None or not core.shape[0]):
        raise ValueError(f"{op}: shift is subtracted from the product of the cores, and there is no core; got shift={shift}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p must be from 0 to 1, got {dropout_p}")


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """As F.linear does under autocast: what is not float64 becomes the autocast dtype."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *others)
    )


def three_factor_linear(
    x: Tensor,
    weight: Tensor | None,
    left: Tensor,
    core: Tensor | None,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    r"""Apply a linear layer plus a low-rank three-factor update.

    .. math:: y = x W^T + b + s\,(((\mathrm{drop}(x) R^T) C^T) L^T), \qquad C = core_{L-1} \cdots core_0 - \tau I

    Args:
        x: ``(*, in_features)``; float32, float64, bfloat16 or float16.
        weight: ``(out_features, in_features)`` in the dtype of x, or None: the update alone.
        left: ``(out_features, rank)`` L; in the dtype of x, or float32 for bfloat16 and float16 x, as ``core`` and ``right``.
        core: ``(depth, rank, rank)``, or None: ``left @ right``, as in LoRA.
        right: ``(rank, in_features)`` R.
        bias: ``(out_features,)`` in the dtype of x, or None.
        scale: s, a number.
        shift: tau, a number: what the product of the cores starts as, say, so that the update starts at zero.
        dropout_p: probability to drop an element of x before R, rounded to a multiple of 1 / 65536; the others are divided by
            the probability to stay. The caller passes 0 outside training.

    Returns:
        ``(*, out_features)`` in the dtype of x.

    Raises:
        ValueError: shapes that do not chain, devices that differ, a probability outside [0, 1].
        TypeError: dtypes that do not go together.

    Note:
        Differentiable in every tensor argument, only what needs a gradient is computed; second derivatives, forward mode and
        ``torch.func`` transforms go through :func:`lowrank_kernels.reference.three_factor_linear`. Saved for backward are x
        and 2 T rank float32 numbers (float64 for float64) beside the parameters; x is never cast up, and the dropout mask is
        made again from a seed drawn from torch's generator. Sums are float32 (float64), rounded once; results repeat bitwise
        and do not depend on the number of threads, as far as the BLAS of the base product does not. Under autocast x,
        weight and bias are cast as by ``F.linear``, float32 factors stay.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> x, weight = torch.ones(1, 3), torch.zeros(2, 3)
        >>> left, core, right = torch.ones(2, 1), torch.full((3, 1, 1), 2.0), torch.ones(1, 3)
        >>> lrk.ops.three_factor_linear(x, weight, left, core, right, bias=torch.tensor([1.0, 2.0]))
        tensor([[25., 26.]])

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, section 4; without a core Hu et al., arXiv:2106.09685.
    """
    device_type = x.device.type if isinstance(x, Tensor) else "meta"  # of what is no tensor _check() will complain
    if autocast_enabled(device_type):
        x, weight, bias = _autocast(x, weight, bias)  # type: ignore[assignment]
        if left.dtype not in FACTOR_TYPES.get(x.dtype, (left.dtype,)):
            left, core, right = _autocast(left, core, right)  # type: ignore[assignment]
        with torch.autocast(device_type, enabled=False):
            return three_factor_linear(x, weight, left, core, right, bias=bias, scale=scale, shift=shift, dropout_p=dropout_p)
    _check(x, weight, left, core, right, bias, scale, shift, dropout_p)
    seed = dropout_seed(x.device) if dropout_p and drop_threshold(dropout_p) else None
    if functorch_active() or forward_ad_active():
        return seeded_three_factor_linear(x, weight, left, core, right, bias, scale, shift, dropout_p, seed)
    arguments = (x, weight, bias, left, core, right)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments):
        return _ThreeFactorLinear.apply(*arguments, scale, shift, dropout_p, seed)
    return _forward(*arguments, scale, shift, dropout_p, seed)[0]

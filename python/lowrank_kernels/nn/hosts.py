"""The layers that can be adapted: linear, embedding, convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.three_factor import three_factor_linear
from .layer import AdapterLayer, Factors, _weight_refusal


def _fusable(base: nn.Module) -> Tensor | None:
    """The weight, where calling the base layer would do nothing but the linear map: no hook, no parametrization."""
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return None if hooked or "forward" in base.__dict__ else base._parameters.get("weight")


def _transposed(base: nn.Module) -> bool:
    """transformers' Conv1D, without importing transformers."""
    return type(base).__name__ == "Conv1D" and hasattr(base, "nf")


class Linear(AdapterLayer):
    """``nn.Linear``, weight ``(out_features, in_features)``; transformers' ``Conv1D``, weight ``(in, out)``."""

    _base_class = nn.Linear
    _mirrored = ("in_features", "out_features", "nx", "nf")

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(base_layer, *args, **options)
        self._is_transposed = _transposed(base_layer)

    @classmethod
    def from_linear(cls, linear: nn.Module, *args: Any, **options: Any) -> Any:
        """Wrap an ``nn.Linear``, or a ``Conv1D`` of transformers."""
        return cls(linear, *args, **options)

    @classmethod
    def _hosts(cls, module: nn.Module) -> bool:
        return _transposed(module) or super()._hosts(module)

    @classmethod
    def _refusal(cls, module: nn.Module) -> str | None:
        return _weight_refusal(module) if _transposed(module) else super()._refusal(module)

    @staticmethod
    def _matrix_shape(base_layer: Any) -> tuple[int, int]:
        rows, columns = base_layer.weight.shape
        return (columns, rows) if _transposed(base_layer) else (rows, columns)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t() if self._is_transposed else matrix

    def _update(self, name: str, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        left, core, right, scale, shift = self.factors(name)
        p = self._dropout(name)
        return three_factor_linear(x, weight, left, core, right, bias=bias, scale=scale, shift=shift, dropout_p=p)

    def _run(self, x: Tensor, running: tuple[str, ...]) -> Tensor:
        base = self._modules["base_layer"]
        weight = _fusable(base) if running else None  # type: ignore[arg-type]
        if weight is None:
            y = base(x)  # type: ignore[misc]
        else:
            weight = weight.t() if self._is_transposed else weight
            y = self._update(running[0], x, weight, base._parameters["bias"])  # type: ignore[union-attr]
            running = running[1:]
        for name in running:
            y = y + self._update(name, x)
        return y


def _from_inner(z: Tensor, factors: Factors) -> Tensor:
    """``scale * z C^T L^T`` for the ``(*, k)`` products z of the layer's input with ``right``."""
    left, core, _, scale, shift = factors
    if core is None:
        return F.linear(z * scale, left.to(z.dtype))
    if shift:
        eye = torch.eye(len(core[0]), dtype=core.dtype, device=core.device)
        return three_factor_linear(z, None, left, core, eye, scale=scale, shift=shift)
    return three_factor_linear(z, None, left, core[1:] if len(core) > 1 else None, core[0], scale=scale)


class Embedding(AdapterLayer):
    """``nn.Embedding``, weight ``(num_embeddings, embedding_dim)``; ids are one-hot rows, dropout drops whole ids.

    The row of ``padding_idx`` stays as it is.
    """

    _base_class = nn.Embedding
    _mirrored = ("num_embeddings", "embedding_dim", "padding_idx")

    @classmethod
    def from_embedding(cls, embedding: nn.Module, *args: Any, **options: Any) -> Any:
        """Wrap an ``nn.Embedding``."""
        return cls(embedding, *args, **options)

    @classmethod
    def _refusal(cls, module: nn.Module) -> str | None:
        reason = super()._refusal(module)
        if reason is None and module.max_norm is not None:
            reason = "has max_norm, which rewrites its weight in every forward pass; set it to None"
        return reason

    @staticmethod
    def _matrix_shape(base_layer: Any) -> tuple[int, int]:
        return base_layer.weight.shape[1], base_layer.weight.shape[0]

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def factors(self, name: str) -> Factors:
        factors, padding = super().factors(name), self.base_layer.padding_idx
        if padding is None:
            return factors
        column = torch.tensor([padding], device=factors.right.device)
        return factors._replace(right=factors.right.index_fill(1, column, 0.0))

    def _run(self, ids: Tensor, running: tuple[str, ...]) -> Tensor:
        base: Any = self.base_layer
        y = base(ids)
        for name in running:
            factors = super().factors(name)  # without a copy of right
            z = F.embedding(ids, factors.right.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq).to(y.dtype)
            if base.padding_idx is not None:
                z = z.masked_fill((ids == base.padding_idx).unsqueeze(-1), 0.0)
            p = self._dropout(name)
            z = z * F.dropout(z.new_ones(*ids.shape, 1), p) if p else z
            y = y + _from_inner(z, factors).to(y.dtype)
        return y


class Conv(AdapterLayer):
    """``nn.Conv1d`` and ``nn.Conv2d`` with one group, weight ``(out_channels, in_channels, *kernel_size)``."""

    _mirrored = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    @classmethod
    def from_conv(cls, conv: nn.Module, *args: Any, **options: Any) -> Any:
        """Wrap an ``nn.Conv1d`` or ``nn.Conv2d``."""
        return cls(conv, *args, **options)

    @classmethod
    def _refusal(cls, module: nn.Module) -> str | None:
        reason = super()._refusal(module)
        if reason is None and module.groups != 1:
            reason = f"has groups={module.groups}; only convolutions with groups=1 can be adapted"
        return reason

    @staticmethod
    def _matrix_shape(base_layer: Any) -> tuple[int, int]:
        return base_layer.weight.shape[0], base_layer.weight[0].numel()

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.weight.shape)

    def _run(self, x: Tensor, running: tuple[str, ...]) -> Tensor:
        base: Any = self.base_layer
        y = base(x)
        channels = 1 - self.weight.ndim  # the channels' dimension, counted from the end
        for name in running:
            factors = self.factors(name)
            kernels = factors.right.reshape(-1, *self.weight.shape[1:]).to(x.dtype)
            z = base._conv_forward(F.dropout(x, self._dropout(name)), kernels, None)  # its padding mode included
            y = y + _from_inner(z.movedim(channels, -1), factors).movedim(-1, channels).to(y.dtype)
        return y


class Conv1d(Conv):
    _base_class = nn.Conv1d


class Conv2d(Conv):
    _base_class = nn.Conv2d

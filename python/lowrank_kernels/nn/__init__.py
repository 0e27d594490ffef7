"""Layers that add a trained low-rank update to a frozen one, ``y = layer(x) + s * ((drop(x) R^T) C^T) L^T``.

A layer wraps the module it adapts (``base_layer``, frozen) and holds named adapters. Three methods times four hosts:

================  ==============================================================  =================================
method            update of the base weight, ``(out, in)``                        trained
================  ==============================================================  =================================
Deep LoRA         ``s * left @ (core[L-1] @ ... @ core[0] - tau I) @ right``      left (out, k), core (L, k, k), right
LoRA              ``s * left @ right``, ``s = alpha / k``                         left (out, k), right (k, in)
RandLoRA          ``s * sum_i B_i diag(lambdas[:, i]) A diag(gammas[i])``         lambdas (k, n), gammas (n, min)
================  ==============================================================  =================================

Hosts: ``nn.Linear`` and the transposed ``Conv1D`` of transformers, ``nn.Embedding``, ``nn.Conv1d`` and ``nn.Conv2d``; each
sees its weight as a matrix ``(out, in)``, its ``matrix_shape``. Only these very classes: a subclass may read its weight in
another way (quantized linears do).
"""

from __future__ import annotations

from torch import nn

from . import hosts, methods
from .layer import AdapterInfo, AdapterLayer, Factors, MergeReport

__all__ = [
    "AdapterInfo",
    "AdapterLayer",
    "DeepLoRAConv1d",
    "DeepLoRAConv2d",
    "DeepLoRAEmbedding",
    "DeepLoRALinear",
    "Factors",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeReport",
    "RandLoRAConv1d",
    "RandLoRAConv2d",
    "RandLoRAEmbedding",
    "RandLoRALinear",
    "layer_class",
]


class DeepLoRALinear(hosts.Linear, methods.DeepLoRA):
    r"""A frozen linear layer (``nn.Linear``, transformers' ``Conv1D``) plus a trained Deep LoRA update.

    .. math:: y = x W^T + b + s\,(((\mathrm{drop}(x) R^T) C^T) L^T), \qquad C = core_{depth-1} \cdots core_0 - \tau I

    Args:
        base_layer: the layer to adapt; it is kept as it is, its parameters are frozen.
        rank: inner width k, from 1 to ``min(out_features, in_features)``; even for the paper's start by compression.
        depth: number of cores, at least 1.
        mode: how it starts. "aligned": tau = ``epsilon^depth``, the update starts at zero with a gradient that any optimizer
            sees; :func:`~lowrank_kernels.compress_` lays left and right along the singular vectors of the weight's gradient.
            "paper": tau = 0 and a tiny epsilon, the update starts with k singular values ``scale * epsilon^depth`` on a
            plateau; ``compress_`` makes the paper's frames.
        init_scale: epsilon; the cores start as epsilon I between orthonormal ``left`` and ``right``. By default 1e-3 in the
            mode "paper", and in the mode "aligned" what makes ``depth epsilon^(depth-1)`` about 0.27: 0.3 at depth 3.
        scale: s.
        dropout: probability, from 0 to below 1, to drop an element of x before R, in training only.
        dtype: of the factors; by default float64 for a float64 layer and float32 for all others. Else the layer's own.
        adapter: name of the adapter; more come with :meth:`~AdapterLayer.add_adapter` and the same options.
        generator: a CPU ``torch.Generator``; the same seed gives the same factors on every device.

    Raises:
        TypeError: another layer, a subclass, quantized or parametrized; a dtype that does not go with the layer's.
        ValueError: an option out of range.

    Note:
        Base product and update are one call of :func:`lowrank_kernels.ops.three_factor_linear` (its precision, memory and
        determinism), unless the base layer has hooks: then it is called as it is and the update is added.

    Example:
        >>> import torch
        >>> from lowrank_kernels.nn import DeepLoRALinear
        >>> layer = DeepLoRALinear.from_linear(torch.nn.Linear(6, 4), rank=2, generator=torch.Generator().manual_seed(0))
        >>> layer(torch.ones(3, 6)).shape
        torch.Size([3, 4])
        >>> sorted(name for name, parameter in layer.named_parameters() if parameter.requires_grad)
        ['core.default', 'left.default', 'right.default']
        >>> layer.merge().adapters
        ('default',)
        >>> layer.unmerge()  # the base weight is bit for bit what it was

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, section 4.
    """


class DeepLoRAEmbedding(hosts.Embedding, methods.DeepLoRA):
    """A frozen ``nn.Embedding`` plus a trained Deep LoRA update; options as in :class:`DeepLoRALinear`."""


class DeepLoRAConv1d(hosts.Conv1d, methods.DeepLoRA):
    """A frozen ``nn.Conv1d`` plus a trained Deep LoRA update; options as in :class:`DeepLoRALinear`."""


class DeepLoRAConv2d(hosts.Conv2d, methods.DeepLoRA):
    """A frozen ``nn.Conv2d`` plus a trained Deep LoRA update; options as in :class:`DeepLoRALinear`."""


class LoRALinear(hosts.Linear, methods.LoRA):
    r"""A frozen linear layer (``nn.Linear``, transformers' ``Conv1D``) plus a trained LoRA update.

    .. math:: y = x W^T + b + \tfrac{\alpha}{k}\,(\mathrm{drop}(x) R^T) L^T

    Args:
        base_layer, rank, dropout, dtype, adapter, generator: as in :class:`DeepLoRALinear`.
        alpha: the scale is ``alpha / rank``.

    Note:
        ``left`` (LoRA's B) starts at zero, ``right`` (A) kaiming uniform, as in PEFT; an embedding starts with A at zero and
        B normal.

    Example:
        >>> import torch
        >>> from lowrank_kernels.nn import LoRALinear
        >>> layer = LoRALinear.from_linear(torch.nn.Linear(6, 4), rank=2, alpha=4)
        >>> layer.adapters["default"].scale
        2.0
        >>> torch.equal(layer(torch.ones(1, 6)), layer.base_layer(torch.ones(1, 6)))
        True

    Source: Hu et al., ICLR 2022, arXiv:2106.09685.
    """


class LoRAEmbedding(hosts.Embedding, methods.LoRA):
    """A frozen ``nn.Embedding`` plus a trained LoRA update; options as in :class:`LoRALinear`."""

    _starts_right = True


class LoRAConv1d(hosts.Conv1d, methods.LoRA):
    """A frozen ``nn.Conv1d`` plus a trained LoRA update; options as in :class:`LoRALinear`."""


class LoRAConv2d(hosts.Conv2d, methods.LoRA):
    """A frozen ``nn.Conv2d`` plus a trained LoRA update; options as in :class:`LoRALinear`."""


class RandLoRALinear(hosts.Linear, methods.RandLoRA):
    r"""A frozen linear layer (``nn.Linear``, transformers' ``Conv1D``) plus a trained RandLoRA update of full rank.

    .. math:: \Delta W = \frac{\alpha}{k \sqrt n} \sum_{i=1}^{n} B_i\,\mathrm{diag}(\lambda_{:i})\,A\,\mathrm{diag}(\gamma_i),
        \qquad n = \lceil \min(out, in) / k \rceil

    or its transpose where ``out < in``, so that A and gamma lie on the smaller side. ``B_i`` (max, k) and A (k, min) are
    normal, drawn from ``basis_seed`` and frozen; trained are ``lambdas`` (k, n), which start at zero, and ``gammas``
    (n, min), which start at one over the larger side.

    Args:
        base_layer, dropout, dtype, adapter: as in :class:`DeepLoRALinear`.
        rank: k, columns of each ``B_i``; a smaller one trains fewer lambdas and more gammas.
        alpha: the scale is ``alpha / (rank sqrt n)``; PEFT's RandLoRA leaves out the root.
        basis_seed: of ``B_i`` and A. Layers of one shape, rank, seed, dtype and device share them; they are not in the
            ``state_dict``, and take about the memory of one weight for every shape.
        generator: accepted as by the other methods; nothing is drawn from it.

    Example:
        >>> import torch
        >>> from lowrank_kernels.nn import RandLoRALinear
        >>> layer = RandLoRALinear.from_linear(torch.nn.Linear(6, 4), rank=2)
        >>> {kind: tuple(parameter.shape) for kind, parameter in layer.adapter_parameters("default").items()}
        {'lambdas': (2, 2), 'gammas': (2, 4)}

    Source: Albert et al., ICLR 2025, arXiv:2502.00987.
    """


class RandLoRAEmbedding(hosts.Embedding, methods.RandLoRA):
    """A frozen ``nn.Embedding`` plus a trained RandLoRA update; options as in :class:`RandLoRALinear`."""


class RandLoRAConv1d(hosts.Conv1d, methods.RandLoRA):
    """A frozen ``nn.Conv1d`` plus a trained RandLoRA update; options as in :class:`RandLoRALinear`."""


class RandLoRAConv2d(hosts.Conv2d, methods.RandLoRA):
    """A frozen ``nn.Conv2d`` plus a trained RandLoRA update; options as in :class:`RandLoRALinear`."""


_CLASSES: dict[str, tuple[type[AdapterLayer], ...]] = {
    "deeplora": (DeepLoRALinear, DeepLoRAEmbedding, DeepLoRAConv1d, DeepLoRAConv2d),
    "lora": (LoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d),
    "randlora": (RandLoRALinear, RandLoRAEmbedding, RandLoRAConv1d, RandLoRAConv2d),
}


def layer_class(module: nn.Module, method: str = "deeplora") -> type[AdapterLayer]:
    """The class that adapts ``module`` by ``method`` ("deeplora", "lora" or "randlora").

    Raises:
        ValueError: an unknown method.
        TypeError: a module that cannot be adapted; the message says why.

    Example:
        >>> from torch import nn
        >>> from lowrank_kernels.nn import layer_class
        >>> layer_class(nn.Embedding(10, 4), "lora").__name__
        'LoRAEmbedding'
    """
    if method not in _CLASSES:
        raise ValueError(f"layer_class: method must be one of {', '.join(_CLASSES)}, got {method!r}")
    for cls in _CLASSES[method]:
        if cls._hosts(module):
            reason = cls._refusal(module)
            if reason is not None:
                raise TypeError(f"layer_class: the layer {reason}")
            return cls
    raise TypeError(
        "layer_class: the layer must be an nn.Linear, Conv1D, nn.Embedding, nn.Conv1d or nn.Conv2d, "
        f"got {type(module).__name__}"
    )

"""Layers that add a trained low-rank update to a frozen one, ``y = layer(x) + s * ((drop(x) R^T) C^T) L^T``.

A layer wraps the module it adapts (``base_layer``, frozen) and holds named adapters. Three methods times four hosts:

================  ==============================================================  =================================
method            update of the base weight, ``(out, in)``                        trained
================  ==============================================================  =================================
Deep LoRA         ``s * left @ core[L-1] @ ... @ core[0] @ right``                left (out, k), core (L, k, k), right
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
    """an ``nn.Linear``, or transformers' ``Conv1D``, with Deep LoRA adapters; options as in :class:`DeepLoRALinear`."""


class DeepLoRAEmbedding(hosts.Embedding, methods.DeepLoRA):
    """an ``nn.Embedding`` with Deep LoRA adapters; options as in :class:`DeepLoRALinear`."""


class DeepLoRAConv1d(hosts.Conv1d, methods.DeepLoRA):
    """an ``nn.Conv1d`` with Deep LoRA adapters; options as in :class:`DeepLoRALinear`."""


class DeepLoRAConv2d(hosts.Conv2d, methods.DeepLoRA):
    """an ``nn.Conv2d`` with Deep LoRA adapters; options as in :class:`DeepLoRALinear`."""


class LoRALinear(hosts.Linear, methods.LoRA):
    """an ``nn.Linear``, or transformers' ``Conv1D``, with LoRA adapters; options as in :class:`LoRALinear`."""


class LoRAEmbedding(hosts.Embedding, methods.LoRA):
    """an ``nn.Embedding`` with LoRA adapters; options as in :class:`LoRALinear`."""

    _starts_right = True


class LoRAConv1d(hosts.Conv1d, methods.LoRA):
    """an ``nn.Conv1d`` with LoRA adapters; options as in :class:`LoRALinear`."""


class LoRAConv2d(hosts.Conv2d, methods.LoRA):
    """an ``nn.Conv2d`` with LoRA adapters; options as in :class:`LoRALinear`."""


class RandLoRALinear(hosts.Linear, methods.RandLoRA):
    """an ``nn.Linear``, or transformers' ``Conv1D``, with RandLoRA adapters; options as in :class:`RandLoRALinear`."""


class RandLoRAEmbedding(hosts.Embedding, methods.RandLoRA):
    """an ``nn.Embedding`` with RandLoRA adapters; options as in :class:`RandLoRALinear`."""


class RandLoRAConv1d(hosts.Conv1d, methods.RandLoRA):
    """an ``nn.Conv1d`` with RandLoRA adapters; options as in :class:`RandLoRALinear`."""


class RandLoRAConv2d(hosts.Conv2d, methods.RandLoRA):
    """an ``nn.Conv2d`` with RandLoRA adapters; options as in :class:`RandLoRALinear`."""


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

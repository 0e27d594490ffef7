"""PEFT's own LoRA layers on the fused op, switched in place and back.

    y = x W^T + b + sum over active adapters: scaling * (drop(x) A^T) B^T

A ``lora.Linear`` is switched by its class alone: no attribute, parameter or key of the state dict changes, nothing of PEFT is
patched, and switching back leaves no trace. Whether a call can be fused is asked at every call, from what the layer is then;
where it cannot, PEFT's forward runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..adapters import _starred
from ..files import extra
from ..nn.hosts import Linear as LinearHost
from ..nn.hosts import _fusable, _transposed
from ..ops.registry import autocast_enabled
from ..ops.three_factor import FACTOR_TYPES, three_factor_linear

extra("peft", "lowrank_kernels.integrations.peft_fused")

from peft.tuners import lora  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

__all__ = ["AccelerationReport", "FusedLinear", "accelerate_peft", "decelerate_peft"]


@dataclass(frozen=True)
class AccelerationReport:
    """What :func:`accelerate_peft` did: the LoRA layers that run fused, and for all others why not; ``print`` it."""

    fused: tuple[str, ...]
    fallback: dict[str, str] = field(default_factory=dict)  # layer -> reason; PEFT's own code runs it

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.fallback)} LoRA layers run fused:"]
        lines += [f"  {count:>3} {name}" for name, count in Counter(map(_starred, self.fused)).items()]
        reasons = Counter((_starred(name), reason) for name, reason in self.fallback.items())
        return "\n".join([*lines, *(f"  PEFT runs {count} {name}: {reason}" for (name, reason), count in reasons.items())])


class FusedLinear(lora.Linear):
    """PEFT's ``lora.Linear``, with base product and updates in one op where that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = _running(self)
        if args or kwargs or _obstacle(self, names) is not None:
            return super().forward(x, *args, **kwargs)
        base: Any = self._modules["base_layer"]
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if x.dtype != weight.dtype and not autocast_enabled(x.device.type):
            return super().forward(x)
        weight = weight.t() if _transposed(base) else weight
        y = _update(self, names[0], x, weight, bias)
        for name in names[1:]:
            y = y + _update(self, name, x)
        return y


def _running(layer: lora.Linear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A._modules]


def _update(layer: lora.Linear, name: str, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    dropout: Any = layer.lora_dropout[name]
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    left, right = layer.lora_B[name].weight, layer.lora_A[name].weight
    return three_factor_linear(x, weight, left, None, right, bias=bias, scale=layer.scaling[name], dropout_p=p)  # type: ignore[arg-type]


def _refusal(layer: LoraLayer) -> str | None:
    """Why a layer cannot be switched, whatever its state."""
    if type(layer) not in (lora.Linear, FusedLinear):
        return f"it is PEFT's {type(layer).__name__}, and only lora.Linear itself is fused"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance, as accelerate's hooks do"
    reason = LinearHost._refusal(layer.base_layer)
    return None if reason is None else f"its base layer {reason}"


def _obstacle(layer: lora.Linear, names: list[str]) -> str | None:
    """Why PEFT's own code must run it in its present state."""
    base: Any = layer._modules["base_layer"]
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "adapters are merged into its weight"
    if not names:
        return "it has no active adapter"
    if _fusable(base) is None:
        return "its base layer has hooks or another forward"
    allowed = FACTOR_TYPES.get(base._parameters["weight"].dtype, ())
    for name in names:
        if name in layer.lora_variant:
            return f"adapter {name!r} is a variant of LoRA ({type(layer.lora_variant[name]).__name__})"
        if layer.lora_bias.get(name):
            return f"adapter {name!r} has a bias of its own (lora_bias)"
        if not isinstance(layer.scaling[name], int | float):
            return f"adapter {name!r} has a tensor as its scaling, as hotswapping makes it"
        factors: Any = (layer.lora_A._modules[name], layer.lora_B._modules[name])
        if any(type(factor) is not nn.Linear or _fusable(factor) is None for factor in factors):
            return f"adapter {name!r} has factors with hooks, or that are no plain nn.Linear"
        if any(type(f.weight) is not nn.Parameter or f.weight.dtype not in allowed for f in factors):
            return f"adapter {name!r} is sharded, or {factors[0].weight.dtype} does not go with the base layer's dtype"
        if factors[0].weight.dtype != factors[1].weight.dtype:
            return f"adapter {name!r} has factors of two dtypes"
        dropout: Any = layer.lora_dropout._modules[name]
        if type(dropout) not in (nn.Identity, nn.Dropout) or dropout._forward_hooks or dropout._forward_pre_hooks:
            return f"adapter {name!r} drops by {type(dropout).__name__}, and only nn.Dropout without hooks is fused"
    return None


def accelerate_peft(model: nn.Module, *, strict: bool = False) -> AccelerationReport:
    r"""Run PEFT's LoRA layers by the fused op, in place.

    .. math:: y = x W^T + b + \tfrac{\alpha}{r}\, (\mathrm{drop}(x) A^T) B^T

    Args:
        model: a ``PeftModel``, or a model with PEFT's LoRA layers inside.
        strict: an error where a layer does not run fused, instead of a reason in the report; nothing is changed then.

    Returns:
        ``AccelerationReport(fused, fallback)``: names, and the reason of every layer that PEFT runs itself.

    Raises:
        ValueError: no LoRA layer of PEFT; with ``strict`` every reason.

    Note:
        Keys, parameters, ``isinstance`` and outputs stay; values and gradients are equal to rounding (the op adds in float32
        and never casts the input up). With dropout they agree in evaluation, and in training in distribution only: the
        op draws another mask than PEFT. Every call asks whether it can be fused: merged or disabled adapters, DoRA and
        other variants, ``lora_bias``, mixed batches and dtypes that do not go together run PEFT's code, several active
        adapters a chain of fused calls. Layers whose state is the reason are switched too, and run fused once it is gone. Of
        adapters added later those in switched layers run fused; for new layers call it again. The class is pickled along:
        for others call :func:`decelerate_peft` first (``state_dict`` and ``save_pretrained`` are the same either way).

    Example:
        >>> import peft, torch
        >>> from lowrank_kernels.integrations.peft import accelerate_peft, decelerate_peft
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Embedding(4, 8))
        >>> model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]))
        >>> print(accelerate_peft(model))
        1 of 2 LoRA layers run fused:
            1 base_model.model.*
          PEFT runs 1 base_model.model.*: it is PEFT's Embedding, and only lora.Linear itself is fused
        >>> decelerate_peft(model)
        ('base_model.model.0',)

    Source: Hu et al., ICLR 2022, arXiv:2106.09685.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(
            "accelerate_peft: the model has no LoRA layer of PEFT; call peft.get_peft_model(model, LoraConfig(...)) first "
            "(Deep LoRA layers need no acceleration, they run fused)"
        )
    refused = {name: reason for name, layer in layers.items() if (reason := _refusal(layer))}
    switched = {name: layer for name, layer in layers.items() if name not in refused}
    waiting = {name: reason for name, layer in switched.items() if (reason := _obstacle(layer, _running(layer)))}
    fallback = {name: reason for name in layers if (reason := refused.get(name) or waiting.get(name))}
    if strict and fallback:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in fallback.items())
        raise ValueError(f"accelerate_peft: strict=True, and {len(fallback)} LoRA layers would not run fused: {reasons}")
    for layer in switched.values():
        layer.__class__ = FusedLinear
    return AccelerationReport(tuple(name for name in layers if name not in fallback), fallback)


def decelerate_peft(model: nn.Module) -> tuple[str, ...]:
    """Undo :func:`accelerate_peft`: the layers are PEFT's own again, and nothing else changes.

    Returns:
        Names of the layers that were switched back.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if type(module) is FusedLinear}
    for layer in layers.values():
        layer.__class__ = lora.Linear
    return tuple(layers)

"""The losses of batches, as what starts a model before its training takes them: from a function, or batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

LossOrBatches = Callable[[], Tensor] | Iterable[Any]
LossFn = Callable[[nn.Module, Any], Tensor]


def batch_losses(
    function: str, model: nn.Module, loss_or_batches: LossOrBatches, loss_fn: LossFn | None
) -> Iterator[Callable[[], Tensor]]:
    """A function for every batch that runs the model; errors speak for ``function``."""
    if callable(loss_or_batches):
        if loss_fn is not None:
            raise ValueError(
                f"{function}: loss_fn goes with batches, and loss_or_batches is a function already; give one of them"
            )
        yield loss_or_batches
        return
    if isinstance(loss_or_batches, Mapping | Tensor) or not isinstance(loss_or_batches, Iterable):
        raise TypeError(
            f"{function}: loss_or_batches must be a function without arguments or an iterable of batches, "
            f"got {type(loss_or_batches).__name__}; a single batch goes in a list: [batch]"
        )
    for batch in loss_or_batches:
        yield lambda batch=batch: _own_loss(function, model, batch) if loss_fn is None else loss_fn(model, batch)  # type: ignore[misc]


def _own_loss(function: str, model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model returns for a dict of tensors with labels."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"{function}: batches must be dicts, or come with loss_fn(model, batch); got {type(batch).__name__}")
    device = next(model.parameters()).device
    loss = getattr(model(**{key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}), "loss", None)
    if loss is None:
        raise ValueError(f"{function}: the model returned no .loss; put labels into the batches or pass loss_fn(model, batch)")
    return loss


def checked_loss(function: str, closure: Callable[[], Tensor]) -> Tensor:
    """A finite scalar with a gradient."""
    loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{function}: the loss must be a tensor with one element, got {got}; return its mean, not .item()")
    if not loss.requires_grad:
        raise ValueError(
            f"{function}: the loss does not depend on any parameter that is looked at (it has no grad_fn); compute it without "
            "no_grad() and detach(), and with use_reentrant=False where checkpointing is used or with an input that requires "
            "grad"
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"{function}: the loss must be finite, got {value}; check the data and the model's dtype")
    return loss

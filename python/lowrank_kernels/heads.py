"""The head first: what is trained beside the adapters is fitted before they start.

A new head starts at random, and the first gradients ask the layers below to suit a random head: with few examples the
pretrained features are spent on that (Kumar et al., ICLR 2022, arXiv:2202.10054, of full fine-tuning). A head that is fitted
first asks for what the task needs, and :func:`~lowrank_kernels.compress_` then starts the adapters in that direction.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import adapter_layers, disabled, trained_modules
from .batches import LossFn, LossOrBatches, batch_losses, checked_loss
from .processes import Team, agreed, is_sharded, sharding_team, team_of, unwrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def fit_head(
    model: nn.Module,
    loss_or_batches: LossOrBatches,
    *,
    steps: int | None = None,
    lr: float = 1e-3,
    loss_fn: LossFn | None = None,
    group: ProcessGroup | bool | None = None,
) -> list[float]:
    """Train what an adapted model trains beside its adapters, the adapters switched off: AdamW at a constant rate.

    Call it before :func:`~lowrank_kernels.compress_`, with about a tenth of the steps that are planned in all. A model without
    a new head, such as a language model that is trained on, has no use for it.

    Args:
        model: adapted, with a head that requires gradients (``adapt(modules_to_train=[...])``).
        loss_or_batches: one step each: an iterable of batches such as a DataLoader, gone through again until all steps are
            made; or a function without arguments that runs the model and returns the scalar loss.
        steps: how many; default: one for each batch.
        lr: the rate, without weight decay.
        loss_fn: ``loss_fn(model, batch) -> scalar`` for batches; the default is ``model(**batch).loss`` for dict batches.
        group: the processes that call this together, each with its own batches, whose gradients are averaged; by default all,
            where ``torch.distributed`` is initialized. False: this process alone.

    Returns:
        The loss before every step, the mean over the processes.

    Raises:
        ValueError: no adapters, nothing that is trained beside them, ``steps`` or ``lr`` out of range, batches that end before
            the steps do, a loss that is no finite scalar or does not depend on the head, a head that is not finite after the
            last step; processes with unequal numbers of batches. The head and its buffers are as they were then, in every
            process.
        TypeError: batches of the wrong kind.

    Note:
        The backward pass ends at the head, so a step costs little more than a forward pass. The model runs in the mode it is
        in: with ``model.train()`` dropout is on. Deterministic up to what the model draws. Gradients that parameters had
        are kept.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> report = lrk.adapt(model, rank=2, target_modules=["0"], modules_to_train=["2"])
        >>> x, y = torch.ones(4, 8), torch.zeros(4, 1)
        >>> losses = lrk.fit_head(model, lambda: torch.nn.functional.mse_loss(model(x), y), steps=50, lr=1e-2)
        >>> losses[-1] < losses[0]
        True

    Source: Kumar et al., ICLR 2022, arXiv:2202.10054, section 3.4 (linear probing, then fine-tuning).
    """
    team = team_of("fit_head", group)
    wrapper, model = model, unwrapped(model)
    with team.together():
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ValueError(f"fit_head: steps must be an integer of at least 1, got {steps!r}")
        if not 0 < lr < math.inf:
            raise ValueError(f"fit_head: lr must be a positive finite number, got {lr}")
        head = _head(model)
        agreed(team, "fit_head", {"steps": steps, "lr": lr, "head": [tuple(parameter.shape) for parameter in head]})
    sharding_team(model)
    before = [(tensor, tensor.detach().clone()) for tensor in (*head, *_head_buffers(model, head))]
    gradients = [parameter.grad for parameter in head]
    optimizer = torch.optim.AdamW(head, lr, weight_decay=0.0)
    try:
        with ExitStack() as stack:
            for module in wrapper.modules():  # DDP would wait for the adapters' gradients; the head's are averaged here
                if isinstance(module, nn.parallel.DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            stack.enter_context(disabled(model))
            stack.enter_context(torch.enable_grad())
            return _train(model, optimizer, head, loss_or_batches, loss_fn, steps, team)
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise
    finally:
        for parameter, gradient in zip(head, gradients, strict=True):
            parameter.grad = gradient


def _head(model: nn.Module) -> list[nn.Parameter]:
    """What requires gradients and is no adapter's."""
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("fit_head: the model has no adapters; call lowrank_kernels.adapt(model, ...) first")
    own = {
        id(parameter)
        for layer in layers.values()
        for adapter in layer.adapters
        for parameter in layer.adapter_parameters(adapter).values()
    }
    head = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    if not head:
        raise ValueError(
            "fit_head: nothing is trained beside the adapters; name the head in adapt(modules_to_train=[...]), or leave "
            "fit_head out: a model without a new head does not need it"
        )
    return head


def _head_buffers(model: nn.Module, head: list[nn.Parameter]) -> list[Tensor]:
    """Such as the running statistics of its normalization."""
    own = {id(parameter) for parameter in head}
    parts = [module for module in model.modules() if any(id(parameter) in own for parameter in module._parameters.values())]
    parts += [model.get_submodule(name) for name in trained_modules(model)]
    return list({id(buffer): buffer for part in parts for buffer in part.buffers()}.values())


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    head: list[nn.Parameter],
    loss_or_batches: LossOrBatches,
    loss_fn: LossFn | None,
    steps: int | None,
    team: Team,
) -> list[float]:
    losses: list[float] = []
    closures = batch_losses("fit_head", model, loss_or_batches, loss_fn)
    while steps is None or len(losses) < steps:
        with team.together():
            closure = next(closures, None)
            if closure is None and steps is not None:
                closures = batch_losses("fit_head", model, loss_or_batches, loss_fn)
                closure = next(closures, None)
                if closure is None:
                    raise ValueError(
                        f"fit_head: loss_or_batches ended after {len(losses)} of {steps} steps; give fewer steps, or what can "
                        "be gone through again, such as a list or a DataLoader"
                    )
            having = team.meet(closure is not None)
            if not any(having):
                break
            if closure is None or not all(having):
                raise ValueError(
                    f"fit_head: every process needs as many batches, process {having.index(False)} has only {len(losses)}; "
                    "give steps="
                )
            loss = checked_loss("fit_head", closure)
            losses.append(sum(team.meet(float(loss.detach()))) / team.size)
            optimizer.zero_grad()
            loss.backward()
            if all(parameter.grad is None for parameter in head):
                raise ValueError("fit_head: the loss does not reach what is trained beside the adapters")
            for parameter in head:
                _average(parameter, team)
            optimizer.step()
    if not losses:
        raise ValueError("fit_head: loss_or_batches gave no batches, at least one is needed; an exhausted iterator?")
    with team.together():
        if not all(bool(torch.isfinite(_local(parameter)).all()) for parameter in head):
            raise ValueError(
                f"fit_head: the head is not finite after step {len(losses)}; lower lr, or keep the head in float32"
            )
    return losses


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if is_sharded(parameter) else parameter


def _average(parameter: Tensor, team: Team) -> None:
    """Over the processes; a sharded gradient is averaged already."""
    if team.size > 1 and not is_sharded(parameter):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = team.sum(gradient).div_(team.size)

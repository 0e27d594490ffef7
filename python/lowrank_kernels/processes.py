"""Several processes as one: errors that all of them raise, sums over all of them, and parameters that they share out.

Sharded parameters (``fully_shard``, tensor parallelism) are ``DTensor``: to look at one, every process takes part in gathering
it; to write one, every process keeps its own part. They are known by their methods, so nothing of torch.distributed that an
older torch lacks is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .files import InputError, OutputError

RAISED_AS = (InputError, OutputError, ValueError, TypeError)  # elsewhere and here; others are a RuntimeError here


class ProcessLost(RuntimeError):
    """Another process of the group ended, or the way to it is cut."""


@dataclass(frozen=True)
class _Failure:
    """An error as it travels: an exception itself may refuse to be pickled."""

    kinds: tuple[str, ...]  # its class and those that derives from
    text: str

    def raised(self, rank: int) -> Exception:
        kind = next((kind for kind in RAISED_AS if kind.__name__ in self.kinds), RuntimeError)
        return kind(f"process {rank} raised {self.kinds[0]}: {self.text}")


class Team:
    """The processes of a group, which call the same functions in the same order; a process alone talks to nobody.

    All that is exchanged on the way goes through :meth:`meet`. It is the one place where a process waits for the others, so
    one that has failed says so there, and all raise instead of waiting for ever.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.summed = 0  # bytes given to sum() so far
        self._known: BaseException | None = None  # an error that all processes have heard of

    def meet(self, message: Any) -> list[Any]:
        """What every process says, in the order of their ranks; raises where another one failed."""
        if self.size == 1:
            return [message]
        said: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(said, message, group=self.group)
        failed = [(rank, other) for rank, other in enumerate(said) if isinstance(other, _Failure)]
        if failed and not isinstance(message, _Failure):
            rank, other = failed[0]
            self._known = other.raised(rank)
            raise self._known
        return said

    @contextmanager
    def together(self) -> Iterator[None]:
        """What a process raises inside, the others raise at the place where they meet it next."""
        try:
            yield
        except Exception as error:
            if error is not self._known and not isinstance(error, ProcessLost):
                self.meet(_Failure(tuple(kind.__name__ for kind in type(error).__mro__), str(error)))
            raise

    def to_first(self, message: Any) -> list[Any] | None:
        """What every process says, in the first one; None in the others."""
        self.meet(None)
        if self.size == 1:
            return [message]
        said: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with _lost():
            dist.gather_object(message, said, dist.get_global_rank(self.group, 0), group=self.group)
        return said

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            self.summed += tensor.numel() * tensor.element_size()
            with _lost():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def first(self, tensor: Tensor) -> Tensor:
        """The tensor of the first process, bit for bit."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        with _lost():
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)
        return tensor


@contextmanager
def _lost() -> Iterator[None]:
    """What torch says of a connection that broke, as an error of its own."""
    try:
        yield
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise ProcessLost(f"another process of the group ended or cannot be reached ({reason})") from error


def team_of(function: str, group: Any = None) -> Team:
    """The group that is meant by an argument ``group``: None is the default group where there is one, False this process."""
    initialized = dist.is_available() and dist.is_initialized()
    if group is False or (group is None and not initialized):
        return Team()
    if not initialized:
        raise ValueError(
            f"{function}: group is given, but torch.distributed is not initialized; call init_process_group() first"
        )
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError(f"{function}: this process (rank {dist.get_rank()}) is not in group; only its members call this")
    return Team(group)


# ---------------------------------------------------------------------- sharded parameters


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one every process of its mesh must ask."""
    whole: Any = tensor
    return whole.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Write a whole value; into a sharded parameter every process of its mesh writes its part of it."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = distribute_tensor(value.to(sharded.device, sharded.dtype), sharded.device_mesh, sharded.placements)
    parameter.copy_(value)


def _shards(kind: type) -> bool:
    """Whether this is a class that ``fully_shard`` made, or torch's ``FSDPModule``."""
    return hasattr(kind, "reshard") and hasattr(kind, "unshard")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DistributedDataParallel`` and ``nn.DataParallel``, whose names its layers go by."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (inner := model._modules.get("_orig_mod")) is not None:
            model = inner
        else:
            return model


def plain_class(module: nn.Module) -> type:
    """The class of a module as it was before ``fully_shard``."""
    return next(kind for kind in type(module).__mro__ if not _shards(kind))


def sharding_team(model: nn.Module) -> Team:
    """The processes that share out a model's parameters, put back where they are; alone where none is sharded."""
    module: Any
    for module in model.modules():
        if _shards(type(module)):
            module.reshard()  # gathered parameters that a forward pass left are copies, what is written there is lost
    for parameter in model.parameters():
        if is_sharded(parameter):
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            return Team(mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD)
    return Team()


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Inside, the sharded parameters of these modules are whole and plain tensors, to be read; all processes ask together."""
    owners = [owner._parameters for module in modules for owner in module.modules()]
    places = [(owned, key, value) for owned in owners for key, value in owned.items()]
    sharded = [(owned, key, value) for owned, key, value in places if value is not None and is_sharded(value)]
    whole = [full(value.detach()) for _, _, value in sharded]
    try:
        for (owned, key, _), value in zip(sharded, whole, strict=True):
            owned[key] = value  # type: ignore[assignment]
        yield
    finally:
        for owned, key, parameter in sharded:
            owned[key] = parameter


def agreed(team: Team, function: str, what: dict[str, Any]) -> None:
    """Raise on all processes where one has another value of something; values are compared by their text."""
    said = team.meet({name: repr(value) for name, value in what.items()})
    for name in what:
        other = next((rank for rank, values in enumerate(said) if values[name] != said[0][name]), None)
        if other is not None:
            raise ValueError(
                f"{function}: every process must have the same {name}, process 0 has {_cut(said[0][name])}, "
                f"process {other} has {_cut(said[other][name])}"
            )


def _cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."

"""The specification in plain PyTorch, with the same signatures as :mod:`lowrank_kernels.ops`."""

from .completion import completion_loss

__all__ = ["completion_loss"]

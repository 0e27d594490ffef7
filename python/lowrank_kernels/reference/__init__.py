"""The specification in plain PyTorch, with the same signatures as :mod:`lowrank_kernels.ops`."""

from .completion import completion_loss
from .three_factor import three_factor_linear

__all__ = ["completion_loss", "three_factor_linear"]

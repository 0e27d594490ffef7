"""Fused operations: differentiable, compilable, with the signatures of :mod:`lowrank_kernels.reference`."""

from .completion import completion_loss, completion_loss_and_gradients
from .three_factor import three_factor_linear

__all__ = ["completion_loss", "completion_loss_and_gradients", "three_factor_linear"]

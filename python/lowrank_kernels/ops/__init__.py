"""Fused operations: differentiable, compilable, with the signatures of :mod:`lowrank_kernels.reference`."""

from .completion import completion_loss, completion_loss_and_gradients

__all__ = ["completion_loss", "completion_loss_and_gradients"]

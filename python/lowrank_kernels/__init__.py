"""Fused kernels for compressed deep low-rank models: matrix completion and adaptation in PyTorch."""

import torch  # noqa: F401  first: the native module then shares torch's OpenMP runtime

from . import ops, reference, solver
from .compression import CompressedFactors, compress, masked_gradient
from .entries import ObservedEntries

__version__ = "0.1.0"
__all__ = [
    "CompressedFactors",
    "ObservedEntries",
    "__version__",
    "compress",
    "masked_gradient",
    "ops",
    "reference",
    "solver",
]

"""Fused kernels for compressed deep low-rank models: matrix completion and adaptation in PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  first: the native module then shares torch's OpenMP runtime

from . import ops, reference, solver
from .compression import CompressedFactors, compress, masked_gradient
from .entries import ObservedEntries
from .files import extra

if TYPE_CHECKING:
    from .completion import DeepMatrixCompletion
    from .imputer import LowRankImputer

__version__ = "0.1.0"
__all__ = [
    "CompressedFactors",
    "DeepMatrixCompletion",
    "LowRankImputer",
    "ObservedEntries",
    "__version__",
    "compress",
    "masked_gradient",
    "ops",
    "reference",
    "solver",
]


def __getattr__(name: str) -> Any:
    """The estimators are imported at first use: they need scikit-learn, the kernels do not."""
    modules = {"DeepMatrixCompletion": "completion", "LowRankImputer": "imputer"}
    if name in modules:
        extra("sklearn", "an estimator")
        return getattr(import_module(f".{modules[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Fused kernels for compressed deep low-rank models: matrix completion and adaptation in PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  first: the native module then shares torch's OpenMP runtime

from . import ops, reference, solver
from .compression import CompressedFactors, compress, masked_gradient
from .entries import ObservedEntries
from .files import extra

if TYPE_CHECKING:
    from . import factorization, nn
    from .adapter_files import export_lora, load_adapter, save_adapter, shrink_factors
    from .adapters import adapt, adapter_layers, delete_adapter, disabled, merge_and_unload, set_adapter, unadapt
    from .analysis import rank_report
    from .completion import DeepMatrixCompletion
    from .factorization import DeepFactorization
    from .heads import fit_head
    from .imputer import LowRankImputer
    from .initialization import compress_
    from .nn import DeepLoRALinear, LoRALinear, RandLoRALinear
    from .optim import AdamWithSGD, parameter_groups, watch_divergence

__version__ = "0.1.0"
__all__ = [
    "AdamWithSGD",
    "CompressedFactors",
    "DeepFactorization",
    "DeepLoRALinear",
    "DeepMatrixCompletion",
    "LoRALinear",
    "LowRankImputer",
    "ObservedEntries",
    "RandLoRALinear",
    "__version__",
    "adapt",
    "adapter_layers",
    "compress",
    "compress_",
    "delete_adapter",
    "disabled",
    "export_lora",
    "factorization",
    "fit_head",
    "load_adapter",
    "masked_gradient",
    "merge_and_unload",
    "nn",
    "ops",
    "parameter_groups",
    "rank_report",
    "reference",
    "save_adapter",
    "set_adapter",
    "shrink_factors",
    "solver",
    "unadapt",
    "watch_divergence",
]
_LAZY = {
    "adapter_files": ("export_lora", "load_adapter", "save_adapter", "shrink_factors"),
    "adapters": ("adapt", "adapter_layers", "delete_adapter", "disabled", "merge_and_unload", "set_adapter", "unadapt"),
    "analysis": ("rank_report",),
    "completion": ("DeepMatrixCompletion",),
    "factorization": ("DeepFactorization",),
    "heads": ("fit_head",),
    "imputer": ("LowRankImputer",),
    "initialization": ("compress_",),
    "nn": ("DeepLoRALinear", "LoRALinear", "RandLoRALinear"),
    "optim": ("AdamWithSGD", "parameter_groups", "watch_divergence"),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    """Layers, adapters and estimators are imported at first use; the estimators need scikit-learn, the kernels do not."""
    if name in ("nn", "factorization"):
        return import_module(f".{name}", __name__)
    if name in _HOME:
        if _HOME[name] in ("completion", "imputer"):
            extra("sklearn", "an estimator")
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

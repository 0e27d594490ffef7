"""The command line: ``lowrank-kernels complete FILE`` fills in a matrix, ``lowrank-kernels doctor`` says what runs where.

Every kind of file becomes one list of entries (row, column, value). A part of them is held out, the model is fitted to the
rest and compared with simple baselines on that part; then it is fitted to everything and the output is written.

Exit codes: 0 fine; 1 could not finish (disk full, out of memory); 2 bad input or options; 130 interrupted, after writing
what the best model so far gives.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np

from . import files

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREDICT_BLOCK = 1 << 22  # pairs predicted at once: about 200 MB of gathered factors at rank 10
INTERRUPTED = 130  # 128 + SIGINT


@dataclass
class Options:
    """The options of ``complete``, as given."""

    file: str
    kind: str | None = None
    row: str | None = None
    col: str | None = None
    value: str | None = None
    duplicates: str = "error"
    missing_value: float | None = None
    mask: str | None = None
    alpha_mask: bool = False
    sampling_rate: float | None = None
    held_out: float = 0.1
    standardize: bool = False
    rank: int | None = None
    depth: int | None = None
    max_steps: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    refit: bool = True
    output: str | None = None
    predict: str | None = None
    compare: str | None = None
    plot: str | None = None
    save_model: str | None = None
    overwrite: bool = False
    quiet: bool = False


class Entries(NamedTuple):
    """Some entries of the matrix, by label."""

    row: NDArray[Any]
    col: NDArray[Any]
    values: NDArray[np.float64]

    def take(self, keep: NDArray[np.bool_]) -> Entries:
        return Entries(self.row[keep], self.col[keep], self.values[keep])


@dataclass
class Problem:
    """A file as a completion problem."""

    kind: str
    what: str  # for the table
    observed: Entries
    shape: tuple[int, int]
    names: tuple[str, str, str] = ("row", "col", "value")
    hidden: Entries | None = None  # --sampling-rate: what was removed from the picture
    dense: files.Dense | None = None
    picture: NDArray[np.float64] | None = None  # as read, NaN where unknown
    pixels: NDArray[np.bool_] | None = None  # (H, W) observed
    pairs: tuple[NDArray[Any], NDArray[Any]] | None = None  # --predict
    notes: list[str] = field(default_factory=list)


@dataclass
class Fit:
    """A fitted model with the column scaling around it."""

    model: Any
    mean: NDArray[np.float64] | None  # (n,), with --standardize
    scale: NDArray[np.float64] | None

    @property
    def interrupted(self) -> bool:
        return str(self.model.status_.name) == "INTERRUPTED"

    def predict(self, row: NDArray[Any], col: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Predictions, and which pairs have a known row and column; others get the offset and the biases that are known."""
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
        return self.in_units(out, col), known

    def standardized(self, entries: Entries) -> NDArray[np.float64]:
        """The values as the model sees them."""
        if self.mean is None or self.scale is None:
            return entries.values
        return (entries.values - self.mean[entries.col]) / self.scale[entries.col]

    def in_units(self, values: NDArray[np.float64], col: NDArray[Any]) -> NDArray[np.float64]:
        """The model's values in the units of the file."""
        if self.mean is None or self.scale is None:
            return values
        return values * self.scale[col] + self.mean[col]


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


# ---------------------------------------------------------------------- files to problems


def load(o: Options) -> Problem:
    """Read the file as the kind it is or is told to be."""
    kind = o.kind or files.guess_kind(o.file)
    _refuse_options(o, kind)
    if kind == "triplets":
        t = files.read_triplets(o.file, o.row, o.col, o.value, o.duplicates)
        shape = len(np.unique(t.row)), len(np.unique(t.col))
        notes = [f"{t.merged} repeated entries merged ({o.duplicates})"] if t.merged else []
        what = f"rows {t.names[0]}, columns {t.names[1]}, values {t.names[2]}"
        return Problem(kind, what, Entries(*t[:3]), shape, t.names, pairs=_load_pairs(o, t.names), notes=notes)
    if kind == "matrix-market":
        coo = files.read_matrix_market(o.file)
        row, col = (np.asarray(x, dtype=np.int64) + 1 for x in (coo.row, coo.col))  # numbered from 1, as in the file
        t = files.merge_duplicates(files.Triplets(row, col, coo.data, ("row", "col", "value")), o.duplicates, o.file)
        notes = [f"{t.merged} repeated entries merged ({o.duplicates})"] if t.merged else []
        what = "rows and columns numbered from 1"
        return Problem(kind, what, Entries(*t[:3]), coo.shape, pairs=_load_pairs(o, t.names), notes=notes)
    if kind == "dense":
        return _load_dense(o)
    return _load_picture(o)


def _load_pairs(o: Options, names: tuple[str, str, str]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """The pairs to predict, from columns named as in the file of entries where they are there, else guessed."""
    if o.predict is None:
        return None
    same = set(names[:2]) <= set(files.column_names(o.predict))
    return files.read_pairs(o.predict, *names[:2]) if same else files.read_pairs(o.predict)


def _refuse_options(o: Options, kind: str) -> None:
    """Options that mean nothing for this kind are refused, not ignored."""
    table = kind in ("triplets", "matrix-market")
    wrong = {
        "--row, --col and --value": kind != "triplets" and any((o.row, o.col, o.value)),
        "--predict": o.predict is not None and not table,
        "--mask": o.mask is not None and table,
        "--missing-value": o.missing_value is not None and kind != "dense",
        "--standardize": o.standardize and kind != "dense",
        "--sampling-rate": o.sampling_rate is not None and kind != "picture",
        "--alpha-mask": o.alpha_mask and kind != "picture",
        "--compare": o.compare is not None and kind != "picture",
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise files.InputError(f"{o.file}: {name} does not apply to this kind of file, {kind} (--kind chooses another)")
    tables, factors = (".csv", ".tsv", ".parquet"), (".npz",)
    if table and o.output is not None and o.predict is None and Path(o.output).suffix.lower() in tables:
        raise files.InputError(f"{o.output}: a table of predictions needs the pairs to predict: --predict PAIRS.csv")
    if table and o.predict is not None and o.output is None:
        raise files.InputError(f"{o.predict}: --predict needs a file for the predictions: --output PREDICTIONS.csv")
    if o.output is not None:
        of_kind = {"dense": (".csv", ".tsv", ".npy") + factors, "picture": (".png", ".npy") + factors}
        files.check_output(o.output, o.overwrite, of_kind.get(kind, tables if o.predict is not None else factors))
    for path, suffixes in ((o.compare, (".png",)), (o.plot, (".png", ".svg", ".pdf")), (o.save_model, (".npz",))):
        if path is not None:
            files.check_output(path, o.overwrite, suffixes)
    outputs = [str(Path(path).resolve()) for path in (o.output, o.compare, o.plot, o.save_model) if path is not None]
    for path in outputs:
        if outputs.count(path) > 1:
            raise files.InputError(f"{path}: two outputs have this name; give each its own")


def _load_dense(o: Options) -> Problem:
    dense = files.read_dense(o.file, o.missing_value)
    known = ~np.isnan(dense.values)
    if o.mask is not None:
        known &= files.read_mask(o.mask, dense.values.shape)
    row, col = known.nonzero()
    if row.size == 0:
        raise files.InputError(f"{o.mask}: no cell of {o.file} is both observed and under the mask")
    what = "header" if dense.columns else "no header"
    if dense.labels:
        what += f", labels in {', '.join(dense.labels)}"
    shape = (dense.values.shape[0], dense.values.shape[1])
    problem = Problem("dense", what, Entries(row, col, dense.values[known]), shape, dense=dense)
    dense.values[~known] = np.nan
    if not o.standardize:
        spread = np.array([dense.values[known[:, j], j].std() for j in range(shape[1]) if known[:, j].any()])
        if spread.max() > 10 * spread[spread > 0].min(initial=spread.max()):
            problem.notes.append("columns differ in scale: the large ones rule the error; --standardize weighs them alike")
    return problem


def _load_picture(o: Options) -> Problem:
    picture = files.read_picture(o.file, o.alpha_mask)
    height, width = picture.shape[:2]
    channels = 1 if picture.ndim == 2 else picture.shape[2]
    known = ~np.isnan(picture.reshape(height, width, channels)).any(axis=2)
    pixels = known.copy()
    if o.mask is not None:
        pixels &= files.read_mask(o.mask, (height, width))
    if o.sampling_rate is not None:
        pixels &= np.random.default_rng(o.seed).random((height, width)) < o.sampling_rate
    if not pixels.any():
        raise files.InputError(f"{o.file}: no observed pixel is left; raise --sampling-rate or change the mask")
    if pixels.all():
        raise files.InputError(
            f"{o.file}: no pixel is missing; say which are (--mask MASK.png, white: observed; --alpha-mask) or remove some at "
            "random (--sampling-rate 0.3)"
        )
    matrix = picture.reshape(height, width * channels)

    def entries(chosen: NDArray[np.bool_]) -> Entries:
        cells = np.repeat(chosen, channels, axis=1)
        row, col = cells.nonzero()
        return Entries(row, col, matrix[cells])

    removed = known & ~pixels
    if o.mask is not None and o.sampling_rate is None:
        removed[:] = False  # what is under a mask is not the truth
    hidden = entries(removed) if removed.any() else None
    what = f"{width} x {height} pixels, {'grey' if channels == 1 else 'colour'}, {100 * pixels.mean():.3g} % observed"
    return Problem("picture", what, entries(pixels), matrix.shape, hidden=hidden, picture=picture, pixels=pixels)


# ---------------------------------------------------------------------- fit and score


def split(entries: Entries, fraction: float, seed: int) -> tuple[Entries, Entries]:
    """(the rest, the held-out part), at random."""
    count = len(entries.values)
    held = round(fraction * count)
    if held < 1 or held >= count:
        raise files.InputError(f"{count} entries are too few to hold {fraction:g} of them out; pass --held-out 0")
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(count)[:held]] = True
    return entries.take(~chosen), entries.take(chosen)


def fit(o: Options, entries: Entries, shape: tuple[int, int], title: str) -> Fit:
    """Fit the estimator, with a progress bar on a terminal."""
    from .completion import DeepMatrixCompletion

    fitted = Fit(None, None, None)
    if o.standardize:
        count = np.maximum(np.bincount(entries.col, minlength=shape[1]), 1)
        fitted.mean = np.bincount(entries.col, entries.values, minlength=shape[1]) / count
        squares = np.bincount(entries.col, (entries.values - fitted.mean[entries.col]) ** 2, minlength=shape[1])
        fitted.scale = np.sqrt(squares / count)
        fitted.scale[fitted.scale == 0] = 1.0
    given = {"rank": o.rank, "depth": o.depth, "max_steps": o.max_steps, "device": o.device, "dtype": o.dtype}
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with _progress(title, hidden=o.quiet) as progress:
        try:
            fitted.model = DeepMatrixCompletion(random_state=o.seed, progress=progress, **arguments)
            fitted.model.fit((entries.row, entries.col), fitted.standardized(entries))
        except (ValueError, TypeError, NotImplementedError) as error:  # an option or the data do not fit the estimator
            raise files.InputError(str(error)) from error
    return fitted


@contextmanager
def _progress(title: str, hidden: bool) -> Iterator[Callable[[int, int, dict[str, float]], None] | bool]:
    if hidden or not sys.stderr.isatty():
        yield False
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[errors]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, errors="", total=None)

        def progress(step: int, max_steps: int, record: dict[str, float]) -> None:
            names = (("train", "train_rmse"), ("validation", "validation_rmse"))
            errors = "  ".join(f"{name} {record[key]:.4f}" for name, key in names if record.get(key) is not None)
            bar.update(task, completed=step, total=max_steps, errors=errors and f"RMSE {errors}")

        yield progress


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
    """The model, the bias-only baseline and, for pictures, the mean fill."""
    baseline = bias_baseline(train._replace(values=fitted.standardized(train)))
    predictions = {
        "this model": fitted.predict(test.row, test.col)[0],
        "bias only": fitted.in_units(baseline.predict(test.row, test.col), test.col),
    }
    if problem.picture is not None:
        channels = 1 if problem.picture.ndim == 2 else problem.picture.shape[2]
        sums = np.bincount(train.col % channels, train.values, minlength=channels)
        means = sums / np.bincount(train.col % channels, minlength=channels)
        predictions["mean fill"] = means[test.col % channels]
        predictions = {name: np.clip(prediction, 0, 1) for name, prediction in predictions.items()}
    unit = 1.0 if fitted.scale is None else fitted.scale[test.col]
    errors = {name: (prediction - test.values) / unit for name, prediction in predictions.items()}
    return [Score(name, float(np.sqrt(np.mean(e**2))), float(np.mean(np.abs(e)))) for name, e in errors.items()]


# ---------------------------------------------------------------------- outputs


def _completed_matrix(fitted: Fit, shape: tuple[int, int], given: NDArray[np.float64]) -> NDArray[np.float64]:
    """The given matrix with its NaN cells predicted, some rows at a time."""
    out = given.copy()
    block = max(1, PREDICT_BLOCK // shape[1])
    for start in range(0, shape[0], block):
        row, col = np.isnan(out[start : start + block]).nonzero()
        out[row + start, col] = fitted.predict(row + start, col)[0]
    return out


def completed_picture(problem: Problem, fitted: Fit) -> NDArray[np.float64]:
    """Observed pixels as they are, the others predicted and clipped to 0..1."""
    assert problem.picture is not None
    assert problem.pixels is not None
    given = problem.picture.copy()
    given[~problem.pixels] = np.nan
    filled = _completed_matrix(fitted, problem.shape, given.reshape(problem.shape))
    return np.clip(filled, 0, 1).reshape(problem.picture.shape)


def side_by_side(problem: Problem, completed: NDArray[np.float64], gap: int = 8) -> NDArray[np.float64]:
    """The original (where all of it is known), what was observed (black elsewhere) and the completed picture."""
    assert problem.picture is not None
    assert problem.pixels is not None
    observed = problem.picture.copy()
    observed[~problem.pixels] = 0
    known = problem.hidden is not None and not np.isnan(problem.picture).any()
    pictures = ([problem.picture] if known else []) + [observed, completed]
    white = np.ones((problem.picture.shape[0], gap, *problem.picture.shape[2:]))
    parts = [part for picture in pictures for part in (picture, white)]
    return np.concatenate(parts[:-1], axis=1)


def factors(fitted: Fit) -> dict[str, Any]:
    """The model's arrays: predictions are left @ core[L-1] ... core[0] @ right + row_bias + col_bias + offset."""
    model = fitted.model
    names = ("left", "core", "right", "row_bias", "col_bias", "offset", "row_labels", "col_labels")
    values = {name: getattr(model, f"{name}_") for name in names}
    arrays = {
        name: value.detach().cpu().numpy() if hasattr(value, "detach") else value
        for name, value in values.items()
        if value is not None
    }
    if fitted.mean is not None:
        arrays |= {"column_mean": fitted.mean, "column_scale": fitted.scale}
    return arrays


def write_plot(path: str, history: list[dict[str, Any]], scored: list[Score], title: str, overwrite: bool) -> None:
    """Training and, where the estimator held some out itself, validation RMSE over the steps; held-out errors as lines."""
    matplotlib = files.extra("matplotlib", "plots")
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for key, label, colour in (("train_rmse", "training", "#4477aa"), ("validation_rmse", "validation", "#cc6677")):
        points = [(h["step"], h[key]) for h in history if h.get(key) is not None and math.isfinite(h[key])]
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
    axes.set(xlabel="step", ylabel="RMSE", title=title)
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
        files.write_picture(o.compare, side_by_side(problem, completed_picture(problem, fitted)), o.overwrite)
        written.append(("before and after", o.compare))
    if o.plot is not None:
        write_plot(o.plot, report.model.history_, scored, Path(o.file).name, o.overwrite)
        written.append(("curve", o.plot))
    if o.save_model is not None:
        fitted.model.save(o.save_model, overwrite=o.overwrite)
        written.append(("model", o.save_model))
    return written


def _write_output(o: Options, problem: Problem, fitted: Fit) -> str:
    assert o.output is not None
    suffix = Path(o.output).suffix.lower()
    if suffix == ".npz":
        files.write_arrays(o.output, factors(fitted), o.overwrite)
        return "factors"
    if problem.picture is not None:
        picture = completed_picture(problem, fitted)
        if suffix == ".png":
            files.write_picture(o.output, picture, o.overwrite)
        else:
            files.write_dense(o.output, files.Dense(picture), o.overwrite)
        return "picture"
    if problem.dense is not None:
        values = _completed_matrix(fitted, problem.shape, problem.dense.values)
        files.write_dense(o.output, problem.dense._replace(values=values), o.overwrite)
        return "completed matrix"
    assert problem.pairs is not None
    row, col = problem.pairs
    values, known = fitted.predict(row, col)
    if not known.all():
        problem.notes.append(f"{int((~known).sum())} of {len(known)} pairs have a row or column without entries: biases only")
    columns = {problem.names[0]: row, problem.names[1]: col, "prediction": values, "known": known}
    files.write_table(o.output, columns, o.overwrite)
    return f"{len(values)} predictions"


# ---------------------------------------------------------------------- commands


class Refusal(click.ClickException):
    """Bad input: one clean line on stderr."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class Failure(Refusal):
    """The input was fine, the work could not be finished."""

    exit_code = 1


class Interrupted(Refusal):
    """Ctrl-C outside a fit."""

    exit_code = INTERRUPTED


@contextmanager
def _clean_errors() -> Iterator[None]:
    """Expected errors become one line and an exit code; a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing more was written") from None
    except (files.InputError, files.MissingExtra) as error:
        raise Refusal(str(error)) from error
    except OSError as error:  # an output that is there already is bad input; a full disk is not
        early = isinstance(error, files.OutputError) and error.__cause__ is None
        raise (Refusal if early or isinstance(error, FileExistsError) else Failure)(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        raise Failure(f"out of memory: {str(error) or 'try a lower --rank'}") from error


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lowrank-kernels", prog_name="lowrank-kernels")
def group() -> None:
    """Matrix completion with compressed deep low-rank models."""


@group.command()
def doctor() -> None:
    """Say what is installed, what runs where, and why not more."""
    from .doctor import print_report

    print_report()


def _fraction(low_open: bool) -> click.FloatRange:
    return click.FloatRange(0, 1, min_open=low_open, max_open=True)


@group.command(no_args_is_help=True)
@click.argument("file", type=click.Path())
@click.option("--kind", type=click.Choice(["triplets", "dense", "matrix-market", "picture"]), help="By default guessed.")
@click.option("--row", help="Column of row labels (triplets); by default guessed from names such as userId.")
@click.option("--col", help="Column of column labels (triplets), such as movieId.")
@click.option("--value", help="Column of values (triplets), such as rating.")
@click.option("--duplicates", type=click.Choice(["error", "mean", "last"]), default="error", show_default=True)
@click.option("--missing-value", type=float, metavar="NUMBER", help="Cells equal to this, such as -200, are missing (dense).")
@click.option("--mask", type=click.Path(), help="Picture or .npy of the matrix' size, white (1): observed (picture, dense).")
@click.option("--alpha-mask", is_flag=True, help="Fully transparent pixels are missing (picture).")
@click.option("--sampling-rate", type=_fraction(True), help="Keep this share of the pixels and score on the others (picture).")
@click.option("--held-out", type=_fraction(False), default=0.1, show_default=True, help="Share of the entries to score on.")
@click.option("--standardize", is_flag=True, help="Fit columns scaled to mean 0, standard deviation 1 (dense).")
@click.option("--rank", type=click.IntRange(min=2), help="Width of the factors, even; by default 32, less for a small matrix.")
@click.option("--depth", type=click.IntRange(min=1), help="Number of cores between the outer factors.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Steps of the solver.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", help="cpu or cuda; by default the estimator's choice.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]))
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch and the native kernels.")
@click.option("--refit/--no-refit", default=True, show_default=True, help="Fit to all entries before writing.")
@click.option("--output", "-o", type=click.Path(), help="Predictions, completed matrix or picture; .npz: the factors.")
@click.option("--predict", type=click.Path(), metavar="PAIRS", help="Table of pairs to predict (triplets, matrix-market).")
@click.option("--compare", type=click.Path(), help="PNG: original, observed, completed side by side (picture).")
@click.option("--plot", type=click.Path(), help="PNG, SVG or PDF: errors over the steps.")
@click.option("--save-model", type=click.Path(), help="The fitted model, for DeepMatrixCompletion.load().")
@click.option("--overwrite", is_flag=True, help="Replace outputs that are there already.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
@click.pass_context
def complete(context: click.Context, **options: Any) -> None:
    """Fill in the missing entries of FILE and say how well it went on entries held out.

    FILE is a table of (row, column, value) entries (.csv, .tsv, .parquet), a matrix with empty cells (.csv, .npy), a Matrix
    Market file (.mtx) or a picture.

    \b
    lowrank-kernels complete ratings.csv --predict pairs.csv -o predictions.csv
    lowrank-kernels complete sensors.csv --missing-value -200 --standardize -o filled.csv
    lowrank-kernels complete photo.png --mask mask.png -o repaired.png

    Ctrl-C keeps the best model so far, writes the outputs from it and exits with 130.
    """
    with _clean_errors():
        code = run(Options(**options))
    context.exit(code)


def run(o: Options) -> int:
    """The whole of ``complete``; returns the exit code."""
    import torch

    started = time.perf_counter()
    if o.plot is not None:
        files.extra("matplotlib", "plots")
    if o.device is not None and o.device.startswith("cuda") and not torch.cuda.is_available():
        raise files.InputError(f"--device {o.device}: no usable GPU; `lowrank-kernels doctor` says why")
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    problem = load(o)
    train = problem.observed
    test = problem.hidden
    if test is None and o.held_out > 0:
        train, test = split(train, o.held_out, o.seed)
    fitted = fit(o, train, problem.shape, "fitting" if test is None else "fitting, scored on the rest")
    scored = [] if test is None else scores(problem, fitted, train, test)
    report = fitted  # the fit that the scores belong to
    refit = o.refit and any((o.output, o.compare, o.save_model))
    refit = refit and len(train.values) < len(problem.observed.values) and not fitted.interrupted
    if refit:
        fitted = fit(o, problem.observed, problem.shape, "fitting to all entries")
    if o.save_model is not None and fitted.mean is not None:
        problem.notes.append("the saved model predicts standardized columns")
    written = write_outputs(o, problem, fitted, report, scored)
    if fitted.interrupted:
        problem.notes.append("interrupted: the best model so far was kept" + (" and written" if written else ""))
    if not o.quiet:
        _print(o, problem, report, scored, test, written, refit, time.perf_counter() - started)
    return INTERRUPTED if fitted.interrupted else 0


def _print(
    o: Options,
    problem: Problem,
    report: Fit,
    scored: list[Score],
    test: Entries | None,
    written: list[tuple[str, str]],
    refit: bool,
    seconds: float,
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows, cols = problem.shape
    count = len(problem.observed.values)
    model = report.model
    guessed = "" if o.kind else ", guessed"
    lines = [
        ("file", o.file),
        ("kind", f"{problem.kind}{guessed} ({problem.what})"),
        ("rows", f"{rows:,}"),
        ("columns", f"{cols:,}"),
        ("entries", f"{count:,}"),
        ("density", f"{100 * count / rows / cols:.3g} %"),
        (
            "model",
            f"inner width {model.left_.shape[1]}, {model.n_steps_:,} steps{', then fitted to all entries' if refit else ''}",
        ),
        ("status", model.status_.message),
        ("seconds", f"{seconds:.1f}"),
    ]
    for name, value in lines:
        table.add_row(name, Text(value))
    for note in problem.notes:
        table.add_row("note", Text(note, style="yellow"))
    for what, path in written:
        table.add_row("wrote", Text(f"{what}: {path}"))
    if not written:
        table.add_row("wrote", Text("nothing; --output, --plot and --save-model name files"))
    console.print(table)
    if test is None:
        return
    picture = problem.picture is not None
    unit = " / column std" if report.scale is not None else ""
    title = (
        f"{len(test.values):,} {'removed' if problem.hidden is not None else 'held-out'} {'values' if picture else 'entries'}"
    )
    errors = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    errors.add_column("")
    if picture:
        errors.add_column("PSNR (dB)", justify="right")
    errors.add_column(f"RMSE{unit}", justify="right")
    errors.add_column(f"MAE{unit}", justify="right")
    for score in scored:
        cells = [f"{score.psnr:.2f}"] if picture else []
        errors.add_row(score.name, *cells, f"{score.rmse:.4g}", f"{score.mae:.4g}")
    console.print()
    console.print(errors)

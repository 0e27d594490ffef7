"""Files as completion problems: one list of observed entries (row, column, value), whatever the kind of file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import files, pictures, tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

TIMES = re.compile(r"\b(date|time|datetime|timestamp|day|hour|month|week|year)\b", re.IGNORECASE)  # labels of a time series


@dataclass
class Options:
    """The options of ``lowrank-kernels complete``, as given."""

    file: str
    kind: str | None = None
    row: str | None = None
    col: str | None = None
    value: str | None = None
    duplicates: str = "error"
    missing_value: float | None = None
    header: bool | None = None
    window: int | None = None
    mask: str | None = None
    alpha_mask: bool = False
    sampling_rate: float | None = None
    held_out: float = 0.1
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
    what: str  # for the report
    observed: Entries
    shape: tuple[int, int]
    names: tuple[str, str, str] = ("row", "col", "value")
    hidden: Entries | None = None  # --sampling-rate: what was removed from the picture
    dense: files.Dense | None = None  # NaN where unknown
    picture: NDArray[np.float64] | None = None  # as read, NaN where unknown
    pixels: NDArray[np.bool_] | None = None  # (H, W) observed
    pairs: tuple[NDArray[Any], NDArray[Any]] | None = None  # --predict
    notes: list[str] = field(default_factory=list)

    def split(self, fraction: float, seed: int) -> tuple[Entries, Entries]:
        """(the rest, the held-out part) of the observed entries, at random; a column of a table keeps at least one."""
        count = len(self.observed.values)
        held = round(fraction * count)
        order = np.random.default_rng(seed).permutation(count)
        if self.dense is not None:
            order = order[~np.isin(order, np.unique(self.observed.col, return_index=True)[1])]
        if held < 1 or held >= count or len(order) == 0:
            raise files.InputError(f"{count} entries are too few to hold {fraction:g} of them out; pass --held-out 0")
        chosen = np.zeros(count, dtype=bool)
        chosen[order[:held]] = True
        return self.observed.take(~chosen), self.observed.take(chosen)


def load(o: Options) -> Problem:
    """Read the file as the kind it is or is told to be."""
    kind = o.kind or tables.guess_kind(o.file)
    _refuse_options(o, kind)
    _refuse_outputs(o, kind)
    if kind == "dense":
        return _load_dense(o)
    return _load_picture(o) if kind == "picture" else _load_entries(o, kind)


def _load_entries(o: Options, kind: str) -> Problem:
    if kind == "triplets":
        t = tables.read_triplets(o.file, o.row, o.col, o.value, o.duplicates)
        shape = len(np.unique(t.row)), len(np.unique(t.col))
        what = f"rows {t.names[0]}, columns {t.names[1]}, values {t.names[2]}"
    else:
        coo = tables.read_matrix_market(o.file)
        row, col = (np.asarray(x, dtype=np.int64) + 1 for x in (coo.row, coo.col))  # numbered from 1, as in the file
        t = tables.merge_duplicates(tables.Triplets(row, col, coo.data, ("row", "col", "value")), o.duplicates, o.file)
        shape, what = coo.shape, "rows and columns numbered from 1"
    pairs = None
    if o.predict is not None:  # columns named as in the file of entries where they are there, else guessed
        same = set(t.names[:2]) <= set(tables.column_names(o.predict))
        pairs = tables.read_pairs(o.predict, *t.names[:2]) if same else tables.read_pairs(o.predict)
    notes = [f"{t.merged} repeated entries merged ({o.duplicates})"] if t.merged else []
    return Problem(kind, what, Entries(*t[:3]), shape, t.names, pairs=pairs, notes=notes)


def _load_dense(o: Options) -> Problem:
    dense = tables.read_dense(o.file, o.missing_value, o.header)
    known = ~np.isnan(dense.values)
    if o.mask is not None:
        known &= pictures.read_mask(o.mask, (known.shape[0], known.shape[1]))
    row, col = known.nonzero()
    if row.size == 0:
        raise files.InputError(f"{o.mask}: no cell of {o.file} is both observed and under the mask")
    dense.values[~known] = np.nan
    what = "header" if dense.columns else "no header"
    notes = []
    if dense.labels:
        what += f", labels in {', '.join(dense.labels)}"
        if o.window is None and any(TIMES.search(name.replace("_", " ")) for name in dense.labels):
            notes.append("rows in time order? --window 1 joins each with its neighbours, often with a far smaller error")
    empty = np.flatnonzero(~known.any(axis=0))
    if empty.size:
        names = [dense.columns[j] if dense.columns else str(j + 1) for j in empty]
        more = ", ..." if len(names) > 5 else ""
        notes.append(f"columns without any observed cell stay empty: {', '.join(names[:5])}{more}")
    shape = (dense.values.shape[0], dense.values.shape[1])
    return Problem("dense", what, Entries(row, col, dense.values[known]), shape, dense=dense, notes=notes)


def _load_picture(o: Options) -> Problem:
    picture = pictures.read_picture(o.file, o.alpha_mask)
    height, width = picture.shape[:2]
    channels = 1 if picture.ndim == 2 else picture.shape[2]
    known = ~np.isnan(picture.reshape(height, width, channels)).any(axis=2)
    pixels = known.copy()
    if o.mask is not None:
        pixels &= pictures.read_mask(o.mask, (height, width))
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


# ---------------------------------------------------------------------- refusals, before any work


def _refuse_options(o: Options, kind: str) -> None:
    """Options that mean nothing for this kind are refused, not ignored."""
    table = kind in ("triplets", "matrix-market")
    wrong = {
        "--row, --col and --value": kind != "triplets" and any((o.row, o.col, o.value)),
        "--predict": o.predict is not None and not table,
        "--mask": o.mask is not None and table,
        "--missing-value": o.missing_value is not None and kind != "dense",
        "--header": o.header is not None and kind != "dense",
        "--window": o.window is not None and kind != "dense",
        "--sampling-rate": o.sampling_rate is not None and kind != "picture",
        "--alpha-mask": o.alpha_mask and kind != "picture",
        "--compare": o.compare is not None and kind != "picture",
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise files.InputError(f"{o.file}: {name} does not apply to this kind of file, {kind} (--kind chooses another)")


def _refuse_outputs(o: Options, kind: str) -> None:
    """Outputs of a kind that cannot be, that are there already, or that are one and the same file."""
    entries = kind in ("triplets", "matrix-market")
    of_table, factors = (".csv", ".tsv", ".parquet"), (".npz",)
    suffix = "" if o.output is None else Path(o.output).suffix.lower()
    if entries and suffix in of_table and o.predict is None:
        raise files.InputError(f"{o.output}: a table of predictions needs the pairs to predict: --predict PAIRS.csv")
    if entries and o.predict is not None and o.output is None:
        raise files.InputError(f"{o.predict}: --predict needs a file for the predictions: --output PREDICTIONS.csv")
    if kind == "dense" and suffix in factors:
        raise files.InputError(f"{o.output}: the output of a dense table is a table; --save-model {o.output} keeps the model")
    if o.output is not None:
        of_kind = {"dense": (".csv", ".tsv", ".npy"), "picture": (".png", ".npy", *factors)}
        files.check_output(o.output, o.overwrite, of_kind.get(kind, of_table if o.predict is not None else factors))
    for path, suffixes in ((o.compare, (".png",)), (o.plot, (".png", ".svg", ".pdf")), (o.save_model, (".npz",))):
        if path is not None:
            files.check_output(path, o.overwrite, suffixes)
    outputs = [str(Path(path).resolve()) for path in (o.output, o.compare, o.plot, o.save_model) if path is not None]
    for path in outputs:
        if outputs.count(path) > 1:
            raise files.InputError(f"{path}: two outputs have this name; give each its own")

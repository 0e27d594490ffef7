"""Readers of observed entries: (row, column, value) tables, dense tables with missing cells, Matrix Market files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .delimited import MISSING_WORDS, Text, as_labels, as_numbers, number, open_text, read_strings, such_lines
from .files import Dense, InputError, PathLike, as_held, extra, read_head

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROLE_NAMES = {  # column names in lower case, without _, - and spaces
    "row": ("row", "rowid", "rows", "user", "userid", "users", "uid", "i", "customer", "customerid", "reviewer", "reviewerid"),
    "col": ("col", "cols", "colid", "column", "columnid", "item", "itemid", "items", "iid", "j", "movie", "movieid", "product",
            "productid", "book", "bookid", "song", "songid", "track", "trackid", "artist", "artistid"),
    "value": ("value", "values", "val", "rating", "ratings", "score", "scores", "stars", "y", "count"),
}  # fmt: skip
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class Triplets(NamedTuple):
    """Observed entries by label."""

    row: NDArray[Any]  # (Z,) int64 or str
    col: NDArray[Any]  # (Z,) int64 or str
    values: NDArray[np.float64]  # (Z,)
    names: tuple[str, str, str]  # column names in the file
    merged: int = 0  # entries that `duplicates` merged away


# ---------------------------------------------------------------------- readers


def read_triplets(
    path: PathLike, row: str | None = None, col: str | None = None, value: str | None = None, duplicates: str = "error"
) -> Triplets:
    """Read (row label, column label, value) entries from CSV, TSV or Parquet.

    Args:
        path: .parquet, or text with comma, tab, semicolon or bar between the columns; a first line that holds a number is
            data, otherwise it is the header.
        row, col, value: column names (numbers from 1 where there is no header); by default guessed from names such as
            userId, movieId, rating (:data:`ROLE_NAMES`), else the first three columns.
        duplicates: what a pair given twice means: ``"error"``, ``"mean"`` or ``"last"``.

    Raises:
        InputError: the message names file, line, column, what was wanted and what came.
    """
    arrays, names, line = _read_roles(path, {"row": row, "col": col, "value": value})
    triplets = Triplets(arrays["row"], arrays["col"], arrays["value"], (names[0], names[1], names[2]))
    return merge_duplicates(triplets, duplicates, str(path), lambda e: f"line {line(e)}")


def read_pairs(path: PathLike, row: str | None = None, col: str | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read (row label, column label) pairs whose values are to be predicted; formats as :func:`read_triplets`."""
    arrays, _, _ = _read_roles(path, {"row": row, "col": col})
    return arrays["row"], arrays["col"]


def column_names(path: PathLike) -> list[str]:
    """The columns of a CSV, TSV or Parquet table; "column 1" and so on where there is no header."""
    if str(path).lower().endswith((".parquet", ".pq")):
        polars = extra("polars", "reading Parquet")
        read_head(path)
        try:
            return list(polars.read_parquet_schema(path))
        except (polars.exceptions.PolarsError, OSError) as error:
            raise InputError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from error
    return open_text(path).names


def merge_duplicates(
    triplets: Triplets, duplicates: str, path: str, place: Callable[[int], str] = lambda e: f"entry {e + 1}"
) -> Triplets:
    """One entry a pair; the order of the entries changes only where something was merged."""
    if duplicates not in ("error", "mean", "last"):
        raise ValueError(f"duplicates must be 'error', 'mean' or 'last', got {duplicates!r}")
    rows, i = np.unique(triplets.row, return_inverse=True)
    cols, j = np.unique(triplets.col, return_inverse=True)
    key = i.astype(np.int64) * len(cols) + j
    order = np.argsort(key, kind="stable")
    again = np.flatnonzero(key[order][1:] == key[order][:-1])
    if again.size == 0:
        return triplets
    if duplicates == "error":
        first, second = int(order[again[0]]), int(order[again[0] + 1])
        raise InputError(
            f"{path}: {place(second)}: the pair ({triplets.row[first]}, {triplets.col[first]}) is there twice, first in "
            f"{place(first)}{f' ({again.size} such entries)' if again.size > 1 else ''}; merge them with --duplicates mean "
            "or --duplicates last"
        )
    unique, group = np.unique(key, return_inverse=True)
    if duplicates == "mean":
        values = np.bincount(group, triplets.values) / np.bincount(group)
    else:
        values = np.empty(len(unique))
        values[group[order]] = triplets.values[order]  # stable order: the last one stays
    return Triplets(rows[unique // len(cols)], cols[unique % len(cols)], values, triplets.names, len(key) - len(unique))


def read_dense(path: PathLike, missing_value: float | None = None, header: bool | None = None) -> Dense:
    """Read a dense matrix from .npy or delimited text; NaN marks missing cells.

    Missing are empty cells, NA, N/A, NaN, null, none, ? and ``missing_value`` (a sentinel such as -200). Leading columns
    whose first cell is text (names, dates), or a first column without a name, become ``labels``.
    A first line without any number is the header, and so is one that counts five or more columns: 0,1,2,3,4, and one of three
    or more ascending whole numbers after a name, such as years, above lines of another kind; ``header`` says it.

    Raises:
        InputError: text in a column of numbers, an infinite value, a line too short or long, no observed cell.
    """
    if str(path).lower().endswith(".npy"):
        dense, missing_value = read_npy(path, missing_value), None
    else:
        dense = _read_dense_text(path, header)
    if missing_value is not None:
        dense.values[dense.values == missing_value] = np.nan
    if np.isinf(dense.values).any():
        i, j = (int(x[0]) for x in np.nonzero(np.isinf(dense.values)))
        name = f"{dense.columns[j]!r}" if dense.columns else str(j + 1)
        raise InputError(f"{path}: row {i + 1}, column {name}: a finite number or a missing cell was wanted, got inf")
    if not np.isfinite(dense.values).any():
        raise InputError(f"{path}: every cell is missing; at least one number is needed")
    return dense


def read_npy(path: PathLike, missing_value: float | None = None) -> Dense:
    """A matrix of real numbers; cells equal to ``missing_value``, as the array's own dtype has it, become NaN."""
    head = read_head(path)
    if not head.startswith(b"\x93NUMPY"):
        raise InputError(f"{path}: a NumPy array (.npy) was wanted, the file does not start like one")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not readable as a NumPy array: {str(error).splitlines()[0]}") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"{path}: an array of real numbers was wanted, got dtype {array.dtype}")
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"{path}: a matrix (2 dimensions, not empty) was wanted, got shape {array.shape}")
    values = array.astype(np.float64)
    if missing_value is not None:
        values[values == as_held(array.dtype, missing_value)] = np.nan
    return Dense(values)


def _read_dense_text(path: PathLike, header: bool | None) -> Dense:
    polars = extra("polars", "reading CSV")
    text = open_text(path, header)
    names = text.names
    frame, records = read_strings(text, names)
    columns: list[NDArray[np.float64]] = []
    kept: list[str] = []
    labels: dict[str, list[str]] = {}
    for name in names:
        cells = frame[name].str.strip_chars().fill_null("")
        missing = cells.str.to_lowercase().is_in(list(MISSING_WORDS))
        numbers = cells.cast(polars.Float64, strict=False)
        bad = np.flatnonzero((numbers.is_null() & ~missing).to_numpy())
        index = text.header is not None and name == "column 1"  # an unnamed first column: the row names of a data frame
        if not columns and (index or (bad.size and bad[0] == 0)):
            labels[name] = cells.to_list()
        elif bad.size:
            raise InputError(
                f"{path}: line {text.line(int(records[bad[0]]))}, column {name!r}: a number or a missing cell was wanted, "
                f"got {cells[int(bad[0])]!r}{such_lines(bad.size)}"
            )
        else:
            infinite = np.flatnonzero(numbers.is_infinite().fill_null(False).to_numpy())
            if infinite.size:
                raise InputError(
                    f"{path}: line {text.line(int(records[infinite[0]]))}, column {name!r}: a finite number or a missing cell "
                    f"was wanted, got {cells[int(infinite[0])]!r}"
                )
            columns.append(numbers.fill_null(np.nan).to_numpy())
            kept.append(name)
    if not columns:
        raise InputError(f"{path}: no column of numbers; the columns are {', '.join(names)}")
    return Dense(np.column_stack(columns), kept if text.header is not None else None, labels or None)


def read_matrix_market(path: PathLike) -> Any:
    """Read a Matrix Market file as a ``scipy.sparse.coo_array``: what is stored is observed, zeros included.

    In array form every cell is stored and NaN cells are missing. Pattern and complex matrices are refused.
    """
    sparse, scipy_io = extra("scipy.sparse", "reading Matrix Market"), extra("scipy.io", "reading Matrix Market")
    read_head(path)
    try:
        _, _, _, form, field, _ = scipy_io.mminfo(os.fspath(path))
        if field == "pattern":
            raise InputError(
                f"{path}: a pattern matrix stores places but no values, so there is nothing to predict; real or integer "
                "values are wanted"
            )
        if field == "complex":
            raise InputError(f"{path}: real values were wanted, got a complex matrix")
        matrix = scipy_io.mmread(os.fspath(path))
    except InputError:
        raise
    except Exception as error:  # scipy raises ValueError, OverflowError, TypeError and plain Exception here
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not readable as Matrix Market: {words}") from error
    if form == "array":
        dense = np.asarray(matrix, dtype=np.float64)
        row, col = np.nonzero(~np.isnan(dense))
        data = dense[row, col]
    else:
        row, col, data = matrix.row, matrix.col, matrix.data.astype(np.float64)
    if data.size == 0:
        raise InputError(f"{path}: no entries; at least one observed entry is needed")
    bad = np.flatnonzero(~np.isfinite(data))
    if bad.size:
        i, j = int(row[bad[0]]) + 1, int(col[bad[0]]) + 1
        raise InputError(f"{path}: entry at row {i}, column {j}: a finite number was wanted, got {data[bad[0]]}")
    return sparse.coo_array((data, (row, col)), shape=matrix.shape)


def guess_kind(path: PathLike) -> str:
    """'triplets', 'dense', 'matrix-market' or 'picture', from the extension and, for text, the first lines."""
    name = str(path).lower()
    head = read_head(path, 64)
    if name.endswith(PICTURE_SUFFIXES):
        return "picture"
    if name.endswith((".mtx", ".mtx.gz", ".mtx.bz2")) or head.startswith(b"%%MatrixMarket"):
        return "matrix-market"
    if name.endswith(".npy"):
        return "dense"
    if name.endswith((".parquet", ".pq")):
        return "triplets"
    if not name.endswith((".csv", ".tsv", ".tab", ".txt", ".data", ".dat")):
        raise InputError(
            f"{path}: the kind of file is not clear from its extension {Path(path).suffix!r}; pass --kind triplets, dense, "
            "matrix-market or picture"
        )
    text = open_text(path)
    plain = [re.sub(r"[\s_-]", "", column.lower()) for column in text.names]
    if all(any(column in words for column in plain) for words in ROLE_NAMES.values()):
        return "triplets"
    if text.width in (3, 4):  # labels are integers or text, without gaps; measurements rarely are
        cells = [cells for (_, cells), _ in zip(text.records(), range(200), strict=False) if len(cells) >= 3]
        numbers = [[number(cell) for cell in row[:3]] for row in cells]
        if cells and all(
            row[2] is not None
            and all((x is None or x.is_integer()) and cell.strip() for x, cell in zip(row[:2], c, strict=False))
            for row, c in zip(numbers, cells, strict=True)
        ):
            return "triplets"
    return "dense"


# ---------------------------------------------------------------------- columns by role


def choose_columns(
    path: str, names: Sequence[str], explicit: dict[str, str | None], numeric: Callable[[str], bool]
) -> dict[str, str]:
    """The column of each role: as told, else by its name, else by position."""
    there = f"the columns are {', '.join(names)}"
    chosen: dict[str, str] = {}
    for role, name in explicit.items():
        if name is not None:
            if name not in names:
                raise InputError(f"{path}: no column {name!r} (--{role}); {there}")
            if name in chosen.values():
                raise InputError(f"{path}: column {name!r} is asked for twice; {there}")
            chosen[role] = name
    by_name = dict(chosen)
    for role in explicit:
        if role not in by_name:
            for name in names:
                if re.sub(r"[\s_-]", "", name.lower()) in ROLE_NAMES[role] and name not in by_name.values():
                    by_name[role] = name
                    break
    positional = len(by_name) < len(explicit)
    if positional:
        by_name = dict(chosen)
        free = (name for name in names if name not in chosen.values())
        for role in explicit:
            if role not in by_name:
                name = next(free, None)
                if name is None:
                    raise InputError(f"{path}: {len(explicit)} columns are needed ({', '.join(explicit)}); {there}")
                by_name[role] = name
    value = by_name.get("value")
    if positional and value is not None and explicit.get("value") is None and not numeric(value):
        raise InputError(
            f"{path}: no column of numbers found for the values: {value!r} holds text; {there}; "
            "name them with --row, --col and --value"
        )
    return by_name


def _read_roles(path: PathLike, explicit: dict[str, str | None]) -> tuple[dict[str, NDArray[Any]], tuple[str, ...], Any]:
    """The columns of ``explicit``'s roles: labels for row and col, finite numbers for value."""
    if str(path).lower().endswith((".parquet", ".pq")):
        return _read_parquet(path, explicit)
    text = open_text(path)
    if any("::" in name for name in text.names) or (text.header is None and b"::" in text.data[:200]):
        raise InputError(f"{path}: columns separated by '::' are not supported; convert them: sed 's/::/\\t/g'")
    names = text.names
    given = {role: _positional(name, names, text) for role, name in explicit.items()}

    def numeric(name: str) -> bool:
        at = names.index(name)
        filled = (cells[at] for _, cells in text.records() if len(cells) > at and cells[at].strip())
        return number(next(filled, "")) is not None

    chosen = choose_columns(str(path), names, given, numeric)
    frame, records = read_strings(text, [chosen[role] for role in explicit])

    def line(row: int) -> int:
        return text.line(int(records[row]))

    arrays: dict[str, NDArray[Any]] = {}
    for role in explicit:
        read = as_numbers if role == "value" else as_labels
        arrays[role] = read(str(path), chosen[role], frame[chosen[role]], line)
    return arrays, tuple(chosen[role] for role in explicit), line


def _positional(name: str | None, names: Sequence[str], text: Text) -> str | None:
    """A file without a header takes column numbers, from 1."""
    if name is not None and text.header is None and name.isdecimal():
        return f"column {int(name)}"
    return name


def _read_parquet(path: PathLike, explicit: dict[str, str | None]) -> tuple[dict[str, NDArray[Any]], tuple[str, ...], Any]:
    polars = extra("polars", "reading Parquet")
    read_head(path)
    try:
        schema = polars.read_parquet_schema(path)
        names = list(schema)
        chosen = choose_columns(str(path), names, explicit, lambda name: schema[name].is_numeric())
        frame = polars.read_parquet(path, columns=list(chosen.values()))
    except (polars.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from error
    if frame.height == 0:
        raise InputError(f"{path}: the table has no rows")
    arrays: dict[str, NDArray[Any]] = {}
    for role in explicit:
        name = chosen[role]
        column, kind = frame[name], schema[name]
        if column.null_count():
            first = int(column.is_null().arg_max() or 0)
            raise InputError(f"{path}: row {first + 1}, column {name!r}: a value was wanted, got null")
        if role == "value":
            if not kind.is_numeric():
                raise InputError(f"{path}: column {name!r}: numbers were wanted, got {kind}")
            numbers = column.cast(polars.Float64).to_numpy()
            bad = np.flatnonzero(~np.isfinite(numbers))
            if bad.size:
                raise InputError(
                    f"{path}: row {int(bad[0]) + 1}, column {name!r}: a finite number was wanted, got {numbers[bad[0]]}"
                )
            arrays[role] = numbers
        elif kind.is_integer():
            arrays[role] = column.cast(polars.Int64).to_numpy()
        else:
            arrays[role] = as_labels(str(path), name, column.cast(polars.String), lambda row: row + 1)
    return arrays, tuple(chosen[role] for role in explicit), lambda row: row + 1

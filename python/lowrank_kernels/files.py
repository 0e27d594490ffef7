"""Readers of observed entries (tables, dense matrices, Matrix Market, pictures) and writers that leave no half file.

Every refusal is an :class:`InputError` whose one line says file, line, column, what was wanted and what came. Writers go
through :func:`write_atomically`: a temporary file in the same folder, synced, then renamed, so a full disk or a crash
leaves the old file or none. The libraries behind the formats are extras and are imported where they are used.
"""

from __future__ import annotations

import csv
import importlib
import io
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

PathLike = str | os.PathLike[str]

MISSING_WORDS = ("", "na", "n/a", "nan", "null", "none", "?")  # cells of a dense table that mean "not observed"
ROLE_NAMES = {  # column names in lower case, without _, - and spaces
    "row": ("row", "rowid", "rows", "user", "userid", "users", "uid", "i", "customer", "customerid", "reviewer", "reviewerid"),
    "col": ("col", "cols", "colid", "column", "columnid", "item", "itemid", "items", "iid", "j", "movie", "movieid", "product",
            "productid", "book", "bookid", "song", "songid", "track", "trackid", "artist", "artistid"),
    "value": ("value", "values", "val", "rating", "ratings", "score", "scores", "stars", "y", "count"),
}  # fmt: skip
SIGNATURES = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"PAR1", "a Parquet file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it or export it as CSV first"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
)
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class InputError(ValueError):
    """A file that cannot be read as asked; the message is one line for the user."""


class OutputError(OSError):
    """A file that could not be written; nothing half-written was left behind."""


class MissingExtra(ImportError):
    """A library of an optional extra is not installed."""


class Triplets(NamedTuple):
    """Observed entries by label."""

    row: NDArray[Any]  # (Z,) int64 or str
    col: NDArray[Any]  # (Z,) int64 or str
    values: NDArray[np.float64]  # (Z,)
    names: tuple[str, str, str]  # column names in the file
    merged: int = 0  # entries that `duplicates` merged away


class Dense(NamedTuple):
    """A dense matrix whose missing cells are NaN."""

    values: NDArray[np.float64]  # (m, n)
    columns: list[str] | None = None  # (n,) header, where the file has one
    labels: dict[str, list[str]] | None = None  # leading text columns: name -> (m,) cells, written back unchanged


def extra(module: str, purpose: str) -> Any:
    """Import ``module``, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{purpose} needs {module.split('.')[0]}: pip install lowrank-kernels[all]") from error


# ---------------------------------------------------------------------- text tables


class _Text(NamedTuple):
    """A delimited text file, checked: UTF-8, not binary, not empty."""

    path: str
    data: bytes
    separator: str
    header: list[str] | None
    width: int

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """(line number, cells) of every record from the first data line on, blank lines as []; slow, for errors."""
        reader = csv.reader(io.StringIO(self.data.decode("utf-8-sig"), newline=""), delimiter=self.separator)
        above = self.header is not None
        started = False
        try:
            for cells in reader:
                filled = any(cell.strip() for cell in cells) or len(cells) > 1
                started = started or (filled and not above)
                if started:
                    yield reader.line_num, cells
                above = above and not filled
        except csv.Error as error:
            raise InputError(f"{self.path}: line {reader.line_num}: {error}") from error

    def lines_above(self) -> int:
        """Lines above the first data line: the header and blank ones."""
        first = next(self.records(), None)
        return 0 if first is None else first[0] - 1 - sum(cell.count("\n") for cell in first[1])

    def line(self, record: int) -> int:
        """Line number of a record below the header."""
        return next((line for number, (line, _) in enumerate(self.records()) if number == record), record + 1)


def _bytes(path: PathLike) -> bytes:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a file was wanted, this is a folder") from None
    except OSError as error:
        raise InputError(f"{path}: could not be read: {error.strerror or error}") from error
    if not data.strip(b"\xef\xbb\xbf \t\r\n"):
        raise InputError(f"{path}: the file is empty")
    return data


def _open_text(path: PathLike, header: bool | None = None) -> _Text:
    data = _bytes(path)
    for signature, what in SIGNATURES:
        if data.startswith(signature):
            raise InputError(f"{path}: a text table was wanted, this is {what}")
    zero = data.find(b"\0")
    if zero >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise InputError(f"{path}: line {line}: a text table was wanted, this is binary data (a zero byte at byte {zero})")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: line {line}: UTF-8 text was wanted, got byte 0x{data[error.start]:02x} at byte {error.start}; "
            "convert it with: iconv -f LATIN1 -t UTF-8"
        ) from None
    first = next(line for line in data.decode("utf-8-sig").splitlines() if line.strip())
    tabs = str(path).lower().endswith((".tsv", ".tab"))
    separator = "\t" if tabs else max(",\t;|", key=first.count)  # the first of equals: a comma
    cells = next(csv.reader([first], delimiter=separator))
    if header is None:  # a number in the first line means data, except five or more column numbers 0, 1, 2 ...
        numbers = [_number(cell) for cell in cells]
        counted = len(cells) > 4 and numbers in ([float(j) for j in range(len(cells))], [j + 1.0 for j in range(len(cells))])
        header = counted or (any(cell.strip() for cell in cells) and all(x is None for x in numbers))
        if header and _all_missing(cells):
            header = False
    names = [cell.strip() or f"column {j + 1}" for j, cell in enumerate(cells)] if header else None
    if names is not None and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: line 1: column {twice!r} is there twice; rename one of them")
    return _Text(str(path), data, separator, names, len(cells))


def _number(cell: str) -> float | None:
    try:
        return float(cell) if "_" not in cell else None
    except ValueError:
        return None


def _all_missing(cells: Sequence[str]) -> bool:
    return all(cell.strip().lower() in MISSING_WORDS for cell in cells)


def _names(text: _Text) -> list[str]:
    return text.header if text.header is not None else [f"column {j + 1}" for j in range(text.width)]


def _read_strings(text: _Text, wanted: Sequence[str]) -> tuple[pl.DataFrame, NDArray[np.int64]]:
    """The wanted columns as text and each kept row's record number; blank lines are dropped, ragged ones refused."""
    polars = extra("polars", "reading CSV")
    names = _names(text)
    if next(text.records(), None) is None:
        raise InputError(f"{text.path}: a header but no data below it")
    above = text.lines_above()
    try:
        frame = polars.read_csv(
            text.data.split(b"\n", above)[above] if above else text.data,
            separator=text.separator,
            has_header=False,  # columns by position: names may need quoting
            schema=dict.fromkeys(names, polars.String),
        )
    except (polars.exceptions.PolarsError, TypeError) as error:
        _refuse_ragged(text)
        raise InputError(f"{text.path}: not readable as a table: {str(error).splitlines()[0]}") from error
    if frame.width != text.width:
        _refuse_ragged(text)
    records = np.arange(frame.height)
    blank = np.zeros(frame.height, dtype=bool)
    if re.search(rb"\n[ \t]*\r?\n", text.data):
        for number, (_, cells) in enumerate(text.records()):
            blank[number] = not any(cell.strip() for cell in cells) and len(cells) <= 1
    full = (frame.height - int(blank.sum()) + (text.header is not None)) * (text.width - 1)
    if b'"' in text.data or text.data.count(text.separator.encode()) != full:
        _refuse_ragged(text)
    if blank.any():
        frame, records = frame.filter(~polars.Series(blank)), records[~blank]
    return frame.select(wanted), records


def _refuse_ragged(text: _Text) -> None:
    """An error for the first record whose number of cells is not the header's."""
    last = (0, 0)
    bad: tuple[int, int] | None = None
    for line, cells in text.records():
        if cells and bad is None and len(cells) != text.width and any(cell.strip() for cell in cells):
            bad = line, len(cells)
        if cells:
            last = line, len(cells)
    if bad is not None:
        cut = "; the last line seems to be cut off" if bad == last and bad[1] < text.width else ""
        raise InputError(
            f"{text.path}: line {bad[0]}: {text.width} columns were wanted ({', '.join(_names(text)[:6])}), got {bad[1]}{cut}"
        )


def _finite(path: str, name: str, column: pl.Series, line: Callable[[int], int]) -> NDArray[np.float64]:
    """A text column as finite numbers."""
    polars = extra("polars", "reading CSV")
    text = column.str.strip_chars()
    numbers: NDArray[np.float64] = text.cast(polars.Float64, strict=False).fill_null(np.nan).to_numpy()
    bad = np.flatnonzero(~np.isfinite(numbers))
    if bad.size:
        cell = text[int(bad[0])]
        hint = "; write decimals with a point" if cell and re.fullmatch(r"[-+]?\d+,\d+", cell) else ""
        raise InputError(
            f"{path}: line {line(int(bad[0]))}, column {name!r}: a finite number was wanted, got "
            f"{repr(cell) if cell else 'an empty cell'}{hint}{_more(bad.size)}"
        )
    return numbers


def _more(count: int) -> str:
    return f" ({count} such lines)" if count > 1 else ""


def _labels(path: str, name: str, column: pl.Series, line: Callable[[int], int]) -> NDArray[Any]:
    """A text column as labels: int64 where every cell is a plain integer ('007' is not), else text."""
    polars = extra("polars", "reading CSV")
    text = column.str.strip_chars().fill_null("")
    bad = np.flatnonzero((text == "").to_numpy())
    if bad.size:
        raise InputError(
            f"{path}: line {line(int(bad[0]))}, column {name!r}: a label was wanted, got an empty cell{_more(bad.size)}"
        )
    if bool(text.str.contains(r"^(0|-?[1-9]\d{0,17})(\.0+)?$").all()):
        return text.str.replace(r"\.0+$", "").cast(polars.Int64).to_numpy()
    return np.asarray(text.to_list(), dtype=str)


def _choose_columns(
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
    text = _open_text(path)
    if any("::" in name for name in _names(text)) or (text.header is None and b"::" in text.data[:200]):
        raise InputError(f"{path}: columns separated by '::' are not supported; convert them: sed 's/::/\\t/g'")
    names = _names(text)
    given = {role: _positional(name, names, text) for role, name in explicit.items()}

    def numeric(name: str) -> bool:
        at = names.index(name)
        filled = (cells[at] for _, cells in text.records() if len(cells) > at and cells[at].strip())
        return _number(next(filled, "")) is not None

    chosen = _choose_columns(str(path), names, given, numeric)
    frame, records = _read_strings(text, [chosen[role] for role in explicit])

    def line(row: int) -> int:
        return text.line(int(records[row]))

    arrays: dict[str, NDArray[Any]] = {}
    for role in explicit:
        read = _finite if role == "value" else _labels
        arrays[role] = read(str(path), chosen[role], frame[chosen[role]], line)
    return arrays, tuple(chosen[role] for role in explicit), line


def _positional(name: str | None, names: Sequence[str], text: _Text) -> str | None:
    """A file without a header takes column numbers, from 1."""
    if name is not None and text.header is None and name.isdecimal():
        return f"column {int(name)}"
    return name


def _read_parquet(path: PathLike, explicit: dict[str, str | None]) -> tuple[dict[str, NDArray[Any]], tuple[str, ...], Any]:
    polars = extra("polars", "reading Parquet")
    _bytes_head(path)
    try:
        schema = polars.read_parquet_schema(path)
        names = list(schema)
        chosen = _choose_columns(str(path), names, explicit, lambda name: schema[name].is_numeric())
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
            arrays[role] = _labels(str(path), name, column.cast(polars.String), lambda row: row + 1)
    return arrays, tuple(chosen[role] for role in explicit), lambda row: row + 1


def _bytes_head(path: PathLike, count: int = 16) -> bytes:
    """The first bytes of a file that exists and is not empty."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(count)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a file was wanted, this is a folder") from None
    except OSError as error:
        raise InputError(f"{path}: could not be read: {error.strerror or error}") from error
    if not head:
        raise InputError(f"{path}: the file is empty")
    return head


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
        _bytes_head(path)
        try:
            return list(polars.read_parquet_schema(path))
        except (polars.exceptions.PolarsError, OSError) as error:
            raise InputError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from error
    return _names(_open_text(path))


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
    A first line without any number is the header, and so is one that counts five or more columns: 0,1,2,3,4.

    Raises:
        InputError: text in a column of numbers, an infinite value, a line too short or long, no observed cell.
    """
    dense = _read_npy(path) if str(path).lower().endswith(".npy") else _read_dense_text(path, header)
    if missing_value is not None:
        dense.values[dense.values == missing_value] = np.nan
    if np.isinf(dense.values).any():
        i, j = (int(x[0]) for x in np.nonzero(np.isinf(dense.values)))
        name = f"{dense.columns[j]!r}" if dense.columns else str(j + 1)
        raise InputError(f"{path}: row {i + 1}, column {name}: a finite number or a missing cell was wanted, got inf")
    if not np.isfinite(dense.values).any():
        raise InputError(f"{path}: every cell is missing; at least one number is needed")
    return dense


def _read_npy(path: PathLike) -> Dense:
    head = _bytes_head(path)
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
    return Dense(array.astype(np.float64))


def _read_dense_text(path: PathLike, header: bool | None) -> Dense:
    polars = extra("polars", "reading CSV")
    text = _open_text(path, header)
    names = _names(text)
    frame, records = _read_strings(text, names)
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
                f"got {cells[int(bad[0])]!r}{_more(bad.size)}"
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
    _bytes_head(path)
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


def read_picture(path: PathLike, alpha_mask: bool = False) -> NDArray[np.float64]:
    """Read a picture as numbers in 0..1: ``(H, W)`` grey or ``(H, W, 3)`` colour; palettes are converted.

    With ``alpha_mask`` fully transparent pixels are missing (NaN) and others are taken as they are; without it a picture
    with transparent pixels is refused, since what a pixel under them is worth is a choice. 16-bit grey keeps its depth.
    """
    image = _open_picture(path)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA" if image.mode not in ("LA", "La") else "LA")
        alpha = np.asarray(image.getchannel("A"))
        image = image.convert("L" if image.mode == "LA" else "RGB")
        if (alpha < 255).any() and not alpha_mask:
            raise InputError(
                f"{path}: {int((alpha < 255).sum())} pixels are transparent; pass --alpha-mask to take fully transparent "
                "pixels as missing, or flatten the picture: magick in.png -background white -alpha remove out.png"
            )
        hidden = alpha == 0
    else:
        hidden = np.zeros((image.height, image.width), dtype=bool)
    array = _picture_array(path, image)
    if hidden.all():
        raise InputError(f"{path}: every pixel is transparent; at least one observed pixel is needed")
    array[hidden] = np.nan
    return array


def _open_picture(path: PathLike) -> Any:
    pil, ops = extra("PIL.Image", "reading pictures"), extra("PIL.ImageOps", "reading pictures")
    _bytes_head(path)
    try:
        image = pil.open(path)
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise InputError(f"{path}: one picture was wanted, got an animation of {frames} frames; save one of them")
        image.load()
        return ops.exif_transpose(image)
    except pil.UnidentifiedImageError:
        raise InputError(f"{path}: a picture was wanted, the content is of no picture format known to Pillow") from None
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not readable as a picture: {str(error).splitlines()[0]}") from error


def _picture_array(path: PathLike, image: Any) -> NDArray[np.float64]:
    if image.mode.startswith("I"):  # 16 bits a pixel; older Pillow opens them as 32-bit "I"
        array = np.asarray(image).astype(np.float64)
        if array.max() > 65535 or array.min() < 0:
            raise InputError(f"{path}: at most 16 bits a pixel were wanted, got values from {array.min():g} to {array.max():g}")
        return array / 65535
    if image.mode == "F":
        array = np.asarray(image).astype(np.float64)
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise InputError(f"{path}: a floating-point picture must hold values in 0..1")
        return array
    grey = image.mode in ("1", "L") or (image.mode == "P" and _grey_palette(image))
    return np.asarray(image.convert("L" if grey else "RGB")).astype(np.float64) / 255


def _grey_palette(image: Any) -> bool:
    colours = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def read_mask(path: PathLike, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Read which pixels or cells are observed: a picture (white, that is at least half bright) or a 0/1 .npy of ``shape``."""
    if str(path).lower().endswith(".npy"):
        values = _read_npy(path).values
        if not np.isin(values, (0, 1)).all():
            raise InputError(f"{path}: a mask of 0 (missing) and 1 (observed) was wanted, got other values too")
        mask = values == 1
    else:
        image = _open_picture(path)
        mask = np.asarray(image.convert("RGB").convert("L")) >= 128 if image.mode != "L" else np.asarray(image) >= 128
    if mask.shape != tuple(shape):
        raise InputError(
            f"{path}: a mask of {shape[0]} rows x {shape[1]} columns was wanted, got {mask.shape[0]} x {mask.shape[1]}"
        )
    if not mask.any():
        raise InputError(f"{path}: the mask marks nothing as observed (white: observed, black: missing)")
    return mask


def guess_kind(path: PathLike) -> str:
    """'triplets', 'dense', 'matrix-market' or 'picture', from the extension and, for text, the first lines."""
    name = str(path).lower()
    head = _bytes_head(path, 64)
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
    text = _open_text(path)
    plain = [re.sub(r"[\s_-]", "", column.lower()) for column in _names(text)]
    if all(any(column in words for column in plain) for words in ROLE_NAMES.values()):
        return "triplets"
    if text.width in (3, 4):  # labels are integers or text, without gaps; measurements rarely are
        cells = [cells for (_, cells), _ in zip(text.records(), range(200), strict=False) if len(cells) >= 3]
        numbers = [[_number(cell) for cell in row[:3]] for row in cells]
        if cells and all(
            row[2] is not None
            and all((x is None or x.is_integer()) and cell.strip() for x, cell in zip(row[:2], c, strict=False))
            for row, c in zip(numbers, cells, strict=True)
        ):
            return "triplets"
    return "dense"


# ---------------------------------------------------------------------- writers


def check_output(path: PathLike, overwrite: bool = False, suffixes: Sequence[str] | None = None) -> None:
    """Refuse early, before the long work: an unknown extension, a missing folder, an existing file."""
    target = Path(path)
    if suffixes is not None and target.suffix.lower() not in suffixes:
        raise InputError(f"{path}: can be written as {', '.join(suffixes)}, got extension {target.suffix!r}")
    folder = target.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} is not there; make it first: mkdir -p {folder}")
    if target.exists():
        if not target.is_file():
            raise OutputError(f"{path}: exists and is not a regular file")
        if not overwrite:
            raise OutputError(f"{path}: exists already; pass --overwrite (overwrite=True) to replace it")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: the folder {folder} is not writable")


def write_atomically(path: PathLike, writer: Callable[[BinaryIO], object], overwrite: bool = False) -> None:
    """Write a whole file or none: ``writer`` fills a temporary file beside ``path``, which is synced and renamed.

    Without ``overwrite`` an existing file is never replaced, also when it appears meanwhile. On any failure, a full disk
    and an interrupt included, the temporary file is removed and the old file is as it was.

    Raises:
        OutputError: with the system's reason.
    """
    check_output(path, overwrite)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as handle:
            writer(handle)
            handle.flush()
            os.fsync(handle.fileno())
        if overwrite:
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o7777)
            os.replace(temporary, target)
        else:
            _rename_new(temporary, target)
    except FileExistsError as error:
        raise OutputError(f"{path}: exists already; pass --overwrite (overwrite=True) to replace it") from error
    except OSError as error:
        raise OutputError(f"{path}: could not be written: {error.strerror or error}; nothing was left behind") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    with suppress(OSError):  # the rename itself reaches the disk; some file systems cannot do this
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _rename_new(temporary: Path, target: Path) -> None:
    """Rename that fails where the target exists: a hard link does, a rename would replace it."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(str(target)) from None
        os.rename(temporary, target)


def _whole(fill: Callable[[BinaryIO], object]) -> Callable[[BinaryIO], object]:
    """Serialize in memory, then write: polars and NumPy hide the system's reason when their own writing fails."""

    def write(handle: BinaryIO) -> None:
        buffer = io.BytesIO()
        fill(buffer)
        handle.write(buffer.getbuffer())

    return write


def write_table(path: PathLike, columns: dict[str, Any], overwrite: bool = False) -> None:
    """Write named columns as .csv, .tsv or .parquet."""
    check_output(path, overwrite, (".csv", ".tsv", ".parquet"))
    frame = extra("polars", "writing tables").DataFrame({name: np.asarray(column) for name, column in columns.items()})
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        write_atomically(path, _whole(frame.write_parquet), overwrite)
    else:
        separator = "\t" if suffix == ".tsv" else ","
        write_atomically(path, _whole(lambda handle: frame.write_csv(handle, separator=separator)), overwrite)


def write_arrays(path: PathLike, arrays: dict[str, Any], overwrite: bool = False) -> None:
    """Write named arrays, such as the factors, as .npz without pickles."""
    check_output(path, overwrite, (".npz",))
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.kind == "O":
            plain[name] = array.astype(str)
    write_atomically(path, lambda handle: np.savez_compressed(handle, **plain), overwrite)  # type: ignore[arg-type]


def write_dense(path: PathLike, dense: Dense, overwrite: bool = False) -> None:
    """Write a dense matrix as .npy, or as .csv or .tsv with the header and label columns it was read with."""
    check_output(path, overwrite, (".csv", ".tsv", ".npy"))
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        write_atomically(path, _whole(lambda handle: np.save(handle, dense.values, allow_pickle=False)), overwrite)
        return
    polars = extra("polars", "writing CSV")
    names = dense.columns or [f"column {j + 1}" for j in range(dense.values.shape[1])]
    frame = polars.DataFrame({**(dense.labels or {}), **dict(zip(names, dense.values.T, strict=True))}).fill_nan(None)
    separator, header = "\t" if suffix == ".tsv" else ",", dense.columns is not None
    write_atomically(
        path, _whole(lambda handle: frame.write_csv(handle, separator=separator, include_header=header)), overwrite
    )


def write_picture(path: PathLike, picture: NDArray[Any], overwrite: bool = False) -> None:
    """Write ``(H, W)`` or ``(H, W, 3)`` numbers, clipped to 0..1, as an 8-bit PNG; NaN becomes black."""
    check_output(path, overwrite, (".png",))
    pil = extra("PIL.Image", "writing pictures")
    pixels = np.rint(np.clip(np.nan_to_num(picture, nan=0.0), 0, 1) * 255).astype(np.uint8)
    write_atomically(path, lambda handle: pil.fromarray(pixels).save(handle, format="PNG"), overwrite)

"""Delimited text (CSV, TSV and their kin), checked: UTF-8, not binary, not empty, no ragged line; columns as text.

Separator and header are guessed from the first line. Polars does the reading; a slow pass over the records gives the line
number of what is wrong.
"""

from __future__ import annotations

import csv
import io
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .files import InputError, PathLike, extra, read_head

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

MISSING_WORDS = ("", "na", "n/a", "nan", "null", "none", "?")  # cells of a dense table that mean "not observed"
INTEGER = r"^(0|-?[1-9]\d{0,17})(\.0+)?$"  # a label that is one; 007 is not
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


class Text(NamedTuple):
    """A delimited text file, checked: UTF-8, not binary, not empty."""

    path: str
    data: bytes
    separator: str
    header: list[str] | None
    width: int

    @property
    def names(self) -> list[str]:
        """Of the columns; "column 1" and so on where there is no header."""
        return self.header if self.header is not None else [f"column {j + 1}" for j in range(self.width)]

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
    data = read_head(path, None)
    if b"\r" in data and b"\n" not in data:  # the line ends of old Macs
        data = data.replace(b"\r", b"\n")
    if not data.strip(b"\xef\xbb\xbf \t\r\n"):
        raise InputError(f"{path}: the file is empty")
    return data


def open_text(path: PathLike, header: bool | None = None) -> Text:
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
    if header is None:  # a number in the first line means data, but for column numbers 0, 1, 2 ... and names such as years
        numbers = [number(cell) for cell in cells]
        counted = len(cells) > 4 and numbers in ([float(j) for j in range(len(cells))], [j + 1.0 for j in range(len(cells))])
        header = counted or (any(cell.strip() for cell in cells) and all(x is None for x in numbers))
        header = header or (_ascending(cells) and _other_kind(data, separator, numbers[0] is None and bool(cells[0].strip())))
        if header and _all_missing(cells):
            header = False
    names = [cell.strip() or f"column {j + 1}" for j, cell in enumerate(cells)] if header else None
    if names is not None and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: line 1: column {twice!r} is there twice; rename one of them")
    return Text(str(path), data, separator, names, len(cells))


def _ascending(cells: Sequence[str]) -> bool:
    """A first cell that is no number, then three or more whole numbers in ascending order: years, identifiers of a pivot."""
    whole = [int(cell) for cell in cells[1:] if re.fullmatch(r" *\d{1,18} *", cell)]
    return number(cells[0]) is None and len(whole) == len(cells) - 1 > 2 and all(map(operator.lt, whole, whole[1:]))


def _other_kind(data: bytes, separator: str, named: bool) -> bool:
    """Whether the lines below a first one of whole numbers have others, or a number where that has a name."""
    lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=separator)
    below = [cells for cells in itertools.islice(lines, 101) if any(cell.strip() for cell in cells)][1:]
    if named and below and all(number(cells[0]) is not None for cells in below):
        return True
    found = [number(cell) for cells in below for cell in cells[1:]]
    return any(value is not None and not value.is_integer() for value in found)


def number(cell: str) -> float | None:
    try:
        return float(cell) if "_" not in cell else None
    except ValueError:
        return None


def _all_missing(cells: Sequence[str]) -> bool:
    return all(cell.strip().lower() in MISSING_WORDS for cell in cells)


def read_strings(text: Text, wanted: Sequence[str]) -> tuple[pl.DataFrame, NDArray[np.int64]]:
    """The wanted columns as text and each kept row's record number; blank lines are dropped, ragged ones refused."""
    polars = extra("polars", "reading CSV")
    names = text.names
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


def _refuse_ragged(text: Text) -> None:
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
            f"{text.path}: line {bad[0]}: {text.width} columns were wanted ({', '.join(text.names[:6])}), got {bad[1]}{cut}"
        )


def as_numbers(path: str, name: str, column: pl.Series, line: Callable[[int], int]) -> NDArray[np.float64]:
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
            f"{repr(cell) if cell else 'an empty cell'}{hint}{such_lines(bad.size)}"
        )
    return numbers


def such_lines(count: int) -> str:
    return f" ({count} such lines)" if count > 1 else ""


def as_labels(path: str, name: str, column: pl.Series, line: Callable[[int], int]) -> NDArray[Any]:
    """A text column as labels: int64 where every cell is a plain integer ('007' is not), else text."""
    polars = extra("polars", "reading CSV")
    text = column.str.strip_chars().fill_null("")
    bad = np.flatnonzero((text == "").to_numpy())
    if bad.size:
        raise InputError(
            f"{path}: line {line(int(bad[0]))}, column {name!r}: a label was wanted, got an empty cell{such_lines(bad.size)}"
        )
    if bool(text.str.contains(INTEGER).all()):
        return text.str.replace(r"\.0+$", "").cast(polars.Int64).to_numpy()
    return np.asarray(text.to_list(), dtype=str)

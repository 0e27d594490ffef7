"""Entries of Parquet or CSV parts that together need not fit in memory: read in streams, sorted into this process's rows.

Two passes over the files. The first counts: the processes share the parts out, and learn all labels, how many entries each row
has, and the values' mean and spread. Then the rows are cut into consecutive blocks of about equal work, one a process. In the
second pass every process reads the entries of its rows (row groups whose statistics exclude them are skipped) into arrays of
the known size, which compressed-sparse sorting turns into the index. Memory stays below twice the index.
"""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .delimited import INTEGER
from .entries import ObservedEntries
from .files import InputError, PathLike, extra
from .processes import Team, agreed
from .row_shards import RowShard
from .tables import choose_columns

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

BATCH = 1 << 20  # entries that are converted at a time
ROW_WORK = 8  # a row costs about as much as so many entries, see entries._plan()
FACTOR_ROW = 16  # times the rank: numbers held for a row of a factor at the most
GIB = 1 << 30
SUFFIXES = (".parquet", ".pq", ".csv", ".tsv")

Report = Callable[[str, int, int], None]  # what, done, of how many


class Parts(NamedTuple):
    """The entries of the rows that are here, with zero mean and unit variance over all of them."""

    entries: ObservedEntries
    shard: RowShard
    row_labels: NDArray[Any]  # of the rows that are here, sorted
    col_labels: NDArray[Any]  # of all columns, sorted
    offset: float
    scale: float


class Memory(NamedTuple):
    """Bytes that one process needs at most, and for what."""

    held: int  # by the sorted entries
    building: int  # beside these, while it is built
    training: int  # beside these, while they are fitted

    @property
    def peak(self) -> int:
        return self.held + max(self.building, self.training)


def needed_memory(
    entries: int, rows: int, columns: int, *, rank: int = 32, itemsize: int = 4, automatic: bool = True
) -> Memory:
    """What one process needs for its entries and rows.

    The index holds a place and a value of every entry twice. While it is built there are the entries once more, unsorted.
    Training with automatic strengths holds weights on both sides, zeros in place of the values, two temporaries when they
    change, and as much that the allocator keeps (measured at 1e8 entries); a factor row comes with its gradient, moments,
    variance, penalty and temporaries.
    """
    place = 4 if max(rows, columns) < 2**31 else 8
    index = 2 * entries * (place + itemsize) + 8 * (rows + columns)
    building = entries * (2 * place + itemsize)
    a_row, an_entry = (FACTOR_ROW, 7) if automatic else (FACTOR_ROW - 6, 0)
    return Memory(index, building, an_entry * itemsize * entries + a_row * rank * itemsize * (rows + columns))


def free_memory() -> int:
    """Bytes that this machine, or the container, has to give."""
    free = math.inf
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        free = free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, StopIteration, ValueError):
        if not math.isfinite(free) and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(free, 2**62))


def refuse_memory(team: Team, need: Memory, limit: int | None, what: str) -> str:
    """One line about what is needed and what there is; raises in all processes where it does not fit in one of the machines."""
    said = team.meet((socket.gethostname(), need, free_memory() if limit is None else limit))
    here = [other for host, other, _ in said if host == said[team.rank][0]]
    needed, free = sum(other.peak for other in here), said[team.rank][2]
    parts = f"entries {need.held / GIB:.2g}, building {need.building / GIB:.2g}, training {need.training / GIB:.2g}"
    line = (
        f"{what}: {needed / GIB:.3g} GiB are needed on this machine by {len(here)} of {team.size} processes "
        f"(one: {parts}), {free / GIB:.3g} GiB are {'free' if limit is None else 'allowed'}"
    )
    if needed > free:
        raise InputError(
            f"{line}; use more machines, a smaller rank, or a part of the data"
            + ("" if limit is None else ", or raise the memory limit")
        )
    return line


def list_parts(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    """The files of a list, of a folder (its .parquet, .csv and .tsv files) or of a pattern, in order."""
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
            if not inside:
                raise InputError(f"{path}: the folder has no file that ends with {', '.join(SUFFIXES)}")
            found += inside
        elif path.exists():
            found.append(path)
        elif re.search(r"[*?\[]", path.name):
            inside = sorted(path.parent.glob(path.name))
            if not inside:
                raise InputError(f"{path}: no file fits the pattern")
            found += inside
        else:
            raise InputError(f"{path}: no such file")
    if not found:
        raise InputError("parts: at least one file is needed, got none")
    for path in found:
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{path}: a part must end with {', '.join(SUFFIXES)}, got {path.suffix!r}")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; a part without entries still needs its header or schema")
    return found


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv")


def _scan(path: Path, rows: int = 0) -> pl.LazyFrame:
    """A part; columns of text are typed by so many rows, by none they stay text."""
    polars = extra("polars", "reading parts")
    if not _is_text(path):
        return polars.scan_parquet(path)
    return polars.scan_csv(path, separator="\t" if path.suffix.lower() == ".tsv" else ",", infer_schema_length=rows)


def _kind(path: Path, name: str, dtype: Any) -> str:
    polars = extra("polars", "reading parts")
    if dtype.is_integer():
        return "integers"
    if dtype in (polars.String, polars.Categorical):
        return "strings"
    raise InputError(f"{path}: column {name!r} must hold labels, integers or strings, got {dtype}")


class _Source:
    """The parts as frames of three columns ``row, col, value`` of the same types.

    Labels in text are integers where those of all text parts are, written plainly: 007 is not.
    """

    def __init__(self, paths: list[Path], row: str | None, col: str | None, value: str | None, team: Team) -> None:
        polars = extra("polars", "reading parts")
        scans: list[tuple[Path, pl.LazyFrame, dict[str, Any]]] = []
        for path in paths:
            try:
                scan = _scan(path)
                schema = dict(scan.collect_schema())
                guessed = dict(_scan(path, 100).collect_schema()) if not scans else schema
            except (polars.exceptions.PolarsError, OSError) as error:
                raise InputError(f"{path}: cannot be read as {path.suffix[1:]}: {_first_line(error)}") from error
            if not scans:
                roles = choose_columns(
                    str(path),
                    list(schema),
                    {"row": row, "col": col, "value": value},
                    lambda name, s=guessed: s[name].is_numeric(),  # type: ignore[misc]
                )
                self.names = tuple(roles[role] for role in ("row", "col", "value"))
            missing = [name for name in self.names if name not in schema]
            if missing:
                raise InputError(
                    f"{path}: has no column {missing[0]!r}, which {paths[0].name} has; its columns are {', '.join(schema)}"
                )
            if not _is_text(path) and not schema[self.names[2]].is_numeric():
                raise InputError(f"{path}: column {self.names[2]!r} must hold numbers, got {schema[self.names[2]]}")
            scans.append((path, scan, schema))
        in_text = self._kinds_in_text([(path, scan) for path, scan, _ in scans if _is_text(path)], team)
        first: dict[str, tuple[str, str]] = {}
        self.frames: list[tuple[Path, pl.LazyFrame]] = []
        for path, scan, schema in scans:
            kinds = in_text if _is_text(path) else {name: _kind(path, name, schema[name]) for name in self.names[:2]}
            for name, kind in kinds.items():
                known, where = first.setdefault(name, (kind, path.name))
                if known != kind:
                    raise InputError(f"{path}: column {name!r} holds {kind}, in {where} it holds {known}")
            if not kinds:  # a header and nothing below it, in all text parts
                continue
            types = {"integers": polars.Int64, "strings": polars.String}
            columns = [
                (_plain(name, kinds[name]) if _is_text(path) else polars.col(name)).cast(types[kinds[name]]).alias(role)
                for name, role in zip(self.names[:2], ("row", "col"), strict=True)
            ]
            number = polars.col(self.names[2])
            number = number.str.strip_chars().cast(polars.Float64, strict=False) if _is_text(path) else number
            columns.append(number.cast(polars.Float64).alias("value"))
            self.frames.append((path, scan.select(columns)))

    def _kinds_in_text(self, scans: list[tuple[Path, pl.LazyFrame]], team: Team) -> dict[str, str]:
        """Of the labels in all parts of text, by name; the processes share these out. Nothing where no part has an entry."""
        polars = extra("polars", "reading parts")
        if not scans:
            return {}
        found = [0, 0, 0]  # entries, and those whose row or column label is no integer
        for path, scan in scans[team.rank :: team.size]:
            words = [~polars.col(name).str.strip_chars().str.contains(INTEGER) for name in self.names[:2]]
            query = scan.select(polars.len().alias("n"), *(word.sum().alias(f"w{i}") for i, word in enumerate(words)))
            try:
                (counted,) = polars.collect_all([query], engine="streaming")
            except (polars.exceptions.PolarsError, OSError) as error:
                raise InputError(f"{path}: cannot be read: {_first_line(error)}") from error
            found = [a + b for a, b in zip(found, counted.row(0), strict=True)]
        total = [sum(part) for part in zip(*team.meet(found), strict=True)]
        if not total[0]:
            return {}
        return {name: "strings" if bad else "integers" for name, bad in zip(self.names[:2], total[1:], strict=True)}

    def count(self) -> int | None:
        """All entries, where the files' own words are enough to know."""
        polars = extra("polars", "reading parts")
        if not all(path.suffix.lower() in (".parquet", ".pq") for path, _ in self.frames):
            return None
        return sum(int(frame.select(polars.len()).collect().item()) for _, frame in self.frames)


def _plain(name: str, kind: str) -> Any:
    """A column of text labels; whole numbers may be written 3.0."""
    column = extra("polars", "reading parts").col(name).str.strip_chars()
    return column.str.replace(r"\.0+$", "") if kind == "integers" else column


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _Counts(NamedTuple):
    """What the first pass learns of some parts."""

    rows: tuple[NDArray[Any], NDArray[np.int64]]  # labels, entries of each
    cols: NDArray[Any]
    moments: tuple[int, float, float]  # number, mean, sum of squared deviations
    empty: tuple[str, ...]  # parts without an entry


def _count(frames: list[tuple[Path, pl.LazyFrame]], told: Callable[[int], None]) -> _Counts:
    polars = extra("polars", "reading parts")
    rows, cols, moments, empty = None, None, (0, 0.0, 0.0), []
    for done, (path, frame) in enumerate(frames):
        value = polars.col("value")
        queries = [
            frame.group_by("row").agg(polars.len().cast(polars.Int64).alias("entries")),
            frame.select("col").unique(),
            frame.select(
                polars.len().alias("count"),
                value.mean().alias("mean"),
                value.var(ddof=0).alias("variance"),
                (value.is_null() | ~value.is_finite()).sum().alias("bad"),
                polars.any_horizontal(polars.col("row", "col").is_null()).sum().alias("unlabelled"),
            ),
        ]
        try:
            by_row, by_col, found = polars.collect_all(queries, engine="streaming")
        except (polars.exceptions.PolarsError, OSError) as error:
            raise InputError(f"{path}: cannot be read: {_first_line(error)}") from error
        count, mean, variance, bad, unlabelled = found.row(0)
        if unlabelled:
            raise InputError(f"{path}: {unlabelled} of {count} entries have no row or column label; remove or name them")
        if bad:
            raise InputError(f"{path}: {bad} of {count} values are missing, no numbers, NaN or infinite; remove these entries")
        told(done + 1)
        if not count:
            empty.append(path.name)
            continue
        rows = by_row if rows is None else polars.concat([rows, by_row]).group_by("row").agg(polars.col("entries").sum())
        cols = by_col if cols is None else polars.concat([cols, by_col]).unique()
        moments = _joined(moments, (count, mean, variance * count))
    if rows is None or cols is None:
        return _Counts((np.zeros(0), np.zeros(0, np.int64)), np.zeros(0), moments, tuple(empty))
    rows = rows.sort("row")
    labels, entries = _labels(rows["row"]), rows["entries"].to_numpy()
    return _Counts((labels, entries), _labels(cols["col"].sort()), moments, tuple(empty))


def _labels(column: pl.Series) -> NDArray[Any]:
    array: NDArray[Any] = column.to_numpy()
    return array.astype(str) if array.dtype.kind == "O" else array


def _joined(a: tuple[int, float, float], b: tuple[int, float, float]) -> tuple[int, float, float]:
    """Number, mean and squared deviations of two sets together."""
    count, gap = a[0] + b[0], b[1] - a[1]
    if count == 0:
        return a
    return count, a[1] + gap * b[0] / count, a[2] + b[2] + gap * gap * a[0] * b[0] / count


def _blocks(counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The first row of every process, and the end: consecutive rows of about equal work."""
    work = np.concatenate([[0], np.cumsum(counts + ROW_WORK)])
    wanted = work[-1] * np.arange(1, size) / size
    return np.concatenate([[0], np.searchsorted(work, wanted), [len(counts)]])


def read_parts(
    paths: PathLike | Iterable[PathLike],
    *,
    row: str | None = None,
    col: str | None = None,
    value: str | None = None,
    duplicates: str = "error",
    dtype: torch.dtype = torch.float32,
    rank: int = 32,
    automatic: bool = True,
    memory_limit: int | None = None,
    team: Team | None = None,
    report: Report | None = None,
    say: Callable[[str], None] | None = None,
) -> Parts:
    """Read the entries of this process's rows from Parquet or CSV parts.

    Args:
        paths: files, a folder or a pattern; all processes must see them.
        row, col, value: column names; by default guessed from names such as userId, movieId, rating.
        duplicates: what a pair given twice means: ``"error"`` or ``"mean"``.
        dtype: of the values, float32 or float64.
        rank, automatic: of the training that follows, for the memory that it needs.
        memory_limit: bytes allowed on a machine; by default what is free.
        team: the processes that share the rows out; None: this one alone.
        report: called as ``report(what, done, total)`` on the way.
        say: is given the lines that a user should read: memory needed, parts without entries.

    Raises:
        InputError: files that are not there, empty, or of other columns; labels or values missing; pairs given twice; more
            memory needed than there is. In all processes alike.

    Note:
        The same blocks of rows, in the same order, for the same files and number of processes.
    """
    team, polars = team or Team(), extra("polars", "reading parts")
    told: Report = report or (lambda what, done, total: None)
    say = say or (lambda line: None)
    if duplicates not in ("error", "mean"):
        raise ValueError(f"read_parts: duplicates must be 'error' or 'mean', got {duplicates!r}")
    itemsize = torch.empty(0, dtype=dtype).element_size()
    files = list_parts(paths)
    agreed(team, "read_parts", {"parts": [(path.name, path.stat().st_size) for path in files]})
    source = _Source(files, row, col, value, team)
    known = source.count()
    if known is not None:  # before anything is read
        share = needed_memory(known // team.size, 0, 0, rank=rank, itemsize=itemsize, automatic=automatic)
        refuse_memory(team, share, memory_limit, f"{known:,} entries")
    mine = source.frames[team.rank :: team.size]
    said = team.meet(_count(mine, lambda done: told("counting parts", done, len(mine))))
    moments = (0, 0.0, 0.0)
    for each in said:
        moments = _joined(moments, each.moments)
    total = moments[0]
    empty = [name for each in said for name in each.empty]
    if total == 0:
        raise InputError(f"{files[0]}: no part has an entry; at least one observed entry is needed")
    if empty:
        say(f"{len(empty)} of {len(files)} parts have no entry: {', '.join(sorted(empty)[:5])}")
    offset, scale = moments[1], math.sqrt(moments[2] / total)
    scale = scale if scale > 1e-12 * abs(offset) else abs(offset) or 1.0  # constant up to rounding
    row_labels, places = np.unique(np.concatenate([each.rows[0] for each in said if len(each.rows[0])]), return_inverse=True)
    counts = np.zeros(len(row_labels), np.int64)
    np.add.at(counts, places, np.concatenate([each.rows[1] for each in said if len(each.rows[0])]))
    col_labels = np.unique(np.concatenate([each.cols for each in said if len(each.cols)]))
    cuts = _blocks(counts, team.size)
    low, high = int(cuts[team.rank]), int(cuts[team.rank + 1])
    own, count = row_labels[low:high], int(counts[low:high].sum())
    need = needed_memory(count, len(own), len(col_labels), rank=rank, itemsize=itemsize, automatic=automatic)
    say(refuse_memory(team, need, memory_limit, f"{total:,} entries of {len(row_labels):,} x {len(col_labels):,}"))
    shard = RowShard(team, low, high - low, len(row_labels))
    if count == 0:
        return Parts(ObservedEntries.none((0, len(col_labels)), dtype=dtype), shard, own, col_labels, offset, scale)
    indices = polars.Int32 if max(len(own), len(col_labels)) < 2**31 else polars.Int64
    numbers = {torch.float32: polars.Float32, torch.float64: polars.Float64}[dtype]
    codes = [
        polars.LazyFrame({role: labels, f"{role}_code": np.arange(len(labels))}).with_columns(
            polars.col(f"{role}_code").cast(indices)
        )
        for role, labels in (("row", own), ("col", col_labels))
    ]
    bounds = [polars.lit(label.item()) for label in (own[0], own[-1])]
    wanted = (
        polars.concat([frame for _, frame in source.frames])
        .filter(polars.col("row").is_between(*bounds))
        .join(codes[0], on="row")
        .join(codes[1], on="col")
        .select("row_code", "col_code", ((polars.col("value") - offset) / scale).cast(numbers))
    )
    arrays = [np.empty(count, t) for t in (np.int32 if indices == polars.Int32 else np.int64,) * 2]
    arrays.append(np.empty(count, np.float32 if dtype == torch.float32 else np.float64))
    filled = 0
    for batch in wanted.collect_batches(chunk_size=BATCH, maintain_order=False, engine="streaming"):
        for array, column in zip(arrays, batch.iter_columns(), strict=True):
            array[filled : filled + len(batch)] = column.to_numpy()
        filled += len(batch)
        told("reading entries", filled, count)
    if filled != count:
        raise InputError(f"{files[0].parent}: the parts changed while they were read: {filled} entries, {count} were counted")
    entries = _sorted(arrays, (len(own), len(col_labels)), own, col_labels, duplicates)
    return Parts(entries, shard, own, col_labels, offset, scale)


def _sorted(
    arrays: list[NDArray[Any]], shape: tuple[int, int], rows: NDArray[Any], cols: NDArray[Any], duplicates: str
) -> ObservedEntries:
    """Unsorted triplets, which are used up, as entries: scipy's counting sorts need no more than their result."""
    sparse = extra("scipy.sparse", "sorting entries")
    value, col, row = arrays.pop(), arrays.pop(), arrays.pop()
    given = len(value)
    matrix = sparse.coo_array((value, (row, col)), shape=shape).tocsr()  # adds the values of a pair given twice
    if matrix.nnz < given:
        times = sparse.coo_array((np.ones(given, np.float32), (row, col)), shape=shape).tocsr()
        if duplicates == "error":
            place = int((times.data > 1).argmax())
            label = rows[np.searchsorted(times.indptr, place, side="right") - 1], cols[times.indices[place]]
            raise InputError(
                f"{given - matrix.nnz} duplicate entries, the first at (row, col) = ({label[0]}, {label[1]}); "
                "pass duplicates='mean' (--duplicates mean) to average them"
            )
        matrix.data /= times.data
        del times
    del row, col, value
    return ObservedEntries.from_sorted_csr(matrix)

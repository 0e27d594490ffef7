"""Task files: one or two texts and a label a line, from CSV, TSV, Parquet or JSON lines.

A :class:`Layout` says in which columns they stand, by name or, in files without a header, by number from 1; :data:`TASKS`
has those of the GLUE tasks and of the original STS Benchmark. In tab-separated files quotes are text, as GLUE means them,
and further columns may differ from line to line. Every refusal names the file and the line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..delimited import open_text
from ..files import InputError, PathLike, extra, read_head

KINDS = ("regression", "classification")


@dataclass(frozen=True)
class Layout:
    """Where the texts and the label of a task stand, and what the label is."""

    text: tuple[str, ...]  # one or two columns
    label: str
    kind: str = "classification"
    label_range: tuple[float, float] | None = None  # of a regression
    separator: str | None = None  # by default guessed

    @property
    def numbered(self) -> bool:
        """Columns by number: the file has no header."""
        return all(column.isdecimal() for column in (*self.text, self.label))


class Task(NamedTuple):
    """A known task: its layouts, the first that fits a file counts, and the names that its files have in a folder."""

    layouts: tuple[Layout, ...]
    train: tuple[str, ...] = ("train.tsv",)
    dev: tuple[str, ...] = ("dev.tsv",)


def _pair(first: str, second: str, label: str = "label") -> Task:
    return Task((Layout((first, second), label, separator="\t"),))


_SCORE = Layout(("sentence1", "sentence2"), "score", "regression", (0.0, 5.0), "\t")
TASKS: dict[str, Task] = {
    "stsb": Task(
        (_SCORE, replace(_SCORE, text=("6", "7"), label="5")), ("sts-train.csv", "train.tsv"), ("sts-dev.csv", "dev.tsv")
    ),
    "sst2": Task((Layout(("sentence",), "label", separator="\t"),)),
    "cola": Task((Layout(("4",), "2", separator="\t"),)),
    "mrpc": Task((Layout(("#1 String", "#2 String"), "Quality", separator="\t"),)),
    "qqp": _pair("question1", "question2", "is_duplicate"),
    "qnli": _pair("question", "sentence"),
    "rte": _pair("sentence1", "sentence2"),
    "mnli": _pair("sentence1", "sentence2", "gold_label")._replace(dev=("dev_matched.tsv",)),
}


@dataclass(frozen=True)
class Examples:
    """The examples of a file: texts, and labels as scores or as numbers of the classes."""

    texts: tuple[tuple[str, ...], ...]
    labels: np.ndarray[Any, Any]  # float64 or int64
    kind: str
    classes: tuple[str, ...] = ()
    source: str = ""
    digest: str = ""  # of the file, so that a results folder knows its data

    def __len__(self) -> int:
        return len(self.texts)

    def pick(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> Examples:
        """The examples with these indices, in this order."""
        chosen = [int(i) for i in indices]
        return replace(self, texts=tuple(self.texts[i] for i in chosen), labels=self.labels[chosen])


# ---------------------------------------------------------------------- reading


def read_examples(path: PathLike, layouts: Sequence[Layout], classes: Sequence[str] | None = None) -> Examples:
    """Read a task file; ``classes`` are those of the training file, by default all that are found, sorted.

    Raises:
        InputError: an unreadable file, a missing column, a line that is too short, an empty text, a label that is no number,
            not finite, out of range or of an unknown class; file and line are named.
    """
    layout, records, unit = _open(path, layouts)
    texts: list[tuple[str, ...]] = []
    raw: list[tuple[int, Any]] = []
    for place, cells, label in records:
        for name, cell in zip(layout.text, cells, strict=True):
            if not isinstance(cell, str) or not cell.strip():
                came = "an empty cell" if cell is None or isinstance(cell, str) else repr(cell)
                raise InputError(f"{path}: {unit} {place}, {_column(name)}: a text was wanted, got {came}")
        texts.append(tuple(cell.strip() for cell in cells))
        raw.append((place, label))
    if not texts:
        raise InputError(f"{path}: no examples; a header alone?")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    if layout.kind == "regression":
        scores = np.array([_score(path, unit, place, layout, label) for place, label in raw])
        return Examples(tuple(texts), scores, layout.kind, (), str(path), digest)
    words = [_class(path, unit, place, layout, label) for place, label in raw]
    known = tuple(classes) if classes is not None else tuple(sorted(set(words), key=_class_order))
    if len(known) < 2:
        raise InputError(
            f"{path}: {_column(layout.label)}: at least two classes are needed, every label is {known[0]!r}; "
            "for scores pass --kind regression"
        )
    if classes is None and len(known) > 1000:
        raise InputError(f"{path}: {_column(layout.label)}: {len(known):,} different labels; for scores pass --kind regression")
    numbers = {word: number for number, word in enumerate(known)}
    for (place, _), word in zip(raw, words, strict=True):
        if word not in numbers:
            raise InputError(
                f"{path}: {unit} {place}, {_column(layout.label)}: one of the training file's classes was wanted "
                f"({', '.join(known[:8])}), got {word!r}"
            )
    labels = np.array([numbers[word] for word in words], dtype=np.int64)
    return Examples(tuple(texts), labels, layout.kind, known, str(path), digest)


def find_files(path: PathLike, task: str | None, dev: PathLike | None) -> tuple[str, str | None]:
    """The training and the dev file; a folder is searched for the names that a known task's files have."""
    if not Path(path).is_dir():
        return os.fspath(path), None if dev is None else os.fspath(dev)
    if task is None:
        raise InputError(f"{path}: a file was wanted, this is a folder; name the file, or the task by --task")
    found = []
    for names in (TASKS[task].train, TASKS[task].dev):
        there = [Path(path) / name for name in names if (Path(path) / name).is_file()]
        if not there and (names is TASKS[task].train or dev is None):
            raise InputError(f"{path}: holds none of {', '.join(names)}, the files of --task {task}")
        found.append(str(there[0]) if there else None)
    assert found[0] is not None
    return found[0], found[1] if dev is None else os.fspath(dev)


def _column(name: str) -> str:
    return f"column {name}" if name.isdecimal() else f"column {name!r}"


def _score(path: PathLike, unit: str, place: int, layout: Layout, label: Any) -> float:
    try:
        value = math.nan if label is None or isinstance(label, bool) else float(label)
    except (TypeError, ValueError):
        value = math.nan
    low, high = layout.label_range or (-math.inf, math.inf)
    if not (math.isfinite(value) and low <= value <= high):
        within = f" from {low:g} to {high:g}" if layout.label_range else ""
        came = "an empty cell" if label in (None, "") else repr(label)
        raise InputError(f"{path}: {unit} {place}, {_column(layout.label)}: a finite number{within} was wanted, got {came}")
    return value


def _class(path: PathLike, unit: str, place: int, layout: Layout, label: Any) -> str:
    missing = isinstance(label, float) and not math.isfinite(label)
    word = str(label).strip() if isinstance(label, str | int | float) and not missing else ""
    if not word:
        raise InputError(f"{path}: {unit} {place}, {_column(layout.label)}: a class was wanted, got an empty cell")
    return word


def _class_order(word: str) -> tuple[float, str]:
    try:
        return float(word), word
    except ValueError:
        return math.inf, word


Record = tuple[int, tuple[Any, ...], Any]  # line or row, texts, label


def _open(path: PathLike, layouts: Sequence[Layout]) -> tuple[Layout, Iterator[Record], str]:
    """The layout that fits, the records, and what counts them: lines or rows."""
    suffix = Path(path).suffix.lower()
    if suffix in (".parquet", ".pq"):
        polars = extra("polars", "reading Parquet")
        read_head(path)
        try:
            frame = polars.read_parquet(path)
        except (polars.exceptions.PolarsError, OSError) as error:
            raise InputError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from error
        layout = _fitting(path, layouts, frame.columns)
        columns = [frame[name].to_list() for name in (*layout.text, layout.label)]
        return layout, ((row + 1, cells[:-1], cells[-1]) for row, cells in enumerate(zip(*columns, strict=True))), "row"
    if suffix in (".jsonl", ".ndjson"):
        objects = list(_json_lines(path))
        if not objects:
            raise InputError(f"{path}: no line holds an example")
        layout = _fitting(path, layouts, list(objects[0][1]))
        return layout, _from_objects(path, layout, objects), "line"
    return _open_delimited(path, layouts)


def _fitting(path: PathLike, layouts: Sequence[Layout], names: Sequence[str]) -> Layout:
    named = [layout for layout in layouts if not layout.numbered] or list(layouts)
    for layout in named:
        if {*layout.text, layout.label} <= set(names):
            return layout
    missing = next(name for name in (*named[0].text, named[0].label) if name not in names)
    raise InputError(f"{path}: no {_column(missing)}; the columns are {', '.join(names)}")


def _json_lines(path: PathLike) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(read_head(path, None).decode("utf-8-sig", errors="replace").split("\n"), 1):
        if text.strip():
            try:
                value = json.loads(text)
            except ValueError as error:
                raise InputError(f"{path}: line {line}: a JSON object was wanted: {error}") from None
            if not isinstance(value, dict):
                raise InputError(f"{path}: line {line}: a JSON object was wanted, got {type(value).__name__}")
            yield line, value


def _from_objects(path: PathLike, layout: Layout, objects: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[Record]:
    for line, value in objects:
        for name in (*layout.text, layout.label):
            if name not in value:
                raise InputError(f"{path}: line {line}: no {_column(name)}; the keys are {', '.join(value)}")
        yield line, tuple(value[name] for name in layout.text), value[layout.label]


def _open_delimited(path: PathLike, layouts: Sequence[Layout]) -> tuple[Layout, Iterator[Record], str]:
    text = open_text(path, header=False)  # its checks: UTF-8, not binary, not empty
    separator = layouts[0].separator or text.separator
    lines_in = io.StringIO(text.data.decode("utf-8-sig"), newline="")
    reader = csv.reader(lines_in, delimiter=separator, quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL)

    def lines() -> Iterator[tuple[int, list[str]]]:
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num}: {error}") from error

    rows = lines()
    first_line, first = next(rows, (0, []))
    if not first:
        raise InputError(f"{path}: no line holds an example")
    names = [cell.strip() for cell in first]
    fits = next((one for one in layouts if not one.numbered and {*one.text, one.label} <= set(names)), None)
    layout = fits or next((one for one in layouts if one.numbered), None)
    if layout is None:
        return _fitting(path, layouts, names), iter(()), "line"  # raises, with the columns that are there
    columns = (*layout.text, layout.label)
    places = [names.index(name) if fits else int(name) - 1 for name in columns]
    if min(places) < 0:
        raise InputError(f"{path}: columns are numbered from 1, got {', '.join(columns)}")

    def records() -> Iterator[Record]:
        for line, cells in ((first_line, first), *rows) if not fits else rows:
            if len(cells) <= max(places):
                raise InputError(
                    f"{path}: line {line}: no {_column(columns[places.index(max(places))])}, the line has {len(cells)} columns"
                )
            chosen = [cells[place] for place in places]
            yield line, tuple(chosen[:-1]), chosen[-1].strip()

    return layout, records(), "line"


# ---------------------------------------------------------------------- samples and batches


def subsample(examples: Examples, count: int | None, seed: int) -> Examples:
    """``count`` different examples drawn by the seed, or all; a smaller draw of the same seed is part of a larger one.

    Raises:
        InputError: more are asked for than there are.
    """
    if count is not None and count > len(examples):
        raise InputError(f"{examples.source}: {count:,} samples are asked for, the file has {len(examples):,}; lower --samples")
    order = np.random.default_rng([seed, 1]).permutation(len(examples))
    return examples.pick(order[:count])


def split(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """Training and validation part of a file without a dev file: one fixed draw, the same for all seeds."""
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise InputError(f"{examples.source}: {len(examples)} examples are too few to hold some out; name a file by --dev")
    order = np.random.default_rng(0).permutation(len(examples))
    return examples.pick(np.sort(order[count:])), examples.pick(np.sort(order[:count]))


def batch_indices(step: int, count: int, batch: int, seed: int) -> list[int]:
    """Which examples step ``step`` (from 0) sees: a new order every epoch, its incomplete last batch left out.

    A function of its arguments alone, so that every method sees the same batches and a resumed run the ones it missed.
    """
    batch = min(batch, count)
    epoch, place = divmod(step, count // batch)
    order = np.random.default_rng([seed, 2, epoch]).permutation(count)
    return [int(i) for i in order[place * batch : (place + 1) * batch]]

"""The rows of the benches: their columns, the CSV files that hold them, and how they look on a terminal."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .harness import Session

COLUMNS = [
    *("date", "revision", "dirty", "machine", "simd", "python", "torch", "package", "load"),
    *("bench", "case", "contender", "threads", "dtype"),
    *("median_ms", "min_ms", "q25_ms", "q75_ms", "repeats"),
    *("gflops", "share_sgemm", "gbs", "share_copy", "peak_mb"),
    *("error", "metric", "value", "baseline", "ratio", "bar", "met", "note"),
]


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a CSV file; what was there stays as it is, and the file is replaced in one move."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if old and old.splitlines()[0].split(",") != COLUMNS:
        raise ValueError(f"{path} has other columns than this version writes; give another file with --out")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not old:
        writer.writeheader()
    elif not old.endswith("\n"):
        old += "\n"
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_atomically(path, old + text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


HEADER = ("case", "contender", "threads", "ms", "GFLOP/s", "GB/s", "peak MB", "result", "x baseline", "bar", "met")
TO_THE_LEFT = ("case", "contender", "bar")


def _number(value: Any, form: str = ".3g") -> str:
    return format(value, form) if isinstance(value, (int, float)) and not math.isnan(value) else ""


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["case"],
        row["contender"],
        str(row["threads"]),
        _number(row["median_ms"], ".4g"),
        _number(row["gflops"]),
        _number(row["gbs"]),
        _number(row["peak_mb"]),
        f"{row['metric']} {_number(row['value'], '.4g')}".strip(),
        _number(row["ratio"]),
        row["bar"],
        row["met"],
    )


def print_table(session: Session) -> None:
    """The rows of a session, what was skipped and what was wrong; aligned text where rich is not installed."""
    machines = dict.fromkeys((row["machine"], row["simd"]) for row in session.rows)
    machines = machines or {(session.facts["machine"], session.facts["simd"]): None}
    title = "; ".join(f"{machine}, {simd if simd.startswith('sm_') else f'SIMD {simd}'}" for machine, simd in machines)
    title += f", torch {session.facts['torch']}"
    lines = [_line(row) for row in session.rows]
    (_print_rich if importlib.util.find_spec("rich") else _print_plain)(title, lines)
    for threads, (sgemm, copy) in sorted(session.ceilings.items()):
        print(f"ceilings with {threads} thread(s): sgemm {sgemm:.0f} GFLOP/s, copy {copy:.1f} GB/s")
    for what, reason in session.skipped:
        print(f"skipped: {what}: {reason}")
    for error in session.errors:
        print(f"wrong: {error}")


def _print_rich(title: str, lines: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in HEADER:
        table.add_column(name, justify="left" if name in TO_THE_LEFT else "right")
    for last, line in zip([None, *lines], lines, strict=False):
        if last and last[0] != line[0]:
            table.add_section()
        table.add_row(*line[:-1], {"yes": "[green]yes", "no": "[red]no"}.get(line[-1], ""))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _print_plain(title: str, lines: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(HEADER, *lines, strict=True)]
    print(title)
    for line in (HEADER, *lines):
        cells = zip(HEADER, line, widths, strict=True)
        print("  ".join(f"{c:<{w}}" if name in TO_THE_LEFT else f"{c:>{w}}" for name, c, w in cells).rstrip())

"""A folder of results: one JSON a run, what all of them share in one more, and the table over the seeds.

``configuration.json`` holds the data, the model and the settings: runs of another configuration are not comparable, and the
folder refuses them. More methods, samples, steps and seeds may be added to a folder at any time. Runs that are there are not
made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import InputError, OutputError, write_atomically
from .methods import METHODS
from .metrics import NAMES
from .training import Run

Result = dict[str, Any]
CONFIGURATION, TABLE, SUMMARY = "configuration.json", "table.md", "table.json"


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all; replaces."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_atomically(path, lambda handle: handle.write(text.encode() + b"\n"), overwrite=True)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); remove it, or choose another --out") from error


def check_folder(path: Path) -> None:
    """Refuse a place where somebody's other files are."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: exists and is not a folder")
    if path.is_dir() and not (path / CONFIGURATION).exists() and any(path.iterdir()):
        raise InputError(f"{path}: the folder is not empty and holds no results of this command; choose another --out")


class Folder:
    """Where the results of one configuration lie."""

    def __init__(self, path: Path, configuration: dict[str, Any] | None = None) -> None:
        """Open a folder; with a configuration, make it where it is not there and refuse it where it has another one."""
        self.path = path
        file = path / CONFIGURATION
        if configuration is None:
            self.configuration = read_json(file)
            return
        check_folder(path)
        for part in ("runs", "checkpoints"):
            (path / part).mkdir(parents=True, exist_ok=True)
        if file.exists():
            before = read_json(file)
            differing = [
                f"{name} is {configuration.get(name)!r}, there it is {before.get(name)!r}"
                for name in {**before, **configuration}
                if before.get(name) != configuration.get(name)
            ]
            if differing:
                raise InputError(
                    f"{path}: holds results of another configuration: {'; '.join(differing)}; choose another --out, or these "
                    "settings again"
                )
        else:
            write_json(file, configuration)
        self.configuration = configuration

    def run_file(self, run: Run) -> Path:
        """The JSON of a run's result."""
        return self.path / "runs" / f"{_slug(run)}.json"

    def checkpoint(self, run: Run) -> Path:
        """Where an unfinished run is kept."""
        return self.path / "checkpoints" / f"{_slug(run)}.safetensors"

    def done(self, run: Run) -> bool:
        """Whether the run's result is there."""
        return self.run_file(run).exists()

    def add(self, run: Run, result: Result) -> None:
        """Keep a result; the run's checkpoint goes."""
        write_json(self.run_file(run), result)
        self.checkpoint(run).unlink(missing_ok=True)

    def results(self) -> list[Result]:
        """All results, in the order of their names."""
        return [read_json(path) for path in sorted((self.path / "runs").glob("*.json"))]

    @property
    def measures(self) -> tuple[str, str]:
        """Names of the metrics, the main one first."""
        return NAMES[self.configuration["kind"]]


def _slug(run: Run) -> str:
    digest = hashlib.sha256(json.dumps(run.to_dict(), sort_keys=True).encode()).hexdigest()[:10]
    return f"{run.method}-n{run.samples or 'all'}-s{run.seed}-{digest}"


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """One method with its options over the seeds."""

    label: str
    method: str
    options: dict[str, Any]
    samples: int | None
    steps: int
    schedule: str
    results: tuple[Result, ...] = field(repr=False)

    @property
    def seeds(self) -> list[int]:
        return [result["run"]["seed"] for result in self.results]

    @property
    def diverged(self) -> int:
        """How many of the runs."""
        return sum(result["status"] == "diverged" for result in self.results)

    def values(self, name: str) -> list[float | None]:
        """A metric, or a number of the ranks, of every seed."""
        if name in self.results[0]["metrics"]:
            return [result["metrics"][name] for result in self.results]
        return [(result["ranks"] or {}).get(name) for result in self.results]

    def by_seed(self, name: str) -> dict[int, float | None]:
        return dict(zip(self.seeds, self.values(name), strict=True))

    def mean(self, name: str) -> float | None:
        """Over the seeds; None where any has no value: a mean of the others would flatter."""
        values = self.values(name)
        return None if None in values else statistics.fmean(values)  # type: ignore[arg-type]

    def std(self, name: str) -> float | None:
        values = self.values(name)
        return None if None in values or len(values) < 2 else statistics.stdev(values)  # type: ignore[type-var]

    @property
    def step_seconds(self) -> float | None:
        times = [result["step_seconds"].get("median") for result in self.results]
        known = [time for time in times if time is not None]
        return statistics.fmean(known) if known else None


def rows(results: Iterable[Result]) -> list[Row]:
    """The results grouped over their seeds, in the order of :data:`METHODS`, samples and options.

    An option is part of a label where it is not the method's default; rate and rank also where the method's runs differ in it.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        key = json.dumps({name: value for name, value in result["run"].items() if name != "seed"}, sort_keys=True)
        groups.setdefault(key, []).append(result)
    seen: dict[tuple[str, str], set[Any]] = {}
    for group in groups.values():
        run = group[0]["run"]
        for name, value in {**run["options"], "steps": run["steps"], "schedule": run["schedule"]}.items():
            seen.setdefault((run["method"] if name in run["options"] else f"n{run['samples']}", name), set()).add(value)
    made = []
    for group in groups.values():
        run = group[0]["run"]
        method = METHODS.get(run["method"])
        defaults = method.defaults if method else {}
        shown = [
            f"{name} {_short(value)}"
            for name, value in run["options"].items()
            if defaults.get(name) != value or (name in ("lr", "rank") and len(seen[run["method"], name]) > 1)
        ]
        shown += [f"{run['steps']} steps"] if len(seen[f"n{run['samples']}", "steps"]) > 1 else []
        shown += [run["schedule"]] if len(seen[f"n{run['samples']}", "schedule"]) > 1 else []
        label = ", ".join([method.title if method else run["method"], *shown])
        ordered = tuple(sorted(group, key=lambda result: result["run"]["seed"]))
        made.append(Row(label, run["method"], run["options"], run["samples"], run["steps"], run["schedule"], ordered))
    order = list(METHODS)

    def place(row: Row) -> tuple[Any, ...]:
        at = order.index(row.method) if row.method in order else len(order)
        return (row.samples or math.inf, at, row.method, *(_sortable(value) for value in row.options.values()), row.steps)

    return sorted(made, key=place)


def _sortable(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return (number, float(value) if number else 0.0, str(value))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def spread(row: Row, name: str) -> str:
    """Mean and standard deviation over the seeds, or how many runs diverged."""
    mean, std = row.mean(name), row.std(name)
    if mean is None:
        return f"{row.diverged} of {len(row.results)} diverged" if row.diverged else "undefined"
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"


HEADER = ("method", "n", "steps", "seeds", "update rank", "stable", "moved", "s1(Δ)/s1(W)", "trained", "ms a step")


def cells(made: Sequence[Row], measures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table, as text."""
    body = []
    for row in made:
        moved, time = row.mean("moved"), row.step_seconds
        ratios = [value for value in row.values("largest_ratio") if value is not None]
        adapted = row.results[0]["ranks"] is not None
        ranks = [number(row.mean("mean_rank"), ".2f"), number(row.mean("mean_stable_rank"), ".2f")]
        body.append(
            [
                row.label,
                "all" if row.samples is None else str(row.samples),
                str(row.steps),
                str(len(row.results)),
                *(spread(row, name) for name in measures),
                *(ranks if adapted else ["-", "-"]),
                f"{100 * moved:.0f} %" if moved is not None else "-",
                number(max(ratios), ".2g") if ratios else "-",
                f"{row.results[0]['trainable']:,}",
                number(None if time is None else 1e3 * time, ".0f"),
            ]
        )
    return [*HEADER[:4], *measures, *HEADER[4:]], body


def markdown(header: Sequence[str], body: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table in Markdown whose first ``texts`` columns are text and the others numbers."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_tables(folder: Folder) -> list[Row]:
    """``table.md`` for people and ``table.json`` for programs, from the results alone."""
    made = rows(folder.results())
    text = markdown(*cells(made, folder.measures))
    write_atomically(folder.path / TABLE, lambda handle: handle.write(text.encode()), overwrite=True)
    summary = [
        {
            "label": row.label, "method": row.method, "options": row.options, "samples": row.samples, "steps": row.steps,
            "schedule": row.schedule, "seeds": row.seeds, "diverged": row.diverged,
            "metrics": {name: {"mean": row.mean(name), "std": row.std(name)} for name in folder.measures},
        }
        for row in made
    ]  # fmt: skip
    write_json(folder.path / SUMMARY, summary)
    return made

"""What ``lowrank-kernels finetune`` prints: progress bars, a line a run, and the table at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from ..files import InputError
from . import results
from .command import QUICK, Request, Watch, finish, prepare, work
from .training import Run, Settings

SETTINGS = ("head", "batch", "head_lr", "max_length", "eval_every", "base_dtype")
WIDE = ("steps", "stable", "s1(Δ)/s1(W)", "trained")  # columns of table.md that a terminal has no room for
GRID = ("rank", "lr", "depth", "gamma")


def run(options: Mapping[str, Any]) -> int:
    """The whole of the command; returns the exit code, 130 for an interrupt."""
    o = dict(options)
    quiet, settings = o.pop("quiet"), Settings(**{name: o.pop(name) for name in SETTINGS})
    grid = {name: o.pop(name) for name in GRID}
    request = Request(
        methods=o.pop("method"), options=grid, schedules=o.pop("schedule"), samples=o.pop("samples"), settings=settings, **o
    )
    if request.quick:
        request.steps, request.samples = (
            min(request.steps, QUICK["steps"]),
            tuple(dict.fromkeys(min(count, QUICK["samples"]) for count in request.samples or (QUICK["samples"],))),
        )
        request.settings = Settings(**{**settings.__dict__, "eval_every": QUICK["eval_every"]})
    if request.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {request.device}: no usable GPU; `lowrank-kernels doctor` says why")
    if request.threads is not None:
        torch.set_num_threads(request.threads)

    def notice(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    bench, folder, runs = prepare(request, notice)
    try:
        with watching(quiet) as watch:
            there = work(bench, folder, runs, watch, request.checkpoint_seconds)
    except KeyboardInterrupt:
        done = sum(folder.done(each) for each in runs)
        click.echo(
            f"error: interrupted: {done} of {len(runs)} runs are finished in {request.out}; the same command goes on from here",
            err=True,
        )
        return 130
    if there:
        notice(f"{there} of {len(runs)} runs were there already")
    rows, pictures = finish(folder)
    if not quiet:
        print_table(rows, folder)
        for path in (folder.path / results.TABLE, *pictures):
            click.echo(f"wrote {path}")
    return 0


@contextmanager
def watching(quiet: bool) -> Iterator[Watch]:
    """Bars on a terminal, lines elsewhere."""
    if quiet:
        yield Watch()
    elif not sys.stderr.isatty():
        yield Lines()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            yield Bars(progress)


class Lines(Watch):
    """One line a finished run, on stderr: for log files."""

    def __init__(self) -> None:
        self._runs = self._done = 0
        self._title = ""

    def plan(self, runs: int, steps: int) -> None:
        self._runs, self._done = runs, 0

    def begin(self, run: Run, title: str) -> None:
        self._title = title

    def end(self, run: Run, result: results.Result, seconds_left: float) -> None:
        self._done += 1
        click.echo(f"[{self._done}/{self._runs}] {summary(self._title, result)}, {minutes(seconds_left)} left", err=True)


class Bars(Watch):
    """A bar for the steps of all runs and one for the run at work; finished runs stay as lines above."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._title = progress, ""
        self._all = progress.add_task("all runs", loss="", total=None)
        self._one = progress.add_task("", loss="", total=None, visible=False)

    def plan(self, runs: int, steps: int) -> None:
        self._progress.update(self._all, total=steps, completed=0, description=f"{runs} runs")

    def begin(self, run: Run, title: str) -> None:
        self._title = title
        self._progress.reset(self._one, description=title, total=run.steps, visible=True)
        self._base = self._progress.tasks[0].completed

    def step(self, step: int, steps: int, loss: float) -> None:
        self._progress.update(self._one, completed=step, loss=f"loss {loss:.4f}")
        self._progress.update(self._all, completed=self._base + step)

    def end(self, run: Run, result: results.Result, seconds_left: float) -> None:
        self._progress.update(self._all, completed=self._base + run.steps)
        self._progress.console.print(summary(self._title, result), highlight=False, markup=False)


def summary(title: str, result: results.Result) -> str:
    """The run and its numbers."""
    numbers = ", ".join(f"{name} {results.number(value)}" for name, value in result["metrics"].items())
    moved = "" if result["ranks"] is None else f", {100 * result['ranks']['moved']:.0f} % of the layers moved"
    return f"{title}: {'DIVERGED, ' if result['status'] == 'diverged' else ''}{numbers}{moved}"


def minutes(seconds: float) -> str:
    """1 h 05 min, 3 min, 20 s."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    hours, left = divmod(round(whole / 60), 60)
    return f"{hours} h {left:02d} min" if hours else f"{left} min"


def print_table(rows: list[results.Row], folder: results.Folder) -> None:
    """The table of all runs of the folder on the terminal, without its less important columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, body = results.cells(rows, folder.measures)
    shown = [i for i, name in enumerate(header) if name not in WIDE]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i in shown:
        table.add_column(header[i], justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    for line in body:
        table.add_row(*(Text(line[i], style="red" if "diverged" in line[i] else "") for i in shown))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"dev: {Path(str(folder.configuration['dev'][0])).name}, {folder.configuration['dev'][2]:,} examples")

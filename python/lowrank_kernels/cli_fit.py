"""``lowrank-kernels fit PARTS``: complete a matrix whose entries are in Parquet or CSV parts, on one process or many.

Exit codes: 0 fitted and written; 1 could not finish (disk full, out of memory, a process lost); 2 bad input or options; 130
interrupted: with ``--checkpoint`` the same command goes on from there.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click

INTERRUPTED = 130  # 128 + SIGINT


def fit_command(clean_errors: Callable[[], AbstractContextManager[None]]) -> click.Command:
    """The command, for the group in :mod:`.cli`, whose way of showing errors it takes."""

    @click.command("fit", no_args_is_help=True)
    @click.argument("parts", nargs=-1, required=True, type=click.Path())
    @click.option("--row", help="Column of row labels; by default guessed from names such as userId.")
    @click.option("--col", help="Column of column labels, such as movieId.")
    @click.option("--value", help="Column of values, such as rating.")
    @click.option("--duplicates", type=click.Choice(["error", "mean"]), default="error", show_default=True)
    @click.option("--rank", type=click.IntRange(min=2), help="Width of the factors, even; by default 32 or less.")
    @click.option("--depth", type=click.IntRange(min=1), default=3, show_default=True, help="Cores between the outer factors.")
    @click.option("--max-steps", type=click.IntRange(min=1), default=300, show_default=True)
    @click.option(
        "--held-out",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        show_default=True,
        help="Share of the entries to measure on; the best step on them is kept.",
    )
    @click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
    @click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
    @click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="One GPU a process.")
    @click.option("--threads", type=click.IntRange(min=1), help="Threads of torch and the native kernels, of each process.")
    @click.option("--checkpoint", type=click.Path(), help="Folder of the training's state; one that is there is gone on from.")
    @click.option("--checkpoint-every", type=click.IntRange(min=10), default=50, show_default=True, help="Steps, tens.")
    @click.option("--memory-limit", type=click.FloatRange(min=0), metavar="GIB", help="On a machine; by default what is free.")
    @click.option("--save-model", "-o", type=click.Path(), help="The fitted model (.npz), for DeepMatrixCompletion.load().")
    @click.option("--overwrite", is_flag=True, help="Replace a model that is there already.")
    @click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
    def command(**options: Any) -> None:
        """Fit a low-rank model to the entries in PARTS, which together need not fit in memory.

        PARTS are Parquet or CSV files of the same columns, a folder of them, or a pattern. Started by torchrun, the processes
        share the rows out; they must see the same files.

        \b
        lowrank-kernels fit ratings/ --checkpoint state -o model.npz
        torchrun --nproc-per-node 8 -m lowrank_kernels fit ratings/ --checkpoint state -o model.npz
        """
        with clean_errors():
            run(**options)

    return command


def run(
    parts: tuple[str, ...],
    rank: int | None,
    held_out: float,
    seed: int,
    device: str,
    threads: int | None,
    memory_limit: float | None,
    save_model: str | None,
    overwrite: bool,
    quiet: bool,
    row: str | None,
    col: str | None,
    value: str | None,
    duplicates: str,
    **settings: Any,
) -> None:
    """The whole of ``fit``."""
    import torch

    from .completion import DeepMatrixCompletion
    from .files import InputError, check_output
    from .parts import GIB

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no usable GPU; `lowrank-kernels doctor` says why")
    if save_model is not None:
        check_output(save_model, overwrite, (".npz",))
    started = time.perf_counter()
    with _group(device) as (distributed, first, place), _told(quiet or not first) as (report, progress):
        model = DeepMatrixCompletion(
            rank="auto" if rank is None else rank,
            early_stopping=held_out > 0,
            validation_fraction=held_out or 0.1,
            random_state=seed,
            device=place,
            distributed=distributed,
            progress=progress,
            **settings,
        )
        limit = None if memory_limit is None else int(memory_limit * GIB)
        try:
            model.fit_parts(
                list(parts), row=row, col=col, value=value, duplicates=duplicates, memory_limit=limit, report=report
            )
        except ValueError as error:  # of a setting: the options are its source
            raise InputError(str(error)) from error
        interrupted = model.status_.name == "INTERRUPTED"
        if interrupted and settings["checkpoint"] is not None:  # the same command goes on from there, and writes the model
            if first:
                click.echo(
                    f"interrupted at step {model.n_steps_}; the same command goes on from {settings['checkpoint']}", err=True
                )
            sys.exit(INTERRUPTED)
        if save_model is not None:
            model.save(save_model, overwrite)
        if first and not quiet and model.history_:  # none: it ended before the first check
            last = model.history_[-1]
            errors = f"RMSE {last['train_rmse']:.4f} on what was fitted"
            if "validation_rmse" in last:
                best = min(record["validation_rmse"] for record in model.history_)
                errors += f", {best:.4f} on the entries held out"
            status = model.status_.message
            if model.status_.name == "MAX_STEPS":
                status = f"stopped while still improving: raise --max-steps above {model.n_steps_}"
            if interrupted:
                status = "interrupted; the best factors so far were kept"
            click.echo(f"{errors}; {model.n_steps_} steps, {time.perf_counter() - started:.0f} s; {status}")
            if save_model is not None:
                click.echo(f"wrote {save_model}")
        if interrupted:
            sys.exit(INTERRUPTED)


@contextmanager
def _group(device: str) -> Iterator[tuple[bool, bool, str]]:
    """The processes that torchrun started: whether there are several, whether this is the first, and its device."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield False, True, device
        return
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield True, dist.get_rank() == 0, device
    finally:
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()  # after an error the others may be in an exchange: the end of this process tells them


@contextmanager
def _told(quiet: bool) -> Iterator[tuple[Callable[[str, int, int], None] | None, Any]]:
    """What is logged, printed; and a progress bar on a terminal."""
    if quiet:
        yield None, False
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("lowrank_kernels")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        if not sys.stderr.isatty():
            yield None, False
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[error]}"), console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, Any] = {}

            def report(what: str, done: int, total: int, error: str = "") -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total, error="")
                bar.update(tasks[what], completed=done, total=total, error=error)

            def progress(step: int, total: int, record: dict[str, float]) -> None:
                report("fitting", step, total, f"RMSE {record['train_rmse']:.4f}")

            yield report, progress
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

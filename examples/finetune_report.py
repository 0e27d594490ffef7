"""The report of finetune_stsb.py: tables, figures and the verdict on every claim, from the JSON results alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lowrank_kernels.files import write_atomically
from lowrank_kernels.finetuning import plots, results
from lowrank_kernels.finetuning.results import Row, markdown, number, spread

MEASURE = "pearson"
DEEP = ("deeplora", "deeplora-paper")
COMPARED = ("head", "lora-paper", "peft-lora", "loraplus", *DEEP, "randlora")
SWEPT = ("lora-paper", *DEEP)  # over the ranks
SCHEDULE_WORDS = {"constant": "constant rates", "linear": "rates that fall to zero in a line"}
CHANGED = ("gamma", "init_scale", "adam_eps", "outer", "depth", "head_first")  # one at a time


def write_report(out: Path, docs: Path) -> list[Path]:
    """``docs/finetuning.md`` and its figures; returns the files."""
    cross, few = (results.Folder(out / name) for name in ("cross", "few_shot"))
    machine, times = results.read_json(out / "machine.json"), results.read_json(out / "step_time.json")
    rows, shots = (results.rows(with_schedule(folder, machine["schedule"])) for folder in (cross, few))
    main = again(row for row in rows if row.method in COMPARED and default_but(row, "lr"))
    swept = again(row for row in rows if row.method in SWEPT and default_but(row, "rank"))
    ablated = again(row for row in rows if row.method.startswith("deeplora") and default_but(row, *CHANGED))
    swept_ranks = sorted({row.options["rank"] for row in swept})
    figures = docs / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    ranked = [row for row in main if row.method in ("lora-paper", *DEEP) or row is best_peft(main)]
    pictures = {
        "finetuning_curves.png": plots.learning_curves(main, MEASURE),
        "finetuning_ranks.png": plots.rank_histogram(ranked),
        "finetuning_few_shot.png": plots.against(shots, MEASURE, "samples", "training examples"),
        "finetuning_sweep.png": plots.against(swept, MEASURE, "rank", "rank"),
    }
    written = [plots.save(figures / name, figure) for name, figure in pictures.items() if figure is not None]
    parts = [
        heading(machine, cross),
        "## Claims\n\n" + markdown(("claim", "limit", "measured", "verdict"), claims(main, swept, times), texts=4),
        section(
            "Cross-encoder, n = " + str(main[0].samples),
            "Both texts in one sequence, a linear head on the mean over the tokens. Head only is the guard: what is above it, "
            "the adapters did.",
            table(main),
            "finetuning_curves.png",
        ),
        best_of_peft(main),
        section(
            "Rank of the update",
            "Singular values of a layer's update above 1e-2, in the runs above: how many layers have how many.",
            markdown(*rank_table(main)),
            "finetuning_ranks.png",
        ),
        section(
            "Few samples",
            "A siamese head: each text by itself, mean over the tokens, unit vectors u and v, a linear layer on "
            "[sqrt(d) \\|u - v\\|, d u v]. A smaller sample of a seed is part of the larger one.",
            table(shots),
            "finetuning_few_shot.png",
        ),
        section(
            f"Ranks {swept_ranks[0]} to {swept_ranks[-1]} at default rates",
            "Nothing is tuned for the rank. A layer has moved when its update has a singular value above 1e-2; spread is the "
            "largest minus the smallest mean over the ranks.",
            table(swept) + "\n" + markdown(("method", "spread over the ranks"), spreads(swept)),
            "finetuning_sweep.png",
        ),
        section("Time of a step", timing_words(times), markdown(*timing_table(times)), None),
        section(
            "What makes a difference",
            "The cross-encoder again, one thing changed at a time. SGD keeps no state for the outer factors; its gamma is that "
            "of a gradient which nothing scales.",
            table(sorted(ablated, key=lambda row: not default_but(row) or row.method != "deeplora")),
            None,
        ),
        footing(rows + shots),
    ]
    report = docs / "finetuning.md"
    text = "\n".join(part.strip() + "\n" for part in parts if part)
    write_atomically(report, lambda handle: handle.write(text.encode()), overwrite=True)
    return [report, *written]


# ---------------------------------------------------------------------- rows


def default_but(row: Row, *free: str) -> bool:
    """Whether the row has its method's defaults, but for these options."""
    defaults = results.METHODS[row.method].defaults
    return all(row.options[name] == value for name, value in defaults.items() if name not in free)


def with_schedule(folder: results.Folder, schedule: str) -> list[results.Result]:
    """The results of a folder with one schedule and the usual number of steps: untuned.py adds others."""
    found = [result for result in folder.results() if result["run"]["schedule"] == schedule]
    usual = usual_steps(found)
    return [result for result in found if result["run"]["steps"] == usual[result["run"]["samples"]]]


def usual_steps(found: Iterable[results.Result]) -> dict[int, int]:
    """By the number of samples, the fewest steps of any run."""
    usual: dict[int, int] = {}
    for result in found:
        samples, steps = result["run"]["samples"], result["run"]["steps"]
        usual[samples] = min(steps, usual.get(samples, steps))
    return usual


def again(rows: Iterable[Row]) -> list[Row]:
    """The same rows, labelled by what differs among them."""
    return results.rows(result for row in rows for result in row.results)


def one(rows: Iterable[Row], method: str) -> Row:
    """The row of a method with its defaults."""
    return next(row for row in rows if row.method == method and default_but(row))


def best_peft(rows: Iterable[Row]) -> Row:
    """PEFT's LoRA at the rate with the best mean."""
    found = [row for row in rows if row.method == "peft-lora" and row.mean(MEASURE) is not None]
    return max(found, key=lambda row: row.mean(MEASURE) or 0.0)


def differences(a: Row, b: Row) -> list[float] | None:
    """a minus b, seed by seed; None where one has no value."""
    ours, theirs = a.by_seed(MEASURE), b.by_seed(MEASURE)
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if not pairs or any(x is None or y is None for x, y in pairs):
        return None
    return [x - y for x, y in pairs if x is not None and y is not None]


# ---------------------------------------------------------------------- claims


def claims(main: Sequence[Row], swept: Sequence[Row], times: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Every claim with its limit, what was measured, and whether it is met; the paper's claims for both modes of Deep LoRA."""
    paper, head, peft = one(main, "lora-paper"), one(main, "head"), best_peft(main)
    lines: list[list[str]] = []

    def add(claim: str, limit: str, measured: str, met: bool | None) -> None:
        lines.append([claim, limit, measured, "reported" if met is None else "met" if met else "**not met**"])

    for method in DEEP:
        deep, title = one(main, method), results.METHODS[method].title
        values = deep.values(MEASURE)
        add(
            f"{title} learns the task (head only: {listed(head.values(MEASURE))})",
            "at least 0.79 on each seed",
            listed(values),
            all(value is not None and value >= 0.79 for value in values),
        )
        gain = differences(deep, paper)
        met = gain is not None and statistics.fmean(gain) >= 0.005 and min(gain) > 0
        add(f"{title} is better than the paper's LoRA", "mean at least +0.005, each seed above 0", listed(gain, "+.3f"), met)
        best = f"PEFT's LoRA at its best rate ({peft.options['lr']:g})"
        add(f"{title} minus {best}", "-", listed(differences(deep, peft), "+.3f"), None)
        used = deep.mean("mean_rank")
        add(
            f"{title} uses few singular values", "0.7 to 2.5 of 8", number(used, ".2f"), used is not None and 0.7 <= used <= 2.5
        )
        stable = (number(row.mean("mean_stable_rank"), ".2f") for row in (deep, peft))
        add(f"Stable rank of its update, beside that of {best}", "-", " beside ".join(stable), None)
        add_sweep(
            add, title, [row for row in swept if row.method == method], [row for row in swept if row.method == "lora-paper"]
        )
    used = paper.mean("mean_rank")
    add("The paper's LoRA uses its whole rank", "at least 7.5 of 8", number(used, ".2f"), used is not None and used >= 7.5)
    for entry in times:
        ratio = entry["runs"][0]["ratio"]
        base = entry["base_dtype"]
        add(f"A step of Deep LoRA takes no longer than PEFT's, {base} base", "at most 1.00", f"{ratio:.3f}", ratio <= 1)
    return lines


def add_sweep(add: Callable[[str, str, str, bool | None], None], title: str, deep: Sequence[Row], paper: Sequence[Row]) -> None:
    """What is claimed over the ranks."""
    if min(len(deep), len(paper)) < 2:
        return
    ranks = f"ranks {', '.join(str(row.options['rank']) for row in deep)}"
    ratios = [value for row in deep for value in row.values("largest_ratio")]
    largest = None if None in ratios else max(value for value in ratios if value is not None)
    diverged = sum(row.diverged for row in deep)
    add(
        f"{title} does not diverge, {ranks}", "no run, s1(Δ) at most 5 s1(W)",
        f"{diverged} runs, at most {number(largest, '.2g')} s1(W)", diverged == 0 and largest is not None and largest <= 5,
    )  # fmt: skip
    ours, theirs = width(deep), width(paper)
    add(
        "Its accuracy depends less on the rank than the paper's LoRA's", "smaller spread", f"{number(ours)} against "
        f"{number(theirs)}", ours is not None and theirs is not None and ours < theirs,
    )  # fmt: skip
    moved = [row.mean("moved") for row in deep]
    add(
        "while its layers do move", "at least half of them at each rank", ", ".join(f"{100 * (m or 0):.0f} %" for m in moved),
        all(m is not None and m >= 0.5 for m in moved),
    )  # fmt: skip


def listed(values: Sequence[float | None] | None, form: str = ".3f") -> str:
    return "undefined" if values is None else ", ".join(number(value, form) for value in values)


def width(rows: Sequence[Row]) -> float | None:
    means = [row.mean(MEASURE) for row in rows]
    known = [mean for mean in means if mean is not None]
    return max(known) - min(known) if known and len(known) == len(means) else None


# ---------------------------------------------------------------------- text


def heading(machine: dict[str, Any], folder: results.Folder) -> str:
    c = folder.configuration
    quick = "\n**Made with --quick: the numbers mean nothing.**\n" if machine["quick"] else ""
    return f"""# Fine-tuning a transformer: Deep LoRA, LoRA, LoRA+, RandLoRA
{quick}
MiniLM (22.7 M parameters, 6 layers; all 36 linear layers adapted) on the STS Benchmark: {c["train"][2]:,} training pairs of
which samples are drawn by the seed; Pearson and Spearman correlation on all {c["dev"][2]:,} dev pairs after the last step.
All methods of a seed share sample, head, batches of {c["batch"]}, dropout masks, number of steps and schedule
({SCHEDULE_WORDS[machine["schedule"]]}); the head's rate is {c["head_lr"]:g}. The rates are the methods' defaults, not tuned
on these runs; of PEFT's LoRA there are several, and "best" is the best by hindsight. What "Deep LoRA" does by default, a tenth
of the steps for the head alone among it, was chosen on a part of the training file ([the two modes](deep_lora_modes.md)); "as
in the paper" is its compressed method. More rates, both schedules and more seeds: [Deep LoRA without tuning](untuned.md).

Frozen layers in {c["base_dtype"]}, threads: {machine["threads"]} ({machine["processor"]}), torch {machine["torch"]}.

Made by one command, from its JSON results alone:

    python examples/finetune_stsb.py --data FOLDER --out out/finetune_stsb
"""


def section(title: str, words: str, body: str, figure: str | None) -> str:
    picture = f"\n![{title}](figures/{figure})\n" if figure else ""
    return f"## {title}\n\n{words}\n\n{body}{picture}"


def table(rows: Sequence[Row]) -> str:
    """Without the time of a step: runs may share the machine, and the times that count are taken by themselves."""
    header, body = results.cells(rows, ("pearson", "spearman"))
    return markdown(header[:-1], [line[:-1] for line in body])


def best_of_peft(main: Sequence[Row]) -> str:
    best = best_peft(main)
    better = [row.label for row in main if (row.mean(MEASURE) or 0.0) > (best.mean(MEASURE) or 0.0)]
    return f"PEFT's LoRA is best at a rate of {best.options['lr']:g}, {spread(best, MEASURE)}; " + (
        f"better in the mean: {'; '.join(better)}." if better else "no method is better in the mean."
    )


def rank_table(main: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    header = [
        "method",
        "singular values above 1e-2",
        "above 1e-2 s1(W)",
        "stable rank",
        "layers that moved",
        "largest s1(Δ)/s1(W)",
    ]
    body = []
    for row in main:
        if row.results[0]["ranks"] is not None:
            names = ("mean_rank", "mean_relative_rank", "mean_stable_rank", "moved", "largest_ratio")
            body.append([row.label, *(number(row.mean(name), ".2g" if name == "largest_ratio" else ".2f") for name in names)])
    return header, body


def spreads(swept: Sequence[Row]) -> list[list[str]]:
    names = dict.fromkeys(row.method for row in swept)
    return [[results.METHODS[name].title, number(width([row for row in swept if row.method == name]))] for name in names]


def timing_words(times: Sequence[dict[str, Any]]) -> str:
    threads = listed(sorted({entry["threads"] for entry in times}), "d")
    return (
        "Forward, backward and optimizer of a batch, both methods in one process on the same batches, step by step in turn; "
        "the ratio is the median of the ratios of neighbours. Both use the same fused AdamW. All that is trained is; a "
        f"step of the head alone takes less. Threads: {threads}."
    )


def timed(run: dict[str, Any]) -> str:
    """The method, and whether its defaults were others when it was timed; the computation of a step is the same."""
    method, options = results.METHODS[run["method"]], run["options"]
    now = {**method.defaults, "head_first": 0.0}
    return method.title + ("" if all(now.get(name) == value for name, value in options.items()) else ", earlier rates")


def timing_table(times: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["base", "method", "ms a step", "CPU ms a step", "ratio to PEFT", "of CPU time", "rounds"]
    body = [
        [
            entry["base_dtype"], timed(run["run"]), f"{1e3 * run['seconds']:.0f}",
            f"{1e3 * run['cpu_seconds']:.0f}", f"{run['ratio']:.3f}", f"{run['cpu_ratio']:.3f}", str(entry["rounds"]),
        ]
        for entry in times
        for run in entry["runs"]
    ]  # fmt: skip
    return header, body


def footing(rows: Sequence[Row]) -> str:
    found = list({id(result): result for row in rows for result in row.results}.values())  # a row may be in two tables
    hours = sum(result["step_seconds"].get("total", 0.0) for result in found) / 3600
    return f"## Footing\n\n{len(found)} runs, {hours:.1f} hours of steps. Standard deviations are over the seeds (n - 1).\n"

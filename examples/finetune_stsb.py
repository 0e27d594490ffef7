"""The paper's fine-tuning experiment for real: MiniLM on the STS Benchmark, every method on equal terms, and a report.

python examples/finetune_stsb.py --data FOLDER --out out/finetune_stsb [--jobs 2] [--quick]

FOLDER holds sts-train.csv and sts-dev.csv. Three to four hours on 2 CPU cores without bfloat16 instructions; what is finished
in --out is not made again, so it can be stopped at any time. The results of the published report are in
bench/data/finetuning: with --out there it goes on from them. The report, docs/finetuning.md with its figures, comes from the
JSON results alone; --quick makes everything tiny and keeps the report in --out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from finetune_report import write_report
from finetune_runner import Experiment, Study, main

from lowrank_kernels.finetuning import command, results
from lowrank_kernels.finetuning.timing import compare_steps
from lowrank_kernels.finetuning.training import Bench, Run

RATES = "peft-lora:lr=1e-4/3e-4/1e-3/3e-3"
DEEP = ("deeplora", "deeplora-paper")
RANKS = "rank=2/8/32/64"


def few_shot(samples: int, steps: int) -> Experiment:
    methods = ("head", "lora-paper", "peft-lora:lr=1e-4/1e-3", "loraplus", *DEEP, "randlora")
    return Experiment("few_shot", "siamese", methods, samples, steps, 3)


EXPERIMENTS = (
    Experiment("cross", "cross", ("head", "lora-paper", RATES, *DEEP), 1024, 300, 2),
    Experiment("cross", "cross", tuple(f"{method}:{RANKS}" for method in ("lora-paper", *DEEP)), 1024, 300, 1),
    few_shot(16, 100),
    few_shot(64, 130),
    few_shot(256, 160),
    Experiment(
        "cross",
        "cross",
        (
            "deeplora:head_first=0",
            "deeplora:gamma=1",
            "deeplora:depth=2/4",
            "deeplora-random",
            "deeplora-paper:gamma=0/1",
            "deeplora-paper:init_scale=1e-2",
            "deeplora-paper:adam_eps=1e-8",
            "deeplora-paper-random",
            "deeplora-full",
            "loraplus",
            "randlora",
        ),
        1024,
        300,
        1,
    ),
)
TIMED = ("deeplora", "peft-lora")  # the ratio is to the last
ROUNDS = 30


def time_steps(bench: Bench, arguments: argparse.Namespace) -> None:
    """Deep LoRA against PEFT's LoRA, a float32 and a bfloat16 base, in this process."""
    methods = command.parse_methods(TIMED, {})
    file = arguments.out / "step_time.json"
    rounds = 4 if arguments.quick else ROUNDS
    found = results.read_json(file) if file.exists() else []
    for dtype in (torch.float32, torch.bfloat16):
        if any(entry["base_dtype"] == str(dtype).removeprefix("torch.") for entry in found):
            continue
        base = command.load_pretrained(arguments.model, dtype)
        settings = replace(bench.settings, base_dtype=str(dtype).removeprefix("torch."))
        timed = Bench(base, bench.train, bench.dev, settings)
        for _, options in methods:
            options |= {"head_first": 0.0} if "head_first" in options else {}  # a step of the head alone takes less
        runs = [Run(name, tuple(options.items()), min(64, len(bench.train)), 300) for name, options in methods]
        entry = compare_steps(timed, runs, rounds)
        found.append({**entry, "threads": torch.get_num_threads()})
        results.write_json(file, found)
        print(f"step time, {entry['base_dtype']} base: {TIMED[0]} / {TIMED[1]} = {entry['runs'][0]['ratio']:.3f}", flush=True)


if __name__ == "__main__":
    main(Study(__doc__ or "", __file__, Path("out/finetune_stsb"), EXPERIMENTS, time_steps, write_report))

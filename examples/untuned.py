"""Deep LoRA at its defaults against PEFT's LoRA at its best rate and schedule, chosen by hindsight: does it need tuning?

python examples/untuned.py --data FOLDER --out out/finetune_stsb [--jobs 2] [--quick]

FOLDER holds sts-train.csv and sts-dev.csv. MiniLM on the STS Benchmark with 16 to 1024 examples, three seeds, the same number
of steps for all, and twice as many; ranks 2 to 128, depths 2 to 4; then an MLP on scikit-learn's digits. The report is
docs/untuned.md. The folder of the results is that of finetune_stsb.py: what both need is made once, and what is finished is
not made again. Two to three hours on 2 CPU cores without bfloat16 instructions. The published results are in
bench/data/finetuning.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import adapt_digits
from finetune_runner import Experiment, Study, main
from untuned_report import write_report

from lowrank_kernels.finetuning.training import Bench

LINEAR, BOTH = ("linear",), ("linear", "constant")
GRID, UPPER = "peft-lora:lr=1e-4/3e-4/1e-3/3e-3", "peft-lora:lr=1e-3/3e-3"


def few_shot(samples: int, steps: int, schedules: tuple[str, ...]) -> tuple[Experiment, ...]:
    return (
        Experiment("few_shot", "siamese", ("head", "deeplora"), samples, steps, 3, LINEAR),
        Experiment("few_shot", "siamese", (GRID,), samples, steps, 3, schedules),
    )


EXPERIMENTS = (
    Experiment("cross", "cross", ("head", "deeplora", "peft-lora-head:lr=3e-3"), 1024, 300, 3, LINEAR),
    Experiment("cross", "cross", (UPPER,), 1024, 300, 3, BOTH),
    Experiment("cross", "cross", (GRID,), 1024, 300, 1, BOTH),  # of the four rates the lower two are far behind: one seed
    *few_shot(256, 160, BOTH),
    *few_shot(64, 130, LINEAR),
    *few_shot(16, 100, LINEAR),
    Experiment("cross", "cross", ("deeplora:rank=2/64/128", "deeplora:depth=2/4"), 1024, 300, 1, LINEAR),
    Experiment("cross", "cross", ("deeplora", UPPER), 1024, 600, 1, LINEAR),
)


def second_task(bench: Bench, arguments: argparse.Namespace) -> None:
    adapt_digits.make(arguments.out / "digits.json", arguments.quick)


if __name__ == "__main__":
    main(Study(__doc__ or "", __file__, Path("out/finetune_stsb"), EXPERIMENTS, second_task, write_report))

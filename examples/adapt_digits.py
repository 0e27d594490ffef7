"""A second task beside the sentences: an MLP that learnt the digits 0 to 4 is adapted to 5 to 9 from a few images of each.

python examples/adapt_digits.py --out out/digits.json [--quick]

scikit-learn's digits, 8 x 8 pixels. The network is trained on all images of 0 to 4, its body is frozen and adapted, and a new
head is trained beside it; accuracy on all other images of 5 to 9. Unlike the sentences, these digits want other features: a
head alone is not enough. Deep LoRA has its defaults, with and without a tenth of the steps for the head alone; PEFT's LoRA a
grid of rates and schedules.
A few minutes; the JSON is not made again where it is there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowrank_kernels as lrk
from lowrank_kernels.files import InputError, MissingExtra, extra
from lowrank_kernels.finetuning import results
from lowrank_kernels.finetuning.methods import HEAD_FIRST

RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of PEFT's LoRA
SCHEDULES = ("linear", "constant")
SHOTS = {2: 100, 8: 200, 32: 300}  # images of each digit: steps
SEEDS = 5
WIDTH, RANK, BATCH, HEAD_RATE = 256, 8, 16, 3e-3


def make(file: Path, quick: bool) -> None:
    """All runs, into one JSON; nothing where it is there."""
    if file.exists():
        return
    found = []
    for shots, steps in list(SHOTS.items())[: 1 if quick else None]:
        for seed in range(1 if quick else SEEDS):
            data = Digits(shots, seed)
            body = pretrained(data, seed)
            for method, rate, schedule in plan():
                accuracy, loss = run(body, data, method, rate, schedule, 5 if quick else steps, seed)
                found.append(
                    {"method": method, "rate": rate, "schedule": schedule, "shots": shots, "seed": seed, "accuracy": accuracy,
                     "loss": loss}
                )  # fmt: skip
        print(f"digits, {shots} images each: {len(found)} runs", flush=True)
    results.write_json(file, found)


def plan() -> Iterator[tuple[str, float | None, str]]:
    """Method, rate and schedule; Deep LoRA and the head alone have their defaults."""
    yield from ((method, None, "linear") for method in ("head", "deeplora", "deeplora, at once"))
    yield from (("peft-lora", rate, schedule) for rate in RATES for schedule in SCHEDULES)


class Digits:
    """What is learnt first, the few images that are adapted to, and all others of those digits."""

    def __init__(self, shots: int, seed: int) -> None:
        images, labels = extra("sklearn.datasets", "the digits").load_digits(return_X_y=True)
        x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
        self.first = x[y < 5], y[y < 5]
        few, rest = [], []
        for digit in range(5, 10):
            order = np.random.default_rng([seed, digit]).permutation(np.flatnonzero(labels == digit))
            few += list(order[:shots])
            rest += list(order[shots:])
        self.few, self.rest = (x[few], y[few] - 5), (x[rest], y[rest] - 5)


def batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Shuffled anew every epoch; an incomplete batch is dropped, unless it is the only one."""
    per = max(count // BATCH, 1)
    for step in range(steps):
        order = np.random.default_rng([seed, step // per]).permutation(count)
        yield torch.tensor(order[BATCH * (step % per) :][:BATCH])


def pretrained(data: Digits, seed: int) -> nn.Sequential:
    """The network without its head."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(WIDTH, 5))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, y = data.first
    for picked in batches(len(y), 1000, seed):
        optimizer.zero_grad()
        cross_entropy(model(x[picked]), y[picked]).backward()
        optimizer.step()
    return body.requires_grad_(False)


def run(
    body: nn.Sequential, data: Digits, method: str, rate: float | None, schedule: str, steps: int, seed: int
) -> tuple[float, float]:
    """Accuracy on the other images, and the loss of the last batch."""
    x, y = data.few
    head = nn.Linear(WIDTH, 5)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(0.02 * torch.randn(5, WIDTH, generator=generator))
        head.bias.zero_()
    order = list(batches(len(y), steps, seed))
    adapted: Any = nn.Sequential(*body)  # a container of its own: adapters take places in it, the body keeps its layers
    model = nn.Sequential(adapted, head)
    groups: list[dict[str, Any]] = []
    alone = 0
    if method.startswith("deeplora"):
        lrk.adapt(adapted, RANK, seed=seed)
        if method == "deeplora":
            alone = max(round(HEAD_FIRST * steps), 1)
            loss_of = lambda net, picked: cross_entropy(net(x[picked]), y[picked])  # noqa: E731
            lrk.fit_head(model, order[:alone], loss_fn=loss_of, lr=HEAD_RATE)
        lrk.compress_(adapted, lambda: cross_entropy(model(x[order[alone]]), y[order[alone]]), seed=seed)
        groups = lrk.parameter_groups(adapted)
    elif method == "peft-lora":
        torch.manual_seed(seed)
        peft = extra("peft", "the method peft-lora")
        model[0] = peft.get_peft_model(adapted, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0", "2"]))
        groups = [{"params": [p for p in model[0].parameters() if p.requires_grad], "lr": rate}]
    optimizer = torch.optim.AdamW([*groups, {"params": list(head.parameters()), "lr": HEAD_RATE}], weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    loss = torch.zeros(())
    for step, picked in enumerate(order[alone:]):
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * (1.0 if schedule == "constant" else 1 - step / (steps - alone))
        loss = cross_entropy(model(x[picked]), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = model(data.rest[0]).argmax(1) == data.rest[1]
    return float(right.float().mean()), float(loss.detach())


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy and standard deviation over the seeds, in Markdown."""
    shots = sorted({run["shots"] for run in runs})
    body = []
    for method, rate, schedule in plan():
        row = [method + (f", lr {rate:g}" if rate else ""), schedule]
        for count in shots:
            wanted = {"shots": count, "method": method, "rate": rate, "schedule": schedule}
            found = [run["accuracy"] for run in runs if all(run[name] == value for name, value in wanted.items())]
            mean = f"{statistics.fmean(found):.3f}" if found else "-"
            row.append(mean + (f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""))
        body.append(row)
    return results.markdown(("method", "schedule", *(f"{count} images each" for count in shots)), body, texts=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/digits.json"))
    parser.add_argument("--quick", action="store_true", help="one seed, five steps: does it work?")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        make(arguments.out, arguments.quick)
        print(table(results.read_json(arguments.out)))
    except (InputError, MissingExtra) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

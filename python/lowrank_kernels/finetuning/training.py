"""One run: a method, its options, a sample of the data and a seed, trained and measured; it can be killed and resumed.

Everything random is a function of the seed and the step: the sample, the head's start, the batches, the dropout masks. A
checkpoint therefore holds only the trained parameters, Adam's state and the numbers seen so far, as one safetensors file; a
resumed run gives bit for bit what an uninterrupted one gives, on the same machine with the same number of threads.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import InputError, write_atomically
from ..optim import AdamWithSGD
from .data import Examples, batch_indices, subsample
from .methods import METHODS, Groups, Setup, build, update_ranks
from .metrics import metrics
from .models import Batch, Encoded, Pretrained, TextModel, loss_of, predict

SCHEDULES = ("constant", "linear")
MOVED = 1e-2  # a layer has moved when its update has a singular value above this
KEPT_VALUES = 16  # singular values of an update that a result keeps
Progress = Callable[[int, int, float], None]  # step, steps, loss


@dataclass(frozen=True)
class Settings:
    """What all runs of a results folder share."""

    head: str = "cross"
    batch: int = 16
    head_lr: float = 1e-3
    max_length: int = 128
    eval_every: int = 50  # steps between two points of the learning curve
    curve_samples: int = 256  # dev examples of such a point; the end is measured on all
    base_dtype: str = "float32"


@dataclass(frozen=True)
class Run:
    """What one run is."""

    method: str
    options: tuple[tuple[str, Any], ...]
    samples: int | None  # None: all
    steps: int
    schedule: str = "constant"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "options": dict(self.options)}


@dataclass
class Bench:
    """What runs are made on: the pretrained model and the data, loaded once."""

    base: Pretrained
    train: Examples
    dev: Examples
    settings: Settings

    def __post_init__(self) -> None:
        self.encoded_dev = Encoded(self.base, self.dev, self.settings.head, self.settings.max_length)
        count = min(self.settings.curve_samples, len(self.dev))
        picked = np.sort(np.random.default_rng(0).permutation(len(self.dev))[:count])
        self.encoded_curve = Encoded(self.base, self.dev.pick(picked), self.settings.head, self.settings.max_length)


class Trainee:
    """A model with its optimizer and data, ready for steps; the same for a real run and for a step-time comparison.

    With the option ``head_first``, a share of the steps, the head alone is trained first, at its constant rate, and the
    method is put into the model then; what is left of the steps has the run's schedule.
    """

    def __init__(self, bench: Bench, run: Run) -> None:
        self.bench, self.run = bench, run
        sample = subsample(bench.train, run.samples, run.seed)
        self.data = Encoded(bench.base, sample, bench.settings.head, bench.settings.max_length)
        encoder = copy.deepcopy(bench.base.encoder)
        self._frozen = {id(parameter) for parameter in encoder.parameters()}
        labels = self.data.labels.to(next(encoder.parameters()).device)
        self.model = TextModel(bench.base, encoder, bench.settings.head, labels, len(sample.classes), run.seed)
        self.head_steps = min(round(dict(run.options).get("head_first", 0.0) * run.steps), run.steps - 1)
        self.adapted = False
        if self.head_steps:
            self._take([])
        else:
            self.adapt()

    def adapt(self) -> None:
        """Put the method into the model, as its head is now."""
        first = self.batch(self.head_steps)
        setup = Setup(
            self.model,
            self.bench.base.linears,
            dict(self.run.options),
            self.run.seed,
            lambda: loss_of(self.model(first), first.labels),
        )
        self._take(build(METHODS[self.run.method], setup))
        self.adapted = True

    def _take(self, groups: Groups) -> None:
        """A new optimizer of these groups and the head."""
        head = {"params": list(self.model.head.parameters()), "lr": self.bench.settings.head_lr, "name": "head"}
        self.optimizer = AdamWithSGD([*groups, head], fused=True)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.own = {name: p for name, p in self.model.named_parameters() if id(p) not in self._frozen}
        self.model.train()

    @property
    def trainable(self) -> int:
        """Trained numbers beside the head."""
        head = sum(parameter.numel() for parameter in self.model.head.parameters())
        return sum(parameter.numel() for parameter in self.own.values() if parameter.requires_grad) - head

    def batch(self, step: int) -> Batch:
        """What step ``step`` (from 0) sees."""
        return self.data.batch(batch_indices(step, len(self.data), self.bench.settings.batch, self.run.seed))

    def step(self, step: int) -> float:
        """One step of the optimizer; the loss before it."""
        if step >= self.head_steps and not self.adapted:
            self.adapt()
        share = 1.0
        if self.adapted and self.run.schedule == "linear":
            share -= (step - self.head_steps) / (self.run.steps - self.head_steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        torch.manual_seed(int(np.random.default_rng([self.run.seed, 3, step]).integers(2**62)))  # of the dropout
        batch = self.batch(step)
        loss = loss_of(self.model(batch), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def measure(self, encoded: Encoded) -> dict[str, float | None]:
        """The metrics on a set of examples; None where one is not defined."""
        predictions = predict(self.model, encoded)
        if not bool(torch.isfinite(predictions).all()):
            return dict.fromkeys(metrics(torch.zeros_like(predictions), encoded.labels))
        return {name: value if math.isfinite(value) else None for name, value in metrics(predictions, encoded.labels).items()}


# ---------------------------------------------------------------------- a run


def execute(
    bench: Bench,
    run: Run,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    checkpoint_seconds: float = 60.0,
) -> dict[str, Any]:
    """Train and measure; resumes from ``checkpoint`` where the file is there, and removes it at the end."""
    trainee = Trainee(bench, run)
    losses: list[float] = []
    times: list[float] = []
    curve: list[dict[str, Any]] = []
    start = 0
    if checkpoint is not None and checkpoint.exists():
        state = _restore(checkpoint, trainee)
        start, losses, times, curve = state["step"], state["losses"], state["times"], state["curve"]
    every = bench.settings.eval_every
    saved = time.monotonic()
    diverged = False
    for step in range(start, run.steps):
        if step % every == 0:
            curve.append({"step": step, **trainee.measure(bench.encoded_curve)})
        started = time.perf_counter()
        loss = trainee.step(step)
        times.append(time.perf_counter() - started)
        if not math.isfinite(loss):
            diverged = True
            break
        losses.append(loss)
        if progress is not None:
            progress(step + 1, run.steps, loss)
        if checkpoint is not None and step + 1 < run.steps and time.monotonic() - saved >= checkpoint_seconds:
            _save(checkpoint, trainee, {"step": step + 1, "losses": losses, "times": times, "curve": curve})
            saved = time.monotonic()
    final = trainee.measure(bench.encoded_dev)
    diverged = diverged or (None in final.values() and not _constant(trainee, bench))
    curve.append({"step": len(losses), **trainee.measure(bench.encoded_curve)})
    return {
        "run": run.to_dict(),
        "status": "diverged" if diverged else "finished",
        "metrics": final,
        "curve": curve,
        "losses": losses,
        "step_seconds": _times(times),
        "trainable": trainee.trainable,
        "ranks": _ranks(trainee),
    }


def _constant(trainee: Trainee, bench: Bench) -> bool:
    """Finite predictions without a correlation: all the same. Bad, but no divergence."""
    return bool(torch.isfinite(predict(trainee.model, bench.encoded_curve)).all())


def _times(times: list[float]) -> dict[str, float]:
    if not times:
        return {}
    low, median, high = np.quantile(times, [0.1, 0.5, 0.9])
    return {"median": float(median), "p10": float(low), "p90": float(high), "total": float(sum(times))}


def _ranks(trainee: Trainee) -> dict[str, Any] | None:
    """The update of every layer: how many singular values count, and how far it moved."""
    report = update_ranks(trainee.model.encoder)
    if report is None:
        return None
    rows = []
    for row in report.layers:
        finite = row.absolute_rank is not None
        rows.append(
            {
                "name": row.name,
                "shape": list(row.shape),
                "singular_values": [value if math.isfinite(value) else None for value in row.singular_values[:KEPT_VALUES]],
                "rank": row.absolute_rank,
                "relative_rank": row.relative_rank,
                "stable_rank": row.stable_rank if finite else None,
                "ratio": row.ratio if finite and math.isfinite(row.ratio) else None,
            }
        )
    finite_rows = [row for row in report.layers if row.absolute_rank is not None]
    moved = [row for row in finite_rows if row.norm > MOVED]
    ratios = [row.ratio for row in finite_rows]
    return {
        "mean_rank": sum(row.absolute_rank or 0 for row in finite_rows) / len(finite_rows) if finite_rows else None,
        "mean_relative_rank": sum(row.relative_rank or 0 for row in finite_rows) / len(finite_rows) if finite_rows else None,
        "mean_stable_rank": sum(row.stable_rank for row in moved) / len(moved) if moved else None,  # of layers that moved
        "moved": len(moved) / len(report.layers),
        "largest_ratio": max(ratios) if len(ratios) == len(report.layers) and math.isfinite(max(ratios)) else None,
        "threshold": MOVED,
        "layers": rows,
    }


# ---------------------------------------------------------------------- checkpoints


def _save(path: Path, trainee: Trainee, state: dict[str, Any]) -> None:
    tensors = {f"model.{name}": parameter.detach().cpu().contiguous() for name, parameter in trainee.own.items()}
    for index, values in trainee.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.detach().cpu().contiguous()
    metadata = {"state": json.dumps({**state, "run": trainee.run.to_dict()})}
    data = safetensors.torch.save(tensors, metadata)
    write_atomically(path, lambda handle: handle.write(data), overwrite=True)


def _restore(path: Path, trainee: Trainee) -> dict[str, Any]:
    """Put a checkpoint into a trainee that was built anew; what was seen until then."""
    try:
        with safe_open(path, "pt") as handle:
            state = json.loads(handle.metadata()["state"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a readable checkpoint ({error}); remove it to start this run anew") from error
    if state.get("run") == trainee.run.to_dict() and state["step"] > trainee.head_steps and not trainee.adapted:
        trainee.adapt()
    own = {f"model.{name}": parameter for name, parameter in trainee.own.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("model.")}
    if state.get("run") != trainee.run.to_dict() or shapes != {name: tuple(p.shape) for name, p in own.items()}:
        raise InputError(f"{path}: the checkpoint of another run or version; remove it to start this run anew")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            states.setdefault(int(index), {})[key] = tensor
    trainee.optimizer.load_state_dict({"state": states, "param_groups": trainee.optimizer.state_dict()["param_groups"]})
    return state

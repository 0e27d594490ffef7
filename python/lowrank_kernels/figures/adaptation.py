"""The paper's Figure 1: what the updates of a fine-tuned language model look like, and when they find their subspace.

Its Figure 8 is the report of the fine-tuning command: accuracy over the samples, rank of the updates, accuracy over the rank.

Source: Yaras et al., ICML 2024, arXiv:2406.04112, section 4.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import adapter_layers
from ..files import InputError, MissingExtra, extra
from ..finetuning import command
from ..finetuning.methods import METHODS, FullWidthLinear
from ..finetuning.models import find_model
from ..finetuning.training import Run, Settings, Trainee
from .drawing import COLOURS, Made, Request, Rows, finish, panels

TOP = 8  # right singular vectors that span the subspace looked at
SHOWN = 16  # singular values of an update
LOSS_WINDOW = 10  # steps over which the loss is averaged
CURVES = {"deeplora-full": "full width", "deeplora-paper": "compressed"}


def missing(request: Request) -> str | None:
    """What this figure needs and the request lacks."""
    if request.train is None:
        return "it fine-tunes a model: --train FOLDER says where sts-train.csv of the STS Benchmark is"
    try:
        for library in ("transformers", "safetensors"):
            extra(library, "the figure adaptation")
        find_model(request.model)
    except (InputError, MissingExtra) as error:
        return str(error)
    return None


def updates(encoder: torch.nn.Module) -> list[Tensor]:
    """The update of every adapted layer, ``(out, in)`` float64, of full-width and of compressed adapters."""
    found = [module.delta() for module in encoder.modules() if isinstance(module, FullWidthLinear)]
    return found or [layer.get_delta_weight("default").detach().double() for layer in adapter_layers(encoder).values()]


def spectrum(delta: Tensor) -> tuple[Tensor, Tensor]:
    """The SHOWN largest singular values and the TOP right singular vectors ``(in, TOP)``, from the smaller Gram matrix: to
    1e-8 of the largest, in a tenth of an SVD's time."""
    wide = delta.shape[0] < delta.shape[1]
    values, vectors = torch.linalg.eigh(delta @ delta.t() if wide else delta.t() @ delta)
    values, vectors = values.flip(0)[:SHOWN].clamp_min(0).sqrt(), vectors.flip(1)[:, :TOP]
    return values, torch.linalg.qr(delta.t() @ vectors)[0] if wide else vectors


def alignment(a: Tensor, b: Tensor) -> float:
    """``|A^T B|_F^2 / columns`` of orthonormal A and B: 1 for the same subspace, columns / rows by chance."""
    return float((a.t() @ b).square().sum()) / a.shape[1]


def adaptation(request: Request) -> Made:
    """Singular values of all updates at the end, alignment of their subspaces with those of the end, training loss."""
    assert request.train is not None
    steps, samples = (6, 16) if request.quick else (150, 1024)
    checks = [step for step in (0, 1, 3, 10, 20, 30, 50, 100) if step < steps] + [steps]
    settings = Settings(base_dtype="float32", curve_samples=8)
    with tempfile.TemporaryDirectory() as folder:  # nothing of the command's own results is kept
        asked = command.Request(str(request.train), folder, request.model, task="stsb", settings=settings, quick=request.quick)
        bench = command.prepare(asked, request.tell)[0]
    samples = min(samples, len(bench.train))
    rows = Rows("model", "step", "loss", "layer", "alignment", "alignment_first", *(f"s{i + 1}" for i in range(SHOWN)))
    curves: dict[str, list[float]] = {}
    for method, label in CURVES.items():
        options = tuple(METHODS[method].defaults.items())
        trainee = Trainee(bench, Run(method, options, samples, steps, "linear", request.seed))
        losses: list[float] = []
        seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for step in range(steps + 1):
            if step in checks:
                seen[step] = [spectrum(delta) for delta in updates(trainee.model.encoder)]
            if step < steps:
                losses.append(trainee.step(step))
                request.tell(f"{label}: step {step + 1} of {steps}, loss {losses[-1]:.3f}")
        curves[label] = losses
        for step, found in seen.items():
            around = losses[max(step - LOSS_WINDOW, 0) : step] or losses[:1]
            for layer, ((values, now), (_, end)) in enumerate(zip(found, seen[steps], strict=True)):
                padded = [*values.tolist(), *[0.0] * (SHOWN - len(values))]
                numbers = [sum(around) / len(around), alignment(now, end), alignment(now[:, :1], end[:, :1]), *padded]
                loss, *others = (float(f"{number:.6g}") for number in numbers)
                rows.add(label, step, loss, layer, *others)
    return _draw(rows, curves, checks, samples)


def _draw(rows: Rows, curves: dict[str, list[float]], checks: Sequence[int], samples: int) -> Made:
    steps, early = checks[-1], 30 if 30 in checks else checks[1]
    figure, axes = panels(3, width=4.6)
    ends: dict[str, tuple[int, int, float]] = {}
    firsts: dict[str, float] = {}
    for (label, losses), colour in zip(curves.items(), COLOURS, strict=False):
        layers = len(rows.where("layer", model=label, step=steps))
        values = torch.tensor([rows.where(f"s{i + 1}", model=label, step=steps) for i in range(SHOWN)])  # (SHOWN, layers)
        for layer in range(layers):
            line = {"color": colour, "alpha": 0.35, "linewidth": 0.8, "label": label if layer == 0 else None}
            axes[0].plot(range(1, SHOWN + 1), values[:, layer].clamp_min(1e-9), **line)
        ends[label] = int((values[0] > 1e-2).sum()), layers, float((values > 1e-2).sum() / layers)
        for measure, style, words in (("alignment", "-", f"top {TOP}"), ("alignment_first", ":", "the first")):
            means = [sum(found) / len(found) for step in checks for found in [rows.where(measure, model=label, step=step)]]
            axes[1].plot(checks, means, style, color=colour, marker="o", markersize=3, label=f"{label}, {words}")
            if measure == "alignment_first":
                firsts[label] = means[checks.index(early)]
        smooth = [sum(part) / len(part) for i in range(len(losses)) for part in [losses[max(0, i + 1 - LOSS_WINDOW) : i + 1]]]
        axes[2].plot(range(1, len(losses) + 1), smooth, color=colour, label=label)
    axes[0].set(xlabel="index", ylabel="singular values of all updates", yscale="log")
    axes[1].set(xlabel="step", ylabel="alignment with the end", ylim=(0, 1.02))
    axes[2].set(xlabel="step", ylabel=f"training loss, mean of {LOSS_WINDOW} steps")
    finish(axes)
    said = "; ".join(
        f"{label}: {moved} of {layers} layers have a singular value above 1e-2, {rank:.2g} each in the mean"
        for label, (moved, layers, rank) in ends.items()
    )
    aligned = " and ".join(f"{100 * firsts[label]:.0f} % ({label})" for label in firsts)
    caption = (
        f"Deep LoRA as in the paper, full width and compressed, {samples} pairs of the STS Benchmark, {steps} steps of 16, "
        f"rates to zero in a line. {said}. At step {early} the first right singular vector is "
        f"aligned with that of the end to {aligned}. Singular values below 1e-8 of an update's largest are rounding, and so is "
        "the subspace that they span. The source: BERT, all pairs, 2,000 steps; full-width updates of very low rank, aligned "
        "long before the loss is low."
    )
    return Made(rows.columns, figure, caption, True)

"""The paper's figures of matrix factorization and completion.

Targets are d x d matrices of normal numbers cut to rank r, masks observe exactly the p-th part, factors start at scaled
orthogonal matrices and gradient descent runs on the loss divided by d^2, as in the authors' code. The quick settings are
smaller and start at a larger scale: escaping from a start of scale eps takes about 1 / (rate s eps) steps at depth 3.

Source: Yaras et al., ICML 2024, arXiv:2406.04112.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..factorization import DeepFactorization, Recorder, SquaredLoss, gradient_spectra, train
from .drawing import COLOURS, Made, Request, Rows, banded, finish, panels


def low_rank(d: int, r: int, generator: torch.Generator) -> Tensor:
    """A matrix of normal numbers cut to its r largest singular values, ``(d, d)`` float64."""
    u, s, vh = torch.linalg.svd(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return (u[:, :r] * s[:r]) @ vh[:r]


def observed(d: int, p: float, generator: torch.Generator) -> Tensor:
    """A mask with exactly ``floor(p d^2)`` entries."""
    mask = torch.zeros(d * d, dtype=torch.bool)
    mask[torch.randperm(d * d, generator=generator)[: math.floor(p * d * d)]] = True
    return mask.view(d, d)


class Setting(NamedTuple):
    """A problem: d, rank, observed share, scale of the start, rate on the mean loss, steps at most, tolerance."""

    d: int
    r: int
    p: float
    eps: float
    rate: float
    steps: int
    tol: float

    def problem(self, request: Request, number: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, SquaredLoss]:
        """Target and loss of a trial."""
        generator = request.generator(number)
        target = low_rank(self.d, self.r, generator).to(dtype)
        mask = observed(self.d, self.p, generator) if self.p < 1 else None
        return target, SquaredLoss(target, mask, reduction="mean")

    def words(self) -> str:
        share = f", {100 * self.p:g} % observed" if self.p < 1 else ""
        rate = f", rate {self.rate:g} on the mean loss" if self.rate else ""
        return f"d = {self.d}, rank {self.r}{share}, eps = {self.eps:g}{rate}"


def kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unseen_error(x: Tensor, target: Tensor, loss: SquaredLoss) -> float:
    """``1/2 mean (1 - mask) (X - target)^2`` over all entries, the paper's recovery error; of a full observation the loss."""
    error = (x - target).square()
    return float(((1 - loss.weights) * error if loss.weights is not None else error).mean() / 2)


def relative_error(x: Tensor, target: Tensor) -> float:
    return float((x - target).norm() / target.norm())


# ---------------------------------------------------------------------- Fig. 2


def depth(request: Request) -> Made:
    """Two and three factors over the width: error on what was not observed, and steps to converge."""
    full, quick = Setting(100, 10, 0.3, 1e-3, 0.0, 60_000, 1e-10), Setting(40, 4, 0.5, 1e-2, 0.0, 6_000, 1e-10)
    base = quick if request.quick else full
    rates = {2: 80.0, 3: 32.0} if request.quick else {2: 100.0, 3: 300.0}
    widths = (4, 10, 20, 40) if request.quick else tuple(range(10, 101, 10))
    trials = 2 if request.quick else 5
    rows = Rows("depth", "width", "trial", "steps", "train_loss", "unseen_error", "relative_error")
    for layers, rate in rates.items():
        for width in widths:
            for trial in range(trials):
                request.tell(f"depth {layers}, width {width}, trial {trial + 1} of {trials}")
                target, loss = base.problem(request, trial)
                generator = request.generator(100 + trial)
                model = DeepFactorization(layers, base.d, width, init_scale=base.eps, generator=generator)
                result = train(model, loss, learning_rate=rate, steps=base.steps, tol=base.tol, check=False)
                x = model().detach()
                errors = unseen_error(x, target, loss), relative_error(x, target)
                rows.add(layers, width, trial, result.steps, result.loss, *errors)
    figure, axes = panels(2)
    for layers, colour in zip(rates, COLOURS, strict=False):
        for each, name in zip(axes, ("unseen_error", "steps"), strict=True):
            found = [rows.where(name, depth=layers, width=width) for width in widths]
            banded(each, widths, found, colour, f"{layers} factors")
    axes[0].set(xlabel="width", ylabel="error on what was not observed")
    axes[1].set(xlabel="width", ylabel="steps to converge", yscale="log")
    finish(axes)

    def mean(name: str, layers: int, width: int) -> float:
        values = rows.where(name, depth=layers, width=width)
        return sum(values) / len(values)

    wide, slim = widths[-1], widths[0]
    two, three, slim_two = (mean("unseen_error", *at) for at in ((2, wide), (3, wide), (2, slim)))
    caption = (
        f"{base.words()}, rates {rates[2]:g} and {rates[3]:g} on the mean loss, {trials} trials (the band is their range). At "
        f"full width two factors end at {two:.2g}, three at {three:.2g}; at the width of the rank two end at {slim_two:.2g}. "
        f"Three factors of the smallest width take {mean('steps', 3, slim) / mean('steps', 3, wide):.1f} times the steps of "
        "full width. The source: two factors overfit as they get wider, three do not, and wide ones converge faster."
    )
    return Made(rows.columns, figure, caption, request.quick)


# ---------------------------------------------------------------------- Fig. 3


def spectrum(request: Request) -> Made:
    """Singular values of the first layer, and how far its singular subspaces turn."""
    d, r, steps = 30, 3, 50
    generator = request.generator()
    target = low_rank(d, r, generator)
    loss = SquaredLoss(target)
    model = DeepFactorization(3, d, init_scale=1.0, generator=generator)
    recorder = Recorder(every=1, rank=2 * r)
    train(model, loss, learning_rate=1 / d**2, steps=steps, recorder=recorder)
    found = recorder.recording()
    values = found["layer1.singular_values"]
    columns: dict[str, list[Any]] = {"step": found["step"].astype(int).tolist()}
    columns |= {f"singular_value_{i + 1}": values[:, i].tolist() for i in range(d)}
    columns |= {"rho": found["rho"][:, 0].tolist(), "angle_invariant": found["angle_invariant"][:, 0].tolist()}
    columns["angle_top"] = found["angle_top"][:, 0].tolist()
    figure, axes = panels(2)
    for i in range(d):
        moves = i < 2 * r
        axes[0].plot(columns["step"], values[:, i], color=COLOURS[1 if moves else 0], linewidth=1.2, alpha=1 if moves else 0.4)
    axes[0].plot([], [], color=COLOURS[1], label=f"first {2 * r}")
    axes[0].plot([], [], color=COLOURS[0], label=f"the other {d - 2 * r}")
    axes[0].plot(columns["step"], columns["rho"], "k:", linewidth=1.5, label="rho of equation (6)")
    axes[0].set(xlabel="step", ylabel="singular values of $W_1$")
    for name, label, colour in (("angle_invariant", "of the invariant subspace", 0), ("angle_top", f"of the top {r}", 1)):
        axes[1].plot(columns["step"], np.maximum(columns[name], 1e-16), color=COLOURS[colour], label=label)
    axes[1].set(xlabel="step", ylabel="largest principal angle to the start", yscale="log")
    finish(axes)
    off = float(abs(found["rho"] - found["rho_measured"]).max())
    turned = {name: float(np.nanmax(columns[name])) for name in ("angle_invariant", "angle_top")}  # NaN: not separated yet
    caption = (
        f"d = {d}, rank {r}, three factors, eps = 1, rate 1/{d**2} on the sum, {steps} steps, first layer. The {d - 2 * r} "
        f"repeated singular values follow (6) to {off:.1g}, their subspace turns by at most "
        f"{turned['angle_invariant']:.1g} while the top one turns by {turned['angle_top']:.2f}, as in the source."
    )
    return Made(columns, figure, caption)


# ---------------------------------------------------------------------- Fig. 4, Fig. 5


@dataclass(frozen=True)
class Curve:
    """One training: what it is, and its history."""

    label: str
    model: DeepFactorization
    gamma: float | None = None
    tol: float | None = None  # by default the setting's


def trained(request: Request, setting: Setting, target: Tensor, loss: SquaredLoss, curves: Sequence[Curve]) -> Rows:
    """Train all, with the error at every check; evaluating it does not count as time."""
    rows = Rows("model", "step", "seconds", "train_loss", "unseen_error", "relative_error")
    for curve in curves:
        request.tell(curve.label)
        aside = 0.0
        began = time.perf_counter()

        def note(step: int, value: float, curve: Curve = curve, began: float = began) -> None:
            nonlocal aside
            now = time.perf_counter()
            x = curve.model().detach()
            errors = unseen_error(x, target, loss), relative_error(x, target)
            rows.add(curve.label, step, now - began - aside, value, *errors)
            request.tell(f"{curve.label}: step {step}, loss {value:.2g}")
            aside += time.perf_counter() - now

        options: dict[str, Any] = {"gamma": curve.gamma, "check": False, "callback": note}
        tol = setting.tol if curve.tol is None else curve.tol
        train(curve.model, loss, learning_rate=setting.rate, steps=setting.steps, tol=tol, **options)
    return rows


def draw(rows: Rows, labels: Sequence[str], measure: str, title: str) -> Any:
    """The measure over the steps and over the time."""
    figure, axes = panels(2)
    for label, colour in zip(labels, COLOURS, strict=False):
        for each, by in zip(axes, ("step", "seconds"), strict=True):
            values = [max(value, 1e-32) for value in rows.where(measure, model=label)]
            each.plot(rows.where(by, model=label), values, color=colour, label=label)
    for each, words in zip(axes, ("step", "seconds"), strict=True):
        each.set(xlabel=words, ylabel=title, yscale="log")
    finish(axes)
    return figure


def ends(rows: Rows, label: str) -> dict[str, float]:
    """The last row of a model."""
    return {name: rows.where(name, model=label)[-1] for name in rows.columns if name != "model"}


def trajectory(request: Request) -> Made:
    """A fully observed factorization at full width and its compressed twin: the same losses, in less time."""
    full, quick = Setting(1000, 10, 1.0, 1e-3, 1e3, 40_000, 1e-10), Setting(100, 5, 1.0, 1e-2, 100.0, 4_000, 1e-10)
    setting = quick if request.quick else full
    dtype = torch.float64 if request.quick else torch.float32  # of the training; the start is made in float64
    target, loss = setting.problem(request)
    original = DeepFactorization(3, setting.d, init_scale=setting.eps, generator=request.generator(100))
    twin = original.compress(loss, 2 * setting.r, generator=request.generator(200))
    target, loss = target.to(dtype), SquaredLoss(target.to(dtype), reduction="mean")
    labels = ("full width", "compressed")
    curves = [Curve(labels[0], original.to(dtype)), Curve(labels[1], twin.to(dtype), 0.0)]
    rows = trained(request, setting, target, loss, curves)
    figure = draw(rows, labels, "train_loss", "loss")
    a, b = (ends(rows, label) for label in labels)
    both = list(zip(*(rows.where("train_loss", model=label) for label in labels), strict=False))
    gap = max(abs(x - y) / max(x, y) for x, y in both if min(x, y) > 1e-9 * both[0][0])
    caption = (
        f"Three factors, {setting.words()}, inner width {2 * setting.r}, {kind(dtype)}. Both reach a loss of {setting.tol:g} "
        f"after {a['step']:.0f} and {b['step']:.0f} steps; until 1e-9 of the start the losses differ by at most "
        f"{100 * gap:.2g} %. Time {a['seconds']:.1f} s and {b['seconds']:.2f} s, {a['seconds'] / b['seconds']:.0f} times less "
        "compressed. The source: the same trajectory in a fraction of the time."
    )
    return Made(rows.columns, figure, caption, request.quick)


def completion(request: Request) -> Made:
    """Completion at full width, and compressed with the outer factors frozen and slowly trained."""
    full, quick = Setting(1000, 5, 0.2, 1e-3, 5e3, 40_000, 1e-9), Setting(100, 3, 0.3, 1e-2, 300.0, 4_000, 1e-10)
    setting = quick if request.quick else full
    dtype = torch.float64 if request.quick else torch.float32
    target, loss = setting.problem(request, dtype=dtype)
    original = DeepFactorization(3, setting.d, init_scale=setting.eps, generator=request.generator(100), dtype=torch.float64)
    wide = SquaredLoss(loss.target.double(), loss.weights, reduction="mean")
    twins = [original.compress(wide, 2 * setting.r, generator=request.generator(200)).to(dtype) for _ in range(2)]
    curves = [
        Curve("full width", original.to(dtype)),
        Curve("compressed, gamma = 0", twins[0], 0.0),
        Curve("compressed, gamma = 0.01", twins[1], 0.01, 1e-13),
    ]
    rows = trained(request, setting, target, loss, curves)
    labels = [curve.label for curve in curves]
    figure = draw(rows, labels, "unseen_error", "error on what was not observed")
    a, frozen, b = (ends(rows, label) for label in labels)
    errors, seconds = (rows.where(name, model=labels[2]) for name in ("relative_error", "seconds"))
    reached = next((t for error, t in zip(errors, seconds, strict=True) if error <= max(1e-5, a["relative_error"])), math.inf)
    caption = (
        f"Three factors, {setting.words()}, inner width {2 * setting.r}, {kind(dtype)}. Full width: relative error "
        f"{a['relative_error']:.2g} after {a['step']:.0f} steps and {a['seconds']:.1f} s; gamma = 0.01: "
        f"{b['relative_error']:.2g} after {b['step']:.0f} steps and {b['seconds']:.2f} s, with 1e-5 or that of full width "
        f"reached in {reached:.2f} s, 1/{a['seconds'] / reached:.3g} of its time; gamma = 0 stays at "
        f"{frozen['relative_error']:.2g}. The source: the same order, gamma = 0 stalls, and about 1/7 of the time on a GPU."
    )
    return Made(rows.columns, figure, caption, request.quick)


# ---------------------------------------------------------------------- Fig. 10, left


def narrow(request: Request) -> Made:
    """Steps and time to converge, compressed against random narrow factors of the same width, over the assumed rank."""
    full, quick = Setting(1000, 5, 0.2, 1e-3, 5e3, 100_000, 1e-10), Setting(100, 3, 0.3, 1e-2, 300.0, 8_000, 1e-10)
    setting = quick if request.quick else full
    assumed = (3, 6, 9) if request.quick else (5, 8, 11, 14, 17, 20)
    trials, dtype = (2, torch.float64) if request.quick else (5, torch.float32)
    rows = Rows("model", "assumed_rank", "trial", "steps", "seconds", "train_loss", "relative_error")
    for trial in range(trials):
        target, loss = setting.problem(request, trial)
        cast = SquaredLoss(loss.target.to(dtype), loss.weights, reduction="mean")
        original = DeepFactorization(3, setting.d, init_scale=setting.eps, generator=request.generator(100 + trial))
        for rank in assumed:
            models = {
                "compressed": original.compress(loss, 2 * rank, truncate=True, generator=request.generator(200 + trial)),
                "random narrow": DeepFactorization(
                    3, setting.d, 2 * rank, init_scale=setting.eps, generator=request.generator(300 + trial)
                ),
            }
            for label, model in models.items():
                model.to(dtype)
                request.tell(f"{label}, assumed rank {rank}, trial {trial + 1} of {trials}")
                gamma = 0.01 if label == "compressed" else None
                began = time.perf_counter()
                result = train(
                    model, cast, learning_rate=setting.rate, steps=setting.steps, tol=setting.tol, gamma=gamma, check=False
                )
                seconds = time.perf_counter() - began
                error = relative_error(model().detach().double(), target)
                rows.add(label, rank, trial, result.steps, seconds, result.loss, error)
    figure, axes = panels(2)
    labels = ("compressed", "random narrow")
    means: dict[tuple[str, str], list[float]] = {}
    for label, colour in zip(labels, COLOURS, strict=False):
        for each, name in zip(axes, ("steps", "seconds"), strict=True):
            found = [rows.where(name, model=label, assumed_rank=rank) for rank in assumed]
            means[label, name] = banded(each, assumed, found, colour, label)
            each.set(xlabel="assumed rank", ylabel=name)
    finish(axes)
    ours, theirs = means["compressed", "steps"], means["random narrow", "steps"]
    caption = (
        f"Three factors, {setting.words()}, {kind(dtype)}, {trials} trials. Steps from assumed rank {assumed[0]} to "
        f"{assumed[-1]}: compressed {ours[0]:.0f} to {ours[-1]:.0f}, random {theirs[0]:.0f} to {theirs[-1]:.0f}. The source: "
        "compressed flat at about 19,500, random falling from 62,000 to 45,000."
    )
    return Made(rows.columns, figure, caption, request.quick)


# ---------------------------------------------------------------------- Fig. 9


def nonlinear(request: Request) -> Made:
    """Singular values of every layer's gradient at a small start: linear and ReLU."""
    d, r, eps = (60, 3, 1e-3) if request.quick else (200, 5, 1e-3)
    target = low_rank(d, r, request.generator())
    loss = SquaredLoss(target)
    rows = Rows("activation", "layer", "index", "singular_value")
    figure, axes = panels(2)
    shown = 4 * r
    ratios = {}
    for each, activation in zip(axes, (None, "relu"), strict=True):
        name = activation or "linear"
        model = DeepFactorization(3, d, init_scale=eps, activation=activation, generator=request.generator(100))
        for layer, values in enumerate(gradient_spectra(model, loss)):
            relative = (values / values[0]).tolist()
            for index, value in enumerate(relative):
                rows.add(name, layer + 1, index + 1, value)
            each.plot(
                range(1, shown + 1), [max(value, 1e-17) for value in relative[:shown]], color=COLOURS[layer], marker="o",
                markersize=3, label=f"layer {layer + 1}",
            )  # fmt: skip
            ratios[name, layer + 1] = relative[r] / relative[r - 1], relative[r + 1] / relative[r]
        each.axvline(r + 0.5, color="#000000", linewidth=0.8, linestyle=":")
        each.set(xlabel="index", ylabel="singular value / largest", yscale="log", title=name)
    finish(axes)
    gaps = ", ".join(f"layer {layer} {ratios['relu', layer][0]:.2g}" for layer in (1, 2, 3))
    later = ratios["relu", 2][1]
    caption = (
        f"d = {d}, rank {r}, three factors, eps = {eps:g}. With ReLU the value after the {r}-th is this share of the {r}-th: "
        f"{gaps}; in layer 2 the next one is {later:.2g} of it. The linear gradients have rank {r} to rounding. The source "
        "shows a gap after about the rank in the nonlinear case too; its settings are not known."
    )
    return Made(rows.columns, figure, caption, request.quick)

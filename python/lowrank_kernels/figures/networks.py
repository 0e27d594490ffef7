"""Figures of trained and random networks that the theory's neighbours show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import extra
from .drawing import COLOURS, Made, Request, Rows, finish, panels

# ---------------------------------------------------------------------- LoRA+, Fig. 2


def rates(request: Request) -> Made:
    """Final loss of a LoRA over its two rates, A and B, on LoRA+'s toy problem."""
    d, n, r, examples = (5, 50, 4, 200) if request.quick else (5, 100, 4, 1000)
    steps, seeds = (80, 1) if request.quick else (200, 3)
    per_decade = 2 if request.quick else 3
    grid = [10 ** (-4 + i / per_decade) for i in range(3 * per_decade + 1)]  # 1e-4 to 1e-1
    pairs = [(a, b) for a in grid for b in grid]
    total = torch.zeros(len(pairs))
    for seed in range(seeds):
        request.tell(f"{len(pairs)} pairs of rates, seed {seed + 1} of {seeds}")
        g = request.generator(seed)
        x = torch.randn(examples, d, generator=g)
        y = torch.sin(x.mean(1))
        hidden = torch.relu(x @ torch.randn(d, n, generator=g) / math.sqrt(d))  # frozen
        frozen = hidden @ torch.randn(n, n, generator=g) / math.sqrt(n)
        out = torch.randn(n, generator=g) / math.sqrt(n)
        first = torch.randn(r, n, generator=g) / math.sqrt(n)
        a: list[Tensor] = [nn.Parameter(first.clone()) for _ in pairs]
        b: list[Tensor] = [nn.Parameter(torch.zeros(n, r)) for _ in pairs]
        groups: list[dict[str, Any]] = [{"params": [p], "lr": rate} for p, (rate, _) in zip(a, pairs, strict=True)]
        groups += [{"params": [p], "lr": rate} for p, (_, rate) in zip(b, pairs, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        losses = torch.zeros(len(pairs))
        for step in range(steps + 1):
            inner = hidden @ torch.stack(a).transpose(1, 2)  # (pairs, examples, r)
            predicted = torch.relu(frozen + inner @ torch.stack(b).transpose(1, 2)) @ out
            losses = (predicted - y).square().mean(1) / 2
            if step < steps:
                optimizer.zero_grad()
                losses.sum().backward()
                optimizer.step()
        total += losses.detach()
    mean = (total / seeds).tolist()
    rows = Rows("rate_a", "rate_b", "loss")
    for (rate_a, rate_b), loss in zip(pairs, mean, strict=True):
        rows.add(rate_a, rate_b, loss)
    table = torch.tensor(mean).view(len(grid), len(grid))
    table = table.where(table.isfinite(), math.inf)
    place = int(table.argmin())
    best_a, best_b = grid[place // len(grid)], grid[place % len(grid)]
    equal = min(mean[i * len(grid) + i] for i in range(len(grid)))
    figure, (axes,) = panels(height=4.4)
    finite = table.where(table.isfinite(), table[table.isfinite()].max())
    shown = axes.pcolormesh(grid, grid, finite.log10(), shading="nearest", cmap="viridis")
    figure.colorbar(shown, ax=axes, label="log10 of the loss")
    axes.plot(grid, grid, "w--", linewidth=1.2, label="equal rates")
    axes.plot(best_b, best_a, "*", color=COLOURS[1], markersize=14, label="best")
    axes.set(xscale="log", yscale="log", xlabel="rate of B", ylabel="rate of A")
    axes.grid(False)
    axes.legend(fontsize=7.5, loc="lower left")
    ratio = best_b / best_a
    caption = (
        f"f(x) = w relu((W + B A) relu(V x)), only A and B trained, B from zero, d = {d}, width {n}, rank {r}, {examples} "
        f"examples of sin(mean x), {steps} steps of AdamW, {seeds} seeds; the source's sizes are quoted from memory. Best: "
        f"rate of A {best_a:.2g}, of B {best_b:.2g} (ratio {ratio:.2g}), loss {float(table.min()):.2g}; best at equal rates "
        f"{equal:.2g}. The source: the best pairs have a larger rate for B. {'Agrees' if ratio > 1 else 'Does not agree'} here."
    )
    return Made(rows.columns, figure, caption, request.quick)


# ---------------------------------------------------------------------- random ReLU networks


def dimension(request: Request) -> Made:
    """Rank of the hidden activations of m inputs, layer by layer, in random networks."""
    m, n, layers, draws = (32, 32, 24, 3) if request.quick else (100, 100, 60, 10)
    leaky: Callable[[Tensor], Tensor] = lambda z: F.leaky_relu(z, -0.5)  # noqa: E731
    kinds: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
        "Gaussian, ReLU": (torch.relu, False),
        "orthogonal, ReLU": (torch.relu, True),
        "Gaussian, leaky ReLU, slope -0.5": (leaky, False),
    }
    rows = Rows("network", "layer", "rank", "rank_1e-3", "correlation")
    for label, (activation, orthogonal) in kinds.items():
        request.tell(label)
        sums = [[0.0, 0.0, 0.0] for _ in range(layers)]
        for draw in range(draws):
            g = request.generator(draw)
            h = torch.randn(m, n, generator=g, dtype=torch.float64)
            for layer in range(layers):
                weight = torch.randn(n, n, generator=g, dtype=torch.float64)
                weight = torch.linalg.qr(weight).Q * math.sqrt(2) if orthogonal else weight * math.sqrt(2 / n)
                h = activation(h @ weight)
                s = torch.linalg.svdvals(h)
                unit = F.normalize(h, dim=1)
                pairs = (float((unit @ unit.t()).sum()) - float(unit.square().sum())) / (m * (m - 1))
                found = int((s > s[0] * n * torch.finfo(s.dtype).eps).sum()), int((s > 1e-3 * s[0]).sum()), pairs
                sums[layer] = [total + value / draws for total, value in zip(sums[layer], found, strict=True)]
        for layer, values in enumerate(sums):
            rows.add(label, layer + 1, *values)
    claim = [m * (1 - (1 - 2 / math.pi) ** layer) for layer in range(1, layers + 1)]
    figure, axes = panels(2)
    steps = range(1, layers + 1)
    for label, colour in zip(kinds, COLOURS, strict=False):
        axes[0].plot(steps, rows.where("rank", network=label), color=colour, label=label)
        axes[1].plot(steps, rows.where("rank_1e-3", network=label), color=colour, label=label)
    axes[0].plot(steps, claim, "k:", label="$m\\,[1-(1-2/\\pi)^l]$, claimed")
    axes[0].set(xlabel="layer", ylabel="rank to rounding", ylim=(0, 1.05 * m))
    axes[1].set(xlabel="layer", ylabel="singular values above 1e-3 of the largest", ylim=(0, 1.05 * m))
    finish(axes)
    gaussian, orthogonal_ranks, leaky_ranks = (rows.where("rank", network=label) for label in kinds)
    loose = rows.where("rank_1e-3", network=next(iter(kinds)))
    apart = max(range(layers), key=lambda i: abs(gaussian[i] - claim[i]))
    rises = [i + 1 for i in range(1, layers - 1) if loose[i] > loose[i - 1] + 0.5 and loose[i] >= loose[i + 1]]
    caption = (
        f"m = {m} normal inputs, width {n}, {layers} layers, {draws} draws, variance 2 / width. Claims of a published "
        "abstract: the expected rank at layer l is m [1 - (1 - 2/pi)^l] up to O(e^(-c m)), peaks return at depths about "
        "(k + 1/2) pi / log(1/rho) with height about 0.79 m, and orthogonal weights or a strongly negative slope keep nearly "
        f"full rank. Measured, Gaussian ReLU: rank {gaussian[0]:.0f} at layer 1 (claimed {claim[0]:.0f}), {gaussian[-1]:.0f} "
        f"at layer {layers} (claimed {claim[-1]:.0f}); furthest apart at layer {apart + 1}, {gaussian[apart]:.0f} against "
        f"{claim[apart]:.0f}. Above 1e-3 of the largest there are {loose[0]:.0f}, then {loose[-1]:.0f}; "
        + (f"peaks at layers {rises}. " if rises else "no peak returns. ")
        + f"Orthogonal ReLU ends at rank {orthogonal_ranks[-1]:.0f}, slope -0.5 at {leaky_ranks[-1]:.0f}."
    )
    return Made(rows.columns, figure, caption, request.quick)


# ---------------------------------------------------------------------- low-rank updates of plain training


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: ``(1797, 64)`` standardized pixels and their classes."""
    data = extra("sklearn.datasets", "the figure 'updates'").load_digits()
    x = torch.tensor(data.data, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(data.target)


def updates(request: Request) -> Made:
    """Singular values of W(t) - W(0) of a hidden layer under plain gradient descent on digits."""
    x, y = digits()
    width, steps, rate = 64, 200 if request.quick else 1000, 0.1
    g = request.generator()
    net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, generator=g)
            nn.init.zeros_(layer.bias)
    start = net[2].weight.detach().clone()  # type: ignore[operator]
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    rows = Rows("step", "index", "singular_value", "accuracy")
    seen, accuracy = sorted({0, *(round(steps ** (i / 24)) for i in range(25))}), 0.0
    for step in range(steps + 1):
        logits = net(x)
        if step in seen:
            request.tell(f"step {step} of {steps}")
            accuracy = float((logits.argmax(1) == y).float().mean())
            values = torch.linalg.svdvals((net[2].weight.detach() - start).double())  # type: ignore[operator]
            for index, value in enumerate(values.tolist()):
                rows.add(step, index + 1, value, accuracy)
        optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
    figure, axes = panels(2)
    trained = seen[1:]
    for index in range(1, width + 1):
        values = [rows.where("singular_value", step=step, index=index)[0] for step in trained]
        first = index <= 10
        axes[0].plot(
            trained,
            [max(v, 1e-12) for v in values],
            color=COLOURS[1 if first else 0],
            linewidth=1.1,
            alpha=0.9 if first else 0.3,
        )
    axes[0].plot([], [], color=COLOURS[1], label="first 10, as many as classes")
    axes[0].plot([], [], color=COLOURS[0], label="the others")
    axes[0].set(xlabel="step", ylabel="singular values of the update", xscale="log", yscale="log")
    last = rows.where("singular_value", step=steps)
    axes[1].plot(range(1, width + 1), [value / last[0] for value in last], color=COLOURS[1], marker="o", markersize=3)
    axes[1].set(xlabel="index", ylabel="singular value / largest at the end", yscale="log")
    finish(axes)
    share = sum(v * v for v in last[:10]) / sum(v * v for v in last)
    caption = (
        f"64-{width}-{width}-10 ReLU network, orthogonal start, full-batch gradient descent of rate {rate:g} on scikit-learn's "
        f"digits, {steps} steps, accuracy {accuracy:.3f} on the training data. At the end the first 10 of {width} singular "
        f"values hold {100 * share:.1f} % of the squared norm of the middle layer's update; the 11th is "
        f"{last[10] / last[0]:.2g} of the first. The source: the update of plain training is concentrated on a few directions; "
        "its settings are not known."
    )
    return Made(rows.columns, figure, caption, request.quick)


# ---------------------------------------------------------------------- outlier eigenspaces


def alignment(request: Request) -> Made:
    """How much of an SGD step lies in the top eigenspaces of the Hessian and of the gradients' second moments."""
    classes, d, width = 4, 12, 12
    steps, batch, rate = (300, 16, 0.05) if request.quick else (2000, 16, 0.05)
    g = request.generator()
    means = F.normalize(torch.randn(classes, d, generator=g, dtype=torch.float64), dim=1) * 3
    labels = torch.randint(0, classes, (600,), generator=g)
    x = means[labels] + torch.randn(600, d, generator=g, dtype=torch.float64)
    shapes = ((width, d), (width,), (classes, width), (classes,))
    sizes = [math.prod(shape) for shape in shapes]
    theta = torch.cat([0.3 * torch.randn(size, generator=g, dtype=torch.float64) for size in sizes])

    def loss(theta: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        w1, b1, w2, b2 = (part.view(shape) for part, shape in zip(theta.split(sizes), shapes, strict=True))
        return F.cross_entropy(torch.tanh(x @ w1.t() + b1) @ w2.t() + b2, labels)

    gradient = torch.func.grad(loss)
    each = torch.func.vmap(lambda t, a, b: gradient(t, a[None], b[None]), (None, 0, 0))
    rows = Rows("step", "loss", "in_hessian", "in_gradients", "by_chance")
    every = steps // 20
    for step in range(steps + 1):
        chosen = torch.randint(0, len(x), (batch,), generator=g)
        grad = gradient(theta, x[chosen], labels[chosen])
        if step % every == 0:
            request.tell(f"step {step} of {steps}")
            hessian = torch.func.hessian(loss)(theta, x, labels)
            per_example = each(theta, x, labels)
            shares = []
            for matrix in (hessian, per_example.t() @ per_example / len(x)):
                top = torch.linalg.eigh(matrix).eigenvectors[:, -classes:]
                shares.append(float((top.t() @ grad).square().sum() / grad.square().sum()))
            rows.add(step, float(loss(theta, x, labels)), *shares, classes / len(theta))
        theta = theta - rate * grad
    figure, axes = panels(2)
    axes[0].plot(rows.columns["step"], rows.columns["loss"], color=COLOURS[0])
    axes[0].set(xlabel="step", ylabel="loss", yscale="log")
    named = (("in_hessian", "Hessian"), ("in_gradients", "second moments of gradients"), ("by_chance", "by chance"))
    for (name, label), colour in zip(named, (*COLOURS[:2], "#999999"), strict=True):
        axes[1].plot(rows.columns["step"], rows.columns[name], color=colour, label=label)
    axes[1].set(xlabel="step", ylabel=f"share of a step in the top {classes} eigenvectors", ylim=(0, 1.05))
    finish(axes)
    later = {name: _late(rows.columns[name]) for name, _ in named}
    caption = (
        f"Mixture of {classes} Gaussians in {d} dimensions, {d}-{width}-{classes} tanh network, SGD with batches of {batch} "
        f"and rate {rate:g}, {steps} steps. In the second half {100 * later['in_hessian']:.0f} % of a step's squared norm lies "
        f"in the top {classes} eigenvectors of the Hessian and {100 * later['in_gradients']:.0f} % in those of the gradients' "
        f"second moments, {100 * later['by_chance']:.1f} % would by chance. The source, an abstract: SGD aligns with the "
        "outlier eigenspaces of both as they emerge."
    )
    return Made(rows.columns, figure, caption, request.quick)


def _late(values: Sequence[float]) -> float:
    """Mean of the second half."""
    half = values[len(values) // 2 :]
    return sum(half) / len(half)

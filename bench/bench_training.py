"""Whole trainings: a step of the estimator, the paper's Figure 5, and real data with the estimators' defaults.

Real data lies in ``../shared/data`` or where ``LOWRANK_DATA`` points; a part whose data is absent is skipped. Nothing here
is chosen by looking at a test part: estimators run with their defaults, peers with theirs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lowrank_kernels as lrk
from lowrank_kernels.reference.core import core_gradients, core_product
from lowrank_kernels.testing import skewed_entries

from .bench_completion import KERNEL, Case, entries_of, our_kernel
from .harness import ROOT, Bar, Session, Skipped, Timing, once_per_round, relative_error, use_threads

OURS = "lowrank_kernels"
SEEDS = (0, 1, 2)
Array = np.ndarray


def data_file(*parts: str) -> Path:
    folder = Path(os.environ.get("LOWRANK_DATA") or ROOT.parent / "shared" / "data")
    path = folder.joinpath(*parts)
    if not path.exists():
        raise Skipped(f"{'/'.join(parts)} is not at hand; LOWRANK_DATA names the folder that holds it")
    return path


def rmse(got: Array, wanted: Array) -> float:
    return float(np.sqrt(np.mean((np.asarray(got, dtype=np.float64) - wanted) ** 2)))


# ---------------------------------------------------------------------- (a) a step of the estimator


def run_step(session: Session) -> None:
    """The time of 2 N steps less that of N steps, over N, against the bare passes at the same width, biases included.

    The passes are those without weights, the estimator may use weights: the comparison is the harder one.
    """
    from lowrank_kernels import DeepMatrixCompletion

    m, n, count, steps = (60, 50, 600, 20) if session.quick else (943, 1682, 100_000, 200)
    row, col = (x.numpy() for x in skewed_entries(m, n, count, seed=0))
    g = np.random.default_rng(0)
    factors = g.standard_normal((m, 8)), g.standard_normal((n, 8))
    values = (factors[0][row] * factors[1][col]).sum(1) + g.standard_normal(m)[row] + g.standard_normal(count)
    pairs = np.stack([row, col], 1)

    def fit(wanted: int) -> Any:
        return DeepMatrixCompletion(max_steps=wanted, early_stopping=False, random_state=0).fit(pairs, values)

    case = Case(m, n, count, fit(1).left_.shape[1], biases=True)
    kernel = our_kernel(case, entries_of(case))
    repeats = 2 if session.quick else 9
    for threads in session.threads:
        with use_threads(threads):
            passes = kernel(threads)

            def many_passes(passes: Callable[[], Any] = passes) -> None:
                for _ in range(steps):
                    passes()

            fit(steps)
            runs = {"short": lambda: fit(steps), "long": lambda: fit(2 * steps), KERNEL: many_passes}
            timings, results = once_per_round(runs, repeats)
        end = results["long"]
        done = end.n_steps_ - results["short"].n_steps_
        if done <= 0:
            session.fail(f"training step: the fit of {2 * steps} steps ended after {end.n_steps_}: {end.status_.name}")
            continue
        pairs_of_times = zip(timings["long"].seconds, timings["short"].seconds, strict=True)
        step = Timing([max(long - short, 1e-9) / done for long, short in pairs_of_times]).columns()
        bare = Timing([t / steps for t in timings[KERNEL].seconds]).columns()
        shared = {"threads": threads, "dtype": "float32", "baseline": KERNEL}
        name = f"training step, {case.name}"
        session.record("training", name, KERNEL, ratio=1.0, **bare, **shared)
        session.record(
            "training",
            name,
            f"{OURS}, estimator",
            ratio=bare["median_ms"] / step["median_ms"],
            metric="times the bare passes",
            value=step["median_ms"] / bare["median_ms"],
            bars=() if session.quick else [Bar("times the bare passes", 3)],
            **step,
            **shared,
        )


# ---------------------------------------------------------------------- (b) Figure 5


@torch.no_grad()
def dense_descent(
    start: lrk.CompressedFactors,
    matrix: Tensor,
    mask: Tensor,
    rate: float,
    gamma: float,
    steps: int,
    say: Callable[[str], None],
) -> lrk.CompressedFactors:
    """The same compressed training with the masked residual as a dense matrix: the best we know without a sparse kernel."""
    left, core, columns = start.left.clone(), start.core.clone(), start.right.t().contiguous().clone()
    error = torch.empty_like(matrix)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        product = core_product(core)
        assert product is not None
        p = left @ product
        torch.addmm(matrix, p, columns.t(), beta=-1, out=error)
        error.mul_(mask)
        grad_p, grad_columns = error @ columns, error.t() @ p
        grad_core, grad_left = core_gradients(core, left.t() @ grad_p), grad_p @ product.t()
        core.add_(grad_core, alpha=-rate)
        left.add_(grad_left, alpha=-gamma * rate)
        columns.add_(grad_columns, alpha=-gamma * rate)
        if step % 2000 == 0:
            say(f"    dense: step {step} of {steps}, {time.perf_counter() - began:.0f} s")
    return lrk.CompressedFactors(left, core, columns.t())


def descents_agree(start: lrk.CompressedFactors, entries: lrk.ObservedEntries, target: Tensor, mask: Tensor) -> bool:
    """Both trainings against autograd in float64, for ten steps from cores large enough to move everything."""
    from lowrank_kernels.solver import gradient_descent

    rate, gamma, steps = 1e-4, 0.01, 10
    left, core, right = (x.double() for x in start)
    begin = lrk.CompressedFactors(left, core / core.abs().max() / 10, right)
    moving = [x.clone().requires_grad_() for x in begin]
    for _ in range(steps):
        product = core_product(moving[1])
        assert product is not None
        loss = (mask * (moving[0] @ product @ moving[2] - target)).square().sum() / 2
        grads = torch.autograd.grad(loss, moving)
        with torch.no_grad():
            for x, grad, factor in zip(moving, grads, (gamma, 1.0, gamma), strict=True):
                x.sub_(grad, alpha=factor * rate)
    ours = gradient_descent(begin, entries, learning_rate=rate, gamma=gamma, max_steps=steps, tol=0.0).factors
    dense = dense_descent(begin, mask * target, mask, rate, gamma, steps, lambda text: None)
    wanted = [x.detach() - x0 for x, x0 in zip(moving, begin, strict=True)]  # the movement, not the place
    return all(
        relative_error(got - x0, move) < 1e-9
        for factors in (ours, dense)
        for got, x0, move in zip(factors, begin, wanted, strict=True)
    )


def run_figure5(session: Session) -> None:
    """d=1000, r=5, 20 % observed, L=3, eps=1e-3, mean loss over d^2 entries, rate 5e3, gamma 0.01, inner width 10."""
    d, r, rate, steps = (40, 2, 20.0, 200) if session.quick else (1000, 5, 5e3, 20_100)
    gamma = 0.01
    g = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(d, d, generator=g, dtype=torch.float64))
    target = (u[:, :r] * s[:r]) @ vh[:r]
    mask = torch.zeros(d * d, dtype=torch.float64)
    mask[torch.randperm(d * d, generator=g)[: d * d // 5]] = 1.0
    mask = mask.view(d, d)
    entries64 = lrk.ObservedEntries.from_dense(target, mask.bool())
    entries = entries64.to(dtype=torch.float32)
    dense_mask, dense_matrix = mask.float(), (mask * target).float()

    def compressed(form: str) -> lrk.CompressedFactors:
        operator = lrk.masked_gradient(entries64)
        generator = torch.Generator().manual_seed(0)
        start = lrk.compress(operator, 2 * r, depth=3, init_scale=1e-3, form=form, generator=generator, dtype=torch.float64)
        return lrk.CompressedFactors(*(x.float() for x in start))

    def ours(form: str) -> Callable[[], Any]:
        def run() -> Any:
            from lowrank_kernels.solver import gradient_descent

            return gradient_descent(
                compressed(form), entries, learning_rate=rate, gamma=gamma, max_steps=steps, tol=0.0, mean_over=d * d
            ).factors

        return run

    def dense() -> Any:  # starts as ours does, so that the training is all that differs
        return dense_descent(compressed("exact"), dense_matrix, dense_mask, rate / d**2, gamma, steps, session.say)

    def error_of(factors: lrk.CompressedFactors) -> float:
        left, core, right = (x.double() for x in factors)
        product = core_product(core)
        assert product is not None
        return float((left @ product @ right - target).norm() / target.norm())

    if not descents_agree(compressed("exact"), entries64, target, mask):
        session.fail("Figure 5: a descent is not gradient descent on the masked loss (float64, autograd, 10 steps)")
        return
    name = f"Figure 5: d={d}, r={r}, 20 % observed, {steps} steps"
    exact, sampled, baseline = f"{OURS}, exact P", f"{OURS}, sampled frames", "dense PyTorch, compressed"
    for threads in session.threads:
        session.say(f"training: {name}, {threads} thread(s)")
        timings = {exact: Timing([]), baseline: Timing([]), sampled: Timing([])}
        errors = {}
        with use_threads(threads):
            # Ours before and after the long dense run: a machine that changes meanwhile would show in the quartiles.
            for contender, run in (
                (exact, ours("exact")),
                (baseline, dense),
                (sampled, ours("sampled")),
                (exact, ours("exact")),
            ):
                began = time.perf_counter()
                factors = run()
                timings[contender].seconds.append(time.perf_counter() - began)
                errors[contender] = error_of(factors)
                session.say(f"  {contender}: {timings[contender].seconds[-1]:.1f} s, relative error {errors[contender]:.2e}")
        dense_ms = timings[baseline].columns()["median_ms"]
        for contender, timing in timings.items():
            columns = timing.columns()
            bars = [Bar("relative error", 1e-5), Bar("ratio", 8, True)] if contender == exact and not session.quick else []
            session.record(
                "training",
                name,
                contender,
                threads=threads,
                dtype="float32",
                metric="relative error",
                value=errors[contender],
                baseline=baseline,
                ratio=dense_ms / columns["median_ms"],
                bars=bars,
                note="whole run, compression included",
                **columns,
            )


# ---------------------------------------------------------------------- (c) ratings


def split_ratings(session: Session, seed: int) -> tuple[Array, Array, Array, Array]:
    """Train pairs and ratings, test pairs and ratings: a random 90/10 split of ml-latest-small."""
    if session.quick:
        g = np.random.default_rng(0)
        row, col = (x.numpy() for x in skewed_entries(50, 40, 600, seed=0))
        pairs, ratings = np.stack([row, col], 1), g.integers(1, 11, 600) / 2
    else:
        table = np.loadtxt(data_file("ml-latest-small", "ratings.csv"), delimiter=",", skiprows=1, usecols=(0, 1, 2))
        pairs, ratings = table[:, :2].astype(np.int64), table[:, 2]
    order = np.random.default_rng(seed).permutation(len(ratings))
    train, test = np.split(order, [len(order) * 9 // 10])
    return pairs[train], ratings[train], pairs[test], ratings[test]


class BiasOnly:
    """``mu + b_i + c_j`` by ten rounds of ridge regression; 10 and 15 are Surprise's documented defaults."""

    def fit(self, pairs: Array, ratings: Array) -> BiasOnly:
        (self.rows, row), (self.cols, col) = (np.unique(x, return_inverse=True) for x in pairs.T)
        self.mean = ratings.mean()
        self.b, self.c = np.zeros(len(self.rows)), np.zeros(len(self.cols))
        for _ in range(10):
            self.c = np.bincount(col, ratings - self.mean - self.b[row]) / (10 + np.bincount(col))
            self.b = np.bincount(row, ratings - self.mean - self.c[col]) / (15 + np.bincount(row))
        return self

    def predict(self, pairs: Array) -> Array:
        def bias(labels: Array, values: Array, wanted: Array) -> Array:
            at = np.searchsorted(labels, wanted).clip(max=len(labels) - 1)
            return np.where(labels[at] == wanted, values[at], 0.0)

        return self.mean + bias(self.rows, self.b, pairs[:, 0]) + bias(self.cols, self.c, pairs[:, 1])


def run_ratings(session: Session) -> None:
    """ml-latest-small, a random tenth held out."""
    from lowrank_kernels import DeepMatrixCompletion

    data = "synthetic" if session.quick else "ml-latest-small"
    for seed in SEEDS[: 1 if session.quick else None]:
        pairs, ratings, test_pairs, test_ratings = split_ratings(session, seed)
        runs = {
            "bias only": lambda pairs=pairs, ratings=ratings: BiasOnly().fit(pairs, ratings),
            OURS: lambda pairs=pairs, ratings=ratings, seed=seed: DeepMatrixCompletion(random_state=seed).fit(pairs, ratings),
        }
        for threads in session.threads:
            session.say(f"training: {data}, seed {seed}, {threads} thread(s)")
            with use_threads(threads):
                timings, models = once_per_round(runs, 1 if session.quick else 5 if seed == 0 else 3)
            baseline = rmse(models["bias only"].predict(test_pairs), test_ratings)
            for contender, model in models.items():
                bars = []
                if contender == OURS and seed == 0 and not session.quick:
                    bars = [Bar("RMSE", 0.870)] + ([Bar("ms", 1500)] if threads == 2 else [])
                value = rmse(model.predict(test_pairs), test_ratings)
                session.record(
                    "training",
                    f"{data}, random 90/10, seed {seed}",
                    contender,
                    threads=threads,
                    metric="RMSE",
                    value=value,
                    bars=bars,
                    note=""
                    if contender == "bias only"
                    else f"bias only {baseline:.4f}; {model.n_steps_} steps, {model.status_.name}",
                    **timings[contender].columns(),
                )


# ---------------------------------------------------------------------- (d) a table with missing cells


def read_sensors(session: Session) -> Array:
    if session.quick:
        g = np.random.default_rng(0)
        table = g.standard_normal((60, 2)) @ g.standard_normal((2, 6)) + 0.1 * g.standard_normal((60, 6))
        table[g.random(table.shape) < 0.1] = np.nan
        return table
    path = data_file("air-quality", "AirQuality.csv")
    table = np.genfromtxt(path, delimiter=",", skip_header=1, usecols=range(2, 15))
    table[table == -200] = np.nan
    return table


def run_sensors(session: Session) -> None:
    """air-quality: a tenth of the observed cells hidden; errors in standard deviations of each column."""
    try:
        from sklearn.experimental import enable_iterative_imputer  # noqa: F401
        from sklearn.impute import IterativeImputer, KNNImputer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise Skipped(f"scikit-learn is not installed: {error}") from error
    from lowrank_kernels import LowRankImputer

    table = read_sensors(session)
    data = "synthetic table" if session.quick else "air-quality"

    def standardized(imputer: Any, x: Array) -> Array:
        steps = make_pipeline(StandardScaler(), imputer)
        return steps[0].inverse_transform(steps.fit_transform(x))

    def raw(imputer: Any, x: Array) -> Array:
        return imputer.fit_transform(x)

    for seed in SEEDS[: 1 if session.quick else None]:
        cells = np.argwhere(~np.isnan(table))
        hidden = cells[np.random.default_rng(seed).permutation(len(cells))[: len(cells) // 10]]
        i, j = hidden.T
        visible = table.copy()
        visible[i, j] = np.nan
        spread = np.nanstd(visible, axis=0)
        runs: dict[str, Callable[[], Array]] = {
            "column means": lambda v=visible: np.where(np.isnan(v), np.nanmean(v, axis=0), v),
            "KNNImputer, standardized": lambda v=visible: standardized(KNNImputer(), v),
            "IterativeImputer, standardized": lambda v=visible, s=seed: standardized(IterativeImputer(random_state=s), v),
            "IterativeImputer, raw columns": lambda v=visible, s=seed: raw(IterativeImputer(random_state=s), v),
            OURS: lambda v=visible, s=seed: raw(LowRankImputer(random_state=s), v),
        }
        for threads in session.threads if seed == 0 else session.threads[-1:]:
            session.say(f"training: {data}, seed {seed}, {threads} thread(s)")
            with use_threads(threads):
                timings, filled = once_per_round(runs, 1)
            errors = {name: rmse(x[i, j] / spread[j], table[i, j] / spread[j]) for name, x in filled.items()}
            best = min((name for name in errors if name != OURS), key=errors.__getitem__)
            for contender in runs:
                session.record(
                    "training",
                    f"{data}, 10 % of the observed cells hidden, seed {seed}",
                    contender,
                    threads=threads,
                    metric="RMSE in column deviations",
                    value=errors[contender],
                    bars=[Bar("RMSE in column deviations", errors[best])] if contender == OURS and not session.quick else [],
                    note=f"the bar is the best other: {best}" if contender == OURS else "",
                    **timings[contender].columns(),
                )


# ---------------------------------------------------------------------- (e) photographs


def read_pictures(session: Session) -> dict[str, Array]:
    if session.quick:
        x = np.linspace(0, 1, 24)
        return {"synthetic": np.outer(np.sin(5 * x) ** 2, x)}
    try:
        from PIL import Image
    except ImportError as error:
        raise Skipped(f"pillow is not installed: {error}") from error
    names = ("camera", "coffee", "chelsea", "brick")
    files = {name: data_file("images-cc0", f"{name}.png") for name in names}
    return {name: np.asarray(Image.open(path).convert("L"), dtype=np.float64) / 255 for name, path in files.items()}


def run_pictures(session: Session) -> None:
    """Grey photographs with 70 % of the pixels removed: PSNR of the whole picture. Interpolation knows that neighbours are
    alike, which no low-rank model does: it is shown because it is what a user would otherwise take."""
    from lowrank_kernels import LowRankImputer

    for name, picture in read_pictures(session).items():
        known = np.random.default_rng(0).random(picture.shape) < 0.3
        damaged = np.where(known, picture, np.nan)

        def interpolate(damaged: Array = damaged, known: Array = known) -> Array:
            try:
                from scipy.interpolate import griddata
            except ImportError as error:
                raise Skipped(f"scipy is not installed: {error}") from error
            grid = np.argwhere(np.ones_like(known))
            flat = griddata(np.argwhere(known), damaged[known], grid, method="linear", fill_value=np.nanmean(damaged))
            return flat.reshape(known.shape)

        runs: dict[str, Callable[[], Array]] = {
            "mean fill": lambda d=damaged: np.where(np.isnan(d), np.nanmean(d), d),
            "linear interpolation (scipy)": interpolate,
            OURS: lambda d=damaged: LowRankImputer(random_state=0).fit_transform(d),
        }
        threads = session.threads[-1]
        session.say(f"training: picture {name}")
        with use_threads(threads):
            timings, restored = once_per_round(runs, 1 if session.quick else 3)
        for contender, result in restored.items():
            psnr = -20 * np.log10(max(rmse(np.clip(result, 0, 1), picture), 1e-12))
            session.record(
                "training",
                f"photograph {name}, {picture.shape[0]} x {picture.shape[1]}, 70 % of the pixels removed",
                contender,
                threads=threads,
                metric="PSNR in dB",
                value=float(psnr),
                **timings[contender].columns(),
            )


PARTS = {
    "step": run_step,
    "figure5": run_figure5,
    "ratings": run_ratings,
    "sensors": run_sensors,
    "pictures": run_pictures,
}

"""Cases and the tolerance rule, shared by the tests and the benches.

The rule: a result may be off by at most twice what plain PyTorch is off in the same dtype, measured against a longer one,
plus a few units in the last place for the tensors where plain PyTorch is exact by luck.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .entries import ObservedEntries

ULPS = 4  # floor of the rule, in units of eps * max |exact|

# ---------------------------------------------------------------------- the tolerance rule


def error_and_limit(got: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest error of ``got`` and the largest one allowed; ``exact`` is float64, ``plain`` has the dtype of ``got``."""
    if exact.numel() == 0:
        return 0.0, 0.0
    scale = float(exact.abs().max())
    plain_error = float((plain.double() - exact).abs().max())
    return float((got.double() - exact).abs().max()), 2 * plain_error + ULPS * torch.finfo(plain.dtype).eps * scale


def check(case: object, got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Raise AssertionError unless every tensor of ``got`` obeys the rule; the message holds the whole case."""
    if got.keys() != exact.keys() or plain.keys() != exact.keys():
        raise AssertionError(f"{case}: results {sorted(got)} and {sorted(plain)}, wanted {sorted(exact)}")
    for name, wanted in exact.items():
        result = got[name]
        if result.shape != wanted.shape or result.dtype != plain[name].dtype:
            raise AssertionError(
                f"{case}: {name} is {tuple(result.shape)} {result.dtype}, wanted {tuple(wanted.shape)} {plain[name].dtype}"
            )
        finite = torch.isfinite(result)
        if not bool(finite.all()):  # a comparison with NaN is False: it would pass for a small error
            raise AssertionError(f"{case}: {name} has {int((~finite).sum())} of {result.numel()} elements that are not finite")
        error, limit = error_and_limit(result, plain[name], wanted)
        if not error <= limit:
            raise AssertionError(
                f"{case}: {name} is off by {error:.3g}, allowed {limit:.3g} (largest element {float(wanted.abs().max()):.3g})"
            )


# ---------------------------------------------------------------------- completion


class CompletionProblem(NamedTuple):
    """The arguments of :func:`lowrank_kernels.ops.completion_loss`."""

    left: Tensor  # (m, k)
    core: Tensor | None  # (L, k, k)
    right: Tensor  # (k, n)
    entries: ObservedEntries
    row_bias: Tensor | None  # (m,)
    col_bias: Tensor | None  # (n,)
    offset: float

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> CompletionProblem:
        def cast(x: Any) -> Any:
            return x.to(dtype=dtype, device=device) if isinstance(x, (Tensor, ObservedEntries)) else x

        return CompletionProblem(*(cast(x) for x in self))

    def factors(self) -> dict[str, Tensor]:
        """What the loss has gradients for, by argument name; those given as None are left out."""
        named = self._asdict()
        names = ("left", "core", "right", "row_bias", "col_bias")
        return {name: named[name] for name in names if named[name] is not None}

    def run(self, function: Callable[..., Tensor], **keywords: Any) -> Tensor:
        """``function(left, core, right, entries, row_bias=, col_bias=, offset=, ...)``."""
        return function(*self[:4], row_bias=self.row_bias, col_bias=self.col_bias, offset=self.offset, **keywords)

    def loss_and_gradients(self, function: Callable[..., Tensor], **keywords: Any) -> dict[str, Tensor]:
        """Loss and gradients by autograd, by name; for :func:`check`."""
        leaves: dict[str, Any] = {name: x.detach().clone().requires_grad_() for name, x in self.factors().items()}
        loss = self._replace(**leaves).run(function, **keywords)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}

    def exact(self) -> dict[str, Tensor]:
        """Loss and gradients by hand-derived formulas in numpy, in float64 or longer; an oracle besides the reference."""
        longer = np.float64 if self.left.dtype == torch.float32 else np.longdouble

        def array(x: Tensor | None) -> Any:
            return None if x is None else x.detach().cpu().numpy().astype(longer)

        row_t, col_t, values_t, weights_t = self.entries.coo()
        row, col = row_t.cpu().numpy(), col_t.cpu().numpy()
        left, right, core = array(self.left), array(self.right).T, array(self.core)
        depth = 0 if core is None else len(core)
        chains: list[Any] = [None]  # chains[l] = core[l-1] ... core[0]
        for number in range(depth):
            chains.append(core[number] if number == 0 else core[number] @ chains[-1])
        p = left if depth == 0 else left @ chains[-1]
        error = (p[row] * right[col]).sum(1) + longer(self.offset) - array(values_t)
        for bias, index in ((self.row_bias, row), (self.col_bias, col)):
            error = error if bias is None else error + array(bias)[index]
        weighted = error if weights_t is None else array(weights_t) * error
        dp, dv = np.zeros_like(p), np.zeros_like(right)
        np.add.at(dp, row, weighted[:, None] * right[col])
        np.add.at(dv, col, weighted[:, None] * p[row])
        results = {"loss": (weighted * error).sum() / 2, "left": dp if depth == 0 else dp @ chains[-1].T, "right": dv.T}
        if core is not None:
            results["core"] = np.zeros_like(core)
            after = left.T @ dp  # (core[L-1] ... core[l+1])^T dC
            for number in range(depth - 1, -1, -1):
                results["core"][number] = after @ chains[number].T if number else after
                after = core[number].T @ after if number else after
        for name, bias, index in (("row_bias", self.row_bias, row), ("col_bias", self.col_bias, col)):
            if bias is not None:
                results[name] = np.zeros(bias.shape[0], dtype=longer)
                np.add.at(results[name], index, weighted)
        return {name: torch.from_numpy(np.array(x, dtype=np.float64)) for name, x in results.items()}


@dataclass(frozen=True)
class CompletionCase:
    """One completion problem: sizes, what it has, and where its entries lie; seeded by its own name."""

    m: int
    n: int
    k: int
    count: int  # Z
    depth: int | None = 3  # L; None: no core
    weights: bool = False
    biases: bool = False
    dtype: torch.dtype = torch.float32
    pattern: str = "uniform"  # or "gaps": every third row and column has no entry; "row", "column": all in one

    def __str__(self) -> str:
        depth = "none" if self.depth is None else str(self.depth)
        extras = "w" * self.weights + "b" * self.biases
        parts = ["f64" if self.dtype == torch.float64 else "f32", f"M{self.m}", f"N{self.n}", f"K{self.k}", f"Z{self.count}"]
        parts += [f"L{depth}"] + [extras] * bool(extras) + [self.pattern] * (self.pattern != "uniform")
        return "-".join(parts)

    def problem(self, device: torch.device | str = "cpu") -> CompletionProblem:
        """The same numbers on every machine; predictions of order 1, values about 3: few errors cancel to nearly nothing."""
        generator = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        row, col = self._cells(generator)
        weights = torch.rand(len(row), generator=generator, dtype=torch.float64) * 2 if self.weights else None
        entries = ObservedEntries.from_coo(row, col, 3 + normal(len(row)), shape=(self.m, self.n), weights=weights)
        k = self.k
        full = CompletionProblem(
            normal(self.m, k),
            None if self.depth is None else normal(self.depth, k, k) / k**0.5,
            normal(k, self.n) / k**0.5,
            entries,
            normal(self.m) if self.biases else None,
            normal(self.n) if self.biases else None,
            0.25 if self.biases else 0.0,
        )
        return full.to(self.dtype, device)

    def _cells(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        row, col = (x.flatten() for x in torch.meshgrid(torch.arange(self.m), torch.arange(self.n), indexing="ij"))
        if self.pattern == "gaps":
            keep = (row % 3 != 0) & (col % 3 != 1)
        elif self.pattern == "row":
            keep = row == self.m // 2
        elif self.pattern == "column":
            keep = col == self.n // 2
        elif self.pattern == "uniform":
            keep = torch.ones_like(row, dtype=torch.bool)
        else:
            raise ValueError(f"CompletionCase: pattern must be 'uniform', 'gaps', 'row' or 'column', got {self.pattern!r}")
        row, col = row[keep], col[keep]
        if len(row) < self.count:
            raise ValueError(f"CompletionCase: {self} has room for {len(row)} entries only")
        chosen = torch.randperm(len(row), generator=generator)[: self.count]  # in no order
        return row[chosen], col[chosen]


def _completion_cases() -> list[CompletionCase]:
    sizes: list[dict[str, Any]] = []
    # Every width of interest: below, at and above the vector widths (4 to 16 numbers) and the 8 vectors kept in registers.
    widths = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100, 127, 130, 256)
    depths = (3, None, 1, 0, 2, 4)
    for number, k in enumerate(widths):
        sizes.append(
            {
                "m": (57, 33, 64, 101)[number % 4],
                "n": (91, 40, 65, 29)[number % 4],
                "k": k,
                "count": (611, 500, 1024, 777)[number % 4],
                "depth": depths[number % 6],
                "weights": number % 2 == 0,
                "biases": number % 3 != 1,
            }
        )
    sizes.append({"m": 9, "n": 11, "k": 1024, "count": 40, "depth": 1, "weights": True, "biases": True})
    # The smallest problems, one row or column, rows and columns without entries, rows of every length modulo 4.
    sizes.append({"m": 1, "n": 1, "k": 1, "count": 1, "depth": None})
    sizes.append({"m": 1, "n": 1, "k": 5, "count": 1, "depth": 3, "weights": True, "biases": True})
    sizes.append({"m": 1, "n": 97, "k": 6, "count": 53, "depth": 2, "biases": True})
    sizes.append({"m": 89, "n": 1, "k": 10, "count": 47, "depth": None, "weights": True})
    sizes.append({"m": 60, "n": 70, "k": 12, "count": 300, "depth": 3, "biases": True, "pattern": "gaps"})
    sizes.append({"m": 60, "n": 70, "k": 24, "count": 70, "depth": 1, "weights": True, "pattern": "row"})
    sizes.append({"m": 60, "n": 70, "k": 40, "count": 59, "depth": 4, "biases": True, "pattern": "column"})
    sizes.append({"m": 13, "n": 17, "k": 4, "count": 221, "depth": 2, "weights": True, "biases": True})  # all observed
    sizes.append({"m": 700, "n": 400, "k": 20, "count": 30000, "depth": 3, "weights": True, "biases": True})  # many units
    cases = [CompletionCase(**size) for size in sizes]
    for size in sizes:  # in float64 the oracle has no BLAS: products of wide cores would take seconds
        depth = 1 if size["k"] >= 64 and size["depth"] else size["depth"]
        cases.append(CompletionCase(**{**size, "depth": depth, "dtype": torch.float64}))
    return cases


COMPLETION_CASES = _completion_cases()


# ---------------------------------------------------------------------- entries as they come in practice


def skewed_entries(m: int, n: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``count`` distinct cells ``(row, col)`` of an ``(m, n)`` matrix in random order, skewed as ratings are.

    Column popularity falls like 1 / (j + 10)^0.9, row activity like 1 / (i + 10)^0.5; both in shuffled order. Cells are drawn
    in bulk through the inverse of the two cumulative sums (2e7 in a few seconds), repeated ones dropped and replaced.
    """
    if not 0 <= count <= m * n:
        raise ValueError(f"skewed_entries: count must be from 0 to m * n = {m * n}, got {count}")
    generator = torch.Generator().manual_seed(seed)
    row_place, col_place = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
    if count > m * n // 8:  # too dense for that: the cells whose exponential clocks ring first (Efraimidis-Spirakis)
        weight = (torch.arange(m) + 10.0)[:, None] ** -0.5 * (torch.arange(n) + 10.0) ** -0.9
        clock = -torch.log1p(-torch.rand(m * n, generator=generator)) / weight.flatten()
        cells = torch.topk(clock, count, largest=False, sorted=False).indices
    else:
        cells = torch.empty(0, dtype=torch.int64)
        while cells.numel() < count:
            missing = count - cells.numel()
            row = _power_law(m, 0.5, missing + missing // 4 + 64, generator)
            col = _power_law(n, 0.9, row.numel(), generator)
            cells = torch.cat([cells, row * n + col])
            cells.numpy().sort()  # twice as fast as torch.unique
            cells = cells[torch.cat([torch.ones(1, dtype=torch.bool), cells[1:] != cells[:-1]])]
    cells = cells[torch.randperm(cells.numel(), generator=generator)[:count]]
    return row_place[cells // n], col_place[cells % n]


def _power_law(size: int, exponent: float, count: int, generator: torch.Generator) -> Tensor:
    """``count`` draws of j in [0, size) with probability about 1 / (j + 10)^exponent, by the integral's inverse."""
    power = 1 - exponent
    low, high = 10.0**power, (size + 10.0) ** power
    draws = torch.rand(count, generator=generator, dtype=torch.float64).mul_(high - low).add_(low).pow_(1 / power).sub_(10)
    return draws.to(torch.int64).clamp_(0, size - 1)

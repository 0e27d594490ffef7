"""The strengths of ``regularization="auto"``, estimated while :mod:`.solver` trains: its docstring has the formulas."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .entries import ObservedEntries
from .ops import completion_loss_and_gradients
from .ops.completion import entry_sums
from .processes import Team
from .row_shards import RowShard

if TYPE_CHECKING:
    from .solver import CompletionModel

DAMPING = 0.5  # weight of the new estimate
PRIOR_PULL = 0.2  # weight of the initial prior variance against the empirical one: without it useful columns are pruned
NOISE_COUNT = 100.0  # pseudo-observations that hold a row's or column's noise weight at 1
TINY = 1e-10


class _Side:
    """Variances and strengths of one side's factor (rows: T, columns: R) and bias."""

    def __init__(
        self, counts: Tensor, factor: Tensor, bias: Tensor, prior: float, noise: float, shard: RowShard | None
    ) -> None:
        self.shard = shard  # of rows that are shared out; None where every process has the whole side
        self.counts = counts.to(factor.dtype)
        self.seen = self.counts > 0
        self.entries = self.total(self.counts)
        self.prior_start = prior
        self.prior = factor.new_full((factor.shape[1],), prior)
        self.variance = torch.full_like(factor, 0.1 * prior)
        self.weight = torch.ones_like(bias)
        self.bias_prior = max(float(self._mean(bias.square())), TINY)
        self.bias_variance = noise / (self.counts + noise / self.bias_prior)
        self.penalty = torch.zeros_like(factor)
        self.bias_penalty = 0.0

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over the rows or columns that have entries."""
        if self.shard is None or self.shard.alone:
            return x[self.seen].mean(0)
        total, count = self.shard.sum(x[self.seen].sum(0), self.seen.sum().to(x.dtype))
        return total / count

    def total(self, x: Tensor) -> Tensor:
        return x.sum() if self.shard is None else self.shard.sum(x.sum())[0]

    def excess(self, squares: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
        """Expected squared error of each row from the uncertainty of both factors."""
        return (squares * a2 + self.variance * (a1 + a2)).sum(1)

    def update(self, squares: Tensor, a1: Tensor, a2: Tensor, total: Tensor, bias: Tensor, noise: float) -> None:
        self.variance = noise / (noise / self.prior + a1 + a2)
        empirical = self._mean(squares + self.variance)
        wanted = (1 - PRIOR_PULL) * empirical + PRIOR_PULL * self.prior_start
        self.prior = (1 - DAMPING) * self.prior + DAMPING * wanted
        self.penalty = noise / self.prior + a2
        self.bias_variance = noise / (total + noise / self.bias_prior)
        self.bias_prior = max(float(self._mean(bias.square() + self.bias_variance)), TINY)
        self.bias_penalty = noise / self.bias_prior


class Variational:
    """The strengths of ``regularization="auto"`` (module docstring)."""

    def __init__(
        self, model: CompletionModel, entries: ObservedEntries, noise_weights: bool, shard: RowShard | None = None
    ) -> None:
        k = model.columns.shape[1]
        self.shard = shard = shard or RowShard.of(Team(), entries.shape[0])
        count = sum(shard.team.meet(len(entries)))
        residual = 2 * float(shard.sum(loss_at_zero(model, entries))[0]) / count
        prior = max(math.sqrt(3.0 * max(residual, TINY) / k), 1e-4)
        self.noise = max(0.5 * residual, TINY)
        self.noise_weights = noise_weights
        (col_counts,) = shard.sum(entries.col_counts())
        self.rows = _Side(entries.row_counts(), model.left, model.row_bias, prior, self.noise, shard)
        self.cols = _Side(col_counts, model.columns, model.col_bias, prior, self.noise, None)
        self.given = (entries.by_row.weights, entries.by_col.weights)
        weights = [torch.ones_like(entries.values) if w is None else w.clone() for w in self.given]
        self.entries = ObservedEntries(
            entries.shape, entries.by_row._replace(weights=weights[0]), entries.by_col._replace(weights=weights[1])
        )

    def update(self, t: Tensor, r: Tensor, model: CompletionModel, row_loss: Tensor, col_loss: Tensor) -> None:
        rows, cols, entries = self.rows, self.cols, self.entries
        t2, r2, k = t.square(), r.square(), t.shape[1]
        a, row_total = entry_sums(entries, torch.cat([r2, cols.variance], 1), by="row")  # sum_j w_ij (R_j^2 | s_j)
        b, col_total = entry_sums(entries, torch.cat([t2, rows.variance], 1), by="col")
        row_excess = rows.excess(t2, a[:, :k], a[:, k:])
        spread = (row_loss + row_excess).sum() + (row_total * rows.bias_variance).sum()
        b, col_total, col_loss, spread, weight = self.shard.sum(b, col_total, col_loss, spread, row_total.sum())
        col_excess = cols.excess(r2, b[:, :k], b[:, k:])
        spread = spread + (col_total * cols.bias_variance).sum()
        self.noise = max((1 - DAMPING) * self.noise + DAMPING * float(spread / weight), TINY)
        if self.noise_weights:
            # The sums carry the old weight of their own row: divided out for the estimate, the new one multiplied in.
            for side, loss, excess in ((rows, row_loss, row_excess), (cols, col_loss, col_excess)):
                wanted = (NOISE_COUNT + side.counts) / (NOISE_COUNT + (loss + excess) / side.weight / self.noise)
                wanted *= side.entries / side.total(side.counts * wanted)  # mean 1 over the entries: noise stays the level
                change = wanted / side.weight
                side.weight = wanted
                sums, total = (a, row_total) if side is rows else (b, col_total)
                sums *= change[:, None]
                total *= change
            self._weigh()
        rows.update(t2, a[:, :k], a[:, k:], row_total, model.row_bias, self.noise)
        cols.update(r2, b[:, :k], b[:, k:], col_total, model.col_bias, self.noise)

    def scalars(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors of :func:`_state`."""
        sides = {"rows": self.rows, "cols": self.cols}
        return {"noise": self.noise, **{name: [side.bias_prior, side.bias_penalty] for name, side in sides.items()}}

    def restore(self, scalars: dict[str, Any]) -> None:
        self.noise = scalars["noise"]
        for name, side in (("rows", self.rows), ("cols", self.cols)):
            side.bias_prior, side.bias_penalty = scalars[name]
        if self.noise_weights:
            self._weigh()

    def _weigh(self) -> None:
        sides = ((self.entries.by_row, self.rows, self.cols), (self.entries.by_col, self.cols, self.rows))
        for (side, own, other), given in zip(sides, self.given, strict=True):
            assert side.weights is not None
            weights = torch.repeat_interleave(own.weight, side.offsets.diff(), output_size=side.weights.shape[0])
            weights *= other.weight.index_select(0, side.indices)
            side.weights.copy_(weights if given is None else weights * given)


def loss_at_zero(model: CompletionModel, entries: ObservedEntries) -> Tensor:
    left, right = torch.zeros_like(model.left[:, :1]), torch.zeros_like(model.columns[:, :1]).t()
    return completion_loss_and_gradients(
        left, None, right, entries, row_bias=model.row_bias, col_bias=model.col_bias, wanted=()
    )[0]

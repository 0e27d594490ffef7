"""A matrix whose rows are shared out over processes: which rows are here, and the algebra that needs all of them.

The processes hold consecutive blocks of rows in the order of their ranks, of any sizes, 0 included. What one process would
compute on the whole matrix comes out the same on every number of processes, up to the order of the sums; random numbers are
the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .processes import Team

DRAWN = 1 << 20  # random numbers drawn at a time; a multiple of 16, torch's unit: the numbers do not depend on the blocks


@dataclass(frozen=True)
class RowShard:
    """Rows ``[start, start + count)`` of ``total`` are here; the team holds the others."""

    team: Team
    start: int
    count: int
    total: int

    @classmethod
    def of(cls, team: Team, count: int) -> RowShard:
        """The shard of a process that holds ``count`` rows."""
        counts = team.meet(count)
        return cls(team, sum(counts[: team.rank]), count, sum(counts))

    @property
    def alone(self) -> bool:
        return self.team.size == 1

    def sum(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The sums over the processes of tensors of one dtype, in one exchange."""
        if self.alone:
            return tensors
        flat = self.team.sum(torch.cat([x.reshape(-1) for x in tensors]))
        parts = flat.split([x.numel() for x in tensors])
        return tuple(part.view(x.shape) for part, x in zip(parts, tensors, strict=True))

    def normal(self, columns: int, generator: torch.Generator | None) -> Tensor:
        """These rows of ``torch.randn(total, columns, dtype=float64)``; without a generator, of the default one."""
        if self.alone:
            return torch.randn(self.total, columns, generator=generator, dtype=torch.float64, device="cpu")
        return self._drawn(torch.Tensor.normal_, torch.float64, self.total, self.start, self.count, columns, generator)

    def uniform(self, start: int, count: int, total: int, generator: torch.Generator | None) -> Tensor:
        """Numbers ``[start, start + count)`` of ``torch.rand(total)``: one for each entry of these rows."""
        if self.alone:
            return torch.rand(total, generator=generator, dtype=torch.float32, device="cpu")
        return self._drawn(torch.Tensor.uniform_, torch.float32, total, start, count, 1, generator)[:, 0]

    @staticmethod
    def _drawn(
        fill: object,
        dtype: torch.dtype,
        total: int,
        start: int,
        count: int,
        columns: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The whole matrix is drawn, as one process would, a block at a time; the rows of others are dropped."""
        own, block = torch.empty(count, columns, dtype=dtype, device="cpu"), max(16, DRAWN // columns // 16 * 16)
        edges = [*range(0, max(total - block, 0), block), total]  # the last block is never short: torch draws those otherwise
        edges = edges if edges[0] == 0 else [0, *edges]
        for begin, end in pairwise(edges):
            numbers = torch.empty(end - begin, columns, dtype=dtype, device="cpu")
            fill(numbers, generator=generator)  # type: ignore[operator]
            low, high = max(begin, start), min(end, start + count)
            if low < high:
                own[low - start : high - start] = numbers[low - begin : high - begin]
        return own

    def qr(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(q, r)`` of the thin QR of the whole matrix, q by its rows here; on one process torch's.

        Each process factors its rows, and the stack of the small triangles is factored by all alike: backward stable, one
        exchange of ``size * s * s`` numbers.
        """
        if self.alone:
            factors = torch.linalg.qr(x)
            return factors.Q, factors.R
        s = x.shape[1]
        own_q, own_r = torch.linalg.qr(x)
        triangles = x.new_zeros(self.team.size, s, s)
        triangles[self.team.rank, : own_r.shape[0]] = own_r
        (triangles,) = self.sum(triangles)
        stacked_q, r = torch.linalg.qr(triangles.view(-1, s))
        block = stacked_q.view(self.team.size, s, s)[self.team.rank]
        return own_q @ block[: own_r.shape[0]], r

    def orthonormal(self, x: Tensor) -> Tensor:
        """Q of the thin QR with a positive diagonal of R, by its rows here."""
        q, r = self.qr(x)
        return q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q.dtype)

    def largest(self, x: Tensor) -> Tensor:
        """The entry of largest magnitude of every column of the whole matrix, the first of equals."""
        own = x.gather(0, x.abs().argmax(0, keepdim=True))[0] if self.count else x.new_zeros(x.shape[1])
        if self.alone:
            return own
        peaks = x.new_zeros(self.team.size, x.shape[1])
        peaks[self.team.rank] = own
        (peaks,) = self.sum(peaks)
        return peaks.gather(0, peaks.abs().argmax(0, keepdim=True))[0]

"""Full-size weights trained with low-rank memory: gradient descent in GaLore's and in ReLoRA's way.

    GaLore   W <- W - eta P P^T G(W)                     P: top-r left singular vectors of G(W), anew every so many steps
    ReLoRA   W + B A,  A <- A - eta B^T G(W + B A),  B <- B - eta G(W + B A) A^T;  every so many steps W <- W + B A

With gradient initialization (B = P, A = 0 at every restart) a ReLoRA that trains A alone is GaLore, step for step. One that
trains both factors is not, unless it restarts at every step: B has no gradient in the first step after a restart, where A = 0,
but moves in the second, by eta G A^T with A of order eta, and the products part by terms of order eta^3.

Source: the equivalence is stated as Theorem 4 of an overview of low-rank training, arXiv:2503.19859, whose equations were not
at hand; GaLore is arXiv:2403.03507, ReLoRA arXiv:2307.05695.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]


def _check(function: str, weight: Tensor, rank: int, learning_rate: float, every: int) -> None:
    if weight.ndim != 2:
        raise ValueError(f"{function}: weight must be a matrix (m, n), got shape {tuple(weight.shape)}")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"{function}: rank must be from 1 to min(m, n) = {min(weight.shape)}, got {rank}")
    if not learning_rate > 0:
        raise ValueError(f"{function}: learning_rate must be positive, got {learning_rate}")
    if every < 1:
        raise ValueError(f"{function}: every must be at least 1, got {every}")


def _directions(gradient: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(gradient, full_matrices=False).U[:, :rank]


@torch.no_grad()
def galore_descent(gradient: Gradient, weight: Tensor, *, rank: int, learning_rate: float, every: int) -> Iterator[Tensor]:
    r"""Descent on the projected gradient, :math:`W \leftarrow W - \eta P P^T G(W)`; yields W after every step, for ever.

    Args:
        gradient: G, ``(m, n) -> (m, n)``.
        weight: ``(m, n)``, where to start; it is not changed.
        rank: columns of P, the top left singular vectors of the gradient.
        learning_rate: eta.
        every: steps between two choices of P.

    Raises:
        ValueError: a weight that is no matrix, a rank, rate or period out of range.

    Example:
        >>> import itertools, torch
        >>> from lowrank_kernels.factorization import galore_descent
        >>> target = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> steps = galore_descent(lambda w: w - target, torch.zeros(3, 3), rank=1, learning_rate=1.0, every=1)
        >>> [int(torch.linalg.matrix_rank(w)) for w in itertools.islice(steps, 3)]  # one direction a step
        [1, 2, 3]
    """
    _check("galore_descent", weight, rank, learning_rate, every)
    step, w = 0, weight.clone()
    p = w.new_empty(0, 0)
    while True:
        g = gradient(w)
        if step % every == 0:
            p = _directions(g, rank)
        w = w - learning_rate * p @ (p.t() @ g)
        step += 1
        yield w


@torch.no_grad()
def relora_descent(
    gradient: Gradient, weight: Tensor, *, rank: int, learning_rate: float, every: int, both: bool = True
) -> Iterator[Tensor]:
    r"""Gradient descent on restarted low-rank factors, :math:`W + B A`; yields the sum after every step, for ever.

    Args:
        gradient: G, ``(m, n) -> (m, n)``.
        weight: ``(m, n)``, where to start; it is not changed.
        rank: inner width; B starts as the top left singular vectors of the gradient, A at zero.
        learning_rate: eta of both factors.
        every: steps between two restarts.
        both: train B too. Without, this is :func:`galore_descent` step for step.

    Raises:
        ValueError: a weight that is no matrix, a rank, rate or period out of range.

    Example:
        >>> import itertools, torch
        >>> from lowrank_kernels.factorization import galore_descent, relora_descent
        >>> target = torch.arange(12.0).view(3, 4)
        >>> options = {"rank": 1, "learning_rate": 0.1, "every": 5}
        >>> runs = (galore_descent, lambda *a, **o: relora_descent(*a, both=False, **o))
        >>> ends = [next(itertools.islice(run(lambda w: w - target, torch.zeros(3, 4), **options), 19, None)) for run in runs]
        >>> torch.allclose(*ends)
        True
    """
    _check("relora_descent", weight, rank, learning_rate, every)
    step, base = 0, weight.clone()
    b, a = base.new_zeros(base.shape[0], rank), base.new_zeros(rank, base.shape[1])
    while True:
        g = gradient(base + b @ a)
        if step % every == 0:
            base = base + b @ a
            b, a = _directions(g, rank), torch.zeros_like(a)
        b, a = (b - learning_rate * g @ a.t() if both else b), a - learning_rate * b.t() @ g
        step += 1
        yield base + b @ a

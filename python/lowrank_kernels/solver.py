"""Training of compressed deep factorizations on observed entries: the paper's gradient descent, and a production solver.

Both take gradients from the completion op without autograd and update in place; neither allocates anything of size
entries x rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from .compression import CompressedFactors
from .entries import ObservedEntries
from .ops import completion_loss_and_gradients


class Status(Enum):
    """How a solver ended; ``message`` says what to do next."""

    CONVERGED = "converged: nothing to do"
    MAX_STEPS = "stopped at max_steps while still improving: raise max_steps, or continue from here with warm_start=True"
    DIVERGED = "the loss became infinite or NaN; the last finite factors were kept: lower the learning rate"
    INTERRUPTED = "interrupted: the best factors so far were kept; continue from here with warm_start=True"

    @property
    def message(self) -> str:
        return self.value


@dataclass
class SolverResult:
    """Factors, how the solver ended, and one record a check: ``step``, ``loss``, ``seconds``."""

    factors: CompressedFactors
    status: Status
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)


def gradient_descent(
    factors: CompressedFactors,
    entries: ObservedEntries,
    *,
    learning_rate: float,
    gamma: float = 1e-2,
    max_steps: int = 100_000,
    tol: float = 0.0,
    mean_over: int | None = None,
    check_every: int = 100,
    callback: Callable[[int, float, CompressedFactors], None] | None = None,
) -> SolverResult:
    r"""Gradient descent with discrepant rates, as the paper trains its compressed completion model.

    .. math::
        C_l \leftarrow C_l - \eta \nabla_{C_l} \ell, \qquad
        U \leftarrow U - \gamma \eta \nabla_U \ell, \qquad V \leftarrow V - \gamma \eta \nabla_V \ell

    all at once, with :math:`\ell = \tfrac12 \sum_\Omega E_{ij}^2`, divided by ``mean_over`` where given.

    Args:
        factors: the start, see :func:`lowrank_kernels.compress`; not changed.
        entries: observed entries, float32 or float64 like the factors.
        learning_rate: eta. Stable below about ``1.5 / (p L s_1^(2 - 2/L))`` for the sum loss, with p the observed share,
            L the depth and s_1 the target's largest singular value.
        gamma: rate of the outer factors over the cores' rate; 0 freezes them bit for bit, 1e-2 to 3e-2 is safe.
        max_steps: steps at most.
        tol: ends as CONVERGED when the (mean) loss at a check is at most this.
        mean_over: divisor of the loss and the gradients, such as ``m * n`` for the paper's mean loss.
        check_every: steps between checks of the loss (each is a host synchronization on a GPU).
        callback: called as ``callback(step, loss, factors)`` at every check.

    Returns:
        A :class:`SolverResult`. A non-finite loss ends as DIVERGED with the factors of the last finite check.

    Raises:
        ValueError: a learning rate that is not positive, a negative gamma, shapes that do not chain.

    Note: deterministic; the same result for any number of threads.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> g = torch.Generator().manual_seed(0)
        >>> target = torch.outer(torch.randn(40, generator=g), torch.randn(30, generator=g))
        >>> entries = lrk.ObservedEntries.from_dense(target, torch.rand(40, 30, generator=g) < 0.5)
        >>> start = lrk.compress(lrk.masked_gradient(entries), rank=2, init_scale=0.1, generator=g)
        >>> result = lrk.solver.gradient_descent(start, entries, learning_rate=0.005, max_steps=2000, tol=1e-8)
        >>> result.status.name
        'CONVERGED'

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, equation (11) and Figure 5.
    """
    if not learning_rate > 0:
        raise ValueError(f"gradient_descent: learning_rate must be positive, got {learning_rate}")
    if gamma < 0:
        raise ValueError(f"gradient_descent: gamma must not be negative, got {gamma}")
    rate = learning_rate / (mean_over or 1)
    left, core = factors.left.clone(), factors.core.clone()
    columns = factors.right.t().contiguous().clone()  # (n, k): the layout the kernel gathers
    last_finite = CompressedFactors(left.clone(), core.clone(), columns.clone().t())
    history: list[dict[str, float]] = []
    status, step, start = Status.MAX_STEPS, 0, time.perf_counter()
    try:
        while True:
            loss, grads = completion_loss_and_gradients(left, core, columns.t(), entries)
            if step % check_every == 0 or step == max_steps:
                value = float(loss) / (mean_over or 1)
                history.append({"step": step, "loss": value, "seconds": time.perf_counter() - start})
                if not torch.isfinite(torch.tensor(value)):
                    return SolverResult(last_finite, Status.DIVERGED, step, history)
                last_finite = CompressedFactors(left.clone(), core.clone(), columns.clone().t())
                if callback is not None:
                    callback(step, value, last_finite)
                if value <= tol:
                    status = Status.CONVERGED
                    break
            if step == max_steps:
                break
            _descend(core, grads.core, rate)
            if gamma > 0:
                _descend(left, grads.left, gamma * rate)
                _descend(columns, None if grads.right is None else grads.right.t(), gamma * rate)
            step += 1
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    return SolverResult(CompressedFactors(left, core, columns.t()), status, step, history)


def _descend(parameter: Tensor, grad: Tensor | None, rate: float) -> None:
    assert grad is not None
    parameter.add_(grad, alpha=-rate)

"""Training of compressed deep factorizations on observed entries: the paper's gradient descent, and a production solver.

Both take gradients from the completion op without autograd and update in place; neither allocates anything of size
entries x rank.

The production solver (:func:`train`) is Adam with a cosine step size on

    l = 1/2 sum w_ij E_ij^2 + 1/2 sum lambda^T_ia T_ia^2 + 1/2 sum lambda^R_ja R_ja^2 + biases,     T = left C, R = right^T

The penalty is on ``T``, not on ``left``: on ``left`` alone the cores would grow and escape it. Its strengths are constants
plus a term per observation, or follow from the data (``regularization="auto"``): the posterior variances ``s`` of a
mean-field Gaussian approximation have closed forms, ``s^T_ia = sigma^2 / (sigma^2 / v_a + sum_j w_ij (R_ja^2 + s^R_ja))``,
and the strength that minimises the expected squared error is ``lambda^T_ia = sigma^2 / v_a + sum_j w_ij s^R_ja``; prior
variances ``v_a`` and the noise ``sigma^2`` are re-estimated every ten steps, and so are noise weights
``w_ij = w_i w_j`` of the rows and columns. Nothing has to be held out to set them.

With a :class:`~.row_shards.RowShard` the rows are shared out over processes: left factors, row biases, their moments and
variances are those of the rows that are here, everything else is the same in all. A step sums one buffer over the processes:
the gradients of the right factors, column biases and the cores' product, and the loss, ``n k + n + k^2 + 1`` numbers; a
re-estimation ``n (2 k + 2) + k + 6`` more. Neither depends on the numbers of rows and of entries.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from .compression import CompressedFactors, compress, masked_gradient, top_singular_vectors
from .entries import ObservedEntries, SortedEntries
from .ops import completion_loss_and_gradients
from .ops.completion import completion_sides
from .processes import ProcessLost, Team
from .reference.core import core_gradients, core_product
from .row_shards import RowShard
from .strengths import TINY, Variational, loss_at_zero


class Status(Enum):
    """How a solver ended; ``message`` says what to do next."""

    CONVERGED = "converged: nothing to do"
    EARLY_STOPPED = "the validation error stopped improving; the best factors were kept: nothing to do"
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
        A :class:`SolverResult`. A non-finite loss (DIVERGED) and Ctrl-C (INTERRUPTED, also from the callback) end with the
        factors of the last finite check.

    Raises:
        ValueError: a learning rate that is not positive and finite, a negative gamma, fewer than 0 steps, checks that are
            less than 1 step apart, a divisor that is not positive, shapes that do not chain.

    Note: deterministic; the same result for any number of threads.

    Example:
        >>> import torch, lowrank_kernels as lrk
        >>> g = torch.Generator().manual_seed(0)
        >>> target = torch.outer(torch.randn(40, generator=g), torch.randn(30, generator=g))
        >>> entries = lrk.ObservedEntries.from_dense(target, torch.rand(40, 30, generator=g) < 0.5)
        >>> start = lrk.compress(lrk.masked_gradient(entries), rank=2, init_scale=0.1, generator=g)
        >>> result = lrk.solver.gradient_descent(start, entries, learning_rate=0.005, max_steps=2000, tol=1e-6)
        >>> result.status.name
        'CONVERGED'

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, equation (11) and Figure 5.
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"gradient_descent: learning_rate must be positive and finite, got {learning_rate}")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gradient_descent: gamma must be finite and not negative, got {gamma}")
    if max_steps < 0:
        raise ValueError(f"gradient_descent: max_steps must be at least 0, got {max_steps}")
    if check_every < 1:
        raise ValueError(f"gradient_descent: check_every must be at least 1, got {check_every}")
    if mean_over is not None and not mean_over > 0:
        raise ValueError(f"gradient_descent: mean_over must be positive or None, got {mean_over}")
    divisor = 1 if mean_over is None else mean_over
    rate = learning_rate / divisor
    left, core = factors.left.detach().clone(), factors.core.detach().clone()
    columns = factors.right.detach().t().contiguous().clone()  # (n, k): the layout the kernel gathers
    last_finite = CompressedFactors(left.clone(), core.clone(), columns.clone().t())
    history: list[dict[str, float]] = []
    status, step, start = Status.MAX_STEPS, 0, time.perf_counter()
    try:
        while True:
            loss, grads = completion_loss_and_gradients(left, core, columns.t(), entries)
            if step % check_every == 0 or step == max_steps:
                value = float(loss) / divisor
                history.append({"step": step, "loss": value, "seconds": time.perf_counter() - start})
                if not math.isfinite(value):
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
    except KeyboardInterrupt:  # a step may have changed half of the factors
        return SolverResult(last_finite, Status.INTERRUPTED, step, history)
    return SolverResult(CompressedFactors(left, core, columns.t()), status, step, history)


def _descend(parameter: Tensor, grad: Tensor | None, rate: float) -> None:
    assert grad is not None
    parameter.add_(grad, alpha=-rate)


# ---------------------------------------------------------------------- the production solver

UPDATE_EVERY = 10  # steps between re-estimations of variances and noise: each costs about two steps


@dataclass
class CompletionModel:
    """``left core[L-1] ... core[0] right + b_i + c_j``: what :func:`train` changes in place."""

    left: Tensor  # (m, k)
    core: Tensor  # (L, k, k)
    columns: Tensor  # (n, k): right^T, the layout the kernel gathers
    row_bias: Tensor  # (m,)
    col_bias: Tensor  # (n,)

    def clone(self) -> CompletionModel:
        return CompletionModel(*(getattr(self, name).clone() for name in self.__dataclass_fields__))

    def copy_(self, other: CompletionModel) -> None:
        for name in self.__dataclass_fields__:
            getattr(self, name).copy_(getattr(other, name))

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(getattr(self, name)).all()) for name in self.__dataclass_fields__)

    def effective_left(self) -> Tensor:
        """``T = left @ core[L-1] ... core[0]`` (m, k)."""
        product = core_product(self.core)
        return self.left if product is None else self.left @ product


@dataclass
class TrainOptions:
    """Options of :func:`train`; the defaults were chosen on validation splits of MovieLens and on synthetic matrices."""

    max_steps: int = 300
    learning_rate: float = 0.03  # Adam's, for the outer factors, whose entries start at 0.1
    core_rate: float = 0.5  # times learning_rate
    bias_rate: float = 0.02
    regularization: str | tuple[tuple[float, float], tuple[float, float]] = "auto"  # or ((const, per entry) rows, columns)
    noise_weights: bool = True  # with "auto": estimate the noise of every row and column
    row_bias: bool = True
    col_bias: bool = True
    patience: int = 5  # checks (every UPDATE_EVERY steps) without a better validation error; validation only
    warm: bool = False  # continue from trained factors: a third of the step size


@dataclass
class TrainResult:
    status: Status
    steps: int
    history: list[dict[str, float]]


def damped_biases(
    entries: ObservedEntries,
    *,
    rows: bool = True,
    columns: bool = True,
    damping: tuple[float, float] = (5.0, 3.0),
    rounds: int = 10,
    shard: RowShard | None = None,
) -> tuple[Tensor, Tensor]:
    """``b_i`` (m,) and ``c_j`` (n,) of the additive model by alternating damped means of the residuals."""
    m, n = entries.shape
    row_bias, col_bias = entries.values.new_zeros(m), entries.values.new_zeros(n)
    zero_left, zero_right = entries.values.new_zeros(m, 1), entries.values.new_zeros(1, n)

    def weight(side: SortedEntries) -> Tensor:
        return (side.offsets.diff() if side.weights is None else _segment_sum(side.weights, side.offsets)).to(entries.dtype)

    def half(bias: Tensor, sums: Tensor | None, weight: Tensor, damp: float) -> Tensor:
        assert sums is not None
        return (bias * weight - sums) / (weight + damp).clamp(min=TINY)

    def sums(side: str) -> Tensor | None:
        biases = {"row_bias": row_bias, "col_bias": col_bias}
        grads = completion_loss_and_gradients(zero_left, None, zero_right, entries, wanted=(side,), **biases)[1]  # type: ignore[arg-type]
        return grads.col_bias if side == "col_bias" else grads.row_bias

    shard = shard or RowShard.of(Team(), entries.shape[0])
    row_weight, (col_weight,) = weight(entries.by_row), shard.sum(weight(entries.by_col))
    for _ in range(rounds):
        if columns:
            own = sums("col_bias")
            assert own is not None
            col_bias = half(col_bias, shard.sum(own)[0], col_weight, damping[1])
        if rows:
            row_bias = half(row_bias, sums("row_bias"), row_weight, damping[0])
    return row_bias, col_bias


def _segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    total = torch.zeros(values.shape[0] + 1, dtype=torch.float64, device=values.device)
    torch.cumsum(values, 0, dtype=torch.float64, out=total[1:])
    return total[offsets].diff().to(values.dtype)


def start(
    entries: ObservedEntries,
    rank: int,
    *,
    depth: int = 3,
    init_scale: float = 0.7,
    frame_scale: float = 0.1,
    row_bias: bool = True,
    col_bias: bool = True,
    generator: torch.Generator | None = None,
    shard: RowShard | None = None,
) -> CompletionModel:
    """Biases by damped means, then the compressed factors of the residual: frames with entries of about ``frame_scale``.

    ``entries`` are expected with zero mean and unit variance. ``init_scale`` and ``frame_scale`` are far above the paper's:
    its plateau costs thousands of steps. Rows and columns without entries start (and stay) at zero. With a ``shard``, the
    processes start as one would on all rows, up to the order of the sums.
    """
    shard = shard or RowShard.of(Team(), entries.shape[0])
    m, n = shard.total, entries.shape[1]
    row, col = damped_biases(entries, rows=row_bias, columns=col_bias, shard=shard)
    gradient = masked_gradient(entries, row_bias=row, col_bias=col, rows=shard)
    if rank < 2:  # a single row or column: the biases say everything
        core = init_scale * torch.eye(2, dtype=row.dtype, device=row.device).repeat(depth, 1, 1)
        return CompletionModel(row.new_zeros(len(row), 2), core, row.new_zeros(n, 2), row, col)
    factors = compress(gradient, rank, depth=depth, init_scale=init_scale, generator=generator, dtype=entries.dtype)
    left = factors.left * (frame_scale * math.sqrt(m)) * (entries.row_counts() > 0)[:, None]
    (col_counts,) = shard.sum(entries.col_counts())
    columns = factors.right.t().contiguous() * (frame_scale * math.sqrt(n)) * (col_counts > 0)[:, None]
    columns = shard.team.first(columns)  # bit for bit the same on processors that round differently
    model = CompletionModel(left, factors.core, columns, row, col)
    if float(shard.sum(loss_at_zero(model, entries))[0]) == 0:  # constant values: only noise would be learnt
        model.left.zero_()
    return model


def spectral_start(
    entries: ObservedEntries, rank: int, *, depth: int = 3, generator: torch.Generator | None = None
) -> CompletionModel:
    """Column means, then the top ``rank`` singular directions of the residual, at their own size; cores ``I``.

    For dense tables with few columns, where the whole spectrum matters: with D the masked residual, observed at a rate p_j,
    ``left = sqrt(m) U`` has unit variance and ``columns = V S / sqrt(m p_j)``.
    """
    m = entries.shape[0]
    row, col = damped_biases(entries, rows=False, damping=(0.0, 0.0), rounds=1)
    u, s, v = top_singular_vectors(masked_gradient(entries, row_bias=row, col_bias=col), rank, generator=generator)
    rate = (entries.col_counts() / m).clamp(min=1 / m)
    core = torch.eye(rank, dtype=row.dtype, device=row.device).repeat(depth, 1, 1)
    left, columns = -u * math.sqrt(m), v * s / (m * rate.to(v.dtype)[:, None]).sqrt()
    return CompletionModel(left.to(row.dtype).contiguous(), core, columns.to(row.dtype).contiguous(), row, col)


class _Adam:
    """Adam (beta 0.9 and 0.99, epsilon 1e-8), a rate a tensor; torch.optim would import the compiler: 1.5 s at first use.

    On a CPU torch's fused kernel: one pass over memory for what takes eight otherwise, which counts where factors do not fit
    in the cache.
    """

    def __init__(self, parameters: list[Tensor], rates: list[float]) -> None:
        self.parameters, self.rates, self.steps = parameters, rates, 0
        self.first = [torch.zeros_like(x) for x in parameters]
        self.second = [torch.zeros_like(x) for x in parameters]
        self.fused = parameters[0].device.type == "cpu" and hasattr(torch, "_fused_adam_")
        self.root = [torch.empty_like(x) for x in ([] if self.fused else parameters)]

    def step(self, grads: list[Tensor | None], decay: float) -> None:
        self.steps += 1
        for place, (x, g, rate) in enumerate(zip(self.parameters, grads, self.rates, strict=True)):
            if g is not None and rate != 0:
                (self._fused if self.fused else self._plain)(place, x, g, rate * decay)

    def _fused(self, place: int, x: Tensor, g: Tensor, rate: float) -> None:
        m, v, step = (
            self.first[place],
            self.second[place],
            torch.tensor(float(self.steps), dtype=torch.float32, device=x.device),
        )
        torch._fused_adam_(
            [x],
            [g.contiguous()],
            [m],
            [v],
            [],
            [step],
            lr=rate,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    def _plain(self, place: int, x: Tensor, g: Tensor, rate: float) -> None:
        first_bias, second_bias = 1 - 0.9**self.steps, math.sqrt(1 - 0.99**self.steps)
        m, v, root = self.first[place], self.second[place], self.root[place]
        m.lerp_(g, 0.1)
        v.mul_(0.99).addcmul_(g, g, value=0.01)
        torch.sqrt(v, out=root).add_(1e-8 * second_bias)
        x.addcdiv_(m, root, value=-rate * second_bias / first_bias)


class Checkpoint(Protocol):
    """Where :func:`train` keeps its state: :class:`lowrank_kernels.checkpoints.Checkpoints`."""

    every: int

    def load(self, rows: dict[str, Tensor], shared: dict[str, Tensor]) -> dict[str, Any] | None: ...

    def save(self, step: int, rows: dict[str, Tensor], shared: dict[str, Tensor], scalars: dict[str, Any]) -> None: ...


def _state(
    model: CompletionModel, best: CompletionModel | None, optimizer: _Adam, automatic: Variational | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that a step changes, by name: those with a row for every row of the matrix, and the others."""
    rows: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for title, each in (("model", model), ("best", best)):
        if each is not None:
            rows |= {f"{title}.left": each.left, f"{title}.row_bias": each.row_bias}
            shared |= {f"{title}.{name}": getattr(each, name) for name in ("core", "columns", "col_bias")}
    for place, name in enumerate(CompletionModel.__dataclass_fields__):
        kind = rows if name in ("left", "row_bias") else shared
        kind |= {f"first.{name}": optimizer.first[place], f"second.{name}": optimizer.second[place]}
    if automatic is not None:
        for kind, title, side in ((rows, "rows", automatic.rows), (shared, "cols", automatic.cols)):
            kind |= {f"{title}.{name}": getattr(side, name) for name in ("variance", "weight", "bias_variance", "penalty")}
            shared[f"{title}.prior"] = side.prior
    return rows, shared


@torch.no_grad()
def train(
    model: CompletionModel,
    entries: ObservedEntries,
    options: TrainOptions | None = None,
    *,
    validation: ObservedEntries | None = None,
    callback: Callable[[int, dict[str, float]], None] | None = None,
    shard: RowShard | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainResult:
    """Train ``model`` in place on ``entries`` (zero mean, unit variance), see the module docstring.

    Args:
        model: the start, see :func:`start`; it ends as the last factors, or as the best on ``validation``.
        entries: what is fitted; its weights, where there are any, multiply the noise weights.
        validation: held-out entries of the same shape: training stops when their error has not improved for
            ``options.patience`` checks, and the best model is kept.
        callback: called as ``callback(step, record)`` every ten steps; a KeyboardInterrupt raised in it, or by the user,
            ends the training with the best (or last) model.
        shard: which rows are here, where they are shared out over processes: ``entries``, ``validation`` and ``model`` are
            those of these rows, and every process of the team calls this.
        checkpoint: keeps the state every so many steps; where it has one already, training goes on from there.

    Returns:
        Status, steps made and the history: ``step, loss, train_rmse, validation_rmse, seconds`` a check; errors are in the
        units of ``entries``, the training error with the entries' weights.

    Raises:
        ProcessLost: another process of the team ended; what the checkpoint has is kept.

    Note: deterministic; the same result for any number of threads, and up to the order of the sums of processes. Ctrl-C is
    an error where there are several.
    """
    options = options or TrainOptions()
    shard = shard or RowShard.of(Team(), entries.shape[0])
    began, history = time.perf_counter(), list[dict[str, float]]()
    automatic = Variational(model, entries, options.noise_weights, shard) if options.regularization == "auto" else None
    penalties: list[Any] = []  # strengths of T, R, row bias, column bias
    if automatic is None:
        assert not isinstance(options.regularization, str)
        (col_counts,) = shard.sum(entries.col_counts())
        strengths = [
            constant + per_entry * counts.to(entries.dtype)
            for (constant, per_entry), counts in zip(options.regularization, (entries.row_counts(), col_counts), strict=True)
        ]
        penalties = [*(strength[:, None] for strength in strengths), *strengths]
    rate, bias_rate = options.learning_rate, options.bias_rate
    optimizer = _Adam(
        [model.left, model.core, model.columns, model.row_bias, model.col_bias],
        [rate, rate * options.core_rate, rate, bias_rate * options.row_bias, bias_rate * options.col_bias],
    )
    fitted = entries if automatic is None else automatic.entries
    total_weight = sum(shard.team.meet(float(len(entries) if entries.weights is None else entries.weights.sum())))
    best, best_error, waited = model.clone(), math.inf, 0
    status, step = Status.MAX_STEPS, 0
    kept = best if validation is not None else None
    found = None if checkpoint is None else checkpoint.load(*_state(model, kept, optimizer, automatic))
    if found is not None:
        step, waited, history = found["step"], found["waited"], found["history"]
        best_error = math.inf if found["best_error"] is None else found["best_error"]
        optimizer.steps = step
        began -= history[-1]["seconds"] if history else 0.0
        if automatic is not None:
            automatic.restore(found)
        if validation is None:
            best.copy_(model)
    first = step + 1
    # Kept: the allocator gives large tensors back to the system, and a new one costs more than the product that fills it.
    t, grad_left = torch.empty_like(model.left), torch.empty_like(model.left)
    try:
        for step in range(first, options.max_steps + 1):
            product = core_product(model.core)
            t = model.left if product is None else torch.matmul(model.left, product, out=t)
            loss, rows, cols = completion_sides(t, model.columns, fitted, row_bias=model.row_bias, col_bias=model.col_bias)
            if automatic is not None and step % UPDATE_EVERY == 1:
                automatic.update(t, model.columns, model, rows.loss, cols.loss)
                penalties = [
                    automatic.rows.penalty,
                    automatic.cols.penalty,
                    automatic.rows.bias_penalty,
                    automatic.cols.bias_penalty,
                ]
            grad_t = rows.grad.addcmul_(t, penalties[0])
            columns, col_bias, outer, loss = shard.sum(cols.grad, cols.bias_grad, model.left.t() @ grad_t, loss)
            decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / options.max_steps))
            optimizer.step(
                [
                    grad_t if product is None else torch.matmul(grad_t, product.t(), out=grad_left),
                    None if product is None else core_gradients(model.core, outer),
                    columns.addcmul_(model.columns, penalties[1]),
                    rows.bias_grad + penalties[2] * model.row_bias,
                    col_bias + penalties[3] * model.col_bias,
                ],
                decay / 3 if options.warm else decay,
            )
            if step % UPDATE_EVERY and step != options.max_steps:
                continue
            record = {"step": step, "loss": float(loss), "train_rmse": math.sqrt(2 * float(loss) / total_weight)}
            if validation is not None:
                record["validation_rmse"] = _rmse(model, validation, shard)
            finite = all(map(math.isfinite, record.values())) and model.is_finite()  # the loss is that before the step
            if not all(shard.team.meet(finite)):
                model.copy_(best)
                status = Status.DIVERGED
                break
            if validation is not None:
                waited = 0 if record["validation_rmse"] < best_error else waited + 1
            record["seconds"] = time.perf_counter() - began
            history.append(record)
            if validation is None or waited == 0:
                best.copy_(model)
                best_error = record.get("validation_rmse", best_error)
            if callback is not None:
                callback(step, record)
            if checkpoint is not None and (step % checkpoint.every == 0 or step == options.max_steps):
                scalars: dict[str, Any] = {"step": step, "waited": waited, "history": history}
                scalars["best_error"] = best_error if math.isfinite(best_error) else None  # JSON has no infinity
                scalars |= {} if automatic is None else automatic.scalars()
                checkpoint.save(step, *_state(model, kept, optimizer, automatic), scalars)
            if validation is not None and waited >= options.patience:
                status = Status.EARLY_STOPPED
                break
    except KeyboardInterrupt:
        if not shard.alone:  # the others are in the middle of an exchange
            raise
        status = Status.INTERRUPTED
    except ProcessLost as error:
        words = "nothing was saved" if checkpoint is None else "what was saved is kept: run the same again to go on from there"
        raise ProcessLost(f"in step {step} of {options.max_steps}: {error}; {words}") from error
    if validation is not None or status is Status.INTERRUPTED:  # an interrupted step may have changed half of the factors
        model.copy_(best)
    if status is Status.MAX_STEPS and _settled(history):
        status = Status.CONVERGED
    return TrainResult(status, step, history)


def _rmse(model: CompletionModel, entries: ObservedEntries, shard: RowShard) -> float:
    loss, _ = completion_loss_and_gradients(
        model.left, model.core, model.columns.t(), entries, row_bias=model.row_bias, col_bias=model.col_bias, wanted=()
    )
    weight = len(entries) if entries.weights is None else float(entries.weights.sum())
    said = shard.team.meet((float(loss), weight))
    return math.sqrt(2 * sum(each for each, _ in said) / sum(each for _, each in said))


def _settled(history: list[dict[str, float]]) -> bool:
    """The last fifth of the checks changed the training error by less than 1 %."""
    tail = [record["train_rmse"] for record in history[-max(2, len(history) // 5) :]]
    return len(tail) >= 2 and abs(tail[0] - tail[-1]) <= 0.01 * tail[0]  # a rising error is no convergence

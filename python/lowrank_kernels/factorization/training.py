"""Gradient descent with weight decay on a deep factorization, as in (4) and (11), and any other torch optimizer.

    W_l <- (1 - eta lam) W_l - eta G_l;    left, right: the same with gamma eta                    (all at once)

Where the gradients come from: a masked loss of three or more factors takes the completion op where it wins; a fully observed
one with frozen orthonormal outer factors only needs the k x k matrix ``left^T Phi right^T``; other linear models take (14);
the rest autograd.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..entries import MAX_WIDTH
from ..ops import completion_loss_and_gradients
from ..solver import Status
from .losses import Loss, SquaredLoss, layer_gradients, prefix_products, product_gradient
from .model import DeepFactorization
from .theory import rate_bounds

if TYPE_CHECKING:
    from .recorder import Recorder

BLOWN_UP = 100.0  # times the loss of the start, or of X = 0 where that is more: gradient descent does not come back from there
# The completion op instead of products of m x n matrices: from this size and up to this observed share. Below, the op's fixed
# cost of a call outweighs what it saves; above, dense products use the CPU better than gathers do.
OP_ENTRIES, OP_SHARE = 50_000, 0.3
Optimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass
class TrainingResult:
    """How training ended: the model holds the weights."""

    status: Status
    steps: int
    loss: float
    message: str
    history: list[dict[str, float]] = field(default_factory=list)  # step, loss, seconds: one record a check


# ---------------------------------------------------------------------- gradients


def gradients(model: DeepFactorization, loss: Loss) -> tuple[Tensor, list[Tensor]]:
    """``(l, grads)``: the loss and its gradient for each of ``model.factors()``; nothing is stored in the model.

    Linear models by (14), in plain products; nonlinear ones by autograd through (13).

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import DeepFactorization, SquaredLoss, gradients
        >>> value, grads = gradients(DeepFactorization(3, 4), SquaredLoss(torch.eye(4).double()))
        >>> round(float(value), 6), [tuple(g.shape) for g in grads]
        (2.0, [(4, 4), (4, 4), (4, 4)])
    """
    if not model.linear:
        with torch.enable_grad():
            x = model()
            value, gradient = product_gradient(loss, x)
            return value, list(torch.autograd.grad(x, model.factors(), gradient))
    with torch.no_grad():
        factors = [factor.detach() for factor in model.factors()]
        *prefixes, x = prefix_products(factors)
        value, gradient = product_gradient(loss, x)
        return value, layer_gradients(factors, gradient, prefixes=prefixes)


def gradient_spectra(model: DeepFactorization, loss: Loss) -> list[Tensor]:
    """Singular values of the gradient of every layer ``W_1 ... W_L``, in float64: a gap after about r of them makes a model
    compressible (the paper's Figure 9 shows one for ReLU at small initialization).

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import DeepFactorization, SquaredLoss, gradient_spectra
        >>> model = DeepFactorization(3, 8, init_scale=1e-3, activation="relu", generator=torch.Generator().manual_seed(0))
        >>> [tuple(s.shape) for s in gradient_spectra(model, SquaredLoss(torch.ones(8, 8).double()))]
        [(8,), (8,), (8,)]
    """
    grads = gradients(model, loss)[1]
    grads = grads if model.left is None else grads[1:-1]
    return [torch.linalg.svdvals(g.double()) for g in grads]


class _Projected:
    """Full observation, frozen orthonormal outer factors: with ``S = left^T Phi right^T`` the loss is
    ``1/2 |C - S|^2 + 1/2 (|Phi|^2 - |S|^2)``, and its gradient ``C - S``: no work of size d a step."""

    def __init__(self, model: DeepFactorization, loss: SquaredLoss) -> None:
        assert model.left is not None
        assert model.right is not None
        self.model, self.divisor = model, loss.divisor
        left, right = model.left.detach(), model.right.detach()
        self.inner = left.t() @ loss.target @ right.t()
        self.rest = (loss.target - left @ self.inner @ right).square().sum() / 2

    @staticmethod
    def serves(model: DeepFactorization, loss: Loss, gamma: float) -> bool:
        if model.left is None or model.right is None or not model.linear or gamma > 0:
            return False
        if not isinstance(loss, SquaredLoss) or loss.weights is not None:
            return False
        left, right = model.left.detach(), model.right.detach()
        eye = torch.eye(model.width, dtype=left.dtype, device=left.device)
        grams = (left.t() @ left, right @ right.t())
        return all(float((gram - eye).abs().max()) < 100 * torch.finfo(eye.dtype).eps for gram in grams)

    def __call__(self) -> tuple[Tensor, list[Tensor | None]]:
        weights = [weight.detach() for weight in self.model.weights]
        *prefixes, x = prefix_products(weights)
        error = x - self.inner
        value = (error.square().sum() / 2 + self.rest) / self.divisor
        return value, [None, *layer_gradients(weights, error / self.divisor, prefixes=prefixes), None]


class _Completion:
    """A masked loss of a linear model of three or more factors, the outer two of which are left and right whether it is
    compressed, narrow or of full width: no product of m x n matrices."""

    def __init__(self, model: DeepFactorization, loss: SquaredLoss, outer: bool) -> None:
        self.factors, self.entries, self.divisor = model.factors(), loss.entries, loss.divisor
        self.wanted = ("left", "core", "right") if outer else ("core",)

    @staticmethod
    def serves(model: DeepFactorization, loss: Loss) -> bool:
        if not model.linear or model.width > MAX_WIDTH or len(model.factors()) < 3:
            return False
        if not isinstance(loss, SquaredLoss) or loss.weights is None or loss.target.dtype not in (torch.float32, torch.float64):
            return False
        return loss.target.numel() >= OP_ENTRIES and int(loss.weights.count_nonzero()) <= OP_SHARE * loss.target.numel()

    def __call__(self) -> tuple[Tensor, list[Tensor | None]]:
        right, *cores, left = (factor.detach() for factor in self.factors)
        value, grads = completion_loss_and_gradients(left, torch.stack(cores), right, self.entries, wanted=self.wanted)
        assert grads.core is not None
        result = [grads.right, *grads.core.unbind(), grads.left]
        if self.divisor == 1:
            return value, result
        return value / self.divisor, [None if g is None else g / self.divisor for g in result]


# ---------------------------------------------------------------------- one step after the other


class Descent:
    """Training one step at a time: ``evaluate()`` gives the loss of the present weights, ``step()`` changes them.

    Args: those of :func:`train`.

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import DeepFactorization, Descent, SquaredLoss
        >>> run = Descent(DeepFactorization(2, 4, init_scale=0.1), SquaredLoss(torch.eye(4).double()), learning_rate=0.1)
        >>> before = run.evaluate()
        >>> run.step()
        >>> bool(run.evaluate() < before), run.steps
        (True, 1)
    """

    def __init__(
        self,
        model: DeepFactorization,
        loss: Loss,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        gamma: float | None = None,
        optimizer: Optimizer | None = None,
        check: bool = True,
    ) -> None:
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"train: learning_rate must be positive and finite, got {learning_rate}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"train: weight_decay must be finite and not negative, got {weight_decay}")
        full = isinstance(loss, SquaredLoss) and loss.weights is None
        gamma = (0.0 if full else 1e-2) if gamma is None else gamma
        if not 0 <= gamma < math.inf:
            raise ValueError(f"train: gamma must be finite and not negative, got {gamma}")
        weight = model.weights[0]
        if isinstance(loss, SquaredLoss):
            if loss.shape != model.shape:
                raise ValueError(f"train: the target must be of the model's shape {model.shape}, got {loss.shape}")
            given = (loss.target.dtype, loss.target.device)
            if given != (weight.dtype, weight.device):
                wanted = f"{weight.dtype} on {weight.device}"
                raise ValueError(f"train: the target must be {wanted} as the model is, got {given[0]} on {given[1]}")
        if check:
            _check(model, loss, learning_rate, weight_decay, bounded=optimizer is None and (model.left is None or gamma == 0))
        self.model, self.loss = model, loss
        self.learning_rate, self.weight_decay, self.gamma = learning_rate, weight_decay, gamma
        self.steps, self.make_optimizer = 0, optimizer
        groups: list[dict[str, Any]] = model.parameter_groups(learning_rate, gamma=gamma, weight_decay=weight_decay)
        self.optimizer = None if optimizer is None else optimizer(groups)
        self._rates = [learning_rate] * model.depth
        if model.left is not None:
            self._rates = [gamma * learning_rate, *self._rates, gamma * learning_rate]
        self._source: Callable[[], tuple[Tensor, list[Any]]]
        if _Projected.serves(model, loss, gamma):
            assert isinstance(loss, SquaredLoss)
            self._source = _Projected(model, loss)
        elif _Completion.serves(model, loss):
            assert isinstance(loss, SquaredLoss)
            self._source = _Completion(model, loss, model.left is None or gamma > 0)
        else:
            self._source = lambda: gradients(model, loss)
        self._grads: list[Tensor | None] | None = None
        self._value: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Gradient descent as in (4), not another optimizer."""
        return self.optimizer is None

    def evaluate(self) -> Tensor:
        """The loss of the present weights, a scalar tensor: reading its value waits for a GPU."""
        if self._value is None:
            self._value, self._grads = self._source()
        return self._value

    @torch.no_grad()
    def step(self) -> None:
        """One step of all factors at once."""
        self.evaluate()
        assert self._grads is not None
        if self.optimizer is None:
            for factor, grad, rate in zip(self.model.factors(), self._grads, self._rates, strict=True):
                if rate > 0:
                    assert grad is not None
                    if self.weight_decay:
                        factor.mul_(1 - rate * self.weight_decay)
                    factor.add_(grad, alpha=-rate)
        else:
            for factor, grad, rate in zip(self.model.factors(), self._grads, self._rates, strict=True):
                factor.grad = grad if rate > 0 else None
            self.optimizer.step()
        self._value = self._grads = None
        self.steps += 1

    def stability(self) -> str:
        """What is known of the learning rate, for messages."""
        bounds = rate_bounds(self.model, self.loss, weight_decay=self.weight_decay)
        if bounds.stable is not None and self.plain:
            return f"the learning rate must stay below {bounds.stable:.4g}, got {self.learning_rate:.4g}"
        return f"lower the learning rate, {self.learning_rate:.4g}"


def _check(model: DeepFactorization, loss: Loss, learning_rate: float, weight_decay: float, bounded: bool) -> None:
    """Refuse what cannot work, with the bound that says so."""
    full = isinstance(loss, SquaredLoss) and loss.weights is None
    if full and model.linear and model.width < min(model.shape):
        assert isinstance(loss, SquaredLoss)
        if model.width < loss.target_rank:
            raise ValueError(
                f"train: the model's width must be at least the target's numerical rank, {loss.target_rank}, got "
                f"{model.width}; pass check=False to approximate the target"
            )
    bound = rate_bounds(model, loss, weight_decay=weight_decay).stable
    if bounded and bound is not None and learning_rate > bound:
        why = "2 / weight_decay" if weight_decay > 0 else f"2 / (L s_1^(2 - 2/L)), L = {model.depth}"
        raise ValueError(
            f"train: learning_rate must be at most {bound:.4g} = {why}: above it no minimum is stable, got "
            f"{learning_rate:.4g}; lower it, or pass check=False to see it happen"
        )


# ---------------------------------------------------------------------- training


def train(
    model: DeepFactorization,
    loss: Loss,
    *,
    learning_rate: float,
    steps: int,
    weight_decay: float = 0.0,
    gamma: float | None = None,
    optimizer: Optimizer | None = None,
    tol: float = 0.0,
    check_every: int = 100,
    check: bool = True,
    recorder: Recorder | None = None,
    callback: Callable[[int, float], None] | None = None,
) -> TrainingResult:
    r"""Train a factorization in place, by default with the paper's gradient descent.

    .. math:: W_l(t+1) = (1 - \eta \lambda) W_l(t) - \eta \nabla_{W_l} \ell, \qquad
        U, V: \text{the same with } \gamma \eta

    Args:
        model: full-width, narrow or compressed.
        loss: a :class:`SquaredLoss`, or any function of the product X that returns a scalar.
        learning_rate: eta.
        steps: steps at most.
        weight_decay: lambda.
        gamma: of the compressed form: rate of the outer factors over ``learning_rate``; 0 freezes them bit for bit. By default
            0 for a fully observed target, as in (9), else 1e-2, as in (11).
        optimizer: None, gradient descent; or what makes an optimizer from parameter groups, such as ``torch.optim.Adam``.
        tol: ends as CONVERGED where the loss at a check is at most this.
        check_every: steps between checks of the loss; each waits for a GPU.
        check: refuse a learning rate at which no minimum of a fully observed target is stable, and a width below its rank.
        recorder: a :class:`Recorder`; nothing is recorded, and nothing costs, without one.
        callback: called as ``callback(step, loss)`` at every check.

    Returns:
        :class:`TrainingResult`; its message says what to do. After a loss that is not finite, or above 100 times that of
        the start (DIVERGED), and after Ctrl-C (INTERRUPTED) the model holds the weights of the last check.

    Raises:
        ValueError: numbers out of range, a target of another shape, dtype or device, and what ``check`` refuses, with the
            bound; a loss that is not finite at the start.

    Note: deterministic. A step of a full-width model costs 3 (L - 1) products of d x d matrices.

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import DeepFactorization, SquaredLoss, train
        >>> loss = SquaredLoss(torch.outer(torch.arange(1.0, 7.0), torch.ones(6)).double())
        >>> model = DeepFactorization(2, 6, init_scale=0.01, generator=torch.Generator().manual_seed(0))
        >>> train(model, loss, learning_rate=0.02, steps=1000, tol=1e-6).status.name
        'CONVERGED'
        >>> train(model, loss, learning_rate=0.1, steps=10)
        Traceback (most recent call last):
        ValueError: train: learning_rate must be at most 0.0428 = 2 / (L s_1^(2 - 2/L)), L = 2: above it no minimum is stable,
        got 0.1; lower it, or pass check=False to see it happen

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, equations (4), (9) to (11).
    """
    if steps < 0:
        raise ValueError(f"train: steps must be at least 0, got {steps}")
    if check_every < 1:
        raise ValueError(f"train: check_every must be at least 1, got {check_every}")
    run = Descent(
        model,
        loss,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        gamma=gamma,
        optimizer=optimizer,
        check=check,
    )
    start = float(run.evaluate())
    if not math.isfinite(start):
        raise ValueError(
            f"train: the loss must be finite at the start, got {start}; check the target, the loss and the weights"
        )
    limit = math.inf
    if isinstance(loss, SquaredLoss):
        limit = BLOWN_UP * max(start, float(product_gradient(loss, torch.zeros_like(loss.target))[0]))
    history: list[dict[str, float]] = []
    kept = [factor.detach().clone() for factor in model.factors()]
    status, began, value = Status.MAX_STEPS, time.perf_counter(), start
    if recorder is not None:
        recorder.begin(run)
    try:
        while True:
            if run.steps % check_every == 0 or run.steps == steps:
                now = float(run.evaluate())
                if not math.isfinite(now) or now > limit:
                    status = Status.DIVERGED
                    break
                value = now
                history.append({"step": run.steps, "loss": value, "seconds": time.perf_counter() - began})
                for copy, factor in zip(kept, model.factors(), strict=True):
                    copy.copy_(factor.detach())
                if recorder is not None:
                    recorder.mark()
                if callback is not None:
                    callback(run.steps, value)
                if value <= tol:
                    status = Status.CONVERGED
            last = status is Status.CONVERGED or run.steps == steps
            if recorder is not None and recorder.due(run.steps, last):
                recorder.observe()
            if last:
                break
            run.step()
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    if status in (Status.DIVERGED, Status.INTERRUPTED):  # an interrupted step may have changed half of the factors
        with torch.no_grad():
            for copy, factor in zip(kept, model.factors(), strict=True):
                factor.copy_(copy)
        if recorder is not None:
            recorder.rewind()
    return TrainingResult(status, run.steps, value, _message(status, run, history), history)


def _message(status: Status, run: Descent, history: list[dict[str, float]]) -> str:
    kept = f"the weights of step {int(history[-1]['step']) if history else 0} were kept"
    if status is Status.DIVERGED:
        return f"the loss blew up by step {run.steps}; {kept}: {run.stability()}"
    if status is Status.INTERRUPTED:
        return f"interrupted at step {run.steps}; {kept}: call train() again to go on"
    if status is Status.CONVERGED:
        return f"the loss reached tol in {run.steps} steps: nothing to do"
    return f"stopped after {run.steps} steps: call train() again with the same model to go on"

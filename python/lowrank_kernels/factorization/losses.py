"""Losses of the product X, and the gradients of the layers that follow from dl/dX.

    l = 1/2 sum_ij w_ij (X_ij - Phi_ij)^2        w: 1, a mask of 0 and 1, or weights; "mean" divides by m n, observed or not

Any function of X that returns a scalar is a loss as well; it is differentiated by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..entries import ObservedEntries


class SquaredLoss:
    r"""The paper's loss of the product: full observation (2), masked (10), or weighted.

    .. math:: \ell(X) = \tfrac12 \| \Omega \odot (X - \Phi) \|_F^2, \qquad \text{``mean'': divided by } m n

    Args:
        target: ``(m, n)`` Phi, finite where observed; or :class:`~lowrank_kernels.ObservedEntries`.
        mask: ``(m, n)`` of bools, or of finite weights of at least 0; None: everything is observed.
        reduction: ``"sum"``, the paper's formulas, or ``"mean"``, the loss of its code: over all m n entries, so that a rate
            ``m n`` times as large (and a weight decay ``m n`` times as small) gives the same iterates.

    Raises:
        ValueError: a target that is not a finite matrix, a mask of another shape or with negative or non-finite weights, or
            one that observes nothing; an unknown reduction.
        TypeError: a target that is not of floating point.

    Note: calling it gives a scalar tensor that torch can differentiate; ``value_and_gradient`` needs no graph.

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import SquaredLoss
        >>> loss = SquaredLoss(torch.ones(2, 3), mask=torch.eye(2, 3).bool())
        >>> float(loss(torch.zeros(2, 3)))
        1.0

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, equations (2) and (10).
    """

    def __init__(self, target: Tensor | ObservedEntries, mask: Tensor | None = None, *, reduction: str = "sum") -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"SquaredLoss: reduction must be 'sum' or 'mean', got {reduction!r}")
        given = None
        if isinstance(target, ObservedEntries):
            if mask is not None:
                raise ValueError("SquaredLoss: mask must be None for ObservedEntries, which say themselves what is observed")
            given, (target, mask) = target, _dense(target)
        if target.ndim != 2 or 0 in target.shape:
            raise ValueError(f"SquaredLoss: target must be a matrix (m, n) with entries, got shape {tuple(target.shape)}")
        if not target.is_floating_point():
            raise TypeError(f"SquaredLoss: target must be of floating point, got {target.dtype}; convert it with .double()")
        weights = None
        if mask is not None:
            if mask.shape != target.shape:
                raise ValueError(f"SquaredLoss: mask must be of shape {tuple(target.shape)}, got {tuple(mask.shape)}")
            weights = mask.detach().to(target)
            if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
                raise ValueError("SquaredLoss: mask must hold bools, or finite weights of at least 0")
            if not bool((weights > 0).any()):
                raise ValueError("SquaredLoss: mask observes no entry; at least one must be true")
            target = torch.where(weights > 0, target, 0)  # what is not observed may be NaN
        bad = int((~torch.isfinite(target)).sum())
        if bad:
            raise ValueError(
                f"SquaredLoss: target must be finite where it is observed, got NaN or infinity in {bad} of {target.numel()} "
                "entries; pass mask=torch.isfinite(target) to leave them out"
            )
        self.target = target.detach()  # (m, n), 0 where not observed
        self.weights = weights  # (m, n), or None: full observation
        self.reduction = reduction
        self.divisor = target.numel() if reduction == "mean" else 1
        self._given = given

    @property
    def shape(self) -> tuple[int, int]:
        return self.target.shape[0], self.target.shape[1]

    @cached_property
    def entries(self) -> ObservedEntries:
        """The observed entries, for the completion op."""
        if self._given is not None:
            return self._given
        if self.weights is None:
            return ObservedEntries.from_dense(self.target, dtype=self.target.dtype)
        row, col = (self.weights > 0).nonzero(as_tuple=True)
        weights = self.weights[row, col]
        given = None if bool((weights == 1).all()) else weights
        return ObservedEntries.from_coo(
            row, col, self.target[row, col], shape=self.shape, weights=given, dtype=self.target.dtype
        )

    @cached_property
    def singular_values(self) -> Tensor:
        """Of the target ``(min(m, n),)``, in float64; where not observed it counts as 0."""
        return torch.linalg.svdvals(self.target.double())

    @property
    def target_rank(self) -> int:
        """Singular values of the target above 1e-10 of the largest, or above 10 roundings of its dtype."""
        s = self.singular_values
        share = max(1e-10, 10 * torch.finfo(self.target.dtype).eps)
        return int((s > share * s[0]).sum()) if float(s[0]) else 0

    def __call__(self, x: Tensor) -> Tensor:
        error = x - self.target
        squared = error.square() if self.weights is None else self.weights * error.square()
        return squared.sum() / (2 * self.divisor)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and ``D = dl/dX``."""
        error = x - self.target
        weighted = error if self.weights is None else self.weights * error
        value = torch.dot(weighted.flatten(), error.flatten()) / (2 * self.divisor)
        return value, weighted if self.divisor == 1 else weighted / self.divisor

    def __repr__(self) -> str:
        observed = "all" if self.weights is None else str(int((self.weights > 0).sum()))
        return f"SquaredLoss(shape={self.shape}, observed={observed}, reduction={self.reduction!r})"


Loss = SquaredLoss | Callable[[Tensor], Tensor]


def _dense(entries: ObservedEntries) -> tuple[Tensor, Tensor]:
    row, col, values, weights = entries.coo()
    target, mask = values.new_zeros(entries.shape), values.new_zeros(entries.shape)
    target[row, col] = values
    mask[row, col] = torch.ones_like(values) if weights is None else weights
    return target, mask


def product_gradient(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(l, D)`` at the product X ``(m, n)``, ``D = dl/dX`` of the same shape; no graph is kept.

    Raises:
        ValueError: a loss that does not return a scalar, or does not depend on X; another shape than the target's.

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import product_gradient
        >>> value, gradient = product_gradient(lambda x: (x - 1).abs().sum(), torch.zeros(2, 2))
        >>> float(value), gradient.tolist()
        (4.0, [[-1.0, -1.0], [-1.0, -1.0]])
    """
    if isinstance(loss, SquaredLoss):
        if x.shape != loss.target.shape:
            raise ValueError(f"loss: the target must be of the product's shape {tuple(x.shape)}, got {loss.shape}")
        with torch.no_grad():
            return loss.value_and_gradient(x.detach())
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = loss(x)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: a function must return a scalar tensor of the product X, got {got}; sum or average it")
        if not value.requires_grad:
            raise ValueError("loss: its value does not depend on the product X through torch operations")
        (gradient,) = torch.autograd.grad(value.reshape(()), x)
    return value.detach().reshape(()), gradient


def prefix_products(factors: Sequence[Tensor]) -> list[Tensor]:
    """``[W_1, W_2 W_1, ..., X]``: the products from the right, the last of which is the whole one."""
    prefixes = [factors[0]]
    for factor in factors[1:]:
        prefixes.append(factor @ prefixes[-1])
    return prefixes


def layer_gradients(factors: Sequence[Tensor], gradient: Tensor, *, prefixes: Sequence[Tensor] | None = None) -> list[Tensor]:
    """``G_l = W_{L:l+1}^T D W_{l-1:1}^T`` of every factor of ``X = W_L ... W_1``, from ``D = dl/dX``.

    Args:
        factors: ``[W_1, ..., W_L]``, shapes that chain.
        gradient: ``(m, n)`` D.
        prefixes: ``[W_1, W_2 W_1, ...]``, at least L - 1 of them, where they are at hand; computed by default.

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import layer_gradients
        >>> [g.tolist() for g in layer_gradients([torch.tensor([[2.0]]), torch.tensor([[3.0]])], torch.tensor([[1.0]]))]
        [[[3.0]], [[2.0]]]

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, equation (14).
    """
    prefixes = prefix_products(factors[:-1]) if prefixes is None else prefixes
    grads = [gradient] * len(factors)
    for index in range(len(factors) - 1, 0, -1):
        grads[index] = gradient @ prefixes[index - 1].t()
        gradient = factors[index].t() @ gradient
    grads[0] = gradient
    return grads

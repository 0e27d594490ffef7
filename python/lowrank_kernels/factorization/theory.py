"""What the theory predicts of gradient descent on a fully observed square target of rank r, from orthogonal starts.

    W_l(t) = U_l [Wt_l(t), 0; 0, rho_l(t) I] V_l^T,    V_{l+1} = U_l                                          (5)
    rho_l(t+1) = rho_l(t) (1 - eta lam - eta prod_{k != l} rho_k(t)^2),    rho_l(0) = eps_l                   (6)
    X(t) - X_hat(t) = prod_l rho_l(t) U_{L,2} V_{1,2}^T                                        (Proposition 2.2)

Source: Yaras et al., ICML 2024, arXiv:2406.04112, Theorem 2.1, Proposition 2.2 and Lemma E.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import Loss, SquaredLoss
from .model import DeepFactorization


def rho_step(rho: Tensor, learning_rate: float, weight_decay: float, divisor: float = 1.0) -> Tensor:
    """One step of (6) of all layers ``(L,)``; ``divisor`` is that of a mean loss."""
    square = rho.square()
    others = torch.stack([torch.cat([square[:l], square[l + 1 :]]).prod() for l in range(len(rho))])
    return rho * (1 - learning_rate * weight_decay - learning_rate / divisor * others)


def rho_trajectory(
    init_scale: Sequence[float], *, learning_rate: float, steps: int, weight_decay: float = 0.0, divisor: float = 1.0
) -> Tensor:
    """``rho_l(t)`` of the recursion (6), ``(steps + 1, L)`` in float64; it may change its sign at large rates.

    Args:
        init_scale: epsilon of each layer.
        divisor: m n for the mean loss.

    Example:
        >>> from lowrank_kernels.factorization import rho_trajectory
        >>> rho_trajectory([1.0, 0.5], learning_rate=0.1, steps=1).tolist()
        [[1.0, 0.5], [0.975, 0.45]]
    """
    rows = [torch.tensor([float(scale) for scale in init_scale], dtype=torch.float64)]
    for _ in range(steps):
        rows.append(rho_step(rows[-1], learning_rate, weight_decay, divisor))
    return torch.stack(rows)


def lemma_bounds(
    init_scale: float, depth: int, *, learning_rate: float, steps: int, weight_decay: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Lemma E.2 for equal scales epsilon <= 1 and ``eta <= 1 / (lam + epsilon)``: lower and upper bounds of rho(t).

    .. math:: \epsilon (1 - \eta (\lambda + \epsilon))^t \le \epsilon (1 - \eta (\lambda + \epsilon^{2(L-1)}))^t \le \rho(t)
        \le \epsilon (1 - \eta \lambda)^t

    Returns:
        ``(lower, tight_lower, upper)``, each ``(steps + 1,)`` in float64; the tight bound is not in the paper.

    Raises:
        ValueError: outside the lemma's assumptions.
    """
    limit = 1 / (weight_decay + init_scale)
    if depth < 2 or not 0 < init_scale <= 1 or weight_decay < 0 or not 0 < learning_rate <= limit:
        raise ValueError(
            "lemma_bounds: the lemma wants depth >= 2, 0 < init_scale <= 1, weight_decay >= 0 and 0 < learning_rate <= "
            f"1 / (weight_decay + init_scale) = {limit:.6g}, got {depth}, {init_scale}, {weight_decay}, {learning_rate}"
        )
    t = torch.arange(steps + 1, dtype=torch.float64)
    pulls = (weight_decay + init_scale, weight_decay + init_scale ** (2 * (depth - 1)), weight_decay)
    lower, tight, upper = (init_scale * (1 - learning_rate * pull) ** t for pull in pulls)
    return lower, tight, upper


@dataclass(frozen=True)
class RateBounds:
    """Learning rates, in the units of the given loss; None where the theory gives no bound."""

    stable: float | None  # above it gradient descent cannot settle in any global minimum
    lemma: float | None  # 1 / (lam + eps), up to which Lemma E.2 bounds rho(t)


def rate_bounds(model: DeepFactorization, loss: Loss, *, weight_decay: float = 0.0) -> RateBounds:
    r"""Bounds of the learning rate for a linear factorization of a fully observed target.

    .. math:: \eta_{stable} = \frac{2}{L s_1^{2 - 2/L}}, \qquad \eta_{lemma} = \frac{1}{\lambda + \epsilon}

    At a global minimum ``W_L ... W_1 = Phi`` the largest eigenvalue of the Hessian is at least ``sum_l prod_{k != l} c_k^2``
    with ``prod c_k = s_1(Phi)``, which is least, ``L s_1^(2 - 2/L)``, where the layers are balanced. A larger rate than
    twice its inverse therefore leaves every global minimum (no weight decay; with it: ``2 / lam``). The lemma's bound
    is one of the low-rank bias, not of stability: Theorem 2.1 holds at any rate.

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import DeepFactorization, SquaredLoss, rate_bounds
        >>> rate_bounds(DeepFactorization(2, 4, init_scale=0.5), SquaredLoss(torch.ones(4, 4).double()))
        RateBounds(stable=0.25, lemma=2.0)
    """
    stable = 2 / weight_decay if weight_decay > 0 else None
    if not isinstance(loss, SquaredLoss) or loss.weights is not None or not model.linear:
        return RateBounds(stable, None)
    divisor, scales = loss.divisor, model.init_scale
    largest = float(loss.singular_values[0])
    if weight_decay == 0 and largest > 0:
        stable = 2 * divisor / (model.depth * largest ** (2 - 2 / model.depth))
    equal = max(scales) <= 1 and max(scales) - min(scales) <= 1e-12 * max(scales)
    return RateBounds(_round(stable), divisor / (weight_decay * divisor + scales[0]) if equal else None)


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.12g}")


@torch.no_grad()
def invariant_frames(model: DeepFactorization, loss: Loss, rank: int, *, truncate: bool = False) -> list[Tensor]:
    """``[V_1, U_1, ..., U_L]`` of (5), orthogonal ``(d, d)`` in float64, the learning block first: ``rank`` columns.

    Args:
        model: full-width and square, at its start.
        rank: width of the learning block, ``2 rh``, as in :meth:`DeepFactorization.compress`.

    Raises:
        ValueError: as :meth:`DeepFactorization.compress`; a product that is not square.
    """
    if model.shape[0] != model.shape[1]:
        raise ValueError(f"invariant_frames: Theorem 2.1 is for square products, got shape {model.shape}")
    right = model.compress(loss, rank, truncate=truncate).right
    assert right is not None
    learning = right.detach().double().t()
    complete = torch.linalg.qr(learning, mode="complete").Q
    frames = [torch.cat([learning, complete[:, rank:]], 1)]
    for weight, scale in zip(model.weights, model.init_scale, strict=True):
        frames.append(weight.detach().double() @ frames[-1] / scale)
    return frames


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles in radians between the spans of orthonormal columns ``(d, i)`` and ``(d, j)``: min(i, j) of them, ascending.

    Small angles come from sines, large ones from cosines: both are exact to rounding.

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import principal_angles
        >>> [round(float(angle), 6) for angle in principal_angles(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])]
        [0.0, 1.570796]
    """
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    a, b = a.double(), b.double()
    inner = a.t() @ b
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ inner).flip(0).clamp(max=1)
    return torch.where(cosines > math.sqrt(0.5), torch.arcsin(sines), torch.arccos(cosines))


def repeated_singular_value(s: Tensor, count: int) -> tuple[float, float, int]:
    """``(mean, spread, place)`` of the ``count`` consecutive singular values ``s`` (descending) that are closest together.

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import repeated_singular_value
        >>> repeated_singular_value(torch.tensor([4.0, 2.0, 2.0, 1.0]), 2)
        (2.0, 0.0, 1)
    """
    if not 1 <= count <= len(s):
        raise ValueError(f"repeated_singular_value: count must be from 1 to {len(s)}, got {count}")
    spreads = s[: len(s) - count + 1] - s[count - 1 :]
    place = int(spreads.argmin())
    return float(s[place : place + count].mean()), float(spreads[place]), place

"""The theory as statements that are measured: ``verify()`` runs them all, ``lowrank-kernels verify`` prints them.

A statement compares what was computed, in float64, with what the paper proves: its residual must be at most its tolerance.
Where the paper says that something does *not* hold (Adam, too small a rank), the residual must be at least the tolerance.
Each function takes a seed, and ``broken=True`` spoils what it looks at, which must make it fail: a check that cannot fail says
nothing.

Source: Yaras et al., ICML 2024, arXiv:2406.04112.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, wraps
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .compression import CompressedFactors, compress, masked_gradient, top_singular_vectors
from .factorization import (
    DeepFactorization,
    Descent,
    Recorder,
    Recording,
    SquaredLoss,
    gradients,
    invariant_frames,
    layer_gradients,
    lemma_bounds,
    principal_angles,
    product_gradient,
    rho_trajectory,
    train,
)
from .factorization.losses import Loss
from .nn import DeepLoRALinear
from .ops import completion_loss_and_gradients, three_factor_linear
from .reference import compression as paper

F64 = torch.float64
SIZE, RANK = 24, 3  # d and r of the examples


@dataclass(frozen=True)
class Statement:
    """One statement and what was measured."""

    name: str
    source: str  # where the paper says so; "ours" where it is sharper than the paper
    residual: float
    tolerance: float
    at_least: bool = False  # the residual must be at least the tolerance: what does not hold in theory

    @property
    def holds(self) -> bool:
        return self.residual >= self.tolerance if self.at_least else self.residual <= self.tolerance  # NaN: neither

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a residual that is not finite is None."""
        residual = self.residual if math.isfinite(self.residual) else None
        return {**asdict(self), "residual": residual, "holds": self.holds}


Check = Callable[..., Statement]
CHECKS: list[Check] = []


def _statement(check: Check) -> Check:
    """Register a check; it runs on one thread: matrices of this size only wait for a second one."""

    @wraps(check)
    def run(seed: int = 0, *, broken: bool = False) -> Statement:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return check(seed, broken=broken)
        finally:
            torch.set_num_threads(threads)

    CHECKS.append(run)
    return run


def verify(seed: int = 0) -> Iterator[Statement]:
    """Every statement in turn, measured on examples drawn from ``seed``; a few seconds on one CPU.

    Example:
        >>> from lowrank_kernels.invariants import verify
        >>> all(statement.holds for statement in verify(seed=0))
        True
    """
    for check in CHECKS:
        yield check(seed)


# ---------------------------------------------------------------------- examples


def _generator(seed: int, salt: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + salt)


def _target(generator: torch.Generator, rank: int = RANK, size: int = SIZE) -> Tensor:
    """Singular values from 1 down to 0.4 in random directions."""
    u, v = (paper.haar(size, rank, generator=generator, dtype=F64) for _ in range(2))
    return u * torch.linspace(1, 0.4, rank, dtype=F64) @ v.t()


def _disturb(factors: list[nn.Parameter], generator: torch.Generator, size: float = 1e-3) -> None:
    with torch.no_grad():
        for factor in factors:
            factor.add_(torch.randn(factor.shape, generator=generator, dtype=F64), alpha=size * float(factor.abs().max()))


class _Case(NamedTuple):
    init_scale: tuple[float, ...]  # of L layers
    weight_decay: float
    learning_rate: float
    steps: int


CASES = (
    _Case((0.1, 0.2), 0.02, 0.3, 120),
    _Case((1e-3, 1e-3), 0.0, 0.5, 120),
    _Case((1.0, 1.0, 1.0), 0.0, 0.05, 120),
    _Case((1.0, 1.0, 1.0), 0.1, 0.05, 120),
    _Case((1.0, 0.5, 0.25), 0.0, 0.1, 120),
    _Case((0.1, 0.1, 0.1), 0.01, 0.3, 120),
    _Case((1.2, 1.2, 1.2), 0.0, 0.6, 40),  # rho changes its sign
    _Case((0.3, 0.2, 0.4, 0.1), 0.01, 0.2, 120),
    _Case((0.9, 0.9, 0.9, 0.9), 0.0, 0.1, 120),
)


def _follow(case: _Case, seed: int, rank: int, broken: bool, steps: int | None = None) -> tuple[Recording, list[Tensor]]:
    """Train a model and its twin of inner width ``rank`` together; also ``U_1^T W_l V_1 - C_l`` of every layer at the end.

    Broken: the model is disturbed after the subspaces were computed.
    """
    generator = _generator(seed, len(case.init_scale))
    loss = SquaredLoss(_target(generator))
    model = DeepFactorization(len(case.init_scale), SIZE, init_scale=case.init_scale, generator=generator)
    twin = model.compress(loss, rank, truncate=True)
    frames = invariant_frames(model, loss, rank, truncate=True)
    # The frames of twin and recorder are the same: both come from compress() with its fixed seed.
    recorder = Recorder(every=10, twin=twin)
    run = Descent(model, loss, learning_rate=case.learning_rate, weight_decay=case.weight_decay)
    recorder.begin(run)
    if broken:
        _disturb(list(model.weights), generator)
    for step in range((case.steps if steps is None else steps) + 1):
        if step:
            run.step()
        if step % 10 == 0:
            recorder.observe()
    blocks = [
        after[:, :rank].t() @ weight.detach() @ before[:, :rank] - core.detach()
        for weight, core, before, after in zip(model.weights, twin.weights, frames[:-1], frames[1:], strict=True)
    ]
    return recorder.recording(), blocks


@lru_cache(maxsize=4)
def _trajectories(seed: int, broken: bool) -> list[tuple[Recording, list[Tensor]]]:
    return [_follow(case, seed, 2 * RANK, broken) for case in CASES]


def _worst(seed: int, broken: bool, measure: Callable[[Recording], Any]) -> float:
    """The largest value over all cases; NaN wins."""
    return _largest(float(measure(recording)) for recording, _ in _trajectories(seed, broken))


def _largest(values: Any) -> float:
    found = [float(value) for value in values]
    return math.nan if any(math.isnan(value) for value in found) else max(found)


# ---------------------------------------------------------------------- Theorem 2.1


@_statement
def repeated_singular_value(seed: int = 0, *, broken: bool = False) -> Statement:
    """``|rho_l(t)|`` of (6) is a singular value of W_l(t) at least d - 2 r times; L = 2, 3, 4, several scales and decays."""

    def measure(r: Recording) -> float:
        return max(abs(abs(r["rho"]) - abs(r["rho_measured"])).max(), r["rho_spread"].max())

    residual = _worst(seed, broken, measure)
    return Statement("d - 2r singular values of every layer are |rho(t)|", "Theorem 2.1, (5), (6)", residual, 1e-10)


@_statement
def off_diagonal_blocks(seed: int = 0, *, broken: bool = False) -> Statement:
    """``U_1^T W_l V_2 = 0`` and ``U_2^T W_l V_1 = 0`` at all times."""
    residual = _worst(seed, broken, lambda r: r["off_block"].max())
    return Statement("the off-diagonal blocks of U^T W V vanish", "Theorem 2.1, (5)", residual, 1e-11)


@_statement
def rho_recursion(seed: int = 0, *, broken: bool = False) -> Statement:
    """``W_l V_2 = rho_l U_2`` with the rho of (6), its sign included."""

    def measure(r: Recording) -> float:
        return (r["stationary"] + abs(r["rho"] - r["rho_measured"])).max()

    return Statement("W V_2 = rho U_2 with rho of the recursion", "Theorem 2.1, (6)", _worst(seed, broken, measure), 1e-11)


@_statement
def stationary_subspaces(seed: int = 0, *, broken: bool = False) -> Statement:
    """The singular subspaces of the repeated value, from an SVD of W_l(t), make no angle with those of the start."""

    def measure(r: Recording) -> float:
        angles = r["angle_invariant"]
        defined = angles[angles == angles]
        return float(defined.max()) if len(defined) else math.nan

    name = "the subspaces of the repeated value stand still (radians)"
    return Statement(name, "Theorem 2.1, Fig. 3", _worst(seed, broken, measure), 1e-8)


@_statement
def top_subspaces_move(seed: int = 0, *, broken: bool = False) -> Statement:
    """The top r singular directions of the layers do move. Broken: a rate at which nothing is learnt."""
    case = _Case((1.0, 1.0, 1.0), 0.0, 1e-9 if broken else 0.1, 60)
    angles = _follow(case, seed, 2 * RANK, False)[0]["angle_top"]
    moved = [float(column[column == column].max()) if (column == column).any() else 0.0 for column in angles.T]
    return Statement("the top r directions move (radians)", "Fig. 3", min(moved), 1e-2, at_least=True)


@_statement
def nothing_outside(seed: int = 0, *, broken: bool = False) -> Statement:
    """``Psi V_2 = 0``, ``Psi^T W_1 V_2 = 0``, ``Psi^T U_{1,2} = 0`` for ``Psi = W_{L:2}^T Phi`` at the start."""
    residual = 0.0
    for depth in (2, 3, 4):
        generator = _generator(seed, depth)
        loss = SquaredLoss(_target(generator))
        model = DeepFactorization(depth, SIZE, init_scale=0.5, generator=generator)
        frames = invariant_frames(model, loss, 2 * RANK)
        if broken:
            _disturb(list(model.weights), generator)
        weights = [weight.detach() for weight in model.weights]
        psi = paper.product(weights[1:]).t() @ loss.target
        outside, image = frames[0][:, 2 * RANK :], frames[1][:, 2 * RANK :]
        for product in (psi @ outside, psi.t() @ weights[0] @ outside, psi.t() @ image):
            residual = max(residual, float(product.norm() / psi.norm()))
    return Statement("the gradient does not reach V_2 and U_2 at the start", "Appendix E.1", residual, 1e-12)


# ---------------------------------------------------------------------- compression


@_statement
def equal_distance(seed: int = 0, *, broken: bool = False) -> Statement:
    """``|f - f_C|_F = sqrt(d - 2 rh) prod rho_l(t)`` for r <= rh < d/2: the paper's inequality is this equality."""

    def measure(r: Recording) -> float:
        return float(abs(r["distance"] - r["distance_predicted"]).max())

    wider = [_follow(CASES[5], seed, 2 * rh, broken)[0] for rh in (RANK + 1, SIZE // 2 - 1)]
    residual = _largest([_worst(seed, broken, measure), *map(measure, wider)])
    return Statement("|f - f_C|_F = sqrt(d - 2rh) prod rho(t)", "Prop. 2.2; the equality is ours", residual, 1e-11)


@_statement
def distance_bound(seed: int = 0, *, broken: bool = False) -> Statement:
    """``|f - f_C|_F <= sqrt(d - 2 rh) prod eps_l``, where no ``|rho|`` grows: ``eta (lam + prod_{k != l} eps_k^2) <= 2``."""
    cases = zip(CASES, (r for r, _ in _trajectories(seed, broken)), strict=True)
    excess = [r["distance"].max() / (math.sqrt(SIZE - 2 * RANK) * math.prod(c.init_scale)) - 1 for c, r in cases]
    return Statement("|f - f_C|_F <= sqrt(d - 2rh) prod eps", "Proposition 2.2", max(0.0, _largest(excess)), 1e-11)


@_statement
def learning_blocks(seed: int = 0, *, broken: bool = False) -> Statement:
    """The compressed weights are the learning blocks: ``C_l(t) = U_{l,1}^T W_l(t) V_{l,1}``."""
    residual = _largest(block.abs().max() for _, blocks in _trajectories(seed, broken) for block in blocks)
    return Statement("C_l(t) is the learning block of W_l(t)", "Appendix E.3, (21)", residual, 1e-10)


@_statement
def rank_is_needed(seed: int = 0, *, broken: bool = False) -> Statement:
    """With rh < r the distance becomes far larger than the bound. Broken: rh = r."""
    case = _Case((0.1, 0.1, 0.1), 0.0, 0.3, 400)  # long enough to learn the r-th direction
    recording = _follow(case, seed, 2 * RANK if broken else 2 * RANK - 2, False)[0]
    bound = math.sqrt(SIZE - 2 * RANK + 2) * math.prod(case.init_scale)
    ratio = float(recording["distance"].max()) / bound
    return Statement(
        "with rh < r the distance exceeds the bound (times)", "Prop. 2.2 needs rh >= r", ratio, 10.0, at_least=True
    )


@_statement
def forms_of_the_compression(seed: int = 0, *, broken: bool = False) -> Statement:
    """The direct form, the paper's nullspace form, the implicit form and ``compress()`` span the same subspaces.

    Broken: factors that are not orthogonal.
    """
    angles = []
    for depth, scale in ((2, 1.0), (3, 1e-2), (4, 0.3)):
        generator = _generator(seed, depth)
        loss = SquaredLoss(_target(generator))
        model = DeepFactorization(depth, SIZE, init_scale=scale, generator=generator)
        twin = model.compress(loss, 2 * RANK)
        if broken:
            _disturb(list(model.weights), generator)
        weights = [weight.detach() for weight in model.weights]
        left, right = paper.direct_form(weights, loss.target, RANK)
        assert twin.left is not None
        assert twin.right is not None
        others = [(twin.left.detach(), twin.right.detach()), paper.nullspace_form(weights, loss.target, RANK)]
        u, _, v = top_singular_vectors(loss.target, RANK, generator=generator)
        others.append(paper.implicit_form(paper.product(weights) / scale**depth, u, v))
        for other_left, other_right in others:
            for a, b in ((left, other_left), (right.t(), other_right.t())):
                angles.append(principal_angles(*(torch.linalg.qr(x).Q for x in (a, b))).max())
    return Statement("three forms of the compression, one subspace (radians)", "Sections 2.2, 2.3", _largest(angles), 1e-10)


@_statement
def orthonormal_frames(seed: int = 0, *, broken: bool = False) -> Statement:
    """``V^T V = I = U^T U``, ``U = P V``, ``X(0) = prod eps U V^T`` (exact form); orthonormal frames (sampled form)."""
    generator = _generator(seed)
    loss = SquaredLoss(_target(generator))
    scales = (0.5, 0.1, 0.2)
    model = DeepFactorization(3, SIZE, init_scale=scales, generator=generator)
    twin = model.compress(loss, 2 * RANK)
    if broken:
        _disturb(twin.factors(), generator)
    left, _, right = twin.compressed_factors()
    sampled = compress(loss.target, 2 * RANK, generator=generator)
    eye, size = torch.eye(2 * RANK, dtype=F64), math.prod(scales)
    start, product = twin().detach(), paper.product([w.detach() for w in model.weights]) / size
    errors = [left.t() @ left - eye, right @ right.t() - eye, left - product @ right.t(), (start - size * left @ right) / size]
    errors += [sampled.left.t() @ sampled.left - eye, sampled.right @ sampled.right.t() - eye]
    norm = abs(float(torch.linalg.matrix_norm(start, 2)) / size - 1)
    residual = _largest([*(error.abs().max() for error in errors), norm])
    return Statement("frames are orthonormal, U = P V, X(0) = prod eps U V^T", "Theorem 2.1, Section 2.3", residual, 1e-12)


@_statement
def parameter_count(seed: int = 0, *, broken: bool = False) -> Statement:
    """Compressed: ``(m + n) k + L k^2`` numbers, of which ``L k^2`` are trained in (9). Broken: a narrow model is counted."""
    loss = SquaredLoss(_target(_generator(seed)))
    model, k = DeepFactorization(3, SIZE, generator=_generator(seed)), 2 * RANK
    counted = DeepFactorization(3, SIZE, k) if broken else model.compress(loss, k)
    count = sum(parameter.numel() for parameter in counted.parameters())
    inner = sum(parameter.numel() for parameter in counted.weights)
    residual = abs(count - 2 * SIZE * k - 3 * k * k) + abs(inner - 3 * k * k)
    return Statement("2 d k + L k^2 parameters, k = 2rh", "Section 2.3", float(residual), 0.0)


# ---------------------------------------------------------------------- low-rank bias


@_statement
def lemma_sandwich(seed: int = 0, *, broken: bool = False) -> Statement:
    """Lemma E.2's bounds of rho(t), and the tighter lower one, at the largest rate allowed and half of it.

    Broken: rho of a start 1 % larger.
    """
    worst = 0.0
    for depth in (2, 3, 4):
        for scale in (1.0, 0.5, 0.05):
            for decay in (0.0, 0.1, 1.0):
                for share in (0.5, 1.0):
                    rate = share / (decay + scale)
                    lower, tight, upper = lemma_bounds(scale, depth, learning_rate=rate, steps=60, weight_decay=decay)
                    start = [scale * (1.01 if broken else 1.0)] * depth
                    rho = rho_trajectory(start, learning_rate=rate, steps=60, weight_decay=decay)[:, 0]
                    worst = max(worst, *(float(gap.max()) / scale for gap in (lower - tight, tight - rho, rho - upper)))
    return Statement("eps (1 - eta (lam + eps))^t <= rho(t) <= eps (1 - eta lam)^t", "Lemma E.2, (19)", worst, 1e-13)


@_statement
def decay_gives_low_rank(seed: int = 0, *, broken: bool = False) -> Statement:
    """With weight decay the product ends with rank at most 2 r. Broken: no weight decay."""
    generator = _generator(seed)
    loss = SquaredLoss(_target(generator))
    worst = 0.0
    for depth in (2, 3):
        model = DeepFactorization(depth, SIZE, init_scale=0.7, generator=generator)
        train(model, loss, learning_rate=0.3, weight_decay=0.0 if broken else 0.1, steps=500, check_every=500)
        s = torch.linalg.svdvals(model().detach())
        worst = max(worst, float(s[2 * RANK] / s[0]))
    return Statement("lam > 0: singular value 2r + 1 of X vanishes (share of s_1)", "Section 2.2, E.2", worst, 1e-10)


@_statement
def rank_is_bounded(seed: int = 0, *, broken: bool = False) -> Statement:
    """A compressed model never exceeds rank 2 rh, also where the outer factors are trained. Broken: the full-width one."""
    loss, model = _masked(seed)
    trained = model if broken else model.compress(loss, 2 * RANK)
    worst = 0.0
    for _ in range(5):
        train(trained, loss, learning_rate=0.5, gamma=0.1, steps=40, check_every=40)
        s = torch.linalg.svdvals(trained().detach())
        worst = max(worst, float(s[2 * RANK] / s[0]))
    return Statement("rank(X_C(t)) <= 2rh (singular value 2rh + 1 over s_1)", "Section 3, (11)", worst, 1e-12)


# ---------------------------------------------------------------------- gradients


@_statement
def gradient_formula(seed: int = 0, *, broken: bool = False) -> Statement:
    """(14) against autograd and central differences, for L = 2, 3, 4 and three losses. Broken: one factor is disturbed."""
    residual = 0.0
    for depth in (2, 3, 4):
        generator = _generator(seed, depth)
        model = DeepFactorization(depth, (9, 7), 8, init_scale=0.8, generator=generator)
        target = torch.randn(9, 7, generator=generator, dtype=F64)
        mask = torch.rand(9, 7, generator=generator) < 0.5
        losses: tuple[Loss, ...] = (SquaredLoss(target), SquaredLoss(target, mask, reduction="mean"), _log_cosh)
        for loss in losses:
            direction = [torch.randn(w.shape, generator=generator, dtype=F64) for w in model.weights]
            wanted = torch.autograd.grad(_value(loss, model()), list(model.weights))
            factors = [w.detach().clone() for w in model.weights]
            if broken:
                factors[0] += 1e-3
            gradient = product_gradient(loss, model())[1]
            got = layer_gradients(factors, gradient)
            residual = _largest([residual, *((a - b).norm() / b.norm() for a, b in zip(got, wanted, strict=True))])
            step = 1e-5
            ends = [
                _value(
                    loss, paper.product([w.detach() + sign * step * x for w, x in zip(model.weights, direction, strict=True)])
                )
                for sign in (1, -1)
            ]
            slope = sum(float((a * b).sum()) for a, b in zip(got, direction, strict=True))
            difference = float(ends[0] - ends[1]) / (2 * step)
            size = sum(float(a.norm() * b.norm()) for a, b in zip(got, direction, strict=True))
            residual = _largest([residual, 1e-3 * abs(slope - difference) / size])  # differences are exact to 1e-9
    return Statement("dl/dW_l = W_{L:l+1}^T D W_{l-1:1}^T", "(14)", residual, 1e-11)


def _log_cosh(x: Tensor) -> Tensor:
    return torch.log(torch.cosh(x - 0.3)).sum()


def _value(loss: Loss, x: Tensor) -> Tensor:
    return loss(x)


@_statement
def completion_gradients(seed: int = 0, *, broken: bool = False) -> Statement:
    """The op's gradients of (11) against ``dU = E V C^T``, ``dV = E^T U C`` and (14) in the compressed coordinates.

    Broken: another mask.
    """
    loss, model = _masked(seed)
    left, core, right = model.compress(loss, 2 * RANK).compressed_factors()
    got = completion_loss_and_gradients(left, core, right, loss.entries)[1]
    mask = torch.ones_like(loss.target) if broken or loss.weights is None else loss.weights
    product = paper.product(list(core))
    error = mask * (left @ product @ right - loss.target)
    wanted_core = torch.stack(layer_gradients(list(core), left.t() @ error @ right.t()))
    wanted = (error @ right.t() @ product.t(), wanted_core, product.t() @ left.t() @ error)
    pairs = zip((got.left, got.core, got.right), wanted, strict=True)
    residual = _largest((a - b).norm() / b.norm() for a, b in pairs if a is not None)
    return Statement("gradients of the completion op on (11)", "(11), (14)", residual, 1e-11)


@_statement
def nonlinear_gradients(seed: int = 0, *, broken: bool = False) -> Statement:
    """ReLU, L = 3: ``G_2 = [h(W_2 s(W_1)) . (W_3^T E)] s(W_1)^T`` and its neighbours. Broken: the step function left out."""
    generator = _generator(seed)
    model = DeepFactorization(3, 8, init_scale=0.9, activation="relu", generator=generator)
    loss = SquaredLoss(_target(generator, size=8))
    first, second, third = (w.detach() for w in model.weights)
    a, b = first.relu(), (second @ first.relu()).relu()
    error = third @ b - loss.target
    inner = (third.t() @ error) * (1.0 if broken else (b > 0).double())
    wanted = ((second.t() @ inner) * (a > 0), inner @ a.t(), error @ b.t())
    got = gradients(model, loss)[1]
    residual = _largest((x - y).norm() / y.norm() for x, y in zip(got, wanted, strict=True))
    return Statement("gradients of the ReLU factorization", "Section 5, (13)", residual, 1e-13)


# ---------------------------------------------------------------------- completion


def _masked(seed: int) -> tuple[SquaredLoss, DeepFactorization]:
    """A target of which 60 % is observed, and a full-width model at its start."""
    generator = _generator(seed, 7)
    target = _target(generator)
    mask = torch.rand(SIZE, SIZE, generator=generator) < 0.6
    return SquaredLoss(target, mask), DeepFactorization(3, SIZE, init_scale=0.3, generator=generator)


@_statement
def frozen_factors(seed: int = 0, *, broken: bool = False) -> Statement:
    """gamma = 0: left and right stay bit for bit, and X in their spans. Broken: gamma = 1e-2."""
    loss, model = _masked(seed)
    twin = model.compress(loss, 2 * RANK)
    left, _, right = (x.clone() for x in twin.compressed_factors())
    train(twin, loss, learning_rate=0.5, gamma=1e-2 if broken else 0.0, steps=50)
    assert twin.left is not None
    assert twin.right is not None
    x = twin().detach()
    changed = float((twin.left.detach() - left).abs().max() + (twin.right.detach() - right).abs().max())
    outside = float((x - left @ (left.t() @ x @ right.t()) @ right).norm() / x.norm())
    residual = changed + (outside if outside > 1e-13 else 0.0)
    return Statement("gamma = 0: U and V bit for bit, X in their spans", "Section 3, (11)", residual, 0.0)


def _turned(seed: int, adam: bool, by: float = 1.0) -> float:
    """Train a twin and the same twin in a turned basis; the largest relative distance of their products."""
    loss, model = _masked(seed)
    twin = model.compress(loss, 2 * RANK)
    left, core, right = twin.compressed_factors()
    turn = paper.haar(2 * RANK, 2 * RANK, generator=_generator(seed, 8), dtype=F64)
    other = DeepFactorization.from_factors(CompressedFactors(left @ turn, by * (turn.t() @ core @ turn), turn.t() @ right))
    optimizer = (lambda groups: torch.optim.Adam(groups)) if adam else None
    rate, worst = (0.02 if adam else 0.5), 0.0
    runs = [Descent(m, loss, learning_rate=rate, gamma=0.1, optimizer=optimizer) for m in (twin, other)]
    for _ in range(120):
        for run in runs:
            run.step()
        a, b = twin().detach(), other().detach()
        worst = _largest([worst, (a - b).norm() / a.norm()])
    return worst


@_statement
def rotation_equivariance(seed: int = 0, *, broken: bool = False) -> Statement:
    """Gradient descent from (U Q, Q^T C Q, Q^T V^T) gives the same X(t). Broken: cores 0.1 % larger."""
    residual = _turned(seed, adam=False, by=1.001 if broken else 1.0)
    return Statement("gradient descent does not depend on the basis", "Proposition 2.2, proof", residual, 1e-10)


@_statement
def adam_depends_on_the_basis(seed: int = 0, *, broken: bool = False) -> Statement:
    """Adam from a turned basis gives another X(t). Broken: gradient descent instead."""
    residual = _turned(seed, adam=not broken)
    return Statement("Adam does depend on the basis (relative distance)", "ours", residual, 1e-2, at_least=True)


@_statement
def all_observed(seed: int = 0, *, broken: bool = False) -> Statement:
    """Completion with a full mask is the factorization. Broken: an entry is not observed."""
    model = _masked(seed)[1]
    target = _target(_generator(seed, 7))
    mask = torch.ones_like(target)
    if broken:
        mask[0, 0] = 0
    losses = SquaredLoss(target), SquaredLoss(target, mask)
    products = []
    for each in losses:
        twin = model.compress(losses[0], 2 * RANK)
        train(twin, each, learning_rate=0.3, gamma=0.0, steps=80)
        products.append(twin().detach())
    residual = float((products[0] - products[1]).norm() / products[0].norm())
    return Statement("a full mask gives the factorization", "(10), (2)", residual, 1e-12)


@_statement
def mean_and_sum(seed: int = 0, *, broken: bool = False) -> Statement:
    """Mean loss with eta d^2 and lam / d^2 gives the iterates of the sum loss. Broken: lam is left as it was."""
    loss, _ = _masked(seed)
    count, decay = SIZE * SIZE, 0.01
    products = []
    for mean in (False, True):
        model = _masked(seed)[1]
        each = SquaredLoss(loss.target, loss.weights, reduction="mean" if mean else "sum")
        lam = decay / count if mean and not broken else decay
        rate = 0.5 * count if mean else 0.5
        train(model, each, learning_rate=rate, weight_decay=lam, steps=80, check=False)
        products.append(model().detach())
    residual = float((products[0] - products[1]).norm() / products[0].norm())
    return Statement("mean loss with eta d^2, lam / d^2 is the sum loss", "Section 3, code of the paper", residual, 1e-11)


@_statement
def masked_operator(seed: int = 0, *, broken: bool = False) -> Statement:
    """The masked gradient as an operator is the matrix ``-Omega . Phi``. Broken: the mask is left out."""
    loss = _masked(seed)[0]
    generator = _generator(seed, 9)
    x = torch.randn(SIZE, 4, generator=generator, dtype=F64)
    operator = masked_gradient(loss.entries)
    dense = -(_target(_generator(seed, 7)) if broken else loss.target)
    pairs = ((operator.matmul(x), dense @ x), (operator.rmatmul(x), dense.t() @ x))
    residual = _largest((a - b).norm() / b.norm() for a, b in pairs)
    return Statement("D = -Omega . Phi at X = 0", "Section 3", residual, 1e-12)


@_statement
def balanced_layers(seed: int = 0, *, broken: bool = False) -> Statement:
    """``W_{l+1}^T W_{l+1} - W_l W_l^T`` is kept up to O(eta): half the rate, half the drift over the same time.

    Broken: weight decay, which shrinks the difference in the flow itself where the scales differ.
    """
    generator = _generator(seed)
    loss = SquaredLoss(_target(generator))
    start = DeepFactorization(3, SIZE, init_scale=(0.5, 0.7, 0.6), generator=generator).state_dict()
    drifts = []
    for rate in (0.02, 0.01):
        model = DeepFactorization(3, SIZE)
        model.load_state_dict(start)
        before = _imbalance(model)
        train(model, loss, learning_rate=rate, weight_decay=0.1 if broken else 0.0, steps=round(4 / rate), check_every=10**6)
        drifts.append(max(float((a - b).norm()) for a, b in zip(_imbalance(model), before, strict=True)))
    residual = abs(drifts[0] / drifts[1] - 2)
    return Statement("W_{l+1}^T W_{l+1} - W_l W_l^T drifts like eta (ratio - 2)", "gradient flow; ours", residual, 0.02)


def _imbalance(model: DeepFactorization) -> list[Tensor]:
    weights = [w.detach() for w in model.weights]
    return [b.t() @ b - a @ a.t() for a, b in pairwise(weights)]


# ---------------------------------------------------------------------- layers


@_statement
def merge_round_trip(seed: int = 0, *, broken: bool = False) -> Statement:
    """A Deep LoRA layer computes the same merged and unmerged; unmerging restores the weight. Broken: merged twice as much."""
    generator = _generator(seed)
    base = nn.Linear(12, 9, dtype=F64)
    layer = DeepLoRALinear.from_linear(base, rank=4, mode="paper", init_scale=0.7, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(9, 12, generator=generator, dtype=F64))
        before, x = layer.weight.clone(), torch.randn(5, 12, generator=generator, dtype=F64)
        wanted = layer(x)
        layer.merge()
        if broken:
            layer.weight.add_(layer.weight - before)
        got = layer(x)
        layer.unmerge()
        back = float((layer.weight - before).abs().max())
    residual = float((got - wanted).norm() / wanted.norm()) + back
    return Statement("merging and unmerging a Deep LoRA layer", "Section 4, (12)", residual, 1e-12)


@_statement
def lora_limit(seed: int = 0, *, broken: bool = False) -> Statement:
    """One core equal to the identity is LoRA: ``left right``. Broken: the core 0.1 % larger."""
    generator = _generator(seed)
    x, left, right = (torch.randn(shape, generator=generator, dtype=F64) for shape in ((5, 12), (9, 3), (3, 12)))
    core = torch.eye(3, dtype=F64)[None] * (1.001 if broken else 1.0)
    wanted = x @ right.t() @ left.t()
    results = (three_factor_linear(x, None, left, core, right), three_factor_linear(x, None, left, None, right))
    residual = _largest((result - wanted).norm() / wanted.norm() for result in results)
    return Statement("a core of identity is LoRA", "Section 4", residual, 1e-13)

"""The factorization itself: full width, narrow and compressed are one class that differs in its shapes.

full width and narrow:  X = W_L s(W_{L-1} ... s(W_1))             W_1 (w, n), W_L (m, w), the others (w, w)
compressed:             X = left C_L s(C_{L-1} ... s(C_1 right))  left (m, k), C_l (k, k), right (k, n)

s is the identity but in the experimental nonlinear factorizations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..compression import CompressedFactors, top_singular_vectors
from ..reference.compression import haar, implicit_form
from .losses import Loss, SquaredLoss, product_gradient

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
Activation = str | Callable[[Tensor], Tensor] | None


class DeepFactorization(nn.Module):
    r"""A product of L matrices, started at scaled orthogonal matrices: the model of the paper's theory.

    .. math:: X = f(\Theta) = W_L \cdots W_1, \qquad W_l(0) = \epsilon_l Q_l, \qquad Q_l^T Q_l = I

    Args:
        depth: number L of factors, at least 2.
        shape: of the product, ``(m, n)``, or d for ``(d, d)``.
        width: inner width w; None: full width, ``max(m, n)``. Below ``min(m, n)`` it is the paper's narrow factorization.
        init_scale: epsilon of all layers, or L of them, from ``W_1`` to ``W_L``.
        activation: s between the layers (experimental): ``relu``, ``leaky_relu``, ``gelu``, ``silu``, ``tanh`` or a function of
            a tensor; None: linear, the setting of the theory.
        generator: a CPU ``torch.Generator``; the same seed gives the same start on every device.
        dtype, device: of the parameters; float64 on the CPU by default.

    Calling the model gives X ``(m, n)``. Parameters: ``weights`` ``[W_1, ..., W_L]``, and ``left`` and ``right`` in the
    compressed form that :meth:`compress` makes, None else.

    Raises:
        ValueError: a depth below 2, an empty shape, a width below 1, scales that are not positive and finite or not L of
            them, an unknown activation.

    Note:
        Theorem 2.1 and what follows from it need a square target and full width. Rectangular factors are cropped
        orthogonal matrices, as in the authors' code; nothing is claimed of them.

    Example:
        >>> import torch
        >>> from lowrank_kernels.factorization import DeepFactorization, SquaredLoss, train
        >>> g = torch.Generator().manual_seed(0)
        >>> target = torch.randn(20, 1, generator=g).double() @ torch.randn(1, 20, generator=g).double()
        >>> loss = SquaredLoss(target)
        >>> model = DeepFactorization(3, 20, init_scale=0.1, generator=g)
        >>> twin = model.compress(loss, rank=2)
        >>> twin
        DeepFactorization(compressed, shape=(20, 20), depth=3, width=2, init_scale=(0.1, 0.1, 0.1))
        >>> for each in (model, twin):
        ...     print(train(each, loss, learning_rate=0.005, steps=1000).loss < 1e-5)
        True
        True
        >>> (model() - twin()).norm().item() <= 18**0.5 * 0.1**3
        True

    Source: Yaras et al., ICML 2024, arXiv:2406.04112, equations (1), (3), (9) and (13).
    """

    left: nn.Parameter | None
    right: nn.Parameter | None

    def __init__(
        self,
        depth: int,
        shape: int | tuple[int, int],
        width: int | None = None,
        init_scale: float | Sequence[float] = 1e-3,
        *,
        activation: Activation = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        m, n = (shape, shape) if isinstance(shape, int) else shape
        if depth < 2:
            raise ValueError(f"DeepFactorization: depth must be at least 2 (a single matrix factorizes nothing), got {depth}")
        if m < 1 or n < 1:
            raise ValueError(f"DeepFactorization: shape must be (m, n) with both at least 1, got {(m, n)}")
        width = max(m, n) if width is None else width
        if width < 1:
            raise ValueError(f"DeepFactorization: width must be at least 1, or None for full width, got {width}")
        self._set(_scales(init_scale, depth), activation)
        sizes = [n, *[width] * (depth - 1), m]
        self.weights = nn.ParameterList(
            nn.Parameter((scale * _orthogonal(rows, columns, generator)).contiguous().to(device, dtype))
            for scale, rows, columns in zip(self.init_scale, sizes[1:], sizes[:-1], strict=True)
        )
        self.left = self.right = None

    def _set(self, init_scale: tuple[float, ...], activation: Activation) -> None:
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"DeepFactorization: activation must be one of {known}, a function or None, got {activation!r}")
        self.init_scale = init_scale
        self.activation = activation
        self._function = ACTIVATIONS[activation] if isinstance(activation, str) else activation

    @classmethod
    def from_factors(cls, factors: CompressedFactors, *, activation: Activation = None) -> DeepFactorization:
        """The compressed form of given factors, such as those of :func:`lowrank_kernels.compress`; they are copied.

        Raises:
            ValueError: fewer than 2 cores, shapes that do not chain.

        Example:
            >>> import torch, lowrank_kernels as lrk
            >>> from lowrank_kernels.factorization import DeepFactorization
            >>> DeepFactorization.from_factors(lrk.compress(torch.eye(6), rank=4, init_scale=0.1)).form
            'compressed'
        """
        left, core, right = (x.detach() for x in factors)
        if core.ndim != 3 or core.shape[0] < 2:
            raise ValueError(
                f"from_factors: core must be (depth, k, k) with a depth of at least 2, got shape {tuple(core.shape)}"
            )
        k = core.shape[1]
        if core.shape[2] != k or left.shape[1:] != (k,) or right.shape[:1] != (k,):
            shapes = ", ".join(str(tuple(x.shape)) for x in (left, core, right))
            raise ValueError(f"from_factors: left, core and right must be (m, k), (depth, k, k) and (k, n), got {shapes}")
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        scales = torch.linalg.matrix_norm(core.double(), 2).tolist()
        model._set(tuple(scales), activation)
        model.weights = nn.ParameterList(nn.Parameter(layer.clone()) for layer in core)
        model.left = nn.Parameter(left.clone())
        model.right = nn.Parameter(right.t().contiguous().clone().t())  # its columns are contiguous: the op's layout
        return model

    # ------------------------------------------------------------------ what it is

    @property
    def depth(self) -> int:
        return len(self.weights)

    @property
    def shape(self) -> tuple[int, int]:
        first, last = (
            (self.weights[0] if self.right is None else self.right),
            (self.weights[-1] if self.left is None else self.left),
        )
        return last.shape[0], first.shape[1]

    @property
    def width(self) -> int:
        """Inner width: w, or k of the compressed form."""
        return self.weights[0].shape[0]

    @property
    def form(self) -> str:
        """``"full-width"``, ``"narrow"`` (below ``max(m, n)``) or ``"compressed"``."""
        if self.left is not None:
            return "compressed"
        return "full-width" if self.width >= max(self.shape) else "narrow"

    @property
    def linear(self) -> bool:
        return self._function is None

    def factors(self) -> list[nn.Parameter]:
        """All factors in the order in which they are applied: right (compressed form), ``W_1 ... W_L``, left."""
        outer = ([] if self.right is None else [self.right], [] if self.left is None else [self.left])
        return [*outer[0], *self.weights, *outer[1]]

    def compressed_factors(self) -> CompressedFactors:
        """``(left, core, right)`` of the compressed form, for the ops and solvers; core is a copy.

        Raises:
            ValueError: another form.
        """
        if self.left is None or self.right is None:
            raise ValueError(f"compressed_factors: the model must be in the compressed form, this one is {self.form}")
        return CompressedFactors(self.left.detach(), torch.stack([w.detach() for w in self.weights]), self.right.detach())

    def extra_repr(self) -> str:
        activation = "" if self.linear else f", activation={self.activation!r}"
        scales = ", ".join(f"{scale:.6g}" for scale in self.init_scale)
        return f"{self.form}, shape={self.shape}, depth={self.depth}, width={self.width}, init_scale=({scales}){activation}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    # ------------------------------------------------------------------ what it computes

    def forward(self) -> Tensor:
        """The product X ``(m, n)``."""
        first, *others = self.weights
        x: Tensor
        if self.left is not None and self.right is not None and self._function is None:
            x = first
            for weight in others:
                x = weight @ x
            return self.left @ x @ self.right
        x = first if self.right is None else first @ self.right
        for weight in others:
            x = weight @ (x if self._function is None else self._function(x))
        return x if self.left is None else self.left @ x

    def parameter_groups(
        self, learning_rate: float, *, gamma: float = 1.0, weight_decay: float = 0.0
    ) -> list[dict[str, object]]:
        """For a torch optimizer: the weights at ``learning_rate``, the outer factors at ``gamma`` times it unless it is 0."""
        groups: list[dict[str, object]] = [
            {"params": list(self.weights), "lr": learning_rate, "weight_decay": weight_decay, "name": "weights"}
        ]
        if self.left is not None and gamma > 0:
            outer = {"params": [self.left, self.right], "lr": gamma * learning_rate, "weight_decay": weight_decay}
            groups.append({**outer, "name": "outer"})
        return groups

    # ------------------------------------------------------------------ compression

    @torch.no_grad()
    def compress(
        self, loss: Loss, rank: int, *, truncate: bool = False, generator: torch.Generator | None = None
    ) -> DeepFactorization:
        r"""The compressed twin of this full-width model at its start.

        .. math:: \hat X = U C_L \cdots C_1 V^T, \qquad C_l(0) = \epsilon_l I_k, \qquad
            V = orth[V_{\hat r}(D), P^T U_{\hat r}(D)], \qquad U = P V

        with :math:`P = \prod_l W_l(0) / \epsilon_l` and D the gradient of the loss at X = 0.

        Args:
            loss: what both will be trained on.
            rank: inner width ``k = 2 rh``, even: rh directions of the gradient and their images.
            truncate: allow fewer directions than a fully observed target has: Proposition 2.2 does not hold then.
            generator: of the range finder for the singular vectors; seed 0 by default.

        Returns:
            A compressed :class:`DeepFactorization` with the same activation. With a fully observed square target of rank
            r <= rh, gradient descent on both keeps ``|X - X_hat|_F = sqrt(d - 2 rh) prod rho_l(t)``. That this is at most its
            start, the bound of Proposition 2.2, needs a rate at which no ``|rho_l|`` grows: for one,
            ``eta (lam + prod_{k != l} eps_k^2) <= 2``. At L = 2, eps = (0.1, 1.5), eta = 1, s_1 = 0.5 descent converges and
            passes the bound 1.6-fold on the way.

        Raises:
            ValueError: a model that is not full-width, or not at its start; an odd rank, one above ``min(m, n)``, or one
                below twice the rank of a fully observed target.

        Note:
            The singular vectors and frames are those of :mod:`lowrank_kernels.compression`. For a rectangular product left
            is not orthonormal (P is a partial isometry), as in the authors' code. Of a nonlinear factorization the frames
            are those of the linear one, and s acts on k rows instead of w: experimental, nothing is claimed.

        Source: Yaras et al., ICML 2024, arXiv:2406.04112, sections 2.3 and 3.
        """
        m, n = self.shape
        if self.form != "full-width":
            raise ValueError(
                f"compress: the model must be of full width, {max(m, n)} for shape {(m, n)}; this one is {self.form}"
            )
        if rank < 2 or rank % 2 or rank > min(m, n):
            raise ValueError(
                f"compress: rank must be even and from 2 to min(m, n) = {min(m, n)} (half of it are directions of the "
                f"gradient), got {rank}"
            )
        product = self.weights[0].detach().double() / self.init_scale[0]
        for weight, scale in zip(self.weights[1:], self.init_scale[1:], strict=True):
            product = weight.detach().double() @ product / scale
        small = product if m >= n else product.t()  # orthonormal columns
        probes = torch.randn(small.shape[1], 4, generator=torch.Generator().manual_seed(0), dtype=small.dtype).to(small.device)
        drift = float((small.t() @ (small @ probes) - probes).abs().max())
        if not drift < max(1e-8, min(0.1, 1e4 * torch.finfo(self.weights[0].dtype).eps)):
            raise ValueError(
                f"compress: the model must be at its start, scaled orthogonal factors; it is off by {drift:.2g}: it was "
                "trained or changed; compress before training"
            )
        if isinstance(loss, SquaredLoss) and loss.weights is None and not truncate and rank < 2 * loss.target_rank:
            raise ValueError(
                f"compress: rank must be at least twice the target's numerical rank, {2 * loss.target_rank}, got {rank}; pass "
                "truncate=True to keep the largest directions only"
            )
        gradient = product_gradient(loss, self.weights[0].new_zeros(m, n))[1]
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError("compress: the gradient of the loss at X = 0 must be finite, got NaN or infinity; check the loss")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        u, _, v = top_singular_vectors(gradient, rank // 2, generator=generator)
        left, right = implicit_form(product, u, v)
        eye = torch.eye(rank, dtype=left.dtype, device=left.device)
        core = torch.stack([scale * eye for scale in self.init_scale])
        dtype = self.weights[0].dtype
        return DeepFactorization.from_factors(
            CompressedFactors(left.to(dtype), core.to(dtype), right.to(dtype)), activation=self.activation
        )


def _scales(init_scale: float | Sequence[float], depth: int) -> tuple[float, ...]:
    scales = (init_scale,) * depth if isinstance(init_scale, (int, float)) else tuple(init_scale)
    if len(scales) != depth:
        raise ValueError(
            f"DeepFactorization: init_scale must be one number or one for each of {depth} layers, got {len(scales)}"
        )
    if not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"DeepFactorization: init_scale must be positive and finite, got {init_scale}")
    return tuple(map(float, scales))


def _orthogonal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """Orthonormal columns, or rows where there are fewer rows."""
    if rows < columns:
        return _orthogonal(columns, rows, generator).t()
    return haar(rows, columns, generator=generator, dtype=torch.float64)

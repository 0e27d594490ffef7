"""The ways to parametrize an update: Deep LoRA, LoRA and RandLoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..reference.compression import orthonormal
from .layer import AdapterInfo, AdapterLayer, Factors


def _normal(rows: int, columns: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn on the CPU, in float32 (float64 for float64), so that a seed means the same on every device."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn(rows, columns, generator=generator, dtype=wide, device="cpu")


MODES = ("aligned", "paper")
FIRST_SLOPE = 0.27  # L eps^(L-1): how fast the product of the cores moves at the start of mode "aligned", at any depth


def start_scale(mode: str, depth: int) -> float:
    """The default ``init_scale``: the paper's 1e-3, or the eps with ``depth eps^(depth-1)`` about ``FIRST_SLOPE``.

    It is a multiple of 1/64: half precision holds it, and the product of up to four is exact in float32, the update zero.
    """
    return 1e-3 if mode == "paper" else round(64 * (FIRST_SLOPE / depth) ** (1 / (depth - 1))) / 64 if depth > 1 else 1.0


class DeepLoRA(AdapterLayer):
    method = "deeplora"

    def add_adapter(
        self,
        name: str,
        rank: int = 8,
        depth: int = 3,
        *,
        mode: str = "aligned",
        init_scale: float | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add a named adapter with the options of the constructor; :meth:`set_adapter` makes it active."""
        self._check_rank(rank)
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"{type(self).__name__}: depth must be an integer of at least 1, got {depth!r}")
        if mode not in MODES:
            raise ValueError(f"{type(self).__name__}: mode must be 'aligned' or 'paper', got {mode!r}")
        init_scale = start_scale(mode, depth) if init_scale is None else init_scale
        if not math.isfinite(init_scale):
            raise ValueError(f"{type(self).__name__}: init_scale must be finite, got {init_scale}")
        out_features, in_features = self.matrix_shape
        shapes = {"left": (out_features, rank), "core": (depth, rank, rank), "right": (rank, in_features)}
        info = AdapterInfo(self.method, rank, float(scale), float(dropout), depth, float(init_scale), mode=mode)
        self._add(name, info, shapes, dtype, generator)

    @torch.no_grad()
    def reset_parameters(self, name: str, generator: torch.Generator | None = None) -> None:
        """Random orthonormal frames and cores ``init_scale * I``; in the mode "aligned" the update starts at zero."""
        info, parameters = self._info(name), self.adapter_parameters(name)
        left, core, right = parameters["left"], parameters["core"], parameters["right"]
        if left.is_meta:
            return
        left.copy_(orthonormal(_normal(left.shape[0], left.shape[1], left, generator)))
        right.copy_(orthonormal(_normal(right.shape[1], info.rank, right, generator)).t())
        core.copy_(info.init_scale * torch.eye(info.rank, dtype=core.dtype, device=core.device))  # type: ignore[operator]


class LoRA(AdapterLayer):
    method = "lora"
    _starts_right = False  # left starts at zero; for an embedding right does

    def add_adapter(
        self,
        name: str,
        rank: int = 8,
        *,
        alpha: float = 8.0,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add a named adapter with the options of the constructor; :meth:`set_adapter` makes it active."""
        self._check_rank(rank)
        out_features, in_features = self.matrix_shape
        info = AdapterInfo(self.method, rank, alpha / rank, float(dropout), alpha=float(alpha))
        self._add(name, info, {"left": (out_features, rank), "right": (rank, in_features)}, dtype, generator)

    @torch.no_grad()
    def reset_parameters(self, name: str, generator: torch.Generator | None = None) -> None:
        """PEFT's start: one factor random (kaiming uniform; normal for an embedding), the other zero."""
        parameters = self.adapter_parameters(name)
        left, right = parameters["left"], parameters["right"]
        if left.is_meta:
            return
        if self._starts_right:
            right.zero_()
            left.copy_(_normal(left.shape[0], left.shape[1], left, generator))
        else:
            left.zero_()
            drawn = torch.empty(right.shape, dtype=right.dtype, device="cpu")
            right.copy_(nn.init.kaiming_uniform_(drawn, math.sqrt(5), generator=generator))


class RandLoRA(AdapterLayer):
    method = "randlora"
    lambdas: nn.ParameterDict
    gammas: nn.ParameterDict
    _kinds: Mapping[str, str] = {**AdapterLayer._kinds, "lambdas": "lambdas", "gammas": "gammas"}

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any) -> None:
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}  # no buffers: layers of one shape share them, a seed says all
        super().__init__(base_layer, *args, **options)
        self.register_load_state_dict_post_hook(_follow)

    def add_adapter(
        self,
        name: str,
        rank: int = 32,
        *,
        alpha: float = 64.0,
        dropout: float = 0.0,
        basis_seed: int = 0,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add a named adapter with the options of the constructor; :meth:`set_adapter` makes it active."""
        self._check_rank(rank)
        smaller = min(self.matrix_shape)
        count = -(-smaller // rank)
        scale = alpha / (rank * math.sqrt(count))
        info = AdapterInfo(self.method, rank, scale, float(dropout), alpha=float(alpha), basis_seed=int(basis_seed))
        self._add(name, info, {"lambdas": (rank, count), "gammas": (count, smaller)}, dtype, generator)

    @torch.no_grad()
    def reset_parameters(self, name: str, generator: torch.Generator | None = None) -> None:
        """``lambdas`` zero and ``gammas`` one over the larger side; nothing is drawn, the basis has its own seed."""
        parameters = self.adapter_parameters(name)
        if not parameters["lambdas"].is_meta:
            parameters["lambdas"].zero_()
            parameters["gammas"].fill_(1 / max(self.matrix_shape))
        self._find_basis(name)

    def factors(self, name: str) -> Factors:
        """``left`` and ``right`` with the diagonals folded into that of the smaller side, differentiable in them."""
        info, (outer, inner) = self._info(name), self._bases[name]
        device = self.lambdas[name].device
        if outer.device != device:  # a replica of nn.DataParallel
            outer, inner = outer.to(device), inner.to(device)
        scaled = (self.lambdas[name].t().unsqueeze(-1) * inner * self.gammas[name].unsqueeze(1)).flatten(0, 1)
        out_features, in_features = self.matrix_shape
        left, right = (outer, scaled) if out_features >= in_features else (scaled.t(), outer)
        return Factors(left, None, right, info.scale)

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        del self._bases[name]

    def _find_basis(self, name: str) -> None:
        info, like = self.adapters[name], self.lambdas[name]
        assert info.basis_seed is not None
        self._bases[name] = _basis(self.matrix_shape, info.rank, info.basis_seed, like)

    def _apply(self, fn: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Moved or cast: the basis follows, still shared."""
        result = super()._apply(fn, *args, **keywords)
        _follow(self)
        return result


def _follow(layer: RandLoRA, _: Any = None) -> None:
    """The bases as the parameters are now; those may have been replaced by ``load_state_dict(assign=True)``."""
    for name in layer._bases:
        layer._find_basis(name)


_shared: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()


def _basis(matrix_shape: tuple[int, int], rank: int, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Normal ``[B_0 ... B_{n-1}]`` along the larger side (transposed where that is the input) and A ``(k, min)``."""
    smaller, larger = sorted(matrix_shape)
    width = rank * -(-smaller // rank)
    shapes = ((larger, width) if matrix_shape[0] >= matrix_shape[1] else (width, larger), (rank, smaller))
    if like.is_meta:
        return torch.empty(shapes[0], dtype=like.dtype, device="meta"), torch.empty(shapes[1], dtype=like.dtype, device="meta")
    keys = [(kind, matrix_shape, rank, seed, like.dtype, like.device) for kind in ("outer", "inner")]
    outer, inner = (_shared.get(key) for key in keys)
    if outer is None or inner is None:
        with torch.inference_mode(False):
            generator = torch.Generator().manual_seed(seed)
            inner, outer = (torch.randn(shape, generator=generator, device="cpu").to(like) for shape in reversed(shapes))
        if type(outer) is Tensor:  # not a fake one
            _shared[keys[0]], _shared[keys[1]] = outer, inner
    return outer, inner

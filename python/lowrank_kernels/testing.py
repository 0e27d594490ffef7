"""Cases and the tolerance rule, shared by the tests and the benches.

The rule: a result may be off by at most twice what plain PyTorch is off in the same dtype, measured against a longer one,
plus a few units in the last place for the tensors where plain PyTorch is exact by luck.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _native, ops, reference
from .entries import ObservedEntries

ULPS = 4  # floor of the rule, in units of eps * max |exact|

# ---------------------------------------------------------------------- the tolerance rule


def error_and_limit(got: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest error of ``got`` and the largest one allowed; ``exact`` is float64, ``plain`` has the dtype of ``got``."""
    if exact.numel() == 0:
        return 0.0, 0.0
    scale = float(exact.abs().max())
    plain_error = float((plain.double() - exact).abs().max())
    return float((got.double() - exact).abs().max()), 2 * plain_error + ULPS * torch.finfo(plain.dtype).eps * scale


def check(case: object, got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Raise AssertionError unless every tensor of ``got`` obeys the rule; the message holds the whole case."""
    if got.keys() != exact.keys() or plain.keys() != exact.keys():
        raise AssertionError(f"{case}: results {sorted(got)} and {sorted(plain)}, wanted {sorted(exact)}")
    for name, wanted in exact.items():
        result = got[name]
        if result.shape != wanted.shape or result.dtype != plain[name].dtype:
            raise AssertionError(
                f"{case}: {name} is {tuple(result.shape)} {result.dtype}, wanted {tuple(wanted.shape)} {plain[name].dtype}"
            )
        finite = torch.isfinite(result)
        if not bool(finite.all()):  # a comparison with NaN is False: it would pass for a small error
            raise AssertionError(f"{case}: {name} has {int((~finite).sum())} of {result.numel()} elements that are not finite")
        error, limit = error_and_limit(result, plain[name], wanted)
        if not error <= limit:
            raise AssertionError(
                f"{case}: {name} is off by {error:.3g}, allowed {limit:.3g} (largest element {float(wanted.abs().max()):.3g})"
            )


# ---------------------------------------------------------------------- products of the inner factors, in numpy


def _chains(core: Any, rank: int, dtype: Any) -> list[Any]:
    """``core[l-1] ... core[0]`` for l from 0, the identity, to the depth."""
    chains = [np.eye(rank, dtype=dtype)]
    for layer in () if core is None else core:
        chains.append(layer @ chains[-1])
    return chains


def _chain_gradients(core: Any, chains: list[Any], after: Any) -> Any:
    """Gradients of every ``core[l]``, from ``after``, the gradient of their product."""
    result = np.zeros_like(core)
    for number in range(len(core) - 1, -1, -1):
        result[number] = after @ chains[number].T
        after = core[number].T @ after  # (core[L-1] ... core[l])^T dC
    return result


# ---------------------------------------------------------------------- completion


class CompletionProblem(NamedTuple):
    """The arguments of :func:`lowrank_kernels.ops.completion_loss`."""

    left: Tensor  # (m, k)
    core: Tensor | None  # (L, k, k)
    right: Tensor  # (k, n)
    entries: ObservedEntries
    row_bias: Tensor | None  # (m,)
    col_bias: Tensor | None  # (n,)
    offset: float

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> CompletionProblem:
        def cast(x: Any) -> Any:
            return x.to(dtype=dtype, device=device) if isinstance(x, (Tensor, ObservedEntries)) else x

        return CompletionProblem(*(cast(x) for x in self))

    def factors(self) -> dict[str, Tensor]:
        """What the loss has gradients for, by argument name; those given as None are left out."""
        named = self._asdict()
        names = ("left", "core", "right", "row_bias", "col_bias")
        return {name: named[name] for name in names if named[name] is not None}

    def run(self, function: Callable[..., Tensor], **keywords: Any) -> Tensor:
        """``function(left, core, right, entries, row_bias=, col_bias=, offset=, ...)``."""
        return function(*self[:4], row_bias=self.row_bias, col_bias=self.col_bias, offset=self.offset, **keywords)

    def loss_and_gradients(self, function: Callable[..., Tensor], **keywords: Any) -> dict[str, Tensor]:
        """Loss and gradients by autograd, by name; for :func:`check`."""
        leaves: dict[str, Any] = {name: x.detach().clone().requires_grad_() for name, x in self.factors().items()}
        loss = self._replace(**leaves).run(function, **keywords)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}

    def exact(self) -> dict[str, Tensor]:
        """Loss and gradients by hand-derived formulas in numpy, in float64 or longer; an oracle besides the reference."""
        longer = np.float64 if self.left.dtype == torch.float32 else np.longdouble

        def array(x: Tensor | None) -> Any:
            return None if x is None else x.detach().cpu().numpy().astype(longer)

        row_t, col_t, values_t, weights_t = self.entries.coo()
        row, col = row_t.cpu().numpy(), col_t.cpu().numpy()
        left, right, core = array(self.left), array(self.right).T, array(self.core)
        chains = _chains(core, left.shape[1], longer)
        p = left @ chains[-1]
        error = (p[row] * right[col]).sum(1) + longer(self.offset) - array(values_t)
        for bias, index in ((self.row_bias, row), (self.col_bias, col)):
            error = error if bias is None else error + array(bias)[index]
        weighted = error if weights_t is None else array(weights_t) * error
        dp, dv = np.zeros_like(p), np.zeros_like(right)
        np.add.at(dp, row, weighted[:, None] * right[col])
        np.add.at(dv, col, weighted[:, None] * p[row])
        results = {"loss": (weighted * error).sum() / 2, "left": dp @ chains[-1].T, "right": dv.T}
        if core is not None:
            results["core"] = _chain_gradients(core, chains, left.T @ dp)
        for name, bias, index in (("row_bias", self.row_bias, row), ("col_bias", self.col_bias, col)):
            if bias is not None:
                results[name] = np.zeros(bias.shape[0], dtype=longer)
                np.add.at(results[name], index, weighted)
        return {name: torch.from_numpy(np.array(x, dtype=np.float64)) for name, x in results.items()}


@dataclass(frozen=True)
class CompletionCase:
    """One completion problem: sizes, what it has, and where its entries lie; seeded by its own name."""

    m: int
    n: int
    k: int
    count: int  # Z
    depth: int | None = 3  # L; None: no core
    weights: bool = False
    biases: bool = False
    dtype: torch.dtype = torch.float32
    pattern: str = "uniform"  # or "gaps": every third row and column has no entry; "row", "column": all in one

    def __str__(self) -> str:
        depth = "none" if self.depth is None else str(self.depth)
        extras = "w" * self.weights + "b" * self.biases
        parts = ["f64" if self.dtype == torch.float64 else "f32", f"M{self.m}", f"N{self.n}", f"K{self.k}", f"Z{self.count}"]
        parts += [f"L{depth}"] + [extras] * bool(extras) + [self.pattern] * (self.pattern != "uniform")
        return "-".join(parts)

    def problem(self, device: torch.device | str = "cpu") -> CompletionProblem:
        """The same numbers on every machine; predictions of order 1, values about 3: few errors cancel to nearly nothing."""
        generator = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        row, col = self._cells(generator)
        weights = torch.rand(len(row), generator=generator, dtype=torch.float64) * 2 if self.weights else None
        entries = ObservedEntries.from_coo(row, col, 3 + normal(len(row)), shape=(self.m, self.n), weights=weights)
        k = self.k
        full = CompletionProblem(
            normal(self.m, k),
            None if self.depth is None else normal(self.depth, k, k) / k**0.5,
            normal(k, self.n) / k**0.5,
            entries,
            normal(self.m) if self.biases else None,
            normal(self.n) if self.biases else None,
            0.25 if self.biases else 0.0,
        )
        return full.to(self.dtype, device)

    def _cells(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        row, col = (x.flatten() for x in torch.meshgrid(torch.arange(self.m), torch.arange(self.n), indexing="ij"))
        if self.pattern == "gaps":
            keep = (row % 3 != 0) & (col % 3 != 1)
        elif self.pattern == "row":
            keep = row == self.m // 2
        elif self.pattern == "column":
            keep = col == self.n // 2
        elif self.pattern == "uniform":
            keep = torch.ones_like(row, dtype=torch.bool)
        else:
            raise ValueError(f"CompletionCase: pattern must be 'uniform', 'gaps', 'row' or 'column', got {self.pattern!r}")
        row, col = row[keep], col[keep]
        if len(row) < self.count:
            raise ValueError(f"CompletionCase: {self} has room for {len(row)} entries only")
        chosen = torch.randperm(len(row), generator=generator)[: self.count]  # in no order
        return row[chosen], col[chosen]


def _completion_cases() -> list[CompletionCase]:
    sizes: list[dict[str, Any]] = []
    # Every width of interest: below, at and above the vector widths (4 to 16 numbers) and the 8 vectors kept in registers.
    widths = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100, 127, 130, 256)
    depths = (3, None, 1, 0, 2, 4)
    for number, k in enumerate(widths):
        sizes.append(
            {
                "m": (57, 33, 64, 101)[number % 4],
                "n": (91, 40, 65, 29)[number % 4],
                "k": k,
                "count": (611, 500, 1024, 777)[number % 4],
                "depth": depths[number % 6],
                "weights": number % 2 == 0,
                "biases": number % 3 != 1,
            }
        )
    sizes.append({"m": 9, "n": 11, "k": 1024, "count": 40, "depth": 1, "weights": True, "biases": True})
    # The smallest problems, one row or column, rows and columns without entries, rows of every length modulo 4.
    sizes.append({"m": 1, "n": 1, "k": 1, "count": 1, "depth": None})
    sizes.append({"m": 1, "n": 1, "k": 5, "count": 1, "depth": 3, "weights": True, "biases": True})
    sizes.append({"m": 1, "n": 97, "k": 6, "count": 53, "depth": 2, "biases": True})
    sizes.append({"m": 89, "n": 1, "k": 10, "count": 47, "depth": None, "weights": True})
    sizes.append({"m": 60, "n": 70, "k": 12, "count": 300, "depth": 3, "biases": True, "pattern": "gaps"})
    sizes.append({"m": 60, "n": 70, "k": 24, "count": 70, "depth": 1, "weights": True, "pattern": "row"})
    sizes.append({"m": 60, "n": 70, "k": 40, "count": 59, "depth": 4, "biases": True, "pattern": "column"})
    sizes.append({"m": 13, "n": 17, "k": 4, "count": 221, "depth": 2, "weights": True, "biases": True})  # all observed
    sizes.append({"m": 700, "n": 400, "k": 20, "count": 30000, "depth": 3, "weights": True, "biases": True})  # many units
    cases = [CompletionCase(**size) for size in sizes]
    for size in sizes:  # in float64 the oracle has no BLAS: products of wide cores would take seconds
        depth = 1 if size["k"] >= 64 and size["depth"] else size["depth"]
        cases.append(CompletionCase(**{**size, "depth": depth, "dtype": torch.float64}))
    return cases


COMPLETION_CASES = _completion_cases()


# ---------------------------------------------------------------------- three-factor linear


class ThreeFactorProblem(NamedTuple):
    """The arguments of :func:`lowrank_kernels.ops.three_factor_linear`, and the gradient that comes back."""

    x: Tensor  # (*, N)
    weight: Tensor | None  # (M, N)
    left: Tensor  # (M, k)
    core: Tensor | None  # (L, k, k)
    right: Tensor  # (k, N)
    bias: Tensor | None  # (M,)
    scale: float
    shift: float
    dropout_p: float
    dy: Tensor  # (*, M)
    seed: int = 0  # of torch's generator, from which the dropout mask follows

    def tensors(self) -> dict[str, Tensor]:
        """What the op has gradients for, by argument name; those given as None are left out."""
        names = ("x", "weight", "left", "core", "right", "bias")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def run(self, function: Callable[..., Tensor]) -> Tensor:
        """``function(x, weight, left, core, right, bias=, scale=, shift=, dropout_p=)`` after seeding torch's generator."""
        torch.manual_seed(self.seed)
        return function(*self[:5], bias=self.bias, scale=self.scale, shift=self.shift, dropout_p=self.dropout_p)

    def output_and_gradients(self, function: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Output and gradients by autograd, by name; for :func:`check`."""
        leaves: dict[str, Any] = {name: x.detach().clone().requires_grad_() for name, x in self.tensors().items()}
        y = self._replace(**leaves).run(function)
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy, allow_unused=True, materialize_grads=True)
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def dropout_seed(self) -> int:
        """The seed that :meth:`run` lets the op draw."""
        generator = torch.Generator(self.x.device).manual_seed(self.seed)  # its own: threads share torch's
        return int(torch.randint(0, 2**62, (1,), device=self.x.device, generator=generator))

    def exact(self) -> dict[str, Tensor]:
        """Output and gradients with the update as a dense matrix, in numpy, in float64 or longer; besides the reference."""
        longer = np.longdouble if self.x.dtype == torch.float64 else np.float64

        def array(x: Tensor) -> Any:
            return x.detach().cpu().double().numpy().astype(longer)

        (m, k), n, tokens = self.left.shape, self.x.shape[-1], self.x.shape[:-1].numel()
        left, right = array(self.left), array(self.right)
        x, dy = array(self.x).reshape(tokens, n), array(self.dy).reshape(tokens, m)
        core = None if self.core is None else array(self.core)
        weight = np.zeros((m, n), dtype=longer) if self.weight is None else array(self.weight)
        chains = _chains(core, k, longer)
        product = chains[-1] - self.shift * np.eye(k, dtype=longer)
        delta = left @ (product @ right)
        factors = dropout_factors(self.dropout_seed(), tokens, n, self.dropout_p) if self.dropout_p else longer(1)
        dropped = x * factors
        ddelta = self.scale * (dy.T @ dropped)  # (M, N)
        y = x @ weight.T + self.scale * (dropped @ delta.T)
        results = {
            "y": y if self.bias is None else y + array(self.bias),
            "x": dy @ weight + self.scale * (dy @ delta) * factors,
            "weight": dy.T @ x,
            "left": ddelta @ (product @ right).T,
            "core": None if core is None else _chain_gradients(core, chains, (left.T @ ddelta) @ right.T),
            "right": (left @ product).T @ ddelta,
            "bias": dy.sum(0),
        }
        shapes = {name: tensor.shape for name, tensor in self.tensors().items()} | {"y": self.dy.shape}
        return {name: torch.from_numpy(results[name].astype(np.float64)).reshape(shape) for name, shape in shapes.items()}


def dropout_factors(seed: int, tokens: int, features: int, dropout_p: float) -> Any:
    """0 or ``1 / (1 - p)`` for every element of x ``(tokens, features)``, by the rule of csrc/three_factor.h in numpy."""
    threshold, groups = round(65536 * dropout_p), -(-features // 8)
    row, group = (a.ravel().astype(np.uint64) for a in np.indices((tokens, groups)))
    word = np.uint64(0xFFFFFFFF)
    counter = np.stack([group, row & word, row >> np.uint64(32), np.zeros_like(row)], 1)
    bits = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    halves = np.stack([bits & np.uint64(0xFFFF), bits >> np.uint64(16)], 2).reshape(tokens, 8 * groups)[:, :features]
    return (halves >= threshold) * (65536 / max(65536 - threshold, 1))


def philox4x32(counter: Any, key: tuple[int, int]) -> Any:
    """Philox4x32-10 of ``counter (n, 4)`` uint64 words of 32 bits. Salmon et al., SC 2011, section 4."""
    c0, c1, c2, c3 = counter.T
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> high) ^ c1 ^ np.uint64(k0), b & low, (a >> high) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], 1)


@dataclass(frozen=True)
class ThreeFactorCase:
    """One three-factor problem: sizes, what it has, and dtypes; seeded by its own name."""

    tokens: int | tuple[int, ...]  # T, or the leading dimensions of x
    n: int
    m: int
    k: int
    depth: int | None = 3  # L; None: no core
    weight: bool = True
    bias: bool = True
    scale: float = 0.5
    shift: float = 0.0
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype | None = None  # None: that of x

    def __str__(self) -> str:
        factors = "" if self.factor_dtype in (None, self.dtype) else f"{SHORT[self.factor_dtype]}factors"
        lead = "x".join(map(str, self.lead)) or "none"
        extras = "w" * self.weight + "b" * self.bias
        parts = [SHORT[self.dtype], factors, f"T{lead}", f"N{self.n}", f"M{self.m}", f"K{self.k}"]
        parts += [
            f"L{'none' if self.depth is None else self.depth}",
            extras,
            f"s{self.scale:g}" * (self.scale != 0.5),
            f"shift{self.shift:g}" * (self.shift != 0),
        ]
        return "-".join(part for part in (*parts, f"p{self.dropout_p:g}" * (self.dropout_p > 0)) if part)

    @property
    def lead(self) -> tuple[int, ...]:
        return (self.tokens,) if isinstance(self.tokens, int) else self.tokens

    def problem(self, device: torch.device | str = "cpu") -> ThreeFactorProblem:
        """The same numbers on every machine, and with every shift; base and update both of order 1."""
        seed = zlib.crc32(str(replace(self, shift=0.0)).encode())
        generator = torch.Generator().manual_seed(seed)
        factor_dtype = self.factor_dtype or self.dtype

        def normal(*size: int, width: int = 1, dtype: torch.dtype = self.dtype) -> Tensor:
            return (torch.randn(size, generator=generator, dtype=torch.float64) / max(width, 1) ** 0.5).to(device, dtype)

        n, m, k = self.n, self.m, self.k
        return ThreeFactorProblem(
            normal(*self.lead, n),
            normal(m, n, width=n) if self.weight else None,
            normal(m, k, width=k, dtype=factor_dtype),
            None if self.depth is None else normal(self.depth, k, k, width=k, dtype=factor_dtype),
            normal(k, n, width=n, dtype=factor_dtype),
            normal(m) if self.bias else None,
            self.scale,
            self.shift,
            self.dropout_p,
            normal(*self.lead, m),
            seed,
        )


SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
TOKENS = (0, 1, 2, 7, 63, 65, 129)
FEATURES = (1, 2, 7, 8, 17, 31, 64, 65, 100, 384)
RANKS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 128, 130, 256)
DTYPES: tuple[dict[str, Any], ...] = (
    {"dtype": torch.float32},
    {"dtype": torch.float64},
    *(
        {"dtype": dtype, "factor_dtype": factors}
        for dtype in (torch.bfloat16, torch.float16)
        for factors in (None, torch.float32)
    ),
)


def _three_factor_cases() -> list[ThreeFactorCase]:
    cases = []
    pick = random.Random(0).choice
    for dtypes in DTYPES:
        for k in RANKS:
            # In float64 the oracle has no BLAS: a large product would take seconds.
            features = FEATURES[:-1] if dtypes["dtype"] == torch.float64 else FEATURES
            extras: dict[str, Any] = {
                "weight": pick((True, True, False)),
                "bias": pick((True, False)),
                "scale": pick((0.5, 0.5, 1.0, -0.5)),
            }
            extras |= {"depth": pick((None, 0, 1, 2, 3, 4)), "dropout_p": pick((0.0, 0.0, 0.1, 0.5))}
            extras["shift"] = 0.25 if extras["depth"] else 0.0
            cases.append(ThreeFactorCase(pick(TOKENS[1:]), pick(features), pick(features), k, **extras, **dtypes))
        # One of each kind of x, every leading shape, empty sizes, nothing left of the update.
        tokens: tuple[tuple[int, ...], ...] = ((), (0,), (2, 3), (2, 1, 5), (3, 0, 2))
        cases += [ThreeFactorCase(lead, 17, 31, 5, dropout_p=0.1 * (len(lead) % 2), **dtypes) for lead in tokens]
        cases += [ThreeFactorCase(7, 0, 9, 3, **dtypes), ThreeFactorCase(7, 9, 0, 3, **dtypes)]
        cases += [ThreeFactorCase(7, 31, 17, 8, scale=0.0, **dtypes), ThreeFactorCase(7, 31, 17, 8, dropout_p=1.0, **dtypes)]
        cases.append(ThreeFactorCase(129, 384, 65, 16, dropout_p=0.1, **dtypes))
        cases += [ThreeFactorCase(9, 31, 17, 8, depth=depth, shift=-0.5, **dtypes) for depth in (1, 3)]
    return cases


THREE_FACTOR_CASES = _three_factor_cases()


THREE_FACTOR_PATHS = ("chain", *(_native._C.simd_levels() if _native.has_cpu() else ()))


@contextmanager
def three_factor_path(path: str) -> Iterator[None]:
    """Let the op run on ``"chain"``, plain matrix products, or on the native kernels of a SIMD level, whatever is faster."""
    chosen, level = _native.three_factor_serves, _native._C.simd_level() if _native.has_cpu() else None

    def serves(x: Tensor, left: Tensor) -> bool:
        return path != "chain" and left.shape[1] <= _native.MAX_RANK

    try:
        _native.three_factor_serves = serves
        if path != "chain":
            _native._C.set_simd_level(path)
        yield
    finally:
        _native.three_factor_serves = chosen
        if level is not None:
            _native._C.set_simd_level(level)


def error_ratio(cases: Sequence[ThreeFactorCase]) -> tuple[float, int]:
    """Geometric mean over all outputs and gradients of ``error of the op / error of plain PyTorch``, and how many there are.

    Errors are Frobenius norms against float64; below half a unit in the last place both count as that.
    """
    logs = []
    for case in cases:
        problem = case.problem()
        exact, plain = problem.exact(), problem.output_and_gradients(reference.three_factor_linear)
        got = problem.output_and_gradients(ops.three_factor_linear)
        for name, wanted in exact.items():
            floor = torch.finfo(got[name].dtype).eps / 2 * float(wanted.norm())
            if wanted.numel() == 0 or floor == 0:
                continue
            ours, theirs = (max(float((r[name].double() - wanted).norm()), floor) for r in (got, plain))
            logs.append(math.log(ours / theirs))
    return math.exp(sum(logs) / len(logs)), len(logs)


# ---------------------------------------------------------------------- entries as they come in practice


def skewed_entries(m: int, n: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``count`` distinct cells ``(row, col)`` of an ``(m, n)`` matrix in random order, skewed as ratings are.

    Column popularity falls like 1 / (j + 10)^0.9, row activity like 1 / (i + 10)^0.5; both in shuffled order. Cells are drawn
    in bulk through the inverse of the two cumulative sums (2e7 in a few seconds), repeated ones dropped and replaced.
    """
    if not 0 <= count <= m * n:
        raise ValueError(f"skewed_entries: count must be from 0 to m * n = {m * n}, got {count}")
    generator = torch.Generator().manual_seed(seed)
    row_place, col_place = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
    if count > m * n // 8:  # too dense for that: the cells whose exponential clocks ring first (Efraimidis-Spirakis)
        weight = (torch.arange(m) + 10.0)[:, None] ** -0.5 * (torch.arange(n) + 10.0) ** -0.9
        clock = -torch.log1p(-torch.rand(m * n, generator=generator)) / weight.flatten()
        cells = torch.topk(clock, count, largest=False, sorted=False).indices
    else:
        cells = torch.empty(0, dtype=torch.int64)
        while cells.numel() < count:
            missing = count - cells.numel()
            row = _power_law(m, 0.5, missing + missing // 4 + 64, generator)
            col = _power_law(n, 0.9, row.numel(), generator)
            cells = torch.cat([cells, row * n + col])
            cells.numpy().sort()  # twice as fast as torch.unique
            cells = cells[torch.cat([torch.ones(1, dtype=torch.bool), cells[1:] != cells[:-1]])]
    cells = cells[torch.randperm(cells.numel(), generator=generator)[:count]]
    return row_place[cells // n], col_place[cells % n]


def _power_law(size: int, exponent: float, count: int, generator: torch.Generator) -> Tensor:
    """``count`` draws of j in [0, size) with probability about 1 / (j + 10)^exponent, by the integral's inverse."""
    power = 1 - exponent
    low, high = 10.0**power, (size + 10.0) ** power
    draws = torch.rand(count, generator=generator, dtype=torch.float64).mul_(high - low).add_(low).pow_(1 / power).sub_(10)
    return draws.to(torch.int64).clamp_(0, size - 1)

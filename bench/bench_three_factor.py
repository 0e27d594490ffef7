"""A frozen linear layer plus a three-factor update, forward and backward, against the frozen linear layer alone.

    y = x W^T + b + s ((drop(x) R^T) C^T) L^T,    C = core[2] core[1] core[0];    dx, dL, dcore, dR

What counts is the time over the frozen linear layer (which makes y and dx too); no work of the adapter is 1. Useful work: the
two base products, 4 T N M flops, and 6 T k (N + M + k) of the update. The strongest plain contender is the addmm chain: matrix
products in an autograd.Function, in-place addmm, factors rounded to the dtype of x. It must not be faster than ours anywhere.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_kernels as lrk
from lowrank_kernels import testing
from lowrank_kernels.reference.core import core_gradients, core_product

from .harness import Bar, Contender, Outputs, Session, Skipped

DEPTH, SCALE = 3, 0.5
FROZEN, EAGER, CHAIN, COMPILED, PEFT = "frozen linear", "eager chain", "addmm chain", "compiled chain", "PEFT lora.Linear"
OURS = "lowrank_kernels"
SHAPES = ((384, 384), (768, 768), (768, 3072), (3072, 768), (4096, 4096))
TOKENS = (16, 128, 512, 2048)
RANKS = (8, 16, 64)
NOT_SLOWER = Bar("ratio", 0.97, at_least=True)  # than the fastest plain way to do the adapter's work; 3 % is noise here


@dataclass
class Case:
    """One layer and one batch; everything random, from one seed."""

    tokens: int
    n: int
    m: int
    k: int
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.float32
    training: bool = True
    device: str = "cpu"
    seed: int = 0
    sampled: bool = False  # y and dx are compared by rows and by projections: whole float64 products would take long

    def __post_init__(self) -> None:
        g = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape: int, width: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=g, device=self.device).div_(width**0.5).to(dtype)

        t, n, m, k = self.tokens, self.n, self.m, self.k
        self.x, self.dy = normal(t, n, dtype=self.dtype), normal(t, m, dtype=self.dtype)
        self.weight, self.bias = normal(m, n, width=n, dtype=self.dtype), normal(m, dtype=self.dtype)
        self.left, self.right = normal(m, k, width=k), normal(k, n, width=n)
        self.core = normal(DEPTH, k, k, width=k)

    @property
    def name(self) -> str:
        what = "forward and backward" if self.training else "inference"
        dropout = f", dropout {self.dropout_p:g}" if self.dropout_p else ""
        dtype = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}, float32 factors"
        return f"{what}, T={self.tokens}, {self.n} -> {self.m}, k={self.k}{dropout}{dtype}"

    @functools.cached_property
    def exact(self) -> Outputs:
        return oracle(self)

    def sample(self, width: int) -> tuple[Tensor, Tensor]:
        """Rows that are compared whole, and (width, 4) signs: a wrong element changes the projections of its row."""
        g = torch.Generator(self.device).manual_seed(1)
        rows = torch.randperm(self.tokens, generator=g, device=self.device)[:64]
        signs = torch.randint(0, 2, (width, 4), generator=g, device=self.device).double().mul_(2).sub_(1)
        return rows, signs

    @property
    def nbytes(self) -> int:
        """Of everything that a call reads."""
        tensors = (self.x, self.weight, self.bias, self.left, self.core, self.right, *([self.dy] if self.training else []))
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def flops(self) -> float:
        t, n, m, k = self.tokens, self.n, self.m, self.k
        base, update = 2.0 * t * n * m, 2.0 * t * k * (n + m + k)
        return 2 * base + 3 * update if self.training else base + update


# ---------------------------------------------------------------------- the ways to do it


def frozen(case: Case, x: Tensor, *_: Tensor) -> Tensor:
    return F.linear(x, case.weight, case.bias)


def eager(case: Case, x: Tensor, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """As it is usually written; half precision x is cast up to the factors, as PEFT does."""
    z = F.dropout(x.to(right.dtype), case.dropout_p, training=True) if case.dropout_p else x.to(right.dtype)
    product = core_product(core)
    assert product is not None
    update = F.linear(F.linear(F.linear(z, right), product), left) * SCALE
    return F.linear(x, case.weight, case.bias) + update.to(x.dtype)


class Chain(torch.autograd.Function):
    """The addmm chain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, core: Tensor, right: Tensor, case: Case) -> Tensor:
        product = core_product(core)
        assert product is not None
        low = [factor.to(x.dtype) for factor in (left, product, right)]
        mask = torch.empty_like(x).bernoulli_(1 - case.dropout_p).div_(1 - case.dropout_p) if case.dropout_p else None
        z1 = (x if mask is None else x * mask) @ low[2].t()
        z2 = (z1 @ low[1].t()).mul_(SCALE)
        ctx.save_for_backward(x, mask, z1, z2, core, *low)
        ctx.case, ctx.dtype = case, left.dtype
        return torch.addmm(case.bias, z2, low[0].t()).addmm_(x, case.weight.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, z1, z2, core, left, product, right = ctx.saved_tensors
        g2 = (dy @ left).mul_(SCALE)
        g1 = g2 @ product
        dx = g1 @ right
        if mask is not None:
            dx.mul_(mask)
        dright = g1.t() @ (x if mask is None else x * mask)
        dcore = core_gradients(core, (g2.t() @ z1).to(core.dtype))
        return dx.addmm_(dy, ctx.case.weight), (dy.t() @ z2).to(ctx.dtype), dcore, dright.to(ctx.dtype), None


def chain(case: Case, *arguments: Tensor) -> Tensor:
    return Chain.apply(*arguments, case)


def ours(case: Case, x: Tensor, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    return lrk.ops.three_factor_linear(x, case.weight, left, core, right, bias=case.bias, scale=SCALE, dropout_p=case.dropout_p)


def runner(case: Case, function: Callable[..., Tensor], trained: bool = True) -> Callable[[int], Callable[[], Any]]:
    """A call of the layer and its backward pass; or the call alone, without autograd."""

    def make(threads: int) -> Callable[[], Any]:
        x = case.x.detach().requires_grad_(case.training)
        factors = [t.detach().requires_grad_(trained) for t in (case.left, case.core, case.right)]

        def infer() -> Any:
            with torch.no_grad():
                return (function(case, x, *factors),)

        def train() -> Any:
            y = function(case, x, *factors)
            return y, *torch.autograd.grad(y, [x, *(factors if trained else ())], case.dy)

        return train if case.training else infer

    return make


def compiled(case: Case) -> Callable[[int], Callable[[], Any]]:
    def make(threads: int) -> Callable[[], Any]:
        from torch._inductor import config

        torch._dynamo.reset()
        config.cpp.threads = threads  # part of the cache key: code for 1 thread is not used for 2
        return runner(case, torch.compile(eager, dynamic=False))(threads)

    return make


def peft(case: Case) -> Callable[[int], Callable[[], Any]]:
    """PEFT's own layer: two factors, so less work than ours."""

    def make(threads: int) -> Callable[[], Any]:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise Skipped("peft is not installed") from error
        linear = torch.nn.Linear(case.n, case.m, dtype=case.dtype, device=case.device)
        with torch.no_grad():
            linear.weight.copy_(case.weight)
            linear.bias.copy_(case.bias)
        config = LoraConfig(r=case.k, lora_alpha=SCALE * case.k, lora_dropout=case.dropout_p, target_modules=["0"])
        layer = get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]  # type: ignore[arg-type]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            a.copy_(case.right)
            b.copy_(case.left)
        x = case.x.detach().requires_grad_()

        def infer() -> Any:
            with torch.no_grad():
                return (layer(x),)

        def train() -> Any:
            y = layer(x)
            return y, *torch.autograd.grad(y, [x, b, a], case.dy)

        return train if case.training else infer

    return make


# ---------------------------------------------------------------------- correctness


def seen(case: Case, name: str, tensor: Tensor) -> Outputs:
    """What of a result is compared: all of it, or of y and dx of a sampled case rows and projections."""
    if not case.sampled or name not in ("y", "dx"):
        return {name: tensor}
    rows, signs = case.sample(tensor.shape[1])
    return {f"{name} rows": tensor[rows], f"{name} sums": (tensor.double() @ signs).to(tensor.dtype)}


def seen_product(case: Case, name: str, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Outputs:
    """:func:`seen` of ``a @ b + bias``, without the whole product where the case is sampled."""
    bias = a.new_zeros(b.shape[1]) if bias is None else bias
    if not case.sampled:
        return {name: a @ b + bias}
    rows, signs = case.sample(b.shape[1])
    return {f"{name} rows": a[rows] @ b + bias, f"{name} sums": a @ (b @ signs) + bias @ signs}


@torch.no_grad()
def oracle(case: Case) -> Outputs:
    """Float64, by the dense update; names tell the frozen layer and PEFT's two factors from the rest."""
    x, dy, w, left, right = (t.double() for t in (case.x, case.dy, case.weight, case.left, case.right))
    core = case.core.double()
    product = core_product(core)
    assert product is not None
    base = seen_product(case, "y", x, w.t(), case.bias.double()) | seen_product(case, "dx", dy, w)
    z, g = x @ right.t(), dy @ left

    def results(z2: Tensor, g1: Tensor) -> Outputs:
        update = seen_product(case, "y", SCALE * z2, left.t()) | seen_product(case, "dx", SCALE * g1, right)
        whole = {name: base[name] + update[name] for name in base}
        return whole | {"dleft": SCALE * dy.t() @ z2, "dright": SCALE * g1.t() @ x}

    ours = results(z @ product.t(), g @ product) | {"dcore": core_gradients(core, SCALE * (g.t() @ z))}
    ones = {"masked": x.new_ones(3 + DEPTH), "peft masked": x.new_ones(3)}
    ones["masked, ours"] = ones["masked"]  # no rounding to compare with that of the plain ways: another mask
    peft_named = {f"peft {name}": tensor for name, tensor in results(z, g).items()}
    return ours | peft_named | {f"frozen {name}": tensor for name, tensor in base.items()} | ones


ALL = ("y", "dx", "dleft", "dcore", "dright")


def named(case: Case, prefix: str = "", names: tuple[str, ...] = ALL, mask: str = "masked") -> Any:
    """Outputs to check against the oracle; with dropout every contender has a mask of its own, and they are :func:`masked`."""

    def outputs(result: Any) -> Outputs:
        if case.dropout_p and prefix != "frozen ":
            return {f"{prefix}{mask}": masked(case, dict(zip(names, result, strict=True)), prefix)}
        parts = (seen(case, name, tensor.detach()) for name, tensor in zip(names, result, strict=False))
        return {f"{prefix}{name}": tensor for part in parts for name, tensor in part.items()}

    return outputs


def masked(case: Case, got: Outputs, prefix: str) -> Tensor:
    """Ones, as far as backward used the mask of forward.

    The update u = y - base is linear in x and in every factor, for any mask: <dy, u> = <dx - dy W, x> = <dL, L> = <dR, R> =
    <dcore_l, core_l>. A ratio of norms says that the share of x that dropout_p leaves went through.
    """
    wanted, dy = case.exact, case.dy.double()
    update = got["y"].detach().double() - wanted["frozen y"]
    share = float(update.norm() / (wanted["peft y" if prefix else "y"] - wanted["frozen y"]).norm())
    if not 0.75 < share < (1 - case.dropout_p) ** -0.5 + 0.25:
        raise ValueError(f"the dropped update is {share:.3g} times the whole one")
    pairs = [(got["dx"].double() - wanted["frozen dx"], case.x), (got["dleft"], case.left), (got["dright"], case.right)]
    if "dcore" in got:
        pairs += list(zip(got["dcore"], case.core, strict=True))
    unit = dy.norm() * update.norm() / dy.numel() ** 0.5
    return 1 + torch.stack([((a.double() * b.double()).sum() - (dy * update).sum()) / unit for a, b in pairs])


# ---------------------------------------------------------------------- parts


def contenders(
    case: Case, *, compile_too: bool = False, peft_too: bool = False, compiled_by: Callable[..., Any] | None = None
) -> list[Contender]:
    """``compiled_by`` is a compiled :func:`eager` that several cases of one shape share."""
    frozen_names = ("y", "dx") if case.training else ("y",)
    found = [
        Contender(FROZEN, runner(case, frozen, trained=False), named(case, "frozen ", frozen_names)),
        Contender(EAGER, runner(case, eager), named(case), plain=True),
        Contender(CHAIN, runner(case, chain), named(case), plain=True),
        Contender(OURS, runner(case, ours), named(case, mask="masked, ours"), ours=True),
    ]
    if compile_too:
        make = runner(case, compiled_by) if compiled_by else compiled(case)
        found.append(Contender(COMPILED, make, named(case), optional=True))
    if peft_too:
        found.append(Contender(PEFT, peft(case), named(case, "peft ", ("y", "dx", "dleft", "dright")), optional=True))
    return found


def compare(
    session: Session, case: Case, bar: Bar | None = None, at: tuple[int, ...] = (1, 2), seconds: float = 0.5, **which: Any
) -> None:
    bars = [(OURS, threads, NOT_SLOWER) for threads in session.threads]
    if bar:
        bars += [(OURS, threads, bar) for threads in at]
    session.compare(
        "three_factor",
        case.name,
        contenders(case, **which),
        oracle=case.exact,
        against=(EAGER, CHAIN, COMPILED),
        over=FROZEN,
        bars=bars,
        dtype=str(case.dtype).removeprefix("torch."),
        flops=case.flops,
        seconds=seconds,
        min_repeats=3 if seconds <= 0.5 else 9,
    )


def over(limit: float) -> Bar:
    return Bar(f"over {FROZEN}", limit)


def barred(session: Session) -> None:
    """The rows with a bar of their own."""
    if session.quick:
        compare(session, Case(33, 48, 40, 16), over(100.0), peft_too=True)
        compare(session, Case(33, 48, 40, 16, dropout_p=0.1))
        return
    both = {"compile_too": True, "peft_too": True}
    compare(session, Case(2048, 768, 768, 16), over(1.12), at=(2,), seconds=4.0, **both)
    compare(session, Case(2048, 768, 768, 16, dropout_p=0.1), over(1.20), at=(2,), seconds=4.0, **both)
    compare(session, Case(128, 384, 384, 16), over(1.25), seconds=3.0, **both)
    for tokens in (1, 2, 4, 8, 16):
        compare(session, Case(tokens, 4096, 4096, 16, training=False), over(1.10), seconds=2.0)


def half(session: Session) -> None:
    """bfloat16 x and weight with float32 factors."""
    x, w = torch.ones(64, 512, dtype=torch.bfloat16), torch.ones(512, 512, dtype=torch.bfloat16)
    x @ w
    start = time.perf_counter()
    x @ w
    slow = 2 * 64 * 512 * 512 / (time.perf_counter() - start) < 20e9  # no bfloat16 instructions: the base takes all the time
    tokens = 9 if session.quick else 256 if slow else 2048
    n = 40 if session.quick else 768
    for dropout_p, limit in ((0.0, 1.20), (0.1, 1.35)):
        case = Case(tokens, n, n, 16, dropout_p=dropout_p, dtype=torch.bfloat16)
        compare(session, case, None if session.quick else over(limit), at=(2,), seconds=0.5 if slow else 3.0, peft_too=True)


def grid(session: Session) -> None:
    """All shapes, float32; with dropout on the smaller ones."""
    if session.quick:
        raise Skipped("the quick run shows three small cases instead")
    for n, m in SHAPES:
        for tokens in TOKENS:
            for k in RANKS if tokens * n * m < 1 << 34 else (16,):
                if (tokens, n, m, k) not in ((2048, 768, 768, 16), (128, 384, 384, 16)):
                    compare(session, Case(tokens, n, m, k), peft_too=k == 16)
            if n < 1024 and m < 1024 and (tokens, n) != (2048, 768):
                compare(session, Case(tokens, n, m, 16, dropout_p=0.1))


def saved(session: Session) -> None:
    """Bytes that backward keeps beyond x and the parameters."""
    tokens, n, k = (32, 64, 16) if session.quick else (2048, 1024, 16)
    case = Case(tokens, n, n, k, dropout_p=0.1, dtype=torch.bfloat16)
    limit = 2 * tokens * k * 4 + 8 * (case.dropout_p > 0)  # z1 and z2 in float32, and the seed of the mask
    for name, make in ((OURS, runner(case, ours)), (EAGER, runner(case, eager)), (PEFT, peft(case))):
        try:
            run = make(1)
        except Skipped as reason:
            session.skip(f"saved bytes, {name}", str(reason))
            continue
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run()
        known = [case.x, case.weight, case.bias, case.left, case.core, case.right]
        others = sum(size for pointer, size in storages.items() if pointer not in {t.data_ptr() for t in known})
        if name == PEFT:  # its parameters are copies
            others -= sum(t.numel() * t.element_size() for t in (case.weight, case.left, case.right))
        bars = [Bar("saved MiB beyond x", limit / 2**20)] if name == OURS else []
        case_name = f"saved for backward, T={tokens}, {n} -> {n}, k={k}, bfloat16, float32 factors, dropout 0.1"
        session.record("three_factor", case_name, name, metric="saved MiB beyond x", value=others / 2**20, bars=bars)


def accuracy(session: Session) -> None:
    """Geometric mean over odd shapes of the error against float64, over that of plain PyTorch in the same dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        cases = [c for c in testing.THREE_FACTOR_CASES if c.dtype == dtype]
        ratio, count = testing.error_ratio(cases[:: 8 if session.quick else 1])
        name = str(dtype).removeprefix("torch.")
        session.record(
            "three_factor",
            f"error against float64, {count} results of odd shapes, {name}",
            OURS,
            dtype=name,
            metric="times plain PyTorch's error",
            value=ratio,
            bars=[Bar("times plain PyTorch's error", 1.0)],
        )


PARTS = {"barred": barred, "half": half, "grid": grid, "saved": saved, "accuracy": accuracy}

"""The case tables as calls of the driver, and what their outputs must obey; used on a CPU (test_cuda_on_cpu.py) and a GPU."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank_kernels import reference
from lowrank_kernels.entries import LONG_ROW, SortedEntries
from lowrank_kernels.reference.completion import completion_pass
from lowrank_kernels.reference.core import core_product
from lowrank_kernels.reference.three_factor import drop_threshold
from lowrank_kernels.testing import (
    COMPLETION_CASES,
    DTYPES,
    THREE_FACTOR_CASES,
    CompletionCase,
    ThreeFactorCase,
    check,
    dropout_factors,
)

from .driver import Call

SEEDED = threading.Lock()  # torch's own generator: seeded and drawn from by one thread at a time

# ---------------------------------------------------------------------- completion


class Pass(NamedTuple):
    """The arguments of one pass, before padding."""

    side: SortedEntries
    own: Tensor  # (M, k)
    other: Tensor  # (N, k)
    own_bias: Tensor | None
    other_bias: Tensor | None
    offset: float


@dataclass(frozen=True)
class CompletionRun:
    """One side's pass over the entries of a case."""

    case: CompletionCase
    by: str  # the sorted side: "rows" or "columns"
    wide_index: bool = False
    long_row: int = LONG_ROW  # rows with more entries are done in segments
    loss: bool = True
    grads: bool = True
    zero_entries: bool = False  # none at all, which ObservedEntries refuses and the kernels take

    def __str__(self) -> str:
        extras = [f"long{self.long_row}"] * (self.long_row != LONG_ROW) + ["int64"] * self.wide_index
        extras += ["noloss"] * (not self.loss) + ["nograds"] * (not self.grads) + ["empty"] * self.zero_entries
        return "-".join([str(self.case), self.by, *extras])

    def arguments(self) -> Pass:
        problem = self.case.problem()
        core = core_product(problem.core)
        p = problem.left if core is None else problem.left @ core
        v = problem.right.t().contiguous()
        if self.by == "rows":
            side, rest = problem.entries.by_row, (p, v, problem.row_bias, problem.col_bias)
        else:
            side, rest = problem.entries.by_col, (v, p, problem.col_bias, problem.row_bias)
        if self.zero_entries:
            weights = None if side.weights is None else side.weights[:0]
            side = SortedEntries(side.offsets * 0, side.indices[:0], side.values[:0], weights, side.plan, 0)
        return Pass(side, *rest, problem.offset)

    def call(self) -> Call:
        side, own, other, own_bias, other_bias, offset = self.arguments()
        lanes = 16 // own.element_size()
        own, other = (pad(x, (0, -x.shape[1] % lanes)) for x in (own, other))
        indices = side.indices.to(torch.int64 if self.wide_index else torch.int32)
        plan, long_count = cuda_plan(side.offsets, self.long_row)
        integers = {
            "double": int(own.dtype == torch.float64),
            "wide_index": int(self.wide_index),
            "own_count": own.shape[0],
            "other_count": other.shape[0],
            "entry_count": side.values.shape[0],
            "width": own.shape[1],
            "plan_size": plan.shape[0],
            "long_count": long_count,
            "long_row": self.long_row,
        }
        inputs = {"offsets": side.offsets, "other_index": indices, "values": side.values, "weights": side.weights}
        inputs |= {"own": own, "other": other, "own_bias": own_bias, "other_bias": other_bias, "plan": plan}
        rows = own.shape[0]
        outputs: dict[str, Any] = {"loss": ((), own.dtype)} if self.loss else {}
        if self.grads:
            outputs |= {"own_grad": ((rows, own.shape[1]), own.dtype)}
            outputs |= {"own_bias_grad": ((rows,), own.dtype), "own_loss": ((rows,), own.dtype)}
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        return Call("completion", str(self), integers, {"offset": offset}, given, {}, outputs)

    def check(self, got: dict[str, Tensor]) -> None:
        arguments = self.arguments()
        k = arguments.own.shape[1]
        names = [name for name in ("loss", "own_grad", "own_bias_grad", "own_loss") if name in got]
        kept = {name: got[name][:, :k] if name == "own_grad" else got[name] for name in names}
        plain = dict(zip(("loss", "own_grad", "own_bias_grad", "own_loss"), completion_pass(*arguments), strict=True))
        exact = exact_pass(*arguments)
        check(self, kept, *({name: results[name] for name in names} for results in (plain, exact)))
        if "own_grad" in got:
            assert not got["own_grad"][:, k:].any(), f"{self}: the gradient of the zero padding is not zero"
            empty = arguments.side.offsets.diff() == 0
            assert not any(got[name][empty].any() for name in names if name != "loss"), f"{self}: rows without entries"


def cuda_plan(offsets: Tensor, long_row: int) -> tuple[Tensor, int]:
    """What csrc/completion_cuda.cu calls plan, and the number of long rows."""
    counts = offsets.diff().tolist()
    rows = [row for row, count in enumerate(counts) if count > long_row]
    first, owner = [0], []
    for place, row in enumerate(rows):
        segments = -(-counts[row] // long_row)
        first.append(first[-1] + segments)
        owner += [place] * segments
    return torch.tensor([*rows, *first, *owner], dtype=torch.int64), len(rows)


def exact_pass(
    side: SortedEntries, own: Tensor, other: Tensor, own_bias: Tensor | None, other_bias: Tensor | None, offset: float
) -> dict[str, Tensor]:
    """Loss and sums of one side by the formulas of csrc/completion.h, in float64 or longer."""
    longer = np.float64 if own.dtype == torch.float32 else np.longdouble

    def array(x: Tensor) -> Any:
        return x.numpy().astype(longer)

    i, j = np.repeat(np.arange(own.shape[0]), side.offsets.diff().numpy()), side.indices.numpy().astype(np.int64)
    rows = array(other)[j]
    error = (array(own)[i] * rows).sum(1) + longer(offset) - array(side.values)
    for bias, index in ((own_bias, i), (other_bias, j)):
        error = error if bias is None else error + array(bias)[index]
    weighted = error if side.weights is None else array(side.weights) * error
    sums = {"own_grad": np.zeros(own.shape, longer)}
    sums |= {name: np.zeros(own.shape[0], longer) for name in ("own_bias_grad", "own_loss")}
    np.add.at(sums["own_grad"], i, weighted[:, None] * rows)
    np.add.at(sums["own_bias_grad"], i, weighted)
    np.add.at(sums["own_loss"], i, weighted * error)
    sums["loss"] = (weighted * error).sum() / 2
    return {name: torch.from_numpy(np.array(x, dtype=np.float64)) for name, x in sums.items()}


def _completion_runs() -> list[CompletionRun]:
    runs = []
    for number, case in enumerate(COMPLETION_CASES):
        for side, by in enumerate(("rows", "columns")):
            # Segments of a length that no step of the kernel divides, of one that it does, and none.
            long_row = (LONG_ROW, 13, 32)[(number + side) % 3]
            runs.append(CompletionRun(case, by, (number // 2 + side) % 2 == 1, long_row))
    for dtype in (torch.float32, torch.float64):
        for k in (3, 20, 40, 100, 130):
            case = CompletionCase(23, 31, k, 200, depth=None, biases=True, dtype=dtype)
            runs += [
                CompletionRun(case, "rows", long_row=7, grads=False),
                CompletionRun(case, "columns", long_row=7, loss=False),
            ]
            runs.append(CompletionRun(case, "rows", wide_index=True))
        long = CompletionCase(3, 2600, 10, 2500, depth=None, weights=True, dtype=dtype, pattern="row")
        runs += [CompletionRun(long, "rows"), CompletionRun(long, "columns")]
        runs.append(CompletionRun(CompletionCase(9, 7, 5, 20, dtype=dtype), "rows", zero_entries=True))
    # More blocks than one level of the loss's sum takes.
    runs.append(CompletionRun(CompletionCase(2**18 + 40, 2, 1, 3000, depth=None), "rows"))
    return runs


COMPLETION_RUNS = _completion_runs()


# ---------------------------------------------------------------------- three-factor linear

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/three_factor.h
ALL = (True, True, True, True)
GRADIENTS = {"x": "dx", "left": "dleft", "core": "dcore", "right": "dright"}


@dataclass(frozen=True)
class ThreeFactorRun:
    """Forward and backward of a case, without the base product, which is not the kernels'."""

    case: ThreeFactorCase
    x_gap: int = 0  # numbers between the rows of x, which nobody may read
    dy_gap: int = 0
    shift: int = 0  # where x and dy begin, in numbers after a 16-byte boundary
    wanted: tuple[bool, bool, bool, bool] = ALL  # dx, dleft, dcore, dright

    def __str__(self) -> str:
        wanted = "".join("xlcr"[i] for i in range(4) if self.wanted[i]) or "none"
        extras = [f"xgap{self.x_gap}"] * (self.x_gap > 0) + [f"dygap{self.dy_gap}"] * (self.dy_gap > 0)
        extras += [f"shift{self.shift}"] * (self.shift > 0) + [f"wants-{wanted}"] * (self.wanted != ALL)
        return "-".join(["base" if self.case.weight else "", str(replace(self.case, weight=False)), *extras]).lstrip("-")

    def problem(self) -> Any:
        return replace(self.case, weight=False).problem()

    def call(self) -> Call:
        problem = self.problem()
        x, dy = (t.reshape(self.tokens, t.shape[-1]) for t in (problem.x, problem.dy))
        seed = torch.tensor([problem.dropout_seed()]) if problem.dropout_p else None
        tensors = (x, problem.left, problem.core, problem.right, problem.bias, dy, seed)
        return self.call_of(tensors, problem.scale, problem.shift, problem.dropout_p)

    @property
    def tokens(self) -> int:
        return torch.Size(self.case.lead).numel()

    def call_of(self, tensors: tuple[Tensor | None, ...], scale: float, shift: float, dropout_p: float) -> Call:
        x, left, core, right, bias, dy, seed = tensors
        assert x is not None
        assert left is not None
        assert right is not None
        assert dy is not None
        x, dy = _with_gaps(x, self.x_gap), _with_gaps(dy, self.dy_gap)
        (tokens, n), (m, k), depth = x.shape, left.shape, 0 if core is None else core.shape[0]
        integers = {
            "tokens": tokens,
            "in_features": n,
            "out_features": m,
            "rank": k,
            "depth": depth,
            "type": CODES[x.dtype],
            "factor_type": CODES[left.dtype],
            "x_stride": n + self.x_gap,
            "dy_stride": m + self.dy_gap,
            "drop_threshold": drop_threshold(dropout_p),
            "backward": 1,
        }
        named = {"x": x, "left": left, "core": core if depth else None, "right": right, "bias": bias, "dy": dy, "seed": seed}
        sums = torch.float64 if x.dtype == torch.float64 else torch.float32
        outputs: dict[str, Any] = {"y": ((tokens, m), x.dtype), "z": ((2, tokens, k), sums)}
        shapes = {"dx": (tokens, n), "dleft": (m, k), "dcore": (depth, k, k), "dright": (k, n)}
        for name, wanted in zip(shapes, self.wanted, strict=True):
            if wanted and not (name == "dcore" and core is None):
                outputs[name] = (shapes[name], x.dtype if name == "dx" else left.dtype)
        given = {name: tensor for name, tensor in named.items() if tensor is not None}
        shifts = {"x": self.shift, "dy": self.shift}
        return Call("three_factor", str(self), integers, {"scale": scale, "shift": shift}, given, shifts, outputs)

    def check(self, got: dict[str, Tensor]) -> None:
        problem = self.problem()
        if "dx" in got and problem.dropout_p:
            dropped = torch.from_numpy(self.factors()) == 0
            assert not got["dx"][dropped].any(), f"{self}: dx is not zero where x was dropped"
        with SEEDED:
            plain = problem.output_and_gradients(reference.three_factor_linear)
        exact = problem.exact()
        ours = {"y": got["y"]} | {name: got[output] for name, output in GRADIENTS.items() if output in got}
        ours = {name: tensor.reshape(exact[name].shape) for name, tensor in ours.items()}
        assert torch.isfinite(got["z"]).all(), f"{self}: z is not finite"
        check(self, ours, {name: plain[name] for name in ours}, {name: exact[name] for name in ours})

    def factors(self) -> Any:
        return dropout_factors(self.problem().dropout_seed(), self.tokens, self.case.n, self.case.dropout_p)


@dataclass(frozen=True)
class MaskRun(ThreeFactorRun):
    """x and dy of ones between factors that are the identity: y and dx are the dropout mask itself."""

    SEED: ClassVar[int] = 0x0123456789ABCDEF

    def __str__(self) -> str:
        return f"mask-{super().__str__()}"

    def call(self) -> Call:
        case = self.case
        ones = torch.ones(self.tokens, case.n, dtype=case.dtype)
        eye = torch.eye(case.n, dtype=case.factor_dtype or case.dtype)
        return self.call_of((ones, eye, None, eye, None, ones, torch.tensor([self.SEED])), 1.0, 0.0, case.dropout_p)

    def factors(self) -> Any:
        return dropout_factors(self.SEED, self.tokens, self.case.n, self.case.dropout_p)

    def check(self, got: dict[str, Tensor]) -> None:
        mask = torch.from_numpy(self.factors())
        for name in ("y", "dx"):
            assert torch.equal(got[name] != 0, mask != 0), f"{self}: {name} is another mask"
            torch.testing.assert_close(got[name], mask.to(got[name].dtype))


def _with_gaps(x: Tensor, gap: int) -> Tensor:
    """The same rows, with NaN between them."""
    wide = torch.full((x.shape[0], x.shape[1] + gap), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


HALVES = [dtypes for dtypes in DTYPES if dtypes["dtype"].itemsize == 2]
WIDTHS = {16: (1, 7, 16), 32: (17, 24, 32), 64: (33, 64), 128: (65, 100, 128), 256: (129, 200, 256)}  # ranks of a padded one


def _three_factor_runs() -> list[ThreeFactorRun]:
    runs = [ThreeFactorRun(case) for case in THREE_FACTOR_CASES]
    pick = random.Random(1).choice
    tokens, features = (1, 7, 63, 65, 130), (8, 64, 72, 136, 264)
    for dtypes in HALVES:  # on the tensor cores, every padded rank
        for ranks in WIDTHS.values():
            for k in ranks:
                extras: dict[str, Any] = {"depth": pick((None, 0, 1, 2, 3)), "dropout_p": pick((0.0, 0.1, 0.5))}
                case = ThreeFactorCase(
                    pick(tokens), pick(features), pick(features), k, bias=pick((True, False)), **extras, **dtypes
                )
                runs.append(ThreeFactorRun(case, x_gap=pick((0, 8)), dy_gap=pick((0, 16))))
        # A pitch or an address that tensor cores cannot take, in one of the directions or in both.
        case = ThreeFactorCase(65, 72, 64, 17, depth=2, dropout_p=0.1, **dtypes)
        runs += [ThreeFactorRun(case, x_gap=1), ThreeFactorRun(case, dy_gap=3), ThreeFactorRun(case, shift=1)]
        # dy is read once for all: with and without a core, ranges of t, one row more than a stage.
        for count, m, k, depth in ((130, 264, 16, 1), (129, 136, 8, None), (257, 72, 5, 3)):
            case = ThreeFactorCase(count, 72, m, k, depth=depth, dropout_p=0.1 * (depth == 1), **dtypes)
            runs += [ThreeFactorRun(case), ThreeFactorRun(case, wanted=(False, True, False, False))]
    for dtypes in DTYPES:
        runs.append(ThreeFactorRun(ThreeFactorCase(65, 100, 71, 20, depth=1, **dtypes), x_gap=3, dy_gap=5, shift=1))
        runs += [MaskRun(ThreeFactorCase(70, n, n, n, depth=None, bias=False, dropout_p=0.3, **dtypes)) for n in (104, 101)]
    # Every set of gradients: tensor cores, with dy read once and twice; the plain product.
    for m, k, dtypes in ((264, 16, HALVES[1]), (64, 24, HALVES[2]), (33, 5, DTYPES[0])):
        case = ThreeFactorCase(65 if m < 200 else 130, 72, m, k, depth=2, dropout_p=0.1, **dtypes)
        for bits in range(15):
            runs.append(ThreeFactorRun(case, wanted=(bits & 1 > 0, bits & 2 > 0, bits & 4 > 0, bits & 8 > 0)))
    # Sums over t in several ranges.
    runs += [
        ThreeFactorRun(ThreeFactorCase(700, 24, 16, 8, depth=1, dropout_p=0.1, **dtypes)) for dtypes in (DTYPES[0], HALVES[1])
    ]
    return runs


THREE_FACTOR_RUNS = _three_factor_runs()
RUNS: list[CompletionRun | ThreeFactorRun] = [*COMPLETION_RUNS, *THREE_FACTOR_RUNS]

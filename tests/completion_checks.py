"""What the tests of the completion op share: small problems, and when two results count as the same."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_kernels import _native, ops, reference
from lowrank_kernels.testing import CompletionCase, CompletionProblem

LEVELS = _native._C.simd_levels() if _native.has_cpu() else []
NAMES = ("left", "core", "right", "row_bias", "col_bias")
native = pytest.mark.skipif(not LEVELS, reason=f"no native module: {_native.unavailable}")
raw_op = torch.ops.lowrank_kernels._completion

SMALL = CompletionCase(7, 9, 3, 31, depth=2, weights=True, biases=True)
SMALL64 = CompletionCase(7, 9, 3, 31, depth=2, weights=True, biases=True, dtype=torch.float64)
MANY_UNITS = CompletionCase(700, 400, 20, 30000, depth=3, weights=True, biases=True)


@functools.cache
def oracles(case: CompletionCase) -> tuple[CompletionProblem, dict[str, Tensor], dict[str, Tensor]]:
    problem = case.problem()
    return problem, problem.loss_and_gradients(reference.completion_loss), problem.exact()


def fused(problem: CompletionProblem, **keywords: Any) -> dict[str, Tensor]:
    return problem.loss_and_gradients(ops.completion_loss, **keywords)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"not bitwise the same: {different}"


def close(a: dict[str, Tensor], b: dict[str, Tensor], scale: float = 1.0) -> None:
    """For two computations of the same dtype whose sums run in different orders."""
    for name in a:
        tolerance = (1e-12 if a[name].dtype == torch.float64 else 1e-5) * scale
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance * max([1.0, *b[name].abs().flatten().tolist()])
        )


def flat_arguments(problem: CompletionProblem, by_row: bool = True, by_col: bool = True) -> tuple[Any, ...]:
    product = reference.core.core_product(problem.core)
    p = problem.left if product is None else problem.left @ product
    sides = (*problem.entries.by_row, *problem.entries.by_col)
    v = problem.right.t().contiguous()
    return (p, v, problem.row_bias, problem.col_bias, problem.offset, *sides, by_row, by_col)

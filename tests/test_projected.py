"""GaLore's and ReLoRA's descent: the equivalence under gradient initialization, and where it ends."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_kernels.factorization import galore_descent, relora_descent


def problem(m: int = 12, n: int = 9) -> tuple[Any, Tensor]:
    """A nonlinear loss of a matrix: the gradient's singular vectors turn while it falls."""
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((40, n), (m, n)))
    y = torch.tanh(x @ torch.randn(n, m, generator=g, dtype=torch.float64))

    def gradient(w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        with torch.enable_grad():
            loss = (torch.tanh(x @ w.t()) - y).square().mean()
            return torch.autograd.grad(loss, w)[0]

    return gradient, weight


def run(descent: Any, steps: int, **options: Any) -> list[Tensor]:
    gradient, weight = problem()
    before = weight.clone()
    found = list(itertools.islice(descent(gradient, weight, **options), steps))
    assert torch.equal(weight, before)
    return found


@pytest.mark.parametrize("every", [1, 2, 7, 100])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_with_one_factor_trained_they_are_the_same(every: int, rank: int) -> None:
    options = {"rank": rank, "learning_rate": 2.0, "every": every}
    ours, theirs = run(galore_descent, 40, **options), run(relora_descent, 40, both=False, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_with_both_factors_they_are_the_same_only_where_every_step_restarts() -> None:
    options = {"rank": 2, "learning_rate": 2.0}
    for a, b in zip(run(galore_descent, 40, every=1, **options), run(relora_descent, 40, every=1, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    apart = []
    for rate in (0.2, 0.1):
        ours, theirs = (run(d, 2, every=2, rank=2, learning_rate=rate)[1] for d in (galore_descent, relora_descent))
        apart.append(float((ours - theirs).norm()))
    assert apart[0] > 1e-6  # the counter-example
    assert apart[0] / apart[1] == pytest.approx(8, rel=0.1)  # third order in the rate


def test_at_full_rank_galore_is_gradient_descent() -> None:
    gradient, weight = problem()
    found = run(galore_descent, 20, rank=9, learning_rate=1.0, every=1)
    for w in found:
        weight = weight - gradient(weight)
        torch.testing.assert_close(w, weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("descent", [galore_descent, relora_descent])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank must be from 1 to min\(m, n\) = 9, got 0"),
        ({"rank": 10}, "rank must be from 1 to"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"every": 0}, "every must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_options(descent: Any, options: dict[str, Any], message: str) -> None:
    gradient, weight = problem()
    with pytest.raises(ValueError, match=message):
        next(descent(gradient, weight, **{"rank": 2, "learning_rate": 1.0, "every": 2} | options))
    with pytest.raises(ValueError, match="weight must be a matrix"):
        next(descent(gradient, weight[0], rank=1, learning_rate=1.0, every=1))

"""The compression initializer: its three forms agree, its frames are orthonormal, its trajectory is the paper's."""

import math

import pytest
import torch

import lowrank_kernels as lrk
from lowrank_kernels.compression import aligned_frames, matched_frames, top_singular_vectors
from lowrank_kernels.reference import compression as paper


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def low_rank(m, n, r, seed=0):
    g = generator(seed)
    return torch.randn(m, r, generator=g, dtype=torch.float64) @ torch.randn(r, n, generator=g, dtype=torch.float64)


def principal_angle(a, b):
    """The largest angle between the column spans of two orthonormal frames."""
    return float(torch.linalg.matrix_norm(a - b @ (b.t() @ a), 2))


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("init_scale", [1.0, 1e-2])
def test_direct_nullspace_and_implicit_forms_span_the_same(depth, init_scale):
    d, r = 30, 3
    gradient = -low_rank(d, d, r)
    factors = paper.orthogonal_factors(depth, d, init_scale, generator=generator(1))
    left, right = paper.direct_form(factors, gradient, r)
    u, _, v = top_singular_vectors(gradient, r, generator=generator(2))
    orthogonal = paper.product(factors) / init_scale**depth
    others = {"nullspace": paper.nullspace_form(factors, gradient, r), "implicit": paper.implicit_form(orthogonal, u, v)}
    for name, (other_left, other_right) in others.items():
        assert principal_angle(other_left, left) < 1e-12, name
        assert principal_angle(other_right.t(), right.t()) < 1e-12, name
    assert torch.allclose(left, orthogonal @ right.t(), atol=1e-12)
    # Nothing is learnt outside: Psi V_2 = 0 and Psi^T W_1 V_2 = 0.
    outside = torch.linalg.svd(right).Vh[2 * r :].t()
    psi = paper.product(factors[1:]).t() @ gradient
    assert float((psi @ outside).abs().max()) < 1e-12 * float(psi.abs().max()) * d
    assert float((psi.t() @ factors[0] @ outside).abs().max()) < 1e-12 * float(psi.abs().max()) * d


@pytest.mark.parametrize("shape", [(30, 30), (20, 60), (60, 20), (8, 50), (8, 8)], ids=str)
@pytest.mark.parametrize("rank", [2, 6, 8])
def test_sampled_frames_are_orthonormal_with_the_gram_matrix_of_an_orthogonal_map(shape, rank):
    gradient = low_rank(*shape, 8)
    r = rank // 2
    u, _, v = top_singular_vectors(gradient, r, generator=generator(2))
    left, right = matched_frames(u, v, generator=generator(3))
    eye = torch.eye(rank, dtype=torch.float64)
    assert float((left.t() @ left - eye).abs().max()) < 1e-10
    assert float((right @ right.t() - eye).abs().max()) < 1e-12
    # u and v lie in the spans, at places that one orthogonal map connects: <P v, u> is the same from both sides.
    assert principal_angle(u, left) < 1e-10
    assert principal_angle(v, right.t()) < 1e-12
    image_of_v, preimage_of_u = left @ (right @ v), right.t() @ (left.t() @ u)
    assert torch.allclose(image_of_v.t() @ u, v.t() @ preimage_of_u, atol=1e-10)


def test_exact_form_draws_the_orthogonal_product():
    gradient = low_rank(40, 40, 4)
    factors = lrk.compress(gradient, 8, form="exact", generator=generator(5))
    eye = torch.eye(8, dtype=torch.float64)
    assert float((factors.left.t() @ factors.left - eye).abs().max()) < 1e-12
    u, _, v = top_singular_vectors(gradient, 4, generator=generator(6))
    assert principal_angle(u, factors.left) < 1e-10
    assert principal_angle(v, factors.right.t()) < 1e-10


def test_start_is_init_scale_to_the_depth():
    factors = lrk.compress(low_rank(20, 30, 3), 6, depth=4, init_scale=0.1, generator=generator())
    product = factors.left @ torch.linalg.multi_dot(list(factors.core.flip(0))) @ factors.right
    values = torch.linalg.svdvals(product)
    assert torch.allclose(values[:6], torch.full((6,), 1e-4, dtype=torch.float64), rtol=1e-10)
    assert float(values[6]) < 1e-16


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("extra", [0, 2])
def test_proposition_2_2_holds_with_equality(depth, extra):
    """|full - compressed|_F = sqrt(d - 2 r) prod rho: gradient descent on both, full observation, sum loss."""
    d, r, eps, rate = 30, 3, 0.1, 0.02
    target = low_rank(d, d, r) / 3
    full = paper.orthogonal_factors(depth, d, eps, generator=generator(1))
    left, right = paper.direct_form(full, -target, r + extra)
    core = eps * torch.eye(2 * (r + extra), dtype=torch.float64).repeat(depth, 1, 1)
    entries = lrk.ObservedEntries.from_dense(target)
    rho = torch.full((depth,), eps, dtype=torch.float64)
    for _ in range(150):
        residual = paper.product(full) - target
        grads = []
        for layer in range(depth):
            after = paper.product([torch.eye(d, dtype=torch.float64), *full[layer + 1 :]])
            before = paper.product([torch.eye(d, dtype=torch.float64), *full[:layer]])
            grads.append(after.t() @ residual @ before.t())
        full = [w - rate * g for w, g in zip(full, grads, strict=True)]
        core = core - rate * lrk.ops.completion_loss_and_gradients(left, core, right, entries)[1].core
        rho = rho * (1 - rate * torch.stack([torch.cat([rho[:i], rho[i + 1 :]]).square().prod() for i in range(depth)]))
    compressed = left @ torch.linalg.multi_dot(list(core.flip(0))) @ right
    distance = float(torch.linalg.matrix_norm(paper.product(full) - compressed))
    assert distance == pytest.approx(math.sqrt(d - 2 * (r + extra)) * float(rho.prod()), rel=1e-9)
    assert float(torch.linalg.matrix_norm(compressed - target)) < 0.9 * float(torch.linalg.matrix_norm(target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("weighted", [False, True])
def test_masked_gradient_is_the_masked_residual(dtype, weighted):
    g = generator(3)
    dense = torch.randn(23, 31, generator=g, dtype=dtype)
    mask = torch.rand(23, 31, generator=g) < 0.3
    weights = torch.rand(int(mask.sum()), generator=g, dtype=dtype) if weighted else None
    entries = lrk.ObservedEntries.from_dense(dense, mask, weights=weights)
    row_bias, col_bias = torch.randn(23, generator=g, dtype=dtype), torch.randn(31, generator=g, dtype=dtype)
    gradient = torch.zeros(23, 31, dtype=torch.float64)
    full_weights = torch.ones(23, 31, dtype=torch.float64)
    if weighted:
        full_weights[mask] = weights.double()
    residual = row_bias[:, None] + col_bias[None, :] + 0.5 - dense
    gradient[mask] = (full_weights * residual.double())[mask]
    operator = lrk.masked_gradient(entries, row_bias=row_bias, col_bias=col_bias, offset=0.5)
    x, y = torch.randn(31, 5, generator=g, dtype=dtype), torch.randn(23, 5, generator=g, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert torch.allclose(operator.matmul(x), gradient @ x.double(), atol=tolerance, rtol=tolerance)
    assert torch.allclose(operator.rmatmul(y), gradient.t() @ y.double(), atol=tolerance, rtol=tolerance)


def test_randomized_singular_vectors_match_the_dense_svd_and_repeat():
    gradient = low_rank(50, 80, 6) + 1e-3 * torch.randn(50, 80, generator=generator(9), dtype=torch.float64)
    u, s, v = top_singular_vectors(gradient, 6, generator=generator(1))
    reference = torch.linalg.svd(gradient)
    assert torch.allclose(s, reference.S[:6], rtol=1e-6)
    assert principal_angle(u, reference.U[:, :6]) < 1e-5
    assert principal_angle(v, reference.Vh[:6].t()) < 1e-5
    again = top_singular_vectors(gradient, 6, generator=generator(1))
    assert all(torch.equal(a, b) for a, b in zip((u, s, v), again, strict=True))
    other_seed = top_singular_vectors(gradient, 6, generator=generator(2))
    assert torch.allclose(u, other_seed[0], atol=1e-4)  # canonical signs: the seed does not flip them


def test_a_zero_gradient_still_gives_orthonormal_factors():
    factors = lrk.compress(torch.zeros(12, 9, dtype=torch.float64), 4, generator=generator())
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(factors.left.t() @ factors.left, eye, atol=1e-12)
    assert torch.allclose(factors.right @ factors.right.t(), eye, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 3}, "rank must be even and at least 2 .* got 3; use 4"),
        ({"rank": 0}, "rank must be even and at least 2"),
        ({"rank": 12}, r"rank must be at most min\(m, n\) = 9 .* got 12"),
        ({"rank": 4, "depth": 0}, "depth must be at least 1, got 0"),
        ({"rank": 4, "form": "dense"}, "form must be 'sampled' or 'exact', got 'dense'"),
        ({"rank": 4, "form": "exact"}, "needs a square gradient"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        lrk.compress(torch.ones(12, 9), **arguments)


def test_a_gradient_with_nan_is_refused():
    gradient = torch.ones(12, 9)
    gradient[3, 4] = float("nan")
    with pytest.raises(ValueError, match="gradient must be finite"):
        lrk.compress(gradient, 4)


def test_aligned_frames_fill_what_the_gradient_does_not_say():
    """Of a gradient of rank 2, k = 5: two directions are its own, three are random, all orthonormal."""
    gradient = low_rank(20, 30, 2).double()
    u, s, v = top_singular_vectors(gradient, 5, generator=generator())
    left, right = aligned_frames(u, s, v, tol=1e-10, generator=generator(1))
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(left.t() @ left, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(right @ right.t(), eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(left.t() @ gradient @ right.t(), torch.diag(-s), rtol=0, atol=1e-10 * float(s[0]))
    again = aligned_frames(u + 0, s, v, tol=1e-10, generator=generator(1))
    assert torch.equal(left, again[0])
    zero = aligned_frames(u, torch.zeros(5), v, tol=1e-10, generator=generator(1))[0]
    torch.testing.assert_close(zero.t() @ zero, eye, rtol=0, atol=1e-12)

"""The deep factorization: forms, losses, gradient descent by the formula, compression, stability."""

import math
import types

import pytest
import torch
from factorization_checks import F64, generator, masked, model, multiply, relative, target, weights

import lowrank_kernels as lrk
from lowrank_kernels.factorization import (
    DeepFactorization,
    Descent,
    SquaredLoss,
    gradient_spectra,
    gradients,
    rate_bounds,
    train,
    training,
)
from lowrank_kernels.reference.compression import haar
from lowrank_kernels.solver import Status, gradient_descent


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # small matrices


@pytest.fixture
def op_at_any_size(monkeypatch):
    """Small problems would not take the completion op."""
    monkeypatch.setattr(training, "OP_ENTRIES", 1)
    monkeypatch.setattr(training, "OP_SHARE", 1.0)


# ---------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("shape", "width", "sizes"),
    [
        (5, None, [(5, 5), (5, 5), (5, 5)]),
        ((4, 6), None, [(6, 6), (6, 6), (4, 6)]),
        ((6, 4), 2, [(2, 4), (2, 2), (6, 2)]),
        (4, 7, [(7, 4), (7, 7), (4, 7)]),
    ],
    ids=str,
)
def test_factors_are_scaled_and_orthogonal(shape, width, sizes):
    scales = (0.5, 1.0, 2.0)
    m = DeepFactorization(3, shape, width, init_scale=scales, generator=generator())
    assert [tuple(w.shape) for w in m.weights] == sizes
    assert all(w.is_contiguous() and w.requires_grad for w in m.weights)
    for w, scale in zip(weights(m), scales, strict=True):
        small = w @ w.t() if w.shape[0] < w.shape[1] else w.t() @ w
        torch.testing.assert_close(small, scale**2 * torch.eye(len(small), dtype=F64), rtol=0, atol=1e-13)
    torch.testing.assert_close(m(), multiply(weights(m)))
    assert m().shape == m.shape
    assert (m.left, m.right, m.depth) == (None, None, 3)


def test_forms():
    loss = SquaredLoss(target())
    full, narrow = model(), model(width=4)
    twin = full.compress(loss, 4)
    assert (full.form, narrow.form, twin.form) == ("full-width", "narrow", "compressed")
    assert (full.width, narrow.width, twin.width) == (12, 4, 4)
    assert DeepFactorization(2, (3, 5), 5).form == "full-width"
    assert repr(narrow) == "DeepFactorization(narrow, shape=(12, 12), depth=3, width=4, init_scale=(0.3, 0.3, 0.3))"
    assert "activation='relu'" in repr(model(activation="relu"))
    assert torch.allclose(twin(), multiply(weights(twin)), atol=1e-14)
    with pytest.raises(ValueError, match="this one is narrow"):
        narrow.compressed_factors()


def test_the_same_seed_gives_the_same_start_in_every_dtype():
    a, b, c = model(), model(), model(dtype=torch.float32)
    for x, y, z in zip(weights(a), weights(b), weights(c), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x.float(), z)


def test_a_model_is_saved_and_loaded_as_any_module(tmp_path):
    twin = model().compress(SquaredLoss(target()), 4)
    other = model(seed=6).compress(SquaredLoss(target(seed=1)), 4)
    torch.save(twin.state_dict(), tmp_path / "twin.pt")
    other.load_state_dict(torch.load(tmp_path / "twin.pt", weights_only=True))
    assert torch.equal(other(), twin())
    assert other.right.t().is_contiguous()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 1}, "depth must be at least 2 .*got 1"),
        ({"width": 0}, "width must be at least 1, or None"),
        ({"shape": (3, 0)}, "shape must be"),
        ({"init_scale": 0}, "init_scale must be positive and finite, got 0"),
        ({"init_scale": (1, math.nan, 1)}, "init_scale must be positive and finite"),
        ({"init_scale": (1, 2)}, "one for each of 3 layers, got 2"),
        ({"activation": "relo"}, "activation must be one of 'relu', .*got 'relo'"),
    ],
    ids=str,
)
def test_bad_models_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^DeepFactorization: .*{message}"):
        DeepFactorization(**{"depth": 3, "shape": 4, **arguments})


def test_from_factors_copies_and_refuses():
    factors = lrk.compress(target(), 4, init_scale=0.5, generator=generator())
    m = DeepFactorization.from_factors(factors)
    assert m.init_scale == (0.5, 0.5, 0.5)
    for a, b in zip(m.compressed_factors(), factors, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        m.left.zero_()
    assert float(factors.left.norm()) > 0
    with pytest.raises(ValueError, match="depth of at least 2"):
        DeepFactorization.from_factors(factors._replace(core=factors.core[:1]))
    with pytest.raises(ValueError, match=r"\(m, k\), \(depth, k, k\) and \(k, n\)"):
        DeepFactorization.from_factors(factors._replace(left=factors.left[:, :3]))


def test_the_package_offers_the_model_lazily():
    assert lrk.DeepFactorization is DeepFactorization
    assert lrk.factorization.train is training.train


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["full", "masked", "weighted", "entries"])
def test_squared_loss_is_the_formula(kind, reduction):
    phi, x = target(n=9), torch.randn(12, 9, generator=generator(3), dtype=F64)
    mask = torch.rand(12, 9, generator=generator(4)) < 0.5
    w = mask * torch.rand(12, 9, generator=generator(5), dtype=F64)
    if kind == "entries":
        row, col = mask.nonzero(as_tuple=True)
        entries = lrk.ObservedEntries.from_coo(row, col, phi[row, col], shape=(12, 9), weights=w[row, col], dtype=F64)
        loss = SquaredLoss(entries, reduction=reduction)
        assert loss.entries is entries
    else:
        loss = SquaredLoss(phi, {"full": None, "masked": mask, "weighted": w}[kind], reduction=reduction)
    if kind != "full":
        again = SquaredLoss(loss.entries)  # as entries and back
        assert torch.equal(again.weights, loss.weights)
        assert torch.equal(again.target, loss.target)
    used = {"full": torch.ones_like(w), "masked": mask.double()}.get(kind, w)
    wanted = (used * (x - phi).square()).sum() / 2 / (108 if reduction == "mean" else 1)
    value, gradient = loss.value_and_gradient(x)
    x.requires_grad_()
    torch.testing.assert_close(loss(x), wanted)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(x), x)[0])


def test_what_is_not_observed_may_be_nan():
    phi = target()
    hidden = phi.clone()
    mask = torch.ones(12, 12, dtype=torch.bool)
    mask[0, :5] = False
    hidden[0, :5] = math.nan
    x = torch.zeros(12, 12, dtype=F64)
    assert float(SquaredLoss(hidden, mask)(x)) == float(SquaredLoss(phi, mask)(x))
    with pytest.raises(ValueError, match=r"got NaN or infinity in 5 of 144 entries; pass mask=torch.isfinite"):
        SquaredLoss(hidden)
    mask[0, 1] = True
    with pytest.raises(ValueError, match="in 1 of 144"):
        SquaredLoss(hidden, mask)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SquaredLoss(torch.ones(3)), "must be a matrix"),
        (lambda: SquaredLoss(torch.ones(0, 3)), "with entries, got shape"),
        (lambda: SquaredLoss(torch.ones(3, 3), torch.ones(3, 2)), r"mask must be of shape \(3, 3\), got \(3, 2\)"),
        (lambda: SquaredLoss(torch.ones(3, 3), torch.zeros(3, 3)), "observes no entry"),
        (lambda: SquaredLoss(torch.ones(3, 3), -torch.ones(3, 3)), "at least 0"),
        (lambda: SquaredLoss(torch.ones(3, 3), reduction="max"), "'sum' or 'mean', got 'max'"),
        (lambda: SquaredLoss(lrk.ObservedEntries.from_dense(torch.ones(2, 2)), torch.ones(2, 2)), "mask must be None"),
    ],
)
def test_bad_losses_are_refused(build, message):
    with pytest.raises(ValueError, match=f"^SquaredLoss: .*{message}"):
        build()


def test_an_integer_target_is_refused():
    with pytest.raises(TypeError, match=r"convert it with .double"):
        SquaredLoss(torch.ones(3, 3, dtype=torch.int64))


def test_target_rank_is_numerical():
    assert SquaredLoss(target(r=3)).target_rank == 3
    assert SquaredLoss(target(r=3).float()).target_rank == 3
    assert SquaredLoss(torch.zeros(3, 3)).target_rank == 0


# ---------------------------------------------------------------------- gradients

SHAPES = {"full": {}, "narrow": {"width": 5}, "wide": {"width": 14}}


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu", "silu", "tanh", torch.sin], ids=str)
@pytest.mark.parametrize("form", [*SHAPES, "compressed"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_gradients_are_those_of_autograd(depth, form, activation):
    loss = masked()
    m = model(depth=depth, scale=0.9, activation=activation, **SHAPES.get(form, {}))
    m = m.compress(loss, 4) if form == "compressed" else m
    value, got = gradients(m, loss)
    wanted_value = loss(m())
    torch.testing.assert_close(value, wanted_value.detach())
    wanted = torch.autograd.grad(wanted_value, m.factors())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert all(factor.grad is None for factor in m.factors())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: x, r"must return a scalar tensor of the product X, got shape \(12, 12\)"),
        (lambda x: 1.0, "got float"),
        (lambda x: torch.zeros(()), "does not depend on the product"),
    ],
)
def test_functions_that_are_no_losses_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        gradients(model(), loss)


# ---------------------------------------------------------------------- descent


def by_hand(m, loss, rate, steps, decay=0.0, gamma=1.0):
    """(4) and (11) with autograd, all factors at once."""
    factors = [factor.detach().clone().requires_grad_() for factor in m.factors()]
    rates = [rate] * m.depth if m.left is None else [gamma * rate, *[rate] * m.depth, gamma * rate]
    for _ in range(steps):
        grads = torch.autograd.grad(loss(multiply(factors)), factors)
        with torch.no_grad():
            for factor, grad, each in zip(factors, grads, rates, strict=True):
                factor.copy_((1 - each * decay) * factor - each * grad)
    return [factor.detach() for factor in factors]


LOSSES = {
    "full": lambda: SquaredLoss(target()),
    "mean": lambda: SquaredLoss(target(), reduction="mean"),
    "masked": masked,
    "masked mean": lambda: masked(reduction="mean"),
    "function": lambda: lambda x: torch.log(torch.cosh(x - target())).sum(),
}


@pytest.mark.parametrize(("form", "gamma"), [("full", 0.0), ("narrow", 0.0), ("compressed", 0.0), ("compressed", 0.1)], ids=str)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.usefixtures("op_at_any_size")
def test_descent_is_the_formula(kind, form, gamma):
    """Every source of gradients: the k x k matrix, the completion op, (14)."""
    loss = LOSSES[kind]()
    m = model(**SHAPES.get(form, {}))
    m = m.compress(loss, 4) if form == "compressed" else m
    rate, decay = (20.0, 0.001) if "mean" in kind else (0.2, 0.1)
    wanted = by_hand(m, loss, rate, 40, decay, gamma)
    before = weights(m)
    result = train(m, loss, learning_rate=rate, weight_decay=decay, gamma=gamma, steps=40)
    assert (result.status, result.steps) == (Status.MAX_STEPS, 40)
    for got, x, start in zip(weights(m), wanted, before, strict=True):
        torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-12)
        assert torch.equal(got, start) == (form == "compressed" and gamma == 0 and got.shape[0] != got.shape[1])
    torch.testing.assert_close(result.loss, float(loss(m()).detach()), rtol=1e-10, atol=1e-14)


def test_small_problems_take_plain_products():
    assert isinstance(Descent(model().compress(masked(), 4), masked(), learning_rate=0.1)._source, types.FunctionType)


@pytest.mark.usefixtures("op_at_any_size")
def test_sources_of_gradients():
    """Which path runs: an unneeded pass over d x d would still be right, only slow."""
    full, part = SquaredLoss(target()), masked()
    twin = model().compress(full, 4)

    def source(m, loss, **kwargs):
        return type(Descent(m, loss, learning_rate=0.1, **kwargs)._source).__name__

    assert source(twin, full) == "_Projected"
    assert source(twin, full, gamma=0.1) == "function"
    assert source(twin, part) == "_Completion"
    assert source(model(width=4), part) == source(model(), part) == "_Completion"
    assert source(model(), full) == source(twin, lambda x: x.sum()) == source(model(depth=2), part) == "function"
    assert source(model(activation="relu").compress(part, 4), part) == "function"
    half = SquaredLoss(part.target.bfloat16(), part.weights)
    assert source(model(dtype=torch.bfloat16).compress(half, 4), half) == "function"  # the op is of float32 and float64
    with torch.no_grad():
        twin.left.mul_(1.001)
    assert source(twin, full) == "function"  # the frames are not orthonormal: the k x k matrix does not say it all


def test_the_solver_of_completions_gives_the_same_iterates():
    loss = masked()
    twin = model().compress(loss, 4)
    wanted = gradient_descent(twin.compressed_factors(), loss.entries, learning_rate=0.2, gamma=0.05, max_steps=60).factors
    train(twin, loss, learning_rate=0.2, gamma=0.05, steps=60)
    for got, x in zip(twin.compressed_factors(), wanted, strict=True):
        torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-14)


def test_default_gamma_is_0_for_a_full_target_and_1e_2_else():
    full, part = SquaredLoss(target()), masked()
    twin = model().compress(full, 4)
    assert [Descent(twin, loss, learning_rate=0.1).gamma for loss in (full, part)] == [0.0, 1e-2]


@pytest.mark.parametrize("form", ["full", "compressed"])
@pytest.mark.parametrize("kind", ["full", "masked"])
def test_torch_optimizers(form, kind):
    """torch's SGD is the same descent; Adam's first step is the rate, gamma times it for the outer factors."""
    loss, gamma = LOSSES[kind](), 0.1

    def start():
        return model().compress(loss, 4) if form == "compressed" else model()

    m = start()
    wanted = by_hand(m, loss, 0.2, 30, 0.1, gamma)
    train(m, loss, learning_rate=0.2, weight_decay=0.1, gamma=gamma, steps=30, optimizer=torch.optim.SGD)
    for got, x in zip(weights(m), wanted, strict=True):
        torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-12)
    m = start()
    before = weights(m)
    train(m, loss, learning_rate=1e-3, gamma=gamma, steps=1, optimizer=torch.optim.Adam)
    steps = [float((a - b).abs().max()) for a, b in zip(weights(m), before, strict=True)]
    outer = [1e-4] if form == "compressed" else []
    assert steps == pytest.approx([*outer, 1e-3, 1e-3, 1e-3, *outer], rel=1e-3)
    result = train(m, loss, learning_rate=0.02, gamma=gamma, steps=300, optimizer=lambda groups: torch.optim.Adam(groups))
    assert result.loss < 0.1 * float(loss(torch.zeros_like(loss.target)))


def test_training_goes_on_where_it_stopped():
    loss = SquaredLoss(target())
    one, two = model(), model()
    train(one, loss, learning_rate=0.2, steps=50)
    for steps in (20, 30):
        result = train(two, loss, learning_rate=0.2, steps=steps)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    assert result.message == "stopped after 30 steps: call train() again with the same model to go on"


def test_history_callback_and_tol():
    seen = []
    loss = SquaredLoss(target())
    result = train(model(), loss, learning_rate=0.2, steps=95, check_every=30, callback=lambda *args: seen.append(args))
    assert [record["step"] for record in result.history] == [0, 30, 60, 90, 95]
    assert seen == [(record["step"], record["loss"]) for record in result.history]
    result = train(model(scale=0.1), loss, learning_rate=0.2, steps=10_000, tol=1e-5, check_every=10)
    assert (result.status, result.loss <= 1e-5, result.steps < 10_000) == (Status.CONVERGED, True, True)
    assert train(model(), loss, learning_rate=0.2, steps=0).history[0]["step"] == 0


def test_repeats_bit_for_bit():
    for loss in (SquaredLoss(target()), masked()):
        for build in (model, lambda loss=loss: model().compress(loss, 4)):
            runs = [build(), build()]
            for m in runs:
                train(m, loss, learning_rate=0.2, steps=30)
            assert torch.equal(runs[0](), runs[1]())


def test_an_interrupt_leaves_the_weights_of_the_last_check():
    kept = []

    def callback(step, loss):
        kept.append(m().detach().clone())
        if step == 20:
            raise KeyboardInterrupt

    m = model()
    result = train(m, SquaredLoss(target()), learning_rate=0.2, steps=100, check_every=10, callback=callback)
    assert (result.status, result.steps) == (Status.INTERRUPTED, 20)
    assert torch.equal(m(), kept[-1])
    assert "interrupted at step 20" in result.message


# ---------------------------------------------------------------------- refusals and divergence


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_bound_of_the_rate_is_sharp(depth, reduction):
    """From a balanced start next to a minimum: 3 % below the bound gradient descent settles, 3 % above it does not."""
    d, s = 6, 2.0
    u, v = (haar(d, 1, generator=generator(i), dtype=F64) for i in range(2))
    loss = SquaredLoss(s * u @ v.t(), reduction=reduction)
    bound = rate_bounds(DeepFactorization(depth, d), loss).stable
    assert bound == pytest.approx(2 / (depth * s ** (2 - 2 / depth)) * (d * d if reduction == "mean" else 1))
    ends = {}
    for share in (0.97, 1.03):
        m = model(d, depth, 1e-3)
        with torch.no_grad():
            size = (s + 1e-3) ** (1 / depth)
            for index, weight in enumerate(m.weights):  # c_l e_1 e_1^T in the middle, u and v at the ends
                left = u if index == depth - 1 else torch.eye(d, 1, dtype=F64)
                right = v if index == 0 else torch.eye(d, 1, dtype=F64)
                weight.copy_(size * left @ right.t())
        start = float(loss(m()).detach())
        ends[share] = train(m, loss, learning_rate=share * bound, steps=600, check=False).loss / start
    assert ends[0.97] < 1e-10
    assert ends[1.03] > 10


def test_a_rate_beyond_stability_is_refused_with_the_bound():
    loss = SquaredLoss(10 * target())
    bound = 2 / (3 * 10 ** (4 / 3))
    with pytest.raises(ValueError, match=rf"at most {bound:.4g} = 2 / \(L s_1\^\(2 - 2/L\)\), L = 3.*got 1; .*check=False"):
        train(model(), loss, learning_rate=1.0, steps=10)
    with pytest.raises(ValueError, match=f"at most {bound:.4g}"):
        train(model().compress(loss, 4), loss, learning_rate=1.0, steps=10)
    with pytest.raises(ValueError, match=r"at most 4 = 2 / weight_decay.*got 5"):
        train(model(), masked(), learning_rate=5, weight_decay=0.5, steps=10)
    start = model()
    train(start, loss, learning_rate=1e-3, steps=1)  # below: no complaint
    train(start, loss, learning_rate=1.0, steps=1, optimizer=torch.optim.Adam)  # of another optimizer nothing is known
    assert rate_bounds(model(), masked()).stable is None
    assert rate_bounds(model(activation="relu"), loss).stable is None


@pytest.mark.parametrize("form", ["full", "compressed"])
@pytest.mark.parametrize("kind", ["full", "masked"])
def test_divergence_is_noticed_and_undone(form, kind):
    loss = LOSSES[kind]()
    m = model(scale=1.0)
    m = m.compress(loss, 4) if form == "compressed" else m
    start = weights(m)
    result = train(m, loss, learning_rate=50.0, steps=1000, check_every=5, check=False)
    assert result.status is Status.DIVERGED
    assert result.steps <= 20
    assert all(bool(torch.isfinite(w).all()) for w in weights(m))
    assert all(torch.equal(a, b) for a, b in zip(weights(m), start, strict=True))
    assert "the weights of step 0 were kept" in result.message
    wanted = "must stay below 0.6667, got 50" if kind == "full" else "lower the learning rate, 50"
    assert wanted in result.message
    assert math.isfinite(result.loss)


def test_a_rate_slightly_too_large_for_a_mask_diverges_without_nan():
    """Chaotic steps can stay finite for long: a loss far above the start is enough."""
    loss = masked(share=0.9)
    result = train(model(scale=1.0), loss, learning_rate=4.0, steps=3000, check_every=1)
    assert result.status is Status.DIVERGED
    assert all(math.isfinite(record["loss"]) for record in result.history)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be positive and finite, got 0"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite"),
        ({"weight_decay": -1}, "weight_decay must be finite and not negative"),
        ({"gamma": math.nan}, "gamma must be finite and not negative"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"check_every": 0}, "check_every must be at least 1"),
        ({"loss": SquaredLoss(target(11))}, r"of the model's shape \(12, 12\), got \(11, 11\)"),
        ({"loss": SquaredLoss(target().float())}, "must be torch.float64 on cpu as the model is, got torch.float32"),
        ({"loss": lambda x: (x / 0).sum()}, "loss must be finite at the start, got (nan|inf)"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^train: .*{message}"):
        train(model(), **{"loss": SquaredLoss(target()), "learning_rate": 0.1, "steps": 2, **arguments})


def test_a_width_below_the_rank_is_refused():
    loss = SquaredLoss(target(r=3))
    with pytest.raises(ValueError, match=r"width must be at least the target's numerical rank, 3, got 2; pass check=False"):
        train(model(width=2), loss, learning_rate=0.1, steps=2)
    result = train(model(width=2), loss, learning_rate=0.3, steps=2000, check=False)
    assert result.loss == pytest.approx(0.5**2 / 2, rel=1e-2)  # what the third singular value, 0.5, leaves
    train(model(width=2), masked(r=3), learning_rate=0.1, steps=2)  # of a masked target the rank is not known
    train(model(width=3), loss, learning_rate=0.1, steps=2)


# ---------------------------------------------------------------------- compression


def test_compress_uses_the_loss_whatever_it_is():
    m = model(depth=2)
    for loss in (masked(), lambda x: torch.log(torch.cosh(x - target())).sum()):
        twin = m.compress(loss, 4)
        gradient = torch.autograd.grad(loss(x := torch.zeros(12, 12, dtype=F64, requires_grad=True)), x)[0]
        u, _, vh = torch.linalg.svd(gradient)
        for a, b in ((u[:, :2], twin.left), (vh[:2].t(), twin.right.t())):
            assert float((a - b @ (b.t() @ a)).detach().norm()) < 1e-4  # randomized: the gradients are of full rank


def test_the_papers_bound_on_the_twins_distance_needs_a_small_rate():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.nn.functional.normalize(torch.randn(12, generator=generator).double(), dim=0) for _ in range(2))
    loss = SquaredLoss(0.5 * torch.outer(u, v))

    def largest_distance(learning_rate: float, init_scale: tuple[float, float]) -> float:
        model = DeepFactorization(2, 12, init_scale=init_scale, generator=generator)
        twin, distances = model.compress(loss, rank=2), []
        for _ in range(60):
            for each in (model, twin):
                train(each, loss, learning_rate=learning_rate, steps=1, check=False)
            distances.append((model() - twin()).norm().item())
        assert loss(model()).item() < 1e-3
        return max(distances) / (10**0.5 * math.prod(init_scale))

    assert largest_distance(1.0, (0.1, 1.5)) == pytest.approx(1.65, abs=0.05)
    assert largest_distance(0.8, (0.1, 1.5)) <= 1 + 1e-12  # eta (lam + 1.5^2) <= 2


def test_compress_of_a_rectangular_model_is_the_authors():
    loss = SquaredLoss(target(8, n=12))
    m = DeepFactorization(3, (8, 12), init_scale=0.1, generator=generator())
    twin = m.compress(loss, 4)
    orthogonal = multiply(weights(m)) / 1e-3
    torch.testing.assert_close(twin.right @ twin.right.t(), torch.eye(4, dtype=F64))
    torch.testing.assert_close(twin.left, orthogonal @ twin.right.t())  # not orthonormal
    assert train(twin, loss, learning_rate=0.3, steps=800).loss < 1e-4


@pytest.mark.parametrize(
    ("rank", "loss", "message"),
    [
        (3, SquaredLoss(target()), "even and from 2 to .* = 12 .*got 3"),
        (0, SquaredLoss(target()), "got 0"),
        (14, SquaredLoss(target()), "got 14"),
        (4, SquaredLoss(target(r=3)), "at least twice the target's numerical rank, 6, got 4; pass truncate=True"),
        (4, lambda x: (x / 0).sum(), "must be finite, got NaN"),
    ],
)
def test_compress_refuses(rank, loss, message):
    with pytest.raises(ValueError, match=f"^compress: .*{message}"):
        model().compress(loss, rank)


def test_compress_wants_the_start_of_a_full_width_model():
    loss = SquaredLoss(target())
    m = model()
    train(m, loss, learning_rate=0.1, steps=3)
    with pytest.raises(ValueError, match="at its start"):
        m.compress(loss, 4)
    with pytest.raises(ValueError, match=r"of full width, 12 .*this one is narrow"):
        model(width=6).compress(loss, 4)
    with pytest.raises(ValueError, match="this one is compressed"):
        model().compress(loss, 4).compress(loss, 4)
    assert model().compress(SquaredLoss(target(r=3)), 4, truncate=True).width == 4
    assert model(dtype=torch.float32).compress(SquaredLoss(target().float()), 4).weights[0].dtype == torch.float32


def test_compressed_completion_recovers_what_was_not_observed():
    """Section 3 in small: the compressed model with slow outer factors fits and generalises, with frozen ones it does not."""
    loss = masked(d=40, r=2, share=0.6)
    errors = {}
    for gamma in (0.0, 0.1):
        twin = model(40, scale=0.03).compress(loss, 4)
        train(twin, loss, learning_rate=0.6, gamma=gamma, steps=2000)
        errors[gamma] = relative(twin().detach(), target(40))
    assert errors[0.1] < 1e-2
    assert errors[0.0] > 0.2


@pytest.mark.parametrize("form", ["full-width", "compressed"])
def test_a_thousand_rows(form):
    d = 1000
    g = generator()
    loss = SquaredLoss(torch.randn(d, 5, generator=g) @ torch.randn(5, d, generator=g) / d)
    m = DeepFactorization(3, d, init_scale=0.1, generator=g, dtype=torch.float32)
    m = m.compress(loss, 10) if form == "compressed" else m
    result = train(m, loss, learning_rate=0.1, steps=1 if form == "full-width" else 1000)
    assert math.isfinite(result.loss)
    if form == "compressed":
        assert result.loss < 1e-3 * result.history[0]["loss"]


# ---------------------------------------------------------------------- nonlinear


def test_relu_spectra_have_a_gap_at_small_initialization():
    """Figure 9: the top r + 1 singular values of dl/dW_2 stand out; without the activation there are exactly r."""
    d, r = 120, 4
    loss = SquaredLoss(target(d, r))
    relu = gradient_spectra(model(d, scale=1e-3, activation="relu"), loss)
    assert [len(s) for s in relu] == [d, d, d]
    middle = relu[1] / relu[1][0]
    ratios = middle[:-1] / middle[1:]
    assert float(ratios[r]) > 1.3
    assert float(ratios[r + 1 : 20].max()) < 1.15
    assert float(relu[2][r] / relu[2][0]) < 1e-3  # E s(W_2 s(W_1))^T is of rank r
    linear = gradient_spectra(model(d, scale=1e-3), loss)
    assert all(float(s[r] / s[0]) < 1e-5 for s in linear)
    twin = gradient_spectra(model(d, scale=1e-3, activation="relu").compress(loss, 2 * r), loss)
    assert [tuple(s.shape) for s in twin] == [(2 * r,)] * 3


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_nonlinear_compression_by_the_same_call(activation):
    """Experimental: the twin learns; no trajectory is claimed."""
    loss = SquaredLoss(5 * target(30))
    twin = model(30, scale=0.1, activation=activation).compress(loss, 8)
    assert twin.activation == activation
    start = float(loss(torch.zeros_like(loss.target)))
    result = train(twin, loss, learning_rate=0.02, gamma=0.1, steps=2000)
    assert result.loss < 0.05 * start

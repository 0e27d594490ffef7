"""The solvers: gradient descent is the paper's, step by step; the production solver's formulas, guarantees and endings."""

import math

import numpy as np
import pytest
import torch

import lowrank_kernels as lrk
from lowrank_kernels import solver
from lowrank_kernels.processes import Team
from lowrank_kernels.reference.core import core_product
from lowrank_kernels.row_shards import RowShard
from lowrank_kernels.solver import CompletionModel, Status, TrainOptions, gradient_descent

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def low_rank(m, n, r, seed=0):
    g = generator(seed)
    return torch.randn(m, r, generator=g, dtype=F64) @ torch.randn(r, n, generator=g, dtype=F64)


def problem(m=30, n=24, r=3, share=0.5, seed=0, rank=6, init_scale=0.3, depth=3):
    """Target, mask, entries and compressed start."""
    target = low_rank(m, n, r, seed)
    mask = torch.rand(m, n, generator=generator(seed + 1)) < share
    entries = lrk.ObservedEntries.from_dense(target, mask)
    gradient = lrk.masked_gradient(entries)
    factors = lrk.compress(gradient, rank, depth=depth, init_scale=init_scale, generator=generator(2), dtype=F64)
    return target, mask, entries, factors


def product(factors):
    return factors.left @ core_product(factors.core) @ factors.right


def standardized(m=40, n=30, r=3, share=0.4, seed=0, dtype=F64, noise=0.0, weights=False):
    """Entries of zero mean and unit variance, and the standardised target."""
    target = low_rank(m, n, r, seed)
    g = generator(seed + 1)
    mask = torch.rand(m, n, generator=g) < share
    given = target + noise * target.std() * torch.randn(m, n, generator=g, dtype=F64)
    mean, std = given[mask].mean(), given[mask].std()
    row, col = mask.nonzero(as_tuple=True)
    w = torch.rand(len(row), generator=g, dtype=F64) + 0.5 if weights else None
    values = (given[row, col] - mean) / std
    entries = lrk.ObservedEntries.from_coo(row, col, values, shape=(m, n), weights=w, dtype=dtype)
    return entries, (target - mean) / std, mask


def predictions(model):
    return model.effective_left() @ model.columns.t() + model.row_bias[:, None] + model.col_bias


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


# ---------------------------------------------------------------------- gradient descent: values


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("gamma", [0.0, 1e-2, 1.0])
def test_gradient_descent_is_the_papers_algorithm_step_by_step(depth, gamma):
    target, mask, entries, factors = problem(depth=depth)
    rate, steps = 2e-3, 60
    left, core, right = (x.clone().requires_grad_() for x in factors)
    for _ in range(steps):
        x = core[0]
        for layer in core[1:]:
            x = layer @ x
        loss = (mask * (left @ x @ right - target)).square().sum() / 2
        grads = torch.autograd.grad(loss, (left, core, right))
        with torch.no_grad():
            core -= rate * grads[1]
            left -= gamma * rate * grads[0]
            right -= gamma * rate * grads[2]
    result = gradient_descent(factors, entries, learning_rate=rate, gamma=gamma, max_steps=steps)
    assert (result.status, result.steps) == (Status.MAX_STEPS, steps)
    for name, got, wanted in zip(factors._fields, result.factors, (left, core, right), strict=True):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-12, atol=1e-12, msg=f"{name}, L={depth}, gamma={gamma}")


def test_the_mean_loss_with_its_rate_gives_the_iterates_of_the_sum_loss():
    target, _, entries, factors = problem()
    size = target.numel()  # no power of two: the rates differ in their last place
    one = gradient_descent(factors, entries, learning_rate=2e-3, max_steps=300)
    other = gradient_descent(factors, entries, learning_rate=2e-3 * size, mean_over=size, max_steps=300)
    for got, wanted in zip(other.factors, one.factors, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    losses = [[record["loss"] for record in result.history] for result in (one, other)]
    assert np.allclose(losses[0], np.multiply(losses[1], size), rtol=1e-9)


def test_gamma_0_leaves_the_outer_factors_bit_for_bit_and_the_start_unchanged():
    _, _, entries, factors = problem()
    before = [x.clone() for x in factors]
    result = gradient_descent(factors, entries, learning_rate=2e-3, gamma=0.0, max_steps=50)
    assert torch.equal(result.factors.left, factors.left)
    assert torch.equal(result.factors.right, factors.right)
    assert not torch.equal(result.factors.core, factors.core)
    gradient_descent(factors, entries, learning_rate=2e-3, gamma=1.0, max_steps=50)
    assert all(torch.equal(a, b) for a, b in zip(before, factors, strict=True))


def test_with_all_entries_observed_it_is_the_factorization():
    target, _, _, _ = problem()
    entries = lrk.ObservedEntries.from_dense(target)
    factors = lrk.compress(-target, 6, init_scale=0.3, generator=generator(2))
    rate, steps = 1e-3, 80
    left, core, right = factors
    c = list(core.unbind())
    for _ in range(steps):  # equation (14) in the compressed coordinates; the dense residual is projected once
        middle = left.t() @ (left @ c[2] @ c[1] @ c[0] @ right - target) @ right.t()
        grads = (c[1].t() @ c[2].t() @ middle, c[2].t() @ middle @ c[0].t(), middle @ c[0].t() @ c[1].t())
        c = [layer - rate * grad for layer, grad in zip(c, grads, strict=True)]
    result = gradient_descent(factors, entries, learning_rate=rate, gamma=0.0, max_steps=steps)
    torch.testing.assert_close(result.factors.core, torch.stack(c), rtol=1e-11, atol=1e-12)


def test_gradient_descent_does_not_depend_on_the_basis():
    _, _, entries, factors = problem()
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator(9), dtype=F64)).Q
    turned = lrk.CompressedFactors(factors.left @ q, q.t() @ factors.core @ q, q.t() @ factors.right)
    one, other = (gradient_descent(start, entries, learning_rate=2e-3, max_steps=300) for start in (factors, turned))
    torch.testing.assert_close(product(one.factors), product(other.factors), rtol=1e-10, atol=1e-10)


def test_the_papers_figure_5_small():
    """d = 100, r = 5, 30 % observed; the start is 10 times the paper's, so the plateau is 10 times shorter."""
    d = 100
    g = generator()
    u, v = (torch.linalg.qr(torch.randn(d, 5, generator=g, dtype=F64)).Q for _ in range(2))
    target = u * torch.linspace(2.0, 1.2, 5, dtype=F64) * math.sqrt(d) @ v.t()
    entries = lrk.ObservedEntries.from_dense(target, torch.rand(d, d, generator=generator(1)) < 0.3)
    start = lrk.compress(lrk.masked_gradient(entries), 10, init_scale=1e-2, generator=generator(2), dtype=F64)
    errors = {}
    for gamma in (1e-2, 0.0):
        result = gradient_descent(start, entries, learning_rate=300.0, gamma=gamma, mean_over=d * d, max_steps=6000, tol=1e-10)
        errors[gamma] = float((product(result.factors) - target).norm() / target.norm())
        assert result.status is (Status.CONVERGED if gamma else Status.MAX_STEPS)
    assert errors[1e-2] < 1e-3
    assert errors[0.0] > 0.2


# ---------------------------------------------------------------------- gradient descent: endings


def test_it_converges_at_tol_and_reports_each_check():
    _, _, entries, factors = problem()
    seen = []
    result = gradient_descent(
        factors,
        entries,
        learning_rate=2e-3,
        gamma=0.1,
        tol=1e-2,
        check_every=50,
        max_steps=3000,
        callback=lambda *given: seen.append(given),
    )
    assert result.status is Status.CONVERGED
    assert "nothing to do" in result.status.message
    assert result.history[-1]["loss"] <= 1e-2 < result.history[-2]["loss"]
    assert (
        [step for step, _, _ in seen] == [record["step"] for record in result.history] == list(range(0, result.steps + 1, 50))
    )
    assert float(lrk.ops.completion_loss(*result.factors, entries)) == result.history[-1]["loss"]


def test_zero_steps_return_the_start():
    _, _, entries, factors = problem()
    result = gradient_descent(factors, entries, learning_rate=1.0, max_steps=0)
    assert (result.status, result.steps, len(result.history)) == (Status.MAX_STEPS, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(result.factors, factors, strict=True))


def test_divergence_keeps_the_last_finite_factors():
    _, _, entries, factors = problem()
    result = gradient_descent(factors, entries, learning_rate=1.0, gamma=1.0, check_every=1)
    assert result.status is Status.DIVERGED
    assert "learning rate" in result.status.message
    assert not math.isfinite(result.history[-1]["loss"])
    assert all(bool(torch.isfinite(x).all()) for x in result.factors)
    assert float(lrk.ops.completion_loss(*result.factors, entries)) == result.history[-2]["loss"]


@pytest.mark.parametrize("when", [0, 40])
def test_ctrl_c_in_the_callback_keeps_the_factors_of_that_check(when):
    _, _, entries, factors = problem()

    def interrupt(step, loss, current):
        if step == when:
            raise KeyboardInterrupt

    result = gradient_descent(factors, entries, learning_rate=2e-3, check_every=20, callback=interrupt)
    wanted = gradient_descent(factors, entries, learning_rate=2e-3, max_steps=when)
    assert (result.status, result.steps) == (Status.INTERRUPTED, when)
    assert all(torch.equal(a, b) for a, b in zip(result.factors, wanted.factors, strict=True))


def test_ctrl_c_inside_a_step_keeps_whole_factors(monkeypatch):
    _, _, entries, factors = problem()
    wanted = gradient_descent(factors, entries, learning_rate=2e-3, max_steps=20)
    calls = []

    def descend(parameter, grad, rate):
        calls.append(1)
        if len(calls) == 3 * 25 + 2:  # after the core of step 25, before the left factor
            raise KeyboardInterrupt
        parameter.add_(grad, alpha=-rate)

    monkeypatch.setattr(solver, "_descend", descend)
    result = gradient_descent(factors, entries, learning_rate=2e-3, check_every=20)
    assert result.status is Status.INTERRUPTED
    assert all(torch.equal(a, b) for a, b in zip(result.factors, wanted.factors, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", x) for x in (0.0, -1.0, math.nan, math.inf)]
    + [("gamma", x) for x in (-1e-3, math.nan, math.inf)]
    + [("max_steps", -1), ("check_every", 0), ("mean_over", 0), ("mean_over", -5)],
)
def test_gradient_descent_refuses_impossible_options(name, value):
    _, _, entries, factors = problem()
    with pytest.raises(ValueError, match=rf"gradient_descent: {name} must be .*got {value}"):
        gradient_descent(factors, entries, **{"learning_rate": 1e-3, name: value})


def test_gradient_descent_refuses_shapes_and_dtypes_that_do_not_fit():
    _, _, entries, factors = problem()
    with pytest.raises(ValueError, match="right"):
        gradient_descent(factors._replace(right=factors.right[:, 1:]), entries, learning_rate=1e-3)
    with pytest.raises(TypeError, match="float32"):
        gradient_descent(factors, entries.to(dtype=torch.float32), learning_rate=1e-3)


def test_gradient_descent_takes_factors_that_require_gradients():
    _, _, entries, factors = problem()
    leaves = lrk.CompressedFactors(*(x.clone().requires_grad_() for x in factors))
    result = gradient_descent(leaves, entries, learning_rate=1e-3, max_steps=3)
    assert not any(x.requires_grad for x in result.factors)


def test_gradient_descent_repeats_bit_by_bit_with_any_number_of_threads():
    _, _, entries, factors = problem(m=300, n=200, rank=16, r=8)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(gradient_descent(factors, entries, learning_rate=1e-3, max_steps=30).factors)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------------- train: gradients and strengths


def recorded(monkeypatch, model, entries, options):
    """The gradients of the first step, in the order left, core, columns, row bias, column bias."""
    seen = []

    class Recorder(solver._Adam):
        def step(self, grads, decay):
            seen.append([g.clone() for g in grads])

    monkeypatch.setattr(solver, "_Adam", Recorder)
    solver.train(model, entries, options)
    return seen[0]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("weights", [False, True])
def test_the_gradient_is_that_of_the_stated_objective(monkeypatch, depth, weights):
    entries, _, _ = standardized(weights=weights)
    model = solver.start(entries, 6, depth=depth, generator=generator(3))
    model.row_bias.normal_(generator=generator(4))
    (row_const, row_each), (col_const, col_each) = strengths = ((0.3, 0.02), (0.1, 0.05))
    got = recorded(monkeypatch, model, entries, TrainOptions(max_steps=1, regularization=strengths))

    row, col, values, w = entries.coo()
    left, core, columns, b, c = leaves = [getattr(model, x).clone().requires_grad_() for x in model.__dataclass_fields__]
    x = core[0]
    for layer in core[1:]:
        x = layer @ x
    t = left @ x
    error = (t[row] * columns[col]).sum(1) + b[row] + c[col] - values
    row_strength, col_strength = (
        row_const + row_each * entries.row_counts().double(),
        col_const + col_each * entries.col_counts().double(),
    )
    penalty = (row_strength[:, None] * t.square()).sum() + (col_strength[:, None] * columns.square()).sum()
    penalty = penalty + (row_strength * b.square()).sum() + (col_strength * c.square()).sum()
    objective = ((1 if w is None else w) * error.square()).sum() / 2 + penalty / 2
    for name, g, wanted in zip(model.__dataclass_fields__, got, torch.autograd.grad(objective, leaves), strict=True):
        torch.testing.assert_close(g, wanted, rtol=1e-10, atol=1e-10, msg=f"{name}, L={depth}, weights={weights}")


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("noise_weights", [False, True])
def test_one_update_of_the_strengths_against_dense_formulas(weights, noise_weights):
    entries, _, _ = standardized(m=25, n=18, weights=weights, noise=0.3)
    model = solver.start(entries, 4, generator=generator(3))
    automatic = solver.Variational(model, entries, noise_weights)
    t, r = model.effective_left(), model.columns
    row_t, col_t, values, w = entries.coo()
    mask, given, target = np.zeros((3, 25, 18))
    mask[row_t, col_t], given[row_t, col_t], target[row_t, col_t] = 1, 1 if w is None else w.numpy(), values.numpy()
    T, R, b, c = (x.numpy() for x in (t, r, model.row_bias, model.col_bias))

    # The start: noise is half of what the biases leave, prior variances as if the rest were the factors'.
    rest = (given * (b[:, None] + c - target) ** 2).sum() / mask.sum()
    prior, noise = math.sqrt(3 * rest / 4), rest / 2
    assert automatic.noise == pytest.approx(noise)
    assert automatic.rows.prior_start == pytest.approx(prior)
    s_t, s_r = np.full(T.shape, prior / 10), np.full(R.shape, prior / 10)
    b_prior, c_prior = (b**2).mean(), (c**2).mean()
    s_b, s_c = noise / (mask.sum(1) + noise / b_prior), noise / (mask.sum(0) + noise / c_prior)

    error = T @ R.T + b[:, None] + c - target
    square = error**2 + T**2 @ s_r.T + s_t @ (R**2).T + s_t @ s_r.T  # expected, without the biases'
    row_loss, col_loss = ((given * error**2).sum(axis) for axis in (1, 0))
    automatic.update(t, r, model, torch.from_numpy(row_loss), torch.from_numpy(col_loss))

    level = (given * (square + s_b[:, None] + s_c)).sum() / given.sum()
    noise = (noise + level) / 2
    weight = given
    if noise_weights:
        u = (100 + mask.sum(1)) / (100 + (given * square).sum(1) / noise)
        v = (100 + mask.sum(0)) / (100 + (given * square).sum(0) / noise)
        u *= mask.sum() / (mask.sum(1) * u).sum()
        v *= mask.sum() / (mask.sum(0) * v).sum()
        weight = given * u[:, None] * v
        got = torch.zeros(25, 18, dtype=F64)
        got[row_t, col_t] = automatic.entries.by_row.weights
        np.testing.assert_allclose(got.numpy(), weight, rtol=1e-10)
        # The sums that the strengths come from carry the own side's new weight and the other side's old one.
        row_weight, col_weight = given * u[:, None], given * v
    else:
        row_weight = col_weight = given
    assert automatic.noise == pytest.approx(noise)
    sides = ((automatic.rows, row_weight, T, R, s_r, b), (automatic.cols, col_weight.T, R, T, s_t, c))
    for side, w_side, own, other, s_other, bias in sides:
        variance = noise / (noise / prior + w_side @ (other**2 + s_other))
        np.testing.assert_allclose(side.variance.numpy(), variance, rtol=1e-9)
        new_prior = (prior + 0.8 * (own**2 + variance).mean(0) + 0.2 * prior) / 2
        np.testing.assert_allclose(side.prior.numpy(), new_prior, rtol=1e-9)
        np.testing.assert_allclose(side.penalty.numpy(), noise / new_prior + w_side @ s_other, rtol=1e-9)
        bias_variance = noise / (w_side.sum(1) + noise / (bias**2).mean())
        assert side.bias_penalty == pytest.approx(noise / (bias**2 + bias_variance).mean())


def test_a_weight_of_2_is_an_entry_counted_twice():
    entries, _, _ = standardized(weights=True)
    row, col, values, w = entries.coo()
    whole = torch.where(w > 1, 2.0, 1.0)
    options = TrainOptions(max_steps=20, regularization=((0.2, 0.0), (0.2, 0.0)))
    weighted = lrk.ObservedEntries.from_coo(row, col, values, shape=entries.shape, weights=whole, dtype=F64)
    model = solver.start(weighted, 4, generator=generator(3))

    # A second copy of the rows holds the repeated entries: tied factors give the doubled loss.
    m = entries.shape[0]
    twice = whole == 2
    tall = lrk.ObservedEntries.from_coo(
        torch.cat([row, row[twice] + m]), torch.cat([col, col[twice]]), torch.cat([values, values[twice]]), shape=(2 * m, 30)
    )
    loss, _ = lrk.ops.completion_loss_and_gradients(
        torch.cat([model.left] * 2), model.core, model.columns.t(), tall,
        row_bias=torch.cat([model.row_bias] * 2), col_bias=model.col_bias,
    )  # fmt: skip
    result = solver.train(model.clone(), weighted, TrainOptions(max_steps=1, regularization=options.regularization))
    assert result.history[0]["loss"] == pytest.approx(float(loss), rel=1e-12)
    assert result.history[0]["train_rmse"] == pytest.approx(math.sqrt(2 * float(loss) / float(whole.sum())), rel=1e-12)


# ---------------------------------------------------------------------- starts


@pytest.mark.parametrize("weights", [False, True])
def test_damped_biases_are_alternating_damped_means(weights):
    entries, _, _ = standardized(m=12, n=9, weights=weights)
    row, col, values, w = entries.coo()
    weight, target = np.zeros((2, 12, 9))
    weight[row, col], target[row, col] = 1 if w is None else w, values
    b, c = np.zeros(12), np.zeros(9)
    for _ in range(10):
        c = (weight * (target - b[:, None])).sum(0) / (weight.sum(0) + 3)
        b = (weight * (target - c)).sum(1) / (weight.sum(1) + 5)
    row_bias, col_bias = solver.damped_biases(entries)
    np.testing.assert_allclose(row_bias.numpy(), b, rtol=1e-10)
    np.testing.assert_allclose(col_bias.numpy(), c, rtol=1e-10)
    only, none = solver.damped_biases(entries, columns=False, damping=(0.0, 0.0))
    np.testing.assert_allclose(only.numpy(), (weight * target).sum(1) / weight.sum(1), rtol=1e-10)
    assert not none.any()


def test_start_leaves_rows_and_columns_without_entries_at_zero():
    entries = lrk.ObservedEntries.from_coo([0, 0, 2, 3, 3], [1, 3, 1, 3, 4], [1.0, -1, 0.5, 2, -2], shape=(5, 6))
    model = solver.start(entries, 2, generator=generator())
    for kept, counts in (((model.left, model.row_bias), entries.row_counts()), ((model.columns,), entries.col_counts())):
        for x in kept:
            assert not x[counts == 0].any()
            assert x[counts > 0].any()
    solver.train(model, entries, TrainOptions(max_steps=30))
    assert not model.left[1].any()
    assert not model.columns[0].any()


def test_start_of_constant_values_predicts_them():
    entries = lrk.ObservedEntries.from_dense(torch.zeros(8, 9))
    model = solver.start(entries, 4, generator=generator())
    assert not predictions(model).any()
    solver.train(model, entries, TrainOptions(max_steps=20))
    assert not predictions(model).any()


def test_spectral_start_is_the_truncated_svd_of_the_centred_table():
    target = low_rank(60, 8, 3) + 2
    entries = lrk.ObservedEntries.from_dense(target)
    model = solver.spectral_start(entries, 3, generator=generator())
    torch.testing.assert_close(model.col_bias, target.mean(0))
    torch.testing.assert_close(predictions(model), target, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.left.square().mean(0), torch.ones(3, dtype=F64), rtol=1e-9, atol=1e-9)
    assert torch.equal(model.core, torch.eye(3, dtype=F64).repeat(3, 1, 1))


# ---------------------------------------------------------------------- train: results and endings


def test_train_recovers_a_noise_free_low_rank_matrix():
    entries, target, mask = standardized(m=120, n=100, dtype=torch.float32)
    model = solver.start(entries, 8, generator=generator())
    result = solver.train(model, entries)
    error = float((predictions(model) - target)[~mask].square().mean().sqrt())
    assert error < 0.03, error
    assert result.history[-1]["train_rmse"] < 0.02
    assert [record["step"] for record in result.history] == list(range(10, 301, 10))


@pytest.mark.parametrize("regularization", ["auto", ((0.1, 0.01), (0.1, 0.01))], ids=["auto", "fixed"])
def test_train_repeats_bit_by_bit_with_any_number_of_threads(regularization):
    entries, _, _ = standardized(m=400, n=300, dtype=torch.float32, noise=0.5)
    models = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        model = solver.start(entries, 16, generator=generator())
        solver.train(model, entries, TrainOptions(max_steps=25, regularization=regularization))
        models.append(model)
    assert same(models[0], models[1])
    assert same(models[0], models[2])


def test_validation_stops_early_and_keeps_the_best_model():
    entries, _, _ = standardized(m=60, n=50, noise=1.0, dtype=torch.float32)
    held = torch.rand(len(entries), generator=generator(5)) < 0.2
    train, validation = entries.select(~held), entries.select(held)
    model = solver.start(train, 20, generator=generator())
    options = TrainOptions(max_steps=400, regularization=((0.0, 0.0), (0.0, 0.0)), patience=4)
    result = solver.train(model, train, options, validation=validation)
    errors = [record["validation_rmse"] for record in result.history]
    assert result.status is Status.EARLY_STOPPED
    assert result.steps < 400
    assert int(np.argmin(errors)) == len(errors) - 1 - 4
    assert solver._rmse(model, validation, RowShard.of(Team(), 60)) == pytest.approx(min(errors), rel=1e-6)


def test_status_converged_or_max_steps():
    entries, _, _ = standardized(noise=0.5, dtype=torch.float32)
    for steps, status in ((20, Status.MAX_STEPS), (500, Status.CONVERGED)):
        model = solver.start(entries, 6, generator=generator())
        result = solver.train(model, entries, TrainOptions(max_steps=steps))
        assert (result.status, result.steps) == (status, steps)


def test_ctrl_c_in_the_callback_keeps_the_model_of_the_last_check():
    entries, _, _ = standardized(dtype=torch.float32)
    start = solver.start(entries, 6, generator=generator())
    kept = []

    def interrupt(step, record):
        kept.append(model.clone())
        if step == 30:
            raise KeyboardInterrupt

    model = start.clone()
    result = solver.train(model, entries, TrainOptions(), callback=interrupt)
    assert (result.status, result.steps) == (Status.INTERRUPTED, 30)
    assert same(model, kept[-1])
    assert not same(model, start)


def test_ctrl_c_inside_a_step_keeps_a_whole_model(monkeypatch):
    entries, _, _ = standardized(dtype=torch.float32)
    model = solver.start(entries, 6, generator=generator())
    start = model.clone()
    step = solver._Adam.step

    def half(self, grads, decay):
        step(self, [grads[0], None, None, None, None], decay)
        raise KeyboardInterrupt

    monkeypatch.setattr(solver._Adam, "step", half)
    assert solver.train(model, entries).status is Status.INTERRUPTED
    assert same(model, start)


@pytest.mark.parametrize("held_out", [False, True])
def test_divergence_keeps_finite_factors(held_out):
    entries, _, _ = standardized(dtype=torch.float32)
    model = solver.start(entries, 6, generator=generator())
    result = solver.train(model, entries, TrainOptions(learning_rate=1e20), validation=entries if held_out else None)
    assert result.status is Status.DIVERGED
    assert model.is_finite()


def test_weights_decide_between_contradicting_entries():
    g = generator()
    row, col = torch.randint(50, (1200,), generator=g), torch.randint(40, (1200,), generator=g)
    values = torch.where(torch.arange(1200) % 2 == 0, 1.0, -1.0)
    weights = torch.where(torch.arange(1200) % 2 == 0, 1.999, 0.001)
    entries = lrk.ObservedEntries.from_coo(row, col, values, weights=weights, duplicates="mean", shape=(50, 40))
    model = solver.start(entries, 4, generator=generator())
    solver.train(model, entries, TrainOptions(regularization=((5.0, 0.0), (5.0, 0.0))))
    assert float(predictions(model).mean()) > 0.8


def test_a_frozen_bias_stays_zero():
    entries, _, _ = standardized(dtype=torch.float32)
    model = solver.start(entries, 4, row_bias=False, generator=generator())
    solver.train(model, entries, TrainOptions(max_steps=20, row_bias=False))
    assert not model.row_bias.any()
    assert model.col_bias.any()


def test_the_model_is_trained_on_the_entries_device_and_in_their_dtype():
    entries, _, _ = standardized(dtype=F64)
    model = solver.start(entries, 4, generator=generator())
    assert {getattr(model, name).dtype for name in model.__dataclass_fields__} == {F64}
    assert {getattr(model, name).device for name in model.__dataclass_fields__} == {entries.device}
    clone = model.clone()
    assert isinstance(clone, CompletionModel)
    assert same(clone, model)
    assert clone.left.data_ptr() != model.left.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu_matches_the_cpu():
    entries, _, _ = standardized(dtype=F64)
    models = []
    for device in ("cpu", "cuda"):
        moved = entries.to(device)
        model = solver.start(moved, 6, generator=generator())
        solver.train(model, moved, TrainOptions(max_steps=50))
        models.append(predictions(model).cpu())
    torch.testing.assert_close(*models, rtol=1e-6, atol=1e-6)

"""DeepMatrixCompletion: scikit-learn's conventions, labels, partial_fit, files, bad input, and real ratings."""

import copy
import io
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the estimators need scikit-learn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from lowrank_kernels import DeepMatrixCompletion, solver
from lowrank_kernels.files import OutputError
from lowrank_kernels.solver import Status

DATA = Path(os.environ.get("LOWRANK_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")


def table(m=40, n=30, r=2, share=0.5, seed=0, noise=0.0):
    """Pairs, values of the observed entries, and the whole matrix."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(m, r)) @ rng.normal(size=(r, n))
    row, col = (rng.random((m, n)) < share).nonzero()
    return np.column_stack([row, col]), truth[row, col] + noise * rng.normal(size=len(row)), truth


def quick(**parameters):
    return DeepMatrixCompletion(**{"rank": 4, "max_steps": 30, "random_state": 0, **parameters})


def rmse(model, truth, rows=slice(None), cols=slice(None)):
    row, col = np.mgrid[: truth.shape[0], : truth.shape[1]]
    row, col = row[rows, cols].ravel(), col[rows, cols].ravel()
    return float(np.sqrt(np.mean((model.predict((row, col)) - truth[row, col]) ** 2)))


@pytest.fixture(scope="module")
def fitted():
    pairs, y, truth = table()
    return DeepMatrixCompletion(rank=4, max_steps=150, random_state=0).fit(pairs, y), pairs, y, truth


# ---------------------------------------------------------------------- scikit-learn's conventions


def test_parameters_clone_and_repr():
    model = DeepMatrixCompletion(rank=6, regularization=(0.1, 0.02), random_state=3)
    parameters = model.get_params()
    assert parameters["rank"] == 6
    twin = clone(model)
    assert twin is not model
    assert twin.get_params() == parameters
    assert model.set_params(depth=2, rank="auto") is model
    assert (model.depth, model.rank) == (2, "auto")
    with pytest.raises(ValueError, match="nonsense"):
        model.set_params(nonsense=1)
    assert "depth=2" in repr(model)


def test_the_constructor_checks_nothing_and_fit_changes_no_parameter():
    model = DeepMatrixCompletion(rank=-3, dtype="int8")
    assert (model.rank, model.dtype) == (-3, "int8")
    pairs, y, _ = table()
    model = quick(early_stopping=True)
    before = model.get_params()
    assert model.fit(pairs, y) is model
    assert model.get_params() == before


def test_not_fitted_is_said():
    model = DeepMatrixCompletion()
    for use in (
        lambda: check_is_fitted(model),
        lambda: model.predict([[0, 0]]),
        lambda: model.recommend(0),
        lambda: model.save("x.npz"),
        lambda: model.score([[0, 0]], [1.0]),
    ):
        with pytest.raises(NotFittedError, match="DeepMatrixCompletion"):
            use()
    assert not Path("x.npz").exists()


def test_score_is_r2_and_takes_weights(fitted):
    model, pairs, y, _ = fitted
    weight = np.linspace(0.1, 2, len(y))
    error = (model.predict(pairs) - y) ** 2
    assert model.score(pairs, y) == pytest.approx(1 - error.sum() / ((y - y.mean()) ** 2).sum())
    mean = np.average(y, weights=weight)
    wanted = 1 - (weight * error).sum() / (weight * (y - mean) ** 2).sum()
    assert model.score(pairs, y, sample_weight=weight) == pytest.approx(wanted)


def test_pipeline_grid_search_and_cross_validation():
    pairs, y, _ = table(share=0.7)
    pipeline = Pipeline([("model", quick())]).fit(pairs, y, model__sample_weight=np.ones(len(y)))
    assert np.array_equal(pipeline.predict(pairs), quick().fit(pairs, y, np.ones(len(y))).predict(pairs))
    folds = KFold(3, shuffle=True, random_state=0)
    scores = cross_val_score(quick(max_steps=150), pairs, y, cv=folds)
    assert scores.shape == (3,)
    assert scores.min() > 0.8
    search = GridSearchCV(quick(), {"rank": np.array([2, 4]), "regularization": ["auto", (0.1, 0.01)]}, cv=folds).fit(pairs, y)
    assert search.best_params_["rank"] in (2, 4)
    assert not np.isnan(search.cv_results_["mean_test_score"]).any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_predict_the_same(fitted, duplicate):
    model, pairs, _, _ = fitted
    twin = duplicate(model)
    assert np.array_equal(twin.predict(pairs), model.predict(pairs))
    assert twin.status_ is model.status_


def test_attributes(fitted):
    model, pairs, _, _ = fitted
    m, n = len(np.unique(pairs[:, 0])), len(np.unique(pairs[:, 1]))
    shapes = {"left_": (m, 4), "core_": (3, 4, 4), "right_": (4, n), "row_bias_": (m,), "col_bias_": (n,)}
    assert {name: getattr(model, name).shape for name in shapes} == shapes
    assert isinstance(model.status_, Status)
    assert model.n_steps_ == 150
    assert [record["step"] for record in model.history_] == list(range(10, 151, 10))
    assert set(model.history_[0]) == {"step", "train_rmse", "seconds"}
    assert model.n_features_in_ == 2
    assert list(model.row_labels_) == sorted(set(pairs[:, 0]))
    product = model.left_ @ model.core_[2] @ model.core_[1] @ model.core_[0] @ model.right_
    whole = product + model.row_bias_[:, None] + model.col_bias_ + model.offset_
    row, col = (np.searchsorted(*x) for x in ((model.row_labels_, pairs[:, 0]), (model.col_labels_, pairs[:, 1])))
    np.testing.assert_allclose(model.predict(pairs), whole[row, col], atol=1e-5)


# ---------------------------------------------------------------------- values


def test_it_recovers_a_low_rank_matrix():
    pairs, y, truth = table(m=120, n=90, r=3)
    model = DeepMatrixCompletion(random_state=0).fit(pairs, y)
    assert rmse(model, truth) < 0.02 * truth.std()


def test_scaling_and_shifting_y_scales_and_shifts_the_predictions():
    pairs, y, _ = table(noise=0.3)
    base = quick(dtype="float64").fit(pairs, y).predict(pairs)
    for factor, shift in ((1000.0, 0.0), (1.0, 5.0), (1e-20, 0.0), (2.0, 1e6)):
        got = quick(dtype="float64").fit(pairs, factor * y + shift).predict(pairs)
        np.testing.assert_allclose(got, factor * base + shift, rtol=1e-9, atol=1e-6 * factor)
    far = quick().fit(pairs, y + 1e6).predict(pairs)
    np.testing.assert_allclose(far - 1e6, quick().fit(pairs, y).predict(pairs), atol=1e-3)
    assert far.dtype == np.float64


def test_the_order_of_the_entries_does_not_matter():
    pairs, y, _ = table()
    order = np.random.default_rng(1).permutation(len(y))
    assert np.array_equal(quick().fit(pairs, y).predict(pairs), quick().fit(pairs[order], y[order]).predict(pairs))


@pytest.mark.parametrize("regularization", ["auto", (0.5, 0.1)])
def test_a_weight_of_0_is_an_absent_entry_and_the_unit_of_weights_does_not_matter(regularization):
    pairs, y, _ = table(noise=0.2)
    weight = np.ones(len(y))
    weight[::7] = 0
    model = quick(regularization=regularization, early_stopping=False)
    without = clone(model).fit(pairs[weight > 0], y[weight > 0])
    assert set(pairs[weight > 0, 0]) == set(pairs[:, 0])
    spoiled = np.where(weight > 0, y, 1e4)
    for scale in (1.0, 64.0):
        got = clone(model).fit(pairs, spoiled, sample_weight=scale * weight).predict(pairs)
        np.testing.assert_allclose(got, without.predict(pairs), atol=1e-4)


def test_repeated_entries_are_averaged_with_a_warning():
    pairs, y, _ = table()
    apart = np.concatenate([y - 0.5, y[:10] + 0.5, y[10:] + 0.5])
    with pytest.warns(UserWarning, match=rf"{len(y)} of {2 * len(y)} entries repeat a \(row, column\) pair") as caught:
        model = quick().fit(np.concatenate([pairs, pairs]), apart)
    assert caught[0].filename == __file__
    np.testing.assert_allclose(model.predict(pairs), quick().fit(pairs, y).predict(pairs), atol=1e-3)


def test_random_state():
    pairs, y, _ = table()
    one, two, other = (quick(random_state=seed).fit(pairs, y).predict(pairs) for seed in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    state = np.random.RandomState(0)
    assert np.array_equal(quick(random_state=state).fit(pairs, y).predict(pairs), one)
    quick(random_state=None).fit(pairs, y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype(dtype):
    pairs, y, _ = table()
    model = quick(dtype=dtype).fit(pairs, y)
    for name in ("left_", "core_", "right_", "row_bias_", "col_bias_"):
        assert getattr(model, name).dtype == dtype


def test_without_biases():
    pairs, y, _ = table()
    model = quick(fit_bias=False).fit(pairs, y)
    assert not model.row_bias_.any()
    assert not model.col_bias_.any()
    assert model.predict([[999, 999]])[0] == pytest.approx(y.mean())


# ---------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(np.int32),
        lambda x: x.astype(np.uint8),
        lambda x: x.astype(np.uint64),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(object),
        lambda x: x.tolist(),
        lambda x: [tuple(pair) for pair in x.tolist()],
        lambda x: (x[:, 0], x[:, 1]),
        lambda x: (x[:, 0].tolist(), tuple(x[:, 1].tolist())),
        lambda x: torch.from_numpy(x),
        lambda x: (torch.from_numpy(x[:, 0]), torch.from_numpy(x[:, 1])),
        lambda x: np.asfortranarray(x),
        lambda x: x[::-1][::-1],
    ],
)
def test_integer_labels_of_every_kind_are_the_same(fitted, convert):
    _, pairs, y, _ = fitted
    wanted = quick().fit(pairs, y).predict(pairs)
    model = quick().fit(convert(pairs), y)
    assert np.array_equal(model.predict(convert(pairs)), wanted)
    assert np.array_equal(model.predict(pairs), wanted)
    model.partial_fit(convert(pairs[:5]), y[:5])
    model.predict(pairs)


@pytest.mark.parametrize("kind", ["U", "object", "list", "S"])
def test_string_labels(fitted, kind):
    _, pairs, y, _ = fitted
    names = np.char.add(np.array([["row-", "spalte ä"]]), pairs.astype(str))
    if kind == "S":
        names = np.char.encode(names, "utf-8")
    given = {"U": names, "S": names, "object": names.astype(object), "list": names.tolist()}[kind]
    model = quick(max_steps=100).fit(given, y)
    assert model.score(given, y) > 0.5
    # A longer new label, then the same labels again: kinds and widths stay.
    new = np.array([["row-" + "9" * 30, str(names[0, 1]) if kind != "S" else "x"]])
    model.partial_fit(new.astype("S") if kind == "S" else new.astype(object), [1.0])
    assert model.row_labels_.dtype.kind == ("S" if kind == "S" else "U")
    assert np.isfinite(model.predict(given)).all()


def test_rows_and_columns_may_have_labels_of_different_kinds():
    pairs, y, _ = table()
    names = [f"film {j}" for j in pairs[:, 1]]
    model = quick().fit((pairs[:, 0], names), y)
    mixed = [(int(i), name) for i, name in zip(pairs[:, 0], names, strict=True)]
    assert np.array_equal(model.predict(mixed), model.predict((pairs[:, 0], names)))
    assert np.array_equal(quick().fit(mixed, y).predict(mixed), model.predict(mixed))
    assert set(model.recommend(3, n=3)[0]) <= set(names)


class Frame:
    """What the estimator needs of a pandas data frame."""

    class _Column:
        def __init__(self, values):
            self.values = values

        def to_numpy(self):
            return self.values

    def __init__(self, *columns):
        self.columns_ = [np.asarray(column) for column in columns]
        self.shape = (len(columns[0]), len(columns))
        self.iloc = self

    def __getitem__(self, key):
        return self._Column(self.columns_[key[1]])


def test_data_frames():
    pairs, y, _ = table()
    names = np.array([f"film {j}" for j in pairs[:, 1]], dtype=object)
    wanted = quick().fit((pairs[:, 0], names), y).predict((pairs[:, 0], names))
    frames = [Frame(pairs[:, 0], names)]
    for library in ("polars", "pandas"):
        try:
            frames.append(__import__(library).DataFrame({"user": pairs[:, 0], "film": names}))
        except ImportError:
            continue
    for frame in frames:
        assert np.array_equal(quick().fit(frame, y).predict(frame), wanted)
    with pytest.raises(ValueError, match=r"fit: pairs must have 2 columns \(row, column\), got 3"):
        quick().fit(Frame(names, names, names), y)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_columns_of_a_frame_in_another_order_are_refused(library, tmp_path):
    pairs, y, _ = table()
    frame = pytest.importorskip(library, reason=f"needs {library}").DataFrame({"user": pairs[:, 0], "item": pairs[:, 1]})
    model = quick().fit(frame, y)
    assert list(model.feature_names_in_) == ["user", "item"]
    model.save(tmp_path / "m.npz")
    for each in (model, DeepMatrixCompletion.load(tmp_path / "m.npz")):
        assert np.array_equal(each.predict(frame), each.predict(pairs))
        for call in (each.predict, lambda given, each=each: each.partial_fit(given, y)):
            with pytest.raises(ValueError, match="the columns must be user, item as in fit, got item, user; choose them"):
                call(frame[["item", "user"]])
    assert not hasattr(model.fit(pairs, y), "feature_names_in_")


def test_unseen_rows_and_columns_are_predicted_from_the_biases(fitted):
    model, pairs, _, _ = fitted
    i, j = pairs[0]
    row, col = np.searchsorted(model.row_labels_, i), np.searchsorted(model.col_labels_, j)
    got = model.predict([[i, 10**6], [-5, j], [10**6, -7]])
    wanted = [model.offset_ + model.row_bias_[row], model.offset_ + model.col_bias_[col], model.offset_]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    np.testing.assert_allclose(model.predict(np.array([[i + 0.5, j]])), model.predict([[-5, j]]))


def test_no_pairs_give_no_predictions(fitted):
    assert fitted[0].predict(np.empty((0, 2), dtype=int)).shape == (0,)


def test_many_pairs_are_predicted_in_blocks(fitted, monkeypatch):
    model, pairs, _, _ = fitted
    wanted = model.predict(pairs)
    monkeypatch.setattr("lowrank_kernels.completion.PREDICT_BLOCK", 7)
    assert np.array_equal(model.predict(pairs), wanted)


# ---------------------------------------------------------------------- recommend


def test_recommend(fitted):
    model, pairs, _, _ = fitted
    row = pairs[0, 0]
    seen = set(pairs[pairs[:, 0] == row, 1])
    labels, scores = model.recommend(row, n=5)
    assert len(labels) == 5
    assert not seen & set(labels)
    assert (np.diff(scores) <= 0).all()
    np.testing.assert_allclose(scores, model.predict([[row, label] for label in labels]), rtol=1e-5)
    unseen = sorted(set(pairs[:, 1]) - seen)
    every, _ = model.recommend(row, n=10_000)
    assert sorted(every) == unseen
    assert labels[0] == max(unseen, key=lambda j: model.predict([[row, j]])[0])
    everything, _ = model.recommend(row, n=10_000, exclude_seen=False)
    assert sorted(everything) == sorted(set(pairs[:, 1]))


def test_recommend_to_an_unseen_row_goes_by_the_biases(fitted):
    model = fitted[0]
    labels, scores = model.recommend(10**6, n=3)
    order = np.argsort(-model.col_bias_, kind="stable")[:3]
    assert np.array_equal(labels, model.col_labels_[order])
    np.testing.assert_allclose(scores, model.offset_ + model.col_bias_[order], rtol=1e-6)


@pytest.mark.parametrize("n", [0, -1, 2.5, "3", True])
def test_recommend_refuses_a_bad_n(fitted, n):
    with pytest.raises(ValueError, match=r"recommend: n must be an integer of at least 1, got"):
        fitted[0].recommend(0, n=n)


def test_recommend_refuses_what_is_no_label(fitted):
    with pytest.raises(ValueError, match=r"recommend: row must be one label, got an array of shape \(2,\)"):
        fitted[0].recommend([1, 2])
    with pytest.raises(TypeError, match="row labels must be numbers as in fit, got strings"):
        fitted[0].recommend("1")


# ---------------------------------------------------------------------- partial_fit, warm start


@pytest.mark.parametrize("side", ["rows", "columns", "entries"])
def test_partial_fit_learns_what_is_new_and_keeps_what_is_old(side):
    pairs, y, truth = table(m=150, n=120, r=3, share=0.4)
    rng = np.random.default_rng(1)
    old = {"rows": pairs[:, 0] % 5 != 0, "columns": pairs[:, 1] % 5 != 0, "entries": rng.random(len(y)) < 0.7}[side]
    model = DeepMatrixCompletion(random_state=0).fit(pairs[old], y[old])
    rows, cols = np.unique(pairs[old, 0]), np.unique(pairs[old, 1])
    before = rmse(model, truth, *np.ix_(rows, cols))
    model.partial_fit(pairs[~old], y[~old])
    assert model.n_steps_ == 100
    assert rmse(model, truth, *np.ix_(rows, cols)) < before + 0.03 * truth.std()
    assert rmse(model, truth) < 0.05 * truth.std()
    assert list(model.row_labels_) == sorted(set(pairs[:, 0]))
    assert len(model.entries_["value"]) == len(y)


def test_partial_fit_learns_rows_that_meet_new_columns_only():
    pairs, y, truth = table(m=100, n=80, r=2, share=0.6)
    first, second = (pairs < [50, 40]).all(1), (pairs >= [50, 40]).all(1)
    model = DeepMatrixCompletion(random_state=0).fit(pairs[first], y[first]).partial_fit(pairs[second], y[second])
    assert rmse(model, truth, slice(50, None), slice(40, None)) < 0.5 * truth.std()


def test_partial_fit_replaces_known_entries_without_a_warning():
    pairs, y, _ = table()
    model = quick(max_steps=300).fit(pairs, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.partial_fit(pairs, y + 0.3)
    assert len(model.entries_["value"]) == len(y)
    assert model.offset_ == pytest.approx(y.mean() + 0.3)
    assert np.mean(model.predict(pairs) - y) == pytest.approx(0.3, abs=0.05)


def test_partial_fit_first_is_fit_and_carries_weights():
    pairs, y, _ = table()
    assert np.array_equal(quick().partial_fit(pairs, y).predict(pairs), quick().fit(pairs, y).predict(pairs))
    model = quick().fit(pairs[10:], y[10:])
    model.partial_fit(pairs[:10], y[:10], sample_weight=np.full(10, 3.0))
    weight = model.entries_["weight"]
    assert sorted(weight) == [1.0] * (len(y) - 10) + [3.0] * 10


def test_partial_fit_after_a_tiny_fit_starts_anew_with_the_rank_of_the_grown_matrix():
    pairs, y, truth = table(m=80, n=60, r=3)
    for tiny in (pairs[:, 0] < 1, pairs[:, 0] < 4):
        model = DeepMatrixCompletion(random_state=0).fit(pairs[tiny], y[tiny]).partial_fit(pairs[~tiny], y[~tiny])
        assert model.left_.shape[1] == 32
        assert rmse(model, truth) < 0.1 * truth.std()


def test_partial_fit_after_constant_values_learns():
    pairs, y, truth = table(r=1)
    model = quick(max_steps=300).fit(pairs, np.full(len(y), 3.0)).partial_fit(pairs, y)
    assert rmse(model, truth) < 0.3 * truth.std()


def test_warm_start_continues():
    pairs, y, _ = table()
    model = quick(warm_start=True).fit(pairs, y)
    first = model.history_[-1]["train_rmse"]
    model.fit(pairs, y)
    assert model.history_[0]["train_rmse"] < 1.2 * first
    assert model.history_[-1]["train_rmse"] < first
    more = np.concatenate([pairs, [[999, 0]]])
    fresh = quick().fit(more, np.append(y, 1.0)).predict(more)
    assert np.array_equal(model.fit(more, np.append(y, 1.0)).predict(more), fresh)  # other labels: a new start


# ---------------------------------------------------------------------- endings and progress


def test_warm_start_without_biases_has_none():
    pairs, y, _ = table()
    model = quick(warm_start=True).fit(pairs, y + 50.0 * pairs[:, 0])
    assert abs(model.row_bias_).max() > 10
    model.set_params(fit_bias=False).fit(pairs, y)
    assert abs(model.row_bias_).max() == abs(model.col_bias_).max() == 0


@pytest.mark.parametrize("options", [{}, {"regularization": (0.1, 0.02)}], ids=["auto", "early_stopping"])
def test_torchs_defaults_do_not_matter(options):
    """As with torch.set_default_device("cuda"): what is drawn on the CPU, by a seed, stays there."""
    pairs, y, _ = table()
    wanted = quick(**options).fit(pairs, y).predict(pairs)
    with torch.device("meta"):
        assert np.array_equal(quick(**options).fit(pairs, y).predict(pairs), wanted)
    torch.set_default_dtype(torch.float64)  # conftest restores
    assert np.array_equal(quick(**options).fit(pairs, y).predict(pairs), wanted)


def test_early_stopping_holds_entries_out():
    pairs, y, _ = table(noise=0.8)
    model = quick(rank=20, max_steps=400, early_stopping=True, regularization=(0.0, 0.0), patience=2).fit(pairs, y)
    assert model.status_ is Status.EARLY_STOPPED
    assert model.n_steps_ < 400
    assert "validation_rmse" in model.history_[-1]
    errors = [record["validation_rmse"] for record in model.history_]
    assert int(np.argmin(errors)) == len(errors) - 3
    assert "validation_rmse" in quick(regularization=(0.1, 0.1)).fit(pairs, y).history_[0]
    assert "validation_rmse" not in quick().fit(pairs, y).history_[0]


def test_early_stopping_with_too_few_entries_to_hold_out():
    model = quick(rank="auto", early_stopping=True).fit([[0, 0], [1, 1]], [1.0, 2.0])
    assert np.isfinite(model.predict([[0, 0]])).all()


def test_progress_is_called_in_units_of_y():
    pairs, y, _ = table()
    seen = []
    quick(progress=lambda *given: seen.append(given)).fit(pairs, 1000 * y)
    plain = quick().fit(pairs, y)
    assert [(step, total) for step, total, _ in seen] == [(10, 30), (20, 30), (30, 30)]
    wanted = 1000 * plain.history_[-1]["train_rmse"]
    assert seen[-1][2]["train_rmse"] == pytest.approx(wanted, rel=1e-3)


def test_progress_true_draws_a_bar(capsys):
    pytest.importorskip("rich", reason="tables need rich, of lowrank-kernels[all]")
    pairs, y, _ = table()
    quick(progress=True).fit(pairs, y)
    assert "fit" in capsys.readouterr().out


@pytest.mark.parametrize("first", [False, True])
def test_ctrl_c_keeps_the_best_model(first):
    pairs, y, truth = table()

    def interrupt(step, total, record):
        if step == (10 if first else 200):
            raise KeyboardInterrupt

    model = quick(max_steps=300, progress=interrupt).fit(pairs, y)
    assert model.status_ is Status.INTERRUPTED
    assert "warm_start" in model.status_.message
    if not first:
        assert rmse(model, truth) < 0.5 * truth.std()
    model.predict(pairs)


def test_divergence_warns_and_says_what_to_do():
    pairs, y, _ = table()
    with pytest.warns(UserWarning, match="DeepMatrixCompletion: the loss became infinite or NaN.*learning rate") as caught:
        model = quick(learning_rate=1e25).fit(pairs, y)
    assert caught[0].filename == __file__
    assert model.status_ is Status.DIVERGED
    assert np.isfinite(model.predict(pairs)).all()


# ---------------------------------------------------------------------- small and degenerate data


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-9, 1e8])
def test_constant_values(value):
    pairs, y, _ = table()
    model = quick().fit(pairs, np.full(len(y), value))
    np.testing.assert_allclose(model.predict([*pairs.tolist(), [999, 999]]), value, rtol=1e-6, atol=1e-300)


def test_a_single_entry():
    model = DeepMatrixCompletion(random_state=0).fit([["a", "b"]], [2.5])
    np.testing.assert_allclose(model.predict([["a", "b"], ["a", "c"], ["x", "y"]]), 2.5)
    assert len(model.recommend("a")[0]) == 0
    assert list(model.recommend("a", exclude_seen=False)[0]) == ["b"]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_single_row_or_column(axis):
    pairs = np.zeros((20, 2), dtype=int)
    pairs[:, axis] = np.arange(20)
    y = np.linspace(-1, 1, 20)
    model = DeepMatrixCompletion(random_state=0).fit(pairs, y)
    assert np.corrcoef(model.predict(pairs), y)[0, 1] > 0.99


def test_thirty_entries():
    pairs, y, _ = table(m=9, n=8, r=1, share=0.4, seed=3)
    model = DeepMatrixCompletion(random_state=0).fit(pairs[:30], y[:30])
    assert np.isfinite(model.predict(pairs)).all()
    assert model.left_.shape[1] <= 8


def test_two_by_two():
    model = DeepMatrixCompletion(rank=2, random_state=0).fit([[0, 0], [0, 1], [1, 0], [1, 1]], [1.0, 2, 3, 4])
    assert model.predict([[1, 1]])[0] > model.predict([[0, 0]])[0]


# ---------------------------------------------------------------------- bad parameters


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [("rank", x, "rank must be 'auto' or an even integer of at least 2") for x in (0, 1, 3, -2, 2.0, True, "big", None)]
    + [("rank", 100, "rank must be 'auto' or at most 30 for 40 rows and 30 columns")]
    + [("depth", x, "depth must be an integer of at least 1") for x in (0, -1, 1.5, "3", None)]
    + [("max_steps", x, "max_steps must be an integer of at least 1") for x in (0, 10.5, True)]
    + [("learning_rate", x, "learning_rate must be positive and finite") for x in (0, -1, np.nan, np.inf, "fast")]
    + [
        ("regularization", x, r"regularization must be 'auto' or a pair \(constant, per_observation\) of non-negative")
        for x in ("none", 0.1, (1,), (1, 2, 3), (-1, 0), (0, np.nan), ("a", "b"), None)
    ]
    + [("early_stopping", x, "early_stopping must be True, False or 'auto'") for x in ("yes", 2, None)]
    + [("validation_fraction", x, "validation_fraction must be between 0 and 1") for x in (0, 1, -0.1, np.nan, "a")]
    + [("patience", x, "patience must be an integer of at least 1") for x in (0, 1.5)]
    + [("dtype", x, "dtype must be 'float32' or 'float64'") for x in ("float16", None, "int8")]
    + [("progress", x, "progress must be True, False or a callable") for x in (1, "bar")]
    + [("device", x, "device must be None or a torch device of this machine") for x in ("nonsense", "cuda:99", 3.5)],
)
def test_bad_parameters_are_named(name, value, wanted):
    pairs, y, _ = table()
    model = quick(**{name: value})
    with pytest.raises(ValueError, match=f"DeepMatrixCompletion: {wanted}.*got"):
        model.fit(pairs, y)
    with pytest.raises(NotFittedError):
        model.predict(pairs)


def test_numpy_numbers_are_fine_parameters(tmp_path):
    pairs, y, _ = table()
    model = quick(
        rank=np.int64(4),
        depth=np.int32(2),
        learning_rate=np.float32(0.03),
        regularization=np.array([0.1, 0.01]),
        early_stopping=np.True_,
        random_state=np.int64(0),
        device=torch.device("cpu"),
    ).fit(pairs, y)
    model.save(tmp_path / "m.npz")
    assert np.array_equal(DeepMatrixCompletion.load(tmp_path / "m.npz").predict(pairs), model.predict(pairs))


# ---------------------------------------------------------------------- bad input

PAIRS, Y, _ = table()


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize(
    ("pairs", "y", "error", "wanted"),
    [
        (PAIRS, np.where(np.arange(len(Y)) == 3, np.nan, Y), ValueError, "y must be finite, got nan at position 3"),
        (PAIRS, np.where(np.arange(len(Y)) == 3, -np.inf, Y), ValueError, "y must be finite, got -inf at position 3"),
        (PAIRS, Y[:-1], ValueError, rf"y must have shape \({len(Y)},\) like pairs, got \({len(Y) - 1},\)"),
        (PAIRS, Y[:, None], ValueError, rf"y must have shape \({len(Y)},\) like pairs, got \({len(Y)}, 1\)"),
        (PAIRS, Y.astype(str), TypeError, "y must hold numbers: got <U"),
        (PAIRS, Y + 1j, TypeError, "y must hold numbers: got complex128"),
        (PAIRS, [None] * len(Y), (TypeError, ValueError), "y must "),
        (PAIRS, [[1], [1, 2]], (TypeError, ValueError), "y must hold numbers"),
        (PAIRS[:, :1], Y, ValueError, r"pairs must be an \(entries, 2\) array .* got shape \(\d+, 1\)"),
        (PAIRS.ravel(), Y, ValueError, r"pairs must be an \(entries, 2\) array"),
        (PAIRS[:, :, None], Y, ValueError, r"pairs must be an \(entries, 2\) array"),
        (3, Y, ValueError, r"pairs must be an \(entries, 2\) array .* got shape \(\)"),
        ([[1, 2], [3]], [1.0, 2.0], ValueError, r"pairs must be an \(entries, 2\) array"),
        ((PAIRS[:, 0], PAIRS[1:, 1]), Y, ValueError, r"labels must be 1-D and of one length, got \(\d+,\) and \(\d+,\)"),
        ((1, 2), [1.0], ValueError, r"labels must be 1-D and of one length, got \(\) and \(\)"),
        (np.empty((0, 2), int), [], ValueError, "pairs is empty; at least one observed entry is needed"),
        (([], []), [], ValueError, "pairs is empty; at least one observed entry is needed"),
        (np.array([[1.0, np.nan], [2, 3]]), [1, 2], ValueError, "column labels must not be missing.*got nan at position 0"),
        (np.array([[1, 2], [None, 3]], dtype=object), [1, 2], ValueError, "row labels must not be missing.*None at position 1"),
        (([1, "a"], [1, 2]), [1.0, 2.0], TypeError, "row labels must all be of one kind, numbers or strings, got int and str"),
        (PAIRS, Y * 1e38, ValueError, "y must have a spread between .* in float32.*use dtype='float64'"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(method, pairs, y, error, wanted):
    model = quick()
    with pytest.raises(error, match=f"DeepMatrixCompletion.*{wanted}"):
        getattr(model, method)(pairs, y)
    with pytest.raises(NotFittedError):
        model.predict(PAIRS)


@pytest.mark.parametrize(
    ("pairs", "y", "wanted"),
    [
        (PAIRS, Y * np.nan, "y must be finite"),
        (np.empty((0, 2), int), [], "pairs is empty"),
        (np.array([[np.inf, 1.0]]), [1.0], "row labels must not be missing"),
        (np.array([["a", "b"]]), [1.0], "row labels must be numbers as in fit, got strings"),
        ((np.array([1]), np.array([b"b"])), [1.0], "column labels must be numbers as in fit, got bytes"),
        (np.array([[777, 778]]), [1e38], "y must have a spread"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_a_refused_call_leaves_a_fitted_model_as_it_was(method, pairs, y, wanted):
    model = quick().fit(PAIRS, Y)
    before = model.predict(PAIRS)
    state = dict(vars(model))
    if method == "fit" and "as in fit" in wanted:  # fit takes other labels
        model.set_params(rank=100)
        wanted = "rank must be"
    with pytest.raises((ValueError, TypeError), match=wanted):
        getattr(model, method)(pairs, y)
    assert vars(model).keys() == state.keys()
    assert np.array_equal(model.predict(PAIRS), before)


def test_missing_dates_are_no_labels():
    dates = np.array(["2026-01-01", "NaT", "2026-01-03"], dtype="datetime64[D]")
    with pytest.raises(ValueError, match=r"row labels must not be missing, NaN or infinite, got NaT at position 1"):
        quick().fit((dates, np.arange(3)), np.arange(3.0))


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        (np.ones(3), "sample_weight must have shape"),
        (-np.ones(len(Y)), "sample_weight must be finite and not negative, got -1.0 at position 0"),
        (np.full(len(Y), np.nan), "sample_weight must be finite and not negative, got nan"),
        (np.zeros(len(Y)), "sample_weight must not be 0 everywhere"),
        (["a"] * len(Y), "sample_weight must hold numbers"),
    ],
)
def test_bad_weights_are_named(weight, wanted):
    with pytest.raises((ValueError, TypeError), match=wanted):
        quick().fit(PAIRS, Y, sample_weight=weight)


def test_predict_refuses_labels_of_another_kind(fitted):
    with pytest.raises(TypeError, match="row labels must be numbers as in fit, got strings; unequal types never match"):
        fitted[0].predict([["1", "2"]])
    with pytest.raises(ValueError, match=r"predict: pairs must be an \(entries, 2\) array"):
        fitted[0].predict([1, 2])


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("labels", ["numbers", "strings"])
@pytest.mark.parametrize("weighted", [False, True])
def test_save_and_load_predict_the_same_bits_and_go_on(tmp_path, labels, weighted):
    pairs = PAIRS if labels == "numbers" else np.char.add("ö", PAIRS.astype(str))
    weight = np.linspace(0.5, 2, len(Y)) if weighted else None
    model = quick(regularization=(0.1, 0.02)).fit(pairs, Y, weight)
    path = tmp_path / "model.npz"
    model.save(path)
    assert [x.name for x in tmp_path.iterdir()] == ["model.npz"]
    twin = DeepMatrixCompletion.load(path)
    assert np.array_equal(twin.predict(pairs), model.predict(pairs))
    assert twin.get_params() == model.get_params()
    assert twin.history_ == model.history_
    assert (twin.status_, twin.n_steps_, twin.n_features_in_) == (model.status_, 30, 2)
    assert np.array_equal(twin.recommend(pairs[0, 0])[0], model.recommend(pairs[0, 0])[0])
    a, b = (x.partial_fit(pairs[:9], Y[:9] + 1).predict(pairs) for x in (model, twin))
    assert np.array_equal(a, b)


def test_save_leaves_out_what_json_cannot_hold(tmp_path):
    model = quick(progress=lambda *given: None, random_state=np.random.RandomState(0)).fit(PAIRS, Y)
    model.save(tmp_path / "m.npz")
    twin = DeepMatrixCompletion.load(str(tmp_path / "m.npz"))
    assert twin.progress is False
    assert twin.random_state is None


def test_save_never_replaces_a_file_unasked(tmp_path):
    model = quick().fit(PAIRS, Y)
    path = tmp_path / "m.npz"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        model.save(path)
    assert path.read_bytes() == b"precious"
    model.save(path, overwrite=True)
    DeepMatrixCompletion.load(path)
    with pytest.raises(ValueError, match=r"m\.txt.*\.npz"):
        model.save(tmp_path / "m.txt")
    with pytest.raises(OSError, match="missing"):
        model.save(tmp_path / "missing" / "m.npz")


def test_labels_that_no_array_holds_are_refused(tmp_path):
    pairs = np.empty((2, 2), dtype=object)
    pairs[:] = [[(1, 2), 1], [(3, 4), 2]]
    model = quick(rank="auto").fit(pairs, [1.0, 2.0])
    with pytest.raises(TypeError, match="row labels must be numbers or strings to be saved, got object"):
        model.save(tmp_path / "m.npz")
    assert not list(tmp_path.iterdir())


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch bomb-went-off",))


def rewritten(path, **changes):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        else:
            arrays[name] = change(arrays[name])
    np.savez(path, **arrays)


def header(**changes):
    return lambda old: np.array(json.dumps({**json.loads(str(old)), **changes}))


def test_load_refuses_other_and_damaged_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick().fit(PAIRS, Y).save("good.npz")
    good = Path("good.npz").read_bytes()
    bomb = io.BytesIO()
    np.save(bomb, np.array([Bomb()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile("pickle.npz", "w") as archive:
        archive.writestr("header.npy", bomb.getvalue())
    Path("raw-pickle.npz").write_bytes(pickle.dumps(Bomb()))
    Path("text.npz").write_text("row,col,value\n")
    Path("empty.npz").write_bytes(b"")
    Path("truncated.npz").write_bytes(good[: len(good) // 2])
    np.save("array.npy", np.ones(3))
    np.savez("other.npz", x=np.ones(3))
    changes = {
        "format": {"header": header(format="lowrank_kernels.Other/1")},
        "parameter": {"header": header(parameters={"nonsense": 1})},
        "status": {"header": header(status="NONSENSE")},
        "no-factor": {"core_": None},
        "shape": {"left_": lambda x: x[:, :-1]},
        "depth": {"core_": lambda x: x[0]},
        "labels": {"row_labels_": lambda x: x[1:]},
        "entries": {"entries_row": lambda x: x + 10_000},
        "entries-short": {"entries_value": lambda x: x[1:]},
    }
    for name, change in changes.items():
        Path(f"{name}.npz").write_bytes(good)
        rewritten(f"{name}.npz", **change)
    others = ["pickle.npz", "raw-pickle.npz", "text.npz", "empty.npz", "truncated.npz", "array.npy", "other.npz"]
    for name in [*others, *(f"{name}.npz" for name in changes)]:
        with pytest.raises(ValueError, match=f"DeepMatrixCompletion.load: {name} is not a whole model saved by this class"):
            DeepMatrixCompletion.load(name)
    assert not Path("bomb-went-off").exists()
    with pytest.raises(FileNotFoundError, match="absent"):
        DeepMatrixCompletion.load("absent.npz")
    DeepMatrixCompletion.load("good.npz")


# ---------------------------------------------------------------------- real ratings


def test_real_ratings_beat_the_bar_and_the_biases():
    path = DATA / "ml-latest-small" / "ratings.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent; set LOWRANK_DATA to a folder that holds ml-latest-small")
    ratings = np.loadtxt(path, delimiter=",", skiprows=1, usecols=(0, 1, 2))
    order = np.random.default_rng(0).permutation(len(ratings))
    test, train = ratings[order[: len(ratings) // 10]], ratings[order[len(ratings) // 10 :]]
    pairs, y = train[:, :2].astype(int), train[:, 2]
    model = DeepMatrixCompletion(random_state=0).fit(pairs, y)

    row_bias, col_bias = solver.damped_biases(
        solver.ObservedEntries.from_coo(
            np.searchsorted(model.row_labels_, pairs[:, 0]),
            np.searchsorted(model.col_labels_, pairs[:, 1]),
            y - y.mean(),
            shape=(len(model.row_labels_), len(model.col_labels_)),
        )
    )
    biases = copy.copy(model)
    biases.left_, biases.row_bias_, biases.col_bias_ = 0 * model.left_, row_bias.numpy(), col_bias.numpy()
    errors = {
        name: float(np.sqrt(np.mean((m.predict(test[:, :2].astype(int)) - test[:, 2]) ** 2)))
        for name, m in (("model", model), ("biases", biases))
    }
    assert errors["model"] <= 0.870, errors
    assert errors["model"] < errors["biases"] - 0.01, errors

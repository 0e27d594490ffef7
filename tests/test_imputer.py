"""LowRankImputer: scikit-learn's conventions, what counts as missing, odd tables, files, and real sensors."""

import copy
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the estimators need scikit-learn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from lowrank_kernels import DeepMatrixCompletion, LowRankImputer
from lowrank_kernels.files import OutputError
from lowrank_kernels.solver import Status

DATA = Path(os.environ.get("LOWRANK_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")


def curved(rows=400, seed=0, share=0.15):
    """Six columns that are functions of two hidden ones, and the same with holes."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, rows))
    whole = np.column_stack([a, b, a + b, a * b, a**2, 3 - 2 * b + 0.05 * rng.normal(size=rows)])
    holes = whole.copy()
    holes[rng.random(whole.shape) < share] = np.nan
    return whole, holes


def quick(**parameters):
    return LowRankImputer(**{"max_steps": 30, "random_state": 0, **parameters})


WHOLE, HOLES = curved()


def error(filled, whole=WHOLE, holes=HOLES):
    """In standard deviations of each column."""
    return float(np.sqrt(np.mean((((filled - whole) / np.nanstd(holes, 0))[np.isnan(holes)]) ** 2)))


# ---------------------------------------------------------------------- scikit-learn's conventions


def test_scikit_learns_own_checks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tables without an observed cell and skipped checks
        check_estimator(quick(max_steps=10))


def test_parameters_clone_pipeline_and_pickles():
    model = quick(window=1, missing_values=-1.0)
    assert clone(model).get_params() == model.get_params()
    fitted = quick().fit(HOLES)
    wanted = fitted.transform(HOLES)
    for twin in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert np.array_equal(twin.transform(HOLES), wanted)
    pipeline = make_pipeline(StandardScaler(), quick(), Ridge()).fit(HOLES, WHOLE[:, 0])
    assert pipeline.score(HOLES, WHOLE[:, 0]) > 0.8


def test_not_fitted_is_said(tmp_path):
    for use in (
        lambda m: m.transform(HOLES),
        lambda m: m.get_feature_names_out(),
        lambda m: m.save(tmp_path / "m.npz"),
    ):
        with pytest.raises(NotFittedError, match="LowRankImputer"):
            use(LowRankImputer())


def test_feature_names():
    model = quick().fit(HOLES)
    assert list(model.get_feature_names_out()) == [f"x{i}" for i in range(6)]
    assert list(model.get_feature_names_out(list("abcdef"))) == list("abcdef")
    with pytest.raises(ValueError, match=r"input_features must be 6 names, got shape \(2,\)"):
        model.get_feature_names_out(["a", "b"])


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frames_keep_their_names(library, tmp_path):
    frame = pytest.importorskip(library, reason=f"needs {library}").DataFrame(dict(zip("abcdef", HOLES.T, strict=True)))
    model = quick().fit(frame)
    assert list(model.feature_names_in_) == list(model.get_feature_names_out()) == list("abcdef")
    with pytest.raises(ValueError, match="input_features must equal feature_names_in_"):
        model.get_feature_names_out(list("ABCDEF"))
    out = model.set_output(transform=library).transform(frame)
    assert list(out.columns) == list("abcdef")
    np.testing.assert_array_equal(out.to_numpy(), quick().fit_transform(HOLES))
    model.save(tmp_path / "m.npz")
    assert list(LowRankImputer.load(tmp_path / "m.npz").get_feature_names_out()) == list("abcdef")


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("library", [None, "pandas", "polars"])
def test_a_placeholder_is_what_the_dtype_makes_of_it(library):
    """float32 has no -999.9."""
    table = np.where(np.isnan(HOLES), -999.9, HOLES)
    given = table.astype(np.float32)
    if library is not None:  # a column of float64 beside them
        columns = {name: table[:, j].astype(np.float32 if j else np.float64) for j, name in enumerate("abcdef")}
        given = pytest.importorskip(library, reason=f"needs {library}").DataFrame(columns)
    filled = np.asarray(quick(missing_values=-999.9).fit_transform(given))
    assert filled.min() > -100


def test_it_beats_column_means_on_a_nonlinear_table_and_products_help():
    means = np.where(np.isnan(HOLES), np.nanmean(HOLES, 0), HOLES)
    ours, linear = (LowRankImputer(degree=degree, random_state=0).fit_transform(HOLES) for degree in ("auto", 1))
    assert error(ours) < 0.7 * error(means)
    assert error(ours) < error(linear)


def test_observed_cells_come_back_unchanged_and_x_is_not_touched():
    given = HOLES.copy()
    out = quick().fit_transform(given)
    np.testing.assert_array_equal(given, HOLES)
    np.testing.assert_array_equal(out[~np.isnan(HOLES)], HOLES[~np.isnan(HOLES)])
    assert np.isfinite(out).all()
    assert out.dtype == np.float64


def test_nan_mask_and_placeholder_mean_the_same():
    wanted = quick().fit_transform(HOLES)
    mask = ~np.isnan(HOLES)
    spoiled = np.where(mask, HOLES, -200.0)
    assert np.array_equal(quick(missing_values=-200).fit_transform(spoiled), wanted)
    assert np.array_equal(quick().fit_transform(np.where(mask, HOLES, np.inf), mask=mask), wanted)
    model = quick().fit(spoiled, mask=mask)
    assert np.array_equal(model.transform(spoiled, mask=mask), wanted)
    half = np.where(np.arange(len(HOLES))[:, None] % 2 == 0, HOLES, spoiled)  # NaN is missing beside a placeholder
    assert np.array_equal(quick(missing_values=-200).fit_transform(half), wanted)


def test_new_rows():
    model = LowRankImputer(random_state=0).fit(HOLES)
    whole, holes = curved(seed=5)
    assert error(model.transform(holes), whole, holes) < 0.8
    one = model.transform(holes[:1])
    np.testing.assert_allclose(one, model.transform(holes)[:1], rtol=1e-9)
    np.testing.assert_array_equal(model.transform(whole), whole)


def test_a_row_without_observed_cells_gets_about_the_means():
    out = LowRankImputer(random_state=0).fit(HOLES).transform(np.full((1, 6), np.nan))
    np.testing.assert_allclose(out[0], np.nanmean(HOLES, 0), atol=0.6)
    holes = HOLES.copy()
    holes[7] = np.nan
    assert np.isfinite(quick().fit_transform(holes)).all()


def test_scaling_and_shifting_columns_scales_and_shifts_the_result():
    scale, shift = np.array([1, 1e-3, 1e6, 1e160, 1, 10]), np.array([0, 5, 1e7, 0, -3, 1.0])
    base = quick(dtype="float64").fit_transform(HOLES)
    out = quick(dtype="float64").fit_transform(HOLES * scale + shift)
    np.testing.assert_allclose((out - shift) / scale, base, rtol=1e-5, atol=1e-5)


def test_it_repeats_bit_by_bit():
    one, two, other = (quick(random_state=seed).fit_transform(HOLES) for seed in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_window_joins_neighbouring_rows():
    t = np.arange(600)
    whole = np.column_stack([np.sin(t / 9), np.cos(t / 9) * np.sin(t / 31)])
    holes = whole.copy()
    hidden = np.random.default_rng(0).random(len(t)) < 0.2
    holes[hidden] = np.nan  # whole rows: only the neighbours know
    alone, joined = (LowRankImputer(window=w, random_state=0).fit_transform(holes) for w in (0, 2))
    assert error(joined, whole, holes) < 0.4 * error(alone, whole, holes)
    assert np.isfinite(quick(window=50).fit_transform(holes[:20])).all()


def test_wide_tables_go_row_by_row_with_the_same_result(monkeypatch):
    wanted = quick().fit_transform(HOLES)
    monkeypatch.setattr("lowrank_kernels.imputer.BLOCK_NUMBERS", 1 << 8)
    np.testing.assert_allclose(quick().fit_transform(HOLES), wanted, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------- odd tables


@pytest.mark.parametrize("keep", [False, True])
def test_empty_columns(keep):
    holes = HOLES.copy()
    holes[:, 2] = np.nan
    model = quick(keep_empty_features=keep)
    if keep:
        out = model.fit_transform(holes)
        assert out.shape == holes.shape
        assert not out[:, 2].any()
        np.testing.assert_array_equal(model.transform(HOLES)[:, 2], np.nan_to_num(HOLES[:, 2]))
    else:
        with pytest.warns(UserWarning, match=r"columns \[2\] have no observed cell and are dropped"):
            out = model.fit_transform(holes)
        assert out.shape == (400, 5)
        assert list(model.get_feature_names_out()) == ["x0", "x1", "x3", "x4", "x5"]


@pytest.mark.parametrize("value", [0.0, 7.0, -1e-9, 1e12])
def test_constant_columns(value):
    holes = HOLES.copy()
    holes[:, 1] = np.where(np.isnan(holes[:, 1]), np.nan, value)
    out = quick().fit_transform(holes)
    np.testing.assert_allclose(out[:, 1], value, rtol=1e-12)


@pytest.mark.parametrize(
    "table",
    [
        WHOLE,
        HOLES[:, :1],
        HOLES[:1],
        np.array([[1.0]]),
        np.array([[1.0, np.nan]]),
        np.array([[1.0, np.nan], [np.nan, 2.0]]),
        np.array([[1.0, 2.0, 3.0], [np.nan, 2.5, 1.0], [4.0, np.nan, 2.0]]),
        np.full((30, 3), 2.0),
        np.arange(12).reshape(4, 3),
    ],
    ids=["all-observed", "one-column", "one-row", "one-cell", "half", "diagonal", "3x3", "constant", "integers"],
)
@pytest.mark.parametrize("window", [0, 1])
def test_small_and_degenerate_tables(table, window):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # empty columns
        out = quick(window=window, keep_empty_features=True).fit_transform(table)
    assert out.shape == table.shape
    assert np.isfinite(out).all()
    known = ~np.isnan(np.asarray(table, dtype=float))
    np.testing.assert_array_equal(out[known], table[known])


# ---------------------------------------------------------------------- endings


def test_ctrl_c_keeps_a_usable_model():
    def interrupt(step, total, record):
        raise KeyboardInterrupt

    model = quick(progress=interrupt).fit(HOLES)
    assert model.status_ is Status.INTERRUPTED
    assert np.isfinite(model.transform(HOLES)).all()


def test_divergence_warns():
    with pytest.warns(UserWarning, match="LowRankImputer: the loss became infinite or NaN") as caught:
        model = quick(learning_rate=1e25).fit(HOLES)
    assert caught[0].filename == __file__
    assert np.isfinite(model.transform(HOLES)).all()


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [("rank", x, "rank must be 'auto' or an integer of at least 1") for x in (0, -1, 2.5, "all", True, None)]
    + [("rank", 1000, "rank must be 'auto' or at most 27")]
    + [("degree", x, "degree must be 'auto', 1 or 2") for x in (0, 3, "two", True)]
    + [("window", x, "window must be an integer of at least 0") for x in (-1, 1.5, None)]
    + [("depth", 0, "depth must be an integer of at least 1"), ("max_steps", 1.5, "max_steps must be an integer of at least 1")]
    + [("learning_rate", x, "learning_rate must be positive and finite") for x in (0, np.nan)]
    + [
        (name, x, f"{name} must be a finite number of at least 0")
        for name in ("row_penalty", "column_penalty")
        for x in (-1, "a")
    ]
    + [("validation_fraction", x, "validation_fraction must be from 0 to below 1") for x in (1, -0.1, np.nan)]
    + [("missing_values", x, "missing_values must be NaN or a finite number") for x in (None, "NA", np.inf)]
    + [("dtype", "float16", "dtype must be 'float32' or 'float64'"), ("device", "nonsense", "device must be None or a torch")]
    + [("progress", 3, "progress must be True, False or a callable")],
)
def test_bad_parameters_are_named(name, value, wanted):
    model = quick(**{name: value})
    with pytest.raises(ValueError, match=f"LowRankImputer: {wanted}.*got"):
        model.fit(HOLES)
    with pytest.raises(NotFittedError):
        model.transform(HOLES)


def test_products_and_a_window_exclude_each_other():
    with pytest.raises(ValueError, match=r"degree must be 1 \(or 'auto'\) where a window is given, got 2"):
        quick(degree=2, window=1).fit(HOLES)


@pytest.mark.parametrize(
    ("table", "mask", "wanted"),
    [
        (np.where(WHOLE > 2, np.inf, WHOLE), None, "fit: X must not contain infinity, got inf in row"),
        (np.full((5, 3), np.nan), None, "X has no observed cell; at least one is needed"),
        (WHOLE, np.zeros(WHOLE.shape, bool), "X has no observed cell"),
        (
            WHOLE,
            np.ones((3, 3), bool),
            r"mask must be boolean \(True: observed\) of shape \(400, 6\), got bool of shape \(3, 3\)",
        ),
        (WHOLE, np.ones(WHOLE.shape), "mask must be boolean .* got float64"),
        (WHOLE[0], None, "1D array"),
        (np.empty((0, 3)), None, "0 sample"),
        ([["a", "b"]], None, "could not convert string to float"),
    ],
)
def test_bad_tables_are_named_and_change_nothing(table, mask, wanted):
    model = quick().fit(HOLES)
    before = model.transform(HOLES)
    with pytest.raises(ValueError, match=wanted):
        model.fit(table, mask=mask)
    assert np.array_equal(model.transform(HOLES), before)


def test_transform_refuses_another_number_of_columns():
    with pytest.raises(ValueError, match="5 features"):
        quick().fit(HOLES).transform(HOLES[:, :5])


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "parameters", [{}, {"window": 2}, {"degree": 1, "missing_values": -200.0}, {"validation_fraction": 0.0}]
)
def test_save_and_load_transform_to_the_same_bits(tmp_path, parameters):
    model = quick(**parameters).fit(HOLES)
    path = tmp_path / "imputer.npz"
    model.save(path)
    twin = LowRankImputer.load(path)
    assert np.array_equal(twin.transform(HOLES), model.transform(HOLES))
    assert str(twin.get_params()) == str(model.get_params())
    assert (twin.status_, twin.n_steps_, twin.ridge_) == (model.status_, model.n_steps_, model.ridge_)
    assert list(twin.get_feature_names_out()) == list(model.get_feature_names_out())
    with pytest.raises(OutputError, match="exists already"):
        model.save(path)
    model.save(path, overwrite=True)


def test_load_refuses_other_and_damaged_files(tmp_path):
    quick().fit(HOLES).save(tmp_path / "good.npz")
    good = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(good[: len(good) // 2])
    DeepMatrixCompletion(rank="auto", max_steps=10).fit([[0, 0], [1, 1]], [1.0, 2.0]).save(tmp_path / "other.npz")
    with np.load(tmp_path / "good.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(tmp_path / "shape.npz", **{**arrays, "columns_": arrays["columns_"][1:]})
    np.savez(tmp_path / "object.npz", **{**arrays, "mean_": arrays["mean_"].astype(object)})
    for name in ("truncated", "other", "shape", "object"):
        with pytest.raises(ValueError, match=r"LowRankImputer.load: .* is not a whole model saved by this class"):
            LowRankImputer.load(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        LowRankImputer.load(tmp_path / "absent.npz")


# ---------------------------------------------------------------------- real sensors


def test_real_sensors_below_means_neighbours_and_iterative_regression():
    path = DATA / "air-quality" / "AirQuality.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent; set LOWRANK_DATA to a folder that holds air-quality")
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer

    table = np.genfromtxt(path, delimiter=",", skip_header=1, usecols=range(2, 15))[::3]
    table[table == -200] = np.nan
    cells = np.flatnonzero(~np.isnan(table))
    holes = table.copy()
    holes.flat[np.random.default_rng(0).permutation(cells)[: len(cells) // 10]] = np.nan
    hidden = np.isnan(holes) & ~np.isnan(table)

    def off(filled):
        return float(np.sqrt(np.mean(((filled - table) / np.nanstd(holes, 0))[hidden] ** 2)))

    errors = {"ours": off(LowRankImputer(random_state=0).fit_transform(holes))}
    errors["means"] = off(np.where(np.isnan(holes), np.nanmean(holes, 0), holes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # IterativeImputer's ConvergenceWarning
        for peer in (KNNImputer(), IterativeImputer(random_state=0)):
            scaler = StandardScaler().fit(holes)
            filled = scaler.inverse_transform(peer.fit_transform(scaler.transform(holes)))
            errors[type(peer).__name__] = off(filled)
    assert errors["ours"] == min(errors.values()), errors

"""The command line end to end: every kind of file, what is written, what is refused and with which exit code."""

import errno
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

for library in ("click", "rich", "polars", "scipy", "PIL"):
    pytest.importorskip(library, reason="the command line needs lowrank-kernels[all]")

import polars  # noqa: E402
import torch  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from PIL import Image  # noqa: E402

from lowrank_kernels import cli, files, pictures, problems, solver, tables, tasks  # noqa: E402

DATA = Path(os.environ.get("LOWRANK_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data not at {DATA}; set LOWRANK_DATA")


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems, and --threads changes a setting of the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return CliRunner().invoke(cli.group, [str(argument) for argument in arguments], catch_exceptions=False)


def completed(*arguments):
    result = run("complete", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments, code=2):
    """One clean line on stderr, nothing on stdout, the exit code."""
    result = run("complete", *arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def low_rank(m, n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, 2)) @ rng.standard_normal((2, n)) + rng.standard_normal(n) + 3


@pytest.fixture(scope="module")
def matrix():
    return low_rank(40, 30)


@pytest.fixture
def ratings(tmp_path, matrix):
    """Ratings of 40 users named u0.. and 30 items, 60 % observed."""
    row, col = np.nonzero(np.random.default_rng(1).random(matrix.shape) < 0.6)
    path = tmp_path / "ratings.csv"
    polars.DataFrame({"user": [f"u{i}" for i in row], "item": col, "rating": matrix[row, col]}).write_csv(path)
    return path


@pytest.fixture
def photograph(tmp_path):
    y, x = np.mgrid[:32, :40] / 40
    colour = np.stack([0.5 + 0.4 * np.sin(4 * x) * np.cos(3 * y), 0.2 + 0.6 * x, 0.2 + 0.6 * y], axis=2)
    path = tmp_path / "photo.png"
    pictures.write_picture(path, colour)
    return path


FAST = ("--rank", 4, "--max-steps", 60)


def table(output, name):
    """The numbers of a row of the printed tables."""
    line = next(line for line in output.splitlines() if line.startswith(name))
    return [float(word.replace(",", "")) for word in line.removeprefix(name).split()]


# ---------------------------------------------------------------------- triplets and Matrix Market


def test_triplets(tmp_path, ratings, matrix):
    pairs, out, model, curve = (tmp_path / name for name in ("pairs.csv", "out.csv", "m.npz", "curve.png"))
    pairs.write_text("user,item\nu0,0\nu3,7\nnobody,2\n")
    plot = ("--plot", curve) if pytest.importorskip("matplotlib", reason="plots need matplotlib") else ()
    output = completed(ratings, *FAST, "--predict", pairs, "-o", out, "--save-model", model, *plot)
    assert table(output, "rows") == [40]
    assert table(output, "columns") == [30]
    assert table(output, "this model")[0] < table(output, "bias only")[0]
    for word in ("triplets, guessed", "status", "then fitted to all entries", "1 of 3 pairs"):
        assert word in output
    frame = polars.read_csv(out)
    assert frame.columns == ["user", "item", "prediction", "known"]
    assert frame["known"].to_list() == [True, True, False]
    np.testing.assert_allclose(frame["prediction"][:2], [matrix[0, 0], matrix[3, 7]], atol=1.5)
    assert np.isfinite(frame["prediction"][2])
    from lowrank_kernels.completion import DeepMatrixCompletion

    again = DeepMatrixCompletion.load(model).predict((np.array(["u0", "u3"]), np.array([0, 7])))
    np.testing.assert_allclose(again, frame["prediction"][:2], rtol=1e-5)
    assert Image.open(curve).size > (300, 200)


def test_factors_give_the_predictions(tmp_path, ratings):
    completed(ratings, *FAST, "-o", tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz", allow_pickle=False) as f:
        product = f["left"]
        for core in f["core"][::-1]:
            product = product @ core
        values = product @ f["right"] + f["row_bias"][:, None] + f["col_bias"] + f["offset"]
        i, j = f["row_labels"].tolist().index("u3"), f["col_labels"].tolist().index(7)
    (tmp_path / "pairs.csv").write_text("user,item\nu3,7\n")
    completed(ratings, *FAST, "-o", tmp_path / "p.csv", "--predict", tmp_path / "pairs.csv")
    np.testing.assert_allclose(polars.read_csv(tmp_path / "p.csv")["prediction"][0], values[i, j], rtol=1e-4)


def test_same_seed_same_output(ratings, tmp_path):
    for name in ("a.npz", "b.npz"):
        completed(ratings, *FAST, "-o", tmp_path / name, "--seed", 3, "--threads", 1)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


def test_matrix_market(tmp_path, matrix):
    from scipy.io import mmwrite
    from scipy.sparse import coo_array

    row, col = np.nonzero(np.random.default_rng(1).random(matrix.shape) < 0.6)
    mmwrite(tmp_path / "a.mtx", coo_array((matrix[row, col], (row, col)), shape=matrix.shape))
    (tmp_path / "pairs.csv").write_text("row,col\n1,1\n40,30\n")
    output = completed(
        tmp_path / "a.mtx", *FAST, "-o", tmp_path / "p.parquet", "--predict", tmp_path / "pairs.csv", "--no-refit"
    )
    assert "numbered from 1" in output
    assert table(output, "this model")[0] < table(output, "bias only")[0]
    prediction = polars.read_parquet(tmp_path / "p.parquet")["prediction"]
    np.testing.assert_allclose(prediction, [matrix[0, 0], matrix[39, 29]], atol=1.5)


def test_bias_baseline_is_the_damped_least_squares_minimum(matrix):
    row, col = np.nonzero(np.random.default_rng(1).random(matrix.shape) < 0.3)
    values = matrix[row, col]
    baseline = tasks.bias_baseline(problems.Entries(row, col, values), damping=5.0, sweeps=200)
    design = np.zeros((len(values), 70))
    design[np.arange(len(values)), row] = design[np.arange(len(values)), 40 + col] = 1
    solution = np.linalg.solve(design.T @ design + 5 * np.eye(70), design.T @ (values - values.mean()))
    np.testing.assert_allclose(np.r_[baseline.row_bias, baseline.col_bias], solution, atol=1e-10)
    unknown = baseline.predict(np.array([999]), np.array([999]))
    np.testing.assert_allclose(unknown, values.mean())


# ---------------------------------------------------------------------- dense


def nonlinear(rows, seed=0):
    """Six columns that are functions of two latent ones, of very different scale."""
    x, y = np.random.default_rng(seed).standard_normal((2, rows))
    return np.column_stack([x, 10 * y, 1000 * (x + y), x * y, 0.1 * x**2 + 7, y - x])


def test_dense(tmp_path):
    truth = nonlinear(400)
    missing = np.random.default_rng(2).random(truth.shape) < 0.2
    missing[5] = True  # a row without any entry
    path, out, model, curve = (tmp_path / name for name in ("a.csv", "out.csv", "m.npz", "curve.svg"))
    labels = {"who": [f"w{i}" for i in range(400)]}
    files.write_dense(path, files.Dense(np.where(missing, -200, truth), list("abcdef"), labels))
    plot = ("--plot", curve) if pytest.importorskip("matplotlib", reason="plots need matplotlib") else ()
    output = completed(path, "--missing-value", -200, "--max-steps", 100, "-o", out, "--save-model", model, *plot)
    for word in ("labels in who", "RMSE / column std", "then fitted to all entries", "completed table"):
        assert word in output
    assert "--window" not in output  # no column of times
    error = table(output, "this model")
    assert error[0] < 0.6 * min(table(output, "bias only")[0], table(output, "column means")[0])
    assert error[1] < error[0]
    filled = tables.read_dense(out)
    assert filled.labels == labels
    np.testing.assert_array_equal(filled.values[~missing], truth[~missing])
    scaled = (filled.values - truth) / truth.std(0)
    missing[5] = False
    assert np.sqrt(np.mean(scaled[missing] ** 2)) < 0.6
    from lowrank_kernels import LowRankImputer

    again = LowRankImputer.load(model).transform(tables.read_dense(path, -200).values)
    np.testing.assert_allclose(again, filled.values, rtol=1e-5)
    assert curve.stat().st_size > 5000


def test_whether_a_table_has_a_header_can_be_said(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("who,1,2,3,4\n" + "".join(f"w{i},{i % 3},{i % 5},{i % 4},{i % 7}\n" for i in range(40)))
    guessed = completed(path, "--max-steps", 10, "-o", tmp_path / "guessed.csv")  # all whole: years or data?
    told = completed(path, "--header", "--max-steps", 10, "-o", tmp_path / "told.csv")
    assert "no header, labels in column 1" in guessed
    assert "header, labels in who" in told
    assert tables.read_dense(tmp_path / "told.csv", header=True).columns == ["1", "2", "3", "4"]


def test_dense_rows_in_time_order(tmp_path):
    t = np.arange(300.0)[:, None]
    truth = np.sin(t / 7 + np.arange(4)) + 0.3 * np.random.default_rng(0).standard_normal((300, 1))
    gaps = np.where(np.random.default_rng(1).random(truth.shape) < 0.1, np.nan, truth)
    files.write_dense(tmp_path / "a.csv", files.Dense(gaps, list("abcd"), {"Date": [f"d{i}" for i in range(300)]}))
    assert "--window 1" in completed(tmp_path / "a.csv", "--max-steps", 10)
    output = completed(tmp_path / "a.csv", "--window", 2, "--rank", 6, "--depth", 2, "--max-steps", 60, "--no-refit")
    assert "inner width 6, 60 steps" in output
    assert "rows in time order" not in output
    assert table(output, "this model")[0] < 0.6 * table(output, "column means")[0]


def test_dense_takes_the_options_of_the_solver(tmp_path):
    np.save(tmp_path / "a.npy", nonlinear(100))
    runs = [("--seed", 3), ("--seed", 3), ("--seed", 4), ("--seed", 3, "--dtype", "float64", "--device", "cpu", "--threads", 1)]
    outputs = []
    for number, options in enumerate(runs):
        out = tmp_path / f"{number}.npz"
        completed(tmp_path / "a.npy", "--max-steps", 5, "--held-out", 0, *options, "--save-model", out)
        with np.load(out) as arrays:
            outputs.append(arrays["columns_"])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])
    assert not np.array_equal(outputs[0], outputs[3])


def test_npy_and_mask(tmp_path, matrix):
    mask = np.random.default_rng(2).random(matrix.shape) < 0.7
    np.save(tmp_path / "a.npy", np.where(mask, matrix, 1e6))
    np.save(tmp_path / "m.npy", mask)
    completed(tmp_path / "a.npy", *FAST, "--mask", tmp_path / "m.npy", "-o", tmp_path / "out.npy", "--held-out", 0)
    filled = np.load(tmp_path / "out.npy")
    np.testing.assert_array_equal(filled[mask], matrix[mask])
    assert np.abs(filled).max() < 100


def test_columns_without_cells_stay_empty(tmp_path):
    table_ = nonlinear(60)
    table_[:, 2] = np.nan
    table_[1:, 4] = np.nan  # a column with one observed cell: never held out
    path, out = tmp_path / "a.csv", tmp_path / "out.csv"
    files.write_dense(path, files.Dense(table_, list("abcdef")))
    output = completed(path, *FAST, "--held-out", 0.5, "-o", out)
    assert "without any observed cell stay empty: c" in " ".join(output.split())
    np.testing.assert_array_equal(np.isnan(tables.read_dense(out).values).all(0), np.arange(6) == 2)


@needs_data
def test_air_quality_beats_column_means(tmp_path):
    """Every eighth hour of the real table, and 800 consecutive ones with a window."""
    lines = (DATA / "air-quality" / "AirQuality.csv").read_text().splitlines(keepends=True)
    for name, rows, options in (("each8.csv", lines[1::8], ()), ("run.csv", lines[1:801], ("--window", 1))):
        (tmp_path / name).write_text(lines[0] + "".join(rows))
        out = tmp_path / f"filled_{name}"
        output = completed(tmp_path / name, "--missing-value", -200, "--max-steps", 150, "-o", out, *options)
        assert table(output, "rows") == [len(rows)]
        assert table(output, "this model")[0] < 0.45 < 0.9 < table(output, "column means")[0]
        assert table(output, "this model")[0] < 0.7 * table(output, "bias only")[0]
        assert np.isfinite(tables.read_dense(out).values).all()


# ---------------------------------------------------------------------- pictures


def test_picture_by_sampling(tmp_path, photograph):
    out, compare = tmp_path / "out.png", tmp_path / "compare.png"
    output = completed(photograph, *FAST, "--sampling-rate", 0.4, "-o", out, "--compare", compare)
    assert "removed values" in output
    assert "to all entries" not in output  # the removed pixels stay removed
    assert table(output, "this model")[0] > table(output, "mean fill")[0] + 3  # dB
    original, filled, three = (pictures.read_picture(path) for path in (photograph, out, compare))
    assert filled.shape == original.shape
    assert three.shape == (32, 3 * 40 + 2 * 8, 3)
    np.testing.assert_array_equal(three[:, :40], original)
    np.testing.assert_array_equal(three[:, -40:], filled)
    observed = (three[:, 48:88] > 0).any(axis=2)
    assert 0.3 < observed.mean() < 0.5
    np.testing.assert_array_equal(filled[observed], original[observed])


def test_picture_with_mask_and_alpha(tmp_path, photograph):
    original = pictures.read_picture(photograph)
    mask = np.random.default_rng(0).random((32, 40)) < 0.6
    Image.fromarray(mask).save(tmp_path / "mask.png")
    damaged = np.where(mask[..., None], original, 1.0)
    pictures.write_picture(tmp_path / "damaged.png", damaged)
    rgba = np.dstack([np.rint(damaged * 255), mask * 255.0]).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    completed(tmp_path / "damaged.png", *FAST, "--mask", tmp_path / "mask.png", "-o", tmp_path / "a.png")
    completed(tmp_path / "alpha.png", *FAST, "--alpha-mask", "-o", tmp_path / "b.png", "--compare", tmp_path / "c.png")
    a, b = pictures.read_picture(tmp_path / "a.png"), pictures.read_picture(tmp_path / "b.png")
    np.testing.assert_array_equal(a[mask], original[mask])
    np.testing.assert_array_equal(a, b)
    assert np.mean((a - original)[~mask] ** 2) < 0.2 * np.mean((damaged - original)[~mask] ** 2)
    assert pictures.read_picture(tmp_path / "c.png").shape[1] == 2 * 40 + 8  # no original: it is not known


# ---------------------------------------------------------------------- refusals


def test_wrong_input_is_refused_with_one_line(tmp_path, ratings, photograph):
    bad = tmp_path / "bad.csv"
    bad.write_text("user,item,rating\n1,2,3\n1,3,good\n")
    assert "line 3, column 'rating'" in refused(bad)
    assert "no such file" in refused(tmp_path / "none.csv")
    assert "no column 'stars'" in refused(ratings, "--value", "stars")
    assert "no pixel is missing" in refused(photograph)
    assert "--sampling-rate does not apply" in refused(ratings, "--sampling-rate", 0.5)
    assert "--predict does not apply" in refused(photograph, "--predict", ratings)
    assert "--row, --col and --value" in refused(photograph, "--row", "a")
    assert "--predict PAIRS.csv" in refused(ratings, "-o", tmp_path / "o.csv")
    assert "--output PREDICTIONS.csv" in refused(ratings, "--predict", ratings)
    assert "can be written as .png" in refused(photograph, "--sampling-rate", 0.5, "-o", tmp_path / "o.jpg")
    assert "two outputs" in refused(ratings, "-o", tmp_path / "o.npz", "--save-model", tmp_path / "o.npz")
    assert "--window does not apply" in refused(ratings, "--window", 1)
    assert "--header does not apply" in refused(ratings, "--no-header")
    assert "--save-model" in refused(ratings, "--kind", "dense", "-o", tmp_path / "o.npz")
    assert "error: " + str(ratings) + ": --rank must be at most 30 for" in refused(ratings, "--rank", 400)
    assert "mkdir -p" in refused(ratings, "-o", tmp_path / "no" / "o.npz")
    (tmp_path / "pairs.csv").write_text("user\nu1\n")
    assert "2 columns are needed" in refused(ratings, "-o", tmp_path / "o.csv", "--predict", tmp_path / "pairs.csv")
    (tmp_path / "one.csv").write_text("user,item,rating\n1,2,3\n")
    assert "--held-out 0" in refused(tmp_path / "one.csv")
    assert sorted(os.listdir(tmp_path)) == ["bad.csv", "one.csv", "pairs.csv", "photo.png", "ratings.csv"]


def test_no_gpu_is_refused(ratings):
    if torch.cuda.is_available():
        pytest.skip("there is a usable GPU")
    assert "doctor" in refused(ratings, "--device", "cuda")


def test_duplicates(tmp_path, ratings):
    with open(ratings, "a") as handle:
        handle.write(ratings.read_text().splitlines()[1] + "\n")
    assert "is there twice" in refused(ratings)
    assert "1 repeated entries merged" in completed(ratings, *FAST, "--duplicates", "mean", "--max-steps", 5)


def test_bad_options_are_refused(ratings):
    for option in (("--rank", 0), ("--held-out", 1), ("--dtype", "float16"), ("--kind", "table")):
        assert run("complete", ratings, *option).exit_code == 2


@pytest.mark.parametrize("option", ["-o", "--save-model"])
def test_existing_outputs_are_kept(tmp_path, ratings, option):
    out = tmp_path / "out.npz"
    out.write_bytes(b"precious")
    assert "--overwrite" in refused(ratings, *FAST, option, out)
    assert out.read_bytes() == b"precious"
    completed(ratings, *FAST, option, out, "--overwrite")
    assert out.read_bytes() != b"precious"


def test_full_disk(tmp_path, ratings, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "out").mkdir()
    error = refused(ratings, *FAST, "-o", tmp_path / "out" / "f.npz", code=1)
    assert "No space left on device" in error
    assert os.listdir(tmp_path / "out") == []


# ---------------------------------------------------------------------- interrupts, quiet, the real command


def test_interrupt_keeps_and_writes_the_best_model(tmp_path, ratings, monkeypatch):
    @contextmanager
    def interrupting(title, hidden):
        def progress(step, max_steps, record):
            if step >= 10:
                raise KeyboardInterrupt

        yield progress

    monkeypatch.setattr(cli, "_progress", interrupting)
    result = run("complete", ratings, "--rank", 4, "-o", tmp_path / "f.npz")
    assert result.exit_code == 130
    assert "interrupted: the best model so far was kept and written" in " ".join(result.stdout.split())
    assert "fitted to all entries" not in result.stdout
    with np.load(tmp_path / "f.npz") as f:
        assert np.isfinite(f["left"]).all()


def test_interrupt_of_a_table(tmp_path, monkeypatch):
    @contextmanager
    def interrupting(title, hidden):
        def progress(step, max_steps, record):
            raise KeyboardInterrupt

        yield progress

    monkeypatch.setattr(cli, "_progress", interrupting)
    np.save(tmp_path / "a.npy", np.where(np.random.default_rng(0).random((60, 6)) < 0.2, np.nan, nonlinear(60)))
    result = run("complete", tmp_path / "a.npy", "-o", tmp_path / "f.npy")
    assert result.exit_code == 130
    assert "run it again" in " ".join(result.stdout.split())
    assert np.isfinite(np.load(tmp_path / "f.npy")).all()


def test_next_steps_are_in_the_words_of_the_command_line(ratings):
    class Model:
        n_steps_ = 40

    for status in solver.Status:
        Model.status_ = status
        words = tasks.EntryFit(Model).status
        assert not any(word in words for word in ("warm_start", "max_steps", "learning rate"))
    Model.status_ = solver.Status.MAX_STEPS
    assert "raise --max-steps above 40" in tasks.EntryFit(Model).status
    assert "--max-steps above 2" in " ".join(completed(ratings, "--rank", 4, "--max-steps", 2).split())


def test_interrupt_outside_a_fit(tmp_path, ratings, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupt)
    assert "interrupted" in refused(ratings, "-o", tmp_path / "f.npz", code=130)
    assert os.listdir(tmp_path) == ["ratings.csv"]


def test_quiet_prints_nothing(tmp_path, ratings):
    assert completed(ratings, *FAST, "--quiet", "-o", tmp_path / "f.npz") == ""
    assert (tmp_path / "f.npz").stat().st_size > 0


def test_progress_bar_reports_steps(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with cli._progress("fitting", hidden=False) as progress:
        progress(5, 10, {"step": 5, "train_rmse": 0.5, "validation_rmse": 0.75, "seconds": 0.1})
        progress(6, 10, {"step": 6, "train_rmse": 0.5, "validation_rmse": None, "seconds": 0.1})
    with cli._progress("fitting", hidden=True) as progress:
        assert progress is False


def test_the_real_command(tmp_path, ratings):
    command = [
        sys.executable,
        "-m",
        "lowrank_kernels",
        "complete",
        ratings,
        "--rank",
        "4",
        "--max-steps",
        "20",
        "--threads",
        "1",
    ]
    done = subprocess.run([*command, "-o", tmp_path / "f.npz"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    assert "held-out entries" in done.stdout
    assert (tmp_path / "f.npz").stat().st_size > 0


def test_doctor_command():
    result = run("doctor")
    assert result.exit_code == 0
    assert "completion on cpu" in result.output


@needs_data
def test_movielens_is_understood():
    output = completed(DATA / "ml-latest-small" / "ratings.csv", "--rank", 4, "--max-steps", 5)
    assert table(output, "entries") == [100_004]
    assert 0.86 < table(output, "bias only")[0] < 0.92

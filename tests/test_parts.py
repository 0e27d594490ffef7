"""Parts read in streams give the entries that the same data give in memory; what is wrong in them is refused by name."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

for library in ("click", "rich", "polars", "scipy", "sklearn", "PIL"):
    pytest.importorskip(library, reason="parts and their command need lowrank-kernels[all]")

import polars as pl  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from lowrank_kernels import DeepMatrixCompletion, ObservedEntries, parts, solver  # noqa: E402
from lowrank_kernels.cli import group  # noqa: E402
from lowrank_kernels.files import InputError  # noqa: E402
from lowrank_kernels.processes import Team  # noqa: E402

ROWS, COLUMNS, COUNT = 300, 40, 2500


def frame(labels="integers", seed=0):
    rng = np.random.default_rng(seed)
    key = rng.choice(ROWS * COLUMNS, COUNT, replace=False)
    row, col = 7 * (key // COLUMNS) - 50, key % COLUMNS
    if labels == "strings":
        row, col = np.char.mod("u%d", row), np.char.mod("film é%d", col)
    return pl.DataFrame({"userId": row, "movieId": col, "rating": rng.normal(3.5, 1.0, COUNT).astype(np.float32)})


def write(folder, whole, suffix=".parquet", count=3):
    """Consecutive pieces of a frame as part files."""
    folder.mkdir(exist_ok=True)
    edges = np.linspace(0, len(whole), count + 1).astype(int)
    for part in range(count):
        piece = whole[edges[part] : edges[part + 1]]
        path = folder / f"part-{part}{suffix}"
        if suffix == ".parquet":
            piece.write_parquet(path, row_group_size=200)
        else:
            piece.write_csv(path, separator="\t" if suffix == ".tsv" else ",")
    return folder


def in_memory(whole, dtype=torch.float32):
    """What the parts must give: labels, entries of the standardized values, mean and scale."""
    rows, row = np.unique(whole["userId"].to_numpy(), return_inverse=True)
    cols, col = np.unique(whole["movieId"].to_numpy(), return_inverse=True)
    values = whole["rating"].to_numpy().astype(np.float64)
    offset, scale = values.mean(), values.std()
    shape = (len(rows), len(cols))
    return rows, cols, ObservedEntries.from_coo(row, col, (values - offset) / scale, shape=shape, dtype=dtype), offset, scale


def check_entries(found, wanted, tolerance=1e-6):
    assert found.shape == wanted.shape
    for ours, theirs in zip((*found.by_row, *found.by_col), (*wanted.by_row, *wanted.by_col), strict=True):
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        else:
            assert ours == theirs


# ---------------------------------------------------------------------- the same entries


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv"])
@pytest.mark.parametrize("labels", ["integers", "strings"])
def test_parts_give_the_entries_of_the_whole(tmp_path, monkeypatch, suffix, labels):
    monkeypatch.setattr(parts, "BATCH", 300)
    whole = frame(labels)
    told = []
    found = parts.read_parts(write(tmp_path, whole, suffix), report=lambda *what: told.append(what))
    rows, cols, entries, offset, scale = in_memory(whole)
    assert np.array_equal(found.row_labels, np.sort(rows))
    assert np.array_equal(found.col_labels, np.sort(cols))
    assert (found.offset, found.scale) == pytest.approx((offset, scale), rel=1e-12 if suffix == ".parquet" else 1e-7)
    check_entries(found.entries, entries)
    assert (found.shard.start, found.shard.count, found.shard.total) == (0, len(rows), len(rows))
    assert told[:3] == [("counting parts", done, 3) for done in (1, 2, 3)]
    assert told[-1] == ("reading entries", COUNT, COUNT)


def test_files_patterns_and_float64(tmp_path):
    whole = frame()
    folder = write(tmp_path, whole)
    wanted = in_memory(whole, torch.float64)[2]
    for given in (sorted(folder.iterdir()), str(folder / "part-*.parquet"), [folder]):
        found = parts.read_parts(given, dtype=torch.float64, row="userId", col="movieId", value="rating")
        check_entries(found.entries, wanted, 1e-12)


class Said(Team):
    """A process of several that hears the same from all others: enough to see what each would read."""

    def __init__(self, rank, size, others=None):
        super().__init__()
        self.rank, self.size, self.others = rank, size, others

    def meet(self, message):
        kind = type(message).__name__
        if kind == "_Counts":
            return self.others
        return [message] * self.size


@pytest.mark.parametrize("size", [2, 3, 7])
def test_processes_read_consecutive_blocks_of_about_equal_work(tmp_path, size):
    whole = frame()
    folder = write(tmp_path, whole, count=5)
    source = parts._Source(parts.list_parts(folder), None, None, None, Team())
    counts = [parts._count(source.frames[rank::size], lambda done: None) for rank in range(size)]
    found = [parts.read_parts(folder, team=Said(rank, size, counts)) for rank in range(size)]
    rows, _, entries, offset, scale = in_memory(whole)
    assert np.array_equal(np.concatenate([each.row_labels for each in found]), rows)
    edge = 0
    for each in found:
        assert (each.shard.start, each.shard.total) == (edge, len(rows))
        assert (each.offset, each.scale) == pytest.approx((offset, scale), rel=1e-12)
        edge += each.shard.count
    values = torch.cat([each.entries.values for each in found])
    torch.testing.assert_close(values, entries.values)
    work = [len(each.entries) + parts.ROW_WORK * each.shard.count for each in found]
    assert max(work) - min(work) < 0.1 * sum(work) / size + 2 * COLUMNS


def test_a_process_may_get_no_row():
    assert parts._blocks(np.array([1000]), 3).tolist() == [0, 1, 1, 1]
    assert parts._blocks(np.array([1, 1]), 2).tolist() == [0, 1, 2]


# ---------------------------------------------------------------------- wrong parts


def spoiled(folder, change):
    whole = frame()
    write(folder, whole)
    change(folder / "part-1.parquet", whole[:100])


def with_column(name, values):
    return lambda path, piece: piece.with_columns(pl.Series(name, values(piece))).write_parquet(path)


WRONG = {
    "other columns": (
        lambda path, piece: piece.rename({"rating": "stars"}).write_parquet(path),
        r"part-1.parquet: has no column 'rating', which part-0.parquet has; its columns are userId, movieId, stars",
    ),
    "other labels": (
        with_column("userId", lambda piece: piece["userId"].cast(pl.String)),
        r"part-1.parquet: column 'userId' holds strings, in part-0.parquet it holds integers",
    ),
    "labels with a fraction": (
        with_column("movieId", lambda piece: piece["movieId"] + 0.5),
        r"part-1.parquet: column 'movieId' must hold labels, integers or strings, got Float64",
    ),
    "values of text": (
        with_column("rating", lambda piece: piece["rating"].cast(pl.String)),
        r"part-1.parquet: column 'rating' must hold numbers, got String",
    ),
    "a NaN": (
        with_column("rating", lambda piece: [float("nan"), None] + [1.0] * 98),
        r"part-1.parquet: 2 of 100 values are missing, no numbers, NaN or infinite; remove these entries",
    ),
    "no label": (
        with_column("userId", lambda piece: [None] + [1] * 99),
        r"part-1.parquet: 1 of 100 entries have no row or column label",
    ),
    "no bytes": (lambda path, piece: path.write_bytes(b""), r"part-1.parquet: the file is empty"),
    "other bytes": (lambda path, piece: path.write_bytes(b"PAR1 no more"), r"part-1.parquet: cannot be read as parquet"),
    "a pair twice": (
        lambda path, piece: pl.read_parquet(path.with_name("part-0.parquet"))[:1].write_parquet(path),
        r"1 duplicate entries, the first at \(row, col\) = \(-?\d+, \d+\); pass duplicates='mean' \(--duplicates mean\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_part_is_refused_by_name(tmp_path, kind):
    change, match = WRONG[kind]
    spoiled(tmp_path, change)
    with pytest.raises(InputError, match=match):
        parts.read_parts(tmp_path)


def test_what_is_not_there_is_refused(tmp_path):
    for given, match in (
        (tmp_path / "none.parquet", "none.parquet: no such file"),
        (tmp_path, "the folder has no file that ends with .parquet, .pq, .csv, .tsv"),
        (tmp_path / "*.csv", "no file fits the pattern"),
        ([], "at least one file is needed"),
    ):
        with pytest.raises(InputError, match=match):
            parts.read_parts(given)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match=r"a part must end with .*, got '.json'"):
        parts.read_parts(tmp_path / "a.json")
    with pytest.raises(ValueError, match="duplicates must be 'error' or 'mean', got 'last'"):
        parts.read_parts(tmp_path, duplicates="last")


def test_pairs_given_twice_are_averaged_where_that_is_asked_for(tmp_path):
    whole = frame()
    write(tmp_path, pl.concat([whole, whole[:50].with_columns(pl.col("rating") + 1), whole[:10]]))
    found = parts.read_parts(tmp_path, duplicates="mean")
    values = whole["rating"].to_numpy().astype(np.float64)
    values[:10] = values[:10] + 1 / 3
    values[10:50] += 0.5
    wanted = in_memory(whole.with_columns(pl.Series("rating", values)))[2]
    np.testing.assert_allclose(
        found.entries.values.numpy() * found.scale + found.offset,
        wanted.values.numpy() * values.std() + values.mean(),
        rtol=1e-5,
    )


def test_text_is_typed_by_all_lines_of_all_parts(tmp_path):
    """Not by the first hundred: whole ratings and then 3.5, numbers and then a name."""
    lines = [f"{i},{i % 7},{i % 5}" for i in range(150)]
    (tmp_path / "a.csv").write_text("user,item,rating\n" + "\n".join([*lines, "150,3,3.5"]) + "\n")
    (tmp_path / "b.csv").write_text("user,item,rating\n")
    said = []
    found = parts.read_parts(tmp_path, say=said.append)
    assert said[0] == "1 of 2 parts have no entry: b.csv"
    assert found.row_labels.tolist() == list(range(151))
    assert found.offset == pytest.approx((sum(i % 5 for i in range(150)) + 3.5) / 151)
    (tmp_path / "c.csv").write_text("user,item,rating\nabc,3,1\n007,3,1\n")
    found = parts.read_parts(tmp_path)
    assert {"abc", "007", "7"} < set(found.row_labels)
    assert found.col_labels.tolist() == list(range(7))
    (tmp_path / "d.csv").write_text("user,item,rating\n1,3,good\n2,3,\n")
    with pytest.raises(InputError, match=r"d.csv: 2 of 2 values are missing, no numbers, NaN or infinite"):
        parts.read_parts(tmp_path)


def test_a_part_without_entries_is_said_and_passed_over(tmp_path):
    whole = frame()
    write(tmp_path, whole)
    whole[:0].write_parquet(tmp_path / "part-9.parquet")
    lines = []
    found = parts.read_parts(tmp_path, say=lines.append)
    assert len(found.entries) == COUNT
    assert lines[0] == "1 of 4 parts have no entry: part-9.parquet"
    (tmp_path / "empty").mkdir()
    whole[:0].write_parquet(tmp_path / "empty" / "a.parquet")
    with pytest.raises(InputError, match="no part has an entry"):
        parts.read_parts(tmp_path / "empty")


def test_constant_values(tmp_path):
    write(tmp_path, frame().with_columns(pl.lit(4.0).alias("rating")))
    found = parts.read_parts(tmp_path)
    assert (found.offset, found.scale) == (4.0, 4.0)
    assert not found.entries.values.any()


# ---------------------------------------------------------------------- memory


def test_memory_is_said_and_refused_with_its_numbers(tmp_path):
    write(tmp_path, frame())
    lines = []
    parts.read_parts(tmp_path, say=lines.append)
    peak = parts.needed_memory(2500, 300, 40).peak / 2**30
    assert f"2,500 entries of 300 x 40: {peak:.3g} GiB are needed on this machine by 1 of 1 processes" in lines[-1]
    assert "GiB are free" in lines[-1]
    with pytest.raises(
        InputError, match=r"2,500 entries: .* GiB are needed .* 9.31e-07 GiB are allowed; use more machines, .* limit"
    ):
        parts.read_parts(tmp_path, memory_limit=1000)
    need = parts.needed_memory(2500, 300, 40)
    with pytest.raises(InputError, match="2,500 entries of 300 x 40"):  # enough for the entries, not for the factors
        parts.read_parts(tmp_path, memory_limit=need.peak - 1)
    parts.read_parts(tmp_path, memory_limit=need.peak)


def test_the_index_is_of_the_predicted_size_and_building_it_needs_less_than_as_much_again():
    whole = frame()
    entries = in_memory(whole)[2]
    need = parts.needed_memory(COUNT, *entries.shape)
    plans = entries.by_row.plan.nbytes + entries.by_col.plan.nbytes
    assert need.held == entries.nbytes - plans - 16  # two offsets more than rows and columns
    assert need.building <= need.held
    for rows, place in ((2**31 - 1, 4), (2**31, 8)):  # 64-bit places where 32 bits are too few
        assert parts.needed_memory(10**6, rows, 5).held == 2 * 10**6 * (place + 4) + 8 * (rows + 5)


def test_free_memory_is_no_more_than_the_machine_has():
    assert 2**20 < parts.free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------- estimator and command


def test_fit_parts_is_fit(tmp_path, caplog):
    whole = frame()
    write(tmp_path, whole)
    settings = {"rank": 8, "max_steps": 40, "random_state": 0, "dtype": "float64"}
    pairs = (whole["userId"].to_numpy(), whole["movieId"].to_numpy())
    wanted = DeepMatrixCompletion(**settings).fit(pairs, whole["rating"].to_numpy())
    with caplog.at_level(logging.INFO, "lowrank_kernels"):
        found = DeepMatrixCompletion(**settings).fit_parts(tmp_path)
    assert "2,500 entries of 300 x 40" in caplog.text
    np.testing.assert_allclose(found.predict(pairs), wanted.predict(pairs), rtol=1e-8)
    assert found.recommend(pairs[0][0], 3, exclude_seen=False)[0].shape == (3,)
    with pytest.raises(ValueError, match=r"recommend: needs the entries, which fit_parts\(\) does not keep"):
        found.recommend(pairs[0][0])
    found.save(tmp_path / "model.npz")
    assert np.array_equal(DeepMatrixCompletion.load(tmp_path / "model.npz").predict(pairs), found.predict(pairs))
    again = found.set_params(warm_start=True).fit_parts(tmp_path)
    assert again.history_[0]["train_rmse"] < 1.02 * wanted.history_[-1]["train_rmse"]


def test_a_refused_fit_leaves_the_estimator_as_it_was(tmp_path):
    model = DeepMatrixCompletion(random_state=0, max_steps=10).fit([[0, 1], [1, 0], [1, 1]], [1.0, 2.0, 3.0])
    before = model.predict([[0, 0]])
    with pytest.raises(InputError):
        model.fit_parts(tmp_path)
    assert np.array_equal(model.predict([[0, 0]]), before)


def test_the_command_fits_parts_and_goes_on_from_a_checkpoint(tmp_path):
    write(tmp_path / "parts", frame())
    arguments = ["fit", str(tmp_path / "parts"), "--rank", "8", "--max-steps", "40", "--held-out", "0.1"]
    arguments += ["--checkpoint", str(tmp_path / "state"), "--checkpoint-every", "20", "-o", str(tmp_path / "model.npz")]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("2,500 entries of 300 x 40: ")
    assert "RMSE" in lines[1]
    assert "on the entries held out; 40 steps" in lines[1]
    assert lines[2] == f"wrote {tmp_path / 'model.npz'}"
    model = DeepMatrixCompletion.load(tmp_path / "model.npz")
    assert model.n_steps_ == 40
    refused = CliRunner().invoke(group, arguments)
    assert refused.exit_code == 2
    assert "exists already; pass --overwrite" in refused.output
    again = CliRunner().invoke(group, [*arguments, "--overwrite", "--quiet"])  # at its end: nothing left to do
    assert (again.exit_code, again.output) == (0, "")
    assert np.array_equal(DeepMatrixCompletion.load(tmp_path / "model.npz").left_, model.left_)
    other = CliRunner().invoke(group, [*arguments, "--overwrite", "--depth", "2"])
    assert other.exit_code == 2
    assert "was made with depth = 3, this training has 2" in other.output


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("at", [0, 10])
def test_ctrl_c_ends_the_command_with_130(tmp_path, monkeypatch, at, checkpoint):
    write(tmp_path / "parts", frame())
    adam = solver._Adam.step

    def interrupted(self, *arguments):
        if self.steps == at + 5:
            raise KeyboardInterrupt
        adam(self, *arguments)

    monkeypatch.setattr(solver._Adam, "step", interrupted)
    arguments = ["fit", str(tmp_path / "parts"), "--rank", "8", "--max-steps", "40", "-o", str(tmp_path / "m.npz")]
    arguments += ["--checkpoint", str(tmp_path / "state"), "--checkpoint-every", "10"] if checkpoint else []
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 130, result.output
    assert (tmp_path / "m.npz").exists() != checkpoint
    if checkpoint:  # the same command goes on, and only then writes the model
        assert "the same command goes on from" in result.output
        monkeypatch.setattr(solver._Adam, "step", adam)
        again = CliRunner().invoke(group, arguments)
        assert again.exit_code == 0, again.output
        assert DeepMatrixCompletion.load(tmp_path / "m.npz").n_steps_ == 40
    else:
        assert "interrupted; the best factors so far were kept" in result.output or at == 0
        assert "warm_start" not in result.output


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["none.parquet"], "error: none.parquet: no such file"),
        (["{parts}", "--memory-limit", "0"], "GiB are allowed"),
        (["{parts}", "--rank", "7"], "rank must be 'auto' or an even integer"),
        (["{parts}", "--checkpoint-every", "15"], "checkpoint_every must be a multiple of 10"),
        (["{parts}", "--row", "user"], "no column 'user' (--row)"),
        (["{parts}", "-o", "model.bin"], "can be written as .npz"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, arguments, match):
    folder = write(tmp_path, frame())
    result = CliRunner().invoke(group, ["fit", *(each.format(parts=folder) for each in arguments)])
    assert result.exit_code == 2, result.output
    assert match in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("error:")]) == 1


def test_the_command_under_torchrun_gives_the_model_of_one_process(tmp_path):
    write(tmp_path / "parts", frame())
    arguments = [
        "-m",
        "lowrank_kernels",
        "fit",
        str(tmp_path / "parts"),
        "--rank",
        "8",
        "--max-steps",
        "30",
        "--dtype",
        "float64",
    ]
    alone, shared = str(tmp_path / "alone.npz"), str(tmp_path / "shared.npz")
    assert CliRunner().invoke(group, [*arguments[2:], "-o", alone]).exit_code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*torchrun, *arguments, "-o", shared], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "by 2 of 2 processes" in done.stdout
    assert done.stdout.count("RMSE") == 1  # the first process speaks
    models = [DeepMatrixCompletion.load(path) for path in (alone, shared)]
    assert np.array_equal(models[0].row_labels_, models[1].row_labels_)
    whole = frame()
    pairs = (whole["userId"].to_numpy(), whole["movieId"].to_numpy())
    np.testing.assert_allclose(models[0].predict(pairs), models[1].predict(pairs), rtol=1e-8)

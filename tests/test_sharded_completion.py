"""A completion whose rows are shared out over processes is that of one process: start, steps, checkpoints, predictions."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
import workers

pytest.importorskip("sklearn", reason="the estimators need scikit-learn")

from lowrank_kernels import DeepMatrixCompletion, ObservedEntries, checkpoints, compress, masked_gradient, solver
from lowrank_kernels.checkpoints import Checkpoints, fingerprint
from lowrank_kernels.files import InputError
from lowrank_kernels.processes import Team, team_of
from lowrank_kernels.row_shards import RowShard

scenario = workers.scenario
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not hasattr(signal, "SIGUSR1"), reason="needs gloo on a Unix"
)
ROWS, COLUMNS = 203, 57
EDGES = {"even": (0, 68, 136, ROWS), "uneven": (0, 3, 150, ROWS), "one without entries": (0, 0, 90, ROWS)}


@pytest.fixture(scope="module")
def processes():
    found = workers.Workers(__file__, size=3)
    yield found
    found.stop()


def problem(labels="integers", weighted=False):
    """Rows, columns, values and weights of 30 % of a matrix of rank 4 with noise."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(ROWS, 4)) @ rng.normal(size=(4, COLUMNS)) + 0.3 * rng.normal(size=(ROWS, COLUMNS)) + 2.0
    row, col = (rng.random(truth.shape) < 0.3).nonzero()
    values, weights = truth[row, col], rng.uniform(0.5, 2.0, len(row)) if weighted else None
    if weighted:
        weights[::7] = 0  # entries that are not there
    if labels == "strings":
        row, col = (np.char.mod(f"{side}%04d", each) for side, each in (("u", row), ("m", col)))
    return row, col, values, weights


def own_part(row, values, *others, edges="even"):
    """What this process gives: the entries of its block of rows."""
    place = np.unique(row, return_inverse=True)[1]
    low, high = EDGES[edges][dist.get_rank() : dist.get_rank() + 2]
    keep = (place >= low) & (place < high)
    return tuple(None if each is None else each[keep] for each in (row, values, *others))


OVERFITTING = {"regularization": (0.0, 0.0), "early_stopping": True, "patience": 2, "max_steps": 200}
SETTINGS = {"rank": 8, "max_steps": 60, "dtype": "float64", "random_state": 0}


def shared_fit(edges="even", labels="integers", weighted=False, **settings):
    row, col, values, weights = problem(labels, weighted)
    row, values, col, weights = own_part(row, values, col, weights, edges=edges)
    model = DeepMatrixCompletion(distributed=True, **{**SETTINGS, **settings})
    if not len(row):  # as a user would say that there is nothing
        row, col = [], []
    return model.fit((row, col), values, weights)


def answers(model, labels="integers"):
    row, col, *_ = problem(labels)
    pairs = (row[::5], col[::5])
    unseen = ("u9999", "m9999") if labels == "strings" else (10**6, 10**6)
    with_unseen = tuple(np.concatenate([each, np.array([other])]) for each, other in zip(pairs, unseen, strict=True))
    return {
        "losses": [record["train_rmse"] for record in model.history_],
        "held": [record.get("validation_rmse", 0.0) for record in model.history_],
        "steps": model.n_steps_,
        "status": model.status_.name,
        "predictions": model.predict(with_unseen),
        "best": model.recommend(row[3], 5),
        "unseen": model.recommend(unseen[0], 3),
    }


def check_same(found, wanted, tolerance):
    assert (found["steps"], found["status"]) == (wanted["steps"], wanted["status"])
    for name in ("losses", "held", "predictions"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=tolerance, atol=tolerance)
    for name in ("best", "unseen"):
        assert found[name][0].tolist() == wanted[name][0].tolist()
        np.testing.assert_allclose(found[name][1], wanted[name][1], rtol=tolerance)


# ---------------------------------------------------------------------- rows of one matrix


@pytest.mark.parametrize(("total", "columns"), [(1, 1), (7, 3), (33, 16), (1000, 5), (70_001, 3)])
def test_random_rows_are_those_of_the_whole_matrix(monkeypatch, total, columns):
    monkeypatch.setattr("lowrank_kernels.row_shards.DRAWN", 1 << 10)
    for fill, draw, dtype in (
        (torch.Tensor.normal_, torch.randn, torch.float64),
        (torch.Tensor.uniform_, torch.rand, torch.float32),
    ):
        after = torch.Generator().manual_seed(3)
        whole, next_ones = draw(total, columns, generator=after, dtype=dtype), torch.rand(4, generator=after)
        for start, count in ((0, total), (total // 3, total // 2), (total, 0)):
            generator = torch.Generator().manual_seed(3)
            part = RowShard._drawn(fill, dtype, total, start, count, columns, generator)
            assert torch.equal(part, whole[start : start + count])
            assert torch.equal(torch.rand(4, generator=generator), next_ones)


@scenario
def algebra(edges):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 6, generator=g, dtype=torch.float64)
    low, high = EDGES[edges][dist.get_rank() : dist.get_rank() + 2]
    shard = RowShard.of(team_of("test"), high - low)
    assert (shard.start, shard.count, shard.total) == (low, high - low, ROWS)
    q, r = shard.qr(x[low:high])
    peaks = torch.cat([x, -3 * x.abs().amax(0, keepdim=True), 3 * x.abs().amax(0, keepdim=True)])  # ties: the first counts
    at = shard.largest(torch.cat([x[low:high], peaks[ROWS:]] if high == ROWS else [x[low:high]]))
    return q, r, shard.orthonormal(x[low:high]), at, shard.sum(x[low:high].t() @ x[low:high], x[low:high].sum())


@pytest.mark.parametrize("edges", EDGES)
def test_algebra_on_shared_rows_is_that_of_the_whole(processes, edges):
    x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = processes("algebra", edges=edges)
    q, r = torch.cat([each[0] for each in found]), found[0][1]
    torch.testing.assert_close(q @ r, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.t() @ q, torch.eye(6, dtype=torch.float64), rtol=1e-12, atol=1e-13)
    whole = RowShard(Team(), 0, ROWS, ROWS)
    torch.testing.assert_close(torch.cat([each[2] for each in found]), whole.orthonormal(x), rtol=1e-11, atol=1e-12)
    for each in found:
        assert torch.equal(each[1], r)  # bit for bit the same everywhere
        assert torch.equal(each[3], -3 * x.abs().amax(0))
        torch.testing.assert_close(each[4][0], x.t() @ x)
        torch.testing.assert_close(each[4][1], x.sum())


@scenario
def shared_compression(edges):
    row, col, values, _ = problem()
    row, values, col = own_part(row, values, col, edges=edges)
    low, high = EDGES[edges][dist.get_rank() : dist.get_rank() + 2]
    shard = RowShard.of(team_of("test"), high - low)
    entries = ObservedEntries.none((0, COLUMNS), dtype=torch.float64)
    if high > low:
        entries = ObservedEntries.from_coo(row - low, col, values, shape=(high - low, COLUMNS))
    return compress(masked_gradient(entries, rows=shard), 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("edges", EDGES)
def test_compression_of_shared_rows_is_that_of_the_whole(processes, edges):
    row, col, values, _ = problem()
    whole = ObservedEntries.from_coo(row, col, values, shape=(ROWS, COLUMNS))
    wanted = compress(masked_gradient(whole), 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = processes("shared_compression", edges=edges)
    torch.testing.assert_close(torch.cat([each.left for each in found]), wanted.left, rtol=1e-9, atol=1e-10)
    for each in found:
        torch.testing.assert_close(each.right, wanted.right, rtol=1e-9, atol=1e-10)
        assert torch.equal(each.core, wanted.core)


# ---------------------------------------------------------------------- the estimator


@scenario
def fit_shared(edges, labels, weighted, settings, path=None):
    model = shared_fit(edges, labels, weighted, **settings)
    if path is not None:
        model.save(path)
    return answers(model, labels), len(model.row_labels_), len(model.left_)


@pytest.mark.parametrize(
    ("edges", "labels", "weighted", "settings", "tolerance"),
    [
        ("even", "integers", False, {}, 1e-9),
        ("uneven", "strings", True, {}, 1e-9),
        ("one without entries", "integers", False, OVERFITTING, 1e-9),
        ("one without entries", "strings", False, {"regularization": (0.5, 0.05), "fit_bias": False}, 1e-9),
        ("uneven", "integers", False, {"noise_weights": False, "depth": 1}, 1e-9),
        ("even", "integers", False, {"dtype": "float32"}, 1e-4),
    ],
)
def test_three_processes_fit_what_one_fits(processes, tmp_path, edges, labels, weighted, settings, tolerance):
    row, col, values, weights = problem(labels, weighted)
    alone = DeepMatrixCompletion(**{**SETTINGS, **settings}).fit((row, col), values, weights)
    wanted, path = answers(alone, labels), tmp_path / "model.npz"
    found = processes("fit_shared", edges=edges, labels=labels, weighted=weighted, settings=settings, path=str(path))
    if settings.get("early_stopping"):
        assert wanted["status"] == "EARLY_STOPPED"
    for result, rows, left in found:
        check_same(result, wanted, tolerance)
        assert rows == left
    edge = EDGES[edges]
    assert [rows for _, rows, _ in found] == [high - low for low, high in pairwise(edge)]
    saved = DeepMatrixCompletion.load(path)
    assert not saved.distributed
    assert saved.entries_ is None
    np.testing.assert_allclose(saved.predict((row, col)), alone.predict((row, col)), rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"recommend: needs the entries, .* pass exclude_seen=False"):
        saved.recommend(row[0])
    with pytest.raises(ValueError, match="partial_fit: needs the entries"):
        saved.partial_fit((row[:3], col[:3]), values[:3])


@scenario
def warm_again():
    model = shared_fit("uneven")
    first = model.history_[-1]["train_rmse"]
    row, col, values, _ = problem()
    row, values, col = own_part(row, values, col, edges="uneven")
    model.set_params(warm_start=True).fit((row, col), values)
    return first, model.history_[0]["train_rmse"]


def test_a_warm_start_goes_on_from_the_shared_factors(processes):
    for first, again in processes("warm_again"):
        assert again < 1.02 * first


WRONG = {  # what process 2 does, what all must hear
    "rows of another": r"4 row labels are given by several processes, the first, 136, by processes 1 and 2",
    "other settings": r"same learning_rate, process 0 has 0.03, process 2 has 0.05",
    "other labels": r"row labels must be numbers as in fit, got strings",
    "a value that is no number": r"y must be finite, got nan at position 0",
    "nothing anywhere": r"pairs is empty in every process",
}


@scenario
def fit_wrong(kind):
    row, col, values, _ = problem()
    settings, wrong = {}, dist.get_rank() == 2
    row, values, col = own_part(row, values, col)
    if kind == "rows of another" and dist.get_rank() == 1:
        row = np.where(row >= 132, row + 4, row)
    if kind == "other settings" and wrong:
        settings = {"learning_rate": 0.05}
    if kind == "other labels" and wrong:
        row = row.astype(str)
    if kind == "a value that is no number" and wrong:
        values = np.where(np.arange(len(values)) == 0, np.nan, values)
    if kind == "nothing anywhere":
        row, col, values = row[:0], col[:0], values[:0]
    model = DeepMatrixCompletion(distributed=True, **{**SETTINGS, **settings})
    try:
        model.fit((row, col), values)
    except (ValueError, TypeError) as error:
        return str(error), hasattr(model, "left_")
    return "no error", True


@pytest.mark.parametrize("kind", WRONG)
def test_what_one_process_gives_wrong_is_refused_in_all(processes, kind):
    for message, fitted in processes("fit_wrong", kind=kind):
        assert not fitted
        assert re.search(WRONG[kind], message), message


def test_distributed_needs_a_group_and_partial_fit_one_process():
    model = DeepMatrixCompletion(distributed=True)
    with pytest.raises(ValueError, match=r"fit: distributed=True needs a process group; start with torchrun"):
        model.fit([[0, 1], [1, 0]], [1.0, 2.0])
    model = DeepMatrixCompletion(random_state=0, max_steps=10).fit([[0, 1], [1, 0], [1, 1]], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="partial_fit: works in one process"):
        model.set_params(distributed=True).partial_fit([[0, 0]], [1.0])
    for name, value in (("checkpoint_every", 15), ("checkpoint_every", 0), ("distributed", "yes")):
        with pytest.raises(ValueError, match=name):
            DeepMatrixCompletion(**{name: value}).fit([[0, 1], [1, 0]], [1.0, 2.0])


# ---------------------------------------------------------------------- what is exchanged


@scenario
def exchanged(rows, entries, rank):
    """Numbers given to all_reduce in every step, by torch's own function."""
    calls, real = [], dist.all_reduce

    def counted(tensor, *rest, **options):
        calls.append(tensor.numel())
        return real(tensor, *rest, **options)

    rng = np.random.default_rng(dist.get_rank())
    team = team_of("test")
    shard = RowShard.of(team, rows)
    key = rng.choice(rows * COLUMNS, entries, replace=False)
    given = ObservedEntries.from_coo(key // COLUMNS, key % COLUMNS, rng.normal(size=entries), shape=(rows, COLUMNS))
    model = solver.start(given, rank, generator=torch.Generator().manual_seed(0), shard=shard)
    dist.all_reduce, per_check, before = counted, [], team.summed

    def callback(step, record):
        per_check.append(list(calls))
        calls.clear()

    try:
        solver.train(model, given, solver.TrainOptions(max_steps=30), callback=callback, shard=shard)
    finally:
        dist.all_reduce = real
    return per_check[1:], team.summed - before, 8 * sum(map(sum, per_check))


def test_a_step_exchanges_what_the_formula_says_whatever_the_rows_and_entries(processes):
    rank = 6
    step = COLUMNS * rank + COLUMNS + rank**2 + 1
    estimate = COLUMNS * (2 * rank + 2) + rank + 6
    for rows, entries in ((40, 500), (90, 2500)):
        for checks, summed, counted in processes("exchanged", rows=rows, entries=entries, rank=rank):
            assert len(checks) == 2
            for calls in checks:  # ten steps, the first of them with a re-estimation
                assert calls[-9:] == [step] * 9
                assert sum(calls) == 10 * step + estimate
            assert summed >= counted  # the first check has the training's own preparation besides


# ---------------------------------------------------------------------- checkpoints


@scenario
def fit_checkpointed(folder, edges="uneven", settings=None, path=None):
    model = shared_fit(edges, checkpoint=folder, checkpoint_every=20, **(settings or {}))
    return answers(model)


class Stopped(Exception):
    pass


def stop_at(step):
    def progress(at, total, record):
        if at == step:
            raise Stopped

    return progress


@pytest.mark.parametrize("settings", [{}, {"early_stopping": True, "patience": 100}, {"regularization": (0.5, 0.05)}])
def test_a_training_goes_on_with_another_number_of_processes(processes, tmp_path, settings):
    row, col, values, _ = problem()
    wanted = answers(DeepMatrixCompletion(**SETTINGS, **settings).fit((row, col), values))

    def interrupted(folder):
        model = DeepMatrixCompletion(**SETTINGS, **settings, checkpoint=folder, checkpoint_every=20, progress=stop_at(50))
        with pytest.raises(Stopped):
            model.fit((row, col), values)
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000040"]
        return folder

    begun = interrupted(tmp_path / "one")
    again = tmp_path / "again"
    shutil.copytree(begun, again)
    resumed = DeepMatrixCompletion(**SETTINGS, **settings, checkpoint=again, checkpoint_every=20).fit((row, col), values)
    same = answers(resumed)
    assert same["losses"] == wanted["losses"]  # on one process bit for bit
    assert np.array_equal(same["predictions"], wanted["predictions"])
    for result in processes("fit_checkpointed", folder=str(begun), settings=settings):  # one to three
        check_same(result, wanted, 1e-8)
    for old in tmp_path.glob("one/step-*"):
        if old.name != "step-00000040":
            shutil.rmtree(old)
    from_three = tmp_path / "three"
    processes("fit_checkpointed", folder=str(from_three), edges="one without entries", settings=settings)
    shutil.rmtree(from_three / "step-00000060")  # three to one, from step 40
    model = DeepMatrixCompletion(**SETTINGS, **settings, checkpoint=from_three, checkpoint_every=20).fit((row, col), values)
    check_same(answers(model), wanted, 1e-8)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    row, col, values, _ = problem()
    folder = tmp_path / "state"
    DeepMatrixCompletion(**SETTINGS, checkpoint=folder, checkpoint_every=20).fit((row, col), values)

    def again(match, entries=slice(None), **settings):
        model = DeepMatrixCompletion(**{**SETTINGS, **settings}, checkpoint=folder, checkpoint_every=20)
        with pytest.raises(InputError, match=match):
            model.fit((row[entries], col[entries]), values[entries])
        assert not hasattr(model, "left_")

    again(r"was made with rank = 8, this training has 6; use the same data", rank=6)
    again(r"was made with entries = '\d+ of 203 x 57, \w+', this training has '\d+ of 203", entries=slice(1, None))
    again(r"was made with max_steps = 60, this training has 80", max_steps=80)
    newest = folder / "step-00000060"
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, "format": "lowrank_kernels.checkpoint/0"}))
    again(r"is of version 'lowrank_kernels.checkpoint/0', this package reads 'lowrank_kernels.checkpoint/1'")
    (newest / "manifest.json").write_text("{")
    again("is not the manifest of a checkpoint")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    rows = next(newest.glob("rows-*"))
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-100])
    again(r"rows-0+\.safetensors: cannot be read: .*; remove its folder to go on")
    rows.unlink()
    again("cannot be read")


def test_a_folder_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    model = DeepMatrixCompletion(**SETTINGS, checkpoint=tmp_path / "file" / "state")
    with pytest.raises(OSError, match="the folder cannot be made"):
        model.fit((problem()[0], problem()[1]), problem()[2])


def test_a_step_that_was_not_finished_does_not_count(tmp_path):
    shard = RowShard(Team(), 0, 3, 3)
    state = Checkpoints(tmp_path, shard, {"a": 1}, every=10)
    rows, shared = {"left": torch.arange(6.0).view(3, 2)}, {"core": torch.ones(2, 2)}
    for step in (10, 20, 30):
        state.save(step, {"left": rows["left"] + step}, shared, {"step": step})
    (tmp_path / "step-00000040").mkdir()  # killed before its manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030", "step-00000040"]
    found = {"left": torch.zeros(3, 2)}
    assert state.load(found, {"core": torch.zeros(2, 2)}) == {"step": 30}
    assert torch.equal(found["left"], rows["left"] + 30)
    state.save(40, rows, shared, {"step": 40})
    with pytest.raises(InputError, match=r"left must be torch.float32 of shape \(3, 5\), got torch.float32 of shape \(3, 2\)"):
        state.load({"left": torch.zeros(3, 5)}, {})
    with pytest.raises(InputError, match="has 3 rows, this training has 4"):
        Checkpoints(tmp_path, RowShard(Team(), 0, 4, 4), {"a": 1}, every=10).load({}, {})


def test_a_fingerprint_knows_values_and_weights():
    row, col, values, _ = problem()
    shard = RowShard(Team(), 0, ROWS, ROWS)

    def of(values, weights=None):
        return fingerprint(ObservedEntries.from_coo(row, col, values, shape=(ROWS, COLUMNS), weights=weights), shard)

    swapped, halves, weights = values.copy(), values.copy(), np.linspace(0.5, 1.5, len(values))
    swapped[[3, 40]] = swapped[[40, 3]]
    halves[7] += 0.5
    plain, weighted = of(values), of(values, weights)
    for other in (of(swapped), of(halves), of(values[::-1])):
        assert abs(other["values"] - plain["values"]) > 10 * checkpoints.ROUNDING
        assert other["entries"] == plain["entries"]
    assert plain["weights"] is None
    assert abs(weighted["weights"] - of(values, weights[::-1])["weights"]) > 10 * checkpoints.ROUNDING
    assert weighted["values"] == plain["values"]


@pytest.mark.parametrize("change", ["values", "weights", "weighted"])
def test_a_checkpoint_of_other_values_is_refused(tmp_path, change):
    row, col, values, _ = problem()
    weights = np.linspace(0.5, 1.5, len(values)) if change == "weights" else None
    model = DeepMatrixCompletion(**SETTINGS, checkpoint=tmp_path / "state").fit((row, col), values, weights)
    before = model.predict((row, col))
    if change == "values":
        values = values[np.random.default_rng(0).permutation(len(values))]
    else:
        weights = np.linspace(1.5, 0.5, len(values))
    with pytest.raises(InputError, match=f"was made with {'values' if change == 'values' else '(mean|weights)'} = "):
        model.fit((row, col), values, weights)
    assert np.array_equal(model.predict((row, col)), before)


def test_numpy_numbers_are_fine_settings_of_a_checkpoint(tmp_path):
    row, col, values, _ = problem()
    numbers = {"depth": np.int64(2), "learning_rate": np.float64(0.03), "fit_bias": np.bool_(True)}
    first = DeepMatrixCompletion(**{**SETTINGS, **numbers}, checkpoint=tmp_path).fit((row, col), values)
    plain = {name: value.item() for name, value in numbers.items()}
    again = DeepMatrixCompletion(**{**SETTINGS, **plain}, checkpoint=tmp_path).fit((row, col), values)
    assert np.array_equal(first.left_, again.left_)


def test_a_fingerprint_knows_the_places_and_not_the_order():
    row, col, values, _ = problem()
    whole = ObservedEntries.from_coo(row, col, values, shape=(ROWS, COLUMNS))
    shard = RowShard(Team(), 0, ROWS, ROWS)
    moved = ObservedEntries.from_coo(row, (col + 1) % COLUMNS, values, shape=(ROWS, COLUMNS))
    order = np.random.default_rng(1).permutation(len(row))
    shuffled = ObservedEntries.from_coo(row[order], col[order], values[order], shape=(ROWS, COLUMNS))
    found = [fingerprint(entries, shard) for entries in (whole, shuffled, moved)]
    assert found[0] == found[1]
    assert found[0]["entries"] != found[2]["entries"]


DYING = """
import os, signal, sys
import torch.distributed as dist
here, folder = sys.argv[1:]
sys.path.insert(0, here)
import test_sharded_completion as tests

dist.init_process_group("gloo")
tests.EDGES = {"even": (0, 100, tests.ROWS)}

def die(step, total, record):
    if step == 50:
        os.kill(os.getpid(), signal.SIGKILL)

tests.shared_fit("even", checkpoint=folder, checkpoint_every=20, progress=die if dist.get_rank() == 0 else False)
"""


def test_a_killed_process_ends_the_others_and_the_training_goes_on_from_its_checkpoint(tmp_path):
    row, col, values, _ = problem()
    script, folder = tmp_path / "dying.py", tmp_path / "state"
    script.write_text(DYING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = []
    for rank in range(2):
        environment = {**os.environ, **meeting, "RANK": str(rank), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, str(script), os.path.dirname(os.path.abspath(__file__)), str(folder)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        words = started[1].communicate(timeout=90)[1]
        started[0].communicate(timeout=10)
    finally:
        for process in started:
            process.kill()
    assert started[0].returncode == -signal.SIGKILL
    assert started[1].returncode == 1
    assert "ProcessLost: in step 5" in words, words[-2000:]
    assert "what was saved is kept: run the same again to go on from there" in words
    assert sorted(path.parent.name for path in folder.glob("step-*/manifest.json")) == ["step-00000020", "step-00000040"]
    model = DeepMatrixCompletion(**SETTINGS, checkpoint=folder, checkpoint_every=20).fit((row, col), values)
    check_same(answers(model), answers(DeepMatrixCompletion(**SETTINGS).fit((row, col), values)), 1e-8)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    workers.main()

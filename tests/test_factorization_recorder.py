"""The deep factorization watched: what the theory predicts of it, the recorder, recordings as files."""

import json
import math

import numpy as np
import pytest
import torch
from factorization_checks import F64, generator, masked, model, target, weights

from lowrank_kernels.factorization import (
    DeepFactorization,
    Recorder,
    Recording,
    SquaredLoss,
    invariant_frames,
    lemma_bounds,
    principal_angles,
    rate_bounds,
    repeated_singular_value,
    rho_trajectory,
    train,
    training,
)
from lowrank_kernels.files import InputError, OutputError
from lowrank_kernels.reference.compression import haar
from lowrank_kernels.solver import Status


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # small matrices


# ---------------------------------------------------------------------- theory


def test_rho_trajectory_is_the_recursion():
    rho = rho_trajectory([0.5, 1.0, 2.0], learning_rate=0.1, weight_decay=0.2, steps=3, divisor=4)
    r = [0.5, 1.0, 2.0]
    for step in range(4):
        np.testing.assert_allclose(rho[step], r, rtol=1e-14)
        r = [x * (1 - 0.02 - 0.025 * (math.prod(r) / x) ** 2) for x in r]


def test_rate_bounds():
    loss, mean = SquaredLoss(2 * target()), SquaredLoss(2 * target(), reduction="mean")
    bounds = rate_bounds(model(scale=0.5), loss, weight_decay=0.5)
    assert (bounds.stable, bounds.lemma) == (4, 1)
    assert rate_bounds(model(scale=0.5), mean).stable == pytest.approx(144 * rate_bounds(model(scale=0.5), loss).stable)
    assert rate_bounds(model(scale=0.5), mean).lemma == pytest.approx(288)
    assert rate_bounds(model(scale=2.0), loss).lemma is None  # the lemma wants eps <= 1
    assert rate_bounds(model(scale=(0.1, 0.2, 0.3)), loss).lemma is None
    assert rate_bounds(model(), lambda x: x.sum()).lemma is None


def test_lemma_bounds_refuse_what_the_lemma_does_not_cover():
    for arguments in ((1.1, 3, 0.1, 0.0), (0.5, 1, 0.1, 0.0), (0.5, 3, 2.1, 0.0), (0.5, 3, 0.1, -1.0)):
        scale, depth, rate, decay = arguments
        with pytest.raises(ValueError, match="the lemma wants"):
            lemma_bounds(scale, depth, learning_rate=rate, weight_decay=decay, steps=2)


def test_principal_angles_are_exact_small_and_large():
    for angle in (0.0, 1e-12, 1e-6, 0.1, 0.7, 0.8, 1.5, math.pi / 2):
        a = torch.eye(5, 2, dtype=F64)
        b = a.clone()
        b[:, 1] = torch.tensor([0, math.cos(angle), 0, math.sin(angle), 0], dtype=F64)
        turn = haar(2, 2, generator=generator(), dtype=F64)
        got = principal_angles(a @ turn, b)
        assert float(got[0]) == pytest.approx(0, abs=1e-15)
        assert float(got[1]) == pytest.approx(angle, rel=1e-3 if angle < 1e-9 else 1e-9, abs=1e-15)
    assert len(principal_angles(torch.eye(5)[:, :3], torch.eye(5)[:, 1:2])) == 1


def test_repeated_singular_value_finds_the_cluster():
    s = torch.tensor([9.0, 5.0, 3.0 + 1e-9, 3.0, 3.0, 1.0], dtype=F64)
    value, spread, place = repeated_singular_value(s, 3)
    assert (round(value, 6), place) == (3.0, 2)
    assert spread == pytest.approx(1e-9, rel=1e-3)
    with pytest.raises(ValueError, match="count must be from 1 to 6"):
        repeated_singular_value(s, 7)


def test_invariant_frames_are_orthogonal_and_chain():
    m, loss = model(scale=(0.2, 0.5, 1.0)), SquaredLoss(target())
    frames = invariant_frames(m, loss, 4)
    assert len(frames) == 4
    for q in frames:
        torch.testing.assert_close(q.t() @ q, torch.eye(12, dtype=F64), rtol=0, atol=1e-12)
    for weight, scale, before, after in zip(weights(m), m.init_scale, frames[:-1], frames[1:], strict=True):
        torch.testing.assert_close(weight @ before, scale * after)
    torch.testing.assert_close(frames[0][:, :4].t(), m.compress(loss, 4).right.detach())
    with pytest.raises(ValueError, match="square products"):
        invariant_frames(DeepFactorization(3, (4, 6)), SquaredLoss(target(4, n=6)), 2)


# ---------------------------------------------------------------------- recorder


def recorded(m, loss, steps=40, every=10, rate=0.2, decay=0.0, train_options=None, **options):
    recorder = Recorder(every, **options)
    train(m, loss, learning_rate=rate, weight_decay=decay, steps=steps, recorder=recorder, **(train_options or {}))
    return recorder.recording()


THEORY = {"rho", "rho_measured", "rho_spread", "off_block", "stationary", "angle_invariant", "angle_top"}


def test_a_recording_holds_what_it_says():
    loss, m = SquaredLoss(target()), model()
    twin = m.compress(loss, 4)
    r = recorded(m, loss, steps=45, vectors=2, twin=twin)
    assert r["step"].tolist() == [0, 10, 20, 30, 40, 45]
    assert len(r) == 6
    assert set(r) >= THEORY | {"loss", "rank", "distance", "distance_predicted", "twin.loss"}
    for l in (1, 2, 3):
        values, left, right = (r[f"layer{l}.{name}"] for name in ("singular_values", "left_vectors", "right_vectors"))
        assert (values.shape, left.shape, right.shape) == ((6, 12), (6, 12, 2), (6, 12, 2))
        weight = m.weights[l - 1].detach().numpy()
        np.testing.assert_allclose(weight @ right[-1], left[-1] * values[-1, :2], atol=1e-12)
        np.testing.assert_allclose(values[-1], np.linalg.svd(weight, compute_uv=False), atol=1e-14)
    np.testing.assert_allclose(r["rho"], rho_trajectory(m.init_scale, learning_rate=0.2, steps=45)[r["step"].astype(int)])
    np.testing.assert_allclose(r["rho_measured"], r["rho"], atol=1e-13)
    np.testing.assert_allclose(r["distance"], math.sqrt(8) * r["rho"].prod(1), atol=1e-13)
    np.testing.assert_allclose(r["distance_predicted"], math.sqrt(8) * r["rho"].prod(1), atol=1e-13)
    np.testing.assert_allclose(r["loss"][-1], float(loss(m()).detach()))
    np.testing.assert_allclose(r["twin.loss"][-1], float(loss(twin()).detach()))
    np.testing.assert_allclose(r["product.singular_values"][-1], torch.linalg.svdvals(m()).detach(), atol=1e-13)
    assert np.isnan(r["angle_invariant"][0]).all()  # at the start all singular values are equal
    assert r["angle_invariant"][1:].max() < 1e-9
    assert r["rank"][0] == 12
    assert r.header["learning_rate"] == 0.2
    assert r.header["rank"] == 4
    with pytest.raises(KeyError, match=r"'rhoo' was not recorded; there are: step, "):
        r["rhoo"]


def test_the_rank_falls_to_that_of_the_target():
    r = recorded(model(scale=0.05), SquaredLoss(target()), steps=600, every=100)
    assert r["rank"][-1] == 2
    assert r["angle_top"][-1].min() > 1e-6


@pytest.mark.parametrize(
    ("build", "options", "theory"),
    [
        (lambda: (model(), masked()), {}, set()),
        (lambda: (model(), masked()), {"rank": 4}, THEORY),
        (lambda: (model(activation="relu"), SquaredLoss(target())), {}, set()),
        (lambda: (model(width=5), SquaredLoss(target())), {}, set()),
        (lambda: (DeepFactorization(3, (8, 12), init_scale=0.3), SquaredLoss(target(8, n=12))), {}, set()),
        (lambda: (model().compress(masked(), 4), masked()), {}, set()),
        (lambda: (model(), lambda x: (x - target()).abs().sum()), {"rank": 4}, THEORY),
        (lambda: (model(), SquaredLoss(target(r=7))), {}, set()),
    ],
    ids=["masked", "masked-rank", "relu", "narrow", "rectangular", "compressed", "function-rank", "rank-too-large"],
)
def test_what_the_theory_does_not_cover_is_left_out(build, options, theory):
    m, loss = build()
    r = recorded(m, loss, steps=10, rate=0.01, **options)
    assert set(r) & THEORY == theory
    assert {"step", "loss", "rank", "layer1.singular_values", "product.singular_values"} <= set(r)
    if theory:
        assert np.isnan(r["rho"]).all()
        assert r["off_block"][-1].max() > 1e-5  # the blocks do not decouple there


def test_of_a_compressed_model_the_values_come_from_its_core():
    loss = masked()
    twin = model().compress(loss, 4)
    r = recorded(twin, loss, train_options={"gamma": 0.1})
    np.testing.assert_allclose(r["product.singular_values"][-1], torch.linalg.svdvals(twin()).detach()[:4], rtol=1e-9)


def test_rho_is_unknown_for_another_optimizer_or_too_small_a_rank():
    loss = SquaredLoss(target())
    r = recorded(model(), loss, rate=1e-3, train_options={"optimizer": torch.optim.Adam})
    assert np.isnan(r["rho"]).all()
    m = model()
    r = recorded(m, loss, twin=m.compress(loss, 2, truncate=True))
    assert np.isnan(r["rho"]).all()
    assert np.isnan(r["distance_predicted"]).all()
    assert r["distance"][-1] > 0


def test_the_twin_takes_the_same_optimizer():
    loss, m = SquaredLoss(target()), model()
    twin, alone = (m.compress(loss, 4) for _ in range(2))
    options = {"optimizer": torch.optim.Adam}
    recorded(m, loss, rate=1e-3, decay=0.01, twin=twin, train_options=options)
    train(alone, loss, learning_rate=1e-3, weight_decay=0.01, steps=40, **options)
    assert torch.equal(twin(), alone())


def test_a_mean_loss_and_weight_decay_are_followed():
    r = recorded(model(), SquaredLoss(target(), reduction="mean"), rate=20.0, decay=0.002)
    np.testing.assert_allclose(r["rho_measured"], r["rho"], atol=1e-13)
    assert r["rho"][-1, 0] < 0.3 * (1 - 0.04) ** 39


def test_a_recording_goes_on_with_the_next_call():
    loss, m = SquaredLoss(target()), model()
    whole = recorded(model(), loss, steps=40, twin=model().compress(loss, 4))
    recorder = Recorder(10, twin=m.compress(loss, 4))
    for steps in (10, 30):
        train(m, loss, learning_rate=0.2, steps=steps, recorder=recorder)
    parts = recorder.recording()
    assert set(parts) == set(whole)
    for name in whole:
        np.testing.assert_array_equal(parts[name], whole[name], err_msg=name)
    with pytest.raises(ValueError, match="one recorder records one model"):
        train(model(), loss, learning_rate=0.2, steps=1, recorder=recorder)


@pytest.mark.parametrize("at", [7, 35])
def test_after_an_interrupt_a_recording_goes_on_from_the_weights_that_were_kept(monkeypatch, at):
    loss, m = SquaredLoss(target()), model()
    whole = recorded(model(), loss, steps=60, twin=model().compress(loss, 4))
    recorder, step = Recorder(10, twin=m.compress(loss, 4)), training.Descent.step

    def interrupted(self):
        if self.steps == at and self.model is m:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(training.Descent, "step", interrupted)
    options = {"learning_rate": 0.2, "check_every": 20, "recorder": recorder}
    assert train(m, loss, steps=60, **options).status is Status.INTERRUPTED
    monkeypatch.setattr(training.Descent, "step", step)
    train(m, loss, steps=60 - at // 20 * 20, **options)
    parts = recorder.recording()
    for name in whole:
        np.testing.assert_array_equal(parts[name], whole[name], err_msg=name)


def test_without_a_recorder_nothing_is_computed(monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    train(model(), masked(), learning_rate=0.2, steps=20)


def test_recording_changes_nothing():
    loss, plain, watched = SquaredLoss(target()), model(), model()
    train(plain, loss, learning_rate=0.2, steps=30)
    recorded(watched, loss, steps=30, every=1, vectors=3, twin=model().compress(loss, 4))
    assert torch.equal(plain(), watched())


def test_divergence_with_a_recorder():
    recorder = Recorder()
    options = {"learning_rate": 50.0, "steps": 50, "check": False, "recorder": recorder}
    assert train(model(scale=1.0), SquaredLoss(target()), **options).status is Status.DIVERGED
    assert all(math.isfinite(value) for value in recorder.recording()["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"vectors": -1}, "vectors must be at least 0"),
        ({"rank_tol": 0}, "rank_tol must be between 0 and 1"),
    ],
)
def test_bad_recorders_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^Recorder: {message}"):
        Recorder(**options)


def test_a_rank_without_meaning_is_refused():
    with pytest.raises(ValueError, match="rank must be None but for a square linear model"):
        recorded(model(width=5), SquaredLoss(target()), rank=4)
    with pytest.raises(ValueError, match="rank must be below d = 12"):
        recorded(model(), SquaredLoss(target()), rank=12)
    with pytest.raises(ValueError, match=r"nothing was recorded"):
        Recorder().recording()


# ---------------------------------------------------------------------- recordings as files


@pytest.fixture
def recording():
    return recorded(model(), SquaredLoss(target()), vectors=1)


def test_a_recording_is_written_and_read(recording, tmp_path):
    path = tmp_path / "run.npz"
    recording.save(path)
    again = Recording.load(path)
    assert again.header == recording.header
    assert set(again) == set(recording)
    for name in recording:
        np.testing.assert_array_equal(again[name], recording[name])
    with np.load(path, allow_pickle=False) as data:  # open: NumPy and JSON read it
        header = json.loads(str(data["header"]))
    assert header["format"] == "lowrank_kernels.factorization.recording"
    assert header["model"].startswith("full-width, shape=(12, 12), depth=3")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="exists already"):
        recording.save(path)
    recording.save(path, overwrite=True)
    with pytest.raises(InputError, match=r"can be written as .npz"):
        recording.save(tmp_path / "run.csv")


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_bad_files_are_refused(recording, tmp_path):
    path = tmp_path / "run.npz"
    with pytest.raises(InputError, match="no such file"):
        Recording.load(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match="not a recording"):
        Recording.load(path)
    recording.save(path, overwrite=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a recording"):
        Recording.load(path)
    np.savez(path, header=np.array(Trap(), dtype=object))
    with pytest.raises(InputError, match="not a recording"):
        Recording.load(path)
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(InputError, match="not a recording"):
        Recording.load(tmp_path / "array.npy")


@pytest.mark.parametrize(
    ("header", "arrays", "message"),
    [
        ({"format": "other", "version": 1}, {"step": [0.0]}, "its header is not of format"),
        (None, {"step": [0.0]}, "its header is not of format"),
        ({"format": "lowrank_kernels.factorization.recording", "version": 2}, {"step": [0.0]}, "version 2 .*newer than 1"),
        ({"format": "lowrank_kernels.factorization.recording", "version": 1}, {"loss": [0.0]}, "one row a record"),
        (
            {"format": "lowrank_kernels.factorization.recording", "version": 1},
            {"step": [0.0], "loss": [0.0, 1.0]},
            "one row a record",
        ),
        (
            {"format": "lowrank_kernels.factorization.recording", "version": 1},
            {"step": [0.0], "loss": ["x"]},
            "must hold numbers",
        ),
    ],
)
def test_files_of_another_kind_are_refused(header, arrays, message, tmp_path):
    path = tmp_path / "run.npz"
    head = {} if header is None else {"header": np.array(json.dumps(header))}
    np.savez(path, **head, **{name: np.array(value) for name, value in arrays.items()})
    with pytest.raises(InputError, match=message):
        Recording.load(path)


def test_a_failed_write_leaves_the_old_file(recording, tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    recording.save(path)
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        recording.save(path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

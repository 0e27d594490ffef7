"""The rank report: its numbers are those of the dense update, on every host and method; its table, picture and refusals."""

import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_kernels import files
from lowrank_kernels.analysis import rank_report, update_singular_values
from lowrank_kernels.nn import (
    DeepLoRAConv2d,
    DeepLoRAEmbedding,
    DeepLoRALinear,
    LoRAConv1d,
    LoRALinear,
    RandLoRALinear,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def with_values(layer, values, adapter="default"):
    """``layer`` with an update of these singular values: orthonormal left and right, the values in the first core."""
    out_features, in_features = layer.matrix_shape
    k = layer.adapters[adapter].rank
    left, right = (
        torch.linalg.qr(torch.randn(n, k, generator=generator(n), dtype=torch.float64)).Q for n in (out_features, in_features)
    )
    diagonal = torch.tensor([*values, *[0.0] * (k - len(values))], dtype=torch.float64)
    core = None
    if adapter in layer.core:
        core = torch.eye(k, dtype=torch.float64).repeat(layer.adapters[adapter].depth, 1, 1)
        core[0] *= diagonal
    else:
        left = left * diagonal / layer.adapters[adapter].scale
    layer.set_factors(adapter, left, core, right.t())
    return layer


def deep(out_features=9, in_features=7, rank=4, values=(1.0, 0.5), dtype=torch.float64):
    return with_values(DeepLoRALinear(nn.Linear(in_features, out_features, dtype=dtype), rank, mode="paper"), values)


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "layer",
    [
        DeepLoRALinear(nn.Linear(7, 9), 4, init_scale=0.5, scale=1.5, dtype=torch.float32),
        DeepLoRALinear(nn.Linear(7, 9), 7, depth=1, init_scale=0.5),
        DeepLoRAEmbedding(nn.Embedding(20, 6), 3, init_scale=0.7),
        DeepLoRAConv2d(nn.Conv2d(3, 5, 3), 4, init_scale=0.9),
        LoRALinear(nn.Linear(9, 7), 3, alpha=6.0),
        LoRAConv1d(nn.Conv1d(4, 6, 3), 2),
        RandLoRALinear(nn.Linear(11, 9), 4),
        RandLoRALinear(nn.Linear(9, 11), 4),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{'x'.join(map(str, layer.matrix_shape))}",
)
def test_values_are_those_of_the_dense_update(layer):
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.adapter_parameters("default").values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator(3), dtype=torch.float64)
    row = rank_report(layer, absolute=0.3, relative=0.2).layers[0]
    s = torch.linalg.svdvals(layer.get_delta_weight("default").detach().flatten(1))
    s1_w = float(torch.linalg.matrix_norm(layer.weight.flatten(1), 2))
    got = torch.tensor(row.singular_values, dtype=torch.float64)
    torch.testing.assert_close(got, s[: len(got)], rtol=1e-12, atol=1e-13 * float(s[0]))
    assert float(s[len(got) :].sum()) < 1e-12
    assert row.base_norm == pytest.approx(s1_w, rel=1e-4)
    assert row.ratio == pytest.approx(float(s[0]) / s1_w, rel=1e-4)
    assert row.absolute_rank == int((s > 0.3).sum())
    assert row.relative_rank == int((s > 0.2 * s1_w).sum())
    assert row.stable_rank == pytest.approx(float((s**2).sum() / s[0] ** 2))
    assert row.shape == layer.matrix_shape
    assert row.rank == layer.adapters["default"].rank


def test_ranks_count_what_lies_above_the_thresholds():
    layer = deep(values=(2.0, 0.5, 0.02, 0.005))
    with torch.no_grad():
        layer.weight.copy_(4.0 * torch.eye(9, 7))
    for absolute, relative, wanted in [(1e-2, 1e-2, (3, 2)), (1e-3, 1e-3, (4, 4)), (3.0, 1.0, (0, 0)), (0.0, 0.0, (4, 4))]:
        row = rank_report(layer, absolute=absolute, relative=relative).layers[0]
        assert (row.absolute_rank, row.relative_rank) == wanted
    assert row.ratio == pytest.approx(0.5)
    assert row.norm == pytest.approx(2.0)


def test_an_untouched_deep_lora_update_has_no_rank():
    row = rank_report(DeepLoRALinear(nn.Linear(30, 20), 8, mode="paper")).layers[0]
    assert row.norm == pytest.approx(1e-9, rel=1e-4)
    assert (row.absolute_rank, row.relative_rank) == (0, 0)
    assert row.stable_rank == pytest.approx(8, rel=1e-4)
    row = rank_report(DeepLoRALinear(nn.Linear(30, 20), 8)).layers[0]
    assert (row.norm, row.absolute_rank, row.stable_rank, row.note) == (0, 0, 0, "zero update")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (200, 50), (50, 200)], ids=str)
def test_the_norm_of_the_weight(dtype, shape):
    layer = DeepLoRALinear(nn.Linear(shape[1], shape[0], dtype=dtype), 2)  # its singular values lie close together
    wanted = float(torch.linalg.matrix_norm(layer.weight.double(), 2))
    assert rank_report(layer).layers[0].base_norm == pytest.approx(wanted, rel=1e-3)


def test_merging_does_not_change_the_report():
    layer = deep(values=(50.0, 20.0), dtype=torch.float32)
    before = rank_report(layer)
    layer.merge()
    assert rank_report(layer) == before


def test_nothing_of_the_size_of_the_update_is_made():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    layer = DeepLoRALinear(nn.Linear(300, 400), 4)
    with Largest() as largest:
        update_singular_values(layer.factors("default"))
    assert 0 < largest.numel <= 400 * 4


def test_the_model_and_the_random_state_stay_as_they_are():
    model = nn.Sequential(deep(), nn.ReLU(), LoRALinear(nn.Linear(9, 9), 2)).train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    first, second = rank_report(model), rank_report(model)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------- adapters


def several():
    model = nn.Sequential(deep(), deep(values=(3.0,)))
    model[0].add_adapter("other", 2, mode="paper")
    with_values(model[0], (7.0, 6.0), "other")
    return model


def test_each_active_adapter_has_a_row():
    model = several()
    assert [(row.name, row.adapter) for row in rank_report(model).layers] == [("0", "default"), ("1", "default")]
    model[0].set_adapter(["default", "other"])
    report = rank_report(model)
    assert [(row.name, row.adapter) for row in report.layers] == [("0", "default"), ("0", "other"), ("1", "default")]
    assert "0 [other]" in str(report)
    named = rank_report(model, adapter="other").layers
    assert [(row.name, row.adapter, row.rank) for row in named] == [("0", "other", 2)]
    assert named[0].norm == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": nn.Linear(3, 3)}, ValueError, "no adapter layer; call lowrank_kernels.adapt"),
        ({"adapter": "missing"}, ValueError, "no layer has an adapter 'missing'; there are: 'default', 'other'"),
        ({"absolute": -1.0}, ValueError, "absolute must be a finite number of at least 0, got -1.0"),
        ({"relative": math.nan}, ValueError, "relative must be"),
        ({"model": DeepLoRALinear(nn.Linear(6, 6, device="meta"), 2)}, NotImplementedError, "on the meta device"),
    ],
    ids=["no-adapter", "unknown", "absolute", "relative", "meta"],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=f"rank_report: .*{message}"):
        rank_report(**{"model": several(), **options})


def test_no_active_adapter_is_refused():
    layer = deep()
    layer.set_adapter([])
    with pytest.raises(ValueError, match="rank_report: no adapter is active"):
        rank_report(layer)
    assert len(rank_report(layer, adapter="default").layers) == 1


# ---------------------------------------------------------------------- table and picture


def odd_model():
    """An update that trained, one that did not, a zero one, one that is broken, one over a zero weight."""
    model = nn.ModuleDict(
        {
            "trained": deep(values=(2.0, 0.5, 0.02, 0.005)),
            "start": DeepLoRALinear(nn.Linear(7, 9), 4),
            "zero": LoRALinear(nn.Linear(7, 9), 4),
            "broken": deep(),
            "bare": deep(values=(1.0,)),
        }
    )
    with torch.no_grad():
        model["broken"].left["default"][0, 0] = math.nan
        model["bare"].weight.zero_()
        model["trained"].weight.copy_(4.0 * torch.eye(9, 7))
    return model


def test_zero_and_broken_updates_are_said():
    rows = {row.name: row for row in rank_report(odd_model()).layers}
    zero, broken, bare = rows["zero"], rows["broken"], rows["bare"]
    assert (zero.norm, zero.ratio, zero.stable_rank, zero.absolute_rank, zero.relative_rank) == (0, 0, 0, 0, 0)
    assert zero.note == "zero update"
    assert (broken.absolute_rank, broken.relative_rank, broken.note) == (None, None, "not finite")
    assert math.isnan(broken.norm)
    assert math.isnan(broken.ratio)
    assert math.isnan(broken.stable_rank)
    assert bare.ratio == math.inf
    infinite = deep()
    with torch.no_grad():
        infinite.core["default"][1, 0, 0] = math.inf
        infinite.weight[0, 0] = math.nan
    row = rank_report(infinite).layers[0]
    assert row.note == "not finite"
    assert math.isnan(row.base_norm)


def test_the_table_in_text(capsys):
    report = rank_report(odd_model())
    report.table()
    assert capsys.readouterr().out == f"{report}\n"
    lines = str(report).splitlines()
    assert len(lines) == 7
    assert " ".join(lines[0].split()) == "layer shape k rank > 0.01 > 0.01 s1(W) stable s1(delta) s1(W) ratio note"
    assert " ".join(lines[1].split()) == "trained 9x7 4 3 2 1.06 2 4 0.5"
    assert lines[3].endswith("zero update")
    assert lines[4].endswith("not finite")
    assert lines[6] == (
        "5 updates, mean rank 1.00 of 4, 2 with none above 0.01, largest s1(delta)/s1(W) inf in bare, 1 not finite"
    )


def test_the_table_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich", reason="tables need rich, of lowrank-kernels[all]")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    rank_report(odd_model()).table()
    out = capsys.readouterr().out
    assert "trained" in out
    assert "not finite" in out
    assert "mean rank 1.00 of 4" in out


def test_dicts_are_plain():
    rows = rank_report(several()).to_dicts()
    again = json.loads(json.dumps(rows))
    assert again[1]["norm"] == pytest.approx(3.0)
    assert again[0]["shape"] == [9, 7]
    assert again[0]["ratio"] == rows[0]["norm"] / rows[0]["base_norm"]


@pytest.mark.parametrize(("suffix", "head"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_picture(tmp_path, suffix, head):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    path = tmp_path / f"ranks{suffix}"
    report = rank_report(odd_model())
    report.plot(path)
    assert path.read_bytes().startswith(head)
    with pytest.raises(files.OutputError, match="exists already"):
        report.plot(path)
    report.plot(path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_picture_shows_every_value():
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    values, ratios = rank_report(odd_model())._figure().axes
    drawn = {float(y): len(points.get_offsets()) for points in values.collections for y in [points.get_offsets()[0, 1]]}
    assert drawn == {0.0: 4, 1.0: 4, 2.0: 4, 4.0: 4}
    assert [label.get_text() for label in values.get_yticklabels()] == ["trained", "start", "zero", "broken", "bare"]
    assert [text.get_text() for text in values.texts if "not" in text.get_text()] == ["not finite"]
    assert ratios.patches[0].get_width() == pytest.approx(0.5)


@pytest.mark.parametrize("absolute", [0.0, 1e-2])
def test_the_picture_of_zero_updates(tmp_path, absolute):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    report = rank_report(LoRALinear(nn.Linear(7, 9), 4), absolute=absolute)
    report.plot(tmp_path / "ranks.png")
    values = report._figure().axes[0]
    assert values.get_xlabel() == "singular values of the update (zeros at the left edge)"
    assert len(values.lines) == (absolute > 0)
    assert [label.get_text() for label in values.get_yticklabels()] == ["(the model)"]


def test_pictures_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    report = rank_report(deep())
    with pytest.raises(files.InputError, match=r"can be written as .png, .pdf, .svg, got extension '.gif'"):
        report.plot(tmp_path / "ranks.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(files.MissingExtra, match="plots needs matplotlib"):
        report.plot(tmp_path / "ranks.png")
    assert list(tmp_path.iterdir()) == []

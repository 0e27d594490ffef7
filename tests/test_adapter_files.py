"""Adapters as files: bit for bit in and out of the native one, the same logits through PEFT's, every wrong file refused."""

import copy
import errno
import json
import os
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from lowrank_kernels.adapter_files import export_lora, load_adapter, save_adapter, shrink_factors
from lowrank_kernels.adapters import adapt, adapter_layers, set_adapter, unadapt
from lowrank_kernels.files import InputError, OutputError
from lowrank_kernels.nn import Factors, layer_class

METHODS = ["deeplora", "lora", "randlora"]
OPTIONS = {"deeplora": {"depth": 3, "init_scale": 0.4, "scale": 1.5}, "lora": {"alpha": 6.0}, "randlora": {"alpha": 2.0}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # tiny layers: threads only wait for each other


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Host(nn.Module):
    """Every kind of layer, and one whose name ends like another's."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Conv1d(8, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(1, 4, 3, padding="same")
        self.block = nn.ModuleDict({"up": nn.Linear(24, 10), "down": nn.Linear(10, 7, bias=False)})
        self.up = nn.Linear(7, 7)

    def forward(self, ids):
        x = self.first(self.embed(ids).transpose(1, 2))
        x = self.second(x.unsqueeze(1)).movedim(1, -1).flatten(-2)[..., :24]
        x = nn.functional.pad(x, (0, 24 - x.shape[-1]))
        return self.up(self.block["down"](torch.tanh(self.block["up"](x))))


IDS = torch.arange(24).reshape(2, 12) % 11
NAMES = ("embed", "first", "second", "block.up", "block.down")


def put(model, names=NAMES, method="deeplora", rank=3, adapter="default", seed=1, **options):
    """Adapt by hand, with values as after some training; other ranks for other layers."""
    for index, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        options = {**OPTIONS[method], **options}
        layer = layer_class(base, method).from_module(base, rank + index % 2, adapter=adapter, generator=generator(), **options)
        model.get_submodule(parent)._modules[child] = layer
        shake(layer, adapter, seed + index)
    return model


def shake(layer, adapter, seed):
    with torch.no_grad():
        for parameter in layer.adapter_parameters(adapter).values():
            noise = torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter))


def snapshot(model):
    """All that a refused file must leave as it was."""
    return (
        {name: (type(module), id(module)) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        {name: (dict(layer.adapters), layer.active_adapters) for name, layer in adapter_layers(model).items()},
    )


def unchanged(before, after):
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert before[1].keys() == after[1].keys()
    for name, (identity, requires_grad, value) in before[1].items():
        assert (identity, requires_grad) == after[1][name][:2], name
        assert value.is_meta or torch.equal(value, after[1][name][2]), name


def assert_same_adapter(model, other, adapter="default", other_adapter=None):
    ours, theirs = adapter_layers(model), adapter_layers(other)
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        values = theirs[name].adapter_parameters(other_adapter or adapter)
        for kind, parameter in layer.adapter_parameters(adapter).items():
            assert values[kind].dtype == parameter.dtype
            assert torch.equal(values[kind], parameter), f"{name}.{kind}"
        assert theirs[name].adapters[other_adapter or adapter] == layer.adapters[adapter]


# ---------------------------------------------------------------------- the native file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_bit_exact(tmp_path, method, dtype):
    model = put(Host().to(dtype), method=method)
    path = tmp_path / "a.safetensors"
    save_adapter(model, path)
    other = put(Host().to(dtype), method=method, seed=50)
    report = load_adapter(other, path)
    assert_same_adapter(model, other)
    assert (report.adapter, report.layers, report.added, report.rounded) == ("default", NAMES, False, ())
    assert torch.equal(model(IDS), other(IDS))


def test_bfloat16_factors_stay_so(tmp_path):
    model = put(Host().bfloat16(), NAMES[3:], dtype=torch.bfloat16)
    save_adapter(model, tmp_path / "a.safetensors")
    other = put(Host().bfloat16(), NAMES[3:], seed=9, dtype=torch.bfloat16)
    assert load_adapter(other, tmp_path / "a.safetensors").rounded == ()
    assert_same_adapter(model, other)


def test_same_adapter_same_bytes(tmp_path):
    model = put(Host())
    save_adapter(model, tmp_path / "a.safetensors")
    torch.manual_seed(123)
    save_adapter(copy.deepcopy(model), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_plain_model_is_adapted_as_saved(tmp_path, method):
    model = put(Host(), method=method, dropout=0.25)
    save_adapter(model, tmp_path / "a.safetensors")
    other = Host()
    state = torch.get_rng_state()
    report = load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert report.added
    assert_same_adapter(model, other)
    assert torch.equal(model.eval()(IDS), other.eval()(IDS))
    trained = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"{n}.{kind}.default" for n, l in adapter_layers(other).items() for kind in l.adapter_parameters("default")
    }
    unadapt(other)
    assert [type(module) for module in other.modules()] == [type(module) for module in Host().modules()]
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_second_adapter_beside_the_first(tmp_path):
    model = put(Host(), adapter="new")
    save_adapter(model, tmp_path / "a.safetensors")
    other = put(Host(), adapter="old", seed=30)
    before = other(IDS)
    assert load_adapter(other, tmp_path / "a.safetensors").adapter == "new"
    assert torch.equal(other(IDS), model(IDS))
    set_adapter(other, "old")
    assert torch.equal(other(IDS), before)
    assert load_adapter(other, tmp_path / "a.safetensors", adapter="third").added
    assert_same_adapter(model, other, "new", "third")
    assert torch.equal(other(IDS), model(IDS))


def test_which_adapter_is_meant(tmp_path):
    model = put(Host())
    adapt(model, 2, target_modules=["block.up"], adapter="other")
    save_adapter(model, tmp_path / "a.safetensors", adapter="default")
    assert load_adapter(Host(), tmp_path / "a.safetensors").layers == NAMES
    set_adapter(model, "other")
    assert list(export_lora(model)) == ["block.up"]
    set_adapter(model, ["default", "other"])
    with pytest.raises(ValueError, match="several adapters, say which: adapter= one of 'default', 'other'"):
        export_lora(model)
    with pytest.raises(ValueError, match="no adapter 'x'; there are: 'default', 'other'"):
        save_adapter(model, tmp_path / "b.safetensors", adapter="x")
    with pytest.raises(ValueError, match=r"the model has no adapters; call adapt"):
        save_adapter(Host(), tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_modules_trained_in_full_come_along(tmp_path):
    model = Host()
    adapt(model, 2, target_modules=["block.up"], modules_to_train=["block.down"])
    with torch.no_grad():
        model.block["down"].weight.mul_(3)
    save_adapter(model, tmp_path / "a.safetensors")
    other = Host()
    assert load_adapter(other, tmp_path / "a.safetensors").trained == ("block.down",)
    assert torch.equal(other(IDS), model(IDS))
    assert other.block["down"].weight.requires_grad
    assert not other.up.weight.requires_grad
    smaller = Host()
    smaller.block["down"] = nn.Linear(10, 6)
    refuse(smaller, tmp_path / "a.safetensors", "'block.down', which was trained in full, is not there or has other shapes")


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_a_wrapped_model_gives_the_file_of_the_plain_one(tmp_path, wrap):
    model = Host()
    adapt(model, 2, target_modules=["block.up"], modules_to_train=["block.down"], init_scale=0.5)
    save_adapter(model, tmp_path / "plain.safetensors")
    save_adapter(wrap(model), tmp_path / "wrapped.safetensors")
    assert (tmp_path / "wrapped.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert list(export_lora(wrap(model), tmp_path / "lora")) == ["block.up"]
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["modules_to_save"] == ["block.down"]
    other = Host()
    assert load_adapter(wrap(other), tmp_path / "plain.safetensors").trained == ("block.down",)
    assert torch.equal(other(IDS), model(IDS))


def test_a_part_that_was_adapted_is_saved_with_the_whole(tmp_path):
    model, other = Outer(Host()), Outer(Host())
    adapt(model.inner, 2, target_modules=["block.up"], modules_to_train=["block.down"], init_scale=0.5)
    with torch.no_grad():
        model.inner.block["down"].weight.mul_(3)
    save_adapter(model, tmp_path / "a.safetensors")
    assert load_adapter(other, tmp_path / "a.safetensors").trained == ("inner.block.down",)
    assert torch.equal(other(IDS), model(IDS))
    adapt(model, 2, target_modules=["inner.first"], adapter="second")
    assert model.inner.block["down"].weight.requires_grad  # still


def test_a_loaded_module_trained_in_full_is_saved_again(tmp_path):
    model, other = Host(), Host()
    adapt(model, 2, target_modules=["block.up"], modules_to_train=["block.down"])
    with torch.no_grad():
        model.block["down"].weight.mul_(3)
    save_adapter(model, tmp_path / "a.safetensors")
    adapt(other, 2, target_modules=["block.up"])
    load_adapter(other, tmp_path / "a.safetensors")
    assert other.block["down"].weight.requires_grad
    save_adapter(other, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    whole = Host()
    adapt(whole, 2, target_modules=["block.down"], modules_to_train=["block.up"], adapter="b")
    refuse(whole, tmp_path / "a.safetensors", r"'block.up' is trained in full here \(modules_to_train\)")


def test_a_module_trained_in_full_that_overflows_is_refused(tmp_path):
    model = Host()
    adapt(model, 2, target_modules=["block.up"], modules_to_train=["block.down"])
    save_adapter(model, tmp_path / "a.safetensors")
    other = Host().half()
    assert load_adapter(other, tmp_path / "a.safetensors").rounded == ("block.down",)  # float32 adapters fit float16 layers
    with torch.no_grad():
        model.block["down"].weight[0, 0] = 1e6
    save_adapter(model, tmp_path / "b.safetensors")
    refuse(Host().half(), tmp_path / "b.safetensors", r"block.down.weight overflows in torch.float16, its dtype in the model")


def test_buffers_of_a_trained_module_come_along(tmp_path):
    model, other = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(2))
    other[0].load_state_dict(model[0].state_dict())
    adapt(model, 2, target_modules=["0"], modules_to_train=["1", "2"], init_scale=0.5)
    x = torch.randn(9, 4, generator=generator())
    model(x)
    save_adapter(model, tmp_path / "a.safetensors")
    assert load_adapter(other, tmp_path / "a.safetensors").trained == ("1", "2")
    assert int(other[1].num_batches_tracked) == 1
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_other_dtype_is_rounded_and_told(tmp_path):
    save_adapter(put(Host().double()), tmp_path / "a.safetensors")
    model = Host().bfloat16()
    assert load_adapter(model, tmp_path / "a.safetensors").rounded == NAMES
    assert model.embed.left["default"].dtype == torch.float32
    big = put(Host())
    with torch.no_grad():
        big.embed.left["default"][0, 0] = 1e30
    save_adapter(big, tmp_path / "b.safetensors")
    half = put(Host().half(), dtype=torch.float16)
    refuse(half, tmp_path / "b.safetensors", "embed.left overflows in torch.float16")


def test_saved_while_merged_loaded_only_unmerged(tmp_path):
    model = put(Host())
    save_adapter(model, tmp_path / "a.safetensors")
    model.embed.merge()
    save_adapter(model, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    refuse(model, tmp_path / "a.safetensors", r"'embed' has default merged; call unmerge\(\) first")
    refuse(model, tmp_path / "a.safetensors", "adapters are merged in 1 layers", adapter="second")


# ---------------------------------------------------------------------- writing


def test_existing_file_and_extension(tmp_path):
    model = put(Host())
    path = tmp_path / "a.safetensors"
    save_adapter(model, path)
    old = path.read_bytes()
    shake(model.embed, "default", 77)
    with pytest.raises(OutputError, match="exists already"):
        save_adapter(model, path)
    assert path.read_bytes() == old
    save_adapter(model, path, overwrite=True)
    assert path.read_bytes() != old
    with pytest.raises(InputError, match=r"can be written as \.safetensors"):
        save_adapter(model, tmp_path / "a.pt")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, function):
    model, path, folder = put(Host(), NAMES[3:]), tmp_path / "a.safetensors", tmp_path / "peft"
    save_adapter(model, path)
    export_lora(model, folder)
    old = {file: file.read_bytes() for file in (path, *folder.iterdir())}
    shake(model.block["up"], "default", 77)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OutputError, match="No space left on device; nothing was left behind"):
        save_adapter(model, path, overwrite=True)
    with pytest.raises(OutputError, match="No space left on device"):
        export_lora(model, folder, overwrite=True)
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in (*tmp_path.glob("*.*"), *folder.iterdir())} == old


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_values_that_are_not_finite_are_not_written(tmp_path, value):
    model = put(Host())
    with torch.no_grad():
        model.first.core["default"][0, 0, 0] = value
    with pytest.raises(ValueError, match=r"first\.core must be finite"):
        save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="layer 'first': export_lora: core must be finite"):
        export_lora(model, tmp_path / "peft")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- wrong files


def refuse(model, path, match, **options):
    before = snapshot(model)
    with pytest.raises(InputError, match=match) as caught:
        load_adapter(model, path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    unchanged(before, snapshot(model))


def everywhere(path, match):
    """Refused for a plain and for an adapted model."""
    refuse(Host(), path, match)
    refuse(put(Host(), seed=60), path, match)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "good.safetensors"
    save_adapter(put(Host()), path)
    return path.read_bytes()


def edited(data, path, config=None, tensors=None):
    """The file with ``config(settings)`` and ``tensors(dict)`` done to it."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    settings, values = json.loads(header["__metadata__"]["lowrank_kernels_adapter"]), safetensors.torch.load(data)
    settings = (config(settings) if config else None) or settings
    values = (tensors(values) if tensors else None) or values
    path.write_bytes(safetensors.torch.save(values, {"lowrank_kernels_adapter": json.dumps(settings)}))
    return path


@pytest.mark.parametrize("length", [1, 7, 8, 9, 200, 3000, -1000, -1])
def test_truncated_file(tmp_path, saved, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(saved[:length])
    everywhere(path, "truncated, or not a safetensors file")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the file is empty"),
        (b"adapter = default\nrank = 8\n" * 9, "truncated, or not a safetensors file"),
        (pickle.dumps({"a": 1}), "a pickle"),
        (safetensors.torch.save({"a": torch.zeros(2)}), "not of save_adapter"),
        (safetensors.torch.save({"a": torch.zeros(2)}, {"lowrank_kernels_adapter": "["}), "its settings are damaged"),
        (safetensors.torch.save({"a": torch.zeros(2)}, {"lowrank_kernels_adapter": "[]"}), "its settings are damaged"),
        (safetensors.torch.save({"a": torch.zeros(2)}, {"lowrank_kernels_adapter": "[" * 99999}), "its settings are damaged"),
    ],
    ids=["empty", "text", "pickle", "other", "half json", "list", "deep json"],
)
def test_file_of_another_kind(tmp_path, content, match):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    everywhere(path, match)
    refuse(Host(), tmp_path, "this is a folder")
    refuse(Host(), tmp_path / "b.safetensors", "no such file")


def info(name, **changes):
    return lambda config: config["layers"][name]["info"].update(changes)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            lambda c: c.update(format_version=2, package_version="9.1"),
            "format version 2, written by lowrank-kernels 9.1.*update",
        ),
        (lambda c: c.update(format_version="x"), "format version 'x'.*save it again"),
        (lambda c: c.pop("layers"), "settings are damaged .KeyError: 'layers'"),
        (lambda c: c.update(adapter=3), "settings are damaged .*adapter is 3"),
        (lambda c: c["layers"].pop("first"), "first.left belongs to no layer"),
        (info("first", method="dora"), "method 'dora'"),
        (info("first", method="lora"), "first.core belongs to no layer"),
        (info("first", rank=2), r"first.left must be \(6, 2\), got \(6, 4\)"),
        (info("first", rank="4"), "rank of first is '4'"),
        (info("first", depth=10**12), r"first.core must be \(1000000000000, 4, 4\)"),
        (info("first", magic=1), "settings are damaged .TypeError.*magic"),
        (info("first", scale=float("nan")), "scale"),
    ],
)
def test_settings_that_do_not_hold(tmp_path, saved, config, match):
    def change(settings):
        config(settings)

    everywhere(edited(saved, tmp_path / "a.safetensors", change), match)


def renamed(values):
    return {key.replace("first.", "third."): value for key, value in values.items()}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (lambda v: v.pop("first.left") is None, "first.left is missing"),
        (lambda v: v.update({"first.left": torch.zeros(6, 5)}), r"first.left must be \(6, 4\), got \(6, 5\)"),
        (lambda v: v.update({"first.left": torch.zeros(6, 4, dtype=torch.int32)}), r"got \(6, 4\) of torch.int32"),
        (lambda v: v["first.left"].fill_(float("nan")) is None, "first.left is not finite"),
        (lambda v: v["block.up.core"][0, 0, 0].fill_(float("inf")) is None, "block.up.core is not finite"),
        (lambda v: v.update(more=torch.zeros(1)), "more belongs to no layer"),
        (renamed, "first.left is missing.*third.*belongs to no layer"),
    ],
)
def test_tensors_that_do_not_hold(tmp_path, saved, tensors, match):
    everywhere(edited(saved, tmp_path / "a.safetensors", tensors=tensors), match)


# ---------------------------------------------------------------------- wrong models


def test_file_of_another_model(tmp_path, saved):
    path = tmp_path / "a.safetensors"
    path.write_bytes(saved)
    refuse(
        nn.Sequential(nn.Linear(4, 4)),
        path,
        "a Sequential, the file is of a Host.: there is no layer 'embed'; there is.*'first'",
    )
    wider = Host()
    wider.block["up"] = nn.Linear(24, 12)
    refuse(wider, path, r"'block.up' must be Linear 10x24, is Linear 12x24")
    wider.first, wider.second = nn.Tanh(), nn.Conv2d(1, 4, (9, 1))
    refuse(wider, path, "'first': .*got Tanh; 'second' must be Conv2d 4x1x3x3, is Conv2d 4x1x9x1; 'block.up'")


def test_a_file_whose_length_of_header_looks_like_a_pickle_is_read(tmp_path):
    """Pickles begin with 0x80, and so does a safetensors file where its header has 0x..80 bytes: one file in 32."""
    path = tmp_path / "a.safetensors"
    for length in range(1, 260):
        model = put(Host(), NAMES[:1], adapter="a" * length)
        save_adapter(model, path, overwrite=True)
        if path.read_bytes()[0] == 0x80:
            load_adapter(other := Host(), path)
            assert_same_adapter(model, other, "a" * length)
            return
    pytest.fail("no header of such a length")


def test_model_adapted_otherwise(tmp_path, saved):
    path = tmp_path / "a.safetensors"
    path.write_bytes(saved)
    refuse(put(Host(), NAMES[:4]), path, "'block.down' has no adapter 'default', others have")
    refuse(put(Host(), (*NAMES, "up")), path, "'up' has an adapter 'default', the file has none for it")
    refuse(put(Host(), method="lora"), path, "'embed' was saved with method deeplora, not lora")
    refuse(put(Host(), method="lora"), path, "it holds lora adapters", adapter="second")
    refuse(put(Host(), scale=2.0), path, r"saved with scale 1.5, not 2.0; delete_adapter\(model, 'default'\) first")
    refuse(put(Host(), rank=2), path, "saved with rank 3, not 2")
    refuse(Host().to("meta"), path, "'embed' is on the meta device")
    refuse(put(Host(), mode="paper"), path, "saved with mode aligned, not paper")
    refuse(put(Host(), init_scale=0.1), path, "saved with init_scale 0.4, not 0.1")  # what the update is counted from
    retuned = put(Host(), dropout=0.5)
    load_adapter(retuned, path)
    assert retuned.embed.adapters["default"].dropout == 0.5
    save_adapter(put(Host(), mode="paper"), path, overwrite=True)
    retuned = put(Host(), mode="paper", init_scale=0.1)
    load_adapter(retuned, path)
    assert retuned.embed.adapters["default"].init_scale == 0.1


# ---------------------------------------------------------------------- plain LoRA


@pytest.mark.parametrize("shrink", [None, 1e-7], ids=["exact", "shrunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_exported_factors_are_the_update(method, dtype, shrink):
    model = put(Host().to(dtype), method=method)
    exported = export_lora(model, shrink=shrink)
    assert tuple(exported) == NAMES
    for name, (a, b, error) in exported.items():
        layer = model.get_submodule(name)
        delta = layer.get_delta_weight("default").detach()
        assert a.dtype == b.dtype == delta.dtype
        assert error <= (shrink or 0)
        gap = torch.linalg.norm(layer._as_weight(b @ a) - delta) / torch.linalg.norm(delta)
        assert gap < 30 * torch.finfo(delta.dtype).eps + error * len(a) ** 0.5, name
        if shrink is None and method != "randlora":
            assert len(a) == layer.adapters["default"].rank


@pytest.mark.parametrize("tol", [0.3, 1e-3, 1e-6])
@pytest.mark.parametrize("shape", [(40, 30), (5, 30), (30, 5)], ids=str)
def test_shrink_cuts_below_the_tolerance_and_says_what(shape, tol):
    k = 12
    left = torch.randn(shape[0], k, generator=generator(1), dtype=torch.float64)
    core = torch.randn(3, k, k, generator=generator(2), dtype=torch.float64) * torch.logspace(0, -5, k, dtype=torch.float64)
    right = torch.randn(k, shape[1], generator=generator(3), dtype=torch.float64)
    delta = 2 * left @ core[2] @ core[1] @ core[0] @ right
    values = torch.linalg.svdvals(delta)
    a, b, error = shrink_factors(Factors(left, core, right, 2.0), tol)
    assert len(a) == int((values > tol * values[0]).sum())
    cut = float(torch.linalg.matrix_norm(b @ a - delta, 2) / values[0])
    assert cut <= tol
    assert abs(cut - error) < 1e-13


def test_shrink_of_nothing_and_of_everything():
    zero = shrink_factors(Factors(torch.zeros(6, 3), None, torch.ones(3, 4), 1.0))
    assert (zero.a.shape, zero.b.shape, zero.error) == ((1, 4), (6, 1), 0.0)
    assert not (zero.b @ zero.a).any()
    one = shrink_factors(Factors(torch.eye(6, 3), None, torch.eye(3, 4), 1.0), tol=0.999)
    assert len(one.a) == 3
    for tol in (-1e-3, 1.0, float("nan")):
        with pytest.raises(ValueError, match="tol must be from 0 to below 1"):
            shrink_factors(Factors(torch.eye(6, 3), None, torch.eye(3, 4), 1.0), tol)


@torch.no_grad()
def through_peft(base, folder, *inputs):
    peft = pytest.importorskip("peft", reason="needs PEFT, of lowrank-kernels[all]")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    output = loaded(*inputs)
    return loaded, getattr(output, "logits", output)


def transformer(kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers, of lowrank-kernels[all]")
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
        )
        return transformers.BertForSequenceClassification(config).eval()
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=20, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("shrink", [None, 1e-7], ids=["exact", "shrunk"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_peft_computes_the_same_logits(tmp_path, kind, shrink):
    base = transformer(kind).double()  # in float32 the rounding of the two orders of summation is already 1e-6
    model = copy.deepcopy(base)
    head = ["classifier"] if kind == "bert" else []
    adapt(model, 4, rank_pattern={r".*layer\.1\..*|.*h\.1\..*": 6}, init_scale=0.5, modules_to_train=head)
    for index, layer in enumerate(adapter_layers(model).values()):
        shake(layer, "default", index)
    if head:
        with torch.no_grad():
            model.classifier.weight.mul_(2)
    ids = torch.arange(12).reshape(2, 6)
    wanted = model(ids).logits.detach()
    exported = export_lora(model, tmp_path / "out" / "peft", shrink=shrink, base_model_name_or_path="tiny")
    loaded, logits = through_peft(base, tmp_path / "out" / "peft", ids)
    assert float((wanted - base(ids).logits.detach()).abs().max()) > 1e-2
    assert float((logits - wanted).abs().max()) < (1e-6 if shrink else 1e-12)
    config = loaded.peft_config["default"]
    assert config.fan_in_fan_out == (kind == "gpt2")
    assert config.base_model_name_or_path == "tiny"
    peft_layers = {n: m for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {n: (m.r["default"], m.scaling["default"]) for n, m in peft_layers.items()} == {
        n: (len(lora.a), 1.0) for n, lora in exported.items()
    }


def test_peft_runs_every_host(tmp_path):
    base = Host().double().eval()
    model = put(copy.deepcopy(base), dropout=0.1).eval()
    export_lora(model, tmp_path)
    loaded, got = through_peft(base, tmp_path, IDS)
    wanted = model(IDS).detach()
    assert float((wanted - base(IDS).detach()).abs().max()) > 1e-2
    assert float((got - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
    assert not hasattr(loaded.base_model.model.up, "lora_A")
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.second.lora_A.weight"].shape == (3, 1, 3, 3)
    assert tensors["base_model.model.second.lora_B.weight"].shape == (4, 3, 1, 1)
    assert tensors["base_model.model.first.lora_B.weight"].shape == (6, 4, 1)
    assert tensors["base_model.model.embed.lora_embedding_A"].shape == (3, 11)


def test_a_name_that_peft_would_take_for_a_trained_module_is_refused(tmp_path):
    """As of DistilBERT, whose classifier is trained in full, and whose pre_classifier is adapted."""
    model = nn.Sequential()
    model.pre_up, model.up = nn.Linear(4, 4), nn.Linear(4, 2)
    adapt(model, 2, target_modules=["pre_up"], modules_to_train=["up"])
    with pytest.raises(ValueError, match=r"PEFT would take the adapted layer 'pre_up' for 'up'.*exclude_modules=\['pre_up'\]"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert list(export_lora(model)) == ["pre_up"]


def test_peft_adapts_the_named_layer_only(tmp_path):
    """PEFT takes "up" for "block.up" too, where names are a list."""
    base = Host().double().eval()
    model = put(copy.deepcopy(base), ("up",)).eval()
    export_lora(model, tmp_path)
    loaded, got = through_peft(base, tmp_path, IDS)
    assert [name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")] == ["up"]
    assert float((got - model(IDS).detach()).abs().max()) < 1e-12


def test_export_refuses_what_peft_computes_otherwise(tmp_path):
    for options in ({"dilation": 2}, {"padding_mode": "reflect", "padding": 1}):
        model = put(nn.Sequential(nn.Conv1d(4, 4, 3, **options)), ("0",))
        with pytest.raises(ValueError, match=r"PEFT would run '0' without its dilation .* use folder=None"):
            export_lora(model, tmp_path / "peft")
        assert export_lora(model)["0"].a.shape == (3, 12)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    adapt(model, 2)
    with pytest.raises(ValueError, match="'0' is shared, the model holds it under 2 names"):
        export_lora(model, tmp_path / "peft")
    layer = layer_class(nn.Linear(4, 4), "lora").from_module(nn.Linear(4, 4), 2)
    with pytest.raises(ValueError, match="here the model itself is the layer"):
        export_lora(layer, tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def test_export_does_not_replace_by_itself(tmp_path):
    model = put(Host())
    export_lora(model, tmp_path)
    old = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert {file.name for file in old} == {"adapter_model.safetensors", "adapter_config.json"}
    shake(model.embed, "default", 77)
    with pytest.raises(OutputError, match="exists already"):
        export_lora(model, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == old
    export_lora(model, tmp_path, overwrite=True)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != old[tmp_path / "adapter_model.safetensors"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="a folder was wanted"):
        export_lora(model, tmp_path / "file")

"""Named adapters of a layer: adding, choosing, merging bit for bit, saving, and what is refused with nothing changed."""

import contextlib
import dataclasses
import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lowrank_kernels.nn import (
    AdapterInfo,
    DeepLoRAConv2d,
    DeepLoRAEmbedding,
    DeepLoRALinear,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    RandLoRALinear,
    layer_class,
)

METHODS = ["deeplora", "lora", "randlora"]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=["f32", "bf16", "f16", "f64"]
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shake(layer, name, seed=1):
    """Parameters as after some training."""
    with torch.no_grad():
        for parameter in layer.adapter_parameters(name).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(seed)).to(parameter))


def make(base=None, method="lora", names=("default",), rank=3):
    base = nn.Linear(9, 14) if base is None else base
    layer = layer_class(base, method)(base, rank, adapter=names[0])
    for name in names[1:]:
        layer.add_adapter(name, rank)
    for seed, name in enumerate(names):
        shake(layer, name, seed)
    return layer


def state(layer):
    """All that a refused call must leave as it was."""
    tensors = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight = layer.base_layer.weight.detach().clone()
    grads = [p.requires_grad for p in layer.parameters()]
    return tensors, weight, grads, layer.active_adapters, layer.merged_adapters, dict(layer.adapters), layer.enabled


def unchanged(before, layer):
    after = state(layer)
    assert before[0].keys() == after[0].keys()
    assert all(bits(before[0][name], after[0][name]) for name in before[0])
    assert bits(before[1], after[1])
    assert before[2:] == after[2:]


def bits(a, b):
    """Equal bit for bit: also the sign of zeros and the payload of NaNs."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().contiguous().view(integers), b.detach().contiguous().view(integers))


def bases():
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers, of lowrank-kernels[all]").Conv1D
    return {
        "linear": nn.Linear(9, 14),
        "Conv1D": conv1d(14, 9),
        "embedding": nn.Embedding(14, 9),
        "conv1d": nn.Conv1d(6, 8, 3),
        "conv2d": nn.Conv2d(6, 8, 3, bias=False),
    }


HOSTS = ["linear", "Conv1D", "embedding", "conv1d", "conv2d"]


def example(layer, dtype):
    base = layer.base_layer
    if isinstance(base, nn.Embedding):
        return torch.arange(14)
    shape = {nn.Conv1d: (2, 6, 8), nn.Conv2d: (2, 6, 8, 7)}.get(type(base), (4, 9))
    return torch.randn(*shape, generator=generator(9)).to(dtype)


# ---------------------------------------------------------------------- merge and unmerge


@DTYPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_unmerge_restores_the_base_weight_bit_for_bit(name, method, dtype):
    base = bases()[name].to(dtype)
    with torch.no_grad():
        base.weight.view(-1)[:3] = torch.tensor([-0.0, 1e-8, -20.0])
    before, storage = base.weight.detach().clone(), base.weight.data_ptr()
    layer = make(base, method, ("a", "b"))
    layer.set_adapter(["a", "b"])
    x = example(layer, dtype)
    first = layer(x).detach()
    for cycle, names in enumerate([None, "a", ["b", "a"], "b", None] * 3):
        layer.merge(names)
        assert not bits(base.weight, before)
        merged = layer(x).detach()
        # Twice the rounding of the largest terms: the weights', and that of what the update is made of.
        limit = 40 * torch.finfo(dtype).eps * max(float(before.abs().max()), float(first.abs().max()))
        assert float((merged - first).abs().max()) <= limit, f"cycle {cycle}"
        layer.unmerge()
        assert bits(base.weight, before), f"cycle {cycle}"
        assert layer.merged_adapters == ()
        assert torch.equal(layer(x), first)
    assert base.weight.data_ptr() == storage


@DTYPES
def test_merge_sums_in_wide_and_rounds_once(dtype):
    layer = make(nn.Linear(40, 30).to(dtype), names=("a", "b"))
    base, wide = layer.base_layer, torch.float64 if dtype == torch.float64 else torch.float32
    before = base.weight.detach().clone()
    delta = (layer.get_delta_weight("a") + layer.get_delta_weight("b")).detach()
    assert delta.dtype == wide
    report = layer.merge(["a", "b"])
    assert bits(base.weight, (before.to(wide) + delta).to(dtype))
    assert report.adapters == ("a", "b")
    assert report.stash_bytes == before.numel() * before.element_size()
    error = base.weight.detach().double() - before.double() - delta.double()
    if dtype in (torch.bfloat16, torch.float16):  # otherwise the sum's own rounding is all there is
        assert report.rounding_error == pytest.approx(float(error.abs().max()), rel=1e-3)
        assert report.relative_error == pytest.approx(float(error.norm() / delta.double().norm()), rel=1e-3)
        assert report.rounding_error > 0
    else:
        assert report.rounding_error <= 4 * torch.finfo(dtype).eps * float(before.abs().max())


def test_merging_in_steps_is_merging_at_once():
    """The second merge starts from the stash again: still one rounding, one stash."""
    layer = make(nn.Linear(40, 30).bfloat16(), names=("a", "b"))
    layer.merge(["a", "b"])
    wanted = layer.base_layer.weight.detach().clone()
    layer.unmerge()
    assert layer.merge("a").adapters == ("a",)
    assert layer.merge("b").adapters == ("b",)
    assert layer.merged_adapters == ("a", "b")
    assert bits(layer.base_layer.weight, wanted)


def test_merged_layer_runs_what_is_not_merged():
    layer = make(nn.Linear(9, 14).double(), names=("a", "b"))
    layer.set_adapter(["a", "b"])
    x = torch.randn(4, 9, dtype=torch.float64)
    wanted = layer(x)
    layer.merge("a")
    assert torch.allclose(layer(x), wanted, rtol=1e-12)
    layer.merge("b")
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.allclose(layer(x), wanted, rtol=1e-12)
    layer.train()
    assert torch.allclose(layer(x), wanted, rtol=1e-12)


def test_merging_twice_warns_and_changes_nothing():
    layer = make(names=("a", "b"))
    first = layer.merge("a")
    before = state(layer)
    with pytest.warns(UserWarning, match="merge: nothing to do, a already merged") as record:
        report = layer.merge("a")
    assert record[0].filename == __file__
    assert report == ((), 0.0, 0.0, first.stash_bytes)
    unchanged(before, layer)
    layer.unmerge()
    before = state(layer)
    with pytest.warns(UserWarning, match="no adapter is merged") as record:
        layer.unmerge()
    assert record[0].filename == __file__
    unchanged(before, layer)
    layer.set_adapter([])
    with pytest.warns(UserWarning, match="no adapter is active"):
        layer.merge()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("merged", [False, True])
def test_an_update_that_is_not_finite_is_not_merged(merged, value):
    layer = make(names=("good", "bad"))
    if merged:
        layer.merge("good")
    with torch.no_grad():
        layer.left["bad"][2, 1] = value
    before = state(layer)
    with pytest.raises(ValueError, match="merge: the update of adapter 'bad' has NaN or infinity; nothing was changed"):
        layer.merge(["good", "bad"])
    unchanged(before, layer)


def test_a_sum_beyond_the_range_of_the_dtype_is_not_merged():
    layer = make(nn.Linear(9, 14).half())
    with torch.no_grad():
        layer.left["default"].mul_(1e7)
    before = state(layer)
    with pytest.raises(ValueError, match=r"not finite in torch.float16; nothing was changed"):
        layer.merge()
    unchanged(before, layer)


def test_merged_layers_refuse_what_would_not_fit_the_merged_weight():
    layer = make(names=("a", "b"))
    checkpoint = layer.state_dict()
    layer.merge("a")
    before = state(layer)
    for refused in (
        lambda: layer.set_adapter("b"),
        lambda: layer.delete_adapter("a"),
        lambda: layer.add_adapter("c"),
        lambda: layer.load_state_dict(checkpoint),
    ):
        with pytest.raises(ValueError, match=r"a merged into the base weight; call unmerge\(\) first"):
            refused()
        unchanged(before, layer)


def test_unmerge_after_a_cast_is_the_cast_base():
    layer = make(nn.Linear(9, 14))
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert bits(layer.base_layer.weight, before.bfloat16())


def test_gradients_reach_the_factors_through_the_delta_weight():
    layer = make(method="deeplora")
    layer.get_delta_weight("default").square().sum().backward()
    assert all(p.grad is not None for p in layer.adapter_parameters("default").values())


# ---------------------------------------------------------------------- disabled


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_disabled_is_the_base_bit_for_bit(name, method):
    layer = make(bases()[name], method)
    x = example(layer, torch.float32)
    on, off = layer(x), layer.base_layer(x)
    assert not torch.equal(on, off)
    with layer.disabled():
        assert not layer.enabled
        assert torch.equal(layer(x), off)
        with layer.disabled():
            assert torch.equal(layer(x), off)
        assert torch.equal(layer(x), off)
    assert layer.enabled
    assert torch.equal(layer(x), on)
    layer.merge()
    merged = layer.base_layer.weight.detach().clone()
    with contextlib.suppress(KeyError), layer.disabled():
        assert torch.equal(layer(x), off)
        raise KeyError
    assert bits(layer.base_layer.weight, merged)
    assert layer.merged_adapters == ("default",)


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_active_adapters_add_up(name, method):
    layer = make(bases()[name].double(), method, ("a", "b", "c"))
    x = example(layer, torch.float64)
    base = layer.base_layer(x)
    updates = {}
    for key in ("a", "b", "c"):
        layer.set_adapter(key)
        assert layer.active_adapters == (key,)
        updates[key] = layer(x) - base
    layer.set_adapter(["c", "a"])
    assert torch.allclose(layer(x), base + updates["a"] + updates["c"], rtol=1e-10, atol=1e-12)
    layer.set_adapter([])
    assert torch.equal(layer(x), base)


def test_the_first_adapter_is_active_and_only_active_ones_are_trained():
    layer = make(names=("a", "b"))

    def trained():
        return sorted(name for name, p in layer.named_parameters() if p.requires_grad)

    assert layer.active_adapters == ("a",)
    assert trained() == ["left.a", "right.a"]
    layer.set_adapter(("b", "a"))
    assert layer.active_adapters == ("b", "a")
    assert trained() == ["left.a", "left.b", "right.a", "right.b"]
    layer.set_adapter("b")
    assert trained() == ["left.b", "right.b"]


@pytest.mark.parametrize("method", METHODS)
def test_a_deleted_adapter_leaves_nothing(method):
    layer = make(method=method, names=("a", "b"))
    layer.delete_adapter("a")
    assert list(layer.adapters) == ["b"]
    assert layer.active_adapters == ()
    assert not [name for name in layer.state_dict() if name.endswith(".a")]
    x = torch.randn(2, 9)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.double().float()
    layer.add_adapter("a", 2)
    layer.set_adapter("a")
    assert layer.adapters["a"].rank == 2


@pytest.mark.parametrize("name", ["", "a.b", "keys", "default", 3, "training"])
def test_names_that_cannot_be_used(name):
    layer = make()
    before = state(layer)
    with pytest.raises(ValueError, match="add_adapter"):
        layer.add_adapter(name)
    unchanged(before, layer)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: layer.set_adapter("nobody"),
        lambda layer: layer.set_adapter(["default", "nobody"]),
        lambda layer: layer.delete_adapter("nobody"),
        lambda layer: layer.factors("nobody"),
        lambda layer: layer.get_delta_weight("nobody"),
        lambda layer: layer.merge("nobody"),
        lambda layer: layer.reset_parameters("nobody"),
        lambda layer: layer.adapter_parameters("nobody"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_name_is_told_with_the_known_ones(method, call):
    layer = make(method=method)
    before = state(layer)
    with pytest.raises(ValueError, match="no adapter 'nobody'; there are: 'default'"):
        call(layer)
    unchanged(before, layer)


def test_one_adapter_twice_in_a_list_is_refused():
    with pytest.raises(ValueError, match="names must differ"):
        make().set_adapter(["default", "default"])


@pytest.mark.parametrize("method", METHODS)
def test_info_is_json_and_adds_the_same_adapter_again(method):
    options = {"deeplora": {"depth": 2, "init_scale": 0.1, "scale": 3.0}, "lora": {"alpha": 5}, "randlora": {"basis_seed": 4}}
    layer = layer_class(nn.Linear(9, 14), method)(nn.Linear(9, 14), 3, dropout=0.25, **options[method])
    info = layer.adapters["default"]
    assert AdapterInfo(**json.loads(json.dumps(dataclasses.asdict(info)))) == info
    layer.add_adapter("again", **info.options)
    assert layer.adapters["again"] == info
    for kind, parameter in layer.adapter_parameters("default").items():
        assert parameter.shape == layer.adapter_parameters("again")[kind].shape


def test_repr_tells_the_adapters():
    layer = make(method="deeplora", names=("a", "b"))
    layer.add_adapter("c", 2, 1, dropout=0.5)
    layer.merge("b")
    text = repr(layer)
    assert "a: deeplora (aligned), rank 3, depth 3, scale 1, active" in text
    assert "b: deeplora (aligned), rank 3, depth 3, scale 1, merged" in text


# ---------------------------------------------------------------------- factors and starts


def test_set_factors_casts_and_keeps_the_parameters():
    layer = make(nn.Linear(9, 14).bfloat16(), "deeplora")
    parameters = layer.adapter_parameters("default")
    given = [torch.randn(parameters[kind].shape, dtype=torch.float64) for kind in ("left", "core", "right")]
    layer.set_factors("default", *given)
    for kind, value in zip(("left", "core", "right"), given, strict=True):
        assert layer.adapter_parameters("default")[kind] is parameters[kind]
        assert torch.equal(parameters[kind], value.float())


@pytest.mark.parametrize(
    ("method", "shapes", "message"),
    [
        ("lora", [(14, 3), None, (3, 8)], r"set_factors: right must be \(3, 9\), got \(3, 8\)"),
        ("lora", [(14, 3), (1, 3, 3), (3, 9)], r"'default' \(lora\) has left, right, got left, core, right"),
        ("deeplora", [(14, 3), None, (3, 9)], r"\(deeplora\) has left, core, right, got left, right"),
        ("deeplora", [(14, 3), (2, 3, 3), (3, 9)], r"core must be \(3, 3, 3\), got \(2, 3, 3\)"),
        ("randlora", [(14, 3), None, (3, 9)], r"\(randlora\) has lambdas, gammas, got left, right"),
    ],
)
def test_factors_that_do_not_fit(method, shapes, message):
    layer = make(method=method)
    before = state(layer)
    with pytest.raises(ValueError, match=message):
        layer.set_factors("default", *(None if shape is None else torch.ones(shape) for shape in shapes))
    unchanged(before, layer)


@pytest.mark.parametrize("method", METHODS)
def test_reset_parameters_is_a_new_start(method):
    make_layer = layer_class(nn.Linear(9, 14), method)
    layer = make_layer(nn.Linear(9, 14), 3, generator=generator(0))
    start = {kind: p.detach().clone() for kind, p in layer.adapter_parameters("default").items()}
    shake(layer, "default")
    layer.reset_parameters("default", generator(0))
    assert all(torch.equal(p, start[kind]) for kind, p in layer.adapter_parameters("default").items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_meta_device(name, method):
    base = bases()[name].to("meta")
    layer = layer_class(base, method)(base, 3, generator=generator())
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer.get_delta_weight("default").shape == base.weight.shape
    with pytest.raises(ValueError, match="meta device"):
        layer.merge()
    layer.to_empty(device="cpu")
    layer.reset_parameters("default", generator())
    fresh = bases()[name]
    wanted = layer_class(fresh, method)(fresh, 3, generator=generator())
    assert torch.equal(layer.get_delta_weight("default"), wanted.get_delta_weight("default"))
    assert torch.equal(layer.factors("default").left, wanted.factors("default").left)


def test_randlora_layers_share_their_basis():
    layers = [RandLoRALinear(nn.Linear(9, 14), 3) for _ in range(2)]
    other = RandLoRALinear(nn.Linear(9, 14), 3, basis_seed=1)
    first, second, third = (layer._bases["default"][0] for layer in (*layers, other))
    assert first is second
    assert not torch.equal(first, third)
    model = nn.Sequential(*layers).double()
    assert model[0]._bases["default"][0] is model[1]._bases["default"][0]
    assert torch.equal(model[0]._bases["default"][0], first.double())
    assert sorted(layers[0].state_dict()) == ["base_layer.bias", "base_layer.weight", "gammas.default", "lambdas.default"]


# ---------------------------------------------------------------------- state_dict


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_state_dict_round_trip(name, method):
    layer, other = (make(bases()[name], method, ("a", "b")) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    kinds = {"deeplora": {"left", "core", "right"}, "lora": {"left", "right"}, "randlora": {"lambdas", "gammas"}}[method]
    keys = set(layer.state_dict())
    assert {key for key in keys if not key.startswith("base_layer.")} == {f"{kind}.{n}" for kind in kinds for n in "ab"}
    other.load_state_dict(layer.state_dict(), strict=True)
    x = example(layer, torch.float32)
    for adapter in ("a", "b"):
        layer.set_adapter(adapter)
        other.set_adapter(adapter)
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("method", METHODS)
def test_values_may_be_assigned(method):
    """As of a model that is made on the meta device, or takes its dtype from the file."""
    layer = make(method=method)
    with torch.device("meta"):
        other = make(method=method)
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 9, generator=generator())
    assert torch.equal(other(x), layer(x))
    wide = {name: value.double() for name, value in layer.state_dict().items()}
    other.load_state_dict(wide, assign=True)
    torch.testing.assert_close(other(x.double()).float(), layer(x))


def test_state_dict_of_a_merged_layer_holds_no_adapter_twice():
    model, other = nn.Sequential(nn.Linear(9, 9), make()), nn.Sequential(nn.Linear(9, 9), make())
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[1].merge()
    saved = model.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in wanted.items())
    other.load_state_dict(saved)
    x = torch.randn(4, 9)
    assert torch.allclose(model(x), other(x), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- what cannot be adapted


class Quantized(nn.Linear):
    pass


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 4))


def int8_linear():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


def pruned():
    linear = nn.Linear(4, 4)
    prune.identity(linear, "weight")
    return linear


REFUSED = {
    "subclass": (lambda: Quantized(4, 4), "must be an nn.Linear itself, got Quantized .a subclass"),
    "attention": (lambda: nn.MultiheadAttention(4, 2).out_proj, "got NonDynamicallyQuantizableLinear .a subclass"),
    "lazy": (lambda: nn.LazyLinear(4), "got LazyLinear .a subclass"),
    "int8": (int8_linear, "has a weight of torch.int8"),
    "old weight_norm": (old_weight_norm, "computes its weight .weight_norm"),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "got ParametrizedLinear .a subclass"),
    "pruned": (pruned, "computes its weight .weight_norm, spectral_norm, pruning"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "has max_norm"),
    "groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), "has groups=2"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), "got ConvTranspose2d"),
    "conv3d": (lambda: nn.Conv3d(4, 4, 3), "got Conv3d"),
    "norm": (lambda: nn.LayerNorm(4), "got LayerNorm"),
    "adapted": (lambda: LoRALinear(nn.Linear(4, 4), 2), "got LoRALinear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_cannot_be_adapted(name):
    build, reason = REFUSED[name]
    module = build()
    before = [(key, p.requires_grad) for key, p in module.named_parameters()]
    with pytest.raises(TypeError, match=f"layer_class: the layer .*{reason}"):
        layer_class(module)
    kind = DeepLoRAConv2d if name == "groups" else DeepLoRAEmbedding if name == "max_norm" else DeepLoRALinear
    with pytest.raises(TypeError, match=f"{kind.__name__}: base_layer .*{reason}"):
        kind.from_module(module, 2)
    assert before == [(key, p.requires_grad) for key, p in module.named_parameters()]


def test_every_method_has_every_host():
    for method, prefix in (("deeplora", "DeepLoRA"), ("lora", "LoRA"), ("randlora", "RandLoRA")):
        wanted = {"linear": "Linear", "Conv1D": "Linear", "embedding": "Embedding", "conv1d": "Conv1d", "conv2d": "Conv2d"}
        for name, base in bases().items():
            assert layer_class(base, method).__name__ == prefix + wanted[name]
    with pytest.raises(ValueError, match="method must be one of deeplora, lora, randlora, got 'dora'"):
        layer_class(nn.Linear(2, 2), "dora")
    assert type(LoRALinear.from_linear(nn.Linear(4, 4), 2)) is LoRALinear
    assert type(LoRAEmbedding.from_embedding(nn.Embedding(4, 4), 2)) is LoRAEmbedding
    assert type(LoRAConv2d.from_conv(nn.Conv2d(4, 4, 1), 2)) is LoRAConv2d


OPTIONS_REFUSED = {
    "rank 0": ({"rank": 0}, ValueError, "rank must be an integer from 1 to 9, the smaller side of this layer's 14 x 9 matrix"),
    "rank 10": ({"rank": 10}, ValueError, "14 x 9 matrix, got 10"),
    "rank 2.0": ({"rank": 2.0}, ValueError, "rank must be an integer"),
    "depth 0": ({"rank": 2, "depth": 0}, ValueError, "depth must be an integer of at least 1, got 0"),
    "dropout 1": ({"rank": 2, "dropout": 1.0}, ValueError, "dropout must be from 0 to below 1"),
    "dropout nan": ({"rank": 2, "dropout": math.nan}, ValueError, "dropout must be"),
    "scale inf": ({"rank": 2, "scale": math.inf}, ValueError, "scale must be finite"),
    "init_scale nan": ({"rank": 2, "init_scale": math.nan}, ValueError, "init_scale must be finite"),
    "float64 factors": ({"rank": 2, "dtype": torch.float64}, TypeError, "dtype must be torch.float32 for a base weight"),
}


@pytest.mark.parametrize("name", OPTIONS_REFUSED)
def test_options_out_of_range(name):
    options, error, message = OPTIONS_REFUSED[name]
    base = nn.Linear(9, 14)
    with pytest.raises(error, match=message):
        DeepLoRALinear.from_linear(base, **options)
    assert all(p.requires_grad for p in base.parameters()), "a refused layer is not frozen"
    layer = make(method="deeplora")
    before = state(layer)
    with pytest.raises(error, match=message):
        layer.add_adapter("second", **options)
    unchanged(before, layer)


@pytest.mark.parametrize(("dtype", "wanted"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_dtype_of_the_factors(dtype, wanted):
    layer = DeepLoRALinear(nn.Linear(9, 14).bfloat16(), 2, dtype=dtype)
    assert {p.dtype for p in layer.adapter_parameters("default").values()} == {wanted}
    assert layer(torch.ones(1, 9, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.get_delta_weight("default").dtype == torch.float32


def test_models_can_look_at_the_layer_as_at_its_base():
    layer = make()
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (9, 14)
    assert not any(p.requires_grad for p in layer.base_layer.parameters())
    assert DeepLoRAEmbedding(nn.Embedding(14, 9, padding_idx=1), 2).padding_idx == 1
    assert make(nn.Linear(9, 14).eval()).training is False

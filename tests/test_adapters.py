"""Adapting whole models: what is replaced, what is left alone and why, and that everything comes back as it was."""

import copy
import pickle
import warnings
from contextlib import ExitStack, suppress

import pytest
import torch
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.nn import AdapterLayer, DeepLoRALinear, LoRALinear

METHODS = ["deeplora", "lora", "randlora"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the models are tiny; conftest restores


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.norm(self.value(torch.tanh(self.query(x))))


class Model(nn.Module):
    """Layers in a ModuleList, one inside a Sequential, convolutions, an embedding and a small head."""

    def __init__(self, width=12):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(width, 3))

    def forward(self, ids):
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(40).reshape(2, 20) % 20
QUERIES = tuple(f"blocks.{i}.query" for i in range(3))


def snapshot(model):
    """Everything a refusal must leave alone: which modules are where, their parameters, their flags, their values."""
    return (
        [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
        sorted(model.__dict__),
    )


def assert_same(model, before):
    modules, parameters, attributes = before
    assert [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)] == modules
    now = list(model.named_parameters())
    assert [(name, id(p), p.requires_grad) for name, p in now] == [entry[:3] for entry in parameters]
    for (name, p), (_, _, _, value) in zip(now, parameters, strict=True):
        assert p.is_meta or torch.equal(p, value), name
    assert sorted(model.__dict__) == attributes


def refused(model, message, error=ValueError, **arguments):
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        lrk.adapt(model, **{"rank": 2, **arguments})
    assert_same(model, before)
    return str(caught.value)


def same_output(model, wanted):
    """The same to rounding: the last bits of BLAS depend on where a tensor lies in memory."""
    return torch.allclose(model(IDS), wanted, atol=1e-6, rtol=1e-5)


def shake(model, adapter="default", seed=5):
    """Values as after some training: large enough to be seen in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lrk.adapter_layers(model).values():
            if adapter in layer.adapters:
                for parameter in layer.adapter_parameters(adapter).values():
                    parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


# ---------------------------------------------------------------------- what is adapted


def test_all_linear_is_every_linear():
    model = Model()
    report = lrk.adapt(model, rank=2)
    wanted = {name for i in range(3) for name in (f"blocks.{i}.query", f"blocks.{i}.value")} | {"head.1"}
    assert set(report.adapted) == set(lrk.adapter_layers(model)) == wanted
    assert report.skipped == {}
    assert type(model.head[1]) is DeepLoRALinear
    assert type(model.conv) is nn.Conv1d


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["query"], QUERIES),
        (("1.query", "blocks.2.query"), QUERIES[1:]),
        ({"query", "head.1"}, (*QUERIES, "head.1")),
        (r"blocks\.[01]\.query", QUERIES[:2]),
        (r".*\.(query|1)", (*QUERIES, "head.1")),
        (["embed", "conv"], ("embed", "conv")),
    ],
    ids=str,
)
def test_targets_are_ends_of_names_or_one_expression(targets, wanted):
    model = Model()
    assert lrk.adapt(model, rank=2, target_modules=targets).adapted == wanted
    assert tuple(lrk.adapter_layers(model)) == wanted


@pytest.mark.parametrize("exclude", [["head.1", "value"], r"(head|.*value).*"], ids=["names", "regex"])
def test_excluded_layers_are_left_alone(exclude):
    report = lrk.adapt(Model(), rank=2, exclude_modules=exclude)
    assert report.adapted == QUERIES
    assert report.skipped == dict.fromkeys([*(f"blocks.{i}.value" for i in range(3)), "head.1"], "excluded (exclude_modules)")


def test_a_module_is_excluded_with_what_is_inside():
    assert lrk.adapt(Model(), rank=2, exclude_modules=["blocks.0", "head"]).adapted == (
        "blocks.1.query", "blocks.1.value", "blocks.2.query", "blocks.2.value",
    )  # fmt: skip


def test_an_end_of_a_name_is_whole_words():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "prequery": nn.Linear(4, 4)})
    assert lrk.adapt(model, rank=2, target_modules=["query"]).adapted == ("query",)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapters_train(method):
    model = Model()
    report = lrk.adapt(model, rank=2, method=method)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = lrk.adapter_layers(model)
    kinds = ("lambdas", "gammas") if method == "randlora" else ("left", "right", "core")
    assert trainable == {f"{name}.{kind}.default" for name in layers for kind in kinds if (method, kind) != ("lora", "core")}
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.trainable == sum(layer.parameters for layer in report.layers.values())


def test_options_reach_the_layers():
    model = Model()
    lrk.adapt(model, 4, 2, ["query"], init_scale=0.5, scale=2.0, dropout=0.25, dtype=torch.float32)
    info = model.blocks[1].query.adapters["default"]
    assert (info.rank, info.depth, info.init_scale, info.scale, info.dropout) == (4, 2, 0.5, 2.0, 0.25)
    model = Model()
    lrk.adapt(model, 4, target_modules=["query"], method="lora", alpha=6)
    assert model.blocks[1].query.adapters["default"].scale == 1.5
    assert type(model.blocks[1].query) is LoRALinear


def test_rank_pattern_goes_by_the_first_match():
    model = Model()
    report = lrk.adapt(model, 2, rank_pattern={r"0\.query": 6, "query": 4, r"head\..*": 3})
    ranks = {name: layer.rank for name, layer in report.layers.items()}
    assert ranks == {
        "blocks.0.query": 6, "blocks.1.query": 4, "blocks.2.query": 4, "head.1": 3,
        "blocks.0.value": 2, "blocks.1.value": 2, "blocks.2.value": 2,
    }  # fmt: skip
    assert all(layer.adapters["default"].rank == ranks[name] for name, layer in lrk.adapter_layers(model).items())


def test_odd_ranks_are_for_models_that_are_not_compressed():
    assert lrk.adapt(Model(), rank=3, target_modules=["query"]).layers["blocks.0.query"].rank == 3


def test_training_mode_follows():
    model = Model().eval()
    model.blocks[1].train()
    lrk.adapt(model, rank=2)
    assert [model.blocks[i].query.training for i in range(3)] == [False, True, False]


def test_factors_are_wide_for_half_precision_layers():
    model = Model().bfloat16()
    lrk.adapt(model, rank=2, target_modules=["query"])
    assert model.blocks[0].query.left["default"].dtype == torch.float32
    assert model.blocks[0].query.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------------- starts


def test_a_start_depends_on_seed_and_name_only():
    whole, part, other = Model(), Model(), Model()
    state = torch.get_rng_state()
    lrk.adapt(whole, rank=2, seed=3)
    lrk.adapt(part, rank=2, seed=3, target_modules=["2.query"])
    lrk.adapt(other, rank=2, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    starts = [model.blocks[2].query.left["default"] for model in (whole, part, other)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.allclose(starts[0], starts[2])
    assert not torch.allclose(starts[0], whole.blocks[1].query.left["default"])


@pytest.mark.parametrize("method", METHODS)
def test_the_model_starts_where_it_was(method):
    model = Model()
    before = model(IDS)
    lrk.adapt(model, rank=2, method=method)
    assert torch.allclose(model(IDS), before, atol=1e-6)


# ---------------------------------------------------------------------- what is left alone, and why


class OwnLinear(nn.Linear):
    pass


def weight_normed(layer):
    return nn.utils.parametrizations.weight_norm(layer)


def old_weight_normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def integer_layer():
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    return layer


def quantized_layer():
    class QuantLinear(nn.Module):  # the look of those of GPTQ and AWQ
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 6
            self.register_buffer("qweight", torch.zeros(6, 6, dtype=torch.int32))

        def forward(self, x):
            return x

    return QuantLinear()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnLinear(6, 6), "got OwnLinear .*a subclass"),
        (lambda: weight_normed(nn.Linear(6, 6)), "subclass|computes its weight"),
        (lambda: old_weight_normed(nn.Linear(6, 6)), "computes its weight"),
        (integer_layer, "int8"),
        (quantized_layer, "got QuantLinear"),
        (lambda: nn.Conv2d(6, 6, 1, groups=2), "groups=2"),
        (lambda: nn.Embedding(6, 6, max_norm=1.0), "max_norm"),
        (lambda: nn.Conv3d(6, 6, 1), "got Conv3d"),
    ],
    ids=[
        "subclass", "weight_norm", "old-weight_norm", "int8", "quantized", "groups", "max_norm", "conv3d",
    ],
)  # fmt: skip
def test_unknown_layers_are_skipped_with_the_reason(make, reason):
    def build():
        return nn.ModuleDict({"odd": make(), "plain": nn.Linear(6, 6)})

    model = build()
    odd = model["odd"]
    report = lrk.adapt(model, rank=2, target_modules=["odd", "plain"])
    assert report.adapted == ("plain",)
    assert model["odd"] is odd
    assert list(report.skipped) == ["odd"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.skipped["odd"])
    assert "odd" in refused(build(), "strict=True, and 1 of", target_modules=["odd", "plain"], strict=True)
    assert "odd" in refused(build(), "leaves nothing to adapt", target_modules=["odd"])


def test_all_linear_sees_quantized_layers_and_says_so():
    model = nn.ModuleDict({"odd": quantized_layer(), "own": OwnLinear(6, 6), "plain": nn.Linear(6, 6)})
    report = lrk.adapt(model, rank=2)
    assert report.adapted == ("plain",)
    assert set(report.skipped) == {"odd", "own"}


def test_dynamically_quantized_layers_are_skipped():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantized engine here")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    refused(model, "leaves nothing to adapt: 0: ")


def test_layers_whose_weight_is_read_past_forward_are_skipped():
    """The fast path of inference takes linear1.weight itself: an adapter there would train and then do nothing."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8))
    report = lrk.adapt(model, rank=2)
    assert report.adapted == ("1",)
    assert set(report.skipped) == {"0.linear1", "0.linear2", "0.self_attn.out_proj"}
    assert "inference" in report.skipped["0.linear1"]
    assert "MultiheadAttention reads its weight" in report.skipped["0.self_attn.out_proj"]
    decoder = nn.Sequential(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True))
    assert set(lrk.adapt(decoder, rank=2).adapted) == {"0.linear1", "0.linear2"}  # it has no such path


def test_without_the_fast_path_encoder_layers_are_adapted_and_used_in_inference():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
        assert lrk.adapt(model, rank=2).adapted == ("0.linear1", "0.linear2")
        x = torch.ones(2, 3, 8)
        with torch.no_grad():
            start = model(x)
            assert not torch.allclose(shake(model)(x), start, atol=1e-3)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_tied_weights_are_skipped():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 6), "mid": nn.Linear(6, 6), "out": nn.Linear(6, 9)})
    model["out"].weight = model["embed"].weight
    report = lrk.adapt(model, rank=2, target_modules=["embed", "mid", "out"])
    assert report.adapted == ("mid",)
    assert report.skipped == {"embed": "its weight is tied to that of out", "out": "its weight is tied to that of embed"}


class Speaker(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(6, 6), nn.Linear(6, 9)

    def get_output_embeddings(self):
        return self.lm_head


def test_the_output_embedding_is_adapted_only_by_name():
    report = lrk.adapt(nn.Sequential(Speaker()), rank=2)
    assert report.adapted == ("0.body",)
    assert list(report.skipped) == ["0.lm_head"]
    assert "the output embedding" in report.skipped["0.lm_head"]
    assert lrk.adapt(Speaker(), rank=2, target_modules=["lm_head"]).adapted == ("lm_head",)


def test_modules_to_train_stay_trainable_as_a_whole():
    model = Model()
    report = lrk.adapt(model, rank=2, modules_to_train=["head", "0.norm"])
    assert report.skipped == {"head.1": "trained in full (modules_to_train)"}
    assert all(p.requires_grad for p in [*model.head.parameters(), *model.blocks[0].norm.parameters()])
    assert not any(p.requires_grad for p in [*model.blocks[1].norm.parameters(), *model.embed.parameters()])
    lrk.adapt(model, rank=2, adapter="second")
    assert all(p.requires_grad for p in model.head.parameters())
    lrk.unadapt(model)
    refused(model, "modules_to_train 'haed' matches no module.*the nearest names are 'head'", modules_to_train=["haed"])


# ---------------------------------------------------------------------- the report


def test_the_report_prints_a_short_table():
    model = Model()
    text = str(lrk.adapt(model, rank=2, exclude_modules=["head.1"], target_modules=["query", "value", "norm"]))
    lines = text.splitlines()
    assert lines[0] == "adapter 'default', deeplora, in 6 layers:"
    assert [line.split()[:2] for line in lines[1:3]] == [["3", "blocks.*.query"], ["3", "blocks.*.value"]]
    assert lines[1].split()[2:] == ["12", "x", "12", "rank", "2", "180", "parameters"]
    assert lines[3].startswith("  skipped 3 blocks.*.norm: ")
    trainable, total = (sum(p.numel() for p in ps) for ps in
                        ([p for p in model.parameters() if p.requires_grad], model.parameters()))  # fmt: skip
    assert lines[4].startswith(f"trainable: {trainable:,} of {total:,} parameters (")
    assert len(lines) == 5


# ---------------------------------------------------------------------- refusals change nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["qeury"]}, r"target_modules 'qeury' matches no module.*nearest names are 'query'"),
        ({"target_modules": ["query", "vlaue"]}, r"'vlaue' matches no module.*'value'"),
        ({"target_modules": "query"}, r"'query' matches no module, as a regular expression.*pass a list.*'query'"),
        ({"target_modules": r"(query"}, r"target_modules='\(query' is not a regular expression"),
        ({"target_modules": ["blocks"]}, "'blocks' matches no module"),  # a container is no layer
        ({"target_modules": []}, "leaves nothing to adapt"),
        ({"exclude_modules": ["haed.1"]}, r"exclude_modules 'haed.1' matches no module.*'head.1'"),
        ({"exclude_modules": ".*"}, "leaves nothing to adapt"),
        ({"method": "dora"}, "method must be one of 'deeplora', 'lora', 'randlora', got 'dora'"),
        ({"alpha": 8}, "alpha belongs to method='lora'"),
        ({"method": "lora", "scale": 2.0}, "scale belongs to method='deeplora'"),
        ({"rank": 4}, r"rank 4 is larger than head.1 \(3, 12\); .*rank_pattern .*exclude_modules"),
        ({"rank": 13, "target_modules": ["query"]}, r"blocks.0.query \(12, 12\), blocks.1.query .*blocks.2.query"),
        ({"rank_pattern": {"query": 13}}, r"rank 13 is larger than blocks.0.query"),
        ({"rank_pattern": {"qeury": 2}}, r"rank_pattern 'qeury' matches no adapted layer.*'query'"),
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be an integer of at least 1, got 2.0"),
        ({"rank_pattern": {"query": True}}, "rank must be an integer of at least 1, got True"),
        ({"depth": 0}, "depth must be an integer of at least 1"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1"),
        ({"adapter": "a.b"}, "non-empty string without dots"),
        ({"init_scale": float("nan")}, "init_scale must be finite"),
        ({"mode": "papr"}, "mode must be one of 'aligned', 'paper', got 'papr'"),
        ({"mode": "paper", "method": "lora"}, "mode belongs to method='deeplora'"),
        ({"init_scale": 0.1, "method": "randlora"}, "init_scale belongs to method='deeplora'"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_arguments_change_nothing(arguments, message):
    model = Model()
    model.blocks[1].value.weight.requires_grad_(False)
    refused(model, message, **arguments)


def test_a_failure_in_the_middle_changes_nothing():
    model = Model()
    model.blocks[2].query.half()  # its factors can be float16 or float32, those of the others float32 only
    refused(model, "dtype must be", TypeError, dtype=torch.float16, target_modules=["query"])
    lrk.adapt(model, rank=2, target_modules=["query"])
    refused(model, "dtype must be", TypeError, dtype=torch.float16, adapter="second")


def test_adapting_twice_is_refused():
    model = Model()
    lrk.adapt(model, rank=2, target_modules=["query"])
    message = refused(model, "the model is already adapted: 3 layers, such as blocks.0.query", target_modules=["value"])
    assert "unadapt()" in message


def test_a_model_that_is_one_layer_cannot_be_replaced():
    refused(nn.Linear(6, 6), r"the model is itself a Linear, .*nn.Sequential.*DeepLoRALinear")
    refused(DeepLoRALinear.from_linear(nn.Linear(6, 6), 2), "itself an adapted layer; use its add_adapter", adapter="second")


def test_lazy_models_are_called_first():
    model = nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match="lazy layers without parameters yet; call the model once first"):
        lrk.adapt(model, rank=2)
    model(torch.ones(1, 4))
    assert lrk.adapt(model, rank=2).adapted == ("0", "1")


def test_one_method_per_layer():
    model = Model()
    lrk.adapt(model, rank=2, target_modules=["query"])
    refused(model, "it holds deeplora adapters", method="lora", target_modules=["query"], adapter="second")
    report = lrk.adapt(model, rank=2, method="lora", adapter="second")
    assert set(report.skipped) == set(QUERIES)
    assert set(report.adapted) == {"blocks.0.value", "blocks.1.value", "blocks.2.value", "head.1"}


def test_running_out_of_memory_while_merging_leaves_the_model_as_it_was(monkeypatch):
    model = Model()
    lrk.adapt(model, 2, target_modules=["query"], init_scale=0.5)
    before, merge, calls = snapshot(model), DeepLoRALinear.merge, []

    def failing(layer, names=None):
        calls.append(layer)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return merge(layer, names)

    monkeypatch.setattr(DeepLoRALinear, "merge", failing)
    with pytest.raises(torch.OutOfMemoryError):
        lrk.merge_and_unload(model)
    assert len(calls) == 2
    assert_same(model, before)
    assert not any(layer.merged for layer in lrk.adapter_layers(model).values())


def test_a_model_that_accelerate_offloads_is_refused():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate, which transformers brings")
    model = accelerate.cpu_offload(Model(), "cpu")
    with pytest.raises(ValueError, match=r"adapt: accelerate keeps the weights of \d+ modules, such as \S+, elsewhere"):
        lrk.adapt(model, 2, target_modules=["query"])


@pytest.mark.parametrize("function", ["unadapt", "merge_and_unload", "set_adapter", "delete_adapter", "disabled"])
def test_functions_of_adapted_models_refuse_others(function):
    model = Model()
    arguments = ("default",) if function in ("set_adapter", "delete_adapter") else ()
    call = getattr(lrk, function)
    if function == "disabled":
        call = lambda model: ExitStack().enter_context(lrk.disabled(model))  # noqa: E731
    with pytest.raises(ValueError, match=rf"{function}: the model holds no adapted layer; call adapt\(model\) first"):
        call(model, *arguments)
    assert lrk.adapter_layers(model) == {}


# ---------------------------------------------------------------------- taking out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
def test_unadapt_gives_everything_back(method, merged):
    model = Model()
    model.blocks[1].query.weight.requires_grad_(False)
    model.blocks[2].norm.bias.requires_grad_(False)
    before, output = snapshot(model), model(IDS)
    lrk.adapt(model, rank=2, method=method, modules_to_train=["2.norm"])
    shake(model)
    if merged:
        for layer in lrk.adapter_layers(model).values():
            layer.merge()
    assert not torch.allclose(model(IDS), output, atol=1e-3)
    lrk.unadapt(model)
    assert_same(model, before)
    assert torch.equal(model(IDS), output)


def test_unadapt_after_several_adapters_and_a_part():
    model = Model()
    model.embed.weight.requires_grad_(False)
    before = snapshot(model)
    lrk.adapt(model.blocks, rank=2, target_modules=["query"])
    lrk.adapt(model, rank=2, adapter="second")
    lrk.adapt(model, rank=2, adapter="third", target_modules=["embed"])
    lrk.unadapt(model)
    assert_same(model, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
def test_merged_models_are_plain_and_compute_the_same(method, dtype):
    model = Model().to(dtype)
    before = snapshot(model)
    lrk.adapt(model, rank=2, method=method, target_modules=["query", "value", "conv", "embed", "head.1"])
    shake(model)
    adapted = model(IDS)
    assert lrk.merge_and_unload(model) is model
    modules, parameters, attributes = before
    assert [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)] == modules
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == [entry[:3] for entry in parameters]
    assert sorted(model.__dict__) == attributes
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    assert float((model(IDS) - adapted).detach().norm() / adapted.detach().norm()) < tolerance
    assert not torch.equal(model.conv.weight, parameters[1][3])


def test_merging_takes_the_active_adapters_and_what_is_merged():
    model = Model()
    lrk.adapt(model, rank=2, target_modules=["query"])
    lrk.adapt(model, rank=2, adapter="second")
    lrk.adapt(model, rank=2, adapter="third")
    for seed, name in enumerate(("default", "second", "third")):
        shake(model, name, seed)
    lrk.set_adapter(model, ["default", "second"])
    both = model(IDS)
    model.blocks[1].query.merge("second")
    lrk.merge_and_unload(model)
    assert torch.allclose(model(IDS), both, atol=1e-5)


def test_a_merge_that_fails_leaves_the_model_adapted():
    model = shake_all = Model()
    lrk.adapt(model, rank=2, target_modules=["query"])
    lrk.adapt(model, rank=2, target_modules=["query"], adapter="second")
    shake(shake_all)
    shake(model, "second", 6)
    lrk.set_adapter(model, ["default", "second"])
    model.blocks[0].query.merge("second")
    with torch.no_grad():
        model.blocks[2].query.left["default"][0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"merge_and_unload: blocks.2.query: .*NaN or infinity"):
        lrk.merge_and_unload(model)
    assert_same(model, before)
    assert [layer.merged_adapters for layer in lrk.adapter_layers(model).values()] == [("second",), (), ()]


# ---------------------------------------------------------------------- several adapters


@torch.no_grad()
def test_adapters_take_turns():
    model = Model().requires_grad_(False)  # as it will be: libraries choose kernels by that
    base = model(IDS)
    lrk.adapt(model, rank=2, target_modules=["query"])
    first = shake(model)(IDS)
    report = lrk.adapt(model, rank=4, target_modules=["query", "value"], adapter="second")
    assert len(report.adapted) == 6
    assert {layer.active_adapters for layer in lrk.adapter_layers(model).values()} == {("second",)}
    second = shake(model, "second", 6)(IDS)
    lrk.set_adapter(model, "default")
    assert same_output(model, first)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable} == {"default"}
    lrk.set_adapter(model, ["default", "second"])
    together = model(IDS)
    with lrk.disabled(model):
        assert same_output(model, base)
    assert same_output(model, together)
    assert not torch.allclose(together, first, atol=1e-3)
    lrk.set_adapter(model, "second")
    assert same_output(model, second)
    lrk.set_adapter(model, [])
    assert same_output(model, base)
    with pytest.raises(ValueError, match=r"set_adapter: no layer has an adapter 'third'; there are: 'default', 'second'"):
        lrk.set_adapter(model, ["default", "third"])


def test_deleting_an_adapter_takes_out_layers_left_without():
    model = Model()
    before = snapshot(model)
    lrk.adapt(model, rank=2, target_modules=["query"])
    lrk.adapt(model, rank=2, target_modules=["query", "value"], adapter="second")
    lrk.delete_adapter(model, "second")
    assert tuple(lrk.adapter_layers(model)) == QUERIES
    assert type(model.blocks[0].value) is nn.Linear
    assert not model.blocks[0].value.weight.requires_grad
    with pytest.raises(ValueError, match="delete_adapter: no layer has an adapter 'second'; there are: 'default'"):
        lrk.delete_adapter(model, "second")
    lrk.delete_adapter(model, "default")
    assert_same(model, before)


def test_merged_adapters_are_not_changed():
    model = Model()
    lrk.adapt(model, rank=2, target_modules=["query"])
    model.blocks[1].query.merge()
    state = copy.deepcopy(model.state_dict())
    for call in (
        lambda: lrk.set_adapter(model, "default"),
        lambda: lrk.delete_adapter(model, "default"),
        lambda: lrk.adapt(model, rank=2, adapter="second"),
    ):
        with pytest.raises(ValueError, match=r"merged in 1 layers, such as blocks.1.query; unmerge\(\) them first"):
            call()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert len(lrk.adapter_layers(model)) == 3


def test_disabled_ends_with_the_block_also_on_errors():
    model = Model().requires_grad_(False)
    base = model(IDS)
    lrk.adapt(model, rank=2)
    adapted = shake(model)(IDS)
    with suppress(KeyError), lrk.disabled(model):
        assert same_output(model, base)
        raise KeyError
    assert same_output(model, adapted)


# ---------------------------------------------------------------------- odd models


def test_shared_modules_stay_shared():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": shared, "c": nn.Linear(6, 6)})
    before = snapshot(model)
    report = lrk.adapt(model, rank=2)
    assert report.adapted == ("a.0", "c")
    assert isinstance(model["b"], AdapterLayer)
    assert model["a"][0] is model["b"]
    assert report.layers["a.0"].parameters == sum(p.numel() for p in model["b"].adapter_parameters("default").values())
    lrk.unadapt(model)
    assert_same(model, before)


def test_copies_and_pickles_can_be_unadapted():
    model = Model()
    model.embed.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    lrk.adapt(model, rank=2, modules_to_train=["head"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), model(IDS))
        lrk.unadapt(twin)
        assert [p.requires_grad for p in twin.parameters()] == flags
    assert len(lrk.adapter_layers(model)) == 6


def test_state_dicts_round_trip():
    model, other = Model(), Model()
    lrk.adapt(model, rank=2)
    lrk.adapt(other, rank=2, seed=1)
    other.load_state_dict(shake(model).state_dict())
    assert torch.equal(other(IDS), model(IDS))


def test_meta_models_are_adapted_on_meta_and_filled_later():
    with torch.device("meta"):
        model = Model()
    before = snapshot(model)
    report = lrk.adapt(model, rank=2, target_modules=["query"])
    assert report.adapted == QUERIES
    assert all(p.is_meta for p in model.parameters())
    refused(model, "nearest names", target_modules=["qeury"], adapter="second")
    whole = Model()
    lrk.adapt(whole, rank=2, target_modules=["query"])
    model.to_empty(device="cpu").load_state_dict(whole.state_dict())
    assert torch.equal(model(IDS), whole(IDS))
    lrk.unadapt(model)
    assert [entry[1] for entry in before[0]] == [id(module) for module in model.modules()]


@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_model_trains(method):
    model, target = Model(), torch.randint(3, (40,), generator=torch.Generator().manual_seed(0))
    frozen = copy.deepcopy(model.state_dict())
    lrk.adapt(model, rank=2, method=method, target_modules=["query", "value", "embed", "conv"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    lrk.unadapt(model)
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("part_first", [True, False], ids=["part-first", "whole-first"])
def test_flags_come_back_whichever_was_adapted_first(part_first):
    model = Model()
    model.blocks[1].norm.weight.requires_grad_(False)
    before = snapshot(model)
    order = [model.blocks, model] if part_first else [model, model.blocks]
    lrk.adapt(order[0], rank=2)
    lrk.adapt(order[1], rank=2, adapter="second")
    lrk.unadapt(model)
    assert_same(model, before)


def test_excluding_a_container_excludes_what_is_inside():
    report = lrk.adapt(Model(), rank=2, exclude_modules=["blocks.0", "head"])
    assert set(report.skipped) == {"blocks.0.query", "blocks.0.value", "head.1"}


def test_a_shared_module_is_found_under_any_of_its_names():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"first": shared, "second": shared})
    assert lrk.adapt(model, rank=2, target_modules=["second"]).adapted == ("first",)
    assert isinstance(model["first"], AdapterLayer)
    assert model["first"] is model["second"]


def test_encoder_layers_are_adapted_without_their_fast_path():
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
        x = torch.ones(1, 3, 8)
        with torch.no_grad():
            before = model(x)
            assert lrk.adapt(model, rank=2).adapted == ("0.linear1", "0.linear2")
            assert not torch.allclose(shake(model)(x), before, atol=1e-3)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_names_given_twice_and_adapted_layers_to_train_are_refused():
    model = Model()
    lrk.adapt(model, rank=2, target_modules=["query"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="set_adapter: names must differ, got default, default"):
        lrk.set_adapter(model, ["default", "default"])
    assert_same(model, before)
    refused(model, "modules_to_train holds adapted layers, such as blocks.0.query", adapter="b", modules_to_train=["query"])


# ---------------------------------------------------------------------- transformers


def tiny(kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers, of lowrank-kernels[all]")
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        return transformers.BertForSequenceClassification(config).eval()
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)).eval()
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config).eval()


def logits(model, kind):
    ids = torch.arange(12).reshape(2, 6)
    return model(input_ids=ids, **({"decoder_input_ids": ids} if kind == "t5" else {})).logits


@pytest.mark.parametrize(
    ("kind", "count", "options"),
    [("bert", 13, {"modules_to_train": ["classifier"]}), ("gpt2", 8, {}), ("t5", 32, {})],
    ids=["bert", "gpt2", "t5"],
)
def test_transformers(kind, count, options):
    model = tiny(kind)
    before, base = snapshot(model), logits(model, kind).detach()
    report = lrk.adapt(model, rank=4, **options)
    assert len(report.adapted) == count
    heads = {"bert": "classifier", "gpt2": "lm_head", "t5": "lm_head"}
    assert list(report.skipped) == [heads[kind]]
    assert torch.allclose(logits(model, kind), base, atol=1e-6)
    adapted = logits(shake(model), kind).detach()
    assert not torch.allclose(adapted, base, atol=1e-3)
    lrk.merge_and_unload(model)
    assert torch.allclose(logits(model, kind), adapted, atol=1e-4)
    assert [entry[1] for entry in before[0]] == [id(module) for _, module in model.named_modules(remove_duplicate=False)]


def test_layers_inside_peft_adapters_are_not_adapted_again():
    peft = pytest.importorskip("peft", reason="needs PEFT, of lowrank-kernels[all]")
    model = peft.get_peft_model(tiny("bert"), peft.LoraConfig(r=2, target_modules=["query"]))
    report = lrk.adapt(model, rank=2)
    assert {name for name in report.adapted if "query" in name} == set()
    assert {reason for name, reason in report.skipped.items() if "query" in name} == {"it is adapted by PEFT"}
    assert len(report.adapted) == 12  # key, value and four dense in two blocks, pooler, classifier

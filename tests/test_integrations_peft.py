"""Deep LoRA in PEFT beyond PEFT's own questions: registration, options, refusals, precision, compression, the LoRA twin."""

import copy
import enum
import importlib
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
peft = pytest.importorskip("peft", reason="needs PEFT, of lowrank-kernels[all]")
transformers = pytest.importorskip("transformers", reason="needs transformers, of lowrank-kernels[all]")

from safetensors.torch import load_file  # noqa: E402

import lowrank_kernels as lrk  # noqa: E402
from lowrank_kernels.integrations import peft as integration  # noqa: E402
from lowrank_kernels.integrations.peft import DeepLoraConfig, DeepLoraLayer, save_pretrained  # noqa: E402
from lowrank_kernels.nn import AdapterLayer, DeepLoRALinear  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
IDS = torch.arange(21).view(3, 7) % 10 + 1
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


def bert(dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)).to(dtype).eval()


def wrapped(base=None, seed=1, adapter="default", **options):
    base = bert() if base is None else base
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": ["query", "value", "dense"], "init_weights": False, **options}
    return peft.get_peft_model(base, DeepLoraConfig(**options), adapter).eval()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, DeepLoraLayer)}


def bits(a, b):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().view(integers), b.detach().view(integers))


# ---------------------------------------------------------------------- registration


def test_the_method_is_registered_once():
    member = peft.PeftType.DEEPLORA
    assert member is peft.PeftType("DEEPLORA") is peft.PeftType["DEEPLORA"]
    assert isinstance(member, enum.Enum)
    assert (member, member.name, member.value, repr(member)) == ("DEEPLORA",) * 3 + ("<PeftType.DEEPLORA: 'DEEPLORA'>",)
    assert member in list(peft.PeftType)
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    count = len(peft.PeftType)
    integration._register()
    importlib.import_module("lowrank_kernels.integrations.peft")
    assert len(peft.PeftType) == count
    assert peft.get_peft_config({"peft_type": "DEEPLORA", "r": 3}) == DeepLoraConfig(r=3)


def test_a_method_of_that_name_by_another_is_not_replaced(monkeypatch):
    tuners = integration.PEFT_TYPE_TO_TUNER_MAPPING
    monkeypatch.setitem(tuners, peft.PeftType.DEEPLORA, tuners[peft.PeftType.LORA])
    with pytest.raises(ImportError, match="has a method DEEPLORA already"):
        integration._register()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"r": 2.0}, "r must be an integer"),
        ({"depth": True}, "depth must be an integer of at least 1, got True"),
        ({"rank_pattern": {"query": -1}}, r"rank_pattern\['query'\] must be"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"init_scale": float("inf")}, "init_scale must be finite"),
        ({"deeplora_dropout": 1.0}, "deeplora_dropout must be from 0 to below 1, got 1.0"),
        ({"bias": "lora_only"}, "bias must be 'none', 'all' or 'deeplora_only', got 'lora_only'"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        (
            {"target_modules": "all-linear", "layers_to_transform": [0]},
            "layers_to_transform .*a list of names, got 'all-linear'",
        ),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"DeepLoraConfig: {message}"):
        DeepLoraConfig(**options)


def test_the_config_goes_to_a_file_and_back(tmp_path):
    config = DeepLoraConfig(r=3, target_modules=["a", "b"], depth=2, scale=2.0, rank_pattern={"a": 2}, task_type="SEQ_CLS")
    config.save_pretrained(str(tmp_path))
    assert peft.PeftConfig.from_pretrained(str(tmp_path)) == config
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["requires_import"]) == ("DEEPLORA", "lowrank_kernels.integrations.peft")


# ---------------------------------------------------------------------- the layers are the package's own


def test_layers_belong_to_both_sides():
    model = wrapped()
    layer = next(iter(layers(model).values()))
    assert isinstance(layer, AdapterLayer)
    assert isinstance(layer, DeepLoRALinear)
    assert isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    assert layer.left is layer.deeplora_left
    assert layer.adapter_parameters("default").keys() == {"left", "core", "right"}
    assert (layer.in_features, layer.out_features) == (16, 16)
    assert (layer.active_adapters, layer.active_adapter, layer.merged_adapters) == (["default"], ["default"], [])
    assert lrk.adapter_layers(model) == layers(model)


def test_the_start_is_that_of_deep_lora():
    model = wrapped(bert(torch.bfloat16), init_weights=True, depth=3, init_scale=1e-2)
    for layer in layers(model).values():
        left, core, right, scale, _ = layer.factors("default")
        eye = torch.eye(4)
        assert left.dtype == torch.float32
        for frame in (left.t() @ left, right @ right.t()):
            assert float((frame - eye).abs().max()) < 1e-6  # PEFT's cast to bfloat16 and back would leave 1e-2
        assert torch.equal(core, 1e-2 * eye.expand(3, 4, 4))
        assert scale == 1.0


def test_torchs_seed_governs_the_start():
    states = [wrapped(seed=seed, init_weights=True).state_dict() for seed in (1, 1, 2)]
    parts = [key for key in states[0] if "deeplora_left" in key]
    assert all(torch.equal(states[0][key], states[1][key]) for key in parts)
    assert not any(torch.equal(states[0][key], states[2][key]) for key in parts)


@pytest.mark.parametrize("low", [False, True], ids=["real", "meta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_bases_do_not_round_float32_factors(tmp_path, dtype, low):
    model = wrapped(bert(dtype))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(bert(dtype), tmp_path, low_cpu_mem_usage=low)
    native = bert(dtype)
    native.load_adapter(str(tmp_path))
    state = {key: value for key, value in model.state_dict().items() if "deeplora" in key}
    assert {value.dtype for value in state.values()} == {torch.float32}
    for key, value in state.items():
        assert bits(loaded.state_dict()[key], value)
        assert bits(native.state_dict()[key.removeprefix("base_model.model.")], value)
    model.add_adapter("b", DeepLoraConfig(r=2, target_modules=["query"]), autocast_adapter_dtype=False)
    layer = next(layer for layer in layers(model).values() if "b" in layer.adapters)
    assert layer.left["b"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
def test_unmerging_is_exact_through_peft(dtype):
    model, base = wrapped(bert(dtype)), bert(dtype)
    wanted = model(IDS).logits
    for _ in range(3):
        model.merge_adapter()
        state = model.state_dict()
        assert not torch.equal(model.base_model.model.bert.pooler.dense.base_layer.weight, base.bert.pooler.dense.weight)
        assert bits(state["base_model.model.bert.pooler.dense.base_layer.weight"], base.bert.pooler.dense.weight)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, base(IDS).logits)
        assert model.get_model_status().merged_adapters == ["default"]
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, wanted)
    assert all(bits(a, b) for a, b in zip(model.unload().state_dict().values(), base.state_dict().values(), strict=True))


def test_adding_to_a_merged_model_unmerges_it_as_peft_does(tmp_path):
    model = wrapped(target_modules=["query"])
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="add_adapter: unmerging default first"):
        model.load_adapter(tmp_path, "again")
    assert model.get_model_status().merged_adapters == []
    assert torch.equal(model(IDS).logits, wanted)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="nothing to do, default already merged"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="load_state_dict: unmerging"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(IDS).logits, wanted)
    with peft.helpers.disable_input_dtype_casting(model):
        assert torch.equal(model(IDS).logits, wanted)


def test_merging_while_disabled_is_refused():
    model = wrapped()
    with model.disable_adapter():
        with pytest.raises(ValueError, match="merge: the adapters are disabled"):
            model.merge_adapter()
        assert torch.equal(model(IDS).logits, bert()(IDS).logits)


def test_merge_understands_both_interfaces():
    layer = next(iter(layers(wrapped()).values()))
    assert layer.merge().adapters == ("default",)
    layer.unmerge()
    assert layer.merge("default").adapters == ("default",)
    layer.unmerge()
    assert layer.merge(True, ["default", "of another layer"]).adapters == ("default",)
    layer.unmerge()
    assert layer.merge(["of another layer"]).adapters == ()
    assert layer.merge(safe_merge=True, adapter_names=["default"]).adapters == ("default",)


def test_what_works_on_the_packages_models_works_here():
    model = wrapped(init_weights=True, task_type="SEQ_CLS", target_modules=["query", "value"]).train()
    batch, before = {"input_ids": IDS, "labels": torch.tensor([0, 1, 1])}, copy.deepcopy(model.state_dict())
    assert len(lrk.fit_head(model, [batch], steps=3)) == 3
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("classifier.modules_to_save" in name for name in changed)
    assert lrk.compress_(model, [batch]).layers
    groups = lrk.parameter_groups(model, lr=5e-2)
    assert {group["name"] for group in groups} == {"deeplora.outer.4", "deeplora.core.4", "other", "other.vectors"}
    assert {p for g in groups for p in g["params"]} == {p for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups)
    watch = lrk.watch_divergence(model, optimizer, every=5)
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS, labels=torch.tensor([0, 1, 1])).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert watch.ratios.keys() == layers(model).keys()
    assert {row.name for row in lrk.rank_report(model).layers} == layers(model).keys()
    assert lrk.export_lora(model.get_base_model()).keys() == {n.removeprefix("base_model.model.") for n in layers(model)}
    lrk.parameter_groups(model, gamma=0)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "deeplora_left" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_compression_on_a_batch_and_on_a_loader(dtype):
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1, 1])}
    loader = torch.utils.data.DataLoader(
        [{key: value[i] for key, value in batch.items()} for i in range(3)], batch_size=1, shuffle=False
    )
    plain = bert(dtype)
    lrk.adapt(plain, rank=4, target_modules=["query", "value"])
    stock = wrapped(bert(dtype), init_weights=True, task_type="SEQ_CLS", target_modules=["query", "value"])
    for model in (plain, stock):
        for batches in ([batch], loader):
            report = lrk.compress_(model, batches)
            assert len(report.layers) == len(lrk.adapter_layers(plain))
            for layer in lrk.adapter_layers(model).values():
                left = layer.factors("default").left
                assert float((left.t() @ left - torch.eye(4)).abs().max()) < 1e-5
    rows = [lrk.compress_(model, lambda model=model: model(**batch).loss).layers for model in (plain, stock)]
    for ours, theirs in zip(*rows, strict=True):
        assert f"base_model.model.{ours.name}" == theirs.name
        assert torch.allclose(torch.tensor(ours.singular_values), torch.tensor(theirs.singular_values), rtol=0.05)
    assert all(p.requires_grad == ("deeplora" in n or "modules_to_save" in n) for n, p in stock.named_parameters())
    lrk.compress_(wrapped(r=3), [batch])
    with pytest.raises(ValueError, match="rank must be even"):
        lrk.compress_(wrapped(r=3, mode="paper"), [batch])


def test_adapters_of_different_layers():
    model = wrapped(target_modules=["query"])
    torch.manual_seed(2)
    model.add_adapter("b", DeepLoraConfig(r=2, target_modules=["value"], init_weights=False))
    model.set_adapter("b")
    assert {tuple(layer.active_adapters) for layer in layers(model).values()} == {(), ("b",)}
    assert {tuple(layer.active_adapter) for layer in layers(model).values()} == {("b",)}
    assert {row.adapter for row in lrk.rank_report(model).layers} == {"b"}
    wanted = model(IDS).logits
    model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert torch.equal(model(IDS).logits, wanted)


# ---------------------------------------------------------------------- refusals


class OwnLinear(nn.Linear):
    pass


class Refused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.own, self.attention = nn.Linear(8, 8), OwnLinear(8, 8), nn.MultiheadAttention(8, 2)
        self.groups, self.norm, self.narrow = nn.Conv1d(8, 8, 3, groups=2), nn.LayerNorm(8), nn.Linear(8, 2)
        self.int8 = nn.Linear(8, 8)
        self.int8.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("own", "a subclass"),
        ("attention", "MultiheadAttention"),
        ("attention.out_proj", "a subclass"),
        ("groups", "groups=2"),
        ("norm", "LayerNorm"),
        ("int8", "torch.int8"),
        ("narrow", "rank must be an integer from 1 to 2"),
    ],
)
def test_unsupported_layers_are_refused_and_nothing_is_changed(target, reason):
    model = Refused()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"DEEPLORA cannot adapt '{target}': .*{reason}.*exclude_modules"):
        peft.get_peft_model(model, DeepLoraConfig(r=3, target_modules=["first", target]))
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_a_second_adapter_that_fails_leaves_the_first_as_it_was():
    model = wrapped(target_modules=["query"])
    wanted, keys = model(IDS).logits, model.state_dict().keys()
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 16"):
        model.add_adapter("wide", DeepLoraConfig(r=17, target_modules=["query", "value"]))
    assert model.state_dict().keys() == keys
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(IDS).logits, wanted)
    with pytest.raises(TypeError, match="target_parameters"):
        DeepLoraConfig(target_parameters=["weight"])


def test_alora_offsets_are_refused_rather_than_ignored():
    with pytest.raises(ValueError, match="alora_offsets belongs to aLoRA"):
        wrapped()(IDS, alora_offsets=[1, 2, 3])


# ---------------------------------------------------------------------- the twin, and a reader without this package


def trained(**options):
    model = wrapped(task_type="SEQ_CLS", **options)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(0.5)
    return model


READER = """
import json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch, transformers, peft
torch.manual_seed(0)
base = transformers.BertForSequenceClassification(transformers.BertConfig(**json.loads(sys.argv[2]))).eval()
try:
    peft.PeftModel.from_pretrained(base, sys.argv[1])
except KeyError as error:
    print(repr(error))
model = peft.PeftModel.from_pretrained(base, sys.argv[1] + "/lora")
assert not any(name.split(".")[0] == "lowrank_kernels" for name in sys.modules)
print(json.dumps(model(torch.arange(21).view(3, 7) % 10 + 1).logits.tolist()))
"""


def test_a_process_without_this_package_reads_the_twin_and_is_told_what_the_rest_needs(tmp_path):
    model = trained(rank_pattern={"value": 2}, scale=1.5, exclude_modules=["pooler.dense"])
    save_pretrained(model, tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", READER, str(tmp_path), json.dumps(BERT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, logits = done.stdout.splitlines()[-2:]
    assert error == "KeyError('DEEPLORA')"
    assert torch.allclose(torch.tensor(json.loads(logits)), model(IDS).logits, rtol=0, atol=1e-6)
    assert not torch.allclose(model(IDS).logits, bert()(IDS).logits, atol=1e-2)
    save_pretrained(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import lowrank_kernels.integrations.peft") == 1
    assert "KeyError: 'DEEPLORA'" in card


@pytest.mark.parametrize("shrink", [None, 1e-3])
def test_the_twin_in_the_same_process(tmp_path, shrink):
    model = trained()
    torch.manual_seed(3)
    model.add_adapter("b", DeepLoraConfig(r=3, target_modules=["query"], init_weights=False, task_type="SEQ_CLS"))
    save_pretrained(model, tmp_path, shrink=shrink)
    for adapter, folder in (("default", tmp_path), ("b", tmp_path / "b")):
        model.set_adapter(adapter)
        twin = peft.PeftModel.from_pretrained(bert(), folder / "lora")
        assert twin.peft_config["default"].peft_type == "LORA"
        assert torch.allclose(twin(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6 if shrink is None else 1e-2)
        assert peft.PeftModel.from_pretrained(bert(), folder).peft_type == "DEEPLORA"
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= keys
    save_pretrained(model, tmp_path / "plain", lora_twin=False)
    assert not (tmp_path / "plain" / "lora").exists()
    with pytest.raises(ValueError, match="got state_dict; use lora_twin=False"):
        save_pretrained(model, tmp_path / "other", state_dict=model.state_dict())
    assert not (tmp_path / "other").exists()


def test_the_twin_of_every_host(tmp_path):
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.emb, self.conv1, self.conv2 = nn.Embedding(11, 6), nn.Conv1d(6, 8, 3), nn.Conv2d(1, 4, 3, stride=2)
            self.proj = transformers.pytorch_utils.Conv1D(5, 4 * 3 * 2)

        def forward(self, ids):
            return self.proj(self.conv2(self.conv1(self.emb(ids).transpose(1, 2)).unsqueeze(1)).flatten(1))

    model = wrapped(Host(), target_modules=["emb", "conv1", "conv2", "proj"], bias="deeplora_only")
    with torch.no_grad():
        model.base_model.model.proj.base_layer.bias.add_(1.0)
    save_pretrained(model, tmp_path)
    twin = peft.PeftModel.from_pretrained(Host(), tmp_path / "lora")
    assert twin.peft_config["default"].bias == "lora_only"
    assert torch.allclose(twin(IDS), model(IDS), rtol=0, atol=1e-5)


def test_peft_converts_it_to_lora():
    model = wrapped()
    config, state = peft.convert_to_lora(model, rank=4)
    lora = peft.get_peft_model(bert(), config)
    peft.set_peft_model_state_dict(lora, state)
    assert torch.allclose(lora.eval()(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: lrk.adapt(model, 2, target_modules=["pooler.dense"], adapter="b"),
        lambda model: lrk.set_adapter(model, "default"),
        lambda model: lrk.delete_adapter(model, "default"),
        lrk.unadapt,
        lrk.merge_and_unload,
    ],
    ids=["adapt", "set_adapter", "delete_adapter", "unadapt", "merge_and_unload"],
)
def test_adapters_of_pefts_model_are_changed_by_its_own_methods(change):
    model = trained(target_modules=["query"])
    before, names = model(IDS).logits, [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"the adapters of 2 layers, such as base_model\S+query, are PEFT's; use the methods"):
        change(model)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(IDS).logits, before)
    with lrk.disabled(model):
        assert not torch.equal(model(IDS).logits, before)

"""What PEFT asks of a method, asked of Deep LoRA in PEFT and of PEFT's LoRA on the fused op."""

import copy
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
peft = pytest.importorskip("peft", reason="needs PEFT, of lowrank-kernels[all]")
transformers = pytest.importorskip("transformers", reason="needs transformers, of lowrank-kernels[all]")

from peft.tuners import lora  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from lowrank_kernels.integrations.peft import DeepLoraConfig, DeepLoraLayer, accelerate_peft  # noqa: E402
from lowrank_kernels.integrations.peft_fused import FusedLinear  # noqa: E402

KINDS = ["deeplora", "fused-lora"]
PARTS = {"deeplora": ("deeplora_left", "deeplora_core", "deeplora_right"), "fused-lora": ("lora_A.weight", "lora_B.weight")}
pytestmark = [
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers"),
]


class MLP(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.lin1, self.head = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x):
        return self.head(F.gelu(self.lin1(F.gelu(self.lin0(x)))))


class Mixture(nn.Module):
    """An embedding, both convolutions and a Conv1D."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.conv1, self.conv2 = nn.Embedding(11, 6), nn.Conv1d(6, 8, 3, padding=1), nn.Conv2d(1, 4, 3)
        self.proj = Conv1D(5, 4 * 6 * 5)
        self.double()

    def forward(self, ids):
        y = self.conv1(self.emb(ids).transpose(1, 2))
        return self.proj(F.gelu(self.conv2(y.unsqueeze(1))).flatten(1))


def bert(task=None, dtype=torch.float64):
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    cls = transformers.BertForSequenceClassification if task else transformers.BertModel
    return cls(config).to(dtype).eval()


def gpt2(dtype=torch.float64):
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=24)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


IDS = torch.arange(21).view(3, 7) % 10 + 1
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TARGETS = ["lin0", "lin1"]


def config(kind, targets=TARGETS, init=False, **options):
    """With an update that shows from the start, unless ``init``."""
    if kind == "deeplora":
        return DeepLoraConfig(target_modules=targets, init_weights=init, **{"r": 4, "depth": 2, **options})
    renamed = {"deeplora_dropout": "lora_dropout"}
    options = {renamed.get(key, key): value for key, value in options.items()}
    return peft.LoraConfig(target_modules=targets, init_lora_weights=init, **{"r": 4, "lora_alpha": 4, **options})


def finished(model, kind):
    if kind == "fused-lora":
        accelerate_peft(model)
    return model


def wrap(base, kind, targets=TARGETS, seed=1, **options):
    torch.manual_seed(seed)
    return finished(peft.get_peft_model(base, config(kind, targets, **options)), kind).eval()


def add(model, kind, name, targets=TARGETS, seed=2, **options):
    torch.manual_seed(seed)
    model.add_adapter(name, config(kind, targets, **options))
    return finished(model, kind)


def tuners(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def adapter_weights(model, name="default"):
    return {key: value for key, value in model.named_parameters() if name in key.split(".")}


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    with torch.no_grad():
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1.0)


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_suite_looks_at_the_right_layers(kind):
    layers = tuners(wrap(MLP(), kind)).values()
    assert len(layers) == 2
    assert all(isinstance(layer, lora.Linear) for layer in layers) == (kind == "fused-lora")
    assert {type(layer) for layer in layers} <= ({FusedLinear} if kind == "fused-lora" else set(DeepLoraLayer.__subclasses__()))


# ---------------------------------------------------------------------- save and load


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("low", [False, True], ids=["real", "meta"])
def test_saved_and_loaded_is_equal_bit_for_bit(tmp_path, kind, safe, low):
    model = wrap(bert("cls"), kind, ["query", "dense"], task_type="SEQ_CLS")
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path, safe_serialization=safe)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors" if safe else "adapter_model.bin"}
    assert {path.name for path in tmp_path.iterdir()} == files
    loaded = finished(peft.PeftModel.from_pretrained(bert("cls"), tmp_path, low_cpu_mem_usage=low), kind)
    assert torch.equal(loaded(IDS).logits, wanted)
    same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert any(p.requires_grad for p in peft.PeftModel.from_pretrained(bert("cls"), tmp_path, is_trainable=True).parameters())


def test_keys_of_files_and_state_dicts(tmp_path, kind):
    model = wrap(MLP(), kind, modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    kept = {"base_model.model.head.weight", "base_model.model.head.bias"}
    parts = {f"base_model.model.{layer}.{part}" for layer in TARGETS for part in PARTS[kind]}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == kept | parts
    state = peft.get_peft_model_state_dict(model)
    assert state.keys() == kept | parts
    named = {key.replace(".weight", ".default.weight") if kind == "fused-lora" else f"{key}.default" for key in parts}
    assert named <= model.state_dict().keys()
    other = wrap(MLP(), kind, modules_to_save=["head"], seed=9)
    result = peft.set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(other(X), model(X))


def test_a_second_adapter_is_saved_in_its_folder_and_loaded_by_name(tmp_path, kind):
    model = add(wrap(MLP(), kind), kind, "other", r=2, rank_pattern={"lin1": 3})
    model.set_adapter("other")
    wanted = model(X)
    model.save_pretrained(tmp_path)
    fresh = finished(peft.PeftModel.from_pretrained(MLP(), tmp_path), kind)
    fresh.load_adapter(tmp_path / "other", "again")
    finished(fresh, kind)
    assert fresh.active_adapters == ["default"]
    fresh.set_adapter("again")
    assert torch.equal(fresh(X), wanted)
    with pytest.raises(ValueError, match="already exists"):
        fresh.add_adapter("again", config(kind))


def test_low_cpu_mem_usage_puts_adapters_on_meta(kind):
    model = peft.get_peft_model(MLP(), config(kind), low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in adapter_weights(model).values())
    assert not any(p.is_meta for name, p in model.named_parameters() if name.endswith("base_layer.weight"))
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(wrap(MLP(), kind)), low_cpu_mem_usage=True)
    assert torch.equal(finished(model, kind).eval()(X), wrap(MLP(), kind)(X))


# ---------------------------------------------------------------------- merging


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe-merge"])
def test_merging_computes_the_same_and_can_be_undone(kind, safe):
    model = wrap(MLP(), kind)
    weights = {name: layer.base_layer.weight.clone() for name, layer in tuners(model).items()}
    wanted = model(X)
    model.merge_adapter(safe_merge=safe)
    assert all(not torch.equal(layer.base_layer.weight, weights[name]) for name, layer in tuners(model).items())
    assert model.get_model_status().merged_adapters == ["default"]
    close(model(X), wanted)
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []
    for name, layer in tuners(model).items():
        close(layer.base_layer.weight, weights[name], 0 if kind == "deeplora" else 1e-15)
    close(model(X), wanted)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe-merge"])
def test_merge_and_unload_leaves_a_plain_model(kind, safe):
    model = wrap(MLP(), kind, modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1.0)
    wanted = model(X)
    plain = model.merge_and_unload(safe_merge=safe)
    assert [type(module) for module in plain.children()] == [nn.Linear] * 3
    assert plain.state_dict().keys() == MLP().state_dict().keys()
    close(plain(X), wanted)


def test_unload_gives_the_base_back(kind):
    plain = wrap(MLP(), kind).unload()
    assert type(plain.lin0) is nn.Linear
    same(plain.state_dict(), MLP().state_dict())


def test_safe_merge_refuses_nan_and_changes_nothing(kind):
    model = wrap(MLP(), kind)
    with torch.no_grad():
        next(iter(adapter_weights(model).values())).view(-1)[0] = torch.nan
    before = model.base_model.model.lin0.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.lin0.base_layer.weight, before)
    assert model.get_model_status().merged_adapters in ([], "irregular")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)


def test_merging_of_chosen_adapters(kind):
    model = add(wrap(MLP(), kind), kind, "b", targets=["lin1"])
    model.set_adapter("b")
    wanted = model(X)
    model.set_adapter("default")
    model.merge_adapter(adapter_names=["b"])
    assert [layer.merged_adapters for layer in tuners(model).values()] == [[], ["b"]]
    model.unmerge_adapter()
    close(model.merge_and_unload(adapter_names=["b"])(X), wanted)


# ---------------------------------------------------------------------- several adapters


def test_active_adapters_add_up(kind):
    class Body(nn.Sequential):
        pass

    torch.manual_seed(0)
    base = Body(nn.Linear(6, 10)).double()
    plain = base(X)
    model = add(wrap(base, kind, ["0"]), kind, "b", ["0"])
    outputs = {}
    for names in (["default"], ["b"], ["default", "b"]):
        model.base_model.set_adapter(names)
        outputs[len(names), names[0]] = model(X)
        assert model.active_adapters == names
    assert not torch.allclose(outputs[1, "b"], outputs[1, "default"])
    close(outputs[2, "default"] - plain, outputs[1, "default"] + outputs[1, "b"] - 2 * plain)
    model.merge_adapter()
    close(model(X), outputs[2, "default"])
    model.unmerge_adapter()
    close(model(X), outputs[2, "default"])


def test_setting_an_adapter_unmerges_with_a_warning(kind):
    model = add(wrap(MLP(), kind), kind, "b")
    model.set_adapter("b")
    wanted = model(X)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="[Uu]nmerging"):
        model.set_adapter("b")
    close(model(X), wanted)


def test_deleting(kind):
    model = add(wrap(MLP(), kind), kind, "b", ["lin1"])
    first = model(X)
    model.delete_adapter("b")
    assert model.active_adapters == ["default"]
    assert torch.equal(model(X), first)
    assert not adapter_weights(model, "b")
    model = add(model, kind, "b", ["lin1"])
    model.set_adapter("b")
    wanted = model(X)
    model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert torch.equal(model(X), wanted)
    assert all(parameter.requires_grad for parameter in adapter_weights(model, "b").values())
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("b")


def test_deleting_the_active_adapter_activates_another(kind):
    model = add(wrap(MLP(), kind), kind, "b", seed=5)
    model.set_adapter("b")
    wanted = model(X)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert torch.equal(model(X), wanted)
    model.delete_adapter("b")
    assert model.active_adapters == []


def test_disabled_is_the_base_model(kind):
    model, base = wrap(MLP(), kind, modules_to_save=["head"]), MLP()
    wanted, plain = model(X), base(X)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(X), plain)
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert model.get_model_status().enabled is False
        close(model(X), wanted)
        assert all(parameter.requires_grad for parameter in adapter_weights(model).values())


# ---------------------------------------------------------------------- mixed batches


NAMES = ["b", "__base__", "default", "b", "missing-here"]


def mixed(kind):
    model = add(add(wrap(MLP(), kind), kind, "b", ["lin1"]), kind, "missing-here", ["lin0"], seed=4)
    by_name = {}
    for name in ("default", "b", "missing-here"):
        model.set_adapter(name)
        by_name[name] = model(X)
    by_name["__base__"] = MLP()(X)
    model.set_adapter("default")
    return model.eval(), by_name


def test_mixed_batches_give_every_row_its_adapter(kind):
    model, by_name = mixed(kind)
    got = model(X, adapter_names=NAMES)
    close(got, torch.stack([by_name[name][row] for row, name in enumerate(NAMES)]))
    close(model(X, adapter_names=["b"] * 5), by_name["b"])
    close(model(X), by_name["default"])
    with model.disable_adapter():
        close(model(X), by_name["__base__"])


def test_mixed_batches_are_refused_rather_than_ignored(kind):
    model, _ = mixed(kind)
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        model(X, adapter_names=["nobody"] * 5)
    with pytest.raises(ValueError, match="adapter_names"):
        model(X, adapter_names=["b"] * 4)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(X, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(X, adapter_names=NAMES)
    model.unmerge_adapter()
    if kind == "deeplora":  # PEFT's own leave their hooks behind after an error
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_mixed_batches_with_modules_to_save_embeddings_and_convolutions(kind):
    targets = ["emb", "conv1", "conv2", "proj"]
    model = add(wrap(Mixture(), kind, targets, r=2), kind, "b", targets, r=3)
    outputs = {"__base__": Mixture()(IDS)}
    for name in ("default", "b"):
        model.set_adapter(name)
        outputs[name] = model(IDS)
    names = ["b", "__base__", "default"]
    if kind == "deeplora":
        close(model(IDS, adapter_names=names), torch.stack([outputs[name][row] for row, name in enumerate(names)]))
    model = wrap(MLP(), kind, modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].bias.add_(1.0)
    close(model(X, adapter_names=["__base__"] * 2 + ["default"] * 3), torch.cat([MLP()(X)[:2], model(X)[2:]]))


def test_generation_with_beams_and_mixed_adapters(kind):
    model = add(wrap(gpt2(), kind, ["c_attn"], task_type="CAUSAL_LM"), kind, "b", ["c_attn"], task_type="CAUSAL_LM")
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    ids, alone = IDS[:2], []
    for row, name in enumerate(["b", "default"]):
        model.set_adapter(name)
        alone.append(model.generate(input_ids=ids[row : row + 1], **options)[0])
    together = model.generate(input_ids=ids, adapter_names=["b", "default"], **options)
    for row in range(2):
        assert torch.equal(together[row][: len(alone[row])], alone[row])


# ---------------------------------------------------------------------- training


def step(model, steps=30, lr=2e-2):
    target = torch.randn(5, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(model(X), target)
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_training_lowers_the_loss_and_changes_the_adapters_alone(kind):
    model = wrap(MLP(), kind, modules_to_save=["head"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = step(model)
    assert losses[-1] < 0.5 * losses[0]
    for name, value in model.state_dict().items():
        trained = ".default" in name
        assert torch.equal(value, before[name]) != trained, name


def test_two_runs_give_the_same_weights(kind):
    states = []
    for _ in range(2):
        model = wrap(MLP(), kind, deeplora_dropout=0.2, init=True, seed=11).train()
        step(model, 5)
        states.append(model.state_dict())
    same(*states)
    assert not torch.equal(
        next(iter(adapter_weights(wrap(MLP(), kind, seed=12)).values())),
        next(iter(adapter_weights(wrap(MLP(), kind, seed=11)).values())),
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = wrap(bert("cls"), kind, "all-linear", task_type="SEQ_CLS").train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(input_ids=IDS, labels=torch.tensor([0, 1, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0]
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


def test_requires_grad_follows_the_active_adapter(kind):
    def trainable(model):
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    model = wrap(MLP(), kind)
    assert trainable(model) == set(adapter_weights(model))
    add(model, kind, "b")
    assert trainable(model) == set(adapter_weights(model))
    model.set_adapter("b")
    assert trainable(model) == set(adapter_weights(model, "b"))
    model.set_adapter("default", inference_mode=True)
    assert not trainable(model)
    model.set_requires_grad("b")
    assert trainable(model) == set(adapter_weights(model, "b"))
    model.base_model.set_adapter(["default", "b"])
    assert trainable(model) == {*adapter_weights(model), *adapter_weights(model, "b")}
    inference = wrap(MLP(), kind, inference_mode=True)
    assert not trainable(inference)


@pytest.mark.parametrize("bias", ["none", "all", "only"])
def test_biases(kind, bias, tmp_path):
    named = {"only": "deeplora_only" if kind == "deeplora" else "lora_only"}.get(bias, bias)
    model = wrap(MLP(), kind, bias=named)
    biases = {name for name, parameter in model.named_parameters() if parameter.requires_grad and name.endswith("bias")}
    assert len(biases) == {"none": 0, "all": 3, "only": 2}[bias]
    step(model.train(), 3)
    model.save_pretrained(tmp_path)
    loaded = finished(peft.PeftModel.from_pretrained(MLP(), tmp_path), kind)
    close(loaded(X), model(X), 1e-12)
    assert (bias != "none") == (not torch.equal(loaded.base_model.model.lin0.base_layer.bias, MLP().lin0.bias))


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("autocast", [True, False], ids=["cast", "keep"])
def test_dtypes_of_adapters_and_outputs(kind, dtype, autocast, tmp_path):
    torch.manual_seed(1)
    model = finished(peft.get_peft_model(MLP(dtype), config(kind), autocast_adapter_dtype=autocast), kind).eval()
    wanted = torch.float32 if autocast else dtype
    assert {parameter.dtype for parameter in adapter_weights(model).values()} == {wanted}
    assert all(parameter.requires_grad for parameter in adapter_weights(model).values())
    y = model(X.to(dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(parameter.grad.dtype == wanted for parameter in adapter_weights(model).values())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(MLP(dtype), tmp_path, autocast_adapter_dtype=autocast)
    assert torch.equal(finished(loaded, kind)(X.to(dtype)), y)
    merged = model.merge_and_unload()
    close(merged(X.to(dtype)).double(), y.double(), 40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_autocast(kind, dtype):
    model = wrap(MLP(dtype), kind).train()
    wanted = model.double()(X)
    model.to(dtype)
    for parameter in adapter_weights(model).values():
        parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapter_weights(model).values())
    close(y.double(), wanted, 0.1)


# ---------------------------------------------------------------------- where it goes


def test_all_linear_and_exclusions(kind):
    model = wrap(bert("cls"), kind, "all-linear", task_type="SEQ_CLS", exclude_modules=["pooler.dense"])
    names = {name.removeprefix("base_model.model.") for name in tuners(model)}
    linears = {name for name, module in bert("cls").named_modules() if type(module) is nn.Linear}
    assert names == linears - {"classifier", "bert.pooler.dense"}


def test_layers_ranks_and_expressions(kind):
    model = wrap(bert(), kind, ["query", "value"], layers_to_transform=[1], rank_pattern={"value": 2})
    ranks = {}
    for name, layer in tuners(model).items():
        part = layer.deeplora_right["default"] if kind == "deeplora" else layer.lora_A["default"].weight
        ranks[name.removeprefix("base_model.model.encoder.layer.")] = len(part)
    assert ranks == {"1.attention.self.query": 4, "1.attention.self.value": 2}
    assert len(tuners(wrap(bert(), kind, r".*layer\.0.*(key|query)"))) == 2
    with pytest.raises(ValueError, match="not found in the base model"):
        wrap(MLP(), kind, ["nowhere"])


def test_every_host_merges_to_what_it_computes(kind):
    model = wrap(Mixture(), kind, ["emb", "conv1", "conv2", "proj"], r=2)
    assert len(tuners(model)) == 4
    wanted = model(IDS)
    assert not torch.allclose(wanted, Mixture()(IDS))
    close(model.merge_and_unload(safe_merge=True)(IDS), wanted)


def test_conv1d_of_gpt2(kind, tmp_path):
    model = wrap(gpt2(), kind, ["c_attn", "c_proj"], task_type="CAUSAL_LM")
    wanted = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = finished(peft.PeftModel.from_pretrained(gpt2(), tmp_path), kind)
    assert torch.equal(loaded(input_ids=IDS).logits, wanted)
    close(model.merge_and_unload()(input_ids=IDS).logits, wanted)


def test_inject_and_the_functional_interface(kind):
    base = MLP()
    torch.manual_seed(1)
    model = finished(peft.inject_adapter_in_model(config(kind), base), kind).eval()
    assert type(model) is MLP
    assert torch.equal(model(X), wrap(MLP(), kind)(X))
    state = peft.get_peft_model_state_dict(model)
    assert len(state) == 2 * len(PARTS[kind])
    torch.manual_seed(8)
    other = finished(peft.inject_adapter_in_model(config(kind), MLP(), state_dict=state), kind).eval()
    peft.set_peft_model_state_dict(other, state)
    assert torch.equal(other(X), model(X))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_native_interface_of_transformers(kind, tmp_path):
    wrapped = wrap(bert(), kind, ["query", "dense"])
    wanted = wrapped(IDS).last_hidden_state
    wrapped.save_pretrained(tmp_path)
    model = bert()
    plain = model(IDS).last_hidden_state
    model.load_adapter(str(tmp_path))
    finished(model, kind)
    close(model(IDS).last_hidden_state, wanted)
    model.disable_adapters()
    assert torch.equal(model(IDS).last_hidden_state, plain)
    model.enable_adapters()
    torch.manual_seed(5)
    model.add_adapter(config(kind, ["query", "dense"]), "b")
    finished(model, kind)
    assert model.active_adapters() == ["b"]
    assert not torch.allclose(model(IDS).last_hidden_state, wanted)
    model.set_adapter("default")
    close(model(IDS).last_hidden_state, wanted)
    model.delete_adapter("b")
    close(model(IDS).last_hidden_state, wanted)
    model.save_pretrained(tmp_path / "native")
    again = bert()
    again.load_adapter(str(tmp_path / "native"))
    close(again(IDS).last_hidden_state, wanted)


# ---------------------------------------------------------------------- copies, prints, compilers


def test_copies_and_pickles(kind):
    model = add(wrap(MLP(), kind), kind, "b")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
        assert twin.peft_type is model.peft_type
        assert [type(layer) for layer in tuners(twin).values()] == [type(layer) for layer in tuners(model).values()]
        with torch.no_grad():
            for parameter in adapter_weights(twin).values():
                parameter.zero_()
        assert not torch.equal(twin(X), model(X))


def test_repr_and_status(kind):
    model = add(wrap(MLP(), kind), kind, "b")
    text = repr(model)
    assert {"deeplora": "deeplora.Linear(", "fused-lora": "lora.FusedLinear("}[kind] in text
    assert PARTS[kind][0].partition(".")[0] in text
    status = model.get_model_status()
    assert status.peft_types == dict.fromkeys(("default", "b"), kind.rpartition("-")[2].upper())
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["default"], ["b", "default"])
    assert status.requires_grad == {"default": True, "b": False}
    assert status.devices == {"default": ["cpu"], "b": ["cpu"]}


def test_compiled_without_a_graph_break(kind):
    model = wrap(MLP(torch.float32), kind).train()
    x = X.float()
    wanted = model(x)
    wanted.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in adapter_weights(model).items()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    close(y, wanted, 1e-5)
    y.square().sum().backward()
    for name, parameter in adapter_weights(model).items():
        close(parameter.grad, gradients[name], 1e-5)

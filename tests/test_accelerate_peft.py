"""PEFT's LoRA layers on the fused op: the same values and gradients, reversible, and every reason for not being fused."""

import copy
import os

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
peft = pytest.importorskip("peft", reason="needs PEFT, of lowrank-kernels[all]")
transformers = pytest.importorskip("transformers", reason="needs transformers, of lowrank-kernels[all]")

from peft.tuners import lora  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from lowrank_kernels.integrations import peft_fused  # noqa: E402
from lowrank_kernels.integrations.peft_fused import FusedLinear, accelerate_peft, decelerate_peft  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=["f64", "f32", "bf16", "f16"]
)


def net(transposed=False, bias=True):
    torch.manual_seed(0)
    first = Conv1D(9, 6) if transposed else nn.Linear(6, 9, bias=bias)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(9, 4))


def stock(base=None, dtype=torch.float64, targets=("0", "2"), names=("default",), keep=False, **options):
    """A model with PEFT's own layers and updates that show."""
    base = (net() if base is None else base).to(dtype)
    config = peft.LoraConfig(target_modules=list(targets), **{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **options})
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config, names[0], autocast_adapter_dtype=not keep)
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=not keep)
    return model


def example(dtype=torch.float64, rows=5):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def results(model, x, **options):
    """The output, and the gradients of the input and of all that is trained."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x, **options)
    y.double().square().sum().backward()
    return {"y": y, "x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def close(got, wanted, tolerance):
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype
        scale = max(float(wanted[name].detach().double().abs().max()), 1e-3)
        error = float((got[name].detach().double() - wanted[name].detach().double()).abs().max())
        assert error <= tolerance * scale, (name, error, scale)


@pytest.fixture
def calls(monkeypatch):
    """What the op was called with."""
    seen = []

    def recorded(x, weight, *args, **options):
        seen.append((weight is not None, options["dropout_p"]))
        return real(x, weight, *args, **options)

    real = peft_fused.three_factor_linear
    monkeypatch.setattr(peft_fused, "three_factor_linear", recorded)
    return seen


# ---------------------------------------------------------------------- values


@DTYPES
@pytest.mark.parametrize("host", ["linear", "no-bias", "Conv1D"])
@pytest.mark.parametrize("keep", [False, True], ids=["f32-adapter", "base-adapter"])
def test_values_and_gradients_are_those_of_peft(calls, dtype, host, keep):
    model = stock(net(host == "Conv1D", host != "no-bias"), dtype, keep=keep, fan_in_fan_out=host == "Conv1D")
    exact = copy.deepcopy(model).double()
    wanted, reference = results(model, example(dtype)), results(exact, example(dtype).double())
    report = accelerate_peft(model, strict=True)
    assert report.fused == ("base_model.model.0", "base_model.model.2")
    assert not calls
    got = results(model, example(dtype))
    assert len(calls) == 2
    if dtype == torch.float64:
        close(got, wanted, 1e-13)
        return
    for name, value in ((name, value.detach()) for name, value in reference.items()):
        theirs, ours = (float((r[name].detach().double() - value).norm() / value.norm()) for r in (wanted, got))
        assert got[name].dtype == wanted[name].dtype
        assert ours <= 2 * theirs + torch.finfo(dtype).eps, (name, ours, theirs)


def test_several_adapters_are_a_chain_of_fused_calls(calls):
    model = stock(names=("a", "b"))
    model.base_model.set_adapter(["b", "a"])
    wanted = results(model, example())
    assert len(accelerate_peft(model, strict=True).fused) == 2
    close(results(model, example()), wanted, 1e-13)
    assert calls == [(True, 0.0), (False, 0.0)] * 2


def test_dropout_is_the_same_in_evaluation_and_in_the_mean(calls):
    model = stock(targets=["2"], lora_dropout=0.4)
    x = example(rows=1).expand(20000, 6)
    accelerate_peft(model, strict=True)
    torch.manual_seed(0)
    mean, spread = model.train()(x).mean(0), model(x).std(0)
    assert calls[-1] == (True, 0.4)
    theirs = copy.deepcopy(model)
    decelerate_peft(theirs)
    torch.manual_seed(0)
    assert torch.allclose(mean, theirs(x).mean(0), atol=5 * float(spread.max()) / 20000**0.5)
    assert torch.allclose(spread, theirs(x).std(0), rtol=0.05)
    close(results(model.eval(), example()), results(theirs.eval(), example()), 1e-13)
    assert calls[-1] == (True, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_autocast(calls, dtype):
    model = stock(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = results(model, example(torch.float32))
        accelerate_peft(model, strict=True)
        close(results(model, example(torch.float32)), wanted, 0.05)
    assert len(calls) == 2


def test_layers_of_a_transformer(calls):
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=24)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config).double()
    model = stock(base, targets=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True).eval()
    ids = torch.arange(14).view(2, 7)
    wanted = model(input_ids=ids).logits
    report = accelerate_peft(model, strict=True)
    assert torch.allclose(model(input_ids=ids).logits, wanted, rtol=0, atol=1e-12)
    assert len(calls) == len(report.fused) == 8
    assert "2 base_model.model.transformer.h.*.attn.c_attn" in str(report)


# ---------------------------------------------------------------------- there and back


def test_switching_there_and_back_leaves_no_trace():
    model = stock(names=("a", "b"))
    attributes = {name: set(vars(layer)) for name, layer in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    wanted, text = results(model, example()), repr(model)
    for _ in range(2):
        assert accelerate_peft(model) == accelerate_peft(model)
        assert {type(model.get_submodule(f"base_model.model.{i}")) for i in (0, 2)} == {FusedLinear}
        assert issubclass(FusedLinear, lora.Linear)
        assert state.keys() == model.state_dict().keys()
        model(example()).sum().backward()
        assert decelerate_peft(model) == ("base_model.model.0", "base_model.model.2")
        assert decelerate_peft(model) == ()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert {name: set(vars(layer)) for name, layer in model.named_modules()} == attributes
    assert repr(model) == text
    again = results(model, example())
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_files_are_those_of_peft(tmp_path):
    model = stock()
    model.save_pretrained(tmp_path / "before")
    accelerate_peft(model)
    model.save_pretrained(tmp_path / "after")
    files = [(tmp_path / when / "adapter_model.safetensors").read_bytes() for when in ("before", "after")]
    assert files[0] == files[1]


def test_adapters_added_later_run(calls):
    model = stock(targets=["0"])
    accelerate_peft(model, strict=True)
    torch.manual_seed(3)
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    model.set_adapter("late")
    got = results(model, example())
    assert len(calls) == 1
    assert accelerate_peft(model, strict=True).fused == ("base_model.model.0", "base_model.model.2")
    close(results(model, example()), got, 1e-13)
    assert len(calls) == 3
    decelerate_peft(model)
    close(results(model, example()), got, 1e-13)


# ---------------------------------------------------------------------- what PEFT runs itself


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def subclassed():
    base = net()
    base[0].__class__ = OwnLinear
    return base


def hooked(model):
    model.base_model.model[0].base_layer.register_forward_hook(lambda *_: None)


def hooked_factor(model):
    model.base_model.model[0].lora_A["default"].register_forward_hook(lambda *_: None)


def other_dropout(model):
    model.base_model.model[0].lora_dropout["default"] = nn.AlphaDropout(0.1)


def tensor_scaling(model):
    model.base_model.model[0].scaling["default"] = torch.tensor(2.0)


def own_forward(model):
    layer = model.base_model.model[0]
    layer.forward = layer.forward


def two_dtypes(model):
    model.base_model.model[0].lora_A["default"].bfloat16()


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.base_model.model[0].base_layer)


REASONS = {
    "hook on the base": (None, {}, hooked, "hooks or another forward"),
    "hook on a factor": (None, {}, hooked_factor, "factors with hooks"),
    "another dropout": (None, {}, other_dropout, "AlphaDropout"),
    "tensor scaling": (None, {}, tensor_scaling, "a tensor as its scaling"),
    "forward replaced": (None, {}, own_forward, "forward was replaced"),
    "DoRA": (None, {"use_dora": True}, None, "variant of LoRA"),
    "LoRA bias": (None, {"lora_bias": True}, None, "a bias of its own"),
    "merged": (None, {}, lambda model: model.merge_adapter(), "merged into its weight"),
    "disabled": (None, {}, lambda model: model.base_model.disable_adapter_layers(), "are disabled"),
    "subclass": (subclassed, {}, None, "a subclass"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_not_served_runs_by_peft_bit_for_bit(calls, case):
    make, options, change, reason = REASONS[case]
    model = stock(make() if make else None, targets=["0"], **options).eval()
    if change is not None:
        change(model)
    wanted = model.eval()(example())
    untouched = copy.deepcopy(model)
    with pytest.raises(ValueError, match=rf"strict=True, and 1 LoRA.*base_model\.model\.0: .*{reason}"):
        accelerate_peft(model, strict=True)
    assert type(model.base_model.model[0]) is lora.Linear
    report = accelerate_peft(model)
    assert report.fused == ()
    assert reason in report.fallback["base_model.model.0"]
    assert reason in str(report)
    assert torch.equal(model(example()), wanted)
    assert torch.equal(untouched(example()), wanted)
    assert not calls


def test_other_layers_are_named():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.conv, self.lin = nn.Embedding(5, 6), nn.Conv2d(1, 2, 3), nn.Linear(6, 6)

    report = accelerate_peft(stock(Host(), targets=["emb", "conv", "lin"]))
    assert report.fused == ("base_model.model.lin",)
    assert "PEFT's Embedding" in report.fallback["base_model.model.emb"]
    assert "PEFT's Conv2d" in report.fallback["base_model.model.conv"]
    with pytest.raises(ValueError, match="no LoRA layer of PEFT"):
        accelerate_peft(nn.Linear(3, 3))


def test_weights_that_are_not_plain_are_refused():
    model = stock(targets=["0"])
    model.base_model.model[0].base_layer.weight = nn.Parameter(torch.zeros(9, 6, dtype=torch.int8), requires_grad=False)
    assert "torch.int8" in accelerate_peft(model).fallback["base_model.model.0"]
    model = stock(dtype=torch.float32, targets=["0"])
    two_dtypes(model)
    assert "does not go with" in accelerate_peft(model).fallback["base_model.model.0"]


def test_changes_of_state_after_switching(calls):
    """What only a call can know: merged, disabled, mixed, another dtype, a parametrized base."""
    model = stock(names=("a", "b")).eval()
    theirs = copy.deepcopy(model)
    accelerate_peft(model, strict=True)

    def check(fused, x=None, **options):
        x = example() if x is None else x
        calls.clear()
        got, wanted = model(x, **options), theirs(x, **options)
        assert len(calls) == fused
        assert got.dtype == wanted.dtype
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12)

    check(2)
    for each in (model, theirs):
        each.merge_adapter()
    check(0)
    with model.disable_adapter(), theirs.disable_adapter():
        check(0)
    assert not model.get_model_status().merged_adapters  # as PEFT does
    check(2)
    check(0, adapter_names=["a", "b", "__base__", "a", "a"])
    for each in (model, theirs):
        each.set_adapter("b")
        each.base_model.model[0].set_scale("b", 3.0)
    check(2)
    for each in (model, theirs):
        each.delete_adapter("b")
    check(2)
    for each in (model, theirs):
        parametrized(each)
    check(1)


def test_an_input_of_another_dtype_gets_the_error_of_peft():
    model = stock(dtype=torch.float32, targets=["0"])
    accelerate_peft(model, strict=True)
    with pytest.raises(RuntimeError, match="dtype"):
        model(example(torch.float64))


def test_a_dora_adapter_beside_a_plain_one(calls):
    model = stock(targets=["0"], names=("plain",))
    model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False))
    assert accelerate_peft(model).fused == ("base_model.model.0",)
    model.set_adapter("dora")
    assert "variant" in accelerate_peft(model).fallback["base_model.model.0"]
    model(example())
    assert not calls
    model.set_adapter("plain")
    model(example())
    assert len(calls) == 1


@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids=["one", "two"])
def test_compiled_without_a_graph_break(names):
    model = stock(dtype=torch.float32, names=names)
    model.base_model.set_adapter(list(names))
    wanted = results(model, example(torch.float32))
    accelerate_peft(model, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = example(torch.float32).requires_grad_()
    model.zero_grad()
    y = compiled(x)
    y.double().square().sum().backward()
    got = {"y": y, "x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    close(got, wanted, 1e-4)


def test_training_ends_where_peft_ends():
    models = [stock(names=("a",)), stock(names=("a",))]
    accelerate_peft(models[1], strict=True)
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            model(example()).square().mean().backward()
            optimizer.step()
    for (name, wanted), got in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-9), name

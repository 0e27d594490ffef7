"""The adapter layers compute what their formula says: every host with every method, against plain torch, PEFT and autograd."""

import copy
import io
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_kernels import testing
from lowrank_kernels.nn import (
    DeepLoRAConv2d,
    DeepLoRAEmbedding,
    DeepLoRALinear,
    LoRAConv1d,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    RandLoRALinear,
    layer_class,
)

METHODS = ["deeplora", "lora", "randlora"]
HOSTS = ["linear-up", "linear-down", "linear-no-bias", "Conv1D", "embedding", "conv1d", "conv2d", "conv2d-reflect"]
OPTIONS = {"deeplora": {"depth": 3, "init_scale": 0.4, "scale": 1.5}, "lora": {"alpha": 6.0}, "randlora": {"alpha": 2.0}}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def host(name, dtype=torch.float64, seed=0):
    """``(base, x, plain)`` with ``plain(x, weight, bias)`` the base's function of any weight."""
    torch.manual_seed(seed)
    if name.startswith("linear"):
        out_features, in_features = (9, 14) if name == "linear-down" else (14, 9)
        base, x = nn.Linear(in_features, out_features, bias=name != "linear-no-bias"), torch.randn(2, 5, in_features)
        plain = F.linear
    elif name == "Conv1D":
        base = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers, of lowrank-kernels[all]").Conv1D(
            14, 9
        )
        nn.init.normal_(base.bias)
        x = torch.randn(2, 5, 9)

        def plain(x, weight, bias):
            return x @ weight if bias is None else x @ weight + bias
    elif name == "embedding":
        base, x = nn.Embedding(14, 9), torch.randint(0, 14, (2, 5))

        def plain(x, weight, bias):
            return F.embedding(x, weight)
    else:
        if name == "conv1d":
            base, x = nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2), torch.randn(2, 6, 13)
        elif name == "conv2d":
            base, x = nn.Conv2d(6, 8, (3, 1), padding="same"), torch.randn(2, 6, 7, 5)
        else:
            base, x = nn.Conv2d(6, 8, 3, stride=2, padding=1, padding_mode="reflect", bias=False), torch.randn(6, 7, 5)
        plain = base._conv_forward
    return base.to(dtype), x.to(dtype) if x.is_floating_point() else x, plain


def wrap(base, method="deeplora", rank=3, seed=1, **options):
    """A layer whose update is of the size of its base."""
    layer = layer_class(base, method).from_module(base, rank, **{**OPTIONS[method], **options})
    shake(layer, "default", seed)
    return layer


def shake(layer, name, seed):
    """Parameters as after some training."""
    with torch.no_grad():
        for parameter in layer.adapter_parameters(name).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64).to(parameter))


def values_and_gradients(layer, x, dy, function):
    """The result of ``function`` and its gradients in x and in the adapter's parameters."""
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    leaves = dict(parameters)
    if x.is_floating_point():
        x = leaves["x"] = x.detach().requires_grad_()
    y = function(x)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def same(got, wanted, rtol):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        error, size = float((got[name] - value).abs().max()), float(value.abs().max())
        assert error <= rtol * size, f"{name}: off by {error:.3g}, largest element {size:.3g}"


# ---------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_layer_is_the_base_with_the_delta_weight(name, method):
    """Also the gradients: those of autograd through get_delta_weight."""
    base, x, plain = host(name)
    layer = wrap(base, method)
    dy = torch.randn(base(x).shape, generator=generator(5), dtype=torch.float64)
    delta = layer.get_delta_weight("default")
    assert delta.shape == base.weight.shape
    assert delta.dtype == torch.float64
    assert float(delta.detach().norm()) > 0.02 * float(base.weight.norm()), "the update must be seen"
    wanted = values_and_gradients(
        layer, x, dy, lambda x: plain(x, base.weight + layer.get_delta_weight("default"), getattr(base, "bias", None))
    )
    assert len(wanted) == len(layer.adapter_parameters("default")) + 1 + x.is_floating_point()
    same(values_and_gradients(layer, x, dy, layer), wanted, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_layer_is_as_exact_as_plain_torch_in_each_dtype(name, method, dtype):
    if name == "conv2d-reflect" and dtype == torch.float16 and torch.__version__ < "2.6":
        pytest.skip("torch 2.4 does not pad by reflection in half precision on a CPU")
    base, x, plain = host(name, dtype)
    layer = wrap(base, method)
    assert {p.dtype for p in layer.adapter_parameters("default").values()} == {torch.float32}
    delta, bias = layer.get_delta_weight("default").detach(), getattr(base, "bias", None)
    assert delta.dtype == torch.float32
    wide = x.double() if x.is_floating_point() else x
    exact = plain(wide, base.weight.double() + delta.double(), None if bias is None else bias.double())
    in_dtype = plain(x, base.weight, bias) + plain(x, delta.to(dtype), None)
    got = layer(x)
    testing.check((name, method, dtype), {"y": got.detach()}, {"y": in_dtype.detach()}, {"y": exact.detach()})


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("kind", ["lora", "deeplora"])
def test_linear_is_one_call_of_the_op(kind, transposed, monkeypatch):
    """Base product and update together: no second pass over an output; further adapters add theirs without the base."""
    from lowrank_kernels.nn import hosts

    calls = []

    def seen(x, weight, *rest, **keywords):
        calls.append((None if weight is None else tuple(weight.shape), keywords["bias"] is not None))
        return real(x, weight, *rest, **keywords)

    real = hosts.three_factor_linear
    monkeypatch.setattr(hosts, "three_factor_linear", seen)
    base, x, _ = host("Conv1D" if transposed else "linear-up")
    layer = wrap(base, kind)
    layer.add_adapter("second", 2)
    layer(x)
    assert calls == [((14, 9), True)]
    layer.set_adapter(["second", "default"])
    layer(x)
    assert calls[1:] == [((14, 9), True), (None, False)]


@pytest.mark.parametrize("mode", ["aligned", "paper"])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("name", ["linear-up", "embedding", "conv2d"])
def test_every_depth(name, depth, mode):
    base, x, plain = host(name)
    layer = wrap(base, depth=depth, mode=mode)
    left, core, right, scale, shift = layer.factors("default")
    assert shift == (0.0 if mode == "paper" else 0.4**depth)
    product = torch.eye(3, dtype=torch.float64)
    for inner in core:
        product = inner @ product
    product = product - shift * torch.eye(3, dtype=torch.float64)
    delta = layer.get_delta_weight("default")
    matrix = delta.t() if name == "embedding" else delta.reshape(layer.matrix_shape)
    assert torch.allclose(matrix, scale * left @ product @ right, rtol=1e-12, atol=1e-14)
    assert torch.allclose(layer(x), plain(x, base.weight + delta, getattr(base, "bias", None)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 10), (10, 12), (8, 8)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 4, 8])
def test_randlora_is_its_formula(shape, rank):
    """alpha / (k sqrt n) sum_i B_i diag(lambda_i) A diag(gamma_i), transposed where the input is the larger side."""
    layer = RandLoRALinear(nn.Linear(shape[1], shape[0]).double(), rank, alpha=5.0)
    shake(layer, "default", 3)
    lambdas, gammas = layer.lambdas["default"], layer.gammas["default"]
    n = math.ceil(min(shape) / rank)
    assert lambdas.shape == (rank, n)
    assert gammas.shape == (n, min(shape))
    outer, a = layer._bases["default"]
    b = (outer if shape[0] >= shape[1] else outer.t()).unflatten(1, (n, rank))
    total = sum(b[:, i] @ torch.diag(lambdas[:, i]) @ a @ torch.diag(gammas[i]) for i in range(n))
    total = 5.0 / (rank * math.sqrt(n)) * (total if shape[0] >= shape[1] else total.t())
    assert torch.allclose(layer.get_delta_weight("default"), total, rtol=1e-12, atol=1e-14)
    assert int(torch.linalg.matrix_rank(total)) == min(shape), "the update has full rank"


# ---------------------------------------------------------------------- PEFT


PEFT_HOSTS = ["linear-up", "linear-down", "Conv1D", "conv1d", "conv2d", "embedding"]


@pytest.mark.parametrize("name", PEFT_HOSTS)
def test_lora_is_the_lora_of_peft(name):
    """Output and gradients on the same weights."""
    peft = pytest.importorskip("peft", reason="needs PEFT, of lowrank-kernels[all]")
    base, x, _ = host(name)
    if name == "conv1d":
        base.dilation = (1,)  # PEFT 0.21 leaves the dilation out of its update
    dy = torch.randn(base(x).shape, generator=generator(5), dtype=torch.float64)
    layer = wrap(copy.deepcopy(base), "lora", 3)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], fan_in_fan_out=name == "Conv1D")
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(base)).double()
    adapted, (left, _, right, scale, _) = theirs[0], layer.factors("default")
    assert adapted.scaling["default"] == scale
    if name == "embedding":
        a, b = adapted.lora_embedding_A["default"], adapted.lora_embedding_B["default"]
    else:
        a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(right.reshape(a.shape))
        b.copy_(left.reshape(b.shape))
    assert torch.allclose(layer(x), theirs(x), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(layer(x), [left, right], dy)
    for got, wanted in zip(ours, torch.autograd.grad(theirs(x), [b, a], dy), strict=True):
        assert torch.allclose(got, wanted.reshape(got.shape), rtol=1e-10, atol=1e-12)
    assert torch.allclose(layer.get_delta_weight("default"), adapted.get_delta_weight("default"), rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------- starts


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (7, 7)], ids=str)
@pytest.mark.parametrize("depth", [1, 3])
def test_deep_start_is_init_scale_to_the_depth(shape, depth):
    base = nn.Linear(shape[1], shape[0]).double()
    layer = DeepLoRALinear(base, 5, depth, mode="paper", init_scale=0.1, scale=2.0, generator=generator())
    left, _, right, *_ = layer.factors("default")
    eye = torch.eye(5, dtype=torch.float64)
    assert torch.allclose(left.t() @ left, eye, atol=1e-12)
    assert torch.allclose(right @ right.t(), eye, atol=1e-12)
    delta = layer.get_delta_weight("default")
    assert torch.allclose(delta, 2 * 0.1**depth * left @ right, rtol=1e-12, atol=1e-15)
    assert float(torch.linalg.matrix_norm(delta.detach(), 2)) == pytest.approx(2 * 0.1**depth, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["linear-up", "linear-down", "Conv1D", "embedding", "conv2d"])
def test_deep_lora_starts_at_zero_with_a_gradient_that_is_not_small(name, depth, dtype):
    """Factors of the layer's own dtype: the product of cores is exact there too."""
    base, x, _ = host(name, dtype)
    before = base(x)
    layer = layer_class(base)(base, 3, depth, dtype=dtype)
    y = layer(x)
    assert torch.equal(y, before)
    assert not layer.get_delta_weight("default").any()
    y.float().square().sum().backward()
    assert not layer.left["default"].grad.any()
    assert not layer.right["default"].grad.any()
    steepest = layer.factors("default").left.detach().float().norm() * layer.right["default"].detach().float().norm()
    assert layer.core["default"].grad.float().norm() > 1e-2 * steepest


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
def test_default_scale_by_mode_and_depth(depth):
    layer = DeepLoRALinear(nn.Linear(6, 5), 2, depth)
    eps = layer.adapters["default"].init_scale
    assert eps == (1.0 if depth == 1 else pytest.approx((0.27 / depth) ** (1 / (depth - 1)), abs=1 / 128))
    assert DeepLoRALinear(nn.Linear(6, 5), 2, depth, mode="paper").adapters["default"].init_scale == 1e-3
    with pytest.raises(ValueError, match="mode must be 'aligned' or 'paper', got 'fast'"):
        DeepLoRALinear(nn.Linear(6, 5), 2, depth, mode="fast")


@pytest.mark.parametrize("method", ["lora", "randlora"])
@pytest.mark.parametrize("name", HOSTS)
def test_lora_and_randlora_start_at_zero(name, method):
    base, x, _ = host(name)
    before = base(x)
    layer = layer_class(base, method)(base, 3)
    assert torch.equal(layer(x), before)
    assert int(layer.get_delta_weight("default").count_nonzero()) == 0
    gradients = torch.autograd.grad(layer(x).square().sum(), list(layer.adapter_parameters("default").values()))
    assert any(int(gradient.count_nonzero()) for gradient in gradients), "it can leave zero"


def test_lora_starts_as_in_peft():
    layer = LoRALinear(nn.Linear(400, 300), 8, generator=generator())
    right = layer.right["default"].detach()
    assert float(right.abs().max()) <= 1 / math.sqrt(400)
    assert float(right.std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)
    embedding = LoRAEmbedding(nn.Embedding(400, 300), 8, generator=generator())
    assert int(embedding.right["default"].count_nonzero()) == 0
    assert float(embedding.left["default"].detach().std()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_adapter(method):
    def make(seed, dtype=torch.float32):
        base = nn.Linear(10, 12).to(dtype)
        layer = layer_class(base, method)(base, 4, generator=generator(seed))
        return [*layer.adapter_parameters("default").values(), layer.factors("default").left, layer.factors("default").right]

    first = make(0)
    torch.manual_seed(123)  # the global generator plays no part
    assert all(torch.equal(a, b) for a, b in zip(first, make(0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, make(0, torch.bfloat16), strict=True))
    if method != "randlora":
        assert not torch.equal(first[0], make(1)[0]) or not torch.equal(first[1], make(1)[1])


# ---------------------------------------------------------------------- dropout


@pytest.mark.parametrize("name", ["linear", "conv", "embedding"])
def test_dropout_acts_in_training_on_the_input_of_the_update_only(name):
    """With left = right = I the update is the dropped input itself."""
    eye = torch.eye(8, dtype=torch.float64)
    if name == "linear":
        layer, x = LoRALinear(nn.Linear(8, 8).double(), 8, dropout=0.5), torch.randn(400, 8, dtype=torch.float64)
    elif name == "conv":
        layer, x = LoRAConv1d(nn.Conv1d(8, 8, 1).double(), 8, dropout=0.5), torch.randn(4, 8, 100, dtype=torch.float64)
    else:
        layer, x = LoRAEmbedding(nn.Embedding(8, 8).double(), 8, dropout=0.5), torch.randint(0, 8, (400,))
    layer.set_factors("default", eye, None, eye)
    full = F.one_hot(x, 8).double() if name == "embedding" else x
    torch.manual_seed(0)
    ratio = (layer(x) - layer.base_layer(x)).detach()[full != 0] / full[full != 0]
    kept = ratio > 1
    assert torch.allclose(ratio[kept], torch.tensor(2.0, dtype=torch.float64), rtol=1e-9)
    assert float(ratio[~kept].abs().max()) < 1e-9
    assert float(kept.double().mean()) == pytest.approx(0.5, abs=0.1)
    layer.eval()
    assert torch.allclose(layer(x), layer.base_layer(x) + full, rtol=1e-12)


@pytest.mark.parametrize("name", HOSTS)
def test_dropout_repeats_with_the_seed(name):
    base, x, _ = host(name)
    layer = wrap(base, dropout=0.3)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(layer(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# ---------------------------------------------------------------------- compile, checkpoint, autocast, copies


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["linear-up", "linear-down", "Conv1D", "embedding", "conv1d", "conv2d"])
def test_compile_without_graph_breaks(name, method):
    base, x, _ = host(name)
    layer = wrap(base, method)
    dy = torch.randn(base(x).shape, generator=generator(5), dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = values_and_gradients(layer, x, dy, layer)
    same(values_and_gradients(layer, x, dy, compiled), wanted, 1e-12)
    layer.merge()  # what changes in the layer is seen, nothing stale is run
    assert torch.allclose(compiled(x), wanted["y"], rtol=1e-10, atol=1e-12)
    with layer.disabled():
        assert torch.equal(compiled(x), base(x))


def test_compile_several_adapters_with_dropout():
    layer = wrap(nn.Linear(9, 14), dropout=0.2)
    layer.add_adapter("second", 2, dropout=0.1)
    layer.set_adapter(["default", "second"])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(torch.randn(5, 9))
    y.sum().backward()
    assert all(p.grad is not None for name in layer.adapters for p in layer.adapter_parameters(name).values())
    layer.eval()
    x = torch.randn(5, 9)
    assert torch.allclose(compiled(x), layer(x), rtol=1e-6)


@pytest.mark.parametrize("name", ["linear-up", "embedding", "conv2d"])
def test_export(name):
    base, x, _ = host(name)
    layer = wrap(base).eval()
    program = torch.export.export(layer, (x,))
    assert torch.allclose(program.module()(x), layer(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["linear-up", "conv2d"])
def test_checkpoint_draws_the_same_dropout_again(name, reentrant):
    base, x, _ = host(name)
    layer = wrap(base, dropout=0.4)
    x.requires_grad_()
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(0)
        run(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.adapter_parameters("default").values())])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_autocast_gives_the_dtype_of_the_base(name, method):
    base, x, _ = host(name, torch.float32)
    layer = wrap(base, method)
    wanted = layer(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == base(x).dtype
        delta = layer.get_delta_weight("default")
    assert delta.dtype == torch.float32
    assert torch.equal(delta, layer.get_delta_weight("default")), "merging does not know autocast"
    assert torch.allclose(y.float(), wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
    y.float().sum().backward()
    for kind, parameter in layer.adapter_parameters("default").items():
        assert parameter.grad.dtype == torch.float32, kind
        assert bool(torch.isfinite(parameter.grad).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_copies_and_pickles_compute_the_same(name, method):
    base, x, _ = host(name)
    layer = wrap(base, method, dropout=0.1).eval()
    layer.add_adapter("second", 2)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    y = layer(x)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), y)
        assert twin.adapters == layer.adapters
        shake(twin, "default", 7)
        assert not torch.equal(twin(x), y)
        assert torch.equal(layer(x), y)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


def test_functional_call_takes_the_given_parameters():
    base, x, _ = host("linear-up")
    layer = wrap(base)
    left = torch.zeros_like(layer.left["default"])
    assert torch.equal(torch.func.functional_call(layer, {"left.default": left}, (x,)), base(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_cast_of_the_whole_layer(name, method):
    base, x, _ = host(name, torch.float32)
    layer = wrap(base, method)
    y = layer(x)
    layer.to(torch.float64)
    wide = x.double() if x.is_floating_point() else x
    assert layer(wide).dtype == torch.float64
    assert torch.allclose(layer(wide).float(), y, rtol=1e-4, atol=1e-5)
    layer.to(torch.bfloat16)
    narrow = x.bfloat16() if x.is_floating_point() else x
    assert layer(narrow).dtype == torch.bfloat16
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------- what surrounds the base layer


def test_hooks_of_the_base_layer_run():
    base, x, _ = host("linear-up")
    layer = wrap(base)
    wanted, seen = layer(x), []
    handle = base.register_forward_hook(lambda module, args, y: seen.append(y))
    assert torch.allclose(layer(x), wanted, rtol=1e-12)
    assert torch.equal(seen[0], base(x))
    handle.remove()
    seen.clear()
    assert torch.equal(layer(x), wanted)
    assert not seen


def test_a_replaced_forward_of_the_base_layer_runs():
    """As offloading libraries do it."""
    base, x, _ = host("linear-up")
    layer = wrap(base)
    wanted, plain = layer(x), base.forward
    base.forward = lambda x: plain(x) + 1
    assert torch.allclose(layer(x), wanted + 1, rtol=1e-12)


def test_a_base_layer_parametrized_later_is_used_as_it_is():
    base, x, _ = host("linear-up")
    layer = wrap(base)
    update = layer(x) - base(x)
    nn.utils.parametrizations.weight_norm(base)
    with torch.no_grad():
        base.parametrizations.weight.original0.mul_(2)
    assert torch.allclose(layer(x), base(x) + update, rtol=1e-10)


@pytest.mark.parametrize("shape", [(5, 9), (2, 5, 9), (9,)], ids=str)
def test_what_follows_may_work_in_place(shape):
    """As nn.ReLU(inplace=True) does."""
    layer = wrap(nn.Linear(9, 14).double())
    x = torch.randn(shape, generator=generator(), dtype=torch.float64)
    wanted = torch.autograd.grad(F.relu(layer(x)).square().sum(), list(layer.core.parameters()))
    got = torch.autograd.grad(F.relu(layer(x), inplace=True).square().sum(), list(layer.core.parameters()))
    assert torch.equal(got[0], wanted[0])


def test_embedding_keeps_the_padding_row_out_of_training():
    layer = DeepLoRAEmbedding(nn.Embedding(10, 6, padding_idx=3).double(), 2, mode="paper", init_scale=1.0)
    layer(torch.tensor([1, 3, 3, 5])).sum().backward()
    touched = layer.right["default"].grad.abs().sum(0).nonzero().flatten()
    assert touched.tolist() == [1, 5]


@pytest.mark.parametrize("method", METHODS)
def test_embedding_leaves_the_padding_row_as_it_is(method):
    base = nn.Embedding(10, 6, padding_idx=3).double()
    layer = wrap(base, method, rank=2)
    shake(layer, "default", 1)
    ids = torch.tensor([[1, 3], [3, 5]])
    assert torch.equal(layer(ids)[ids == 3], base(ids)[ids == 3])
    assert not torch.equal(layer(ids)[ids != 3], base(ids)[ids != 3])
    wanted = layer(ids).detach()
    assert layer.get_delta_weight("default")[3].abs().max() == 0
    assert layer.factors("default").right[:, 3].abs().max() == 0
    layer.merge()
    torch.testing.assert_close(layer(ids), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_layer_computes_the_same(method, grad):
    layer = wrap(nn.Linear(9, 14), method)
    shake(layer, "default", 1)
    x, other = torch.randn(2, 5, 9, generator=generator())
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        torch.testing.assert_close(traced(other), layer(other))


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_replica_of_data_parallel_computes_the_same(name, method, monkeypatch):
    base, x, _ = host(name)
    layer = wrap(base, method)
    shake(layer, "default", 1)

    def copies(tensors, devices, detach=False):
        return [[tensor.clone() for tensor in tensors] for _ in devices]  # what NCCL would do

    module = sys.modules["torch.nn.parallel.replicate"]  # the function of that name hides it
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    for replica in module.replicate(layer, [0, 1]):
        torch.testing.assert_close(replica(x), layer(x), rtol=0, atol=1e-12)


def test_embedding_with_sparse_gradients_has_dense_adapters():
    layer = LoRAEmbedding(nn.Embedding(10, 6, sparse=True), 2)
    layer(torch.tensor([[1, 2]])).sum().backward()
    assert not layer.right["default"].grad.is_sparse
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)], ids=str)
def test_any_leading_dimensions(shape):
    linear = wrap(nn.Linear(9, 14).double())
    x = torch.randn(*shape, 9, dtype=torch.float64)
    assert torch.allclose(linear(x), F.linear(x, linear.weight + linear.get_delta_weight("default"), linear.bias), rtol=1e-10)
    embedding = wrap(nn.Embedding(9, 14).double())
    ids = torch.randint(0, 9, shape)
    delta = embedding.get_delta_weight("default")
    assert torch.allclose(embedding(ids), F.embedding(ids, embedding.weight + delta), rtol=1e-10)


def test_channels_last_input():
    base, x, plain = host("conv2d")
    layer = DeepLoRAConv2d(base, 3, init_scale=0.5)
    wanted = plain(x, base.weight + layer.get_delta_weight("default"), base.bias)
    assert torch.allclose(layer(x.to(memory_format=torch.channels_last)), wanted, rtol=1e-10, atol=1e-12)


def test_one_by_one_convolution_is_the_linear_layer():
    base = nn.Conv2d(6, 8, 1).double()
    linear = nn.Linear(6, 8).double()
    linear.load_state_dict({"weight": base.weight.flatten(1), "bias": base.bias})
    conv, flat = LoRAConv2d(base, 2), LoRALinear(linear, 2)
    left, right = torch.randn(8, 2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    conv.set_factors("default", left, None, right)
    flat.set_factors("default", left, None, right)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    assert torch.allclose(conv(x), flat(x.movedim(1, -1)).movedim(-1, 1), rtol=1e-12, atol=1e-13)

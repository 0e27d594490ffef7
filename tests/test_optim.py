"""Parameter groups, SGD for outer factors and the divergence watch: rates by role, bits, resuming, rank 64."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_kernels.nn import (
    DeepLoRAConv2d,
    DeepLoRAEmbedding,
    DeepLoRALinear,
    LoRAEmbedding,
    LoRALinear,
    RandLoRALinear,
)
from lowrank_kernels.optim import AdamWithSGD, parameter_groups, watch_divergence


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixed_model():
    """Every method, two ranks of Deep LoRA, an inactive adapter, a frozen plain layer, a head with a bias and a norm."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "words": LoRAEmbedding(nn.Embedding(20, 12), 2),
            "deep_words": DeepLoRAEmbedding(nn.Embedding(20, 12), 8),
            "conv": DeepLoRAConv2d(nn.Conv2d(2, 3, 3), 2),
            "deep": DeepLoRALinear(nn.Linear(64, 64), 64),
            "lora": LoRALinear(nn.Linear(12, 12), 4),
            "rand": RandLoRALinear(nn.Linear(12, 12), 4),
            "frozen": nn.Linear(12, 12).requires_grad_(False),
            "norm": nn.LayerNorm(12),
            "head": nn.Linear(12, 3),
        }
    )
    model["deep"].add_adapter("other", 2)
    return model


def by_parameter(model, groups):
    """Parameter name -> its group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group for group in groups for p in group["params"]}


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize("ratio", [None, 16])
@pytest.mark.parametrize("outer", ["adam", "sgd"])
@pytest.mark.parametrize("gamma", [1e-2, 0])
def test_every_trainable_parameter_is_in_one_group(ratio, outer, gamma):
    model = mixed_model()
    groups = parameter_groups(model, gamma=gamma, loraplus_ratio=ratio, outer=outer)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}
    names = [group["name"] for group in groups]
    assert len(names) == len(set(names))
    assert all(group["params"] for group in groups)
    assert not any(".other" in name or "base_layer" in name or "frozen" in name for name in by_parameter(model, groups))


def test_rates_of_deep_lora():
    model = mixed_model()
    got = by_parameter(model, parameter_groups(model, 2e-2, gamma=0.1, weight_decay=0.3))
    wanted = {
        "deep.core.default": ("deeplora.core.64", 2e-2 / 8),
        "deep_words.core.default": ("deeplora.core.8", 2e-2),
        "conv.core.default": ("deeplora.core.2", 2e-2),  # never above lr
        "deep.left.default": ("deeplora.outer.64", 2e-3 / 8**0.5),
        "conv.right.default": ("deeplora.outer.2", 2e-3),
        "lora.left.default": ("lora.left", 2e-2),
        "words.right.default": ("lora.right", 2e-2),
        "rand.lambdas.default": ("randlora", 2e-2),
        "head.weight": ("other", 2e-3),
        "head.bias": ("other.vectors", 2e-3),
        "norm.weight": ("other.vectors", 2e-3),
    }
    for name, (group, rate) in wanted.items():
        assert got[name]["name"] == group
        assert got[name]["lr"] == pytest.approx(rate), name
        assert got[name]["weight_decay"] == (0.0 if group == "other.vectors" or "core" in group else 0.3)
        assert "eps" not in got[name]  # that of the optimizer
    flat = by_parameter(model, parameter_groups(model, 2e-2, reference_rank=None))
    assert flat["deep.core.default"]["lr"] == 2e-2
    wider = by_parameter(model, parameter_groups(model, 2e-2, reference_rank=16))
    assert wider["deep.core.default"]["lr"] == pytest.approx(5e-3)
    assert wider["deep.left.default"]["lr"] == pytest.approx(2e-2 * 0.3 / 2)
    assert wider["deep_words.core.default"]["lr"] == 2e-2


def test_modes_have_their_own_gamma_epsilon_and_betas():
    model = nn.ModuleDict({mode: DeepLoRALinear(nn.Linear(8, 8), 4, mode=mode) for mode in ("aligned", "paper")})
    groups = {group["name"]: group for group in parameter_groups(model)}
    rates = {name: (group["lr"], group.get("eps"), group.get("betas")) for name, group in groups.items()}
    assert rates == {
        "deeplora.core.4": (1e-2, None, (0.9, 0.98)),
        "deeplora.outer.4": (pytest.approx(3e-3), None, (0.9, 0.98)),
        "deeplora.core.4.paper": (1e-2, 1e-6, None),
        "deeplora.outer.4.paper": (pytest.approx(1e-4), 1e-6, None),
    }
    assert {group["name"] for group in parameter_groups(model["paper"])} == {"deeplora.core.4", "deeplora.outer.4"}
    decays = {group["name"]: group["weight_decay"] for group in parameter_groups(model, weight_decay=0.1)}
    assert decays.pop("deeplora.core.4") == 0  # its start is no place to decay from
    assert set(decays.values()) == {0.1}


def test_a_head_is_slower_than_the_cores_of_the_aligned_mode():
    for mode, share in (("aligned", 0.1), ("paper", 1.0)):
        model = nn.ModuleDict({"body": DeepLoRALinear(nn.Linear(8, 8), 4, mode=mode), "head": nn.Linear(8, 2)})
        for asked, rate in (({}, 2e-2 * share), ({"head_lr": 3e-4}, 3e-4)):
            rates = {group["name"]: group["lr"] for group in parameter_groups(model, 2e-2, **asked)}
            assert rates["other"] == rates["other.vectors"] == pytest.approx(rate)
            assert rates["deeplora.core.4"] == 2e-2
    with pytest.raises(ValueError, match="head_lr must be a positive finite number, got 0"):
        parameter_groups(model, head_lr=0)


def test_loraplus_rates_are_those_of_peft():
    peft = pytest.importorskip("peft", reason="needs PEFT, of lowrank-kernels[all]")
    from peft.optimizers import create_loraplus_optimizer

    def plain():
        return nn.ModuleDict(
            {"words": nn.Embedding(9, 6), "inner": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 2)}
        )

    theirs = peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["words", "inner"]), mixed=False)
    ours = plain().requires_grad_(False)
    ours["words"], ours["inner"] = LoRAEmbedding(ours["words"], 2), LoRALinear(ours["inner"], 2)
    for model in (theirs.base_model.model, ours):
        model["head"].requires_grad_(True)
        model["norm"].requires_grad_(True)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=5e-5, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=3e-6
    )
    roles = {"lora_embedding_A": "right", "lora_embedding_B": "left", "lora_A": "right", "lora_B": "left"}

    def role(name):
        parts = name.removeprefix("base_model.model.").replace(".weight", "", 1 if "lora_" in name else 0).split(".")
        return ".".join(roles.get(part, part) for part in parts)

    wanted = {role(name): (g["lr"], g["weight_decay"]) for name, g in by_parameter(theirs, optimizer.param_groups).items()}
    groups = parameter_groups(ours, 5e-5, loraplus_ratio=16, weight_decay=0.1, embedding_lr=3e-6)
    got = {name: (g["lr"], g["weight_decay"]) for name, g in by_parameter(ours, groups).items()}
    assert len(got) == 8
    assert got == wanted


def test_a_layer_used_twice_is_grouped_once():
    layer = DeepLoRALinear(nn.Linear(6, 6), 2)
    model = nn.Sequential(layer, layer, nn.Linear(6, 6))
    model[2].weight = layer.core["default"] = nn.Parameter(torch.ones(1, 2, 2))  # tied to a core: the adapter's rate
    groups = parameter_groups(model)
    assert [(g["name"], len(g["params"])) for g in groups] == [
        ("deeplora.outer.2", 2),
        ("deeplora.core.2", 1),
        ("other.vectors", 1),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr must be a positive finite number, got 0"),
        ({"lr": math.nan}, "lr must be"),
        ({"gamma": -1}, "gamma must be a finite number of at least 0, got -1"),
        ({"weight_decay": math.inf}, "weight_decay must be"),
        ({"embedding_lr": -1e-6}, "embedding_lr must be"),
        ({"loraplus_ratio": 0}, "loraplus_ratio must be a positive"),
        ({"reference_rank": 0}, "reference_rank must be a positive"),
        ({"outer": "lion"}, "outer must be 'adam' or 'sgd', got 'lion'"),
    ],
)
def test_bad_arguments_change_nothing(options, message):
    model = nn.Sequential(DeepLoRALinear(nn.Linear(6, 6), 2))
    with pytest.raises(ValueError, match=f"parameter_groups: {message}"):
        parameter_groups(model, **{"gamma": 0, **options})
    assert all(p.requires_grad for p in model[0].adapter_parameters("default").values())


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match=r"no adapter layer; call lowrank_kernels.adapt"):
        parameter_groups(nn.Linear(4, 4))
    layer = DeepLoRALinear(nn.Linear(6, 6), 2)
    layer.core["default"].requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires gradients"):
        parameter_groups(layer, gamma=0)
    assert layer.left["default"].requires_grad


# ---------------------------------------------------------------------- training


def regression(rank, width=72, true_rank=4, mode="paper"):
    """An adapted tanh network and data of the same network with its weights moved by a low-rank update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8))
    model.requires_grad_(False)
    teacher = copy.deepcopy(model)
    for index in (0, 2):
        left, right = (torch.linalg.qr(torch.randn(width, true_rank, generator=generator(index + i))).Q for i in (0, 1))
        teacher[index].weight += left @ right.t()
        model[index] = DeepLoRALinear(model[index], rank, mode=mode, generator=generator(index))
    x = torch.randn(192, width, generator=generator(5))
    y = teacher(x)
    return model, lambda: 100 * F.mse_loss(model(x), y)


def train(loss, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def dense_ratio(layer):
    return float(
        torch.linalg.matrix_norm(layer.get_delta_weight("default").detach(), 2) / torch.linalg.matrix_norm(layer.weight, 2)
    )


@pytest.mark.parametrize(
    ("mode", "rank", "lr"),
    [
        ("aligned", 2, 1e-2),
        ("aligned", 8, 1e-2),
        ("aligned", 64, 1e-2),
        ("paper", 8, 1e-1),
        ("paper", 64, 1e-1),
        ("paper", 64, 1e-2),
    ],
)
def test_training_does_not_diverge_with_the_default_groups(mode, rank, lr):
    model, loss = regression(rank, mode=mode)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr), weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = watch_divergence(model, optimizer)
        losses = train(loss, optimizer, 200)
    assert losses[-1] < 0.6 * losses[0], losses[::20]
    assert watch.ratios.keys() == {"0", "2"}
    for name, ratio in watch.ratios.items():
        assert 0.1 < ratio <= 5
        assert ratio == pytest.approx(dense_ratio(model[int(name)]), rel=1e-3)


def test_rank_64_at_the_rate_of_rank_8_diverges_and_is_reported():
    model, loss = regression(64)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-1, reference_rank=None), weight_decay=0.0)
    watch = watch_divergence(model, optimizer)
    with pytest.warns(UserWarning, match="watch_divergence") as caught:
        losses = train(loss, optimizer, 100)
    assert losses[-1] > losses[0]
    assert max(watch.ratios.values()) > 5
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2, "once a layer, not once a look"
    assert messages[0].startswith("watch_divergence: after 20 steps the update of 0 has s1(delta) = ")
    assert "of 2 has" in messages[1]
    assert all("above 5 s1(W): it outweighs" in m and "reference_rank" in m for m in messages)
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, AdamWithSGD])
def test_gamma_zero_leaves_the_outer_factors_bit_for_bit(optimizer_class):
    model, loss = regression(8)
    groups = parameter_groups(model, 0.1, gamma=0, weight_decay=0.1)
    assert [group["name"] for group in groups] == ["deeplora.core.8"]
    before = {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}
    optimizer = optimizer_class(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)  # would lift a rate of zero
    for _ in range(8):
        train(loss, optimizer, 1)
        schedule.step()
    moved = {name for name, p in model.named_parameters() if p.detach().numpy().tobytes() != before[name]}
    assert moved == {"0.core.default", "2.core.default"}
    assert model[0].left["default"].grad is None
    model[0].set_adapter("default")
    assert {g["name"] for g in parameter_groups(model[0])} == {"deeplora.outer.8", "deeplora.core.8"}


# ---------------------------------------------------------------------- AdamWithSGD


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True}], ids=str)
def test_adam_with_sgd_is_adamw_and_sgd_bit_for_bit(options):
    (model, loss), (other, other_loss) = regression(8), regression(8)
    optimizer = AdamWithSGD(parameter_groups(model, gamma=0.5, weight_decay=0.1, outer="sgd"), **options)
    outer, core = parameter_groups(other, gamma=0.5, weight_decay=0.1)
    del outer["eps"]
    pair = [torch.optim.AdamW([core], **options), torch.optim.SGD([outer], **options)]
    first = train(loss, optimizer, 5)
    for value in first:
        for each in pair:
            each.zero_grad()
        other_value = other_loss()
        other_value.backward()
        assert float(other_value.detach()) == value
        for each in pair:
            each.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert set(optimizer.state) == {p for name, p in model.named_parameters() if "core" in name}
    assert optimizer.param_groups[0]["name"] == "deeplora.outer.8"


def test_state_dict_resumes_bit_for_bit(tmp_path):
    model, loss = regression(8)
    optimizer = AdamWithSGD(parameter_groups(model, 0.05, gamma=1.0, outer="sgd"))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(5):
        train(loss, optimizer, 1)
        schedule.step()
    torch.save([part.state_dict() for part in (model, optimizer, schedule)], tmp_path / "state.pt")
    resumed, resumed_loss = regression(8)
    fresh = AdamWithSGD(parameter_groups(resumed))  # other rates, no SGD: the state says
    fresh_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(fresh, 20)
    for part, state in zip((resumed, fresh, fresh_schedule), torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    assert [g["method"] for g in fresh.param_groups] == ["sgd", "adam"]
    for _ in range(5):
        assert train(loss, optimizer, 1) == train(resumed_loss, fresh, 1)
        schedule.step()
        fresh_schedule.step()
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_closures_hooks_and_the_loss_scaler():
    (model, loss), (other, other_loss) = regression(8), regression(8)
    options = {"gamma": 1.0, "outer": "sgd"}
    torch.optim.AdamW(parameter_groups(other))  # its step carries torch's hooks from now on; ours must not run them twice
    optimizer, reference = (AdamWithSGD(parameter_groups(m, 0.05, **options), fused=True) for m in (model, other))
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    assert float(optimizer.step(closure).detach()) == train(other_loss, reference, 1)[0]
    assert len(steps) == 1
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    train(other_loss, reference, 1)
    for (name, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name  # powers of two scale without rounding
    before = copy.deepcopy(model.state_dict())
    scaler.scale(loss() * math.inf).backward()
    scaler.step(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "a skipped step"


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="AdamWithSGD: a group's method must be 'adam' or 'sgd', got 'lion'"):
        AdamWithSGD([{"params": [nn.Parameter(torch.ones(2))], "method": "lion"}])


# ---------------------------------------------------------------------- the watch


def test_the_watch_looks_every_so_often_and_changes_nothing():
    model, loss = regression(8)
    twin, twin_loss = regression(8)
    optimizer, twin_optimizer = (torch.optim.AdamW(parameter_groups(m)) for m in (model, twin))
    watch = watch_divergence(model, optimizer, every=3)
    state = torch.get_rng_state()
    train(loss, optimizer, 2)
    assert watch.ratios == {}
    train(loss, optimizer, 1)
    ratios = watch.ratios
    assert ratios.keys() == {"0", "2"}
    watch.remove()
    watch.remove()
    train(loss, optimizer, 3)
    assert watch.ratios is ratios
    assert torch.equal(torch.get_rng_state(), state)
    train(twin_loss, twin_optimizer, 6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_watch_reports_what_is_not_finite_and_skips_what_it_cannot_compare():
    model = nn.ModuleDict({name: DeepLoRALinear(nn.Linear(6, 6), 2, mode="paper") for name in ("bad", "zero", "idle", "fine")})
    model["rand"] = RandLoRALinear(nn.Linear(6, 6), 2)
    with torch.no_grad():
        model["bad"].core["default"][0, 0, 0] = math.nan
        model["zero"].weight.zero_()
    model["idle"].set_adapter([])
    optimizer = torch.optim.SGD(parameter_groups(model))
    watch = watch_divergence(model, optimizer, every=1, limit=1e-12)
    with pytest.warns(UserWarning, match="watch_divergence") as caught:
        optimizer.step()
    messages = [str(warning.message) for warning in caught]
    assert ["after 1 steps the update of bad has NaN or infinity: training diverged" in m for m in messages] == [True, False]
    assert "of fine has s1(delta)" in messages[1]
    assert {name: watch.ratios[name] for name in ("zero", "idle", "rand")} == {"zero": 0.0, "idle": 0.0, "rand": 0.0}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(3, 3), {}, "no adapter layer"),
        (DeepLoRALinear(nn.Linear(6, 6), 2), {"every": 0}, "every must be an integer of at least 1, got 0"),
        (DeepLoRALinear(nn.Linear(6, 6), 2), {"limit": math.nan}, "limit must be positive, got nan"),
    ],
    ids=["no-adapter", "every", "limit"],
)
def test_a_watch_that_cannot_be_is_refused(model, options, message):
    with pytest.raises(ValueError, match=f"watch_divergence: .*{message}"):
        watch_divergence(model, torch.optim.SGD(model.parameters(), 0.1), **options)

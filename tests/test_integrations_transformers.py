"""Adapted models in transformers' Trainer: optimizers, schedules, resuming bit for bit, accumulation, callbacks."""

import importlib
import json
import math
import sys
import warnings

import pytest
import torch

import lowrank_kernels as lrk
from lowrank_kernels.files import MissingExtra, OutputError

transformers = pytest.importorskip("transformers", reason="needs transformers, of lowrank-kernels[all]")
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments  # noqa: E402

from lowrank_kernels.integrations.transformers import (  # noqa: E402
    DivergenceCallback,
    RankReportCallback,
    trainer_optimizer,
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def bert(dtype=torch.float32, dropout=0.1):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config).to(dtype)


def adapted(method="deeplora", dtype=torch.float32, dropout=0.1, **options):
    model = bert(dtype, dropout)
    if method == "deeplora":
        options = {"init_scale": 0.1, **options}
    lrk.adapt(model, 4, method=method, modules_to_train=["classifier"], dropout=dropout, **options)
    return model


def examples(count=24):
    g = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 40, (count, 8), generator=g)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in rows]


def arguments(folder, **options):
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def trainer_of(model, args, optimizers=None, **groups):
    optimizers = optimizers or trainer_optimizer(model, args, **groups)
    return Trainer(model, args, train_dataset=examples(), optimizers=optimizers)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def factors(model):
    return {name: value for name, value in state(model).items() if name.endswith(".default")}


# ---------------------------------------------------------------------- optimizer and schedule


def test_trainer_works_as_it_is(tmp_path):
    model = adapted()
    before = state(model)
    optimizer = torch.optim.AdamW(lrk.parameter_groups(model))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, 6)
    trainer = trainer_of(model, arguments(tmp_path), (optimizer, schedule))
    trainer.train()
    after = state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trained
    assert {name.split(".")[-2] for name in trained} == {"left", "core", "right", "classifier"}
    assert len(losses(trainer)) == 6


def test_the_helper_takes_the_arguments_of_trainer(tmp_path):
    args = arguments(tmp_path, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7)
    optimizer, schedule = trainer_optimizer(adapted(mode="paper"), args, gamma=0.5)
    assert type(optimizer) is torch.optim.AdamW
    assert schedule is None
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {group["betas"] for group in groups.values()} == {(0.8, 0.95)}
    assert groups["deeplora.core.4"]["lr"] == 1e-2
    assert groups["deeplora.outer.4"]["lr"] == 5e-3
    assert {name: group["eps"] for name, group in groups.items()} == {
        "deeplora.core.4": 1e-6,
        "deeplora.outer.4": 1e-6,
        "other": 1e-7,
        "other.vectors": 1e-7,
    }
    assert groups["other"]["weight_decay"] == 0.1
    assert groups["other.vectors"]["weight_decay"] == 0
    optimizer, _ = trainer_optimizer(adapted(), args, lr=1e-3, weight_decay=0.0)
    assert optimizer.param_groups[0]["lr"] in (1e-3, 3e-4)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_loraplus_through_the_same_call(tmp_path):
    optimizer, _ = trainer_optimizer(adapted("lora"), arguments(tmp_path), loraplus_ratio=16)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"lora.left": 0.16, "lora.right": 0.01, "other": 0.01, "other.vectors": 0.16})


def test_the_schedule_of_the_arguments_scales_every_group(tmp_path):
    model, args = adapted(), arguments(tmp_path, lr_scheduler_type="linear", warmup_steps=2)
    optimizer, none = trainer_optimizer(model, args)
    start = {group["name"]: group["lr"] for group in optimizer.param_groups}
    trainer = trainer_of(model, args, (optimizer, none))
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **_):
            seen.append({group["name"]: group["lr"] / start[group["name"]] for group in optimizer.param_groups})

    trainer.add_callback(Watch())
    trainer.train()
    for rates, wanted in zip(seen, [0.5, 1.0, 0.75, 0.5, 0.25, 0.0], strict=True):
        assert rates == pytest.approx(dict.fromkeys(start, wanted))


@pytest.mark.parametrize(
    ("optim", "kind"),
    [("sgd", torch.optim.SGD), ("adafactor", transformers.Adafactor), ("adamw_torch_fused", torch.optim.AdamW)],
)
def test_other_optimizers_of_the_arguments(tmp_path, optim, kind):
    model = adapted()
    before, trainer = state(model), trainer_of(model, arguments(tmp_path, optim=optim))
    assert type(trainer.optimizer) is kind
    betas = {g.get("betas") for g in trainer.optimizer.param_groups if g["name"].startswith("deeplora")}
    assert betas == {(0.9, 0.98) if kind is torch.optim.AdamW else None}  # an optimizer without two betas gets none
    trainer.train()
    assert not same(before, state(model))


def test_gradient_descent_on_the_outer_factors(tmp_path):
    model = adapted()
    trainer = trainer_of(model, arguments(tmp_path), outer="sgd")
    trainer.train()
    assert type(trainer.optimizer.optimizer) is lrk.AdamWithSGD
    outer = [p for group in trainer.optimizer.param_groups if group["name"] == "deeplora.outer.4" for p in group["params"]]
    assert outer
    assert all(parameter not in trainer.optimizer.state for parameter in outer)


def test_what_the_helper_refuses(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="outer='sgd' goes with an AdamW of torch, got optim='adafactor'"):
        trainer_optimizer(adapted(), arguments(tmp_path, optim="adafactor"), outer="sgd")
    with pytest.raises(ValueError, match="no adapter layer"):
        trainer_optimizer(bert(), arguments(tmp_path))
    with pytest.raises(ValueError, match="gamma must be"):
        trainer_optimizer(adapted(), arguments(tmp_path), gamma=-1)
    chosen = staticmethod(lambda args, model: (torch.optim.AdamW, {"params": []}))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", chosen)
    with pytest.raises(ValueError, match="chooses its own parameters"):
        trainer_optimizer(adapted(), arguments(tmp_path))


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("method", ["deeplora", "lora", "randlora"])
def test_resuming_gives_the_same_bits(tmp_path, method):
    """With dropout in the model and in the adapters, Adam's state and a schedule."""
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    groups = {"outer": "sgd"} if method == "deeplora" else {}
    whole = trainer_of(adapted(method), arguments(tmp_path, **options), **groups)
    whole.train()
    other = adapted(method, seed=5)  # another start; RandLoRA's is always the same
    assert method == "randlora" or not same(factors(other), factors(adapted(method)))
    resumed = trainer_of(other, arguments(tmp_path, **options), **groups)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(state(resumed.model), state(whole.model))
    assert losses(resumed) == losses(whole)
    for group, other in zip(resumed.optimizer.param_groups, whole.optimizer.param_groups, strict=True):
        assert group["lr"] == other["lr"]


def test_a_checkpoint_holds_the_whole_adapted_model(tmp_path):
    from safetensors.torch import load_file

    trainer = trainer_of(adapted(), arguments(tmp_path, save_strategy="steps", save_steps=6))
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    other = adapted(seed=3)
    other.load_state_dict(saved, strict=False)
    assert same(state(other), state(trainer.model))
    assert "bert.encoder.layer.0.attention.self.query.core.default" in saved


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = adapted(dropout=0.0)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args = arguments(tmp_path, load_best_model_at_end=True, **options)
    trainer = Trainer(
        model, args, train_dataset=examples(), eval_dataset=examples(8), optimizers=trainer_optimizer(model, args, lr=0.3)
    )
    trainer.train()
    best = min(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


# ---------------------------------------------------------------------- ways of training


def trained(tmp_path, before=None, **options):
    model = adapted(dtype=torch.float64, dropout=0.0)
    if before:
        before(model)
    trainer = trainer_of(model, arguments(tmp_path, max_steps=3, **options))
    # Trainer takes the loss of every model with **kwargs for one that divides by the items of all accumulated batches
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return state(model)


def test_gradient_accumulation(tmp_path):
    wanted = trained(tmp_path, per_device_train_batch_size=8)
    found = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=str)
def test_gradient_checkpointing(tmp_path, reentrant):
    wanted = trained(tmp_path)
    options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    needs_grad = (lambda model: model.enable_input_require_grads()) if reentrant else None
    found = trained(tmp_path, needs_grad, gradient_checkpointing=True, **options)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=name)
    assert not same(found, state(adapted(dtype=torch.float64, dropout=0.0)))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16(tmp_path, base):
    """Autocast over a float32 model, and a bfloat16 base with float32 factors."""
    model = adapted(dtype=base, dropout=0.0)
    before = factors(model)
    args = arguments(tmp_path, bf16=True, max_steps=24, lr_scheduler_type="constant")
    trainer = trainer_of(model, args, lr=3e-2, gamma=0.3, head_lr=3e-2)
    start = trainer.evaluate(examples())["eval_loss"]
    trainer.train()
    after = factors(model)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert trainer.evaluate(examples())["eval_loss"] < 0.97 * start


# ---------------------------------------------------------------------- callbacks


def test_rank_reports(tmp_path):
    model, path = adapted(), tmp_path / "ranks.json"
    trainer = trainer_of(model, arguments(tmp_path, max_steps=5))
    callback = RankReportCallback(every=2, path=path, log=trainer.log, absolute=1e-3)
    trainer.add_callback(callback)
    trainer.train()
    assert list(callback.reports) == [2, 4, 5]
    assert str(callback.reports[5]) == str(lrk.rank_report(model, absolute=1e-3))
    written = json.loads(path.read_text())
    assert [row["step"] for row in written] == [2, 4, 5]
    assert [row["name"] for row in written[0]["layers"]] == list(lrk.adapter_layers(model))
    logged = {row["step"]: row for row in trainer.state.log_history if "update_rank_mean" in row}
    assert list(logged) == [2, 4, 5]
    ranks = [row.absolute_rank for row in callback.reports[4].layers]
    assert logged[4]["update_rank_mean"] == sum(ranks) / len(ranks)
    assert logged[4]["update_rank_max"] == max(ranks)
    assert logged[4]["updates_below_threshold"] == ranks.count(0) / len(ranks)
    assert logged[4]["update_ratio_max"] == max(row.ratio for row in callback.reports[4].layers)


def test_rank_reports_of_a_second_training_are_its_own(tmp_path):
    model, path = adapted(), tmp_path / "ranks.json"
    callback = RankReportCallback(every=100, path=path, overwrite=True)
    for _ in range(2):
        trainer = trainer_of(model, arguments(tmp_path, max_steps=3))
        trainer.add_callback(callback)
        trainer.train()
        assert list(callback.reports) == [3]
        assert str(callback.reports[3]) == str(lrk.rank_report(model))
        row = json.loads(path.read_text())[0]["layers"][0]
        assert row["norm"] == pytest.approx(callback.reports[3].layers[0].norm)


def test_rank_reports_go_on_in_a_resumed_training(tmp_path):
    path, options = tmp_path / "ranks.json", {"save_strategy": "steps", "save_steps": 3}
    trainer = trainer_of(adapted(), arguments(tmp_path, **options))
    trainer.add_callback(RankReportCallback(every=2, path=path))
    trainer.train()
    whole = json.loads(path.read_text())
    resumed = trainer_of(adapted(), arguments(tmp_path, **options))
    resumed.add_callback(RankReportCallback(every=2, path=path))
    with pytest.raises(OutputError, match="exists"):
        resumed.train()
    resumed = trainer_of(adapted(), arguments(tmp_path, **options))
    resumed.add_callback(RankReportCallback(every=2, path=path))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert json.loads(path.read_text()) == whole
    assert [row["step"] for row in whole] == [2, 4, 6]


def test_rank_reports_of_what_is_not_finite(tmp_path):
    model, path = adapted(), tmp_path / "ranks.json"
    layer = next(iter(lrk.adapter_layers(model).values()))
    trainer = trainer_of(model, arguments(tmp_path, max_steps=1))
    trainer.add_callback(RankReportCallback(path=path, log=trainer.log))
    with torch.no_grad():
        layer.left["default"].fill_(math.nan)
    trainer.train()
    first = json.loads(path.read_text(), parse_constant=pytest.fail)[0]["layers"][0]
    assert first["norm"] is None
    assert first["note"] == "not finite"
    assert math.isnan(next(row["update_ratio_max"] for row in trainer.state.log_history if "update_ratio_max" in row))


def test_a_rank_report_needs_a_sound_place_and_model(tmp_path):
    with pytest.raises(ValueError, match=r"\.json"):
        RankReportCallback(path=tmp_path / "ranks.txt")
    with pytest.raises(OutputError, match="folder"):
        RankReportCallback(path=tmp_path / "no" / "ranks.json")
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match="every must be an integer of at least 1"):
            RankReportCallback(every)
        with pytest.raises(ValueError, match="every must be an integer of at least 1"):
            DivergenceCallback(every)
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=examples(), callbacks=[RankReportCallback()])
    with pytest.raises(ValueError, match="no adapter layer"):
        trainer.train()


@pytest.mark.parametrize("stop", [False, True])
def test_divergence_warns_and_can_stop(tmp_path, stop):
    model, args = adapted(), arguments(tmp_path)
    trainer = trainer_of(model, args, lr=3.0, gamma=1.0)
    callback = DivergenceCallback(every=2, limit=0.5, stop=stop, log=trainer.log)
    trainer.add_callback(callback)
    with pytest.warns(UserWarning, match="watch_divergence: after 2 steps the update of"):
        trainer.train()
    assert trainer.state.global_step == (2 if stop else 6)
    assert callback.stopped == (2 if stop else None)
    logged = [row["step"] for row in trainer.state.log_history if "update_ratio_max" in row]
    assert logged == ([2] if stop else [2, 4, 6])
    assert callback.ratios.keys() == lrk.adapter_layers(model).keys()
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


def test_divergence_is_silent_in_a_sound_training(tmp_path):
    trainer = trainer_of(adapted(), arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2))
    callback = DivergenceCallback(every=3, stop=True)
    trainer.add_callback(callback)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="watch_divergence")
        trainer.train()
    assert trainer.state.global_step == 6
    assert callback.stopped is None
    assert 0 < max(callback.ratios.values()) < 5


def test_divergence_leaves_no_hook_behind_a_training_that_failed(tmp_path):
    trainer = trainer_of(adapted(), arguments(tmp_path))
    trainer.add_callback(DivergenceCallback())
    failing = transformers.TrainerCallback()
    failing.on_step_end = lambda *_, **__: 1 / 0
    trainer.add_callback(failing)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.remove_callback(failing)
    trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


# ---------------------------------------------------------------------- PEFT, and without transformers


def test_a_peft_model_with_deep_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="needs PEFT, of lowrank-kernels[all]")
    method = pytest.importorskip("lowrank_kernels.integrations.peft", reason="needs PEFT, of lowrank-kernels[all]")

    def model_of(seed):
        base = bert()
        torch.manual_seed(seed)
        config = method.DeepLoraConfig(
            r=4, target_modules="all-linear", init_scale=0.1, deeplora_dropout=0.1, modules_to_save=["classifier"]
        )
        return peft.get_peft_model(base, config)

    options = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(model_of(1), arguments(tmp_path, **options))
    reports, watch = RankReportCallback(every=3), DivergenceCallback(every=3)
    whole.add_callback(reports)
    whole.add_callback(watch)
    whole.train()
    names = {group["name"] for group in whole.optimizer.param_groups}
    assert names == {"deeplora.core.4", "deeplora.outer.4", "other", "other.vectors"}
    assert list(reports.reports) == [3, 6]
    assert len(watch.ratios) == len(reports.reports[6].layers) == 13
    resumed = trainer_of(model_of(2), arguments(tmp_path, **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(state(resumed.model), state(whole.model))


def test_without_transformers_it_says_what_to_install(monkeypatch):
    name = "lowrank_kernels.integrations.transformers"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"transformers needs transformers: pip install lowrank-kernels\["):
        importlib.import_module(name)

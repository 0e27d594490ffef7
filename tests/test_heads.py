"""fit_head: the head alone, exactly as a plain loop trains it, and nothing else changed."""

import copy

import pytest
import torch
from torch import nn

import lowrank_kernels as lrk


def model_of(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    lrk.adapt(model, 2, target_modules=["0"], modules_to_train=["2"], **options)
    return model


def batches(count=3, size=5):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 6, generator=g), torch.randn(size, 3, generator=g)) for _ in range(count)]


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_is_adam_on_the_head_of_the_plain_model():
    model = model_of(mode="paper", init_scale=1.0)  # whose update is not zero: it must be off
    plain = nn.Sequential(copy.deepcopy(model[0].base_layer), nn.Tanh(), copy.deepcopy(model[2]))
    before = state(model)
    losses = lrk.fit_head(model, batches(), loss_fn=loss_fn, steps=7, lr=1e-2)
    optimizer = torch.optim.AdamW(plain[2].parameters(), 1e-2, weight_decay=0.0)
    wanted = []
    for step in range(7):
        loss = loss_fn(plain, batches()[step % 3])
        wanted.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == wanted
    assert torch.equal(model[2].weight, plain[2].weight)
    assert torch.equal(model[2].bias, plain[2].bias)
    after = state(model)
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["2.weight", "2.bias"]
    assert not torch.equal(model(batches()[0][0]), plain(batches()[0][0]))  # the adapters are on again


def test_one_step_a_batch_by_default_and_gradients_flags_and_modes_stay():
    model = model_of().eval()
    model[2].weight.grad = torch.full_like(model[2].weight, 7.0)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert len(lrk.fit_head(model, iter(batches()), loss_fn=loss_fn)) == 3
    assert bool((model[2].weight.grad == 7).all())
    assert {name: p.grad for name, p in model.named_parameters() if name != "2.weight"} == {
        name: None for name in flags if name != "2.weight"
    }
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not model.training
    with torch.no_grad():
        assert len(lrk.fit_head(model, lambda: loss_fn(model, batches()[0]), steps=2)) == 2


def test_the_adapters_then_start_from_a_head_that_knows_something():
    """The gradient that compress_ sees is that of the fitted head."""
    model, data = model_of(), batches(1)
    lrk.fit_head(model, data, loss_fn=loss_fn, steps=200, lr=1e-2)
    report = lrk.compress_(model, data, loss_fn=loss_fn)
    weight = model[0].base_layer.weight.detach().clone().requires_grad_(True)
    x, y = data[0]
    hidden = torch.tanh(nn.functional.linear(x, weight, model[0].base_layer.bias))
    nn.functional.mse_loss(model[2](hidden), y).backward()
    wanted = torch.linalg.svdvals(weight.grad)[:2]
    torch.testing.assert_close(torch.tensor(report.layers[0].singular_values[:2]), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, ValueError, "steps must be an integer of at least 1, got 2.5"),
        ({"lr": -1.0}, ValueError, "lr must be a positive finite number, got -1.0"),
        ({"loss_or_batches": []}, ValueError, "gave no batches"),
        ({"loss_or_batches": iter(batches()), "steps": 5}, ValueError, "ended after 3 of 5 steps"),
        ({"loss_or_batches": torch.ones(2)}, TypeError, "an iterable of batches, got Tensor"),
        ({"loss_or_batches": [3], "loss_fn": None}, TypeError, "batches must be dicts"),
        ({"loss_or_batches": lambda: 1}, ValueError, "loss_fn goes with batches"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, ValueError, r"one element, got shape \(5, 3\)"),
        ({"loss_fn": lambda model, batch: batch[0].sum()}, ValueError, "does not depend on any parameter"),
        ({"loss_fn": lambda model, batch: torch.ones((), requires_grad=True) * 1}, ValueError, "does not reach"),
        ({"loss_fn": lambda model, batch: loss_fn(model, batch) * float("nan")}, ValueError, "must be finite, got nan"),
        ({"group": object()}, ValueError, "torch.distributed is not initialized"),
    ],
)
def test_refusals_leave_everything_as_it_was(arguments, error, words):
    model = model_of()
    before = state(model)
    given = {"loss_or_batches": batches(), "loss_fn": loss_fn, **arguments}
    with pytest.raises(error, match=words):
        lrk.fit_head(model, given.pop("loss_or_batches"), **given)
    after = state(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_in_the_middle_takes_the_steps_back():
    model, seen = model_of(), []
    before = state(model)

    def failing(model, batch):
        seen.append(batch)
        return loss_fn(model, batch) * (float("inf") if len(seen) == 3 else 1.0)

    with pytest.raises(ValueError, match="fit_head: the loss must be finite, got inf"):
        lrk.fit_head(model, batches(), loss_fn=failing)
    assert len(seen) == 3
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_running_statistics_of_the_head_are_taken_back_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3)))
    lrk.adapt(model, 2, target_modules=["0"], modules_to_train=["1"])
    before, seen = state(model), []

    def failing(model, batch):
        seen.append(batch)
        return loss_fn(model, batch) * (float("nan") if len(seen) == 3 else 1.0)

    with pytest.raises(ValueError, match="fit_head: the loss must be finite"):
        lrk.fit_head(model, batches(), loss_fn=failing)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    lrk.fit_head(model, batches(), loss_fn=loss_fn)
    assert int(model[1][0].num_batches_tracked) == 3


def test_a_head_that_its_last_step_spoils_is_as_before():
    """Adam's epsilon is zero in float16, where an input is always zero it divides zero by zero."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).half()
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0.0, -1.0
    lrk.adapt(model, 2, target_modules=["0"], modules_to_train=["2"])
    before = state(model)
    with pytest.raises(ValueError, match=r"the head is not finite after step 1; lower lr, or keep the head in float32"):
        lrk.fit_head(model, lambda: model(torch.ones(4, 6).half()).float().square().mean(), steps=1)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_models_without_adapters_or_head_are_refused():
    with pytest.raises(ValueError, match="the model has no adapters; call"):
        lrk.fit_head(nn.Linear(2, 2), batches(), loss_fn=loss_fn)
    model = nn.Sequential(nn.Linear(6, 3))
    lrk.adapt(model, 2, target_modules=["0"])
    with pytest.raises(ValueError, match="nothing is trained beside the adapters"):
        lrk.fit_head(model, batches(), loss_fn=loss_fn)

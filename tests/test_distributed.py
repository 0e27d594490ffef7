"""Two processes do what one does: compress_, DistributedDataParallel, fully_shard, checkpoints across numbers of processes.

The workers are this file run as a script, see workers.py.
"""

import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import workers
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.initialization import compress_
from lowrank_kernels.nn import AdapterLayer

scenario = workers.scenario
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not hasattr(signal, "SIGUSR1"), reason="needs gloo on a Unix"
)


# ---------------------------------------------------------------------- the same in the tests and in the workers


class Net(nn.Module):
    """Some layers in blocks; a batch may ask for another way through."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, ids, way=(0, 1)):
        x = self.embed(ids).mean(1)
        for index in way:
            x = x + self.blocks[index](x)
        return self.head(x)


def model_of(method="deeplora", dtype=torch.float64, factors=None, **options):
    torch.manual_seed(0)
    model = Net().to(dtype)
    if method == "deeplora":
        options = {"init_scale": 0.3, **options}
    targets = ["embed", "0", "2"]
    lrk.adapt(model, 4, 3, targets, method=method, modules_to_train=["head"], dtype=factors, **options)
    return model


def batch(seed, count=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (count, 5), generator=g), torch.randn(count, 3, generator=g, dtype=torch.float64)


def joined(*batches):
    return tuple(map(torch.cat, zip(*batches, strict=True)))


def mean_loss(model, ids_and_target, way=(0, 1)):
    ids, target = ids_and_target
    return ((model(ids, way) - target.to(model_dtype(model))) ** 2).mean()


def sum_loss(model, ids_and_target):
    ids, target = ids_and_target
    return ((model(ids) - target) ** 2).sum()


def model_dtype(model):
    return next(model.parameters()).dtype


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLayer)}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def state(model):
    return {name.removeprefix("module."): whole(tensor) for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def optimizer_of(model, kind="adam"):
    if kind == "sgd":
        return lrk.AdamWithSGD(lrk.parameter_groups(model, lr=2e-2, gamma=0.5, outer="sgd"))
    return torch.optim.AdamW(lrk.parameter_groups(model, lr=2e-2, gamma=0.5, weight_decay=0.01))


def train(model, batches, optimizer=None, loss_fn=mean_loss):
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for each in batches:
        loss = loss_fn(model, each)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def both(seed):
    """The batches of two processes, as one batch."""
    return joined(batch(10 * seed), batch(10 * seed + 1))


def own(seed):
    return batch(10 * seed + dist.get_rank())


@pytest.fixture(scope="module")
def processes():
    found = workers.Workers(__file__)
    yield found
    found.stop()


# ---------------------------------------------------------------------- compress_


def compression(model, report):
    factors = {name: whole(tensor) for name, tensor in model.state_dict().items() if "base_layer" not in name}
    return {"factors": factors, "report": report}


@scenario
def compress_batches(counts, loss, wrapped=None, trained=False, starts=(0, 100), mode="paper", **options):
    model = model_of(mode=mode)
    start = starts[dist.get_rank()]
    batches = [batch(start + index) for index in range(counts[dist.get_rank()])]
    model = {None: lambda m: m, "ddp": nn.parallel.DistributedDataParallel, "shard": sharded}[wrapped](model)
    if trained:
        train(model, [own(7)])
        mean_loss(model, own(8)).backward()
    before = {name: (p.requires_grad, p.grad, p.grad is None or whole(p.grad)) for name, p in model.named_parameters()}
    found = compression(model, compress_(model, batches, loss_fn=globals()[loss], **options))
    for name, parameter in model.named_parameters():
        flag, grad, value = before[name]
        assert parameter.requires_grad is flag
        assert parameter.grad is grad
        assert grad is None or torch.equal(whole(grad), value)
    assert all(module.training for module in model.modules())
    if wrapped:
        train(model, [own(5), own(6)])
    return {**found, "end": state(model) if wrapped else {}}


def compress_alone(batches, loss_fn, trained=False, mode="paper", **options):
    model = model_of(mode=mode)
    if trained:
        train(model, [both(7)])
        mean_loss(model, both(8)).backward()
    found = compression(model, compress_(model, batches, loss_fn=loss_fn, **options))
    train(model, [both(5), both(6)])
    return {**found, "end": state(model)}


def check_compression(results, wanted, tolerance=1e-9):
    first, second = results
    strip = lambda factors: {name.removeprefix("module."): value for name, value in factors.items()}  # noqa: E731
    assert same(strip(first["factors"]), strip(second["factors"])), "the ranks differ"
    assert first["report"] == second["report"]
    for name, value in wanted["factors"].items():
        torch.testing.assert_close(strip(first["factors"])[name], value, rtol=0, atol=tolerance, msg=name)
    for name, value in first.get("end", {}).items():  # and training goes on as in one process
        torch.testing.assert_close(value, wanted["end"][name], rtol=0, atol=10 * tolerance, msg=f"{name} after training")
    assert [row.name for row in first["report"].layers] == [row.name for row in wanted["report"].layers]


def test_two_processes_find_what_one_finds_on_the_joined_batches(processes):
    wanted = compress_alone([joined(batch(i), batch(100 + i)) for i in range(2)], mean_loss)
    for wrapped in (None, "ddp", "shard"):
        results = processes("compress_batches", counts=[2, 2], loss="mean_loss", wrapped=wrapped)
        check_compression(results, wanted)
        report = results[0]["report"]
        assert (report.processes, len(report.losses)) == (2, 4)
        assert "4 backward passes of 2 processes" in str(report)
        for index in range(2):  # batch by batch, the ranks in order
            assert sum(report.losses[2 * index : 2 * index + 2]) / 2 == pytest.approx(wanted["report"].losses[index], rel=1e-12)
        for row, other in zip(report.layers, wanted["report"].layers, strict=True):  # added up, where a joined mean averages
            assert row.singular_values[:2] == pytest.approx([2 * s for s in other.singular_values[:2]], rel=1e-9)


def test_aligned_frames_are_those_of_one_process_too(processes):
    """Also where a gradient has fewer directions than the rank: the missing ones are drawn, not rounding."""
    wanted = compress_alone([joined(batch(i), batch(100 + i)) for i in range(2)], mean_loss, mode="aligned")
    check_compression(processes("compress_batches", counts=[2, 2], loss="mean_loss", mode="aligned"), wanted)


def test_sketches_cut_by_each_process_would_not_do():
    """Why the products are summed: with no spare direction, merged approximations miss what the summed gradient has."""
    wanted = compress_alone([both(0)], mean_loss, oversampling=0, iterations=8)
    parts = compress_alone([batch(0), batch(1)], mean_loss, oversampling=0, iterations=8)
    off = max(float((wanted["factors"][name] - parts["factors"][name]).abs().max()) for name in wanted["factors"])
    assert off > 1e-3


def test_it_compresses_again_in_the_middle_of_a_training(processes):
    wanted = compress_alone([both(0)], mean_loss, trained=True)
    for wrapped in ("ddp", "shard"):
        results = processes("compress_batches", counts=[1, 1], loss="mean_loss", wrapped=wrapped, trained=True, starts=[0, 1])
        check_compression(results, wanted)


@pytest.mark.parametrize("counts", [[3, 1], [0, 2]], ids=str)
def test_numbers_of_batches_may_differ(processes, counts):
    own_batches = [[batch(100 * rank + index) for index in range(count)] for rank, count in enumerate(counts)]
    steps = [joined(*(each[i] for each in own_batches if i < len(each))) for i in range(max(counts))]
    results = processes("compress_batches", counts=counts, loss="sum_loss")
    check_compression(results, compress_alone(steps, sum_loss))
    assert len(results[0]["report"].losses) == sum(counts)


@scenario
def compress_other_ways(ways):
    model = model_of()
    way = ways[dist.get_rank()]
    report = compress_(model, lambda: mean_loss(model, own(0), way), oversampling=12, iterations=6)
    return compression(model, report)


@pytest.mark.parametrize("ways", [[(0, 1), (1, 0)], [(0,), (1,)], [(0, 1, 0), (1,)]], ids=str)
def test_processes_may_come_to_the_layers_in_different_orders_or_miss_some(processes, ways):
    model = model_of()

    def loss():
        return mean_loss(model, batch(0), ways[0]) + mean_loss(model, batch(1), ways[1])

    wanted = compression(model, compress_(model, loss, oversampling=12, iterations=6))
    check_compression(processes("compress_other_ways", ways=ways), wanted, 1e-7)


@scenario
def compress_wrong(kind):
    rank, model = dist.get_rank(), model_of()
    before = state(model)
    loss, options, batches = mean_loss, {}, None
    if kind == "loss is NaN" and rank == 1:
        loss = lambda model, each: mean_loss(model, each) * float("nan")  # noqa: E731
    if kind == "gradient is infinite" and rank == 1:
        model.blocks[1].register_full_backward_hook(lambda module, grad, _: (grad[0] * float("inf"),))
    if kind == "fails in backward" and rank == 1:
        model.blocks[0].register_full_backward_hook(lambda *_: 1 / 0)
    if kind == "fails in a product" and rank == 1:
        model.blocks[0][2].base_layer.register_forward_pre_hook(lambda *_: None)
        from lowrank_kernels import initialization

        patch = pytest.MonkeyPatch()
        patch.setattr(initialization, "_weight_gradient", failing_gradient)
    if kind == "missed":
        loss = lambda model, each: mean_loss(model, each, (0,))  # noqa: E731
    if kind == "batches of the wrong kind" and rank == 1:
        batches = torch.zeros(3)
    if kind == "no batches":
        batches = []
    if kind == "other seed":
        options["seed"] = rank
    if kind == "other layers" and rank == 1:
        lrk.delete_adapter(model, "default")
        lrk.adapt(model, 2, 3, ["0"])
        before = state(model)
    if kind == "unequal and sharded":
        model = sharded(model)
        batches = [own(0)] * (2 - rank)
    try:
        compress_(model, [own(0)] if batches is None else batches, loss_fn=loss, **options)
        raised = None
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    finally:
        if kind == "fails in a product" and rank == 1:
            patch.undo()
    assert same(state(model), before)
    dist.barrier()  # no process is left behind in another collective
    return raised


def failing_gradient(*_):
    from lowrank_kernels.compression import LinearOperator

    def product(_):
        raise MemoryError("no room")

    return LinearOperator((8, 12), product, product, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        (
            "loss is NaN",
            "ValueError: process 1 raised ValueError: compress_: the loss must be finite",
            "ValueError: compress_: the",
        ),
        ("gradient is infinite", "ValueError: compress_: the weight gradient is NaN", "ValueError: compress_: the weight"),
        ("fails in backward", "RuntimeError: process 1 raised ZeroDivisionError: division by zero", "ZeroDivisionError"),
        ("fails in a product", "ValueError: compress_: the weight gradient is NaN", "MemoryError: no room"),
        ("missed", "ValueError: compress_: the loss does not reach 'blocks.1.0'", "ValueError: compress_: the loss does not"),
        ("batches of the wrong kind", "TypeError: process 1 raised TypeError", "TypeError: compress_: loss_or_batches must be"),
        ("no batches", "ValueError: compress_: loss_or_batches gave no batches", "ValueError: compress_: loss_or_batches gave"),
        (
            "other seed",
            "ValueError: compress_: every process must have the same seed, process 0 has 0, process 1",
            "ValueError",
        ),
        ("other layers", "ValueError: compress_: every process must have the same layers", "ValueError: compress_: every"),
        ("unequal and sharded", "ValueError: compress_: with a sharded model every process needs as many", "ValueError"),
    ],
    ids=lambda value: "" if ":" in value or "Error" in value else value.replace(" ", "-"),
)
def test_an_error_in_one_process_is_raised_in_all_and_nothing_changes(processes, kind, first, second):
    check_raised(processes("compress_wrong", kind=kind), first, second)


def check_raised(raised, *starts):
    """What the processes said, rank by rank."""
    for error, start in zip(raised, starts, strict=True):
        assert error is not None
        assert error.startswith(start), error


@scenario
def compress_groups():
    rank = dist.get_rank()
    alone = model_of()
    report = compress_(alone, [own(0)], loss_fn=mean_loss, group=False)
    groups = [dist.new_group([0]), dist.new_group([1])]
    grouped = model_of()
    compress_(grouped, [own(0)], loss_fn=mean_loss, group=groups[rank])
    refused = None
    try:
        compress_(model_of(), [own(0)], loss_fn=mean_loss, group=groups[1 - rank])
    except ValueError as error:
        refused = str(error)
    return {**compression(alone, report), "grouped": same(state(alone), state(grouped)), "refused": refused}


def test_a_process_can_compress_alone_or_with_a_group(processes):
    for rank, found in enumerate(processes("compress_groups")):
        wanted = compress_alone([batch(rank)], mean_loss, mode="aligned")
        assert same(found["factors"], wanted["factors"])
        assert found["report"].processes == 1
        assert found["grouped"]
        assert f"this process (rank {rank}) is not in group" in found["refused"]


def test_a_group_needs_an_initialized_torch_distributed():
    with pytest.raises(ValueError, match="call init_process_group"):
        compress_(model_of(), [batch(0)], loss_fn=mean_loss, group=True)


# ---------------------------------------------------------------------- DistributedDataParallel


@scenario
def train_ddp(method, dtype="float64", accumulate=False, **options):
    model = model_of(method, getattr(torch, dtype))
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    optimizer = optimizer_of(wrapped)
    if accumulate:
        for step in range(3):
            with wrapped.no_sync():
                (mean_loss(wrapped, own(2 * step)) / 2).backward()
            (mean_loss(wrapped, own(2 * step + 1)) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        train(wrapped, [own(step) for step in range(6)], optimizer)
    return state(model)


@pytest.mark.parametrize(
    ("method", "options", "tolerance"),
    [
        ("deeplora", {}, 1e-12),
        ("lora", {"static_graph": True}, 1e-12),
        ("randlora", {"gradient_as_bucket_view": True}, 1e-12),
        ("deeplora", {"dtype": "float32"}, 1e-4),
    ],
    ids=["deeplora", "lora-static-graph", "randlora-bucket-views", "deeplora-float32"],
)
def test_ddp_trains_as_one_process_on_the_joined_batch(processes, method, options, tolerance):
    first, second = processes("train_ddp", method=method, **options)
    model = model_of(method, getattr(torch, options.get("dtype", "float64")))
    start = state(model)
    train(model, [both(step) for step in range(6)])
    assert same(first, second)
    for name, value in state(model).items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=tolerance, msg=name)
    assert not same(start, state(model))


def test_ddp_accumulates_without_synchronising(processes):
    first, second = processes("train_ddp", method="deeplora", accumulate=True)
    model = model_of()
    train(model, [joined(both(2 * step), both(2 * step + 1)) for step in range(3)])
    assert same(first, second)
    for name, value in state(model).items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12, msg=name)


@scenario
def ddp_dropout(seeds):
    model = nn.parallel.DistributedDataParallel(model_of(dropout=0.5))
    torch.manual_seed(seeds[dist.get_rank()])
    return model(batch(0)[0]).detach()


def test_dropout_follows_the_seed_of_each_process(processes):
    first, second = processes("ddp_dropout", seeds=[1, 1])
    assert torch.equal(first, second)
    first, second = processes("ddp_dropout", seeds=[1, 2])
    assert not torch.equal(first, second)


# ---------------------------------------------------------------------- fully_shard


def sharded(model, **options):
    from torch.distributed.fsdp import fully_shard

    for block in (*model.blocks, model.head):  # parameters that are trained must have one dtype in each
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


@scenario
def train_sharded(method, kind="adam", base="float64", factors=None):
    model = sharded(model_of(method, getattr(torch, base), factors and getattr(torch, factors)))
    seen = set()
    layer = model.blocks[0][0]
    kinds = type(layer).factors
    patch = pytest.MonkeyPatch()
    patch.setattr(type(layer), "factors", lambda self, name: seen.update(map(type, kinds(self, name)[:3])) or kinds(self, name))
    optimizer = optimizer_of(model, kind)
    watch = lrk.watch_divergence(model, optimizer, every=6)
    train(model, [own(step) for step in range(6)], optimizer)
    patch.undo()
    assert not any(hasattr(kind, "full_tensor") for kind in seen), seen
    assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return {"state": state(model), "ratios": watch.ratios, "ranks": str(lrk.rank_report(model))}


@pytest.mark.parametrize(
    ("method", "kind", "base", "tolerance"),
    [
        ("deeplora", "adam", "float64", 1e-12),
        ("deeplora", "sgd", "float64", 1e-12),
        ("lora", "adam", "float64", 1e-12),
        ("randlora", "adam", "float64", 1e-12),
        ("deeplora", "adam", "bfloat16", 2e-2),
    ],
)
def test_fully_shard_trains_as_one_process_on_the_joined_batch(processes, method, kind, base, tolerance):
    factors = "float32" if base == "bfloat16" else None
    found, other = processes("train_sharded", method=method, kind=kind, base=base, factors=factors)
    model = model_of(method, getattr(torch, base), factors and torch.float32)
    start, optimizer = state(model), optimizer_of(model, kind)
    watch = lrk.watch_divergence(model, optimizer, every=6)
    train(model, [both(step) for step in range(6)], optimizer)
    assert same(found["state"], other["state"])
    for name, value in state(model).items():
        assert found["state"][name].dtype == value.dtype
        torch.testing.assert_close(found["state"][name], value, rtol=0, atol=tolerance, msg=name)
    moved = [name for name in start if not torch.equal(start[name], found["state"][name])]
    assert {name.split(".")[-2] for name in moved} >= ({"lambdas"} if method == "randlora" else {"left", "right"})
    assert found["ratios"] == other["ratios"] == pytest.approx(watch.ratios, rel=max(1e-5, 10 * tolerance))
    assert found["ranks"] == other["ranks"]
    if base == "float64":
        assert found["ranks"] == str(lrk.rank_report(model))


@scenario
def train_sharded_in_half_precision():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = model_of(dtype=torch.float32)
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    report = compress_(model, [own(0)], loss_fn=mean_loss)
    start = state(model)
    train(model, [own(step) for step in range(6)])
    return {"start": start, "end": state(model), "singular values": [row.singular_values[0] for row in report.layers]}


def test_fully_shard_may_compute_in_half_precision(processes):
    found, other = processes("train_sharded_in_half_precision")
    model = model_of(dtype=torch.float32)
    report = compress_(model, [both(0)], loss_fn=mean_loss)
    wanted = [2 * row.singular_values[0] for row in report.layers]
    assert found["singular values"] == other["singular values"] == pytest.approx(wanted, rel=0.05)
    assert same(found["end"], other["end"])
    for name, parameter in model.named_parameters():
        assert found["end"][name].dtype == torch.float32
        assert torch.equal(found["start"][name], found["end"][name]) is not parameter.requires_grad, name


@scenario
def checkpoint_sharded(folder, direction):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = sharded(model_of())
    optimizer = optimizer_of(model)
    if direction == "save":
        train(model, [own(step) for step in range(2)], optimizer)
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    else:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    at_checkpoint = state(model)
    train(model, [own(step) for step in range(2, 4)], optimizer)
    return {"checkpoint": at_checkpoint, "end": state(model)}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch's checkpoints in one process
def test_checkpoints_go_from_two_processes_to_one_and_back(processes, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    found, _ = processes("checkpoint_sharded", folder=str(tmp_path / "two"), direction="save")
    model = model_of()
    optimizer = optimizer_of(model)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=tmp_path / "two", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert same(state(model), found["checkpoint"])
    train(model, [both(step) for step in range(2, 4)], optimizer)
    for name, value in state(model).items():
        torch.testing.assert_close(value, found["end"][name], rtol=0, atol=1e-12, msg=name)

    model = model_of()
    optimizer = optimizer_of(model)
    train(model, [both(step) for step in range(2)], optimizer)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=tmp_path / "one", no_dist=True)
    found, _ = processes("checkpoint_sharded", folder=str(tmp_path / "one"), direction="load")
    assert same(found["checkpoint"], state(model))
    train(model, [both(step) for step in range(2, 4)], optimizer)
    for name, value in state(model).items():
        torch.testing.assert_close(value, found["end"][name], rtol=0, atol=1e-12, msg=name)


@scenario
def files_sharded(folder):
    folder, rank = Path(folder), dist.get_rank()
    model = sharded(model_of())
    train(model, [own(step) for step in range(2)])
    model(batch(0)[0])  # leaves the outermost parameters gathered
    lrk.save_adapter(model, folder / "two.safetensors")
    exported = lrk.export_lora(model, folder / "peft")
    saved = state(model)
    refusals = []
    for attempt in (
        lambda: lrk.save_adapter(model, folder / "two.safetensors"),
        lambda: lrk.load_adapter(model, folder / (f"{rank}.safetensors" if rank else "two.safetensors")),
        lambda: lrk.load_adapter(model, folder / "two.safetensors", adapter="second"),
        lambda: lrk.merge_and_unload(model),
        lambda: model.blocks[0][0].merge(),
    ):
        try:
            attempt()
            refusals.append(None)
        except Exception as error:
            refusals.append(f"{type(error).__name__}: {error}")
    assert same(state(model), saved)
    other = sharded(model_of(seed=1))
    other(batch(0)[0])
    report = lrk.load_adapter(other, folder / "two.safetensors")
    loaded = state(other)
    losses = train(other, [own(5)]), train(model, [own(5)])
    return {
        "saved": saved,
        "loaded": loaded,
        "exported": exported,
        "refusals": refusals,
        "report": report,
        "same losses": losses[0] == losses[1],
    }


def test_adapter_files_of_a_sharded_model_are_those_of_the_whole(processes, tmp_path):
    found = processes("files_sharded", folder=str(tmp_path))
    model = model_of(seed=2)
    lrk.load_adapter(model, tmp_path / "two.safetensors")
    lrk.save_adapter(model, tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "peft", "two.safetensors"]
    exported = lrk.export_lora(model)
    for result in found:
        assert same(result["saved"], state(model))
        assert same(result["loaded"], state(model))
        assert result["same losses"]
        assert not result["report"].added
        for name, lora in exported.items():
            assert torch.equal(result["exported"][name].a, lora.a)
            assert torch.equal(result["exported"][name].b, lora.b)
    for position, words in enumerate(
        ("two.safetensors: exists", "no such file", "load the adapter before fully_shard()", "is sharded", "is sharded")
    ):
        for result in found:
            assert words in str(result["refusals"][position]), result["refusals"]


# ---------------------------------------------------------------------- fit_head


@scenario
def fit_head_together(wrapped=None):
    model = model_of()
    model = {None: lambda m: m, "ddp": nn.parallel.DistributedDataParallel, "shard": sharded}[wrapped](model)
    data = [own(0), own(1)] * 3
    closure = lambda: mean_loss(model, data.pop(0))  # noqa: E731  # through the wrapper, which then waits for no adapter
    given = {"loss_or_batches": [own(0), own(1)], "loss_fn": mean_loss} if wrapped != "ddp" else {"loss_or_batches": closure}
    losses = lrk.fit_head(model, steps=5, lr=1e-2, **given)
    assert all(parameter.grad is None for parameter in model.parameters())
    if wrapped:
        train(model, [own(5)])
    return losses, state(model)


def test_a_head_is_fitted_to_the_batches_of_all_processes(processes):
    model = model_of()
    wanted = lrk.fit_head(model, [both(0), both(1)], loss_fn=mean_loss, steps=5, lr=1e-2)
    fitted = state(model)
    train(model, [both(5)])
    for wrapped, end in ((None, fitted), ("ddp", state(model)), ("shard", state(model))):  # training goes on as in one process
        for losses, found in processes("fit_head_together", wrapped=wrapped):
            assert losses == pytest.approx(wanted, rel=1e-12)
            for name, value in end.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=f"{name}, {wrapped}")


@scenario
def fit_head_wrong(kind):
    model, rank = model_of(), dist.get_rank()
    before, options = state(model), {}
    batches = [own(0)] * (3 - rank if kind == "fewer batches" else 3)
    if kind == "other steps":
        options["steps"] = 2 + rank
    factor = float("nan") if kind == "loss is NaN" and rank == 1 else 1.0
    try:
        lrk.fit_head(model, batches, loss_fn=lambda model, each: factor * mean_loss(model, each), **options)
        raised = None
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    assert same(state(model), before)
    dist.barrier()
    return raised


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("loss is NaN", "ValueError: process 1 raised ValueError: fit_head: the loss must", "ValueError: fit_head: the loss"),
        ("other steps", "ValueError: fit_head: every process must have the same steps", "ValueError: fit_head: every"),
        ("fewer batches", "ValueError: fit_head: every process needs as many batches", "ValueError: fit_head: every"),
    ],
    ids=lambda value: "" if ":" in value else value.replace(" ", "-"),
)
def test_a_head_that_cannot_be_fitted_is_as_before_in_all_processes(processes, kind, first, second):
    check_raised(processes("fit_head_wrong", kind=kind), first, second)


# ---------------------------------------------------------------------- the workers themselves


@scenario
def one_is_missing():
    if dist.get_rank() == 1:
        return "left"
    try:
        dist.all_gather_object([None, None], 0)
    finally:
        pass
    return "met"


@scenario
def asleep(seconds):
    time.sleep(seconds if dist.get_rank() else 0)


def test_a_worker_that_hangs_ends_in_its_stack(processes, monkeypatch):
    processes("asleep", seconds=0)
    monkeypatch.setattr(workers, "WAIT", 3)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)did not answer within 3 s.*rank 1:.*in asleep"):
        processes("asleep", seconds=600)
    assert not processes.started


if __name__ == "__main__":
    workers.main()

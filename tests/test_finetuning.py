"""Fine-tuning end to end on a tiny random BERT: every method, files and their refusals, killing and resuming, the outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for library in ("transformers", "peft", "click", "rich", "polars", "scipy", "matplotlib"):
    pytest.importorskip(library, reason="fine-tuning needs lowrank-kernels[all]")

import polars  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from lowrank_kernels import cli, files  # noqa: E402
from lowrank_kernels.figures import adaptation  # noqa: E402
from lowrank_kernels.finetuning import command, data, methods, models, plots, results, training  # noqa: E402
from lowrank_kernels.finetuning.command import Request, prepare, work  # noqa: E402
from lowrank_kernels.finetuning.training import Run, Settings, Trainee, execute  # noqa: E402

WORDS = ("red", "green", "blue", "dog", "cat", "bird", "runs", "sleeps", "eats", "now")
DATA = Path(os.environ.get("LOWRANK_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Two layers, width 32, random weights, a tokenizer of whole words: what a downloaded model folder holds."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=15, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def pairs(count: int, seed: int) -> list[tuple[str, str, float]]:
    """The score counts common words."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        a, b = (rng.choice(WORDS, rng.integers(2, 7), replace=False) for _ in range(2))
        rows.append((" ".join(a), " ".join(b), float(min(5, len(set(a) & set(b))))))
    return rows


@pytest.fixture
def stsb(tmp_path) -> Path:
    """In the layout of the STS Benchmark: tabs, no header, quotes that mean themselves, further columns on some lines."""
    folder = tmp_path / "stsb"
    folder.mkdir()
    for name, count, seed in (("sts-train.csv", 64, 0), ("sts-dev.csv", 40, 1)):
        lines = [
            f'genre\tfile\t2012\t{i:04}\t{score:.3f}\t{a}\t"{b}' + ("\tlicence\tsource" if i % 3 == 0 else "")
            for i, (a, b, score) in enumerate(pairs(count, seed))
        ]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def bench(stsb, model_folder, tmp_path) -> training.Bench:
    settings = Settings(head_lr=1e-2, eval_every=5, base_dtype="float32")
    request = Request(str(stsb), str(tmp_path / "bench"), str(model_folder), task="stsb", settings=settings)
    return prepare(request, print)[0]


def run_of(method: str, *, steps: int = 12, samples: int | None = 32, seed: int = 0, **options: Any) -> Run:
    given = {**methods.METHODS[method].defaults, **options}
    return Run(method, tuple(given.items()), samples, steps, "constant", seed)


def finetune(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.group, ["finetune", *map(str, arguments)], catch_exceptions=False)


def refused(*arguments: Any) -> str:
    """One clean line on stderr and exit code 2."""
    result = finetune(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# ---------------------------------------------------------------------- methods

QUICK_RATES = {
    "head": {}, "lora-paper": {"lr": 1e-2}, "peft-lora": {"lr": 1e-2}, "peft-lora-head": {"lr": 1e-2},
    "lora": {"lr": 1e-2}, "loraplus": {"lr": 3e-3},
    "deeplora": {}, "deeplora-random": {},
    "deeplora-paper": {"lr": 5e-2, "init_scale": 0.3}, "deeplora-paper-random": {"lr": 5e-2, "init_scale": 0.3},
    "deeplora-full": {"lr": 1e-2, "init_scale": 0.1}, "randlora": {"lr": 1e-2, "rank": 4},
}  # fmt: skip


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_trains(bench, method):
    result = execute(bench, run_of(method, steps=30, **QUICK_RATES[method]))
    assert result["status"] == "finished"
    assert len(result["losses"]) == 30
    assert np.mean(result["losses"][-6:]) < 0.97 * np.mean(result["losses"][:6])
    assert [point["step"] for point in result["curve"]] == [0, 5, 10, 15, 20, 25, 30]
    assert (result["trainable"] > 0) == (method != "head")
    if method != "head":
        ranks = result["ranks"]
        assert [layer["name"] for layer in ranks["layers"]] == list(bench.base.linears)
        assert ranks["moved"] == 1.0
        assert 0 < ranks["mean_rank"] <= 32
    json.dumps(result, allow_nan=False)


def test_rates_go_where_they_belong(bench):
    def groups(method, **options):
        first = {"head_first": 0.0} if method == "deeplora" else {}
        trainee = Trainee(bench, run_of(method, **first, **options))
        return {group.get("name", "all"): group for group in trainee.optimizer.param_groups}

    deep = groups("deeplora-paper", rank=16, lr=1e-2, gamma=0.5)
    assert deep["deeplora.core.16"]["lr"] == pytest.approx(5e-3)
    assert deep["deeplora.outer.16"]["lr"] == pytest.approx(5e-3)
    assert deep["deeplora.core.16"]["eps"] == 1e-6
    assert deep["head"]["lr"] == 1e-2
    assert groups("deeplora", outer="sgd")["deeplora.outer.8"]["method"] == "sgd"
    assert "deeplora.outer.8" not in groups("deeplora", gamma=0.0)
    plus = groups("loraplus", lr=1e-4)
    assert plus["lora.left"]["lr"] == pytest.approx(16e-4)
    assert plus["lora.right"]["lr"] == 1e-4
    assert groups("peft-lora", lr=3e-4)["all"]["lr"] == 3e-4


def test_methods_start_where_they_should(bench):
    """The paper's LoRA: N(0, 1) on the output side; PEFT's layers are PEFT's; full width is orthogonal; the same base."""
    paper = Trainee(bench, run_of("lora-paper")).model.encoder
    layer = next(iter(methods.adapter_layers(paper).values()))
    assert layer.left["default"].std().item() == pytest.approx(1, abs=0.15)
    assert not layer.right["default"].any()
    assert layer.adapters["default"].scale == 1.0
    assert {type(m).__module__ for m in Trainee(bench, run_of("peft-lora")).model.modules() if hasattr(m, "lora_A")} == {
        "peft.tuners.lora.layer"
    }
    full = Trainee(bench, run_of("deeplora-full", init_scale=0.5)).model.encoder
    factors = next(m for m in full.modules() if isinstance(m, methods.FullWidthLinear)).factors
    torch.testing.assert_close(factors[1] @ factors[1].t(), 0.25 * torch.eye(32), atol=1e-5, rtol=0)
    batch = Trainee(bench, run_of("head")).batch(0)
    predictions = [
        Trainee(bench, run_of(method)).model.eval()(batch) for method in ("head", "lora-paper", "peft-lora", "deeplora")
    ]
    for other in predictions[1:]:  # the same head over the same, not yet changed, encoder
        torch.testing.assert_close(other, predictions[0], atol=1e-5, rtol=1e-5)


def test_methods_of_a_seed_see_the_same_batches(bench):
    for step in (0, 1, 5):
        batches = [Trainee(bench, run_of(method, seed=3)).batch(step) for method in ("head", "deeplora", "peft-lora")]
        assert all(torch.equal(other.labels, batches[0].labels) for other in batches)
        assert all(torch.equal(other.inputs["input_ids"], batches[0].inputs["input_ids"]) for other in batches)
    one, other = (Trainee(bench, run_of("head", seed=seed)) for seed in (0, 1))
    assert not torch.equal(one.model.head.weight, other.model.head.weight)


def test_sgd_is_another_training(bench):
    adam, sgd = (execute(bench, run_of("deeplora", outer=outer, gamma=1.0, init_scale=0.3)) for outer in ("adam", "sgd"))
    assert adam["losses"][0] == sgd["losses"][0]
    assert adam["losses"][-1] != sgd["losses"][-1]


def test_linear_schedule_ends_at_zero(bench):
    run = Run("head", (), 32, 4, "linear", 0)
    trainee = Trainee(bench, run)
    rates = []
    for step in range(4):
        trainee.step(step)
        rates.append(trainee.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_the_head_first_then_the_method(bench):
    """The first share of the steps is a run of the head alone; then the schedule begins, from the head that is there."""
    alone = execute(bench, run_of("head", steps=12))
    run = run_of("deeplora", steps=12, head_first=0.5)
    found = execute(bench, run)
    assert found["losses"][:7] == alone["losses"][:7]  # the adapters start at zero
    assert found["losses"][7] != alone["losses"][7]
    assert found["ranks"]["moved"] == 1.0
    trainee = Trainee(bench, Run(run.method, run.options, 32, 12, "linear", 0))
    rates, adapted = [], []
    for step in range(12):
        trainee.step(step)
        rates.append(trainee.optimizer.param_groups[-1]["lr"])
        adapted.append(len(trainee.optimizer.param_groups) > 1)
    assert adapted == [False] * 6 + [True] * 6
    assert rates == pytest.approx([1e-2] * 6 + [1e-2 * (1 - step / 6) for step in range(6)])
    assert Trainee(bench, run_of("deeplora", steps=2, head_first=0.99)).head_steps == 1  # a method always has its turn


def test_ranks_of_peft_are_those_of_its_products(bench):
    trainee = Trainee(bench, run_of("peft-lora", alpha=16.0))
    layers = [
        module for module in trainee.model.encoder.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    ]
    torch.manual_seed(0)
    for layer in layers:
        layer.lora_B["default"].weight.data.normal_()
    report = methods.update_ranks(trainee.model.encoder)
    for row, layer in zip(report.layers, layers, strict=True):
        delta = layer.get_delta_weight("default").double()
        torch.testing.assert_close(
            torch.tensor(row.singular_values, dtype=torch.float64), torch.linalg.svdvals(delta)[:8], rtol=1e-5, atol=1e-7
        )
        assert row.base_norm == pytest.approx(torch.linalg.matrix_norm(layer.base_layer.weight, 2).item(), rel=1e-3)


def test_divergence_is_a_result(bench):
    result = execute(bench, run_of("lora-paper", steps=20, lr=1e30))
    assert result["status"] == "diverged"
    assert len(result["losses"]) < 20
    assert result["metrics"]["pearson"] is None
    json.dumps(result, allow_nan=False)


# ---------------------------------------------------------------------- models


def test_packed_rows_give_what_padding_gives(bench):
    base = bench.base
    assert base.first_position == 0
    encoded = models.Encoded(base, bench.train, "cross", 128)
    model = models.TextModel(base, base.encoder, "cross", encoded.labels, 0, 0).eval()
    packed = encoded.batch(range(9))
    wanted = []
    for first, second in bench.train.texts[:9]:
        tokens = base.tokenizer(first, second, return_tensors="pt")
        hidden = base.encoder(**tokens, position_ids=None, sequence_lengths=(tokens["input_ids"].shape[1],)).last_hidden_state
        wanted.append(model.head(hidden[0].mean(0))[0])
    torch.testing.assert_close(model(packed), torch.stack(wanted), atol=1e-5, rtol=1e-5)
    assert packed.inputs["input_ids"].shape == (1, sum(packed.lengths))


def test_padded_batches_where_packing_is_not_possible(bench, monkeypatch):
    monkeypatch.setattr(models, "_packing", lambda encoder, tokenizer: None)
    base = models.load_pretrained(str(bench.base.folder))
    assert base.first_position is None
    for head in models.HEADS:
        results_ = []
        for one in (base, bench.base):
            encoded = models.Encoded(one, bench.train, head, 128)
            model = models.TextModel(one, one.encoder, head, encoded.labels, 0, 0)
            results_.append(models.predict(model, encoded, batch=7))
        torch.testing.assert_close(*results_, atol=1e-5, rtol=1e-5)


def test_siamese_head_is_its_formula(bench):
    base = bench.base
    encoded = models.Encoded(base, bench.train, "siamese", 128)
    model = models.TextModel(base, base.encoder, "siamese", encoded.labels, 0, 0).eval()
    assert model.head.bias.item() == pytest.approx(float(encoded.labels.mean()))

    def unit(text):
        tokens = base.tokenizer(text, return_tensors="pt")
        hidden = base.encoder(**tokens, sequence_lengths=(tokens["input_ids"].shape[1],)).last_hidden_state[0].mean(0)
        return hidden / hidden.norm()

    u, v = (unit(text) for text in bench.train.texts[5])
    wanted = model.head(torch.cat([(u - v).abs() * 32**0.5, u * v * 32]))
    torch.testing.assert_close(model(encoded.batch([2, 5]))[1:], wanted, atol=1e-5, rtol=1e-5)


def test_bfloat16_base_keeps_adapters_and_norms_in_float32(stsb, model_folder, tmp_path):
    request = Request(
        str(stsb), str(tmp_path / "o"), str(model_folder), task="stsb", settings=Settings(base_dtype="bfloat16", eval_every=5)
    )
    bench = prepare(request, print)[0]
    for method in ("deeplora", "peft-lora", "deeplora-full"):
        trainee = Trainee(bench, run_of(method, **({"head_first": 0.0} if method == "deeplora" else {})))
        dtypes = {p.dtype for name, p in trainee.model.named_parameters() if p.requires_grad or "LayerNorm" in name}
        assert dtypes == {torch.float32}
        base = [p.dtype for n, p in trainee.model.encoder.named_parameters() if n.endswith("query.base_layer.weight")]
        assert base == [torch.bfloat16] * 2
        losses = [trainee.step(step) for step in range(12)]
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0]


def test_rates_of_the_processor_are_measured():
    rates = models.matmul_rates(0.01)
    assert set(rates) == {"float32", "bfloat16"}
    assert min(rates.values()) > 0


def test_an_installed_package_is_found_by_name(model_folder, tmp_path, monkeypatch):
    package = tmp_path / "site" / "some_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package itself is not imported')")
    (package / "inner").symlink_to(model_folder)
    (package / "files").mkdir()
    for file in model_folder.iterdir():
        (package / "files" / file.name).write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert models.find_model("some-model") == package / "files"


# ---------------------------------------------------------------------- killed and resumed


class Kill(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("deeplora", {"lr": 2e-2}),
        ("deeplora", {"head_first": 0.7}),  # killed just before the method's turn
        ("deeplora", {"head_first": 0.9}),
        ("peft-lora", {}),
        ("peft-lora-head", {"head_first": 0.4}),
        ("randlora", {}),
        ("deeplora-full", {}),
    ],
)
def test_resumed_is_bit_for_bit_the_uninterrupted(bench, tmp_path, method, options):
    run = run_of(method, **options)
    whole = execute(bench, run)
    checkpoint = tmp_path / "run.safetensors"

    def kill(step, steps, loss):
        if step == 8:
            raise Kill

    with pytest.raises(Kill):
        execute(bench, run, checkpoint, kill, checkpoint_seconds=0)
    assert checkpoint.exists()
    seen = []
    resumed = execute(bench, run, checkpoint, lambda step, steps, loss: seen.append(step))
    assert seen == [8, 9, 10, 11, 12]
    for part in ("losses", "curve", "metrics", "ranks", "status", "trainable"):
        assert resumed[part] == whole[part], part


def test_a_checkpoint_of_something_else_is_refused(bench, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(files.InputError, match="remove it"):
        execute(bench, run_of("head"), checkpoint)
    checkpoint.unlink()

    def kill(step, steps, loss):
        if step == 3:
            raise Kill

    with pytest.raises(Kill):
        execute(bench, run_of("head"), checkpoint, kill, checkpoint_seconds=0)
    with pytest.raises(files.InputError, match="another run"):
        execute(bench, run_of("lora"), checkpoint)


def test_interrupt_leaves_a_folder_that_goes_on(stsb, model_folder, tmp_path, monkeypatch):
    arguments = (stsb, "--task", "stsb", "--model", model_folder, "-o", tmp_path / "out", "--quick", "--method", "head",
                 "--method", "lora", "--base-dtype", "float32")  # fmt: skip
    real, made = Trainee.step, []

    def interrupting(self, step):
        if self.run.method == "lora" and step == 2:
            raise KeyboardInterrupt
        made.append(self.run.method)
        return real(self, step)

    monkeypatch.setattr(Trainee, "step", interrupting)
    result = finetune(*arguments)
    assert result.exit_code == 130
    assert "1 of 2 runs are finished" in result.stderr
    monkeypatch.setattr(Trainee, "step", real)
    made.clear()
    result = finetune(*arguments)
    assert result.exit_code == 0, result.output
    assert "1 of 2 runs were there already" in result.stderr
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


# ---------------------------------------------------------------------- the command


def test_a_whole_table(stsb, model_folder, tmp_path):
    out = tmp_path / "out"
    result = finetune(
        stsb, "--task", "stsb", "--model", model_folder, "-o", out, "--steps", 6, "--eval-every", 3, "--seeds", 2,
        "--samples", 8, "--samples", 16, "--rank", 2, "--rank", 4, "--method", "head", "--method", "deeplora:init_scale=0.3",
        "--method", "peft-lora:rank=4,lr=1e-3/1e-2", "--base-dtype", "float32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    runs = [json.loads(path.read_text()) for path in (out / "runs").iterdir()]
    assert len(runs) == 2 * 2 * (1 + 2 + 2)
    text = (out / "table.md").read_text()
    for head in ("pearson", "spearman", "update rank"):
        assert head in text
    assert "LoRA of PEFT, rank 4, lr 0.01" in text
    table = json.loads((out / "table.json").read_text())
    assert len(table) == 10
    for row in table:
        values = [
            run["metrics"]["pearson"]
            for run in runs
            if (run["run"]["method"], run["run"]["options"], run["run"]["samples"])
            == (row["method"], row["options"], row["samples"])
        ]
        assert row["seeds"] == [0, 1]
        assert row["metrics"]["pearson"]["mean"] == pytest.approx(np.mean(values))
        assert row["metrics"]["pearson"]["std"] == pytest.approx(np.std(values, ddof=1))
        assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in text
    for picture in ("curves.png", "few_shot.png", "ranks.png", "histogram.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert finetune(
        stsb, "--task", "stsb", "--model", model_folder, "-o", out, "--steps", 6, "--eval-every", 3, "--samples", 8,
        "--method", "head", "--method", "randlora:rank=4", "--base-dtype", "float32", "-q",
    ).exit_code == 0  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list((out / "runs").iterdir())) == 21
    assert "another configuration" in refused(
        stsb, "--task", "stsb", "--model", model_folder, "-o", out, "--eval-every", 3, "--head", "siamese",
        "--base-dtype", "float32",
    )  # fmt: skip
    assert "head is 'siamese', there it is 'cross'" in refused(
        stsb, "--task", "stsb", "--model", model_folder, "-o", out, "--eval-every", 3, "--head", "siamese"
    )


def test_pictures_hold_the_numbers_of_the_results(bench, tmp_path):
    folder = results.Folder(tmp_path / "r", {"kind": "regression", "dev": ["dev", "", 1]})
    runs = [run_of("lora", samples=n, seed=seed, steps=6, rank=rank) for n in (16, 32) for seed in (0, 1) for rank in (2, 4)]
    assert work(bench, folder, runs, command.Watch()) == 0
    rows = results.rows(folder.results())
    axes = plots.against(rows, "pearson", "samples", "n").axes[0]
    assert len(axes.containers) == 2
    for container, rank in zip(axes.containers, (2, 4), strict=True):
        wanted = [row.mean("pearson") for row in rows if row.options["rank"] == rank]
        np.testing.assert_allclose(np.asarray(container.lines[0].get_ydata(), float), wanted)
    curve = plots.learning_curves(rows, "pearson").axes[1].lines[0]
    points = [result["curve"] for result in rows[2].results]
    np.testing.assert_allclose(curve.get_ydata(), np.mean([[p["pearson"] for p in one] for one in points], axis=0))
    heights = sum(bar.get_height() for bar in plots.rank_histogram(rows[:1]).axes[0].patches)
    assert heights == pytest.approx(len(bench.base.linears))
    diverged = json.loads(json.dumps(rows[0].results[0]))
    diverged |= {"status": "diverged", "metrics": {"pearson": None, "spearman": None}}
    row = results.rows([diverged, rows[0].results[1]])[0]
    assert results.spread(row, "pearson") == "1 of 2 diverged"
    assert row.mean("pearson") is None


def test_classification_from_several_formats(model_folder, tmp_path):
    import polars

    rows = [(a, "yes" if "red" in a else "no") for a, _, _ in pairs(60, 2)]
    frame = polars.DataFrame({"review": [a for a, _ in rows], "verdict": [b for _, b in rows]})
    frame.write_csv(tmp_path / "a.csv")
    frame.write_parquet(tmp_path / "a.parquet")
    frame.write_ndjson(tmp_path / "a.jsonl")
    (tmp_path / "a.tsv").write_text("".join(f"{b}\t{a}\n" for a, b in rows))
    columns = ("--text", "review", "--label", "verdict")
    tables = []
    for name, given in (("a.csv", columns), ("a.parquet", columns), ("a.jsonl", columns),
                        ("a.tsv", ("--text", "2", "--label", "1"))):  # fmt: skip
        out = tmp_path / f"out-{name}"
        result = finetune(tmp_path / name, *given, "--model", model_folder, "-o", out, "--quick", "--base-dtype", "float32")
        assert result.exit_code == 0, result.output
        tables.append(json.loads((out / "table.json").read_text()))
    assert set(tables[0][0]["metrics"]) == {"accuracy", "matthews"}
    assert all(other == tables[0] for other in tables[1:])


def test_metrics_are_those_of_scikit_learn_and_scipy():
    metrics = pytest.importorskip("sklearn.metrics", reason="the oracle")
    from scipy import stats

    from lowrank_kernels.finetuning.metrics import metrics as ours

    rng = np.random.default_rng(0)
    logits, wanted = rng.standard_normal((50, 3)), rng.integers(0, 3, 50)
    got = ours(torch.tensor(logits), torch.tensor(wanted))
    assert got["matthews"] == pytest.approx(metrics.matthews_corrcoef(wanted, logits.argmax(1)))
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(wanted, logits.argmax(1)))
    a, b = rng.integers(0, 9, (2, 50)).astype(float)
    got = ours(torch.tensor(a), torch.tensor(b))
    assert got["pearson"] == pytest.approx(stats.pearsonr(a, b)[0])
    assert got["spearman"] == pytest.approx(stats.spearmanr(a, b)[0])
    assert np.isnan(ours(torch.ones(5), torch.arange(5.0))["pearson"])


# ---------------------------------------------------------------------- the paper's Figure 1


@pytest.mark.parametrize(("m", "n", "rank"), [(12, 30, 12), (30, 12, 12), (9, 9, 9), (20, 24, 10), (40, 31, 2)])
def test_spectrum_is_that_of_an_svd(m, n, rank):
    g = torch.Generator().manual_seed(m)
    delta = torch.randn(m, rank, generator=g).double() @ torch.randn(rank, n, generator=g).double()
    values, frame = adaptation.spectrum(delta)
    _, s, vh = torch.linalg.svd(delta)
    torch.testing.assert_close(values, s[: adaptation.SHOWN], rtol=1e-7, atol=1e-6 * float(s[0]))
    torch.testing.assert_close(frame.t() @ frame, torch.eye(adaptation.TOP).double())
    top = min(rank, adaptation.TOP)
    assert adaptation.alignment(frame[:, :top], vh[:top].t()) == pytest.approx(1, abs=1e-8)


def test_alignment_of_subspaces():
    eye = torch.eye(6)
    assert [adaptation.alignment(eye[:, :2], eye[:, columns]) for columns in ([1, 0], [1, 2], [2, 3])] == [1, 0.5, 0]


def test_the_figure_of_updates(stsb, model_folder, tmp_path):
    """At the end every update is aligned with itself; the full-width one started as 1e-9 times an orthogonal matrix."""
    out = tmp_path / "made"
    options = ("adaptation", "--quick", "--train", stsb, "--model", model_folder, "--out", out)
    result = CliRunner().invoke(cli.group, ["figures", *map(str, options)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (out / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    rows = polars.read_csv(out / "adaptation.csv")
    assert rows["layer"].n_unique() == 12
    assert rows["step"].unique().sort().to_list() == [0, 1, 3, 6]
    last, first = (rows.filter(polars.col("step") == step) for step in (6, 0))
    assert last["alignment"].to_list() == pytest.approx([1] * 24)
    assert last["alignment_first"].to_list() == pytest.approx([1] * 24)
    wide = first.filter(polars.col("model") == "full width")
    assert wide["s1"].to_list() == pytest.approx([1e-9] * 12, rel=1e-3)
    grown = [end / start for start, end in zip(first["s1"].to_list(), last["s1"].to_list(), strict=True)]
    assert min(grown) > 1
    assert min(grown[12:]) > 1e3  # the compressed ones: their cores have a hundred times the rate
    assert max(wide["alignment"].to_list()) < 0.9  # of the compressed ones the frame is the whole update's
    assert "settings smaller than the source's" in (out / "adaptation.md").read_text()


# ---------------------------------------------------------------------- refusals


def test_bad_task_files_are_refused_with_the_line(tmp_path, model_folder):
    def given(text, *options, name="a.tsv"):
        (tmp_path / name).write_text(text)
        return refused(tmp_path / name, "--model", model_folder, "-o", tmp_path / "out", "--quick", *options)

    good = "x\tx\tx\tx\t2.5\tred dog\tblue cat\n"
    stsb = ("--task", "stsb")
    assert "line 2, column 5: a finite number from 0 to 5 was wanted, got '7.1'" in given(
        good + good.replace("2.5", "7.1"), *stsb
    )
    assert "line 3, column 5: a finite number from 0 to 5 was wanted, got 'good'" in given(
        good + "\n" + good.replace("2.5", "good"), *stsb
    )
    assert "line 2: no column 7, the line has 6 columns" in given(good + good.rpartition("\t")[0] + "\n", *stsb)
    assert "line 1, column 6: a text was wanted, got an empty cell" in given(good.replace("red dog", " "), *stsb)
    named = ("--text", "a", "--label", "b")
    assert "no column 'b'; the columns are a, c" in given("a,c\n1,2\n", *named, name="a.csv")
    assert "line 3, column 'a': a text was wanted" in given('a,b\n"x\ny",1\n,2\n', *named, name="b.csv").replace(
        "line 4", "line 3"
    )
    assert "at least two classes" in given("a,b\nx,1\ny,1\n", *named, name="c.csv")
    assert "line 2: no column 'b'" in given('{"a": "x", "b": 1}\n{"a": "x"}\n', *named, name="a.jsonl")
    assert "line 2, column 'b': a class was wanted" in given(
        '{"a": "x", "b": 1}\n{"a": "x", "b": NaN}\n', *named, name="n.jsonl"
    )
    assert "no line holds an example" in given("\n \n", *named, name="e.jsonl")
    assert "no line holds an example" in given(",,\n,,\n", *named, name="e.csv")
    assert "line 2: a JSON object was wanted" in given('{"a": "x", "b": 1}\n[1]\n', *named, name="b.jsonl")
    assert "no such file" in refused(tmp_path / "none.csv", *named, "--model", model_folder, "-o", tmp_path / "out")
    (tmp_path / "dev.csv").write_text("a,b\nx,3\n")
    assert "line 2, column 'b': one of the training file's classes was wanted (1, 2), got '3'" in given(
        "a,b\nx,1\ny,2\n", *named, "--dev", tmp_path / "dev.csv", name="d.csv"
    )
    assert not (tmp_path / "out").exists()


def test_bad_options_are_refused(stsb, model_folder, tmp_path):
    def given(*options, train=stsb, model=model_folder):
        return refused(train, "--model", model, "-o", tmp_path / "out", *options)

    task = ("--task", "stsb")
    assert "65 samples are asked for, the file has 64" in given(*task, "--samples", 65).replace(",", ",")
    assert "no such method; there are head" in given(*task, "--method", "dora")
    assert "'width=3' is no option of deeplora" in given(*task, "--method", "deeplora:width=3")
    assert "rank must be an integer of at least 1, got '0'" in given(*task, "--method", "deeplora:rank=0")
    assert "--gamma: none of the chosen methods takes it" in given(*task, "--method", "lora", "--gamma", 1)
    assert "--text and --label name the columns" in given(train=stsb / "sts-train.csv")
    assert "holds none of train.tsv" in given("--task", "rte")
    assert "all by name, or all by number" in given("--text", "a", "--label", "2", train=stsb / "sts-train.csv")
    assert "nothing is downloaded" in given(*task, model="bert-base-uncased")
    assert "rank must be even" in given(*task, "--method", "deeplora-paper", "--rank", 3)
    assert "rank 33 is larger than" in given(*task, "--method", "lora:rank=33")
    occupied = tmp_path / "mine"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("precious")
    assert "the folder is not empty" in refused(stsb, *task, "--model", model_folder, "-o", occupied)
    if not torch.cuda.is_available():
        assert "doctor" in given(*task, "--device", "cuda")


def test_incomplete_model_folders_are_refused(stsb, model_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()

    def given():
        return refused(stsb, "--task", "stsb", "--model", folder, "-o", tmp_path / "out")

    assert "no config.json" in given()
    (folder / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    assert "no model.safetensors: no weights" in given()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "could run code" in given()
    (folder / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes())
    assert "no tokenizer" in given()
    (folder / "vocab.txt").write_bytes((model_folder / "vocab.txt").read_bytes())
    (folder / "model.safetensors").write_bytes(b"broken")
    assert "could not load" in given()


def test_samples_and_batches():
    examples = data.Examples(tuple((str(i),) for i in range(50)), np.arange(50.0), "regression")
    small, large = (data.subsample(examples, count, 3) for count in (8, 20))
    assert large.texts[:8] == small.texts
    assert len(set(large.texts)) == 20
    assert data.subsample(examples, 20, 4).texts != large.texts
    epoch = [data.batch_indices(step, 50, 16, 0) for step in range(3)]
    assert len({i for batch in epoch for i in batch}) == 48
    assert data.batch_indices(3, 50, 16, 0) != epoch[0]
    assert sorted(data.batch_indices(7, 5, 16, 0)) == list(range(5))
    train, dev = data.split(examples, 0.2)
    assert len(dev) == 10
    assert {*train.texts, *dev.texts} == set(examples.texts)


@pytest.mark.skipif(not (DATA / "stsb").is_dir(), reason=f"real data not at {DATA}; set LOWRANK_DATA")
def test_the_real_benchmark_is_read():
    train, dev = data.find_files(DATA / "stsb", "stsb", None)
    layouts = data.TASKS["stsb"].layouts
    examples = data.read_examples(train, layouts)
    assert len(examples) == 5749
    assert len(data.read_examples(str(dev), layouts)) == 1500
    assert examples.texts[0] == ("A plane is taking off.", "An air plane is taking off.")
    assert (examples.labels.min(), examples.labels.max()) == (0, 5)

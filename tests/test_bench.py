"""The benches: they run, refuse a wrong contender, only ever append, and their tables and figures follow the rows."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GPU_BENCHES = ("three_factor_cuda", "completion_cuda", "encoder_cuda")
NO_GPU = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="bench/ is not at hand: not a source checkout")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module(f"bench.{name}")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("harness", monkeypatch)


def session(harness: ModuleType, out: Path) -> Any:
    return harness.Session(out, quick=True, say=lambda text: None)


def square_contenders(harness: ModuleType, wrong: bool) -> tuple[list[Any], dict[str, torch.Tensor]]:
    x = torch.arange(1.0, 9.0)

    def contender(name: str, factor: float, **options: Any) -> Any:
        return harness.Contender(name, lambda threads: lambda: {"y": factor * x * x}, **options)

    ours = contender("ours", 1.001 if wrong else 1.0, ours=True)
    return [contender("plain", 1.0, plain=True), ours], {"y": x.double().square()}


# ---------------------------------------------------------------------- the whole run


def test_quick_run_ends_and_its_rows_are_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    out = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "bench", "--quick", "--out", str(out)]
    environment = os.environ | {"LOWRANK_DATA": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    table = load("rows", monkeypatch)
    rows = table.read_rows(out)
    assert list(rows[0]) == table.COLUMNS
    assert {row["bench"] for row in rows} >= {"completion", "three_factor", "training", *GPU_BENCHES[:2], "ceilings_cuda"}
    for row in rows:
        for column in ("date", "revision", "dirty", "machine", "simd", "python", "torch", "package", "case", "contender"):
            assert row[column], (column, row)
        assert row["median_ms"] or row["value"], row
        assert row["met"] in (("yes", "no") if row["bar"] else ("",)), row
        if NO_GPU and row["bench"].endswith("_cuda"):  # a rehearsal says so, and has the CPU's machine and SIMD level
            assert "CPU rehearsal" in row["case"], row
            assert not row["simd"].startswith("sm_"), row
    names = {row["contender"] for row in rows}
    assert {"autograd COO", "hand-written COO", "dense", "lowrank_kernels, autograd"} <= names
    assert {"frozen linear", "eager chain", "addmm chain", "lowrank_kernels"} <= names


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_the_table_holds_every_row(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rich: bool
) -> None:
    if rich:
        pytest.importorskip("rich", reason="tables need rich, of lowrank-kernels[all]")
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    s = session(harness, tmp_path / "rows.csv")
    s.record("completion", "squares", "ours", median_ms=1.25, ratio=2.0, bars=[harness.Bar("ratio", 1.5, at_least=True)])
    s.fail("cubes: wrong")
    load("rows", monkeypatch).print_table(s)
    printed = capsys.readouterr().out
    for cell in ("squares", "ours", "1.25", "ratio >= 1.5", "yes", "wrong: cubes: wrong"):
        assert cell in printed


def test_a_machine_without_git_has_unknown_revisions(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LRK_REVISION", raising=False)
    assert harness.machine_facts()["revision"] == "unknown"
    monkeypatch.setenv("LRK_REVISION", "0123456789abcdef")
    assert harness.machine_facts()["revision"] == "0123456"


# ---------------------------------------------------------------------- correctness comes first


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_a_wrong_contender_gets_no_row_and_ends_the_run_with_an_error(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    pytest.importorskip("rich", reason="tables need rich, of lowrank-kernels[all]")
    contenders, oracle = square_contenders(harness, wrong)
    completion = load("bench_completion", monkeypatch)
    monkeypatch.setitem(completion.PARTS, "squares", lambda s: s.compare("completion", "squares", contenders, oracle=oracle))
    out = tmp_path / "rows.csv"
    arguments = ["--quick", "--only", "completion.squares", "--out", str(out)]
    assert load("__main__", monkeypatch).main(arguments) == (1 if wrong else 0)
    read = load("rows", monkeypatch).read_rows
    assert [row["contender"] for row in read(out)] == (["plain"] if wrong else ["plain", "ours"])


def test_ours_may_be_off_by_no_more_than_the_rule_even_where_others_may(harness: ModuleType, tmp_path: Path) -> None:
    x = torch.arange(1.0, 9.0)
    oracle = {"y": x.double()}

    def contender(name: str, **options: Any) -> Any:
        return harness.Contender(name, lambda threads: lambda: {"y": x * (1 + 2e-5)}, **options)

    s = session(harness, tmp_path / "rows.csv")
    exact = harness.Contender("plain", lambda threads: lambda: {"y": x}, plain=True)
    s.compare("completion", "rule", [exact, contender("other"), contender("ours", ours=True)], oracle=oracle)
    assert [row["contender"] for row in s.rows] == ["plain", "other"]
    assert len(s.errors) == 1
    assert "ours" in s.errors[0]
    assert "y is off by" in s.errors[0]


@pytest.mark.parametrize(
    ("got", "complaint"),
    [
        ({}, "no output"),
        ({"y": torch.full((3,), float("nan"))}, "relative error inf"),
        ({"y": torch.ones(2)}, "relative error inf"),
    ],
    ids=["none", "nan", "shape"],
)
def test_results_that_cannot_be_right_are_refused(harness: ModuleType, got: dict[str, torch.Tensor], complaint: str) -> None:
    assert complaint in harness.judge(got, {"y": torch.ones(3, dtype=torch.float64)}, "float32", {})[1]


def test_a_contender_that_fails_is_an_error_unless_its_tools_may_be_missing(harness: ModuleType, tmp_path: Path) -> None:
    def broken(threads: int) -> Any:
        raise RuntimeError("no compiler")

    contenders, oracle = square_contenders(harness, wrong=False)
    s = session(harness, tmp_path / "rows.csv")
    s.compare("completion", "squares", [*contenders, harness.Contender("tools", broken, optional=True)], oracle=oracle)
    assert (s.errors, len(s.skipped)) == ([], 1)
    s.compare("completion", "squares", [*contenders, harness.Contender("broken", broken)], oracle=oracle)
    assert "no compiler" in s.errors[0]


def test_a_bar_is_judged_on_its_quantity(harness: ModuleType, tmp_path: Path) -> None:
    s = session(harness, tmp_path / "rows.csv")
    bars = [harness.Bar("RMSE", 0.87), harness.Bar("ms", 1500.0)]
    shared = {"metric": "RMSE", "bars": bars}
    assert s.record("training", "a", "x", value=0.87, median_ms=1000.0, **shared)["met"] == "yes"
    assert s.record("training", "a", "x", value=0.86, median_ms=2000.0, **shared)["met"] == "no"
    assert s.record("training", "a", "x", value=0.86, **shared)["met"] == "no"  # not measured is not met
    assert s.rows[0]["bar"] == "RMSE <= 0.87; ms <= 1500"


def test_the_baseline_is_the_fastest_of_those_named(harness: ModuleType, tmp_path: Path) -> None:
    x = torch.ones(4)

    def contender(name: str, loops: int, **options: Any) -> Any:
        def run() -> dict[str, torch.Tensor]:
            y = x
            for _ in range(loops):
                y = y * 1.0
            return {"y": y}

        return harness.Contender(name, lambda threads: run, **options)

    s = session(harness, tmp_path / "rows.csv")
    ours = contender("ours", 1, ours=True)
    contenders = [contender("slow", 5000), contender("slower", 20000), contender("unnamed", 500), ours]
    s.compare("completion", "loops", contenders, oracle={"y": x.double()}, against=("slow", "slower"))
    rows = {row["contender"]: row for row in s.rows}
    assert {row["baseline"] for row in s.rows} == {"slow"}
    assert rows["slow"]["ratio"] == pytest.approx(1.0)
    assert rows["slower"]["ratio"] < 1 < rows["ours"]["ratio"]
    assert "fastest other: unnamed" in rows["ours"]["note"]


def test_rows_tell_their_time_over_another_contender(harness: ModuleType, tmp_path: Path) -> None:
    x = torch.ones(4)

    def contender(name: str, loops: int, **options: Any) -> Any:
        return harness.Contender(
            name, lambda threads: lambda: {"y": torch.stack([x * 1.0 for _ in range(loops)])[0]}, **options
        )

    s = session(harness, tmp_path / "rows.csv")
    contenders = [contender("frozen", 500), contender("chain", 5000), contender("ours", 2000, ours=True)]
    bars = [("ours", 1, harness.Bar("over frozen", 1e6)), ("ours", 1, harness.Bar("ratio", 1e-6, at_least=True))]
    s.compare("three_factor", "loops", contenders, oracle={"y": x.double()}, against=("chain",), over="frozen", bars=bars)
    rows = {row["contender"]: row for row in s.rows}
    assert {row["metric"] for row in s.rows} == {"over frozen"}
    assert rows["frozen"]["value"] == 1
    assert rows["ours"]["value"] == pytest.approx(rows["ours"]["median_ms"] / rows["frozen"]["median_ms"])
    assert rows["ours"]["ratio"] == pytest.approx(rows["chain"]["median_ms"] / rows["ours"]["median_ms"])
    assert (rows["ours"]["met"], rows["chain"]["met"]) == ("yes", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("fault", [None, "dx", "dleft", "dcore", "dright"])
def test_a_gradient_of_another_dropout_mask_is_refused(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: str | None, dtype: torch.dtype
) -> None:
    """The mask is the contender's own: the check knows only that forward and backward must have used the same one."""
    bench = load("bench_three_factor", monkeypatch)
    torch.manual_seed(2)  # two masks whose updates differ along dy
    case = bench.Case(33, 48, 40, 16, dropout_p=0.5, dtype=dtype)
    run = bench.runner(case, bench.eager)(1)
    result, other = dict(zip(bench.ALL, run(), strict=True)), dict(zip(bench.ALL, run(), strict=True))
    if fault:
        result[fault] = other[fault]
    got = bench.named(case)(tuple(result.values()))
    complaint = harness.judge(got, bench.oracle(case), str(dtype).removeprefix("torch."), {})[1]
    assert ("masked has relative error" in complaint) if fault else complaint == ""


def test_a_layer_that_drops_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_three_factor", monkeypatch)
    case = bench.Case(33, 48, 40, 16, dropout_p=0.1)
    result = bench.runner(case, bench.eager)(1)()
    with pytest.raises(ValueError, match=r"the dropped update is .*e-0. times the whole one"):
        bench.named(case)((bench.frozen(case, case.x), *result[1:]))


def test_peak_memory_sees_what_a_step_allocates(harness: ModuleType) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not report the high-water mark of memory")
    arguments = ("400", "300", "100000", "32")
    peak = harness.peak_memory("bench.bench_completion", "memory_probe", "hand-written COO", *arguments)
    assert 2 * 12.8 < peak < 8 * 12.8  # gathered rows of 1e5 x 32 float32 numbers are 12.8 MB, and there are several


# ---------------------------------------------------------------------- benches of a GPU


@pytest.fixture
def gpu_session(harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rehearsal: the session of the GPU benches on the CPU."""
    cuda = load("cuda", monkeypatch)
    parent = session(harness, tmp_path / "rows.csv")
    monkeypatch.setattr(cuda, "why_no_gpu", lambda: "none wanted")
    return cuda.gpu_session(parent)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_its_benches_are_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="tables need rich, of lowrank-kernels[all]")
    out = tmp_path / "rows.csv"
    assert load("__main__", monkeypatch).main(["--only", *GPU_BENCHES, "--out", str(out)]) == 0
    assert not out.exists()
    text = capsys.readouterr().out
    for name in ("three_factor_cuda.barred", "completion_cuda.sizes", "encoder_cuda.autocast"):
        assert f"skipped: {name}: no GPU that torch" in text


def test_the_time_budget_leaves_cases_out_and_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="tables need rich, of lowrank-kernels[all]")
    arguments = ["--quick", "--only", *GPU_BENCHES, "--out", str(tmp_path / "rows.csv"), "--seconds", "0"]
    assert load("__main__", monkeypatch).main(arguments) == 0
    text = capsys.readouterr().out
    assert "skipped: three_factor_cuda.barred: left out" in text
    assert "skipped: encoder_cuda.autocast: left out" in text


def test_every_set_of_a_gpu_case_is_called_and_the_first_one_last(gpu_session: Any, harness: ModuleType) -> None:
    called: list[int] = []
    x = torch.ones(3)

    def contender(place: int) -> Any:
        def run() -> dict[str, torch.Tensor]:
            called.append(place)
            return {"y": x}

        return harness.Contender("ours", lambda threads: run, ours=True)

    sets = [[contender(place)] for place in range(3)]
    gpu_session.compare_sets("three_factor_cuda", "sets", sets, oracle=lambda: {"y": x.double()}, graph=True)
    assert called[:7] == [0, 1, 2, 0, 1, 2, 0]  # the check, then whole rounds
    (row,) = [row for row in gpu_session.rows if row["contender"] == "ours"]
    assert row["case"] == "sets, CPU rehearsal of graph, cold"
    assert row["threads"] == ""


@pytest.mark.parametrize("when", ["made", "called", "oracle"])
def test_out_of_memory_skips_the_row_and_the_run_goes_on(gpu_session: Any, harness: ModuleType, when: str) -> None:
    x = torch.ones(3)

    def exhausted() -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def make(threads: int) -> Any:
        return exhausted() if when == "made" else exhausted if when == "called" else lambda: {"y": x}

    good = harness.Contender("good", lambda threads: lambda: {"y": x}, plain=True)
    oracle = exhausted if when == "oracle" else lambda: {"y": x.double()}
    sets = [[good, harness.Contender("large", make)]]
    gpu_session.compare_sets("completion_cuda", "memory", sets, oracle=oracle, graph=False)
    names = [row["contender"] for row in gpu_session.rows if row["bench"] == "completion_cuda"]
    assert (names, gpu_session.errors) == ([] if when == "oracle" else ["good"], [])
    assert "out of memory: CUDA out of memory" in gpu_session.skipped[-1][1]


def test_a_wrong_contender_gets_no_time_on_a_gpu(gpu_session: Any, harness: ModuleType) -> None:
    contenders, oracle = square_contenders(harness, wrong=True)
    gpu_session.compare_sets("completion_cuda", "squares", [contenders], oracle=lambda: oracle, graph=True)
    names = [row["contender"] for row in gpu_session.rows if row["bench"] == "completion_cuda"]
    assert (names, len(gpu_session.errors)) == (["plain"], 1)


def test_peak_memory_is_judged_against_another_contender(gpu_session: Any, harness: ModuleType) -> None:
    x = torch.ones(3)
    ours, other = (harness.Contender(name, lambda threads: lambda: {"y": x}, ours=name == "ours") for name in ("ours", "other"))
    options = {"oracle": lambda: {"y": x.double()}, "graph": False, "memory": ("ours", "other")}
    for peak in (90.0, 110.0):
        gpu_session.compare_sets("encoder_cuda", f"{peak}", [[other, ours]], peaks={"ours": peak, "other": 100.0}, **options)
    judged = [(row["bar"], row["met"]) for row in gpu_session.rows if row["contender"] == "ours"]
    assert judged == [("peak MB <= 100", "yes"), ("peak MB <= 100", "no")]


def test_poison_reaches_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = torch.ones(2, requires_grad=True)
    tensors = [leaf * 2, torch.ones(3, 2).t(), torch.ones(1)]
    load("cuda", monkeypatch).poison((tensors[0], [tensors[1], None], {"y": tensors[2]}))
    assert all(bool(torch.isnan(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("name", ["y", "dx"])
def test_projections_see_one_wrong_row(harness: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where whole float64 products would take long; the wrong row is none of those compared whole."""
    bench = load("bench_three_factor", monkeypatch)
    case = bench.Case(300, 48, 40, 16, sampled=True)
    result = dict(zip(bench.ALL, bench.runner(case, bench.chain)(1)(), strict=True))
    assert harness.judge(bench.named(case)(tuple(result.values())), case.exact, "float32", {})[1] == ""
    compared = set(case.sample(40)[0].tolist())
    row = next(row for row in range(case.tokens) if row not in compared)
    result[name] = result[name].detach().clone()
    result[name][row, 3] += 1
    assert f"{name} sums" in harness.judge(bench.named(case)(tuple(result.values())), case.exact, "float32", {})[1]


def test_drawn_cells_are_distinct_sorted_and_skewed(monkeypatch: pytest.MonkeyPatch) -> None:
    row, col = load("bench_completion", monkeypatch).drawn_cells(300, 200, 15_000, torch.Generator().manual_seed(0))
    cells = row * 200 + col
    assert bool((cells[1:] > cells[:-1]).all())
    assert (cells.numel(), int(row.min()) >= 0, int(row.max()) < 300, int(col.max()) < 200) == (15_000, True, True, True)
    counts = torch.bincount(col, minlength=200).sort(descending=True).values
    assert int(counts[0]) > 2 * int(counts[100])


@pytest.mark.parametrize("fault", ["loss", "adapters"])
def test_an_encoder_that_does_not_train_is_refused(gpu_session: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    pytest.importorskip("transformers", reason="needs transformers, of lowrank-kernels[all]")
    bench = load("bench_encoder_cuda", monkeypatch)
    training = bench.Training(gpu_session, torch.float32)
    adapted = bench.deep_lora(training)
    if fault == "loss":
        monkeypatch.setattr(training.optimizer, "step", lambda: None)
    else:
        frozen = {id(p) for parameters in adapted.values() for p in parameters}
        training.optimizer = torch.optim.AdamW(
            [p for p in training.model.parameters() if p.requires_grad and id(p) not in frozen]
        )
    with pytest.raises(ValueError, match="does not fall" if fault == "loss" else "12 adapted layers did not change"):
        training.check(adapted, training.layers)


# ---------------------------------------------------------------------- rows


def test_appending_keeps_what_was_there(harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "folder" / "rows.csv"
    session(harness, out).record("completion", "a, with a comma", 'b "quoted"', value=1.0, metric="x")
    before = out.read_text()
    session(harness, out).record("completion", "second", "b", value=2.0, metric="x")
    assert out.read_text().startswith(before)
    rows = load("rows", monkeypatch).read_rows(out)
    assert [row["case"] for row in rows] == ["a, with a comma", "second"]
    assert rows[0]["contender"] == 'b "quoted"'
    assert [p.name for p in out.parent.iterdir()] == ["rows.csv"]  # no temporary file stays


def test_a_file_with_other_columns_is_left_alone(harness: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    out.write_text("something,else\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        session(harness, out).record("completion", "a", "b")
    assert out.read_text() == "something,else\n1,2\n"


def test_an_unknown_column_is_refused(harness: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no column"):
        session(harness, tmp_path / "rows.csv").record("completion", "a", "b", milliseconds=1.0)


@pytest.mark.parametrize("name", ["nothing", "completion.nothing"])
def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        load("__main__", monkeypatch).main(["--only", name])
    assert stop.value.code == 2
    assert "nothing" in capsys.readouterr().err


# ---------------------------------------------------------------------- tables and figures


@pytest.fixture
def project(harness: ModuleType, tmp_path: Path) -> dict[str, Path]:
    """A CSV file with an old and a new row, and two files with a block."""
    s = session(harness, tmp_path / "rows.csv")
    case = "1e5 entries, 943 x 1682, k=16"
    for ours_ms in (5.0, 0.25):  # the second run is the newer one
        s.record("completion", case, "dense", threads=1, median_ms=8.0, baseline="dense", ratio=1.0)
        s.record(
            "completion",
            case,
            "lowrank_kernels, autograd",
            threads=1,
            median_ms=ours_ms,
            baseline="dense",
            ratio=8.0 / ours_ms,
            bars=[harness.Bar("ratio", 20.0, at_least=True)],
        )
    tiny = "50 entries, 30 x 20, k=16"
    s.record("completion", tiny, "dense", threads=1, median_ms=0.02, baseline="dense", ratio=1.0)
    s.record("completion", tiny, "lowrank_kernels, autograd", threads=1, median_ms=0.05, baseline="dense", ratio=0.4)
    s.record("training", "ratings", "lowrank_kernels", threads=2, median_ms=900.0, metric="RMSE", value=0.8654)
    layers = {"barred": (2048, 1.08), "slower": (16, 1.5), "faster": (128, 1.1)}  # over the frozen layer; a chain has 1.3
    for what, (tokens, over) in layers.items():
        for name, value in (("frozen linear", 1.0), ("eager chain", 1.4), ("addmm chain", 1.3), ("lowrank_kernels", over)):
            bars = [harness.Bar("ratio", 0.97, at_least=True)] * (name == "lowrank_kernels")
            bars += [harness.Bar("over frozen linear", 1.12)] * (what == "barred" and name == "lowrank_kernels")
            measured = {"median_ms": 10 * value, "metric": "over frozen linear", "value": value, "bars": bars}
            case = f"forward and backward, T={tokens}, 768 -> 768, k=16"
            s.record("three_factor", case, name, threads=2, baseline="addmm chain", ratio=1.3 / value, **measured)
    files = {
        "csv": s.out,
        "readme": tmp_path / "README.md",
        "details": tmp_path / "details.md",
        "figures": tmp_path / "figures",
    }
    for name in ("readme", "details"):
        files[name].write_text("# Title\n\nbefore\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    return files


def plot(monkeypatch: pytest.MonkeyPatch, project: dict[str, Path], *more: str) -> int:
    arguments = [text for name, path in project.items() for text in (f"--{name}", str(path))]
    return load("plot", monkeypatch).main([*arguments, *more])


def test_plot_writes_the_newest_rows_and_check_knows(
    monkeypatch: pytest.MonkeyPatch, project: dict[str, Path], harness: ModuleType
) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert plot(monkeypatch, project, "--check") == 1
    assert "old" in project["readme"].read_text()
    assert not project["figures"].exists()
    assert plot(monkeypatch, project) == 0
    readme = project["readme"].read_text()
    assert readme.startswith("# Title\n\nbefore\n<!-- bench:begin -->\n")
    assert readme.endswith("<!-- bench:end -->\nafter\n")
    assert "| 32x dense | ratio >= 20 | yes |" in readme
    assert "| 5 ms |" not in readme  # the older row is gone
    assert "| dense: 0.02 ms |" in readme  # what we lose is shown
    header = (
        "| layer | threads | frozen linear | eager chain | addmm chain | compiled chain | PEFT lora.Linear | lowrank_kernels |"
    )
    assert f"{header} speed | bar, set beforehand | met |" in readme
    cells = "| 2 | 10 ms | 1.4 | 1.3 |  |  | 1.08 | 1.2x addmm chain | ratio >= 0.97; over frozen linear <= 1.12 | yes |"
    assert f"T=2048, 768 -> 768, k=16 {cells}" in readme
    assert "| 1.5 | 0.867x addmm chain | ratio >= 0.97 | no |" in readme  # what we lose is shown
    details = project["details"].read_text()
    assert ("T=128," in readme, "T=128," in details) == (False, True)
    assert "RMSE 0.8654" in details
    drawn = ["completion.png", "completion_shapes.png", "quality.png", "three_factor.png"]
    assert sorted(p.name for p in project["figures"].iterdir()) == drawn
    assert plot(monkeypatch, project, "--check") == 0
    session(harness, project["csv"]).record("training", "ratings", "lowrank_kernels", threads=2, metric="RMSE", value=0.9)
    assert plot(monkeypatch, project, "--check") == 1


def test_plot_wants_one_block(monkeypatch: pytest.MonkeyPatch, project: dict[str, Path]) -> None:
    project["readme"].write_text("# Title\n")
    with pytest.raises(SystemExit, match="bench:begin"):
        plot(monkeypatch, project)
    assert project["readme"].read_text() == "# Title\n"


@pytest.fixture
def gpu_rows(harness: ModuleType, project: dict[str, Path]) -> dict[str, Path]:
    """Made-up rows as a GPU would give them, beside those of the project."""
    made_up = {
        "revision": "0000000",
        "dirty": "no",
        "machine": "made-up",
        "simd": "sm_00",
        "python": "3",
        "torch": "2",
        "package": "0",
    }
    s = harness.Session(project["csv"], quick=True, say=lambda text: None, facts=made_up)
    layer = "forward and backward, T=8192, 4096 -> 4096, k=16, bfloat16, float32 factors, graph, cold"
    for name, value in (("frozen linear", 1.0), ("addmm chain", 1.5), ("lowrank_kernels", 1.25)):
        bars = [harness.Bar("over frozen linear", 1.16)] if name == "lowrank_kernels" else []
        measured = {"median_ms": 2 * value, "metric": "over frozen linear", "value": value, "bars": bars}
        s.record("three_factor_cuda", layer, name, baseline="addmm chain", ratio=1.5 / value, **measured)
    for name, ms in (("autograd COO", 64.0), ("hand-written CSR", 32.0), ("lowrank_kernels, autograd", 4.0)):
        bars = [harness.Bar("ratio", 8.0, at_least=True)] if "lowrank" in name else []
        case = "2e7 entries, 138493 x 26744, k=16, launched, cold"
        s.record("completion_cuda", case, name, median_ms=ms, baseline="autograd COO", ratio=64.0 / ms, bars=bars)
    for name, value in (("PEFT LoRA", 1.0), ("lowrank_kernels, Deep LoRA", 0.9)):
        case, bars = "training step of an encoder, launched", [harness.Bar("over PEFT LoRA", 1.0)] * (value < 1)
        s.record(
            "encoder_cuda", case, name, median_ms=10 * value, peak_mb=700.0, metric="over PEFT LoRA", value=value, bars=bars
        )
    s.record("ceilings_cuda", "matrix product of 8 x 8, bfloat16", "torch mm", median_ms=1.0, gflops=5000.0)
    return project


def test_rows_of_a_gpu_have_tables_and_a_figure_of_their_own(
    monkeypatch: pytest.MonkeyPatch, gpu_rows: dict[str, Path]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert plot(monkeypatch, gpu_rows) == 0
    readme = gpu_rows["readme"].read_text()
    before, after = readme.split("On a GPU, made-up:")
    assert "T=8192" not in before
    assert "| 2 ms |  | 1.5 |  |  | 1.25 | 1.2x addmm chain | over frozen linear <= 1.16 | no |" in after
    assert "| 64 ms | 32 ms | 4 ms | 16x autograd COO | ratio >= 8 | yes |" in after
    assert "| 9 ms | over PEFT LoRA 0.9 | 700 | over PEFT LoRA <= 1 | yes |" in after
    assert "matrix product of 8 x 8, bfloat16: 5 TFLOP/s" in after
    assert "made-up; torch 2, Python 3, sm_00;" in after
    assert "made by `make gpu`" in after
    assert "### made-up, completion_cuda: 2e7 entries" in gpu_rows["details"].read_text()
    assert "gpu.png" in [p.name for p in gpu_rows["figures"].iterdir()]
    assert plot(monkeypatch, gpu_rows, "--check") == 0


def test_without_rows_of_a_gpu_there_is_no_word_of_one(monkeypatch: pytest.MonkeyPatch, project: dict[str, Path]) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert plot(monkeypatch, project) == 0
    assert "GPU" not in project["readme"].read_text() + project["details"].read_text()
    assert "gpu.png" not in [p.name for p in project["figures"].iterdir()]


def test_the_short_text_has_the_bars_first_and_at_most_40_lines(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, gpu_rows: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    s = session(harness, gpu_rows["csv"])
    for tokens in range(60):
        s.record("three_factor", f"inference, T={tokens}", "lowrank_kernels", threads=1, median_ms=1.0)
    assert load("plot", monkeypatch).main(["--short", str(gpu_rows["csv"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 40
    assert "rows with a bar meet it" in lines[0]
    own = [i for i, line in enumerate(lines) if "<= 1.16" in line or "ratio >= 8" in line or "PEFT LoRA <= 1" in line]
    assert len(own) == 3
    assert max(own) < min(i for i, line in enumerate(lines) if "inference" in line)
    assert lines[-1].endswith("more rows")
    assert load("plot", monkeypatch).main(["--short", str(gpu_rows["csv"].with_name("none.csv"))]) == 1

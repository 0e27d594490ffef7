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


def test_quick_run_ends_and_its_rows_are_complete(harness: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("sklearn")
    out = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "bench", "--quick", "--out", str(out)]
    environment = os.environ | {"LOWRANK_DATA": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = harness.read_rows(out)
    assert list(rows[0]) == harness.COLUMNS
    assert {row["bench"] for row in rows} >= {"completion", "three_factor", "training"}
    for row in rows:
        for column in ("date", "revision", "dirty", "machine", "simd", "python", "torch", "package", "case", "contender"):
            assert row[column], (column, row)
        assert row["median_ms"] or row["value"], row
        assert row["met"] in (("yes", "no") if row["bar"] else ("",)), row
    names = {row["contender"] for row in rows}
    assert {"autograd COO", "hand-written COO", "dense", "lowrank_kernels, autograd"} <= names
    assert {"frozen linear", "eager chain", "addmm chain", "lowrank_kernels"} <= names


# ---------------------------------------------------------------------- correctness comes first


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_a_wrong_contender_gets_no_row_and_ends_the_run_with_an_error(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    pytest.importorskip("rich")
    contenders, oracle = square_contenders(harness, wrong)
    completion = load("bench_completion", monkeypatch)
    monkeypatch.setitem(completion.PARTS, "squares", lambda s: s.compare("completion", "squares", contenders, oracle=oracle))
    out = tmp_path / "rows.csv"
    arguments = ["--quick", "--only", "completion.squares", "--out", str(out)]
    assert load("__main__", monkeypatch).main(arguments) == (1 if wrong else 0)
    assert [row["contender"] for row in harness.read_rows(out)] == (["plain"] if wrong else ["plain", "ours"])


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


# ---------------------------------------------------------------------- rows


def test_appending_keeps_what_was_there(harness: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "rows.csv"
    session(harness, out).record("completion", "a, with a comma", 'b "quoted"', value=1.0, metric="x")
    before = out.read_text()
    session(harness, out).record("completion", "second", "b", value=2.0, metric="x")
    assert out.read_text().startswith(before)
    rows = harness.read_rows(out)
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
    pytest.importorskip("matplotlib")
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

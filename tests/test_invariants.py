"""The paper's statements hold on several examples, every check can fail, and the command says so."""

import json
import math

import pytest
import torch

from lowrank_kernels import invariants
from lowrank_kernels.factorization import DeepFactorization, Recorder, SquaredLoss, train
from lowrank_kernels.invariants import CHECKS, Statement

NAMES = [check.__name__ for check in CHECKS]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("check", CHECKS, ids=NAMES)
def test_holds(check, seed):
    statement = check(seed)
    assert statement.holds, statement
    assert math.isfinite(statement.residual)


@pytest.mark.parametrize("check", CHECKS, ids=NAMES)
def test_can_fail(check):
    """A spoiled model fails, and by a clear margin: the tolerance is not a matter of luck."""
    good, bad = check(0), check(0, broken=True)
    assert not bad.holds, bad
    if good.at_least:
        assert bad.residual < 0.5 * good.tolerance
    else:
        assert not bad.residual <= 10 * good.tolerance


def test_names_are_distinct_and_everything_has_a_source():
    statements = [check(0) for check in CHECKS]
    assert len({statement.name for statement in statements}) == len(CHECKS) == len(set(NAMES))
    assert all(statement.source for statement in statements)
    assert [s.name for s in invariants.verify(0)] == [s.name for s in statements]


def test_a_check_does_not_depend_on_the_one_before():
    first = CHECKS[0](0, broken=True)
    CHECKS[5](3)
    assert CHECKS[0](0).holds
    assert CHECKS[0](0, broken=True) == first


def test_threads_are_as_before():
    torch.set_num_threads(2)
    CHECKS[-1](0)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("at_least", [False, True])
def test_nan_does_not_hold(at_least):
    statement = Statement("name", "source", math.nan, 1.0, at_least)
    assert not statement.holds
    assert json.loads(json.dumps(statement.to_dict()))["residual"] is None


def test_the_bound_of_proposition_2_2_needs_a_small_rate_but_the_equality_does_not():
    """Where eta prod_{k != l} eps_k^2 > 2, |rho_l| grows at first: the distance exceeds sqrt(d - 2r) prod eps, in a run that
    converges."""
    g = torch.Generator().manual_seed(0)
    d, scales, rate = 16, (0.1, 1.5), 1.0
    u, v = (torch.linalg.qr(torch.randn(d, 1, generator=g, dtype=torch.float64)).Q for _ in range(2))
    loss = SquaredLoss(0.5 * u @ v.t())
    model = DeepFactorization(2, d, init_scale=scales, generator=g)
    recorder = Recorder(twin=model.compress(loss, 2))
    result = train(model, loss, learning_rate=rate, steps=300, recorder=recorder)
    recording = recorder.recording()
    assert result.loss < 1e-10
    assert abs(recording["distance"] - recording["distance_predicted"]).max() < 1e-12
    ratio = recording["distance"] / (math.sqrt(d - 2) * math.prod(scales))
    assert 1.6 < ratio.max() < 1.7
    assert ratio[-1] < 1e-10


# ---------------------------------------------------------------------- the command


@pytest.fixture
def command():
    pytest.importorskip("rich", reason="tables need rich, of lowrank-kernels[all]")
    testing = pytest.importorskip("click.testing", reason="the command line needs click")
    cli = pytest.importorskip("lowrank_kernels.cli", reason="the command line needs lowrank-kernels[all]")
    return lambda *arguments: testing.CliRunner().invoke(cli.group, ["verify", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def few(monkeypatch):
    """Two statements only: what is tested here is the command."""
    monkeypatch.setattr(invariants, "CHECKS", [CHECKS[-1], CHECKS[12]])


def test_command_prints_every_statement_and_writes_json(command, few, tmp_path):
    path = tmp_path / "v.json"
    result = command("--seed", 3, "--json", path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["statement", "source", "residual", "wanted", "holds"]
    assert [line.split()[-1] for line in lines[1:3]] == ["yes", "yes"]
    assert lines[3].startswith("2 of 2 statements hold (seed 3, ")
    written = json.loads(path.read_text())
    assert written["seed"] == 3
    assert [s["name"] for s in written["statements"]] == [s.name for s in invariants.verify(3)]
    assert all(s["holds"] and s["residual"] <= s["tolerance"] for s in written["statements"])


def test_command_exits_with_1_where_a_statement_fails(command, few, monkeypatch, tmp_path):
    monkeypatch.setattr(invariants, "CHECKS", [CHECKS[-1], lambda seed: CHECKS[12](seed, broken=True)])
    result = command("--json", tmp_path / "v.json")
    assert result.exit_code == 1
    assert [line.split()[-1] for line in result.stdout.splitlines()[1:3]] == ["yes", "NO"]
    assert "1 of 2 statements hold" in result.stdout
    assert [s["holds"] for s in json.loads((tmp_path / "v.json").read_text())["statements"]] == [True, False]


def test_command_refuses_before_the_work(command, few, tmp_path):
    path = tmp_path / "v.json"
    path.write_text("mine")
    result = command("--json", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {path}: exists already; pass --overwrite (overwrite=True) to replace it\n"
    assert path.read_text() == "mine"
    assert command("--json", path, "--overwrite").exit_code == 0
    assert json.loads(path.read_text())["seed"] == 0
    result = command("--json", tmp_path / "none" / "v.json")
    assert result.exit_code == 2
    assert "mkdir -p" in result.stderr
    assert command("--seed", -1).exit_code == 2


def test_table_for_a_terminal_has_the_same_cells(monkeypatch, capsys):
    pytest.importorskip("rich", reason="tables need rich, of lowrank-kernels[all]")
    cli_verify = pytest.importorskip("lowrank_kernels.cli_verify", reason="the command line needs lowrank-kernels[all]")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    statement = Statement("U^T W V [is] diagonal", "Theorem 2.1", 2e-3, 1e-10)
    cli_verify.show([statement])
    out = capsys.readouterr().out
    assert "U^T W V [is] diagonal" in out
    assert "2.00e-03" in out
    assert "NO" in out

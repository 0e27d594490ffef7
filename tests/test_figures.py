"""``lowrank-kernels figures``: every figure, small, its numbers against the theory and the captions; the refusals."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest

for library in ("matplotlib", "polars", "sklearn", "click"):
    pytest.importorskip(library, reason="figures need lowrank-kernels[all]")

import torch  # noqa: E402
from click.testing import CliRunner, Result  # noqa: E402

from lowrank_kernels import cli, figures  # noqa: E402
from lowrank_kernels.figures import Request, matrices, networks  # noqa: E402

Table = dict[str, list[float]]
MADE = [name for name, figure in figures.FIGURES.items() if figure.missing(Request()) is None]  # the other is fine-tuning's


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.group, ["figures", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All figures, made once by the command."""
    out = tmp_path_factory.mktemp("figures") / "made" / "here"
    result = run("--quick", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("**") == 2 * len(MADE) == 2 * (len(figures.FIGURES) - 1)
    assert "adaptation is left out: it fine-tunes a model: --train FOLDER" in result.stderr
    return out


def table(folder: Path, name: str) -> dict[str, list[str]]:
    with open(folder / f"{name}.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return {column: [row[column] for row in rows] for column in rows[0]}


def numbers(folder: Path, name: str, column: str, **fixed: object) -> list[float]:
    """A column of a CSV in the rows where other columns have these values."""
    found = table(folder, name)
    keep = [all(found[key][i] == str(value) for key, value in fixed.items()) for i in range(len(found[column]))]
    return [float(value or "nan") for value, kept in zip(found[column], keep, strict=True) if kept]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------------- what is made


@pytest.mark.parametrize("name", MADE)
def test_a_figure_is_a_picture_numbers_and_a_caption(folder: Path, name: str) -> None:
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    columns = table(folder, name)
    assert len({len(column) for column in columns.values()}) == 1
    assert len(next(iter(columns.values()))) > 5
    caption = (folder / f"{name}.md").read_text()
    assert figures.FIGURES[name].source in caption
    assert "Seed 0" in caption
    assert "nan" not in caption


def test_depth(folder: Path) -> None:
    """Two factors overfit as they get wider, three do not."""
    at = {
        (layers, width): mean(numbers(folder, "depth", "unseen_error", depth=layers, width=width))
        for layers in (2, 3)
        for width in (4, 40)
    }
    assert at[2, 40] > 1e3 * at[2, 4]
    assert at[3, 40] < 1e-2 * at[2, 40]
    steps = [mean(numbers(folder, "depth", "steps", depth=3, width=width)) for width in (4, 40)]
    assert steps[0] > 1.5 * steps[1]


def test_spectrum(folder: Path) -> None:
    """The invariant subspace stays, the repeated value follows equation (6), the learning block moves."""
    rho, repeated = numbers(folder, "spectrum", "rho"), numbers(folder, "spectrum", "singular_value_15")
    assert max(abs(a - b) for a, b in zip(rho, repeated, strict=True)) < 1e-10
    angles = {
        name: [a for a in numbers(folder, "spectrum", name) if not math.isnan(a)] for name in ("angle_invariant", "angle_top")
    }
    assert max(angles["angle_invariant"]) < 1e-8
    assert max(angles["angle_top"]) > 0.05
    assert numbers(folder, "spectrum", "singular_value_1")[-1] > 1.3


def test_trajectory(folder: Path) -> None:
    full, compressed = (numbers(folder, "trajectory", "train_loss", model=name) for name in ("full width", "compressed"))
    assert len(full) == len(compressed)
    assert all(abs(a - b) <= 1e-6 * a + 1e-12 for a, b in zip(full, compressed, strict=True))
    assert full[-1] <= 1e-10


def test_completion(folder: Path) -> None:
    """gamma = 0 stalls, gamma = 0.01 reaches what full width reaches."""
    ends = {
        name: numbers(folder, "completion", "relative_error", model=name)[-1] for name in table(folder, "completion")["model"]
    }
    full, frozen, ours = ends.values()
    assert full < 1e-3
    assert ours < 1e-4
    assert frozen > 0.1


def test_the_published_completion_is_the_source_s_and_a_twentieth_of_the_time() -> None:
    """The numbers behind docs/figures.md, d = 1000: relative error 1e-5 in at most 1/20 of the full width's time."""
    made = Path(__file__).parent.parent / "docs" / "figures" / "made"
    assert "d = 1000" in (made / "completion.md").read_text()
    full = numbers(made, "completion", "seconds", model="full width")[-1]
    assert numbers(made, "completion", "relative_error", model="full width")[-1] < 1e-5
    ours = {name: numbers(made, "completion", name, model="compressed, gamma = 0.01") for name in ("relative_error", "seconds")}
    reached = [second for error, second in zip(*ours.values(), strict=True) if error <= 1e-5]
    assert reached
    assert min(reached) <= full / 20


def test_narrow(folder: Path) -> None:
    assert max(numbers(folder, "narrow", "train_loss", model="compressed")) <= 1e-10
    assert set(table(folder, "narrow")["model"]) == {"compressed", "random narrow"}


def test_nonlinear(folder: Path) -> None:
    linear = numbers(folder, "nonlinear", "singular_value", activation="linear", layer=2)
    assert linear[2] > 1e-2
    assert linear[3] < 1e-6
    assert numbers(folder, "nonlinear", "singular_value", activation="relu", layer=2)[3] > 1e-2


def test_rates(folder: Path) -> None:
    losses = numbers(folder, "rates", "loss")
    assert len(losses) == 49
    assert min(losses) < 0.1 * max(losses)


def test_dimension(folder: Path) -> None:
    kept = numbers(folder, "dimension", "rank", network="Gaussian, leaky ReLU, slope -0.5")
    assert min(kept) > 0.9 * 32
    correlation = numbers(folder, "dimension", "correlation", network="Gaussian, ReLU")
    assert correlation[-1] > correlation[0]


def test_updates(folder: Path) -> None:
    """As many directions as classes hold nearly all of the update."""
    last = numbers(folder, "updates", "singular_value", step=200)
    assert len(last) == 64
    assert sum(v * v for v in last[:10]) > 0.9 * sum(v * v for v in last)
    assert numbers(folder, "updates", "accuracy", step=200)[0] > 0.9


def test_alignment(folder: Path) -> None:
    shares = numbers(folder, "alignment", "in_gradients")
    assert mean(shares[10:]) > 5 * numbers(folder, "alignment", "by_chance")[0]


@pytest.mark.parametrize("build", [matrices.spectrum, matrices.nonlinear, networks.dimension])
def test_a_seed_says_all(build: Callable[[Request], figures.Made]) -> None:
    first, again, other = (build(Request(quick=True, seed=seed)).columns for seed in (1, 1, 2))
    assert str(first) == str(again)
    assert str(first) != str(other)


def test_helpers_give_exactly_what_they_say() -> None:
    g = torch.Generator().manual_seed(0)
    assert int(torch.linalg.matrix_rank(matrices.low_rank(20, 3, g))) == 3
    assert int(matrices.observed(10, 0.333, g).sum()) == 33


# ---------------------------------------------------------------------- the command


def test_only_the_named_ones_are_made_and_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        assert run("spectrum", "--out", tmp_path).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spectrum.csv", "spectrum.md", "spectrum.png"]


def test_the_list_names_all() -> None:
    result = run("--list")
    assert result.exit_code == 0
    assert all(name in result.output for name in figures.FIGURES)


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_refusals(tmp_path: Path) -> None:
    assert "there is no figure 'fig5'; there are depth, spectrum" in refused("fig5", "--out", tmp_path)
    assert "--out FOLDER says where to" in refused("spectrum")
    assert "adaptation cannot be made: it fine-tunes a model: --train" in refused("adaptation", "--out", tmp_path)
    unknown = refused("adaptation", "--train", tmp_path, "--model", "nothing", "--out", tmp_path)
    assert "--model nothing: neither a folder nor an installed package" in unknown
    (tmp_path / "file").write_text("x")
    assert "exists and is not a folder" in refused("spectrum", "--out", tmp_path / "file")
    assert not list(tmp_path.glob("spectrum*"))

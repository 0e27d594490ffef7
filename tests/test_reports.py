"""The published reports say what the published results say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

for library in ("transformers", "peft", "matplotlib", "sklearn"):
    pytest.importorskip(library, reason="the reports need lowrank-kernels[all]")

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "data" / "finetuning"


@pytest.mark.parametrize(("module", "page"), [("finetune_report", "finetuning.md"), ("untuned_report", "untuned.md")])
def test_a_report_is_made_of_its_results(module, page, tmp_path, monkeypatch):
    if not (ROOT / "examples").is_dir() or not RESULTS.is_dir():
        pytest.skip("needs the repository's examples and results")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    made = importlib.import_module(module).write_report(RESULTS, tmp_path)
    assert (tmp_path / page) in made
    assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text()
    for picture in made[1:]:
        assert picture.stat().st_size > 10_000
    for name in ("finetune_report", "untuned_report", "adapt_digits"):
        sys.modules.pop(name, None)

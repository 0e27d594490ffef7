"""The report is data, complete, and never fails."""

import re
import sys

import pytest
import torch

from lowrank_kernels import __version__, _native, doctor
from lowrank_kernels.__main__ import main


def lines(section):
    return {line.name: line for line in doctor.report() if line.section == section}


def test_sections_and_values():
    assert list(dict.fromkeys(line.section for line in doctor.report())) == ["versions", "native", "threads", "cuda", "ops"]
    assert not any(line.name == "failed" for line in doctor.report())
    versions = lines("versions")
    assert versions["lowrank_kernels"].value == __version__
    assert versions["torch"].value == str(torch.__version__)
    assert lines("threads")["torch threads"].value == str(torch.get_num_threads())


def test_every_op_has_a_line_for_each_device():
    ops = lines("ops")
    assert {"completion on cpu", "completion on cuda"} <= set(ops)
    expected = "native" if _native.has_cpu() else "PyTorch reference"
    assert ops["completion on cpu"].value.startswith(expected)
    if not _native.has_cuda():
        assert "not built" in ops["completion on cuda"].note


def test_why_the_native_module_is_not_there(monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "unavailable", "switched off by LOWRANK_KERNELS_NATIVE=0")
    assert lines("native")["module"].value == "not loaded"
    assert "LOWRANK_KERNELS_NATIVE=0" in lines("native")["module"].note
    assert lines("cuda")["kernels"].value == "not built"


def test_older_or_newer_native_modules(monkeypatch):
    class Module:
        has_cuda = True
        cuda_architectures = "80-real;90-real"

        @staticmethod
        def cuda_info():
            return {"runtime_version": 12080, "driver": "none"}

        @staticmethod
        def simd_level():
            raise RuntimeError("broken")

    monkeypatch.setattr(_native, "_C", Module)
    monkeypatch.setattr(_native, "unavailable", "")
    assert lines("native")["compiler"].value == "unknown"
    assert lines("native")["SIMD level"].value == "unknown (broken)"
    assert lines("cuda")["runtime version"].value == "12080"
    assert "80-real" in lines("cuda")["kernels"].note


def test_a_failing_section_is_a_line(monkeypatch):
    def broken():
        raise OSError("no such thing")
        yield

    monkeypatch.setattr(doctor, "_threads", broken)
    assert lines("threads") == {"failed": doctor.Line("threads", "failed", "OSError", "no such thing")}
    assert "completion on cpu" in lines("ops")


def test_a_missing_extra_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "no-such-thing", ("cli", "nothing"))
    line = lines("versions")["no-such-thing"]
    assert (line.value, line.note) == ("not installed", "nothing: pip install lowrank-kernels[cli]")


def test_printed_without_click_and_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "click", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys, "argv", ["lowrank-kernels", "doctor"])
    main()
    out = capsys.readouterr().out
    assert "completion on cpu" in out
    assert all(section in out.splitlines() for section in ("versions", "native", "threads", "cuda", "ops"))


def test_other_commands_without_click_say_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "click", None)
    monkeypatch.setattr(sys, "argv", ["lowrank-kernels", "complete", "a.csv"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert re.search(r"needs click( and rich)?: pip install lowrank-kernels\[all\]", capsys.readouterr().err)


def test_printed_with_rich(monkeypatch, capsys):
    pytest.importorskip("rich", reason="the table needs rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    doctor.print_report([doctor.Line("cuda", "GPU", "none usable", "[not markup]")])
    assert "[not markup]" in capsys.readouterr().out

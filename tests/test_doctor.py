"""The report is data, complete, and never fails."""

import re
import sys
import types
import warnings

import pytest
import torch

from lowrank_kernels import ObservedEntries, __version__, _native, doctor
from lowrank_kernels.__main__ import main
from lowrank_kernels.ops import completion_loss, three_factor_linear


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
        assert ops["completion on cuda"].note == _native.cuda_reason() != ""


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


# ---------------------------------------------------------------------- why a GPU is not served


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU and a module built for it, in the attributes that are asked; tests change them."""

    def info():
        return {
            "device_count": 1,
            "driver_version": machine.driver,
            "runtime_version": machine.toolkit,
            "reason": machine.reason,
        }

    module = types.SimpleNamespace(has_cuda=True, cuda_architectures="80-real,86-real,90a-real,120-virtual", cuda_info=info)
    machine = types.SimpleNamespace(module=module, capability=(8, 0), driver=13000, toolkit=13000, reason="")
    monkeypatch.setattr(_native, "_C", module)
    monkeypatch.setattr(_native, "unavailable", "")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: machine.capability)
    properties = types.SimpleNamespace(name="GPU of a test", major=8, minor=0, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for function in (_native.gpu_reason, _native._gpu_serves):
        function.cache_clear()
    yield machine
    for function in (_native.gpu_reason, _native._gpu_serves):
        function.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1), (13, 0)])
def test_gpu_the_kernels_run_on(gpu, recwarn, capability):
    gpu.capability = capability
    assert _native.gpu_reason(0) == ""
    assert _native.serves(torch.device("cuda", 0))
    assert not recwarn.list
    assert lines("cuda")["kernels on GPU 0"].value == "run"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"capability": (7, 5)}, "compute capability 7.5, the kernels need 8.0; use a newer GPU"),
        ({"capability": (10, 0)}, "CMAKE_CUDA_ARCHITECTURES=100"),
        ({"capability": (9, 1)}, "compute capability 9.1, the module has code for 80-real,86-real,90a-real,120-virtual only"),
        ({"driver": 12080}, "the driver supports CUDA 12.8, the module was built with 13.0; update the driver"),
        ({"capability": (13, 0), "toolkit": 13010}, "the driver supports CUDA 13.0, the module was built with 13.1"),
        ({"driver": 0, "reason": "no CUDA driver is installed"}, "no CUDA driver is installed"),
        ({"hip": "6.2"}, "this torch is built for ROCm"),
        ({"has_cuda": False, "no_cuda": "built without CUDA: LRK_CUDA=OFF was set"}, "LRK_CUDA=OFF was set; reinstall"),
    ],
)
def test_gpu_the_kernels_do_not_run_on(gpu, monkeypatch, change, reason):
    for name, value in change.items():
        owner = torch.version if name == "hip" else gpu.module if "cuda" in name else gpu
        monkeypatch.setattr(owner, name, value, raising=False)
    with pytest.warns(UserWarning, match="PyTorch reference takes the place of the CUDA kernels on GPU 0") as caught:
        assert not _native.serves(torch.device("cuda", 0))
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert not _native.serves(torch.device("cuda", 0))
        report = lines("cuda")
    assert report["kernels on GPU 0"].value == "not run"
    assert reason in report["kernels on GPU 0"].note
    on_cuda = {name: line for name, line in lines("ops").items() if name.endswith("on cuda")}
    assert on_cuda
    assert all(line.value == "PyTorch reference" and reason in line.note for line in on_cuda.values())


def test_older_driver_of_the_same_major_version_runs_machine_code(gpu):
    gpu.toolkit = 13010
    assert _native.serves(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("code", "runs", "runs_not"),
    [
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a-real", [(9, 0)], [(8, 9), (10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (11, 0)]),
        ("100-virtual", [(10, 0), (11, 0), (12, 1)], [(9, 0)]),
        ("90a-virtual", [(9, 0)], [(10, 0)]),
        ("89", [(8, 9), (12, 0)], [(8, 6)]),
        ("native", [(8, 0)], []),
    ],
)
def test_which_gpus_run_the_code_of_an_architecture(code, runs, runs_not):
    assert all(_native._has_code(capability, code) for capability in runs)
    assert not any(_native._has_code(capability, code) for capability in runs_not)


def test_compiled_programs_never_ask_while_traced(monkeypatch):
    def serves(device):
        assert not torch.compiler.is_compiling()
        return real(device)

    real = _native.serves
    monkeypatch.setattr(_native, "serves", serves)
    x, left, core, right = torch.randn(3, 8), torch.randn(5, 2), torch.randn(1, 2, 2), torch.randn(2, 8)
    entries = ObservedEntries.from_coo([0, 2], [1, 3], [1.0, 2.0], shape=(5, 8))

    @torch.compile(backend="eager", fullgraph=True)
    def step(x, left, core, right):
        return three_factor_linear(x, None, left, core, right).sum() + completion_loss(left, core, right, entries)

    expected = three_factor_linear(x, None, left, core, right).sum() + completion_loss(left, core, right, entries)
    torch.testing.assert_close(step(x, left, core, right), expected)


# ---------------------------------------------------------------------- the report itself


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
    assert (line.value, line.note) == (
        "not installed",
        'nothing: pip install lowrank-kernels[cli], or in a checkout pip install ".[cli]"',
    )


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

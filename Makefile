# Two commands need nothing done before: `make demo` and `make test`. Both build the package into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) CMakeLists.txt pyproject.toml
OUT ?= out/gpu
CLANG_FORMAT_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.cu)

.PHONY: dev demo test docs lint format bench gpu wheel sdist torch-matrix clean

dev: $(VENV)/installed  ## virtual environment, editable install with every extra and the development tools

$(VENV)/tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"Python >= 3.10 is needed, {sys.version.split()[0]} found: make PYTHON=python3.11 ...") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	command -v cmake >/dev/null || $(BIN)/python -m pip install -q cmake
	$(BIN)/python -m pip install -q -c constraints.txt numpy pybind11 scikit-build-core ninja
	@touch $@

$(VENV)/installed: $(VENV)/tools $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[all,dev]"
	@touch $@

demo: dev  ## complete a photograph with 70 % of its pixels removed, ratings and a table where they are at hand
	$(BIN)/python examples/demo.py --out out/demo

test: dev  ## the whole test suite
	$(BIN)/python -m pytest

docs: dev  ## the documentation site into out/docs; needs no network
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs out/docs

lint: dev  ## formatting, style, types, configuration
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	test ! -x $(BIN)/zizmor || $(BIN)/zizmor -q --offline --no-progress .github/workflows
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMAT_FILES)

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FORMAT_FILES)

bench: dev  ## all benches; appends rows to bench/data/<machine>.csv
	$(BIN)/python -m bench

gpu:  ## build, tests, kernel checks and benches of the GPU here into OUT=folder, within nine minutes; needs no `make dev`
	$(PYTHON) -m bench.gpu --out $(OUT) $(ARGS)

wheel: dev  ## the wheel into dist/: built, repaired, audited, tested in a clean environment; LRK_CUDA=OFF or ON as for pip
	$(BIN)/python -m release.wheel

sdist: dev  ## the sdist into dist/, which must build back into the same wheel without nvcc
	$(BIN)/python -m release.wheel --sdist

torch-matrix: dev  ## the wheel of dist/ beside several versions of torch, into docs/torch_versions.md; gigabytes of downloads
	$(BIN)/python -m release.torch_matrix $(ARGS)

clean:
	rm -rf $(VENV) build dist out

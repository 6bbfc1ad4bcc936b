# `make test` and `make demo` make the environment first; TORCH= picks another torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/installed
	$(BIN)/fdistill demo --expect benchmarks/results/demo_cpu.json

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 $(ARGS)

# every architecture of the installed transformers, where make test takes a sample
test-all: $(VENV)/installed
	FDISTILL_WHOLE=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks/test_rows.py -p no:xdist --benchmark-json=benchmarks/results/cpu_rows.json $(ARGS)
	$(BIN)/python -m pytest benchmarks/test_linear.py -p no:xdist --benchmark-json=benchmarks/results/cpu_linear.json $(ARGS)

# torch first and alone, so that its pin holds; triton only where torch brought none
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)" numpy
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet --no-deps "$(TRITON)"
	$(BIN)/pip install --quiet --editable ".[demo,test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fdistill_kernels/*.so fdistill_kernels/*.log

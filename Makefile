# `make test` and `make demo` make the environment first; TORCH= picks another torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo cluster-demo test test-all look test-matrix peers sanitize aot release lint docs bench clean

demo: $(VENV)/installed
	$(BIN)/fdistill demo --expect benchmarks/results/demo_cpu.json

# two tensor-parallel by two data-parallel processes on the CPU, and one process, to the same curve
cluster-demo: $(VENV)/installed
	$(BIN)/python -m benchmarks.cluster_demo --out benchmarks/results/cluster_demo.json $(ARGS)

# two workers of one thread each, where two of two would wait for each other
test test-all: export OMP_NUM_THREADS = 1
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --maxschedchunk 16 $(ARGS)

# the CUDA kernels for a CPU, which the tests run
build/libfdistill_emulated.so: tests/emulate.sh tests/emulation.h $(shell find csrc -name '*.h' -o -name '*.cu*')
	mkdir -p build
	bash tests/emulate.sh csrc $@

# every architecture of the installed transformers, where make test takes a sample
test-all: $(VENV)/installed
	FDISTILL_WHOLE=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# the report in headless Chromium (Debian: apt-get install chromium); make test looks, too, where there is one
look: $(VENV)/installed
	$(BIN)/python -m pytest tests/browser $(ARGS)

# the whole grids of other libraries' tests, and the table of where we agree
peers: $(VENV)/installed
	FDISTILL_WHOLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/peers $(ARGS)
	cat tests/peers/TABLE.md

# the CPU library under AddressSanitizer and UBSan: the tests that run it, then random calls, half of them by the build
# without vectors; `make sanitize FUZZ_SECONDS=20` is the short form
FUZZ_SECONDS ?= 600
FUZZ_SEED ?= 0
SANITIZED := build/libfdistill_cpu_sanitized.so
sanitized = FDISTILL_CPU_LIBRARY=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"
fuzz = $(BIN)/python -m tests.fuzz.fuzz --seconds $$(($(FUZZ_SECONDS) / 2)) --seed $(FUZZ_SEED)

sanitize: $(SANITIZED)
	$(sanitized) $(BIN)/python -m pytest -p no:xdist --capture=sys tests/test_functional.py tests/test_linear.py \
		tests/test_divergences.py tests/test_row_divergences.py -k "cpu and not compile and not shift and not equal_models"
	$(sanitized) ATEN_CPU_CAPABILITY=default $(fuzz)
	$(sanitized) $(fuzz)

$(SANITIZED): $(shell find csrc/cpu csrc/*.h)
	mkdir -p build
	bash csrc/cpu/build.sh $@ -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined

# other versions of torch, Triton, transformers and Python, each in an environment of its own; writes tests/MATRIX.md
test-matrix:
	$(PYTHON) tests/matrix.py $(ARGS)

# the tables of tests/aot: what three versions of Triton make of every kernel for every target
aot:
	for version in 3.4.0 3.6.0 3.9.0; do \
		test -d build/triton/$$version || $(BIN)/pip install --quiet --no-deps --target build/triton/$$version triton==$$version; \
		PYTHONPATH=build/triton/$$version TRITON_INTERPRET=0 $(BIN)/python -m tests.aot || exit 1; \
	done

release:
	bash tests/release.sh "$(TORCH)"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site, into build/site, from an environment of its own that has no torch
docs: build/docs-env/installed
	NO_MKDOCS_2_WARNING=1 build/docs-env/bin/mkdocs build --strict

build/docs-env/installed: pyproject.toml
	test -x build/docs-env/bin/python || $(PYTHON) -m venv build/docs-env
	sed -n 's/^docs = //p' pyproject.toml | $(PYTHON) -c "import ast; print(*ast.literal_eval(input()), sep='\n')" \
		> build/docs-env/requirements.txt
	build/docs-env/bin/pip install --quiet --requirement build/docs-env/requirements.txt
	touch $@

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks/test_rows.py -p no:xdist --benchmark-json=benchmarks/results/cpu_rows.json $(ARGS)
	$(BIN)/python -m pytest benchmarks/test_linear.py -p no:xdist --benchmark-json=benchmarks/results/cpu_linear.json $(ARGS)
	$(BIN)/python -m benchmarks.peers --out benchmarks/results/peers_cpu.json

# torch first and alone, so that its pin holds; triton only where torch brought none
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)" numpy
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet --no-deps "$(TRITON)"
	$(BIN)/pip install --quiet --editable ".[demo,test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fdistill_kernels/*.so fdistill_kernels/*.log

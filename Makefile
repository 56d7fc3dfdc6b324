# Everything runs inside .venv; `make setup` builds it once and any target below makes sure of it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
KERNELS := $(wildcard src/hymba/ops/*/*.cpp src/hymba/ops/*/*.h) src/hymba/ops/native/build.py
PROMPT ?= It was a cold morning, and
BENCH := $(BIN)/python -m benchmarks
RECORD := --out benchmarks/results
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2
GPU_PYTHON ?= python3
GPU_OUT ?= benchmarks/results
GPU_SECONDS ?= 510
GPU := PYTHONPATH=src:. PYTHONUNBUFFERED=1 $(GPU_PYTHON) -m benchmarks.gpu
SANITIZED := HYMBA_KERNELS=$(CURDIR)/build/sanitized
.DEFAULT_GOAL := help

.PHONY: help setup demo browser test check lint quick sanitize format docs bench bench-report test-gpu bench-gpu clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(STAMP)  ## make .venv with the package and every extra
$(STAMP): pyproject.toml constraints.txt setup.py $(KERNELS)
	@echo "setting up .venv: a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq -c constraints.txt torch
	$(BIN)/pip install -qq -c constraints.txt -e ".[all]"
	@touch $@

demo: setup  ## stream text from the bundled model (PROMPT="..." to choose the opening)
	$(BIN)/hymba generate "$(PROMPT)"

test: setup browser  ## every test
	$(PYTEST)

browser: setup  # for the tests of the chat page
	@command -v chromium google-chrome >/dev/null || $(BIN)/playwright install chromium \
		|| (apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium)

check: lint quick  ## before each commit: format, lint, types, architecture, quick tests

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

quick: setup browser
	HYPOTHESIS_PROFILE=quick $(PYTEST) -m "not slow"

sanitize: setup  ## the kernels' tests with kernels under AddressSanitizer and UBSan
	$(SANITIZED) $(BIN)/python -m hymba.ops.native.build -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover
	export $(SANITIZED) LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 HYPOTHESIS_PROFILE=quick OMP_NUM_THREADS=1; \
	$(BIN)/python -c "from hymba.ops import native; native.load('portable')" && $(BIN)/pytest -q -s -m "not slow" \
		$(addprefix tests/ops/test_,$(addsuffix .py,linear attention_blocks cross_entropy quantized_heads recording)) \
		$(filter-out %_library.py,$(wildcard tests/ops/test_native_*.py))

format: setup  ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## check that the documents name everything public and that their links lead somewhere
	$(BIN)/pytest -q tests/test_architecture.py tests/test_docs.py

bench: setup  ## measure everything on this machine, an hour or more (LLAMA_PYTHON=... to compare with llama.cpp too)
	$(BENCH).machine $(RECORD)
	for weights in bf16 int8 int4; do $(BENCH).decode --weights $$weights $(RECORD) || exit 1; done
	$(BENCH).decode --rows 8 $(RECORD)
	for weights in bf16 int8 int4; do $(BENCH).prefill --weights $$weights $(RECORD) || exit 1; done
	for config in 1.5b tiny; do $(BENCH).ops --config $$config $(RECORD) || exit 1; done
	$(BENCH).training $(RECORD)
	for weights in bf16 int8 int4; do $(BENCH).memory --weights $$weights $(RECORD) || exit 1; done
	$(BENCH).peers $(if $(LLAMA_PYTHON),--llama-python $(LLAMA_PYTHON)) $(RECORD)
	$(MAKE) bench-report

bench-report: setup  ## write the tables and figures anew from benchmarks/results
	$(BENCH).report

test-gpu:  ## every test of an NVIDIA GPU, in nine minutes; GPU_PYTHON has torch and pytest, GPU_OUT takes the result
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-quick} $(GPU) tests --seconds $(GPU_SECONDS) --out $(GPU_OUT)

bench-gpu:  ## measure everything on an NVIDIA GPU, in nine minutes; neither needs .venv
	$(GPU) all --seconds $(GPU_SECONDS) --out $(GPU_OUT)

clean:  ## remove .venv and caches
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# make demo   the whole loop on a real model, ends with the report's path
# make test   the test suite
# Both set up everything they need in .venv on the first run and start within seconds later.
# On a machine where pip would pick a CUDA build of torch and you want the CPU one, set
# PIP_EXTRA_INDEX_URL to PyTorch's CPU index before the first run.

SHELL := bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := src tests $(wildcard bench experiments examples setup.py)
WORKERS ?= 2
TEST_FLAGS ?=
DEMO_FLAGS ?=

.PHONY: help setup model demo test test-slow test-native lint format types bench docs clean

help:
	@echo "make demo | test | test-slow | test-native | lint | format | types | bench | docs | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard setup.py)
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Retort needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || { echo "Creating $(VENV)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "Installing Retort and the tested versions of its dependencies (once, a few minutes)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

model: $(STAMP)
	@$(BIN)/retort pull smollm2-135m-instruct >/dev/null

demo: model
	@$(BIN)/retort demo $(DEMO_FLAGS)

# One thread a worker: two workers share two cores, and the tests' models are small.
test: model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TEST_FLAGS)

test-slow: model
	$(BIN)/python -m pytest -m slow --timeout 3600 $(TEST_FLAGS)

# The core's long checks: sanitizers, the built wheel outside the tree, other instruction sets.
test-native: model
	$(BIN)/python -m pytest -m slow --timeout 3600 tests/ops/native $(TEST_FLAGS)
	@for isa in portable avx2; do echo "== RETORT_CPU_ISA=$$isa"; \
	  RETORT_CPU_ISA=$$isa $(BIN)/python -m pytest tests/ops/native \
	    tests/invariants/test_bit_equality.py $(TEST_FLAGS) || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(STAMP)
	$(BIN)/mypy

bench: model
	@for script in bench/*.py; do \
	  [ -e "$$script" ] || { echo "bench/ holds no benchmark yet"; exit 0; }; \
	  echo "== $$script"; $(BIN)/python "$$script" $(BENCH_FLAGS) || exit 1; done

docs: $(STAMP)
	$(BIN)/python docs/reference.py

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

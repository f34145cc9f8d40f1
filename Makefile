PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
# Pico models and tiny products are slower with several threads.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

CONFIG ?= splade-v23-small
RUN ?= runs/$(basename $(notdir $(CONFIG)))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check fix bench train-background logs board clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-17s %s\n", $$1, $$2}'

install: $(VENV)/installed  ## Install soju and its development tools into .venv

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## Distil a Korean–English searcher from our own samples, report, search (offline)
	$(BIN)/soju demo

test: install  ## All quick tests: two processes of one thread each, no network
	$(ONE_THREAD) $(BIN)/pytest -q -n 2 --dist loadfile -m 'not slow'

test-slow: install  ## Faults, fuzzing, real data
	$(ONE_THREAD) $(BIN)/pytest -q -m slow --hypothesis-profile=explore

check: install  ## Lint, types, docstrings, import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet src
	$(BIN)/lint-imports

fix: install  ## Format and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: install  ## Run every benchmark and write docs/performance.md
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/run_all.py

train-background: install  ## Train CONFIG into RUN, or go on with it, and return at once
	@mkdir -p $(dir $(RUN))
	@setsid nohup $(BIN)/soju train $(CONFIG) --out $(RUN) $(if $(wildcard $(RUN)/config.yaml),--resume) > $(RUN).log 2>&1 &
	@echo "training $(CONFIG) into $(RUN); follow it with: make logs RUN=$(RUN)"

logs:  ## Follow the log of RUN
	@tail -n 40 -F $(RUN).log

board: install  ## TensorBoard over all runs, at http://localhost:6006
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt tensorboard
	$(BIN)/tensorboard --logdir runs

clean:  ## Remove the virtual environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Everything runs from the virtual environment in .venv, made by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More extras of pyproject.toml, each with a leading comma: make setup EXTRAS=,cuda
EXTRAS ?=
ARGS ?=
# Tests that run at a time, whole files of them; 0: one, in the process that pytest is.
WORKERS ?= 2
# One benchmark of tests/bench by name; none: all of them.
BENCH ?=

# Stamps: what the environment holds. Using the package needs less than testing it (torch is the tests' oracle).
RUNTIME := $(VENV)/.installed
TESTING := $(VENV)/.installed-test

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast lint format bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-11s %s\n", $$1, $$2 }'

$(RUNTIME): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(TESTING): pyproject.toml $(RUNTIME)
	$(BIN)/python -m pip install --quiet --editable '.[test$(EXTRAS)]'
	@touch $@

setup: $(TESTING)  ## make .venv and install the package with what its tests need

quickstart: $(RUNTIME)  ## cold start, HDPO, evaluation, report and export on built-in data (ARGS='--seed 1')
	$(BIN)/hdpo quickstart $(ARGS)

test: lint  ## lint, then every test (ARGS='-k losses')
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-fast: $(TESTING)  ## the tests that take seconds
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow' $(ARGS)

lint: $(TESTING)  ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(TESTING)  ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(TESTING)  ## run tests/bench, write docs/bench.md and the README's table (BENCH=update: one of them)
	$(BIN)/python -m tests.bench $(BENCH) $(ARGS)

clean:  ## remove .venv, caches and build leftovers; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

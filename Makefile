# The commands of the project. `make prune` and `make test` set themselves up on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= jobs/configs/demo.yaml
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup prune test test-slow lint types docs-check bench clean

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

setup: $(READY) ## Create .venv with everything pinned by constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("diffprune needs Python 3.11 or newer, found " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip setuptools
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --editable '.[dev]'
	@touch $(READY)

prune: $(READY) ## Run the whole job: on the demo data, or CONFIG=my.yaml
	@$(BIN)/diffprune run $(CONFIG)

test: $(READY) lint types ## Lint, types and tests
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(READY) ## The long checks: faults, scale, real data
	@$(BIN)/python -m pytest -m slow --timeout 1500

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/mypy

docs-check: $(READY) ## Check every command, config and snippet of README and docs
	@$(BIN)/python -m pytest tests/test_docs.py

bench: $(READY) ## Measure speed (hours), or some of it: BENCH="--list", BENCH="passes ladder"
	@$(BIN)/python -m tests.benchmarks $(BENCH)

clean: ## Remove the environment and caches, keep runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis build *.egg-info

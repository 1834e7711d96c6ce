# Needs Python 3.11 or newer, make and the package registry. Everything else goes into .venv.

PYTHON ?= python3
ARGS ?=

# How many processes run the tests, each with servers of its own. More than two for two cores, because most tests wait
# for other processes.
WORKERS ?= 3
# How much of a slow test `make slow` does: 1 is all of it.
SLOW_SCALE ?= 1

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
CORE := dispatcher/domain/*,dispatcher/bounds.py,dispatcher/errors.py,dispatcher/states.py,dispatcher/rates.py,dispatcher/retry.py,dispatcher/transition.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test slow chaos pictures bench lint format clean

help: ## Show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## Run the example; its arguments in ARGS="--customers 100"
	$(BIN)/python -m examples.win_back $(ARGS)

# The pure core has to be covered whole. `worksteal` gives each process neighbouring tests, because the tests of a
# module share processes, and takes some of another's when it has nothing left to do. Where ARGS chooses some of the tests there is no
# coverage, and one process runs them, so that a debugger and `-s` work.
PARALLEL := --numprocesses=$(WORKERS) --dist=worksteal -m "not slow and not alone" --durations=20 --cov --cov-report=
ALONE := -m "alone and not slow" --cov --cov-append --cov-report=term
test: $(VENV)/dev.stamp ## Run the tests with branch coverage, by WORKERS=3 processes; pytest's arguments in ARGS
	$(BIN)/python -m pytest $(or $(strip $(ARGS)),$(PARALLEL))
	$(if $(strip $(ARGS)),,$(BIN)/python -m pytest $(ALONE))
	$(if $(strip $(ARGS)),,$(BIN)/python -m coverage report --include=$(CORE) --fail-under=100)

slow: $(VENV)/dev.stamp ## Run the tests that take minutes, one at a time; SLOW_SCALE=0.1 does a tenth of them
	SLOW_SCALE=$(SLOW_SCALE) $(BIN)/python -m pytest -m slow --durations=0 $(ARGS)

chaos: $(VENV)/dev.stamp ## Run the whole chaos suite, an hour; CHAOS_CHAINS, CHAOS_SEED, CHAOS_RESULTS; pytest's arguments in ARGS
	CHAOS_MATRIX=1 $(BIN)/python -m pytest tests/chaos -m chaos -p no:randomly $(ARGS)

pictures: $(VENV)/dev.stamp ## Make the pictures and tables of the architecture page from the code
	$(BIN)/python -m tools.pictures

bench: $(VENV)/bench.stamp ## Measure against raw Celery and DBOS; its arguments in ARGS="--quick"
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/dev.stamp ## Check style, types and layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp ## Format, and mend what can be mended
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## Remove what was made here, .venv included
	rm -rf $(VENV) .dispatcher build dist htmlcov .coverage .coverage.* .hypothesis
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find benchmarks dispatcher examples tests tools workers -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: set PYTHON to a Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$$($(PYTHON) --version) is too old: set PYTHON to a Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/pyvenv.cfg
	@echo "installing what the example needs into $(VENV)"
	@$(PIP) install --editable '.[embedded,example]'
	@touch $@

# What the demo needs is part of it.
$(VENV)/dev.stamp: pyproject.toml | $(VENV)/pyvenv.cfg
	@echo "installing the development tools into $(VENV)"
	@$(PIP) install --editable '.[dev]'
	@touch $(VENV)/demo.stamp $@

$(VENV)/bench.stamp: pyproject.toml | $(VENV)/pyvenv.cfg
	@echo "installing what the benchmark needs into $(VENV)"
	@$(PIP) install --editable '.[bench]'
	@touch $@

# Needs Python 3.11 or newer, make and the package registry. Everything else goes into .venv.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
CORE := dispatcher/domain/*,dispatcher/errors.py,dispatcher/states.py,dispatcher/rates.py,dispatcher/retry.py,dispatcher/transition.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test chaos pictures bench lint format clean

help: ## Show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## Run the example; its arguments in ARGS="--customers 100"
	$(BIN)/python -m examples.win_back $(ARGS)

# The pure core has to be covered whole. No coverage where ARGS chooses some of the tests.
test: $(VENV)/dev.stamp ## Run the tests with branch coverage; pytest's arguments in ARGS
	$(BIN)/python -m pytest $(or $(strip $(ARGS)),--cov --cov-report=term)
	$(if $(strip $(ARGS)),,$(BIN)/python -m coverage report --include=$(CORE) --fail-under=100)

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
	find dispatcher workers examples tests -type d -name __pycache__ -prune -exec rm -rf {} +

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

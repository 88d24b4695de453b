# Two commands do all the set-up and the work on a fresh machine with Python 3.11 or later:
#   make run     measure an embedded Foundry Local with a synthetic model, offline, and report
#   make test    style, types and tests (`make coverage`: with their coverage, which takes much longer)
# And for developers: `make docs` writes what is made from the code (JSON Schemas, the README's tables), `make bench` says
# what the client costs and how far its stamps are off, beside other clients (ARGS=--write: into bench/RESULTS.md);
# `make bench-saturation` holds the capacity verdict and the search against servers whose truth is known, 20 times each.
PYTHON ?= python3
SCENARIO ?= scenarios/edge.yaml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test coverage lint docs bench bench-saturation clean

run: $(VENV)/.run
	$(BIN)/loadbench run $(SCENARIO) $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

coverage: lint
	$(BIN)/python -m pytest --cov --cov-report=term $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python -m tests.made

bench: $(VENV)/.dev
	$(BIN)/python bench/bench.py $(ARGS)

bench-saturation: $(VENV)/.dev
	$(BIN)/python bench/saturation.py $(ARGS)

clean:
	rm -rf $(VENV) build dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "loadbench needs Python 3.11 or later; $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	@echo "installing loadbench into $(VENV): about a minute"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing loadbench and its development tools into $(VENV): about a minute"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.run

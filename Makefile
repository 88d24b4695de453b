# Two commands do all the set-up and the work on a fresh machine with Python 3.11 or later:
#   make run     measure an embedded Foundry Local with a synthetic model, offline, and report
#   make test    style, types and tests
PYTHON ?= python3
SCENARIO ?= scenarios/edge.yaml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint docs bench clean

run: $(VENV)/.run
	$(BIN)/loadbench run $(SCENARIO) $(ARGS)

test: lint
	$(BIN)/coverage erase
	$(BIN)/python -m pytest --cov --cov-report=term $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev  ## write what is made from the code: the JSON Schemas and the tables of the README
	$(BIN)/python -m tests.made

clean:
	rm -rf $(VENV) build dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "loadbench needs Python 3.11 or later; $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.run

# Two commands do all the set-up and the work on a fresh machine with Python 3.11 or later:
#   make run     measure an embedded Foundry Local with a synthetic model, offline, and report
#   make compare BASE=results/A NEW=results/B   what has changed between two runs, or groups of runs
#   make nightly                 every scenario in scenarios/nightly, and one page about the night (docs/nightly.md)
#   make clean-results KEEP=30   removes all but the last runs and nights, and what results/baseline names
#   make test    style, types and tests (`make coverage`: with their coverage, which takes much longer)
# And for developers: `make docs` writes what is made from the code (JSON Schemas, the README's tables), `make bench` says
# what the client costs and how far its stamps are off, beside other clients (ARGS=--write: into bench/RESULTS.md);
# `make bench-saturation` holds the capacity verdict and the search against servers whose truth is known, 20 times each;
# `make bench-compare` how often `loadbench compare` cries wolf, and how often it finds what is 20 % slower;
# `make bench-report` what the report of a million samples costs (ARGS=--write: into bench/RESULTS-report.md);
# `make bench-merge` what it costs to put a thousand shards together (ARGS=--write: into bench/RESULTS-merge.md).
PYTHON ?= python3
SCENARIO ?= scenarios/edge.yaml
NIGHTLY ?= scenarios/nightly
KEEP ?= 30
ARGS ?=
# Tests mostly wait, for runs to end: files of them go side by side, which takes half the time. Those that hold what a
# busy machine does not show, marked "alone", come after them. (5: ARGS chose none of these.)
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadfile
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run compare nightly clean-results test coverage lint docs bench bench-saturation bench-compare bench-report \
  bench-merge clean

run: $(VENV)/.run
	$(BIN)/loadbench run $(SCENARIO) $(ARGS)

compare: $(VENV)/.run
	$(BIN)/loadbench compare $(BASE) -- $(NEW) $(ARGS)

nightly: $(VENV)/.run
	$(BIN)/loadbench nightly $(NIGHTLY) $(ARGS)

clean-results: $(VENV)/.run
	$(BIN)/loadbench clean --keep $(KEEP) $(ARGS)

test: lint
	$(BIN)/python -m pytest -m "not alone" $(SIDE_BY_SIDE) $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m alone $(ARGS) || [ $$? -eq 5 ]

coverage: lint
	$(BIN)/python -m pytest -m "not alone" $(SIDE_BY_SIDE) --cov --cov-report= $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m alone --cov --cov-append --cov-report=term $(ARGS) || [ $$? -eq 5 ]

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

bench-compare: $(VENV)/.dev
	$(BIN)/python bench/compare.py $(ARGS)

bench-report: $(VENV)/.dev
	$(BIN)/python bench/report.py $(ARGS)

bench-merge: $(VENV)/.dev
	$(BIN)/python bench/merge.py $(ARGS)

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

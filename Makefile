# Every target sets up $(VENV) first when it is missing or older than pyproject.toml.
# Without make: the same commands stand in README.md.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Test processes: as many as there are cores; `make test JOBS=0` runs all tests in one, which a debugger needs.
JOBS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

RUN_READY := $(VENV)/.ready-report
DEV_READY := $(VENV)/.ready-dev

.PHONY: help quickstart setup test test-all test-online soak lint types bench docs clean

help:
	@echo "make quickstart   train a tiny model on built-in images, evaluate it, write a report (a few minutes)"
	@echo "make test         quick tests"
	@echo "make test-all     all tests but the soak tests"
	@echo "make test-online  tests that load the released files from the network (about 1 GB, kept in the cache)"
	@echo "make soak         tests that take very long"
	@echo "make lint types   ruff, mypy"
	@echo "make bench        measure a training step"
	@echo "make docs         regenerate the generated pages, build the documentation into docs/_build/html"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_READY): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[report]'
	@touch $@

$(DEV_READY): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev,report]'
	@touch $@ $(RUN_READY)

setup: $(DEV_READY)

quickstart: $(RUN_READY)
	$(BIN)/python -m dinov2 quickstart

test: $(DEV_READY)
	$(PYTEST) -m "not slow and not real_data and not soak and not network"

test-all: $(DEV_READY)
	$(PYTEST) -m "not soak and not network"

test-online: $(DEV_READY)
	$(BIN)/python -m pytest -m network

soak: $(DEV_READY)
	$(BIN)/python -m pytest -m soak

lint: $(DEV_READY)
	$(BIN)/python -m ruff check .

types: $(DEV_READY)
	$(BIN)/python -m mypy

bench: $(DEV_READY)
	$(BIN)/python benchmarks/train_step.py

docs: $(DEV_READY)
	$(BIN)/python scripts/generate_docs.py
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf build docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache

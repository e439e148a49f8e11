# `make demo` and `make test` set themselves up: a .venv next to this file, then the package in it (editable).
# The stamps make a second call quick: nothing is installed again until setup.cfg or the constraints change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A worker a core, of one thread each; one that is done takes tests from another.
WORKERS := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all lint clean

demo: $(VENV)/.installed
	$(BIN)/python train.py --run_name demo --resume auto

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu"

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(WORKERS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.cfg pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) *.egg-info

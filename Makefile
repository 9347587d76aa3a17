# make demo   the whole pipeline on the shipped data, from raw text to a table of what PPO has changed
# make test   ruff, mypy and every test
# make unit   the tests without Ray: seconds
#
# Each target installs what it needs into .venv first, once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test unit lint format clean

demo: $(VENV)/installed
	$(BIN)/python launch/pipeline.py --config configs/pipeline/demo.yaml

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 tests

unit: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/unit

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: rlhf_ray needs Python 3.11 or newer; try make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(BIN)/python
	$(INSTALL) -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements.txt | $(BIN)/python
	$(INSTALL) -r requirements-dev.txt
	touch $(VENV)/installed $@

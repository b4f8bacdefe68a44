# Everything starts here: `make lab` to read, `make test` to verify. Other targets are for maintainers.
PYTHON ?= python3
BIN := .venv/bin
LAB_FLAGS := $(if $(filter 0,$(shell id -u)),--allow-root)
NOTEBOOKS ?= $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
.PHONY: help lab install install-test test speed build look bench-widgets clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

lab: install  ## open JupyterLab on 00_start_here
	@echo "If no browser opens, copy the address below that begins with http://127.0.0.1 into one."
	$(BIN)/jupyter lab $(LAB_FLAGS) --notebook-dir=notebooks --LabApp.default_url=/lab/tree/00_start_here.ipynb

install: .venv/installed  ## make .venv with all that the notebooks need

install-test: .venv/installed-test  ## … and all that the tests need

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch .venv/installed $@

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: install Python 3.11 or newer, or say where it is with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "These notebooks need Python 3.11 or newer and $(PYTHON) is %d.%d: install a newer one, or name it with PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

test: install-test  ## run everything that is checked, on two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder notebooks tests

speed: install  ## measure attention with and without a softmax on this machine (SPEED=... for options)
	$(BIN)/python -m helpers.speed $(SPEED)

build: install-test  ## execute notebooks anew and store them cleaned (NOTEBOOKS=... for some)
	$(BIN)/python -m helpers.authoring build $(NOTEBOOKS)

look: install-test  ## save pictures of the pages as JupyterLab shows them, in pictures/
	$(BIN)/python -m helpers.authoring look $(NOTEBOOKS)

bench-widgets: install-test  ## time one step of every slider in a live kernel
	$(BIN)/python -m helpers.authoring bench $(NOTEBOOKS)

clean:  ## remove what can be made again
	rm -rf .venv pictures build *.egg-info .pytest_cache .hypothesis

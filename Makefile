# Needs Python >= 3.11 and make, nothing else; everything goes into .venv. `make` lists what there is to do.
# Works with the make of macOS (3.81).

VENV     ?= .venv
PYTHON   ?=
PIP_ARGS ?=
ARGS     ?=
JOBS     ?= 2

BIN   := $(VENV)/bin
ifeq ($(OS),Windows_NT)
BIN   := $(VENV)/Scripts
endif
PY    := $(BIN)/python
# An environment of your own (make VENV=...) is used as it is; there the package is found by its path.
ifneq ($(VENV),.venv)
export PYTHONPATH := $(CURDIR)/src
READY := environment
else
READY := .venv/.ready
endif

.DEFAULT_GOAL := help
.PHONY: help book test train lab notebooks lint format bench clean environment

help: ## this list
	@echo "make <what>:"
	@sed -n 's/^\([a-z][a-z]*\):.*## /  \1|/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'
	@echo "Settings: PYTHON=python3.11  VENV=path (an environment of yours)  PIP_ARGS='...'  ARGS='...' (train, test, bench)  JOBS=2"

.venv/.ready: requirements.txt pyproject.toml tools/make_env.sh
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" sh tools/make_env.sh .venv

environment:
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" sh tools/make_env.sh "$(VENV)"

book: $(READY) ## run every chapter and build the book strictly: _build/html/index.html
	$(PY) tools/build_book.py $(ARGS)

test: $(READY) ## the whole test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

train: $(READY) ## train a small V3 on two processes with DualPipe, then let it write (ARGS='--steps 50' adds arguments)
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node 2 -m dsv3_book.train \
	  --preset laptop --parallel.pp 2 --out runs/laptop $(ARGS)

notebooks: $(READY) ## the chapters as .ipynb, for VS Code and Colab: _build/notebooks
	$(PY) tools/notebooks.py $(ARGS)

lab: notebooks ## the chapters in JupyterLab
	$(PY) -m jupyter lab --notebook-dir _build/notebooks

lint: $(READY) ## ruff (rules and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY) ## let ruff repair what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(READY) ## the benchmarks, each one table, side by side with a peer
	@set -e; for file in benchmarks/*.py; do case $$file in */_*) ;; *) echo "== $$file"; $(PY) $$file $(ARGS);; esac; done

clean: ## remove what make built (not .venv, not runs)
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
JOBS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help venv demo test check soundness bench bench-full speed growth clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: $(STAMP) ## make the virtual environment

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

demo: $(STAMP) ## train on handwritten digits, with a certificate and pictures in results/demo/
	$(BIN)/python -m cvxnn.demo --out results/demo

test: $(STAMP) ## run the whole test suite
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

check: $(STAMP) ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soundness: $(STAMP) ## the full soundness run: 840 random problems against independent bounds
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soundness --problems 300 --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soundness --activation relu --problems 300 --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soundness --architecture attention --problems 300 --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soundness --activation relu --outputs vector --problems 60 --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soundness --architecture cnn --problems 60 --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soundness --architecture cnn --activation relu --problems 120 --jobs $(JOBS)

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	@touch $@

bench: $(PEERS) ## side by side with other packages, a small set, in results/comparison/
	$(ONE_THREAD) $(BIN)/python benchmarks/comparison/run.py small --out results/comparison
	$(BIN)/python benchmarks/comparison/table.py results/comparison/small.csv

bench-full: $(PEERS) ## the same on all data sets; Fashion-MNIST from the folder CVXNN_DATA_DIR
	$(ONE_THREAD) $(BIN)/python benchmarks/comparison/run.py full --out results/comparison

speed: $(STAMP) ## speed on the digits, with the machine's matrix rate
	$(BIN)/python benchmarks/speed.py

growth: $(STAMP) ## time and memory against n, P and c
	$(BIN)/python benchmarks/growth.py --out results/growth

clean: ## remove the environment and all output
	rm -rf $(VENV) results build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

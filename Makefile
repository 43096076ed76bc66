# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo pictures test lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      search the schedule of the bundled digits network (a minute or two on two cores)"
	@echo "make pictures  search it again and make docs/digits.md and docs/pictures"
	@echo "make test      run the tests"
	@echo "make lint      ruff, mypy (strict) and the import contract"
	@echo "make bench     time everything on this machine: trials, workers, searches, start-up"

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lamtune needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/ready
	$(BIN)/lamtune demo

# In a store and a cache of its own, so that what is drawn is this search and no other.
pictures: export LAMTUNE_STORE = sqlite:///pictures.db
pictures: export LAMTUNE_CACHE = $(CURDIR)/pictures.cache
pictures: .venv/ready
	rm -rf pictures.db pictures.db-* pictures.cache
	$(BIN)/lamtune demo
	$(BIN)/lamtune diagnose search/demo.yaml --schedule best --late 6,4,2
	$(BIN)/lamtune report --model digits --dataset digits --nfe 8 -o docs/digits.md --plots docs/pictures

# Threads of the tests sleep while they wait, as those of workers do (search/pool.py).
test: export OMP_WAIT_POLICY = PASSIVE
test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info

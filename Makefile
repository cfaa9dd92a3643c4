# make demo: install, train on handwritten digits with four real processes, see what it saves
# make test: install, run the tests            make check: tests, lint and types
# make test-fast: the tests without slow ones  make test-nightly: with the longest sweeps; JOBS=4: four at once
# make docs: the documents as a site, in site/ make results: docs/results.md, from benchmarks/results/
# make results-check: is that page up to date, and which of its figures were measured on code that has changed since
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 3
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-fast test-nightly lint types check docs results results-check clean

demo: .venv/installed
	@echo "Training a 32-layer residual network on handwritten digits: 4 workers, 4 processes."
	$(BIN)/resist train --data digits --model preact_small --workers 4 --min-depth 0 --local-steps 20 \
	    --epochs 9 --batch-size 32 --lr 0.05 --num-evals 5 --out $(DEMO)
	@echo
	$(BIN)/resist evaluate $(DEMO)
	@echo
	@echo "Try next:"
	@echo "  . .venv/bin/activate"
	@echo "  resist train --strategy local_sgd --local-steps 20 --epochs 9 --batch-size 32 --lr 0.05   # what it is compared with"
	@echo "  resist plan --model preact_resnet101 --num-classes 100 --workers 4       # the network of the paper"
	@echo "  resist train --data cifar10 --model preact_resnet101 --min-depth 0       # on GPUs; downloads CIFAR-10"
	@echo "  resist train --help"

test: .venv/installed
	$(PYTEST)

test-fast: JOBS = 2  # few of these wait
test-fast: .venv/installed
	$(PYTEST) -m "not slow and not nightly"

test-nightly: .venv/installed
	$(PYTEST) -m ""

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/pyright

check: test lint types

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

results: .venv/installed
	$(BIN)/python benchmarks/tables.py

# Figures of code that has changed since are listed, and are no failure; a page with other figures is one.
results-check: .venv/installed
	$(BIN)/python benchmarks/tables.py --changed
	$(BIN)/python benchmarks/tables.py --check

# Installs again when the requirements change.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "resist needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing into .venv (torch is large: some minutes on a slow line)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv site .pytest_cache .ruff_cache .hypothesis

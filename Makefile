PYTHON ?= python
TESTS ?= -m "not slow"

.PHONY: setup format check test bench

setup:  ## install the package and the tools, editable
	$(PYTHON) -m pip install -e ".[dev]"

format:  ## rewrite the code in the one form
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

check:  ## form, lint, types, the direction of imports
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest tests/test_imports.py

test:  ## everything but what is marked slow; `make test TESTS=` for all
	$(PYTHON) -m pytest $(TESTS)

bench:  ## every benchmark; each prints one table and writes it under benchmarks/results
	set -e; for script in benchmarks/*.py; do $(PYTHON) $$script; done

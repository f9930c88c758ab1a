PYTHON ?= python
TESTS ?= -m "not slow"
LOWEST ?= -m "not slow" tests/test_filters.py tests/test_losses.py tests/test_compile.py tests/methods/test_all_methods.py

.PHONY: setup format check test lowest bench

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

# A second torch is 3 GB, which uv fetches in a minute; warnings are not errors here, because old libraries
# warn of each other's newer versions.
lowest:  ## the oldest versions that pyproject.toml allows: install, train, measure, a few tests
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m uv venv --quiet --python $(PYTHON) $$folder/env; python=$$folder/env/bin/python; \
	$(PYTHON) -m uv pip install --quiet --python $$python --cache-dir $$folder/cache \
		--resolution lowest-direct . "pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6.100"; \
	$$python -m freqmask info; \
	$$python -m freqmask pretrain builtin:digits --backbone resnet18 --image_size 32 --steps 2 --out $$folder/run; \
	$$python -m freqmask evaluate knn $$folder/run --data builtin:digits --out $$folder/results; \
	$$python -m pytest -p no:cacheprovider -W default $(LOWEST)

bench:  ## every benchmark; each prints one table and writes it under benchmarks/results
	set -e; for script in benchmarks/*.py; do $(PYTHON) $$script; done

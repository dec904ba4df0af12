# Two commands: `make demo` shows the main job, `make test` runs every test. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Files of tests at a time: most of them wait for sockets and timers.
JOBS ?= 3

.PHONY: demo test check bench clean

demo: $(READY)
	$(BIN)/dicomnode demo

test: $(READY)
	$(BIN)/pytest -n $(JOBS) --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.ingest
	$(BIN)/python -m benchmarks.align
	$(BIN)/python -m benchmarks.score
	$(BIN)/python -m benchmarks.mining
	$(BIN)/python -m benchmarks.train

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# torch comes from PyPI as a CPU build where one is found first; constraints.txt pins every version.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

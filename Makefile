# make serve      creates the environment if needed and starts the server with the embedded model
# make test       adds what tests need, and runs every check and the tests of every module, in two processes
# make test-all   the same with the slow tests, for which it adds Ray
# make test-alone those that need the machine for themselves: fleets of replicas under load, 4 minutes

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SERVES := $(VENV)/.installed-serve
TESTS  := $(VENV)/.installed-tests
SLOW   := $(VENV)/.installed-slow-tests
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Not ?=, which would take the HOST that some shells export.
HOST   := 127.0.0.1
PORT   := 8000
ARGS   :=
# In two processes, a file in one of them; the longest comes first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup serve check test test-all test-alone

setup: $(TESTS)

$(SERVES): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..." % v[:2])'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo 'No virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	$(PIP) --editable .
	touch $@

$(TESTS): $(SERVES)
	$(PIP) --editable '.[dev]'
	touch $@

# 320 MB that nothing else needs.
$(SLOW): $(TESTS)
	$(PIP) --editable '.[dev,ray]'
	touch $@

serve: $(SERVES)
	$(BIN)/buddy serve --host $(HOST) --port $(PORT) $(ARGS)

check: $(TESTS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: check $(SLOW)
	$(PYTEST) -m 'not alone' $(ARGS)

test-alone: $(SLOW)
	$(BIN)/python -m pytest -m alone $(ARGS)

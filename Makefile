# make serve   creates the environment if needed and starts the server with the embedded model
# make test    creates the environment if needed and runs every check and test

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Not ?=, which would take the HOST that some shells export.
HOST   := 127.0.0.1
PORT   := 8000
ARGS   :=

.PHONY: setup serve check test

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..." % v[:2])'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo 'No virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: $(STAMP)
	$(BIN)/buddy serve --host $(HOST) --port $(PORT) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest $(ARGS)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test fast test-slow lint speed clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("vlprompt needs Python 3.11 or newer: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[app,demo,onnx,teacher,test]'
	touch $@

demo: setup
	$(BIN)/vlprompt demo

# Two at once; --dist worksteal leaves the tests of a file together, so that few fixtures are made twice.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal

# Types and tests side by side: mypy takes one core.
test: setup
	$(MAKE) -j 2 lint fast

fast: setup
	$(PYTEST) -m 'not slow'

test-slow: setup
	$(PYTEST) -m slow

lint: setup
	$(BIN)/ruff check src tests tools speed
	$(BIN)/ruff format --check src tests tools speed
	$(BIN)/mypy

speed: setup
	$(BIN)/python -m speed short

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

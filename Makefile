# Everything a newcomer types. Each target sets up what it needs; the environment is .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The docs site has its own environment: it reads docstrings without importing the library.
DOCS := $(VENV)/docs
RUN := JAX_PLATFORMS=cpu $(BIN)/python

# Tests start many processes, which need not compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test coverage test-slow test-tpu-compile test-transformers4 wheel test-wheel docs lint types bench setup torch clean

# PyTorch and what runs our exported models. The older transformers is beside the newer one, and goes before it on the path.
TORCH := torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
TRANSFORMERS4 := transformers==4.57.6 huggingface-hub==0.36.0 tokenizers==0.22.1 datasets==4.8.5 requests==2.34.2 urllib3 certifi \
	charset_normalizer idna httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.16.0

demo: $(VENV)/ready  ## the main job on two CPU cores: corpus, tokenizer, Stage I and II, evaluation, text
	$(RUN) -m experiments.demo --out runs/demo

PYTEST := -m pytest tests --durations=20 --dist loadfile --no-loadscope-reorder --numprocesses
DEFAULT := not slow and not tpu_compile

test: $(VENV)/ready-dev  ## the default test suite; a third process has work while two wait
	$(RUN) $(PYTEST) 3 -m "$(DEFAULT)"

coverage: $(VENV)/ready-dev  ## the same, counting the lines that it runs, which takes longer
	$(RUN) $(PYTEST) 2 -m "$(DEFAULT)" --cov --cov-report=term:skip-covered

test-slow: $(VENV)/ready-dev  ## the tests that take minutes; many of them wait for processes
	$(RUN) $(PYTEST) 3 -m slow

test-tpu-compile: $(VENV)/ready-dev  ## compile decoders of up to 2.6B for TPUs, none of which is needed
	$(RUN) $(PYTEST) 2 -m tpu_compile

test-transformers4: $(VENV)/ready-dev $(VENV)/ready-torch  ## the tests that run transformers, on its version 4
	PYTHONPATH=$(VENV)/transformers4 $(RUN) $(PYTEST) 2 -m transformers

wheel: $(VENV)/ready-dev  ## build the source distribution and, from it, the wheel: dist/looplm_jax-*
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

test-wheel: wheel  ## install the wheel with what it declares where nothing else is, and run every command once
	rm -rf build
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install --quiet --upgrade pip
	build/wheel/bin/pip install --quiet dist/looplm_jax-*.whl
	build/wheel/bin/python tests/install/every_command.py build/wheel/bin/looplm
	rm -rf build

docs: $(DOCS)/ready  ## build the site of docs/ and the API reference into site/, with warnings as errors
	$(DOCS)/bin/mkdocs build --quiet --strict

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck --external-sources --check-sourced tpu_setup/tpu tpu_setup/host/*.sh experiments/benchmarks/gpu.sh

types: $(VENV)/ready-dev
	$(BIN)/mypy

bench: $(VENV)/ready-torch  ## our train step beside a plain PyTorch twin
	$(RUN) -m experiments.benchmarks.train_step

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt setup.cfg
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "looplm_jax needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

$(DOCS)/ready: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --upgrade pip
	$(DOCS)/bin/pip install --quiet -r requirements-docs.txt
	touch $@

torch: $(VENV)/ready-torch  ## PyTorch, for the tests and benchmarks that compare with it; they are skipped without

$(VENV)/ready-torch: $(VENV)/ready
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/transformers4 $(TRANSFORMERS4)
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info

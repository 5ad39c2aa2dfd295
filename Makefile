# make run    set up and run the main job
# make test   set up and pass the tests
#
# If `python3` (or PYTHON=...) already has torch, that environment is used, and its torch stays as it is; only what else
# is missing is installed. Otherwise a new environment is made in .venv, with a CPU build of torch where there is no
# NVIDIA driver.

PYTHON ?= python3
TORCH_CPU := torch==2.13.0

ifneq ($(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo yes),)
PY := $(PYTHON)
else
PY := .venv/bin/python
endif
READY := .venv/ready

.PHONY: run test bench check setup

run: setup
	$(PY) -m bhfast.train --sigma 0 $(ARGS)

test: setup
	$(PY) -m pytest $(ARGS)

bench: setup
	$(PY) -m pytest benchmarks --benchmark-only $(ARGS)

check: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

ifeq ($(PY),$(PYTHON))
NEEDS := numpy, safetensors, tqdm
test: NEEDS += , pytest, hypothesis
bench: NEEDS += , pytest, pytest_benchmark
check: NEEDS += , mypy
setup:
	@$(PY) -c 'import $(NEEDS)' || $(PY) -m pip install --no-build-isolation --editable '.[corpus,test]'
else
setup: $(READY)
$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet 'setuptools>=77' $(shell command -v nvidia-smi >/dev/null || echo $(TORCH_CPU))
	.venv/bin/pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@
endif

# SPDX-License-Identifier: Apache-2.0
# make demo   writes demo.mp4 from PROMPT          make bench  times the operators on this machine
# make test   runs the tests, JOBS at a time       make clean  forgets everything that was built
# All of them set up .venv first where it is missing: PYTHON=... chooses the interpreter, TORCH=... the torch to install.

VENV := .venv
PY := $(VENV)/bin/python
TORCH ?= torch==2.13.0
JOBS ?= 2
PROMPT ?= a red circle moving right on a blue background
SUITABLE := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c '$(SUITABLE)' 2>/dev/null && echo "$$p" && break; done)
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
FORMATTED := $(SOURCES) $(wildcard tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.h)
PIP := $(PY) -m pip install --disable-pip-version-check

.PHONY: demo test bench lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(VENV)/bin/kandinsky generate "$(PROMPT)" -o demo.mp4 --strip demo.png --seed 7

test: $(VENV)/.built $(VENV)/.test
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

bench: $(VENV)/.built $(VENV)/.test
	$(PY) -m benchmarks.ops

lint: $(VENV)/.lint
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)
	$(PY) -m mypy

format: $(VENV)/.lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

clean:
	rm -rf $(VENV) build dist *.egg-info kandinsky_kernels/*.so demo.*

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is required, found none on PATH; install it or run make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c '$(SUITABLE)' || { echo "Python 3.10 or newer is required, got $$("$(PYTHON)" --version 2>&1); run make PYTHON=/path/to/python3"; exit 1; }
	$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.python
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) "$(TORCH)"
	touch $@

# Without build isolation the extension is compiled against the torch above, and no second torch is fetched.
$(VENV)/.installed: setup.py pyproject.toml $(VENV)/.torch
	$(PIP) "setuptools>=77" ninja
	KANDINSKY_KERNELS_BUILD=none $(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.built: $(SOURCES) $(VENV)/.installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) setup.py -q build_ext --inplace
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.installed
	KANDINSKY_KERNELS_BUILD=none $(PIP) --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.installed
	KANDINSKY_KERNELS_BUILD=none $(PIP) --no-build-isolation -e ".[dev]"
	touch $@

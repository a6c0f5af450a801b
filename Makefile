# SPDX-License-Identifier: Apache-2.0
# make demo   writes demo.mp4 from PROMPT          make bench  times the operators on this machine
# make test   runs the tests, JOBS at a time       make clean  forgets everything that was built
# make fuzz   gives the operators what nobody should, for MINUTES; make fuzz-asan does so under sanitizers
# All of them set up .venv first where it is missing: PYTHON=... chooses the interpreter, TORCH=... the torch to install.

VENV := .venv
PY := $(VENV)/bin/python
TORCH ?= torch==2.13.0
JOBS ?= 2
MINUTES ?= 10
PROMPT ?= a red circle moving right on a blue background
SUITABLE := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c '$(SUITABLE)' 2>/dev/null && echo "$$p" && break; done)
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
PIP := $(PY) -m pip install --disable-pip-version-check

.PHONY: demo test bench lint fuzz fuzz-asan clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(VENV)/bin/kandinsky generate "$(PROMPT)" -o demo.mp4 --strip demo.png --seed 7

test: $(VENV)/.built $(VENV)/.test
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

bench: $(VENV)/.built $(VENV)/.test
	$(PY) -m benchmarks.ops

lint: $(VENV)/.built
	$(PIP) -q ruff
	$(PY) -m ruff check .

fuzz: $(VENV)/.built $(VENV)/.test
	OMP_WAIT_POLICY=passive $(PY) -m tests.fuzz.operators --minutes $(MINUTES)

# A copy of the tree with an extension that watches every access and every overflow. Python itself is not built so:
# the sanitizer is loaded before it, and what Python never frees is no leak of ours.
ASAN := build/asan
WATCH := -fsanitize=address,undefined -fno-sanitize=vptr,null,alignment,object-size -fno-sanitize-recover=undefined
fuzz-asan: $(VENV)/.built $(VENV)/.test
	rm -rf $(ASAN) && mkdir -p $(ASAN)
	cp -r csrc setup.py pyproject.toml README.md LICENSE NOTICE kandinsky_kernels kandinsky_model tests $(ASAN)/
	rm -f $(ASAN)/kandinsky_kernels/*.so
	sed -i 's/"-O3", "-std/"-O1", "-std/' $(ASAN)/setup.py
	cd $(ASAN) && PATH="$(CURDIR)/$(VENV)/bin:$$PATH" CFLAGS="-g0 -fno-omit-frame-pointer $(WATCH)" LDFLAGS="$(WATCH)" \
		KANDINSKY_KERNELS_BUILD=cpu $(CURDIR)/$(PY) setup.py -q build_ext --inplace
	cd $(ASAN) && LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_WAIT_POLICY=passive PYTHONPATH=. \
		$(CURDIR)/$(PY) -m tests.fuzz.operators --minutes $(MINUTES)

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

# SPDX-License-Identifier: Apache-2.0
# make demo   writes demo.mp4 from PROMPT          make bench   times the operators on this machine
# make test   runs the tests, JOBS at a time       make lint    checks formats and types
# make clean  forgets everything that was built    make format  formats the sources
# make test-oldest, make test-newest   run the tests with the oldest and the newest packages that pyproject.toml allows
# make wheel  builds dist/*.whl, which runs with every Python and torch that pyproject.toml allows
# make wheel-cuda  builds dist/cuda/*.whl for CUDA_ARCH (9.0), without a GPU: for benchmarks/gpu/gate.sh. It needs nvcc and a
#             torch built with CUDA: CUDA_PYTHON=... names an interpreter that has it, setuptools and ninja (default: .venv's)
# make hub    lays build/hub out as the Hugging Face hub builds kernels from it, and compiles it for this machine's CPU
# make fuzz   gives operators and loaders what nobody should, for MINUTES each; make fuzz-asan does so under sanitizers
# All of them set up .venv first where it is missing: PYTHON=... chooses the interpreter, TORCH=... the torch to install.

VENV := .venv
PY := $(VENV)/bin/python
TORCH ?= torch==2.13.0
JOBS ?= 2
MINUTES ?= 10
CUDA_ARCH ?= 9.0
CUDA_PYTHON ?= $(PY)
PROMPT ?= a red circle moving right on a blue background
SUITABLE := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c '$(SUITABLE)' 2>/dev/null && echo "$$p" && break; done)
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
FORMATTED := $(SOURCES) $(wildcard hub/*.cpp tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.h)
COMMA := ,
PIP := $(PY) -m pip install --disable-pip-version-check

.PHONY: demo test test-oldest test-newest wheel wheel-cuda hub bench lint format fuzz fuzz-asan clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	@$(VENV)/bin/kandinsky generate "$(PROMPT)" -o demo.mp4 --strip demo.png --seed 7

test: $(VENV)/.built $(VENV)/.test
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# $(call suite,folder,packages): the tests in a copy of the tree, with an environment of its own and an extension that
# is compiled for the CPU against its torch. Both lie in build/folder; the environment is kept for the next time.
define suite
	test -x build/$(1)/venv/bin/python || "$(PYTHON)" -m venv build/$(1)/venv
	build/$(1)/venv/bin/python -m pip install --disable-pip-version-check -q "setuptools>=77" ninja $(2)
	rm -rf build/$(1)/tree && mkdir -p build/$(1)/tree
	tar -cf - --exclude=./build --exclude=./.venv --exclude=./.git --exclude='*.so' . | tar -xf - -C build/$(1)/tree
	cd build/$(1)/tree && PATH="$(CURDIR)/build/$(1)/venv/bin:$$PATH" KANDINSKY_KERNELS_BUILD=cpu python setup.py -q build_ext --inplace
	test ! -d ../shared || ln -sfn "$(CURDIR)/../shared" build/$(1)/shared
	cd build/$(1)/tree && OMP_WAIT_POLICY=passive ../venv/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)
endef

# The oldest packages have wheels for Python 3.10 to 3.12.
test-oldest: wheel
	$(call suite,oldest,$$("$(PYTHON)" tests/support/oldest.py))

test-newest: wheel
	$(call suite,newest,--upgrade --upgrade-strategy eager $$("$(PYTHON)" tests/support/oldest.py --names))

# $(call wheel,what to build,interpreter,folder): KANDINSKY_KERNELS_BUILD is cpu or cuda. setuptools would also pack what
# earlier builds left.
define wheel
	rm -rf build/lib build/bdist.* $(3)/*.whl
	KANDINSKY_KERNELS_BUILD=$(1) PATH="$(abspath $(dir $(2))):$$PATH" \
		$(2) -m pip wheel --disable-pip-version-check -q --no-build-isolation --no-deps -w $(3) .
endef

wheel: $(VENV)/.installed
	$(call wheel,cpu,$(PY),dist)

wheel-cuda: export TORCH_CUDA_ARCH_LIST = $(CUDA_ARCH)
wheel-cuda: $(if $(filter $(PY),$(CUDA_PYTHON)),$(VENV)/.installed)
	$(call wheel,cuda,$(CUDA_PYTHON),dist/cuda)

hub: $(VENV)/.installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) csrc/hub/make.py --variant build/hub

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

fuzz: $(VENV)/.built $(VENV)/.test
	OMP_WAIT_POLICY=passive $(PY) -m tests.fuzz.operators --minutes $(MINUTES)
	OMP_WAIT_POLICY=passive $(PY) -m tests.fuzz.files --minutes $(MINUTES)
	OMP_WAIT_POLICY=passive $(PY) -m tests.fuzz.faults_cli

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

# $(call step,what is done,commands): one line of output; the commands' own is shown if they fail.
define step
	@echo "$(1)"
	@mkdir -p build
	@{ $(2); } >build/setup.log 2>&1 || { cat build/setup.log; exit 1; }
	@touch $@
endef

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is required, found none on PATH; install it or run make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c '$(SUITABLE)' || { echo "Python 3.10 or newer is required, got $$("$(PYTHON)" --version 2>&1); run make PYTHON=/path/to/python3"; exit 1; }
	$(call step,set-up 1 of 4: a virtual environment in $(VENV),$(PY) -m pip --version || "$(PYTHON)" -m venv $(VENV))

$(VENV)/.torch: $(VENV)/.python
	$(call step,set-up 2 of 4: $(TORCH)$(COMMA) which may take minutes,$(PY) -c 'import torch' || $(PIP) "$(TORCH)")

# Without build isolation the extension is compiled against the torch above, and no second torch is fetched.
$(VENV)/.installed: setup.py pyproject.toml $(VENV)/.torch
	$(call step,set-up 3 of 4: the packages and what they need,$(PIP) "setuptools>=77" ninja && KANDINSKY_KERNELS_BUILD=none $(PIP) --no-build-isolation -e .)

$(VENV)/.built: $(SOURCES) $(VENV)/.installed
	$(call step,set-up 4 of 4: compiling the kernels,PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) setup.py -q build_ext --inplace)

$(VENV)/.test: pyproject.toml $(VENV)/.installed
	$(call step,set-up of the tests,KANDINSKY_KERNELS_BUILD=none $(PIP) --no-build-isolation -e ".[test]")

$(VENV)/.lint: pyproject.toml $(VENV)/.installed
	$(call step,set-up of formatters and type checker,KANDINSKY_KERNELS_BUILD=none $(PIP) --no-build-isolation -e ".[dev]")

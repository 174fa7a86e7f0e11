# Every target sets up what it needs: a virtual environment with the versions of constraints.txt, and the native build.
#
#   make demo        compress a network on real data, print what it brings, write report.html
#   make test        all Python tests                     PYTEST_ARGS="-m 'not slow' tests/ops" PYTEST_JOBS=0
#   make cpp-test    C++ tests, plain and under the address, undefined-behaviour and thread sanitizers
#   make lint        ruff, mypy, clang-format
#   make bench       latency benchmark                    BENCH_ARGS="--suite tucker2 --threads 2"
#   make build       virtual environment and native code only
#   make cuda-check  compile and link all CUDA code; needs nvcc, no GPU
#   make clean       remove what was built; the virtual environment stays
#
# Variables: PYTHON (3.10 or later), VENV (where the environment lies), PYTEST_JOBS (processes that test; 0: none but
# pytest's own, as a debugger wants it), and PIP_INSTALL_ARGS for the installation of torch. On Linux the plain package
# index gives the CUDA build of torch, some gigabytes; for the CPU build name PyTorch's CPU index:
# make demo PIP_INSTALL_ARGS="--index-url <PyTorch's index for cpu wheels>".

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: build demo test cpp-test lint format bench cuda-check clean

PYTHON ?= python3
VENV ?= .venv
PIP_INSTALL_ARGS ?=
PYTEST_ARGS ?=
PYTEST_JOBS ?= $(shell nproc)
DEMO_ARGS ?=
BENCH_ARGS ?= --suite tucker2
SANITIZERS ?= none address,undefined thread

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# ninja, cmake and the like are found in the environment first.
export PATH := $(BIN):$(PATH)
# A user's installation does not fail over a warning; ours does.
export TENSORCOMP_WERROR ?= 1

INSTALLED := $(VENV)/.tensorcomp-installed
NATIVE := tensorcomp_ext/_ops.so
NATIVE_SOURCES := $(shell find csrc -name tests -prune -o -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print)

build: $(NATIVE)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: it may need another index, and the native code is compiled against it.
# The package itself is installed without native code, which the next rule builds in place and incrementally.
$(INSTALLED): constraints.txt pyproject.toml | $(BIN)/python
	$(PIP) $(PIP_INSTALL_ARGS) torch
	$(PIP) setuptools wheel ninja
	TENSORCOMP_NATIVE=0 $(PIP) --no-build-isolation -e '.[demo,dev]'
	touch $@

$(NATIVE): $(INSTALLED) setup.py $(NATIVE_SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: build
	$(BIN)/tensorcomp demo $(DEMO_ARGS)

# Several processes share the cores, so that threads of one that wait must not spin.
test: build
	TENSORCOMP_EXPECT_NATIVE=1 OMP_WAIT_POLICY=passive \
	  $(BIN)/python -m pytest --numprocesses $(PYTEST_JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

bench: build
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

# Threads race whatever their instructions: under the thread sanitizer the portable kernels stand for all.
cpp-test: $(INSTALLED)
	command -v cmake >/dev/null || $(PIP) cmake
	set -e; for sanitizer in $(SANITIZERS); do \
	  tree=cmake-build-$${sanitizer//,/-}; \
	  [[ $$sanitizer == thread ]] && portable=ON || portable=OFF; \
	  cmake -S . -B $$tree -G Ninja -DPython3_EXECUTABLE=$(BIN)/python \
	    -DTENSORCOMP_SANITIZE=$${sanitizer/none/} -DTENSORCOMP_PORTABLE=$$portable \
	    -DTENSORCOMP_BUILD_TESTS=ON -DTENSORCOMP_WERROR=ON; \
	  cmake --build $$tree; \
	  ctest --test-dir $$tree --parallel "$$(nproc)" --output-on-failure; \
	done

cuda-check: $(INSTALLED)
	$(BIN)/python cmake/cuda_check.py

clean:
	rm -rf build dist cmake-build* *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f tensorcomp_ext/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

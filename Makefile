# Every target sets up its environment by itself, from constraints.txt, when it is missing or out of date.

# Of another release of torch than the pinned one, an environment of its own: make test TORCH=2.15.0
TORCH ?=
RELEASES ?= 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0

VENV := .venv$(addprefix -,$(TORCH))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter that runs (a pyenv shim may not), is new enough for constraints.txt, can make an environment and
# has its headers. The system's comes first: distributions build it with profiles and link-time optimisation, pyenv with
# neither, which takes the tests a quarter longer.
PYTHON ?= $(shell for python in /usr/bin/python3.11 python3.11 python3 python3.12 python3.13 python; do \
	$$python -c 'import ensurepip, os, sys, sysconfig, venv; sys.exit(sys.version_info < (3, 11) \
	or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' >/dev/null 2>&1 && echo $$python && break; done)

# Inductor compiles its CPU kernels with $CXX or g++; without either, a wheel brings a compiler.
ifeq ($(origin CXX),default)
ifeq ($(shell command -v g++ 2>/dev/null),)
export CXX := $(CURDIR)/tools/zig-c++
COMPILER := ziglang
endif
endif

# Inductor hashes its precompiled headers with the openssl command.
ifeq ($(shell command -v openssl 2>/dev/null),)
export TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS ?= 0
endif

.PHONY: help setup demo test test-all integrations accept lint format bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP)  ## create .venv with the pinned versions; another: make setup TORCH=2.15.0

# NOTE: triton apart from the rest
# torch's CUDA build requires a triton of its own and must get it, so the first resolution does not see our pin. The CPU
# build brings none; the tests that run kernels under Triton's interpreter then need the pinned one. Another release of
# torch may also ask for another sympy or setuptools than the pinned one does, and chooses them.
$(STAMP): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv and ensurepip was found: try make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	sed '/^triton==/d$(if $(TORCH),;/^sympy==/d;/^setuptools==/d;s/^torch==.*/torch==$(TORCH)/)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt 'setuptools>=77' torch $(COMPILER)
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt --no-build-isolation -e '.[test,examples,bench,lint]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt triton
	@touch $@

demo: $(STAMP)  ## train a small language model with and without inductor_ce; options: make demo ARGS=--help
	$(BIN)/python examples/quickstart.py $(ARGS)

# Two workers with one thread each: the tests are many and small. A file goes to one worker, for what its tests share.
test: export OMP_NUM_THREADS := 1
test: export TORCHINDUCTOR_COMPILE_THREADS := 1
test: $(STAMP)  ## run the tests; one: make test ARGS="-k name"; on another torch: make test TORCH=2.15.0
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all:  ## run the tests on every supported torch, each in an environment of its own, and write docs/torch_versions.md
	$(PYTHON) tools/releases.py $(RELEASES)

integrations: export OMP_NUM_THREADS := 1
integrations: export TORCHINDUCTOR_COMPILE_THREADS := 1
integrations: $(STAMP)  ## install and test with other projects; a few: make integrations ONLY="transformers accelerate"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation $(or $(ONLY),-e '.[integrations]')
	$(if $(ONLY),,$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps litgpt torchtitan)
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests/integrations $(ARGS)

accept: export EXPECTTEST_ACCEPT := 1
accept: test  ## run the tests and take what they print as the new golden outputs

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## time cross entropy against eager, plain torch.compile and installed peers (needs a GPU)
	$(BIN)/python -m inductor_ce.bench ce $(ARGS)

clean:  ## remove what was built; environments stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

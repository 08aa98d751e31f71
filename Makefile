# `make help` lists what there is. Every target installs what it needs into .venv by itself.

PYTHON ?= python3# the interpreter that .venv is made from, 3.10 or newer
ARGS ?=#           passed on by test, codegen, demo, bench, micro and gpu: make test ARGS="-k keras"

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
DECLARED := pyproject.toml setup.py constraints.txt
NATIVE := $(wildcard csrc/include/*/*.h csrc/cpu/* csrc/cuda/*.cu*) fused_adafactor/building.py
NVCC = $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc) $(shell command -v nvcc))
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O2
ASAN_TESTS ?= tests/kernels/test_cpp.py tests/kernels/test_biting_shapes.py tests/kernels/test_bits.py tests/kernels/test_blocks_of_moments.py tests/parity/test_shapes.py

.DEFAULT_GOAL := help
.PHONY: help setup build lint type arch fmt test test-interpret test-asan codegen demo bench micro gpu ci clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.stamp-dev ## make .venv with everything for development (again: a moment)

build: .venv/.stamp-run ## build the wheel into dist/, in an isolated environment without torch
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps -w dist .

lint: .venv/.stamp-dev ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: .venv/.stamp-dev ## mypy, strict, on the package
	$(BIN)/mypy

arch: .venv/.stamp-dev ## import-linter: who may import whom
	$(BIN)/lint-imports

fmt: .venv/.stamp-dev ## reformat, and apply ruff's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What ARGS selects may be in one of the two runs only: pytest's "no tests collected", 5, is no failure then.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
OR_NONE = $(if $(ARGS),|| [ $$? -eq 5 ])

test: .venv/.stamp-dev ## run all the tests, on all cores (ARGS="-n 0" for one process, say with --pdb)
	TRITON_INTERPRET= FUSED_ADAFACTOR_REQUIRE_PEERS=1 $(PYTEST) $(ARGS) $(OR_NONE)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpret $(ARGS) $(OR_NONE)

# Triton reads the variable when it is imported, so these tests have a process of their own.
test-interpret: .venv/.stamp-dev ## run the Triton kernels in Triton's interpreter (a part of make test)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpret $(ARGS)

# A build of its own, which leaves the one that is installed alone. Python and torch are not built with the sanitizer,
# so its library is loaded before them; what they never free is not looked for.
test-asan: .venv/.stamp-dev ## run the kernels' tests with AddressSanitizer and UBSan in the C++ library
	FUSED_ADAFACTOR_BUILD=cpp FUSED_ADAFACTOR_CXXFLAGS="$(SANITIZE)" \
	    $(BIN)/python setup.py -q build_ext --build-lib build/asan --build-temp build/asan/objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	    FUSED_ADAFACTOR_LIBRARY=$(CURDIR)/build/asan/fused_adafactor/libfused_adafactor.so \
	    $(BIN)/python -m pytest -n auto --dist worksteal $(ASAN_TESTS) $(ARGS)

codegen: .venv/.stamp-dev ## compile the kernels for GPUs that are not here: no spills, wide accesses (minutes)
	$(if $(NVCC),$(BIN)/python -m fused_adafactor codegen --backend cuda $(ARGS),@echo "no nvcc here: the CUDA library is left out")
	$(BIN)/python -m fused_adafactor codegen --backend triton $(ARGS)

demo: .venv/.stamp-run ## see it work (installs torch, the package and matplotlib only)
	$(BIN)/python -m fused_adafactor demo $(ARGS)

bench: .venv/.stamp-run ## measure it on this machine
	$(BIN)/python -m fused_adafactor bench $(ARGS)

micro: .venv/.stamp-dev ## time what surrounds the arithmetic, with pytest-benchmark
	$(BIN)/python -m pytest bench $(ARGS)

# With the machine's own Python, torch, Triton and pytest; no .venv.
gpu: ## check and measure all of it on a GPU: ten minutes, no install (records in gpu-output/, or OUT=DIR)
	PYTHONPATH=. $(PYTHON) -m bench.gpu $(ARGS)

ci: lint type arch test ## what must pass before a change lands

clean: ## remove .venv and everything that was built or drawn
	rm -rf .venv build demo-output dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than the files that it depends on once their packages are in. It is touched last, so an
# install that was cut off is done again.

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.stamp-run: $(DECLARED) $(NATIVE) | .venv/bin/python
	$(PIP) -e '.[plot]'
	@touch $@

.venv/.stamp-dev: .venv/.stamp-run
	$(PIP) -e '.[plot,test,peers,dev]'
	# timm asks for torchvision, and torchvision for a torch of its own: by itself, and without them.
	$(PIP) --no-deps timm
	@touch $@

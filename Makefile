# One command a habit; CI calls the same ones.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTHON ?= python3
NATIVE := runtime/lorastack/kernels/native
LIBRARY := $(NATIVE)/liblorastack.so
SANITIZED := build/liblorastack-sanitized.so
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
PROTOS := $(wildcard protos/lorastack/v1/*.proto)
# A process for each core, up to eight; `make test JOBS=0` runs all tests in one.
JOBS ?= auto
PYTEST = $(VENV)/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
PROTOC = $(PY) -m grpc_tools.protoc -Iprotos --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)

.PHONY: install proto check check-native check-x86 check-arm check-triton check-gpu format test test-quick test-real test-mistral fuzz demo bench bench-load bench-parts bench-paging peers serve clean

install: $(STAMP) $(LIBRARY)

# Without a C++ compiler it says so, and everything runs in plain torch.
$(LIBRARY): $(wildcard $(NATIVE)/*.cpp $(NATIVE)/*.h) $(NATIVE)/build.py | $(STAMP)
	@echo 'compiling the native kernels ...'
	@$(PY) -m lorastack.kernels.native.build

$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || { echo 'making $(VENV) ...'; $(PYTHON) -m venv $(VENV); }
	@echo 'installing lorastack and what it needs into $(VENV) (torch is large: minutes) ...'
	@$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

proto: $(STAMP)
	$(call PROTOC,runtime)

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint Dockerfile
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && $(call PROTOC,$$tmp) && \
	  diff -r -x __init__.py -x __pycache__ "$$tmp/lorastack/v1" runtime/lorastack/v1 || \
	  { echo 'lorastack/v1 differs from protos/: run "make proto" and commit the result' >&2; exit 1; }
	$(VENV)/bin/pytest -q tests/test_layering.py

# The kernels' tests, for every instruction set of this machine, on a library that ends the process
# at the first bad access or undefined operation. CPython and torch keep memory until they end, so leaks are not looked for.
check-native: install
	mkdir -p $(dir $(SANITIZED)) && rm -f $(SANITIZED)
	$(PY) -m lorastack.kernels.native.build $(SANITIZED) $(SANITIZE)
	LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	  $(VENV)/bin/pytest --native-library $(SANITIZED) tests/kernels tests/model/test_native.py

# The kernels for AVX-512 and AMX on an x86-64 CPU that has neither: their sources as they are, with
# every intrinsic a loop over its lanes.
EVERY_ISA := build/x86/liblorastack.so
check-x86: install
	mkdir -p $(dir $(EVERY_ISA)) && rm -f $(EVERY_ISA)
	$(PY) -m tests.helpers.every_isa $(EVERY_ISA)
	$(PYTEST) --native-library $(EVERY_ISA) -k 'AMX or AVX512 or same_bits or agree' tests/kernels tests/model/test_native.py

# The kernels' tests for ARM, cross-compiled and run by qemu; NEON is compared with this machine's own.
ARM := build/arm
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu
check-arm: install
	@for tool in $(ARM_CXX) $(firstword $(ARM_RUN)); do command -v $$tool >/dev/null || \
	  { echo "make check-arm needs $$tool; Debian: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done
	rm -rf $(ARM) && mkdir -p $(ARM)
	CXX=$(ARM_CXX) $(PY) -m lorastack.kernels.native.build $(ARM)/liblorastack.so
	$(ARM_CXX) -O2 -std=c++17 -Wall -Wextra -I$(NATIVE) tests/helpers/emulated.cpp $(ARM)/liblorastack.so \
	  -Wl,-rpath,'$$ORIGIN' -o $(ARM)/emulated
	$(PYTEST) --emulated '$(ARM_RUN) $(ARM)/emulated' -k 'NEON or same_bits or agree' tests/kernels

# The Triton kernels without a GPU: the whole backend on CPU tensors in Triton's interpreter, then
# every kernel compiled for the devices that it may meet. What has not changed is not compiled again.
# Tests go to whoever is free: most of the time is spent in few files.
check-triton: export TRITON_CACHE_DIR ?= $(CURDIR)/build/triton
check-triton: PYTEST += --dist worksteal
check-triton: install
	TRITON_INTERPRET=1 $(PYTEST) tests/triton
	$(PYTEST) tests/triton/compiled

# On a machine with a GPU: the tests that need one, then, even so, the stages of benchmarks/gpu. See
# docs/gpu.md.
check-gpu: install
	$(VENV)/bin/pytest -m gpu; tests=$$?; $(PY) -m benchmarks.gpu.check && exit $$tests

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Kernels for devices are compiled by `make check-triton` alone.
test test-quick: PYTEST += --ignore tests/triton/compiled
test: install
	$(PYTEST)

test-quick: install
	$(PYTEST) -m 'not real and not slow'

test-real: install
	$(VENV)/bin/pytest -m real

# `make test` runs the same on a small model. The checkpoint (14.5 GB) is made once, in the cache
# folder; LORASTACK_MISTRAL_7B=DIR|HUB_ID runs real weights. See the folder's conftest.py.
test-mistral: install
	$(VENV)/bin/pytest tests/integration/mistral_7b --full-size --timeout 2400

# `make test` runs 500 of these cases; a failed one names its seed, for --fuzz-seed.
fuzz: install
	$(VENV)/bin/pytest tests/system/test_speculation.py --fuzz-cases 20000

demo: install
	$(PY) -m examples.demo

# The whole table: tokens/s beside the memory's limit and every peer of `make peers`.
bench: install
	$(PY) -m benchmarks.speed

# What speculation gains and costs at 1 to 64 concurrent rows: a table and a plot.
bench-load: install
	$(PY) -m benchmarks.load

bench-parts: install
	$(PY) -m benchmarks.step
	$(PY) -m benchmarks.profile
	$(PY) -m benchmarks.heads
	$(PY) -m benchmarks.memory

bench-paging: install
	$(PY) -m benchmarks.paging.listing
	$(PY) -m benchmarks.paging.cold_start
	$(PY) -m benchmarks.paging.stalls
	$(PY) -m benchmarks.paging.pressure
	$(PY) -m benchmarks.paging.zipf

# Other engines to compare with, each in its own environment.
PEERS := $(notdir $(patsubst %/requirements.txt,%,$(wildcard benchmarks/peers/*/requirements.txt)))
peers: $(PEERS:%=benchmarks/peers/%/.venv/.installed)

benchmarks/peers/%/.venv/.installed: benchmarks/peers/%/requirements.txt
	$(PYTHON) -m venv $(@D)
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(@D)/bin/python -m pip install --quiet -r $<
	touch $@

# The Docker images, where there is a daemon.
.PHONY: images
images:
	docker/build.sh

serve: install
	$(VENV)/bin/lorastack serve

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

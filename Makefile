# lowbit. `make serve` and `make test` install what is missing first; a second run installs nothing.

PYTHON ?= python3
MODEL ?= smollm2
PORT ?= 30000
# Further flags: pip's for torch ("--index-url …" for a build of your own choice), pytest's, the server's and
# those of the CPU benchmarks.
TORCH_FLAGS ?=
PYTEST_FLAGS ?=
SERVE_FLAGS ?=
BENCH_FLAGS ?=
CHECK_FLAGS ?=
REPORT_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
NATIVE := $(wildcard CMakeLists.txt) $(shell find src/lowbit/csrc cmake -type f 2>/dev/null)

.PHONY: install environment serve test test-quick test-all test-gpu check-gpu bench-gpu gpu-compile cross-check lint format docs formats-report bench bench-cpu clean
.DEFAULT_GOAL := install

# Nothing that is built needs torch or the other dependencies: the compiler works while they are fetched and
# unpacked, which keeps less than one core busy.
install:
	@$(MAKE) --no-print-directory --jobs=2 environment

environment: $(VENV)/.dependencies $(VENV)/.installed
	@:

# What builds the package: without isolation, with the pinned tools of this environment.
$(VENV)/.tools: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "lowbit needs Python 3.11 or newer; $(PYTHON) is older or missing. Run: make install PYTHON=python3.12" >&2; \
	    exit 2; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) scikit-build-core cmake ninja
	@touch $@

# torch comes first and pinned, so that no other package chooses its build.
$(VENV)/.dependencies: $(VENV)/.tools
	@echo "installing torch"
	@$(PIP) $(TORCH_FLAGS) torch
	@echo "installing the other dependencies"
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    print("\n".join(p["dependencies"] + p["optional-dependencies"]["test"]))' > $(VENV)/requirements.txt
	@$(PIP) --requirement $(VENV)/requirements.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.tools $(NATIVE)
	@echo "building lowbit"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@$(BIN)/python -m compileall -q src/lowbit  # also where PYTHONDONTWRITEBYTECODE is set
	@touch $@

serve: install
	@echo 'when the server is ready, try:'
	@echo "  curl http://127.0.0.1:$(PORT)/v1/chat/completions -H 'Content-Type: application/json' \\"
	@echo "    -d '{\"model\": \"default\", \"temperature\": 0, \"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}]}'"
	@exec $(BIN)/lowbit serve $(MODEL) --host 127.0.0.1 --port $(PORT) $(SERVE_FLAGS)

# One worker more than there are cores, as many tests wait for another process; a file's tests stay together, they share
# what is costly to set up. tests/conftest.py has the order. A worker that crashes ends the run: xdist, which would start
# another, then waits for ever for what the first had left (loadfile). Bytecode is written, also where the environment
# says not to: a file's assertions are rewritten once, not by every worker.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

test: install
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder \
		--max-worker-restart=0 $(PYTEST_FLAGS)

# Under 90 seconds: without the tests that start a server or compare with another library over long texts.
test-quick: install
	@$(BIN)/python -m pytest -m "not slow" --ignore=tests/server --ignore=tests/engine $(PYTEST_FLAGS)

test-all: install
	@$(BIN)/python -m pytest -m "" $(PYTEST_FLAGS)

# On an NVIDIA GPU where there is one, else in Triton's interpreter. GPU_PYTHON=python3 takes a Python that has
# torch with CUDA, Triton, pytest-xdist and what lowbit depends on already, and installs nothing; so do check-gpu and
# bench-gpu.
ifdef GPU_PYTHON
test-gpu check-gpu bench-gpu: export PYTHONPATH := src:$(PYTHONPATH)
else
GPU_PYTHON := $(BIN)/python
test-gpu check-gpu bench-gpu: install
endif

# On a GPU nearly all of the time is that of compiling some two thousand kernels: a process a core, up to 14.
GPU_WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 14 ? n : 14)))

test-gpu:
	@$(GPU_PYTHON) -m pytest -m "" -p no:cacheprovider --numprocesses=$(GPU_WORKERS) --dist=worksteal \
	    --ignore=tests/gpu/test_compiles.py tests/gpu $(PYTEST_FLAGS)

# Does it work on this GPU, and how fast, in less than 5 minutes; CHECK_FLAGS: --seconds, --only, --into.
check-gpu:
	@$(GPU_PYTHON) benchmarks/check_gpu.py $(CHECK_FLAGS)

# Kernels and steps on the GPU, into docs/results.md.
bench-gpu:
	@$(GPU_PYTHON) benchmarks/bench_gpu.py $(BENCH_FLAGS)

# Every launch of those tests, compiled for Ampere and Hopper; needs no GPU.
gpu-compile: install
	@$(BIN)/python -m pytest -m "" -rP tests/gpu/test_compiles.py $(PYTEST_FLAGS)

# Libraries for other CPUs: ARM's, compiled and run by an emulator (Debian's g++-aarch64-linux-gnu and qemu-user), and
# AVX-512's with its instructions emulated.
cross-check: install
	@command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null || { \
	    echo "cross-check needs g++-aarch64-linux-gnu and qemu-user. Run: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; \
	    exit 2; }
	@$(BIN)/python -m pytest -m "" tests/kernels/test_emulated_avx512.py tests/kernels/test_cross_build.py \
		$(PYTEST_FLAGS)

lint: install
	@$(BIN)/ruff check src tests benchmarks
	@$(BIN)/ruff format --check src tests benchmarks
	@$(BIN)/mypy src/lowbit benchmarks

format: install
	@$(BIN)/ruff check --fix src tests benchmarks
	@$(BIN)/ruff format src tests benchmarks

docs: install
	@$(BIN)/python -m lowbit.settings_docs > docs/options.md
	@$(BIN)/python -c "from lowbit.doctor import rules_page; print(rules_page(), end='')" > docs/check.md
	@PYTHONPATH=tests $(BIN)/python tests/formats/formats_page.py > docs/formats.md

# Every fixture made anew by the tools that are installed, beside what is stored; nothing is touched. Further words
# (fixture folders, --source TOOL=DIR, --write): REPORT_FLAGS.
formats-report: install
	@$(BIN)/python tests/fixtures/making/report.py $(REPORT_FLAGS)

bench: install
	@$(BIN)/python benchmarks/ready.py
	@$(BIN)/python benchmarks/serving.py

# Kernels, attention, serving beside other engines, and every format served, into docs/results.md; rivals: see
# benchmarks/bench_cpu.py.
bench-cpu: install
	@$(BIN)/python benchmarks/bench_cpu.py $(BENCH_FLAGS)

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

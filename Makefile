# Each target works from nothing on a fresh machine: it makes .venv, installs torch first, then the
# rest. What was installed is remembered in stamp files, so a second call starts at once.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# What `make demo` passes on: --prompt "...", --genlen N, --seed N, ...
DEMO_ARGS ?= --seed 1
PYTEST_ARGS ?= -q -n 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# The kernels that this machine can run; `make wheel` and `make cuda` compile the CUDA ones anyway.
DEVICES := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cpu,cuda || echo cpu)
INSTALL := MAMBA_SSM_BUILD_DEVICES=$(DEVICES) $(PIP) --no-build-isolation
SOURCES := $(shell find csrc -type f)
CPP := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

.PHONY: demo test test-transformers4 build cuda docs sanitize bench lint format wheel clean
.DELETE_ON_ERROR:

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" setuptools wheel ninja
	@touch $@

# The package alone, editable: what the demo needs.
$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py
	$(INSTALL) -e .
	@touch $@

# The same with the tools that tests, lint and benchmarks need.
$(VENV)/.dev: $(VENV)/.package
	$(INSTALL) -e ".[dev]"
	@touch $@

# Kernels newer than the sources; the builder itself skips what did not change.
$(VENV)/.kernels: $(VENV)/.package mamba_ssm/_build.py $(SOURCES)
	-$(BIN)/python -m mamba_ssm build --device $(DEVICES)
	@touch $@

demo: $(VENV)/.package
	$(BIN)/python -m mamba_ssm generate --stream $(DEMO_ARGS)

test: $(VENV)/.dev $(VENV)/.kernels
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# transformers 4.x as a client, in an environment of its own that finds torch and the rest in $(VENV).
TRANSFORMERS4 ?= transformers==4.57.6
TF4 := $(VENV)-transformers4
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
$(TF4)/.installed: $(VENV)/.dev
	$(BIN)/python -m venv $(TF4)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > \
		"$$($(TF4)/bin/python $(PURELIB))/base.pth"
	$(TF4)/bin/python -m pip --disable-pip-version-check install --quiet "$(TRANSFORMERS4)"
	@touch $@

test-transformers4: $(TF4)/.installed $(VENV)/.kernels
	$(TF4)/bin/python -m pytest -q tests/test_transformers_v4_client.py tests/test_compat.py

build: $(VENV)/.package
	$(BIN)/python -m mamba_ssm build --device $(DEVICES)

# Compiles the CUDA library whether or not a GPU is here; fails without nvcc.
cuda: $(VENV)/.package
	$(BIN)/python -m mamba_ssm build --device cuda

# The CPU kernels' tests with AddressSanitizer and UBSan compiled in: any bad access ends the run.
SANITIZED := build/sanitize
SANITIZE_TESTS ?= test_selective_scan.py test_causal_conv1d.py test_norm.py test_state_update.py \
	test_native_isa.py test_native_conv_norm.py test_native_state_update.py test_cpu_decode.py \
	test_cpu_choice.py test_native_scan_segments.py test_quantize.py
sanitize: $(VENV)/.dev
	$(BIN)/python -m mamba_ssm build --device cpu --sanitize --output $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 CXX=g++ \
	UBSAN_OPTIONS=print_stacktrace=1 MAMBA_SSM_LIBRARY_DIR=$(abspath $(SANITIZED)) \
	$(BIN)/python -m pytest -q -p no:cacheprovider -k "(native or cpu_decode or cpu_choice or quantize) and not compiles and not wide_code" \
	$(addprefix tests/,$(SANITIZE_TESTS))

bench: $(VENV)/.dev $(VENV)/.kernels
	$(BIN)/python benchmarks/benchmark_generation_mamba_simple.py --promptlen 100 --genlen 100

# The documentation's site in build/site; any warning fails it.
$(VENV)/.docs: $(VENV)/.package
	$(INSTALL) -e ".[docs]"
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# dist/mamba_ssm-*-py3-none-PLATFORM.whl with every kernel that can be compiled here.
wheel: $(VENV)/.torch
	$(BIN)/python -m pip --disable-pip-version-check wheel . --no-deps --no-build-isolation -w dist

clean:
	rm -rf build dist *.egg-info mamba_ssm/_native_*.so

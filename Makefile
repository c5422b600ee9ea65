# Each target works alone on a fresh machine with Python >= 3.10 and a C++ compiler; `make docs` needs Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml tests/requirements.txt $(shell find building/*.py csrc -type f)

.PHONY: test bench lab lint docs gpu-check cuda-build clean

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

# Every experiment of the laboratory with few seeds: a first look, within an hour on 2 cores. Stopped, it goes on later.
# The full run takes hours: `.venv/bin/python -m openmythos lab --resume`.
lab: $(VENV)/installed
	$(BIN)/python -m openmythos lab --seeds 1 --minutes 60 --resume

# Ruff, clang-format and mypy; changes nothing. `.venv/bin/pre-commit run --all-files` runs the same checks and fixes.
CXX_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

# The documentation, in build/site. A broken link, anchor or docstring is an error; nothing is fetched.
docs: $(VENV)/tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Needs a GPU: verifies, then measures, and writes results/gpu-check.md. Without a GPU it says so and fails.
gpu-check: $(VENV)/installed
	$(BIN)/python -m tools.gpu_check

# The last line reports what was built: without a working compiler everything runs on the reference.
$(VENV)/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps open-mythos==0.5.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m openmythos_kernels info
	@touch $@

$(VENV)/tools: tools/requirements.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $< -c tests/requirements.txt
	@touch $@

# The whole extension with its CUDA kernels, against a CUDA build of PyTorch (5.4 GB, in an environment of its own).
# Needs nvcc but no GPU: without a driver, the kernels must be present and refuse to run with a reason.
CUDA_VENV := .venv-cuda
CUDA_TORCH ?= torch==2.14.1

cuda-build: $(CUDA_VENV)/torch
	$(CUDA_VENV)/bin/python setup.py -q build --build-base $(CUDA_VENV)/build --build-lib $(CUDA_VENV)/built
	cd $(CUDA_VENV) && PYTHONPATH=built bin/python ../tools/cuda_build.py

$(CUDA_VENV)/torch:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(CUDA_TORCH) numpy setuptools ninja
	@touch $@

clean:
	rm -rf $(VENV) $(CUDA_VENV) build results .mypy_cache .ruff_cache *.egg-info openmythos_kernels/*.so openmythos_kernels/_build.json

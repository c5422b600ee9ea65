# `make test` and `make bench`: each alone on a fresh machine with Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml tests/requirements.txt $(shell find building/*.py csrc -type f)

.PHONY: test bench gpu-check cuda-build clean

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

# Needs a GPU: verifies, then measures; writes results/gpu-check.md. Without a GPU it says so (the script: status 3, which make turns into its 2).
gpu-check: $(VENV)/installed
	$(BIN)/python -m tools.gpu_check

# Ends with what was built: without a working compiler it says so, and everything runs on the reference.
$(VENV)/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps open-mythos==0.5.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m openmythos_kernels info
	@touch $@

# The whole extension, CUDA kernels included, against a CUDA build of PyTorch (5.4 GB, so in an environment of its own);
# needs nvcc. No GPU is needed: without a driver the kernels must be there and refuse politely.
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
	rm -rf $(VENV) $(CUDA_VENV) build results *.egg-info openmythos_kernels/*.so openmythos_kernels/_build.json

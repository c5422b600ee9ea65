# `make test` and `make bench`: each alone on a fresh machine with Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml tests/requirements.txt $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: test bench clean

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

# Ends with what was built: without a working compiler it says so, and everything runs on the reference.
$(VENV)/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps open-mythos==0.5.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m openmythos_kernels info
	@touch $@

clean:
	rm -rf $(VENV) build results *.egg-info openmythos_kernels/*.so

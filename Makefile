# `make demo` and `make test` need nothing but Python 3.10 or newer; both make their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One resolution for everything: a release of torchvision fits one release of torch only.
TORCH ?= torch==2.13.0

# An editable install is a folder of links, one for each file: a new file, which changes its folder, needs one too.
SOURCES := pyproject.toml setup.py $(shell find engine kernels training benchmarks nnturbo -type d ! -name __pycache__)

# Tests start many processes: with bytecode on disk, none of them compiles the modules again.
unexport PYTHONDONTWRITEBYTECODE

DEMO_MODEL ?= examples/demo_model
# What is known of that model over many phantoms; of another one nothing is.
DEMO_RESULTS := $(if $(filter examples/demo_model,$(DEMO_MODEL)),--held_out benchmarks/results/demo_model.json)

.PHONY: demo test test-rest test-all check benchmark guard dist clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$@ -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[demo]"
	touch $@

$(VENV)/.dev: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[dev]"
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/nnturbo demo -m $(DEMO_MODEL) -o demo $(DEMO_RESULTS)

# Two processes; one that is done takes over tests of the other. A test that hangs fails, and says where its threads were.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

test: $(VENV)/.dev
	$(PYTEST)

# What `make test` leaves out for its time.
test-rest: $(VENV)/.dev
	$(PYTEST) -m "thorough and not slow"

test-all: test test-rest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

benchmark: $(VENV)/.dev
	$(BIN)/nnturbo benchmark

# Fails where something became much slower.
guard: $(VENV)/.dev
	$(BIN)/python -m nnturbo.benchmarks.guard

# The source distribution and the wheels of all systems, tried in fresh environments.
dist:
	PYTHON=$(PYTHON) .ci/dist

clean:
	rm -rf $(VENV) demo *.egg-info build dist

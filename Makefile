# `make demo` and `make test` need nothing but Python 3.10 or newer; both make their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One resolution for everything: a release of torchvision fits one release of torch only.
TORCH ?= torch==2.13.0

# A model and a scan to demonstrate on; until nnturbo brings its own, they lie beside the checkout or are named here.
SHARED ?= ../shared
DEMO_MODEL ?= $(SHARED)/models/Dataset501_Abdomen/nnUNetTrainer__smallPlans__3d_fullres
DEMO_SCAN ?= $(SHARED)/data/abdomen_ct_0000.nii.gz

.PHONY: demo test check benchmark clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$@ -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e .
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[dev]"
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	@test -d "$(DEMO_MODEL)" && test -f "$(DEMO_SCAN)" || { \
	  echo "make demo needs a trained nnU-Net model and a scan it fits; there is none at"; \
	  echo "  $(DEMO_MODEL)"; echo "  $(DEMO_SCAN)"; \
	  echo "Name yours: make demo DEMO_MODEL=path/to/model/folder DEMO_SCAN=path/to/scan_0000.nii.gz"; exit 1; }
	$(BIN)/nnturbo predict -i "$(DEMO_SCAN)" -o demo -m "$(DEMO_MODEL)" --disable_tta --verbose
	@echo "volumes, times by stage and what made them: demo/predictions.json"

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

benchmark: $(VENV)/.dev
	$(BIN)/python -m nnturbo.benchmarks.stages --json benchmarks/results/stages.json
	$(BIN)/python -m pytest benchmarks --benchmark-only

clean:
	rm -rf $(VENV) demo *.egg-info build

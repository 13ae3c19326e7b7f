# Every target sets up what it needs; what is already there is skipped.
#   make compare        sequential against unified in the lab: three seeds, a figure and a table, minutes
#   make test           the test suite
# Others: compare-full, test-slow, lint, format, clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
export TOKENIZERS_PARALLELISM := false

.PHONY: compare compare-full compare-quick test test-slow lint format setup clean

setup: $(VENV)/.installed
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch first, then the rest) ..."
	@$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) torch==2.13.0
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) -e ".[dev,peers]"
	@touch $@

compare: $(VENV)/.installed
	$(BIN)/python -m experiments.sequential_vs_unified

compare-full: $(VENV)/.installed
	$(BIN)/python -m experiments.sequential_vs_unified --full

compare-quick: $(VENV)/.installed
	$(BIN)/python -m experiments.sequential_vs_unified --quick

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache

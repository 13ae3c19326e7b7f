# Every target sets up what it needs; what is already there is skipped.
#   make compare        sequential against unified in the lab: three seeds, a figure and a table, minutes
#   make test           the test suite
#   make studies        every other experiment of the lab, three seeds each: hours; one of them as STUDY=loss_zoo
#   make report         all results as one page that opens offline: runs/report/report.html
#   make real-small     the same question on real text and feedback; the files' folder as DATA=...
#   make bench-kernels  heads against every peer and the bare products, on a GPU or at the CPU's shapes
#   make bench-training a training step beside TRL's; real prompts from a folder of files as DATA=...
#   make paper-dry-run  the arms of the UFT paper, lm-eval and its tables, on a toy without network; a minute
#   make data-quality   what is in files of feedback, and what a filter leaves of them; the files' folder as DATA=...
#   make bench-memory   measured peaks of training steps against the formula of uft/memory.py: a table and a figure, minutes
#   make label-noise    which judgements were turned round, and how many, found by rewards trained on the others; minutes
#   make active-selection  which pairs to label next: five rules on two pools; tens of minutes
#   make docs           the documentation as a site that opens offline: site/index.html; make docs-serve while writing
#   make notebooks      executes the four notebooks and stores what they show; minutes
# Others: compare-full, compare-quick, test-slow, test-oldest, test-deepspeed, lint, typecheck, coverage, dist, test-wheel, hooks, format, clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
export TOKENIZERS_PARALLELISM := false
SHELL := /bin/bash

.PHONY: docs docs-serve notebooks label-noise active-selection compare compare-full compare-quick studies report real-small bench-kernels bench-training bench-memory data-quality paper-dry-run test test-slow test-oldest test-deepspeed test-wheel lint typecheck coverage dist hooks format setup clean

setup: $(VENV)/.installed
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch first, then the rest) ..."
	@$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) torch==2.13.0
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) -e ".[dev,docs,peers,sweep,eval]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(PIP) -e ".[docs]"
	@touch $@

compare: $(VENV)/.installed
	$(BIN)/python -m experiments.sequential_vs_unified

compare-full: $(VENV)/.installed-dev
	$(BIN)/python -m experiments.sequential_vs_unified --full

compare-quick: $(VENV)/.installed
	$(BIN)/python -m experiments.sequential_vs_unified --quick

STUDY ?= mixing_ratio weight_schedule lr_beta loss_zoo feedback_noise scale reference forgetting_budget exact_paths reward_hacking label_noise active_selection kl_law
studies: $(VENV)/.installed-dev
	@for study in $(STUDY); do $(BIN)/python -m experiments.$$study || exit 1; done

report: $(VENV)/.installed
	$(BIN)/python -m experiments.report

real-small: $(VENV)/.installed
	$(BIN)/python -m experiments.real_small $(if $(DATA),--data $(DATA))

bench-kernels: $(VENV)/.installed-dev
	$(BIN)/python kernels/bench/heads.py
	$(BIN)/python kernels/bench/logits.py

bench-training: $(VENV)/.installed-dev
	$(BIN)/python -m experiments.training_speed $(if $(DATA),--data $(DATA))

paper-dry-run: $(VENV)/.installed-dev
	$(BIN)/python -m experiments.paper_uft --dry-run

bench-memory: $(VENV)/.installed
	$(BIN)/python -m experiments.memory

data-quality: $(VENV)/.installed
	$(BIN)/python -m experiments.data_quality --data $(or $(DATA),$(error DATA=folder of the files))

label-noise: $(VENV)/.installed
	$(BIN)/python -m experiments.label_noise

active-selection: $(VENV)/.installed
	$(BIN)/python -m experiments.active_selection

# Material's notice of a next major version of MkDocs, which the extra leaves out
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs serve --watch uft --watch kernels

notebooks: $(VENV)/.installed-dev
	$(BIN)/python notebooks/execute.py

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(VENV)/.installed-dev
	@set -o pipefail; $(BIN)/python -m pytest -m slow -v 2>&1 | tee /dev/stderr | grep -E "PASSED|FAILED|ERROR|SKIPPED|passed|failed" > tests/slow_record.txt
	@date -u +"recorded %Y-%m-%d at commit $$(git rev-parse --short HEAD)" >> tests/slow_record.txt

# The oldest transformers that is promised to work, in an environment of its own.  Without constraints.txt, which asks for
# the newest one and for what goes with that (huggingface_hub, tokenizers): pip finds what the oldest one wants.
test-oldest:
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -c "import torch" 2>/dev/null || .venv-oldest/bin/pip install -q torch==2.13.0
	@.venv-oldest/bin/pip install -q -e . "transformers==5.17.0" pytest beartype hypothesis
	.venv-oldest/bin/python -m pytest tests/test_trainer.py tests/test_reference.py tests/test_stages.py tests/test_compute.py tests/test_head.py \
		tests/rlhf/test_ppo.py tests/rlhf/test_online.py tests/rlhf/test_reward_training.py tests/rlhf/test_rl_command.py

# ZeRO on CPUs; DeepSpeed builds nothing while it is installed.  Its own version is not in constraints.txt, all others are
test-deepspeed: $(VENV)/.installed-dev
	@DS_BUILD_OPS=0 $(PIP) -e ".[deepspeed]"
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_deepspeed.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# setup.cfg says what is checked where; seconds where little has changed, half a minute on two idle cores the first time
typecheck: $(VENV)/.installed-dev
	$(BIN)/mypy

# of uft and uft_kernels, processes that tests start included
coverage: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --cov --cov-report=term:skip-covered --cov-report=html:runs/coverage

# a wheel, built from the source distribution beside it
dist: $(VENV)/.installed-dev
	rm -rf build dist unified_finetuning.egg-info/SOURCES.txt
	$(BIN)/python -m build

# the wheel in an environment of its own, with the versions of constraints.txt, run from an empty folder
test-wheel: dist
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install -q -c constraints.txt torch==2.13.0
	.venv-wheel/bin/pip install -q -c constraints.txt dist/*.whl
	UFT_WHEEL_PYTHON=$(CURDIR)/.venv-wheel/bin/python $(BIN)/python -m pytest tests/packaging

# git then runs before every commit what `make lint` checks, and looks after notebooks and large files
hooks: $(VENV)/.installed-dev
	$(BIN)/pre-commit install

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# what can be made again; not runs/, where models of one's own are
clean:
	rm -rf site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage*

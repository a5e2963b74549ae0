# Everything runs in .venv, made on first use.  `make` alone lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-text test test-slow lint docs format eval clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP)  ## create .venv and install the project with its development tools

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed. Type: make install PYTHON=python3.11"; exit 2; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: install  ## data, cache, two trained models, samples, report: 5 minutes on 2 cores, offline
	@$(BIN)/python -m pipelines.demo

demo-text: install  ## the same with captions: a small text-to-image model, and prompts that it obeys
	@$(BIN)/python -m pipelines.demo_text

test: install  ## run the tests (fast set), two files at a time, each on a thread of its own
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: install  ## run the slow tests
	@$(BIN)/python -m pytest -m slow

lint: install  ## ruff, import-linter and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy

docs: install  ## the documentation as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: install  ## let ruff put the code in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

eval: install  ## judge the newest run (or RUN=runs/name) and write its report
	@$(BIN)/trainer eval $(RUN) $(ARGS)

clean:  ## remove the demo's runs and caches and the tools' leftovers; data, caches and runs of yours stay
	rm -rf runs/demo caches/demo runs/demo-text caches/demo-text build dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis *.egg-info
	find featcache trainer pipelines tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

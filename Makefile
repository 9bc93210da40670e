# Two commands: `make repro` runs the pipeline on the built-in corpus, `make test` runs the tests.
# Both make .venv first and install the pinned dependencies into it.
SHELL := /bin/bash
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1

# Two processes run the test files, in the order that tests/conftest.py sets.
DEFAULT_TESTS := pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
RUN_MODULE := python -m

# The folder of DVC's pickles: its default is one that every user of the machine may write to. .dvc/config cannot name
# one for all users, because DVC does not expand `~` and takes a relative path from the working directory.
SITE_CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/attention-pipeline/dvc

.PHONY: help repro test test-all mutate bench lint ui clean site-cache

help:
	@echo "make repro     run the pipeline: download, validate, tokenize, train, evaluate, sweep, report"
	@echo "make test      run the default tests: 5 minutes"
	@echo "make test-all  run all tests except those for GPUs, and measure the coverage of the default tests"
	@echo "make mutate    break 30 lines of code, one at a time, and check that a test fails: 20 minutes"
	@echo "make bench     compare speed with other toolkits (python -m tools.benchmarks --help)"
	@echo "make lint      ruff and mypy"
	@echo "make ui        open the MLflow UI on http://127.0.0.1:5000"
	@echo "make clean     delete what runs have written (except DVC's cache), and .venv"

repro: .venv/installed site-cache
	@python -m pipeline.check
	dvc repro
	@echo
	@echo "Scores:        dvc metrics show          (all: reports/evaluation.json)"
	@echo "Translations:  reports/translations.tsv"
	@echo "Table 3:       reports/table3.html, .md, .csv, .png"
	@echo "Curves:        dvc plots show"
	@echo "Model:         models/final"
	@echo "MLflow:        make ui, then open http://127.0.0.1:5000, or a view of it:"
	@python -m pipeline.views
	@echo "(The commands are in .venv/bin: source .venv/bin/activate)"

site-cache:
	@mkdir -p "$(SITE_CACHE)" && chmod 700 "$(SITE_CACHE)" || \
		{ echo "Set XDG_CACHE_HOME to a folder that you may write to."; exit 1; }
	@dvc config --quiet --local core.site_cache_dir "$(SITE_CACHE)"

test: .venv/installed-dev
	$(RUN_MODULE) $(DEFAULT_TESTS)

test-all: .venv/installed-dev
	coverage erase
	$(MAKE) test RUN_MODULE="coverage run -m"
	coverage combine --quiet
	coverage report
	python -m pytest -m "slow or host"

mutate: .venv/installed-dev
	python -m tools.mutate

bench: .venv/installed-dev
	python -m tools.benchmarks

lint: .venv/installed-dev
	ruff check .
	ruff format --check .
	mypy

ui: .venv/installed
	@MLFLOW_TRACKING_URI= python -m pipeline.views
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1 --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

clean:
	rm -rf .venv build *.egg-info checkpoints mlartifacts mlflow.db* data/downloads data/raw data/clean data/tokenizer data/encoded data/sweep models/final models/ctranslate2* .benchmarks .coverage*

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $$($(PYTHON) --version) found. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing the pinned dependencies into .venv: a few minutes, once."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --progress-bar off --constraint constraints.txt torch==2.13.0
	.venv/bin/python -m pip install --progress-bar off --constraint constraints.txt --editable .
	@$(MAKE) --no-print-directory site-cache
	@touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/python -m pip install --progress-bar off --constraint constraints.txt --editable '.[dev]'
	@touch $@

# `make` prints this list. Everything happens in .venv, made on first use and kept.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install run test lint types format bench sanitize neon docs site clean

help: ## print the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

install: $(INSTALLED) ## create .venv with pinned versions and build the C++ library
	@$(BIN)/batchnorm --version

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "batchnorm needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# Anew only when what it depends on has changed. The second step builds the extension against the torch of the first.
$(INSTALLED): requirements/dev.txt requirements/docs.txt requirements/peers.txt pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements/dev.txt -r requirements/docs.txt
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps -r requirements/peers.txt
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

run: $(INSTALLED) ## run the study on embedded data and write its report
	@$(BIN)/batchnorm study

test: $(INSTALLED) ## run the tests, in parallel
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(INSTALLED) ## ruff: lint and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED) ## mypy, strict
	$(BIN)/mypy

format: $(INSTALLED) ## ruff: format and mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.peers ## time the layers and estimators beside their peers (half an hour and 20 GB of disk; leave the machine alone)
	$(BIN)/python -m benchmarks

$(VENV)/.peers: requirements/bench.txt $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements/bench.txt
	@touch $@

sanitize: ## run the kernels under the address, undefined-behaviour and thread sanitizers
	csrc/tests/run.sh

neon: ## run the kernels for 64-bit Arm, in an emulator (skipped where there is no cross-compiler)
	csrc/tests/run.sh neon

docs: $(INSTALLED) ## regenerate what the pages show: the tutorial's outputs and figures, the README's picture; then the site
	$(BIN)/python docs/_site/executed.py
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python docs/picture.py
	$(MAKE) site

site: $(INSTALLED) ## build the documentation into build/site, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo build/site/index.html

clean: ## remove .venv, builds and runs
	rm -rf $(VENV) build runs src/batchnorm/_C*.so src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

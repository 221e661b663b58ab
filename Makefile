# Every verb works in a fresh clone: what it needs is installed into .venv first, once.
# Settings: PYTHON=/path/to/python (3.11 or later), PYTEST="arguments of pytest", DEMO="arguments of cpimerge demo",
# FUZZ="arguments of python -m fuzz", TORTURE="arguments of torture/torture.py",
# SEESAW="arguments of python -m seesaw".

.DEFAULT_GOAL := help
.SUFFIXES:

VENV := .venv
BIN := $(VENV)/bin
PYTEST := -n 2
DEMO :=
TORTURE :=
FUZZ := --seconds 20
SEESAW :=
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: help setup test lint bench seesaw fuzz torture demo clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/stamp-test ## install everything into .venv: cpimerge, its test suite and the linters

test: $(VENV)/stamp-test ## run the tests
	@$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/stamp-test ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/stamp-test ## measure speed and memory, beside mergekit
	@$(BIN)/python benchmarks/bench.py

seesaw: $(VENV)/stamp-seesaw ## train and merge real models in every way that is compared, and rewrite the tables in docs: hours
	@$(BIN)/python -m seesaw $(SEESAW)

fuzz: $(VENV)/stamp-fuzz ## look for inputs that break a parser: FUZZ="--seconds 20" for each of them
	@$(BIN)/python -m fuzz $(FUZZ)

torture: $(VENV)/stamp-run ## kill real runs everywhere, let their disk fail or lose power, and compare what is left
	@$(BIN)/python torture/torture.py $(TORTURE)

demo: $(VENV)/stamp-run ## train small models, fuse them, print the scores (installs only what cpimerge needs)
	@$(BIN)/cpimerge demo $(DEMO)

clean: ## remove .venv and the caches
	rm -rf $(VENV) build dist .fuzz .hypothesis .mypy_cache .pytest_cache .ruff_cache

# A stamp is written last, so a set-up that was cut off is done again; it is renewed when what it installs changes.
$(VENV)/stamp-run: $(VENV)/stamp-python pyproject.toml constraints.txt
	@echo "Installing cpimerge into $(VENV); PyTorch is large, so this can take some minutes."
	@$(INSTALL) '.[demo]'
	@touch $@

$(VENV)/stamp-test: $(VENV)/stamp-run
	@echo "Installing the packages of the test suite into $(VENV)."
	@$(INSTALL) '.[test]'
	@touch $@

$(VENV)/stamp-seesaw: $(VENV)/stamp-test
	@echo "Installing what the seesaw benchmark reads and trains into $(VENV)."
	@$(INSTALL) '.[seesaw]'
	@touch $@

$(VENV)/stamp-fuzz: $(VENV)/stamp-test
	@echo "Installing the fuzzer into $(VENV)."
	@$(INSTALL) '.[fuzz]'
	@touch $@

# The first candidate that runs and is new enough. PYTHON, where it is given, is the only one.
CANDIDATES := $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14 python)

$(VENV)/stamp-python:
	@for candidate in $(CANDIDATES); do \
		"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
		candidate=; \
	done; \
	if [ -z "$$candidate" ]; then \
		echo "cpimerge needs Python 3.11 or later. Tried, and none is: $(CANDIDATES)." >&2; \
		echo "Install one, or say where it is: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi; \
	if ! "$$candidate" -m venv --clear $(VENV); then \
		rm -rf $(VENV); \
		echo "$$candidate cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)." >&2; \
		exit 1; \
	fi
	@touch $@

# `make help` lists what there is. The first call of any target sets .venv up; later ones cost seconds.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade \
	--generate-hashes --no-emit-index-url --no-emit-find-links --no-header
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: help install demo test test-slow lint ui lock
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## set .venv up, exactly as requirements.lock says

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
		"Python %d.%d will not do: name one of 3.11 to 3.13, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)" % v)'
	$(PYTHON) -m venv --clear .venv  # packages that the lock no longer names go
	@awk '/^[^ ]/ { wanted = /^uv==/ } wanted' requirements.lock > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement .venv/uv.txt
	@# Where Python keeps no bytecode, as in many containers, each process would compile it all anew.
	$(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode --require-hashes --requirements requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	@touch $(INSTALLED)

demo: $(INSTALLED)  ## run the whole pipeline on its embedded sample: no network, no GPU
	$(BIN)/diffusemix run --preset demo

test: $(INSTALLED)  ## run the tests that take less than 15 minutes together
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow"

test-slow: $(INSTALLED)  ## run the rest of the tests
	$(BIN)/python -m pytest $(IN_PARALLEL) -m slow

lint: $(INSTALLED)  ## check style, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

ui: $(INSTALLED)  ## open Dagster on 127.0.0.1:3000
	$(BIN)/diffusemix ui

lock: $(INSTALLED)  ## compile requirements.lock from pyproject.toml anew, and what audits it
	$(COMPILE) --extra dev pyproject.toml --output-file requirements.lock
	echo pip-audit | $(COMPILE) - --output-file .github/audit.lock

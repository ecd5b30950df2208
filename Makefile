.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install run stop test test-fast test-real lint bench

help: ## Show what there is to make.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## Install everything into .venv.

# Bytecode is compiled once here: compiling torch and vllm anew at every start costs half a minute.
$(INSTALLED): pyproject.toml $(wildcard protos/tworoads/v1/*.proto)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --compile-bytecode -e '.[cpu,evaluation,dev]'
	@touch $@

run: $(INSTALLED) ## Start the stack, ingest the sample handbook, ask a question by two roads.
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/first-steps.sh

stop: $(INSTALLED) ## Stop the stack.
	@$(BIN)/tworoads down

test: test-fast test-real ## Run all tests, the real parts included.

test-fast: $(INSTALLED) ## Run the tests that need no model and no server.
	$(BIN)/python -m pytest -n auto tests --ignore tests/real

test-real: $(INSTALLED) ## Run the tests on the real models and servers.
	$(BIN)/python -m pytest tests/real

lint: $(INSTALLED) ## Check style, types and protos.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint

bench: $(INSTALLED) ## Measure; TWOROADS_DATA names a folder with a question set.
	@$(BIN)/python -m benchmarks

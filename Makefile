.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UV := 0.13.9
SERVICES := gateway retrieval embedding generation tuning evaluation traces
EXTRAS := $(SERVICES) clients model cpu dev
IMAGES := --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header

.PHONY: help install run stop test test-fast test-real test-k8s lint constraints bench

help: ## Show what there is to make.
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## Install everything into .venv.

# Bytecode is compiled once here: compiling torch and vllm anew at every start costs half a minute.
$(INSTALLED): pyproject.toml constraints/cpu.txt $(wildcard protos/tworoads/v1/*.proto)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv==$(UV)
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --compile-bytecode \
		-c constraints/cpu.txt -e . -r pyproject.toml $(EXTRAS:%=--extra %)
	@touch $@

run: $(INSTALLED) ## Start the stack, ingest the sample handbook, ask with and without it.
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/first-steps.sh

stop: $(INSTALLED) ## Stop the stack.
	@$(BIN)/tworoads down

test: test-fast test-real ## Run all tests, the real parts included.

test-fast: $(INSTALLED) ## Run the tests that need no model and no server.
	$(BIN)/python -m pytest -n auto tests --ignore tests/real --ignore tests/k8s

test-real: $(INSTALLED) ## Run the tests on the real models and servers.
	$(BIN)/python -m pytest tests/real

# The first time builds Kubernetes from its Go modules into the cache of the user: ten minutes.
test-k8s: $(INSTALLED) ## Apply the manifests to a real API server with simulated nodes; needs Go.
	$(BIN)/python -m tests.k8s.programs
	$(BIN)/python -m pytest tests/k8s

# protos/baseline.binpb is the API that the last release had. At a release it is made anew:
# buf build --exclude-source-info -o protos/baseline.binpb
lint: $(INSTALLED) ## Check style, types, protos and manifests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/baseline.binpb
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m tests.manifests

constraints: $(INSTALLED) ## Renew the versions that images and .venv are built of.
	$(BIN)/uv pip compile --upgrade --quiet pyproject.toml $(EXTRAS:%=--extra %) \
		$(IMAGES) -o constraints/cpu.txt
	$(BIN)/uv pip compile --upgrade --quiet pyproject.toml $(SERVICES:%=--extra %) \
		--extra gpu --extra qlora --no-config $(IMAGES) -o constraints/gpu.txt

bench: $(INSTALLED) ## Measure; TWOROADS_DATA names a folder with a question set.
	@$(BIN)/python -m benchmarks

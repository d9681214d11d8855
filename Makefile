PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
BENCHES = $(patsubst tests/bench/%.py,%,$(filter-out tests/bench/_%.py,$(wildcard tests/bench/*.py)))
# No look-up of newer versions: pyright and its node come with the locked wheels.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint check bench chaos lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Install the locked packages and the project into .venv; nothing to do when they have not changed

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Tessera needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1): use make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^uv==' requirements.lock)"
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## Local stack, shards, a submitted job and its result table, in minutes
	$(BIN)/python -m jobs.demo

test: setup  ## Every test but those that need a GPU or long minutes
	$(BIN)/python -m pytest -n 2 --durations=5
	$(BIN)/python -m pytest -o addopts= -q --strict-markers -m "(distributed or smoke) and not gpu and not slow" --durations=20

lint: setup  ## Format, lint, types, imports, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell

check: lint  ## What CI runs: lint, then test
	@$(MAKE) --no-print-directory test

bench: setup  ## Run one benchmark: make bench NAME=…
	@$(if $(filter $(NAME),$(BENCHES)),$(BIN)/python -m tests.bench.$(NAME),\
		echo "no benchmark NAME=$(NAME): choose one of $(BENCHES)" >&2; exit 2)

chaos: setup  ## Every fault at several seeds on two hosts: make chaos [FAULT="worker killed"] [SEEDS=5]
	$(BIN)/python -m tests.distributed.chaos $(if $(FAULT),--fault "$(FAULT)") $(if $(SEEDS),--seeds $(SEEDS))

lock: setup  ## Compile requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra local --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links pyproject.toml -o requirements.lock

clean:  ## Remove caches and build products; keeps .venv, data and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

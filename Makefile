# The commands of this house. Each makes .venv when it is missing or out of date; none needs an environment variable.

# The first of these that is Python 3.11 to 3.13. Another one: make demo PYTHON=/path/to/python3.12
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && echo $$p && break; done)

BIN := .venv/bin
PINNED := pyproject.toml constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test lint format types docs docs-table docs-check bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/set-up-demo ## adapt the bundled base to real data and prove the result, on a CPU, offline
	$(BIN)/weft tune examples/docstrings.yaml

# One thread a worker: two workers that each start a thread per core fight over the cores.
test: .venv/set-up-test ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: .venv/set-up-test ## ruff: rules and layout
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: .venv/set-up-test ## ruff: mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: .venv/set-up-test ## mypy over src/weft
	$(BIN)/mypy

docs-table: .venv/set-up-test ## write the tables in docs/ and the README that come from the code
	$(BIN)/python -m scripts.docs_tables

docs-check: .venv/set-up-test ## are those tables current?
	$(BIN)/python -m scripts.docs_tables --check

docs: .venv/set-up-docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/set-up-test ## measure every claim beside its peer
	$(BIN)/python -m benchmarks.run

clean: ## remove .venv, caches and what was built (runs and adapters stay)
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp for each set of dependencies: installed again only when the pins change.
.venv/made:
	@test -n "$(PYTHON)" || { echo "Weft needs Python 3.11, 3.12 or 3.13, and none is on the PATH (python3 is \
	$$(python3 --version 2>&1 || echo missing)). Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	"Weft needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d. Name another: make PYTHON=/path/to/python3.12" % v)'
	@echo "making .venv with $(PYTHON) ($$($(PYTHON) --version 2>&1))"
	@$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/set-up-demo: .venv/made $(PINNED)
	@echo "installing Weft and its pinned dependencies (a few minutes the first time)"
	@$(INSTALL) --editable ".[quant]"
	@touch $@

.venv/set-up-test: .venv/made $(PINNED)
	@echo "installing Weft, its pinned dependencies and the tools of its tests (a few minutes the first time)"
	@$(INSTALL) --editable ".[quant,minilm,tensorboard,compare,transport,test,dev]"
	@touch $@ .venv/set-up-demo

.venv/set-up-docs: .venv/made $(PINNED)
	@echo "installing the documentation's tools"
	@$(INSTALL) --editable ".[docs]"
	@touch $@

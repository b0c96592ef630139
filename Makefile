# nmoe: `make` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help quickstart test check goldens learning learning-goldens torture clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "nmoe needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Say which: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The two stamps: what a run needs, and what the tests and checks need beside it.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $@

quickstart: $(VENV)/.installed  ## install, then train a small MoE on Shakespeare (1 to 4 minutes on 2 cores)
	$(BIN)/nmoe train configs/quickstart.toml

test: check  ## check, then run the whole test suite
	$(BIN)/pytest -n $(JOBS)

check: $(VENV)/.installed-dev  ## lint and type-check all three source folders
	$(BIN)/ruff check .
	$(BIN)/mypy

goldens: $(VENV)/.installed-dev  ## rewrite the golden files; a change needs a line in CHANGELOG.md
	$(BIN)/python -m tests.golden.refresh

learning: $(VENV)/.installed-dev  ## train every kind of router, attention and optimizer; print their losses
	$(BIN)/python -m tests.learning.kinds

learning-goldens: $(VENV)/.installed-dev  ## rewrite the golden curve and the figures of experts against dense layers
	$(BIN)/python -m tests.learning.curve
	$(BIN)/python -m tests.learning.against_dense

torture: $(VENV)/.installed-dev  ## kills, power cuts, faults, corruptions, foreign files: all of it (hours; may be stopped)
	$(BIN)/python -m tests.torture --jobs $(JOBS)

clean:  ## remove the environment and caches; runs and data stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

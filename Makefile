# Two commands do everything on a fresh machine with Python 3.10 or newer and make:
#
#     make demo     trains the embedded model on five photos of one dog and draws that dog elsewhere
#     make test     runs every test
#
# Both make .venv with the versions of constraints.txt first; the second time that is skipped.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
BIN := $(VENV)/bin

# The stamp's name holds a checksum of what was asked for, so that a changed requirement installs again
# and an interrupted installation, which leaves no stamp, is taken up again.
RUN_STAMP := $(VENV)/.ready-$(shell cat requirements.txt constraints.txt | cksum | cut -d' ' -f1)
DEV_STAMP := $(VENV)/.ready-dev-$(shell cat requirements.txt requirements_dev.txt constraints.txt | cksum | cut -d' ' -f1)

# These models are so small that a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-fast lint format bench install install-dev clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):[^#]*## /make \1|/' \
		| while IFS='|' read -r name what; do printf '  %-16s %s\n' "$$name" "$$what"; done

demo: $(RUN_STAMP) ## train a LoRA of the embedded subject, draw it on new scenes, name the report (runs/demo)
	@$(BIN)/python -m toybox.demo $(ARGS)

test: $(DEV_STAMP) ## every test; ARGS="-k lora" for some, WORKERS=0 for one process
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-fast: $(DEV_STAMP) ## rooms and golden losses: no whole scripts, no real processes, no real learning
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

lint: $(DEV_STAMP) ## ruff check, ruff format --check, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(DEV_STAMP) ## let ruff repair and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV_STAMP) ## speed and memory, to benchmarks/results; ARGS="--method lora --other SCRIPT" to compare
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/compare.py $(or $(ARGS),--method lora full)

install: $(RUN_STAMP) ## only .venv and what the scripts need
install-dev: $(DEV_STAMP) ## .venv and what the tests need as well

$(RUN_STAMP): | $(BIN)/python
	@echo "Installing into $(VENV): a minute where the packages are near, longer over a slow line"
	@$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	@rm -f $(VENV)/.ready-* && touch $@

$(DEV_STAMP): | $(RUN_STAMP)
	@$(BIN)/python -m pip install --quiet -r requirements_dev.txt -c constraints.txt
	@rm -f $(VENV)/.ready-dev-* && touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than 3.10; name a newer one: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) -m venv failed; Debian and Ubuntu keep it in the package python3-venv" >&2; exit 2; }

clean: ## remove what the demo and the tools made; .venv stays
	rm -rf runs/demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

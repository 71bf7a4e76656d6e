# Every target sets up what it needs in .venv and is quick the second time.
#
#   make run                      first question to the model on board, then a chat
#   make test ARGS="-k scheduler" pass arguments on
#
# Variables: PYTHON (3.11 or later), VENV (folder), ARGS (passed on), HADAL_TORCH_INDEX (another index to look for
# torch in; https://download.pytorch.org/whl/cpu gives the small CPU build on Linux), NO_VENV=1 (use PYTHON as it is
# and install nothing: for machines that come with torch).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

FIND_PYTHON := for p in python3 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done; true
PYTHON ?= $(shell $(FIND_PYTHON))
VENV ?= .venv
ARGS ?=

ifdef NO_VENV
PY := $(PYTHON)
RUN_READY :=
SERVE_READY :=
TEST_READY :=
else
PY := $(VENV)/bin/python
RUN_READY := $(VENV)/.ready-run
SERVE_READY := $(VENV)/.ready-serve
TEST_READY := $(VENV)/.ready-test
endif

# Python compiles a library at its first import; pip would compile all that is there, which takes longer than to
# install it.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(PY) -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt \
  $(if $(HADAL_TORCH_INDEX),--extra-index-url $(HADAL_TORCH_INDEX))

.PHONY: help run chat serve r1-zero test lint bench test-gpu lock clean

help: ## this list
	@echo "Hadal: the DeepSeek-V3/R1 system in one readable Python package."
	@echo
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r a b; do printf '%-18s %s\n' "$$a" "$$b"; done
	@echo
	@echo "  Then: .venv/bin/hadal --help"

run: $(RUN_READY) ## ask the model on board a first question, then chat with it
	@$(PY) -m hadal run hadal-mini "What is 12 + 35?" --then-chat $(ARGS)

chat: $(RUN_READY) ## chat with the model on board in the terminal
	@$(PY) -m hadal run hadal-mini $(ARGS)

serve: $(SERVE_READY) ## OpenAI, DeepSeek and Ollama API with the chat page; prints its address
	@$(PY) -m hadal serve hadal-mini $(ARGS)

r1-zero: $(TEST_READY) ## R1-Zero in minutes: a tiny base from nothing, reinforcement learning, plots
	@$(PY) benchmarks/r1_zero.py $(ARGS)

test: $(TEST_READY) ## all tests (no accelerator and no network needed)
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(TEST_READY) ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m mypy

bench: $(RUN_READY) ## latency and throughput of the model on board, beside this machine's ceiling
	@$(PY) -m hadal bench hadal-mini $(ARGS)

test-gpu: $(TEST_READY) ## the tests that need a CUDA device
	@$(PY) -m pytest -m gpu tests $(ARGS)

lock: $(TEST_READY) ## write constraints.txt again from what is installed in .venv
	@{ sed -n '/^#/p' constraints.txt; $(PY) -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' | sort -f; } > constraints.txt.tmp
	@mv constraints.txt.tmp constraints.txt

clean: ## remove .venv and the caches of the tools
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "Hadal needs Python 3.11 or later, and none was found: install one, or name it: make run PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu, 'apt install python3-venv' gives it" >&2; exit 1; }
	@$(PY) -m pip install --disable-pip-version-check --quiet 'pip>=25.1' || echo "Older versions of pip take minutes more" >&2

$(VENV)/.ready-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Hadal into $(VENV) (once; a minute or two, most of it torch) ..."
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.ready-serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Hadal with its chat page into $(VENV) (once) ..."
	@$(INSTALL) -e '.[ui]'
	@touch $(VENV)/.ready-run $@

$(VENV)/.ready-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Hadal with all that its tests need into $(VENV) (once) ..."
	@$(INSTALL) -e '.[ui,train,data,test]'
	@touch $(VENV)/.ready-run $(VENV)/.ready-serve $@

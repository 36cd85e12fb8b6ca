# `make` alone shows what there is.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
IS_3_11 := import sys; sys.exit(sys.version_info[:2] != (3, 11))

# TFX 1.21's wheels need glibc 2.38; on older systems 1.16 is the newest that installs.
GLIBC := $(shell getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)
NEWEST := $(shell printf '2.38\n$(or $(GLIBC),0)\n' | sort -V | head -n1 | grep -qx 2.38 && echo 1.21 || echo 1.16)
TFX ?= $(NEWEST)
ifeq ($(filter $(TFX),1.16 1.21),)
$(error Expected TFX to be 1.16 or 1.21. Received: TFX=$(TFX))
endif
LOCK := requirements-tfx$(TFX).lock
STAMP := $(VENV)/.installed-$(TFX)

# Tests wait for processes of their own, so one worker more than there are processors; each takes up to 4 GB.
WORKERS ?= $(shell echo $$(( $$(nproc) < 5 ? $$(nproc) + 1 : 6 )))

.PHONY: help setup run test test-long test-newest newest lint format bench docs pictures lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo "Options: PYTHON=python3.11, TFX=1.16 or 1.21 (here: $(TFX)), ARGS=\"--data photos/\" for run, ARGS=\"-k NAME\" for test"

setup: $(STAMP) ## make the environment in .venv from the lock (one to two minutes)

run: setup ## take the default data set, or ARGS="--data PATH", from images to a pushed model
	@$(BIN)/python local_runner.py $(ARGS)

test: setup ## run the tests; ARGS="-k NAME" for some of them
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-long: setup ## run what takes minutes each and `make test` leaves out
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m long $(ARGS)

# OTHER_STACK is the interpreter that tests/test_stacks.py exchanges models with.
test-newest: setup ## run the tests on TFX 1.21; in a Debian 13 root where this machine's C library is too old for it
ifeq ($(NEWEST),1.21)
	@$(MAKE) --no-print-directory test TFX=1.21 ARGS="$(ARGS)"
else
	@PYTHON=$(PYTHON) OTHER_STACK=$(CURDIR)/$(BIN)/python bash .ci/newest make test TFX=1.21 VENV=.cache/tfx-1.21 ARGS="$(ARGS)"
endif

newest: # the newest TFX that this machine's C library can load
	@echo $(NEWEST)

lint: setup ## check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup ## mend style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup ## measure the whole run against a tutorial-style TFX pipeline (about half an hour)
	@$(BIN)/python tests/benchmarks/whole_run.py $(ARGS)

docs: setup ## write docs/configuration.md anew from the code
	@page="$$(TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python -W ignore -m pipeline.config_reference)" && printf '%s\n' "$$page" > docs/configuration.md

pictures: setup ## make the documents' screenshots anew from runs/elpv; needs Chromium
	@PYTHONPATH=. $(BIN)/python -W ignore tests/pictures.py $(ARGS)

lock: ## resolve pyproject.toml anew into the locks
	@test -x $(BIN)/uv || $(MAKE) setup
	@for lock in tfx1.16 tfx1.21 tfx1.21-cuda; do \
	  platform=x86_64-manylinux_2_39 extras="--extra tfx-1-21"; \
	  case $$lock in tfx1.16) platform=x86_64-manylinux_2_28 extras="--extra tfx-1-16";; *-cuda) extras="$$extras --extra cuda";; esac; \
	  $(BIN)/uv pip compile --quiet pyproject.toml $$extras --group dev --python-version 3.11 \
	    --python-platform $$platform --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate \
	    --custom-compile-command "make lock" --output-file requirements-$$lock.lock || exit 1; \
	done

clean: ## remove the environment and the caches, but no run
	@rm -rf $(VENV) .cache .pytest_cache .ruff_cache

$(STAMP): $(LOCK)
	@test "$(TFX)" = 1.16 -o "$(NEWEST)" = 1.21 || { \
	  echo "error: Expected glibc 2.38 or newer for TFX 1.21. Received: glibc $(GLIBC). Take TFX=1.16; \`make test-newest\` tests 1.21 here." >&2; exit 2; }
	@$(PYTHON) -c '$(IS_3_11)' 2>/dev/null || { \
	  echo "error: Expected Python 3.11. Received: $$($(PYTHON) --version 2>&1). Install it (uv python install 3.11), and set PYTHON=/path/to/python3.11." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: Expected Python 3.11 with venv. Received: $(PYTHON) without. Install it (Debian 12: apt-get install python3.11-venv)." >&2; exit 2; }
	@command -v g++ >/dev/null || { \
	  echo "error: Expected g++, to build one package. Received: none. Install it (Debian: apt-get install g++)." >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo "error: Expected Python 3.11 with its headers, to build one package. Received: $(PYTHON) without. Install them (Debian 12: apt-get install python3.11-dev)." >&2; exit 2; }
	@echo "Setting up TFX $(TFX) in $(VENV) with $$($(PYTHON) --version) (glibc $(GLIBC); 1.21 needs 2.38)"
	@$(BIN)/python -c 'import pip; $(IS_3_11)' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 2; }
	@echo "Installing uv"
	@awk '/^[a-z]/ {is_uv = /^uv==/} is_uv' $(LOCK) > $(VENV)/uv.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(VENV)/uv.lock
	@echo "Installing and compiling $$(grep -c '^[a-z].*==' $(LOCK)) packages from $(LOCK)"
	@rm -f $(VENV)/.installed-*
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --compile-bytecode --require-hashes $(LOCK)
	@touch $@
	@echo "Ready"

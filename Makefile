# Widthwise: make demo | serve | test | check | fuzz | chaos | bench-NAME | docs | secrets | lock | clean
#
# All that is assumed on a new machine is make and Python 3.11 or 3.12 (with venv and pip).
# Two environments, because paddlenlp pins packages that the API should not be held to, and
# because the API must run where paddle is absent:
#   .venv/api     the API's packages          .venv/worker   paddle and everything else
# Each is built from its lock (requirements/*.txt, exact versions with hashes) and built again
# only when that lock's content changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory --silent
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The recipes that build an environment must not run at the same time as each other's pip.
.NOTPARALLEL:

API := .venv/api/bin/python
WORKER := .venv/worker/bin/python
PYTEST_ARGS ?=
IN_TWO := --numprocesses 2 --dist loadfile

# The Python that builds the environments: `make PYTHON=/path/to/python3.12 ...` names another.
# A shim that finds no interpreter behind it does not answer, so each is tried.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
	then echo $$p; break; fi; done)

.PHONY: help
help:
	echo "make demo         compress MiniLM-L6 on real reviews, from upload to download (10 to 12 minutes)"
	echo "make serve        start the API and a worker here; Ctrl-C stops both"
	echo "make test         every check and every test, from a new machine"
	echo "make check        formatting, lint, types, import contracts"
	echo "make fuzz         a long walk over the OpenAPI document (ARGS='--examples 500 --seed 7')"
	echo "make chaos        100 jobs under 1,000 faults, 75 minutes at most (ARGS='--seed 7 --minutes 20')"
	echo "make bench-NAME   run benchmarks/NAME.py; the last line is JSON (ARGS='...' passes arguments)"
	echo "make docs         write docs/settings.md again from jobs/settings.py"
	echo "make secrets      make the passwords and keys that docker-compose.yml needs"
	echo "make lock         resolve requirements/*.in into the locks again"
	echo "make clean        remove the environments, caches and build results (never data/)"

.PHONY: python
python:
	[ -n "$(PYTHON)" ] || { echo "Widthwise needs Python 3.11 or 3.12 and found neither (python3 is: $$(python3 --version 2>&1 | tail -n 1)). Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { echo "Widthwise needs Python 3.11 or 3.12; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; exit 1; }
	"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks venv or ensurepip. On Debian: apt-get install python3-venv" >&2; exit 1; }

# $(call install,ENVIRONMENT,LOCK,STAMP,FRESH): the stamp holds the hash of the lock that was
# installed, so a newer file time alone (a checkout, a copy) builds nothing again.
define install
	want=$$(sha256sum < requirements/$(2).txt); \
	if [ "$$(cat $(3) 2>/dev/null)" = "$$want" ] && [ -x .venv/$(1)/bin/python ]; then touch $(3); exit 0; fi; \
	echo "installing requirements/$(2).txt into .venv/$(1)" >&2; \
	$(if $(4),rm -rf .venv/$(1); mkdir -p .venv; "$(PYTHON)" -m venv .venv/$(1);) \
	.venv/$(1)/bin/python -m pip install -qq --disable-pip-version-check --no-input \
		--require-hashes --no-deps -r requirements/$(2).txt; \
	echo "$$want" > $(3)
endef

.venv/api/.runtime: requirements/api.txt | python
	$(call install,api,api,$@,fresh)
.venv/worker/.runtime: requirements/worker.txt | python
	$(call install,worker,worker,$@,fresh)
.venv/api/.dev: requirements/dev.txt .venv/api/.runtime | python
	$(call install,api,dev,$@,)
.venv/worker/.dev: requirements/dev.txt .venv/worker/.runtime | python
	$(call install,worker,dev,$@,)

.PHONY: runtime development
runtime: .venv/api/.runtime .venv/worker/.runtime
development: .venv/api/.dev .venv/worker/.dev

.PHONY: demo
demo: runtime
	exec $(API) -m tools.demo $(ARGS)

.PHONY: serve
serve: runtime
	exec $(API) -m tools.serve $(ARGS)

.PHONY: check
check: development
	echo "== ruff"
	.venv/worker/bin/ruff check --quiet .
	.venv/worker/bin/ruff format --check --quiet . || { echo "formatting differs: run .venv/worker/bin/ruff format ." >&2; exit 1; }
	echo "== mypy"
	.venv/worker/bin/mypy --no-error-summary
	echo "== import contracts"
	.venv/worker/bin/lint-imports --no-logo || { echo "an import crosses a layer" >&2; exit 1; }

.PHONY: docs
docs: runtime
	$(API) -m tools.settings_page

.PHONY: secrets
secrets: python
	"$(PYTHON)" -m tools.compose_secrets

.PHONY: servers
servers:
	tools/servers.sh

.PHONY: test
test: check servers test-api test-worker

# The API's tests run where paddle is absent; all others in the worker's environment. Two processes
# share the tests, file by file (fixtures are a file's): most compute on one thread, or wait for the
# servers that they start, which each process has for itself.
.PHONY: test-api
test-api: development
	echo "== tests of the API, paddle absent"
	$(API) -m pytest tests/api $(IN_TWO) $(PYTEST_ARGS)
	echo "== hostile files"
	$(API) -m pytest tests/hostile --numprocesses 2 $(PYTEST_ARGS)

.PHONY: test-worker
test-worker: development
	echo "== tests of compression"
	$(WORKER) -m pytest tests/compression $(IN_TWO) $(PYTEST_ARGS)
	echo "== all other tests"
	$(WORKER) -m pytest tests --ignore=tests/api --ignore=tests/hostile --ignore=tests/compression $(IN_TWO) $(PYTEST_ARGS)

# A long walk over the OpenAPI document: ARGS="--examples 500 --seed 7". Its last line is JSON.
.PHONY: fuzz
fuzz: development
	exec $(API) -m tests.hostile.fuzzing $(ARGS)

# Real jobs under faults: ARGS="--seed 7 --jobs 100 --faults 1000 --minutes 75". Its last line is JSON.
.PHONY: chaos
chaos: development servers
	exec $(WORKER) -m tests.chaos $(ARGS)

# benchmarks/NAME.py runs in the worker's environment; a hyphen in NAME may stand for an underscore.
bench-%: benchmarks-exist-% runtime
	exec $(WORKER) -m benchmarks.$(subst -,_,$*) $(ARGS)
benchmarks-exist-%:
	[ -f benchmarks/$(subst -,_,$*).py ] && [ "$*" != inputs ] && [ "$*" != service-api ] || { echo "there is no benchmarks/$(subst -,_,$*).py; there are: $$(cd benchmarks && ls *.py 2>/dev/null | grep -vE '^(inputs|service_api)' | sed 's/\.py$$//' | tr '\n' ' ')" >&2; exit 1; }

# The locks are resolved in this order so that what the API and the worker share has one version.
.PHONY: lock
lock: python
	[ -x .venv/lock/bin/uv ] || { "$(PYTHON)" -m venv .venv/lock; .venv/lock/bin/python -m pip install -qq --disable-pip-version-check uv; }
	cd requirements; \
	compile() { ../.venv/lock/bin/uv pip compile --quiet --upgrade --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" "$$@" > /dev/null; }; \
	compile worker.in -o worker.txt; \
	compile api.in -c worker.txt -o api.txt; \
	compile dev.in -c worker.txt -c api.txt -o dev.txt

.PHONY: clean
clean:
	rm -rf .venv build .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

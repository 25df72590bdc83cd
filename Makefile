# `make demo` and `make test` do everything from nothing; a second call installs nothing. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
DEMO_ARGS ?=
REFEREE_ARGS ?=
PYTEST_ARGS ?=
# Tests run in a process for each core, up to four, with one thread each; PARALLEL= runs them in one process.
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile
FAULTS ?= full

BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
# In the environment, so that they hold for what builds the project too: old pips read the first for that, new ones the
# second.
LOCKED := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS)
PIP := $(LOCKED) $(BIN)/python -m pip -qq --disable-pip-version-check
# Without a terminal there is nobody to answer a question, and warnings about local package folders help nobody.
PIP_INSTALL := $(PIP) install --no-input --no-warn-script-location -c requirements/torch.txt

# Environments beside the usual one: with the newest of everything, and with the oldest that pyproject.toml allows.
LATEST        ?= .venv-latest
OLDEST        ?= .venv-oldest
# pyenv's python3.10 only runs where it is the chosen version, so the interpreter itself is looked for first.
OLDEST_PYTHON ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python3.10)),python3.10)
LOCK_PYTHONS  ?= python3.10 python3.11 python3.12 python3.13
# LATEST_TORCH=1 takes the newest PyTorch too, which on Linux is a CUDA build of several GB.
LATEST_TORCH  ?=
# Where test-latest and test-oldest look for tests, and what they run them with.
TESTS         ?= test/test_cpu
SOURCES := auto_round test tools examples $(wildcard bench)

.PHONY: help demo smoke test test-slow test-cuda test-latest test-oldest lock faults lint format bench referees wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       quantize a small real model to 4 bits, save it, open it in Transformers, show how good it is"
	@echo "make smoke      the quickest tests of every part, one whole run of each kind (60 s on two cores)"
	@echo "make test       all fast tests on the CPU             (PYTEST_ARGS='-k schemes' chooses some)"
	@echo "make test-slow  tests with real models and long runs"
	@echo "make test-cuda  tests that need a CUDA GPU"
	@echo "make test-latest  the fast tests with the newest libraries (LATEST_TORCH=1: the newest PyTorch too, several GB)"
	@echo "make test-oldest  the fast tests with the oldest versions that pyproject.toml allows, on Python 3.10 (several GB)"
	@echo "make lock       pin the newest versions in requirements/constraints.txt, which all other targets install"
	@echo "make faults     kill runs, damage files, and print what became of it (FAULTS=short: a few of each)"
	@echo "make lint       ruff, mypy and the language check;  make format rewrites what ruff can"
	@echo "make bench      how to measure against auto-round 0.16.1 (takes an hour: prints the commands)"
	@echo "make referees   let other programs open what we write (REFEREE_ARGS='--programs gptqmodel' chooses some)"
	@echo "make wheel      build the wheel into dist/"
	@echo "make clean      remove the environment, the demo's files and caches"

# Each stamp is newer than all that was installed for it.
$(VENV)/.torch: requirements/torch.txt $(CONSTRAINTS)
	@echo "making $(VENV) and installing PyTorch (once)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is %d.%d; set PYTHON=" % v[:2])'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-input -r requirements/torch.txt
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo "installing the project and what its tests need (once)"
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing the project and what the demo needs (once)"
	@$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test requirements/lint.txt
	@$(PIP_INSTALL) -r requirements/lint.txt
	@touch $@

.demo/smollm2/.done: $(VENV)/.demo tools/fetch_demo_model.py
	@$(BIN)/python tools/fetch_demo_model.py .demo/smollm2
	@touch $@

demo: .demo/smollm2/.done
	@$(BIN)/python examples/demo.py --model .demo/smollm2 --work .demo $(DEMO_ARGS)

smoke: $(VENV)/.test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) $(PYTEST_ARGS) $$(grep -v '^#' test/smoke.txt)

test: $(VENV)/.test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) $(PYTEST_ARGS) test/test_cpu

test-slow: $(VENV)/.test
	@$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS) test/test_cpu

test-cuda: $(VENV)/.test
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS) test/test_cuda

faults: $(VENV)/.test
	@AR_TEST_FAULTS=$(FAULTS) $(BIN)/python -m pytest -q -m faults $(PYTEST_ARGS) test/faults

$(LATEST)/.done: requirements/torch.txt pyproject.toml
	@echo "making $(LATEST) with the newest of everything"
	@$(PYTHON) -m venv --clear $(LATEST)
	@$(LATEST)/bin/python -m pip -qq install --no-input --upgrade $(if $(LATEST_TORCH),torch,-r requirements/torch.txt)
	@$(LATEST)/bin/python -m pip -qq install --no-input --upgrade --upgrade-strategy eager \
		$(if $(LATEST_TORCH),,-c requirements/torch.txt) -e '.[demo,test]' lm-eval
	@touch $@

# Made anew each time it is a day old, or it would not be the newest.
test-latest:
	@find $(LATEST)/.done -mtime +0 -delete 2>/dev/null || true
	@$(MAKE) --no-print-directory $(LATEST)/.done
	@OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest -q $(PARALLEL) $(PYTEST_ARGS) $(TESTS)
	@$(if $(PYTEST_ARGS)$(filter-out test/test_cpu,$(TESTS)),true,$(LATEST)/bin/python tools/note_versions.py newest)

$(OLDEST)/.done: tools/floors.py pyproject.toml
	@python=$(OLDEST_PYTHON); $$python -c '' 2>/dev/null || { python=$(PYTHON); \
		echo "$(OLDEST_PYTHON) does not run here, taking $(PYTHON) (OLDEST_PYTHON= names another)"; }; \
		echo "making $(OLDEST) with the oldest versions, for $$python"; $$python -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python tools/floors.py data gguf modelscope demo test > $(OLDEST)/floors.txt
	@$(OLDEST)/bin/python -m pip -qq --disable-pip-version-check install --no-input -r $(OLDEST)/floors.txt
	@$(OLDEST)/bin/python -m pip -qq --disable-pip-version-check install --no-input --no-deps -e .
	@touch $@

test-oldest: $(OLDEST)/.done
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q $(PARALLEL) $(PYTEST_ARGS) $(TESTS)
	@$(if $(PYTEST_ARGS)$(filter-out test/test_cpu,$(TESTS)),true,$(OLDEST)/bin/python tools/note_versions.py oldest)

lock:
	@$(PYTHON) tools/lock.py $(LOCK_PYTHONS)

lint: $(VENV)/.lint
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/python tools/language.py

format: $(VENV)/.lint
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

bench: .demo/smollm2/.done
	@echo "Against auto-round 0.16.1, which gets an environment of its own:"
	@echo "  $(PYTHON) -m venv .demo/peer && .demo/peer/bin/pip install -r requirements/torch.txt"
	@echo "  .demo/peer/bin/pip install -c requirements/torch.txt auto-round==0.16.1"
	@echo "  $(BIN)/python bench/vs_peer.py --help"
	@echo "Results that were measured are in bench/results/."

referees: $(VENV)/.test .demo/smollm2/.done
	@$(BIN)/python tools/referees.py $(REFEREE_ARGS)

wheel: $(VENV)/.torch
	@$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(LATEST) $(OLDEST) .demo .referees build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

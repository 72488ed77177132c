# Everything runs in one environment, .venv; its stamp files say what has been installed, so that a
# second run installs nothing. `make` alone lists the commands.

PYTHON ?= python3
# Where torch's CPU build is looked for if pip's own index has none; empty: nowhere.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
export TORCH_CPU_INDEX

VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt
CHECKED := kernels minigen tests tools weights

# With PYTHON=... on the command line, test-gpu runs that interpreter as it is.
ifeq ($(origin PYTHON),command line)
GPU_PY := $(PYTHON)
else
GPU_PY := $(PY)
GPU_NEEDS := $(VENV)/.test
endif

.PHONY: help chat check test test-deep test-gpu bench clean
.DELETE_ON_ERROR:

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

chat: $(VENV)/.minigen ## talk with the bundled model, or another: MODEL=directory-or-hub-name [ARGS=...]
	@$(PY) -m minigen chat $(if $(MODEL),--model "$(MODEL)") $(ARGS)

check: $(VENV)/.test $(VENV)/.check ## format, lint and types
	$(PY) -m ruff format --check $(CHECKED)
	$(PY) -m ruff check $(CHECKED)
	$(PY) -m pyright --pythonpath $(PY)

# A test's tensors are small: threads would wait for each other longer than they compute.
TEST_WORKERS ?= 2
# One compile thread: more are a process that imports torch again, beside each that compiles, and on
# a CPU have nothing to do. `worksteal` gives each worker whole files, whose fixtures it makes once.
TEST := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	$(PY) -m pytest -m "not gpu" -n $(TEST_WORKERS) --dist worksteal

test: $(VENV)/.test ## the tests that need no GPU [ARGS="-k word"] [TEST_WORKERS=2]
	HYPOTHESIS_PROFILE=ci $(TEST) $(ARGS)

test-deep: $(VENV)/.test ## the same with many more, and random, examples
	HYPOTHESIS_PROFILE=deep $(TEST) $(ARGS)

test-gpu: $(GPU_NEEDS) ## the tests on the GPU; with PYTHON=python3 by that Python, installing nothing
	@$(GPU_PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch " + torch.__version__ + " of " + sys.executable + " finds no CUDA GPU on this machine")'
	$(GPU_PY) -m pytest -m gpu -rs $(ARGS)

bench: $(VENV)/.test ## every benchmark in tools/, one after the other
	@set -e; for file in tools/bench*.py; do \
		test -e "$$file" || { echo "make bench: tools/ holds no bench*.py"; exit 1; }; \
		name=$${file#tools/}; echo "$(PY) -m tools.$${name%.py}"; $(PY) -m "tools.$${name%.py}"; \
	done

clean: ## remove .venv and everything else that was made here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.base: constraints.txt tools/make_venv.py
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "minigen needs Python 3.11 or newer, and there is no $(PYTHON): name one with PYTHON=..."; \
		exit 1; }
	$(PYTHON) tools/make_venv.py $(VENV)
	@touch $@

$(VENV)/.minigen: $(VENV)/.base pyproject.toml
	$(INSTALL) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.minigen
	$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.check: $(VENV)/.minigen
	$(INSTALL) -e '.[check]'
	@touch $@

# Every target does its own set-up: Python >= 3.11 with its venv module, make and a package index suffice.
# PYTHON chooses the interpreter; ARGS is handed on: make train ARGS="model=tiny steps=50"; SECONDS is for
# make soak; PROCESSES=2 starts make train under torchrun; WORKERS is how many tests run side by side:
# make test WORKERS=0 ARGS="-x --pdb tests/unit".

PYTHON ?= python3
ARGS ?=
PROCESSES ?=
SECONDS ?= 60
# Tests side by side: one more than there are cores, for many wait for a deadline.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n + 1 : 8)))

VENV := .venv
RUN := $(VENV)/bin/python
# The stamp is named after what was installed and where, so that touching a file reinstalls nothing, while
# another pyproject.toml, another pin or a moved checkout does.
CHECKSUM := $(shell { cat pyproject.toml constraints.txt; pwd; } | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed-$(CHECKSUM)
BENCHED := $(VENV)/benched-$(CHECKSUM)
BESIDE := -n $(WORKERS) --dist worksteal
CHECKED := src recipes tests/support benchmarks

# nvidia-resiliency-ext brings pynvml, and torch warns of it at every import: nothing a reader could mend.
QUIET := PYTHONWARNINGS="ignore:The pynvml package is deprecated:FutureWarning"
TORCHRUN := -m torch.distributed.run --standalone --nproc-per-node

# The tests start hundreds of interpreters; without its cache each would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

# torch's threads otherwise spin while they wait, which on a busy machine costs more than the work.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help setup train test bench faults faults-full soak drill lost-node nvrx-versions lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

setup: $(INSTALLED) ## install everything into .venv, once; the other targets do it themselves

train: $(INSTALLED) ## train a small model on real text with checkpoints; run it again and it resumes
	@$(QUIET) $(RUN) $(if $(PROCESSES),$(TORCHRUN) $(PROCESSES)) recipes/pretrain.py $(ARGS)

test: $(INSTALLED) ## run the tests, all but the fault suite
	@$(RUN) -m pytest $(BESIDE) --ignore=tests/faults $(ARGS)

faults: $(INSTALLED) ## crash, damage and fail everything: a seeded subset, and a table of what was tried
	@$(RUN) -m pytest $(BESIDE) tests/faults $(ARGS)

faults-full: $(INSTALLED) ## the same, leaving nothing out
	@HOLDFAST_FAULTS=full $(RUN) -m pytest $(BESIDE) -o faulthandler_timeout=3600 tests/faults $(ARGS)

soak: $(INSTALLED) ## train on two ranks under random SIGKILL: make soak SECONDS=3600 ARGS=--tiered
	@$(QUIET) $(RUN) -m tests.faults.soak --seconds $(SECONDS) $(ARGS)

bench: $(BENCHED) ## measure saves and loads beside peers and the machine's limits: make bench ARGS="--quick"
	@$(QUIET) $(RUN) -m benchmarks $(ARGS)

drill: $(INSTALLED) ## kill a run, resume it, and compare it with an uninterrupted one to the last bit
	@$(QUIET) $(RUN) recipes/drill.py $(ARGS)

lost-node: $(INSTALLED) ## wipe one of two simulated nodes, resume from its peer's memory, compare to the last bit
	@$(QUIET) $(RUN) recipes/lost_node.py $(ARGS)

nvrx-versions: $(INSTALLED) ## test the local tier on newer releases of nvidia-resiliency-ext: ARGS=--quick for a part
	@$(RUN) -m tests.nvrx_versions $(ARGS)

lint: $(INSTALLED) ## ruff, mypy and the import layers
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy $(wildcard $(CHECKED))
	$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

format: $(INSTALLED) ## rewrite the code as ruff would have it
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## remove the virtual environment and every cache; runs/ with its checkpoints stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find src tests recipes -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	rm -rf src/*.egg-info

# Tools run as modules of the interpreter: the scripts in bin/ name the place where they were installed.
$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'holdfast needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo "setting up $(VENV) (once; torch takes a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f $(VENV)/installed-*
	@touch $@

# The peers are needed by nothing else. The constraints keep them from replacing torch, and one that does not
# install here costs its own row only.
$(BENCHED): $(INSTALLED)
	@echo "adding the peers of the benchmarks to $(VENV) (once)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]' || \
		echo 'the peers do not install here: those that do not import are left out' >&2
	@rm -f $(VENV)/benched-*
	@touch $@

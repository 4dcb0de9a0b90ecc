# Everything runs from .venv, which `make setup` makes and keeps up to date with pyproject.toml and constraints.txt.
#
#   PYTHON=python3.12   the interpreter to build .venv with (3.11 to 3.13; 3.11 is what constraints.txt was made on)
#   GPU=yes|no          which torch to install; by default yes where nvidia-smi sees a GPU
#   TORCH_INDEX=URL     where to take torch from (see README, "Install"); with GPU=no never a CUDA build
#   OUT=folder          where `make demo` writes
#   JOBS=N              tests at once, file by file (default 2; they start servers and clusters and wait for them)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
GPU ?= $(shell nvidia-smi -L 2>/dev/null | grep -q . && echo yes || echo no)
OUT ?= demo-out
JOBS ?= 2

TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
ifeq ($(GPU),yes)
TORCH := torch==$(TORCH_VERSION)
TORCH_INDEX ?=
else
TORCH := torch==$(TORCH_VERSION)+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
TORCH_DONE := $(VENV)/.torch-$(TORCH_VERSION)-gpu-$(GPU)
DONE := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow lint types imports format check bench clean

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /\1  /p' $(MAKEFILE_LIST) | awk '{ name = $$1; $$1 = ""; printf "  make %-8s%s\n", name, $$0 }'

setup: $(DONE) ## make or update .venv (about 3 GB)

demo: $(DONE) ## segment a real MR brain and three simulated CT scans; results and reports in OUT
	@$(BIN)/maskmill demo -o $(OUT)

test: $(DONE) ## every test but the slow ones (under 20 minutes on 2 cores)
	@$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile $(PYTEST)

slow: $(DONE) ## the slow tests: soaks, fuzzing, memory (under 40 minutes)
	@$(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile $(PYTEST)

lint: $(DONE) ## ruff: rules and formatting
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check . || { echo "lint: run 'make format'" >&2; exit 1; }

types: $(DONE) ## mypy --strict on what the other packages stand on
	@$(BIN)/mypy --strict --no-error-summary -p segmodels -p pipeline

imports: $(DONE) ## the direction of imports
	@$(BIN)/lint-imports > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }

format: $(DONE) ## put every file into one form
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .

check: lint types imports test ## what CI checks, but for the slow tests

bench: $(DONE) ## our tiles against MONAI's sliding window: time and memory (docs/benchmarks.md)
	@$(BIN)/python benchmarks/tiled_inference.py $(BENCH)

clean: ## remove .venv, caches and demo-out
	@rm -rf $(VENV) demo-out build *.egg-info .*_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------------------------------------ set-up

define PICK_PYTHON
for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && break; \
	python=; \
done; \
test -n "$$python" || { echo "setup: no Python 3.11, 3.12 or 3.13 was found: install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
endef

$(BIN)/python:
	@$(PICK_PYTHON); \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); echo "setup: $$python cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2; exit 1; }

# Apart from the rest, because plain `torch` brings gigabytes of CUDA. Without a GPU only a +cpu build will do: from
# where pip is configured to look, else from TORCH_INDEX. With one, only another build will.
TORCH_BUILD := $(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null
ifeq ($(GPU),yes)
TORCH_IS_RIGHT = case "$$($(TORCH_BUILD))" in *+cpu) false;; $(TORCH_VERSION)*) true;; *) false;; esac
else
TORCH_IS_RIGHT = test "$$($(TORCH_BUILD))" = "$(TORCH_VERSION)+cpu"
endif

$(TORCH_DONE): | $(BIN)/python
	@rm -f $(VENV)/.torch-*
	@$(TORCH_IS_RIGHT) || { echo "setup: installing $(TORCH)"; $(PIP) uninstall -q -y torch 2>/dev/null || true; }
ifeq ($(GPU),yes)
	@$(TORCH_IS_RIGHT) || \
		$(PIP) install -q -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$(TORCH)" || true
	@$(TORCH_IS_RIGHT) || { echo "setup: no CUDA build of $(TORCH) was found: set TORCH_INDEX to an index that has one, such as" >&2; \
		echo "       https://download.pytorch.org/whl/cu128, or, to go without the GPU, GPU=no" >&2; exit 1; }
else
	@$(TORCH_IS_RIGHT) || $(PIP) install -q -c constraints.txt "$(TORCH)" >$(VENV)/pip.log 2>&1 || \
		$(PIP) install -q --no-deps --index-url "$(TORCH_INDEX)" "$(TORCH)" >>$(VENV)/pip.log 2>&1 || true
	@$(TORCH_IS_RIGHT) || { cat $(VENV)/pip.log >&2; \
		echo "setup: no GPU was found, and no $(TORCH) either: set TORCH_INDEX to an index or mirror that has it," >&2; \
		echo "       or, to have the CUDA build on a machine without a GPU, GPU=yes" >&2; exit 1; }
endif
	@touch $@

$(DONE): pyproject.toml constraints.txt $(TORCH_DONE)
	@echo "setup: installing the other packages (some minutes the first time)"
	@$(PIP) install -q -c constraints.txt -e ".[test]" >$(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@

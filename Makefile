# Everything a person or CI runs. Needs GNU make and Python 3.11 or newer with its venv module; the rest is installed
# into $(VENV) at the versions of constraints.txt. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter that is new enough, and not newer than the pinned torch supports.
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for name in python3.13 python3.12 python3.11 python3 python3.14; do \
	if $$name -c '$(SUITABLE)' 2>/dev/null; then echo $$name; break; fi; done)
endif

PACKAGES := runtime plugins calibration export tools
LINKS := $(PACKAGES:%=.typing/reelforge/%)
SOURCES := $(shell find $(PACKAGES) -name '*.py')
TEST_WORKERS ?= 2
TEST_OPTIONS ?=

DEMO_PROMPT ?= a red circle moving right on a black background
DEMO_CHECKPOINT := $(if $(wildcard demo/checkpoint/model_index.json),demo/checkpoint,out/demo.checkpoint)

.PHONY: help env demo test lint bench-check profile-pictures train-demo full-size clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## Create the virtual environment with pinned versions

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(SUITABLE)'; then \
		echo "reelforge needs Python 3.11 to 3.14, and none was found on PATH." >&2; \
		echo "  fix: apt-get install python3 python3-venv   (Debian 12, Ubuntu 24.04 or newer), or make PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	@if ! "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then \
		version=$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "$(PYTHON) cannot create virtual environments: its venv module is not installed." >&2; \
		echo "  fix: apt-get install python$$version-venv" >&2; \
		exit 1; fi
	"$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@# Alone: what they depend on is TensorRT and CUDA themselves. Tests read names in the stubs, drive the bindings' plugin
	@# module over a stub of its native half, and let CUDA 13.0's assembler judge the attention kernels.
	"$(BIN)/python" -m pip install --disable-pip-version-check --quiet --no-deps \
		'tensorrt-stubs==10.13.0.35.1' 'tensorrt-cu13-bindings==11.4.0.106' 'nvidia-cuda-nvcc==13.0.88' \
		'tritonclient==2.73.0' 'nvidia-pytriton==0.7.0'
	@# A Triton server for tests, whose Python backend needs a NumPy older than ours (there is none for Python 3.13).
	if "$(BIN)/python" -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then "$(BIN)/python" -m pip install \
		--disable-pip-version-check --quiet --no-deps --target "$(VENV)/triton_python" 'numpy==1.26.4'; fi
	@touch "$@"

demo: $(STAMP) ## Build the INT8 demo bundle; generate out/demo.mp4 and the contact sheet out/demo.png
	@start=$$SECONDS; \
	$(MAKE) --no-print-directory out/demo.bundle/manifest.json; \
	echo "$(BIN)/reelforge generate out/demo.bundle -p '$(DEMO_PROMPT)' -o out/demo.mp4 --seed 7"; \
	"$(BIN)/reelforge" generate out/demo.bundle -p "$(DEMO_PROMPT)" -o out/demo.mp4 --seed 7; \
	"$(BIN)/reelforge" sheet out/demo.bundle --prompts demo/prompts.txt -o out/demo.png --seed 7; \
	seconds=$$((SECONDS - start)); \
	echo "video:  $(CURDIR)/out/demo.mp4"; \
	echo "sheet:  $(CURDIR)/out/demo.png"; \
	echo "bundle: $(CURDIR)/out/demo.bundle"; \
	printf 'time:   %d min %02d s, the environment not included\n' $$((seconds / 60)) $$((seconds % 60))

# Built again when the checkpoint or the compiler changes, so that running the target twice only generates.
out/demo.bundle/manifest.json: $(DEMO_CHECKPOINT)/model_index.json demo/calibration_prompts.txt $(SOURCES)
	rm -rf out/demo.bundle
	"$(BIN)/build-engine" $(DEMO_CHECKPOINT) -o out/demo.bundle --precision int8 \
		--calibration-prompts demo/calibration_prompts.txt --smoothing 0.5
	@touch "$@"

# Stands in for the trained checkpoint where there is none: random weights of the same architecture.
out/demo.checkpoint/model_index.json:
	@echo "demo/checkpoint is not here: a checkpoint with random weights takes its place (the video will be noise)"
	"$(BIN)/python" -m reelforge.tools.synthesize out/demo.checkpoint --size demo

.typing/reelforge/%:
	@mkdir -p .typing/reelforge
	@ln -sfn ../../$* $@

lint: $(STAMP) $(LINKS) ## Check style and types
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy" $(PACKAGES:%=-p reelforge.%) -p demo

# One thread per operator: the workers share the cores already.
test: lint ## Check style and types, then run all tests
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n $(TEST_WORKERS) $(TEST_OPTIONS)

bench-check: $(STAMP) ## Compare ratios of times with benchmarks/baseline.json (3 minutes on an idle machine)
	"$(BIN)/python" -m reelforge.tools.bench.check

profile-pictures: $(STAMP) out/demo.bundle/manifest.json ## Make the pictures of docs/profiling.md anew (needs Chromium)
	"$(BIN)/reelforge" profile out/demo.bundle -o out/demo.profile --repeats 9 --warmup 2 --step-cache easycache:0.12
	"$(BIN)/python" -m reelforge.tools.profiling.pictures out/demo.profile/report.html -o docs/images

train-demo: $(STAMP) ## Train the demo checkpoint again (about an hour on two cores)
	"$(BIN)/python" -m demo.train

full-size: $(STAMP) ## Compile a synthetic model of 13 billion parameters to FP8 plans (60 GB of disk, half an hour)
	"$(BIN)/python" -m reelforge.tools.bench.full_size --work out/full_size

clean: ## Remove what the other targets made, except the environment
	rm -rf out .typing .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean ## Remove the environment too
	rm -rf .venv

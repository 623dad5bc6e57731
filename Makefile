# make train   train a 10 M-parameter Llama on the built-in corpus: on all GPUs, or with two processes on CPU
# make test    run the tests          make lint    ruff, mypy, codespell          make env    only make .venv
#
# Each makes .venv from pyproject.toml and constraints.txt if it is missing or older than they are.
# PYTHON=python3.12 chooses the interpreter; PYTEST_FLAGS="-k loss" and TRAIN_FLAGS="--max_steps 20" are handed on.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= $(CURDIR)/.venv
STAMP := $(VENV)/.made_from_this_project
export PATH := $(VENV)/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false

GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
comma := ,
EXTRAS := $(if $(filter-out 0,$(GPUS)),dev$(comma)gpu,dev)
CONFIG ?= ds_configs/zero2.json
OUTPUT ?= runs/llama_10m
MAX_STEPS ?= 200

# `deepspeed --hostfile` asks ssh even for localhost; a file that names no other host needs none.
OTHER_HOSTS := $(shell awk '!/^ *\#/ && NF && $$1 != "localhost"' hostfile)
LOCAL := $(if $(OTHER_HOSTS),,--no_ssh_check --master_addr 127.0.0.1)
SLOTS := $(shell sed -n 's/^localhost.*slots=\([0-9]*\).*/\1/p' hostfile)
THREADS := $(shell n=$$(( $$(nproc) / $(or $(SLOTS),1) )); echo $$(( n > 0 ? n : 1 )))
ifeq ($(filter-out 0,$(GPUS)),)
# said, so that DeepSpeed does not warn in every process that it found no GPU
export DS_ACCELERATOR := cpu
LAUNCH := deepspeed --quiet --hostfile hostfile $(LOCAL)
else
LAUNCH := deepspeed --quiet --num_gpus $(GPUS)
endif

.PHONY: train test lint env format
.DEFAULT_GOAL := test

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "making .venv with $$($(PYTHON) --version) from pyproject.toml and constraints.txt: a minute or two"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@start=$$SECONDS; set -e; cd $(CURDIR); \
	echo "  torch ..."; $(VENV)/bin/pip install -qq --disable-pip-version-check -c constraints.txt torch; \
	echo "  dstrain[$(EXTRAS)] ..."; \
	$(VENV)/bin/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'; \
	echo "made .venv in $$((SECONDS - start)) s"
	@touch $@

train: $(STAMP)
	@python -m dstrain.launch.ops --deepspeed_config $(CONFIG)
	OMP_NUM_THREADS=$(THREADS) $(LAUNCH) dstrain/train.py \
	  --deepspeed_config $(CONFIG) --config_name examples/llama_10m.json --block_size 512 \
	  --set scheduler.params.total_num_steps=auto --set optimizer.params.lr=1e-3 \
	  --max_steps $(MAX_STEPS) --logging_steps 10 --max_eval_batches 20 --output_dir $(OUTPUT) $(TRAIN_FLAGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 pytest $(PYTEST_FLAGS)

lint: $(STAMP)
	@failed=; for tool in "ruff check ." "ruff format --check ." mypy codespell; do \
	  echo "$$tool"; $$tool || failed="$$failed [$$tool]"; done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

format: $(STAMP)
	ruff check --fix .
	ruff format .

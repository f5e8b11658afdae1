# Everything a person types. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup pretrain test test-slow test-gpu torture mutants lint bench bench-gpu atlas tournament ladder results reference docs lock golden clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0 setuptools
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

setup: $(STAMP) ## the environment alone: .venv with the exact versions of constraints.txt

pretrain: setup ## train a language model on the Python standard library (2 minutes), the main job
	$(BIN)/python recipes/pretrain.py fit

test: setup ## the tests: no GPU, no network; on two cores
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: setup ## what the tests cover in parts, as a whole: verify of each recipe, replay, the notebook, a graph
	$(BIN)/python -m pytest -m slow

test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py

torture: setup ## runs hurt at random moments (about 25 minutes); ARGS="--soak_minutes 60" for longer
	$(BIN)/python -m tests.torture $(ARGS)

mutants: setup ## each mechanism switched off in a copy, whose tests then have to fail (about 20 minutes)
	$(BIN)/python -m tests.mutants $(ARGS)

lint: setup ## style and unused names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup ## speed beside the peers, on a quiet machine; writes docs/benchmarks.md
	$(BIN)/python benchmarks/run.py

bench-gpu: setup ## the same at 124M and 1B on a CUDA device
	$(BIN)/python benchmarks/run.py --gpu

atlas: setup ## optimizers, schedules and regularization beside each other (75 minutes); into docs/benchmarks.md
	$(BIN)/python benchmarks/run.py --only atlas --keep runs/atlas --page docs/benchmarks.md

tournament: setup ## LSTM, GPT-2, a modern decoder, BERT and T5 beside each other (75 minutes); into docs/benchmarks.md
	$(BIN)/python benchmarks/run.py --only tournament --keep runs/tournament --page docs/benchmarks.md

results: setup ## the recipes as they are (40 minutes); into docs/benchmarks.md and README.md
	$(BIN)/python benchmarks/run.py --only named_runs --keep runs/named --page docs/benchmarks.md

ladder: setup ## four sizes, the law that they follow, and the next one foretold (50 minutes); into docs/benchmarks.md
	$(BIN)/python benchmarks/run.py --only ladder --keep runs/ladder --page docs/benchmarks.md

reference: setup ## docs/reference.md from each recipe's --help
	$(BIN)/python docs/write_reference.py

docs: setup ## the documentation as pages, in site/
	$(BIN)/mkdocs build --strict --quiet

lock: setup ## write requirements.lock anew: the versions of constraints.txt with the hashes of their files
	$(BIN)/pip install --quiet uv
	sed -n '/^#/p;/^$$/q' requirements.lock > requirements.lock.new
	grep -v '^#\|^torch==' constraints.txt | $(BIN)/uv pip compile - --no-deps --generate-hashes --no-annotate \
		--no-header --quiet >> requirements.lock.new
	mv requirements.lock.new requirements.lock

golden: setup ## rewrite the golden losses after a change that is meant to change them
	$(BIN)/python -m pytest tests/test_golden.py --rewrite-golden

clean: ## remove what setup made
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache

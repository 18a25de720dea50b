# Everything is run from here; `make help` lists it. Needs Python 3.11 or later with pip, and a package index.
#
# torch: without a GPU the pinned CPU build is taken where the package index has one, else the default build, which is large; give
# the address of an index that holds CPU builds as TORCH_INDEX. On a machine with a GPU the pinned default build is taken. To bring
# your own (nothing else is pinned then, because our pins may not fit it):
#     make run TORCH='torch==2.11.0'
#     make run TORCH=torch VENV_FLAGS=--system-site-packages      # the torch that the system or the container has

VENV_FLAGS ?=
TORCH ?=
TORCH_INDEX ?=
JOBS ?= 2
BENCH ?= table latency scale channel ring memory idle
ARGS ?=

VLLM ?= 0.25.1

# Relative, so that a checkout whose path has a space in it works.
BIN := .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
PINS := constraints.txt
TORCH_PIN := $(shell sed -n 's/^torch==//p' constraints.txt)
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)

ifneq ($(TORCH),)
PINS := /dev/null
INSTALL_TORCH = $(PIP) install $(TORCH)
else ifneq ($(wildcard /dev/nvidiactl),)
INSTALL_TORCH = $(PIP) install -c $(PINS) torch
else
INSTALL_TORCH = $(PIP) install -c $(PINS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH_PIN)+cpu 2>/dev/null || \
	{ echo "no CPU build of torch in the package index: installing the default build"; $(PIP) install -c $(PINS) torch; }
endif

.PHONY: help run test test-peers test-vllm check bench bench-peers stress clean
.DEFAULT_GOAL := help

help: ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

run: .venv/installed ## encode photographs; ARGS="--data-parallel-size 2 my-photographs/"
	$(BIN)/tensorferry run $(ARGS)

# Some 200 processes are started: each would compile the project anew where bytecode may not be kept.
test: .venv/installed ## the test suite, without the stress tests; ARGS="-k ring"
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-vllm: .venv-vllm/vllm-$(VLLM) ## the plugin in real vLLM, without a GPU, in an environment of its own; VLLM=0.33.0
	.venv-vllm/bin/python -m pytest tests/vllm $(ARGS)

test-peers: bench-peers ## ranks under Ray, and the rows of the benchmarks that are other people's code
	.venv-peers/bin/python -m pytest tests/hosts/test_ray.py tests/bench/test_peers.py -m "" $(ARGS)

check: .venv/installed ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed ## the benchmarks, hours in all; BENCH="table" ARGS="--quick"
	trap 'exit 130' INT; status=0; python=$(BIN)/python; test ! -e .venv-peers/bin/python || python=.venv-peers/bin/python; \
	for name in $(BENCH); do $$python -m bench $$name $(ARGS) || { status=1; echo "make bench: $$name failed" >&2; }; done; \
	exit $$status

bench-peers: .venv-peers/installed ## vLLM (without CUDA), Ray, iceoryx2 and zenoh for the benchmarks to run beside

stress: .venv/installed ## the tests that run for minutes, one at a time
	$(BIN)/python -m pytest -m stress --timeout 3600 $(ARGS)

clean: ## remove what make made
	rm -rf .venv .venv-peers .venv-vllm build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems ship Python without ensurepip; their own pip then fills the environment.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; say where it is: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) .venv || \
		{ $(PYTHON) -m venv --without-pip $(VENV_FLAGS) .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(INSTALL_TORCH)
	$(PIP) install -c $(PINS) -e '.[dev]'
	$(PIP) install -c $(PINS) --only-binary atheris -e '.[fuzz]' || echo "no atheris for this machine: no fuzzing by coverage"
	touch $@

# On top of .venv, by a path file: torch is not installed twice. Each peer by itself, so that one without a wheel for this
# Python costs no other; the next `make bench-peers` tries it again. vLLM without what it depends on, which is gigabytes of
# CUDA: the benchmarks use the few of its modules that carry tensors (bench/peers/vllm.py), and what those import.
PEERS := eclipse-zenoh iceoryx2 ray
VLLM_NEEDS := aiohttp cloudpickle pybase64 pydantic regex requests uvloop
INSTALL_PEER = $(PIP) --python .venv-peers/bin/python install --only-binary :all: -c $(PINS) -c bench/peers/requirements.txt

.venv-peers/installed: .venv/installed bench/peers/requirements.txt
	$(BIN)/python -m venv --without-pip .venv-peers
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$(.venv-peers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	all=touch; missing() { all=:; echo "no $$1 for this Python: its rows are not here"; }; \
	for peer in $(PEERS); do $(INSTALL_PEER) $$peer || missing $$peer; done; \
	{ $(INSTALL_PEER) $(VLLM_NEEDS) && $(INSTALL_PEER) --no-deps vllm==$(VLLM); } || missing vllm; \
	$$all $@

# vLLM's wheel without what it requires for CUDA, beside the CPU build of torch. Another version takes the place of the one there.
.venv-vllm/vllm-$(VLLM): BIN := .venv-vllm/bin
.venv-vllm/vllm-$(VLLM): tests/vllm/requirements.txt pyproject.toml
	test -e $(BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(INSTALL_TORCH)
	rm -f .venv-vllm/vllm-*
	$(PIP) install --no-deps -r tests/vllm/requirements.txt vllm==$(VLLM)
	$(PIP) install --no-deps -e .
	touch $@

.venv-vllm/installed: .venv-vllm/vllm-$(VLLM)
	touch $@

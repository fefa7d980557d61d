# Two commands: `make demo` converts and serves the example, `make test` passes the tests.
# Each sets up its own environment in .env first; nothing else on the machine is touched.

PYTHON ?= python3
# Package index with a CPU build of torch, where pip does not find one by itself:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ENV := .env/bin
HELPERS := $(basename $(notdir $(wildcard tests/helpers/*.py)))

.PHONY: demo test lint format docs setup clean

setup:
	@$(PYTHON) scripts/setup_env.py --torch-index "$(TORCH_INDEX)"

demo: setup
	@$(ENV)/python -m scripts.demo

test: setup
	$(ENV)/pytest

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

# One virtual environment, made with nothing but python3 and pip. See CONTRIBUTING.md.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

.PHONY: quickstart test slow lint thread-pool-ir clean

quickstart: $(VENV)/.installed
	$(BIN)/repvgg quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest -m 'hypothesis and not slow' --hypothesis-profile explore

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Regenerates src/repvgg/engine/runtime/thread_pool.*.ll from thread_pool.c; needs clang-16.
thread-pool-ir: $(VENV)/.installed-dev
	$(BIN)/python -m tests.engine.runtime.generate_thread_pool

$(BIN)/uv:
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet uv

$(VENV)/.installed: pyproject.toml | $(BIN)/uv
	$(UV) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/uv
	$(UV) -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

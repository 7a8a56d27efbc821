# Everything runs in one virtual environment, made with nothing but python3 and pip. See CONTRIBUTING.md.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python
# One worker a logical core, one thread a worker; beyond 8 workers memory is what runs out.
# Compiled bytecode is kept: subprocesses import it, and the next run does not rewrite every assertion again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

.PHONY: quickstart test test-avx2 slow lint thread-pool-ir clean

quickstart: $(VENV)/.installed
	$(BIN)/repvgg quickstart

test: $(VENV)/.installed-dev
	$(PYTEST) --durations 10

# Numerical tests as on a processor without AVX-512: oneDNN and ATen choose other kernels, which add in another order.
test-avx2: $(VENV)/.installed-dev
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) tests/models/test_collapse_all_models.py tests/verify \
		tests/collapse tests/symbolic tests/algebra

slow: $(VENV)/.installed-dev
	$(UV) -e '.[foreign,browser]'
	$(BIN)/python -m pytest -v -m slow
	$(BIN)/python -m pytest -m 'hypothesis and not slow' --hypothesis-profile explore

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Regenerates src/repvgg/engine/runtime/*.ll from thread_pool.c and library.c; needs clang-16.
thread-pool-ir: $(VENV)/.installed-dev
	$(BIN)/python -m tests.engine.runtime.generate_thread_pool

$(BIN)/uv:
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet uv

$(VENV)/.installed: pyproject.toml | $(BIN)/uv
	$(UV) -e '.[train,onnx,study]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/uv
	$(UV) -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

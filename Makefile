# A fresh machine needs Python >= 3.11, git and make; everything else is put into .venv (and .uv where uv is missing).

PYTHON ?= python3
BIN := .venv/bin
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
# The environment is set up again only when what it is made from changes, or when the checkout moved.
STAMP := .venv/.made-$(shell { pwd; cat pyproject.toml uv.lock; } | cksum | tr -d ' ')

.PHONY: help demo test test-slow bench lint format env clean

help:
	@echo "make demo   the whole story on the embedded data, from environment to table and figure"
	@echo "make test   lint, types, import rows and all tests; no network once the environment stands"
	@echo "make bench  how fast it is beside its peers, into build/benchmarks;  make test-slow  the tests of minutes"
	@echo "make lint   the checks alone;  make format  puts the code into shape"
	@echo "make env    the environment alone;  make clean  removes it and all caches"

demo: env
	$(BIN)/selora demo

test: lint
	$(BIN)/pytest -n auto --maxprocesses=4 --dist worksteal --durations=10

test-slow: env
	$(BIN)/pytest -m slow

bench: env
	$(BIN)/python tests/benchmarks/bench.py --out build/benchmarks
	$(BIN)/python tests/benchmarks/scaling.py | tee build/benchmarks/scaling.md
	$(BIN)/python tests/benchmarks/settling.py --out build/benchmarks

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(STAMP)

# Bytecode is compiled now, or the first command of every kind would spend its first seconds on it.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@if [ "$(UV)" != uv ] && [ ! -x .uv/bin/uv ]; then \
		$(PYTHON) -m venv .uv && .uv/bin/pip install --quiet --disable-pip-version-check 'uv>=0.5' || { \
		rm -rf .uv; echo "Could not install uv into .uv; see https://docs.astral.sh/uv/ for other ways." >&2; exit 1; }; fi
	env -u PYTHONDONTWRITEBYTECODE -u VIRTUAL_ENV UV_COMPILE_BYTECODE=1 $(UV) sync --frozen --python $(PYTHON)
	@rm -f .venv/.made-* && touch $@

clean:
	rm -rf .venv .uv .pytest_cache .ruff_cache .import_linter_cache build dist
	find pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +

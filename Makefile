# A fresh machine needs Python >= 3.11, git and make. Everything else goes into .venv, and uv into .uv if it is missing.

PYTHON ?= python3
BIN := .venv/bin
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
# The environment is set up again only when pyproject.toml or uv.lock changes, or when the checkout has moved.
STAMP := .venv/.made-$(shell { pwd; cat pyproject.toml uv.lock; } | cksum | tr -d ' ')

.PHONY: help demo test test-slow coverage bench first-light chaos audit docs lint format env clean

help:
	@echo "make demo       run the whole pipeline on embedded data, from photos to a registered model"
	@echo "make test       lint, types, import rules and all fast tests; needs no network once the environment is set up"
	@echo "make test-slow  the tests that take minutes"
	@echo "make coverage   lines of pipeline/ that the fast tests run, into build/coverage (needs the network once)"
	@echo "make bench      measure speed and memory against PEFT, open_clip and webdataset, into build/benchmarks"
	@echo "make first-light  run, compare and time everything on a GPU within 8 minutes, into build/first_light"
	@echo "make chaos      kill and stop commands at random moments and compare what they end with, into build/chaos"
	@echo "make audit      compare the locked packages with the advisories of PyPI (needs the network)"
	@echo "make docs       build the documentation site, into build/site"
	@echo "make lint       the checks alone"
	@echo "make format     format the code and regenerate docs/options.md"
	@echo "make env        set up the environment in .venv"
	@echo "make clean      remove the environment and all caches"

demo: env
	$(BIN)/selora demo

test: lint
	$(BIN)/pytest -n auto --maxprocesses=4 --dist worksteal --durations=10

test-slow: env
	$(BIN)/pytest -m slow

# make coverage TESTS="tests/evaluation -m slow"
coverage: env
	$(UV) pip install --quiet --python $(BIN)/python 'coverage>=7.10'
	rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/coverage run -m pytest -n 0 $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report --sort=cover

bench: env
	$(BIN)/python tests/benchmarks/bench.py --out build/benchmarks
	$(BIN)/python tests/benchmarks/scaling.py | tee build/benchmarks/scaling.md
	$(BIN)/python tests/benchmarks/settling.py --out build/benchmarks
	$(BIN)/python tests/benchmarks/overhead.py --out build/benchmarks/overhead | tee build/benchmarks/overhead.md

# make first-light FIRST_LIGHT=--tiny
first-light: env
	$(BIN)/python tests/gpu/first_light.py --out build/first_light $(FIRST_LIGHT)

# make chaos CHAOS="--minutes 60 --seed 7 --commands train promote"
chaos: env
	$(BIN)/python tests/chaos/chaos.py --out build/chaos $(CHAOS)

# Advisories that do not concern selora, each with its reason: AUDIT_EXCEPT = PYSEC-… PYSEC-…
AUDIT_EXCEPT :=
audit: env
	@mkdir -p build
	$(UV) export --quiet --frozen --all-groups --all-extras --no-emit-project --output-file build/requirements.txt
	$(UV) tool run pip-audit --requirement build/requirements.txt --disable-pip --strict $(AUDIT_EXCEPT:%=--ignore-vuln %)

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m pipeline.config.reference > docs/options.md

env: $(STAMP)

# Compile bytecode now; otherwise the first run of each command would spend seconds on it.
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

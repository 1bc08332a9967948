# Two commands do everything on a machine with Python 3.11, gcc and make: `make run` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
RECIPE ?= deploy/recipes/arithmetic.toml
RUN_DIR ?= runs/arithmetic
ARGS ?=

.PHONY: run test chaos lint bench clean

run: .venv/installed
	$(BIN)/vespo run $(RECIPE) --run-dir $(RUN_DIR) $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest $(ARGS)

# The long form of the chaos suite that `make test` runs in short.
chaos: .venv/installed
	VESPO_CHAOS=long $(BIN)/python -m pytest -m chaos -s $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/vespo bench all $(ARGS)

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The environment is made once and reused until its requirements change.
.venv/installed: requirements-cpu.txt pyproject.toml
	@echo "setting up .venv: 4 GB, a few minutes, once"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

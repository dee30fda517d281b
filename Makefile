# The two commands are `make quickstart` and `make test`; each sets up what it needs first.
#
#   FIBER_ENV=.venv      where the Python environment goes (the default), or
#   FIBER_ENV=current    use the active environment, adding only what it lacks
#   PYTHON=python3.11    the interpreter to start from
#   ARGS="a.b=1 c=2"     further arguments of train_net.py for `make quickstart`

FIBER_ENV ?= .venv
PYTHON ?= python3
ARGS ?=

ifeq ($(FIBER_ENV),current)
PY := $(PYTHON)
else
PY := $(FIBER_ENV)/bin/python
endif

.DEFAULT_GOAL := help
.PHONY: help env test-env quickstart test lint format test-quick test-slow docs clean

help:
	@echo "make quickstart   train a small FIBER on generated data, evaluate it, draw pictures"
	@echo "make test         lint, quick tests, slow tests"
	@echo "make test-quick, make test-slow, make lint, make format"
	@echo "make docs         the documentation as a site in build/docs; broken links are errors"
	@echo "make env          only set up the Python environment (test-env: for tests, too)"
	@echo "make clean        remove results of builds and caches (not the environment, not output/)"

env:
	@"$(PYTHON)" tools/setup_env.py "$(FIBER_ENV)"

test-env:
	@"$(PYTHON)" tools/setup_env.py "$(FIBER_ENV)" --tests

quickstart: env
	"$(PY)" train_net.py --config-file configs/quickstart.py $(ARGS)

# One recipe, not prerequisites, so that the order holds under `make -j` too.
test: test-env
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m pytest -m "not slow"
	"$(PY)" -m pytest -m slow --durations=10

lint: test-env
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .

format: test-env
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

test-quick: test-env
	"$(PY)" -m pytest -m "not slow"

test-slow: test-env
	"$(PY)" -m pytest -m slow --durations=10

docs: test-env
	"$(PY)" -m mkdocs build --strict --quiet
	@echo "build/docs/index.html"

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

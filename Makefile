# Everything runs in .venv, made with nothing but Python 3.11+ and PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint check slow minimum docs cluster clean

demo: $(VENV)/.installed
	$(BIN)/quantfix run configs/digits.yaml

# -n auto: a process for each core that we may use (tests/conftest.py), each with one thread
PARALLEL := -n auto --dist worksteal

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test

# All slow tests, but those that need several machines (cluster).
slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow $(PARALLEL)

# The fast tests with the oldest versions that pyproject.toml claims
minimum: $(VENV)/.dev
	$(BIN)/python .ci/minimum.py $(PARALLEL)

# The documentation site, strictly, into site/
docs: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --group docs
	$(BIN)/python docs/rule_pages.py
	$(BIN)/mkdocs build --quiet

# Searches on several machines: with a PostgreSQL that the tests start themselves, if it is installed, on two local Ray nodes,
# and under the eyes of optuna-dashboard. What is not there is skipped, with the reason.
cluster: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[postgres,ray,dashboard]'
	$(BIN)/python -m pytest -m "slow or not slow" tests/search/study/test_postgres.py tests/search/workers/test_ray.py tests/search/study/test_dashboard.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# pip reads dependency groups since 25.1, hence the upgrade above
$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis .coverage

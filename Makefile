# `make demo` and `make test` need nothing but python3 with venv; both do only what is left to do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: demo test check bench clean

demo: $(INSTALLED)
	$(BIN)/python app.py $(ARGS)

test: $(INSTALLED_DEV)
	sh tests/install_browser.sh
	$(BIN)/python -m pytest $(ARGS)

check: $(INSTALLED_DEV)
	$(BIN)/ruff check .

bench: $(INSTALLED_DEV)
	@for file in benchmarks/*.py; do \
		module=$$(basename $$file .py); \
		case $$module in __init__|timing) continue ;; esac; \
		echo "== benchmarks.$$module"; $(BIN)/python -m benchmarks.$$module $(ARGS) || exit 1; \
	done

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: $(PYTHON) is not Python 3.10 to 3.13; name one with make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) has no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(INSTALLED): requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

$(INSTALLED_DEV): requirements.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $(INSTALLED) $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

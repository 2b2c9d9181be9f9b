# demo, test, lint, bench: each sets up .venv when it must.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo

.PHONY: help demo test lint bench clean
help:
	@echo "make demo   simulate 24 sequences, rank all metrics on them, and write $(OUT)/results/report/index.html"
	@echo "make test   run the tests"
	@echo "make lint   ruff (format and lint) and mypy"
	@echo "make bench  run the benchmarks"

# Dependencies are installed again only when what they are made from changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; pass PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/lsim run demo --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/sequence.py
	$(BIN)/python benchmarks/convert.py

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info

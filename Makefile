# Two commands on a fresh machine: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
EXTRA ?= cpu

.PHONY: demo test install lint pocket clean

demo: install
	$(VENV)/bin/true-kd demo

test: install
	$(VENV)/bin/python -m pytest --numprocesses auto

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[$(EXTRA),test]'
	touch $(STAMP)

lint: install
	$(VENV)/bin/python -m pip install --quiet 'ruff>=0.9'
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

pocket: install
	$(VENV)/bin/python scripts/build_pocket.py --out true_kd/pocket

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

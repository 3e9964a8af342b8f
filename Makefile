# Two commands on a fresh machine: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
EXTRA ?= cpu
CHAOS ?= $(addprefix tests/test_,chaos.py bad_input.py damage.py hostile.py templates.py numbers.py)

.PHONY: demo test test-chaos install lint pocket clean

demo: install
	$(VENV)/bin/true-kd demo

test: install
	$(VENV)/bin/python -m pytest --numprocesses auto

# An hour or more of kills, full disks, damage and bad input; what it finds stands in true_kd/docs/reliability.md.
test-chaos: install
	TRUE_KD_CHAOS=25 $(VENV)/bin/python -m pytest --numprocesses auto -rP $(CHAOS)

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

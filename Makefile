# Two commands on a fresh machine: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
EXTRA ?= cpu
LLAMA := $(VENV)/.llama-cpp
CHAOS ?= $(addprefix tests/test_,chaos.py bad_input.py damage.py hostile.py templates.py numbers.py)

.PHONY: demo test test-chaos install lint pocket clean

demo: install
	$(VENV)/bin/true-kd demo

test: install $(LLAMA)
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

# llama.cpp, with which exports are compared, is compiled, once, in a quarter of an hour or more. Where that fails its
# tests are skipped, and it is tried again after `rm .venv/.llama-cpp`.
$(LLAMA): $(STAMP)
	@echo "compiling llama-cpp-python, for the tests of exports (LLAMA= leaves it out)"
	@CMAKE_ARGS="$${CMAKE_ARGS:--DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF}" \
		$(VENV)/bin/python -m pip install --quiet llama-cpp-python >$(VENV)/llama-cpp.log 2>&1 \
		|| echo "llama-cpp-python was not built, its tests are skipped: $(VENV)/llama-cpp.log says why"
	@touch $(LLAMA)

lint: install
	$(VENV)/bin/python -m pip install --quiet 'ruff>=0.9'
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

pocket: install
	$(VENV)/bin/python scripts/build_pocket.py --out true_kd/pocket

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

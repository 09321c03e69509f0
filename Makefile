# Two commands on a machine that has Python 3.11 to 3.13, pip and make: `make demo` and `make test`.
# Each makes its own virtual environment in .venv first. `make PYTHON=python3.12 test` chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick fuzz torture lint types check docs clean

demo: .venv/demo.installed
	$(BIN)/python examples/enrol_faces.py --out runs/enrol_faces

test: .venv/test.installed
	$(BIN)/python -m pytest -n auto --dist worksteal

# The laws, the core and the widening engine, in two minutes.
quick: .venv/test.installed
	$(BIN)/python -m pytest -n auto --dist worksteal tests/core tests/widening tests/test_layers.py

# The property tests with examples drawn anew, five times.
fuzz: .venv/test.installed
	for round in 1 2 3 4 5; do HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n auto --dist worksteal -m hypothesis tests || exit 1; done

# Ten thousand faults: half an hour; stopped and started again, it goes on.
torture: .venv/test.installed
	$(BIN)/python benchmarks/torture.py

lint: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.installed
	$(BIN)/basedpyright

check: lint types test

# The documentation as a web site in site/. It opens from disk; its search needs a server: python -m http.server -d site
docs: .venv/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv

.venv/demo.installed: extras = faces,plot
.venv/test.installed: extras = test
.venv/dev.installed: extras = dev
.venv/docs.installed: extras = docs
.venv/%.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and f"Python 3.11 to 3.13 is needed, found {sys.version.split()[0]}; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(extras)]"
	touch $@

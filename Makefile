# make demo and make test do all set-up on a fresh machine; everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal # a test has one thread

.PHONY: install demo app check test families matrix faults bench

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("saebench needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/saebench demo

app: install
	test -d runs/demo/index || $(MAKE) demo
	$(BIN)/saebench app runs

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

test: install
	$(PYTEST)

families: install # every stage on a tiny checkpoint of every family of models
	SAEBENCH_FAMILIES=all $(PYTEST) tests/test_families.py

matrix: # install and suite on every supported Python at hand, or on PYTHON=… alone
	scripts/matrix.sh $(if $(filter file,$(origin PYTHON)),,$(PYTHON))

faults: install
	SAEBENCH_KILLS=20 $(PYTEST) tests/test_faults.py tests/test_store.py tests/test_ranks.py -k "kill or every_byte or lost or shared"

bench: install
	$(BIN)/python benchmarks/train_step.py

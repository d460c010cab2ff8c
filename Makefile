# `make run` and `make test` need Python >= 3.11 and set up .venv themselves, once.
PYTHON ?= python3
TASK   ?= digits
ARGS   ?=
TESTS  ?= not claims and not mutations and not pages and not long

VENV := .venv
BIN  := $(VENV)/bin
# Every install is held to the tested pins, and nothing is ever built from source but this project.
PINS := constraints.txt
# Python compiles the few modules that are imported when they are; pip would compile all, for half a minute.
PIP   = PIP_CONSTRAINT=$(PINS) $(BIN)/python -m pip install \
        --quiet --no-compile --no-build-isolation --only-binary=:all:

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup setup-dev run test test-mutations test-long test-pages test-claims test-shuffled test-portable mutants test-extras run-extras test-wheel test-lowest run-lowest lint types format docs claim-pages bench chromium clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: setup  ## Train on TASK (default: digits with wrong labels), print the verdict, write the report
	$(BIN)/poprisk compare $(TASK) $(ARGS)

test: export OMP_NUM_THREADS := 1
test: export MKL_NUM_THREADS := 1
test: export OPENBLAS_NUM_THREADS := 1
test: lint types  ## Lint, check types and run the tests; ARGS goes to pytest, TESTS says which
	$(BIN)/pytest -n 2 --dist worksteal -p no:randomly -m "$(TESTS)" $(ARGS)

test-mutations: export OMP_NUM_THREADS := 1
test-mutations: setup-dev  ## Break the library by hand-written faults and see tests go red
	$(BIN)/pytest -n 2 -p no:randomly -m mutations tests/test_mutations.py $(ARGS)

test-long: export OMP_NUM_THREADS := 1
test-long: setup-dev  ## Run the few tests that take long and check more of what quick ones check
	$(BIN)/pytest -n 2 -p no:randomly -m long $(ARGS)

test-pages: export OMP_NUM_THREADS := 1
test-pages: setup-dev  ## Run the code and the commands of the pages of docs/
	$(BIN)/pytest -n 2 -p no:randomly -m pages $(ARGS)

test-claims: export OMP_NUM_THREADS := 1
test-claims: setup-dev  ## Run every claim of the paper in its quick form
	$(BIN)/pytest -n 2 -p no:randomly -m claims $(ARGS)

test-shuffled: export OMP_NUM_THREADS := 1
test-shuffled: setup-dev  ## Run the quick tests in an order of chance, whose seed is printed
	$(BIN)/pytest -n 2 -m "not slow and not claims" $(ARGS)

# What other processors do: no vector instructions of torch, and MKL's code for any of them.
test-portable: export OMP_NUM_THREADS := 1
test-portable: export ATEN_CPU_CAPABILITY := default
test-portable: export MKL_CBWR := COMPATIBLE
test-portable: setup-dev  ## Run the tests of numbers as on a processor without vector instructions
	$(BIN)/pytest -n 2 -p no:randomly -m "numerics and not slow and not claims" $(ARGS)

mutants: $(VENV)/mutants.stamp  ## Break the library by cosmic-ray and see tests go red; resumable
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 nice -n 19 $(BIN)/python tests/mutants.py $(ARGS)

test-extras:  ## Run the tests of the extras hf, lightning, cleanlab, pinn, evidence, triton, slurm and ray, in .venv-extras
	$(MAKE) VENV=.venv-extras run-extras

run-extras: $(VENV)/extras.stamp
	$(BIN)/pytest tests/test_transformers.py tests/test_trl.py tests/test_trl_preferences.py tests/test_trl_twin.py \
		tests/test_lightning.py tests/test_twin_integrations.py tests/test_cell_integrations.py \
		tests/test_claim_pinn.py tests/test_claim_dpo.py tests/test_audit_integrations.py tests/test_audit_result.py \
		tests/test_claim_audit.py tests/test_evidence.py tests/test_clusters_extras.py tests/test_trackers.py \
		tests/test_exempt.py $(ARGS)
	$(BIN)/pytest -m extras tests/test_pages.py $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/pytest tests/test_triton.py $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/pytest -m mutations tests/test_mutations.py -k triton $(ARGS)

test-wheel: setup-dev  ## Build the wheel, look at what it holds, and use it alone and with its extra
	$(BIN)/pytest -p no:randomly tests/built_wheel.py $(ARGS)

test-lowest: export OMP_NUM_THREADS := 1
test-lowest: export MKL_NUM_THREADS := 1
test-lowest:  ## Run the quick tests on the lowest versions promised, in .venv-lowest; Python 3.11
	$(PYTHON) tests/lowest.py > lowest.txt
	$(MAKE) VENV=.venv-lowest PINS=lowest.txt run-lowest

run-lowest: $(VENV)/lowest.stamp
	$(BIN)/python tests/lowest.py --check
	$(BIN)/pytest -n 2 -p no:randomly -m "not slow and not claims" $(ARGS)

lint: setup-dev  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev  ## Check types
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: setup-dev  ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: export OMP_NUM_THREADS := 1
docs: $(VENV)/docs.stamp  ## Run the tutorials and write all pages to site/; a warning is an error
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going \
		--doctree-dir docs/_build/doctrees docs site $(ARGS)
	@echo "Open site/index.html"

claim-pages: $(VENV)/docs.stamp  ## Write the pages of the claims, docs/claims/, from records/
	$(BIN)/python docs/claims.py

bench: setup  ## Measure step times and print them beside AdamW's
	$(BIN)/poprisk bench $(ARGS)

setup: $(VENV)/cli.stamp  ## Install what `make run` needs
setup-dev: $(VENV)/dev.stamp  ## Install what `make test` needs

chromium:  ## Install the browser of the browser tests (Debian, as root)
	apt-get update
	apt-get install --yes --no-install-recommends chromium

clean:  ## Remove everything made here but runs/
	rm -rf $(VENV) .venv-extras .venv-lowest lowest.txt site docs/_build docs/gallery build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: no later requirement then gets to choose another build of it.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "poprisk needs Python 3.11 or newer, and '$(PYTHON)' is not one:" \
	       "run make PYTHON=/path/to/python3.11"; exit 1; } >&2
	@echo "Setting up $(VENV), once; downloading torch may take a while"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) setuptools torch
	@touch $@

$(VENV)/cli.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[lab]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[lab,dev]'
	@touch $@ $(VENV)/cli.stamp

$(VENV)/docs.stamp: $(VENV)/dev.stamp
	$(PIP) -e '.[docs]'
	@touch $@

# Two small requirements of cosmic-ray, pure Python, come without wheels.
$(VENV)/mutants.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --no-binary=yattag,exit-codes -e '.[lab,dev,mutants]'
	@touch $@

$(VENV)/lowest.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e '.[lab,test]'
	@touch $@

# A requirement of mlcroissant, pure Python, comes without a wheel.
$(VENV)/extras.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --no-binary=jsonpath-rw -e '.[lab,dev,hf,lightning,cleanlab,pinn,evidence,triton,slurm,ray]'
	@touch $@

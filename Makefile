# Guessable targets. `make quickstart` and `make test` need nothing but Python >= 3.11 and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= quickstart
DATA   ?= ../shared
STUDIES = outlier_gap depth_curves bridge_cka partial_bridge score_truth lr_fairness depth_and_data

.PHONY: help install quickstart test test-all test-lowest fuzz lint format typecheck docs studies studies-quick check-studies notebooks clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,fast,dev]'
	touch $@

install: $(VENV)/.installed  ## create the environment and install layerprobe with its demo model

quickstart: install  ## the main job on MiniLM and the scikit-learn digits; results in quickstart/
	$(BIN)/layerprobe freeze-search --model minilm --task digits --preset quickstart -o $(RUN)

test: install  ## the default tests (under 8 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: install  ## every test that this machine can run, the slow ones included
	$(BIN)/python -m pytest -m 'not network and not gpu'

test-lowest:  ## the default tests with the lowest versions that pyproject.toml allows, in .venv-lowest (several GB)
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e '.[demo,fast,dev]'
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile

fuzz: install  ## 5,000 damaged files of every format, read; figures on stdout
	$(BIN)/python tests/fuzz/run.py 5000

lint: install  ## ruff, linter and formatter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## let ruff format the tree
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

typecheck: install  ## mypy on the package
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

docs: $(VENV)/.docs  ## the documentation as a site in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

studies-quick: install  ## every study in small, on what the extra [demo] brings (about 6 minutes); into runs/
	@for study in $(STUDIES); do $(BIN)/python analyses/$$study.py --quick || exit 1; done

studies: install  ## every study at full size on DATA (about an hour on one core); continues where it stopped
	@for study in $(STUDIES); do $(BIN)/python analyses/$$study.py --data $(DATA) || exit 1; done
	$(BIN)/python analyses/index.py

notebooks: install  ## run the notebooks and keep their outputs (about a minute)
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

check-studies: install  ## re-run the study of the day in small and compare with the committed table
	$(BIN)/python analyses/check.py

clean:  ## remove the environment, caches, the site and the quickstart run
	rm -rf $(VENV) .venv-lowest $(RUN) site .pytest_cache .mypy_cache .ruff_cache .hypothesis

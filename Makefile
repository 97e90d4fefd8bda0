# Two commands, `make study` and `make test`; each makes the environment first where it is missing or out of date.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: study test lab refresh check-records mutants site

study: $(READY)  ## train every variant, then draw notebooks/out/summary.ipynb
	$(BIN)/python -m lib.study $(PROFILE)

test: $(READY)  ## every test and every notebook
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest --nbval --numprocesses 2 --dist loadfile --no-loadscope-reorder

site: $(READY)  ## docs, notebooks and records as a static site: open site/index.html
	$(BIN)/python -m lib.site

lab: $(READY)  ## JupyterLab, at the notebook that leads to the others
	$(BIN)/jupyter lab --notebook-dir=. notebooks/explore.ipynb

refresh: $(READY)  ## run the committed notebooks anew; REDRAW=--redraw draws measured outputs and figures anew too
	$(BIN)/python scripts/refresh_notebooks.py $(REDRAW)

check-records: $(READY)  ## may these records be contributed? FOLDER=records/by-me those of a folder; CI asks the same
	$(BIN)/python -m lib.analysis.contributed $(or $(FOLDER),records predictions)

mutants: $(READY)  ## plant mistakes, one at a time: which of them does no test see? MODULE=lib/training those of a module
	$(BIN)/python scripts/mutants.py $(if $(MODULE),--module $(MODULE)) $(if $(BEFORE),--tests-of $(BEFORE))

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python3.11 study"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[test]'
	@touch $@

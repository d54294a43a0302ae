# Each command sets itself up in a virtual environment; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
BIN := $(VENV)/bin
EXTRA ?= dev

.PHONY: demo test soak lint types bench docs dist release-check install clean

# The JPEG decoders and JAX share the cores; a platform warning would be the only line on stderr.
export JAX_PLATFORMS ?= cpu

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "brelax_jax needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRA)]'
	touch $@

demo: $(VENV)/.installed  ## digits: float, BinaryConnect and BinaryRelax, binary and ternary, in a few minutes
	$(BIN)/python -m examples.demo

test: $(VENV)/.installed  ## the whole suite, doctests included
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

soak: $(VENV)/.installed  ## what is too long for the suite: every combination
	$(BIN)/python -m pytest -q -m soak

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed  ## ratios of the times of projections, updates and steps, measured in one run
	$(BIN)/python -m benchmarks.projections
	$(BIN)/python -m benchmarks.updates
	$(BIN)/python -m benchmarks.export

docs:  ## the site, into build/docs; warnings are errors, and so are links that lead nowhere
	$(MAKE) install VENV=$(DOCS_VENV) EXTRA=docs
	$(DOCS_VENV)/bin/python -m sphinx -b html -W --keep-going docs build/docs
	$(DOCS_VENV)/bin/python docs/check_links.py build/docs

dist:  ## the source distribution and the wheel, as they are published
	rm -rf dist
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine
	build/tools/bin/python -m build
	build/tools/bin/python -m twine check --strict dist/*

release-check: dist  ## each of them in an empty environment, with the README's program
	.github/check_dist.sh $(PYTHON)

clean:
	rm -rf $(VENV) $(DOCS_VENV) build dist runs .pytest_cache .ruff_cache .hypothesis

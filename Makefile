PYTHON ?= python3
VENV ?= .venv
DEMO ?= epmq-demo
WEB ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/epmq-deploy/web
SOURCES := $(shell find epmq_deploy exporters runtime cli -type f -not -path '*/__pycache__/*')

.PHONY: demo test test-newest lint docs web dev clean

# The whole chain on the bundled experts; ends with the table of accuracies.
demo: $(VENV)/.installed
	$(VENV)/bin/epmq demo -o $(DEMO) --overwrite

test: $(VENV)/.installed lint
	$(VENV)/bin/pytest -n 2 --dist loadfile

# mypy checks the installed package: run from elsewhere, or it would find the source folder, which
# lacks the subpackages that live beside it.
lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	cd $(VENV) && bin/mypy --config-file $(CURDIR)/pyproject.toml -p epmq_deploy

# The documentation site, into build/site; warnings are errors.
docs: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet -c constraints.txt '.[docs]'
	$(VENV)/bin/mkdocs build --strict

# The tests with the newest releases of everything, in a virtual environment of its own; upper bounds
# of pyproject.toml are not heeded.
test-newest:
	$(PYTHON) -m venv build/newest
	build/newest/bin/pip install --quiet --upgrade pip
	build/newest/bin/pip install --quiet '.[test]'
	build/newest/bin/pip install --quiet --upgrade torch transformers onnx onnx-ir onnxscript onnxruntime
	build/newest/bin/pytest -n 2 --dist loadfile

# What the page of `epmq export --demo` needs, from npm, pinned.
web:
	mkdir -p $(WEB)
	cp exporters/browser/web/package.json exporters/browser/web/package-lock.json $(WEB)
	npm ci --ignore-scripts --prefix $(WEB)

# An editable install, for working on the code.
dev:
	$(MAKE) $(VENV)/.installed
	$(VENV)/bin/pip install -c constraints.txt --no-deps -e .

$(VENV)/.installed: pyproject.toml constraints.txt Makefile $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	rm -rf build
	$(VENV)/bin/pip install --quiet -c constraints.txt '.[test]'
	touch $@

clean:
	rm -rf build $(VENV) $(DEMO) *.egg-info

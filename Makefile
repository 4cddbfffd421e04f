# Every target sets up .venv by itself; the second run starts at once.
#   make train   train a classifier with the base optimizer, SAM, ASAM and Fisher SAM
#   make test    run the tests, the doctests and the notebooks in smoke mode
# ARGS are passed on:      make train ARGS="--data fashion-mnist --data-dir data"
# Another interpreter:     make test PYTHON=python3.13
# Other versions:          make test CONSTRAINTS=constraints/oldest.txt VENV=.venv-oldest

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PY := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifdef CONSTRAINTS
export PIP_CONSTRAINT := $(abspath $(CONSTRAINTS))
endif

.PHONY: train test check format notebooks bench wheel-test versions clean

train: $(VENV)/train.stamp
	$(PY) benchmarks/generalization.py $(ARGS)

test: $(VENV)/dev.stamp
	$(PY) -m pytest -q -n auto --dist loadfile $(ARGS)

check: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/dev.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

notebooks: $(VENV)/dev.stamp
	$(PY) -m jupyter execute --inplace notebooks/*.ipynb

bench: $(VENV)/dev.stamp
	$(PY) benchmarks/step_time.py $(ARGS)

# The wheel, in an environment without the source tree, from another directory.
wheel-test:
	rm -rf dist $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip wheel -q --no-deps --wheel-dir dist .
	$(VENV)-wheel/bin/python -m pip install -q "$$(ls dist/*.whl)[test,train]"
	tests="$(CURDIR)/tests" python="$(CURDIR)/$(VENV)-wheel/bin/python"; \
	  cd "$$(mktemp -d)" && "$$python" -m pytest -q -n auto -W error \
	  -c /dev/null --rootdir "$$tests" --dist loadfile "$$tests"

# The oldest declared and the newest versions.
versions:
	$(MAKE) test CONSTRAINTS=constraints/oldest.txt VENV=.venv-oldest
	$(MAKE) test VENV=.venv-newest

clean:
	rm -rf .venv .venv-* dist .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV), once."
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Debian and Ubuntu keep venv in: apt install python3-venv"; \
	    exit 1; }

$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install -q -e '.[$*]'
	@touch $@

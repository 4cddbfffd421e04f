# Every target sets up .venv by itself; the second run starts at once.
#   make train   train a classifier with the base optimizer, SAM, ASAM and Fisher SAM
#   make test    run what guards the library: a case of each path, and doctests
# What takes longer:
#   make test-slow   the other cases; notebooks, benchmarks, training, kills, processes
#   make modes       the tests under jax_debug_nans, jax_enable_x64 and checking_leaks
#   make versions    the tests with the oldest, Colab's and the newest versions
#   make docs        build the site into docs/_build/html; a warning is an error
#   make linkcheck   try the links that leave the site; needs a network
#   make dist        build the sdist, and the wheel from it, into dist/
#   make wheel-test  the tests against the wheel, in an empty environment
#   make sdist-test  the tests of the unpacked sdist, in an empty environment
# ARGS are passed on:      make train ARGS="--data fashion-mnist --data-dir data"
# Another interpreter:     make test PYTHON=python3.13
# Other versions:          make test CONSTRAINTS=constraints/oldest.txt VENV=.venv-oldest

PYTHON ?= python3
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
VENV ?= .venv
ARGS ?=
PY := $(VENV)/bin/python
PYTEST := -m pytest -q -n auto --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifdef CONSTRAINTS
export PIP_CONSTRAINT := $(abspath $(CONSTRAINTS))
endif

.PHONY: train test test-slow check format notebooks bench gpu modes versions clean \
  docs linkcheck dist wheel-test sdist-test release-check

train: $(VENV)/train.stamp
	$(PY) benchmarks/generalization.py $(ARGS)

test: $(VENV)/test.stamp
	$(PY) $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/dev.stamp
	$(PY) $(PYTEST) -m slow $(ARGS)

check: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/dev.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) docs/house.py

notebooks: $(VENV)/dev.stamp
	$(PY) -m jupyter execute --inplace notebooks/*.ipynb

# What a step and a Fisher diagonal cost, on the models of the benchmarks.
bench: $(VENV)/train.stamp
	$(PY) benchmarks/fisher_cost.py $(ARGS)
	$(PY) benchmarks/step_time.py $(ARGS)

# On an accelerator, with the jax, optax and flax that PYTHON has: no network, nothing is
# installed. CIFAR-10 is looked for in data/cifar10.
gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

SPHINX := -m sphinx -W --keep-going -q -c docs
docs: $(VENV)/docs.stamp
	$(PY) $(SPHINX) -b html . docs/_build/html

linkcheck: $(VENV)/docs.stamp
	$(PY) $(SPHINX) -b linkcheck . docs/_build/linkcheck

# The tests and all their cases again, each time in another mode of jax.
modes: $(VENV)/test.stamp
	for mode in checking_leaks debug_nans x64; do \
	  $(PY) $(PYTEST) -m "not slow or long" --mode $$mode $(ARGS) || exit 1; \
	done

dist:
	rm -rf dist $(VENV)-dist
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install -q build
	$(VENV)-dist/bin/python -m build -q .

# In an environment without the source tree, from another directory: the wheel must import
# with nothing but its dependencies, and pass the tests, compiled as users do.
wheel-test: dist
	rm -rf $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install -q dist/*.whl
	cd / && "$(abspath $(VENV))-wheel/bin/python" -W error -c \
	  'import fsam_optax; assert "site-packages" in fsam_optax.__file__'
	$(VENV)-wheel/bin/python -m pip install -q "$$(ls dist/*.whl)[test]"
	tests="$(CURDIR)/tests" python="$(abspath $(VENV))-wheel/bin/python"; \
	  cd "$$(mktemp -d)" && export JAX_DISABLE_MOST_OPTIMIZATIONS=0 && \
	  "$$python" $(PYTEST) -m "not slow" -c /dev/null \
	  --rootdir "$$tests" "$$tests" $(ARGS)

sdist-test: dist
	folder="$$(mktemp -d)" && \
	  tar -xzf dist/*.tar.gz -C "$$folder" --strip-components 1 && \
	  $(MAKE) -C "$$folder" test VENV=.venv && rm -rf "$$folder"

# make release-check TAG=v0.1.0: do the tag, the version and the changelog agree?
release-check:
	$(PYTHON) tests/release.py $(TAG)

# The oldest versions that are declared on the oldest Python, the newest versions on the
# oldest and on the newest Python, and Colab's versions on its Python. Pythons are looked
# for in PATH and under ~/.pyenv: make versions PYTHONS="python3.11 python3.12"
versions:
	@find_python() { \
	  for python in "$$1" "$$HOME/.pyenv/versions/$${1#python}".*/bin/python; do \
	    "$$python" -c '' 2> /dev/null && { echo "$$python"; return; }; \
	  done; \
	}; \
	run() { \
	  python="$$(find_python "$$1")"; \
	  [ -n "$$python" ] || { echo "No $$1 here: $$2 versions are left out."; return; }; \
	  echo "$$1: $$2 versions"; \
	  $(MAKE) test PYTHON="$$python" VENV=".venv-$$1-$$2" \
	    $${3:+CONSTRAINTS=constraints/$$3}; \
	}; \
	found=; for name in $(PYTHONS); do \
	  [ -z "$$(find_python "$$name")" ] || found="$$found $$name"; \
	done; \
	set -- $$found; \
	[ $$# -gt 0 ] || { echo "None of $(PYTHONS) is here."; exit 1; }; \
	oldest="$$1"; newest="$${found##* }"; \
	run "$$oldest" oldest oldest.txt && run "$$oldest" newest && \
	run python3.13 colab colab.txt && \
	{ [ "$$oldest" = "$$newest" ] || run "$$newest" newest; }

clean:
	rm -rf .venv .venv-* dist docs/_build docs/_pictures .pytest_cache .ruff_cache

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

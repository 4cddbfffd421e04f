# Every target sets up .venv by itself; the second run starts at once.
#   make train   train a classifier with the base optimizer, SAM, ASAM and Fisher SAM
#   make test    run the tests, the doctests and the notebooks in smoke mode
# What takes longer:
#   make modes       the tests under jax_debug_nans, jax_enable_x64 and checking_leaks
#   make versions    the tests with the oldest and the newest versions, on two Pythons
#   make wheel-test  the tests against the built wheel
# ARGS are passed on:      make train ARGS="--data fashion-mnist --data-dir data"
# Another interpreter:     make test PYTHON=python3.13
# Other versions:          make test CONSTRAINTS=constraints/oldest.txt VENV=.venv-oldest

PYTHON ?= python3
PYTHONS ?= python3.11 python3.13
VENV ?= .venv
ARGS ?=
PY := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifdef CONSTRAINTS
export PIP_CONSTRAINT := $(abspath $(CONSTRAINTS))
endif

.PHONY: train test check format notebooks bench modes wheel-test versions clean

train: $(VENV)/train.stamp
	$(PY) benchmarks/generalization.py $(ARGS)

test: $(VENV)/dev.stamp
	$(PY) -m pytest -q -n auto --dist worksteal $(ARGS)

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

# Every test again, each time in another mode of jax.
modes: $(VENV)/dev.stamp
	for mode in checking_leaks debug_nans x64; do \
	  $(PY) -m pytest -q -n auto --dist worksteal --mode $$mode $(ARGS) || exit 1; \
	done

# The wheel, in an environment without the source tree, from another directory: it must
# import with nothing but its dependencies, and pass the tests, compiled as users do.
wheel-test:
	rm -rf dist $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip wheel -q --no-deps --wheel-dir dist .
	$(VENV)-wheel/bin/python -m pip install -q dist/*.whl
	cd / && "$(abspath $(VENV))-wheel/bin/python" -W error -c \
	  'import fsam_optax; assert "site-packages" in fsam_optax.__file__'
	$(VENV)-wheel/bin/python -m pip install -q "$$(ls dist/*.whl)[test,train]"
	tests="$(CURDIR)/tests" python="$(abspath $(VENV))-wheel/bin/python"; \
	  cd "$$(mktemp -d)" && export JAX_DISABLE_MOST_OPTIMIZATIONS=0 && \
	  "$$python" -m pytest -q -n auto -W error -c /dev/null \
	  --rootdir "$$tests" --dist worksteal "$$tests" $(ARGS)

# The oldest declared and the newest versions, on each Python that is found in PATH or
# under ~/.pyenv: make versions PYTHONS="python3.11 python3.12 python3.13"
versions:
	@tested=; for name in $(PYTHONS); do \
	  found=; \
	  for python in "$$name" "$$HOME/.pyenv/versions/$${name#python}".*/bin/python; do \
	    "$$python" -c '' 2> /dev/null && { found="$$python"; break; }; \
	  done; \
	  [ -n "$$found" ] || { echo "No $$name here: left out."; continue; }; \
	  echo "$$name: oldest versions"; \
	  $(MAKE) test PYTHON="$$found" VENV=".venv-$$(basename "$$name")-oldest" \
	    CONSTRAINTS=constraints/oldest.txt || exit 1; \
	  echo "$$name: newest versions"; \
	  $(MAKE) test PYTHON="$$found" VENV=".venv-$$(basename "$$name")-newest" || exit 1; \
	  tested=yes; \
	done; \
	[ -n "$$tested" ] || { echo "None of $(PYTHONS) is here."; exit 1; }

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

"""What importing the package does, and does not do."""

import collections
import json
import os
import subprocess
import sys

import pytest


# What jax and optax import themselves is theirs. Only the difference is looked at.
SCRIPT = """
import json, os, sys, threading
import jax, jax.numpy, optax
before = {
    "modules": set(sys.modules),
    "config": dict(jax.config.values),
    "environment": dict(os.environ),
    "threads": threading.active_count(),
    "path": list(sys.path),
}
import fsam_optax
after = {
    "config": dict(jax.config.values),
    "environment": dict(os.environ),
    "threads": threading.active_count(),
    "path": list(sys.path),
}
new = sorted(set(sys.modules) - before["modules"])
# Raises if a backend had been started by then.
jax.config.update("jax_num_cpu_devices", 3)
print(json.dumps({
    "new": new,
    "changed": [name for name in after if after[name] != before[name]],
    "devices": jax.device_count(),
}))
"""


def run(script):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def imported():
    out, err = run(SCRIPT)
    # Neither on one stream nor on the other: the line is that of the script.
    assert out.count("\n") == 1 and not err
    return json.loads(out)


@pytest.mark.slow
def test_importing_starts_no_backend(imported):
    assert imported["devices"] == 3


def test_importing_changes_nothing(imported):
    assert imported["changed"] == []


def test_importing_costs_few_modules(imported):
    packages = collections.Counter(name.split(".")[0] for name in imported["new"])
    # No other package: flax, orbax, chex and matplotlib are never imported.
    assert packages.keys() <= {"fsam_optax", "jax", *sys.stdlib_module_names}
    assert "fsam_optax.nnx" not in imported["new"]
    # `jax.extend.core` brings all of `jax.extend` with it.
    assert packages.total() - packages["jax"] - packages["fsam_optax"] < 20


@pytest.mark.slow
def test_nnx_is_imported_on_request():
    out, _ = run("import fsam_optax.nnx, sys; print('flax' in sys.modules)")
    assert out == "True\n"

"""Settings under which every test runs."""

import os


# Before jax starts: eight CPU devices for the tests of sharding.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest


jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Computes in float64 during one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)

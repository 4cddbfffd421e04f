"""Settings under which every test runs."""

import os


# Before jax starts: eight CPU devices for the tests of sharding.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def no_rank_promotion():
    """The library's own arithmetic never lines up shapes by chance.

    A fixture, so that the doctests beside these tests run as a user would run them.
    """
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """Computes in float64 during one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)

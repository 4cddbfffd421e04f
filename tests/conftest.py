"""Settings under which every test runs."""

import os


# Before jax starts: eight CPU devices for the tests of sharding.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax  # noqa: E402  (the flag above must be set first)


jax.config.update("jax_numpy_rank_promotion", "raise")

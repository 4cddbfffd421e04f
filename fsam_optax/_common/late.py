"""When compiled programs make what several of their parts use."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp


SMALL = 1 << 12  # bytes


def is_small(x: Any) -> bool:
    """Tells whether an array may as well be held before it is used.

    To make one wait takes ten operations, which have to be compiled.
    """
    return x.size * x.dtype.itemsize < SMALL


def all_finite(leaves: Iterable[jax.Array]) -> jax.Array:
    """Tells whether all entries of some arrays are finite.

    By a division, which compilers do not repeat. A decision by cheap operations they
    make anew wherever it is used: for each leaf, of all the leaves.
    """
    found = [jnp.all(jnp.isfinite(x)) for x in leaves]
    if not found:
        return jnp.array(True)
    return 1 / jnp.where(jnp.all(jnp.stack(found)), 1.0, jnp.inf) > 0

"""Sums of few products, which a CPU squares as it forms them, entry by entry.

A matrix product writes each entry of the gradient of an example, and it is read to be
squared: beside few multiplications that is most of the time. XLA:CPU makes one loop of
elementwise operations, which writes nothing but the sum over the examples.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


MOST_PRODUCTS = 16  # Of an entry, over all powers: each forms it anew.
FIRST_CACHE = 32 << 10  # Bytes of a CPU's smallest cache.
FEWEST_COLUMNS = 8  # That an instruction takes at a time.


def is_short(positions: int, columns: int, dtype: Any, powers: tuple[int, ...]) -> bool:
    """Tells whether a CPU should form a sum of products entry by entry.

    All rows meet the same columns, which have to stay in the first cache.
    """
    held = positions * columns * jnp.dtype(dtype).itemsize
    few = positions * len(powers) <= MOST_PRODUCTS
    return few and columns >= FEWEST_COLUMNS and held <= FIRST_CACHE


def short_product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns `sum_t a_t b_t`.

    Args:
        left: The vectors a.  # shape=(*batch, positions, rows)
        right: The vectors b.  # shape=(*batch, positions, columns)
    """
    pairs = (
        left[..., t, :, None] * right[..., t, None, :] for t in range(left.shape[-2])
    )
    return functools.reduce(lax.add, pairs)

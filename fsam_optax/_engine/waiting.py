"""Values that wait for others.

XLA:CPU makes values as soon as what they depend on is there, and holds them until they
are used: zeros to add up in from the beginning of the program on, the squares of
activations through all of the backward pass. These depend on what is used with them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from fsam_optax._common.mapped_axes import axes_of_shards, vary_like
from fsam_optax._engine.jaxpr import as_function


def on_one_device(weight: jax.Array, share: int) -> bool:
    """Tells whether all examples, which the weight has an axis of, are on one device.

    Where they are not, waiting for an entry of theirs would be an exchange.
    """
    return weight.shape[:1] in ((), (share,))


def _never(values: Sequence[jax.Array]) -> jax.Array:
    """Returns False, which is not known before an entry of each array is."""
    entries = [
        x[(0,) * x.ndim].real.astype(jnp.float32)
        for x in values
        if x.size and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    known = sum(entries, jnp.zeros(()))
    return jnp.isnan(known) & (known > 0)


def after(values: Sequence[jax.Array], x: jax.Array, alone: bool) -> jax.Array:
    """Returns an array that is not made before others are, if all are on one device."""
    return jnp.where(_never(values), jnp.zeros_like(x), x) if alone else x


def zeros_after(
    values: Sequence[jax.Array], like: Sequence[Any], alone: bool
) -> list[jax.Array]:
    """Returns zeros that are not made before arrays are, if all are on one device."""
    zero = _never(values) if alone else jnp.zeros(())
    found = []
    for v in like:
        x = jnp.full(v.shape, zero.astype(v.dtype))
        for y in values:
            x = vary_like(x, y)
        found.append(x)
    return found


def after_all_of(x: Any, known: jax.Array, fn: Callable[[Any], Any]) -> Any:
    """Returns `fn(x)`, nothing of which is made before all of x is, on one device.

    Not even the zeros that it adds up in, as the gradients of a loop over layers do: it
    is a branch, which a program enters when all that it reads is there.

    Args:
        x: A tree of arrays.
        known: A number that is not known before the program runs.
        fn: A pure function of x.
    """
    leaves, tree = jax.tree.flatten(x)
    several = any(not jax.typeof(y).sharding.mesh.empty for y in (known, *leaves))
    if not isinstance(known, Tracer) or several or axes_of_shards(leaves):
        return fn(x)
    closed, like = jax.make_jaxpr(
        lambda *leaves: fn(tree.unflatten(leaves)), return_shape=True
    )(*leaves)
    run = as_function(closed)

    def zeros(*leaves):
        del leaves
        return [jnp.zeros(v.shape, v.dtype) for v in closed.out_avals]

    def in_branch(*leaves):
        return lax.cond(_never([known]), zeros, run, *leaves)

    found = lax.platform_dependent(*leaves, cpu=in_branch, default=run)
    return jax.tree.structure(like).unflatten(found)

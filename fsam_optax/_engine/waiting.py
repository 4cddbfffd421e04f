"""Values that wait for others.

XLA:CPU makes values as soon as what they depend on is there, and holds them until they
are used: zeros to add up in from the beginning of the program on, the squares of
activations through all of the backward pass. These depend on what is used with them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from fsam_optax._common.late import is_small
from fsam_optax._common.mapped_axes import axes_of_shards, vary_like
from fsam_optax._engine.jaxpr import bind, read
from fsam_optax._engine.primitives import LOOP, name_of


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
    if not alone or is_small(x):
        return x
    return jnp.where(_never(values), jnp.zeros_like(x), x)


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


def after_point(point: Any, known: jax.Array, fn: Callable[[Any], Any]) -> Any:
    """Returns `fn(point)`; what it adds up in waits for the point, on one device.

    On a CPU its loops, which stack gradients of layers in zeros, are branches: a
    program enters one when all that it reads is there. All the rest is left outside,
    since convolutions are slow in a branch.

    Args:
        point: A tree of arrays, of parameters that are not known before.
        known: A number that is not known before the program runs.
        fn: A pure function of the point, its gradient for one.
    """
    leaves, tree = jax.tree.flatten(point)
    several = any(not jax.typeof(x).sharding.mesh.empty for x in (known, *leaves))
    if not isinstance(known, Tracer) or several or axes_of_shards(leaves):
        return fn(point)
    closed, like = jax.make_jaxpr(
        lambda *leaves: fn(tree.unflatten(leaves)), return_shape=True
    )(*leaves)

    def in_branch(eqn, *values):
        def zeros(*values):
            del values
            return [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]

        run = functools.partial(bind, eqn)
        return lax.cond(_never([known]), zeros, lambda *x: run(x), *values)

    def waiting(eqn, values):
        if name_of(eqn) != LOOP:
            return bind(eqn, values)
        return lax.platform_dependent(
            *values,
            cpu=functools.partial(in_branch, eqn),
            default=lambda *x: bind(eqn, x),
        )

    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env |= zip(jaxpr.invars, leaves, strict=True)
    for eqn in jaxpr.eqns:  # Also what only has effects, such as printing.
        values = [read(env, v) for v in eqn.invars]
        env.update(zip(eqn.outvars, waiting(eqn, values), strict=True))
    found = [jnp.asarray(read(env, v)) for v in jaxpr.outvars]
    return jax.tree.structure(like).unflatten(found)

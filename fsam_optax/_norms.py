"""Norms over pytrees, in float32 or wider, that cannot overflow on squaring."""

from collections.abc import Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from fsam_optax._mapped_axes import axes_over_which_differs, AxisName


def widen(*arrays: Any) -> jnp.dtype:
    """Returns the dtype to compute in: float32, or wider where an array is wider."""
    return jnp.result_type(jnp.float32, *arrays)


def divisor(x: jax.Array) -> jax.Array:
    """Returns `x` where one can divide by it (positive and finite), and 1 elsewhere."""
    return jnp.where((x > 0) & jnp.isfinite(x), x, jnp.ones_like(x))


def signed_power(x: jax.Array, exponent: Any) -> jax.Array:
    """Returns `sign(x) |x|^exponent`; 0 stays 0, whatever the exponent."""
    if isinstance(exponent, int | float) and exponent == 1:
        return x
    return jnp.sign(x) * jnp.abs(x) ** exponent


def _power(x: jax.Array, ord: Any) -> jax.Array:
    return x * x if isinstance(ord, int | float) and ord == 2 else x**ord


def _root(x: jax.Array, ord: Any) -> jax.Array:
    return jnp.sqrt(x) if isinstance(ord, int | float) and ord == 2 else x ** (1 / ord)


def vector_norm(
    x: jax.Array, ord: Any = 2, axis: tuple[int, ...] | None = None
) -> jax.Array:
    """Returns `(sum |x|^ord)^(1/ord)`, as a scalar or over `axis` (kept with size 1).

    The largest magnitude is divided out first, so that neither 1e30 nor 1e-30
    leaves the range of float32 when it is raised to a power.
    """
    x = x.astype(widen(x))
    keep = axis is not None
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=keep, initial=0)
    ratio = jnp.abs(x) / divisor(largest)
    return largest * _root(jnp.sum(_power(ratio, ord), axis=axis, keepdims=keep), ord)


def total(terms: Iterable[jax.Array], axis_name: AxisName = None) -> jax.Array:
    """Adds arrays of one shape, sharded ones over the devices of `axis_name` too."""
    groups: dict[tuple[Hashable, ...], list[jax.Array]] = {}
    for x in terms:
        groups.setdefault(axes_over_which_differs(x, axis_name), []).append(x)
    result = jnp.zeros([])
    for axes, members in groups.items():
        part = jnp.sum(jnp.stack(members), axis=0)
        result = result + (jax.lax.psum(part, axes) if axes else part)
    return result


def norm(
    leaves: Iterable[jax.Array], ord: Any = 2, axis_name: AxisName = None
) -> jax.Array:
    """Returns the `ord`-norm of all leaves taken as one vector (0 for no leaves).

    Args:
        leaves: Real arrays. Sharded ones are summed over the devices of `axis_name`.
        ord: A number >= 1, possibly traced.
        axis_name: Mapped axes over which leaves are sharded by hand.

    Returns:
        A scalar, float32 or wider. Not finite if an element is not.
    """
    norms = [vector_norm(x, ord) for x in leaves]
    if not norms:
        return jnp.zeros([])
    largest = jnp.max(jnp.stack(norms))
    if axes := axes_over_which_differs(largest, axis_name):
        largest = jax.lax.pmax(largest, axes)
    powers = [_power(x / divisor(largest), ord) for x in norms]
    return largest * _root(total(powers, axis_name), ord)

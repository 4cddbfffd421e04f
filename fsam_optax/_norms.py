"""Norms over pytrees, in float32 or wider, that neither overflow nor underflow."""

import functools
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


def _is(ord: Any, number: int) -> bool:
    """Tells whether a possibly traced order is known to be that number."""
    return isinstance(ord, int | float) and ord == number


def ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns `x / y` for any y > 0, and x where y is 0 or not finite.

    Compilers take the reciprocal of y, or square both before they divide, which leaves
    float32 at both ends of its range. There, a power of two moves both towards 1.
    """
    shift = jnp.where(y > 2.0**60, 2.0**-80, jnp.where(y < 2.0**-60, 2.0**80, 1.0))
    shift = jnp.where((y > 0) & jnp.isfinite(y), shift, 1.0).astype(y.dtype)
    return (x * shift) / divisor(y * shift)


def signed_power(x: jax.Array, scale: jax.Array, exponent: Any) -> jax.Array:
    """Returns `sign(x) |x / scale|^exponent`; 0 stays 0, whatever the exponent."""
    if _is(exponent, 1):
        return ratio(x, scale)
    # The sign of x itself: x / scale may underflow, and |0|^0 is 1.
    return jnp.sign(x) * jnp.abs(ratio(x, scale)) ** exponent


def _power(x: jax.Array, ord: Any) -> jax.Array:
    return x * x if _is(ord, 2) else jnp.abs(x) ** ord


def _root(x: jax.Array, ord: Any) -> jax.Array:
    return jnp.sqrt(x) if _is(ord, 2) else x ** (1 / ord)


def scaled_norm(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    """Returns the Euclidean norm over `axis`, which is kept with size 1.

    The largest magnitude is divided out before squaring.
    """
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0)
    squares = jnp.square(ratio(x, largest))
    return largest * jnp.sqrt(jnp.sum(squares, axis=axis, keepdims=True))


def total(terms: Iterable[jax.Array], axis_name: AxisName = None) -> jax.Array:
    """Adds arrays of one shape, sharded ones over the devices of `axis_name` too."""
    groups: dict[tuple[Hashable, ...], list[jax.Array]] = {}
    for x in terms:
        groups.setdefault(axes_over_which_differs(x, axis_name), []).append(x)
    parts = [
        jax.lax.psum(part, axes) if axes else part
        for axes, members in groups.items()
        for part in [jnp.sum(jnp.stack(members), axis=0)]
    ]
    return functools.reduce(jnp.add, parts)


def _in_range(powers: jax.Array) -> jax.Array:
    """Tells whether a sum of powers lost nothing to overflow or underflow."""
    info = jnp.finfo(powers.dtype)
    return (powers >= info.tiny / info.eps**2) & (powers <= info.max)


def norm(
    leaves: Iterable[jax.Array], ord: Any = 2, axis_name: AxisName = None
) -> jax.Array:
    """Returns the `ord`-norm of all leaves taken as one vector (0 for no leaves).

    One pass over the leaves and one sum over devices. Only if the sum of powers left
    the range in which it is accurate (gradients of 1e30, of 1e-30, or 0) is it taken
    again, with the largest magnitude divided out.

    Args:
        leaves: Real arrays. Sharded ones are summed over the devices of `axis_name`.
        ord: A number >= 1, possibly traced.
        axis_name: Mapped axes over which leaves are sharded by hand.

    Returns:
        A scalar, float32 or wider. Not finite if an element is not.
    """
    leaves = [x for x in leaves if x.size]
    if not leaves:
        return jnp.zeros([], widen())
    known = isinstance(ord, int | float)
    return (_compiled_norm if known else _norm)(leaves, ord, axis_name)


def _norm(leaves: list[jax.Array], ord: Any, axis_name: AxisName) -> jax.Array:
    dtype = widen(*leaves)
    leaves = [x.astype(dtype) for x in leaves]
    powers = total([jnp.sum(_power(x, ord)) for x in leaves], axis_name)

    def rescaled():
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in leaves]))
        if axes := axes_over_which_differs(largest, axis_name):
            largest = jax.lax.pmax(largest, axes)
        ratios = [ratio(x, largest) for x in leaves]
        powers = total([jnp.sum(_power(x, ord)) for x in ratios], axis_name)
        return largest * _root(powers, ord)

    return jax.lax.cond(_in_range(powers), lambda: _root(powers, ord), rescaled)


# As a unit: on its own, `lax.cond` compiles anew at every call outside of jit.
_compiled_norm = jax.jit(_norm, static_argnames=("ord", "axis_name"), inline=True)


def cosine(
    xs: list[jax.Array],
    ys: list[jax.Array],
    x_norm: jax.Array,
    y_norm: jax.Array,
    axis_name: AxisName = None,
) -> jax.Array:
    """Returns the cosine of the angle between two vectors, 0 if one is 0."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if x.size]
    if not pairs:
        return jnp.zeros([], widen())
    return _cosine(pairs, x_norm, y_norm, axis_name)


@functools.partial(jax.jit, static_argnames="axis_name", inline=True)
def _cosine(
    pairs: list[tuple[jax.Array, jax.Array]],
    x_norm: jax.Array,
    y_norm: jax.Array,
    axis_name: AxisName,
) -> jax.Array:
    dtype = widen(*jax.tree.leaves(pairs))
    pairs = [(x.astype(dtype), y.astype(dtype)) for x, y in pairs]

    def plain():
        products = [jnp.sum(x * y) for x, y in pairs]
        return total(products, axis_name) / (divisor(x_norm) * divisor(y_norm))

    def rescaled():
        products = [jnp.sum(ratio(x, x_norm) * ratio(y, y_norm)) for x, y in pairs]
        return total(products, axis_name)

    in_range = _in_range(x_norm * x_norm) & _in_range(y_norm * y_norm)
    return jax.lax.cond(in_range, plain, rescaled)

"""Norms over pytrees, in float32 or wider, that neither overflow nor underflow."""

import functools
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

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


def _unit(x: jax.Array) -> jax.Array:
    """Returns `x >= 0`, or the nearest number whose reciprocal is in range too."""
    info = jnp.finfo(x.dtype)
    return jnp.clip(x, info.tiny, 1 / info.tiny)


class Reciprocal(NamedTuple):
    """1 / x for a scalar x > 0, as two factors that are in range wherever x is."""

    first: jax.Array
    second: jax.Array

    @classmethod
    def of(cls, x: jax.Array) -> "Reciprocal":
        """Takes the reciprocal; of 0 and what is not finite it is arbitrary."""
        first = 1 / _unit(x)
        return cls(first, 1 / divisor(x * first))


def direction(x: jax.Array, length: Reciprocal, exponent: Any) -> jax.Array:
    """Returns `sign(x) |x / length|^exponent`; 0 stays 0, whatever the exponent."""
    ratio = x * length.first.astype(x.dtype) * length.second.astype(x.dtype)
    if _is(exponent, 1):
        return ratio
    # The sign of x itself: the ratio may underflow, and |0|^0 is 1.
    return jnp.sign(x) * jnp.abs(ratio) ** exponent


def _power(x: jax.Array, ord: Any) -> jax.Array:
    return x * x if _is(ord, 2) else jnp.abs(x) ** ord


def _root(x: jax.Array, ord: Any) -> jax.Array:
    return jnp.sqrt(x) if _is(ord, 2) else x ** (1 / ord)


def scaled_norm(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    """Returns the Euclidean norm over `axis`, which is kept with size 1.

    The largest magnitude is divided out before squaring.
    """
    unit = _unit(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0))
    return unit * jnp.sqrt(jnp.sum((x / unit) ** 2, axis=axis, keepdims=True))


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
    again of scaled leaves; under `jax.vmap`, always.

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
        # Not the largest magnitude where a fixed unit will do: what stands in the
        # branch takes time to compile, though it hardly ever runs.
        squares = _is(ord, 2)
        unit = _yardstick(powers) if squares else _unit(_largest(leaves, axis_name))
        scaled = _times(leaves, 1 / unit)
        return unit * _root(
            total([jnp.sum(_power(x, ord)) for x in scaled], axis_name), ord
        )

    return jax.lax.cond(_in_range(powers), lambda: _root(powers, ord), rescaled)


# As a unit: on its own, `lax.cond` compiles anew at every call outside of jit.
_compiled_norm = jax.jit(_norm, static_argnames=("ord", "axis_name"), inline=True)


def _yardstick(squares: jax.Array) -> jax.Array:
    """Returns a unit of length in which vectors of that sum of squares are in range.

    1, or a power of 2, so that scaling is exact: magnitudes move by two thirds of the
    largest exponent, down from overflow or up from underflow. Then neither the largest
    nor what matters beside it leaves the range when squared, for up to 2^42 elements
    in float32.
    """
    far = 2.0 ** (jnp.finfo(squares.dtype).maxexp * 2 // 3)
    near = jnp.where(_in_range(squares), 1.0, far)
    return jnp.where(squares < 1, 1 / near, near).astype(squares.dtype)


def _times(leaves: list[jax.Array], factor: jax.Array) -> list[jax.Array]:
    """Multiplies by a factor, so that products are taken of what comes out.

    Without the barrier, compilers may multiply the factors first, or the elements, and
    those products may leave their range. A clamp would do too, but XLA on a CPU does
    not fuse it with a sum, and sets memory aside for it.
    """
    return jax.lax.optimization_barrier([x * factor for x in leaves])


def _largest(leaves: list[jax.Array], axis_name: AxisName) -> jax.Array:
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in leaves]))
    axes = axes_over_which_differs(largest, axis_name)
    return jax.lax.pmax(largest, axes) if axes else largest


def norm_and_cosine(
    xs: list[jax.Array],
    ys: list[jax.Array],
    y_norm: jax.Array,
    axis_name: AxisName = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the Euclidean norm of xs, and the cosine of its angle with ys.

    The cosine is 0 where a vector is 0, and NaN where a norm is not finite.

    Args:
        xs: Real arrays.
        ys: Arrays of the same shapes.
        y_norm: The norm of ys.
        axis_name: As in `norm`.
    """
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if x.size]
    if not pairs:
        return jnp.zeros([], widen()), jnp.zeros([], widen())
    return _norm_and_cosine(pairs, y_norm, axis_name)


@functools.partial(jax.jit, static_argnames="axis_name", inline=True)
def _norm_and_cosine(
    pairs: list[tuple[jax.Array, jax.Array]], y_norm: jax.Array, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    dtype = widen(*jax.tree.leaves(pairs))
    pairs = [(x.astype(dtype), y.astype(dtype)) for x, y in pairs]
    y_length = y_norm.astype(dtype)
    squares = total([jnp.sum(x * x) for x, _ in pairs], axis_name)
    products = total([jnp.sum(x * y) for x, y in pairs], axis_name)

    def cosine(products, x_norm, y_norm):
        return products / (divisor(x_norm) * divisor(y_norm))

    def plain():
        x_norm = jnp.sqrt(squares)
        return x_norm, cosine(products, x_norm, y_length)

    def rescaled():
        x_unit, y_unit = _yardstick(squares), _yardstick(y_length * y_length)
        xs = _times([x for x, _ in pairs], 1 / x_unit)
        ys = _times([y for _, y in pairs], 1 / y_unit)
        x_norm = jnp.sqrt(total([jnp.sum(x * x) for x in xs], axis_name))
        terms = [jnp.sum(x * y) for x, y in zip(xs, ys, strict=True)]
        products = total(terms, axis_name)
        angle = cosine(products, x_norm, y_length / y_unit)
        x_norm = x_unit * x_norm
        finite = jnp.isfinite(x_norm) & jnp.isfinite(y_length)
        return x_norm, jnp.where(finite, angle, jnp.nan)

    in_range = _in_range(squares) & _in_range(y_length * y_length)
    return jax.lax.cond(in_range, plain, rescaled)

"""Cosines, components and distances of two vectors, each a list of arrays.

In float32 or wider, at any magnitude, as in `norms`.
"""

import functools

import jax
import jax.numpy as jnp

from fsam_optax._common.mapped_axes import AxisName
from fsam_optax._common.norms import (
    divisor,
    in_range_sums,
    root,
    total,
    totals,
    unit_of,
    widen,
)


def norm_and_cosine(
    xs: list[jax.Array],
    ys: list[jax.Array],
    y_norm: jax.Array,
    shard_axes: AxisName = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the Euclidean norm of xs, and the cosine of its angle with ys.

    The cosine is 0 where a vector is 0, and NaN where a norm is not finite.

    Args:
        xs: Real arrays.
        ys: Arrays of the same shapes.
        y_norm: The norm of ys.
        shard_axes: As in `norm`.
    """
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if x.size]
    if not pairs:
        return jnp.zeros([], widen()), jnp.zeros([], widen())
    return _norm_and_cosine(pairs, y_norm, shard_axes)


@functools.partial(jax.jit, static_argnames="shard_axes", inline=True)
def _norm_and_cosine(
    pairs: list[tuple[jax.Array, jax.Array]], y_norm: jax.Array, shard_axes: AxisName
) -> tuple[jax.Array, jax.Array]:
    dtype = widen(*jax.tree.leaves(pairs))
    pairs = [(x.astype(dtype), y.astype(dtype)) for x, y in pairs]
    y_norm = y_norm.astype(dtype)
    y_unit = unit_of(jax.lax.stop_gradient(divisor(y_norm)))

    def factor(x_unit, y_unit):
        return unit_of((1 / x_unit) * (1 / y_unit))

    # x as it is in the products: were it scaled there too, XLA on a CPU would set
    # memory aside for what both sums have in common.
    def sums(operands, units):
        (pairs, y_unit), (x_unit,) = operands, units
        squares = [jnp.sum(jnp.square(x * (1 / x_unit))) for x, _ in pairs]
        products = [jnp.sum(x * (y * factor(x_unit, y_unit))) for x, y in pairs]
        return [total(squares, shard_axes), total(products, shard_axes)]

    (squares, products), (x_unit,) = in_range_sums(
        sums, 2, False, shard_axes, (pairs, y_unit)
    )
    x_norm = x_unit * root(squares)
    cosine = products / divisor(x_norm * (y_norm * factor(x_unit, y_unit)))
    # Not so either where both are near the end of the range.
    finite = jnp.isfinite(x_norm) & jnp.isfinite(y_norm) & jnp.isfinite(products)
    return x_norm, jnp.where(finite, cosine, jnp.nan)


def component(
    xs: list[jax.Array], ys: list[jax.Array], shard_axes: AxisName = None
) -> jax.Array:
    """Returns the number c for which c ys is the component of xs along ys.

        c = <xs, ys> / <ys, ys>

    Both sums are taken in one way, so that c is exactly 1 where xs is ys. It is 0 where
    ys is 0.

    Args:
        xs: Real arrays.
        ys: Arrays of the same shapes.
        shard_axes: As in `norm`.
    """
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if x.size]
    if not pairs:
        return jnp.zeros([], widen())
    return _component(pairs, shard_axes)


@functools.partial(jax.jit, static_argnames="shard_axes", inline=True)
def _component(
    pairs: list[tuple[jax.Array, jax.Array]], shard_axes: AxisName
) -> jax.Array:
    dtype = widen(*jax.tree.leaves(pairs))
    pairs = [(x.astype(dtype), y.astype(dtype)) for x, y in pairs]

    def sums(pairs, units):
        def product(x, y):
            return jnp.sum((x * (1 / units[0])) * (y * (1 / units[0])))

        squares = [product(y, y) for _, y in pairs]
        products = [product(x, y) for x, y in pairs]
        return [total(squares, shard_axes), total(products, shard_axes)]

    (squares, products), _ = in_range_sums(sums, 2, False, shard_axes, pairs)
    return jnp.where(squares > 0, products / divisor(squares), 0)


def distances(
    xs: list[jax.Array], ys: list[jax.Array], shard_axes: AxisName = None
) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the Euclidean norm of xs - ys, and that of each array of it.

    An array whose norm is below 1e-12 beside others in range is measured roughly.

    Args:
        xs: Real arrays.
        ys: Arrays of the same shapes.
        shard_axes: As in `norm`.
    """
    if not xs:
        return jnp.zeros([], widen()), []
    return _distances(list(zip(xs, ys, strict=True)), shard_axes)


@functools.partial(jax.jit, static_argnames="shard_axes", inline=True)
def _distances(
    pairs: list[tuple[jax.Array, jax.Array]], shard_axes: AxisName
) -> tuple[jax.Array, list[jax.Array]]:
    dtype = widen(*jax.tree.leaves(pairs))

    def sums(pairs, units):
        # Subtracted here, so that no difference is held.
        unit = 1 / units[0]
        squares = [
            jnp.sum(jnp.square((x.astype(dtype) - y.astype(dtype)) * unit))
            for x, y in pairs
        ]
        squares = totals(squares, shard_axes)
        return [functools.reduce(jnp.add, squares), *squares]

    number = 1 + len(pairs)
    found, (unit,) = in_range_sums(sums, number, False, shard_axes, pairs)
    whole, *squares = found
    return unit * root(whole), [unit * root(x) for x in squares]

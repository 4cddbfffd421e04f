"""Norms over pytrees, in float32 or wider, that neither overflow nor underflow.

Nor do their derivatives: units of length are constants to them, and where a norm is 0
because the vector is, its derivative is 0.
"""

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.late import all_finite
from fsam_optax._common.mapped_axes import (
    axes_of_shards,
    axes_over_which_differs,
    AxisName,
    vary,
    vary_like,
)


Leaf = jax.Array | tuple[jax.Array, jax.Array]  # Or the factors of a product.


def widen(*arrays: Any) -> jnp.dtype:
    """Returns the dtype to compute in: float32, or wider where an array is wider."""
    with jax.numpy_dtype_promotion("standard"):  # Also where it is strict.
        # Floats of 8 bits promote to no others.
        others = [x for x in arrays if jnp.result_type(x).itemsize > 1]
        return jnp.result_type(jnp.float32, *others)


def wide_integers(x: Any) -> jax.Array:
    """Returns integers in a type that holds the number of classes, or of rows, too."""
    x = jnp.asarray(x)
    return x.astype(jnp.int32) if x.dtype.itemsize < 4 else x


def divisor(x: jax.Array) -> jax.Array:
    """Returns `x` where one can divide by it (positive and finite), and 1 elsewhere."""
    return jnp.where((x > 0) & jnp.isfinite(x), x, jnp.ones_like(x))


def _is(ord: Any, number: int) -> bool:
    """Tells whether a possibly traced order is known to be that number."""
    return isinstance(ord, int | float) and ord == number


def unit_of(x: jax.Array) -> jax.Array:
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
        # A constant. The derivative of 1 / x leaves its range long before 1 / x does;
        # that of 1 / (x first) is about -first, whatever first is.
        first = jax.lax.stop_gradient(1 / unit_of(x))
        return cls(first, 1 / divisor(x * first))


def direction(x: jax.Array, length: Reciprocal, exponent: Any) -> jax.Array:
    """Returns `sign(x) |x / length|^exponent`; 0 stays 0, whatever the exponent.

    The derivative at 0 is 0 for every exponent but 1, where the true one of an
    exponent below 1 is infinite.
    """
    ratio = x * length.first.astype(x.dtype) * length.second.astype(x.dtype)
    if _is(exponent, 1):
        return ratio
    # The sign of x itself: the ratio may underflow, and |0|^0 is 1. No power of 0,
    # which may have no derivative.
    size = jnp.maximum(jnp.abs(ratio), jnp.finfo(ratio.dtype).tiny)
    return jnp.sign(x) * size**exponent


def _power(x: jax.Array, ord: Any) -> jax.Array:
    return x * x if _is(ord, 2) else jnp.abs(x) ** ord


def root(x: jax.Array, ord: Any = 2) -> jax.Array:
    """Returns the root of `x >= 0`; its derivative at 0, which is infinite, as 0."""
    positive = x > 0
    safe = jnp.where(positive, x, jnp.ones_like(x))
    power = jnp.sqrt(safe) if _is(ord, 2) else safe ** (1 / ord)
    return jnp.where(positive, power, jax.lax.stop_gradient(x))


def scaled_norm(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    """Returns the Euclidean norm over `axis`, which is kept with size 1.

    The largest magnitude is divided out before squaring.
    """
    magnitudes = jnp.abs(jax.lax.stop_gradient(x))
    unit = unit_of(jnp.max(magnitudes, axis=axis, keepdims=True, initial=0))
    return unit * root(jnp.sum((x / unit) ** 2, axis=axis, keepdims=True))


def _by_axes(
    terms: Iterable[jax.Array], shard_axes: AxisName
) -> dict[tuple[Hashable, ...], list[jax.Array]]:
    """Groups arrays by the axes of `shard_axes` over whose devices they differ."""
    groups: dict[tuple[Hashable, ...], list[jax.Array]] = {}
    for x in terms:
        groups.setdefault(axes_over_which_differs(x, shard_axes), []).append(x)
    return groups


def total(terms: Iterable[jax.Array], shard_axes: AxisName = None) -> jax.Array:
    """Adds arrays of one shape, sharded ones over the devices of `shard_axes` too."""
    parts = [
        jax.lax.psum(part, axes) if axes else part
        for axes, members in _by_axes(terms, shard_axes).items()
        for part in [jnp.sum(jnp.stack(members), axis=0)]
    ]
    return functools.reduce(jnp.add, parts)


def totals(terms: list[jax.Array], shard_axes: AxisName) -> list[jax.Array]:
    """Returns scalars, each sharded one summed over the devices of `shard_axes`."""
    sums = {
        axes: iter(list(jax.lax.psum(jnp.stack(members), axes)) if axes else members)
        for axes, members in _by_axes(terms, shard_axes).items()
    }
    return [next(sums[axes_over_which_differs(x, shard_axes)]) for x in terms]


def _in_range(powers: jax.Array) -> jax.Array:
    """Tells whether a sum of powers lost nothing to overflow or underflow."""
    info = jnp.finfo(powers.dtype)
    return (powers >= info.tiny / info.eps**2) & (powers <= info.max)


def norm(
    leaves: Iterable[Leaf], ord: Any = 2, shard_axes: AxisName = None
) -> jax.Array:
    """Returns the `ord`-norm of all leaves taken as one vector (0 for no leaves).

    For a known order up to 2 it takes one pass over the leaves and one sum over
    devices. Only if the sum of powers left the range in which it is accurate (gradients
    of 1e30, of 1e-30, or 0) is it taken again of scaled leaves; under `jax.vmap`, if
    one of the sums did; on an accelerator always, as a choice of the host would hold it
    up. Another order takes a pass and a maximum over devices more.

    Args:
        leaves: Real arrays, or pairs of factors, whose products are not written down.
            Sharded ones are summed over the devices of `shard_axes`.
        ord: A number >= 1, possibly traced.
        shard_axes: Mapped axes over which leaves are sharded by hand.

    Returns:
        A scalar, float32 or wider. Not finite if an element is not.
    """
    leaves = [x for x in leaves if _factors(x)[0].size]
    if not leaves:
        return jnp.zeros([], widen())
    (value,) = _any_norm(leaves, ord, shard_axes, False)
    return value


def norms(
    leaves: Iterable[Leaf], ord: Any = 2, shard_axes: AxisName = None
) -> tuple[list[jax.Array], jax.Array]:
    """Returns the `ord`-norm of each leaf, at the price of `norm`.

    Returns:
        Scalars (for each entry of a vector, compilers make a program), and whether all
        are finite.
    """
    leaves = list(leaves)
    values = _any_norm(leaves, ord, shard_axes, True) if leaves else []
    return values, all_finite(values)


def _any_norm(
    leaves: list[Leaf], ord: Any, shard_axes: AxisName, apart: bool
) -> list[jax.Array]:
    known = isinstance(ord, int | float)
    return (_compiled_norm if known else _norm)(leaves, ord, shard_axes, apart)


def _factors(leaf: Leaf) -> tuple[jax.Array, ...]:
    return leaf if isinstance(leaf, tuple) else (leaf,)


def _scaled(factors: tuple[jax.Array, ...], unit: jax.Array) -> jax.Array:
    """Returns a product divided by a unit.

    Each of two factors is divided by the root, and neither leaves its range, but one
    above 2^85, in float32, where the norm is below 2^-40. A product of what does not
    change in the loop, compilers take out of it and write down.
    """
    if len(factors) == 1:
        return factors[0] * (1 / unit)
    part = 1 / jnp.sqrt(unit)
    first, second = factors
    return (first * part) * (second * part)


def _norm(
    leaves: list[Leaf], ord: Any, shard_axes: AxisName, apart: bool
) -> list[jax.Array]:
    """Returns the norm of all leaves, or of each."""
    dtype = widen(*jax.tree.leaves(leaves))
    products = [tuple(x.astype(dtype) for x in _factors(leaf)) for leaf in leaves]

    def powers(leaves, units):
        each = units if apart else units * len(leaves)
        scaled = map(_scaled, leaves, each)
        terms = [jnp.sum(_power(x, ord)) for x in scaled]
        return totals(terms, shard_axes) if apart else [total(terms, shard_axes)]

    if isinstance(ord, int | float) and ord <= 2:
        number = len(leaves) if apart else 1
        found, units = in_range_sums(powers, number, apart, shard_axes, products)
    else:
        # Higher powers may leave their range in any unit but this.
        formed = [_scaled(x, jnp.ones([], dtype)) for x in products]
        units = largest(formed, shard_axes)
        units = [unit_of(x) for x in (units if apart else [jnp.max(units)])]
        found = powers([(x,) for x in _opaque(formed)], units)
    return [u * root(x, ord) for u, x in zip(units, found, strict=True)]


# As a unit: on its own, a loop compiles anew at every call outside of jit.
_compiled_norm = jax.jit(
    _norm, static_argnames=("ord", "shard_axes", "apart"), inline=True
)


def _opaque(leaves: Any) -> Any:
    """Returns the leaves such that compilers do not look through them.

    Where these know what the leaves are (one number, for instance) they may multiply
    it by itself before it meets the unit, and that product may leave its range.
    """
    flat, structure = jax.tree.flatten(leaves)
    # What comes out of one barrier is typed as varying over the axes of all in it.
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(flat):
        groups.setdefault(axes_of_shards(x), []).append(i)
    for places in groups.values():
        opaque = jax.lax.optimization_barrier([flat[i] for i in places])
        for i, x in zip(places, opaque, strict=True):
            flat[i] = x
    return structure.unflatten(flat)


def _yardstick(squares: jax.Array) -> jax.Array:
    """Returns a unit of length in which vectors of that sum of squares are in range.

    Of a sum of lower powers too, from the first on.

    1, or an even power of 2, so that scaling is exact, by its root too: magnitudes move
    by two thirds of the largest exponent, down from overflow or up from underflow. Then
    neither the largest nor what matters beside it leaves the range when squared, for up
    to 2^42 elements in float32.
    """
    far = 2.0 ** (-(-jnp.finfo(squares.dtype).maxexp // 3) * 2)
    near = jnp.where(_in_range(squares), 1.0, far)
    return jnp.where(squares < 1, 1 / near, near).astype(squares.dtype)


Sums = Callable[[Any, list[jax.Array]], list[jax.Array]]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def in_range_sums(
    sums: Sums, number: int, apart: bool, shard_axes: AxisName, leaves: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns `sums(leaves, units)` and the units of length: 1 if all are in range.

    Args:
        sums: Sums over leaves divided by units, of their squares or of lower powers.
        number: How many sums there are.
        apart: Whether each has a unit of its own, instead of that of the first.
        shard_axes: The axes that the sums are taken over.
        leaves: Arrays; the sums are in float32 or the widest of their dtypes.
    """
    one = jnp.ones([], widen(*jax.tree.leaves(leaves)))
    one = vary(one, axes_of_shards(leaves, shard_axes))
    scaled = number if apart else 1  # How many of the sums have a unit.
    sums = jax.jit(sums)  # Traced once.

    def rounds(leaves):
        """Takes them once, and once more if one left the range.

        By a loop: a branch instead of the second round would hold the sums twice, which
        takes as long to compile though it hardly ever runs.
        """

        def unfinished(state):
            count, _, found = state
            right = [_in_range(x) for x in found[:scaled]]
            right = right[0] if scaled == 1 else jnp.all(jnp.stack(right))
            return (count == 0) | ((count == 1) & ~right)

        def evaluate(state):
            count, _, found = state
            units = [_yardstick(x) for x in found[:scaled]]
            return count + 1, units, sums(leaves, units)

        start = jnp.zeros([], jnp.int32), [one] * scaled, [one] * number
        _, units, found = jax.lax.while_loop(unfinished, evaluate, start)
        return found, units

    def twice(leaves):
        """Takes them twice: to leave it out, an accelerator would ask the host."""
        units = [_yardstick(x) for x in sums(leaves, [one] * scaled)[:scaled]]
        return sums(leaves, units), units

    return jax.lax.platform_dependent(_opaque(leaves), cpu=rounds, default=twice)


@functools.partial(in_range_sums.defjvp, symbolic_zeros=True)
def _in_range_sums_jvp(sums, number, apart, shard_axes, primals, tangents):
    def change_of(x, dx):
        # Zeros that jax 0.7 makes by itself are not typed as varying where x is.
        zero = isinstance(dx, jax.custom_derivatives.SymbolicZero)
        return vary_like(jnp.zeros_like(x), x) if zero else dx

    found, units = in_range_sums(sums, number, apart, shard_axes, *primals)
    tangents = jax.tree.map(change_of, primals, tangents)
    _, change = jax.jvp(lambda leaves: sums(leaves, units), primals, tangents)
    return (found, units), (change, [jnp.zeros_like(u) for u in units])


def largest(leaves: list[jax.Array], shard_axes: AxisName) -> jax.Array:
    """Returns the largest magnitude of each leaf, a constant, in one vector."""
    each = [jnp.abs(jax.lax.stop_gradient(x)) for x in leaves]
    stacked = jnp.stack(
        [jnp.max(x) if x.size else jnp.zeros([], x.dtype) for x in each]
    )
    axes = axes_over_which_differs(stacked, shard_axes)
    return jax.lax.pmax(stacked, axes) if axes else stacked


def with_derivative(
    values: list[jax.Array], leaves: list[jax.Array], ord: Any, shard_axes: AxisName
) -> list[jax.Array]:
    """Returns norms that are known already with their derivatives by the leaves.

        d||x|| = <d, dx>,    d = sign(x) (|x| / ||x||)^(ord - 1)

    For leaves that are made safe only when the norm is known: it is not taken again.
    Where they are 0, d is.

    Args:
        values: The norm of all leaves, or for each its own.
        leaves: Real arrays.
        ord: As in `norm`.
        shard_axes: As in `norm`.
    """
    known = ord if isinstance(ord, int | float) else None  # No tracer in the rules.
    apart = len(values) > 1

    @jax.custom_jvp
    def norm(values, leaves, traced):
        del leaves, traced
        return values

    def is_zero(dx):
        return isinstance(dx, jax.custom_derivatives.SymbolicZero)

    @functools.partial(norm.defjvp, symbolic_zeros=True)
    def norm_jvp(primals, tangents):
        _, leaves, traced = primals
        _, changes, traced_change = tangents
        q = traced if known is None else known
        values = norm(*primals)

        def change(x, dx, length):
            terms = jnp.zeros([], length.dtype)
            x = x.astype(length.dtype)
            if not is_zero(dx):
                d = direction(x, Reciprocal.of(length), q - 1)
                terms += jnp.sum(d * dx.astype(length.dtype))
            if not (known or is_zero(traced_change)):
                size = jnp.abs(direction(x, Reciprocal.of(length), 1))
                size = jnp.where(size > 0, size, 1)
                entropy = jnp.sum(size**q * jnp.log(size))
                terms += length / q * entropy * traced_change
            return vary_like(terms, x)

        lengths = values if apart else values * len(leaves)
        terms = [change(*each) for each in zip(leaves, changes, lengths, strict=True)]
        changed = totals(terms, shard_axes) if apart else [total(terms, shard_axes)]
        return values, [vary_like(x, y) for x, y in zip(changed, values, strict=True)]

    return norm(values, leaves, None if known else ord) if leaves else values

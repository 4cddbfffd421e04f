"""Norms over pytrees, in float32 or wider, that neither overflow nor underflow.

Nor do their derivatives: units of length are constants to them, and where a norm is 0
because the vector is, its derivative is 0.
"""

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.mapped_axes import (
    axes_of_shards,
    axes_over_which_differs,
    AxisName,
    vary,
    vary_like,
)


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
        # A constant. The derivative of 1 / x leaves its range long before 1 / x does;
        # that of 1 / (x first) is about -first, whatever first is.
        first = jax.lax.stop_gradient(1 / _unit(x))
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
    unit = _unit(jnp.max(magnitudes, axis=axis, keepdims=True, initial=0))
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


def _totals(terms: list[jax.Array], shard_axes: AxisName) -> list[jax.Array]:
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
    leaves: Iterable[jax.Array], ord: Any = 2, shard_axes: AxisName = None
) -> jax.Array:
    """Returns the `ord`-norm of all leaves taken as one vector (0 for no leaves).

    For a known order up to 2 it takes one pass over the leaves and one sum over
    devices. Only if the sum of powers left the range in which it is accurate (gradients
    of 1e30, of 1e-30, or 0) is it taken again of scaled leaves; under `jax.vmap`, if
    one of the sums did. Another order takes a pass and a maximum over devices more.

    Args:
        leaves: Real arrays. Sharded ones are summed over the devices of `shard_axes`.
        ord: A number >= 1, possibly traced.
        shard_axes: Mapped axes over which leaves are sharded by hand.

    Returns:
        A scalar, float32 or wider. Not finite if an element is not.
    """
    leaves = [x for x in leaves if x.size]
    if not leaves:
        return jnp.zeros([], widen())
    (value,), _ = _any_norm(leaves, ord, shard_axes, False)
    return value


def norms(
    leaves: Iterable[jax.Array], ord: Any = 2, shard_axes: AxisName = None
) -> tuple[list[jax.Array], jax.Array]:
    """Returns the `ord`-norm of each leaf, at the price of `norm`.

    Returns:
        Scalars (for each entry of a vector, compilers make a program), and whether all
        are finite (asked of them, compilers ask again wherever the answer is used).
    """
    leaves = list(leaves)
    if not leaves:
        return [], jnp.array(True)
    values, found = _any_norm(leaves, ord, shard_axes, True)
    return values, jnp.isfinite(found)


def _any_norm(
    leaves: list[jax.Array], ord: Any, shard_axes: AxisName, apart: bool
) -> tuple[list[jax.Array], jax.Array]:
    known = isinstance(ord, int | float)
    return (_compiled_norm if known else _norm)(leaves, ord, shard_axes, apart)


def _norm(
    leaves: list[jax.Array], ord: Any, shard_axes: AxisName, apart: bool
) -> tuple[list[jax.Array], jax.Array]:
    """Returns norms, of all leaves or of each; and a number, finite if they are."""
    dtype = widen(*leaves)
    leaves = [x.astype(dtype) for x in leaves]
    number = len(leaves) if apart else 1

    def powers(leaves, units):
        each = units if apart else units * len(leaves)
        terms = [
            jnp.sum(_power(x * (1 / u), ord)) for x, u in zip(leaves, each, strict=True)
        ]
        if not apart:
            return [total(terms, shard_axes)]
        terms = _totals(terms, shard_axes)
        return [*terms, jnp.sum(jnp.stack(terms) / (2 * number))]

    if isinstance(ord, int | float) and ord <= 2:
        more = int(apart)
        found, units = _in_range_sums(powers, number, more, shard_axes, leaves)
    else:
        # Higher powers may leave their range in any unit but this.
        largest = _largest(jax.lax.stop_gradient(leaves), shard_axes, apart)
        units = [_unit(x) for x in largest]
        found = powers(_opaque(leaves), units)
    pairs = zip(units, found[:number], strict=True)
    return [u * root(x, ord) for u, x in pairs], found[-1]


# As a unit: on its own, a loop compiles anew at every call outside of jit.
_compiled_norm = jax.jit(
    _norm, static_argnames=("ord", "shard_axes", "apart"), inline=True
)


def _opaque(leaves: Any) -> Any:
    """Returns the leaves such that compilers do not look through them.

    Where these know what the leaves are (one number, for instance) they may multiply
    it by itself before it meets the unit, and that product may leave its range.
    """
    # One barrier each: what comes out of one is typed as varying over the axes of all.
    return jax.tree.map(jax.lax.optimization_barrier, leaves)


def _yardstick(squares: jax.Array) -> jax.Array:
    """Returns a unit of length in which vectors of that sum of squares are in range.

    Of a sum of lower powers too, from the first on.

    1, or a power of 2, so that scaling is exact: magnitudes move by two thirds of the
    largest exponent, down from overflow or up from underflow. Then neither the largest
    nor what matters beside it leaves the range when squared, for up to 2^42 elements
    in float32.
    """
    far = 2.0 ** (jnp.finfo(squares.dtype).maxexp * 2 // 3)
    near = jnp.where(_in_range(squares), 1.0, far)
    return jnp.where(squares < 1, 1 / near, near).astype(squares.dtype)


Sums = Callable[[Any, list[jax.Array]], list[jax.Array]]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _in_range_sums(
    sums: Sums, number: int, more: int, shard_axes: AxisName, leaves: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns `sums(leaves, units)` and the units of length: 1 if all are in range.

    A loop of one round, or two. A branch instead of the second round would hold the
    sums once more, which takes as long to compile though it hardly ever runs.

    Args:
        sums: Sums over leaves divided by units, the first ones of their squares or of
            lower powers.
        number: How many of these, each with a unit of its own.
        more: How many sums there are beside.
        shard_axes: The axes that the sums are taken over.
        leaves: Arrays of one dtype.
    """
    dtype = jax.tree.leaves(leaves)[0].dtype
    one = vary(jnp.ones([], dtype), axes_of_shards(leaves, shard_axes))
    start = jnp.zeros([], jnp.int32), [one] * number, [one] * (number + more)
    leaves = _opaque(leaves)

    def unfinished(state):
        rounds, _, found = state
        right = [_in_range(x) for x in found[:number]]
        right = right[0] if number == 1 else jnp.all(jnp.stack(right))
        return (rounds == 0) | ((rounds == 1) & ~right)

    def evaluate(state):
        rounds, _, found = state
        units = [_yardstick(x) for x in found[:number]]
        return rounds + 1, units, sums(leaves, units)

    _, units, found = jax.lax.while_loop(unfinished, evaluate, start)
    return found, units


@functools.partial(_in_range_sums.defjvp, symbolic_zeros=True)
def _in_range_sums_jvp(sums, number, more, shard_axes, primals, tangents):
    def change_of(x, dx):
        # Zeros that jax 0.7 makes by itself are not typed as varying where x is.
        zero = isinstance(dx, jax.custom_derivatives.SymbolicZero)
        return vary_like(jnp.zeros_like(x), x) if zero else dx

    found, units = _in_range_sums(sums, number, more, shard_axes, *primals)
    tangents = jax.tree.map(change_of, primals, tangents)
    _, change = jax.jvp(lambda leaves: sums(leaves, units), primals, tangents)
    return (found, units), (change, [jnp.zeros_like(u) for u in units])


def _largest(
    leaves: list[jax.Array], shard_axes: AxisName, apart: bool
) -> list[jax.Array]:
    """Returns the largest magnitude of all leaves, or with `apart` of each."""
    each = [jnp.max(jnp.abs(x), initial=0) for x in leaves]
    stacked = jnp.stack(each)
    axes = axes_over_which_differs(stacked, shard_axes)
    if not apart:
        largest = jnp.max(stacked)
        return [jax.lax.pmax(largest, axes) if axes else largest]
    return list(jax.lax.pmax(stacked, axes)) if axes else each


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
    known = isinstance(ord, int | float)
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
        q = ord if known else traced
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
        changed = _totals(terms, shard_axes) if apart else [total(terms, shard_axes)]
        return values, [vary_like(x, y) for x, y in zip(changed, values, strict=True)]

    return norm(values, leaves, None if known else ord) if leaves else values


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
    y_unit = _unit(jax.lax.stop_gradient(divisor(y_norm)))

    def factor(x_unit, y_unit):
        return _unit((1 / x_unit) * (1 / y_unit))

    # x as it is in the products: were it scaled there too, XLA on a CPU would set
    # memory aside for what both sums have in common.
    def sums(operands, units):
        (pairs, y_unit), (x_unit,) = operands, units
        squares = [jnp.sum(_power(x * (1 / x_unit), 2)) for x, _ in pairs]
        products = [jnp.sum(x * (y * factor(x_unit, y_unit))) for x, y in pairs]
        return [total(squares, shard_axes), total(products, shard_axes)]

    (squares, products), (x_unit,) = _in_range_sums(
        sums, 1, 1, shard_axes, (pairs, y_unit)
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

    (squares, products), _ = _in_range_sums(sums, 1, 1, shard_axes, pairs)
    return jnp.where(squares > 0, products / divisor(squares), 0)

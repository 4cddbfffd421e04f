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


def _totals(terms: list[jax.Array], shard_axes: AxisName) -> jax.Array:
    """Stacks scalars, each sharded one summed over the devices of `shard_axes`."""
    sums = {
        axes: iter(list(jax.lax.psum(jnp.stack(members), axes) if axes else members))
        for axes, members in _by_axes(terms, shard_axes).items()
    }
    return jnp.stack(
        [next(sums[axes_over_which_differs(x, shard_axes)]) for x in terms]
    )


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
    return _any_norm([x for x in leaves if x.size], ord, shard_axes, False)


def norms(
    leaves: Iterable[jax.Array], ord: Any = 2, shard_axes: AxisName = None
) -> jax.Array:
    """Returns the `ord`-norm of each leaf, shape (leaves,), at the price of `norm`."""
    return _any_norm(list(leaves), ord, shard_axes, True)


def _any_norm(
    leaves: list[jax.Array], ord: Any, shard_axes: AxisName, apart: bool
) -> jax.Array:
    if not leaves:
        return jnp.zeros([0] if apart else [], widen())
    known = isinstance(ord, int | float)
    return (_compiled_norm if known else _norm)(leaves, ord, shard_axes, apart)


def _norm(
    leaves: list[jax.Array], ord: Any, shard_axes: AxisName, apart: bool
) -> jax.Array:
    """Returns one norm, or with `apart` the vector of the norms of the leaves."""
    dtype = widen(*leaves)
    leaves = [x.astype(dtype) for x in leaves]

    def powers(leaves, unit):
        units = list(unit) if apart else [unit] * len(leaves)
        terms = [
            jnp.sum(_power(x * (1 / u), ord))
            for x, u in zip(leaves, units, strict=True)
        ]
        return [(_totals if apart else total)(terms, shard_axes)]

    if isinstance(ord, int | float) and ord <= 2:
        shape = (len(leaves),) if apart else ()
        (found,), unit = _in_range_sums(powers, (shape,), shard_axes, leaves)
    else:
        # Higher powers may leave their range in any unit but this.
        unit = _unit(_largest(jax.lax.stop_gradient(leaves), shard_axes, apart))
        (found,) = powers(_opaque(leaves), unit)
    return unit * root(found, ord)


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


Sums = Callable[[Any, jax.Array], list[jax.Array]]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _in_range_sums(
    sums: Sums, shapes: tuple[tuple[int, ...], ...], shard_axes: AxisName, leaves: Any
) -> tuple[list[jax.Array], jax.Array]:
    """Returns `sums(leaves, unit)` and the units of length: 1 if the first is in range.

    A loop of one round, or two. A branch instead of the second round would hold the
    sums once more, which takes as long to compile though it hardly ever runs.

    Args:
        sums: Sums over leaves divided by the unit, the first one of their squares or
            of lower powers. It may be an array of several, each with its own unit.
        shapes: The shape of each sum.
        shard_axes: The axes that the sums are taken over.
        leaves: Arrays of one dtype.
    """
    dtype = jax.tree.leaves(leaves)[0].dtype
    axes = axes_of_shards(leaves, shard_axes)
    ones = [vary(jnp.ones(shape, dtype), axes) for shape in shapes]
    start = jnp.zeros([], jnp.int32), ones[0], ones
    leaves = _opaque(leaves)

    def unfinished(state):
        rounds, _, (first, *_) = state
        return (rounds == 0) | ((rounds == 1) & ~jnp.all(_in_range(first)))

    def evaluate(state):
        rounds, _, (first, *_) = state
        unit = _yardstick(first)
        return rounds + 1, unit, sums(leaves, unit)

    _, unit, found = jax.lax.while_loop(unfinished, evaluate, start)
    return found, unit


@functools.partial(_in_range_sums.defjvp, symbolic_zeros=True)
def _in_range_sums_jvp(sums, shapes, shard_axes, primals, tangents):
    def change_of(x, dx):
        # Zeros that jax 0.7 makes by itself are not typed as varying where x is.
        zero = isinstance(dx, jax.custom_derivatives.SymbolicZero)
        return vary_like(jnp.zeros_like(x), x) if zero else dx

    found, unit = _in_range_sums(sums, shapes, shard_axes, *primals)
    tangents = jax.tree.map(change_of, primals, tangents)
    _, change = jax.jvp(lambda leaves: sums(leaves, unit), primals, tangents)
    return (found, unit), (change, jnp.zeros_like(unit))


def _largest(leaves: list[jax.Array], shard_axes: AxisName, apart: bool) -> jax.Array:
    largest = jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in leaves])
    largest = largest if apart else jnp.max(largest)
    axes = axes_over_which_differs(largest, shard_axes)
    return jax.lax.pmax(largest, axes) if axes else largest


def with_derivative(
    value: jax.Array, leaves: list[jax.Array], ord: Any, shard_axes: AxisName
) -> jax.Array:
    """Returns a norm that is known already with its derivative by the leaves.

        d||x|| = <d, dx>,    d = sign(x) (|x| / ||x||)^(ord - 1)

    For leaves that are made safe only when the norm is known: it is not taken again.
    Where they are 0, d is.

    Args:
        value: What `norm(leaves)` or, one for each leaf, `norms(leaves)` returned.
        leaves: Real arrays.
        ord: As in `norm`.
        shard_axes: As in `norm`.
    """
    known = isinstance(ord, int | float)

    @jax.custom_jvp
    def norm(value, leaves, traced):
        del leaves, traced
        return value

    def is_zero(dx):
        return isinstance(dx, jax.custom_derivatives.SymbolicZero)

    @functools.partial(norm.defjvp, symbolic_zeros=True)
    def norm_jvp(primals, tangents):
        _, leaves, traced = primals
        _, changes, traced_change = tangents
        q = ord if known else traced
        value = norm(*primals)
        apart = value.ndim == 1
        lengths = list(value) if apart else [value] * len(leaves)

        def change(x, dx, length):
            terms = jnp.zeros([], value.dtype)
            x = x.astype(value.dtype)
            if not is_zero(dx):
                d = direction(x, Reciprocal.of(length), q - 1)
                terms += jnp.sum(d * dx.astype(value.dtype))
            if not (known or is_zero(traced_change)):
                size = jnp.abs(direction(x, Reciprocal.of(length), 1))
                size = jnp.where(size > 0, size, 1)
                entropy = jnp.sum(size**q * jnp.log(size))
                terms += length / q * entropy * traced_change
            return vary_like(terms, x)

        terms = [change(*each) for each in zip(leaves, changes, lengths, strict=True)]
        changed = (_totals if apart else total)(terms, shard_axes)
        return value, vary_like(changed, value)

    return norm(value, leaves, None if known else ord) if leaves else value


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
    def sums(operands, x_unit):
        pairs, y_unit = operands
        squares = [jnp.sum(_power(x * (1 / x_unit), 2)) for x, _ in pairs]
        products = [jnp.sum(x * (y * factor(x_unit, y_unit))) for x, y in pairs]
        return [total(squares, shard_axes), total(products, shard_axes)]

    (squares, products), x_unit = _in_range_sums(
        sums, ((), ()), shard_axes, (pairs, y_unit)
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

    def sums(pairs, unit):
        def product(x, y):
            return jnp.sum((x * (1 / unit)) * (y * (1 / unit)))

        squares = [product(y, y) for _, y in pairs]
        products = [product(x, y) for x, y in pairs]
        return [total(squares, shard_axes), total(products, shard_axes)]

    (squares, products), _ = _in_range_sums(sums, ((), ()), shard_axes, pairs)
    return jnp.where(squares > 0, products / divisor(squares), 0)

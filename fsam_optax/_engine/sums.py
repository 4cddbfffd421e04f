"""Sums over examples of powers of what one example contributes.

The functions returned here are called as `reduce(has, weight, *operands)`. Operands
carry in front the axes that the library maps over: examples, then cotangents. `has`
tells for each operand which of these it carries; the weight carries them all.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fsam_optax._common.norms import widen
from fsam_optax._engine.waiting import after, on_one_device, zeros_after


CACHE = 16 << 20  # Of a CPU.


def apart(
    fn: Callable, share: int, axes: Sequence[int | None], operands: Sequence[Any]
) -> Any:
    """Returns what `fn` returns for the examples of each device, stacked.

    These are neighbours, on devices that hold no others. So what is made of them stays
    there, until the devices are added up.

    Args:
        fn: Maps the operands, with some of the examples, to arrays.
        share: How many examples each device has.
        axes: 0 for the operands that have an axis of examples in front, else None.
        operands: The operands, which may be pytrees.
    """
    mapped = [x for axis, x in zip(axes, operands, strict=True) if axis is not None]
    if all(len(x) == share for x in jax.tree.leaves(mapped)):
        return jax.tree.map(lambda x: x[None], fn(*operands))

    def cut(x):
        return x.reshape(len(x) // share, share, *x.shape[1:])

    operands = [
        x if axis is None else jax.tree.map(cut, x)
        for axis, x in zip(axes, operands, strict=True)
    ]
    return jax.vmap(fn, axes)(*operands)


def added_up(tree: Any) -> Any:
    """Returns the sums of arrays over their leading axis."""
    return jax.tree.map(lambda x: jnp.sum(x, 0), tree)


def by_device(reduce: Callable, share: int) -> Callable:
    """Returns a rule of several sums that adds them up before it adds up devices.

    Each of the sums would be exchanged by itself: a compiler may not know that they are
    terms of one.
    """

    def by_share(has, weight, *operands):
        if weight.ndim == 0 or len(weight) % share:
            return reduce(has, weight, *operands)
        axes = [0, *(0 if h[0] else None for h in has[1:])]
        one = functools.partial(reduce, has)
        return added_up(apart(one, share, axes, (weight, *operands)))

    return by_share


def power(x: jax.Array, p: int) -> jax.Array:
    """Returns x**p for p = 1, 2 or 4."""
    return x if p == 1 else power(lax.mul(x, x), p // 2)


def scaled(y: jax.Array, x: Any, p: int) -> jax.Array:
    """Returns `y x^p`, which is in range where it and y are, though `x^p` is not."""
    return y if p == 0 else scaled(y * x, x, p - 1)


class Steps(NamedTuple):
    """How many examples a loop over them takes at a time.

    Attributes:
        held: Bytes that one example and cotangent holds.
        budget: Bytes that a step may hold on each device.
        share: How many examples each device has. A step takes as many of them on each,
            so that none has to leave its device.
        apart: Whether XLA:CPU should take one example and cotangent at a time, whatever
            the budget: it runs batches of matrix products an order slower than one
            product.
    """

    held: int
    budget: int
    share: int
    apart: bool = False

    def rows(self, length: int, cotangents: int) -> dict[str, int]:
        """Returns the examples of so many in a step, by platform; 0 for `apart`."""
        most = max(1, self.budget // (self.held * cotangents or 1))
        # As few steps as the budget allows, as equal as can be.
        number = -(-length // -(-length // most)) if length else 1
        apart = self.apart and length * cotangents > 1
        return {"default": number} | ({"cpu": 0} if apart else {})

    def together(self, sums: int, length: int) -> int:
        """Returns how many of the examples a CPU forms, one by one, then adds up.

        More than one for several sums, which take longer to read and write than
        products to form, if it is within the caches but not within the first ones.
        Not all: without a loop, other products would be formed in the meantime.
        """
        if sums == 1 or self.held < CACHE // 32:
            return 1
        return max(1, min(4, CACHE // self.held, length // 2))


def looped(
    fn: Callable,
    out: Sequence[Any],
    powers: tuple[int, ...],
    steps: Steps | None,
    short: Callable | None = None,
) -> Callable:
    """Returns the sums of powers of `fn(*operands)`, a few examples at a time.

    Args:
        fn: Maps the operands of one example to a list of arrays.
        out: The shapes and dtypes of these arrays.
        powers: The powers.
        steps: How many examples at a time; None for all at once.
        short: What a CPU evaluates in the place of `fn`; see `short_product`.
    """

    def reduce(has, weight, *operands):
        _, *has = has
        live = [any(b) for b in zip(*has, strict=True)]
        # Nothing differs along the other axes: their weights add up.
        if same := [j for j, b in enumerate(live) if not b]:
            weight = lax.reduce_sum(weight, same)
        has = [[b for b, alive in zip(h, live, strict=True) if alive] for h in has]
        by_axis = [[0 if b else None for b in axis] for axis in zip(*has, strict=True)]

        def sums(weight, *operands, fn=fn):
            each = fn
            for axes in by_axis[len(by_axis) - weight.ndim :][::-1]:
                each = jax.vmap(each, axes)
            rows = tuple(range(weight.ndim))
            found = zip(out, each(*operands), strict=True)
            return [
                [lax.reduce_sum(_weighted(weight, power(x, p)), rows) for p in powers]
                for x in (x.astype(widen(v.dtype)) for v, x in found)
            ]

        def added(before, weight, *operands, fn=fn):
            return jax.tree.map(jnp.add, before, sums(weight, *operands, fn=fn))

        def added_apart(before, weight, *operands):
            if weight.ndim == 0:
                return added(before, weight, *operands)
            axes = (0, *by_axis[len(by_axis) - weight.ndim])
            if weight.ndim == 1 and short is not None and alone:
                add = functools.partial(added, fn=short)
                return _one_ahead(add, before, axes, (weight, *operands))

            def next_one(i, before):
                return added_apart(before, *rows_at(axes, (weight, *operands), i))

            several, length = 1, len(weight)
            if weight.ndim == 1 and steps:
                several = steps.together(len(powers), length)
            return lax.fori_loop(0, length, next_one, before, unroll=several)

        if weight.ndim == 0:
            return sums(weight, *operands)
        n, *inner = weight.shape
        axes = (0, *by_axis[0])
        # The gcd, as it is traced without the axis of the examples too.
        length = math.gcd(n, steps.share) if steps and live[0] else n
        rows = steps.rows(length, math.prod(inner)) if steps else {"default": length}
        # Elsewhere what is summed over may be on several devices.
        alone = length == n

        def of_share(number, before, *operands):
            if number == 0:
                return added_apart(before, *operands)

            def step(i, before):
                # A batch of one is slower than one example, on XLA:CPU by far.
                count = None if number == 1 else number
                return added(before, *rows_at(axes, operands, i * number, count))

            many, rest = divmod(length, number)
            found = lax.fori_loop(0, many, step, before)
            if not rest:
                return found
            return added(found, *rows_at(axes, operands, many * number, rest))

        def in_steps(number, *operands):
            if number == length:
                return sums(*operands)
            zeros = [jax.ShapeDtypeStruct(v.shape, widen(v.dtype)) for v in out]
            zeros = zeros_after(operands, zeros, alone)
            zeros = [[z] * len(powers) for z in zeros]
            one = functools.partial(of_share, number, zeros)
            # Devices are added up after the loop.
            return added_up(apart(one, length, axes, operands))

        branches = {
            k: functools.partial(in_steps, number) for k, number in rows.items()
        }
        if len(branches) == 1:
            return branches["default"](weight, *operands)
        return lax.platform_dependent(weight, *operands, **branches)

    return reduce


def rows_at(axes, operands, start, count=None):
    """Returns rows of the operands that are mapped; without their axis if one."""

    def rows(x):
        if count is None:
            return lax.dynamic_index_in_dim(x, start, keepdims=False)
        return lax.dynamic_slice_in_dim(x, start, count)

    return [
        x if axis is None else rows(x) for axis, x in zip(axes, operands, strict=True)
    ]


def _one_ahead(add, before, axes, given):
    """Adds up what rows contribute, each taken in the step before it is used.

    Otherwise XLA would take each entry out of the stacks as it is read, for which it
    reads one at a time.
    """
    mapped = [k for k, axis in enumerate(axes) if axis == 0]

    def rows(i):
        found = rows_at(axes, given, i)
        return {k: found[k] for k in mapped}

    def step(i, carry):
        before, own = carry
        values = (own.get(k, x) for k, x in enumerate(given))
        return add(before, *values), rows(i + 1)

    return lax.fori_loop(0, len(given[0]), step, (before, rows(0)))[0]


def _weighted(weight, x):
    """Multiplies x with the weight, whose axes are the leading ones of x."""
    weight = lax.convert_element_type(weight, x.dtype)
    return lax.mul(lax.broadcast_in_dim(weight, x.shape, range(weight.ndim)), x)


def precision_of(eqn: Any) -> Any:
    """Returns the precision of a product, as it was asked for.

    None for an algorithm that would not hold squares: of the range of float16, or one
    that adds up in half precision.
    """
    precision, out = eqn.params["precision"], widen(eqn.outvars[0].aval.dtype)
    if precision is None or isinstance(precision, tuple):
        return precision
    if isinstance(precision, lax.DotAlgorithmPreset):
        narrow = ("F16_", "ANY_F8", "BF16_BF16_BF16")
        double = precision.name.startswith("F64")
        holds = not precision.name.startswith(narrow)
        return precision if holds and double == (out == jnp.float64) else None
    kinds = precision.lhs_precision_type, precision.rhs_precision_type
    holds = precision.accumulation_type == out and all(
        jnp.finfo(kind).maxexp >= jnp.finfo(jnp.float32).maxexp for kind in kinds
    )
    return precision if holds else None


@functools.cache
def outer_product(
    numbers: Any,
    dtype: Any,
    precision: Any,
    powers: tuple[int, ...],
    share: int,
    early: int,
) -> Callable:
    """Returns the sums of powers of an outer product: one matrix product per power.

    `sum_n w_n (a_n g_n)^p = sum_n a_n^p (w_n g_n^p)`. Layers that are alike share one
    function, which is traced once.

    Args:
        numbers: The dimension numbers of the product of one example.
        dtype: What to compute in.
        precision: The precision of the products.
        powers: The powers.
        share: How many examples each device has.
        early: Which of the two is known first, as activations are.
    """
    (contract_a, contract_g), (batch_a, batch_g) = numbers

    def arranged(x, has, contract, batch):
        """Returns x as (*lead, *batch, free), and the shape of what is free."""
        lead = sum(has)
        free = [d for d in range(x.ndim - lead) if d not in (*contract, *batch)]
        order = [*range(lead), *(lead + d for d in (*batch, *contract, *free))]
        x = lax.transpose(lax.convert_element_type(x, dtype), order)
        shape = x.shape[x.ndim - len(free) :]
        return x.reshape(*x.shape[: lead + len(batch)], -1), shape

    def reduce(has, weight, a, g):
        _, *has = has
        a, free_a = arranged(a, has[0], contract_a, batch_a)
        g, free_g = arranged(g, has[1], contract_g, batch_g)
        # The cotangents of one example share its activations: they are summed before
        # the product. As a product too: XLA would move a plain sum into the next one.
        many = 0 if sum(has[0]) > sum(has[1]) else 1
        axes = range(weight.ndim)
        lead = [j for j, b in enumerate(has[1 - many]) if b]
        batch = tuple(len(lead) + d for d in range(len(batch_a)))
        examples = tuple(range(len(lead)))
        numbers = ((examples, examples), (batch, batch))

        def weighted(x):
            if len(lead) == weight.ndim and all(has[many]):
                return _weighted(weight, x)
            x = jnp.expand_dims(x, [j for j, b in enumerate(has[many]) if not b])
            x = jnp.broadcast_to(x, weight.shape + x.shape[weight.ndim :])
            body = range(weight.ndim, x.ndim)
            w = weight.astype(dtype)
            return jnp.einsum(
                w, [*axes], x, [*axes, *body], [*lead, *body], precision=precision
            )

        balanced = _balance(a, g, has) if max(powers) > 2 else (a, g)
        # Beside the squares of several cotangents those of activations are small.
        alone = on_one_device(weight, share) and has[0] == has[1]

        def sums(p):
            pair = [*(balanced if p > 2 else (a, g))]
            if p > 1:
                # The powers of activations are not held all the way back to them.
                pair[early] = after([pair[1 - early]], pair[early], alone)
            left, right = (power(x, p) for x in pair)
            if many == 0:
                left = weighted(left)
            else:
                right = weighted(right)
            y = lax.dot_general(left, right, numbers, precision=precision)
            return y.reshape(*y.shape[: len(batch)], *free_a, *free_g)

        return [[sums(p) for p in powers]]

    return jax.jit(reduce, static_argnums=0)


def _balance(a, g, has):
    """Returns two factors of one magnitude, of the same product, for each example.

    So that the powers of both stay in range where that of their product does.
    """
    both = [x and y for x, y in zip(*has, strict=True)]

    def own(carried):
        """Returns which of the leading axes carried are those of both factors."""
        return [shared for shared, b in zip(both, carried, strict=True) if b]

    def magnitude(x, carried):
        shared = own(carried)
        axes = [d for d in range(x.ndim) if d >= len(shared) or not shared[d]]
        largest = jnp.max(jnp.abs(x), axis=tuple(axes), initial=0)
        return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)

    left, right = (magnitude(x, h) for x, h in zip((a, g), has, strict=True))
    scale = jnp.sqrt(right) / jnp.sqrt(left)

    def scaled(x, carried, factor):
        shared = own(carried)
        axes = [d for d in range(x.ndim) if d >= len(shared) or not shared[d]]
        return x * jnp.expand_dims(factor, axes)

    return scaled(a, has[0], scale), scaled(g, has[1], 1 / scale)


def convolution_as_product(eqn: Any, a: jax.Array, g: jax.Array) -> jax.Array:
    """Evaluates a convolution whose output is small, as a kernel's gradient is.

    The windows of `a` are laid side by side and multiplied with `g`: one matrix
    product, where XLA:CPU runs a convolution inside a loop an order slower.
    """
    params = eqn.params
    spec, groups = params["dimension_numbers"], params["batch_group_count"]
    n_spatial = len(spec.lhs_spec) - 2
    out = eqn.outvars[0].aval
    dtype = widen(out.dtype)
    # Features, then positions, then what remains of the output.
    a = jnp.transpose(a, (spec.lhs_spec[1], *spec.lhs_spec[2:], spec.lhs_spec[0]))
    g = jnp.transpose(g, (spec.rhs_spec[1], *spec.rhs_spec[2:], spec.rhs_spec[0]))
    inside = [
        (low, high, hole - 1)
        for (low, high), hole in zip(
            params["padding"], params["lhs_dilation"], strict=True
        )
    ]
    a = lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *inside, (0, 0, 0)])
    taps = [out.shape[d] for d in spec.out_spec[2:]]
    for d in range(n_spatial):
        hole, stride = params["rhs_dilation"][d], params["window_strides"][d]
        reach = (g.shape[1 + d] - 1) * hole + 1
        windows = [
            lax.slice_in_dim(a, t * stride, t * stride + reach, hole, axis=1 + d)
            for t in range(taps[d])
        ]
        a = jnp.stack(windows, axis=-2)
    contracted = range(1 + n_spatial)
    a = a.reshape(*a.shape[:-1], groups, -1)
    g = g.reshape(*g.shape[:-1], groups, -1)
    if a.shape[-1] == 1 and groups > 1:
        # Depthwise: products of single columns, better as a sum of products.
        g = jnp.expand_dims(g, [1 + n_spatial + d for d in range(n_spatial)])
        y = jnp.sum((a * g).astype(dtype), axis=tuple(contracted))
        y = jnp.expand_dims(y, -2)
    else:
        y = lax.dot_general(
            a,
            g,
            ((contracted, contracted), ((a.ndim - 2,), (g.ndim - 2,))),
            precision=precision_of(eqn),
            preferred_element_type=dtype,
        )
        y = jnp.moveaxis(y, 0, -3)
    # The axes are: taps, groups, rows of a group, columns of a group.
    y = jnp.moveaxis(y, -2, 0)
    y = y.reshape(y.shape[0], *taps, -1)
    order = (spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    return jnp.moveaxis(y, range(y.ndim), order)

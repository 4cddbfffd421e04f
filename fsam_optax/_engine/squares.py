"""Squares of what one example contributes, summed over its entries.

The other way to sum up the squares that `sums` adds over examples. The functions
returned here are called as `reduce(number, has, weight, *counts, *operands)`. Of the
`number` arrays in `counts`, each says how often every entry counts, or is one number
for all of them; for each there is a result with the axis of the examples. `has` and the
operands are as in `sums`, the weight says no more than how many examples there are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fsam_optax._common.norms import widen
from fsam_optax._engine import sums
from fsam_optax._engine.sources import Summation
from fsam_optax._engine.sums import apart, Steps


def square(k: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `sum k x^2`, in float32 or wider."""
    x = x.astype(widen(x.dtype))
    return k * jnp.sum(x * x) if k.ndim == 0 else jnp.sum(k * (x * x))


def looped(
    fn: Callable,
    out: Sequence[Any],
    what: Summation,
    steps: Steps | None,
    short: Callable | None = None,
) -> Callable:
    """Returns what sums powers of `fn(*operands)`; see `sums.looped`.

    By example, the squares of all its arrays, or of the one as often as asked for.
    """
    if not what.by_example:
        return sums.looped(fn, out, what.powers, steps, short)

    def one(ks, *operands):
        found = fn(*operands)
        found = found * len(ks) if len(found) == 1 else found
        return [square(k, x) for k, x in zip(ks, found, strict=True)]

    return mapped(one, steps)


def mapped(one: Callable, steps: Steps | None) -> Callable:
    """Returns the rule that takes the examples one by one, a few at a time.

    Args:
        one: `one(counts, *operands)`, a list of numbers for one example.
        steps: How many examples at a time; None for all at once.
    """

    def reduce(number, has, weight, *args):
        ks, operands, has = args[:number], args[number:], has[1 + number :]
        if not any(map(any, has)):
            return [jnp.broadcast_to(y, weight.shape) for y in one(ks, *operands)]
        varying = [x for x, h in zip(operands, has, strict=True) if any(h)]

        def of_example(varying):
            rest = iter(varying)
            given = (
                next(rest) if any(h) else x for x, h in zip(operands, has, strict=True)
            )
            return one(ks, *given)

        (n,) = weight.shape
        length = math.gcd(n, steps.share) if steps else n
        rows = steps.rows(length, 1) if steps else {"default": length}

        def in_steps(count, *varying):
            if count == length:
                return jax.vmap(of_example)(varying)

            def of_share(*some):
                return lax.map(of_example, some, batch_size=count or None)

            found = apart(of_share, length, [0] * len(varying), varying)
            return jax.tree.map(lambda y: y.reshape(n), found)

        branches = {
            platform: lambda *varying, count=count: in_steps(count, *varying)
            for platform, count in rows.items()
        }
        if len(branches) == 1:
            return branches["default"](*varying)
        return lax.platform_dependent(*varying, **branches)

    return reduce


def gram_work(
    positions: int, batch: int, sides: Sequence[int], uniform: bool = True
) -> float:
    """Returns the operations of `gram`; `uniform` if all entries count the same."""
    if positions == 1:
        weighed = 0 if uniform else math.prod(sides)
        return 2.0 * batch * (sum(sides) + weighed)
    return 2.0 * batch * positions**2 * (sum(sides) + 1)


def gram(k: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns `sum k (sum_t a_t b_t)^2`, without the product if all count the same.

    `|sum_t a_t b_t|^2 = sum_st (a_s . a_t) (b_s . b_t)`.

    Args:
        k: How often each entry counts; one number if there are several positions.
        left: The vectors a.  # shape=(*batch, positions, rows)
        right: The vectors b.  # shape=(*batch, positions, columns)
    """
    # Products that cancel need all digits.
    highest = lax.Precision.HIGHEST
    if left.shape[-2] == 1:
        a, b = (jnp.square(x[..., 0, :]) for x in (left, right))
        if k.ndim == 0:
            return k * jnp.sum(jnp.sum(a, -1) * jnp.sum(b, -1))
        k = k.reshape(*a.shape, b.shape[-1])
        return jnp.sum(jnp.einsum("...ij,...j->...i", k, b, precision=highest) * a)
    a, b = (
        jnp.einsum("...si,...ti->...st", x, x, precision=highest) for x in (left, right)
    )
    # Rounding must not make a sum of squares negative.
    return k * jnp.maximum(jnp.sum(a * b), 0)

"""A matrix plus or minus its transpose, as the gradient of a symmetric weight.

Its powers are symmetric too, so that a loop over examples adds up only what lies above
the diagonal: two strips, the columns of which are read where rows are.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fsam_optax._engine.primitives import name_of, NEGATION, TRANSPOSITION
from fsam_optax._engine.sources import Site, Summation
from fsam_optax._engine.squares import looped
from fsam_optax._engine.sums import Steps


def mirrored(site: Site) -> tuple[Site, float] | None:
    """Returns the matrix, and the sign of its transpose; None for other sums."""
    shape = site.like.shape
    if site.what.by_example or len(shape) != 2 or not 1 < shape[0] == shape[1]:
        return None
    if len({id(v) for v in site.terms}) < len(site.terms) or len(site.terms) == 1:
        return None  # The same twice is no pair.
    found = [(v, _leaves(site.flow, v)) for v in site.terms]
    sides = [{turned for _, turned, _ in leaves} for _, leaves in found]
    if any(len(side) > 1 for side in sides):
        return None
    pairs = [*zip(found, sides, strict=True)]
    one = [x for x, side in pairs if side == sides[0]]
    other = [x for x, side in pairs if side != sides[0]]
    for sign in (1.0, -1.0):
        before = Counter((x, sign * s) for _, y in one for x, _, s in y)
        if before == Counter((x, s) for _, y in other for x, _, s in y):
            return dataclasses.replace(site, terms=tuple(v for v, _ in one)), sign
    return None


def _leaves(flow, v, turned=False, sign=1.0):
    """Returns what a sum is made of, whether it is transposed there, and its sign."""
    while name_of(e := flow.made_by(v)) in (TRANSPOSITION, NEGATION):
        (v,) = e.invars
        turned ^= name_of(e) == TRANSPOSITION
        sign *= -1.0 if name_of(e) == NEGATION else 1.0
    parts = flow.summands(v)
    if len(parts) == 1:
        return [(id(v), turned, sign)]
    return [leaf for x in parts for leaf in _leaves(flow, x, turned, sign)]


def by_strips(sign: float) -> Callable:
    """Returns how powers of a matrix and its transpose are summed; see `looped`."""

    def summing(
        fn: Callable, out: Sequence[Any], what: Summation, steps: Steps | None
    ) -> Callable:
        (like,) = out
        n = like.shape[0]
        half = n // 2

        def strips(*operands):
            (x,) = fn(*operands)
            return [
                x[start:stop, start:] + sign * x[start:, start:stop].T
                for start, stop in ((0, half), (half, n))
            ]

        shapes = [
            jax.ShapeDtypeStruct(shape, like.dtype)
            for shape in ((half, n), (n - half, n - half))
        ]
        inner = looped(strips, shapes, what, steps)

        def whole(above, below, p):
            left = sign**p * above[:, half:].T
            return jnp.concatenate([above, lax.concatenate([left, below], 1)])

        def reduce(has, weight, *operands):
            parts = zip(*inner(has, weight, *operands), what.powers, strict=True)
            return [[whole(*part) for part in parts]]

        return reduce

    return summing

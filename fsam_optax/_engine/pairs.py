"""Squares of sums of few products, multiplied out: each pair is a matrix product.

`sum_n w_n (sum_r a_nr g_nr)^2 = sum_rs sum_n w_n (a_nr a_ns) (g_nr g_ns)`, where a is
of the rows and g of the columns. Nothing of the size of the result is formed for single
examples, which is what a loop over them would spend its time on.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._engine.grouping import Group
from fsam_optax._engine.jaxpr import size
from fsam_optax._engine.sources import Site, Source
from fsam_optax._engine.sums import by_device


MOST_POSITIONS = 4


class Vectors(NamedTuple):
    """A vector for each example and cotangent.

    Attributes:
        x: The vectors, perhaps several; of size one where they are constant.
            # shape=(*leading, *batch, rest)
        has: Which of the leading axes it carries; the others are left out.
    """

    x: jax.Array
    has: tuple[bool, ...]

    def times(self, other: "Vectors") -> "Vectors":
        """Multiplies elementwise."""
        both = tuple(a or b for a, b in zip(self.has, other.has, strict=True))
        aligned = []
        for y in (self, other):
            live = [h for h, b in zip(y.has, both, strict=True) if b]
            aligned.append(
                jnp.expand_dims(y.x, [d for d, h in enumerate(live) if not h])
            )
        return Vectors(aligned[0] * aligned[1], both)


def summed_product(weight: jax.Array, a: Vectors, g: Vectors, precision: Any) -> Any:
    """Returns `sum w a g^T` over the leading axes."""
    axes = [*range(weight.ndim)]
    row, column = weight.ndim, weight.ndim + 1
    batch = [column + 1 + d for d in range(a.x.ndim - 1 - sum(a.has))]

    def lead(y):
        return [j for j in axes if y.has[j]]

    # What only one of them has is summed first.
    few, many = (
        ((a, row), (g, column)) if sum(a.has) <= sum(g.has) else ((g, column), (a, row))
    )
    weighted = jnp.einsum(
        weight.astype(a.x.dtype),
        axes,
        many[0].x,
        [*lead(many[0]), *batch, many[1]],
        [*lead(few[0]), *batch, many[1]],
        precision=precision,
    )
    return jnp.einsum(
        few[0].x,
        [*lead(few[0]), *batch, few[1]],
        weighted,
        [*lead(few[0]), *batch, many[1]],
        [*batch, row, column],
        precision=precision,
    )


def multiplied_out(
    site: Site, groups: Sequence[Group], operands: tuple[Any, ...]
) -> Source | None:
    """Returns the source for few products; None for many, or for other powers."""
    double = [g for g in groups if len(g.sides) == 2]
    single = [g for g in groups if len(g.sides) == 1]
    count = sum(sum(g.positions()) for g in double) + len(single)
    if (
        site.what.by_example
        or max(site.what.powers) > 2
        or not double
        or not 1 < count <= MOST_POSITIONS
        or any((g.sides, g.batch) != (double[0].sides, double[0].batch) for g in double)
        or (double[0].batch and single)
        or not all(
            any(set(g.labels) <= set(side) for side in double[0].sides) for g in single
        )
    ):
        return None
    left, right = double[0].sides
    base, sizes = double[0], double[0].sizes
    ordered = [*double, *single]
    precision = next((g.precision for g in double if g.precision is not None), None)

    def prepare(*values):
        env = dict(zip(operands, values, strict=True))
        arrays = [x for g in ordered for factors in g.factors(env) for x in factors]
        return [*arrays, *(x for g in ordered for x in g.masks(env))]

    def elements(has, arrays):
        """Returns rows and columns of each product, and the number of its group."""
        found = []
        pending = list(zip(arrays, has, strict=True))
        for k, g in enumerate(ordered):
            sides = [pending.pop(0) for _ in g.sides]
            if len(sides) == 2:
                for t in range(sides[0][0].shape[-2]):
                    found.append(
                        (*(Vectors(x[..., t, :], tuple(h)) for x, h in sides), k)
                    )
                continue
            ((x, h),) = sides
            side = left if set(g.labels) <= set(left) else right
            lead = x.shape[: sum(h)]
            shape = [sizes[y] if y in g.labels else 1 for y in side]
            full = [sizes[y] for y in side]
            x = jnp.broadcast_to(x.reshape(*lead, *shape), (*lead, *full))
            x = Vectors(x.reshape(*lead, -1), tuple(h))
            one = Vectors(jnp.ones(1, x.x.dtype), (False,) * len(h))
            found.append((x, one, k) if side is left else (one, x, k))
        return found

    def reduce(has, weight, *values):
        _, *has = has
        n = sum(len(g.sides) for g in ordered)
        products = elements(has[:n], values[:n])
        rest = [*values[n:]]
        masks = []
        for g in ordered:
            own = [rest.pop(0) for _ in g.terms[0].masks]
            one = jnp.ones([1] * len(g.labels), g.dtype)
            masks.append(
                g.placed(jnp.broadcast_to(one, [sizes[y] for y in g.labels]), own, 1)
                if own
                else None
            )

        def summed(a, g, *numbers):
            y = summed_product(weight, a, g, precision)
            shape = *y.shape[:-2], base.volume(left), base.volume(right)
            y = jnp.broadcast_to(y, shape)
            y = base.arranged(y.reshape([sizes[x] for x in base.labels]), base.labels)
            for k in numbers:
                y = y if masks[k] is None else y * masks[k]
            return y

        def sums(p):
            if p == 1:
                return sum(summed(a, g, k) for a, g, k in products)
            total = jnp.zeros((), base.dtype)
            for (i, e), (j, f) in itertools.combinations_with_replacement(
                enumerate(products), 2
            ):
                y = summed(e[0].times(f[0]), e[1].times(f[1]), e[2], f[2])
                total = total + (y if i == j else 2 * y)
            # Rounding must not make a sum of squares negative.
            return jnp.where(jnp.all(weight >= 0), jnp.maximum(total, 0), total)

        return [[sums(p) for p in site.what.powers]]

    n = sum(sum(g.positions()) for g in double)
    pairs = n * (n + 1) / 2 + n * len(single)
    work = sum(t.work for g in groups for t in g.terms)
    work += 2.0 * pairs * base.volume(base.labels)
    reduce = by_device(reduce, site.what.examples)
    sides = base.volume((*base.batch, *left)) + base.volume((*base.batch, *right))
    work += site.what.per_entry * pairs * sides
    masks = sum(len(g.terms[0].masks) for g in groups) + 2
    work += masks * pairs * size(site.terms[0]) / site.what.examples
    return Source("sum of outer products", work, operands, reduce, 0, prepare)

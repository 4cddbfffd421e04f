"""Squares of sums of few products, multiplied out: each pair is a matrix product.

`sum_n w_n (sum_r a_nr g_nr)^2 = sum_rs sum_n w_n (a_nr a_ns) (g_nr g_ns)`, where a is
of the rows and g of the columns. Nothing of the size of the result is formed for single
examples, which is what a loop over them would spend its time on.
"""

import collections
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fsam_optax._common.mapped_axes import vary_like
from fsam_optax._engine.folding import relabelled
from fsam_optax._engine.grouping import Group
from fsam_optax._engine.jaxpr import size
from fsam_optax._engine.sources import Site, Source
from fsam_optax._engine.sums import by_device
from fsam_optax._engine.work import RARE


MOST_POSITIONS = 4
LEFT = 1 / 32  # Of squares that cancel: where it is less, too few digits are left.


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
        return self.joined(other, jnp.multiply)

    def joined(self, other: "Vectors", operation: Callable) -> "Vectors":
        """Returns an elementwise operation on both."""
        both = tuple(a or b for a, b in zip(self.has, other.has, strict=True))
        aligned = []
        for y in (self, other):
            live = [h for h, b in zip(y.has, both, strict=True) if b]
            aligned.append(
                jnp.expand_dims(y.x, [d for d, h in enumerate(live) if not h])
            )
        return Vectors(operation(*aligned), both)

    def share(self, other: "Vectors") -> "Vectors":
        """Returns how much of this the other has."""
        own = jnp.sum(jnp.square(self.x), -1, keepdims=True)
        own = Vectors(jnp.where(own > 0, own, 1), self.has)
        y = self.times(other)
        y = Vectors(jnp.sum(y.x, -1, keepdims=True), y.has)
        return y.joined(own, jnp.divide)

    def without(self, other: "Vectors") -> "Vectors":
        """Returns what is orthogonal to the other."""
        return self.joined(other.times(other.share(self)), jnp.subtract)


def orthogonal(products: Sequence[Any], mirrors: dict[int, tuple[int, float]]) -> Any:
    """Returns products with the same sum that do not cancel where they are added up.

    The squares of sums that cancel would keep half of the digits. The rows of each
    product are made orthogonal to those before it, as by Gram and Schmidt: the squares
    of a column are then the sum of those of its parts. A matrix minus its transpose,
    `a g^T - g a^T`, stays one: g becomes orthogonal to a. With a plus nothing cancels.

    Args:
        products: Rows, columns and the number of a group, for each.
        mirrors: See `_mirrors`.
    """
    found = list(products)
    for i, (j, sign) in mirrors.items():
        if i < j and sign < 0:
            (a, g, *k), (h, b, *m) = found[i], found[j]
            found[i], found[j] = (a, g.without(a), *k), (h.without(b), b, *m)
    for i in range(0 if mirrors else len(found)):
        a, g, *k = found[i]
        for j, (q, h, *m) in enumerate(found[:i]):
            share = q.share(a)
            a = a.joined(q.times(share), jnp.subtract)
            found[j] = (q, h.joined(g.times(share), jnp.add), *m)
        found[i] = (a, g, *k)
    return found


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
    site: Site, groups: Sequence[Group], operands: tuple[Any, ...], formed: Callable
) -> Source | None:
    """Returns the source for few products; None for many, or for other powers.

    Args:
        site: The sum of variables.
        groups: The products that it is the sum of.
        operands: The variables that they read.
        formed: Returns the source that forms the sum for each example, of the same.
    """
    double = [g for g in groups if len(g.sides) == 2]
    single = [g for g in groups if len(g.sides) == 1]
    count = sum(sum(g.positions()) for g in double) + len(single)
    if (
        site.what.by_example
        or max(site.what.powers) > 2
        or not double
        or not 1 < count <= MOST_POSITIONS
        or any((g.sides, g.batch) != (double[0].sides, double[0].batch) for g in double)
        or not all(
            any(set(g.labels) <= {*double[0].batch, *side} for side in double[0].sides)
            for g in single
        )
    ):
        return None
    left, right = double[0].sides
    base, sizes = double[0], double[0].sizes
    ordered = [*double, *single]
    precision = next((g.precision for g in double if g.precision is not None), None)

    alike = len(double) == 1 and not base.terms[0].masks
    mirrors = _mirrors(base) if alike else {}
    n = sum(sum(g.positions()) for g in double)
    orthogonal_all = alike and not single and (n == 2 or not mirrors)

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
            side = left if set(g.labels) <= {*base.batch, *left} else right
            lead = x.shape[: sum(h)]
            labels = *base.batch, *side
            batch, full = ([sizes[y] for y in ys] for ys in (base.batch, side))
            x = x.reshape(*lead, *(sizes[y] for y in g.labels))
            order = [g.labels.index(y) for y in labels if y in g.labels]
            x = jnp.transpose(x, [*range(len(lead)), *(len(lead) + d for d in order)])
            shape = [sizes[y] if y in g.labels else 1 for y in labels]
            x = jnp.broadcast_to(x.reshape(*lead, *shape), (*lead, *batch, *full))
            x = Vectors(x.reshape(*lead, *batch, -1), tuple(h))
            one = Vectors(jnp.ones((*batch, 1), x.x.dtype), (False,) * len(h))
            found.append((x, one, k) if side is left else (one, x, k))
        return found

    def reduce(has, weight, *values):
        _, *has = has
        rest, masks = [*values], []
        for g in ordered:
            own = [rest.pop(0) for _ in g.terms[0].masks]
            one = jnp.ones([1] * len(g.labels), g.dtype)
            masks.append(
                g.placed(jnp.broadcast_to(one, [sizes[y] for y in g.labels]), own, 1)
                if own
                else None
            )
        products = elements(has[len(values) - len(rest) :], rest)

        def summed(a, g):
            y = summed_product(weight, a, g, precision)
            return jnp.broadcast_to(y, [*y.shape[:-2], *map(base.volume, base.sides)])

        def placed(y, *numbers):
            y = base.arranged(y.reshape([sizes[x] for x in base.labels]), base.labels)
            for k in numbers:
                y = y if masks[k] is None else y * masks[k]
            return y

        def sums(p):
            if p == 1:
                return sum(placed(summed(a, g), k) for a, g, k in products)
            total, found = jnp.zeros((), base.dtype), {}
            parts = jnp.zeros((), base.dtype)
            apart = orthogonal(products[:n], mirrors) if alike else products[:n]
            apart += products[n:]
            for i, j in _pairs(len(apart)):
                e, f = apart[i], apart[j]
                k, sign = _turned(mirrors, i, j)
                if k in found:
                    y = sign * jnp.swapaxes(found[k], -2, -1)
                else:
                    y = summed(e[0].times(f[0]), e[1].times(f[1]))
                found[i, j] = y
                y = placed(y, e[2], f[2])
                total = total + (y if i == j else 2 * y)
                if i == j and not orthogonal_all:
                    parts = parts + jnp.abs(y)
            # Rounding must not make a sum of squares negative.
            y = jnp.where(jnp.all(weight >= 0), jnp.maximum(total, 0), total)
            return y if orthogonal_all else (y, jnp.max(parts))

        return [[sums(p) for p in site.what.powers]]

    before = [(i, j) for i, j in _pairs(n) if _turned(mirrors, i, j)[0] >= (i, j)]
    pairs = len(before) + n * len(single)
    work = sum(t.work for g in groups for t in g.terms)
    work += 2.0 * pairs * base.volume(base.labels)
    reduce = by_device(reduce, site.what.examples)
    each = formed(site, ordered, operands)
    if not orthogonal_all:
        reduce = _checked(reduce, each.reduce)
        passes = 2.0 * (n + len(single)) + 6.0
        work += passes * size(site.terms[0]) / site.what.examples
    sides = base.volume((*base.batch, *left)) + base.volume((*base.batch, *right))
    work += site.what.per_entry * pairs * sides
    if alike:
        rows, columns = (base.volume((*base.batch, *side)) for side in base.sides)
        apart = len(mirrors) / 2 if mirrors else n * (n - 1) / 2
        work += apart * (6.0 * rows + 2.0 * columns + (4.0 * rows if mirrors else 0.0))
    masks = sum(len(g.terms[0].masks) for g in groups) + 2
    work += masks * pairs * size(site.terms[0]) / site.what.examples
    return Source("sum of outer products", work, operands, reduce, 0, each.prepare)


def _checked(reduce, formed):
    """Returns a rule that forms the sums for each example where the digits are lost.

    That is where squares that cancel leave little of any entry.
    """

    def run(has, weight, *values):
        ((*sums,),) = reduce(has, weight, *values)
        for k, found in enumerate(sums):
            if not isinstance(found, tuple):
                continue
            y, parts = found

            def each(*values, k=k, y=y):
                return vary_like(formed(has, weight, *values)[0][k].astype(y.dtype), y)

            each.__name__ = RARE
            kept = jnp.max(y) >= LEFT * parts
            sums[k] = lax.cond(kept, lambda *_, y=y: y, jax.jit(each), *values)
        return [sums]

    return run


def _pairs(n):
    return itertools.combinations_with_replacement(range(n), 2)


def _mirrors(group):
    """Returns, by product, which one is its transpose, and 1, or -1 if negated.

    There are such in the gradient of a matrix that is added to its own transpose.
    """
    left, right = group.sides
    sizes = [[group.sizes[x] for x in side] for side in group.sides]
    if sizes[0] != sizes[1]:
        return {}
    kept = {x: x for x in group.labels}
    turned = kept | dict(zip((*left, *right), (*right, *left), strict=True))

    def written(f, names):
        inner = itertools.count(-1, -1)
        names = collections.defaultdict(lambda: next(inner), names)
        return relabelled(f, names.__getitem__)

    numbers = [group.volume(t.summed) for t in group.terms]
    starts = [0, *itertools.accumulate(numbers)]
    found = {}
    for (i, s), (j, t) in itertools.permutations(enumerate(group.terms), 2):
        image = [written(f, turned) for f in s.varying[::-1]]
        own = [written(f, kept) for f in t.varying]
        same = image == own and s.numbers == t.numbers and abs(s.scale) == abs(t.scale)
        if same and numbers[i] == numbers[j] == 1:
            found[starts[i]] = starts[j], math.copysign(1, s.scale * t.scale)
    return found


def _turned(mirrors, i, j):
    """Returns the pair whose product is that of two others transposed, and its sign."""
    if i not in mirrors or j not in mirrors:
        return (i, j), 1.0
    (k, a), (m, b) = mirrors[i], mirrors[j]
    return (min(k, m), max(k, m)), a * b

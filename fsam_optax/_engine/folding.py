"""Products of few factors, folded: every constant joins a factor that varies.

What is left of a term is a product of two factors that differ between examples, or one,
times constants that have no axis but those of the result. The order is the one of the
least work, and nothing larger than the activations is formed on the way.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from fsam_optax._engine.jaxpr import read
from fsam_optax._engine.products import (
    Expander,
    Factor,
    is_inverse,
    Mismatch,
    solve,
    Term,
)


MOST_CONSTANTS = 6


@dataclass(frozen=True)
class Contracted:
    """The product of two factors, or one, summed over some labels.

    Attributes:
        parts: The factors.
        labels: The labels that are left.
        varies: Whether it differs between examples.
        precision: That of the product.
    """

    parts: tuple["Factor | Contracted", ...]
    labels: tuple[int, ...]
    varies: bool
    precision: Any = None

    def value(self, env: dict[Any, Any], dtype: Any) -> Any:
        """Returns the array; it is made once."""
        if self not in env:
            env[self] = self._made(env, dtype)
        return env[self]

    def _made(self, env, dtype):
        solved = _solved(self, env, dtype)
        if solved is not None:
            return solved
        if all(set(part.labels) <= set(self.labels) for part in self.parts):
            factors = [_among(self.labels, part, env, dtype) for part in self.parts]
            return math.prod(factors[1:], start=factors[0])
        operands = []
        for part in self.parts:
            operands += [part.value(env, dtype), part.labels]
        numbers = {
            x: i for i, x in enumerate({x: 0 for o in operands[1::2] for x in o})
        }
        operands[1::2] = [[numbers[x] for x in o] for o in operands[1::2]]
        out = [numbers[x] for x in self.labels]
        exact = any(isinstance(f, Factor) and f.is_exact() for f in self.parts)
        precision = lax.Precision.HIGHEST if exact else self.precision
        return jnp.einsum(*operands, out, precision=precision)


def _solved(x: Contracted, env: dict[Any, Any], dtype: Any) -> Any:
    """Returns a product with the inverse of a matrix, which it does not form.

    The digits that an inverse loses, and a product in less than full precision, would
    be as many more as the system is ill-conditioned. None if it is no such product.
    """
    systems = [f for f in x.parts if isinstance(f, Factor) and is_inverse(f)]
    if len(x.parts) != 2 or not systems:
        return None
    (matrix, *_), other = systems, x.parts[systems[0] is x.parts[0]]
    *batch, rows, columns = matrix.labels
    shared = {rows, columns} & set(other.labels)
    if len(shared) != 1 or shared & set(x.labels) or not set(batch) <= set(x.labels):
        return None
    (inner,) = shared
    outer = rows if inner == columns else columns
    rest = [label for label in other.labels if label not in (*batch, inner)]
    b = _among((*batch, inner, *rest), other, env, dtype)
    shape = jnp.shape(read(env, matrix.v))[:-1]
    b = jnp.broadcast_to(b, (*shape, *b.shape[len(shape) :]))
    y = solve(matrix, env, b.reshape(*shape, -1), transposed=inner == rows)
    labels, y = [*batch, outer, *rest], y.reshape(b.shape)
    y = jnp.sum(y, [d for d, label in enumerate(labels) if label not in x.labels])
    labels = [label for label in labels if label in x.labels]
    return jnp.transpose(y, [labels.index(label) for label in x.labels])


@dataclass(frozen=True)
class Added:
    """A sum of products, of constants or of one factor that varies in each.

    Attributes:
        parts: A number and the factors of each product.
        labels: The labels of the sum.
        varies: Whether it differs between examples.
    """

    parts: tuple[tuple[float, tuple["Expression", ...]], ...]
    labels: tuple[int, ...]
    varies: bool = False

    def value(self, env: dict[Any, Any], dtype: Any) -> Any:
        """Returns the array."""
        if self in env:
            return env[self]
        total = jnp.zeros((), dtype)
        for scale, factors in self.parts:
            product = jnp.asarray(scale, dtype)
            for f in factors:
                product = product * _among(self.labels, f, env, dtype)
            total = total + product
        return total


Expression = Factor | Contracted | Added


def _among(labels, x, env, dtype):
    """Returns an array with an axis, perhaps of size one, for each of some labels."""
    order = [label for label in labels if label in x.labels]
    y = x.value(env, dtype)
    y = jnp.transpose(y, [x.labels.index(label) for label in order])
    return jnp.expand_dims(y, [d for d, z in enumerate(labels) if z not in x.labels])


@dataclass(frozen=True)
class Folded:
    """A term as a product of at most two factors that vary.

    Attributes:
        scale: A number.
        varying: The factors that differ between examples, one or two.
        masks: Constant factors of the result.
        axes: The labels of each axis of the result.
        precision: That of the product.
        work: Operations for one example before the product of the two.
        numbers: Constants without axes.
    """

    scale: float
    varying: tuple[Expression, ...]
    masks: tuple[Expression, ...]
    axes: tuple[tuple[int, ...], ...]
    precision: Any
    work: float
    numbers: tuple[Expression, ...] = ()

    @property
    def out(self) -> set[int]:
        """Returns the labels of the result."""
        return {label for axis in self.axes for label in axis}

    @property
    def summed(self) -> tuple[int, ...]:
        """Returns the labels that the product of the two is summed over."""
        found = {x: 0 for f in self.varying for x in f.labels}
        return tuple(x for x in found if x not in self.out)


def variables(x: Expression) -> list[Any]:
    """Returns the variables that an expression reads."""
    if isinstance(x, Factor):
        return x.reads()
    if isinstance(x, Added):
        return [v for _, factors in x.parts for f in factors for v in variables(f)]
    return [v for part in x.parts for v in variables(part)]


def relabelled(x: Expression, name: Callable[[int], int]) -> Expression:
    """Returns an expression with other labels: `name` of each, those within first."""

    def parts(xs):
        return tuple(relabelled(y, name) for y in xs)

    if isinstance(x, Contracted):
        x = dataclasses.replace(x, parts=parts(x.parts))
    elif isinstance(x, Added):
        x = dataclasses.replace(x, parts=tuple((c, parts(ys)) for c, ys in x.parts))
    return dataclasses.replace(x, labels=tuple(map(name, x.labels)))


def made(xs: Sequence[Expression], varies: bool) -> list[Expression]:
    """Returns the expressions among others that are computed, from within.

    Those that differ between examples, or the largest ones that do not.
    """
    found: dict[Expression, None] = {}
    for x in xs:
        if not isinstance(x, Factor):
            parts: list[Expression] = []
            for part in x.parts:
                parts += part[1] if isinstance(part, tuple) else [part]
            inner = made(parts, varies) if varies or x.varies else []
            found |= dict.fromkeys([*inner, *([x] if x.varies == varies else [])])
    return [*found]


def aligned(expander: Expander, terms: Sequence[Term]) -> list[Term]:
    """Gives the axes of all terms the same labels, where some factor has them.

    Raises:
        Mismatch: If the axes of two terms are cut in different ways.
    """
    sizes = expander.sizes
    n = len(terms[0].axes)
    terms = list(terms)
    for d in range(n):
        cuts: list[int] = []
        for term in terms:
            cuts = _refined(cuts, [sizes[x] for x in term.axes[d]])
        labels = tuple(expander.label(m) for m in cuts)
        for k, term in enumerate(terms):
            start = 0
            for old in term.axes[d]:
                stop, total = start, 1
                while total < sizes[old]:
                    total *= cuts[stop]
                    stop += 1
                term = expander.replace(term, old, labels[start:stop])
                start = stop
            terms[k] = term
    return terms


def _refined(left, right):
    """Returns the sizes of the parts of an axis that is cut in two ways."""
    left, right, found = [*left], [*right], []
    if not left or not right:
        return left or right
    while left and right:
        m, n = left.pop(0), right.pop(0)
        if m == n:
            found.append(m)
        elif m % n == 0:
            found.append(n)
            left.insert(0, m // n)
        elif n % m == 0:
            found.append(m)
            right.insert(0, n // m)
        else:
            raise Mismatch("axes that are cut in different ways")
    return [*found, *left, *right]


def folded(expander: Expander, term: Term, limit: int, examples: int) -> Folded:
    """Folds the constants of a term into the factors that vary.

    Args:
        expander: Knows the sizes of the labels.
        term: The term.
        limit: Size of the largest array that may be formed for each example.
        examples: Number of examples, which share what is done to constants.

    Raises:
        Mismatch: If a constant would have to be multiplied with more than that.
    """
    sizes, out = expander.sizes, {x for axis in term.axes for x in axis}

    def volume(labels):
        return math.prod(sizes[x] for x in labels)

    varying = tuple(f for f in term.factors if f.varies)
    numbers = tuple(f for f in term.factors if not f.varies and not f.labels)
    constants = tuple(f for f in term.factors if not f.varies and f.labels)
    if not 1 <= len(varying) <= 2 or len(constants) > MOST_CONSTANTS:
        raise Mismatch("too many factors")
    bound = max([limit, *(volume(f.labels) for f in varying)])

    def contracted(parts, others):
        """Returns a product without the labels that nothing else has."""
        needed = out | {x for f in others for x in f.labels}
        found = {x: 0 for f in parts for x in f.labels}
        labels = tuple(x for x in found if x in needed)
        varies = any(f.varies for f in parts)
        if len(parts) == 1 and labels == parts[0].labels:
            return parts[0], 0.0
        work = (2.0 if len(parts) > 1 and len(labels) < len(found) else 1.0) * volume(
            found
        )
        if not varies:
            work /= examples
        elif volume(labels) > bound:
            raise Mismatch("a product that is too large")
        return Contracted(tuple(parts), labels, varies, term.precision), work

    best: list[Any] = [None]

    def search(varying, constants, work):
        if best[0] is not None and work >= best[0][0]:
            return
        if all(out.issuperset(c.labels) for c in constants) and not any(
            set(c.labels) <= set(f.labels) for c in constants for f in varying
        ):
            found = {x for f in varying for x in f.labels}
            final = 2.0 * volume(found) if len(varying) > 1 else 0.0
            if best[0] is None or work + final < best[0][0]:
                best[0] = (work + final, varying, constants, work)
            # Going on may be cheaper still, but need not be looked for.
            return
        items = (*varying, *constants)
        for i, c in enumerate(items):
            if c.varies:
                continue
            for j, f in enumerate(items):
                if (
                    i == j
                    or (not f.varies and j > i)
                    or (c.labels and not set(c.labels) & set(f.labels))
                ):
                    continue
                rest = [x for k, x in enumerate(items) if k not in (i, j)]
                try:
                    new, more = contracted((f, c), rest)
                except Mismatch:
                    continue
                rest.append(new)
                search(
                    tuple(x for x in rest if x.varies),
                    tuple(x for x in rest if not x.varies),
                    work + more,
                )

    # Labels of a single factor that the result does not have are summed at once.
    items: list[Expression] = [*varying, *constants]
    steps = [sum(step[0] != "reshape" for step in f.steps) for f in varying]
    work = sum(
        (float(n * volume(f.labels)) for n, f in zip(steps, varying, strict=True)), 0.0
    )
    for k in range(len(items)):
        items[k], more = contracted((items[k],), items[:k] + items[k + 1 :])
        work += more
    search(tuple(items[: len(varying)]), tuple(items[len(varying) :]), work)
    if best[0] is None:
        raise Mismatch("a constant that joins no factor")
    _, varying, constants, work = best[0]
    return Folded(
        term.scale,
        tuple(varying),
        tuple(constants),
        term.axes,
        term.precision,
        work,
        numbers,
    )

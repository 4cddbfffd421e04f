"""Products of the same form, joined: their factors as arrays with few axes."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fsam_optax._engine.folding import Folded
from fsam_optax._engine.sums import scaled


FEW = 16  # Products over so few positions are joined into one.


class Form(NamedTuple):
    """The form of a product of one or two factors, without where they come from.

    Attributes:
        numbers: The dimension numbers of two factors.
        shape: The shape of the product.
        dtype: What is computed in.
        precision: The precision of the product.
    """

    numbers: Any
    shape: tuple[int, ...]
    dtype: Any
    precision: Any

    def product(self, factors: Sequence[jax.Array]) -> jax.Array:
        """Returns the value of a product, with an axis for each label."""
        first, *others = factors
        for other in others:
            first = lax.dot_general(
                first,
                other,
                self.numbers,
                precision=self.precision,
                preferred_element_type=self.dtype,
            )
        return first.reshape(self.shape)


@dataclass(frozen=True)
class Group:
    """A sum of products of the same form: constants times `sum_t a_t g_t`, or times a.

    Its arrays have three kinds of axes: one for each label of the result that both
    factors have, one that is summed over, and one for the rest.

    Attributes:
        terms: The products.
        sides: The labels that each factor, one or two, has for itself.
        batch: The labels that both have.
        sizes: The sizes of labels.
        dtype: What is computed in.
    """

    terms: tuple[Folded, ...]
    sides: tuple[tuple[int, ...], ...]
    batch: tuple[int, ...]
    sizes: dict[int, int]
    dtype: Any

    @property
    def labels(self) -> tuple[int, ...]:
        """Returns the labels of the result, in the order in which they come out."""
        return (*self.batch, *(x for side in self.sides for x in side))

    def volume(self, labels: Sequence[int]) -> int:
        """Returns how many entries labels stand for."""
        return math.prod(self.sizes[x] for x in labels)

    @property
    def precision(self) -> Any:
        """Returns the precision that was asked for, of one of the products at least."""
        asked = (t.precision for t in self.terms if t.precision is not None)
        return next(asked, None)

    def positions(self) -> list[int]:
        """Returns over how many positions each product is summed; few are joined."""
        if len(self.sides) == 1:
            return [1]
        each = [self.volume(t.summed) for t in self.terms]
        few = sum(n for n in each if n < FEW)
        return [*([few] if few else []), *(n for n in each if n >= FEW)]

    def work(self) -> float:
        """Returns the operations for one example."""
        before = sum(t.work for t in self.terms)
        if len(self.sides) == 1:
            return before + (len(self.terms) - 1) * self.volume(self.labels)
        return before + 2.0 * sum(self.positions()) * self.volume(self.labels)

    def _arrays(self, t, env, positions):
        """Returns the factors of a term, with or without an axis for its positions."""
        arrays: list[jax.Array] = []
        for k, (f, rest) in enumerate(zip(t.varying, self.sides, strict=True)):
            x = f.value(env, self.dtype)
            x = x * t.scale if k == 0 and t.scale != 1 else x
            for number in t.numbers if k == 0 else ():
                x = x * number.value(env, self.dtype)
            order = (*self.batch, *t.summed, *rest)
            x = lax.transpose(x, [f.labels.index(label) for label in order])
            shape = (*x.shape[: len(self.batch)], *positions, self.volume(rest))
            arrays.append(lax.reshape(x, shape))
        return arrays

    def of_one_position(self, env: dict[Any, Any]) -> list[jax.Array]:
        """Returns the factors of the only product, without the axis it is summed over.

        That has one position.
        """
        (term,) = self.terms
        return self._arrays(term, env, ())

    def factors(self, env: dict[Any, Any]) -> list[list[jax.Array]]:
        """Returns, for each product that is left after joining, its factors."""
        n_batch = len(self.batch)
        products = [self._arrays(t, env, (self.volume(t.summed),)) for t in self.terms]
        if len(self.sides) == 1:
            sums = [
                jnp.sum(x, n_batch, keepdims=True) if x.shape[n_batch] > 1 else x
                for (x,) in products
            ]
            return [[sum(sums[1:], sums[0])]]
        each = [self.volume(t.summed) for t in self.terms]
        few = [p for p, n in zip(products, each, strict=True) if n < FEW]
        joined = []
        for k in range(len(self.sides) if few else 0):
            parts = [p[k] for p in few]
            joined.append(
                jnp.concatenate(parts, n_batch) if len(parts) > 1 else parts[0]
            )
        many = [p for p, n in zip(products, each, strict=True) if n >= FEW]
        return [joined, *many] if joined else many

    def form(self) -> Form:
        """Returns the form of its products."""
        batch = tuple(range(len(self.batch)))
        numbers = ((len(batch),), (len(batch),)), (batch, batch)
        shape = tuple(self.sizes[x] for x in self.labels)
        return Form(numbers, shape, self.dtype, self.precision)

    def masks(self, env: dict[Any, Any]) -> list[jax.Array]:
        """Returns the constants, with an axis, perhaps of one, for each label."""
        found = []
        for mask in self.terms[0].masks:
            own = [x for x in self.labels if x in mask.labels]
            new = [x for x in mask.labels if x not in own]
            value = mask.value(env, self.dtype)
            value = jnp.transpose(value, [mask.labels.index(x) for x in (*own, *new)])
            shape = [self.sizes[x] if x in own else 1 for x in self.labels]
            found.append(value.reshape(*shape, *(self.sizes[x] for x in new)))
        return found

    def placed(self, y: jax.Array, masks: Sequence[jax.Array], p: int) -> jax.Array:
        """Multiplies with powers of the constants; in the axes of the result."""
        every = [x for mask in self.terms[0].masks for x in mask.labels]
        labels = [*dict.fromkeys([*self.labels, *every])]
        y = y.reshape(*y.shape, *(1 for _ in labels[len(self.labels) :]))
        factors = []
        for mask, values in zip(self.terms[0].masks, masks, strict=True):
            # The mask has the labels of the product, then some of the others.
            axes = [*self.labels, *(x for x in mask.labels if x not in self.labels)]
            order = [axes.index(x) for x in labels if x in axes]
            values = jnp.transpose(values, order)
            at = {x: values.shape[k] for k, x in enumerate(axes[i] for i in order)}
            factors.append(values.reshape([at.get(x, 1) for x in labels]))
        # Not the powers of each: they may leave a range in which those of all are.
        y = scaled(y, math.prod(factors), p) if factors else y
        return self.arranged(y, labels)

    def lies_in_place(self) -> bool:
        """Tells whether a product is the result as it comes out."""
        (first, *_), axes = self.terms, [(x,) for x in self.labels]
        whole = all(len(side) == 1 for side in self.sides)
        return whole and not first.masks and list(first.axes) == axes

    def arranged(self, y: jax.Array, labels: Sequence[int]) -> jax.Array:
        """Brings an array with some labels into the axes of the result."""
        order = [x for axis in self.terms[0].axes for x in axis]
        y = jnp.transpose(y, [labels.index(x) for x in order if x in labels])
        sizes = iter(y.shape)
        y = y.reshape([next(sizes) if x in labels else 1 for x in order])
        y = jnp.broadcast_to(y, [self.sizes[x] for x in order])
        return y.reshape([self.volume(axis) for axis in self.terms[0].axes])


def grouped(terms: Sequence[Folded], sizes: dict[int, int], dtype: Any) -> list[Group]:
    """Returns the groups of terms of the same form."""
    groups: dict[Any, list[Folded]] = {}
    for t in terms:
        own = [tuple(x for x in f.labels if x in t.out) for f in t.varying]
        batch = tuple(sorted(set.intersection(*map(set, own)))) if len(own) == 2 else ()
        sides = [tuple(sorted(set(x) - set(batch))) for x in own]
        # As they lie in the result, so that no product has to be transposed.
        axes = [x for axis in t.axes for x in axis]
        order = sorted(range(len(sides)), key=lambda k: list(map(axes.index, sides[k])))
        t = dataclasses.replace(t, varying=tuple(t.varying[k] for k in order))
        key = tuple(sides[k] for k in order), batch, t.axes, t.masks
        groups.setdefault(key, []).append(t)
    return [
        Group(tuple(terms), sides, batch, sizes, dtype)
        for (sides, batch, *_), terms in groups.items()
    ]

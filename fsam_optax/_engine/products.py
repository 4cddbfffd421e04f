"""Gradients as sums of products of few factors, so that linear maps reach the factors.

The gradient of a weight is a product of activations and cotangents, `x^T g`. Where a
parametrisation lies in between, as in `W = W0 + a b`, the gradients of its parameters
are linear maps of that: `x^T g b^T`. Taken one after the other, these form the gradient
of W for every example. Here the product is kept apart, each factor with a label for
each of its axes, and every constant factor joins the factor where that is cheapest:
`x^T (g b^T)`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from fsam_optax._engine.jaxpr import Dataflow, is_real, read, size
from fsam_optax._engine.primitives import name_of, PRODUCT, TRANSPOSITION


MOST_TERMS = 8  # Of a product of sums that is multiplied out.


@dataclass(frozen=True)
class Factor:
    """A variable, reshaped, cut or padded along its axes, with labels for them.

    Attributes:
        v: The variable.
        labels: A label for each axis.
        varies: Whether it differs between examples.
        steps: What is done to the variable first: names and arguments of `STEPS`, where
            a variable stands for its value.
        part: Which of `PARTS` of a complex variable it is.
    """

    v: Any
    labels: tuple[int, ...]
    varies: bool
    steps: tuple[tuple[Any, ...], ...] = ()
    part: str = ""

    def value(self, env: dict[Any, Any], dtype: Any) -> Any:
        """Returns the array."""
        x = jnp.asarray(read(env, self.v))
        x = (PARTS[self.part](x) if self.part else x).astype(dtype)
        for name, *arguments in self.steps:
            x = STEPS[name](
                x, *(read(env, a) if _is_variable(a) else a for a in arguments)
            )
        return x

    def reads(self) -> list[Any]:
        """Returns the variables that it is made from."""
        return [self.v, *(a for s in self.steps for a in s if _is_variable(a))]

    def is_exact(self) -> bool:
        """Tells whether it is to be multiplied with in full precision.

        An inverse of a matrix, or what picks entries.
        """
        return any(name in ("inverse", "places") for name, *_ in self.steps)


@dataclass(frozen=True)
class Term:
    """A number times a product of factors, summed over the labels not in `axes`.

    Attributes:
        scale: The number.
        factors: The factors.
        axes: For each axis of the result the labels that it consists of. A label that
            no factor has is one that the result is constant along.
        precision: That of the products.
    """

    scale: float
    factors: tuple[Factor, ...]
    axes: tuple[tuple[int, ...], ...]
    precision: Any = None


def _is_variable(x):
    return hasattr(x, "aval")


def _flip(x, axis):
    return jnp.flip(x, axis)


def _reshape(x, shape):
    return x.reshape(shape)


def _slice(x, axis, start, stop, stride):
    return lax.slice_in_dim(x, start, stop, stride, axis)


def _pad(x, axis, *config):
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, [config if d == axis else (0, 0, 0) for d in range(x.ndim)])


def _reciprocal(x):
    return 1 / x


def _ones(x, shape):
    del x
    return jnp.ones(shape, jnp.float32)


def _chosen(x, case):
    return jnp.where(x == case, 1.0, 0.0)


def _cumsum(x, axis, reverse):
    return lax.cumsum(x, axis, reverse)


def _taken(x, index, axis, fills):
    index = jnp.asarray(index)[..., 0]
    last = x.shape[axis] - 1
    y = jnp.take(x, jnp.clip(index, 0, last), axis, mode="clip")
    if fills:
        inside = (index >= 0) & (index <= last)
        y = y * inside.reshape([-1 if d == axis else 1 for d in range(x.ndim)])
    return y


def _places(x, n):
    return jnp.where(x == jnp.arange(n, dtype=x.dtype), 1.0, 0.0).astype(x.dtype)


def _inverse(x, lower, transposed, unit):
    eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    return _solution(x, eye, lower, transposed, unit)


def _solution(a, b, lower, transposed, unit):
    return lax.linalg.triangular_solve(
        a,
        b,
        left_side=True,
        lower=lower,
        transpose_a=transposed,
        unit_diagonal=unit,
    )


STEPS: dict[str, Callable] = {
    "flip": _flip,
    "reshape": _reshape,
    "slice": _slice,
    "pad": _pad,
    "reciprocal": _reciprocal,
    "ones": _ones,
    "chosen": _chosen,
    "cumsum": _cumsum,
    "taken": _taken,
    "inverse": _inverse,
    "places": _places,
}


REAL, IMAGINARY, INVERTED = "real", "imaginary", " of the reciprocal"
PARTS: dict[str, Callable] = {
    REAL: lambda x: x.real,
    IMAGINARY: lambda x: x.imag,
    REAL + INVERTED: lambda x: (1 / x).real,
    IMAGINARY + INVERTED: lambda x: (1 / x).imag,
}
# The parts of a product: those of its factors, and the sign.
PRODUCT_PARTS = {
    None: [(None, None, 1)],
    REAL: [(REAL, REAL, 1), (IMAGINARY, IMAGINARY, -1)],
    IMAGINARY: [(REAL, IMAGINARY, 1), (IMAGINARY, REAL, 1)],
}


def is_inverse(f: Factor) -> bool:
    """Tells whether a factor is the inverse of a triangular matrix."""
    return [name for name, *_ in f.steps] == ["inverse"]


def solve(f: Factor, env: dict[Any, Any], b: jax.Array, transposed: bool) -> jax.Array:
    """Returns the product of the inverse, perhaps transposed, with a matrix."""
    ((_, lower, turned, unit),) = f.steps
    a = jnp.asarray(read(env, f.v)).astype(b.dtype)
    return _solution(a, b, lower, turned != transposed, unit)


class Mismatch(Exception):
    """The labels of two axes do not fit each other."""


class Expander:
    """Writes variables as sums of products.

    Attributes:
        flow: The program.
        inside: The variables to look into; all others are factors.
        sizes: The sizes of the labels.
        part: Which part of complex variables is expanded; None for real ones.
    """

    def __init__(self, flow: Dataflow, inside: set[Any], linear: dict[str, Any]):
        """Takes the program, the variables to look into, and `linear.LINEAR`."""
        self.flow = flow
        self.linear = linear
        self.inside = inside
        self.sizes: dict[int, int] = {}
        self.part: str | None = None
        self._labels = itertools.count()
        self._standard: dict[tuple[int, int], int] = {}

    def label(self, n: int) -> int:
        """Returns a new label."""
        label = next(self._labels)
        self.sizes[label] = n
        return label

    def standard(self, i: int, n: int) -> int:
        """Returns the i-th label of size n of those that have the same name always."""
        if (i, n) not in self._standard:
            self._standard[i, n] = self.label(n)
        return self._standard[i, n]

    def expand(self, v: Any, part: str | None = None) -> list[Term]:
        """Returns the terms of a variable; raises Mismatch if there are none.

        Args:
            v: The variable.
            part: Which part of it; None for that of what it is read by.
        """
        part = part or self.part
        if is_real(v):
            if part == IMAGINARY:
                return []
            part = None
        elif part is None:
            raise Mismatch("a number that is not real")
        before, self.part = self.part, part
        try:
            return self._expanded(v)
        finally:
            self.part = before

    def _expanded(self, v):
        known = isinstance(v, Literal) or v not in self.inside
        if known and not self._comes_apart(v):
            return self.factor(v)
        terms = []
        for x in self.flow.summands(v):
            if x is not v:
                terms += self.expand(x)
                continue
            eqn = self.flow.made_by(x)
            if eqn is None or name_of(eqn) not in self.linear or len(eqn.outvars) != 1:
                raise Mismatch(f"{name_of(eqn)} is not known to be a product")
            terms += self.linear[name_of(eqn)](self, eqn)
        return terms

    def _comes_apart(self, v):
        """Tells whether a constant is a product of matrices with fewer entries."""
        eqn = self.flow.made_by(v)
        while name_of(eqn) == TRANSPOSITION:
            eqn = self.flow.made_by(eqn.invars[0])
        return (
            name_of(eqn) == PRODUCT
            and self.part is None
            and not self.flow.varies(v)
            and sum(map(size, eqn.invars)) < size(v)
        )

    def factor(self, v: Any, inverted: bool = False) -> list[Term]:
        """Returns a variable as a factor of its own, or its reciprocal."""
        shape = v.aval.shape
        part = self.part + (INVERTED if inverted else "") if self.part else ""
        steps = (("reciprocal",),) if inverted and not part else ()
        if isinstance(v, Literal) and math.prod(shape) == 1:
            axes = tuple(() for _ in shape)
            x = np.asarray(v.val).reshape(())
            x = PARTS[part](x) if part else 1 / x if inverted else x
            return [Term(float(x), (), axes)] if x != 0 or not part else []
        axes = tuple((self.label(n),) if n != 1 else () for n in shape)
        labels = tuple(label for axis in axes for label in axis)
        kept = tuple(n for n in shape if n != 1)
        steps += (("reshape", kept),) if kept != tuple(shape) else ()
        return [Term(1.0, (Factor(v, labels, self.flow.varies(v), steps, part),), axes)]

    # Changes of one or several terms at once.

    def replace(self, term: Term, old: int, new: tuple[int, ...]) -> Term:
        """Splits a label into others, or renames it."""

        def renamed(labels):
            return tuple(x for y in labels for x in (new if y == old else (y,)))

        factors = []
        for f in term.factors:
            if old in f.labels:
                steps = f.steps
                if len(new) != 1:
                    labels = renamed(f.labels)
                    shape = tuple(self.sizes[x] for x in labels)
                    steps = (*steps, ("reshape", shape))
                f = dataclasses.replace(f, labels=renamed(f.labels), steps=steps)
            factors.append(f)
        axes = tuple(map(renamed, term.axes))
        return dataclasses.replace(term, factors=tuple(factors), axes=axes)

    def identify(self, term: Term, i: int, j: int) -> Term:
        """Gives two axes of a term the same labels."""
        while term.axes[i] != term.axes[j]:
            pairs = itertools.zip_longest(term.axes[i], term.axes[j])
            a, b = next((a, b) for a, b in pairs if a != b)
            if a is None or b is None:
                raise Mismatch("axes of different sizes")
            m, n = self.sizes[a], self.sizes[b]
            if m == n:
                term = self.replace(term, b, (a,))
            elif m % n == 0 and m > n:
                term = self.replace(term, a, (b, self.label(m // n)))
            elif n % m == 0:
                term = self.replace(term, b, (a, self.label(n // m)))
            else:
                raise Mismatch("axes that are cut in different ways")
        return term

    def product(self, a: Any, b: Any, divides: bool = False) -> list[Term]:
        """Returns the terms of an outer product; the axes of `a` first.

        Args:
            a: A variable.
            b: Another one.
            divides: Whether the reciprocal of `b`, which is no sum, is meant.
        """
        pairs = []
        for of_a, of_b, sign in PRODUCT_PARTS[self.part]:
            left = self.expand(a, of_a)
            right = self._reciprocal(b, of_b) if divides else self.expand(b, of_b)
            pairs += [(s, t, sign) for s in left for t in right]
        if len(pairs) > MOST_TERMS:
            raise Mismatch("too many terms")
        return [
            Term(
                sign * s.scale * t.scale,
                s.factors + t.factors,
                s.axes + t.axes,
                s.precision if s.precision is not None else t.precision,
            )
            for s, t, sign in pairs
        ]

    def _reciprocal(self, v, part):
        before, self.part = self.part, part
        try:
            return self.factor(v, inverted=True)
        finally:
            self.part = before

    def joined(self, term: Term, n: int) -> Term:
        """Makes the first n axes of a term one with those that follow, if any do."""
        for d in range(n, len(term.axes)):
            if not term.axes[d - n]:  # Of size one, and stretched.
                axes = list(term.axes)
                axes[d - n] = axes[d]
                term = dataclasses.replace(term, axes=tuple(axes))
            elif term.axes[d]:
                term = self.identify(term, d - n, d)
        return dataclasses.replace(term, axes=term.axes[:n])

    def summed(self, term: Term, dims: Iterable[int]) -> Term:
        """Sums over some axes."""
        dims = set(dims)
        owned = {label for f in term.factors for label in f.labels}
        scale = term.scale
        for d in dims:
            for label in term.axes[d]:
                scale *= 1 if label in owned else self.sizes[label]
        axes = tuple(axis for d, axis in enumerate(term.axes) if d not in dims)
        return dataclasses.replace(term, scale=scale, axes=axes)

    def along(self, term: Term, d: int, n: int, every: bool, step: Callable) -> Term:
        """Changes the factors along an axis, whose size is then `n`.

        Args:
            term: The term.
            d: The axis.
            n: Its size afterwards.
            every: Whether all factors that have the axis are changed, not just one of
                them, which then must be the only one.
            step: Maps the number of an axis of a factor to the step.
        """
        if len(term.axes[d]) > 1:
            raise Mismatch("an axis of several parts is cut")
        if not term.axes[d]:
            # Along an axis of size one.
            term = dataclasses.replace(
                term,
                axes=tuple(
                    (self.label(1),) if k == d else x for k, x in enumerate(term.axes)
                ),
            )
        (old,) = term.axes[d]
        owners = [f for f in term.factors if old in f.labels]
        if not owners:
            if not term.factors:
                raise Mismatch("a number is cut")
            ones = dataclasses.replace(
                term.factors[0],
                labels=(old,),
                varies=False,
                steps=(("ones", (self.sizes[old],)),),
            )
            owners = [ones]
            term = dataclasses.replace(term, factors=(*term.factors, ones))
        if len(owners) > 1 and not every:
            raise Mismatch("an axis of several factors is changed")
        new = self.label(n)

        def changed(f):
            if old not in f.labels:
                return f
            labels = tuple(new if x == old else x for x in f.labels)
            steps = (*f.steps, step(f.labels.index(old)))
            return dataclasses.replace(f, labels=labels, steps=steps)

        axes = tuple((new,) if k == d else axis for k, axis in enumerate(term.axes))
        return dataclasses.replace(
            term, factors=tuple(map(changed, term.factors)), axes=axes
        )

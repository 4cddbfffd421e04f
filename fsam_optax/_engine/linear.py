"""What linear maps make of sums of products: one table, by primitive.

A function of the table takes the expander and the equation, and returns the terms of
its output. What it does not know it leaves by raising `Mismatch`: another rule applies.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import Literal

from fsam_optax._engine.jaxpr import is_real
from fsam_optax._engine.places import is_injective
from fsam_optax._engine.primitives import BARRIER, holds_numbers, SCATTER
from fsam_optax._engine.products import (
    Expander,
    Factor,
    IMAGINARY,
    Mismatch,
    REAL,
    Term,
)
from fsam_optax._engine.sums import precision_of


# What each primitive does to terms: name -> function of the expander and the equation.


def _dot_general(self, eqn):
    (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    a, b = eqn.invars
    offset = len(a.aval.shape)
    terms = []
    for term in self.product(a, b):
        for i, j in [
            *zip(contract_a, contract_b, strict=True),
            *zip(batch_a, batch_b, strict=True),
        ]:
            term = self.identify(term, i, offset + j)
        free = [d for d in range(offset) if d not in (*contract_a, *batch_a)]
        free_b = [
            d for d in range(len(b.aval.shape)) if d not in (*contract_b, *batch_b)
        ]
        order = [*batch_a, *free, *(offset + d for d in free_b)]
        summed = [*contract_a]
        kept = self.summed(
            dataclasses.replace(
                term,
                axes=(*(term.axes[d] for d in order), *(term.axes[d] for d in summed)),
            ),
            range(len(order), len(order) + len(summed)),
        )
        # Asked for where the activations are, or else here.
        asked = precision_of(eqn) if term.precision is None else term.precision
        terms.append(dataclasses.replace(kept, precision=asked))
    return terms


def _mul(self, eqn):
    # A number comes last: it has no axes.
    a, b = sorted(eqn.invars, key=lambda v: -len(v.aval.shape))
    return [self.joined(term, len(a.aval.shape)) for term in self.product(a, b)]


def _div(self, eqn):
    a, b = eqn.invars
    if self.flow.varies(b):
        raise Mismatch("a divisor that varies")
    n = len(a.aval.shape)
    return [self.joined(term, n) for term in self.product(a, b, divides=True)]


def _sub(self, eqn):
    a, b = eqn.invars
    minus = [dataclasses.replace(t, scale=-t.scale) for t in self.expand(b)]
    return self.expand(a) + minus


def _neg(self, eqn):
    return [dataclasses.replace(t, scale=-t.scale) for t in self.expand(eqn.invars[0])]


def _same(self, eqn):
    return self.expand(eqn.invars[0])


def _converted(self, eqn):
    """Of complex numbers to real ones: their real parts."""
    if not holds_numbers(eqn.outvars[0]):
        raise Mismatch("numbers rounded to whole ones")
    return self.expand(eqn.invars[0], REAL if is_real(eqn.outvars[0]) else None)


def _part(part):
    """Returns a rule for primitives that take a part of a complex number."""
    return lambda self, eqn: self.expand(eqn.invars[0], part)


def _complex(self, eqn):
    return self.expand(eqn.invars[self.part == IMAGINARY], REAL)


def _conjugated(self, eqn):
    return _neg(self, eqn) if self.part == IMAGINARY else _same(self, eqn)


def _reduce_sum(self, eqn):
    return [self.summed(t, eqn.params["axes"]) for t in self.expand(eqn.invars[0])]


def _by_axes(axes):
    """Returns a rule for primitives that only rearrange whole axes."""

    def rule(self, eqn):
        return [
            dataclasses.replace(t, axes=axes(self, eqn, t.axes))
            for t in self.expand(eqn.invars[0])
        ]

    return rule


def _broadcast(self, eqn, before):
    after: list[Any] = [None] * len(eqn.params["shape"])
    for d, axis in zip(eqn.params["broadcast_dimensions"], before, strict=True):
        n = math.prod(self.sizes[x] for x in axis)
        after[d] = axis if n == eqn.params["shape"][d] else None
    return tuple(
        axis if axis is not None else ((self.label(n),) if n != 1 else ())
        for axis, n in zip(after, eqn.params["shape"], strict=True)
    )


def _transpose(self, eqn, before):
    return tuple(before[d] for d in eqn.params["permutation"])


def _squeeze(self, eqn, before):
    n = len(before)
    gone = {d % n for d in eqn.params["dimensions"]}
    return tuple(axis for d, axis in enumerate(before) if d not in gone)


def _reshaped(self, eqn):
    if eqn.params.get("dimensions") is not None:
        raise Mismatch("a reshape that transposes")
    terms = []
    for term in self.expand(eqn.invars[0]):
        # The labels of the operand, one after the other, are dealt out to the axes.
        left = [label for axis in term.axes for label in axis]
        axes = []
        for n in eqn.outvars[0].aval.shape:
            axis: tuple[int, ...] = ()
            while n != 1:
                if not left:
                    raise Mismatch("a reshape of another size")
                m = self.sizes[left[0]]
                if n % m == 0:
                    axis, n = (*axis, left.pop(0)), n // m
                elif m % n == 0:
                    parts = self.label(n), self.label(m // n)
                    old = left[0]
                    term = self.replace(term, old, parts)
                    left = [x for y in left for x in (parts if y == old else (y,))]
                    axes = [
                        tuple(x for y in a for x in (parts if y == old else (y,)))
                        for a in axes
                    ]
                else:
                    raise Mismatch("axes that are cut in different ways")
            axes.append(axis)
        if any(self.sizes[x] != 1 for x in left):
            raise Mismatch("a reshape of another size")
        terms.append(dataclasses.replace(term, axes=tuple(axes)))
    return terms


def _rev(self, eqn):
    terms = []
    for term in self.expand(eqn.invars[0]):
        for d in eqn.params["dimensions"]:
            n = eqn.outvars[0].aval.shape[d]
            term = self.along(term, d, n, True, lambda k: ("flip", k))
        terms.append(term)
    return terms


def _sliced(self, eqn):
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    strides = eqn.params["strides"] or (1,) * len(before)
    terms = []
    for term in self.expand(eqn.invars[0]):
        for d, n in enumerate(before):
            start, stop = eqn.params["start_indices"][d], eqn.params["limit_indices"][d]
            if (start, stop, strides[d]) != (0, n, 1):
                cut = start, stop, strides[d]
                term = self.along(
                    term, d, after[d], True, lambda k, cut=cut: ("slice", k, *cut)
                )
        terms.append(term)
    return terms


def _padded(self, eqn):
    if not self.flow.is_zero(eqn.invars[1]):
        raise Mismatch("padded with something else than zeros")
    after = eqn.outvars[0].aval.shape
    terms = []
    for term in self.expand(eqn.invars[0]):
        for d, config in enumerate(eqn.params["padding_config"]):
            if config != (0, 0, 0):
                term = self.along(
                    term,
                    d,
                    after[d],
                    True,
                    lambda k, config=config: ("pad", k, *config),
                )
        terms.append(term)
    return terms


def _concatenated(self, eqn):
    d = eqn.params["dimension"]
    n = eqn.outvars[0].aval.shape[d]
    start, terms = 0, []
    for v in eqn.invars:
        stop = start + v.aval.shape[d]
        config = start, n - stop, 0
        start = stop
        if not self.flow.is_zero(v):
            terms += [
                self.along(
                    term, d, n, True, lambda k, config=config: ("pad", k, *config)
                )
                for term in self.expand(v)
            ]
    return terms


def _selected(self, eqn):
    which, *cases = eqn.invars
    live = [k for k, x in enumerate(cases) if not self.flow.is_zero(x)]
    if self.flow.varies(which):
        raise Mismatch("a choice that differs between examples")
    terms = []
    for case in live:
        n = len(cases[case].aval.shape)
        axes = tuple((self.label(m),) for m in which.aval.shape)
        mask = Factor(which, tuple(x for (x,) in axes), False, (("chosen", case),))
        for t in self.expand(cases[case]):
            term = Term(t.scale, (*t.factors, mask), t.axes + axes, t.precision)
            terms.append(self.joined(term, n) if axes else term)
    return terms


def _taken(self, eqn):
    """Rows at places that are the same for all examples."""
    x, index = eqn.invars
    numbers, shape = eqn.params["dimension_numbers"], x.aval.shape
    if numbers.operand_batching_dims:
        return _taken_of_each(self, eqn)
    axes = numbers.collapsed_slice_dims
    sizes = tuple(1 if d in axes else n for d, n in enumerate(shape))
    if (
        len(axes) != 1
        or tuple(numbers.start_index_map) != tuple(axes)
        or tuple(eqn.params["slice_sizes"]) != sizes
        or len(index.aval.shape) != 2
        or isinstance(index, Literal)
    ):
        raise Mismatch("a gather that is not of whole rows")
    (d,) = axes
    (after,) = set(range(len(shape))) - set(numbers.offset_dims)
    mode = eqn.params["mode"]
    fills = mode == lax.GatherScatterMode.FILL_OR_DROP
    if fills and eqn.params["fill_value"] not in (0, None):
        raise Mismatch("rows filled with something else than zeros")
    if fills and eqn.params["fill_value"] is None:
        raise Mismatch("rows filled with what is no number")
    terms = []
    for t in self.expand(x):
        n = index.aval.shape[0]
        t = self.along(t, d, n, True, lambda k: ("taken", index, k, fills))
        rest = [axis for k, axis in enumerate(t.axes) if k != d]
        rest.insert(after, t.axes[d])
        terms.append(dataclasses.replace(t, axes=tuple(rest)))
    return terms


def _put(self, eqn):
    """Rows put at places of their own that are known: taken there."""
    zeros, index, x = eqn.invars
    numbers, shape = eqn.params["dimension_numbers"], zeros.aval.shape
    axes, windows = numbers.inserted_window_dims, numbers.update_window_dims
    rows = x.aval.shape
    if len(axes) != 1 or len(index.aval.shape) != 2 or not is_injective(self.flow, eqn):
        raise Mismatch("rows that meet, or lie where it is not known")
    (d,) = axes
    (before,) = set(range(len(rows))) - set(windows)
    given = [rows[k] for k in windows]
    given.insert(d, shape[d])
    places = np.full((shape[d], 1), -1)
    places[self.flow.known_value(index)[:, 0], 0] = np.arange(rows[before])
    step = tuple(map(tuple, places.tolist()))
    terms = []
    for t in self.expand(x):
        t = self.along(t, before, shape[d], True, lambda k: ("taken", step, k, True))
        rest = [axis for k, axis in enumerate(t.axes) if k != before]
        rest.insert(d, t.axes[before])
        t = dataclasses.replace(t, axes=tuple(rest))
        for axis, (m, n) in enumerate(zip(given, shape, strict=True)):
            if m != n:  # Of rows that are cut, what is left.
                cut = ("pad", 0, n - m, 0)
                t = self.along(t, axis, n, True, lambda k, c=cut: (c[0], k, *c[1:]))
        terms.append(t)
    return terms


def _taken_of_each(self, eqn):
    """Rows of several matrices, by their permutations: products with zeros and ones."""
    x, index = eqn.invars
    numbers, shape = eqn.params["dimension_numbers"], x.aval.shape
    batch, gone = numbers.operand_batching_dims, numbers.collapsed_slice_dims
    kept = [d for d in range(len(shape)) if d not in (*batch, *gone)]
    sizes = tuple(shape[d] if d in kept else 1 for d in range(len(shape)))
    last = len(index.aval.shape) - 1
    if (
        len(gone) != 1
        or tuple(numbers.start_index_map) != tuple(gone)
        or tuple(eqn.params["slice_sizes"]) != sizes
        or 1 in (*(shape[d] for d in (*batch, *gone)), *index.aval.shape[:last])
        or eqn.params["mode"] != lax.GatherScatterMode.PROMISE_IN_BOUNDS
        or isinstance(index, Literal)
    ):
        raise Mismatch("a gather that is not of whole rows of matrices")
    axes = tuple((self.label(n),) for n in (*index.aval.shape[:last], shape[gone[0]]))
    labels = tuple(x for (x,) in axes)
    places = Factor(index, labels, False, (("places", shape[gone[0]]),))
    n, terms = len(shape), []
    for t in self.expand(x):
        t = Term(t.scale, (*t.factors, places), t.axes + axes, t.precision)
        for d, i in zip(batch, numbers.start_indices_batching_dims, strict=True):
            t = self.identify(t, d, n + i)
        t = self.identify(t, gone[0], n + last)
        of_rows = iter([t.axes[n + i] for i in range(last)])
        of_slices = iter([t.axes[d] for d in kept])
        ndim = len(eqn.outvars[0].aval.shape)
        axes_of = tuple(
            next(of_slices if d in numbers.offset_dims else of_rows)
            for d in range(ndim)
        )
        terms.append(dataclasses.replace(t, axes=axes_of))
    return terms


def _solved(self, eqn):
    """Triangular systems whose matrix is the same for all examples."""
    a, b = eqn.invars
    *batch, n, _ = a.aval.shape
    if self.flow.varies(a) or not is_real(a) or 1 in batch or isinstance(a, Literal):
        raise Mismatch("a system that differs between examples")
    params = eqn.params
    axes = tuple((self.label(m),) for m in (*batch, n, n))
    step = "inverse", params["lower"], params["transpose_a"], params["unit_diagonal"]
    labels = tuple(x for (x,) in axes)
    inverse = Factor(a, labels, False, (step,))
    # Rows and columns of the right side, then those of the inverse.
    many = len(batch)
    row, column, left, right = many, many + 1, 2 * many + 2, 2 * many + 3
    d, k = (row, right) if params["left_side"] else (column, left)
    terms = []
    for t in self.expand(b):
        t = Term(t.scale, (*t.factors, inverse), t.axes + axes, t.precision)
        for i in range(many):
            t = self.identify(t, i, many + 2 + i)
        again = range(many + 2, 2 * many + 2)
        t = self.summed(self.identify(t, d, k), (*again, d, k))
        # The labels of the inverse that are left come last.
        *both, kept, new = t.axes
        last = (new, kept) if params["left_side"] else (kept, new)
        terms.append(dataclasses.replace(t, axes=(*both, *last)))
    return terms


def _cumulated(self, eqn):
    d, reverse = eqn.params["axis"], eqn.params["reverse"]
    n = eqn.outvars[0].aval.shape[d]
    return [
        self.along(t, d, n, False, lambda k: ("cumsum", k, reverse))
        for t in self.expand(eqn.invars[0])
    ]


LINEAR: dict[str, Callable[[Expander, Any], list[Term]]] = {
    "dot_general": _dot_general,
    "mul": _mul,
    "div": _div,
    "sub": _sub,
    "neg": _neg,
    "real": _part(REAL),
    "imag": _part(IMAGINARY),
    "complex": _complex,
    "conj": _conjugated,
    "convert_element_type": _converted,
    BARRIER: _same,
    "copy": _same,
    "copy_p": _same,
    "reduce_sum": _reduce_sum,
    "broadcast_in_dim": _by_axes(_broadcast),
    "transpose": _by_axes(_transpose),
    "squeeze": _by_axes(_squeeze),
    "reshape": _reshaped,
    "rev": _rev,
    "slice": _sliced,
    "pad": _padded,
    "concatenate": _concatenated,
    "select_n": _selected,
    "gather": _taken,
    SCATTER: _put,
    "triangular_solve": _solved,
    "cumsum": _cumulated,
}

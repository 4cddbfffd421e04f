"""Values without their axes of size one.

A model for batches meets one example as a batch of one. Mapped over examples, all its
values would have an axis too many, which XLA:CPU pays for with copies, and every
product with an operation before and after it that has to be compiled.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from fsam_optax._engine.jaxpr import bind
from fsam_optax._engine.normal import constrained_but
from fsam_optax._engine.primitives import (
    CONSTRAINT,
    ELEMENTWISE,
    name_of,
    REDUCTIONS,
)


class Value:
    """An array, with all of its axes and without those of size one.

    Attributes:
        shape: Its shape, with all axes.
        forms: The arrays that there are, by whether they are thin.
        ways: How those are made that are to be had from as many operations.
    """

    def __init__(self, shape: Sequence[int], **forms: Any):
        """Takes what is known of it: `full` and `thin`, arrays or functions to them."""
        self.shape = tuple(shape)
        self.forms = {k: x for k, x in forms.items() if not callable(x)}
        self.ways = {k: x for k, x in forms.items() if callable(x)}

    def has(self, form: str) -> bool:
        """Tells whether a form is to be had without another operation."""
        return 1 not in self.shape or form in self.forms or form in self.ways

    def take(self, form: str) -> Any:
        """Returns the array, `full` or `thin`."""
        if 1 not in self.shape:
            form = next(iter((*self.forms, *self.ways)))
        if form not in self.forms:
            (other,) = {"full", "thin"} - {form}
            shape = self.shape if form == "full" else thin(self.shape)
            way = self.ways.get(form) or (lambda: lax.reshape(self.take(other), shape))
            self.forms[form] = way()
        return self.forms[form]

    def shaped(self, shape: Sequence[int]) -> Any:
        """Returns the entries in another shape, as they are if a form has that."""
        forms = [form for form in ("thin", "full") if self.has(form)]
        shapes = {"thin": thin(self.shape), "full": self.shape}
        found = [form for form in forms if shapes[form] == shape]
        return self.take(found[0]) if found else lax.reshape(self.take(forms[0]), shape)


def full(x: Any) -> Value:
    """Returns an array as a value."""
    return Value(np.shape(x), full=x)


def without_ones(x: Any, shape: Sequence[int]) -> Value:
    """Returns an array, which has not all axes of size one, as a value of a shape."""
    if x.shape == thin(shape):
        return Value(shape, thin=x)
    return full(lax.reshape(x, shape))


def thin(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns a shape without axes of size one."""
    return tuple(n for n in shape if n != 1)


def thinned(eqn: Any, values: Sequence[Value]) -> list[Value] | None:
    """Evaluates an equation without axes of size one; None where they are needed."""
    rule = THIN.get(name_of(eqn))
    shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
    if rule is None or not any(1 in shape for shape in shapes):
        return None
    if rule is not _constrained and eqn.params.get("sharding") is not None:
        return None
    found = rule(eqn, *values)
    return None if found is None else [found]


def _places(shape):
    """Returns, by axis that is not of size one, its number among those."""
    return {d: i for i, d in enumerate(d for d, n in enumerate(shape) if n != 1)}


def _elementwise(eqn, *values):
    shape = eqn.outvars[0].aval.shape
    given = [x for x in values if x.shape]
    if not all(x.has("thin") for x in given) and all(x.has("full") for x in given):
        return full(bind(eqn, [x.take("full") for x in values])[0])
    # An operand may have other axes of size one, along which it is the same.
    operands = [
        x.shaped(tuple(n for n, m in zip(x.shape, shape, strict=True) if m != 1))
        if x.shape
        else x.take("full")
        for x in values
    ]
    return Value(shape, thin=bind(eqn, operands)[0])


def _same_entries(eqn, x):
    shape = eqn.outvars[0].aval.shape
    return Value(
        shape, full=lambda: x.shaped(shape), thin=lambda: x.shaped(thin(shape))
    )


def _if_given(eqn, x, way):
    """Returns a value in the forms that the operand is given in."""
    ways = {"full": lambda: bind(eqn, [x.take("full")])[0], "thin": way}
    return Value(
        eqn.outvars[0].aval.shape, **{k: y for k, y in ways.items() if x.has(k)}
    )


def _reshape(eqn, x):
    in_order = eqn.params["dimensions"] is None
    return _same_entries(eqn, x) if in_order else None


def _broadcast(eqn, x, *sizes):
    shape, axes = eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    places = _places(shape)
    kept = [places[axes[d]] for d in _places(x.shape)]

    def way():
        y = x.take("thin")
        same = len(kept) == len(places)
        return y if same else lax.broadcast_in_dim(y, thin(shape), kept)

    return _if_given(eqn, x, way)


def _transpose(eqn, x):
    places = _places(x.shape)
    order = [places[d] for d in eqn.params["permutation"] if d in places]

    def way():
        y = x.take("thin")
        return y if order == sorted(order) else lax.transpose(y, order)

    return _if_given(eqn, x, way)


def _reduction(eqn, x):
    if eqn.params.get("out_sharding") is not None:
        return None
    places = _places(x.shape)
    axes = tuple(places[d] for d in eqn.params["axes"] if d in places)
    if not axes:
        return _same_entries(eqn, x)
    if not x.has("thin"):
        return full(bind(eqn, [x.take("full")])[0])
    new = eqn.replace(params={**eqn.params, "axes": axes})
    return Value(eqn.outvars[0].aval.shape, thin=bind(new, [x.take("thin")])[0])


def _product(eqn, a, b):
    params = eqn.params
    (contract_a, contract_b), (batch_a, batch_b) = params["dimension_numbers"]

    def among(axes, x):
        places = _places(x.shape)
        return tuple(places[d] for d in axes if d in places)

    contract = among(contract_a, a), among(contract_b, b)
    numbers = contract, (among(batch_a, a), among(batch_b, b))
    new = {**params, "dimension_numbers": numbers, "out_sharding": None}
    new = eqn.replace(params={name: new[name] for name in params})
    (y,) = bind(new, [a.take("thin"), b.take("thin")])
    return Value(eqn.outvars[0].aval.shape, thin=y)


def _constrained(eqn, x):
    named = isinstance(eqn.params["sharding"], NamedSharding)
    if not named or not x.has("thin"):
        return None
    return Value(x.shape, thin=constrained_but(eqn, x.take("thin"), set()))


# How an equation is evaluated on values: name -> function of it and its operands.
THIN: dict[str, Callable[..., Any]] = (
    dict.fromkeys(ELEMENTWISE, _elementwise)
    | dict.fromkeys(REDUCTIONS, _reduction)
    | {
        "broadcast_in_dim": _broadcast,
        "dot_general": _product,
        "reshape": _reshape,
        CONSTRAINT: _constrained,
        "squeeze": _same_entries,
        "transpose": _transpose,
    }
)

"""Operations of a program, counted from its equations.

Products and convolutions count two for each multiplication, a loop its body as often as
it runs, and everything that is not just a rearrangement one for each entry.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

from fsam_optax._engine.jaxpr import body_of, size
from fsam_optax._engine.primitives import name_of


# What a loop over examples writes for each entry of a gradient waits for memory.
IN_LOOPS = 6.0


def operations(eqn: Any) -> float:
    """Returns the operations of one equation."""
    name = name_of(eqn)
    if name in COUNTS:
        return COUNTS[name](eqn)
    bodies = [
        getattr(x, "jaxpr", x)
        for value in eqn.params.values()
        for x in (value if isinstance(value, tuple | list) else (value,))
        if hasattr(getattr(x, "jaxpr", x), "eqns")
    ]
    if bodies:
        return max(total(body.eqns) for body in bodies)
    return float(sum(size(v) for v in eqn.outvars))


def total(eqns: Iterable[Any]) -> float:
    """Returns the operations of several equations."""
    return sum(map(operations, eqns), 0.0)


def _product(eqn):
    shape = eqn.invars[0].aval.shape
    summed = math.prod(shape[d] for d in eqn.params["dimension_numbers"][0][0])
    return 2.0 * summed * size(eqn.outvars[0])


def _ragged_product(eqn):
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), _ = numbers.dot_dimension_numbers
    shape = eqn.invars[0].aval.shape
    summed = math.prod(shape[d] for d in contract)
    if set(numbers.lhs_ragged_dimensions) & set(contract):
        # The groups share out the rows.
        summed /= size(eqn.invars[2])
    return 2.0 * summed * size(eqn.outvars[0])


def _convolution(eqn):
    rhs = eqn.invars[1].aval.shape
    spec = eqn.params["dimension_numbers"].rhs_spec
    return 2.0 * size(eqn.outvars[0]) * math.prod(rhs[d] for d in spec[1:])


def _operand(eqn):
    return float(size(eqn.invars[0]))


def _update(eqn):
    return float(size(eqn.invars[-1]))


def _sorting(eqn):
    n = eqn.invars[0].aval.shape[eqn.params["dimension"]]
    return size(eqn.invars[0]) * max(1.0, math.log2(max(n, 1)))


def _transform(eqn):
    n = math.prod(eqn.params["fft_lengths"])
    return 5.0 * max(map(size, (*eqn.invars, *eqn.outvars))) * math.log2(max(n, 2))


def _scan(eqn):
    body, _ = body_of(eqn)
    return eqn.params["length"] * total(body.eqns)


def _nothing(eqn):
    del eqn
    return 0.0


COUNTS: dict[str, Callable[[Any], float]] = (
    {
        "dot_general": _product,
        "ragged_dot_general": _ragged_product,
        "conv_general_dilated": _convolution,
        "scan": _scan,
        "sort": _sorting,
        "fft": _transform,
        "scatter-add": _update,
        "scatter": _update,
        "scatter-min": _update,
        "scatter-max": _update,
        "scatter-mul": _update,
        "dynamic_update_slice": lambda eqn: float(size(eqn.invars[1])),
    }
    | dict.fromkeys(
        (
            "reduce_sum",
            "reduce_max",
            "reduce_min",
            "reduce_prod",
            "reduce_and",
            "argmax",
        ),
        _operand,
    )
    | dict.fromkeys(
        (
            "broadcast_in_dim",
            "convert_element_type",
            "copy",
            "copy_p",
            "expand_dims",
            "iota",
            "optimization_barrier",
            "reshape",
            "rev",
            "sharding_constraint",
            "slice",
            "split",
            "squeeze",
            "stop_gradient",
            "transpose",
        ),
        _nothing,
    )
)

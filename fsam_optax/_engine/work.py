"""Operations of a program, counted from its equations.

Products and convolutions count two for each multiplication, a loop its body as often as
it runs, and everything that is not just a rearrangement one for each entry. Complex
numbers are pairs of real ones.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from fsam_optax._engine.jaxpr import body_of, size
from fsam_optax._engine.primitives import name_of


# What a loop over examples writes for each entry of a gradient waits for memory.
IN_LOOPS = 6.0
RARE = "for_each_example"  # A function that runs where digits would be lost.


def operations(eqn: Any) -> float:
    """Returns the operations of one equation."""
    name = name_of(eqn)
    if name in COUNTS:
        return COUNTS[name](eqn) * _real_operations(eqn, PAIRED.get(name, 2.0))
    if eqn.params.get("name") == RARE:
        return 0.0
    bodies = [
        getattr(x, "jaxpr", x)
        for value in eqn.params.values()
        for x in (value if isinstance(value, tuple | list) else (value,))
        if hasattr(getattr(x, "jaxpr", x), "eqns")
    ]
    if bodies:
        return max(total(body.eqns) for body in bodies)
    number = float(sum(size(v) for v in eqn.outvars))
    return number * _real_operations(eqn, PAIRED.get(name, 2.0))


def _real_operations(eqn, of_pairs):
    """Returns how many operations of real numbers one of complex numbers counts."""
    dtypes = [v.aval.dtype for v in eqn.outvars]
    return (
        of_pairs if any(jnp.issubdtype(x, jnp.complexfloating) for x in dtypes) else 1.0
    )


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


def _cubic(factor):
    """Returns the count of what takes so many operations for each entry and row."""
    return lambda eqn: factor * size(eqn.invars[0]) * eqn.invars[0].aval.shape[-1]


def _substitution(eqn):
    # Half of the matrix is zero.
    return float(size(eqn.invars[1]) * eqn.invars[0].aval.shape[-1])


def _scan(eqn):
    body, _ = body_of(eqn)
    return eqn.params["length"] * total(body.eqns)


def _nothing(eqn):
    del eqn
    return 0.0


# Where an operation of complex numbers is not one for each of the two parts.
PAIRED = {
    "dot_general": 4.0,
    "ragged_dot_general": 4.0,
    "conv_general_dilated": 4.0,
    "triangular_solve": 4.0,
    "mul": 6.0,
    "div": 9.0,
    "complex": 0.0,
    "scan": 1.0,
    "fft": 1.0,
}

COUNTS: dict[str, Callable[[Any], float]] = (
    {
        "dot_general": _product,
        "ragged_dot_general": _ragged_product,
        "conv_general_dilated": _convolution,
        "scan": _scan,
        "sort": _sorting,
        "fft": _transform,
        "triangular_solve": _substitution,
        "cholesky": _cubic(1 / 3),
        "lu": _cubic(2 / 3),
        "geqrf": _cubic(4 / 3),
        "householder_product": _cubic(4 / 3),
        "eigh": _cubic(9.0),
        "svd": _cubic(12.0),
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
            "imag",
            "iota",
            "optimization_barrier",
            "real",
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

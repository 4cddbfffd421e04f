"""Equations in the form in which compilers run them fast, wherever they stand."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from fsam_optax._engine.jaxpr import as_function, bind, with_equations
from fsam_optax._engine.primitives import CONVOLUTION, name_of


def bound(eqn: Any, values: list[Any]) -> list[Any]:
    """Evaluates one equation, a convolution with its channels last.

    XLA:CPU brings convolutions into the one form that it runs fast, but not those in
    loops, which take three times as long otherwise, channels first eighty times.
    """
    if name_of(eqn) != CONVOLUTION:
        return bind(eqn, values)
    numbers = eqn.params["dimension_numbers"]
    n = len(numbers.lhs_spec)
    data = (0, n - 1, *range(1, n - 1))
    last = lax.ConvDimensionNumbers(data, (n - 1, n - 2, *range(n - 2)), data)
    eqn = _naming_no_axes(eqn)
    if numbers == last:
        return bind(eqn, values)
    x, kernel = values
    batch, channels, *space = numbers.lhs_spec
    features, rows, *taps = numbers.rhs_spec
    (y,) = bind(
        eqn.replace(params={**eqn.params, "dimension_numbers": last}),
        [
            lax.transpose(x, (batch, *space, channels)),
            lax.transpose(kernel, (*taps, rows, features)),
        ],
    )
    batch, channels, *space = numbers.out_spec
    order = (batch, *space, channels)
    return [lax.transpose(y, [order.index(d) for d in range(n)])]


def mappable(fn: Callable, like: jax.Array) -> Callable:
    """Returns a function from array to array whose convolutions jax can map."""
    closed = jax.make_jaxpr(fn)(like)
    run = as_function(with_equations(closed, CONVOLUTION, _naming_no_axes))
    return lambda x: run(x)[0]


def _naming_no_axes(eqn):
    """Leaves axes to the compiler: jax 0.7 maps no convolution that names one."""
    if "out_sharding" not in eqn.params:
        return eqn
    return eqn.replace(params={**eqn.params, "out_sharding": None})

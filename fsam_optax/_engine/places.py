"""Entries that are put at places that are known, by scatters and by convolutions.

Where a weight is cut into patches by a convolution, as the rows of a Toeplitz matrix
are, the kernel is zeros and ones, and the gradient of the weight adds up entries at
places that are known: rows of an embedding, not products for each example.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax

from fsam_optax._engine.jaxpr import Dataflow, size
from fsam_optax._engine.primitives import CONVOLUTION, name_of


MOST_PLACES = 1 << 22


def scattered(flow: Dataflow, eqn: Any, inside: set[Any]) -> Callable | None:
    """Returns the function of its operands that scatters; None if the equation cannot.

    Args:
        flow: The program.
        eqn: The equation.
        inside: See `parameter_side`.
    """
    if name_of(eqn) != CONVOLUTION or not flow.varies(eqn.invars[0]):
        return None
    x, kernel = eqn.invars
    known = flow.known_value(kernel) if x in inside else None
    if known is None or not np.all((known == 0) | (known == 1)):
        return None
    places = _places(eqn, known)
    if places is None:
        return None
    spec = eqn.params["dimension_numbers"]
    out = eqn.outvars[0].aval
    shape = tuple(out.shape[d] for d in spec.out_spec)

    def scatter(values):
        rows = lax.transpose(values[0].astype(out.dtype), spec.lhs_spec)
        numbers = lax.ScatterDimensionNumbers((), (0,), (0,))
        y = lax.scatter_add(
            lax.full((size(eqn.outvars[0]),), 0, out.dtype),
            places[..., None],
            rows,
            numbers,
            mode=lax.GatherScatterMode.FILL_OR_DROP,
        )
        return [lax.transpose(y.reshape(shape), np.argsort(spec.out_spec))]

    return scatter


def _places(eqn, kernel):
    """Returns where each entry goes; None if one goes to several places.

    With batch and features first in both. One that goes nowhere is out of bounds.
    """
    params = eqn.params
    spec = params["dimension_numbers"]
    before = tuple(eqn.invars[0].aval.shape[d] for d in spec.lhs_spec)
    after = tuple(eqn.outvars[0].aval.shape[d] for d in spec.out_spec)
    features, channels, *taps = np.nonzero(np.transpose(kernel, spec.rhs_spec))
    reads = len(features) * after[0] * math.prod(after[2:])
    if params["batch_group_count"] > 1 or max(reads, math.prod(before)) > MOST_PLACES:
        return None
    groups = params["feature_group_count"]
    channels = channels + features // (after[1] // groups) * (before[1] // groups)
    # The axes are: entries of the kernel, the batch, the axes of space.
    n = len(after)

    def along(values, axis):
        return np.reshape(values, [-1 if d == axis else 1 for d in range(n)])

    batch = along(np.arange(after[0]), 1)
    source, target = [batch, along(channels, 0)], [batch, along(features, 0)]
    inside: Any = True
    for d, tap in enumerate(taps):
        steps = np.arange(after[2 + d])
        place = along(steps * params["window_strides"][d], 2 + d)
        place = place + along(tap * params["rhs_dilation"][d], 0)
        place, between = np.divmod(
            place - params["padding"][d][0], params["lhs_dilation"][d]
        )
        within = (between == 0) & (place >= 0) & (place < before[2 + d])
        inside = inside & within
        source.append(np.where(within, place, 0))
        target.append(along(steps, 2 + d))
    grid = (len(features), after[0], *after[2:])
    inside = np.broadcast_to(inside, grid)
    source, target = (
        np.broadcast_to(np.ravel_multi_index(np.broadcast_arrays(*x), shape), grid)
        for x, shape in ((source, before), (target, after))
    )
    source, target = source[inside], target[inside]
    if len(np.unique(source)) < len(source):
        return None
    places = np.full(math.prod(before), math.prod(after), np.int32)
    places[source] = target
    return places.reshape(before)


def is_injective(flow: Dataflow, eqn: Any) -> bool:
    """Tells whether a scatter puts every entry at a place of its own, all known."""
    index = flow.known_value(eqn.invars[1])
    numbers = eqn.params["dimension_numbers"]
    if (
        index is None
        or not flow.is_zero(eqn.invars[0])
        or numbers.operand_batching_dims
        or tuple(sorted(numbers.scatter_dims_to_operand_dims))
        != tuple(numbers.inserted_window_dims)
    ):
        return False
    bounds = np.array(
        [eqn.outvars[0].aval.shape[d] for d in numbers.scatter_dims_to_operand_dims]
    )
    rows = index.reshape(-1, index.shape[-1]).astype(np.int64)
    inside = np.all((rows >= 0) & (rows < bounds[None]))
    flat = np.ravel_multi_index(tuple(rows.T), tuple(bounds)) if inside else rows
    return bool(inside) and len(np.unique(flat)) == math.prod(index.shape[:-1])

"""How primitives are written so that they are recognised later: one table."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from fsam_optax._engine.jaxpr import bind, Dataflow
from fsam_optax._engine.primitives import CONTRACTIONS, LINEAR_MOVES, name_of


def as_it_is(flow: Dataflow, eqn: Any, values: list[Any]) -> list[Any]:
    """Evaluates an equation unchanged."""
    del flow
    return bind(eqn, values)


def _product(flow, eqn, values):
    """Evaluates a matrix product without the axes of size one.

    A model for batches meets one example as a batch of one. Mapped over examples, its
    products would have an axis too many, which XLA:CPU pays for with copies.
    """
    del flow
    a, g = values
    (contract_a, contract_g), (batch_a, batch_g) = eqn.params["dimension_numbers"]

    def thin(x, contract, batch):
        drop = [d for d in range(x.ndim) if x.shape[d] == 1 and d not in batch]
        kept = [d for d in range(x.ndim) if d not in drop]
        contract = [kept.index(d) for d in contract if d in kept]
        return lax.squeeze(x, drop), contract, [kept.index(d) for d in batch]

    a, contract_a, batch_a = thin(a, contract_a, batch_a)
    g, contract_g, batch_g = thin(g, contract_g, batch_g)
    y = lax.dot_general(
        a,
        g,
        ((contract_a, contract_g), (batch_a, batch_g)),
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    return [y.reshape(eqn.outvars[0].aval.shape)]


def _is_one_row(flow, eqn):
    """Tells whether something is put at an index into zeros, as for one token.

    At an index that all examples share it may be the gradient of one layer of several.
    """
    zeros, rows, *start = eqn.invars
    whole = all(
        n in (1, m) for n, m in zip(rows.aval.shape, zeros.aval.shape, strict=True)
    )
    below, _ = without_moves(flow, rows)
    return (
        flow.is_zero(zeros)
        and whole
        and (any(map(flow.varies, start)) or name_of(below) not in CONTRACTIONS)
    )


def _row(flow, eqn, values):
    """Evaluates such an update as what several tokens would give."""
    if not _is_one_row(flow, eqn):
        return bind(eqn, values)
    zeros, rows, *start = values
    indexed = tuple(d for d, n in enumerate(rows.shape) if n != zeros.shape[d])
    window = tuple(range(1, 1 + rows.ndim - len(indexed)))
    index = [start[d] for d in indexed]
    y = lax.scatter_add(
        zeros,
        jnp.stack(index)[None] if index else jnp.zeros((1, 0), jnp.int32),
        lax.squeeze(rows, indexed)[None],
        lax.ScatterDimensionNumbers(window, indexed, indexed),
        mode=lax.GatherScatterMode.CLIP,
    )
    return [y]


def _rows_of_tables(flow, eqn, values):
    """Evaluates a scatter into several tables as one into a table of one axis more."""
    numbers = eqn.params["dimension_numbers"]
    batch = numbers.operand_batching_dims
    if not batch:
        return as_it_is(flow, eqn, values)
    tables, index, rows = values
    if jnp.iinfo(index.dtype).bits < 32:
        index = index.astype(jnp.int32)
    shape = (*index.shape[:-1], 1)
    which = [
        lax.broadcasted_iota(index.dtype, shape, d)
        for d in numbers.scatter_indices_batching_dims
    ]
    y = lax.scatter_add(
        tables,
        jnp.concatenate([*which, index], -1),
        rows,
        lax.ScatterDimensionNumbers(
            numbers.update_window_dims,
            tuple(sorted((*numbers.inserted_window_dims, *batch))),
            (*batch, *numbers.scatter_dims_to_operand_dims),
        ),
        unique_indices=eqn.params["unique_indices"],
        mode=eqn.params["mode"],
    )
    return [y]


# How a primitive is written to be recognised later: name -> function of the program,
# the equation and the values of its operands.
NORMAL: dict[str, Callable] = {
    "dot_general": _product,
    "dynamic_update_slice": _row,
    "scatter-add": _rows_of_tables,
}


def without_moves(flow: Dataflow, v: Any) -> tuple[Any, list[Any]]:
    """Returns the equation below the moves on top of `v`, and what they produce."""
    moved, eqn = [], flow.made_by(v)
    while eqn and (name_of(eqn) in LINEAR_MOVES or _pads_with_zeros(eqn)):
        moved.append(v)
        (v, *_) = eqn.invars
        eqn = flow.made_by(v)
    return eqn, moved


def _pads_with_zeros(eqn):
    return (
        name_of(eqn) == "pad"
        and isinstance(eqn.invars[1], Literal)
        and not np.any(eqn.invars[1].val)
    )

"""How primitives are written so that they are recognised later: one table."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from fsam_optax._engine.jaxpr import bind, Dataflow
from fsam_optax._engine.primitives import BARRIER, CONTRACTIONS, is_move, name_of


def as_it_is(flow: Dataflow, eqn: Any, values: list[Any]) -> list[Any]:
    """Evaluates an equation unchanged."""
    del flow
    return bind(eqn, values)


def _is_one_row(flow, eqn):
    """Tells whether something is put at an index into zeros, as for one token.

    At an index that all examples share it may be the gradient of one layer of several.
    """
    zeros, rows, *start = eqn.invars
    whole = all(
        n in (1, m) for n, m in zip(rows.aval.shape, zeros.aval.shape, strict=True)
    )
    below, _ = without_moves(flow, rows)
    differs = any(map(flow.varies, start))
    return flow.is_zero(zeros) and (
        differs or (whole and name_of(below) not in CONTRACTIONS)
    )


def _row(flow, eqn, values):
    """Evaluates such an update as what several tokens would give."""
    if not _is_one_row(flow, eqn):
        return bind(eqn, values)
    zeros, rows, *start = values
    indexed = tuple(d for d, n in enumerate(rows.shape) if n != zeros.shape[d])
    window = tuple(d for d in range(rows.ndim) if d not in indexed)
    index = [jnp.asarray(start[d], jnp.int32) for d in indexed]
    y = windows_by_rows(
        zeros,
        jnp.stack(index) if index else jnp.zeros(0, jnp.int32),
        rows,
        lax.ScatterDimensionNumbers(tuple(range(rows.ndim)), (), indexed),
        lax.GatherScatterMode.CLIP,
        (*indexed, *window),
    )
    return [y]


def windows_by_rows(zeros, index, rows, numbers, mode, dims):
    """Scatters windows of several rows as so many rows; `dims` are split if indexed."""
    shape, clips = zeros.shape, mode == lax.GatherScatterMode.CLIP
    kept = [d for d in range(len(shape)) if d not in numbers.inserted_window_dims]
    axes = dict(zip(kept, numbers.update_window_dims, strict=True))
    columns = {d: k for k, d in enumerate(numbers.scatter_dims_to_operand_dims)}
    split = [d for d in dims if d in columns and d in axes]
    size = {d: rows.shape[axes[d]] for d in split}
    last = jnp.array([shape[d] - size.get(d, 1) for d in columns] or [0], index.dtype)[
        : len(columns)
    ]
    last = last.reshape((1,) * (index.ndim - 1) + (-1,))
    inside = jnp.all((index >= 0) & (index <= last), -1)
    index = jnp.clip(index, jnp.zeros_like(last), last) if clips and split else index
    lead = index.ndim - 1
    index = jnp.expand_dims(index, range(lead, lead + len(split)))
    for k, d in enumerate(split):
        steps = lax.broadcasted_iota(
            index.dtype,
            (*(size[x] for x in split[: k + 1]), *index.shape[lead + k + 1 :]),
            k,
        )
        column = np.arange(len(columns)) == columns[d]
        step = steps * jnp.asarray(column, index.dtype).reshape(
            (1,) * (steps.ndim - 1) + (-1,)
        )
        shape_of_step = (1,) * lead + step.shape
        index = index + step.reshape(shape_of_step)
    if split and not clips:
        # All of a window is dropped, if it is not all within bounds.
        whole = jnp.expand_dims(inside, range(lead, lead + len(split) + 1))
        index = jnp.where(whole, index, jnp.full_like(index, -1))
    rest = [axes[d] for d in kept if d not in split]
    front = [a for a in range(rows.ndim) if a not in axes.values()]
    rows = jnp.transpose(rows, [*front, *(axes[d] for d in split), *rest])
    return lax.scatter_add(
        zeros,
        index,
        rows,
        lax.ScatterDimensionNumbers(
            tuple(range(rows.ndim - len(rest), rows.ndim)),
            tuple(sorted((*numbers.inserted_window_dims, *split))),
            numbers.scatter_dims_to_operand_dims,
        ),
        mode=mode,
    )


def _rows_of_tables(flow, eqn, values):
    """Evaluates a scatter of windows, or into several tables, as one of rows."""
    numbers = eqn.params["dimension_numbers"]
    tables, index, rows = values
    batch = numbers.operand_batching_dims
    several = (
        _split(tables.shape, rows.shape, numbers) if flow.varies(eqn.invars[1]) else []
    )
    if not batch and not several:
        return as_it_is(flow, eqn, values)
    if jnp.iinfo(index.dtype).bits < 32:
        index = index.astype(jnp.int32)
    shape = (*index.shape[:-1], 1)
    which = [
        lax.broadcasted_iota(index.dtype, shape, d)
        for d in numbers.scatter_indices_batching_dims
    ]
    index = jnp.concatenate([*which, index], -1) if which else index
    numbers = lax.ScatterDimensionNumbers(
        numbers.update_window_dims,
        tuple(sorted((*numbers.inserted_window_dims, *batch))),
        (*batch, *numbers.scatter_dims_to_operand_dims),
    )
    mode = eqn.params["mode"]
    return [windows_by_rows(tables, index, rows, numbers, mode, several)]


def _split(shape, rows, numbers):
    """Returns the axes that are indexed by windows of several rows, but not of all."""
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [d for d in range(len(shape)) if d not in gone]
    axes = dict(zip(kept, numbers.update_window_dims, strict=True))
    indexed = numbers.scatter_dims_to_operand_dims
    return [d for d in kept if d in indexed and 1 < rows[axes[d]] < shape[d]]


def _stack(flow, eqn, values):
    del flow
    axis = eqn.params["axis"]
    return [lax.concatenate([lax.expand_dims(x, [axis]) for x in values], axis)]


def _unstack(flow, eqn, values):
    del flow
    (x,), axis = values, eqn.params["axis"]
    return [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]


def _split_apart(flow, eqn, values):
    del flow
    (x,), axis, start = values, eqn.params["axis"], 0
    return [
        lax.slice_in_dim(x, start, start := start + n, axis=axis)
        for n in eqn.params["sizes"]
    ]


def _tile(flow, eqn, values):
    del flow
    (x,), reps = values, eqn.params["reps"]
    shape = [n for pair in zip(reps, x.shape, strict=True) for n in pair]
    x = lax.broadcast_in_dim(x, shape, range(1, 2 * x.ndim, 2))
    return [x.reshape(eqn.outvars[0].aval.shape)]


def _constrained(flow, eqn, values):
    """Keeps to the shardings that a model asks for, but not of axes of size one.

    What the model takes for its batch is one example, and the batch, which is mapped
    over, lies on the devices that the model wants it on.
    """
    (x,) = values
    if not flow.varies(eqn.invars[0]):
        return bind(eqn, values)
    return [constrained_but(eqn, x, {d for d, n in enumerate(x.shape) if n == 1})]


def constrained_but(eqn: Any, x: jax.Array, free: set[int]) -> jax.Array:
    """Evaluates a constraint of shardings, of all axes but those that are free.

    The array may lack those of size one, if the sharding is by names.
    """
    sharding, shape = eqn.params["sharding"], eqn.outvars[0].aval.shape
    if not isinstance(sharding, NamedSharding):
        return bind(eqn, [x])[0]
    spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    free = free | set(eqn.params["unconstrained_dims"])
    spec = [PartitionSpec.UNCONSTRAINED if d in free else s for d, s in enumerate(spec)]
    if x.ndim < len(shape):
        spec = [s for s, n in zip(spec, shape, strict=True) if n != 1]
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return lax.with_sharding_constraint(x, sharding)


def _barriers(flow, eqn, values):
    """Holds each operand by itself: gradients of weights pass one after the other."""
    del flow, eqn
    return [lax.optimization_barrier(x) for x in values]


def _set_to_zero(flow, eqn, values):
    """Evaluates the derivative of what is set at places as a choice."""
    x, index, rows = eqn.invars
    if not flow.varies(x) or flow.varies(index) or not flow.is_zero(rows):
        return as_it_is(flow, eqn, values)
    kept = bind(eqn, [jnp.ones_like(values[0]), *values[1:]])[0]
    return [lax.select(kept != 0, values[0], jnp.zeros_like(values[0]))]


def _multiplied_at(flow, eqn, values):
    """Evaluates the derivative of what is multiplied at places as a product."""
    if not flow.varies(eqn.invars[0]) or any(map(flow.varies, eqn.invars[1:])):
        return as_it_is(flow, eqn, values)
    return [values[0] * bind(eqn, [jnp.ones_like(values[0]), *values[1:]])[0]]


# How a primitive is written to be recognised later: name -> function of the program,
# the equation and the values of its operands.
NORMAL: dict[str, Callable] = {
    BARRIER: _barriers,
    "scatter": _set_to_zero,
    "scatter-mul": _multiplied_at,
    "sharding_constraint": _constrained,
    "dynamic_update_slice": _row,
    "scatter-add": _rows_of_tables,
    "split": _split_apart,
    "stack": _stack,
    "tile": _tile,
    "unstack": _unstack,
}


def without_moves(flow: Dataflow, v: Any) -> tuple[Any, list[Any]]:
    """Returns the equation below the moves on top of `v`, and what they produce."""
    moved, eqn = [], flow.made_by(v)
    while eqn and moves_or_pads(eqn):
        moved.append(v)
        (v, *_) = eqn.invars
        eqn = flow.made_by(v)
    return eqn, moved


def moves_or_pads(eqn: Any) -> bool:
    """Tells whether an equation only rearranges entries, among zeros at most."""
    return is_move(eqn) or (
        name_of(eqn) == "pad"
        and isinstance(eqn.invars[1], Literal)
        and not np.any(eqn.invars[1].val)
    )

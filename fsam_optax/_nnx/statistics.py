"""What the parts of a batch leave in a module: weighted as their gradients are."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fsam_optax._common.mapped_axes import AxisName, is_mean, merge, merge_stacked
from fsam_optax._fisher.negative_log_likelihood import total_weight
from fsam_optax._nnx.likelihood import ModuleLoss
from fsam_optax._nnx.modules import Call, held
from fsam_optax._step.parts import cut


def merged_changes(
    loss_fn: Any,
    call: Call,
    batch: Any,
    changes: Any,
    micro_batches: int | None,
    axis_name: AxisName,
) -> Any:
    """Returns one set of changed variables, of those that each part has left.

    Floating-point variables are averaged, weighted by the labels of the parts where the
    loss knows them. A part of weight 0 changes none of them.

    Args:
        loss_fn: The loss.
        call: The call, with what the variables held before it.
        batch: The batch, of this device.
        changes: The variables; stacked, with `micro_batches`.
        micro_batches: Number of parts into which the batch was cut; None for one.
        axis_name: Mapped axes whose devices hold parts.
    """
    weights = _weights(loss_fn, call, batch, micro_batches)
    before = _before(call, changes, micro_batches is not None)
    if micro_batches is not None:
        changes = merge_stacked(changes, weights, before)
    total = jnp.sum(weights)

    def keep(x, old):
        return jnp.where(total == 0, old, x) if is_mean(x) else x

    changes = jax.tree.map(keep, changes, before)
    return merge(changes, axis_name, total, before)


def _weights(loss_fn, call, batch, micro_batches) -> jax.Array:
    """Returns the weight of each micro-batch."""
    if not isinstance(loss_fn, ModuleLoss):
        return jnp.ones([micro_batches or 1])

    def weight(part):
        return total_weight(loss_fn, call.params, part, call.args, call.kwargs)

    if micro_batches is None:
        weights = weight(batch)[None]
    else:
        weights = jax.vmap(weight)(cut(batch, micro_batches))
    # NaN, the weight of an impossible label, must reach no memory.
    return jnp.where(weights > 0, weights, 0)


def _before(call, changes, stacked) -> Any:
    """Returns what the changed variables held before; 0 for those that are new."""
    known = held(call)

    def old_of(path, variable):
        new, structure = jax.tree.flatten(variable)
        old = jax.tree.leaves(known.get(path))
        shapes = [x.shape[1:] if stacked else x.shape for x in new]
        if [jnp.shape(x) for x in old] != shapes:
            old = [
                jnp.zeros(shape, x.dtype) if is_mean(x) else x
                for shape, x in zip(shapes, new, strict=True)
            ]
        return structure.unflatten(old)

    flat = dict(nnx.to_flat_state(changes))
    return nnx.from_flat_state({path: old_of(path, x) for path, x in flat.items()})

"""Parts of a batch: micro-batches one after the other, devices side by side.

Every part ascends, descends and remembers by itself; then all of it is averaged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import leaf_shape
from fsam_optax._common.keys import fold_keys, is_prng_key
from fsam_optax._common.mapped_axes import (
    add_part,
    AxisName,
    mean_of_parts,
    merge,
    no_parts,
    replica_index,
    vary,
)
from fsam_optax._common.rest import without_rest


class Data(NamedTuple):
    """What the loss is called with beside the parameters.

    Attributes:
        batch: A batch, or a part of one.
        args: Further positional arguments.
        kwargs: Keyword arguments.
    """

    batch: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


def names(grad_fn: Callable[[Any], Any], data: Data) -> dict[str, Any]:
    """Returns what perturbation and descent may ask for by name."""
    return {
        "batch": data.batch,
        "loss_args": data.args,
        "loss_kwargs": data.kwargs,
        "grad_fn": grad_fn,
    }


class Part(NamedTuple):
    """What one part of a batch makes of a step.

    Attributes:
        means: What is averaged over all parts; floating-point arrays.
        memory: What is averaged over the parts that found a perturbation.
        found: Whether this part found one.  # shape=()
        weight: How much this part counts.  # shape=()
        value: Loss at w.  # shape=()
        aux: What the loss returned beside it.
    """

    means: Any
    memory: Any
    found: jax.Array
    weight: jax.Array
    value: jax.Array
    aux: Any


def mean_over_parts(
    step: Callable[[Data, dict[str, Any]], Part],
    data: Data,
    before: tuple[Any, Any],
    micro_batches: int | None,
    axis_name: AxisName,
) -> tuple[Any, Any, jax.Array, Any]:
    """Takes the step on every part of the batch, and averages what they make.

    Args:
        step: `step(data, numbers) -> Part` on one part. `numbers` is what the part is
            told of itself: `replica`, its number, if there are others.
        data: The batch; of this device, under `axis_name`.
        before: Means and memory like those of a part: the memory is what is left where
            no part found a perturbation.
        micro_batches: Number of parts into which a device cuts its batch; None for one.
        axis_name: Mapped axes whose devices hold parts.

    Returns:
        The means, the memory and the value, and the aux of the micro-batches, stacked.
    """
    if micro_batches is None:
        part = _step_on_part(step, data, None, 1, axis_name)
        total, remembered = part.weight, _share(part)
        means, memory, value, aux = part.means, part.memory, part.value, part.aux
    else:
        check_cut(data, micro_batches)

        def body(sums, indexed):
            index, batch = indexed
            piece = data._replace(batch=batch)
            part = _step_on_part(step, piece, index, micro_batches, axis_name)
            sums = (
                add_part(sums[0], part.means, index, part.weight),
                add_part(sums[1], part.memory, index, _share(part)),
            )
            value = jnp.where(part.weight == 0, 0, part.weight * part.value)
            return sums, (value, part.weight, _share(part), part.aux)

        sums, (values, weights, shares, aux) = jax.lax.scan(
            body,
            vary(no_parts(before), axis_name),
            (jnp.arange(micro_batches), cut(data.batch, micro_batches)),
        )
        total, remembered = jnp.sum(weights), jnp.sum(shares)
        zeros = jax.tree.map(jnp.zeros_like, before[0])
        means = mean_of_parts(sums[0], total, zeros)
        memory = mean_of_parts(sums[1], remembered, before[1])
        value = jnp.sum(values) / jnp.where(total == 0, 1, total)
    means, value = merge((means, value), axis_name, total)
    memory = merge(memory, axis_name, remembered, before[1])
    return means, memory, value, aux


def _share(part):
    # A weight of NaN, that of an impossible label, must reach no memory.
    return jnp.where(part.found & (part.weight > 0), part.weight, 0)


def _step_on_part(step, data, index, count, axis_name):
    """Takes the step on a part whose PRNG keys are its own."""
    numbers = replica_index(axis_name, index, count)
    if numbers:
        args, kwargs = fold_keys((data.args, data.kwargs), numbers["replica"])
        data = data._replace(args=args, kwargs=kwargs)
    return step(data, numbers)


def cut(batch: Any, parts: int) -> Any:
    """Cuts the leading axis of every leaf with a stride: row i goes to part i mod m.

    A batch sharded over devices stays so: each of them holds rows of every part, if
    they divide its rows. If not, explicitly sharded rows are gathered first.
    """

    def leaf(x):
        x = jnp.asarray(x)
        rows = len(x) // parts
        return jnp.moveaxis(_spread(x, rows).reshape(rows, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(leaf, batch)


def _spread(x: jax.Array, rows: int) -> jax.Array:
    """Gathers the leading axis if explicit mesh axes along it do not divide `rows`."""
    sharding = jax.typeof(x).sharding
    along = sharding.spec[0] if len(sharding.spec) else None
    names = along if isinstance(along, tuple) else (along,) if along else ()
    devices = 1
    for name in names:
        devices *= sharding.mesh.shape[name]
    if rows % devices == 0:
        return x
    gathered = jax.P(None, *sharding.spec[1:])
    return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, gathered))


def check_cut(data: Data, parts: int) -> None:
    """Raises ValueError for a batch, or arguments beside it, that cannot be cut."""
    leaves = jax.tree_util.tree_leaves_with_path(data.batch)
    for path, leaf in leaves:
        shape = leaf_shape(leaf)
        if not shape or shape[0] % parts:
            raise ValueError(
                f"`batch` leaf {jax.tree_util.keystr(path) or 'at the root'} of shape "
                f"{shape} cannot be cut into `micro_batches={parts}` equal parts along "
                "its leading axis."
            )
    sizes = {shape[0] for _, leaf in leaves if (shape := leaf_shape(leaf))}
    if len(sizes) > 1:
        raise ValueError(
            "The leaves of `batch` must agree in the size of their leading axis, which "
            f"`micro_batches={parts}` cuts, got {sorted(sizes)}."
        )
    args = without_rest(data.args)
    named = {f"number {i + 4}": x for i, x in enumerate(args)} | {
        f"`{name}`": x for name, x in data.kwargs.items()
    }
    for name, argument in named.items():
        shapes = [
            leaf_shape(x) for x in jax.tree.leaves(argument) if not is_prng_key(x)
        ]
        shapes = [shape for shape in shapes if shape]  # Numbers are of no example.
        if shapes and all(shape[0] in sizes for shape in shapes):
            raise ValueError(
                f"Argument {name} of the call has arrays of leading size "
                f"{shapes[0][0]}, as the batch has, but `micro_batches={parts}` cuts "
                "`batch` alone. Put it into `batch` if it belongs to the examples; if "
                "it is the same for all of them, close over it in the loss."
            )

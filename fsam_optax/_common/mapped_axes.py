"""Mapped axes: which values differ between their devices, and how to merge those.

`jax.shard_map` with `check_vma=True` tracks this in the type of every value. Under
`jax.pmap`, `jax.vmap` and `check_vma=False` the types say nothing.
"""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp


AxisName = Hashable | tuple[Hashable, ...] | None


def _names(axis_name: AxisName) -> tuple[Hashable, ...]:
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _varying(x: Any) -> frozenset[Hashable]:
    """Returns the axes that the type of `x` says it varies over."""
    type_ = jax.typeof(x)
    if hasattr(type_, "manual_axis_type"):  # The name since jax 0.10.2.
        return type_.manual_axis_type.varying
    return getattr(type_, "vma", frozenset())


def _tracked(name: Hashable) -> bool:
    """Tells whether types say what varies over the axis."""
    return name in _varying(jax.lax.axis_index(name))


def axes_over_which_differs(x: Any, axis_name: AxisName) -> tuple[Hashable, ...]:
    """Returns the axes over whose devices `x` differs, all of them if unknown."""
    return tuple(
        name for name in _names(axis_name) if not _tracked(name) or name in _varying(x)
    )


def vary(tree: Any, axis_name: AxisName) -> Any:
    """Returns the values, typed as if they differed between the devices.

    The gradient at such parameters is that of the device's own loss. At parameters
    known to be replicated, `jax.grad` sums it over the devices by itself.
    """

    def cast(x):
        axes = tuple(
            name
            for name in _names(axis_name)
            if _tracked(name) and name not in _varying(x)
        )
        if not axes:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, axes, to="varying")
        return getattr(jax.lax, "pvary")(x, axes)  # noqa: B009  (gone from newer jax)

    return jax.tree.map(cast, tree)


def vary_like(tree: Any, like: Any) -> Any:
    """Returns the values, typed as varying over the axes that those of `like` do."""
    return jax.tree.map(lambda x, y: vary(x, tuple(_varying(y)) or None), tree, like)


def replica_index(
    axis_name: AxisName, index: Any = None, count: int | None = None
) -> dict[str, Any]:
    """Returns the extra argument `replica`, empty if there is only one replica.

    It numbers the perturbations that are sought from the same state: those of the
    micro-batches (`index` of `count`) and devices. Estimators that draw at random fold
    it into their key, so that no two replicas draw alike.
    """
    if axis_name is None and index is None:
        return {}
    replica = 0 if index is None else index
    if axis_name is not None:
        replica = jax.lax.axis_index(axis_name) * (count or 1) + replica
    return {"replica": replica}


def axes_of_shards(tree: Any, but: AxisName = None) -> tuple[Hashable, ...]:
    """Returns the axes over which a leaf is known to differ, but for those named."""
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(tree)))
    return tuple(sorted(axes.difference(_names(but)), key=str))


def is_key(x: Any) -> bool:
    """Tells whether a leaf is an array of typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_mean(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _is_random(x: Any) -> bool:
    """Tells whether a leaf is a key, or the unsigned integers that one is made of."""
    return is_key(x) or jnp.issubdtype(x.dtype, jnp.unsignedinteger)


def merge(tree: Any, axis_name: AxisName, took_part: Any = True) -> Any:
    """Merges states that were updated by each device on its own.

    Floating-point leaves are averaged and keys taken over the devices that took part;
    the others kept the state as it was, which must not count. If none took part, all
    are as they were. Counters are the largest of all.
    """

    def leaf(x):
        axes = axes_over_which_differs(x, axis_name)
        if not axes:
            return x
        if is_key(x):
            data = leaf(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if not (_is_mean(x) or _is_random(x)):
            return jax.lax.pmax(x, axes)
        if took_part is True:
            reduce = jax.lax.pmean if _is_mean(x) else jax.lax.pmax
            return reduce(x, axes)
        count = jax.lax.psum(vary(took_part.astype(jnp.float32), axis_name), axes)
        counts = took_part | (count == 0)
        x = jnp.where(counts, x, jnp.zeros_like(x))
        if _is_random(x):
            return jax.lax.pmax(x, axes)
        number = jax.lax.psum(counts.astype(x.dtype), axes)
        return jax.lax.psum(x, axes) / number

    return jax.tree.map(leaf, tree)


def merge_next(
    merged: Any, new: Any, index: jax.Array, before: Any, took_part: Any = True
) -> Any:
    """Merges the state of micro-batch `index` into that of the ones before it.

    The same rules as `merge`, one micro-batch at a time; `before` is the number of
    those that took part already. Equal states merge to themselves exactly.
    """

    def leaf(x, y):
        if _is_random(y):
            return jnp.where(took_part | (before == 0), y, x)
        if not _is_mean(y):
            return jnp.where(index == 0, y, jnp.maximum(x, y))
        y = y.astype(x.dtype)
        mean = x + (y - x) / (before + 1).astype(x.dtype)
        return jnp.where(before == 0, y, jnp.where(took_part, mean, x))

    return jax.tree.map(leaf, merged, new)


def merge_stacked(tree: Any) -> Any:
    """Merges states that are stacked along the leading axis of every leaf.

    The same rules as `merge`.
    """

    def leaf(x):
        if _is_random(x):
            return x[-1]
        return jnp.mean(x, 0) if _is_mean(x) else jnp.max(x, 0)

    return jax.tree.map(leaf, tree)

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


def check_axes(name: str, axes: AxisName) -> None:
    """Raises NameError unless all axes are those of a map that one is inside of."""
    for axis in _names(axes):
        try:
            jax.lax.axis_index(axis)
        except NameError as error:
            raise NameError(
                f"`{name}` names {axis!r}, which is no axis of a `jax.shard_map` or "
                "`jax.pmap` around this update. Leave it out under plain `jax.jit`, "
                "where sharded arrays need no axis."
            ) from error


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


def is_mean(x: Any) -> bool:
    """Tells whether a leaf is merged by its mean: it is floating-point."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _is_random(x: Any) -> bool:
    """Tells whether a leaf is a key, or the unsigned integers that one is made of."""
    return is_key(x) or jnp.issubdtype(x.dtype, jnp.unsignedinteger)


def merge(
    tree: Any,
    axis_name: AxisName,
    weight: jax.Array | None = None,
    before: Any | None = None,
) -> Any:
    """Merges what the devices of `axis_name` made, each on its own part of the data.

        floating point    sum_i weight_i x_i / sum_i weight_i
        PRNG keys         those of a device of positive weight: they agree
        counters          the largest

    A device of weight 0 does not count, and one of weight NaN makes all means NaN. What
    is known to be the same on all devices stays as it is.

    Args:
        tree: What each device made.
        axis_name: The mapped axes; None or () merges nothing.
        weight: The weight of this device, >= 0, shape (); None where all are equal.
        before: What to return where no device has a weight: the tree as it was. None
            returns zeros.

    Returns:
        The merged tree, the same on all devices.
    """
    if not _names(axis_name):
        return tree

    def leaf(x, old):
        axes = axes_over_which_differs(x, axis_name)
        if not axes:
            return x
        if is_key(x):
            impl = jax.random.key_impl(x)
            data = leaf(jax.random.key_data(x), jax.random.key_data(old))
            return jax.random.wrap_key_data(data, impl=impl)
        if not (is_mean(x) or _is_random(x)):
            return jax.lax.pmax(x, axes)
        if weight is None:
            return (jax.lax.pmean if is_mean(x) else jax.lax.pmax)(x, axes)
        share = vary(weight, axes)
        total = jax.lax.psum(share, axes)
        x = jnp.where(share == 0, jnp.zeros_like(x), x)
        if _is_random(x):
            return jnp.where(total == 0, old, jax.lax.pmax(x, axes))
        # Weights count labels: more than a narrow dtype can tell apart, or hold.
        wide = _wide(x)
        number = jnp.where(total == 0, 1, total).astype(wide)
        mean = jax.lax.psum(share.astype(wide) * x.astype(wide), axes) / number
        return jnp.where(total == 0, old, mean.astype(x.dtype))

    if before is None:
        before = jax.tree.map(lambda x: jnp.zeros([], x.dtype), tree)
    return jax.tree.map(leaf, tree, before)


def add_part(merged: Any, part: Any, index: jax.Array, weight: jax.Array) -> Any:
    """Adds what part `index` of a batch made to the sum over the parts before it.

    The rules of `merge`, one part at a time; `mean_of_parts` divides at the end. The
    sum starts at `no_parts`.
    """

    def leaf(x, y):
        if is_mean(y):
            y = jnp.where(weight == 0, jnp.zeros_like(y), y).astype(x.dtype)
            return x + weight.astype(x.dtype) * y
        if _is_random(y):
            return jnp.where(weight == 0, x, y)
        return jnp.where(index == 0, y, jnp.maximum(x, y))

    return jax.tree.map(leaf, merged, part)


def _wide(x):
    with jax.numpy_dtype_promotion("standard"):  # Also where it is strict.
        return jnp.promote_types(x.dtype, jnp.float32)


def no_parts(before: Any) -> Any:
    """Returns what `add_part` starts from: sums of 0, in float32 or wider."""

    def leaf(x):
        wide = _wide(x) if is_mean(x) else x.dtype
        return vary_like(jnp.zeros_like(x, wide), x) if is_mean(x) else x

    return jax.tree.map(leaf, before)


def mean_of_parts(merged: Any, total: jax.Array, before: Any) -> Any:
    """Divides a sum over parts by their total weight; `before` where that is 0."""

    def leaf(x, old):
        if not is_mean(old):
            return x
        number = jnp.where(total == 0, 1, total).astype(x.dtype)
        return jnp.where(total == 0, old, (x / number).astype(old.dtype))

    return jax.tree.map(leaf, merged, before)


def merge_stacked(tree: Any, weights: jax.Array, before: Any) -> Any:
    """Merges states that are stacked along the leading axis of every leaf.

    The same rules as `merge`; `weights` are those of the entries, of shape (m,).
    """
    total = jnp.sum(weights)

    def leaf(x, old):
        if _is_random(x):
            return x[-1]
        if not is_mean(x):
            return jnp.max(x, 0)
        # Weights count labels: more than a narrow dtype can tell apart, or hold.
        wide = _wide(x)
        w = weights.reshape(-1, *[1] * (x.ndim - 1)).astype(wide)
        sums = jnp.sum(jnp.where(w == 0, 0, w * x.astype(wide)), 0)
        mean = sums / jnp.where(total == 0, 1, total).astype(wide)
        return jnp.where(total == 0, old, mean.astype(x.dtype))

    return jax.tree.map(leaf, tree, before)

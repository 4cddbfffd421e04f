"""Directions in which losses of different networks can be compared."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fsam_optax._ball.operators import Axes, group_axes
from fsam_optax._common.checks import check_leaves
from fsam_optax._common.keys import is_prng_key
from fsam_optax._common.norms import scaled_norm, widen


def random_direction(
    params: Any, key: jax.Array, *, filter_axis: Axes = -1, layer_axis: Axes = None
) -> Any:
    """Draws a direction with the length of the weights, filter by filter.

        d_f  =  ||w_f|| z_f / ||z_f||,    z ~ N(0, 1)

    A step along it changes each filter by the same share. So networks that differ by a
    rescaling of their filters have the same loss along it, which makes lines and planes
    of several networks comparable. Arrays without filters, such as biases and scales,
    stay where they are: d = 0.

    It is not a direction of descent, and a loss that looks flat along one says nothing
    of the directions that matter most: those are few, and random ones miss them.

    Args:
        params: Parameters w.
        key: PRNG key.
        filter_axis: Axes that number the filters of an array of two or more axes, as in
            `adaptive_ellipsoid`; the last one, as in Flax, Haiku and Keras.
        layer_axis: Axes along which an array holds several layers; as there.

    Returns:
        The direction, with the structure, shapes and dtypes of params.

    Raises:
        TypeError: If params hold what is not real, or for a wrong axis or key.
        ValueError: If an axis is out of range.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> w = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.1]]), "bias": jnp.ones(2)}
        >>> d = random_direction(w, jax.random.key(0))
        >>> print(jnp.linalg.norm(d["kernel"], axis=0).round(3), d["bias"])
        [5.  0.1] [0. 0.]

    References:
        Li, Xu, Taylor, Studer, Goldstein, Visualizing the Loss Landscape of Neural
        Nets, 2018, https://arxiv.org/abs/1712.09913 (section 4).
    """
    check_leaves(params, "params", real=True)
    if not is_prng_key(key):
        raise TypeError(
            f"`key` must be a PRNG key, such as jax.random.key(0), got {key}"
        )

    def scaled(path, w, z):
        w = jnp.asarray(w)
        axes = group_axes("filter", filter_axis, layer_axis, path, w)
        if axes is None:
            return jnp.zeros_like(w)
        wide = w.astype(widen(w))
        length, of_z = scaled_norm(wide, axes), scaled_norm(z, axes)
        return (z * (length / of_z)).astype(w.dtype)

    wide = jax.tree.map(lambda w: jnp.asarray(w, widen(w)), params)
    drawn = optax.tree.random_like(key, wide)
    return jax.tree_util.tree_map_with_path(scaled, params, drawn)

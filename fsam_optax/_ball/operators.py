"""Operators: transformations whose output is the diagonal of T.

The ball of radius rho is `||T^-1 eps|| <= rho`. The output has the structure of the
gradient; a leaf of T need not be larger than it takes to broadcast to its gradient.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import (
    broadcast_mask,
    check_like,
    check_params,
    is_real,
    movable,
)
from fsam_optax._common.mapped_axes import AxisName
from fsam_optax._common.norms import norm, scaled_norm, total, widen


_BIASES = frozenset({"bias", "b", "beta", "offset"})


def not_a_bias(path: tuple[Any, ...], leaf: Any) -> bool:
    """Tells whether a leaf is something else than a bias, from its last key."""
    del leaf
    names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
    # Flax NNX keeps the array of a variable one attribute further down.
    while len(names) > 1 and names[-1] in ("value", "raw_value"):
        names.pop()
    return not names or names[-1] not in _BIASES


def identity() -> optax.GradientTransformation:
    """Returns the operator T = 1."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda _: 1.0, updates))


def adaptive(
    eta: Any,
    scope: Literal["element", "filter", "layer"],
    normalize: Callable[[tuple[Any, ...], Any], bool] | Any | None,
    filter_axis: int,
    axis_name: AxisName,
) -> optax.GradientTransformation:
    """Returns the operator T = |w| + eta, with |w| by element, filter or layer.

    Leaves that `normalize` leaves out get T = 1.
    """

    def magnitude(path, w):
        w = jnp.asarray(w, widen(w))
        if scope == "layer":
            return norm([w], axis_name=axis_name)
        if scope == "filter" and w.ndim > 1:
            if not -w.ndim <= filter_axis < w.ndim:
                raise ValueError(
                    f"`filter_axis` is {filter_axis}, but leaf "
                    f"{jax.tree_util.keystr(path)} has {w.ndim} axes. Leave it out "
                    "with `normalize`, or give the axis of the output channels."
                )
            axes = tuple(i for i in range(w.ndim) if i != filter_axis % w.ndim)
            return scaled_norm(w, axes)
        return jnp.abs(w)

    def normalized(params):
        if normalize is None or callable(normalize):
            return jax.tree_util.tree_map_with_path(normalize or not_a_bias, params)
        return broadcast_mask(normalize, params, "normalize")

    def operator(updates, params):
        del updates
        check_params("adaptive_ellipsoid", params)
        return jax.tree_util.tree_map_with_path(
            lambda path, w, use: (
                magnitude(path, w) + eta if use and is_real(w) else 1.0
            ),
            params,
            normalized(params),
        )

    return optax.stateless(operator)


def _mean(diagonal: Any, moves: Any, axis_name: AxisName) -> jax.Array:
    """Returns the mean over the perturbed parameters, 1 for 0, NaN if not finite."""
    sums_and_sizes = [
        jnp.stack([jnp.sum(f), jnp.asarray(f.size, f.dtype)])
        for f, move in zip(
            jax.tree.leaves(diagonal), jax.tree.leaves(moves), strict=True
        )
        if move and f.size
    ]
    if not sums_and_sizes:
        return jnp.ones([])
    amount, size = total(sums_and_sizes, axis_name)
    mean = amount / size
    return jnp.where(mean == 0, 1, jnp.where(jnp.isfinite(mean), mean, jnp.nan))


def fisher(
    estimator: optax.GradientTransformation,
    eta: Any,
    damping: Any | None,
    relative: bool,
    mask: Any | None,
    axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
    """Returns the operator T^2 = 1 / (1 + eta F), or 1 / (F + damping).

    Negative entries of F count as 0. With `relative`, F is divided by its mean over
    the parameters that are perturbed. Where F + damping is not positive, T is 0. A
    value that is not finite becomes NaN, which the perturbation answers by leaving the
    step out.
    """
    estimator = optax.with_extra_args_support(estimator)

    def update_fn(updates, state, params=None, **extra_args):
        diagonal, state = estimator.update(updates, state, params, **extra_args)
        check_like("the estimator's output", diagonal, "grads", updates)
        diagonal = jax.tree.map(
            lambda f: jnp.maximum(jnp.asarray(f, widen(f)), 0), diagonal
        )
        moves = movable(updates, params, mask)
        # A factor, not a divisor: cheap enough for compilers to compute twice, where
        # they would keep the quotients of all entries.
        unit = 1 / _mean(diagonal, moves, axis_name) if relative else 1.0

        def inverse_root(f):
            metric = 1 + (eta * unit) * f if damping is None else unit * f + damping
            root = 1 / jnp.sqrt(jnp.where(metric > 0, metric, jnp.inf))
            return jnp.where(jnp.isfinite(metric), root, jnp.nan)

        return jax.tree.map(inverse_root, diagonal), state

    return optax.GradientTransformationExtraArgs(estimator.init, update_fn)

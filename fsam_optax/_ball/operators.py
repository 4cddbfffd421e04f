"""Operators: transformations whose output is the diagonal of T.

The ball of radius rho is `||T^-1 eps|| <= rho`. The output has the structure of the
gradient; a leaf of T need not be larger than it takes to broadcast to its gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fsam_optax._ball.biases import biases
from fsam_optax._common.checks import (
    broadcast_mask,
    check_like,
    check_params,
    is_function,
    is_real,
    movable,
)
from fsam_optax._common.kinds import of_estimator
from fsam_optax._common.mapped_axes import axes_over_which_differs, AxisName
from fsam_optax._common.norms import (
    divisor,
    norm,
    Reciprocal,
    scaled_norm,
    total,
    widen,
)


def identity() -> optax.GradientTransformation:
    """Returns the operator T = 1."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda _: 1.0, updates))


Axes = int | tuple[int, ...] | Callable[[tuple[Any, ...], Any], Any] | None


def _axes(name: str, axes: Any, path: Any, ndim: int, of: str) -> tuple[int, ...]:
    """Returns axes as numbers in [0, ndim), or raises an error that names the leaf."""
    axes = () if axes is None else axes
    axes = axes if isinstance(axes, tuple) else (axes,)
    where = f"leaf {jax.tree_util.keystr(path) or 'at the root'}"
    for axis in axes:
        if not isinstance(axis, int | np.integer) or isinstance(axis, bool):
            raise TypeError(
                f"`{name}` must be an axis, a tuple of axes, None, or a function of "
                f"the key path and the leaf that returns one of these; got {axis!r} "
                f"for {where}. (In `optax.inject_hyperparams`, name it in "
                "`static_args`.)"
            )
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"`{name}` is {axis}, but {where} has {ndim} axes{of}. Leave it out "
                f"with `normalize`, or give `{name}` as a function of the key path and "
                "the leaf."
            )
    return tuple(int(axis) % ndim for axis in axes)


def group_axes(
    scope: str, filter_axis: Axes, layer_axis: Axes, path: Any, w: Any
) -> tuple[int, ...] | None:
    """Returns the axes over which |w| is a norm; None if it is that of each element."""
    if scope == "element":
        return None
    ask = (path, w)
    layers = layer_axis(*ask) if callable(layer_axis) else layer_axis
    layers = _axes("layer_axis", layers, path, w.ndim, "")
    inside = [axis for axis in range(w.ndim) if axis not in layers]
    if scope == "layer":
        return tuple(inside)
    if len(inside) < 2:
        return None
    filters = filter_axis(*ask) if callable(filter_axis) else filter_axis
    if filters is None:
        return None
    of = " in each layer" if layers else ""
    filters = _axes("filter_axis", filters, path, len(inside), of)
    return tuple(axis for i, axis in enumerate(inside) if i not in filters)


def adaptive(
    eta: Any,
    scope: Literal["element", "filter", "layer"],
    normalize: Callable[[tuple[Any, ...], Any], bool] | Any | None,
    filter_axis: Axes,
    layer_axis: Axes,
    shard_axes: AxisName,
) -> optax.GradientTransformation:
    """Returns the operator T = |w| + eta, with |w| by element, filter or layer.

    Leaves that `normalize` leaves out get T = 1.
    """

    def magnitude(path, w):
        w = jnp.asarray(w, widen(w))
        axes = group_axes(scope, filter_axis, layer_axis, path, w)
        if axes is None:
            return w * jnp.sign(w)  # |w|, with derivative 0 at 0 in every jax.
        if len(axes) == w.ndim:
            return norm([w], shard_axes=shard_axes)
        return scaled_norm(w, axes)

    def answer(function, path, leaf):
        use = function(path, leaf)
        if not isinstance(use, bool | np.bool_):
            raise TypeError(
                "`normalize` must hold Python bools, known before tracing, or return "
                f"one; got {use!r} for leaf {jax.tree_util.keystr(path)}."
            )
        return bool(use)

    def normalized(params):
        if normalize is None:
            return jax.tree.map(lambda is_bias: not is_bias, biases(params))
        if is_function(normalize):
            return jax.tree_util.tree_map_with_path(
                functools.partial(answer, normalize), params
            )
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


def _unit(diagonal: Any, moves: Any, shard_axes: AxisName) -> jax.Array:
    """Returns 1 / the mean over the perturbed parameters; NaN if it is not finite.

    1 where the mean is 0. Negative entries count as 0.
    """

    def amount_of(f):
        # Of all ways to say so one that XLA:CPU does not write down. At 0, which F may
        # well be, a maximum with 0 would have half a derivative.
        return jnp.sum(jnp.maximum(f, -jnp.finfo(f.dtype).tiny))

    amounts, size = [], 0
    for f, move in zip(jax.tree.leaves(diagonal), jax.tree.leaves(moves), strict=True):
        if move and f.size:
            amounts.append(amount_of(f))
            axes = axes_over_which_differs(f, shard_axes)
            size += f.size * math.prod(map(jax.lax.axis_size, axes))
    if not amounts:
        return jnp.ones([])
    mean = total(amounts, shard_axes) / float(size)
    # NaN before the division: a choice after it compilers make anew for each leaf, with
    # the sum over all of them.
    unit = Reciprocal.of(jnp.where(jnp.isfinite(mean), divisor(mean), jnp.nan))
    return unit.first * unit.second


def fisher(
    estimator: optax.GradientTransformation,
    eta: Any,
    damping: Any | None,
    relative: bool,
    mask: Any | None,
    shard_axes: AxisName,
) -> optax.GradientTransformationExtraArgs:
    """Returns the operator T^2 = 1 / (1 + eta F), or 1 / (F + damping).

    Negative entries of F count as 0. With `relative`, F is divided by its mean over
    the parameters that are perturbed. Where F + damping is not positive, T is 0. A
    value that is not finite becomes NaN, which the perturbation answers by leaving the
    step out.
    """
    estimator = optax.with_extra_args_support(estimator)

    def init_fn(params):
        return of_estimator(estimator.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        diagonal, state = estimator.update(updates, state, params, **extra_args)
        check_like("the estimator's output", diagonal, "grads", updates)
        diagonal = jax.tree.map(lambda f: jnp.asarray(f, widen(f)), diagonal)
        moves = movable(updates, params, mask)
        # A factor, not a divisor: cheap enough for compilers to compute twice, where
        # they would keep the quotients of all entries.
        unit = _unit(diagonal, moves, shard_axes) if relative else 1.0

        def inverse_root(f):
            # What is not finite comes back below: here, it would have a derivative.
            known = f < jnp.inf
            positive = jnp.where(known & (f >= 0), f, 0)
            if damping is None:
                metric = 1 + (eta * unit) * positive
                root = 1 / jnp.sqrt(metric)
            else:
                metric = unit * positive + damping
                root = 1 / jnp.sqrt(jnp.where(metric > 0, metric, jnp.inf))
            return jnp.where(known & jnp.isfinite(metric), root, jnp.nan)

        return jax.tree.map(inverse_root, diagonal), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

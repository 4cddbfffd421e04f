"""Checks of the arguments of a ball: each message says what to write instead."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fsam_optax._common.checks import check_number, is_function, leaf_shape


def check_radius(rho: Any, order: str) -> None:
    """Raises an error unless `rho` is a number >= 0 or a schedule.

    Args:
        rho: The argument.
        order: The arguments of the caller in their order, for those who swapped them.
    """
    if isinstance(rho, optax.GradientTransformation):
        raise TypeError(
            "`rho` must be a number or a schedule, got an optax.GradientTransformation:"
            f" the arguments are `{order}`."
        )
    if isinstance(rho, str):
        raise TypeError(
            f"`rho` must be a number or a schedule, got the text {rho!r}: give "
            "`float(...)` of it."
        )
    if not callable(rho):
        check_number("rho", rho, 0)


def radius_at(rho: Any, count: jax.Array) -> Any:
    """Returns the radius of an update; raises ValueError if a schedule gives no scalar.

    Args:
        rho: A number or a schedule.
        count: Number of updates before this one.
    """
    if not callable(rho):
        return rho
    radius = rho(count)
    if leaf_shape(radius) != ():
        raise ValueError(
            "`rho(count)` must be a number or an array of shape (), got "
            f"{radius!r}: a schedule is a function of the number of updates alone."
        )
    return radius


def check_order(ord: Any) -> None:
    """Raises an error unless `ord` is a number in (1, inf]."""
    if isinstance(ord, str):
        raise TypeError(f"`ord` must be a number, got {ord!r}: for inf, `jnp.inf`.")
    if isinstance(ord, int | float) and ord == 1:
        raise ValueError(
            "`ord` must be a number in (1, inf], got 1: in that ball the worst case is "
            "a step along the largest entry of the gradient alone. 1.01 comes close."
        )
    check_number("ord", ord, 1, jnp.inf, open=True)


def check_signature(name: str, function: Any, *parameters: str) -> None:
    """Raises TypeError for a function that does not take so many arguments.

    Whatever is no function passes.
    """
    if not is_function(function):
        return
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Some built-in functions have none.
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        raise TypeError(
            f"`{name}` is called as `{name}({', '.join(parameters)})`, which "
            f"{function!r} does not fit: {error}."
        ) from error


def check_length(length: Any) -> None:
    """Raises TypeError unless `length` is None or a function of two arguments."""
    if length is None:
        return
    if not callable(length):
        raise TypeError(
            "`length` must be a function of the dual norm and the number of updates, "
            "such as `lambda dual_norm, count: dual_norm`, or None; got "
            f"{length!r}. A constant factor belongs into `rho`."
        )
    check_signature("length", length, "dual_norm", "count")


def length_at(length: Any, dual_norm: jax.Array, count: jax.Array) -> jax.Array:
    """Returns the factor on rho; raises ValueError if it is no scalar."""
    factor = length(dual_norm, count)
    if jnp.shape(factor) != ():
        raise ValueError(
            "`length(dual_norm, count)` must return one number, got shape "
            f"{jnp.shape(factor)}."
        )
    return jnp.asarray(factor, dual_norm.dtype)


def check_flag(name: str, value: Any, instead: str) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}. {instead}")


def check_operator(t: Any, grads: Any) -> None:
    """Raises ValueError unless an operator's output has a leaf for each gradient."""
    if jax.tree.structure(t) != jax.tree.structure(grads):
        raise ValueError(
            "`operator` must return a tree with the structure of `grads`, one T for "
            f"every leaf (1.0 where T is 1), got {jax.tree.structure(t)} for "
            f"{jax.tree.structure(grads)}."
        )
    for (path, g), x in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(t), strict=True
    ):
        shape = jnp.shape(g)
        try:
            fits = jnp.broadcast_shapes(jnp.shape(x), shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"`operator` returned shape {jnp.shape(x)} for leaf "
                f"{jax.tree_util.keystr(path) or 'at the root'} of shape {shape}, to "
                "which it must broadcast."
            )


def check_state(state: Any, kind: type) -> None:
    """Raises TypeError unless a state is what `init` returned."""
    if not isinstance(state, kind):
        raise TypeError(
            f"`state` must be what `init(params)` of this perturbation returned, a "
            f"{kind.__name__}, got a {type(state).__name__}. The order is "
            "`update(grads, state, params)`."
        )

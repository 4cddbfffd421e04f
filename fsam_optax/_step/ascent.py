"""The ascent half of a step, shared by both wrappers."""

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import check_like, is_real
from fsam_optax._common.mapped_axes import axes_of_shards
from fsam_optax._common.norms import norm, norm_and_cosine, total, widen


class Metrics(NamedTuple):
    """What the last perturbed step was like; every entry has shape () and is float32.

    Attributes:
        grad_norm: Euclidean norm of the gradient at the parameters w.
        perturbed_grad_norm: Euclidean norm of the gradient at w + eps.
        perturbation_norm: Euclidean norm of eps, whatever the geometry, as the loss saw
            it: after w + eps was rounded.
        gradient_cosine: Cosine of the angle between the two gradients, 0 if one is 0,
            NaN if one is not finite. Near 1, the perturbation changes nothing but the
            length of the step.
    """

    grad_norm: jax.Array
    perturbed_grad_norm: jax.Array
    perturbation_norm: jax.Array
    gradient_cosine: jax.Array


def no_metrics() -> Metrics:
    """Returns the metrics before the first step: zeros, each in a buffer of its own."""
    return Metrics(*(jnp.zeros([], jnp.float32) for _ in Metrics._fields))


def _real_leaves(tree: Any) -> list[jax.Array]:
    return [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_real(x)]


def measure(grads: Any, perturbed_grads: Any, params: Any, point: Any) -> Metrics:
    """Computes the metrics of one step from params to `point` = params + eps."""
    g, h = _real_leaves(grads), _real_leaves(perturbed_grads)
    w, v = _real_leaves(params), _real_leaves(point)
    axes = axes_of_shards(w)
    g_norm = norm(g, 2, axes)
    h_norm, h_cosine = norm_and_cosine(h, g, g_norm, axes)
    steps = [
        jnp.sum(jnp.square(y.astype(widen(x, y)) - x.astype(widen(x, y))))
        for x, y in zip(w, v, strict=True)
    ]
    step_norm = jnp.sqrt(total(steps, axes)) if steps else jnp.zeros([], widen())
    values = (g_norm, h_norm, step_norm, h_cosine)
    return Metrics(*(jnp.asarray(x, jnp.float32) for x in values))


def took_part(before: optax.OptState, after: optax.OptState) -> jax.Array:
    """Tells whether a perturbation was found: nothing in its state counted a skip."""
    old, new = (
        [value for _, value in optax.tree.get_all_with_path(state, "skipped")]
        for state in (before, after)
    )
    same = [x == y for x, y in zip(old, new, strict=True)]
    return functools.reduce(jnp.logical_and, same, jnp.array(True))


def displace(params: Any, eps: Any, dtype: Any | None) -> Any:
    """Returns w + eps, added in float32 or wider; `params` itself is not touched.

    The sum is rounded to `dtype`, or to the dtype of each leaf if that is None.
    Leaves that hold no real numbers are returned as they are. Raises ValueError for
    an eps of another structure or shape.
    """
    check_like("the perturbation's output", eps, "params", params)

    def move(w, e):
        if not is_real(w):
            return w
        w = jnp.asarray(w)
        return (w.astype(widen(w, e)) + e).astype(dtype or w.dtype)

    return jax.tree.map(move, params, eps)


def cast_like(tree: Any, like: Any) -> Any:
    """Returns the real leaves of `tree` in the dtypes of `like`."""
    return jax.tree.map(
        lambda x, y: jnp.asarray(x, jnp.asarray(y).dtype) if is_real(y) else x,
        tree,
        like,
    )


def always(every: Any) -> bool:
    """Tells whether a possibly traced `every` is known to be 1."""
    return isinstance(every, numbers.Integral) and int(every) == 1


def every_kth(
    every: Any, step: jax.Array, perturbed: Callable[[], Any], plain: Callable[[], Any]
) -> Any:
    """Returns `perturbed()` at each `every`-th step, from the first on, else `plain()`.

    Only one of the two is computed at run time, except under `jax.vmap`.
    """
    if always(every):
        return perturbed()
    return jax.lax.cond(step % every == 0, perturbed, plain)

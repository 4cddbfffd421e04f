"""Metrics: what the last perturbed step was like."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import is_real
from fsam_optax._common.mapped_axes import axes_of_shards
from fsam_optax._common.norms import norm, widen
from fsam_optax._common.pairs import distances, norm_and_cosine


class Metrics(NamedTuple):
    """What the last perturbed step was like; every number is a float32 of shape ().

    Attributes:
        grad_norm: Euclidean norm of the gradient at the parameters w; None with
            `lagged=True`, where none is taken there.
        perturbed_grad_norm: Euclidean norm of the gradient at w + eps.
        perturbation_norm: Euclidean norm of eps, whatever the geometry, as the loss saw
            it: after w + eps was rounded.
        gradient_cosine: Cosine of the angle between the two gradients, 0 if one is 0,
            NaN if one is not finite. Near 1, the perturbation changes nothing but the
            length of the step. None with `lagged=True`.
        leaf_perturbation_norms: The norm of eps in each array, in the structure of the
            parameters. It shows what is perturbed though the base optimizer freezes
            it: leave that out with the perturbation's `mask`.
    """

    grad_norm: jax.Array | None
    perturbed_grad_norm: jax.Array
    perturbation_norm: jax.Array
    gradient_cosine: jax.Array | None
    leaf_perturbation_norms: Any


def no_metrics(params: Any) -> Metrics:
    """Returns the metrics before the first step: zeros, each in a buffer of its own."""
    leaves = jax.tree.map(lambda _: jnp.zeros([], jnp.float32), params)
    a, b, c, d = (jnp.zeros([], jnp.float32) for _ in range(4))
    return Metrics(a, b, c, d, leaves)


def no_lagged_metrics(params: Any) -> Metrics:
    """Returns the same, without what needs a gradient at w."""
    return no_metrics(params)._replace(grad_norm=None, gradient_cosine=None)


def measure_lagged(grads: Any, params: Any, point: Any) -> Metrics:
    """Computes the metrics of a step whose only gradient is that at `point`."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(grads) if is_real(x)]
    length = norm(leaves, 2, axes_of_shards(leaves))
    whole, each = step_norms(params, point)
    values = Metrics(None, length, whole, None, each)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)


def measure(grads: Any, perturbed_grads: Any, params: Any, point: Any) -> Metrics:
    """Computes the metrics of one step from params to `point` = params + eps."""

    def real_leaves(tree):
        return [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_real(x)]

    g, h = real_leaves(grads), real_leaves(perturbed_grads)
    axes = axes_of_shards(real_leaves(params))
    g_norm = norm(g, 2, axes)
    h_norm, h_cosine = norm_and_cosine(h, g, g_norm, axes)
    step_norm, leaf_norms = step_norms(params, point)
    values = Metrics(g_norm, h_norm, step_norm, h_cosine, leaf_norms)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)


def step_norms(params: Any, point: Any) -> tuple[jax.Array, Any]:
    """Returns the norm of `point` - params, and that of each array of it."""
    leaves, structure = jax.tree.flatten(params)
    pairs = [
        (jnp.asarray(w), jnp.asarray(v))
        for w, v in zip(leaves, jax.tree.leaves(point), strict=True)
        if is_real(w)
    ]
    whole, each = distances(
        [v for _, v in pairs],
        [w for w, _ in pairs],
        axes_of_shards([w for w, _ in pairs]),
    )
    rest = iter(each)
    norms = [next(rest) if is_real(w) else jnp.zeros([], widen()) for w in leaves]
    return whole, structure.unflatten(norms)

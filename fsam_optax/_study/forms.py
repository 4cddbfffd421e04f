"""Forms of the second and fourth moments of the score, along a direction."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fsam_optax._fisher.likelihoods import Likelihood, MomentBounds


def moment(likelihood: Likelihood, h: jax.Array, u: jax.Array) -> jax.Array:
    """Returns u^T I(h|x) u for each position."""
    rows = jnp.einsum("tck,tc->tk", likelihood.factor(h), u, precision="highest")
    return jnp.sum(rows**2, axis=-1)


def sum_of_fourth(fourth: jax.Array, second: jax.Array) -> jax.Array:
    """Combines positions: E[(sum_t z_t)^4] - E[(sum_t z_t)^2]^2 for independent z_t.

    Args:
        fourth: E[z_t^4] - E[z_t^2]^2.
        second: E[z_t^2].
    """
    # Fourth cumulants, E[z^4] - 3 E[z^2]^2, add up.
    value = jnp.sum(fourth - 2 * second**2) + 2 * jnp.sum(second) ** 2
    return jnp.maximum(value, 0)


def fourth_moment_of(likelihood: Likelihood) -> Callable:
    """Returns the fourth moment of the score, or raises ValueError."""
    if likelihood.fourth_moment is None:
        raise ValueError("`likelihood` must define `fourth_moment` to know this.")
    return likelihood.fourth_moment


def bounds_of(likelihood: Likelihood) -> Callable[[jax.Array], MomentBounds]:
    """Returns the bounds of the moments of the score, or raises ValueError."""
    if likelihood.bounds is None:
        raise ValueError("`likelihood` must define `bounds` to know this.")
    return likelihood.bounds


def form_of_second(likelihood: Likelihood) -> Callable:
    """Returns the form u^T I(h|x) u, summed over positions."""

    def form(h, u):
        return (jnp.sum(moment(likelihood, h, u)),)

    return form


def form_of_second_bounds(likelihood: Likelihood) -> Callable:
    """Returns the bounds of that form by the eigenvalues of I(h|x)."""
    bounds = bounds_of(likelihood)

    def form(h, u):
        b, squares = bounds(h), jnp.sum(u**2, axis=-1)
        return jnp.sum(b.fisher_min * squares), jnp.sum(b.fisher_max * squares)

    return form

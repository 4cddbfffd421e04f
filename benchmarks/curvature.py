"""Largest eigenvalues and trace of the Hessian of a loss, without forming it.

Both take Hessian-vector products only, by matfree: Lanczos' method for the eigenvalues
and random signs for the trace.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matfree import decomp, eig, stochtrace


class Estimate(NamedTuple):
    """A mean over random probes and its standard error."""

    mean: jax.Array
    standard_error: jax.Array


def hessian_product(loss_fn: Callable[[Any], jax.Array], params: Any):
    """Returns v -> H v, for v with the structure of params."""
    gradient = jax.grad(loss_fn)

    def product(v):
        return jax.jvp(gradient, (params,), (v,))[1]

    return product


def hessian_eigenvalues(
    loss_fn: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    num_products: int = 30,
) -> jax.Array:
    """Returns the Ritz values of the Hessian, the largest first.

    The outer ones are close to eigenvalues, and lie between the extreme ones; those in
    the middle are not close to anything. An eigenvector at right angles to the random
    start is missed, and each eigenvalue appears once, however often it occurs.

    Args:
        loss_fn: `loss_fn(params)` returns a scalar; close it over a batch.
        params: Where to evaluate.
        key: PRNG key of the start.
        num_products: Hessian-vector products, each in the memory of a gradient, and
            vectors to store; at most the number of parameters.

    Returns:
        `num_products` values in falling order.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = structure.unflatten(jax.random.split(key, len(leaves)))
    start = jax.tree.map(
        lambda k, w: jax.random.normal(k, w.shape, w.dtype), keys, params
    )
    solve = eig.eigh_partial(decomp.tridiag_sym(num_products))
    values, _ = solve(hessian_product(loss_fn, params), start)
    return jnp.sort(values)[::-1]


def hessian_trace(
    loss_fn: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    num_products: int = 30,
) -> Estimate:
    """Estimates the trace of the Hessian by v^T H v with random signs v.

    Args:
        loss_fn: `loss_fn(params)` returns a scalar; close it over a batch.
        params: Where to evaluate.
        key: PRNG key of the signs.
        num_products: Hessian-vector products, all held at once.

    Returns:
        The estimate, unbiased, and its standard error.
    """
    estimate = stochtrace.estimator_monte_carlo_mean_and_sem(
        stochtrace.monte_carlo_trace(),
        stochtrace.sampler_signs(params, num=num_products),
    )
    return Estimate(*estimate(hessian_product(loss_fn, params), key))

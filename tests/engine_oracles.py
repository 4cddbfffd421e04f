"""Per-example gradients formed in full: the slow, obvious version of the engine."""

import jax
import jax.numpy as jnp
import numpy as np


def loss_power_sums(loss_fn, params, batch, powers=(2,), weights=None):
    grads = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(params, batch)
    grads = jax.tree.map(lambda g: np.asarray(g)[:, None], grads)
    return _sums(grads, powers, weights)


def power_sums(
    apply_fn, params, inputs, cotangents, targets=None, powers=(2,), weights=None
):
    def pull(x, target):
        def output(params):
            batch = jax.tree.map(lambda leaf: leaf[None], x)
            return jax.tree.map(lambda h: h[0], apply_fn(params, batch))

        h, pullback = jax.vjp(output, params)
        return jax.vmap(lambda c: pullback(c)[0])(cotangents(h, target))

    return _sums(jax.jit(jax.vmap(pull))(inputs, targets), powers, weights)


def _sums(grads, powers, weights):
    """Sums leaves of shape (examples, cotangents, ...)."""

    def total(g, p):
        g = np.asarray(g).astype(np.float64)
        w = np.ones(len(g)) if weights is None else np.asarray(weights, np.float64)
        return np.einsum("n,nk...->...", w, g**p)

    return tuple(jax.tree.map(lambda g, p=p: total(g, p), grads) for p in powers)


def assert_close(actual, expected, tolerance=1e-5):
    """Compares every leaf, relative to its largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(expected),
        strict=True,
    ):
        assert a.shape == b.shape and jnp.issubdtype(a.dtype, jnp.inexact), path
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            b,
            rtol=tolerance,
            atol=tolerance * max(np.max(np.abs(b), initial=0.0), 1e-30),
            err_msg=jax.tree_util.keystr(path),
        )

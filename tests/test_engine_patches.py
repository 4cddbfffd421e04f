"""Weights that a convolution with a kernel of zeros and ones cuts into patches."""

import engine_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fsam_optax._engine import explain_loss, loss_power_sums


def matrix(y):
    return y.ravel()[: y.size // 8 * 8].reshape(-1, 8)


def by_kernel(w, kernel):
    return matrix(lax.conv_general_dilated(w[None], kernel, (1, 1), "VALID"))


def patches(w, *windows, **options):
    return matrix(lax.conv_general_dilated_patches(w[None], *windows, **options))


PLACED = {
    "padded": lambda w: patches(w[:1], (2, 2), (1, 1), ((1, 0), (0, 1))),
    "left out": lambda w: patches(w[:1], (2, 3), (2, 2), "VALID"),
    "channels": lambda w: patches(w, (2, 3), (1, 1), "VALID", rhs_dilation=(2, 1)),
    "between zeros": lambda w: patches(
        w, (2, 2), (1, 1), ((1, 1), (0, 0)), lhs_dilation=(2, 1)
    ),
}
NOT_PLACED = {
    "several places": lambda w: by_kernel(w, np.ones((2, 2, 2, 2), np.float32)),
    "scaled": lambda w: by_kernel(w, 2 * np.eye(2, dtype=np.float32)[..., None, None]),
}


@pytest.mark.parametrize("name", PLACED | NOT_PLACED)
def test_places_that_are_known_are_rows_of_a_table(name):
    make = (PLACED | NOT_PLACED)[name]

    def loss_fn(w, x):
        y = make(w)
        return jnp.sum(jnp.tanh(x[: len(y)].T @ y) ** 2)

    w, x = (
        jax.random.normal(jax.random.key(k), shape) / 3
        for k, shape in enumerate([(2, 8, 8), (4, 130, 3)])
    )
    expected = oracles.loss_power_sums(loss_fn, w, x, powers=(1, 2))
    sums = jax.jit(lambda w, x: loss_power_sums(loss_fn, w, x, powers=(1, 2)))
    oracles.assert_close(sums(w, x), expected)
    (leaf,) = explain_loss(loss_fn, w, x)
    assert ("embedding" in leaf.rule) == (name in PLACED), leaf

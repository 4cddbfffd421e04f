"""What the experiments with a small ReLU network share: the model and its training."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fsam_optax as fsam


def apply(params: Sequence[Any], x: jax.Array) -> jax.Array:
    """Maps images (batch, pixels) to logits (batch, classes)."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ params[-1]["kernel"] + params[-1]["bias"][None]


MODEL = apply, fsam.categorical
LOSS = fsam.negative_log_likelihood(*MODEL)


def initial(key: jax.Array, sizes: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Returns parameters of layers between arrays of the given sizes."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "kernel": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5,
            "bias": jnp.zeros(n),
        }
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def oracle(perturbation: optax.GradientTransformation | None) -> tuple[Any, Any]:
    """Returns `init(params)` and `f(params, state, batch)`; None is no perturbation."""
    if perturbation is not None:
        f = fsam.value_and_grad(LOSS, perturbation, metrics=False)
        return f.init, f
    plain = jax.value_and_grad(LOSS)
    return lambda params: (), lambda params, state, batch: (
        *plain(params, batch),
        state,
    )


def train(
    params: Any,
    gradient: tuple[Callable, Callable],
    data: tuple[jax.Array, jax.Array],
    rate: Any,
    steps: int,
    batch: int,
    key: jax.Array,
) -> Any:
    """Returns the parameters after SGD with momentum, weight decay and cosine decay."""
    init, f = gradient
    images, labels = data
    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(lambda t: rate * 0.5 * (1 + jnp.cos(jnp.pi * t / steps)), 0.9),
    )

    def step(carry, key):
        params, state, opt_state = carry
        rows = jax.random.randint(key, (batch,), 0, len(labels))
        _, grads, state = f(params, state, (images[rows], labels[rows]))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), None

    carry = params, init(params), optimizer.init(params)
    (params, _, _), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return params


def score(
    params: Any, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns loss and accuracy."""
    right = jnp.argmax(apply(params, images), -1) == labels
    return LOSS(params, (images, labels)), jnp.mean(right)


def noisy_labels(labels: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Returns labels of which a share is wrong, of any of the nine other classes."""
    random = np.random.default_rng(seed)
    wrong = random.random(len(labels)) < noise
    return np.where(wrong, (labels + random.integers(1, 10, len(labels))) % 10, labels)

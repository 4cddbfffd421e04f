"""What the experiments with a small ReLU network share: the model and its training."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax

import fsam_optax as fsam


def apply(
    params: Sequence[Any], x: jax.Array, activation: Callable = jax.nn.relu
) -> jax.Array:
    """Maps images (batch, pixels) to logits (batch, classes)."""
    for layer in params[:-1]:
        x = activation(x @ layer["kernel"] + layer["bias"][None])
    return x @ params[-1]["kernel"] + params[-1]["bias"][None]


IMAGES = {  # Options of experiments on any of three data sets.
    "data": {"default": "digits", "choices": datasets.NAMES[:3]},
    "data_dir": Path("data"),
}
POOL = {"default": 1, "help": "pixels a side that become one"}
LOSS = fsam.negative_log_likelihood(apply, fsam.categorical)


def he_normal(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Returns weights for ReLUs."""
    return jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5


def initial(
    key: jax.Array, sizes: Sequence[int], init: Callable = he_normal
) -> list[dict[str, jax.Array]]:
    """Returns parameters of layers between arrays of the given sizes."""
    shapes = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    return [
        {"kernel": init(k, shape), "bias": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def train(
    params: Any,
    make: Callable[[Any], methods.Stepper],
    data: tuple[jax.Array, jax.Array],
    rate: Any,
    steps: int,
    batch: int,
    key: jax.Array,
) -> Any:
    """Returns the parameters after SGD with momentum, weight decay and cosine decay.

    `make` maps the base optimizer to a training step; `rate` is the learning rate at
    the start. Images of a batch are drawn with replacement.
    """
    images, labels = data
    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(lambda t: rate * 0.5 * (1 + jnp.cos(jnp.pi * t / steps)), 0.9),
    )
    stepper = make(optimizer)

    def step(carry, key):
        rows = jax.random.randint(key, (batch,), 0, len(labels))
        _, *carry = stepper.step(*carry, (images[rows], labels[rows]))
        return tuple(carry), None

    carry = params, stepper.init(params)
    carry, _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return stepper.weights(*carry)


def minimise(objective: Callable, params: Any, optimizer: Any, inputs: Any) -> Any:
    """Returns the parameters after a step for each of the inputs.

    The objective is a function of parameters and one of the inputs.
    """
    return follow(objective, optimizer, (params, optimizer.init(params)), inputs)[0]


def follow(objective: Callable, optimizer: Any, carry: Any, inputs: Any) -> Any:
    """Returns parameters and state of the optimizer; its batch is one of the inputs."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, one):
        params, state = carry
        gradient = jax.grad(objective)(params, one)
        extra = {"batch": one, "obj_fn": lambda w: objective(w, one)}
        updates, state = optimizer.update(gradient, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, inputs)[0]


def fit(loss: Callable, params: Any, batch: Any, steps: int, decay: float) -> Any:
    """Returns parameters after Adam with cosine decay from 0.01 on the whole batch."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, steps))
    optimizer = optax.chain(optax.add_decayed_weights(decay), optimizer)
    every = jnp.arange(steps)
    return minimise(lambda w, _: loss(w, batch), params, optimizer, every)


def by_adam(
    params: Any, data: Any, steps: int, rate: float, key: jax.Array, mask: Any = None
) -> Any:
    """Returns parameters after Adam with cosine decay, on 50 images a step.

    What the mask drops stays 0.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    rows = jax.random.randint(key, (steps, 50), 0, len(data[1]))

    def loss(params, rows):
        kept = params if mask is None else jax.tree.map(jnp.multiply, params, mask)
        return LOSS(kept, (data[0][rows], data[1][rows]))

    return minimise(loss, params, optimizer, rows)


def train_by(method, gradients, seed, images, labels, rho, rate):
    """Trains a network of two hidden layers of 64 by a method; returns parameters."""
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    params = initial(init_key, (images.shape[1], 64, 64, 10))
    make = partial(methods.stepper, method, LOSS, rho=rho)
    steps = gradients // methods.METHODS[method].passes
    return train(params, make, (images, labels), rate, steps, 50, batch_key)


def score(
    params: Any, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns loss and accuracy."""
    right = jnp.argmax(apply(params, images), -1) == labels
    return LOSS(params, (images, labels)), jnp.mean(right)


def split(data: datasets.Dataset, pool: int = 1) -> list[tuple[jax.Array, Any]]:
    """Returns training and test set: images as rows of pixels in 0..1, and labels."""
    test = data.test_images, jnp.asarray(data.test_labels)
    pairs = (data.train_images, data.train_labels), test
    return [(jnp.asarray(datasets.flat(x, pool)), y) for x, y in pairs]


def noisy_labels(labels: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Returns labels of which a share is wrong, of any of the nine other classes."""
    random = np.random.default_rng(seed)
    wrong = random.random(len(labels)) < noise
    return np.where(wrong, (labels + random.integers(1, 10, len(labels))) % 10, labels)


def compare(
    train: Callable,
    points: Sequence[Mapping[str, float]],
    data: tuple[Any, np.ndarray],
    test: tuple[Any, Any],
    *,
    noise: float,
    seeds: int,
    tuning_seeds: int,
    held: tuple[Any, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Chooses a point of the grid, trains anew at it, and returns what is to be known.

    Chosen is the greatest accuracy on held-out images whose labels are as wrong. Not
    the least loss: with most labels wrong, that is of a network which answers the same
    to everything.

    Args:
        train: `train(seed, images, labels, rho, rate)` returns parameters.
        points: The grid.
        data: Training images and labels.
        test: Test images and labels.
        noise: Share of wrong labels, in training and in what is held out.
        seeds: How many to train at the end.
        tuning_seeds: How many at each point of the grid; others than at the end.
        held: The images held out; default a fifth of the training images.
    """
    images, labels = data
    rhos, rates = methods.columns(points, "rho", "rate")

    def held_out(seed, labels, others, rho, rate):
        if held is not None:
            params = train(seed, images, labels, rho, rate)
            return score(params, held[0], others)[1]
        order = jax.random.permutation(jax.random.key(seed), len(labels))
        kept, used = order[: len(labels) // 5], order[len(labels) // 5 :]
        params = train(seed, images[used], labels[used], rho, rate)
        return score(params, images[kept], labels[kept])[1]

    def noisy(labels, seeds):
        return jnp.stack([noisy_labels(labels, noise, seed) for seed in seeds])

    over_grid = jax.vmap(held_out, in_axes=(None, None, None, 0, 0))
    some = 1000 + np.arange(tuning_seeds)
    others = noisy(labels if held is None else held[1], some)
    search = jax.jit(jax.vmap(over_grid, in_axes=(0, 0, 0, None, None)))
    found = search(jnp.asarray(some), noisy(labels, some), others, rhos, rates)
    best = methods.choose(points, np.mean(found, axis=0))
    params, every = trained(train, best, data, noise, seeds)
    loss, accuracy = jax.vmap(lambda w: score(w, *test))(params)
    answers = jnp.argmax(jax.vmap(apply, in_axes=(0, None))(params, images), -1)
    wrong = every != jnp.asarray(labels)[None]
    learnt = jnp.sum(wrong & (answers == every), 1) / jnp.maximum(jnp.sum(wrong, 1), 1)
    return best | {"accuracy": accuracy, "loss": loss, "wrong labels learnt": learnt}


def trained(train, point, data, noise, seeds):
    """Returns the parameters of all seeds at a point, and their labels."""
    images, labels = data
    every = jnp.stack([noisy_labels(labels, noise, seed) for seed in range(seeds)])
    final = jax.jit(jax.vmap(train, in_axes=(0, None, 0, None, None)))
    params = final(jnp.arange(seeds), images, every, point["rho"], point["rate"])
    return params, every

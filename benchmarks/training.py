"""Training of image classifiers on the device, all networks at once, by any method."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
import harness
import jax
import jax.numpy as jnp
import methods
import models
import numpy as np
import optax

import fsam_optax as fsam


class Problem(NamedTuple):
    """What all methods share. A leading axis of networks has keys and parameters."""

    loss: Any
    data: datasets.Dataset
    moments: tuple[np.ndarray, np.ndarray]
    images: jax.Array
    labels: jax.Array
    test: tuple[jax.Array, jax.Array]
    keys: jax.Array
    params: Any


def make_problem(
    options: argparse.Namespace, seeds: Sequence[int], *, tune: bool = False
) -> Problem:
    """Reads the data, and initialises a network for each seed.

    For tuning, training images that nothing trains on stand in for the test images.
    """
    data = datasets.load(options.data, options.data_dir)
    order = np.random.default_rng(0).permutation(len(data.train_labels))
    size = min(options.train_size or len(order), len(order) * (4 if tune else 5) // 5)
    if options.batch_size > size:
        raise SystemExit(
            f"--batch-size {options.batch_size} is more than {size} images"
        )
    images, labels = data.train_images[order], data.train_labels[order]
    test = data.test_images, data.test_labels
    if tune:
        test = images[size : size + 5000], labels[size : size + 5000]
    model = models.MODELS[options.model]()
    example = jnp.zeros((1, *images.shape[1:]))
    keys = [jax.random.key(seed) for seed in seeds]
    init = jax.jit(lambda key: model.init(key, example)["params"])

    def apply(params, images):
        return jnp.asarray(model.apply({"params": params}, images, train=True))

    return Problem(
        loss=fsam.negative_log_likelihood(apply, fsam.categorical),
        data=data,
        moments=datasets.moments(images[:size]),
        images=jnp.asarray(images[:size]),
        labels=jnp.asarray(labels[:size], jnp.int32),
        test=jax.tree.map(lambda part: jnp.asarray(part[: options.test_size]), test),
        keys=jnp.stack(keys),
        # One seed a call: under vmap this takes several times as long to compile.
        params=jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(init, keys)),
    )


def standardize(problem: Problem, images: jax.Array) -> jax.Array:
    """Maps bytes to floats of zero mean and unit variance."""
    mean, std = np.array(problem.moments, np.float32)[:, None, None, None]
    return (images / 255 - mean) / std


def augment(data: datasets.Dataset, key: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts and mirrors each image of a batch at random; black comes in at the rim."""
    (batch, *shape), shift = images.shape, data.shift
    shift_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    corners = jax.random.randint(shift_key, (batch, 2), 0, 2 * shift + 1)
    crop = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), shape))
    images = crop(padded, corners)
    mirror = data.flip & jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
    return jnp.where(mirror, images[:, :, ::-1], images)


def score(problem: Problem, params: Any) -> tuple[jax.Array, jax.Array]:
    """Returns loss and accuracy on the test images."""

    def example(image_and_label):
        image, label = image_and_label
        h = problem.loss.apply_fn(params, standardize(problem, image[None]))[0]
        return -fsam.categorical.log_prob(h, label), jnp.argmax(h) == label

    size = min(250, len(problem.test[1]))
    loss, right = jax.lax.map(example, problem.test, batch_size=size)
    return jnp.mean(loss), jnp.mean(right)


def train(
    method: str, problem: Problem, options: argparse.Namespace, rho: Any, rate: Any
) -> dict[str, Any]:
    """Trains all networks; returns curves of shape (networks, epochs).

    Radius and learning rate are one for all, or one for each.
    """
    return trainer(method, problem, options)(problem.keys, problem.params, rho, rate)


def trainer(method: str, problem: Problem, options: argparse.Namespace) -> Callable:
    """Returns what trains networks of these keys and parameters, compiled once.

    All methods spend the same gradients, so that one of a single gradient a step runs
    twice the epochs.
    """
    passes = methods.METHODS[method].passes
    epochs, size = options.epochs * 2 // passes, options.batch_size
    steps = len(problem.labels) // size
    schedule = optax.cosine_decay_schedule(1.0, epochs * steps)
    # As arguments: constants of a program are compiled into it.
    arrays = {name: getattr(problem, name) for name in ("images", "labels", "test")}

    def stepper(rho, rate):
        decay = optax.add_decayed_weights(5e-4)
        sgd = optax.sgd(lambda count: rate * schedule(count), momentum=0.9)
        return methods.stepper(method, problem.loss, optax.chain(decay, sgd), rho)

    def init(params, rho, rate):
        return params, stepper(rho, rate).init(params)

    def epoch(carry, key, arrays, rho, rate):
        given = problem._replace(**arrays)

        def step(carry, inputs):
            rows, key = inputs
            images = given.images[rows]
            if options.augment:
                images = augment(given.data, key, images)
            batch = standardize(given, images), given.labels[rows]
            loss, *carry = stepper(rho, rate).step(*carry, batch)
            return tuple(carry), loss

        order_key, augment_key = jax.random.split(key)
        rows = jax.random.permutation(order_key, len(given.labels))[: steps * size]
        inputs = rows.reshape(steps, size), jax.random.split(augment_key, steps)
        carry, losses = jax.lax.scan(step, carry, inputs)
        weights = stepper(rho, rate).weights(*carry)
        return carry, (jnp.mean(losses), *score(given, weights))

    init = jax.jit(jax.vmap(init))
    epoch = jax.jit(jax.vmap(epoch, in_axes=(0, 0, None, 0, 0)))

    def run(keys, params, rho, rate):
        point = [jnp.broadcast_to(x, keys.shape) for x in (rho, rate)]
        carry, history = init(params, *point), []
        for number in range(epochs):
            folded = jax.vmap(partial(jax.random.fold_in, data=number))(keys)
            carry, found = epoch(carry, folded, arrays, *point)
            history.append(jax.device_get(found))
            if (number + 1) % max(1, epochs // 4) == 0:
                accuracy = np.mean(history[-1][2])
                harness.say(f"  epoch {number + 1}/{epochs}, accuracy {accuracy:.1%}")
        curves = (np.stack(values, -1) for values in zip(*history, strict=True))
        names = "train_loss", "test_loss", "accuracy"
        gradients = passes * steps * np.arange(1, epochs + 1)
        return {"gradients": gradients, **dict(zip(names, curves, strict=True))}

    return run

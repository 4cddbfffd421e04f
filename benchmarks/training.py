"""Training of image classifiers on the device, all seeds at once, by any method."""

import argparse
from collections.abc import Sequence
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
import perceptron

import fsam_optax as fsam


class Problem(NamedTuple):
    """What all methods share. A leading axis of seeds has labels, keys and params."""

    loss: Any
    data: datasets.Dataset
    moments: tuple[np.ndarray, np.ndarray]
    images: jax.Array
    labels: jax.Array
    test: tuple[jax.Array, jax.Array]
    keys: jax.Array
    params: Any


def make_problem(
    options: argparse.Namespace, *, tune: bool = False, seeds: Sequence[int] = ()
) -> Problem:
    """Reads the data, makes labels wrong, and initialises a network for each seed.

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
    seeds = seeds or range(options.seeds)
    noisy = [perceptron.noisy_labels(labels, options.label_noise, s) for s in seeds]
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
        labels=jnp.asarray(np.stack(noisy)[:, :size], jnp.int32),
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
    shift, (batch, height, width, _) = data.shift, images.shape
    shift_key, flip_key = jax.random.split(key)
    if shift:
        padding = ((0, 0), (shift, shift), (shift, shift), (0, 0))
        corners = jax.random.randint(shift_key, (batch, 2), 0, 2 * shift + 1)
        rows = corners[:, :1] + jnp.arange(height)[None]
        columns = corners[:, 1:] + jnp.arange(width)[None]
        crop = jax.vmap(lambda image, i, j: image[i][:, j])
        images = crop(jnp.pad(images, padding), rows, columns)
    if data.flip:
        mirror = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        images = jnp.where(mirror, images[:, :, ::-1], images)
    return images


def epochs_of(method: str, options: argparse.Namespace) -> int:
    """Returns the number of epochs that makes all methods spend the same gradients."""
    return options.epochs * 2 // methods.METHODS[method].passes


def make_training(method: str, problem: Problem, options: argparse.Namespace):
    """Returns the functions `init`, `epoch` and `score` of one seed.

    `init(params, rho, rate)` returns what `epoch(carry, key, rho, rate, labels)` takes;
    `score(carry, rho, rate)` is loss and accuracy on the test images.
    """
    size, batch_size = problem.labels.shape[1], options.batch_size
    total_steps = epochs_of(method, options) * (size // batch_size)

    def stepper(rho, rate):
        schedule = optax.cosine_decay_schedule(1.0, total_steps)

        def decayed(count):
            return rate * schedule(count)

        if options.optimizer == "adamw":
            base = optax.adamw(decayed, weight_decay=options.weight_decay)
        else:
            decay = optax.add_decayed_weights(options.weight_decay)
            base = optax.chain(decay, optax.sgd(decayed, momentum=0.9))
        return methods.stepper(method, problem.loss, base, rho)

    def init(params, rho, rate):
        return params, stepper(rho, rate).init(params)

    def epoch(carry, key, rho, rate, labels):
        order_key, augment_key = jax.random.split(key)
        steps = size // batch_size
        rows = jax.random.permutation(order_key, size)[: steps * batch_size]

        def step(carry, inputs):
            rows, key = inputs
            images = problem.images[rows]
            if options.augment:
                images = augment(problem.data, key, images)
            batch = standardize(problem, images), labels[rows]
            loss, *carry = stepper(rho, rate).step(*carry, batch)
            return tuple(carry), loss

        keys = jax.random.split(augment_key, steps)
        carry, losses = jax.lax.scan(step, carry, (rows.reshape(steps, -1), keys))
        return carry, jnp.mean(losses)

    def score(carry, rho, rate):
        params = stepper(rho, rate).weights(*carry)

        def example(image_and_label):
            image, label = image_and_label
            h = problem.loss.apply_fn(params, standardize(problem, image[None]))[0]
            return -fsam.categorical.log_prob(h, label), jnp.argmax(h) == label

        size = min(1000, len(problem.test[1]))
        loss, right = jax.lax.map(example, problem.test, batch_size=size)
        return jnp.mean(loss), jnp.mean(right)

    return init, epoch, score


def train(method, problem, options, rho, rate) -> dict[str, Any]:
    """Trains all seeds at once; returns curves of shape (seeds, epochs)."""
    init, epoch, score = make_training(method, problem, options)
    fixed = None, None
    init = jax.jit(jax.vmap(init, (0, *fixed)))
    epoch = jax.jit(jax.vmap(epoch, (0, 0, *fixed, 0)))
    score = jax.jit(jax.vmap(score, (0, *fixed)))
    carry, history = init(problem.params, rho, rate), []
    epochs = epochs_of(method, options)
    for number in range(epochs):
        keys = jax.vmap(partial(jax.random.fold_in, data=number))(problem.keys)
        carry, loss = epoch(carry, keys, rho, rate, problem.labels)
        history.append(jax.device_get((loss, *score(carry, rho, rate))))
        if (number + 1) % max(1, epochs // 4) == 0:
            accuracy = np.mean(history[-1][2])
            harness.say(f"  epoch {number + 1}/{epochs}, accuracy {accuracy:.1%}")
    names = ("train_loss", "test_loss", "accuracy")
    curves = (np.stack(values, -1) for values in zip(*history, strict=True))
    steps = problem.labels.shape[1] // options.batch_size
    gradients = methods.METHODS[method].passes * steps * np.arange(1, epochs + 1)
    return {"gradients": gradients, **dict(zip(names, curves, strict=True))}


def search(method, problem, options, points) -> dict[str, Any]:
    """Trains at every point of a grid, and returns accuracy and loss of each."""
    init, epoch, score = make_training(method, problem, options)

    def final(params, key, labels, rho, rate):
        def advance(carry, number):
            key_of = jax.random.fold_in(key, number)
            return epoch(carry, key_of, rho, rate, labels)[0], None

        numbers = jnp.arange(epochs_of(method, options))
        carry, _ = jax.lax.scan(advance, init(params, rho, rate), numbers)
        return score(carry, rho, rate)

    every = jax.vmap(final, (0, 0, 0, None, None))
    inputs = problem.params, problem.keys, problem.labels
    # Eight points at once: a larger program is no faster.
    loss, accuracy = jax.jit(
        lambda *points: jax.lax.map(lambda p: every(*inputs, *p), points, batch_size=8)
    )(*methods.columns(points, "rho", "rate"))
    return {"points": points, "accuracy": accuracy.mean(1), "loss": loss.mean(1)}

"""What the experiments with a small ReLU network share: the model and its training."""

import itertools
from functools import partial
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax

import fsam_optax as fsam


def apply(params, x, activation=jax.nn.relu):
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
HE = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def initial(key, sizes, init=HE):
    """Returns parameters of layers between arrays of the given sizes."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"kernel": init(k, shape), "bias": jnp.zeros(shape[1])}
        for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def train(params, make, data, rate, steps, batch, key):
    """Returns the parameters after SGD with momentum, weight decay and cosine decay.

    `make` maps the base optimizer to a `methods.Stepper`; `rate` is that at the start.
    """
    images, labels = data
    schedule = optax.cosine_decay_schedule(1.0, steps)
    base = optax.sgd(lambda count: rate * schedule(count), 0.9)
    stepper = make(optax.chain(optax.add_decayed_weights(5e-4), base))

    def step(carry, key):
        rows = jax.random.randint(key, (batch,), 0, len(labels))
        _, *carry = stepper.step(*carry, (images[rows], labels[rows]))
        return tuple(carry), None

    carry = params, stepper.init(params)
    carry, _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return stepper.weights(*carry)


def minimise(objective, params, optimizer, inputs):
    """Returns the parameters after a step on `objective(params, one)` of each input."""
    return follow(objective, optimizer, (params, optimizer.init(params)), inputs)[0]


def follow(objective, optimizer, carry, inputs):
    """Returns parameters and state of the optimizer; its batch is one of the inputs."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, one):
        params, state = carry
        gradient = jax.grad(objective)(params, one)
        extra = {"batch": one, "obj_fn": lambda w: objective(w, one)}
        updates, state = optimizer.update(gradient, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, inputs)[0]


def fit(loss, params, batch, steps, decay):
    """Returns parameters after Adam with cosine decay from 0.01 on the whole batch."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, steps))
    optimizer = optax.chain(optax.add_decayed_weights(decay), optimizer)
    return minimise(lambda w, _: loss(w, batch), params, optimizer, jnp.arange(steps))


def by_adam(params, data, steps, rate, key, mask=None):
    """Returns parameters after Adam on 50 images a step; what the mask drops is 0."""
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


def score(params, images, labels):
    """Returns loss and accuracy."""
    right = jnp.argmax(apply(params, images), -1) == labels
    return LOSS(params, (images, labels)), jnp.mean(right)


def split(data, pool=1):
    """Returns training and test set: images as rows of pixels in 0..1, and labels."""
    test = data.test_images, jnp.asarray(data.test_labels)
    pairs = (data.train_images, data.train_labels), test
    return [(jnp.asarray(datasets.flat(x, pool)), y) for x, y in pairs]


def noisy_labels(labels, noise, seed):
    """Returns labels of which a share is wrong, of any of the nine other classes."""
    random = np.random.default_rng(seed)
    wrong = random.random(len(labels)) < noise
    return np.where(wrong, (labels + random.integers(1, 10, len(labels))) % 10, labels)


def compare(train, points, data, test, *, noise, seeds, tuning_seeds, held=None):
    """Chooses a point of a grid, trains anew at it, and returns it with accuracies.

    `train(seed, images, labels, rho, rate)` returns parameters. Chosen is the greatest
    accuracy on `held`, or on a fifth of the training images, whose labels are as wrong,
    of other seeds than at the end. Not the least loss: with most labels wrong, that is
    of a network which answers the same to everything.
    """
    images, labels = data

    def held_out(seed, labels, others, rho, rate):
        if held is not None:
            return score(train(seed, images, labels, rho, rate), held[0], others)[1]
        order = jax.random.permutation(jax.random.key(seed), len(labels))
        kept, used = order[: len(labels) // 5], order[len(labels) // 5 :]
        params = train(seed, images[used], labels[used], rho, rate)
        return score(params, images[kept], labels[kept])[1]

    def noisy(labels, seeds):
        return jnp.stack([noisy_labels(labels, noise, int(seed)) for seed in seeds])

    some = 1000 + np.arange(tuning_seeds)
    others = noisy(labels if held is None else held[1], some)
    over_grid = jax.vmap(held_out, in_axes=(None, None, None, 0, 0))
    search = jax.jit(jax.vmap(over_grid, in_axes=(0, 0, 0, None, None)))
    grid = methods.columns(points, "rho", "rate")
    found = search(jnp.asarray(some), noisy(labels, some), others, *grid)
    best = methods.choose(points, np.mean(found, axis=0))
    final = jax.jit(jax.vmap(train, in_axes=(0, None, 0, None, None)))
    seeds = jnp.arange(seeds)
    params = final(seeds, images, noisy(labels, seeds), best["rho"], best["rate"])
    return best | {"accuracy": jax.vmap(lambda w: score(w, *test)[1])(params)}

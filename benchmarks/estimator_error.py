"""Question: how far from the exact Fisher diagonal is one draw of each estimator?

A small network is trained on the handwritten digits, to several stages: the surer it
is of its labels, the fewer drawn labels say anything. The error is the root of the
mean square over draws of ||estimate - exact|| / ||exact||, over all parameters. The
empirical Fisher and the squared gradient do not vary: theirs is a bias.

    python benchmarks/estimator_error.py
"""

from functools import partial

import harness
import jax
import jax.numpy as jnp
import optax
import perceptron
import show
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import fsam_optax as fsam


ACTIVATIONS = {"ReLU": jax.nn.relu, "tanh": jnp.tanh}
ESTIMATORS = {
    "squared_gradient": lambda loss, key: fsam.squared_gradient(),
    "fisher_empirical": lambda loss, key: fsam.fisher_empirical(loss),
    "fisher_gnb": fsam.fisher_gnb,
    "fisher_i1": fsam.fisher_i1,
    "fisher_hutchinson": fsam.fisher_hutchinson,
    "fisher_i2, exact Hessian": fsam.fisher_i2,
    "fisher_i2, Hutchinson": partial(fsam.fisher_i2, hessian="hutchinson"),
}


def stage(steps, activation, draws, size):
    """Returns accuracy of a network after some steps, and errors by estimator."""
    x, y = load_digits(return_X_y=True)
    data = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    apply = partial(perceptron.apply, activation=ACTIVATIONS[activation])
    loss = fsam.negative_log_likelihood(apply, fsam.categorical)

    def of_batch(params, key):
        rows = jax.random.randint(key, (64,), 0, len(y))
        return loss(params, (data[0][rows], data[1][rows]))

    keys = jax.random.split(jax.random.key(1), steps)
    start = perceptron.initial(jax.random.key(0), (64, 64, 64, 10))
    train = partial(perceptron.minimise, of_batch, optimizer=optax.adam(1e-3))
    params = jax.jit(train)(start, inputs=keys)
    batch = data[0][:size], data[1][:size]
    grads = jax.grad(loss)(params, batch)
    exact = ravel_pytree(fsam.diagonal(fsam.fisher_exact(loss), params, batch))[0]

    def square(make, key):
        estimator = optax.with_extra_args_support(make(loss, key=key))
        state = estimator.init(params)
        estimate, _ = estimator.update(grads, state, params, batch=batch)
        return jnp.sum((ravel_pytree(estimate)[0] - exact) ** 2)

    keys, errors = jax.random.split(jax.random.key(2), draws), {}
    for name, make in ESTIMATORS.items():
        squares = jax.jit(partial(jax.lax.map, partial(square, make)))(keys)
        errors[name] = {"error": (jnp.mean(squares) / jnp.sum(exact**2)) ** 0.5}
    right = jnp.mean(jnp.argmax(apply(params, data[0]), -1) == data[1])
    return {"accuracy": right, "errors": errors}


@harness.experiment(
    smoke={"activations": ["tanh"], "stages": [10], "draws": 2},
    activations={"default": list(ACTIVATIONS), "choices": ACTIVATIONS},
    stages={"default": [0, 100, 1000], "type": int, "help": "steps"},
    draws=200,
)
def main(run: harness.Run) -> None:
    columns: show.Columns = {"one estimate": lambda name, _: name}
    for activation in run.options.activations:
        key = {"activation": activation, "draws": run.options.draws, "size": 128}
        found = run.each("steps", run.options.stages, stage, *key.values(), **key)
        for steps, facts in found.items():
            errors, right = facts["errors"], f"{facts['accuracy']:.0%}"
            at = f"{activation}\n{steps}\n{right}"
            columns[at] = lambda name, _, of=errors: f"{of[name]['error']:.3f}"
    title = "Error over the exact diagonal, by network, steps, accuracy"
    show.report(title, ESTIMATORS, columns)


if __name__ == "__main__":
    raise SystemExit(main())

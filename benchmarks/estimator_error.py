"""Question: how far from the exact Fisher diagonal is one draw of each estimator?

A small network is trained on the handwritten digits, to several stages: the surer it
is of its labels, the fewer drawn labels say anything. The error is the root of the
mean square over draws of ||estimate - exact|| / ||exact||, over all parameters. The
empirical Fisher and the squared gradient do not vary: theirs is a bias. Beside it is
the standard error that the estimator reports, relative to the error that it has.

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
    "fisher_gnb": partial(fsam.fisher_gnb, standard_error=True),
    "fisher_i1": partial(fsam.fisher_i1, standard_error=True),
    "fisher_hutchinson": partial(fsam.fisher_hutchinson, standard_error=True),
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
        return loss(params, jax.tree.map(lambda x: x[rows], data))

    keys = jax.random.split(jax.random.key(1), steps)
    start = perceptron.initial(jax.random.key(0), (64, 64, 64, 10))
    train = partial(perceptron.minimise, of_batch, optimizer=optax.adam(1e-3))
    params = jax.jit(train)(start, inputs=keys)
    batch = jax.tree.map(lambda x: x[:size], data)
    grads = jax.grad(loss)(params, batch)
    exact = ravel_pytree(fsam.diagonal(fsam.fisher_exact(loss), params, batch))[0]

    def draw(make, key):
        estimator = optax.with_extra_args_support(make(loss, key=key))
        state = estimator.init(params)
        estimate, state = estimator.update(grads, state, params, batch=batch)
        reported = ravel_pytree(getattr(state, "standard_error", ()))[0]
        square = jnp.sum((ravel_pytree(estimate)[0] - exact) ** 2)
        return square, jnp.sum(reported**2)

    keys, facts = jax.random.split(jax.random.key(2), draws), {}
    for name, make in ESTIMATORS.items():
        every = jax.jit(partial(jax.lax.map, partial(draw, make)))(keys)
        square, reported = (float(jnp.mean(of)) for of in every)
        facts[name] = {"error": (square / jnp.sum(exact**2)) ** 0.5}
        if reported:
            facts[name]["reported"] = (reported / square) ** 0.5
    right = jnp.mean(jnp.argmax(apply(params, data[0]), -1) == data[1])
    return {"accuracy": right, "errors": facts}


@harness.experiment(
    smoke={"activations": ["tanh"], "stages": [10], "draws": 2, "batch": 8},
    activations={"default": list(ACTIVATIONS), "choices": ACTIVATIONS},
    stages={"default": [0, 100, 1000], "type": int, "help": "steps"},
    draws=200,
    batch=128,
)
def main(run: harness.Run) -> None:
    options = run.options
    key = {"draws": options.draws, "size": options.batch}
    columns: show.Columns = {"one estimate": lambda name, _: name}
    for activation in options.activations:
        args = options.stages, stage, activation, *key.values()
        found = run.each("steps", *args, activation=activation, **key)
        for steps, facts in found.items():

            def entry(name, _, errors=facts["errors"]):
                reported = errors[name].get("reported")
                shown = " " * 5 if reported is None else f" {reported:.2f}"
                return f"{errors[name]['error']:.3f}{shown}"

            right = f"{facts['accuracy']:.0%} right"
            columns[f"{activation},\n{steps} steps,\n{right}"] = entry
    show.report("error, reported / actual error", ESTIMATORS, columns)


if __name__ == "__main__":
    raise SystemExit(main())

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
import numpy as np
import optax
import perceptron
import show
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import fsam_optax as fsam


ACTIVATIONS = {"ReLU": jax.nn.relu, "tanh": jnp.tanh}


def train(activation, data, steps):
    """Returns a trained 64-64-64-10 network, and its accuracy on the training data."""
    apply = partial(perceptron.apply, activation=ACTIVATIONS[activation])
    params = perceptron.initial(jax.random.key(0), (64, 64, 64, 10))
    loss = fsam.negative_log_likelihood(apply, fsam.categorical)

    def of_batch(params, key):
        index = jax.random.randint(key, (64,), 0, len(data[0]))
        return loss(params, jax.tree.map(lambda x: x[index], data))

    keys = jax.random.split(jax.random.key(1), steps)
    run = partial(
        perceptron.minimise, of_batch, optimizer=optax.adam(1e-3), inputs=keys
    )
    params = jax.jit(run)(params)
    right = jnp.mean(jnp.argmax(apply(params, data[0]), -1) == data[1])
    return loss, params, right


def estimators(loss):
    """Returns `make(key)` by name."""
    errors, ten = {"standard_error": True}, {"standard_error": True, "num_samples": 10}
    hutchinson = {"hessian": "hutchinson"}
    sampled = {
        "fisher_gnb": (fsam.fisher_gnb, errors),
        "fisher_i1": (fsam.fisher_i1, errors),
        "fisher_i1, 10 draws": (fsam.fisher_i1, ten),
        "fisher_hutchinson": (fsam.fisher_hutchinson, errors),
        "fisher_hutchinson, 10 draws": (fsam.fisher_hutchinson, ten),
        "fisher_i2, exact Hessian": (fsam.fisher_i2, {}),
        "fisher_i2, Hutchinson": (fsam.fisher_i2, hutchinson),
        "fisher_i2, Hutchinson, 10 draws": (fsam.fisher_i2, hutchinson | ten),
    }
    return {
        "squared_gradient": lambda key: fsam.squared_gradient(),
        "fisher_empirical": lambda key: fsam.fisher_empirical(loss),
        **{
            name: lambda key, make=make, options=options: make(loss, key=key, **options)
            for name, (make, options) in sampled.items()
        },
    }


def measure(loss, params, batch, draws):
    """Returns the figures of every estimator."""
    truth = _flat(fsam.diagonal(fsam.fisher_exact(loss), params, batch))
    truth = np.asarray(truth, np.float64)
    grads = jax.grad(loss)(params, batch)
    facts = {}
    for name, make in estimators(loss).items():

        @jax.jit
        def draw(key, make=make):
            estimator = optax.with_extra_args_support(make(key))
            state = estimator.init(params)
            estimate, state = estimator.update(grads, state, params, batch=batch)
            return _flat(estimate), _flat(getattr(state, "standard_error", ()))

        pairs = [draw(key) for key in jax.random.split(jax.random.key(2), draws)]
        estimates = np.array([x for x, _ in pairs], np.float64)
        squares = np.sum((estimates - truth) ** 2, axis=1)
        facts[name] = {
            "error": np.sqrt(squares.mean() / np.sum(truth**2)),
            "mean": estimates.mean() / truth.mean(),
        }
        reported = np.mean([np.sum(np.asarray(e) ** 2) for _, e in pairs])
        if reported:
            facts[name]["reported"] = np.sqrt(reported / squares.mean())
    return facts


def _flat(tree):
    return ravel_pytree(tree)[0]


def stage(steps, activation, draws, size):
    """Returns the figures of a network after some steps, and its accuracy."""
    x, y = load_digits(return_X_y=True)
    data = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    loss, params, accuracy = train(activation, data, steps)
    batch = jax.tree.map(lambda x: x[:size], data)
    return {"accuracy": accuracy, "errors": measure(loss, params, batch, draws)}


def written(facts):
    """Writes the error, and what the estimator reports of it where it does."""
    reported = facts.get("reported")
    shown = "    -" if reported is None else f"{reported:5.2f}"
    return f"{facts['error']:.3f} {shown}"


@harness.experiment(
    smoke={"activations": ["tanh"], "stages": [10], "draws": 2, "batch": 8},
    activations={"default": list(ACTIVATIONS), "choices": ACTIVATIONS},
    stages={"default": [0, 100, 1000], "type": int, "help": "steps"},
    draws=200,
    batch=128,
)
def main(run: harness.Run) -> None:
    options = run.options
    settings = {"draws": options.draws, "size": options.batch}
    for name in options.activations:
        args = stage, name, *settings.values()
        found = run.each("steps", options.stages, *args, activation=name, **settings)
        columns: show.Columns = {"one estimate": lambda row, _: row}
        rows = found[options.stages[0]]["errors"]
        for steps, facts in found.items():
            heading = f"{steps} steps,\n{facts['accuracy']:.0%} right"
            columns[heading] = lambda row, _, f=facts: written(f["errors"][row])
        title = f"{name} network: error, reported / actual error"
        show.report(title, rows, columns)


if __name__ == "__main__":
    raise SystemExit(main())

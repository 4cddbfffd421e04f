"""Question: how far from the exact Fisher diagonal is one draw of each estimator?

A small network is trained on the handwritten digits, to several stages: the surer it
is of its labels, the fewer drawn labels say anything. The error is the root of the
mean square over draws of ||estimate - exact|| / ||exact||, over all parameters. The
empirical Fisher and the squared gradient do not vary: theirs is a bias. Beside it is
the standard error that the estimator reports, relative to the error that it has.

    python benchmarks/estimator_error.py
"""

import sys

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
import show
from sklearn.datasets import load_digits

import fsam_optax as fsam


ACTIVATIONS = {"ReLU": jax.nn.relu, "tanh": jnp.tanh}


def network(activation):
    """Returns a 64-64-64-10 network and its initial parameters."""

    def apply(params, x):
        for layer in params[:-1]:
            x = activation(x @ layer["kernel"] + layer["bias"][None])
        return x @ params[-1]["kernel"] + params[-1]["bias"][None]

    return apply, perceptron.initial(jax.random.key(0), (64, 64, 64, 10))


def train(apply, params, data, steps):
    """Returns parameters and the accuracy on the training data."""
    loss = fsam.negative_log_likelihood(apply, fsam.categorical)
    optimizer = optax.adam(1e-3)

    def of_batch(params, key):
        index = jax.random.randint(key, (64,), 0, len(data[0]))
        return loss(params, jax.tree.map(lambda x: x[index], data))

    keys = jax.random.split(jax.random.key(1), steps)
    params = jax.jit(lambda w: perceptron.minimise(of_batch, w, optimizer, keys))(
        params
    )
    return params, float(jnp.mean(jnp.argmax(apply(params, data[0]), -1) == data[1]))


def estimators(apply):
    """Returns `make(key)` by name."""
    model = apply, fsam.categorical

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
        "fisher_empirical": lambda key: fsam.fisher_empirical(*model),
        **{
            name: lambda key, make=make, options=options: make(
                *model, key=key, **options
            )
            for name, (make, options) in sampled.items()
        },
    }


def measure(apply, params, batch, draws):
    """Returns the figures of every estimator."""
    exact = fsam.diagonal(fsam.fisher_exact(apply, fsam.categorical), params, batch)
    loss = fsam.negative_log_likelihood(apply, fsam.categorical)
    grads = jax.grad(loss)(params, batch)
    facts = {}
    for name, make in estimators(apply).items():

        @jax.jit
        def draw(key, make=make):
            estimator = optax.with_extra_args_support(make(key))
            state = estimator.init(params)
            estimate, state = estimator.update(grads, state, params, batch=batch)
            return _flat(estimate), _flat(getattr(state, "standard_error", None))

        keys = jax.random.split(jax.random.key(2), draws)
        pairs = [draw(key) for key in keys]
        estimates = np.array([x for x, _ in pairs], np.float64)
        truth = np.asarray(_flat(exact), np.float64)
        squares = np.sum((estimates - truth) ** 2, axis=1)
        facts[name] = {
            "error": float(np.sqrt(squares.mean() / np.sum(truth**2))),
            "mean": float(estimates.mean() / truth.mean()),
        }
        if pairs[0][1] is not None:
            reported = np.mean([np.sum(np.asarray(e) ** 2) for _, e in pairs])
            facts[name]["reported"] = float(np.sqrt(reported / squares.mean()))
    return facts


def _flat(tree):
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([x.ravel() for x in leaves]) if leaves else None


def stage(activation, steps, draws, size):
    """Returns the figures of a network after some steps, and its accuracy."""
    x, y = load_digits(return_X_y=True)
    data = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    apply, params = network(ACTIVATIONS[activation])
    params, accuracy = train(apply, params, data, steps)
    batch = jax.tree.map(lambda x: x[:size], data)
    return {"accuracy": accuracy, "errors": measure(apply, params, batch, draws)}


def experiment(run: harness.Run) -> None:
    """Measures what the results do not hold, and prints the tables."""
    options = run.options
    for name in options.activations:
        columns, headings = [], ["one estimate"]
        for steps in options.stages:
            settings = {"draws": options.draws, "size": options.batch}
            args = stage, name, steps, options.draws, options.batch
            found = run.cell(*args, activation=name, steps=steps, **settings)
            columns.append(found["errors"])
            headings.append(f"{steps} steps,\n{found['accuracy']:.0%} right")
        rows = []
        for row in columns[0]:
            cells = []
            for facts in columns:
                reported = facts[row].get("reported")
                shown = "    -" if reported is None else f"{reported:5.2f}"
                cells.append(f"{facts[row]['error']:.3f} {shown}")
            rows.append([row, *cells])
        show.table(f"{name} network: error, reported / actual error", headings, rows)


main = harness.script(
    *(__doc__, experiment),
    smoke={"activations": ["tanh"], "stages": [10], "draws": 2, "batch": 8},
    activations={"default": list(ACTIVATIONS), "choices": ACTIVATIONS},
    stages={"default": [0, 100, 1000], "type": int, "help": "steps"},
    draws=200,
    batch=128,
)


if __name__ == "__main__":
    sys.exit(main())

"""Question: how far from the exact Fisher diagonal is one draw of each estimator?

A small network is trained on the handwritten digits, to several stages: the surer it
is of its labels, the fewer drawn labels say anything. The error is the root of the
mean square over draws of ||estimate - exact|| / ||exact||, over all parameters. The
empirical Fisher and the squared gradient do not vary: theirs is a bias. Beside it is
the standard error that the estimator reports, relative to the error that it has.

    python benchmarks/estimator_error.py
    python benchmarks/estimator_error.py --smoke        # to see that it runs
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cost import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import fsam_optax as fsam


RESULTS = pathlib.Path(__file__).parent / "results" / "estimator_error.json"
ACTIVATIONS = {"ReLU": jax.nn.relu, "tanh": jnp.tanh}


def network(activation):
    """Returns a 64-64-64-10 network and its initial parameters."""
    sizes = (64, 64, 64, 10)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        {
            "kernel": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5,
            "bias": jnp.zeros(n),
        }
        for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]

    def apply(params, x):
        for layer in params[:-1]:
            x = activation(x @ layer["kernel"] + layer["bias"][None])
        return x @ params[-1]["kernel"] + params[-1]["bias"][None]

    return apply, params


def train(apply, params, data, steps):
    """Returns parameters and the accuracy on the training data."""
    loss = fsam.negative_log_likelihood(apply, fsam.categorical)
    optimizer = optax.adam(1e-3)

    def step(carry, key):
        params, state = carry
        index = jax.random.randint(key, (64,), 0, len(data[0]))
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[index], data))
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
        (params, optimizer.init(params))
    )
    return params, float(jnp.mean(jnp.argmax(apply(params, data[0]), -1) == data[1]))


def estimators(apply):
    """Returns `make(key)` by name."""
    model = apply, fsam.categorical

    def sampled(make, **options):
        return lambda key: make(*model, key=key, **options)

    errors = {"standard_error": True}
    return {
        "squared_gradient": lambda _: fsam.squared_gradient(),
        "fisher_empirical": lambda _: fsam.fisher_empirical(*model),
        "fisher_gnb": sampled(fsam.fisher_gnb, **errors),
        "fisher_i1": sampled(fsam.fisher_i1, **errors),
        "fisher_i1, 10 draws": sampled(fsam.fisher_i1, num_samples=10, **errors),
        "fisher_hutchinson": sampled(fsam.fisher_hutchinson, **errors),
        "fisher_hutchinson, 10 draws": sampled(
            fsam.fisher_hutchinson, num_samples=10, **errors
        ),
        "fisher_i2, exact Hessian": sampled(fsam.fisher_i2),
        "fisher_i2, Hutchinson": sampled(fsam.fisher_i2, hessian="hutchinson"),
        "fisher_i2, Hutchinson, 10 draws": sampled(
            fsam.fisher_i2, hessian="hutchinson", num_samples=10, **errors
        ),
    }


def measure(apply, params, batch, draws, description):
    """Returns the figures of every estimator."""
    exact = fsam.diagonal(fsam.fisher_exact(apply, fsam.categorical), params, batch)
    loss = fsam.negative_log_likelihood(apply, fsam.categorical)
    grads = jax.grad(loss)(params, batch)
    facts = {}
    for name, make in track(estimators(apply).items(), description, transient=True):

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


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the figures and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="two draws")
    options = parser.parse_args(arguments)
    x, y = load_digits(return_X_y=True)
    data = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    stages, activations = (0, 100, 1000), dict(ACTIVATIONS)
    if options.smoke:
        options.draws, options.batch, stages = 2, 8, (10,)
        activations = {"tanh": jnp.tanh}
    batch = jax.tree.map(lambda x: x[: options.batch], data)
    console = Console(width=100)
    for name, activation in activations.items():
        apply, initial = network(activation)
        columns = {}
        for steps in stages:
            params, accuracy = train(apply, initial, data, steps)
            title = f"{steps} steps, {100 * accuracy:.0f} % right"
            columns[title] = measure(
                apply, params, batch, options.draws, f"{name}, {title}"
            )
        save(options.out, name, columns, draws=options.draws, batch=options.batch)
        table = Table(title=f"{name} network: error, reported / actual error")
        table.add_column("one estimate")
        for title in columns:
            table.add_column(title, justify="right")
        for row in next(iter(columns.values())):
            cells = []
            for facts in columns.values():
                this = facts[row]
                reported = this.get("reported")
                shown = "-" if reported is None else f"{reported:.2f}"
                cells.append(f"{this['error']:.3f}   {shown:>5}")
            table.add_row(row, *cells)
        console.print(table)


if __name__ == "__main__":
    main()

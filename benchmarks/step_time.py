"""Question: what does a step cost beside the two gradients it is made of?

Every row is one jitted, donated training step; all rows of a model run in one process,
interleaved, and are divided by the base step's time. The yardstick is the row "two
gradients by hand": SAM written out in seven lines, with no metrics and no safeguards.

    python benchmarks/step_time.py                        # all models, SGD
    python benchmarks/step_time.py --models mlp --optimizer adamw
    python benchmarks/step_time.py --leaves               # compile time, many leaves
    python benchmarks/step_time.py --smoke                # to see that it runs
"""

import argparse
import math
import pathlib
from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp
import optax
from cost import (
    compiled,
    passes,
    print_table,
    Problem,
    PROBLEMS,
    ratios,
    save,
    SMOKE,
)

import fsam_optax as fsam


RESULTS = pathlib.Path(__file__).parent / "results" / "step_time.json"
OPTIMIZERS = {
    "sgd": optax.sgd(0.01, momentum=0.9),
    "adamw": optax.adamw(1e-3),
}
LEAVES_ROWS = (
    "base",
    "two gradients by hand",
    "optax.contrib.sam, opaque",
    "SAM, no metrics",
    "SAM",
    "ASAM, no metrics",
    "Fisher SAM, empirical, fused, no metrics",
)
# On a CPU, XLA is slow with the gradient of a convolution's kernel in a branch or loop.
IN_CONTROL_FLOW = (
    "SAM, every=2, no metrics",
    "SAM, every=5, no metrics",
    "SAM, micro_batches=4, no metrics",
)
# What these save shows over whole cycles of steps only.
CYCLE = 10
CYCLIC = (
    "Fisher SAM, I1 every 10th step, no metrics",
    "Fisher SAM, exact every 10th step, no metrics",
    "SAM, every=2, no metrics",
    "SAM, every=5, no metrics",
)


def make_steps(model: Problem, optimizer) -> dict[str, tuple[Callable, Callable]]:
    """Returns `init(params) -> state` and `step(params, state, batch)` by name."""
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    gradient = jax.grad(loss)

    def base(params, state, batch):
        updates, state = optimizer.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    def by_hand(params, state, batch):
        g = gradient(params, batch)
        scale = 0.05 / optax.tree.norm(g)
        g = gradient(jax.tree.map(lambda w, e: w + scale * e, params, g), batch)
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    def wrapped(tx):
        def step(params, state, batch):
            def grad_fn(p, *_):
                return gradient(p, batch)

            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), state

        return tx.init, step

    def ours(perturbation, **options):
        return wrapped(fsam.sharpness_aware(optimizer, perturbation, **options))

    def oracle(perturbation, **options):
        f = fsam.value_and_grad(loss, perturbation, **options)

        def init(params):
            return f.init(params), optimizer.init(params)

        def step(params, state, batch):
            _, grads, oracle_state = f(params, state[0], batch)
            updates, base_state = optimizer.update(grads, state[1], params)
            return optax.apply_updates(params, updates), (oracle_state, base_state)

        return init, step

    def fisher(make, **options):
        estimator = make(model.apply, fsam.categorical, **options)
        return fsam.fisher_ellipsoid(0.1, estimator)

    def refreshed(make, **options):
        estimator = make(model.apply, fsam.categorical, **options)
        return fsam.fisher_ellipsoid(0.1, fsam.refresh_every(10, estimator))

    def last_layer_i2():
        last = [*model.params][-1]

        def label(params):
            return {k: "last" if k == last else "rest" for k in params}

        return fsam.by_group(
            label,
            {
                "last": fsam.fisher_i2(model.apply, fsam.categorical, key=key),
                "rest": fsam.fisher_i1(model.apply, fsam.categorical, key=key),
            },
        )

    key = jax.random.key(0)
    ball = fsam.euclidean_ball(0.05)
    squared = fsam.fisher_ellipsoid(0.1, fsam.squared_gradient())
    return {
        "base": (optimizer.init, base),
        "two gradients by hand": (optimizer.init, by_hand),
        "optax.contrib.sam, opaque": wrapped(
            optax.contrib.sam(
                optimizer,
                optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
                opaque_mode=True,
            )
        ),
        "SAM, no metrics": ours(ball, metrics=False),
        "SAM": ours(ball),
        "SAM, value_and_grad, no metrics": oracle(ball, metrics=False),
        "SAM, value_and_grad": oracle(ball),
        "ASAM, no metrics": ours(fsam.adaptive_ellipsoid(0.5), metrics=False),
        "ASAM, filters, no metrics": ours(
            fsam.adaptive_ellipsoid(0.5, scope="filter"), metrics=False
        ),
        "Fisher SAM, squared gradient, no metrics": ours(squared, metrics=False),
        "Fisher SAM, squared gradient": ours(squared),
        "Fisher SAM, empirical, fused, no metrics": oracle(
            fsam.fisher_ellipsoid(0.1, fsam.given()),
            empirical_fisher=True,
            metrics=False,
        ),
        "Fisher SAM, empirical, not fused, no metrics": oracle(
            fisher(fsam.fisher_empirical), metrics=False
        ),
        "Fisher SAM, I1, no metrics": oracle(
            fisher(fsam.fisher_i1, key=key), metrics=False
        ),
        "Fisher SAM, GNB, no metrics": oracle(
            fisher(fsam.fisher_gnb, key=key), metrics=False
        ),
        "Fisher SAM, exact, no metrics": oracle(
            fisher(fsam.fisher_exact), metrics=False
        ),
        "Fisher SAM, I2 last layer and I1, no metrics": oracle(
            fsam.fisher_ellipsoid(0.1, last_layer_i2()), metrics=False
        ),
        "Fisher SAM, I1 every 10th step, no metrics": oracle(
            refreshed(fsam.fisher_i1, key=key), metrics=False
        ),
        "Fisher SAM, exact every 10th step, no metrics": oracle(
            refreshed(fsam.fisher_exact), metrics=False
        ),
        "SAM, every=2, no metrics": oracle(ball, every=2, metrics=False),
        "SAM, every=5, no metrics": oracle(ball, every=5, metrics=False),
        "SAM, micro_batches=4, no metrics": oracle(
            ball, micro_batches=4, metrics=False
        ),
    }


def measure(
    name: str,
    model: Problem,
    optimizer: optax.GradientTransformation,
    repeats: int,
    rows: Container[str] | None = None,
    steps: int = 2,
) -> dict[str, dict[str, Any]]:
    """Returns, for each row, what its step costs.

    Time ratios, of so many steps at once (whole cycles for the cyclic rows), compile
    seconds, temporary megabytes, and passes over arrays like the largest parameter.
    """
    runs, facts, counts = {}, {}, {}
    largest = max((x.shape for x in jax.tree.leaves(model.params)), key=math.prod)
    for row, (init, step) in make_steps(model, optimizer).items():
        if rows is not None and row not in rows:
            continue
        carry = jax.tree.map(jnp.array, (model.params, init(model.params)))
        program, facts[row] = compiled(step, *carry, model.batch, donate_argnums=(0, 1))
        facts[row]["passes"] = passes(program, largest)
        counts[row] = CYCLE if row in CYCLIC else steps
        runs[row] = _training(program, carry, model.batch, counts[row])
    for row, found in ratios(runs, repeats, name).items():
        per_step = counts["base"] / counts[row]
        facts[row]["repeats"] = repeats
        facts[row]["ratio"] = found["ratio"] * per_step
        facts[row]["quartiles"] = [q * per_step for q in found["quartiles"]]
    return facts


def _training(program, carry, batch, steps):
    """Returns a function that goes on training for some steps."""
    carries = [carry]

    def run():
        for _ in range(steps):
            carries[0] = program(*carries[0], batch)
        return carries[0]

    return run


def leaves(number: int, repeats: int):
    """Returns the facts of a model of many leaves: what a step is apart from its model.

    Half as many tiny dense layers with residuals.
    """

    def apply(params, x):
        for layer in params:
            x = x + jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
        return x

    layer = {"kernel": jnp.eye(8), "bias": jnp.ones(8)}
    x = jnp.ones((4, 8))
    model = Problem(apply, [layer] * (number // 2), (x, jnp.arange(4)))
    return measure(
        f"{number} leaves", model, OPTIMIZERS["sgd"], repeats, LEAVES_ROWS, steps=1
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the figures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--leaves", action="store_true", help="with many leaves")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="two tiny repeats")
    options = parser.parse_args(arguments)
    problems = {name: PROBLEMS[name] for name in options.models}
    if options.smoke:
        options.repeats, problems = 2, SMOKE
    results = {}
    if options.leaves:
        for number in (100, 1000):
            key = f"{number} leaves"
            results[key] = leaves(number, options.repeats)
            save(options.out, key, results[key])
    else:
        optimizer = OPTIMIZERS[options.optimizer]
        for name, make in problems.items():
            model = make()
            rows = [*make_steps(model, optimizer)]
            if jax.default_backend() == "cpu" and name in ("cnn", "resnet"):
                rows = [row for row in rows if row not in IN_CONTROL_FLOW]
            key = f"{name}, {options.optimizer}"
            results[key] = measure(name, model, optimizer, options.repeats, rows)
            save(options.out, key, results[key])
    print_table("Ratio to the base step", results)


if __name__ == "__main__":
    main()

"""Question: what does each Fisher diagonal cost beside one gradient of the batch?

Every entry is one jitted function; all functions of a model run in one process,
interleaved, and divided by the time of `jax.grad` of the batch loss in the same round.
The naive way is `vmap(grad)` squared, which forms an array of batch x parameters.

    python benchmarks/fisher_cost.py
    python benchmarks/fisher_cost.py --smoke    # a few seconds, to see that it runs
"""

import argparse
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table
from step_time import CNN, MLP

import fsam_optax as fsam


PROBLEMS = {
    "MLP, batch 128": (MLP, (784,), 128),
    "MLP, batch 512": (MLP, (784,), 512),
    "CNN, batch 128": (CNN, (32, 32, 3), 128),
}
SMOKE = {"MLP, batch 4": (MLP, (784,), 4)}


def make_rows(model: Any, likelihood: fsam.Likelihood) -> dict[str, Callable]:
    """Returns `run(params, batch)` by name; the first is the yardstick."""
    loss = fsam.negative_log_likelihood(model.apply, likelihood)

    def example_grad(params, example):
        return jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example))

    def squares(tree):
        return jax.tree.map(lambda g: jnp.mean(g * g, axis=0), tree)

    def naive(params, batch):
        return squares(jax.vmap(partial(example_grad, params))(batch))

    def one_by_one(params, batch):
        def add(total, example):
            g = example_grad(params, example)
            return jax.tree.map(lambda t, g: t + g * g, total, g), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)[0]

    # One example at a time: for all at once, batch x classes x parameters would be
    # formed, 14 GB for the MLP at batch 512.
    def exact_one_by_one(params, batch):
        def add(total, x):
            h, pullback = jax.vjp(lambda p: model.apply(p, x[None])[0], params)
            (rows,) = jax.vmap(pullback)(likelihood.factor(h).T)
            return jax.tree.map(lambda t, g: t + jnp.sum(g * g, 0), total, rows), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch[0])[0]

    def both(params, batch):
        def example_loss(params, example):
            return loss(params, jax.tree.map(lambda x: x[None], example))

        return fsam.loss_power_sums(example_loss, params, batch, powers=(1, 2))

    def estimate(make, **options):
        estimator = make(model.apply, likelihood, **options)
        return lambda params, batch: fsam.diagonal(estimator, params, batch)

    key = {"key": jax.random.key(0)}
    return {
        "gradient of the batch": jax.grad(loss),
        "empirical, vmap(grad) squared": naive,
        "empirical, one example at a time": one_by_one,
        "fisher_empirical": estimate(fsam.fisher_empirical),
        "gradient and fisher_empirical": both,
        "fisher_i1": estimate(fsam.fisher_i1, **key),
        "fisher_gnb": estimate(fsam.fisher_gnb, **key),
        "fisher_hutchinson": estimate(fsam.fisher_hutchinson, **key),
        "exact, one example at a time": exact_one_by_one,
        "fisher_exact": estimate(fsam.fisher_exact),
    }


def measure(
    name: str, make: Any, shape: tuple[int, ...], batch_size: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Returns time ratio, compile seconds and temporary megabytes of each row."""
    model = make()
    x = jax.random.normal(jax.random.key(0), (batch_size, *shape))
    y = jax.random.randint(jax.random.key(1), (batch_size,), 0, 10)
    params = model.init(jax.random.key(2), x)
    compiled, facts = {}, {}
    for row, run in make_rows(model, fsam.categorical).items():
        start = time.perf_counter()
        compiled[row] = jax.jit(run).lower(params, (x, y)).compile()
        memory = compiled[row].memory_analysis()
        facts[row] = {
            "compile_s": time.perf_counter() - start,
            "temporary_mb": memory.temp_size_in_bytes / 1e6 if memory else None,
        }
    times: dict[str, list[float]] = {row: [] for row in compiled}
    for repeat in track(range(repeats + 1), description=name):
        for row, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(params, (x, y)))
            if repeat:  # The first is a warm-up.
                times[row].append(time.perf_counter() - start)
    yardstick = next(iter(times.values()))
    for row, record in times.items():
        ratios = [t / g for t, g in zip(record, yardstick, strict=True)]
        facts[row]["ratio"] = statistics.median(ratios)
        facts[row]["ratio_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    return facts


def main() -> None:
    """Measures, prints the table and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures as JSON")
    parser.add_argument("--smoke", action="store_true", help="two tiny repeats")
    options = parser.parse_args()
    if options.smoke:
        options.repeats = 2
    problems = SMOKE if options.smoke else PROBLEMS
    results = {
        name: measure(name, model, shape, batch_size, options.repeats)
        for name, (model, shape, batch_size) in problems.items()
    }
    table = Table(title="Ratio to one gradient of the batch: time, temporaries")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for row in next(iter(results.values())):
        cells = []
        for facts in results.values():
            memory = facts[row]["temporary_mb"]
            base = next(iter(facts.values()))["temporary_mb"]
            cells.append(f"{facts[row]['ratio']:.2f}   {memory / base:6.1f}")
        table.add_row(row, *cells)
    Console(width=100).print(table)
    if options.out:
        record = {
            "repeats": options.repeats,
            "device": jax.devices()[0].device_kind,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "fsam_optax": fsam.__version__,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

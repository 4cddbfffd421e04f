"""Question: what does a step cost beside the two gradients it is made of?

Every row is one jitted, donated training step; all rows of a model run in one process,
interleaved, and are divided by the base step's time. The yardstick is the row "two
gradients by hand": SAM written out in seven lines, with no metrics and no safeguards.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --smoke      # a few seconds, to see that it runs
"""

import argparse
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fsam_optax


class MLP(nn.Module):
    """784-512-512-10."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape((len(x), -1))
        for width in (512, 512):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Three convolutions and a dense layer."""

    @nn.compact
    def __call__(self, x):
        for width in (32, 64, 64):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape((len(x), -1)))


MODELS = {"MLP": (MLP, (28, 28, 1)), "CNN": (CNN, (32, 32, 3))}


def make_steps(
    loss_fn: Callable, optimizer: Any
) -> dict[str, tuple[Callable, Callable]]:
    """Returns `init(params) -> state` and `step(params, state, batch)` by name."""
    gradient = jax.grad(loss_fn)

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

    def oracle(perturbation, **options):
        f = fsam_optax.value_and_grad(loss_fn, perturbation, **options)

        def init(params):
            return f.init(params), optimizer.init(params)

        def step(params, state, batch):
            _, grads, oracle_state = f(params, state[0], batch)
            updates, base_state = optimizer.update(grads, state[1], params)
            return optax.apply_updates(params, updates), (oracle_state, base_state)

        return init, step

    ball = fsam_optax.euclidean_ball(0.05)
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
        "sam": wrapped(fsam_optax.sam(optimizer)),
        "asam": wrapped(fsam_optax.asam(optimizer)),
        "asam, filters": wrapped(
            fsam_optax.sharpness_aware(
                optimizer, fsam_optax.adaptive_ellipsoid(0.5, scope="filter")
            )
        ),
        "fisher_sam, squared gradient": wrapped(fsam_optax.fisher_sam(optimizer)),
        "value_and_grad, sam": oracle(ball),
        "value_and_grad, sam, every=5": oracle(ball, every=5),
        "value_and_grad, sam, micro_batches=4": oracle(ball, micro_batches=4),
    }


def measure(model: nn.Module, shape: tuple[int, ...], batch_size: int, repeats: int):
    """Returns, for each step, time ratios, compile seconds and temporary megabytes."""
    x = jax.random.normal(jax.random.key(0), (batch_size, *shape))
    y = jax.random.randint(jax.random.key(1), (batch_size,), 0, 10)
    params = model.init(jax.random.key(2), x)

    def loss_fn(params, batch):
        x, y = batch
        logits = jnp.asarray(model.apply(params, x))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    compiled, carries, facts = {}, {}, {}
    steps = make_steps(loss_fn, optax.sgd(0.01, momentum=0.9))
    for name, (init, step) in steps.items():
        carries[name] = jax.tree.map(jnp.array, (params, init(params)))
        start = time.perf_counter()
        compiled[name] = (
            jax.jit(step, donate_argnums=(0, 1)).lower(*carries[name], (x, y)).compile()
        )
        memory = compiled[name].memory_analysis()
        facts[name] = {
            "compile_s": time.perf_counter() - start,
            "temporary_mb": memory.temp_size_in_bytes / 1e6 if memory else None,
        }
    times: dict[str, list[float]] = {name: [] for name in compiled}
    # every=5 costs differ from step to step: time whole cycles of five steps.
    for repeat in track(range(repeats + 1), description=type(model).__name__):
        for name, run in compiled.items():
            start = time.perf_counter()
            for _ in range(5):
                carries[name] = run(*carries[name], (x, y))
            jax.block_until_ready(carries[name])
            if repeat:  # The first is a warm-up.
                times[name].append(time.perf_counter() - start)
    for name in compiled:
        ratios = [t / b for t, b in zip(times[name], times["base"], strict=True)]
        facts[name]["ratio"] = statistics.median(ratios)
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [0, 0, 0]
        facts[name]["ratio_quartiles"] = [quartiles[0], quartiles[2]]
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures as JSON")
    parser.add_argument("--smoke", action="store_true", help="two tiny repeats")
    options = parser.parse_args()
    if options.smoke:
        options.batch_size, options.repeats = 4, 2
    results = {
        name: measure(model(), shape, options.batch_size, options.repeats)
        for name, (model, shape) in MODELS.items()
    }
    table = Table(title=f"Ratio to the base step, batch {options.batch_size}")
    table.add_column("step")
    for name in results:
        table.add_column(name, justify="right")
        table.add_column("compile", justify="right")
        table.add_column("temporaries", justify="right")
    for row in results["MLP"]:
        cells = []
        for facts in results.values():
            base, this = facts["base"], facts[row]
            cells.append(f"{this['ratio']:.2f}")
            cells.append(f"{this['compile_s'] / base['compile_s']:.1f}")
            cells.append(f"{this['temporary_mb'] / base['temporary_mb']:.1f}")
        table.add_row(row, *cells)
    Console().print(table)
    if options.out:
        record = {
            "batch_size": options.batch_size,
            "repeats": options.repeats,
            "device": jax.devices()[0].device_kind,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "fsam_optax": fsam_optax.__version__,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

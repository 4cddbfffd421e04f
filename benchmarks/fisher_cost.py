"""Question: what does each Fisher diagonal cost beside one gradient of the batch?

Every row is one jitted function; all rows of a model run in one process, interleaved,
and are divided by the time of `jax.grad` of the batch loss in the same round. The naive
way is `vmap(grad)` squared, which forms an array of batch x parameters.

    python benchmarks/fisher_cost.py                      # all models
    python benchmarks/fisher_cost.py --models mlp cnn
    python benchmarks/fisher_cost.py --growth             # with batch, width, classes
    python benchmarks/fisher_cost.py --smoke              # to see that it runs
"""

import argparse
import pathlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from cost import (
    compiled,
    MLP,
    print_table,
    Problem,
    problem,
    PROBLEMS,
    ratios,
    save,
    SMOKE,
)

import fsam_optax as fsam


RESULTS = pathlib.Path(__file__).parent / "results" / "fisher_cost.json"
GROWTH = {
    **{f"batch {n}": (MLP(), n) for n in (16, 64, 256, 1024)},
    **{f"width {n}": (MLP((n, n)), 128) for n in (64, 256, 1024)},
    **{f"classes {n}": (MLP(classes=n), 128) for n in (2, 10, 50)},
}
# One gradient for each example and class: minutes a run. One Hessian-vector product for
# each array of parameters: minutes of compilation for the 62 arrays of the ResNet.
SKIPPED = {
    "mlp-512": ("exact: one example at a time",),
    "resnet": ("exact: one example at a time", "fisher_i2, Hutchinson"),
}
GROWTH_ROWS = (
    "gradient",
    "gradient and fisher_empirical",
    "fisher_empirical",
    "fisher_gnb",
    "fisher_hutchinson",
    "fisher_exact",
)


def make_rows(model: Problem) -> dict[str, Callable]:
    """Returns `run(params, batch)` by name; the first is the yardstick."""
    likelihood = fsam.categorical
    loss = fsam.negative_log_likelihood(model.apply, likelihood)

    def example_loss(params, example):
        return loss(params, jax.tree.map(lambda x: x[None], example))

    def squares(tree):
        return jax.tree.map(lambda g: jnp.mean(g * g, axis=0), tree)

    def naive(params, batch):
        return squares(jax.vmap(partial(jax.grad(example_loss), params))(batch))

    def in_chunks(size, params, batch):
        def add(total, examples):
            g = jax.vmap(partial(jax.grad(example_loss), params))(examples)
            return jax.tree.map(lambda t, g: t + jnp.sum(g * g, 0), total, g), None

        chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), chunks)[0]

    # One example at a time: for all at once, batch x classes x parameters would be
    # formed, 14 GB for the MLP at batch 512.
    def exact_one_by_one(params, batch):
        def add(total, x):
            h, pullback = jax.vjp(lambda p: model.apply(p, x[None])[0], params)
            (rows,) = jax.vmap(pullback)(likelihood.factor(h).T)
            return jax.tree.map(lambda t, g: t + jnp.sum(g * g, 0), total, rows), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch[0])[0]

    def both(params, batch):
        return fsam.loss_power_sums(example_loss, params, batch, powers=(1, 2))

    def estimate(make, **options):
        estimator = make(model.apply, likelihood, **options)
        return lambda params, batch: fsam.diagonal(estimator, params, batch)

    key = {"key": jax.random.key(0)}
    return {
        "gradient": jax.grad(loss),
        "empirical: vmap(grad) squared": naive,
        "empirical: 16 examples at a time": partial(in_chunks, 16),
        "empirical: one example at a time": partial(in_chunks, 1),
        "fisher_empirical": estimate(fsam.fisher_empirical),
        "gradient and fisher_empirical": both,
        "fisher_i1": estimate(fsam.fisher_i1, **key),
        "fisher_i1 with standard error": estimate(
            fsam.fisher_i1, standard_error=True, **key
        ),
        "fisher_gnb": estimate(fsam.fisher_gnb, **key),
        "fisher_hutchinson": estimate(fsam.fisher_hutchinson, **key),
        "exact: one example at a time": exact_one_by_one,
        "fisher_exact": estimate(fsam.fisher_exact),
        "fisher_i2, Hutchinson": estimate(fsam.fisher_i2, hessian="hutchinson", **key),
    }


def measure(name: str, model: Problem, repeats: int, rows: tuple[str, ...] = ()):
    """Returns time ratio, compile seconds and temporary megabytes of each row."""
    programs, facts = {}, {}
    for row, run in make_rows(model).items():
        if (not rows or row in rows) and row not in SKIPPED.get(name, ()):
            programs[row], facts[row] = compiled(run, model.params, model.batch)
    runs = {
        row: partial(run, model.params, model.batch) for row, run in programs.items()
    }
    # Apart: the naive rows leave hundreds of megabytes behind, which would slow down
    # whatever runs next.
    first, *rest = runs
    for group in ([r for r in rest if ":" not in r], [r for r in rest if ":" in r]):
        if group:
            group = {row: runs[row] for row in (first, *group)}
            for row, found in ratios(group, repeats, name).items():
                facts[row] |= found
    return facts


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the figures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    parser.add_argument("--growth", action="store_true", help="growth of the cost")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="two tiny repeats")
    options = parser.parse_args(arguments)
    problems = {name: PROBLEMS[name] for name in options.models}
    rows = ()
    if options.smoke:
        options.repeats, problems = 2, SMOKE
    elif options.growth:
        rows = GROWTH_ROWS
        problems = {
            name: partial(problem, mlp, (784,), batch, mlp.classes)
            for name, (mlp, batch) in GROWTH.items()
        }
    results = {}
    for name, make in problems.items():
        results[name] = measure(name, make(), options.repeats, rows)
        save(options.out, name, results[name], repeats=options.repeats)
    print_table("Ratio to one gradient of the batch", results)


if __name__ == "__main__":
    main()

"""Question: what does each Fisher diagonal cost beside one gradient of the batch?

Every row is one jitted function; all rows of a model run in one process, interleaved,
and are divided by the time of `jax.grad` of the batch loss in the same round. The naive
way is `vmap(grad)` squared, which forms an array of batch x parameters.

    python benchmarks/fisher_cost.py                             # make bench
    python benchmarks/fisher_cost.py --models gpt2 --repeats 1   # minutes, 5 GB
"""

import time
from collections.abc import Callable
from functools import partial

import cost
import harness
import jax
import jax.numpy as jnp

import fsam_optax as fsam


MODELS = cost.PROBLEMS | {"gpt2": lambda: cost.gpt2(2, 256)}
SMOKE = cost.SMOKE | {
    "gpt2 tiny": lambda: cost.gpt2(2, 4, width=16, heads=2, depth=2, vocabulary=20)
}
GRADIENT, BOTH = "gradient", "gradient and fisher_empirical"
NORMS = GRADIENT, "norms: vmap(grad)", "per_example_norms", "clipped_gradient"
STEPS = "SAM, both gradients", "Fisher SAM, both gradients"
EXACT, SECOND = "exact: one example at a time", "fisher_i2, Hutchinson"
# One gradient for each example and class: minutes a run. One Hessian-vector product for
# each array of parameters: minutes of compilation.
LEFT_OUT = {"mlp-512": (EXACT,), "resnet": (EXACT, SECOND)}
LARGE = GRADIENT, "fisher_empirical", BOTH, "fisher_hutchinson", *STEPS


def make_rows(model: cost.Problem) -> dict[str, Callable]:
    """Returns `run(params, batch)` by name; the first is the yardstick."""
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    example = cost.of_example(loss)
    grads = jax.vmap(jax.grad(example), (None, 0))

    def naive_norms(params, batch):
        leaves = jax.tree.leaves(grads(params, batch))
        return jnp.sqrt(sum(jnp.sum(g * g, range(1, g.ndim)) for g in leaves))

    def summed(single, params, inputs):
        def add(total, one):
            found = single(params, one)
            return jax.tree.map(lambda t, g: t + jnp.sum(g * g, 0), total, found), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), inputs)[0]

    def in_chunks(size, params, batch):
        chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
        return summed(grads, params, chunks)

    # One example at a time: for all at once, batch x classes x parameters would be
    # formed, 14 GB for the MLP at batch 512.
    def exact_one_by_one(params, batch):
        def rows(params, x):
            h, pullback = jax.vjp(lambda p: model.apply(p, x[None])[0], params)
            return jax.vmap(pullback)(fsam.categorical.factor(h).T)[0]

        return summed(rows, params, batch[0])

    def estimate(make, **options):
        return partial(fsam.diagonal, make(loss, **options))

    def both_gradients(ball, **options):
        f = fsam.value_and_grad(loss, ball, metrics=False, **options)
        return lambda params, batch: f(params, f.init(params), batch)[1]

    key = {"key": jax.random.key(0)}
    fused = fsam.fisher_ellipsoid(0.1, fsam.given())
    return {
        GRADIENT: jax.grad(loss),
        "empirical: vmap(grad) squared": cost.plain(loss),
        "empirical: 16 examples at a time": partial(in_chunks, 16),
        "empirical: one example at a time": partial(in_chunks, 1),
        "fisher_empirical": estimate(fsam.fisher_empirical),
        BOTH: partial(fsam.loss_power_sums, example, powers=(1, 2)),
        "fisher_i1": estimate(fsam.fisher_i1, **key),
        "fisher_gnb": estimate(fsam.fisher_gnb, **key),
        "fisher_hutchinson": estimate(fsam.fisher_hutchinson, **key),
        EXACT: exact_one_by_one,
        "fisher_exact": estimate(fsam.fisher_exact),
        SECOND: estimate(fsam.fisher_i2, hessian="hutchinson", **key),
        "norms: vmap(grad)": naive_norms,
        "per_example_norms": partial(fsam.per_example_norms, loss),
        "clipped_gradient": partial(fsam.clipped_gradient, loss, max_norm=1.0),
        STEPS[0]: both_gradients(fsam.euclidean_ball(0.1)),
        STEPS[1]: both_gradients(fused, empirical_fisher=True),
    }


def measure(name: str, repeats: int, rows: tuple[str, ...] = ()) -> dict:
    """Returns what is known of the rows, by default of all diagonals."""
    model, left_out = (MODELS | SMOKE)[name](), LEFT_OUT.get(name, ()) + NORMS + STEPS
    every = make_rows(model)
    rows = rows or (GRADIENT, *(row for row in every if row not in left_out))
    fns = {row: every[row] for row in rows}
    runs, facts = cost.programs(fns, model.params, model.batch)
    # A round of GPT-2 takes minutes, in which the machine does other things too.
    clock = time.process_time if rows == LARGE else time.perf_counter
    # Apart: the naive rows leave hundreds of megabytes behind, which would slow down
    # whatever runs next.
    for naive in (False, True):
        group = [row for row in runs if row == GRADIENT or (":" in row) == naive]
        if len(group) == 1:
            continue
        found = cost.ratios({row: runs[row] for row in group}, repeats, clock)
        for row in group:
            facts[row] |= found[row]
    return facts


@harness.experiment(
    smoke={"models": list(SMOKE), "repeats": 2},
    models={"default": list(cost.PROBLEMS), "choices": [*MODELS, *SMOKE]},
    repeats=5,
)
def main(run: harness.Run) -> None:
    key, names = run.take("repeats"), run.options.models
    large = [name for name in names if name.startswith("gpt2")]
    small = [name for name in names if name not in large]
    repeats = run.options.repeats
    found = run.each("model", small, measure, repeats, **key)
    found |= run.each("model", large, measure, repeats, LARGE, **key)
    norms = run.each("model", small, measure, repeats, NORMS, rows="norms", **key)
    for results in (found, norms) if norms else (found,):
        cost.print_table("Over one gradient of the batch", results)


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: what does each Fisher diagonal cost beside one gradient of the batch?

Every row is one jitted function; all rows of a model run in one process, interleaved,
and are divided by the time of `jax.grad` of the batch loss in the same round. The naive
way is `vmap(grad)` squared, which forms an array of batch x parameters.

    python benchmarks/fisher_cost.py                      # all models but GPT-2
    python benchmarks/fisher_cost.py --models mlp cnn
    python benchmarks/fisher_cost.py --models gpt2 --repeats 1   # minutes, 5 GB
    python benchmarks/fisher_cost.py --growth             # with batch, width, classes
    python benchmarks/fisher_cost.py --norms              # norms of single examples
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import cost
import harness
import jax
import jax.numpy as jnp
import methods
import zoo
from cost import Problem, problem
from models import MLP

import fsam_optax as fsam


MODELS = {
    **cost.PROBLEMS,
    "unet": lambda: zoo.pixel_problem(zoo.UNet(), 8, 32),
    "vit": lambda: problem(zoo.ViT(), (32, 32, 3), 32),
    "mamba": lambda: zoo.language_problem(zoo.Mamba(), 16, 64),
    "gpt2": lambda: zoo.gpt2(2, 256),
}
SMOKE = cost.SMOKE | {
    "gpt2 tiny": lambda: zoo.gpt2(2, 4, width=16, heads=2, depth=2, vocabulary=20)
}
GROWTH = {
    **{f"batch {n}": (MLP(), n) for n in (16, 64, 256, 1024)},
    **{f"width {n}": (MLP((n, n)), 128) for n in (64, 256, 1024)},
    **{f"classes {n}": (MLP(classes=n), 128) for n in (2, 10, 50)},
}
GROWTH_ROWS = (
    "gradient",
    "gradient and fisher_empirical",
    "fisher_empirical",
    "fisher_gnb",
    "fisher_hutchinson",
    "fisher_exact",
)
NORM_ROWS = ("gradient", "norms: vmap(grad)", "per_example_norms", "clipped_gradient")
# One gradient for each example and class: minutes a run. One Hessian-vector product for
# each array of parameters: minutes of compilation.
SKIPPED = {
    "mlp-512": ("exact: one example at a time",),
    "resnet": ("exact: one example at a time", "fisher_i2, Hutchinson"),
}
# Without the exact one: as many columns as pixels or tokens times classes.
LARGE = (
    "gradient",
    "empirical: vmap(grad) squared",
    "empirical: one example at a time",
)
LARGE += ("fisher_empirical", "gradient and fisher_empirical", "fisher_hutchinson")
ROWS: dict[str, tuple[str, ...]] = {m: LARGE for m in ("unet", "vit", "mamba")}
# GPT-2 has steps beside diagonals. Processor time, since a round takes minutes.
SAM, ONE_PASS = "SAM, both gradients", "Fisher SAM, both gradients"
STEPS = {SAM: "SAM", ONE_PASS: "Fisher SAM, empirical, relative"}
ROWS["gpt2"] = (LARGE[0], *LARGE[3:], *STEPS)
ROWS["gpt2 tiny"] = LARGE[0], "fisher_empirical", SAM


def make_rows(model: Problem) -> dict[str, Callable]:
    """Returns `run(params, batch)` by name; the first is the yardstick."""
    likelihood = fsam.categorical
    loss = fsam.negative_log_likelihood(model.apply, likelihood)

    example_loss = cost.of_example(loss)

    def naive_norms(params, batch):
        grads = jax.vmap(partial(jax.grad(example_loss), params))(batch)
        leaves = jax.tree.leaves(grads)
        return jnp.sqrt(sum(jnp.sum(g * g, range(1, g.ndim)) for g in leaves))

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
        return partial(fsam.diagonal, make(model.apply, likelihood, **options))

    def both_gradients(row):
        f = step(model, row)
        return lambda params, batch: f(params, f.init(params), batch)[1]

    key = {"key": jax.random.key(0)}
    return {
        "gradient": jax.grad(loss),
        "empirical: vmap(grad) squared": cost.plain(loss),
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
        "norms: vmap(grad)": naive_norms,
        "per_example_norms": partial(fsam.per_example_norms, loss),
        "clipped_gradient": partial(fsam.clipped_gradient, loss, max_norm=1.0),
        **{row: both_gradients(row) for row in STEPS},
    }


def step(model: Problem, row: str) -> Any:
    """Returns the front end of a step."""
    method = methods.METHODS[STEPS[row]]
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    ball = method.ball(0.1)
    return fsam.value_and_grad(loss, ball, metrics=False, **method.settings)


def operations(model: Problem, row: str) -> float:
    """Returns counted operations in gradients, loops as often as they run.

    They are those that the front ends tell of a step; a diagonal is one that Fisher SAM
    takes for its ball, whose own operations are among them.
    """

    def told(f):
        return [x.cost for x in f.explain(model.params, model.batch).passes]

    def apart(make, **options):
        ball = fsam.fisher_ellipsoid(0.1, make(loss, **options))
        return told(fsam.value_and_grad(loss, ball, metrics=False))[1]

    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    if row == "fisher_empirical":
        return apart(fsam.fisher_empirical)
    if row == "fisher_hutchinson":
        return apart(fsam.fisher_hutchinson, key=jax.random.key(0))
    if row == "gradient and fisher_empirical":
        return told(step(model, ONE_PASS))[0]
    return sum(told(step(model, row))) if row in STEPS else 1.0


def measure(name: str, model: Problem, repeats: int, rows: tuple[str, ...] = ()) -> Any:
    """Returns time ratio, compile seconds and temporary megabytes of each row.

    Of GPT-2 processor time, and counted operations beside it.
    """
    skipped = SKIPPED.get(name, ()) + (() if rows else (*STEPS,))
    large = name.startswith("gpt2")
    every = make_rows(model)
    chosen = [row for row in rows or every if row not in skipped]
    fns = {row: run for row, run in every.items() if row in chosen}
    runs, facts = cost.programs(fns, model.params, model.batch)
    # Apart: the naive rows leave hundreds of megabytes behind, which would slow down
    # whatever runs next.
    first, *rest = runs
    for group in ([r for r in rest if ":" not in r], [r for r in rest if ":" in r]):
        if group:
            group = {row: runs[row] for row in (first, *group)}
            clock = time.process_time if large else time.perf_counter
            for row, found in cost.ratios(group, repeats, clock).items():
                facts[row] |= found
    for row in facts if large else ():
        facts[row]["operations"] = operations(model, row)
    return facts


@harness.experiment(
    smoke={"models": list(SMOKE), "repeats": 2},
    models={
        "default": [name for name in MODELS if name != "gpt2"],
        "choices": [*MODELS, *SMOKE],
    },
    growth={"default": False, "help": "growth of the cost"},
    norms={"default": False, "help": "norms of single examples"},
    repeats=5,
)
def main(run: harness.Run) -> None:
    options = run.options
    problems = {name: (SMOKE | MODELS)[name] for name in options.models}
    rows: tuple[str, ...] = NORM_ROWS if options.norms else ()
    if options.growth:
        rows = GROWTH_ROWS
        problems = {
            name: partial(problem, mlp, (784,), batch, mlp.classes)
            for name, (mlp, batch) in GROWTH.items()
        }
    kept = {"rows": "norms"} if options.norms else {}

    def compute(name):
        args = problems[name](), options.repeats, rows or ROWS.get(name, ())
        return measure(name, *args)

    kept |= run.take("repeats")
    results = run.each("model", problems, compute, **kept)
    cost.print_tables("Ratio to one gradient of the batch", results)


if __name__ == "__main__":
    raise SystemExit(main())

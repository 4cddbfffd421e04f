"""Question: which Fisher should elastic weight consolidation take, and what if not?

Tasks come one after the other, and EWC pulls each weight to where the tasks before left
it, by what F says that they need. Compared are the exact F, the empirical one, and the
mean square of batch gradients that much code calls Fisher; lambda is chosen on
held-out images from the same grid for each.

    python docs/recipes/continual_learning.py
    python docs/recipes/continual_learning.py --scenarios split --seeds 5 \\
      --data fashion-mnist --data-dir data --pool 2
"""

import pathlib
import sys
from functools import partial
from typing import Any


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import datasets
import diagonals
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
import show

import fsam_optax as fsam


BATCH, ADAM = 32, optax.adam(2e-3)
WIDE = 0.0, *np.round(10 ** np.arange(0.5, 8.6, 0.75), 3).tolist()
FINE = 0.0, 5.6, 10.0, 18.0, 32.0, 56.0, 100.0, 180.0, 320.0, 560.0, 1e3, 1.8e3, 3.2e3
# What a task is, whether the network is told which one it sees, and the lambdas.
SCENARIOS = {
    "split": ("two classes a task, an output layer a task", WIDE),
    "permuted": ("pixels in another order, one output layer", (*FINE, 5.6e3)),
    "one head": ("two classes a task, one output layer of ten", WIDE),
}
NAMES = [diagonals.EXACT, diagonals.EMPIRICAL, *map(diagonals.squared, (8, 32, 128))]
ROWS = {name: (name, "EWC") for name in NAMES}
ROWS |= {f"online, {NAMES[i]}": (NAMES[i], "online EWC") for i in (0, 1, 3)}


def tasks_of(scenario: str, options: Any) -> dict[str, Any]:
    """Returns images (tasks, examples, pixels) and labels, and which classes compete.

    A fifth of the training images is held out.
    """
    parts, random = [], np.random.default_rng(0)
    both = perceptron.split(datasets.load(options.data, options.data_dir), options.pool)
    first = random.permutation(both[0][0].shape[1])
    pixels = np.stack([first, *(random.permutation(first) for _ in range(4))])
    permuted, most = scenario == "permuted", options.task_size
    for images, labels in both:
        rows = [np.flatnonzero((labels // 2 == t) | permuted) for t in range(5)]
        rows = np.stack([found[: min(most, *map(len, rows))] for found in rows])
        x = images[rows]
        x = jnp.take_along_axis(x, pixels[:, None], -1) if permuted else x
        parts.append((x, jnp.asarray(labels)[rows]))
    cut = parts[0][1].shape[1] * 4 // 5
    train, held = ([a[:, s] for a in parts[0]] for s in (slice(cut), slice(cut, None)))
    own = np.arange(10)[None] // 2 == np.arange(5)[:, None]
    active = jnp.asarray(own | (scenario != "split"))
    return {"train": train, "held": held, "test": parts[1], "active": active}


def apply(params, x, active):
    """Returns the logits of the classes that compete."""
    return jnp.where(jnp.atleast_2d(active), perceptron.apply(params, x), -1e9)


LOSS = fsam.negative_log_likelihood(apply, fsam.categorical)


def accuracy(params, tasks, part):
    """Returns the mean over the tasks."""

    def right(x, y, active):
        return jnp.mean(jnp.argmax(apply(params, x, active), -1) == y)

    x, y = tasks[part]
    return jnp.mean(jax.vmap(right)(x, y, tasks["active"]))


def initial(key, tasks):
    sizes = tasks["train"][0].shape[-1], 50, 50, 10
    return perceptron.initial(key, sizes), jax.random.fold_in(key, 1)


def learn(tasks, steps, name, anchoring, seed, strength):
    """Returns the accuracy at the end, on held-out and on test images."""
    params, key = initial(jax.random.key(seed), tasks)

    def task(carry, inputs):
        params, (total, centre) = carry
        x, y, active, key = inputs

        def objective(params, rows):
            pull = jax.tree.map(lambda w, f, c: f * (w - c) ** 2, params, total, centre)
            loss = LOSS(params, (x[rows], y[rows]), active)
            return loss + strength / 2 * optax.tree.sum(pull)

        rows = jax.random.randint(key, (steps, BATCH), 0, len(y))
        params = perceptron.minimise(objective, params, ADAM, rows)
        # A mean over the labels; as the tasks are of one size, so is what it is worth.
        fisher = diagonals.diagonal(name, LOSS, params, (x, y), active)
        total = jax.tree.map(jnp.add, total, fisher)
        if anchoring == "online EWC":
            return (params, (total, params)), None
        # A penalty a task, sum_k F_k (w - w_k)^2 = A (w - B/A)^2 + constant with A and
        # B the sums of F_k and F_k w_k; the online form has A and the last w.
        share = jax.tree.map(lambda f, a: f / jnp.where(a > 0, a, 1), fisher, total)
        centre = jax.tree.map(lambda c, w, s: c + s * (w - c), centre, params, share)
        return (params, (total, centre)), None

    anchor = jax.tree.map(jnp.zeros_like, params), params
    inputs = (*tasks["train"], tasks["active"], jax.random.split(key, 5))
    (params, _), _ = jax.lax.scan(task, (params, anchor), inputs)
    return [accuracy(params, tasks, part) for part in ("held", "test")]


def sweep(name, anchoring, strengths, tasks, options):
    """Runs every strength with every seed."""
    run = partial(learn, tasks, options.steps, name, anchoring)
    run = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))
    held, test = run(jnp.arange(options.seeds), jnp.asarray(strengths))
    return {"held": held.mean(-1), "accuracy": test}


def joint(tasks, options):
    """Trains on all tasks at once, as many steps; returns the accuracy by seed."""
    x, y = (a.reshape(-1, *a.shape[2:]) for a in tasks["train"])
    active = jnp.repeat(tasks["active"], len(y) // 5, 0)

    def loss(params, rows):
        return LOSS(params, (x[rows], y[rows]), active[rows])

    def train(seed):
        params, key = initial(jax.random.key(seed), tasks)
        rows = jax.random.randint(key, (5 * options.steps, BATCH), 0, len(y))
        return accuracy(perceptron.minimise(loss, params, ADAM, rows), tasks, "test")

    return jax.jit(jax.vmap(train))(jnp.arange(options.seeds))


def report(scenario, results, joined):
    """Prints one scenario: lambda tuned, and lambda of the exact F for all."""
    title, strengths = SCENARIOS[scenario]
    none = results[diagonals.EXACT]["accuracy"][0]
    rows = [["no penalty", "0", show.percent(none), "", ""]]
    for row, result in results.items():
        exact = results["online, " * row.startswith("online") + diagonals.EXACT]
        at, fixed = (int(np.argmax(r["held"])) for r in (result, exact))
        cells = [f"{strengths[at]:.3g}{show.edge(at, strengths)}"]
        cells += [show.percent(result["accuracy"][at])]
        cells += [show.over(result["accuracy"][at], exact["accuracy"][fixed])]
        rows.append([row, *cells, show.percent(result["accuracy"][fixed])])
    rows.append(["all at once", "", show.percent(joined), "", ""])
    heads = ["", "lambda", "accuracy", "over\nexact", "at exact's\nlambda"]
    caption = "%, mean ± standard error. * at an edge of the grid."
    show.table(f"{scenario}: {title}", heads, rows, caption)


def draw(found, joined, path):
    """Draws accuracy against lambda: one panel a scenario."""
    title = "Which F moves the best lambda, and hardly the best accuracy"
    fig, axes = show.figure(1, len(found), title, figsize=(12, 4.2), sharey=False)
    for axis, (scenario, results) in zip(axes[0], found.items(), strict=True):
        text, strengths = SCENARIOS[scenario]
        values = {name: results[name]["accuracy"] for name in NAMES}
        plain = np.mean(values[diagonals.EXACT][0])
        show.curves(axis, strengths[1:], {k: v[1:] for k, v in values.items()}, ms=4)
        line = partial(axis.axhline, color=show.BLACK, lw=1)
        line(100 * np.mean(joined[scenario]), label="all at once")
        line(100 * plain, ls=":", label="no penalty")
        axis.set(xscale="log", xlabel="lambda (1: Bayes' rule)")
        axis.set_title(f"{scenario}: {text}", fontsize=9)
    axes[0][0].set_ylabel("accuracy over all tasks at the end, %")
    axes[0][-1].legend(fontsize=7)
    show.save(fig, path)


@harness.experiment(
    smoke={"scenarios": ["split"], "seeds": 2, "steps": 3, "task_size": 20},
    **perceptron.IMAGES,
    scenarios={"default": list(SCENARIOS), "choices": SCENARIOS},
    seeds=10,
    steps={"default": 200, "help": "a task"},
    task_size={"default": 2000, "help": "most images, of training and of test"},
    pool=perceptron.POOL,
)
def main(run: harness.Run) -> None:
    found, joined = {}, {}
    for scenario in run.options.scenarios:
        tasks, strengths = tasks_of(scenario, run.options), SCENARIOS[scenario][1]
        key = {"scenario": scenario, "strengths": strengths}
        key |= run.take("data seeds steps task_size pool")
        joined[scenario] = run.cell(joint, tasks, run.options, F="joint", **key)
        found[scenario] = {
            row: run.cell(
                *(sweep, name, anchoring, strengths, tasks, run.options),
                **{"F": name, "anchoring": anchoring, **key},
            )
            for row, (name, anchoring) in ROWS.items()
        }
        report(scenario, found[scenario], joined[scenario])
    draw(found, joined, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

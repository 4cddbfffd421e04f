"""Question: which Fisher should elastic weight consolidation take, and what if not?

Tasks come one after the other, and EWC pulls each weight to where the tasks before left
it, by what F says that they need. Compared are the exact F, the empirical one, and the
mean square of batch gradients that much code calls Fisher; lambda is chosen on
held-out images from the same grid for each.

    python benchmarks/continual_learning.py
    python benchmarks/continual_learning.py --data fashion-mnist --data-dir data
"""

from functools import partial
from typing import Any, NamedTuple

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


HIDDEN = (50, 50)
BATCH = 32
RATE = 2e-3
# What a task is, and whether the network is told which one it sees.
SCENARIOS = {
    "split": "two classes a task, an output layer a task",
    "permuted": "pixels in another order, one output layer",
    "one head": "two classes a task, one output layer of ten",
}
EWC, ONLINE = "EWC", "online EWC"
LINE = {"color": show.BLACK, "lw": 1}
STRENGTHS = (0.0, *np.round(10 ** np.arange(0.5, 8.6, 0.75), 3).tolist())


class Tasks(NamedTuple):
    """Images (tasks, examples, pixels), labels, and which classes compete (tasks, 10).

    Each of train, held and test is a pair of images and labels.
    """

    train: tuple[jax.Array, jax.Array]
    held: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    active: jax.Array


def tasks_of(scenario: str, options: Any) -> Tasks:
    """Returns five tasks of equal size; a fifth of the training images is held out."""
    parts, random = [], np.random.default_rng(0)
    both = perceptron.split(datasets.load(options.data, options.data_dir), options.pool)
    pixels = [random.permutation(both[0][0].shape[1])]
    pixels = np.stack(pixels + [random.permutation(pixels[0]) for _ in range(4)])
    sizes = options.train_size, options.test_size
    for (images, labels), most in zip(both, sizes, strict=True):
        rows = [np.flatnonzero(labels // 2 == task) for task in range(5)]
        if scenario == "permuted":
            rows = [np.arange(len(labels))] * 5
        rows = np.stack([found[: min(most, *map(len, rows))] for found in rows])
        x = images[rows]
        if scenario == "permuted":
            x = jnp.take_along_axis(x, pixels[:, None], -1)
        parts.append((x, jnp.asarray(labels)[rows]))
    train, test = parts
    cut = train[1].shape[1] * 4 // 5
    held = jax.tree.map(lambda a: a[:, cut:], train)
    train = jax.tree.map(lambda a: a[:, :cut], train)
    active = np.ones((5, 10), bool)
    if scenario == "split":
        active = np.arange(10)[None] // 2 == np.arange(5)[:, None]
    return Tasks(train, held, test, jnp.asarray(active))


def apply(params, x, active):
    """Returns the logits of the classes that compete."""
    return jnp.where(active[None], perceptron.apply(params, x), -1e9)


LOSS = fsam.negative_log_likelihood(apply, fsam.categorical)


def accuracies(params, data, active):
    """Returns the accuracy on each task."""

    def one(x, y, active):
        return jnp.mean(jnp.argmax(apply(params, x, active), -1) == y)

    images, labels = data
    return jax.vmap(one)(images, labels, active)


def penalty(params, anchor):
    """Returns sum F (w - c)^2 / 2."""
    fisher, centre = anchor
    parts = jax.tree.map(
        lambda w, f, c: jnp.sum(f * (w - c) ** 2), params, fisher, centre
    )
    return optax.tree.sum(parts) / 2


def together(anchor, params, fisher, anchoring):
    """Returns the anchor of the tasks so far and one more.

    EWC has a penalty a task, sum_k F_k (w - w_k)^2 = A (w - B/A)^2 + constant with A
    and B the sums of F_k and F_k w_k; the online form has A and the last weights.
    """
    total = jax.tree.map(jnp.add, anchor[0], fisher)
    if anchoring == ONLINE:
        return total, params
    share = jax.tree.map(lambda f, a: f / jnp.where(a > 0, a, 1), fisher, total)
    centre = jax.tree.map(lambda c, w, s: c + s * (w - c), anchor[1], params, share)
    return total, centre


def learn(tasks, steps, name, anchoring, seed, strength):
    """Returns accuracies (after task, on task) on held-out and on test images."""
    optimizer, key = optax.adam(RATE), jax.random.key(seed)
    params = perceptron.initial(key, (tasks.train[0].shape[-1], *HIDDEN, 10))

    def task(carry, inputs):
        params, anchor = carry
        x, y, active, key = inputs

        def objective(params, rows):
            loss = LOSS(params, (x[rows], y[rows]), active)
            return loss + strength * penalty(params, anchor)

        rows = jax.random.randint(key, (steps, BATCH), 0, len(y))
        params = perceptron.minimise(objective, params, optimizer, rows)
        # A mean over the labels; as the tasks are of one size, so is what it is worth.
        fisher = diagonals.diagonal(name, LOSS, params, (x, y), active)
        found = [accuracies(params, d, tasks.active) for d in (tasks.held, tasks.test)]
        return (params, together(anchor, params, fisher, anchoring)), found

    nothing = jax.tree.map(jnp.zeros_like, params), params
    keys = jax.random.split(jax.random.fold_in(key, 1), 5)
    inputs = (*tasks.train, tasks.active, keys)
    return jax.lax.scan(task, (params, nothing), inputs)[1]


def sweep(name, anchoring, tasks, options):
    """Runs every strength with every seed; returns means over tasks."""
    seeds, strengths = jnp.arange(options.seeds), jnp.asarray(options.strengths)
    run = partial(learn, tasks, options.steps, name, anchoring)
    run = jax.vmap(jax.vmap(run, (0, None)), (None, 0))
    held, test = jax.jit(run)(seeds, strengths)
    learnt = jnp.diagonal(test, axis1=-2, axis2=-1)
    return {
        "held": held[..., -1, :].mean((-2, -1)),
        "accuracy": test[..., -1, :].mean(-1),
        "forgotten": (learnt - test[..., -1, :])[..., :-1].mean(-1),
    }


def joint(tasks, options):
    """Trains on all tasks at once, as many steps; returns the accuracy by seed."""
    x, y = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tasks.train)
    which = jnp.repeat(jnp.arange(5), tasks.train[1].shape[1])
    optimizer = optax.adam(RATE)

    def loss(params, rows):
        one = jax.vmap(lambda x, y, a: LOSS(params, (x[None], y[None]), a))
        return jnp.mean(one(x[rows], y[rows], tasks.active[which[rows]]))

    def train(seed):
        key = jax.random.key(seed)
        params = perceptron.initial(key, (x.shape[-1], *HIDDEN, 10))
        key = jax.random.fold_in(key, 1)
        rows = jax.random.randint(key, (5 * options.steps, BATCH), 0, len(y))
        params = perceptron.minimise(loss, params, optimizer, rows)
        return accuracies(params, tasks.test, tasks.active).mean()

    return jax.jit(jax.vmap(train))(jnp.arange(options.seeds))


def best(result):
    """Returns which strength is best on held-out images."""
    return int(np.argmax(result["held"]))


def headline(scenario, results):
    """Returns what the picture shows."""
    names = [n for n, anchoring in results if anchoring == EWC][1:]
    every = [results[name, EWC] for name in names]
    exact = results[diagonals.EXACT, EWC]
    at = best(exact)
    own = [np.mean(r["accuracy"][best(r)]) for r in every]
    fixed = [np.mean(r["accuracy"][at]) for r in every]
    return (
        f"{scenario}: exact F {np.mean(exact['accuracy'][at]):.1%}, the others "
        f"{min(own):.1%} to {max(own):.1%} at a lambda of their own, "
        f"{min(fixed):.1%} to {max(fixed):.1%} at that of F"
    )


def draw(found, joined, options, path):
    """Draws accuracy against lambda: one panel a scenario."""
    title = headline(*next(iter(found.items())))
    fig, axes = show.figure(1, len(found), title, figsize=(12, 4.2), sharey=False)
    shown = np.array(options.strengths)
    for axis, (scenario, results) in zip(axes[0], found.items(), strict=True):
        values = {
            name: np.array(result["accuracy"])[shown > 0]
            for (name, anchoring), result in results.items()
            if anchoring == EWC
        }
        show.curves(axis, shown[shown > 0], values, ms=4)
        plain = 100 * np.mean(next(iter(results.values()))["accuracy"][0])
        axis.axhline(100 * np.mean(joined[scenario]), **LINE, label="all at once")
        axis.axhline(plain, **LINE, ls=":", label="no penalty")
        axis.set(xscale="log", xlabel="lambda (1: Bayes' rule)")
        axis.set_title(f"{scenario}: {SCENARIOS[scenario]}", fontsize=9)
    axes[0][0].set_ylabel("accuracy over all tasks at the end, %")
    axes[0][-1].legend(*axes[0][0].get_legend_handles_labels(), fontsize=7)
    show.save(fig, path)


def names_of(scenario, anchoring, options):
    """Returns what is compared: all where there is most to see."""
    if scenario == "one head" and anchoring == ONLINE:
        return []
    batches = options.batches
    if scenario == "one head" or anchoring == ONLINE:
        batches = batches[len(batches) // 2 :][:1]
    names = [diagonals.squared(batch) for batch in batches]
    return [diagonals.EXACT, diagonals.EMPIRICAL, *names]


def report(scenario, results, joined, options):
    """Prints one scenario: lambda tuned, and lambda of the exact F for all."""
    none = next(iter(results.values()))
    rows = [["none", "0", show.percent(none["accuracy"][0]), "", ""]]
    rows[0].append(show.percent(none["forgotten"][0]))
    for (name, anchoring), result in results.items():
        exact, values = results[diagonals.EXACT, anchoring], result["accuracy"]
        at, fixed = best(result), best(exact)
        cells = [f"{options.strengths[at]:.3g}" + show.edge(at, options.strengths)]
        cells += [show.percent(values[at])]
        cells += [show.over(values[at], exact["accuracy"][fixed])]
        cells += [show.percent(values[fixed]), show.percent(result["forgotten"][at])]
        rows.append([name if anchoring == EWC else f"online, {name}", *cells])
    rows.append(["all at once", "", show.percent(joined), "", "", ""])
    heads = ["", "lambda", "accuracy", "over\nexact", "at exact's\nlambda", "forgotten"]
    caption = "%, mean ± standard error. * at an edge of the grid."
    title = f"{scenario}: {SCENARIOS[scenario]}"
    show.table(title, heads, rows, caption, first=24)


@harness.experiment(
    smoke={
        **{"scenarios": ["split"], "anchorings": [EWC], "batches": [8], "seeds": 2},
        **{"steps": 3, "train_size": 20, "test_size": 20},
        "strengths": [0.0, 1.0, 100.0],
    },
    **perceptron.IMAGES,
    scenarios={"default": list(SCENARIOS), "choices": SCENARIOS},
    anchorings={"default": [EWC, ONLINE], "choices": (EWC, ONLINE)},
    batches=[8, 32, 128],
    strengths={"default": list(STRENGTHS), "help": "lambdas"},
    seeds=10,
    steps={"default": 200, "help": "a task"},
    train_size={"default": 2000, "help": "most, a task"},
    test_size={"default": 2000, "help": "most, a task"},
    pool=perceptron.POOL,
)
def main(run: harness.Run) -> None:
    options = run.options
    settings = run.take("data seeds steps train_size test_size pool strengths")
    found, joined = {}, {}
    for scenario in options.scenarios:
        tasks = tasks_of(scenario, options)
        part = {"scenario": scenario} | settings
        joined[scenario] = run.cell(joint, tasks, options, F="joint", **part)
        found[scenario] = {
            (name, anchoring): run.cell(
                *(sweep, name, anchoring, tasks, options),
                **{"F": name, "anchoring": anchoring, **part},
            )
            for anchoring in options.anchorings
            for name in names_of(scenario, anchoring, options)
        }
        report(scenario, found[scenario], joined[scenario], options)
    draw(found, joined, options, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

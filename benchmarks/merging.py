"""Question: does Fisher weighting merge two fine-tuned networks better than the mean?

Two networks are fine-tuned from one start, on other classes or on images moved the
other way, and their weights are merged: w = sum_k l_k F_k w_k / sum_k l_k F_k. Compared
are F = 1, the exact F (also with its mean added, as a prior would do), the empirical
one and the mean square of batch gradients, each with the shares (l, 1 - l) that are
best on held-out images, and with l = 1/2.

    python benchmarks/merging.py
    python benchmarks/merging.py --data fashion-mnist --data-dir data --pool 2
"""

from functools import cache, partial
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


HIDDEN = (64, 64)
RATE = 1e-3
LOSS = perceptron.LOSS
AVERAGE, DAMPED = "average", f"{diagonals.EXACT} + its mean"
# One that no example needs of either network is averaged.
FLOOR = 1e-6
SCENARIOS = {
    "classes": "even | odd ones",
    "shifted": "an eighth left | right",
    "turned": "a quarter left | right",
}
SHARES = np.linspace(0.05, 0.95, 19).round(2).tolist()


class Problem(NamedTuple):
    """Pairs of images and labels: what to start from, and the two tasks' own."""

    start: Any
    train: tuple[Any, Any]
    held: tuple[Any, Any]
    test: tuple[Any, Any]


def problem_of(scenario: str, options: Any) -> Problem:
    """Returns the tasks: a fifth to start from, a fifth held out, the rest to train."""
    source = datasets.load(options.data, options.data_dir)

    def pair(images, labels):
        return jnp.asarray(datasets.flat(images, options.pool)), jnp.asarray(labels)

    def task(images, labels, number):
        if scenario == "classes":
            kept = labels % 2 == number
            return pair(images[kept], labels[kept])
        if scenario == "shifted":
            step = images.shape[2] // 8
            return pair(np.roll(images, (2 * number - 1) * step, 2), labels)
        return pair(np.rot90(images, 1 + 2 * number, (1, 2)), labels)

    def both(images, labels):
        return task(images, labels, 0), task(images, labels, 1)

    images = source.train_images[: options.train_size]
    labels = source.train_labels[: options.train_size]
    one, two = len(labels) // 5, len(labels) * 2 // 5
    return Problem(
        start=pair(images[:one], labels[:one]),
        train=both(images[two:], labels[two:]),
        held=both(images[one:two], labels[one:two]),
        test=both(source.test_images, source.test_labels),
    )


def fit(problem, seeds, steps):
    """Returns the start, both fine-tuned networks and one fine-tuned on both tasks."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *problem.train)

    def one(seed):
        keys = jax.random.split(jax.random.key(seed), 5)
        sizes = (problem.start[0].shape[-1], *HIDDEN, 10)
        start = perceptron.initial(keys[0], sizes)
        start = perceptron.by_adam(start, problem.start, 300, RATE, keys[1])
        tuned = [
            perceptron.by_adam(start, data, steps, RATE, key)
            for data, key in zip((*problem.train, both), keys[2:], strict=True)
        ]
        return start, *tuned

    return jax.jit(jax.vmap(one))(jnp.arange(seeds))


def score(params, tasks):
    """Returns the mean accuracy over the tasks."""
    return jnp.mean(jnp.stack([perceptron.score(params, *t)[1] for t in tasks]))


def weight(method, params, data):
    """Returns what each weight counts, with a floor."""
    if method == AVERAGE:
        return jax.tree.map(jnp.ones_like, params)
    found = diagonals.diagonal(method.split(" +")[0], LOSS, params, data)
    mean = optax.tree.sum(found) / sum(f.size for f in jax.tree.leaves(found))
    floor = mean if method == DAMPED else FLOOR * mean
    return jax.tree.map(lambda f: f + floor, found)


def merge(params, weights, share):
    """Returns sum_k l_k F_k w_k / sum_k l_k F_k."""

    def one(v, w, f, g):
        f, g = share * f, (1 - share) * g
        return (f * v + g * w) / (f + g)

    return jax.tree.map(one, *params, *weights)


def sweep(method, networks, problem, options):
    """Merges by every share; returns arrays (share, seed)."""

    def one(share, networks):
        tasks = zip(networks[1:3], problem.train, strict=True)
        weights = [weight(method, params, data) for params, data in tasks]
        merged = merge(networks[1:3], weights, share)
        return score(merged, problem.held), score(merged, problem.test)

    every = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    held, test = jax.jit(every)(jnp.asarray(options.shares), networks())
    return {"held": held, "accuracy": test}


def apart(networks, problem):
    """Returns what the networks are worth that are not merged."""
    names = ("the start", "fine-tuned, first", "fine-tuned, second", "both at once")
    test = jax.jit(jax.vmap(lambda w: score(w, problem.test)))
    return {name: test(w) for name, w in zip(names, networks(), strict=True)}


def best_of(results):
    """Returns for each method which share is best on held-out images."""
    return {m: int(np.argmax(np.mean(r["held"], 1))) for m, r in results.items()}


def headline(found):
    """Returns what the picture shows."""
    gains = []
    for (scenario, _), (_, results) in found.items():
        best = best_of(results)
        mean = {m: np.mean(r["accuracy"][best[m]]) for m, r in results.items()}
        gain = 100 * (mean[diagonals.EXACT] - mean[AVERAGE])
        gains.append(f"{gain:+.1f} ({scenario})")
    return f"Merged by exact F over the mean, each at its best: {', '.join(gains)}"


def draw(found, options, path):
    """Draws accuracy against the share: one panel a scenario and length."""
    fig, axes = show.figure(
        *(len(options.steps), len(options.scenarios)),
        headline(found),
        figsize=(12, 3.4 * len(options.steps)),
    )
    panels = zip(axes.T.ravel(), found.items(), strict=True)
    for axis, ((scenario, steps), (alone, results)) in panels:
        values = {method: result["accuracy"] for method, result in results.items()}
        show.curves(axis, options.shares, values, ms=3)
        axis.axhline(100 * np.mean(alone["both at once"]), color=show.GREY, lw=1)
        axis.set_title(f"{scenario}: {SCENARIOS[scenario]}, {steps} steps")
    for axis in axes[-1]:
        axis.set_xlabel("share l of the first")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy over both tasks, %")
    axes[0][0].legend(fontsize=7)
    show.save(fig, path)


def report(scenario, steps, alone, results, options):
    """Prints one scenario: the share tuned, and one half."""
    half = int(np.argmin(np.abs(np.array(options.shares) - 0.5)))
    best = best_of(results)
    plain = results[AVERAGE]["accuracy"]
    rows = []
    for method, result in results.items():
        values, at = result["accuracy"], best[method]
        cells = [show.percent(values[half]), show.over(values[half], plain[half])]
        cells += [f"{options.shares[at]:g}" + show.edge(at, options.shares)]
        cells += [show.percent(values[at]), show.over(values[at], plain[best[AVERAGE]])]
        rows.append([method, *cells])
    rows += [[name, show.percent(v), *[""] * 4] for name, v in alone.items()]
    heads = ["", "l = 1/2", "over\naverage", "best l", "accuracy", "over\naverage"]
    title = f"{options.data}, {scenario} ({SCENARIOS[scenario]}), {steps} steps"
    caption = "%, mean ± standard error. * at an edge of the grid."
    show.table(title, heads, rows, caption, first=22)


@harness.experiment(
    smoke={
        **{"scenarios": ["classes"], "shares": [0.25, 0.5, 0.75], "seeds": 2},
        "steps": [4],
    },
    **perceptron.IMAGES,
    scenarios={"default": list(SCENARIOS), "choices": SCENARIOS},
    batches=[32],
    shares={"default": SHARES, "help": "of the first network"},
    seeds=10,
    steps=[800],
    train_size={"default": 6000, "help": "most images"},
    pool=perceptron.POOL,
)
def main(run: harness.Run) -> None:
    options, found = run.options, {}
    methods = [AVERAGE, diagonals.EXACT, DAMPED, diagonals.EMPIRICAL]
    methods += [diagonals.squared(batch) for batch in options.batches]
    settings = run.take("data seeds train_size pool shares")
    for scenario in options.scenarios:
        problem = problem_of(scenario, options)
        for steps in options.steps:
            networks = cache(partial(fit, problem, options.seeds, steps))
            part = {"scenario": scenario, "steps": steps} | settings
            alone = run.cell(apart, networks, problem, method="apart", **part)
            args = sweep, networks, problem, options
            results = run.each("method", methods, *args, **part)
            found[scenario, steps] = alone, results
            report(scenario, steps, alone, results, options)
    draw(found, options, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

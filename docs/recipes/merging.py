"""Question: does Fisher weighting merge two fine-tuned networks better than the mean?

Two networks are fine-tuned from one start, on other classes or on images moved the
other way, and their weights are merged: w = sum_k l_k F_k w_k / sum_k l_k F_k. Compared
are F = 1, the exact F, the empirical one and the mean square of batch gradients, each
with the shares (l, 1 - l) that are best on held-out images, and with l = 1/2.

    python docs/recipes/merging.py
    python docs/recipes/merging.py --data fashion-mnist --pool 2 --seeds 5 \\
        --scenarios classes shifted
"""

import pathlib
import sys
from functools import cache, partial


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import datasets
import diagonals
import harness
import jax
import jax.numpy as jnp
import numpy as np
import perceptron
import show
from jax.flatten_util import ravel_pytree


AVERAGE, EXACT, APART = "average", diagonals.EXACT, "apart"
METHODS = (AVERAGE, EXACT, diagonals.EMPIRICAL, diagonals.squared(32))
SCENARIOS = ("classes", "shifted", "turned")  # Even, odd; moved left, right; turned.
SHARES = np.linspace(0.05, 0.95, 19).round(2).tolist()


def prepare(scenario, options):
    """Returns both tasks' data to train on, held out and to test on, and networks.

    A fifth of the images is to start from, a fifth held out. The networks, by seed: the
    start, both fine-tuned, one fine-tuned on both tasks.
    """
    data = datasets.load(options.data, options.data_dir)
    images = data.train_images[: options.train_size]
    one, two, step = len(images) // 5, len(images) * 2 // 5, images.shape[2] // 8

    def pair(x, y):
        return jnp.asarray(datasets.flat(x, options.pool)), jnp.asarray(y)

    def tasks(x, y):
        if scenario == "classes":
            return [pair(x[y % 2 == parity], y[y % 2 == parity]) for parity in (0, 1)]
        if scenario == "shifted":
            return [pair(np.roll(x, by, 2), y) for by in (-step, step)]
        return [pair(np.rot90(x, by, (1, 2)), y) for by in (1, 3)]

    labels = data.train_labels[: options.train_size]
    first, held = pair(images[:one], labels[:one]), (images[one:two], labels[one:two])
    train, held = tasks(images[two:], labels[two:]), tasks(*held)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *train)

    def fit(seed):
        keys = jax.random.split(jax.random.key(seed), 5)
        start = perceptron.initial(keys[0], (first[0].shape[1], 64, 64, 10))
        start = perceptron.by_adam(start, first, 300, 1e-3, keys[1])
        tuned = [
            perceptron.by_adam(start, task, options.steps, 1e-3, key)
            for task, key in zip((*train, both), keys[2:], strict=True)
        ]
        return start, *tuned

    networks = jax.jit(jax.vmap(fit))(jnp.arange(options.seeds))
    return train, held, tasks(data.test_images, data.test_labels), networks


def score(params, tasks):
    """Returns the mean accuracy over the tasks."""
    return jnp.mean(jnp.stack([perceptron.score(params, *t)[1] for t in tasks]))


def weight(method, params, data):
    """Returns what each weight counts; one that no example needs is averaged."""
    if method == AVERAGE:
        return jax.tree.map(jnp.ones_like, params)
    found = diagonals.diagonal(method, perceptron.LOSS, params, data)
    floor = 1e-6 * jnp.mean(ravel_pytree(found)[0])
    return jax.tree.map(lambda f: f + floor, found)


def compute(method, prepared):
    """Merges by every share; returns arrays (share, seed). Or what is not merged."""
    train, held, test, networks = prepared()
    if method == APART:
        names = ("the start", "fine-tuned, first", "fine-tuned, second", "both at once")
        alone = jax.jit(jax.vmap(lambda params: score(params, test)))
        return {name: alone(w) for name, w in zip(names, networks, strict=True)}

    def merge(share, *pair):
        weights = [weight(method, w, of) for w, of in zip(pair, train, strict=True)]

        def mean(v, w, f, g):
            f, g = share * f, (1 - share) * g
            return (f * v + g * w) / (f + g)

        merged = jax.tree.map(mean, *pair, *weights)
        return {"held": score(merged, held), "accuracy": score(merged, test)}

    every = jax.vmap(jax.vmap(merge, (None, 0, 0)), (0, None, None))
    return jax.jit(every)(jnp.array(SHARES), *networks[1:3])


def report(title, results, alone):
    """Prints one half, and the share that is best held out; returns the gain by F."""
    half = SHARES.index(0.5)
    at = {m: int(np.argmax(np.mean(r["held"], 1))) for m, r in results.items()}
    ends = {m: np.array(r["accuracy"])[[half, at[m]]] for m, r in results.items()}
    columns = {
        "%": lambda method, _: method,
        "l = 1/2": lambda _, of: show.percent(of[0]),
        "over average": lambda _, of: show.over(of[0], ends[AVERAGE][0]),
        "best l": lambda m, _: f"{SHARES[at[m]]:g}{show.edge(at[m], SHARES)}",
        "accuracy": lambda _, of: show.percent(of[1]),
        "over\naverage": lambda _, of: show.over(of[1], ends[AVERAGE][1]),
    }
    apart = "; ".join(f"{name}: {show.percent(of)}" for name, of in alone.items())
    show.report(title, ends, columns, f"* at an edge of the grid. {apart}")
    return np.mean(ends[EXACT][1] - ends[AVERAGE][1])


def draw(found, path):
    """Draws accuracy against the share, one panel a scenario; grey: both at once."""
    gains = [f"{100 * gain:+.1f} ({name})" for name, (*_, gain) in found.items()]
    headline = f"Merged by exact F over the mean, each at its best: {', '.join(gains)}"
    fig, (axes,) = show.figure(1, len(found), headline, figsize=(12, 3.4))
    for axis, (scenario, (results, alone, _)) in zip(axes, found.items(), strict=True):
        values = {method: result["accuracy"] for method, result in results.items()}
        show.curves(axis, SHARES, values, ms=3)
        axis.axhline(100 * np.mean(alone["both at once"]), color=show.GREY, lw=1)
        axis.set(
            title=f"{scenario}: accuracy over both, %", xlabel="share l of the first"
        )
    axes[0].legend(fontsize=7)
    show.save(fig, path)


@harness.experiment(
    smoke={"scenarios": ["classes"], "seeds": 2, "steps": 4},
    **perceptron.IMAGES,
    scenarios={"default": list(SCENARIOS), "choices": SCENARIOS},
    seeds=10,
    steps=800,
    train_size={"default": 6000, "help": "most images"},
    pool=perceptron.POOL,
)
def main(run: harness.Run) -> None:
    options, found = run.options, {}
    settings = run.take("data seeds steps train_size pool") | {"shares": SHARES}
    for scenario in options.scenarios:
        args = compute, cache(partial(prepare, scenario, options))
        key = {"scenario": scenario, **settings}
        results = run.each("method", (APART, *METHODS), *args, **key)
        alone = results.pop(APART)
        gain = report(f"{options.data}, {scenario}", results, alone)
        found[scenario] = results, alone, gain
    draw(found, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

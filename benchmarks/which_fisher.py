"""Question: which Fisher should Fisher SAM take?

It is published with the squared gradient of the batch in the place of the Fisher
information. All estimators are compared: on 300 handwritten digits, with right and with
wrong labels, to the same number of gradients (apart from what a Fisher costs), with
learning rate and radius chosen from a grid of 20 by the accuracy on 700 others,
whose labels are as wrong. Relative: T^2 = 1 / (1 + F / mean F). Absolute:
T^2 = 1 / (F + damping), whose radius is in units of the square root of the divergence.

    python benchmarks/which_fisher.py
"""

from collections.abc import Callable
from functools import partial

import datasets
import harness
import jax
import jax.numpy as jnp
import methods
import numpy as np
import perceptron
import show
from perceptron import LOSS

import fsam_optax as fsam


SIZES = (64, 128, 128, 10)
BATCH = 30
RATES = (0.005, 0.015, 0.05, 0.15)
RADII = {"relative": methods.RADII, "absolute": methods.ABSOLUTE}


def last_layer_i2(key):
    """I2 where it has no variance, in the last layer, and I1 elsewhere."""
    return fsam.by_group(
        lambda params: ["I1"] * (len(params) - 1) + ["I2"],
        {"I1": fsam.fisher_i1(LOSS, key=key), "I2": fsam.fisher_i2(LOSS, key=key)},
    )


ESTIMATORS: dict[str, Callable] = {
    "squared gradient": lambda key: fsam.squared_gradient(),
    "empirical": lambda key: fsam.fisher_empirical(LOSS),
    "GNB": lambda key: fsam.fisher_gnb(LOSS, key=key),
    "I1, one draw": lambda key: fsam.fisher_i1(LOSS, key=key),
    "I2 last layer, I1": last_layer_i2,
    "exact": lambda key: fsam.fisher_exact(LOSS),
}


def train(method, gradients, seed, images, labels, rho, rate):
    """Trains one network; returns its parameters."""
    init_key, draw_key, batch_key = jax.random.split(jax.random.key(seed), 3)
    params = perceptron.initial(init_key, SIZES)

    def make(optimizer):
        if method in methods.METHODS:
            return methods.stepper(method, LOSS, optimizer, rho)
        name, form = method.rsplit(", ", 1)
        ball = methods.fisher(ESTIMATORS[name](draw_key), form, rho)
        return methods.around(fsam.value_and_grad(LOSS, ball, metrics=False), optimizer)

    steps, data = gradients // (1 if method == "base" else 2), (images, labels)
    return perceptron.train(params, make, data, rate, steps, BATCH, batch_key)


def draw(results, path):
    """Draws the accuracies of all methods."""
    headline = "No Fisher leads throughout; its form matters as much"
    fig, axes = show.figure(1, len(results), headline, figsize=(10, 4.6), sharey=True)
    for ax, (noise, found) in zip(axes[0], results.items(), strict=True):
        for method, facts in reversed(found.items()):
            mean, error = show.mean_and_error(facts["accuracy"], 100)
            colors = {"relative": show.GREEN, "absolute": show.PURPLE}
            color = colors.get(method.split(", ")[-1], show.look(method)["color"])
            ax.errorbar(mean, method, xerr=error, fmt="o", color=color)
        title = f"{noise:.0%} of the labels wrong"
        ax.set(title=title, xlabel="test accuracy, %, mean ± standard error")
    show.save(fig, path)


@harness.experiment(
    smoke={"gradients": 6, "seeds": 2, "tuning_seeds": 1},
    gradients={"default": 800, "help": "of one training"},
    seeds=20,
    tuning_seeds=4,
)
def main(run: harness.Run) -> None:
    shares, names = (0.0, 0.4), list(ESTIMATORS)
    if run.options.smoke:
        shares, names = (0.0,), names[::5]
    results = {noise: {} for noise in shares}
    parts = perceptron.split(datasets.load("digits"))
    x, y = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    order = np.random.default_rng(0).permutation(len(y))
    x, y = jnp.asarray(x[order]), jnp.asarray(y[order])
    cuts = {"data": slice(300), "held": slice(300, 1000), "test": slice(1000, None)}
    sets = {name: (x[cut], y[cut]) for name, cut in cuts.items()}
    settings, seeds = run.take("gradients seeds tuning_seeds"), "seeds tuning_seeds"
    offered = {m: methods.grid(m, RATES) for m in ("base", "SAM")}
    for form, radii in RADII.items():
        for name in names:
            offered[f"{name}, {form}"] = methods.grid("SAM", RATES, radii)
    for noise, found in results.items():
        compare = partial(perceptron.compare, **sets, noise=noise, **run.take(seeds))
        for method, points in offered.items():
            key = {"method": method, "noise": noise, "points": points, **settings}
            of_method = partial(train, method, run.options.gradients)
            found[method] = run.cell(compare, of_method, points, **key)
        base, sam = found["base"]["accuracy"], found["SAM"]["accuracy"]
        columns: show.Columns = {
            "method": lambda method, _: method,
            "rho": lambda _, f: f"{f['rho']:g}{'*' * bool(f['edges'])}",
            "accuracy, %": lambda _, f: show.percent(f["accuracy"]),
            "over base": lambda _, f, base=base: show.over(f["accuracy"], base),
            "over SAM": lambda _, f, sam=sam: show.over(f["accuracy"], sam),
        }
        title = f"{noise:.0%} of the labels wrong: test accuracy ± standard error"
        show.report(title, found, columns, "* at an edge of the grid")
    draw(results, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

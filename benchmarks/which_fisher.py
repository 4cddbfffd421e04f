"""Question: which Fisher should Fisher SAM take?

Fisher SAM is published with the squared gradient of the batch in the place of the
Fisher information, since per-example squares were dear. Here all estimators are
affordable, so they can be compared: trained on 300 handwritten digits, with right and
with wrong labels, to the same number of gradients (apart from what a Fisher costs),
with learning rate and radius chosen for each from a grid of 20 by the accuracy on 700
others, whose labels are as wrong; and, on networks that the base optimizer has trained
for more and more steps, by the direction of the perturbation and the divergence it
reaches.

Relative: T^2 = 1 / (1 + F / mean F). Absolute: T^2 = 1 / (F + damping), whose radius is
in units of the square root of the divergence.

    python benchmarks/which_fisher.py
    python benchmarks/which_fisher.py --smoke        # to see that it runs

A finished method is kept in the results; the same command goes on from there.
"""

import argparse
import itertools
import pathlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
from cost import finished, save
from perceptron import initial, LOSS, MODEL, noisy_labels, oracle, score
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import fsam_optax as fsam


HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "which_fisher.json"
FIGURE = HERE / "figures" / "which_fisher.png"
SIZES = (64, 128, 128, 10)
BATCH = 30
DAMPING = 1e-3
LEARNING_RATES = (0.005, 0.015, 0.05, 0.15)
RADII = {
    "SAM": (0.05, 0.1, 0.2, 0.4, 0.8),
    "relative": (0.05, 0.1, 0.2, 0.4, 0.8),
    "absolute": (0.0015, 0.005, 0.015, 0.05, 0.15),
}
BASE_RATES = tuple(np.geomspace(0.002, 0.5, 20).tolist())


def last_layer_i2(key):
    """I2 where it has no variance, in the last layer, and I1 elsewhere."""

    def label(params):
        return ["rest"] * (len(params) - 1) + ["last"]

    return fsam.by_group(
        label,
        {
            "rest": fsam.fisher_i1(*MODEL, key=key),
            "last": fsam.fisher_i2(*MODEL, key=key),
        },
    )


ESTIMATORS: dict[str, Callable] = {
    "squared gradient": lambda key: fsam.squared_gradient(),
    "empirical": lambda key: fsam.fisher_empirical(*MODEL),
    "GNB": lambda key: fsam.fisher_gnb(*MODEL, key=key),
    "I1, one draw": lambda key: fsam.fisher_i1(*MODEL, key=key),
    "I2 last layer, I1": last_layer_i2,
    "exact": lambda key: fsam.fisher_exact(*MODEL),
}
METHODS = {
    "base": None,
    "SAM": None,
    **{
        f"{name}, {form}": (name, form)
        for form in ("relative", "absolute")
        for name in ESTIMATORS
    },
}


def ellipsoid(rho, estimator, form):
    """Returns the perturbation of Fisher SAM in one of its two forms."""
    if form == "relative":
        return fsam.fisher_ellipsoid(rho, estimator)
    return fsam.fisher_ellipsoid(rho, estimator, damping=DAMPING, relative=False)


def grid_of(method):
    """Returns pairs of radius and learning rate, as many for each method."""
    if method == "base":
        return [(0.0, rate) for rate in BASE_RATES]
    radii = RADII["SAM" if method == "SAM" else METHODS[method][1]]
    return list(itertools.product(radii, LEARNING_RATES))


def perturbation(method, rho, key):
    """Returns the perturbation of the method, None for the base optimizer."""
    if method == "base":
        return None
    if method == "SAM":
        return fsam.euclidean_ball(rho)
    name, form = METHODS[method]
    return ellipsoid(rho, ESTIMATORS[name](key), form)


def train(method, steps, seed, images, labels, rho, rate):
    """Trains one network; returns its parameters."""
    init_key, draw_key, batch_key = jax.random.split(jax.random.key(seed), 3)
    params = initial(init_key, SIZES)
    gradient = oracle(perturbation(method, rho, draw_key))
    data = images, labels
    return perceptron.train(params, gradient, data, rate, steps, BATCH, batch_key)


def compare(method, noise, data, options):
    """Chooses learning rate and radius, trains anew, and returns the figures."""
    (images, labels), (held_images, held_labels), test = data
    # Every method spends the same number of gradients, apart from what its F costs.
    steps = options.steps * (2 if method == "base" else 1)
    grid = grid_of(method)
    rhos, rates = (jnp.array(column) for column in zip(*grid, strict=True))

    def tuned(seed, labels, held_labels, rho, rate):
        params = train(method, steps, seed, images, labels, rho, rate)
        # Not the loss: with many labels wrong, that of a network which answers the
        # same to everything is small.
        return score(params, held_images, held_labels)[1]

    over_grid = jax.jit(jax.vmap(tuned, in_axes=(None, None, None, 0, 0)))
    accuracies = [
        over_grid(
            seed,
            jnp.asarray(noisy_labels(labels, noise, seed)),
            jnp.asarray(noisy_labels(held_labels, noise, seed)),
            rhos,
            rates,
        )
        for seed in range(1000, 1000 + options.tuning_seeds)
    ]
    held_out = np.mean(accuracies, axis=0)
    rho, rate = grid[int(np.argmax(held_out))]

    def final(seed, labels):
        params = train(method, steps, seed, images, labels, rho, rate)
        return score(params, *test)

    seeds = np.arange(options.seeds)
    all_labels = jnp.stack([noisy_labels(labels, noise, seed) for seed in seeds])
    loss, accuracy = jax.jit(jax.vmap(final))(jnp.asarray(seeds), all_labels)
    return {
        "rho": rho,
        "rate": round(rate, 5),
        "held-out accuracy": float(held_out.max()),
        "accuracy": np.asarray(accuracy, float).tolist(),
        "loss": np.asarray(loss, float).tolist(),
    }


def directions(data, options):
    """Returns what each F makes of eps, on networks trained for more and more steps.

    The radii are those that most methods choose. The cosine is with the perturbation
    that the exact Fisher of the same batch gives; the divergence is the mean over the
    training images of KL(w || w + eps).
    """
    images, labels = jax.tree.map(jnp.asarray, data[0])
    stages = [s for s in (0, 25, 100, 400, 1600) if s <= 4 * options.steps]
    draws = jax.random.split(jax.random.key(5), options.draws)
    trained = {
        stage: jax.jit(partial(train, "base", stage))(0, images, labels, 0.0, 0.05)
        for stage in stages
    }
    facts = {}
    for form, rho in (("relative", 0.4), ("absolute", 0.015)):
        for stage, params in trained.items():

            def eps_of(key, name, params=params, form=form, rho=rho):
                ball = ellipsoid(rho, ESTIMATORS[name](key), form)
                rows = jax.random.randint(key, (BATCH,), 0, len(labels))
                batch = images[rows], labels[rows]
                grads = jax.grad(LOSS)(params, batch)
                return ball.update(grads, ball.init(params), params, batch=batch)[0]

            def compared(key, name, params=params, eps_of=eps_of):
                eps, exact = eps_of(key, name), eps_of(key, "exact")
                norms = optax.tree.norm(eps) * optax.tree.norm(exact)
                cosine = optax.tree.vdot(eps, exact) / norms
                kl = fsam.kl_divergence(*MODEL, params, eps, images)
                return cosine, kl, optax.tree.norm(eps)

            for name in ESTIMATORS:
                cosine, kl, length = jax.jit(jax.vmap(partial(compared, name=name)))(
                    draws
                )
                facts.setdefault(f"{name}, {form}", []).append(
                    {
                        "steps": stage,
                        "cosine": float(jnp.mean(cosine)),
                        "kl": float(jnp.mean(kl)),
                        "length": float(jnp.mean(length)),
                    }
                )
    return facts


def cell(values, form):
    """Writes the mean and its standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):{form}} ± {error:{form.lstrip('+')}}"


def draw(results, path):
    """Draws accuracies, and the cosines along training."""
    import matplotlib.pyplot as plt

    settings = [name for name in results if name.startswith("noise")]
    fig, axes = plt.subplots(
        1,
        len(settings) + 1,
        figsize=(4.2 * (len(settings) + 1), 4.4),
        width_ratios=None,
    )
    for ax, setting in zip(axes, settings, strict=False):
        rows = list(results[setting].items())[::-1]
        for i, (method, facts) in enumerate(rows):
            accuracy = 100 * np.array(facts["accuracy"])
            color = {"base": "black", "SAM": "#0072B2"}.get(method)
            color = color or ("#009E73" if "relative" in method else "#D55E00")
            error = accuracy.std(ddof=1) / len(accuracy) ** 0.5
            ax.errorbar(accuracy.mean(), i, xerr=error, fmt="o", color=color)
        first = ax is axes[0]
        ax.set_yticks(range(len(rows)), [m for m, _ in rows] if first else [])
        ax.set_xlabel("test accuracy, %")
        percent = float(setting.split()[1]) * 100
        ax.set_title(f"{percent:.0f} % of the labels wrong", fontsize=10)
        ax.grid(axis="x", alpha=0.3)
    ax = axes[-1]
    styles = {
        "squared gradient": ("-", "#000000"),
        "empirical": ("--", "#D55E00"),
        "GNB": (":", "#CC79A7"),
        "I1, one draw": ("-.", "#0072B2"),
        "I2 last layer, I1": ((0, (5, 1, 1, 1, 1, 1)), "#56B4E9"),
    }
    # The others are compared with the exact one.
    for name in [name for name in ESTIMATORS if name != "exact"]:
        style, color = styles[name]
        found = results["directions"][f"{name}, relative"]
        stages = [max(f["steps"], 10) for f in found]
        ax.plot(stages, [f["cosine"] for f in found], ls=style, color=color, label=name)
    ax.set_xscale("log")
    ax.set_xlabel("steps trained for (leftmost: none)")
    ax.set_ylabel("relative form: cosine with eps of the exact F")
    ax.legend(fontsize=8, frameon=False)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(arguments: list[str] | None = None) -> None:
    """Runs what the results do not hold yet, prints the table and draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tuning-seeds", type=int, default=4)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.4])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--figure", type=pathlib.Path, default=FIGURE)
    parser.add_argument("--smoke", action="store_true", help="seconds, to see it run")
    options = parser.parse_args(arguments)
    methods = list(METHODS)
    if options.smoke:
        options.steps, options.seeds, options.tuning_seeds, options.draws = 3, 2, 1, 2
        methods, options.noise = ["base", "squared gradient, relative"], [0.0]
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    data = (
        (jnp.asarray(x[:300]), y[:300]),
        (jnp.asarray(x[300:1000]), y[300:1000]),
        (jnp.asarray(x[1000:]), jnp.asarray(y[1000:])),
    )
    about = {k: v for k, v in vars(options).items() if not isinstance(v, pathlib.Path)}
    done = finished(options.out, about)
    console = Console(width=130)
    for noise in options.noise:
        setting = f"noise {noise:g}"
        for method in methods:
            if method in done.setdefault(setting, {}):
                continue
            console.print(f"{setting}: {method}")
            done[setting][method] = compare(method, noise, data, options)
            save(options.out, setting, done[setting], **about)
    if "directions" not in done:
        done["directions"] = directions(data, options)
        save(options.out, "directions", done["directions"], **about)
    table = Table(title=f"{options.seeds} seeds: mean and standard error")
    for column in (
        "method",
        "labels wrong",
        "learning rate",
        "rho",
        "accuracy, %",
        "over base",
        "over SAM",
        "loss",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for noise in options.noise:
        setting = f"noise {noise:g}"
        for method, facts in done[setting].items():
            accuracy = np.array(facts["accuracy"])
            # On the same seeds, so that what they share cancels.
            over = [
                cell(100 * (accuracy - done[setting][other]["accuracy"]), "+.1f")
                if other in done[setting]
                else "-"
                for other in ("base", "SAM")
            ]
            cells = cell(100 * accuracy, ".1f"), *over, cell(facts["loss"], ".3f")
            table.add_row(
                method,
                f"{noise:.0%}",
                f"{facts['rate']:.2g}",
                f"{facts['rho']:g}",
                *cells,
            )
    console.print(table)
    table = Table(title="Networks trained for more and more steps, relative / absolute")
    table.add_column("F")
    stages = [f["steps"] for f in next(iter(done["directions"].values()))]
    for stage in stages:
        table.add_column(f"cosine, {stage} steps", justify="right")
    table.add_column(f"KL, {stages[-1]} steps", justify="right")
    for name in ESTIMATORS:
        pair = [
            done["directions"][f"{name}, {form}"] for form in ("relative", "absolute")
        ]
        cells = [
            f"{a['cosine']:.2f} / {b['cosine']:.2f}" for a, b in zip(*pair, strict=True)
        ]
        kl = " / ".join(f"{found[-1]['kl']:.1e}" for found in pair)
        table.add_row(name, *cells, kl)
    console.print(table)
    draw(done, options.figure)


if __name__ == "__main__":
    main()

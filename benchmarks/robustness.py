"""Question: which method withstands wrong labels, and perturbed weights?

A share of the training labels is wrong; the test labels are right. The base optimizer,
SAM, ASAM and Fisher SAM, once with the squared gradient of the batch and once with the
squares of the single examples, spend the same number of gradients (apart from what a
Fisher information costs). Learning rate and radius are chosen for each method and share
of wrong labels from a grid of 20, by the accuracy on held-out training images, whose
labels are as wrong as the others. Then the networks trained on right labels are
perturbed: along the perturbation of each geometry for the training loss, and in a
random direction, by equal Euclidean lengths and by equal changes of the predictions.

    python benchmarks/robustness.py                       # handwritten digits
    python benchmarks/robustness.py --data fashion-mnist --data-dir data/fashion
    python benchmarks/robustness.py --smoke               # to see that it runs

Finished parts are kept in the results; the same command goes on from there.
"""

import argparse
import itertools
import pathlib
from functools import partial

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
from cost import finished, save
from perceptron import apply, initial, LOSS, MODEL, noisy_labels, oracle, score
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fsam_optax as fsam


HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "robustness.json"
FIGURE = HERE / "figures" / "robustness.png"
HIDDEN = (64, 64)
BATCH = 50
RATES = (0.01, 0.03, 0.1, 0.3)
RADII = (0.05, 0.1, 0.2, 0.4, 0.8)
BASE_RATES = tuple(np.geomspace(0.002, 0.5, len(RATES) * len(RADII)).tolist())
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
DIVERGENCES = (0.01, 0.03, 0.1, 0.3, 1.0)


METHODS = {
    "base": None,
    "SAM": fsam.euclidean_ball,
    "ASAM": fsam.adaptive_ellipsoid,
    "Fisher SAM, squared gradient": partial(
        fsam.fisher_ellipsoid, estimator=fsam.squared_gradient()
    ),
    "Fisher SAM, empirical": partial(
        fsam.fisher_ellipsoid, estimator=fsam.fisher_empirical(*MODEL)
    ),
}
DIRECTIONS = {
    "SAM's": fsam.euclidean_ball(1.0),
    "ASAM's": fsam.adaptive_ellipsoid(1.0),
    "Fisher SAM's": fsam.fisher_ellipsoid(1.0, fsam.fisher_exact(*MODEL)),
    "random": None,
}
COLORS = dict(
    zip(METHODS, ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True)
)
STYLES = dict(zip(METHODS, ("-", "--", "-.", ":", (0, (5, 1, 1, 1))), strict=True))


def train(method, steps, seed, images, labels, rho, rate):
    """Trains one network; returns its parameters."""
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    params = initial(init_key, (images.shape[1], *HIDDEN, 10))
    make = METHODS[method]
    gradient = oracle(None if make is None else make(rho))
    data = images, labels
    return perceptron.train(params, gradient, data, rate, steps, BATCH, batch_key)


def grid_of(method):
    """Returns pairs of radius and learning rate, as many for each method."""
    if method == "base":
        return [(0.0, rate) for rate in BASE_RATES]
    # ASAM's radius is relative to the weights, and a few times that of SAM.
    radii = [(3 if method == "ASAM" else 1) * rho for rho in RADII]
    return list(itertools.product(radii, RATES))


def runs(method, options):
    """Returns the compiled search over the grid, and the final training."""
    # Every method spends the same number of gradients.
    steps = options.steps * (2 if method == "base" else 1)
    rhos, rates = (jnp.array(column) for column in zip(*grid_of(method), strict=True))

    def held_out_accuracy(seed, images, labels, rho, rate):
        order = jax.random.permutation(jax.random.key(seed), len(labels))
        held, used = order[: len(labels) // 5], order[len(labels) // 5 :]
        params = train(method, steps, seed, images[used], labels[used], rho, rate)
        # Not the loss: with most labels wrong, that of a network which answers the
        # same to everything is the least.
        return score(params, images[held], labels[held])[1]

    over_grid = jax.vmap(held_out_accuracy, in_axes=(None, None, None, 0, 0))
    search = jax.jit(
        jax.vmap(
            lambda seed, images, labels: over_grid(seed, images, labels, rhos, rates),
            in_axes=(0, None, 0),
        )
    )
    final = jax.jit(
        jax.vmap(partial(train, method, steps), in_axes=(0, None, 0, None, None))
    )
    return search, final


def compare(method, noise, compiled, data, options):
    """Chooses learning rate and radius, trains anew, and returns the figures."""
    (images, labels), test = data
    search, final = compiled
    seeds = 1000 + np.arange(options.tuning_seeds)
    noisy = jnp.stack([noisy_labels(labels, noise, seed) for seed in seeds])
    accuracies = np.mean(search(jnp.asarray(seeds), images, noisy), axis=0)
    best = int(np.argmax(accuracies))
    rho, rate = grid_of(method)[best]
    seeds = np.arange(options.seeds)
    noisy = jnp.stack([noisy_labels(labels, noise, seed) for seed in seeds])
    params = final(jnp.asarray(seeds), images, noisy, rho, rate)
    loss, accuracy = jax.vmap(lambda w: score(w, *test))(params)
    answers = jnp.argmax(jax.vmap(apply, in_axes=(0, None))(params, images), -1)
    wrong = noisy != jnp.asarray(labels)[None]
    learnt = jnp.sum(wrong & (answers == noisy), 1) / jnp.maximum(jnp.sum(wrong, 1), 1)
    rounded = partial(np.round, decimals=4)
    return {
        "rho": rho,
        "rate": round(rate, 5),
        "held-out accuracy": round(float(accuracies[best]), 4),
        "accuracy": rounded(np.asarray(accuracy, float)).tolist(),
        "loss": rounded(np.asarray(loss, float)).tolist(),
        "wrong labels learnt": rounded(np.asarray(learnt, float)).tolist(),
    }


def perturbed(params, seed, data, halvings):
    """Returns test loss and accuracy of one network, by direction and by length.

    Where the divergence does not grow evenly, the length is one at which it is equal.
    """
    train_set, (images, labels) = data
    grads = jax.grad(LOSS)(params, train_set)

    def displaced(eps, scale):
        return jax.tree.map(lambda w, e: w + scale * e, params, eps)

    def divergence(eps, scale):
        eps = optax.tree.scale(scale, eps)
        return fsam.kl_divergence(*MODEL, params, eps, images)

    found = {}
    for name, ball in DIRECTIONS.items():
        if ball is None:
            eps = optax.tree.random_like(jax.random.key(seed), params)
        else:
            eps, _ = ball.update(grads, ball.init(params), params, batch=train_set)
        eps = optax.tree.scale(1 / optax.tree.norm(eps), eps)

        def length_for(target, eps=eps):
            def halve(_, ends):
                middle = jnp.mean(ends)
                short = divergence(eps, jnp.exp(middle)) < target
                return jnp.where(
                    short,
                    jnp.stack([middle, ends[1]]),
                    jnp.stack([ends[0], middle]),
                )

            ends = jnp.log(jnp.array([1e-3, 1e3]))
            return jnp.exp(jnp.mean(jax.lax.fori_loop(0, halvings, halve, ends)))

        by_divergence = jax.lax.map(length_for, jnp.array(DIVERGENCES))
        for kind, lengths in (
            ("length", jnp.array(LENGTHS)),
            ("divergence", by_divergence),
        ):
            reached, (losses, accuracies) = jax.lax.map(
                lambda t, eps=eps: (
                    divergence(eps, t),
                    score(displaced(eps, t), images, labels),
                ),
                lengths,
            )
            found[f"{name}, {kind}"] = {
                "length": lengths,
                "divergence": reached,
                "loss": losses,
                "accuracy": accuracies,
            }
    return found


def perturb(method, facts, final, data, options):
    """Returns what perturbations do to the networks trained on right labels."""
    (images, labels), _ = data
    seeds = jnp.arange(options.seeds)
    all_labels = jnp.stack([jnp.asarray(labels)] * options.seeds)
    params = final(seeds, images, all_labels, facts["rho"], facts["rate"])
    data = jax.tree.map(jnp.asarray, data)
    found = jax.jit(
        jax.vmap(lambda w, seed: perturbed(w, seed, data, options.halvings))
    )(params, seeds)

    def summary(values):
        values = np.asarray(values, float)
        error = values.std(0, ddof=1) / len(values) ** 0.5
        return {
            "mean": np.round(values.mean(0), 4).tolist(),
            "error": np.round(error, 4).tolist(),
        }

    return jax.tree.map(summary, found)


def mean_and_error(values, factor=1.0):
    """Returns the mean and its standard error."""
    values = factor * np.asarray(values)
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5


def print_tables(results, data_name, noises, console):
    """Prints accuracies by share of wrong labels, and those of perturbed networks."""
    settings = [results[f"{data_name}, noise {noise:g}"] for noise in noises]
    for title, key, factor, digits in (
        ("test accuracy, %", "accuracy", 100, 1),
        ("test loss", "loss", 1, 3),
        ("wrong labels learnt, %", "wrong labels learnt", 100, 1),
    ):
        table = Table(title=f"{data_name}, {title}: mean and standard error")
        table.add_column("method")
        for noise in noises:
            table.add_column(f"{noise:.0%} wrong", justify="right")
        for method in settings[0]:
            pairs = (mean_and_error(facts[method][key], factor) for facts in settings)
            cells = (f"{mean:.{digits}f} ± {error:.{digits}f}" for mean, error in pairs)
            table.add_row(method, *cells)
        console.print(table)
    for other in ("base", "SAM"):
        table = Table(title=f"{data_name}, points over {other} on the same seeds")
        table.add_column("method")
        for noise in noises:
            table.add_column(f"{noise:.0%} wrong", justify="right")
        for method in settings[0]:
            cells = []
            for facts in settings:
                if other in facts:
                    pair = (np.array(facts[m]["accuracy"]) for m in (method, other))
                    mean, error = mean_and_error(np.subtract(*pair), 100)
                    cells.append(f"{mean:+.1f} ± {error:.1f}")
            table.add_row(method, *cells)
        console.print(table)
    table = Table(title="chosen: learning rate, rho")
    table.add_column("method")
    for noise in noises:
        table.add_column(f"{noise:.0%} wrong", justify="right")
    for method in settings[0]:
        chosen = (facts[method] for facts in settings)
        table.add_row(method, *(f"{f['rate']:.3g}, {f['rho']:.3g}" for f in chosen))
    console.print(table)
    by_method = results[f"{data_name}, perturbation"]
    for kind, values in (("length", LENGTHS), ("divergence", DIVERGENCES)):
        middle = len(values) // 2
        table = Table(
            title=f"accuracy, %, after a perturbation of {kind} {values[middle]:g}"
        )
        table.add_column("method")
        for direction in DIRECTIONS:
            table.add_column(direction, justify="right")
        for method, found in by_method.items():
            cells = []
            for direction in DIRECTIONS:
                accuracy = found[f"{direction}, {kind}"]["accuracy"]
                mean, error = (100 * accuracy[k][middle] for k in ("mean", "error"))
                cells.append(f"{mean:.1f} ± {error:.1f}")
            table.add_row(method, *cells)
        console.print(table)


def draw(results, data_name, noises, path):
    """Draws figures by share of wrong labels, and accuracies of perturbed networks."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(3, 4, figsize=(14, 9.6), squeeze=False)
    settings = [results[f"{data_name}, noise {noise:g}"] for noise in noises]
    percent = 100 * np.array(noises)
    for method in settings[0]:
        look = {"color": COLORS[method], "ls": STYLES[method], "marker": "o", "ms": 3}
        columns = (
            ("accuracy", 100, None),
            ("accuracy", 100, "base"),
            ("loss", 1, None),
            ("wrong labels learnt", 100, None),
        )
        for ax, (key, factor, against) in zip(axes[0], columns, strict=True):
            pairs = []
            for facts in settings:
                values = np.array(facts[method][key])
                if against:
                    values = values - np.array(facts[against][key])
                pairs.append(mean_and_error(values, factor))
            means, errors = np.array(pairs).T
            x = percent + (list(settings[0]).index(method) - 2) * 0.6
            ax.errorbar(x, means, yerr=errors, label=method, lw=1.4, capsize=0, **look)
    titles = ("test accuracy, %", "points over base", "test loss")
    for ax, title in zip(axes[0], (*titles, "wrong labels learnt, %"), strict=True):
        ax.set_xlabel("labels wrong, %")
        ax.set_ylabel(title)
    axes[0][0].legend(fontsize=8, frameon=False)
    for row, (kind, values, title) in enumerate(
        (
            ("length", LENGTHS, "Euclidean length"),
            ("divergence", DIVERGENCES, "divergence of the predictions, nats"),
        )
    ):
        for ax, direction in zip(axes[row + 1], DIRECTIONS, strict=True):
            for method, found in results[f"{data_name}, perturbation"].items():
                accuracy = found[f"{direction}, {kind}"]["accuracy"]
                means, errors = (100 * np.array(accuracy[k]) for k in ("mean", "error"))
                color, style = COLORS[method], STYLES[method]
                ax.plot(values, means, color=color, ls=style, marker="o", ms=3, lw=1.4)
                ends = means - errors, means + errors
                ax.fill_between(values, *ends, color=color, alpha=0.12, lw=0)
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter("")
            ax.set_xticks(values, [f"{v:g}" for v in values])
            ax.set_xlabel(title)
            ax.set_ylabel("test accuracy, %")
            ax.set_title(f"{direction} direction", fontsize=10)
        low = min(ax.get_ylim()[0] for ax in axes[row + 1])
        high = max(ax.get_ylim()[1] for ax in axes[row + 1])
        for ax in axes[row + 1]:
            ax.set_ylim(low, high)
    for ax in axes.ravel():
        ax.grid(alpha=0.3)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def read(options):
    """Returns training and test images, as rows of pixels in 0..1, and their labels."""
    found = datasets.load(options.data, options.data_dir)

    def rows(images):
        images = images.astype(np.float32)[..., 0] / 255
        if images.shape[1] > 16:  # Half as many pixels a side: a smaller network.
            images = images.reshape(-1, 14, 2, 14, 2).mean((2, 4))
        return jnp.asarray(images.reshape(len(images), -1))

    train_size, test_size = options.train_size, 2000
    return (
        (rows(found.train_images[:train_size]), found.train_labels[:train_size]),
        (
            rows(found.test_images[:test_size]),
            jnp.asarray(found.test_labels[:test_size]),
        ),
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs what the results do not hold yet, prints the tables and draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", choices=("digits", "fashion-mnist", "mnist"), default="digits"
    )
    parser.add_argument("--data-dir", type=pathlib.Path, default=pathlib.Path("data"))
    parser.add_argument("--train-size", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=400, help="base: twice as many")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--tuning-seeds", type=int, default=8)
    parser.add_argument("--halvings", type=int, default=25, help="of the length")
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6, 0.8]
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--figure", type=pathlib.Path, default=FIGURE)
    parser.add_argument("--smoke", action="store_true", help="seconds, to see it run")
    options = parser.parse_args(arguments)
    methods = list(METHODS)
    if options.smoke:
        options.steps, options.seeds, options.tuning_seeds = 2, 2, 1
        options.noise, options.train_size = [0.0, 0.4], 100
        methods = ["base", "Fisher SAM, empirical"]
    data = read(options)
    about = {
        k: v
        for k, v in vars(options).items()
        if not isinstance(v, pathlib.Path) and k != "data"
    }
    done = finished(options.out, about)

    def keep(name, method, value):
        done.setdefault(name, {})[method] = value
        save(options.out, name, done[name], **about)

    perturbation = f"{options.data}, perturbation"
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(methods) * (len(options.noise) + 1))
        for method in methods:
            compiled = runs(method, options)
            for noise in options.noise:
                name = f"{options.data}, noise {noise:g}"
                progress.update(task, description=f"{method}, {name}")
                if method not in done.get(name, {}):
                    keep(name, method, compare(method, noise, compiled, data, options))
                progress.advance(task)
            progress.update(task, description=f"{method}, {perturbation}")
            if method not in done.get(perturbation, {}):
                facts = done[f"{options.data}, noise {options.noise[0]:g}"][method]
                found = perturb(method, facts, compiled[1], data, options)
                keep(perturbation, method, found)
            progress.advance(task)
    print_tables(done, options.data, options.noise, Console(width=120))
    draw(done, options.data, options.noise, options.figure)


if __name__ == "__main__":
    main()

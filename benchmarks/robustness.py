"""Question: which method withstands wrong labels, and perturbed weights?

A share of the training labels is wrong; the test labels are right. Every method spends
the same number of gradients (apart from what a Fisher information costs), and chooses
learning rate and radius for each share of wrong labels from a grid of 20, by the
accuracy on held-out training images, whose labels are as wrong as the others. Then the
networks trained on right labels are perturbed: along the perturbation of each geometry
for the training loss, and in a random direction, by equal Euclidean lengths and by
equal changes of the predictions.

    python benchmarks/robustness.py                       # handwritten digits
    python benchmarks/robustness.py --data fashion-mnist --data-dir data/fashion
"""

import pathlib
import sys
from functools import partial

import datasets
import harness
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import perceptron
import show
from perceptron import LOSS, score

import fsam_optax as fsam


HIDDEN = (64, 64)
BATCH = 50
RATES = (0.01, 0.03, 0.1, 0.3)
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
DIVERGENCES = (0.01, 0.03, 0.1, 0.3, 1.0)
DIRECTIONS = {
    "SAM's": fsam.euclidean_ball(1.0),
    "ASAM's": fsam.adaptive_ellipsoid(1.0),
    "Fisher SAM's": fsam.fisher_ellipsoid(1.0, fsam.fisher_exact(LOSS)),
    "random": None,
}


def train(method, gradients, seed, images, labels, rho, rate):
    """Trains one network; returns its parameters."""
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    params = perceptron.initial(init_key, (images.shape[1], *HIDDEN, 10))
    steps = gradients // methods.METHODS[method].passes
    return perceptron.train(
        params,
        lambda optimizer: methods.stepper(method, LOSS, optimizer, rho),
        (images, labels),
        rate,
        steps,
        BATCH,
        batch_key,
    )


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
        return fsam.kl_divergence(LOSS, params, eps, (images, labels))

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


def perturb(training, facts, data, options):
    """Returns what perturbations do to the networks trained on right labels."""
    params, _ = perceptron.trained(training, facts, data[0], 0.0, options.seeds)
    data = jax.tree.map(jnp.asarray, data)
    found = jax.jit(
        jax.vmap(lambda w, seed: perturbed(w, seed, data, options.halvings))
    )(params, jnp.arange(options.seeds))

    def summary(values):
        values = np.asarray(values, float)
        error = values.std(0, ddof=1) / len(values) ** 0.5
        return {"mean": values.mean(0), "error": error}

    return jax.tree.map(summary, found)


def read(options):
    """Returns training and test images, as rows of pixels in 0..1, and their labels."""
    found = datasets.load(options.data, options.data_dir)

    def rows(images):
        images = images.astype(np.float32)[..., 0] / 255
        if images.shape[1] > 16:  # Half as many pixels a side: a smaller network.
            images = images.reshape(-1, 14, 2, 14, 2).mean((2, 4))
        return jnp.asarray(images.reshape(len(images), -1))

    size = options.train_size
    return (
        (rows(found.train_images[:size]), found.train_labels[:size]),
        (rows(found.test_images[:2000]), jnp.asarray(found.test_labels[:2000])),
    )


def print_tables(results, perturbations, options):
    """Prints figures by share of wrong labels, and those of perturbed networks."""
    headings = ["method", *(f"{noise:.0%} wrong" for noise in options.noise)]
    for title, key, factor, form in (
        ("test accuracy, %", "accuracy", 100, ".1f"),
        ("test accuracy, points over base on the same seeds", "accuracy", 100, "+.1f"),
        ("test loss", "loss", 1, ".3f"),
        ("wrong labels learnt, %", "wrong labels learnt", 100, ".1f"),
    ):
        rows = []
        for method in options.methods:
            cells = [method]
            for by_method in results.values():
                values = np.array(by_method[method][key])
                values = values - np.array(by_method["base"][key]) * ("over" in title)
                cells.append(show.cell(values, form, factor))
            rows.append(cells)
        show.table(f"{options.data}: {title}", headings, rows, "Mean ± standard error.")
    rows = [
        [
            method,
            *(
                f"{of[method]['rate']:.3g}, {of[method]['rho']:.3g}"
                + "*" * bool(of[method]["edges"])
                for of in results.values()
            ),
        ]
        for method in options.methods
    ]
    show.table("Chosen: learning rate, rho", headings, rows, "* at an edge of the grid")
    kinds = {"length": LENGTHS, "divergence": DIVERGENCES}
    for kind, values in kinds.items() if perturbations else ():
        middle = len(values) // 2
        rows = []
        for method, found in perturbations.items():
            at = (found[f"{name}, {kind}"]["accuracy"] for name in DIRECTIONS)
            pairs = ((100 * x["mean"][middle], 100 * x["error"][middle]) for x in at)
            rows.append(
                [method, *(f"{mean:.1f} ± {error:.1f}" for mean, error in pairs)]
            )
        title = f"Accuracy, %, after a perturbation of {kind} {values[middle]:g}"
        show.table(title, ["method", *DIRECTIONS], rows)


def draw(results, perturbations, options, path):
    """Draws accuracies over the base optimizer, and those of perturbed networks."""
    fig, axes = show.figure(
        1 + bool(perturbations),
        4,
        f"{options.data}: what wrong labels cost, and perturbed weights",
        figsize=(14, 7),
    )
    percent = 100 * np.array(list(results))
    keys = ("accuracy", "accuracy", "loss", "wrong labels learnt")
    titles = ("test accuracy, %", "points over base", "test loss", "learnt wrong, %")
    for at, method in enumerate(options.methods):
        for ax, key, title in zip(axes[0], keys, titles, strict=True):
            factor = 1 if key == "loss" else 100
            pairs = []
            for of in results.values():
                values = np.array(of[method][key])
                if title == "points over base":
                    values = values - np.array(of["base"][key])
                pairs.append(show.mean_and_error(values, factor))
            means, errors = np.array(pairs).T
            x = percent + (at - len(options.methods) / 2) * 0.6
            style = show.look(method) | {"ms": 4, "lw": 1.2}
            ax.errorbar(x, means, yerr=errors, label=method, **style)
            ax.set_title(title)
            ax.set_xlabel("labels wrong, %")
    pairs = zip(axes[-1], DIRECTIONS, strict=True) if perturbations else ()
    for ax, direction in pairs:
        for method, found in perturbations.items():
            accuracy = found[f"{direction}, divergence"]["accuracy"]
            mean = 100 * np.array(accuracy["mean"])
            ax.plot(DIVERGENCES, mean, **show.look(method), ms=4, lw=1.2)
        ax.set_xscale("log")
        ax.set_xticks(DIVERGENCES, [f"{v:g}" for v in DIVERGENCES])
        ax.set_xlabel("change of the predictions, nats")
        ax.set_title(f"accuracy, %, along {direction} direction")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    show.save(fig, path)


def experiment(run: harness.Run) -> None:
    """Runs what the results do not hold yet, prints the tables and draws the figure."""
    options = run.options
    data = read(options)
    (images, labels), test = data
    settings = {
        name: getattr(options, name)
        for name in ("data", "train_size", "gradients", "seeds", "tuning_seeds")
    }
    results = {noise: {} for noise in options.noise}
    perturbations = {}
    for method in options.methods:
        points = methods.grid(method, RATES)
        training = partial(train, method, options.gradients)
        for noise, found in results.items():
            compare = partial(
                perceptron.compare,
                *(training, points, (images, labels), test),
                noise=noise,
                seeds=options.seeds,
                tuning_seeds=options.tuning_seeds,
            )
            found[method] = run.cell(compare, method=method, noise=noise, **settings)
        if 0.0 not in results:  # Perturbed are the networks trained on right labels.
            continue
        facts = results[0.0][method]
        perturbations[method] = run.cell(
            partial(perturb, training, facts, data, options),
            **{"part": "perturbation", "method": method},
            **{"rho": facts["rho"], "rate": facts["rate"]},
            **settings,
        )
    print_tables(results, perturbations, options)
    suffix = "" if options.data == "digits" else f"_{options.data.replace('-', '_')}"
    draw(results, perturbations, options, run.picture(suffix))


def add_options(add):
    add("--data", choices=("digits", "fashion-mnist", "mnist"), default="digits")
    add("--data-dir", type=pathlib.Path, default=pathlib.Path("data"))
    add("--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS))
    add("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6, 0.8])
    add("--gradients", type=harness.whole, default=800, help="of one training")
    add("--train-size", type=harness.whole, default=1000)
    add("--seeds", type=harness.whole, default=16)
    add("--tuning-seeds", type=harness.whole, default=8)
    add("--halvings", type=harness.whole, default=25, help="of the length")


SMOKE = {
    "methods": ["base", "ASAM", "Fisher SAM, empirical, relative"],
    **{"noise": [0.0, 0.4], "gradients": 4, "train_size": 100, "seeds": 2},
    **{"tuning_seeds": 1, "halvings": 25},
}


def main(arguments: list[str] | None = None) -> int:
    return harness.main(
        __doc__, experiment, arguments, options=add_options, smoke=SMOKE
    )


if __name__ == "__main__":
    sys.exit(main())

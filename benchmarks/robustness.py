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


RATES = (0.01, 0.03, 0.1, 0.3)
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
DIVERGENCES = (0.01, 0.03, 0.1, 0.3, 1.0)
DIRECTIONS = {
    "SAM's": fsam.euclidean_ball(1.0),
    "ASAM's": fsam.adaptive_ellipsoid(1.0),
    "Fisher SAM's": fsam.fisher_ellipsoid(1.0, fsam.fisher_exact(LOSS)),
    "random": None,
}


def perturbed(params, seed, data, halvings):
    """Returns test loss and accuracy of one network, by direction and by length.

    Where the divergence does not grow evenly, the length is one at which it is equal.
    """
    train_set, (images, labels) = data
    grads = jax.grad(LOSS)(params, train_set)

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
                return ends.at[jnp.where(short, 0, 1)].set(middle)

            ends = jnp.log(jnp.array([1e-3, 1e3]))
            return jnp.exp(jnp.mean(jax.lax.fori_loop(0, halvings, halve, ends)))

        for kind, lengths in (
            ("length", jnp.array(LENGTHS)),
            ("divergence", jax.lax.map(length_for, jnp.array(DIVERGENCES))),
        ):

            def measured(t, eps=eps):
                moved = jax.tree.map(lambda w, e: w + t * e, params, eps)
                return divergence(eps, t), score(moved, images, labels)

            reached, (losses, accuracies) = jax.lax.map(measured, lengths)
            facts = {"length": lengths, "divergence": reached}
            facts |= {"loss": losses, "accuracy": accuracies}
            found[f"{name}, {kind}"] = facts
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
    """Returns training and test set."""
    found = datasets.load(options.data, options.data_dir)
    # Half as many pixels a side: a smaller network.
    pool = 2 if found.train_images.shape[1] > 16 else 1
    (images, labels), test = perceptron.split(found, pool)
    size = options.train_size
    return (images[:size], labels[:size]), tuple(part[:2000] for part in test)


def print_tables(results, perturbations, options):
    """Prints figures by share of wrong labels, and those of perturbed networks."""
    headings = ["method", *(f"{noise:.0%} wrong" for noise in options.noise)]
    for title, key, factor, form in (
        ("test accuracy, %", "accuracy", 100, ".1f"),
        ("test accuracy, points over base on the same seeds", "over", 100, "+.1f"),
        ("test loss", "loss", 1, ".3f"),
        ("wrong labels learnt, %", "wrong labels learnt", 100, ".1f"),
    ):
        rows = [
            [m, *(show.cell(of[m][key], form, factor) for of in results.values())]
            for m in options.methods
        ]
        show.table(f"{options.data}: {title}", headings, rows, "Mean ± standard error.")

    def chosen(f):
        return f"{f['rate']:.3g}, {f['rho']:.3g}" + "*" * bool(f["edges"])

    rows = [[m, *(chosen(of[m]) for of in results.values())] for m in options.methods]
    show.table("Chosen: learning rate, rho", headings, rows, "* at an edge of the grid")
    if not perturbations:
        return
    for kind, values in (("length", LENGTHS), ("divergence", DIVERGENCES)):
        middle = len(values) // 2

        def entry(facts, middle=middle):
            mean, error = (100 * facts[x][middle] for x in ("mean", "error"))
            return f"{mean:.1f} ± {error:.1f}"

        rows = [
            [m, *(entry(found[f"{name}, {kind}"]["accuracy"]) for name in DIRECTIONS)]
            for m, found in perturbations.items()
        ]
        title = f"Accuracy, %, after a perturbation of {kind} {values[middle]:g}"
        show.table(title, ["method", *DIRECTIONS], rows)


def draw(results, perturbations, options, path):
    """Draws accuracies over the base optimizer, and those of perturbed networks."""
    headline = f"{options.data}: what wrong labels cost, and perturbed weights"
    fig, axes = show.figure(1 + bool(perturbations), 4, headline, figsize=(14, 7))
    percent = 100 * np.array(list(results))
    keys = ("accuracy", "over", "loss", "wrong labels learnt")
    titles = ("test accuracy, %", "points over base", "test loss", "learnt wrong, %")
    for ax, key, title in zip(axes[0], keys, titles, strict=True):
        for at, method in enumerate(options.methods):
            x = percent + (at - len(options.methods) / 2) * 0.6
            style = show.look(method) | {"ms": 4, "lw": 1.2, "label": method}
            values = [of[method][key] for of in results.values()]
            show.errors(ax, x, values, 1 if key == "loss" else 100, **style)
        ax.set(title=title, xlabel="labels wrong, %")
    pairs = zip(axes[-1], DIRECTIONS, strict=True) if perturbations else ()
    for ax, direction in pairs:
        for method, found in perturbations.items():
            mean = 100 * np.array(found[f"{direction}, divergence"]["accuracy"]["mean"])
            ax.plot(DIVERGENCES, mean, **show.look(method), ms=4, lw=1.2)
        ax.set_xscale("log")
        ax.set_xticks(DIVERGENCES, [f"{v:g}" for v in DIVERGENCES])
        ax.set_xlabel("change of the predictions, nats")
        ax.set_title(f"accuracy, %, along {direction} direction")
    show.legend(fig, axes[0, 0], 5, fontsize=8)
    show.save(fig, path)


NAMES = ["base", "SAM", "ASAM"]
NAMES += [f"Fisher SAM, {f}, relative" for f in ("squared", "empirical")]


@harness.experiment(
    smoke={
        "methods": ["base", "ASAM", "Fisher SAM, empirical, relative"],
        **{"noise": [0.0, 0.4], "gradients": 4, "train_size": 100, "seeds": 2},
        **{"tuning_seeds": 1, "halvings": 25},
    },
    **perceptron.IMAGES,
    methods={"default": NAMES, "choices": methods.METHODS},
    noise=[0.0, 0.2, 0.4, 0.6, 0.8],
    gradients={"default": 800, "help": "of one training"},
    train_size=1000,
    seeds=16,
    tuning_seeds=8,
    halvings={"default": 25, "help": "of the length"},
)
def main(run: harness.Run) -> None:
    options = run.options
    data = read(options)
    settings = run.take("data train_size gradients seeds tuning_seeds")
    seeds = run.take("seeds tuning_seeds")
    results = {noise: {} for noise in options.noise}
    perturbations = {}
    for method in options.methods:
        training = partial(perceptron.train_by, method, options.gradients)
        points = methods.grid(method, RATES)
        for noise, found in results.items():
            compare = partial(perceptron.compare, noise=noise, **seeds)
            key = {"method": method, "noise": noise, "points": points, **settings}
            found[method] = run.cell(compare, training, points, *data, **key)
            pair = (found[name]["accuracy"] for name in (method, "base"))
            found[method]["over"] = np.subtract(*pair)
        if 0.0 not in results:  # Perturbed are the networks trained on right labels.
            continue
        facts = results[0.0][method]
        point = {"rho": facts["rho"], "rate": facts["rate"]}
        key = {"part": "perturbation", "method": method, **point, **settings}
        args = perturb, training, facts, data, options
        perturbations[method] = run.cell(*args, **key)
    print_tables(results, perturbations, options)
    draw(results, perturbations, options, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

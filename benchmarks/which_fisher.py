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
"""

from collections.abc import Callable
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
from perceptron import LOSS

import fsam_optax as fsam


SIZES = (64, 128, 128, 10)
BATCH = 30
RATES = (0.005, 0.015, 0.05, 0.15)
RADII = {"relative": methods.RADII, "absolute": methods.ABSOLUTE}
STAGES = (0, 25, 100, 400, 1600)


def last_layer_i2(key):
    """I2 where it has no variance, in the last layer, and I1 elsewhere."""

    def label(params):
        return ["rest"] * (len(params) - 1) + ["last"]

    return fsam.by_group(
        label,
        {"rest": fsam.fisher_i1(LOSS, key=key), "last": fsam.fisher_i2(LOSS, key=key)},
    )


ESTIMATORS: dict[str, Callable] = {
    "squared gradient": lambda key: fsam.squared_gradient(),
    "empirical": lambda key: fsam.fisher_empirical(LOSS),
    "GNB": lambda key: fsam.fisher_gnb(LOSS, key=key),
    "I1, one draw": lambda key: fsam.fisher_i1(LOSS, key=key),
    "I2 last layer, I1": last_layer_i2,
    "exact": lambda key: fsam.fisher_exact(LOSS),
}


def points(method):
    """Returns the points of the search, as many for each method."""
    if method in methods.METHODS:
        return methods.grid(method, RATES)
    return methods.grid("SAM", RATES, RADII[method.split(", ")[-1]])


def stepper(method, rho, key, optimizer):
    """Returns the training step of the method."""
    if method in methods.METHODS:
        return methods.stepper(method, LOSS, optimizer, rho)
    name, form = method.rsplit(", ", 1)
    ball = methods.fisher(ESTIMATORS[name](key), form, rho)
    return methods.around(fsam.value_and_grad(LOSS, ball, metrics=False), optimizer)


def train(method, gradients, seed, images, labels, rho, rate):
    """Trains one network; returns its parameters."""
    init_key, draw_key, batch_key = jax.random.split(jax.random.key(seed), 3)
    params = perceptron.initial(init_key, SIZES)
    make = partial(stepper, method, rho, draw_key)
    passes = methods.METHODS[method].passes if method in methods.METHODS else 2
    steps = gradients // passes
    data = images, labels
    return perceptron.train(params, make, data, rate, steps, BATCH, batch_key)


def direction(name, form, data, stages, draws):
    """Returns what an F makes of eps, on networks trained for more and more steps.

    The radii are those that most methods choose. The cosine is with the perturbation
    that the exact Fisher of the same batch gives; the divergence is the mean over the
    training images of KL(w || w + eps).
    """
    images, labels = data
    rho = {"relative": 0.4, "absolute": 0.015}[form]
    draws = jax.random.split(jax.random.key(5), draws)

    @partial(jax.jit, static_argnames="stage")
    def at(stage):
        params = train("base", stage, 0, images, labels, 0.0, 0.05)

        def compared(key):
            rows = jax.random.randint(key, (BATCH,), 0, len(labels))
            batch = images[rows], labels[rows]
            grads = jax.grad(LOSS)(params, batch)

            def eps_of(name):
                ball = methods.fisher(ESTIMATORS[name](key), form, rho)
                return ball.update(grads, ball.init(params), params, batch=batch)[0]

            eps, exact = eps_of(name), eps_of("exact")
            length = optax.tree.norm(eps)
            cosine = optax.tree.vdot(eps, exact) / (length * optax.tree.norm(exact))
            kl = fsam.kl_divergence(LOSS, params, eps, (images, labels))
            return {"cosine": cosine, "kl": kl, "length": length}

        return jax.tree.map(jnp.mean, jax.vmap(compared)(draws))

    return [{"steps": stage, **at(stage)} for stage in stages]


def draw(results, directions, path):
    """Draws accuracies, and the cosines along training."""
    fig, axes = show.figure(
        *(1, len(results) + 1, "No Fisher leads throughout; its form matters as much"),
        figsize=(4.2 * (len(results) + 1), 4.6),
    )
    for ax, (noise, found) in zip(axes[0], results.items(), strict=False):
        rows = list(found.items())[::-1]
        for i, (method, facts) in enumerate(rows):
            mean, error = show.mean_and_error(facts["accuracy"], 100)
            color = show.GREEN if "relative" in method else show.PURPLE
            if method in ("base", "SAM"):
                color = show.LOOKS[method][0]
            ax.errorbar(mean, i, xerr=error, fmt="o", color=color)
        ax.set_yticks(range(len(rows)), [m for m, _ in rows] if not noise else [])
        ax.set_xlabel("test accuracy, %")
        ax.set_title(f"{100 * noise:.0f} % of the labels wrong")
    ax = axes[0, -1]
    colors = show.GREEN, show.VERMILLION, show.PURPLE, show.BLUE, show.SKY, show.BLACK
    for (name, by_form), color in zip(directions.items(), colors, strict=False):
        if name != "exact":  # The others are compared with it.
            found = by_form["relative"]
            stages = [max(f["steps"], 10) for f in found]
            cosines = [f["cosine"] for f in found]
            ax.plot(stages, cosines, "o-", ms=3, color=color, label=name)
    ax.set(xscale="log", xlabel="steps trained for (leftmost: none)")
    ax.set_title("relative: cosine with eps of the exact F")
    ax.legend(fontsize=8)
    show.save(fig, path)


def print_tables(results, directions):
    for noise, found in results.items():
        base, sam = found["base"]["accuracy"], found["SAM"]["accuracy"]
        columns = {  # Differences on the same seeds, so that what they share cancels.
            "method": lambda method, _: method,
            "rate": lambda _, f: f"{f['rate']:.2g}",
            "rho": lambda _, f: f"{f['rho']:g}",
            "accuracy, %": lambda _, f: show.percent(f["accuracy"]),
            "over base": lambda _, f, base=base: show.over(f["accuracy"], base),
            "over SAM": lambda _, f, sam=sam: show.over(f["accuracy"], sam),
        }
        title = f"{noise:.0%} of the labels wrong: test accuracy, %"
        show.report(title, found, columns, "Mean ± standard error.")
    for form in RADII:
        rows = [
            [
                name,
                *(f"{f['cosine']:.2f}" for f in of[form]),
                f"{of[form][-1]['kl']:.1e}",
            ]
            for name, of in directions.items()
        ]
        stages = [f["steps"] for f in next(iter(directions.values()))[form]]
        headings = ["F", *(f"cosine,\n{stage} steps" for stage in stages)]
        headings.append(f"KL,\n{stages[-1]} steps")
        show.table(f"eps beside that of the exact F, {form} form", headings, rows)


@harness.experiment(
    smoke={
        **{"estimators": ["squared gradient", "exact"], "noise": [0.0]},
        **{"gradients": 6, "seeds": 2, "tuning_seeds": 1},
    },
    methods={"default": ["base", "SAM"], "choices": methods.METHODS},
    estimators={"default": list(ESTIMATORS), "choices": ESTIMATORS},
    noise=[0.0, 0.4],
    gradients={"default": 800, "help": "of one training"},
    seeds=20,
    tuning_seeds=4,
)
def main(run: harness.Run) -> None:
    options = run.options
    (x, y), (others, labels) = perceptron.split(datasets.load("digits"))
    order = np.random.default_rng(0).permutation(len(y) + len(labels))
    x, y = np.concatenate([x, others])[order], np.concatenate([y, labels])[order]
    x, data = jnp.asarray(x), (jnp.asarray(x[:300]), jnp.asarray(y[:300]))
    sets = {
        "data": (x[:300], y[:300]),
        "held": (x[300:1000], y[300:1000]),
        "test": (x[1000:], jnp.asarray(y[1000:])),
    }
    settings, seeds = run.take("gradients seeds tuning_seeds"), "seeds tuning_seeds"
    named = [f"{name}, {form}" for form in RADII for name in options.estimators]
    results = {noise: {} for noise in options.noise}
    for noise, found in results.items():
        compare = partial(perceptron.compare, **sets, noise=noise, **run.take(seeds))
        for method in (*options.methods, *named):
            offered = points(method)
            key = {"method": method, "noise": noise, "points": offered, **settings}
            args = compare, partial(train, method, options.gradients), offered
            found[method] = run.cell(*args, **key)
    stages = STAGES[:1] if options.smoke else STAGES
    directions = {name: {} for name in options.estimators}
    for name, found in directions.items():
        for form in RADII:
            settings = {"part": "direction", "estimator": name, "form": form}
            args = direction, name, form, data, stages, 50
            found[form] = run.cell(*args, **settings, draws=50)
    print_tables(results, directions)
    draw(results, directions, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

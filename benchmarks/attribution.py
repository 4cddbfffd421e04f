"""Question: does a Fisher diagonal find wrong labels, and predict what examples do?

Self-influence g_n^T (F + damping)^-1 g_n of each training digit, a tenth of which have
a wrong label: do the wrong ones stand out more than by their loss or by |g_n|^2? Then
networks are trained anew on random halves of the digits: does the sum of influences
g_test^T (F + damping)^-1 g_n over a half tell the loss on a test digit there? F is the
exact diagonal, the empirical one, the whole matrix, or none. The damping of each is
chosen on other seeds from the same grid.

    python benchmarks/attribution.py
"""

import sys
from functools import partial
from typing import Any

import datasets
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
import show
from jax.flatten_util import ravel_pytree

import fsam_optax as fsam


HIDDEN = (16,)
SIZE, TESTS, BATCH = 300, 100, 50
DAMPINGS = np.geomspace(1e-5, 100, 8)  # times the mean of the diagonal
PRECONDITIONERS = ("identity", "exact F", "empirical F", "whole F")
LOOKS = {
    "loss": (show.BLACK, "-", "o"),
    "identity": (show.BLUE, "--", "s"),
    "exact F": (show.GREEN, "-", "^"),
    "empirical F": (show.VERMILLION, "-.", "D"),
    "whole F": (show.PURPLE, ":", "v"),
}


def train(key, x, y, kept, steps) -> Any:
    """Returns parameters after `steps`, on the examples that are kept."""
    params = perceptron.initial(key, (x.shape[1], *HIDDEN, 10))
    loss = fsam.negative_log_likelihood(perceptron.apply, fsam.categorical)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, steps))
    optimizer = optax.chain(optax.add_decayed_weights(1e-3), optimizer)
    batch = x, y, kept.astype(float)
    every = jnp.arange(steps)
    return perceptron.minimise(lambda w, _: loss(w, batch), params, optimizer, every)


def gradients(params, x, y):
    """Returns the gradient of each example, as rows, and its loss."""
    w, unravel = ravel_pytree(params)

    def loss(w, x, y):
        return perceptron.LOSS(unravel(w), (x[None], y[None]))

    losses, rows = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(w, x, y)
    return rows, losses


def influences(params, batch, others, kept=None):
    """Returns g_m^T (F + damping)^-1 g_n, (kinds, dampings, others, examples)."""
    x, y = batch
    rows, _ = gradients(params, x, y)
    columns, _ = gradients(params, *others)
    exact = fsam.diagonal(fsam.fisher_exact(perceptron.LOSS), params, batch)
    diagonals = {
        "identity": jnp.ones(rows.shape[1]),
        "exact F": ravel_pytree(exact)[0],
        "empirical F": jnp.mean(rows**2, 0),
    }
    found = {}
    for name, f in diagonals.items():
        scale = jnp.array(DAMPINGS) * jnp.mean(f)
        found[name] = jax.lax.map(
            lambda d, f=f: (columns / (f + d)[None]) @ rows.T, scale
        )
    # The whole matrix by its eigenvectors.
    whole = fsam.dense_fisher(perceptron.LOSS, params, batch)
    values, vectors = jnp.linalg.eigh(whole)
    a, b = columns @ vectors, rows @ vectors
    scale = jnp.array(DAMPINGS) * jnp.trace(whole) / len(whole)
    values = jnp.maximum(values, 0)
    found["whole F"] = jax.lax.map(lambda d: (a / (values + d)[None]) @ b.T, scale)
    return found


def ranks(values):
    return jnp.argsort(jnp.argsort(values, -1), -1).astype(float)


def detection(scores, wrong):
    """Returns the area under the ROC curve, and the share of wrong among the first k.

    k is the number of the wrong. Ties count as they come.
    """
    k = jnp.sum(wrong)
    above = jnp.sum(ranks(scores) * wrong[None], -1) - k * (k - 1) / 2
    # As many first scores as there are wrong labels.
    first = ranks(-scores) < k
    return {
        "area": above / (k * (wrong.size - k)),
        "precision": jnp.sum(first & wrong[None], -1) / k,
    }


def correlation(predicted, losses):
    """Returns the mean over test digits of Spearman's correlation: last axis halves."""
    a, b = (
        r - jnp.mean(r, -1, keepdims=True) for r in (ranks(predicted), ranks(losses))
    )
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.mean(jnp.sum(a * b, -1) / norms, -1)


@partial(jax.jit, static_argnums=(3,))
def find(key, batch, wrong, steps):
    """Returns how well wrong labels are found after so many steps."""
    x, y = batch
    params = train(key, x, y, jnp.ones(len(y)), steps)
    _, losses = gradients(params, x, y)
    found = influences(params, batch, batch)
    own = {k: jnp.diagonal(v, axis1=1, axis2=2) for k, v in found.items()}
    scores = {"loss": jnp.stack([losses] * len(DAMPINGS)), **own}
    judged = {k: detection(v, wrong) for k, v in scores.items()}
    right = jnp.mean(jnp.argmax(perceptron.apply(params, x), -1) == y)
    return judged | {"fitted": right}


@partial(jax.jit, static_argnums=(4,))
def predict(key, batch, test, halves, steps):
    """Returns how well influences tell the losses of networks trained on halves."""
    x, y = batch
    params = train(key, x, y, jnp.ones(len(y)), steps)
    found = influences(params, batch, test)

    def loss_of(kept):
        return gradients(train(key, x, y, kept, steps), *test)[1]

    losses = jax.vmap(loss_of)(halves).T
    return {k: correlation(-v @ halves.T, losses[None]) for k, v in found.items()}


def compute(part, seed, options, steps):
    """Returns the facts of one seed."""
    digits = datasets.load("digits")
    random = np.random.default_rng(seed)
    order = random.permutation(len(digits.train_labels))[: SIZE + TESTS]
    x = datasets.flat(digits.train_images[order])
    y = digits.train_labels[order]
    batch, test = (x[:SIZE], y[:SIZE]), (x[SIZE:], y[SIZE:])
    key = jax.random.key(seed)
    if part == "wrong labels":
        labels = perceptron.noisy_labels(batch[1], options.noise, seed)
        return find(key, (batch[0], labels), labels != batch[1], steps)
    halves = np.argsort(random.random((options.halves, SIZE)), 1) < SIZE // 2
    return predict(key, batch, test, halves.astype(np.float32), steps)


def chosen(tuning, final, what):
    """Returns the values at the damping that is best on the tuning seeds."""
    scores = np.mean([what(facts) for facts in tuning], 0)
    at = int(np.argmax(scores))
    return np.array([what(facts)[at] for facts in final]), at


def experiment(run: harness.Run) -> None:
    """Runs what the results do not hold yet, prints the tables and draws the figure."""
    options = run.options
    results = {}
    early, late = options.steps
    for part, steps in (
        ("wrong labels", early),
        ("wrong labels", late),
        ("halves", late),
    ):
        settings = {"part": part, "steps": steps}
        settings |= {"halves": options.halves} if part == "halves" else {}
        settings |= {"noise": options.noise} if part == "wrong labels" else {}
        results[part, steps] = [
            [
                run.cell(
                    partial(compute, part, seed, options, steps), seed=seed, **settings
                )
                for seed in seeds
            ]
            for seeds in (1000 + np.arange(options.tuning_seeds), range(options.seeds))
        ]
    for (part, steps), (tuning, final) in results.items():
        rows = []
        if part == "wrong labels":
            title = f"Wrong labels after {steps} steps"
            fitted = show.cell([facts["fitted"] for facts in final], ".0f", 100)
            title += f"; {fitted} % of all labels fitted"
            headings = ["score", "area, %", "over\nloss", "precision, %", "damping"]
            base = chosen(tuning, final, lambda f: f["loss"]["area"])[0]
            for name in LOOKS:
                area, at = chosen(tuning, final, lambda f, n=name: f[n]["area"])
                precision = [facts[name]["precision"][at] for facts in final]
                rows.append(
                    [
                        name,
                        show.cell(area, ".1f", 100),
                        show.cell(area - base, "+.1f", 100),
                        show.cell(precision, ".1f", 100),
                        damping(name, at),
                    ]
                )
        else:
            title = "Rank correlation with the loss after training on halves"
            headings = ["influence by", "correlation", "over\nidentity", "damping"]
            base = chosen(tuning, final, lambda f: f["identity"])[0]
            for name in PRECONDITIONERS:
                found, at = chosen(tuning, final, lambda f, n=name: f[n])
                rows.append(
                    [
                        name,
                        show.cell(found, ".3f"),
                        show.cell(found - base, "+.3f"),
                        damping(name, at),
                    ]
                )
        show.table(title, headings, rows, CAPTION)
    draw(results, run.picture())


CAPTION = (
    "Mean ± standard error, differences on the same seeds. Damping: times the mean of\n"
    "the diagonal, best on other seeds; * an edge of the grid."
)


def damping(name, at):
    if name in ("loss", "identity"):
        return "-"
    return f"{DAMPINGS[at]:.0e}" + "*" * (at in (0, len(DAMPINGS) - 1))


def draw(results, path):
    """Draws the area and the correlation against the damping."""
    fig, axes = show.figure(1, 3, headline(results), figsize=(13, 4.2))
    for ax, ((part, steps), (_, final)) in zip(axes[0], results.items(), strict=True):
        for name, (color, line, marker) in LOOKS.items():
            if part == "halves" and name == "loss":
                continue
            values = [f[name]["area"] if part != "halves" else f[name] for f in final]
            means, errors = zip(
                *map(show.mean_and_error, zip(*values, strict=True)), strict=True
            )
            style = {"color": color, "linestyle": line, "marker": marker, "ms": 4}
            ax.errorbar(DAMPINGS, means, errors, label=name, **style)
        ax.set_xscale("log")
        ax.set_xlabel("damping, times the mean of the diagonal")
        ax.set_title(
            "correlation with networks trained anew on halves"
            if part == "halves"
            else f"area under ROC of wrong labels, {steps} steps"
        )
    axes[0, 0].legend(fontsize=8)
    show.save(fig, path)


def headline(results):
    """Returns what the picture shows."""
    parts = []
    for (part, steps), (tuning, final) in results.items():
        if part == "halves":
            values = {
                n: chosen(tuning, final, lambda f, n=n: f[n])[0]
                for n in PRECONDITIONERS
            }
            best = max(values, key=lambda n: values[n].mean())
            parts.append(f"of influence: {best}")
        else:
            values = {
                n: chosen(tuning, final, lambda f, n=n: f[n]["area"])[0] for n in LOOKS
            }
            best = max(values, key=lambda n: values[n].mean())
            parts.append(f"at {steps} steps: {best}")
    return "Best score " + ", ".join(parts)


main = harness.script(
    *(__doc__, experiment),
    smoke={"seeds": 2, "tuning_seeds": 1, "steps": [2, 3], "halves": 4},
    seeds=8,
    tuning_seeds=2,
    noise={"default": 0.1, "help": "share of wrong labels"},
    steps={"default": [60, 400], "nargs": 2, "help": "early and late"},
    halves={"default": 40, "help": "trained anew"},
)


if __name__ == "__main__":
    sys.exit(main())

"""Question: does a Fisher diagonal find wrong labels, and predict what examples do?

Self-influence g_n^T (F + damping)^-1 g_n of each training digit, a tenth of which have
a wrong label: do the wrong ones stand out more than by their loss or by |g_n|^2? Then
networks are trained anew on random halves of the digits: does the sum of influences
g_test^T (F + damping)^-1 g_n over a half tell the loss on a test digit there? F is the
exact diagonal, the empirical one, the whole matrix, or none. The damping of each is
chosen on other seeds from the same grid.

    python benchmarks/attribution.py
"""

from functools import partial
from typing import Any

import datasets
import harness
import jax
import jax.numpy as jnp
import numpy as np
import perceptron
import show
from jax.flatten_util import ravel_pytree

import fsam_optax as fsam


HIDDEN = (16,)
SIZE, TESTS = 300, 100
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
    batch = x, y, kept.astype(float)
    return perceptron.fit(perceptron.LOSS, params, batch, steps, 1e-3)


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


def compute(seed, part, options, steps):
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


def chosen(tuning, final, *keys):
    """Returns the values at the damping that is best on the tuning seeds, and where."""

    def value(facts):
        for key in keys:
            facts = facts[key]
        return facts

    at = int(np.argmax(np.mean([value(facts) for facts in tuning], 0)))
    return np.array([value(facts)[at] for facts in final]), at


def damping(name, at):
    if name in ("loss", "identity"):
        return "-"
    return f"{DAMPINGS[at]:.0e}" + show.edge(at, DAMPINGS)


def wrong_labels(steps, tuning, final):
    """Prints how well each score finds the wrong labels."""
    fitted = show.cell([facts["fitted"] for facts in final], ".0f", 100)
    best = {name: chosen(tuning, final, name, "area") for name in LOOKS}
    precision = {
        n: [f[n]["precision"][at] for f in final] for n, (_, at) in best.items()
    }
    columns = {
        "score": lambda name, _: name,
        "area, %": lambda _, of: show.percent(of[0]),
        "over\nloss": lambda _, of: show.over(of[0], best["loss"][0]),
        "precision, %": lambda name, _: show.percent(precision[name]),
        "damping": lambda name, of: damping(name, of[1]),
    }
    title = f"Wrong labels after {steps} steps; {fitted} % of all labels fitted"
    show.report(title, best, columns, CAPTION)
    return f"at {steps} steps", best


def on_halves(steps, tuning, final):
    """Prints how well each influence foretells the loss."""
    best = {name: chosen(tuning, final, name) for name in PRECONDITIONERS}
    base = best["identity"][0]
    columns = {
        "influence by": lambda name, _: name,
        "correlation": lambda _, of: show.cell(of[0], ".3f"),
        "over\nidentity": lambda _, of: show.over(of[0], base, "+.3f", 1),
        "damping": lambda name, of: damping(name, of[1]),
    }
    title = "Rank correlation with the loss after training on halves"
    show.report(title, best, columns, CAPTION)
    return "of influence", best


CAPTION = (
    "Mean ± standard error, differences on the same seeds. Damping: times the mean of\n"
    "the diagonal, best on other seeds; * an edge of the grid."
)


def draw(results, headline, path):
    """Draws the area and the correlation against the damping."""
    fig, axes = show.figure(1, 3, headline, figsize=(13, 4.2))
    for ax, ((part, steps), (_, final)) in zip(axes[0], results.items(), strict=True):
        for name, (color, line, marker) in LOOKS.items():
            if part == "halves" and name == "loss":
                continue
            values = [f[name] if part == "halves" else f[name]["area"] for f in final]
            style = {"color": color, "linestyle": line, "marker": marker, "ms": 4}
            show.errors(ax, DAMPINGS, np.transpose(values), label=name, **style)
        ax.set(xscale="log", xlabel="damping, times the mean of the diagonal")
        title = f"area under ROC of wrong labels, {steps} steps"
        if part == "halves":
            title = "correlation with networks trained anew on halves"
        ax.set_title(title)
    axes[0, 0].legend(fontsize=8)
    show.save(fig, path)


@harness.experiment(
    smoke={"seeds": 2, "tuning_seeds": 1, "steps": [2, 3], "halves": 4},
    seeds=8,
    tuning_seeds=2,
    noise={"default": 0.1, "help": "share of wrong labels"},
    steps={"default": [60, 400], "nargs": 2, "help": "early and late"},
    halves={"default": 40, "help": "trained anew"},
)
def main(run: harness.Run) -> None:
    options, results, leaders = run.options, {}, []
    every = 1000 + np.arange(options.tuning_seeds), np.arange(options.seeds)
    early, late = options.steps
    for part, steps, names, report in (
        ("wrong labels", early, "noise", wrong_labels),
        ("wrong labels", late, "noise", wrong_labels),
        ("halves", late, "halves", on_halves),
    ):
        settings = {"part": part, "steps": steps, **run.take(names)}
        tuning, final = results[part, steps] = [
            list(
                run.each(
                    "seed", seeds, compute, part, options, steps, **settings
                ).values()
            )
            for seeds in every
        ]
        where, best = report(steps, tuning, final)
        leaders.append(f"{where}: {max(best, key=lambda name: best[name][0].mean())}")
    draw(results, "Best score " + ", ".join(leaders), run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

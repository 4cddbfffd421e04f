"""Question: does a Fisher diagonal find wrong labels, and predict what examples do?

Self-influence g_n^T (F + damping)^-1 g_n of each training digit, a tenth of which have
a wrong label: do the wrong ones stand out more than by their loss or by |g_n|^2? Then
networks are trained anew on random halves of the digits: does the sum of influences
g_test^T (F + damping)^-1 g_n over a half tell the loss on a test digit there? F is the
exact diagonal, the empirical one, the whole matrix, or none. The damping of each is
chosen on other seeds from the same grid.

    python docs/recipes/attribution.py
"""

import pathlib
import sys
from functools import partial


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import datasets
import harness
import jax
import jax.numpy as jnp
import numpy as np
import perceptron
import show
from jax.flatten_util import ravel_pytree
from sklearn.metrics import roc_auc_score

import fsam_optax as fsam


WRONG, HALVES = "wrong labels", "halves"
DAMPINGS = np.geomspace(1e-5, 100, 8)  # times the mean of the diagonal
NAMES = ("loss", "identity", "exact F", "empirical F", "whole F")


@partial(jax.jit, static_argnums=4)
def train(key, x, y, kept, steps):
    """Returns parameters after `steps`, on the examples that are kept."""
    params = perceptron.initial(key, (x.shape[1], 16, 10))
    return perceptron.fit(perceptron.LOSS, params, (x, y, kept), steps, 1e-3)


@jax.jit
def gradients(params, x, y):
    """Returns the loss of each example, and its gradient, as rows."""
    w, unravel = ravel_pytree(params)

    def loss(w, x, y):
        return perceptron.LOSS(unravel(w), (x[None], y[None]))

    return jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(w, x, y)


@jax.jit
def influences(params, data, others):
    """Returns g_m^T (F + damping)^-1 g_n by F, (dampings, others, examples)."""
    rows, columns = (gradients(params, *each)[1] for each in (data, others))
    exact = fsam.diagonal(fsam.fisher_exact(perceptron.LOSS), params, data)
    f, vectors = jnp.linalg.eigh(fsam.dense_fisher(perceptron.LOSS, params, data))

    def over(f, rows, columns):
        scale = jnp.array(DAMPINGS) * jnp.mean(f)
        return jax.lax.map(lambda d: (columns / (f + d)[None]) @ rows.T, scale)

    return {
        "identity": over(jnp.ones(rows.shape[1]), rows, columns),
        "exact F": over(ravel_pytree(exact)[0], rows, columns),
        "empirical F": over(jnp.mean(rows**2, 0), rows, columns),
        "whole F": over(jnp.maximum(f, 0), rows @ vectors, columns @ vectors),
    }


def correlation(predicted, losses):
    """Returns the mean over test digits of Spearman's correlation: last axis halves."""
    a, b = (np.argsort(np.argsort(x)) for x in (predicted, losses))
    a, b = (r - r.mean(-1, keepdims=True) for r in (a, b))
    return np.mean(np.sum(a * b, -1) / np.sqrt(np.sum(a**2, -1) * np.sum(b**2, -1)), -1)


def compute(seed, part, steps, options):
    """Returns how well each score of one seed does, by damping."""
    digits, random = datasets.load("digits"), np.random.default_rng(seed)
    order = random.permutation(len(digits.train_labels))[:400]
    x, y = datasets.flat(digits.train_images[order]), digits.train_labels[order]
    data, others, key = (x[:300], y[:300]), (x[300:], y[300:]), jax.random.key(seed)
    if part == WRONG:
        data = others = x[:300], perceptron.noisy_labels(y[:300], options.noise, seed)
    params = train(key, *data, jnp.ones(300), steps)
    found = jax.device_get(influences(params, data, others))
    if part == WRONG:
        own = {name: np.diagonal(of, axis1=1, axis2=2) for name, of in found.items()}
        own["loss"] = np.tile(gradients(params, *data)[0], (len(DAMPINGS), 1))
        wrong = data[1] != y[:300]
        return {n: {"area": [roc_auc_score(wrong, row) for row in own[n]]} for n in own}
    halves = np.argsort(random.random((options.halves, 300)), 1) < 150
    halves = halves.astype(np.float32)
    anew = jax.vmap(lambda kept: train(key, *data, kept, steps))(halves)
    losses = jax.vmap(lambda params: gradients(params, *others)[0])(anew).T
    return {n: correlation(-of @ halves.T, losses[None]) for n, of in found.items()}


def collect(run, seeds, part, steps, option):
    """Returns arrays of (seeds, dampings) by score."""
    key = {"part": part, "steps": steps, **run.take(option)}
    cells = run.each("seed", seeds, compute, part, steps, run.options, **key).values()
    if part == HALVES:
        return {name: np.array([cell[name] for cell in cells]) for name in NAMES[1:]}
    return {name: np.array([cell[name]["area"] for cell in cells]) for name in NAMES}


def damping(name, at):
    return f"{DAMPINGS[at]:.0e}{show.edge(at, DAMPINGS)}" if name in NAMES[2:] else "-"


def draw(results, leaders, path):
    """Draws each measure against the damping."""
    headline = f"Best score, from left to right: {', '.join(leaders)}"
    fig, (axes,) = show.figure(1, 3, headline, figsize=(13, 4.2))
    for axis, (title, found) in zip(axes, results.items(), strict=True):
        show.curves(axis, DAMPINGS, {name: of.T for name, of in found.items()}, ms=4)
        axis.set(xscale="log", xlabel="damping, times the mean of the diagonal")
        axis.set_title(f"{title}, %")
    axes[0].legend(fontsize=8)
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
    early, late = options.steps
    for part, steps, option, base, title in (
        (WRONG, early, "noise", "loss", f"Wrong labels, {early} steps: area under ROC"),
        (WRONG, late, "noise", "loss", f"Wrong labels, {late} steps: area under ROC"),
        (HALVES, late, HALVES, "identity", "Trained on halves: correlation with loss"),
    ):
        seeds = 1000 + np.arange(options.tuning_seeds), np.arange(options.seeds)
        tuning, final = (collect(run, some, part, steps, option) for some in seeds)
        at = {name: int(np.argmax(np.mean(of, 0))) for name, of in tuning.items()}
        best = {name: of[:, at[name]] for name, of in final.items()}
        rows = [
            [name, show.percent(of), show.over(of, best[base]), damping(name, at[name])]
            for name, of in best.items()
        ]
        headings = ["%", "mean ± s. e.", f"over {base}", "damping"]
        caption = (
            "Damping: of the mean of F, best on other seeds; * an edge of the grid."
        )
        show.table(title, headings, rows, caption)
        results[title] = final
        leaders.append([*best][np.argmax([of.mean() for of in best.values()])])
    draw(results, leaders, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: what is a diagonal Laplace posterior worth, and which Fisher does it need?

A network is trained, and a Gaussian of precision N F + tau is put around its weights,
with F the exact Fisher diagonal, the empirical one, or the squared gradient of batches
that much code takes for it. Predictions are those of the linearised model; beside them
the network alone, with a temperature (a noise, in regression) of its own. The numbers
are chosen by the marginal likelihood of the training data, or by held-out examples.

    python docs/recipes/laplace.py
"""

import itertools
import pathlib
import sys
from functools import partial


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import command_line
import datasets
import diagonals
import harness
import jax
import jax.numpy as jnp
import numpy as np
import perceptron
import show
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import norm

import fsam_optax as fsam


TAUS = np.geomspace(0.1, 1e5, 13)
# F, and what power of the noise it has: a score is (y - h) / noise^2, and only the
# expectation of its square is 1 / noise^2.
WAYS = {
    "network": (diagonals.EXACT, 2),
    "linearised, exact F": (diagonals.EXACT, 2),
    "linearised, empirical F": (diagonals.EMPIRICAL, 4),
    "linearised, squared F": (diagonals.squared(50), 4),
}
BY = "training data", "held-out"


@jax.jit
def linearise(params, x, y):
    """Returns labels, outputs (N, K) and their derivatives by the weights (N, K, P)."""
    w, unravel = ravel_pytree(params)

    def output(w, x):
        return perceptron.apply(unravel(w), x[None])[0]

    jacobian = jax.vmap(jax.jacrev(output), (None, 0))(w, x)
    return y, perceptron.apply(params, x), jacobian


def covariance(jacobian, precision):
    """Returns J diag(1 / precision) J^T of each example, shape (N, K, K)."""
    return jnp.einsum("nkp,nlp->nkl", jacobian / precision[None, None], jacobian)


def classes(net, precision, temperature, key, samples):
    """Returns log probabilities of the labels, and the expected calibration error."""
    y, f, jacobian = net
    c = covariance(jacobian, precision)
    floor = 1e-5 * jnp.trace(c, axis1=1, axis2=2)[:, None, None] + 1e-30
    root = jnp.linalg.cholesky(c + floor * jnp.eye(c.shape[1])[None])
    noise = jax.random.normal(key, (samples, c.shape[1]))
    logits = f[None] / temperature + jnp.einsum("nkl,sl->snk", root, noise)
    p = jnp.mean(jax.nn.softmax(logits), 0)
    sure, right = jnp.max(p, 1), jnp.argmax(p, 1) == y
    bins = jax.nn.one_hot(jnp.clip(sure * 10, 0, 9).astype(int), 10)
    off = jnp.sum(jnp.abs((right - sure) @ bins)) / len(y)
    return jnp.log(jnp.maximum(jnp.take_along_axis(p, y[:, None], 1), 1e-30)), off


def density(net, precision, noise, key, samples):
    """Returns log densities of the targets, and how far their ranks are off uniform."""
    del key, samples
    y, f, jacobian = net
    deviation = jnp.sqrt(jnp.squeeze(covariance(jacobian, precision), -1) + noise**2)
    levels = jnp.linspace(0.05, 0.95, 10)
    below = norm.cdf(y, f, deviation) <= levels[None]
    off = jnp.mean(jnp.abs(jnp.mean(below.astype(float), 0) - levels))
    return norm.logpdf(y, f, deviation), off


@partial(jax.jit, static_argnums=(0, 6))
def judged(predict, net, f, power, points, key, samples):
    """Returns mean loss and calibration at points (tau, temperature or noise)."""

    def at(point):
        precision = f / point[1] ** power + point[0]
        found, off = predict(net, precision, point[1], key, samples)
        return -jnp.mean(found), off

    return jax.lax.map(at, points)


def evidence(predict, net, w, f, power, points):
    """Returns log p(D | point) by Laplace's method; f is a sum over the examples."""
    nothing = jnp.full_like(f, jnp.inf), 0, points, jax.random.key(0), 1
    fitted = -len(net[0]) * judged(predict, net, *nothing)[0]
    tau, scale = points.T
    precision = f[None] / scale[:, None] ** power + tau[:, None]
    volume = jnp.sum(jnp.log(precision), 1) - len(w) * jnp.log(tau)
    return fitted - (tau * jnp.sum(w**2) + volume) / 2


def read_digits(seed):
    """Returns 300 digits, 300 held out, 300 of other hands, and these shifted."""
    found = datasets.load("digits")
    order = np.random.default_rng(seed).permutation(len(found.train_labels))
    other = np.random.default_rng(seed).permutation(len(found.test_labels))[:300]
    x, y = datasets.flat(found.train_images[order]), found.train_labels[order]
    test, labels = found.test_images[other], found.test_labels[other]
    shifted = datasets.flat(np.roll(test, 1, axis=2)), labels
    tests = {"digits": (datasets.flat(test), labels), "digits, shifted": shifted}
    return {"train": (x[:300], y[:300]), "held": (x[300:600], y[300:600]), **tests}


def read_diabetes(seed):
    """Returns 150 patients, 146 held out and 146 others, in deviations of the first."""
    import sklearn.datasets

    x, y = sklearn.datasets.load_diabetes(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    x, y = np.asarray(x)[order], np.asarray(y)[order, None]
    x, y = ((a - a[:150].mean(0)) / a[:150].std(0) for a in (x, y))
    ends = {"train": slice(150), "held": slice(150, 296), "diabetes": slice(296, None)}
    return {k: (np.float32(x[at]), np.float32(y[at])) for k, at in ends.items()}


# Data, what predicts, and temperatures, or noises in deviations of the target.
TASKS = {
    "digits": (read_digits, fsam.categorical, 10, classes, np.geomspace(0.3, 10, 13)),
    "diabetes": (read_diabetes, fsam.gaussian(), 1, density, np.geomspace(0.3, 2, 13)),
}


def compute(decay, name, seed, options):
    """Trains a network and judges what is predicted with it."""
    read, likelihood, outputs, predict, scales = TASKS[name]
    data, key, found = read(seed), jax.random.key(seed), {}
    x, y = data["train"]
    nll = fsam.negative_log_likelihood(perceptron.apply, likelihood)
    params = perceptron.initial(key, (x.shape[1], 16, outputs))
    fit = jax.jit(partial(perceptron.fit, nll), static_argnums=2)
    params = fit(params, (x, y), options.steps, decay / len(x))
    w, _ = ravel_pytree(params)
    nets = {part: linearise(params, *pair) for part, pair in data.items()}
    train, held = nets.pop("train"), nets.pop("held")
    alone = np.array([*itertools.product([1.0], scales)])
    grid = np.array([*itertools.product(TAUS, scales if outputs == 1 else [1.0])])
    for way, (which, power) in WAYS.items():
        f = jax.jit(partial(diagonals.diagonal, which, nll))(params, (x, y))
        f, power = len(x) * ravel_pytree(f)[0], power * (outputs == 1)
        evidences, points = evidence(predict, train, w, f, power, grid), grid
        known = grid[np.argmax(evidences)]
        if way == "network":
            f, power, points, known = jnp.full_like(f, jnp.inf), 0, alone, np.ones(2)
            if outputs == 1:  # The noise of greatest likelihood.
                known[1] = np.sqrt(np.mean((y - train[1]) ** 2))
        losses, _ = judged(predict, held, f, power, points, key, options.samples)
        best = np.nanargmin(losses)
        scores = np.max(evidences), -losses[best]
        for by, point, score in zip(BY, (known, points[best]), scores, strict=True):
            for part, net in nets.items():
                args = net, f, power, point[None], key, options.samples
                (loss,), (off,) = judged(predict, *args)
                facts = {"loss": loss, "off": off, "point": point, "score": score}
                found[f"{part}; {way}; {by}"] = facts
    return found


def of(what, facts):
    return np.array([fact[what] for fact in facts])


def report(title, found):
    """Prints what each way is worth, beside the tempered network."""
    loss, base = partial(of, "loss"), of("loss", found["network; held-out"])
    columns = {
        "predictive": lambda row, _: row.replace("; held-out", " *").split(";")[0],
        "loss": lambda _, facts: show.cell(loss(facts), ".3f"),
        "over the\nnetwork": lambda _, facts: show.over(loss(facts), base, "+.3f", 1),
        "off, %": lambda _, facts: show.percent(of("off", facts)),
        "tau": lambda _, facts: f"{np.median(of('point', facts)[:, 0]):.2g}",
    }
    caption = "Nats an example, mean ± standard error; * by held-out examples. Off:\n"
    caption += "the expected calibration error, or distance from uniform. tau: median."
    show.report(title, found, columns, caption)


def draw(results, path):
    """Draws the loss of each way over that of the network with held-out examples."""
    title = "Laplace by the evidence: a gain on shifted digits alone"
    fig, axes = show.figure(1, len(results), title, figsize=(11, 4.2), sharey=False)
    for axis, (name, found) in zip(axes[0], results.items(), strict=True):
        base = of("loss", found["network; held-out"])
        for by, color in zip(BY, (show.GREEN, show.GREY), strict=True):
            losses = [of("loss", found[f"{way}; {by}"]) - base for way in WAYS]
            errors = partial(show.errors, axis, range(len(WAYS)), losses)
            errors(fmt="o", color=color, label=f"chosen by {by}")
        axis.axhline(0, color=show.BLACK, lw=1)
        names = [way.removeprefix("linearised, ") for way in WAYS]
        axis.set_xticks(range(len(WAYS)), names)
        axis.set_title(f"{name}: loss over the network's")
    axes[0][0].legend(fontsize=8)
    show.save(fig, path)


@harness.experiment(
    smoke={"seeds": 2, "samples": 4, "steps": 3, "decay": [1.0]},
    seeds=6,
    samples={"default": 100, "help": "of outputs"},
    steps=1000,
    decay={"default": [0.1, 1.0, 10.0], "type": command_line.positive},
)
def main(run: harness.Run) -> None:
    options, results = run.options, {}
    for name, seed in itertools.product(TASKS, range(options.seeds)):
        key = {"data": name, "seed": seed, **run.take("samples steps")}
        cells = run.each("decay", options.decay, compute, name, seed, options, **key)
        for at in next(iter(cells.values())):
            title, row = at.split("; ", 1)
            # The decay of the training is chosen as tau is.
            best = max((cell[at] for cell in cells.values()), key=lambda f: f["score"])
            results.setdefault(title, {}).setdefault(row, []).append(best)
    for title, found in results.items():
        report(title, found)
    draw(results, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

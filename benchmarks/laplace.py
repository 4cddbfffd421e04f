"""Question: what is a diagonal Laplace posterior worth, and which Fisher does it need?

A network is trained, and a Gaussian of precision N F + tau is put around its weights.
F is the exact Fisher diagonal, the empirical one, or the squared gradient of batches
that much code takes for it. Predictions are those of the linearised model, or of drawn
weights; beside them the network alone, and with a temperature (a noise, in regression)
of its own. The one number that each has is chosen by the marginal likelihood of the
training data, or by as many held-out examples for all.

    python benchmarks/laplace.py
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm

import fsam_optax as fsam


HIDDEN = (16,)
TAUS = np.geomspace(0.1, 1e5, 13)
TEMPERATURES = np.geomspace(0.3, 10, 13)
NOISES = np.geomspace(0.3, 2, 13)  # in deviations of the target
LEVELS = np.linspace(0.05, 0.95, 10)
FISHERS = {
    "exact": diagonals.EXACT,
    "empirical": diagonals.EMPIRICAL,
    "squared": diagonals.squared(50),
}
WAYS = {
    "network": ("network", "exact"),
    **{f"linearised, {name} F": ("linearised", name) for name in FISHERS},
    "drawn weights, exact F": ("drawn", "exact"),
    "linearised, whole F": ("linearised", "whole"),
}


class Net(NamedTuple):
    """A trained network on a part of the data.

    Attributes:
        w: Its weights as one vector, shape (P,).
        x, y: The examples.
        f: Its outputs, shape (N, K).
        jacobian: Their derivatives by the weights, shape (N, K, P).
    """

    w: Any
    x: Any
    y: Any
    f: Any
    jacobian: Any

    def at(self, w):
        """Returns the outputs at other weights."""
        sizes = self.x.shape[1], *HIDDEN, self.f.shape[1]
        params = perceptron.initial(jax.random.key(0), sizes)
        return perceptron.apply(ravel_pytree(params)[1](w), self.x)


@partial(jax.jit, static_argnums=(2, 3))
def fit(key, data, task, steps, decay):
    """Returns the weights of the least mean loss + decay / (2 N) |w|^2."""
    x, _ = data
    loss = fsam.negative_log_likelihood(perceptron.apply, task.likelihood)
    params = perceptron.initial(key, (x.shape[1], *HIDDEN, task.outputs))
    return perceptron.fit(loss, params, data, steps, decay / len(x))


@partial(jax.jit, static_argnums=(0, 1))
def fisher(kind, likelihood, params, data):
    """Returns a diagonal as one vector: a mean over the labels."""
    loss = fsam.negative_log_likelihood(perceptron.apply, likelihood)
    return ravel_pytree(diagonals.diagonal(FISHERS[kind], loss, params, data))[0]


@jax.jit
def linearise(params, data):
    """Returns a network on a part of the data."""
    w, unravel = ravel_pytree(params)

    def output(w, x):
        return perceptron.apply(unravel(w), x[None])[0]

    f = perceptron.apply(params, data[0])
    x, y = data
    return Net(w, x, y, f, jax.vmap(jax.jacrev(output), (None, 0))(w, data[0]))


@partial(jax.jit, static_argnums=0)
def eigen(likelihood, params, data):
    """Returns eigenvalues and vectors of the whole Fisher matrix."""
    loss = fsam.negative_log_likelihood(perceptron.apply, likelihood)
    values, vectors = jnp.linalg.eigh(fsam.dense_fisher(loss, params, data))
    return jnp.maximum(values, 0), vectors


@jax.jit
def turned(net, vectors):
    """Returns the network with its weights counted along other axes."""
    jacobian = jnp.einsum("nkp,pq->nkq", net.jacobian, vectors)
    return net._replace(jacobian=jacobian)


def log_evidence(log_likelihood, w, curvature, tau):
    """Returns log p(D | tau) by Laplace's method, for a diagonal `curvature` N F."""
    fitted = log_likelihood - tau / 2 * jnp.sum(w**2) + w.size / 2 * jnp.log(tau)
    return fitted - jnp.sum(jnp.log(curvature + tau)) / 2


def covariance(jacobian, precision):
    """Returns J diag(1 / precision) J^T of each example: (N, K, P) to (N, K, K)."""
    return jnp.einsum("nkp,nlp->nkl", jacobian / precision[None, None], jacobian)


def draws(net, precision, key, samples):
    """Returns the outputs with drawn weights, shape (S, N, K)."""
    noise = jax.random.normal(key, (samples, net.w.size))
    return jax.vmap(net.at)(net.w[None] + noise / jnp.sqrt(precision)[None])


# The two tasks. A point is (tau, temperature) or (tau, noise); `unit` is N F, in
# regression at a noise of 1.


def classes(way, net, unit, point, key, samples):
    """Returns the probabilities of the classes."""
    precision = unit["F"] + point[0]
    if way == "network":
        return jax.nn.softmax(net.f / point[1])
    if way == "drawn":
        return jnp.mean(jax.nn.softmax(draws(net, precision, key, samples)), 0)
    c = covariance(net.jacobian, precision)
    floor = 1e-5 * jnp.trace(c, axis1=1, axis2=2)[:, None, None]
    root = jnp.linalg.cholesky(c + floor * jnp.eye(c.shape[1])[None])
    noise = jax.random.normal(key, (samples, c.shape[1]))
    logits = net.f[None] + jnp.einsum("nkl,sl->snk", root, noise)
    return jnp.mean(jax.nn.softmax(logits), 0)


def judge_classes(p, y):
    """Returns loss, expected calibration error, and sums over bins of confidence."""
    sure, right = jnp.max(p, 1), (jnp.argmax(p, 1) == y).astype(float)
    bins = jax.nn.one_hot(jnp.clip(sure * 10, 0, 9).astype(int), 10)
    count, hits, sums = bins.sum(0), right @ bins, sure @ bins
    likelihood = jnp.take_along_axis(p, y[:, None], 1)
    return {
        "loss": -jnp.mean(jnp.log(jnp.maximum(likelihood, 1e-30))),
        "off": jnp.sum(jnp.abs(hits - sums)) / len(y),
        "curve": jnp.stack([count, sums, hits]),
    }


def evidence_of_classes(net, unit, point):
    fitted = jnp.sum(fsam.categorical.log_prob(net.f, net.y))
    return log_evidence(fitted, net.w, unit["F"], point[0])


def curvature_at(unit, noise):
    # A score is (y - h) / noise^2; only the expectation of its square is 1 / noise^2.
    return unit["F"] / noise ** unit["power"]


def density(way, net, unit, point, key, samples):
    """Returns log density and distribution function of the targets."""
    tau, noise = point
    precision = curvature_at(unit, noise) + tau
    means = net.f[None]
    if way == "drawn":
        means = draws(net, precision, key, samples)
    if way == "linearised":
        variance = jnp.squeeze(covariance(net.jacobian, precision), -1)
        noise = jnp.sqrt(variance + noise**2)[None]
    log_density = logsumexp(norm.logpdf(net.y[None], means, noise), 0)
    below = norm.cdf(net.y[None], means, noise)
    return log_density - jnp.log(len(means)), jnp.mean(below, 0)


def judge_density(found, y):
    """Returns loss, and how far the distribution function is from uniform."""
    del y
    log_density, below = found
    reached = jnp.mean((below <= LEVELS[None]).astype(float), 0)
    off = jnp.mean(jnp.abs(reached - LEVELS))
    return {"loss": -jnp.mean(log_density), "off": off, "curve": reached}


def evidence_of_density(net, unit, point):
    tau, noise = point
    fitted = jnp.sum(norm.logpdf(net.y, net.f, noise))
    return log_evidence(fitted, net.w, curvature_at(unit, noise), tau)


def read_digits(seed):
    """Returns 300 digits, 300 held out, 300 of other hands, and these shifted."""
    found = datasets.load("digits")
    order = np.random.default_rng(seed).permutation(len(found.train_labels))
    other = np.random.default_rng(seed).permutation(len(found.test_labels))[:300]
    rows = datasets.flat
    x, y = rows(found.train_images[order]), found.train_labels[order]
    test, labels = found.test_images[other], found.test_labels[other]
    return {
        "train": (x[:300], y[:300]),
        "held": (x[300:600], y[300:600]),
        "test": (rows(test), labels),
        "shifted": (rows(np.roll(test, 1, axis=2)), labels),
    }


def read_diabetes(seed):
    """Returns 150 patients, 146 held out and 146 others, in deviations of the first."""
    import sklearn.datasets

    x, y = sklearn.datasets.load_diabetes(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    x, y = np.asarray(x)[order], np.asarray(y)[order, None]
    x, y = ((a - a[:150].mean(0)) / a[:150].std(0) for a in (x, y))
    x, y = x.astype(np.float32), y.astype(np.float32)
    ends = {"train": slice(150), "held": slice(150, 296), "test": slice(296, None)}
    return {part: (x[rows], y[rows]) for part, rows in ends.items()}


class Task(NamedTuple):
    """Data, what predicts, what judges it, and the points to choose from."""

    read: Callable
    likelihood: Any
    outputs: int
    predict: Callable
    judge: Callable
    evidence: Callable
    grid: tuple
    alone: tuple


TASKS = {
    "digits": Task(
        *(read_digits, fsam.categorical, 10, classes, judge_classes),
        evidence_of_classes,
        tuple((tau, 1.0) for tau in TAUS.tolist()),
        tuple((1.0, t) for t in TEMPERATURES.tolist()),
    ),
    "diabetes": Task(
        *(read_diabetes, fsam.gaussian(), 1, density, judge_density),
        evidence_of_density,
        tuple((tau, s) for tau in TAUS.tolist() for s in NOISES.tolist()),
        tuple((1.0, s) for s in NOISES.tolist()),
    ),
}


@partial(jax.jit, static_argnums=(0, 1, 6))
def judged(task, way, net, unit, points, key, samples):
    """Returns what is to be known at each point."""
    predict = partial(task.predict, way, net, unit, key=key, samples=samples)
    return jax.lax.map(lambda point: task.judge(predict(point), net.y), points)


@partial(jax.jit, static_argnums=0)
def evidences(task, net, unit, points):
    return jax.lax.map(lambda point: task.evidence(net, unit, point), points)


def compute(task, seed, decay, options):
    """Trains a network and judges what is predicted with it."""
    key, data = jax.random.key(seed), task.read(seed)
    params = fit(key, data["train"], task, options.steps, decay)
    straight = {part: linearise(params, examples) for part, examples in data.items()}
    train, found = straight.pop("train"), {}
    judge = partial(judged, task)
    for name, (way, kind) in WAYS.items():
        nets = straight
        if kind == "whole":
            f, vectors = eigen(task.likelihood, params, data["train"])
            nets = {part: turned(net, vectors) for part, net in nets.items()}
        else:
            f = fisher(kind, task.likelihood, params, data["train"])
        unit = {"F": len(train.y) * f}
        unit["power"] = 4.0 if kind in ("empirical", "squared") else 2.0
        evidence = evidences(task, train, unit, np.array(task.grid))
        known = np.array(task.grid)[np.argmax(evidence)]
        points = np.array(task.grid)
        if way == "network":
            points, known = np.array(task.alone), np.ones(2)
            if task.outputs == 1:  # The noise of greatest likelihood.
                known[1] = np.sqrt(np.mean((train.y - train.f) ** 2))
        losses = judge(way, nets["held"], unit, points, key, options.samples)["loss"]
        held = points[np.nanargmin(losses)]
        choices = {
            "training data": (known, np.max(evidence)),
            "held-out": (held, -np.nanmin(losses)),
        }
        for by, (point, score) in choices.items():
            for part in nets.keys() - {"held"}:
                facts = judge(way, nets[part], unit, point[None], key, options.samples)
                facts = {k: v[0] for k, v in facts.items()}
                facts |= {"point": point, "score": score, "decay": decay}
                found[f"{part}; {name}; {by}"] = facts
    return found


CAPTION = (
    "Nats an example, mean ± standard error; * chosen by held-out examples. Off:\n"
    "expected calibration error, or mean distance of the distribution function from\n"
    "uniform. decay, tau: medians."
)


LOOKS = {
    way: {"color": color, "linestyle": line, "marker": marker}
    for way, color, line, marker in zip(
        WAYS,
        (show.BLACK, show.GREEN, show.VERMILLION, show.ORANGE, show.PURPLE, show.BLUE),
        ("-", "-", "--", ":", "-.", "--"),
        "o^svDP",
        strict=True,
    )
}


def print_table(title, found):
    """Prints what each way is worth, beside the tempered network."""
    base = found["network; held-out"]["loss"]

    def chosen(name, f):
        tau = np.median(np.array(f["point"])[:, 0])
        decay = np.median(f["decay"])
        return "-" if name.startswith("network") else f"{decay:.2g}, {tau:.2g}"

    columns = {
        "predictive": lambda name, f: name.replace("; held-out", " *").split(";")[0],
        "loss": lambda name, f: show.cell(f["loss"], ".3f"),
        "over the\nnetwork": lambda name, f: show.over(f["loss"], base, "+.3f", 1),
        "off, %": lambda name, f: show.percent(f["off"]),
        "decay, tau": chosen,
    }
    show.report(title, found, columns, CAPTION, first=28)


def draw(results, path):
    """Draws reliability, and the loss of each way."""
    fig, axes = show.figure(1, 4, headline(results), figsize=(15, 4.4))
    *panels, right = axes[0]
    places = {"digits": -0.2, "digits, shifted": 0, "diabetes": 0.2}
    for ax, (title, offset) in zip(panels, places.items(), strict=True):
        for at, (way, look) in enumerate(LOOKS.items()):
            facts = results[title][f"{way}; training data"]
            curve = np.array(facts["curve"])
            if title == "diabetes":
                x, y = LEVELS, curve.mean(0)
            else:
                count, sums, hits = curve.sum(0)
                kept = count >= 5 * len(curve)
                x, y = sums[kept] / count[kept], hits[kept] / count[kept]
            ax.plot(x, y, label=way, **look, ms=4, lw=1.2)
            base = results[title]["network; held-out"]["loss"]
            mean, error = show.mean_and_error(np.subtract(facts["loss"], base))
            style = {"color": look["color"], "fmt": "o", "ms": 4}
            right.errorbar(at + offset, mean, error, **style)
        ax.plot([0, 1], [0, 1], color=show.GREY, lw=0.8)
        names = ("below", "level") if title == "diabetes" else ("right", "confidence")
        ax.set(title=f"{title}: share {names[0]}", xlabel=names[1])
    ways = [way.replace(", ", ",\n") for way in WAYS]
    right.set_xticks(range(len(WAYS)), ways, rotation=45)
    right.set_title("loss over the network's: digits, shifted, diabetes")
    axes[0, 0].legend(fontsize=7)
    show.save(fig, path)


def headline(results):
    """Returns what the picture shows."""
    parts = []
    for title, found in results.items():
        losses = found["linearised, exact F; training data"]["loss"]
        over = np.subtract(losses, found["network; held-out"]["loss"])
        parts.append(f"{title} {over.mean():+.2f}")
    return "Loss of Laplace by the evidence over the network's: " + ", ".join(parts)


@harness.experiment(
    smoke={"seeds": 2, "samples": 4, "steps": 3, "decay": [1.0]},
    seeds=6,
    samples={"default": 100, "help": "of weights or of outputs"},
    steps=1000,
    decay={"default": [0.1, 1.0, 10.0], "type": command_line.positive},
)
def main(run: harness.Run) -> None:
    options = run.options
    settings = run.take("samples steps")
    results = {}
    for name, task in TASKS.items():
        cells = [
            [
                run.cell(
                    *(compute, task, seed, decay, options),
                    **{"data": name, "seed": seed, "decay": decay, **settings},
                )
                for decay in options.decay
            ]
            for seed in range(options.seeds)
        ]
        for key in sorted(cells[0][0]):
            part, at = key.split("; ", 1)
            title = name if part == "test" else f"{name}, {part}"
            # The decay of the training is chosen as tau is.
            best = [
                max((c[key] for c in row), key=lambda f: f["score"]) for row in cells
            ]
            facts = {what: [facts[what] for facts in best] for what in best[0]}
            results.setdefault(title, {})[at] = facts
    names = [f"{way}; {by}" for way in WAYS for by in ("training data", "held-out")]
    for title, found in results.items():
        print_table(title, {name: found[name] for name in names})
    draw(results, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

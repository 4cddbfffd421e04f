"""Question: is a Fisher diagonal a better preconditioner than Adam's second moment?

The gradient is divided by F + damping (`scale_by_inverse_fisher`, the diagonal natural
gradient), or clipped after it (Sophia), with F from different estimators at every
tenth step. Every method spends the same number of gradients, those of its estimator
counted, and chooses its learning rate and one more number from a grid of 24 by the loss
on held-out examples, on other seeds. Two problems: a network on handwritten digits,
and a logistic regression on measurements in their raw units, 1e-3 to 1e3.

    python benchmarks/preconditioning.py
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import datasets
import harness
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import perceptron
import show

import fsam_optax as fsam


BATCH, EVERY, SEGMENTS = 50, 10, 10
LOSS = perceptron.LOSS
DAMPINGS = (1e-6, 1e-4, 1e-2, 1.0)


class Method(NamedTuple):
    """An optimizer.

    Attributes:
        make: Maps schedule, second number and key to it.
        second: What is offered for the second number.
        passes: Gradients that its estimator costs, at every tenth step; -1 for one
            each class but the last.
    """

    make: Callable
    second: tuple[float, ...]
    passes: int


def natural(estimator, rate, damping, key):
    """Returns momentum, divided by an average of F."""
    average = fsam.refresh_every(EVERY, optax.chain(estimator(key), optax.ema(0.9)))
    divide = fsam.scale_by_inverse_fisher(average, damping=damping)
    return optax.chain(optax.ema(0.9), divide, optax.scale_by_learning_rate(rate))


def sophia(estimator, rate, gamma, key):
    settings = {"b2": 0.9, "weight_decay": 0.0, "update_interval": EVERY}
    settings |= {"gamma": gamma, "hessian_diagonal_fn": estimator(key)}
    return optax.contrib.sophia(rate, **settings)


ESTIMATORS = {
    "exact": (lambda key: fsam.fisher_exact(LOSS), -1),
    "signs": (lambda key: fsam.fisher_hutchinson(LOSS, key=key), 1),
    "GNB": (lambda key: fsam.fisher_gnb(LOSS, key=key), 1),
    "empirical": (lambda key: fsam.fisher_empirical(LOSS), 1),
}
GAMMAS = (0.01, 0.1, 1.0, 10.0)
METHODS = {
    "momentum": Method(
        lambda rate, decay, key: optax.sgd(rate, decay), (0.0, 0.8, 0.9, 0.95), 0
    ),
    "Adam": Method(
        lambda rate, eps, key: optax.adam(rate, eps=eps), (1e-8, 1e-6, 1e-4, 1e-2), 0
    ),
    "Sophia, Optax's Hessian": Method(
        partial(sophia, optax.contrib.hutchinson_estimator_diag_hessian), GAMMAS, 2
    ),
    "Sophia, GNB": Method(partial(sophia, ESTIMATORS["GNB"][0]), GAMMAS, 1),
    **{
        f"1/F, {name}": Method(partial(natural, make), DAMPINGS, passes)
        for name, (make, passes) in ESTIMATORS.items()
    },
}
STYLES = (
    *((show.GREY, "-"), (show.BLACK, "-"), (show.ORANGE, ":"), (show.SKY, ":")),
    *(
        (show.GREEN, "-"),
        (show.PURPLE, "--"),
        (show.SKY, "--"),
        (show.VERMILLION, "-."),
    ),
)
LOOKS = dict(zip(METHODS, STYLES, strict=True))


class Problem(NamedTuple):
    """Data, the layers between, and the learning rates that are offered: six each."""

    read: Callable
    hidden: tuple[int, ...]
    classes: int
    rates: dict[str, tuple[float, float]]


def read_digits():
    found = datasets.load("digits")
    order = np.random.default_rng(0).permutation(len(found.train_labels))
    x, y = datasets.flat(found.train_images[order]), found.train_labels[order]
    test = datasets.flat(found.test_images), found.test_labels
    return (x[:500], y[:500]), (x[500:], y[500:]), test


def read_cancer():
    import sklearn.datasets

    x, y = sklearn.datasets.load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order].astype(np.float32), y[order].astype(np.int32)
    ends = (slice(250), slice(250, 400), slice(400, None))
    return tuple((x[rows], y[rows]) for rows in ends)


PROBLEMS = {
    "digits": Problem(
        *(read_digits, (32,), 10),
        {"momentum": (0.01, 3), "Adam": (1e-3, 0.3)}
        | {"Sophia": (3e-4, 0.1), "1/F": (3e-3, 1.0)},
    ),
    "raw units": Problem(
        *(read_cancer, (), 2),
        {"momentum": (1e-8, 3e-6), "Adam": (1e-4, 0.03)}
        | {"Sophia": (1e-4, 0.03), "1/F": (3e-3, 1.0)},
    ),
}


def points_of(method, problem):
    """Returns the grid: six learning rates, four second numbers."""
    (ends,) = (v for k, v in problem.rates.items() if method.startswith(k))
    rates = np.geomspace(ends[0], ends[1], 6).tolist()
    return [{"rate": r, "second": s} for s in METHODS[method].second for r in rates]


def steps_of(method, problem, gradients):
    """Returns the number of steps that spends so many gradients."""
    passes = METHODS[method].passes
    passes = problem.classes - 1 if passes < 0 else passes
    return int(gradients / (1 + passes / EVERY)) // SEGMENTS * SEGMENTS


def train(method, problem, data, steps, seed, rate, second):
    """Returns losses and accuracy along one training."""
    (x, y), held, test = data
    init, batches, estimator = jax.random.split(jax.random.key(seed), 3)
    params = perceptron.initial(init, (x.shape[1], *problem.hidden, problem.classes))
    if not problem.hidden:
        params = jax.tree.map(jnp.zeros_like, params)
    schedule = optax.cosine_decay_schedule(1.0, steps)
    optimizer = METHODS[method].make(lambda t: rate * schedule(t), second, estimator)

    def segment(carry, keys):
        rows = jax.vmap(lambda key: jax.random.randint(key, (BATCH,), 0, len(y)))(keys)
        carry = perceptron.follow(LOSS, optimizer, carry, (x[rows], y[rows]))
        loss, accuracy = perceptron.score(carry[0], *test)
        facts = {"test": loss, "accuracy": accuracy, "held": LOSS(carry[0], held)}
        return carry, facts | {"train": LOSS(carry[0], (x, y))}

    keys = jax.random.split(batches, (SEGMENTS, steps // SEGMENTS))
    return jax.lax.scan(segment, (params, optimizer.init(params)), keys)[1]


def compute(method, problem, points, options):
    """Chooses from the grid, trains anew at the choice; as many seeds as points."""
    data = jax.tree.map(jnp.asarray, problem.read())
    steps = steps_of(method, problem, options.gradients)
    rates, seconds = methods.columns(points, "rate", "second")
    every = jax.jit(jax.vmap(partial(train, method, problem, data, steps)))
    same = jnp.ones(len(points))
    held = [
        every((same * (1000 + seed)).astype(int), rates, seconds)["held"][:, -1]
        for seed in range(options.tuning_seeds)
    ]
    best = methods.choose(points, -np.mean(held, 0))
    seeds = jnp.arange(len(points))
    found = every(seeds, same * best["rate"], same * best["second"])
    return best | {"steps": steps} | found


CAPTION = (
    "Mean ± standard error; differences on the same seeds. Second: momentum, eps,\n"
    "gamma or damping. * at an edge of the grid."
)


def last(facts, key):
    """Returns a figure of each seed at the end."""
    return np.array(facts[key], float)[:, -1]


def report(title, found):
    """Prints the end of each training, beside Adam's."""
    adam, loss, share = found["Adam"], (".3f", 1), (".1f", 100)

    def column(key, form):
        return lambda _, f: show.cell(last(f, key), *form)

    def beside(key, form, factor):
        return lambda _, f: show.over(last(f, key), last(adam, key), f"+{form}", factor)

    def chosen(_, f):
        return f"{f['rate']:.1g}, {f['second']:.0e}" + "*" * bool(f["edges"])

    columns = {
        "method": lambda method, _: method,
        "steps": lambda _, f: f["steps"],
        "training loss": column("train", loss),
        "test loss": column("test", loss),
        "over Adam": beside("test", *loss),
        "accuracy, %": column("accuracy", share),
        "over Adam, %": beside("accuracy", *share),
        "rate, second": chosen,
    }
    show.report(title, found, columns, CAPTION, first=24)


def draw(results, options, path):
    """Draws the test loss along the training, and at the end beside Adam's."""
    fig, axes = show.figure(1, 4, headline(results), figsize=(15, 4.4))
    for at, (name, found) in enumerate(results.items()):
        left, right = axes[0, 2 * at], axes[0, 2 * at + 1]
        base = last(found["Adam"], "test")
        x = options.gradients * np.arange(1, SEGMENTS + 1) / SEGMENTS
        for place, (method, facts) in enumerate(found.items()):
            color, line = LOOKS[method]
            curve = np.array(facts["test"], float)
            left.plot(x, curve.mean(0), color=color, linestyle=line, label=method)
            mean, error = show.mean_and_error(curve[:, -1] - base)
            right.errorbar(mean, -place, xerr=error, color=color, fmt="o", ms=5)
        left.set(yscale="log", title=f"{name}: test loss against gradients")
        # One that diverged does not hide the others.
        right.set_xscale("symlog", linthresh=0.2)
        right.axvline(0, color=show.GREY, lw=0.8)
        right.set_yticks(-np.arange(len(found)), list(found))
        right.set_title(f"{name}: test loss over Adam's")
    axes[0, 0].legend(fontsize=7)
    show.save(fig, path)


def headline(results):
    """Returns what the picture shows."""
    parts = []
    for name, found in results.items():
        ends = {method: last(facts, "test").mean() for method, facts in found.items()}
        best = min(ends, key=lambda m: np.nan_to_num(ends[m], nan=np.inf))
        parts.append(f"{name}: {best}")
    return "Least test loss at equal gradients: " + "; ".join(parts)


@harness.experiment(
    smoke={
        **{"gradients": 40, "tuning_seeds": 1},
        "methods": ["Adam", "Sophia, GNB", "1/F, exact"],
    },
    methods={"default": list(METHODS), "choices": METHODS},
    gradients=300,
    tuning_seeds=2,
)
def main(run: harness.Run) -> None:
    options, results = run.options, {}
    settings = run.take("gradients tuning_seeds")
    for name, problem in PROBLEMS.items():
        results[name] = {}
        for method in options.methods:
            points = points_of(method, problem)
            key = {"problem": name, "method": method, "points": points, **settings}
            args = compute, method, problem, points, options
            results[name][method] = run.cell(*args, **key)
        report(f"{name}, {options.gradients} gradients", results[name])
    draw(results, options, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: is a Fisher diagonal a better preconditioner than Adam's second moment?

The gradient is divided by F + damping (`scale_by_inverse_fisher`, the diagonal natural
gradient), or clipped after it (Sophia), with F from different estimators at every
tenth step. Every method spends the same number of gradients, those of its estimator
counted, and chooses its learning rate and one more number from a grid of 24 by the loss
on held-out examples, on other seeds. Two problems: a network on handwritten digits,
and a logistic regression on measurements in their raw units, 1e-3 to 1e3.

    python benchmarks/preconditioning.py
"""

import sys
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
    average = optax.chain(estimator(key), optax.ema(0.9))
    return optax.chain(
        optax.ema(0.9),
        fsam.scale_by_inverse_fisher(
            fsam.refresh_every(EVERY, average), damping=damping
        ),
        optax.scale_by_learning_rate(rate),
    )


def sophia(estimator, rate, gamma, key):
    settings = {
        "b2": 0.9,
        "gamma": gamma,
        "weight_decay": 0.0,
        "update_interval": EVERY,
    }
    return optax.contrib.sophia(rate, hessian_diagonal_fn=estimator(key), **settings)


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
LOOKS = dict(
    zip(
        METHODS,
        (
            *((show.GREY, "-"), (show.BLACK, "-"), (show.ORANGE, ":"), (show.SKY, ":")),
            *((show.GREEN, "-"), (show.PURPLE, "--")),
            *((show.SKY, "--"), (show.VERMILLION, "-.")),
        ),
        strict=True,
    )
)


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
        {
            "momentum": (0.01, 3),
            "Adam": (1e-3, 0.3),
            "Sophia": (3e-4, 0.1),
            "1/F": (3e-3, 1.0),
        },
    ),
    "raw units": Problem(
        *(read_cancer, (), 2),
        {
            "momentum": (1e-8, 3e-6),
            "Adam": (1e-4, 0.03),
            "Sophia": (1e-4, 0.03),
            "1/F": (3e-3, 1.0),
        },
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
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(y))
        batch = x[rows], y[rows]
        grads = jax.grad(LOSS)(params, batch)
        updates, state = optimizer.update(
            grads, state, params, batch=batch, obj_fn=lambda w: LOSS(w, batch)
        )
        return (optax.apply_updates(params, updates), state), None

    def segment(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        loss, accuracy = perceptron.score(carry[0], *test)
        facts = {"test": loss, "accuracy": accuracy}
        facts["held"] = perceptron.score(carry[0], *held)[0]
        return carry, facts | {"train": LOSS(carry[0], (x, y))}

    keys = jax.random.split(batches, (SEGMENTS, steps // SEGMENTS))
    return jax.lax.scan(segment, (params, optimizer.init(params)), keys)[1]


def compute(name, method, options):
    """Chooses from the grid, trains anew at the choice; as many seeds as points."""
    problem = PROBLEMS[name]
    data = jax.tree.map(jnp.asarray, problem.read())
    steps = steps_of(method, problem, options.gradients)
    points = points_of(method, problem)
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


def experiment(run: harness.Run) -> None:
    """Runs what the results do not hold yet, prints the tables and draws the figure."""
    options = run.options
    settings = run.take("gradients tuning_seeds")
    results = {}
    for name in PROBLEMS:
        results[name] = {
            method: run.cell(
                partial(compute, name, method, options),
                **{"problem": name, "method": method, **settings},
            )
            for method in options.methods
        }
        rows = []
        for method, facts in results[name].items():
            rows.append([method, str(facts["steps"])])
            for key in ("train", "test", "accuracy"):
                last = np.array(facts[key], float)[:, -1]
                base = np.array(results[name]["Adam"][key], float)[:, -1]
                factor, form = (100, ".1f") if key == "accuracy" else (1, ".3f")
                rows[-1].append(show.cell(last, form, factor))
                if key != "train":
                    rows[-1].append(show.cell(last - base, "+" + form, factor))
            star = "*" * bool(facts["edges"])
            rows[-1].append(f"{facts['rate']:.1g}, {facts['second']:.0e}{star}")
        headings = ["method", "steps", "training loss", "test loss", "over Adam"]
        headings += ["accuracy, %", "over Adam", "rate, second"]
        title = f"{name}, {options.gradients} gradients"
        show.table(title, headings, rows, CAPTION, first=24)
    draw(results, options, run.picture())


CAPTION = (
    "Mean ± standard error; differences on the same seeds. Second: momentum, eps,\n"
    "gamma or damping. * at an edge of the grid."
)


def draw(results, options, path):
    """Draws the test loss along the training, and at the end beside Adam's."""
    fig, axes = show.figure(1, 4, headline(results), figsize=(15, 4.4))
    for at, (name, found) in enumerate(results.items()):
        left, right = axes[0, 2 * at], axes[0, 2 * at + 1]
        base = np.array(found["Adam"]["test"], float)[:, -1]
        x = options.gradients * np.arange(1, SEGMENTS + 1) / SEGMENTS
        for place, (method, facts) in enumerate(found.items()):
            color, line = LOOKS[method]
            curve = np.array(facts["test"], float)
            left.plot(x, curve.mean(0), color=color, linestyle=line, label=method)
            mean, error = show.mean_and_error(curve[:, -1] - base)
            right.errorbar(mean, -place, xerr=error, color=color, fmt="o", ms=5)
        left.set_yscale("log")
        left.set_title(f"{name}: test loss against gradients")
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
        last = {m: np.mean(np.array(f["test"], float)[:, -1]) for m, f in found.items()}
        best = min(last, key=lambda m: np.nan_to_num(last[m], nan=np.inf))
        parts.append(f"{name}: {best}")
    return "Least test loss at equal gradients: " + "; ".join(parts)


main = harness.script(
    *(__doc__, experiment),
    smoke={
        **{"gradients": 40, "tuning_seeds": 1},
        "methods": ["Adam", "Sophia, GNB", "1/F, exact"],
    },
    methods={"default": list(METHODS), "choices": METHODS},
    gradients=300,
    tuning_seeds=2,
)


if __name__ == "__main__":
    sys.exit(main())

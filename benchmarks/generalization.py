"""Question: what changes when the same network is trained with SAM, ASAM or Fisher SAM?

Three hundred of scikit-learn's handwritten digits train a small convolutional network;
797 others test it. All methods spend the same number of gradients, so that the base
optimizer runs twice as many epochs. Fisher SAM comes twice: with the squared gradient
of the batch, as it is published, and with the exact empirical Fisher information, the
mean of the squared gradients of the examples, taken from the pass of the gradient. Last
comes what such a diagonal costs, and by how much it differs from the plain way.

Learning rates, radii and the form of the ellipsoid are those of --tune: the greatest
accuracy on the other 700 training images, two seeds, 24 tries a method. Relative:
T^2 = 1 / (1 + F / mean F). Absolute: T^2 = 1 / (F + 0.001).

    python benchmarks/generalization.py                     # make train
    python benchmarks/generalization.py --methods base ASAM --rho ASAM=0.5
    python benchmarks/generalization.py --data cifar10 --data-dir data --tune

Ctrl-C keeps the methods that are finished; the same command goes on from there.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import cost
import datasets
import harness
import jax
import jax.numpy as jnp
import methods
import models
import numpy as np
import show
from training import make_problem, train

import fsam_optax as fsam


MAIN = (
    *("base", "SAM", "ASAM"),
    *("Fisher SAM, squared, relative", "Fisher SAM, empirical, absolute"),
)
# Of each method: radius and rate that --tune chose, and the radii and rates it offers.
# Digits: 24 tries, of which Fisher SAM has two forms. CIFAR-10: six a form.
RADII = 0.025 * 2 ** np.arange(6)
RELATIVE, ABSOLUTE = (0.1, 0.2, 0.4), (0.0075, 0.015, 0.03)
FEW, RATES, TWO = (0.02, 0.05, 0.125), (0.0125, 0.025, 0.05, 0.1), (0.00625, 0.0125)
DIGITS = {
    "base": (0.0, 0.0453302, (0.0,), np.geomspace(0.002, 0.5, 24)),
    "SAM": (0.2, 0.1, RADII, RATES),
    "ASAM": (2.0, 0.05, 10 * RADII, RATES),
    "Fisher SAM, squared, relative": (0.4, 0.05, RELATIVE, RATES),
    "Fisher SAM, squared, absolute": (0.0075, 0.05, ABSOLUTE, RATES),
    "Fisher SAM, empirical, relative": (0.2, 0.1, RELATIVE, RATES),
    "Fisher SAM, empirical, absolute": (0.0075, 0.1, ABSOLUTE, RATES),
    "GSAM": (0.2, 0.1, RADII, RATES),
    "WSAM": (0.0125, 0.05, RADII / 8, RATES),
    "Friendly SAM": (0.4, 0.05, RADII, RATES),
    "MSAM": (2.4, 0.05, 12 * RADII, RATES),
}
CIFAR10 = {
    "base": (0.0, 0.0015, (0.0,), np.geomspace(0.0015, 0.016, 6)),
    "SAM": (0.02, 0.00625, FEW, TWO),
    "ASAM": (0.03125, 0.00625, (0.03125, 0.125, 0.5), TWO),
    "Fisher SAM, squared, relative": (0.05, 0.00625, FEW, TWO),
    "Fisher SAM, empirical, relative": (0.05, 0.00625, FEW, TWO),
    "Fisher SAM, empirical, absolute": (0.002, 0.00625, (0.00075, 0.002, 0.005), TWO),
    "GSAM": (0.05, 0.0125, FEW, TWO),
    "WSAM": (0.00625, 0.00625, (0.0025, 0.00625, 0.015), TWO),
    "Friendly SAM": (0.05, 0.00625, FEW, TWO),
    "MSAM": (0.1, 0.0015, (0.1, 0.24, 0.6), (0.0015, 0.003)),  # As many steps as base.
}
FIXED = {"optimizer": "sgd", "weight_decay": 5e-4, "label_noise": 0.0}


def search(method: str, points: list, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the accuracy at each point on images that nothing trains on."""
    seeds = [1000 + seed for seed in range(options.tuning_seeds)]
    problem = make_problem(options, seeds * len(points), tune=True)
    each = [np.repeat(x, len(seeds)) for x in methods.columns(points, "rho", "rate")]
    accuracy = last(train(method, problem, options, *each))
    return {"points": points, "accuracy": accuracy.reshape(len(points), -1).mean(1)}


def tune(run: harness.Run, settings: dict[str, Any]) -> dict[str, Any]:
    """Says and returns the best point of each method."""
    chosen, settings = {}, settings | {"seeds": run.options.tuning_seeds}
    for method in run.options.methods:
        _, _, radii, rates = run.options.offered[method]
        points = [{"rho": float(a), "rate": float(b)} for a in radii for b in rates]
        points = points[::9] if run.options.smoke else points
        key = {"part": "tuning", "method": method, "points": points, **settings}
        found = run.cell(search, method, points, run.options, **key)
        best = methods.choose(found["points"], found["accuracy"])
        harness.say(f"{method}: {best}")
        chosen[method] = {"rho": best["rho"], "rate": best["rate"]}
    return chosen


def fisher_cost(name: str, repeats: int) -> dict[str, Any]:
    """Measures the empirical Fisher diagonal of a model, the plain way and ours."""
    apply, params, batch = (cost.SMOKE | cost.PROBLEMS)[name]()
    loss = fsam.negative_log_likelihood(apply, fsam.categorical)
    ours = partial(fsam.diagonal, fsam.fisher_empirical(loss))
    fns = {"gradient": jax.grad(loss), "ours": ours, "plain": cost.plain(loss)}
    runs, facts = cost.programs(fns, params, batch)
    # Apart: the plain way leaves hundreds of megabytes behind, which slow down what
    # runs next.
    for row, number in (("ours", 5 * repeats), ("plain", repeats)):
        pair = {"gradient": runs["gradient"], row: runs[row]}
        facts[row] |= cost.ratios(pair, number)[row]
    apart = jax.tree.map(
        lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)),
        *(runs[row]() for row in ("ours", "plain")),
    )
    return {**facts, "apart": max(jax.tree.leaves(apart))}


def last(facts: dict[str, Any], name: str = "accuracy") -> np.ndarray:
    """Returns what each network has at the end."""
    return np.array(facts[name], float)[:, -1]


def report(options, points, found, costs) -> None:
    """Prints both tables."""
    rows, base = [], last(found[options.methods[0]])
    for method, facts in found.items():
        cells = [f"{points[method][name]:.3g}" for name in ("rate", "rho")]
        cells += [show.percent(last(facts)), show.over(last(facts), base)]
        cells += [show.cell(last(facts, "test_loss"), ".2f")]
        rows.append([method, *cells, f"{last(facts, 'train_loss').mean():.3f}"])
    headings = ["method", "learn.\nrate", "rho", "test\naccuracy, %"]
    headings += [f"points over\n{options.methods[0]}", "test\nloss", "train\nloss"]
    gradients = max(facts["gradients"][-1] for facts in found.values())
    caption = f"{gradients} gradients; mean ± standard error, {options.seeds} seeds."
    title = f"{options.data}, {options.model}, sgd: equal gradients"
    show.table(title, headings, rows, caption, first=21)
    rows = []
    for name, facts in costs.items():
        ways = facts["plain"], facts["ours"]
        cells = [f"{way['ratio']:.2f}" for way in ways]
        cells += [f"{way['temporary_mb']:.1f}" for way in ways]
        rows.append([cost.TITLES.get(name, name), *cells, f"{facts['apart']:.0e}"])
    headings = ["empirical Fisher diagonal", "time:\nvmap(grad)²", "time:\nours"]
    headings += ["memory, MB:\nvmap(grad)²", "MB:\nours", "largest\ndifference"]
    caption = "Time: in gradients of the batch. Difference: over the largest entry."
    show.table("What a Fisher diagonal costs", headings, rows, caption, first=30)


def draw(options, found, path) -> None:
    """Draws the accuracy of each seed."""
    ends = {method: 100 * last(facts) for method, facts in found.items()}
    first, best = options.methods[0], max(ends, key=lambda method: ends[method].mean())
    ahead = show.cell(ends[best] - ends[first], ".1f")
    headline = f"Equal gradients: {best} is {ahead} points ahead of {first}"
    fig, ((axis,),) = show.figure(1, 1, headline, figsize=(3 + len(ends), 4.4))
    for at, (method, values) in enumerate(ends.items()):
        show.dots(axis, at, values, method)
    names = [method.replace(" SAM", "-SAM").replace(" ", "\n") for method in ends]
    axis.set_xticks(range(len(ends)), names)
    axis.set_title(f"Test accuracy of each seed, % ({options.data})")
    show.save(fig, path)


def setting(text: str) -> tuple[str, float]:
    """Reads METHOD=VALUE for argparse."""
    method, _, value = text.rpartition("=")
    if method not in methods.METHODS:
        raise argparse.ArgumentTypeError(f"must be METHOD=VALUE, got {text}")
    return method, command_line.positive(value)


SIZES = "train_size", "test_size", "batch_size", "epochs", "seeds", "tuning_seeds"


def defaults(found: argparse.Namespace) -> dict[str, Any]:
    """Returns the defaults that depend on the data, and what --tune offers there."""
    offered, sizes = DIGITS, (300, None, 30, 40, 5, 2)
    names = DIGITS if found.tune else MAIN
    if found.data == "cifar10":
        offered, sizes = DIGITS | CIFAR10, (4000, 4000, 50, 10, 3, 1)
        names = CIFAR10
    return {
        **dict(zip(SIZES, sizes, strict=True)),
        "offered": offered,
        "methods": list(names),
        "rho": {method: rho for method, (rho, *_) in offered.items()},
        "learning_rate": {method: rate for method, (_, rate, *_) in offered.items()},
        "data_dir": Path("data") / found.data,
        "out": Path("results") / f"{found.data}-{found.model}",
    }


PAIRS = {"type": setting, "nargs": "+", "metavar": "METHOD=VALUE"}


@harness.experiment(
    defaults=defaults,
    smoke={"epochs": 1, "seeds": 2, "train_size": 120, "test_size": 200},
    data={"default": "digits", "choices": datasets.NAMES},
    data_dir={"type": Path, "help": "folder of the files"},
    augment={"default": False, "help": "shift, and mirror what may be"},
    model={"default": "cnn", "choices": models.MODELS},
    methods={"choices": methods.METHODS, "nargs": "+"},
    learning_rate=PAIRS,
    rho=PAIRS,
    tune={"default": False, "help": "choose learning rate and rho first"},
    **{name: {"type": command_line.whole} for name in SIZES},
)
def main(run: harness.Run) -> None:
    options, found = run.options, {}
    # Data that cannot be had end the run before anything trains.
    problem = make_problem(options, range(options.seeds))
    names = "data train_size test_size augment model batch_size epochs seeds"
    settings = FIXED | run.take(names)
    rho = {m: row[0] for m, row in options.offered.items()} | dict(options.rho)
    rate = {m: row[1] for m, row in options.offered.items()}
    rate |= dict(options.learning_rate)
    points = {m: {"rho": rho[m], "rate": rate[m]} for m in options.methods}
    if options.tune:
        points = tune(run, settings)
    for method, point in points.items():
        args = train, method, problem, options, *point.values()
        found[method] = run.cell(*args, method=method, **point, **settings)
    names, repeats = (("tiny",), 2) if options.smoke else (("mlp", "cnn"), 5)
    about = {"part": "cost", "repeats": repeats}
    costs = run.each("model", names, fisher_cost, repeats, **about)
    report(options, points, found, costs)
    draw(options, found, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

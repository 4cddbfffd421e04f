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
    python benchmarks/generalization.py --seeds 10 --methods base SAM
    python benchmarks/generalization.py --data cifar10 --model resnet --epochs 100
    python benchmarks/generalization.py --data mnist --train-size 1000 --tune

Ctrl-C keeps the methods that are finished; the same command goes on from there.
"""

import argparse
from collections.abc import Mapping
from functools import cache, partial
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
from training import make_problem, search, train

import fsam_optax as fsam


OPTIMIZERS = {"sgd": 0.05, "adamw": 1e-3}  # and their usual learning rates
# Few images, so that there is something to overfit; rate and rho chosen by --tune.
DIGITS = {"train_size": 300, "batch_size": 30, "augment": False}
MAIN = {
    "base": (0.0, 0.0453302),
    "SAM": (0.2, 0.1),
    "ASAM": (2.0, 0.05),
    "Fisher SAM, squared, relative": (0.4, 0.05),
    "Fisher SAM, empirical, absolute": (0.0075, 0.1),
}
DIGITS_CHOICE = MAIN | {
    "GSAM": (0.2, 0.1),
    "WSAM": (0.0125, 0.05),
    "Friendly SAM": (0.4, 0.05),
    "MSAM": (2.4, 0.05),
}
# The radii of the papers.
USUAL = {"SAM": 0.05, "ASAM": 0.5, "relative": 0.1, "absolute": 0.015, "MSAM": 3.0}
# What --tune offers. Digits: 24 tries a method, of which Fisher SAM has two forms, with
# half as many radii each. CIFAR-10: six.
RATES = {
    "digits": {"base": np.geomspace(0.002, 0.5, 24), "": (0.0125, 0.025, 0.05, 0.1)},
    "cifar10": {
        "base": np.geomspace(0.0015, 0.016, 6),
        "MSAM": (0.0015, 0.003),  # It takes as many steps as base.
        "": (0.00625, 0.0125),
    },
}
RADII = {
    "digits": {
        "SAM": (0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
        "ASAM": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
        "relative": (0.1, 0.2, 0.4),
        "absolute": (0.0075, 0.015, 0.03),
        "WSAM": (0.003125, 0.00625, 0.0125, 0.025, 0.05, 0.1),
        "MSAM": (0.3, 0.6, 1.2, 2.4, 4.8, 9.6),
    },
    "cifar10": {
        "SAM": (0.02, 0.05, 0.125),
        "ASAM": (0.03125, 0.125, 0.5),
        "absolute": (0.00075, 0.002, 0.005),
        "WSAM": (0.0025, 0.00625, 0.015),
        "MSAM": (0.1, 0.24, 0.6),
    },
}


def grid(method: str, data: str) -> list[dict[str, float]]:
    """Returns what --tune offers a method; other data than CIFAR-10 are as digits."""
    data = data if data in RADII else "digits"
    rates = RATES[data].get(method, RATES[data][""])
    if method == "base":
        return [{"rho": 0.0, "rate": float(rate)} for rate in rates]
    radii = RADII[data].get(method.split(", ")[-1], RADII[data]["SAM"])
    return methods.grid(method, rates, radii)


def tune(run: harness.Run, settings) -> None:
    """Takes of each grid the best on training images that nothing trains on."""
    options, rows = run.options, []
    seeds = [1000 + seed for seed in range(options.tuning_seeds)]
    problem = cache(partial(make_problem, options, tune=True, seeds=seeds))
    settings = {**settings, "seeds": len(seeds)}

    def tried(method, points):
        return search(method, problem(), options, points)

    for method in options.methods:
        points = grid(method, options.data)
        points = points[::9] if options.smoke else points
        key = {"part": "tuning", "method": method, "points": points, **settings}
        found = run.cell(tried, method, points, **key)
        best = methods.choose(found["points"], found["accuracy"])
        options.rho[method], options.learning_rate[method] = best["rho"], best["rate"]
        loss = found["loss"][found["points"].index({k: best[k] for k in points[0]})]
        cells = f"{best['rate']:.3g}", f"{best['rho']:.3g}", f"{best['score']:.2%}"
        rows.append([method, *cells, f"{loss:.3f}", ", ".join(best["edges"])])
    headings = ["method", "rate", "rho", "accuracy", "loss", "edge"]
    show.table("The best on training images that nothing trains on", headings, rows)


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
    pairs = zip(
        *(jax.tree.leaves(runs[row]()) for row in ("ours", "plain")), strict=True
    )
    apart = [jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)) for a, b in pairs]
    return {**facts, "apart": max(apart)}


def print_tables(found: Mapping[str, Any], costs: Mapping[str, Any], options) -> None:
    rows = []
    base = found.get("base")
    for method, facts in found.items():
        names = "accuracy", "test_loss", "train_loss"
        accuracy, test, training = (np.array(facts[n])[:, -1] for n in names)
        over = "-"
        if base and method != "base":
            over = show.over(accuracy, np.array(base["accuracy"])[:, -1])
        rho = options.rho.get(method)
        cells = [f"{options.learning_rate[method]:.3g}", f"{rho:.3g}" if rho else "-"]
        cells += [show.percent(accuracy), over, show.cell(test, ".2f")]
        rows.append([method, *cells, f"{training.mean():.3f}"])
    headings = ["method", "learn.\nrate", "rho", "test\naccuracy, %"]
    headings += ["points\nover base", "test\nloss", "train\nloss"]
    title = f"{options.data}, {options.model}, {options.optimizer}: equal gradients"
    gradients = max(facts["gradients"][-1] for facts in found.values())
    caption = f"{gradients} gradients; mean ± standard error, {options.seeds} seeds."
    show.table(title, headings, rows, caption, first=21)
    columns = {
        "empirical Fisher diagonal": lambda name, _: cost.TITLES.get(name, name),
        "time:\nvmap(grad)²": lambda _, f: f"{f['plain']['ratio']:.2f}",
        "time:\nours": lambda _, f: f"{f['ours']['ratio']:.2f}",
        "memory, MB:\nvmap(grad)²": lambda _, f: f"{f['plain']['temporary_mb']:.1f}",
        "MB:\nours": lambda _, f: f"{f['ours']['temporary_mb']:.1f}",
        "largest\ndifference": lambda _, f: f"{f['apart']:.0e}",
    }
    caption = (
        "Time: over one gradient of the batch. Difference: over the largest entry."
    )
    show.report("What a Fisher diagonal costs", costs, columns, caption, first=30)


def draw(found, costs, options, path) -> None:
    """Draws accuracy and test loss of each method, and what a Fisher diagonal costs."""
    last = {m: 100 * np.array(f["accuracy"])[:, -1] for m, f in found.items()}
    best = max(last, key=lambda method: last[method].mean())
    headline = f"{best} is the most accurate at equal gradients"
    if "base" in found and best != "base":
        ahead = show.cell(last[best] - last["base"], ".1f")
        headline += f":\n{ahead} points ahead of the base optimizer"
    fig, axes = show.figure(1, 3, headline, figsize=(12, 4.6))
    left, middle, right = axes[0]
    for at, (method, values) in enumerate(last.items()):
        show.dots(left, at, values, method)
    many = len(last) > 6
    short = [m.replace("Fisher SAM", "F-SAM") for m in last]
    short = [m if many else m.replace(", ", "\n") for m in short]
    left.set_xticks(range(len(last)), short, rotation=90 if many else 0)
    left.set_title(f"Test accuracy, %, at the end ({options.data})")
    for method, facts in found.items():
        values = np.array(facts["test_loss"], float)
        style = show.look(method) | {"marker": None}
        middle.plot(facts["gradients"], values.mean(0), label=method, **style)
    show.later(middle, [facts["test_loss"] for facts in found.values()])
    middle.set(xlabel="gradients spent", title="Test loss, mean of the seeds")
    if many:
        show.legend(fig, middle, 5, fontsize=8)
    else:
        middle.legend(fontsize=7)
    for row, offset, color in (("plain", -0.2, show.GREY), ("ours", 0.2, show.GREEN)):
        values = [facts[row]["ratio"] for facts in costs.values()]
        bars = right.bar(np.arange(len(costs)) + offset, values, 0.36, color=color)
        right.bar_label(bars, fmt="%.3g", fontsize=8)
    right.set_yscale("log")
    right.axhline(1, color="black", lw=0.8)
    right.set_xticks(range(len(costs)), [name.upper() for name in costs])
    title = "Fisher diagonal, time over one gradient:\nvmap(grad)² grey, ours green"
    right.set_title(title)
    show.save(fig, path)


def setting(text: str) -> tuple[str, float]:
    """Reads METHOD=VALUE for argparse."""
    method, _, value = text.rpartition("=")
    if method not in methods.METHODS:
        raise argparse.ArgumentTypeError(
            f"must be METHOD=VALUE with METHOD in {list(methods.METHODS)}, got {text}"
        )
    return method, command_line.positive(value)


class Settings(argparse.Action):
    """Adds METHOD=VALUE to the defaults."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        before = getattr(namespace, self.dest) or {}
        setattr(namespace, self.dest, {**before, **dict(values)})


def defaults(found: argparse.Namespace) -> dict[str, Any]:
    """Returns the defaults that depend on data, optimizer and mode."""
    rates = dict.fromkeys(methods.METHODS, OPTIMIZERS[found.optimizer])
    rhos = {m: USUAL.get(m.split(", ")[-1], 0.05) for m in rates if m != "base"}
    chosen = {
        "data_dir": Path("data") / found.data,
        "methods": list(MAIN),
        "out": Path("results") / f"{found.data}-{found.model}-{found.optimizer}",
    }
    if found.tune:
        chosen["methods"] = list(methods.METHODS)
    if found.data == "digits":
        chosen |= DIGITS
        if found.optimizer == "sgd":
            rhos |= {m: rho for m, (rho, _) in DIGITS_CHOICE.items() if rho}
            rates |= {m: rate for m, (_, rate) in DIGITS_CHOICE.items()}
    return chosen | {"learning_rate": rates, "rho": rhos}


PAIRS = {"type": setting, "nargs": "+", "action": Settings, "metavar": "METHOD=VALUE"}


@harness.experiment(
    defaults=defaults,
    smoke={"epochs": 1, "seeds": 2, "train_size": 120, "test_size": 200},
    data={"default": "digits", "choices": datasets.NAMES},
    data_dir={"type": Path, "help": "folder of the files"},
    train_size={"type": command_line.whole, "help": "fewer than all images"},
    test_size={"type": command_line.whole, "help": "fewer than all images"},
    label_noise={"default": 0.0, "help": "share of wrong labels"},
    augment={"default": True, "action": argparse.BooleanOptionalAction},
    model={"default": "cnn", "choices": models.MODELS},
    methods={"choices": methods.METHODS, "nargs": "+"},
    optimizer={"default": "sgd", "choices": OPTIMIZERS},
    learning_rate=PAIRS,
    rho=PAIRS,
    weight_decay=5e-4,
    batch_size=100,
    epochs={"default": 40, "help": "base runs twice as many"},
    seeds=5,
    tune={"default": False, "help": "choose learning rate and rho first"},
    tuning_seeds=2,
)
def main(run: harness.Run) -> None:
    options = run.options
    names = "data train_size test_size label_noise augment model optimizer weight_decay"
    settings = run.take(f"{names} batch_size epochs seeds")
    if options.tune:
        tune(run, settings)
    points = {
        m: {"rho": options.rho.get(m, 0.0), "rate": options.learning_rate[m]}
        for m in options.methods
    }
    keys = {m: {"method": m, **point, **settings} for m, point in points.items()}
    problem, found = cache(partial(make_problem, options)), {}

    def trained(method, point):
        return train(method, problem(), options, **point)

    if not all(run.holds(**key) for key in keys.values()):
        problem()  # Data that cannot be had end the run before anything trains.
    for method, point in points.items():
        found[method] = run.cell(trained, method, point, **keys[method])
    names, repeats = (("tiny",), 2) if options.smoke else (("mlp", "cnn"), 5)
    about = {"part": "cost", "repeats": repeats}
    costs = run.each("model", names, fisher_cost, repeats, **about)
    print_tables(found, costs, options)
    draw(found, costs, options, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

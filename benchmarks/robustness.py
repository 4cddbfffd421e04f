"""Question: which method withstands wrong labels?

A share of the training labels is wrong; the test labels are right. Every method spends
the same number of gradients (apart from what a Fisher information costs), and chooses
learning rate and radius for each share of wrong labels from a grid of 20, by the
accuracy on held-out training images, whose labels are as wrong as the others.

    python benchmarks/robustness.py                       # handwritten digits
    python benchmarks/robustness.py --data fashion-mnist --data-dir data/fashion
"""

from functools import partial

import datasets
import harness
import methods
import numpy as np
import perceptron
import show


RATES = (0.01, 0.03, 0.1, 0.3)
NAMES = ["base", "SAM", "ASAM"]
NAMES += [f"Fisher SAM, {f}, relative" for f in ("squared", "empirical")]


def draw(data, results, path):
    """Draws the gain on the base optimizer by share of wrong labels."""
    headline = f"{data}: what is gained on wrong labels"
    fig, axes = show.figure(1, 1, headline, figsize=(7, 4.6))
    base = [of["accuracy"] for of in results["base"].values()]
    for at, (method, found) in enumerate(results.items()):
        x = 100 * np.array(list(found)) + (at - len(results) / 2) * 0.6
        over = np.subtract([of["accuracy"] for of in found.values()], base)
        style = show.look(method) | {"ms": 4, "lw": 1.2, "label": method}
        show.errors(axes[0, 0], x, over, 100, **style)
    title = "test accuracy, points over base on the same seeds"
    axes[0, 0].set(title=title, xlabel="labels wrong, %")
    show.legend(fig, axes[0, 0], 3, fontsize=8)
    show.save(fig, path)


@harness.experiment(
    smoke={
        "methods": ["base", "ASAM", "Fisher SAM, empirical, relative"],
        **{"noise": [0.0, 0.4], "gradients": 4, "seeds": 2, "tuning_seeds": 1},
    },
    **perceptron.IMAGES,
    methods={"default": NAMES, "choices": methods.METHODS},
    noise=[0.0, 0.2, 0.4, 0.6, 0.8],
    gradients={"default": 800, "help": "of one training"},
    seeds=16,
    tuning_seeds=8,
)
def main(run: harness.Run) -> None:
    options = run.options
    # Half as many pixels a side of larger images: a smaller network.
    pool = 1 if options.data == "digits" else 2
    sets = perceptron.split(datasets.load(options.data, options.data_dir), pool)
    data = [[x[:n] for x in part] for part, n in zip(sets, (1000, 2000), strict=True)]
    settings = {"train_size": 1000, **run.take("data gradients seeds tuning_seeds")}
    seeds = run.take("seeds tuning_seeds")
    results = {method: {} for method in options.methods}
    for method, found in results.items():
        train = partial(perceptron.train_by, method, options.gradients)
        points = methods.grid(method, RATES)
        for noise in options.noise:
            compare = partial(perceptron.compare, noise=noise, **seeds)
            key = {"method": method, "noise": noise, "points": points, **settings}
            found[noise] = run.cell(compare, train, points, *data, **key)

    def entry(of):
        return show.percent(of["accuracy"]) + "*" * bool(of["edges"])

    rows = [[m, *map(entry, of.values())] for m, of in results.items()]
    headings = ["method", *(f"{noise:.0%} wrong" for noise in options.noise)]
    caption = "Mean ± standard error. * chosen at an edge of the grid."
    show.table(f"{options.data}: test accuracy, %", headings, rows, caption)
    draw(options.data, results, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

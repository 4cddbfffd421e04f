"""Question: does the gain of sharpness-aware steps grow with training?

At few gradients a second gradient is better spent on a second step; where the base
optimizer overfits and time is not the limit, that changes. Three hundred digits, of
which a fifth carries a wrong label, train a small network with budgets of 1x, 4x and
16x. At each budget every method chooses learning rate and radius from a grid of 36 by
the accuracy on 700 others, whose labels are as wrong; test labels are right. The least
rate is small enough to stand for stopping early.

    python benchmarks/long_training.py
"""

from functools import partial

import datasets
import harness
import methods
import numpy as np
import perceptron
import show


RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
NAMES = ["base", "SAM", "ASAM", "Fisher SAM, empirical, absolute", "MSAM"]
NAMES += ["GSAM", "WSAM", "Friendly SAM"]


def grid(method):
    """Returns as many points for each method; the base optimizer has no radius."""
    radii = methods.METHODS[method].radii
    if not radii:
        rates = np.geomspace(RATES[0], 0.3, 6 * len(RATES))
        return [{"rho": 0.0, "rate": rate} for rate in rates.tolist()]
    # With the budget grows the best radius, and the grid of short trainings ends early.
    return methods.grid(method, RATES, (*radii, 2 * radii[-1]))


def draw(results, budgets, path):
    """Draws the gain over the base optimizer against the budget."""
    headline = "The gain of SAM and ASAM grows with the budget; MSAM leads at the least"
    fig, axes = show.figure(1, 1, headline, figsize=(9, 4.6))
    accuracy = {m: [r["accuracy"] for r in of.values()] for m, of in results.items()}
    gains = {m: np.subtract(values, accuracy["base"]) for m, values in accuracy.items()}
    show.curves(axes[0, 0], budgets, gains)
    title = "Points over the base optimizer, on the same seeds"
    axes[0, 0].set(xscale="log", title=title, xlabel="gradients")
    axes[0, 0].set_xticks(budgets, budgets)
    axes[0, 0].minorticks_off()
    show.legend(fig, axes[0, 0], 4, fontsize=8)
    show.save(fig, path)


@harness.experiment(
    smoke={"methods": ["base", "MSAM"], "gradients": [4, 8], "seeds": 2},
    methods={"default": NAMES, "choices": methods.METHODS},
    gradients=[400, 1600, 6400],
    noise={"default": 0.2, "help": "share of wrong labels"},
    seeds=10,
    tuning_seeds=2,
)
def main(run: harness.Run) -> None:
    options = run.options
    (x, y), test = perceptron.split(datasets.load("digits"))
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    settings = run.take("noise seeds tuning_seeds")
    sets = {"data": (x[:300], y[:300]), "test": test, "held": (x[300:], y[300:])}

    def compare(budget, method, points):
        train = partial(perceptron.train_by, method, budget)
        return perceptron.compare(train, points, **sets, **settings)

    results, rows = {}, []
    for method in options.methods:
        key = {"method": method, "points": grid(method), **settings}
        args = options.gradients, compare, method, grid(method)
        results[method] = run.each("gradients", *args, **key)
        rows.append([method])
        for budget, facts in results[method].items():
            over = show.over(facts["accuracy"], results["base"][budget]["accuracy"])
            over += "*" * bool(facts["edges"])
            rows[-1] += [show.percent(facts["accuracy"]), over]
    headings = [h for b in options.gradients for h in (f"{b}\ngradients", "over\nbase")]
    caption = "Mean ± standard error. * chosen at an edge of the grid."
    show.table("Test accuracy, %", ["method", *headings], rows, caption, first=22)
    draw(results, options.gradients, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

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
NAMES = (
    *("base", "SAM", "ASAM", "Fisher SAM, empirical, absolute", "MSAM"),
    *("GSAM", "WSAM", "Friendly SAM"),
)


def grid(method):
    """Returns as many points for each method; the base optimizer has no radius."""
    radii = methods.METHODS[method].radii
    if not radii:
        rates = np.geomspace(RATES[0], 0.3, 6 * len(RATES))
        return [{"rho": 0.0, "rate": rate} for rate in rates.tolist()]
    # With the budget grows the best radius, and the grid of short trainings ends early.
    return methods.grid(method, RATES, (*radii, 2 * radii[-1]))


def draw(results, path):
    """Draws accuracy against the budget, and the gain over the base optimizer."""
    fig, axes = show.figure(1, 2, headline(results), figsize=(11, 4.6))
    left, right = axes[0]
    budgets = [*results["base"]]
    reached = {
        m: [found[b]["accuracy"] for b in budgets] for m, found in results.items()
    }
    gains = {m: np.subtract(values, reached["base"]) for m, values in reached.items()}
    for ax, values in ((left, reached), (right, gains)):
        show.curves(ax, budgets, values)
        ax.set_xscale("log")
        ax.set_xticks(budgets, [str(b) for b in budgets])
        ax.minorticks_off()
        ax.set_xlabel("gradients")
    left.set_title("Test accuracy, %, mean ± standard error")
    right.set_title("Points over the base optimizer, on the same seeds")
    show.legend(fig, left, 4, fontsize=8)
    show.save(fig, path)


def headline(results):
    """Returns what the picture shows."""
    budgets = [*results["base"]]
    shortest, longest = budgets[0], budgets[-1]
    gains = []
    for budget in (shortest, longest):
        values = {m: np.mean(f[budget]["accuracy"]) for m, f in results.items()}
        gains.append(100 * (max(values.values()) - values["base"]))
    return (
        f"The best is {gains[0]:.1f} points ahead of base at {shortest} gradients, "
        + (f"{gains[1]:.1f} at {longest}")
    )


@harness.experiment(
    smoke={
        **{"methods": ["base", "MSAM"], "gradients": [4, 8], "seeds": 2},
        "tuning_seeds": 1,
    },
    methods={"default": list(NAMES), "choices": methods.METHODS},
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
    compare = partial(perceptron.compare, **sets, **settings)
    results, rows = {method: {} for method in options.methods}, []
    for method, found in results.items():
        points = grid(method)
        for budget in options.gradients:
            key = {"method": method, "gradients": budget, "points": points, **settings}
            train = partial(perceptron.train_by, method, budget)
            found[budget] = run.cell(compare, train, points, **key)
    for method, found in results.items():
        rows.append([method])
        for budget, facts in found.items():
            star = "*" * bool(facts["edges"])
            over = show.over(facts["accuracy"], results["base"][budget]["accuracy"])
            rows[-1] += [show.percent(facts["accuracy"]), over + star]
    headings = ["method"]
    headings += [
        t for b in options.gradients for t in (f"{b}\ngradients", "over\nbase")
    ]
    caption = "Mean ± standard error. * chosen at an edge of the grid."
    show.table("Test accuracy, %", headings, rows, caption, first=22)
    draw(results, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

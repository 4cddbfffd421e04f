"""Prints the verdict of the README: points over the base optimizer, in all experiments.

Equal gradients, paired over seeds, mean ± standard error; of Fisher SAM the better of
the relative and the absolute form, by the held-out accuracy where that is kept. The
rest of the family has a table of its own, of the experiments that it was run in.

    python benchmarks/verdict.py
"""

import harness
import methods
import numpy as np
import show


COLUMNS = ("SAM", "ASAM", "Fisher SAM, squared", "Fisher SAM, empirical", "MSAM")
PUBLISHED = "ASAM at 0.5"
FAMILY = ("GSAM", "WSAM", "Friendly SAM", PUBLISHED)


def held_out(final, tunings):
    """Returns the accuracy at which a tuning chose the point of a training, or 0."""
    for cell in tunings:
        settings, result = cell["settings"], cell["result"]
        best = methods.choose(result["points"], result["accuracy"])
        same = {**settings, "rho": best["rho"], "rate": best["rate"]}
        if all(same[key] == value for key, value in final.items() if key != "seeds"):
            return best["score"]
    return 0


def by_setting(name, *keys):
    """Returns results by setting and method: those that have all of the keys."""
    cells = [*harness.read(harness.HERE / "results" / f"{name}.json").values()]
    tunings = [cell for cell in cells if cell["settings"].get("part") == "tuning"]
    found = {}
    for cell in cells:
        settings, result = cell["settings"], cell["result"]
        if "part" in settings or not all(key in settings for key in keys):
            continue
        if name == "generalization":
            result["score"] = held_out(settings, tunings)
        method = settings["method"].replace("squared gradient", "squared")
        if name == "which_fisher" and method not in ("base", "SAM"):
            method = f"Fisher SAM, {method}"
        if name == "generalization" and (method, settings["rho"]) == ("ASAM", 0.5):
            method = PUBLISHED
        key = tuple(settings[key] for key in keys)
        found.setdefault(key, {})[method] = result
    return dict(sorted(found.items()))


def rows():
    """Yields the title of each experiment, its results by method, and the measure."""
    for (data,), of in by_setting("generalization", "data").items():
        last = {m: [curve[-1] for curve in r["accuracy"]] for m, r in of.items()}
        images = {"digits": "300 digits, CNN", "cifar10": "CIFAR-10, 4000 images, CNN"}
        yield images.get(data, data), last, of
    for (noise,), of in by_setting("which_fisher", "noise").items():
        title = f"300 digits, MLP, {noise:.0%} of labels wrong"
        yield title, {m: r["accuracy"] for m, r in of.items()}, of
    for (data, noise), of in by_setting("robustness", "data", "noise").items():
        title = f"1000 {data}, MLP, {noise:.0%} wrong"
        yield title, {m: r["accuracy"] for m, r in of.items()}, of
    for (gradients,), of in by_setting("long_training", "gradients").items():
        title = f"300 digits, 20% wrong, {gradients} gradients"
        yield title, {m: r["accuracy"] for m, r in of.items()}, of


def entry(column, values, of):
    """Writes the points of a method over the base optimizer."""
    names = [n for n in values if n == column or n.startswith(f"{column}, ")]
    if not names:
        return ""
    best = max(names, key=lambda name: of[name].get("score", 0))
    over = show.cell(np.subtract(values[best], values["base"]), "+.1f", 100)
    return over + " a" * best.endswith("absolute")


def main() -> None:
    """Prints both tables in Markdown, without experiments that would be empty."""
    every = list(rows())
    for columns in (COLUMNS, FAMILY):
        print(f"| data, network | {' | '.join(columns)} |")
        print(f"|{' --- |' * (len(columns) + 1)}")
        for title, values, of in every:
            cells = [entry(column, values, of) for column in columns]
            if any(cells):
                print(f"| {title} | {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main()

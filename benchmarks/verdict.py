"""Prints the verdict of the README: points over the base optimizer, in all experiments.

Equal gradients, paired over seeds, mean ± standard error; of Fisher SAM the better of
the relative and the absolute form, by the held-out accuracy where that is kept. The
rest of the family has a table of its own, of the experiments that it was run in.

    python benchmarks/verdict.py
"""

import harness
import methods
import show


COLUMNS = ("SAM", "ASAM", "Fisher SAM, squared", "Fisher SAM, empirical", "MSAM")
FAMILY = ("GSAM", "WSAM", "Friendly SAM", "ASAM at 0.5")
EXPERIMENTS = {
    "generalization": (("data",), "{}"),
    "which_fisher": (("noise",), "300 digits, MLP, {:.0%} of labels wrong"),
    "robustness": (("data", "noise"), "1000 {}, MLP, {:.0%} wrong"),
    "long_training": (("gradients",), "300 digits, 20% wrong, {} gradients"),
}
IMAGES = {"digits": "300 digits, CNN", "cifar10": "CIFAR-10, 4000 images, CNN"}


def held_out(final, tunings):
    """Returns the accuracy at which a tuning chose the point of a training, or 0."""
    for cell in tunings:
        settings, result = cell["settings"], cell["result"]
        best = methods.choose(result["points"], result["accuracy"])
        same = {**settings, "rho": best["rho"], "rate": best["rate"]}
        if all(same[key] == value for key, value in final.items() if key != "seeds"):
            return best["score"]
    return 0


def by_setting(name, keys):
    """Returns accuracy and score by setting and method: of cells with all the keys."""
    cells = [*harness.read(harness.HERE / "results" / f"{name}.json").values()]
    tunings = [cell for cell in cells if cell["settings"].get("part") == "tuning"]
    found = {}
    for cell in cells:
        settings, result = cell["settings"], cell["result"]
        if "part" in settings or not all(key in settings for key in keys):
            continue
        method = settings["method"].replace("squared gradient", "squared")
        accuracy, score = result["accuracy"], result.get("score", 0)
        if name == "which_fisher" and method not in ("base", "SAM"):
            method = f"Fisher SAM, {method}"
        if name == "generalization":
            accuracy = [curve[-1] for curve in accuracy]
            score = held_out(settings, tunings)
            if (method, settings["rho"]) == ("ASAM", 0.5):
                method = "ASAM at 0.5"
        key = tuple(settings[key] for key in keys)
        found.setdefault(key, {})[method] = score, accuracy
    return dict(sorted(found.items()))


def entry(column, of):
    """Writes the points of a method over the base optimizer."""
    names = [n for n in of if n == column or n.startswith(f"{column}, ")]
    if not names:
        return ""
    best = max(names, key=lambda name: of[name][0])
    over = show.over(of[best][1], of["base"][1])
    return over + " a" * best.endswith("absolute")


def main() -> None:
    """Prints both tables in Markdown, without experiments that would be empty."""
    for columns in (COLUMNS, FAMILY):
        print(f"| data, network | {' | '.join(columns)} |")
        print(f"|{' --- |' * (len(columns) + 1)}")
        for name, (keys, title) in EXPERIMENTS.items():
            for key, of in by_setting(name, keys).items():
                cells = [entry(column, of) for column in columns]
                if any(cells):
                    row = IMAGES.get(key[0]) if name == "generalization" else None
                    print(f"| {row or title.format(*key)} | {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main()

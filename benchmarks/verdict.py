"""Prints the verdict of the README: points over the base optimizer, in all experiments.

Equal gradients, paired over seeds, mean ± standard error; of Fisher SAM the better of
the relative and the absolute form, by the held-out accuracy where that is kept.

    python benchmarks/verdict.py
"""

import harness
import numpy as np
import show


COLUMNS = ("SAM", "ASAM", "Fisher SAM, squared", "Fisher SAM, empirical")
COLUMNS += ("GSAM", "WSAM", "Friendly SAM", "MSAM")


def by_setting(name, *keys):
    """Returns results by setting and method: those that have all of the keys."""
    found = {}
    for cell in harness.read(harness.HERE / "results" / f"{name}.json").values():
        settings, result = cell["settings"], cell["result"]
        if "part" in settings or not all(key in settings for key in keys):
            continue
        method = settings["method"].replace("squared gradient", "squared")
        if name == "which_fisher" and method not in ("base", "SAM"):
            method = f"Fisher SAM, {method}"
        key = tuple(settings[key] for key in keys)
        found.setdefault(key, {})[method] = result
    return found


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


def main() -> None:
    """Prints a table in Markdown."""
    print(f"| data, network | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for title, values, of in rows():
        cells = []
        for column in COLUMNS:
            names = [name for name in values if name.startswith(column)]
            if column in ("SAM", "ASAM"):
                names = [name for name in names if name == column]
            best = max(names, key=lambda n: of[n].get("score", 0), default=None)
            if best is None:
                cells.append("")
                continue
            over = np.subtract(values[best], values["base"])
            cells.append(
                show.cell(over, "+.1f", 100) + " a" * best.endswith("absolute")
            )
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""What all experiments show: tables of 80 columns, and pictures in one style."""

import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


WIDTH = 80

# Okabe and Ito's palette, told apart by colour-blind readers too: one look a method.
BLACK, BLUE, VERMILLION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
ORANGE, SKY, PURPLE, GREY = "#E69F00", "#56B4E9", "#CC79A7", "#7F7F7F"
LOOKS = {
    "base": (BLACK, "-", "o"),
    "SAM": (BLUE, "--", "s"),
    "ASAM": (VERMILLION, "-.", "D"),
    "Fisher SAM": (GREEN, "-", "^"),
    "Fisher SAM, squared": (GREEN, ":", "v"),
    "GSAM": (ORANGE, "--", "P"),
    "WSAM": (SKY, "-.", "X"),
    "Friendly SAM": (PURPLE, "--", "p"),
    "MSAM": (GREY, "-", "<"),
    # What the recipes compare.
    "exact F": (GREEN, "-", "^"),
    "empirical F": (BLUE, "--", "s"),
    "squared gradient": (VERMILLION, ":", "v"),
    "squared gradient, 8": (ORANGE, ":", "P"),
    "squared gradient, 1": (PURPLE, ":", "X"),  # 128 or 1000 images
    "magnitude": (BLACK, "-", "o"),
    "average": (BLACK, "-", "o"),
    "loss": (BLACK, "-", "o"),
    "identity": (ORANGE, "--", "D"),
    "whole F": (PURPLE, ":", "v"),
}
STYLE: Any = {
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True},
    **{"axes.titlesize": 10, "axes.labelsize": 9, "axes.titlelocation": "left"},
    **{"xtick.labelsize": 8, "ytick.labelsize": 8},
    **{"grid.alpha": 0.25, "legend.frameon": False},
}


def look(method: str) -> dict[str, Any]:
    """Returns colour, line style and marker: of the longest name that begins so."""
    names = [name for name in LOOKS if method.startswith(name)]
    looks = LOOKS[max(names, key=len, default="MSAM")]
    return dict(zip(("color", "linestyle", "marker"), looks, strict=True))


# Tables.


def mean_and_error(values: Any, factor: float = 1.0) -> tuple[float, float]:
    """Returns the mean over seeds and its standard error, NaN of one."""
    values = factor * np.array(values, float)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def cell(values: Any, form: str = ".1f", factor: float = 1.0) -> str:
    """Writes the mean over seeds and its standard error."""
    mean, error = mean_and_error(values, factor)
    spread = f" ± {error:{form.lstrip('+')}}" if error == error else ""
    return f"{mean:{form}}{spread}"


def percent(values: Any) -> str:
    """Writes shares in per cent."""
    return cell(values, ".1f", 100)


def over(values: Any, base: Any, form: str = "+.1f", factor: float = 100) -> str:
    """Writes differences on the same seeds, by default of shares in points."""
    return cell(np.subtract(values, base), form, factor)


def edge(at: int, grid: Any) -> str:
    """Returns a star where a choice is at an edge of its grid."""
    return "*" * (at in (0, len(grid) - 1))


Columns = dict[str, Callable[[Any, Any], Any]]


def report(title, found, columns: Columns, caption="", **settings: Any) -> None:
    """Prints a row for each name and its facts, of which each column makes an entry."""
    rows = [[f(name, facts) for f in columns.values()] for name, facts in found.items()]
    table(title, list(columns), rows, caption, **settings)


def table(title, headings, rows, caption="", *, first: int = WIDTH // 2) -> None:
    """Prints a table of at most 80 columns; what does not fit follows in another.

    The first column names the rows and is repeated.
    """
    names, *columns = zip(headings, *([*map(str, row)] for row in rows), strict=True)
    first = min(width(names), first)
    groups, used = [[]], first
    for column in columns:
        used += width(column)
        if groups[-1] and used > WIDTH - 1:
            groups.append([])
            used = first + width(column)
        groups[-1].append(column)
    console = Console(width=WIDTH, highlight=False, markup=False)
    console.print(f"\n{title}", style="bold")
    for group in groups:
        shown = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
        shown.add_column(names[0], max_width=first, overflow="fold")
        for heading, *_ in group:
            shown.add_column(heading, justify="right", no_wrap=True)
        for texts in zip(names[1:], *(column[1:] for column in group), strict=True):
            shown.add_row(*texts)
        console.print(shown)
    if caption:
        console.print(caption)


def width(column):
    return 1 + max(len(line) for text in column for line in text.split("\n"))


# Pictures.


def figure(rows: int, columns: int, headline: str, **settings: Any) -> tuple[Any, Any]:
    """Returns a figure under a headline that says what it shows, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    settings |= {"squeeze": False, "layout": "constrained"}
    found, axes = plt.subplots(rows, columns, **settings)
    found.suptitle(headline, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return found, axes


def dots(axis: Any, x: float, values: Any, method: str) -> None:
    """Draws one dot a seed, and a bar at their mean."""
    values = np.array(values, float)
    places = x + np.linspace(-0.15, 0.15, len(values)) * (len(values) > 1)
    style = look(method) | {"linestyle": ""}
    axis.plot(places, values, ms=4, alpha=0.6, **style)
    axis.hlines(values.mean(), x - 0.3, x + 0.3, color=style["color"], lw=2)


def errors(axis: Any, x: Any, values: Any, factor: float = 1.0, **style: Any) -> None:
    """Draws means over seeds, the last axis, with their standard errors."""
    pairs = [mean_and_error(of_seeds, factor) for of_seeds in values]
    means, spread = np.array(pairs).T
    axis.errorbar(x, means, spread, **style)


def curves(axis: Any, x: Any, by_method: Any, **style: Any) -> None:
    """Draws a line a method: means over seeds in per cent, with their errors."""
    for method, values in by_method.items():
        errors(axis, x, values, 100, label=method, **look(method), **style)


def legend(picture: Any, axis: Any, columns: int, **settings: Any) -> None:
    """Puts the legend of a panel below all of them."""
    handles, labels = axis.get_legend_handles_labels()
    settings |= {"loc": "outside lower center", "ncols": columns}
    picture.legend(handles, labels, **settings)


def save(picture: Any, file: pathlib.Path) -> None:
    """Writes a picture, all or nothing."""
    import matplotlib.pyplot as plt

    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        picture.savefig(temporary, dpi=150)
        os.replace(temporary, file)
    except OSError as error:
        raise SystemExit(f"{file}: {error.strerror}; no picture") from None
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(picture)
    harness.say(f"{file}")

"""Question: how does the cost of a step grow with the size of the problem?

With parameters, batch, classes, depth (a scan over layers) and devices: the time of
each step relative to the base step of the same problem. A flat line means that the
overhead does not grow. Devices are those of XLA on one CPU, so that only ratios say
something. A point is measured again, up to --rounds times, until the quartiles of all
its rows are within a tenth of the median; what stays wider is drawn with them.

    python benchmarks/growth.py
"""

import os


# Before jax starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import harness
import jax
import jax.numpy as jnp
import numpy as np
import show
from cost import Problem, problem
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from models import MLP
from steps import measure, OPTIMIZERS


ROWS = {
    "base": "base step",
    "SAM by hand": "SAM by hand",
    "SAM": "SAM",
    "SAM, value_and_grad, metrics": "SAM with metrics",
    "Fisher SAM, empirical, one pass": "Fisher SAM, exact empirical F",
    "Fisher SAM, exact": "Fisher SAM, exact F",
}


def scanned(depth: int, width: int = 128, batch: int = 64) -> Problem:
    """Returns residual layers that a scan runs through."""

    def apply(params, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(layer, x, params["layers"])
        return x @ params["head"]

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "layers": jax.random.normal(keys[0], (depth, width, width)) / width,
        "head": jax.random.normal(keys[1], (width, 10)) / width,
    }
    x = jax.random.normal(keys[2], (batch, width))
    return Problem(apply, params, (x, jax.random.randint(keys[3], (batch,), 0, 10)))


def distributed(devices: int) -> Problem:
    """Returns the MLP with 32 examples on each of several devices."""
    model = problem(MLP((256, 256)), (256,), 32 * devices)
    settings = {"axis_types": (AxisType.Auto,), "devices": jax.devices()[:devices]}
    mesh = jax.make_mesh((devices,), ("data",), **settings)
    params = jax.device_put(model.params, NamedSharding(mesh, P()))
    batch = jax.device_put(model.batch, NamedSharding(mesh, P("data")))
    return Problem(model.apply, params, batch)


GROWTH = {
    "parameters": {
        "1e4": lambda: problem(MLP((80, 80)), (40,), 128),
        "1e5": lambda: problem(MLP((280, 280)), (80,), 128),
        "1e6": lambda: problem(MLP((900, 900)), (200,), 128),
        "1e7": lambda: problem(MLP((3000, 3000)), (400,), 128),
        "1e8": lambda: problem(MLP((9800, 9800)), (400,), 128),
    },
    "batch": {
        f"{n}": lambda n=n: problem(MLP(), (784,), n) for n in (16, 64, 256, 1024)
    },
    "classes": {
        f"{n}": lambda n=n: problem(MLP(classes=n), (784,), 128, n) for n in (2, 10, 50)
    },
    "depth": {f"{n}": lambda n=n: scanned(n) for n in (2, 8, 32)},
    "devices": {f"{n}": lambda n=n: distributed(n) for n in (1, 2, 4, 8)},
}
SMOKE = {
    "depth": {"2": lambda: scanned(2, 8, 4)},
    "devices": {"2": lambda: distributed(2)},
}


def spread_of(facts) -> float:
    """Returns how far the quartiles of a row are from its median, the widest row."""
    ends = [q / f["ratio"] for f in facts.values() for q in f["quartiles"]]
    return max(abs(end - 1) for end in ends)


def settled(point: str, points, repeats: int, rounds: int):
    """Measures with more and more repeats until the quartiles are near the median."""
    model, facts = points[point](), {}
    for number in range(rounds):
        facts = measure(model, OPTIMIZERS["sgd"], repeats * 2**number, ROWS, steps=1)
        if spread_of(facts) <= 0.1:
            break
    return facts


def headline(results):
    """Returns what the picture shows."""
    parts = []
    for row in ("SAM", "Fisher SAM, empirical, one pass", "Fisher SAM, exact"):
        every = [f[row]["ratio"] for of in results.values() for f in of.values()]
        parts.append(f"{ROWS[row]} {min(every):.1f} to {max(every):.1f}")
    return "Steps in base steps, over all sizes: " + "; ".join(parts)


def draw(results, path):
    """Draws one panel for each kind of growth, quartiles as bars."""
    size = {"figsize": (3.1 * len(results), 4.2), "sharey": True}
    fig, axes = show.figure(1, len(results), headline(results), **size)
    colors = "#000000", show.GREY, show.BLUE, show.SKY, show.GREEN, show.VERMILLION
    styles = "-", "--", "-", ":", "-.", (0, (5, 1, 1, 1))
    for ax, (kind, points) in zip(axes[0], results.items(), strict=True):
        x = [float(point) for point in points]
        for row, color, style in zip(ROWS, colors, styles, strict=True):
            found = {float(p): f[row] for p, f in points.items() if row in f}
            middles = np.array([f["ratio"] for f in found.values()])
            ends = np.array([f["quartiles"] for f in found.values()]).T
            look = {"ls": style, "color": color, "marker": "o", "ms": 3}
            spread = np.abs(ends - middles) if len(found) else None
            ax.errorbar([*found], middles, spread, label=ROWS[row], **look)
        ax.set(xscale="log", xlabel=kind, xlim=(x[0] / 1.3, x[-1] * 1.3))
        ax.set_xticks(x, list(points))
        ax.minorticks_off()
    axes[0, 0].set_yscale("log", base=2)
    axes[0, 0].set_ylim(0.8, 16)
    ticks = 1, 1.5, 2, 3, 4, 6, 8
    axes[0, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0, 0].set_ylabel("time of a step / base step")
    show.legend(fig, axes[0, 0], 3, fontsize=9)
    show.save(fig, path)


@harness.experiment(
    smoke={"repeats": 2, "rounds": 1},
    repeats=9,
    rounds={"default": 3, "help": "each of twice the repeats"},
)
def main(run: harness.Run) -> None:
    results, rows, settings = {}, [], run.take("repeats rounds")
    for kind, points in (SMOKE if run.options.smoke else GROWTH).items():
        args = settled, points, *settings.values()
        results[kind] = run.each("point", points, *args, kind=kind, **settings)
        for point, facts in results[kind].items():
            cells = [f"{facts[r]['ratio']:.2f}" if r in facts else "-" for r in ROWS]
            rows.append([f"{kind} {point}", *cells[1:], f"{spread_of(facts):.0%}"])
    short = "SAM by\nhand", "SAM", "with\nmetrics", "empirical\nF", "exact\nF", "spread"
    caption = "Spread: the widest quartile of the row, from its median."
    show.table("Time of a step over the base step", ["", *short], rows, caption)
    draw(results, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

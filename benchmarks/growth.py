"""Question: how does the cost of a step grow with the size of the problem?

With parameters, batch, classes, depth (a scan over layers) and devices: the time of
each step relative to the base step of the same problem. A flat line means that the
overhead does not grow. Devices are those of XLA on one CPU, so that only ratios say
something.

    python benchmarks/growth.py
    python benchmarks/growth.py --smoke        # to see that it runs
"""

import argparse
import os
import pathlib


# Before jax starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
from cost import MLP, Problem, problem, save
from rich.console import Console
from rich.table import Table
from step_time import measure, OPTIMIZERS


HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "growth.json"
FIGURE = HERE / "figures" / "growth.png"
ROWS = {
    "base": "base step",
    "two gradients by hand": "SAM by hand",
    "SAM, no metrics": "SAM",
    "SAM": "SAM with metrics",
    "Fisher SAM, empirical, fused, no metrics": "Fisher SAM, exact empirical F",
    "Fisher SAM, exact, no metrics": "Fisher SAM, exact F",
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
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    spec = jax.sharding.PartitionSpec
    rows = jax.sharding.NamedSharding(mesh, spec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, spec())
    return model._replace(
        params=jax.device_put(model.params, everywhere),
        batch=jax.device_put(model.batch, rows),
    )


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


def draw(results, path):
    """Draws one panel for each kind of growth."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        1, len(results), figsize=(3.1 * len(results), 3.4), sharey=True, squeeze=False
    )
    colors = ("#000000", "#999999", "#0072B2", "#56B4E9", "#009E73", "#D55E00")
    styles = ("-", "--", "-", ":", "-.", (0, (5, 1, 1, 1)))
    for ax, (kind, points) in zip(axes[0], results.items(), strict=True):
        for (row, label), color, style in zip(
            ROWS.items(), colors, styles, strict=True
        ):
            shown = [p for p in points if row in points[p]]
            ratios = [points[p][row]["ratio"] for p in shown]
            x = [float(p) for p in shown]
            ax.plot(x, ratios, ls=style, color=color, marker="o", ms=3, label=label)
        ax.set_xscale("log")
        ax.set_xticks(x := [float(p) for p in points], list(points))
        ax.minorticks_off()
        ax.set_xlim(x[0] / 1.3, x[-1] * 1.3)
        ax.set_xlabel(kind)
        ax.grid(alpha=0.3)
    axes[0, 0].set_yscale("log", base=2)
    axes[0, 0].set_yticks(
        [1, 1.5, 2, 3, 4, 6, 8], ["1", "1.5", "2", "3", "4", "6", "8"]
    )
    axes[0, 0].set_ylabel("time of a step / base step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=3, frameon=False, loc="upper center", fontsize=9)
    fig.tight_layout(rect=(0, 0, 1, 0.86))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the figures, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--figure", type=pathlib.Path, default=FIGURE)
    parser.add_argument("--smoke", action="store_true", help="two tiny repeats")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.repeats = 2
    results = {}
    table = Table(title="Ratio to the base step")
    table.add_column("")
    for label in list(ROWS.values())[1:]:
        table.add_column(label, justify="right")
    for kind, points in (SMOKE if options.smoke else GROWTH).items():
        results[kind] = {}
        for point, make in points.items():
            name = f"{kind} {point}"
            facts = measure(
                name, make(), OPTIMIZERS["sgd"], options.repeats, ROWS, steps=1
            )
            results[kind][point] = facts
            cells = [f"{facts[r]['ratio']:.2f}" if r in facts else "-" for r in ROWS]
            table.add_row(name, *cells[1:])
        save(options.out, kind, results[kind], repeats=options.repeats)
    Console(width=120).print(table)
    draw(results, options.figure)


if __name__ == "__main__":
    main()

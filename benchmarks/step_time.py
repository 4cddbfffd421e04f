"""Question: what does a step cost beside its gradients, and how does that grow?

Every row is one jitted, donated training step; all rows of a model run in one process,
interleaved, and are divided by the base step's time. Beside SAM and its family stand
the smallest steps that one can write by hand, with no metrics and no safeguards.
A flat line means that the overhead does not grow with parameters, batch and classes of
an MLP. A point of it is measured again, with twice the repeats, until the quartiles of
all its rows are within a tenth of the median; what stays wider is drawn with them.
What a step costs before it runs, tracing and compilation, shows with many leaves, the
arrays of parameters of a model: half as many small dense layers.

    python benchmarks/step_time.py                                 # make bench
    python benchmarks/step_time.py --models --growth --out FOLDER  # the leaves anew
"""

import cost
import harness
import jax
import jax.numpy as jnp
import numpy as np
import show
from models import MLP
from steps import measure


# On a CPU, XLA is slow with the gradient of a convolution's kernel in a branch or loop.
IN_CONTROL_FLOW = (
    *("SAM, every=5", "SAM, micro_batches=4"),
    *("LookSAM by hand", "LookSAM"),
)
FUSED = "Fisher SAM, empirical, one pass"
SIZES = {
    **{"1e4": ((80, 80), 40), "1e5": ((280, 280), 80), "1e6": ((900, 900), 200)},
    **{"1e7": ((3000, 3000), 400), "1e8": ((9800, 9800), 400)},
}
GROWTH = {  # The MLP, its inputs, the batch and the classes.
    "parameters": {n: (MLP(w), (inputs,), 128) for n, (w, inputs) in SIZES.items()},
    "batch": {f"{n}": (MLP(), (784,), n) for n in (16, 64, 256, 1024)},
    "classes": {f"{n}": (MLP(classes=n), (784,), 128, n) for n in (2, 10, 50)},
}
SMOKE = {"smoke": {"1e2": (MLP((8,)), (8,), 16)}}
LINES = {
    "base": ("base step", show.BLACK, "-"),
    "SAM by hand": ("SAM by hand", show.GREY, "--"),
    "SAM": ("SAM", show.BLUE, "-"),
    "SAM, value_and_grad, metrics": ("SAM with metrics", show.SKY, ":"),
    FUSED: ("Fisher SAM, exact empirical F", show.GREEN, "-."),
    "Fisher SAM, exact": ("Fisher SAM, exact F", show.VERMILLION, (0, (5, 1, 1, 1))),
}
OF_LEAVES = (
    *("base", "SAM by hand", "optax.contrib.sam, opaque", "SAM"),
    *("SAM, value_and_grad, metrics", "ASAM", FUSED),
)
SPENT = {
    **{"tracing": ["trace_s"], "compiling": ["compile_s"]},
    "both": ["trace_s", "compile_s"],
}


def of_model(name: str, repeats: int) -> dict:
    """Returns the facts of the rows that are worth their time."""
    slow = jax.default_backend() == "cpu" and name in ("cnn", "resnet")
    problem = (cost.SMOKE | cost.PROBLEMS)[name]()
    return measure(problem, repeats, leave_out=IN_CONTROL_FLOW if slow else ())


def of_leaves(number: int, repeats: int) -> dict:
    """Returns the facts of a model of so many arrays: dense layers with residuals."""

    def apply(params, x):
        for layer in params:
            x = x + jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
        return x

    layer = {"kernel": jnp.eye(8), "bias": jnp.ones(8)}
    batch = jnp.ones((4, 8)), jnp.arange(4)
    problem = cost.Problem(apply, [layer] * (number // 2), batch)
    return measure(problem, repeats, OF_LEAVES)


def print_leaves(results: dict) -> None:
    """Prints what is spent before a step runs, over the step of SAM by hand."""

    def spent(facts, row, parts):
        return sum(facts[row][part] for part in parts)

    rows = [
        [row]
        + [
            f"{spent(of, row, parts) / spent(of, 'SAM by hand', parts):.2f}"
            for of in results.values()
            for parts in SPENT.values()
        ]
        for row in OF_LEAVES
    ]
    heads = [f"{number}:\n{part}" for number in results for part in SPENT]
    caption = "Arrays of parameters: seconds over those of SAM by hand."
    show.table("Tracing and compilation of many leaves", ["", *heads], rows, caption)


def spread_of(facts: dict) -> float:
    """Returns how far the quartiles of a row are from its median, the widest row."""
    ends = [q / f["ratio"] for f in facts.values() for q in f["quartiles"]]
    return max(abs(end - 1) for end in ends)


def settled(point: str, points: dict, repeats: int, rounds: int) -> dict:
    """Measures with more and more repeats until the quartiles are near the median."""
    problem, facts = cost.problem(*points[point]), {}
    for number in range(rounds):
        facts = measure(problem, repeats * 2**number, LINES)
        if spread_of(facts) <= 0.1:
            break
    return facts


def draw(results: dict, path) -> None:
    """Draws one panel for each kind of growth, quartiles as bars."""
    parts = []
    for row in ("SAM", FUSED, "Fisher SAM, exact"):
        every = [f[row]["ratio"] for of in results.values() for f in of.values()]
        parts.append(f"{LINES[row][0]} {min(every):.1f} to {max(every):.1f}")
    size = {"figsize": (3.6 * len(results), 4.2), "sharey": True}
    headline = f"Steps in base steps: {'; '.join(parts)}"
    fig, axes = show.figure(1, len(results), headline, **size)
    for ax, (kind, points) in zip(axes[0], results.items(), strict=True):
        x = np.array([*points], float)
        for row, (label, color, style) in LINES.items():
            found = {float(p): f[row] for p, f in points.items() if row in f}
            middles = np.array([f["ratio"] for f in found.values()])
            ends = np.array([f["quartiles"] for f in found.values()]).T
            look = {"ls": style, "color": color, "marker": "o", "ms": 3}
            ax.errorbar([*found], middles, abs(ends - middles), label=label, **look)
        ax.set(xscale="log", xlabel=kind, xlim=(x[0] / 1.3, x[-1] * 1.3))
        ax.set_xticks(x, [*points])
        ax.minorticks_off()
    axes[0, 0].set(yscale="log", ylim=(0.8, 12), ylabel="time of a step / base step")
    ticks = 1, 1.5, 2, 3, 4, 6, 8
    axes[0, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    show.legend(fig, axes[0, 0], 3, fontsize=9)
    show.save(fig, path)


@harness.experiment(
    smoke={
        **{"models": [*cost.SMOKE], "leaves": [4], "growth": [*SMOKE]},
        **{"repeats": 2, "rounds": 1},
    },
    models={
        "nargs": "*",
        "default": ["mlp", "cnn", "resnet", "transf."],
        "choices": [*cost.PROBLEMS, *cost.SMOKE],
    },
    leaves={"nargs": "*", "default": [100, 1000], "help": "arrays of parameters"},
    growth={"nargs": "*", "default": [*GROWTH], "choices": [*GROWTH, *SMOKE]},
    repeats=9,
    rounds={"default": 3, "help": "of growth, each of twice the repeats"},
)
def main(run: harness.Run) -> None:
    options, repeats = run.options, run.options.repeats
    key = {"optimizer": "sgd", "repeats": repeats}
    results = run.each("model", options.models, of_model, repeats, **key)
    cost.print_table("Over the base step", results)
    print_leaves(
        run.each("leaves", options.leaves, of_leaves, repeats, repeats=repeats)
    )
    results, rows, key = {}, [], run.take("repeats rounds")
    for kind in options.growth:
        points = (GROWTH | SMOKE)[kind]
        args = settled, points, *key.values()
        results[kind] = run.each("point", points, *args, kind=kind, **key)
        for point, facts in results[kind].items():
            cells = [f"{facts[r]['ratio']:.2f}" if r in facts else "-" for r in LINES]
            rows.append([f"{kind} {point}", *cells[1:], f"{spread_of(facts):.0%}"])
    if results:
        short = "by\nhand", "SAM", "with\nmetrics", "empirical\nF", "exact\nF", "spread"
        caption = "Spread: the widest quartile of the row, from its median."
        show.table("Time of a step over the base step", ["", *short], rows, caption)
        draw(results, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: what does a step cost beside the gradients it is made of?

Every row is one jitted, donated training step; all rows of a model run in one process,
interleaved, and are divided by the base step's time. Beside each method stands the
smallest step for it that one can write by hand, with no metrics and no safeguards.

    python benchmarks/step_time.py                        # all models, SGD
    python benchmarks/step_time.py --models mlp --optimizer adamw
    python benchmarks/step_time.py --leaves               # compile time, many leaves
    python benchmarks/step_time.py --rows MSAM LookSAM "LookSAM by hand"
"""

import cost
import harness
import jax
import jax.numpy as jnp
from cost import Problem
from steps import make_steps, measure, OPTIMIZERS


LEAVES_ROWS = (
    "base",
    "SAM by hand",
    "optax.contrib.sam, opaque",
    "SAM",
    "SAM, value_and_grad, metrics",
    "ASAM",
    "Fisher SAM, empirical, one pass",
)
# On a CPU, XLA is slow with the gradient of a convolution's kernel in a branch or loop.
IN_CONTROL_FLOW = (
    *("SAM, every=2", "SAM, every=5", "SAM, micro_batches=4"),
    *("LookSAM by hand", "LookSAM"),
)


def of_model(name, make, optimizer, repeats, chosen):
    """Returns the facts of the rows worth their time, or of base and the chosen."""
    model = make()
    rows = [*make_steps(model, OPTIMIZERS["sgd"])]
    if chosen:
        rows = [row for row in rows if row == "base" or row in chosen]
    elif jax.default_backend() == "cpu" and name in ("cnn", "resnet"):
        rows = [row for row in rows if row not in IN_CONTROL_FLOW]
    return measure(model, OPTIMIZERS[optimizer], repeats, rows)


def of_leaves(number: int, repeats: int):
    """Returns the facts of a model of many leaves: what a step is apart from its model.

    Half as many tiny dense layers with residuals.
    """

    def apply(params, x):
        for layer in params:
            x = x + jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
        return x

    layer = {"kernel": jnp.eye(8), "bias": jnp.ones(8)}
    x = jnp.ones((4, 8))
    model = Problem(apply, [layer] * (number // 2), (x, jnp.arange(4)))
    return measure(model, OPTIMIZERS["sgd"], repeats, LEAVES_ROWS, steps=1)


@harness.experiment(
    smoke={"models": list(cost.SMOKE), "repeats": 2},
    models={
        "default": ["mlp", "cnn", "resnet", "transf."],
        "choices": [*cost.PROBLEMS, *cost.SMOKE],
    },
    optimizer={"default": "sgd", "choices": OPTIMIZERS},
    leaves={"default": False, "help": "with many leaves"},
    rows={"nargs": "+", "help": "only these, and the base step"},
    repeats=9,
)
def main(run: harness.Run) -> None:
    options, results = run.options, {}
    repeats = options.repeats
    for number in (100, 1000) if options.leaves else ():
        key = {"leaves": number, "repeats": repeats}
        results[f"{number} leaves"] = run.cell(of_leaves, number, repeats, **key)
    for name in () if options.leaves else options.models:
        make, optimizer = (cost.SMOKE | cost.PROBLEMS)[name], options.optimizer
        key = {"model": name, "optimizer": optimizer, "repeats": repeats}
        key |= {"rows": options.rows} if options.rows else {}
        args = of_model, name, make, optimizer, repeats, options.rows
        results[name] = run.cell(*args, **key)
    cost.print_tables("Ratio to the base step", results)


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: which estimator of the Fisher diagonal varies less, and in which layer?

The experiments of Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix
Estimators, 2024, https://arxiv.org/abs/2402.05379:

1. natural gradient descent with two weights, where the diagonal is estimated from four
   inputs and one drawn label each, by the squared score (I1) or by minus the Hessian
   diagonal of the log-likelihood (I2);
2. the exact variances V1 and V2 of both estimators over the labels, and their bounds,
   layer by layer while a small network trains: sigmoid or softplus, classification or
   regression on the same labels as one-hot vectors.

    python benchmarks/fisher_variance.py                        # the digits
    python benchmarks/fisher_variance.py --data-dir data/mnist  # MNIST too

A part of a typical printout:

     data, task, activation, accuracy layer      V1      V2 bound bound      I1   I2
     ───────────────────────────────────────────────────────────────────────────────
     digits, class., sigmoid, 91%     1     0.00019  0.0001    33   3.7      18   13
                                      2     2.8e-05 3.8e-05    36   4.6      13   15
                                      3     6.4e-06 2.1e-05    66   6.7      14   25
                                      4     0.00061       0    32     -      18    0

The last layer always calls for I2, which is exact there. Below it, I1 varies less at
the start of training; as a classifier grows sure, I2 overtakes it, early with softplus
and late with sigmoid. Both are far from certain: with one label per input, the
standard deviation is many times the Fisher itself (the last two columns).

Variances are those of one drawn label per input, averaged over inputs and over the
parameters of a layer; an estimate from N inputs with S labels each has 1/(N S) of them.
They are computed in closed form: the paper drew 5000 labels for the same quantities.
"""

import argparse
import functools
import importlib.metadata
import itertools
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from empirical_fisher import MUTED, new_figure, progress_bars, resume, save
from generalization import spread, write
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fsam_optax


HERE = Path(__file__).parent
# Okabe and Ito's palette.
COLOURS = {"i1": "#0072b2", "i2": "#d55e00"}
LABELS = {"i1": "I1", "i2": "I2"}
SHORT = {"classification": "class.", "regression": "regr."}
LAYERS = ("layer 1", "layer 2", "layer 3", "layer 4")
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}
TASKS = {
    "classification": fsam_optax.categorical,
    "regression": fsam_optax.gaussian(),
}

messages = Console(stderr=True)


# 1. Natural gradient descent with two weights.

TOYS = {"linear": fsam_optax.gaussian(), "logistic": fsam_optax.bernoulli}
TRUTH = jnp.ones(2)
TRAIN, TEST, BATCH, EPOCHS, RATE = 256, 4096, 4, 256, 0.01


def linear_model(w: jax.Array, x: jax.Array) -> jax.Array:
    """Returns one natural parameter for each example."""
    return (x @ w)[:, None]


def descend(kind: str, name: str, damping: float, epochs: int, key: jax.Array):
    """Trains on data of its own, drawn from the model.

    Returns:
        The weights and the excess test loss, over that of the true weights, at the
        end of every epoch.
    """
    likelihood = TOYS[kind]
    data_key, label_key, estimator_key, order_key = jax.random.split(key, 4)
    x = jax.random.normal(data_key, (TRAIN + TEST, 2))
    y = likelihood.sample(label_key, linear_model(TRUTH, x))
    loss_fn = fsam_optax.negative_log_likelihood(linear_model, likelihood)
    make = {"i1": fsam_optax.fisher_i1, "i2": fsam_optax.fisher_i2}[name]
    optimizer = optax.chain(
        fsam_optax.scale_by_inverse_fisher(
            make(linear_model, likelihood, key=estimator_key), damping=damping
        ),
        optax.scale_by_learning_rate(RATE),
    )

    def step(carry, rows):
        w, state = carry
        batch = x[rows], y[rows]
        grads = jax.grad(loss_fn)(w, batch)
        updates, state = optimizer.update(grads, state, w, batch=batch)
        return (optax.apply_updates(w, updates), state), None

    def epoch(carry, key):
        rows = jax.random.permutation(key, TRAIN).reshape(-1, BATCH)
        (w, state), _ = jax.lax.scan(step, carry, rows)
        test = x[TRAIN:], y[TRAIN:]
        return (w, state), (w, loss_fn(w, test) - loss_fn(TRUTH, test))

    w = jnp.zeros(2)
    keys = jax.random.split(order_key, epochs)
    return jax.lax.scan(epoch, (w, optimizer.init(w)), keys)[1]


def toy(options: argparse.Namespace) -> dict[str, Any]:
    """Runs both estimators on both models from the same seeds."""
    epochs = 4 if options.smoke else EPOCHS
    seeds = jnp.stack([jax.random.key(seed) for seed in range(options.toy_seeds)])
    record = {"damping": options.damping, "seeds": options.toy_seeds}
    for kind in TOYS:
        record[kind] = {}
        for name in LABELS:
            run = functools.partial(descend, kind, name, options.damping, epochs)
            paths, losses = jax.jit(jax.vmap(run))(seeds)
            late = paths[:, epochs // 2 :]
            centre = jnp.mean(late, axis=1, keepdims=True)
            strays = jnp.linalg.norm(paths - centre, axis=-1)
            record[kind][name] = {
                "path": paths[0],
                # From where it ends up, of the seeds: tenth, half and nine tenths.
                "stray": jnp.quantile(strays, jnp.array([0.1, 0.5, 0.9]), axis=0),
                "wander": jnp.sqrt(jnp.mean(jnp.var(late, axis=1), axis=-1)),
                "distance": jnp.linalg.norm(centre[:, 0] - TRUTH[None], axis=-1),
                "final_excess_loss": losses[:, -1],
            }
    return record


# 2. Variances by layer.


class Plan(NamedTuple):
    """How a network is trained and where its variances are computed.

    Attributes:
        width: Units of each of three hidden layers.
        examples: Training images.
        checkpoints: Epochs at which to compute the variances.
        inputs: Test images to average over.
        seeds: Networks of each kind.
    """

    width: int
    examples: int
    checkpoints: tuple[int, ...]
    inputs: int
    seeds: int


PLANS = {
    "digits": Plan(32, 1000, (0, 1, 2, 4, 8, 16, 32, 64), 32, 3),
    "mnist": Plan(16, 10_000, (0, 1, 4, 16), 32, 2),
}
SMOKE = Plan(3, 100, (0, 1), 4, 1)
BATCH_SIZE, LEARNING_RATE = 50, 0.005


def initial_params(key: jax.Array, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Returns Glorot-normal weights and biases of 0."""
    init = jax.nn.initializers.glorot_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        name: {"w": init(key, (n, m)), "b": jnp.zeros(m)}
        for name, key, n, m in zip(LAYERS, keys, sizes[:-1], sizes[1:], strict=True)
    }


def network(activation: str) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns a perceptron of four layers as `apply_fn(params, images)`."""
    phi = ACTIVATIONS[activation]

    def apply_fn(params, x):
        for name in LAYERS:
            x = x @ params[name]["w"] + params[name]["b"][None]
            x = phi(x) if name != LAYERS[-1] else x
        return x

    return apply_fn


def by_layer(tree: Any) -> jax.Array:
    """Returns the mean over the parameters of each layer, of shape (layers,)."""
    leaves = [jax.tree.leaves(tree[name]) for name in LAYERS]
    return jnp.stack(
        [sum(map(jnp.sum, layer)) / sum(x.size for x in layer) for layer in leaves]
    )


def variances(apply_fn, likelihood, params, inputs) -> dict[str, Any]:
    """Returns F, V1, V2 and their bounds, as means over each layer."""
    args = apply_fn, likelihood, params, inputs
    i1, i2 = fsam_optax.fisher_variance_i1(*args), fsam_optax.fisher_variance_i2(*args)
    i1_bounds = fsam_optax.fisher_variance_i1_bounds(*args)
    i2_bounds = fsam_optax.fisher_variance_i2_bounds(*args)
    estimator = fsam_optax.fisher_exact(apply_fn, likelihood)
    trees = {
        "fisher": fsam_optax.diagonal(estimator, params, (inputs, None)),
        "i1": i1,
        "i2": i2,
        "i1_upper": i1_bounds.upper,
        "i1_lower": i1_bounds.lower,
        "i2_upper": i2_bounds.upper,
        "i2_lower": i2_bounds.lower,
    }
    return {name: by_layer(tree) for name, tree in trees.items()}


def preferences(record: dict[str, Any]) -> list[str]:
    """Returns "i1" or "i2" for each layer, by `fsam_optax.prefer`."""
    i1, i2 = (dict(zip(LAYERS, np.array(record[n]), strict=True)) for n in LABELS)
    best = fsam_optax.prefer({name: name for name in LAYERS}, i1, i2)
    return [best[name] for name in LAYERS]


def train(
    data: datasets.Dataset,
    plan: Plan,
    task: str,
    activation: str,
    seed: int,
    advance: Callable,
) -> dict[str, Any]:
    """Trains a network, with stops to compute its variances.

    Returns:
        Lists over the checkpoints: accuracy on the test images, and `variances`.
    """
    likelihood, apply_fn = TASKS[task], network(activation)
    x = jnp.asarray(data.train_images[: plan.examples] / 255, jnp.float32)
    x = x.reshape(len(x), -1)
    test_x = jnp.asarray(data.test_images[:1000] / 255, jnp.float32)
    test_x = test_x.reshape(len(test_x), -1)
    y = jnp.asarray(data.train_labels[: plan.examples])
    targets = jax.nn.one_hot(y, 10) if task == "regression" else y
    loss_fn = fsam_optax.negative_log_likelihood(apply_fn, likelihood)
    optimizer = optax.adam(LEARNING_RATE)
    init_key, order_key = jax.random.split(jax.random.key(seed))

    @jax.jit
    def epoch(params, state, key):
        rows = jax.random.permutation(key, len(x)).reshape(-1, BATCH_SIZE)

        def step(carry, rows):
            params, state = carry
            grads = jax.grad(loss_fn)(params, (x[rows], targets[rows]))
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), rows)[0]

    @jax.jit
    def measure(params):
        guesses = jnp.argmax(apply_fn(params, test_x), axis=-1)
        return {
            "accuracy": jnp.mean(guesses == data.test_labels[:1000]),
            **variances(apply_fn, likelihood, params, test_x[: plan.inputs]),
        }

    sizes = x.shape[1], plan.width, plan.width, plan.width, 10
    params = initial_params(init_key, sizes)
    state, records = optimizer.init(params), []
    for number in range(plan.checkpoints[-1] + 1):
        if number in plan.checkpoints:
            record = jax.device_get(measure(params))
            records.append({**record, "preferred": preferences(record)})
            advance()
        key = jax.random.fold_in(order_key, number)
        params, state = epoch(params, state, key)
    return {name: [record[name] for record in records] for name in records[0]}


# Results.


def header(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what a reader needs to repeat a run."""
    packages = ("fsam_optax", "jax", "optax", "numpy", "scikit-learn")
    return {
        "command": options.command,
        "settings": {
            "smoke": options.smoke,
            "damping": options.damping,
            "toy_seeds": options.toy_seeds,
            "learning_rate": LEARNING_RATE,
            "batch_size": BATCH_SIZE,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def series(records: list[dict[str, Any]], name: str) -> np.ndarray:
    """Returns a quantity of shape (seeds, checkpoints, layers)."""
    return np.array([record[name] for record in records], float)


def average_ratio(above: np.ndarray, below: np.ndarray) -> str:
    """Returns the geometric mean of a ratio, a dash where it is of zeros."""
    if not (above > 0).all() or not (below > 0).all():
        return "-"
    return f"{np.exp(np.mean(np.log(above / below))):.2g}"


def print_tables(results: dict[str, Any]) -> None:
    """Prints how the weights wander, and the variances at the end of training."""
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    table = Table(
        title="Natural gradient descent with two weights",
        caption="Mean ± standard deviation over "
        f"{results['toy']['seeds']} seeds, each with data of its own. Wander: standard "
        "deviation of a weight over the second half of the epochs.",
        box=SIMPLE_HEAD,
    )
    for heading in ("model", "estimator"):
        table.add_column(heading)
    for heading in ("wander", "distance to the truth", "excess test loss"):
        table.add_column(heading, justify="right")
    for kind in TOYS:
        for name, title in LABELS.items():
            record = results["toy"][kind][name]
            table.add_row(
                kind,
                title,
                spread(record["wander"], ".4f"),
                spread(record["distance"], ".4f"),
                spread(record["final_excess_loss"], ".4f"),
            )
    console.print(table)

    table = Table(
        title="Variances of one drawn label, at the end of training",
        caption="Geometric means over seeds of layer means. Bound: upper bound over "
        "exact value. Relative: standard deviation over the Fisher. Preferred: share "
        "of the checkpoints after the first at which I2 varies less.",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for heading in ("data, task, activation, accuracy", "layer"):
        table.add_column(heading)
    for heading in (
        "V1",
        "V2",
        "V1\nbound",
        "V2\nbound",
        "rel.\nI1",
        "rel.\nI2",
        "I2 pre-\nferred",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for data, tasks in results["layers"].items():
        for (task, activation), records in entries(tasks):
            last = {
                name: series(records, name)[:, -1]
                for name in ("fisher", "i1", "i2", "i1_upper", "i2_upper", "accuracy")
            }
            preferred = np.array([record["preferred"] for record in records])[:, 1:]
            accuracy = f"{last['accuracy'].mean():.0%}"
            title = f"{data}, {SHORT[task]}, {activation}, {accuracy}"
            for index, layer in enumerate(LAYERS):
                v = {k: x[:, index] if x.ndim > 1 else x for k, x in last.items()}
                table.add_row(
                    "" if index else title,
                    layer[-1],
                    *(
                        average_ratio(v[k], np.ones_like(v[k])) if v[k].any() else "0"
                        for k in LABELS
                    ),
                    average_ratio(v["i1_upper"], v["i1"]),
                    average_ratio(v["i2_upper"], v["i2"]),
                    average_ratio(np.sqrt(v["i1"]), v["fisher"]),
                    average_ratio(np.sqrt(v["i2"]), v["fisher"])
                    if v["i2"].any()
                    else "0",
                    f"{np.mean(preferred[..., index] == 'i2'):.0%}",
                )
            table.add_section()
    console.print(table)


def entries(tasks: dict[str, Any]):
    """Yields ((task, activation), records of the seeds) of what is finished."""
    for task, activation in itertools.product(TASKS, ACTIVATIONS):
        if f"{task}, {activation}" in tasks:
            yield (task, activation), tasks[f"{task}, {activation}"]


def plot_toy(record: dict[str, Any], file: Path) -> None:
    """Draws one path and, for all seeds, the distance from where the weights end."""
    figure, axes = new_figure(1, 4, figsize=(11.6, 3.1))
    for column, kind in enumerate(TOYS):
        left, right = axes[2 * column], axes[2 * column + 1]
        for name, title in LABELS.items():
            data = record[kind][name]
            path = np.array(data["path"])
            left.plot(*path.T, color=COLOURS[name], lw=0.9, alpha=0.85, label=title)
            low, middle, high = np.array(data["stray"], float)
            epochs = np.arange(1, len(middle) + 1)
            right.plot(epochs, middle, color=COLOURS[name], label=title)
            right.fill_between(epochs, low, high, color=COLOURS[name], alpha=0.2, lw=0)
        left.plot(1, 1, "*", color="black", markersize=10, label="truth", zorder=5)
        left.set(title=f"{kind}: weights of one seed", xlabel=r"$\theta_1$")
        left.set_ylabel(r"$\theta_2$")
        right.set(title=f"{kind}: distance to their mean", xlabel="epoch")
        right.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    save(figure, file)


def plot_layers(
    tasks: dict[str, Any], checkpoints: tuple[int, ...], file: Path
) -> None:
    """Draws both variances and their bounds by layer and epoch."""
    found = list(entries(tasks))
    figure, axes = new_figure(
        len(found),
        len(LAYERS),
        figsize=(10.5, 2.25 * len(found) + 0.6),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for row, ((task, activation), records) in enumerate(found):
        for column, layer in enumerate(LAYERS):
            axis = axes[row, column]
            for name, title in LABELS.items():
                values, lower, upper = (
                    series(records, name + suffix)[..., column]
                    for suffix in ("", "_lower", "_upper")
                )
                if not values.any():
                    text = f"V{title[1]} = 0"
                    axis.text(0.05, 0.06, text, color=COLOURS[name], fontsize=9)
                    axis.texts[-1].set_transform(axis.transAxes)
                    continue
                middle = np.exp(np.mean(np.log(values), axis=0))
                axis.plot(
                    checkpoints,
                    middle,
                    "o-",
                    color=COLOURS[name],
                    markersize=3,
                    lw=1.8,
                    label=f"V{title[1]}, exact",
                )
                axis.fill_between(
                    checkpoints,
                    values.min(0),
                    values.max(0),
                    color=COLOURS[name],
                    alpha=0.2,
                    lw=0,
                )
                axis.plot(
                    checkpoints,
                    np.exp(np.mean(np.log(upper), axis=0)),
                    ":",
                    color=COLOURS[name],
                    lw=1.4,
                    label=f"V{title[1]}, upper bound",
                )
                if lower.any():
                    low = np.exp(np.mean(np.log(lower), axis=0))
                    axis.plot(checkpoints, low, ":", color=COLOURS[name])
            axis.set_yscale("log")
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xticks(checkpoints, [str(c) for c in checkpoints])
            axis.minorticks_off()
            axis.grid(alpha=0.2)
            if not row:
                axis.set_title(layer)
            if row == len(found) - 1:
                axis.set_xlabel("epoch")
            if not column:
                axis.set_ylabel(f"{task},\n{activation}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.supylabel(
        "variance for one label, mean over the layer", fontsize=9, color=MUTED
    )
    save(figure, file)


# Command line.


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder of MNIST, which is left out otherwise")
    add("--damping", type=float, default=0.01, help="of the natural gradient")
    add("--toy-seeds", type=int, default=20)
    add("--out", type=Path, default=HERE, help="holds the folders results and figures")
    add("--smoke", action="store_true", help="a little of everything, for CI")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.toy_seeds = 2
    options.command = shlex.join(
        ["python", "benchmarks/fisher_variance.py", *arguments]
    )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing in the results, then prints and draws everything."""
    options = parse(arguments)
    plans = {"digits": SMOKE} if options.smoke else dict(PLANS)
    if options.data_dir is None:
        plans.pop("mnist", None)
    file = options.out / "results" / "fisher_variance.json"
    results = resume({**header(options), "layers": {}}, file)
    if "toy" not in results:
        messages.print("Part: toy.")
        results = write({**results, "toy": toy(options)}, file)
    with progress_bars() as progress:
        for name, plan in plans.items():
            try:
                data = datasets.load(name, options.data_dir or Path())
            except FileNotFoundError as error:
                raise SystemExit(str(error)) from None
            done = results["layers"].setdefault(name, {})
            pairs = list(itertools.product(TASKS, ACTIVATIONS))
            # In smoke mode, each task and each activation once.
            for task, activation in pairs[::3] if options.smoke else pairs:
                title = f"{task}, {activation}"
                if title in done:
                    continue
                total = plan.seeds * len(plan.checkpoints)
                bar = progress.add_task(title, total=total, note=name)
                advance = functools.partial(progress.advance, bar)
                done[title] = [
                    train(data, plan, task, activation, seed, advance)
                    for seed in range(plan.seeds)
                ]
                results = write(results, file)
                done = results["layers"][name]
    print_tables(results)
    figures = options.out / "figures"
    plot_toy(results["toy"], figures / "fisher_variance_toy.png")
    for name, tasks in results["layers"].items():
        checkpoints = (plans if name in plans else PLANS)[name].checkpoints
        suffix = "" if name == "digits" else f"_{name}"
        plot_layers(tasks, checkpoints, figures / f"fisher_variance{suffix}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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

Variances are those of one drawn label per input, averaged over inputs and over the
parameters of a layer; an estimate from N inputs with S labels each has 1/(N S) of them.
They are computed in closed form: the paper drew 5000 labels for the same quantities.
"""

import itertools
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import harness
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
import show

import fsam_optax as fsam
from fsam_optax import variance


COLOURS = {"i1": show.BLUE, "i2": show.VERMILLION}
LABELS = {"i1": "I1", "i2": "I2"}
SHORT = {"classification": "class.", "regression": "regr."}
LAYERS = ("layer 1", "layer 2", "layer 3", "layer 4")
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}
TASKS = {"classification": fsam.categorical, "regression": fsam.gaussian()}


# 1. Natural gradient descent with two weights.

TOYS = {"linear": fsam.gaussian(), "logistic": fsam.bernoulli}
TRUTH = jnp.ones(2)
TRAIN, TEST, BATCH, EPOCHS, RATE = 256, 4096, 4, 256, 0.01


def linear_model(w: jax.Array, x: jax.Array) -> jax.Array:
    """Returns one natural parameter for each example."""
    return (x @ w)[:, None]


def descend(kind: str, name: str, damping: float, epochs: int, key: jax.Array):
    """Trains on data of its own, drawn from the model.

    Returns weights and excess test loss, over that of the true ones, after each epoch.
    """
    likelihood = TOYS[kind]
    data_key, label_key, estimator_key, order_key = jax.random.split(key, 4)
    x = jax.random.normal(data_key, (TRAIN + TEST, 2))
    y = likelihood.sample(label_key, linear_model(TRUTH, x))
    loss_fn = fsam.negative_log_likelihood(linear_model, likelihood)
    make = {"i1": fsam.fisher_i1, "i2": fsam.fisher_i2}[name]
    estimator = make(loss_fn, key=estimator_key)
    precondition = fsam.scale_by_inverse_fisher(estimator, damping=damping)
    optimizer = optax.chain(precondition, optax.scale_by_learning_rate(RATE))

    def epoch(carry, key):
        rows = jax.random.permutation(key, TRAIN).reshape(-1, BATCH)
        w, state = perceptron.follow(loss_fn, optimizer, carry, (x[rows], y[rows]))
        test = x[TRAIN:], y[TRAIN:]
        return (w, state), (w, loss_fn(w, test) - loss_fn(TRUTH, test))

    w = jnp.zeros(2)
    keys = jax.random.split(order_key, epochs)
    return jax.lax.scan(epoch, (w, optimizer.init(w)), keys)[1]


def toy(name: str, kind: str, damping: float, epochs: int, seeds: int) -> Any:
    """Runs one estimator on one model."""
    keys = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    run = partial(descend, kind, name, damping, epochs)
    paths, losses = jax.jit(jax.vmap(run))(keys)
    late = paths[:, epochs // 2 :]
    centre = jnp.mean(late, axis=1, keepdims=True)
    strays = jnp.linalg.norm(paths - centre, axis=-1)
    return {
        "path": paths[0],
        # From where it ends up, of the seeds: tenth, half and nine tenths.
        "stray": jnp.quantile(strays, jnp.array([0.1, 0.5, 0.9]), axis=0),
        "wander": jnp.sqrt(jnp.mean(jnp.var(late, axis=1), axis=-1)),
        "distance": jnp.linalg.norm(centre[:, 0] - TRUTH[None], axis=-1),
        "final_excess_loss": losses[:, -1],
    }


# 2. Variances by layer.


class Plan(NamedTuple):
    """How a network is trained and where its variances are computed."""

    width: int  # of each of three hidden layers
    examples: int  # training images
    checkpoints: tuple[int, ...]  # epochs at which to compute the variances
    inputs: int  # test images to average over
    seeds: int  # networks of each kind


PLANS = {
    "digits": Plan(32, 1000, (0, 1, 2, 4, 8, 16, 32, 64), 32, 3),
    "mnist": Plan(16, 10_000, (0, 1, 4, 16), 32, 2),
}
SMOKE = Plan(3, 100, (0, 1), 4, 1)
BATCH_SIZE, LEARNING_RATE = 50, 0.005


def by_layer(tree: Any) -> jax.Array:
    """Returns the mean over the parameters of each layer, of shape (layers,)."""
    flat = [jax.flatten_util.ravel_pytree(layer)[0] for layer in tree]
    return jnp.stack([jnp.mean(layer) for layer in flat])


def variances(loss, params, inputs) -> dict[str, Any]:
    """Returns F, V1, V2 and their bounds, as means over each layer."""
    args = loss.apply_fn, loss.likelihood, params, inputs
    bounds = variance.fisher_variance_i1_bounds, variance.fisher_variance_i2_bounds
    i1, i2 = (fn(*args) for fn in bounds)
    trees = {
        "fisher": fsam.diagonal(fsam.fisher_exact(loss), params, (inputs, None)),
        "i1": variance.fisher_variance_i1(*args),
        "i2": variance.fisher_variance_i2(*args),
        **{"i1_upper": i1.upper, "i1_lower": i1.lower},
        **{"i2_upper": i2.upper, "i2_lower": i2.lower},
    }
    return {name: by_layer(tree) for name, tree in trees.items()}


def preferences(record: dict[str, Any]) -> list[str]:
    """Returns "i1" or "i2" for each layer, by `fsam_optax.variance.prefer`."""
    i1, i2 = (dict(zip(LAYERS, np.array(record[n]), strict=True)) for n in LABELS)
    best = variance.prefer({name: name for name in LAYERS}, i1, i2)
    return [best[name] for name in LAYERS]


def train(seed: int, data, plan: Plan, task: str, activation: str) -> dict[str, Any]:
    """Trains a network, with stops to compute its variances.

    Returns lists over the checkpoints: accuracy on the test images, and `variances`.
    """
    apply_fn = partial(perceptron.apply, activation=ACTIVATIONS[activation])
    (x, y), (test_x, test_y) = perceptron.split(data())
    x, y = x[: plan.examples], jnp.asarray(y[: plan.examples])
    targets = jax.nn.one_hot(y, 10) if task == "regression" else y
    loss_fn = fsam.negative_log_likelihood(apply_fn, TASKS[task])
    optimizer = optax.adam(LEARNING_RATE)
    init_key, order_key = jax.random.split(jax.random.key(seed))

    @jax.jit
    def epoch(carry, key):
        rows = jax.random.permutation(key, len(x)).reshape(-1, BATCH_SIZE)
        return perceptron.follow(loss_fn, optimizer, carry, (x[rows], targets[rows]))

    @jax.jit
    def measure(params):
        guesses = jnp.argmax(apply_fn(params, test_x[:1000]), axis=-1)
        found = variances(loss_fn, params, test_x[: plan.inputs])
        return {"accuracy": jnp.mean(guesses == test_y[:1000]), **found}

    sizes = x.shape[1], *(plan.width,) * 3, 10
    params = perceptron.initial(init_key, sizes, jax.nn.initializers.glorot_normal())
    carry, records = (params, optimizer.init(params)), []
    for number in range(plan.checkpoints[-1] + 1):
        if number in plan.checkpoints:
            record = jax.device_get(measure(carry[0]))
            records.append({**record, "preferred": preferences(record)})
        carry = epoch(carry, jax.random.fold_in(order_key, number))
    return {name: [record[name] for record in records] for name in records[0]}


# Results.


def series(records: list[dict[str, Any]], name: str) -> np.ndarray:
    """Returns a quantity of shape (seeds, checkpoints, layers)."""
    return np.array([record[name] for record in records], float)


def ratio(above: np.ndarray, below: np.ndarray) -> str:
    """Returns the geometric mean of a ratio, a dash where it has no sense."""
    if not above.any() and below.all():
        return "0"
    if not (above > 0).all() or not (below > 0).all():
        return "-"
    return f"{np.exp(np.mean(np.log(above / below))):.2g}"


def print_tables(toys: dict[str, Any], layers: dict[str, Any]) -> None:
    """Prints how the weights wander, and the variances at the end of training."""
    keys = "wander", "distance", "final_excess_loss"
    rows = [
        [kind, LABELS[name], *(show.cell(record[key], ".4f") for key in keys)]
        for kind, by_name in toys.items()
        for name, record in by_name.items()
    ]
    headings = ["model", "I", "wander", "distance to\nthe truth", "excess\ntest loss"]
    caption = "Mean ± standard error over seeds with data of their own. Wander: "
    caption += "standard deviation of a weight over the second half of the epochs."
    title = "Natural gradient descent with two weights"
    show.table(title, headings, rows, caption)
    rows = []
    for data, tasks in layers.items():
        for (task, activation), records in tasks.items():
            names = "fisher", "i1", "i2", "i1_upper", "i2_upper"
            last = {name: series(records, name)[:, -1] for name in names}
            preferred = np.array([record["preferred"] for record in records])[:, 1:]
            accuracy = series(records, "accuracy")[:, -1].mean()
            title = f"{data}, {SHORT[task]}, {activation}, {accuracy:.0%}"
            for index, layer in enumerate(LAYERS):
                v = {name: values[:, index] for name, values in last.items()}
                cells = [ratio(v[name], np.ones_like(v[name])) for name in LABELS]
                cells += [ratio(v[f"{name}_upper"], v[name]) for name in LABELS]
                cells += [ratio(np.sqrt(v[name]), v["fisher"]) for name in LABELS]
                cells += [f"{np.mean(preferred[..., index] == 'i2'):.0%}"]
                rows.append(["" if index else title, layer[-1], *cells])
    headings = ["data, task, activation, accuracy", "layer", "V1", "V2", "V1\nbound"]
    headings += ["V2\nbound", "rel.\nI1", "rel.\nI2", "I2 pre-\nferred"]
    caption = (
        "Geometric means over seeds of layer means. Bound: upper bound over exact "
    )
    caption += "value. Relative: standard deviation over the Fisher. Preferred: share "
    caption += "of the checkpoints after the first at which I2 varies less."
    title = "Variances of one drawn label, at the end of training"
    show.table(title, headings, rows, caption, first=33)


def plot_toy(record: dict[str, Any], file: Path) -> None:
    """Draws one path and, for all seeds, the distance from where the weights end."""
    headline = "I2 gives the steadier path"
    figure, axes = show.figure(1, 4, headline, figsize=(11.6, 3.6))
    axes = axes[0]
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
    show.legend(figure, axes[0], 3)
    show.save(figure, file)


def plot_layers(tasks: dict[Any, Any], checkpoints: Any, file: Path) -> None:
    """Draws both variances and their bounds by layer and epoch."""
    headline = "The last layer calls for I2; below it, I1 varies less at first"
    shared = {
        "figsize": (10.5, 2.25 * len(tasks) + 0.8),
        "sharex": True,
        "sharey": "row",
    }
    figure, axes = show.figure(len(tasks), len(LAYERS), headline, **shared)
    for row, ((task, activation), records) in enumerate(tasks.items()):
        for column, axis in enumerate(axes[row]):
            for name, title in LABELS.items():
                color = COLOURS[name]
                values = series(records, name)[..., column]
                if not values.any():
                    place = {"transform": axis.transAxes, "fontsize": 9}
                    axis.text(0.05, 0.06, f"V{title[1]} = 0", color=color, **place)
                    continue
                low, high = values.min(0), values.max(0)
                axis.fill_between(checkpoints, low, high, color=color, alpha=0.2, lw=0)
                for suffix, style in (("", "o-"), ("_upper", ":"), ("_lower", ":")):
                    curve = series(records, name + suffix)[..., column]
                    if curve.any():
                        middle = np.exp(np.mean(np.log(curve), axis=0))
                        label = {"": "exact", "_upper": "upper bound"}.get(suffix)
                        label = label and f"V{title[1]}, {label}"
                        look = {"color": color, "ms": 3, "label": label}
                        axis.plot(checkpoints, middle, style, **look)
            axis.set_yscale("log")
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xticks(checkpoints, [str(c) for c in checkpoints])
            axis.minorticks_off()
        axes[row, 0].set_ylabel(f"{task},\n{activation}")
    for layer, top, bottom in zip(LAYERS, axes[0], axes[-1], strict=True):
        top.set_title(layer)
        bottom.set_xlabel("epoch")
    show.legend(figure, axes[0, 0], 4)
    figure.supylabel("variance for one label, mean over the layer", fontsize=9)
    show.save(figure, file)


@harness.experiment(
    smoke={"toy_seeds": 2},
    data_dir={"type": Path, "help": "folder of MNIST, which is left out otherwise"},
    damping={"default": 0.01, "help": "of the natural gradient"},
    toy_seeds=20,
)
def main(run: harness.Run) -> None:
    options = run.options
    plans = {"digits": SMOKE} if options.smoke else dict(PLANS)
    if options.data_dir is None:
        plans.pop("mnist", None)
    of_toy = {"damping": options.damping, "epochs": 4 if options.smoke else EPOCHS}
    of_toy["seeds"] = options.toy_seeds
    toys = {}
    for kind in TOYS:
        args, key = (toy, kind, *of_toy.values()), {"part": "toy", "model": kind}
        toys[kind] = run.each("estimator", LABELS, *args, **key, **of_toy)
    layers = {}
    # In smoke mode, each task and each activation once.
    pairs = [*itertools.product(TASKS, ACTIVATIONS)][:: 3 if options.smoke else 1]
    for name, plan in plans.items():
        data = cache(partial(datasets.load, name, options.data_dir or Path()))
        about = {"data": name, "plan": plan._asdict()}
        for task, activation in pairs:
            key = {"task": task, "activation": activation, **about}
            args = train, data, plan, task, activation
            found = run.each("seed", range(plan.seeds), *args, **key)
            layers.setdefault(name, {})[task, activation] = [*found.values()]
    print_tables(toys, layers)
    plot_toy(toys, run.picture("_toy"))
    for name, tasks in layers.items():
        suffix = "" if name == "digits" else f"_{name}"
        plot_layers(tasks, plans[name].checkpoints, run.picture(suffix))


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: which estimator of the Fisher diagonal varies less, and in which layer?

The experiment of Soen and Sun, Tradeoffs of Diagonal Fisher Information Matrix
Estimators, 2024, https://arxiv.org/abs/2402.05379: the exact variances V1 and V2, over
the labels, of the squared score (I1) and of minus the Hessian diagonal of the
log-likelihood (I2), and their upper bounds, layer by layer while a small network
trains: sigmoid or softplus, classification or regression on the same labels as one-hot
vectors. Variances are those of one drawn label per input, averaged over inputs and over
the parameters of a layer; an estimate from N inputs with S labels each has 1/(N S) of
them. They are computed in closed form: the paper drew 5000 labels.

    python benchmarks/fisher_variance.py
"""

import itertools
from functools import partial
from typing import Any

import datasets
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
import show
from jax.flatten_util import ravel_pytree

import fsam_optax as fsam
from fsam_optax import variance


LAYERS = 4
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}
TASKS = {"classification": fsam.categorical, "regression": fsam.gaussian()}
BATCH_SIZE, LEARNING_RATE = 50, 0.005
# Units a hidden layer, training images, epochs and test images at which variances are
# computed, and networks of each kind.
PLAN: dict[str, Any] = {"width": 32, "examples": 1000, "inputs": 32, "seeds": 3}
PLAN |= {"checkpoints": (0, 1, 2, 4, 8, 16, 32, 64)}
SMOKE = {"width": 3, "examples": 100, "checkpoints": (0, 1), "inputs": 4, "seeds": 1}


def train(seed, data, plan, task, activation):
    """Trains a network; returns accuracy, F, V1, V2 and bounds at each checkpoint."""
    apply_fn = partial(perceptron.apply, activation=ACTIVATIONS[activation])
    (x, y), (test_x, test_y) = data
    x, y = x[: plan["examples"]], jnp.asarray(y[: plan["examples"]])
    targets = jax.nn.one_hot(y, 10) if task == "regression" else y
    loss = fsam.negative_log_likelihood(apply_fn, TASKS[task])
    optimizer, inputs = optax.adam(LEARNING_RATE), test_x[: plan["inputs"]]
    init_key, order_key = jax.random.split(jax.random.key(seed))

    @jax.jit
    def epoch(carry, key):
        rows = jax.random.permutation(key, len(x)).reshape(-1, BATCH_SIZE)
        return perceptron.follow(loss, optimizer, carry, (x[rows], targets[rows]))

    @jax.jit
    def measure(params):
        args = apply_fn, TASKS[task], params, inputs
        trees = {
            "fisher": fsam.diagonal(fsam.fisher_exact(loss), params, (inputs, None)),
            "i1": variance.fisher_variance_i1(*args),
            "i2": variance.fisher_variance_i2(*args),
            "i1_upper": variance.fisher_variance_i1_bounds(*args).upper,
            "i2_upper": variance.fisher_variance_i2_bounds(*args).upper,
        }
        means = {
            name: jnp.stack([jnp.mean(ravel_pytree(layer)[0]) for layer in tree])
            for name, tree in trees.items()
        }
        right = jnp.argmax(apply_fn(params, test_x), axis=-1) == test_y
        return {"accuracy": jnp.mean(right), **means}

    sizes = x.shape[1], *(plan["width"],) * (LAYERS - 1), 10
    params = perceptron.initial(init_key, sizes, jax.nn.initializers.glorot_normal())
    carry, records = (params, optimizer.init(params)), []
    for number in range(plan["checkpoints"][-1] + 1):
        if number in plan["checkpoints"]:
            records.append(jax.device_get(measure(carry[0])))
        carry = epoch(carry, jax.random.fold_in(order_key, number))
    return {name: [record[name] for record in records] for name in records[0]}


def ratio(above, below=None):
    """Returns the geometric mean at the end of training, 0 over zeros."""
    values = above[:, -1] / (1 if below is None else np.maximum(below[:, -1], 1e-30))
    return f"{np.exp(np.mean(np.log(values))):.2g}" if values.all() else "0"


COLUMNS: show.Columns = {
    "network, accuracy: layer": lambda name, _: name,
    "V1": lambda _, v: ratio(v["i1"]),
    "V2": lambda _, v: ratio(v["i2"]),
    "V1\nbound": lambda _, v: ratio(v["i1_upper"], v["i1"]),
    "V2\nbound": lambda _, v: ratio(v["i2_upper"], v["i2"]),
    "rel.\nI1": lambda _, v: ratio(v["i1"] ** 0.5, v["fisher"]),
    "rel.\nI2": lambda _, v: ratio(v["i2"] ** 0.5, v["fisher"]),
    "V2\nless": lambda _, v: f"{np.mean(v['i2'][:, 1:] < v['i1'][:, 1:]):.0%}",
}


def draw(layers, checkpoints, file):
    """Draws both variances and their bounds by layer and epoch, a network a row."""
    headline = "V2 is 0 in the last layer; below it, V1 is less at first"
    rows = len(layers) // LAYERS
    size = {"figsize": (10.5, 2.25 * rows + 0.8), "sharex": True, "sharey": "row"}
    figure, axes = show.figure(rows, LAYERS, headline, **size)
    for axis, (name, values) in zip(axes.flat, layers.items(), strict=True):
        for of, color in (("i1", show.BLUE), ("i2", show.VERMILLION)):
            for suffix, style in (("", "o-"), ("_upper", ":")):
                if values[of].all():
                    middle = np.exp(np.mean(np.log(values[of + suffix]), axis=0))
                    label = f"V{of[1]}" + ", upper bound" * bool(suffix)
                    look = {"color": color, "ms": 3, "label": label}
                    axis.plot(checkpoints, middle, style, **look)
        axis.set_title(name, fontsize=8)
        axis.set(xscale="symlog", yscale="log")
        axis.set_xticks(checkpoints, [str(c) for c in checkpoints])
    show.legend(figure, axes[0, 0], 4)
    figure.supylabel("variance for one label, mean over the layer, by epoch")
    show.save(figure, file)


@harness.experiment()
def main(run: harness.Run) -> None:
    plan, smoke = (SMOKE, 3) if run.options.smoke else (PLAN, 1)
    data, layers = perceptron.split(datasets.load("digits")), {}
    # In smoke mode, each task and each activation once.
    for task, activation in [*itertools.product(TASKS, ACTIVATIONS)][::smoke]:
        key = {"data": "digits", "plan": plan, "task": task, "activation": activation}
        args = range(plan["seeds"]), train, data, plan, task, activation
        found = run.each("seed", *args, **key).values()
        accuracy = np.mean([facts["accuracy"][-1] for facts in found])
        for at in range(LAYERS):
            layers[f"{task}, {activation} {accuracy:.0%}: {at + 1}"] = {
                of: np.array([facts[of] for facts in found], float)[..., at]
                for of in ("fisher", "i1", "i2", "i1_upper", "i2_upper")
            }
    title = "Variances of one drawn label, at the end of training"
    caption = "Bound: over V. Rel.: deviation over F. Less: share of later checkpoints."
    show.report(title, layers, COLUMNS, caption)
    draw(layers, plan["checkpoints"], run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

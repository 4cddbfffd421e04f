"""Question: what changes when the same network is trained with SAM, ASAM or Fisher SAM?

Three hundred of scikit-learn's handwritten digits train a small convolutional network;
797 others test it. All methods spend the same number of gradients, so that the base
optimizer runs twice as many epochs. A typical printout (CPU, default arguments):

                                     digits, cnn, sgd

                 learn.           step       test        test train  rise  rise   rise
     method        rate rho grads time accuracy %        loss  loss   SAM  ASAM Fisher
     ─────────────────────────────────────────────────────────────────────────────────
     base       0.00625   -   800 1.00 90.0 ± 0.9 0.44 ± 0.01 0.006 0.020 0.005  0.013
     SAM           0.05 0.2   800 1.96 92.8 ± 1.3 0.36 ± 0.06 0.000 0.002 0.000  0.001
     ASAM        0.0125   2   800 2.09 92.3 ± 0.6 0.34 ± 0.04 0.001 0.028 0.002  0.011
     Fisher SAM 0.00625 0.1   800 2.17 90.3 ± 1.2 0.38 ± 0.01 0.013 0.095 0.011  0.042

    Number of seeds: 3; mean ± standard deviation. Rise: the training loss at Euclidean
    distance 0.5 along the ascent direction of each geometry, minus the training loss.

SAM and ASAM gain two to three points of accuracy over the base optimizer, which ends
overfitted: its test loss rises from the first quarter of the run on. Fisher SAM, here
with the squared batch gradient in place of the Fisher information, gains in test loss
only. The flattest network is SAM's and the sharpest is Fisher SAM's, which tests better
than the base network all the same: the rise at equal Euclidean distance is not
invariant to the scale of the weights and does not order the methods.

Three seeds cannot resolve a point of accuracy; ask for more with --seeds. Learning
rates and radii were chosen by --tune --seeds 6: the least loss on a random fifth of the
300 training images, after training on the other four fifths, with other seeds than
those above. The test images took no part. Every method had two rounds of ten runs, the
second from where the first ended: ten learning rates for base, five learning rates and
then five radii for the others.

The folder --out receives `results.json` with all settings, versions and curves, and a
picture of the learning curves and of the loss around the trained networks.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fsam_optax


GEOMETRIES: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "sam": fsam_optax.euclidean_ball,
    "asam": fsam_optax.adaptive_ellipsoid,
    "fisher_sam": partial(
        fsam_optax.fisher_ellipsoid, estimator=fsam_optax.squared_gradient()
    ),
}
METHODS = ("base", *GEOMETRIES)
TITLES = {"base": "base", "sam": "SAM", "asam": "ASAM", "fisher_sam": "Fisher SAM"}
GRADIENTS_PER_STEP = {"base": 1, "sam": 2, "asam": 2, "fisher_sam": 2}

LEARNING_RATE = {"sgd": 0.05, "adamw": 1e-3}
# The radii of the three papers.
RHO = {"sam": 0.05, "asam": 0.5, "fisher_sam": 0.1}
# Few images, so that there is something to overfit.
DIGITS = {"train_size": 300, "batch_size": 30, "augment": False}
# Chosen by --tune.
DIGITS_LEARNING_RATE = {
    "base": 0.00625,
    "sam": 0.05,
    "asam": 0.0125,
    "fisher_sam": 0.00625,
}
DIGITS_RHO = {"sam": 0.2, "asam": 2.0, "fisher_sam": 0.1}

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLORS = {
    "base": "#000000",
    "sam": "#0072B2",
    "asam": "#D55E00",
    "fisher_sam": "#009E73",
}
STYLES = {"base": "-", "sam": "--", "asam": "-.", "fisher_sam": (0, (1, 1))}

EXAMPLES = """examples:
  the digits, four methods, three seeds:
    python benchmarks/generalization.py
  two methods and more seeds, in a folder of its own:
    python benchmarks/generalization.py --methods base sam --seeds 10 --out results/ten
  choose learning rates and radii on held-out training images, then use them:
    python benchmarks/generalization.py --data mnist --train-size 1000 --tune
    python benchmarks/generalization.py --data mnist --train-size 1000 --rho sam=0.1
  a residual network on CIFAR-10, best on a GPU:
    python benchmarks/generalization.py --data cifar10 --model resnet --epochs 100
  everything once, in seconds:
    python benchmarks/generalization.py --smoke --out results/smoke

Ctrl-C keeps the methods that are finished; the same command goes on from there.
"""

messages = Console(stderr=True)


class Problem(NamedTuple):
    """Everything that all methods share. The leading axis of a field may be seeds.

    Attributes:
        model: The network.
        mean: Mean of the training images per channel.
        std: Standard deviation, likewise.
        shift: Largest random translation in pixels.
        flip: Whether to mirror images at random.
        images: Training images, shape (examples, height, width, channels).
        labels: Training labels, noise included, shape (seeds, examples).
        rows: The examples trained on, shape (seeds, used).
        test_images: Images for evaluation.
        test_labels: Their labels, shape (test examples,).
        test_rows: The examples evaluated on, shape (seeds, tested).
        keys: One key a seed.
        variables: Initial parameters and BatchNorm statistics of each seed.
    """

    model: nn.Module
    mean: np.ndarray
    std: np.ndarray
    shift: int
    flip: bool
    images: jax.Array
    labels: jax.Array
    rows: jax.Array
    test_images: jax.Array
    test_labels: jax.Array
    test_rows: jax.Array
    keys: jax.Array
    variables: tuple[Any, Any]


class Lane(NamedTuple):
    """What the training of one seed carries from step to step."""

    params: Any
    stats: Any
    optimizer: optax.OptState
    perturbation: Any


# Data.


def make_problem(options: argparse.Namespace, *, tune: bool = False) -> Problem:
    """Reads the data, adds label noise and moves both to the device.

    Args:
        options: Command line.
        tune: Hold out a fifth of the training images, a different fifth for each
            seed, in place of the test set.
    """
    data = datasets.load(options.data, options.data_dir)
    order = np.random.default_rng(0).permutation(len(data.train_labels))
    order = order[: options.train_size]
    images, labels = data.train_images[order], data.train_labels[order]
    mean, std = datasets.moments(images)

    noisy, rows, held_out = [], [], []
    # Other seeds for tuning than for the run that it serves.
    seeds = [seed + 1000 * tune for seed in range(options.seeds)]
    for seed in seeds:
        random = np.random.default_rng(seed)
        wrong = random.random(len(labels)) < options.label_noise
        other = (labels + random.integers(1, 10, len(labels))) % 10
        noisy.append(np.where(wrong, other, labels))
        split = random.permutation(len(labels))
        first = len(labels) // 5 if tune else 0
        held_out.append(split[:first])
        rows.append(split[first:])
    tested = min(options.test_size or len(data.test_labels), len(data.test_labels))
    every_test_row = [np.arange(tested)] * options.seeds
    if options.batch_size > len(rows[0]):
        raise SystemExit(
            f"--batch-size {options.batch_size} is more than the {len(rows[0])} "
            "training images"
        )
    model = models.MODELS[options.model]()
    keys = [jax.random.key(seed) for seed in seeds]
    return Problem(
        model=model,
        mean=mean,
        std=std,
        shift=data.shift if options.augment else 0,
        flip=data.flip and options.augment,
        images=jnp.asarray(images),
        labels=jnp.asarray(np.stack(noisy), jnp.int32),
        rows=jnp.asarray(np.stack(rows)),
        test_images=jnp.asarray(images if tune else data.test_images),
        test_labels=jnp.asarray(labels if tune else data.test_labels),
        test_rows=jnp.asarray(np.stack(held_out if tune else every_test_row)),
        keys=jnp.stack(keys),
        variables=initial_variables(model, keys, images.shape[1:]),
    )


def initial_variables(
    model: nn.Module, keys: Sequence[jax.Array], shape: tuple[int, ...]
) -> tuple[Any, Any]:
    """Returns the parameters and BatchNorm statistics of all seeds, stacked."""

    # One seed a call: under vmap this program takes several times as long to compile.
    @jax.jit
    def init(key):
        variables = model.init(key, jnp.zeros((1, *shape)))
        stats = {name: variables[name] for name in variables if name != "params"}
        return variables["params"], stats

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(init, keys))


def standardize(problem: Problem, images: jax.Array) -> jax.Array:
    """Maps bytes to floats of zero mean and unit variance."""
    mean, std = np.array([problem.mean, problem.std], np.float32)[:, None, None, None]
    return (images / 255 - mean) / std


def augment(problem: Problem, key: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts and mirrors each image of a batch at random; black comes in at the rim."""
    shift, (batch, height, width, _) = problem.shift, images.shape
    shift_key, flip_key = jax.random.split(key)
    if shift:
        padding = ((0, 0), (shift, shift), (shift, shift), (0, 0))
        corners = jax.random.randint(shift_key, (batch, 2), 0, 2 * shift + 1)
        rows = corners[:, :1] + jnp.arange(height)[None]
        columns = corners[:, 1:] + jnp.arange(width)[None]
        crop = jax.vmap(lambda image, i, j: image[i][:, j])
        images = crop(jnp.pad(images, padding), rows, columns)
    if problem.flip:
        mirror = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        images = jnp.where(mirror, images[:, :, ::-1], images)
    return images


# Training.


def gradient_oracle(method: str, rho: jax.typing.ArrayLike, loss_fn: Callable):
    """Returns `init(params)` and `apply(params, state, *args)` of the method."""
    if method == "base":
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        return lambda params: (), lambda params, state, *args: (
            *value_and_grad(params, *args),
            state,
        )
    oracle = fsam_optax.value_and_grad(loss_fn, GEOMETRIES[method](rho), has_aux=True)
    return oracle.init, oracle


def epochs_of(method: str, options: argparse.Namespace) -> int:
    """Returns the number of epochs that makes all methods spend the same gradients."""
    return options.epochs * 2 // GRADIENTS_PER_STEP[method]


def make_training(method: str, problem: Problem, options: argparse.Namespace):
    """Returns jitted `init(variables, rho, rate)` and `epoch(lanes, keys, rho, ...)`.

    Both treat all seeds at once by `vmap`. For a small network that is faster than one
    seed after the other, on CPU by about a third: the matrix products of the seeds
    become one batched product and the cost of a loop step is paid once.
    """
    model, batch_size = problem.model, options.batch_size
    steps = problem.rows.shape[1] // batch_size
    total_steps = epochs_of(method, options) * steps

    def loss_fn(params, batch, stats):
        images, labels = batch
        logits, stats = model.apply(
            {"params": params, **stats}, images, train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, labels).mean(), stats

    def make_optimizer(rate):
        schedule = optax.cosine_decay_schedule(1.0, total_steps)
        if options.optimizer == "adamw":
            return optax.adamw(
                lambda count: rate * schedule(count), weight_decay=options.weight_decay
            )
        return optax.chain(
            optax.add_decayed_weights(options.weight_decay),
            optax.sgd(lambda count: rate * schedule(count), momentum=0.9),
        )

    def init(variables, rho, rate):
        params, stats = variables
        oracle_init, _ = gradient_oracle(method, rho, loss_fn)
        optimizer = make_optimizer(rate)
        return Lane(params, stats, optimizer.init(params), oracle_init(params))

    def epoch(lane, key, rho, rate, images, labels, rows):
        optimizer = make_optimizer(rate)
        _, oracle = gradient_oracle(method, rho, loss_fn)
        order_key, augment_key = jax.random.split(key)
        steps = len(rows) // batch_size
        rows = jax.random.permutation(order_key, rows)[: steps * batch_size]

        def step(lane, inputs):
            rows, key = inputs
            batch = augment(problem, key, images[rows])
            (loss, stats), grads, oracle_state = oracle(
                lane.params,
                lane.perturbation,
                (standardize(problem, batch), labels[rows]),
                lane.stats,
            )
            updates, state = optimizer.update(grads, lane.optimizer, lane.params)
            params = optax.apply_updates(lane.params, updates)
            # The base method has no perturbation and therefore no sharpness.
            sharpness = optax.tree.get(oracle_state, "sharpness", jnp.nan)
            return Lane(params, stats, state, oracle_state), (loss, sharpness)

        keys = jax.random.split(augment_key, steps)
        lane, logs = jax.lax.scan(step, lane, (rows.reshape(steps, -1), keys))
        return lane, jax.tree.map(jnp.mean, logs)

    return (
        jax.jit(jax.vmap(init, in_axes=(0, None, None))),
        jax.jit(jax.vmap(epoch, in_axes=(0, 0, None, None, None, 0, 0))),
    )


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


# Evaluation.


def mean_metrics(problem: Problem, variables, images, labels, rows):
    """Returns the mean loss and accuracy over `rows`, BatchNorm statistics fixed."""
    params, stats = variables

    # Rematerialized, so that its gradient over a whole data set fits into memory.
    @jax.checkpoint
    def example(row):
        image = standardize(problem, images[row][None])
        logits = problem.model.apply({"params": params, **stats}, image)[0]
        label = labels[row]
        return cross_entropy(logits, label), jnp.argmax(logits) == label

    loss, correct = jax.lax.map(example, rows, batch_size=min(1000, len(rows)))
    return loss.mean(), correct.mean()


def ascent_profile(
    problem: Problem, options: argparse.Namespace, variables, labels, rows
) -> dict[str, Any]:
    """Measures how the training loss of a trained network rises under perturbation.

    Returns:
        A dictionary: the training loss; the rise of the loss at `options.radius` along
        the ascent direction of each geometry, all at the same Euclidean norm; and the
        loss at each of `radii(options)` along the gradient.
    """
    params, stats = variables

    def loss_at(params):
        return mean_metrics(problem, (params, stats), problem.images, labels, rows)[0]

    loss, grads = jax.value_and_grad(loss_at)(params)

    def unit_direction(geometry):
        ball = geometry(1.0)
        eps, _ = ball.update(grads, ball.init(params), params)
        return optax.tree.scale(1 / optax.tree.norm(eps), eps)

    # One loop over all points, so that the network is compiled once.
    directions = [unit_direction(geometry) for geometry in GEOMETRIES.values()]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    line = radii(options)
    which = jnp.append(jnp.arange(len(GEOMETRIES)), jnp.zeros(len(line), int))
    distance = jnp.append(jnp.full(len(GEOMETRIES), options.radius), line)

    def loss_along(point):
        which, distance = point
        direction = jax.tree.map(lambda leaf: leaf[which], stacked)
        return loss_at(optax.tree.add_scale(params, distance, direction))

    losses = jax.lax.map(loss_along, (which, distance))
    return {
        "train_loss": loss,
        "rise": dict(zip(GEOMETRIES, losses - loss, strict=False)),
        "loss_along_gradient": losses[len(GEOMETRIES) :],
    }


def radii(options: argparse.Namespace) -> jax.Array:
    """Returns the signed Euclidean radii of the loss profile."""
    return jnp.linspace(-1.5, 1.5, 31) * options.radius


def time_ratio(first: Callable, second: Callable, repeats: int) -> float:
    """Returns the median time of `first()` over that of `second()`, run in turns."""
    times = ([], [])
    for repeat in range(repeats + 1):
        for run, record in zip((first, second), times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:  # the first one compiles
                record.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


class Evaluation(NamedTuple):
    """Jitted measurements, compiled once for all methods.

    Attributes:
        test: Maps lanes to the test loss and accuracy of each.
        profile: Maps lanes to `ascent_profile` of each.
    """

    test: Callable
    profile: Callable


def make_evaluation(problem: Problem, options: argparse.Namespace) -> Evaluation:
    """Compiles the measurements."""

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None, None, 0))
    def test(variables, images, labels, rows):
        return mean_metrics(problem, variables, images, labels, rows)

    @jax.jit
    @jax.vmap
    def profile(variables, labels, rows):
        return ascent_profile(problem, options, variables, labels, rows)

    # A thousand images give the direction well enough, for any size of data set.
    rows = problem.rows[:, :1000]
    tested = problem.test_images, problem.test_labels, problem.test_rows
    return Evaluation(
        lambda lanes: test((lanes.params, lanes.stats), *tested),
        lambda lanes: profile((lanes.params, lanes.stats), problem.labels, rows),
    )


# Runs.


def train(
    method: str,
    training: tuple[Callable, Callable],
    problem: Problem,
    evaluation: Evaluation,
    options: argparse.Namespace,
    progress: Progress,
    *,
    rho: float,
    rate: float,
) -> tuple[Lane, dict[str, np.ndarray]]:
    """Trains all seeds with one method.

    Returns:
        The trained lanes and the curves: name to array of shape (seeds, epochs).
    """
    init, epoch = training
    epochs = epochs_of(method, options)
    report = max(1, epochs // 5)
    bar = progress.add_task(TITLES[method], total=epochs, note="compiling")
    lanes, history = init(problem.variables, rho, rate), []
    for number in range(epochs):
        keys = jax.vmap(partial(jax.random.fold_in, data=number))(problem.keys)
        lanes, (loss, sharpness) = epoch(
            lanes, keys, rho, rate, problem.images, problem.labels, problem.rows
        )
        test_loss, accuracy = evaluation.test(lanes)
        history.append(jax.device_get((loss, sharpness, test_loss, accuracy)))
        note = f"accuracy {np.mean(history[-1][3]):.2%}"
        progress.update(bar, advance=1, note=note)
        # A log file shows no moving bar.
        if not messages.is_terminal and (number + 1) % report == 0:
            messages.print(f"{TITLES[method]}: epoch {number + 1}/{epochs}, {note}")
    names = ("train_loss", "sharpness", "test_loss", "test_accuracy")
    curves = [np.stack(values, -1) for values in zip(*history, strict=True)]
    return lanes, dict(zip(names, curves, strict=True))


def compare(options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Trains each method that `file` does not hold and adds it there.

    Returns:
        The content of the file. Ctrl-C raises KeyboardInterrupt; what was finished by
        then is in the file.
    """
    results = resume(options, file)
    missing = [m for m in options.methods if m not in results["methods"]]
    if not missing:
        messages.print(f"Nothing to do: {file} holds every method.")
        return results
    if results["methods"]:
        messages.print(f"Resuming: {file} holds {', '.join(results['methods'])}.")
    problem = make_problem(options)
    evaluation = make_evaluation(problem, options)
    trainings = {m: make_training(m, problem, options) for m in METHODS}
    few = problem.rows[:, : 16 * options.batch_size]
    steps = problem.rows.shape[1] // options.batch_size

    def few_steps(method):
        init, epoch = trainings[method]
        settings = options.rho.get(method, 0.0), options.learning_rate[method]
        lanes = init(problem.variables, *settings)
        return lambda: epoch(
            lanes, problem.keys, *settings, problem.images, problem.labels, few
        )

    with progress_bars() as progress:
        for method in missing:
            lanes, curves = train(
                method,
                trainings[method],
                problem,
                evaluation,
                options,
                progress,
                rho=options.rho.get(method, 0.0),
                rate=options.learning_rate[method],
            )
            cost = GRADIENTS_PER_STEP[method] * steps
            profile = jax.device_get(evaluation.profile(lanes))
            results["methods"][method] = {
                "learning_rate": options.learning_rate[method],
                "rho": options.rho.get(method),
                "gradients": cost * np.arange(1, epochs_of(method, options) + 1),
                "curves": curves,
                "final": {
                    "test_accuracy": curves["test_accuracy"][:, -1],
                    "test_loss": curves["test_loss"][:, -1],
                    **profile,
                },
                "step_time_ratio": 1.0
                if method == "base"
                else time_ratio(few_steps(method), few_steps("base"), repeats=11),
            }
            results = write(results, file)
    return results


def tune(options: argparse.Namespace, file: Path) -> None:
    """Tries ten settings of each method on a held-out fifth of the training images.

    They lie a factor of two apart around --learning-rate and --rho: ten learning rates
    for base, and for the others five learning rates and then, at the best, five radii.
    By default the least loss wins, which is less noisy than the accuracy on so few
    images; not where training to the end makes it larger than that of a network which
    learnt nothing. Where a choice is the first or last of its row, call again from
    there.
    """
    problem = make_problem(options, tune=True)
    evaluation = make_evaluation(problem, options)
    trials = []
    table = Table(title=f"Held-out part of the training images: {options.data}")
    for heading in ("method", "learning rate", "rho", "accuracy", "loss"):
        table.add_column(heading, justify="right")
    with progress_bars() as progress:
        for method in options.methods:
            training = make_training(method, problem, options)

            def score(rate, rho, method=method, training=training):
                _, curves = train(
                    method,
                    training,
                    problem,
                    evaluation,
                    options,
                    progress,
                    rho=rho,
                    rate=rate,
                )
                accuracy = float(curves["test_accuracy"][:, -1].mean())
                loss = float(curves["test_loss"][:, -1].mean())
                texts = TITLES[method], f"{rate:g}", f"{rho:g}", f"{accuracy:.2%}"
                table.add_row(*texts, f"{loss:.4f}")
                trials.append((method, rate, rho, accuracy, loss))
                if not math.isfinite(loss):
                    return math.inf
                return loss if options.select == "loss" else -accuracy

            rate, rho = options.learning_rate[method], options.rho.get(method, 0.0)
            reach = 5 if method == "base" else 2
            rates = rate * 2.0 ** np.arange(-reach, min(reach, 4) + 1)
            rate = min(rates, key=lambda rate: score(rate, rho))
            if method in GEOMETRIES:
                rhos = rho * 2.0 ** np.arange(-2, 3)
                rho = min(rhos, key=lambda rho: score(rate, rho))
                options.rho[method] = float(rho)
            options.learning_rate[method] = float(rate)
            table.add_section()
    Console().print(table)
    for option in ("learning_rate", "rho"):
        values = getattr(options, option).items()
        print(f"--{option.replace('_', '-')}", *(f"{m}={v:g}" for m, v in values))
    write({**header(options), "trials": trials}, file)


def progress_bars() -> Progress:
    """Returns live bars on the error stream, so that the output is only the tables."""
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} epochs, {task.fields[note]}"),
        TimeRemainingColumn(),
        console=messages,
    )


# Results.


def header(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what a reader needs to repeat a run."""
    packages = ("fsam_optax", "jax", "optax", "flax", "numpy")
    names = (
        "data train_size test_size label_noise augment model optimizer learning_rate "
        "weight_decay batch_size epochs seeds rho radius"
    )
    device = jax.devices()[0]
    return {
        "command": options.command,
        "settings": {name: getattr(options, name) for name in names.split()},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "device": {"backend": device.platform, "kind": device.device_kind},
    }


def resume(options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Returns the content of `file`, or an empty record for this command.

    Raises:
        SystemExit: If the file was made with other settings, versions or devices.
    """
    new = plain({**header(options), "methods": {}})
    if not file.exists():
        return new
    old = json.loads(file.read_text())
    differing = [
        f"  {name}: {before} there, {now} here"
        for part in ("settings", "versions", "device")
        for name, before, now in differences(old.get(part, {}), new[part])
    ]
    if differing:
        raise SystemExit(
            f"{file} was made with something else:\n"
            + "\n".join(differing)
            + "\nName another folder in --out, or delete this one."
        )
    return old


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = ""):
    """Yields the dotted name and both values of each entry that differs."""
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield prefix + name, before, now


def write(results: dict[str, Any], file: Path) -> dict[str, Any]:
    """Writes JSON so that an interruption leaves the old file or the new one."""
    results = plain(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, file)
    return results


def plain(value: Any) -> Any:
    """Returns a tree of arrays as JSON: six digits, and null for what is not finite."""
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def spread(values: Any, form: str) -> str:
    """Returns the mean over seeds and the standard deviation."""
    values = np.array(values, float)
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{values.mean():{form}} ± {values.std(ddof=1):{form}}"


def average(values: Any) -> str:
    """Returns the mean over seeds."""
    return f"{np.mean(np.array(values, float)):.3f}"


def print_table(results: dict[str, Any]) -> None:
    """Prints the final table of the methods that are finished."""
    settings = results["settings"]
    table = Table(
        title=f"{settings['data']}, {settings['model']}, {settings['optimizer']}",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        caption=(
            f"Number of seeds: {settings['seeds']}; mean ± standard deviation. Rise: "
            f"the training loss at Euclidean distance {settings['radius']:g} along the "
            "ascent direction of each geometry, minus the training loss."
        ),
    )
    table.add_column("method", no_wrap=True)
    for heading in (
        "learn.\nrate",
        "rho",
        "\ngrads",
        "step\ntime",
        "test\naccuracy %",
        "test\nloss",
        "train\nloss",
        "rise\nSAM",
        "rise\nASAM",
        "rise\nFisher",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for method, record in ordered(results):
        final = record["final"]
        table.add_row(
            TITLES[method],
            f"{record['learning_rate']:.3g}",
            f"{record['rho']:.3g}" if method in GEOMETRIES else "-",
            str(record["gradients"][-1]),
            f"{record['step_time_ratio']:.2f}",
            spread(100 * np.array(final["test_accuracy"], float), ".1f"),
            spread(final["test_loss"], ".2f"),
            average(final["train_loss"]),
            *(average(final["rise"][name]) for name in GEOMETRIES),
        )
    # Wide enough for the table where the output is not a terminal.
    console = Console()
    Console(width=None if console.is_terminal else 88).print(table)


def ordered(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the finished methods in the usual order."""
    methods = results["methods"]
    return [(method, methods[method]) for method in METHODS if method in methods]


def plot(results: dict[str, Any], options: argparse.Namespace, file: Path) -> None:
    """Draws the learning curves and the loss around the trained networks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    panels = (
        ("Test accuracy, %", "gradients spent", "test_accuracy"),
        ("Test loss", "gradients spent", "test_loss"),
        ("Training loss along the gradient", "Euclidean distance from w", None),
    )
    for axis, (title, unit, name) in zip(axes, panels, strict=True):
        late = []
        for method, record in ordered(results):
            if name:
                x, values = record["gradients"], record["curves"][name]
            else:
                x, values = radii(options), record["final"]["loss_along_gradient"]
            values = np.array(values, float) * (100 if name == "test_accuracy" else 1)
            style = {"color": COLORS[method], "linestyle": STYLES[method]}
            axis.plot(x, values.mean(0), label=TITLES[method], **style)
            axis.fill_between(
                x, values.min(0), values.max(0), color=COLORS[method], alpha=0.15, lw=0
            )
            late.append(values[:, values.shape[1] // 4 :])
        if name:
            # The first quarter, alike for all methods, would flatten the rest.
            late = np.concatenate([values.ravel() for values in late])
            low, high = np.nanmin(late), np.nanmax(late)
            margin = 0.05 * (high - low) or 1.0
            axis.set_ylim(low - margin, high + margin)
            axis.set_xlim(left=0)
        axis.set_title(title, loc="left", fontsize="medium", fontweight="bold")
        axis.set_xlabel(unit)
        axis.grid(alpha=0.25)
    axes[2].axvline(0, color="gray", lw=0.8)
    axes[2].locator_params("x", nbins=5)
    settings = results["settings"]
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
        title=f"{settings['data']}, {settings['model']}, {settings['optimizer']}; "
        f"mean and range over the seeds ({settings['seeds']})",
    )
    temporary = file.with_name("unfinished.png")
    figure.savefig(temporary, dpi=160)
    os.replace(temporary, file)
    plt.close(figure)


# Command line.


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line and fills in the defaults that depend on others."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=datasets.NAMES, default="digits")
    add("--data-dir", type=Path, help="folder of the files; default data/<name>")
    add("--train-size", type=positive(int), help="default all, digits 300")
    add("--test-size", type=positive(int), help="default all")
    add("--label-noise", type=fraction, default=0.0, help="share of wrong labels")
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="shift and mirror the images at random; default yes, digits no",
    )
    add("--model", choices=models.MODELS, default="cnn")
    add("--methods", choices=METHODS, nargs="+", default=METHODS)
    add("--optimizer", choices=LEARNING_RATE, default="sgd")
    add(
        "--learning-rate",
        type=setting_of(METHODS),
        nargs="+",
        default=[],
        metavar="METHOD=RATE",
        help="default sgd 0.05, adamw 0.001",
    )
    add("--weight-decay", type=float, default=5e-4)
    add("--batch-size", type=positive(int), default=100, help="default 100, digits 30")
    add("--epochs", type=positive(int), default=40, help="base runs twice as many")
    add("--seeds", type=positive(int), default=3, help="how many")
    add(
        "--rho",
        type=setting_of(GEOMETRIES),
        nargs="+",
        default=[],
        metavar="METHOD=RHO",
        help="default " + ", ".join(f"{name} {rho:g}" for name, rho in RHO.items()),
    )
    add("--radius", type=positive(float), default=0.5, help="where to measure the rise")
    add("--out", type=Path, default=Path("results/generalization"))
    add("--tune", action="store_true", help="choose learning rate and rho, then stop")
    add("--select", choices=("loss", "accuracy"), default="loss", help="with --tune")
    add("--smoke", action="store_true", help="a few steps of everything, for CI")
    options = parser.parse_args(arguments)
    if options.data == "digits":
        parser.set_defaults(**DIGITS)
        options = parser.parse_args(arguments)
    if options.smoke:
        options.epochs, options.seeds = 1, 2
        options.train_size, options.test_size = 128, 200
    options.command = shlex.join(["python", sys.argv[0], *arguments])
    options.data_dir = options.data_dir or Path("data") / options.data
    rates = dict.fromkeys(METHODS, LEARNING_RATE[options.optimizer])
    rhos = RHO
    if options.data == "digits" and options.optimizer == "sgd":
        rates, rhos = DIGITS_LEARNING_RATE, DIGITS_RHO
    options.learning_rate = {**rates, **dict(options.learning_rate)}
    options.rho = {**rhos, **dict(options.rho)}
    return options


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns a reader of positive numbers for argparse."""

    def read(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    return read


def fraction(text: str) -> float:
    """Reads a number in [0, 1) for argparse."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), got {text}")
    return value


def setting_of(methods: Collection[str]) -> Callable[[str], tuple[str, float]]:
    """Returns a reader of `method=value` for argparse."""

    def read(text):
        method, _, value = text.partition("=")
        if method not in methods:
            raise argparse.ArgumentTypeError(
                f"must be METHOD=VALUE with METHOD in {', '.join(methods)}, got {text}"
            )
        return method, positive(float)(value)

    return read


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison. Returns the exit code."""
    options = parse(arguments)
    if options.smoke:
        # Almost all of the time of so short a run is compilation.
        jax.config.update("jax_disable_most_optimizations", True)
    file = options.out / "results.json"
    try:
        if options.tune:
            tune(options, options.out / "tuning.json")
            return 0
        results, code = compare(options, file), 0
    except KeyboardInterrupt:
        messages.print("Interrupted. The same command goes on from here.")
        if options.tune or not file.exists():
            return 130
        results, code = json.loads(file.read_text()), 130
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    print_table(results)
    picture = options.out / "generalization.png"
    plot(results, options, picture)
    print(f"{file}\n{picture}")
    return code


if __name__ == "__main__":
    sys.exit(main())

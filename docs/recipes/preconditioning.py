"""Question: is a Fisher diagonal a better preconditioner than Adam's second moment?

The gradient is divided by F + damping (`scale_by_inverse_fisher`, the diagonal natural
gradient), or clipped after it (Sophia), with F from different estimators at every
tenth step. Every method spends the same number of gradients, those of its estimator
counted, and chooses its learning rate and one more number from a grid of 24 by the loss
on held-out examples, on other seeds. Two problems: a network on handwritten digits,
and a logistic regression on measurements in their raw units, 1e-3 to 1e3.

    python docs/recipes/preconditioning.py
"""

import pathlib
import sys
from functools import partial
from typing import Any


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import datasets
import harness
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import perceptron
import show
from sklearn.datasets import load_breast_cancer

import fsam_optax as fsam


BATCH, EVERY, SEGMENTS = 50, 10, 10
LOSS = perceptron.LOSS


def momentum(rate, decay, key):
    return optax.sgd(rate, decay)


def adam(rate, eps, key):
    return optax.adam(rate, eps=eps)


def sophia(estimator, rate, gamma, key):
    settings = {"b2": 0.9, "weight_decay": 0.0, "update_interval": EVERY}
    settings |= {"gamma": gamma, "hessian_diagonal_fn": estimator(key)}
    return optax.contrib.sophia(rate, **settings)


def natural(estimator, rate, damping, key):
    """Returns momentum, divided by an average of F."""
    average = fsam.refresh_every(EVERY, optax.chain(estimator(key), optax.ema(0.9)))
    divide = fsam.scale_by_inverse_fisher(average, damping=damping)
    return optax.chain(optax.ema(0.9), divide, optax.scale_by_learning_rate(rate))


ESTIMATORS = {
    "exact": lambda key: fsam.fisher_exact(LOSS),
    "signs": lambda key: fsam.fisher_hutchinson(LOSS, key=key),
    "GNB": lambda key: fsam.fisher_gnb(LOSS, key=key),
    "empirical": lambda key: fsam.fisher_empirical(LOSS),
}
HESSIAN = optax.contrib.hutchinson_estimator_diag_hessian
# What makes it of schedule, second number and key; what is offered as second number;
# the ends of six learning rates on digits, and in raw units; the gradients that its
# estimator costs, -1 for one each class but the last.
CLIP = (0.01, 0.1, 1.0, 10.0), (3e-4, 0.1), (1e-4, 0.03)
DIVIDE = (1e-6, 1e-4, 1e-2, 1.0), (3e-3, 1.0), (3e-3, 1.0)
METHODS: dict[str, Any] = {
    "momentum": (momentum, (0.0, 0.8, 0.9, 0.95), (0.01, 3), (1e-8, 3e-6), 0),
    "Adam": (adam, (1e-8, 1e-6, 1e-4, 1e-2), (1e-3, 0.3), (1e-4, 0.03), 0),
    "Sophia, Optax's Hessian": (partial(sophia, HESSIAN), *CLIP, 2),
    "Sophia, GNB": (partial(sophia, ESTIMATORS["GNB"]), *CLIP, 1),
    **{
        f"1/F, {name}": (partial(natural, make), *DIVIDE, 1 if name != "exact" else -1)
        for name, make in ESTIMATORS.items()
    },
}
COLORS = (
    *(show.GREY, show.BLACK, show.ORANGE, show.SKY),
    *(show.GREEN, show.PURPLE, show.VERMILLION, show.BLUE),
)
LAYERS = {"digits": (64, 32, 10), "raw units": (30, 2)}


def read(problem):
    """Returns inputs and labels to train on, held out, and to test on."""
    random, source = np.random.default_rng(0), datasets.load("digits")
    if problem == "digits":
        x = datasets.flat(np.concatenate([source.train_images, source.test_images]))
        y = np.concatenate([source.train_labels, source.test_labels])
        order, ends = np.r_[random.permutation(1000), 1000 : len(y)], (500, 1000)
    else:
        x, y = load_breast_cancer(return_X_y=True)
        order, ends = random.permutation(len(y)), (250, 400)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)
    return [(x[rows], y[rows]) for rows in np.split(order, ends)]


def points_of(method, problem):
    """Returns the grid: six learning rates, four second numbers."""
    _, seconds, *ends, _ = METHODS[method]
    least, largest = ends[[*LAYERS].index(problem)]
    rates = np.geomspace(least, largest, 6).tolist()
    return [{"rate": rate, "second": second} for second in seconds for rate in rates]


def steps_of(method, problem, gradients):
    """Returns the number of steps that spends so many gradients."""
    passes = METHODS[method][-1]
    passes = LAYERS[problem][-1] - 1 if passes < 0 else passes
    return int(gradients / (1 + passes / EVERY)) // SEGMENTS * SEGMENTS


def train(method, problem, data, steps, seed, rate, second):
    """Returns losses and accuracy along one training."""
    (x, y), held, test = data
    init, batches, estimator = jax.random.split(jax.random.key(seed), 3)
    params = perceptron.initial(init, LAYERS[problem])
    if len(params) == 1:
        params = jax.tree.map(jnp.zeros_like, params)
    schedule = optax.cosine_decay_schedule(1.0, steps)
    optimizer = METHODS[method][0](lambda t: rate * schedule(t), second, estimator)

    def segment(carry, keys):
        rows = jax.vmap(lambda key: jax.random.randint(key, (BATCH,), 0, len(y)))(keys)
        carry = perceptron.follow(LOSS, optimizer, carry, (x[rows], y[rows]))
        loss, accuracy = perceptron.score(carry[0], *test)
        facts = {"test": loss, "accuracy": accuracy, "held": LOSS(carry[0], held)}
        return carry, facts | {"train": LOSS(carry[0], (x, y))}

    keys = jax.random.split(batches, (SEGMENTS, steps // SEGMENTS))
    return jax.lax.scan(segment, (params, optimizer.init(params)), keys)[1]


def compute(method, problem, points, options):
    """Chooses from the grid, trains anew at the choice; as many seeds as points."""
    steps = steps_of(method, problem, options.gradients)
    every = jax.jit(jax.vmap(partial(train, method, problem, read(problem), steps)))
    seeds, same = jnp.arange(len(points)), jnp.ones(len(points))
    rates, seconds = methods.columns(points, "rate", "second")
    held = [
        every(0 * seeds + 1000 + seed, rates, seconds)["held"][:, -1]
        for seed in range(options.tuning_seeds)
    ]
    best = methods.choose(points, -np.mean(held, 0))
    found = every(seeds, same * best["rate"], same * best["second"])
    return best | {"steps": steps} | found


def last(facts, key):
    """Returns a figure of each seed at the end."""
    return np.array(facts[key], float)[:, -1]


def report(title, found):
    """Prints the end of each training, beside Adam's."""
    rows, keys = [], ("train", "test", "accuracy")
    _, adam_test, adam_accuracy = (last(found["Adam"], key) for key in keys)
    for method, facts in found.items():
        training, test, accuracy = (last(facts, key) for key in keys)
        cells = [facts["steps"], show.cell(training, ".3f"), show.cell(test, ".3f")]
        cells += [show.over(test, adam_test, "+.3f", 1), show.percent(accuracy)]
        cells += [show.over(accuracy, adam_accuracy), f"{facts['rate']:.1g}"]
        cells += [f"{facts['second']:.0e}", "*" * bool(facts["edges"])]
        rows.append([method, *cells])
    headings = ["method", "steps", "training loss", "test loss", "over Adam"]
    headings += ["accuracy, %", "over Adam, %", "rate", "second", "edge"]
    caption = "Mean ± standard error. Second: momentum, eps, gamma or damping."
    show.table(title, headings, rows, caption, first=24)


def draw(results, path):
    """Draws the test loss along the training, one panel a problem."""
    best = [
        f"{name}: {min(of, key=lambda method: last(of[method], 'test').mean())}"
        for name, of in results.items()
    ]
    headline = f"Least test loss at equal gradients: {'; '.join(best)}"
    fig, (axes,) = show.figure(1, 2, headline, figsize=(12, 4.4))
    x, looks = np.linspace(0.1, 1, SEGMENTS), dict(zip(METHODS, COLORS, strict=True))
    for axis, (name, found) in zip(axes, results.items(), strict=True):
        for method, facts in found.items():
            curve = np.array(facts["test"], float).mean(0)
            axis.plot(x, curve, color=looks[method], label=method)
        axis.set(yscale="log", xlabel="share of gradients", title=f"{name}: test loss")
    axes[0].legend(fontsize=7)
    show.save(fig, path)


@harness.experiment(
    smoke={
        **{"gradients": 40, "tuning_seeds": 1},
        "methods": ["Adam", "Sophia, GNB", "1/F, exact"],
    },
    methods={"default": list(METHODS), "choices": METHODS},
    gradients=300,
    tuning_seeds=2,
)
def main(run: harness.Run) -> None:
    options, results = run.options, {}
    settings = run.take("gradients tuning_seeds")
    for problem in LAYERS:
        found = results[problem] = {}
        for method in options.methods:
            points = points_of(method, problem)
            key = {"problem": problem, "method": method, "points": points, **settings}
            found[method] = run.cell(compute, method, problem, points, options, **key)
        report(f"{problem}, {options.gradients} gradients", found)
    draw(results, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: which weights can go: those of little w^2 F, or simply the small ones?

Optimal brain damage removes the weights of least saliency F w^2 / 2, which is what the
loss would rise if its Hessian were the diagonal F. Compared, at one shot and after some
training of what is left: the exact F, the empirical one, the mean square of batch
gradients, the magnitude, and chance. None has anything to be tuned.

    python docs/recipes/pruning.py
    python docs/recipes/pruning.py --data fashion-mnist --pool 2 --batches 32 --seeds 5
"""

import pathlib
import sys
from functools import cache, partial
from operator import itemgetter


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import datasets
import diagonals
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
import show
from jax.flatten_util import ravel_pytree


RATE = 2e-3
MAGNITUDE, RANDOM = "magnitude", "random"
SHARES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
WAYS = {"accuracy": "one shot", "trained again": "trained again"}


def saliency(method, params, data, key):
    """Returns what each weight is worth: the least go first."""
    if method == RANDOM:
        return optax.tree.random_like(key, params, jax.random.uniform)
    if method == MAGNITUDE:
        return jax.tree.map(jnp.abs, params)
    diagonal = diagonals.diagonal(method, perceptron.LOSS, params, data)
    return jax.tree.map(lambda f, w: f * w**2 / 2, diagonal, params)


def masks(score, share):
    """Returns 0 for a share of the weights, of least score; biases stay."""
    score = [of | {"bias": jnp.full_like(of["bias"], jnp.inf)} for of in score]
    flat, back = ravel_pytree(score)
    gone = share * jnp.sum(jnp.isfinite(flat))
    return back((jnp.argsort(jnp.argsort(flat)) >= gone).astype(flat.dtype))


def prepare(options):
    """Returns data, test data, and trained networks, one a seed."""
    source = datasets.load(options.data, options.data_dir)
    (x, y), test = perceptron.split(source, options.pool)
    data = x[: options.train_size], jnp.asarray(y[: options.train_size])

    def train(seed):
        key = jax.random.key(seed)
        params = perceptron.initial(key, (x.shape[1], 64, 64, 10))
        key = jax.random.fold_in(key, 1)
        return perceptron.by_adam(params, data, options.steps, RATE, key)

    return data, test, jax.jit(jax.vmap(train))(jnp.arange(options.seeds))


def sweep(method, prepared, options):
    """Prunes every network by every share; returns arrays (share, seed)."""
    data, test, networks = prepared()

    def prune(params, seed, share):
        key = jax.random.fold_in(jax.random.key(seed), 2)
        mask = masks(saliency(method, params, data, key), share)
        left = jax.tree.map(jnp.multiply, params, mask)
        again = options.steps // 4, RATE / 2, jax.random.fold_in(key, 3), mask
        again = perceptron.by_adam(left, data, *again)
        scores = (perceptron.score(w, *test)[1] for w in (left, again))
        return dict(zip(WAYS, scores, strict=True))

    every = jax.vmap(jax.vmap(prune, (0, 0, None)), (None, None, 0))
    return jax.jit(every)(networks, jnp.arange(options.seeds), jnp.array(SHARES))


def most(accuracy):
    """Returns for each seed the most that can go for two points of accuracy."""
    accuracy = np.array(accuracy)
    lost = accuracy[0] - accuracy > 0.02
    first = np.where(lost.any(0), lost.argmax(0), len(SHARES))
    return np.array(SHARES)[first - 1]


def report(title, found):
    """Prints how much can go, and what is left of the accuracy when most is gone."""
    columns: show.Columns = {"%": lambda method, _: method}
    base, measures = found[MAGNITUDE], {"can go": most}
    measures |= {f"{s:.0%} gone": itemgetter(SHARES.index(s)) for s in (0.5, 0.8, 0.9)}
    for name, of in measures.items():
        columns[name] = lambda _, a, of=of: show.percent(of(a))
        over = f"{name},\nover {MAGNITUDE}"
        columns[over] = lambda _, a, of=of: show.over(of(a), of(base))
    caption = "Can go: for two points of accuracy. Mean ± standard error, paired."
    show.report(title, found, columns, caption)


def draw(ways, path):
    """Draws accuracy against what is removed, at one shot and trained again."""
    names = diagonals.EXACT, MAGNITUDE
    can = [np.mean(most(found[name])) for found in ways.values() for name in names]
    headline = (
        "For two points of accuracy {:.0%} of the weights can go by w² F, "
        "{:.0%} by magnitude; trained again {:.0%} and {:.0%}"
    ).format(*can)
    fig, (axes,) = show.figure(1, 2, headline, figsize=(12, 4.2))
    for axis, (title, found) in zip(axes, ways.items(), strict=True):
        show.curves(axis, 100 * np.array(SHARES), found, ms=4)
        axis.set(xlabel="weights removed, %", title=f"Test accuracy, {title}, %")
    axes[1].set_ylim(50, None)
    axes[0].legend(fontsize=7)
    show.save(fig, path)


@harness.experiment(
    smoke={"batches": [8], "seeds": 2, "steps": 4},
    **perceptron.IMAGES,
    batches=[32, 1000],
    seeds=10,
    steps={"default": 1200, "help": "a quarter after pruning"},
    train_size={"default": 6000, "help": "most images"},
    pool=perceptron.POOL,
)
def main(run: harness.Run) -> None:
    options = run.options
    settings = run.take("data seeds steps train_size pool") | {"shares": SHARES}
    names = [diagonals.EXACT, diagonals.EMPIRICAL]
    names += [diagonals.squared(batch) for batch in options.batches]
    args = sweep, cache(partial(prepare, options)), options
    found = run.each("method", [*names, MAGNITUDE, RANDOM], *args, **settings)
    ways = {}
    for way, title in WAYS.items():
        ways[title] = {method: result[way] for method, result in found.items()}
        report(f"{options.data}: test accuracy, {title}", ways[title])
    draw(ways, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

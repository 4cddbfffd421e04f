"""Question: which weights can go: those of little w^2 F, or simply the small ones?

Optimal brain damage removes the weights of least saliency F w^2 / 2, which is what the
loss would rise if its Hessian were the diagonal F. Compared, at one shot and after some
training of what is left: the exact F, the empirical one, the mean square of batch
gradients, the magnitude, and chance. None has anything to be tuned.

    python benchmarks/pruning.py
    python benchmarks/pruning.py --data fashion-mnist --data-dir data
"""

from functools import cache, partial

import datasets
import diagonals
import harness
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
import show


HIDDEN = (64, 64)
RATE = 2e-3
MAGNITUDE, BY_LAYER, RANDOM = "magnitude", "magnitude by layer", "random"
SHARES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
SHOWN = (0.0, 0.5, 0.7, 0.8, 0.9)
LOSS = perceptron.LOSS


def fit(data, seeds, steps):
    """Returns trained networks, one a seed."""

    def one(seed):
        key = jax.random.key(seed)
        params = perceptron.initial(key, (data[0].shape[-1], *HIDDEN, 10))
        return perceptron.by_adam(params, data, steps, RATE, jax.random.fold_in(key, 1))

    return jax.jit(jax.vmap(one))(jnp.arange(seeds))


def saliency(method, params, data, key):
    """Returns what each weight is worth: the least go first."""
    if method == RANDOM:
        return optax.tree.random_like(key, params, jax.random.uniform)
    if method == MAGNITUDE:
        return jax.tree.map(jnp.abs, params)
    if method == BY_LAYER:
        # The share of the weights of its layer that are smaller.
        return jax.tree.map(lambda w: rank(jnp.abs(w)) / w.size, params)
    diagonal = diagonals.diagonal(method, LOSS, params, data)
    return jax.tree.map(lambda f, w: f * w**2 / 2, diagonal, params)


def rank(x):
    """Returns for each entry how many are before it."""
    return jnp.argsort(jnp.argsort(x.ravel())).reshape(x.shape)


def masks(score, share):
    """Returns 0 for a share of the weights, of least score; biases stay."""
    kernels = [layer["kernel"] for layer in score]
    flat, back = jax.flatten_util.ravel_pytree(kernels)
    kept = back((rank(flat) >= share * flat.size).astype(flat.dtype))
    return [
        {"kernel": mask, "bias": jnp.ones_like(layer["bias"])}
        for mask, layer in zip(kept, score, strict=True)
    ]


def prune(method, data, test, steps, params, seed, share):
    """Returns what a network is worth without a share of its weights."""
    key = jax.random.fold_in(jax.random.key(seed), 2)
    score = saliency(method, params, data, key)
    mask = masks(score, share)
    left = jax.tree.map(jnp.multiply, params, mask)
    loss, accuracy = perceptron.score(left, *test)
    key = jax.random.fold_in(key, 3)
    again = perceptron.by_adam(left, data, steps, RATE / 2, key, mask)
    gone = jax.tree.map(lambda s, m: jnp.sum(s * (1 - m)), score, mask)
    return {
        "accuracy": accuracy,
        "loss": loss,
        "rise": LOSS(left, data) - LOSS(params, data),
        "foretold": optax.tree.sum(gone),
        "trained again": perceptron.score(again, *test)[1],
    }


def sweep(method, networks, data, test, options):
    """Prunes every network by every share; returns arrays (share, seed)."""
    shares, seeds = jnp.asarray(options.shares), jnp.arange(options.seeds)
    one = partial(prune, method, data, test, options.steps // 4)
    every = jax.vmap(jax.vmap(one, (0, 0, None)), (None, None, 0))
    return jax.jit(every)(networks(), seeds, shares)


def most(result, shares, within):
    """Returns for each seed the most that can go for `within` of accuracy."""
    accuracy = np.array(result)
    lost = accuracy[0] - accuracy > within
    first = np.where(lost.any(0), lost.argmax(0), len(shares))
    return np.array(shares)[first - 1]


def headline(found, options):
    """Returns what the picture shows."""

    def can(method, name):
        return f"{np.mean(most(found[method][name], options.shares, 0.02)):.0%}"

    once, again = (
        [can(method, name) for method in (diagonals.EXACT, MAGNITUDE)]
        for name in ("accuracy", "trained again")
    )
    return (
        f"For two points of accuracy {once[0]} of the weights can go by w² F, "
        f"{once[1]} by magnitude; trained again {again[0]} and {again[1]}"
    )


def draw(found, options, path):
    """Draws accuracy against what is removed, at one shot and trained again."""
    fig, axes = show.figure(1, 3, headline(found, options), figsize=(12, 4.2))
    shares = 100 * np.array(options.shares)
    for axis, name in zip(axes[0], ("accuracy", "trained again"), strict=False):
        show.curves(axis, shares, {m: r[name] for m, r in found.items()}, ms=4)
        axis.set_xlabel("weights removed, %")
    for method, result in found.items():
        if method not in (MAGNITUDE, BY_LAYER, RANDOM):
            pair = (np.mean(result[n][1:], 1) for n in ("foretold", "rise"))
            axes[0][2].plot(*pair, **show.look(method), ms=4)
    ends = np.array(axes[0][2].get_xlim())
    axes[0][0].set_title("Test accuracy at one shot, %")
    axes[0][1].set_title("The same, what is left trained again")
    axes[0][1].set_ylim(50, None)
    axes[0][2].set_title("Rise of the training loss, against foretold")
    axes[0][2].set_xlabel("sum of F w² / 2 over what went")
    axes[0][2].plot(*2 * [np.geomspace(1e-7, ends[1], 2)], color=show.GREY, lw=1)
    axes[0][2].set(xscale="log", yscale="log")
    axes[0][0].legend(fontsize=7)
    show.save(fig, path)


def report(found, options):
    """Prints accuracy by share, and how much can go."""
    shown = [i for i, share in enumerate(options.shares) if share in SHOWN]
    gone = {i: f"{100 * options.shares[i]:g} % gone" for i in shown}
    titles = {"accuracy": "at one shot", "trained again": "trained again"}
    reference = found[MAGNITUDE]
    for name in titles:
        rows = [
            [m, *(show.percent(r[name][i]) for i in shown)] for m, r in found.items()
        ]
        title = f"{options.data}: test {name}".replace("test t", "test accuracy, t")
        show.table(title, ["%", *gone.values()], rows, first=22)
    pairs = [(name, i) for name in titles for i in shown[-2:]]
    rows = [
        [method, *(show.over(r[name][i], reference[name][i]) for name, i in pairs)]
        for method, r in found.items()
    ]
    heads = ["points", *(f"{titles[name]},\n{gone[i]}" for name, i in pairs)]
    show.table(f"{options.data}: accuracy over magnitude", heads, rows, first=22)
    rows = []
    for method, result in found.items():
        rows.append([method])
        for name in titles:
            can, base = (
                most(r[name], options.shares, 0.02) for r in (result, reference)
            )
            rows[-1] += [show.percent(can), show.over(can, base)]
    heads = ["%", "at one shot", "over magnitude", "trained again", "over magnitude"]
    title = f"{options.data}: weights that can go for two points of accuracy"
    caption = "Mean ± standard error, paired over seeds."
    show.table(title, heads, rows, caption, first=22)


@harness.experiment(
    smoke={"batches": [8], "shares": [0.0, 0.5, 0.9], "seeds": 2, "steps": 4},
    **perceptron.IMAGES,
    batches=[32, 1000],
    shares={"default": list(SHARES), "help": "to remove"},
    seeds=10,
    steps={"default": 1200, "help": "a quarter after pruning"},
    train_size={"default": 6000, "help": "most images"},
    pool=perceptron.POOL,
)
def main(run: harness.Run) -> None:
    options = run.options
    source = datasets.load(options.data, options.data_dir)
    (x, y), test = perceptron.split(source, options.pool)
    data = x[: options.train_size], jnp.asarray(y[: options.train_size])
    settings = run.take("data seeds steps train_size pool shares")
    networks = cache(partial(fit, data, options.seeds, options.steps))
    methods = [diagonals.EXACT, diagonals.EMPIRICAL]
    methods += [diagonals.squared(batch) for batch in options.batches]
    methods += [MAGNITUDE, BY_LAYER, RANDOM]
    args = sweep, networks, data, test, options
    found = run.each("method", methods, *args, **settings)
    report(found, options)
    draw(found, options, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

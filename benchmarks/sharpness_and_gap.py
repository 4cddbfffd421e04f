"""Question: does adaptive sharpness predict the generalisation gap better than plain?

Many small networks differ in batch size, learning rate, weight decay and dropout. The
rise of the training loss in a ball of each geometry is correlated (Kendall's tau-b)
with the gap between test and training figures, once as the networks pass one and the
same training loss, and once after the same number of steps. Since sharpness may do no
more than follow the learning rate, tau is also taken over pairs of equal learning rate,
and over pairs that differ in nothing but the seed.

    python benchmarks/sharpness_and_gap.py
"""

import itertools
from functools import partial

import datasets
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
import show
from perceptron import LOSS

import fsam_optax as fsam


SETTINGS = ("batch size", "learning rate", "weight decay", "dropout")
GRID = [*itertools.product((0.006, 0.02, 0.06), (0.0, 5e-4, 2e-3), (0.0, 0.2, 0.4))]
RULES, GAPS = ("same loss", "same steps"), ("loss", "error")
FIGURES = ("train loss", "test loss", "train error", "test error")
ADAPTIVE = partial(fsam.adaptive_ellipsoid, eta=0.0, normalize=True)
FISHER = partial(fsam.fisher_ellipsoid, estimator=fsam.given())
# At these radii the median rise of 27 networks of another seed is 0.1, undamped apart,
# where it jumps.
BALLS = {
    "plain, p = 2": (fsam.euclidean_ball, 0.275386),
    "plain, p = inf": (partial(fsam.euclidean_ball, ord=jnp.inf), 0.00773008),
    "adaptive, p = 2": (ADAPTIVE, 0.940036),
    "adaptive, p = inf": (partial(ADAPTIVE, ord=jnp.inf), 0.0423121),
    "adaptive by filter, p = 2": (partial(ADAPTIVE, scope="filter"), 0.151417),
    "Fisher, eta = 1": (FISHER, 0.577073),
    "Fisher, damping 1e-4": (partial(FISHER, damping=1e-4, relative=False), 0.0136232),
    "Fisher, undamped": (partial(FISHER, damping=0.0, relative=False), 0.000814038),
}
NAMES = (*SETTINGS, "seed", "reached")
NAMES += tuple(f"{rule}: {name}" for rule in RULES for name in (*FIGURES, *BALLS))


def train(batch_size, data, target, rounds, setting, key):
    """Trains one network for some rounds of ten steps.

    Returns the parameters at the first round at whose end the training loss is below
    the target (or the last ones), whether there was one, and the last parameters.
    """
    rate, decay, dropout = setting
    images, labels = data
    init_key, train_key = jax.random.split(key)
    params = perceptron.initial(init_key, (64, 48, 48, 10))
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, 0.9))

    def loss(params, key):
        rows_key, key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (batch_size,), 0, len(labels))
        x = images[rows]
        for i, layer in enumerate(params[:-1]):
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
            drop_key = jax.random.fold_in(key, i)
            kept = jax.random.bernoulli(drop_key, 1 - dropout, x.shape)
            x = jnp.where(kept, x / (1 - dropout), 0)
        return LOSS(params[-1:], (x, labels[rows]))

    def a_round(carry, key):
        state, stopped, reached = carry
        state = perceptron.follow(loss, optimizer, state, jax.random.split(key, 10))
        stopped = jax.tree.map(partial(jnp.where, reached), stopped, state[0])
        return (state, stopped, reached | (LOSS(state[0], data) <= target)), None

    carry = (params, optimizer.init(params)), params, jnp.array(False)
    keys = jax.random.split(train_key, rounds)
    ((params, _), stopped, reached), _ = jax.lax.scan(a_round, carry, keys)
    return stopped, reached, params


@jax.jit
def figures(networks, data):
    """Returns losses, accuracies and the rises in all balls, a row a network."""

    def of_one(params):
        (train, right), (test, true) = (perceptron.score(params, *d) for d in data)
        fisher = fsam.diagonal(fsam.fisher_exact(LOSS), params, data[0])
        rise = partial(fsam.sharpness, LOSS, params, data[0], fisher=fisher)
        rises = [rise(ball(rho), 10) for ball, rho in BALLS.values()]
        return jnp.stack([train, test, right, true, *rises])

    return jax.vmap(of_one)(networks)


def measured(trained, data, batch_size, seed):
    """Returns a row of numbers, in the order of NAMES, for each network of a seed."""
    stopped, reached, last = trained(batch_size, seed)
    rows = [[(batch_size, *setting, seed) for setting in GRID], reached[:, None]]
    for params in (stopped, last):
        found = np.array(figures(params, data))
        found[:, 2:4] = 1 - found[:, 2:4]
        rows.append(found)
    return np.concatenate(rows, axis=1)


def kendall(x, y, pairs, weights):
    """Returns Kendall's tau-b over some pairs, for each row of integer weights.

    A weight says how often a network was drawn: two copies of it are tied in both.
    """
    x, y = (np.sign(v[:, None] - v[None]) * pairs for v in (x, y))

    def total(matrix):
        return np.sum((weights @ matrix) * weights, axis=1)

    return total(x * y) / np.sqrt(np.maximum(total(x**2) * total(y**2), 1e-300))


def correlation(table, random, resamples, rule, gap):
    """Returns tau and its interval, by predictor and kind of pair."""
    usable = np.isfinite(table).all(1)
    if rule == "same loss":
        usable &= table[:, NAMES.index("reached")] == 1
    of = dict(zip(NAMES, table[usable].T, strict=True))
    gaps = of[f"{rule}: test {gap}"] - of[f"{rule}: train {gap}"]
    chosen = np.stack([of[name] for name in SETTINGS])
    equal = chosen[:, :, None] == chosen[:, None]
    masks = {"all": np.ones_like(equal[0]), "equal learning rate": equal[1]}
    masks["seeds only"] = equal.all(0)
    # Networks of one setting are drawn together: they are not independent.
    _, group = np.unique(chosen, axis=1, return_inverse=True)
    size = group.max() + 1
    draws = random.multinomial(size, np.full(size, 1 / size), resamples)
    weights = np.vstack([np.ones(len(gaps)), draws[:, group.ravel()]])
    predictors = {ball: of[f"{rule}: {ball}"] for ball in BALLS}
    predictors |= {name: of[name] for name in SETTINGS}
    predictors["training loss"] = of[f"{rule}: train loss"]

    def tau(name, kind):
        return kendall(predictors[name], gaps, masks[kind], weights)

    def interval(values):
        return np.round([values[0], *np.quantile(values[1:], (0.025, 0.975))], 3)

    # On the same draws, since both are taken of the same networks.
    less = tau("adaptive, p = 2", "all") - tau("plain, p = 2", "all")
    found = {n: {kind: interval(tau(n, kind)) for kind in masks} for n in predictors}
    return {"networks": len(gaps), "less": interval(less)[1:], "tau": found}


def correlations(table, resamples):
    """Returns what `correlation` does for each rule and gap."""
    every = partial(correlation, table, np.random.default_rng(0), resamples)
    return {rule: {gap: every(rule, gap) for gap in GAPS} for rule in RULES}


def report(found):
    """Prints tau of each predictor."""
    columns: show.Columns = {"predictor": lambda name, _: name}
    for kind in ("all", "equal learning rate", "seeds only"):
        columns[kind] = lambda _, of, k=kind: "{:.2f} [{:.2f}, {:.2f}]".format(*of[k])
    for rule, gap in itertools.product(RULES, GAPS):
        of = found[rule][gap]
        caption = "Adaptive less plain, p = 2: [{:.2f}, {:.2f}]".format(*of["less"])
        title = f"{rule}, gap in {gap}: tau over pairs of {of['networks']} networks"
        show.report(title, of["tau"], columns, caption)


def draw(found, path):
    """Draws tau of each predictor."""
    headline = "Adaptive sharpness orders the gap better than plain, and neither well"
    fig, axes = show.figure(1, 2, headline, figsize=(10, 4.6), sharey=True)
    for ax, kind in zip(axes[0], ("all", "equal learning rate"), strict=True):
        looks = zip(RULES, (-0.14, 0.14), (show.BLUE, show.VERMILLION), strict=True)
        for rule, shift, color in looks:
            of = found[rule]["loss"]["tau"]
            tau, *ends = np.array([of[name][kind] for name in of]).T
            tau = np.where(ends[0] == ends[1], np.nan, tau)  # Equal in all pairs.
            style = {"xerr": np.abs(tau - ends), "fmt": "o", "color": color}
            ax.errorbar(tau, np.arange(len(of)) + shift, label=rule, **style)
            ax.set_yticks(range(len(of)), [*of])
        ax.axvline(0, color=show.BLACK, lw=0.8)
        ax.set(xlim=(-0.8, 0.8), title=f"Tau with the gap in loss, pairs: {kind}")
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(fontsize=8, loc="lower right")
    show.save(fig, path)


@harness.experiment(
    smoke={"seeds": 1, "rounds": 9, "target": 9.0, "resamples": 9, "batch_sizes": [45]},
    batch_sizes=[15, 45, 135],
    rounds={"default": 150, "help": "of 10 steps"},
    target={"default": 0.03, "help": "the same loss"},
    seeds=3,
    resamples=2000,
)
def main(run: harness.Run) -> None:
    options = run.options
    (x, y), test = perceptron.split(datasets.load("digits"))
    data = (x[:300], jnp.asarray(y[:300])), test

    @partial(jax.jit, static_argnums=0)
    def trained(batch_size, seed):
        key = jax.random.fold_in(jax.random.key(seed), batch_size)
        one = partial(train, batch_size, data[0], options.target, options.rounds)
        return jax.vmap(one)(jnp.array(GRID), jax.random.split(key, len(GRID)))

    about, rows = run.take("rounds target"), []
    for size, seed in itertools.product(options.batch_sizes, range(options.seeds)):
        key = {"batch_size": size, "seed": seed, **about}
        rows += run.cell(measured, trained, data, size, seed, **key)
    about |= {"part": "tau", **run.take("resamples seeds")}
    found = run.cell(correlations, np.array(rows, float), options.resamples, **about)
    report(found)
    draw(found, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: does adaptive sharpness predict the generalisation gap better than plain?

First the reason why it should: the two layers of a ReLU network times a and 1/a compute
the same function, but are not equally sharp in a ball that does not move with them.
Then the test: many small networks that differ in batch size, learning rate, weight
decay and dropout, and the rank correlation (Kendall's tau-b) between the rise of the
training loss in a ball of each geometry and the gap between test and training figures.
Networks are compared twice: as they pass one and the same training loss, and after the
same number of steps. Since sharpness may do no more than follow the learning rate, tau
is also taken over pairs of equal learning rate, and over pairs that differ in nothing
but the seed.

The radii of all geometries are matched: on networks of another seed, the median rise is
the same for all of them. Three such rises are tried.

    python benchmarks/sharpness_and_gap.py
"""

import itertools
import sys
from functools import partial

import datasets
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from perceptron import initial

import fsam_optax as fsam


SIZES = (64, 48, 48, 10)
IMAGES = 300
BATCH_SIZES = (15, 45, 135)
RATES = (0.006, 0.02, 0.06)
DECAYS = (0.0, 5e-4, 2e-3)
DROPOUTS = (0.0, 0.2, 0.4)
SCALES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
RISES = (0.01, 0.1, 1.0)
STEPS = (1, 10)
MIDDLE = 1
AGAINST = f"{STEPS[-1]} steps, rise {RISES[MIDDLE]:g}"
RULES = ("same loss", "same steps")
FIGURES = ("train loss", "test loss", "train error", "test error")
BALLS = {
    "plain, p = 2": fsam.euclidean_ball,
    "plain, p = inf": partial(fsam.euclidean_ball, ord=jnp.inf),
    "adaptive, p = 2": partial(fsam.adaptive_ellipsoid, eta=0.0, normalize=True),
    "adaptive, p = inf": partial(
        fsam.adaptive_ellipsoid, eta=0.0, normalize=True, ord=jnp.inf
    ),
    "adaptive by filter, p = 2": partial(
        fsam.adaptive_ellipsoid, eta=0.0, normalize=True, scope="filter"
    ),
    "Fisher, eta = 1": partial(fsam.fisher_ellipsoid, estimator=fsam.given()),
    "Fisher, damping 1e-4": partial(
        fsam.fisher_ellipsoid, estimator=fsam.given(), damping=1e-4, relative=False
    ),
    "Fisher, undamped": partial(
        fsam.fisher_ellipsoid, estimator=fsam.given(), damping=0.0, relative=False
    ),
}
KINDS = [f"{ball}, {steps} steps" for ball in BALLS for steps in STEPS]


def apply(params, x, dropout=0.0, key=None):
    """Maps images (batch, 64) to logits (batch, 10)."""
    for i, layer in enumerate(params[:-1]):
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        if key is not None:
            keep = jax.random.bernoulli(
                jax.random.fold_in(key, i), 1 - dropout, x.shape
            )
            x = jnp.where(keep, x / (1 - dropout), 0)
    return x @ params[-1]["kernel"] + params[-1]["bias"][None]


LOSS = fsam.negative_log_likelihood(apply, fsam.categorical)


def train(setting, key, batch_size, train_set, target, rounds, every=10):
    """Trains one network for `rounds * every` steps.

    Returns the parameters at the first round at whose end the training loss is below
    the target (or the last ones), whether there was one, and the last parameters.
    """
    rate, decay, dropout = setting
    images, labels = train_set
    init_key, train_key = jax.random.split(key)
    params = initial(init_key, SIZES)
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, 0.9))

    def step(carry, key):
        params, state = carry
        rows_key, dropout_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (batch_size,), 0, len(labels))

        def loss(params):
            h = apply(params, images[rows], dropout, dropout_key)
            return -jnp.mean(fsam.categorical.log_prob(h, labels[rows]))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def a_round(carry, key):
        (params, state), stopped, reached = carry
        (params, state), _ = jax.lax.scan(
            step, (params, state), jax.random.split(key, every)
        )
        stopped = jax.tree.map(lambda s, w: jnp.where(reached, s, w), stopped, params)
        reached |= LOSS(params, train_set) <= target
        return ((params, state), stopped, reached), None

    carry = (params, optimizer.init(params)), params, jnp.array(False)
    keys = jax.random.split(train_key, rounds)
    ((params, _), stopped, reached), _ = jax.lax.scan(a_round, carry, keys)
    return stopped, reached, params


def score(params, data):
    """Returns loss and error."""
    images, labels = data
    return LOSS(params, data), jnp.mean(jnp.argmax(apply(params, images), -1) != labels)


@jax.jit
def rises(networks, train_set, radii):
    """Returns the rise of the loss of networks: (networks, KINDS, radii of a ball)."""

    def of_one(params):
        estimator = fsam.fisher_exact(apply, fsam.categorical)
        fisher = fsam.diagonal(estimator, params, train_set)

        def rise(rho, ball, steps):
            return fsam.sharpness(
                LOSS, params, train_set, BALLS[ball](rho), steps, fisher=fisher
            )

        return jnp.stack(
            [
                jax.vmap(partial(rise, ball=ball, steps=steps))(radii[i])
                for i, ball in enumerate(BALLS)
                for steps in STEPS
            ]
        )

    return jax.vmap(of_one)(networks)


def matched_radii(networks, train_set, rounds):
    """Returns radii, (BALLS, RISES), at which the median rise of networks is RISES."""
    low, high = (jnp.full((len(BALLS), len(RISES)), np.log(r)) for r in (1e-5, 1e2))
    for _ in range(rounds):
        middle = (low + high) / 2
        found = rises(networks, train_set, jnp.exp(middle))
        # Of each ball, the longest ascent.
        found = jnp.median(found, axis=0)[len(STEPS) - 1 :: len(STEPS)]
        short = found < jnp.array(RISES)[None]
        low, high = jnp.where(short, middle, low), jnp.where(short, high, middle)
    return jnp.exp((low + high) / 2)


def rescaled(params, a):
    """Returns a network whose first two layers are multiplied by a and 1 / a."""
    first, second, *rest = params
    first = jax.tree.map(lambda w: a * w, first)
    return [first, second | {"kernel": second["kernel"] / a}, *rest]


def invariance(params, train_set, radii, networks):
    """Returns what a rescaling does to the outputs and to each sharpness."""
    # Powers of 2, so that the rescaling itself is not rounded; repeated up to the
    # number of networks that `rises` is compiled for.
    scaled = [rescaled(params, a) for a in np.resize(SCALES, networks).tolist()]
    found = rises(jax.tree.map(lambda *w: jnp.stack(w), *scaled), train_set, radii)
    scaled, found = scaled[: len(SCALES)], found[: len(SCALES), :, MIDDLE]
    here = apply(params, train_set[0])
    changes = [jnp.max(jnp.abs(apply(w, train_set[0]) - here)) for w in scaled]
    return {
        "largest change of an output": float(max(changes)),
        "largest output": float(jnp.max(jnp.abs(here))),
        "scales": list(SCALES),
        "rise": dict(zip(KINDS, found.T.tolist(), strict=True)),
    }


def settings(smoke):
    """Returns combinations of learning rate, weight decay and dropout, one a row."""
    grid = np.array(list(itertools.product(RATES, DECAYS, DROPOUTS)), np.float32)
    return grid[[0, 5, 13, 18, 26]] if smoke else grid


def columns():
    """Returns the names of the numbers that are kept of each network."""
    of_rule = [*FIGURES, *(f"{kind}, rise {r:g}" for kind in KINDS for r in RISES)]
    return [
        *("batch size", "learning rate", "weight decay", "dropout", "seed", "reached"),
        *(f"{rule}: {name}" for rule in RULES for name in of_rule),
    ]


@partial(jax.jit, static_argnames=("batch_size", "rounds"))
def sweep(grid, keys, train_set, target, batch_size, rounds):
    """Trains the networks of one batch size and seed; see `train` for what returns."""

    def one(setting, key):
        return train(setting, key, batch_size, train_set, target, rounds)

    return jax.vmap(one)(grid, keys)


@jax.jit
def figures(networks, data):
    """Returns losses and errors of networks, in the order of FIGURES."""

    def one(params):
        (loss, error), (test_loss, test_error) = (score(params, part) for part in data)
        return jnp.stack([loss, test_loss, error, test_error])

    return jax.vmap(one)(networks)


def kendall(x, y, pairs, weights=None):
    """Returns Kendall's tau-b over some pairs, for each row of integer weights.

    A weight says how often a network was drawn: two copies of it are tied in both.
    """
    weights = np.ones((1, len(x))) if weights is None else weights
    x, y = (np.sign(v[:, None] - v[None]) * pairs for v in (x, y))

    def total(matrix):
        return np.sum((weights @ matrix) * weights, axis=1)

    return total(x * y) / np.sqrt(np.maximum(total(x**2) * total(y**2), 1e-300))


def correlations(table, options):
    """Returns tau and its interval, by rule, gap, kind of pair and predictor."""
    random = np.random.default_rng(0)
    names = columns()
    found = {}
    for rule, gap in itertools.product(RULES, ("loss", "error")):
        usable = np.all(np.isfinite(table), axis=1)
        if rule == "same loss":
            usable &= table[:, names.index("reached")] == 1
        of = dict(zip(names, table[usable].T, strict=True))
        gaps = of[f"{rule}: test {gap}"] - of[f"{rule}: train {gap}"]
        chosen = np.stack([of[name] for name in names[:4]])
        equal = chosen[:, :, None] == chosen[:, None]
        pairs = {
            "all": np.ones_like(equal[0]),
            "equal learning rate": equal[1],
            "seeds only": equal.all(0),
        }
        # Networks of one setting are drawn together: they are not independent.
        _, group = np.unique(chosen, axis=1, return_inverse=True)
        size = group.max() + 1
        draws = random.multinomial(size, np.full(size, 1 / size), options.resamples)
        weights = draws[:, group.ravel()].astype(float)
        predictors = {name: of[name] for name in names[:4]} | {
            name.removeprefix(f"{rule}: "): values
            for name, values in of.items()
            if name.startswith(rule) and "rise" in name
        }
        predictors["training loss"] = of[f"{rule}: train loss"]
        here = found.setdefault(rule, {"networks": len(gaps)})[gap] = {}
        here["standard deviation of the gap"] = round(float(np.std(gaps)), 4)
        for name, values in predictors.items():
            here[name] = {}
            for kind, mask in pairs.items():
                tau = kendall(values, gaps, mask)[0]
                ends = np.quantile(kendall(values, gaps, mask, weights), (0.025, 0.975))
                here[name][kind] = np.round([tau, *ends], 3).tolist()
            with_rate = kendall(values, of["learning rate"], pairs["all"])[0]
            here[name]["with the learning rate"] = round(float(with_rate), 3)
        # On the same draws, since both are taken of the same networks.
        ends = [
            kendall(predictors[f"{ball}, {AGAINST}"], gaps, pairs["all"], weights)
            for ball in ("adaptive, p = 2", "plain, p = 2")
        ]
        low, high = np.quantile(ends[0] - ends[1], (0.025, 0.975))
        here["adaptive less plain"] = [round(float(low), 3), round(float(high), 3)]
    return found


def print_tables(found, radii, tau, resamples):
    """Prints the invariance, and tau at the middle rise."""
    headings = ["sharpness", *(f"a = {a:g}" for a in found["scales"])]
    rows = [
        [kind, *(f"{v / values[2]:.4g}" for v in values)]
        for kind, values in found["rise"].items()
    ]
    caption = f"Largest change of an output: {found['largest change of an output']:.1e}"
    title = "Rise, over that of the same network not rescaled"
    show.table(title, headings, rows, caption)
    show.table("Radii", ["ball", *map(str, RISES)], [[k, *v] for k, v in radii.items()])
    headings = ["predictor", "all pairs", "equal learning\nrate", "seeds only"]
    for rule, gap in itertools.product(RULES, ("loss", "error")):
        rows = []
        for name, by_pairs in tau[rule][gap].items():
            if not isinstance(by_pairs, dict):
                continue
            if "rise" in name and not name.endswith(f"rise {RISES[MIDDLE]:g}"):
                continue
            *cells, rate = by_pairs.values()
            cells = (f"{t:.2f} [{low:.2f}, {high:.2f}]" for t, low, high in cells)
            rows.append([name.partition(", rise")[0], *cells, f"{rate:.2f}"])
        low, high = tau[rule][gap]["adaptive less plain"]
        caption = f"Adaptive less plain, {AGAINST}: [{low:.2f}, {high:.2f}]"
        title = f"{rule}, gap in {gap}: tau of {tau[rule]['networks']} networks"
        every = [*headings, "with\nrate"]
        show.table(title, every, rows, caption)


def draw(found, tau_of, table, path):
    """Draws the invariance, two of the measures against the gap, and tau."""
    plain, adaptive, fisher = show.BLUE, show.VERMILLION, show.GREEN
    headline = "Adaptive sharpness orders the gap better than plain, and neither well"
    fig, every = show.figure(2, 3, headline, figsize=(13, 9.6), height_ratios=(1, 1.2))
    axes = every[0]
    lines = {
        "plain, p = 2": (plain, "-", "o"),
        "plain, p = inf": (plain, "--", "s"),
        "adaptive, p = 2": (adaptive, "-", "o"),
        "adaptive, p = inf": (adaptive, "--", "s"),
        "Fisher, eta = 1": (fisher, "-", "o"),
        "Fisher, undamped": (fisher, ":", "^"),
    }
    for ball, (color, style, marker) in lines.items():
        if ball not in BALLS:
            continue
        values = np.array(found["rise"][f"{ball}, 10 steps"])
        axes[0].plot(
            *(found["scales"], values / values[2]),
            color=color,
            ls=style,
            marker=marker,
            ms=4,
            label=ball,
        )
    axes[0].set_xscale("log", base=2)
    axes[0].set_yscale("log")
    axes[0].set_xlabel("a: first layer times a, second over a")
    axes[0].set_ylabel("rise of the loss, over that at a = 1")
    axes[0].set_title("One function, rescaled", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    of = dict(zip(columns(), table[table[:, 5] == 1].T, strict=True))
    gap = of["same loss: test loss"] - of["same loss: train loss"]
    for ax, ball in zip(axes[1:], ("plain, p = 2", "adaptive, p = 2"), strict=True):
        values = of[f"same loss: {ball}, 10 steps, rise {RISES[MIDDLE]:g}"]
        for rate, color, marker in zip(
            RATES, ("#56B4E9", "#E69F00", "#000000"), "o^s", strict=True
        ):
            rows = np.isclose(of["learning rate"], rate)
            ax.scatter(
                *(values[rows], gap[rows]),
                s=16,
                color=color,
                marker=marker,
                alpha=0.8,
                lw=0,
                label=f"learning rate {rate:g}",
            )
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter("")
        ax.set_xlabel("rise of the training loss, ascent of 10 steps")
        ax.set_ylabel("test loss - training loss")
        ax.set_title(f"{ball}: networks of one training loss", fontsize=10)
    axes[1].legend(fontsize=8, frameon=False)
    names = [*(f"{ball}, 10 steps" for ball in BALLS), "learning rate", "batch size"]
    names += ["weight decay", "dropout"]
    axes = every[1]
    titles = {
        "all": "all pairs of networks",
        "equal learning rate": "pairs of equal learning rate",
        "seeds only": "pairs that differ in the seed only",
    }
    for ax, (kind, title) in zip(axes, titles.items(), strict=True):
        for rule, offset, fill in (("same loss", -0.14, True), ("same steps", 0.14, 0)):
            for i, name in enumerate(names):
                key = f"{name}, rise {RISES[MIDDLE]:g}" if "steps" in name else name
                tau, low, high = tau_of[rule]["loss"][key][kind]
                if low == high:  # Equal in all of these pairs.
                    continue
                color = {"p": plain, "a": adaptive, "F": fisher}.get(name[0], "#666666")
                ax.errorbar(
                    *(tau, i + offset),
                    xerr=[[max(tau - low, 0)], [max(high - tau, 0)]],
                    fmt="o",
                    ms=5,
                    color=color,
                    mfc=color if fill else "white",
                )
        ax.axvline(0, color="black", lw=0.8)
        ax.axhline(len(BALLS) - 0.5, color="black", lw=0.5, ls=":")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("Kendall's tau with the gap in loss")
        ax.grid(axis="x", alpha=0.3)
    for ax in axes:
        ticks = [n.removesuffix(", 10 steps") if ax is axes[0] else "" for n in names]
        ax.set_yticks(range(len(names)), ticks)
        ax.set_xlim(-0.8, 0.8)
        ax.invert_yaxis()
    for fill, rule in ((True, "at the same training loss"), (False, "same steps")):
        axes[2].errorbar(
            [], [], fmt="o", color="#666666", mfc=None if fill else "white", label=rule
        )
    axes[2].legend(fontsize=8, frameon=False, loc="lower left")
    show.save(fig, path)


def matched(data, train, rounds):
    """Returns the matched radii, and what rescaling does at them."""
    pilots, _, _ = train
    radii = matched_radii(pilots, data, rounds)
    first = jax.tree.map(lambda w: w[0], pilots)
    found = invariance(first, data, radii, len(jax.tree.leaves(pilots)[0]))
    return {"invariance": found, "radii": dict(zip(BALLS, radii.tolist(), strict=True))}


def measured(grid, networks, data, radii, batch_size, seed):
    """Returns a row of numbers for each network of a batch size and seed."""
    stopped, reached, last = networks
    rows = [[[batch_size, *setting, seed] for setting in grid.tolist()], reached]
    for params in (stopped, last):
        rows += [figures(params, data), rises(params, data[0], radii)]
    rows = np.concatenate([np.reshape(r, (len(grid), -1)) for r in rows], 1)
    return [" ".join(f"{v:.4g}" for v in row) for row in rows]


def experiment(run: harness.Run) -> None:
    """Runs what the results do not hold yet, prints the tables and draws the figure."""
    options = run.options
    digits = datasets.load("digits")
    data = [
        (jnp.asarray(x.reshape(len(x), -1) / 255, jnp.float32), jnp.asarray(y))
        for x, y in (
            (digits.train_images[:IMAGES], digits.train_labels[:IMAGES]),
            (digits.test_images, digits.test_labels),
        )
    ]
    grid = jnp.asarray(settings(options.smoke))

    def trained(batch_size, seed):
        key = jax.random.fold_in(jax.random.key(seed), batch_size)
        keys = jax.random.split(key, len(grid))
        return sweep(grid, keys, data[0], options.target, batch_size, options.rounds)

    about = {"rounds": options.rounds, "target": options.target}
    pilot = options.batch_sizes[len(options.batch_sizes) // 2]
    found = run.cell(
        lambda: matched(data[0], trained(pilot, 1000), options.halvings),
        **{"part": "radii", "halvings": options.halvings},
        **about,
    )
    radii, rows = jnp.array(list(found["radii"].values())), []
    for part in itertools.product(options.batch_sizes, range(options.seeds)):
        rows += run.cell(
            lambda part=part: measured(grid, trained(*part), data, radii, *part),
            **dict(zip(("batch_size", "seed"), part, strict=True)),
            **about,
        )
    table = np.array([[float(v) for v in row.split()] for row in rows])
    tau = run.cell(
        lambda: correlations(table, options),
        **{"part": "tau", "resamples": options.resamples, "seeds": options.seeds},
        **about,
    )
    print_tables(found["invariance"], found["radii"], tau, options.resamples)
    draw(found["invariance"], tau, table, run.picture())


def add_options(add):
    add("--batch-sizes", type=harness.whole, nargs="+", default=list(BATCH_SIZES))
    add("--rounds", type=harness.whole, default=150, help="of 10 steps")
    add("--target", type=harness.positive, default=0.03, help="the same loss")
    add("--seeds", type=harness.whole, default=3)
    add("--halvings", type=harness.whole, default=10, help="to match radii")
    add("--resamples", type=harness.whole, default=2000)


SMOKE = {"seeds": 2, "target": 10.0, "rounds": 10, "halvings": 2, "resamples": 20}


def main(arguments: list[str] | None = None) -> int:
    smoke = {**SMOKE, "batch_sizes": [45]}
    return harness.main(
        __doc__, experiment, arguments, options=add_options, smoke=smoke
    )


if __name__ == "__main__":
    sys.exit(main())

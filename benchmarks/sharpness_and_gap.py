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
from functools import partial

import command_line
import datasets
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import perceptron
import show
from perceptron import apply, LOSS

import fsam_optax as fsam


SIZES = (64, 48, 48, 10)
IMAGES = 300
RATES = (0.006, 0.02, 0.06)
DECAYS = (0.0, 5e-4, 2e-3)
DROPOUTS = (0.0, 0.2, 0.4)
SCALES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
RISES = (0.01, 0.1, 1.0)
STEPS = (1, 10)
MIDDLE = 1
AGAINST = f"{STEPS[-1]} steps, rise {RISES[MIDDLE]:g}"
KINDS_OF_PAIRS = {
    "all pairs": "all",
    "equal learning\nrate": "equal learning rate",
    "seeds only": "seeds only",
}
RULES = ("same loss", "same steps")
FIGURES = ("train loss", "test loss", "train error", "test error")
ADAPTIVE = partial(fsam.adaptive_ellipsoid, eta=0.0, normalize=True)
FISHER = partial(fsam.fisher_ellipsoid, estimator=fsam.given())
BALLS = {
    "plain, p = 2": fsam.euclidean_ball,
    "plain, p = inf": partial(fsam.euclidean_ball, ord=jnp.inf),
    "adaptive, p = 2": ADAPTIVE,
    "adaptive, p = inf": partial(ADAPTIVE, ord=jnp.inf),
    "adaptive by filter, p = 2": partial(ADAPTIVE, scope="filter"),
    "Fisher, eta = 1": FISHER,
    "Fisher, damping 1e-4": partial(FISHER, damping=1e-4, relative=False),
    "Fisher, undamped": partial(FISHER, damping=0.0, relative=False),
}
KINDS = [f"{ball}, {steps} steps" for ball in BALLS for steps in STEPS]


def dropped(params, x, dropout, key):
    """Maps images (batch, 64) to logits (batch, 10) of a network with dropout."""
    for i, layer in enumerate(params[:-1]):
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, x.shape)
        x = jnp.where(keep, x / (1 - dropout), 0)
    return perceptron.apply(params[-1:], x)


def train(setting, key, batch_size, train_set, target, rounds, every=10):
    """Trains one network for `rounds * every` steps.

    Returns the parameters at the first round at whose end the training loss is below
    the target (or the last ones), whether there was one, and the last parameters.
    """
    rate, decay, dropout = setting
    images, labels = train_set
    init_key, train_key = jax.random.split(key)
    params = perceptron.initial(init_key, SIZES)
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, 0.9))

    def step(carry, key):
        params, state = carry
        rows_key, dropout_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (batch_size,), 0, len(labels))

        def loss(params):
            h = dropped(params, images[rows], dropout, dropout_key)
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


@jax.jit
def rises(networks, train_set, radii):
    """Returns the rise of the loss of networks: (networks, KINDS, radii of a ball)."""

    def of_one(params):
        estimator = fsam.fisher_exact(LOSS)
        fisher = fsam.diagonal(estimator, params, train_set)

        def rise(rho, ball, steps):
            return fsam.sharpness(
                LOSS, params, train_set, BALLS[ball](rho), steps, fisher=fisher
            )

        pairs = [(*pair, n) for pair in zip(BALLS, radii, strict=True) for n in STEPS]
        every = [jax.vmap(partial(rise, ball=b, steps=n))(rho) for b, rho, n in pairs]
        return jnp.stack(every)

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
    fixed = batch_size, train_set, target, rounds
    return jax.vmap(lambda setting, key: train(setting, key, *fixed))(grid, keys)


@jax.jit
def figures(networks, data):
    """Returns losses and errors of networks, in the order of FIGURES."""

    def one(params):
        (train, right), (test, true) = (
            perceptron.score(params, *part) for part in data
        )
        return jnp.stack([train, test, 1 - right, 1 - true])

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


def correlations(table, resamples):
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
        kinds = np.ones_like(equal[0]), equal[1], equal.all(0)
        pairs = dict(zip(KINDS_OF_PAIRS.values(), kinds, strict=True))
        # Networks of one setting are drawn together: they are not independent.
        _, group = np.unique(chosen, axis=1, return_inverse=True)
        size = group.max() + 1
        draws = random.multinomial(size, np.full(size, 1 / size), resamples)
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


def print_tables(found, radii, tau):
    """Prints the invariance, and tau at the middle rise."""
    headings = ["sharpness", *(f"a = {a:g}" for a in found["scales"])]
    rows = [[k, *(f"{v / of[2]:.4g}" for v in of)] for k, of in found["rise"].items()]
    caption = f"Largest change of an output: {found['largest change of an output']:.1e}"
    title = "Rise, over that of the same network not rescaled"
    show.table(title, headings, rows, caption)
    show.table("Radii", ["ball", *map(str, RISES)], [[k, *v] for k, v in radii.items()])
    middle = f"rise {RISES[MIDDLE]:g}"
    columns: show.Columns = {"predictor": lambda name, _: name.partition(", rise")[0]}
    for heading, kind in KINDS_OF_PAIRS.items():
        form = "{:.2f} [{:.2f}, {:.2f}]".format
        columns[heading] = lambda _, of, kind=kind, form=form: form(*of[kind])
    columns["with\nrate"] = lambda _, of: f"{of['with the learning rate']:.2f}"
    for rule, gap in itertools.product(RULES, ("loss", "error")):
        shown = {
            name: of
            for name, of in tau[rule][gap].items()
            if isinstance(of, dict) and ("rise" not in name or name.endswith(middle))
        }
        low, high = tau[rule][gap]["adaptive less plain"]
        caption = f"Adaptive less plain, {AGAINST}: [{low:.2f}, {high:.2f}]"
        title = f"{rule}, gap in {gap}: tau of {tau[rule]['networks']} networks"
        show.report(title, shown, columns, caption)


def draw(found, tau_of, path):
    """Draws what a rescaling does to the measures, and tau of each."""
    colors = {"p": show.BLUE, "a": show.VERMILLION, "F": show.GREEN}
    headline = "Adaptive sharpness orders the gap better than plain, and neither well"
    fig, axes = show.figure(
        1, 3, headline, figsize=(13, 5.4), width_ratios=(1, 1.2, 1.2)
    )
    left, *others = axes[0]
    styles = "-o", "--s", "-o", "--s", "", "-o", "", ":^"
    for ball, style in zip(BALLS, styles, strict=True):
        if style:
            values = np.array(found["rise"][f"{ball}, 10 steps"])
            look = {"color": colors[ball[0]], "ms": 4, "label": ball}
            left.plot(found["scales"], values / values[2], style, **look)
    left.set_xscale("log", base=2)
    left.set(yscale="log", xlabel="a: first layer times a, second over a")
    left.set_title("Rise of one function's loss, rescaled by a")
    left.legend(fontsize=8)
    names = [*(f"{ball}, 10 steps" for ball in BALLS), "learning rate", "batch size"]
    names += ["weight decay", "dropout"]
    for ax, kind in zip(others, ("all", "equal learning rate"), strict=True):
        for rule, offset in (("same loss", -0.14), ("same steps", 0.14)):
            for i, name in enumerate(names):
                key = f"{name}, rise {RISES[MIDDLE]:g}" if "steps" in name else name
                tau, low, high = tau_of[rule]["loss"][key][kind]
                if low == high:  # Equal in all of these pairs.
                    continue
                color = colors.get(name[0], show.GREY)
                fill = {"mfc": color if rule == "same loss" else "white"}
                spread = np.maximum([[tau - low], [high - tau]], 0)
                bar = {"xerr": spread, "fmt": "o", "ms": 5, "color": color}
                label = rule if name == "learning rate" else None
                ax.errorbar(tau, i + offset, **bar, **fill, label=label)
        ax.axvline(0, color=show.BLACK, lw=0.8)
        ax.axhline(len(BALLS) - 0.5, color=show.BLACK, lw=0.5, ls=":")
        ticks = [n.removesuffix(", 10 steps") if ax is others[0] else "" for n in names]
        ax.set_yticks(range(len(names)), ticks)
        ax.set(xlim=(-0.8, 0.8), title=f"Tau with the gap in loss, pairs: {kind}")
        ax.invert_yaxis()
    others[0].legend(fontsize=8, loc="lower right")
    show.save(fig, path)


def matched(data, trained, rounds):
    """Returns the matched radii, and what rescaling does at them."""
    pilots, _, _ = trained()
    radii = matched_radii(pilots, data, rounds)
    first = jax.tree.map(lambda w: w[0], pilots)
    found = invariance(first, data, radii, len(jax.tree.leaves(pilots)[0]))
    return {"invariance": found, "radii": dict(zip(BALLS, radii.tolist(), strict=True))}


def measured(grid, trained, data, radii, batch_size, seed):
    """Returns a row of numbers for each network of a batch size and seed."""
    stopped, reached, last = trained(batch_size, seed)
    rows = [[[batch_size, *setting, seed] for setting in grid.tolist()], reached]
    for params in (stopped, last):
        rows += [figures(params, data), rises(params, data[0], radii)]
    rows = np.concatenate([np.reshape(r, (len(grid), -1)) for r in rows], 1)
    return [" ".join(f"{v:.4g}" for v in row) for row in rows]


@harness.experiment(
    smoke={
        **{"seeds": 2, "target": 10.0, "rounds": 10, "halvings": 2, "resamples": 20},
        "batch_sizes": [45],
    },
    batch_sizes=[15, 45, 135],
    rounds={"default": 150, "help": "of 10 steps"},
    target={"default": 0.03, "type": command_line.positive, "help": "the same loss"},
    seeds=3,
    halvings={"default": 10, "help": "to match radii"},
    resamples=2000,
)
def main(run: harness.Run) -> None:
    options = run.options
    (x, y), test = perceptron.split(datasets.load("digits"))
    data = (x[:IMAGES], jnp.asarray(y[:IMAGES])), test
    grid = jnp.array(list(itertools.product(RATES, DECAYS, DROPOUTS)))
    grid = grid[jnp.array([0, 5, 13, 18, 26])] if options.smoke else grid

    def trained(batch_size, seed):
        key = jax.random.fold_in(jax.random.key(seed), batch_size)
        keys = jax.random.split(key, len(grid))
        return sweep(grid, keys, data[0], options.target, batch_size, options.rounds)

    about = run.take("rounds target")
    pilot = options.batch_sizes[len(options.batch_sizes) // 2]
    args = matched, data[0], partial(trained, pilot, 1000), options.halvings
    found = run.cell(*args, part="radii", **run.take("halvings"), **about)
    radii, rows = jnp.array(list(found["radii"].values())), []
    for size, seed in itertools.product(options.batch_sizes, range(options.seeds)):
        key = {"batch_size": size, "seed": seed, **about}
        rows += run.cell(measured, grid, trained, data, radii, size, seed, **key)
    table = np.array([[float(v) for v in row.split()] for row in rows])
    about |= {"part": "tau", **run.take("resamples seeds")}
    tau = run.cell(correlations, table, options.resamples, **about)
    print_tables(found["invariance"], found["radii"], tau)
    draw(found["invariance"], tau, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

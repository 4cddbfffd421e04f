"""Question: what do Fisher SAM and EWC do for a language model fine-tuned by LoRA?

A small GPT reads English captions of images (Multi30k: Elliott et al. 2016,
https://arxiv.org/abs/1605.00459), several to a row; then adapters alone are fine-tuned
on the German ones, and it forgets its English. Compared at equal gradients and with
equal tuning: Adam, SAM and Fisher SAM; and, with Adam, penalties by several diagonals
F, on the adapter or on the weights that it changes.

    python docs/recipes/language_model.py --data-dir FOLDER

The folder holds train, val and test_2016_flickr, each as `.de.gz` and `.en.gz`, one
sentence a line. Smoke mode makes up its text.
"""

import itertools
import operator
import pathlib
import sys
from functools import cache, partial


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import captions
import diagonals
import gpt
import harness
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import perceptron
import show

import fsam_optax as fsam


LENGTH, RANK, PIECES = 64, 8, 512
ROWS = (128, 256)  # of validation, and of English that F is from; of test
# As many tries for each method: rates, or radii times rates in units of Adam's.
RATES = [{"rate": 0.0005 * 2**k} for k in range(9)]
RADII, FACTORS = (0.02, 0.1, 0.5), (0.5, 1, 2)
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # with F divided by its mean
LEVEL = 4.4  # of German, at which English is compared
SIGNS, ONES, WEIGHTS, ADAPTER = "random signs", "F = 1", "weights", "adapter"
PENALTIES = [
    *itertools.product((SIGNS, "empirical F", "squared gradient, 8", ONES), [WEIGHTS]),
    *itertools.product((SIGNS, ONES), [ADAPTER]),
]
HALF = "Adam, half the gradients"  # as many steps as SAM takes
POINT = {"method": "base", "rho": 0.0, "rate": 0.0, "F": "", "place": ""}
POINT |= {"strength": 0.0}


def places(adapter):
    """Returns what a penalty may pull: the changes of the weights, or the adapter."""
    return {WEIGHTS: gpt.changes(adapter), ADAPTER: adapter}


def fine_tuning(method, data, options):
    """Returns jitted `tune(net, adapter, f, rho, rate, strength, first, seed)`.

    It pulls by F, and does not see the rows before `first`, of the English half.
    """
    data = jax.tree.map(lambda *sides: jnp.concatenate(sides), *data)
    half, method = method == HALF, "base" if method == HALF else method
    steps = options.gradients // (2 if half else methods.METHODS[method].passes)

    @jax.jit
    def tune(net, start, f, rho, rate, strength, first, seed):
        def pulled(adapter, batch):
            moved = jax.tree.map(
                lambda f, new, old: jnp.sum(f * (new - old) ** 2),
                *(f, places(adapter), places(start)),
            )
            return gpt.LOSS(adapter, batch, net) + strength / 2 * optax.tree.sum(moved)

        optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps))
        optimizer = optax.chain(optimizer, optax.scale(rate))
        loss, args = (pulled, ()) if method == "base" else (gpt.LOSS, (net,))
        stepper = methods.stepper(method, loss, optimizer, rho)

        def step(carry, rows):
            batch = jax.tree.map(lambda a: a[rows], data)
            return tuple(stepper.step(*carry, batch, *args)[1:]), None

        key, shape = jax.random.key(1000 + seed), (steps, options.batch)
        rows = jax.random.randint(key, shape, first, len(data[1]))
        return jax.lax.scan(step, (start, stepper.init(start)), rows)[0][0]

    return tune


@partial(jax.jit, static_argnames=("name", "place"))
def diagonal(name, place, net, adapter, batch, key):
    """Returns F, of mean 1, of the adapter or of the weights that it changes."""
    params = adapter if place == ADAPTER else net["matrices"]
    loss = gpt.LOSS if place == ADAPTER else gpt.OF_MATRICES
    if name == ONES:
        return jax.tree.map(jnp.ones_like, params)
    if name == SIGNS:
        estimator = fsam.fisher_hutchinson(loss, key=key)
        f = fsam.diagonal(estimator, params, batch, loss_args=(net,))
    else:
        f = diagonals.diagonal(name, loss, params, batch, net)
    mean = optax.tree.sum(f) / optax.tree.size(f)
    return jax.tree.map(lambda x: x / mean, f)


@jax.jit
def scores(net, adapter, sides):
    """Returns nats a token on English and on German."""
    return jnp.stack([gpt.LOSS(adapter, side, net) for side in sides])


def laboratory(options):
    """Returns `attempt(...)`: what the network of a seed knows after fine-tuning."""
    text = captions.made_up() if options.smoke else captions.read(options.data_dir)
    sides = [[[pair[i] for pair in pairs] for i in (1, 0)] for pairs in text.values()]
    pieces, parts = gpt.pieces([*itertools.chain(*sides[0])], PIECES), []
    for pair, most in zip(sides, (None, *ROWS), strict=True):
        packed = [gpt.pack(gpt.encode(side, pieces), LENGTH) for side in pair]
        most = min(most or len(packed[0][1]), *(len(labels) for _, labels in packed))
        parts.append(jax.tree.map(lambda a, most=most: jnp.asarray(a[:most]), packed))
    train, val, test = parts
    english, steps = train[0], options.pretraining
    first = len(english[1])
    schedule = optax.warmup_cosine_decay_schedule(0, 4e-3, steps // 10, steps)

    @cache
    @jax.jit
    def start(seed):
        """Returns a network that knows English, and an adapter."""
        key, shape = jax.random.key(seed), (steps, 2 * options.batch)
        net = gpt.initial(key, len(pieces), LENGTH, options.width, options.depth)
        net = perceptron.minimise(
            lambda net, at: gpt.NET(net, jax.tree.map(lambda a: a[at], english)),
            *(net, optax.adam(schedule)),
            jax.random.randint(jax.random.fold_in(key, 1), shape, 0, first),
        )
        return net, gpt.adapter_of(jax.random.key(seed + 500), net, RANK)

    @cache
    def fisher(name, place, seed):
        some = jax.tree.map(lambda a: a[: ROWS[0]], english)
        return diagonal(name, place, *start(seed), some, jax.random.key(seed))

    tuned = cache(lambda method: fine_tuning(method, train, options))

    def attempt(method, rho, rate, F, place, strength, seed):
        net, adapter = start(seed)
        if method != "start":
            f = jax.tree.map(jnp.zeros_like, places(adapter))
            f |= {place: fisher(F, place, seed)} if place else {}
            mixed = method == "both"
            point = rho, rate, strength, 0 if mixed else first, seed
            adapter = tuned("base" if mixed else method)(net, adapter, f, *point)
        return {"val": scores(net, adapter, val), "test": scores(net, adapter, test)}

    return attempt


def report(rows, options):
    """Prints what is left of English and gained of German."""
    adam = np.mean(rows["Adam"][1], 1)

    def tried(_, row):
        values = [f"{row[0][k]:g}" for k in ("rho", "strength") if row[0][k]]
        edges = [edge for edge in row[0]["edges"] if "rate" not in edge]
        return "".join(values) + "*" * bool(edges)

    def level(_, row):
        curves = [
            np.array(sorted(curve, key=operator.itemgetter(1))).T for curve in row[2]
        ]
        english = [np.interp(LEVEL, c[1], c[0], np.nan, np.nan) for c in curves]
        return show.cell(english, ".2f") if np.isfinite(english or np.nan).all() else ""

    columns = {
        "": lambda name, _: name,
        "rate": lambda _, row: f"{row[0]['rate']:g}",
        "rho or\nlambda": tried,
        "English": lambda _, row: show.cell(np.array(row[1])[:, 0], ".3f"),
        "German": lambda _, row: show.cell(np.array(row[1])[:, 1], ".3f"),
        "mean,\nover Adam": lambda _, r: show.over(np.mean(r[1], 1), adam, "+.3f", 1),
        f"English at\nGerman {LEVEL:g}": level,
    }
    caption = "Nats a token on test captions, mean ± standard error, paired. "
    caption += "* at an edge of the grid."
    title = f"{options.gradients} gradients, {options.seeds} seeds"
    show.report(title, rows, columns, caption, first=28)


def draw(rows, path):
    """Draws English against German, as the strength of the pull grows."""
    title = "Of the penalties, any Fisher on the weights keeps most English"
    fig, axes = show.figure(1, 1, title, figsize=(10, 5.5))
    axis = axes[0][0]
    markers = iter("xoDs^*")
    for name, (best, tests, curve) in rows.items():
        english, german = np.mean(curve or tests, 0).T
        style = {"color": show.BLACK, "linestyle": ":" if curve else ""}
        style |= {} if curve else {"marker": next(markers), "ms": 8}
        if best["place"]:
            style = show.look("exact F" if best["F"] == SIGNS else best["F"])
        if best["place"] == ADAPTER:
            style |= {"linestyle": "--", "mfc": "white"}
        axis.plot(german, english, label=name, **style)
    axis.set(xlabel="German, nats a token", ylabel="English, nats a token")
    axis.legend(fontsize=8)
    show.save(fig, path)


@harness.experiment(
    smoke={
        **{"pretraining": 3, "gradients": 4, "batch": 2, "width": 8, "depth": 1},
        "seeds": 2,
    },
    data_dir=pathlib.Path("data/multi30k"),
    pretraining={"default": 600, "help": "steps, on English"},
    gradients={"default": 160, "help": "of one fine-tuning"},
    batch={"default": 8, "help": f"rows of {LENGTH} tokens; twice as many before"},
    seeds=3,
    width=128,
    depth=5,
)
def main(run: harness.Run) -> None:
    options, rows = run.options, {}
    settings = run.take("pretraining gradients batch width depth")
    attempt = cache(lambda: laboratory(options))

    def at(point, seed=0):
        point = point | {"seed": seed}
        return run.cell(lambda: attempt()(**point), **point, **settings)

    def add(name, score, points, curve=()):
        """Adds a row: the best point of the first seed, and what all seeds do there."""
        points = [POINT | point for point in points]
        best = methods.choose(points, [-score(at(point)["val"]) for point in points])
        point, seeds = {k: best[k] for k in POINT}, range(options.seeds)
        curves = [[at(POINT | p, seed)["test"] for p in curve] for seed in seeds]
        tests = [at(point, seed)["test"] for seed in seeds]
        rows[name] = best, tests, curves if curve else []

    german = operator.itemgetter(1)
    add("before", german, [{"method": "start"}])
    add("Adam", german, RATES)
    rate = rows["Adam"][0]["rate"]
    add(HALF, german, [{"method": HALF, **point} for point in RATES])
    grid = [{"rho": r, "rate": k * rate} for k in FACTORS for r in RADII]
    for name in ("SAM", "Fisher SAM, empirical, relative"):
        add(name, german, [{"method": name, **point} for point in grid])
    add("Adam, both corpora", german, [{"method": "both", "rate": rate}])
    slower = [point for point in RATES if point["rate"] <= rate]
    add("Adam, smaller rates", np.mean, RATES, slower)
    for name, place in PENALTIES:
        point = {"rate": rate, "F": name, "place": place}
        points = [point | {"strength": strength} for strength in STRENGTHS]
        add(f"EWC on {place}, {name}", np.mean, points, [{"rate": rate}, *points])
    report(rows, options)
    draw(rows, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: what do Fisher SAM and EWC do for a language model fine-tuned by LoRA?

A small GPT reads English captions of images (Multi30k: Elliott et al. 2016,
https://arxiv.org/abs/1605.00459), several to a row; then adapters alone are fine-tuned
on the German ones, and it forgets its English. Compared at equal gradients and with
equal tuning: Adam, SAM and Fisher SAM; and, with Adam, penalties by several diagonals
F, on the adapter or on the weights that it changes.

    python benchmarks/language_model.py --data-dir FOLDER

The folder holds train, val and test_2016_flickr, each as `.de.gz` and `.en.gz`, one
sentence a line. Smoke mode makes up its text.
"""

import itertools
import pathlib
from functools import cache, partial
from typing import Any

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


LENGTH, RANK = 64, 8
# As many tries for each method: rates, or radii times rates in units of Adam's.
RATES = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
RADII = (0.02, 0.1, 0.5)
FACTORS = (0.5, 1, 2)
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # with F divided by its mean
LEVELS = (4.0, 4.2, 4.4, 4.6)  # of German, at which English is compared
EMPIRICAL = "Fisher SAM, empirical, relative"
SIGNS, ONES = "random signs", "F = 1"
SQUARED = diagonals.squared(8)
DIAGONALS = (SIGNS, diagonals.EMPIRICAL, SQUARED, ONES)
WEIGHTS, ADAPTER = "weights", "adapter"
ENGLISH, GERMAN = range(2)
HALF = "Adam, half the gradients"  # as many steps as SAM takes
MARKERS = {"base": "o", HALF: "D", "SAM": "s", EMPIRICAL: "^", "both": "*"}
LOOKS = {  # As which diagonal each is drawn.
    **{SIGNS: "exact F", diagonals.EMPIRICAL: "empirical F"},
    **{SQUARED: "squared gradient", ONES: "random"},
}
TITLES = {"base": "Adam", "both": "Adam, both corpora", "slow": "Adam, smaller rates"}


def corpora(options: Any) -> tuple[int, dict[str, list[gpt.Text]], list[list[int]]]:
    """Returns the number of pieces, packed English and German, and English captions."""
    text = captions.made_up() if options.smoke else captions.read(options.data_dir)
    sides = {p: [[pair[i] for pair in text[p]] for i in (1, 0)] for p in text}
    known = gpt.pieces([*itertools.chain(*sides["train"])], options.pieces)
    encoded = {p: [gpt.encode(s, known) for s in sides[p]] for p in sides}
    rows = {"train": None, "val": options.val_rows, "test": options.test_rows}
    found = {}
    for part, (name, most) in zip(encoded, rows.items(), strict=True):
        packed = [gpt.pack(side, LENGTH) for side in encoded[part]]
        # As many rows of both.
        most = min(most or len(packed[0].part), *(len(text.part) for text in packed))
        found[name] = [gpt.Text(*(a[:most] for a in text)) for text in packed]
    return len(known), found, encoded["train"][ENGLISH]


def pretraining(data, pieces, options):
    """Returns jitted `pretrain(seed)`: a network that knows English."""
    data = jax.tree.map(jnp.asarray, data.batch)
    steps = options.pretraining
    schedule = optax.warmup_cosine_decay_schedule(0, 4e-3, steps // 10, steps)

    def loss(net, rows):
        return gpt.NET(net, jax.tree.map(lambda a: a[rows], data))

    @jax.jit
    def pretrain(seed):
        key = jax.random.key(seed)
        net = gpt.initial(key, pieces, LENGTH, options.width, options.depth)
        rows = (steps, 2 * options.batch)
        rows = jax.random.randint(jax.random.fold_in(key, 1), rows, 0, len(data[1]))
        return perceptron.minimise(loss, net, optax.adam(schedule), rows)

    return pretrain


def penalty(adapter, start, pull):
    """Returns sum F (w - w0)^2 / 2 over the weights, and over the adapter."""

    def square(f, new, old):
        return jnp.sum(f * (new - old) ** 2)

    moved, zeros = gpt.changes(adapter), gpt.changes(start)
    on_weights = jax.tree.map(square, pull[WEIGHTS], moved, zeros)
    on_adapter = jax.tree.map(square, pull[ADAPTER], adapter, start)
    return optax.tree.sum([on_weights, on_adapter]) / 2


def fine_tuning(method, data, options):
    """Returns jitted `tune(net, adapter, pull, point, first, seed)`.

    `point` is the radius, the rate and the strength of the pull; rows before `first`,
    of the English half, are not seen.
    """
    data = jax.tree.map(lambda *sides: jnp.concatenate(sides), *(d.batch for d in data))
    half, method = method == HALF, "base" if method == HALF else method
    steps = options.gradients // (2 if half else methods.METHODS[method].passes)

    @jax.jit
    def tune(net, start, pull, point, first, seed):
        rho, rate, strength = point

        def pulled(adapter, batch):
            loss = gpt.LOSS(adapter, batch, net)
            return loss + strength * penalty(adapter, start, pull)

        plain = method == "base"
        optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps))
        optimizer = optax.chain(optimizer, optax.scale(rate))
        loss, args = (pulled, ()) if plain else (gpt.LOSS, (net,))
        stepper = methods.stepper(method, loss, optimizer, rho)

        def step(carry, rows):
            batch = jax.tree.map(lambda a: a[rows], data)
            return tuple(stepper.step(*carry, batch, *args)[1:]), None

        key, shape = jax.random.key(1000 + seed), (steps, options.batch)
        rows = jax.random.randint(key, shape, first, len(data[1]))
        return jax.lax.scan(step, (start, stepper.init(start)), rows)[0][0]

    return tune


@jax.jit
def scores(net, adapter, sides):
    """Returns nats a token on English and on German."""

    def one(batch):
        total = jnp.sum(batch[1] >= 0)
        return gpt.LOSS(adapter, batch, net) * total, total

    def mean(batch):
        rows = jax.tree.map(lambda a: a[:, None], batch)
        losses, totals = jax.lax.map(one, rows, batch_size=32)
        return jnp.sum(losses) / jnp.sum(totals)

    return jnp.stack([mean(side) for side in sides])


@partial(jax.jit, static_argnames=("name", "place"))
def diagonal(name, place, net, adapter, batch, key):
    """Returns F of a network on a batch: of the adapter, or of what it changes."""
    params = adapter if place == ADAPTER else net["matrices"]
    loss = gpt.LOSS if place == ADAPTER else gpt.OF_MATRICES
    if name == ONES:
        return jax.tree.map(jnp.ones_like, params)
    if name == SIGNS:
        estimator = fsam.fisher_hutchinson(loss, key=key)
        return fsam.diagonal(estimator, params, batch, loss_args=(net,))
    return diagonals.diagonal(name, loss, params, batch, net)


def mean_of(tree):
    return optax.tree.sum(tree) / optax.tree.size(tree)


def english_at(points, german):
    """Returns English where a curve of (English, German) crosses a German loss."""
    english, levels = np.array(sorted(points, key=lambda pair: pair[GERMAN]), float).T
    return np.interp(german, levels, english, left=np.nan, right=np.nan)


def report(rows, curves, means, options):
    """Prints what is left of English and gained of German, and the means of F."""
    test = {
        key: np.array([r["test"] for r in found]) for key, (_, found) in rows.items()
    }
    lines = []
    for key, (point, _) in rows.items():
        title = key if isinstance(key, str) else f"EWC on {key[1]}, {key[0]}"
        values = [f"{point[k]:g}" for k in ("rho", "strength") if point.get(k)]
        edges = {edge.split()[1] for edge in point.get("edges", [])}
        star = "*" * bool(edges & {"rho", "rate", "strength"})
        cells = [f"{point['rate']:g}" if point else "", "".join(values) + star]
        cells += [show.cell(test[key][:, i], ".3f") for i in (ENGLISH, GERMAN)]
        over = show.over(test[key].mean(1), test["base"].mean(1), "+.3f", 1)
        lines.append([TITLES.get(title, title), *cells, over])
    heads = ["", "rate", "rho or\nlambda", "English", "German", "mean,\nover Adam"]
    caption = "Nats a token on test captions, mean ± standard error, paired. "
    caption += "* at an edge of the grid."
    title = f"{options.gradients} gradients, {options.seeds} seeds"
    show.table(title, heads, lines, caption, first=21)

    def level(found, german):
        english = np.array([english_at(points, german) for points in found])
        return show.cell(english, ".2f") if np.isfinite(english).all() else "-"

    def named(at, _):
        return f"EWC on {at[1]}, {at[0]}" if at[1] else TITLES[at[0]]

    columns = {"": named} | {
        f"German {german:g}": lambda _, found, german=german: level(found, german)
        for german in LEVELS
    }
    title = f"English at equal German, {options.curves} seeds"
    caption = "Nats a token, linearly between the points of each seed."
    show.report(title, curves, columns, caption, first=21)
    columns = {
        "mean of F, times 1e6": lambda at, _: f"{at[0]}, of the {at[1]}",
        "packed": lambda _, of: f"{of[0] * 1e6:.3f}",
        "one a row": lambda _, of: f"{of[LENGTH] * 1e6:.3f}",
    }
    show.report("The same captions, packed or padded", means, columns)


def mean_of_tests(rows, key):
    """Returns the mean over seeds of English and German."""
    return np.mean([result["test"] for result in rows[key][1]], 0)


def draw(rows, curves, path):
    """Draws English against German, as the strength of the pull grows."""
    pulled = mean_of_tests(rows, (SIGNS, WEIGHTS)) - mean_of_tests(rows, "base")
    headline = (
        f"F of random signs on the weights: English {pulled[ENGLISH]:+.2f} nats, "
    )
    headline += f"German {pulled[GERMAN]:+.2f}, beside no penalty"
    shared = {"figsize": (10, 4.6), "sharex": True, "sharey": True}
    fig, axes = show.figure(1, 2, headline, **shared)
    for axis, place in zip(axes[0], (WEIGHTS, ADAPTER), strict=True):
        for name, look in LOOKS.items():
            if (name, place) in curves:
                english, german = np.mean(curves[name, place], 0).T
                axis.plot(
                    german, english, **show.look(look), ms=4, label=f"EWC, {name}"
                )
        english, german = np.mean(curves["slow", ""], 0).T
        axis.plot(german, english, color=show.BLACK, lw=1, label=TITLES["slow"])
        for key, marker in MARKERS.items():
            if key in rows:
                english, german = mean_of_tests(rows, key)
                label = TITLES.get(key, key).removesuffix(", relative")
                axis.plot(german, english, marker, color=show.BLACK, ms=6, label=label)
        start = mean_of_tests(rows, "start")[ENGLISH]
        axis.axhline(start, color=show.BLACK, lw=1, ls=":")
        axis.set(xlabel="German, nats a token", title=f"the pull is on the {place}")
    axes[0][0].set_ylabel("English, nats a token")
    show.legend(fig, axes[0][0], 4, fontsize=8)
    show.save(fig, path)


@harness.experiment(
    smoke={
        **{"pretraining": 3, "gradients": 4, "batch": 2, "width": 8, "depth": 1},
        **{"fisher_rows": 8, "val_rows": 4, "test_rows": 4, "pieces": 40, "seeds": 2},
        **{"rates": [0.01], "radii": [0.1], "strengths": [0.1, 1.0]},
        **{"methods": [EMPIRICAL], "diagonals": [SIGNS], "curves": 2},
    },
    data_dir=pathlib.Path("data/multi30k"),
    methods={"default": ["SAM", EMPIRICAL], "nargs": "+", "choices": methods.METHODS},
    rates=list(RATES),
    radii=list(RADII),
    diagonals={"default": list(DIAGONALS), "nargs": "+", "choices": DIAGONALS},
    strengths={"default": list(STRENGTHS), "help": "lambdas, F divided by its mean"},
    pretraining={"default": 600, "help": "steps, on English"},
    gradients={"default": 160, "help": "of one fine-tuning"},
    batch={"default": 8, "help": f"rows of {LENGTH} tokens; twice as many before"},
    fisher_rows={"default": 128, "help": "rows of English that F is from"},
    val_rows=128,
    test_rows=256,
    pieces={"default": 512, "help": "of words, the vocabulary"},
    seeds=3,
    curves={"default": 3, "help": "seeds that run every lambda"},
    width=128,
    depth=5,
)
def main(run: harness.Run) -> None:
    options = run.options
    settings = run.take("pretraining gradients batch width depth pieces fisher_rows")
    settings |= run.take("val_rows test_rows")

    data = cache(lambda: corpora(options))

    @cache
    def pretrain():
        pieces, found, _ = data()
        return pretraining(found["train"][ENGLISH], pieces, options)

    @cache
    def start(seed):
        net = pretrain()(seed)
        return net, gpt.adapter_of(jax.random.key(seed + 500), net, RANK)

    @cache
    def tuned(method):
        return fine_tuning(method, data()[1]["train"], options)

    @cache
    def fisher(name, place, seed, length=0):
        side = data()[1]["train"][ENGLISH]
        side = gpt.Text(*(a[: options.fisher_rows] for a in side))
        if length:  # The same captions, one to a row.
            side = gpt.pack(data()[2][: int(side.part.max(1).sum())], length, most=1)
        batch = jax.tree.map(jnp.asarray, side.batch)
        return diagonal(name, place, *start(seed), batch, jax.random.key(seed))

    def mean_fisher(length, name, place):
        return mean_of(fisher(name, place, 0, length))

    def both(net, adapter):
        found = data()[1]
        sides = {p: [text.batch for text in found[p]] for p in ("val", "test")}
        return {p: scores(net, adapter, sides[p]) for p in sides}

    def attempt(method, seed, rho=0.0, rate=0.0, name="", place="", strength=0.0):
        def compute():
            net, adapter = start(seed)
            if method == "start":
                return both(net, adapter)
            pull = {WEIGHTS: net["matrices"], ADAPTER: adapter}
            pull = jax.tree.map(jnp.zeros_like, pull)
            if name:
                f = fisher(name, place, seed)
                pull[place] = jax.tree.map(lambda x: x / mean_of(f), f)
            mixed = method == "both"
            first = 0 if mixed else len(data()[1]["train"][ENGLISH].part)
            tune = tuned("base" if mixed else method)
            point = rho, rate, strength
            return both(net, tune(net, adapter, pull, point, first, seed))

        point = {"rho": rho, "rate": rate, "F": name, "place": place}
        point |= {"strength": strength, "seed": seed}
        return run.cell(compute, method=method, **point, **settings)

    def seeds_of(method, **point):
        return [attempt(method, seed, **point) for seed in range(options.seeds)]

    def tuned_by(method, points, score):
        """Returns the best point of the first seed, and what all seeds do there."""
        found = [attempt(method, 0, **point) for point in points]
        best = methods.choose(points, [-score(result["val"]) for result in found])
        point = {k: best[k] for k in points[0]}
        return best, seeds_of(method, **point)

    def curve(points):
        return [
            [attempt("base", seed, **point)["test"] for point in points]
            for seed in range(options.curves)
        ]

    rows: dict[Any, Any] = {"start": ({}, seeds_of("start"))}
    curves = {}

    def german(val):
        return val[GERMAN]

    rates = [{"rate": rate} for rate in options.rates]
    rows["base"] = tuned_by("base", rates, german)
    rate = rows["base"][0]["rate"]
    rows[HALF] = tuned_by(HALF, rates, german)
    for method in options.methods:
        points = [{"rho": r, "rate": k * rate} for k in FACTORS for r in options.radii]
        rows[method] = tuned_by(method, points, german)
    rows["both"] = {"rate": rate}, seeds_of("both", rate=rate)
    rows["slow"] = tuned_by("base", rates, np.mean)
    curves["slow", ""] = curve([p for p in rates if p["rate"] <= rate])
    for place in (WEIGHTS, ADAPTER):
        for name in options.diagonals:
            if place == ADAPTER and name not in (SIGNS, ONES):
                continue
            point = {"rate": rate, "name": name, "place": place}
            points = [point | {"strength": s} for s in options.strengths]
            rows[name, place] = tuned_by("base", points, np.mean)
            curves[name, place] = curve([{"rate": rate}, *points])
    means = {}
    for place, name in itertools.product((WEIGHTS, ADAPTER), options.diagonals[:2]):
        key = {"mean of F": name, "place": place, **settings}
        args = mean_fisher, name, place
        means[name, place] = run.each("length", (0, LENGTH), *args, **key)
    report(rows, curves, means, options)
    draw(rows, curves, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

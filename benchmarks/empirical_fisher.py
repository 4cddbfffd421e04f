"""Question: can the empirical Fisher stand in for the Fisher in natural gradients?

After Kunstner, Balles and Hennig, Limitations of the Empirical Fisher Approximation for
Natural Gradient Descent, 2019, https://arxiv.org/abs/1905.12558, in float64:

1. both matrices at the minimum of logistic and linear regressions, with the model that
   made the data and with two wrong ones;
2. a hundred steps of gradient descent (GD), natural gradient descent (NGD) and descent
   preconditioned by the empirical Fisher (EFGD) on real data, step size and damping
   chosen on the paper's grid by the final training loss, and the cosine between the
   last two directions along the path of EFGD.

    python benchmarks/empirical_fisher.py     # about an hour, most of it the data a1a

Boston has a racist premise, for which scikit-learn has removed it: it is here only to
compare with the paper.
"""

import itertools
from functools import partial
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import show

import fsam_optax as fsam


LOOKS = {
    "GD": {"color": show.BLACK, "ls": ":", "lw": 2},
    "NGD": {"color": show.BLUE, "ls": "-", "lw": 2},
    "EFGD": {"color": show.VERMILLION, "ls": "--", "lw": 2},
}
METHODS = (*LOOKS,)
MATRICES = {"NGD": fsam.dense_fisher, "EFGD": fsam.dense_empirical_fisher}
STEP_SIZES = np.logspace(-20, 10, 241)
DAMPINGS = np.logspace(-10, 10, 41)
CASES = ("correct", "wrong A", "wrong B")
# Kind, and log10 of the settings that the paper prints: the step size of GD, step size
# and damping of NGD and of EFGD.
SOURCES = {
    "breast_cancer": ("logistic", (-5.125,), (0.125, -10), (-1.25, -10)),
    "bostonHousing": ("linear", (-5.25,), (0.125, -10), (-1.25, -8)),
    "a1a": ("logistic", (0.25,), (0.25, -10), (-0.375, -8)),
    "wine": ("linear", (-5.625,), (0, -8.5), (-1.375, -6)),
    "energy": ("linear", (-5.5,), (0, -7.5), (0.875, -3)),
    "power-plant": ("linear", (-5.75,), (-0.625, -8), (3.375, -1)),
    "yacht": ("linear", (-1.5,), (-0.75, -7.5), (1.625, -6.5)),
}


def model(kind):
    """Returns a regression, "linear" with unit noise or "logistic"."""
    likelihood = fsam.gaussian() if kind == "linear" else fsam.bernoulli
    return fsam.negative_log_likelihood(lambda w, x: (x @ w)[:, None], likelihood)


def loss(kind, batch, w):
    """Returns the mean loss, without the constant of a Gaussian."""
    constant = np.log(2 * np.pi) / 2 if kind == "linear" else 0.0
    return jnp.asarray(model(kind)(w, batch)) - constant


# 1. Misspecified models.


def wrong_data(kind, case, size, seed):
    """Returns data that a regression of a kind fits only where they are "correct".

    "logistic" separates two Gaussian clouds, whose noise two matrices multiply: square
    roots of the covariances, as in the released code. "linear" fits y = 1 + x + noise,
    with the noise or the curve wrong.
    """
    random = np.random.default_rng(seed)
    if kind == "linear":
        x, noise = random.normal(size=(2, size))
        extra = {"correct": noise, "wrong A": 2 * noise, "wrong B": noise + x**2 / 2}
        return np.stack([x, np.ones(size)], 1), (1 + x + extra[case])[:, None]
    mean, first, second = {
        "correct": (1.0, [[2, 0], [0, 2]], [[2, 0], [0, 2]]),
        "wrong A": (1.5, [[3, 0], [0, 3]], [[1, 0], [0, 1]]),
        "wrong B": (1.0, [[1.5, -0.9], [-0.9, 1.5]], [[1.5, 0.9], [0.9, 1.5]]),
    }[case]
    noise = random.normal(size=(2, size // 2, 2))
    x = np.concatenate([mean + noise[0] @ first, -mean + noise[1] @ second])
    return x, np.repeat([[0.0], [1.0]], size // 2, axis=0)


def misspecified(kind, case, size, seeds):
    """Returns how far the empirical Fisher and the Hessian are from the Fisher."""

    @jax.jit
    def errors(batch):
        at = partial(loss, kind, batch)
        slope, curvature = jax.grad(at), jax.hessian(at)

        def newton(_, w):
            return w - jnp.linalg.solve(curvature(w), slope(w))

        w = jax.lax.fori_loop(0, 20, newton, jnp.zeros(2))
        fisher, *others = (of(model(kind), w, batch) for of in MATRICES.values())
        others.append(curvature(w))
        return [jnp.linalg.norm(m - fisher) / jnp.linalg.norm(fisher) for m in others]

    every = [errors(wrong_data(kind, case, size, seed)) for seed in range(seeds)]
    return dict(zip(("empirical", "hessian"), np.transpose(every), strict=True))


# 2. Optimisation on real data.


def read(name, folder):
    """Returns features and targets of a data set."""
    import sklearn.datasets

    if name == "a1a":
        file = str(folder / "a1a.svmlight")
        x, y, *_ = sklearn.datasets.load_svmlight_file(file, n_features=123)
        return x.toarray(), (y + 1) / 2
    if name in ("wine", "breast_cancer"):
        return getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    target = int((folder / "uci" / f"{name}.target").read_text())
    table = np.loadtxt(folder / "uci" / f"{name}.txt")
    return np.delete(table, target, axis=1), table[:, target]


def load(name, folder):
    """Reads a data set, adds a constant feature and rotates to the principal axes.

    Rotating changes none of the methods: damping and step are the same in all
    directions. It spares them the directions in which there are no data, where
    gradients are 0, and much of the rounding.
    """
    x, y = read(name, folder)
    x = np.append(x, np.ones((len(x), 1)), axis=1)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    keep = s > 1e-12 * s[0]
    return u[:, keep] * s[keep], np.array(y, float)[:, None]


def direction(kind, batch, method, damping, w) -> Any:
    """Returns (M + damping)^-1 g; g itself for GD."""
    gradient = jax.grad(partial(loss, kind, batch))(w)
    if method == "GD":
        return gradient
    matrix = partial(MATRICES[method], model(kind))
    precondition = fsam.scale_by_inverse_dense(matrix, damping=damping)
    return precondition.update(gradient, precondition.init(w), w, batch=batch)[0]


def path(kind, batch, method, iterations, step_size, damping=0.0):
    """Returns the points of a run from 0, before every step and after the last."""

    def step(w, _):
        return w - step_size * direction(kind, batch, method, damping, w), w

    start = jnp.zeros(batch[0].shape[1])
    return jax.lax.scan(step, start, None, length=iterations + 1)[1]


def optimise(method, name, folder, step_sizes, dampings, iterations):
    """Runs a method at every setting of the grid, and returns what is best.

    For EFGD also the cosine between its direction and the natural one, both undamped,
    at the same points. Runs that came to a hundred times the first loss do not count.
    """
    problem = SOURCES[name][0], load(name, folder)
    run = partial(path, *problem, method, iterations)

    @jax.jit
    def losses(setting):
        return jax.lax.map(partial(loss, *problem), run(*setting))

    def final(setting):
        every = losses(setting)
        return jnp.where(jnp.max(every) <= 100 * every[0], every[-1], jnp.inf)

    def cosine(w):
        a, b = (direction(*problem, m, 0.0, w) for m in ("NGD", "EFGD"))
        return jnp.sum(a * b) / jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))

    axes = (step_sizes,) if method == "GD" else (step_sizes, dampings)
    settings = jnp.array([*itertools.product(*axes)])
    table = jax.jit(partial(jax.lax.map, final))(settings)
    best = settings[jnp.argmin(table)]
    found = {
        "setting": jnp.log10(best),
        "good": jnp.sum(table <= 1.01 * jnp.min(table)),
        "losses": losses(best),
        "loss at printed": final(10 ** jnp.array(printed(name, method), float)),
    }
    if method == "EFGD":
        found["cosines"] = jax.jit(jax.vmap(cosine))(run(*best))
    return found


def printed(name, method):
    """Returns log10 of the setting in the paper."""
    return SOURCES[name][1 + METHODS.index(method)]


def report(errors, runs):
    """Prints the distances at the minimum, and the settings that were chosen."""
    columns = {
        "model": lambda at, _: at[0],
        "N": lambda at, _: at[1],
        "empirical Fisher": lambda _, of: show.cell(of["empirical"], ".3f"),
        "Hessian": lambda _, of: f"{max(of['hessian']):.0e}",
    }
    caption = "Frobenius norm of the difference over that of the Fisher; mean ± "
    caption += "standard error over data seeds."
    title = "Distance of a matrix from the Fisher at the minimum"
    show.report(title, errors, columns, caption)

    def pair(values):
        return ", ".join(f"{v:g}" for v in values)

    columns = {
        "data": lambda at, f: at[0] if at[1] == "GD" else "",
        "method": lambda at, f: at[1],
        "step, damp.": lambda at, f: pair(f["setting"]),
        "final\nloss": lambda at, f: f"{f['losses'][-1]:.4g}",
        "paper's\nstep, damp.": lambda at, f: pair(printed(*at)),
        "loss\nthere": lambda at, f: f"{f['loss at printed']:.4g}",
        "good": lambda at, f: f["good"],
    }
    caption = "Step size and damping as log10. Good: settings of the grid whose final "
    caption += "loss is within 1 % of the best, of 241 for GD and 9881 for the others."
    title = "Settings chosen by the final loss, and the paper's"
    found = {(name, m): facts for name, of in runs.items() for m, facts in of.items()}
    show.report(title, found, columns, caption)


def draw(runs, file):
    """Draws the loss of the chosen runs and the cosine between both directions."""
    headline = "With a search for step and damping it mostly arrives, later than the "
    sizes = {"figsize": (16, 5.2), "height_ratios": [2, 1], "sharex": True}
    figure, axes = show.figure(2, len(runs), f"{headline}Fisher", **sizes)
    for (name, data), (top, bottom) in zip(runs.items(), axes.T, strict=True):
        for method, found in data.items():
            top.plot(np.array(found["losses"], float), **LOOKS[method], label=method)
        top.set(yscale="log", title=name)
        cosines = np.array(data["EFGD"]["cosines"], float)
        bottom.plot(cosines, ".", color=show.VERMILLION, ms=3)
        bottom.set(ylim=(-1.08, 1.08), yticks=[-1, 0, 1], xlabel="iteration")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("cosine")
    show.legend(figure, axes[0, 0], 3)
    show.save(figure, file)


@harness.experiment(
    smoke={"iterations": 5, "seeds": 2, "datasets": ["wine"]},
    data_dir=harness.HERE.parents[1] / "shared" / "data",
    datasets={"default": list(SOURCES), "choices": SOURCES},
    seeds={"default": 20, "help": "of the data of part 1"},
    iterations=100,
)
def main(run: harness.Run) -> None:
    options = run.options
    jax.config.update("jax_enable_x64", True)
    sizes = (100,) if options.smoke else (1000, 100_000)
    errors = {}
    for kind, case, size in itertools.product(("logistic", "linear"), CASES, sizes):
        key = {"case": case, "size": size, "seeds": options.seeds}
        args = misspecified, kind, *key.values()
        key |= {"part": "misspecified", "model": kind}
        errors[f"{kind}, {case}", size] = run.cell(*args, **key)
    every = (20, 10) if options.smoke else (1, 1)
    grid = STEP_SIZES[:: every[0]], DAMPINGS[:: every[1]], options.iterations
    about = {"part": "optimisation", "dampings": len(grid[1]), **run.take("iterations")}
    runs = {}
    for name in options.datasets:
        args = optimise, name, options.data_dir, *grid
        runs[name] = run.each("method", METHODS, *args, data=name, **about)
    report(errors, runs)
    draw(runs, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: can the empirical Fisher stand in for the Fisher in natural gradients?

The experiments of Kunstner, Balles and Hennig, Limitations of the Empirical Fisher
Approximation for Natural Gradient Descent, 2019, https://arxiv.org/abs/1905.12558:

1. the vector fields of gradient descent (GD), natural gradient descent (NGD) and
   descent preconditioned by the empirical Fisher (EFGD) on a linear regression;
2. both matrices at the minimum of logistic and linear regressions, with the model
   that made the data and with two wrong ones;
3. a hundred steps on real data, step size and damping chosen on the paper's grid by the
   final training loss, and the cosine between both directions along the path of EFGD.

    python benchmarks/empirical_fisher.py               # about ten minutes of one core

The grid search, in NumPy, leaves out runs that diverged or are too slow to win. The
chosen runs, the matrices and the fields are computed by fsam_optax, in float64. Data
sets that --data-dir does not hold are left out by name. Boston has a racist premise,
for which scikit-learn has removed it: it is here only to compare with the paper.
"""

import itertools
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import show

import fsam_optax as fsam


METHODS = ("GD", "NGD", "EFGD")
LOOKS = {
    "GD": {"color": show.BLACK, "ls": ":", "lw": 2},
    "NGD": {"color": show.BLUE, "ls": "-", "lw": 2},
    "EFGD": {"color": show.VERMILLION, "ls": "--", "lw": 2},
}
STEP_SIZES = np.logspace(-20, 10, 241)
DAMPINGS = np.logspace(-10, 10, 41)


class Regression(NamedTuple):
    """A generalised linear model and its data.

    Attributes:
        kind: "linear" (unit noise; half the mean squared error) or "logistic".
        x: Features, of shape (N, D).
        y: Targets, of shape (N,); 0 or 1 for "logistic".
    """

    kind: str
    x: Any
    y: Any

    @property
    def nll(self) -> Any:
        """The same model for the library."""
        likelihood = fsam.gaussian() if self.kind == "linear" else fsam.bernoulli
        return fsam.negative_log_likelihood(lambda w, x: (x @ w)[:, None], likelihood)

    @property
    def batch(self) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets for the library."""
        return jnp.asarray(self.x), jnp.asarray(self.y)[:, None]


def losses_of(problem: Regression, h: Any) -> Any:
    """Returns the mean loss of outputs (..., N), without the constant of a Gaussian."""
    if problem.kind == "linear":
        return ((h - problem.y) ** 2).mean(-1) / 2
    xp = jnp if isinstance(h, jax.Array) else np
    return (xp.logaddexp(0, h) - problem.y * h).mean(-1)


def mean_loss(problem: Regression):
    """Returns the loss as a function of the weights."""
    x = jnp.asarray(problem.x)
    return lambda w: losses_of(problem, x @ w)


def matrix_fn(problem: Regression, method: str):
    """Returns the matrix of a method as a function of (w, batch)."""
    dense = fsam.dense_fisher if method == "NGD" else fsam.dense_empirical_fisher
    return partial(dense, problem.nll)


def direction_fn(problem: Regression, method: str, damping: float) -> Any:
    """Returns (M + damping)^-1 g as a function of w; g itself for GD."""
    gradient = jax.grad(mean_loss(problem))
    if method == "GD":
        return gradient
    matrix = matrix_fn(problem, method)
    precondition = fsam.scale_by_inverse_dense(matrix, damping=damping)

    def direction(w):
        state = precondition.init(w)
        return precondition.update(gradient(w), state, w, batch=problem.batch)[0]

    return direction


# 1. Vector fields.

STARTS = np.array([[2, 4.5], [1, 0], [4.5, 3], [-0.5, 3]])
# Lengths of the arrows, and so of the steps, in the released code.
LENGTHS = {"GD": 1 / 3, "NGD": 1.0, "EFGD": 3.0}
ACROSS = np.linspace(-1, 5, 15)


def fields_problem(size: int = 1000) -> Regression:
    """Returns the linear regression of the paper's figure 1: intercept and slope 2."""
    random = np.random.default_rng(0)
    x = random.lognormal(0, 0.75, size)
    y = 2 + 2 * x + random.normal(size=size)
    return Regression("linear", np.stack([np.ones(size), x], 1), y)


def field(method: str, steps: int) -> dict[str, Any]:
    """Computes the vector field of a method and a trajectory from each start."""
    problem = fields_problem()
    grid = jnp.asarray(np.stack(np.meshgrid(ACROSS, ACROSS), -1).reshape(-1, 2))
    minimum = np.linalg.lstsq(problem.x, problem.y)[0]
    direction = direction_fn(problem, method, 1e-8)

    def velocity(w):
        return -LENGTHS[method] * direction(w)

    def walk(start):
        def step(w, _):
            return w + 1e-3 * velocity(w), w

        return jax.lax.scan(step, start, None, length=steps)[1]

    paths = np.asarray(jax.jit(jax.vmap(walk))(jnp.asarray(STARTS)))
    return {
        "minimum": minimum,
        "arrows": jax.jit(jax.vmap(velocity))(grid),
        # Enough points to draw the curve.
        "paths": paths[:, :: max(1, steps // 250)],
        "final_distance": np.linalg.norm(paths[:, -1] - minimum, axis=-1),
    }


# 2. Misspecified models.

CASES = ("correct", "wrong A", "wrong B")


def wrong_problem(kind: str, case: str, size: int, seed: int) -> Regression:
    """Returns data that a regression of a kind fits only where they are "correct".

    "logistic" separates two Gaussian clouds, whose noise two matrices multiply: square
    roots of the covariances, as in the released code. "linear" fits y = 1 + x + noise,
    with the noise or the curve wrong.
    """
    random = np.random.default_rng(seed)
    if kind == "linear":
        x, noise = random.normal(size=(2, size))
        extra = {"correct": noise, "wrong A": 2 * noise, "wrong B": noise + x**2 / 2}
        return Regression(kind, np.stack([x, np.ones(size)], 1), 1 + x + extra[case])
    mean, first, second = {
        "correct": (1.0, [[2, 0], [0, 2]], [[2, 0], [0, 2]]),
        "wrong A": (1.5, [[3, 0], [0, 3]], [[1, 0], [0, 1]]),
        "wrong B": (1.0, [[1.5, -0.9], [-0.9, 1.5]], [[1.5, 0.9], [0.9, 1.5]]),
    }[case]
    noise = random.normal(size=(2, size // 2, 2))
    x = np.concatenate([mean + noise[0] @ first, -mean + noise[1] @ second])
    return Regression(kind, x, np.repeat([0.0, 1.0], size // 2))


@partial(jax.jit, static_argnames="kind")
def matrices_at_minimum(kind: str, x: jax.Array, y: jax.Array):
    """Returns the minimum, and the Fisher, the empirical Fisher and the Hessian."""
    problem = Regression(kind, x, y)
    loss = mean_loss(problem)

    def newton(w, _):
        return w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w)), None

    w, _ = jax.lax.scan(newton, jnp.zeros(x.shape[1]), None, length=20)
    pair = [matrix_fn(problem, method)(w, problem.batch) for method in METHODS[1:]]
    return w, *pair, jax.hessian(loss)(w)


def misspecified(kind: str, case: str, size: int, seeds: int) -> dict[str, Any]:
    """Compares the matrices at the minimum; keeps those of the first seed."""
    problems = (wrong_problem(kind, case, size, seed) for seed in range(seeds))
    found = [jax.device_get(matrices_at_minimum(*problem)) for problem in problems]

    def errors(index):
        pairs = ((every[index], every[1]) for every in found)
        return [np.linalg.norm(m - f) / np.linalg.norm(f) for m, f in pairs]

    w, fisher, empirical, _ = found[0]
    first = {"minimum": w, "fisher": fisher, "empirical": empirical}
    return {**first, "error": {"empirical": errors(2), "hessian": errors(3)}}


# 3. Optimisation on real data.


# Title and kind, and log10 of the settings that the paper prints: the step size of GD,
# step size and damping of NGD and of EFGD.
NONE = np.nan
BREAST_CANCER = "logistic", (-5.125, NONE), (0.125, -10), (-1.25, -10)
SOURCES = {
    "breast-cancer-original": ("Breast c. original", *BREAST_CANCER),
    "breast-cancer-diagnostic": ("Breast c. diagnostic", *BREAST_CANCER),
    "boston": ("Boston", "linear", (-5.25, NONE), (0.125, -10), (-1.25, -8)),
    "a1a": ("a1a", "logistic", (0.25, NONE), (0.25, -10), (-0.375, -8)),
    "wine": ("Wine", "linear", (-5.625, NONE), (0, -8.5), (-1.375, -6)),
    "energy": ("Energy", "linear", (-5.5, NONE), (0, -7.5), (0.875, -3)),
    "power-plant": ("Power plant", "linear", (-5.75, NONE), (-0.625, -8), (3.375, -1)),
    "yacht": ("Yacht", "linear", (-1.5, NONE), (-0.75, -7.5), (1.625, -6.5)),
}


def printed(name: str, method: str) -> tuple[float, float]:
    """Returns step size and damping of the paper; NaN where there is none."""
    return SOURCES[name][2 + METHODS.index(method)]


def read(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns features and targets of a data set."""
    import sklearn.datasets

    if name == "a1a":
        file = str(folder / "a1a.svmlight")
        x, y, *_ = sklearn.datasets.load_svmlight_file(file, n_features=123)
        return x.toarray(), (y + 1) / 2
    if name in ("breast-cancer-diagnostic", "wine"):
        of = {"wine": sklearn.datasets.load_wine}
        x, y = of.get(name, sklearn.datasets.load_breast_cancer)(return_X_y=True)
        return x, y.astype(float)
    uci = folder / "uci"
    if name == "breast-cancer-original":
        file = uci / "breast-cancer-wisconsin-original.csv"
        table, target = np.loadtxt(file, delimiter=",", skiprows=1), -1
    else:
        name = {"boston": "bostonHousing"}.get(name, name)
        target = int((uci / f"{name}.target").read_text())
        table = np.loadtxt(uci / f"{name}.txt")
    return np.delete(table, target, axis=1), table[:, target]


def load(name: str, folder: Path) -> Regression:
    """Reads a data set, adds a constant feature and rotates to the principal axes.

    Rotating changes none of the methods: damping and step are the same in all
    directions. It spares them the directions in which there are no data, where
    gradients are 0, and much of the rounding.
    """
    x, y = read(name, folder)
    x = np.append(x, np.ones((len(x), 1)), axis=1)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    keep = s > 1e-12 * s[0]
    return Regression(SOURCES[name][1], u[:, keep] * s[keep], y)


def gradients_and_weights(problem: Regression, method: str, h: np.ndarray):
    """Returns gradients (settings, D), and weights v (settings, N) of the matrix.

    The matrix of the method is 1/N sum_n v_n x_n x_n^T.
    """
    if problem.kind == "linear":
        excess, variance = h - problem.y, np.ones_like(h)
    else:
        p = 1 / (1 + np.exp(-np.clip(h, -700, 700)))
        excess, variance = p - problem.y, p * (1 - p)
    gradients = excess @ problem.x / len(problem.y)
    return gradients, variance if method == "NGD" else excess**2


def final_losses(
    problem: Regression,
    method: str,
    step_sizes: np.ndarray,
    dampings: np.ndarray,
    iterations: int,
    best: float = np.inf,
) -> np.ndarray:
    """Runs a method from 0 with many settings at once; returns the losses at the end.

    Those are inf for runs that diverged, and for runs cut short since they cannot get
    below `best`: a convex loss falls in a step by at most step size x g^T (M +
    damping)^-1 g. For EFGD, where M is at least g g^T, that is at most the step size;
    for the others it is taken to grow no more than tenfold over its largest so far.
    """
    size, dimension = problem.x.shape
    rows, columns = np.triu_indices(dimension)
    products = problem.x[:, rows] * problem.x[:, columns] / size
    diagonal = np.arange(dimension)
    final = np.full(len(step_sizes), np.inf)
    live = np.arange(len(step_sizes))
    w = np.zeros((len(live), dimension))
    gains = np.zeros(len(live))
    h = w @ problem.x.T
    losses = losses_of(problem, h)
    first = losses[0]
    for iteration in range(iterations):
        gradients, weights = gradients_and_weights(problem, method, h)
        directions = gradients
        if method != "GD":
            matrices = np.empty((len(live), dimension, dimension))
            matrices[:, rows, columns] = matrices[:, columns, rows] = weights @ products
            matrices[:, diagonal, diagonal] += dampings[live, None]
            directions = np.linalg.solve(matrices, gradients[..., None])[..., 0]
        with np.errstate(all="ignore"):
            w = w - step_sizes[live, None] * directions
            h = w @ problem.x.T
            losses = losses_of(problem, h)
            gain = step_sizes[live] * np.sum(gradients * directions, axis=1)
        gains = np.maximum(gains, gain)
        most = step_sizes[live] if method == "EFGD" else 10 * gains
        left = iterations - 1 - iteration
        keep = np.isfinite(losses) & (losses <= 100 * first)
        keep &= losses - left * most <= best
        live, w, h, gains = live[keep], w[keep], h[keep], gains[keep]
        losses = losses[keep]
        if not len(live):
            return final
    final[live] = losses
    return final


def search(problem: Regression, method: str, step_sizes, dampings, iterations: int):
    """Tries every setting of the grid and returns the one with the least final loss."""
    dampings = dampings[:1] if method == "GD" else dampings
    table, best = [], np.inf
    for damping in dampings:
        settings = step_sizes, np.full(len(step_sizes), damping), iterations
        # All that come within a per cent are counted.
        table.append(final_losses(problem, method, *settings, 1.01 * best))
        best = min(best, table[-1].min())
    table = np.array(table)
    row, column = np.unravel_index(np.argmin(table), table.shape)
    return {
        "log10_step_size": np.log10(step_sizes[column]),
        "log10_damping": np.nan if method == "GD" else np.log10(dampings[row]),
        "grid_loss": best,
        "settings_within_1_percent": np.sum(table <= 1.01 * best),
        "settings": table.size,
    }


def follow(problem: Regression, method: str, chosen: dict[str, Any], iterations: int):
    """Runs the chosen setting with the library.

    Returns the loss before every step and after the last; for EFGD also the cosine
    between its direction and the natural one, both undamped, at the same points.
    """
    damping = 0.0 if method == "GD" else 10 ** chosen["log10_damping"]
    direction = direction_fn(problem, method, damping)
    optimizer = optax.sgd(10 ** chosen["log10_step_size"])
    undamped = [direction_fn(problem, m, 0.0) for m in ("NGD", "EFGD")]
    loss = mean_loss(problem)

    def cosine(w):
        a, b = (f(w) for f in undamped)
        return jnp.sum(a * b) / jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))

    def step(carry, _):
        w, state = carry
        log = loss(w), cosine(w) if method == "EFGD" else 0.0
        updates, state = optimizer.update(direction(w), state, w)
        return (optax.apply_updates(w, updates), state), log

    @jax.jit
    def run(w):
        carry = w, optimizer.init(w)
        return jax.lax.scan(step, carry, None, length=iterations + 1)[1]

    losses, cosines = run(jnp.zeros(problem.x.shape[1]))
    return {"losses": losses} | ({"cosines": cosines} if method == "EFGD" else {})


def optimise(method, problem, paper, step_sizes, dampings, iterations) -> Any:
    """Searches the grid for a method on one data set and follows the best run."""
    chosen = search(problem, method, step_sizes, dampings, iterations)
    at = 10 ** np.nan_to_num(np.array(paper(method), float)[:, None], nan=-np.inf)
    (at_paper,) = final_losses(problem, method, at[0], at[1], iterations)
    return {
        **{"examples": len(problem.y), "rank": problem.x.shape[1]},
        **chosen,
        **follow(problem, method, chosen, iterations),
        "loss_at_the_settings_of_the_paper": at_paper,
        "least_loss": least_loss(problem),
    }


def least_loss(problem: Regression) -> float:
    """Returns the least training loss, by Newton steps with a line search.

    Classes that a plane can separate have none: then it is what 200 steps reach.
    """
    problem = problem._replace(x=problem.x / np.linalg.norm(problem.x, axis=0))
    w = np.zeros((1, problem.x.shape[1]))
    for _ in range(200):
        gradient, weights = gradients_and_weights(problem, "NGD", w @ problem.x.T)
        matrix = (problem.x.T * weights) @ problem.x / len(problem.y)
        step = np.linalg.lstsq(matrix, gradient[0])[0]
        lengths = 2.0 ** -np.arange(20)[:, None]
        trials = losses_of(problem, (w - lengths * step) @ problem.x.T)
        w = w - lengths[np.nanargmin(trials)] * step
    return losses_of(problem, w @ problem.x.T)[0]


# Results.


def number(value: Any, form: str = ".4g") -> str:
    """Formats a number of the results; a dash for null."""
    return "-" if value is None or not np.isfinite(value) else f"{value:{form}}"


def print_tables(errors: dict[Any, Any], runs: dict[str, Any]) -> None:
    """Prints the distances at the minimum, and the settings that were chosen."""
    by_model = {}
    for (kind, case, size), found in errors.items():
        by_model.setdefault(f"{kind}, {case}", {})[size] = found["error"]
    columns: show.Columns = {"model": lambda model, _: model}
    for n in next(iter(by_model.values())):
        heading = f"emp. Fisher,\nN = {n}"
        columns[heading] = lambda _, of, n=n: show.cell(of[n]["empirical"], ".3f")
    columns["Hessian"] = lambda _, of: f"{max(max(of[n]['hessian']) for n in of):.0e}"
    caption = "Frobenius norm of the difference over that of the Fisher; mean ± "
    caption += "standard error over data seeds."
    title = "Distance of a matrix from the Fisher at the minimum"
    show.report(title, by_model, columns, caption)

    def pair(values):
        return ", ".join(number(value, "g") for value in values)

    columns = {
        "data": lambda at, f: SOURCES[at[0]][0] if at[1] == "GD" else "",
        "method": lambda at, f: at[1],
        "step, damp.": lambda at, f: pair([f["log10_step_size"], f["log10_damping"]]),
        "final\nloss": lambda at, f: number(f["losses"][-1]),
        "paper's\nstep, damp.": lambda at, f: pair(printed(*at)),
        "loss\nthere": lambda at, f: number(f["loss_at_the_settings_of_the_paper"]),
        "least\nloss": lambda at, f: number(np.round(f["least_loss"], 9)),
        "good\nsettings": lambda at, f: f["settings_within_1_percent"],
    }
    caption = "Step size and damping as log10. Good: settings of the grid whose final "
    caption += "loss is within 1 % of the best, of 241 for GD and 9881 for the others."
    title = "Settings chosen by the final loss, and the paper's"
    found = {(name, m): facts for name, of in runs.items() for m, facts in of.items()}
    show.report(title, found, columns, caption, first=20)


def contour(axis: Any, problem: Regression, centre: Any, reach: float) -> None:
    """Draws levels of the loss around a point."""
    lengths = np.linspace(-reach, reach, 60)
    loss, centre = mean_loss(problem), jnp.asarray(centre)
    across, up = jnp.eye(2)
    levels = fsam.loss_over_plane(loss, centre, across, up, lengths, lengths).T
    places = centre[0] + lengths, centre[1] + lengths
    axis.contour(*places, levels, 8, colors="#c9cdd2", linewidths=0.8)
    axis.set_aspect("equal")


def draw_fields(found: dict[str, Any], file: Path) -> None:
    """Draws the three vector fields with their trajectories."""
    headline = "On its way the empirical Fisher may point elsewhere"
    figure, axes = show.figure(1, 3, headline, figsize=(9, 3.6), sharey=True)
    for axis, (method, data) in zip(axes[0], found.items(), strict=True):
        contour(axis, fields_problem(), (2.0, 2.0), 3.0)
        arrows = np.array(data["arrows"]).reshape(15, 15, 2)
        style = {"angles": "xy", "scale": 30, "width": 0.006, "color": show.GREY}
        axis.quiver(ACROSS, ACROSS, arrows[..., 0], arrows[..., 1], **style)
        for path in np.array(data["paths"]):
            axis.plot(*path.T, **LOOKS[method] | {"ls": "-"})
            axis.plot(*path[0], "o", color=show.BLACK, ms=4)
        axis.plot(*data["minimum"], "*", color=show.BLACK, ms=9, zorder=5)
        axis.set(title=method, xlabel="intercept", xlim=(-1, 5), ylim=(-1, 5))
    axes[0, 0].set_ylabel("slope")
    show.save(figure, file)


def ellipse(matrix: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Returns the points d + centre with d^T matrix d = 9, of shape (2, 200)."""
    angle = np.linspace(0, 2 * np.pi, 200)
    values, vectors = np.linalg.eigh(matrix)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    return centre[:, None] + 3 * vectors @ (circle / np.sqrt(values)[:, None])


def draw_misspecified(errors: dict[Any, Any], size: int, file: Path) -> None:
    """Draws data, and below them the ellipses of both matrices."""
    headline = "At the minimum it is the Fisher only where the model is right"
    figure, axes = show.figure(4, 3, headline, figsize=(8.4, 10.6))
    shown = [key for key in errors if key[2] == size]
    panels = zip(np.concatenate(axes[::2]), np.concatenate(axes[1::2]), strict=True)
    for (kind, case, _), (top, bottom) in zip(shown, panels, strict=True):
        problem, data = wrong_problem(kind, case, size, 0), errors[kind, case, size]
        x, y, w = problem.x, problem.y, np.array(data["minimum"])
        if kind == "logistic":
            for label, marker, color in ((0, "^", show.GREEN), (1, "x", show.PURPLE)):
                top.plot(*x[y == label].T, marker, color=color, ms=3, alpha=0.5)
            top.set(xlim=(-9, 9), ylim=(-9, 9), aspect="equal")
        else:
            top.plot(x[:, 0], y, "x", color=show.GREEN, ms=3, alpha=0.5)
            top.axline((0, w[1]), slope=w[0], color=show.BLACK, lw=1.5)
            top.set(xlim=(-3.7, 3.7), ylim=(-6, 10))
        top.set_title(f"{kind}: {case}")
        # Wide enough for the ellipses.
        least = np.linalg.eigvalsh(data["fisher"])[0]
        contour(bottom, problem, w, 3.4 / np.sqrt(size * least))
        pairs = (("fisher", "NGD", "Fisher = Hessian"),)
        pairs += (("empirical", "EFGD", "empirical Fisher"),)
        for name, method, label in pairs:
            edge = ellipse(size * np.array(data[name]), w)
            bottom.plot(*edge, **LOOKS[method], label=label)
        bottom.plot(*w, "*", color=show.BLACK, ms=8, label="minimum")
        bottom.locator_params(nbins=4)
        names = (r"$\theta_1$", r"$\theta_2$"), ("slope", "intercept")
        names = names[kind == "linear"]
        bottom.set(xlabel=names[0], ylabel=names[1])
    show.legend(figure, axes[1, 0], 3)
    show.save(figure, file)


def draw_optimisation(runs: dict[str, Any], file: Path) -> None:
    """Draws the loss of the chosen runs and the cosine between both directions."""
    headline = "With a search for step and damping it mostly arrives, later than the "
    columns = min(4, len(runs))
    blocks = -(-len(runs) // columns)
    figure, axes = show.figure(
        *(2 * blocks, columns, f"{headline}Fisher"),
        figsize=(2.75 * columns, 3.6 * blocks + 0.5),
        height_ratios=[2.2, 1] * blocks,
        sharex=True,
    )
    panels = zip(np.concatenate(axes[::2]), np.concatenate(axes[1::2]), strict=True)
    for (name, data), (top, bottom) in zip(runs.items(), panels, strict=False):
        for method, found in data.items():
            top.plot(np.array(found["losses"], float), **LOOKS[method], label=method)
        top.set(yscale="log", title=SOURCES[name][0])
        cosines = np.array(data["EFGD"]["cosines"], float)
        bottom.plot(cosines, ".", color=LOOKS["EFGD"]["color"], ms=3)
        bottom.axhline(0, color=show.GREY, lw=0.8)
        bottom.set(ylim=(-1.08, 1.08), yticks=[-1, 0, 1])
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    for top, bottom in zip(axes[::2, 0], axes[1::2, 0], strict=True):
        top.set_ylabel("training loss")
        bottom.set_ylabel("cosine")
    show.legend(figure, axes[0, 0], 3)
    show.save(figure, file)


@harness.experiment(
    smoke={"iterations": 5, "seeds": 2, "datasets": ["wine"]},
    data_dir=harness.HERE.parents[1] / "shared" / "data",
    datasets={"default": list(SOURCES), "choices": SOURCES},
    seeds={"default": 20, "help": "of the data of part 2"},
    iterations=100,
)
def main(run: harness.Run) -> None:
    options = run.options
    jax.config.update("jax_enable_x64", True)
    steps = 60 if options.smoke else 50_000
    fields = run.each("method", METHODS, field, steps, part="field", steps=steps)
    sizes = (100,) if options.smoke else (1000, 100_000)
    errors = {}
    for kind, case, size in itertools.product(("logistic", "linear"), CASES, sizes):
        settings = {"case": case, "size": size, "seeds": options.seeds}
        args = misspecified, kind, *settings.values()
        settings |= {"part": "misspecified", "model": kind}
        errors[kind, case, size] = run.cell(*args, **settings)
    every = (20, 10) if options.smoke else (1, 1)
    grid = STEP_SIZES[:: every[0]], DAMPINGS[:: every[1]], options.iterations
    about = {"part": "optimisation", "dampings": len(grid[1]), **run.take("iterations")}
    runs = {}
    for name in options.datasets:
        try:
            problem = load(name, options.data_dir)
        except FileNotFoundError as error:
            harness.say(f"{name} is left out: no file {error.filename}")
            continue
        args = optimise, problem, partial(printed, name), *grid
        runs[name] = run.each("method", METHODS, *args, data=name, **about)
    print_tables(errors, runs)
    draw_fields(fields, run.picture("_fields"))
    draw_misspecified(errors, sizes[0], run.picture("_misspecified"))
    if runs:
        draw_optimisation(runs, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

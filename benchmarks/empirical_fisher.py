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

It cannot. At the minimum it is the Fisher only where the model is right, and more data
do not help where it is not. On the way there its direction may be opposite to the
natural one, and its step of any length: on most data it still arrives, with a step
size and a damping found by search, and later than the Fisher; on Power plant it does
not.

The grid search is in NumPy, all settings in lockstep, and leaves out what cannot win:
runs that diverged (loss above a hundred times the first, or not finite), and runs too
slow to reach the best loss found so far in the steps that are left. The chosen runs,
the matrices and the fields are computed by fsam_optax, in float64.

Data sets are read from --data-dir; those that are not there are left out by name. Wine
and a second Breast cancer are part of scikit-learn. The Boston data hold a column on
the share of Black residents, made on the premise that it bears on house prices, and
scikit-learn has removed them for that; they serve here to compare with the paper only.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import show

import fsam_optax


METHODS = ("GD", "NGD", "EFGD")
COLOURS = {"GD": show.BLACK, "NGD": show.BLUE, "EFGD": show.VERMILLION}
STYLES = {"GD": ":", "NGD": "-", "EFGD": "--"}
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
    def likelihood(self) -> fsam_optax.Likelihood:
        """The library's name for the same model."""
        return fsam_optax.gaussian() if self.kind == "linear" else fsam_optax.bernoulli

    @property
    def batch(self) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets for the library."""
        return jnp.asarray(self.x), jnp.asarray(self.y)[:, None]


def model(w: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the natural parameter of each example."""
    return (x @ w)[:, None]


def mean_loss(problem: Regression) -> Callable[[jax.Array], jax.Array]:
    """Returns the mean negative log-likelihood, without the constant of a Gaussian."""
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)

    def loss(w):
        h = x @ w
        if problem.kind == "linear":
            return jnp.mean((h - y) ** 2) / 2
        return jnp.mean(jnp.logaddexp(0, h) - y * h)

    return loss


def matrix_fn(problem: Regression, method: str) -> Callable[[Any, Any], jax.Array]:
    """Returns the matrix of a method as a function of (w, batch)."""
    dense = {
        "NGD": fsam_optax.dense_fisher,
        "EFGD": fsam_optax.dense_empirical_fisher,
    }[method]
    return functools.partial(
        dense, fsam_optax.negative_log_likelihood(model, problem.likelihood)
    )


def direction_fn(
    problem: Regression, method: str, damping: float
) -> Callable[[jax.Array], Any]:
    """Returns (M + damping)^-1 g as a function of w; g itself for GD."""
    gradient = jax.grad(mean_loss(problem))
    if method == "GD":
        return gradient
    precondition = fsam_optax.scale_by_inverse_dense(
        matrix_fn(problem, method), damping=damping
    )

    def direction(w):
        state = precondition.init(w)
        return precondition.update(gradient(w), state, w, batch=problem.batch)[0]

    return direction


# 1. Vector fields.


def fields_problem(size: int = 1000) -> Regression:
    """Returns the linear regression of the paper's figure 1: intercept and slope 2."""
    random = np.random.default_rng(0)
    x = random.lognormal(0, 0.75, size)
    y = 2 + 2 * x + random.normal(size=size)
    return Regression("linear", np.stack([np.ones(size), x], 1), y)


STARTS = np.array([[2, 4.5], [1, 0], [4.5, 3], [-0.5, 3]])
# Lengths of the arrows, and so of the steps, in the released code.
LENGTHS = {"GD": 1 / 3, "NGD": 1.0, "EFGD": 3.0}


def field(method: str, steps: int) -> dict[str, Any]:
    """Computes the vector field of a method and a trajectory from each start."""
    problem = fields_problem()
    across = np.linspace(-1, 5, 15)
    grid = jnp.asarray(np.stack(np.meshgrid(across, across), -1).reshape(-1, 2))
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


def logistic_problem(case: str, size: int, seed: int) -> Regression:
    """Returns two Gaussian clouds, of which a logistic model fits only "correct".

    The matrices multiply standard normals, as in the released code: they are square
    roots of the covariances, not the covariances.
    """
    mean, first, second = {
        "correct": (1.0, 2 * np.eye(2), 2 * np.eye(2)),
        "wrong A": (1.5, 3 * np.eye(2), np.eye(2)),
        "wrong B": (
            1.0,
            np.array([[1.5, -0.9], [-0.9, 1.5]]),
            np.array([[1.5, 0.9], [0.9, 1.5]]),
        ),
    }[case]
    noise = np.random.default_rng(seed).normal(size=(2, size // 2, 2))
    x = np.concatenate([mean + noise[0] @ first, -mean + noise[1] @ second])
    return Regression("logistic", x, np.repeat([0.0, 1.0], size // 2))


def linear_problem(case: str, size: int, seed: int) -> Regression:
    """Returns y = 1 + x + noise, with the noise or the curve wrong unless "correct"."""
    random = np.random.default_rng(seed)
    x, noise = random.normal(size=(2, size))
    y = (
        1
        + x
        + {"correct": noise, "wrong A": 2 * noise, "wrong B": noise + x**2 / 2}[case]
    )
    return Regression("linear", np.stack([x, np.ones(size)], 1), y)


CASES = ("correct", "wrong A", "wrong B")
MAKERS = {"logistic": logistic_problem, "linear": linear_problem}


def minimize(problem: Regression) -> jax.Array:
    """Returns the maximum-likelihood weights, by Newton's method."""
    loss = mean_loss(problem)

    def newton(w, _):
        return w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w)), None

    start = jnp.zeros(problem.x.shape[1])
    return jax.lax.scan(newton, start, None, length=20)[0]


@functools.partial(jax.jit, static_argnames="kind")
def matrices_at_minimum(kind: str, x: jax.Array, y: jax.Array):
    """Returns the minimum, and the Fisher, the empirical Fisher and the Hessian."""
    problem = Regression(kind, x, y)
    w = minimize(problem)
    fisher, empirical = (
        matrix_fn(problem, m)(w, problem.batch) for m in ("NGD", "EFGD")
    )
    return w, fisher, empirical, jax.hessian(mean_loss(problem))(w)


def misspecified(kind: str, case: str, size: int, seeds: int) -> dict[str, Any]:
    """Compares the matrices at the minimum; keeps those of the first seed."""
    found = []
    for seed in range(seeds):
        problem = MAKERS[kind](case, size, seed)
        found.append(jax.device_get(matrices_at_minimum(kind, problem.x, problem.y)))

    def errors(index):
        pairs = ((every[index], every[1]) for every in found)
        return [np.linalg.norm(m - f) / np.linalg.norm(f) for m, f in pairs]

    w, fisher, empirical, _ = found[0]
    first = {"minimum": w, "fisher": fisher, "empirical": empirical}
    return {**first, "error": {"empirical": errors(2), "hessian": errors(3)}}


# 3. Optimisation on real data.


def read_table(file: Path, target: int) -> tuple[np.ndarray, np.ndarray]:
    table = np.loadtxt(file)
    return np.delete(table, target, axis=1), table[:, target]


def from_uci(name: str) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    """Returns a reader of `<name>.txt`, with the target column in `<name>.target`."""

    def read(folder):
        target = int((folder / "uci" / f"{name}.target").read_text())
        return read_table(folder / "uci" / f"{name}.txt", target)

    return read


def from_breast_cancer_csv(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    file = folder / "uci" / "breast-cancer-wisconsin-original.csv"
    table = np.loadtxt(file, delimiter=",", skiprows=1)
    return table[:, :-1], table[:, -1]


def from_a1a(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    import sklearn.datasets

    file = folder / "a1a.svmlight"
    x, y, *_ = sklearn.datasets.load_svmlight_file(str(file), n_features=123)
    return x.toarray(), (y + 1) / 2


def from_sklearn(name: str) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    def read(folder):
        del folder
        import sklearn.datasets

        x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
        return x, y.astype(float)

    return read


class Source(NamedTuple):
    """A data set of the paper.

    Attributes:
        title: Name in tables and figures.
        kind: As in `Regression`.
        read: Maps --data-dir to features and targets.
        paper: Selected log10 step size and log10 damping of each method, as printed in
            the paper; NaN where there is none.
    """

    title: str
    kind: str
    read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
    paper: dict[str, tuple[float, float]]


def printed(gd, ngd, efgd):
    return {"GD": (gd, np.nan), "NGD": ngd, "EFGD": efgd}


BREAST_CANCER = printed(-5.125, (0.125, -10), (-1.25, -10))
SOURCES = {
    "breast-cancer-original": Source(
        "Breast c. original", "logistic", from_breast_cancer_csv, BREAST_CANCER
    ),
    "breast-cancer-diagnostic": Source(
        "Breast c. diagnostic",
        "logistic",
        from_sklearn("breast_cancer"),
        BREAST_CANCER,
    ),
    "boston": Source(
        "Boston",
        "linear",
        from_uci("bostonHousing"),
        printed(-5.25, (0.125, -10), (-1.25, -8)),
    ),
    "a1a": Source(
        "a1a", "logistic", from_a1a, printed(0.25, (0.25, -10), (-0.375, -8))
    ),
    "wine": Source(
        "Wine",
        "linear",
        from_sklearn("wine"),
        printed(-5.625, (0, -8.5), (-1.375, -6)),
    ),
    "energy": Source(
        "Energy", "linear", from_uci("energy"), printed(-5.5, (0, -7.5), (0.875, -3))
    ),
    "power-plant": Source(
        "Power plant",
        "linear",
        from_uci("power-plant"),
        printed(-5.75, (-0.625, -8), (3.375, -1)),
    ),
    "yacht": Source(
        "Yacht",
        "linear",
        from_uci("yacht"),
        printed(-1.5, (-0.75, -7.5), (1.625, -6.5)),
    ),
}


def load(name: str, folder: Path) -> Regression:
    """Reads a data set, adds a constant feature and rotates to the principal axes.

    Rotating changes none of the methods: damping and step are the same in all
    directions. It spares them the directions in which there are no data, where
    gradients are 0, and much of the rounding.
    """
    source = SOURCES[name]
    x, y = source.read(folder)
    x = np.append(x, np.ones((len(x), 1)), axis=1)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    keep = s > 1e-12 * s[0]
    return Regression(source.kind, u[:, keep] * s[keep], y)


def losses_of(problem: Regression, h: np.ndarray) -> np.ndarray:
    """Returns the mean loss for outputs of shape (settings, N)."""
    if problem.kind == "linear":
        return np.mean((h - problem.y) ** 2, axis=1) / 2
    return np.mean(np.logaddexp(0, h) - problem.y * h, axis=1)


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
    """Runs a method from 0 with many settings at once.

    Args:
        problem: The regression.
        method: One of `METHODS`; GD does without the dampings.
        step_sizes: One for each setting.
        dampings: One for each setting.
        iterations: Number of steps.
        best: Runs that cannot get below this loss are cut short. A convex loss falls
            in a step by at most step size x g^T (M + damping)^-1 g. For EFGD, where M
            is at least g g^T, that is at most the step size; for the others it is
            taken to grow no more than tenfold over its largest value so far.

    Returns:
        The loss after the last step; inf for runs that diverged or were cut short.
    """
    size, dimension = problem.x.shape
    rows, columns = np.triu_indices(dimension)
    products = problem.x[:, rows] * problem.x[:, columns] / size
    final = np.full(len(step_sizes), np.inf)
    live = np.arange(len(step_sizes))
    w = np.zeros((len(live), dimension))
    gains = np.zeros(len(live))
    h = w @ problem.x.T
    losses = losses_of(problem, h)
    first = losses[0]
    for iteration in range(iterations):
        gradients, weights = gradients_and_weights(problem, method, h)
        if method == "GD":
            directions = gradients
        else:
            matrices = np.empty((len(live), dimension, dimension))
            entries = weights @ products
            matrices[:, rows, columns] = entries
            matrices[:, columns, rows] = entries
            diagonal = np.arange(dimension)
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


def search(
    problem: Regression, method: str, step_sizes, dampings, iterations: int
) -> dict[str, Any]:
    """Tries every setting of the grid and returns the one with the least final loss."""
    dampings = dampings[:1] if method == "GD" else dampings
    table, best = [], np.inf
    for damping in dampings:
        losses = final_losses(
            problem,
            method,
            step_sizes,
            np.full(len(step_sizes), damping),
            iterations,
            # All that come within a per cent are counted.
            1.01 * best,
        )
        best = min(best, losses.min())
        table.append(losses)
    table = np.array(table)
    row, column = np.unravel_index(np.argmin(table), table.shape)
    return {
        "log10_step_size": np.log10(step_sizes[column]),
        "log10_damping": np.nan if method == "GD" else np.log10(dampings[row]),
        "grid_loss": best,
        "settings_within_1_percent": np.sum(table <= 1.01 * best),
        "settings": table.size,
    }


def follow(
    problem: Regression, method: str, record: dict[str, Any], iterations: int
) -> dict[str, Any]:
    """Runs the chosen setting with the library.

    Returns:
        The loss before every step and after the last; for EFGD the cosine between its
        direction and the natural one, both undamped, at the same points.
    """
    step_size, damping = 10 ** record["log10_step_size"], 0.0
    if method != "GD":
        damping = 10 ** record["log10_damping"]
    direction = direction_fn(problem, method, damping)
    optimizer = optax.sgd(step_size)
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
    path = {"losses": losses}
    if method == "EFGD":
        path["cosines"] = cosines
    return path


def optimise(problem, source, method, step_sizes, dampings, iterations) -> Any:
    """Searches the grid for a method on one data set and follows the best run."""
    chosen = search(problem, method, step_sizes, dampings, iterations)
    step_size, damping = 10 ** np.array(source.paper[method])
    printed = np.array([step_size]), np.nan_to_num(np.array([damping]))
    (at_paper,) = final_losses(problem, method, *printed, iterations)
    followed = follow(problem, method, chosen, iterations)
    return {
        **{"examples": len(problem.y), "rank": problem.x.shape[1]},
        **chosen,
        **followed,
        "loss_at_the_settings_of_the_paper": at_paper,
        "least_loss": least_loss(problem),
    }


def least_loss(problem: Regression) -> float:
    """Returns the least training loss, by Newton steps with a line search.

    Classes that a plane can separate have none: then it is what 200 steps reach.
    """
    scale = np.linalg.norm(problem.x, axis=0)
    problem = problem._replace(x=problem.x / scale)
    w = np.zeros((1, problem.x.shape[1]))
    for _ in range(200):
        h = w @ problem.x.T
        gradient, weights = gradients_and_weights(problem, "NGD", h)
        matrix = (problem.x.T * weights) @ problem.x / len(problem.y)
        step = np.linalg.lstsq(matrix, gradient[0])[0]
        lengths = 2.0 ** -np.arange(20)[:, None]
        trials = losses_of(problem, (w - lengths * step) @ problem.x.T)
        w = w - lengths[np.nanargmin(trials)] * step
    return losses_of(problem, w @ problem.x.T)[0]


# Results.


def number(value: Any, form: str) -> str:
    """Formats a number of the results; a dash for null."""
    return "-" if value is None or not np.isfinite(value) else f"{value:{form}}"


def print_tables(errors: dict[Any, Any], runs: dict[str, Any]) -> None:
    """Prints both tables."""
    sizes = list(dict.fromkeys(size for _, _, size in errors))
    rows = []
    for kind in MAKERS:
        for case in CASES:
            found = [errors[kind, case, size]["error"] for size in sizes]
            cells = (show.cell(e["empirical"], ".3f") for e in found)
            most = max(max(e["hessian"]) for e in found)
            rows.append([f"{kind}, {case}", *cells, f"{most:.0e}"])
    headings = ["model", *(f"emp. Fisher,\nN = {n}" for n in sizes), "Hessian"]
    caption = (
        "Frobenius norm of the difference over that of the Fisher; mean ± standard "
    )
    title = "Distance of a matrix from the Fisher at the minimum"
    show.table(title, headings, rows, caption + "error over data seeds.")
    rows = []
    for name, by_method in runs.items():
        for method, record in by_method.items():
            paper = SOURCES[name].paper[method]
            rows.append(
                [
                    SOURCES[name].title if method == "GD" else "",
                    method,
                    f"{number(record['log10_step_size'], 'g')}, "
                    f"{number(record['log10_damping'], 'g')}",
                    number(record["losses"][-1], ".4g"),
                    f"{number(paper[0], 'g')}, {number(paper[1], 'g')}",
                    number(record["loss_at_the_settings_of_the_paper"], ".4g"),
                    number(np.round(record["least_loss"], 9), ".4g"),
                    str(record["settings_within_1_percent"]),
                ]
            )
    headings = ["data", "method", "step, damp.", "final\nloss", "paper's\nstep, damp."]
    headings += ["loss\nthere", "least\nloss", "good\nsettings"]
    caption = "Step size and damping as log10. Good: settings of the grid whose final "
    caption += "loss is within 1 % of the best, of 241 for GD and 9881 for the others."
    title = "Settings chosen by the final loss, and the paper's"
    show.table(title, headings, rows, caption, first=20)


def plot_fields(record: dict[str, Any], file: Path) -> None:
    """Draws the data and the three vector fields with their trajectories."""
    headline = "On its way the empirical Fisher may point elsewhere"
    figure, axes = show.figure(1, 4, headline, figsize=(11, 3.5))
    axes = axes[0]
    problem = fields_problem()
    x, y = problem.x[:, 1], problem.y
    intercept, slope = record["GD"]["minimum"]
    axes[0].plot(x, y, ".", color=show.GREY, markersize=3, alpha=0.35, mew=0)
    line = np.array([0, 9])
    axes[0].plot(line, intercept + slope * line, color="black", lw=1.5)
    axes[0].set(title="data", xlabel="x", ylabel="y", xlim=(0, 9), ylim=(-1, 21))
    across = np.linspace(-1, 5, 15)
    lengths = np.linspace(-1, 5, 60)
    loss = loss_over_square(problem, np.array([2.0, 2.0]), 3.0)
    for axis, method in zip(axes[1:], METHODS, strict=True):
        data = record[method]
        arrows = np.array(data["arrows"]).reshape(15, 15, 2)
        axis.contour(lengths, lengths, loss, 7, colors="#c9cdd2", linewidths=0.8)
        axis.quiver(
            across,
            across,
            arrows[..., 0],
            arrows[..., 1],
            angles="xy",
            scale=30,
            width=0.006,
            color="#8a9097",
        )
        for path in np.array(data["paths"]):
            axis.plot(*path.T, color=COLOURS[method], lw=2)
            axis.plot(*path[0], "o", color="black", markersize=4)
        axis.plot(intercept, slope, "*", color="black", markersize=9, zorder=5)
        axis.set(title=method, xlabel="intercept", xlim=(-1, 5), ylim=(-1, 5))
        axis.set_aspect("equal")
    axes[1].set_ylabel("slope")
    show.save(figure, file)


def loss_over_square(problem: Regression, centre: np.ndarray, reach: float):
    """Returns the loss on 60 x 60 points around `centre`, for `contour`."""
    lengths = np.linspace(-reach, reach, 60)
    across, up = jnp.eye(2)
    return fsam_optax.loss_over_plane(
        mean_loss(problem), jnp.asarray(centre), across, up, lengths, lengths
    ).T


def ellipse(matrix: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Returns the points d + centre with d^T matrix d = 9, of shape (2, 200)."""
    angle = np.linspace(0, 2 * np.pi, 200)
    values, vectors = np.linalg.eigh(matrix)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    return centre[:, None] + 3 * vectors @ (circle / np.sqrt(values)[:, None])


def plot_misspecified(errors: dict[Any, Any], size: int, file: Path) -> None:
    """Draws data and ellipses of both matrices."""
    headline = "At the minimum it is the Fisher only where the model is right"
    figure, axes = show.figure(4, 3, headline, figsize=(8.4, 10.6))
    for row, kind in ((0, "logistic"), (2, "linear")):
        for column, case in enumerate(CASES):
            data = errors[kind, case, size]
            data = {k: np.array(v) for k, v in data.items() if k != "error"}
            problem, w = MAKERS[kind](case, size, 0), data["minimum"]
            x, y = problem.x, problem.y
            top, bottom = axes[row, column], axes[row + 1, column]
            top.set_title(f"{kind}: {case}")
            if kind == "logistic":
                for label, marker, colour in ((0, "^", "#009e73"), (1, "x", "#cc79a7")):
                    chosen = x[y == label].T
                    top.plot(*chosen, marker, color=colour, ms=3, alpha=0.5, ls="")
                top.set(xlim=(-9, 9), ylim=(-9, 9))
                top.set_aspect("equal")
                names = r"$x_1$", r"$x_2$", r"$\theta_1$", r"$\theta_2$"
            else:
                top.plot(x[:, 0], y, "x", color="#009e73", ms=3, alpha=0.5)
                line = np.array([-3.5, 3.5])
                top.plot(line, w[0] * line + w[1], color="black", lw=1.5)
                top.set(xlim=(-3.7, 3.7), ylim=(-6, 10))
                names = "x", "y", "slope", "intercept"
            # Wide enough for the ellipses.
            reach = 3.4 / np.sqrt(size * np.linalg.eigvalsh(data["fisher"])[0])
            lengths = np.linspace(-reach, reach, 60)
            bottom.contour(
                w[0] + lengths,
                w[1] + lengths,
                loss_over_square(problem, w, reach),
                8,
                colors="#c9cdd2",
                linewidths=0.8,
            )
            for name, method in (("fisher", "NGD"), ("empirical", "EFGD")):
                bottom.plot(
                    *ellipse(size * data[name], w),
                    color=COLOURS[method],
                    linestyle=STYLES[method],
                    lw=2,
                    label={"fisher": "Fisher = Hessian"}.get(name, "empirical Fisher"),
                )
            bottom.plot(*w, "*", color="black", markersize=8, label="minimum")
            bottom.set_aspect("equal")
            bottom.locator_params(nbins=4)
            for axis, (a, b) in ((top, names[:2]), (bottom, names[2:])):
                axis.set_xlabel(a)
                if not column:
                    axis.set_ylabel(b)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    show.save(figure, file)


def plot_optimisation(record: dict[str, Any], file: Path) -> None:
    """Draws the loss of the chosen runs and the cosine between both directions."""
    columns = min(4, len(record))
    blocks = -(-len(record) // columns)
    figure, axes = show.figure(
        2 * blocks,
        columns,
        "With a search for step and damping it mostly arrives, later than the Fisher",
        figsize=(2.75 * columns, 3.6 * blocks + 0.5),
        height_ratios=[2.2, 1] * blocks,
        sharex=True,
    )
    for axis in axes.ravel():
        axis.set_visible(False)
    for index, (name, data) in enumerate(record.items()):
        row, column = 2 * (index // columns), index % columns
        top, bottom = axes[row, column], axes[row + 1, column]
        for method, run in data.items():
            losses = np.array(run["losses"], float)
            top.plot(
                losses,
                color=COLOURS[method],
                linestyle=STYLES[method],
                lw=2,
                label=method,
            )
        cosines = np.array(data["EFGD"]["cosines"], float)
        bottom.plot(cosines, ".", color=COLOURS["EFGD"], markersize=3)
        bottom.axhline(0, color=show.GREY, lw=0.8)
        bottom.set(ylim=(-1.08, 1.08), yticks=[-1, 0, 1], xlabel="iteration")
        top.set_yscale("log")
        top.set_title(SOURCES[name].title)
        top.set_visible(True)
        bottom.set_visible(True)
        top.tick_params(labelbottom=False)
        bottom.tick_params(labelbottom=True)
        if not column:
            top.set_ylabel("training loss")
            bottom.set_ylabel("cosine")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    show.save(figure, file)


def experiment(run: harness.Run) -> None:
    """Runs what is missing in the results, then prints and draws everything."""
    options = run.options
    jax.config.update("jax_enable_x64", True)
    steps = 60 if options.smoke else 50_000
    found = {
        method: run.cell(
            functools.partial(field, method, steps),
            **{"part": "field", "method": method, "steps": steps},
        )
        for method in METHODS
    }
    sizes = (100,) if options.smoke else (1000, 100_000)
    errors = {}
    for kind in MAKERS:
        for case in CASES:
            for size in sizes:
                compute = functools.partial(
                    *(misspecified, kind, case, size, options.seeds)
                )
                errors[kind, case, size] = run.cell(
                    compute,
                    **{"part": "misspecified", "model": kind, "case": case},
                    **{"size": size, "seeds": options.seeds},
                )
    step_sizes, dampings = STEP_SIZES, DAMPINGS
    if options.smoke:
        step_sizes, dampings = STEP_SIZES[::20], DAMPINGS[::10]
    runs = {}
    for name in options.datasets:
        try:
            problem = load(name, options.data_dir)
        except FileNotFoundError as error:
            harness.say(f"{name} is left out: no file {error.filename}")
            continue
        grid = step_sizes, dampings, options.iterations
        runs[name] = {
            method: run.cell(
                functools.partial(optimise, problem, SOURCES[name], method, *grid),
                **{"part": "optimisation", "data": name, "method": method},
                **{"iterations": options.iterations, "dampings": len(dampings)},
            )
            for method in METHODS
        }
    print_tables(errors, runs)
    plot_fields(found, run.picture("_fields"))
    plot_misspecified(errors, sizes[0], run.picture("_misspecified"))
    if runs:
        plot_optimisation(runs, run.picture())


def add_options(add):
    data = harness.HERE.parents[1] / "shared" / "data"
    add("--data-dir", type=Path, default=data)
    add("--datasets", nargs="+", choices=SOURCES, default=list(SOURCES))
    add("--seeds", type=harness.whole, default=20, help="of the data of part 2")
    add("--iterations", type=harness.whole, default=100)


def main(arguments: list[str] | None = None) -> int:
    smoke = {"iterations": 5, "seeds": 2, "datasets": ["wine"]}
    return harness.main(
        __doc__, experiment, arguments, options=add_options, smoke=smoke
    )


if __name__ == "__main__":
    sys.exit(main())

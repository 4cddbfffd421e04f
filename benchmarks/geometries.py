"""Question: what do the three balls look like on one and the same loss?

A logistic regression with two weights, one on a feature of small and one on a feature
of large scale. In each panel: the loss, the ball or ellipsoid `||T^-1 eps|| = rho`
around w, and the perturbation that the library returns for the gradient there.

    python benchmarks/geometries.py         # benchmarks/figures/geometries.png
"""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import show

import fsam_optax as fsam


noise = np.random.default_rng(0).normal(size=(400, 2))
X = jnp.asarray(noise * np.array([0.5, 1.6]) + np.array([0.3, 0.2]))
Y = jnp.asarray(np.random.default_rng(1).uniform(size=400)) < jax.nn.sigmoid(
    X @ jnp.array([1.2, -0.6])
)
W = jnp.array([2.6, 0.55])
# The radius, and the formula of T.
BALLS = {
    "SAM": (0.6, "$T = 1$"),
    "ASAM": (0.4, r"$T = |w| + \eta$"),
    "Fisher SAM": (0.9, r"$T^2 = 1\,/\,(1 + \eta F)$"),
}


def loss(w):
    return jnp.mean(jax.nn.softplus(X @ w) - Y * (X @ w))


def perturbation_of(name):
    """Returns the perturbation at W, the T of the ball, and how far the loss rises."""
    rho, p = BALLS[name][0], jax.nn.sigmoid(X @ W)
    f = jnp.mean((p * (1 - p))[:, None] * X**2, axis=0)
    ball, t = {
        "SAM": (fsam.euclidean_ball(rho), jnp.ones(2)),
        "ASAM": (fsam.adaptive_ellipsoid(rho), jnp.abs(W) + 0.01),
        "Fisher SAM": (
            fsam.fisher_ellipsoid(rho, fsam.given(), eta=4.0),
            1 / jnp.sqrt(1 + 4.0 * f / jnp.mean(f)),
        ),
    }[name]
    eps = jnp.asarray(ball.update(jax.grad(loss)(W), ball.init(W), W, fisher=f)[0])
    return {"eps": eps, "t": t, "rise": loss(W + eps) - loss(W)}


def draw(found, path) -> None:
    """Draws a panel for each geometry."""
    across, up = np.linspace(1.1, 4.1, 120), np.linspace(-0.55, 1.65, 100)
    surface = jax.vmap(jax.vmap(loss))(jnp.stack(jnp.meshgrid(across, up), axis=-1))
    angle, w = np.linspace(0, 2 * np.pi, 200), np.asarray(W)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    headline = "One loss, three balls: each bounds the same formula"
    figure, axes = show.figure(1, 3, headline, figsize=(10.5, 3.9), sharey=True)
    arrow = {"arrowstyle": "-|>", "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    for axis, (name, facts) in zip(axes[0], found.items(), strict=True):
        color, end = show.LOOKS[name][0], w + facts["eps"]
        axis.grid(visible=False)
        axis.contour(across, up, surface, levels=14, colors="#c9cdd2", linewidths=0.8)
        rho, formula = BALLS[name]
        edge = w[:, None] + rho * np.array(facts["t"])[:, None] * circle
        axis.fill(*edge, color=color, alpha=0.12, linewidth=0)
        axis.plot(*edge, color=color, linewidth=1.8)
        axis.annotate("", xy=end, xytext=w, arrowprops=arrow)
        axis.plot(*w, "o", color=show.BLACK, markersize=4)
        axis.annotate("w", w, (-11, -10), textcoords="offset points")
        axis.annotate("w + ε", end, (4, 5), textcoords="offset points")
        axis.set(aspect="equal", xlabel="weight of the small feature")
        axis.set_title(f"{name}    {formula}", fontsize=11)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("weight of the large feature")
    show.save(figure, path)


@harness.experiment()
def main(run: harness.Run) -> None:
    found = run.each("geometry", BALLS, perturbation_of)
    rises = {"ball": lambda name, _: name, "rise": lambda _, f: f"{f['rise']:.3f}"}
    show.report("How far the loss rises", found, rises)
    draw(found, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

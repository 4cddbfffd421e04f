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

import fsam_optax


INK, MUTED = "#1a1a1a", "#5f6368"


def make_problem():
    """Returns the loss, the exact diagonal Fisher information, and the point w."""
    noise = np.random.default_rng(0).normal(size=(400, 2))
    x = jnp.asarray(noise * np.array([0.5, 1.6]) + np.array([0.3, 0.2]))
    y = jnp.asarray(np.random.default_rng(1).uniform(size=400)) < jax.nn.sigmoid(
        x @ jnp.array([1.2, -0.6])
    )

    def loss(w):
        h = x @ w
        return jnp.mean(jax.nn.softplus(h) - y * h)

    def fisher(w):
        p = jax.nn.sigmoid(x @ w)
        return jnp.mean((p * (1 - p))[:, None] * x**2, axis=0)

    return loss, fisher, jnp.array([2.6, 0.55])


def perturbation_of(name):
    """Returns the perturbation of a geometry, and the T and radius of its ball."""
    loss, fisher, w = make_problem()
    g, f = jax.grad(loss)(w), fisher(w)
    ball, t, rho = {
        "SAM": (fsam_optax.euclidean_ball, jnp.ones(2), 0.6),
        "ASAM": (fsam_optax.adaptive_ellipsoid, jnp.abs(w) + 0.01, 0.4),
        "Fisher SAM": (
            lambda rho: fsam_optax.fisher_ellipsoid(rho, fsam_optax.given(), eta=4.0),
            1 / jnp.sqrt(1 + 4.0 * f / jnp.mean(f)),
            0.9,
        ),
    }[name]
    ball = ball(rho)
    eps, _ = ball.update(g, ball.init(w), w, fisher=f)
    return {"eps": eps, "t": t, "rho": rho, "rise": loss(w + eps) - loss(w)}


FORMULAS = {
    "SAM": "$T = 1$",
    "ASAM": r"$T = |w| + \eta$",
    "Fisher SAM": r"$T^2 = 1\,/\,(1 + \eta F)$",
}


def draw(found, path) -> None:
    """Draws a panel for each geometry."""
    loss, _, w = make_problem()
    across, up = np.linspace(1.1, 4.1, 120), np.linspace(-0.55, 1.65, 100)
    grid = jnp.stack(jnp.meshgrid(across, up), axis=-1)
    surface = jax.vmap(jax.vmap(loss))(grid)
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    w = np.asarray(w)
    headline = "One loss, three balls: each bounds the same formula"
    figure, axes = show.figure(1, 3, headline, figsize=(10.5, 3.9), sharey=True)
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    for axis, (name, facts) in zip(axes[0], found.items(), strict=True):
        color, end = show.LOOKS[name][0], w + facts["eps"]
        axis.grid(visible=False)
        axis.contour(across, up, surface, levels=14, colors="#c9cdd2", linewidths=0.8)
        edge = w[:, None] + facts["rho"] * np.array(facts["t"])[:, None] * circle
        axis.fill(*edge, color=color, alpha=0.12, linewidth=0)
        axis.plot(*edge, color=color, linewidth=1.8)
        axis.annotate("", xy=end, xytext=w, arrowprops=arrow)
        axis.plot(*w, "o", color=INK, markersize=4)
        axis.annotate("w", w, (-11, -10), textcoords="offset points")
        axis.annotate("w + ε", end, (4, 5), textcoords="offset points", color=INK)
        axis.set_title(f"{name}    {FORMULAS[name]}", color=INK, fontsize=11)
        axis.set_aspect("equal")
        axis.set_xlabel("weight of the small feature", color=MUTED)
        axis.tick_params(colors=MUTED, length=0)
        axis.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("weight of the large feature", color=MUTED)
    show.save(figure, path)


@harness.experiment()
def main(run: harness.Run) -> None:
    found = run.each("geometry", FORMULAS, perturbation_of)
    rows = [[name, f["rho"], f"{f['rise']:.3f}"] for name, f in found.items()]
    show.table("How far the loss rises", ["ball", "rho", "loss(w + eps) - loss"], rows)
    draw(found, run.picture())


if __name__ == "__main__":
    raise SystemExit(main())

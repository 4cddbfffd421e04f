"""Question: what do the three balls look like on one and the same loss?

A logistic regression with two weights, one on a feature of small and one on a feature
of large scale. In each panel: the loss, the ball or ellipsoid `||T^-1 eps|| = rho`
around w, and the perturbation that the library returns for the gradient there.

    python benchmarks/geometries.py         # writes benchmarks/figures/geometries.png
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import fsam_optax


matplotlib.use("Agg")
import matplotlib.pyplot as plt


INK, MUTED = "#1a1a1a", "#5f6368"
COLOURS = {"SAM": "#0072b2", "ASAM": "#009e73", "Fisher SAM": "#d55e00"}


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


def main() -> None:
    loss, fisher, w = make_problem()
    g, f = jax.grad(loss)(w), fisher(w)
    balls = {
        "SAM": (
            fsam_optax.euclidean_ball(0.6),
            jnp.ones(2),
            "$T = 1$",
        ),
        "ASAM": (
            fsam_optax.adaptive_ellipsoid(0.4),
            jnp.abs(w) + 0.01,
            r"$T = |w| + \eta$",
        ),
        "Fisher SAM": (
            fsam_optax.fisher_ellipsoid(0.9, fsam_optax.given(), eta=4.0),
            1 / jnp.sqrt(1 + 4.0 * f / jnp.mean(f)),
            r"$T^2 = 1\,/\,(1 + \eta F)$",
        ),
    }
    rhos = {"SAM": 0.6, "ASAM": 0.4, "Fisher SAM": 0.9}
    across, up = np.linspace(1.1, 4.1, 120), np.linspace(-0.55, 1.65, 100)
    grid = jnp.stack(jnp.meshgrid(across, up), axis=-1)
    surface = jax.vmap(jax.vmap(loss))(grid)
    angle = np.linspace(0, 2 * np.pi, 200)

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.5), sharey=True, dpi=160)
    for axis, (name, (ball, t, formula)) in zip(axes, balls.items(), strict=True):
        eps, _ = ball.update(g, ball.init(w), w, fisher=f)
        end = np.asarray(w) + np.asarray(eps)
        axis.contour(across, up, surface, levels=14, colors="#c9cdd2", linewidths=0.8)
        edge = np.asarray(w)[:, None] + rhos[name] * np.asarray(t)[:, None] * np.stack(
            [np.cos(angle), np.sin(angle)]
        )
        axis.fill(*edge, color=COLOURS[name], alpha=0.12, linewidth=0)
        axis.plot(*edge, color=COLOURS[name], linewidth=1.8)
        axis.annotate(
            "",
            xy=end,
            xytext=np.asarray(w),
            arrowprops={
                "arrowstyle": "-|>",
                "color": INK,
                "linewidth": 1.8,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
        axis.plot(*np.asarray(w), "o", color=INK, markersize=4)
        axis.annotate("w", np.asarray(w), (-11, -10), textcoords="offset points")
        axis.annotate("w + ε", end, (4, 5), textcoords="offset points", color=INK)
        axis.set_title(f"{name}    {formula}", color=INK, fontsize=11)
        axis.set_aspect("equal")
        axis.set_xlabel("weight of the small feature", color=MUTED, fontsize=9)
        axis.tick_params(colors=MUTED, labelsize=8, length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].set_ylabel("weight of the large feature", color=MUTED, fontsize=9)
    figure.tight_layout()
    out = pathlib.Path(__file__).parent / "figures" / "geometries.png"
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out)
    print(f"wrote {out.relative_to(pathlib.Path.cwd())}")


if __name__ == "__main__":
    main()

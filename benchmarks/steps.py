"""Training steps to be timed: ours, and beside each the smallest written by hand."""

import math
from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp
import methods
import optax
from cost import compiled, passes, Problem, ratios

import fsam_optax as fsam


OPTIMIZERS = {
    "sgd": optax.sgd(0.01, momentum=0.9),
    "adamw": optax.adamw(1e-3),
}
FAMILY = ("GSAM", "WSAM", "Friendly SAM", "MSAM")
# What these save shows over whole cycles of steps only.
CYCLE = 10
CYCLIC = (
    "Fisher SAM, I1 every 10th step",
    "Fisher SAM, exact every 10th step",
    "SAM, every=2",
    "SAM, every=5",
    "LookSAM by hand",
    "LookSAM",
)


def by_hand(optimizer, gradient) -> dict[str, tuple[Callable, Callable]]:
    """Returns steps without metrics and safeguards, as short as they can be written."""

    def ascend(w, d, rho, t=None):
        t = jax.tree.map(jnp.ones_like, w) if t is None else t
        norm = optax.tree.norm(jax.tree.map(jnp.multiply, t, d))
        return jax.tree.map(lambda w, t, d: w + rho / norm * t * t * d, w, t, d)

    def descend(params, state, d):
        updates, state = optimizer.update(d, state, params)
        return optax.apply_updates(params, updates), state

    def base(w, state, batch):
        return descend(w, state, gradient(w, batch))

    def sam(w, state, batch):
        g = gradient(w, batch)
        scale = 0.05 / optax.tree.norm(g)
        at = jax.tree.map(lambda w, g: w + scale * g, w, g)
        return descend(w, state, gradient(at, batch))

    def asam(w, state, batch):
        g = gradient(w, batch)
        t = jax.tree.map(lambda w: jnp.abs(w) + 0.01 if w.ndim > 1 else w * 0 + 1, w)
        return descend(w, state, gradient(ascend(w, g, 0.5, t), batch))

    def fisher_sam(w, state, batch):
        g = gradient(w, batch)
        f = jax.tree.map(jnp.square, g)
        mean = optax.tree.sum(f) / sum(x.size for x in jax.tree.leaves(f))
        t = jax.tree.map(lambda f: 1 / jnp.sqrt(1 + f / mean), f)
        return descend(w, state, gradient(ascend(w, g, 0.1, t), batch))

    def gsam(w, state, batch):
        g = gradient(w, batch)
        h = gradient(ascend(w, g, 0.05), batch)
        along = optax.tree.vdot(g, h) / optax.tree.norm(h, squared=True)
        d = jax.tree.map(lambda g, h: h - 0.1 * (g - along * h), g, h)
        return descend(w, state, d)

    def wsam(w, state, batch):
        g = gradient(w, batch)
        h = gradient(ascend(w, g, 0.05), batch)
        return descend(w, state, jax.tree.map(lambda g, h: g + 9 * (h - g), g, h))

    def friendly(w, states, batch):
        m, seen, state = states
        g = gradient(w, batch)
        at = ascend(w, jax.tree.map(jnp.subtract, g, m), 0.05)
        w, state = descend(w, state, gradient(at, batch))
        keep = jnp.where(seen, 0.9, 0.0)
        m = jax.tree.map(lambda m, g: keep * m + (1 - keep) * g, m, g)
        return w, (m, jnp.array(True), state)

    def msam(w, states, batch):  # w holds the perturbation, as what a trainer holds.
        m, eps, state = states
        g = gradient(w, batch)
        m = jax.tree.map(lambda m, g: 0.9 * m + g, m, g)
        w, state = descend(jax.tree.map(jnp.subtract, w, eps), state, g)
        scale = -3.0 / optax.tree.norm(m)
        eps = jax.tree.map(lambda m: scale * m, m)
        return jax.tree.map(jnp.add, w, eps), (m, eps, state)

    def looksam(w, states, batch):
        count, v, state = states
        g = gradient(w, batch)

        def perturbed():
            h = gradient(ascend(w, g, 0.05), batch)
            along = optax.tree.vdot(g, h) / optax.tree.norm(g, squared=True)
            v = jax.tree.map(lambda g, h: h - along * g, g, h)
            length = optax.tree.norm(v)
            return h, jax.tree.map(lambda v: v / length, v)

        def plain():
            add = 0.7 * optax.tree.norm(g)
            return jax.tree.map(lambda g, v: g + add * v, g, v), v

        d, v = jax.lax.cond(count % 5 == 0, perturbed, plain)
        w, state = descend(w, state, d)
        return w, (count + 1, v, state)

    def zeros(w):
        return jax.tree.map(jnp.zeros_like, w)

    plain = {"base": base, "SAM": sam, "ASAM": asam, "Fisher SAM, squared": fisher_sam}
    plain |= {"GSAM": gsam, "WSAM": wsam}
    return {
        **{name: (optimizer.init, step) for name, step in plain.items()},
        "Friendly SAM": (
            lambda w: (zeros(w), jnp.array(False), optimizer.init(w)),
            friendly,
        ),
        "MSAM": (lambda w: (zeros(w), zeros(w), optimizer.init(w)), msam),
        "LookSAM": (
            lambda w: (jnp.array(0), zeros(w), optimizer.init(w)),
            looksam,
        ),
    }


def make_steps(model: Problem, optimizer) -> dict[str, tuple[Callable, Callable]]:
    """Returns `init(params) -> state` and `step(params, state, batch)` by name."""
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    gradient = jax.grad(loss)
    ball, key = fsam.euclidean_ball(0.05), jax.random.key(0)

    def wrapped(tx):
        def step(params, state, batch):
            def grad_fn(p, *_):
                return gradient(p, batch)

            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), state

        return tx.init, step

    def oracle(perturbation, **options: Any):
        options = {"metrics": False, **options}
        f = fsam.value_and_grad(loss, perturbation, **options)
        return taken(methods.around(f, optimizer))

    def taken(stepper):
        def step(params, state, batch):
            _, params, state = stepper.step(params, state, batch)
            return params, state

        return stepper.init, step

    def named(name, rho):
        return taken(methods.stepper(name, loss, optimizer, rho))

    def fisher(make, every=0, **options):
        estimator = make(model.apply, fsam.categorical, **options)
        estimator = fsam.refresh_every(every, estimator) if every else estimator
        return oracle(fsam.fisher_ellipsoid(0.1, estimator))

    contrib = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    contrib = optax.contrib.sam(optimizer, contrib, opaque_mode=True)
    hand = by_hand(optimizer, gradient)
    return {
        "base": hand.pop("base"),
        **{f"{name} by hand": steps for name, steps in hand.items()},
        "optax.contrib.sam, opaque": wrapped(contrib),
        "SAM": wrapped(fsam.sharpness_aware(optimizer, ball, metrics=False)),
        "SAM, value_and_grad": oracle(ball),
        "SAM, value_and_grad, metrics": oracle(ball, metrics=True),
        "ASAM": named("ASAM", 0.5),
        "ASAM, filters": oracle(fsam.adaptive_ellipsoid(0.5, scope="filter")),
        "Fisher SAM, squared": named("Fisher SAM, squared, relative", 0.1),
        "Fisher SAM, empirical, one pass": named(
            "Fisher SAM, empirical, relative", 0.1
        ),
        "Fisher SAM, empirical, apart": fisher(fsam.fisher_empirical),
        "Fisher SAM, I1": fisher(fsam.fisher_i1, key=key),
        "Fisher SAM, GNB": fisher(fsam.fisher_gnb, key=key),
        "Fisher SAM, exact": fisher(fsam.fisher_exact),
        "Fisher SAM, I1 every 10th step": fisher(fsam.fisher_i1, every=10, key=key),
        "Fisher SAM, exact every 10th step": fisher(fsam.fisher_exact, every=10),
        "SAM, every=2": oracle(ball, every=2),
        "SAM, every=5": oracle(ball, every=5),
        "SAM, micro_batches=4": oracle(ball, micro_batches=4),
        **{n: named(n, 3.0 if n == "MSAM" else 0.05) for n in FAMILY},
        "LookSAM": oracle(ball, every=5, descent=fsam.reuse(0.7)),
    }


def measure(
    model: Problem,
    optimizer: optax.GradientTransformation,
    repeats: int,
    rows: Container[str] | None = None,
    steps: int = 2,
) -> dict[str, dict[str, Any]]:
    """Returns, for each row, what its step costs.

    Time ratios, of so many steps at once (whole cycles for the cyclic rows), compile
    seconds, temporary megabytes, and passes over arrays like the largest parameter.
    """
    runs, facts, counts = {}, {}, {}
    largest = max((x.shape for x in jax.tree.leaves(model.params)), key=math.prod)
    for row, (init, step) in make_steps(model, optimizer).items():
        if rows is not None and row not in rows:
            continue
        carry = jax.tree.map(jnp.array, (model.params, init(model.params)))
        program, facts[row] = compiled(step, *carry, model.batch, donate_argnums=(0, 1))
        facts[row]["passes"] = passes(program, largest)
        counts[row] = CYCLE if row in CYCLIC else steps
        runs[row] = _training(program, carry, model.batch, counts[row])
    for row, found in ratios(runs, repeats).items():
        per_step = counts["base"] / counts[row]
        facts[row]["ratio"] = found["ratio"] * per_step
        facts[row]["quartiles"] = [q * per_step for q in found["quartiles"]]
    return facts


def _training(program, carry, batch, steps):
    """Returns a function that goes on training for some steps."""
    carries = [carry]

    def run():
        for _ in range(steps):
            carries[0] = program(*carries[0], batch)
        return carries[0]

    return run

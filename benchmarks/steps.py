"""Training steps to be timed: ours, and beside a method the smallest by hand."""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
from cost import compiled, Problem, ratios

import fsam_optax as fsam


SGD = optax.sgd(0.01, momentum=0.9)
CYCLE = 10  # What these save shows over whole cycles of steps only.
CYCLIC = (
    *("Fisher SAM, exact every 10th step", "SAM, every=5"),
    *("LookSAM by hand", "LookSAM"),
)
Steps = dict[str, tuple[Callable, Callable]]


def by_hand(gradient: Callable) -> Steps:
    """Returns steps without metrics and safeguards, as short as they can be written."""

    def ascend(w, d):
        scale = 0.05 / optax.tree.norm(d)
        return jax.tree.map(lambda w, d: w + scale * d, w, d)

    def sam(w, batch):
        return gradient(ascend(w, gradient(w, batch)), batch)

    def asam(w, batch):
        g = gradient(w, batch)
        t = jax.tree.map(lambda w: jnp.abs(w) + 0.01 if w.ndim > 1 else w * 0 + 1, w)
        scale = 0.5 / optax.tree.norm(jax.tree.map(jnp.multiply, t, g))
        at = jax.tree.map(lambda w, t, g: w + scale * t * t * g, w, t, g)
        return gradient(at, batch)

    def gsam(w, batch):
        g = gradient(w, batch)
        h = gradient(ascend(w, g), batch)
        along = optax.tree.vdot(g, h) / optax.tree.norm(h, squared=True)
        return jax.tree.map(lambda g, h: h - 0.1 * (g - along * h), g, h)

    def wsam(w, batch):
        g = gradient(w, batch)
        h = gradient(ascend(w, g), batch)
        return jax.tree.map(lambda g, h: g + 9 * (h - g), g, h)

    def friendly(w, state, batch):
        m, keep = state
        g = gradient(w, batch)
        h = gradient(ascend(w, jax.tree.map(jnp.subtract, g, m)), batch)
        m = jax.tree.map(lambda m, g: keep * m + (1 - keep) * g, m, g)
        return None, h, (m, jnp.array(0.9))

    def looksam(w, state, batch):
        count, v = state
        g = gradient(w, batch)

        def perturbed():
            h = gradient(ascend(w, g), batch)
            along = optax.tree.vdot(g, h) / optax.tree.norm(g, squared=True)
            v = jax.tree.map(lambda g, h: h - along * g, g, h)
            length = optax.tree.norm(v)
            return h, jax.tree.map(lambda v: v / length, v)

        def plain():
            add = 0.7 * optax.tree.norm(g)
            return jax.tree.map(lambda g, v: g + add * v, g, v), v

        d, v = jax.lax.cond(count % 5 == 0, perturbed, plain)
        return None, d, (count + 1, v)

    def msam(w, states, batch):  # w holds the perturbation, as what a trainer holds.
        m, eps, state = states
        g = gradient(w, batch)
        m = jax.tree.map(lambda m, g: 0.9 * m + g, m, g)
        w = jax.tree.map(jnp.subtract, w, eps)
        updates, state = SGD.update(g, state, w)
        scale = -3.0 / optax.tree.norm(m)
        eps = jax.tree.map(lambda m: scale * m, m)
        w = jax.tree.map(jnp.add, optax.apply_updates(w, updates), eps)
        return None, w, (m, eps, state)

    def zeros(w):
        return jax.tree.map(jnp.zeros_like, w)

    def around(oracle, init):
        return methods.around(oracle, SGD, init)[:2]

    def alone(fn):
        return around(lambda w, _, batch: (None, fn(w, batch), ()), lambda w: ())

    return {
        "base": alone(gradient),
        "SAM by hand": alone(sam),
        "ASAM by hand": alone(asam),
        "GSAM by hand": alone(gsam),
        "WSAM by hand": alone(wsam),
        "Friendly SAM by hand": around(friendly, lambda w: (zeros(w), jnp.array(0.0))),
        "LookSAM by hand": around(looksam, lambda w: (jnp.array(0), zeros(w))),
        "MSAM by hand": (lambda w: (zeros(w), zeros(w), SGD.init(w)), msam),
    }


def make_steps(model: Problem) -> Steps:
    """Returns `init(params) -> state` and `step(params, state, batch)` by name.

    A step returns the loss or None, parameters and state.
    """
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    gradient = jax.grad(loss)
    ball, key = fsam.euclidean_ball(0.05), jax.random.key(0)

    def wrapped(tx):
        def step(params, state, batch):
            def grad_fn(p, *_):
                return gradient(p, batch)

            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            return None, optax.apply_updates(params, updates), state

        return tx.init, step

    def oracle(perturbation, metrics=False, **options: Any):
        f = fsam.value_and_grad(loss, perturbation, metrics=metrics, **options)
        return methods.around(f, SGD)

    def named(name, rho):
        return methods.stepper(name, loss, SGD, rho)

    def fisher(estimator, **options):
        return oracle(fsam.fisher_ellipsoid(0.1, estimator), **options)

    exact = fsam.fisher_exact(loss)
    contrib = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    contrib = optax.contrib.sam(SGD, contrib, opaque_mode=True)
    every = {
        "optax.contrib.sam, opaque": wrapped(contrib),
        "SAM": wrapped(fsam.sharpness_aware(SGD, ball, metrics=False)),
        "SAM, value_and_grad, metrics": oracle(ball, metrics=True),
        "ASAM": named("ASAM", 0.5),
        "Fisher SAM, squared": fisher(fsam.squared_gradient()),
        "Fisher SAM, empirical, one pass": fisher(fsam.given(), empirical_fisher=True),
        "Fisher SAM, empirical, apart": fisher(fsam.fisher_empirical(loss)),
        "Fisher SAM, I1": fisher(fsam.fisher_i1(loss, key=key)),
        "Fisher SAM, exact": fisher(exact),
        "Fisher SAM, exact every 10th step": fisher(fsam.refresh_every(CYCLE, exact)),
        "SAM, every=5": oracle(ball, every=5),
        "SAM, micro_batches=4": oracle(ball, micro_batches=4),
        **{name: named(name, 0.05) for name in ("GSAM", "WSAM", "Friendly SAM")},
        "LookSAM": oracle(ball, every=5, descent=fsam.reuse(0.7)),
        "MSAM": named("MSAM", 3.0),
    }
    return by_hand(gradient) | {name: steps[:2] for name, steps in every.items()}


def measure(
    model: Problem,
    repeats: int,
    rows: Collection[str] = (),
    leave_out: Collection[str] = (),
    threads: int = 1,
) -> dict[str, dict[str, Any]]:
    """Returns what a step of each row costs; whole cycles of the cyclic ones."""
    every = make_steps(model)
    chosen = [row for row in rows or every if row not in leave_out]
    counts = {row: CYCLE if row in CYCLIC else 1 for row in chosen}

    def prepared(row):
        init, step = every[row]
        carry = jax.tree.map(jnp.array, (model.params, init(model.params)))
        args = step, *carry, model.batch
        program, known = compiled(*args, donate_argnums=(0, 1))
        return _training(program, carry, model.batch, counts[row]), known

    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(chosen, pool.map(prepared, chosen), strict=True))
    runs = {row: run for row, (run, _) in found.items()}
    facts: dict[str, dict] = {row: known for row, (_, known) in found.items()}
    for row, timed in ratios(runs, repeats).items():
        facts[row] |= {k: np.array(v) / counts[row] for k, v in timed.items()}
    return facts


def _training(program, carry, batch, steps):
    """Returns a function that goes on training for some steps."""
    carries = [carry]

    def run():
        for _ in range(steps):
            carries[0] = program(*carries[0], batch)[1:]
        return carries[0]

    return run

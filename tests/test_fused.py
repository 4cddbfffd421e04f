"""Gradient and empirical Fisher from one pass, against two passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax as fsam
from fsam_optax._engine import after_point


RNG = np.random.default_rng(0)
PARAMS = {
    "in": {
        "kernel": RNG.normal(size=(4, 8)).astype("float32"),
        "bias": RNG.normal(size=8).astype("float32"),
    },
    "out": RNG.normal(size=(8, 3)).astype("float32"),
}
BATCH = (
    RNG.normal(size=(6, 4)).astype("float32"),
    np.array([0, 1, 2, 0, 1, 2]),
)


def model(params, x):
    hidden = x @ params["in"]["kernel"] + params["in"]["bias"][None]
    return jnp.tanh(hidden) @ params["out"]


NLL = fsam.negative_log_likelihood(model, fsam.categorical)
# What stands around the estimator.
AROUND = {
    "alone": lambda estimator: estimator,
    "averaged": lambda estimator: optax.chain(estimator, optax.ema(0.9)),
    "refreshed": lambda estimator: fsam.refresh_every(2, estimator),
}


def run(perturbation, steps=3, **options):
    f = fsam.value_and_grad(NLL, perturbation, **options)
    params, state, values = PARAMS, f.init(PARAMS), []
    step = jax.jit(lambda params, state: f(params, state, BATCH))
    for _ in range(steps):
        value, grads, state = step(params, state)
        params = optax.tree.add_scale(params, -0.1, grads)
        values.append(value)
    return values, params, optax.tree.get(state, "dual_norm")


@pytest.mark.short("averaged-options2")
@pytest.mark.parametrize(
    ("around", "options"),
    [
        ("alone", {}),
        ("averaged", {"micro_batches": 2}),
        ("averaged", {"every": 2}),
        ("refreshed", {}),
    ],
)
def test_one_pass_equals_two(around, options):
    one, two = (
        run(fsam.fisher_ellipsoid(0.3, AROUND[around](estimator)), **fused, **options)
        for estimator, fused in (
            (fsam.given(), {"empirical_fisher": True}),
            (fsam.fisher_empirical(model, fsam.categorical), {}),
        )
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one, two
    )


def test_one_pass_equals_two_mapped_and_under_derivatives():
    """The second gradient is evaluated otherwise after one pass than after two."""
    estimator = fsam.fisher_empirical(model, fsam.categorical)
    fs = (
        fsam.value_and_grad(
            NLL, fsam.fisher_ellipsoid(0.3, fsam.given()), empirical_fisher=True
        ),
        fsam.value_and_grad(NLL, fsam.fisher_ellipsoid(0.3, estimator)),
    )

    def length(f, params):
        _, grads, _ = f(params, f.init(params), BATCH)
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

    several = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), PARAMS)
    one, two = (
        jax.jit(jax.vmap(jax.value_and_grad(functools.partial(length, f))))(several)
        for f in fs
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one, two
    )


def test_what_a_loss_prints_is_printed_at_the_second_point():
    seen = []

    def gradient(w):
        jax.debug.callback(seen.append, w)
        return 2 * w

    found = jax.jit(lambda w: after_point(w, w, gradient))(1.0)
    jax.effects_barrier()
    assert (found, seen) == (2, [1])


@pytest.mark.long
def test_a_fisher_of_the_callers_is_preferred():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    f = fsam.value_and_grad(
        NLL, fsam.fisher_ellipsoid(0.3, fsam.given()), empirical_fisher=True
    )
    sam = fsam.value_and_grad(NLL, fsam.euclidean_ball(0.3))
    _, grads, _ = f(PARAMS, f.init(PARAMS), BATCH, extra_args={"fisher": zeros})
    _, expected, _ = sam(PARAMS, sam.init(PARAMS), BATCH)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        grads,
        expected,
    )


@pytest.mark.parametrize("option", ["empirical_fisher", "functional"])
def test_a_loss_without_a_model_is_refused(option):
    with pytest.raises(TypeError, match=rf"{option}=True.*negative_log_likelihood"):
        fsam.value_and_grad(
            lambda p, b: NLL(p, b), fsam.euclidean_ball(0.1), **{option: True}
        )


def test_two_clean_passes_are_refused():
    with pytest.raises(ValueError, match="two clean passes"):
        fsam.value_and_grad(
            NLL, fsam.euclidean_ball(0.1), empirical_fisher=True, functional=True
        )


def test_one_pass_costs_one_pass_and_only_at_perturbed_steps():
    calls = []

    def counted(params, x):
        jax.debug.callback(lambda: calls.append(None))
        return model(params, x)

    nll = fsam.negative_log_likelihood(counted, fsam.categorical)
    f = fsam.value_and_grad(
        nll, fsam.fisher_ellipsoid(0.3, fsam.given()), empirical_fisher=True, every=2
    )
    step = jax.jit(lambda state: f(PARAMS, state, BATCH)[2])
    state, counts = f.init(PARAMS), []
    for _ in range(2):
        calls.clear()
        state = jax.block_until_ready(step(state))
        jax.effects_barrier()
        counts.append(len(calls))
    examples = len(BATCH[0])
    assert counts[1] == 1  # The batch as a whole.
    assert counts[0] <= examples + 1  # Each example by itself, and the batch once.

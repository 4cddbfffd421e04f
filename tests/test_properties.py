"""Properties of perturbations and of the engine, over random trees and models."""

import functools

import engine_oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from hypothesis import assume, given, settings, strategies as st

import fsam_optax


def fuzz(max_examples):
    return settings(
        derandomize=True, deadline=None, max_examples=max_examples, database=None
    )


# Random trees.

# Shapes and dtypes. Few: what is computed op by op compiles once for each.
KINDS = [
    ((), "float32"),
    ((3,), "bfloat16"),
    ((2, 3), "float32"),
    ((1, 2, 1), "float16"),
    ((0,), "float32"),
    ((2, 0), "bfloat16"),
]
EXPONENTS = st.integers(-30, 30)


@st.composite
def arrays(draw, shape, dtype, exponent, spread=3):
    """Draws an array of about 10^exponent, with zeros and both signs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-spread, 0, size=shape)
    x = np.where(rng.uniform(size=shape) < 0.2, 0.0, x) * 10.0**exponent
    if dtype == "float16":
        x = np.clip(x, -6e4, 6e4)
    return jnp.asarray(np.asarray(x, np.float32), dtype)


@st.composite
def problems(draw, height=3, max_size=3):
    """Draws parameters and a gradient: lists of leaves, and how to nest them."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=max_size))
    size, height = draw(EXPONENTS), draw(st.integers(-height, height))
    params = [draw(arrays(*kind, height)) for kind in kinds]
    return params, [draw(arrays(*kind, size)) for kind in kinds], draw(NESTINGS)


def nest_deep(leaves):
    tree = None
    for i, leaf in enumerate(reversed(leaves)):
        tree = {"leaf": leaf, "rest": tree} if i % 2 else (leaf, [tree])
    return tree


NESTINGS = st.sampled_from(
    [
        list,
        tuple,
        lambda leaves: {f"w{i}": leaf for i, leaf in enumerate(leaves)},
        lambda leaves: [{"a": leaf, "none": None} for leaf in leaves],
        nest_deep,
    ]
)


def named(leaves):
    """Returns leaves as the flat dictionary that the oracles take."""
    return {f"w{i}": leaf for i, leaf in enumerate(leaves)}


GEOMETRIES = {
    "2": (fsam_optax.euclidean_ball, lambda w: oracles.no_scale(w), 2),
    "3": (
        functools.partial(fsam_optax.euclidean_ball, ord=3),
        lambda w: oracles.no_scale(w),
        3,
    ),
    "inf": (
        functools.partial(fsam_optax.euclidean_ball, ord=np.inf),
        lambda w: oracles.no_scale(w),
        np.inf,
    ),
    **{
        scope: (
            functools.partial(
                fsam_optax.adaptive_ellipsoid, scope=scope, normalize=True
            ),
            functools.partial(oracles.asam_scale, eta=0.01, scope=scope),
            2,
        )
        for scope in ("element", "filter", "layer")
    },
}


def ascend(tx, leaves, grads, nest, **extra):
    params = nest(leaves)
    state = tx.init(params)
    eps, state = tx.update(nest(grads), state, params, **extra)
    assert jax.tree.structure(eps) == jax.tree.structure(params)
    eps = jax.tree.leaves(eps)
    # What holds for every geometry and every input.
    for e, w, g in zip(eps, leaves, grads, strict=True):
        assert e.shape == w.shape
        assert e.dtype == jnp.float32
        assert np.all(np.isfinite(e))
        assert np.all(np.sign(e) * np.sign(g.astype(jnp.float32)) >= 0)
    assert state.count == 1
    assert state.skipped in (0, 1)
    return named(eps), state


def assert_worst_case(eps, state, rho, grads, scale, ord=2):
    """Compares with the oracle, where its dual norm is a number of float32."""
    if not oracles.flat(named(grads)).any():
        assert state.skipped == 1
        assert not oracles.flat(eps).any()
        return
    expected, dual_norm = oracles.perturbation(rho, named(grads), scale, ord)
    if not 1e-36 < dual_norm < 1e37:
        # Out of range, it is either right or left out and counted.
        assert state.skipped == (not oracles.flat(eps).any())
        return
    assert state.skipped == 0
    np.testing.assert_allclose(state.dual_norm, dual_norm, rtol=1e-5)
    for name, e in expected.items():
        # Beside the largest entries, tiny ones underflow.
        largest = np.max(np.abs(oracles.flat(expected)))
        np.testing.assert_allclose(eps[name], e, rtol=1e-4, atol=1e-6 * largest)
    length = oracles.norm(oracles.flat(eps) / oracles.flat(scale), ord)
    np.testing.assert_allclose(length, rho, rtol=1e-5)


@fuzz(10)
@given(problems(), st.sampled_from(list(GEOMETRIES)), st.sampled_from([0.0, 0.05, 2.0]))
def test_perturbations_of_any_tree_and_magnitude(problem, geometry, rho):
    params, grads, nest = problem
    factory, scale, ord = GEOMETRIES[geometry]
    assume(sum(w.size for w in params))
    eps, state = ascend(factory(rho), params, grads, nest)
    if rho:
        assert_worst_case(eps, state, rho, grads, scale(named(params)), ord)
    else:
        assert not oracles.flat(eps).any()


@pytest.mark.long
@fuzz(8)
@given(problems(height=30))
def test_asam_of_weights_of_any_magnitude(problem):
    params, grads, nest = problem
    assume(sum(w.size for w in params))
    tx = fsam_optax.adaptive_ellipsoid(0.5, normalize=True)
    _, state = ascend(tx, params, grads, nest)
    assume(oracles.flat(named(grads)).any())
    _, dual_norm = oracles.perturbation(
        0.5, named(grads), oracles.asam_scale(named(params), 0.01)
    )
    if 1e-36 < dual_norm < 1e37:
        assert state.skipped == 0
        np.testing.assert_allclose(state.dual_norm, dual_norm, rtol=1e-4)


@pytest.mark.long
@fuzz(12)
@given(problems(), EXPONENTS, st.data(), st.sampled_from([None, 1e-3, 0.0]))
def test_fisher_sam_with_a_diagonal_of_any_magnitude(problem, exponent, data, damping):
    params, grads, nest = problem
    assume(sum(w.size for w in params))
    fisher = [data.draw(arrays(w.shape, "float32", exponent)) for w in params]
    tx = fsam_optax.fisher_ellipsoid(0.5, fsam_optax.given(), damping=damping)
    eps, state = ascend(tx, params, grads, nest, fisher=nest(fisher))
    positive = oracles.flat(named(fisher)).clip(0)
    if damping != 0 and positive.any():
        scale = oracles.fisher_scale(named(fisher), damping=damping)
        assert_worst_case(eps, state, 0.5, grads, scale)


@pytest.mark.long
@fuzz(8)
@given(problems(), st.sampled_from(list(GEOMETRIES)), st.integers(-20, 20))
def test_eps_is_homogeneous_in_the_gradient_as_its_length_is(problem, geometry, power):
    """Of degree 0, or 1 for unnormalised SAM, in any geometry and for each array."""
    params, grads, nest = problem
    grads = [g.astype(jnp.float32) for g in grads]
    scaled = [g * 2.0**power for g in grads]
    for g in grads:
        assume(not g.any() or 1e-15 < np.max(np.abs(g)) < 1e15)
    factory = functools.partial(GEOMETRIES[geometry][0], 0.5, per_leaf=True)
    for degree, tx in enumerate([factory(), factory(length=lambda n, count: n)]):
        eps, _ = ascend(tx, params, grads, nest)
        other, _ = ascend(tx, params, scaled, list)
        for name in eps:
            np.testing.assert_allclose(
                other[name], 2.0 ** (power * degree) * eps[name], rtol=1e-5, atol=1e-30
            )


@pytest.mark.long
@fuzz(8)
@given(problems(), st.sampled_from(list(GEOMETRIES)), st.integers(-20, 20))
def test_neither_nesting_nor_the_scale_of_the_loss_matters(problem, geometry, power):
    params, grads, nest = problem
    grads = [g.astype(jnp.float32) for g in grads]
    tx = GEOMETRIES[geometry][0](0.5)
    eps, state = ascend(tx, params, grads, nest)
    flat, flat_state = ascend(tx, params, grads, list)
    jax.tree.map(np.testing.assert_array_equal, (eps, state), (flat, flat_state))
    scaled = [g * 2.0**power for g in grads]
    _, dual_norm = (
        oracles.perturbation(
            0.5, named(grads), GEOMETRIES[geometry][1](named(params)), 2
        )
        if any(g.any() for g in grads)
        else (None, 0)
    )
    if 1e-20 < dual_norm < 1e20:
        same, _ = ascend(tx, params, scaled, list)
        for name in eps:
            np.testing.assert_allclose(same[name], eps[name], rtol=1e-5, atol=1e-30)


@pytest.mark.long
@fuzz(8)
@given(problems(max_size=1), st.sampled_from(["2", "element"]))
def test_a_step_keeps_the_types_and_leaves_the_parameters_alone(problem, geometry):
    params, grads, nest = problem
    before = [np.array(w) for w in params]
    points = []

    def grad_fn(point):
        points.append(point)
        return point

    tx = fsam_optax.sharpness_aware(optax.sgd(1.0), GEOMETRIES[geometry][0](0.5))
    tree = nest(params)
    state = tx.init(tree)
    update, new = tx.update(nest(grads), state, tree, grad_fn=grad_fn)
    for old, w in zip(before, params, strict=True):
        np.testing.assert_array_equal(old, w)
    for u, w, v in zip(
        jax.tree.leaves(update), params, jax.tree.leaves(points[0]), strict=True
    ):
        assert (u.shape, u.dtype) == (w.shape, w.dtype)
        np.testing.assert_array_equal(u, -v)
    types = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, new)]
    assert types[0] == types[1]
    assert all(np.isfinite(m) for m in jax.tree.leaves(new.metrics))


# Random models, of one width, so that few operations compile anew.

LAYERS = {
    "dense": lambda x, w, v: x @ w,
    "tied": lambda x, w, v: jnp.tanh(x @ w) @ w.T,
    "bias": lambda x, w, v: x + v[None],
    "scale": lambda x, w, v: jnp.tanh(x * v[None]),
    "normalise": lambda x, w, v: x / jnp.sqrt(jnp.sum(x * x) + 1) * v[0],
    "attend": lambda x, w, v: jax.nn.softmax(x @ w @ x.T) @ x,
    "look up": lambda x, w, v: w[jnp.argmax(x, axis=-1)] + x,
    "relu": lambda x, w, v: jax.nn.relu(x),
    "stop": lambda x, w, v: jax.lax.stop_gradient(w[0] * v)[None] * v[None] + x,
    "square": lambda x, w, v: (w * w)[0][None] * x,
}


@st.composite
def models(draw):
    """Draws a loss of one example of shape (2, 3), its parameters and a batch."""
    layers = draw(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16"]))
    exponent = draw(st.sampled_from([0, 0, -6, 3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 2, dtype)

    params = {"none": jnp.zeros((0, 3), dtype), "unused": normal(2)}
    used = [draw(st.sampled_from("ab")) for _ in layers]
    for name in used:
        params[f"w{name}"], params[f"v{name}"] = normal(3, 3), normal(3)

    def loss(params, x):
        for layer, name in zip(layers, used, strict=True):
            x = LAYERS[layer](x, params[f"w{name}"], params[f"v{name}"])
        return 10.0**exponent * jnp.sum(jnp.sin(x).astype(jnp.float32))

    n = draw(st.sampled_from([0, 1, 4, 4]))
    weights = draw(st.sampled_from([None, None, rng.integers(0, 3, n), np.zeros(n)]))
    weights = None if weights is None else jnp.asarray(weights, jnp.float32)
    return loss, params, normal(n, 2, 3), weights


@pytest.mark.long
@fuzz(6)
@given(models(), st.sampled_from([(2,), (1, 2), (1, 2, 4)]))
def test_engine_is_the_sum_of_powers_for_any_model(model, powers):
    loss, params, batch, weights = model
    sums = jax.jit(functools.partial(fsam_optax.loss_power_sums, loss, powers=powers))(
        params, batch, weights=weights
    )
    for tree in sums:
        assert {x.dtype for x in tree.values()} == {jnp.dtype("float32")}
    if not len(batch):
        assert not any(np.any(x) for x in jax.tree.leaves(sums))
        return
    expected = engine_oracles.loss_power_sums(loss, params, batch, powers, weights)
    for power, actual, wanted in zip(powers, sums, expected, strict=True):
        tolerance = power * (1e-5 if batch.dtype == jnp.float32 else 1e-2)
        engine_oracles.assert_close(actual, wanted, tolerance=tolerance)


# Random data for one model, compiled once: examples are left out by weight.


def logits(params, x):
    return jnp.tanh(x @ params["k"]) + params["b"][None]


ESTIMATORS = {
    "exact": fsam_optax.fisher_exact(logits, fsam_optax.categorical),
    "empirical": fsam_optax.fisher_empirical(logits, fsam_optax.categorical),
}


@jax.jit
def diagonals(params, batch, weights):
    return {
        name: fsam_optax.diagonal(e, params, batch, example_weights=weights)
        for name, e in ESTIMATORS.items()
    }


@fuzz(15)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([-30, -8, -1, 0, 1, 8]),
    st.sampled_from([-15, -3, 0, 3, 15]),
    st.lists(st.sampled_from([0.0, 1e-3, 1.0, 1e3]), min_size=4, max_size=4),
)
def test_diagonals_of_any_data(seed, size, height, weights):
    rng = np.random.default_rng(seed)
    params = {
        "k": np.float32(rng.normal(size=(3, 2)) * 10.0**height),
        "b": np.float32(rng.normal(size=2)),
    }
    x = np.float32(rng.normal(size=(4, 3)) * 10.0**size)
    y, w = rng.integers(0, 2, 4), np.float32(weights)
    actual = diagonals(params, (x, y), w)
    values = jax.tree.leaves(actual)
    assert all(np.all(v >= 0) for v in values)
    if not w.any():
        assert not any(np.any(v) for v in values)
        return
    # In float64, by hand: J of the logits, and the score or its covariance.
    a = np.tanh(np.float64(x) @ np.float64(params["k"]))
    h = a + np.float64(params["b"])
    p = np.exp(h - h.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    share = np.float64(w) / np.sum(np.float64(w))
    moments = {"exact": p * (1 - p), "empirical": (np.eye(2)[y] - p) ** 2}
    for name, moment in moments.items():
        expected = share @ moment
        np.testing.assert_allclose(actual[name]["b"], expected, rtol=1e-4, atol=1e-6)
        slopes = (1 - a**2)[:, None, :] * np.float64(x)[:, :, None]
        expected = np.einsum("n,nij,nj->ij", share, slopes**2, moment)
        if size <= 1 and height <= 0:
            largest = np.max(expected)
            np.testing.assert_allclose(
                actual[name]["k"], expected, rtol=1e-3, atol=1e-4 * largest + 1e-36
            )

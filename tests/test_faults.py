"""Faults and bad inputs, numbered as in the list that the library was designed by."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from test_incumbent import cubic, length, PARAMS, step

import fsam_optax
from fsam_optax import (
    adaptive_ellipsoid,
    bernoulli,
    by_group,
    categorical,
    euclidean_ball,
    fisher_ellipsoid,
    fisher_empirical,
    fisher_exact,
    fisher_gnb,
    fisher_hutchinson,
    fisher_i1,
    fisher_i2,
    gaussian,
    given,
    loss_power_sums,
    negative_log_likelihood,
    poisson,
    power_sums,
    refresh_every,
    sam,
    sharpness_aware,
    squared_gradient,
    value_and_grad,
)


GRADS = cubic(PARAMS)
AVERAGE = optax.chain(squared_gradient(), optax.ema(0.9))
GEOMETRIES = {
    "euclidean": euclidean_ball,
    "inf": functools.partial(euclidean_ball, ord=np.inf),
    "3": functools.partial(euclidean_ball, ord=3),
    "element": adaptive_ellipsoid,
    "filter": functools.partial(adaptive_ellipsoid, scope="filter"),
    "layer": functools.partial(adaptive_ellipsoid, scope="layer"),
    "fisher": functools.partial(fisher_ellipsoid, estimator=squared_gradient()),
    "average": functools.partial(fisher_ellipsoid, estimator=AVERAGE, damping=0.1),
}


# The short tests take a ball, a scope and an average.
LONG = [pytest.mark.long]
FISHER = [GEOMETRIES["fisher"], GEOMETRIES["average"]]


@pytest.fixture(
    params=[
        pytest.param(name, marks=[] if name in ("inf", "filter", "average") else LONG)
        for name in GEOMETRIES
    ]
)
def geometry(request):
    return GEOMETRIES[request.param]


# For what does not depend on the geometry, or costs a compilation for each.
SOME = pytest.mark.parametrize(
    "geometry", ["euclidean", "element", "average"], indirect=True
)


KEY = jax.random.key(0)
X = jnp.array([[0.5, -1.0], [1.5, 0.2], [-0.3, 0.8], [0.1, 0.4]])
Y = jnp.array([0, 1, 1, 0])


def logits(params, x):
    return jnp.tanh(x @ params["k"]) + params["b"][None]


def drawn_and_exact(model, likelihood):
    drawn, exact = (
        fisher_i1(model, likelihood, key=KEY),
        fisher_exact(model, likelihood),
    )
    return by_group({"k": "drawn", "b": "exact"}, {"drawn": drawn, "exact": exact})


ESTIMATORS = {
    "empirical": fisher_empirical,
    "exact": fisher_exact,
    "i1": functools.partial(fisher_i1, key=KEY, num_samples=2, standard_error=True),
    "hutchinson": functools.partial(fisher_hutchinson, key=KEY, standard_error=True),
    "gnb": functools.partial(fisher_gnb, key=KEY),
    "i2": functools.partial(fisher_i2, key=KEY),
    "i2, probed": functools.partial(fisher_i2, key=KEY, hessian="hutchinson"),
    "by_group": drawn_and_exact,
    "refresh_every": lambda *args: refresh_every(2, fisher_exact(*args)),
}
SAMPLED = ["i1", "hutchinson", "gnb", "i2", "i2, probed"]


@functools.cache
def all_estimates(model, likelihood, names=tuple(ESTIMATORS)):
    """Returns `run(params, batch, weights)`: every diagonal, and every new state."""

    @jax.jit
    def run(params, batch, weights):
        diagonals, states = {}, {}
        for name in names:
            estimator = ESTIMATORS[name](model, likelihood)
            state = estimator.init(params)
            diagonals[name], states[name] = estimator.update(
                None, state, params, batch=batch, example_weights=weights
            )
        return diagonals, states

    return run


def exact_and_empirical(model, params, x, y, weights):
    """Returns the two diagonals of a classifier, in float64, from its Jacobian."""
    p = np.asarray(jax.nn.softmax(model(params, x)), np.float64)
    score = np.eye(p.shape[-1])[y] - p
    information = np.einsum("nc,cd->ncd", p, np.eye(p.shape[-1]))
    information -= np.einsum("nc,nd->ncd", p, p)
    jacobian = jax.tree.map(
        lambda j: np.asarray(j, np.float64), jax.jacrev(model)(params, x)
    )
    w = np.asarray(weights, np.float64) / np.sum(weights)
    exact = {
        n: np.einsum("n,nc...,ncd,nd...->...", w, j, information, j)
        for n, j in jacobian.items()
    }
    empirical = {
        n: np.einsum("n,n...->...", w, np.einsum("nc,nc...->n...", score, j) ** 2)
        for n, j in jacobian.items()
    }
    return {"exact": exact, "empirical": empirical, "refresh_every": exact}


def ascend(tx, grads=GRADS, params=PARAMS, state=None, **extra):
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, **extra)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def assert_zero(tree):
    assert not any(np.any(x) for x in jax.tree.leaves(tree))


def test_fault_01_zero_gradient(geometry):
    tx = geometry(0.5)
    eps, state = ascend(tx, zeros(PARAMS))
    assert_zero(eps)
    assert (state.count, state.skipped, state.dual_norm) == (1, 1, 0)
    assert_equal(state.operator, tx.init(PARAMS).operator)
    _, state = ascend(tx, state=state)
    assert (state.count, state.skipped) == (2, 1)
    # The step is the plain step.
    optimizer = sharpness_aware(optax.sgd(1.0), tx)
    update, state = step(optimizer, grads=zeros(PARAMS))
    assert_equal(update, jax.tree.map(jnp.negative, GRADS))
    assert state.step == 1
    assert state.metrics.gradient_cosine == 0


def test_fault_02_zero_gradient_in_one_leaf(geometry):
    eps, state = ascend(geometry(0.5), {**GRADS, "b": jnp.zeros(2)})
    assert_zero(eps["b"])
    assert np.all(eps["k"] != 0)
    assert state.skipped == 0
    if geometry not in FISHER:  # Its mean is over the zeros too.
        expected, _ = ascend(geometry(0.5, mask={"k": True, "b": False}))
        np.testing.assert_allclose(eps["k"], expected["k"], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_fault_03_first_gradient_not_finite(geometry, value):
    tx = geometry(0.5)
    _, state = ascend(tx)
    grads = {**GRADS, "b": GRADS["b"].at[0].set(value)}
    eps, new_state = ascend(tx, grads, state=state)
    assert_zero(eps)
    assert (new_state.count, new_state.skipped) == (2, 1)
    assert_equal(new_state.operator, state.operator)
    eps, _ = ascend(tx, state=new_state)
    expected, _ = ascend(tx, state=state._replace(count=new_state.count))
    assert_equal(eps, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"damping": 0.1}], ids=str)
def test_fault_03_fisher_not_finite(value, relative, kwargs):
    estimator = optax.chain(given(), optax.ema(0.9))
    tx = fisher_ellipsoid(0.5, estimator, relative=relative, **kwargs)
    fisher = jax.tree.map(jnp.abs, PARAMS)
    _, state = ascend(tx, fisher=fisher)
    bad = {**fisher, "b": fisher["b"].at[0].set(value)}
    eps, new_state = ascend(tx, state=state, fisher=bad)
    assert_zero(eps)
    assert new_state.skipped == 1
    assert_equal(new_state.operator, state.operator)


@pytest.mark.parametrize("front_end", ["sharpness_aware", "value_and_grad"])
def test_fault_04_second_gradient_not_finite(front_end):
    # The loss has a gradient at w and none above it.
    def loss(params, batch):
        del batch
        value = sum(jnp.sum(w**4) for w in params.values()) / 4
        return value * jnp.where(value > limit, jnp.nan, 1.0)

    limit = 1.001 * sum(jnp.sum(w**4) for w in PARAMS.values()) / 4
    guarded = optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=3)
    ball = euclidean_ball(0.5)
    if front_end == "sharpness_aware":
        tx = sharpness_aware(guarded, ball)
        update, state = step(tx, grad_fn=jax.grad(lambda p: loss(p, None)))
        base = state.base
    else:
        f = value_and_grad(loss, ball)
        value, grads, state = f(PARAMS, f.init(PARAMS), None)
        assert np.isfinite(value)
        update, base = guarded.update(grads, guarded.init(PARAMS), PARAMS)
    assert state.perturbation.skipped == 0
    assert_zero(update)
    assert_equal(base.inner_state, guarded.init(PARAMS).inner_state)
    assert base.total_notfinite == 1


@pytest.mark.parametrize("factor", [1e30, 1e-30])
@pytest.mark.parametrize("name", ["euclidean", "inf", "3", "element", "layer"])
def test_fault_05_huge_and_tiny_gradients(name, factor):
    grads = jax.tree.map(lambda g: factor * g, GRADS)
    eps, state = ascend(GEOMETRIES[name](0.5), grads)
    expected, _ = ascend(GEOMETRIES[name](0.5))
    for leaf in PARAMS:
        np.testing.assert_allclose(eps[leaf], expected[leaf], rtol=1e-5)
    if name == "euclidean":
        np.testing.assert_allclose(length(eps), 0.5, rtol=1e-5)
        np.testing.assert_allclose(state.dual_norm, factor * length(GRADS), rtol=1e-5)


@pytest.mark.short("2-1.0", "1.5-0.0", "inf-1.0")
@pytest.mark.parametrize("factor", [1e30, 1e-30, 0.0])
@pytest.mark.parametrize("constant", [0.0, 1.0])
@pytest.mark.parametrize("ord", [2, 1.5, jnp.inf])
def test_fault_05_a_constant_leaf_beside_huge_and_tiny_gradients(factor, constant, ord):
    # Known when compiling, as is the gradient of a parameter that the loss ignores.
    def ascent(grads):
        whole = {**grads, "c": jnp.full(3, constant * factor)}
        ball = euclidean_ball(0.5, ord=ord)
        return ascend(ball, whole, {**PARAMS, "c": jnp.ones(3)})

    grads = jax.tree.map(lambda g: factor * g, GRADS)
    eps, state = jax.jit(ascent)(grads)
    expected, expected_state = ascent(grads)
    assert state.skipped == (factor == 0)
    np.testing.assert_allclose(state.dual_norm, expected_state.dual_norm, rtol=1e-5)
    for leaf in eps:
        np.testing.assert_allclose(eps[leaf], expected[leaf], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [1e15, 1e-15])
def test_fault_05_squared_gradients_within_float32(factor):
    grads = jax.tree.map(lambda g: factor * g, GRADS)
    eps, _ = ascend(GEOMETRIES["fisher"](0.5), grads)
    expected, _ = ascend(GEOMETRIES["fisher"](0.5))
    for leaf in PARAMS:
        np.testing.assert_allclose(eps[leaf], expected[leaf], rtol=1e-5)


def test_fault_05_metrics_of_huge_gradients():
    def huge(params):
        return jax.tree.map(lambda w: 1e30 * w, params)

    _, state = step(sam(optax.sgd(0.1), 0.0), grad_fn=huge)
    np.testing.assert_allclose(state.metrics.grad_norm, 1e30 * length(PARAMS), 1e-5)
    np.testing.assert_allclose(state.metrics.gradient_cosine, 1, rtol=1e-5)


@pytest.mark.parametrize("second", [0.0, 1e-33, 1e-20, 1e-12, 1.0, 1e13, 1e20, 1e30])
@pytest.mark.parametrize("first", [0.0, 1e-33, 1e-20, 1e-12, 1.0, 1e13, 1e20, 1e30])
def test_fault_05_cosine_of_gradients_of_any_two_magnitudes(first, second):
    x, y = np.random.default_rng(1).normal(size=(2, 50)).astype(np.float32)
    _, state = step(
        sam(optax.sgd(0.1), 0.0),
        params={"w": jnp.zeros(50)},
        grads={"w": jnp.asarray(first * x)},
        grad_fn=lambda params: {"w": jnp.asarray(second * y)},
    )
    x, y = x.astype(float), y.astype(float)
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    expected = cosine if first * second else 0
    np.testing.assert_allclose(state.metrics.gradient_cosine, expected, rtol=1e-4)


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("grads", [GRADS, zeros(GRADS)])
def test_fault_05_metrics_of_gradients_that_are_not_finite(bad, grads):
    """A clamp against overflow must not make a finite cosine out of infinities."""

    def grad_fn(params):
        return jax.tree.map(lambda w: w.at[0].set(bad), params)

    _, state = step(sam(optax.sgd(0.1), 0.5), grads=grads, grad_fn=grad_fn)
    assert not jnp.isfinite(state.metrics.perturbed_grad_norm)
    assert jnp.isnan(state.metrics.gradient_cosine)


@pytest.mark.short("element")
@SOME
def test_fault_06_half_precision_squares_overflow(geometry):
    grads = {"k": jnp.full((20, 50), 300, jnp.float16), "b": jnp.ones(3, jnp.float16)}
    eps, state = ascend(geometry(0.5), grads, grads)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    expected, _ = ascend(geometry(0.5), wide, wide)
    assert state.skipped == 0
    assert eps["k"].dtype == jnp.float32
    for leaf in grads:
        np.testing.assert_allclose(eps[leaf], expected[leaf], rtol=1e-3)


@pytest.mark.parametrize("front_end", ["sharpness_aware", "value_and_grad"])
def test_fault_07_bfloat16_parameters(front_end):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    seen = []

    def loss(p, batch):
        del batch
        jax.debug.callback(lambda w: seen.append(np.asarray(w, np.float64)), p["k"])
        return sum(jnp.sum(w.astype(jnp.float32) ** 4) for w in p.values()) / 4

    ball = euclidean_ball(1e-3, mask={"k": True, "b": False})
    if front_end == "sharpness_aware":
        tx = sharpness_aware(optax.sgd(0.1), ball, perturb_dtype=jnp.float32)
        update, _ = step(tx, params=params, grad_fn=jax.grad(lambda p: loss(p, None)))
    else:
        f = value_and_grad(loss, ball, perturb_dtype=jnp.float32)
        _, update, _ = f(params, f.init(params), None)
    jax.effects_barrier()
    assert {x.dtype for x in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}
    clean, perturbed = seen
    np.testing.assert_allclose(np.linalg.norm(perturbed - clean), 1e-3, rtol=1e-2)


@pytest.mark.short("element")
@SOME
def test_fault_08_mixed_dtypes(x64, geometry):
    dtypes = {"a": jnp.float32, "b": jnp.bfloat16, "c": jnp.float16, "d": jnp.float64}
    params = {n: jnp.array([[1.0, -2.0]], dtype) for n, dtype in dtypes.items()}
    grads = {n: jnp.array([[3.0, 1.0]], dtype) for n, dtype in dtypes.items()}
    tx = geometry(0.5)
    eps, _ = ascend(tx, grads, params)
    for name in dtypes:
        wide = jnp.float64 if name == "d" else jnp.float32
        assert eps[name].dtype == wide, name
        # All leaves but the bias have the same values, which all dtypes can hold.
        if name != "b":
            np.testing.assert_allclose(eps[name], eps["d"], rtol=1e-5)
    optimizer = sharpness_aware(optax.sgd(0.5), tx)
    update, _ = step(optimizer, params=params, grads=grads)
    assert {n: u.dtype for n, u in update.items()} == dtypes
    metrics = optimizer.init(params).metrics
    assert {m.dtype for m in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}


@pytest.mark.short("euclidean")
@SOME
def test_fault_08_float64_is_exact(x64, geometry):
    params = {n: jnp.asarray(np.asarray(w, np.float64)) for n, w in PARAMS.items()}
    eps, _ = ascend(geometry(0.5), cubic(params), params)
    single, _ = ascend(
        geometry(0.5),
        jax.tree.map(lambda g: g.astype(jnp.float32), cubic(params)),
        PARAMS,
    )
    assert eps["k"].dtype == jnp.float64
    if geometry is euclidean_ball:
        expected, _ = oracles.perturbation(0.5, cubic(params), oracles.no_scale(params))
        np.testing.assert_allclose(eps["k"], expected["k"], rtol=1e-14)
    np.testing.assert_allclose(eps["k"], single["k"], rtol=1e-5)


def test_fault_09_complex_leaves(geometry):
    tree = {**PARAMS, "z": jnp.ones(2, jnp.complex64)}
    with pytest.raises(TypeError, match=r"leaf \['z'\] of `grads` is complex"):
        ascend(geometry(0.5), tree, tree)
    with pytest.raises(TypeError, match=r"leaf \['z'\] of `params` is complex"):
        ascend(geometry(0.5), {**tree, "z": jnp.ones(2)}, tree)


@pytest.mark.parametrize(
    ("leaf", "grad"),
    [
        (jnp.arange(3), np.zeros(3, jax.dtypes.float0)),
        (jnp.arange(3), jnp.arange(3)),
        (jnp.array(True), np.zeros((), jax.dtypes.float0)),
        (jax.random.key(0), np.zeros((), jax.dtypes.float0)),
        (7, 7),
        (True, True),
        (jnp.arange(3), jnp.ones(3)),
    ],
    ids=["float0", "int", "bool", "key", "python_int", "python_bool", "float_gradient"],
)
def test_fault_10_leaves_that_hold_no_reals(geometry, leaf, grad):
    if (
        geometry is GEOMETRIES["average"]
        and isinstance(leaf, jax.Array)
        and (jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))
    ):
        pytest.skip("`optax.ema` cannot average keys")
    eps, state = ascend(geometry(0.5), {**GRADS, "n": grad}, {**PARAMS, "n": leaf})
    expected, expected_state = ascend(geometry(0.5))
    assert_zero(eps["n"])
    assert eps["n"].shape == jnp.shape(grad)
    assert_equal({n: eps[n] for n in PARAMS}, expected)
    assert state.dual_norm == expected_state.dual_norm


@pytest.mark.parametrize("every", [1, 2])
def test_fault_10_integer_leaves_in_a_step(every):
    params = {**PARAMS, "n": jnp.arange(3)}

    def grad_fn(p):
        def loss(p):
            return sum(jnp.sum(p[n] ** 4) for n in PARAMS) / 4 + 0.0 * p["n"].sum()

        return jax.grad(loss, allow_int=True)(p)

    tx = sharpness_aware(optax.identity(), euclidean_ball(0.5), every=every)
    update, state = step(tx, params=params, grad_fn=grad_fn)
    expected, expected_state = step(
        sharpness_aware(optax.identity(), euclidean_ball(0.5))
    )
    for name in PARAMS:
        np.testing.assert_allclose(update[name], expected[name], rtol=1e-6)
    shares = state.metrics.leaf_perturbation_norms
    assert shares.pop("n") == 0
    expected = jax.tree.leaves(expected_state.metrics)
    np.testing.assert_allclose(jax.tree.leaves(state.metrics), expected, rtol=1e-6)


@pytest.mark.parametrize("nothing", [None, optax.MaskedNode(), {}, ()], ids=str)
def test_fault_11_nodes_without_leaves(geometry, nothing):
    params, grads = {**PARAMS, "x": nothing}, {**GRADS, "x": nothing}
    eps, _ = ascend(geometry(0.5), grads, params)
    assert eps["x"] == nothing
    assert_equal({n: eps[n] for n in PARAMS}, ascend(geometry(0.5))[0])


@pytest.mark.parametrize("tree", [{}, (), {"a": jnp.zeros((0, 3))}], ids=str)
def test_fault_11_nothing_to_perturb(geometry, tree):
    eps, state = ascend(geometry(0.5), tree, tree)
    assert jax.tree.structure(eps) == jax.tree.structure(tree)
    assert (state.count, state.dual_norm) == (1, 0)
    everything = {"k": True, "b": True}
    nothing = jax.tree.map(lambda _: False, everything)
    eps, _ = ascend(geometry(0.5, mask=nothing))
    assert_zero(eps)


def test_fault_11_zero_size_and_scalar_leaves(geometry):
    params = {**PARAMS, "e": jnp.zeros((2, 0)), "s": jnp.float32(2.0)}
    eps, state = ascend(geometry(0.5), cubic(params), params)
    assert eps["e"].shape == (2, 0)
    assert eps["s"].shape == ()
    assert eps["s"] > 0
    assert np.isfinite(state.dual_norm)


def test_fault_12_params_missing():
    for tx in (sam(optax.sgd(0.1)), adaptive_ellipsoid(0.1)):
        with pytest.raises(ValueError, match=r"`update\(grads, state, params\)`"):
            tx.update(GRADS, tx.init(PARAMS), None, grad_fn=cubic)


@pytest.mark.parametrize(
    ("grads", "match"),
    [
        ({"k": GRADS["k"]}, r"\['b'\] is in `params` and not in `grads`"),
        ({**GRADS, "c": GRADS["b"]}, r"\['c'\] is in `grads` and not in `params`"),
        ({**GRADS, "k": jnp.ones((1, 2))}, r"\['k'\] is of shape \(1, 2\) in `grads`"),
        ({**GRADS, "k": jnp.ones(())}, r"\['k'\] is of shape \(\) in `grads`"),
        ({**GRADS, "b": jnp.ones((1, 2))}, r"\['b'\] is of shape \(1, 2\)"),
    ],
    ids=["missing", "extra", "broadcastable", "scalar", "rank"],
)
def test_fault_13_structure_or_shape(geometry, grads, match):
    with pytest.raises(ValueError, match=match):
        ascend(geometry(0.5), grads)


@pytest.mark.parametrize("rho", [-1e-9, -1, np.nan, np.inf, -np.inf, np.float64(-1)])
def test_fault_14_rho_out_of_range(geometry, rho):
    with pytest.raises(ValueError, match="`rho` must be a number in"):
        geometry(rho)
    for alias in (sam,):
        with pytest.raises(ValueError, match="`rho` must be a number in"):
            alias(optax.sgd(0.1), rho)


@pytest.mark.short("average")
@SOME
def test_fault_14_traced_rho_is_not_branched_on(geometry):
    eps = jax.jit(lambda rho: ascend(geometry(rho))[0])(-0.5)
    expected, _ = ascend(geometry(0.5))
    for name in PARAMS:
        np.testing.assert_allclose(eps[name], -expected[name], rtol=1e-6)


def test_fault_15_rho_0(geometry):
    eps, state = ascend(geometry(0.0))
    assert_zero(eps)
    assert state.skipped == 0
    assert state.dual_norm > 0
    base = optax.adam(0.1)
    update, new_state = step(sharpness_aware(base, geometry(0.0)))
    expected, expected_state = base.update(GRADS, base.init(PARAMS), PARAMS)
    assert_equal((update, new_state.base), (expected, expected_state))


@SOME
def test_fault_16_rho_of_every_kind(geometry):
    expected, _ = ascend(geometry(0.5))
    for rho in (jnp.float32(0.5), np.float64(0.5), np.array(0.5), lambda count: 0.5):
        eps, state = ascend(geometry(rho))
        assert_equal(eps, expected)
        assert state.rho == 0.5
        assert state.rho.dtype == jnp.float32


def test_fault_17_zero_weights_without_eta():
    params = {"k": jnp.zeros((2, 2)), "w": jnp.array([1.0, 0.0])}
    grads = jax.tree.map(jnp.ones_like, params)
    half = 0.5 / np.sqrt(2)
    for scope, expected in {
        "element": [0.5, 0.0],
        "filter": [0.5, 0.0],
        "layer": [half, half],
    }.items():
        tx = adaptive_ellipsoid(0.5, eta=0.0, scope=scope)
        eps, state = ascend(tx, grads, params)
        assert_zero(eps["k"])
        np.testing.assert_allclose(eps["w"], expected, rtol=1e-6)
        assert state.skipped == 0
        eps, state = ascend(tx, grads, zeros(params))
        assert_zero(eps)
        assert state.skipped == 1


@pytest.mark.parametrize("relative", [True, False])
def test_fault_17_zero_fisher(relative):
    tx = fisher_ellipsoid(0.5, given(), damping=0.0, relative=relative)
    fisher = {"k": jnp.ones((2, 2)), "b": jnp.zeros(2)}
    eps, state = ascend(tx, fisher=fisher)
    assert_zero(eps["b"])
    # Relative to its mean F is 6/4 in the other leaf, which makes eps shorter.
    expected = 0.5 * np.sqrt(4 / 6 if relative else 1)
    np.testing.assert_allclose(length(eps), expected, rtol=1e-6)
    assert state.skipped == 0
    eps, state = ascend(tx, fisher=zeros(PARAMS))
    assert_zero(eps)
    assert state.skipped == 1
    # With eta, F = 0 everywhere is SAM.
    tx = fisher_ellipsoid(0.5, given(), relative=relative)
    eps, _ = ascend(tx, fisher=zeros(PARAMS))
    assert_equal(eps, ascend(euclidean_ball(0.5))[0])


@pytest.mark.parametrize("kwargs", [{}, {"damping": 1e-3}, {"damping": 0.0}], ids=str)
@pytest.mark.parametrize("relative", [True, False])
def test_fault_18_dynamic_range_of_the_fisher(kwargs, relative):
    fisher = {
        "k": jnp.array([[1e-20, 1e20], [1.0, 0.0]]),
        "b": jnp.array([-1e10, 1e-38]),
    }
    tx = fisher_ellipsoid(0.5, given(), relative=relative, **kwargs)
    eps, state = ascend(tx, fisher=fisher)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(eps))
    assert state.skipped == 0
    assert length(eps) > 0
    if kwargs.get("damping") != 0:
        stretch = np.abs(eps["k"] / GRADS["k"])
        assert stretch[0, 1] < 0.2 * stretch[1, 1]
        np.testing.assert_allclose(stretch[0, 0], stretch[1, 1], rtol=1e-5)


@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_fault_19_masked_leaves(geometry, value):
    grads = {**GRADS, "b": value * GRADS["b"]}
    eps, state = ascend(geometry(0.5, mask={"k": True, "b": False}), grads)
    expected, expected_state = ascend(
        geometry(0.5), {"k": GRADS["k"]}, {"k": PARAMS["k"]}
    )
    assert_zero(eps["b"])
    np.testing.assert_allclose(eps["k"], expected["k"], rtol=1e-6)
    np.testing.assert_allclose(state.dual_norm, expected_state.dual_norm, rtol=1e-6)
    assert state.skipped == 0


@pytest.mark.long
def test_fault_20_batch_of_1_and_of_0_and_no_weight_for_the_estimators():
    run = all_estimates(logits, categorical)
    with jax.debug_nans(True):
        one, states = run(PARAMS, (X[:1], Y[:1]), jnp.ones(1))
        weightless, _ = run(PARAMS, (X[:1], Y[:1]), jnp.zeros(1))
        empty, _ = run(PARAMS, (X[:0], Y[:0]), jnp.ones(0))
    assert_zero((weightless, empty))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(one))
    expected = exact_and_empirical(logits, PARAMS, X[:1], Y[:1], np.ones(1))
    for name, diagonal in expected.items():
        for leaf in PARAMS:
            np.testing.assert_allclose(one[name][leaf], diagonal[leaf], rtol=1e-5)
    # Of a single draw there is no standard error, of two there is.
    error = {name: states[name].standard_error["k"] for name in ("hutchinson", "i1")}
    assert np.all(error["hutchinson"] == np.inf)
    assert np.all(np.isfinite(error["i1"]))


def test_fault_20_batch_of_0_and_no_weight_for_the_engine():
    def loss(params, example):
        x, y = example
        return -categorical.log_prob(logits(params, x[None])[0], y)

    def cotangents(h, y):
        return categorical.score(h, y)[None]

    @jax.jit
    def both(x, y, weights):
        return power_sums(
            logits, PARAMS, x, cotangents, y, powers=(1, 2, 4), weights=weights
        ), loss_power_sums(
            loss, PARAMS, (x, y), powers=(1, 2), weights=weights, has_value=True
        )

    nothing = [(X[:0], Y[:0], None), (X[:0], Y[:0], jnp.ones(0))]
    for x, y, weights in [*nothing, (X, Y, jnp.zeros(4))]:
        sums, (value, loss_sums) = both(x, y, weights)
        assert value == 0
        assert_zero((sums, loss_sums))
        for tree in (*sums, *loss_sums):
            assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.short("empirical-2")
@pytest.mark.parametrize(
    ("name", "micro_batches"), [("empirical", 2), ("i1", None)], ids=str
)
def test_fault_20_batch_of_1_and_of_0_in_a_step(name, micro_batches):
    ellipsoid = fisher_ellipsoid(0.5, ESTIMATORS[name](logits, categorical))
    loss = negative_log_likelihood(logits, categorical)
    f = value_and_grad(loss, ellipsoid, micro_batches=micro_batches)
    state = f.init(PARAMS)
    with jax.debug_nans(True):
        value, grads, empty = jax.jit(f)(PARAMS, state, (X[:0], Y[:0]))
    assert value == 0
    assert_zero((grads, empty.metrics, empty.sharpness))
    assert empty.perturbation.skipped == 1
    few = (X[: micro_batches or 1], Y[: micro_batches or 1])
    with jax.debug_nans(True):
        value, grads, state = jax.jit(f)(PARAMS, state, few)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((value, grads)))
    assert state.perturbation.skipped == 0
    assert 0 < state.metrics.perturbation_norm <= 0.5


def test_fault_20_fisher_sam_without_weights_is_sam():
    def one_step(ellipsoid, **extra_args):
        loss = negative_log_likelihood(logits, categorical)
        f = value_and_grad(loss, ellipsoid)
        run = jax.jit(functools.partial(f, extra_args=extra_args))
        return run(PARAMS, f.init(PARAMS), (X, Y))[1]

    weightless = one_step(
        fisher_ellipsoid(0.5, fisher_empirical(logits, categorical)),
        example_weights=jnp.zeros(4),
    )
    expected = one_step(euclidean_ball(0.5))
    for leaf in PARAMS:
        np.testing.assert_allclose(weightless[leaf], expected[leaf], rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    "matrix", ["dense_fisher", "dense_ggn", "dense_empirical_fisher"]
)
def test_fault_20_batch_of_0_for_the_matrices(matrix):
    dense = getattr(fsam_optax, matrix)
    assert_zero(dense(logits, categorical, PARAMS, (X[:0], Y[:0])))
    tx = fsam_optax.scale_by_inverse_dense(
        functools.partial(dense, logits, categorical), damping=2.0
    )
    update, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=(X[:0], Y[:0]))
    for leaf in PARAMS:
        np.testing.assert_allclose(update[leaf], GRADS[leaf] / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "fisher_bounds",
        "fisher_variance_i1",
        "fisher_variance_i1_bounds",
        "fisher_variance_i2",
        "fisher_variance_i2_bounds",
        "fisher_variance_between_inputs",
    ],
)
def test_fault_20_batch_of_0_for_the_variances(name):
    def no_examples():
        return getattr(fsam_optax.variance, name)(logits, categorical, PARAMS, X[:0])

    with pytest.raises(ValueError, match="`inputs`"):
        no_examples()


# Logits of about 1e4, with derivatives as large, which float32 holds without rounding.
SURE = {**PARAMS, "b": jnp.array([0.25, -0.75])}
SURE_X = jnp.array([[0.5, -1.0], [1.5, 0.25], [-0.5, 1.0], [1.0, 0.5]])
SURE_Y = jnp.array([0, 0, 1, 0])


def sure(params, x):
    return 1e4 * (x @ params["k"] + params["b"][None])


def test_fault_21_degenerate_softmax():
    run = all_estimates(sure, categorical)
    with jax.debug_nans(True):
        diagonals, states = run(SURE, (SURE_X, SURE_Y), jnp.ones(4))
        wrong, _ = run(SURE, (SURE_X, 1 - SURE_Y), jnp.ones(4))
    assert_zero(diagonals)
    assert_zero([states[name].standard_error for name in ("i1", "hutchinson")])
    # At a label of probability 0 the score is (1, -1), and 1e4 times that.
    np.testing.assert_allclose(wrong.pop("empirical")["b"], 1e8, rtol=1e-6)
    assert_zero(wrong)


def test_fault_21_degenerate_bernoulli_and_poisson():
    def rare(params, x):
        return -1e4 - (x @ params["k"] + params["b"][None]) ** 2

    labels = (sure(SURE, SURE_X) > 0).astype(int)
    with jax.debug_nans(True):
        yes_or_no, _ = all_estimates(sure, bernoulli, ("i2", "i2, probed"))(
            SURE, (SURE_X, labels), jnp.ones(4)
        )
        counts, _ = all_estimates(rare, poisson, ("i1", "exact", "hutchinson"))(
            SURE, (SURE_X, None), jnp.ones(4)
        )
    assert_zero((yes_or_no, counts))


@pytest.mark.short("likelihood1-float16")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("likelihood", [categorical, bernoulli])
def test_fault_21_likelihoods_at_extreme_logits(likelihood, dtype):
    h = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype)
    y = jnp.array([0, 2]) if likelihood is categorical else (h > 0).astype(int)
    with jax.debug_nans(True):
        values = (
            likelihood.log_prob(h, y),
            likelihood.score(h, y),
            likelihood.factor(h),
            likelihood.factor_product(h, jnp.ones(likelihood.factor(h).shape[::2])),
            likelihood.fourth_moment(h, jnp.ones(h.shape)),
            likelihood.bounds(h),
        )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(values))
    if likelihood is categorical:
        assert_zero(values)
        np.testing.assert_array_equal(likelihood.sample(KEY, h), y)


def test_fault_21_matrices_and_variances_at_extreme_logits():
    @jax.jit
    def everything(params, x):
        batch = (x, SURE_Y)
        matrices = ("dense_fisher", "dense_ggn", "dense_empirical_fisher")
        diagonals = ("variance_i1", "bounds", "variance_between_inputs")
        model = (sure, categorical, params)
        return (
            [getattr(fsam_optax, name)(*model, batch) for name in matrices],
            [
                getattr(fsam_optax.variance, f"fisher_{name}")(*model, x)
                for name in diagonals
            ],
        )

    with jax.debug_nans(True):
        assert_zero(everything(SURE, SURE_X))


def test_fault_21_a_step_where_the_model_is_sure():
    f = value_and_grad(
        negative_log_likelihood(sure, categorical),
        fisher_ellipsoid(0.5, fisher_empirical(sure, categorical)),
    )
    with jax.debug_nans(True):
        value, grads, state = jax.jit(f)(SURE, f.init(SURE), (SURE_X, SURE_Y))
    assert value == 0
    assert_zero((grads, state.metrics, state.sharpness))
    assert state.perturbation.skipped == 1


def test_fault_22_batch_norm_and_dropout_see_each_batch_once():
    def loss(params, batch, statistics, key):
        noise = jax.random.normal(key, batch.shape)
        mean = jnp.mean(batch * params["w"])
        statistics = {"mean": 0.9 * statistics["mean"] + 0.1 * mean}
        return jnp.mean((batch + noise) * params["w"]) ** 2, (statistics, noise)

    f = value_and_grad(loss, euclidean_ball(0.5), has_aux=True)
    params, batch = {"w": jnp.float32(2.0)}, jnp.arange(4.0)
    statistics, state = {"mean": jnp.float32(0.0)}, f.init(params)
    for i in range(3):
        key = jax.random.key(i)
        (_, (statistics, noise)), grads, state = f(
            params, state, batch, statistics, key
        )
        mean = np.mean(batch + noise)
        w = 2.0 + 0.5 * np.sign(2 * mean**2)
        np.testing.assert_allclose(grads["w"], 2 * mean**2 * w, rtol=1e-5)
    # Of the clean weights: 2 * mean(batch) = 3.
    np.testing.assert_allclose(statistics["mean"], 3 * (1 - 0.9**3), rtol=1e-5)


@pytest.mark.short("euclidean")
@SOME
def test_fault_23_no_tracer_leaks_and_no_second_trace(geometry):
    tx = sharpness_aware(optax.adam(0.1), geometry(0.5), every=2)
    traces = []

    @jax.jit
    def train(params, state):
        traces.append(None)

        def body(carry, _):
            params, state = carry
            update, state = step(tx, state, params)
            return (optax.apply_updates(params, update), state), None

        return jax.lax.scan(body, (params, state), None, length=2)[0]

    gc.freeze()  # Leaks are looked for among all objects that are not frozen.
    with jax.checking_leaks():
        params, state = train(PARAMS, tx.init(PARAMS))
    before = len(traces)
    params, state = train(params, state)
    assert len(traces) <= before + 1  # Leak checking has a cache of its own.
    train(params, state)
    assert len(traces) <= before + 1
    assert state.step == 4
    assert np.all(np.isfinite(params["k"]))


@SOME
def test_fault_24_counters_saturate(geometry):
    top = jnp.int32(np.iinfo(np.int32).max)
    tx = geometry(lambda count: jnp.where(count >= 0, 0.5, -1.0))
    state = tx.init(PARAMS)._replace(count=top, skipped=top)
    eps, state = ascend(tx, state=state)
    assert_equal(eps, ascend(geometry(0.5))[0])
    assert state.count == top
    _, state = ascend(tx, zeros(PARAMS), state=state)
    assert state.skipped == top
    optimizer = sharpness_aware(optax.sgd(0.1), tx)
    _, state = step(optimizer, optimizer.init(PARAMS)._replace(step=top))
    assert state.step == top
    f = value_and_grad(lambda w, b: w**2, tx)
    _, _, state = f(jnp.float32(1.0), f.init(jnp.float32(1.0))._replace(step=top), None)
    assert state.step == top


def mean_quartic(params, batch):
    return jnp.mean((batch @ params["k"] + params["b"][None]) ** 4)


def test_fault_25_micro_batches_are_the_big_batch_where_they_should_be():
    @functools.partial(jax.jit, static_argnums=2)
    def run(rho, batch, micro_batches=None):
        ball = GEOMETRIES["average"](rho)
        f = value_and_grad(mean_quartic, ball, micro_batches=micro_batches)
        return f(PARAMS, f.init(PARAMS), batch)

    # Without a perturbation; or if all micro-batches are alike.
    for rho, batch in ((0.0, X), (0.5, jnp.repeat(X[:2], 2, axis=0))):
        value, grads, state = run(rho, batch, 2)
        expected_value, expected, expected_state = run(rho, batch)
        np.testing.assert_allclose(value, expected_value, rtol=1e-6)
        for leaf in PARAMS:
            np.testing.assert_allclose(grads[leaf], expected[leaf], rtol=2e-6)
        assert state.step == expected_state.step == 1
        assert state.perturbation.count == expected_state.perturbation.count == 1
    # Else each has a perturbation of its own, and the gradients are averaged.
    _, grads, _ = run(0.5, X, 2)
    halves = [run(0.5, half)[1] for half in (X[::2], X[1::2])]
    _, big, _ = run(0.5, X)
    for leaf in PARAMS:
        mean = (halves[0][leaf] + halves[1][leaf]) / 2
        np.testing.assert_allclose(grads[leaf], mean, rtol=2e-6)
        assert not np.allclose(grads[leaf], big[leaf], rtol=1e-2)


def test_fault_25_multi_steps_of_the_oracle_is_micro_batches():
    f = value_and_grad(mean_quartic, euclidean_ball(0.5))
    multi = optax.MultiSteps(optax.sgd(1.0), 2)

    @jax.jit
    def accumulate(state, multi_state, half):
        _, grads, state = f(PARAMS, state, half)
        update, multi_state = multi.update(grads, multi_state, PARAMS)
        return update, state, multi_state

    state, multi_state = f.init(PARAMS), multi.init(PARAMS)
    nothing, state, multi_state = accumulate(state, multi_state, X[::2])
    assert_zero(nothing)
    update, state, multi_state = accumulate(state, multi_state, X[1::2])
    assert state.step == 2
    f = value_and_grad(mean_quartic, euclidean_ball(0.5), micro_batches=2)
    _, expected, _ = jax.jit(f)(PARAMS, f.init(PARAMS), X)
    for leaf in PARAMS:
        np.testing.assert_allclose(update[leaf], -expected[leaf], rtol=1e-5)


@pytest.mark.long
def test_fault_25_which_diagonals_are_means_over_micro_batches():
    average = {
        name: optax.chain(estimator, optax.ema(0.5))
        for name, estimator in (
            ("empirical", fisher_empirical(logits, categorical)),
            ("exact", fisher_exact(logits, categorical)),
            ("squared", squared_gradient()),
        )
    }

    def update(grads, state, params, **extra):
        for name, tx in average.items():
            diagonal, new = tx.update(grads, state[name], params, **extra)
            state = state | {name: new}
        return diagonal, state

    def init(params):
        return {name: tx.init(params) for name, tx in average.items()}

    ellipsoid = fisher_ellipsoid(
        0.5, optax.GradientTransformationExtraArgs(init, update)
    )
    loss = negative_log_likelihood(logits, categorical)

    def averages(micro_batches):
        f = value_and_grad(loss, ellipsoid, micro_batches=micro_batches)
        _, _, state = jax.jit(f)(PARAMS, f.init(PARAMS), (X, Y))
        return {
            n: oracles.flat(s[1].ema) for n, s in state.perturbation.operator.items()
        }

    small, big = averages(2), averages(None)
    agree = [name for name in big if np.allclose(small[name], big[name], rtol=1e-5)]
    assert agree == ["empirical", "exact"]


def test_fault_29_exception_between_the_passes():
    tx = sam(optax.sgd(0.1), 0.5)
    state = tx.init(PARAMS)
    before = jax.tree.map(np.array, (PARAMS, state))

    def explode(params):
        raise RuntimeError("between the passes")

    with pytest.raises(RuntimeError, match="between the passes"):
        step(tx, state, grads=GRADS, grad_fn=explode)
    assert_equal((PARAMS, state), before)
    # And the next step is as if nothing had happened.
    assert_equal(step(tx, state), step(tx))


def draws(name, steps=40, examples=32):
    """Returns `run(key)`: the diagonals of updates, (steps, examples), and all keys.

    The output for an example depends on a parameter of its own, to the second order:
    what was drawn for an example can be read off its entry of the diagonal.
    """

    def model(w, x):
        h = (x @ w)[:, None] ** 2
        return jnp.concatenate([h, h / 2], axis=1)

    w, batch = jnp.full(examples, 0.5), (jnp.eye(examples), None)

    @jax.jit
    def run(key):
        options = ESTIMATORS[name].keywords | {"key": key}
        estimator = ESTIMATORS[name].func(model, gaussian(), **options)

        def body(state, _):
            diagonal, new = estimator.update(None, state, w, batch=batch)
            return new, (diagonal, state.key)

        return jax.lax.scan(body, estimator.init(w), length=steps)[1]

    return run


@pytest.mark.short("i1", "gnb")
@pytest.mark.parametrize("name", SAMPLED)
def test_fault_30_seeds_repeat_and_keys_are_never_reused(name):
    run = draws(name)
    diagonals, keys = run(jax.random.key(3))
    assert_equal((diagonals, keys), run(jax.random.key(3)))
    assert not np.array_equal(diagonals, run(jax.random.key(4))[0])
    assert len(np.unique(keys, axis=0)) == len(keys)
    if name == "hutchinson":
        # Two signs an example tell two values apart, but 32 of them not by chance.
        assert len(np.unique(diagonals, axis=0)) == len(diagonals)
        assert np.all(np.std(diagonals, axis=1) > 0)
    else:
        # Normal noise: no value comes twice, within a batch or between updates.
        assert len(np.unique(diagonals)) == diagonals.size


@pytest.mark.short("average")
@SOME
def test_fault_31_numpy_and_python_inputs(geometry):
    params = {"k": np.float32([[1.0, -2.0]]), "s": 2.0, "d": np.float64(3.0)}
    grads = {"k": np.float32([[0.5, 1.0]]), "s": -1.0, "d": np.float64(0.5)}
    arrays = [
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t) for t in (grads, params)
    ]
    tx = geometry(0.5)
    eps, state = ascend(tx, grads, params)
    expected, expected_state = ascend(tx, *arrays)
    assert_equal((eps, state), (expected, expected_state))
    optimizer = sharpness_aware(optax.sgd(0.5), tx)
    update, _ = step(optimizer, params=params, grads=grads)
    expected, _ = step(optimizer, params=arrays[1], grads=arrays[0])
    assert_equal(update, expected)
    f = value_and_grad(lambda p, b: sum(jnp.sum(w**4) for w in p.values()) / 4, tx)
    _, result, _ = f(params, f.init(params), None)
    _, expected, _ = f(arrays[1], f.init(params), None)
    assert_equal(result, expected)


@pytest.mark.short("bfloat16")
@pytest.mark.parametrize("scalar", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_fault_31_numpy_scalars(scalar):
    params = {"s": scalar(3.0), "v": np.full(2, 2.0, np.float32)}
    eps, _ = ascend(euclidean_ball(0.5), params, params)
    expected, _ = ascend(euclidean_ball(0.5), *[jax.tree.map(jnp.asarray, params)] * 2)
    np.testing.assert_allclose(eps["s"], 1.5 / np.sqrt(17), rtol=1e-6)
    assert_equal(eps, expected)
    f = value_and_grad(lambda p, b: 1.0 * p["s"] ** 2, euclidean_ball(0.5))
    _, grads, _ = f(params, f.init(params), None)
    np.testing.assert_allclose(np.float32(grads["s"]), 7.0, rtol=1e-2)


def test_fault_31_no_retrace_for_numpy_and_python_inputs():
    tx, traces = sam(optax.sgd(0.1)), []

    @jax.jit
    def train(params, state):
        traces.append(None)
        return step(tx, state, params)

    state = tx.init({"w": np.ones(3, np.float32)})
    for params in (np.ones(3, np.float32), jnp.ones(3), jnp.zeros(3)):
        _, state = train({"w": params}, state)
    assert len(traces) == 1


@SOME
@pytest.mark.parametrize("factor", [1.0, 0.0, 1e-30])
def test_fault_32_debug_nans(geometry, factor):
    # Nothing on the way to a finite result may be NaN.
    grads = jax.tree.map(lambda g: factor * g, GRADS)
    with jax.debug_nans(True):
        eps, _ = ascend(geometry(0.5), grads)
        step(sharpness_aware(optax.sgd(0.1), geometry(0.5)), grads=grads)
    assert np.all(np.isfinite(eps["k"]))


@pytest.mark.long
def test_fault_32_estimators_in_float64(x64):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (PARAMS, X))
    params, x = jax.tree.map(jnp.asarray, wide)
    weights = jnp.array([1.0, 0.5, 0.0, 2.0])
    with jax.debug_nans(True):
        diagonals, states = all_estimates(logits, categorical)(params, (x, Y), weights)
    assert {d.dtype for d in jax.tree.leaves(diagonals)} == {jnp.dtype("float64")}
    assert states["i1"].standard_error["k"].dtype == jnp.float64
    for name, expected in exact_and_empirical(logits, params, x, Y, weights).items():
        for leaf in PARAMS:
            np.testing.assert_allclose(
                diagonals[name][leaf], expected[leaf], rtol=1e-12
            )


def test_fault_32_float32_leaves_stay_float32_in_x64(x64):
    params = {
        "k": PARAMS["k"].astype(jnp.float32),
        "b": PARAMS["b"].astype(jnp.float64),
    }
    estimates = jax.eval_shape(
        all_estimates(logits, categorical), params, (X, Y), jnp.ones(4)
    )
    for name, diagonal in estimates[0].items():
        dtypes = {leaf: str(d.dtype) for leaf, d in diagonal.items()}
        assert dtypes == {"k": "float32", "b": "float64"}, name
    error = estimates[1]["i1"].standard_error
    assert (error["k"].dtype, error["b"].dtype) == (jnp.float32, jnp.float64)


@pytest.mark.long
def test_fault_32_leaves_that_hold_no_reals_give_float32_in_x64(x64):
    params = {"k": PARAMS["k"].astype(jnp.float32), "n": jnp.arange(3)}
    drawn = fisher_i1(
        lambda params, x: jnp.tanh(x @ params["k"]),
        categorical,
        key=jax.random.key(0),
        num_samples=2,
        standard_error=True,
    )
    for estimator in (squared_gradient(), drawn, refresh_every(2, drawn)):
        initial = estimator.init(params)
        found = estimator.update(params, initial, params, batch=(X, Y))
        # What counts labels and draws is no leaf's.
        floats = {
            x.dtype
            for x in jax.tree.leaves((initial, found))
            if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim
        }
        assert floats == {jnp.dtype("float32")}


def test_fault_32_engine_under_debug_nans():
    # Op by op: no intermediate value may be NaN, even where it would be left out.
    def loss(params, x):
        return jnp.sum(logits(params, x[None]) ** 2)

    with jax.debug_nans(True):
        for weights in (None, jnp.zeros(4), jnp.array([0.0, 1.0, 2.0, 0.0])):
            loss_power_sums(loss, PARAMS, X, powers=(1, 2, 4), weights=weights)

"""Faults and bad inputs, numbered as in the list that the library was designed by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from test_incumbent import cubic, length, PARAMS, step

from fsam_optax import (
    adaptive_ellipsoid,
    euclidean_ball,
    fisher_ellipsoid,
    given,
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


FISHER = [GEOMETRIES["fisher"], GEOMETRIES["average"]]


@pytest.fixture(params=GEOMETRIES)
def geometry(request):
    return GEOMETRIES[request.param]


# For what does not depend on the geometry, or costs a compilation for each.
SOME = pytest.mark.parametrize(
    "geometry", ["euclidean", "element", "average"], indirect=True
)


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
    assert all(m.dtype == jnp.float32 for m in metrics)


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
    np.testing.assert_allclose(state.metrics, expected_state.metrics, rtol=1e-6)


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

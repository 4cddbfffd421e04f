"""What every public transformation must do: listed once, each inherits all tests."""

import collections
import functools
import inspect
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax


def cubic(params):
    """The gradient of sum(w^4) / 4."""
    return jax.tree.map(lambda w: w**3, params)


def oracle(**kwargs):
    """The gradient oracle, in the clothes of a transformation."""

    def loss(params, batch):
        del batch
        return sum(jnp.sum(w**4) for w in jax.tree.leaves(params)) / 4

    f = fsam_optax.value_and_grad(loss, fsam_optax.euclidean_ball(0.1), **kwargs)

    def update(updates, state, params=None, **extra):
        del updates
        _, grads, state = f(params, state, jnp.ones([4]), extra_args=extra)
        return grads, state

    return optax.GradientTransformationExtraArgs(f.init, update)


def compiled(factory, **kwargs):
    """The transformation, jitted: where there is control flow, eager calls compile."""
    tx = factory(**kwargs)
    return optax.GradientTransformationExtraArgs(
        tx.init, jax.jit(tx.update, static_argnames="grad_fn")
    )


Case = collections.namedtuple("Case", ["factory", "kwargs", "kind"])

ADAM = {"base": optax.adam(0.1)}
SGD = {"base": optax.sgd(0.1, momentum=0.9)}
BALL = {"perturbation": fsam_optax.euclidean_ball(0.1)}
DIAGONAL = {"estimator": fsam_optax.given()}
AVERAGE = {"estimator": optax.chain(fsam_optax.squared_gradient(), optax.ema(0.9))}

CASES = {
    "perturbation": Case(fsam_optax.perturbation, {"rho": 0.1}, "eps"),
    "euclidean_ball": Case(fsam_optax.euclidean_ball, {"rho": 0.1}, "eps"),
    "euclidean_ball_3": Case(fsam_optax.euclidean_ball, {"rho": 0.1, "ord": 3}, "eps"),
    "adaptive_ellipsoid": Case(fsam_optax.adaptive_ellipsoid, {"rho": 0.1}, "eps"),
    "adaptive_ellipsoid_filter": Case(
        fsam_optax.adaptive_ellipsoid, {"rho": 0.1, "scope": "filter"}, "eps"
    ),
    "fisher_ellipsoid": Case(
        fsam_optax.fisher_ellipsoid, {"rho": 0.1, **DIAGONAL}, "eps"
    ),
    "fisher_ellipsoid_average": Case(
        fsam_optax.fisher_ellipsoid, {"rho": 0.1, **AVERAGE, "damping": 0.1}, "eps"
    ),
    "squared_gradient": Case(fsam_optax.squared_gradient, {}, "diagonal"),
    "given": Case(fsam_optax.given, {}, "diagonal"),
    "sharpness_aware": Case(fsam_optax.sharpness_aware, {**SGD, **BALL}, "step"),
    "sharpness_aware_every": Case(
        fsam_optax.sharpness_aware, {**SGD, **BALL, "every": 2}, "step"
    ),
    "sam": Case(fsam_optax.sam, {**SGD, "rho": 0.1}, "step"),
    "asam": Case(fsam_optax.asam, {**SGD, "rho": 0.1}, "step"),
    "fisher_sam": Case(fsam_optax.fisher_sam, {**ADAM, "rho": 0.1}, "step"),
    "value_and_grad": Case(oracle, {}, "step"),
    "value_and_grad_micro": Case(oracle, {"micro_batches": 2, "every": 2}, "step"),
}

PARAMS = {"k": jnp.array([[1.0, -2.0], [0.5, 1.5]]), "b": jnp.array([0.3, -0.7])}
GRADS = cubic(PARAMS)
FISHER = {"k": jnp.array([[1.0, 2.0], [0.5, 0.0]]), "b": jnp.array([0.1, 0.7])}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@functools.cache
def transformation(name):
    factory, kwargs, _ = CASES[name]
    has_control_flow = {"every", "micro_batches"} & kwargs.keys()
    return (compiled if has_control_flow else lambda f, **kw: f(**kw))(
        factory, **kwargs
    )


@pytest.fixture
def tx(request, case):
    return transformation(request.node.callspec.params["case"])


def update(tx, state=None, params=PARAMS, grads=GRADS, **extra):
    state = tx.init(params) if state is None else state
    extra = {"grad_fn": cubic, "fisher": FISHER, **extra}
    return optax.with_extra_args_support(tx).update(grads, state, params, **extra)


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def assert_close(tree, expected, rtol=1e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol)
    jax.tree.map(close, tree, expected)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def test_every_public_transformation_is_listed():
    listed = {case.factory for case in CASES.values()}
    for name, value in vars(fsam_optax).items():
        module = getattr(value, "__module__", "")
        if not inspect.isfunction(value) or module not in CORE:
            continue
        if value is not fsam_optax.value_and_grad:
            assert value in listed, name


CORE = {
    f"fsam_optax.{module}"
    for module in (
        "_aliases",
        "_estimators",
        "_geometries",
        "_perturbation",
        "_sharpness_aware",
        "_value_and_grad",
    )
}


def test_unknown_extra_args_are_accepted(tx):
    assert_equal(update(tx, value=1.0, nonsense=2), update(tx))


def test_one_trace_and_the_state_can_be_donated_right_after_init(tx):
    traces = []

    def step(params, grads, state):
        traces.append(None)
        return update(tx, state, params, grads)

    step = jax.jit(step, donate_argnums=2)
    state, expected_state = tx.init(PARAMS), tx.init(PARAMS)
    leaves = jax.tree.leaves(jax.tree.map(jnp.asarray, state))
    addresses = {x.unsafe_buffer_pointer() for x in leaves}
    assert len(addresses) == len(leaves)
    for _ in range(3):
        result, state = step(PARAMS, GRADS, state)
        expected, expected_state = update(tx, expected_state)
        assert_close((result, state), (expected, expected_state))
    # NumPy arrays of the same type and shape are no reason to trace again.
    step(*jax.tree.map(np.asarray, (PARAMS, GRADS)), state)
    assert len(traces) == 1


def test_ensembles_of_scans_of_conds_agree_with_loops(tx):
    def body(carry, scale):
        params, state = carry
        grads = jax.tree.map(lambda g: scale * g, cubic(params))
        result, state = update(tx, state, params, grads)
        return (params, state), result

    def skip(carry, scale):
        del scale
        params, state = carry
        like = jax.eval_shape(lambda: update(tx, state, params, cubic(params))[0])
        return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def step(carry, scale):
        return jax.lax.cond(scale > 0, body, skip, carry, scale)

    def stack(*trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    scales = [1.0, -1.0, 3.0]
    members = [jax.tree.map(lambda w, c=c: c * w, PARAMS) for c in (1.0, 0.0, 0.5)]
    members = [(params, tx.init(params)) for params in members]
    ensemble = jax.vmap(lambda carry: jax.lax.scan(step, carry, jnp.array(scales)))
    carries, results = jax.jit(ensemble)(stack(*members))
    for i, carry in enumerate(members):
        for j, scale in enumerate(scales):
            carry, expected = (body if scale > 0 else skip)(carry, scale)
            assert_close(jax.tree.map(lambda x, i=i, j=j: x[i, j], results), expected)
        assert_close(jax.tree.map(lambda x, i=i: x[i], carries), carry)


def test_tree_map_params(tx):
    state = tx.init(PARAMS)
    assert_equal(optax.tree.map_params(tx, lambda x: x, state), state)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    with_momentum = [
        x.shape for x in jax.tree.leaves(mapped) if np.shape(x) and np.all(x == 1)
    ]
    has_params = [x.shape for x in jax.tree.leaves(state) if np.shape(x)]
    assert with_momentum == has_params


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_are_kept_and_strong(x64, case, dtype):
    tx = case.factory(**case.kwargs)
    params, grads, fisher = (
        jax.tree.map(lambda x: x.astype(dtype), tree)
        for tree in (PARAMS, GRADS, FISHER)
    )
    state = jax.eval_shape(tx.init, params)
    result, new_state = jax.eval_shape(
        lambda state: update(tx, state, params, grads, fisher=fisher), state
    )
    same = case.kind == "step" or case.factory is fsam_optax.given
    kept = jnp.dtype(dtype) if same else jnp.promote_types(dtype, jnp.float32)
    assert types(result) == {n: (w.shape, kept, False) for n, w in PARAMS.items()}
    # `optax.ema` takes the dtype of the parameters at first, then that of F.
    if case.kwargs.get("estimator") is not AVERAGE["estimator"]:
        assert types(new_state) == types(state)
    assert not any(x.weak_type for x in jax.tree.leaves(new_state))


@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if "rho" in case.kwargs]
)
def test_inject_hyperparams_with_a_schedule_of_rho(name):
    factory, kwargs, _ = CASES[name]

    def schedule(count):
        return 0.1 * (count + 1)

    static = [k for k in inspect.signature(factory).parameters if k == "filter_axis"]
    injected = optax.inject_hyperparams(factory, static_args=static)
    injected = injected(**{**kwargs, "rho": schedule})
    direct = factory(**{**kwargs, "rho": schedule})
    traces = []

    @jax.jit
    def step(state):
        traces.append(None)
        return update(injected, state)

    state, direct_state = injected.init(PARAMS), direct.init(PARAMS)
    for i in range(3):
        result, state = step(state)
        expected, direct_state = update(direct, direct_state)
        assert_close(result, expected, rtol=2e-6)
        np.testing.assert_allclose(state.hyperparams["rho"], 0.1 * (i + 1), rtol=1e-6)
    assert len(traces) == 1


def test_multi_steps_hands_over_the_mean_gradient(case, tx):
    if case.factory is oracle:
        pytest.skip("the oracle makes gradients: it goes before MultiSteps")
    multi = optax.MultiSteps(tx, 2)

    @jax.jit
    def step(state, scale):
        grads = jax.tree.map(lambda g: scale * g, GRADS)
        return multi.update(grads, state, PARAMS, grad_fn=cubic, fisher=FISHER)

    state = multi.init(PARAMS)
    for scale in (1.0, 3.0):
        result, state = step(state, scale)
    expected, _ = update(tx, grads=jax.tree.map(lambda g: 2 * g, GRADS))
    assert_close(result, expected)


@pytest.mark.parametrize("front_end", ["sharpness_aware", "value_and_grad"])
def test_accumulated_gradient_is_the_mean_2_and_not_the_sum_or_the_last(front_end):
    multi = optax.MultiSteps(optax.sgd(1.0), 2)
    ball = fsam_optax.euclidean_ball(0.1)
    tx = fsam_optax.sharpness_aware(multi.gradient_transformation(), ball)
    f = fsam_optax.value_and_grad(lambda w, b: jnp.mean(b * w), ball)
    w = jnp.float32(0.0)
    states = (tx.init(w), f.init(w), multi.init(w))
    for slope in (1.0, 3.0):
        batch = jnp.full(4, slope)
        if front_end == "sharpness_aware":
            update, state = tx.update(
                jnp.float32(slope), states[0], w, grad_fn=lambda p, s=slope: p * 0 + s
            )
            states = (state, *states[1:])
        else:
            _, grads, ascent = f(w, states[1], batch)
            update, multi_state = multi.update(grads, states[2], w)
            states = (states[0], ascent, multi_state)
        w = optax.apply_updates(w, update)
    assert w == -2.0


def test_chain_on_either_side(tx):
    outside = optax.chain(tx, optax.scale(2.0))
    expected = jax.tree.map(lambda x: 2 * x, update(tx)[0])
    assert_equal(update(outside)[0], expected)
    inside = optax.chain(optax.scale(2.0), tx)
    doubled = jax.tree.map(lambda g: 2 * g, GRADS)
    assert_equal(update(inside)[0], update(tx, grads=doubled)[0])


STEPS = [name for name, case in CASES.items() if case.kind == "step"]


@pytest.mark.parametrize("name", STEPS)
def test_apply_if_finite(name):
    tx = transformation(name)
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)

    @jax.jit
    def step(state, factor):
        def scaled(params):
            return jax.tree.map(lambda g: factor * g, cubic(params))

        params = jax.tree.map(lambda w: factor * w, PARAMS)
        return update(guarded, state, params, scaled(PARAMS), grad_fn=scaled)

    result, state = step(guarded.init(PARAMS), 1.0)
    assert_close((result, state.inner_state), update(tx))
    result, new_state = step(state, jnp.nan)
    assert_equal(result, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(new_state.inner_state, state.inner_state)
    assert new_state.total_notfinite == 1


@pytest.mark.parametrize("how", ["pickle", "flax"])
def test_serialised_state_resumes_bit_for_bit(tx, how):
    _, state = update(tx)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(jax.device_get(state)))
    else:
        stored = flax.serialization.to_bytes(state)
        loaded = flax.serialization.from_bytes(tx.init(PARAMS), stored)
    assert_equal(loaded, state)
    assert_equal(update(tx, loaded), update(tx, state))


@pytest.mark.parametrize("name", STEPS)
def test_descends(name):
    tx = transformation(name)
    if CASES[name].factory is oracle:
        tx = optax.chain(tx, optax.sgd(0.1))

    @jax.jit
    def train(params, state):
        def body(_, carry):
            params, state = carry
            updates, state = update(tx, state, params, cubic(params))
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 60, body, (params, state))

    params, _ = train(PARAMS, tx.init(PARAMS))
    assert max(float(jnp.max(jnp.abs(w))) for w in params.values()) < 0.5

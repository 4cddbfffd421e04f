"""What every public transformation must do: listed once, each inherits all tests."""

import collections
import functools
import inspect
import logging
import pickle
import re

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


def model(params, x):
    return jnp.tanh(x @ params["k"] + params["b"][None])


Case = collections.namedtuple("Case", ["factory", "kwargs", "kind"])

ADAM = {"base": optax.adam(0.1)}
SGD = {"base": optax.sgd(0.1, momentum=0.9)}
BALL = {"perturbation": fsam_optax.euclidean_ball(0.1)}
DIAGONAL = {"estimator": fsam_optax.given()}
AVERAGE = {"estimator": optax.chain(fsam_optax.squared_gradient(), optax.ema(0.9))}
MODEL = {"model": model, "likelihood": fsam_optax.categorical}
SAMPLED = {**MODEL, "key": jax.random.key(7)}
ERROR = {**SAMPLED, "num_samples": 2, "standard_error": True}
EXACT = {"estimator": fsam_optax.fisher_exact(**MODEL)}
DRAWN = {"estimator": fsam_optax.fisher_i1(**SAMPLED)}
BAYES = {
    "learning_rate": 0.1,
    "rho": 0.1,
    "num_data": 1e4,
    "key": jax.random.key(7),
}
GROUPS = {"a": fsam_optax.fisher_i1(**ERROR), "b": fsam_optax.fisher_exact(**MODEL)}

# What each makes of a gradient: a perturbation, a diagonal F, a gradient, a step, or of
# two gradients a descent.
CASES = {
    "perturbation": Case(fsam_optax.perturbation, {"rho": 0.1}, "eps"),
    "euclidean_ball": Case(fsam_optax.euclidean_ball, {"rho": 0.1}, "eps"),
    "euclidean_ball_3": Case(fsam_optax.euclidean_ball, {"rho": 0.1, "ord": 3}, "eps"),
    "adaptive_ellipsoid": Case(fsam_optax.adaptive_ellipsoid, {"rho": 0.1}, "eps"),
    "adaptive_ellipsoid_filter": Case(
        fsam_optax.adaptive_ellipsoid, {"rho": 0.1, "scope": "filter"}, "eps"
    ),
    "euclidean_ball_per_leaf": Case(
        fsam_optax.euclidean_ball, {"rho": 0.1, "per_leaf": True}, "eps"
    ),
    "adaptive_ellipsoid_layers": Case(
        fsam_optax.adaptive_ellipsoid,
        {"rho": 0.1, "scope": "layer", "layer_axis": 0},
        "eps",
    ),
    "fisher_ellipsoid": Case(
        fsam_optax.fisher_ellipsoid, {"rho": 0.1, **DIAGONAL}, "eps"
    ),
    "fisher_ellipsoid_average": Case(
        fsam_optax.fisher_ellipsoid, {"rho": 0.1, **AVERAGE, "damping": 0.1}, "eps"
    ),
    "friendly": Case(fsam_optax.friendly, {"sigma": 0.5, "decay": 0.9}, "eps"),
    "averaged": Case(fsam_optax.averaged, {"decay": 0.9}, "eps"),
    "multi_step": Case(fsam_optax.multi_step, {"steps": 3, **BALL}, "eps"),
    "squared_gradient": Case(fsam_optax.squared_gradient, {}, "diagonal"),
    "given": Case(fsam_optax.given, {}, "diagonal"),
    "fisher_exact": Case(fsam_optax.fisher_exact, MODEL, "diagonal"),
    "fisher_empirical": Case(fsam_optax.fisher_empirical, MODEL, "diagonal"),
    "fisher_i1": Case(fsam_optax.fisher_i1, ERROR, "diagonal"),
    "fisher_hutchinson": Case(fsam_optax.fisher_hutchinson, SAMPLED, "diagonal"),
    "fisher_gnb": Case(fsam_optax.fisher_gnb, SAMPLED, "diagonal"),
    "fisher_i2": Case(fsam_optax.fisher_i2, SAMPLED, "diagonal"),
    "by_group": Case(
        fsam_optax.by_group,
        {"labels": {"k": "a", "b": "b"}, "estimators": GROUPS},
        "diagonal",
    ),
    "refresh_every": Case(fsam_optax.refresh_every, {"k": 2, **EXACT}, "diagonal"),
    "scale_by_inverse_fisher": Case(
        fsam_optax.scale_by_inverse_fisher, {**EXACT, "damping": 1.0}, "gradient"
    ),
    "scale_by_inverse_dense": Case(
        fsam_optax.scale_by_inverse_dense,
        {
            "matrix_fn": functools.partial(fsam_optax.dense_fisher, *MODEL.values()),
            "damping": 1.0,
        },
        "gradient",
    ),
    "sharpness_aware": Case(fsam_optax.sharpness_aware, {**SGD, **BALL}, "step"),
    "sharpness_aware_every": Case(
        fsam_optax.sharpness_aware, {**SGD, **BALL, "every": 2}, "step"
    ),
    "sam": Case(fsam_optax.sam, {**SGD, "rho": 0.1}, "step"),
    "asam": Case(fsam_optax.asam, {**SGD, "rho": 0.1}, "step"),
    "fisher_sam": Case(fsam_optax.fisher_sam, {**ADAM, "rho": 0.1}, "step"),
    "fisher_sam_drawn": Case(
        fsam_optax.fisher_sam, {**ADAM, "rho": 0.1, **DRAWN}, "step"
    ),
    "surrogate_gap": Case(fsam_optax.surrogate_gap, {"alpha": 0.5}, "descent"),
    "extrapolate": Case(fsam_optax.extrapolate, {"alpha": 2.0}, "descent"),
    "reuse": Case(fsam_optax.reuse, {"alpha": 0.5}, "descent"),
    "displaced": Case(fsam_optax.displaced, {**SGD, **BALL}, "step"),
    "msam": Case(fsam_optax.msam, {**ADAM, "rho": 0.1}, "step"),
    "friendly_sam": Case(fsam_optax.friendly_sam, {**SGD, "rho": 0.1}, "step"),
    "gsam": Case(fsam_optax.gsam, {**SGD, "rho": 0.1}, "step"),
    "wsam": Case(fsam_optax.wsam, {**SGD, "rho": 0.1, "gamma": 0.7}, "step"),
    "looksam": Case(fsam_optax.looksam, {**SGD, "rho": 0.1, "every": 2}, "step"),
    "bsam": Case(fsam_optax.bsam, BAYES, "step"),
    "value_and_grad": Case(oracle, {}, "gradient"),
    "value_and_grad_lagged": Case(oracle, {"lagged": True}, "gradient"),
    "value_and_grad_micro": Case(oracle, {"micro_batches": 2, "every": 2}, "gradient"),
}

PARAMS = {"k": jnp.array([[1.0, -2.0], [0.5, 1.5]]), "b": jnp.array([0.3, -0.7])}
GRADS = cubic(PARAMS)
FISHER = {"k": jnp.array([[1.0, 2.0], [0.5, 0.0]]), "b": jnp.array([0.1, 0.7])}
BATCH = (
    jnp.array([[0.5, -1.0], [1.5, 0.2], [-0.3, 0.8], [0.1, 0.4]]),
    jnp.array([0, 1, 1, 0]),
)
# All that any of them may ask for.
EXTRA = {
    "grad_fn": cubic,
    "fisher": FISHER,
    "batch": BATCH,
    "clean_grads": jax.tree.map(lambda g: g + 1, GRADS),
    "eps": GRADS,
}


# Wiring of what is listed above and inherits the tests of its own; of these it takes
# those of types alone.
ALIASES = {"perturbation", "sam", "asam", "fisher_sam", "gsam", "wsam", "msam"}
PATHS = [name for name in CASES if name not in ALIASES]


# What the others do these do too.
REPRESENTED = {
    "euclidean_ball",
    "adaptive_ellipsoid",
    "adaptive_ellipsoid_filter",
    "fisher_ellipsoid",
    "squared_gradient",
    "given",
    "fisher_exact",
    "fisher_empirical",
    "fisher_hutchinson",
    "fisher_gnb",
    "sharpness_aware",
    "fisher_sam_drawn",
    "extrapolate",
    "friendly_sam",
    "value_and_grad",
}


# Of the types, which cost little, these take a test of their own.
TYPES_OF_THEIR_OWN = {
    "fisher_exact",
    "fisher_empirical",
    "sharpness_aware",
    "value_and_grad",
}


def by_name(names, represented=REPRESENTED):
    return [
        pytest.param(name, marks=[pytest.mark.long] if name in represented else [])
        for name in names
    ]


@pytest.fixture(params=by_name(PATHS))
def case(request):
    return CASES[request.param]


def jitted(tx):
    """Eager calls compile each operation; what is jitted is traced once for all."""
    update = jax.jit(
        optax.with_extra_args_support(tx).update, static_argnames="grad_fn"
    )
    return optax.GradientTransformationExtraArgs(tx.init, update)


@functools.cache
def transformation(name):
    factory, kwargs, _ = CASES[name]
    return jitted(factory(**kwargs))


@pytest.fixture
def tx(request, case):
    return transformation(request.node.callspec.params["case"])


def update(tx, state=None, params=PARAMS, grads=GRADS, **extra):
    state = tx.init(params) if state is None else state
    tx = optax.with_extra_args_support(tx)
    return tx.update(grads, state, params, **{**EXTRA, **extra})


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def assert_close(tree, expected, rtol=1e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol)
    jax.tree.map(close, tree, expected)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def returned(name, value):
    """Returns what a public function is annotated to return."""
    annotation = inspect.signature(value, eval_str=True).return_annotation
    assert annotation is not inspect.Signature.empty, name
    if isinstance(annotation, str):
        annotation = eval(annotation, inspect.unwrap(value).__globals__)
    return annotation if isinstance(annotation, type) else object


def test_every_public_transformation_is_listed():
    listed = {case.factory for case in CASES.values()} - {oracle}
    listed.add(fsam_optax.value_and_grad)
    made = (optax.GradientTransformation, fsam_optax.ValueAndGrad)
    public = {
        name: value
        for name, value in vars(fsam_optax).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    found = {n for n, value in public.items() if issubclass(returned(n, value), made)}
    assert found == {value.__name__ for value in listed}
    # Nothing else can be called, but data types.
    others = {
        name
        for name, value in vars(fsam_optax).items()
        if callable(value) and not name.startswith("_") and not inspect.isclass(value)
    }
    assert others == public.keys()


# One of each kind: all are given arguments of `EXTRA` that they do not know.
@pytest.mark.short(
    "fisher_ellipsoid_average",
    "by_group",
    "scale_by_inverse_fisher",
    "displaced",
    "reuse",
    "value_and_grad_micro",
)
def test_unknown_extra_args_change_nothing(tx):
    def program(**extra):
        jaxpr = jax.make_jaxpr(lambda state: update(tx, state, **extra))
        return re.sub("0x[0-9a-f]+", "", str(jaxpr(tx.init(PARAMS)).jaxpr))

    assert program(value=None, nonsense={}) == program()


@pytest.mark.short("looksam", "refresh_every", "displaced")
def test_100_donated_steps_are_one_trace(tx, caplog):
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def step(params, grads, state):
        traces.append(None)
        result, state = update(tx, state, params, grads)
        moved = jax.tree.map(lambda w, x: w - 1e-3 * x.astype(w.dtype), params, result)
        return moved, result, state

    params, state = jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)
    expected_params, expected_state = PARAMS, tx.init(PARAMS)
    leaves = jax.tree.leaves(jax.tree.map(jnp.asarray, state))
    addresses = {x.unsafe_buffer_pointer() for x in leaves}
    assert len(addresses) == len(leaves)
    for i in range(100):
        donated = params
        # Every step's messages on tracing and compilation, by any function.
        with jax.log_compiles(), caplog.at_level(logging.DEBUG):
            caplog.clear()
            params, result, state = step(params, GRADS, state)
        assert bool(caplog.records) == (i == 0), caplog.text
        assert all(x.is_deleted() for x in donated.values())
        if i < 3:
            expected, expected_state = update(tx, expected_state, expected_params)
            expected_params = jax.tree.map(
                lambda w, x: w - 1e-3 * x, expected_params, expected
            )
            assert_close((result, state), (expected, expected_state), rtol=2e-6)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params, result)))
    # NumPy arrays of the same type and shape are no reason to trace again.
    step(*jax.tree.map(np.asarray, (PARAMS, GRADS)), state)
    assert len(traces) == 1


def test_a_state_from_jit_can_be_donated(tx):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(jnp.zeros_like, state)

    assert_equal(step(jax.jit(tx.init)(PARAMS)), step(tx.init(PARAMS)))


@pytest.mark.short("fisher_ellipsoid_average", "value_and_grad_micro")
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
    carries, results = jax.device_get(jax.jit(ensemble)(stack(*members)))
    for i, carry in enumerate(members):
        for j, scale in enumerate(scales):
            carry, expected = (body if scale > 0 else skip)(carry, scale)
            assert_close(jax.tree.map(lambda x, i=i, j=j: x[i, j], results), expected)
        assert_close(jax.tree.map(lambda x, i=i: x[i], carries), carry)


def test_tree_map_params(tx):
    state = tx.init(PARAMS)
    assert_equal(optax.tree.map_params(tx, lambda x: x, state), state)
    mapped = optax.tree.map_params(tx, lambda x: jnp.full_like(x, 7), state)
    sevens = [
        x.shape for x in jax.tree.leaves(mapped) if np.shape(x) and np.all(x == 7)
    ]
    # All but keys, whose data are unsigned integers.
    like_params = [
        x.shape
        for x in jax.tree.leaves(state)
        if np.shape(x) and not jnp.issubdtype(x.dtype, jnp.unsignedinteger)
    ]
    assert sevens == like_params


FLOATS = ["bfloat16", "float32", "float64"]


@pytest.mark.parametrize(
    "dtype",
    ["mixed", *(pytest.param(x, marks=pytest.mark.long) for x in FLOATS)],
)
@pytest.mark.parametrize("name", by_name(CASES, REPRESENTED - TYPES_OF_THEIR_OWN))
def test_dtypes_are_kept_and_strong(x64, name, dtype):
    case = CASES[name]
    tx = case.factory(**case.kwargs)
    dtypes = dict.fromkeys(PARAMS, dtype)
    if dtype == "mixed":
        dtypes = {"k": "bfloat16", "b": "float64"}
    params, grads, fisher = (
        {n: x.astype(dtypes[n]) for n, x in tree.items()}
        for tree in (PARAMS, GRADS, FISHER)
    )
    state = jax.eval_shape(tx.init, params)
    result, new_state = jax.eval_shape(
        lambda state: update(tx, state, params, grads, fisher=fisher), state
    )
    same = (
        case.kind in ("step", "gradient", "descent") or case.factory is fsam_optax.given
    )
    kept = {
        n: w.dtype if same else jnp.promote_types(w.dtype, jnp.float32)
        for n, w in params.items()
    }
    assert types(result) == {n: (w.shape, kept[n], False) for n, w in params.items()}
    # `optax.ema` takes the dtype of the parameters at first, then that of F.
    if case.kwargs.get("estimator") is not AVERAGE["estimator"]:
        assert types(new_state) == types(state)
    assert not any(x.weak_type for x in jax.tree.leaves(new_state))


@pytest.mark.short("fisher_ellipsoid_average", "gsam")
@pytest.mark.parametrize(
    "name",
    # In `looksam` a schedule counts the perturbed steps, an injected one all of them.
    [
        n
        for n, c in CASES.items()
        if "rho" in c.kwargs and n not in ("fisher_sam_drawn", "looksam")
    ],
)
def test_inject_hyperparams_with_a_schedule_of_rho(name):
    factory, kwargs, _ = CASES[name]

    def schedule(count):
        return 0.1 * (count + 1)

    static = [k for k in inspect.signature(factory).parameters if k.endswith("_axis")]
    injected = optax.inject_hyperparams(factory, static_args=static)
    injected = injected(**{**kwargs, "rho": schedule})
    direct = jitted(factory(**{**kwargs, "rho": schedule}))
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


@pytest.mark.short("euclidean_ball")
@pytest.mark.parametrize(
    "name",
    # Each kind, with a state and without. The oracle makes gradients: it goes before
    # MultiSteps.
    [
        "euclidean_ball",
        "fisher_ellipsoid_average",
        "multi_step",
        "given",
        "fisher_i1",
        "scale_by_inverse_dense",
        "sharpness_aware_every",
        "reuse",
        "displaced",
        "bsam",
    ],
)
def test_multi_steps_hands_over_the_mean_gradient(name):
    tx = transformation(name)
    multi = optax.MultiSteps(tx, 2)

    @jax.jit
    def step(state, scale):
        grads = jax.tree.map(lambda g: scale * g, GRADS)
        return multi.update(grads, state, PARAMS, **EXTRA)

    state = multi.init(PARAMS)
    for scale in (1.0, 3.0):
        result, state = step(state, scale)
    expected, _ = update(tx, grads=jax.tree.map(lambda g: 2 * g, GRADS))
    assert_close(result, expected, rtol=1e-5)


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


STEPS = [name for name in PATHS if CASES[name].kind in ("step", "gradient")]


@pytest.mark.short(
    "scale_by_inverse_fisher", "displaced", "looksam", "value_and_grad_micro"
)
@pytest.mark.parametrize("name", STEPS)
def test_apply_if_finite(name):
    factory, kwargs, _ = CASES[name]
    guarded = optax.apply_if_finite(factory(**kwargs), max_consecutive_errors=3)

    @jax.jit
    def step(state, factor):
        def scaled(params):
            return jax.tree.map(lambda g: factor * g, cubic(params))

        params = jax.tree.map(lambda w: factor * w, PARAMS)
        return update(guarded, state, params, scaled(PARAMS), grad_fn=scaled)

    result, state = step(guarded.init(PARAMS), 1.0)
    assert_close((result, state.inner_state), update(transformation(name)))
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


@pytest.mark.short(
    "sharpness_aware_every", "displaced", "looksam", "value_and_grad_micro"
)
@pytest.mark.parametrize("name", STEPS)
def test_descends(name):
    tx = transformation(name)
    if CASES[name].kind == "gradient":
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

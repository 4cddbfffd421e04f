"""The formula: identities that hold for every geometry and every norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import fsam_optax


RHO = 0.3
RNG = np.random.default_rng(0)
SHAPES = {"k": (3, 4), "w": (5,), "b": (4,), "s": ()}
PARAMS = {n: jax.device_put(np.float32(RNG.normal(size=s))) for n, s in SHAPES.items()}
GRADS = {n: jax.device_put(np.float32(RNG.normal(size=s))) for n, s in SHAPES.items()}
ORDS = [1.2, 2, 3, np.inf]

SCALES = {
    "euclidean": oracles.no_scale(PARAMS),
    "element": oracles.asam_scale(PARAMS, 0.1),
    "filter": oracles.asam_scale(PARAMS, 0.1, "filter"),
    "layer": oracles.asam_scale(PARAMS, 0.1, "layer"),
    "fisher": oracles.fisher_scale({n: g**2 for n, g in GRADS.items()}),
}


def transformation(geometry, rho=RHO, ord=2, **kwargs):
    if geometry == "euclidean":
        return fsam_optax.euclidean_ball(rho, ord=ord, **kwargs)
    if geometry == "fisher":
        return fsam_optax.fisher_ellipsoid(rho, fsam_optax.squared_gradient(), **kwargs)
    return fsam_optax.adaptive_ellipsoid(
        rho, eta=0.1, scope=geometry, ord=ord, **kwargs
    )


CASES = [
    (geometry, ord)
    for geometry in SCALES
    for ord in ORDS
    if geometry != "fisher" or ord == 2
]


def compute(tx, grads=GRADS, params=PARAMS, **extra):
    return tx.update(grads, tx.init(params), params, **extra)


def arguments(value):
    """Names a test by the arguments it passes."""
    return "_".join(value) if isinstance(value, dict) else ""


@pytest.fixture(params=CASES, ids=str, scope="module")
def solved(request):
    """A geometry's T in NumPy, its p, and the eps and state of the library."""
    geometry, ord = request.param
    return SCALES[geometry], ord, *compute(transformation(geometry, ord=ord))


def test_is_the_formula(solved):
    scale, ord, eps, state = solved
    expected, dual_norm = oracles.perturbation(RHO, GRADS, scale, ord)
    for name in SHAPES:
        assert eps[name].shape == SHAPES[name]
        assert eps[name].dtype == jnp.float32
        np.testing.assert_allclose(eps[name], expected[name], rtol=3e-6, atol=1e-9)
    np.testing.assert_allclose(state.dual_norm, dual_norm, rtol=3e-6)


def test_lies_on_the_boundary(solved):
    scale, ord, eps, _ = solved
    length = oracles.norm(oracles.flat(eps) / oracles.flat(scale), ord)
    np.testing.assert_allclose(length, RHO, rtol=3e-6)


def test_linear_rise_is_rho_times_the_dual_norm(solved):
    _, _, eps, state = solved
    rise = oracles.flat(GRADS) @ oracles.flat(eps)
    np.testing.assert_allclose(rise, RHO * state.dual_norm, rtol=3e-6)


def test_no_feasible_point_rises_more(solved):
    scale, ord, eps, _ = solved
    g, t = oracles.flat(GRADS), oracles.flat(scale)
    best = g @ oracles.flat(eps)
    candidates = np.random.default_rng(1).normal(size=(2000, g.size))
    # Half of them close to the answer, where a wrong answer would be beaten.
    candidates[::2] = oracles.flat(eps) / t + 0.03 * RHO * candidates[::2]
    lengths = np.array([oracles.norm(c, ord) for c in candidates])
    rises = (candidates * (RHO / lengths[:, None]) * t) @ g
    assert np.max(rises) <= best * (1 + 1e-5)
    assert np.max(rises) > 0.9 * best  # The candidates do come close.


@pytest.mark.parametrize("geometry", SCALES)
def test_has_one_norm_for_the_whole_tree(geometry):
    # Growing the gradient of one leaf must shrink the perturbation of the others.
    larger = {**GRADS, "w": 100 * GRADS["w"]}
    eps, _ = compute(transformation(geometry), larger)
    before, _ = compute(transformation(geometry))
    assert np.all(np.abs(eps["b"]) < 0.3 * np.abs(before["b"]))


@pytest.mark.parametrize("geometry", ["euclidean", "element", "fisher"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_does_not_depend_on_the_scale_of_the_loss(geometry, factor):
    scaled = {name: factor * g for name, g in GRADS.items()}
    eps, _ = compute(transformation(geometry), scaled)
    expected, _ = compute(transformation(geometry))
    for name in SHAPES:
        np.testing.assert_allclose(eps[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("geometry", SCALES)
@pytest.mark.parametrize(
    "mask",
    [
        {"k": True, "w": False, "b": True, "s": True},
        lambda params: {name: name != "w" for name in params},
        {"k": np.True_, "w": np.False_, "b": np.True_, "s": np.True_},
    ],
    ids=["tree", "callable", "numpy"],
)
def test_masked_leaves_are_as_if_absent(geometry, mask):
    def without(tree):
        return {name: leaf for name, leaf in tree.items() if name != "w"}

    eps, state = compute(transformation(geometry, mask=mask))
    expected, expected_state = compute(
        transformation(geometry), without(GRADS), without(PARAMS)
    )
    assert not np.any(eps["w"])
    for name, leaf in expected.items():
        np.testing.assert_array_equal(eps[name], leaf)
    np.testing.assert_array_equal(state.dual_norm, expected_state.dual_norm)


def test_mask_may_be_a_prefix():
    params = {"frozen": PARAMS, "free": PARAMS}
    tx = fsam_optax.euclidean_ball(RHO, mask={"frozen": False, "free": True})
    eps, _ = tx.update({"frozen": GRADS, "free": GRADS}, tx.init(params), params)
    expected, _ = compute(fsam_optax.euclidean_ball(RHO))
    for name in SHAPES:
        assert not np.any(eps["frozen"][name])
        np.testing.assert_array_equal(eps["free"][name], expected[name])


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ({"k": True}, ValueError, "`mask` must have the structure"),
        ({**dict.fromkeys(SHAPES, True), "w": 1.0}, TypeError, "Python bools"),
        (lambda p: {n: jnp.any(w > 0) for n, w in p.items()}, TypeError, "bools"),
        (["k", "w"], TypeError, "Python bools.*got 'k'"),
        (lambda path, leaf: True, TypeError, r"`mask\(params\)`"),
    ],
    ids=["structure", "float", "array", "names", "path"],
)
def test_bad_masks_are_rejected(mask, error, match):
    with pytest.raises(error, match=match):
        compute(fsam_optax.euclidean_ball(RHO, mask=mask))


# A ball for every array


@pytest.mark.short("euclidean-1.2", "layer-3")
@pytest.mark.parametrize(("geometry", "ord"), CASES, ids=str)
def test_balls_of_single_arrays_are_those_of_each_alone(geometry, ord):
    # The mean of F is that over all arrays.
    kwargs = {"relative": False} if geometry == "fisher" else {}
    tx = transformation(geometry, ord=ord, per_leaf=True, **kwargs)
    eps, state = jax.jit(lambda: compute(tx))()
    dual_norms = []
    for name in SHAPES:
        alone = transformation(geometry, ord=ord, **kwargs)
        trees = ({name: tree[name]} for tree in (GRADS, PARAMS))
        expected, one = compute(alone, *trees)
        np.testing.assert_allclose(eps[name], expected[name], rtol=3e-6)
        dual_norms.append(one.dual_norm)
    np.testing.assert_allclose(state.dual_norm, np.sum(dual_norms), rtol=3e-6)
    rise = oracles.flat(GRADS) @ oracles.flat(eps)
    np.testing.assert_allclose(rise, RHO * state.dual_norm, rtol=3e-6)


def test_adversarial_weight_perturbation():
    tx = fsam_optax.adaptive_ellipsoid(
        RHO,
        eta=0.0,
        scope="layer",
        per_leaf=True,
        mask=lambda params: {n: w.ndim > 1 for n, w in params.items()},
    )
    w, g = oracles.f64(PARAMS)["k"], oracles.f64(GRADS)["k"]
    eps, _ = compute(tx)
    expected = RHO * np.linalg.norm(w) * g / np.linalg.norm(g)
    np.testing.assert_allclose(eps["k"], expected, rtol=2e-6)
    assert not any(np.any(eps[n]) for n in "wbs")


@pytest.mark.parametrize("ord", [2, 3, jnp.inf])
def test_each_ball_has_the_range_of_float32(ord):
    factors = {"k": 1e30, "w": 1e-30, "b": 0.0, "s": 1.0}
    grads = {n: factors[n] * g for n, g in GRADS.items()}
    tx = fsam_optax.euclidean_ball(RHO, ord=ord, per_leaf=True)
    (eps, state), (expected, _) = compute(tx, grads), compute(tx)
    assert state.skipped == 0
    assert not np.any(eps["b"])
    for name in "kws":
        np.testing.assert_allclose(eps[name], expected[name], rtol=1e-5)


def test_norms_that_only_together_leave_float32():
    # The squares of each add up to 3e38.
    grads = {n: jnp.full(3, 1e19) for n in "abc"}
    eps, state = compute(fsam_optax.euclidean_ball(RHO, per_leaf=True), grads, grads)
    assert state.skipped == 0
    np.testing.assert_allclose(eps["a"], np.full(3, RHO / np.sqrt(3)), rtol=1e-6)
    # One whose own norm does, 2e39, has no direction.
    grads["b"] = jnp.full(100, 2e38)
    eps, state = compute(fsam_optax.euclidean_ball(RHO, per_leaf=True), grads, grads)
    assert state.skipped == 1
    assert not np.any(oracles.flat(eps))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_no_ball_moves_if_one_gradient_is_not_finite_or_all_are_zero(value):
    grads = {n: 0 * g for n, g in GRADS.items()} if value == 0 else GRADS
    grads = {**grads, "w": grads["w"].at[2].set(value)}
    eps, state = compute(fsam_optax.euclidean_ball(RHO, per_leaf=True), grads)
    assert state.skipped == 1
    assert not np.any(oracles.flat(eps))


@pytest.mark.parametrize("kwargs", [{}, {"length": lambda n, count: n}], ids=arguments)
def test_nothing_to_perturb_in_any_ball(kwargs):
    for tree in ({}, {"n": jnp.zeros(0)}):
        tx = fsam_optax.euclidean_ball(RHO, per_leaf=True, **kwargs)
        eps, state = compute(tx, tree, tree)
        assert jax.tree.structure(eps) == jax.tree.structure(tree)
        assert (state.skipped, state.dual_norm) == (1, 0)


# A factor on rho


@pytest.mark.parametrize("per_leaf", [False, True])
def test_unnormalised_sam_is_rho_times_the_gradient(per_leaf):
    def length(dual_norm, count):
        return dual_norm

    tx = fsam_optax.euclidean_ball(RHO, length=length, per_leaf=per_leaf)
    eps, state = compute(tx)
    for name in SHAPES:
        np.testing.assert_allclose(eps[name], RHO * GRADS[name], rtol=2e-6)
    assert state.rho == np.float32(RHO)


@pytest.mark.parametrize("geometry", ["euclidean", "filter", "fisher"])
def test_length_sees_the_dual_norm_and_the_count(geometry):
    def length(dual_norm, count):
        return (1 - 1 / (count + 1)) * dual_norm + 1 / (count + 1)  # Unified SAM.

    tx = transformation(geometry, length=length)
    expected, normal = compute(transformation(geometry))
    state = tx.init(PARAMS)
    for step in range(1, 4):
        eps, state = tx.update(GRADS, state, PARAMS)
        factor = (1 - 1 / step) * normal.dual_norm + 1 / step
        for name in SHAPES:
            np.testing.assert_allclose(eps[name], factor * expected[name], rtol=3e-6)
    np.testing.assert_allclose(state.dual_norm, normal.dual_norm, rtol=1e-6)


def test_a_constant_length_is_a_factor_on_a_schedule_of_rho():
    def rho(count):
        return 0.1 * (count + 1)

    tx = fsam_optax.euclidean_ball(rho, length=lambda dual_norm, count: 2.0)
    other = fsam_optax.euclidean_ball(lambda count: 2 * rho(count))
    for name in SHAPES:
        np.testing.assert_array_equal(compute(tx)[0][name], compute(other)[0][name])


def test_a_length_that_is_not_finite_is_left_out():
    tx = fsam_optax.euclidean_ball(RHO, length=lambda n, count: n * np.inf)
    eps, state = compute(tx)
    assert state.skipped == 1
    assert not np.any(oracles.flat(eps))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"length": 2.0}, "A constant factor belongs into `rho`"),
        ({"length": lambda dual_norm: 1.0}, r"`length\(dual_norm, count\)`"),
        ({"per_leaf": {"k": True}}, "`per_leaf` must be True or False.*`mask`"),
        ({"per_leaf": None}, "`per_leaf` must be True or False"),
        ({"ord": "inf"}, "`jnp.inf`"),
        ({"rho": "0.05"}, r"`rho` must be a number or a schedule.*`float\(...\)`"),
        ({"rho": optax.sgd(0.1)}, r"the arguments are `euclidean_ball\(rho\)`"),
    ],
    ids=arguments,
)
def test_arguments_of_the_wrong_type_say_what_to_write(kwargs, match):
    with pytest.raises(TypeError, match=match):
        fsam_optax.euclidean_ball(**{"rho": RHO, **kwargs})


def test_swapped_arguments():
    estimator = fsam_optax.squared_gradient()
    with pytest.raises(TypeError, match=r"`fisher_ellipsoid\(rho, estimator\)`"):
        fsam_optax.fisher_ellipsoid(estimator, 0.1)
    with pytest.raises(TypeError, match=r"`perturbation\(rho, operator\)`"):
        fsam_optax.perturbation(optax.identity(), 0.1)
    with pytest.raises(TypeError, match="keyword"):
        fsam_optax.perturbation(0.1, 2)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rho": lambda count: jnp.ones(2)}, r"`rho\(count\)` must be a number"),
        ({"rho": lambda count: None}, r"`rho\(count\)` must be a number"),
        ({"length": lambda n, count: jnp.ones(2)}, "`length.*must return one number"),
    ],
    ids=arguments,
)
def test_functions_must_return_numbers(kwargs, match):
    with pytest.raises(ValueError, match=match):
        compute(fsam_optax.euclidean_ball(**{"rho": RHO, **kwargs}))


def test_the_state_of_something_else_is_refused():
    ball = fsam_optax.euclidean_ball(RHO)
    with pytest.raises(TypeError, match=r"got a EmptyState.*`update\(grads, state"):
        ball.update(GRADS, optax.EmptyState(), PARAMS)


def test_an_axis_that_is_not_mapped_is_named():
    with pytest.raises(NameError, match="`shard_axes` names 'd', which is no axis"):
        compute(fsam_optax.euclidean_ball(RHO, shard_axes="d"))


def test_rho_schedule_advances_with_the_perturbation_and_is_never_reset():
    tx = fsam_optax.euclidean_ball(lambda count: 0.1 * (count + 1))
    state = tx.init(PARAMS)
    for step in range(4):
        eps, state = tx.update(GRADS, state, PARAMS)
        rho = 0.1 * (step + 1)
        np.testing.assert_allclose(np.linalg.norm(oracles.flat(eps)), rho, rtol=1e-6)
        np.testing.assert_allclose(optax.tree.get(state, "rho"), rho, rtol=1e-6)
        assert state.count == step + 1
    assert state.skipped == 0


@pytest.mark.parametrize("ord", ORDS)
def test_traced_numbers_agree_with_python_numbers(ord):
    @jax.jit
    def traced(rho, ord, eta):
        tx = fsam_optax.adaptive_ellipsoid(rho, eta=eta, ord=ord)
        return compute(tx)[0]

    expected, _ = compute(fsam_optax.adaptive_ellipsoid(RHO, eta=0.1, ord=ord))
    eps = traced(jnp.float32(RHO), jnp.float32(ord), jnp.float32(0.1))
    for name in SHAPES:
        np.testing.assert_allclose(eps[name], expected[name], rtol=1e-5)


def test_operator_is_given_everything_and_its_state_is_kept():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append((updates, params, extra))
        return jax.tree.map(lambda g: jnp.full_like(g, 2.0), updates), state + 1

    operator = optax.GradientTransformationExtraArgs(lambda _: jnp.int32(0), update)
    eps, state = compute(fsam_optax.perturbation(RHO, operator), batch="batch")
    [(updates, params, extra)] = seen
    assert updates is GRADS
    assert params is PARAMS
    assert extra == {"batch": "batch"}
    assert state.operator == 1
    # T = 2 in every direction is a Euclidean ball of twice the radius.
    expected, _ = compute(fsam_optax.perturbation(2 * RHO))
    for name in SHAPES:
        np.testing.assert_allclose(eps[name], expected[name], rtol=1e-6)


def test_operator_of_another_structure_is_rejected():
    operator = optax.stateless(lambda updates, params: {"k": updates["k"]})
    with pytest.raises(ValueError, match="`operator` must return a tree with the stru"):
        compute(fsam_optax.perturbation(RHO, operator))


def test_params_are_not_needed_where_the_geometry_does_not_depend_on_them():
    tx = fsam_optax.euclidean_ball(RHO)
    eps, _ = tx.update(GRADS, tx.init(PARAMS))
    expected, _ = compute(tx)
    for name in SHAPES:
        np.testing.assert_array_equal(eps[name], expected[name])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rho": -0.1}, "`rho` must be a number in"),
        ({"rho": float("nan")}, "`rho` must be"),
        ({"rho": float("inf")}, "`rho` must be"),
        ({"rho": np.float32(-1)}, "`rho` must be"),
        ({"rho": 0.1, "ord": 1}, r"`ord` must be a number in \(1, inf\]"),
        ({"rho": 0.1, "ord": 0.5}, "`ord` must be"),
        ({"rho": 0.1, "ord": -np.inf}, "`ord` must be"),
        ({"rho": 0.1, "ord": float("nan")}, "`ord` must be"),
    ],
    ids=arguments,
)
def test_numbers_out_of_range_are_rejected(kwargs, match):
    with pytest.raises(ValueError, match=match):
        fsam_optax.perturbation(**kwargs)
    with pytest.raises(ValueError, match=match):
        fsam_optax.adaptive_ellipsoid(**kwargs)


def test_operator_must_be_a_transformation():
    with pytest.raises(TypeError, match=r"`operator` must be an optax\.Gradient"):
        fsam_optax.perturbation(0.1, lambda g: g)


def test_every_sign_counts_at_infinite_order():
    ball = fsam_optax.euclidean_ball(1.0, ord=jnp.inf)
    grads = jnp.array([1e9, -1e-30, 0.0])
    eps, _ = ball.update(grads, ball.init(grads))
    np.testing.assert_array_equal(eps, [1.0, -1.0, 0.0])


@pytest.mark.parametrize("size", [1e-37, 9e37, 3e38])
def test_norm_holds_at_the_ends_of_float32(size):
    ball = fsam_optax.euclidean_ball(1.0)
    grads = jnp.array([size, 0.0])
    eps, state = ball.update(grads, ball.init(grads))
    np.testing.assert_allclose(eps, [1.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(state.dual_norm, size, rtol=1e-6)


def test_operator_of_the_wrong_shape_is_rejected():
    tall = optax.stateless(lambda grads, params: jnp.ones((2, 1)))
    ball = fsam_optax.perturbation(0.1, tall)
    with pytest.raises(ValueError, match=r"`operator` returned shape \(2, 1\)"):
        ball.update(jnp.ones(2), ball.init(jnp.ones(2)))


def test_perturbation_of_the_wrong_shape_is_rejected():
    tall = optax.stateless(lambda grads, params: jnp.ones((2, 1)))
    f = fsam_optax.value_and_grad(lambda w, batch: jnp.sum(w), tall)
    with pytest.raises(ValueError, match="perturbation's output"):
        f(jnp.ones(2), f.init(jnp.ones(2)), None)


@pytest.mark.parametrize("rho", ["0.1", None, 1j], ids=repr)
def test_rho_that_is_no_number_is_rejected(rho):
    with pytest.raises(TypeError, match="`rho` must be a number"):
        fsam_optax.euclidean_ball(rho)

"""What is particular to SAM, ASAM and Fisher SAM."""

import collections
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from test_perturbation import arguments, compute, GRADS, PARAMS, RHO, RNG, SHAPES

from fsam_optax import (
    adaptive_ellipsoid,
    euclidean_ball,
    fisher_ellipsoid,
    given,
    squared_gradient,
)


FISHER = {n: jax.device_put(np.float32(RNG.uniform(size=s))) for n, s in SHAPES.items()}


def assert_close(tree, expected, rtol=2e-6):
    for name in tree.keys() | expected.keys():
        np.testing.assert_allclose(tree[name], expected[name], rtol=rtol, atol=1e-9)


def assert_equal(tree, expected):
    for name in tree.keys() | expected.keys():
        np.testing.assert_array_equal(tree[name], expected[name])


# Adaptive


@pytest.mark.short("positive-3", "sign-flipping-2")
@pytest.mark.parametrize("ord", [2, 3, np.inf])
@pytest.mark.parametrize("flips", [False, True], ids=["positive", "sign-flipping"])
def test_rescaling_of_weights_takes_the_perturbation_along(ord, flips):
    rng = np.random.default_rng(2)
    scales = {
        n: np.float32(
            np.exp2(rng.integers(-6, 7, s)) * (rng.choice([-1, 1], s) if flips else 1)
        )
        for n, s in SHAPES.items()
    }
    tx = adaptive_ellipsoid(RHO, eta=0.0, ord=ord, normalize=lambda *_: True)
    params = {n: scales[n] * np.asarray(PARAMS[n]) for n in SHAPES}
    grads = {n: np.asarray(GRADS[n]) / scales[n] for n in SHAPES}
    eps, state = compute(tx, grads, params)
    expected, expected_state = compute(tx)
    # Powers of two: each product with them is exact.
    assert_equal(eps, {n: scales[n] * np.asarray(expected[n]) for n in SHAPES})
    assert state.dual_norm == expected_state.dual_norm


@pytest.mark.parametrize("scope", ["filter", "layer"])
def test_rescaling_of_filters_and_layers_takes_the_perturbation_along(scope):
    c = 8.0 * (jnp.array([1.0, 2.0, 4.0, 8.0]) if scope == "filter" else 1.0)
    c = jnp.broadcast_to(c, (3, 4))
    tx = adaptive_ellipsoid(RHO, eta=0.0, scope=scope)
    eps, _ = compute(
        tx, {**GRADS, "k": GRADS["k"] / c}, {**PARAMS, "k": PARAMS["k"] * c}
    )
    expected, _ = compute(tx)
    assert_close(eps, {**expected, "k": c * expected["k"]})


def test_large_eta_at_fixed_rho_eta_is_sam():
    tx = adaptive_ellipsoid(RHO * 1e-6, eta=1e6, normalize=lambda *_: True)
    assert_close(compute(tx)[0], compute(euclidean_ball(RHO))[0], rtol=1e-5)


class Layer(NamedTuple):
    weight: jax.Array
    bias: jax.Array


def ones():
    return jnp.full(2, 3.0)


@pytest.mark.parametrize(
    ("params", "normalized"),
    [
        ({"dense": {"kernel": ones(), "bias": ones()}}, [False, True]),
        ({"linear": {"b": ones(), "w": ones()}}, [False, True]),
        ({"norm": {"offset": ones(), "scale": ones()}}, [False, True]),
        ({"norm": {"beta": ones(), "gamma": ones()}}, [False, True]),
        ([Layer(ones(), ones()), Layer(ones(), ones())], [True, False, True, False]),
        # Only the last name counts.
        ({"bias": {"kernel": ones()}}, [True]),
        ({"bias": [ones()]}, [False]),
        ({"bias2": ones(), "biases": ones(), "wb": ones()}, [False, False, True]),
        ([ones(), ones()], [True, True]),
        ({0: ones()}, [True]),
        (ones(), [True]),
    ],
    ids=str,
)
def test_everything_but_biases_is_normalized(params, normalized):
    grads = jax.tree.map(jnp.ones_like, params)
    tx = adaptive_ellipsoid(1.0, eta=0.0, ord=jnp.inf)  # Then eps is T sign(g).
    eps, _ = tx.update(grads, tx.init(params), params)
    expected = [np.full(2, 3.0 if use else 1.0) for use in normalized]
    for leaf, value in zip(jax.tree.leaves(eps), expected, strict=True):
        np.testing.assert_array_equal(leaf, value)


@pytest.mark.parametrize(
    "normalize",
    [
        {"k": True, "w": False, "b": True, "s": False},
        lambda path, leaf: path[-1].key in ("k", "b"),
        lambda path, leaf: leaf.shape[-1:] == (4,),
    ],
    ids=["tree", "path", "leaf"],
)
def test_normalize_chooses_the_leaves(normalize):
    scale = oracles.asam_scale(PARAMS, 0.1, biases=("w", "s"))
    expected, _ = oracles.perturbation(RHO, GRADS, scale)
    tx = adaptive_ellipsoid(RHO, eta=0.1, normalize=normalize)
    assert_close(compute(tx)[0], expected)


def test_normalize_may_be_a_prefix():
    tx = adaptive_ellipsoid(1.0, eta=0.0, ord=jnp.inf, normalize=[True, False])
    params = [{"a": ones(), "bias": ones()}, {"a": ones()}]
    eps, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_array_equal(eps[0]["bias"], 3 * np.ones(2))
    np.testing.assert_array_equal(eps[1]["a"], np.ones(2))


@pytest.mark.short("0")
@pytest.mark.parametrize("filter_axis", [-1, 0, 2])
def test_filters_of_a_convolution(filter_axis):
    shapes = {"conv": (3, 2, 5, 4), "scale": (4,), "b": (4,)}
    params, grads = (
        {n: jax.device_put(np.float32(RNG.normal(size=s))) for n, s in shapes.items()}
        for _ in range(2)
    )
    scale = oracles.asam_scale(params, 0.1, "filter", filter_axis=filter_axis)
    expected, _ = oracles.perturbation(RHO, grads, scale)
    tx = adaptive_ellipsoid(RHO, eta=0.1, scope="filter", filter_axis=filter_axis)
    assert_close(compute(tx, grads, params)[0], expected)


def eps_of(params, **kwargs):
    """eps of ones, by ASAM with p = inf and eta = 0: T itself."""
    tx = adaptive_ellipsoid(1.0, eta=0.0, ord=jnp.inf, **kwargs)

    @jax.jit
    def eps(params):
        ones = jax.tree.map(jnp.ones_like, params)
        return tx.update(ones, tx.init(params), params)[0]

    return eps(params)


def random(*shape):
    return jax.device_put(np.float32(RNG.normal(size=shape)))


def in_blocks(path, leaf):
    return 0 if path[0].key == "blocks" else None


@pytest.mark.short("0-filter")
@pytest.mark.parametrize("scope", ["element", "filter", "layer"])
@pytest.mark.parametrize("filter_axis", [-1, 0])
def test_stacked_layers_have_the_scales_of_layers_apart(scope, filter_axis):
    """A kernel, a scale and a bias, three times, beside a layer that is alone."""
    layers = [
        {"kernel": random(2, 3, 4), "scale": random(4), "bias": random(4)}
        for _ in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    alone = {"kernel": random(3, 3)}
    kwargs = {"scope": scope, "filter_axis": filter_axis}
    found = eps_of({"blocks": stacked, "out": alone}, layer_axis=in_blocks, **kwargs)
    for i, layer in enumerate(layers):
        expected = eps_of(layer, **kwargs)
        assert_close({n: e[i] for n, e in found["blocks"].items()}, expected)
    assert_close(found["out"], eps_of(alone, **kwargs))
    # Any axis may be that of the layers.
    last = eps_of(
        {"kernel": jnp.moveaxis(stacked["kernel"], 0, 2)}, layer_axis=2, **kwargs
    )
    kernel = jnp.moveaxis(last["kernel"], 2, 0)
    np.testing.assert_allclose(kernel, found["blocks"]["kernel"], rtol=2e-6)


def test_layers_stacked_along_two_axes():
    kernel = random(2, 3, 4, 5)
    found = eps_of(kernel, scope="layer", layer_axis=(0, 1))
    expected = jnp.sqrt(jnp.sum(kernel**2, (2, 3), keepdims=True))
    np.testing.assert_allclose(found, jnp.broadcast_to(expected, found.shape), 2e-6)


def test_filters_of_a_kernel_with_heads():
    """A query kernel is (d, heads, head_dim): its output channels are two axes."""
    query, out = random(4, 2, 3), random(2, 3, 4)

    def filter_axis(path, leaf):
        return (-2, -1) if path[0].key == "query" else -1

    params = {"query": query, "out": out}
    found = eps_of(params, scope="filter", filter_axis=filter_axis)
    expected = eps_of(
        {"query": query.reshape(4, 6), "out": out.reshape(6, 4)}, scope="filter"
    )
    np.testing.assert_allclose(found["query"].reshape(4, 6), expected["query"], 2e-6)
    np.testing.assert_allclose(found["out"].reshape(6, 4), expected["out"], 2e-6)


def test_a_leaf_may_have_no_filters():
    params = {"embedding": random(5, 3), "kernel": random(2, 3)}

    def filter_axis(path, leaf):
        return None if path[0].key == "embedding" else -1

    found = eps_of(params, scope="filter", filter_axis=filter_axis)
    np.testing.assert_array_equal(found["embedding"], jnp.abs(params["embedding"]))
    expected = eps_of({"kernel": params["kernel"]}, scope="filter")
    assert_equal({"kernel": found["kernel"]}, expected)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"filter_axis": 2}, ValueError, r"`filter_axis` is 2, but leaf \['k'\] has 2"),
        ({"filter_axis": (0, -3)}, ValueError, "`filter_axis` is -3"),
        ({"filter_axis": 1.0}, TypeError, "`filter_axis` must be an axis, a tuple"),
        ({"filter_axis": [0]}, TypeError, "`filter_axis` must be an axis, a tuple"),
        ({"filter_axis": lambda path, w: "k"}, TypeError, "got 'k' for leaf"),
        ({"layer_axis": 1, "scope": "layer"}, ValueError, r"`layer_axis` is 1, .*'w'"),
        ({"layer_axis": "k"}, TypeError, "`layer_axis` must be an axis"),
        ({"filter_axis": lambda w: 0}, TypeError, r"`filter_axis\(path, leaf\)`"),
        ({"normalize": lambda w: True}, TypeError, r"`normalize\(path, leaf\)`"),
        ({"normalize": lambda path, w: None}, TypeError, "`normalize` must hold Pyth"),
    ],
    ids=arguments,
)
def test_bad_axes_are_rejected(kwargs, error, match):
    # No leaf may silently be treated by another axis than the one asked for.
    with pytest.raises(error, match=match):
        tx = adaptive_ellipsoid(RHO, **{"scope": "filter", **kwargs})
        compute(tx, *({n: t[n] for n in "kw"} for t in (GRADS, PARAMS)))


@pytest.mark.parametrize("scope", ["element", "filter", "layer"])
def test_scopes_agree_where_leaves_are_scalars(scope):
    params, grads = ({n: t[n].ravel()[0] for n in SHAPES} for t in (PARAMS, GRADS))
    eps, _ = compute(adaptive_ellipsoid(RHO, scope=scope), grads, params)
    expected, _ = compute(adaptive_ellipsoid(RHO), grads, params)
    assert_close(eps, expected)


def test_default_eta():
    scale = oracles.asam_scale(PARAMS, 0.01)
    expected, _ = oracles.perturbation(RHO, GRADS, scale)
    assert_close(compute(adaptive_ellipsoid(RHO))[0], expected)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"eta": -0.1}, "`eta` must be a number in"),
        ({"eta": float("nan")}, "`eta` must be"),
        ({"scope": "tensor"}, '`scope` must be "element", "filter" or "layer"'),
        ({"scope": None}, "`scope` must be"),
        ({"scope": "filter", "shard_axes": "i"}, "cannot be combined with `shard_ax"),
        ({"layer_axis": 0, "shard_axes": "i"}, "`layer_axis` cannot be combined with"),
    ],
    ids=arguments,
)
def test_bad_arguments_of_adaptive_are_rejected(kwargs, match):
    with pytest.raises(ValueError, match=match):
        adaptive_ellipsoid(RHO, **kwargs)


# Fisher


@pytest.mark.short("True-jit", "False-jit")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("relative", [False, True])
def test_fisher_at_eta_0_is_sam_bit_for_bit(relative, jit):
    tx = fisher_ellipsoid(RHO, given(), eta=0.0, relative=relative)
    ball = euclidean_ball(RHO)

    def both(fisher):
        return compute(tx, fisher=fisher)[0], compute(ball)[0]

    eps, expected = (jax.jit(both) if jit else both)(FISHER)
    assert_equal(eps, expected)


@pytest.mark.short("1.0-False")
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("eta", [0.01, 1.0, 30.0])
def test_eta_and_damping_are_the_same_up_to_rho(eta, relative):
    by_eta = fisher_ellipsoid(RHO, given(), eta=eta, relative=relative)
    by_damping = fisher_ellipsoid(
        RHO / np.sqrt(eta), given(), damping=1 / eta, relative=relative
    )
    eps, state = compute(by_eta, fisher=FISHER)
    other, other_state = compute(by_damping, fisher=FISHER)
    assert_close(eps, other)
    # The predicted rise, rho times the dual norm, is the same too.
    np.testing.assert_allclose(
        state.dual_norm * np.sqrt(eta), other_state.dual_norm, rtol=2e-6
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"eta": 5.0},
        {"eta": 5.0, "relative": False},
        {"damping": 0.2},
        {"damping": 0.2, "relative": False},
    ],
    ids=str,
)
def test_fisher_is_the_formula(kwargs):
    eps, state = compute(fisher_ellipsoid(RHO, given(), **kwargs), fisher=FISHER)
    scale = oracles.fisher_scale(FISHER, **kwargs)
    expected, dual_norm = oracles.perturbation(RHO, GRADS, scale)
    assert_close(eps, expected)
    np.testing.assert_allclose(state.dual_norm, dual_norm, rtol=2e-6)
    bound = RHO / np.sqrt(kwargs.get("damping", 1.0))
    assert np.linalg.norm(oracles.flat(eps)) < bound


def test_relative_fisher_has_no_unit_and_absolute_fisher_is_a_trap():
    def eps(factor, relative):
        fisher = {n: factor * f for n, f in FISHER.items()}
        tx = fisher_ellipsoid(RHO, given(), relative=relative)
        return oracles.flat(compute(tx, fisher=fisher)[0])

    ball = oracles.flat(compute(euclidean_ball(RHO))[0])
    np.testing.assert_allclose(eps(1e-6, True), eps(1.0, True), rtol=1e-5)
    np.testing.assert_allclose(eps(1e-6, False), ball, rtol=1e-5)
    assert np.max(np.abs(eps(1e-6, True) - ball)) > 0.01 * RHO


def test_relative_mean_is_over_the_perturbed_parameters():
    mask = {"k": True, "w": False, "b": True, "s": True}
    fisher = {**FISHER, "w": jnp.full(5, 1e6)}
    eps, _ = compute(fisher_ellipsoid(RHO, given(), mask=mask), fisher=fisher)

    def kept(tree):
        return {n: leaf for n, leaf in tree.items() if n != "w"}

    expected, _ = oracles.perturbation(
        RHO, kept(GRADS), oracles.fisher_scale(kept(FISHER))
    )
    assert_close(kept(eps), expected)


def test_relative_mean_leaves_out_what_cannot_move():
    params = {**PARAMS, "steps": jnp.zeros(50, jnp.int32)}
    grads = {**GRADS, "steps": np.zeros(50, jax.dtypes.float0)}
    eps, _ = compute(fisher_ellipsoid(RHO, squared_gradient()), grads, params)
    expected, _ = compute(fisher_ellipsoid(RHO, squared_gradient()))
    assert_equal({n: eps[n] for n in SHAPES}, expected)


def test_constant_fisher_is_sam_in_direction():
    fisher = {n: jnp.full(s, 7.0) for n, s in SHAPES.items()}
    eps, _ = compute(fisher_ellipsoid(RHO, given(), eta=3.0), fisher=fisher)
    # Relative to its mean F is 1, so T^2 is 1/4 and eps half as long.
    assert_close(eps, compute(euclidean_ball(RHO / 2))[0])


def test_entries_whose_fisher_and_damping_are_not_positive_stay():
    grads = jnp.ones(3)

    @jax.jit  # A traced damping is not checked.
    def compute_with(damping):
        tx = fisher_ellipsoid(RHO, given(), damping=damping, relative=False)
        fisher = jnp.array([0.0, 1.0, 4.0])
        return tx.update(grads, tx.init(grads), grads, fisher=fisher)

    eps, state = compute_with(-1.0)
    assert state.skipped == 0
    np.testing.assert_allclose(eps, [0, 0, RHO / np.sqrt(3)], rtol=1e-6)


def test_undamped_squared_gradient_is_degenerate_as_derived():
    tx = fisher_ellipsoid(RHO, squared_gradient(), damping=0.0, relative=False)
    eps, state = compute(tx)
    size = oracles.flat(GRADS).size
    np.testing.assert_allclose(state.dual_norm, np.sqrt(size), rtol=2e-6)
    assert_close(eps, {n: RHO / (np.sqrt(size) * g) for n, g in GRADS.items()})


def test_negative_fisher_counts_as_zero():
    negative = {n: f - 0.5 for n, f in FISHER.items()}
    assert np.any(oracles.flat(negative) < 0)
    clipped = {n: jnp.maximum(f, 0) for n, f in negative.items()}
    tx = fisher_ellipsoid(RHO, given())
    assert_equal(compute(tx, fisher=negative)[0], compute(tx, fisher=clipped)[0])


def test_estimator_is_given_everything_and_a_moving_average_works():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append((params, extra))
        return jax.tree.map(lambda g: g * g, updates), state

    estimator = optax.GradientTransformationExtraArgs(
        lambda _: optax.EmptyState(), update
    )
    average = optax.chain(estimator, optax.ema(0.9, debias=True))
    tx = fisher_ellipsoid(RHO, average)
    state, moment = tx.init(PARAMS), {n: 0.0 for n in SHAPES}
    for step in range(3):
        grads = {n: (step + 1) * g + step for n, g in GRADS.items()}
        eps, state = tx.update(grads, state, PARAMS, batch=step)
        moment = {n: 0.9 * moment[n] + 0.1 * np.square(grads[n]) for n in SHAPES}
        fisher = {n: m / (1 - 0.9 ** (step + 1)) for n, m in moment.items()}
        expected, _ = oracles.perturbation(RHO, grads, oracles.fisher_scale(fisher))
        assert_close(eps, expected, rtol=1e-5)
    assert [extra for _, extra in seen] == [{"batch": step} for step in range(3)]
    assert all(params is PARAMS for params, _ in seen)


def test_estimators():
    diagonal, _ = squared_gradient().update(GRADS, optax.EmptyState())
    assert_close(diagonal, {n: np.square(g) for n, g in GRADS.items()})
    half, _ = squared_gradient().update(
        jnp.full(2, 300, jnp.float16), optax.EmptyState()
    )
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, np.full(2, 90000.0))
    fisher, _ = given().update(GRADS, optax.EmptyState(), fisher=FISHER)
    assert_equal(fisher, FISHER)


@pytest.mark.parametrize(
    ("extra", "error", "match"),
    [
        ({}, TypeError, r"`update\(grads, state, params, fisher=diagonal\)`"),
        ({"fisher": {"k": FISHER["k"]}}, ValueError, r"`fisher`.*leaf \['b'\]"),
        ({"fisher": {**FISHER, "w": jnp.ones(1)}}, ValueError, r"\['w'\] is of shape"),
        ({"fisher": {**FISHER, "w": 1.0}}, ValueError, r"\['w'\] is of shape \(\)"),
    ],
    ids=["missing", "structure", "broadcastable", "scalar"],
)
def test_given_fisher_must_fit(extra, error, match):
    with pytest.raises(error, match=match):
        compute(fisher_ellipsoid(RHO, given()), **extra)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"eta": 1.0, "damping": 0.1}, ValueError, "give one"),
        ({"eta": 0, "damping": 0}, ValueError, "give one"),
        ({"eta": -1.0}, ValueError, "`eta` must be a number in"),
        ({"damping": -1.0}, ValueError, "`damping` must be a number in"),
        ({"damping": float("nan")}, ValueError, "`damping` must be"),
        ({"rho": -1.0}, ValueError, "`rho` must be"),
        ({"estimator": lambda g: g}, TypeError, "`estimator` must be an optax.Grad"),
    ],
    ids=arguments,
)
def test_bad_arguments_of_fisher_are_rejected(kwargs, error, match):
    with pytest.raises(error, match=match):
        fisher_ellipsoid(**{"rho": RHO, "estimator": given(), **kwargs})


# Containers


@pytest.mark.parametrize(
    "tx",
    [
        euclidean_ball(RHO),
        adaptive_ellipsoid(RHO),
        fisher_ellipsoid(RHO, squared_gradient()),
    ],
    ids=["euclidean", "adaptive", "fisher"],
)
def test_containers_are_kept(tx):
    params = collections.OrderedDict(z=[PARAMS["k"], None], a=(PARAMS["w"],))
    grads = collections.OrderedDict(z=[GRADS["k"], None], a=(GRADS["w"],))
    eps, _ = tx.update(grads, tx.init(params), params)
    assert jax.tree.structure(eps) == jax.tree.structure(params)
    expected, _ = compute(tx, {n: GRADS[n] for n in "kw"}, {n: PARAMS[n] for n in "kw"})
    # The order of the leaves is another, so the sum of squares may round otherwise.
    assert_close({"k": eps["z"][0], "w": eps["a"][0]}, expected)


def test_the_mean_of_f_is_over_as_many_parameters_as_there_are():
    """More than an index of 32 bits counts."""
    ball = fisher_ellipsoid(0.1, squared_gradient())
    params = [jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32)] * 2
    eps, _ = jax.eval_shape(lambda g: ball.update(g, ball.init(g), g), params)
    assert eps == params

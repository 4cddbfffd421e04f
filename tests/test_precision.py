"""Half precision, float64 and the scale of the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from fsam_optax import (
    adaptive_ellipsoid,
    averaged,
    categorical,
    diagonal,
    euclidean_ball,
    fisher_ellipsoid,
    fisher_empirical,
    fisher_exact,
    fisher_gnb,
    fisher_hutchinson,
    fisher_i1,
    fisher_i2,
    loss_power_sums,
    multi_step,
    negative_log_likelihood,
    scale_by_inverse_fisher,
    sharpness_aware,
    squared_gradient,
    value_and_grad,
)
from fsam_optax._common.pairs import norm_and_cosine


KEY = jax.random.key(0)


def mlp(params, x):
    return jnp.tanh(x @ params["k1"]) @ params["k2"] + params["b"][None]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def initial(*sizes):
    """Returns parameters from LeCun's normal initialisation, in float32."""
    a, b, c = sizes
    return {
        "k1": jax.random.normal(jax.random.key(1), (a, b)) / np.sqrt(a),
        "k2": jax.random.normal(jax.random.key(2), (b, c)) / np.sqrt(b),
        "b": 0.1 * jax.random.normal(jax.random.key(3), (c,)),
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def data(n, features, classes):
    x = jax.nn.relu(jax.random.normal(jax.random.key(4), (n, features)))
    return x, jax.random.randint(jax.random.key(5), (n,), 0, classes)


def cast(tree, dtype):
    """Casts to a dtype, or each leaf to its own if `dtype` is a dictionary."""
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(tree, dtype)
    return {name: x.astype(dtypes[name]) for name, x in tree.items()}


PARAMS, BATCH = initial(20, 30, 5), data(16, 20, 5)
LOSS = negative_log_likelihood(mlp, categorical)
GRADS = jax.jit(jax.grad(LOSS))(PARAMS, BATCH)
MIXED = {"k1": "bfloat16", "k2": "float16", "b": "float32"}
DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "float16", MIXED], ids=str)


# What the loss sees.


@pytest.mark.short("value_and_grad")
@pytest.mark.parametrize("front_end", ["sharpness_aware", "value_and_grad", "lagged"])
def test_the_inner_points_of_several_ascents_are_those_that_the_loss_sees(front_end):
    params, ones = cast(PARAMS, "bfloat16"), jax.tree.map(jnp.ones_like, PARAMS)
    slopes = jax.tree.map(lambda w: w.astype(jnp.float32), ones)
    dtypes = []

    def loss(p, batch):
        del batch
        dtypes.append(p["k1"].dtype)
        return sum(jnp.sum(slopes[n] * p[n]) for n in p)

    # One ascent moves each weight by less than bfloat16 resolves.
    ascent = multi_step(4, optax.chain(averaged(0.5), euclidean_ball(1e-3)))
    options = {"perturb_dtype": jnp.float32}
    if front_end == "sharpness_aware":
        tx = sharpness_aware(optax.identity(), ascent, **options)
        grad_fn = jax.grad(functools.partial(loss, batch=None))
        tx.update(cast(ones, "bfloat16"), tx.init(params), params, grad_fn=grad_fn)
        inner = dtypes
    else:
        options["lagged"] = front_end == "lagged"
        f = value_and_grad(loss, ascent, **options)
        jax.jit(f)(params, f.init(params), None)
        inner = dtypes[1:]
    assert len(inner) >= 2
    assert set(inner) == {jnp.dtype("float32")}


@pytest.mark.parametrize("rho", [1e-25, 1e25])
def test_the_length_of_a_tiny_or_huge_perturbation_is_measured(rho):
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    moved = seen(euclidean_ball(rho), params, GRADS, None)
    tx = sharpness_aware(optax.identity(), euclidean_ball(rho))
    state = tx.init(params)
    _, state = tx.update(GRADS, state, params, grad_fn=lambda p: GRADS)
    for name, x in moved.items():
        length = state.metrics.leaf_perturbation_norms[name]
        np.testing.assert_allclose(length, np.linalg.norm(x), rtol=1e-5)


def seen(tx, params, grads, perturb_dtype):
    """Returns w + eps as the loss sees it, minus w, in float64."""
    points = []

    def grad_fn(point):
        points.append(point)
        return grads

    optimizer = sharpness_aware(optax.identity(), tx, perturb_dtype=perturb_dtype)
    state = optimizer.init(params)
    update, state = optimizer.update(grads, state, params, grad_fn=grad_fn)
    assert {n: u.dtype for n, u in update.items()} == {
        n: g.dtype for n, g in grads.items()
    }
    point, before = oracles.f64(points[0]), oracles.f64(params)
    moved = {name: point[name] - before[name] for name in params}
    np.testing.assert_allclose(
        state.metrics.perturbation_norm, np.linalg.norm(oracles.flat(moved)), rtol=1e-5
    )
    return moved


@pytest.mark.long
@DTYPES
@pytest.mark.parametrize("rho", [1e-3, 0.05, 1.0])
def test_the_loss_sees_a_perturbation_of_length_rho(dtype, rho):
    params, grads = cast(PARAMS, dtype), cast(GRADS, dtype)
    moved = seen(euclidean_ball(rho), params, grads, jnp.float32)
    np.testing.assert_allclose(np.linalg.norm(oracles.flat(moved)), rho, rtol=1e-2)
    moved = seen(adaptive_ellipsoid(rho), params, grads, jnp.float32)
    scale = oracles.asam_scale(params, 0.01)
    relative = {name: moved[name] / scale[name] for name in moved}
    np.testing.assert_allclose(np.linalg.norm(oracles.flat(relative)), rho, rtol=1e-2)


@pytest.mark.long
@pytest.mark.parametrize("front_end", ["sharpness_aware", "value_and_grad"])
def test_half_precision_steps_are_those_of_float32(front_end):
    """To half precision, and only if w + eps is not rounded."""
    tx = euclidean_ball(0.05)

    def gradient(params, batch):
        return jax.grad(LOSS)(params, batch)

    def run(params, perturb_dtype):
        if front_end == "value_and_grad":
            f = value_and_grad(LOSS, tx, perturb_dtype=perturb_dtype)
            return jax.jit(f)(params, f.init(params), BATCH)[1]
        optimizer = sharpness_aware(optax.identity(), tx, perturb_dtype=perturb_dtype)
        grads = cast(gradient(cast(params, "float32"), BATCH), "bfloat16")
        update = functools.partial(
            optimizer.update, grad_fn=lambda p: gradient(p, BATCH)
        )
        return jax.jit(update)(grads, optimizer.init(params), params)[0]

    params = cast(PARAMS, "bfloat16")
    grads = run(params, jnp.float32)
    assert {g.dtype for g in grads.values()} == {jnp.dtype("bfloat16")}
    wide = cast(params, "float32")
    eps, _ = tx.update(gradient(wide, BATCH), tx.init(wide))
    expected = gradient({n: w + eps[n] for n, w in wide.items()}, BATCH)
    error = oracles.flat(grads) - oracles.flat(expected)
    assert np.linalg.norm(error) < 0.01 * np.linalg.norm(oracles.flat(expected))


KERNELS = adaptive_ellipsoid(0.5, mask={"k1": True, "k2": True, "b": False})


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "geometry", "unmoved", "cosine", "length"),
    [
        ("bfloat16", euclidean_ball(0.05), 0.65, 0.86, 0.99),
        ("bfloat16", KERNELS, 0.98, 0.80, 0.92),
        ("float16", euclidean_ball(0.05), 0.14, 0.996, 1.00),
        ("float16", KERNELS, 0.40, 0.992, 1.01),
    ],
    ids=["SAM-bfloat16", "ASAM-bfloat16", "SAM-float16", "ASAM-float16"],
)
def test_what_rounding_to_half_precision_loses(
    dtype, geometry, unmoved, cosine, length
):
    """On an MLP 784-512-10. The length alone does not tell: rounding also adds."""
    params, grads = big()
    params = cast(params, dtype)
    rounded = oracles.flat(seen(geometry, params, grads, None))
    exact = oracles.flat(seen(geometry, params, grads, jnp.float32))
    lengths = np.linalg.norm(rounded), np.linalg.norm(exact)
    np.testing.assert_allclose(np.mean(rounded[exact != 0] == 0), unmoved, atol=0.03)
    np.testing.assert_allclose(rounded @ exact / np.prod(lengths), cosine, atol=0.02)
    np.testing.assert_allclose(lengths[0] / lengths[1], length, atol=0.03)


@functools.cache
def big():
    params, batch = initial(784, 512, 10), data(128, 784, 10)
    return params, jax.jit(jax.grad(LOSS))(params, batch)


# The estimators.


def always_one(key, h):
    return jnp.ones(h.shape[:-1], int)


# The same labels and signs in every precision.
FIXED = categorical._replace(
    sample=always_one,
    factor_product=lambda h, v: categorical.factor_product(h, jnp.ones_like(v)),
)
ESTIMATORS = {
    "empirical": fisher_empirical(mlp, FIXED),
    "exact": fisher_exact(mlp, FIXED),
    "i1": fisher_i1(mlp, FIXED, key=KEY),
    "hutchinson": fisher_hutchinson(mlp, FIXED, key=KEY),
    "gnb": fisher_gnb(mlp, FIXED, key=KEY),
    "i2": fisher_i2(mlp, FIXED, key=KEY),
}


@functools.partial(jax.jit, static_argnums=0)
def estimate(name, params, batch):
    return diagonal(ESTIMATORS[name], params, batch)


def with_reference(name, dtype):
    """Returns a diagonal, and that in float64 of the same numbers."""
    small = initial(4, 6, 3)
    x, y = data(2048, 4, 3)
    params, x = cast(small, dtype), x.astype(dtype)
    half = jax.tree.map(np.asarray, estimate(name, params, (x, y)))
    with oracles.x64():
        wide = jax.tree.map(lambda w: jax.device_put(np.float64(w)), (params, x))
        full = jax.tree.map(np.asarray, estimate(name, wide[0], (wide[1], y)))
    return half, full


# The relative errors that are stated, with a factor of 2 or more to spare.
STATED = {"bfloat16": 2e-3, "float16": 2e-4, "float32": 1e-5}
# Autodiff sums over the batch in the dtype of the model; and second derivatives.
OTHERS = {
    "gnb": {"bfloat16": 2e-2, "float16": 2e-3, "float32": 1e-5},
    "i2": {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-5},
}


@pytest.mark.short("empirical-float16")
@pytest.mark.parametrize("dtype", STATED)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_accumulate_in_float32(name, dtype):
    """2048 terms: in bfloat16, a sum of like terms would stop at the 256th."""
    half, full = with_reference(name, dtype)
    for leaf, expected in full.items():
        assert expected.dtype == np.float64
        assert half[leaf].dtype == np.float32
        error = np.linalg.norm(half[leaf] - expected) / np.linalg.norm(expected)
        assert error < OTHERS.get(name, STATED)[dtype], (leaf, error)


# The scale of the loss.

GEOMETRIES = {
    "SAM": euclidean_ball(0.05),
    "ASAM": adaptive_ellipsoid(0.5),
    "Fisher SAM": fisher_ellipsoid(0.1, squared_gradient()),
    "Fisher SAM, damped": fisher_ellipsoid(0.1, squared_gradient(), damping=0.1),
    "Fisher SAM, exact": fisher_ellipsoid(
        0.1, fisher_exact(mlp, categorical), relative=False
    ),
}


@functools.cache
def scaled_step(name):
    @jax.jit
    def run(scale):
        def loss(params, batch):
            return scale * LOSS(params, batch)

        f = value_and_grad(loss, GEOMETRIES[name])
        return f(PARAMS, f.init(PARAMS), BATCH)

    return run


def test_half_precision_where_dtypes_are_promoted_only_as_asked():
    nll = negative_log_likelihood(lambda w, x: x @ w["k"] + w["b"][None], categorical)
    params = cast({"k": jnp.ones((6, 3)) / 4, "b": jnp.zeros(3)}, jnp.bfloat16)
    x, y = data(4, 6, 3)
    ball = fisher_ellipsoid(0.1, fisher_empirical(nll))
    f = value_and_grad(nll, ball, micro_batches=2)
    state = f.init(params)

    def figures(params, x):
        batch = x, y
        _, grads, _ = f(params, state, batch)
        exact = diagonal(fisher_exact(nll), params, batch)
        return (
            grads,
            exact,
            loss_power_sums(lambda w, x: jnp.sum(x @ w["k"]), params, x, powers=(1, 4)),
        )

    x = x.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(figures)(params, x)
    jax.tree.map(np.testing.assert_array_equal, found, jax.jit(figures)(params, x))


@pytest.mark.short("Fisher SAM, damped")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_scale_of_the_loss_changes_no_perturbation(name):
    value, grads, state = scaled_step(name)(1.0)
    for scale in (2.0**15, 2.0**-15, 1e3, 1e12, 1e-12):
        scaled_value, scaled_grads, scaled_state = scaled_step(name)(scale)
        np.testing.assert_allclose(scaled_value, scale * value, rtol=1e-5)
        for leaf in PARAMS:
            bound = 1e-5 * scale * np.max(np.abs(grads[leaf]))
            np.testing.assert_allclose(
                scaled_grads[leaf], scale * grads[leaf], rtol=1e-5, atol=bound
            )
        for same in ("perturbation_norm", "gradient_cosine"):
            np.testing.assert_allclose(
                getattr(scaled_state.metrics, same),
                getattr(state.metrics, same),
                rtol=1e-5,
            )
        np.testing.assert_allclose(
            scaled_state.perturbation.dual_norm,
            scale * state.perturbation.dual_norm,
            rtol=1e-5,
        )


@pytest.mark.long
def test_an_absolute_squared_gradient_has_the_scale_of_the_loss_squared():
    tx = fisher_ellipsoid(0.1, squared_gradient(), relative=False)
    for scale in (1.0, 100.0):
        grads = jax.tree.map(lambda g, c=scale: c * g, GRADS)
        eps, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
        fisher = jax.tree.map(lambda g: g**2, grads)
        expected, _ = oracles.perturbation(
            0.1, grads, oracles.fisher_scale(fisher, relative=False)
        )
        for leaf in PARAMS:
            np.testing.assert_allclose(eps[leaf], expected[leaf], rtol=1e-5)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**24])
def test_loss_scaling_in_float16(scale):
    """Scaled gradients that fit float16 give eps as it is, too large ones none."""
    wide = jax.tree.map(lambda g: scale * g, GRADS)
    grads = cast(wide, "float16")
    fits = all(np.all(np.isfinite(g)) for g in grads.values())
    assert fits == (scale == 2.0**10)
    tx = euclidean_ball(0.05)
    eps, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    if fits:
        error = oracles.flat(eps) - oracles.flat(expected)
        assert np.linalg.norm(error) < 1e-3 * 0.05
    else:
        assert not any(np.any(e) for e in eps.values())
        assert state.skipped == 1


def test_natural_gradients_have_the_scale_of_the_loss():
    tx = scale_by_inverse_fisher(fisher_exact(mlp, categorical), damping=0.1)
    update = jax.jit(lambda grads: tx.update(grads, (), PARAMS, batch=BATCH)[0])
    expected = update(GRADS)
    scaled = update(jax.tree.map(lambda g: 1024 * g, GRADS))
    for leaf in PARAMS:
        np.testing.assert_array_equal(scaled[leaf], 1024 * expected[leaf])


@pytest.mark.short("True", "False")
@pytest.mark.parametrize("transposed", [False, True])
def test_triangular_systems_are_solved_as_the_gradient_solves_them(transposed):
    """Of condition number 1e4: the inverse would lose more digits."""
    rng = np.random.default_rng(0)
    n = 24
    q, r = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    lower = np.float32(np.linalg.qr(q @ np.diag(np.geomspace(1, 1e-4, n)) @ r)[1].T)
    system = np.float64(lower.T if transposed else lower)
    x = np.float32(rng.normal(size=(16, n)) @ system)
    w = np.float32(system @ rng.normal(size=(n, n)) / 5)

    def loss(w, x):
        solve = jax.scipy.linalg.solve_triangular
        w = solve(jnp.asarray(lower), w, lower=True, trans=int(transposed))
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    h = np.tanh(x @ np.linalg.solve(system, np.float64(w)))
    y = np.linalg.solve(system.T, np.float64(x.T))
    expected = y**2 @ (2 * h * (1 - h * h)) ** 2
    formed = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(w, x)
    formed = np.sum(np.float64(formed) ** 2, 0)
    (found,) = jax.jit(functools.partial(loss_power_sums, loss))(w, x)
    error, of_gradients = (
        np.max(np.abs(s - expected)) / np.max(expected) for s in (found, formed)
    )
    assert error <= 1.3 * of_gradients


def test_no_cosine_is_told_of_a_vector_that_is_too_long():
    y = jnp.ones(4, jnp.float32)
    length, cosine = jax.jit(lambda x: norm_and_cosine([x], [y], jnp.float32(2.0), ()))(
        jnp.full(4, 3e38, jnp.float32)
    )
    assert jnp.isinf(length) and jnp.isnan(cosine)

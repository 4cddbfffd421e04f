"""Measures of sharpness, against closed forms, trust regions and sums over labels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import fsam_optax as fsam


RHO = 0.3
RNG = np.random.default_rng(0)
SHAPES = {"b": (3,), "k": (2, 3)}
PARAMS = {n: jax.device_put(np.float32(RNG.normal(size=s))) for n, s in SHAPES.items()}
GRADS = {n: jax.device_put(np.float32(RNG.normal(size=s))) for n, s in SHAPES.items()}
FISHER = {n: jax.device_put(np.float32(RNG.uniform(size=s))) for n, s in SHAPES.items()}
FACTOR = RNG.normal(size=(9, 4))
CONVEX = FACTOR @ FACTOR.T
INDEFINITE = CONVEX - 2 * np.eye(9)


def sharpness(loss_fn, params, *args, **kwargs):
    """Compiled as one program, which is quicker than one operation after the other."""
    f = jax.jit(lambda params: fsam.sharpness(loss_fn, params, *args, **kwargs))
    return f(params)


def compiled(f, model, likelihood, *args):
    """Returns a divergence, likewise."""
    return jax.jit(lambda *args: f(model, likelihood, *args))(*args)


def quadratic(hessian):
    """Returns a loss with gradient GRADS and the given Hessian at PARAMS."""

    def loss(params, batch):
        del batch
        e = jnp.concatenate([(params[n] - PARAMS[n]).ravel() for n in SHAPES])
        g = jnp.concatenate([GRADS[n].ravel() for n in SHAPES])
        return jnp.sum(g * e) + e @ jnp.asarray(hessian, e.dtype) @ e / 2

    return loss


GEOMETRIES = {
    "euclidean": (fsam.euclidean_ball(RHO), oracles.no_scale(PARAMS), 2),
    "cubic": (fsam.euclidean_ball(RHO, ord=3), oracles.no_scale(PARAMS), 3),
    "box": (fsam.euclidean_ball(RHO, ord=np.inf), oracles.no_scale(PARAMS), np.inf),
    "adaptive": (
        fsam.adaptive_ellipsoid(RHO, eta=0.1),
        oracles.asam_scale(PARAMS, 0.1),
        2,
    ),
    "fisher": (
        fsam.fisher_ellipsoid(RHO, fsam.given()),
        oracles.fisher_scale(FISHER),
        2,
    ),
}


@pytest.fixture(params=GEOMETRIES)
def geometry(request):
    """The perturbation, its T as a vector, its p and its extra arguments."""
    tx, scale, ord = GEOMETRIES[request.param]
    extra = {"fisher": FISHER} if request.param == "fisher" else {}
    return tx, oracles.flat(scale), ord, extra


def rise_at(e, hessian):
    return oracles.flat(GRADS) @ e + e @ hessian @ e / 2


@pytest.mark.short("fisher")
def test_one_step_on_a_quadratic_is_its_closed_form(geometry):
    tx, t, ord, extra = geometry
    scale = dict(zip(SHAPES, np.split(t, [3]), strict=True))
    scale = {n: x.reshape(SHAPES[n]) for n, x in scale.items()}
    eps, dual_norm = oracles.perturbation(RHO, GRADS, scale, ord)
    found = sharpness(quadratic(INDEFINITE), PARAMS, None, tx, **extra)
    expected = rise_at(oracles.flat(eps), INDEFINITE)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Linear: the rise that the dual norm foretells.
    found = sharpness(quadratic(np.zeros((9, 9))), PARAMS, None, tx, **extra)
    np.testing.assert_allclose(found, RHO * dual_norm, rtol=1e-5)


def trust_region(t, hessian):
    """Largest rise in the ellipsoid, by the secular equation."""
    from scipy.optimize import brentq  # Here, as it takes long to import.

    values, vectors = np.linalg.eigh(t[:, None] * hessian * t)
    g = vectors.T @ (t * oracles.flat(GRADS))

    def excess(shift):
        return np.sum((g / (shift - values)) ** 2) - RHO**2

    low, high = values[-1] + 1e-12, values[-1] + 10 * np.linalg.norm(g) / RHO
    z = g / (brentq(excess, low, high, xtol=1e-14) - values)
    return rise_at(t * (vectors @ z), hessian)


@pytest.mark.short("indefinite")
@pytest.mark.parametrize(
    "name, hessian",
    [
        ("euclidean", CONVEX),
        ("euclidean", INDEFINITE),
        ("adaptive", INDEFINITE),
        ("fisher", CONVEX),
    ],
    ids=["euclidean", "indefinite", "adaptive", "fisher"],
)
def test_many_steps_find_the_trust_region_optimum(name, hessian):
    tx, scale, _ = GEOMETRIES[name]
    extra = {"fisher": FISHER} if name == "fisher" else {}
    optimum = trust_region(oracles.flat(scale), hessian)
    found = sharpness(quadratic(hessian), PARAMS, None, tx, steps=60, **extra)
    np.testing.assert_allclose(found, optimum, rtol=1e-5)
    # One step, whose closed form is tested above, is not enough.
    eps, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra)
    assert rise_at(oracles.flat(eps), hessian) < 0.98 * optimum


def test_no_corner_of_a_box_is_higher():
    diagonal = np.abs(RNG.normal(size=9))
    tx = fsam.euclidean_ball(RHO, ord=np.inf)
    highest = np.sum(RHO * np.abs(oracles.flat(GRADS)) + diagonal * RHO**2 / 2)
    for steps in (1, 5):
        found = sharpness(quadratic(np.diag(diagonal)), PARAMS, None, tx, steps)
        np.testing.assert_allclose(found, highest, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["cubic", "box", "adaptive"])
def test_the_ascent_stays_in_the_ball_and_never_falls(name):
    tx, scale, ord = GEOMETRIES[name]
    t = oracles.flat(scale)

    def wavy(params, batch):
        del batch
        e = jnp.concatenate([(params[n] - PARAMS[n]).ravel() for n in SHAPES])
        z = e / jnp.asarray(t, e.dtype)
        size = jnp.max(jnp.abs(z)) if ord == np.inf else jnp.sum(jnp.abs(z) ** ord)
        bound = RHO if ord == np.inf else RHO**ord
        wave = jnp.sum(jnp.sin(9 * e + jnp.arange(9.0))) + jnp.sum(e**2)
        return jnp.where(size > 1.0001 * bound, jnp.inf, wave)

    rises = [float(sharpness(wavy, PARAMS, None, tx, steps)) for steps in (1, 2, 20)]
    assert np.isfinite(rises).all()
    # Each is compiled on its own: equal but for rounding.
    assert rises[1] >= max(0, rises[0]) - 1e-5
    assert rises[2] >= rises[1] - 1e-5
    assert rises[-1] > rises[0] + 0.01


def test_a_maximum_inside_the_ball_is_found():
    def loss(w, batch):
        del batch
        return -jnp.sum((w - jnp.array([0.1, 0.0])) ** 2)

    ball = fsam.euclidean_ball(1.0)
    assert sharpness(loss, jnp.zeros(2), None, ball) < 0
    found = sharpness(loss, jnp.zeros(2), None, ball, steps=30)
    np.testing.assert_allclose(found, 0.01, rtol=1e-3)


X = jax.device_put(np.float32(RNG.normal(size=(6, 2))))
Y = jax.device_put(RNG.integers(0, 3, 6))


def net(params, x):
    return jnp.tanh(x @ params["k"]) + params["b"][None]


def drawn():
    """Returns an estimator that draws another diagonal in every update."""

    def update(updates, state, params=None):
        del params
        following, key = jax.random.split(state)
        return jax.tree.map(lambda g: jax.random.uniform(key, g.shape), updates), (
            following
        )

    return optax.GradientTransformation(lambda params: jax.random.key(3), update)


@pytest.mark.short("euclidean")
@pytest.mark.parametrize(
    "tx",
    [
        fsam.euclidean_ball(2.0),
        fsam.adaptive_ellipsoid(2.0, mask={"b": False, "k": True}),
        fsam.fisher_ellipsoid(2.0, fsam.squared_gradient()),
        fsam.fisher_ellipsoid(2.0, drawn()),
    ],
    ids=["euclidean", "masked", "squared", "drawn"],
)
def test_one_step_is_the_metric_of_value_and_grad(tx):
    loss_fn = fsam.negative_log_likelihood(net, fsam.categorical)
    oracle = fsam.value_and_grad(loss_fn, tx)
    _, _, state = jax.jit(oracle)(PARAMS, oracle.init(PARAMS), (X, Y))
    found = sharpness(loss_fn, PARAMS, (X, Y), tx)
    np.testing.assert_allclose(found, state.sharpness, rtol=1e-6)


@pytest.mark.long
def test_the_draws_of_an_estimator_are_the_same_in_every_step():
    loss_fn, estimator = quadratic(INDEFINITE), drawn()
    fisher, _ = estimator.update(GRADS, estimator.init(PARAMS))
    found, expected = (
        sharpness(
            loss_fn, PARAMS, None, fsam.fisher_ellipsoid(2.0, f), 5, fisher=fisher
        )
        for f in (estimator, fsam.given())
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_it_compiles_once_in_any_float():
    traces = []
    ball = fsam.euclidean_ball(RHO)
    wanted = fsam.sharpness(quadratic(CONVEX), PARAMS, None, ball, steps=3)

    @jax.jit
    def jitted(params):
        traces.append(None)
        return fsam.sharpness(quadratic(CONVEX), params, None, ball, steps=3)

    for _ in range(2):
        np.testing.assert_allclose(jitted(PARAMS), wanted, rtol=1e-6)
    assert len(traces) == 1
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    assert jax.eval_shape(jitted, half).dtype == jnp.float32


@pytest.mark.long
def test_float64_stays(x64):
    def loss(w, batch):
        return jnp.sum(batch * w)

    w = jnp.ones(2, jnp.float64)
    batch = jnp.array([3.0, 4.0])
    for steps in (1, 2):
        found = fsam.sharpness(loss, w, batch, fsam.euclidean_ball(0.1), steps=steps)
        np.testing.assert_allclose(found, 0.5, rtol=1e-13)


@pytest.mark.short("4")
@pytest.mark.parametrize("steps", [1, 4])
def test_what_is_not_finite(steps):
    ball = fsam.euclidean_ball(1.0)

    def rise(loss, w=1.0):
        loss_fn = lambda w, batch: loss(w)  # noqa: E731
        return sharpness(loss_fn, jnp.asarray(w), None, ball, steps)

    assert rise(jnp.sqrt, 0.0) == 0  # The gradient is infinite.
    assert rise(jnp.square, 0.0) == 0  # The gradient is 0.
    assert np.isnan(rise(jnp.log, -1.0))
    assert rise(lambda w: jnp.where(w > 1.5, jnp.inf, w)) == jnp.inf
    uphill_to_nan = rise(lambda w: jnp.where(w > 1.6, jnp.nan, w))
    if steps == 1:
        assert np.isnan(uphill_to_nan)
    else:
        np.testing.assert_allclose(uphill_to_nan, 0.5, rtol=1e-6)


def test_wrong_arguments_of_sharpness_are_refused():
    ball = fsam.euclidean_ball(0.1)
    loss = quadratic(CONVEX)
    with pytest.raises(TypeError, match="perturbation"):
        fsam.sharpness(loss, PARAMS, None, lambda g: g)  # pyright: ignore
    with pytest.raises(ValueError, match="steps"):
        fsam.sharpness(loss, PARAMS, None, ball, steps=0)
    with pytest.raises(TypeError, match="scalar loss"):
        fsam.sharpness(lambda w, batch: w["b"], PARAMS, None, ball)
    with pytest.raises(TypeError, match="int32"):
        fsam.sharpness(loss, {"b": jnp.arange(3, dtype=jnp.int32)}, None, ball)


# Divergences.


def log_poisson(h, y):
    return y * h - np.exp(h) - np.cumsum(np.log(np.maximum(np.arange(200), 1)))[y]


def divergences(name, h, k):
    """Returns KL(h || k) of each entry, or of each row for `categorical`."""
    if name == "gaussian":
        return (h - k) ** 2 / (2 * 0.5**2)
    if name == "categorical":
        p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (h, k))
        return np.sum(p * np.log(p / q), -1)
    if name == "bernoulli":
        p, q = 1 / (1 + np.exp(-h)), 1 / (1 + np.exp(-k))
        return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    y = np.arange(200)
    old, new = (log_poisson(x[..., None], y) for x in (h, k))
    return np.sum(np.exp(old) * (old - new), -1)


LIKELIHOODS = {
    "categorical": fsam.categorical,
    "bernoulli": fsam.bernoulli,
    "gaussian": fsam.gaussian(0.5),
    "poisson": fsam.poisson,
}
EPS = {n: jax.device_put(np.float32(RNG.normal(size=s))) for n, s in SHAPES.items()}


def sequence(params, x):
    """Two positions of three labels."""
    h = net(params, x)
    return jnp.stack([h, 1 - h], axis=1)


@pytest.mark.parametrize(
    "name, model",
    [*((name, net) for name in LIKELIHOODS), ("categorical", sequence)],
    ids=[*LIKELIHOODS, "sequence"],
)
def test_divergences_are_sums_over_all_labels(name, model):
    h, k = (
        np.asarray(model(w, X), np.float64)
        for w in (PARAMS, jax.tree.map(jnp.add, PARAMS, EPS))
    )
    expected = divergences(name, h, k).sum() / h[..., 0].size  # The number of labels.
    found = compiled(fsam.kl_divergence, model, LIKELIHOODS[name], PARAMS, EPS, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.short("poisson")
@pytest.mark.parametrize("name", ["categorical", "poisson"])
def test_the_prediction_is_the_quadratic_form_of_the_fisher(name, x64):
    wide, eps = (
        jax.tree.map(lambda x: x.astype(jnp.float64), t) for t in (PARAMS, EPS)
    )
    args = net, LIKELIHOODS[name]

    @jax.jit
    def quantities(wide, eps):
        matrix = fsam.dense_fisher(*args, wide, (X, None))
        short = [optax.tree.scale(length, eps) for length in (1e-3, 5e-4)]
        divergences = [fsam.kl_divergence(*args, wide, e, X) for e in short]
        found = fsam.kl_divergence_quadratic(*args, wide, eps, X)
        return matrix, found, divergences

    matrix, found, (one, half) = quantities(wide, eps)
    e = oracles.flat(eps)
    np.testing.assert_allclose(found, e @ matrix @ e / 2, rtol=1e-12)
    # The two agree to first order in the length of eps.
    errors = one / (found * 1e-6) - 1, half / (found * 0.25e-6) - 1
    assert 0 < abs(errors[0]) < 1e-2
    np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=1e-2)


def test_a_linear_gaussian_diverges_by_the_quadratic_form_exactly(x64):
    w, eps, x = (jnp.asarray(RNG.normal(size=s)) for s in ((4, 2), (4, 2), (9, 4)))
    model = lambda w, x: x @ w  # noqa: E731
    found, predicted = (
        compiled(f, model, fsam.gaussian(0.7), w, 100 * eps, x)
        for f in (fsam.kl_divergence, fsam.kl_divergence_quadratic)
    )
    np.testing.assert_allclose(found, predicted, rtol=1e-12)
    expected = np.sum(np.square(x @ (100 * eps))) / (2 * 9 * 0.7**2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.long
def test_fisher_sam_without_damping_has_a_radius_in_nats():
    # An input excites one weight: the Fisher information is diagonal.
    w, x = jnp.array([0.5, -1.0, 2.0]), jnp.diag(jnp.array([1.0, 3.0, 0.1]))
    model = lambda w, x: (x @ w)[:, None]  # noqa: E731
    estimator = fsam.fisher_exact(model, fsam.bernoulli)
    ball = fsam.fisher_ellipsoid(RHO, estimator, damping=0.0, relative=False)
    grads = jnp.array([1.0, -2.0, 0.3])
    eps, _ = ball.update(grads, ball.init(w), w, batch=(x, None))
    found = fsam.kl_divergence_quadratic(model, fsam.bernoulli, w, eps, x)
    np.testing.assert_allclose(found, RHO**2 / 2, rtol=1e-5)


def test_short_perturbations_of_bfloat16_are_not_rounded_away():
    w, eps = jnp.ones((2, 1), jnp.bfloat16), jnp.full((2, 1), 1e-3, jnp.float32)
    model = lambda w, x: x @ w  # noqa: E731
    for f in (fsam.kl_divergence, fsam.kl_divergence_quadratic):
        found = compiled(f, model, fsam.gaussian(1e-3), w, eps, X)
        expected = np.mean(np.square(X.sum(1))) / 2
        np.testing.assert_allclose(found, expected, rtol=1e-2)
        assert found.dtype == jnp.float32


def test_a_likelihood_without_the_optional_fields_will_do():
    plain = fsam.categorical._replace(
        factor_product=None, fourth_moment=None, bounds=None
    )
    found, expected = (
        compiled(fsam.kl_divergence_quadratic, net, likelihood, PARAMS, EPS, X)
        for likelihood in (plain, fsam.categorical)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("f", [fsam.kl_divergence, fsam.kl_divergence_quadratic])
def test_wrong_perturbations_are_refused(f):
    with pytest.raises(ValueError, match=r"`eps` .*'b'"):
        f(net, fsam.categorical, PARAMS, {"k": EPS["k"]}, X)


# Lines and planes.


def bowl(params):
    return jnp.sum(params["k"] ** 2) * jnp.sum(jnp.cos(params["b"]))


def at(alpha, beta=0.0):
    point = {n: PARAMS[n] + alpha * EPS[n] + beta * GRADS[n] for n in SHAPES}
    return float(bowl(point))


def test_losses_along_a_line_and_over_a_plane():
    alphas, betas = np.array([-1.0, 0.0, 0.5]), np.array([0.0, 2.0])
    line = fsam.loss_along(bowl, PARAMS, EPS, alphas)
    np.testing.assert_allclose(line, [at(a) for a in alphas], rtol=1e-5)
    assert line[1] == bowl(PARAMS)
    shaped = fsam.loss_along(bowl, PARAMS, EPS, alphas[:, None])
    np.testing.assert_array_equal(shaped, line[:, None])
    assert fsam.loss_along(bowl, PARAMS, EPS, 1).shape == ()
    plane = fsam.loss_over_plane(bowl, PARAMS, EPS, GRADS, alphas, betas)
    expected = [[at(a, b) for b in betas] for a in alphas]
    np.testing.assert_allclose(plane, expected, rtol=1e-5)


def test_wrong_directions_are_refused():
    with pytest.raises(ValueError, match="`direction` must have"):
        fsam.loss_along(bowl, PARAMS, {"k": EPS["k"]}, 1.0)
    with pytest.raises(ValueError, match="`second` must have"):
        fsam.loss_over_plane(bowl, PARAMS, EPS, {}, jnp.arange(2), jnp.arange(2))
    with pytest.raises(TypeError, match="scalar loss"):
        fsam.loss_along(lambda w: w["b"], PARAMS, EPS, jnp.arange(2))


@pytest.mark.long
def test_random_directions_are_as_long_as_each_filter():
    rng = np.random.default_rng(0)
    w = {
        "conv": jax.device_put(np.float32(rng.normal(size=(3, 3, 2, 4)))),
        "half": jnp.asarray(rng.normal(size=(5, 3)), jnp.bfloat16),
        "stacked": jax.device_put(np.float32(rng.normal(size=(6, 4, 5)))),
        "zero": jnp.zeros((3, 2)),
        "bias": jnp.ones(4),
    }
    layers = {"stacked": 0}
    d = fsam.random_direction(
        w, jax.random.key(1), layer_axis=lambda path, _: layers.get(path[0].key)
    )
    for name, over in {"conv": (0, 1, 2), "half": 0, "stacked": 1, "zero": 0}.items():
        a, b = (np.asarray(x[name], float) for x in (d, w))
        tolerance = 1e-2 if name == "half" else 1e-5
        lengths = [np.sqrt(np.sum(x**2, over)) for x in (a, b)]
        np.testing.assert_allclose(*lengths, rtol=tolerance)
        assert d[name].dtype == w[name].dtype
    assert not np.any(d["bias"]) and np.std(d["conv"]) > 0.5
    # Filters that are rescaled are followed by their direction, and so is the loss.
    scale = jnp.array([0.1, 1.0, 10.0, 1e3], jnp.float32)
    other = fsam.random_direction(
        w | {"conv": w["conv"] * scale[None, None, None]}, jax.random.key(1)
    )
    np.testing.assert_allclose(
        other["conv"] / scale[None, None, None], d["conv"], rtol=1e-5
    )
    wrongs: list[Any] = [0, jnp.ones(2)]
    for wrong in wrongs:
        with pytest.raises(TypeError, match="`key` must be a PRNG key"):
            fsam.random_direction(w, wrong)
    with pytest.raises(ValueError, match="`filter_axis` is 7"):
        fsam.random_direction(w, jax.random.key(0), filter_axis=7)

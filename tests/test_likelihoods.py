"""Likelihoods against autodiff and against sums over all labels."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsam_optax._fisher.likelihoods import (
    bernoulli,
    categorical,
    factor_product,
    gaussian,
    Likelihood,
    poisson,
)


LIKELIHOODS = {
    "categorical": categorical,
    "bernoulli": bernoulli,
    "gaussian": gaussian(),
    "gaussian of scale 0.5": gaussian(0.5),
    "poisson": poisson,
}
H = jnp.array([0.3, -0.8, 1.1])


@pytest.fixture(params=LIKELIHOODS)
def name(request):
    return request.param


@pytest.fixture
def likelihood(name):
    return LIKELIHOODS[name]


@functools.cache
def labels_and_probabilities(name):
    """Returns labels whose weighted sums are expectations given H, and their weights.

    All labels of discrete likelihoods (counts up to 24); for Gaussians, the nodes of
    a quadrature that is exact for polynomials up to the ninth degree.
    """
    if name.startswith("gaussian"):
        nodes, weights = np.polynomial.hermite_e.hermegauss(5)
        scale = 0.5 if name.endswith("0.5") else 1.0
        labels = np.array(list(itertools.product(nodes, repeat=3))) * scale
        weights = np.array(list(itertools.product(weights, repeat=3))).prod(axis=1)
        return jnp.asarray(labels + np.asarray(H)), weights / weights.sum()
    if name == "categorical":
        labels = jnp.arange(3)
    else:
        values = range(2 if name == "bernoulli" else 25)
        labels = jnp.array(list(itertools.product(values, repeat=3)))
    log_prob = jax.jit(jax.vmap(LIKELIHOODS[name].log_prob, (None, 0)))
    return labels, np.exp(log_prob(H, labels), dtype=np.float64)


@functools.cache
def scores_and_probabilities(name):
    labels, p = labels_and_probabilities(name)
    scores = jax.jit(jax.vmap(LIKELIHOODS[name].score, (None, 0)))(H, labels)
    return np.asarray(scores, np.float64), p


def everything(likelihood, h, y, u):
    return (
        likelihood.log_prob(h, y),
        likelihood.score(h, y),
        likelihood.factor(h),
        likelihood.fourth_moment(h, u),
        *likelihood.bounds(h),
    )


def unit_vectors(size):
    random = np.random.default_rng(0).normal(size=(200, size))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    return jnp.asarray(np.concatenate([np.eye(size), random]), jnp.float32)


@pytest.mark.short("categorical", "poisson")
def test_score_is_the_derivative_of_log_prob(name, likelihood):
    labels, _ = labels_and_probabilities(name)
    scores, _ = scores_and_probabilities(name)
    expected = jax.jit(jax.vmap(jax.grad(likelihood.log_prob), (None, 0)))(H, labels)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_score_of_soft_labels_that_do_not_sum_to_one():
    """As of smoothed labels with weights, or of counts."""
    y = jnp.array([2.0, 0.0, 0.5])
    np.testing.assert_allclose(
        categorical.score(H, y),
        jax.grad(categorical.log_prob)(H, y),
        rtol=1e-5,
        atol=1e-6,
    )


@functools.cache
def factor_of(likelihood):
    return jax.jit(lambda h: likelihood.factor(h))


@functools.cache
def bounds_of(likelihood):
    return jax.jit(lambda h: likelihood.bounds(h))


@functools.cache
def fourth_moments_of(likelihood):
    """Returns a function of h and of vectors."""
    return jax.jit(jax.vmap(likelihood.fourth_moment, (None, 0)))


def test_score_has_mean_zero_and_the_covariance_of_the_factor(name, likelihood):
    scores, p = scores_and_probabilities(name)
    factor = np.asarray(factor_of(likelihood)(H))
    np.testing.assert_allclose(p @ scores, 0, atol=1e-5)
    np.testing.assert_allclose(
        factor @ factor.T, (scores.T * p) @ scores, rtol=1e-4, atol=1e-6
    )


def test_factor_is_that_of_minus_the_hessian(name, likelihood):
    """h is the natural parameter: the Hessian is the same for all labels."""
    factor = np.asarray(factor_of(likelihood)(H))
    hessian_of = jax.jit(jax.hessian(likelihood.log_prob))
    for y in labels_and_probabilities(name)[0][:3]:
        hessian = hessian_of(H, y)
        np.testing.assert_allclose(factor @ factor.T, -hessian, rtol=1e-5, atol=1e-6)


def test_factor_product_is_a_product_with_the_factor(likelihood):
    factor = np.asarray(factor_of(likelihood)(H))
    v = np.random.default_rng(0).normal(size=factor.shape[-1:]).astype("float32")

    @jax.jit
    def products(v):
        plain = likelihood._replace(factor_product=None)
        return factor_product(likelihood, H, v), factor_product(plain, H, v)

    for found in products(v):
        np.testing.assert_allclose(found, factor @ v, rtol=1e-5, atol=1e-6)


def test_categorical_factor_has_as_many_columns_as_its_rank():
    factor = factor_of(categorical)(H)
    assert factor.shape == (3, 2)
    assert np.linalg.matrix_rank(factor) == 2


@pytest.mark.short("categorical", "bernoulli", "gaussian")
def test_fourth_moment_is_that_of_the_score(name, likelihood):
    scores, p = scores_and_probabilities(name)
    u = unit_vectors(3)
    moments = fourth_moments_of(likelihood)(H, u)
    expected = p @ (scores @ np.asarray(u).T) ** 4
    np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("h", [H, jnp.zeros(3), 4 * H, jnp.array([5.0, -2, -2])])
def test_bounds_hold_for_all_directions(name, likelihood, h):
    if name == "poisson":
        h = h / 2
    u = np.asarray(unit_vectors(3))
    factor, bounds = factor_of(likelihood)(h), bounds_of(likelihood)(h)
    factor = np.asarray(factor)
    eigenvalues = np.linalg.eigvalsh(factor @ factor.T)
    second = np.sum((u @ factor) ** 2, axis=1)
    fourth = np.asarray(fourth_moments_of(likelihood)(h, u)) - second**2
    slack = 1e-5 * np.max(fourth)
    assert bounds.fisher_min <= eigenvalues[0] + 1e-6
    assert bounds.fisher_max >= eigenvalues[-1] - 1e-5 * eigenvalues[-1]
    assert (bounds.fourth_min <= fourth + slack).all()
    assert (bounds.fourth_max >= fourth - slack).all()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gaussian_bounds_are_attained(scale):
    bounds = gaussian(scale).bounds(H)
    np.testing.assert_allclose([bounds.fisher_min, bounds.fisher_max], scale**-2)
    np.testing.assert_allclose([bounds.fourth_min, bounds.fourth_max], 2 * scale**-4)


def test_categorical_bounds_are_those_of_theorem_5_2():
    h = jax.random.normal(jax.random.key(0), (50, 7)) * 3
    p = jax.nn.softmax(h)
    m = jnp.minimum(jnp.max(p, axis=1), 1 - jnp.sum(p**2, axis=1))
    bounds = categorical.bounds(h)
    np.testing.assert_allclose(bounds.fisher_max, m, rtol=1e-5, atol=1e-6)
    assert (bounds.fourth_max <= 2 * m).all()


@pytest.mark.short("categorical", "bernoulli")
def test_samples_have_the_moments_of_the_score(name, likelihood):
    n = 10_000
    keys = jax.random.split(jax.random.key(0), n)
    labels = jax.jit(jax.vmap(likelihood.sample, (0, None)))(keys, H)
    scores = jax.jit(jax.vmap(likelihood.score, (None, 0)))(H, labels)
    factor = likelihood.factor(H)
    covariance = factor @ factor.T
    error = np.sqrt(np.diag(covariance) / n)
    assert (np.abs(np.mean(scores, axis=0)) < 5 * error).all()
    squares = np.asarray(scores) ** 2
    error = np.std(squares, axis=0) / np.sqrt(n)
    deviation = np.abs(np.mean(squares, axis=0) - np.diag(covariance))
    assert (deviation <= 5 * error + 1e-6).all()


@pytest.mark.short("categorical", "gaussian")
def test_positions_are_independent_of_each_other(likelihood):
    h = jax.random.normal(jax.random.key(0), (2, 4, 3))
    y = likelihood.sample(jax.random.key(1), h)
    u = jax.random.normal(jax.random.key(2), h.shape)

    def each(h, y, u):
        return everything(likelihood, h, y, u)

    together = jax.jit(each)(h, y, u)
    for a, b in zip(together, jax.jit(jax.vmap(jax.vmap(each)))(h, y, u), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.short("categorical", "bernoulli-bfloat16")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_outputs_are_computed_with_in_float32(likelihood, dtype):
    h = H.astype(dtype)
    y = likelihood.sample(jax.random.key(0), h)

    @jax.jit
    def both(h):
        return [
            everything(likelihood, h, y, jnp.ones(3))
            for h in (h, h.astype(jnp.float32))
        ]

    for a, b in zip(*both(h), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


def test_an_absent_label_of_a_class_adds_nothing():
    h = np.array([[1.0, 2.0, 3.0]] * 2, np.float32)
    log_p = categorical.log_prob(h, np.array([-1, 2]))
    assert log_p[0] == 0 and log_p[1] < 0


@pytest.mark.parametrize("size", [1e4, 3e38])
@pytest.mark.parametrize("likelihood", [categorical, bernoulli], ids=["cat", "bern"])
def test_a_sure_model_is_finite_and_has_no_fisher(likelihood, size):
    h = jnp.array([size, -size, -size])
    y = likelihood.sample(jax.random.key(0), h)
    log_prob, *zeros = jax.jit(functools.partial(everything, likelihood))(
        h, y, jnp.ones(3)
    )
    assert np.isfinite(log_prob)
    assert np.isfinite(likelihood.log_prob(h / 4, 1 - y))
    for x in zeros:
        np.testing.assert_array_equal(x, 0)


def test_categorical_accepts_logits_of_minus_infinity():
    h = jnp.array([0.5, -jnp.inf, 0.5])
    np.testing.assert_allclose(jnp.exp(categorical.log_prob(h, 0)), 0.5)
    factor = categorical.factor(h)
    expected = [[0.25, 0, -0.25], [0, 0, 0], [-0.25, 0, 0.25]]
    np.testing.assert_allclose(factor @ factor.T, expected, atol=1e-7)


def test_probabilities_are_normalised(name):
    _, p = labels_and_probabilities(name)
    np.testing.assert_allclose(np.sum(p), 1, rtol=1e-5)


def test_gaussian_log_prob_is_a_density():
    y = jnp.linspace(-8, 8, 2001)[:, None]
    density = jnp.exp(gaussian(0.7).log_prob(jnp.full_like(y, 0.4), y))
    np.testing.assert_allclose(jnp.sum(density) * (y[1, 0] - y[0, 0]), 1, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match="`scale`"):
        gaussian(scale)


def test_scale_may_be_traced():
    score = jax.jit(lambda s: gaussian(s).score(jnp.zeros(1), jnp.ones(1)))(2.0)
    np.testing.assert_allclose(score, 0.25)


def test_optional_fields_may_be_left_out():
    mine = Likelihood(*categorical[:4])
    assert mine.fourth_moment is mine.bounds is mine.factor_product is None

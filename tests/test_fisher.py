"""Estimators of the Fisher diagonal, against sums over all labels, signs and draws."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fsam_optax._fisher.at_hand import given, squared_gradient
from fsam_optax._fisher.by_group import by_group
from fsam_optax._fisher.diagonal import diagonal
from fsam_optax._fisher.estimators import (
    fisher_empirical,
    fisher_exact,
    fisher_hutchinson,
    fisher_i1,
)
from fsam_optax._fisher.gnb import fisher_gnb
from fsam_optax._fisher.i2 import fisher_i2
from fsam_optax._fisher.likelihoods import bernoulli, categorical, gaussian, poisson
from fsam_optax._fisher.refresh_every import refresh_every


KEY = jax.random.key(0)


def tanh_net(params, x):
    h = jnp.tanh(x @ params["w1"] + params["b1"][None])
    return h @ params["w2"] + params["b2"][None]


def relu_net(params, x):
    h = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    return h @ params["w2"] + params["b2"][None]


def sequence_net(params, x):
    """Two positions of three classes."""
    h = jnp.tanh(x @ params["w1"] + params["b1"][None])
    h = jnp.stack([h, h**2], axis=1)
    return jnp.einsum("nth,hc->ntc", h, params["w2"]) + params["b2"][None, None]


PARAMS = {
    "w1": jax.random.normal(jax.random.key(1), (2, 3)),
    "b1": jax.random.normal(jax.random.key(2), (3,)),
    "w2": jax.random.normal(jax.random.key(3), (3, 3)),
    "b2": jax.random.normal(jax.random.key(4), (3,)),
}
X = jax.random.normal(jax.random.key(5), (3, 2))
Y = jnp.array([2, 0, 0])
BATCH = (X, Y)

# One line for each estimator: `make(model, likelihood)`.
ESTIMATORS = {
    "empirical": fisher_empirical,
    "exact": fisher_exact,
    "i1": functools.partial(fisher_i1, key=KEY),
    "i1, two draws": functools.partial(
        fisher_i1, key=KEY, num_samples=2, standard_error=True
    ),
    "hutchinson": functools.partial(fisher_hutchinson, key=KEY, standard_error=True),
    "gnb": functools.partial(fisher_gnb, key=KEY),
    "i2": functools.partial(fisher_i2, key=KEY),
    "i2, probed": functools.partial(
        fisher_i2, key=KEY, num_samples=2, hessian="hutchinson"
    ),
}
SAMPLED = [name for name in ESTIMATORS if name not in ("empirical", "exact")]
BIG = (jax.random.normal(KEY, (16, 2)), jnp.arange(16) % 3)


@pytest.fixture(params=ESTIMATORS)
def name(request):
    return request.param


@pytest.fixture
def make(name):
    return ESTIMATORS[name]


@pytest.fixture(
    params=[
        pytest.param(x, marks=[pytest.mark.long] if x in ("i1", "i2") else [])
        for x in SAMPLED
    ]
)
def sampled(request):
    return request.param


@functools.cache
def compiled(name):
    """Returns an estimator, its compiled update on BIG, and the count of its traces."""
    traces = []

    def model(params, x):
        traces.append(x.shape)
        return tanh_net(params, x)

    estimator = ESTIMATORS[name](model, categorical)

    @jax.jit
    def update(state, replica=0):
        return estimator.update(None, state, PARAMS, batch=BIG, replica=replica)

    return estimator, update, traces


def run(name, steps, state=None, replica=0):
    """Returns the estimates and the state of some updates."""
    estimator, update, _ = compiled(name)
    state = estimator.init(PARAMS) if state is None else state
    estimates = []
    for _ in range(steps):
        estimate, state = update(state, replica)
        estimates.append(estimate)
    return estimates, state


def differ(a, b):
    return not np.allclose(a["w1"], b["w1"], rtol=1e-4)


def evaluate(estimator, params=PARAMS, batch=BATCH, **extra_args):
    """Returns `diagonal(...)`, compiled."""
    return jax.jit(functools.partial(diagonal, estimator, **extra_args))(params, batch)


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=rtol, atol=atol, equal_nan=False
        ),
        a,
        b,
    )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def mean_over_leading(tree, weights=None):
    return jax.tree.map(
        lambda x: np.average(np.asarray(x, np.float64), 0, weights), tree
    )


def squared_scores(model, likelihood, params, x, y):
    """Returns the squared gradient of each example's log-likelihood."""

    def log_prob(params, x, y):
        return jnp.sum(likelihood.log_prob(model(params, x[None])[0], y))

    grads = jax.vmap(jax.grad(log_prob), (None, 0, 0))(params, x, y)
    return jax.tree.map(jnp.square, grads)


def all_labels(shape, values):
    """Returns all arrays of a shape with entries in 0, ..., values - 1."""
    labels = itertools.product(range(values), repeat=math.prod(shape))
    return jnp.array(list(labels)).reshape(-1, *shape)


def enumerated_fisher(model, likelihood, values, params, x):
    """Returns the Fisher diagonal as a sum over all labels of an example."""
    h = model(params, x)
    shape = likelihood.sample(KEY, h).shape[1:]
    labels = all_labels(shape, values)

    def share(y):
        y = jnp.broadcast_to(y, (len(x), *shape))
        log_prob = likelihood.log_prob(h, y).reshape(len(x), -1)
        p = jnp.exp(jnp.sum(log_prob, axis=1))
        squares = squared_scores(model, likelihood, params, x, y)
        # The mean over labels: of positions, where there are several.
        number = h[..., 0].size
        return jax.tree.map(lambda s: jnp.tensordot(p, s, 1) / number, squares)

    return jax.tree.map(lambda s: jnp.sum(s, 0), jax.jit(jax.vmap(share))(labels))


CASES = {
    "classes": (tanh_net, categorical, 3),
    "kinks": (relu_net, categorical, 3),
    "binary": (tanh_net, bernoulli, 2),
    "sequence": (sequence_net, categorical, 3),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@functools.cache
def truth(model, likelihood, values):
    return enumerated_fisher(model, likelihood, values, PARAMS, X)


# What they estimate.


@pytest.mark.short("sequence")
def test_exact_is_the_sum_over_all_labels(case):
    model, likelihood, _ = case
    estimate = evaluate(fisher_exact(model, likelihood), batch=(X, None))
    close(estimate, truth(*case))


def test_empirical_is_the_mean_square_of_the_scores():
    for model, likelihood, y in (
        (tanh_net, categorical, Y),
        (sequence_net, categorical, jnp.array([[0, 1], [2, 2], [1, 0]])),
        (tanh_net, poisson, jnp.array([[0, 1, 2], [3, 0, 1], [1, 1, 1]])),
        (tanh_net, gaussian(0.5), jax.random.normal(KEY, (3, 3))),
    ):
        scores = jax.jit(functools.partial(squared_scores, model, likelihood))(
            PARAMS, X, y
        )
        estimate = evaluate(fisher_empirical(model, likelihood), batch=(X, y))
        if model is sequence_net:  # The mean over labels, two for each example.
            estimate = jax.tree.map(lambda f: 2 * f, estimate)
        close(estimate, mean_over_leading(scores))


def with_fixed_label(model, likelihood, estimator, y, **options):
    """Returns N times the estimate if all examples drew y, weighted by its chance."""
    h = model(PARAMS, X)
    log_prob = likelihood.log_prob(h, jnp.broadcast_to(y, (len(X), *y.shape)))
    p = jnp.exp(jnp.sum(log_prob.reshape(len(X), -1), axis=1))

    def sample(key, h):
        # The whole batch or one example.
        return jnp.broadcast_to(y, (*h.shape[: h.ndim - 1 - y.ndim], *y.shape))

    if likelihood is bernoulli:

        def sample(key, h):
            return jnp.broadcast_to(y, h.shape)

    fixed = estimator(model, likelihood._replace(sample=sample), key=KEY, **options)
    estimate = diagonal(fixed, PARAMS, (X, None), example_weights=p)
    return jax.tree.map(lambda d: d * jnp.sum(p), estimate)


@pytest.mark.short("fisher_i2-sequence")
@pytest.mark.parametrize(
    ("estimator", "case"),
    [
        (fisher_i1, "binary"),
        (fisher_i1, "sequence"),
        (fisher_i2, "classes"),
        (fisher_i2, "sequence"),
    ],
)
def test_i1_and_i2_are_unbiased_over_labels(estimator, case):
    model, likelihood, values = case = CASES[case]
    shape = likelihood.sample(KEY, model(PARAMS, X)).shape[1:]
    labels = all_labels(shape, values)
    run = functools.partial(with_fixed_label, model, likelihood, estimator)
    shares = jax.jit(jax.vmap(run))(labels)
    close(jax.tree.map(lambda s: jnp.sum(s, 0) / len(X), shares), truth(*case))


@pytest.mark.short("sequence")
@pytest.mark.parametrize("case", ["classes", "binary", "sequence"])
def test_hutchinson_is_unbiased_over_signs(case):
    model, likelihood, _ = case = CASES[case]
    shape = jax.eval_shape(likelihood.factor, model(PARAMS, X)[0]).shape
    shape = (*shape[:-2], shape[-1])
    signs = 2 * all_labels(shape, 2) - 1.0

    def share(signs):
        fixed = likelihood._replace(
            factor_product=lambda h, v: likelihood.factor_product(h, signs + 0 * v)
        )
        return diagonal(fisher_hutchinson(model, fixed, key=KEY), PARAMS, (X, None))

    close(mean_over_leading(jax.jit(jax.vmap(share))(signs)), truth(*case))


@pytest.mark.long
def test_gnb_is_unbiased_over_the_labels_of_the_batch():
    labels = all_labels((3,), 3)
    log_prob = jax.vmap(categorical.log_prob, (None, 0))(tanh_net(PARAMS, X), labels)
    p = jnp.exp(jnp.sum(log_prob, axis=1))

    def share(y):
        fixed = categorical._replace(sample=lambda key, h: y)
        return diagonal(fisher_gnb(tanh_net, fixed, key=KEY), PARAMS, (X, None))

    shares = jax.jit(jax.vmap(share))(labels)
    close(mean_over_leading(shares, p), truth(tanh_net, categorical, 3), rtol=1e-4)


@pytest.mark.long
def test_gnb_is_the_scaled_square_of_the_gradient_at_the_drawn_labels():
    fixed = categorical._replace(sample=lambda key, h: Y)

    def mean_loss(params):
        return -jnp.mean(categorical.log_prob(tanh_net(params, X), Y))

    expected = jax.tree.map(lambda g: 3 * g**2, jax.grad(mean_loss)(PARAMS))
    close(evaluate(fisher_gnb(tanh_net, fixed, key=KEY)), expected)


@pytest.mark.long
@pytest.mark.parametrize("make", ["i1", "hutchinson", "gnb", "i2, probed"])
def test_the_draws_themselves_are_unbiased(make):
    """Over many seeds, each entry is within 5 standard errors of the exact one."""
    n = 300
    estimator = ESTIMATORS[make](tanh_net, categorical)
    estimates = jax.jit(
        jax.vmap(lambda key: diagonal(estimator, PARAMS, (X, None), key=key))
    )(jax.random.split(KEY, n))

    def check(estimates, exact):
        error = np.std(estimates, axis=0) / np.sqrt(n)
        assert (np.abs(np.mean(estimates, axis=0) - exact) < 5 * error + 1e-5).all()

    jax.tree.map(check, estimates, truth(tanh_net, categorical, 3))


# I2.


@pytest.mark.short("2")
@pytest.mark.parametrize("y", [0, 2])
def test_i2_is_minus_the_diagonal_of_the_hessian_at_the_drawn_labels(y):
    fixed = categorical._replace(sample=lambda key, h: jnp.full(h.shape[:-1], y))

    def mean_loss(params):
        return -jnp.mean(categorical.log_prob(tanh_net(params, X), jnp.full(3, y)))

    hessian = jax.jit(jax.hessian(mean_loss))(PARAMS)
    expected = {
        k: jnp.diag(hessian[k][k].reshape(w.size, w.size)).reshape(w.shape)
        for k, w in PARAMS.items()
    }
    estimate = evaluate(fisher_i2(tanh_net, fixed, key=KEY))
    close(estimate, expected)
    # It can be negative, unlike any Fisher.
    assert y != 0 or min(jnp.min(d) for d in estimate.values()) < 0


def pairs(x):
    """Four numbers as two positions of two."""
    return x.reshape(len(x), 2, 2)


def convolved(w, x):
    kernel = w[:, None, :2].T  # (window, in, out)
    axes = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x[..., None], kernel, (2,), "SAME", dimension_numbers=axes
    )


# How an array of shape (2, 4) enters, and the number of the signs that probe it.
ENTRANCES = {
    "dense": (lambda w, x: x @ w.T, 2),
    "dense at two positions": (lambda w, x: pairs(x) @ w[:, :2], 4),
    "convolution": (convolved, 4),
    "embedding": (lambda w, x: w.T[jnp.argsort(x)[:, :2]], 4),
    "scale": (lambda w, x: pairs((w.reshape(1, 8) * jnp.tile(x, 2))[:, 2:6]), 8),
    "reused": (lambda w, x: jnp.tanh(x @ w.T) @ w[:, :2], 8),
    "reparametrised": (lambda w, x: x @ (w / jnp.sum(w**2)).T, 8),
}


@pytest.mark.short("convolution")
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_i2_over_all_signs_is_minus_the_diagonal_of_the_hessian(entrance, monkeypatch):
    enter, number = ENTRANCES[entrance]
    params = jax.random.normal(jax.random.key(7), (2, 4))
    x = jax.random.normal(jax.random.key(8), (1, 4))
    mixing = jnp.array([[1.0, 0.5], [-0.5, 2.0]])
    fixed = categorical._replace(sample=lambda key, h: jnp.full(h.shape[:-1], 1))

    def model(w, x):
        z = enter(w, x)
        return jnp.sin(z + jnp.tanh(z @ mixing))

    def loss(w):
        h = model(w, x)
        return -jnp.mean(categorical.log_prob(h, jnp.ones(h.shape[:-1], int)))

    hessian = jax.jit(jax.hessian(loss))(params).reshape(8, 8)
    expected = jnp.diag(hessian).reshape(2, 4)
    exact = fisher_i2(model, fixed, key=KEY, hessian="exact")
    close(evaluate(exact, params, (x, None)), expected)

    def share(signs):
        def drawn(key, shape, dtype):
            return signs.reshape(shape)

        with monkeypatch.context() as patch:
            patch.setattr(jax.random, "rademacher", drawn)
            probed = fisher_i2(model, fixed, key=KEY, hessian="hutchinson")
            return diagonal(probed, params, (x, None))

    signs = 2.0 * all_labels((number,), 2) - 1
    shares = jax.jit(jax.vmap(share))(signs)
    assert jnp.max(jnp.std(shares, axis=0)) > 1e-3
    close(jnp.mean(shares, axis=0), expected, atol=1e-5)


@pytest.mark.long
def test_probes_of_each_example_leave_little_error():
    """Off the diagonal, a Hessian by the weights is full of products of inputs."""
    params = jax.random.normal(jax.random.key(7), (2, 12, 12)) / 4
    x = jax.random.normal(jax.random.key(8), (8, 12))

    def model(params, x, layer=jnp.matmul):
        return jnp.tanh(layer(jnp.tanh(layer(x, params[0])), params[1]))

    def reused(params, x):
        """The same, in a form that has no pre-activations to probe."""
        return model(params, x, lambda x, w: (x @ w + x @ (2 * w)) / 3)

    def estimates(model, hessian):
        def estimate(key):
            estimator = fisher_i2(
                lambda w, x: model((w, params[1]), x),
                gaussian(),
                key=key,
                hessian=hessian,
            )
            return diagonal(estimator, params[0], (x, None))

        return jax.jit(jax.vmap(estimate))(jax.random.split(KEY, 8))

    # The labels are drawn from the same keys, so that what differs is the probes.
    exact = estimates(model, "exact")

    def error(model):
        return jnp.sqrt(jnp.mean((estimates(model, "hutchinson") - exact) ** 2))

    assert 3 * error(model) < error(reused)


def test_many_draws_are_averaged():
    """Of one example with two labels: how often each was drawn tells all else."""
    i1 = fisher_i1(
        lambda w, x: w * x, bernoulli, key=KEY, num_samples=64, standard_error=True
    )
    w, x = jnp.float32(0.5), np.ones((1, 1), np.float32)
    estimate, state = jax.jit(i1.update)(None, i1.init(w), w, batch=(x, None))
    p = 1 / (1 + np.exp(-0.5))
    often = (estimate - p**2) / ((1 - p) ** 2 - p**2)
    np.testing.assert_allclose(often, p, atol=5 * np.sqrt(p * (1 - p) / 64))
    np.testing.assert_allclose(64 * often, np.round(64 * often), atol=1e-3)
    variance = often * (1 - often) * ((1 - p) ** 2 - p**2) ** 2
    np.testing.assert_allclose(state.standard_error, np.sqrt(variance / 63), rtol=1e-3)


@pytest.mark.long
def test_i2_has_the_standard_error_of_its_draws():
    estimator = fisher_i2(
        tanh_net, categorical, key=KEY, num_samples=100, standard_error=True
    )
    update = jax.jit(lambda state: estimator.update(None, state, PARAMS, batch=BATCH))
    estimate, state = update(estimator.init(PARAMS))
    single = fisher_i2(tanh_net, categorical, key=KEY)
    draws = jax.jit(
        jax.vmap(lambda key: diagonal(single, PARAMS, (X, None), key=key)["w1"])
    )(jax.random.split(jax.random.key(9), 400))
    np.testing.assert_allclose(
        state.standard_error["w1"], jnp.std(draws, axis=0) / 10, rtol=0.4
    )
    close(state.standard_error["w2"], jnp.zeros((3, 3)))
    exact = truth(tanh_net, categorical, 3)["w1"]
    assert (jnp.abs(estimate["w1"] - exact) < 5 * state.standard_error["w1"]).all()
    one = fisher_i2(tanh_net, categorical, key=KEY, standard_error=True)
    _, state = one.update(None, one.init(PARAMS), PARAMS, batch=BATCH)
    assert jnp.isinf(state.standard_error["w1"]).all()


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "model"),
    [("i2", relu_net), ("i2, probed", relu_net), ("i2, probed", tanh_net)],
)
def test_i2_does_not_vary_where_the_model_is_piecewise_linear(make, model):
    i2 = evaluate(ESTIMATORS[make](model, categorical), batch=(X, None))
    exact = evaluate(fisher_exact(model, categorical), batch=(X, None))
    fixed = PARAMS if model is relu_net else ("w2", "b2")
    equal({k: i2[k] for k in fixed}, {k: exact[k] for k in fixed})
    assert model is relu_net or (i2["w1"] != exact["w1"]).all()


# Identities.


@pytest.mark.long
def test_logistic_regression_at_zero_has_equal_fisher_and_empirical_fisher():
    x = jax.random.normal(KEY, (20, 4))
    y = jax.random.bernoulli(KEY, 0.3, (20, 1)).astype(int)
    model, w = (lambda w, x: x @ w), jnp.zeros((4, 1))
    exact = evaluate(fisher_exact(model, bernoulli), w, (x, y))
    close(evaluate(fisher_empirical(model, bernoulli), w, (x, y)), exact)


@pytest.mark.long
def test_squared_batch_gradient_falls_short_of_the_empirical_fisher_by_the_variance():
    def log_prob(params, x, y):
        return categorical.log_prob(tanh_net(params, x[None])[0], y)

    grads = jax.vmap(jax.grad(log_prob), (None, 0, 0))(PARAMS, X, Y)
    empirical = evaluate(fisher_empirical(tanh_net, categorical))
    for name, g in grads.items():
        square, variance = jnp.mean(g, 0) ** 2, jnp.var(g, 0)
        assert (square <= empirical[name]).all()
        np.testing.assert_allclose(empirical[name] - square, variance, atol=1e-6)


def test_last_layer_of_a_classifier_has_a_closed_form():
    a = jnp.tanh(X @ PARAMS["w1"] + PARAMS["b1"][None])
    p = jax.nn.softmax(tanh_net(PARAMS, X))
    exact = evaluate(fisher_exact(tanh_net, categorical))
    close(exact["w2"], (a**2).T @ (p * (1 - p)) / 3)
    close(exact["b2"], jnp.mean(p * (1 - p), axis=0))


def test_hutchinson_is_exact_for_two_classes():
    model, w = (lambda w, x: x @ w), PARAMS["w1"][:, :2]
    batch = X, jnp.minimum(Y, 1)
    signs = evaluate(fisher_hutchinson(model, categorical, key=KEY), w, batch)
    assert (signs > 0).all()
    close(signs, evaluate(fisher_exact(model, categorical), w, batch))


@pytest.mark.long
def test_hutchinson_has_a_bounded_relative_error_where_i1_has_not():
    h = jnp.array([[5.0, 0.0, 0.0]])
    n = 4000
    keys = jax.random.split(KEY, n)

    def relative_error(make):
        estimator = make(lambda w, x: x @ w, categorical)
        one = functools.partial(diagonal, estimator, h, (jnp.ones((1, 1)), None))
        draws = jax.jit(jax.vmap(lambda key: one(key=key)))(keys)
        return jnp.std(draws, axis=0) / jnp.mean(draws, axis=0)

    assert (relative_error(ESTIMATORS["hutchinson"]) < 1.1 * 2**0.5).all()
    assert (relative_error(ESTIMATORS["i1"]) > 5).all()


@pytest.mark.long
@pytest.mark.parametrize("make", ["empirical", "exact", "i1", "hutchinson", "gnb"])
def test_a_sure_model_has_no_fisher(make):
    def model(params, x):
        h = tanh_net(params, x)
        return h + 1e4 * jnp.sign(h)

    labels = (model(PARAMS, X) > 0).astype(int)
    estimator = ESTIMATORS[make](model, bernoulli)
    estimate = evaluate(estimator, PARAMS, (X, labels))
    equal(estimate, jax.tree.map(jnp.zeros_like, PARAMS))


# The mean over examples.


ALWAYS_ONE = categorical._replace(sample=lambda key, h: jnp.ones(h.shape[:-1], int))


@pytest.mark.short("exact")
@pytest.mark.parametrize("make", ["empirical", "exact", "i1", "hutchinson"])
def test_mean_does_not_depend_on_repetition(make):
    """The scale is per example: the same batch twice has the same diagonal."""
    likelihood = ALWAYS_ONE._replace(
        factor_product=lambda h, v: categorical.factor_product(h, jnp.ones_like(v))
    )
    estimator = ESTIMATORS[make](tanh_net, likelihood)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), BATCH)
    close(evaluate(estimator, batch=twice), evaluate(estimator))


@pytest.mark.short("gnb")
@pytest.mark.parametrize("make", ["empirical", "gnb", "i2"])
def test_examples_of_weight_zero_do_not_count(make):
    estimator = ESTIMATORS[make](tanh_net, ALWAYS_ONE)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, 7 * x]), BATCH)
    weights = jnp.array([1.0, 1, 1, 0, 0, 0])
    close(
        evaluate(estimator, batch=padded, example_weights=weights), evaluate(estimator)
    )


def test_weighted_gnb_is_unbiased():
    """Its square of a sum needs the square roots of the weights."""
    labels = all_labels((3,), 3)
    log_prob = jax.vmap(categorical.log_prob, (None, 0))(tanh_net(PARAMS, X), labels)
    p = jnp.exp(jnp.sum(log_prob, axis=1))
    weights = jnp.array([0.5, 2.0, 1.5])

    def share(y):
        fixed = categorical._replace(sample=lambda key, h: y)
        gnb = fisher_gnb(tanh_net, fixed, key=KEY)
        return diagonal(gnb, PARAMS, (X, None), example_weights=weights)

    exact = evaluate(fisher_exact(tanh_net, categorical), example_weights=weights)
    close(mean_over_leading(jax.jit(jax.vmap(share))(labels), p), exact, rtol=1e-4)


@pytest.mark.short("empirical")
@pytest.mark.parametrize("make", ["empirical", "exact", "i1", "i2"])
def test_weights_give_the_weighted_mean(make):
    estimator = ESTIMATORS[make](tanh_net, ALWAYS_ONE)

    @jax.jit
    def weighted(weights):
        return diagonal(estimator, PARAMS, BATCH, example_weights=weights)

    weights = jnp.array([0.5, 2.0, 1.5])
    shares = [weighted(row) for row in jnp.eye(3)]
    expected = jax.tree.map(lambda *x: np.average(x, axis=0, weights=weights), *shares)
    close(weighted(weights), expected)
    close(weighted(jnp.ones(3)), evaluate(estimator))


@pytest.mark.short("gnb", "exact")
@pytest.mark.parametrize("make", ["exact", "hutchinson", "gnb", "i2"])
def test_weights_that_are_all_zero_give_zeros(make):
    estimator = ESTIMATORS[make](tanh_net, categorical)
    zeros = evaluate(estimator, example_weights=jnp.zeros(3))
    equal(zeros, jax.tree.map(jnp.zeros_like, PARAMS))


@pytest.mark.short("empirical")
@pytest.mark.parametrize("make", ["empirical", "exact"])
def test_positions_can_be_left_out_by_their_weight(make):
    def first(params, x):
        return sequence_net(params, x)[:, :1]

    y = jnp.stack([Y, jnp.array([77, -1, 77])], axis=1)
    weights = jnp.array([[1.0, 0.0]] * 3)
    make = ESTIMATORS[make]
    close(
        evaluate(make(sequence_net, categorical), batch=(X, y, weights)),
        evaluate(make(first, categorical), batch=(X, y[:, :1])),
    )


# The standard error.


def test_standard_error_is_that_of_the_mean_of_the_squares():
    estimator = fisher_i1(tanh_net, ALWAYS_ONE, key=KEY, standard_error=True)

    @jax.jit
    def error(batch, weights):
        state = estimator.init(PARAMS)
        _, state = estimator.update(
            None, state, PARAMS, batch=batch, example_weights=weights
        )
        return state.standard_error

    ones = jnp.ones(3, int)
    squares = jax.jit(functools.partial(squared_scores, tanh_net, categorical))(
        PARAMS, X, ones
    )
    expected = jax.tree.map(lambda s: np.std(s, axis=0, ddof=1) / 3**0.5, squares)
    close(error(BATCH, ones), expected, rtol=1e-4)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x]), BATCH)
    mask = jnp.array([1, 1, 1, 0, 0, 0])
    close(error(padded, mask), expected, rtol=1e-4)
    # One draw has none.
    infinite = jax.tree.map(lambda w: np.full(w.shape, np.inf), PARAMS)
    equal(error(padded, jnp.array([1, 0, 0, 0, 0, 0])), infinite)
    equal(estimator.init(PARAMS).standard_error, infinite)
    assert fisher_i1(tanh_net, categorical, key=KEY).init(PARAMS).standard_error is None


@pytest.mark.long
@pytest.mark.parametrize("name", ["i1, two draws", "hutchinson"])
def test_standard_error_is_not_below_the_error_of_the_draws(name):
    estimator, _, _ = compiled(name)

    def update(key):
        state = estimator.init(PARAMS)._replace(key=jax.random.key_data(key))
        estimate, state = estimator.update(None, state, PARAMS, batch=BIG)
        return estimate, optax.tree.get(state, "standard_error")

    estimates, errors = jax.jit(jax.vmap(update))(jax.random.split(KEY, 1000))
    for estimate, error in zip(
        jax.tree.leaves(estimates), jax.tree.leaves(errors), strict=True
    ):
        mean_square = np.mean(np.asarray(error) ** 2, axis=0)
        assert (mean_square > 0.8 * np.var(estimate, axis=0)).all()


def test_standard_error_of_gnb_over_all_labels():
    """Its square is the variance and the sum of the squared shares, of order 1/N."""
    weights = jnp.array([1.0, 0.5, 2.0])
    labels = all_labels((3,), 3)
    log_prob = jax.vmap(categorical.log_prob, (None, 0))(tanh_net(PARAMS, X), labels)
    p = jnp.exp(jnp.sum(log_prob, axis=1))

    def update(y):
        fixed = categorical._replace(sample=lambda key, h: y)
        estimator = fisher_gnb(tanh_net, fixed, key=KEY, standard_error=True)
        estimate, state = estimator.update(
            None,
            estimator.init(PARAMS),
            PARAMS,
            batch=(X, None),
            example_weights=weights,
        )
        return estimate, state.standard_error

    estimates, errors = jax.jit(jax.vmap(update))(labels)
    unweighted = fisher_gnb(
        tanh_net, categorical._replace(sample=lambda key, h: Y), key=KEY
    )
    plain = evaluate(unweighted, batch=(X, None), example_weights=weights)
    (here,) = np.flatnonzero((np.asarray(labels) == np.asarray(Y)).all(axis=1))
    close(jax.tree.map(lambda x: x[here], estimates), plain)

    shares = [
        enumerated_fisher(tanh_net, categorical, 3, PARAMS, X[n : n + 1])
        for n in range(3)
    ]
    estimates, errors, shares = jax.tree.map(np.asarray, (estimates, errors, shares))
    for k in PARAMS:
        mean = np.tensordot(p, estimates[k], 1)
        variance = np.tensordot(p, (estimates[k] - mean) ** 2, 1)
        excess = sum((w * f[k]) ** 2 for w, f in zip([1, 0.5, 2], shares, strict=True))
        np.testing.assert_allclose(
            np.tensordot(p, errors[k] ** 2, 1),
            variance + excess / np.sum(weights) ** 2,
            rtol=1e-4,
        )


# Dtypes and structures.


@pytest.mark.short("gnb")
@pytest.mark.parametrize("name", ["empirical", "exact", "hutchinson", "gnb", "i2"])
def test_any_pytree_of_any_dtype_will_do(name):
    """The arrays may be NumPy's; a number that is not real is no parameter."""

    def model(params, inputs):
        return tanh_net(params[0], inputs["x"] * params[1])

    narrow = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), (PARAMS, BIG))
    params = (narrow[0], np.array(2, np.int32), None)
    batch = ({"x": narrow[1][0] / 2}, np.asarray(BIG[1]))
    estimator = ESTIMATORS[name](model, categorical)
    initial = estimator.init(params)
    estimate, state = jax.jit(functools.partial(estimator.update, None))(
        initial, params, batch=batch
    )
    assert jax.tree.structure(estimate) == jax.tree.structure(params)
    assert {x.dtype for x in jax.tree.leaves(estimate)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(estimate[1], 0)
    types = (jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, initial))
    assert next(types) == next(types)
    if name in ("empirical", "exact"):
        (expected,), _ = run(name, steps=1)
        close(estimate[0], expected, rtol=0.1, atol=0.01)


@pytest.mark.short("gnb", "exact")
@pytest.mark.parametrize("make", ["exact", "hutchinson", "gnb", "i2"])
def test_no_gradient_flows_through(make):
    """Nor through what the model closes over."""

    def total(params, x, scale):
        def model(params, x):
            return scale * tanh_net(params, x)

        estimator = ESTIMATORS[make](model, categorical)
        return optax.tree.sum(diagonal(estimator, params, (x, Y)))

    args = PARAMS, X, 1.5
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*args)
    equal(gradient, optax.tree.zeros_like(args))


# Keys and state.


@pytest.mark.short("gnb")
def test_three_updates_are_one_trace(name):
    run(name, steps=1)
    traces = compiled(name)[-1]
    once = len(traces)
    run(name, steps=3)
    assert len(traces) == once > 0


def test_updates_draw_anew_and_repeat_by_key(sampled):
    (first, second), state = run(sampled, steps=2)
    assert differ(first, second)
    assert (state.key != compiled(sampled)[0].init(PARAMS).key).any()
    equal(run(sampled, steps=2)[0], [first, second])


def test_replicas_draw_apart_and_keep_the_same_state(sampled):
    (a,), state = run(sampled, steps=1, replica=0)
    (b,), other = run(sampled, steps=1, replica=1)
    assert differ(a, b)
    equal(state.key, other.key)


def test_state_survives_a_file(sampled, tmp_path):
    expected, _ = run(sampled, steps=2)
    _, state = run(sampled, steps=1)
    leaves, structure = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as file:
        state = structure.unflatten([jnp.asarray(x) for x in file.values()])
    equal(run(sampled, steps=1, state=state)[0], expected[1:])


@pytest.mark.short("gnb")
@pytest.mark.parametrize("name", ["i1", "hutchinson", "gnb"])
def test_scan_and_vmap_over_seeds_agree_with_single_updates(name):
    estimator, _, _ = compiled(name)
    seeds = jax.random.split(jax.random.key(3), 2)

    def step(state, _):
        estimate, state = estimator.update(None, state, PARAMS, batch=BIG, replica=0)
        return state, estimate

    def scan(seed):
        state = estimator.init(PARAMS)._replace(key=jax.random.key_data(seed))
        return jax.lax.scan(step, state, length=2)[1]

    mapped = jax.jit(jax.vmap(scan))(seeds)
    for i, seed in enumerate(seeds):
        state = estimator.init(PARAMS)._replace(key=jax.random.key_data(seed))
        expected, _ = run(name, steps=2, state=state)
        for j in range(2):
            close(jax.tree.map(lambda x, i=i, j=j: x[i, j], mapped), expected[j])


def test_donating_the_state_keeps_the_key():
    key = jax.random.key(7)
    estimator = fisher_gnb(tanh_net, categorical, key=key)
    donating = jax.jit(
        lambda state: estimator.update(None, state, PARAMS, batch=BATCH),
        donate_argnums=0,
    )
    donating(estimator.init(PARAMS))
    donating(estimator.init(PARAMS))
    equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(7)))


@pytest.mark.long
def test_legacy_and_other_kinds_of_keys():
    def draw(key):
        return evaluate(fisher_gnb(tanh_net, categorical, key=key))

    equal(draw(jax.random.key(3)), draw(jax.random.PRNGKey(3)))
    assert jnp.isfinite(draw(jax.random.key(3, impl="rbg"))["w1"]).all()


# Errors.


def test_missing_batch_is_named(make):
    estimator = make(tanh_net, categorical)
    with pytest.raises(TypeError, match=r"batch=\(inputs, targets\)"):
        estimator.update(None, estimator.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match=r"`batch` .* `\(inputs, targets\)`"):
        estimator.update(None, estimator.init(PARAMS), PARAMS, batch=X)


def test_missing_params_are_named(make):
    estimator = make(tanh_net, categorical)
    with pytest.raises(ValueError, match="`params`"):
        estimator.update(None, estimator.init(PARAMS), batch=BATCH)


def test_wrong_arguments_are_named():
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`num_samples`"):
            fisher_i1(tanh_net, categorical, key=KEY, num_samples=bad)
        with pytest.raises(ValueError, match="`num_samples`"):
            fisher_hutchinson(tanh_net, categorical, key=KEY, num_samples=bad)
        with pytest.raises(ValueError, match="`num_samples`"):
            fisher_i2(tanh_net, categorical, key=KEY, num_samples=bad)
        with pytest.raises(ValueError, match="`k`"):
            refresh_every(bad, fisher_exact(tanh_net, categorical))
    with pytest.raises(ValueError, match="`hessian`"):
        fisher_i2(tanh_net, categorical, key=KEY, hessian="probed")  # type: ignore
    with pytest.raises(TypeError, match="`key`"):
        fisher_gnb(tanh_net, categorical, key=0)  # type: ignore
    with pytest.raises(ValueError, match="`example_weights`"):
        diagonal(
            fisher_exact(tanh_net, categorical),
            PARAMS,
            BATCH,
            example_weights=jnp.ones((3, 1)),
        )
    with pytest.raises(ValueError, match="inputs in `batch`"):
        diagonal(fisher_exact(tanh_net, categorical), PARAMS, (1.0, None))


# Combinations.


@pytest.mark.long
@pytest.mark.parametrize(
    "labels",
    [
        {"w1": "body", "b1": "body", "w2": "head", "b2": "head"},
        lambda params: {k: "body" if k[1] == "1" else "head" for k in params},
    ],
    ids=["tree", "callable"],
)
def test_each_group_gets_its_own_estimator(labels):
    i1, exact = (
        ESTIMATORS["i1"](tanh_net, categorical),
        fisher_exact(tanh_net, categorical),
    )
    estimator = by_group(labels, {"body": i1, "head": exact})
    state = estimator.init(PARAMS)
    assert set(state) == {"body", "head"}
    body, head = evaluate(i1), evaluate(exact)
    close(evaluate(estimator), {k: (body if k[1] == "1" else head)[k] for k in PARAMS})


@pytest.mark.long
@pytest.mark.parametrize("make", ["exact", "hutchinson", "i2"])
def test_groups_work_with_caches_and_averages(make):
    estimator = ESTIMATORS[make](tanh_net, categorical)
    groups = by_group(
        {"w1": 0, "b1": 1, "w2": 0, "b2": 1},
        {0: estimator, 1: refresh_every(2, optax.chain(estimator, optax.ema(0.9)))},
    )
    update = jax.jit(functools.partial(groups.update, None))
    estimate, state = update(groups.init(PARAMS), PARAMS, batch=BATCH)
    close(estimate, evaluate(estimator), rtol=1e-4)
    # The cache and average of a group hold nothing of the other one.
    assert [x.shape for x in jax.tree.leaves(state[1].diagonal)] == [(3,), (3,)]
    assert [x.shape for x in jax.tree.leaves(state[1].estimator[1].ema)] == [(3,), (3,)]


def test_groups_receive_gradients_and_nest():
    square = optax.stateless(lambda g, _: jax.tree.map(jnp.square, g))
    exact = fisher_exact(tanh_net, categorical)
    nested = by_group(
        {"w1": "square", "b1": "inner", "w2": "inner", "b2": "exact"},
        {
            "square": square,
            "inner": by_group(
                lambda params: jax.tree.map(lambda _: "exact", params), {"exact": exact}
            ),
            "exact": exact,
        },
    )
    grads = jax.tree.map(lambda w: w + 1, PARAMS)
    update = jax.jit(nested.update)
    estimate, _ = update(grads, nested.init(PARAMS), PARAMS, batch=BATCH)
    close(estimate, evaluate(exact) | {"w1": grads["w1"] ** 2})


def test_labels_must_have_estimators():
    estimator = by_group(
        {"w1": "a", "b1": "a", "w2": "b", "b2": "a"},
        {"a": fisher_exact(tanh_net, categorical)},
    )
    with pytest.raises(ValueError, match=r"\['b'\]"):
        estimator.init(PARAMS)
    with pytest.raises(ValueError, match="`labels`"):
        by_group({"w1": "a"}, {"a": fisher_exact(tanh_net, categorical)}).init(PARAMS)


@pytest.mark.parametrize("k", [1, 2])
def test_refresh_computes_every_kth_diagonal(k):
    estimator, _, _ = compiled("gnb")
    cache = refresh_every(k, estimator)
    update = jax.jit(
        lambda state: cache.update(None, state, PARAMS, batch=BIG, replica=0)
    )
    fresh, _ = run("gnb", steps=4)
    state = cache.init(PARAMS)
    for i in range(4):
        estimate, state = update(state)
        close(estimate, fresh[i // k])
    assert state.age == 0


def test_refresh_scans_and_keeps_float32_for_narrow_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    estimator = refresh_every(3, fisher_exact(tanh_net, categorical))

    def step(state, _):
        estimate, state = estimator.update(None, state, params, batch=BATCH)
        return state, estimate

    _, estimates = jax.lax.scan(step, estimator.init(params), length=4)
    assert {x.dtype for x in jax.tree.leaves(estimates)} == {jnp.dtype("float32")}


def test_moving_average_is_optax_ema():
    average = optax.chain(compiled("gnb")[0], optax.ema(0.9))
    update = jax.jit(
        lambda state: average.update(None, state, PARAMS, batch=BIG, replica=0)
    )
    (a, b), _ = run("gnb", steps=2)
    first, state = update(average.init(PARAMS))
    second, _ = update(state)
    close(first, a, rtol=1e-4)
    expected = jax.tree.map(lambda a, b: (0.09 * a + 0.1 * b) / 0.19, a, b)
    close(second, expected, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("sampled", ["i1", "i2"])
def test_diagonal_draws_with_the_given_key(sampled):
    estimator, _, _ = compiled(sampled)
    draws = evaluate(estimator, batch=BIG, key=jax.random.key(11), replica=0)
    assert differ(draws, run(sampled, steps=1)[0][0])


def test_diagonal_sets_the_keys_inside_of_other_transformations():
    estimator, _, _ = compiled("gnb")
    chained = refresh_every(2, optax.chain(estimator, optax.ema(0.9)))
    key = jax.random.key(11)
    close(evaluate(chained, key=key), evaluate(estimator, key=key), rtol=1e-4)


def test_diagonal_needs_an_estimator_that_reads_no_gradient():
    exact = fisher_exact(tanh_net, categorical)
    equal(evaluate(exact, key=KEY), evaluate(exact))
    with pytest.raises(TypeError, match="reads the gradient"):
        diagonal(optax.identity(), PARAMS, BATCH)
    with pytest.raises(TypeError, match="`estimator`"):
        diagonal(lambda x: x, PARAMS, BATCH)  # type: ignore


@pytest.mark.long
@pytest.mark.parametrize("name", ["exact", "gnb"])
def test_sharding_over_eight_devices_changes_nothing(name):
    devices = np.array(jax.devices()).reshape(-1)
    mesh = jax.sharding.Mesh(devices, ("data",))
    x = jax.random.normal(KEY, (len(devices), 2))
    estimator = ESTIMATORS[name](tanh_net, categorical)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    compute = jax.jit(lambda x: diagonal(estimator, PARAMS, (x, None)))
    close(compute(jax.device_put(x, sharding)), compute(x))


def test_by_group_takes_a_given_diagonal_for_some_groups():
    grads = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    fisher = {"a": jnp.array([5.0, 6.0]), "b": jnp.array([7.0])}
    estimators = {"given": given(), "own": squared_gradient()}
    estimator = by_group({"a": "given", "b": "own"}, estimators)
    diagonal, _ = estimator.update(grads, estimator.init(grads), grads, fisher=fisher)
    np.testing.assert_array_equal(diagonal["a"], fisher["a"])
    np.testing.assert_array_equal(diagonal["b"], [9.0])

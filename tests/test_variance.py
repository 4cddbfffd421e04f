"""Variances of I1 and I2, against sums over all labels."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsam_optax._fisher.diagonal import diagonal
from fsam_optax._fisher.estimators import fisher_exact, fisher_i1
from fsam_optax._fisher.i2 import fisher_i2
from fsam_optax._fisher.likelihoods import (
    bernoulli,
    categorical,
    gaussian,
    Likelihood,
    poisson,
)
from fsam_optax._study.second_order import dense_fisher
from fsam_optax.variance import (
    fisher_bounds,
    fisher_variance_between_inputs,
    fisher_variance_between_inputs_bound,
    fisher_variance_i1,
    fisher_variance_i1_bounds,
    fisher_variance_i1_sampled,
    fisher_variance_i2,
    fisher_variance_i2_bounds,
    fisher_variance_i2_sampled,
    fisher_variance_joint,
    fisher_variance_trace_bounds,
    prefer,
)


KEY = jax.random.key(0)
PARAMS = {
    "w": jax.random.normal(jax.random.key(1), (2, 2)),
    "v": jax.random.normal(jax.random.key(2), (2, 3)),
}
X = jax.random.normal(jax.random.key(3), (4, 2))


def net(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def relu_net(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]


def sequence(params, x):
    """Two positions of three classes."""
    h = net(params, x)
    return jnp.stack([h, 2 * h**2], axis=1)


MODELS = {"net": net, "relu": relu_net, "sequence": sequence}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def evaluate(function, *args, params=PARAMS, inputs=X, **options):
    return jax.jit(functools.partial(function, *args, **options))(params, inputs)


def close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b
    )


def assert_below(a, b):
    """Asserts a <= b up to rounding."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_less(a, b + 1e-5 * b + 1e-7), a, b
    )


@functools.cache
def all_estimates(model, make):
    """Returns estimates for each example and labels, and the labels' probabilities.

    The examples are the first axis, all joint labels of an example the second one.
    """
    h = model(PARAMS, X)
    positions = h.shape[1:-1]
    labels = itertools.product(range(3), repeat=math.prod(positions))
    labels = jnp.array(list(labels)).reshape(-1, *positions)

    def one(x, y):
        always = categorical._replace(
            sample=lambda key, h: jnp.broadcast_to(y, h.shape[:-1])
        )
        log_prob = categorical.log_prob(model(PARAMS, x[None])[0], y)
        estimator = make(model, always, key=KEY)
        return diagonal(estimator, PARAMS, (x[None], None)), jnp.exp(jnp.sum(log_prob))

    estimates, p = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(X, labels)
    np.testing.assert_allclose(jnp.sum(p, axis=1), 1, rtol=1e-5)
    return jax.tree.map(lambda e: np.asarray(e, np.float64), estimates), p


def conditional_moments(model, make):
    """Returns mean and variance over the labels, for each example."""
    estimates, p = all_estimates(model, make)
    p = np.asarray(p, np.float64)
    p = p / p.sum(axis=1, keepdims=True)
    mean = jax.tree.map(lambda e: np.einsum("nk,nk...->n...", p, e), estimates)
    variance = jax.tree.map(
        lambda e, m: np.einsum("nk,nk...->n...", p, (e - m[:, None]) ** 2),
        estimates,
        mean,
    )
    return mean, variance


@pytest.mark.short("sequence-i1", "net-i2")
@pytest.mark.parametrize(
    ("make", "variance"),
    [(fisher_i1, fisher_variance_i1), (fisher_i2, fisher_variance_i2)],
    ids=["i1", "i2"],
)
def test_variances_are_those_over_all_labels(model, make, variance):
    _, variances = conditional_moments(model, make)
    expected = jax.tree.map(lambda v: np.mean(v, axis=0), variances)
    close(evaluate(variance, model, categorical), expected, rtol=1e-3)


@pytest.mark.short("sequence")
def test_variance_between_inputs_is_that_of_their_fishers(model):
    means, _ = conditional_moments(model, fisher_i1)
    expected = jax.tree.map(lambda m: np.var(m, axis=0), means)
    result = evaluate(fisher_variance_between_inputs, model, categorical)
    close(result, expected, rtol=1e-3)
    assert_below(
        result, evaluate(fisher_variance_between_inputs_bound, model, categorical)
    )


def test_bound_of_the_variance_between_inputs_is_a_second_moment_for_regression():
    exact = evaluate(diagonal, fisher_exact(net, gaussian()), inputs=(X, None))
    between = evaluate(fisher_variance_between_inputs, net, gaussian())
    close(
        evaluate(fisher_variance_between_inputs_bound, net, gaussian()),
        jax.tree.map(lambda v, m: v + m**2, between, exact),
    )


@pytest.mark.short("i1")
@pytest.mark.parametrize(
    ("make", "variance"),
    [(fisher_i1, fisher_variance_i1), (fisher_i2, fisher_variance_i2)],
    ids=["i1", "i2"],
)
def test_joint_variance_is_that_over_all_inputs_and_labels(make, variance):
    estimates, p = all_estimates(net, make)
    p = np.asarray(p) / np.sum(p)

    def over_both(e):
        mean = np.einsum("nk,nk...->...", p, e)
        return np.einsum("nk,nk...->...", p, (e - mean) ** 2)

    conditional = evaluate(variance, net, categorical)
    between = evaluate(fisher_variance_between_inputs, net, categorical)
    joint = fisher_variance_joint(conditional, between, num_inputs=1)
    close(joint, jax.tree.map(over_both, estimates), rtol=1e-3)
    more = fisher_variance_joint(conditional, between, num_inputs=5, num_samples=2)
    close(more, jax.tree.map(lambda b, c: (b + c / 2) / 5, between, conditional))


@pytest.mark.short("0.5")
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_regression_has_closed_forms_and_tight_bounds(scale):
    """Proposition 5.1: F = |h'|^2, V1 = 2 |h'|^4, V2 = |h''|^2, each / scale^2."""

    def output(w, x):
        return jnp.stack([jnp.sin(w * x[:, 0]), w**2 * x[:, 1]], axis=1)

    @jax.jit
    def everything(w, x):
        first = jax.jacfwd(lambda w: output(w, x)[0])
        expected = jnp.sum(first(w) ** 2), jnp.sum(jax.jacfwd(first)(w) ** 2)
        args = output, gaussian(scale), w, x
        return expected, [
            fisher_variance_i1(*args),
            fisher_variance_i2(*args),
            *fisher_bounds(*args),
            *fisher_variance_i1_bounds(*args),
            *fisher_variance_i2_bounds(*args),
        ]

    (first, second), found = everything(np.float32(0.7), np.asarray(X[:1]))
    fisher, v1, v2 = first / scale**2, 2 * first**2 / scale**4, second / scale**2
    close(found, [v1, v2, fisher, fisher, v1, v1, v2, v2])


def test_binary_classification_has_a_closed_form():
    """For h = w x: V1 = x^4 p (1 - p) (1 - 2 p)^2."""
    w, x = jnp.array([[0.8]]), jnp.array([[1.5]])
    p = jax.nn.sigmoid(1.2)
    v1 = 1.5**4 * p * (1 - p) * (1 - 2 * p) ** 2

    def model(w, x):
        return x @ w

    call = functools.partial(evaluate, params=w, inputs=x)
    close(call(fisher_variance_i1, model, bernoulli), v1[None, None])
    # One logit against 0 is the same as two logits.
    two = evaluate(
        fisher_variance_i1,
        lambda w, x: jnp.concatenate([x @ w, jnp.zeros((len(x), 1))], axis=1),
        categorical,
        params=w,
        inputs=x,
    )
    close(two, v1[None, None])


@pytest.mark.short("sequence")
@pytest.mark.parametrize(
    ("model", "likelihood"),
    [
        (net, categorical),
        (sequence, categorical),
        (net, bernoulli),
        (net, gaussian(0.5)),
        (sequence, poisson),
    ],
    ids=["categorical", "sequence", "bernoulli", "gaussian", "counts"],
)
def test_bounds_hold_at_any_parameters(model, likelihood):
    @jax.jit
    @jax.vmap
    def everything(params):
        args = (model, likelihood, params, X)
        exact = (
            diagonal(fisher_exact(model, likelihood), params, (X, None)),
            fisher_variance_i1(*args),
            fisher_variance_i2(*args),
        )
        bounds = (
            fisher_bounds(*args),
            fisher_variance_i1_bounds(*args),
            fisher_variance_i2_bounds(*args),
        )
        return exact, bounds, fisher_variance_trace_bounds(*args)

    scales = jnp.array([0.01, 0.3, 1.0, 3.0])
    params = jax.tree.map(lambda w: scales[:, None, None] * w[None], PARAMS)
    exact, bounds, traces = everything(params)
    for value, (lower, upper), trace in zip(exact, bounds, traces, strict=True):
        assert_below(lower, value)
        assert_below(value, upper)
        close(trace, jax.tree.map(lambda u: jnp.sum(u, axis=(1, 2)), upper))


@pytest.mark.long
def test_classification_bounds_are_those_of_theorem_5_2():
    @jax.jit
    def upper_bounds(x):
        def output(w):
            return net({**PARAMS, "w": w}, x[None])[0]

        p = jax.nn.softmax(output(PARAMS["w"]))
        m = jnp.minimum(jnp.max(p), 1 - jnp.sum(p**2))
        squares = jnp.sum(jax.jacrev(output)(PARAMS["w"]) ** 2, axis=0)
        return m * squares, 2 * m * squares**2

    fisher, v1 = (jnp.mean(b, axis=0) for b in jax.vmap(upper_bounds)(X))
    close(evaluate(fisher_bounds, net, categorical).upper["w"], fisher)
    assert_below(evaluate(fisher_variance_i1_bounds, net, categorical).upper["w"], v1)


def test_i2_does_not_vary_where_the_model_is_piecewise_linear():
    likelihood = bernoulli
    v2 = evaluate(fisher_variance_i2, relu_net, likelihood)
    np.testing.assert_array_equal(v2["w"], 0)
    np.testing.assert_array_equal(v2["v"], 0)
    v2 = evaluate(fisher_variance_i2, net, likelihood)
    np.testing.assert_array_equal(v2["v"], 0)
    assert (v2["w"] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampled", "exact"),
    [
        (fisher_variance_i1_sampled, fisher_variance_i1),
        (fisher_variance_i2_sampled, fisher_variance_i2),
    ],
    ids=["i1", "i2"],
)
def test_sampled_variances_agree_within_their_standard_errors(sampled, exact):
    for model, likelihood in (
        (sequence, categorical),
        (net, bernoulli),
        (net, gaussian(0.5)),
        (net, poisson),
    ):
        # Near 0, where no label is rare: rare ones would leave the errors unseen.
        call = functools.partial(evaluate, params=jax.tree.map(lambda w: w / 3, PARAMS))
        estimate = call(sampled, model, likelihood, num_draws=1000, key=KEY)

        def check(variance, error, expected):
            assert (np.abs(variance - expected) <= 5 * error + 1e-5 * expected).all()

        expected = call(exact, model, likelihood)
        jax.tree.map(check, estimate.variance, estimate.standard_error, expected)


@pytest.mark.long
def test_the_standard_error_of_a_variance_is_the_spread_of_its_estimates():
    def model(w, x):
        return x @ w

    def estimate(key):
        return fisher_variance_i1_sampled(
            model, bernoulli, jnp.ones((2, 1)), X, num_draws=100, key=key
        )

    estimates = jax.jit(jax.vmap(estimate))(jax.random.split(KEY, 500))
    spread = np.std(estimates.variance, axis=0)
    error = np.sqrt(np.mean(estimates.standard_error**2, axis=0))
    np.testing.assert_allclose(error, spread, rtol=0.15)
    close(
        np.mean(estimates.variance, axis=0),
        evaluate(
            fisher_variance_i1, model, bernoulli, params=np.ones((2, 1), "float32")
        ),
        rtol=0.05,
    )


def test_prefer_picks_the_smaller_sum_of_each_group():
    v1 = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(5.0), "c": jnp.array(0.0)}
    v2 = {"a": jnp.array([4.0, 0.0]), "b": jnp.array(1.0), "c": jnp.array(0.0)}
    alone = {"a": "first", "b": "second", "c": "third"}
    assert prefer(alone, v1, v2) == {"first": "i1", "second": "i2", "third": "i2"}
    together = {"a": "all", "b": "all", "c": "all"}
    assert prefer(together, v1, v2) == {"all": "i2"}
    assert prefer("all", v1, v2) == {"all": "i2"}
    assert prefer(lambda tree: {k: k for k in tree}, v1, v2)["a"] == "i1"


def test_prefer_takes_i2_for_the_last_layer():
    args = (net, categorical)
    names = {"w": "body", "v": "head"}
    v1, v2 = (evaluate(f, *args) for f in (fisher_variance_i1, fisher_variance_i2))
    assert prefer(names, v1, v2)["head"] == "i2"


def test_missing_moments_are_named():
    bare = Likelihood(*categorical[:4])
    with pytest.raises(ValueError, match="`fourth_moment`"):
        fisher_variance_i1(net, bare, PARAMS, X)
    for function in (
        fisher_bounds,
        fisher_variance_i1_bounds,
        fisher_variance_i2_bounds,
    ):
        with pytest.raises(ValueError, match="`bounds`"):
            function(net, bare, PARAMS, X)
    close(
        evaluate(fisher_variance_i2, net, bare),
        evaluate(fisher_variance_i2, net, categorical),
    )


@pytest.mark.parametrize(
    "sampled", [fisher_variance_i1_sampled, fisher_variance_i2_sampled]
)
def test_a_sample_variance_needs_two_draws(sampled):
    with pytest.raises(ValueError, match="`num_draws`"):
        sampled(net, categorical, PARAMS, X, num_draws=1, key=KEY)


@pytest.mark.long
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("function", [fisher_variance_i1, dense_fisher])
def test_a_device_studies_its_own_inputs(function, check_vma):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    w, x = jnp.ones((2, 1)), jnp.arange(8.0).reshape(4, 2) / 4

    def of(x):
        batch = (x, None) if function is dense_fisher else x
        return function(lambda w, x: jnp.tanh(x @ w), gaussian(), w, batch)

    each = jax.shard_map(
        lambda x: of(x)[None],
        mesh=mesh,
        in_specs=jax.P("i"),
        out_specs=jax.P("i"),
        check_vma=check_vma,
    )
    found = np.mean(jax.jit(each)(x), 0)
    np.testing.assert_allclose(found, jax.jit(of)(x), rtol=1e-5)

"""Likelihoods of several outputs and of a mean with its variance, by quadrature."""

import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fsam_optax as fsam


# Means and log-variances of two labels.
H = jnp.array([0.3, -0.8, 0.4, -0.6])
HEADS = {"class": fsam.categorical, "size": fsam.gaussian(0.7)}
OUTPUTS = {"class": jnp.array([0.3, -0.8, 1.1]), "size": jnp.array([0.2])}


def nodes_of(mean, deviation, degree=6):
    """Returns labels and weights of a quadrature exact to degree 2 `degree` - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(degree)
    return mean + deviation * nodes, weights / weights.sum()


def of_variance():
    """Returns all labels with their probabilities, given H."""
    rules = [
        nodes_of(m, np.exp(v / 2))
        for m, v in zip(np.asarray(H[:2]), np.asarray(H[2:]), strict=True)
    ]
    labels = itertools.product(*(r[0] for r in rules))
    weights = itertools.product(*(r[1] for r in rules))
    return jnp.array(list(labels)), np.prod(list(weights), axis=1)


def of_heads():
    values, weights = nodes_of(0.2, 0.7)
    p = np.asarray(jax.nn.softmax(OUTPUTS["class"]))
    pairs = list(itertools.product(range(3), range(len(values))))
    labels = {
        "class": jnp.array([c for c, _ in pairs]),
        "size": jnp.array([[values[i]] for _, i in pairs]),
    }
    return labels, np.array([p[c] * weights[i] for c, i in pairs])


CASES = {
    "variance": (fsam.gaussian_with_variance, H, of_variance),
    "heads": (fsam.heads(HEADS), OUTPUTS, of_heads),
}


@pytest.fixture(params=CASES)
def case(request):
    likelihood, h, labels = CASES[request.param]
    return likelihood, h, *labels()


def flat(tree):
    """Returns the outputs of a label in a row, with any leading axes."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.asarray(x, np.float64) for x in leaves], axis=-1)


def scores_of(likelihood, h, labels):
    return jax.jit(jax.vmap(likelihood.score, (None, 0)))(h, labels)


def covariance_of(likelihood, h):
    factors = jax.tree.leaves(jax.jit(likelihood.factor)(h))
    blocks = [np.asarray(f) @ np.asarray(f).T for f in factors]
    size = sum(map(len, blocks))
    whole, at = np.zeros((size, size)), 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole


@pytest.mark.short("heads")
def test_score_is_the_derivative_of_log_prob(case):
    likelihood, h, labels, _ = case
    expected = jax.jit(jax.vmap(jax.grad(likelihood.log_prob), (None, 0)))(h, labels)
    np.testing.assert_allclose(
        flat(scores_of(likelihood, h, labels)), flat(expected), rtol=1e-5, atol=1e-6
    )


@pytest.mark.short("variance")
def test_moments_are_those_of_the_score(case):
    likelihood, h, labels, p = case
    scores = flat(scores_of(likelihood, h, labels))
    covariance = (scores.T * p) @ scores
    np.testing.assert_allclose(p @ scores, 0, atol=1e-5)
    np.testing.assert_allclose(
        covariance_of(likelihood, h), covariance, rtol=1e-4, atol=1e-5
    )
    u = np.random.default_rng(0).normal(size=(50, scores.shape[1]))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    u = np.concatenate([u, np.eye(len(u.T))])
    fourth = p @ (scores @ u.T) ** 4
    structure = jax.tree.structure(h)
    ends = np.cumsum([x.size for x in jax.tree.leaves(h)])[:-1]
    trees = structure.unflatten([jnp.asarray(v) for v in np.split(u, ends, axis=1)])
    found = jax.jit(jax.vmap(likelihood.fourth_moment, (None, 0)))(h, trees)
    np.testing.assert_allclose(found, fourth, rtol=1e-4)
    bounds = likelihood.bounds(h)
    values = np.linalg.eigvalsh(covariance)
    form = fourth - np.einsum("ni,ij,nj->n", u, covariance, u) ** 2
    assert bounds.fisher_min <= values[0] + 1e-5
    assert bounds.fisher_max >= values[-1] - 1e-5
    assert (bounds.fourth_min <= form + 1e-5).all()
    assert (bounds.fourth_max >= form - 1e-5).all()


def test_factor_product_is_a_product_with_the_factor(case):
    likelihood, h, _, _ = case
    factor = jax.jit(likelihood.factor)(h)
    v = jax.tree.map(lambda f: np.arange(1, 1 + f.shape[-1], dtype=f.dtype), factor)
    expected = jax.tree.map(np.matmul, jax.tree.map(np.asarray, factor), v)
    np.testing.assert_allclose(
        flat(jax.jit(likelihood.factor_product)(h, v)), flat(expected), rtol=1e-5
    )


def test_divergence_is_the_mean_difference_of_log_probabilities(case):
    likelihood, h, labels, p = case
    k = jax.tree.map(lambda x: x + np.float32(0.3) * np.arange(x.size), h)
    log_probs = jax.jit(jax.vmap(likelihood.log_prob, (None, 0)))
    before, after = (np.asarray(log_probs(x, labels)) for x in (h, k))
    expected = p @ (before - after)
    divergence = jax.jit(lambda h, k: likelihood.divergence(h, k))(h, k)
    np.testing.assert_allclose(divergence, expected, rtol=1e-4)


@pytest.mark.short("variance")
def test_draws_have_the_moments_of_the_score(case):
    likelihood, h, _, _ = case
    keys = jax.random.split(jax.random.key(0), 20_000)
    labels = jax.vmap(likelihood.sample, (0, None))(keys, h)
    scores = flat(scores_of(likelihood, h, labels))
    covariance = covariance_of(likelihood, h)
    np.testing.assert_allclose(np.cov(scores.T), covariance, atol=0.1)


@pytest.mark.long
def test_several_heads_are_estimated_as_one():
    rng = np.random.default_rng(0)
    params = {
        "class": rng.normal(size=(4, 3)).astype("float32"),
        "size": rng.normal(size=(4, 1)).astype("float32"),
    }
    x = rng.normal(size=(5, 4)).astype("float32")
    y = {"class": np.array([0, 1, -1, 2, 0]), "size": x[:, :1]}

    def model(params, x):
        return {name: x @ w for name, w in params.items()}

    nll = fsam.negative_log_likelihood(model, fsam.heads(HEADS))
    # The heads share no parameter: each is as if alone, but for what is averaged over.
    for name, likelihood in HEADS.items():

        def one(params, x, name=name):
            return x @ params[name]

        alone = fsam.negative_log_likelihood(one, likelihood)
        scale = 4 / 5 if name == "class" else 1
        for make in (fsam.fisher_exact, fsam.fisher_empirical):
            whole = fsam.diagonal(make(nll), params, (x, y))[name]
            part = fsam.diagonal(make(alone), params, (x, y[name]))[name]
            np.testing.assert_allclose(whole, scale * part, rtol=1e-5)
    with pytest.raises(TypeError, match="like the heads"):
        fsam.negative_log_likelihood(lambda p, x: x, fsam.heads(HEADS))(params, (x, y))


def test_equal_heads_are_equal():
    assert fsam.heads(HEADS) == fsam.heads(dict(HEADS))
    assert hash(fsam.heads(HEADS)) == hash(fsam.heads(dict(HEADS)))
    with pytest.raises(TypeError, match="likelihoods"):
        fsam.heads({"class": fsam.gaussian})


@pytest.mark.long
def test_heads_that_are_equal_are_not_held_on_to():
    own = fsam.gaussian(jnp.float32(2.0))  # Its functions are closures.
    assert fsam.heads({"a": own}) == fsam.heads({"a": own})
    assert hash(fsam.heads({"a": own})) == hash(fsam.heads({"a": own}))
    gone = weakref.ref(own.log_prob)
    del own
    gc.collect()
    assert gone() is None

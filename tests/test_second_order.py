"""Natural gradients, against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fsam_optax._fisher.diagonal import diagonal
from fsam_optax._fisher.estimators import fisher_empirical, fisher_exact
from fsam_optax._fisher.likelihoods import bernoulli, categorical, gaussian, poisson
from fsam_optax._study.second_order import (
    dense_empirical_fisher,
    dense_fisher,
    dense_ggn,
    scale_by_inverse_dense,
    scale_by_inverse_fisher,
)


def linear(w, x):
    return x @ w


def net(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def sequence(params, x):
    """Two positions of three classes."""
    h = net(params, x)
    return jnp.stack([h, 2 * h], axis=1)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {"w": normal(1, 2, 2), "v": normal(2, 2, 3)}
X = normal(3, 4, 2)
CASES = {
    "categorical": (net, categorical, np.array([0, 2, 1, 1])),
    "sequence": (sequence, categorical, np.array([[0, 1], [2, 0], [1, 1], [0, 2]])),
    "bernoulli": (net, bernoulli, np.eye(4, 3, dtype=int)),
    "gaussian": (net, gaussian(0.5), np.ones((4, 3), np.float32)),
    "poisson": (net, poisson, 2 * np.eye(4, 3, dtype=int)),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@functools.cache
def jitted(matrix, model, likelihood):
    return jax.jit(functools.partial(matrix, model, likelihood))


def evaluate(matrix, model, likelihood, y):
    return jitted(matrix, model, likelihood)(PARAMS, (X, y))


def in_order(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.short("bernoulli")
def test_fisher_is_the_ggn(case):
    """Proposition 1 of Kunstner et al.; the two have no code for it in common."""
    np.testing.assert_allclose(
        evaluate(dense_fisher, *case), evaluate(dense_ggn, *case), rtol=1e-4, atol=1e-5
    )


@pytest.mark.short("poisson")
def test_diagonals_are_those_of_the_estimators(case):
    model, likelihood, y = case
    for matrix, make in (
        (dense_fisher, fisher_exact),
        (dense_ggn, fisher_exact),
        (dense_empirical_fisher, fisher_empirical),
    ):
        estimator = make(model, likelihood)
        estimate = jax.jit(functools.partial(diagonal, estimator))(PARAMS, (X, y))
        np.testing.assert_allclose(
            np.diag(evaluate(matrix, *case)), in_order(estimate), rtol=1e-4, atol=1e-5
        )


@pytest.mark.short("sequence", "poisson")
def test_empirical_fisher_is_the_mean_outer_product_of_the_gradients(case):
    model, likelihood, y = case
    flat, unravel = ravel_pytree(PARAMS)

    def log_prob(flat, x, y):
        return jnp.sum(likelihood.log_prob(model(unravel(flat), x[None])[0], y))

    grads = jax.jit(jax.vmap(jax.grad(log_prob), (None, 0, 0)))(flat, X, y)
    np.testing.assert_allclose(
        evaluate(dense_empirical_fisher, *case),
        grads.T @ grads / (8 if model is sequence else 4),  # The number of labels.
        rtol=1e-4,
    )


@pytest.mark.parametrize("matrix", [dense_empirical_fisher, dense_ggn])
def test_what_reads_labels_asks_for_them_by_name(matrix):
    with pytest.raises(TypeError, match=f"`{matrix.__name__}` reads the labels"):
        matrix(linear, gaussian(), jnp.ones((2, 1)), (X, None))


def test_hessian_of_a_linear_model_is_the_ggn():
    y, w = np.array([0, 2, 1, 1]), normal(0, 2, 3)

    def loss(flat):
        return -jnp.mean(categorical.log_prob(X @ flat.reshape(2, 3), y))

    np.testing.assert_allclose(
        jitted(dense_ggn, linear, categorical)(w, (X, y)),
        jax.jit(jax.hessian(loss))(w.ravel()),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.short("gaussian")
def test_matrices_are_means_over_the_examples(case):
    model, likelihood, y = case
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), (X, y))
    for matrix in (dense_fisher, dense_empirical_fisher, dense_ggn):
        np.testing.assert_allclose(
            jitted(matrix, model, likelihood)(PARAMS, twice),
            evaluate(matrix, *case),
            rtol=1e-4,
            atol=1e-6,
        )


def test_empirical_fisher_vanishes_where_the_data_are_fitted_and_the_fisher_does_not():
    w = np.array([[1.0], [-2.0]], np.float32)
    batch = (X, X @ w)
    empirical, fisher = (
        jitted(matrix, linear, gaussian())(w, batch)
        for matrix in (dense_empirical_fisher, dense_fisher)
    )
    np.testing.assert_allclose(empirical, 0, atol=1e-10)
    np.testing.assert_allclose(fisher, X.T @ X / 4, rtol=1e-5)


@pytest.mark.short("dense_fisher")
@pytest.mark.parametrize("matrix", [dense_fisher, dense_ggn])
def test_one_natural_gradient_step_solves_linear_least_squares(matrix):
    y, w = normal(5, 4, 1), np.array([[3.0], [1.0]], np.float32)
    grads = X.T @ (X @ w - y) / 4
    natural = scale_by_inverse_dense(
        functools.partial(matrix, linear, gaussian()), damping=0.0
    )
    step, _ = jax.jit(natural.update)(grads, natural.init(w), w, batch=(X, y))
    solution = np.linalg.lstsq(np.asarray(X), np.asarray(y), rcond=None)[0]
    np.testing.assert_allclose(w - step, solution, rtol=1e-4, atol=1e-5)


def test_one_diagonal_natural_gradient_step_solves_orthogonal_least_squares():
    x = np.diag(np.array([1.0, 5.0, 0.2], np.float32))
    w, y = np.ones((3, 1), np.float32), np.array([[2.0], [3.0], [-1.0]], np.float32)
    optimizer = optax.chain(
        scale_by_inverse_fisher(fisher_exact(linear, gaussian()), damping=0.0),
        optax.scale_by_learning_rate(1.0),
    )
    grads = x.T @ (x @ w - y) / 3
    step, _ = jax.jit(optimizer.update)(grads, optimizer.init(w), w, batch=(x, y))
    np.testing.assert_allclose(x @ (w + step), y, rtol=1e-5)


def fixed(diagonal):
    return optax.stateless(lambda updates, params: diagonal)


def test_inverse_fisher_divides_by_the_clipped_and_damped_diagonal():
    f = jnp.array([3.0, 0.0, -2.0])
    optimizer = scale_by_inverse_fisher(fixed(f), damping=1.0)
    step, _ = optimizer.update(jnp.ones(3), optimizer.init(f), f)
    np.testing.assert_allclose(step, [0.25, 1, 1])
    undamped = scale_by_inverse_fisher(fixed(f), damping=0.0)
    step, _ = undamped.update(jnp.ones(3), undamped.init(f), f)
    np.testing.assert_allclose(step, [1 / 3, 0, 0])


def test_inverse_dense_divides_by_the_clipped_and_damped_eigenvalues():
    matrix = jnp.array([[1.0, 2.0], [2.0, 1.0]])  # Eigenvalues 3 and -1.
    w = jnp.zeros(2)
    for damping, expected in ((1.0, [0.625, -0.375]), (0.0, [1 / 6, 1 / 6])):
        optimizer = scale_by_inverse_dense(lambda *_: matrix, damping=damping)
        step, _ = optimizer.update(jnp.array([1.0, 0.0]), optimizer.init(w), w, batch=w)
        np.testing.assert_allclose(step, expected, rtol=1e-5)


def test_inverse_fisher_keeps_the_dtype_of_the_gradient():
    w = jnp.ones(2, jnp.bfloat16)
    optimizer = scale_by_inverse_fisher(fixed(jnp.array([1.0, 3.0])), damping=1.0)
    step, _ = jax.jit(optimizer.update)(w, optimizer.init(w), w)
    assert step.dtype == jnp.bfloat16
    np.testing.assert_array_equal(step, jnp.array([0.5, 0.25], jnp.bfloat16))


def test_damping_may_be_traced():
    w = jnp.ones(2)
    injected = optax.inject_hyperparams(scale_by_inverse_fisher, ("estimator",))(
        estimator=fixed(jnp.ones(2)), damping=1.0
    )
    step, _ = jax.jit(injected.update)(w, injected.init(w), w)
    np.testing.assert_allclose(step, [0.5, 0.5])


def test_inverse_dense_solves_the_damped_system():
    a = normal(0, 10, 10)
    matrix = a @ a.T
    natural = scale_by_inverse_dense(lambda params, batch: matrix, damping=0.3)
    step, _ = jax.jit(natural.update)(PARAMS, natural.init(PARAMS), PARAMS, batch=())
    expected = np.linalg.solve(matrix + 0.3 * np.eye(10), in_order(PARAMS))
    np.testing.assert_allclose(in_order(step), expected, rtol=1e-3)
    assert jax.tree.structure(step) == jax.tree.structure(PARAMS)


def test_inverse_dense_leaves_out_directions_without_curvature():
    matrix = jnp.diag(jnp.array([2.0, 0.0]))
    natural = scale_by_inverse_dense(lambda params, batch: matrix, damping=0.0)
    w = jnp.ones(2)
    step, _ = natural.update(w, natural.init(w), w, batch=())
    np.testing.assert_allclose(step, [0.5, 0.0])


def test_mistakes_are_named():
    w = jnp.ones(2)
    with pytest.raises(TypeError, match="`estimator`"):
        scale_by_inverse_fisher(lambda: 0, damping=1.0)  # type: ignore
    with pytest.raises(TypeError, match="`matrix_fn`"):
        scale_by_inverse_dense(jnp.eye(2), damping=1.0)  # type: ignore
    for make in (
        functools.partial(scale_by_inverse_fisher, fixed(w)),
        functools.partial(scale_by_inverse_dense, lambda params, batch: jnp.eye(3)),
    ):
        with pytest.raises(ValueError, match="`damping`"):
            make(damping=-1.0)
        optimizer = make(damping=1.0)
        with pytest.raises(ValueError, match="`params`"):
            optimizer.update(w, optimizer.init(w), batch=())
    with pytest.raises(TypeError, match="batch=\\(inputs, targets\\)"):
        optimizer.update(w, optimizer.init(w), w)
    with pytest.raises(ValueError, match="`matrix_fn`"):
        optimizer.update(w, optimizer.init(w), w, batch=())

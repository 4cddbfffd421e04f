"""What `f.explain` says of a step, against counts by hand and what really runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fsam_optax as fsam


D, H, C, N = 20, 30, 5, 32
PARAMS = {"in": np.ones((D, H), "float32"), "out": np.ones((H, C), "float32")}
BATCH = np.ones((N, D), "float32"), np.zeros(N, int)


def model(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


NLL = fsam.negative_log_likelihood(model, fsam.categorical)
# Products of one gradient: forward, and backward by both weights and the hidden layer.
GRADIENT = 2 * N * (2 * D * H + 3 * H * C)
# Of the squares of both weights.
SQUARES = 2 * N * (D * H + H * C)


def cost(perturbation, **options):
    explanation = fsam.value_and_grad(NLL, perturbation, **options).explain(
        PARAMS, BATCH
    )
    return {x.name: x.cost for x in explanation.passes}, explanation


def test_sam_costs_two_gradients():
    passes, explanation = cost(fsam.euclidean_ball(0.1))
    assert passes["at w"] == 1
    np.testing.assert_allclose(passes["at w + eps"], 1, rtol=0.05)
    assert passes["perturbation"] < 0.1
    np.testing.assert_allclose(explanation.cost, sum(passes.values()))
    assert explanation.rules is None


def test_the_one_pass_costs_its_squares_and_tells_the_rules():
    ellipsoid = fsam.fisher_ellipsoid(0.1, fsam.given())
    passes, explanation = cost(ellipsoid, empirical_fisher=True)
    expected = 1 + SQUARES / GRADIENT
    np.testing.assert_allclose(passes["at w"], expected, rtol=0.15)
    assert [leaf.rule for leaf in explanation.rules] == ["outer product"] * 2
    text = str(explanation)
    assert "value, gradient, empirical Fisher" in text
    assert "outer product" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_an_estimator_costs_its_passes_and_a_multi_step_its_gradients():
    drawn = fsam.fisher_i1(NLL, num_samples=3, key=jax.random.key(0))
    passes, _ = cost(fsam.fisher_ellipsoid(0.1, drawn))
    # One pass forward, three back, whose squares are added before the last products;
    # and what is drawn.
    forward, back = 2 * N * (D * H + H * C), 2 * N * H * C
    products = (forward + 3 * back + SQUARES) / GRADIENT
    assert products < passes["perturbation"] < 1.5 * products
    passes, _ = cost(fsam.multi_step(3, fsam.euclidean_ball(0.1)))
    np.testing.assert_allclose(passes["perturbation"], 2, rtol=0.2)


def test_a_descent_has_its_line_and_a_functional_step_costs_two():
    passes, _ = cost(
        fsam.euclidean_ball(0.1), descent=fsam.surrogate_gap(0.4), functional=True
    )
    assert list(passes) == ["at w", "perturbation", "at w + eps", "descent"]
    np.testing.assert_allclose(passes["at w"], 1, rtol=0.1)
    np.testing.assert_allclose(passes["at w + eps"], 1, rtol=0.1)


def test_shapes_and_arguments_are_enough():
    def loss(params, batch, key, kind):
        assert kind == "plain"
        keep = jax.random.bernoulli(key, 0.5, batch[0].shape)
        return NLL(params, (jnp.where(keep, batch[0], 0), batch[1]))

    f = fsam.value_and_grad(loss, fsam.euclidean_ball(0.1))
    like = jax.eval_shape(lambda: (PARAMS, BATCH, jax.random.key(0)))
    explanation = f.explain(*like, kind="plain")
    np.testing.assert_allclose(explanation.cost, 2, rtol=0.1)


def test_shapes_are_enough_where_labels_are_looked_at():
    nll = fsam.negative_log_likelihood(lambda p, x: x @ p["w"], fsam.categorical)
    like = jax.eval_shape(
        lambda: (
            {"w": jnp.ones((D, C))},
            (jnp.ones((N, D)), jnp.zeros(N, int), jnp.ones(N)),
        )
    )
    f = fsam.value_and_grad(
        nll, fsam.fisher_ellipsoid(0.1, fsam.given()), empirical_fisher=True
    )
    (leaf,) = fsam.explain(nll, *like)
    assert leaf.shape == (D, C)
    assert f.explain(*like).rules == (leaf,)
    (leaf,) = fsam.explain(fsam.per_example_norms, nll, *like)
    assert leaf.shape == (D, C)


def test_numbers_of_python_are_explained_as_they_are_squared():
    nll = fsam.negative_log_likelihood(lambda p, x: x * p["s"], fsam.gaussian())
    batch = jnp.ones((N, C)), jnp.zeros((N, C))
    (leaf,) = fsam.explain(nll, {"s": 0.5}, batch)
    assert leaf.shape == ()


@pytest.mark.long
@pytest.mark.parametrize("length", [4, 16])
def test_loops_count_as_often_as_they_run(length):
    def deep(params, x):
        def layer(h, w):
            return jnp.tanh(h @ w), None

        return jax.lax.scan(layer, x, params)[0]

    params = jnp.ones((length, D, D))
    nll = fsam.negative_log_likelihood(deep, fsam.gaussian())
    f = fsam.value_and_grad(
        nll, fsam.fisher_ellipsoid(0.1, fsam.given()), empirical_fisher=True
    )
    at_w = f.explain(params, (BATCH[0], BATCH[0])).passes[0].cost
    np.testing.assert_allclose(at_w, 1 + 1 / 3, rtol=0.2)

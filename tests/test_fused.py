"""Gradient and empirical Fisher from one pass, against two passes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax as fsam
import fsam_optax._fisher.negative_log_likelihood as module
from fsam_optax._engine import loss_power_sums


def model(params, x):
    hidden = x @ params["in"]["kernel"] + params["in"]["bias"][None]
    return jnp.tanh(hidden) @ params["out"]


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "in": {
            "kernel": jax.random.normal(keys[0], (4, 8)),
            "bias": jax.random.normal(keys[1], (8,)),
        },
        "out": jax.random.normal(keys[2], (8, 3)),
    }


@pytest.fixture
def batch():
    x = jax.random.normal(jax.random.key(1), (6, 4))
    return x, jnp.array([0, 1, 2, 0, 1, 2])


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes that yield the gradient and the squares together."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["powers"])
        return loss_power_sums(*args, **kwargs)

    monkeypatch.setattr(module, "loss_power_sums", counted)
    return calls


def empirical():
    return fsam.fisher_empirical(model, fsam.categorical)


# Another object of the same meaning.
ONE_HOT = fsam.categorical._replace(
    score=lambda h, y: jax.nn.one_hot(y, 3) - jax.nn.softmax(h)
)
LOSS = fsam.negative_log_likelihood(model, fsam.categorical)
ESTIMATORS = {
    "alone": empirical,
    "averaged": lambda: optax.chain(empirical(), optax.ema(0.9)),
}


def run(params, batch, perturbation, steps=3, **options):
    f = fsam.value_and_grad(LOSS, perturbation, **options)
    state, values = f.init(params), []
    step = jax.jit(lambda params, state: f(params, state, batch))
    for _ in range(steps):
        value, grads, state = step(params, state)
        params = optax.tree.add_scale(params, -0.1, grads)
        values.append(value)
    return values, params, state


@pytest.mark.parametrize(
    ("estimator", "micro_batches"),
    [("alone", None), ("alone", 2), ("averaged", None)],
)
def test_fused_equals_unfused(params, batch, passes, estimator, micro_batches):
    ellipsoid = fsam.fisher_ellipsoid(0.3, ESTIMATORS[estimator]())
    fused = run(params, batch, ellipsoid, micro_batches=micro_batches)
    assert passes and set(passes) == {(1, 2)}
    del passes[:]
    unfused = run(params, batch, ellipsoid, micro_batches=micro_batches, fused=False)
    assert not passes
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        fused,
        unfused,
    )


@pytest.mark.parametrize(
    "perturbation",
    [
        fsam.euclidean_ball(0.1),
        fsam.fisher_ellipsoid(
            0.1,
            fsam.refresh_every(2, fsam.fisher_empirical(model, fsam.categorical)),
        ),
        fsam.fisher_ellipsoid(0.1, fsam.squared_gradient()),
        fsam.fisher_ellipsoid(0.1, fsam.fisher_empirical(model, ONE_HOT)),
        fsam.fisher_ellipsoid(
            0.1, fsam.fisher_empirical(lambda p, x: model(p, x), fsam.categorical)
        ),
    ],
    ids=[
        "no estimator",
        "computed in a branch",
        "another estimator",
        "another likelihood",
        "another model",
    ],
)
def test_nothing_else_is_fused(params, batch, passes, perturbation):
    f = fsam.value_and_grad(LOSS, perturbation)
    f(params, f.init(params), batch)
    assert not passes


def test_not_fused_between_perturbed_steps(params, batch, passes):
    run(params, batch, fsam.fisher_ellipsoid(0.3, empirical()), steps=2, every=2)
    assert not passes


def test_extra_arguments_of_the_loss_are_not_swallowed(params, batch):
    f = fsam.value_and_grad(LOSS, fsam.fisher_ellipsoid(0.3, empirical()))
    with pytest.raises(TypeError, match="positional"):
        f(params, f.init(params), batch, jax.random.key(0))


def test_weighted_examples_are_not_taken_from_the_unweighted_pass(params, batch):
    weights = jnp.array([1.0, 0.0, 0.0, 2.0, 1.0, 0.0])
    ellipsoid = fsam.fisher_ellipsoid(0.3, empirical())
    results = []
    for fused in (True, False):
        f = fsam.value_and_grad(LOSS, ellipsoid, fused=fused)
        results.append(
            f(
                params,
                f.init(params),
                batch,
                extra_args={"example_weights": weights},
            )[1]
        )
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_bound_methods_of_one_model_are_recognised(params, batch, passes):
    class Model:
        def apply(self, params, x):
            return model(params, x)

    net = Model()
    loss = fsam.negative_log_likelihood(net.apply, fsam.categorical)
    estimator = fsam.fisher_empirical(net.apply, fsam.categorical)
    f = fsam.value_and_grad(loss, fsam.fisher_ellipsoid(0.1, estimator))
    f(params, f.init(params), batch)
    assert passes == [(1, 2)]


def test_loss_is_the_mean_over_examples(params, batch):
    x, y = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(model(params, x), y)
    np.testing.assert_allclose(LOSS(params, batch), losses.mean(), rtol=1e-6)

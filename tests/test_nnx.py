"""Flax NNX: BatchNorm, Dropout, `nnx.Optimizer`, really trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fsam_optax
from fsam_optax import nnx as fsam_nnx
from fsam_optax._common.mapped_axes import is_key


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model, batch):
    x, y = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
    return jnp.mean(losses)


def make_batch(n=32):
    x = jax.random.normal(jax.random.key(1), (n, 4), jnp.float32)
    return x, jnp.argmax(x[:, :3], axis=1)


def rest_of(model):
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if is_key(x) else x,
        nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))),
    )


@pytest.mark.parametrize(
    "perturbation",
    [
        fsam_optax.euclidean_ball(0.05),
        fsam_optax.adaptive_ellipsoid(0.5),
        fsam_optax.fisher_ellipsoid(0.1, fsam_optax.squared_gradient()),
    ],
    ids=["sam", "asam", "fisher_sam"],
)
def test_trains_with_nnx_optimizer(perturbation):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    f = fsam_nnx.value_and_grad(loss_fn, perturbation)

    @nnx.jit
    def step(model, optimizer, state, batch):
        value, grads, state = f(model, state, batch)
        optimizer.update(model, grads)
        return value, state

    state, batch, losses = f.init(model), make_batch(), []
    for _ in range(30):
        value, state = step(model, optimizer, state, batch)
        losses.append(float(value))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert state.perturbation.count == 30
    assert state.perturbation.skipped == 0


def test_default_normalisation_finds_the_biases():
    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    ellipsoid = fsam_optax.adaptive_ellipsoid(1.0, eta=0.0, ord=jnp.inf)
    grads = jax.tree.map(jnp.ones_like, params)
    eps, _ = ellipsoid.update(grads, ellipsoid.init(params), params)
    # T = 1 for a bias, |w| for everything else.
    (bias,), (kernel,) = (jax.tree.leaves(eps["hidden"][k]) for k in ("bias", "kernel"))
    np.testing.assert_array_equal(bias, np.ones(16))
    (weights,) = jax.tree.leaves(params["hidden"]["kernel"])
    np.testing.assert_array_equal(kernel, np.abs(weights))


def test_rest_is_that_of_one_clean_pass():
    model, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    batch = make_batch()
    before = rest_of(model)
    clean_value = loss_fn(plain, batch)
    f = fsam_nnx.value_and_grad(loss_fn, fsam_optax.euclidean_ball(0.5))
    value, _, _ = f(model, f.init(model), batch)
    np.testing.assert_allclose(value, clean_value, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, rest_of(model), rest_of(plain))
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, rest_of(model), before)


def test_gradient_is_that_at_the_perturbed_weights_with_the_same_mask():
    model, batch = Net(nnx.Rngs(0)), make_batch()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def pure(params):
        return loss_fn(nnx.merge(graphdef, params, rest, copy=True), batch)

    g = jax.grad(pure)(params)
    scale = 0.5 / optax.tree.norm(g)
    expected = jax.grad(pure)(jax.tree.map(lambda w, e: w + scale * e, params, g))
    f = fsam_nnx.value_and_grad(loss_fn, fsam_optax.euclidean_ball(0.5))
    _, grads, _ = f(model, f.init(model), batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        grads,
        expected,
    )


def test_micro_batches_average_the_rest():
    batch = make_batch()
    halves = [
        jax.tree.map(lambda x: x[::2], batch),
        jax.tree.map(lambda x: x[1::2], batch),
    ]
    f = fsam_nnx.value_and_grad(loss_fn, fsam_optax.euclidean_ball(0.1))
    rests = []
    for half in halves:
        model = Net(nnx.Rngs(0))
        f(model, f.init(model), half)
        rests.append(rest_of(model))
    model = Net(nnx.Rngs(0))
    f = fsam_nnx.value_and_grad(
        loss_fn, fsam_optax.euclidean_ball(0.1), micro_batches=2
    )
    f(model, f.init(model), batch)
    rest = rest_of(model)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, rests[0]["norm"], rests[1]["norm"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        rest["norm"],
        mean,
    )
    jax.tree.map(np.testing.assert_array_equal, rest["dropout"], rests[0]["dropout"])


def test_aux_comes_from_the_clean_pass():
    model, batch = Net(nnx.Rngs(0)), make_batch()

    def with_aux(model, batch):
        return loss_fn(model, batch), jnp.sum(model.hidden.kernel[...])

    f = fsam_nnx.value_and_grad(with_aux, fsam_optax.euclidean_ball(5.0), has_aux=True)
    clean = jnp.sum(model.hidden.kernel[...])
    (_, aux), _, _ = f(model, f.init(model), batch)
    np.testing.assert_array_equal(aux, clean)


def test_wrong_has_aux_is_rejected():
    model, batch = Net(nnx.Rngs(0)), make_batch()
    f = fsam_nnx.value_and_grad(loss_fn, fsam_optax.euclidean_ball(0.1), has_aux=True)
    with pytest.raises(TypeError, match="has_aux"):
        f(model, f.init(model), batch)

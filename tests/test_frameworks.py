"""Real training in the frameworks that people use."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fsam_optax import (
    adaptive_ellipsoid,
    asam,
    euclidean_ball,
    metrics,
    sam,
    sharpness_aware,
    value_and_grad,
)


RNG = np.random.default_rng(0)
X = jax.device_put(np.float32(RNG.normal(size=(32, 6))))
Y = jnp.asarray(np.argmax(X[:, :3] + X[:, 3:], axis=1))
STEPS = 30


@jax.jit
def cross_entropy(logits):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, Y))


def assert_falls(losses):
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["value_and_grad", "sharpness_aware"])
def test_flax_linen_with_batch_norm_and_dropout(front_end):
    nn = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16)(x)
            x = nn.BatchNorm(use_running_average=False, momentum=0.5)(x)
            x = nn.Dropout(0.1, deterministic=False)(nn.relu(x))
            return nn.Dense(3)(x)

    class TrainState(train_state.TrainState):
        batch_stats: Any
        ascent: Any

    model = Net()
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(model.init)(rngs, X)

    def loss_fn(params, batch, batch_stats, key):
        logits, mutated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return cross_entropy(logits), mutated["batch_stats"]

    perturbation = adaptive_ellipsoid(0.2)
    if front_end == "value_and_grad":
        f = value_and_grad(loss_fn, perturbation, has_aux=True)
        tx = optax.sgd(0.3, momentum=0.9)
        ascent = f.init(variables["params"])
    else:
        tx = sharpness_aware(optax.sgd(0.3, momentum=0.9), perturbation)
        ascent = None
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
        ascent=ascent,
    )

    @jax.jit
    def train_step(state, key):
        if front_end == "value_and_grad":
            (loss, stats), grads, ascent = f(
                state.params, state.ascent, X, state.batch_stats, key
            )
            state = state.apply_gradients(grads=grads)
            return state.replace(batch_stats=stats, ascent=ascent), loss

        def objective(params):
            return loss_fn(params, X, state.batch_stats, key)

        (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = state.tx.update(
            grads,
            state.opt_state,
            state.params,
            grad_fn=lambda p: jax.grad(objective, has_aux=True)(p)[0],
        )
        params = optax.apply_updates(state.params, updates)
        state = state.replace(params=params, opt_state=opt_state, batch_stats=stats)
        return state, loss

    losses, means = [], []
    for key in jax.random.split(jax.random.key(2), STEPS):
        before = state
        state, loss = train_step(state, key)
        losses.append(loss)
        means.append(state.batch_stats["BatchNorm_0"]["mean"])
        # One update of the statistics, with the weights before the step.
        dense = before.params["Dense_0"]
        clean = jnp.mean(X @ dense["kernel"] + dense["bias"][None], axis=0)
        expected = 0.5 * before.batch_stats["BatchNorm_0"]["mean"] + 0.5 * clean
        np.testing.assert_allclose(means[-1], expected, rtol=1e-4, atol=1e-5)
    assert_falls(losses)
    ascended = state.ascent if front_end == "value_and_grad" else state.opt_state
    assert optax.tree.get(ascended, "perturbation_norm") > 0


@pytest.mark.slow
def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(6, 3, 16, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, batch):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(batch))

    # In Equinox the output channels of a kernel come first.
    perturbation = adaptive_ellipsoid(0.2, scope="filter", filter_axis=0)
    f, tx = value_and_grad(loss_fn, perturbation), optax.adam(0.05)

    @eqx.filter_jit
    def train_step(params, state, opt_state):
        loss, grads, state = f(params, state, X)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), state, opt_state, loss

    state, opt_state, losses = f.init(params), tx.init(params), []
    for _ in range(STEPS):
        params, state, opt_state, loss = train_step(params, state, opt_state)
        losses.append(loss)
    assert_falls(losses)
    assert eqx.combine(params, static)(X[0]).shape == (3,)


def test_equinox_model_with_functions_in_it_is_explained():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(6, 3, 4, 1, key=jax.random.key(0))
    f = value_and_grad(lambda m, b: cross_entropy(jax.vmap(m)(b)), euclidean_ball(0.1))
    params = eqx.filter(model, eqx.is_inexact_array)
    with pytest.raises(TypeError, match=r"not an array.*eqx.partition\(model"):
        f(model, f.init(params), X)


@pytest.mark.slow
def test_haiku_with_state_and_keys():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = hk.Linear(16)(x)
        x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.5)(
            x, is_training=True
        )
        x = hk.dropout(hk.next_rng_key(), 0.1, jax.nn.relu(x))
        return hk.Linear(3)(x)

    model = hk.transform_with_state(forward)
    params, model_state = jax.jit(model.init)(jax.random.key(0), X)

    def loss_fn(params, batch, model_state, key):
        logits, model_state = model.apply(params, model_state, key, batch)
        return cross_entropy(logits), model_state

    f = value_and_grad(loss_fn, adaptive_ellipsoid(0.2), has_aux=True)
    tx = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.3, momentum=0.9))

    @jax.jit
    def train_step(params, model_state, state, opt_state, key):
        (loss, model_state), grads, state = f(params, state, X, model_state, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), model_state, state, opt_state, loss

    state, opt_state, losses = f.init(params), tx.init(params), []
    for i, key in enumerate(jax.random.split(jax.random.key(1), STEPS)):
        params, model_state, state, opt_state, loss = train_step(
            params, model_state, state, opt_state, key
        )
        losses.append(loss)
        counter = model_state["batch_norm/~/mean_ema"]["counter"]
        assert counter == i + 1  # Once a step, not twice.
    assert_falls(losses)


# What the messages advise, followed.


def linear_problem():
    params = {"w": jnp.ones((6, 3)), "b": jnp.zeros(3)}

    def loss(params, batch):
        return cross_entropy(batch @ params["w"] + params["b"][None])

    return params, loss


@pytest.mark.long
def test_equinox_with_an_optimizer():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(6, 3, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def pure_loss(params):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(X))

    grad_fn = jax.grad(pure_loss)
    tx = sam(optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"failed.*eqx.combine\(params, static\)"):
        # The filtered model in the place of the combined one.
        tx.update(
            grad_fn(params),
            tx.init(params),
            params,
            grad_fn=jax.grad(lambda model: cross_entropy(jax.vmap(model)(X))),
        )
    updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    assert pure_loss(eqx.apply_updates(params, updates)) < pure_loss(params)


@pytest.mark.long
def test_train_state_swallows_grad_fn_and_its_base_does_not_need_it():
    train_state = pytest.importorskip("flax.training.train_state")
    params, loss = linear_problem()
    f = value_and_grad(loss, euclidean_ball(0.05))
    wrong = train_state.TrainState.create(
        apply_fn=loss, params=params, tx=sam(optax.sgd(0.1))
    )
    _, grads, ascent = f(params, f.init(params), X)
    with pytest.raises(TypeError, match=r"TrainState.apply_gradients.*value_and_grad"):
        wrong.apply_gradients(grads=grads, grad_fn=lambda p: jax.grad(loss)(p, X))
    state = train_state.TrainState.create(
        apply_fn=loss, params=params, tx=optax.sgd(0.1)
    )
    with pytest.raises(TypeError, match=r"pass the parameters in it, `state.params`"):
        f(state, ascent, X)
    assert loss(state.apply_gradients(grads=grads).params, X) < loss(params, X)


def test_lookahead():
    params, loss = linear_problem()
    f = value_and_grad(loss, euclidean_ball(0.05))
    both = optax.LookaheadParams.init_synced(params)
    grads = jax.tree.map(jnp.ones_like, params)
    around = optax.lookahead(sam(optax.sgd(0.1)), sync_period=2, slow_step_size=0.5)
    with pytest.raises(TypeError, match=r"`optax.lookahead` do.*value_and_grad"):
        around.update(grads, around.init(both), both)
    with pytest.raises(TypeError, match=r"`params.fast`"):
        f(both, f.init(params), X)
    tx = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    state, opt_state = f.init(params), tx.init(both)

    @jax.jit
    def step(both, state, opt_state):
        _, grads, state = f(both.fast, state, X)
        updates, opt_state = tx.update(grads, opt_state, both)
        return optax.apply_updates(both, updates), state, opt_state

    for _ in range(4):
        both, state, opt_state = step(both, state, opt_state)
    assert loss(both.slow, X) < loss(params, X)


def test_nnx_optimizer_around_a_method():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, asam(optax.sgd(0.1)), wrt=nnx.Param)

    def loss(model):
        return cross_entropy(model(X))

    grads, before = nnx.grad(loss)(model), loss(model)
    with pytest.raises(TypeError, match=r"`fsam_optax.nnx.value_and_grad\(.*nnx.merge"):
        optimizer.update(model, grads, grad_fn=nnx.grad(loss))
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def pure_loss(params):
        return loss(nnx.merge(graphdef, params, rest))

    optimizer.update(model, grads, grad_fn=jax.grad(pure_loss))
    assert loss(model) < before
    found = metrics(optimizer.opt_state)
    assert jax.tree.leaves(found["perturbation_norm"])[0] > 0

"""States and metrics of micro-batches and devices, when some find no perturbation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax as fsam
from fsam_optax._common.mapped_axes import merge


AVERAGED = optax.chain(fsam.squared_gradient(), optax.ema(0.9))


def loss_fn(w, batch):
    return jnp.mean(batch @ w)


@pytest.mark.short("second-zero")
@pytest.mark.parametrize("bad", [0.0, jnp.nan], ids=["zero", "nan"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_skipped_micro_batch_does_not_count(bad, first):
    good, out = np.ones((2, 3), np.float32), np.full((2, 3), bad, np.float32)
    parts = [out, good] if first else [good, out]
    batch = np.stack(parts, axis=1).reshape(4, 3)  # Cut with a stride.
    ellipsoid = fsam.fisher_ellipsoid(0.1, AVERAGED)
    f = fsam.value_and_grad(loss_fn, ellipsoid, micro_batches=2)
    _, _, state = jax.jit(f)(jnp.ones(3), f.init(jnp.ones(3)), batch)
    alone = fsam.value_and_grad(loss_fn, ellipsoid)
    _, _, expected = jax.jit(alone)(jnp.ones(3), alone.init(jnp.ones(3)), good)
    jax.tree.map(
        np.testing.assert_array_equal,
        state.perturbation.operator,
        expected.perturbation.operator,
    )
    assert state.perturbation.skipped == 1


def test_nothing_is_touched_if_every_micro_batch_is_skipped():
    f = fsam.value_and_grad(
        loss_fn, fsam.fisher_ellipsoid(0.1, AVERAGED), micro_batches=2
    )
    w, step = jnp.ones(3), jax.jit(f)
    _, _, before = step(w, f.init(w), jnp.ones((4, 3)))
    _, _, state = step(w, before, jnp.zeros((4, 3)))
    jax.tree.map(
        np.testing.assert_array_equal,
        state.perturbation.operator,
        before.perturbation.operator,
    )


NLL = fsam.negative_log_likelihood(lambda w, x: x @ w, fsam.categorical)
IMPOSSIBLE = jnp.ones((4, 3)), jnp.array([0, 1, 7, 1])


@pytest.mark.short("True")
@pytest.mark.parametrize("lagged", [True, False])
def test_an_impossible_label_in_one_micro_batch_is_nan_in_all(lagged):
    w = jnp.ones((3, 2))
    ball = fsam.fisher_ellipsoid(0.1, AVERAGED)
    f = fsam.value_and_grad(NLL, ball, micro_batches=2, lagged=lagged)
    value, grads, state = jax.jit(f)(w, f.init(w), IMPOSSIBLE)
    assert jnp.isnan(value) and jnp.all(jnp.isnan(grads))
    assert all(
        jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state.perturbation.operator)
    )


def on_two_devices(function, *specs):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=jax.P())
    )


def test_what_a_device_without_weight_made_may_be_nan():
    def merged(x, weight):
        return merge(x[0], "d", weight[0])

    x, weight = jnp.array([[jnp.nan, jnp.inf], [1.0, 2.0]]), jnp.array([0.0, 3.0])
    found = on_two_devices(merged, jax.P("d"), jax.P("d"))(x, weight)
    np.testing.assert_array_equal(found, x[1])


def test_a_skipped_device_does_not_count():
    f = fsam.value_and_grad(
        loss_fn, fsam.fisher_ellipsoid(0.1, AVERAGED), axis_name="d"
    )
    state = f.init(jnp.ones(3))

    def step(w, state, batch):
        return f(w, state, batch)[2]

    batch = jnp.concatenate([jnp.ones((2, 3)), jnp.zeros((2, 3))])
    sharded = on_two_devices(step, jax.P(), jax.P(), jax.P("d"))
    new = sharded(jnp.ones(3), state, batch)
    (ema,) = (s.ema for s in new.perturbation.operator if hasattr(s, "ema"))
    np.testing.assert_allclose(ema, np.full(3, 0.1), rtol=1e-6)
    assert new.perturbation.skipped == 1


def test_an_impossible_label_on_one_device_is_nan_on_all():
    w = jnp.ones((3, 2))
    f = fsam.value_and_grad(NLL, fsam.euclidean_ball(0.1), axis_name="d")
    step = on_two_devices(lambda *args: f(*args)[:2], jax.P(), jax.P(), jax.P("d"))
    assert all(jnp.all(jnp.isnan(x)) for x in step(w, f.init(w), IMPOSSIBLE))


def test_a_diagonal_is_refreshed_by_devices_and_kept():
    w, batch = jnp.ones((3, 2)), (jnp.arange(12.0).reshape(4, 3), jnp.ones(4, int))
    estimator = fsam.refresh_every(2, fsam.fisher_exact(NLL))
    f = fsam.value_and_grad(NLL, fsam.fisher_ellipsoid(0.1, estimator), axis_name="d")
    step = on_two_devices(lambda *args: f(*args)[2], jax.P(), jax.P(), jax.P("d"))
    first = step(w, f.init(w), batch)
    diagonal = functools.partial(fsam.diagonal, fsam.fisher_exact(NLL))
    expected = jax.jit(diagonal)(w, batch)
    operator = first.perturbation.operator
    np.testing.assert_allclose(operator.diagonal, expected, rtol=1e-6)
    second = step(2 * w, first, batch).perturbation.operator
    np.testing.assert_array_equal(second.diagonal, operator.diagonal)
    assert (operator.age, second.age) == (1, 0)


def test_a_lagged_displacement_is_the_mean_of_those_of_the_devices():
    """Each has an F of its own examples, and the gradient of all."""
    w = jnp.ones((3, 2))
    batch = (jnp.arange(12.0).reshape(4, 3) / 9, jnp.array([0, 1, 1, 1]))
    ball = fsam.fisher_ellipsoid(0.1, fsam.fisher_exact(NLL))
    f = fsam.value_and_grad(NLL, ball, axis_name="d", lagged=True)
    step = on_two_devices(lambda *args: f(*args)[2], jax.P(), jax.P(), jax.P("d"))
    found = step(w, f.init(w), batch).displacement
    grads = jax.jit(jax.grad(NLL))(w, batch)
    halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(2), slice(2, 4))]
    update = jax.jit(ball.update)
    each = [update(grads, ball.init(w), w, batch=half)[0] for half in halves]
    np.testing.assert_allclose(found, (each[0] + each[1]) / 2, rtol=1e-4)
    assert jnp.max(jnp.abs(each[0] - each[1])) > 1e-3


def test_a_plain_step_leaves_memory_as_it_is_to_the_bit():
    """The mean of eleven equal numbers may be another one."""
    ball = optax.chain(fsam.averaged(0.9), fsam.euclidean_ball(0.1))
    tx = fsam.sharpness_aware(optax.sgd(0.1), ball, axis_name="d", every=2)
    w, grads = jnp.ones(50), jax.random.normal(jax.random.key(0), (11, 50))

    @jax.jit
    def step(states):
        def on_device(g, state):
            return tx.update(g, state, w, grad_fn=lambda w: g)[1].perturbation

        return jax.vmap(on_device, axis_name="d")(grads, states)

    states = jax.tree.map(lambda x: jnp.stack([x] * 11), tx.init(w))
    first = step(states)
    second = step(states._replace(step=states.step + 1, perturbation=first))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert jnp.all(first[0].seen == 1) and jnp.any(first[0].average != 0)


def test_cosine_compares_gradients_of_the_same_device():
    tx = fsam.sharpness_aware(optax.sgd(0.1), fsam.euclidean_ball(0.0), axis_name="d")
    w = jnp.ones(3)

    def step(w, state, batch):
        grad_fn = jax.grad(lambda w: jnp.mean((batch @ w) ** 2))
        w_local = jax.tree.map(lambda x: x + 0 * batch[0, 0], w)
        return tx.update(grad_fn(w_local), state, w, grad_fn=grad_fn)[1]

    batch = jax.random.normal(jax.random.key(0), (4, 3))
    state = on_two_devices(step, jax.P(), jax.P(), jax.P("d"))(w, tx.init(w), batch)
    np.testing.assert_allclose(state.metrics.gradient_cosine, 1.0, rtol=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_metrics_of_parameters_sharded_by_hand_are_global(every):
    tx = fsam.sharpness_aware(
        optax.sgd(0.1), fsam.euclidean_ball(0.1, shard_axes="d"), every=every
    )
    w = jnp.array([3.0, -4.0])

    def step(w, state):
        return tx.update(2 * w, state, w, grad_fn=lambda w: 2 * w)[1].metrics

    sharded = on_two_devices(step, jax.P("d"), jax.P())
    state = jax.tree.map(jnp.asarray, tx.init(w))
    metrics = sharded(w, state)
    np.testing.assert_allclose(metrics.grad_norm, 10.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.perturbation_norm, 0.1, rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_cosine, 1.0, rtol=1e-6)

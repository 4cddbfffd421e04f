"""The one step under both front ends: descent, guards, schedule, hand-over."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_sharpness_aware import assert_close, assert_equal

from fsam_optax import (
    adaptive_ellipsoid,
    euclidean_ball,
    fisher_ellipsoid,
    perturbation,
    sharpness_aware,
    squared_gradient,
    value_and_grad,
)


PARAMS = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([[0.3, 0.7]])}


def loss(params, scale):
    return scale * sum(jnp.sum(w**4) for w in jax.tree.leaves(params))


def by_transformation(tx_perturbation, **options):
    """Init and a step `(params, state, scale) -> (gradient for the base, state)`."""
    base = optax.stateless(lambda updates, _: updates)
    tx = sharpness_aware(base, tx_perturbation, **options)

    def step(params, state, scale):
        def grad_fn(p):
            return jax.grad(loss)(p, scale)

        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

    return tx.init, step


def by_oracle(tx_perturbation, **options):
    f = value_and_grad(loss, tx_perturbation, **options)
    return f.init, lambda params, state, scale: f(params, state, scale)[1:]


FRONT_ENDS = {"transformation": by_transformation, "oracle": by_oracle}


@pytest.fixture(params=FRONT_ENDS)
def front_end(request):
    return FRONT_ENDS[request.param]


def run(front_end, tx_perturbation, scales=(1.0, 2.0, 3.0), **options):
    """Returns what each step made of PARAMS, and the last state."""
    init, step = front_end(tx_perturbation, **options)
    state, results = init(PARAMS), []
    step = jax.jit(step)
    for scale in scales:
        d, state = step(PARAMS, state, jnp.float32(scale))
        results.append(d)
    return results, state


# The descent


def mixing():
    """d = h - g / 2, counting in its state the steps with a perturbation."""

    def update(h, state, params, *, clean_grads, eps, **extra):
        assert {"grad_fn"} <= extra.keys()
        d = jax.tree.map(lambda h, g: h - g / 2, h, clean_grads)
        return d, state if eps is None else state + 1

    return optax.GradientTransformationExtraArgs(lambda _: jnp.int32(0), update)


def test_a_descent_sees_both_gradients_and_plain_steps_have_no_eps(front_end):
    ball = euclidean_ball(0.3)
    results, state = run(front_end, ball, descent=mixing(), every=2)
    assert state.descent == 2
    g = jax.grad(loss)(PARAMS, 1.0)
    (h, _, _), _ = run(front_end, ball)
    assert_close(results[0], jax.tree.map(lambda h, g: h - g / 2, h, g), rtol=1e-6)
    assert_close(results[1], jax.tree.map(lambda g: 2 * g / 2, g), rtol=1e-6)


@pytest.mark.short("descent, every")
@pytest.mark.parametrize(
    ("ball", "options"),
    [
        (euclidean_ball(0.3), {}),
        (euclidean_ball(0.3), {"metrics": False, "every": 2}),
        (adaptive_ellipsoid(0.3), {"descent": mixing()}),
        (fisher_ellipsoid(0.3, squared_gradient()), {"metrics": False}),
        (euclidean_ball(0.3), {"descent": mixing(), "every": 2}),
    ],
    ids=["sam", "every", "asam, descent", "fisher", "descent, every"],
)
def test_front_ends_agree_bit_for_bit(ball, options):
    def both():
        return (run(end, ball, (1.0, 2.0), **options) for end in FRONT_ENDS.values())

    with jax.disable_jit():
        one, two = both()
    assert_equal(one[0], two[0])
    assert_equal(one[1].metrics, two[1].metrics)
    # Compiled, the descent may be fused with either gradient.
    one, two = both()
    assert_close(one[0], two[0], rtol=2e-6)
    assert_close(one[1].metrics, two[1].metrics, rtol=2e-6)


def test_a_descent_of_another_shape_is_refused(front_end):
    first = optax.stateless(lambda updates, _: {"a": updates["a"]})
    with pytest.raises(ValueError, match=r"the descent's output.*\['b'\]"):
        run(front_end, euclidean_ball(0.3), descent=first)


def test_a_direction_has_the_dtype_of_the_gradient(front_end):
    wide = optax.stateless(
        lambda h, _: jax.tree.map(lambda x: x.astype(jnp.float32), h)
    )
    init, step = front_end(euclidean_ball(0.3), descent=wide, every=2)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    d, _ = jax.jit(step)(params, init(params), jnp.bfloat16(1.0))
    assert d["a"].dtype == jnp.bfloat16


# When


@pytest.mark.short("transformation-any", "oracle-any")
@pytest.mark.parametrize(
    ("every", "perturbed"),
    [
        (lambda step: step >= 2, [False, False, True, True]),
        (lambda step: step < 1, [True, False, False, False]),
        (lambda step: jnp.array([True, False, True, True])[step], [1, 0, 1, 1]),
    ],
    ids=["late phase", "early", "any"],
)
def test_every_as_a_function_of_the_step(front_end, every, perturbed):
    results, state = run(front_end, euclidean_ball(0.3), (1.0,) * 4, every=every)
    g = jax.grad(loss)(PARAMS, 1.0)
    for d, is_perturbed in zip(results, perturbed, strict=True):
        assert (float(jnp.abs(d["a"] - g["a"]).max()) > 0.1) == is_perturbed
    assert state.perturbation.count == sum(perturbed)


def test_a_schedule_of_another_shape_is_refused(front_end):
    with pytest.raises(ValueError, match=r"`every` must return one bool.*\(2,\)"):
        run(front_end, euclidean_ball(0.3), every=lambda step: jnp.ones(2, bool))


# Guards


def ema():
    """A moving average whose state may be compared."""
    return optax.chain(optax.ema(0.9, debias=False), euclidean_ball(0.3))


@pytest.mark.parametrize(("every", "bad"), [(1, np.nan), (2, np.inf)])
def test_a_gradient_that_is_not_finite_touches_no_memory(front_end, every, bad):
    around = optax.named_chain(("nested", ema()))
    init, step = front_end(around, every=every)
    step, before, state = jax.jit(step), None, init(PARAMS)
    for scale in (1.0, *(bad,) * every, *(1.0,) * every):
        now = optax.tree.get(state, "ema")
        if not np.isfinite(scale):
            before = now if before is None else before
        _, state = step(PARAMS, state, jnp.float32(scale))
        if not np.isfinite(scale):
            assert_equal(optax.tree.get(state, "ema"), before)
    assert optax.tree.get(state, "skipped") == 1
    # The step after it is perturbed again.
    assert_close(optax.tree.get(state, "perturbation_norm"), 0.3, rtol=1e-6)


def test_a_leaf_that_the_ball_masks_is_kept_out_of_memory_too(front_end):
    masked = euclidean_ball(0.3, mask={"a": True, "b": False})
    average = optax.ema(0.9, debias=False)
    init, step = front_end(optax.chain(average, masked))
    params = {**PARAMS, "b": jnp.full((1, 2), jnp.nan)}
    for start, kept in ((PARAMS, False), (params, True)):
        state = init(start)
        _, after = step(start, state, jnp.float32(1.0))
        before, now = optax.tree.get(state, "ema"), optax.tree.get(after, "ema")
        assert bool(jnp.all(before["a"] == now["a"])) == kept
        assert bool(jnp.all(jnp.isfinite(now["b"])))


def test_memory_of_the_descent_is_guarded(front_end):
    def update(h, state, params, *, eps, **extra):
        return h, h if eps is not None else state

    keep = optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params), update
    )
    one = run(front_end, euclidean_ball(0.3), (1.0,), descent=keep)[1]
    two = run(front_end, euclidean_ball(0.3), (1.0, np.nan), descent=keep)[1]
    assert_equal(one.descent, two.descent)


@pytest.mark.short("transformation")
def test_a_nan_in_one_of_several_balls_stops_all_and_a_zero_only_its_own(front_end):
    balls = optax.partition({"a": ema(), "b": ema()}, {"a": "a", "b": "b"})

    def grads(name, value):
        def update(updates, state, params=None, **extra):
            return {**updates, name: jnp.full_like(updates[name], value)}, state

        return optax.GradientTransformationExtraArgs(
            lambda _: optax.EmptyState(), update
        )

    for value, moved in ((jnp.nan, 0.0), (0.0, 0.3)):
        both = optax.chain(grads("a", value), balls)
        _, state = run(front_end, both, (1.0,))
        norms = optax.tree.get(state, "leaf_perturbation_norms")
        assert norms["a"] == 0
        assert_close(norms["b"], moved, rtol=1e-6)


def test_a_perturbation_without_a_ball_is_guarded_too(front_end):
    def update(updates, state, params=None, **extra):
        average = jax.tree.map(lambda m, g: m + g, state, updates)
        return jax.tree.map(lambda m: 0.01 * m, average), average

    own = optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params), update
    )
    one = run(front_end, own, (1.0,))[1]
    two = run(front_end, own, (1.0, np.nan))[1]
    assert_equal(one.perturbation, two.perturbation)
    assert two.metrics.perturbation_norm == 0


# What is handed over


@pytest.mark.short("transformation")
def test_the_perturbation_can_take_gradients_elsewhere(front_end):
    def update(updates, state, params=None, *, grad_fn, **extra):
        half = jax.tree.map(lambda w: w / 2, params)
        eps, state = ball.update(grad_fn(half), state, params)
        return eps, state

    ball = perturbation(0.3)
    elsewhere = optax.GradientTransformationExtraArgs(ball.init, update)
    # The gradient of w^4 has the same direction at w / 2.
    assert_close(run(front_end, elsewhere)[0], run(front_end, ball)[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["value_fn", "obj_fn"])
def test_a_loss_in_the_place_of_its_gradient(name):
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = sharpness_aware(base, euclidean_ball(0.3))
    objective = functools.partial(loss, scale=1.0)
    g = jax.grad(objective)(PARAMS)
    state = tx.init(PARAMS)
    by_gradient, _ = tx.update(g, state, PARAMS, grad_fn=jax.grad(objective))
    assert seen == {}
    by_value, _ = tx.update(g, state, PARAMS, **{name: objective})
    assert seen == {name: objective}
    assert_equal(by_value, by_gradient)
    # Both: the gradient wins, and the value still reaches the base.
    doubled, _ = tx.update(
        g, state, PARAMS, grad_fn=jax.grad(lambda p: 2 * objective(p)), value_fn=loss
    )
    assert_close(doubled, jax.tree.map(lambda x: 2 * x, by_value), rtol=1e-6)


@pytest.mark.long
def test_lbfgs_gets_what_it_needs_and_nothing_else():
    objective = functools.partial(loss, scale=1.0)
    tx = sharpness_aware(optax.lbfgs(), euclidean_ball(0.01))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        params, state = step(params, state)
    assert objective(params) < 0.1 * objective(PARAMS)


def test_a_gradient_of_more_than_parameters_is_refused():
    tx = sharpness_aware(optax.sgd(0.1), euclidean_ball(0.3))
    with pytest.raises(TypeError, match=r"`grad_fn` must take the parameters alone.*b"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss))


# Foreign states


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (None, "must be a .*State, got NoneType"),
        (optax.adam(0.1).init(PARAMS), "must be a .*State, got the state of"),
        ({}, "must be a .*State, got dict"),
    ],
    ids=["none", "adam", "dict"],
)
def test_a_state_of_another_kind_is_refused(front_end, state, match):
    _, step = front_end(euclidean_ball(0.3))
    with pytest.raises(TypeError, match=f"`state` {match}.*init"):
        step(PARAMS, state, 1.0)


def test_a_state_of_other_parameters_or_settings_is_refused(front_end):
    init, step = front_end(ema())
    other = {**PARAMS, "a": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"\['a'\].*\(4,\).*\(3,\)"):
        step(PARAMS, init(other), 1.0)
    init, _ = front_end(euclidean_ball(0.3))
    with pytest.raises(ValueError, match="another perturbation"):
        step(PARAMS, init(PARAMS), 1.0)

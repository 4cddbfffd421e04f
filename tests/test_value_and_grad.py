"""The gradient oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from test_perturbation import arguments
from test_sharpness_aware import (
    assert_close,
    assert_equal,
    BATCH,
    BATCHES,
    gradient,
    loss,
    PARAMS,
    PERTURBATIONS,
    SHAPES,
)

import fsam_optax
from fsam_optax import euclidean_ball, sharpness_aware, value_and_grad


def call(f, *args, params=PARAMS, batch=BATCH, **kwargs):
    return f(params, f.init(params), batch, *args, **kwargs)


def cut(batch, parts):
    """Returns the micro-batches of a batch: row i is in part i mod m."""
    return [
        jax.tree.map(lambda x, i=i: np.asarray(x)[i::parts], batch)
        for i in range(parts)
    ]


# The two front ends are one method


@pytest.mark.long
@pytest.mark.parametrize(
    ("geometry", "jit", "every"),
    [(geometry, False, 1) for geometry in PERTURBATIONS]
    + [("euclidean", True, 1), ("filter", True, 1), ("fisher", True, 2)],
)
def test_front_ends_are_bit_equal(geometry, every, jit):
    base = optax.sgd(0.1, momentum=0.9)
    tx = sharpness_aware(base, PERTURBATIONS[geometry](0.3), every=every)
    f = value_and_grad(loss, PERTURBATIONS[geometry](0.3), every=every)

    def by_transformation(params, state, batch):
        def grad_fn(p):
            return jax.grad(loss)(p, batch)

        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    def by_oracle(params, state, batch):
        _, grads, ascent = f(params, state[0], batch)
        updates, base_state = base.update(grads, state[1], params)
        return optax.apply_updates(params, updates), (ascent, base_state)

    if jit:
        by_transformation, by_oracle = jax.jit(by_transformation), jax.jit(by_oracle)
    w, v = PARAMS, PARAMS
    w_state, v_state = tx.init(w), (f.init(v), base.init(v))
    for batch in BATCHES[:2]:
        w, w_state = by_transformation(w, w_state, batch)
        v, v_state = by_oracle(v, v_state, batch)
    assert not np.array_equal(w["k"], PARAMS["k"])
    assert_equal(w, v)
    assert_equal(w_state.base, v_state[1])
    assert_equal(w_state.perturbation, v_state[0].perturbation)
    assert_equal(w_state.metrics, v_state[0].metrics)
    assert_equal(w_state.step, v_state[0].step)


# What a call returns


def test_value_and_aux_are_those_of_the_clean_pass_and_arguments_go_to_both():
    seen = []

    def spy(params, batch, *args, scale, **kwargs):
        jax.debug.callback(
            lambda w: seen.append((np.array(w), args, scale, kwargs)), params["k"]
        )
        return scale * loss(params, batch), {"k": params["k"], "n": jnp.int32(7)}

    f = value_and_grad(spy, euclidean_ball(0.5), has_aux=True)
    (value, aux), grads, state = call(f, "a", "b", scale=2.0, mode="m")
    jax.effects_barrier()
    (clean, *clean_args), (perturbed, *perturbed_args) = seen
    assert clean_args == perturbed_args == [("a", "b"), 2.0, {"mode": "m"}]
    plain = jax.grad(loss)(PARAMS, BATCH)
    eps, _ = oracles.perturbation(0.5, plain, oracles.no_scale(PARAMS))
    point = {n: np.asarray(PARAMS[n]) + eps[n] for n in SHAPES}
    assert_equal(clean, PARAMS["k"])
    assert_close(perturbed, point["k"], rtol=1e-6)
    assert_equal(aux, {"k": PARAMS["k"], "n": 7})
    assert_close(value, 2 * loss(PARAMS, BATCH), rtol=1e-6)
    point = {n: jnp.asarray(x, jnp.float32) for n, x in point.items()}
    above, expected = jax.value_and_grad(loss)(point, BATCH)
    assert_close(grads, {n: 2 * g for n, g in expected.items()}, rtol=1e-5)
    sharpness = optax.tree.get(state, "sharpness")
    assert sharpness.dtype == jnp.float32
    assert_close(sharpness, 2 * (above - loss(PARAMS, BATCH)), rtol=1e-5)


def test_sharpness_does_not_round_the_losses_to_float32(x64):
    f = value_and_grad(lambda w, b: b * jnp.sum(w**2), euclidean_ball(1e-9))
    w = jnp.array([1.0, 2.0])
    _, _, state = f(w, f.init(w), 1.0)
    np.testing.assert_allclose(state.sharpness, 1e-9 * np.sqrt(20), rtol=1e-5)
    assert state.sharpness.dtype == jnp.float32


def test_without_aux_the_value_stands_alone():
    value, grads, _ = call(value_and_grad(loss, euclidean_ball(0.0)))
    expected, expected_grads = jax.value_and_grad(loss)(PARAMS, BATCH)
    assert_equal((value, grads), (expected, expected_grads))


def test_same_dropout_in_both_passes():
    def dropped(params, batch, key):
        keep = jax.random.bernoulli(key, 0.5, (3, 2))
        return jnp.sum(jnp.where(keep, params["k"], 0) ** 2), keep

    params = {"k": jnp.ones((3, 2))}
    f = value_and_grad(dropped, euclidean_ball(1.0), has_aux=True)
    for seed in range(3):
        (_, keep), grads, _ = call(f, jax.random.key(seed), params=params)
        # With another mask in the second pass, the factor would be 1 for some.
        factor = 1 + 1 / np.sqrt(np.sum(keep))
        assert_close(grads["k"], np.where(keep, 2 * factor, 0), rtol=1e-6)


def test_extra_args_go_to_the_perturbation_and_not_to_the_loss():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra, params=params)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    call(value_and_grad(loss, spy), extra_args={"fisher": "f"})
    assert_close(seen.pop("grad_fn")(PARAMS), gradient(PARAMS, BATCH), rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    assert_equal(seen.pop("displaced")(zero), PARAMS)
    told = {"batch": BATCH, "fisher": "f", "loss_args": (), "loss_kwargs": {}}
    assert seen == {**told, "params": PARAMS}
    call(value_and_grad(loss, spy), extra_args={"batch": "other"})
    assert seen["batch"] == "other"


def test_every_kth_step_is_perturbed_from_the_first_on():
    every = 2
    f = value_and_grad(
        loss, euclidean_ball(lambda count: 0.1 * (count + 1)), every=every
    )
    one_step = jax.jit(lambda state: f(PARAMS, state, BATCH))
    value, plain = jax.value_and_grad(loss)(PARAMS, BATCH)
    state = f.init(PARAMS)
    for i in range(5):
        step_value, grads, new_state = one_step(state)
        assert_close(step_value, value, rtol=1e-6)
        assert new_state.step == i + 1
        assert new_state.perturbation.count == i // every + 1
        if i % every == 0:
            assert np.max(np.abs(grads["k"] - plain["k"])) > 1e-3
            expected_rho = 0.1 * (i // every + 1)
            assert_close(new_state.perturbation.rho, expected_rho, rtol=1e-6)
        else:
            assert_close(grads, plain, rtol=1e-6)
            assert_equal(new_state._replace(step=i), state._replace(step=i))
        state = new_state


def test_plain_steps_cost_one_gradient():
    calls = []

    def counted(params, batch):
        jax.debug.callback(lambda: calls.append(None), ordered=True)
        return loss(params, batch)

    f = value_and_grad(counted, euclidean_ball(0.1), every=3)
    one_step = jax.jit(lambda state: f(PARAMS, state, BATCH)[2])
    state, costs = f.init(PARAMS), []
    for _ in range(4):
        calls.clear()
        state = one_step(state)
        jax.effects_barrier()
        costs.append(len(calls))
    assert costs == [2, 1, 1, 2]


# Micro-batches


@pytest.mark.short("element-8")
@pytest.mark.parametrize(
    ("geometry", "parts"),
    [("euclidean", 1), ("element", 8), ("fisher", 4)],
)
def test_micro_batches_have_a_perturbation_each(geometry, parts):
    def loss_and_aux(params, batch):
        return loss(params, batch), {"first": batch[0][0]}

    tx = PERTURBATIONS[geometry](0.3)
    f = value_and_grad(loss_and_aux, tx, has_aux=True, micro_batches=parts)
    (value, aux), grads, state = jax.jit(f.apply)(PARAMS, f.init(PARAMS), BATCH)
    singles = []
    for micro_batch in cut(BATCH, parts):
        plain = gradient(PARAMS, micro_batch)
        eps, _ = tx.update(plain, tx.init(PARAMS), PARAMS)
        point = {n: PARAMS[n] + eps[n] for n in SHAPES}
        singles.append((gradient(point, micro_batch), plain))
    expected, plain = (
        jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *trees)
        for trees in zip(*singles, strict=True)
    )
    assert_close(grads, expected, rtol=1e-6)
    assert_close(value, loss(PARAMS, BATCH), rtol=1e-6)
    assert_equal(aux["first"], np.asarray(BATCH[0])[:parts])
    assert state.step == state.perturbation.count == 1
    norms = [np.linalg.norm(oracles.flat(g)) for _, g in singles]
    assert_close(state.metrics.grad_norm, np.mean(norms), rtol=1e-6)
    assert_close(state.perturbation.rho, 0.3, rtol=1e-6)


def test_micro_batches_without_perturbation_are_the_whole_batch():
    f = value_and_grad(loss, euclidean_ball(0.0), micro_batches=4)
    value, grads, _ = call(f)
    assert_close((value, grads), jax.value_and_grad(loss)(PARAMS, BATCH), rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mean_over_many_micro_batches_does_not_stagnate(dtype):
    # A running mean in bfloat16 stops moving long before the last of 256 terms.
    f = value_and_grad(
        lambda w, b: jnp.mean(b * w), euclidean_ball(0.0), micro_batches=256
    )
    batch = jnp.repeat(jnp.array([1.0, 2.0], dtype), 128)
    _, grads, _ = call(f, params=jnp.array(1.0, dtype), batch=batch)
    assert grads.dtype == dtype
    assert grads == 1.5


def by_replica():
    """A perturbation as long as the number of its replica."""

    def update(updates, state, params=None, *, replica=0, **extra):
        return jax.tree.map(lambda g: 0 * g + replica, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def test_micro_batches_are_numbered_so_that_no_two_draw_alike():
    for parts, mean in ((None, 0.0), (1, 0.0), (4, 1.5)):
        f = value_and_grad(lambda w, b: w**2 / 2, by_replica(), micro_batches=parts)
        _, grads, _ = call(f, params=jnp.float32(2.0))
        assert grads == 2 + mean


def test_skipped_micro_batches_are_counted_once_a_step():
    def dead_for_zeros(params, batch):
        return jnp.mean(batch * params["w"])

    params = {"w": jnp.float32(1.0)}
    f = value_and_grad(dead_for_zeros, euclidean_ball(0.1), micro_batches=4)
    state = f.init(params)
    for i in range(2):
        _, grads, state = f(params, state, jnp.array([0.0, 1.0, 0.0, 3.0]))
        assert_close(grads["w"], 1.0, rtol=1e-6)
        assert state.perturbation.skipped == i + 1
        assert state.perturbation.count == i + 1


def test_micro_batches_with_every_and_keys_and_integers():
    batch = {
        "x": jnp.arange(8.0),
        "label": jnp.arange(8),
        "key": jax.random.split(jax.random.key(0), 8),
    }

    def noisy(w, b):
        noise = jax.vmap(lambda k: jax.random.normal(k))(b["key"])
        return jnp.mean((b["x"] + b["label"] + noise) * w**2)

    f = value_and_grad(noisy, euclidean_ball(0.5), every=2, micro_batches=4)
    one_step = jax.jit(lambda s: f(jnp.float32(1.0), s, batch))
    gradient = jax.jit(jax.grad(noisy))
    plain = gradient(jnp.float32(1.0), batch)
    _, first, state = one_step(f.init(jnp.float32(1.0)))
    _, second, state = one_step(state)
    assert state.step == 2
    assert state.perturbation.count == 1
    assert_close(second, plain, rtol=1e-5)
    slopes = [gradient(jnp.float32(1.0), b) for b in cut_keys(batch, 4)]
    assert_close(first, np.mean([g * (1 + 0.5 * np.sign(g)) for g in slopes]), 1e-5)


def test_each_part_has_a_key_of_its_own():
    def noisy(w, batch, key):
        return w * (jnp.mean(batch) + jax.random.normal(key))

    w, key = jnp.float32(1.0), jax.random.key(3)
    f = value_and_grad(noisy, euclidean_ball(0.1), micro_batches=2)
    _, slope, _ = jax.jit(f)(w, f.init(w), jnp.ones(4), key)
    noise = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(2)]
    assert_close(slope, np.float32(1 + np.mean(noise)), 1e-5)


def cut_keys(batch, parts):
    return [jax.tree.map(lambda x, i=i: x[i::parts], batch) for i in range(parts)]


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((jnp.ones((7, 3)), jnp.ones(8, int)), r"\[0\] of shape \(7, 3\)"),
        ({"x": jnp.ones((8, 3)), "n": 3.0}, r"\['n'\] of shape \(\)"),
        (jnp.ones(9), r"at the root of shape \(9,\)"),
    ],
    ids=["indivisible", "scalar", "root"],
)
def test_batches_that_cannot_be_cut_are_rejected(batch, match):
    f = value_and_grad(loss, euclidean_ball(0.1), micro_batches=2)
    with pytest.raises(ValueError, match=f"`batch` leaf {match}.*micro_batches=2"):
        call(f, batch=batch)


# With optimizers and transformations


@pytest.mark.long
def test_jit_and_other_transformations_accept_the_oracle_itself():
    f = value_and_grad(loss, euclidean_ball(0.3))
    expected = call(f)
    assert_close(call_with(jax.jit(f), f), expected, rtol=1e-6)
    assert_close(call_with(jax.checkpoint(f), f), expected, rtol=1e-6)


def call_with(function, f):
    return function(PARAMS, f.init(PARAMS), BATCH)


def test_inside_multi_steps_the_mean_is_taken_of_perturbed_gradients():
    tx = optax.MultiSteps(optax.sgd(1.0), 2)
    f = value_and_grad(loss, euclidean_ball(0.3))
    params, state, opt_state = PARAMS, f.init(PARAMS), tx.init(PARAMS)
    for batch in BATCHES[:2]:
        _, grads, state = f(params, state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    both = [call(f, batch=batch)[1] for batch in BATCHES[:2]]
    expected = jax.tree.map(lambda w, g, h: w - (g + h) / 2, PARAMS, *both)
    assert_close(params, expected, rtol=1e-6)


# Wrong use


@pytest.mark.parametrize(
    ("loss_fn", "has_aux", "match"),
    [
        (lambda p, b: (loss(p, b), 1.0), False, "Pass `has_aux=True`"),
        (lambda p, b: loss(p, b), True, r"must return `\(loss, aux\)`"),
        (lambda p, b: (loss(p, b), 1, 2), True, r"must return `\(loss, aux\)`"),
        (
            lambda p, b: p["b"],
            False,
            r"scalar loss, got an array of shape \(2,\). Take the mean",
        ),
        (lambda p, b: (p["b"], 1.0), True, "must return a scalar loss"),
        (lambda p, b: None, False, "must return a scalar loss, got None"),
        (lambda p, b: p["b"][:1], False, r"scalar loss, got an array of shape \(1,\)"),
    ],
    ids=["aux", "no_aux", "three", "vector", "vector_aux", "none", "one"],
)
@pytest.mark.parametrize("micro_batches", [None, 2])
def test_loss_that_returns_something_else_is_rejected(
    loss_fn, has_aux, match, micro_batches
):
    f = value_and_grad(
        loss_fn, euclidean_ball(0.1), has_aux=has_aux, micro_batches=micro_batches
    )
    with pytest.raises(TypeError, match=match):
        jax.eval_shape(lambda p: call(f, params=p), PARAMS)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"loss_fn": 1.0}, TypeError, "`loss_fn` must be a function"),
        ({"perturbation": 0.05}, TypeError, r"`perturbation` must be .*euclidean_ball"),
        (
            {"perturbation": fsam_optax.perturbation},
            TypeError,
            "`perturbation` must be",
        ),
        ({"every": 0}, ValueError, "`every` must be an integer of at least 1"),
        ({"every": 2.5}, ValueError, "`every` must be"),
        ({"micro_batches": 0}, ValueError, "`micro_batches` must be an integer"),
        ({"micro_batches": -2}, ValueError, "`micro_batches` must be"),
        ({"micro_batches": 1.5}, ValueError, "`micro_batches` must be"),
    ],
    ids=arguments,
)
def test_bad_arguments_are_rejected(kwargs, error, match):
    kwargs = {"loss_fn": loss, "perturbation": euclidean_ball(0.1), **kwargs}
    with pytest.raises(error, match=match):
        value_and_grad(**kwargs)


def test_whole_float_as_number_of_micro_batches_works_or_is_rejected():
    try:
        f = value_and_grad(loss, euclidean_ball(0.3), micro_batches=2.0)
    except (TypeError, ValueError) as error:
        assert "`micro_batches`" in str(error)
        return
    expected = call(value_and_grad(loss, euclidean_ball(0.3), micro_batches=2))
    assert_equal(call(f), expected)


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        (jnp.ones(2, jnp.int32), r"\['n'\] of `params` has dtype int32.*no gradient"),
        (jnp.array(True), r"\['n'\] of `params` has dtype bool"),
        (jax.random.key(0), r"\['n'\] of `params` has dtype key"),
        (jnp.ones(2, jnp.complex64), r"\['n'\] of `params` is complex"),
        (jnp.tanh, r"\['n'\] of `params` is .*not an array"),
        ("relu", r"\['n'\] of `params` is 'relu', not an array"),
        (3, r"\['n'\] of `params` has dtype int"),
    ],
    ids=["int", "bool", "key", "complex", "function", "string", "python_int"],
)
def test_leaves_without_a_gradient_are_rejected(leaf, match):
    f = value_and_grad(loss, euclidean_ball(0.1))
    params = {**PARAMS, "n": leaf}
    with pytest.raises(TypeError, match=match):
        f(params, f.init(PARAMS), BATCH)


def test_missing_params_are_rejected():
    f = value_and_grad(loss, euclidean_ball(0.1))
    with pytest.raises(ValueError, match="needs the current value of the parameters"):
        f(None, f.init(PARAMS), BATCH)

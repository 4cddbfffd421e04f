"""What `optax.contrib.sam` 0.2.8 gets wrong, each as a test of what we do instead.

Where it is cheap, the failure itself is shown too, on the version it was seen with.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from fsam_optax import euclidean_ball, sam, sharpness_aware, value_and_grad


SEEN = optax.__version__ == "0.2.8"
PARAMS = {"k": jnp.array([[1.0, -2.0], [0.5, 1.5]]), "b": jnp.array([0.3, -0.7])}


def cubic(params):
    """The gradient of sum(w^4) / 4."""
    return jax.tree.map(lambda w: w**3, params)


def step(tx, state=None, params=PARAMS, grads=None, grad_fn=cubic, **extra):
    state = tx.init(params) if state is None else state
    grads = grad_fn(params) if grads is None else grads
    return tx.update(grads, state, params, grad_fn=grad_fn, **extra)


def length(tree):
    return np.linalg.norm(oracles.flat(tree))


def incumbent(rho=0.1, base=None, opaque_mode=True):
    ball = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    base = optax.sgd(0.1) if base is None else base
    return optax.contrib.sam(base, ball, opaque_mode=opaque_mode)


def incumbent_step(tx, state=None, params=PARAMS, grads=None, grad_fn=cubic, **extra):
    return step(tx, state, params, grads or grad_fn(params), lambda p, i=0: grad_fn(p))


def test_agrees_over_20_steps_of_adamw():
    base = optax.adamw(optax.cosine_decay_schedule(0.1, 20), weight_decay=0.01)
    theirs, ours = incumbent(0.3, base), sam(base, 0.3)

    @jax.jit
    def both(params, state, other, other_state):
        update, state = step(ours, state, params)
        other_update, other_state = theirs.update(
            cubic(other), other_state, other, grad_fn=lambda p, i: cubic(p)
        )
        return (
            optax.apply_updates(params, update),
            state,
            optax.apply_updates(other, other_update),
            other_state,
        )

    carry = PARAMS, ours.init(PARAMS), PARAMS, theirs.init(PARAMS)
    for _ in range(20):
        carry = both(*carry)
    params, _, expected, _ = carry
    for name in PARAMS:
        assert np.all(np.abs(params[name] - PARAMS[name]) > 0.05)
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)


def test_schedule_of_rho_advances():
    def schedule(count):
        return 0.1 * (count + 1)

    tx = sam(optax.sgd(0.1), schedule)
    state = tx.init(PARAMS)
    for i in range(3):
        _, state = step(tx, state)
        np.testing.assert_allclose(optax.tree.get(state, "rho"), 0.1 * (i + 1), 1e-6)
    if SEEN:
        tx = incumbent(schedule)
        first, state = incumbent_step(tx)
        second, _ = incumbent_step(tx, state)
        np.testing.assert_array_equal(first["k"], second["k"])


@pytest.mark.parametrize("where", ["first", "second", "both"])
def test_zero_gradients_do_not_make_nan(where):
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    first = zero if where != "second" else cubic(PARAMS)
    second = (lambda p: zero) if where != "first" else cubic
    update, state = step(sam(optax.sgd(0.1)), grads=first, grad_fn=second)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((update, state)))
    expected = second(PARAMS) if where != "second" else zero
    for name in PARAMS:
        rate = jnp.asarray(0.1, update[name].dtype)
        np.testing.assert_array_equal(update[name], -rate * expected[name])
    if SEEN and where != "second":
        update, _ = incumbent_step(incumbent(), grads=zero, grad_fn=second)
        assert where == "both" or np.all(np.isnan(update["k"]))


def broken(params):
    return jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), params)


def test_nan_in_the_second_gradient_is_caught():
    tx = sam(optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=3))
    _, state = step(tx)
    update, new_state = step(tx, state, grads=cubic(PARAMS), grad_fn=broken)
    for name in PARAMS:
        assert not np.any(update[name])
    for moment in ("mu", "nu"):
        before, after = (optax.tree.get(s, moment)["k"] for s in (state, new_state))
        np.testing.assert_array_equal(after, before)
    if SEEN:
        tx = optax.apply_if_finite(incumbent(base=optax.adam(0.1)), 3)
        update, _ = incumbent_step(tx, grads=cubic(PARAMS), grad_fn=broken)
        assert np.all(np.isnan(update["k"]))


def test_bool_and_key_leaves_in_the_state_of_the_base():
    def init(params):
        del params
        return {"flag": jnp.array(True), "key": jax.random.key(0)}

    def update(updates, state, params=None):
        del params
        key, _ = jax.random.split(state["key"])
        return updates, {"flag": ~state["flag"], "key": key}

    tx = sam(optax.GradientTransformation(init, update))
    state = tx.init(PARAMS)

    def body(state, _):
        return step(tx, state)[1], None

    state, _ = jax.lax.scan(body, state, None, length=3)
    assert state.base["flag"].dtype == bool
    assert not state.base["flag"]
    assert state.base["key"].dtype == jax.random.key(0).dtype


def test_state_can_be_donated_together_with_the_parameters():
    tx = sam(optax.adam(0.1))
    params = jax.tree.map(jnp.copy, PARAMS)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state):
        update, state = step(tx, state, params)
        return optax.apply_updates(params, update), state

    params, state = train(params, tx.init(params))
    params, _ = train(params, state)
    assert np.all(np.isfinite(params["k"]))


@pytest.mark.parametrize(
    "make",
    [
        lambda tx: optax.chain(tx(optax.sgd(0.1)), optax.contrib.reduce_on_plateau()),
        lambda tx: tx(optax.polyak_sgd()),
        lambda tx: tx(optax.sgd(0.1)),
    ],
    ids=["reduce_on_plateau", "polyak_sgd", "unknown"],
)
def test_other_extra_arguments_are_accepted(make):
    value = sum(jnp.sum(w**4) for w in PARAMS.values()) / 4
    update, _ = step(make(sam), value=value)
    assert length(update) > 0
    if SEEN:
        with pytest.raises(TypeError):
            tx = make(lambda base: incumbent(base=base))
            tx.update(
                cubic(PARAMS),
                tx.init(PARAMS),
                PARAMS,
                grad_fn=lambda p, i: cubic(p),
                value=value,
            )


def test_clipping_has_an_effect():
    clip = optax.clip_by_global_norm(0.01)
    update, _ = step(sam(optax.chain(clip, optax.sgd(1.0))))
    np.testing.assert_allclose(length(update), 0.01, rtol=1e-6)
    if SEEN:
        clipped, free = optax.chain(clip, incumbent()), incumbent()
        update, _ = incumbent_step(clipped)
        expected, _ = incumbent_step(free)
        np.testing.assert_allclose(update["k"], expected["k"], rtol=1e-5)


def slopes(tx, make_grad_fn, init):
    """Accumulates slopes 1 and 3 and returns the last update."""
    state = init
    for slope in (1.0, 3.0):
        grad_fn = make_grad_fn(slope)
        update, state = tx.update(
            jnp.float32(slope), state, jnp.float32(0.0), grad_fn=grad_fn
        )
    return update


def test_accumulation_does_not_use_the_last_micro_batch_only():
    base = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    w = jnp.float32(0.0)
    assert slopes(sam(base), lambda s: lambda p: p * 0 + s, sam(base).init(w)) == -2.0
    if SEEN:
        tx = optax.MultiSteps(incumbent(base=optax.sgd(1.0)), 2)
        assert slopes(tx, lambda s: lambda p, i: p * 0 + s, tx.init(w)) == -3.0


def test_parts_of_the_tree_can_be_left_out():
    parts = {"k": "sam", "b": "frozen"}
    base = optax.partition(
        {"sam": optax.sgd(0.1), "frozen": optax.set_to_zero()}, parts
    )
    ball = euclidean_ball(0.1, mask={"k": True, "b": False})
    update, _ = step(sharpness_aware(base, ball))
    alone, _ = step(sam(optax.sgd(0.1), 0.1), params={"k": PARAMS["k"]})
    np.testing.assert_array_equal(update["k"], alone["k"])
    assert not np.any(update["b"])
    if SEEN:
        tx = optax.masked(incumbent(), {"k": True, "b": False})
        by_name = jax.grad(lambda p: jnp.sum(p["k"] ** 4) + jnp.sum(p["b"] ** 4))
        with pytest.raises((AttributeError, TypeError), match="MaskedNode"):
            incumbent_step(tx, grad_fn=by_name)


def test_gradient_function_that_returns_more_is_rejected():
    def loss(params):
        return sum(jnp.sum(w**4) for w in params.values()) / 4

    for wrong in (
        jax.value_and_grad(loss),
        jax.grad(lambda p: (loss(p), None), has_aux=True),
    ):
        with pytest.raises(TypeError, match="Return the gradient alone"):
            step(sam(optax.sgd(0.1)), grads=cubic(PARAMS), grad_fn=wrong)


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_cannot_descend_by_a_wrong_sign(flip):
    # eps points uphill whichever way the loss slopes: a line rises by rho |slope|.
    f = value_and_grad(lambda w, b: jnp.sum(b * w), euclidean_ball(0.5))
    slope = flip * jnp.array([3.0, 4.0])
    _, _, state = f(jnp.zeros(2), f.init(jnp.zeros(2)), slope)
    np.testing.assert_allclose(state.sharpness, 2.5, rtol=1e-6)


@pytest.mark.long
def test_half_precision_gradients_do_not_overflow_the_norm():
    grads = jnp.full((300, 1000), 2.0, jnp.float16)
    eps, state = euclidean_ball(0.5).update(grads, euclidean_ball(0.5).init(grads))
    np.testing.assert_allclose(length({"": eps}), 0.5, rtol=1e-5)
    assert state.skipped == 0
    if SEEN:
        normalize = optax.contrib.normalize()
        theirs, _ = normalize.update(grads, normalize.init(grads))
        assert not np.any(theirs)


@pytest.mark.long
def test_bfloat16_parameters_are_seen_to_move():
    size = 10_000
    rng = np.random.default_rng(0)
    params, grads = (
        {"w": jnp.asarray(rng.normal(size=size), jnp.bfloat16)} for _ in range(2)
    )
    rho = 0.05 * np.sqrt(size / 1e6)
    moved = {}
    for dtype in (None, jnp.float32):

        def spy(p, dtype=dtype):
            moved[dtype] = np.asarray(p["w"], np.float64) - np.asarray(
                params["w"], np.float64
            )
            return grads

        tx = sharpness_aware(optax.sgd(0.1), euclidean_ball(rho), perturb_dtype=dtype)
        step(tx, params=params, grads=grads, grad_fn=spy)
    assert np.mean(moved[None] == 0) > 0.9  # What is lost without.
    assert np.mean(moved[jnp.float32] == 0) < 0.01
    np.testing.assert_allclose(np.linalg.norm(moved[jnp.float32]), rho, rtol=1e-2)


def test_complex_parameters_are_rejected():
    params = {"w": jnp.ones(2, jnp.complex64)}
    for call in (
        lambda: step(sam(optax.sgd(0.1)), params=params, grads=params),
        lambda: euclidean_ball(0.1).update(params, euclidean_ball(0.1).init(params)),
    ):
        with pytest.raises(TypeError, match=r"leaf \['w'\].*complex.*two real leaves"):
            call()


def test_masked_leaves_do_not_get_the_gradient_as_perturbation():
    mask = {"k": True, "b": False}
    masked = euclidean_ball(0.1, mask=mask)
    eps, _ = masked.update(cubic(PARAMS), masked.init(PARAMS), PARAMS)
    assert not np.any(eps["b"])
    np.testing.assert_allclose(length(eps), 0.1, rtol=1e-6)

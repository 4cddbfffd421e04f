"""The displaced optimizer: what the trainer holds is w + eps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fsam_optax import displaced, euclidean_ball, eval_params, msam


W = {"k": np.array([[1.5, -2.0], [0.75, 3.0]]), "b": np.array([1.0, -1.25])}


def params_of(dtype="float32"):
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), W)


def gradient(params):
    """That of sum (w^4 / 4 + w)."""
    return jax.tree.map(lambda w: w**3 + 1, params)


def run(tx, params, steps, gradient=gradient, **extra):
    """Returns what the trainer holds and the state, after each step."""
    held = []
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        held.append((params, state))
    return held


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def assert_close(tree, expected, **tolerance):
    close = functools.partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(close, tree, expected)


def two_points(params, base, ball, steps):
    """The same by hand: w and eps apart, one gradient a step at w + eps."""
    eps = jax.tree.map(jnp.zeros_like, params)
    base_state, ball_state = base.init(params), ball.init(params)

    @jax.jit
    def step(params, eps, base_state, ball_state):
        h = gradient(jax.tree.map(jnp.add, params, eps))
        updates, base_state = base.update(h, base_state, params)
        eps, ball_state = ball.update(h, ball_state, params)
        return optax.apply_updates(params, updates), eps, base_state, ball_state

    for _ in range(steps):
        params, eps, base_state, ball_state = step(params, eps, base_state, ball_state)
    return params, eps


@pytest.mark.short("adamw")
@pytest.mark.parametrize(
    "base",
    [
        optax.sgd(0.01, momentum=0.9),
        optax.adamw(0.01),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01)),
    ],
    ids=["sgd", "adamw", "decay"],
)
def test_one_gradient_a_step_is_that_of_two_points(x64, base):
    ball = euclidean_ball(0.3)
    params, state = run(displaced(base, ball), params_of("float64"), 8)[-1]
    w, eps = two_points(params_of("float64"), base, ball, 8)
    assert_close(eval_params(state, params), w, rtol=1e-12)
    assert_close(state.displacement, eps, rtol=1e-12)


def test_momentum_sam_by_hand(x64):
    params, state = run(msam(optax.sgd(0.01, 0.9), 0.3), params_of("float64"), 5)[-1]
    w, v, eps = (jax.tree.map(np.copy, W) for _ in range(3))
    for name in W:
        v[name], eps[name] = 0 * v[name], 0 * eps[name]
    for _ in range(5):
        h = {n: (w[n] + eps[n]) ** 3 + 1 for n in w}
        v = {n: 0.9 * v[n] + h[n] for n in w}
        w = {n: w[n] - 0.01 * v[n] for n in w}
        length = np.sqrt(sum(np.sum(x**2) for x in v.values()))
        eps = {n: -0.3 * v[n] / length for n in w}
    assert_close(eval_params(state, params), w, rtol=1e-12)


@pytest.mark.short("bfloat16")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_without_a_step_w_does_not_drift(x64, dtype):
    """However eps turns, and with weights far from it: w is recovered bit for bit."""
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.choice([-1, 1], 999) * rng.uniform(0.5, 4, 999), dtype)
    tx = displaced(optax.sgd(0.0), euclidean_ball(lambda count: 1.0 + count % 3))

    @jax.jit
    def step(carry, noise):
        params, state = carry
        updates, state = tx.update(noise, state, params)
        return (optax.apply_updates(params, updates), state), None

    noise = jnp.asarray(rng.normal(size=(200, 999)), dtype)
    (params, state), _ = jax.lax.scan(step, (start, tx.init(start)), noise)
    assert params.dtype == start.dtype
    assert np.max(np.abs(np.asarray(params - start, float))) > 0.01
    assert_equal(eval_params(state, params), start)


def test_small_weights_drift_by_no_more_than_rounding_of_the_displacement():
    rng = np.random.default_rng(0)
    start = jnp.asarray(1e-6 * rng.normal(size=999), "float32")
    tx = displaced(optax.sgd(0.0), euclidean_ball(1.0))
    params, state = start, tx.init(start)
    for _ in range(20):
        noise = jnp.asarray(rng.normal(size=999), "float32")
        updates, state = tx.update(noise, state, params)
        params = optax.apply_updates(params, updates)
    drift = np.max(np.abs(eval_params(state, params) - start))
    assert drift < 20 * np.finfo(np.float32).eps * np.max(np.abs(state.displacement))


def test_a_radius_that_changes_leaves_no_residue(x64):
    """The authors' SGD form takes eps back with the radius of today."""
    tx = displaced(optax.sgd(0.0), euclidean_ball(lambda count: 0.5 / (count + 1)))
    for params, state in run(tx, params_of("float64"), 4):
        assert_equal(eval_params(state, params), params_of("float64"))


def test_a_radius_of_0_is_the_base_optimizer():
    base = optax.adamw(0.01)
    params, _ = run(displaced(base, euclidean_ball(0.0)), params_of(), 5)[-1]
    expected, _ = run(base, params_of(), 5)[-1]
    assert_equal(params, expected)


def test_without_params(x64):
    """As brax calls it; base and perturbation need none."""
    base, ball = optax.sgd(0.01, momentum=0.9), euclidean_ball(0.3)
    tx = displaced(base, ball)
    params = params_of("float64")
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(8):
        params, state = step(params, state)
    w, _ = two_points(params_of("float64"), base, ball, 8)
    assert_close(eval_params(state, params), w, rtol=1e-12)


def test_without_params_a_base_that_needs_them_says_so():
    tx = displaced(optax.adamw(0.01), euclidean_ball(0.3))
    with pytest.raises(ValueError, match="params"):
        tx.update(gradient(params_of()), tx.init(params_of()))


def test_a_gradient_that_is_not_finite_displaces_nothing_and_is_not_remembered():
    ascent = optax.chain(optax.trace(0.9), euclidean_ball(0.3))
    tx = displaced(optax.apply_if_finite(optax.sgd(0.01), 3), ascent)
    (params, state), *_ = run(tx, params_of(), 1)
    w = eval_params(state, params)
    broken = jax.tree.map(lambda g: g * jnp.nan, params)
    updates, skipped = tx.update(broken, state, params)
    params = optax.apply_updates(params, updates)
    assert_equal(params, w)
    assert_equal(eval_params(skipped, params), w)
    trace = optax.tree.get(state, "trace")
    assert_equal(optax.tree.get(skipped, "trace"), trace)
    updates, after = tx.update(gradient(params), skipped, params)
    assert optax.tree.get(after, "skipped") == 1
    assert optax.tree.norm(after.displacement) == pytest.approx(0.3, rel=1e-6)


def test_apply_if_finite_around_it_leaves_everything_as_it_was():
    tx = optax.apply_if_finite(displaced(optax.sgd(0.01), euclidean_ball(0.3)), 3)
    (params, state), *_ = run(tx, params_of(), 1)
    broken = jax.tree.map(lambda g: g * jnp.nan, params)
    updates, after = tx.update(broken, state, params)
    assert_equal(optax.apply_updates(params, updates), params)
    assert_equal(eval_params(after, params), eval_params(state, params))


def test_accumulation_around_it_takes_the_mean_gradient_where_the_trainer_is(x64):
    tx = displaced(optax.sgd(0.01, 0.9), euclidean_ball(0.3))
    multi = optax.MultiSteps(tx, 3)
    held = run(multi, params_of("float64"), 9)
    expected = run(tx, params_of("float64"), 3)
    for (params, state), (other, other_state) in zip(held[2::3], expected, strict=True):
        assert_close(params, other, rtol=1e-7)
        w = eval_params(other_state, other)
        assert_close(eval_params(state, params), w, rtol=1e-7)
    # In between nothing moves, and the state still tells w.
    assert_equal(held[3][0], held[2][0])
    assert_equal(eval_params(*reversed(held[3])), eval_params(*reversed(held[2])))


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip(100.0), tx),
    "masked": lambda tx: optax.masked(tx, {"k": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"on": tx, "off": optax.sgd(0.01)}, {"k": "on", "b": "off"}
    ),
    "twice": lambda tx: optax.partition(
        {"one": tx, "two": tx}, {"k": "one", "b": "two"}
    ),
    "inject": lambda tx: optax.inject_hyperparams(
        lambda rho: displaced(optax.sgd(0.01), euclidean_ball(rho))
    )(0.3),
    "multi": lambda tx: optax.MultiSteps(tx, 1),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
    "nested": lambda tx: optax.chain(
        optax.masked(optax.apply_if_finite(tx, 3), {"k": True, "b": False})
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_eval_params_finds_the_displacement_inside(x64, name):
    tx = displaced(optax.sgd(0.01), euclidean_ball(0.3))
    params, state = run(WRAPPED[name](tx), params_of("float64"), 1)[-1]
    masked = name in ("masked", "nested")
    expected = {
        n: (w + np.asarray(gradient(w)))
        if masked and n == "b"
        else w - 0.01 * gradient(w)
        for n, w in W.items()
    }
    assert_close(eval_params(state, params), expected, rtol=1e-12)
    assert np.max(np.abs(params["k"] - expected["k"])) > 0.01


def test_eval_params_on_part_of_a_tree_that_is_masked_above():
    """A mask may name a branch; below it there is no displacement."""
    params = {"frozen": {"a": jnp.ones(2), "b": jnp.ones(3)}, "free": jnp.ones(1)}
    tx = optax.masked(
        displaced(optax.sgd(0.0), euclidean_ball(0.5)), {"frozen": False, "free": True}
    )
    zeros = {"frozen": jax.tree.map(jnp.zeros_like, params["frozen"])}
    grads = {**zeros, "free": jnp.ones(1)}
    updates, state = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert moved["free"] == 1.5
    assert_equal(eval_params(state, moved), params)


def test_eval_params_says_what_is_wrong():
    tx = displaced(optax.sgd(0.01), euclidean_ball(0.3))
    params = params_of()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"eval_params\(state, params\)"):
        eval_params(params, state)
    with pytest.raises(ValueError, match=r"\['k'\].*\(3, 2\).*\(2, 2\)"):
        eval_params(state, {**params, "k": jnp.ones((3, 2))})


@pytest.mark.long
def test_it_can_be_differentiated():
    """Through a step, by the radius: central differences agree."""
    tx = lambda rho: displaced(optax.sgd(0.1), euclidean_ball(rho))  # noqa: E731

    @jax.jit
    def after(rho):
        params, state = params_of(), tx(rho).init(params_of())
        for _ in range(2):
            updates, state = tx(rho).update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(w) for w in params.values())

    slope = (after(0.31) - after(0.29)) / 0.02
    np.testing.assert_allclose(jax.grad(after)(0.3), slope, rtol=1e-2)


def test_empty_trees_pass():
    tx = displaced(optax.sgd(0.1), euclidean_ball(0.1))
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert eval_params(state, {}) == {}

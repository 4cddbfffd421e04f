"""Descents, memory and several ascents: formulas by hand, identities, bad inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.projections
import pytest

from fsam_optax import (
    averaged,
    euclidean_ball,
    extrapolate,
    friendly,
    multi_step,
    reuse,
    surrogate_gap,
)


RNG = np.random.default_rng(0)
# Odd sizes, and values whose sums of squares are not exact.
G = {"k": RNG.normal(size=(7, 13)), "b": RNG.normal(size=5)}
H = {name: g + 0.3 * RNG.normal(size=g.shape) for name, g in G.items()}
EPS = {name: 0.1 * g for name, g in G.items()}


def arrays(tree, dtype="float32"):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def assert_close(tree, expected, **tolerance):
    close = functools.partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(close, tree, expected)


def inner(x, y):
    return sum(np.sum(x[n] * y[n]) for n in x)


def combine(a, x, b, y):
    return {n: a * x[n] + b * y[n] for n in x}


def descend(descent, h=H, g=G, dtype="float32", state=None, plain=False):
    h, g = arrays(h, dtype), arrays(g, dtype)
    state = descent.init(g) if state is None else state
    eps = None if plain else arrays(EPS)
    update = jax.jit(functools.partial(descent.update, clean_grads=g, eps=eps))
    return update(h, state)


# The formulas, in NumPy: small golden cases that always run.


def test_surrogate_gap(x64):
    expected = combine(1, H, -0.4, combine(1, G, -inner(G, H) / inner(H, H), H))
    d, _ = descend(surrogate_gap(0.4), dtype="float64")
    assert_close(d, expected, rtol=1e-12)
    # What of g is orthogonal to h is taken away; what lies along h is that of SAM.
    np.testing.assert_allclose(inner(d, H), inner(H, H), rtol=1e-12)


def test_surrogate_gap_that_minimises_the_clean_loss(x64):
    expected = combine(1, G, 0.4, combine(1, H, -inner(G, H) / inner(G, G), G))
    d, _ = descend(surrogate_gap(0.4, minimize_clean=True), dtype="float64")
    assert_close(d, expected, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 0.8, 9.0])
def test_extrapolate(x64, alpha):
    d, _ = descend(extrapolate(alpha), dtype="float64")
    assert_close(d, combine(1 - alpha, G, alpha, H), rtol=1e-10)


def test_reuse(x64):
    descent = reuse(0.7)
    d, state = descend(descent, dtype="float64")
    assert_equal(d, H)
    v = combine(1, H, -inner(H, G) / inner(G, G), G)
    v = combine(1 / np.sqrt(inner(v, v)), v, 0, v)
    assert_close(state.orthogonal, v, rtol=1e-12)
    later = combine(2, H, 1, G)
    d, after = descend(descent, later, later, "float64", state, plain=True)
    length = np.sqrt(inner(later, later))
    assert_close(d, combine(1, later, 0.7 * length, v), rtol=1e-12)
    assert_equal(after, state)


# Identities, bit for bit.

RULES = {
    "surrogate_gap": surrogate_gap(0.4),
    "surrogate_gap_clean": surrogate_gap(0.4, minimize_clean=True),
    "extrapolate": extrapolate(0.3),
    "extrapolate_9": extrapolate(9.0),
    "reuse": reuse(0.7),
}


@pytest.mark.short("reuse-float16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", RULES)
def test_equal_gradients_give_that_gradient(name, dtype):
    d, state = descend(RULES[name], H, H, dtype)
    assert_equal(d, arrays(H, dtype))
    # And leave nothing behind: rounding is no direction.
    d, _ = descend(RULES[name], G, G, dtype, state, plain=True)
    assert_equal(d, arrays(G, dtype))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_that_differ_by_rounding_leave_no_direction(dtype):
    descent = reuse(0.7)
    near = jax.tree.map(lambda h: np.nextafter(h, 9 * h), arrays(H, dtype))
    for h in (arrays(H, dtype), arrays(combine(1.5, H, 0, H), dtype)):
        _, state = descend(descent, h, near, dtype)
        assert_equal(state.orthogonal, jax.tree.map(jnp.zeros_like, arrays(H)))
    _, state = descend(descent, H, G, dtype)
    assert optax.tree.norm(state.orthogonal) == pytest.approx(1, rel=1e-5)


def test_ends_are_exact():
    g, h = arrays(G), arrays(H)
    assert_equal(descend(surrogate_gap(0.0))[0], h)
    assert_equal(descend(surrogate_gap(0.0, minimize_clean=True))[0], g)
    assert_equal(descend(extrapolate(0.0))[0], g)
    assert_equal(descend(extrapolate(1.0))[0], h)
    d, state = descend(reuse(0.0))
    assert_equal(d, h)
    assert_equal(descend(reuse(0.0), G, G, state=state, plain=True)[0], g)


@pytest.mark.short("0.3")
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 9.0])
def test_a_traced_weight_gives_the_same_numbers(alpha):
    def traced(factory):
        @jax.jit
        def run(alpha):
            tx = factory(alpha)
            g = arrays(G)
            return tx.update(arrays(H), tx.init(g), clean_grads=g, eps=arrays(EPS))

        return run(alpha)

    for factory in (surrogate_gap, extrapolate):
        assert_close(traced(factory)[0], descend(factory(alpha))[0], rtol=1e-5)


# Zero, tiny, huge and broken gradients.

ZERO = {name: 0 * g for name, g in G.items()}


@pytest.mark.short("surrogate_gap")
@pytest.mark.parametrize("name", RULES)
def test_a_zero_gradient_stays_finite(name):
    for h, g in ((ZERO, ZERO), (H, ZERO), (ZERO, G)):
        d, state = descend(RULES[name], h, g)
        plain, _ = descend(RULES[name], g, g, state=state, plain=True)
        for x in jax.tree.leaves((d, state, plain)):
            assert np.all(np.isfinite(x))
    assert_equal(descend(RULES[name], ZERO, ZERO)[0], arrays(ZERO))


@pytest.mark.short("surrogate_gap", "extrapolate", "reuse")
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", RULES)
def test_gradients_far_from_1(name, scale):
    expected, state = descend(RULES[name])
    h, g = (combine(scale, x, 0, x) for x in (H, G))
    d, scaled_state = descend(RULES[name], h, g)
    d = jax.tree.map(lambda x: x / np.float32(scale), d)
    assert_close(d, expected, rtol=1e-4, atol=1e-6)
    assert_close(scaled_state, state, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_is_not_reused(broken):
    descent = reuse(0.7)
    _, state = descend(descent)
    bad = {**H, "b": H["b"] * broken}
    d, after = descend(descent, bad, G, state=state)
    assert not np.all(np.isfinite(d["b"]))
    assert_equal(after, state)


def test_a_mean_of_unit_vectors_is_as_long_as_one_when_used():
    """Parts of a batch average what they found; the average is shorter than 1."""
    descent = reuse(0.7)
    _, state = descend(descent)
    short = jax.tree.map(lambda v: 0.25 * v, state)
    expected, _ = descend(descent, G, G, state=state, plain=True)
    d, _ = descend(descent, G, G, state=short, plain=True)
    assert_close(d, expected, rtol=1e-5)


@pytest.mark.long
def test_integers_pass():
    """Leaves that hold no real numbers are those of h."""
    tree = {"w": jnp.ones(3), "n": jnp.arange(2)}
    for descent in RULES.values():
        state = descent.init(tree)
        d, state = descent.update(tree, state, clean_grads=tree, eps=tree)
        assert_equal(d, tree)
        d, _ = descent.update(tree, state, clean_grads=tree, eps=None)
        assert_equal(d, tree)


def test_a_descent_as_an_ordinary_transformation_says_where_it_belongs():
    for descent in RULES.values():
        with pytest.raises(TypeError, match="descent="):
            descent.update(arrays(H), descent.init(arrays(H)))


@pytest.mark.parametrize("factory", [surrogate_gap, extrapolate, reuse])
def test_a_negative_weight_is_refused(factory):
    with pytest.raises(ValueError, match="alpha"):
        factory(-0.1)


# Memory in front of a ball.


def sequence(tx, grads, dtype="float32"):
    state = tx.init(arrays(grads[0], dtype))
    for g in grads:
        out, state = tx.update(arrays(g, dtype), state)
    return out, state


def test_friendly_and_averaged_by_hand(x64):
    first, second, third = G, H, combine(1, G, -2, H)
    m1 = first
    m2 = combine(0.6, m1, 0.4, second)
    d, state = sequence(friendly(0.5, 0.6), [first, second, third], "float64")
    assert_close(d, combine(1, third, -0.5, m2), rtol=1e-12)
    m3 = combine(0.6, m2, 0.4, third)
    assert_close(state.average, m3, rtol=1e-12)
    m, state = sequence(averaged(0.6), [first, second, third], "float64")
    assert_close(m, m3, rtol=1e-12)
    assert int(state.seen) == 3
    # The order of the paper, through the constants of this one.
    sigma = 0.5 * 0.6 / (1 - 0.5 * 0.4)
    d, _ = sequence(friendly(sigma, 0.6), [first, second, third], "float64")
    paper = combine(1, third, -0.5, m3)
    ratio = inner(d, paper) / np.sqrt(inner(d, d) * inner(paper, paper))
    np.testing.assert_allclose(ratio, 1, rtol=1e-12)


def test_ends_of_memory_are_exact():
    grads = [G, H, G, H]
    assert_equal(sequence(friendly(0.0, 0.9), grads)[0], arrays(H))
    assert_equal(sequence(averaged(0.0), grads)[0], arrays(H))
    assert_equal(sequence(averaged(1.0), grads)[0], arrays(G))


def test_the_first_gradient_starts_the_average():
    assert_equal(sequence(averaged(0.9), [G])[0], arrays(G))
    assert_equal(sequence(friendly(1.0, 0.9), [G])[0], arrays(G))


# Several ascents.

SCALE = jnp.array([1.0, 3.0, 9.0])


def quartic(w):
    return SCALE * w**3


W = jnp.array([1.0, -0.5, 0.25])


def ascend(tx, w=W, gradient=quartic, state=None, grads=None):
    state = tx.init(w) if state is None else state
    grads = gradient(w) if grads is None else grads
    return jax.jit(functools.partial(tx.update, grad_fn=gradient))(grads, state, w)


def test_multi_step_by_hand(x64):
    project = functools.partial(optax.projections.projection_l2_ball, scale=0.25)
    w = W.astype("float64")
    eps, _ = ascend(multi_step(4, euclidean_ball(0.1), project=project), w)
    d = np.zeros(3)
    for _ in range(4):
        h = np.asarray(quartic(w + d))
        d = d + 0.1 * h / np.linalg.norm(h)
        d = d * min(1, 0.25 / np.linalg.norm(d))
    np.testing.assert_allclose(eps, d, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(eps), 0.25, rtol=1e-12)


def test_one_step_is_the_ball_itself():
    ball = euclidean_ball(0.1)
    eps, state = ascend(multi_step(1, ball))
    expected, ball_state = ascend(ball)
    assert_equal((eps, state.perturbation), (expected, ball_state))


def test_a_schedule_of_the_radius_advances_once_a_step():
    def rho(count):
        return 0.1 * (count + 1)

    tx = multi_step(3, euclidean_ball(rho))
    state = None
    for n in range(3):
        eps, state = ascend(tx, state=state)
        expected, _ = ascend(multi_step(3, euclidean_ball(0.1 * (n + 1))))
        np.testing.assert_allclose(eps, expected, rtol=1e-6)
        assert int(state.perturbation.count) == n + 1


def test_after_a_first_gradient_that_is_not_finite_nothing_moves():
    tx = multi_step(3, optax.chain(averaged(0.5), euclidean_ball(0.1)))
    _, before = ascend(tx)
    for broken in (jnp.nan, jnp.inf):
        eps, after = ascend(tx, state=before, grads=quartic(W) * broken)
        assert_equal(eps, jnp.zeros(3))
        (memory, ball), (old_memory, old_ball) = (
            s.perturbation for s in (after, before)
        )
        assert_equal(memory, old_memory)
        assert int(ball.count) == int(old_ball.count) + 1
        assert int(ball.skipped) == int(old_ball.skipped) + 1


def test_a_later_gradient_that_is_not_finite_ends_the_ascent_there():
    def cliff(w):
        return jnp.where(w[0] > 1.15, jnp.nan, quartic(w))

    tx = multi_step(5, optax.chain(averaged(0.5), euclidean_ball(0.1)))
    eps, state = ascend(tx, gradient=cliff)
    expected, short = ascend(
        multi_step(2, optax.chain(averaged(0.5), euclidean_ball(0.1)))
    )
    assert_equal(eps, expected)
    assert_equal(state.perturbation[0].average, short.perturbation[0].average)
    # The ball reports the first ascent, and counts one step.
    assert_equal(state.perturbation[1], short.perturbation[1])
    assert (int(state.perturbation[1].count), int(state.perturbation[1].skipped)) == (
        1,
        0,
    )


def test_multi_step_counts_its_gradients():
    """One more of them in the program than there are ascents beyond the first."""
    calls = []

    def counted(w):
        jax.debug.callback(lambda: calls.append(None))
        return quartic(w)

    for steps in (1, 2, 5):
        calls.clear()
        ascend(multi_step(steps, euclidean_ball(0.1)), gradient=counted, grads=W)
        jax.effects_barrier()
        assert len(calls) == steps - 1


def test_an_ascent_that_is_cut_short_counts_one_step():
    """The ball reports its first ascent, where the second gradient is NaN."""
    ball = euclidean_ball(0.1)
    eps, state = ascend(
        multi_step(3, ball), gradient=lambda w: jnp.nan * w, grads=quartic(W)
    )
    assert_equal((eps, state.perturbation), ascend(ball))


@pytest.mark.long
def test_multi_step_can_be_differentiated():
    def rise(rho):
        eps, _ = ascend(multi_step(3, euclidean_ball(rho)))
        return jnp.sum(SCALE * (W + eps) ** 4)

    slope = (rise(0.11) - rise(0.09)) / 0.02
    np.testing.assert_allclose(jax.grad(rise)(0.1), slope, rtol=1e-2)


def test_multi_step_says_what_it_needs():
    tx = multi_step(2, euclidean_ball(0.1))
    with pytest.raises(TypeError, match="grad_fn"):
        tx.update(W, tx.init(W), W)
    with pytest.raises(ValueError, match="params"):
        tx.update(W, tx.init(W), grad_fn=quartic)
    with pytest.raises(ValueError, match="steps"):
        multi_step(0, euclidean_ball(0.1))
    with pytest.raises(TypeError, match="steps"):
        multi_step(jnp.array(2), euclidean_ball(0.1))
    with pytest.raises(ValueError, match=r"project\(eps\)"):
        ascend(multi_step(2, euclidean_ball(0.1), project=lambda eps: eps[:1]))


@pytest.mark.parametrize("broken", [jnp.nan, jnp.inf])
def test_an_end_of_the_extrapolation_does_not_see_the_other_gradient(broken):
    g, h = jnp.array([1.0, 2.0]), jnp.array([3.0, broken])
    base, sam = extrapolate(0.0), extrapolate(1.0)
    d, _ = base.update(h, base.init(g), clean_grads=g, eps=g)
    assert_equal(d, g)
    d, _ = sam.update(g, sam.init(g), clean_grads=h, eps=g)
    assert_equal(d, g)
    change = jax.grad(
        lambda alpha: extrapolate(alpha).update(
            jnp.float32(5.0), optax.EmptyState(), clean_grads=jnp.float32(2.0), eps=g
        )[0]
    )
    assert change(0.0) == change(1.0) == 3.0

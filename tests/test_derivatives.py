"""Derivatives of a perturbation and of a whole step, at gradients of any magnitude."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import PartitionSpec as P

import fsam_optax
from fsam_optax import (
    adaptive_ellipsoid,
    euclidean_ball,
    fisher_ellipsoid,
    given,
    sharpness_aware,
    value_and_grad,
)


RNG = np.random.default_rng(0)
SHAPES = {"k": (3, 2), "c": (4,)}
W, G, F = ({n: RNG.normal(size=s) for n, s in SHAPES.items()} for _ in range(3))
G["k"][0, 1] = 0.0  # The gradient of a dead unit.
F = {n: f**2 for n, f in F.items()}
RHO, ETA = 0.3, 0.1


def adaptive(scope):
    def scale(w, f, eta):
        if scope == "element":
            return jnp.abs(w) + eta
        axes = (0,) if scope == "filter" and w.ndim > 1 else None
        if scope == "filter" and w.ndim == 1:
            return jnp.abs(w) + eta
        return jnp.sqrt(jnp.sum(w**2, axes, keepdims=True)) + eta

    return scale


def by_fisher(tree, eta, relative=True):
    mean = sum(map(jnp.sum, tree.values())) / sum(f.size for f in tree.values())
    return jax.tree.map(lambda f: 1 / jnp.sqrt(1 + eta * f / mean), tree)


# What is tested, its T in plain JAX, and p.
GEOMETRIES = {
    "2": (lambda rho, eta: euclidean_ball(rho), None, 2),
    "3": (lambda rho, eta: euclidean_ball(rho, ord=3), None, 3),
    "inf": (lambda rho, eta: euclidean_ball(rho, ord=jnp.inf), None, np.inf),
    **{
        scope: (
            functools.partial(
                lambda scope, rho, eta: adaptive_ellipsoid(rho, eta=eta, scope=scope),
                scope,
            ),
            adaptive(scope),
            2,
        )
        for scope in ("element", "filter", "layer")
    },
    "fisher": (lambda rho, eta: fisher_ellipsoid(rho, given(), eta=eta), "fisher", 2),
    "per_leaf": (lambda rho, eta: euclidean_ball(rho, per_leaf=True), None, 2),
}


def naive(name, g, w, f, rho, eta):
    """The formula as one would write it down, for gradients far from 0."""
    _, scale, p = GEOMETRIES[name]
    if scale == "fisher":
        t = by_fisher(f, eta)
    elif scale is None:
        t = jax.tree.map(jnp.ones_like, w)
    else:
        t = jax.tree.map(lambda w, f: scale(w, f, eta), w, f)
    q = oracles.dual(p)

    def size(leaves):
        # No power of 0.
        powers = [jnp.where(x == 0, 0, jnp.abs(x + (x == 0)) ** q) for x in leaves]
        return sum(map(jnp.sum, powers)) ** (1 / q)

    tg = jax.tree.map(jnp.multiply, t, g)
    one = size(jax.tree.leaves(tg))
    each = {n: size([tg[n]]) if name == "per_leaf" else one for n in tg}

    def entry(x):
        dead = x == 0
        if q == 2:
            return x
        return jnp.where(dead, 0, jnp.sign(x) * jnp.abs(x + dead) ** (q - 1))

    return {n: rho * t[n] * entry(tg[n] / each[n]) for n in tg}


C = {n: RNG.normal(size=s) for n, s in SHAPES.items()}
ALONG = (
    *({n: RNG.normal(size=s) for n, s in SHAPES.items()} for _ in range(3)),
    0.7,
    -0.4,
)


def projected(eps):
    return lambda *args: sum(
        jnp.sum(jnp.asarray(C[n], e.dtype) * e) for n, e in eps(*args).items()
    )


@functools.cache
def expected(name):
    with oracles.x64():
        value = projected(functools.partial(naive, name))
        slopes = jax.jit(jax.grad(value, argnums=(0, 1, 2, 3, 4)))
        at = jax.tree.map(jnp.asarray, (G, W, F, RHO, ETA))
        return jax.tree.map(np.asarray, slopes(*at))


SCALES = np.float32([1.0, 1e-20, 1e-30, 1e25, 0.0])


@pytest.mark.short("fisher")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_of_eps_by_all_that_it_depends_on(name):
    """By g, w, F, rho and eta, in both modes, many scales of g at once."""

    def eps(g, w, f, rho, eta):
        tx = GEOMETRIES[name][0](rho, eta)
        return tx.update(g, tx.init(w), w, fisher=f)[0]

    @jax.jit
    @jax.vmap
    def both(scale):
        at = jax.tree.map(jnp.float32, (G, W, F, RHO, ETA))
        at = jax.tree.map(lambda g: scale * g, at[0]), *at[1:]
        along = jax.tree.map(jnp.float32, ALONG)
        along = jax.tree.map(lambda g: scale * g, along[0]), *along[1:]
        value = projected(eps)
        reverse = jax.grad(value, argnums=(0, 1, 2, 3, 4))(*at)
        return reverse, jax.jvp(value, at, along)[1]

    reverse, forward = both(SCALES)
    slopes = expected(name)
    pairs = zip(*map(jax.tree.leaves, (slopes, ALONG)), strict=True)
    along = sum(np.vdot(x, y) for x, y in pairs)
    for i, scale in enumerate(SCALES):
        by_g, *rest = jax.tree.map(lambda x, i=i: np.asarray(x[i], float), reverse)
        found = jax.tree.map(lambda x, c=scale: c * x, by_g), *rest
        if scale:
            close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-6)
            jax.tree.map(close, found, slopes)
            close(forward[i], along)
        else:
            assert not any(np.any(x) for x in jax.tree.leaves((by_g, rest, forward[i])))


def test_of_the_dual_norm_by_a_traced_order():
    @jax.jit
    def dual_norm(p):
        ball = euclidean_ball(RHO, ord=p)
        return ball.update(grads, ball.init(grads))[1].dual_norm

    grads = jax.tree.map(jnp.float32, G)
    flat = np.abs(oracles.flat(G))

    def plain(p):
        return oracles.norm(flat, oracles.dual(p))

    slope = (plain(3 + 1e-5) - plain(3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(dual_norm)(3.0), slope, rtol=1e-4)


@pytest.mark.parametrize("ord", [1.5, 3])
def test_of_the_dual_norm_by_the_gradient(ord):
    def dual_norm(g):
        ball = euclidean_ball(RHO, ord=ord)
        return ball.update(g, ball.init(g))[1].dual_norm

    def plain(g):
        q = oracles.dual(ord)
        return jnp.sum(jnp.abs(g) ** q) ** (1 / q)

    g = jnp.array([3.0, -4.0, 1.0])
    found, expected = (jax.jit(jax.grad(f))(g) for f in (dual_norm, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.long
def test_of_a_scale_of_zero_weights_and_of_no_fisher():
    """A norm at 0 has derivative 0; F = 0 is the end of its range, not a corner."""

    def eps(w, scope):
        tx = adaptive_ellipsoid(RHO, scope=scope)
        return tx.update(grads, tx.init(w), w)[0]

    grads = jnp.ones((2, 2))
    for scope in ("element", "filter", "layer"):
        slope = jax.jit(jax.jacrev(eps), static_argnums=1)(jnp.zeros((2, 2)), scope)
        np.testing.assert_array_equal(slope, np.zeros((2, 2, 2, 2)))

    def by_fisher(f):
        tx = fisher_ellipsoid(RHO, given(), relative=False)
        return tx.update(grads[0], tx.init(f), fisher=f)[0]

    # eps = rho T^2 g / |Tg|, T^2 = 1 / (1 + F): d eps_0 / d F_0 = -3/4 rho / sqrt(2).
    slope = jax.jit(jax.jacfwd(by_fisher))(jnp.zeros(2))
    expected = RHO / np.sqrt(2) * np.array([[-0.75, 0.25], [0.25, -0.75]])
    np.testing.assert_allclose(slope, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_by_rho_of_what_is_left_out(bad):
    def eps(rho, length=None):
        ball = euclidean_ball(rho, length=length)
        return jnp.sum(ball.update(grads, ball.init(grads))[0])

    grads = jnp.array([1.0, bad])
    for length in (None, lambda n, count: jnp.sqrt(n)):
        assert jax.jit(jax.grad(functools.partial(eps, length=length)))(RHO) == 0


@pytest.mark.long
def test_second_derivatives():
    def eps(g):
        ball = euclidean_ball(RHO)
        return jnp.sum(ball.update(g, ball.init(g))[0] ** 3)

    def plain(g):
        return jnp.sum((RHO * g / jnp.sqrt(jnp.sum(g**2))) ** 3)

    g = jnp.array([3.0, -4.0, 1.0])
    hessians = jax.jit(jax.vmap(jax.hessian(eps)))(jnp.stack([g, 0 * g]))
    expected = jax.jit(jax.hessian(plain))(g)
    np.testing.assert_allclose(hessians[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(hessians[1], np.zeros((3, 3)))


@pytest.mark.short("{'ord': 3}-0.0", "{}-1e-22")
@pytest.mark.parametrize("scale", [1e-22, 0.0])
@pytest.mark.parametrize("options", [{}, {"per_leaf": True}, {"ord": 3}], ids=str)
def test_on_parameters_sharded_by_hand(options, scale):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"k": P(), "c": P("d")}
    weights = jax.tree.map(jnp.float32, W)

    def slope(grads, weights, **axes):
        ball = euclidean_ball(RHO, **options, **axes)

        def total(grads):
            eps, _ = ball.update(grads, ball.init(grads))
            sums = {n: jnp.sum(eps[n] * weights[n]) for n in eps}
            if axes:
                sums["c"] = jax.lax.psum(sums["c"], "d")
            return sums["k"] + sums["c"]

        return jax.grad(total)(grads)

    grads = jax.tree.map(lambda g: jnp.float32(scale * g), G)
    sharded = jax.shard_map(
        functools.partial(slope, shard_axes="d"),
        mesh=mesh,
        in_specs=(specs, specs),
        out_specs=specs,
    )
    found, alone = jax.jit(sharded)(grads, weights), jax.jit(slope)(grads, weights)
    for n in alone:
        bound = 1e-5 * np.max(np.abs(alone[n]))
        np.testing.assert_allclose(found[n], alone[n], rtol=1e-5, atol=bound)
    assert (scale == 0) == (not np.any(oracles.flat(alone)))


# A whole step


def quartic(w, batch):
    return jnp.mean(batch) * jnp.sum(w**4)


def with_optimizer(ball, lr, **options):
    tx = sharpness_aware(optax.sgd(lr), ball, **options)

    def step(w, state, weight):
        grad_fn = jax.grad(lambda w: quartic(w, weight))
        update, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        return w + update, state

    return tx.init, step


def with_oracle(ball, lr, **options):
    f = value_and_grad(quartic, ball, **options)

    def step(w, state, weight):
        _, grads, state = f(w, state, weight[None] * jnp.ones(2))
        return w - lr * grads, state

    return f.init, step


STEPS = {
    "optimizer": with_optimizer,
    "every second": functools.partial(with_optimizer, every=2),
    "oracle": with_oracle,
    "micro-batches": functools.partial(with_oracle, micro_batches=2),
}


@pytest.mark.short("optimizer")
@pytest.mark.parametrize("name", STEPS)
def test_of_training_through_a_step_that_finds_no_gradient(name):
    """By w, rho and the learning rate. The last two steps hardly move w."""

    def trained(w, rho, lr, weights):
        init, step = STEPS[name](euclidean_ball(rho), lr)

        def body(carry, weight):
            return step(*carry, weight), None

        (w, _), _ = jax.lax.scan(body, (w, init(w)), weights)
        return quartic(w, 1.0)

    def by_hand(w, rho, lr):
        g = 4 * w**3
        return quartic(w - lr * 4 * (w + rho * g / jnp.linalg.norm(g)) ** 3, 1.0)

    w, weights = jnp.array([0.7, -1.2, 0.4]), jnp.array([1.0, 0.0, 1e-30])
    expected = jax.jit(jax.grad(by_hand, (0, 1, 2)))(w, 0.1, 0.05)

    @jax.jit
    def both(w, rho, lr):
        reverse = jax.grad(trained, (0, 1, 2))(w, rho, lr, weights)
        moved = functools.partial(trained, weights=weights)
        return reverse, jax.jvp(moved, (w, rho, lr), (w, rho, lr))[1]

    reverse, forward = both(w, 0.1, 0.05)
    for x, y in zip(reverse, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)
    along = sum(np.vdot(x, y) for x, y in zip(expected, (w, 0.1, 0.05), strict=True))
    np.testing.assert_allclose(forward, along, rtol=1e-4)


@pytest.mark.long
def test_one_task_without_a_gradient_spoils_no_mean_over_tasks():
    def after(eta, weight):
        tx = fsam_optax.fisher_sam(optax.sgd(0.1), 0.3, eta=eta)
        w = jnp.array([1.0, 2.0])
        grad_fn = jax.grad(lambda w: weight * jnp.sum(w**4))
        update, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        return quartic(w + update, 1.0)

    slope = jax.grad(after)
    slopes = jax.jit(jax.vmap(slope, (None, 0)))(1.0, jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(slopes, [jax.jit(slope)(1.0, 1.0), 0.0], rtol=1e-5)
    assert abs(slopes[0]) > 0

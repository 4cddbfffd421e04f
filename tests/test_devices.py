"""Eight devices: jit with sharded arrays, shard_map and pmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_sharpness_aware import assert_close, assert_equal
from test_value_and_grad import by_replica

from fsam_optax import (
    adaptive_ellipsoid,
    euclidean_ball,
    fisher_ellipsoid,
    given,
    sharpness_aware,
    squared_gradient,
    value_and_grad,
)


DEVICES = 8
MESH = Mesh(np.array(jax.devices()[:DEVICES]), ("d",))
RHO = 0.5
RNG = np.random.default_rng(0)
PARAMS = {
    "k": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=2), jnp.float32),
}
BATCH = (
    jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32),
    jnp.asarray(RNG.normal(size=(16, 2)), jnp.float32),
)
PERTURBATIONS = {
    "euclidean": euclidean_ball(RHO),
    "adaptive": adaptive_ellipsoid(RHO),
    "fisher": fisher_ellipsoid(RHO, optax.chain(squared_gradient(), optax.ema(0.9))),
}


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["k"] + params["b"][None]) - y) ** 2)


gradient = jax.jit(jax.grad(loss))


def varying(tree):
    """What a caller does to take local gradients at replicated parameters."""
    if hasattr(jax.lax, "pcast"):
        return jax.tree.map(lambda x: jax.lax.pcast(x, "d", to="varying"), tree)
    return jax.tree.map(lambda x: jax.lax.pvary(x, "d"), tree)


def by_transformation(name, every=1, synchronised=False, typed=False):
    """Returns init and a step on the batch of one device, whose result is global."""
    tx = sharpness_aware(
        optax.sgd(1.0), PERTURBATIONS[name], every=every, axis_name="d"
    )

    def step(params, state, batch):
        def grad_fn(p):
            return gradient(p, batch)

        grads = grad_fn(varying(params) if typed else params)
        if synchronised:
            grads = jax.lax.pmean(grads, "d")
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return jax.tree.map(jnp.negative, updates), state

    return tx.init, step


def by_oracle(name, every=1, micro_batches=None):
    f = value_and_grad(
        loss,
        PERTURBATIONS[name],
        every=every,
        micro_batches=micro_batches,
        axis_name="d",
    )

    def step(params, state, batch):
        _, grads, state = f(params, state, batch)
        return grads, state

    return f.init, step


def shard_map(step, check_vma):
    return jax.jit(
        jax.shard_map(
            step,
            mesh=MESH,
            in_specs=(P(), P(), P("d")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


def pmap(step):
    def split(x):
        return x.reshape(DEVICES, -1, *x.shape[1:])

    mapped = jax.pmap(step, axis_name="d", in_axes=(None, None, 0))

    def apply(params, state, batch):
        results = mapped(params, state, jax.tree.map(split, batch))
        # Replicas agree to the last bit.
        jax.tree.map(
            lambda x: np.testing.assert_array_equal(x, x[:1].repeat(8, 0)), results
        )
        return jax.tree.map(lambda x: x[0], results)

    return apply


def spread(how, step):
    return pmap(step) if how == "pmap" else shard_map(step, how == "typed")


@functools.cache
def expected_steps(name, parts, every=1, steps=2):
    """The mean of the perturbed gradients of `parts` parts, on one device."""
    perturbation = PERTURBATIONS[name]
    state, results = perturbation.init(PARAMS), []
    for i in range(steps):
        batches = [
            jax.tree.map(lambda x, j=j: jnp.split(x, parts)[j], BATCH)
            for j in range(parts)
        ]
        grads = [gradient(PARAMS, batch) for batch in batches]
        if i % every == 0:
            ascents = [perturbation.update(g, state, PARAMS) for g in grads]
            grads = [
                gradient(jax.tree.map(jnp.add, PARAMS, eps), batch)
                for (eps, _), batch in zip(ascents, batches, strict=True)
            ]
            state = jax.tree.map(
                lambda *x: (sum(x) / parts).astype(x[0].dtype), *(s for _, s in ascents)
            )
        results.append((jax.tree.map(lambda *x: sum(x) / parts, *grads), state))
    return results


def check(step, init, name, parts, every=1, rtol=1e-6):
    state = init(PARAMS)
    for grads, perturbation_state in expected_steps(name, parts, every):
        result, state = step(PARAMS, state, BATCH)
        assert_close(result, grads, rtol)
        assert_close(state.perturbation, perturbation_state, 3 * rtol)
    assert state.step == 2


def test_jit_on_a_sharded_batch_is_one_device():
    perturbation = PERTURBATIONS["fisher"]
    sharding = NamedSharding(MESH, P("d"))
    batch = jax.device_put(BATCH, sharding)
    params = jax.device_put(PARAMS, NamedSharding(MESH, P()))
    f = value_and_grad(loss, perturbation)
    tx = sharpness_aware(optax.sgd(1.0), perturbation)

    @jax.jit
    def step(params, states, batch):
        def grad_fn(p):
            return gradient(p, batch)

        _, grads, state = f(params, states[0], batch)
        updates, tx_state = tx.update(
            grad_fn(params), states[1], params, grad_fn=grad_fn
        )
        return grads, updates, (state, tx_state)

    states = f.init(params), tx.init(params)
    for expected, state in expected_steps("fisher", 1):
        grads, updates, states = step(params, states, batch)
        assert_close(grads, expected, 1e-6)
        assert_equal(updates, jax.tree.map(jnp.negative, grads))
        assert_close(states[0].perturbation, state, 3e-6)
    assert grads["k"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("how", "name"),
    [("typed", "fisher"), ("untyped", "adaptive"), ("pmap", "euclidean")],
)
def test_synchronised_sam(how, name):
    # The caller averages the first gradient: one perturbation for all devices.
    init, step = by_transformation(name, synchronised=True, typed=how == "typed")
    check(spread(how, step), init, name, parts=1)


@pytest.mark.parametrize(
    ("how", "every"), [("typed", 1), ("typed", 2), ("untyped", 2), ("pmap", 2)]
)
def test_m_sharp_sam_by_transformation(how, every):
    # The caller does not: each device has a perturbation of its own.
    init, step = by_transformation("fisher", every, typed=how == "typed")
    check(spread(how, step), init, "fisher", DEVICES, every)


@pytest.mark.parametrize(
    ("how", "every", "micro_batches"),
    [
        ("typed", 1, None),
        ("typed", 2, 2),
        ("untyped", 2, None),
        ("untyped", 1, 2),
        ("pmap", 2, None),
        ("pmap", 2, 2),
    ],
)
def test_m_sharp_sam_by_oracle(how, every, micro_batches):
    init, step = by_oracle("fisher", every, micro_batches)
    parts = DEVICES * (micro_batches or 1)
    check(spread(how, step), init, "fisher", parts, every)


def test_micro_batches_are_devices_without_synchronisation():
    f = value_and_grad(loss, PERTURBATIONS["fisher"], micro_batches=DEVICES)
    init, step = by_oracle("fisher")
    state, other = f.init(PARAMS), init(PARAMS)
    spread_step, call = shard_map(step, True), jax.jit(f.apply)
    for _ in range(2):
        _, grads, state = call(PARAMS, state, BATCH)
        other_grads, other = spread_step(PARAMS, other, BATCH)
        assert_close(grads, other_grads, 1e-6)
        assert_close(state, other, 1e-6)


def test_value_is_averaged_and_aux_is_that_of_each_device():
    def loss_and_aux(params, batch):
        return loss(params, batch), jnp.mean(batch[0])

    f = value_and_grad(loss_and_aux, euclidean_ball(RHO), has_aux=True, axis_name="d")

    def step(params, state, batch):
        (value, aux), _, _ = f(params, state, batch)
        return value, aux[None]

    spread_step = jax.shard_map(
        step, mesh=MESH, in_specs=(P(), P(), P("d")), out_specs=(P(), P("d"))
    )
    value, aux = jax.jit(spread_step)(PARAMS, f.init(PARAMS), BATCH)
    assert_close(value, loss(PARAMS, BATCH), 1e-6)
    assert_close(aux, np.mean(np.reshape(BATCH[0], (8, -1)), axis=1), 1e-6)


@pytest.mark.parametrize("micro_batches", [None, 2])
def test_devices_and_their_micro_batches_are_numbered(micro_batches):
    f = value_and_grad(
        lambda w, b: w**2 / 2 + 0 * jnp.sum(b),
        by_replica(),
        micro_batches=micro_batches,
        axis_name="d",
    )
    step = shard_map(lambda w, state, b: f(w, state, b)[1], check_vma=True)
    grads = step(jnp.float32(2.0), f.init(jnp.float32(2.0)), jnp.ones(16))
    replicas = DEVICES * (micro_batches or 1)
    assert grads == 2 + np.mean(np.arange(replicas))


@pytest.mark.parametrize("how", ["typed", "pmap"])
def test_nan_on_one_replica(how):
    # m-sharp: that replica goes without a perturbation; the mean is not a number,
    # on every replica alike, and the guard of the base sees it.
    batch = (BATCH[0].at[0, 0].set(jnp.nan), BATCH[1])
    tx = sharpness_aware(
        optax.apply_if_finite(optax.sgd(1.0), 3), PERTURBATIONS["fisher"], axis_name="d"
    )

    def step(params, state, batch):
        def grad_fn(p):
            return gradient(p, batch)

        grads = grad_fn(varying(params) if how == "typed" else params)
        return tx.update(grads, state, params, grad_fn=grad_fn)

    updates, state = spread(how, step)(PARAMS, tx.init(PARAMS), batch)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert state.perturbation.skipped == 1
    assert state.base.total_notfinite == 1
    assert np.all(np.isfinite(state.perturbation.operator[1].ema["k"]))


# Parameters that are sharded by hand


SHARDED = {
    "k": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=3), jnp.float32),
    "w": jnp.asarray(RNG.normal(size=16), jnp.float32),
    "s": jnp.float32(0.5),
}
SHARDED_GRADS = jax.tree.map(lambda w: jnp.sin(3 * w) + 0.1, SHARDED)
SPECS = {"k": P("d"), "b": P(), "w": P("d"), "s": P()}


@functools.cache
def by_hand(name, leaves="bksw", check_vma=True):
    tx = GEOMETRIES[name](axis_name="d")
    specs = {leaf: SPECS[leaf] for leaf in leaves}

    def step(grads, params):
        fisher = jax.tree.map(jnp.abs, params)
        return tx.update(grads, tx.init(params), params, fisher=fisher)

    return jax.jit(
        jax.shard_map(
            step,
            mesh=MESH,
            in_specs=(specs, specs),
            out_specs=(specs, P()),
            check_vma=check_vma,
        )
    )


def alone(name, grads=SHARDED_GRADS, params=SHARDED):
    fisher = jax.tree.map(jnp.abs, params)
    tx = GEOMETRIES[name]()
    return tx.update(grads, tx.init(params), params, fisher=fisher)


GEOMETRIES = {
    "2": functools.partial(euclidean_ball, RHO),
    "3": functools.partial(euclidean_ball, RHO, ord=3),
    "layer": functools.partial(adaptive_ellipsoid, RHO, scope="layer"),
    "fisher": functools.partial(fisher_ellipsoid, RHO, given()),
    "masked": functools.partial(
        fisher_ellipsoid,
        RHO,
        given(),
        mask={"k": True, "b": True, "w": False, "s": False},
    ),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_sharded_and_replicated_leaves_mixed(name):
    assert_close(by_hand(name)(SHARDED_GRADS, SHARDED), alone(name), 2e-6)


@pytest.mark.parametrize("name", ["layer", "fisher"])
def test_sharded_leaves_without_types(name):
    grads, params = ({n: t[n] for n in "kw"} for t in (SHARDED_GRADS, SHARDED))
    result = by_hand(name, "kw", check_vma=False)(grads, params)
    assert_close(result, alone(name, grads, params), 2e-6)


@pytest.mark.parametrize("factor", [1e30, 1e-30, 0.0, np.nan])
def test_all_shards_take_the_same_decision(factor):
    # One shard alone is out of range.
    grads = {**SHARDED_GRADS, "w": SHARDED_GRADS["w"].at[3].mul(factor)}
    eps, state = by_hand("2")(grads, SHARDED)
    expected, expected_state = alone("2", grads)
    assert_close(eps, expected, 2e-6)
    assert state.skipped == expected_state.skipped == np.isnan(factor)


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        ("Auto", "layer"),
        ("Explicit", "3"),
        ("Explicit", "layer"),
        ("Explicit", "fisher"),
    ],
)
def test_jit_on_sharded_parameters_keeps_the_sharding(axes, name):
    types = (getattr(jax.sharding.AxisType, axes),)
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=types)
    shard = functools.partial(
        jax.tree.map, lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    )
    grads, params = shard(SHARDED_GRADS, SPECS), shard(SHARDED, SPECS)

    def update(grads, params):
        tx = GEOMETRIES[name]()
        fisher = jax.tree.map(jnp.abs, params)
        return tx.update(grads, tx.init(params), params, fisher=fisher)

    eps, state = jax.jit(update)(grads, params)
    assert_close((eps, state), alone(name), 2e-6)
    for leaf, spec in SPECS.items():
        assert eps[leaf].sharding.is_equivalent_to(
            NamedSharding(mesh, spec), eps[leaf].ndim
        )

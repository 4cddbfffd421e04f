"""Eight devices: jit with sharded arrays, shard_map and pmap."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from test_sharpness_aware import assert_close, assert_equal
from test_value_and_grad import by_replica

from fsam_optax import (
    adaptive_ellipsoid,
    categorical,
    diagonal,
    euclidean_ball,
    fisher_ellipsoid,
    fisher_empirical,
    fisher_exact,
    fisher_gnb,
    fisher_hutchinson,
    fisher_i1,
    fisher_i2,
    given,
    negative_log_likelihood,
    sharpness_aware,
    squared_gradient,
    value_and_grad,
)


DEVICES = 8
MESH = Mesh(np.array(jax.devices()[:DEVICES]), ("d",))
RHO = 0.5
RNG = np.random.default_rng(0)
PARAMS = {
    "k": jax.device_put(np.float32(RNG.normal(size=(3, 2)))),
    "b": jax.device_put(np.float32(RNG.normal(size=2))),
}
BATCH = (
    jax.device_put(np.float32(RNG.normal(size=(16, 3)))),
    jax.device_put(np.float32(RNG.normal(size=(16, 2)))),
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
    update = jax.jit(perturbation.update)
    for i in range(steps):
        batches = [
            jax.tree.map(lambda x, j=j: jnp.split(x, parts)[j], BATCH)
            for j in range(parts)
        ]
        grads = [gradient(PARAMS, batch) for batch in batches]
        if i % every == 0:
            ascents = [update(g, state, PARAMS) for g in grads]
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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "name"),
    [("typed", "fisher"), ("untyped", "adaptive"), ("pmap", "euclidean")],
)
def test_synchronised_sam(how, name):
    # The caller averages the first gradient: one perturbation for all devices.
    init, step = by_transformation(name, synchronised=True, typed=how == "typed")
    check(spread(how, step), init, name, parts=1)


@pytest.mark.long
@pytest.mark.parametrize(("how", "every"), [("typed", 1), ("untyped", 2), ("pmap", 2)])
def test_m_sharp_sam_by_transformation(how, every):
    # The caller does not: each device has a perturbation of its own.
    init, step = by_transformation("fisher", every, typed=how == "typed")
    check(spread(how, step), init, "fisher", DEVICES, every)


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "every", "micro_batches"),
    [
        ("typed", 1, None),
        ("typed", 2, 2),
        ("untyped", 1, 2),
        ("pmap", 2, None),
    ],
)
def test_m_sharp_sam_by_oracle(how, every, micro_batches):
    init, step = by_oracle("fisher", every, micro_batches)
    parts = DEVICES * (micro_batches or 1)
    check(spread(how, step), init, "fisher", parts, every)


def strided(batch, parts):
    """The batch in the order in which contiguous parts are its micro-batches."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1).reshape(
            x.shape
        ),
        batch,
    )


def test_micro_batches_are_devices_without_synchronisation():
    f = value_and_grad(loss, PERTURBATIONS["fisher"], micro_batches=DEVICES)
    init, step = by_oracle("fisher")
    state, other = f.init(PARAMS), init(PARAMS)
    spread_step, call = shard_map(step, True), jax.jit(f.apply)
    for _ in range(2):
        _, grads, state = call(PARAMS, state, BATCH)
        other_grads, other = spread_step(PARAMS, other, strided(BATCH, DEVICES))
        assert_equal(grads, other_grads)
        assert_equal(state, other)


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


@pytest.mark.short("typed-sam", "untyped-m-sharp")
@pytest.mark.parametrize("synchronised", [False, True], ids=["m-sharp", "sam"])
@pytest.mark.parametrize("how", ["typed", "untyped", "pmap"])
def test_fault_26_nan_on_one_replica(how, synchronised):
    # m-sharp: that replica goes without a perturbation. Synchronised: all do. Either
    # way the mean gradient is not a number, on every replica alike, and the guard of
    # the base sees it.
    batch = (BATCH[0].at[0, 0].set(jnp.nan), BATCH[1])
    tx = sharpness_aware(
        optax.apply_if_finite(optax.sgd(1.0), 3), PERTURBATIONS["fisher"], axis_name="d"
    )

    def step(params, state, batch):
        def grad_fn(p):
            return gradient(p, batch)

        grads = grad_fn(varying(params) if how == "typed" else params)
        if synchronised:
            grads = jax.lax.pmean(grads, "d")
        return tx.update(grads, state, params, grad_fn=grad_fn)

    init = tx.init(PARAMS)
    updates, state = spread(how, step)(PARAMS, init, batch)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert state.perturbation.skipped == 1
    assert state.base.total_notfinite == 1
    average = state.perturbation.operator[1].ema
    if synchronised:
        assert_equal(average, init.perturbation.operator[1].ema)
    else:
        assert np.all(np.isfinite(average["k"])) and np.any(average["k"])


@pytest.mark.short("typed")
@pytest.mark.parametrize("how", ["typed", "untyped", "pmap"])
def test_fault_26_nan_on_one_replica_of_the_oracle(how):
    batch = (BATCH[0].at[-1, 0].set(jnp.nan), BATCH[1])
    init, step = by_oracle("fisher")
    state = init(PARAMS)
    grads, state = spread(how, step)(PARAMS, state, batch)
    assert not np.any(np.isfinite(grads["b"]))
    assert state.perturbation.skipped == 1
    assert np.all(np.isfinite(state.perturbation.operator[1].ema["k"]))


# Parameters that are sharded by hand


SHARDED = {
    "k": jax.device_put(np.float32(RNG.normal(size=(8, 3)))),
    "b": jax.device_put(np.float32(RNG.normal(size=3))),
    "w": jax.device_put(np.float32(RNG.normal(size=16))),
    "s": jnp.float32(0.5),
}
SHARDED_GRADS = jax.jit(
    lambda tree: jax.tree.map(lambda w: jnp.sin(3 * w) + 0.1, tree)
)(SHARDED)
SPECS = {"k": P("d"), "b": P(), "w": P("d"), "s": P()}


@functools.cache
def by_hand(name, leaves="bksw", check_vma=True):
    tx = GEOMETRIES[name](shard_axes="d")
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
    return jax.jit(tx.update)(grads, tx.init(params), params, fisher=fisher)


GEOMETRIES = {
    "2": functools.partial(euclidean_ball, RHO),
    "3": functools.partial(euclidean_ball, RHO, ord=3),
    "layer": functools.partial(adaptive_ellipsoid, RHO, scope="layer"),
    "fisher": functools.partial(fisher_ellipsoid, RHO, given()),
    "per leaf": functools.partial(euclidean_ball, RHO, per_leaf=True),
    "per leaf, 3": functools.partial(euclidean_ball, RHO, per_leaf=True, ord=3),
    "masked": functools.partial(
        fisher_ellipsoid,
        RHO,
        given(),
        mask={"k": True, "b": True, "w": False, "s": False},
    ),
}


@pytest.mark.short("3", "masked")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_fault_27_sharded_and_replicated_leaves_mixed(name):
    assert_close(by_hand(name)(SHARDED_GRADS, SHARDED), alone(name), 2e-6)


@pytest.mark.parametrize("name", ["layer", "fisher"])
def test_fault_27_sharded_leaves_without_types(name):
    grads, params = ({n: t[n] for n in "kw"} for t in (SHARDED_GRADS, SHARDED))
    result = by_hand(name, "kw", check_vma=False)(grads, params)
    assert_close(result, alone(name, grads, params), 2e-6)


@pytest.mark.parametrize("factor", [1e30, 1e-30, 0.0, np.nan])
def test_fault_26_all_shards_take_the_same_decision(factor):
    # One shard alone is out of range.
    grads = {**SHARDED_GRADS, "w": SHARDED_GRADS["w"].at[3].mul(factor)}
    eps, state = by_hand("2")(grads, SHARDED)
    expected, expected_state = alone("2", grads)
    assert_close(eps, expected, 2e-6)
    assert state.skipped == expected_state.skipped == np.isnan(factor)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_fault_26_all_shards_scale_what_all_have_out_of_range(factor):
    grads = jax.tree.map(lambda g: g * factor, SHARDED_GRADS)
    eps, state = by_hand("2")(grads, SHARDED)
    expected, expected_state = alone("2", grads)
    assert_close(eps, expected, 2e-6)
    np.testing.assert_allclose(
        state.dual_norm / factor, expected_state.dual_norm / factor, rtol=2e-6
    )


@pytest.mark.long
@pytest.mark.parametrize("ord", [2, 1.5, jnp.inf])
def test_the_dual_norm_of_shards_has_its_derivative(ord):
    def slope(leaf, shard_axes=None):
        ball = euclidean_ball(RHO, ord=ord, shard_axes=shard_axes)

        def dual_norm(value, grads):
            grads = {**grads, leaf: value}
            return ball.update(grads, ball.init(grads))[1].dual_norm

        return lambda grads: jax.grad(dual_norm)(grads[leaf], grads)

    for leaf in SPECS:
        found = jax.shard_map(
            slope(leaf, "d"), mesh=MESH, in_specs=(SPECS,), out_specs=SPECS[leaf]
        )
        assert_close(jax.jit(found)(SHARDED_GRADS), slope(leaf)(SHARDED_GRADS), 1e-5)


@pytest.mark.short("Explicit-layer")
@pytest.mark.parametrize(
    ("axes", "name"),
    [
        ("Auto", "layer"),
        ("Explicit", "3"),
        ("Explicit", "layer"),
        ("Explicit", "fisher"),
    ],
)
def test_fault_27_jit_on_sharded_parameters_keeps_the_sharding(axes, name):
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


def test_the_operator_may_lie_elsewhere_than_the_gradient_under_explicit_axes():
    """T = |w| of replicated parameters, and a gradient that is sharded."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Explicit,))
    params, grads = (
        {"k": jax.device_put(tree["k"], NamedSharding(mesh, spec))}
        for tree, spec in ((SHARDED, P()), (SHARDED_GRADS, SPECS["k"]))
    )
    tx = adaptive_ellipsoid(RHO)
    eps, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    params, grads = ({"k": tree["k"]} for tree in (SHARDED, SHARDED_GRADS))
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_close(eps, expected, 2e-6)


# Whole steps under jit, whatever is sharded


RESHARD = getattr(jax, "reshard", None) or jax.sharding.reshard
NET = {
    "w1": jax.device_put(np.float32(RNG.normal(size=(4, 16)))),
    "b1": jax.device_put(np.float32(RNG.normal(size=16) / 8)),
    "w2": jax.device_put(np.float32(RNG.normal(size=(16, 8)) / 4)),
}
LABELLED = (
    jax.device_put(np.float32(RNG.normal(size=(16, 4)))),
    jnp.asarray(RNG.integers(8, size=16), jnp.int32),
)
REPLICATED = {"w1": P(), "b1": P(), "w2": P()}


class Layout(collections.namedtuple("Layout", "shape batch params computed out")):
    """How arrays are sharded, and how a model says so under Explicit axes.

    `computed` are the parameters as they are multiplied, `out` is the output.
    """

    def mesh(self, kind):
        names = ("d", "m")[: len(self.shape)]
        kinds = (kind,) * len(self.shape)
        return jax.make_mesh(self.shape, names, axis_types=kinds)

    def put(self, mesh):
        params = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
            NET,
            self.params,
        )
        return params, jax.device_put(LABELLED, NamedSharding(mesh, self.batch))

    def model(self, mesh):
        if mesh.axis_types[0] != AxisType.Explicit:
            return net

        def apply_fn(params, x):
            params = jax.tree.map(
                lambda w, spec: RESHARD(w, NamedSharding(mesh, spec)),
                params,
                self.computed,
            )
            hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
            out = NamedSharding(mesh, self.out)
            return jnp.matmul(hidden, params["w2"], out_sharding=out)

        return apply_fn


TENSOR = {"w1": P(None, "d"), "b1": P("d"), "w2": P("d", None)}
LAYOUTS = {
    "data": Layout((8,), P("d"), REPLICATED, REPLICATED, P("d", None)),
    "fsdp": Layout(
        (8,),
        P("d"),
        {"w1": P(None, "d"), "b1": P("d"), "w2": P("d")},
        REPLICATED,
        P("d", None),
    ),
    "tensor": Layout((8,), P(), TENSOR, TENSOR, P(None, None)),
    "mixed": Layout(
        (2, 4),
        P("d"),
        {"w1": P("d", "m"), "b1": P("m"), "w2": P("m", "d")},
        {"w1": P(None, "m"), "b1": P("m"), "w2": P("m", None)},
        P("d", None),
    ),
    "uneven": Layout((2, 3), P("d"), REPLICATED, REPLICATED, P("d", None)),
}


def net(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"]


def by_either(front_end, apply_fn, params, batch):
    """Two steps of Fisher SAM; the estimator leaves shardings to the compiler."""
    loss_fn = negative_log_likelihood(apply_fn, categorical)
    estimator = optax.chain(fisher_empirical(net, categorical), optax.ema(0.9))
    ellipsoid = fisher_ellipsoid(RHO, estimator)
    f, adam = value_and_grad(loss_fn, ellipsoid), optax.adam(0.1)
    tx = sharpness_aware(adam, ellipsoid)

    def by_oracle(params, state, batch):
        _, grads, fsam_state = f(params, state[0], batch)
        updates, base = adam.update(grads, state[1], params)
        return updates, (fsam_state, base)

    def by_transformation(params, state, batch):
        def grad_fn(p):
            return jax.grad(loss_fn)(p, batch)

        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn, batch=batch)

    pair = front_end == "value_and_grad"

    @jax.jit
    def run(params, batch):
        def step(carry, _):
            params, state = carry
            updates, state = (by_oracle if pair else by_transformation)(
                params, state, batch
            )
            return (optax.apply_updates(params, updates), state), None

        state = (f.init(params), adam.init(params)) if pair else tx.init(params)
        (params, state), _ = jax.lax.scan(step, (params, state), length=2)
        moments = (state[1] if pair else state.base)[0]
        averages = (state[0] if pair else state).perturbation.operator[1].ema
        return params, moments.mu, moments.nu, averages

    return run(params, batch)


@functools.cache
def trained_on_one_device():
    return by_either("value_and_grad", net, NET, LABELLED)


@pytest.mark.short("mixed-Explicit-value_and_grad")
@pytest.mark.parametrize(
    ("name", "kind", "front_end"),
    [
        # Batch and parameters both sharded, in all ways at once.
        ("mixed", "Auto", "value_and_grad"),
        ("mixed", "Explicit", "value_and_grad"),
        *((name, "Explicit", "sharpness_aware") for name in LAYOUTS),
    ],
)
def test_fault_27_training_is_that_of_one_device(name, kind, front_end):
    layout = LAYOUTS[name]
    mesh = layout.mesh(AxisType[kind])
    params, batch = layout.put(mesh)
    trees = by_either(front_end, layout.model(mesh), params, batch)
    assert_close(trees, trained_on_one_device(), 1e-5)
    for tree in trees:
        for leaf, w in params.items():
            assert tree[leaf].sharding.is_equivalent_to(w.sharding, w.ndim), leaf


@pytest.mark.short("layer")
@pytest.mark.parametrize("name", ["2", "layer", "fisher"])
def test_fault_27_axes_that_the_devices_do_not_divide(name):
    mesh = jax.make_mesh((3,), ("d",), axis_types=(AxisType.Auto,))

    @jax.jit
    def update(grads, params):
        # 8 rows and 16 weights over 3 devices.
        grads, params = (
            jax.tree.map(
                lambda x, spec: jax.lax.with_sharding_constraint(
                    x, NamedSharding(mesh, spec)
                ),
                tree,
                SPECS,
            )
            for tree in (grads, params)
        )
        tx = GEOMETRIES[name]()
        fisher = jax.tree.map(jnp.abs, params)
        return tx.update(grads, tx.init(params), params, fisher=fisher)

    assert_close(update(SHARDED_GRADS, SHARDED), alone(name), 2e-6)


COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    r"(-start)?\("
)


@pytest.mark.short("per leaf-Explicit", "relative fisher-Auto", "euclidean-Auto")
@pytest.mark.skipif(
    jax.__version_info__ < (0, 8), reason="XLA of jax 0.7 makes one for each leaf"
)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    ("tx", "number"),
    [
        (euclidean_ball(RHO), 1),
        (euclidean_ball(RHO, per_leaf=True), 1),
        (adaptive_ellipsoid(RHO), 1),
        (fisher_ellipsoid(RHO, squared_gradient(), relative=False), 1),
        # One more for the mean of F.
        (fisher_ellipsoid(RHO, squared_gradient()), 2),
    ],
    ids=["euclidean", "per leaf", "adaptive", "fisher", "relative fisher"],
)
def test_the_norm_is_one_all_reduce(tx, number, kind):
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType[kind],))
    grads, params = (
        jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS
        )
        for tree in (SHARDED_GRADS, SHARDED)
    )
    lowered = jax.jit(tx.update).lower(grads, tx.init(params), params)
    # The loop, of two rounds for sums out of range of float32, holds one.
    program = lowered.compile().as_text()
    names = [match[1] for match in COLLECTIVE.finditer(program)]
    assert names == ["all-reduce"] * number
    _, entry = program.split("\nENTRY ")
    assert len(re.findall(r" while\(", entry)) == 1


# Estimators


KEY = jax.random.key(3)
ESTIMATORS = {
    "empirical": fisher_empirical(net, categorical),
    "exact": fisher_exact(net, categorical),
    "i1": fisher_i1(net, categorical, key=KEY),
    "gnb": fisher_gnb(net, categorical, key=KEY),
    "hutchinson": fisher_hutchinson(net, categorical, key=KEY),
    "i2": fisher_i2(net, categorical, key=KEY),
}


@functools.cache
def estimated_on_one_device(name):
    return jax.jit(lambda p, b: diagonal(ESTIMATORS[name], p, b))(NET, LABELLED)


@pytest.mark.short("exact-Auto")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_fault_27_estimators_on_sharded_batch_and_parameters(name, kind):
    # Under Explicit axes estimators want a model that names no shardings.
    layout = LAYOUTS["mixed"]
    params, batch = layout.put(layout.mesh(AxisType[kind]))
    result = jax.jit(lambda p, b: diagonal(ESTIMATORS[name], p, b))(params, batch)
    assert_close(result, estimated_on_one_device(name), 1e-5)


@pytest.mark.short("exact-False")
@pytest.mark.parametrize(
    ("name", "check_vma"), [("empirical", True), ("exact", True), ("exact", False)]
)
def test_estimators_in_shard_map_are_means_over_devices(name, check_vma):
    def local(params, batch):
        return jax.lax.pmean(diagonal(ESTIMATORS[name], params, batch), "d")

    mapped = jax.shard_map(
        local, mesh=MESH, in_specs=(P(), P("d")), out_specs=P(), check_vma=check_vma
    )
    result = jax.jit(mapped)(NET, LABELLED)
    assert_close(result, estimated_on_one_device(name), 1e-5)


@functools.cache
def with_micro_batches(name):
    loss_fn = negative_log_likelihood(net, categorical)
    estimator = optax.chain(ESTIMATORS[name], optax.ema(0.9))
    f = value_and_grad(loss_fn, fisher_ellipsoid(RHO, estimator), micro_batches=DEVICES)
    return jax.jit(f)(NET, f.init(NET), LABELLED)


@pytest.mark.short("i1-untyped")
@pytest.mark.parametrize(
    ("name", "how"), [("empirical", "typed"), ("i1", "untyped"), ("i1", "pmap")]
)
def test_estimators_on_devices_are_those_on_micro_batches(name, how):
    # The labels drawn on device i are those drawn for micro-batch i.
    loss_fn = negative_log_likelihood(net, categorical)
    estimator = optax.chain(ESTIMATORS[name], optax.ema(0.9))
    f = value_and_grad(loss_fn, fisher_ellipsoid(RHO, estimator), axis_name="d")
    result = spread(how, f.apply)(NET, f.init(NET), strided(LABELLED, DEVICES))
    assert_close(result, with_micro_batches(name), 1e-6)


def test_fault_27_batch_over_one_axis_and_parameters_by_hand_over_another():
    mesh = LAYOUTS["mixed"].mesh(AxisType.Auto)
    specs = LAYOUTS["mixed"].computed

    def local_net(params, x):
        return jax.lax.psum(net(params, x), "m")

    def oracle(apply_fn, **kwargs):
        loss_fn = negative_log_likelihood(apply_fn, categorical)
        ball = euclidean_ball(RHO, shard_axes="m" if apply_fn is local_net else None)
        return value_and_grad(loss_fn, ball, **kwargs)

    whole = oracle(net, micro_batches=2)
    expected = jax.jit(whole)(NET, whole.init(NET), LABELLED)
    f = oracle(local_net, axis_name="d")
    mapped = jax.shard_map(
        f.apply, mesh=mesh, in_specs=(specs, P(), P("d")), out_specs=(P(), specs, P())
    )
    result = jax.jit(mapped)(NET, f.init(NET), strided(LABELLED, 2))
    assert_close(result, expected, 1e-6)

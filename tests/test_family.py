"""Every method of the family through both front ends, on parts, devices and disks."""

import functools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax
from fsam_optax import (
    averaged,
    displaced,
    euclidean_ball,
    eval_params,
    extrapolate,
    friendly,
    multi_step,
    reuse,
    sharpness_aware,
    surrogate_gap,
    value_and_grad,
)


RNG = np.random.default_rng(0)
PARAMS = {"k": jnp.asarray(RNG.normal(size=(3, 2)) + 2, "float32"), "b": jnp.ones(2)}
X = jnp.asarray(RNG.normal(size=(16, 3)), "float32")
Y = jnp.asarray(RNG.normal(size=(16, 2)), "float32")
DATA = jax.P("data")
AUTO = jax.sharding.AxisType.Auto


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["k"] + params["b"][None]) - y) ** 2)


def assert_equal(tree, expected):
    def equal(x, y):
        if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)

    jax.tree.map(equal, tree, expected)


def assert_close(tree, expected, rtol=1e-5, atol=1e-6):
    def close(x, y):
        if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)

    jax.tree.map(close, tree, expected)


def normalised(h, state, params=None, *, clean_grads, eps, **extra):
    """A descent as a user writes it (StableSAM): h, as long as the clean gradient."""
    del params, eps, extra
    factor = optax.tree.norm(clean_grads) / optax.tree.norm(h)
    return jax.tree.map(lambda h: factor * h, h), state


BALL = euclidean_ball(0.1)
STABLE = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), normalised)
METHODS = {
    "sam": (BALL, {}),
    "gsam": (BALL, {"descent": surrogate_gap(0.4)}),
    "gsam_clean": (BALL, {"descent": surrogate_gap(0.4, minimize_clean=True)}),
    "wsam": (BALL, {"descent": extrapolate(4.0)}),
    "penalty": (BALL, {"descent": extrapolate(0.3)}),
    "looksam": (BALL, {"descent": reuse(0.7), "every": 3}),
    "stable": (BALL, {"descent": STABLE}),
    "friendly": (optax.chain(friendly(0.5, 0.9), BALL), {}),
    "vasso": (optax.chain(averaged(0.9), BALL), {"descent": surrogate_gap(0.4)}),
    "gcsam": (optax.chain(optax.centralize(), BALL), {}),
    "adam": (optax.chain(optax.scale_by_adam(), BALL), {}),
    "random": (
        optax.chain(optax.set_to_zero(), optax.add_noise(1e-4, 0.0, 7)),
        {"descent": extrapolate(0.5)},
    ),
    "multi_step": (multi_step(2, euclidean_ball(0.05)), {"descent": reuse(0.5)}),
    "late": (BALL, {"every": lambda step: step >= 2, "descent": extrapolate(2.0)}),
}


def batch_at(t):
    return X[t % 4 :: 4], Y[t % 4 :: 4]


def train(update, state, steps=5, params=PARAMS, start=0):
    """Trains by `update(params, state, batch) -> (params, state)`, jitted."""
    step = jax.jit(update)
    for t in range(start, start + steps):
        params, state = step(params, state, batch_at(t))
    return params, state


def as_transformation(tx):
    def update(params, state, batch):
        grad_fn = jax.grad(lambda p: loss(p, batch))
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return update, tx.init(PARAMS)


def as_oracle(f, base):
    def update(params, state, batch):
        _, grads, ascent = f(params, state[0], batch)
        updates, descent = base.update(grads, state[1], params)
        return optax.apply_updates(params, updates), (ascent, descent)

    return update, (f.init(PARAMS), base.init(PARAMS))


BASE = optax.sgd(0.1, momentum=0.9)


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_both_front_ends_agree_bit_for_bit(name):
    perturbation, options = METHODS[name]
    tx = sharpness_aware(BASE, perturbation, **options)
    f = value_and_grad(loss, perturbation, **options)

    def both():
        params, state = train(*as_transformation(tx), steps=3)
        others, (ascent, base) = train(*as_oracle(f, BASE), steps=3)
        found = params, state.perturbation, state.descent, state.base
        return found, (others, ascent.perturbation, ascent.descent, base)

    with jax.disable_jit():
        assert_equal(*both())
    # Compiled, XLA may fuse the same operations in other ways.
    found, expected = both()
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # They do something: plain SGD ends elsewhere.
    plain, _ = train(*as_transformation(sharpness_aware(BASE, euclidean_ball(0.0))), 3)
    assert np.max(np.abs(found[0]["k"] - plain["k"])) > 1e-5


IDENTITIES = {
    "gsam 0": ({"descent": surrogate_gap(0.0)}, "sam"),
    "extrapolate 1": ({"descent": extrapolate(1.0)}, "sam"),
    "extrapolate 0": ({"descent": extrapolate(0.0)}, "base"),
    "reuse, every 1": ({"descent": reuse(0.7)}, "sam"),
    "gsam clean 0": ({"descent": surrogate_gap(0.0, minimize_clean=True)}, "base"),
    "never": ({"every": lambda step: False, "descent": reuse(0.7)}, "base"),
    "always": ({"every": lambda step: step >= 0}, "sam"),
    "friendly 0": ({"perturbation": optax.chain(friendly(0.0, 0.9), BALL)}, "sam"),
    "average 0": ({"perturbation": optax.chain(averaged(0.0), BALL)}, "sam"),
    "one step": ({"perturbation": multi_step(1, BALL)}, "sam"),
}


@pytest.mark.short("reuse, every 1", "friendly 0")
@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_bit_for_bit(name):
    options, is_ = IDENTITIES[name]
    options = {"perturbation": BALL, **options}
    expected = euclidean_ball(0.0) if is_ == "base" else BALL
    expected, _ = train(*as_transformation(sharpness_aware(BASE, expected)))
    params, _ = train(*as_transformation(sharpness_aware(BASE, **options)))
    assert_equal(params, expected)


@pytest.mark.short("looksam", "multi_step")
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("random",)])
def test_a_radius_of_0_is_the_base_bit_for_bit(name):
    _, options = METHODS[name]
    params, _ = train(
        *as_transformation(sharpness_aware(BASE, euclidean_ball(0.0), **options))
    )
    step = jax.jit(as_transformation(BASE_WITH_GRAD_FN)[0])
    expected, state = PARAMS, BASE.init(PARAMS)
    for t in range(5):
        expected, state = step(expected, state, batch_at(t))
    if name == "stable":
        assert_close(params, expected)
    else:
        assert_equal(params, expected)


BASE_WITH_GRAD_FN = optax.with_extra_args_support(BASE)


# When: plain steps cost one gradient.


def gradients_taken(tx, steps):
    """Counts the calls of `grad_fn` at run time, step by step."""
    calls = []

    def counted(params):
        jax.debug.callback(lambda: calls.append(None))
        return jax.grad(loss)(params, (X, Y))

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, (X, Y))
        updates, state = tx.update(grads, state, params, grad_fn=counted)
        return optax.apply_updates(params, updates), state

    params, state, counts = PARAMS, tx.init(PARAMS), []
    for _ in range(steps):
        before = len(calls)
        params, state = jax.block_until_ready(step(params, state))
        jax.effects_barrier()
        counts.append(len(calls) - before)
    return counts


def bernoulli(step):
    return jax.random.bernoulli(jax.random.fold_in(jax.random.key(3), step), 0.5)


@pytest.mark.short("late")
@pytest.mark.parametrize(
    ("every", "counts"),
    [
        (3, [1, 0, 0, 1, 0, 0]),
        (lambda step: step >= 4, [0, 0, 0, 0, 1, 1]),
        (lambda step: step < 2, [1, 1, 0, 0, 0, 0]),
        (bernoulli, [int(bernoulli(t)) for t in range(6)]),
    ],
    ids=["every_third", "late", "early", "bernoulli"],
)
def test_plain_steps_take_no_second_gradient(every, counts):
    assert len(set(counts)) == 2
    tx = sharpness_aware(BASE, BALL, descent=reuse(0.5), every=every)
    assert gradients_taken(tx, 6) == counts


@pytest.mark.long
def test_each_method_takes_the_gradients_it_should():
    assert gradients_taken(fsam_optax.gsam(BASE, 0.1, 0.4), 2) == [1, 1]
    assert gradients_taken(fsam_optax.looksam(BASE, 0.1, 0.4, 2), 2) == [1, 0]
    assert gradients_taken(fsam_optax.friendly_sam(BASE, 0.1), 2) == [1, 1]
    assert gradients_taken(fsam_optax.msam(BASE, 0.1), 2) == [0, 0]
    three = sharpness_aware(BASE, multi_step(3, BALL))
    assert gradients_taken(three, 2) == [3, 3]
    bayes = fsam_optax.bsam(0.1, num_data=16, key=jax.random.key(0))
    assert gradients_taken(bayes, 2) == [2, 2]


# Parts and devices: each descends by itself, then all are averaged.

DESCENTS = ("gsam", "wsam", "looksam", "vasso")


@pytest.mark.short("looksam")
@pytest.mark.parametrize("name", DESCENTS)
def test_parts_descend_by_themselves(name):
    perturbation, options = METHODS[name]
    f = value_and_grad(loss, perturbation, micro_batches=4, **options)
    alone = value_and_grad(loss, perturbation, **options)
    _, grads, state = jax.jit(f)(PARAMS, f.init(PARAMS), (X, Y))
    parts = [
        jax.jit(alone)(PARAMS, alone.init(PARAMS), (X[i::4], Y[i::4])) for i in range(4)
    ]
    mean = jax.tree.map(lambda *x: sum(x) / 4, *[part[1] for part in parts])
    assert_close(grads, mean)
    memory = jax.tree.map(lambda *x: sum(x) / 4, *[p[2].descent for p in parts])
    assert_close(state.descent, memory)
    # Once more, with what they remember.
    again = jax.jit(f)(PARAMS, state, (X, Y))[1]
    merged = parts[0][2]._replace(
        descent=state.descent, perturbation=state.perturbation
    )
    parts = [jax.jit(alone)(PARAMS, merged, (X[i::4], Y[i::4]))[1] for i in range(4)]
    assert_close(again, jax.tree.map(lambda *x: sum(x) / 4, *parts))


@pytest.mark.long
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", DESCENTS)
def test_eight_devices_are_eight_parts(name, check_vma):
    perturbation, options = METHODS[name]
    parts = value_and_grad(loss, perturbation, micro_batches=8, **options)
    f = value_and_grad(loss, perturbation, axis_name="data", **options)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    devices = jax.jit(
        jax.shard_map(
            f,
            mesh=mesh,
            in_specs=(jax.P(), jax.P(), DATA),
            out_specs=jax.P(),
            check_vma=check_vma,
        )
    )
    # Parts are cut with a stride: the rows of part i, one after the other.
    order = np.arange(16).reshape(2, 8).T.ravel()
    state, other = parts.init(PARAMS), f.init(PARAMS)
    for _ in range(2):
        _, expected, state = jax.jit(parts)(PARAMS, state, (X, Y))
        _, grads, other = devices(PARAMS, other, (X[order], Y[order]))
        assert_close(grads, expected)
        assert_close(other.descent, state.descent)
        assert_close(other.perturbation, state.perturbation)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["auto", "explicit"])
@pytest.mark.parametrize("name", [*DESCENTS, "multi_step", "friendly"])
def test_sharded_under_jit(name, mode):
    perturbation, options = METHODS[name]
    kind = getattr(jax.sharding.AxisType, mode.capitalize())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    f = value_and_grad(loss, perturbation, **options)
    expected = jax.jit(f)(PARAMS, f.init(PARAMS), (X, Y))
    rows = jax.NamedSharding(mesh, DATA)
    whole = jax.NamedSharding(mesh, jax.P())
    params = jax.device_put(PARAMS, whole)
    found = jax.jit(f)(params, f.init(params), jax.device_put((X, Y), rows))
    # What is orthogonal is a small difference of two gradients.
    assert_close(found, expected, atol=1e-5)


def test_state_like_parameters_is_sharded_like_them():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AUTO,))
    sharding = jax.NamedSharding(mesh, jax.P("model"))
    params = jax.device_put({"w": jnp.ones(16)}, sharding)
    grads = jax.device_put({"w": jnp.arange(16.0)}, sharding)
    for tx in (
        reuse(0.5),
        friendly(1.0, 0.9),
        averaged(0.9),
        displaced(optax.sgd(0.1, momentum=0.9), BALL),
        fsam_optax.bsam(0.1, num_data=16, key=jax.random.key(0)),
    ):
        tx = optax.with_extra_args_support(tx)
        update = jax.jit(
            functools.partial(
                tx.update, clean_grads=grads, eps=grads, grad_fn=lambda p: p
            )
        )
        state = tx.init(params)
        for made in (state, update(params, state, params)[1]):
            for leaf in jax.tree.leaves(made):
                if leaf.shape == (16,):
                    assert leaf.sharding.is_equivalent_to(sharding, 1)


# Bayesian SAM on parts.


def test_bayesian_sam_on_parts_and_devices_is_the_mean_by_hand(x64):
    key = jax.random.PRNGKey(5)
    tx = fsam_optax.bsam(
        0.1, 0.3, num_data=4, key=key, b2=0.9, init_precision=4.0, axis_name="data"
    )
    params = jax.tree.map(lambda w: w.astype("float64"), PARAMS)
    x, y = X.astype("float64"), Y.astype("float64")
    parts = x.reshape(8, 2, 3), y.reshape(8, 2, 2)
    state = tx.init(params)

    def update(part):
        grad_fn = jax.grad(lambda p: loss(p, part))
        return tx.update(params, state, params, grad_fn=grad_fn)

    found = jax.jit(jax.vmap(update, axis_name="data", out_axes=None))(parts)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    on_devices = jax.shard_map(update, mesh=mesh, in_specs=DATA, out_specs=jax.P())
    assert_close(jax.jit(on_devices)((x, y)), found, rtol=1e-12)

    @jax.jit
    def by_hand(key, part):
        draws = jax.random.split(key, 3)
        noisy = {
            n: params[n] + jax.random.normal(draws[j + 1], params[n].shape) / 4
            for j, n in enumerate(("b", "k"))
        }
        h = jax.grad(loss)(noisy, part)
        return h, jax.grad(loss)({n: params[n] + 0.3 * h[n] / 4 for n in h}, part)

    keys = jax.random.split(key, 9)
    q_mean, spread = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for i in range(8):
        h, q = jax.tree.map(np.asarray, by_hand(keys[i], (parts[0][i], parts[1][i])))
        q_mean = {n: q_mean[n] + q[n] / 8 for n in q}
        spread = {n: spread[n] + 2 * np.abs(h[n]) / 8 for n in h}
    for n in params:
        m = 0.1 * (q_mean[n] + 5e-4 * params[n])
        np.testing.assert_allclose(found[0][n], -0.1 * m / 4, rtol=1e-10)
        s = 0.9 * 4 + 0.1 * (spread[n] + 0.1 + 5e-4)
        np.testing.assert_allclose(found[1].precision[n], s, rtol=1e-10)
    assert_equal(found[1].key, keys[8])


@pytest.mark.short("obj_fn")
@pytest.mark.parametrize("name", ["value_fn", "obj_fn"])
def test_bayesian_sam_takes_the_loss_in_place_of_its_gradient(name):
    tx = fsam_optax.bsam(0.1, num_data=16, key=jax.random.key(0))
    state = tx.init(PARAMS)

    def of_batch(p):
        return loss(p, (X, Y))

    expected = tx.update(PARAMS, state, PARAMS, grad_fn=jax.grad(of_batch))
    assert_equal(tx.update(PARAMS, state, PARAMS, **{name: of_batch}), expected)
    with pytest.raises(TypeError, match="must return the loss, one number"):
        tx.update(PARAMS, state, PARAMS, **{name: lambda p: p["k"]})


def test_bayesian_sam_skips_what_is_not_finite():
    tx = fsam_optax.bsam(0.1, num_data=16, key=jax.random.key(0))
    state = tx.init(PARAMS)

    def broken(params):
        return jax.tree.map(lambda w: w * jnp.nan, params)

    updates, after = tx.update(PARAMS, state, PARAMS, grad_fn=broken)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(after.precision, state.precision)
    assert_equal(after.momentum, state.momentum)
    assert (int(after.count), int(after.skipped)) == (1, 1)
    with pytest.raises(TypeError, match="grad_fn"):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(TypeError, match="key"):
        fsam_optax.bsam(0.1, num_data=16, key=0)


# One gradient a step, with clean parameters in the caller's hands.


def far_from_zero(dtype):
    """Weights that are not small beside eps, of which w + eps gives w back exactly."""
    return jax.tree.map(lambda w: (jnp.sign(w) * (abs(w) + 1)).astype(dtype), PARAMS)


@pytest.mark.short("float32")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_displaced_equals_lagged_bit_for_bit(dtype):
    ascent = optax.chain(optax.trace(0.9), optax.scale(-1.0), euclidean_ball(0.3))
    tx = displaced(BASE, ascent)
    f = value_and_grad(loss, ascent, lagged=True)
    held = far_from_zero(dtype)
    params, clean = held, held
    state, lagged, base = tx.init(held), f.init(held), BASE.init(held)
    # Not jitted: two programs may round the loss in two ways.
    gradient = jax.grad(loss)
    for t in range(6):
        batch = batch_at(t)
        updates, state = tx.update(gradient(params, batch), state, params)
        value = loss(params, batch)
        params = optax.apply_updates(params, updates)
        found, grads, lagged = f(clean, lagged, batch)
        updates, base = BASE.update(grads, base, clean)
        clean = optax.apply_updates(clean, updates)
        assert_equal(found, value)
        assert_equal(eval_params(state, params), clean)
        assert_equal(state.base, base)
        assert_equal(state.perturbation, lagged.perturbation)
    assert optax.tree.norm(lagged.displacement) == pytest.approx(0.3, rel=1e-6)


def test_lagged_takes_one_eps_of_the_mean_over_parts_and_devices():
    f = value_and_grad(loss, BALL, lagged=True)
    state = f.init(PARAMS)
    _, _, state = f(PARAMS, state, (X, Y))
    value, expected, after = jax.jit(f)(PARAMS, state, (X, Y))
    parts = value_and_grad(loss, BALL, lagged=True, micro_batches=4)
    assert_close(jax.jit(parts)(PARAMS, state, (X, Y)), (value, expected, after))
    over = value_and_grad(loss, BALL, lagged=True, axis_name="data", micro_batches=2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    for check_vma in (True, False):
        devices = jax.shard_map(
            over,
            mesh=mesh,
            in_specs=(jax.P(), jax.P(), DATA),
            out_specs=jax.P(),
            check_vma=check_vma,
        )
        found = jax.jit(devices)(PARAMS, state, (X, Y))
        assert_close(found, (value, expected, after))


def test_lagged_value_and_aux_are_those_at_the_displaced_point():
    def with_aux(params, batch):
        return loss(params, batch), params["b"]

    f = value_and_grad(with_aux, BALL, lagged=True, has_aux=True)
    state = f.init(PARAMS)
    (_, aux), _, state = f(PARAMS, state, (X, Y))
    assert_equal(aux, PARAMS["b"])
    (value, aux), grads, _ = f(PARAMS, state, (X, Y))
    point = jax.tree.map(jnp.add, PARAMS, state.displacement)
    assert_equal(aux, point["b"])
    expected = jax.value_and_grad(loss)(point, (X, Y))
    assert_close((value, grads), expected)
    assert np.max(np.abs(aux - PARAMS["b"])) > 1e-3
    # A stack of parts is merged as elsewhere.
    mean = value_and_grad(
        with_aux,
        BALL,
        lagged=True,
        has_aux=True,
        micro_batches=2,
        merge_aux=lambda aux: aux.mean(0),
    )
    (_, aux), _, _ = mean(PARAMS, state, (X, Y))
    assert_close(aux, point["b"])


@pytest.mark.parametrize(
    "option",
    [
        {"descent": surrogate_gap(0.4)},
        {"every": 2},
        {"every": lambda step: step > 2},
        {"functional": True},
        {"empirical_fisher": True},
    ],
)
def test_lagged_refuses_what_needs_a_gradient_at_w(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}`.*lagged"):
        value_and_grad(loss, BALL, lagged=True, **option)


def test_lagged_measures_what_there_is_without_a_gradient_at_w():
    f = value_and_grad(loss, BALL, lagged=True)
    state = f.init(PARAMS)
    for _ in range(2):
        point = jax.tree.map(jnp.add, PARAMS, state.displacement)
        _, grads, state = f(PARAMS, state, (X, Y))
    found = fsam_optax.metrics(state)
    assert not {"grad_norm", "gradient_cosine", "sharpness"} & found.keys()
    np.testing.assert_allclose(
        found["perturbed_grad_norm"], optax.tree.norm(grads), rtol=1e-5
    )
    eps = jax.tree.map(jnp.subtract, point, PARAMS)
    np.testing.assert_allclose(
        found["perturbation_norm"], optax.tree.norm(eps), rtol=1e-5
    )
    assert found["leaf_perturbation_norms"].keys() == PARAMS.keys()
    off = value_and_grad(loss, BALL, lagged=True, metrics=False)
    assert off.init(PARAMS).metrics is None


def test_lagged_costs_one_gradient():
    f = value_and_grad(loss, BALL, lagged=True)
    explained = f.explain(PARAMS, (X, Y))
    assert [x.name for x in explained.passes] == ["at w + eps", "perturbation"]
    assert explained.passes[0].cost == 1.0


def test_lagged_keeps_what_is_not_finite_out_of_its_memory():
    ascent = optax.chain(averaged(0.9), BALL)
    f = value_and_grad(loss, ascent, lagged=True)
    _, _, state = f(PARAMS, f.init(PARAMS), (X, Y))
    _, _, after = f(PARAMS, state, (X * jnp.nan, Y))
    assert_equal(after.displacement, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(after.perturbation[0], state.perturbation[0])
    assert int(optax.tree.get(after, "skipped")) == 1


# From a checkpoint in the middle of a cycle.


@pytest.mark.short("bsam-flax")
@pytest.mark.parametrize("how", ["pickle", "flax"])
@pytest.mark.parametrize("name", ["looksam", "friendly_sam", "msam", "bsam"])
def test_resumes_bit_for_bit(name, how):
    tx = {
        "looksam": fsam_optax.looksam(BASE, 0.1, 0.7, 5),
        "friendly_sam": fsam_optax.friendly_sam(BASE, 0.1),
        "msam": fsam_optax.msam(BASE, 0.1),
        "bsam": fsam_optax.bsam(0.1, num_data=16, key=jax.random.key(0)),
    }[name]
    update, state = as_transformation(tx)
    expected = train(update, state, 7)
    params, state = train(update, state, 3)
    if how == "pickle":
        params, state = pickle.loads(pickle.dumps(jax.device_get((params, state))))
    else:
        stored = flax.serialization.to_bytes((params, state))
        params, state = flax.serialization.from_bytes((PARAMS, tx.init(PARAMS)), stored)
    assert_equal(train(update, state, 4, params, start=3), expected)


# As others call it.


@pytest.mark.short("value_fn")
@pytest.mark.parametrize("name", ["value_fn", "obj_fn"])
def test_a_loss_in_place_of_its_gradient(name):
    tx = fsam_optax.gsam(BASE, 0.1, 0.4)
    expected, _ = train(*as_transformation(tx), steps=3)

    def update(params, state, batch):
        objective = functools.partial(loss, batch=batch)
        grads = jax.grad(objective)(params)
        updates, state = tx.update(grads, state, params, **{name: objective})
        return optax.apply_updates(params, updates), state

    assert_equal(train(update, tx.init(PARAMS), 3)[0], expected)


@pytest.mark.long
def test_optimistix():
    optimistix = pytest.importorskip("optimistix")
    tx = fsam_optax.gsam(optax.sgd(0.1), 0.05, 0.4)
    solver = optimistix.OptaxMinimiser(tx, rtol=1e-3, atol=1e-3)
    found = optimistix.minimise(
        lambda w, _: jnp.sum((w - 3.0) ** 2),
        solver,
        jnp.zeros(2),
        max_steps=200,
        throw=False,
    )
    assert_close(found.value, jnp.full(2, 3.0), atol=0.1)


@pytest.mark.long
def test_numpyro():
    """SVI passes the loss alone: gradients come from the oracle, in an adapter."""
    numpyro = pytest.importorskip("numpyro")
    tx = fsam_optax.msam(optax.adam(0.05), 0.05)
    optimizer = numpyro.optim.optax_to_numpyro(tx)

    def model(data):
        mean = numpyro.sample("mean", numpyro.distributions.Normal(0, 10))
        numpyro.sample("obs", numpyro.distributions.Normal(mean, 1), obs=data)

    guide = numpyro.infer.autoguide.AutoDelta(model)
    svi = numpyro.infer.SVI(model, guide, optimizer, numpyro.infer.Trace_ELBO())
    data = jnp.full(100, 2.0)
    result = svi.run(jax.random.key(0), 400, data, progress_bar=False)
    assert abs(float(result.params["mean_auto_loc"]) - 2) < 0.2

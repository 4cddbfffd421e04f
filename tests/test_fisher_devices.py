"""Losses with keys and estimators on eight devices: as on one, and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import fsam_optax as fsam
from fsam_optax._common.mapped_axes import vary
from fsam_optax._fisher import dataset
from fsam_optax._fisher.negative_log_likelihood import total_weight
from fsam_optax._fisher.one_pass import value_grad_and_fisher


# Its name before jax 0.8.
set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 4)).astype("float32")
Y = RNG.integers(-1, 3, size=16)
W = RNG.uniform(0, 2, size=16).astype("float32")
PARAMS = {
    "in": RNG.normal(size=(4, 8)).astype("float32"),
    "out": RNG.normal(size=(8, 3)).astype("float32"),
}
KEY = jax.random.key(0)
SCALE = np.array([1.0, 2.0, 0.5], "float32")


def model(params, x, key, scale):
    h = jnp.tanh(x @ params["in"])
    keep = jax.random.bernoulli(key, 0.5, h.shape)
    return jnp.where(keep, 2 * h, 0) @ params["out"] * scale[None], {"h": h}


NLL = fsam.negative_log_likelihood(model, fsam.categorical, has_aux=True)


def close(a, b):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), a, b
    )


def everything(params, batch, scale):
    extra = {"loss_args": (KEY, scale)}
    i2 = fsam.fisher_i2(NLL, key=KEY)
    return {
        "loss": jax.value_and_grad(NLL, has_aux=True)(params, batch, KEY, scale),
        "one pass": value_grad_and_fisher(NLL, params, batch, (KEY, scale), {}),
        "exact": fsam.diagonal(fsam.fisher_exact(NLL), params, batch, **extra),
        "i2": fsam.diagonal(i2, params, batch, **extra),
        "masked": fsam.diagonal(
            fsam.fisher_exact(NLL),
            params,
            batch,
            mask={"in": False, "out": True},
            **extra,
        ),
    }


@functools.cache
def on_one_device():
    return jax.jit(everything)(PARAMS, (X, Y, W), SCALE)


@pytest.mark.long
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_give_what_one_device_gives(kind):
    if kind == AxisType.Explicit and jax.__version_info__ < (0, 8):
        pytest.skip("jax 0.7 selects from sharded arrays by a sharded array only")
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))

    def put(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, P(*spec)))

    with set_mesh(mesh):
        found = jax.jit(everything)(put(PARAMS), put((X, Y, W), "d"), put(SCALE))
        estimator = fsam.fisher_exact(NLL)
        data = [(X, Y, W), (X[:8], Y[:8], W[:8])]  # The last one is filled up.
        diagonal = fsam.dataset_diagonal(
            estimator, put(PARAMS), put(data, "d"), loss_args=(KEY, put(SCALE))
        )
    close(found, on_one_device())
    alone = fsam.dataset_diagonal(estimator, PARAMS, data, loss_args=(KEY, SCALE))
    close(diagonal, alone)
    for aux in (found["loss"][0][1], found["one pass"][0][1]):
        assert aux["h"].sharding.spec[0] == "d"


@pytest.mark.long
def test_devices_weighed_by_their_divisors_are_the_whole():
    """The keys are folded with the device, as the front ends do."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    nll = fsam.negative_log_likelihood(
        lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"], fsam.categorical
    )

    def of_device(params, batch):
        params = vary(params, "d")
        (value, _), grads, fisher = value_grad_and_fisher(nll, params, batch, (), {})
        exact = fsam.diagonal(fsam.fisher_exact(nll), params, batch)
        total = total_weight(nll, params, batch, (), {})
        return jax.tree.map(
            lambda x: jax.lax.psum(total * x, "d") / jax.lax.psum(total, "d"),
            (value, grads, fisher, exact),
        )

    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    (value, _), grads, fisher = value_grad_and_fisher(nll, PARAMS, (X, Y, W), (), {})
    exact = fsam.diagonal(fsam.fisher_exact(nll), PARAMS, (X, Y, W))
    close(jax.jit(mapped)(PARAMS, (X, Y, W)), (value, grads, fisher, exact))


@pytest.mark.short("AxisType.Auto")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_state_is_sharded_as_the_parameter_is(kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    sharding = NamedSharding(mesh, P("d"))

    def linear(w, x):
        return x @ w

    estimators = {
        "refresh_every": fsam.refresh_every(
            2, fsam.fisher_exact(linear, fsam.gaussian())
        ),
        "standard_error": fsam.fisher_i1(
            linear, fsam.gaussian(), key=KEY, standard_error=True
        ),
    }
    with set_mesh(mesh):
        w = jax.device_put(jnp.ones((8, 4)), sharding)
        x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P()))
        for estimator in estimators.values():
            state = estimator.init(w)

            @jax.jit
            def update(state, w, x, estimator=estimator):
                return estimator.update(None, state, w, batch=(x, None))

            diagonal, after = update(state, w, x)
            leaves = jax.tree.leaves((state, after))
            like_w = [leaf for leaf in leaves if leaf.shape == w.shape]
            assert like_w
            for leaf in (*like_w, diagonal):
                assert leaf.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.short("AxisType.Auto")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_short_last_batch_stays_on_its_devices(kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    rows = NamedSharding(mesh, P("d"))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    nll = fsam.negative_log_likelihood(
        lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"], fsam.categorical
    )
    whole = (np.tile(X, (2, 1))[:24], np.tile(Y, 2)[:24])
    batches = [
        jax.tree.map(lambda x, s=s: x[s], whole) for s in (slice(16), slice(16, 24))
    ]
    batches = [jax.device_put(batch, rows) for batch in batches]
    batch, weights = dataset._filled(batches[1], dataset._form_of(batches[0]))
    assert weights is not None and weights.sum() == 8
    assert all(x.sharding.is_equivalent_to(rows, x.ndim) for x in batch)
    compiled = getattr(dataset._step, "_cache_size")  # noqa: B009
    before = compiled()
    estimator = fsam.fisher_empirical(nll)
    found = fsam.dataset_diagonal(estimator, params, batches)
    if kind == AxisType.Auto:
        assert compiled() == before + 1
    expected = jax.jit(functools.partial(fsam.diagonal, estimator))(PARAMS, whole)
    close(found, expected)
    if kind == AxisType.Auto:
        # Parameters and a last batch that lie on no mesh are taken along.
        found = fsam.dataset_diagonal(
            estimator, PARAMS, [batches[0], jax.tree.map(np.asarray, batches[1])]
        )
        assert compiled() == before + 2
        close(found, expected)
    traced = jax.jit(lambda *batches: fsam.dataset_diagonal(estimator, params, batches))
    close(traced(*batches), expected)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 8), reason="jax 0.7 says it in other words"
)
def test_a_model_that_names_explicit_axes_is_refused_with_advice():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))

    def apply_fn(params, x):
        h = jnp.dot(x, params["in"], out_sharding=P("d"))
        return jnp.dot(jnp.tanh(h), params["out"], out_sharding=P("d"))

    nll = fsam.negative_log_likelihood(apply_fn, fsam.categorical)
    estimator = fsam.fisher_empirical(nll)
    with set_mesh(mesh):
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        batch = jax.device_put((X, Y), NamedSharding(mesh, P("d")))
        assert jnp.isfinite(jax.jit(nll)(params, batch))
        with pytest.raises(TypeError, match="same model without `out_sharding=`"):
            jax.eval_shape(lambda p, b: fsam.diagonal(estimator, p, b), params, batch)


def test_a_model_that_divides_the_batch_by_hand_is_refused_with_advice():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    by_hand = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=P("d"), out_specs=P("d"))

    def apply_fn(params, x):
        return by_hand(x @ params["in"]) @ params["out"]

    nll = fsam.negative_log_likelihood(apply_fn, fsam.categorical)
    estimator = fsam.fisher_empirical(nll)
    with pytest.raises(TypeError, match="the model without the `shard_map`"):
        jax.eval_shape(lambda p: fsam.diagonal(estimator, p, (X, Y)), PARAMS)

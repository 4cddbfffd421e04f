"""The engine on many devices: what they exchange and compute, in the compiled program.

Nothing is run here; `test_devices.py` and `test_engine.py` compare the numbers.
"""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from fsam_optax import (
    categorical,
    clipped_gradient,
    dataset_diagonal,
    diagonal,
    explain,
    fisher_empirical,
    fisher_exact,
    fisher_gnb,
    fisher_hutchinson,
    fisher_i1,
    fisher_i2,
    negative_log_likelihood,
    per_example_norms,
    power_sums,
)
from fsam_optax._fisher.one_pass import value_grad_and_fisher


# More tokens than one CPU alone takes without matrix products.
EXAMPLES, WIDTH, CLASSES, TOKENS = 64, 8, 3, 20
KEY = jax.random.key(0)
ESTIMATORS = {
    "empirical": fisher_empirical,
    "exact": fisher_exact,
    "i1": lambda *model: fisher_i1(*model, key=KEY),
    "exact, by column": lambda *model: fisher_exact(*model, chunk_bytes=1),
    "hutchinson": lambda *model: fisher_hutchinson(*model, key=KEY),
    "hutchinson, by draw": lambda *model: fisher_hutchinson(
        *model, key=KEY, num_samples=5, standard_error=True, chunk_bytes=1
    ),
    "gnb with error": lambda *model: fisher_gnb(*model, key=KEY, standard_error=True),
    "i2": lambda *model: fisher_i2(*model, key=KEY, hessian="hutchinson"),
    "i2, exact": lambda *model: fisher_i2(*model, key=KEY),
}


@pytest.fixture
def count(monkeypatch):
    """What one device does in a program compiled for given shapes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    module = importlib.import_module("compiled")

    def counted(fn, *args):
        return module.count(jax.jit(fn).lower(*args).compile().as_text())

    return counted


def convolutional(params, x):
    for kernel in params["kernels"]:
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.tanh(x)
    return jnp.mean(x, axis=(1, 2)) @ params["dense"]


def transformer(params, x):
    """Layers in a scan; weights shared by the tokens, and one table used twice."""

    def layer(x, weights):
        keys = jnp.einsum("btc,cd->btd", x, weights["keys"])
        mixed = jax.nn.softmax(jnp.einsum("bsd,btd->bst", keys, keys))
        x = x + jnp.einsum("bst,btd->bsd", mixed, keys)
        return x + jnp.tanh(jnp.einsum("btc,cd->btd", x, weights["dense"])), None

    x, _ = jax.lax.scan(layer, jnp.einsum("btc,cd->btd", x, params["in"]), params["l"])
    return jnp.einsum("btd,cd->btc", x, params["in"][:CLASSES])


def linear(params, x):
    return jnp.einsum("btc,cd->btd", x, params["w"])


def shapes(mesh, batch, weights):
    """Returns each model, its parameters and a batch, placed on the mesh."""

    def placed(shape, spec, dtype=jnp.float32):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def weight(*shape):
        spec = P(*(None,) * (len(shape) - 1), weights) if weights else P()
        return placed(shape, spec)

    return {
        "convolutional": (
            convolutional,
            {
                "kernels": [weight(3, 3, 3, WIDTH), weight(3, 3, WIDTH, WIDTH)],
                "dense": placed((WIDTH, CLASSES), P()),
            },
            (
                placed((EXAMPLES, 16, 16, 3), P(batch)),
                placed((EXAMPLES,), P(batch), jnp.int32),
            ),
        ),
        "transformer": (
            transformer,
            {
                "in": weight(WIDTH, WIDTH),
                "l": {
                    "keys": weight(4, WIDTH, WIDTH),
                    "dense": weight(4, WIDTH, WIDTH),
                },
            },
            (
                placed((EXAMPLES, TOKENS, WIDTH), P(batch)),
                placed((EXAMPLES, TOKENS), P(batch), jnp.int32),
            ),
        ),
    }


def mesh(kind, sizes=(8,), names=("data",)):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def alone(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def estimate(name, model):
    estimator = ESTIMATORS[name](model, categorical)
    return lambda params, batch: diagonal(estimator, params, batch)


@pytest.mark.short("transformer-AxisType.Explicit")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("model", ["convolutional", "transformer"])
def test_data_parallel_work_is_divided_and_only_sums_are_exchanged(count, model, kind):
    if (model, kind) == ("convolutional", AxisType.Explicit):
        if jax.__version_info__ < (0, 10):
            pytest.skip("jax 0.7 has no gradient of convolutions on Explicit axes")
    model, params, batch = shapes(mesh(kind), "data", None)[model]
    fn = estimate("empirical", model)
    whole = count(fn, alone(params), alone(batch))
    each = count(fn, params, batch)
    gradient = count(
        jax.grad(negative_log_likelihood(model, categorical)), params, batch
    )
    assert each["products"] <= 1.02 * whole["products"] / 8
    assert set(each) == {"products", "all-reduce"}
    # Squares are reduced as gradients are, and the sum of the weights once.
    assert each["all-reduce"] <= gradient["all-reduce"] + 8


def with_nll(fn):
    return lambda model: (
        lambda params, batch: fn(
            negative_log_likelihood(model, categorical), params, batch
        )
    )


PASSES = {name: functools.partial(estimate, name) for name in ESTIMATORS} | {
    "one pass": with_nll(lambda nll, p, b: value_grad_and_fisher(nll, p, b, (), {})),
    "norms": with_nll(per_example_norms),
    "clipped": with_nll(lambda nll, p, b: clipped_gradient(nll, p, b, max_norm=0.1)),
    "data set": with_nll(lambda nll, p, b: dataset_diagonal(fisher_exact(nll), p, [b])),
}
# How often all parameters are added up over devices, if not once.
REDUCED = {"i2": 2, "i2, exact": 2, "one pass": 2, "norms": 0}


@pytest.mark.short("i2, exact", "one pass", "norms")
@pytest.mark.parametrize("name", PASSES)
def test_every_pass_divides_its_work_and_reduces_once(count, name):
    """However many cotangents an example has, and however few there are at a time."""
    model, params, batch = shapes(mesh(AxisType.Auto), "data", None)["convolutional"]
    fn = PASSES[name](model)
    whole = count(fn, alone(params), alone(batch))
    each = count(fn, params, batch)
    assert each["products"] <= 1.05 * whole["products"] / 8
    sums = REDUCED.get(name, 1) * sum(x.size * 4 for x in jax.tree.leaves(params))
    assert each.pop("all-reduce", 0) <= sums + 16
    assert set(each) == {"products"}


def test_sums_that_are_large_stay_sharded():
    """Rather than to exchange them once, which would need them whole on each device."""
    devices = mesh(AxisType.Auto)

    def placed(shape, *spec):
        sharding = NamedSharding(devices, P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    weight, x = placed((4096, 4200), None, "data"), placed((8, 4096), "data")
    estimator = fisher_hutchinson(
        lambda w, x: x @ w, categorical, key=KEY, num_samples=3, chunk_bytes=1
    )
    fn = jax.jit(lambda w, x: diagonal(estimator, w, (x, None)))
    used = fn.lower(weight, x).compile().memory_analysis()
    held = getattr(used, "temp_size_in_bytes")  # noqa: B009
    assert held < weight.size * 4 / 2


def test_products_multiplied_out_are_reduced_once(count):
    """Each pair of a weight's few positions is a product of its own."""
    _, params, (x, labels) = shapes(mesh(AxisType.Auto), "data", None)["transformer"]
    x, labels = (v.update(shape=(EXAMPLES, 2, *v.shape[2:])) for v in (x, labels))
    fn = estimate("empirical", linear)
    params, batch = {"w": params["in"]}, (x, labels)
    zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), (params, batch))
    rules = {leaf.rule for leaf in explain(linear, categorical, *zeros)}
    assert rules == {"sum of outer products"}
    each = count(fn, params, batch)
    assert each["all-reduce"] <= 4 * WIDTH**2 + 16


@pytest.mark.short("AxisType.Auto")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_columns_are_summed_up_before_devices_are(count, kind):
    model, params, batch = shapes(mesh(kind), "data", None)["transformer"]
    if kind == AxisType.Explicit:  # No shardings can be named within an estimator.
        model, params, batch = linear, {"w": params["in"]}, batch
    each = count(estimate("exact, by column", model), params, batch)
    assert each["all-reduce"] <= sum(x.size * 4 for x in jax.tree.leaves(params)) + 16
    assert set(each) == {"products", "all-reduce"}


@pytest.mark.short("data-model-convolutional", "batch0-data-convolutional")
@pytest.mark.parametrize("model", ["convolutional", "transformer"])
@pytest.mark.parametrize(
    "batch, weights", [(("data", "model"), "data"), ("data", "model")]
)
def test_sharded_parameters_are_gathered_as_by_the_gradient(
    count, model, batch, weights
):
    """Fully sharded, and tensor-parallel on the second axis of the mesh."""
    devices = mesh(AxisType.Auto, (4, 2), ("data", "model"))
    model, params, batch = shapes(devices, batch, weights)[model]
    gradient = count(
        jax.grad(negative_log_likelihood(model, categorical)), params, batch
    )
    squares = count(estimate("empirical", model), params, batch)
    for kind in "all-gather", "all-reduce", "collective-permute":
        assert squares.get(kind, 0) <= gradient.get(kind, 0) + 8, (gradient, squares)
    # The sums themselves may change their sharding; activations, which are larger, not.
    sums = sum(x.size * 4 for x in jax.tree.leaves(params)) / 2
    assert squares.get("all-to-all", 0) <= gradient.get("all-to-all", 0) + sums
    assert squares["products"] <= 1.1 * gradient["products"]


@pytest.mark.short("empirical")
@pytest.mark.parametrize("name", ["empirical", "exact, by column", "one pass", "norms"])
def test_activations_that_a_model_shards_by_name(count, name):
    """Data parallel: an example is a batch of one there, which no device is to have."""
    devices = mesh(AxisType.Auto)
    model, params, batch = shapes(devices, "data", None)["transformer"]

    def constrained(params, x):
        def placed(x):
            rows = NamedSharding(devices, P("data", None, None))
            return jax.lax.with_sharding_constraint(x, rows)

        return placed(jnp.tanh(placed(model(params, placed(x)))))

    each = count(PASSES[name](constrained), params, batch)
    whole = count(PASSES[name](model), alone(params), alone(batch))
    assert each["products"] <= 1.05 * whole["products"] / 8
    assert not {"all-gather", "all-to-all", "collective-permute"} & set(each)
    sums = REDUCED.get(name, 1) * sum(x.size * 4 for x in jax.tree.leaves(params))
    assert each.get("all-reduce", 0) <= sums + 16


@pytest.mark.short("8")
@pytest.mark.parametrize("examples", [8, 24])
def test_weights_that_are_gathered_where_they_are_used(count, examples):
    """Fully sharded as in training: also with one example on a device."""
    devices = mesh(AxisType.Auto)
    _, params, batch = shapes(devices, "data", "data")["transformer"]
    batch = jax.tree.map(lambda x: x.update(shape=(examples, *x.shape[1:])), batch)

    def model(params, x):
        whole = NamedSharding(devices, P())
        gathered = jax.tree.map(
            lambda w: jax.lax.with_sharding_constraint(w, whole), params
        )
        return transformer(gathered, x)

    gradient = count(
        jax.grad(negative_log_likelihood(model, categorical)), params, batch
    )
    squares = count(estimate("empirical", model), params, batch)
    assert squares["products"] <= 1.02 * gradient["products"]
    columns = count(estimate("exact, by column", model), params, batch)
    for found in squares, columns:
        assert found["all-gather"] <= gradient["all-gather"]
        assert found["all-reduce"] <= gradient["all-reduce"] + 8
        assert not {"all-to-all", "collective-permute"} & set(found)


@pytest.mark.short("AxisType.Auto")
@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_that_the_mesh_does_not_divide(kind):
    """Twelve examples over four devices of eight, in steps of any size."""
    devices = mesh(kind, (4, 2), ("data", "model"))
    rng = np.random.default_rng(0)
    w, x = (np.asarray(rng.normal(size=s), np.float32) for s in ((4, 3), (12, 5, 4)))
    expected = jnp.sum(jnp.einsum("ntc,ntd->ncd", x, jnp.tanh(x) @ w) ** 2, 0)

    def squares(weights, x, chunk_bytes):
        (total,) = power_sums(
            lambda v, x: x @ v,
            weights,
            x,
            lambda h, x: (jnp.tanh(x) @ w)[None],
            x,
            chunk_bytes=chunk_bytes,
        )
        return total

    placed = jax.device_put(x, NamedSharding(devices, P("data")))
    weights = jax.device_put(w, NamedSharding(devices, P()))
    for chunk_bytes in None, 1, 100, 10**6:
        found = jax.jit(squares, static_argnums=2)(weights, placed, chunk_bytes)
        np.testing.assert_allclose(found, expected, rtol=1e-5)

"""The engine against per-example gradients formed in full."""

import contextlib
import warnings

import engine_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import sparse
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from fsam_optax._engine import (
    check_separable,
    explain,
    explain_loss,
    loss_power_sums,
    power_sums,
)
from fsam_optax._engine.sums import looped, Steps


POWERS = (1, 2, 4)
B = 5

jitted = jax.jit(power_sums, static_argnums=(0, 3), static_argnames=("powers",))


# By NumPy: nothing is compiled where the tests are only collected.
def normal(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return np.asarray(x, jnp.result_type(float))


def tokens(*shape, vocabulary=7):
    x = np.random.default_rng(0).integers(0, vocabulary, shape)
    return jnp.asarray(x.astype(jnp.result_type(int)))


PAIRS = "sum of outer products"
HIGHEST = lax.Precision.HIGHEST

# Programs: name -> (loss of one example, params, batch, the rules they take).

PROGRAMS = {}


def program(params, batch, *rules):
    def add(loss_fn):
        PROGRAMS[loss_fn.__name__] = (loss_fn, params, batch, rules)
        return loss_fn

    return add


MLP = {
    "w0": normal(0, 6, 8) / 2,
    "b0": normal(1, 8) / 2,
    "w1": normal(2, 8, 3) / 2,
    "b1": normal(3, 3) / 2,
}


def mlp(params, x):
    x = jnp.tanh(x @ params["w0"] + params["b0"][None])
    return x @ params["w1"] + params["b1"][None]


@program(MLP, normal(4, B, 6), "outer product", "reduction")
def dense(params, x):
    return jnp.sum(mlp(params, x[None]) ** 2)


@program(MLP, normal(4, B, 7, 6), "shared dense", "reduction")
def shared_dense(params, x):
    return jnp.sum(mlp(params, x) ** 2)


@program(
    {"w": normal(0, 4, 2, 3), "o": normal(1, 2, 3, 4)},
    normal(2, B, 5, 4),
    "shared dense",
)
def dense_with_heads(params, x):
    x = jnp.tanh(jnp.einsum("td,dhk->thk", x, params["w"]))
    return jnp.sum(jnp.einsum("thk,hkd->td", x, params["o"]) ** 2)


@program({"w": normal(0, 3, 4, 2)}, normal(1, B, 3, 4), "outer product")
def batched_product(params, x):
    return jnp.sum(jnp.einsum("hd,hdk->hk", x, params["w"]) ** 2)


@program(
    {"w": normal(0, 4, 4), "unused": jnp.ones((2, 3))},
    normal(1, B, 4),
    "constant",
    PAIRS,
)
def used_twice(params, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"]))


@program(normal(0, 3, 4, 4), normal(1, B, 4), "outer product")
def slices_of_one_parameter(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params[i])
    return jnp.sum(x)


@program(normal(0, 4, 12), normal(1, B, 3, 4), "shared dense")
def parts_of_one_parameter(params, x):
    q, k, v = jnp.split(params, 3, axis=1)
    return jnp.sum(jax.nn.softmax((x @ q) @ (x @ k).T) @ (x @ v))


@program(
    {"table": normal(0, 7, 4), "w": normal(1, 4, 3)},
    tokens(B, 6),
    "embedding",
    "shared dense",
)
def embedding(params, x):
    return jnp.sum(jnp.tanh(params["table"][x] @ params["w"]) ** 2)


@program(normal(0, 7, 4), tokens(B, 6), "embedding + shared dense")
def tied_embedding(params, x):
    return jnp.sum(jnp.tanh(params[x] @ params.T) ** 2)


@program(
    normal(0, 4, 3, 50),
    (tokens(B, 6, vocabulary=54) - 2, normal(1, B, 6, 3)),
    "embedding",
)
def embedding_out_of_bounds(params, example):
    i, x = example
    rows = params.at[:, :, i].get(mode="clip")
    others = params.at[1, :, i].get(mode="fill", fill_value=0.0)
    return jnp.sum(jnp.tanh(rows) * x.T[None]) + 0 * jnp.sum(others)


@program(
    normal(0, 4, 3, 5),
    (tokens(B, 6, vocabulary=9), tokens(B, 6, vocabulary=3)),
    "embedding",
)
def embedding_of_two_indices(params, example):
    i, j = example
    rows = params.at[:, j, i].get(mode="fill", fill_value=0.0)
    return jnp.sum(jnp.tanh(rows) ** 2)


@program(
    {"scale": normal(0, 4), "shift": normal(1, 4), "s": jnp.ones(())},
    normal(2, B, 6, 4),
    "reduction",
)
def layer_norm(params, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3)
    x = x * params["scale"][None] + params["shift"][None]
    return jnp.sum(jnp.tanh(x * params["s"]))


def convolution(spatial, channels, kernel, features, groups=1, **options):
    """Adds a program with one convolution."""
    dims = "DHW"[-len(spatial) :]
    shape = (*kernel, channels // groups, features)

    def loss_fn(w, x):
        y = lax.conv_general_dilated(
            x[None],
            w,
            options.get("strides", (1,) * len(spatial)),
            options.get("padding", "SAME"),
            lhs_dilation=options.get("lhs_dilation"),
            rhs_dilation=options.get("rhs_dilation"),
            feature_group_count=groups,
            dimension_numbers=(f"N{dims}C", f"{dims}IO", f"N{dims}C"),
        )
        return jnp.sum(jnp.tanh(y) ** 2)

    return (
        loss_fn,
        normal(0, *shape) / 3,
        normal(1, 3, *spatial, channels),
        ("convolution",),
    )


PROGRAMS |= {
    "conv_1d_strided": convolution((9,), 4, (3,), 5, strides=(2,)),
    "conv_2d": convolution((6, 5), 3, (3, 2), 4),
    "conv_2d_strided": convolution((9, 8), 4, (3, 3), 5, strides=(2, 3)),
    "conv_2d_valid_dilated": convolution(
        (9, 8), 2, (3, 2), 3, padding="VALID", rhs_dilation=(2, 1)
    ),
    "conv_2d_grouped": convolution((5, 6), 4, (3, 3), 6, groups=2, strides=(1, 2)),
    "conv_2d_depthwise": convolution((5, 6), 4, (3, 3), 8, groups=4),
    "conv_2d_transposed": convolution(
        (4, 5), 3, (3, 3), 2, padding=((1, 2), (0, 1)), lhs_dilation=(2, 2)
    ),
    "conv_2d_pointwise": convolution((4, 5), 3, (1, 1), 2, padding=((0, -1), (-1, 0))),
    "conv_2d_patches": convolution(
        (8, 8), 3, (4, 4), 5, padding="VALID", strides=(4, 4)
    ),
    "conv_3d": convolution((4, 5, 3), 2, (2, 3, 3), 3, strides=(2, 1, 1)),
}


@program(normal(0, 3, 3, 2, 4), normal(1, 3, 5, 6, 2), "convolution")
def conv_channels_first(w, x):
    y = lax.conv_general_dilated(
        jnp.moveaxis(x, -1, 0)[None],
        jnp.transpose(w, (3, 2, 0, 1)),
        (1, 1),
        "SAME",
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    return jnp.sum(jnp.tanh(y) ** 2)


@program(normal(0, 3, 3, 2, 4), normal(1, 3, 6, 6, 2), "convolution")
def convolution_under_windows_that_overlap(w, x):
    y = lax.conv_general_dilated(
        x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    window = (1, 3, 3, 1)
    return jnp.sum(
        lax.reduce_window(y, 0.0, lax.add, window, (1, 1, 1, 1), "SAME") ** 2
    )


POOLED = {"w": normal(0, 3, 3, 2, 4), "b": normal(2, 4)}


@program(POOLED, normal(1, 3, 6, 6, 2), "convolution", "reduction")
def convolution_under_average_pooling(p, x):
    y = lax.conv_general_dilated(
        x[None], p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jnp.maximum(y + p["b"].reshape(1, 1, 1, -1), 0)
    window = (1, 2, 2, 1)
    return jnp.sum(
        jnp.tanh(lax.reduce_window(y, 0.0, lax.add, window, window, "VALID"))
    )


RNN = {"w": normal(0, 4, 4), "u": normal(1, 3, 4), "b": normal(2, 4)}


@program(RNN, normal(3, B, 6, 3), "shared dense", "reduction")
def recurrent(params, xs):
    def step(h, x):
        h = jnp.tanh(h @ params["w"] + x @ params["u"] + params["b"])
        return h, h

    _, hs = lax.scan(jax.checkpoint(step), jnp.zeros(4), xs)
    return jnp.sum(hs**2)


@program(
    {"table": normal(0, 7, 4), "k": normal(1, 3, 1, 2)},
    tokens(B, 5),
    "convolution",
    "embedding",
)
def recurrent_embedding_and_convolution(params, xs):
    def step(h, i):
        x = jnp.tanh(params["table"][i] + h)[None, :, None]
        y = lax.conv_general_dilated(
            x, params["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.tanh(y[0, :, 0] - y[0, :, 1]), None

    return jnp.sum(lax.scan(step, jnp.ones(4), xs, reverse=True)[0] ** 2)


@program(
    {
        "w": normal(0, 3, 4, 4),
        "b": normal(1, 3, 4),
        "r": normal(2, 3, 4, 4),
        "s": jnp.ones(3),
    },
    normal(3, B, 6, 4),
    "shared dense",
    "reduction",
)
def stacked_layers(params, x):
    """A scan over layers, one of which is itself recurrent, rematerialised."""

    @jax.checkpoint
    def layer(x, p):
        x = jnp.tanh(x @ p["w"] + p["b"][None]) * p["s"]
        _, x = lax.scan(lambda h, y: (jnp.tanh(h @ p["r"] + y),) * 2, jnp.zeros(4), x)
        return x, None

    return jnp.sum(lax.scan(layer, x, params)[0] ** 2)


@program(normal(0, 4, 4), normal(1, B, 4), PAIRS)
def calls(w, x):
    """`jit`, `checkpoint`, `custom_vjp` and `custom_jvp`, around the same weight."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda res, g: (g @ res[1].T, res[0][:, None] @ g[None]),
    )
    x = jax.nn.relu(jax.jit(product)(x, w))
    x = jax.checkpoint(lambda x, w: jax.nn.silu(x @ w))(x, w)
    return jnp.sum(x**2)


@program(
    {"w": normal(0, 4, 3)},
    (normal(1, B, 4), jax.random.split(jax.random.key(2), B)),
    "outer product",
)
def dropout(params, example):
    x, key = example
    x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)
    return jnp.sum(jnp.tanh(x @ params["w"]))


@program({"v": normal(0, 4, 5)}, normal(1, B, 4), "outer product")
def reparametrised(params, x):
    """Entry by entry, so that the power passes through the parametrisation."""
    return jnp.sum(jnp.tanh(x @ (2.0 * jnp.exp(params["v"]) / 3.0)))


@program({"w": normal(0, 4, 5)}, normal(1, B, 4), "sum of outer products")
def regularised(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"])) + jnp.sum(params["w"] ** 2)


@program(
    {"w": normal(0, 6, 6)},
    (normal(1, B, 6), jax.random.split(jax.random.key(2), B)),
    "reduction",
)
def drop_connect(params, example):
    x, key = example
    mask = jax.random.bernoulli(key, 0.5, (6, 6))
    return jnp.sum(jnp.tanh(x @ jnp.where(mask, params["w"], 0.0)))


@program({"w": normal(0, 6, 6)}, normal(1, B, 4, 6), "reduction")
def recurrent_power(params, xs):
    """Weights that differ between examples: so do their gradients."""

    def step(h, x):
        w = params["w"] * jnp.cos(h)[:, None]
        return jnp.tanh(x @ w), None

    return jnp.sum(lax.scan(step, jnp.zeros(6), xs)[0])


@program(
    {"w": normal(0, 4, 6, 6) / 2, "s": normal(1, 6)},
    normal(2, B, 6),
    "outer product",
    "reduction",
)
def scanned_layers_with_a_shared_scale(params, x):
    def layer(h, w):
        return jnp.tanh(h @ w) * params["s"][0], None

    return jnp.sum(lax.scan(layer, x, params["w"])[0] ** 2)


@program(
    {"w": normal(0, 0, 6, 6), "b": normal(1, 6)},
    normal(2, B, 6),
    "outer product",
    "reduction",
)
def no_layers(params, x):
    x, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])
    return jnp.sum(jnp.tanh(x + params["b"]))


@program({"w": normal(0, 2, 6, 6)}, normal(1, B, 6), "outer product")
def layers_in_eight_bits(params, x):
    def layer(h, w):
        h = jnp.tanh(h.astype(jnp.float32) @ w)
        return h.astype(jnp.float8_e4m3fn), None

    h, _ = lax.scan(layer, x.astype(jnp.float8_e4m3fn), params["w"])
    return jnp.sum(h.astype(jnp.float32))


@program({"w": normal(0, 6, 6)}, normal(1, B, 6), PAIRS)
def masks_that_differ(params, x):
    low = np.tril(np.ones((6, 6), np.float32))
    y = x @ (params["w"] * low) + jnp.cos(x) @ (params["w"] * (2 - low))
    return jnp.sum(jnp.tanh(y))


@program({"w": normal(0, 6, 6)}, normal(1, B, 6), "fallback")
def rounded_on_the_way(params, x):
    """Rounding is not linear. Gradients are rounded too, to less than the tolerance."""
    return jnp.sum(jnp.tanh(x @ lax.reduce_precision(params["w"], 8, 20)) ** 2)


@program({"w": normal(0, 6, 6)}, normal(1, B, 6), PAIRS)
def branches(params, x):
    """Each example takes the branch that its first number says."""

    def f(w):
        return jnp.sum(jnp.tanh(x @ w))

    return lax.cond(x[0] > 0, f, lambda w: 2 * f(w.T), params["w"])


@program({"v": normal(0, 6, 5), "g": normal(1, 5)}, normal(2, B, 6), "reduction", PAIRS)
def weight_normalisation(params, x):
    """The gradient of a column is a projection: entries mix after the product."""
    norms = jnp.linalg.norm(params["v"], axis=0, keepdims=True)
    return jnp.sum(jnp.tanh(x @ (params["g"][None] * params["v"] / norms)) ** 2)


@program({"a": normal(0, 9, 2), "b": normal(1, 2, 8)}, normal(2, B, 9), "outer product")
def merged_low_rank(params, x):
    return jnp.sum(jnp.tanh(x @ (params["a"] @ params["b"])))


@program({"w": normal(0, 6, 6)}, normal(1, B, 3), "outer product")
def slices_that_leave_rows_out(params, x):
    w = params["w"]
    return jnp.sum(jnp.tanh(x @ w[:3])) + jnp.sum(jnp.tanh(x[:2] @ w[4:]))


@program({"w": normal(0, 6, 6)}, normal(1, B, 3), PAIRS)
def slices_that_overlap(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"][:3])) + jnp.sum(
        jnp.sin(x @ params["w"][2:5])
    )


@program({"w": normal(0, 6, 6)}, normal(1, B, 3), PAIRS)
def strides_that_meet(params, x):
    odd = jax.lax.slice(params["w"], (1, 0), (6, 6), (2, 1))
    return jnp.sum(jnp.tanh(x @ params["w"][:3])) + jnp.sum(jnp.sin(x @ odd))


PLACES = np.array([[0, 1], [2, 2], [0, 5], [1, 3], [3, 0], [4, 4], [5, 5], [3, 1]])


@program({"w": normal(0, 8)}, normal(1, B, 6), "reduction")
def sparse_matrix(params, x):
    """A primitive that no rule knows, of no more than the batch holds of it."""
    return jnp.sum(jnp.tanh(sparse.BCOO((params["w"], PLACES), shape=(6, 6)) @ x))


@program({"w": normal(0, 6, 4)}, normal(1, B, 6), "fallback")
def clipped_on_the_way_back(params, x):
    """What clips a gradient of a weight is nonlinear, and of each example here."""

    @jax.custom_vjp
    def clipped(w):
        return w

    clipped.defvjp(
        lambda w: (w, None), lambda _, g: (g / jnp.maximum(1, jnp.linalg.norm(g)),)
    )
    return jnp.sum(jnp.tanh(x @ clipped(params["w"])) ** 2)


FALLBACKS = {}


def falls_back(params, batch):
    def add(loss_fn):
        FALLBACKS[loss_fn.__name__] = (loss_fn, params, batch)
        return loss_fn

    return add


@falls_back({"w": normal(0, 6, 6)}, normal(1, B, 6))
def rounded(params, x):
    w = params["w"]
    return jnp.sum(jnp.tanh(x @ (lax.reduce_precision(w, 8, 7) + w.T)))


@pytest.mark.short(
    "dense",
    "shared_dense",
    "tied_embedding",
    "layer_norm",
    "reparametrised",
    "convolution_under_windows_that_overlap",
    "conv_2d_depthwise",
    "batched_product",
    "embedding_of_two_indices",
    "slices_that_leave_rows_out",
    "slices_that_overlap",
    "strides_that_meet",
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_gradients_formed_in_full(name):
    loss_fn, params, batch, rules = PROGRAMS[name]
    weights = jnp.linspace(-1.0, 2.0, jax.tree.leaves(batch)[0].shape[0])
    slow = pytest.warns(UserWarning, match="which no rule knows")
    with slow if "fallback" in rules else contextlib.nullcontext():
        sums = jax.jit(
            lambda *args: loss_power_sums(
                loss_fn, *args, powers=POWERS, weights=weights
            )
        )(params, batch)
    oracles.assert_close(
        sums, oracles.loss_power_sums(loss_fn, params, batch, POWERS, weights)
    )
    used = {
        rule
        for leaf in explain_loss(loss_fn, params, batch)
        for rule in leaf.rule.split(", ")
    }
    assert used == set(rules)


@pytest.mark.parametrize("name", FALLBACKS)
@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("chunk_bytes", [None, 1, 600])
def test_equals_gradients_formed_in_full_where_it_falls_back(name, chunk_bytes):
    loss_fn, params, batch = FALLBACKS[name]
    with pytest.warns(UserWarning, match=r"\['w'\].*`reduce_precision`, which no rule"):
        sums = jax.jit(
            lambda *args: loss_power_sums(
                loss_fn, *args, powers=POWERS, chunk_bytes=chunk_bytes
            )
        )(params, batch)
    oracles.assert_close(sums, oracles.loss_power_sums(loss_fn, params, batch, POWERS))
    (leaf,) = rules = explain_loss(loss_fn, params, batch)
    assert leaf.rule == "fallback" and leaf.note in str(rules)


# What a custom rule returns need not be linear in the gradient.
NOT_LINEAR = {
    "gather": lambda g: g.at[np.array([0, 1, 9, 2])].get(mode="fill", fill_value=3.0),
    "pad": lambda g: lax.pad(g[1:], 3.0, [(1, 0, 0), (0, 0, 0)]),
    "select": lambda g: jnp.where(np.arange(4)[:, None] > 1, g, 3.0),
}


def explained_with_derivative(change):
    """Compares sums where a gradient is changed on its way, and explains them."""

    @jax.custom_vjp
    def same(w):
        return w

    same.defvjp(lambda w: (w, None), lambda _, g: (change(g),))

    def loss_fn(w, x):
        return jnp.sum(jnp.tanh(x @ same(w)))

    w, x = normal(0, 4, 5), normal(1, B, 4)
    sums = jax.jit(lambda *args: loss_power_sums(loss_fn, *args, powers=POWERS))(w, x)
    oracles.assert_close(sums, oracles.loss_power_sums(loss_fn, w, x, POWERS))
    return explain_loss(loss_fn, w, x)


@pytest.mark.filterwarnings("ignore:The gradients of single examples")
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_moves_beside_numbers_that_are_not_zero(name):
    explained_with_derivative(NOT_LINEAR[name])


MOVES = {
    "split": lambda g: jnp.concatenate(jnp.split(g, [1])[::-1]),
    "tile": lambda g: jnp.tile(g[1:3, :1], (2, 5)),
    "unstack and stack": lambda g: jnp.stack(jnp.unstack(g, axis=1)[::-1], axis=1),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_that_a_derivative_makes_keep_the_rule(name):
    (leaf,) = explained_with_derivative(MOVES[name])
    assert leaf.rule == "outer product"


@pytest.mark.parametrize("budget", [64 << 20, 8, 24])
def test_loops_sum_up_the_rest_and_all_weights(budget):
    """Of 7 examples 3 at a time; along the second axis only the weights differ."""
    weight, x = normal(0, 7, 2), normal(1, 7, 3)
    out = [jax.ShapeDtypeStruct((3,), jnp.float32)]
    reduce = looped(lambda x: [x], out, POWERS, Steps(8, budget, 7))
    has = [(True, True), (True, False)]
    (found,) = jax.jit(lambda *args: reduce(has, *args))(weight, x)
    for p, sums in zip(POWERS, found, strict=True):
        expected = np.einsum("nk,ni->i", weight, np.asarray(x) ** p)
        np.testing.assert_allclose(sums, expected, rtol=1e-5)


@pytest.mark.parametrize("powers", [(2,), POWERS])
def test_a_cpu_adds_up_several_large_products_at_once(powers):
    """Four of nine, and the rest; if there are several sums to read and write."""
    x = normal(1, 9, 3)
    out = [jax.ShapeDtypeStruct((3,), jnp.float32)]
    steps = Steps(1 << 20, 64 << 20, 9, apart=True)
    reduce = looped(lambda x: [jnp.sin(x)], out, powers, steps)
    fn = jax.jit(lambda x: reduce(((True,), (True,)), jnp.ones(9), x)[0])
    for p, sums in zip(powers, fn(x), strict=True):
        np.testing.assert_allclose(sums, np.sum(np.sin(x) ** p, 0), rtol=1e-5)
    assert ("unroll=4" in str(jax.make_jaxpr(fn)(x))) == (len(powers) > 1)


@pytest.mark.parametrize("powers", [(2,), (1, 2)])
def test_few_products_are_added_up_as_they_are_formed(powers):
    """Of several cotangents too, which share their activations."""
    w, x, weights = normal(0, 4, 12), normal(1, 7, 6, 4), normal(2, 7)

    def model(w, x):
        return jnp.tanh(x @ w)

    def cotangents(h, _):
        return jnp.stack([h, h**2, jnp.ones_like(h)])

    found = jitted(model, w, x, cotangents, powers=powers, weights=weights)
    expected = oracles.power_sums(
        model, w, x, cotangents, powers=powers, weights=weights
    )
    oracles.assert_close(found, expected)


@pytest.mark.parametrize(
    ("places", "columns", "powers", "few"),
    [
        (6, 12, (2,), True),
        (6, 12, (1, 2), True),
        (12, 12, (2,), True),
        (12, 12, (1, 2), False),
        (20, 12, (2,), False),
        (6, 4, (2,), False),
        (6, 4096, (2,), False),
    ],
)
def test_a_cpu_forms_few_products_entry_by_entry(places, columns, powers, few):
    def loss_fn(w, x):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    shapes = (columns, 9), (3, places, columns)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    fn = jax.jit(lambda *args: loss_power_sums(loss_fn, *args, powers=powers))
    text = fn.trace(*args).lower(lowering_platforms=("cpu",)).as_text()
    # Beside the product of the model.
    assert text.count("stablehlo.dot_general") == (1 if few else 2)


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("chunk_bytes", [1, 500, 1000, 10**6])
def test_chunks_that_do_not_divide_the_batch(chunk_bytes):
    params, x = {"w": normal(0, 4, 5)}, normal(1, 7, 3, 4)

    def model(params, x):
        return jnp.tanh(x @ params["w"])

    def cotangents(h, _):
        return jnp.stack([h, h**2])

    sums = jax.jit(
        lambda *args: power_sums(model, *args, cotangents, chunk_bytes=chunk_bytes)
    )(params, x)
    oracles.assert_close(sums, oracles.power_sums(model, params, x, cotangents))


# The interface.


def apply_fn(params, x):
    return mlp(params, x)


def score(h, y):
    return (jax.nn.one_hot(y, h.shape[-1]) - jax.nn.softmax(h))[None]


def factor(h, y):
    del y
    p = jax.nn.softmax(h)
    return jnp.diag(jnp.sqrt(p)) - jnp.sqrt(p)[:, None] * p[None]


X, Y = normal(5, B, 6), tokens(B, vocabulary=3)


@pytest.mark.parametrize("cotangents", [score, factor])
def test_power_sums_of_pulled_back_cotangents(cotangents):
    weights = jnp.arange(B) - 1.0
    sums = jitted(apply_fn, MLP, X, cotangents, Y, powers=POWERS, weights=weights)
    expected = oracles.power_sums(apply_fn, MLP, X, cotangents, Y, POWERS, weights)
    oracles.assert_close(sums, expected)


def test_several_cotangents_of_a_shared_weight_and_an_embedding():
    params = {"table": normal(0, 7, 4), "w": normal(1, 4, 3), "k": normal(2, 3, 3, 3)}

    def model(params, x):
        h = jnp.tanh(params["table"][x] @ params["w"])
        dims = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            h, params["k"], (2,), "SAME", dimension_numbers=dims
        )

    def cotangents(h, target):
        return jax.random.normal(target, (4, *h.shape))

    args = (
        model,
        params,
        tokens(B, 6),
        cotangents,
        jax.random.split(jax.random.key(3), B),
    )
    sums = jitted(*args, powers=POWERS)
    oracles.assert_close(sums, oracles.power_sums(*args, POWERS))
    rules = [leaf.rule for leaf in explain(*args)]
    assert rules == ["convolution", "embedding", "shared dense"]


def test_pytrees_of_inputs_and_outputs():
    def model(params, x):
        h = mlp(params, x["a"] + x["b"])
        return {"h": h, "label": jnp.argmax(h, -1), "square": h**2}

    def cotangents(h, y):
        ones = jnp.ones((2, 3))
        return {"h": ones * y, "label": jnp.zeros((2,), int), "square": 2 * ones}

    args = model, MLP, {"a": X, "b": X**2}, cotangents, Y
    expected = oracles.power_sums(
        lambda p, x: {k: v for k, v in model(p, x).items() if k != "label"},
        MLP,
        args[2],
        lambda h, y: {k: v for k, v in cotangents(h, y).items() if k != "label"},
        Y,
    )
    oracles.assert_close(jitted(*args), expected)


def test_first_power_is_the_gradient_and_value_the_loss():
    value, (grad, _) = jax.jit(
        lambda *args: loss_power_sums(dense, *args, powers=(1, 2), has_value=True)
    )(MLP, X)
    expected = jax.jit(
        jax.value_and_grad(lambda p: jnp.sum(jax.vmap(dense, (None, 0))(p, X)))
    )(MLP)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    oracles.assert_close(grad, jax.tree.map(np.asarray, expected[1]))


def test_weighted_value():
    weights = jnp.array([0.0, 1.0, 0.0, 2.0, 0.0])
    value, _ = jax.jit(
        lambda *args: loss_power_sums(dense, *args, weights=weights, has_value=True)
    )(MLP, X)
    np.testing.assert_allclose(
        value, dense(MLP, X[1]) + 2 * dense(MLP, X[3]), rtol=1e-6
    )


@pytest.mark.parametrize("n", [0, 1])
def test_few_examples(n):
    sums = jitted(apply_fn, MLP, X[:n], factor, Y[:n])
    oracles.assert_close(sums, oracles.power_sums(apply_fn, MLP, X[:n], factor, Y[:n]))


def test_parameters_without_entries():
    """A low-rank part of rank zero is no reason to fall back."""

    def loss_fn(p, x):
        return jnp.sum(jnp.tanh(x @ (p["w"] + p["a"] @ p["b"])))

    params = {"w": normal(0, 4, 4), "a": normal(0, 4, 0), "b": normal(0, 0, 4)}
    x = normal(1, B, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = jax.jit(lambda *args: loss_power_sums(loss_fn, *args))(params, x)
    oracles.assert_close(found, oracles.loss_power_sums(loss_fn, params, x, (2,)))


def test_zero_weights():
    sums = jitted(apply_fn, MLP, X, factor, weights=jnp.zeros(B))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(sums))


def test_no_parameters():
    assert power_sums(lambda p, x: x, {}, X, score, Y % 2, powers=(1, 2)) == ({}, {})
    assert explain(lambda p, x: x, {}, X, score, Y % 2) == ()


def test_a_parameter_that_is_not_used_is_explained():
    (leaf,) = explain(lambda p, x: x, {"w": X}, X, score, Y % 2)
    assert leaf.rule == "constant"


# Transformations around it.


def squares(params, x, y, **options):
    return power_sums(apply_fn, params, x, factor, y, **options)[0]


def test_a_map_of_the_caller_is_not_summed():
    ensemble = jax.tree.map(lambda w: jnp.stack([w, 2 * w, -w]), MLP)
    members = [MLP, *(jax.tree.map(lambda w, s=s: s * w, MLP) for s in (2, -1))]
    expected = [oracles.power_sums(apply_fn, w, X, factor)[0] for w in members]
    expected = jax.tree.map(lambda *w: np.stack(w), *expected)
    squared = jax.jit(jax.vmap(squares, (0, None, None)))
    oracles.assert_close(squared(ensemble, X, Y), expected)


@pytest.mark.short("2")
@pytest.mark.parametrize("cotangents", [1, 2])
def test_a_map_of_the_caller_over_draws_is_not_summed(cotangents):
    """Parameters and inputs are the same for all draws; only the cotangents differ."""

    def one(key):
        def draw(h, _):
            return jax.random.normal(key, (cotangents, *h.shape))

        return power_sums(shared, {"w": MLP["w0"]}, normal(0, B, 7, 6), draw)[0]

    def shared(params, x):
        return jnp.tanh(x @ params["w"])

    keys = jax.random.split(jax.random.key(0), 3)
    expected = jax.tree.map(lambda *w: jnp.stack(w), *map(jax.jit(one), keys))
    oracles.assert_close(
        jax.jit(jax.vmap(one))(keys), jax.tree.map(np.asarray, expected)
    )


def test_in_a_scan_and_under_jit():
    def step(params, _):
        return params, squares(params, X, Y)

    _, stack = jax.jit(lambda p: lax.scan(step, p, length=2))(MLP)
    (expected,) = oracles.power_sums(apply_fn, MLP, X, factor)
    oracles.assert_close(jax.tree.map(lambda s: s[1], stack), expected)


def test_nothing_is_differentiated_through_it():
    def total(params, x):
        sums = squares(params, x, Y)
        through = power_sums(
            lambda p, x: mlp(params, x) * p[None], jnp.ones(3), x, factor
        )
        return sum(map(jnp.sum, jax.tree.leaves((sums, through))))

    for g in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1)))(MLP, X)):
        assert not np.any(g)


def mesh(kind):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)


@pytest.mark.short("AxisType.Explicit")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_over_devices(kind):
    devices = mesh(kind)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(devices, P(*spec)))

    params = jax.tree.map(put, MLP) | {"w0": put(MLP["w0"], None, "model")}
    x, y = jnp.concatenate([X, X, X[:2]]), jnp.concatenate([Y, Y, Y[:2]])
    (expected,) = oracles.power_sums(apply_fn, MLP, x, factor, y)
    for placed in (put(x, "data"), put(y, "data")), (put(x, "data"), put(y)):
        sums = jax.jit(squares)(params, *placed)
        oracles.assert_close(sums, expected)
    if kind == AxisType.Explicit:
        assert jax.typeof(sums["w0"]).sharding.spec == P(None, "model")


@pytest.mark.long
@pytest.mark.parametrize("check_vma", [True, False])
def test_on_each_device_of_a_shard_map(check_vma):
    tables = {"table": normal(0, 7, 6), **MLP}

    def model(params, i):
        return jnp.mean(
            mlp(params, params["table"][i].reshape(-1, 6)).reshape(-1, 6, 3), 1
        )

    def local(params, i):
        sums = power_sums(model, params, i, factor, powers=(1, 2))
        return jax.tree.map(lambda s: lax.psum(s, "data"), sums)

    i = tokens(12, 6)
    run = on_four_devices(local, check_vma)
    expected = oracles.power_sums(model, tables, i, factor, powers=(1, 2))
    oracles.assert_close(jax.jit(run)(tables, i), expected)


def on_four_devices(local, check_vma):
    return jax.shard_map(
        local,
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )


@pytest.mark.short("True")
@pytest.mark.parametrize("check_vma", [True, False])
def test_numbers_known_in_advance_are_known_in_a_shard_map(check_vma):
    """Of layers that a loop counts, and of rows; else a fallback warns."""
    params = {"layers": normal(0, 3, 4, 4), "rows": normal(1, 5, 4)}

    def model(params, x):
        _, rows = lax.scan(lambda i, _: ((2 * i + 1) % 5, i), 0, length=6)

        def layer(i, h):
            return jnp.tanh(h @ params["layers"][i])

        return lax.fori_loop(0, 3, layer, x + params["rows"][rows][None])[..., :3]

    def cotangents(h, _):
        return jnp.stack([h, h**2])

    def local(params, x):
        (sums,) = power_sums(model, params, x, cotangents)
        return jax.tree.map(lambda s: lax.psum(s, "data"), sums)

    x = normal(2, 8, 6, 4)
    (expected,) = oracles.power_sums(model, params, x, cotangents)
    found = jax.jit(on_four_devices(local, check_vma))(params, x)
    oracles.assert_close(found, expected)


# Numbers.


@pytest.mark.short("bfloat16")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    params, x = jax.tree.map(lambda w: w.astype(dtype), (MLP, X))

    def half_score(h, y):
        return score(h, y).astype(dtype)

    sums = jitted(apply_fn, params, x, score, Y, powers=POWERS)
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
    expected = oracles.power_sums(apply_fn, params, x, half_score, Y, POWERS)
    oracles.assert_close(sums, expected, tolerance=0.05)


def test_layers_in_half_precision_are_summed_in_float32():
    def loss_fn(w, x):
        x, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)
        return jnp.sum(x.astype(jnp.float32))

    half = [normal(0, 2, 4, 4).astype(jnp.bfloat16), X[:, :4].astype(jnp.bfloat16)]
    (sums,) = jax.jit(lambda *args: loss_power_sums(loss_fn, *args))(*half)
    assert sums.dtype == jnp.float32
    assert np.all(sums != sums.astype(jnp.bfloat16))  # Not rounded on the way.


def test_chosen_rows_in_half_precision_are_summed_in_float32():
    rows = np.asarray([3, 1, 0, 2])

    def loss_fn(w, x):
        return jnp.sum(jnp.tanh(w[rows] @ x))

    half = normal(7, 4, 6).astype(jnp.bfloat16), X.astype(jnp.bfloat16)
    found = jax.jit(lambda *args: loss_power_sums(loss_fn, *args, powers=POWERS))(*half)
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float32")}
    expected = oracles.loss_power_sums(loss_fn, *half, POWERS)
    oracles.assert_close(found, expected, tolerance=0.05)


def test_small_squares_do_not_underflow_in_float16():
    def loss_fn(w, x):
        return jnp.sum(w * x)

    sums = jax.jit(lambda *args: loss_power_sums(loss_fn, *args))(
        np.ones(2, np.float16), np.full((3, 2), 1e-4, np.float16)
    )
    np.testing.assert_allclose(sums[0], 3e-8, rtol=1e-2)


@pytest.mark.long
def test_double_precision_stays(x64):
    params = jax.tree.map(lambda w: w.astype(jnp.float64), MLP)
    sums = jitted(apply_fn, params, X.astype(jnp.float64), factor, powers=POWERS)
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("float64")}
    expected = oracles.power_sums(
        apply_fn, params, X.astype(jnp.float64), factor, powers=POWERS
    )
    oracles.assert_close(sums, expected, tolerance=1e-12)


@pytest.mark.long
def test_weights_that_decay_in_a_loop_do_so_in_double_precision(x64):
    def loss_fn(w, x):
        def step(carry, x):
            h, w = carry
            return (jnp.tanh(h @ w + x), 0.9 * w), None

        return jnp.sum(lax.scan(step, (x[0], w), x)[0][0] ** 2)

    w, x = normal(0, 4, 4).astype(jnp.float64), normal(1, B, 9, 4).astype(jnp.float64)
    found = jax.jit(lambda *args: loss_power_sums(loss_fn, *args))(w, x)
    oracles.assert_close(found, oracles.loss_power_sums(loss_fn, w, x), 1e-12)


def test_fourth_powers_stay_in_range_where_those_of_the_gradients_do():
    sizes = jnp.array([1.0, 1e12, 1.0, 1e-12, 1e13])
    scores = normal(6, 2, 3)

    def cotangents(h, size):
        return scores / size

    def model(w, x):
        return x @ w

    args = model, MLP["w0"][:, :3], X * sizes[:, None], cotangents, sizes
    oracles.assert_close(
        jitted(*args, powers=POWERS), oracles.power_sums(*args, POWERS)
    )


@pytest.mark.parametrize(
    ("precision", "kept"),
    [
        ("highest", True),
        (lax.DotAlgorithmPreset.F32_F32_F32, True),
        (lax.DotAlgorithmPreset.F16_F16_F32, False),
    ],
)
@pytest.mark.parametrize("positions", [1, 5])
def test_squares_have_the_precision_asked_for(precision, kept, positions):
    def loss_fn(w, x):
        return jnp.sum(jnp.dot(x, w, precision=precision) ** 2)

    jaxpr = jax.make_jaxpr(lambda *args: loss_power_sums(loss_fn, *args))(
        jnp.ones((4, 3)), jnp.ones((B, positions, 4))
    )
    products = [
        eqn
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
        and sorted(eqn.outvars[0].aval.shape) == [3, 4]
    ]
    assert products  # One, or one for each platform.
    plain = jax.make_jaxpr(lambda w: jnp.dot(w, w.T, precision=precision))(MLP["w0"])
    expected = plain.eqns[-1].params["precision"] if kept else None
    assert all(eqn.params["precision"] == expected for eqn in products)


def two_products(params, x):
    first, second = jnp.dot(x, params["w"], precision=HIGHEST), jnp.cos(x) @ params["w"]
    return jnp.sum(jnp.tanh(first) + jnp.tanh(second))


def low_rank(params, x):
    return jnp.sum(jnp.tanh(jnp.dot(x, params["a"] @ params["b"], precision=HIGHEST)))


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("loss_fn", [two_products, low_rank])
def test_squares_have_the_precision_asked_for_of_one_of_several(loss_fn, positions):
    params = {"a": normal(0, 6, 2), "b": normal(1, 2, 7)}
    if loss_fn is two_products:
        params = {"w": normal(0, 6, 7)}
    jaxpr = jax.make_jaxpr(lambda *args: loss_power_sums(loss_fn, *args))(
        params, normal(2, B, positions, 6)
    )
    shapes = [sorted(leaf.shape) for leaf in params.values()]
    products = [
        eqn
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
        and sorted(eqn.outvars[0].aval.shape) in shapes
    ]
    assert products
    assert all(eqn.params["precision"] == (HIGHEST,) * 2 for eqn in products)


def equations(jaxpr):
    """Yields all equations, those of loops, branches and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_weights_of_8_bits_have_squares_that_are_not_rounded():
    def rounded(w):
        return w.astype(jnp.float8_e4m3fn).astype(jnp.float32)

    def loss_fn(w, x):
        return dense(x, rounded(w))

    def straight_through(w, x):
        return dense(x, w + lax.stop_gradient(rounded(w) - w))

    def dense(x, w):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    w, x = normal(0, 4, 3), normal(1, B, 4)
    (expected,) = oracles.loss_power_sums(straight_through, w, x)
    oracles.assert_close(loss_power_sums(loss_fn, w, x)[0], expected)


@pytest.mark.short("fill-uint8", "clip-int8")
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16])
@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
def test_narrow_indices(dtype, mode):
    table, rows = normal(0, 200, 3), np.arange(B * 2, dtype=dtype).reshape(B, 2)

    def loss_fn(p, i):
        i = lax.convert_element_type(i, dtype)
        return jnp.sum(jnp.tanh(p.at[i].get(mode=mode, wrap_negative_indices=False)))

    (leaf,) = explain_loss(loss_fn, table, rows)
    assert leaf.rule == "embedding"
    (sums,) = jax.jit(lambda *args: loss_power_sums(loss_fn, *args))(table, rows)
    oracles.assert_close(sums, oracles.loss_power_sums(loss_fn, table, rows)[0])


# Cost.


def temporary_bytes(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["outer product", "shared dense", "fallback"])
def test_no_array_of_all_gradients(kind):
    batch, width = 64, 128

    def loss_fn(w, x):
        def f(w):
            return jnp.sum(jnp.tanh(x @ w) ** 2)

        if kind == "fallback":
            w = lax.reduce_precision(w, 8, 22)
        return f(w)

    shape = (batch, 5, width) if kind == "shared dense" else (batch, width)
    w, x = normal(0, width, width), normal(1, *shape)
    (leaf,) = explain_loss(loss_fn, w, x)
    assert leaf.rule == kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used = temporary_bytes(lambda *args: loss_power_sums(loss_fn, *args), w, x)
    assert used < w.nbytes * batch / 8

    def naive(w, x):
        return jnp.sum(jax.vmap(jax.grad(loss_fn), (None, 0))(w, x) ** 2, 0)

    assert temporary_bytes(naive, w, x) >= w.nbytes * batch


def test_a_batch_of_one_costs_no_more_than_an_example():
    """Compiled to the same products, whether the model takes a batch or an example."""

    def products(fn, *args):
        text = jax.jit(fn).lower(*args).compile().cost_analysis()
        return text["flops"]

    def loss_fn(params, example):
        x, y = example
        x = jnp.tanh(x @ params["w0"] + params["b0"])
        return jnp.sum((x @ params["w1"] + params["b1"]) * y)

    batched = products(
        lambda p, x, y: power_sums(apply_fn, p, x, lambda h, y: y[None], y),
        MLP,
        X,
        normal(0, B, 3),
    )
    single = products(
        lambda *args: loss_power_sums(loss_fn, args[0], args[1:]),
        MLP,
        X,
        normal(0, B, 3),
    )
    assert batched <= 1.1 * single


def test_a_batch_of_one_is_evaluated_without_its_axis():
    """But where an operation needs it; some values are wanted with it and without."""
    from fsam_optax._engine.flatten import flatten
    from fsam_optax._engine.jaxpr import as_function

    def program(x, k, w):
        x = x[None]
        y = jnp.transpose(x, (0, 2, 1)) @ w[None]
        y = y - jnp.mean(y, -1, keepdims=True) + jnp.broadcast_to(x[0, 0], y.shape)
        z = lax.conv_general_dilated(
            y * w[None, :1], k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        z = jnp.maximum(z, 0) + lax.rev(y, (1,))
        pairs = jnp.einsum("bqhd,bkhd->bhqk", *[z.reshape(1, 4, 2, 2)] * 2)
        both = jnp.broadcast_to(jnp.sum(pairs, 1)[..., None], (1, 4, 4, 3))
        turned = jnp.transpose(both, (3, 0, 2, 1))
        return jnp.sum(pairs, 1), jnp.max(turned, (1, 3)), z.reshape(8, 1, 2)

    args = normal(0, 3, 4), normal(1, 3, 4, 4), normal(2, 3, 4)
    closed = jax.make_jaxpr(program)(*args)
    flat = jax.make_jaxpr(flatten(closed, [True, False, False]))(*args)
    for x, y in zip(as_function(flat)(*args), program(*args), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    products = [e for e in flat.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert products and all(1 not in v.aval.shape for e in products for v in e.invars)


@pytest.mark.parametrize("length", [1, 3])
def test_a_loop_runs_without_the_axis_of_a_batch_of_one(length):
    """A program on arrays with one axis more takes XLA:CPU up to five times as long."""
    from fsam_optax._engine.flatten import flatten
    from fsam_optax._engine.jaxpr import as_function

    def program(w, x):
        def loss(w):
            @jax.checkpoint
            def step(h, inputs):
                x, mask = inputs
                h = jnp.tanh(h * w + x[..., None]) * mask
                return h, jnp.sum(h, -1)

            start, masks = jnp.zeros((1, 4, 5)), jnp.ones((length, 1, 4, 1))
            h, y = lax.scan(step, start, (jnp.moveaxis(x[None], 1, 0), masks))
            return jnp.sum(h**2) + jnp.sum(y[..., 0] ** 2)

        return jax.value_and_grad(loss)(w)

    args = normal(0, 1, 4, 5), normal(1, length, 4)
    closed = jax.make_jaxpr(program)(*args)
    flat = jax.make_jaxpr(flatten(closed, [False, True]))(*args)
    for x, y in zip(as_function(flat)(*args), program(*args), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    loops = [e for e in flat.jaxpr.eqns if e.primitive.name == "scan"]
    inside = [e for loop in loops for e in loop.params["jaxpr"].jaxpr.eqns]
    assert len(loops) == 2
    assert all(v.aval.shape[:1] != (1,) for e in inside for v in e.outvars)


def test_derivatives_that_jax_has_made_before_are_not_made_again():
    """Of a function that is jitted, as those of `jax.numpy` are: once, not by layer."""
    calls = []

    @jax.custom_jvp
    def cubed(x):
        return x**3

    @cubed.defjvp
    def _(primals, tangents):
        calls.append(None)
        return cubed(*primals), 3 * primals[0] ** 2 * tangents[0]

    activation = jax.jit(cubed, inline=True)

    def apply_fn(params, x):
        for w in params:
            x = activation(x @ w)
        return x

    params = [normal(k, 6, 6) / 6 for k in range(8)]
    sums = jax.jit(lambda *args: power_sums(apply_fn, *args, factor))(params, X)
    assert len(calls) < len(params)
    expected = oracles.power_sums(apply_fn, params, X, factor)
    oracles.assert_close(sums, expected)


def test_one_trace_under_jit():
    traces = []

    def counted(params, x):
        traces.append(None)
        return mlp(params, x)

    run = jax.jit(lambda p, x: power_sums(counted, p, x, factor))
    run(MLP, X)
    n = len(traces)
    run(MLP, X)
    assert len(traces) == n


# What cannot be handled, and errors.


@pytest.mark.short("flatten")
@pytest.mark.parametrize("part", ["flatten", "scales_weights"])
def test_falls_back_with_a_warning_if_rewriting_breaks(part, monkeypatch):
    from fsam_optax._engine import example

    def broken(closed, *varies):
        raise AttributeError("moved in a later version")

    monkeypatch.setattr(example, part, broken)
    expected = oracles.power_sums(apply_fn, MLP, X, factor, Y, POWERS)
    for chunk_bytes in None, 1:
        with pytest.warns(UserWarning, match="moved in a later version") as caught:
            sums = jax.jit(
                lambda *args, chunk_bytes=chunk_bytes: power_sums(
                    apply_fn, *args, Y, powers=POWERS, chunk_bytes=chunk_bytes
                ),
                static_argnums=2,
            )(MLP, X, factor)
        assert len(caught) == 1
        oracles.assert_close(sums, expected)


def test_the_report_names_what_runs_if_planning_breaks_halfway(monkeypatch):
    from fsam_optax._engine import example

    def broken(*args):
        raise AttributeError("moved in a later version")

    monkeypatch.setattr(example, "run", broken)
    with pytest.warns(UserWarning, match="moved in a later version"):
        rules = explain_loss(dense, MLP, X)
    assert [leaf.rule for leaf in rules] == ["fallback"] * len(MLP)


def normalised_by_batch(params, x):
    x = mlp(params, x)
    return (x - x.mean(0)[None]) / jnp.sqrt(x.var(0)[None] + 0.1)


def test_a_model_that_mixes_examples_is_found():
    check_separable(apply_fn, MLP, X)
    assert not explain(apply_fn, MLP, X, score, Y).remarks
    (remark,) = explain(normalised_by_batch, MLP, X, score, Y).remarks
    assert "check_separable" in remark
    with pytest.raises(ValueError, match="depends on the rest of the batch"):
        check_separable(normalised_by_batch, MLP, X)


def test_a_model_that_mixes_examples_runs_each_by_itself():
    sums = jitted(normalised_by_batch, MLP, X, score, Y)
    oracles.assert_close(
        sums, oracles.power_sums(normalised_by_batch, MLP, X, score, Y)
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(sums))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"powers": (2, 3)}, ValueError, "`powers`"),
        ({"powers": ()}, ValueError, "`powers`"),
        ({"weights": jnp.ones((B, 1))}, ValueError, "`weights`"),
        ({"inputs": {"x": X, "z": X[:2]}}, ValueError, r"\['z'\]"),
        ({"inputs": {"x": jnp.ones(())}}, ValueError, r"\['x'\]"),
        ({"inputs": {}}, ValueError, "no examples"),
        ({"params": MLP | {"n": jnp.arange(3)}}, TypeError, r"params\['n'\]"),
        ({"cotangents": lambda h, y: h}, ValueError, "`cotangents`"),
        ({"cotangents": lambda h, y: (h[None],)}, ValueError, "`cotangents`"),
    ],
)
def test_errors_name_what_is_wrong(change, error, match):
    arguments = {
        "apply_fn": apply_fn,
        "params": MLP,
        "inputs": X,
        "cotangents": factor,
    } | change
    with pytest.raises(error, match=match):
        jax.eval_shape(lambda: power_sums(**arguments))


def test_a_loss_must_be_a_scalar():
    with pytest.raises(TypeError, match="scalar"):
        loss_power_sums(lambda p, x: x, MLP, X)


def test_errors_of_the_model_are_those_of_the_model():
    def broken(params, x):
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        power_sums(broken, MLP, X, factor)
    with pytest.raises(KeyError, match="of the user"):
        power_sums(apply_fn, MLP, X, broken)


# Random programs.


def random_program(seed):
    """Returns a loss that uses its parameters in random ways, and its arguments."""
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(rng.integers(2, 5))]
    params = {name: normal(i, 4, 4) / 2 for i, name in enumerate(names)}
    steps = [(rng.integers(8), names[rng.integers(len(names))]) for _ in range(5)]

    def step(kind, w, x):
        match kind:
            case 0:
                return jnp.tanh(x @ w)
            case 1:
                return x * w[0][None] + w[1][None]
            case 2:
                return jnp.tanh(w[jnp.argmax(x, -1)]) + x
            case 3:
                return jax.checkpoint(lambda x: jax.nn.silu(x @ w.T))(x)
            case 4:
                return lax.scan(lambda h, y: (jnp.tanh(h @ w + y),) * 2, x[0], x)[1]
            case 5:
                x = x[None, :, :, None]
                dims = ("NHWC", "HWIO", "NHWC")
                y = lax.conv_general_dilated(
                    x, w[:3, :3, None, None], (1, 1), "SAME", dimension_numbers=dims
                )
                return y[0, :, :, 0]
            case 6:
                return jax.jit(lambda x: jax.nn.softmax(x @ w @ x.T) @ x)(x)
            case _:
                return x @ (w / jnp.sqrt(jnp.sum(w**2)))

    def loss_fn(params, x):
        for kind, name in steps:
            x = step(kind, params[name], x)
        return jnp.sum(jnp.sin(x))

    return loss_fn, params, normal(seed, 3, 5, 4)


@pytest.mark.short("7")
@pytest.mark.parametrize("seed", range(8))
def test_random_programs(seed):
    loss_fn, params, batch = random_program(seed)
    sums = jax.jit(lambda *args: loss_power_sums(loss_fn, *args))(params, batch)
    oracles.assert_close(sums, oracles.loss_power_sums(loss_fn, params, batch))


def rounded_weight_gradient(w, x):
    @jax.custom_vjp
    def dense(w, x):
        return x @ w

    def backward(saved, g):
        w, x = saved
        return (4 * x.T @ g).astype(jnp.int32).astype(jnp.float32) / 4, g @ w.T

    dense.defvjp(lambda w, x: (x @ w, (w, x)), backward)
    return jnp.sum(jnp.tanh(dense(w, x)))


def rounded_at_each_step(w, x):
    def step(total, x):
        return total + (x @ w * 4).astype(jnp.int8).astype(jnp.float32) / 4, None

    total, _ = lax.scan(step, jnp.zeros(4), x)
    return jnp.sum(total * (x[0] @ w))


def counted_in_whole_numbers(w, x):
    def step(total, x):
        return total + jnp.dot(x, x).astype(jnp.int8), None

    total, _ = lax.scan(step, jnp.int8(0), x)
    return jnp.sum(jnp.tanh(x @ w)) * total.astype(jnp.float32)


def filled_at_each_step(w, x):
    rows = jnp.array([0, 7, 1, 2])

    def step(total, x):
        y = jnp.take(x @ w, rows, mode="fill", fill_value=1.0)
        return total + y, None

    total, _ = lax.scan(step, jnp.zeros(4), x)
    return jnp.sum(total**2)


@pytest.mark.parametrize(
    "loss_fn",
    [
        rounded_weight_gradient,
        rounded_at_each_step,
        counted_in_whole_numbers,
        filled_at_each_step,
    ],
)
def test_what_is_rounded_or_filled_is_no_linear_map(loss_fn):
    """It is not the same whether it is done before or after a sum."""
    w, x = normal(0, 4, 4), 2 * normal(1, 3, 5, 4)
    run = jax.jit(lambda *args: loss_power_sums(loss_fn, *args, has_value=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value, sums = run(w, x)
    expected = jax.jit(jax.vmap(loss_fn, (None, 0)))(w, x).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    oracles.assert_close(sums, oracles.loss_power_sums(loss_fn, w, x))

"""Which leaves are biases, in the parameter trees of frameworks and by hand."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsam_optax._ball.biases import biases


def found(params):
    """The key paths of what ASAM takes for biases."""
    leaves = jax.tree_util.tree_leaves_with_path(biases(params))
    return {jax.tree_util.keystr(path) for path, is_bias in leaves if is_bias}


def called_bias(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    return {path for path in paths if "bias" in path}


def o(*shape):
    return np.ones(shape, np.float32)


Layer = collections.namedtuple("Layer", ["weight", "bias"])
Pair = collections.namedtuple("Pair", ["W", "b"])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # By the name, whatever the shape.
        ({"kernel": o(4, 2, 3), "bias": o(2, 3)}, ["['bias']"]),
        ({"scale": o(3), "bias": o(3)}, ["['bias']"]),
        ({"gamma": o(3), "beta": o(3)}, ["['beta']"]),
        ({"scale": o(2, 3), "offset": o(2, 3)}, ["['offset']"]),
        (
            {"weight_ih": o(9, 2), "bias_ih": o(9), "bias_n": o(3)},
            ["['bias_ih']", "['bias_n']"],
        ),
        ({"in_proj_weight": o(9, 3), "in_proj_bias": o(9)}, ["['in_proj_bias']"]),
        (
            {"weight_hh_l0": o(9, 3), "bias_hh_l0_reverse": o(9)},
            ["['bias_hh_l0_reverse']"],
        ),
        (
            {"weights": [o(4, 8), o(8)], "biases": [o(8), o()]},
            ["['biases'][0]", "['biases'][1]"],
        ),
        (Layer(o(2, 3), o(2)), [".bias"]),
        # Not a weight that makes a bias, nor one beside or below a name.
        ({"bias_kernel": o(2, 3), "bias_table": o(3), "unbiased": o(3)}, []),
        ({"bias": {"kernel": o(2, 3)}}, []),
        # Flat dictionaries.
        ({"0.weight": o(3, 2), "0.bias": o(3), "a/b": o(2)}, ["['0.bias']", "['a/b']"]),
        # By the weight with the same name.
        ({"W1": o(2, 3), "b1": o(3), "W2": o(3, 1), "b2": o(1)}, ["['b1']", "['b2']"]),
        ({"W1": o(2, 3), "b1": o(1, 3)}, ["['b1']"]),
        (
            {"Wq": o(2, 3), "bq": o(3), "fc_w": o(2, 3), "fc_b": o(3)},
            ["['bq']", "['fc_b']"],
        ),
        ({"w": o(5, 2, 3), "b": o(5, 3)}, ["['b']"]),
        (Pair(o(2, 3), o(3)), [".b"]),
        # By the entry before.
        ([(o(2, 3), o(3)), (), (o(3, 1), o(1))], ["[0][1]", "[2][1]"]),
        ([o(2, 3), o(3), o(3, 2), o(2)], ["[1]", "[3]"]),
        ([(o(5, 2, 3), o(5, 3))], ["[0][1]"]),
        ([(o(3, 3, 1, 8), o(1, 1, 1, 8))], ["[0][1]"]),
        # But weights follow weights.
        ([o(4, 8), o(8, 1)], []),
        ([o(8, 8), o(8, 1)], []),
        ({"weights": [o(4, 8), o(8)]}, []),
        ([o(3), o(3)], []),
        # Low-rank factors, of any rank.
        ({"w": o(4, 6), "a": o(4, 2), "b": o(2, 6)}, []),
        ({"w": o(4, 6), "a": o(4, 1), "b": o(1, 6)}, []),
        ({"lora_a": o(4, 2), "lora_b": o(2, 6), "A": o(4, 2), "B": o(2, 6)}, []),
        ({"a": o(5, 4, 2), "b": o(5, 2, 6)}, []),
        # A b of one axis, and what only looks like one.
        (
            {"b": o(3), "b2": o(3), "B": o(3), "wb": o(3), "by": o(3)},
            ["['b']", "['b2']"],
        ),
        ({0: o(3)}, []),
        (o(3), []),
    ],
    ids=lambda value: str(jax.tree.map(np.shape, value)),
)
def test_the_rule(params, expected):
    assert found(params) == set(expected)


@pytest.mark.long
def test_equinox():
    nn = pytest.importorskip("equinox").nn
    eqx = pytest.importorskip("equinox")
    key = jax.random.key(0)
    model = [
        nn.MLP(2, 3, 4, 1, key=key),
        nn.GRUCell(2, 3, key=key),
        nn.MultiheadAttention(2, 4, use_query_bias=True, key=key),
        nn.LayerNorm(3),
        nn.Conv2d(1, 2, 3, key=key),
        eqx.filter_vmap(lambda k: nn.Linear(2, 3, key=k))(jax.random.split(key, 2)),
    ]
    params = eqx.filter(model, eqx.is_inexact_array)
    assert found(params) == called_bias(params)
    assert sum("bias_n" in path for path in found(params)) == 1


def test_flax_linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.Dense(4)(x))
            x = nn.MultiHeadDotProductAttention(2)(x, x)
            stacked = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
            )
            return stacked(4, name="layer")(x)

    shapes = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((2, 5, 4)))
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes["params"])
    assert params["layer"]["bias"].shape == (3, 4)
    assert found(params) == called_bias(params)


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.lora = nnx.LoRA(3, 2, 3, rngs=rngs)
            make = nnx.vmap(lambda key: nnx.Linear(2, 3, rngs=nnx.Rngs(key)))
            self.stacked = make(jax.random.split(rngs.params(), 3))

    params = nnx.state(Net(nnx.Rngs(0)), nnx.Any(nnx.Param, nnx.LoRAParam))
    assert len(called_bias(params)) == 3
    assert found(params) == called_bias(params)


def test_haiku():
    hk = pytest.importorskip("haiku")

    def net(x):
        x = hk.LayerNorm(-1, True, True)(hk.Linear(4)(x))
        return hk.experimental.layer_stack(3)(lambda x: hk.Linear(4)(x))(x)

    init, _ = hk.transform(net)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 4)))
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    expected = {p for p in paths if p.endswith(("['b']", "['offset']"))}
    assert len(expected) == 3
    assert found(params) == expected

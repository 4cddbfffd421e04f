"""The engine on layers of Flax, Equinox and Haiku: exact, and nothing falls back."""

import engine_oracles as oracles
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fsam_optax._engine import explain, power_sums


IMAGES = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
SENTENCES = jax.random.randint(jax.random.key(1), (3, 6), 0, 11)
SEQUENCES = jax.random.normal(jax.random.key(2), (3, 5, 4), jnp.float32)


class ConvolutionalNetwork(nn.Module):
    """Residual, with every normalisation; batch statistics are fixed."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        y = nn.Conv(8, (3, 3), feature_group_count=8)(x)
        y = nn.relu(nn.GroupNorm(2)(y))
        y = nn.Conv(8, (1, 1), use_bias=False, feature_group_count=2)(y)
        y = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x + y)
        return nn.Dense(3)(nn.LayerNorm()(y.reshape(y.shape[0], -1)))


class Transformer(nn.Module):
    """Tied embedding, attention, layer and root-mean-square normalisation, remat."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(11, 8)
        x = embed(x) + self.param("position", nn.initializers.normal(), (1, 6, 8))
        x = nn.remat(Block)()(x)
        return embed.attend(nn.LayerNorm()(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.RMSNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class ScannedLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Step, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers()(x, None)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4)(nn.tanh(nn.Dense(6)(nn.LayerNorm()(x)))), None


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(5))(x)
        x = nn.RNN(nn.GRUCell(3))(x)
        return nn.RNN(nn.LSTMCell(2))(x)


def linen(module, inputs):
    params = module.init(jax.random.key(3), inputs)
    rest = {name: leaf for name, leaf in params.items() if name != "params"}

    def apply_fn(params, x):
        return module.apply({"params": params, **rest}, x)

    return apply_fn, params["params"], inputs


class WithDropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x)))


def linen_dropout():
    keys = jax.random.split(jax.random.key(4), 3)
    params = WithDropout().init({"params": keys[0], "dropout": keys[1]}, SEQUENCES)

    def apply_fn(params, inputs):
        def one(x, key):
            return WithDropout().apply(params, x, rngs={"dropout": key})

        return jax.vmap(one)(*inputs)

    return apply_fn, params, (SEQUENCES, keys)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, 4, decode=False, use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.norm(x + self.attention(x)))


def flax_nnx():
    graph, params, rest = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)

    def apply_fn(params, x):
        return nnx.merge(graph, params, rest)(x)

    return apply_fn, params, SEQUENCES


def equinox():
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, stride=2, key=keys[0]),
            eqx.nn.GroupNorm(2, 4),
            eqx.nn.ConvTranspose2d(4, 2, 2, key=keys[1]),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.LayerNorm(32),
            eqx.nn.MLP(32, 3, 8, 1, key=keys[2]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply_fn(params, x):
        x = jnp.moveaxis(x, -1, 1)
        return jax.vmap(eqx.combine(params, static))(x)

    return apply_fn, params, IMAGES


def haiku():
    @hk.without_apply_rng
    @hk.transform
    def model(x):
        x = hk.Conv2D(4, 3, stride=2)(x)
        x = hk.LayerNorm(-1, True, True)(jax.nn.relu(x)).reshape(x.shape[0], -1, 4)
        lstm = hk.LSTM(3)
        x, _ = hk.dynamic_unroll(
            lstm, x, lstm.initial_state(x.shape[0]), time_major=False
        )
        return hk.nets.MLP([5, 2])(x[:, -1])

    return model.apply, model.init(jax.random.key(0), IMAGES), IMAGES


MODELS = {
    "linen_convolutional": lambda: linen(ConvolutionalNetwork(), IMAGES),
    "linen_transformer": lambda: linen(Transformer(), SENTENCES),
    "linen_scanned_layers": lambda: linen(ScannedLayers(), SEQUENCES),
    "linen_recurrent": lambda: linen(Recurrent(), SEQUENCES),
    "linen_dropout": linen_dropout,
    "nnx": flax_nnx,
    "equinox": equinox,
    "haiku": haiku,
}


@pytest.fixture
def rank_promotion():
    """The libraries' own layers rely on it."""
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Raised by Haiku.
@pytest.mark.parametrize("name", MODELS)
def test_models(name, rank_promotion):
    apply_fn, params, inputs = MODELS[name]()

    def cotangents(h, _):
        return jnp.stack([jnp.cos(h), jnp.ones_like(h)])

    rules = explain(apply_fn, params, inputs, cotangents)
    assert not [leaf for leaf in rules if "fallback" in leaf.rule], f"\n{rules}"
    sums = jax.jit(lambda p, x: power_sums(apply_fn, p, x, cotangents))(params, inputs)
    expected = oracles.power_sums(apply_fn, params, inputs, cotangents)
    oracles.assert_close(sums, expected, tolerance=2e-5)

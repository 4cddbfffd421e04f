"""Larger models for the benchmarks of cost: a U-Net, a ViT, a Mamba and GPT-2 small."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from cost import Problem
from models import Block


class UNet(nn.Module):
    """Two levels of convolutions with GroupNorm; one label a pixel."""

    width: int = 32
    classes: int = 5

    @nn.compact
    def __call__(self, x):
        """Maps images (batch, height, width, channels) to logits for every pixel."""

        def block(x, features):
            for _ in range(2):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.GroupNorm(4)(x))
            return x

        top = block(x, self.width)
        bottom = block(nn.max_pool(top, (2, 2), (2, 2)), 2 * self.width)
        up = nn.ConvTranspose(self.width, (2, 2), (2, 2))(bottom)
        x = block(jnp.concatenate([top, up], -1), self.width)
        return nn.Conv(self.classes, (1, 1))(x)


class ViT(nn.Module):
    """Patches of 4 x 4, four blocks, the mean over patches."""

    width: int = 128

    @nn.compact
    def __call__(self, x):
        """Maps images (batch, height, width, channels) to logits (batch, 10)."""
        x = nn.Conv(self.width, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])[None]
        for _ in range(4):
            x = Block(4)(x)
        return nn.Dense(10)(jnp.mean(nn.LayerNorm()(x), 1))


class Mamba(nn.Module):
    """Two selective state-space blocks on tokens; one label a token."""

    width: int = 64
    state: int = 8
    vocabulary: int = 256

    @nn.compact
    def __call__(self, tokens):
        """Maps tokens (batch, length) to logits (batch, length, vocabulary)."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        for layer in range(2):
            x += self.mix(nn.RMSNorm()(x), layer)
        return nn.Dense(self.vocabulary)(nn.RMSNorm()(x))

    def mix(self, x, layer):
        """Convolves over time, then runs a recurrence at rates that the input sets."""
        inner = 2 * self.width
        x, gate = jnp.split(nn.Dense(2 * inner)(x), 2, -1)
        x = nn.silu(
            nn.Conv(inner, (4,), padding="CAUSAL", feature_group_count=inner)(x)
        )
        delta = nn.softplus(nn.Dense(inner)(nn.Dense(self.width // 8)(x)))
        into, out = jnp.split(nn.Dense(2 * self.state)(x), 2, -1)
        rates = self.param(
            f"rates_{layer}",
            lambda key, shape: jnp.log(jnp.broadcast_to(jnp.arange(1.0, 9.0), shape)),
            (inner, self.state),
        )
        skip = self.param(f"skip_{layer}", nn.initializers.ones, (inner,))
        decay = jnp.exp(-delta[..., None] * jnp.exp(rates)[None, None])
        driven = (delta * x)[..., None] * into[..., None, :]

        def step(h, inputs):
            decay, driven, out = inputs
            h = decay * h + driven
            return h, jnp.sum(h * out[:, None], -1)

        time_first = [jnp.moveaxis(y, 1, 0) for y in (decay, driven, out)]
        start = jnp.zeros_like(driven[:, 0])
        _, y = jax.lax.scan(step, start, tuple(time_first))
        y = jnp.moveaxis(y, 0, 1) + x * skip[None, None]
        return nn.Dense(self.width)(y * nn.silu(gate))


class GPT2(nn.Module):
    """GPT-2 small by default: 124 million parameters, layers in a scan with remat."""

    width: int = 768
    heads: int = 12
    depth: int = 12
    vocabulary: int = 50257

    @nn.compact
    def __call__(self, tokens):
        """Maps tokens (batch, length) to logits (batch, length, vocabulary)."""
        embed = nn.Embed(self.vocabulary, self.width)
        normal = nn.initializers.normal(0.02)
        positions = self.param("positions", normal, (tokens.shape[1], self.width))
        x = embed(tokens) + positions[None]
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = layers(self.heads)(x, None)
        return embed.attend(nn.LayerNorm()(x))


class Layer(nn.Module):
    """One layer of the scan."""

    heads: int

    @nn.compact
    def __call__(self, x, _):
        """Maps the carry (batch, length, width) to the same."""
        return Block(self.heads, causal=True)(x), None


def language_problem(model, batch: int, length: int, dtype=jnp.float32) -> Problem:
    """Returns the problem of the next token on random text, computed in a dtype."""
    keys = jax.random.split(jax.random.key(0))
    text = jax.random.randint(keys[0], (batch, length + 1), 0, model.vocabulary)
    inputs, labels = text[:, :-1], text[:, 1:]
    params = jax.jit(model.init)(keys[1], inputs[:1])["params"]

    def apply(params, x):
        params = jax.tree.map(lambda w: w.astype(dtype), params)
        return model.apply({"params": params}, x).astype(jnp.float32)

    return Problem(apply, params, (inputs, labels))


def pixel_problem(model, batch: int, size: int) -> Problem:
    """Returns the problem of one label a pixel on random images."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, size, size, 3))
    y = jax.random.randint(keys[1], (batch, size, size), 0, model.classes)
    params = model.init(keys[2], x)["params"]
    return Problem(lambda params, x: model.apply({"params": params}, x), params, (x, y))


def gpt2(batch: int = 2, length: int = 128, dtype=jnp.float32, **options) -> Problem:
    """Returns GPT-2 small on random text."""
    return language_problem(GPT2(**options), batch, length, dtype)

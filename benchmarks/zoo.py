"""Larger networks for the costs of a Fisher diagonal: a U-Net, a ViT and a Mamba."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from models import Block


class UNet(nn.Module):
    """Two levels of convolutions with GroupNorm; one label a pixel."""

    width: int = 32
    classes: int = 5

    @nn.compact
    def __call__(self, x):
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
    """Patches of 4 x 4, four blocks, the mean over patches: ten classes."""

    width: int = 128

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])[None]
        for _ in range(4):
            x, _ = Block(4)(x)
        return nn.Dense(10)(jnp.mean(nn.LayerNorm()(x), 1))


class Selective(nn.Module):
    """Convolves over time, then runs a recurrence at rates that the input sets.

    Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023.
    """

    state: int

    @nn.compact
    def __call__(self, x):
        width, inner = x.shape[-1], 2 * x.shape[-1]
        x, gate = jnp.split(nn.Dense(2 * inner)(x), 2, -1)
        x = nn.Conv(inner, (4,), padding="CAUSAL", feature_group_count=inner)(x)
        x = nn.silu(x)
        delta = nn.softplus(nn.Dense(inner)(nn.Dense(width // 8)(x)))
        into, out = jnp.split(nn.Dense(2 * self.state)(x), 2, -1)
        log = nn.initializers.constant(jnp.log(jnp.arange(1.0, 1 + self.state)))
        rates = jnp.exp(self.param("log_rates", log, (inner, self.state)))
        skip = self.param("skip", nn.initializers.ones, (inner,))

        def step(h, inputs):
            x, delta, into, out = inputs
            decay = jnp.exp(-delta[..., None] * rates[None])
            h = decay * h + (delta * x)[..., None] * into[:, None]
            return h, jnp.sum(h * out[:, None], -1)

        start = jnp.zeros((len(x), inner, self.state))
        time_first = [jnp.moveaxis(y, 1, 0) for y in (x, delta, into, out)]
        _, y = jax.lax.scan(step, start, time_first)
        y = jnp.moveaxis(y, 0, 1) + x * skip[None, None]
        return nn.Dense(width)(y * nn.silu(gate))


class Mamba(nn.Module):
    """Two selective layers over tokens; one label a token."""

    width: int = 64
    state: int = 8
    vocabulary: int = 256

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        for _ in range(2):
            x += Selective(self.state)(nn.RMSNorm()(x))
        return nn.Dense(self.vocabulary)(nn.RMSNorm()(x))

"""Networks in Flax Linen: images to ten classes, and tokens to classes or tokens."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def convolve(inputs, kernel, strides, padding, *args, **kwargs):
    """Convolution without groups or dilation, `jax.lax.conv_general_dilated` to Flax.

    On a CPU it is one matrix product over shifted copies of the input: a convolution
    in a `lax.scan` leaves XLA's fast CPU path and takes about ten times as long, and
    with the kernels of several seeds under `vmap` it becomes a grouped one, which is
    slow everywhere on CPU.
    """
    if jax.default_backend() != "cpu":
        every = inputs, kernel, strides, padding, *args
        return jax.lax.conv_general_dilated(*every, **kwargs)
    window = kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(inputs.shape[1:3], window, strides, padding)
    inputs = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    # One past the last window's first pixel, per axis.
    rows, columns = np.subtract(inputs.shape[1:3], window) + 1
    shifted = [
        inputs[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i, j in np.ndindex(*window)
    ]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, kernel.shape[-1])


Conv = partial(nn.Conv, conv_general_dilated=convolve)


class MLP(nn.Module):
    """Dense layers."""

    widths: tuple[int, ...] = (512, 512)
    classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class CNN(nn.Module):
    """Three convolutions and a linear layer."""

    width: int = 16
    strides: tuple[int, ...] = (1, 2, 1)
    conv: Any = Conv

    @nn.compact
    def __call__(self, x, train: bool = False):
        for factor, stride in zip((1, 2, 2), self.strides, strict=True):
            x = nn.relu(self.conv(factor * self.width, (3, 3), (stride, stride))(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class ResNet(nn.Module):
    """ResNet-18 for small images: 3 x 3 stem, no pooling, eight blocks with BatchNorm.

    With `width=64` that of He et al., Deep Residual Learning for Image Recognition,
    2016, table 1, but for the stem. With groups, GroupNorm stands in the place of
    BatchNorm, so that the outputs of an example are its own.
    """

    width: int = 16
    conv: Any = Conv
    groups: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv = partial(self.conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        if self.groups:
            norm = partial(nn.GroupNorm, num_groups=self.groups, dtype=self.dtype)
        x = nn.relu(norm()(conv(self.width, (3, 3))(x)))
        for stage, block in np.ndindex(4, 2):
            features = self.width * 2**stage
            stride = 2 if stage and not block else 1
            y = nn.relu(norm()(conv(features, (3, 3), (stride, stride))(x)))
            y = norm()(conv(features, (3, 3))(y))
            if x.shape != y.shape:
                x = norm()(conv(features, (1, 1), (stride, stride))(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)).astype(jnp.float32))


class ResNet9(nn.Module):
    """Page, How to train your ResNet, 2018; GroupNorm in the place of BatchNorm."""

    width: int = 64
    groups: int = 8
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        def layer(x, factor):
            size = factor * self.width, (3, 3)
            x = Conv(*size, use_bias=False, dtype=self.dtype)(x)
            return nn.relu(nn.GroupNorm(self.groups, dtype=self.dtype)(x))

        x = layer(x, 1)
        for factor, residual in ((2, True), (4, False), (8, True)):
            x = nn.max_pool(layer(x, factor), (2, 2), (2, 2))
            if residual:
                x += layer(layer(x, factor), factor)
        x = x.max((1, 2)).astype(jnp.float32)
        return nn.Dense(10, use_bias=False)(x) / 8


class Block(nn.Module):
    """Pre-norm attention and two dense layers; causal for language models."""

    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        """Maps (batch, length, width) to the same, the carry of a scan."""
        y = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        x += nn.MultiHeadDotProductAttention(self.heads)(y, y, mask=mask)
        y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


class Transformer(nn.Module):
    """Two blocks over tokens, and a linear layer on their mean: ten classes."""

    width: int = 128
    heads: int = 4
    vocabulary: int = 1000

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])[None]
        for _ in range(2):
            x, _ = Block(self.heads)(x)
        return nn.Dense(10)(jnp.mean(nn.LayerNorm()(x), axis=1))


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
        x = embed(tokens)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])[None]
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = layers(self.heads, causal=True)(x, None)
        return embed.attend(nn.LayerNorm()(x))


MODELS = {
    "mlp": partial(MLP, (128, 128)),
    "cnn": CNN,
    "resnet": partial(ResNet, groups=4),
    # In their own widths, products in bfloat16.
    "resnet9": partial(ResNet9, dtype=jnp.bfloat16),
    "resnet18": partial(ResNet, width=64, groups=8, dtype=jnp.bfloat16),
}

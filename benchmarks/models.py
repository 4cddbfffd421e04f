"""Small image classifiers in Flax Linen: images in, logits of ten classes out."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def convolve(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Any,
    *args: Any,
    **kwargs: Any,
) -> jax.Array:
    """Convolution without groups or dilation, `jax.lax.conv_general_dilated` to Flax.

    On a CPU it is one matrix product over shifted copies of the input: a convolution
    in a `lax.scan` leaves XLA's fast CPU path and takes about ten times as long, and
    with the kernels of several seeds under `vmap` it becomes a grouped one, which is
    slow everywhere on CPU. Elsewhere it is the convolution of `jax.lax`.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(
            inputs, kernel, strides, padding, *args, **kwargs
        )
    window, features = kernel.shape[:2], kernel.shape[-1]
    size = inputs.shape[1:3]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(size, window, strides, padding)
    inputs = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    # One past the last window's first pixel, per axis.
    stop = [s + sum(p) - w + 1 for s, p, w in zip(size, padding, window, strict=True)]
    shifted = [
        inputs[:, i : i + stop[0] : strides[0], j : j + stop[1] : strides[1]]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, features)


Conv = partial(nn.Conv, conv_general_dilated=convolve)


class MLP(nn.Module):
    """Dense layers."""

    widths: tuple[int, ...] = (512, 512)
    classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Maps images, or rows of features, to logits (batch, classes)."""
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class CNN(nn.Module):
    """Three convolutions, the second with stride 2, and a linear layer."""

    width: int = 16

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Maps images (batch, height, width, channels) to logits (batch, 10)."""
        for features, stride in ((1, 1), (2, 2), (2, 1)):
            x = Conv(self.width * features, (3, 3), (stride, stride))(x)
            x = nn.relu(x)
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class ResNet(nn.Module):
    """ResNet-18 for small images: 3 x 3 stem, no pooling, eight blocks with BatchNorm.

    `width=64` and `blocks=(2, 2, 2, 2)` is He et al., Deep Residual Learning for Image
    Recognition, 2016, table 1, with the stem that is usual for 32 x 32 images. The
    default is a quarter as wide. With groups, GroupNorm stands in the place of
    BatchNorm, so that the outputs of an example are its own.
    """

    width: int = 16
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    conv: Any = Conv
    groups: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Maps images (batch, height, width, channels) to logits (batch, 10)."""
        conv = partial(self.conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        if self.groups:
            norm = partial(nn.GroupNorm, num_groups=self.groups, dtype=self.dtype)
        x = nn.relu(norm()(conv(self.width, (3, 3))(x)))
        for stage, blocks in enumerate(self.blocks):
            features = self.width * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(features, (3, 3), (stride, stride))(x)))
                y = norm()(conv(features, (3, 3))(y))
                if x.shape != y.shape:
                    x = norm()(conv(features, (1, 1), (stride, stride))(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)).astype(jnp.float32))


class Block(nn.Module):
    """Pre-norm attention and two dense layers; causal for language models."""

    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x):
        """Maps (batch, length, width) to the same."""
        y = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        x += nn.MultiHeadDotProductAttention(self.heads)(y, y, mask=mask)
        y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y))


MODELS = {
    "mlp": partial(MLP, (128, 128)),
    "cnn": CNN,
    "resnet": partial(ResNet, groups=4),
    # ResNet-18 itself, products in bfloat16.
    "resnet18": partial(ResNet, width=64, groups=8, dtype=jnp.bfloat16),
}

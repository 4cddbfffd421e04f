# pyright: reportMissingImports=false
"""Models in PyTorch that JAX computes too, from the same parameters by name."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fsam_optax as fsam


try:
    import torch
    from torch import nn
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: the docstring says what this script wants") from None


def in_jax(module, params, x, path=""):
    """Computes what a module does in evaluation mode."""

    def own(name):
        return params[path + name]

    def call(name, x):
        return in_jax(getattr(module, name), params, x, f"{path}{name}.")

    match module:
        case nn.Sequential():
            for name, _ in module.named_children():
                x = call(name, x)
            return x
        case nn.Linear():
            return x @ own("weight").T + own("bias")
        case nn.Conv2d():
            padding = [(p, p) for p in module.padding]
            args = x, own("weight"), module.stride, padding
            names = "NCHW", "OIHW", "NCHW"
            x = jax.lax.conv_general_dilated(*args, dimension_numbers=names)
            return x if module.bias is None else x + own("bias")[:, None, None]
        case nn.BatchNorm2d():
            mean, variance = (
                jnp.asarray(a.numpy(), x.dtype)[:, None, None]
                for a in (module.running_mean, module.running_var)
            )
            x = (x - mean) * jax.lax.rsqrt(variance + module.eps)
            return x * own("weight")[:, None, None] + own("bias")[:, None, None]
        case nn.LayerNorm():
            x = jax.nn.standardize(x, epsilon=module.eps)
            return x * own("weight") + own("bias")
        case nn.Embedding():
            return own("weight")[x]
        case nn.ReLU():
            return jax.nn.relu(x)
        case nn.Flatten():
            return x.reshape(len(x), -1)
        case nn.AdaptiveAvgPool2d():
            return x.mean((2, 3), keepdims=True)
    return module.compute(call, own, x)


class Own(nn.Module):
    """A module of parts, with one definition for both: `compute`.

    `compute(call, own, x)` calls a part by name, or takes a parameter.
    """

    def __init__(self, compute, **parts):
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        own = partial(getattr, self)
        return self.compute(lambda name, x: own(name)(x), own, x)


def normalized(before, features, size, stride=1):
    options = {"padding": size // 2, "bias": False}
    convolution = nn.Conv2d(before, features, size, stride, **options)
    return [convolution, nn.BatchNorm2d(features)]


def block(before, features, stride):
    """Two convolutions and a shortcut, as in `models.ResNet`."""

    def compute(call, own, x):
        return call("relu", call("path", x) + call("shortcut", x))

    first = normalized(before, features, 3, stride)
    path = nn.Sequential(*first, nn.ReLU(), *normalized(features, features, 3))
    short = normalized(before, features, 1, stride) if stride > 1 else []
    return Own(compute, path=path, relu=nn.ReLU(), shortcut=nn.Sequential(*short))


def attention(width):
    """Self-attention of dense layers, with a shortcut; one head."""

    def compute(call, own, x):
        scores = call("query", x) @ call("key", x).swapaxes(-1, -2)
        softmax = torch.softmax if isinstance(x, torch.Tensor) else jax.nn.softmax
        weights = softmax(scores / x.shape[-1] ** 0.5, -1)
        return x + call("out", weights @ call("value", x))

    names = "query", "key", "value", "out"
    return Own(compute, **{name: nn.Linear(width, width) for name in names})


def shortcut(*layers):
    """Layers, and what went in added to what comes out."""
    path = nn.Sequential(*layers)
    return Own(lambda call, own, x: x + call("path", x), path=path)


def positions(length, width):
    """Adds a parameter of its own, which belongs to no layer."""
    places = nn.Parameter(0.02 * torch.randn(length, width))
    return Own(lambda call, own, x: x + own("positions"), positions=places)


def twice(width):
    """The same layer, one time after the other."""
    layer = nn.Sequential(nn.Linear(width, width), nn.ReLU())
    return Own(lambda call, own, x: call("layer", call("layer", x)), layer=layer)


def mean():
    """The mean over positions."""
    return Own(lambda call, own, x: x.mean(1))


def mlp(*widths):
    widths = widths or (784, 512, 512, 10)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    between = [x for layer in layers for x in (layer, nn.ReLU())]
    return nn.Sequential(*between[:-1])


def cnn(channels=(3, 32, 64, 64), size=32, classes=10):
    layers = []
    for a, b in itertools.pairwise(channels):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU()]
        size = (size + 1) // 2
    features = size * size * channels[-1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


def resnet(width=16, stages=4, blocks=2, classes=10):
    layers, before = [*normalized(3, width, 3), nn.ReLU()], width
    for stage in range(stages):
        for number in range(blocks):
            stride = 2 if stage and not number else 1
            layers.append(block(before, width * 2**stage, stride))
            before = width * 2**stage
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)
    return nn.Sequential(*layers, *head)


def transformer(length=64, width=128, blocks=2, vocabulary=1000, classes=10):
    """Pre-norm encoder blocks over tokens, and a dense layer on their mean."""
    layers = [nn.Embedding(vocabulary, width), positions(length, width)]
    for _ in range(blocks):
        layers += [
            shortcut(nn.LayerNorm(width), attention(width)),
            shortcut(nn.LayerNorm(width), *mlp(width, 4 * width, width)),
        ]
    return nn.Sequential(
        *layers, nn.LayerNorm(width), mean(), nn.Linear(width, classes)
    )


class Problem(NamedTuple):
    """A model in evaluation mode and a batch; real labels mean regression."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor

    @property
    def real(self) -> bool:
        return self.y.is_floating_point()

    def loss(self, **options: Any) -> nn.Module:
        return (nn.MSELoss if self.real else nn.CrossEntropyLoss)(**options)

    def gradient(self):
        params = list(self.model.parameters())
        return torch.autograd.grad(self.loss()(self.model(self.x), self.y), params)

    def loader(self):
        data = torch.utils.data.TensorDataset(self.x, self.y)
        return torch.utils.data.DataLoader(data, batch_size=len(self.x))

    def apply(self, params, x):
        return in_jax(self.model, params, x)

    def nll(self):
        likelihood = fsam.gaussian() if self.real else fsam.categorical
        return fsam.negative_log_likelihood(self.apply, likelihood)

    def in_jax(self, dtype: Any = jnp.float32):
        """Returns parameters and batch; real numbers in a type."""

        def array(t):
            kind = dtype if t.is_floating_point() else None
            return jnp.asarray(t.detach().numpy(), kind)

        params = {name: array(p) for name, p in self.model.named_parameters()}
        return params, (array(self.x), array(self.y))

    def parts(self, found) -> dict[str, np.ndarray]:
        """Returns a vector, or a tree, as arrays by name."""
        if isinstance(found, dict):
            return {name: np.asarray(found[name]) for name in found}
        named = dict(self.model.named_parameters())
        missing = sum(p.numel() for p in named.values()) - found.numel()
        if missing:
            raise NotImplementedError(f"{missing} parameters left out")
        pieces = torch.split(found.detach(), [p.numel() for p in named.values()])
        return {
            name: piece.reshape(p.shape).numpy()
            for (name, p), piece in zip(named.items(), pieces, strict=True)
        }

    def reference(self):
        """Returns exact, empirical and squared batch gradient, in float64.

        From the gradients of each example and output.
        """

        def one(example):
            x, y = example
            h, pull = jax.vjp(lambda p: self.apply(p, x[None])[0], params)
            (rows,) = jax.vmap(pull)(jnp.eye(len(h)))
            # Scores of all labels, each with its probability; of the label there is.
            if self.real:
                weights, scores, score = jnp.ones(len(h)), jnp.eye(len(h)), y - h
            else:
                weights = jax.nn.softmax(h)
                scores = jnp.eye(len(h)) - weights
                score = scores[y]

            def exact(j):
                return jnp.tensordot(weights, jnp.tensordot(scores, j, 1) ** 2, 1)

            single = jax.tree.map(lambda j: jnp.tensordot(score, j, 1), rows)
            squares = jax.tree.map(jnp.square, single)
            return jax.tree.map(exact, rows), squares, single

        with jax.enable_x64(True):
            params, batch = self.in_jax(jnp.float64)
            found = jax.jit(partial(jax.lax.map, one))(batch)
            means = jax.tree.map(lambda a: np.asarray(a.mean(0)), found)
        return *means[:2], jax.tree.map(np.square, means[2])


def make_problem(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    batch: int = 8,
    classes: int = 10,
    tokens: int = 0,
    factor: float = 1.0,
) -> Problem:
    """Returns a problem of random data; without classes a regression.

    The last layer is multiplied by a factor.
    """
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in list(model.parameters())[-2:]:
            p.mul_(factor)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2.0)
    x = torch.randint(tokens, (batch, *shape)) if tokens else torch.randn(batch, *shape)
    y = torch.randint(classes, (batch,)) if classes else torch.randn(batch, 1)
    return Problem(model, x, y)


MODELS = {
    "mlp": partial(make_problem, mlp, (784,), 128),
    "cnn": partial(make_problem, cnn, (3, 32, 32), 32),
    "resnet": partial(make_problem, resnet, (3, 32, 32), 8),
    "transf.": partial(make_problem, transformer, (64,), 8, tokens=1000),
}


def case(make: Callable, *shape: int, **options: Any) -> Callable[[], Problem]:
    return partial(make_problem, make, shape, **({"classes": 3} | options))


def after(layer: Callable, *layers: Callable) -> Callable[[], nn.Module]:
    """A layer, the mean over positions, and a dense layer."""
    return lambda: nn.Sequential(layer(), *(f() for f in layers), nn.Linear(6, 3))


LINEAR = partial(nn.Linear, 6, 6)
# What each library claims, and what goes wrong where nobody says so.
CASES = {
    "dense": case(partial(mlp, 6, 5, 3), 6),
    "convolutions": case(partial(cnn, (2, 3, 4), 6, 3), 2, 6, 6),
    "BatchNorm, fixed": case(partial(resnet, 2, 2, 1, 3), 3, 6, 6),
    "LayerNorm": case(after(LINEAR, partial(nn.LayerNorm, 6)), 6),
    "embedding": case(after(partial(nn.Embedding, 9, 6), mean), 5, tokens=9),
    "sequence": case(after(LINEAR, nn.ReLU, mean), 5, 6),
    "attention": case(after(partial(attention, 6), mean), 5, 6),
    "layer used twice": case(after(partial(twice, 6)), 6),
    "bare parameter": case(after(partial(positions, 5, 6), mean), 5, 6),
    "confident": case(after(LINEAR, nn.ReLU), 6, factor=100.0),
    "certain": case(after(LINEAR, nn.ReLU), 6, factor=300.0),
    "regression": case(partial(mlp, 6, 5, 1), 6, classes=0),
}

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
            x = jax.lax.conv_general_dilated(
                x,
                own("weight"),
                module.stride,
                [(p, p) for p in module.padding],
                dimension_numbers=("NCHW", "OIHW", "NCHW"),
            )
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
    return module.compute(call, own, jax.nn.softmax, x)


class Own(nn.Module):
    """A module with one definition for both: `compute`."""

    def forward(self, x):
        return self.compute(
            lambda name, x: getattr(self, name)(x),
            lambda name: getattr(self, name),
            torch.softmax,
            x,
        )


def normalized(before, features, size, stride=1):
    convolution = nn.Conv2d(
        before, features, size, stride, padding=size // 2, bias=False
    )
    return [convolution, nn.BatchNorm2d(features)]


class Block(Own):
    """Two convolutions and a shortcut, as in `models.ResNet`."""

    def __init__(self, before, features, stride):
        super().__init__()
        first = normalized(before, features, 3, stride)
        second = normalized(features, features, 3)
        self.path = nn.Sequential(*first, nn.ReLU(), *second)
        self.relu = nn.ReLU()
        short = normalized(before, features, 1, stride) if stride > 1 else []
        self.shortcut = nn.Sequential(*short)

    def compute(self, call, own, softmax, x):
        return call("relu", call("path", x) + call("shortcut", x))


class Attention(Own):
    """Self-attention of dense layers, with a shortcut; one head."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def compute(self, call, own, softmax, x):
        scores = call("query", x) @ call("key", x).swapaxes(-1, -2)
        weights = softmax(scores / x.shape[-1] ** 0.5, -1)
        return x + call("out", weights @ call("value", x))


class Shortcut(Own):
    """A module with a shortcut."""

    def __init__(self, *layers):
        super().__init__()
        self.path = nn.Sequential(*layers)

    def compute(self, call, own, softmax, x):
        return x + call("path", x)


class Positions(Own):
    """Adds a parameter of its own, which belongs to no layer."""

    def __init__(self, length, width):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.inner = nn.Sequential()

    def compute(self, call, own, softmax, x):
        return call("inner", x) + own("positions")


class Twice(Own):
    """The same layer, one time after the other."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def compute(self, call, own, softmax, x):
        return call("layer", call("layer", x))


class Mean(Own):
    """The mean over positions."""

    def compute(self, call, own, softmax, x):
        return x.mean(1)


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
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Block(before, width * 2**stage, stride))
            before = width * 2**stage
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)
    return nn.Sequential(*layers, *head)


def transformer(length=64, width=128, blocks=2, vocabulary=1000, classes=10):
    """Pre-norm encoder blocks over tokens, and a dense layer on their mean."""
    layers = [nn.Embedding(vocabulary, width), Positions(length, width)]
    for _ in range(blocks):
        layers += [
            Shortcut(nn.LayerNorm(width), Attention(width)),
            Shortcut(nn.LayerNorm(width), *mlp(width, 4 * width, width)),
        ]
    return nn.Sequential(
        *layers, nn.LayerNorm(width), Mean(), nn.Linear(width, classes)
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
            return jnp.asarray(
                t.detach().numpy(), dtype if t.is_floating_point() else None
            )

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
    "embedding": case(after(partial(nn.Embedding, 9, 6), Mean), 5, tokens=9),
    "sequence": case(after(LINEAR, nn.ReLU, Mean), 5, 6),
    "attention": case(after(partial(Attention, 6), Mean), 5, 6),
    "layer used twice": case(after(partial(Twice, 6)), 6),
    "bare parameter": case(after(partial(Positions, 5, 6), Mean), 5, 6),
    "confident": case(after(LINEAR, nn.ReLU), 6, factor=100.0),
    "certain": case(after(LINEAR, nn.ReLU), 6, factor=300.0),
    "regression": case(partial(mlp, 6, 5, 1), 6, classes=0),
}

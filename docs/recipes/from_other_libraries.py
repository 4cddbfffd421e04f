# pyright: reportMissingImports=false
"""Question: do other libraries find the same diagonals, and what do they cost there?

The same weights and data in PyTorch and in JAX. The error is the largest difference
from a float64 reference that forms the gradient of each example and label, within an
array of parameters, relative to the largest entry there. The time is processor time on
one core, relative to the library's own gradient of the batch in the same round. It
wants its own environment:

    pip install torch==2.13.0+cpu flax rich .
    pip install --no-deps backpack-for-pytorch unfoldNd nngeometry laplace-torch \\
        asdfghjkl==0.1a4 curvlinops-for-pytorch einops einconv opt_einsum tqdm \\
        linear_operator torchmetrics lightning-utilities packaging
    taskset -c 0 python docs/recipes/from_other_libraries.py

laplace-torch runs with its default backend, curvlinops, and with ASDL.
"""

import copy
import importlib
import itertools
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import cost
import harness
import jax
import jax.numpy as jnp
import numpy as np
import show
import torch
from torch import nn

import fsam_optax as fsam


EXACT, EMPIRICAL = KINDS = ("exact", "empirical")
OURS, SQUARED = "fsam_optax", "squared gradient"
RIGHT = 1e-5
LARGEST = 2e9  # Bytes of Jacobians that a peer may form.


# Models in PyTorch, and what they compute in JAX.


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean(1)


class Twice(nn.Module):
    """The same layer, one time after the other."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, x):
        return self.layer(self.layer(x))


class Residual(nn.Module):
    """Two convolutions and a shortcut, as in `models.ResNet`."""

    def __init__(self, before, features, stride):
        super().__init__()
        first = normalized(before, features, 3, stride)
        second = normalized(features, features, 3)
        self.path = nn.Sequential(*first, nn.ReLU(), *second)
        short = normalized(before, features, 1, stride) if stride > 1 else []
        self.shortcut = nn.Sequential(*short)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.path(x) + self.shortcut(x))


def in_jax(module, params, x, path=""):
    """Computes what a module does, from parameters by name."""
    weight, bias = (params.get(path + name) for name in ("weight", "bias"))
    match module:
        case nn.Sequential():
            for name, child in module.named_children():
                x = in_jax(child, params, x, f"{path}{name}.")
            return x
        case Twice():
            x = in_jax(module.layer, params, x, f"{path}layer.")
            return in_jax(module.layer, params, x, f"{path}layer.")
        case Residual():
            short = in_jax(module.shortcut, params, x, f"{path}shortcut.")
            return jax.nn.relu(in_jax(module.path, params, x, f"{path}path.") + short)
        case nn.Linear():
            x = x @ weight.T
            return x + jnp.broadcast_to(bias, x.shape)
        case nn.Conv2d():
            args = module.stride, [(p, p) for p in module.padding]
            x = jax.lax.conv_general_dilated(x, weight, *args)
            return x if bias is None else x + bias[None, :, None, None]
        case nn.BatchNorm2d():
            fixed = module.running_mean, module.running_var, weight, bias
            m, v, w, b = (jnp.asarray(a, x.dtype)[None, :, None, None] for a in fixed)
            return (x - m) * jax.lax.rsqrt(v + module.eps) * w + b
        case nn.AdaptiveAvgPool2d():
            return x.mean((2, 3), keepdims=True)
        case nn.Embedding():
            return weight[x]
        case nn.ReLU():
            return jax.nn.relu(x)
        case Mean():
            return x.mean(1)
        case _:  # Flatten
            return x.reshape(len(x), -1)


def mlp(*widths: int) -> list[nn.Module]:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return [x for layer in layers for x in (layer, nn.ReLU())][:-1]


def cnn(*sizes: int) -> list[nn.Module]:
    """Convolutions between channels; the last two sizes are of a dense layer."""
    layers = []
    for a, b in itertools.pairwise(sizes[:-2]):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU()]
    return [*layers, nn.Flatten(), nn.Linear(*sizes[-2:])]


def normalized(before: int, features: int, size: int, stride: int = 1) -> list:
    """A convolution and BatchNorm with statistics of its own."""
    norm = nn.BatchNorm2d(features)
    norm.running_mean.normal_(std=0.1)
    norm.running_var.uniform_(0.5, 2.0)
    options = {"padding": size // 2, "bias": False}
    return [nn.Conv2d(before, features, size, stride, **options), norm]


def resnet(*widths: int) -> list[nn.Module]:
    """Two blocks a width; the first of a larger width halves the image."""
    layers, before = [*normalized(3, widths[0], 3), nn.ReLU()], widths[0]
    for width in widths:
        layers.append(Residual(before, width, 2 if width > before else 1))
        layers.append(Residual(width, width, 1))
        before = width
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)]


class Problem(NamedTuple):
    """A model and a batch."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor

    def gradient(self):
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        return torch.autograd.grad(loss, list(self.model.parameters()))

    def loader(self):
        data = torch.utils.data.TensorDataset(self.x, self.y)
        return torch.utils.data.DataLoader(data, batch_size=len(self.x))

    def nll(self):
        apply = partial(in_jax, self.model)
        return fsam.negative_log_likelihood(apply, fsam.categorical)

    def in_jax(self, dtype: Any = jnp.float32):
        """Returns parameters and batch; real numbers in a type."""

        def array(t):
            return jnp.asarray(t.detach(), dtype if t.is_floating_point() else None)

        params = {name: array(p) for name, p in self.model.named_parameters()}
        return params, (array(self.x), array(self.y))

    def parts(self, found) -> dict[str, np.ndarray]:
        """Returns a vector, or a tree, as arrays by name."""
        if not isinstance(found, dict):
            named = dict(self.model.named_parameters())
            pieces = torch.split(found.detach(), [p.numel() for p in named.values()])
            found = dict(zip(named, pieces, strict=True))
        return {name: np.asarray(found[name]).ravel() for name in found}

    def reference(self) -> dict[str, dict[str, np.ndarray]]:
        """Returns the diagonals in float64, from scores of each example and label."""

        def one(example):
            def log_p(params):
                return jax.nn.log_softmax(in_jax(self.model, params, example[0][None]))

            p = jnp.exp(log_p(params)[0])
            scores = jax.tree.map(lambda s: s[0], jax.jacrev(log_p)(params))
            score = jax.tree.map(lambda s: s[example[1]], scores)
            exact = jax.tree.map(lambda s: jnp.tensordot(p, s**2, 1), scores)
            return exact, jax.tree.map(jnp.square, score), score

        with jax.enable_x64(True):
            params, batch = self.in_jax(jnp.float64)
            found = jax.jit(partial(jax.lax.map, one))(batch)
            exact, empirical, score = jax.tree.map(lambda a: a.mean(0), found)
            found = exact, empirical, jax.tree.map(jnp.square, score)
            names = *KINDS, SQUARED
            return dict(zip(names, map(self.parts, found), strict=True))


def problem(layers, x, classes=3, factor=1.0) -> Problem:
    """Returns a problem of random labels, the last layer multiplied by a factor."""
    for p in layers[-1].parameters():
        p.data.mul_(factor)
    return Problem(nn.Sequential(*layers).eval(), x, torch.randint(classes, (len(x),)))


# What each library claims, and what goes wrong where nobody says so.
CASES: dict[str, Callable[[], Problem]] = {
    "dense": lambda: problem(mlp(6, 5, 3), torch.randn(8, 6)),
    "convolutions": lambda: problem(cnn(2, 3, 4, 16, 3), torch.randn(8, 2, 6, 6)),
    "embedding": lambda: problem(
        [nn.Embedding(9, 6), Mean(), nn.Linear(6, 3)], torch.randint(9, (8, 5))
    ),
    "sequence": lambda: problem(
        [nn.Linear(6, 6), nn.ReLU(), Mean(), nn.Linear(6, 3)], torch.randn(8, 5, 6)
    ),
    "layer used twice": lambda: problem([Twice(6), nn.Linear(6, 3)], torch.randn(8, 6)),
    "confident": lambda: problem(mlp(6, 6, 3), torch.randn(8, 6), factor=100.0),
    "certain": lambda: problem(mlp(6, 6, 3), torch.randn(8, 6), factor=300.0),
    "mlp": lambda: problem(mlp(784, 512, 512, 10), torch.randn(128, 784), 10),
    "cnn": lambda: problem(
        cnn(3, 32, 64, 64, 1024, 10), torch.randn(32, 3, 32, 32), 10
    ),
    "resnet": lambda: problem(resnet(16, 32, 64, 128), torch.randn(8, 3, 32, 32), 10),
}
TIMED = "mlp", "cnn", "resnet"


# One function a library: it returns `run()`, which computes the mean over examples, as
# a vector in the order of the parameters.


def ours(problem: Problem, kind: str) -> Callable:
    make = fsam.fisher_exact if kind == EXACT else fsam.fisher_empirical
    fn = partial(fsam.diagonal, make(problem.nll()))
    return partial(jax.jit(fn), *problem.in_jax())


def backpack(problem: Problem, kind: str) -> Callable:
    from backpack import backpack, extend, extensions

    names = {EXACT: "DiagGGNExact", EMPIRICAL: "SumGradSquared"}
    extension = getattr(extensions, names[kind])()
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    # Operations of the graph as modules that it knows, where there are any.
    own = any(isinstance(layer, Mean | Twice | Residual) for layer in problem.model)
    model = extend(copy.deepcopy(problem.model), use_converter=own).eval()

    def run():
        model.zero_grad()
        with backpack(extension):
            loss(model(problem.x), problem.y).backward()
        found = [getattr(p, extension.savefield) for p in model.parameters()]
        return torch.cat([f.flatten() for f in found]) / len(problem.x)

    return run


def nngeometry(problem: Problem, kind: str) -> Callable:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    model = copy.deepcopy(problem.model)
    options: dict[str, Any] = {"variant": "classif_logits"}
    if kind == EMPIRICAL:
        # It has no name for it; the square of the loss's own derivative it is.
        def losses(x, y):
            return nn.functional.cross_entropy(model(x), y, reduction="none")[:, None]

        options = {"variant": "regression", "function": losses}
    return lambda: FIM(model, problem.loader(), PMatDiag, **options).get_diag()


def laplace(backend: str, problem: Problem, kind: str) -> Callable:
    # Not the recipe of this name, which lies beside this script.
    beside = pathlib.Path(__file__).resolve().parent
    sys.path[:] = [x for x in sys.path if pathlib.Path(x).resolve() != beside]
    package = importlib.import_module("laplace")
    curvature = importlib.import_module("laplace.curvature")
    model = copy.deepcopy(problem.model)
    size = 4 * sum(p.numel() for p in model.parameters()) * model(problem.x).numel()
    if backend == "Curvlinops" and kind == EXACT and size > LARGEST:
        raise MemoryError(f"{size / 1e9:.1f} GB of Jacobians")
    name = backend + ("EF" if kind == EMPIRICAL else "GGN")
    options = {"hessian_structure": "diag", "subset_of_weights": "all"}
    backend = getattr(curvature, name)
    posterior = package.Laplace(model, "classification", backend=backend, **options)

    def run():
        posterior.fit(problem.loader())
        return posterior.H / len(problem.x)

    return run


LIBRARIES = {
    OURS: ours,
    "BackPACK": backpack,
    "nngeometry": nngeometry,
    "laplace-torch": partial(laplace, "Curvlinops"),
    "ASDL": partial(laplace, "Asdl"),
}


def error_of(found: dict, true: dict) -> float:
    return np.max([abs(found[name] - a).max() / a.max() for name, a in true.items()])


def measure(name: str, repeats: int) -> dict:
    """Returns for each library and kind its error, or why it fails, and its time."""
    torch.manual_seed(0)
    problem = CASES[name]()
    true = problem.reference()
    own = partial(jax.jit(jax.grad(problem.nll())), *problem.in_jax())
    apart = error_of(true[SQUARED], true[EMPIRICAL])
    results: dict = {SQUARED: {EMPIRICAL: {"error": apart}}}
    for library, kind in itertools.product(LIBRARIES, KINDS):
        facts = results.setdefault(library, {})[kind] = {}
        try:
            run = LIBRARIES[library](problem, kind)
            facts["error"] = error_of(problem.parts(run()), true[kind])
        except Exception as error:  # What a peer cannot do is part of the answer.
            if library == OURS:
                raise
            facts["fails"] = f"{type(error).__name__}: {error}"[:200]
            continue
        if repeats:
            yardstick = own if library == OURS else problem.gradient
            runs = {"gradient": yardstick, "diagonal": run}
            facts |= cost.ratios(runs, repeats, time.process_time)["diagonal"]
    return results


def written(facts: dict) -> str:
    """Writes the facts of a cell in a few characters."""
    if "fails" in facts:
        return "-" if facts["fails"].startswith("MemoryError") else "fails"
    error = facts["error"]
    if error is None:
        return "NaN"
    text = f"{error:.0e}" if error < RIGHT else f"off {error:.0%}"
    return f"{text} {facts['ratio']:.1f}" if "ratio" in facts else text


@harness.experiment(
    smoke={"cases": ["dense"], "repeats": 2},
    cases={"nargs": "+", "choices": CASES, "default": [*CASES]},
    repeats=3,
)
def main(run: harness.Run) -> None:
    names, repeats = run.options.cases, run.options.repeats
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = run.each("case", [n for n in names if n not in TIMED], measure, 0)
    timed = [name for name in names if name in TIMED]
    results |= run.each("case", timed, measure, repeats, repeats=repeats)
    for kind, columns in zip(KINDS, (LIBRARIES, (*LIBRARIES, SQUARED)), strict=True):
        rows = [
            [name, *(written(facts[column][kind]) for column in columns)]
            for name, facts in results.items()
        ]
        title = f"The {kind} diagonal: error, and time in gradients"
        show.table(title, ["", *columns], rows, first=20)


if __name__ == "__main__":
    raise SystemExit(main())

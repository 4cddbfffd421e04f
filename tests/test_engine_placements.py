"""Models that say by name which devices their activations are on, as users write them.

The squares of each are those of gradients formed one by one on one device, and are
computed and exchanged as the gradient is.
"""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from fsam_optax import categorical, diagonal, fisher_empirical, negative_log_likelihood


EXAMPLES, TOKENS, WIDTH, CLASSES, EXPERTS = 16, 6, 8, 4, 8
OUT = (WIDTH, CLASSES)
RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Program:
    """A model on a mesh.

    Attributes:
        model: `model(put, params, x)`, where `put(x, *spec)` says where x is.
        shapes: Shapes of its parameters.
        mesh: Sizes of the axes of the mesh.
        batch: The axis, or axes, of the mesh that the batch is on.
        specs: Where parameters are that are not whole on all devices.
    """

    model: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"data": 8})
    batch: Any = "data"
    specs: dict[str, P] = dataclasses.field(default_factory=dict)


def merged(put, params, x, batch: Any = "data"):
    """Rows of all examples in one axis, in a loop over layers."""

    def layer(rows, w):
        return put(jnp.tanh(put(rows, batch, None) @ w), batch, None), None

    rows, _ = jax.lax.scan(jax.checkpoint(layer), x.reshape(-1, WIDTH), params["in"])
    return (put(rows, batch, None) @ params["out"]).reshape(*x.shape[:2], -1)


def merged_at_times(put, params, x):
    """Windows of images, then whole images, then windows."""
    rows = put(x.reshape(-1, WIDTH), "data", None) @ params["in"]
    whole = put(jnp.tanh(rows).reshape(len(x), -1), "data", None) @ params["whole"]
    rows = put(jnp.tanh(whole).reshape(-1, WIDTH), "data", None)
    return (rows @ params["out"]).reshape(*x.shape[:2], -1)


def merged_tensor_parallel(put, params, x):
    rows = put(x.reshape(-1, WIDTH), "data", None)
    hidden = put(jnp.tanh(rows @ params["up"]), "data", "model")
    rows = put(hidden @ params["down"], "data", None) + rows
    return put(rows @ params["out"], "data", None).reshape(*x.shape[:2], -1)


def sequence(put, params, x):
    """Tokens on an axis of their own."""
    y = put(x @ params["in"], "data", "tokens", None)
    mixed = jax.nn.softmax(jnp.einsum("bsd,btd->bst", y, y) / 3)
    y = put(jnp.einsum("bst,btd->bsd", mixed, y), "data", "tokens", None)
    return jnp.tanh(y) @ params["out"]


def time_major(put, params, x):
    def step(h, x):
        h = put(jnp.tanh(x @ params["in"] + h @ params["again"]), "data", None)
        return h, h

    x = put(jnp.swapaxes(x, 0, 1), None, "data", None)
    _, y = jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)
    return jnp.swapaxes(y, 0, 1) @ params["out"]


def experts(put, params, x, axis="experts"):
    """Experts on an axis of their own, or on that of the batch."""
    batch = None if axis == "data" else "data"
    gates = jax.nn.softmax(put(x @ params["gate"], "data", None, None))
    given = put(jnp.einsum("bte,btd->ebtd", gates, x), axis, batch, None, None)
    hidden = jnp.tanh(jnp.einsum("ebtd,edh->ebth", given, params["up"]))
    hidden = put(hidden, axis, batch, None, None)
    y = put(jnp.einsum("ebth,ehd->ebtd", hidden, params["down"]), axis, batch)
    return (x + put(jnp.sum(y, 0), "data", None, None)) @ params["out"]


def pipeline(put, params, x):
    """Stages on an axis, each with what the one before it had a step ago."""
    held = jnp.zeros((2, *x.shape))
    for _ in range(2):
        held = put(jnp.roll(held, 1, 0).at[0].set(x), "stage", "data", None, None)
        held = jnp.tanh(jnp.einsum("sntd,sde->snte", held, params["stages"]))
    return put(held, "stage", "data", None, None)[-1] @ params["out"]


def of_experts(axis):
    shapes = {"up": (EXPERTS, WIDTH, WIDTH), "down": (EXPERTS, WIDTH, WIDTH)}
    specs = {name: P(axis) for name in shapes}
    return {**shapes, "gate": (WIDTH, EXPERTS), "out": OUT}, specs


SHAPES, SPECS = of_experts("experts")
LAYERS = {"in": (2, WIDTH, WIDTH), "out": OUT}
SQUARE = (WIDTH, WIDTH)
PROGRAMS = {
    "merged": Program(merged, LAYERS),
    "merged, two axes": Program(
        lambda *args: merged(*args, batch=("data", "fsdp")),
        *(LAYERS, {"data": 4, "fsdp": 2}, ("data", "fsdp")),
        {"in": P(None, "fsdp"), "out": P("fsdp")},
    ),
    "merged at times": Program(
        merged_at_times,
        {"in": SQUARE, "whole": (TOKENS * WIDTH, TOKENS * WIDTH), "out": OUT},
    ),
    "merged, tensor-parallel": Program(
        merged_tensor_parallel,
        {"up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH), "out": OUT},
        *({"data": 4, "model": 2}, "data"),
        {"up": P(None, "model"), "down": P("model")},
    ),
    "sequence": Program(sequence, {"in": SQUARE, "out": OUT}, {"data": 4, "tokens": 2}),
    "time-major": Program(time_major, {"in": SQUARE, "again": SQUARE, "out": OUT}),
    "experts": Program(experts, SHAPES, {"data": 2, "experts": 4}, "data", SPECS),
    "experts on the data axis": Program(
        lambda *args: experts(*args, axis="data"),
        SHAPES,
        specs=of_experts("data")[1],
    ),
    "pipeline": Program(
        pipeline,
        {"stages": (2, WIDTH, WIDTH), "out": OUT},
        *({"data": 4, "stage": 2}, "data"),
        {"stages": P("stage")},
    ),
}


def one_by_one(model, params, x, labels):
    """The mean over labels of the squared gradients of examples."""

    def loss(params, x, labels):
        h = jax.nn.log_softmax(model(params, x[None])[0])
        return -jnp.sum(jnp.take_along_axis(h, labels[:, None], -1))

    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, labels)
    return jax.tree.map(lambda g: jnp.sum(g**2, 0) / labels.size, grads)


@pytest.mark.short("merged", "sequence")
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_computed_and_exchanged_as_the_gradient_is(name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    count = importlib.import_module("compiled").count
    program = PROGRAMS[name]
    kinds = (AxisType.Auto,) * len(program.mesh)
    mesh = jax.make_mesh((*program.mesh.values(),), (*program.mesh,), axis_types=kinds)

    def sharding(*spec):
        return NamedSharding(mesh, P(*spec))

    def put(x, *spec):
        return jax.lax.with_sharding_constraint(x, sharding(*spec))

    params = {
        name: np.float32(RNG.normal(size=shape) / 2)
        for name, shape in program.shapes.items()
    }
    x = np.float32(RNG.normal(size=(EXAMPLES, TOKENS, WIDTH)))
    labels = np.int32(RNG.integers(CLASSES, size=(EXAMPLES, TOKENS)))
    placed = {
        name: jax.device_put(w, sharding(*program.specs.get(name, P())))
        for name, w in params.items()
    }
    batch = jax.device_put((x, labels), sharding(program.batch))
    nll = negative_log_likelihood(
        lambda params, x: program.model(put, params, x), categorical
    )
    squares = jax.jit(lambda p, b: diagonal(fisher_empirical(nll), p, b))
    compiled = squares.lower(placed, batch).compile()
    gradient = jax.jit(jax.grad(nll)).lower(placed, batch).compile()
    first, second = (count(x.as_text()) for x in (gradient, compiled))
    assert second.pop("products") <= 1.02 * first.pop("products")
    # Powers of sums over tokens on several devices are of whole sums.
    assert sum(second.values()) <= 1.4 * sum(first.values()) + 16, (first, second)

    expected = jax.jit(one_by_one, static_argnums=0)(
        lambda *args: program.model(lambda x, *_: x, *args), params, x, labels
    )
    found = compiled(placed, batch)
    for leaf, w in expected.items():
        np.testing.assert_allclose(found[leaf], w, rtol=2e-5, atol=1e-6 * w.max())


def of_one_or_all(put, params, x):
    if len(x) not in (1, EXAMPLES):
        raise ValueError("neither one example nor all")
    return merged(put, params, x)


def without_an_axis_of_one(put, params, x):
    y = jnp.tanh(x @ params["in"][0])
    y = put(y[0], "data")[None] if len(y) == 1 else put(y, "data")
    return y @ params["out"]


@pytest.mark.parametrize("model", [of_one_or_all, without_an_axis_of_one])
def test_models_that_are_no_model_of_two_examples(model):
    # Two devices: XLA:CPU of jax 0.7.0 stops at several exchanges among eight.
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    sharding = NamedSharding(mesh, P("data"))

    def put(x, *spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    params = {k: np.float32(RNG.normal(size=s) / 2) for k, s in LAYERS.items()}
    x = np.float32(RNG.normal(size=(EXAMPLES, TOKENS, WIDTH)))
    labels = np.int32(RNG.integers(CLASSES, size=(EXAMPLES, TOKENS)))
    nll = negative_log_likelihood(lambda p, x: model(put, p, x), categorical)
    found = jax.jit(lambda *args: diagonal(fisher_empirical(nll), *args))(
        params, jax.device_put((x, labels), sharding)
    )
    expected = jax.jit(one_by_one, static_argnums=0)(
        lambda *args: model(lambda x, *_: x, *args), params, x, labels
    )
    for leaf, w in expected.items():
        np.testing.assert_allclose(found[leaf], w, rtol=2e-5, atol=1e-6 * w.max())

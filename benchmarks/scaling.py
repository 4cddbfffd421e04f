"""Question: how does a step scale with the number of devices, on paper?

Training steps are compiled for 2 to 256 devices and read, not run: the bytes that
leave the collectives of one device in a step, what the device holds, and the operations
of its products. The batch grows with the devices; CNN and transformer are data
parallel, the GPT of 1.3 billion parameters is fully sharded. Compiled for virtual CPU
devices, whose XLA knows no reduce-scatter: a sharded gradient shows as an all-reduce,
by hand as in the library.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --models gpt --devices 8
"""

import itertools
import json
import math
import os
import subprocess
import sys
from typing import Any

import compiled
import harness
import jax
import jax.numpy as jnp
import optax
import show
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import fsam_optax as fsam


RHO, RATE = 0.05, 0.1
STEPS = ("gradient", "two gradients", "SAM", "Fisher SAM, one pass")
# Layers, width, words, tokens; examples a device.
GPT = {
    "transformer": (4, 256, 1024, 64, 4),
    "gpt": (24, 2048, 50304, 1024, 1),
    "smoke": (2, 16, 64, 4, 2),
}
SHARDED = ("gpt",)


def cnn():
    """Returns a model, the shapes of its parameters and those of an example."""
    widths = (3, 32, 64, 64)
    kernels = [(3, 3, a, b) for a, b in itertools.pairwise(widths)]
    shapes = {"kernels": kernels, "dense": (64 * 16, 10)}

    def apply(params, x):
        for kernel in params["kernels"]:
            x = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        return x.reshape(len(x), -1) @ params["dense"]

    return apply, shapes, ((32, 32, 3), jnp.float32), (), 8


def gpt(name, whole):
    """The same for a GPT: layers in a scan, recomputed; one table for both ends.

    `whole` gathers the weights of a layer where they are used.
    """
    depth, width, words, length, rows = GPT[name]
    heads = max(1, width // 128)
    shapes = {
        "table": (words, width),
        "layers": {
            **{name: (depth, width, width) for name in ("q", "k", "v", "out")},
            "up": (depth, width, 4 * width),
            "down": (depth, 4 * width, width),
            "scale": (depth, 2, width),
        },
    }

    def norm(x, scale):
        mean = jnp.mean(x, -1, keepdims=True)
        var = jnp.var(x, -1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale

    @jax.checkpoint
    def layer(x, w):
        w = jax.tree.map(whole, w)
        n, t, _ = x.shape
        y = norm(x, w["scale"][0])
        q, k, v = ((y @ w[name]).reshape(n, t, heads, -1) for name in "qkv")
        scores = jnp.einsum("nshd,nthd->nhst", q, k) / math.sqrt(width // heads)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        mixed = jnp.einsum("nhst,nthd->nshd", jax.nn.softmax(scores), v)
        x = x + mixed.reshape(n, t, -1) @ w["out"]
        return x + jax.nn.gelu(norm(x, w["scale"][1]) @ w["up"]) @ w["down"], None

    def apply(params, tokens):
        table = whole(params["table"])
        x, _ = jax.lax.scan(layer, table[tokens], params["layers"])
        return x @ table.T

    return apply, shapes, ((length,), jnp.int32), (length,), rows


def steps(nll):
    """Returns the training steps, each with its state."""

    def gradient(params, state, batch):
        return jax.grad(nll)(params, batch), state

    def two_gradients(params, state, batch):
        g = jax.grad(nll)(params, batch)
        scale = RHO / optax.global_norm(g)
        moved = jax.tree.map(lambda w, g: w + scale * g, params, g)
        return jax.grad(nll)(moved, batch), state

    def of_library(perturbation, **options):
        f = fsam.value_and_grad(nll, perturbation, metrics=False, **options)

        def step(params, state, batch):
            _, grads, state = f(params, state, batch)
            return grads, state

        return step, f.init

    ellipsoid = fsam.fisher_ellipsoid(RHO, fsam.given())
    made = (
        (gradient, lambda _: ()),
        (two_gradients, lambda _: ()),
        of_library(fsam.euclidean_ball(RHO)),
        of_library(ellipsoid, empirical_fisher=True),
    )
    return dict(zip(STEPS, made, strict=True))


def measure(name, devices):
    """Returns the facts of a model on so many devices."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def whole(weight):
        return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))

    made = cnn() if name == "cnn" else gpt(name, whole)
    apply, shapes, example, labels, rows = made

    def like(shape, dtype, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def weight(shape):
        spec = (*(None,) * (len(shape) - 1), "data") if name in SHARDED else ()
        return like(shape, jnp.float32, *spec)

    def is_shape(x):
        return isinstance(x, tuple)

    params = jax.tree.map(weight, shapes, is_leaf=is_shape)
    shape, dtype = example
    batch = (
        like((devices * rows, *shape), dtype, "data"),
        like((devices * rows, *labels), jnp.int32, "data"),
    )
    facts: dict[str, Any] = {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    }
    for row, (step, init) in steps(
        fsam.negative_log_likelihood(apply, fsam.categorical)
    ).items():

        def update(params, state, batch, step=step):
            grads, state = step(params, state, batch)
            return jax.tree.map(lambda w, g: w - RATE * g, params, grads), state

        state = jax.eval_shape(init, params)
        run = jax.jit(update, donate_argnums=0).lower(params, state, batch).compile()
        facts[row] = compiled.count(str(run.as_text()))
        held = getattr(run.memory_analysis(), "temp_size_in_bytes")  # noqa: B009
        facts[row]["temporaries"] = held
    return facts


def in_process(name, devices):
    """Measures where there are so many devices: in a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count"
    environment = dict(os.environ) | {
        "XLA_FLAGS": f"{flags}={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
    }
    code = f"import json, scaling; print(json.dumps(scaling.measure{name, devices}))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    if found.returncode:
        raise RuntimeError(found.stderr[-2000:])
    return json.loads(found.stdout.splitlines()[-1])


@harness.experiment(
    smoke={"models": ["smoke"], "devices": [2]},
    models={"default": ["cnn", "transformer"], "choices": ["cnn", *GPT]},
    devices=[2, 8, 64, 256],
)
def main(run: harness.Run) -> None:
    rows = []
    for name in run.options.models:
        for devices in run.options.devices:
            key = {"model": name, "devices": devices}
            facts = run.cell(in_process, name, devices, **key)
            for row in STEPS:
                fact = facts[row]
                moved = [fact.get(kind, 0) / 1e6 for kind in compiled.COLLECTIVES]
                held, work = fact["temporaries"] / 1e6, fact["products"] / 1e9
                shown = [f"{moved[0]:.1f}", f"{moved[1]:.3f}", f"{sum(moved[2:]):.1f}"]
                label = f"{name}, {devices}: {row}"
                rows.append([label, *shown, f"{held:.0f}", f"{work:.1f}"])
    head = ["", "gathered MB", "reduced MB", "other MB", "held MB", "GFLOP"]
    show.table("One device in a step", head, rows)


if __name__ == "__main__":
    raise SystemExit(main())

"""Question: how does a step scale with the number of devices, on paper?

Training steps are compiled for 2 to 256 devices and read, not run: the bytes that
leave the collectives of one device in a step, what the device holds, and the operations
of its products. The batch grows with the devices; CNN and transformer are data
parallel, the GPT of 1.3 billion parameters is fully sharded. Compiled for virtual CPU
devices, whose XLA knows no reduce-scatter: a sharded gradient shows as an all-reduce,
by hand as in the library.

    python benchmarks/scaling.py
"""

import itertools
import math

import compiled
import harness
import jax
import jax.numpy as jnp
import optax
import show
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import fsam_optax as fsam


RHO, RATE = 0.05, 0.1
STEPS = ("two gradients", "SAM", "Fisher SAM, one pass")
# Layers, width, words, tokens.
GPT = {
    "transformer": (4, 256, 1024, 64),
    "gpt": (24, 2048, 50304, 1024),
    "smoke": (2, 16, 64, 4),
}
SHARDED = "gpt", "smoke"
ROWS = {"cnn": 8, "transformer": 4, "gpt": 1, "smoke": 1}  # examples of a device


def cnn():
    """Returns a model, and shapes of its parameters, of an example and its label."""
    kernels = [(3, 3, a, b) for a, b in itertools.pairwise((3, 32, 64, 64))]
    shapes = {"kernels": kernels, "dense": (64 * 16, 10)}
    axes = ("NHWC", "HWIO", "NHWC")

    def apply(params, x):
        for kernel in params["kernels"]:
            x = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=axes
            )
            x = jax.nn.relu(x)
        return x.reshape(len(x), -1) @ params["dense"]

    return apply, shapes, ((32, 32, 3), jnp.float32), ()


def gpt(depth, width, words, length, whole):
    """The same for a GPT, whose weights `whole` gathers where they are used."""
    heads = max(1, width // 128)
    layers = {name: (depth, width, width) for name in ("q", "k", "v", "out")}
    layers |= {"up": (depth, width, 4 * width), "down": (depth, 4 * width, width)}
    shapes = {"table": (words, width), "layers": layers | {"scale": (depth, 2, width)}}

    def norm(x, scale):
        mean = jnp.mean(x, -1, keepdims=True)
        var = jnp.var(x, -1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale[None, None]

    @jax.checkpoint
    def layer(x, w):
        w = jax.tree.map(whole, w)
        n, t, _ = x.shape
        y = norm(x, w["scale"][0])
        q, k, v = ((y @ w[name]).reshape(n, t, heads, -1) for name in "qkv")
        scores = jnp.einsum("nshd,nthd->nhst", q, k) / math.sqrt(width // heads)
        scores = jnp.where(jnp.tril(jnp.ones((1, 1, t, t), bool)), scores, -1e9)
        mixed = jnp.einsum("nhst,nthd->nshd", jax.nn.softmax(scores), v)
        x = x + mixed.reshape(n, t, -1) @ w["out"]
        return x + jax.nn.gelu(norm(x, w["scale"][1]) @ w["up"]) @ w["down"], None

    def apply(params, tokens):
        table = whole(params["table"])
        x, _ = jax.lax.scan(layer, table[tokens], params["layers"])
        return x @ table.T

    return apply, shapes, ((length,), jnp.int32), (length,)


def oracles(nll):
    """Returns what maps parameters, state and batch to gradients, and its `init`."""

    def by_hand(params, state, batch):
        g = jax.grad(nll)(params, batch)
        scale = RHO / optax.tree.norm(g)
        moved = jax.tree.map(lambda w, g: w + scale * g, params, g)
        return None, jax.grad(nll)(moved, batch), state

    ellipsoid = fsam.fisher_ellipsoid(RHO, fsam.given())
    fisher = fsam.value_and_grad(nll, ellipsoid, metrics=False, empirical_fisher=True)
    sam = fsam.value_and_grad(nll, fsam.euclidean_ball(RHO), metrics=False)
    return (by_hand, lambda _: ()), (sam, sam.init), (fisher, fisher.init)


def measure(devices, name):
    """Returns the facts of a model on so many devices."""
    made = {"axis_types": (AxisType.Auto,), "devices": jax.devices("cpu")[:devices]}
    mesh = jax.make_mesh((devices,), ("data",), **made)

    def whole(weight):
        return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))

    def like(shape, dtype, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def weight(shape):
        spec = (*(None,) * (len(shape) - 1), "data") if name in SHARDED else ()
        return like(shape, jnp.float32, *spec)

    model = cnn() if name == "cnn" else gpt(*GPT[name], whole)
    apply, shapes, (example, dtype), label = model
    params = jax.tree.map(weight, shapes, is_leaf=lambda x: isinstance(x, tuple))
    rows = devices * ROWS[name]
    x = like((rows, *example), dtype, "data")
    batch = x, like((rows, *label), jnp.int32, "data")
    every = oracles(fsam.negative_log_likelihood(apply, fsam.categorical))
    facts = {}
    for row, (oracle, init) in zip(STEPS, every, strict=True):

        def update(params, state, batch, oracle=oracle):
            _, grads, state = oracle(params, state, batch)
            return jax.tree.map(lambda w, g: w - RATE * g, params, grads), state

        state = jax.eval_shape(init, params)
        run = jax.jit(update, donate_argnums=0).lower(params, state, batch).compile()
        held = getattr(run.memory_analysis(), "temp_size_in_bytes")  # noqa: B009
        facts[row] = compiled.count(str(run.as_text())) | {"temporaries": held}
    return facts


def short(value):
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


COLUMNS: show.Columns = {
    "model, devices: step": lambda name, _: name,
    "gathered,\nMB": lambda _, of: short(of.get("all-gather", 0) / 1e6),
    "reduced,\nMB": lambda _, of: short(of["all-reduce"] / 1e6),
    "held,\nMB": lambda _, of: short(of["temporaries"] / 1e6),
    "GFLOP": lambda _, of: short(of["products"] / 1e9),
}


@harness.experiment(
    smoke={"models": ["cnn", "smoke"], "devices": [2]},
    models={"default": ["cnn", "transformer", "gpt"], "choices": [*ROWS]},
    devices=[2, 8, 64, 256],
)
def main(run: harness.Run) -> None:
    rows = {}
    for name in run.options.models:
        found = run.each("devices", run.options.devices, measure, name, model=name)
        for devices, of in found.items():
            rows |= {f"{name}, {devices}: {step}": of[step] for step in STEPS}
    show.report("One device in a step", rows, COLUMNS)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 256)
    raise SystemExit(main())

"""Question: what do the patterns cost that weights are made and used in?

Each is a loss of its own, so that no other layer hides its price: one layer whose
weight is made from parameters, on vectors or on tokens, or a few lines that use one.
Its exact empirical Fisher diagonal, and `vmap(grad)` squared, beside one gradient of
the batch. With more devices it is compiled and read: what one device multiplies and
exchanges in the diagonal, beside its gradient.

    taskset -c 0 python benchmarks/patterns.py
    python benchmarks/patterns.py --devices 8
"""

import time
from functools import partial

import compiled
import cost
import harness
import jax
import jax.numpy as jnp
import numpy as np
import show
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import fsam_optax as fsam


B, T, D, WORDS = 64, 64, 256, 20_000
ROWS, LABELS = np.arange(D)[:, None], np.arange(D)[None]
GRADIENT, FISHER, NAIVE = "gradient", "F", "vmap(grad)"
OFFSETS = np.arange(T)[:, None] - np.arange(T)[None] + T - 1


def norm(w):
    return w / jnp.linalg.norm(w, axis=0, keepdims=True)


# What makes a weight of its parameters: their shapes, and how.
WEIGHTS = {
    "merged LoRA": ([(D, 8), (8, D)], lambda fixed, a, b: fixed + a @ b),
    "Kronecker product": ([(16, 16)] * 2, lambda _, a, b: jnp.kron(a, b)),
    "gains": ([(D, D), (D,)], lambda _, w, g: w * g),
    "weight norm": ([(D, D), (D,)], lambda _, w, g: g * norm(w)),
    "standardised": ([(D, D)], lambda _, w: norm(w - w.mean(0))),
    "DoRA": ([(D, 8), (8, D), (D,)], lambda fixed, a, b, m: m * norm(fixed + a @ b)),
    "where": ([(D, D)], lambda _, w: jnp.where(ROWS % 3 == LABELS % 3, w, 0.0)),
    "tril": ([(D, D)], lambda _, w: jnp.tril(w)),
    "relu": ([(D, D)], lambda _, w: jax.nn.relu(w)),
    "permuted": ([(D, D)], lambda _, w: w[np.arange(D)[::-1]]),
    "symmetric": ([(D, D)], lambda _, w: w + w.T),
    "Toeplitz": ([(2 * D,)], lambda _, w: w[ROWS - LABELS + D]),
}


def weight(name, *places):
    shapes, make = WEIGHTS[name]
    return shapes, (*places, D), lambda p, x, fixed: jnp.tanh(x @ make(fixed, *p))


def lstm(p, x, _):
    h = c = jnp.zeros(D)
    for u in x:
        i, f, o, g = jnp.split(jnp.concatenate([u, h]) @ p[0], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return h


def split(p, x, _):
    for _ in range(6):
        value, gate = jnp.split(p[0], 2, 1)
        x = jnp.tanh(x @ value) * jax.nn.sigmoid(x @ gate)
    return x


def recursion(p, x, _):
    for _ in range(200):
        x = jnp.tanh(x @ p[0])
    return x


def groups(p, x, _):
    axes = ("NHWC", "HWIO", "NHWC")
    options = {"dimension_numbers": axes, "feature_group_count": 4}
    return lax.conv_general_dilated(x[None], p[0], (1, 1), "SAME", **options)


def experts(p, x, _):
    expert = jnp.argmax(x[:, :4], axis=1)
    sizes = jnp.sum(expert[:, None] == jnp.arange(4)[None], axis=0)
    return lax.ragged_dot(x[jnp.argsort(expert)], p[0], sizes.astype(jnp.int32))


def spectral(p, x, _):
    modes = jnp.fft.rfft(x, axis=0)[:16]
    return jnp.fft.irfft(jnp.einsum("td,tde->te", modes, lax.complex(*p)), T, axis=0)


def lru(p, x, _):
    rate = jnp.exp(lax.complex(-jnp.exp(p[0]), p[1]))
    h = lax.scan(lambda h, u: (rate * h + u,) * 2, jnp.zeros(D, "complex64"), x)[1]
    return h.real


def tokens(p, x, _):
    return lax.map(lambda u: u @ p[0], x)


def attention(p, x, _):
    return jax.nn.softmax(x @ x.T + p[0][OFFSETS]) @ x


def words(p, i, _):
    return p[0][i[0]] @ p[-1][i[1:]].T


# Shapes of the parameters and of an example, how many words there are, and the model.
USES = {
    "unrolled LSTM": ([(2 * D, 4 * D)], (8, D), lstm),
    "split in a sum": ([(D, 2 * D)], (D,), split),
    "one weight 200 times": ([(64, 64)], (64,), recursion),
    "map over tokens": ([(D, D)], (T, D), tokens),
    "convolution in groups": ([(3, 3, 4, 16)], (8, 8, 16), groups),
    "ragged dot, 4 experts": ([(4, D, D)], (T, D), experts),
    "spectral layer": ([(16, 32, 32)] * 2, (T, 32), spectral),
    "linear recurrence": ([(D,)] * 2, (T, D), lru),
    "relative positions": ([(2 * T,)], (T, 8), attention),
    "4096 tokens looked up": ([(WORDS, 16)], (4096,), lambda p, i, _: p[0][i]),
    "u[i] @ v[j]": ([(WORDS, 16)] * 2, (2,), words),
    "word2vec": ([(WORDS, 16)] * 2, (7,), words),
    "one table, two lookups": ([(WORDS, 16)], (2,), words),
}
PATTERNS = (
    {f"{name}, vectors": partial(weight, name) for name in WEIGHTS}
    | {f"{name}, tokens": partial(weight, name, T) for name in WEIGHTS}
    | {name: lambda of=of: of for name, of in USES.items()}
)


def measure(name, devices, repeats):
    """Returns the facts of a pattern: timed on one device, counted on several."""
    shapes, example, model = PATTERNS[name]()
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 2))
    params = [jax.random.normal(next(keys), s) / s[0] ** 0.5 for s in shapes]
    fixed = jax.random.normal(next(keys), (D, D)) / D**0.5
    whole = shapes[0][0] == WORDS
    draw = partial(jax.random.randint, minval=0, maxval=WORDS)
    x = (draw if whole else jax.random.normal)(next(keys), (B, *example))

    def loss(params, example):
        return jnp.sum(model(params, example, fixed) ** 2)

    def every(fn, params, batch):
        if model is experts:  # Not to be had under `vmap`.
            return lax.map(partial(fn, params), batch)
        return jax.vmap(fn, (None, 0))(params, batch)

    def gradient(params, batch):
        return jax.grad(lambda w: jnp.mean(every(loss, w, batch)))(params)

    def naive(params, batch):
        return [jnp.mean(g * g, 0) for g in every(jax.grad(loss), params, batch)]

    def fisher(params, batch):
        return [s / B for s in fsam.loss_power_sums(loss, params, batch)[0]]

    if devices == 1:
        fns = {GRADIENT: gradient, FISHER: fisher, NAIVE: naive}
        runs, facts = cost.programs(fns, params, x)
        found = cost.ratios(runs, repeats, time.process_time)
        pairs = zip(runs[NAIVE](), runs[FISHER](), strict=True)
        error = max(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a)) for a, b in pairs)
        return {row: facts[row] | found[row] for row in runs} | {"error": error}
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))

    def counted(fn):
        counts = compiled.count(str(jax.jit(fn).lower(params, x).compile().as_text()))
        products = counts.pop("products", 0)
        return {"products": products, "exchanged": sum(counts.values())}

    return {GRADIENT: counted(gradient), FISHER: counted(fisher)}


def share(of, what):
    """Returns what the diagonal takes over what the gradient does."""
    gradient = of[GRADIENT][what]
    return f"{of[FISHER][what] / gradient:.2f}" if gradient else "-"


TIMES: show.Columns = {
    "pattern": lambda name, _: name,
    FISHER: lambda _, of: f"{of[FISHER]['ratio']:.2f}",
    NAIVE: lambda _, of: f"{of[NAIVE]['ratio']:.2f}",
    "temporaries": lambda _, of: share(of, "temporary_mb"),
    "distance": lambda _, of: f"{of['error']:.0e}",
}
COUNTS: show.Columns = {
    "pattern": lambda name, _: name,
    "products": lambda _, of: share(of, "products"),
    "exchanged": lambda _, of: share(of, "exchanged"),
}


@harness.experiment(
    smoke={"patterns": ["gains, vectors", "word2vec"], "repeats": 1},
    patterns={"default": [*PATTERNS], "choices": [*PATTERNS]},
    devices=1,
    repeats=5,
)
def main(run: harness.Run) -> None:
    devices, repeats = run.options.devices, run.options.repeats
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    args = measure, devices, repeats
    key = {"devices": devices} if devices > 1 else {"repeats": repeats}
    found = run.each("pattern", run.options.patterns, *args, **key)
    title = f"Over one gradient of the batch, devices: {devices}"
    show.report(title, found, TIMES if devices == 1 else COUNTS)


if __name__ == "__main__":
    raise SystemExit(main())

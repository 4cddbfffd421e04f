"""What the cost benchmarks share: problems, interleaved timing, the table.

A figure is the median over rounds of a ratio to the first row in the same round, so
that what else the machine does meanwhile falls on both.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import show
from models import CNN, GPT2, MLP, nn, ResNet, Transformer


class Problem(NamedTuple):
    """A model in evaluation mode, with parameters and a batch of random data."""

    apply: Callable[[Any, Any], jax.Array]
    params: Any
    batch: tuple[jax.Array, jax.Array]


def problem(model: nn.Module, shape, batch: int, classes: int = 10, places=()):
    """Returns the problem of a model on inputs of a shape; 1-d shapes of tokens.

    It has a label an example, or one for each of its places.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    if isinstance(model, Transformer):
        x = jax.random.randint(keys[0], (batch, *shape), 0, model.vocabulary)
    else:
        x = jax.random.normal(keys[0], (batch, *shape))
    y = jax.random.randint(keys[1], (batch, *places), 0, classes)
    variables = model.init(keys[2], x)
    params = variables.pop("params")

    def apply(params, x):
        return jnp.asarray(model.apply({"params": params, **variables}, x))

    return Problem(apply, params, (x, y))


def gpt2(batch: int, length: int, dtype: Any = jnp.float32, **options: Any) -> Problem:
    return next_token(GPT2(**options), batch, length, dtype)


def next_token(model: Any, batch: int, length: int, dtype: Any = jnp.float32):
    """Returns the problem of the next token of random text, computed in a type."""
    keys = jax.random.split(jax.random.key(0))
    text = jax.random.randint(keys[0], (batch, length + 1), 0, model.vocabulary)
    params = jax.jit(model.init)(keys[1], text[:1, :-1])["params"]

    def apply(params, x):
        params = jax.tree.map(lambda w: w.astype(dtype), params)
        return jnp.asarray(model.apply({"params": params}, x), jnp.float32)

    return Problem(apply, params, (text[:, :-1], text[:, 1:]))


def cnn(batch: int) -> Problem:
    return problem(CNN(32, (2, 2, 2), nn.Conv), (32, 32, 3), batch)


PROBLEMS = {
    "mlp": lambda: problem(MLP(), (784,), 128),
    "mlp-512": lambda: problem(MLP(), (784,), 512),
    "cnn": partial(cnn, 128),
    "resnet": lambda: problem(ResNet(16, nn.Conv), (32, 32, 3), 32),
    "transf.": lambda: problem(Transformer(), (64,), 32),
}
TITLES = {
    "mlp": "MLP 784-512-512-10, batch 128",
    "mlp-512": "the same, batch 512",
    "cnn": "CNN 32x32x3, batch 128",
    "resnet": "ResNet-18, width 16, 32x32x3, batch 32, statistics fixed",
    "transf.": "transformer of two blocks, length 64, batch 32",
    "unet": "U-Net of two levels, 32x32x3, five classes a pixel, batch 8",
    "vit": "ViT of four blocks, 32x32x3, batch 32",
    "mamba": "Mamba of two layers, 256 tokens, length 64, batch 16",
}
SMOKE = {"tiny": lambda: problem(MLP((8,)), (16,), 16)}


def of_example(loss: Callable) -> Callable:
    """Returns the loss of one example, without an axis of the batch."""
    return lambda params, one: loss(params, jax.tree.map(lambda x: x[None], one))


def plain(loss: Callable) -> Callable:
    """Returns the empirical Fisher diagonal by `vmap(grad)`, squared."""
    every = jax.vmap(jax.grad(of_example(loss)), (None, 0))
    return lambda params, batch: jax.tree.map(
        lambda g: jnp.mean(g * g, axis=0), every(params, batch)
    )


def ratios(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Times the runs in turn; returns milliseconds, and ratios to the first.

    One figure is the mean of as many calls as take 50 ms: a short one alone says more
    about what else the machine does.
    """
    # A CPU would run calls side by side; on an accelerator they stand in one queue.
    each = jax.block_until_ready if jax.default_backend() == "cpu" else lambda x: x

    def seconds(run, calls=1):
        jax.block_until_ready(run())  # The memory of what ran before is given back.
        start = clock()
        for _ in range(calls - 1):
            each(run())
        jax.block_until_ready(run())
        return (clock() - start) / calls

    calls = {n: max(1, round(0.05 / max(seconds(r), 1e-6))) for n, r in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, calls[name]))
    yardstick = next(iter(times.values()))
    facts = {}
    for name, record in times.items():
        found = [t / y for t, y in zip(record, yardstick, strict=True)]
        quartiles = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
        facts[name] = {
            "ms": 1e3 * statistics.median(record),
            "ratio": statistics.median(found),
            "quartiles": [quartiles[0], quartiles[2]],
        }
    return facts


def compiled(fn: Callable, *args: Any, **options: Any) -> tuple[Any, dict[str, float]]:
    """Compiles; returns the program and what can be said of it before it runs."""
    start = time.perf_counter()
    lowered = jax.jit(fn, **options).lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    memory = program.memory_analysis()
    return program, {
        "trace_s": traced - start,
        "compile_s": time.perf_counter() - traced,
        "temporary_mb": memory.temp_size_in_bytes / 1e6 if memory else float("nan"),
    }


def programs(
    fns: Mapping[str, Callable], *args: Any, threads: int = 1
) -> tuple[dict, dict]:
    """Compiles several functions; returns runs without arguments, and what is known.

    Their times of compilation say something where it is done in one thread.
    """
    with ThreadPoolExecutor(threads) as pool:
        every = pool.map(lambda fn: compiled(fn, *args), fns.values())
        found = dict(zip(fns, every, strict=True))
    runs = {row: partial(program, *args) for row, (program, _) in found.items()}
    return runs, {row: facts for row, (_, facts) in found.items()}


def print_table(title: str, results: Mapping[str, Any]) -> None:
    """Prints time, temporaries and compilation of each row, over the first row."""

    def entry(facts, row):
        base, found = next(iter(facts.values())), facts.get(row)
        if not found:
            return "-"
        spent = [f["trace_s"] + f["compile_s"] for f in (found, base)]
        memory = found["temporary_mb"] / (base["temporary_mb"] or 1)
        return f"{found['ratio']:.2f}, {memory:.1f}, {spent[0] / spent[1]:.1f}"

    rows = [
        [row, *(entry(facts, row) for facts in results.values())]
        for row in dict.fromkeys(row for facts in results.values() for row in facts)
    ]
    caption = "Time, temporaries, tracing and compilation, over the first row."
    listed = [f"{name}: {TITLES[name]}" for name in results if name in TITLES]
    show.table(title, ["", *results], rows, "\n".join([caption, *listed]), first=32)

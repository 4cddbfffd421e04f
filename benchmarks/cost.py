"""What the cost benchmarks share: models, interleaved timing, tables, results.

A figure is the median over rounds of a ratio to the first row in the same round, so
that what else the machine does meanwhile falls on both.
"""

import re
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import show
from models import Block, MLP, ResNet


class CNN(nn.Module):
    """Three convolutions and a dense layer."""

    @nn.compact
    def __call__(self, x):
        """Maps images (batch, height, width, channels) to logits (batch, 10)."""
        for width in (32, 64, 64):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape((len(x), -1)))


class Transformer(nn.Module):
    """Two pre-norm encoder blocks over tokens, and a linear layer on their mean."""

    width: int = 128
    heads: int = 4
    vocabulary: int = 1000

    @nn.compact
    def __call__(self, tokens):
        """Maps tokens (batch, length) to logits (batch, 10)."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])[None]
        for _ in range(2):
            x = Block(self.heads)(x)
        return nn.Dense(10)(jnp.mean(nn.LayerNorm()(x), axis=1))


class Problem(NamedTuple):
    """A model in evaluation mode, with parameters and a batch of random data."""

    apply: Callable[[Any, Any], jax.Array]
    params: Any
    batch: tuple[jax.Array, jax.Array]


def problem(model: nn.Module, shape: tuple[int, ...], batch: int, classes: int = 10):
    """Returns the problem of a model on inputs of a shape; 1-d shapes of tokens."""
    keys = jax.random.split(jax.random.key(0), 3)
    if isinstance(model, Transformer):
        x = jax.random.randint(keys[0], (batch, *shape), 0, model.vocabulary)
    else:
        x = jax.random.normal(keys[0], (batch, *shape))
    y = jax.random.randint(keys[1], (batch,), 0, classes)
    variables = model.init(keys[2], x)
    params = variables.pop("params")

    def apply(params, x):
        return jnp.asarray(model.apply({"params": params, **variables}, x))

    return Problem(apply, params, (x, y))


PROBLEMS = {
    "mlp": lambda: problem(MLP(), (784,), 128),
    "mlp-512": lambda: problem(MLP(), (784,), 512),
    "cnn": lambda: problem(CNN(), (32, 32, 3), 128),
    "resnet": lambda: problem(ResNet(16, conv=nn.Conv), (32, 32, 3), 32),
    "transf.": lambda: problem(Transformer(), (64,), 32),
}
TITLES = {
    "mlp": "MLP 784-512-512-10, batch 128",
    "mlp-512": "the same, batch 512",
    "cnn": "CNN 32x32x3, batch 128",
    "resnet": "ResNet-18, width 16, 32x32x3, batch 32, statistics fixed",
    "transf.": "transformer of two blocks, length 64, batch 32",
}
SMOKE = {"tiny": lambda: problem(MLP((8,)), (16,), 16)}


def of_example(loss: Callable) -> Callable:
    """Returns the loss of one example, without an axis of the batch."""
    return lambda params, example: loss(
        params, jax.tree.map(lambda x: x[None], example)
    )


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
    least: float = 0.05,
) -> dict[str, dict[str, Any]]:
    """Times the runs in turn; returns medians and quartiles relative to the first.

    One figure is the mean of as many calls as take `least` seconds: a short one alone
    says more about what else the machine does.
    """

    def seconds(run, calls=1):
        start = clock()
        for _ in range(calls):
            jax.block_until_ready(run())
        return (clock() - start) / calls

    for run in runs.values():
        seconds(run)  # a warm-up
    calls = {n: max(1, round(least / max(seconds(r), 1e-6))) for n, r in runs.items()}
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


def programs(fns: Mapping[str, Callable], *args: Any) -> tuple[dict, dict]:
    """Compiles several functions; returns runs without arguments, and what is known."""
    runs, facts = {}, {}
    for row, fn in fns.items():
        program, facts[row] = compiled(fn, *args)
        runs[row] = partial(program, *args)
    return runs, facts


HANDING_ON = (
    *("parameter", "tuple", "get-tuple-element", "bitcast"),
    *("conditional", "while", "call"),
)


def passes(program: Any, shape: tuple[int, ...]) -> int:
    """Counts how often the program reads or writes float32 arrays of a shape.

    In its main line and, once, in the loops there: those of the norms end after one
    round. What happens in branches does not count.
    """
    computations = {}
    for text in program.as_text().split("\n\n"):
        name = re.match(r"(?:ENTRY )?(%\S+) ", text)
        if name:
            computations["ENTRY" if text.startswith("ENTRY") else name[1]] = text
    entry = computations["ENTRY"]
    bodies = re.findall(r" while\(.*?body=(%[\w.-]+)", entry)
    wanted = f"f32[{','.join(map(str, shape))}]"
    moved, found = 0, {}
    for line in "\n".join([entry, *(computations[x] for x in bodies)]).splitlines():
        made = re.match(r"\s+(?:ROOT )?(%\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line)
        if not made:
            continue
        name, kind, operation, rest = made.groups()
        found[name] = kind.count(wanted)
        if operation in HANDING_ON:
            continue
        operands = re.findall(r"%[\w.-]+", rest.split(")")[0])
        moved += found[name] + sum(found.get(x, 0) for x in operands)
    return moved


def print_tables(title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a table of rows against problems for each thing that was measured."""
    rows = list(dict.fromkeys(row for facts in results.values() for row in facts))
    known = {key for of in results.values() for facts in of.values() for key in facts}

    def against(title, entry, caption=""):
        """`entry` writes the facts of a row, beside those of the first row."""

        def cell(facts, row):
            return (
                entry(facts[row], next(iter(facts.values()))) if row in facts else "-"
            )

        texts = [
            [row, *(cell(facts, row) for facts in results.values())] for row in rows
        ]
        show.table(title, ["", *results], texts, caption, first=32)

    def memory(facts, base):
        return f"{facts['temporary_mb'] / (base['temporary_mb'] or 1):.1f}"

    def compilation(facts, base):
        spent = [f["trace_s"] + f["compile_s"] for f in (facts, base)]
        return f"{spent[0] / spent[1]:.1f}"

    caption = "\n".join(f"{name}: {TITLES[name]}" for name in results if name in TITLES)
    against(f"{title}: time", lambda f, _: f"{f['ratio']:.2f}", caption)
    against(f"{title}: temporaries", memory)
    against(f"{title}: tracing and compilation", compilation)
    if "operations" in known:
        counted = "Counted operations, in gradients"
        against(counted, lambda f, _: f"{f.get('operations', 1):.2f}")
    if "passes" in known:
        moved = "Reads and writes of arrays like the largest parameter"
        against(moved, lambda f, _: f"{f['passes']}")

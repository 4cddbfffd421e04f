"""Question: does it hold on an accelerator?

In order of value, each part resumable, and written as it ends: (a) how near the sums of
squares of the engine are to `vmap(grad)` squared, in the precisions of the device; (b)
what a Fisher diagonal costs, in milliseconds and as a share of the peak; (c) what a
step costs; (d) CIFAR-10 by a ResNet-9 in bfloat16 at equal gradients, one seed after
the other, as many as fit; and what `vmap(grad)` costs. Large models come after (d), but
for what F costs on them. No cell begins that is not likely to end in --minutes.

    python benchmarks/gpu.py --data-dir data/cifar10     # make gpu

It needs jax, optax, flax and this tree, and no network; without CIFAR-10 part (d) is
left out. `python benchmarks/datasets.py` packs CIFAR-10 into parts of 31 MB.
"""

import collections
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import command_line
import cost
import harness
import jax
import jax.numpy as jnp
import show
import training
from cost import gpt2, problem
from models import MLP, MODELS as NETWORKS, nn, ResNet, Transformer
from steps import measure

import fsam_optax as fsam


# Dense products a second, by NVIDIA's data sheets: bfloat16, and float32 as TF32.
PEAK = {"H100": (989e12, 495e12), "H200": (989e12, 495e12), "A100": (312e12, 156e12)}
NAIVE = "vmap(grad) squared"
MODELS: dict[str, Callable[[], cost.Problem]] = {
    "MLP": lambda: problem(MLP(), (784,), 512),
    "CNN": partial(cost.cnn, 512),
    "transf. 64": lambda: problem(Transformer(), (64,), 256),
    "transf. 1024": lambda: problem(Transformer(), (1024,), 16),
    "gpt2": lambda: gpt2(8, 512, dtype=jnp.bfloat16),
    "resnet18": lambda: problem(ResNet(64, nn.Conv, groups=8), (32, 32, 3), 512),
}
SMOKE = {
    "MLP": cost.SMOKE["tiny"],
    "gpt2": lambda: gpt2(2, 4, width=16, heads=2, depth=2, vocabulary=20),
}
# Radii of small networks here and of the papers; nothing is tuned on the device.
RADII = {
    **{"base": 0.0, "SAM": 0.05, "ASAM": 0.5, "GSAM": 0.05},
    **{f"Fisher SAM, {name}, relative": 0.1 for name in ("squared", "empirical")},
}
RATE = 0.05
# Compilation takes most of the time, that of large models most of it.
PLAN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("accuracy", ("MLP", "CNN")),
    ("cost", tuple(MODELS)),
    ("step", ("MLP", "CNN")),
    ("cifar10", ()),
    # GPT-2 is computed in bfloat16 anyway, and has no truth to be compared with.
    ("accuracy", ("transf. 64", "transf. 1024", "resnet18")),
    ("step", ("transf. 64", "gpt2", "resnet18", "transf. 1024")),
    ("naive", tuple(MODELS)),
)
PARTS = tuple(dict.fromkeys(part for part, _ in PLAN))
THREADS = 12  # In which programs are compiled.
FEW = (  # What is timed of a step of a large model.
    *("base", "SAM by hand", "SAM", "ASAM", "Fisher SAM, squared"),
    *("Fisher SAM, empirical, one pass", "Fisher SAM, empirical, apart", "GSAM"),
)


def diagonals(model: cost.Problem) -> dict[str, Callable]:
    """Returns a gradient, F by the engine, and by `vmap(grad)`."""
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    both = partial(fsam.loss_power_sums, cost.of_example(loss), powers=(1, 2))
    ours = partial(fsam.diagonal, fsam.fisher_empirical(loss))
    fns = {"gradient": jax.grad(loss), "F": ours, "gradient and F": both}
    return fns | {NAIVE: cost.plain(loss)}


def accuracy(make: Callable) -> dict[str, float]:
    """Returns relative distances: from vmap(grad) at float32, and of F from its own."""
    apply, params, batch = make()
    batch = jax.tree.map(lambda x: x[:32], batch)

    def narrow(params, x):
        params, x = jax.tree.map(
            lambda w: w.astype(jnp.bfloat16) if w.dtype == jnp.float32 else w,
            (params, x),
        )
        return jnp.float32(apply(params, x))

    def run(case):
        row, precision = case
        fn = narrow if precision == "bfloat16" else apply
        fns = diagonals(cost.Problem(fn, params, batch))
        chosen = None if precision == "default" else "highest"
        with jax.default_matmul_precision(chosen):
            return jax.jit(fns[row])(params, batch)

    def apart(a, b):
        a, b = map(jax.tree.leaves, (a, b))
        sizes = [float(jnp.linalg.norm(y)) for y in b]
        least = 1e-6 * max(sizes)  # Some are 0 but for rounding.
        pairs = zip(a, b, sizes, strict=True)
        return max(float(jnp.linalg.norm(x - y)) / max(n, least) for x, y, n in pairs)

    every = "default", "highest", "bfloat16"
    cases = [(row, precision) for precision in every for row in ("F", NAIVE)]
    with ThreadPoolExecutor(THREADS) as pool:
        made = dict(zip(cases, pool.map(run, cases), strict=True))
    truth = made[NAIVE, "highest"]
    found = {f"{row}, {p}": apart(f, truth) for (row, p), f in made.items()}
    both = {p: apart(made["F", p], made[NAIVE, p]) for p in every}
    return found | {f"between both, {p}": x for p, x in both.items()}


def fisher_cost(name: str, make: Callable, repeats: int, rows: Sequence[str]) -> dict:
    """Returns what rows cost beside the gradient, and its share of the peak."""
    model = make()
    every = diagonals(model)
    fns = {row: every[row] for row in ("gradient", *rows)}
    runs, facts = cost.programs(fns, model.params, model.batch, threads=THREADS)
    for row, found in cost.ratios(runs, repeats).items():
        facts[row] |= found
    like = jax.eval_shape(lambda: (model.params, model.batch))
    with jax.default_device(jax.devices("cpu")[0]):  # Which counts all products.
        counts = jax.jit(fns["gradient"]).lower(*like).cost_analysis() or {}
    flops = counts.get("flops", float("nan"))
    if name == "gpt2":  # XLA counts the body of a loop once.
        size = sum(x.size for x in jax.tree.leaves(model.params))
        flops = 6 * size * model.batch[1].size
    kind, spent = jax.devices()[0].device_kind, facts["gradient"]["ms"] / 1e3
    peak = [peaks[name != "gpt2"] for device, peaks in PEAK.items() if device in kind]
    facts["gradient"]["share"] = flops / spent / peak[0] if peak else None
    return facts


def step_cost(name: str, make: Callable, repeats: int) -> dict:
    """Returns what steps cost."""
    few = FEW if name in ("gpt2", "resnet18") else ()
    return measure(make(), repeats, few, threads=THREADS)


def cifar10(options) -> Callable[[int], dict[str, float]]:
    """Returns what maps a seed to the accuracy of each method, trained side by side."""
    problem = training.make_problem(options, range(options.seeds))
    trainers = {m: training.trainer(m, problem, options) for m in RADII}

    def run(seed):
        networks = problem.keys, problem.params
        networks = jax.tree.map(lambda x: x[seed : seed + 1], networks)

        def train(method):
            found = trainers[method](*networks, RADII[method], RATE)
            return found["accuracy"][0][-1]

        with ThreadPoolExecutor(len(RADII)) as pool:
            return dict(zip(RADII, pool.map(train, RADII), strict=True))

    return run


def print_tables(found: dict[str, dict[str, Any]]) -> None:
    """Prints what is there."""
    near = found["accuracy"]
    names = dict.fromkeys(name for facts in near.values() for name in facts)
    title = "Relative distance from vmap(grad) squared, highest precision"
    rows = [
        [n, *(f"{f[n]:.0e}" if n in f else "" for f in near.values())] for n in names
    ]
    show.table(title, ["", *near], rows)
    timed = {m: found["naive"].get(m, {}) | of for m, of in found["cost"].items()}
    rows = {f"{m}: {r}": f for m, of in timed.items() for r, f in of.items()}
    columns = {
        "": lambda row, _: row,
        "ms": lambda _, f: f"{f['ms']:.3g}",
        "over gradient": lambda _, f: f"{f['ratio']:.2f}",
        "temporaries, MB": lambda _, f: f"{f['temporary_mb']:.3g}",
        "share of peak": lambda _, f: f"{f['share']:.0%}" if f.get("share") else "",
    }
    show.report("Fisher diagonals", rows, columns)
    rows = dict.fromkeys(row for facts in found["step"].values() for row in facts)
    entry = "{ms:.3g} ms, {ratio:.2f}".format_map
    table = [
        [r, *(entry(f[r]) if r in f else "" for f in found["step"].values())]
        for r in rows
    ]
    show.table("Steps, over the base step", ["", *found["step"]], table, first=32)
    trained = list(found["cifar10"].values())
    last = {m: [of[m] for of in trained] for m in RADII if trained}
    columns = {
        "method": lambda method, _: method,
        "seeds": lambda _, values: len(values),
        "test accuracy, %": lambda _, values: show.cell(values, ".2f", 100),
        "over base": lambda _, v: show.over(v, last["base"], "+.2f"),
    }
    show.report("CIFAR-10 in bfloat16, equal gradients", last, columns)


# What computes a cell of a model, of its name, what makes it, and repeats.
COMPUTE = {
    "accuracy": lambda name, make, _: accuracy(make),
    "cost": partial(fisher_cost, rows=("F", "gradient and F")),
    "naive": partial(fisher_cost, rows=(NAIVE,)),
    "step": step_cost,
}


def cells(options) -> Iterator[tuple[str, str, dict[str, Any], Callable]]:
    """Yields part, name, settings and function of each cell."""
    models = SMOKE if options.smoke else MODELS
    # What was measured on one device is nothing that another one goes on with.
    every = {"device": jax.devices()[0].device_kind}
    trained = {n: getattr(options, n) for n in ("epochs", "batch_size", "model")}
    of_seed = functools.cache(partial(cifar10, options))
    for part, names in PLAN:
        if part not in options.parts:
            continue
        for name in names if part in COMPUTE else ():
            if name in models:
                key = {} if part == "accuracy" else {"repeats": options.repeats}
                compute = partial(COMPUTE[part], name, models[name], options.repeats)
                yield part, name, {"model": name, **key, **every}, compute
        for seed in range(options.seeds if part == "cifar10" else 0):
            key = {"seed": seed, "radii": RADII, "rate": RATE, **trained, **every}
            yield part, str(seed), key, lambda seed=seed: of_seed()(seed)


# What `training` wants to know beside.
FIXED = {"data": "cifar10", "train_size": None, "test_size": None, "augment": True}


@harness.experiment(
    defaults=lambda found: FIXED,
    smoke={
        **{"data": "digits", "train_size": 64, "test_size": 50, "model": "mlp"},
        **{"epochs": 1, "batch_size": 32, "seeds": 1, "repeats": 2, "minutes": 30.0},
    },
    data_dir=pathlib.Path("data/cifar10"),
    parts={"default": [*PARTS], "choices": PARTS, "help": "which"},
    minutes={"default": 9.0, "type": command_line.positive, "help": "when to end"},
    repeats=10,
    epochs={"default": 8, "help": "base runs twice as many"},
    batch_size=256,
    seeds={"default": 5, "help": "as many as fit"},
    model={"default": "resnet9", "choices": NETWORKS},
)
def main(run: harness.Run) -> None:
    options, start = run.options, time.perf_counter()
    if not options.smoke and not any(options.data_dir.rglob("*")):
        harness.say(f"No CIFAR-10 under {options.data_dir}: part (d) is left out")
        options.parts = [part for part in options.parts if part != "cifar10"]
    facts: Any = collections.defaultdict(dict)
    took: dict[str, float] = {}
    for part, name, settings, compute in cells(options):
        kept, before = run.holds(part=part, **settings), time.perf_counter()
        left = 60 * options.minutes - (before - start)
        expected = 1.2 * took.get(f"{part}, {name}", took.get(part, 0))
        if not kept and left < expected:
            harness.say(f"Left out: {part}, {name}")
            continue
        try:
            found = run.cell(compute, part=part, **settings)
        except jax.errors.JaxRuntimeError as error:  # Too large for the device.
            harness.say(f"{part}, {name} failed: {str(error).splitlines()[0]}")
            continue
        if not kept:
            took[part] = took[f"{part}, {name}"] = time.perf_counter() - before
        facts[part][name] = found
    print_tables(facts)


if __name__ == "__main__":
    raise SystemExit(main())

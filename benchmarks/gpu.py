"""Question: does it hold on an accelerator?

In order of value, each part resumable, and written as it ends: (a) how near the sums of
squares of the engine are to `vmap(grad)` squared, in the precisions of the device; (b)
what a Fisher diagonal costs, in milliseconds and as a share of the peak; (c) what a
step costs; (d) CIFAR-10 by a ResNet-18 in bfloat16 at equal gradients, one seed after
the other, as many as fit. No cell begins that is not likely to end in --minutes.

    python benchmarks/gpu.py --data-dir data/cifar10     # make gpu

It needs jax, optax, flax and this tree, and no network; without CIFAR-10 part (d) is
left out. `python benchmarks/datasets.py` packs CIFAR-10 into parts of 31 MB.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import cost
import harness
import jax
import jax.numpy as jnp
import models
import show
import steps
import training
import zoo
from cost import problem

import fsam_optax as fsam


# Dense products a second, by NVIDIA's data sheets: bfloat16, and float32 as TF32.
PEAK = {"H100": (989e12, 495e12), "H200": (989e12, 495e12), "A100": (312e12, 156e12)}
SETTINGS = "epochs", "batch_size", "model"
PRECISIONS = ("default", "highest", "bfloat16")


def resnet(batch):
    return problem(models.ResNet(64, conv=models.nn.Conv, groups=8), (32, 32, 3), batch)


MODELS: dict[str, Callable[[], cost.Problem]] = {
    "mlp": lambda: problem(models.MLP(), (784,), 512),
    "cnn": lambda: problem(cost.CNN(), (32, 32, 3), 512),
    "resnet18": lambda: resnet(512),
    "transf. 64": lambda: problem(cost.Transformer(), (64,), 256),
    "transf. 1024": lambda: problem(cost.Transformer(), (1024,), 16),
    "gpt2": lambda: zoo.gpt2(8, 512, dtype=jnp.bfloat16),
}
SMOKE = {
    "mlp": cost.SMOKE["tiny"],
    "transf. 64": lambda: problem(cost.Transformer(8, 2, 20), (4,), 4),
    "gpt2": lambda: zoo.gpt2(
        *(2, 4), width=16, heads=2, depth=2, vocabulary=20, dtype=jnp.bfloat16
    ),
}
# Rates and radii of small networks here and of the papers; nothing is tuned on the
# device.
CHOICE = {
    "base": (0.0, 0.05),
    "SAM": (0.05, 0.05),
    "ASAM": (0.5, 0.05),
    "Fisher SAM, squared, relative": (0.1, 0.05),
    "Fisher SAM, empirical, relative": (0.1, 0.05),
    "GSAM": (0.05, 0.05),
}


def squares(model: cost.Problem, example_loss) -> tuple[Callable, Callable]:
    """Returns the sums of squares of the engine, and those of vmap(grad)."""

    def ours(params, batch):
        return fsam.loss_power_sums(example_loss, params, batch)[0]

    def plain(params, batch):
        g = jax.vmap(jax.grad(example_loss), (None, 0))(params, batch)
        return jax.tree.map(lambda g: jnp.sum(jnp.float32(g) ** 2, 0), g)

    return ours, plain


def example_loss_of(model: cost.Problem):
    """Returns the loss of the model, and that of one example."""
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    return loss, lambda params, example: loss(
        params, jax.tree.map(lambda x: x[None], example)
    )


def accuracy(make: Callable, rows: int) -> dict[str, float]:
    """Returns the relative distance from vmap(grad) at the highest precision."""
    model = make()
    model = model._replace(batch=jax.tree.map(lambda x: x[:rows], model.batch))
    found = {}

    def run(which, precision):
        with jax.default_matmul_precision(
            "highest" if precision != "default" else None
        ):
            apply, params, batch = model
            if precision == "bfloat16":
                narrow = partial(jax.tree.map, lambda w: w.astype(jnp.bfloat16))
                wide = apply
                apply = lambda params, x: jnp.float32(wide(narrow(params), x))  # noqa: E731
            _, example_loss = example_loss_of(model._replace(apply=apply))
            fn = squares(model, example_loss)[which]
            return jax.jit(fn)(params, batch)

    def apart(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs)

    truth = run(1, "highest")
    for precision in PRECISIONS:
        try:
            ours, plain = run(0, precision), run(1, precision)
            jax.block_until_ready((ours, plain))
        except jax.errors.JaxRuntimeError:  # No such products on this device.
            continue
        found[f"ours, {precision}"] = apart(ours, truth)
        found[f"vmap(grad), {precision}"] = apart(plain, truth)
        found[f"ours from vmap(grad), {precision}"] = apart(ours, plain)
    return found


def fisher_cost(name: str, make: Callable, repeats: int) -> dict[str, Any]:
    """Returns milliseconds, memory and work of a gradient and of Fisher diagonals."""
    model = make()
    loss, example_loss = example_loss_of(model)
    ours, plain = squares(model, example_loss)

    def both(params, batch):
        return fsam.loss_power_sums(example_loss, params, batch, powers=(1, 2))

    fns = {"gradient": jax.grad(loss), "F": ours, "gradient and F": both}
    if name != "gpt2":
        fns["vmap(grad) squared"] = plain
    facts, runs = {}, {}
    for row, fn in fns.items():
        try:
            program, facts[row] = cost.compiled(fn, model.params, model.batch)
            runs[row] = partial(program, model.params, model.batch)
            jax.block_until_ready(runs[row]())
        except jax.errors.JaxRuntimeError as error:  # Too large for the device.
            facts[row] = {"failed": str(error).splitlines()[0][:100]}
            runs.pop(row, None)
    for row, found in cost.ratios(runs, repeats).items():
        start = time.perf_counter()
        jax.block_until_ready([runs[row]() for _ in range(repeats)][-1])
        facts[row] |= found | {"ms": 1e3 * (time.perf_counter() - start) / repeats}
    lowered = jax.jit(fns["gradient"]).lower(model.params, model.batch)
    flops = (lowered.cost_analysis() or {}).get("flops", float("nan"))
    if name == "gpt2":  # XLA counts the body of a loop once.
        size = sum(x.size for x in jax.tree.leaves(model.params))
        flops = 6 * size * model.batch[1].size
    return {"rows": facts, "flops": flops}


def share(ms: float, flops: float, low: bool) -> str:
    """Returns the share of the device's peak, a dash where that is not known."""
    kind = jax.devices()[0].device_kind
    for name, (narrow, wide) in PEAK.items():
        if name in kind:
            return f"{flops / (ms / 1e3) / (narrow if low else wide):.0%}"
    return "-"


def print_tables(facts: dict[str, dict[str, Any]]) -> None:
    """Prints what is there."""
    found = facts["accuracy"]
    if found:
        names = dict.fromkeys(name for facts in found.values() for name in facts)
        rows = [
            [n, *(f"{f[n]:.0e}" if n in f else "-" for f in found.values())]
            for n in names
        ]
        title = "Relative distance from vmap(grad) squared, highest precision"
        show.table(title, ["", *found], rows)
    rows = []
    for name, entry in facts["cost"].items():
        for row, f in entry["rows"].items():
            if "failed" in f:
                rows.append([f"{name}: {row}", "-", "-", "-", f["failed"][:20]])
                continue
            of = share(f["ms"], entry["flops"], name == "gpt2")
            cells = f"{f['ms']:.3g}", f"{f['ratio']:.2f}", f"{f['temporary_mb']:.3g}"
            rows.append([f"{name}: {row}", *cells, of if row == "gradient" else ""])
    headings = ["", "ms", "over gradient", "temporaries, MB", "share of peak"]
    if rows:
        show.table("Fisher diagonals", headings, rows)
    if facts["step"]:
        cost.print_tables("Ratio to the base step", facts["step"])
    runs = facts["cifar10"]
    rows = []
    for method, found in runs.items():
        values = [f["accuracy"][0][-1] for f in found]
        paired = [f["accuracy"][0][-1] for f in runs["base"][: len(values)]]
        over = [a - b for a, b in zip(values, paired, strict=False)]
        cells = show.cell(values, ".2f", 100), show.cell(over, "+.2f", 100)
        rows.append([method, len(values), *cells])
    if rows:
        headings = ["method", "seeds", "test accuracy, %", "over base"]
        show.table("CIFAR-10, ResNet-18 in bfloat16, equal gradients", headings, rows)


def parts(options, data: bool) -> list[tuple[str, str, dict[str, Any], Callable]]:
    """Returns part, name, settings and function of cells, the most wanted first."""
    every = SMOKE if options.smoke else MODELS
    repeats = {"repeats": options.repeats}
    cells = []
    for name, make in every.items():
        if name != "gpt2":
            compute = partial(accuracy, make, 32)
            cells.append(("accuracy", name, {"model": name, "rows": 32}, compute))
    for name, make in every.items():
        compute = partial(fisher_cost, name, make, options.repeats)
        cells.append(("cost", name, {"model": name, **repeats}, compute))
    for name in [name for name in every if name in ("mlp", "transf. 64", "resnet18")]:

        def step(make=every[name]):
            return steps.measure(make(), steps.OPTIMIZERS["sgd"], options.repeats)

        cells.append(("step", name, {"model": name, **repeats}, step))
    for seed in range(options.seeds if data else 0):
        for method, (rho, rate) in CHOICE.items():
            settings = {"method": method, "seed": seed, "rho": rho, "rate": rate}
            settings |= {n: getattr(options, n) for n in SETTINGS}
            compute = partial(cifar10, options, method, seed, rho, rate)
            cells.append(("cifar10", method, settings, compute))
    return cells


def cifar10(options, method, seed, rho, rate):
    """Trains one network by one method."""
    problem = training.make_problem(options, seeds=[seed])
    return training.train(method, problem, options, rho, rate)


def experiment(run: harness.Run) -> None:
    """Runs what is wanted most first, and what fits into the time."""
    options, start = run.options, time.perf_counter()
    data = options.smoke or any(options.data_dir.rglob("*"))
    if not data:
        harness.say(f"No CIFAR-10 under {options.data_dir}: part (d) is left out")
    facts: dict[str, dict[str, Any]] = {p: {} for p in ("accuracy", "cost", "step")}
    facts["cifar10"] = {}
    took: dict[str, float] = {}
    for part, name, settings, compute in parts(options, data):
        kept = run.holds(part=part, **settings)
        left = 60 * options.minutes - (time.perf_counter() - start)
        if not kept and left < 1.2 * took.get(f"{part}, {name}", took.get(part, 0)):
            harness.say(f"No time for {part}, {name}")
            continue
        before = time.perf_counter()
        try:
            found = run.cell(compute, part=part, **settings)
        except jax.errors.JaxRuntimeError as error:
            harness.say(f"{part}, {name} failed: {str(error).splitlines()[0]}")
            continue
        if not kept:
            took[part] = took[f"{part}, {name}"] = time.perf_counter() - before
        if part == "cifar10":
            facts[part].setdefault(name, []).append(found)
        else:
            facts[part][name] = found
    print_tables(facts)


def defaults(found: argparse.Namespace) -> dict[str, Any]:
    """Returns what `training` wants to know beside."""
    settings = {"data": "cifar10", "train_size": None, "test_size": None}
    settings |= {"label_noise": 0.0, "augment": True, "optimizer": "sgd"}
    return settings | {"weight_decay": 5e-4}


main = harness.script(
    *(__doc__, experiment),
    defaults=defaults,
    smoke={
        **{"data": "digits", "train_size": 64, "test_size": 50, "model": "mlp"},
        **{"epochs": 1, "batch_size": 32, "seeds": 1, "repeats": 2, "minutes": 30.0},
    },
    data_dir=pathlib.Path("data/cifar10"),
    minutes={"default": 9.0, "type": harness.positive, "help": "when to end"},
    repeats=20,
    epochs={"default": 8, "help": "base runs twice as many"},
    batch_size=256,
    seeds={"default": 5, "help": "as many as fit"},
    model={"default": "resnet18", "choices": models.MODELS},
)


if __name__ == "__main__":
    sys.exit(main())

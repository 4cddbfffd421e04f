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

import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import command_line
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


def rows_of(model: cost.Problem) -> tuple[Any, dict[str, Callable]]:
    """Returns the loss, and F by the engine and by `vmap(grad)`."""
    loss = fsam.negative_log_likelihood(model.apply, fsam.categorical)
    ours = partial(fsam.diagonal, fsam.fisher_empirical(loss))
    return loss, {"ours": ours, "vmap(grad)": cost.plain(loss)}


def accuracy(make: Callable, rows: int) -> dict[str, float]:
    """Returns the relative distance from vmap(grad) at the highest precision."""
    apply, params, batch = make()
    batch = jax.tree.map(lambda x: x[:rows], batch)
    found = {}

    def narrow(params, x):
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        return jnp.float32(apply(params, x))

    def run(row, precision):
        model = cost.Problem(
            narrow if precision == "bfloat16" else apply, params, batch
        )
        precision = "highest" if precision != "default" else None
        with jax.default_matmul_precision(precision):
            return jax.jit(rows_of(model)[1][row])(params, batch)

    def apart(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs)

    truth = run("vmap(grad)", "highest")
    for precision in PRECISIONS:
        try:
            ours, plain = run("ours", precision), run("vmap(grad)", precision)
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
    loss, rows = rows_of(model)
    both = partial(fsam.loss_power_sums, cost.of_example(loss), powers=(1, 2))
    fns = {"gradient": jax.grad(loss), "F": rows["ours"], "gradient and F": both}
    if name != "gpt2":
        fns["vmap(grad) squared"] = rows["vmap(grad)"]
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


def step_time(make: Callable, repeats: int) -> dict[str, Any]:
    """Returns what steps cost beside the base step."""
    return steps.measure(make(), steps.OPTIMIZERS["sgd"], repeats)


def cifar10(options, method, seed, rho, rate):
    """Trains one network by one method."""
    problem = training.make_problem(options, seeds=[seed])
    return training.train(method, problem, options, rho, rate)


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
    rows = []
    last = {m: [f["accuracy"][0][-1] for f in of] for m, of in facts["cifar10"].items()}
    for method, values in last.items():
        over = show.over(values, last["base"][: len(values)], "+.2f")
        rows.append([method, len(values), show.cell(values, ".2f", 100), over])
    if rows:
        headings = ["method", "seeds", "test accuracy, %", "over base"]
        show.table("CIFAR-10, ResNet-18 in bfloat16, equal gradients", headings, rows)


def parts(options, data: bool) -> Iterator[tuple[str, str, dict[str, Any], Callable]]:
    """Yields part, name, settings and function of cells, the most wanted first."""
    every = SMOKE if options.smoke else MODELS
    repeats = options.repeats
    for name in [name for name in every if name != "gpt2"]:
        key = {"model": name, "rows": 32}
        yield "accuracy", name, key, partial(accuracy, every[name], 32)
    for name, make in every.items():
        key = {"model": name, "repeats": repeats}
        yield "cost", name, key, partial(fisher_cost, name, make, repeats)
    for name in [name for name in every if name in ("mlp", "transf. 64", "resnet18")]:
        key = {"model": name, "repeats": repeats}
        yield "step", name, key, partial(step_time, every[name], repeats)
    for seed in range(options.seeds if data else 0):
        for method, (rho, rate) in CHOICE.items():
            key = {"method": method, "seed": seed, "rho": rho, "rate": rate}
            key |= {n: getattr(options, n) for n in SETTINGS}
            compute = partial(cifar10, options, method, seed, rho, rate)
            yield "cifar10", method, key, compute


# What `training` wants to know beside.
FIXED = {
    **{"data": "cifar10", "train_size": None, "test_size": None, "weight_decay": 5e-4},
    **{"label_noise": 0.0, "augment": True, "optimizer": "sgd"},
}


@harness.experiment(
    defaults=lambda found: FIXED,
    smoke={
        **{"data": "digits", "train_size": 64, "test_size": 50, "model": "mlp"},
        **{"epochs": 1, "batch_size": 32, "seeds": 1, "repeats": 2, "minutes": 30.0},
    },
    data_dir=pathlib.Path("data/cifar10"),
    minutes={"default": 9.0, "type": command_line.positive, "help": "when to end"},
    repeats=20,
    epochs={"default": 8, "help": "base runs twice as many"},
    batch_size=256,
    seeds={"default": 5, "help": "as many as fit"},
    model={"default": "resnet18", "choices": models.MODELS},
)
def main(run: harness.Run) -> None:
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


if __name__ == "__main__":
    raise SystemExit(main())

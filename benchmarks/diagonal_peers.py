# pyright: reportMissingImports=false
"""Question: do other libraries find the same diagonals, and what do they cost there?

The same weights and data in PyTorch and in JAX. The error is the largest difference
from a float64 reference that forms the gradient of each example and output, within an
array of parameters, relative to the largest entry there; of drawn labels, the distance
of the mean of many draws, in standard errors. The time is processor time, relative to
the library's own gradient of the batch in the same round. It wants its own environment:

    pip install torch==2.13.0+cpu flax rich .
    pip install --no-deps backpack-for-pytorch unfoldNd nngeometry laplace-torch \\
        asdfghjkl==0.1a4 curvlinops-for-pytorch einops einconv opt_einsum tqdm \\
        linear_operator torchmetrics lightning-utilities packaging
    taskset -c 0 python benchmarks/diagonal_peers.py

laplace-torch runs with its default backend and with ASDL. curvlinops has linear
operators, whose diagonal is read off their products with the identity.
"""

import copy
import importlib
import itertools
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import cost
import harness
import jax
import numpy as np
import show
from peer_models import CASES, MODELS, Problem, torch

import fsam_optax as fsam


EXACT, EMPIRICAL, DRAWN = KINDS = ("exact", "empirical", "drawn")
OURS, SQUARED = "fsam_optax", "squared batch gradient"
RIGHT = 1e-5
MEANS = ("dense", "convolutions")  # Where the mean of many draws is compared.
LARGEST = 2e9  # Bytes of Jacobians that a peer may form.

# One function a library: it returns `run()`, which computes the mean over examples, as
# a vector in the order of the parameters.


def ours(problem: Problem, kind: str) -> Callable:
    nll, (params, batch) = problem.nll(), problem.in_jax()
    if kind == DRAWN:

        @jax.jit
        def drawn(params, batch, key):
            return fsam.diagonal(fsam.fisher_i1(nll, key=key), params, batch)

        keys = map(jax.random.key, itertools.count())
        return lambda: drawn(params, batch, next(keys))
    make = fsam.fisher_exact if kind == EXACT else fsam.fisher_empirical
    return partial(jax.jit(partial(fsam.diagonal, make(nll))), params, batch)


def backpack(problem: Problem, kind: str) -> Callable:
    from backpack import backpack, extend, extensions

    names = {EXACT: "DiagGGNExact", EMPIRICAL: "SumGradSquared", DRAWN: "DiagGGNMC"}
    extension = getattr(extensions, names[kind])()
    loss = extend(problem.loss(reduction="sum"))
    # A squared error is two negative log-likelihoods of unit variance.
    scale = (0.25 if kind == EMPIRICAL else 0.5) if problem.real else 1.0

    def make(converted):
        model = extend(copy.deepcopy(problem.model), use_converter=converted).eval()
        params = list(model.parameters())

        def run():
            model.zero_grad()
            with backpack(extension):
                loss(model(problem.x), problem.y).backward()
            found = [getattr(p, extension.savefield, None) for p in params]
            found = torch.cat([f.flatten() for f in found if f is not None])
            return scale * found / len(problem.x)

        problem.parts(run())
        return run

    try:
        return make(converted=False)
    except Exception as error:
        try:  # With the operations of the graph as modules that it knows.
            return make(converted=True)
        except Exception:
            raise error from None


def nngeometry(problem: Problem, kind: str) -> Callable:
    from nngeometry.metrics import FIM, FIM_MonteCarlo
    from nngeometry.object import PMatDiag

    model, loss = copy.deepcopy(problem.model), problem.loss(reduction="none")
    options: dict[str, Any] = {
        "variant": "regression" if problem.real else "classif_logits"
    }
    if kind == EMPIRICAL:
        # It has no name for it; the square of the loss's own derivative it is.
        def losses(x, y):
            return (0.5 if problem.real else 1.0) * loss(model(x), y).reshape(-1, 1)

        options = {"variant": "regression", "function": losses}
    make = FIM_MonteCarlo if kind == DRAWN else FIM
    return lambda: make(model, problem.loader(), PMatDiag, **options).get_diag()


@cache
def laplace_torch() -> tuple[Any, Any]:
    """Imports laplace-torch; a recipe in this folder has its name."""
    before, own = list(sys.path), sys.modules.pop("laplace", None)
    sys.path[:] = [p for p in before if pathlib.Path(p).resolve() != harness.HERE]
    try:
        names = "laplace", "laplace.curvature"
        package, curvature = map(importlib.import_module, names)
    finally:
        sys.path[:] = before
        if own is not None:
            sys.modules["laplace"] = own
    return package, curvature


def laplace(backend: str, problem: Problem, kind: str) -> Callable:
    package, curvature = laplace_torch()
    model = copy.deepcopy(problem.model)
    size = sum(p.numel() for p in model.parameters()) * len(problem.x) * 4
    size *= 1 if kind == EMPIRICAL else model(problem.x[:1]).shape[-1]
    if backend == "Curvlinops" and size > LARGEST:
        raise MemoryError(f"{size / 1e9:.1f} GB of Jacobians")
    posterior = package.Laplace(
        model,
        "regression" if problem.real else "classification",
        subset_of_weights="all",
        hessian_structure="diag",
        backend=getattr(curvature, backend + ("EF" if kind == EMPIRICAL else "GGN")),
        backend_kwargs={} if kind == EMPIRICAL else {"stochastic": kind == DRAWN},
    )

    def run():
        posterior.fit(problem.loader())
        return posterior.H / len(problem.x)

    return run


def curvlinops(problem: Problem, kind: str) -> Callable:
    import curvlinops

    model = copy.deepcopy(problem.model)
    params = list(model.parameters())
    size = sum(p.numel() for p in params)
    if size > 1000 or kind == DRAWN:
        raise MemoryError(f"{size} products, one for each parameter")
    names = {EXACT: "GGN", EMPIRICAL: "EF"}
    make = getattr(curvlinops, f"{names[kind]}LinearOperator")
    scale = (0.25 if kind == EMPIRICAL else 0.5) if problem.real else 1.0

    def run():
        data = [(problem.x, problem.y)]
        operator = make(model, problem.loss(), params, data, check_deterministic=False)
        return scale * torch.diagonal(operator @ torch.eye(size))

    return run


LIBRARIES = {
    OURS: ours,
    "BackPACK": backpack,
    "nngeometry": nngeometry,
    "laplace-torch": partial(laplace, "Curvlinops"),
    "laplace-torch, ASDL": partial(laplace, "Asdl"),
    "curvlinops": curvlinops,
}


def compared(found: dict, true: dict) -> dict:
    """Returns the error of a diagonal, and by which number it is too large."""
    # Some arrays have no gradient at all, such as the bias of an attention's keys.
    least = 1e-6 * max(a.max() for a in true.values())

    def error(factor):
        differences = {n: abs(found[n] - factor * a).max() for n, a in true.items()}
        return max(d / max(true[n].max(), least) for n, d in differences.items())

    facts = {"error": float(error(1.0))}
    factor = sum(f.sum() for f in found.values()) / sum(a.sum() for a in true.values())
    if error(factor) < RIGHT < facts["error"]:
        facts["factor"] = float(factor)
    return facts


def distance(draws: list[dict], true: dict) -> dict:
    """Returns how far the mean of draws is from the truth, in standard errors."""
    stacked = {n: np.stack([draw[n] for draw in draws]) for n in true}
    off = sum(((a.mean(0) - true[n]) ** 2).sum() for n, a in stacked.items())
    error = sum((a.var(0, ddof=1) / len(draws)).sum() for a in stacked.values())
    return {"standard_errors": float((off / error) ** 0.5)}


def measure(make: Callable, draws: int, repeats: int) -> dict:
    """Returns for each library and kind its error, or why it fails, and its time."""
    problem = make()
    true = dict(zip((*KINDS[:2], SQUARED), problem.reference(), strict=True))
    params, batch = problem.in_jax()
    own = partial(jax.jit(jax.grad(problem.nll())), params, batch)
    results: dict = {SQUARED: {EMPIRICAL: compared(true[SQUARED], true[EMPIRICAL])}}
    for library, kind in itertools.product(LIBRARIES, KINDS):
        facts = results.setdefault(library, {})[kind] = {}
        try:
            run = LIBRARIES[library](problem, kind)
            found = problem.parts(run())
            if kind != DRAWN:
                facts |= compared(found, true[kind])
            elif draws:
                many = [problem.parts(run()) for _ in range(draws)]
                facts |= distance(many, true[EXACT])
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
    words = []
    if "fails" in facts:
        words = ["-" if facts["fails"].startswith("MemoryError") else "fails"]
    if "standard_errors" in facts:
        words = [f"{facts['standard_errors']:.1f} se"]
    if "error" in facts:
        error, factor = facts["error"], facts.get("factor")
        off = "NaN" if error is None else f"off {error:.0%}"
        right = error is not None and error < RIGHT
        words = [f"{error:.0e}" if right else f"{factor:.2f} F" if factor else off]
    if "ratio" in facts:
        words.append(f"{facts['ratio']:.1f}")
    return " ".join(words)


@harness.experiment(
    smoke={"cases": ["dense"], "models": ["dense"], "draws": 5, "repeats": 2},
    cases={"nargs": "*", "choices": CASES, "default": [*CASES]},
    models={"nargs": "*", "choices": [*MODELS, *CASES], "default": [*MODELS]},
    draws=50,
    repeats=3,
    threads=1,
)
def main(run: harness.Run) -> None:
    options = run.options
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    cases = {}
    for name in options.cases:
        draws = options.draws if name in MEANS else 0
        args = measure, CASES[name], draws, 0
        cases[name] = run.cell(*args, case=name, draws=draws)
    costs, about = {}, run.take("repeats threads")
    for name in options.models:
        args = measure, (MODELS | CASES)[name], 0, options.repeats
        costs[name] = run.cell(*args, model=name, **about)
    for title, results in (("Error", cases), ("Error, and time", costs)):
        for kind in KINDS:
            rows = [
                [name, *(written(r[library][kind]) for library in LIBRARIES)]
                for name, r in results.items()
            ]
            if any(any(row[1:]) for row in rows):
                show.table(f"{title}: {kind}", ["", *LIBRARIES], rows, first=20)


if __name__ == "__main__":
    raise SystemExit(main())

"""Sums of multiples of one value, entry by entry: `c_1 s + c_2 s = (c_1 + c_2) s`.

The derivative of a map of single entries comes in such parts, as that of tanh does:
`(1 - y) g + y (1 - y) g`. Added up first, the multiples are one number for each entry,
by which g is moved, and whatever else is moved from g shares what sums its powers.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fsam_optax._engine.jaxpr import Dataflow, read
from fsam_optax._engine.primitives import DIVISION, name_of, NEGATION, SCALING


MODERATE = 1e4  # What scales entries after their powers are summed.


def scaled_by(
    flow: Dataflow, eqns: Iterable[Any], scale: tuple[float, float]
) -> tuple[float, float]:
    """Returns between what sizes known constants are, with those of equations too."""
    low, high = scale
    for eqn in (eqn for eqn in eqns if name_of(eqn) in SCALING):
        known = [flow.known_value(v) for v in eqn.invars if not flow.varies(v)]
        for x in (np.abs(np.asarray(x, float)) for x in known if x is not None):
            sizes = x[x != 0]
            if len(sizes):
                sizes = 1 / sizes if name_of(eqn) == DIVISION else sizes
                low, high = low * np.min(sizes), high * np.max(sizes)
    return low, high


def is_moderate(scale: tuple[float, float]) -> bool:
    """Tells whether powers of constants leave float32 no sooner than those of products.

    Of a chain of them the product counts: each alone may be moderate.
    """
    low, high = scale
    return 1 / MODERATE < low and high < MODERATE


def common_multiple(
    flow: Dataflow, terms: Sequence[Any], operand: Callable[[Dataflow, Any], int | None]
) -> tuple[Any, list[list[Any]]] | None:
    """Returns what all terms are multiples of, and the equations that scale each.

    Args:
        flow: The program.
        terms: Several variables.
        operand: Tells which operand an equation moves; None if it moves none.
    """
    ways = []
    for v in terms:
        way: dict[Any, list[Any]] = {v: []}
        while name_of(eqn := flow.made_by(v)) in SCALING:
            i = operand(flow, eqn)
            if i is None or eqn.invars[i].aval.shape != v.aval.shape:
                break
            way[eqn.invars[i]] = [*way[v], eqn]
            v = eqn.invars[i]
        ways.append(way)
    base = next((v for v in ways[0] if all(v in way for way in ways)), None)
    if len(terms) < 2 or base is None:
        return None
    return base, [way[base] for way in ways]


def scales(flow: Dataflow, scaled: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """Returns the variables, the same for all examples, that equations scale by."""
    return tuple(
        x for eqns in scaled for e in eqns for x in e.invars if not flow.varies(x)
    )


def multiple(
    flow: Dataflow, scaled: Sequence[Sequence[Any]], env: dict[Any, Any], dtype: Any
) -> Any:
    """Returns the sum of the numbers by which equations scale an entry.

    Args:
        flow: The program.
        scaled: For each term the equations.
        env: The values of the program.
        dtype: What to compute in.
    """
    total: Any = 0.0
    for eqns in scaled:
        number: Any = 1.0
        for e in eqns:
            if name_of(e) == NEGATION:
                number = -number
                continue
            (by,) = (read(env, x) for x in e.invars if not flow.varies(x))
            by = jnp.asarray(by, dtype)
            number = number / by if name_of(e) == DIVISION else number * by
        total = total + number
    return total

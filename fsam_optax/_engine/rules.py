"""The rules by which powers of a gradient are summed over examples: one table.

A gradient is moved (`moves`) from sources. Each source is handed to the rules of
`RULES` one after the other, and the one of the least work is taken; among equals the
first. A rule is a function of a `Site`, which is a sum of variables and the program
that they lie in, and returns a `Source` or None. A source says what a rule is called,
what it costs, which variables it reads, and how it sums.

To add one, say for gradients that are circulant matrices:

1. Write `circulant(site) -> Source | None`. Look at the equation that makes
   `site.terms[0]`; return None unless it is what the rule is for, and unless
   `site.is_small` holds for all that the rule reads, as nothing larger than the
   activations may be held for all examples.
2. Return `Source("circulant", work, operands, reduce)`. `work` counts operations for
   one example, a multiplication and its addition as two, as `work.operations` does: the
   cost that `explain` reports is `work` divided by that of the gradient's own.
   `reduce(has, weight, *values)` is as in `sums`; `squares.looped` makes one from a
   function of one example, for both ways to sum: over examples and, where
   `site.what.by_example`, over the entries of each. A rule that sums in another way
   says how for both, or returns None for the other.
3. Add the function to `RULES`, and a program to the list in `tests/test_engine.py` that
   names the rule: it is compared there with per-example gradients formed in full.

A primitive through which powers pass is a line of `moves.MOVES`, one that keeps
products apart is a line of `linear.LINEAR`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.extend.core import Literal

from fsam_optax._engine.factored import factored
from fsam_optax._engine.indexed import indexed_product, symmetric
from fsam_optax._engine.jaxpr import size
from fsam_optax._engine.mirrored import by_strips, mirrored
from fsam_optax._engine.primitives import (
    CONTRACTIONS,
    LINEAR_MOVES,
    name_of,
    SCATTER,
)
from fsam_optax._engine.rows import embedding
from fsam_optax._engine.sources import Site, Source
from fsam_optax._engine.tails import joint, tail, whole
from fsam_optax._engine.work import IN_LOOPS, total


FALLBACK = "fallback"


def constant(site: Site) -> Source | None:
    """The same for all examples, or without entries."""
    empty = not all(map(size, site.terms))
    if any(map(site.flow.varies, site.terms)) and not empty:
        return None
    return whole(site, "constant", 0.0 if empty else site.own_work())


def contraction(site: Site) -> Source | None:
    """Sums of products, convolutions and scattered rows, formed example by example."""
    if (pair := mirrored(site)) is not None:
        matrix, sign = pair
        found = _contracted(matrix)
        return found and tail(matrix, *found, summing=by_strips(sign))
    found = _contracted(site)
    return None if found is None else tail(site, *found)


def _contracted(site: Site) -> tuple[list[Any], str] | None:
    """Returns the operands of contractions, and the name of the rule; or None."""
    region = [e for e in site.region() if not _held_anyway(site, e)]
    names = [name_of(e) for e in region]
    found = [CONTRACTIONS[name] for name in names if name in CONTRACTIONS]
    operands = _boundary(site, region)
    if not found or not all(map(site.is_small, operands)):
        return None
    rule = " + ".join(sorted(set(found)))
    mapped = any(
        any(v in site.inside for v in e.invars if not isinstance(v, Literal))
        for e, name in zip(region, names, strict=True)
        if name not in LINEAR_MOVES and name not in ("add", "add_any")
    )
    return operands, f"mapped {rule}" if mapped else rule


def joined(sites: dict[Any, Site], sources: dict[Any, Source]) -> dict[Any, Source]:
    """Joins sources that come from the same product: it is formed for all at once.

    Those of the most work are joined, as many as make it the least.
    """
    # By contraction, all those of a group, and the sources that need them.
    groups: dict[int, tuple[list[int], list[Any]]] = {}
    for key in sources:
        formed = _formed(sites[key])
        same = {id(g): g for x in formed if (g := groups.get(x))}.values()
        group = [x for g, _ in same for x in g], [k for _, keys in same for k in keys]
        group[0].extend(formed)
        group[1].append(key)
        groups.update(dict.fromkeys(group[0], group))
    found = dict(sources)
    shared = {id(keys): keys for _, keys in groups.values() if len(keys) > 1}
    for keys in shared.values():
        whole = {key: x for key in keys if (x := _contracted(sites[key]))}
        dearest = sorted(whole, key=lambda key: -sources[key].work)
        best = sum(sources[key].work for key in keys), {}
        for several in (dearest[:n] for n in range(2, len(dearest) + 1)):
            stop = [v for key in several for v in whole[key][0]]
            names = [whole[key][1] for key in several]
            sources_of = joint([sites[key] for key in several], stop, names)
            new = dict(zip(several, sources_of, strict=True))
            rest = sum(sources[key].work for key in keys if key not in new)
            work = rest + sum(x.work for x in new.values())
            if work < best[0]:
                best = work, new
        found.update(best[1])
    return found


def _formed(site):
    """Returns the contractions in the region of a site."""
    return [id(e) for e in site.region() if name_of(e) in CONTRACTIONS]


def _held_anyway(site, eqn):
    """Tells whether an equation is a loop that runs anyway, and yields little."""
    return site.runs_anyway(eqn) and all(map(site.is_small, eqn.outvars))


def _boundary(site, region):
    made = {v for e in region for v in e.outvars}
    reads = [*(v for e in region for v in e.invars), *site.terms]
    return [v for v in reads if not isinstance(v, Literal) and v not in made]


# What needs nothing but the program and the activations. In this order.
RULES: tuple[Callable[[Site], Source | None], ...] = (
    constant,
    embedding,
    symmetric,
    indexed_product,
    factored,
    contraction,
)


def chosen(site: Site) -> Source | None:
    """Returns the source of the least work; None if no rule applies."""
    found = [source for rule in RULES if (source := rule(site)) is not None]
    return min(found, key=lambda source: source.work, default=None)


# What needs to know what is held anyway.


def reduction(site: Site, held: set[Any], largest: int) -> Source | None:
    """Evaluates a value no larger than the activations for all examples at once."""
    if largest > site.what.limit:
        return None
    # What leads to its linear maps the gradient of the batch takes too, and loops.
    made = site.flow.ancestors(site.terms, stop=held)
    eqns = [
        e
        for e in site.region()
        if not made.isdisjoint(e.outvars) and not site.runs_anyway(e)
    ]
    adding = (len(site.terms) - 1 + site.what.per_entry) * size(site.terms[0])
    # Rows that each example scatters come one after the other.
    rows = [size(e.invars[-1]) for e in eqns if name_of(e) == SCATTER]
    waits = IN_LOOPS * sum(rows)
    source = whole(site, "reduction", total(eqns) + waits + adding)
    return dataclasses.replace(source, waits=waits)


def fallback(site: Site, held: set[Any]) -> Source:
    """Forms the gradient of each example, a few at a time."""
    # Nothing to choose from: little more than the operations.
    source = tail(site, held, FALLBACK, waiting=1.2)
    return dataclasses.replace(source, note=_reason(site))


def _reason(site):
    """Says what keeps a gradient from the rules."""
    made = []
    for e in site.region():
        outside = [
            x for x in e.invars if not isinstance(x, Literal) and x not in site.inside
        ]
        if any(not site.is_small(x) for x in outside):
            # Either what reads a large array, or what makes the factor of a product.
            product = name_of(e) in CONTRACTIONS
            made += (
                [name_of(site.flow.made_by(x)) for x in outside]
                if product
                else [name_of(e)]
            )
    made = made or [name_of(site.flow.made_by(v)) for v in site.terms]
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(made) if name)
    return f"its gradient comes out of {names or 'the inputs'}, which no rule knows."

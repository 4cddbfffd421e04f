"""The terms of a sum, collected: what they share is multiplied once.

`a g + b g = (a + b) g` is one product, and its square one matrix product, where that of
two products would be three.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from fsam_optax._engine.folding import Added, Contracted, Folded, made, relabelled
from fsam_optax._engine.products import Expander


WITHIN = 1000  # The number of the first label that is summed over within a factor.


def combined(expander: Expander, terms: Sequence[Folded]) -> list[Folded]:
    """Joins terms of the same factors that vary: their constants are added first."""
    found: dict[Any, list[Folded]] = {}
    for t in terms:
        shared = {
            x: expander.standard(i, expander.sizes[x]) for i, x in enumerate(t.summed)
        }
        names = {x: x for x in t.out} | shared
        varying = tuple(_renamed(expander, f, names) for f in t.varying)
        key = varying, t.axes, t.precision
        found.setdefault(key, []).append(dataclasses.replace(t, varying=varying))
    return [_added(same) if len(same) > 1 else same[0] for same in found.values()]


def _renamed(expander, x, names):
    """Names the labels that are summed over within an expression by their order."""
    within: dict[int, int] = {}

    def name(label):
        if label in names:
            return names[label]
        if label not in within:
            i = WITHIN + len(within)
            within[label] = expander.standard(i, expander.sizes[label])
        return within[label]

    return relabelled(x, name)


def counted_once(
    expander: Expander, terms: Sequence[Folded], examples: int
) -> list[Folded]:
    """Counts the work of what several terms share once: it is done once."""
    found, seen = [], set()
    for t in terms:
        again = 0.0
        for x in (y for varies in (True, False) for y in made(t.varying, varies)):
            if x in seen and isinstance(x, Contracted):
                labels = {label for part in x.parts for label in part.labels}
                n = math.prod(expander.sizes[label] for label in labels)
                n *= 2.0 if len(labels) > len(x.labels) else 1.0
                again += n if x.varies else n / examples
            seen.add(x)
        found.append(dataclasses.replace(t, work=t.work - again))
    return found


def _added(terms):
    labels = {x: 0 for t in terms for mask in t.masks for x in mask.labels}
    parts = tuple((t.scale, (*t.masks, *t.numbers)) for t in terms)
    mask = Added(parts, tuple(labels))
    masks, numbers = ((mask,), ()) if labels else ((), (mask,))
    return dataclasses.replace(terms[0], scale=1.0, masks=masks, numbers=numbers)


def distributed(
    expander: Expander, terms: Sequence[Folded], limit: int
) -> list[Folded]:
    """Adds up what the same factor is multiplied with: `a g + b g = (a + b) g`.

    Args:
        expander: Knows the sizes of the labels.
        terms: The terms, of one or two factors that vary.
        limit: Size of the largest array that may be formed for each example.
    """
    pending, found = list(terms), []
    while pending:
        t = pending.pop(0)
        for g in t.varying[::-1]:
            own = _beside(t, g)
            same = [s for s in pending if g in s.varying]
            same = [s for s in same if _beside(s, g)[1] == own[1]]
            parts = tuple(_beside(s, g)[0] for s in (t, *same))
            labels = tuple({x: 0 for _, fs in parts for f in fs for x in f.labels})
            n = math.prod(expander.sizes[x] for x in labels)
            if same and n <= limit:
                work = t.work + sum(s.work for s in same) + 2.0 * n * len(parts)
                masks, *_ = own[1]
                t = dataclasses.replace(
                    t,
                    scale=1.0,
                    varying=(Added(parts, labels, True), g),
                    masks=masks,
                    numbers=(),
                    work=work,
                )
                pending = [s for s in pending if all(s is not x for x in same)]
                break
        found.append(t)
    return found


def _beside(term, g):
    """Returns what a term multiplies a factor with, and the rest that must be alike."""
    k = term.varying.index(g)
    others = (*term.varying[:k], *term.varying[k + 1 :])
    mine = tuple(m for m in term.masks if not set(m.labels) & set(g.labels))
    rest = tuple(m for m in term.masks if m not in mine)
    own = term.scale, (*others, *mine, *term.numbers)
    return own, (rest, term.axes, term.precision)


def settled(expander: Expander, term: Folded) -> Folded:
    """Multiplies two factors out if one has no axis of the result for itself."""
    if len(term.varying) != 2:
        return term
    own = [term.out & set(f.labels) for f in term.varying]
    if not (own[0] <= own[1] or own[1] <= own[0]):
        return term
    # A sum of entries: no product is left. Terms that differ by constants are alike.
    parts, constants = [], []
    for f in term.varying:
        for part in _multiplied(f):
            free = not part.varies and term.out.issuperset(part.labels)
            (constants if free else parts).append(part)
    found = {x: 0 for f in parts for x in f.labels}
    labels = tuple(x for x in found if x in term.out)
    work = math.prod(expander.sizes[x] for x in found) * (
        2.0 if len(labels) < len(found) else 1.0
    )
    return dataclasses.replace(
        term,
        varying=(Contracted(tuple(parts), labels, True, term.precision),),
        masks=(*term.masks, *(x for x in constants if x.labels)),
        numbers=(*term.numbers, *(x for x in constants if not x.labels)),
        work=term.work + work,
    )


def _multiplied(x):
    """Returns what an expression is the elementwise product of."""
    if not isinstance(x, Contracted) or any(
        not set(part.labels) <= set(x.labels) for part in x.parts
    ):
        return [x]
    return [y for part in x.parts for y in _multiplied(part)]

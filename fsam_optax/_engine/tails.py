"""The end of a program that leads to a gradient, evaluated a few examples at a time."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Literal

from fsam_optax._common.norms import widen
from fsam_optax._engine.canonical import bound
from fsam_optax._engine.jaxpr import read, size
from fsam_optax._engine.primitives import CONTRACTIONS, name_of, SCATTER
from fsam_optax._engine.sources import Site, Source, Summation
from fsam_optax._engine.squares import looped
from fsam_optax._engine.sums import convolution_as_product, precision_of, Steps
from fsam_optax._engine.work import IN_LOOPS, operations


def whole(site: Site, rule: str, work: float) -> Source:
    """Returns the source of a value that the program holds for all examples anyway."""
    reduce = adding(site.like.shape, site.like.dtype, site.what)
    return Source(rule, work, site.terms, reduce)


@functools.cache
def adding(shape: tuple[int, ...], dtype: Any, what: Summation) -> Callable:
    """Returns the rule of a sum of terms, one for all that are alike: traced once."""

    def total(*terms):
        return [sum(terms[1:], start=terms[0])]

    reduce = looped(total, [jax.ShapeDtypeStruct(shape, dtype)], what, None)
    return jax.jit(reduce, static_argnums=(0, 1) if what.by_example else 0)


def tail(
    site: Site,
    stop: Iterable[Any],
    rule: str,
    waiting: float = IN_LOOPS,
    summing: Callable = looped,
) -> Source:
    """Returns the source that evaluates the program from `stop` on.

    Args:
        site: What to evaluate.
        stop: Variables that are there already.
        rule: Name of the rule.
        waiting: What an entry of a large array counts for that a loop writes.
        summing: What sums powers, as `looped` does.
    """
    return joint([site], stop, [rule], waiting, summing)[0]


def joint(
    sites: Sequence[Site],
    stop: Iterable[Any],
    rules: Sequence[str],
    waiting: float = IN_LOOPS,
    summing: Callable = looped,
) -> list[Source]:
    """Returns sources as `tail` does, which evaluate what they share once.

    Args:
        sites: What to evaluate, in one program.
        stop: Variables that are there already.
        rules: Names of the rules.
        waiting: See `tail`.
        summing: See `tail`.
    """
    flow, what = sites[0].flow, sites[0].what
    stop = [*stop]
    own = []
    for site in sites:
        inside = {x for x in flow.ancestors(site.terms, stop=stop) if flow.varies(x)}
        own.append(flow.equations(inside))
    users: dict[int, int] = {}
    for e in (e for eqns in own for e in eqns):
        users[id(e)] = users.get(id(e), 0) + 1
    eqns = flow.equations(x for eqns in own for e in eqns for x in e.outvars)
    made = {x for e in eqns for x in e.outvars}
    reads = [x for e in eqns for x in e.invars]
    reads += [x for site in sites for x in site.terms]
    operands = tuple(
        dict.fromkeys(x for x in reads if not isinstance(x, Literal) and x not in made)
    )
    # What is not rounded: a product that is all of a sum, and read by nothing else.
    last = {
        id(site.terms[0]): widen(site.like.dtype)
        for site in sites
        if len(site.terms) == 1 and site.terms[0] not in reads[: -_count(sites)]
    }

    def fn(*values):
        env = dict(zip(operands, values, strict=True))
        for e in eqns:
            inputs = [read(env, x) for x in e.invars]
            dtype = last.get(id(e.outvars[0]))
            wide = dtype or widen(e.outvars[0].aval.dtype)
            found = _evaluated(e, inputs, dtype is not None, wide)
            env.update(zip(e.outvars, found, strict=True))
        sums = []
        for site in sites:
            dtype = widen(site.like.dtype)
            terms = [read(env, x).astype(dtype) for x in site.terms]
            sums.append(sum(terms[1:], start=terms[0]))
        return sums

    wide = max(widen(site.like.dtype).itemsize for site in sites)
    held = sum(map(_working_size, eqns)) * wide
    products = any(name_of(e) in CONTRACTIONS for e in eqns)
    steps = Steps(held, what.budget, what.examples, apart=products)
    reduce = summing(fn, [site.like for site in sites], what, steps)
    found = []
    for k, (site, rule) in enumerate(zip(sites, rules, strict=True)):
        out, more = size(site.terms[0]), len(site.terms) - 1
        work = (max(2.0 * waiting, what.per_entry) + more * waiting) * out
        waits = work - (what.per_entry + more) * out
        # A loop takes the rows of its operands out of their stacks.
        work += sum(size(x) for x in operands if flow.varies(x)) / len(sites)
        for e in own[k]:
            if site.runs_anyway(e):
                continue
            large = name_of(e) not in CONTRACTIONS and not site.is_small(e.outvars[0])
            each = operations(e) + _laid_out(e)
            if large:
                entries = max(map(size, (*e.invars, *e.outvars)))
                more = (waiting - 1) * min(operations(e), entries)
                each, waits = each + more, waits + more / users[id(e)]
            if name_of(e) == SCATTER:
                # Entries that come one after the other.
                more = IN_LOOPS * size(e.invars[-1])
                each, waits = each + more, waits + more / users[id(e)]
            work += each / users[id(e)]
        found.append(Source(rule, work, operands, reduce, held, part=k, waits=waits))
    return found


def _count(sites):
    return sum(len(site.terms) for site in sites)


def _evaluated(eqn, inputs, last, dtype):
    """Returns the outputs; the last product is not rounded."""
    rule = EVALUATED.get(name_of(eqn))
    y = None if rule is None else rule(eqn, inputs, last, dtype)
    if y is None:
        return bound(eqn, inputs)
    return [y if last else y.astype(eqn.outvars[0].aval.dtype)]


def _convolution(eqn, inputs, last, dtype):
    del last, dtype
    if eqn.params["feature_group_count"] == 1:
        return convolution_as_product(eqn, *inputs)
    return None


def _product(eqn, inputs, last, dtype):
    if not last:
        return None
    a, g = inputs
    return lax.dot_general(
        a,
        g,
        eqn.params["dimension_numbers"],
        precision=precision_of(eqn),
        preferred_element_type=dtype,
    )


# How the equations of a tail are evaluated where it is not as they are.
EVALUATED = {"conv_general_dilated": _convolution, "dot_general": _product}


def _working_size(eqn):
    """Entries that the equation writes, windows of a convolution included."""
    written = sum(size(x) for x in eqn.outvars)
    return written + WINDOWS.get(name_of(eqn), lambda eqn: 0)(eqn)


def _windows(eqn):
    spec = eqn.params["dimension_numbers"]
    taps = math.prod(eqn.outvars[0].aval.shape[d] for d in spec.out_spec[2:])
    rows = math.prod(eqn.invars[1].aval.shape[d] for d in spec.rhs_spec[1:])
    return taps * rows * eqn.invars[0].aval.shape[spec.lhs_spec[0]]


def _laid_out(eqn):
    """Entries that windows are laid out in, where few products read each of them."""
    if name_of(eqn) in WINDOWS and eqn.params["batch_group_count"] > 1:
        return float(_working_size(eqn))
    return 0.0


WINDOWS = {"conv_general_dilated": _windows}

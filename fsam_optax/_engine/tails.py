"""The end of a program that leads to a gradient, evaluated a few examples at a time."""

import math
from collections.abc import Iterable
from typing import Any

from jax import lax
from jax.extend.core import Literal

from fsam_optax._engine.jaxpr import bind, read, size
from fsam_optax._engine.primitives import CONTRACTIONS, name_of
from fsam_optax._engine.sources import Site, Source
from fsam_optax._engine.squares import looped
from fsam_optax._engine.sums import (
    convolution_as_product,
    precision_of,
    Steps,
    widened,
)
from fsam_optax._engine.work import IN_LOOPS, operations


def whole(site: Site, rule: str, work: float) -> Source:
    """Returns the source of a value that the program holds for all examples anyway."""

    def total(*terms):
        return [sum(terms[1:], start=terms[0])]

    like = [site.like]
    return Source(rule, work, site.terms, looped(total, like, site.what, None))


def tail(site: Site, stop: Iterable[Any], rule: str) -> Source:
    """Returns the source that evaluates the program from `stop` on.

    Args:
        site: What to evaluate.
        stop: Variables that are there already.
        rule: Name of the rule.
    """
    flow, what = site.flow, site.what
    inside = {x for x in flow.ancestors(site.terms, stop=stop) if flow.varies(x)}
    eqns = flow.equations(inside)
    made = {x for e in eqns for x in e.outvars}
    reads = [*(x for e in eqns for x in e.invars), *site.terms]
    operands = tuple(
        dict.fromkeys(x for x in reads if not isinstance(x, Literal) and x not in made)
    )
    dtype = widened(site.like.dtype)

    def fn(*values):
        env = dict(zip(operands, values, strict=True))
        for e in eqns:
            inputs = [read(env, x) for x in e.invars]
            last = len(site.terms) == 1 and e.outvars[0] is site.terms[0]
            env.update(zip(e.outvars, _evaluated(e, inputs, last, dtype), strict=True))
        terms = [read(env, x).astype(dtype) for x in site.terms]
        return [sum(terms[1:], start=terms[0])]

    held = sum(map(_working_size, eqns)) * dtype.itemsize
    products = any(name_of(e) in CONTRACTIONS for e in eqns)
    steps = Steps(held, what.chunk_bytes, what.devices, apart=products)
    reduce = looped(fn, [site.like], what, steps)
    work = 2.0 * IN_LOOPS * size(site.terms[0])
    for e in eqns:
        large = name_of(e) not in CONTRACTIONS and not site.is_small(e.outvars[0])
        work += operations(e) * (IN_LOOPS if large else 1.0)
    return Source(rule, work, operands, reduce, held)


def _evaluated(eqn, inputs, last, dtype):
    """Returns the outputs; the last product is not rounded."""
    rule = EVALUATED.get(name_of(eqn))
    y = None if rule is None else rule(eqn, inputs, last, dtype)
    if y is None:
        return bind(eqn, inputs)
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


WINDOWS = {"conv_general_dilated": _windows}

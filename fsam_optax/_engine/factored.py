"""Sums of powers of sums of products: matrix products wherever it can be."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fsam_optax._common.norms import widen
from fsam_optax._engine.collecting import combined, counted_once, distributed, settled
from fsam_optax._engine.folding import aligned, folded, made, variables
from fsam_optax._engine.grouping import Form, Group, grouped
from fsam_optax._engine.jaxpr import size
from fsam_optax._engine.linear import LINEAR
from fsam_optax._engine.pairs import multiplied_out
from fsam_optax._engine.products import Expander, Mismatch
from fsam_optax._engine.short import is_short, short_product
from fsam_optax._engine.sources import Site, Source, Summation
from fsam_optax._engine.squares import gram, gram_work, looped, mapped
from fsam_optax._engine.sums import outer_product, Steps
from fsam_optax._engine.tails import adding
from fsam_optax._engine.work import IN_LOOPS


def factored(site: Site, mirrored: bool = False) -> Source | None:
    """Returns the source for a sum of products; None if it is not one.

    If `mirrored`, of a matrix plus its transpose.
    """
    limit = site.what.limit
    found = products_of(site, limit, mirrored)
    if found is not None:
        several = _one_group if len(found[0]) == 1 else _several
        return multiplied_out(site, *found, _several) or several(site, *found)
    # Factors that are larger than activations are made for a few examples at a time,
    # if they are no larger than what the program itself makes of the gradient.
    largest = max((size(v) for e in site.region() for v in e.outvars), default=0)
    found = products_of(site, largest, mirrored) if largest > limit else None
    return None if found is None else _several(site, *found, large=True)


def products_of(
    site: Site, limit: int, mirrored: bool = False
) -> tuple[list[Group], tuple[Any, ...]] | None:
    """Returns groups of products, and the variables that they read; None for others.

    Args:
        site: The sum of variables.
        limit: Size of the largest factor that may be formed for each example.
        mirrored: Whether the transpose is added to the sum.
    """
    try:
        expander = Expander(site.flow, site.inside, LINEAR)
        terms = [t for v in site.terms for t in expander.expand(v)]
        if mirrored:
            terms += [dataclasses.replace(t, axes=t.axes[::-1]) for t in terms]
        if not terms:
            raise Mismatch("a part that is zero")
        terms = _all_varying(aligned(expander, terms))
        found = [folded(expander, t, limit, site.what.examples) for t in terms]
        found = distributed(expander, combined(expander, found), limit)
        found = combined(expander, [settled(expander, t) for t in found])
        found = counted_once(expander, found, site.what.examples)
    except Mismatch:
        return None
    reads = [
        v
        for t in found
        for f in (*t.varying, *t.masks, *t.numbers)
        for v in variables(f)
    ]
    operands = tuple(dict.fromkeys(v for v in reads if v in site.flow.uses))
    if not all(map(site.is_small, operands)):
        return None
    return grouped(found, expander.sizes, widen(site.like.dtype)), operands


def _all_varying(terms):
    """Gives a term that is the same for all examples the factor one, for each."""
    some = next((f for t in terms for f in t.factors if f.varies), None)
    if some is None:
        raise Mismatch("nothing that differs between examples")
    one = dataclasses.replace(some, labels=(), steps=(("ones", ()),))
    return [
        t
        if any(f.varies for f in t.factors)
        else dataclasses.replace(t, factors=(*t.factors, one))
        for t in terms
    ]


def _one_group(site, groups, operands):
    (group,) = groups
    what = site.what
    n, spread = group.positions(), group.volume(group.labels)
    work = group.work()
    shape = [group.sizes[x] for x in group.labels]
    each = len(group.sides)
    alone = len(group.terms) == 1 and group.volume(group.terms[0].summed) == 1

    def prepare(*values):
        env = dict(zip(operands, values, strict=True))
        if alone and not what.by_example:
            found = group.of_one_position(env)
        else:
            found = [x for factors in group.factors(env) for x in factors]
        return [group.form().product(found)] if each == 1 else found

    def finish(sums, p, env):
        return group.placed(sums.reshape(shape), group.masks(env), p)

    like = jax.ShapeDtypeStruct(tuple(shape), group.dtype)
    held, waits = 0, 0.0
    if each == 1:
        rule, work = "reduction", work + what.per_entry * spread
        reduce = adding(like.shape, like.dtype, what)
    elif what.by_example and (found := _by_example(site, group)) is not None:
        rule, own, reduce, held = found
        work = sum(t.work for t in group.terms) + own
    elif n == [1]:
        rule, precision = "outer product", group.precision
        sides = group.volume(group.batch) * sum(map(group.volume, group.sides))
        work += what.per_entry * sides + _placing(site, group)
        made = [max(map(site.flow.place, variables(f))) for f in group.terms[0].varying]
        reduce = outer_product(
            (((), ()), group.form().numbers[1]),
            group.dtype,
            precision,
            what.powers,
            what.examples,
            made.index(min(made)),
        )
    else:
        waits = (2.0 * IN_LOOPS - what.per_entry) * spread
        rule, work = "shared dense", work + what.per_entry * spread + waits
        sides = group.volume(group.batch) * sum(map(group.volume, group.sides))
        work += sum(n) * sides
        held = 2 * spread * group.dtype.itemsize
        columns = group.volume(group.sides[1])
        few = len(n) == 1 and is_short(n[0], columns, group.dtype, what.powers)
        reduce = _products_added(group.form(), what, held, few)
    then = None if group.lies_in_place() else finish
    keeps = _keeps(site, group)
    return Source(
        rule, work, operands, reduce, held, prepare, then, like, keeps, waits=waits
    )


@functools.cache
def _products_added(form: Form, what: Summation, held: int, few: bool) -> Callable:
    """Returns the rule of a sum of products, one for all of a form: traced once.

    `few` tells of a single product that it is short.
    """

    def fn(*arrays):
        first, *rest = map(form.product, zip(arrays[::2], arrays[1::2], strict=True))
        return [sum(rest, first)]

    def short(left, right):
        return [short_product(left, right).reshape(form.shape)]

    like = jax.ShapeDtypeStruct(form.shape, form.dtype)
    steps = Steps(held, what.budget, what.examples, apart=True)
    reduce = looped(fn, [like], what, steps, short if few else None)
    return jax.jit(reduce, static_argnums=(0, 1) if what.by_example else 0)


def _placing(site, group):
    """Returns the operations that place the sums of a product, which examples share."""
    masks = len(site.what.powers) * len(group.terms[0].masks)
    return masks * size(site.terms[0]) / site.what.examples


def _keeps(site, group):
    """Tells whether each entry of a product comes out once."""
    return not group.terms[0].masks and group.volume(group.labels) == size(
        site.terms[0]
    )


def _by_example(site, group):
    """Returns rule, operations, reduction and bytes held; None to form the product."""
    what = site.what
    positions, batch = sum(group.positions()), group.volume(group.batch)
    sides = [group.volume(side) for side in group.sides]
    uniform = what.uniform and _keeps(site, group)
    work = gram_work(positions, batch, sides, uniform)
    if positions > 1 and (
        not uniform or work > 2.0 * batch * math.prod(sides) * (positions + IN_LOOPS)
    ):
        return None

    def one(ks, *arrays):
        left, right = (
            jnp.concatenate(arrays[side::2], len(group.batch)) for side in (0, 1)
        )
        return [gram(k, left, right) for k in ks]

    if positions == 1:
        return "outer product", work, mapped(one, None), 0
    held = 2 * batch * positions**2 * group.dtype.itemsize
    steps = Steps(held, what.budget, what.examples, apart=True)
    return "Gram matrices", work, mapped(one, steps), held


def _several(site, groups, operands, large=False):
    what, out = site.what, size(site.terms[0])
    elementwise = 2.0 + sum(2 + len(g.terms[0].masks) for g in groups)
    work = sum(g.work() for g in groups) + IN_LOOPS * out * elementwise
    waits = (IN_LOOPS - 1) * out * elementwise
    counts = [len(g.positions()) * len(g.sides) for g in groups]

    def prepare(*values):
        env = dict(zip(operands, values, strict=True))
        masks = [x for g in groups for x in g.masks(env)]
        return [*masks, *(x for g in groups for fs in g.factors(env) for x in fs)]

    def fn(*arrays):
        rest, total = [*arrays], None
        masks = [[rest.pop(0) for _ in g.terms[0].masks] for g in groups]
        factors = [[rest.pop(0) for _ in range(n)] for n in counts]
        for g, own, found in zip(groups, masks, factors, strict=True):
            each = len(g.sides)
            for k in range(0, len(found), each):
                y = g.placed(g.form().product(found[k : k + each]), own, 1)
                total = y if total is None else total + y
        return [total]

    like = jax.ShapeDtypeStruct(site.like.shape, groups[0].dtype)
    if out <= what.limit and all(len(g.sides) == 1 for g in groups):
        reduce = looped(fn, [like], what, None)
        return Source("reduction", work, operands, reduce, 0, prepare, waits=waits)
    entries, products = 2 * out, any(len(g.sides) == 2 for g in groups)
    if large:
        varying = [f for g in groups for t in g.terms for f in t.varying]
        entries += sum(groups[0].volume(f.labels) for f in made(varying, True))
        products = any(len(g.sides) == 2 and sum(g.positions()) > 1 for g in groups)
        prepare, fn = _late(groups, operands, made(varying, False), fn)
    held = entries * groups[0].dtype.itemsize
    steps = Steps(held, what.budget, what.examples, apart=products)
    reduce = looped(fn, [like], what, steps)
    return Source("sum of products", work, operands, reduce, held, prepare, waits=waits)


def _late(groups, operands, constants, fn):
    """Returns what is made for all examples at once, and `fn` of that.

    Of the factors only the constants; those that vary are made as they are used.
    """
    dtype = groups[0].dtype

    def prepare(*values):
        env = dict(zip(operands, values, strict=True))
        masks = [x for g in groups for x in g.masks(env)]
        return [*values, *(x.value(env, dtype) for x in constants), *masks]

    def run(*values):
        known = (*operands, *constants)
        env = dict(zip(known, values[: len(known)], strict=True))
        factors = [x for g in groups for fs in g.factors(env) for x in fs]
        return fn(*values[len(known) :], *factors)

    return prepare, run

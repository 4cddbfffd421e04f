"""Many cotangents of one example, as many at a time as a budget of memory allows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend.core import Literal

from fsam_optax._common.mapped_axes import vary_like
from fsam_optax._common.norms import widen
from fsam_optax._engine.jaxpr import (
    body_of,
    Dataflow,
    evaluate,
    loop_counts,
    read,
    size,
)
from fsam_optax._engine.primitives import LOOP, name_of
from fsam_optax._engine.sources import DEFAULT_CHUNK_BYTES
from fsam_optax._engine.sums import (
    added_up,
    apart,
    CACHE,
)


NEAR = 1 << 20  # bytes


class Columns(NamedTuple):
    """Cotangents that are made when they are needed, instead of all at once.

    Attributes:
        number: Maps the outputs h of one example to the number of cotangents, by their
            shapes.
        column: Maps h, the target and a number below that count to the cotangent with
            this number, a pytree like h.
    """

    number: Callable[[Any], int]
    column: Callable[[Any, Any, jax.Array], Any]


class Cotangents(NamedTuple):
    """The cotangents of one example.

    Attributes:
        number: How many there are.
        take: Maps several numbers below the count to the cotangents with these, each
            array with a leading axis for them.
    """

    number: int
    take: Callable[[jax.Array], Sequence[jax.Array]]


def held_by_column(
    flow: Dataflow, columns: Sequence[Any], needed: set[Any]
) -> tuple[int, int]:
    """Returns the bytes that one example holds for one cotangent, and besides it.

    Args:
        flow: The program of one example.
        columns: The variables of the cotangent.
        needed: The variables that are evaluated.

    Returns:
        The most that depends on the cotangent at a time, if what is no longer read is
        given up; and what of the example is read with it, which is there anyway.
    """
    moving = Dataflow(flow.jaxpr, columns)
    eqns = [
        eqn
        for eqn in flow.jaxpr.eqns
        if any(v in needed and moving.varies(v) for v in eqn.outvars)
    ]
    last = {v: i for i, eqn in enumerate(eqns) for v in _read(eqn)}
    now = most = sum(map(_bytes, columns))
    beside = set()
    for i, eqn in enumerate(eqns):
        now += sum(map(_bytes, eqn.outvars))
        most = max(most, now + _inside(eqn))
        for v in _read(eqn):
            if not moving.varies(v):
                beside.add(v)
            elif last[v] == i:
                now -= _bytes(v)
    return most, sum(_bytes(v) for v in beside if flow.varies(v))


def _read(eqn):
    return dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal))


def _bytes(v):
    dtype = v.aval.dtype
    wide = widen(dtype) if jnp.issubdtype(dtype, jnp.inexact) else dtype
    return size(v) * wide.itemsize


def _inside(eqn):
    """Returns the bytes that a step of a loop writes, beside what the loop returns."""
    if name_of(eqn) != LOOP:
        return 0
    jaxpr, _ = body_of(eqn)
    n_consts, n_carry = loop_counts(eqn)
    varying = jaxpr.invars[n_consts : n_consts + n_carry]
    flow = Dataflow(jaxpr, varying)
    most, _ = held_by_column(flow, varying, set(flow.producer))
    return most


def at_a_time(
    count: int,
    each: int,
    beside: int,
    most: int,
    whole: int,
    examples: int,
    budget: int | None,
) -> dict[str, int]:
    """Returns how many cotangents to pull back at a time, by platform.

    Args:
        count: How many there are.
        each: Bytes that one of them holds for an example.
        beside: Bytes that an example holds besides.
        most: Bytes that a step of a loop over examples holds for each.
        whole: Bytes of the sums that are formed for all examples at once.
        examples: How many examples a device has.
        budget: Bytes that the cotangents may hold. None lets the whole hold twice what
            one gradient does, or 64 MiB if that is more; on a CPU no more than is fast.
    """
    each *= examples
    allowed = budget
    if allowed is None:
        gradient = each + examples * beside
        allowed = max(gradient, DEFAULT_CHUNK_BYTES - gradient)

    def in_equal_rounds(number):
        number = max(1, min(count, number))
        return -(-count // -(-count // number)) if count else 1

    # Compiled programs hold copies, transposed or padded: twice what is counted.
    number = in_equal_rounds(allowed // max(2 * each, most, 1))
    if budget is not None:
        return {"default": number}
    # In a CPU's caches, and so many that it is not the sums that a round takes longest
    # to add up. Loops add them up for each cotangent anyway.
    few = in_equal_rounds(min(max(8 * whole, NEAR), CACHE) // max(each, 1))
    return {"default": number} | ({"cpu": few} if few < number else {})


def fits(sums: int, examples: int, each: int) -> bool:
    """Tells whether every device can hold all sums of a loop over cotangents.

    They are then exchanged once, instead of in every step. But sums that are sharded as
    their parameters are, are whole there: that must not be what needs most memory.

    Args:
        sums: Bytes of the sums.
        examples: How many examples a device has.
        each: Bytes that the gradient holds for each of them.
    """
    return sums <= max(examples * each, DEFAULT_CHUNK_BYTES)


def over_cotangents(
    pull: Callable,
    cotangents: Cotangents,
    weight: jax.Array,
    numbers: dict[str, int],
    share: int | None = None,
) -> Any:
    """Returns the sum over cotangents of what `pull` returns for each of them.

    Args:
        pull: `pull(axes, weight, cotangent)`, where `axes` tells how many axes are
            mapped over and summed: examples, and cotangents if several.
        cotangents: The cotangents.
        weight: Weight of the example.
        numbers: How many at a time, by platform.
        share: How many examples each device has, if it sums up the rounds before
            devices are added up.
    """

    def summed(number, weight):
        rounds = functools.partial(_in_rounds, pull, cotangents, number)
        if share is None or number >= cotangents.number:
            return rounds(weight)
        return _by_share(rounds, weight, share)

    branches = {k: functools.partial(summed, n) for k, n in numbers.items()}
    if len(branches) == 1:
        return branches["default"](weight)
    return lax.platform_dependent(weight, **branches)


def _in_rounds(pull, cotangents, number, weight):
    count, take = cotangents

    def some(start):
        index = start + jnp.arange(number)
        cs = take(jnp.minimum(index, count - 1))
        if number == 1:
            return pull(1, weight, [c[0] for c in cs])
        # The last ones of the last round are there twice.
        weights = jnp.where(index < count, weight, jnp.zeros_like(weight))
        over = jax.vmap(lambda w, c: pull(2, w, c), out_axes=None)
        return over(weights, list(cs))

    if number >= count:
        return some(0)
    like = jax.eval_shape(some, 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    zeros = jax.tree.map(lambda z: vary_like(z, weight), zeros)
    return lax.fori_loop(
        0,
        -(-count // number),
        lambda i, sums: jax.tree.map(jnp.add, sums, some(i * number)),
        zeros,
    )


def _by_share(fn: Callable, weight: jax.Array, share: int) -> Any:
    """Returns `fn(weight)`, which the next map sums over, of each device by itself.

    What `fn` closes over may be mapped too.
    """
    closed, like = jax.make_jaxpr(fn, return_shape=True)(weight)
    jaxpr = closed.jaxpr
    made = {v for eqn in jaxpr.eqns for v in eqn.outvars}

    def inner(weight, *consts):
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env[jaxpr.invars[0]] = weight
        evaluate(jaxpr.eqns, env, made)
        return [read(env, v) for v in jaxpr.outvars]

    run = custom_vmap(inner)

    @run.def_vmap
    def rule(n, mapped, *operands):
        del n
        axes = [0 if m else None for m in mapped]
        sums = added_up(apart(jax.vmap(inner, axes, None), share, axes, operands))
        return sums, [False] * len(sums)

    return jax.tree.structure(like).unflatten(run(weight, *closed.consts))

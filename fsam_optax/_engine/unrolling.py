"""What hides how weights are made from parameters, written otherwise: loops, patches.

Where a loop multiplies matrices that are parameters, as in `W = w_1 w_2 ... w_k`, the
gradients of all of them are linear maps of that of W. A loop hides this from the rules:
it would run for every example. Written out, the maps reach the factors of the gradient.
For patches see `places`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from fsam_optax._engine.jaxpr import body_of, Dataflow, evaluate, loop_counts, read
from fsam_optax._engine.places import scattered
from fsam_optax._engine.sources import maps_weight, parameter_side


MOST_EQUATIONS = 128  # That a loop may become.


def unrolled(closed: Any, varies: Sequence[bool], n_outputs: int) -> Any:
    """Returns a closed jaxpr without short loops or patches before gradients.

    Args:
        closed: A flat jaxpr.
        varies: Which of its inputs differ between examples.
        n_outputs: How many of its results are not gradients; they come first.
    """
    while True:
        jaxpr = closed.jaxpr
        given = (v for v, b in zip(jaxpr.invars, varies, strict=True) if b)
        flow = Dataflow(
            jaxpr, given, dict(zip(jaxpr.constvars, closed.consts, strict=True))
        )
        inside = parameter_side(flow, jaxpr.outvars[n_outputs:])
        written = {id(e): _written(flow, e, inside) for e in jaxpr.eqns}
        chosen = {key: write for key, write in written.items() if write is not None}
        if not chosen:
            return closed

        def run(*args, closed=closed, chosen=chosen):
            return _run(closed, chosen, args)

        closed = jax.make_jaxpr(run)(*closed.in_avals)


def _written(flow, eqn, inside):
    """Returns the function of its operands that an equation becomes; None for none."""
    if (
        maps_weight(flow, eqn, inside)
        and eqn.params["length"] * len(body_of(eqn)[0].eqns) <= MOST_EQUATIONS
    ):
        return functools.partial(_steps, eqn)
    return scattered(flow, eqn, inside)


def _run(closed, chosen, args):
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        if id(eqn) in chosen:
            values = chosen[id(eqn)]([read(env, v) for v in eqn.invars])
            env.update(zip(eqn.outvars, values, strict=True))
        else:
            evaluate([eqn], env, set(eqn.outvars))
    return [read(env, v) for v in jaxpr.outvars]


def _steps(eqn, values):
    """Evaluates a loop step by step."""
    jaxpr, consts = body_of(eqn)
    n_consts, n_carry = loop_counts(eqn)
    carry, xs = values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
    order = range(eqn.params["length"])
    stacks: dict[int, list[Any]] = {}
    for i in reversed(order) if eqn.params["reverse"] else order:
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        x = [lax.index_in_dim(x, i, keepdims=False) for x in xs]
        env.update(zip(jaxpr.invars, [*values[:n_consts], *carry, *x], strict=True))
        evaluate(jaxpr.eqns, env, {v for e in jaxpr.eqns for v in e.outvars})
        carry = [read(env, v) for v in jaxpr.outvars[:n_carry]]
        stacks[i] = [
            lax.expand_dims(read(env, v), [0]) for v in jaxpr.outvars[n_carry:]
        ]
    ys = zip(*(stacks[i] for i in order), strict=True)
    return [*carry, *(lax.concatenate(y, 0) for y in ys)]

"""Loops over layers, which yield the gradient of one layer at each step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fsam_optax._common.norms import widen
from fsam_optax._engine.jaxpr import body_of, Dataflow, loop_counts, loop_flow, read
from fsam_optax._engine.operation import reduced
from fsam_optax._engine.primitives import LOOP, name_of
from fsam_optax._engine.waiting import on_one_device, zeros_after


@dataclass(frozen=True)
class Loop:
    """A loop of the program, whose sums are formed at each of its steps.

    Attributes:
        eqn: Its equation.
        plan: The plan of its body.
        outputs: The numbers of the outputs that are summed.
    """

    eqn: Any
    plan: Any
    outputs: tuple[int, ...]

    @property
    def plans(self) -> tuple[Any, ...]:
        """Returns the one plan, as a choice has several."""
        return (self.plan,)


def is_stacked(eqn: Any, v: Any) -> bool:
    """Tells whether a loop stacks up the variable over its steps."""
    return name_of(eqn) == LOOP and eqn.outvars.index(v) >= loop_counts(eqn)[1]


def plan_loop(
    flow: Dataflow,
    eqn: Any,
    outputs: list[int],
    needed: set[Any],
    make_plan: Callable,
) -> Loop:
    """Plans the body of a loop.

    Args:
        flow: The program that the loop is in.
        eqn: The loop.
        outputs: The numbers of its outputs that are summed.
        needed: The variables of the program that are needed as they are.
        make_plan: Plans a program: its dataflow, constants, what is summed, and what is
            needed.
    """
    jaxpr, consts = body_of(eqn)
    _, n_carry = loop_counts(eqn)
    values = [
        x
        for k, x in enumerate(jaxpr.outvars)
        if k < n_carry or eqn.outvars[k] in needed
    ]
    wanted = [jaxpr.outvars[k] for k in outputs]
    body = loop_flow(flow, eqn, knowing=True)
    return Loop(eqn, make_plan(body, consts, wanted, values), tuple(outputs))


def run_loop(
    loop: Loop,
    needed: set[Any],
    env: dict[Any, Any],
    run: Callable,
    weight: Any,
    what: Any,
    counts: Any = None,
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Returns the values of a loop by variable, and its sums by output variable.

    Args:
        loop: The loop.
        needed: The variables of the program that are needed as they are.
        env: The values of the program.
        run: Evaluates a plan: `run(plan, env, counts=) -> sums`.
        weight: The weight of the example.
        what: What is summed.
        counts: What the plan is given of this at each step, by its leading axes.
    """
    eqn, plan = loop.eqn, loop.plan
    n_consts, n_carry = loop_counts(eqn)
    operands = [read(env, v) for v in eqn.invars]
    consts, carry = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    jaxpr = plan.flow.jaxpr
    kept = [k for k in range(n_carry, len(eqn.outvars)) if eqn.outvars[k] in needed]

    totals: Any = None
    if counts is None and eqn.params["length"]:
        # Not stacked by the loop itself, which begins with zeros that do not wait.
        avals = [eqn.outvars[k].aval for k in loop.outputs]
        like = [jax.ShapeDtypeStruct(v.shape, widen(v.dtype)) for v in avals]

        def zeros(has, weight, *carry):
            del has
            alone = on_one_device(weight, what.examples)
            found = zeros_after((weight, *carry), like, alone)
            return [[x] * len(what.powers) for x in found]

        totals = reduced(zeros, what.axes)(weight, *carry)

    def step(state, x):
        carry, totals = state
        i, x, counts = x
        inner = dict(zip(jaxpr.invars, [*consts, *carry, *x], strict=True))
        sums = run(plan, inner, counts=counts)
        out = [read(inner, v) for v in jaxpr.outvars[:n_carry]]
        kept_now = [read(inner, jaxpr.outvars[k]) for k in kept]
        if totals is None:
            return (out, None), (kept_now, sums)
        totals = jax.tree.map(
            lambda t, s: lax.dynamic_update_index_in_dim(t, s.astype(t.dtype), i, 0),
            totals,
            sums,
        )
        return (out, totals), (kept_now, None)

    length = eqn.params["length"]
    (carry, totals), (stacks, sums) = lax.scan(
        step,
        (carry, totals),
        (jnp.arange(length), operands[n_consts + n_carry :], counts),
        length=length,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    sums: Any = sums if totals is None else totals
    values = dict(zip(eqn.outvars[:n_carry], carry, strict=True))
    values |= {eqn.outvars[k]: y for k, y in zip(kept, stacks, strict=True)}
    return values, {eqn.outvars[k]: s for k, s in zip(loop.outputs, sums, strict=True)}

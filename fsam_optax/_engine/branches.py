"""Branches of a program, of which all examples take the same one."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from fsam_optax._engine.jaxpr import Dataflow, read
from fsam_optax._engine.primitives import BRANCHES, name_of


@dataclass(frozen=True)
class Branching:
    """A choice between branches, whose sums are formed within them.

    Attributes:
        eqn: Its equation.
        plans: The plan of each branch.
        outputs: The numbers of the outputs that are summed.
    """

    eqn: Any
    plans: tuple[Any, ...]
    outputs: tuple[int, ...]


def is_common_choice(flow: Dataflow, eqn: Any) -> bool:
    """Tells whether an equation is a choice that is the same for all examples."""
    return name_of(eqn) == BRANCHES and not flow.varies(eqn.invars[0])


def switched(
    eqn: Any, index: jax.Array, branches: Sequence[Callable], operands: Sequence[Any]
) -> Any:
    """Evaluates the branch that is taken, or that of the platform, when it is known.

    Args:
        eqn: The equation of the choice.
        index: The number of the branch.
        branches: What each does in its place.
        operands: Their operands.
    """
    platforms = eqn.params.get("branches_platforms")
    if not platforms:
        return lax.switch(index, branches, *operands)
    named = zip(platforms, branches, strict=True)
    by_name = {x: branch for xs, branch in named for x in xs or ("default",)}
    return lax.platform_dependent(*operands, **by_name)


def plan_branches(
    flow: Dataflow,
    eqn: Any,
    outputs: Sequence[int],
    needed: set[Any],
    make_plan: Callable,
) -> Branching:
    """Plans each branch; the arguments are those of `layers.plan_loop`."""
    plans = []
    for closed in eqn.params["branches"]:
        inner, outvars = closed.jaxpr, closed.jaxpr.outvars
        given = zip(inner.invars, eqn.invars[1:], strict=True)
        varying = [x for x, v in given if flow.varies(v)]
        constants = dict(zip(inner.constvars, closed.consts, strict=True))
        body = Dataflow(inner, varying, constants)
        values = [x for x, v in zip(outvars, eqn.outvars, strict=True) if v in needed]
        wanted = [outvars[k] for k in outputs]
        plans.append(make_plan(body, closed.consts, wanted, values))
    return Branching(eqn, tuple(plans), tuple(outputs))


def run_branches(
    branching: Branching, needed: set[Any], env: dict[Any, Any], run: Callable
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Returns the values of the choice by variable, and its sums by output variable.

    The arguments are those of `layers.run_loop`.
    """
    eqn = branching.eqn
    index, *operands = (read(env, v) for v in eqn.invars)
    kept = [k for k, v in enumerate(eqn.outvars) if v in needed]

    def branch(plan, *operands):
        jaxpr = plan.flow.jaxpr
        inner = dict(zip(jaxpr.invars, operands, strict=True))
        sums = run(plan, inner)
        return [read(inner, jaxpr.outvars[k]) for k in kept], sums

    branches = [functools.partial(branch, plan) for plan in branching.plans]
    values, sums = switched(eqn, index, branches, operands)
    return (
        {eqn.outvars[k]: y for k, y in zip(kept, values, strict=True)},
        {eqn.outvars[k]: s for k, s in zip(branching.outputs, sums, strict=True)},
    )

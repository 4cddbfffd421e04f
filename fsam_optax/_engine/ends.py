"""Gradients that a loop stacks up and that are added to others, taken out of the loop.

The gradient of the weight of one layer is the last thing that a step makes: a product
of activations and cotangents, and perhaps linear maps of that. If it is added to
something outside, as where a stack of layers is run through twice or decays in the
loss, then the powers of the sum are wanted, and not those of what one loop yields. The
operands of the products are stacked up instead, which are no larger than activations,
and the rest is done outside, for all steps at once.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from fsam_optax._engine.jaxpr import Dataflow, evaluate, loop_counts, read, size
from fsam_optax._engine.primitives import CONTRACTIONS, is_move, name_of, SUMS
from fsam_optax._engine.sources import is_linear


class Ends(NamedTuple):
    """What is done outside of a loop.

    Attributes:
        outputs: The numbers of the outputs of the loop that come of it.
        eqns: The equations.
        operands: The variables of the body that they read.
    """

    outputs: tuple[int, ...]
    eqns: list[Any]
    operands: tuple[Any, ...]

    def values(
        self, flow: Dataflow, env: dict[Any, Any], rows: dict[Any, Any]
    ) -> dict[int, Any]:
        """Returns the outputs by their numbers.

        Args:
            flow: The body.
            env: The values that are the same at each step.
            rows: The others, stacked up over the steps.
        """
        stacked = [v for v in self.operands if v not in env]

        def step(*values):
            found = {**env, **dict(zip(stacked, values, strict=True))}
            evaluate(self.eqns, found, {v for e in self.eqns for v in e.outvars})
            return [read(found, flow.jaxpr.outvars[k]) for k in self.outputs]

        ys = jax.vmap(step)(*(rows[v] for v in stacked)) if self.outputs else []
        return dict(zip(self.outputs, ys, strict=True))


def ends(before: Dataflow, eqn: Any, flow: Dataflow, added: set[Any]) -> Ends:
    """Returns the ends of a loop whose results are added to something else.

    Args:
        before: The program that the loop is in.
        eqn: The loop.
        flow: Its body.
        added: The variables of the program that are added to others.
    """
    n_consts, n_carry = loop_counts(eqn)
    inputs = flow.jaxpr.invars[n_consts:]
    limit = max((size(v) for v in inputs if flow.varies(v)), default=0)
    outputs, eqns, operands = [], [], []
    for k, v in enumerate(eqn.outvars):
        found = None
        if k >= n_carry and v in added and before.varies(v):
            found = _end(flow, flow.jaxpr.outvars[k], limit)
        if found is not None:
            outputs.append(k)
            eqns += found[0]
            operands += found[1]
    made = {v for e in eqns for v in e.outvars}
    return Ends(
        tuple(outputs),
        flow.equations(made),
        tuple(v for v in dict.fromkeys(operands) if v not in made),
    )


def added_to_others(flow: Dataflow, outputs: Iterable[Any]) -> set[Any]:
    """Returns the variables whose values, perhaps moved, are added to others.

    Args:
        flow: The program.
        outputs: Those of its outputs that are added to something outside.
    """
    found = set()
    sums = (v for e in flow.jaxpr.eqns if name_of(e) in SUMS for v in e.invars)
    for v in (*sums, *outputs):
        while is_move(flow.made_by(v)):
            v = flow.made_by(v).invars[0]
        found |= set() if isinstance(v, Literal) else {v}
    return found


def _end(flow, v, limit):
    """Returns the equations from products on, and what they read.

    None where no product is, or what is read is large.
    """
    found, operands, pending, products = {}, [], [v], False
    while pending:
        x = pending.pop()
        if isinstance(x, Literal):
            continue
        eqn = flow.made_by(x)
        several = sum(map(flow.varies, eqn.invars)) > 1 if eqn is not None else False
        product = several and name_of(eqn) in CONTRACTIONS
        if not flow.varies(x) or eqn is None or not (product or is_linear(flow, eqn)):
            if flow.varies(x) and size(x) > limit:
                return None
            operands.append(x)
            continue
        found[id(eqn)] = eqn
        if product:
            products = True
            operands += [y for y in eqn.invars if not isinstance(y, Literal)]
            if any(size(y) > limit for y in eqn.invars if flow.varies(y)):
                return None
        else:
            pending += eqn.invars
    return ([*found.values()], operands) if products else None

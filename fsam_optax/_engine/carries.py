"""What loops add up at each step, done once: the gradients of recurrent weights.

The gradient of a recurrent weight is a carry, `c + dot(a_t, g_t)` at each step. The
operands are stacked instead and contracted once, over steps and positions. Where the
weight is made from parameters within the step, as in `tanh(h @ (mask * w))`, a linear
map lies in between, `c + mask * dot(a_t, g_t)`. It is the same at each step, and is
applied once to the sum. Where the weight is carried itself and decays, so does its
gradient, `d_t c + dot(a_t, g_t)`: a factor is scaled by what comes after its step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from fsam_optax._common.norms import widen
from fsam_optax._engine.jaxpr import bind, Dataflow, evaluate, is_real, size
from fsam_optax._engine.normal import moves_or_pads, windows_by_rows
from fsam_optax._engine.primitives import (
    DIFFERENCE,
    DIVISION,
    holds_numbers,
    LOOP,
    name_of,
    NEGATION,
    SUMS,
    UPDATE,
)
from fsam_optax._engine.sources import is_linear, parameter_side


# Linear in one operand, with others that are no zeros.
SCALED_BY = ("mul", DIVISION, "dot_general", "conv_general_dilated", "triangular_solve")


class Carries:
    """What a loop adds to some of its carries.

    Attributes:
        terms: By number of the carry, the variables that each step adds to it.
        paths: By number of the carry, the equations that it goes through in a step.
        sources: By number of the carry, what the terms are linear maps of: the
            equation of a contraction by its variable, and None for what is small.
    """

    terms: dict[int, list[Any]]
    paths: dict[int, list[Any]]
    sources: dict[int, dict[Any, Any]]

    def __init__(self, flow: Dataflow, n_consts: int, n_carry: int):
        """Looks through the body of a loop.

        Args:
            flow: The body.
            n_consts: How many of its inputs are the same at each step.
            n_carry: How many of its outputs it carries.
        """
        self._flow, self._first = flow, n_consts
        self.terms, self.paths, self.sources = {}, {}, {}
        inputs, outputs = flow.jaxpr.invars, flow.jaxpr.outvars
        added = {
            k: found
            for k in range(n_carry)
            if (found := _added(flow, inputs[n_consts + k], outputs[k]))
        }
        if not added:
            return
        wanted = [*(outputs[k] for k in added), *outputs[n_carry:]]
        inside = parameter_side(flow, wanted)
        held = [*inputs[n_consts + n_carry :]]
        held += [
            v
            for e in flow.jaxpr.eqns
            if contracts(flow, e)
            for v in _operands(e)
            if flow.varies(v) and v not in inside
        ]
        limit = max(map(size, held), default=0)
        made = _made(flow, inside, Dataflow(flow.jaxpr, inputs[n_consts:]), limit)
        for k, (terms, path) in added.items():
            if all(not isinstance(v, Literal) and v in made for v in terms):
                sources = _below(made, terms)
                if size(outputs[k]) > limit or any(sources.values()):
                    self.terms[k], self.sources[k] = terms, sources
                    self.paths[k] = path

    def factors(self) -> list[Any]:
        """Returns the variables that are to be stacked over the steps."""
        found = []
        for sources in self.sources.values():
            for v, e in sources.items():
                found += [v] if e is None else _operands(e)
        found += [v for path in self.paths.values() for e in path for v in _scales(e)]
        return [v for v in found if not isinstance(v, Literal)]

    def totals(
        self,
        start: Sequence[Any],
        same: dict[Any, Any],
        rows: dict[Any, Any],
        order: Any,
    ) -> dict[int, Any]:
        """Returns what the loop ends with, by number of the carry.

        Args:
            start: What it begins with.
            same: The values that are the same at each step.
            rows: The factors, stacked over the steps.
            order: The parameters of the loop: its length, and whether it is reversed.
        """
        done: dict[Any, Any] = {}
        found = {}
        for k, terms in self.terms.items():
            numbers = self._numbers(k, rows)
            kept = numbers.get(self._flow.jaxpr.invars[self._first + k], 0.0)
            later, total = 1.0, start[k]
            if not _is_one(kept):
                kept = jnp.asarray(kept, widen(total.dtype))
                later, whole = _later(kept, order["length"], order["reverse"])
                total = (total * whole).astype(total.dtype)
            scales: dict[Any, list[Any]] = {}
            for v in terms:
                scales.setdefault(_name(numbers.get(v, 0.0)), []).append(v)
            for name, alike in scales.items():
                scale = numbers.get(alike[0], 0.0) * later
                env = dict(same)
                for v, e in self.sources[k].items():
                    key = (v,) if _is_one(scale) else (v, k, name)
                    if key not in done:
                        done[key] = _summed(v, e, rows, scale)
                    env[v] = done[key]
                needed = self._flow.ancestors(alike, stop=set(env))
                evaluate(self._flow.jaxpr.eqns, env, needed)
                for v in alike:
                    total = lax.add(total, env[v])
            found[k] = total
        return found

    def _numbers(self, k, rows):
        """Returns how often a step takes the carry and each term, by the variable."""
        found = {}

        def of(v):
            return {} if isinstance(v, Literal) else found.get(v, {v: 1.0})

        def added(x, y, sign):
            return {v: x.get(v, 0.0) + sign * y.get(v, 0.0) for v in {**x, **y}}

        for e in self.paths[k]:
            name, (v, *others) = name_of(e), e.invars
            if name == NEGATION:
                y = added({}, of(v), -1.0)
            elif name in (*SUMS, DIFFERENCE):
                y = added(of(v), of(others[0]), -1.0 if name == DIFFERENCE else 1.0)
            else:
                (x,) = _scales(e)
                s = float(x.val) if isinstance(x, Literal) else _wide(rows[x])
                v = others[0] if x is v else v
                y = {z: n / s if name == DIVISION else n * s for z, n in of(v).items()}
            found[e.outvars[0]] = y
        return found[self._flow.jaxpr.outvars[k]]


def _wide(x):
    return x.astype(widen(x.dtype))


def _is_one(x):
    return isinstance(x, float) and x == 1.0


def _name(x):
    """Returns what tells numbers apart: those of steps by what they are."""
    return x if isinstance(x, float) else id(x)


def _later(kept, length, reverse):
    """Returns what all later steps scale a step by, and all of them the beginning."""
    kept = jnp.broadcast_to(kept, (length,))
    upto = jnp.cumprod(kept if reverse else kept[::-1])
    later = jnp.concatenate([jnp.ones(1, kept.dtype), upto[:-1]])
    return later if reverse else later[::-1], upto[-1]


def _summed(v, eqn, rows, scale):
    """Returns a source, summed over the steps, each scaled."""
    xs = [rows[v]] if eqn is None else _stacks(eqn, rows)
    if not _is_one(scale):
        # Linear in its rows, or in the last factor.
        i = 0 if eqn is None or name_of(eqn) == UPDATE else -1
        x = _wide(xs[i])
        by = jnp.broadcast_to(jnp.asarray(scale, x.dtype), len(x))
        xs[i] = (x * by.reshape(-1, *(1,) * (x.ndim - 1))).astype(xs[i].dtype)
    if eqn is None:
        return jnp.sum(xs[0], 0, dtype=xs[0].dtype)
    return STACKED[name_of(eqn)][1](eqn, *xs)


def _scales(eqn: Any) -> list[Any]:
    """Returns the number that an equation scales a carry by, in a list; or none."""
    names = {"mul": eqn.invars, DIVISION: eqn.invars[1:]}
    return [v for v in names.get(name_of(eqn), ()) if v.aval.shape == ()]


def _added(flow, before, after):
    """Returns the terms of `after = number * before + terms`, and the equations.

    None if it is no such sum, or if something else is made of it.
    """
    if before is after or not flow.varies(after):
        return None
    path, found = [], {before}
    for eqn in flow.jaxpr.eqns:
        here = [v for v in eqn.invars if not isinstance(v, Literal) and v in found]
        if not here:
            continue
        name, scales = name_of(eqn), _scales(eqn)
        scaled = (
            len(scales) == len(here) == 1
            and not flow.varies(scales[0])
            and not (name == DIVISION and flow.is_zero(scales[0]))
        )
        real = is_real(eqn.outvars[0]) and (name in (DIFFERENCE, NEGATION) or scaled)
        if name not in SUMS and not real:
            return None
        path.append(eqn)
        found.update(eqn.outvars)
    outputs = [v for v in flow.jaxpr.outvars if not isinstance(v, Literal)]
    if [v for v in outputs if v in found] != [after]:
        return None
    scales = {id(v) for e in path for v in _scales(e)}
    others: dict[int, Any] = {id(v): v for e in path for v in e.invars}
    terms: list[Any] = [
        v
        for i, v in others.items()
        if i not in scales and (isinstance(v, Literal) or v not in found)
    ]
    if any(v.aval.shape != after.aval.shape for v in terms):
        return None
    return [v for v in terms if not flow.is_zero(v)], path


def _made(flow, inside, steps, limit):
    """Returns, by variable that is a linear map of others, these; none for a source.

    Args:
        flow: The program.
        inside: The variables that lead to gradients alone.
        steps: Its dataflow by step: what varies there differs between steps.
        limit: Size of the largest source that is no contraction.
    """
    made = {}
    for eqn in flow.jaxpr.eqns:
        given = [v for v in eqn.invars if not isinstance(v, Literal)]
        varying = [v for v in given if flow.varies(v)]
        if not varying:
            continue
        used = [v for v in eqn.outvars if v in flow.uses]
        leads = all(v in inside for v in used)
        maps = moves_or_pads(eqn) or (
            leads
            and _maps(flow, eqn)
            and not any(steps.varies(v) for v in given if not flow.varies(v))
        )
        if maps and all(v in made for v in varying):
            made.update((v, (varying, None)) for v in used)
        elif contracts(flow, eqn):
            made.update((v, ([], eqn)) for v in used)
        elif leads and all(size(v) <= limit for v in used):
            made.update((v, ([], None)) for v in used)
    return made


def _maps(flow, eqn):
    """Tells whether an equation is a linear map to which nothing is added."""
    if not is_linear(flow, eqn) or name_of(eqn) == LOOP:
        return False
    fixed = [v for v in eqn.invars if not flow.varies(v) and holds_numbers(v)]
    return name_of(eqn) in SCALED_BY or all(map(flow.is_zero, fixed))


def _below(made, terms):
    """Returns the sources that some variables are made of, and their equations."""
    found, seen, pending = {}, set(), [*terms]
    while pending:
        v = pending.pop()
        if v not in seen:
            seen.add(v)
            operands, eqn = made[v]
            pending += operands
            if not operands:
                found[v] = eqn
    return found


def contracts(flow: Dataflow, eqn: Any) -> bool:
    """Tells whether an equation is a contraction that can be done for all steps."""
    condition = STACKED.get(name_of(eqn), (None, None))[0]
    literal = any(isinstance(v, Literal) for v in _operands(eqn)[:2])
    return condition is not None and not literal and condition(flow, eqn)


def _operands(eqn):
    """Returns the operands of a contraction, without the zeros that it adds to."""
    return eqn.invars[1:] if name_of(eqn) == UPDATE else eqn.invars[-2:]


def _stacks(eqn, rows):
    """Returns the operands, stacked over the steps of a loop."""
    length = len(rows[_operands(eqn)[0]])
    return [
        jnp.full(length, v.val) if isinstance(v, Literal) else rows[v]
        for v in _operands(eqn)
    ]


def _stacked_product(eqn, a, g):
    params = eqn.params
    (ca, cg), batch = params["dimension_numbers"]
    ca, cg, ba, bg = (tuple(d + 1 for d in dims) for dims in (ca, cg, *batch))
    return lax.dot_general(
        a,
        g,
        (((0, *ca), (0, *cg)), (ba, bg)),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )


def _stacked_rows(eqn, a, g):
    numbers = eqn.params["dimension_numbers"]
    window = tuple(d + 1 for d in numbers.update_window_dims)
    batching = tuple(d + 1 for d in numbers.scatter_indices_batching_dims)
    out = eqn.outvars[0].aval
    return lax.scatter_add(
        jnp.zeros(out.shape, out.dtype),
        a,
        g,
        numbers._replace(
            update_window_dims=window, scatter_indices_batching_dims=batching
        ),
        mode=eqn.params["mode"],
    )


def _stacked_convolution(eqn, a, g):
    spec = eqn.params["dimension_numbers"]
    a, g = (
        jnp.moveaxis(x, 0, d).reshape(
            *x.shape[1 : d + 1], x.shape[0] * x.shape[d + 1], *x.shape[d + 2 :]
        )
        for x, d in ((a, spec.lhs_spec[1]), (g, spec.rhs_spec[1]))
    )
    (out,) = bind(eqn, [a, g])
    return out


def _indexes(flow, eqn):
    zeros, rows, *_ = eqn.invars
    return flow.is_zero(zeros) and rows.aval.shape != zeros.aval.shape


def _stacked_update(eqn, rows, *start):
    """Adds what is put at an index at each step, such as the gradient of a layer."""
    out = eqn.outvars[0].aval
    size = rows.shape[1:]
    indexed = tuple(d for d, n in enumerate(size) if n != out.shape[d])
    index = jnp.stack([jnp.asarray(start[d], jnp.int32) for d in indexed], -1)
    window = tuple(d for d in range(len(size)) if d not in indexed)
    numbers = lax.ScatterDimensionNumbers(tuple(range(1, rows.ndim)), (), indexed)
    return windows_by_rows(
        jnp.zeros(out.shape, out.dtype),
        index,
        rows,
        numbers,
        lax.GatherScatterMode.CLIP,
        (*indexed, *window),
    )


# What a loop adds up at each step can be done once: name -> whether this can, and how.
STACKED: dict[str, tuple[Callable, Callable]] = {
    "dot_general": (lambda flow, eqn: True, _stacked_product),
    "scatter-add": (lambda flow, eqn: flow.is_zero(eqn.invars[0]), _stacked_rows),
    "conv_general_dilated": (
        lambda flow, eqn: eqn.params["feature_group_count"] == 1,
        _stacked_convolution,
    ),
    UPDATE: (_indexes, _stacked_update),
}

"""A flat form of programs: calls inlined, sums that loops add up taken out of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from fsam_optax._engine.jaxpr import (
    bind,
    body_of,
    Dataflow,
    evaluate,
    loop_counts,
    loop_flow,
    read,
)
from fsam_optax._engine.normal import as_it_is, NORMAL, without_moves
from fsam_optax._engine.primitives import (
    BRANCHES,
    CALLS,
    LINEAR_MOVES,
    LOOP,
    name_of,
    REMATERIALISED,
    SOLVE,
    SUMS,
)


def flatten(closed: Any, varies: Sequence[bool]) -> Callable:
    """Returns the function of a closed jaxpr, which traces to a flat jaxpr.

    `varies` tells which of its inputs differ between examples.

    Calls are inlined. Rematerialised calls are inlined behind a barrier, which is what
    keeps the compiler from merging them with the first evaluation. A loop that only
    adds up matrix products, convolutions or scattered rows is taken apart, see
    `_scan`. Of branches the one that is known to be taken is inlined; all are where
    examples take different ones, see `_chosen`.
    """
    return lambda *args: _run(closed.jaxpr, closed.consts, args, varies)


def _run(jaxpr, consts, args, varies):
    given = (v for v, b in zip(jaxpr.invars, varies, strict=True) if b)
    flow = Dataflow(jaxpr, given, dict(zip(jaxpr.constvars, consts, strict=True)))
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        values = [read(env, v) for v in eqn.invars]
        name = name_of(eqn)
        if name in CALLS:
            out = _run(*body_of(eqn), values, list(map(flow.varies, eqn.invars)))
        elif name in REMATERIALISED:
            values = _barrier(eqn, values)
            out = _run(*body_of(eqn), values, list(map(flow.varies, eqn.invars)))
        elif name == SOLVE:
            out = _solve(flow, eqn, values)
        elif name == LOOP:
            out = _scan(flow, eqn, values)
        elif name == BRANCHES:
            out = _branches(flow, eqn, values)
        else:
            out = NORMAL.get(name, as_it_is)(flow, eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(env, v) for v in jaxpr.outvars]


def _barrier(eqn, values):
    guard = eqn.params.get("prevent_cse", True)
    if not eqn.params.get("differentiated", True) or guard is False:
        return values
    chosen = [guard] * len(values) if guard is True else list(guard)
    held = iter(
        lax.optimization_barrier([x for x, b in zip(values, chosen, strict=True) if b])
    )
    return [next(held) if b else x for x, b in zip(values, chosen, strict=True)]


def _solve(flow, eqn, values):
    """Inlines the solution of linear equations, whose derivatives are given apart."""
    n = eqn.params["const_lengths"]
    closed = eqn.params["jaxprs"].solve
    start = n.matvec + n.vecmat
    stop = start + n.solve
    kept = [*range(start, stop), *range(stop + n.transpose_solve, len(values))]
    varies = [flow.varies(eqn.invars[k]) for k in kept]
    return _run(closed.jaxpr, closed.consts, [values[k] for k in kept], varies)


def _branches(flow, eqn, values):
    """Evaluates the branch that is taken, or all where that differs."""
    branches = eqn.params["branches"]
    varies = [flow.varies(v) for v in eqn.invars[1:]]
    index, *operands = values
    known = flow.known_value(eqn.invars[0])
    if known is not None:
        closed = branches[int(np.clip(known, 0, len(branches) - 1))]
        return _run(closed.jaxpr, closed.consts, operands, varies)
    if flow.varies(eqn.invars[0]) or all(_is_move(x, varies) for x in branches):
        return _chosen(branches, varies, index, operands)
    return lax.switch(index, [flatten(x, varies) for x in branches], *operands)


def _is_move(closed, varies):
    """Tells whether a branch does nothing but linear maps of single entries."""
    jaxpr = closed.jaxpr
    flow = Dataflow(jaxpr, (v for v, b in zip(jaxpr.invars, varies, strict=True) if b))
    eqns = [eqn for eqn in jaxpr.eqns if any(map(flow.varies, eqn.invars))]
    return all(name_of(e) in (*LINEAR_MOVES, *SUMS, "mul") for e in eqns)


def _chosen(branches, varies, index, operands):
    """Evaluates all branches, and chooses from what they return.

    As `jax.vmap` does, except where all return sums of products: the factors of those
    that are not taken become zeros, so that the gradient stays a sum of products.
    """
    index = jnp.clip(index, 0, len(branches) - 1)
    found = []
    for closed in branches:
        flat = jax.make_jaxpr(flatten(closed, varies))(*closed.in_avals)
        flow = Dataflow(flat.jaxpr, flat.jaxpr.invars)
        env = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        env.update(zip(flat.jaxpr.invars, operands, strict=True))
        found.append((flow, env, [_products(flow, v) for v in flat.jaxpr.outvars]))
    out = []
    for i, aval in enumerate(branches[0].out_avals):
        products = [terms[i] for _, _, terms in found]
        if all(x is not None for x in products) and any(products):
            total = jnp.zeros(aval.shape, aval.dtype)
            for k, (flow, env, terms) in enumerate(found):
                for moved, e in terms[i]:
                    y = _gated(flow, env, e, index == k)
                    total = lax.add(total, _moved_back(flow, moved, y))
            out.append(total)
            continue
        cases = []
        for flow, env, _ in found:
            v = flow.jaxpr.outvars[i]
            evaluate(flow.jaxpr.eqns, env, flow.ancestors([v]))
            cases.append(jnp.asarray(read(env, v)))
        which = index == 1 if len(cases) == 2 else index
        out.append(lax.select_n(which, *cases) if len(cases) > 1 else cases[0])
    return out


def _products(flow, v):
    """Returns the contractions that `v` is the sum of, see `_accumulated`, or None."""
    found = []
    for x in flow.summands(v):
        if flow.is_zero(x):
            continue
        eqn, moved = without_moves(flow, x)
        if eqn is None or not _contracts(flow, eqn):
            return None
        found.append((moved, eqn))
    return found


def _gated(flow, env, eqn, taken):
    """Evaluates a contraction of factors that are zero unless the branch is taken."""
    evaluate(flow.jaxpr.eqns, env, flow.ancestors(eqn.invars))
    values = [jnp.asarray(read(env, v)) for v in eqn.invars]
    for k, x in enumerate(values):
        if k >= len(values) - 2 and jnp.issubdtype(x.dtype, jnp.inexact):
            values[k] = jnp.where(taken, x, jnp.zeros_like(x))
    return bind(eqn, values)[0]


def _moved_back(flow, moved, y):
    """Applies the moves on top of a contraction, of which the outermost comes first."""
    for v in reversed(moved):
        move = flow.producer[v]
        others = [read({}, x) for x in move.invars[1:]]
        y = bind(move, [y, *others])[move.outvars.index(v)]
    return y


def _scan(before, eqn, values):
    """Evaluates a loop; sums of products that it accumulates come out as one product.

    The gradient of a recurrent weight is a carry, `c + dot(a_t, g_t)` at each step.
    The operands are stacked instead and contracted once, over steps and positions.
    """
    closed = eqn.params["jaxpr"]
    n_consts, n_carry = loop_counts(eqn)
    body = loop_flow(before, eqn)
    varies = [body.varies(v) for v in body.jaxpr.invars]
    flat = jax.make_jaxpr(flatten(closed, varies))(*closed.in_avals)
    flow = Dataflow(flat.jaxpr, ())
    inputs, outputs = flat.jaxpr.invars, flat.jaxpr.outvars
    sums = {
        k: terms
        for k in range(n_carry)
        if (terms := _accumulated(flow, inputs[n_consts + k], outputs[k]))
    }
    factors = [v for terms in sums.values() for _, e in terms for v in _factors(e)]
    keep = [k for k in range(n_carry) if k not in sums]
    consts, carry, xs = np.split(np.arange(len(values)), [n_consts, n_consts + n_carry])
    rows = {inputs[i]: values[i] for i in xs}
    stacked = [v for v in dict.fromkeys(factors) if v not in rows]
    wanted = [outputs[k] for k in keep] + list(outputs[n_carry:]) + stacked
    needed = flow.ancestors(wanted)

    def step(state, x):
        env = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        env.update((inputs[i], values[i]) for i in consts)
        env.update((inputs[n_consts + k], c) for k, c in zip(keep, state, strict=True))
        env.update((inputs[i], leaf) for i, leaf in zip(xs, x, strict=True))
        evaluate(flat.jaxpr.eqns, env, needed)
        out = [read(env, v) for v in wanted]
        return out[: len(keep)], out[len(keep) :]

    state, ys = lax.scan(
        step,
        [values[carry[k]] for k in keep],
        [values[i] for i in xs],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    n_ys = len(outputs) - n_carry
    rows.update(zip(stacked, ys[n_ys:], strict=True))
    out: list[Any] = [None] * n_carry
    for k, value in zip(keep, state, strict=True):
        out[k] = value
    contracted: dict[int, Any] = {}
    for k, terms in sums.items():
        out[k] = values[carry[k]]
        for moved, e in terms:
            if id(e) not in contracted:
                contracted[id(e)] = _contract_steps(e, *(rows[v] for v in _factors(e)))
            out[k] = lax.add(out[k], _moved_back(flow, moved, contracted[id(e)]))
    return out + ys[:n_ys]


def _accumulated(flow, before, after):
    """Returns the terms of `after = before + terms`, if they are all contractions.

    Each is a pair: what is moved from it, outermost first, and its equation.
    """
    terms = flow.summands(after)
    if flow.uses.get(before) != 1 or terms.count(before) != 1:
        return None
    partial_sums = flow.ancestors([after], stop=[v for v in terms if v is not before])
    if any(flow.uses[v] != 1 for v in partial_sums):
        return None
    found = []
    for v in terms:
        if v is before:
            continue
        eqn, moved = without_moves(flow, v)
        if eqn is None or not _contracts(flow, eqn):
            return None
        found.append((moved, eqn))
    return found


def _contracts(flow, eqn):
    condition = STACKED.get(name_of(eqn), (None, None))[0]
    literal = any(isinstance(v, Literal) for v in _factors(eqn))
    return condition is not None and not literal and condition(flow, eqn)


def _factors(eqn):
    """Returns the operands of a contraction, without the zeros scattered into."""
    return eqn.invars[-2:]


def _contract_steps(eqn, a, g):
    """Applies a contraction to operands stacked over steps, and sums over them."""
    return STACKED[name_of(eqn)][1](eqn, a, g)


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


# What a loop adds up at each step can be done once: name -> whether this can, and how.
STACKED: dict[str, tuple[Callable, Callable]] = {
    "dot_general": (lambda flow, eqn: True, _stacked_product),
    "scatter-add": (lambda flow, eqn: flow.is_zero(eqn.invars[0]), _stacked_rows),
    "conv_general_dilated": (
        lambda flow, eqn: eqn.params["feature_group_count"] == 1,
        _stacked_convolution,
    ),
}

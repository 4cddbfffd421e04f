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
from fsam_optax._engine.primitives import (
    CALLS,
    CONTRACTIONS,
    LINEAR_MOVES,
    LOOP,
    name_of,
    REMATERIALISED,
)


def flatten(closed: Any, varies: Sequence[bool]) -> Callable:
    """Returns the function of a closed jaxpr, which traces to a flat jaxpr.

    `varies` tells which of its inputs differ between examples.

    Calls are inlined. Rematerialised calls are inlined behind a barrier, which is what
    keeps the compiler from merging them with the first evaluation. A loop that only
    adds up matrix products, convolutions or scattered rows is taken apart, see
    `_scan`.
    """
    return lambda *args: _run(closed.jaxpr, closed.consts, args, varies)


def _run(jaxpr, consts, args, varies):
    flow = Dataflow(jaxpr, (v for v, b in zip(jaxpr.invars, varies, strict=True) if b))
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        values = [read(env, v) for v in eqn.invars]
        name = name_of(eqn)
        if name in CALLS:
            out = _run(*body_of(eqn), values, list(map(flow.varies, eqn.invars)))
        elif name in REMATERIALISED:
            values = _barrier(eqn, values)
            out = _run(*body_of(eqn), values, list(map(flow.varies, eqn.invars)))
        elif name == LOOP:
            out = _scan(flow, eqn, values)
        else:
            out = NORMAL.get(name, _as_it_is)(flow, eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(env, v) for v in jaxpr.outvars]


def _as_it_is(flow, eqn, values):
    del flow
    return bind(eqn, values)


def _product(flow, eqn, values):
    """Evaluates a matrix product without the axes of size one.

    A model for batches meets one example as a batch of one. Mapped over examples, its
    products would have an axis too many, which XLA:CPU pays for with copies.
    """
    del flow
    a, g = values
    (contract_a, contract_g), (batch_a, batch_g) = eqn.params["dimension_numbers"]

    def thin(x, contract, batch):
        drop = [d for d in range(x.ndim) if x.shape[d] == 1 and d not in batch]
        kept = [d for d in range(x.ndim) if d not in drop]
        contract = [kept.index(d) for d in contract if d in kept]
        return lax.squeeze(x, drop), contract, [kept.index(d) for d in batch]

    a, contract_a, batch_a = thin(a, contract_a, batch_a)
    g, contract_g, batch_g = thin(g, contract_g, batch_g)
    y = lax.dot_general(
        a,
        g,
        ((contract_a, contract_g), (batch_a, batch_g)),
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    return [y.reshape(eqn.outvars[0].aval.shape)]


def _is_one_row(flow, eqn):
    """Tells whether something is put at an index into zeros, as for one token.

    At an index that all examples share it may be the gradient of one layer of several.
    """
    zeros, rows, *start = eqn.invars
    whole = all(
        n in (1, m) for n, m in zip(rows.aval.shape, zeros.aval.shape, strict=True)
    )
    below, _ = _without_moves(flow, rows)
    return (
        flow.is_zero(zeros)
        and whole
        and (any(map(flow.varies, start)) or name_of(below) not in CONTRACTIONS)
    )


def _row(flow, eqn, values):
    """Evaluates such an update as what several tokens would give."""
    if not _is_one_row(flow, eqn):
        return bind(eqn, values)
    zeros, rows, *start = values
    indexed = tuple(d for d, n in enumerate(rows.shape) if n != zeros.shape[d])
    window = tuple(range(1, 1 + rows.ndim - len(indexed)))
    index = [start[d] for d in indexed]
    y = lax.scatter_add(
        zeros,
        jnp.stack(index)[None] if index else jnp.zeros((1, 0), jnp.int32),
        lax.squeeze(rows, indexed)[None],
        lax.ScatterDimensionNumbers(window, indexed, indexed),
        mode=lax.GatherScatterMode.CLIP,
    )
    return [y]


# How a primitive is written to be recognised later: name -> function of the program,
# the equation and the values of its operands.
NORMAL: dict[str, Callable] = {
    "dot_general": _product,
    "dynamic_update_slice": _row,
}


def _without_moves(flow, v):
    """Returns the equation below the moves on top of `v`, and what they produce."""
    moved, eqn = [], flow.made_by(v)
    while eqn and name_of(eqn) in LINEAR_MOVES:
        moved.append(v)
        (v, *_) = eqn.invars
        eqn = flow.made_by(v)
    return eqn, moved


def _barrier(eqn, values):
    guard = eqn.params.get("prevent_cse", True)
    if not eqn.params.get("differentiated", True) or guard is False:
        return values
    chosen = [guard] * len(values) if guard is True else list(guard)
    held = iter(
        lax.optimization_barrier([x for x, b in zip(values, chosen, strict=True) if b])
    )
    return [next(held) if b else x for x, b in zip(values, chosen, strict=True)]


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
            term = contracted[id(e)]
            for v in reversed(moved):
                move = flow.producer[v]
                others = [read({}, x) for x in move.invars[1:]]
                term = bind(move, [term, *others])[move.outvars.index(v)]
            out[k] = lax.add(out[k], term)
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
        eqn, moved = _without_moves(flow, v)
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

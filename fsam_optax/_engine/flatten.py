"""A flat form of programs: calls inlined, sums that loops add up taken out of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from fsam_optax._engine.branches import switched
from fsam_optax._engine.carries import Carries, contracts
from fsam_optax._engine.ends import added_to_others, ends
from fsam_optax._engine.jaxpr import (
    bind,
    body_of,
    Dataflow,
    evaluate,
    is_product,
    loop_counts,
    loop_flow,
    read,
)
from fsam_optax._engine.normal import as_it_is, NORMAL, without_moves
from fsam_optax._engine.primitives import (
    BRANCHES,
    CALLS,
    IN_KERNELS,
    LINEAR_MOVES,
    LOOP,
    name_of,
    REMATERIALISED,
    SOLVE,
    SUMS,
    UPDATE,
)
from fsam_optax._engine.sources import is_linear
from fsam_optax._engine.thin import full, thin, thinned, without_ones


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
    """Evaluates a program."""
    found = _values(jaxpr, consts, map(full, args), varies)
    return [x.take("full") for x in found]


def _values(jaxpr, consts, args, varies, added=()):
    """Evaluates a program; some of its outputs are added to something outside."""
    given = (v for v, b in zip(jaxpr.invars, varies, strict=True) if b)
    flow = Dataflow(jaxpr, given, dict(zip(jaxpr.constvars, consts, strict=True)))
    env = dict(zip(jaxpr.constvars, map(full, consts), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    added = added_to_others(flow, added)
    for eqn in jaxpr.eqns:
        values = [_value(env, v) for v in eqn.invars]
        name = name_of(eqn)
        if name in (*CALLS, *REMATERIALISED):
            if name in REMATERIALISED:
                values = _barrier(flow, eqn, values)
            body, constants = body_of(eqn)
            pairs = zip(body.outvars, eqn.outvars, strict=True)
            inner = [x for x, v in pairs if v in added]
            given = list(map(flow.varies, eqn.invars))
            out = _values(body, constants, values, given, inner)
        elif name == LOOP:
            out = _scan(flow, eqn, values, added)
        elif (out := thinned(eqn, values)) is None:
            given = [x.take("full") for x in values]
            out = map(full, _evaluated(flow, eqn, given))
        env.update(zip(eqn.outvars, out, strict=True))
    return [_value(env, v) for v in jaxpr.outvars]


def _value(env, v):
    return full(v.val) if isinstance(v, Literal) else env[v]


def _evaluated(flow, eqn, values):
    """Evaluates an equation with all axes."""
    name = name_of(eqn)
    if name == SOLVE:
        return _solve(flow, eqn, values)
    if name == BRANCHES:
        return _branches(flow, eqn, values)
    return NORMAL.get(name, as_it_is)(flow, eqn, values)


def _barrier(flow, eqn, given):
    values = [x.take("thin" if x.has("thin") else "full") for x in given]
    found = _held_back(flow, eqn, values)
    return [without_ones(y, x.shape) for x, y in zip(given, found, strict=True)]


def _held_back(flow, eqn, values):
    guard = eqn.params.get("prevent_cse", True)
    if not eqn.params.get("differentiated", True) or guard is False:
        return values
    chosen = [guard] * len(values) if guard is True else list(guard)
    # The numbers of layers are to stay known.
    floating = [jnp.issubdtype(x.dtype, jnp.inexact) for x in map(jnp.asarray, values)]
    chosen = [
        b and (flow.varies(v) or f)
        for b, v, f in zip(chosen, eqn.invars, floating, strict=True)
    ]
    # Those that differ wait for each other. Weights do not: they may be the same at
    # each step of a loop.
    joint = [b and flow.varies(v) for b, v in zip(chosen, eqn.invars, strict=True)]
    found = [x for x, b in zip(values, joint, strict=True) if b]
    held = iter(lax.optimization_barrier(found) if found else ())
    return [
        next(held) if j else lax.optimization_barrier(x) if b else x
        for x, b, j in zip(values, chosen, joint, strict=True)
    ]


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
    platforms = eqn.params.get("branches_platforms") or ()
    outside = [k for k, names in enumerate(platforms) if names != IN_KERNELS]
    if known is not None or len(outside) == 1:
        k = outside[0] if known is None else int(np.clip(known, 0, len(branches) - 1))
        return _run(branches[k].jaxpr, branches[k].consts, operands, varies)
    # What a choice of weights makes of their gradient is no choice of models.
    given = [v for v in eqn.invars[1:] if flow.varies(v)]
    product = bool(given) and all(is_product(flow, v) for v in given)
    moves = not platforms and all(_is_move(x, varies, product) for x in branches)
    if moves or flow.varies(eqn.invars[0]):
        common = not flow.varies(eqn.invars[0])
        return _chosen(branches, varies, index, operands, common)
    return switched(eqn, index, [flatten(x, varies) for x in branches], operands)


def _is_move(closed, varies, product):
    """Tells whether a branch does nothing but linear maps of single entries.

    Or any linear maps, of a product such as the gradient of a weight.
    """
    jaxpr = closed.jaxpr
    flow = Dataflow(jaxpr, (v for v, b in zip(jaxpr.invars, varies, strict=True) if b))
    eqns = [eqn for eqn in jaxpr.eqns if any(map(flow.varies, eqn.invars))]
    moves = (*LINEAR_MOVES, *SUMS, "mul")
    return all(name_of(e) in moves or (product and is_linear(flow, e)) for e in eqns)


def _chosen(branches, varies, index, operands, common):
    """Evaluates all branches, and chooses from what they return.

    As `jax.vmap` does, except where all return sums of products: the factors of those
    that are not taken become zeros, so that the gradient stays a sum of products. If
    the choice is common to all examples, constants become ones there: what such a
    branch divides by may be zero.
    """
    index = jnp.clip(index, 0, len(branches) - 1)
    found = []
    for k, closed in enumerate(branches):
        flat = jax.make_jaxpr(flatten(closed, varies))(*closed.in_avals)
        flow = Dataflow(flat.jaxpr, flat.jaxpr.invars)
        env = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        for v, x, b in zip(flat.jaxpr.invars, operands, varies, strict=True):
            gated = common and not b and jnp.issubdtype(v.aval.dtype, jnp.inexact)
            env[v] = jnp.where(index == k, x, jnp.ones_like(x)) if gated else x
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
        if eqn is None or name_of(eqn) == UPDATE or not contracts(flow, eqn):
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


def _scan(before, eqn, values, added):
    """Evaluates a loop; sums of products that it accumulates come out as one product.

    See `carries`. Within it, values have no axes of size one.
    """
    n_consts, n_carry = loop_counts(eqn)
    n_same = n_consts + n_carry
    body = loop_flow(before, eqn)
    varies = [body.varies(v) for v in body.jaxpr.invars]
    flat = _thin_body(eqn.params["jaxpr"], varies)
    values = [
        x.shaped((*x.shape[: k >= n_same], *thin(x.shape[k >= n_same :])))
        for k, x in enumerate(values)
    ]
    inputs, outputs = flat.jaxpr.invars, flat.jaxpr.outvars
    flow = Dataflow(flat.jaxpr, (v for v, b in zip(inputs, varies, strict=True) if b))
    sums = Carries(flow, n_consts, n_carry)
    end = ends(before, eqn, flow, added)
    factors = sums.factors()
    given = dict(zip(inputs, values, strict=True))
    same = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
    same.update((v, given[v]) for v in inputs[:n_consts])
    factors += [v for v in end.operands if v not in same]
    xs = inputs[n_consts + n_carry :]
    stacked = [v for v in dict.fromkeys(factors) if v not in xs]
    keep = [k for k in range(n_carry) if k not in sums.terms]
    kept = [k for k in range(n_carry, len(outputs)) if k not in end.outputs]
    rows = {v: given[v] for v in xs}
    final, ys = _in_loops(
        eqn, flat, varies, given, keep, [*(outputs[k] for k in kept), *stacked]
    )
    rows.update(zip(stacked, ys[len(kept) :], strict=True))
    final.update(zip(kept, ys, strict=False))
    final.update(end.values(flow, same, rows))
    final.update(sums.totals(values[n_consts:], same, rows, eqn.params))
    return [without_ones(final[k], v.aval.shape) for k, v in enumerate(eqn.outvars)]


def _thin_body(closed, varies):
    """Returns a flat program without axes of size one in what it takes and returns."""

    def thin_values(*args):
        return [x.shaped(thin(x.shape)) for x in map(full, args)]

    def run(*args):
        shapes = (x.shape for x in closed.in_avals)
        args = map(without_ones, args, shapes)
        found = _values(closed.jaxpr, closed.consts, args, varies)
        return [x.shaped(thin(x.shape)) for x in found]

    return jax.make_jaxpr(run)(*jax.make_jaxpr(thin_values)(*closed.in_avals).out_avals)


def _in_loops(eqn, flat, varies, given, keep, stacked):
    """Evaluates a loop: some of what it carries, by number, and what it stacks.

    What is the same for all examples comes out of loops of its own, such as the number
    of the layer, which then is known to be.
    """
    jaxpr = flat.jaxpr
    n_consts, n_carry = loop_counts(eqn)
    state = jaxpr.invars[n_consts : n_consts + n_carry]
    flow = Dataflow(jaxpr, (v for v, b in zip(jaxpr.invars, varies, strict=True) if b))

    def origins(roots):
        """Returns what the loop carries of which `roots` are made, and its inputs."""
        carried: set[int] = set()
        while True:
            found = flow.ancestors([*roots, *(jaxpr.outvars[k] for k in carried)])
            more = {k for k, v in enumerate(state) if v in found}
            if more <= carried:
                return sorted(carried), found
            carried |= more

    def kind(v):
        """Tells apart what has a loop of its own: indices, by what they are made of."""
        if flow.varies(v) or not any(varies):
            return True, frozenset()
        if jnp.issubdtype(v.aval.dtype, jnp.floating):
            return False, frozenset()
        return False, frozenset(origins([v])[1].intersection(jaxpr.invars))

    groups: dict[Any, list[tuple[bool, int]]] = {}
    for k in keep:
        groups.setdefault(kind(jaxpr.outvars[k]), []).append((True, k))
    for i, v in enumerate(stacked):
        groups.setdefault(kind(v), []).append((False, i))
    final, ys = {}, [None] * len(stacked)
    for members in groups.values():
        chosen = [stacked[i] for last, i in members if not last]
        own = [k for last, k in members if last]
        carried, needed = origins([*chosen, *(jaxpr.outvars[k] for k in own)])
        carried = sorted({*carried, *own})
        results = [jaxpr.outvars[k] for k in carried]
        xs = [v for v in jaxpr.invars[n_consts + n_carry :] if v in needed]

        def step(now, x, carried=carried, results=results, chosen=chosen, xs=xs):
            env = dict(zip(jaxpr.constvars, flat.consts, strict=True))
            env.update((v, given[v]) for v in jaxpr.invars[:n_consts])
            env.update(zip((state[k] for k in carried), now, strict=True))
            env.update(zip(xs, x, strict=True))
            evaluate(jaxpr.eqns, env, flow.ancestors([*results, *chosen]))
            return [read(env, v) for v in results], [read(env, v) for v in chosen]

        now, found = lax.scan(
            step,
            [given[state[k]] for k in carried],
            [given[v] for v in xs],
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        final.update((k, x) for k, x in zip(carried, now, strict=True) if k in own)
        ys_of = iter(found)
        for last, i in members:
            if not last:
                ys[i] = next(ys_of)
    return final, ys

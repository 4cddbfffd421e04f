"""Programs as jaxprs: a flat form of them, their dataflow, their evaluation.

The only module that knows how a jaxpr is laid out. It touches the public part of it:
equations with a primitive, parameters, inputs and outputs.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal


CALLS = ("jit", "pjit", "closed_call", "core_call", "xla_call")
REMATERIALISED = ("checkpoint", "remat", "remat2")
SUMS = ("add_any", "add")
CONTRACTIONS = {
    "dot_general": "shared dense",
    "conv_general_dilated": "convolution",
    "scatter-add": "embedding",
}
# Linear operations that move entries about, or scale each by itself.
MOVES = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "neg",
    "reshape",
    "rev",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "transpose",
)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation; returns the list of its outputs."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def body_of(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """Returns the jaxpr that the equation runs, and its constants."""
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def loop_counts(eqn: Any) -> tuple[int, int]:
    """Returns how many operands of a scan are constants, and how many it carries.

    By their shapes: what a scan runs through has an axis more outside than inside.
    """
    jaxpr, _ = body_of(eqn)

    def same(outside, inside):
        return [
            x.aval.ndim == y.aval.ndim for x, y in zip(outside, inside, strict=True)
        ]

    n_carry = sum(same(eqn.outvars, jaxpr.outvars))
    return sum(same(eqn.invars, jaxpr.invars)) - n_carry, n_carry


def size(v: Any) -> int:
    """Returns the number of entries of a variable or literal."""
    return math.prod(v.aval.shape)


class Dataflow:
    """A flat jaxpr with what depends on what.

    Attributes:
        jaxpr: The jaxpr.
        producer: The equation that produces a variable.
        uses: How often a variable is read.
        varying: The variables that differ from one example to the next.
        loop_sizes: By loop, what `arising` found.
    """

    def __init__(self, jaxpr: Any, varying: Iterable[Any]):
        """Takes the jaxpr and those of its inputs that differ between examples."""
        self.jaxpr = jaxpr
        self.producer = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self.loop_sizes: dict[int, list[int]] = {}
        self._order = {id(eqn): i for i, eqn in enumerate(jaxpr.eqns)}
        self.varying = set(varying)
        self.uses: dict[Any, int] = {}
        for v in [*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars]:
            if not isinstance(v, Literal):
                self.uses[v] = self.uses.get(v, 0) + 1
        for eqn in jaxpr.eqns:
            varies = [self.varies(v) for v in eqn.invars]
            if eqn.primitive.name == "optimization_barrier":
                self.varying.update(
                    v for v, b in zip(eqn.outvars, varies, strict=True) if b
                )
            elif any(varies):
                self.varying.update(eqn.outvars)

    def varies(self, v: Any) -> bool:
        """Tells whether the value differs from one example to the next."""
        return not isinstance(v, Literal) and v in self.varying

    def made_by(self, v: Any) -> Any:
        """Returns the equation that produces `v`; None for inputs and literals."""
        return None if isinstance(v, Literal) else self.producer.get(v)

    def is_zero(self, v: Any) -> bool:
        """Tells whether the value is known to be all zeros."""
        if isinstance(v, Literal):
            return bool(np.all(np.asarray(v.val) == 0))
        eqn = self.made_by(v)
        passes = ("broadcast_in_dim", "convert_element_type", "copy")
        return bool(
            eqn and eqn.primitive.name in passes and self.is_zero(eqn.invars[0])
        )

    def ancestors(self, roots: Iterable[Any], stop: Iterable[Any] = ()) -> set[Any]:
        """Returns the variables that `roots` are computed from, and themselves."""
        stop = {v for v in stop if not isinstance(v, Literal)}
        found: set[Any] = set()
        pending = list(roots)
        while pending:
            v = pending.pop()
            if isinstance(v, Literal) or v in found or v in stop:
                continue
            found.add(v)
            if v in self.producer:
                pending += self.producer[v].invars
        return found

    def equations(self, made: Iterable[Any]) -> list[Any]:
        """Returns the equations that produce these variables, in their order."""
        eqns = [self.producer[v] for v in made if v in self.producer]
        unique = {self._order[id(eqn)]: eqn for eqn in eqns}
        return [unique[i] for i in sorted(unique)]

    def summands(self, v: Any) -> list[Any]:
        """Returns the terms that `v` is the sum of; itself if it is not a sum."""
        eqn = self.made_by(v)
        if eqn is None or eqn.primitive.name not in SUMS:
            return [v]
        if any(x.aval.shape != v.aval.shape for x in eqn.invars):
            return [v]
        return [term for x in eqn.invars for term in self.summands(x)]


def depends(fn: Callable, *likes: Any) -> bool:
    """Tells whether the outputs of `fn` depend on its operands."""
    jaxpr = jax.make_jaxpr(fn)(*likes).jaxpr
    flow = Dataflow(jaxpr, jaxpr.invars)
    return any(flow.varies(v) for v in jaxpr.outvars)


def loop_flow(flow: Dataflow, eqn: Any) -> Dataflow:
    """Returns the dataflow of the body of a loop."""
    jaxpr, _ = body_of(eqn)
    n_consts, n_carry = loop_counts(eqn)
    varies = [flow.varies(v) for v in eqn.invars]
    while True:
        body = Dataflow(
            jaxpr, (v for v, b in zip(jaxpr.invars, varies, strict=True) if b)
        )
        grown = [
            b or (0 <= k < n_carry and body.varies(jaxpr.outvars[k]))
            for k, b in enumerate(varies, -n_consts)
        ]
        if grown == varies:
            return body
        varies = grown


def largest(flow: Dataflow, found: set[Any]) -> int:
    """Returns the size of the largest array that arises among these variables."""
    return max((arising(flow, v) for v in found), default=1)


def largest_before(flow: Dataflow) -> dict[Any, int]:
    """Returns, by variable, the size of the largest array that arises on the way."""
    sizes: dict[Any, int] = {}
    for eqn in flow.jaxpr.eqns:
        given = (v for v in eqn.invars if not isinstance(v, Literal))
        before = max((sizes.get(v, 1) for v in given), default=1)
        sizes.update((v, max(before, arising(flow, v))) for v in eqn.outvars)
    return sizes


def arising(flow: Dataflow, v: Any) -> int:
    """Returns the size of a variable if it arises here, from smaller ones, or else 1.

    What a loop stacks counts by the step.
    """
    eqn = flow.made_by(v)
    if eqn is None or not flow.varies(v):
        return 1
    if eqn.primitive.name != "scan":
        read_here = max((size(x) for x in eqn.invars if flow.varies(x)), default=0)
        return size(v) if size(v) > read_here else 1
    if id(eqn) not in flow.loop_sizes:
        flow.loop_sizes[id(eqn)] = _sizes_by_output(loop_flow(flow, eqn), eqn)
    return flow.loop_sizes[id(eqn)][eqn.outvars.index(v)]


def _sizes_by_output(body: Dataflow, eqn: Any) -> list[int]:
    """Returns, by output of a loop, the size of the largest array on the way to it."""
    n_consts, n_carry = loop_counts(eqn)
    outputs = body.jaxpr.outvars
    sizes = largest_before(body)
    # By variable, the numbers of what the loop carries that it is computed from.
    carried: dict[Any, set[int]] = {
        v: {k} for k, v in enumerate(body.jaxpr.invars[n_consts : n_consts + n_carry])
    }
    for inner in body.jaxpr.eqns:
        given = [v for v in inner.invars if not isinstance(v, Literal)]
        found = set().union(*(carried.get(v, ()) for v in given))
        carried.update((v, found) for v in inner.outvars)

    def on_the_way(output):
        size, seen, pending = 1, set(), [output]
        while pending:
            v = pending.pop()
            if not isinstance(v, Literal):
                size = max(size, sizes.get(v, 1))
                more = carried.get(v, set()) - seen
                seen |= more
                pending += [outputs[k] for k in more]
        return size

    return [on_the_way(v) for v in outputs]


def read(env: dict[Any, Any], v: Any) -> Any:
    """Returns the value of a variable or literal."""
    return v.val if isinstance(v, Literal) else env[v]


def evaluate(eqns: Iterable[Any], env: dict[Any, Any], needed: set[Any]) -> None:
    """Adds the values of the needed variables that `env` does not hold yet."""
    for eqn in eqns:
        if any(v in needed and v not in env for v in eqn.outvars):
            env.update(
                zip(
                    eqn.outvars,
                    bind(eqn, [read(env, v) for v in eqn.invars]),
                    strict=True,
                )
            )


def flatten(closed: Any) -> Callable:
    """Returns the function of a closed jaxpr, which traces to a flat jaxpr.

    Calls are inlined. Rematerialised calls are inlined behind a barrier, which is what
    keeps the compiler from merging them with the first evaluation. A loop that only
    adds up matrix products, convolutions or scattered rows is taken apart, see
    `_scan`.
    """
    return lambda *args: _run(closed.jaxpr, closed.consts, args)


def _run(jaxpr, consts, args):
    flow = Dataflow(jaxpr, ())
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        values = [read(env, v) for v in eqn.invars]
        name = eqn.primitive.name
        if name in CALLS:
            out = _run(*body_of(eqn), values)
        elif name in REMATERIALISED:
            out = _run(*body_of(eqn), _barrier(eqn, values))
        elif name == "scan":
            out = _scan(eqn, values)
        elif name == "dot_general":
            out = [_product(eqn, *values)]
        elif name == "dynamic_update_slice" and _is_one_row(flow, eqn):
            out = [_scattered(eqn, *values)]
        else:
            out = bind(eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(env, v) for v in jaxpr.outvars]


def _product(eqn, a, g):
    """Evaluates a matrix product without the axes of size one.

    A model for batches meets one example as a batch of one. Mapped over examples, its
    products would have an axis too many, which XLA:CPU pays for with copies.
    """
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
    return y.reshape(eqn.outvars[0].aval.shape)


def _is_one_row(flow, eqn):
    """Tells whether an activation is put at an index into zeros, as for one token."""
    zeros, rows = eqn.invars[:2]
    eqn, _ = _without_moves(flow, rows)
    return (
        flow.is_zero(zeros)
        and all(
            n in (1, m) for n, m in zip(rows.aval.shape, zeros.aval.shape, strict=True)
        )
        and not (eqn and eqn.primitive.name in CONTRACTIONS)
    )


def _scattered(eqn, zeros, rows, *start):
    """Evaluates such an update as what several tokens would give."""
    indexed = tuple(d for d, n in enumerate(rows.shape) if n != zeros.shape[d])
    window = tuple(range(1, 1 + rows.ndim - len(indexed)))
    index = [start[d] for d in indexed]
    return lax.scatter_add(
        zeros,
        jnp.stack(index)[None] if index else jnp.zeros((1, 0), jnp.int32),
        lax.squeeze(rows, indexed)[None],
        lax.ScatterDimensionNumbers(window, indexed, indexed),
        mode=lax.GatherScatterMode.CLIP,
    )


def _without_moves(flow, v):
    """Returns the equation below the moves on top of `v`, and what they produce."""
    moved, eqn = [], flow.made_by(v)
    while eqn and eqn.primitive.name in MOVES:
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


def _scan(eqn, values):
    """Evaluates a loop; sums of products that it accumulates come out as one product.

    The gradient of a recurrent weight is a carry, `c + dot(a_t, g_t)` at each step.
    The operands are stacked instead and contracted once, over steps and positions.
    """
    closed = eqn.params["jaxpr"]
    n_consts, n_carry = loop_counts(eqn)
    flat = jax.make_jaxpr(flatten(closed))(*closed.in_avals)
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
    name = eqn.primitive.name
    if any(isinstance(v, Literal) for v in _factors(eqn)):
        return False
    if name == "conv_general_dilated":
        return eqn.params["feature_group_count"] == 1
    if name == "scatter-add":
        return flow.is_zero(eqn.invars[0])
    return name == "dot_general"


def _factors(eqn):
    """Returns the operands of a contraction, without the zeros scattered into."""
    return eqn.invars[-2:]


def _contract_steps(eqn, a, g):
    """Applies a contraction to operands stacked over steps, and sums over them."""
    params = dict(eqn.params)
    if eqn.primitive.name == "dot_general":
        (ca, cg), batch = params["dimension_numbers"]
        ca, cg, ba, bg = (tuple(d + 1 for d in dims) for dims in (ca, cg, *batch))
        return lax.dot_general(
            a,
            g,
            (((0, *ca), (0, *cg)), (ba, bg)),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
    if eqn.primitive.name == "scatter-add":
        numbers = params["dimension_numbers"]
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
            mode=params["mode"],
        )
    spec = params["dimension_numbers"]
    a, g = (
        jnp.moveaxis(x, 0, d).reshape(
            *x.shape[1 : d + 1], x.shape[0] * x.shape[d + 1], *x.shape[d + 2 :]
        )
        for x, d in ((a, spec.lhs_spec[1]), (g, spec.rhs_spec[1]))
    )
    (out,) = bind(eqn, [a, g])
    return out

"""How each gradient of a program becomes a sum of powers over examples.

A gradient is a few moves of entries (transpositions, concatenations, ...), through
which a power passes, over *sources*: matrix products, convolutions, and so on. Each
source gets the cheapest rule that sums its powers without stacking it over examples.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from fsam_optax._engine.jaxpr import (
    bind,
    body_of,
    CONTRACTIONS,
    Dataflow,
    evaluate,
    largest,
    largest_before,
    loop_counts,
    loop_flow,
    MOVES,
    read,
    size,
)
from fsam_optax._engine.sums import (
    convolution_as_product,
    looped,
    outer_product,
    power,
    precision_of,
    reduced,
    scattered_rows,
    Steps,
    widened,
)


@dataclass(frozen=True)
class Summation:
    """What is summed.

    Attributes:
        powers: The powers.
        chunk_bytes: Bytes that a step of a loop over examples or cotangents may hold on
            a device; None for what suits the backend.
        devices: How many devices the examples may be spread over.
        examples: How many examples there are on each, if they are.
        axes: How many axes the library maps over.
        limit: Size of the largest array that the model itself takes for an example. A
            larger one in the backward pass is the gradient of a parameter.
    """

    powers: tuple[int, ...]
    chunk_bytes: int | None
    devices: int
    examples: int
    axes: int = 1
    limit: int = 1


@dataclass(frozen=True)
class Source:
    """A value of one example, and how its powers are summed over examples.

    Attributes:
        rule: Name of the rule, for the report.
        cost: Operations, relative to those that this gradient takes in a batch.
        operands: The variables that the rule reads.
        reduce: The rule, see `_sums`.
        held: Bytes that it holds for one example and cotangent at a time.
    """

    rule: str
    cost: float
    operands: tuple[Any, ...]
    reduce: Any
    held: int = 0


@dataclass(frozen=True)
class Loop:
    """A loop of the program, which yields the gradient of one layer at each step."""

    eqn: Any
    plan: "Plan"
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How to evaluate a program whose wanted outputs are sums of powers.

    Attributes:
        flow: The program.
        consts: Its constants.
        wanted: The variables of which the sums of powers are wanted.
        needed: The variables to evaluate for each example.
        sources: The rule for each variable that the wanted ones are moved from, by
            its identity (literals do not hash).
        loops: The loops that some sources come out of.
    """

    flow: Dataflow
    consts: Sequence[Any]
    wanted: tuple[Any, ...]
    needed: set[Any]
    sources: dict[int, Source]
    loops: tuple[Loop, ...]

    def rules(self, v: Any) -> list[tuple[str, float, int]]:
        """Returns name, cost and size of the rules that a wanted variable uses."""
        found = []
        for base in _origins(self.flow, v)[0]:
            source = self.sources.get(id(base))
            if source is not None:
                found.append((source.rule, source.cost, _entries(base)))
            else:
                loop = next(x for x in self.loops if base in x.eqn.outvars)
                k = loop.outputs.index(loop.eqn.outvars.index(base))
                found += loop.plan.rules(loop.plan.wanted[k])
        return found


def make_plan(
    flow: Dataflow,
    consts: Sequence[Any],
    wanted: Sequence[Any],
    values: Iterable[Any],
    what: Summation,
) -> Plan:
    """Chooses a rule for every source of the wanted variables.

    Args:
        flow: The program of one example.
        consts: Its constants.
        wanted: The variables of which the sums of powers are wanted.
        values: The variables that are needed as they are.
        what: What is summed.
    """
    origins = [_origins(flow, v) for v in wanted]
    bases = {id(base): base for found, _ in origins for base in found}
    sources, loops, others = {}, {}, []
    before = largest_before(flow)
    for v in bases.values():
        eqn = flow.made_by(v)
        if not flow.varies(v):
            sources[id(v)] = _whole(v, "constant", what)
        elif (source := _contraction(flow, v, what)) and all(
            before.get(x, 1) <= what.limit
            for x in source.operands
            if not isinstance(x, Literal)
        ):
            sources[id(v)] = source
        elif _is_stacked(eqn, v):
            loops.setdefault(id(eqn), (eqn, []))[1].append(eqn.outvars.index(v))
        else:
            others.append(v)

    operands = [x for _, read_by_moves in origins for x in read_by_moves]
    operands += [x for source in sources.values() for x in source.operands]
    operands += [x for eqn, _ in loops.values() for x in eqn.invars]
    held = flow.ancestors([*values, *operands])
    for v in others:
        if largest(flow, flow.ancestors([v], stop=held)) <= what.limit:
            sources[id(v)] = _whole(v, "reduction", what)
        else:
            sources[id(v)] = _tail(flow, v, held, "fallback", math.inf, what)
    needed = held | flow.ancestors(
        x for source in sources.values() for x in source.operands
    )
    return Plan(
        flow,
        consts,
        tuple(wanted),
        needed,
        sources,
        tuple(_plan_loop(flow, eqn, out, needed, what) for eqn, out in loops.values()),
    )


def run(
    plan: Plan, env: dict[Any, Any], weight: jax.Array, what: Summation
) -> list[list[jax.Array]]:
    """Returns, per wanted variable, its sums of powers; adds values to `env`."""
    env.update(zip(plan.flow.jaxpr.constvars, plan.consts, strict=True))
    sums: dict[int, list[jax.Array]] = {}
    loops = {id(loop.eqn): loop for loop in plan.loops}
    for eqn in plan.flow.jaxpr.eqns:
        if id(eqn) in loops:
            outputs, found = _run_loop(loops[id(eqn)], plan.needed, env, weight, what)
            env.update(outputs)
            sums.update(found)
        else:
            evaluate([eqn], env, plan.needed)
    for key, source in plan.sources.items():
        operands = [read(env, x) for x in source.operands]
        (sums[key],) = reduced(source.reduce, what.axes)(weight, *operands)
    return [_moved(plan.flow, v, sums, env, what.powers) for v in plan.wanted]


# Moves: what powers and sums over examples pass through.


MAY_MOVE = frozenset([*MOVES, "pad", "mul", "div", "dynamic_update_slice"])


def _entries(v):
    return math.prod(jnp.shape(v.val)) if isinstance(v, Literal) else size(v)


def _moved_operand(flow, eqn):
    """Returns the index of the operand that the equation moves; None if it does not."""
    if eqn is None or eqn.primitive.name not in MAY_MOVE:
        return None
    name = eqn.primitive.name
    varying = [i for i, v in enumerate(eqn.invars) if flow.varies(v)]
    if len(varying) != 1:
        return None
    (i,) = varying
    moves = (
        name in MOVES
        or (name == "pad" and i == 0 and flow.is_zero(eqn.invars[1]))
        or name == "mul"
        or (name == "div" and i == 0)
        or (name == "dynamic_update_slice" and i == 1 and flow.is_zero(eqn.invars[0]))
    )
    # (re + i im)^2 is not re^2 + im^2: nothing complex on either side.
    real = all(_is_real(v) for v in (eqn.invars[i], *eqn.outvars))
    return i if moves and real else None


def _is_real(v):
    return jnp.issubdtype(v.aval.dtype, jnp.floating)


def _is_disjoint_sum(flow, v):
    """Tells whether `v` adds terms that are nonzero on boxes which do not overlap."""
    boxes = []
    for term in flow.summands(v):
        eqn = flow.made_by(term)
        if (
            eqn is None
            or eqn.primitive.name != "pad"
            or not flow.is_zero(eqn.invars[1])
        ):
            return False
        config = eqn.params["padding_config"]
        if any(low < 0 or high < 0 or hole for low, high, hole in config):
            return False
        shape = eqn.outvars[0].aval.shape
        boxes.append(
            [(low, n - high) for (low, high, _), n in zip(config, shape, strict=True)]
        )
    return len(boxes) > 1 and all(
        any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(box, other, strict=True))
        for k, box in enumerate(boxes)
        for other in boxes[:k]
    )


def _parts(flow: Dataflow, v: Any) -> tuple[Any, int | None, Sequence[Any]]:
    """Returns the equation that moves entries into `v`, and where it takes them from.

    The index is that of the operand moved, None if there are several. There are no
    operands if `v` is not moved from anything.
    """
    eqn = flow.made_by(v)
    i = _moved_operand(flow, eqn)
    if i is not None:
        return eqn, i, [eqn.invars[i]]
    if eqn is None or not flow.varies(v) or not _is_real(v):
        return None, None, []
    if eqn.primitive.name == "concatenate":
        return eqn, None, eqn.invars
    if _is_disjoint_sum(flow, v):
        return None, None, flow.summands(v)
    return None, None, []


def _origins(flow: Dataflow, v: Any) -> tuple[list[Any], list[Any]]:
    """Returns the variables that `v` is moved from, and those the moves read."""
    eqn, i, parts = _parts(flow, v)
    if not parts:
        return [v], []
    bases, read_by_moves = [], []
    if i is not None:
        read_by_moves += [x for j, x in enumerate(eqn.invars) if j != i]
    for x in parts:
        more_bases, more_read = _origins(flow, x)
        bases += more_bases
        read_by_moves += more_read
    return bases, read_by_moves


def _moved(flow, v, sums, env, powers) -> list[Any]:
    """Returns the sums of powers of `v` from those of what it is moved from."""
    eqn, i, parts = _parts(flow, v)
    if not parts:
        return sums[id(v)]
    inner = [_moved(flow, x, sums, env, powers) for x in parts]
    if i is not None:
        return [
            _move(eqn, i, v, s, p, env) for s, p in zip(inner[0], powers, strict=True)
        ]
    if eqn is None:
        return [sum(terms) for terms in zip(*inner, strict=True)]
    dtype = widened(v.aval.dtype)
    return [
        bind(eqn, [s.astype(dtype) for s in row])[0] for row in zip(*inner, strict=True)
    ]


def _move(eqn, i, v, s, p, env):
    name = eqn.primitive.name
    if name == "convert_element_type":
        return s.astype(widened(jnp.promote_types(s.dtype, v.aval.dtype)))
    if name == "neg":
        return -s if p % 2 else s
    others = [jnp.asarray(read(env, x)) for j, x in enumerate(eqn.invars) if j != i]
    others = [
        x.astype(s.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in others
    ]
    if name in ("mul", "div"):
        factor = power(others[0], p)
        return s * factor if name == "mul" else s / factor
    operands = [*others[:i], s, *others[i:]]
    return bind(eqn, operands)[eqn.outvars.index(v)]


# Sources: what is computed for each example.


def _whole(v, rule, what):
    """Powers of a value that the program holds for all examples anyway."""
    return Source(rule, 1.0, (v,), looped(lambda x: [x], [v.aval], what.powers, None))


def _contraction(flow, v, what):
    """Returns the rule for a sum of contractions; None if `v` is anything else."""
    tail, operands = [], []
    pending = [v]
    while pending:
        x = pending.pop()
        if x in tail or x in operands:
            continue
        eqn = flow.made_by(x)
        if not flow.varies(x):
            operands.append(x)
        elif eqn is None:
            return None
        elif len(flow.summands(x)) > 1 or (
            len(eqn.outvars) == 1 and _moved_operand(flow, eqn) is not None
        ):
            tail.append(x)
            pending += eqn.invars
        elif eqn.primitive.name in CONTRACTIONS:
            tail.append(x)
            operands += [y for y in eqn.invars if y not in operands]
        else:
            return None
    kinds = [flow.made_by(x) for x in tail]
    if len(tail) > 1:
        kinds = [e.primitive.name for e in kinds]
        found = [CONTRACTIONS[name] for name in kinds if name in CONTRACTIONS]
        rule = " + ".join(dict.fromkeys(found))
        return _tail(flow, v, operands, rule, 1.0 + 1.0 / len(found), what)
    (eqn,) = kinds
    name = eqn.primitive.name
    if name == "dot_general":
        shape = eqn.invars[0].aval.shape
        n = math.prod(shape[d] for d in eqn.params["dimension_numbers"][0][0])
        if n == 1:
            reduce = outer_product(eqn, what.powers)
            return Source("outer product", 1.0, tuple(eqn.invars), reduce)
        return _tail(flow, v, operands, "shared dense", 1 + 1 / max(n, 1), what)
    if name == "scatter-add":
        numbers = eqn.params["dimension_numbers"]
        indexed = numbers.scatter_dims_to_operand_dims
        full = [n for d, n in enumerate(v.aval.shape) if d not in indexed]
        window = [eqn.invars[2].aval.shape[d] for d in numbers.update_window_dims]
        if (
            flow.is_zero(eqn.invars[0])
            and tuple(sorted(indexed)) == tuple(numbers.inserted_window_dims)
            and not numbers.operand_batching_dims
            and window == full
        ):
            reduce = scattered_rows(eqn, what.powers)
            return Source("embedding", 1.0, tuple(eqn.invars[1:]), reduce)
        return _tail(flow, v, operands, "embedding", 2.0, what)
    rhs = eqn.invars[1].aval.shape
    spec = eqn.params["dimension_numbers"].rhs_spec
    n = math.prod(rhs[d] for d in spec[1:])
    return _tail(flow, v, operands, "convolution", 1 + 1 / max(n, 1), what)


def _tail(flow, v, stop, rule, cost, what):
    """Evaluates the program from `stop` to `v`, a few examples at a time."""
    inside = {x for x in flow.ancestors([v], stop=stop) if flow.varies(x)}
    eqns = flow.equations(inside)
    made = {x for e in eqns for x in e.outvars}
    operands = tuple(
        dict.fromkeys(
            x
            for e in eqns
            for x in e.invars
            if not isinstance(x, Literal) and x not in made
        )
    )
    dtype = widened(v.aval.dtype)

    def fn(*values):
        env = dict(zip(operands, values, strict=True))
        for e in eqns:
            inputs = [read(env, x) for x in e.invars]
            env.update(zip(e.outvars, _evaluate_tail(e, inputs, v, dtype), strict=True))
        return [env[v]]

    held = sum(_working_size(e) for e in eqns) * dtype.itemsize
    products = any(e.primitive.name in CONTRACTIONS for e in eqns)
    steps = Steps(held, what.chunk_bytes, what.devices, apart=products)
    reduce = looped(fn, [v.aval], what.powers, steps)
    return Source(rule, cost, operands, reduce, held)


def _evaluate_tail(eqn, inputs, v, dtype):
    name = eqn.primitive.name
    if name == "conv_general_dilated" and eqn.params["feature_group_count"] == 1:
        y = convolution_as_product(eqn, *inputs)
    elif name == "dot_general" and eqn.outvars[0] is v:
        params = eqn.params
        a, g = inputs
        y = lax.dot_general(
            a,
            g,
            params["dimension_numbers"],
            precision=precision_of(eqn),
            preferred_element_type=dtype,
        )
    else:
        return bind(eqn, inputs)
    return [y if eqn.outvars[0] is v else y.astype(eqn.outvars[0].aval.dtype)]


def _working_size(eqn):
    """Entries that the equation writes, windows of a convolution included."""
    written = sum(size(x) for x in eqn.outvars)
    if eqn.primitive.name != "conv_general_dilated":
        return written
    spec = eqn.params["dimension_numbers"]
    taps = math.prod(eqn.outvars[0].aval.shape[d] for d in spec.out_spec[2:])
    rows = math.prod(eqn.invars[1].aval.shape[d] for d in spec.rhs_spec[1:])
    return written + taps * rows * eqn.invars[0].aval.shape[spec.lhs_spec[0]]


# Loops over layers.


def _is_stacked(eqn, v):
    return (
        eqn is not None
        and eqn.primitive.name == "scan"
        and eqn.outvars.index(v) >= loop_counts(eqn)[1]
    )


def _plan_loop(flow, eqn, outputs, needed, what):
    jaxpr, consts = body_of(eqn)
    _, n_carry = loop_counts(eqn)
    values = [
        x
        for k, x in enumerate(jaxpr.outvars)
        if k < n_carry or eqn.outvars[k] in needed
    ]
    wanted = [jaxpr.outvars[k] for k in outputs]
    plan = make_plan(loop_flow(flow, eqn), consts, wanted, values, what)
    return Loop(eqn, plan, tuple(outputs))


def _run_loop(loop, needed, env, weight, what):
    eqn, plan = loop.eqn, loop.plan
    n_consts, n_carry = loop_counts(eqn)
    operands = [read(env, v) for v in eqn.invars]
    consts, carry = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    jaxpr = plan.flow.jaxpr
    kept = [k for k in range(n_carry, len(eqn.outvars)) if eqn.outvars[k] in needed]

    def step(carry, x):
        inner = dict(zip(jaxpr.invars, [*consts, *carry, *x], strict=True))
        sums = run(plan, inner, weight, what)
        out = [read(inner, v) for v in jaxpr.outvars[:n_carry]]
        return out, ([read(inner, jaxpr.outvars[k]) for k in kept], sums)

    carry, (stacks, sums) = lax.scan(
        step,
        carry,
        operands[n_consts + n_carry :],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    values = dict(zip(eqn.outvars[:n_carry], carry, strict=True))
    values |= {eqn.outvars[k]: y for k, y in zip(kept, stacks, strict=True)}
    return values, {
        id(eqn.outvars[k]): s for k, s in zip(loop.outputs, sums, strict=True)
    }

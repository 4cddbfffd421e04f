"""How each gradient of a program becomes a sum of powers over examples.

A gradient is a few moves of entries (transpositions, concatenations, ...), through
which a power passes, over *sources*: matrix products, convolutions, and so on. Each
source gets the cheapest rule that sums its powers without stacking it over examples.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import Literal

from fsam_optax._common.norms import widen
from fsam_optax._engine.branches import (
    Branching,
    is_common_choice,
    plan_branches,
    run_branches,
)
from fsam_optax._engine.canonical import bound
from fsam_optax._engine.counts import ways_to_count
from fsam_optax._engine.jaxpr import (
    Dataflow,
    evaluate,
    largest,
    largest_before,
    read,
    size,
)
from fsam_optax._engine.layers import is_stacked, Loop, plan_loop, run_loop
from fsam_optax._engine.moves import Moved, moved
from fsam_optax._engine.operation import reduced_together
from fsam_optax._engine.report import Used
from fsam_optax._engine.rules import chosen, fallback, joined, reduction
from fsam_optax._engine.sources import (
    held_by_gradient,
    loop_work,
    maps_weight,
    own_work,
    parameter_side,
    Site,
    Source,
    Summation,
)


@dataclass(frozen=True)
class Plan:
    """How to evaluate a program whose wanted outputs are sums of powers.

    Attributes:
        flow: The program.
        consts: Its constants.
        wanted: What the sums of powers are wanted of.
        needed: The variables to evaluate for each example.
        sources: The rule for each source of the wanted values, by its key, and what the
            gradient itself costs there.
        inner: The loops and choices that some sources come out of.
        scaling: By wanted value, the operations for each example of a batch by which
            its entries are scaled, once for all.
    """

    flow: Dataflow
    consts: Sequence[Any]
    wanted: tuple[Moved, ...]
    needed: set[Any]
    sources: dict[tuple[int, ...], tuple[Source, float]]
    inner: tuple[Loop | Branching, ...]
    scaling: tuple[float, ...]

    def rules(self, k: int) -> list[Used]:
        """Returns the rules of the k-th wanted value."""
        found = []
        # One that several parts are moved from is formed once.
        for base in {base.key: base for base in self.wanted[k].sources()}.values():
            if base.key in self.sources:
                source, own = self.sources[base.key]
                counted = source.work - source.waits
                found.append(Used(source.rule, counted, own, source.note))
                continue
            (v,) = base.terms
            part = next(x for x in self.inner if v in x.eqn.outvars)
            i = part.outputs.index(part.eqn.outvars.index(v))
            # Of several branches the one of the most work.
            inner = max(
                (plan.rules(i) for plan in part.plans),
                key=lambda rules: sum(x.work for x in rules),
            )
            steps = part.eqn.params.get("length", 1)
            found += [x._replace(work=x.work * steps, own=x.own * steps) for x in inner]
        first, *rest = found
        return [first._replace(work=first.work + self.scaling[k]), *rest]


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
    values = list(values)
    inside = parameter_side(flow, wanted) - {
        v for v in values if not isinstance(v, Literal)
    }
    before = largest_before(flow)

    def formed(v):
        """Tells of a sum of cotangents whether the backward pass reads it too."""
        return v not in inside and before[v] <= what.limit

    origins = [moved(flow, [v], formed) for v in wanted]
    bases = {base.key: base for origin in origins for base in origin.sources()}
    sources: dict[tuple[int, ...], Source] = {}
    several = {base.key for x in origins if not x.uniform for base in x.sources()}
    whats = {
        key: dataclasses.replace(what, uniform=what.uniform and key not in several)
        for key in bases
    }
    sites = {
        key: Site(flow, base.terms, whats[key], inside, before)
        for key, base in bases.items()
    }
    maps = {id(e) for e in flow.jaxpr.eqns if maps_weight(flow, e, inside)}
    parts, others = {}, []
    for key, site in sites.items():
        v, *more = site.terms
        eqn = flow.made_by(v)
        stacked = is_stacked(eqn, v) and id(eqn) not in maps
        formed_inside = stacked or (
            is_common_choice(flow, eqn)
            and all(site.is_small(x) for x in eqn.invars if flow.varies(x))
        )
        if not more and flow.varies(v) and formed_inside:
            parts.setdefault(id(eqn), (eqn, []))[1].append(eqn.outvars.index(v))
        elif (source := chosen(site)) is not None:
            sources[key] = source
        else:
            others.append(key)
    if others:
        # Nothing less than what the gradient of the batch holds would do.
        most, _ = held_by_gradient(flow, inside, what.limit)
        for key in others:
            wider = dataclasses.replace(whats[key], limit=most)
            sites[key] = dataclasses.replace(sites[key], what=wider)
        found = {key: chosen(sites[key]) for key in others}
        sources |= {key: source for key, source in found.items() if source is not None}
        others = [key for key in others if key not in sources]

    operands = [x for origin in origins for x in origin.all_reads()]
    operands += [x for source in sources.values() for x in source.operands]
    operands += [x for eqn, _ in parts.values() for x in eqn.invars]
    held = flow.ancestors([*values, *operands])
    for key, site in sites.items():
        if key not in sources and key not in others:
            continue
        best = sources.get(key)
        arising = largest(flow, flow.ancestors(site.terms, stop=held))
        small = reduction(site, held, arising)
        # Loops over examples hold less and are faster than products in batches.
        if small is not None and (best is None or small.work < best.work / 2):
            best = small
        sources[key] = best if best is not None else fallback(site, held)
    if not what.by_example:
        sources = joined(sites, sources)
    needed = held | flow.ancestors(
        x for source in sources.values() for x in source.operands
    )

    reached = {key: sites[key] for key in sources}
    own, loops = own_work(reached), loop_work(reached, sources, needed)

    def inner(eqn, outputs):
        uniform = all(whats[id(eqn.outvars[k]),].uniform for k in outputs)
        within = dataclasses.replace(what, uniform=uniform)
        plan = functools.partial(make_plan, what=within)
        planned = plan_branches if is_common_choice(flow, eqn) else plan_loop
        return planned(flow, eqn, outputs, needed, plan)

    return Plan(
        flow,
        consts,
        tuple(origins),
        needed,
        {
            key: (dataclasses.replace(source, work=source.work + loops[key]), own[key])
            for key, source in sources.items()
        },
        tuple(inner(eqn, outputs) for eqn, outputs in parts.values()),
        tuple(origin.work() / what.examples for origin in origins),
    )


def run(
    plan: Plan,
    env: dict[Any, Any],
    weight: jax.Array,
    what: Summation,
    counts: Sequence[Sequence[Any]] | None = None,
) -> list[list[jax.Array]]:
    """Returns, per wanted variable, its sums of powers; adds values to `env`.

    By example, what its squares sum up to: once for each way to count its entries.
    """
    env.update(zip(plan.flow.jaxpr.constvars, plan.consts, strict=True))
    asked = None if counts is None else ways_to_count(plan, env, counts)
    sums: dict[tuple[int, ...], list[jax.Array]] = {}
    parts = {id(part.eqn): part for part in plan.inner}
    for eqn in plan.flow.jaxpr.eqns:
        if (part := parts.get(id(eqn))) is not None:
            inner = functools.partial(run, weight=weight, what=what)
            ways = None if asked is None else asked.of_part(part)
            if isinstance(part, Branching):
                inner = functools.partial(inner, counts=ways)
                values, found = run_branches(part, plan.needed, env, inner)
            else:
                values, found = run_loop(
                    part, plan.needed, env, inner, weight, what, ways
                )
            env.update(values)
            sums.update({(id(v),): s for v, s in found.items()})
        else:
            evaluate([eqn], env, plan.needed, bound)
    # By call, as several sources may share one, and all at once: an operation takes
    # longer to be traced than most rules.
    calls: dict[Any, tuple[Any, list[Any]]] = {}
    for key, (source, _) in plan.sources.items():
        if asked is not None:
            operands = _operands(source, env)
            ks = asked.of_source(key, source, env)
            calls[key] = functools.partial(source.reduce, len(ks)), [*ks, *operands]
        elif _call(source) not in calls:
            calls[_call(source)] = source.reduce, _operands(source, env)
    reductions = reduced_together(calls, weight, what.axes, summed=asked is None)
    for key, (source, _) in plan.sources.items():
        if asked is not None:
            sums[key] = reductions[key]
            continue
        found = reductions[_call(source)][source.part]
        if source.finish is not None:
            found = [
                source.finish(s, p, env)
                for s, p in zip(found, what.powers, strict=True)
            ]
        sums[key] = found
    if asked is not None:
        return asked.totals(sums)
    return [origin.sums(sums, env, what.powers) for origin in plan.wanted]


def _call(source):
    """Returns what tells the call of a rule from others."""
    operands = map(id, source.operands)
    return id(source.reduce), id(source.prepare), *operands


def _operands(source, env):
    """Returns the values that a rule reduces."""
    values = [read(env, x) for x in source.operands]
    return values if source.prepare is None else source.prepare(*values)


def most_held(plan: Plan) -> int:
    """Returns the most bytes that a rule holds for one example and cotangent."""
    here = [source.held for source, _ in plan.sources.values()]
    inside = [most_held(inner) for part in plan.inner for inner in part.plans]
    return max([*here, *inside], default=0)


def bytes_at_once(plan: Plan) -> int:
    """Returns the bytes of the sums that no loop over examples adds up."""
    bases = {base.key: base for x in plan.wanted for base in x.sources()}
    found = sum(
        size(bases[key].terms[0]) * widen(bases[key].terms[0].aval.dtype).itemsize
        for key, (source, _) in plan.sources.items()
        if source.held == 0
    )
    for part in plan.inner:
        length = part.eqn.params.get("length", 1)
        found += length * sum(map(bytes_at_once, part.plans))
    return found

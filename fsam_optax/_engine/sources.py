"""What is summed, and the sources that sums of powers come from."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Literal

from fsam_optax._engine.jaxpr import (
    Dataflow,
    is_product,
    loop_counts,
    loop_flow,
    size,
)
from fsam_optax._engine.primitives import (
    BARRIER,
    BRANCHES,
    CONTRACTIONS,
    holds_numbers,
    LINEAR_MOVES,
    LOOP,
    name_of,
    SUMS,
)
from fsam_optax._engine.work import operations


DEFAULT_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Summation:
    """What is summed, and over what.

    Attributes:
        powers: The powers.
        chunk_bytes: Bytes that a step of a loop over examples or cotangents may hold on
            a device; None for what suits the platform.
        examples: How many examples each device has.
        axes: How many axes the library maps over.
        limit: Size of the largest array that the model itself takes for an example. A
            larger one in the backward pass is the gradient of a parameter.
        by_example: Whether the squares of each example are summed over its entries, for
            its norm, instead of over the examples.
        uniform: Whether all entries count the same then.
        residuals: Bytes of an example that a gradient keeps for its backward pass.
    """

    powers: tuple[int, ...]
    chunk_bytes: int | None
    examples: int
    axes: int = 1
    limit: int = 1
    by_example: bool = False
    uniform: bool = True
    residuals: int = 0

    @property
    def budget(self) -> int:
        """Returns the bytes that a step of a loop over examples may hold on a device.

        Where a gradient holds much more than 64 MiB, steps of them would be so many
        that a GPU spends its time on starting them.
        """
        if self.chunk_bytes is not None:
            return self.chunk_bytes
        return max(DEFAULT_CHUNK_BYTES, self.examples * self.residuals // 16)

    @property
    def per_entry(self) -> float:
        """Returns the operations that raise an entry to its powers and sum them up."""
        if self.by_example:
            return 2.0
        return float(sum(p.bit_length() + 1 for p in self.powers))


@dataclass(frozen=True)
class Source:
    """A value of one example, and how its powers are summed over examples.

    Attributes:
        rule: Name of the rule, for the report.
        work: Operations for one example.
        operands: The variables that the rule reads.
        reduce: The rule, see `sums`, and `squares` for sums by example.
        held: Bytes that it holds for one example and cotangent at a time.
        prepare: Maps the values of the operands, for one example, to those that the
            rule reduces; None if they are the same.
        finish: Maps the sums of p-th powers, p and the values of the program to the
            sums of the source; None if they are the same.
        like: Shape and dtype of the sums that `finish` takes.
        keeps: Whether `finish` does no more than rearrange them.
        note: Why it is a fallback.
        part: Which of the values that the rule reduces it is; sources of the same rule
            share what it computes.
        waits: How much of the work stands for the time that large arrays take to be
            written, and is no operation.
    """

    rule: str
    work: float
    operands: tuple[Any, ...]
    reduce: Any
    held: int = 0
    prepare: Callable[..., list[Any]] | None = None
    finish: Callable[[Any, int, dict[Any, Any]], Any] | None = None
    like: Any = None
    keeps: bool = False
    note: str = ""
    part: int = 0
    waits: float = 0.0


@dataclass(frozen=True)
class Site:
    """A sum of variables whose powers are to be summed over examples.

    Attributes:
        flow: The program.
        terms: The variables.
        what: What is summed.
        inside: The variables that lead to gradients by constant linear maps alone; see
            `parameter_side`.
        before: By variable, the size of the largest array on the way to it.
    """

    flow: Dataflow
    terms: tuple[Any, ...]
    what: Summation
    inside: set[Any]
    before: dict[Any, int]

    @property
    def like(self) -> Any:
        """Returns the shape and dtype of the sum."""
        return self.terms[0].aval

    def is_small(self, v: Any) -> bool:
        """Tells whether no array larger than the activations leads to a variable."""
        return self.before.get(v, 1) <= self.what.limit

    def region(self) -> list[Any]:
        """Returns the equations by which the sum is a linear map of what varies."""
        found: set[Any] = set()
        pending = list(self.terms)
        while pending:
            v = pending.pop()
            if not isinstance(v, Literal) and v in self.inside and v not in found:
                found.add(v)
                eqn = self.flow.made_by(v)
                pending += eqn.invars if eqn is not None else ()
        return self.flow.equations(found)

    def runs_anyway(self, eqn: Any) -> bool:
        """Tells whether an equation is a loop that runs whatever is made of it."""
        return name_of(eqn) == LOOP and not any(
            v in self.inside for v in eqn.invars if not isinstance(v, Literal)
        )

    def own_work(self) -> float:
        """Returns the operations of the gradient itself, for each example of a batch.

        See `own_work` for those of several.
        """
        return own_work({0: self})[0]


def own_work(sites: Mapping[Any, Site]) -> dict[Any, float]:
    """Returns the operations of gradients, for each example of a batch.

    The gradient of a batch is summed over examples where constant linear maps begin, so
    that the examples share these; and gradients share what they are made of.

    Args:
        sites: The gradients.
    """
    regions = {key: site.region() for key, site in sites.items()}
    users = Counter(id(e) for region in regions.values() for e in region)
    found = {}
    for key, site in sites.items():
        made = {v for e in regions[key] for v in e.outvars}
        work = float(
            sum(size(v) for v in site.terms if isinstance(v, Literal) or v not in made)
        )
        for e in regions[key]:
            given = [v for v in e.invars if not isinstance(v, Literal)]
            if any(v in site.inside for v in given):
                each = operations(e) / site.what.examples
            elif name_of(e) in CONTRACTIONS:
                each = operations(e)
            elif site.runs_anyway(e):
                mapping, adding = _within(site.flow, e, site.inside)
                each = mapping / site.what.examples + adding
            else:
                each = operations(e) + sum(map(size, e.outvars))
            work += each / users[id(e)]
        found[key] = max(work, 1.0)
    return found


def loop_work(
    sites: Mapping[Any, Site], sources: Mapping[Any, Source], needed: set[Any]
) -> dict[Any, float]:
    """Returns the operations for each example in loops that run anyway.

    The gradient of the batch takes the sum of the examples through what is a linear map
    for all in such a loop, and squares take each. A source that does not read what the
    loop returns runs it once more.

    Args:
        sites: The gradients.
        sources: Their sources.
        needed: The variables that are evaluated for each example.
    """
    loops: dict[int, tuple[Any, Site, list[Any]]] = {}
    for key, site in sites.items():
        for e in site.region():
            if site.runs_anyway(e):
                loops.setdefault(id(e), (e, site, []))[-1].append(key)
    found = dict.fromkeys(sites, 0.0)
    for e, site, users in loops.values():
        runs = {0} if any(v in needed for v in e.outvars) else set()
        for key in users:
            stop, terms = sources[key].operands, sites[key].terms
            if not site.flow.ancestors(terms, stop=stop).isdisjoint(e.outvars):
                runs.add(id(sources[key].reduce))
        mapping, _ = _within(site.flow, e, site.inside)
        work = mapping + max(len(runs) - 1, 0) * operations(e)
        for key in users:
            found[key] += work / len(users)
    return found


def _within(flow, eqn, inside):
    """Returns the operations by which a loop maps gradients, and adds them up.

    It does so to their sum over the examples, and adds up those of each.
    """
    body, within = _inside(flow, eqn, inside)
    pairs = zip(eqn.outvars, body.jaxpr.outvars, strict=True)
    ends = sum(size(v) for v, x in pairs if v in inside and x not in within)
    mapping, adding = 0.0, 0.0
    for e in body.jaxpr.eqns:
        if any(v in within for v in e.invars if not isinstance(v, Literal)):
            mapping += operations(e)
        elif name_of(e) == LOOP and any(map(body.varies, e.invars)):
            more = _within(body, e, within)
            mapping, adding = mapping + more[0], adding + more[1]
        elif name_of(e) not in CONTRACTIONS:
            adding += sum(size(v) for v in e.outvars if v in within)
    length = eqn.params["length"]
    return length * mapping, length * adding + ends


def parameter_side(flow: Dataflow, wanted: Iterable[Any]) -> set[Any]:
    """Returns the variables that lead to the wanted ones by linear maps alone.

    By maps that are the same for all examples, and to nothing else.
    """
    found = {v for v in wanted if flow.varies(v)}
    outside = {
        v for v in flow.jaxpr.outvars if not isinstance(v, Literal) and v not in found
    }
    for eqn in reversed(flow.jaxpr.eqns):
        varying = [v for v in eqn.invars if flow.varies(v)]
        used = [v for v in eqn.outvars if v in flow.uses]
        if all(v in found and v not in outside for v in used) and is_linear(flow, eqn):
            found.update(varying)
        else:
            outside.update(varying)
    return found - outside


def is_linear(flow: Dataflow, eqn: Any) -> bool:
    """Tells whether an equation is a linear map that all examples share."""
    linear = LINEAR_MAPS.get(name_of(eqn))
    if linear is not None:
        varies = [flow.varies(v) for v in eqn.invars]
        # Rounded to whole numbers it is not linear, nor with what fills it up.
        rounded = len(eqn.outvars) == 1 and not holds_numbers(eqn.outvars[0])
        filled = eqn.params.get("fill_value") not in (None, 0)
        return linear(varies) and not rounded and not filled
    if name_of(eqn) == BRANCHES:
        inner = [] if flow.varies(eqn.invars[0]) else _branches(flow, eqn)
        return bool(inner) and all(is_linear(*x) for xs in inner for x in xs)
    return name_of(eqn) == LOOP and linear_loop(flow, eqn)


def _branches(flow, eqn):
    """Returns, for each branch, what varies in it: its dataflow, and an equation."""
    found = []
    for closed in eqn.params["branches"]:
        given = zip(closed.jaxpr.invars, eqn.invars[1:], strict=True)
        inner = Dataflow(closed.jaxpr, (x for x, v in given if flow.varies(v)))
        found.append(_varying(inner))
    return found


def _varying(flow):
    eqns = flow.jaxpr.eqns
    return [(flow, eqn) for eqn in eqns if any(map(flow.varies, eqn.invars))]


def held_by_gradient(
    flow: Dataflow, inside: set[Any], limit: int
) -> tuple[int, set[Any]]:
    """Returns the size of the largest array that the gradient of a batch holds.

    For each example: what is no linear map that the examples share is not summed over
    them before. What products and branches yield does not count, nor what is made of
    it: behind a linear map that is not known as one it is the gradient of a weight.
    That is the second result.

    Args:
        flow: The program.
        inside: See `parameter_side`.
        limit: Size of the largest array that the model itself takes.
    """
    most, products = limit, set()
    for eqn in flow.jaxpr.eqns:
        varying = [v for v in eqn.invars if flow.varies(v)]
        made = [v for v in eqn.outvars if flow.varies(v) and size(v) > limit]
        name = name_of(eqn)
        forms = name == BRANCHES or (name in CONTRACTIONS and len(varying) > 1)
        if forms or not products.isdisjoint(varying):
            products.update(made)
        elif name == LOOP and varying:
            body, within = _inside(flow, eqn, inside)
            here, formed = held_by_gradient(body, within, limit)
            most = max(most, here)
            for v, x in zip(eqn.outvars, body.jaxpr.outvars, strict=True):
                if v in made and (x in formed or is_product(body, x)):
                    products.add(v)
        else:
            summed = inside if is_linear(flow, eqn) else ()
            made = [v for v in made if v not in summed and holds_numbers(v)]
            most = max([most, *map(size, made)])
    return most, products


def _inside(flow, eqn, inside):
    """Returns the dataflow of the body of a loop, and its parameter side."""
    body = loop_flow(flow, eqn)
    n_consts, n_carry = loop_counts(eqn)
    inputs, outputs = body.jaxpr.invars[n_consts:], body.jaxpr.outvars
    unused = {k for k, v in enumerate(eqn.outvars) if v not in flow.uses}
    wanted = unused | {k for k, v in enumerate(eqn.outvars) if v in inside}
    while True:
        found = parameter_side(body, [outputs[k] for k in wanted])
        # What else reads a carry reads it as it is for each example.
        kept = {
            k
            for k in wanted
            if k >= n_carry or not body.varies(inputs[k]) or inputs[k] in found
        }
        if kept == wanted:
            return body, found
        wanted = kept


def maps_weight(flow: Dataflow, eqn: Any, inside: set[Any]) -> bool:
    """Tells whether an equation is a loop that maps the gradient of a weight.

    Linearly, with products: what such a loop does should not be done for each example.

    Args:
        flow: The program.
        eqn: The equation.
        inside: See `parameter_side`.
    """
    if name_of(eqn) != LOOP:
        return False
    varying = [v for v in eqn.invars if flow.varies(v)]
    if not all(v in inside for v in varying) or not linear_loop(flow, eqn):
        return False
    region = flow.equations(flow.ancestors(varying, stop=flow.varying - inside))
    return any(
        name_of(e) in CONTRACTIONS and not is_linear(flow, e)
        for e in region
        if any(map(flow.varies, e.outvars))
    )


def linear_loop(flow: Dataflow, eqn: Any) -> bool:
    """Tells whether a loop is such a map, and one that multiplies matrices."""
    found = _varying(loop_flow(flow, eqn))
    return any(_multiplies(*x) for x in found) and all(is_linear(*x) for x in found)


def _multiplies(flow, eqn):
    """Tells whether matrices are multiplied, be it in a branch."""
    if name_of(eqn) != BRANCHES:
        return name_of(eqn) in CONTRACTIONS
    return any(_multiplies(*x) for xs in _branches(flow, eqn) for x in xs)


def _one(varies):
    return sum(varies) == 1


def _any(varies):
    del varies
    return True


def _first(varies):
    return not any(varies[1:])


def _last(varies):
    return not any(varies[:-1])


PARTS_OF_NUMBERS = ("real", "imag", "complex", "conj")
# Linear maps, and which of the operands may differ between examples.
LINEAR_MAPS: dict[str, Callable[[list[bool]], bool]] = (
    dict.fromkeys((*LINEAR_MOVES, *SUMS, "sub", "concatenate", *PARTS_OF_NUMBERS), _any)
    | dict.fromkeys(("mul", "dot_general", "conv_general_dilated"), _one)
    | dict.fromkeys(
        ("div", "gather", "pad", "dynamic_slice", "reduce_sum", "cumsum", "fft"), _first
    )
    | {
        BARRIER: lambda varies: len(varies) == 1,
        "select_n": lambda varies: not varies[0],
        "bcoo_extract": _last,
        "scatter-add": _last,
        "triangular_solve": _last,
        "reduce_window_sum": _first,
        "dynamic_update_slice": lambda varies: not any(varies[2:]),
    }
)

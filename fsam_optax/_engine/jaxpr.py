"""Programs as jaxprs: their dataflow and their evaluation.

The only module that knows how a jaxpr is laid out. It touches the public part of it:
equations with a primitive, parameters, inputs and outputs.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, Literal

from fsam_optax._engine.primitives import (
    BARRIER,
    CALLS,
    CONTRACTIONS,
    holds_numbers,
    KEEPS_ZEROS,
    LOOP,
    name_of,
    PLATFORM,
    REMATERIALISED,
    SCATTER,
    SUMS,
    VARY,
)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation; returns the list of its outputs."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def bind_in(dtype: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation with its floating-point operands in another dtype."""
    values = [
        x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in values
    ]
    if name_of(eqn) == SCATTER:  # Its parameters hold a sum in its own dtype.
        zeros, index, rows = values
        numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
        return [lax.scatter_add(zeros, index, rows, numbers, mode=mode)]
    return bind(eqn, values)


def as_function(closed: Any) -> Callable[..., list[jax.Array]]:
    """Returns a program as a function to arrays; jax 0.7 has numbers among them."""
    run = jaxpr_as_fun(closed)
    return lambda *operands: [jnp.asarray(x) for x in run(*operands)]


def body_of(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """Returns the jaxpr that the equation runs, and its constants."""
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def followed(first: Any, second: Any) -> Any:
    """Returns the program of one and then another, which takes its results first.

    Args:
        first: A closed jaxpr.
        second: A closed jaxpr of the results of the first and further inputs.
    """
    before, then = first.jaxpr, second.jaxpr
    n = len(before.outvars)
    names = dict(zip(then.invars[:n], before.outvars, strict=True))

    def named(variables):
        return [v if isinstance(v, Literal) else names.get(v, v) for v in variables]

    eqns = [eqn.replace(invars=named(eqn.invars)) for eqn in then.eqns]
    jaxpr = then.replace(
        constvars=[*before.constvars, *then.constvars],
        invars=[*before.invars, *then.invars[n:]],
        outvars=named(then.outvars),
        eqns=[*before.eqns, *eqns],
        effects=before.effects | then.effects,
    )
    return ClosedJaxpr(jaxpr, [*first.consts, *second.consts])


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


def is_real(v: Any) -> bool:
    """Tells whether a variable or literal holds real floating-point numbers."""
    return jnp.issubdtype(v.aval.dtype, jnp.floating)


class Dataflow:
    """A flat jaxpr with what depends on what.

    Attributes:
        jaxpr: The jaxpr.
        producer: The equation that produces a variable.
        uses: How often a variable is read.
        varying: The variables that differ from one example to the next.
        readers: The equations that read a variable.
        loop_sizes: By loop, what `arising` found.
    """

    def __init__(
        self, jaxpr: Any, varying: Iterable[Any], known: dict[Any, Any] | None = None
    ):
        """Takes a jaxpr, the inputs that differ between examples, and known values."""
        self.jaxpr = jaxpr
        self._known = {
            v: x for v, x in (known or {}).items() if not isinstance(x, Tracer)
        }
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
            if name_of(eqn) == BARRIER:
                self.varying.update(
                    v for v, b in zip(eqn.outvars, varies, strict=True) if b
                )
            elif any(varies):
                self.varying.update(_varying_outputs(self, eqn))

    def varies(self, v: Any) -> bool:
        """Tells whether the value differs from one example to the next."""
        return not isinstance(v, Literal) and v in self.varying

    def made_by(self, v: Any) -> Any:
        """Returns the equation that produces `v`; None for inputs and literals."""
        return None if isinstance(v, Literal) else self.producer.get(v)

    def place(self, v: Any) -> int:
        """Returns the number of the equation that makes a variable; -1 for none.

        Of the one before where that only changes it.
        """
        while (eqn := self.made_by(v)) is not None:
            operands = [x for x in eqn.invars if not isinstance(x, Literal)]
            if len(operands) != 1:
                return self._order[id(eqn)]
            (v,) = operands
        return -1

    def is_zero(self, v: Any) -> bool:
        """Tells whether the value is known to be all zeros."""
        if isinstance(v, Literal):
            return bool(np.all(np.asarray(v.val) == 0))
        eqn = self.made_by(v)
        return bool(eqn and name_of(eqn) in KEEPS_ZEROS and self.is_zero(eqn.invars[0]))

    def known_value(self, v: Any) -> np.ndarray | None:
        """Returns the value if it can be computed now, from constants alone."""
        if isinstance(v, Literal):
            return np.asarray(v.val)
        if jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key):
            return None  # Nor is what is drawn by it: that is large at times.
        if v not in self._known:
            self._known[v] = None
            eqn = self.made_by(v)
            if name_of(eqn) == VARY:
                self._known[v] = self.known_value(eqn.invars[0])
            elif eqn and name_of(eqn) != PLATFORM and not self.varies(v):
                values = [self.known_value(x) for x in eqn.invars]
                if all(x is not None for x in values):
                    compute = functools.partial(bind, eqn)
                    if name_of(eqn) == LOOP:  # Inside, jax 0.7 cannot compile it.
                        compute = jax.jit(compute).lower(values).compile()
                    with jax.ensure_compile_time_eval():
                        out = [np.asarray(x) for x in compute(values)]
                    self._known.update(zip(eqn.outvars, out, strict=True))
        value = self._known[v]
        return None if value is None else np.asarray(value)

    def ancestors(self, roots: Iterable[Any], stop: Iterable[Any] = ()) -> set[Any]:
        """Returns the variables that `roots` are computed from, and themselves."""
        if not isinstance(stop, set):  # Looked through once, not for each source.
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

    def summands(
        self, v: Any, formed: Callable[[Any], bool] = lambda v: False
    ) -> list[Any]:
        """Returns the terms that `v` is the sum of; itself if it is not a sum.

        Not of a sum that is `formed` anyway.
        """
        terms, pending = [], [v]
        while pending:  # A weight that is used often is a deep sum.
            x = pending.pop()
            eqn = self.made_by(x)
            if (
                eqn is not None
                and name_of(eqn) in SUMS
                and not formed(x)
                and all(y.aval.shape == x.aval.shape for y in eqn.invars)
            ):
                pending += reversed(eqn.invars)
            else:
                terms.append(x)
        return terms


def _varying_outputs(flow, eqn):
    """Returns the outputs that differ, of an equation with an input that does."""
    name = name_of(eqn)
    if name not in (LOOP, *CALLS, *REMATERIALISED):
        return eqn.outvars
    if name == LOOP:
        body = loop_flow(flow, eqn)
    else:
        jaxpr, _ = body_of(eqn)
        given = zip(jaxpr.invars, eqn.invars, strict=True)
        body = Dataflow(jaxpr, (x for x, v in given if flow.varies(v)))
    inner = body.jaxpr.outvars
    return [v for v, x in zip(eqn.outvars, inner, strict=True) if body.varies(x)]


def depends(fn: Callable, *likes: Any) -> bool:
    """Tells whether the outputs of `fn` depend on its operands."""
    jaxpr = jax.make_jaxpr(fn)(*likes).jaxpr
    flow = Dataflow(jaxpr, jaxpr.invars)
    return any(flow.varies(v) for v in jaxpr.outvars)


def most_bytes(fn: Callable, *likes: Any) -> int:
    """Returns the most bytes that arrays made by `fn` take at a time."""
    jaxpr = jax.make_jaxpr(fn)(*likes).jaxpr
    last = {
        v: eqn for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)
    }
    held: dict[Any, int] = {}
    most = 1
    for eqn in jaxpr.eqns:
        held |= {v: size(v) * v.aval.dtype.itemsize for v in eqn.outvars}
        most = max(most, sum(held.values()))
        held = {v: n for v, n in held.items() if v in last and last[v] is not eqn}
    return most


def loop_flow(flow: Dataflow, eqn: Any, knowing: bool = False) -> Dataflow:
    """Returns the dataflow of the body of a loop, with constants known if asked for."""
    jaxpr, _ = body_of(eqn)
    n_consts, n_carry = loop_counts(eqn)
    varies = [flow.varies(v) for v in eqn.invars]
    known = (
        {
            x: value
            for x, v in zip(jaxpr.invars[:n_consts], eqn.invars, strict=False)
            if (value := flow.known_value(v)) is not None
        }
        if knowing
        else {}
    )
    while True:
        body = Dataflow(
            jaxpr, (v for v, b in zip(jaxpr.invars, varies, strict=True) if b), known
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


def laid_out(eqn: Any) -> int:
    """Returns the size of what windows move over, which the transpose has as an array.

    It is larger than what they read and than what they return. 0 for all but windows.
    """
    if not name_of(eqn).startswith("reduce_window"):
        return 0
    p, sizes = eqn.params, []
    for d, n in enumerate(eqn.invars[0].aval.shape):
        n = max(p["base_dilation"][d] * (n - 1) + 1, 0)
        # Read with its padding; going back, with all windows that reach an entry.
        reach = p["window_dilation"][d] * (p["window_dimensions"][d] - 1)
        sizes.append(n + max(sum(p["padding"][d]), reach))
    return math.prod(sizes)


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

    Places and masks do not count: gradients are made of numbers. What a loop stacks
    counts by the step, unless it is a product as the gradient of a weight is.
    """
    eqn = flow.made_by(v)
    if eqn is None or not flow.varies(v) or not holds_numbers(v):
        return 1
    if name_of(eqn) == LOOP and id(eqn) in flow.loop_sizes:
        return flow.loop_sizes[id(eqn)][eqn.outvars.index(v)]
    read_here = max((size(x) for x in eqn.invars if flow.varies(x)), default=0)
    if name_of(eqn) != LOOP:
        return size(v) if size(v) > read_here else 1
    body = loop_flow(flow, eqn)
    sizes = _sizes_by_output(body, eqn)
    for k, (x, y) in enumerate(zip(eqn.outvars, body.jaxpr.outvars, strict=True)):
        if size(x) > max(read_here, sizes[k]) and is_product(body, y):
            sizes[k] = size(x)
    flow.loop_sizes[id(eqn)] = sizes
    return sizes[eqn.outvars.index(v)]


def is_product(flow: Dataflow, v: Any) -> bool:
    """Tells whether a variable is moved from a contraction of what varies."""
    for x in flow.summands(v):
        while (eqn := flow.made_by(x)) is not None:
            varying = [y for y in eqn.invars if flow.varies(y)]
            if name_of(eqn) in CONTRACTIONS and len(varying) > 1:
                return True
            if len(varying) != 1 or name_of(eqn) == LOOP:
                break
            (x,) = varying
    return False


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


def evaluate(
    eqns: Iterable[Any],
    env: dict[Any, Any],
    needed: set[Any],
    bind: Callable[[Any, list[Any]], list[Any]] = bind,
) -> None:
    """Adds the values of the needed variables that `env` does not hold yet."""
    for eqn in eqns:
        if any(v in needed and v not in env for v in eqn.outvars):
            found = bind(eqn, [read(env, v) for v in eqn.invars])
            env.update(zip(eqn.outvars, found, strict=True))


def with_equations(program: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """Returns a program with the equations of one primitive changed, inner ones too.

    But for those in the derivatives that a `jax.custom_vjp` has of its own.
    """

    def changed(eqn):
        if name_of(eqn) == name:
            return change(eqn)
        params = jax.tree.map(
            lambda x: with_equations(x, name, change),
            eqn.params,
            is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr)),
        )
        return eqn.replace(params=params)

    if isinstance(program, Jaxpr):
        return program.replace(eqns=[changed(eqn) for eqn in program.eqns])
    if isinstance(program, ClosedJaxpr):
        return program.replace(jaxpr=with_equations(program.jaxpr, name, change))
    return program

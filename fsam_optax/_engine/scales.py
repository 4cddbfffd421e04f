"""Scales of weights, taken out of products: `x (w s) = (x w) s`.

Where a weight is made by scaling, as by gains or by a norm, the gradients of the scale
and of what it scales are read off `x w`. From the product with the scaled weight they
are another product for each example, which a gradient of the batch does not need.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal

from fsam_optax._engine.jaxpr import (
    bind,
    body_of,
    Dataflow,
    is_real,
    loop_flow,
    read,
    size,
)
from fsam_optax._engine.primitives import (
    CALLS,
    CONVOLUTION,
    LOOP,
    name_of,
    REMATERIALISED,
)


class Scaled(NamedTuple):
    """How a value that is the same for all examples is made by scaling.

    Attributes:
        x: The value before; None for ones.
        scales: `jnp.multiply` or `jnp.divide` and an array with as many axes, not all
            of full size, for each scale in turn.
    """

    x: Any
    scales: tuple[tuple[Callable, Any], ...] = ()


def scaled_after(closed: Any, varies: Sequence[bool], learned: Sequence[bool]) -> Any:
    """Returns a program that scales after its products; the same if nothing does.

    Args:
        closed: A jaxpr that is not differentiated yet.
        varies: Which of its inputs differ between examples.
        learned: Which of its inputs are made from parameters.
    """
    changed: list[Any] = []

    def run(*args):
        found = _run(closed.jaxpr, closed.consts, args, (varies, learned), {}, changed)
        return [x for x, _ in found]

    new = jax.make_jaxpr(run)(*closed.in_avals)
    return new if changed else closed


def _chosen(jaxpr, mark):
    return (v for v, b in zip(jaxpr.invars, mark, strict=True) if b)


def scales_weights(closed: Any, varies: Sequence[bool]) -> bool:
    """Tells whether a program scales anything that is the same for all examples."""
    return _scaled_anywhere(Dataflow(closed.jaxpr, _chosen(closed.jaxpr, varies)))


def _scaled_anywhere(flow):
    for eqn in flow.jaxpr.eqns:
        name, varies = name_of(eqn), [*map(flow.varies, eqn.invars)]
        if name == LOOP:
            inner = loop_flow(flow, eqn)
        elif name in (*CALLS, *REMATERIALISED):
            jaxpr, _ = body_of(eqn)
            inner = Dataflow(jaxpr, _chosen(jaxpr, varies))
        elif name in SCALING and not any(varies):
            return True
        else:
            continue
        if _scaled_anywhere(inner):
            return True
    return False


def _run(jaxpr, consts, args, marks, given, changed):
    """Returns each result, and how it is scaled; `given` says this of inputs."""
    flow, learned = (Dataflow(jaxpr, _chosen(jaxpr, mark)) for mark in marks)
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    scaled = {jaxpr.invars[k]: way for k, way in given.items()}
    for eqn in jaxpr.eqns:
        values, name = [read(env, v) for v in eqn.invars], name_of(eqn)
        varying, made = ([*map(x.varies, eqn.invars)] for x in (flow, learned))
        known = [None if isinstance(v, Literal) else scaled.get(v) for v in eqn.invars]
        ways = {k: way for k, way in enumerate(known) if way is not None}
        if name in CALLS:
            found = _run(*body_of(eqn), values, (varying, made), ways, changed)
            out = [x for x, _ in found]
            scaled.update(zip(eqn.outvars, (way for _, way in found), strict=True))
        elif name == LOOP or name in REMATERIALISED:
            out = bind(_changed((flow, learned), eqn, changed), values)
        elif name in PRODUCTS and any(varying):
            out = [_product(eqn, values, ways, made, changed)]
        else:
            out = bind(eqn, values)
            if name in WAYS and not any(varying):
                scaled[eqn.outvars[0]] = WAYS[name](eqn, values, ways)
        env.update(zip(eqn.outvars, out, strict=True))
    ways = (None if isinstance(v, Literal) else scaled.get(v) for v in jaxpr.outvars)
    return [(read(env, v), way) for v, way in zip(jaxpr.outvars, ways, strict=True)]


def _changed(flows, eqn, changed):
    """Returns a loop, or a call, with its body changed."""
    marks = [[*map(flow.varies, eqn.invars)] for flow in flows]
    if name_of(eqn) == LOOP:
        bodies = [loop_flow(flow, eqn) for flow in flows]
        marks = [[*map(body.varies, body.jaxpr.invars)] for body in bodies]
    before = eqn.params["jaxpr"]
    closed = before if hasattr(before, "consts") else ClosedJaxpr(before, ())
    new = scaled_after(closed, *marks)
    if new is closed or (closed is not before and new.consts):
        return eqn
    changed.append(eqn)
    new = new if closed is before else new.jaxpr
    return eqn.replace(params={**eqn.params, "jaxpr": new})


# What is known of a value from how its operands are made.


def _stretched(eqn, values, ways):
    del ways
    (v, *_), shape = eqn.invars, eqn.outvars[0].aval.shape
    if size(v) == size(eqn.outvars[0]) or isinstance(v, Literal):
        return None
    kept = dict(zip(eqn.params["broadcast_dimensions"], v.aval.shape, strict=True))
    narrow = jnp.reshape(values[0], [kept.get(d, 1) for d in range(len(shape))])
    return Scaled(None, ((jnp.multiply, narrow),))


def _transposed(eqn, values, ways):
    del values
    if 0 not in ways:
        return None
    order = eqn.params["permutation"]
    x, scales = ways[0]
    x = None if x is None else lax.transpose(x, order)
    return Scaled(x, tuple((f, lax.transpose(s, order)) for f, s in scales))


def _scales(eqn, values, ways, k):
    """Returns an operand as scales; None if it is as large as the result."""
    v, out = eqn.invars[k], eqn.outvars[0]
    if size(v) < size(out) and not isinstance(v, Literal):
        shape = v.aval.shape or (1,) * len(out.aval.shape)
        return ((jnp.multiply, jnp.reshape(values[k], shape)),)
    return ways[k].scales if k in ways and ways[k].x is None else None


def _scaled(eqn, values, ways, k):
    """Returns an operand as what is scaled; None if it has another shape."""
    alike = eqn.invars[k].aval.shape == eqn.outvars[0].aval.shape
    return ways.get(k, Scaled(values[k])) if alike else None


def _multiplied(eqn, values, ways):
    for k in (1, 0):
        scales, way = _scales(eqn, values, ways, k), _scaled(eqn, values, ways, 1 - k)
        if scales is not None and way is not None:
            return Scaled(way.x, (*way.scales, *scales))
    return None


def _divided(eqn, values, ways):
    scales, way = _scales(eqn, values, ways, 1), _scaled(eqn, values, ways, 0)
    if scales is None or way is None or any(f is jnp.divide for f, _ in scales):
        return None
    return Scaled(way.x, (*way.scales, *((jnp.divide, s) for _, s in scales)))


Way = Callable[[Any, list[Any], dict[int, Scaled]], Scaled | None]
SCALING: dict[str, Way] = {"mul": _multiplied, "div": _divided}
WAYS = SCALING | {"broadcast_in_dim": _stretched, "transpose": _transposed}


# Products with scaled weights.


def _product(eqn, values, ways, learned, changed):
    """Evaluates a product; what scales its weight scales its result, or the other.

    The other if there is a derivative by it anyway, of which that of the scale is made.
    """
    wide = all(
        is_real(v) and jnp.finfo(v.aval.dtype).bits >= 32
        for v in (*eqn.invars, *eqn.outvars)
    )
    weights = [k for k, way in ways.items() if way.x is not None] if wide else []
    axes = PRODUCTS[name_of(eqn)](eqn, weights[0]) if weights else ({}, {})
    if not weights or not any(axes):
        return bind(eqn, values)[0]
    (k,), (of_result, of_other) = weights, axes
    (w, scales), x, after = ways[k], values[1 - k], []
    for f, s in scales:
        own = {d for d, n in enumerate(s.shape) if n > 1}
        if own <= of_result.keys():
            after.append((f, _placed(s, of_result, len(eqn.outvars[0].aval.shape))))
        elif own <= of_other.keys() and learned[1 - k]:
            x = f(x, _placed(s, of_other, jnp.ndim(x)))
        else:
            w = f(w, s)
    if not after and x is values[1 - k]:
        return bind(eqn, values)[0]
    changed.append(eqn)
    y = bind(eqn, [w, x] if k == 0 else [x, w])[0]
    for f, s in after:
        y = f(y, s)
    return y


def _placed(s, axes, ndim):
    """Returns a scale with its axes where those of another array are."""
    shape = [1] * ndim
    order = sorted((d for d, n in enumerate(s.shape) if n > 1), key=axes.__getitem__)
    for d in order:
        shape[axes[d]] = s.shape[d]
    rest = [d for d in range(s.ndim) if d not in order]
    return lax.transpose(s, (*rest, *order)).reshape(shape)


def _of_matrices(eqn, k):
    """Returns where the axes of operand k are in the result, and in the other one."""
    contract, batch = eqn.params["dimension_numbers"]
    shapes = [v.aval.shape for v in eqn.invars]
    free = [
        [d for d in range(len(shape)) if d not in (*contract[i], *batch[i])]
        for i, shape in enumerate(shapes)
    ]
    start = len(batch[k]) + (len(free[0]) if k else 0)
    of_result = {d: i for i, d in enumerate(batch[k])}
    of_result |= {d: start + i for i, d in enumerate(free[k])}
    return of_result, dict(zip(contract[k], contract[1 - k], strict=True))


def _of_kernels(eqn, k):
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    if k == 0 or params["batch_group_count"] != 1:
        return {}, {}
    features, rows, *_ = numbers.rhs_spec
    of_other = {rows: numbers.lhs_spec[1]}
    grouped = params["feature_group_count"] != 1
    return {features: numbers.out_spec[1]}, {} if grouped else of_other


PRODUCTS: dict[str, Callable] = {"dot_general": _of_matrices, CONVOLUTION: _of_kernels}

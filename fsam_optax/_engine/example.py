"""One example within the map over examples: its program, rewritten or as it is."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun

from fsam_optax._common.mapped_axes import vary_like
from fsam_optax._engine.jaxpr import (
    Dataflow,
    evaluate,
    flatten,
    largest,
    read,
    size,
)
from fsam_optax._engine.plan import make_plan, run, Summation
from fsam_optax._engine.sums import looped, reduced, Steps, widened


class Program(NamedTuple):
    """The outputs and the pulled-back cotangents of one example.

    Attributes:
        closed: Jaxpr from parameters, inputs and cotangents to outputs and gradients.
        known: The parameters and inputs.
        n_outputs: How many of its results are outputs.
        cotangents: Maps the outputs to cotangents of shape (K, ...); to none at all for
            a loss, whose cotangent is one.
        weight: The weight of the example.
    """

    closed: Any
    known: Sequence[jax.Array]
    n_outputs: int
    cotangents: Callable[[Sequence[jax.Array]], Sequence[jax.Array]]
    weight: jax.Array


def sums_of_example(
    fn, params, example, cotangents, weight, powers, chunk_bytes, devices, report
):
    """Returns the sums of powers for each parameter, and the outputs.

    To be mapped over examples and weights, which may be spread over so many `devices`;
    the sums come out unmapped. A `report`, if there is one, receives the rules for each
    parameter.
    """
    inputs, target = example
    params, params_tree = jax.tree.flatten(params)
    inputs, inputs_tree = jax.tree.flatten(inputs)

    def model(params):
        return fn(params_tree.unflatten(params), inputs_tree.unflatten(inputs))

    outputs, outputs_tree = jax.tree.flatten(jax.eval_shape(model, params))
    if cotangents is None and [h.shape for h in outputs] != [()]:
        raise TypeError(f"`loss_fn` must return a scalar; it returned {outputs}.")

    def backward(params, inputs, cs):
        def model(params):
            h = fn(params_tree.unflatten(params), inputs_tree.unflatten(inputs))
            h = jax.tree.leaves(h)
            return [x for x in h if _is_floating(x)], h

        _, pull, h = jax.vjp(model, params, has_aux=True)
        if cotangents is None:
            cs = [vary_like(jnp.ones_like(x), x) for x in h]
        return h, pull(cs)[0]

    def pulled_back(h):
        if cotangents is None:
            return []
        cs = cotangents(outputs_tree.unflatten(h), target)
        return lax.stop_gradient(_checked(cs, h, outputs_tree))

    cs = [vary_like(jnp.zeros(h.shape, h.dtype), weight) for h in outputs]
    cs = [c for c in cs if _is_floating(c)] if cotangents else []
    closed = jax.make_jaxpr(backward)(params, inputs, cs)
    program = Program(closed, [*params, *inputs], len(outputs), pulled_back, weight)
    try:
        sums, h = _rewritten(program, powers, chunk_bytes, devices, report)
    except Exception as error:
        # What the rewriting relies on may change with jax, and that must not fail
        # here. Errors of the user's own functions are raised again.
        sums, h = _as_it_is(program, powers, chunk_bytes, devices, report)
        warnings.warn(
            "The gradients of single examples could not be rewritten and are formed a "
            f"few at a time, which is slow. {type(error).__name__}: {error}",
            stacklevel=2,
        )
    return sums, outputs_tree.unflatten(h)


def _is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _checked(cs, h, tree):
    """Returns the cotangents of the floating-point outputs, after checking them all."""
    if jax.tree.structure(cs) != tree:
        raise ValueError(
            "`cotangents` must return a pytree like the outputs of one example, "
            f"{tree}; got {jax.tree.structure(cs)}."
        )
    cs = jax.tree.leaves(cs)
    for c, x in zip(cs, h, strict=True):
        if c.shape[1:] != x.shape or c.shape[:1] != cs[0].shape[:1] or c.ndim == 0:
            raise ValueError(
                "`cotangents` must return leaves of shape (K, *shape of the output of "
                f"one example), here (K, *{x.shape}); got {c.shape}."
            )
    return [c.astype(x.dtype) for c, x in zip(cs, h, strict=True) if _is_floating(x)]


def _rewritten(program, powers, chunk_bytes, devices, report):
    closed, known, n_outputs, cotangents, weight = program
    given = [*known, *closed.in_avals[len(known) :]]
    flat = jax.make_jaxpr(flatten(closed))(*given)
    jaxpr = flat.jaxpr
    outputs, wanted = jaxpr.outvars[:n_outputs], jaxpr.outvars[n_outputs:]
    flow = Dataflow(jaxpr, jaxpr.invars[len(wanted) :])
    consts = lax.stop_gradient(flat.consts)
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= dict(zip(jaxpr.invars, known, strict=False))  # The cotangents follow.
    forward = flow.ancestors(outputs)
    evaluate(jaxpr.eqns, env, forward)
    h = [lax.stop_gradient(jnp.asarray(read(env, v))) for v in outputs]
    cs = cotangents(h)

    kept = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if not forward.isdisjoint(eqn.outvars):
            kept.update(eqn.outvars)
    limit = max([largest(flow, kept), *(size(v) for v in kept if flow.varies(v))])
    what = Summation(powers, _axes(cs), chunk_bytes, limit, devices)
    plan = make_plan(flow, consts, wanted, outputs, what)

    def pull(weight, c):
        given = dict(zip(jaxpr.invars[len(known) :], c, strict=True))
        return run(plan, env | given, weight, what)

    sums = _over_cotangents(pull, weight, cs)
    if report is not None:
        report[:] = [plan.rules(v) for v in wanted]
    return sums, h


def _as_it_is(program, powers, chunk_bytes, devices, report):
    closed, known, n_outputs, cotangents, weight = program
    fn = jaxpr_as_fun(closed)
    zeros = [jnp.zeros(x.shape, x.dtype) for x in closed.in_avals[len(known) :]]
    h = fn(*known, *(vary_like(c, weight) for c in zeros))[:n_outputs]
    cs = cotangents(lax.stop_gradient(h))
    gradients = closed.out_avals[n_outputs:]
    held = sum(math.prod(x.shape) * widened(x.dtype).itemsize for x in gradients)

    def pulled(*operands):
        return fn(*operands)[n_outputs:]

    rule = looped(pulled, gradients, powers, Steps(held, chunk_bytes, devices))
    summed = reduced(rule, _axes(cs))
    if report is not None:
        report[:] = [[("fallback", math.inf, 1)] for _ in gradients]
    return _over_cotangents(lambda w, c: summed(w, *known, *c), weight, cs), h


def _axes(cs):
    """Returns how many axes are mapped over: examples, and cotangents if several."""
    return 1 if all(len(c) == 1 for c in cs) else 2


def _over_cotangents(pull, weight, cs):
    if _axes(cs) == 1:
        return pull(weight, [c[0] for c in cs])
    weights = jnp.broadcast_to(weight, (len(cs[0]),))
    return jax.vmap(pull, out_axes=None)(weights, cs)

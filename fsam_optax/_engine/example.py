"""One example within the map over examples: its program, rewritten or as it is."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fsam_optax._common.mapped_axes import vary_like
from fsam_optax._common.norms import widen
from fsam_optax._engine.canonical import bound
from fsam_optax._engine.columns import (
    at_a_time,
    Columns,
    Cotangents,
    fits,
    held_by_column,
    over_cotangents,
)
from fsam_optax._engine.flatten import flatten
from fsam_optax._engine.jaxpr import (
    as_function,
    Dataflow,
    evaluate,
    followed,
    laid_out,
    largest,
    read,
    size,
)
from fsam_optax._engine.one_row import free, is_free
from fsam_optax._engine.operation import reduced
from fsam_optax._engine.plan import bytes_at_once, make_plan, most_held, run
from fsam_optax._engine.report import Used
from fsam_optax._engine.scales import scaled_after, scales_weights
from fsam_optax._engine.squares import looped
from fsam_optax._engine.sums import Steps
from fsam_optax._engine.unrolling import unrolled


class Program(NamedTuple):
    """The outputs and the pulled-back cotangents of one example.

    Attributes:
        closed: Jaxpr from parameters, inputs and cotangents to outputs and gradients.
        known: The parameters and inputs.
        n_outputs: How many of its results are outputs.
        cotangents: Maps the outputs to their cotangents; to one without arrays for a
            loss, whose cotangent is one.
        weight: The weight of the example.
    """

    closed: Any
    known: Sequence[jax.Array]
    n_outputs: int
    cotangents: Callable[[Sequence[jax.Array]], Cotangents]
    weight: jax.Array


def sums_of_example(fn, params, example, cotangents, weight, what, report):
    """Returns the sums of powers for each parameter, and the outputs.

    To be mapped over examples and weights; the sums come out unmapped. A `report`, if
    there is one, receives the rules for each parameter.
    """
    inputs, target = example
    params, params_tree = jax.tree.flatten(params)
    inputs, inputs_tree = jax.tree.flatten(inputs)

    def model(params, inputs):
        return fn(params_tree.unflatten(params), inputs_tree.unflatten(inputs))

    def ahead(run, params, inputs):
        """Returns the outputs, and the function that pulls cotangents back."""

        def floating(params):
            h = jax.tree.map(jnp.asarray, run(params, inputs))
            return [x for x in jax.tree.leaves(h) if _is_floating(x)], h

        _, pull, h = jax.vjp(floating, params, has_aux=True)
        return h, pull

    def itself(params, inputs):
        with free():
            return ahead(model, params, inputs)

    # Of the function itself, as jax keeps the derivatives of operations of `jax.numpy`:
    # a jaxpr has their equations, which would be differentiated one by one.
    linear, like = jax.make_jaxpr(itself, return_shape=True)(params, inputs)
    outputs, outputs_tree = jax.tree.flatten(like[0])
    if cotangents is None and [h.shape for h in outputs] != [()]:
        raise TypeError(f"`loss_fn` must return a scalar; it returned {outputs}.")

    def backward(h, pull, cs):
        h = jax.tree.leaves(h)
        if cotangents is None:
            cs = [vary_like(jnp.ones_like(x), x) for x in h]
        return h, pull(cs)[0]

    def pulled_back(h):
        if cotangents is None:
            return Cotangents(1, lambda index: [])
        outputs = outputs_tree.unflatten(h)
        if isinstance(cotangents, Columns):
            columns = cotangents

            def take(index):
                cs = jax.vmap(lambda i: columns.column(outputs, target, i))(index)
                return lax.stop_gradient(_checked(cs, h, outputs_tree))

            return Cotangents(columns.number(outputs), take)
        cs = lax.stop_gradient(_checked(cotangents(outputs, target), h, outputs_tree))
        count = len(cs[0]) if cs else 1
        return Cotangents(
            count, lambda index: [c if len(index) == count else c[index] for c in cs]
        )

    cs = [vary_like(jnp.zeros(h.shape, h.dtype), weight) for h in outputs]
    cs = [c for c in cs if _is_floating(c)] if cotangents else []

    def program(closed):
        return Program(closed, [*params, *inputs], len(outputs), pulled_back, weight)

    def program_of(forward):
        call = as_function(forward)

        def run(params, inputs, cs):
            made = ahead(lambda params, inputs: call(*params, *inputs), params, inputs)
            return backward(*made, cs)

        return program(jax.make_jaxpr(run)(params, inputs, cs))

    def onward(found, cs):
        h, pull = jax.tree.structure(like).unflatten(found)
        return backward(h, pull, cs)

    try:
        learned = [True] * len(params) + [False] * len(inputs)
        varies = [not x for x in learned]
        if is_free(linear) and not scales_weights(linear, varies):
            then = jax.make_jaxpr(onward)(linear.out_avals, cs)
            traced = program(followed(linear, then))
        else:
            forward = jax.make_jaxpr(model)(params, inputs)
            traced = program_of(scaled_after(forward, varies, learned))
        sums, h = _rewritten(traced, what, report)
    except Exception as error:
        # What the rewriting relies on may change with jax, and that must not fail
        # here. Errors of the user's own functions are raised again.
        forward = jax.make_jaxpr(model)(params, inputs)
        sums, h = _as_it_is(program_of(forward), what, report)
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


def _all_once(weight):
    """Returns the number that says that each entry of a gradient counts once."""
    return vary_like(jnp.ones((), widen(weight.dtype)), weight)


def _rewritten(program, what, report):
    closed, known, n_outputs, cotangents, weight = program
    given = [*known, *closed.in_avals[len(known) :]]
    n_params = len(closed.out_avals) - n_outputs
    varies = [i >= n_params for i in range(len(given))]
    flat = jax.make_jaxpr(flatten(closed, varies))(*given)
    flat = unrolled(flat, varies, n_outputs)
    jaxpr = flat.jaxpr
    outputs, wanted = jaxpr.outvars[:n_outputs], jaxpr.outvars[n_outputs:]
    constants = dict(zip(jaxpr.constvars, flat.consts, strict=True))
    flow = Dataflow(jaxpr, jaxpr.invars[n_params:], constants)
    consts = lax.stop_gradient(flat.consts)
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= dict(zip(jaxpr.invars, known, strict=False))  # The cotangents follow.
    forward = flow.ancestors(outputs)
    evaluate(jaxpr.eqns, env, forward, bound)
    h = [lax.stop_gradient(jnp.asarray(read(env, v))) for v in outputs]
    made = cotangents(h)

    kept = set(jaxpr.invars)
    windows = [1]
    for eqn in jaxpr.eqns:
        if not forward.isdisjoint(eqn.outvars):
            kept.update(eqn.outvars)
            windows += [laid_out(eqn)] if flow.varies(eqn.outvars[0]) else []
    activations = (size(v) for v in kept if flow.varies(v))
    limit = max(largest(flow, kept), *windows, *activations)
    columns = jaxpr.invars[len(known) :]
    residuals = _residual_bytes(flow, kept - set(columns), forward)
    what = dataclasses.replace(what, limit=limit, residuals=residuals)
    plan = make_plan(flow, consts, wanted, outputs, what)

    numbers, share = {"default": made.number}, None
    if made.number > 1:
        each, beside = held_by_column(flow, columns, plan.needed)
        most, whole = most_held(plan), bytes_at_once(plan)
        numbers = at_a_time(
            made.number, each, beside, most, whole, what.examples, what.chunk_bytes
        )
        sums = len(what.powers) * _bytes_of(v.aval for v in wanted)
        if fits(sums, what.examples, each + beside):
            share = what.examples

    def pull(axes, weight, c):
        given = env | dict(zip(columns, c, strict=True))
        counts = [[_all_once(weight)]] * len(wanted) if what.by_example else None
        return run(plan, given, weight, dataclasses.replace(what, axes=axes), counts)

    sums = over_cotangents(pull, made, weight, numbers, share)
    if report is not None:
        report[:] = [plan.rules(k) for k in range(len(wanted))]
    return sums, h


def _residual_bytes(flow, kept, forward):
    """Returns the bytes of an example that the backward pass reads of the forward one.

    What loops stack for it leads to no output.
    """
    backward = (e for e in flow.jaxpr.eqns if forward.isdisjoint(e.outvars))
    read_back = {v for e in backward for v in e.invars if flow.varies(v) and v in kept}
    return sum(size(v) * v.aval.dtype.itemsize for v in read_back)


def _as_it_is(program, what, report):
    closed, known, n_outputs, cotangents, weight = program
    fn = as_function(closed)
    zeros = [jnp.zeros(x.shape, x.dtype) for x in closed.in_avals[len(known) :]]
    h = fn(*known, *(vary_like(c, weight) for c in zeros))[:n_outputs]
    made = cotangents(lax.stop_gradient(h))
    gradients = closed.out_avals[n_outputs:]
    held = _bytes_of(gradients)
    each = sum(math.prod(x.shape) * x.dtype.itemsize for x in h)
    numbers = at_a_time(made.number, each, 0, held, 0, what.examples, what.chunk_bytes)
    share = what.examples if fits(held, what.examples, each) else None
    steps = Steps(held, what.budget, what.examples)
    rule = looped(lambda *x: fn(*x)[n_outputs:], gradients, what, steps)
    if report is not None:
        report[:] = [[Used("fallback", math.inf, 1.0)] for _ in gradients]

    def pull(axes, weight, c):
        if what.by_example:
            counts = [_all_once(weight)] * len(gradients)
            by_example = functools.partial(rule, len(counts))
            operation = reduced(by_example, axes, summed=False)
            return [[y] for y in operation(weight, *counts, *known, *c)]
        return reduced(rule, axes)(weight, *known, *c)

    return over_cotangents(pull, made, weight, numbers, share), h


def _bytes_of(avals):
    """Returns the bytes of arrays in float32, or wider if they are."""
    return sum(math.prod(x.shape) * widen(x.dtype).itemsize for x in avals)

"""What the engine will do with a model, and whether the model lets it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from fsam_optax._common.checks import check_function, check_leaves
from fsam_optax._engine.jaxpr import body_of, Dataflow
from fsam_optax._engine.power_sums import (
    check_cotangents,
    check_model,
    one_of_batch,
    sums_and_outputs,
)
from fsam_optax._engine.primitives import (
    CALLS,
    name_of,
    REDUCTIONS,
    REMATERIALISED,
)
from fsam_optax._engine.report import Explanation, leaves_of
from fsam_optax._engine.work import total


PyTree = Any


def explain(
    apply_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    inputs: PyTree,
    cotangents: Callable[[PyTree, PyTree], PyTree],
    targets: PyTree = None,
) -> Explanation:
    """Tells how `power_sums` handles each parameter, without computing anything.

    Args:
        apply_fn: See `power_sums`; all arguments may be `jax.ShapeDtypeStruct`s.
        params: See `power_sums`.
        inputs: See `power_sums`.
        cotangents: See `power_sums`.
        targets: See `power_sums`.

    Returns:
        One `Leaf` per parameter. `cost` counts the operations of the rule against those
        of the gradient of the parameter: for a bias three, a square, a weight and a
        sum, for each addition. A fallback forms the gradient of each example, a few at
        a time; its note says why. The `cost` of the whole counts one pass, forward and
        backward, against one gradient of the batch.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((300, 90)), "bias": jnp.zeros(90)}
        >>> def apply_fn(params, x):
        ...     return x @ params["kernel"] + params["bias"][None]
        >>> print(explain(apply_fn, params, jnp.ones((8, 300)), lambda h, _: h[None]))
        parameter   shape      rule           cost
        ['bias']    (90,)      reduction      3.00
        ['kernel']  (300, 90)  outer product  1.02
        All of it costs 1.01 gradients of the batch.
    """
    check_model(apply_fn, inputs)
    check_cotangents(cotangents)
    return _explain(one_of_batch(apply_fn), params, (inputs, targets), cotangents)


def explain_loss(
    loss_fn: Callable[[PyTree, PyTree], jax.Array], params: PyTree, batch: PyTree
) -> Explanation:
    """Tells how `loss_power_sums` handles each parameter; see `explain`.

    Args:
        loss_fn: See `loss_power_sums`; all arguments may be `jax.ShapeDtypeStruct`s.
        params: See `loss_power_sums`.
        batch: See `loss_power_sums`.

    Returns:
        One `Leaf` per parameter.
    """
    check_function("loss_fn", loss_fn)
    return _explain(loss_fn, params, (batch, None), None)


def explain_squares(loss_fn: Callable, params: PyTree, batch: PyTree) -> Explanation:
    """Tells how `example_squares` handles each parameter; see `explain`."""
    return _explain(loss_fn, params, (batch, None), None, by_example=True)


def check_separable(
    apply_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    inputs: PyTree,
    *,
    tolerance: float = 1e-3,
) -> None:
    """Checks that the outputs for an example do not depend on the rest of the batch.

    Runs the model on the batch and on each example by itself. What differs has no
    per-example gradients: batch normalization in training mode, contrastive losses,
    routing with a capacity. Random numbers whose shape is that of the batch, as in
    dropout with one key, are reported too; pass a key per example in `inputs` instead.

    Args:
        apply_fn: The model, `apply_fn(params, inputs) -> outputs` on a batch.
        params: Its parameters.
        inputs: Pytree of arrays with a leading axis of examples; a few are enough.
        tolerance: Largest difference accepted, relative to the largest output.

    Raises:
        ValueError: If an output differs by more, or has no leading axis of examples.
            Not for use under `jax.jit`.
    """
    check_model(apply_fn, inputs)
    check_leaves(params, "params")
    together = apply_fn(params, inputs)
    number = jnp.shape(jax.tree.leaves(inputs)[0])[0]
    for leaf in jax.tree.leaves(together):
        if jnp.shape(leaf)[:1] != (number,):
            raise ValueError(
                "`apply_fn` must return outputs with a leading axis of examples, as "
                f"`inputs` have, got shape {jnp.shape(leaf)} for {number} examples. "
                "Pass the model, `check_separable(apply_fn, params, inputs)`, not a "
                "loss."
            )
    alone = lax.map(lambda x: one_of_batch(apply_fn)(params, x), inputs)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(together),
        jax.tree.leaves(alone),
        strict=True,
    ):
        error = jnp.max(jnp.abs(a - b), initial=0)
        scale = jnp.max(jnp.abs(a), initial=0)
        if not error <= tolerance * scale:
            raise ValueError(
                f"The output{jax.tree_util.keystr(path)} of `apply_fn` for an example "
                f"depends on the rest of the batch: it differs by {error:.2g} where "
                f"the largest is {scale:.2g}. There are no per-example gradients; "
                "use statistics that are fixed, or randomness that is per example."
            )


def _explain(fn, params, examples, cotangents, by_example=False):
    check_leaves(params, "params")
    check_leaves(examples, "(inputs, targets)", data=True)
    report = []

    def record(params, examples):
        return sums_and_outputs(
            fn,
            params,
            examples,
            cotangents,
            (2,),
            None,
            None,
            report,
            keep=True,
            by_example=by_example,
        )

    sums = total(jax.make_jaxpr(record)(params, examples).jaxpr.eqns)
    found = Explanation(leaves_of(params, report))
    found.cost = sums / _gradient_work(fn, params, examples[0])
    # A loss of one example has no axis that could be one of a batch.
    found.remarks = _remarks(fn, params, examples) if cotangents is not None else ()
    return found


def _gradient_work(fn, params, inputs):
    """Returns the operations of one gradient of the batch."""

    def outputs(batch, params, inputs):
        def one(x):
            h = jax.tree.leaves(fn(params, x))
            return [y for y in h if jnp.issubdtype(y.dtype, jnp.inexact)]

        return jax.vmap(one)(inputs) if batch else lax.map(one, inputs)

    def gradient(batch, params, inputs):
        h, pull = jax.vjp(lambda params: outputs(batch, params, inputs), params)
        return pull([jnp.ones_like(x) for x in h])

    traced = functools.partial(jax.make_jaxpr, static_argnums=0)(gradient)
    try:
        jaxpr = traced(True, params, inputs)
    except NotImplementedError:  # Something in the model has no batching rule.
        jaxpr = traced(False, params, inputs)
    return max(total(jaxpr.jaxpr.eqns), 1.0)


def _remarks(fn, params, examples):
    """Points out statistics over the batch, which is one of one example here."""
    params, (inputs, _) = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, examples)
    )
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    jaxpr = jax.make_jaxpr(fn)(params, one).jaxpr
    n_params = len(jax.tree.leaves(params))
    varies = [False] * n_params + [True] * len(jax.tree.leaves(one))
    if not over_leading(jaxpr, varies, [True] * len(jaxpr.outvars), 1):
        return ()
    return (
        "A reduction over a leading axis of size one looks like a statistic of the "
        "batch, such as that of batch normalization in training mode. If it is one, "
        "there are no gradients of single examples: `check_separable` tells.",
    )


def over_leading(
    jaxpr: Any, varies: Sequence[bool], needed: Sequence[bool], size: int
) -> bool:
    """Tells whether inputs are reduced over a leading axis of this size.

    Of real numbers, and on the way to an output that is needed.
    """
    given = (v for v, b in zip(jaxpr.invars, varies, strict=True) if b)
    flow = Dataflow(jaxpr, given)
    read = {
        v for v, b in zip(jaxpr.outvars, needed, strict=True) if b and _is_variable(v)
    }
    for eqn in reversed(jaxpr.eqns):
        outputs = [v in read for v in eqn.outvars]
        if not any(outputs):
            continue
        read.update(v for v in eqn.invars if _is_variable(v))
        varying = [flow.varies(v) for v in eqn.invars]
        aval = eqn.invars[0].aval if eqn.invars else None
        shape = getattr(aval, "shape", ())
        if (
            name_of(eqn) in REDUCTIONS
            and varying[0]
            and shape[:1] == (size,)
            and (len(shape) > 1 or size > 1)
            and 0 in eqn.params["axes"]
            and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact)
        ):
            return True
        if name_of(eqn) in (*CALLS, *REMATERIALISED) and over_leading(
            body_of(eqn)[0], varying, outputs, size
        ):
            return True
    return False


def _is_variable(v):
    return not isinstance(v, Literal)


def over_examples(
    apply_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    inputs: PyTree,
    traced: Any,
) -> bool:
    """Tells whether a model reduces over the examples of a batch, as BatchNorm does.

    By the jaxpr of the batch: reductions along a leading axis of its size. A second
    one, of another number of examples, tells their axis from others of that size.

    Args:
        apply_fn: The model.
        params: Its parameters.
        inputs: The batch.
        traced: Its jaxpr for the batch.
    """

    def reduces(jaxpr, number):
        varies = [False] * len(jax.tree.leaves(params))
        varies += [True] * len(jax.tree.leaves(inputs))
        return over_leading(jaxpr, varies, [True] * len(jaxpr.outvars), number)

    number = jnp.shape(jax.tree.leaves(inputs)[0])[0]
    if number < 2 or not reduces(traced, number):
        return False
    more = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((number + 1, *jnp.shape(x)[1:]), x.dtype), inputs
    )
    try:
        return reduces(jax.make_jaxpr(apply_fn)(params, more).jaxpr, number + 1)
    except Exception:  # A model for this number of examples alone.
        return True

"""Means over examples of functions of the derivatives of their outputs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import check_leaves
from fsam_optax._common.mapped_axes import axes_of_shards, vary, vary_like
from fsam_optax._common.norms import widen
from fsam_optax._fisher.labels import expand, weigh
from fsam_optax._fisher.negative_log_likelihood import (
    call_of,
    NegativeLogLikelihood,
    outputs_like,
    parts_of,
)
from fsam_optax._fisher.outputs import Call, of_example, row_numbers


class Examples(NamedTuple):
    """The examples over which there is a mean.

    Attributes:
        call: The model.
        inputs: Inputs and rows of the examples, whose leading axes count them.
        scales: What the scores of the labels are multiplied by, so that the mean over
            the examples of their squares is the Fisher.  # shape=(N, T, C) or (N, T, 1)
    """

    call: Call
    inputs: Any
    scales: jax.Array


def examples_of(
    nll: NegativeLogLikelihood,
    params: Any,
    batch: Any,
    *,
    loss_args: Any = (),
    loss_kwargs: Mapping[str, Any] | None = None,
) -> Examples:
    """Returns the examples of a batch, after checking all that is given."""
    check_leaves(params, "params", real=True)
    if nll.likelihood.heads is not None:
        raise TypeError("The variances are of models with one output, not of `heads`.")
    inputs, targets, weights = parts_of(nll, batch)
    inputs = jax.tree.map(jnp.asarray, inputs)
    call = call_of(nll, loss_args, dict(loss_kwargs or {}))
    h = outputs_like(nll, params, inputs, call)
    if not h.shape[0]:
        raise ValueError("`inputs` must hold one example or more, got none.")
    targets = targets if jax.tree.leaves(targets) else None
    labels = weigh(nll.likelihood, h, targets, weights)
    a = jnp.sqrt(labels.examples * h.shape[0] / labels.divisor)
    scales = expand(a, labels.within) * labels.within
    scales = scales[..., None]
    if labels.present is not None:
        scales = jnp.where(labels.present == 0, 0, scales)
    scales = scales.reshape(h.shape[0], -1, scales.shape[-1])
    rows = row_numbers(inputs) if call.one_by_one else None
    return Examples(call, (inputs, rows), scales)


def outputs_of(call: Call, params: Any, example: Any) -> jax.Array:
    """Returns the outputs for one example, as (T, C) with T positions."""
    h = of_example(call, params, example)[0]
    return h.reshape(-1, h.shape[-1]).astype(widen(h))


def mean_over_jacobians(
    form: Callable[..., tuple[jax.Array, ...]],
    params: Any,
    examples: Examples,
    *extra: jax.Array,
    after: Callable[[Any], Any] | None = None,
) -> tuple[Any, ...]:
    """Returns the mean over examples of `form(h, dh/dtheta_i, *extra)` for every i.

    Args:
        form: Maps outputs (T, C), a direction (T, C) and one entry of each array in
            `extra` to a tuple of scalars.
        params: Parameters of the model.
        examples: Its examples.
        *extra: Arrays whose leading axes count the examples.
        after: Maps the tuple of trees of an example to the one that is averaged.

    Returns:
        A tuple of trees with the structure of params.
    """
    data = (examples.inputs, examples.scales, *extra)
    # The derivatives are of the examples of this device, not summed over all.
    params = vary(params, axes_of_shards(data) or None)

    def share(example):
        x, scale, *rest = example
        h = outputs_of(examples.call, params, x)
        jacobian = jax.jacrev(outputs_of, argnums=1)(examples.call, params, x)

        def entries(w, rows):
            rows = rows.astype(widen(rows))
            directions = rows.reshape(h.size, -1).T.reshape(-1, *h.shape)
            values = jax.vmap(lambda u: form(h, scale * u, *rest))(directions)
            return tuple(v.reshape(jnp.shape(w)) for v in values)

        values = _unzip(params, jax.tree.map(entries, params, jacobian))
        return values if after is None else after(values)

    def add(total, example):
        return jax.tree.map(jnp.add, total, share(example)), None

    first = jax.tree.map(lambda x: x[0], data)
    like = jax.eval_shape(share, first)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    zero = vary_like(zero, like)
    total, _ = jax.lax.scan(add, zero, data)
    return jax.tree.map(lambda x: x / len(examples.scales), total)


def mean_over_second_derivatives(
    form: Callable[..., tuple[jax.Array, ...]],
    params: Any,
    examples: Examples,
    *extra: jax.Array,
) -> tuple[Any, ...]:
    """Returns the mean of `form(h, d^2h/dtheta_i^2, *extra)`; otherwise as above."""
    leaves, structure = jax.tree.flatten(params)
    all_outputs = jax.vmap(
        lambda p, x: outputs_of(examples.call, p, x), in_axes=(None, 0)
    )
    h = all_outputs(params, examples.inputs)

    def entries(i, w):
        def model(leaf):
            moved = structure.unflatten([*leaves[:i], leaf, *leaves[i + 1 :]])
            return all_outputs(moved, examples.inputs)

        def entry(j):
            unit = jnp.zeros(w.size, w.dtype).at[j].set(1).reshape(w.shape)

            def slope(w):
                return jax.jvp(model, (w,), (unit,))[1]

            _, curvature = jax.jvp(slope, (w,), (unit,))
            # A second derivative counts as the square of a first one does.
            scaled = examples.scales**2 * curvature
            values = jax.vmap(form)(h, scaled, *extra)
            return tuple(jnp.mean(v) for v in values)

        values = jax.lax.map(entry, jnp.arange(w.size), batch_size=64)
        return tuple(v.reshape(w.shape) for v in values)

    pairs = [entries(i, jnp.asarray(w)) for i, w in enumerate(leaves)]
    return _unzip(params, structure.unflatten(pairs))


def _unzip(params, tuples):
    """Turns a tree of tuples into a tuple of trees."""
    structure = jax.tree.structure(params)
    columns = zip(*structure.flatten_up_to(tuples), strict=True)
    return tuple(structure.unflatten(column) for column in columns)

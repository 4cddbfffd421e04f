"""The gradients of single examples: their norms, and their mean once clipped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsam_optax._common.checks import (
    broadcast_mask,
    check_function,
    check_leaves,
    check_no_module,
    check_number,
    is_real,
)
from fsam_optax._common.mapped_axes import axes_of_shards, vary
from fsam_optax._common.norms import widen
from fsam_optax._engine import example_squares, without_explicit_axes
from fsam_optax._fisher.estimation import is_masked, masked_by
from fsam_optax._fisher.labels import expand
from fsam_optax._fisher.likelihoods import Likelihood
from fsam_optax._fisher.negative_log_likelihood import (
    call_of,
    mean_loss,
    NegativeLogLikelihood,
    parts_of,
    resolve,
)
from fsam_optax._fisher.one_pass import arrays_of, check_split, example_losses
from fsam_optax._fisher.outputs import (
    aux_axes,
    count_examples,
    of_batch,
    row_numbers,
)


class Losses(NamedTuple):
    """A loss as that of its examples.

    Attributes:
        of_one: `of_one(params, example)`, the loss of one example without its weight.
        examples: The examples.
        weights: Their weights.  # shape=(N,)
        clipped: `clipped(params, factors)`, the loss of the batch, where each example
            counts by its factor too.
    """

    of_one: Callable[[Any, Any], jax.Array]
    examples: Any
    weights: jax.Array
    clipped: Callable[[Any, jax.Array], jax.Array]


def takes_loss(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function of a loss take `(apply_fn, likelihood)` in its place."""

    @functools.wraps(fn)
    def of_either(loss, *args, **kwargs):
        likelihood = kwargs.pop("likelihood", None)
        if likelihood is None and args and isinstance(args[0], Likelihood):
            likelihood, *args = args
        if likelihood is not None:
            loss = resolve(fn.__name__, loss, likelihood)
        if not isinstance(loss, NegativeLogLikelihood):
            check_function("loss", loss)
        return fn(loss, *args, **kwargs)

    return of_either


def losses_of(
    loss: Any, params: Any, batch: Any, loss_args: Any, loss_kwargs: Any
) -> Losses:
    """Returns the losses of the examples of a batch."""
    kwargs = dict(loss_kwargs or {})
    if not isinstance(loss, NegativeLogLikelihood):
        n = count_examples(batch)

        def own(params, example):
            return loss(params, example, *loss_args, **kwargs)

        def mean(params, factors):
            losses = jax.vmap(own, (None, 0))(params, batch)
            return jnp.sum(factors * losses) / max(n, 1)

        wide = widen(*filter(is_real, jax.tree.leaves(params)))
        return Losses(own, batch, jnp.ones(n, wide), mean)
    check_split(
        loss,
        loss_args,
        kwargs,
        "The gradients of single examples are not known",
        "leave the key out",
    )
    parts, call = parts_of(loss, batch), call_of(loss, loss_args, kwargs)
    # A statistic over the batch is no sum over examples, and neither is the loss then.
    axes = aux_axes(call, params, parts[0]) if loss.has_aux else None
    one, examples, labels = example_losses(loss, params, parts, call, axes)

    def clipped(params, factors):
        h, _ = of_batch(call, params, parts[0])
        weights = labels.weights * expand(factors, labels.weights)
        return mean_loss(loss, h, labels._replace(weights=weights))

    return Losses(
        lambda params, example: one(params, example)[0],
        examples,
        labels.examples,
        clipped,
    )


@takes_loss
def per_example_norms(
    loss: Any,
    params: Any,
    batch: Any,
    *,
    mask: Any = None,
    by_leaf: bool = False,
    loss_args: Sequence[Any] = (),
    loss_kwargs: Mapping[str, Any] | None = None,
    chunk_bytes: int | None = None,
) -> Any:
    """Returns the norm of the gradient of each example, from one backward pass.

        |g_n|            g_n = d/dw sum_t w_nt (-log p(y_nt | h_nt))

    g_n is the gradient of what example n, with all its labels and their weights, adds
    to the loss: not divided by the D of the loss, whose gradient is `sum_n g_n / D`.
    An example of weight 0 has norm 0.

    It costs about one gradient of the batch, often less, and forms no array of shape
    (N, parameters): the squares that `fisher_empirical` adds over examples are added
    over entries here, by the same rules. The gradient of a dense layer is an outer
    product, whose norm is the product of two; where a weight meets several positions,
    those of Gram matrices are taken instead if they are less work. Ask
    `explain(per_example_norms, loss, params, batch)`. Use it under `jax.jit`.

    For importance sampling, outliers, curricula, the noise of the gradient. It is no
    tool for privacy: nothing is counted, and no noise is added. A model that mixes
    examples, as BatchNorm does in training mode, has no such gradients
    (`check_separable`).

    Args:
        loss: A `negative_log_likelihood`; or `apply_fn, likelihood` in its place; or
            the loss of one example, `loss(params, example) -> scalar`, whose w_nt is 1.
        params: Parameters w. Leaves that are not floating-point count as constants.
        batch: What the loss takes; a pytree of arrays with a leading axis of N.
        mask: Tree of bools that is a prefix of params, or a function of params that
            returns one: the parameters to differentiate by. None for all.
        by_leaf: Whether to return the norm for each parameter by itself.
        loss_args: Further arguments of the model, or of the loss of one example.
        loss_kwargs: Further keyword arguments.
        chunk_bytes: Bytes that a loop over examples may hold at a time on each device,
            where gradients or Gram matrices are formed a few at a time. None for what
            suits the platform; see `power_sums`.

    Returns:
        The norms, shape (N,), not their squares; float32, or wider if params are. With
        `by_leaf` a tree of these like params, with `optax.MaskedNode()` for leaves that
        are not differentiated; the squares of all leaves add up to that of the norm.
        Nothing can be differentiated through it. Norms below 1e-19 are lost in float32,
        as their squares are; where contributions cancel, the norm is exact to about
        1e-3 of the largest of them.

    Raises:
        TypeError: If params hold a module, or the loss is none.
        ValueError: If shapes are not as described; for a statistic over the batch in
            aux; for a PRNG key among the arguments of a loss with `split_keys=False`,
            as the draws of an example are then not those of the batch.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian, negative_log_likelihood
        >>> nll = negative_log_likelihood(lambda w, x: x @ w, gaussian())
        >>> inputs = jnp.array([[3.0, 4.0], [0.0, 1.0], [3.0, 4.0]])
        >>> targets = jnp.array([[1.0], [1.0], [0.0]])
        >>> norms = jax.jit(per_example_norms, static_argnums=0)
        >>> print(norms(nll, jnp.zeros((2, 1)), (inputs, targets)))
        [5. 1. 0.]

    References:
        Goodfellow, Efficient per-example gradient computations, 2015,
        https://arxiv.org/abs/1510.01799 (sec. 4), for dense layers. Li, Tramer, Liang,
        Hashimoto, Large language models can be strong differentially private learners,
        2022, https://arxiv.org/abs/2110.05679 (sec. 4, ghost clipping), for Gram
        matrices.
    """
    where = "per_example_norms", mask, loss_args, loss_kwargs
    norms, _ = _norms(loss, params, batch, *where, chunk_bytes, by_leaf)
    return norms


@takes_loss
def clipped_gradient(
    loss: Any,
    params: Any,
    batch: Any,
    *,
    max_norm: jax.typing.ArrayLike,
    mask: Any = None,
    loss_args: Sequence[Any] = (),
    loss_kwargs: Mapping[str, Any] | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Any, jax.Array]:
    """Returns the gradient of a loss with that of each example clipped, and the norms.

        1/D sum_n min(1, max_norm / |g_n|) g_n

    with g_n as in `per_example_norms`. Two backward passes: one for the norms, one for
    the gradient of the loss in which the examples count accordingly. No gradient of a
    single example is kept.

    This is *not* differentially private training: no noise is added, no privacy is
    accounted for, and D depends on the data. It bounds what one outlier does to a step.

    Args:
        loss: See `per_example_norms`.
        params: See `per_example_norms`.
        batch: See `per_example_norms`.
        max_norm: The largest norm that an example may have; compare it with what
            `per_example_norms` returns.
        mask: See `per_example_norms`: the parameters to differentiate by, of which the
            norms are.
        loss_args: See `per_example_norms`.
        loss_kwargs: See `per_example_norms`.
        chunk_bytes: See `per_example_norms`.

    Returns:
        The gradient, like params, with `optax.MaskedNode()` for leaves that are not
        differentiated; and the norms before clipping, shape (N,). Under
        `jax.shard_map` both are of the examples of the device, with a D of its own.

    Raises:
        TypeError: As `per_example_norms`.
        ValueError: As `per_example_norms`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fsam_optax import gaussian
        >>> clipped = jax.jit(clipped_gradient, static_argnums=(0, 1))
        >>> batch = jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([[10.0], [1.0]])
        >>> grads, norms = clipped(
        ...     lambda w, x: x @ w, gaussian(), jnp.zeros((2, 1)), batch, max_norm=5.0
        ... )
        >>> print(norms, grads.T)
        [50.  1.] [[-1.5 -2.5]]
    """
    check_number("max_norm", max_norm, 0)
    where = "clipped_gradient", mask, loss_args, loss_kwargs
    norms, chosen = _norms(loss, params, batch, *where, chunk_bytes, False)
    long = norms > max_norm
    factors = jnp.where(long, max_norm / jnp.where(long, norms, 1), 1)
    factors = jax.lax.stop_gradient(factors)

    def value(chosen):
        losses = losses_of(loss, params, batch, loss_args, loss_kwargs)
        return losses.clipped(_completed(params, chosen), factors)

    # The derivative is by the examples of this device, not summed over all.
    return jax.grad(value)(vary(chosen, axes_of_shards(norms) or None)), norms


def _norms(
    loss, params, batch, name, mask, loss_args, loss_kwargs, chunk_bytes, by_leaf
):
    """Returns the norms, and params without what is not differentiated."""
    check_no_module(name, params)
    check_leaves(params, "params")
    keep = jax.tree.map(is_real, params)
    if mask is not None:
        chosen = broadcast_mask(mask, params, "mask")
        keep = jax.tree.map(lambda a, b: a and b, keep, chosen)

    chosen = masked_by(keep, params)
    arrays, fixed = arrays_of((batch, loss_args, loss_kwargs, params))

    def run(chosen, arrays):
        batch, loss_args, loss_kwargs, params = fixed.put_back(arrays)

        losses = losses_of(loss, params, batch, loss_args, loss_kwargs)
        squares = example_squares(
            lambda chosen, example: losses.of_one(_completed(params, chosen), example),
            chosen,
            losses.examples,
            chunk_bytes=chunk_bytes,
        )
        a = losses.weights
        if not by_leaf:
            squares = sum(jax.tree.leaves(squares), start=jnp.zeros_like(a))
        return jax.tree.map(
            lambda s: jnp.where(a == 0, 0, jnp.abs(a) * jnp.sqrt(s)), squares
        )

    inputs = (
        parts_of(loss, batch)[0] if isinstance(loss, NegativeLogLikelihood) else batch
    )
    rows = row_numbers(inputs)
    like: Any = jax.tree.map(lambda _: rows, chosen) if by_leaf else rows
    operands = jax.lax.stop_gradient((chosen, arrays))
    return without_explicit_axes(run, operands, like), chosen


def _completed(params, chosen):
    """Returns params with the leaves to differentiate in their places."""
    return jax.tree.map(lambda w, v: w if is_masked(v) else v, params, chosen)

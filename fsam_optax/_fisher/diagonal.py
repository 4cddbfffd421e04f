"""Estimators as pure functions, for notebooks."""

from __future__ import annotations

from typing import Any

import jax
import optax

from fsam_optax._common.checks import (
    broadcast_mask,
    check_no_module,
    check_transformation,
)
from fsam_optax._common.kinds import of_estimator
from fsam_optax._fisher.estimation import key_data, masked_by, SampledState


def with_key(state: Any, key: jax.Array | None) -> Any:
    """Returns the state of an estimator with another key to draw with, if given."""
    if key is None:
        return state
    return jax.tree.map(
        lambda s: s._replace(key=key_data(key)) if isinstance(s, SampledState) else s,
        state,
        is_leaf=lambda s: isinstance(s, SampledState),
    )


def diagonal(
    estimator: optax.GradientTransformation,
    params: Any,
    batch: Any,
    *misplaced: Any,
    key: jax.Array | None = None,
    mask: Any = None,
    **extra_args: Any,
) -> Any:
    """Evaluates an estimator once, from a fresh state.

    Traced anew at every call: repeat it under `jax.jit`.

    Args:
        estimator: An estimator that does not read the gradient.
        params: Parameters at which to evaluate.
        batch: What the loss of the estimator takes: `(inputs, targets)` unless it has
            an `unpack`. The targets may be None if the estimator draws its labels.
        *misplaced: Nothing.
        key: PRNG key to draw with in place of the estimator's own, of the same kind.
            Closed-form estimators have no use for it.
        mask: Tree of bools that is a prefix of params, or a function of params that
            returns one: which of them to evaluate. The others cost nothing, and
            `optax.MaskedNode()` stands in their place. None for all.
        **extra_args: Passed on, such as `loss_args`, `loss_kwargs`, `example_weights`.

    Returns:
        The diagonal, a mean over the labels, with the structure of params.

    Raises:
        TypeError: If estimator is no transformation, or reads the gradient.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import diagonal, fisher_exact, poisson
        >>> estimator = fisher_exact(lambda w, x: x * w[None], poisson)
        >>> print(diagonal(estimator, jnp.zeros(1), (jnp.array([[1.0], [3.0]]), None)))
        [5.]
    """
    check_transformation("estimator", estimator, "fisher_exact(apply_fn, categorical)")
    check_no_module("diagonal", params)
    if misplaced:
        raise TypeError(
            "`diagonal` takes `(estimator, params, batch)`: inputs and targets are one "
            "batch, `(inputs, targets)`, and arguments of the model go into "
            "`loss_args=`."
        )
    chosen = params
    if mask is not None:
        chosen = masked_by(broadcast_mask(mask, params, "mask"), params)
        extra_args["full_params"] = params
    state = with_key(of_estimator(estimator.init(chosen)), key)
    estimator = optax.with_extra_args_support(estimator)
    no_gradient: Any = None
    result, _ = estimator.update(no_gradient, state, chosen, batch=batch, **extra_args)
    if jax.tree.structure(result) != jax.tree.structure(chosen):
        raise TypeError(
            "`estimator` must return a diagonal with the structure of `params`. If it "
            "reads the gradient, as `squared_gradient` does, call `update` with one."
        )
    return result

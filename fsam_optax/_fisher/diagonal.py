"""Estimators as pure functions, for notebooks."""

from typing import Any

import jax
import optax

from fsam_optax._common.checks import check_no_module, check_transformation
from fsam_optax._fisher.estimation import key_data, SampledState


def diagonal(
    estimator: optax.GradientTransformation,
    params: Any,
    batch: Any,
    *,
    key: jax.Array | None = None,
    **extra_args: Any,
) -> Any:
    """Evaluates an estimator once, from a fresh state.

    Traced anew at every call: repeat it under `jax.jit`.

    Args:
        estimator: An estimator that does not read the gradient.
        params: Parameters at which to evaluate.
        batch: `(inputs, targets)`; the targets may be None if the estimator draws its
            labels or needs none.
        key: PRNG key to draw with in place of the estimator's own, of the same kind.
            Closed-form estimators have no use for it.
        **extra_args: Passed on, such as `example_weights`.

    Returns:
        The mean per-example diagonal, with the structure of params.

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
    state = estimator.init(params)
    if key is not None:
        state = jax.tree.map(
            lambda s: (
                s._replace(key=key_data(key)) if isinstance(s, SampledState) else s
            ),
            state,
            is_leaf=lambda s: isinstance(s, SampledState),
        )
    estimator = optax.with_extra_args_support(estimator)
    no_gradient: Any = None
    result, _ = estimator.update(no_gradient, state, params, batch=batch, **extra_args)
    if jax.tree.structure(result) != jax.tree.structure(params):
        raise TypeError(
            "`estimator` must return a diagonal with the structure of `params`. If it "
            "reads the gradient, as `squared_gradient` does, call `update` with one."
        )
    return result

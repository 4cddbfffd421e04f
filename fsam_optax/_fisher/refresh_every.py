"""A cache around an estimator."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import check_count, check_params, check_transformation
from fsam_optax._common.kinds import of_estimator
from fsam_optax._common.mapped_axes import axes_of_shards, vary_like
from fsam_optax._fisher.estimation import full_like


class RefreshEveryState(NamedTuple):
    """State of `refresh_every`.

    Attributes:
        age: Updates since the diagonal was computed, modulo k.  # shape=(), dtype=int32
        diagonal: The last diagonal computed; zeros before the first update.
        estimator: State of the estimator.
    """

    age: jax.Array
    diagonal: Any
    estimator: optax.OptState


def refresh_every(
    k: int, estimator: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Computes the diagonal at every k-th update, from the first on, and repeats it.

    The updates between cost nothing and leave the state of the estimator as it is.
    Under `jax.vmap` every update computes, as `jax.lax.cond` does there.

    Args:
        k: Number of updates that one diagonal serves, >= 1.
        estimator: The estimator. It receives every extra argument.

    Returns:
        An estimator with the output of the given one. For a moving average of fresh
        values only, put the average inside:
        `refresh_every(k, optax.chain(estimator, optax.ema(decay)))`.

    Raises:
        ValueError: If k < 1.
        TypeError: If estimator is no transformation.

    Examples:
        >>> import jax.numpy as jnp
        >>> from fsam_optax import squared_gradient
        >>> estimator = refresh_every(2, squared_gradient())
        >>> w = jnp.zeros([])
        >>> state = estimator.init(w)
        >>> for gradient in [1.0, 2.0, 3.0, 4.0]:
        ...     diagonal, state = estimator.update(jnp.array(gradient), state, w)
        ...     print(diagonal)
        1.0
        1.0
        9.0
        9.0
    """
    check_count("k", k)
    check_transformation("estimator", estimator, "fisher_exact(apply_fn, categorical)")
    estimator = optax.with_extra_args_support(estimator)

    def init_fn(params):
        return RefreshEveryState(
            age=jnp.zeros([], jnp.int32),
            diagonal=jax.tree.map(lambda w: full_like(w, 0), params),
            estimator=of_estimator(estimator.init(params)),
        )

    def update_fn(updates, state, params=None, **extra_args):
        check_params("refresh_every", params)

        def compute():
            diagonal, estimator_state = estimator.update(
                updates, state.estimator, params, **extra_args
            )
            # A branch of `cond` must return the types of the other one.
            diagonal = jax.tree.map(
                lambda new, old: jnp.asarray(new, old.dtype), diagonal, state.diagonal
            )
            return diagonal, estimator_state

        kept = state.diagonal, state.estimator
        operands = jax.tree.leaves((updates, params, extra_args, kept))
        alike = kept
        if axes_of_shards([x for x in operands if hasattr(x, "dtype")]):
            # Inside of `jax.shard_map`, what is computed differs between devices.
            alike = jax.eval_shape(compute)
        diagonal, estimator_state = jax.lax.cond(
            state.age == 0,
            lambda: vary_like(compute(), kept),
            lambda: vary_like(kept, alike),
        )
        return diagonal, RefreshEveryState(
            age=(state.age + 1) % k, diagonal=diagonal, estimator=estimator_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

"""Memory in front of a ball: what of the gradients before goes into its direction.

To be put before a ball with `optax.chain`. The front ends keep a gradient that is not
finite out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._common.checks import check_number, is_real
from fsam_optax._common.norms import widen


class AverageState(NamedTuple):
    """State of `friendly` and `averaged`.

    Attributes:
        seen: Gradients in the average; saturates.  # shape=(), dtype=int32
        average: The average M, like the parameters in float32 or wider; 0 before the
            first gradient.
    """

    seen: jax.Array
    average: Any


def friendly(
    sigma: jax.typing.ArrayLike = 1.0, decay: jax.typing.ArrayLike = 0.9
) -> optax.GradientTransformation:
    """Takes the average gradient out of the gradient: Friendly SAM, before a ball.

        d = g - sigma M,    then    M <- decay M + (1 - decay) g        (first: M = g)

    What is left is the noise of the batch, and `chain(friendly(...), ball)` perturbs
    along that. The first gradient passes as it is; sigma = 0 is the ball alone. The
    order is that of the authors' code: M without the gradient at hand is subtracted.
    With the order of the paper, M updated first, sigma' does what `sigma = sigma' decay
    / (1 - sigma' (1 - decay))` does here; at sigma = 1 the two agree.

    Args:
        sigma: How much of the average is taken out.
        decay: Weight of the old average, in [0, 1]: lambda of the authors.

    Returns:
        A transformation from g to d, in float32 or wider, with a state of the size of
        the parameters.

    Raises:
        ValueError: If decay is a Python number out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fsam_optax import euclidean_ball
        >>> ascent = optax.chain(friendly(sigma=1.0, decay=0.5), euclidean_ball(0.1))
        >>> state = ascent.init(jnp.zeros(2))
        >>> eps, state = ascent.update(jnp.array([1.0, 0.0]), state)
        >>> eps, state = ascent.update(jnp.array([1.0, 1.0]), state)
        >>> print(eps)  # What both gradients have is not perturbed.
        [0.  0.1]

    References:
        Li et al., Friendly Sharpness-Aware Minimization, 2024,
        https://arxiv.org/abs/2403.12350 (algorithm 1).
    """
    check_number("sigma", sigma, 0)
    check_number("decay", decay, 0, 1)

    def update_fn(updates, state, params=None):
        del params
        started = state.seen > 0
        d = _map(
            lambda g, m: jnp.where(started, g - sigma * m, g), updates, state.average
        )
        return d, _advance(state, updates, decay)

    return optax.GradientTransformation(_no_average, update_fn)


def averaged(decay: jax.typing.ArrayLike = 0.9) -> optax.GradientTransformation:
    """Replaces the gradient by the average gradient: VaSSO, before a ball.

        M <- decay M + (1 - decay) g        (first: M = g)

    The direction of `chain(averaged(decay), ball)` is less at the mercy of one batch.
    `optax.ema` starts at 0 instead, and its debiased average weighs the first gradients
    in another way; `optax.trace` starts at 0 too: the direction of a momentum buffer.

    Args:
        decay: Weight of the old average, in [0, 1]: 1 - theta of the authors, whose
            theta weighs the new gradient.

    Returns:
        A transformation from g to M, in float32 or wider, with a state of the size of
        the parameters.

    Raises:
        ValueError: If decay is a Python number out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> average = averaged(0.75)
        >>> state = average.init(jnp.zeros(1))
        >>> for g in (4.0, 8.0):
        ...     m, state = average.update(jnp.array([g]), state)
        ...     print(m)
        [4.]
        [5.]

    References:
        Li, Giannakis, Enhancing Sharpness-Aware Optimization Through Variance
        Suppression, 2023, https://arxiv.org/abs/2309.15639 (VaSSO).
    """
    check_number("decay", decay, 0, 1)

    def update_fn(updates, state, params=None):
        del params
        state = _advance(state, updates, decay)
        return state.average, state

    return optax.GradientTransformation(_no_average, update_fn)


def _no_average(params: Any) -> AverageState:
    def zeros(w):
        if is_real(w):
            return jnp.zeros_like(w, widen(w))
        return jnp.zeros(jnp.shape(w), widen())

    return AverageState(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params))


def _advance(state: AverageState, grads: Any, decay: Any) -> AverageState:
    started = state.seen > 0
    average = _map(
        lambda g, m: jnp.where(started, decay * m + (1 - decay) * g, g),
        grads,
        state.average,
    )
    return AverageState(jnp.asarray(optax.safe_increment(state.seen)), average)


def _map(rule: Callable[..., jax.Array], grads: Any, average: Any) -> Any:
    """Applies a rule to gradient and average; 0 for leaves that hold no real numbers.

    In the dtype of the average, which is float32 or wider.
    """

    def leaf(g, m):
        if not is_real(g):
            return m
        return rule(jnp.asarray(g, m.dtype), m).astype(m.dtype)

    return jax.tree.map(leaf, grads, average)

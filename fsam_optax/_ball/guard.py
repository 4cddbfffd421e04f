"""The guard: a gradient that is not finite moves nothing and is not remembered."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._ball.perturbation import PerturbationState
from fsam_optax._common.checks import is_real
from fsam_optax._common.late import all_finite


class Ascent(NamedTuple):
    """What a perturbation made of a gradient.

    Attributes:
        eps: The perturbation, 0 everywhere if not `finite`.
        state: The state afterwards; what is not a ball is as it was if not `finite`.
        finite: Whether the gradient was finite, as far as the balls looked at it, or
            eps if there is no ball.  # shape=()
        moved: Whether there is an eps: finite, and not every ball skipped.  # shape=()
    """

    eps: Any
    state: optax.OptState
    finite: jax.Array
    moved: jax.Array


def ascend(
    perturbation: optax.GradientTransformationExtraArgs,
    grads: Any,
    state: optax.OptState,
    params: Any,
    extra: dict[str, Any],
) -> Ascent:
    """Updates a perturbation, and guards what it remembers.

    A ball guards what is inside it and counts what it skips; this guards what stands
    beside or in front of it.
    """
    eps, after = perturbation.update(grads, state, params, **extra)
    found = list(zip(balls(state), balls(after), strict=True))
    if found:
        norms = [jnp.isfinite(new.dual_norm) for _, new in found]
        finite = functools.reduce(jnp.logical_and, norms)
        moves = [new.skipped == old.skipped for old, new in found]
        moved = finite & functools.reduce(jnp.logical_or, moves)
    else:
        finite = moved = all_finite(filter(is_real, jax.tree.leaves(eps)))
    if len(found) != 1:
        eps = jax.tree.map(lambda e: jnp.where(finite, e, 0) if is_real(e) else e, eps)
    usable = finite
    if len(jax.tree.leaves(state, is_leaf=is_ball)) > len(found):
        # What is remembered in front of a ball holds the leaves that the ball masks.
        usable = finite & all_finite(filter(is_real, jax.tree.leaves(grads)))
    return Ascent(eps, keep_unless(usable, after, state), finite, moved)


def balls(state: optax.OptState) -> list[PerturbationState]:
    """Returns the states of the balls in a state."""
    return [x for x in jax.tree.leaves(state, is_leaf=is_ball) if is_ball(x)]


def is_ball(node: Any) -> bool:
    """Tells whether a node of a state is that of a ball."""
    return isinstance(node, PerturbationState)


def keep_unless(usable: jax.Array, after: Any, before: Any) -> Any:
    """Returns the state `after` where it is usable; balls see to themselves."""

    def select(new, old):
        if is_ball(new):
            return new
        return jax.tree.map(functools.partial(jnp.where, usable), new, old)

    return jax.tree.map(select, after, before, is_leaf=is_ball)

"""What a state belongs to: what stands in the place of something else is told by it."""

from typing import Any

import jax
import optax


# What the states of optimizers hold and those of perturbations do not. Plain
# `optax.sgd` has no state and cannot be told from one.
OPTIMIZERS = (
    optax.ScaleByAdamState,
    optax.ScaleByAmsgradState,
    optax.ScaleByBeliefState,
    optax.ScaleByLBFGSState,
    optax.ScaleByLionState,
    optax.ScaleByNovogradState,
    optax.ScaleByRmsState,
    optax.ScaleByRStdDevState,
    optax.ScaleByRssState,
    optax.ScaleBySM3State,
    optax.TraceState,
)


def is_optimizer(state: Any) -> bool:
    """Tells whether a state is that of a whole optimizer, a chain.

    Its parts alone are not one: rules of a caller's own may keep such states.
    """
    if type(state) is not tuple or not state:
        return False
    return isinstance(state[0], OPTIMIZERS) or any(map(is_optimizer, state))


def holds_ball(state: Any) -> bool:
    """Tells whether there is the state of a ball in a state.

    By its fields: estimators stand beside balls and do not import them.
    """

    def is_ball(node):
        return {"rho", "dual_norm"} <= set(getattr(node, "_fields", ()))

    return any(map(is_ball, jax.tree.leaves(state, is_leaf=is_ball)))


def of_estimator(state: Any) -> Any:
    """Returns an estimator's state; raises TypeError for a ball's or an optimizer's."""
    kind = "an optimizer" if is_optimizer(state) else None
    if holds_ball(state):
        kind = "a perturbation, such as `euclidean_ball`"
    if kind is not None:
        raise TypeError(
            f"`estimator` is {kind}: its output would be taken for a Fisher diagonal. "
            "Give `fisher_exact(nll)`, `squared_gradient()` or another estimator."
        )
    return state

"""The worst-case perturbation: the one place where its formula is written."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._ball.operators import identity
from fsam_optax._common.checks import (
    check_leaves,
    check_like,
    check_number,
    check_transformation,
    movable,
)
from fsam_optax._common.mapped_axes import AxisName
from fsam_optax._common.norms import direction, norm, Reciprocal, widen


class PerturbationState(NamedTuple):
    """State of `perturbation`.

    Attributes:
        count: Updates made so far; saturates.  # shape=(), dtype=int32
        skipped: Updates that returned zero because the gradient was zero or not
            finite; saturates.  # shape=(), dtype=int32
        rho: Radius of the last update.  # shape=(), dtype=float32
        dual_norm: `||T g||_q` at the last update. The loss rises by `rho * dual_norm`
            to first order.  # shape=(), dtype=float32
        operator: State of the operator.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  (Optax's name)
    skipped: jax.Array
    rho: jax.Array
    dual_norm: jax.Array
    operator: optax.OptState


def perturbation(
    rho: jax.typing.ArrayLike | optax.Schedule,
    operator: optax.GradientTransformation | None = None,
    *,
    ord: jax.typing.ArrayLike = 2,
    mask: Any | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Maps a gradient to the worst-case perturbation inside a ball in any geometry.

        eps = argmax <g, eps>  subject to  ||T^-1 eps||_p <= rho,      1/p + 1/q = 1
            = rho T sign(Tg) (|Tg| / ||Tg||_q)^(q-1)
        p = 2:    rho T^2 g / ||T g||_2
        p = inf:  rho T sign(g)

    The norm is one scalar over the whole tree, never one per leaf. Where the loss is
    linear, eps raises it by `rho ||Tg||_q`; where it is not, eps is only the
    first-order answer, and for a large rho the loss at w + eps may be anything.

    Args:
        rho: Radius of the ball, in the units of `T^-1 params`: a number >= 0, or a
            schedule of the number of updates made so far, which lives in the state
            and is never reset.
        operator: Transformation whose output is the positive diagonal T, with the
            structure of the gradient. It receives every extra argument. None is T = 1.
        ord: The p of the ball, in (1, inf].
        mask: Tree of bools that is a prefix of the parameters, or a function of the
            parameters that returns one. Leaves under False get a zero perturbation
            and do not count in the norm.
        axis_name: Mapped axes of `jax.shard_map` or `jax.pmap` over which the
            *parameters* are sharded by hand: the norm is summed over them. Not for
            replicated parameters, and not needed for arrays sharded under `jax.jit`.

    Returns:
        A transformation whose output is eps: structure and shapes of the gradient,
        float32 or wider. It points uphill: *add* it to the parameters. It is exactly
        zero where the gradient is zero, and for leaves that hold no real numbers. A
        gradient or T that is not finite gives zero everywhere, leaves the state of
        the operator as it was, and is counted in the state as `skipped`.

    Raises:
        ValueError: If rho or ord is a Python number out of range; in `update`, if the
            gradient differs from the parameters in structure or shape.
        TypeError: In `update`, if a leaf is complex or not an array.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> ball = perturbation(rho=0.5)
        >>> grads = jnp.array([3.0, -4.0])
        >>> eps, state = ball.update(grads, ball.init(grads))
        >>> print(eps, state.dual_norm)
        [ 0.3 -0.4] 5.0

        An operator of one's own: perturb the first coordinate twice as far.

        >>> double = optax.stateless(lambda grads, params: jnp.array([2.0, 1.0]))
        >>> eps, _ = (box := perturbation(0.5, double, ord=jnp.inf)).update(
        ...     grads, box.init(grads)
        ... )
        >>> print(eps)
        [ 1.  -0.5]

    References:
        Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently
        Improving Generalization, 2021, https://arxiv.org/abs/2010.01412 (equation 2).
    """
    if not callable(rho):
        check_number("rho", rho, 0)
    check_number("ord", ord, 1, jnp.inf, open=True)
    if operator is not None:
        check_transformation("operator", operator, "optax.stateless(...)")
    operator = optax.with_extra_args_support(operator or identity())
    exponent = 1 / (ord - 1)  # q - 1
    dual_ord = 1 / (1 - 1 / ord)  # q

    def init_fn(params):
        return PerturbationState(
            count=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            rho=jnp.zeros([], jnp.float32),
            dual_norm=jnp.zeros([], jnp.float32),
            operator=operator.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        check_leaves(updates, "grads")
        if params is not None:
            check_leaves(params, "params")
            check_like("grads", updates, "params", params)
        like = updates if params is None else params
        moves = movable(updates, params, mask)
        radius = rho(state.count) if callable(rho) else rho
        t, operator_state = operator.update(
            updates, state.operator, params, **extra_args
        )

        if jax.tree.structure(t) != jax.tree.structure(updates):
            raise ValueError(
                "`operator` must return a tree with the structure of `grads`, got "
                f"{jax.tree.structure(t)} for {jax.tree.structure(updates)}."
            )

        def scale(path, move, g, w, t):
            if not move:
                return None
            if jnp.broadcast_shapes(jnp.shape(t), jnp.shape(g)) != jnp.shape(g):
                raise ValueError(
                    f"`operator` returned shape {jnp.shape(t)} for leaf "
                    f"{jax.tree_util.keystr(path) or 'at the root'} of shape "
                    f"{jnp.shape(g)}."
                )
            dtype = widen(g, w)
            return jnp.asarray(t, dtype) * jnp.asarray(g, dtype)

        tg = jax.tree_util.tree_map_with_path(scale, moves, updates, like, t)
        dual_norm = norm(jax.tree.leaves(tg), dual_ord, axis_name)
        usable = jnp.isfinite(dual_norm) & (dual_norm > 0)
        length = Reciprocal.of(dual_norm)

        def worst_case(move, g, t, tg):
            if not move:
                return jnp.zeros(jnp.shape(g), widen())
            eps = jnp.asarray(t, tg.dtype) * direction(tg, length, exponent)
            eps = jnp.asarray(radius, tg.dtype) * eps
            return jnp.where(usable, eps, 0).astype(tg.dtype)

        eps = jax.tree.map(worst_case, moves, updates, t, tg)
        return eps, PerturbationState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            skipped=jnp.where(
                usable, state.skipped, optax.safe_increment(state.skipped)
            ),
            rho=jnp.array(radius, jnp.float32),
            dual_norm=jnp.asarray(dual_norm, jnp.float32),
            operator=jax.tree.map(
                lambda new, old: jnp.where(usable, new, old),
                operator_state,
                state.operator,
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

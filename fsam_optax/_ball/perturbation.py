"""The worst-case perturbation: the one place where its formula is written."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsam_optax._ball.arguments import (
    check_flag,
    check_length,
    check_operator,
    check_order,
    check_radius,
    check_signature,
    check_state,
    length_at,
    radius_at,
)
from fsam_optax._ball.operators import identity
from fsam_optax._common.checks import (
    check_leaves,
    check_like,
    check_transformation,
    movable,
)
from fsam_optax._common.late import is_small
from fsam_optax._common.mapped_axes import AxisName, check_axes
from fsam_optax._common.norms import (
    direction,
    norm,
    norms,
    Reciprocal,
    widen,
    with_derivative,
)


Length = Callable[[jax.Array, jax.Array], jax.typing.ArrayLike]


class PerturbationState(NamedTuple):
    """State of `perturbation`.

    Attributes:
        count: Updates made so far; saturates.  # shape=(), dtype=int32
        skipped: Updates that returned zero because the gradient was zero or not
            finite; saturates.  # shape=(), dtype=int32
        rho: Radius of the last update, before `length`.  # shape=(), dtype=float32
        dual_norm: `||T g||_q` at the last update, with `per_leaf` the sum of those of
            the arrays. Without `length`, the loss rises by `rho * dual_norm` to first
            order.  # shape=(), dtype=float32
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
    length: Length | None = None,
    per_leaf: bool = False,
    shard_axes: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Maps a gradient to the worst-case perturbation inside a ball in any geometry.

        eps = argmax <g, eps>  subject to  ||T^-1 eps||_p <= rho,      1/p + 1/q = 1
            = rho T sign(Tg) (|Tg| / ||Tg||_q)^(q-1)
        p = 2:    rho T^2 g / ||T g||_2
        p = inf:  rho T sign(g)

    The norm is one scalar over the whole tree; with `per_leaf`, one for every array.
    Where the loss is linear, eps raises it by `rho ||Tg||_q`; where it is not, eps is
    only the first-order answer, and for a large rho the loss at w + eps may be
    anything.

    Derivatives of eps by g, T and rho, in both modes, are right for gradients of any
    magnitude, so that one can differentiate through training (see the last example). By
    g they grow as `rho / ||Tg||`. Where eps is 0 because g is, or is not finite, they
    are taken as 0; where p > 2, so is that of a single entry of eps that is 0, which is
    infinite. (A front end calls eps a constant because no derivative goes through it
    into the *step*; one through the whole step goes through eps too.)

    Args:
        rho: Radius of the ball, in the units of `T^-1 params`: a number >= 0, or a
            schedule of the number of updates made so far, which lives in the state
            and is never reset.
        operator: Transformation whose output is the positive diagonal T, with the
            structure of the gradient. It receives every extra argument. None is T = 1.
        ord: The p of the ball, in (1, inf].
        mask: Tree of bools that is a prefix of the parameters, or a function of the
            parameters that returns one. Leaves under False get a zero perturbation
            and do not count in the norm. What the base optimizer freezes is perturbed
            like all the rest, and can take most of eps: mask it here as well. (The
            metric `leaf_perturbation_norms` of a step shows where eps lies.)
        length: Function `(||Tg||_q, count) -> factor` by which rho is multiplied; count
            is the number of updates before this one. None is SAM, a factor of 1.
            `lambda n, count: n` is unnormalised SAM, rho T^2 g, and
            `lambda n, count: (1 - c) * n + c` unified SAM. (In
            `optax.inject_hyperparams`, name it in `static_args`, as `mask` if that is a
            function.)
        per_leaf: Whether every array has a norm of its own, and a `length`: a product
            of balls of radius rho each, as in adversarial weight perturbation. Arrays
            whose gradient is 0 stay while the others move.
        shard_axes: Mapped axes of `jax.shard_map` or `jax.pmap` over which the
            *parameters* are sharded by hand: norms are summed over them. Not for
            replicated parameters, and not needed for arrays sharded under `jax.jit`.
            (The `axis_name` of a front end is another thing: what is averaged.)

    Returns:
        A transformation whose output is eps: structure and shapes of the gradient,
        float32 or wider, pointing uphill, to be *added* to the parameters. It is
        exactly zero where the gradient is zero, and for leaves that hold no real
        numbers. A gradient or T that is not finite gives zero everywhere, leaves the
        state of the operator as it was, and is counted in the state as `skipped`; a
        factor that is not finite, in its ball.

    Raises:
        ValueError: If rho or ord is a Python number out of range; in `update`, if the
            gradient differs from the parameters in structure or shape, or rho or length
            returns no scalar.
        TypeError: If an argument is of another type; in `update`, if a leaf is complex
            or not an array, or the state is that of something else.
        NameError: In `update`, if `shard_axes` names no mapped axis.

    Examples:
        >>> import jax
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

        A ball for each array, and unnormalised SAM.

        >>> grads = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([1e-3, 0.0])}
        >>> balls = perturbation(0.5, per_leaf=True)
        >>> eps, state = balls.update(grads, balls.init(grads))
        >>> print(eps["a"], eps["b"], state.dual_norm)
        [ 0.3 -0.4] [0.5 0. ] 5.001
        >>> plain = perturbation(0.5, length=lambda norm, count: norm)
        >>> eps, _ = plain.update(grads, plain.init(grads))
        >>> print(eps["a"], eps["b"])
        [ 1.5 -2. ] [0.0005 0.    ]

        Meta-learning: the derivative of the loss after two steps of SAM by the radius
        and by the initial parameters. The second step finds a gradient of 0.

        >>> from fsam_optax import sam
        >>> def loss_after(rho, w):
        ...     optimizer = sam(optax.sgd(0.1), rho)
        ...     state = optimizer.init(w)
        ...     for weight in (1.0, 0.0):
        ...         grad_fn = jax.grad(lambda w, c=weight: c * jnp.sum(w**2))
        ...         g = grad_fn(w)
        ...         update, state = optimizer.update(g, state, w, grad_fn=grad_fn)
        ...         w = optax.apply_updates(w, update)
        ...     return jnp.sum(w**2)
        >>> w = jnp.array([3.0, 4.0])
        >>> d_rho, d_w = jax.jit(jax.grad(loss_after, argnums=(0, 1)))(0.5, w)
        >>> print(d_rho, d_w)  # w becomes (0.8 - 0.2 rho / |w|) w.
        -1.56 [3.744 4.992]

    References:
        Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently
        Improving Generalization, 2021, https://arxiv.org/abs/2010.01412 (equation 2).
        `length`: Oikonomou, Loizou, Sharpness-Aware Minimization: General Analysis and
        Improved Rates, 2025, https://arxiv.org/abs/2503.02225. `per_leaf`: Wu, Xia,
        Wang, Adversarial Weight Perturbation Helps Robust Generalization, 2020,
        https://arxiv.org/abs/2004.05884.
    """
    check_radius(rho, "perturbation(rho, operator)")
    if isinstance(operator, numbers.Number):
        raise TypeError(
            f"`operator` must be an optax.GradientTransformation, got {operator}: all "
            "arguments after it are keywords, `ord` is one of them."
        )
    if operator is not None:
        check_transformation("operator", operator, "optax.stateless(...)")
    check_signature("mask", mask, "params")
    check_order(ord)
    check_length(length)
    check_flag("per_leaf", per_leaf, "To leave arrays out, use `mask`.")
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

    def worst_case(ts, gs, radius, count):
        """Returns eps, the dual norm, and whether there is one, of what may move."""
        ts = [
            t if isinstance(t, float) else _beside(t, g)
            for t, g in zip(ts, gs, strict=True)
        ]
        # In two factors: T g is an array that nothing but its norm needs.
        products = [
            jax.lax.stop_gradient(t * g if isinstance(t, float) else (t, g))
            for t, g in zip(ts, gs, strict=True)
        ]
        if per_leaf:
            known, finite = norms(products, dual_ord, shard_axes)
        else:
            known = [norm(products, dual_ord, shard_axes)]
            finite = jnp.isfinite(known[0])
        usable = [finite & (n > 0) for n in known]

        def per_array(balls):
            return balls if per_leaf else balls * len(gs)

        # Safe from here on: eps must have a derivative also where it must be 0.
        oks = per_array(usable)
        ts = [_where(ok, t, 1) for ok, t in zip(oks, ts, strict=True)]
        gs = [_where(ok, g, 0) for ok, g in zip(oks, gs, strict=True)]
        products = [t * g for t, g in zip(ts, gs, strict=True)]
        safe = [_where(ok, n, 1) for ok, n in zip(usable, known, strict=True)]
        safe = with_derivative(safe, products, dual_ord, shard_axes)
        dual_norms = list(map(jnp.where, usable, safe, known))
        radii = [radius] * len(safe)
        if length is not None:
            factors = [length_at(length, n, count) for n in safe]
            usable = [
                ok & jnp.isfinite(x) for ok, x in zip(usable, factors, strict=True)
            ]
            radii = [radius * factor for factor in factors]
        radii = [jnp.where(ok, r, 0) for ok, r in zip(usable, radii, strict=True)]
        units = [Reciprocal.of(n) for n in safe]
        eps = [
            jnp.asarray(r, x.dtype) * (t * direction(x, unit, exponent))
            for r, t, x, unit in zip(
                per_array(radii), ts, products, per_array(units), strict=True
            )
        ]
        dual_norm = sum(dual_norms, jnp.zeros([], widen(*dual_norms)))
        return eps, dual_norm, jnp.any(jnp.array(usable, bool))

    def update_fn(updates, state, params=None, **extra_args):
        check_leaves(updates, "grads")
        if params is not None:
            check_leaves(params, "params")
            check_like("grads", updates, "params", params)
        check_state(state, PerturbationState)
        check_axes("shard_axes", shard_axes)
        like = updates if params is None else params
        moves = movable(updates, params, mask)
        radius = radius_at(rho, state.count)
        t, operator_state = operator.update(
            updates, state.operator, params, **extra_args
        )
        check_operator(t, updates)
        pairs = [
            (_as_array(t, widen(g, w)), jnp.asarray(g, widen(g, w)))
            for move, t, g, w in zip(
                *map(jax.tree.leaves, (moves, t, updates, like)), strict=True
            )
            if move
        ]
        moved, dual_norm, found = worst_case(
            [t for t, _ in pairs], [g for _, g in pairs], radius, state.count
        )
        rest = iter(moved)
        eps = jax.tree.map(
            lambda move, g: next(rest) if move else jnp.zeros(jnp.shape(g), widen()),
            moves,
            updates,
        )
        return eps, PerturbationState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            skipped=jnp.where(
                found, state.skipped, optax.safe_increment(state.skipped)
            ),
            rho=jnp.array(radius, jnp.float32),
            dual_norm=jnp.asarray(dual_norm, jnp.float32),
            operator=jax.tree.map(
                lambda new, old: jnp.where(found, new, old),
                operator_state,
                state.operator,
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _as_array(t: Any, dtype: jnp.dtype) -> Any:
    """Returns T as an array; as it is if it is a number, such as 1."""
    number = isinstance(t, float) and math.isfinite(t)
    return t if number else jnp.asarray(t, dtype)


def _beside(t: jax.Array, g: jax.Array) -> jax.Array:
    """Returns T such that compilers do not form it before g is there, to hold it."""
    if is_small(t):
        return t
    never = jnp.isnan(g) & (g > 0)
    # A product, since T may lie on the devices in another way, which a choice may not.
    return t * jnp.where(jax.lax.stop_gradient(never), 2, 1).astype(t.dtype)


def _where(usable: jax.Array, x: Any, instead: float) -> Any:
    """Returns an array where it is usable; a finite number always is."""
    number = isinstance(x, float)
    return x if number else jnp.where(usable, x, jnp.full_like(x, instead))
